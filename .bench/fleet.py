#!/usr/bin/env python3
"""Twenty gateways with 25 boards each at one broker: how long a stop takes to the last board, and what it costs.

    sudo apt install mosquitto && .venv/bin/python .bench/fleet.py [--help]

Everything runs on this machine: Mosquitto, the gateways as processes of their own, all boards in this one, which is also the
caller. Each board reports five readings a second and acknowledges every command.

1. without a broker: memory and processor time of a gateway;
2. with it: the same; `stop` to `amhrpd/all/command` once a second, and when the last of all boards had it;
3. the broker is killed and started anew once a minute meanwhile: is any command carried out that is older than two seconds, and
   does the broker have everything right at the end?
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import aiomqtt
from mosquitto import HOST, TEXT, Wire

HERE = Path(__file__).resolve().parent
STALE_S = 2.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server((HOST, 0)) as listener:
        return int(listener.getsockname()[1])


def percentile(times_s: Sequence[float], share: int) -> str:
    """One of the nearest-rank percentiles, in milliseconds."""
    return f"{sorted(times_s)[math.ceil(len(times_s) * share / 100) - 1] * 1000:.0f} ms" if times_s else "none"


class Server:
    """A process that is started, ended and looked at."""

    def __init__(self, *command: str, **environ: str) -> None:
        self._command, self._environ = command, os.environ | environ

    def start(self) -> None:
        """Run it."""
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(self._command, env=self._environ, stdout=quiet, stderr=quiet)

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End it, and wait for that."""
        self.process.send_signal(how)
        self.process.wait(20)

    def memory_mb(self) -> float:
        """What it has in memory now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def processor_s(self) -> float:
        """The processor time that it took so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


class Board:
    """A board that reports, acknowledges, notes when a command came, and comes back."""

    def __init__(self, fleet: Fleet, port: int, device_id: str) -> None:
        self.device_id, self._fleet, self._port = device_id, fleet, port
        self.seq = 0
        self.wire: Wire | None = None

    def send(self, message_type: str, **fields: object) -> None:
        """Send a message, where there is a connection."""
        if self.wire is not None:
            self.wire.writer.write(Wire.frame(json.dumps({"message_type": message_type, **fields}).encode(), TEXT))

    def report(self) -> None:
        """Tell the readings."""
        self.seq += 1
        readings = {"temperature": 21.5, "humidity": 45.2, "battery": 87, "rssi": -50, "seq": self.seq}
        self.send("status", payload=readings)

    async def live(self) -> None:
        """Be there until cancelled."""
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                self.wire = await Wire.connect(self._port, f"/ws/{self.device_id}", "arduino")
                self.send("registration", device_type="ESP32", metadata={"firmware_version": "2.0.0"})
                async for payload in self.wire.payloads():
                    message = json.loads(payload)
                    if message["message_type"] == "command":
                        self._fleet.note_command(message["payload"]["number"])
                        self.send("command_ack", command_id=message["command_id"], device_type="ESP32")
            self.wire = None
            await asyncio.sleep(0.5)


class Fleet:
    """The broker, the gateways, their boards, and who commands them."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self._folder, self._options = folder, options
        self._port = free_port()
        config = folder / "mosquitto.conf"
        config.write_text(f"listener {self._port} {HOST}\nallow_anonymous true\nsys_interval 1\n")
        self._broker = Server("/usr/sbin/mosquitto", "-c", str(config))
        self._sent_s: list[float] = []  # by number: when a command was sent
        self._came_s: list[list[float]] = []  # and when it came to each board
        self._kept: dict[str, bytes] = {}
        self._refused: list[str] = []
        self._client: aiomqtt.Client | None = None
        self.gateways: list[Server] = []
        self.boards: list[Board] = []

    def note_command(self, number: int) -> None:
        """A command came to a board."""
        self._came_s[number].append(time.monotonic())

    @contextlib.contextmanager
    def running(self, *, at_broker: bool) -> Iterator[None]:
        """The gateways, with the boards that connect to them."""
        self.gateways, self.boards = [], []
        for number in range(1, self._options.gateways + 1):
            gateway_id, port = f"gw{number:02}", free_port()
            environ = {
                "AMHRPD_PORT": str(port),
                "AMHRPD_HOST": HOST,
                "DATABASE_URL": f"sqlite:///{self._folder}/{gateway_id}-{at_broker}.db",
                "AMHRPD_LOG_LEVEL": "warning",
            }
            if at_broker:
                environ |= {"AMHRPD_MQTT_URL": f"mqtt://{HOST}:{self._port}", "AMHRPD_GATEWAY_ID": gateway_id}
            self.gateways.append(Server(sys.executable, str(HERE.parent / "amhrpd.py"), **environ))
            self.gateways[-1].start()
            for board in range(1, self._options.boards + 1):
                self.boards.append(Board(self, port, f"esp_{board:02}"))
        try:
            yield
        finally:
            for gateway in self.gateways:
                gateway.end()

    async def work(self) -> None:
        """Let all boards live and report once a second each, evenly."""
        lives = [asyncio.create_task(board.live()) for board in self.boards]
        try:
            while True:
                began_s = time.monotonic()
                for number, board in enumerate(self.boards):
                    board.report()
                    await asyncio.sleep(max(0.0, began_s + (number + 1) / len(self.boards) - time.monotonic()))
        finally:
            for life in lives:
                life.cancel()
            await asyncio.gather(*lives, return_exceptions=True)

    async def listen(self) -> None:
        """Be a client of the broker, whenever it is there, and know what it keeps."""
        while True:
            with contextlib.suppress(aiomqtt.MqttError):
                async with aiomqtt.Client(HOST, self._port, timeout=3) as client:
                    self._kept.clear()
                    await client.subscribe([("amhrpd/#", 0), ("$SYS/broker/publish/messages/+", 0)])
                    self._client = client
                    async for message in client.messages:
                        topic, payload = message.topic.value, message.payload if isinstance(message.payload, bytes) else b""
                        self._kept[topic] = payload
                        if topic.endswith("/result") and payload.startswith(b'{"error"'):
                            self._refused.append(json.loads(payload)["error"])
            self._client = None
            await asyncio.sleep(0.2)

    async def command(self) -> None:
        """Send a stop to every board of every gateway, if the broker is there."""
        if self._client is None:
            return
        order = {"device_type": "*", "command_name": "stop", "payload": {"number": len(self._sent_s)}}
        self._sent_s.append(time.monotonic())
        self._came_s.append([])
        with contextlib.suppress(aiomqtt.MqttError):
            await self._client.publish("amhrpd/all/command", json.dumps(order))

    def messages(self) -> int:
        """How many messages went through the broker so far, in and out."""
        return sum(int(self._kept.get(f"$SYS/broker/publish/messages/{way}", b"0")) for way in ("received", "sent"))

    def wrong(self) -> list[str]:
        """What the broker doesn't have right, but for the second that a state may be late."""
        wrong = []
        for number, board in enumerate(self.boards):
            base = f"amhrpd/gw{number // self._options.boards + 1:02}"
            state: dict[str, Any] = json.loads(self._kept.get(f"{base}/device/{board.device_id}/state", b"{}"))
            are_online = {self._kept.get(f"{base}{topic}") for topic in ("/status", f"/device/{board.device_id}/status")}
            if are_online != {b"online"} or board.seq - state.get("seq", 0) > 3:
                wrong.append(f"{base}/{board.device_id}")
        return wrong

    async def settle(self) -> float:
        """Wait until the broker has everything right. Returns how long that took; fails after two minutes."""
        began_s = time.monotonic()
        while wrong := self.wrong():
            assert time.monotonic() - began_s < 120, f"wrong at the broker: {wrong[:5]} and {len(wrong)} in all"
            await asyncio.sleep(0.1)
        return time.monotonic() - began_s

    async def measure(self, duration_s: float, *, command: bool, restart_s: float = math.inf) -> None:
        """Let it run, command once a second, restart the broker now and then; print what was seen."""
        self._sent_s, self._came_s, self._refused = [], [], []
        began_s, processor_s, messages = time.monotonic(), self._processor_s(), self.messages()
        restarts, next_restart_s = 0, began_s + restart_s
        while (now_s := time.monotonic()) < began_s + duration_s:
            if command:
                await self.command()
            if now_s >= next_restart_s:
                restarts, next_restart_s = restarts + 1, now_s + restart_s
                self._broker.end(signal.SIGKILL)
                await asyncio.sleep(1)
                self._broker.start()
            show(f"  {now_s - began_s:4.0f} s of {duration_s:.0f}, {len(self._sent_s)} commands, {restarts} restarts")
            await asyncio.sleep(1 - (time.monotonic() - now_s) % 1)
        await asyncio.sleep(STALE_S)
        lasted_s = time.monotonic() - began_s
        count = len(self.gateways)
        memory_mb = sum(gateway.memory_mb() for gateway in self.gateways) / count
        percent = (self._processor_s() - processor_s) / lasted_s / count * 100
        show("")
        print(f"  a gateway: {memory_mb:.1f} MB, {percent:.1f} % of a core", flush=True)
        if command:
            self._print_commands()
        if command and restart_s == math.inf:
            print(f"  through the broker: {(self.messages() - messages) / lasted_s:.0f} messages a second, in and out")

    def _processor_s(self) -> float:
        return sum(gateway.processor_s() for gateway in self.gateways)

    def _print_commands(self) -> None:
        whole = [
            max(came) - sent for sent, came in zip(self._sent_s, self._came_s, strict=True) if len(came) == len(self.boards)
        ]
        late = sum(at - sent > STALE_S for sent, came in zip(self._sent_s, self._came_s, strict=True) for at in came)
        print(
            f"  {len(self._sent_s)} commands, {len(whole)} of them to all {len(self.boards)} boards: the last one had it after"
        )
        print(f"  p50 {percentile(whole, 50)}, p99 {percentile(whole, 99)}; {late} times it came after more than {STALE_S:g} s")
        print(f"  refused by a gateway: {len(self._refused)} times", *sorted(set(self._refused)), flush=True)

    async def play(self) -> None:
        """All three parts."""
        for at_broker in (False, True):
            what = f"{self._options.gateways} gateways with {self._options.boards} boards each"
            print(f"{what}, {'with' if at_broker else 'without'} a broker", flush=True)
            if at_broker:
                self._broker.start()
            with self.running(at_broker=at_broker):
                works = [self.work(), *([self.listen()] if at_broker else [])]
                tasks = [asyncio.create_task(work) for work in works]
                try:
                    while not all(board.wire for board in self.boards):
                        await asyncio.sleep(0.1)
                    if at_broker:
                        await self.settle()
                    await asyncio.sleep(5)
                    await self.measure(self._options.seconds, command=at_broker)
                    if at_broker:
                        print("the broker killed and started anew once a minute")
                        await self.measure(self._options.minutes * 60 + 5, command=True, restart_s=60)
                        print(f"  everything right at the broker {await self.settle():.1f} s later")
                finally:
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)
        self._broker.end()


def show(line: str) -> None:
    """The live line of a terminal."""
    if sys.stdout.isatty():
        print(f"\r\x1b[K{line}", end="", flush=True)


def main() -> None:
    """What the command line asks for."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gateways", type=int, default=20)
    parser.add_argument("--boards", type=int, default=25, help="of each gateway")
    parser.add_argument("--seconds", type=int, default=60, help="of each of the first two parts")
    parser.add_argument("--minutes", type=int, default=3, help="of the third")
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(Fleet(Path(folder), parser.parse_args()).play())


if __name__ == "__main__":
    main()
