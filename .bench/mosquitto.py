#!/usr/bin/env python3
"""The gateway beside Mosquitto, at the same work, in turn: the server on the first core, this client on the second.

    .venv/bin/pip install paho-mqtt && sudo apt install mosquitto && .venv/bin/python .bench/mosquitto.py [rounds]

- snapshots: 50 boards send 2,000 reports each as fast as they can, over WebSocket, until all are rows of an SQLite file.
  What writes the file for Mosquitto is a recorder, which commits what has come, once in PAUSE_S: with the usual library,
  or by hand, which is what Python can do at best. Neither looks into what it writes; the gateway does.
- commands: a caller sends one to ten boards and waits until all have answered, 1,000 times; then the same beside 2,000
  reports a second. The gateway has its row committed first and its last answer committed too; over Mosquitto nothing is
  written.

Every message of MQTT is QoS 1, as those of the gateway are acknowledged or written. On a virtual machine others may have the
processors for some of the time, and then the slowest in a hundred are theirs: that share is printed, too.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import queue
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

Order = Callable[[int], Awaitable[None]]

HOST = "127.0.0.1"
BOARDS, REPORTS = 50, 2000
PAUSE_S = 0.05
TARGETS, COMMANDS = 10, 1000
REPORTS_PER_S = 2000  # beside commands
REPORT = b'{"message_type":"status","payload":{"temperature":25.3,"humidity":45.2,"battery":87,"rssi":-50,"seq":7}}'
TEXT, BINARY, PING, PONG = 1, 2, 9, 10
CONNECT, PUBLISH_QOS1, PUBACK, SUBSCRIBE = 0x10, 0x32, 0x40, 0x82


class Wire:
    """A client's WebSocket, as quick as Python can: frames are built beforehand, and masked with zeros."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, port: int, path: str, subprotocol: str) -> Wire:
        """Do the handshake."""
        reader, writer = await asyncio.open_connection(HOST, port)
        key = base64.b64encode(os.urandom(16)).decode()
        writer.write(
            f"GET {path} HTTP/1.1\r\nHost: {HOST}:{port}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Protocol: {subprotocol}\r\n\r\n".encode()
        )
        head = await reader.readuntil(b"\r\n\r\n")
        if b" 101 " not in head:
            raise ConnectionError(head.decode())
        return cls(reader, writer)

    @staticmethod
    def frame(payload: bytes, opcode: int) -> bytes:
        """A client's frame."""
        size = bytes([0x80 | len(payload)]) if len(payload) < 126 else struct.pack("!BH", 0xFE, len(payload))
        return bytes([0x80 | opcode]) + size + b"\0\0\0\0" + payload

    async def payloads(self) -> AsyncIterator[bytes]:
        """What comes, until the connection ends."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                opcode, size = await self.reader.readexactly(2)
                if size == 126:
                    (size,) = struct.unpack("!H", await self.reader.readexactly(2))
                elif size == 127:
                    (size,) = struct.unpack("!Q", await self.reader.readexactly(8))
                payload = await self.reader.readexactly(size)
                if opcode & 15 == PING:
                    self.writer.write(self.frame(payload, PONG))
                elif opcode & 15 in (0, TEXT, BINARY):
                    yield payload


# -- MQTT 3.1.1 --------------------------------------------------------------------------------------------------------


def packet(kind: int, body: bytes) -> bytes:
    """A control packet in a frame."""
    length, left = b"", len(body)
    while True:
        left, digit = left >> 7, left & 127
        length += bytes([digit | (0x80 if left else 0)])
        if not left:
            return Wire.frame(bytes([kind]) + length + body, BINARY)


def text(value: str) -> bytes:
    """A string with its length."""
    return struct.pack("!H", len(value)) + value.encode()


def publish(topic: str, payload: bytes, number: int = 1) -> bytes:
    """A message to a topic."""
    return packet(PUBLISH_QOS1, text(topic) + struct.pack("!H", number) + payload)


async def packets(wire: Wire) -> AsyncIterator[tuple[int, bytes]]:
    """What a broker sends: kind and body."""
    waiting = bytearray()
    async for payload in wire.payloads():
        waiting += payload
        while len(waiting) >= 2:
            length = at = 0
            for at in range(1, min(5, len(waiting))):
                length |= (waiting[at] & 127) << 7 * (at - 1)
                if waiting[at] < 0x80:
                    break
            else:
                break
            if len(waiting) < at + 1 + length:
                break
            yield waiting[0], bytes(waiting[at + 1 : at + 1 + length])
            del waiting[: at + 1 + length]


async def messages(wire: Wire) -> AsyncIterator[bytes]:
    """The messages of a subscription, acknowledged as they come."""
    async for kind, body in packets(wire):
        if kind & 0xF0 == 0x30:
            (size,) = struct.unpack_from("!H", body)
            wire.writer.write(packet(PUBACK, body[2 + size : 4 + size]))
            yield body[4 + size :]


async def join(port: int, name: str, topic: str | None = None) -> Wire:
    """Connect to the broker, and subscribe to a topic."""
    wire = await Wire.connect(port, "/mqtt", "mqtt")
    wire.writer.write(packet(CONNECT, text("MQTT") + bytes([4, 2, 0, 0]) + text(name)))
    if topic is not None:
        wire.writer.write(packet(SUBSCRIBE, b"\0\1" + text(topic) + b"\1"))
    return wire


def open_file(path: str) -> sqlite3.Connection:
    """A recorder's file."""
    database = sqlite3.connect(path)
    database.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL")
    database.execute("CREATE TABLE reports (id INTEGER PRIMARY KEY, at REAL, text TEXT)")
    return database


def write(database: sqlite3.Connection, batch: Sequence[tuple[float, str]]) -> None:
    """Commit what has come."""
    with database:
        database.executemany("INSERT INTO reports (at, text) VALUES (?, ?)", batch)


def record_with_paho(port: int, path: str) -> None:
    """Write every report into an SQLite file, as those do who want a history beside a broker: with the usual library."""
    came: queue.SimpleQueue[tuple[float, str]] = queue.SimpleQueue()
    client = Client(CallbackAPIVersion.VERSION2, "recorder", transport="websockets")
    client.on_message = lambda _, __, message: came.put((time.time(), message.payload.decode()))
    client.connect(HOST, port)
    client.subscribe("boards/+/status", qos=1)
    client.loop_start()
    database = open_file(path)
    while True:
        time.sleep(PAUSE_S)
        write(database, [came.get() for _ in range(came.qsize())])


async def record_by_hand(port: int, path: str) -> None:
    """The same as quick as Python can, looking into nothing."""
    database, came = open_file(path), list[tuple[float, str]]()

    async def write_what_came() -> None:
        while True:
            await asyncio.sleep(PAUSE_S)
            batch, came[:] = came[:], []
            write(database, batch)

    writing = asyncio.create_task(write_what_came())
    try:
        async for message in messages(await join(port, "recorder", "boards/+/status")):
            came.append((time.time(), message.decode()))
    finally:
        writing.cancel()


# -- the work ----------------------------------------------------------------------------------------------------------


def rows(path: Path, table: str) -> int:
    """How many rows a table has."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)) as database:
        return int(database.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


async def swallow(wire: Wire) -> None:
    """Take what comes."""
    async for _ in wire.payloads():
        pass


async def snapshots(path: Path, table: str, boards: Sequence[tuple[Wire, bytes]]) -> float:
    """Reports a second that came into the file; each board has its own frame to send."""
    await asyncio.sleep(1)

    async def send(wire: Wire, frame: bytes) -> None:
        for _ in range(REPORTS // 20):
            wire.writer.write(frame * 20)
            await wire.writer.drain()

    began_s = time.perf_counter()
    await asyncio.gather(*(send(wire, frame) for wire, frame in boards))
    while rows(path, table) < BOARDS * REPORTS:
        if time.perf_counter() > began_s + 120:
            raise TimeoutError(f"{rows(path, table)} of {BOARDS * REPORTS} came")
        await asyncio.sleep(0.05)
    return BOARDS * REPORTS / (time.perf_counter() - began_s)


async def report_steadily(boards: Sequence[tuple[Wire, bytes]]) -> None:
    """Have the boards send REPORTS_PER_S together."""
    began_s = time.perf_counter()
    for number, (wire, frame) in enumerate(itertools.cycle(boards)):
        wire.writer.write(frame)
        ahead_s = number / REPORTS_PER_S - (time.perf_counter() - began_s)
        if ahead_s > 0.001:
            await asyncio.sleep(ahead_s)


async def commands(order: Order) -> str:
    """How long the orders took."""
    await asyncio.sleep(1)
    took_ms = []
    for number in range(COMMANDS):
        began_s = time.perf_counter()
        await order(number)
        took_ms.append((time.perf_counter() - began_s) * 1000)
    took_ms.sort()
    return ", ".join(f"p{share} {took_ms[COMMANDS * share // 100]:.1f}" for share in (50, 99))


async def work(
    path: Path, table: str, boards: Sequence[tuple[Wire, bytes]], answering: Sequence[Coroutine[Any, Any, None]], order: Order
) -> str:
    """All of it, and what came out. A board is a connection and what it reports."""
    async with asyncio.TaskGroup() as tasks:
        beside = [tasks.create_task(swallow(wire)) for wire, _ in boards]
        a_second = await snapshots(path, table, boards)
        beside += [tasks.create_task(answers) for answers in answering]
        alone = await commands(order)
        beside.append(tasks.create_task(report_steadily(boards)))
        together = await commands(order)
        for task in beside:
            task.cancel()
    return f"{a_second:8,.0f} reports/s; a command: {alone} ms; beside {REPORTS_PER_S:,} reports/s: {together} ms"


async def of_gateway(port: int, path: Path) -> str:
    """The work at the gateway."""

    async def board(name: str, device_type: str) -> Wire:
        wire = await Wire.connect(port, f"/ws/{name}", "arduino")
        registration = {"message_type": "registration", "device_type": device_type}
        wire.writer.write(Wire.frame(json.dumps(registration).encode(), TEXT))
        return wire

    async def answer(wire: Wire) -> None:
        async for payload in wire.payloads():
            command_id = json.loads(payload)["command_id"]
            answered = {"message_type": "command_ack", "command_id": command_id, "status": "success"}
            wire.writer.write(Wire.frame(json.dumps(answered).encode(), TEXT))

    frame = Wire.frame(REPORT, TEXT)
    boards = [(await board(f"board_{number}", "sensor"), frame) for number in range(BOARDS)]
    answering = [answer(await board(f"servo_{number}", "servo")) for number in range(TARGETS)]
    reader, writer = await asyncio.open_connection(HOST, port)

    async def order(number: int) -> None:
        body = json.dumps({"device_type": "servo", "command_name": "blink", "payload": {"k": number}, "wait": 10}).encode()
        writer.write(b"POST /command HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n\r\n%s" % (HOST.encode(), len(body), body))
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        answer = json.loads(await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])))
        assert answer["status"] == "ack_success", answer

    return await work(path, "device_state_snapshots", boards, answering, order)


async def of_mosquitto(port: int, path: Path) -> str:
    """The work over the broker."""

    async def answer(wire: Wire, name: str) -> None:
        async for message in messages(wire):
            answered = {"command_id": json.loads(message)["command_id"], "device_id": name, "status": "success"}
            wire.writer.write(publish("answers", json.dumps(answered).encode()))

    boards = [
        (await join(port, f"board_{number}"), publish(f"boards/board_{number}/status", REPORT)) for number in range(BOARDS)
    ]
    answering = [answer(await join(port, f"servo_{number}", "commands"), f"servo_{number}") for number in range(TARGETS)]
    caller = await join(port, "caller", "answers")
    answers = messages(caller)

    async def order(number: int) -> None:
        command = {"command_id": number, "command_name": "blink", "payload": {"k": number}}
        caller.writer.write(publish("commands", json.dumps(command).encode()))
        missing = TARGETS
        while missing:
            missing -= json.loads(await anext(answers))["command_id"] == number

    return await work(path, "reports", boards, answering, order)


# -- the servers -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(command: list[str], port: int | None = None, **environ: str) -> Iterator[None]:
    """The time in which a server runs, on the first core; it listens on the port."""
    silent = subprocess.DEVNULL
    server = subprocess.Popen(["taskset", "-c", "0", *command], stdout=silent, stderr=silent, env=os.environ | environ)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection((HOST, port or 1), 1):
                break
            time.sleep(0.1 if port else 0.01)
        yield
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(15)


def free_port() -> int:
    """A port that nobody has."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def processor_time() -> tuple[int, int]:
    """What this machine's processors had of time, and what others took of it (proc(5))."""
    times = [int(number) for number in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return sum(times), times[7]


def measure(name: str, folder: Path) -> str:
    """A line about one of the two."""
    port, path = free_port(), folder / f"{name}.db"
    all_before, taken_before = processor_time()
    if name == "gateway":
        amhrpd = str(Path(__file__).resolve().parent.parent / "amhrpd.py")
        environ = {"AMHRPD_PORT": str(port), "DATABASE_URL": f"sqlite:///{path}", "AMHRPD_LOG_LEVEL": "error"}
        with running([sys.executable, amhrpd], port, **environ):
            result = asyncio.run(of_gateway(port, path))
    else:
        limits = "max_queued_messages 0\nmax_inflight_messages 0\nset_tcp_nodelay true\n"  # everything has to arrive
        plain = f"listener {free_port()} {HOST}\n"  # Debian 12's ends with "unable to start" where there is none
        sockets = f"{plain}listener {port} {HOST}\nprotocol websockets\n"
        (folder / "conf").write_text(f"allow_anonymous true\n{limits}{sockets}")
        recorder = [sys.executable, __file__, name, str(port), str(path)]
        with running(["mosquitto", "-c", str(folder / "conf")], port), running(recorder):
            result = asyncio.run(of_mosquitto(port, path))
    all_after, taken_after = processor_time()
    return f"{name:<20}{result} (others took {(taken_after - taken_before) / (all_after - all_before):.1%})"


def main() -> None:
    """Run what the command line asks for."""
    if len(sys.argv) == 4:  # a recorder, started by `measure`
        recorder, port, path = sys.argv[1:]
        if recorder == "mosquitto-with-paho":
            record_with_paho(int(port), path)
        asyncio.run(record_by_hand(int(port), path))
        return
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    os.environ["PATH"] += ":/usr/sbin"
    for _, name in itertools.product(
        range(int(sys.argv[1]) if sys.argv[1:] else 3), ("gateway", "mosquitto-with-paho", "mosquitto-by-hand")
    ):
        with tempfile.TemporaryDirectory() as folder:
            print(measure(name, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
