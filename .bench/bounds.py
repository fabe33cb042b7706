#!/usr/bin/env python3
"""The gateway under attack, beside 200 good boards: what each attack makes of its memory and of a stop's way.

    .venv/bin/python .bench/bounds.py [--tls] [--seconds S] [ATTACK ...]

Good boards report twice a second and acknowledge commands; a caller sends one of them `stop` ten times a second and waits for
the answer. The attacker is a process of its own, of a lower priority; it comes within a second, and what ends comes again five
seconds later. Each attack has a gateway of its own, and a line: the most memory that it took meanwhile, the median and the
slowest stop, how many were not answered, and how many good boards lost their connection. Ends with 1 where a stop took over
0.5 s (1.5 s while the file is locked, which a command waits a second for), wasn't answered, a board was lost, or it took over
the unit's 320 MB.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import random
import resource
import signal
import socket
import sqlite3
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
HOST = "127.0.0.1"
GOOD_BOARDS = 200
START_TIMEOUT_S = 30
LIMIT_MB = 320  # MemoryMax in amhrpd.service
TEXT, PING, PONG = 1, 9, 10


def frame(payload: bytes, opcode: int = TEXT) -> bytes:
    """A client's frame, masked with zeros."""
    size = len(payload)
    length = bytes([0x80 | size]) if size < 126 else struct.pack("!BH", 0xFE, size)
    return bytes([0x80 | opcode]) + length + bytes(4) + payload


def message(message_type: str, **fields: object) -> bytes:
    """A board's message as a frame."""
    text = json.dumps({"message_type": message_type, "device_type": "ESP32", **fields}, ensure_ascii=False)
    return frame(text.encode())


class Peer:
    """A connection to the gateway."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, port: int, context: ssl.SSLContext | None, *, buffer_bytes: int = 0) -> Peer:
        """Connect; with a receive buffer of this size, where one is given."""
        connection = socket.socket(proto=socket.IPPROTO_TCP)  # then asyncio has it wait for no acknowledgement
        if buffer_bytes:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, (HOST, port))
        return cls(*await asyncio.open_connection(sock=connection, ssl=context, server_hostname=HOST if context else None))

    @classmethod
    async def board(cls, port: int, context: ssl.SSLContext | None, device_id: str, *, is_registered: bool = True) -> Peer:
        """Connect as a board does."""
        board = await cls.connect(port, context)
        key = base64.b64encode(os.urandom(16)).decode()
        board.writer.write(
            f"GET /ws/{device_id} HTTP/1.1\r\nHost: {HOST}:{port}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode()
        )
        head = await board.reader.readuntil(b"\r\n\r\n")
        if b" 101 " not in head:
            raise ConnectionError(head.decode())
        if is_registered:
            board.writer.write(message("registration"))
        return board

    async def payloads(self) -> AsyncIterator[bytes]:
        """What the gateway says, until the connection ends."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            while True:
                opcode, size = await self.reader.readexactly(2)
                if size == 126:
                    (size,) = struct.unpack("!H", await self.reader.readexactly(2))
                payload = await self.reader.readexactly(size)
                if opcode & 15 == PING:
                    self.writer.write(frame(payload, PONG))
                elif opcode & 15 == TEXT:
                    yield payload


# -- the attacks -------------------------------------------------------------------------------------------------------


class Attacker:
    """One attack, from a process of its own, for some seconds: many connections that are opened anew when they end."""

    def __init__(self, port: int, context: ssl.SSLContext | None, seconds: float) -> None:
        self._port, self._context, self._end_s = port, context, time.monotonic() + seconds
        self._boards = 0

    async def attack(self, name: str) -> None:
        """Do it, to its end."""
        work, count = ATTACKS[name]
        await asyncio.gather(*(self._again_and_again(work) for _ in range(count)))

    async def _again_and_again(self, work: Callable[[Attacker], Coroutine[Any, Any, None]]) -> None:
        await asyncio.sleep(random.random())
        while (left_s := self._end_s - time.monotonic()) > 0:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
                async with asyncio.timeout(left_s):
                    await work(self)
            await asyncio.sleep(5)

    async def _send(self, peer: Peer, *pieces: bytes) -> None:
        """Send, and wait for the gateway to end it."""
        try:
            for piece in pieces:
                peer.writer.write(piece)
                await peer.writer.drain()
                await asyncio.sleep(0)
            while await peer.reader.read(1 << 16):
                pass
        finally:
            peer.writer.transport.abort()

    async def head(self) -> None:
        """A head that never ends."""
        lines = (b"X-%d: %s\r\n" % (number, b"x" * 4000) for number in range(100))
        await self._send(await Peer.connect(self._port, self._context), b"GET /devices HTTP/1.1\r\nHost: 127.0.0.1\r\n", *lines)

    async def line(self) -> None:
        """A request line that never ends."""
        await self._send(await Peer.connect(self._port, self._context), b"GET /", *([b"x" * 8000] * 32))

    async def body(self) -> None:
        """A body whose last byte never comes."""
        head = b"POST /command HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 131072\r\n\r\n"
        await self._send(await Peer.connect(self._port, self._context), head, b"{" + b" " * 131_070)

    async def half_message(self) -> None:
        """A message whose last byte never comes."""
        self._boards += 1
        board = await Peer.board(self._port, self._context, f"half_{self._boards}")
        await self._send(board, struct.pack("!BBHI", 0x81, 0xFE, 65_000, 0), b" " * 64_999)

    async def unread(self) -> None:
        """Questions whose answers nobody takes."""
        peer = await Peer.connect(self._port, self._context, buffer_bytes=4096)
        for _ in range(200):
            peer.writer.write(b"GET /devices HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        await peer.writer.drain()
        await asyncio.sleep(60)

    async def flood(self) -> None:
        """Reports as fast as they go."""
        self._boards += 1
        board = await Peer.board(self._port, self._context, f"flood_{self._boards}")
        chunk = message("status", payload={"n": 1}) * 20
        while True:
            board.writer.write(chunk)
            await board.writer.drain()

    async def listen(self) -> None:
        """Listen to a thousand boards."""
        ids = ",".join([f"good_{number}" for number in range(GOOD_BOARDS)] + [f"other_{n}" for n in range(1000 - GOOD_BOARDS)])
        question = f"GET /events?device_id={ids} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
        await self._send(await Peer.connect(self._port, self._context), question)

    async def large_states(self) -> None:
        """States of 60 KB with an emoji, which Python's text would take four bytes a character for."""
        self._boards += 1
        board = await Peer.board(self._port, self._context, f"large_{self._boards}")
        state = message("status", payload={"text": "\U0001f916" + "x" * 60_000})
        while True:
            board.writer.write(state)
            await board.writer.drain()
            await asyncio.sleep(0.1)


ATTACKS = {
    "heads": (Attacker.head, 300),
    "lines": (Attacker.line, 600),
    "bodies": (Attacker.body, 200),
    "messages": (Attacker.half_message, 1000),
    "readers": (Attacker.unread, 100),
    "floods": (Attacker.flood, 100),
    "listeners": (Attacker.listen, 64),
    "locked": (Attacker.large_states, 270),
}

# -- the good ones -----------------------------------------------------------------------------------------------------


class Bench:
    """The gateway, its good boards and their caller."""

    def __init__(self, folder: Path, seconds: float, *, has_tls: bool) -> None:
        self._database, self._seconds, self._has_tls = folder / "amhrpd.db", seconds, has_tls
        with socket.create_server((HOST, 0)) as listener:
            self._port = int(listener.getsockname()[1])
        environ = {"DATABASE_URL": f"sqlite:///{self._database}", "AMHRPD_PORT": str(self._port), "AMHRPD_HOST": HOST}
        environ["AMHRPD_COMMIT_INTERVAL"] = "5"  # as in the unit
        self._context: ssl.SSLContext | None = None
        if has_tls:
            cert, key = folder / "cert.pem", folder / "key.pem"
            make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=x -addext"
            files = [f"subjectAltName=IP:{HOST}", "-keyout", str(key), "-out", str(cert)]
            subprocess.run([*make.split(), *files], check=True, capture_output=True)
            environ |= {"AMHRPD_TLS_CERT": str(cert), "AMHRPD_TLS_KEY": str(key)}
            self._context = ssl.create_default_context(cafile=str(cert))
        self._arguments = [sys.executable, __file__, "--port", str(self._port), "--seconds", str(seconds)]
        self._arguments += ["--cert", str(cert)] if has_tls else []
        quiet = subprocess.DEVNULL
        command = [sys.executable, str(HERE.parent / "amhrpd.py")]
        self._gateway = subprocess.Popen(command, env=os.environ | environ, stdout=quiet, stderr=quiet)
        self._lost = 0

    async def _is_up(self) -> bool:
        try:
            (await Peer.connect(self._port, self._context)).writer.close()
        except OSError:
            return False
        return True

    async def board(self, number: int) -> None:
        """A good board: it counts as lost when its connection ends."""
        board = await Peer.board(self._port, self._context, f"good_{number}")
        reporting = asyncio.create_task(self._report(board))
        try:
            async for payload in board.payloads():
                command = json.loads(payload)
                if command["message_type"] == "command":
                    board.writer.write(message("command_ack", command_id=command["command_id"]))
            self._lost += 1
        finally:
            reporting.cancel()

    async def _report(self, board: Peer) -> None:
        while True:
            board.writer.write(message("status", payload={"temperature": 21.5, "battery": 87}))
            await asyncio.sleep(0.5)

    async def order(self, number: int, times_s: list[float], unanswered: list[str]) -> None:
        """Send a board a stop, on a connection of its own, and wait for the answer."""
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(10):
                caller = await Peer.connect(self._port, self._context)
                question = f"/command?device_id=good_{number}&command_name=stop&wait=5"
                caller.writer.write(f"POST {question} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode())
                answer = await caller.reader.read()
                caller.writer.close()
            times_s.append(time.monotonic() - began_s)
            if b'"status":"ack_success"' not in answer:
                unanswered.append(answer.decode()[-300:])
        except (OSError, TimeoutError) as error:
            unanswered.append(repr(error))

    async def attack(self, name: str) -> bool:
        """One attack, and a line of what it did. Whether the bounds hold."""
        Path(f"/proc/{self._gateway.pid}/clear_refs").write_text("5")  # the peak begins anew
        times_s: list[float] = []
        unanswered: list[str] = []
        lost_before = self._lost
        locked = sqlite3.connect(self._database) if name == "locked" else None
        if locked is not None:
            locked.execute("BEGIN IMMEDIATE")
        attacker = await asyncio.create_subprocess_exec("nice", *self._arguments, "--attack", name)
        number = 0
        async with asyncio.TaskGroup() as group:
            while attacker.returncode is None:
                group.create_task(self.order(number % GOOD_BOARDS, times_s, unanswered))
                number += 1
                await asyncio.sleep(0.1)
        if locked is not None:
            locked.close()
        status = Path(f"/proc/{self._gateway.pid}/status").read_text()
        peak_mb = int(status.partition("VmHWM:")[2].split()[0]) / 1024
        lost, slowest_s = self._lost - lost_before, max(times_s, default=9.9)
        figures = f"{peak_mb:4.0f} MB at the most, stop {statistics.median(times_s or [9.9]) * 1000:4.0f} ms at the median"
        kind = "tls" if self._has_tls else "plain"
        rest = f"{slowest_s * 1000:5.0f} ms at the slowest of {number}, {len(unanswered)} unanswered, {lost} good boards lost"
        print(f"{name:10} {kind:6} {figures}, {rest}", *unanswered[:1], flush=True)
        return peak_mb < LIMIT_MB and slowest_s < (1.5 if locked else 0.5) and not unanswered and not lost

    async def run(self, name: str) -> bool:
        """The whole of an attack. Whether the bounds hold."""
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while not await self._is_up():
                    await asyncio.sleep(0.1)
            boards: list[asyncio.Task[None]] = []
            for number in range(GOOD_BOARDS):
                boards.append(asyncio.create_task(self.board(number)))
                await asyncio.sleep(0.02)
            result = await self.attack(name)
            for board in boards:
                board.cancel()
            await asyncio.gather(*boards, return_exceptions=True)
            return result
        finally:
            self._gateway.send_signal(signal.SIGTERM)
            await asyncio.to_thread(self._gateway.wait, 20)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run it, with as many open files as the system allows."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return asyncio.run(work)


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attacks", nargs="*", metavar="ATTACK", help=f"of {', '.join(ATTACKS)}; all if left out")
    parser.add_argument("--tls", action="store_true", help="everything over TLS; needs openssl")
    parser.add_argument("--seconds", type=float, default=10, help="how long each attack goes on (default: 10)")
    for hidden in ("--attack", "--port", "--cert"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.attacks) - set(ATTACKS):
        parser.error(f"no such attack: {', '.join(unknown)}")
    if options.attack:
        context = ssl.create_default_context(cafile=options.cert) if options.cert else None
        run(Attacker(int(options.port), context, options.seconds).attack(options.attack))
        return 0
    results = []
    for name in options.attacks or ATTACKS:
        with tempfile.TemporaryDirectory(prefix="amhrpd-bounds-") as folder:
            results.append(run(Bench(Path(folder), options.seconds, has_tls=options.tls).run(name)))
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
