"""The contract as tests: the real daemon, real sockets, a real SQLite file.

Most tests run `amhrpd.serve()` in their own event loop; where a process has to die, run out of disk or be watched, the daemon
is a process of its own, and where its start is what matters, `amhrpd.py` as a user starts it. Boards are played with the
`websockets` package, or with raw sockets where the wire itself is what matters. Every test ends with a look for tasks, timers
and threads that were left behind.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import csv
import dataclasses
import functools
import gc
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import sqlite3
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import msgspec
import pytest
import sqlalchemy as sa
import structlog
import websockets
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families
from websockets.asyncio.client import ClientConnection
from yarl import URL

import amhrpd

try:
    from playwright import async_api as playwright
except ImportError:  # then the page isn't looked at
    playwright = None  # type: ignore[assignment]
try:
    import aiomqtt
except ImportError:  # then nothing is tried at a broker
    aiomqtt = None  # type: ignore[assignment]
if TYPE_CHECKING:
    from playwright.async_api import Browser, Page, Route

HERE = Path(__file__).resolve().parent
PATIENCE_S = 10.0  # how long a test waits for what must happen
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}")

# ======================================================================================================================
# Tools
# ======================================================================================================================


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test in a loop of its own, bounded, and fail it for what it leaves behind."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        threads_before = set(threading.enumerate())

        async def body() -> None:
            async with asyncio.timeout(30):
                await test(*args, **kwargs)
            await asyncio.sleep(0)
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not left, f"tasks left behind: {left}"
            timers = [h for h in asyncio.get_running_loop()._scheduled if not h.cancelled() and "amhrpd" in repr(h)]  # type: ignore[attr-defined]
            assert not timers, f"timers left behind: {timers}"

        asyncio.run(body())
        stores = [t for t in set(threading.enumerate()) - threads_before if t.name.startswith("store-")]
        for thread in stores:
            thread.join(PATIENCE_S)
        assert not [t for t in stores if t.is_alive()], "threads left behind"

    return run


async def eventually(look: Callable[[], Any], *, within_s: float = PATIENCE_S) -> Any:
    """Wait until `look` (or what it returns, awaited) is true, and return that."""
    deadline_s = time.monotonic() + within_s
    while True:
        found = look()
        if isinstance(found, Awaitable):
            found = await found
        if found:
            return found
        if time.monotonic() > deadline_s:
            raise AssertionError(f"didn't happen within {within_s} s: {look}")
        await asyncio.sleep(0.01)


class Client:
    """A caller of the REST API, with a way to be a board."""

    def __init__(self, port: int, session: aiohttp.ClientSession, database: Path) -> None:
        self.port = port
        self.session = session
        self.database = database
        self.gateway: amhrpd.Gateway
        self.runner: web.AppRunner
        self.store: amhrpd.Store

    @property
    def server(self) -> web.Server:
        assert self.runner.server is not None
        return self.runner.server

    async def ask(self, method: str, path: str | URL, **kwargs: Any) -> tuple[int, Any]:
        url = f"http://127.0.0.1:{self.port}{path}" if isinstance(path, str) else path
        async with self.session.request(method, url, **kwargs) as response:
            text = await response.text()
            assert response.content_type == "application/json", text
            return response.status, json.loads(text)

    async def get(self, path: str | URL, status: int = 200, **kwargs: Any) -> Any:
        found, answer = await self.ask("GET", path, **kwargs)
        assert found == status, (found, answer)
        return answer

    async def post(self, path: str, body: Any = None, status: int = 200, **kwargs: Any) -> Any:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        found, answer = await self.ask("POST", path, data=data, **kwargs)
        assert found == status, (found, answer)
        return answer

    async def wire(self, device_id: str) -> Wire:
        """A registered board on a raw socket."""
        wire = await Wire.connect(self.port, device_id)
        wire.send(REGISTRATION)
        await eventually(lambda: self.is_online(device_id))
        return wire

    @contextlib.asynccontextmanager
    async def board(
        self, device_id: str, device_type: str | None = "ESP32", *, metadata: Any = None, **kwargs: Any
    ) -> AsyncIterator[ClientConnection]:
        """A connected board; registered unless `device_type` is None."""
        async with await connect(self.port, device_id, **kwargs) as board:
            if device_type is not None:
                await say(board, "registration", device_type=device_type, metadata=metadata or {})
                await eventually(lambda: self.is_online(device_id))
            yield board

    async def is_up(self) -> bool:
        try:
            return (await self.ask("GET", "/health"))[0] == 200
        except aiohttp.ClientError:
            return False

    async def is_online(self, device_id: str) -> bool:
        status, device = await self.ask("GET", f"/devices/{device_id}")
        return status == 200 and bool(device["is_online"])

    async def events(self, device_id: str) -> list[str]:
        """The device's connection events, oldest first."""
        history = await self.get(f"/device-connection-history/{device_id}?limit=1000")
        return [event["event"] for event in reversed(history["events"])]

    def rows(self, sql: str, *values: Any) -> list[Any]:
        return rows_of(self.database, sql, *values)


def rows_of(database: Path, sql: str, *values: Any) -> list[Any]:
    """What another program sees in the file."""
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=5)) as connection:
        return connection.execute(sql, values).fetchall()


async def connect(port: int, device_id: str, **kwargs: Any) -> ClientConnection:
    """Connect as the boards in the field do."""
    options: dict[str, Any] = {"origin": "file://", "subprotocols": ["arduino"], "compression": None, "ping_interval": None}
    return await websockets.connect(f"ws://127.0.0.1:{port}/ws/{device_id}", proxy=None, close_timeout=2, **options | kwargs)


async def say(board: ClientConnection, message_type: str, **fields: Any) -> None:
    await board.send(json.dumps({"message_type": message_type, **fields}))


async def hear(board: ClientConnection, message_type: str) -> dict[str, Any]:
    """The next message, which must be of this type."""
    async with asyncio.timeout(PATIENCE_S):
        frame = await board.recv()
    assert isinstance(frame, str)
    message: dict[str, Any] = json.loads(frame)
    assert message["message_type"] == message_type, message
    return message


async def closed_with(board: ClientConnection) -> int:
    """The code that the gateway closes the connection with."""
    async with asyncio.timeout(PATIENCE_S):
        await board.wait_closed()
    assert board.close_code is not None
    return board.close_code


async def answer_commands(board: ClientConnection, status: str = "success", **fields: Any) -> None:
    """Acknowledge every command, as the servo sketch does."""
    async for frame in board:
        message = json.loads(frame)
        if message["message_type"] == "command":
            await say(board, "command_ack", command_id=message["command_id"], status=status, **fields)


@contextlib.asynccontextmanager
async def background(*works: Coroutine[Any, Any, Any]) -> AsyncIterator[list[asyncio.Task[Any]]]:
    """Work that goes on meanwhile."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def gateway_on(database: Path, *, exit_code: int = 0, headers: Any = None, **settings: Any) -> AsyncIterator[Client]:
    """The daemon in this loop, on a free port."""
    values: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": 0,
        "database_url": f"sqlite:///{database}",
        "commit_interval_s": 0.05,
    }
    stop = asyncio.Event()
    ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    runners: list[web.AppRunner] = []

    class Runner(web.AppRunner):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            runners.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(web, "AppRunner", Runner)
        daemon = asyncio.create_task(amhrpd.serve(amhrpd.Settings(**values | settings), stop, ready.set_result))
        await asyncio.wait((daemon, ready), return_when=asyncio.FIRST_COMPLETED)
    if daemon.done():
        daemon.result()
    try:
        async with aiohttp.ClientSession(headers=headers) as session:
            client = Client(ready.result(), session, database)
            (client.runner,) = runners
            client.gateway, client.store = client.runner.app[amhrpd.GATEWAY], client.runner.app[amhrpd.STORE]
            yield client
    finally:
        stop.set()
        assert await daemon == exit_code


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "amhrpd.db"


# Forks from a process that has everything imported: a start takes a twentieth of a second in place of a whole one.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])


def run_daemon(code: str | None, is_fresh: bool, environ: dict[str, str], log_path: Path) -> None:
    """What the new process does: become the daemon, or `code`, which starts it."""
    os.environ.clear()
    os.environ.update(environ)
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    if is_fresh:
        os.execv(sys.executable, [sys.executable, *([str(HERE / "amhrpd.py")] if code is None else ["-c", code])])
    exec(code or "sys.exit(amhrpd.main([]))", {"amhrpd": amhrpd, "sys": sys})


class Process:
    """The daemon as a process of its own, with its log; `is_fresh`: `amhrpd.py` with an interpreter of its own, too."""

    def __init__(
        self, database: Path, port: int, environ: dict[str, str], code: str | None = None, *, is_fresh: bool = False
    ) -> None:
        self.port = port
        self.log_path = database.with_suffix(f".{time.monotonic_ns()}.log")
        self.log_path.touch()
        values = {"DATABASE_URL": f"sqlite:///{database}", "AMHRPD_PORT": str(port), "AMHRPD_HOST": "127.0.0.1"}
        clean = {name: value for name, value in os.environ.items() if not name.startswith("AMHRPD_")}
        self._process = FORKS.Process(target=run_daemon, args=(code, is_fresh, clean | values | environ, self.log_path))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, if it is still there."""
        if self._process.is_alive():
            os.kill(self.pid, number)

    def is_running(self) -> bool:
        return self._process.is_alive()

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    async def answers(self) -> bool:
        assert self.is_running(), self.log
        try:
            async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{self.port}/health") as response:
                return response.status in (200, 503)
        except OSError:
            return False

    async def exit_code(self) -> int:
        await eventually(lambda: not self.is_running(), within_s=20)
        assert self._process.exitcode is not None
        return self._process.exitcode


@contextlib.asynccontextmanager
async def process_on(
    database: Path, *, code: str | None = None, is_fresh: bool = False, **environ: str
) -> AsyncIterator[tuple[Process, Client]]:
    """The daemon as a process (or `code`, which starts it) that answers; killed at the end if it is still there."""
    process = Process(database, free_port(), environ, code, is_fresh=is_fresh)
    try:
        await eventually(process.answers)
        async with aiohttp.ClientSession() as session:
            yield process, Client(process.port, session, database)
    finally:
        process.send_signal(signal.SIGKILL)
        await process.exit_code()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def logged() -> Iterator[list[dict[str, Any]]]:
    """The daemon's log events, as they are before they become lines."""
    events: list[dict[str, Any]] = []

    def collect(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        events.append(dict(event))
        return event

    root, config_before = logging.getLogger(), structlog.get_config()
    handlers_before = root.handlers[:]
    root.handlers.clear()
    vars(amhrpd.log).pop("bind", None)  # which is cached at the first use, as it was configured then
    lines = amhrpd.configure_logging("debug", "json")
    structlog.get_config()["processors"].insert(-1, collect)
    try:
        yield events
    finally:
        lines.close()
        root.handlers[:] = handlers_before
        vars(amhrpd.log).pop("bind", None)
        structlog.configure(**config_before)


def named(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [event for event in events if event.get("event") == name]


class Wire:
    """A board on a raw socket: the bytes as they are."""

    HANDSHAKE = (
        "GET /ws/{device_id} HTTP/1.1\r\nHost: 10.9.8.7:8000\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: arduino\r\n"
        "Origin: file://\r\nUser-Agent: arduino-WebSocket-Client\r\n\r\n"
    )

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.head = b""

    @classmethod
    async def connect(cls, port: int, device_id: str) -> Wire:
        wire = cls(*await asyncio.open_connection("127.0.0.1", port))
        wire.writer.write(cls.HANDSHAKE.format(device_id=device_id).encode())
        async with asyncio.timeout(PATIENCE_S):
            wire.head = await wire.reader.readuntil(b"\r\n\r\n")
        return wire

    @staticmethod
    def frame(payload: bytes, opcode: int = 1, mask: bytes = b"\x11\x22\x33\x44") -> bytes:
        length = len(payload)
        size = bytes([0x80 | length]) if length < 126 else struct.pack("!BH", 0xFE, length)
        if length > 0xFFFF:
            size = struct.pack("!BQ", 0xFF, length)
        return bytes([0x80 | opcode]) + size + mask + bytes(byte ^ mask[i & 3] for i, byte in enumerate(payload))

    def send(self, payload: bytes | str, opcode: int = 1) -> None:
        self.writer.write(self.frame(payload.encode() if isinstance(payload, str) else payload, opcode))

    async def receive(self) -> tuple[int, bytes]:
        """First byte of the next frame (FIN and opcode) and its payload."""
        async with asyncio.timeout(PATIENCE_S):
            first, length = await self.reader.readexactly(2)
            if length == 126:
                (length,) = struct.unpack("!H", await self.reader.readexactly(2))
            elif length == 127:
                (length,) = struct.unpack("!Q", await self.reader.readexactly(8))
            return first, await self.reader.readexactly(length)

    async def command(self) -> str:
        """The name of the next command; pings before it are left unanswered."""
        while True:
            opcode, payload = await self.receive()
            if opcode == 0x81:
                return str(json.loads(payload)["command_name"])
            assert opcode == 0x89, (opcode, payload)

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()

    def reset(self) -> None:
        """The connection is gone, with what lies unread in it."""
        linger = struct.pack("ii", 1, 0)
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()


def needing(mark: pytest.MarkDecorator, missing: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Mark a test that needs more than what README asks for. It is skipped where something is `missing`, and says what."""

    def marked(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            if missing:
                pytest.skip(missing)  # from here: the reason is told once, with how many tests it has
            test(*args, **kwargs)

        return mark(run)  # type: ignore[no-any-return]

    return marked


def needing_tool(name: str, what_for: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return needing(pytest.mark.tool, "" if shutil.which(name) else f"no {name} {what_for}")


needing_openssl = needing_tool("openssl", "to make a certificate with")
needing_gcc = needing_tool("gcc", "to make a bad disk with")


def make_certificate(cert: Path, key: Path, *options: str) -> None:
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -days 2 -subj /CN=localhost -addext"
    files = ["subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*command.split(), *files, *options], check=True, capture_output=True)


REGISTRATION = '{"message_type":"registration","device_type":"ESP32"}'

# ======================================================================================================================
# Contract, section 1: boards in the field
# ======================================================================================================================


@in_a_loop
async def test_handshake_is_what_the_boards_library_takes(database: Path) -> None:
    async with gateway_on(database) as client:
        wire = await Wire.connect(client.port, "servo_1")
        lines = wire.head.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        assert lines[0].startswith("HTTP/1.1 101 ")
        assert headers["connection"].lower() == "upgrade"
        assert headers["sec-websocket-protocol"] == "arduino"
        assert "sec-websocket-extensions" not in headers
        await wire.close()


@in_a_loop
async def test_compression_is_never_agreed_on(database: Path) -> None:
    async with gateway_on(database) as client, client.board("servo_1", compression="deflate") as board:
        assert board.response is not None
        assert "Sec-WebSocket-Extensions" not in board.response.headers


@in_a_loop
async def test_zero_masks_and_split_frames_are_taken(database: Path) -> None:
    async with gateway_on(database) as client:
        wire = await Wire.connect(client.port, "low_heap")
        frame = Wire.frame(REGISTRATION.encode(), mask=b"\0\0\0\0")
        wire.writer.write(frame[:6])
        await wire.writer.drain()
        assert (await client.get("/devices"))["total"] == 0  # a round trip, so that the header arrives alone
        wire.writer.write(frame[6:])
        await eventually(lambda: client.is_online("low_heap"))
        await wire.close()


@in_a_loop
async def test_command_frame_has_the_seven_keys_in_order_in_one_text_frame(database: Path) -> None:
    async with gateway_on(database) as client:
        wire = await client.wire("servo_1")
        answer = await client.post("/command?device_type=ESP32&command_name=blink", {"count": 5})
        first, payload = await wire.receive()
        assert first == 0x81  # FIN and text
        frame = json.loads(payload)
        assert list(frame) == ["message_type", "command_id", "command_name", "device_type", "timestamp", "timeout", "payload"]
        assert abs(frame.pop("timestamp") - time.time()) < 5
        assert frame == {
            "message_type": "command",
            "command_id": answer["command_id"],
            "command_name": "blink",
            "device_type": "ESP32",
            "timeout": 30,
            "payload": {"count": 5},
        }
        await wire.close()


@in_a_loop
async def test_servo_life_as_observed(database: Path) -> None:
    """Registers, heartbeats right behind it, acks with no device_id: everything counts."""
    async with gateway_on(database) as client, client.board("servo_1", None) as board:
        metadata = {"device_id": "servo_1", "firmware_version": "2.0.0", "servo_count": 10}
        await say(board, "registration", device_type="esp32s3", metadata=metadata)
        await say(board, "heartbeat", device_type="esp32s3")
        await eventually(lambda: client.is_online("servo_1"))
        async with background(answer_commands(board, device_type="esp32s3")):
            answer = await client.post("/command", {"device_type": "esp32s3", "command_name": "stop", "wait": 5})
        assert answer["status"] == "ack_success"
        assert (await client.get("/devices/servo_1"))["metadata"] == metadata


@in_a_loop
async def test_wheel_that_never_heartbeats_lives_by_its_pongs(database: Path) -> None:
    async with (
        gateway_on(database, ping_interval_s=0.1, heartbeat_timeout_s=0.3) as client,
        client.board("wheel_1", "esp32") as board,
    ):
        began_s = time.monotonic()
        await eventually(lambda: time.monotonic() - began_s > 0.7)
        assert await client.is_online("wheel_1")
        await say(board, "alert", device_id="wheel_1", alert_type="obstacle", message="20 cm")
        assert await client.events("wheel_1") == ["connected"]


@in_a_loop
async def test_pings_are_echoed_exactly(database: Path) -> None:
    async with gateway_on(database) as client:
        wire = await Wire.connect(client.port, "cam_1")
        wire.send(b"\x00any bytes\xff", opcode=9)
        assert await wire.receive() == (0x8A, b"\x00any bytes\xff")
        await wire.close()


@in_a_loop
async def test_refused_boards_are_logged_once_a_minute(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with logged() as events:
        async with gateway_on(database, device_token="secret-of-boards") as client:

            async def try_it() -> None:
                with pytest.raises(websockets.InvalidStatus):
                    await connect(client.port, "servo_1")

            for _ in range(20):
                await try_it()
            assert len(named(events, "request_refused")) == 1
            monkeypatch.setattr(amhrpd.Repeats, "WINDOW_S", 0)  # the minute is over
            for _ in range(2):
                await try_it()
        assert [event.get("repeats") for event in named(events, "request_refused")] == [None, 19, None]


@in_a_loop
async def test_board_that_cannot_connect_is_told_why_and_logged_with_the_reason(database: Path) -> None:
    handshake = Wire.HANDSHAKE.format(device_id="a")
    codes = []
    with logged() as events:
        async with gateway_on(database) as client:
            for path, status, code in (
                ("/ws", 404, "NOT_FOUND"),
                ("/wrong", 404, "NOT_FOUND"),
                ("/ws/a/b", 404, "NOT_FOUND"),
                ("/ws/no%20id", 400, "INVALID_FIELD_VALUE"),
                ("/ws/no id", 400, "INVALID_MESSAGE"),
            ):
                for _ in range(3):
                    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
                    writer.write(handshake.replace("/ws/a", path).encode())
                    async with asyncio.timeout(PATIENCE_S):
                        answer = await reader.read()
                    writer.close()
                    assert answer.split()[1] == b"%d" % status, answer
                    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error_code"] == code
                    codes.append(code)
            found = await figures(client)
        for code, count in Counter(codes).items():
            assert found["amhrpd_refusals_total", code] == count
            (first,) = (event for event in named(events, "request_refused") if event["error_code"] == code)
            assert (first["level"], first["peer"]) == ("warning", "127.0.0.1")
            assert len(first["error"]) > 10


@in_a_loop
async def test_what_a_refused_board_still_says_is_no_request(database: Path) -> None:
    with logged() as events:
        async with gateway_on(database, device_token="secret-of-boards") as client:
            for device_id in ("servo_1", "servo_1", "no%20id"):
                wire = await Wire.connect(client.port, device_id)
                assert wire.head.split()[1] in (b"401", b"400")
                assert b"connection: close" in wire.head.lower()
                wire.writer.write(b"This is a webSocket client!")
                async with asyncio.timeout(PATIENCE_S):
                    with contextlib.suppress(ConnectionError):
                        await wire.reader.read()
                await wire.close()
        assert [event for event in events if event.get("level") == "error" or "exception" in event] == []


# ======================================================================================================================
# Contract, section 2: what boards say
# ======================================================================================================================


@in_a_loop
async def test_first_message_with_a_device_type_registers_whatever_its_type(database: Path) -> None:
    firsts: dict[str, dict[str, Any]] = {
        "registration": {},
        "heartbeat": {},
        "status": {"payload": {"a": 1}},
        "error": {"error_code": "E1", "error_message": "m"},
        "alert": {"alert_type": "warning", "message": "m"},
    }
    async with gateway_on(database) as client:
        for message_type, fields in firsts.items():
            async with client.board(f"by_{message_type}", None) as board:
                await say(board, message_type, device_type="ESP32", **fields)
                await eventually(lambda device=f"by_{message_type}": client.is_online(device))  # type: ignore[misc]


@in_a_loop
async def test_unregistered_board_gets_the_error_of_the_earlier_backend(database: Path) -> None:
    async with gateway_on(database) as client, client.board("servo_1", None) as board:
        await say(board, "heartbeat")
        error = await hear(board, "error")
        assert error["error_code"] == "UNAUTHORIZED"
        assert error["error"] == error["error_message"]
        assert "device_type required" in error["error"]
        await say(board, "heartbeat", device_type="ESP32")
        await eventually(lambda: client.is_online("servo_1"))


REFUSED = [
    ("not json", "INVALID_MESSAGE"),
    ("", "INVALID_MESSAGE"),
    ("[]", "INVALID_MESSAGE"),
    ("5", "INVALID_MESSAGE"),
    ("null", "INVALID_MESSAGE"),
    ('{"message_type":"heartbeat"} trailing', "INVALID_MESSAGE"),
    ('{"message_type":"status","payload":{"a":NaN}}', "INVALID_MESSAGE"),
    ('{"message_type":"status","payload":{"a":Infinity}}', "INVALID_MESSAGE"),
    ('{"message_type":"status","payload":{"a":"\\ud800"}}', "INVALID_MESSAGE"),
    ('{"message_type":"status","payload":{"a":' + "[" * 40 + "]" * 40 + "}}", "INVALID_MESSAGE"),
    ('{"message_type":"status","payload":{"a":' + "[" * 20000 + "]" * 20000 + "}}", "INVALID_MESSAGE"),
    ('{"message_type":"status","payload":{"a":9e999}}', "INVALID_FIELD_VALUE"),
    ('{"message_type":"status","payload":{"a":' + "9" * 5000 + "}}", "INVALID_FIELD_VALUE"),
    ('{"message_type":"reboot"}', "UNKNOWN_MESSAGE_TYPE"),
    ('{"message_type":""}', "UNKNOWN_MESSAGE_TYPE"),
    ('{"message_type":7}', "INVALID_FIELD_TYPE"),
    ('{"message_type":"' + "x" * 20000 + '"}', "UNKNOWN_MESSAGE_TYPE"),
    ("{}", "MISSING_REQUIRED_FIELD"),
    ('{"message_type":"status"}', "MISSING_REQUIRED_FIELD"),
    ('{"message_type":"status","payload":5}', "INVALID_FIELD_TYPE"),
    ('{"message_type":"status","payload":null}', "INVALID_FIELD_TYPE"),
    ('{"message_type":"registration"}', "MISSING_REQUIRED_FIELD"),
    ('{"message_type":"registration","device_type":""}', "INVALID_FIELD_VALUE"),
    ('{"message_type":"registration","device_type":"' + "x" * 51 + '"}', "INVALID_FIELD_VALUE"),
    ('{"message_type":"registration","device_type":5}', "INVALID_FIELD_TYPE"),
    ('{"message_type":"registration","device_type":"*"}', "INVALID_FIELD_VALUE"),
    ('{"message_type":"registration","device_type":"ESP32","metadata":[]}', "INVALID_FIELD_TYPE"),
    ('{"message_type":"command_ack"}', "MISSING_REQUIRED_FIELD"),
    ('{"message_type":"command_ack","command_id":5}', "INVALID_FIELD_TYPE"),
    ('{"message_type":"command_ack","command_id":"x","status":"done"}', "INVALID_FIELD_VALUE"),
    ('{"message_type":"command_ack","command_id":"x","status":1}', "INVALID_FIELD_TYPE"),
    ('{"message_type":"command_ack","command_id":"x","payload":"y"}', "INVALID_FIELD_TYPE"),
    ('{"message_type":"command_ack","command_id":"x"}', "COMMAND_NOT_FOUND"),
    ('{"message_type":"error","error_code":"E"}', "MISSING_REQUIRED_FIELD"),
    ('{"message_type":"alert","message":"m"}', "MISSING_REQUIRED_FIELD"),
    ('{"message_type":"alert","alert_type":"warning","message":5}', "INVALID_FIELD_TYPE"),
]


@in_a_loop
async def test_every_refusal_has_its_code_and_leaves_the_connection_open(database: Path) -> None:
    async with gateway_on(database) as client, client.board("servo_1") as board:
        for frame, code in REFUSED:
            await board.send(frame)
            error = await hear(board, "error")
            assert error["error_code"] == code, (frame[:80], error)
            assert set(error) == {"message_type", "error_code", "error_message", "error"}
            assert error["error"] == error["error_message"]
            assert "9e9" not in frame or error["error"] == "the message has a number that is out of range"
            assert "done" not in frame or "one of error, failure, success, timeout" in error["error"]
            assert 5 < len(error["error"]) < 1000  # a board that gets more than 15,360 bytes hangs up
        await board.send(b"\x00\x01")
        assert (await hear(board, "error"))["error_code"] == "INVALID_MESSAGE"
        await board.send(b'{"message_type":"status","payload":{"k":"\xc3"}}', text=True)
        assert (await hear(board, "error"))["error_code"] == "INVALID_MESSAGE"
        await board.send(b'{"message_type":"heartbeat","skipped":"\xff"}', text=True)
        assert (await hear(board, "error"))["error_code"] == "INVALID_MESSAGE"
        await say(board, "status", payload={"still": "here"})
        await eventually(lambda: state_is(client, "servo_1", {"still": "here"}))
        assert (await client.get("/state-history/servo_1"))["total"] == 1


async def state_is(client: Client, device_id: str, state: Any) -> bool:
    return bool((await client.get(f"/devices/{device_id}"))["state"] == state)


@in_a_loop
async def test_oversized_frame_closes_with_1009(database: Path) -> None:
    async with gateway_on(database, max_message_bytes=2000) as client, client.board("servo_1") as board:
        await say(board, "status", payload={"text": "x" * 1500})
        await eventually(lambda: state_is(client, "servo_1", {"text": "x" * 1500}))
        await board.send('{"message_type":"status","payload":{}}'.ljust(2000))
        await eventually(lambda: state_is(client, "servo_1", {}))
        await board.send('{"message_type":"status","payload":{"a":1}}'.ljust(2001))
        assert await closed_with(board) == 1009
        await eventually(lambda: not_online(client, "servo_1"))
        details = (await client.get("/device-connection-history/servo_1"))["events"][0]["details"]
        assert (details["code"], details["reason"]) == (1009, "a message was too big")


async def not_online(client: Client, device_id: str) -> bool:
    return not await client.is_online(device_id)


@in_a_loop
async def test_extras_and_metadata_become_the_metadata_and_silence_leaves_it(database: Path) -> None:
    async with gateway_on(database) as client, client.board("servo_1", None) as board:
        extras = {"firmware_version": "2.0.0", "mac_address": "aa:bb", "ip_address": "10.0.0.7", "rssi": -50}
        await say(board, "registration", device_type="ESP32", timestamp=5, metadata={"servo_count": 10}, **extras)
        await eventually(lambda: client.is_online("servo_1"))
        device = await client.get("/devices/servo_1")
        assert device["metadata_json"] == device["metadata"] == extras | {"servo_count": 10}
        await say(board, "registration", device_type="ESP32-S3")
        await eventually(lambda: type_is(client, "servo_1", "ESP32-S3"))
        assert (await client.get("/devices/servo_1"))["metadata"] == extras | {"servo_count": 10}
        await say(board, "registration", device_type="ESP32", metadata={"new": True})
        await eventually(lambda: type_is(client, "servo_1", "ESP32"))
        assert (await client.get("/devices/servo_1"))["metadata"] == {"new": True}
        assert await client.events("servo_1") == ["connected"]


async def type_is(client: Client, device_id: str, device_type: str) -> bool:
    return bool((await client.get(f"/devices/{device_id}"))["device_type"] == device_type)


@in_a_loop
async def test_status_is_the_latest_state_and_one_row(database: Path) -> None:
    async with gateway_on(database) as client, client.board("esp32_001") as board:
        state = {"temperature": 25.3, "humidity": 45.2, "nested": {"list": [1, None, True, "ü"]}, "timestamp": 5, "big": 10**30}
        await say(board, "status", payload=state, timestamp=1)
        await eventually(lambda: state_is(client, "esp32_001", state))
        history = await client.get("/state-history/esp32_001")
        assert history["device_id"] == "esp32_001"
        assert history["total"] == 1
        (snapshot,) = history["states"]
        device = await client.get("/devices/esp32_001")
        assert snapshot == {
            "id": 1,
            "device_id": "esp32_001",
            "device_type": "ESP32",
            "state_data": state,
            "timestamp": device["state_timestamp"],
        }
        assert TIME.fullmatch(snapshot["timestamp"])
        assert abs(datetime.fromisoformat(snapshot["timestamp"] + "Z").timestamp() - time.time()) < 5


@in_a_loop
async def test_duplicate_keys_are_one_in_the_row(database: Path) -> None:
    async with gateway_on(database) as client, client.board("esp32_001") as board:
        await board.send('{"message_type":"status","payload":{"a":1,"a":2}}')
        await eventually(lambda: state_is(client, "esp32_001", {"a": 2}))
        await client.get("/state-history/esp32_001")
        assert client.rows("SELECT state_data FROM device_state_snapshots") == [('{"a":2}',)]


@in_a_loop
async def test_errors_and_alerts_of_boards_are_logged_at_warning_with_their_id(database: Path) -> None:
    with logged() as events:
        async with gateway_on(database) as client, client.board("wheel_1") as board:
            await say(board, "error", error_code="SERVO_STALL", error_message="x" * 5000 + "\n", context={"servo": 3})
            await say(board, "alert", alert_type="collision", message="front\nleft")
            await eventually(lambda: named(events, "device_alert"))
    (error,) = named(events, "device_error")
    (alert,) = named(events, "device_alert")
    assert (error["level"], error["device_id"], error["type"]) == ("warning", "wheel_1", "SERVO_STALL")
    assert len(error["message"]) < 400
    assert (alert["level"], alert["device_id"], alert["message"]) == ("warning", "wheel_1", "front\\nleft")


@in_a_loop
async def test_every_accepted_message_is_activity(database: Path) -> None:
    async with gateway_on(database) as client, client.board("servo_1") as board:
        for message_type, fields in (
            ("heartbeat", {"rssi": -50, "uptime": 5, "freeHeap": 100000}),
            ("status", {"payload": {}}),
            ("alert", {"alert_type": "warning", "message": "m"}),
            ("error", {"error_code": 5, "error_message": "m"}),
        ):
            before = (await client.get("/devices/servo_1"))["last_heartbeat"]
            await say(board, message_type, **fields)
            await eventually(lambda before=before: later_activity(client, before))  # type: ignore[misc]


async def later_activity(client: Client, before: str) -> bool:
    return bool((await client.get("/devices/servo_1"))["last_heartbeat"] > before)


@in_a_loop
async def test_device_ids_of_the_path(database: Path) -> None:
    async with gateway_on(database) as client:
        async with client.board("A-z.0_9" + "x" * 57):
            pass
        for bad in ("x" * 65, "a%20b", "a%00b", "%C3%BC", "a%0A", "%2E", "%2E%2E"):
            answer = await client.get(URL(f"http://127.0.0.1:{client.port}/ws/{bad}", encoded=True), 400)
            assert answer["error_code"] == "INVALID_FIELD_VALUE"
        async with client.board("..."):
            pass
        assert (await client.get("/ws/plain_get", 400))["error_code"] == "INVALID_FIELD_VALUE"
        assert (await client.get("/devices"))["total"] == 2
        for name in (".", ".."):
            answer = await client.post("/command", {"device_id": name, "command_name": "x"}, 400)
            assert "neither . nor .." in answer["error"]


# ======================================================================================================================
# Contract, section 4: a command's life
# ======================================================================================================================


@in_a_loop
async def test_row_is_committed_as_created_before_the_first_frame_leaves(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    send = amhrpd.DeviceSocket.send

    def watched(self: amhrpd.DeviceSocket, frames: bytes) -> bool:
        found.extend(rows_of(database, "SELECT status, command_name FROM command_logs ORDER BY rowid DESC LIMIT 1"))
        return send(self, frames)

    async with gateway_on(database, commit_interval_s=3600) as client, client.board("a"), client.board("b"):
        monkeypatch.setattr(amhrpd.DeviceSocket, "send", watched)
        for number in range(10):
            answer = await client.post(f"/command?device_type=ESP32&command_name={number}")
            assert (answer["status"], answer.get("persisted")) == ("sent", None)
            assert found[-2:] == [("created", str(number))] * 2


@in_a_loop
async def test_answers_are_counted_once_each_and_kept_for_each_device(database: Path) -> None:
    async with gateway_on(database) as client, client.board("a") as a, client.board("b") as b, client.board("c", "OTHER") as c:
        answer = await client.post(
            "/command", {"device_type": "ESP32", "command_name": "reboot", "payload": {"delay_ms": 1000}}
        )
        assert answer == {
            "command_id": answer["command_id"],
            "device_type": "ESP32",
            "command_name": "reboot",
            "payload": {"delay_ms": 1000},
            "status": "sent",
            "created_at": answer["created_at"],
            "target_device_count": 2,
            "success_count": 0,
        }
        path = f"/command-logs/{answer['command_id']}"
        row = await client.get(path)
        assert (row["status"], row["success_count"], row["completed_at"], row["response_data"]) == ("sent", 0, None, None)
        for board in (a, b):
            await hear(board, "command")
        for _ in range(3):
            await say(
                a, "command_ack", command_id=answer["command_id"], status="success", payload={"of": "a"}, execution_time=0.25
            )
        await eventually(lambda: row_has(client, path, success_count=1, status="sent", completed_at=None))
        await say(c, "command_ack", command_id=answer["command_id"])
        assert (await hear(c, "error"))["error_code"] == "COMMAND_NOT_FOUND"
        await say(b, "command_ack", command_id=answer["command_id"])  # no status: success
        row = await eventually(lambda: row_has(client, path, status="ack_success"))
        assert row["success_count"] == row["target_device_count"] == 2
        assert row["created_at"] <= row["executed_at"] <= row["completed_at"]
        answers = row["response_data"]
        assert set(answers) == {"a", "b"}
        assert TIME.fullmatch(answers["a"].pop("received_at"))
        assert answers["a"] == {"status": "success", "payload": {"of": "a"}, "execution_time": 0.25}
        assert answers["b"]["received_at"] == row["completed_at"]
        assert set(row) == {
            *("command_id", "device_type", "command_name", "payload", "status", "created_at", "executed_at", "completed_at"),
            *("response_data", "target_device_count", "success_count"),
        }


async def row_has(client: Client, path: str, **fields: Any) -> Any:
    row = await client.get(path)
    return row if all(row[name] == value for name, value in fields.items()) else None


@in_a_loop
async def test_any_other_answer_makes_it_an_error_from_then_on(database: Path) -> None:
    async with gateway_on(database) as client, client.board("a") as a, client.board("b") as b:
        for status in ("failure", "error", "timeout"):
            answer = await client.post("/command", {"device_type": "ESP32", "command_name": "turn"})
            path = f"/command-logs/{answer['command_id']}"
            await say(a, "command_ack", command_id=answer["command_id"], status=status)
            await eventually(lambda path=path: row_has(client, path, status="ack_error", success_count=0))  # type: ignore[misc]
            await say(a, "command_ack", command_id=answer["command_id"], status="success")
            await say(b, "command_ack", command_id=answer["command_id"])
            row = await eventually(lambda path=path: row_has(client, path, success_count=1))  # type: ignore[misc]
            assert row["status"] == "ack_error"
            assert row["response_data"]["a"]["status"] == status
            assert row["completed_at"] is not None


@in_a_loop
async def test_late_answers_still_count(database: Path) -> None:
    async with gateway_on(database) as client, client.board("a") as a, client.board("b") as b:
        answer = await client.post("/command", {"device_type": "ESP32", "command_name": "turn", "timeout": 1})
        path = f"/command-logs/{answer['command_id']}"
        assert (await hear(a, "command"))["timeout"] == 1
        row = await eventually(lambda: row_has(client, path, status="ack_timeout"))
        assert row["completed_at"] is None
        await say(a, "command_ack", command_id=answer["command_id"])
        await eventually(lambda: row_has(client, path, status="ack_timeout", success_count=1))
        await say(b, "command_ack", command_id=answer["command_id"])
        row = await eventually(lambda: row_has(client, path, status="ack_success", success_count=2))
        assert row["completed_at"] is not None


@in_a_loop
async def test_no_devices(database: Path) -> None:
    async with gateway_on(database) as client:
        answer = await client.post("/command?wait=5", {"device_type": "ESP32", "command_name": "turn"})
        assert (answer["status"], answer["target_device_count"], answer["response_data"]) == ("no_devices", 0, None)
        assert (await client.get(f"/command-logs/{answer['command_id']}"))["status"] == "no_devices"
        async with client.board("servo_1", "esp32"):
            assert (await client.post("/command", {"device_type": "ESP32", "command_name": "turn"}))["status"] == "no_devices"
        await eventually(lambda: not_online(client, "servo_1"))
        answer = await client.post("/command", {"device_id": "servo_1", "command_name": "turn"})
        assert (answer["status"], answer["device_type"]) == ("no_devices", "esp32")


@in_a_loop
async def test_one_device_is_targeted_by_its_id(database: Path) -> None:
    async with gateway_on(database) as client, client.board("a") as a, client.board("b") as b:
        answer = await client.post("/command?device_id=b&command_name=turn")
        assert (answer["device_type"], answer["target_device_count"], answer["payload"]) == ("ESP32", 1, {})
        assert (await hear(b, "command"))["command_id"] == answer["command_id"]
        await say(a, "command_ack", command_id=answer["command_id"])
        assert (await hear(a, "error"))["error_code"] == "COMMAND_NOT_FOUND"  # and no command came before it
        assert (await client.post("/command?device_id=x&command_name=turn", status=404))["error_code"] == "DEVICE_NOT_FOUND"
        both = {"device_id": "a", "device_type": "other", "command_name": "turn"}
        assert (await client.post("/command", both, 400))["error_code"] == "INVALID_FIELD_VALUE"


@in_a_loop
async def test_commands_to_all_and_to_several(database: Path) -> None:
    async with gateway_on(database) as client, client.board("a", "X") as a, client.board("b", "X"), client.board("c", "Y"):
        answer = await client.post("/command", {"device_type": "*", "command_name": "stop"})
        assert (answer["device_type"], answer["target_device_count"], answer["status"]) == ("*", 3, "sent")
        assert (await hear(a, "command"))["device_type"] == "*"
        for body, device_type, count in (
            ({"device_id": ["a", "c", "a"]}, "*", 2),
            ({"device_id": ["a", "b"]}, "X", 2),
            ({"device_id": ["b", "b"]}, "X", 1),
            ({"device_id": "c"}, "Y", 1),
            ({"device_id": "a,c"}, "*", 2),
        ):
            answer = await client.post("/command", {**body, "command_name": "turn"})
            assert (answer["device_type"], answer["target_device_count"]) == (device_type, count)
            assert (await client.get(f"/command-logs/{answer['command_id']}"))["device_type"] == device_type
        answer = await client.post("/command?device_id=a,c,a&command_name=turn", {"speed": 3})
        assert (answer["target_device_count"], answer["payload"]) == (2, {"speed": 3})
        wrong = await client.post("/command?device_id=a,nobody,b,none&command_name=turn", status=404)
        assert wrong == {"error": "never seen: nobody, none", "error_code": "DEVICE_NOT_FOUND"}
        assert (await client.post("/command", {"device_id": [], "command_name": "x"}, 400))[
            "error_code"
        ] == "INVALID_FIELD_VALUE"
        assert (await client.post("/command", {"device_id": ["a", 5], "command_name": "x"}, 400))["error"].startswith(
            "device_id"
        )


@pytest.mark.parametrize("is_stalled", [False, True], ids=["disk is quick", "disk stalls"])
@in_a_loop
async def test_what_comes_first_leaves_first(database: Path, monkeypatch: pytest.MonkeyPatch, is_stalled: bool) -> None:
    """For every board, also behind a command to many, and while all wait for their rows."""
    monkeypatch.setattr(amhrpd.Dispatch, "TURN_TARGETS", 1)  # so that a command to many takes many turns
    async with gateway_on(database) as client:
        wires = [await client.wire(f"b{number}") for number in range(12)]
        await client.get("/command-logs")
        with disk_that_stalls(database) if is_stalled else contextlib.nullcontext():
            requests = [
                amhrpd.CommandRequest(command_name=str(n), **({"device_id": ["b11"]} if n % 2 else {"device_type": "ESP32"}))
                for n in range(6)
            ]
            commands = await asyncio.gather(*map(client.gateway.command, requests))  # at once: HTTP has no order
            for wire in wires[:-1]:
                assert [await wire.command() for _ in range(3)] == ["0", "2", "4"]
            assert [await wires[-1].command() for _ in range(6)] == ["0", "1", "2", "3", "4", "5"]
            assert [command.is_persisted for command in commands] == [not is_stalled] * 6
        for wire in wires:
            await wire.close()


@in_a_loop
async def test_no_devices_says_which_there_are(database: Path) -> None:
    async with gateway_on(database) as client:
        answer = await client.post("/command", {"device_type": "esp32", "command_name": "turn"})
        assert answer["detail"] == "no device of type esp32 is online; types known: none yet"
        async with client.board("a", "ESP32"), client.board("b", "ESP32"):
            async with client.board("c", "cam"):
                pass
            await eventually(lambda: not_online(client, "c"))
            answer = await client.post("/command?wait=1", {"device_type": "esp32", "command_name": "turn"})
            assert answer["detail"] == "no device of type esp32 is online; types known: ESP32 (2 online), cam (0 online)"
            answer = await client.post("/command", {"device_id": ["c"], "command_name": "turn"})
            assert answer["detail"] == "offline: c"
            assert "detail" not in await client.post("/command", {"device_id": ["a", "c"], "command_name": "turn"})


# -- deadmen -----------------------------------------------------------------------------------------------------------


def driving(after: float, *device_ids: str, stop: str = "stop") -> dict[str, Any]:
    """A command that must not outlive its caller."""
    deadman = {"after": after, "command_name": stop, "payload": {"hard": True}}
    return {"device_id": list(device_ids), "command_name": "forward", "payload": {"speed": 80}, "deadman": deadman}


async def due_at(client: Client, device_id: str) -> Any:
    return (await client.get(f"/devices/{device_id}"))["deadman_at"]


async def is_disarmed(client: Client, device_id: str) -> bool:
    return await due_at(client, device_id) is None


def armed(database: Path) -> list[Any]:
    """The deadmen that would outlast a crash."""
    return rows_of(database, "SELECT device_id, command_name, payload FROM amhrpd_deadmen ORDER BY device_id")


async def commands_heard(board: ClientConnection, heard: list[tuple[str, float]]) -> None:
    """Note the commands that come and when."""
    async for frame in board:
        message = json.loads(frame)
        if message["message_type"] == "command":
            heard.append((message["command_name"], time.monotonic()))


@in_a_loop
async def test_deadman_fires_once_for_all_that_are_due(database: Path) -> None:
    with logged() as events:
        async with gateway_on(database) as client, client.board("a") as a, client.board("b") as b:
            answer = await client.post("/command", driving(0.3, "a", "b"))
            sent_s = time.monotonic()
            assert answer["deadman"] == {"after": 0.3, "command_name": "stop", "payload": {"hard": True}}
            due = datetime.fromisoformat(await due_at(client, "a"))
            assert timedelta(0) < due - amhrpd.utc_now() < timedelta(seconds=0.3)
            frames = []
            for board in (a, b):
                assert (await hear(board, "command"))["command_name"] == "forward"
                frames.append(await hear(board, "command"))
                assert 0.2 < time.monotonic() - sent_s < 0.5
            assert frames[0] == frames[1]
            assert (frames[0]["command_name"], frames[0]["payload"]) == ("stop", {"hard": True})
            await eventually(lambda: is_disarmed(client, "a"))  # its pong showed that it has arrived
            row = await client.get(f"/command-logs/{frames[0]['command_id']}")
            assert (row["command_name"], row["target_device_count"], row["status"]) == ("stop", 2, "sent")
            await say(a, "command_ack", command_id=row["command_id"])
            await eventually(lambda: row_has(client, f"/command-logs/{row['command_id']}", success_count=1))
    (fired,) = named(events, "deadman_fired")
    assert (fired["command_id"], fired["armed_by"], fired["level"]) == (row["command_id"], answer["command_id"], "warning")


@in_a_loop
async def test_what_others_send_leaves_a_deadman_armed_and_due_when_it_was(database: Path) -> None:
    async with gateway_on(database) as client, client.board("a") as board:
        heard: list[tuple[str, float]] = []
        async with background(commands_heard(board, heard)):
            await client.post("/command", driving(0.5, "a"))
            due = await due_at(client, "a")
            for target, name in (("device_id=a", "blink"), ("device_type=*", "get_status")):
                answer = await client.post(f"/command?{target}&command_name={name}")
                await say(board, "command_ack", command_id=answer["command_id"])
                await eventually(lambda: row_has(client, f"/command-logs/{answer['command_id']}", status="ack_success"))  # noqa: B023
                assert await due_at(client, "a") == due
            await eventually(lambda: len(heard) == 4)
            (_, driven_s), *_, (_, stopped_s) = heard
            assert [name for name, _ in heard] == ["forward", "blink", "get_status", "stop"]
            assert 0.45 < stopped_s - driven_s < 0.7


@in_a_loop
async def test_command_with_a_deadman_of_its_own_takes_its_place_at_once(database: Path) -> None:
    """On a radio on which nothing comes back: a caller that repeats in time doesn't stumble."""
    async with gateway_on(database) as client:
        wire = await client.wire("a")
        for _ in range(4):
            driven_s = time.monotonic()
            await client.post("/command", driving(0.4, "a"))
            await asyncio.sleep(0.2)
        assert [await wire.command() for _ in range(5)] == ["forward"] * 4 + ["stop"]
        assert time.monotonic() - driven_s > 0.35
        _, proof = await wire.receive()
        await client.post("/command", driving(60, "a", stop="halt"))
        due = await due_at(client, "a")
        wire.send(proof, 10)  # the stop before it has arrived, which disarms that one alone
        wire.send('{"message_type":"alert","alert_type":"is","message":"heard"}')
        await eventually(lambda: alert_says(client, "a", "heard"))
        assert await due_at(client, "a") == due
        await client.get("/command-logs")
        assert armed(database) == [("a", "halt", '{"hard":true}')]
        await wire.close()


@in_a_loop
async def test_stop_disarms_when_it_has_arrived(database: Path) -> None:
    async with gateway_on(database) as client:
        wire = await client.wire("a")
        for shown_by in ("its pong", "its acknowledgement", "nothing"):
            driven = await client.post("/command", driving(0.6 if shown_by == "nothing" else 60, "a"))
            due = await due_at(client, "a")
            stop = await client.post("/command?device_id=a&command_name=stop")
            assert [await wire.command() for _ in range(2)] == ["forward", "stop"]
            opcode, proof = await wire.receive()
            assert opcode == 0x89
            wire.send("", 10)
            wire.send(json.dumps({"message_type": "command_ack", "command_id": driven["command_id"]}))
            wire.send(json.dumps({"message_type": "alert", "alert_type": "of", "message": shown_by}))
            await eventually(lambda: alert_says(client, "a", shown_by))  # noqa: B023 - awaited at once
            assert await due_at(client, "a") == due  # all that says nothing of the stop
            if shown_by == "its pong":
                wire.send(proof, 10)
            elif shown_by == "its acknowledgement":
                wire.send(json.dumps({"message_type": "command_ack", "command_id": stop["command_id"]}))
            else:
                break
            await eventually(lambda: is_disarmed(client, "a"))
        wire.reset()
        await eventually(lambda: not_online(client, "a"))
        wire = await client.wire("a")
        assert await wire.command() == "stop"  # the one before went into a dead connection
        await wire.close()


@in_a_loop
async def test_bad_deadman_is_refused_whole(database: Path) -> None:
    async with gateway_on(database) as client, client.board("a") as board:
        good = {"after": 1, "command_name": "stop"}
        for bad, status, text in (
            ({**good, "after": 0.1}, 400, "deadman.after is 0.1: it must be a number from 0.2 to 60"),
            ({**good, "after": 61}, 400, "after"),
            ({**good, "after": "1"}, 400, "deadman.after is '1': it must be a number"),
            ({"after": 1}, 400, "missing required field `deadman.command_name`"),
            ({"command_name": "stop"}, 400, "after"),
            ({**good, "command_name": ""}, 400, "command_name"),
            ({**good, "payload": 5}, 400, "deadman.payload is 5: it must be a JSON object"),
            ({**good, "payload": {"x": "y" * 20_000}}, 413, "bytes"),
            ({**good, "at": 5}, 400, "unknown 'deadman.at'; known here: after, command_name, payload"),
            (5, 400, "deadman is 5: it must be a JSON object"),
        ):
            answer = await client.post("/command", {"device_id": "a", "command_name": "go", "deadman": bad}, status)
            assert text in answer["error"], answer
        assert (await client.get("/command-logs"))["total"] == 0
        await client.post("/command", {"device_id": "a", "command_name": "first", "deadman": None})
        assert (await hear(board, "command"))["command_name"] == "first"


@in_a_loop
async def test_deadman_follows_a_device_to_its_next_connection(database: Path) -> None:
    async with gateway_on(database) as client:
        async with client.board("a") as first:
            await client.post("/command", driving(0.4, "a"))
            async with client.board("a") as second:  # took over before it is due
                assert await closed_with(first) == 4000
                assert (await hear(second, "command"))["command_name"] == "stop"
                await eventually(lambda: is_disarmed(client, "a"))
                await client.post("/command", driving(0.2, "a"))
        await eventually(lambda: not_online(client, "a"))
        due = datetime.fromisoformat(await due_at(client, "a"))
        await eventually(lambda: amhrpd.utc_now() > due)
        async with client.board("a") as board:  # was offline when it was due: the first thing that it hears
            await client.post("/command?device_id=a&command_name=beep")
            assert [(await hear(board, "command"))["command_name"] for _ in range(2)] == ["stop", "beep"]
            await eventually(lambda: is_disarmed(client, "a"))


@in_a_loop
async def test_stop_that_fired_is_sent_again_until_it_has_arrived(database: Path) -> None:
    """Whatever else the board says, and however its connection ends."""
    async with gateway_on(database) as client:
        wire = await client.wire("a")
        driven = await client.post("/command", driving(0.2, "a"))
        assert await wire.command() == "forward"
        for end in ("reset", "closed", "taken over"):
            assert await wire.command() == "stop"
            wire.send("", 10)
            wire.send(json.dumps({"message_type": "command_ack", "command_id": driven["command_id"]}))
            wire.send(json.dumps({"message_type": "alert", "alert_type": "has", "message": end}))  # with the stop unread
            await eventually(lambda: alert_says(client, "a", end))  # noqa: B023 - awaited at once
            if end == "reset":
                wire.reset()
            elif end == "closed":
                wire.send(struct.pack("!H", 1000), 8)
            if end != "taken over":
                await eventually(lambda: not_online(client, "a"))
            assert not await is_disarmed(client, "a")
            assert armed(database) == [("a", "stop", '{"hard":true}')]
            wire = await client.wire("a")
        assert await wire.command() == "stop"
        _, proof = await wire.receive()
        wire.send(proof, 10)
        await eventually(lambda: is_disarmed(client, "a"))
        await eventually(lambda: armed(database) == [])
        await wire.close()
        async with client.board("a") as board:
            await client.post("/command?device_id=a&command_name=beep")
            assert (await hear(board, "command"))["command_name"] == "beep"


@contextlib.contextmanager
def committed() -> Iterator[list[list[str]]]:
    """The statements of each transaction that the daemon's writer commits meanwhile."""
    transactions: list[list[str]] = []
    with executed() as statements:
        yield transactions
    written = [each.sql for each in statements if each.thread.startswith("store-writer")]
    while "COMMIT" in written:
        end = written.index("COMMIT")
        transactions.append(written[:end])
        del written[: end + 1]


@in_a_loop
async def test_deadmen_are_rows_and_cost_no_commit_of_their_own(database: Path) -> None:
    async with gateway_on(database, commit_interval_s=3600) as client:
        wire = await client.wire("a")
        await client.get("/command-logs")
        with committed() as transactions:
            await client.post("/command", driving(60, "a"))
            assert armed(database) == [("a", "stop", '{"hard":true}')]
            stop = await client.post("/command?device_id=a&command_name=stop")
            assert armed(database) == [("a", "stop", '{"hard":true}')]
            wire.send(json.dumps({"message_type": "command_ack", "command_id": stop["command_id"]}))
            await eventually(lambda: armed(database) == [])
        of_deadmen = [statements for statements in transactions if any("amhrpd_deadmen" in sql for sql in statements)]
        assert len(of_deadmen) == 2
        assert all(any("INTO command_logs" in sql for sql in statements) for statements in of_deadmen)
        await wire.close()


@in_a_loop
async def test_deadman_of_a_command_in_the_line_is_not_taken_for_an_armed_one(database: Path) -> None:
    async with gateway_on(database) as client:
        first = await client.wire("a")
        with disk_that_stalls(database):
            waiting = client.store.figures()["rows_waiting"]
            ahead = asyncio.create_task(client.post("/command?device_type=none&command_name=x"))
            await eventually(lambda: client.store.figures()["rows_waiting"] > waiting)
            client.gateway.sweep(1.0)  # what is due is looked for behind that one, and before the next
            waiting = client.store.figures()["rows_waiting"]
            driven = asyncio.create_task(client.post("/command", driving(0.3, "a")))
            await eventually(lambda: client.store.figures()["rows_waiting"] > waiting)
            second = await client.wire("a")  # it comes anew meanwhile
            await asyncio.gather(ahead, driven)
        assert [await second.command() for _ in range(2)] == ["forward", "stop"]
        await first.close()
        await second.close()


@in_a_loop
async def test_listeners_hear_of_deadmen(database: Path) -> None:
    async with gateway_on(database) as client:
        wire = await client.wire("a")
        async with listening(client, "?event=device") as stream:
            await client.post("/command", driving(0.5, "a"))
            heard = await stream.next()
            assert heard.data["deadman_at"] == await due_at(client, "a") is not None  # armed
            assert [await wire.command() for _ in range(2)] == ["forward", "stop"]
            assert (await stream.next()).data["deadman_at"] == heard.data["deadman_at"]  # fired
            _, proof = await wire.receive()
            wire.send(proof, 10)
            assert (await stream.next()).data["deadman_at"] is None  # disarmed
        await wire.close()


@in_a_loop
async def test_armed_deadmen_are_sent_before_the_close_frames_of_a_stop(database: Path) -> None:
    async with process_on(database) as (process, client), contextlib.AsyncExitStack() as stack:
        boards = [await stack.enter_async_context(client.board(f"b{number}")) for number in range(20)]
        await client.post("/command", driving(60, *(f"b{number}" for number in range(19))))
        heard: list[list[tuple[str, float]]] = [[] for _ in boards]
        listening = (commands_heard(board, list_) for board, list_ in zip(boards, heard, strict=True))
        async with background(*listening) as ends:
            process.send_signal(signal.SIGTERM)
            await asyncio.wait(ends, timeout=PATIENCE_S)
        assert await process.exit_code() == 0
    assert [[name for name, _ in list_] for list_ in heard] == [["forward", "stop"]] * 19 + [[]]
    assert [board.close_code for board in boards] == [1001] * 20
    assert rows_of(database, "SELECT status, target_device_count FROM command_logs WHERE command_name = 'stop'") == [
        ("sent", 19)
    ]
    assert armed(database) == []


@in_a_loop
async def test_largest_deadman_that_is_taken_is_sent_whatever_the_types_are(database: Path) -> None:
    def driving_all(size: int, after: float) -> dict[str, Any]:
        deadman = {"after": after, "command_name": "stop", "payload": {"x": "x" * size}}
        return {"device_type": "*", "command_name": "forward", "deadman": deadman}

    async with contextlib.AsyncExitStack() as outlive:
        client = await outlive.enter_async_context(gateway_on(database))
        board = await connect(client.port, "a")
        await say(board, "registration", device_type="a type of a board with a rather long name")
        await eventually(lambda: client.is_online("a"))
        size = 15_300
        while (await client.ask("POST", "/command", json=driving_all(size, 0.2)))[0] == 413:
            size -= 1
        assert [(await hear(board, "command"))["command_name"] for _ in range(2)] == ["forward", "stop"]
        await client.post("/command", driving_all(size, 60))
        assert (await hear(board, "command"))["command_name"] == "forward"
        async with background(outlive.aclose()) as (stop,):
            assert (await hear(board, "command"))["command_name"] == "stop"
            assert await closed_with(board) == 1001
            await stop


@in_a_loop
async def test_deadman_waits_for_no_disk(database: Path) -> None:
    async with gateway_on(database) as client, client.board("a") as board:
        answer = await client.post("/command", driving(0.5, "a"))
        sent_s = time.monotonic()
        await hear(board, "command")
        with disk_that_stalls(database):
            stop = await hear(board, "command")
            assert time.monotonic() - sent_s < 0.7
        row = await client.get(f"/command-logs/{stop['command_id']}")
        assert row["command_id"] != answer["command_id"]


@in_a_loop
async def test_caller_that_is_killed_while_it_drives_20_boards(database: Path) -> None:
    """Every board has its stop within `after` and 0.2 s."""
    after_s = 0.6
    drive = f"""
import json, time, urllib.request
body = {json.dumps(driving(after_s, *(f"wheel_{n}" for n in range(20))))!r}.encode()
while True:
    urllib.request.urlopen("http://127.0.0.1:PORT/command", body).read()
    time.sleep(0.2)
"""
    async with gateway_on(database) as client, contextlib.AsyncExitStack() as stack:
        boards = [await stack.enter_async_context(client.board(f"wheel_{n}")) for n in range(20)]
        heard: list[list[tuple[str, float]]] = [[] for _ in boards]
        await stack.enter_async_context(
            background(*(commands_heard(board, list_) for board, list_ in zip(boards, heard, strict=True)))
        )
        caller = subprocess.Popen([sys.executable, "-c", drive.replace("PORT", str(client.port))])
        try:
            await eventually(lambda: all(len(list_) >= 5 for list_ in heard))
        finally:
            caller.kill()
            await asyncio.to_thread(caller.wait)
        await eventually(lambda: all(list_[-1][0] == "stop" for list_ in heard))
        for list_ in heard:
            (_, driven_s), (_, stopped_s) = list_[-2:]
            assert after_s - 0.05 < stopped_s - driven_s < after_s + 0.2
            assert [name for name, _ in list_].count("stop") == 1


# Lives of the daemon one after the other, one for each line that is read, without the import of each.
class Wheel:
    """A board that has no deadman of its own: it drives until it hears a stop, and connects again and again."""

    def __init__(self, port: int, device_id: str) -> None:
        self.port = port
        self.device_id = device_id
        self.is_driving = False
        self.waits_since_s: float | None = None  # driving, since it registered again
        self.slowest_s = 0.0

    async def live(self) -> None:
        while True:
            with contextlib.suppress(OSError, websockets.WebSocketException):
                async with await connect(self.port, self.device_id) as board:
                    await say(board, "registration", device_type="wheel")
                    self.waits_since_s = time.monotonic() if self.is_driving else None
                    async for frame in board:
                        self.obey(json.loads(frame)["command_name"])
            await asyncio.sleep(0.02)

    def obey(self, name: str) -> None:
        if self.waits_since_s is not None:
            assert name == "stop"
            self.slowest_s = max(self.slowest_s, time.monotonic() - self.waits_since_s)
            self.waits_since_s = None
        self.is_driving = name == "forward"


@in_a_loop
async def test_gateway_that_is_killed_while_it_drives_20_boards(database: Path) -> None:
    """At 20 random moments: every board that was driven has its stop within two seconds after it registered again."""
    chance = random.Random(5)
    port = free_port()
    wheels = [Wheel(port, f"wheel_{number}") for number in range(20)]
    driven = 0
    async with aiohttp.ClientSession() as session, background(*(wheel.live() for wheel in wheels)) as alive:
        client = Client(port, session, database)

        async def drive() -> None:
            with contextlib.suppress(aiohttp.ClientError):
                while True:
                    await client.post("/command", driving(1, *(wheel.device_id for wheel in wheels)))

        for life in range(21):
            process = Process(database, port, {})
            try:
                await eventually(client.is_up)
                await eventually(lambda: row_has(client, "/health", devices_online=20))
                await eventually(lambda: not any(wheel.is_driving for wheel in wheels), within_s=2)
                async with background(drive()):
                    if life < 20:
                        await asyncio.sleep(chance.uniform(0.01, 0.2))
                        process.send_signal(signal.SIGKILL)
                        driven += sum(wheel.is_driving for wheel in wheels)
                    else:
                        await eventually(lambda: all(wheel.is_driving for wheel in wheels))
                        process.send_signal(signal.SIGTERM)
                        await eventually(lambda: not any(wheel.is_driving for wheel in wheels))
                        assert await process.exit_code() == 0
            finally:
                process.send_signal(signal.SIGKILL)
                await process.exit_code()
        assert not [task for task in alive if task.done()]
    assert driven > 100
    assert max(wheel.slowest_s for wheel in wheels) < 2
    assert armed(database) == []


@in_a_loop
async def test_stop_that_was_sent_before_a_deadman_was_armed_disarms_nothing(database: Path) -> None:
    async with gateway_on(database) as client:
        wire = await client.wire("a")
        await client.post("/command", driving(60, "a"))
        stop = await client.post("/command?device_id=a&command_name=stop")
        await client.post("/command", driving(60, "a"))  # goes on: what stopped it before is no stop of this
        due = await due_at(client, "a")
        assert [await wire.command() for _ in range(3)] == ["forward", "stop", "forward"]
        wire.send(json.dumps({"message_type": "command_ack", "command_id": stop["command_id"]}))
        await eventually(lambda: row_has(client, f"/command-logs/{stop['command_id']}", status="ack_success"))
        assert await due_at(client, "a") == due
        await wire.close()


@in_a_loop
async def test_stop_of_the_gateway_keeps_the_deadmen_of_those_that_it_did_not_reach(database: Path) -> None:
    """The pong to the ping behind it shows that a board has read its stop; one that is gone gets it after the next start."""
    async with gateway_on(database) as client:
        echoing, gone = await client.wire("a"), await client.wire("b")
        await client.post("/command", driving(60, "a", "b"))
        async with background(client.gateway.stop()) as (stop,):
            for wire in (echoing, gone):
                assert [await wire.command() for _ in range(2)] == ["forward", "stop"]
            gone.reset()
            opcode = 0
            while opcode != 0x88:
                opcode, payload = await echoing.receive()
                echoing.send(payload, opcode - 0x7F if opcode == 0x89 else 8)  # the pong, and in the end the echo
            await stop
    assert armed(database) == [("b", "stop", '{"hard":true}')]


# -- alerts ------------------------------------------------------------------------------------------------------------


@in_a_loop
async def test_latest_alert_is_in_the_device_record(database: Path) -> None:
    async with gateway_on(database) as client, client.board("wheel") as wheel:
        await say(wheel, "alert", alert_type="obstacle", message="wheels are locked")
        await eventually(lambda: alert_says(client, "wheel", "wheels are locked"))
        await say(wheel, "error", error_code="STALL", error_message="left motor")
        await eventually(lambda: alert_says(client, "wheel", "left motor"))
        alert = await alert_of(client, "wheel")
        assert TIME.fullmatch(alert.pop("timestamp"))
        assert alert == {"kind": "error", "type": "STALL", "message": "left motor"}


# -- forgetting --------------------------------------------------------------------------------------------------------


@in_a_loop
async def test_device_is_forgotten_whole(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amhrpd.Store, "ROWS_DELETED_AT_ONCE", 10)
    async with gateway_on(database) as client:
        async with client.board("a") as a, client.board("b") as b:
            for board in (a, b):
                for number in range(35):
                    await say(board, "status", payload={"n": number})
            await eventually(lambda: state_is(client, "b", {"n": 34}))
            command = await client.post("/command?device_id=a&command_name=x")
            assert (await client.ask("DELETE", "/devices/a")) == (
                409,
                {
                    "error": "device 'a' is online; only one that is offline can be deleted",
                    "error_code": "DEVICE_ONLINE",
                },
            )
        await eventually(lambda: not_online(client, "a"))
        assert await client.ask("DELETE", "/devices/nobody") == (
            404,
            {"error": "never seen: nobody", "error_code": "DEVICE_NOT_FOUND"},
        )
        deleted = {"device_id": "a", "deleted": {"snapshots": 35, "events": 2}}
        assert await client.ask("DELETE", "/api/devices/a") == (200, deleted)
        for path in ("/devices/a", "/state-history/a", "/device-connection-history/a"):
            await client.get(path, 404)
        assert (await client.get(f"/command-logs/{command['command_id']}"))["command_name"] == "x"
        assert (await client.get("/state-history/b"))["total"] == 35
        assert [device["device_id"] for device in (await client.get("/devices"))["devices"]] == ["b"]
        async with client.board("a"):
            assert (await client.get("/devices/a"))["state"] is None
            assert (await client.get("/state-history/a"))["total"] == 0


@in_a_loop
async def test_device_is_not_forgotten_while_nothing_can_be_written(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amhrpd.Store, "READ_TIMEOUT_S", 0.3)
    async with gateway_on(database) as client:
        async with client.board("a"):
            pass
        await eventually(lambda: not_online(client, "a"))
        await client.get("/state-history/a")
        with disk_that_stalls(database):
            async with client.board("a") as board:
                await say(board, "status", payload={"n": 1})
                await eventually(lambda: state_is(client, "a", {"n": 1}))
            await eventually(lambda: not_online(client, "a"))
            status, answer = await client.ask("DELETE", "/devices/a")
            assert (status, answer["error_code"]) == (503, "STORE_UNAVAILABLE")
            assert await state_is(client, "a", {"n": 1})  # still known
        await eventually(lambda: row_has(client, "/health", status="ok", rows_waiting=0))
        deleted = {"device_id": "a", "deleted": {"snapshots": 1, "events": 4}}
        assert await client.ask("DELETE", "/devices/a") == (200, deleted)
        assert (await client.get("/health"))["rows_rejected"] == 0


@in_a_loop
async def test_device_that_comes_back_while_it_is_forgotten_is_new_and_keeps_its_stop(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute, begun, may_go_on = amhrpd.Database.execute, threading.Event(), threading.Event()

    def wait(self: amhrpd.Database, statement: str, *args: Any) -> int:
        if "DELETE FROM" in statement:
            begun.set()
            may_go_on.wait(PATIENCE_S)
        return execute(self, statement, *args)

    async with gateway_on(database) as client:
        async with client.board("a", metadata={"name": "the old a"}) as board:
            for n in range(50):
                await say(board, "status", payload={"n": n})
            await client.post("/command", driving(0.3, "a"))
            await hear(board, "command")
            board.transport.abort()
        await eventually(lambda: not_online(client, "a"))
        async with listening(client, "?event=device") as stream:
            monkeypatch.setattr(amhrpd.Database, "execute", wait)
            asked = asyncio.create_task(client.ask("DELETE", "/devices/a"))
            await eventually(begun.is_set)
            async with client.board("a", None) as board:
                await say(board, "status", device_type="new", payload={"is": "new"})
                assert (await hear(board, "command"))["command_name"] == "stop"
                assert (await client.get("/devices/a"))["metadata"] == {}
                assert not asked.done()
                may_go_on.set()
                assert await asked == (200, {"device_id": "a", "deleted": {"snapshots": 50, "events": 2}})
                (state,) = (await client.get("/state-history/a"))["states"]
                assert (state["state_data"], state["device_type"]) == ({"is": "new"}, "new")
                assert await client.events("a") == ["connected"]
            while (heard := await stream.next()).data["is_online"]:
                assert heard.data["device_type"] == "new"  # nobody was told that it was deleted
        assert client.rows("SELECT metadata_json FROM devices") == [("{}",)]


@in_a_loop
async def test_device_that_is_forgotten_keeps_its_stop(database: Path) -> None:
    async with process_on(database) as (process, client):
        for end in (b"the same run", b"the next one"):
            async with client.board("a") as board:
                await client.post("/command", driving(0.2, "a"))
                assert (await hear(board, "command"))["command_name"] == "forward"
                board.transport.abort()
            await eventually(lambda: not_online(client, "a"))
            assert (await client.ask("DELETE", "/devices/a"))[0] == 200
            await client.get("/devices/a", 404)
            assert armed(database) == [("a", "stop", '{"hard":true}')]
            if end == b"the same run":
                async with client.board("a") as board:
                    assert (await hear(board, "command"))["command_name"] == "stop"
                    await eventually(lambda: is_disarmed(client, "a"))
        process.send_signal(signal.SIGKILL)
        await process.exit_code()
    async with gateway_on(database) as client, client.board("a") as board:
        assert (await hear(board, "command"))["command_name"] == "stop"


@in_a_loop
async def test_forgetting_that_is_cut_short_leaves_a_device_known_or_gone_whole(database: Path) -> None:
    slow = "import amhrpd, sys\namhrpd.Store.ROWS_DELETED_AT_ONCE = 1\nsys.argv = ['amhrpd.py']\nsys.exit(amhrpd.main())"
    async with process_on(database, code=slow) as (process, client):
        async with client.board("a") as board:
            for number in range(3000):
                await say(board, "status", payload={"n": number})
            await eventually(lambda: state_is(client, "a", {"n": 2999}))
        await eventually(lambda: not_online(client, "a"))
        count = "SELECT count(*) FROM device_state_snapshots"
        await eventually(lambda: rows_of(database, count) == [(3000,)])
        with contextlib.suppress(aiohttp.ClientError):
            async with background(client.ask("DELETE", "/devices/a")):
                await eventually(lambda: rows_of(database, count)[0][0] < 2900)
                process.send_signal(signal.SIGKILL)
                await process.exit_code()
    ((left,),) = rows_of(database, count)
    assert 0 < left < 2900
    async with gateway_on(database) as client:
        assert (await client.get("/devices/a"))["device_id"] == "a"
        status, answer = await client.ask("DELETE", "/devices/a")
        assert (status, answer["deleted"]["snapshots"]) == (200, left)


@in_a_loop
async def test_wait_ends_with_the_answers_or_with_the_time(database: Path) -> None:
    async with gateway_on(database) as client, client.board("a") as a, client.board("b") as b:
        async with background(answer_commands(a), answer_commands(b, "failure")):
            answer = await client.post("/command?wait=20", {"device_type": "ESP32", "command_name": "turn"})
            assert (answer["status"], answer["success_count"]) == ("ack_error", 1)
            assert {name: reply["status"] for name, reply in answer["response_data"].items()} == {
                "a": "success",
                "b": "failure",
            }
        began_s = time.monotonic()
        answer = await client.post("/command?wait=0.5", {"device_type": "ESP32", "command_name": "turn"})
        assert 0.4 < time.monotonic() - began_s < 5
        assert answer["status"] == "sent"


@in_a_loop
async def test_open_commands_are_open_again_after_a_restart(database: Path) -> None:
    async with contextlib.AsyncExitStack() as outlive, gateway_on(database) as client:
        a = await outlive.enter_async_context(client.board("a"))
        b = await outlive.enter_async_context(client.board("b"))
        answer = await client.post("/command", {"device_type": "ESP32", "command_name": "turn"})
        await say(a, "command_ack", command_id=answer["command_id"])
        path = f"/command-logs/{answer['command_id']}"
        await eventually(lambda: row_has(client, path, success_count=1))
        lost = await client.post("/command", {"device_type": "ESP32", "command_name": "lost"})
    assert b.close_code == 1001
    async with gateway_on(database, command_timeout_s=1) as client:
        assert (await client.get("/health"))["open_commands"] == 2
        assert (await client.get(path))["status"] == "sent"
        async with client.board("b") as b, client.board("c", "OTHER") as c:
            await say(c, "command_ack", command_id=answer["command_id"])
            assert (await hear(c, "error"))["error_code"] == "COMMAND_NOT_FOUND"
            await say(b, "command_ack", command_id=answer["command_id"], payload={"n": 2})
            row = await eventually(lambda: row_has(client, path, status="ack_success", success_count=2))
            assert set(row["response_data"]) == {"a", "b"}
            await eventually(lambda: row_has(client, f"/command-logs/{lost['command_id']}", status="ack_timeout"))


@in_a_loop
async def test_deepest_answer_that_is_taken_stops_no_start(database: Path) -> None:
    deep = json.loads("[" * 30 + "]" * 30)
    async with gateway_on(database) as client, client.board("a") as a:
        answer = await client.post("/command", {"device_type": "ESP32", "command_name": "x", "timeout": 1})
        await client.post("/command?device_id=a&command_name=open")
        await say(a, "command_ack", command_id=answer["command_id"], status="failure", payload={"deep": deep})
        path = f"/command-logs/{answer['command_id']}"
        await eventually(lambda: row_has(client, path, status="ack_error"))
    async with gateway_on(database) as client:
        assert (await client.get(path))["response_data"]["a"]["payload"] == {"deep": deep}
        assert (await client.get("/health"))["open_commands"] == 1


@in_a_loop
async def test_all_open_commands_are_open_again_and_those_that_lack_an_answer(database: Path) -> None:
    async with gateway_on(database, command_timeout_s=300) as client, client.board("a") as a, client.board("b"):
        answer = await client.post("/command", {"device_type": "ESP32", "command_name": "turn"})
        failed = f"/command-logs/{answer['command_id']}"
        await say(a, "command_ack", command_id=answer["command_id"], status="failure")
        await eventually(lambda: row_has(client, failed, status="ack_error", success_count=0, completed_at=None))
        oldest = (await client.post("/command?device_id=a&command_name=x"))["command_id"]
    with contextlib.closing(sqlite3.connect(database)) as db, db:
        for number in range(1099):
            db.execute(
                "INSERT INTO command_logs SELECT ?, device_type, command_name, payload, status, created_at, executed_at, "
                "completed_at, response_data, target_device_count, success_count FROM command_logs WHERE command_id = ?",
                (f"copy-{number}", oldest),
            )
    async with gateway_on(database, command_timeout_s=300) as client, client.board("a") as a, client.board("b") as b:
        assert (await client.get("/health"))["open_commands"] == 1100
        await say(a, "command_ack", command_id=oldest)
        await eventually(lambda: row_has(client, f"/command-logs/{oldest}", status="ack_success"))
        await say(b, "command_ack", command_id=answer["command_id"])
        row = await eventually(lambda: row_has(client, failed, status="ack_error", success_count=1))
        assert row["completed_at"] is not None


@in_a_loop
async def test_commands_over_what_a_board_takes_are_refused(database: Path) -> None:
    async with gateway_on(database) as client, client.board("servo_1", max_size=15360) as board:
        await client.post("/command", {"device_type": "ESP32", "command_name": "x", "payload": {"t": ""}})
        frame = await board.recv()
        room = 15360 - len(frame)
        await client.post("/command", {"device_type": "ESP32", "command_name": "x", "payload": {"t": "x" * room}})
        assert len((await hear(board, "command"))["payload"]["t"]) == room
        too_long = {"device_type": "ESP32", "command_name": "x", "payload": {"t": "x" * (room + 1)}}
        assert (await client.post("/command", too_long, 413))["error_code"] == "PAYLOAD_TOO_LARGE"
        assert (await client.get("/command-logs"))["total"] == 2


@in_a_loop
async def test_board_that_does_not_read_holds_nobody_up(database: Path) -> None:
    async with gateway_on(database) as client, client.board("reader") as reader:
        deaf = await client.wire("deaf")
        deaf.writer.transport.pause_reading()  # type: ignore[attr-defined]
        payload = {"device_type": "ESP32", "command_name": "x", "payload": {"t": "x" * 14000}}
        async with background(answer_commands(reader)):
            slowest_s = 0.0
            for _ in range(600):  # 8 MB: more than the kernel's buffers hold
                began_s = time.monotonic()
                answer = await client.post("/command", payload)
                slowest_s = max(slowest_s, time.monotonic() - began_s)
            assert slowest_s < 1
            assert answer["target_device_count"] == 2
            await eventually(lambda: row_has(client, f"/command-logs/{answer['command_id']}", success_count=1))
        assert 0 < waiting_bytes(client) < 64 << 10
        deaf.writer.transport.abort()


# ======================================================================================================================
# Contract, section 5: online, offline
# ======================================================================================================================


@in_a_loop
async def test_connection_history_says_when_who_and_why(database: Path) -> None:
    async with gateway_on(database) as client:
        async with client.board("esp32_001"):
            device = await client.get("/devices/esp32_001")
            assert (device["is_online"], device["disconnected_at"]) == (True, None)
        await eventually(lambda: not_online(client, "esp32_001"))
        device = await client.get("/devices/esp32_001")
        history = await client.get("/device-connection-history/esp32_001")
        assert (history["device_id"], history["total"]) == ("esp32_001", 2)
        ended, began = history["events"]
        details = ended.pop("details")
        assert began["details"] == {"peer": "127.0.0.1"}
        assert began["timestamp"] == device["connected_at"]
        assert 0 <= details.pop("seconds_connected") < 10
        assert details == {"reason": "closed by the device", "code": 1000, "peer": "127.0.0.1"}
        assert ended == {
            "id": 2,
            "device_id": "esp32_001",
            "device_type": "ESP32",
            "event": "disconnected",
            "timestamp": device["disconnected_at"],
        }
        assert (await client.get("/device-connection-history/esp32_001?event=connected"))["events"] == [began]


@in_a_loop
async def test_newest_connection_wins_at_once_and_history_stays_balanced(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amhrpd.Registry, "TAKEOVER_WRITTEN_AFTER_S", 0.0)
    async with gateway_on(database) as client, client.board("servo_1") as first:
        looks: list[bool] = []

        async def watch() -> None:
            while True:
                device = client.gateway.registry.find("servo_1")
                looks.append(device is not None and device.is_online)
                await asyncio.sleep(0)

        async with background(watch()), await connect(client.port, "servo_1") as second:
            await say(second, "registration", device_type="ESP32")
            assert await closed_with(first) == 4000
            async with background(answer_commands(second)):
                answer = await client.post("/command", {"device_id": "servo_1", "command_name": "x", "wait": 5})
                assert answer["status"] == "ack_success"
            assert len(looks) > 10
            assert all(looks)
            assert await client.events("servo_1") == ["connected", "disconnected", "connected"]
            history = await client.get("/device-connection-history/servo_1?event=disconnected")
            assert history["events"][0]["details"]["reason"] == "replaced"
        await eventually(lambda: not_online(client, "servo_1"))
        assert await client.events("servo_1") == ["connected", "disconnected", "connected", "disconnected"]


@in_a_loop
async def test_what_arrives_on_a_replaced_connection_counts_for_nothing(database: Path) -> None:
    async with gateway_on(database) as client:
        old = await client.wire("servo_1")  # doesn't answer the close, and goes on talking
        command = await client.post("/command?device_id=servo_1&command_name=x")
        assert (await old.receive())[0] == 0x81
        async with await connect(client.port, "servo_1") as new:
            await say(new, "registration", device_type="ESP32")
            assert (await old.receive())[0] == 0x88
            old.send('{"message_type":"registration","device_type":"GHOST"}')
            old.send('{"message_type":"status","payload":{"ghost":true}}')
            await say(new, "status", payload={"real": True})
            await eventually(lambda: state_is(client, "servo_1", {"real": True}))
            heard_at = (await client.get("/devices/servo_1"))["last_heartbeat"]
            old.send(b"", opcode=10)
            answer = {"message_type": "command_ack", "command_id": command["command_id"], "status": "success"}
            old.send(json.dumps(answer))  # but for what it was asked
            await eventually(lambda: row_has(client, f"/command-logs/{command['command_id']}", status="ack_success"))
            assert (await client.get("/devices/servo_1"))["last_heartbeat"] == heard_at
            old.send(struct.pack("!H", 1000), opcode=8)
            await old.close()
        await eventually(lambda: not_online(client, "servo_1"))
        assert (await client.get("/state-history/servo_1"))["total"] == 1
        assert (await client.get("/devices/servo_1"))["device_type"] == "ESP32"
        assert await client.events("servo_1") == ["connected", "disconnected"]


@in_a_loop
async def test_older_connection_that_registers_late_does_not_take_over(database: Path) -> None:
    async with gateway_on(database) as client:
        older = await Wire.connect(client.port, "servo_1")
        async with client.board("servo_1"):
            older.writer.write(Wire.frame(REGISTRATION.encode()) * 5)  # in one segment: it is heard no more
            assert await older.receive() == (0x88, struct.pack("!H", 4000) + b"replaced by a newer connection")
            await older.close()
            assert await client.events("servo_1") == ["connected"]


@in_a_loop
async def test_two_boards_with_one_id_do_not_fill_the_history(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A takeover within five seconds of the connection that it replaces is not written, and the rest stays in balance."""
    with logged() as events:
        async with gateway_on(database) as client:
            for number in range(12):
                if number == 10:
                    monkeypatch.setattr(amhrpd.Registry, "TAKEOVER_WRITTEN_AFTER_S", 0.0)
                wire = await Wire.connect(client.port, "twin")
                wire.send(REGISTRATION)
                wire.send('{"message_type":"reboot"}')
                while b"UNKNOWN_MESSAGE_TYPE" not in (await wire.receive())[1]:
                    pass
                if number == 9:
                    assert await client.events("twin") == ["connected"]
            wire.reset()
            await eventually(lambda: not_online(client, "twin"))
            assert await client.events("twin") == ["connected", "disconnected"] * 3
    assert {event["device_id"] for event in named(events, "takeovers_not_written")} == {"twin"}


@in_a_loop
async def test_time_in_which_the_gateway_stood_still_is_nobodys_silence(database: Path) -> None:
    is_near = asyncio.Event()  # else what boards say is still on its way, as after a suspended Pi
    is_near.set()

    async def beat(board: ClientConnection) -> None:
        while await is_near.wait():
            await say(board, "heartbeat")
            await asyncio.sleep(0.1)

    settings: dict[str, Any] = {"AMHRPD_PING_INTERVAL": "0.6", "AMHRPD_HEARTBEAT_TIMEOUT": "0.9"}
    async with process_on(database, **settings) as (process, client), contextlib.AsyncExitStack() as stack:
        boards = [await stack.enter_async_context(client.board(f"b{number}")) for number in range(5)]
        async with background(*(beat(board) for board in boards)):
            await asyncio.sleep(0.3)
            process.send_signal(signal.SIGSTOP)
            is_near.clear()
            await asyncio.sleep(1.5)
            process.send_signal(signal.SIGCONT)
            await asyncio.sleep(0.3)
            is_near.set()
            await asyncio.sleep(0.5)
            for number in range(5):
                assert await client.events(f"b{number}") == ["connected"]


@in_a_loop
async def test_registration_that_lay_in_a_gateway_that_stood_still_counts(database: Path) -> None:
    async with process_on(database, AMHRPD_REGISTRATION_TIMEOUT="1") as (process, client), client.board("late", None) as board:
        process.send_signal(signal.SIGSTOP)
        await say(board, "registration", device_type="ESP32")
        await asyncio.sleep(2)
        process.send_signal(signal.SIGCONT)
        await eventually(lambda: client.is_online("late"))
        assert await client.events("late") == ["connected"]


@in_a_loop
async def test_answer_between_the_close_frame_and_its_echo_counts(database: Path) -> None:
    async with contextlib.AsyncExitStack() as outlive:
        client = await outlive.enter_async_context(gateway_on(database))
        wire = await client.wire("busy")
        command = await client.post("/command?device_id=busy&command_name=blink")
        assert (await wire.receive())[0] == 0x81
        async with background(outlive.aclose()) as (stop,):
            first, payload = await wire.receive()
            assert (first, payload[:2]) == (0x88, struct.pack("!H", 1001))
            wire.send(json.dumps({"message_type": "command_ack", "command_id": command["command_id"]}))
            wire.send(payload, 8)
            await stop
        await wire.close()
    assert rows_of(database, "SELECT status, success_count FROM command_logs") == [("ack_success", 1)]


@in_a_loop
async def test_answers_behind_floods_count_at_a_stop(database: Path) -> None:
    async with contextlib.AsyncExitStack() as outlive:
        client = await outlive.enter_async_context(gateway_on(database))
        wires = [await Wire.connect(client.port, f"busy_{number}") for number in range(4)]
        for wire in wires:
            wire.send(REGISTRATION)
        await eventually(lambda: row_has(client, "/health", devices_online=4))
        command = await client.post("/command?device_type=*&command_name=blink")
        flood = Wire.frame(b'{"message_type":"status","payload":{"text":"%s"}}' % (b"x" * 100)) * 6000
        for wire in wires:
            assert (await wire.receive())[0] == 0x81
            wire.writer.write(flood)
            wire.send(json.dumps({"message_type": "command_ack", "command_id": command["command_id"]}))
        await eventually(lambda: client.gateway.messages[amhrpd.Status] > 4000)  # more than is taken without waiting
        began_s = time.monotonic()
        async with background(outlive.aclose()) as (stop,):
            for wire in wires:
                first, payload = await wire.receive()
                assert (first, payload[:2]) == (0x88, struct.pack("!H", 1001))
                wire.send(payload, 8)
            await stop
        assert time.monotonic() - began_s < 1.9  # it was the echoes that ended it
        for wire in wires:
            await wire.close()
    assert rows_of(database, "SELECT status, success_count FROM command_logs") == [("ack_success", 4)]


@in_a_loop
async def test_dead_connection_is_given_up_when_no_pong_comes(database: Path) -> None:
    async with gateway_on(database, ping_interval_s=0.2) as client:
        wire = await client.wire("half_open")
        began_s = time.monotonic()
        assert (await wire.receive())[0] == 0x89
        await eventually(lambda: not_online(client, "half_open"))
        assert time.monotonic() - began_s < 3
        assert await client.events("half_open") == ["connected", "timeout"]
        await wire.close()


@in_a_loop
async def test_board_that_promised_heartbeats_and_falls_silent_is_given_up(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amhrpd, "UPKEEP_INTERVAL_S", 0.1)
    async with gateway_on(database, heartbeat_timeout_s=0.5) as client, client.board("servo_1") as board:
        await say(board, "heartbeat")
        for _ in range(10):
            await say(board, "reboot")  # wrong, but no silence
            await hear(board, "error")
            await asyncio.sleep(0.1)
        assert await closed_with(board) == 4001  # though it answers every ping
        assert await client.events("servo_1") == ["connected", "timeout"]


@in_a_loop
async def test_connection_that_is_reset_was_lost_and_is_no_defect(database: Path) -> None:
    with logged() as events:
        async with gateway_on(database) as client:
            for _ in range(5):
                wire = await client.wire("cam_1")
                wire.writer.write(Wire.frame(b"", opcode=9) * 200)  # whose answers find nobody
                wire.reset()
                await eventually(lambda: not_online(client, "cam_1"))
                details = (await client.get("/device-connection-history/cam_1?limit=1"))["events"][0]["details"]
                assert (details["code"], details["reason"]) == (None, "the connection was lost")
    assert [event for event in events if "exception" in event] == []


@in_a_loop
async def test_connection_that_never_registers_is_closed(database: Path) -> None:
    async with gateway_on(database, registration_timeout_s=0.3) as client, client.board("silent", None) as board:
        assert await closed_with(board) == 4001
        await client.get("/devices/silent", 404)


@in_a_loop
async def test_nothing_follows_a_close_frame(database: Path) -> None:
    async with gateway_on(database, registration_timeout_s=0.1) as client:
        wire = await Wire.connect(client.port, "silent")
        first, payload = await wire.receive()
        assert (first, payload[:2]) == (0x88, struct.pack("!H", 4001))
        wire.send("rubbish")
        wire.send(payload, 8)
        assert await wire.reader.read() == b""
        await wire.close()


@in_a_loop
async def test_defect_of_the_gateway_closes_with_1011_and_one_traceback(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    with logged() as events:
        async with gateway_on(database) as client, client.board("a") as board:
            monkeypatch.setattr(amhrpd.Gateway, "handle", fail)
            await say(board, "heartbeat")
            assert await closed_with(board) == 1011
            await eventually(lambda: not_online(client, "a"))
            details = (await client.get("/device-connection-history/a"))["events"][0]["details"]
            assert (details["code"], details["reason"]) == (1011, "internal error")
    assert [event["event"] for event in events if "exception" in event] == ["connection_failed"]


@in_a_loop
async def test_a_stop_says_1001_and_a_restart_knows_everything(database: Path) -> None:
    async with contextlib.AsyncExitStack() as outlive, gateway_on(database) as client:
        board = await outlive.enter_async_context(client.board("esp32_001", metadata={"fw": "2"}))
        unregistered = await outlive.enter_async_context(client.board("unregistered", None))
        await say(board, "status", payload={"a": 1})
        await eventually(lambda: state_is(client, "esp32_001", {"a": 1}))
    assert board.close_code == unregistered.close_code == 1001
    assert not database.with_name("amhrpd.db-wal").exists()  # checkpointed
    async with gateway_on(database) as client:
        device = await client.get("/devices/esp32_001")
        assert (device["is_online"], device["metadata"], device["state"]) == (False, {"fw": "2"}, {"a": 1})
        assert device["disconnected_at"] > device["connected_at"]
        assert await client.events("esp32_001") == ["connected", "disconnected"]
        ended = (await client.get("/device-connection-history/esp32_001"))["events"][0]
        assert ended["details"]["code"] == 1001


# ======================================================================================================================
# Contract, section 6: REST
# ======================================================================================================================

ROUTES = [
    ("/health", 200),
    ("/devices", 200),
    ("/devices/a", 200),
    ("/state-history/a", 200),
    ("/command-logs", 200),
    ("/device-connection-history/a", 200),
    ("/devices/never", 404),
    ("/state-history/never", 404),
    ("/device-connection-history/never", 404),
    ("/command-logs/never", 404),
    ("/nothing", 404),
]


@in_a_loop
async def test_every_route_is_there_twice_and_every_error_has_one_shape(database: Path) -> None:
    async with gateway_on(database) as client, client.board("a"):
        for prefix in ("", "/api"):
            for path, status in ROUTES:
                answer = await client.get(prefix + path, status)
                if status != 200:
                    assert set(answer) == {"error", "error_code"}
                    assert answer["error_code"].endswith("NOT_FOUND")
            for method, path in (("PUT", "/devices"), ("GET", "/command"), ("DELETE", "/command-logs"), ("POST", "/health")):
                status, answer = await client.ask(method, prefix + path)
                assert (status, answer["error_code"], set(answer)) == (405, "METHOD_NOT_ALLOWED", {"error", "error_code"})
            await client.post(f"{prefix}/command?device_type=none&command_name=x")
        async with (
            await connect(client.port, "b"),
            await websockets.connect(f"ws://127.0.0.1:{client.port}/api/ws/b", proxy=None) as b,
        ):
            await b.send(REGISTRATION)
            await eventually(lambda: client.is_online("b"))


@in_a_loop
async def test_health_says_what_the_contract_says(database: Path) -> None:
    async with gateway_on(database) as client, client.board("a"), client.board("b"):
        health = await client.get("/health")
        assert (health["status"], health["app"], health["version"]) == ("ok", "AMHR-PD", amhrpd.VERSION)
        assert (health["devices_online"], health["devices_total"], health["database"]) == (2, 2, "ok")
        assert TIME.fullmatch(health["timestamp"])
        assert 0 < health["uptime_seconds"] < 60


@in_a_loop
async def test_device_record_is_the_seeds(database: Path) -> None:
    async with gateway_on(database) as client, client.board("esp32_001"):
        device = await client.get("/devices/esp32_001")
        assert {name: type(value) for name, value in device.items()} == {
            **dict.fromkeys(("device_id", "device_type", "last_heartbeat", "connected_at"), str),
            "is_online": bool,
            "disconnected_at": type(None),
            "metadata_json": dict,
            "metadata": dict,
            "state": type(None),
            "state_timestamp": type(None),
            "alert": type(None),
            "deadman_at": type(None),
        }
        assert TIME.fullmatch(device["last_heartbeat"])
        assert TIME.fullmatch(device["connected_at"])
        assert await client.get("/devices") == {"total": 1, "devices": [await client.get("/devices/esp32_001")]}


@in_a_loop
async def test_devices_are_filtered_by_type_exactly_and_by_state(database: Path) -> None:
    async with gateway_on(database) as client, client.board("a", "ESP32"), client.board("b", "esp32"):
        async with client.board("c", "ESP32"):
            pass
        await eventually(lambda: not_online(client, "c"))
        for query, expected in {
            "": "abc",
            "?device_type=ESP32": "ac",
            "?device_type=esp32": "b",
            "?device_type=ESP": "",
            "?online=true": "ab",
            "?online=false": "c",
            "?device_type=ESP32&online=true": "a",
        }.items():
            answer = await client.get(f"/devices{query}")
            assert "".join(device["device_id"] for device in answer["devices"]) == expected
            assert answer["total"] == len(expected)


@in_a_loop
async def test_wrong_parameters_are_named(database: Path) -> None:
    async with gateway_on(database) as client, client.board("a"):
        for path, culprit in {
            "/devices?device_typ=ESP32": "device_typ",
            "/devices?online=yes": "online",
            "/devices?online=true&online=true": "online",
            "/devices/a?limit=1": "limit",
            "/health?x=": "x",
            "/state-history/a?limit=0": "limit",
            "/state-history/a?limit=1001": "limit",
            "/state-history/a?limit=ten": "limit",
            "/state-history/a?since=yesterday": "since",
            "/state-history/a?until=2026-13-01": "until",
            "/state-history/a?before_id=-1": "before_id",
            "/state-history/a?before_id=99999999999999999999": "before_id",
            "/state-history/a?event=connected": "event",
            "/command-logs?status=acked": "status",
            "/command-logs?before_id=a&before_id=b": "before_id",
            "/device-connection-history/a?event=online": "event",
        }.items():
            answer = await client.get(path, 400)
            assert answer["error_code"] == "INVALID_FIELD_VALUE"
            assert culprit in answer["error"], answer


@in_a_loop
async def test_both_forms_of_a_command_and_all_ways_to_get_it_wrong(database: Path) -> None:
    async with gateway_on(database) as client, client.board("a") as board:
        good: list[tuple[str, Any]] = [
            ("?device_type=ESP32&command_name=blink", {"count": 5}),
            ("?device_id=a&command_name=blink", {"count": 5}),
            ("?device_id=a&command_name=blink&timeout=7.5&wait=0", {"count": 5}),
            ("?device_type=ESP32&command_name=blink&payload=%7B%22count%22%3A5%7D", None),
            ("", {"device_type": "ESP32", "command_name": "blink", "payload": {"count": 5}}),
            ("?timeout=7", {"device_id": "a", "device_type": "ESP32", "command_name": "blink", "payload": {"count": 5}}),
        ]
        for query, body in good:
            for headers in ({"Content-Type": "application/x-www-form-urlencoded"}, {"Content-Type": "application/json"}):
                answer = await client.post(f"/command{query}", body, headers=headers)
                assert answer["payload"] == {"count": 5}
                assert (await hear(board, "command"))["payload"] == {"count": 5}
        assert (await client.post("/command?device_type=ESP32&command_name=blink"))["payload"] == {}
        bad: list[tuple[str, Any, str, str]] = [
            ("", None, "MISSING_REQUIRED_FIELD", "command_name"),
            ("", {"command_name": "x"}, "MISSING_REQUIRED_FIELD", "device_type"),
            ("", [], "INVALID_MESSAGE", "object"),
            ("", b"{", "INVALID_MESSAGE", "JSON"),
            ("", b'{"device_type":"a","command_name":"x","payload":{"v":NaN}}', "INVALID_MESSAGE", "JSON"),
            ("", b"\xff\xfe", "INVALID_MESSAGE", ""),
            ("", {"device_type": "a", "command_name": None}, "INVALID_FIELD_TYPE", "command_name"),
            ("", {"device_type": "a", "command_name": ""}, "INVALID_FIELD_VALUE", "command_name"),
            ("", {"device_type": "a", "command_name": 5}, "INVALID_FIELD_TYPE", "command_name"),
            ("", {"device_type": "a", "command_name": "x" * 256}, "INVALID_FIELD_VALUE", "command_name"),
            ("", {"device_type": "x" * 51, "command_name": "x"}, "INVALID_FIELD_VALUE", "device_type"),
            ("", {"device_id": "a b", "command_name": "x"}, "INVALID_FIELD_VALUE", "device_id"),
            ("", {"device_type": "a", "command_name": "x", "payload": 5}, "INVALID_FIELD_TYPE", "payload"),
            ("", {"device_type": "a", "command_name": "x", "timeout": 0}, "INVALID_FIELD_VALUE", "timeout"),
            ("", {"device_type": "a", "command_name": "x", "timeout": 301}, "INVALID_FIELD_VALUE", "timeout"),
            ("", {"device_type": "a", "command_name": "x", "wait": 61}, "INVALID_FIELD_VALUE", "wait"),
            ("", {"device_type": "a", "command_name": "x", "timout": 5}, "INVALID_FIELD_VALUE", "timout"),
            ("?device_type=a&command_name=x&wait=soon", None, "INVALID_FIELD_TYPE", "wait"),
            ("?device_type=a&command_name=x", [1], "INVALID_FIELD_TYPE", "payload"),
            ("?device_type=a&command_name=x&payload=%7B%7D", {}, "INVALID_FIELD_VALUE", "payload"),
            ("?device_type=a", {"device_type": "b", "command_name": "x"}, "INVALID_FIELD_VALUE", "device_type"),
            ("?device_type=a&device_type=b&command_name=x", None, "INVALID_FIELD_VALUE", "device_type"),
            ("?device_type=a&command_name=x&retries=1", None, "INVALID_FIELD_VALUE", "retries"),
        ]
        logs_before = (await client.get("/command-logs?limit=1000"))["total"]
        for query, body, code, text in bad:
            answer = await client.post(f"/command{query}", body, 400)
            assert answer["error_code"] == code, (query, body, answer)
            assert text in answer["error"], answer
        assert (await client.get("/command-logs?limit=1000"))["total"] == logs_before


@in_a_loop
async def test_history_is_newest_first_by_time_and_then_by_id(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that was wrong (a Pi without a clock battery) leaves its rows where their times say."""
    start = datetime(2026, 1, 24, 10, 30, 45, 123456)
    jumps = [0, 0, 0, 3600, -86400 * 365, -86400 * 365, 5]
    async with gateway_on(database) as client, client.board("a") as board:
        for number, jump in enumerate(jumps):
            monkeypatch.setattr(amhrpd, "utc_now", lambda jump=jump: start + timedelta(seconds=jump))
            await say(board, "status", payload={"n": number})
            await eventually(lambda number=number: state_is(client, "a", {"n": number}))  # type: ignore[misc]
            await client.post("/command?device_type=none&command_name=x", {"n": number})
        states = (await client.get("/state-history/a"))["states"]
        assert [state["state_data"]["n"] for state in states] == [3, 6, 2, 1, 0, 5, 4]
        assert states[2]["timestamp"] == "2026-01-24T10:30:45.123456"
        logs = (await client.get("/command-logs"))["logs"]
        assert [row["payload"]["n"] for row in logs] == [3, 6, 2, 1, 0, 5, 4]

        async def found(**query: str) -> list[int]:
            return [s["state_data"]["n"] for s in (await client.get("/state-history/a", params=query))["states"]]

        assert await found(limit="2") == [3, 6]
        assert await found(limit="2", before_id=str(states[1]["id"])) == [2, 1]
        assert await found(limit="2", before_id=str(states[3]["id"])) == [0, 5]
        assert await found(since="2026-01-24T10:30:45.123457") == [3, 6]
        assert await found(since="2026-01-24T10:30:45.123456", until="2026-01-24T10:30:45.123456") == [2, 1, 0]
        assert await found(since="2026-01-24T11:30:45.123457+01:00") == [3, 6]
        assert await found(since="2026-01-24T11:30:45.123457 01:00") == [3, 6]  # a + that nobody escaped
        assert await found(since="2026-01-24T10:30:46Z") == [3, 6]
        assert await found(until="2025-12-31") == [5, 4]
        between = await client.get("/command-logs?since=2026-01-24T10:30:46&until=2026-01-24T10:30:51")
        assert [row["payload"]["n"] for row in between["logs"]] == [6]
        behind = await client.get(f"/command-logs?before_id={logs[3]['command_id']}")
        assert [row["payload"]["n"] for row in behind["logs"]] == [0, 5, 4]


@in_a_loop
async def test_clock_jumps_disturb_no_timeout(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_time, real_now = time.time, amhrpd.utc_now
    async with gateway_on(database, heartbeat_timeout_s=5) as client, client.board("a") as board:
        await say(board, "heartbeat")
        answer = await client.post("/command", {"device_type": "ESP32", "command_name": "x", "timeout": 300})
        for days in (400, -400):
            monkeypatch.setattr(time, "time", lambda days=days: real_time() + 86400 * days)
            monkeypatch.setattr(amhrpd, "utc_now", lambda days=days: real_now() + timedelta(days=days))
            client.gateway.sweep(1.0)
            await say(board, "status", payload={"days": days})
            await eventually(lambda days=days: state_is(client, "a", {"days": days}))  # type: ignore[misc]
        assert await client.is_online("a")
        assert await row_has(client, f"/command-logs/{answer['command_id']}", status="sent")
        assert (await client.get("/health"))["uptime_seconds"] < 60


@in_a_loop
async def test_command_logs_are_filtered_by_both_at_once(database: Path) -> None:
    async with gateway_on(database) as client, client.board("a", "A") as a, client.board("b", "B") as b:
        async with background(answer_commands(a), answer_commands(b, "failure")):
            for device_type in "ABAC":
                await client.post(f"/command?device_type={device_type}&command_name=x&wait=5")
        for query, expected in {
            "": "CABA",
            "?status=ack_success": "AA",
            "?device_type=B": "B",
            "?device_type=A&status=ack_success": "AA",
            "?device_type=A&status=ack_error": "",
            "?status=no_devices&limit=5": "C",
            "?limit=2": "CA",
        }.items():
            answer = await client.get(f"/command-logs{query}")
            assert "".join(row["device_type"] for row in answer["logs"]) == expected, query
            assert answer["total"] == len(expected)


@in_a_loop
async def test_reads_see_what_was_answered_before(database: Path) -> None:
    async with gateway_on(database, commit_interval_s=3600) as client, client.board("a") as board:
        for number in range(1, 51):
            await say(board, "status", payload={"n": number})
            await eventually(lambda number=number: state_is(client, "a", {"n": number}))  # type: ignore[misc]
            assert (await client.get("/state-history/a"))["total"] == number


# ======================================================================================================================
# Contract, sections 6 and 8: for other programs
# ======================================================================================================================


async def csv_of(client: Client, path: str) -> tuple[list[list[str]], Any]:
    """The lines of a download, and its headers."""
    async with client.session.get(f"http://127.0.0.1:{client.port}{path}") as response:
        text = await response.text()
        assert (response.status, response.content_type, response.charset) == (200, "text/csv", "utf-8"), text
        return list(csv.reader(io.StringIO(text, newline=""))), response.headers


@in_a_loop
async def test_states_as_csv_have_a_column_for_each_key_and_no_formula(database: Path) -> None:
    async with gateway_on(database) as client, client.board("a") as board:
        header, *rows = (await csv_of(client, "/state-history/a?format=csv"))[0]
        assert (header, rows) == (["timestamp", "other"], [])
        await say(board, "status", payload={"t": -4.5, "gps": {"lat": 1, "on": [True, None]}, "on": True, "off": None})
        texts = [
            "=1+1",
            "+1+1",
            "-a",
            "@a",
            "\t=a",
            "\r=a",
            "-5.25",
            'a,"b"\nc',
            "ä=1",
            "",
            "\uff1d1+1",
            "\uff0b1",
            "\uff0d1",
            "\uff20a",
            "a;=1+1",
            "a\t+a",
            "a;-5\t7",
            "a;b",
        ]
        await say(board, "status", payload={f"k{number}": text for number, text in enumerate(texts)} | {"=key": 1})
        await say(board, "status", payload={"timestamp": "mine", "other": 7, "t": 3})
        await eventually(lambda: client.gateway.messages[amhrpd.Status] == 3)
        lines, headers = await csv_of(client, "/state-history/a?format=csv")
        assert headers["Content-Disposition"] == 'attachment; filename="state-history-a.csv"'
        newest, formulas, oldest = (dict(zip(lines[0], line, strict=True)) for line in lines[1:])
        assert lines[0] == ["timestamp", "t", *(f"k{n}" for n in range(len(texts))), "'=key", "gps", "on", "off", "other"]
        shown = [
            "'=1+1",
            "'+1+1",
            "'-a",
            "'@a",
            "'\t'=a",
            "'\r=a",
            "-5.25",
            'a,"b"\nc',
            "ä=1",
            "",
            "'\uff1d1+1",
            "'\uff0b1",
            "'\uff0d1",
            "'\uff20a",
            "a;'=1+1",  # some spreadsheets split here
            "a\t'+a",
            "a;-5\t7",
            "a;b",
        ]
        assert [formulas[f"k{number}"] for number in range(len(texts))] == shown
        assert (oldest["t"], oldest["gps"], oldest["on"], oldest["off"]) == ("-4.5", '{"lat":1,"on":[true,null]}', "true", "")
        assert (newest["t"], json.loads(newest["other"])) == ("3", {"timestamp": "mine", "other": 7})
        assert all(TIME.fullmatch(line[0]) for line in lines[1:])
        async with client.session.get(f"http://127.0.0.1:{client.port}/state-history/a?format=csv") as response:
            text = await response.text()
        assert ('"a;\'=1+1"' in text, '"a;b"' in text, '"a\t\'+a"' in text) == (True, True, True)
        await client.get("/state-history/never?format=csv", 404)
        for wrong in ("limit=100001&format=csv", "limit=1001", "limit=1001&format=json", "format=xml"):
            assert "must be" in (await client.get(f"/state-history/a?{wrong}", 400))["error"]


@in_a_loop
async def test_csv_goes_through_pages_that_new_rows_do_not_shift(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amhrpd, "CSV_PAGE_ROWS", 10)
    async with gateway_on(database) as client, client.board("a") as board:
        read = client.store.history

        async def busy_read(table: Any, limit: int, **wanted: Any) -> list[amhrpd.Row]:
            rows = await read(table, limit, **wanted)
            assert len(rows) <= 10
            await say(board, "status", payload={"seq": "later"})
            return rows

        for number in range(35):
            await say(board, "status", payload={"seq": number} | ({"old": {"n": number}} if number < 5 else {}))
            await client.post("/command?device_type=none&command_name=x", {"n": number})
        await eventually(lambda: client.gateway.messages[amhrpd.Status] == 35)
        monkeypatch.setattr(client.store, "history", busy_read)
        header, *states = (await csv_of(client, "/state-history/a?format=csv&limit=33"))[0]
        assert header == ["timestamp", "seq", "other"]
        assert [state[1] for state in states] == [str(number) for number in range(34, 1, -1)]
        assert [state[2] for state in states[-3:]] == ['{"old":{"n":4}}', '{"old":{"n":3}}', '{"old":{"n":2}}']
        monkeypatch.undo()
        monkeypatch.setattr(amhrpd, "CSV_PAGE_ROWS", 10)
        header, *commands = (await csv_of(client, "/command-logs?format=csv&limit=100000&status=no_devices"))[0]
        assert header == list(amhrpd.COLUMNS["command_logs"])
        assert [command[3] for command in commands] == [f'{{"n":{number}}}' for number in range(34, -1, -1)]
        header, *events = (await csv_of(client, "/device-connection-history/a?format=csv&event=connected"))[0]
        assert header == list(amhrpd.COLUMNS["device_connection_logs"])
        assert [(event[1], event[3], list(json.loads(event[5]))) for event in events] == [("a", "connected", ["peer"])]


@in_a_loop
async def test_table_for_people_opens_in_a_spreadsheet(database: Path) -> None:
    async with gateway_on(database) as client, client.board("küche".encode().hex()) as board:
        device_id = "küche".encode().hex()
        await say(board, "status", payload={"room": "Küche", "n": 1.5})
        await eventually(lambda: state_is(client, device_id, {"room": "Küche", "n": 1.5}))
        lines, _ = await csv_of(client, f"/state-history/{device_id}?format=excel")
        moment = (await client.get(f"/state-history/{device_id}"))["states"][0]["timestamp"]
        assert lines == [["\ufefftimestamp", "room", "n", "other"], [f"{moment[:10]} {moment[11:23]}", "Küche", "1.5", ""]]
        await client.post("/command?device_type=none&command_name=x")
        (command,) = (await csv_of(client, "/command-logs?format=excel"))[0][1:]
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}", command[5])


@in_a_loop
async def test_history_with_more_rows_than_the_limit_says_so(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amhrpd, "CSV_PAGE_ROWS", 10)
    async with gateway_on(database) as client, client.board("a") as board:
        for number in range(25):
            await say(board, "status", payload={"n": number})
            await client.post("/command?device_type=none&command_name=x", {"n": number})
        await eventually(lambda: state_is(client, "a", {"n": 24}))
        for path in ("/state-history/a", "/command-logs", "/command-logs?status=no_devices"):
            for limit, more in ((1, True), (10, True), (24, True), (25, False), (26, False), (100, False)):
                for form in ("json", "csv", "excel"):
                    url = f"http://127.0.0.1:{client.port}{path}{'&' if '?' in path else '?'}limit={limit}&format={form}"
                    if form == "json" and limit > 10:
                        continue  # a page is as many as one answer may have
                    async with client.session.get(url) as response:
                        assert response.headers.get("X-AMHRPD-More") == ("true" if more else None), url
                        text = await response.text()
                    assert form == "json" or len(text.splitlines()) == 1 + min(limit, 25)
        async with client.session.get(f"http://127.0.0.1:{client.port}/device-connection-history/a") as response:
            assert "X-AMHRPD-More" not in response.headers


@in_a_loop
async def test_caller_that_gives_up_a_download_is_no_defect(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amhrpd, "CSV_PAGE_ROWS", 10)
    with logged() as events:
        async with gateway_on(database) as client, client.board("a") as board:
            for number in range(300):
                await say(board, "status", payload={"seq": number, "text": "x" * 30_000})
            await eventually(lambda: client.gateway.messages[amhrpd.Status] == 300)
            reader, writer = await asyncio.open_connection("127.0.0.1", client.port, limit=1024)
            writer.write(b"GET /state-history/a?format=csv&limit=300 HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            writer.transport.abort()
            await eventually(lambda: len(client.server.connections) <= 2)  # the board's and the session's
            assert await client.is_up()
        assert not named(events, "request_failed")


@in_a_loop
async def test_columns_of_a_download_are_bounded(database: Path) -> None:
    async with gateway_on(database) as client, client.board("a") as board:
        for number in range(40):
            await say(board, "status", payload={f"key_{number}_{n}": n for n in range(100)})
        await eventually(lambda: state_has(client, "a", "key_39_0"))
        async with client.session.get(f"http://127.0.0.1:{client.port}/state-history/a?format=csv&limit=40") as response:
            header, *_, end = (await response.text()).split("\r\n")
        assert (len(header.split(",")), end) == (1002, "")
        assert header.startswith("timestamp,key_39_0,key_39_1,")


async def state_has(client: Client, device_id: str, key: str) -> bool:
    return key in ((await client.get(f"/devices/{device_id}"))["state"] or {})


@in_a_loop
async def test_head_of_a_download_has_no_body(database: Path) -> None:
    async with gateway_on(database) as client, client.board("a") as board:
        await say(board, "status", payload={"n": 1})
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        writer.write(b"HEAD /state-history/a?format=csv HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        writer.close()


@in_a_loop
async def test_download_that_cannot_go_on_is_cut_off_visibly(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amhrpd, "CSV_PAGE_ROWS", 10)
    async with gateway_on(database) as client, client.board("a") as board:
        for number in range(20):
            await say(board, "status", payload={"seq": number, "text": "x" * 3000})
        await eventually(lambda: client.gateway.messages[amhrpd.Status] == 20)
        read = client.store.history

        async def failing_read(table: Any, limit: int, **wanted: Any) -> list[amhrpd.Row]:
            if wanted["before"] and limit > 1:  # not the look whether there are more
                raise amhrpd.GatewayError(amhrpd.Code.STORE_UNAVAILABLE, "gone")
            return await read(table, limit, **wanted)

        monkeypatch.setattr(client.store, "history", failing_read)
        with pytest.raises(aiohttp.ClientError):
            await csv_of(client, "/state-history/a?format=csv")
        assert await client.is_up()


async def figures(client: Client) -> dict[tuple[str, str], float]:
    """What `/metrics` shows, by name and label."""
    async with client.session.get(f"http://127.0.0.1:{client.port}/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=")
        families = list(text_string_to_metric_families(await response.text()))
    samples = [sample for family in families for sample in family.samples]
    return {(sample.name, ",".join(sample.labels.values())): sample.value for sample in samples}


@in_a_loop
async def test_metrics_count_what_happened(database: Path) -> None:
    async with gateway_on(database, command_timeout_s=1) as client:
        await client.post("/command?device_type=ESP32&command_name=x")
        async with client.board("good") as good, client.board("bad") as bad, client.board("mute", "other"):
            async with background(answer_commands(good), answer_commands(bad, "failure")):
                await client.post("/command?device_id=good&command_name=x&wait=5")
                await client.post("/command?device_id=good,bad&command_name=x&wait=5")
                await client.post("/command?device_type=other&command_name=x&timeout=1&wait=5")
            await say(good, "status", payload={})
            await say(good, "nonsense")
            await client.get("/nothing", 404)
            await eventually(lambda: client.gateway.messages[amhrpd.Status])
            found = await eventually(lambda: figures(client))
        await eventually(lambda: client.gateway.registry.matching(is_online=True) == [])
        after = await figures(client)
    for name, value in {
        ("amhrpd_devices_online", ""): 3,
        ("amhrpd_devices_known", ""): 3,
        ("amhrpd_connections", ""): 3,
        ("amhrpd_open_commands", ""): 0,
        ("amhrpd_messages_total", "registration"): 3,
        ("amhrpd_messages_total", "status"): 1,
        ("amhrpd_messages_total", "command_ack"): 3,
        ("amhrpd_refusals_total", "UNKNOWN_MESSAGE_TYPE"): 1,
        ("amhrpd_refusals_total", "NOT_FOUND"): 1,
        ("amhrpd_commands_total", "no_devices"): 1,
        ("amhrpd_commands_total", "ack_success"): 1,
        ("amhrpd_commands_total", "ack_error"): 1,
        ("amhrpd_commands_total", "ack_timeout"): 1,
        ("amhrpd_answer_seconds_count", ""): 2,
        ("amhrpd_answer_seconds_bucket", "1.0"): 2,
        ("amhrpd_rows_dropped_total", ""): 0,
        ("amhrpd_rows_rejected_total", ""): 0,
        ("amhrpd_database_ok", ""): 1,
    }.items():
        assert found[name] == value, name
    for positive in ("amhrpd_commit_seconds_count", "amhrpd_loop_late_seconds_count", "amhrpd_database_bytes"):
        assert found[positive, ""] > 0
    for positive in (
        "amhrpd_disk_free_bytes",
        "process_resident_memory_bytes",
        "process_cpu_seconds_total",
        "process_open_fds",
    ):
        assert found[positive, ""] > 0
    assert ("amhrpd_rows_waiting", "") in found
    assert (after["amhrpd_devices_online", ""], after["amhrpd_devices_known", ""]) == (0, 3)


@in_a_loop
async def test_figures_are_all_there_from_the_start(database: Path) -> None:
    """Also where the unit hides /proc/stat (`ProcSubset=pid`)."""
    hidden = "import builtins, sys; real = builtins.open\n"
    hidden += "def veiled(file, *args, **kwargs):\n    if str(file) == '/proc/stat': raise FileNotFoundError(file)\n"
    hidden += "    return real(file, *args, **kwargs)\n"
    hidden += f"builtins.open = veiled; sys.path.insert(0, {str(HERE)!r}); import amhrpd; sys.exit(amhrpd.main([]))"
    async with process_on(database, code=hidden, is_fresh=True) as (_, client):
        found = await figures(client)
    assert {label for name, label in found if name == "amhrpd_refusals_total"} == {code.name for code in amhrpd.Code}
    assert {label for name, label in found if name == "amhrpd_messages_total"} == set(amhrpd.BOARD_MESSAGES)
    ends = {label: value for (name, label), value in found.items() if name == "amhrpd_commands_total"}
    assert ends == {"no_devices": 0, "ack_success": 0, "ack_error": 0, "ack_timeout": 0}
    for positive in ("resident_memory_bytes", "virtual_memory_bytes", "cpu_seconds_total", "open_fds"):
        assert found[f"process_{positive}", ""] > 0


@in_a_loop
async def test_health_knows_the_size_of_the_file_and_what_is_free(database: Path) -> None:
    async with gateway_on(database) as client:
        await client.post("/command?device_type=none&command_name=x")
        log = database.with_name("amhrpd.db-wal")  # where the latest rows are

        def is_of_both() -> Any:
            return row_has(client, "/health", database_bytes=database.stat().st_size + log.stat().st_size)

        health = await eventually(is_of_both)
        assert abs(health["disk_free_bytes"] - shutil.disk_usage(database.parent).free) < 1 << 30


@in_a_loop
async def test_openapi_describes_every_route_for_callers(database: Path) -> None:
    async with gateway_on(database) as client, client.board("a") as board:
        document = await client.get("/openapi.json")
        assert document["openapi"] == "3.1.0"
        assert document["security"] == [{}, {"bearer": []}, {"basic": []}]
        described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
        served = {(route.method, route.resource.canonical) for route in client.runner.app.router.routes() if route.resource}
        served = {(method, path) for method, path in served if path == "/" or not path.endswith("/")}
        for_people_and_boards = {"/", "/ws/{device_id}"}
        assert described == {(method, path) for method, path in served if method != "HEAD" and not path.startswith("/api")} - {
            ("GET", path) for path in for_people_and_boards
        }
        parameters = {p["name"]: p["schema"] for p in document["paths"]["/state-history/{device_id}"]["get"]["parameters"]}
        assert set(parameters) == {"device_id", "limit", "since", "until", "before_id", "format"}
        assert (parameters["limit"]["minimum"], parameters["limit"]["maximum"]) == (1, 1000)
        schemas = document["components"]["schemas"]
        assert schemas["CommandRequest"]["required"] == ["command_name"]
        assert "alerts" not in schemas["Command"]["properties"]
        await say(board, "status", payload={"t": 1})
        command = await client.post("/command?device_type=ESP32&command_name=x")
        for path, name in {
            "/devices/a": "Device",
            "/state-history/a": "StateHistory",
            "/device-connection-history/a": "ConnectionHistory",
            "/command-logs": "CommandLogs",
            f"/command-logs/{command['command_id']}": "CommandLog",
            "/devices": "Devices",
        }.items():
            assert set(await client.get(path)) == set(schemas[name]["required"]), path
        assert set(command) == set(schemas["Command"]["required"])
    references = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document)))
    assert references <= set(schemas)


@in_a_loop
async def test_what_is_for_other_programs_wants_the_token(database: Path) -> None:
    async with gateway_on(database, api_token="secret-token") as client:
        for path in ("/metrics", "/openapi.json", "/command-logs?format=csv"):
            assert (await client.get(path, 401))["error_code"] == "UNAUTHORIZED"
            headers = {"Authorization": "Bearer secret-token"}
            async with client.session.get(f"http://127.0.0.1:{client.port}{path}", headers=headers) as response:
                assert response.status == 200


# ======================================================================================================================
# Contract, section 7: the database
# ======================================================================================================================


def make_legacy_database(path: Path) -> None:
    """A file as the earlier backend left it: its DDL and indexes, journal mode delete, and what its crashes left over."""
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.executescript(
            """
            CREATE TABLE devices (device_id VARCHAR(255) NOT NULL, device_type VARCHAR(50), is_online BOOLEAN,
              last_heartbeat DATETIME, connected_at DATETIME, disconnected_at DATETIME, metadata_json JSON,
              PRIMARY KEY (device_id));
            CREATE INDEX ix_devices_device_id ON devices (device_id);
            CREATE INDEX ix_devices_is_online ON devices (is_online);
            CREATE TABLE device_state_snapshots (id INTEGER NOT NULL, device_id VARCHAR(255), device_type VARCHAR(50),
              state_data JSON, timestamp DATETIME, PRIMARY KEY (id), FOREIGN KEY(device_id) REFERENCES devices (device_id));
            CREATE INDEX ix_device_state_snapshots_device_id ON device_state_snapshots (device_id);
            CREATE INDEX ix_device_state_snapshots_timestamp ON device_state_snapshots (timestamp);
            CREATE TABLE command_logs (command_id VARCHAR(255) NOT NULL, device_type VARCHAR(50), command_name VARCHAR(255),
              payload JSON, status VARCHAR(50), created_at DATETIME, executed_at DATETIME, completed_at DATETIME,
              response_data JSON, target_device_count INTEGER, success_count INTEGER, PRIMARY KEY (command_id));
            CREATE INDEX ix_command_logs_status ON command_logs (status);
            CREATE INDEX my_own_index ON command_logs (command_name);
            CREATE TABLE device_connection_logs (id INTEGER NOT NULL, device_id VARCHAR(255), device_type VARCHAR(50),
              event VARCHAR(50), timestamp DATETIME, details JSON, PRIMARY KEY (id),
              FOREIGN KEY(device_id) REFERENCES devices (device_id));
            """
        )
        t = "2025-06-01 10:30:45.123456"
        db.executemany(
            "INSERT INTO devices VALUES (?,?,?,?,?,?,?)",
            [
                ("left_online", "ESP32-CAM", 1, t, t, None, '{"fw": "1", "nan": NaN}'),
                ("offline", "esp32s3cam", 0, None, t, t, "{}"),
                ("odd", "Esp32", 0, t, t, None, None),
                ("strange", "?", 0, "", 5.5, "2025-06-01T12:30:45+02:00", b'{"blob": "\xff"}'),
            ],
        )
        db.execute("UPDATE devices SET device_type = CAST(x'455350ff' AS TEXT) WHERE device_id = 'strange'")
        db.execute("INSERT INTO device_state_snapshots VALUES (1000, 'strange', NULL, 7, 'long ago')")
        db.execute("INSERT INTO device_connection_logs VALUES (1000, 'strange', 'x', 'disconnected', '', x'00ff')")
        states = ['{"a": 1}', '{"v": NaN, "w": Infinity, "x": 1e999}', '{"s": "\\ud800"}', "not json", "null"]
        db.executemany(
            "INSERT INTO device_state_snapshots (device_id, device_type, state_data, timestamp) VALUES (?,?,?,?)",
            [("left_online", "ESP32-CAM", state, t) for state in states],
        )
        db.executemany(
            "INSERT INTO command_logs VALUES (?,?,?,?,?,?,?,?,?,?,?)",
            [
                ("old-created", "ESP32", "reboot", "{}", "created", t, None, None, None, 2, 0),
                ("old-success", "ESP32", "reboot", "{}", "ack_success", t, t, t, '{"status": "success"}', 2, 1),
                ("young-sent", "ESP32-CAM", "go", "{}", "sent", str(amhrpd.utc_now()), t, None, "null", 1, 0),
                (
                    "flat",
                    "ESP32-CAM",
                    "go",
                    "{}",
                    "sent",
                    str(amhrpd.utc_now()),
                    t,
                    None,
                    '{"status": "success", "n": 1}',
                    1,
                    0,
                ),
                ("strange-sent", "x", "go", None, "sent", "", 5, "?", b"\xff", None, None),
            ],
        )
        db.executemany(
            "INSERT INTO device_connection_logs (device_id, device_type, event, timestamp, details) VALUES (?,?,?,?,?)",
            [
                ("left_online", "ESP32-CAM", "connected", t, None),
                ("left_online", "ESP32-CAM", "connected", t, "null"),
                ("offline", "esp32s3cam", "connected", t, "{}"),
                ("offline", "esp32s3cam", "disconnected", t, '{"reason": "x"}'),
            ],
        )


@in_a_loop
async def test_database_of_the_earlier_backend_opens_goes_on_and_loses_nothing(database: Path) -> None:
    make_legacy_database(database)
    async with gateway_on(database, command_timeout_s=1) as client:
        devices = {device["device_id"]: device for device in (await client.get("/devices"))["devices"]}
        assert [device["is_online"] for device in devices.values()] == [False] * 4
        assert devices["strange"]["device_type"] == "ESP\ufffd"
        assert devices["strange"]["metadata"] == {"blob": "\ufffd"}
        assert devices["strange"]["last_heartbeat"] is None
        assert devices["strange"]["disconnected_at"] == "2025-06-01T10:30:45.000000"
        (snapshot,) = (await client.get("/state-history/strange"))["states"]
        assert (snapshot["state_data"], snapshot["timestamp"]) == (7, None)
        (event,) = (await client.get("/device-connection-history/strange"))["events"]
        assert (event["details"], event["timestamp"]) == ("\x00\ufffd", None)
        strange = await client.get("/command-logs/strange-sent")
        assert (strange["created_at"], strange["completed_at"], strange["response_data"]) == (None, None, "\ufffd")
        assert (await client.get("/command-logs"))["total"] == 5
        assert devices["left_online"]["metadata"] == {"fw": "1", "nan": None}
        assert devices["odd"]["metadata"] == {}
        assert devices["offline"]["last_heartbeat"] is None
        states = (await client.get("/state-history/left_online"))["states"]
        assert [s["state_data"] for s in states] == [None, "not json", {"s": "?"}, {"v": None, "w": None, "x": None}, {"a": 1}]
        events = (await client.get("/device-connection-history/left_online"))["events"]
        assert [event["event"] for event in events] == ["disconnected", "connected", "connected"]
        assert "reason" in events[0]["details"]
        assert events[2]["details"] is None
        assert await client.events("offline") == ["connected", "disconnected"]
        await eventually(lambda: row_has(client, "/command-logs/old-created", status="ack_timeout"))
        assert (await client.get("/command-logs/old-success"))["response_data"] == {"status": "success"}
        async with client.board("left_online", "ESP32-CAM") as board:
            await say(board, "command_ack", command_id="young-sent")
            await say(board, "status", payload={"new": True})
            await eventually(lambda: row_has(client, "/command-logs/young-sent", status="ack_success", success_count=1))
            await say(board, "command_ack", command_id="flat")
            flat = await eventually(lambda: row_has(client, "/command-logs/flat", status="ack_success", success_count=1))
            assert flat["response_data"].keys() == {"status", "n", "left_online"}  # nothing of the earlier backend's is lost
            assert (await client.get("/state-history/left_online?limit=1"))["states"][0]["state_data"] == {"new": True}
    assert rows_of(database, "SELECT count(*) FROM device_state_snapshots") == [(7,)]
    assert rows_of(database, "SELECT count(*) FROM command_logs") == [(5,)]
    assert rows_of(database, "SELECT count(*) FROM devices") == [(4,)]
    assert rows_of(database, "PRAGMA integrity_check") == [("ok",)]
    assert rows_of(database, "PRAGMA foreign_key_check") == []
    assert rows_of(database, "SELECT count(*) FROM sqlite_master WHERE name = 'my_own_index'") == [(1,)]


@in_a_loop
async def test_tables_are_the_contracts(database: Path) -> None:
    async with gateway_on(database) as client, client.board("a") as board:
        await say(board, "status", payload={"a": 1})
        await client.post("/command?device_type=none&command_name=x")
        await eventually(lambda: state_is(client, "a", {"a": 1}))
        await client.get("/state-history/a")
        columns = {
            table: [(name, kind, key) for _, name, kind, _, _, key in client.rows(f"PRAGMA table_info({table})")]
            for (table,) in client.rows("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
        }
        text255, text50, moment = "VARCHAR(255)", "VARCHAR(50)", "DATETIME"
        assert columns == {
            "command_logs": [
                ("command_id", text255, 1),
                ("device_type", text50, 0),
                ("command_name", text255, 0),
                ("payload", "JSON", 0),
                ("status", text50, 0),
                ("created_at", moment, 0),
                ("executed_at", moment, 0),
                ("completed_at", moment, 0),
                ("response_data", "JSON", 0),
                ("target_device_count", "INTEGER", 0),
                ("success_count", "INTEGER", 0),
            ],
            "device_connection_logs": [
                ("id", "INTEGER", 1),
                ("device_id", text255, 0),
                ("device_type", text50, 0),
                ("event", text50, 0),
                ("timestamp", moment, 0),
                ("details", "JSON", 0),
            ],
            "device_state_snapshots": [
                ("id", "INTEGER", 1),
                ("device_id", text255, 0),
                ("device_type", text50, 0),
                ("state_data", "JSON", 0),
                ("timestamp", moment, 0),
            ],
            "devices": [
                ("device_id", text255, 1),
                ("device_type", text50, 0),
                ("is_online", "BOOLEAN", 0),
                ("last_heartbeat", moment, 0),
                ("connected_at", moment, 0),
                ("disconnected_at", moment, 0),
                ("metadata_json", "JSON", 0),
            ],
            "amhrpd_deadmen": [("device_id", text255, 1), ("command_name", text255, 0), ("payload", "JSON", 0)],
        }
        for table in ("device_state_snapshots", "device_connection_logs"):
            assert [row[2:5] for row in client.rows(f"PRAGMA foreign_key_list({table})")] == [
                ("devices", "device_id", "device_id")
            ]
        ((state, stamp),) = client.rows("SELECT state_data, timestamp FROM device_state_snapshots")
        assert state == '{"a":1}'
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}", stamp)
        assert client.rows("SELECT is_online, disconnected_at, metadata_json FROM devices") == [(1, None, "{}")]
        assert client.rows("SELECT response_data IS NULL FROM command_logs") == [(1,)]
        assert client.rows("PRAGMA journal_mode") == [("wal",)]
    for interval_s, synchronous in ((5, 1), (0, 2)):  # of whoever writes: NORMAL and FULL
        async with gateway_on(database, sync_interval_s=interval_s) as client:
            with executed() as statements:
                await client.post("/command?device_type=none&command_name=x")
                (connection,) = {each.connection for each in statements if each.thread.startswith("store-writer")}
                assert connection.execute("PRAGMA foreign_keys").fetchone() == (1,)
                assert connection.execute("PRAGMA synchronous").fetchone() == (synchronous,)


@dataclasses.dataclass(frozen=True)
class Executed:
    """A statement that the daemon gave to SQLite."""

    sql: str
    thread: str
    connection: sqlite3.Connection


@contextlib.contextmanager
def executed() -> Iterator[list[Executed]]:
    """What is given to SQLite meanwhile: questions, and what is written, rows included."""
    statements: list[Executed] = []

    def note(connection: sa.Connection, cursor: Any, sql: str, *_: Any) -> None:
        statements.append(Executed(sql, threading.current_thread().name, cursor.connection))

    @contextlib.contextmanager
    def transaction(file: amhrpd.Database) -> Iterator[sqlite3.Connection]:
        with real_transaction(file) as connection:
            connection.set_trace_callback(
                lambda sql: statements.append(Executed(sql, threading.current_thread().name, connection))
            )
            yield connection
        connection.set_trace_callback(None)

    real_transaction = amhrpd.Database.transaction
    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(amhrpd.Database, "transaction", transaction)
            yield statements
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)


@in_a_loop
async def test_every_question_goes_by_the_index_with_its_filters_and_the_time(database: Path) -> None:
    async with gateway_on(database) as client, client.board("a") as board:
        await say(board, "status", payload={})
        command = (await client.post("/command?device_id=a&command_name=x"))["command_id"]
        await client.get("/state-history/a")
        used = set[str]()
        for path, before, time, index in (
            ("/state-history/a", "1", "timestamp", "snapshots_device_time"),
            ("/device-connection-history/a", "1", "timestamp", "events_device_time"),
            ("/device-connection-history/a?event=connected", "1", "timestamp", "events_device_event_time"),
            ("/command-logs", command, "created_at", "commands_time"),
            ("/command-logs?status=sent", command, "created_at", "commands_status_time"),
            ("/command-logs?device_type=ESP32", command, "created_at", "commands_type_time"),
            ("/command-logs?status=sent&device_type=ESP32", command, "created_at", "commands_type_status_time"),
        ):
            for wanted in (
                "",
                "since=2026-01-01&until=2027-01-01",
                f"before_id={before}",
                f"until=2027-01-01&before_id={before}",
            ):
                with executed() as statements:
                    await client.get(f"{path}{'&' if '?' in path else '?'}{wanted}")
                sql = next(each.sql for each in statements if f"ORDER BY {time} DESC, rowid DESC" in each.sql)
                plan = " / ".join(row[3] for row in client.rows("EXPLAIN QUERY PLAN " + sql.replace("?", "1")))
                assert f"USING INDEX ix_amhrpd_{index}" in plan, (sql, plan)
                assert "TEMP B-TREE" not in plan, (sql, plan)
                assert ("<" in plan) == (wanted != ""), (sql, plan)
            used.add(f"ix_amhrpd_{index}")
        ours = {name for (name,) in client.rows("SELECT name FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL")}
        assert ours == used == amhrpd.INDEXES.keys()


@in_a_loop
async def test_times_find_their_rows_whatever_the_clock_did(database: Path) -> None:
    """Also in a file that others wrote: what is answered is what a look at every row finds."""
    chance = random.Random(3)
    moment = datetime(2026, 5, 1, 0, 0, 0, 500_000)
    await fill(database, 1)
    with contextlib.closing(sqlite3.connect(database)) as db, db:
        for number in range(300):
            moment += timedelta(hours=chance.choice([0, 1] * 10 + [-200, 300]))
            time = chance.choice([str(moment)] * 30 + ["", 5.5, b"2026", "never"])
            event, status = chance.choice(["connected", "timeout"]), chance.choice(["ack_success", "ack_error"])
            db.execute("INSERT INTO device_state_snapshots VALUES (NULL,'a','x','{}',?)", (time,))
            db.execute("INSERT INTO device_connection_logs VALUES (NULL,'a','x',?,?,NULL)", (event, time))
            command = (str(number), chance.choice("ab"), status, time)
            db.execute("INSERT INTO command_logs VALUES (?,?,'x','{}',?,?,NULL,NULL,NULL,1,0)", command)
    histories: list[tuple[amhrpd.TableName, str, str, dict[str, str]]] = [
        ("device_state_snapshots", "timestamp", "/state-history/a", {}),
        ("device_connection_logs", "timestamp", "/device-connection-history/a", {"event": "timeout"}),
        ("command_logs", "created_at", "/command-logs", {"status": "ack_error", "device_type": "a"}),
    ]
    async with gateway_on(database) as client:
        for _ in range(200):
            table, time, path, filters = chance.choice(histories)
            key = next(iter(amhrpd.COLUMNS[table]))
            wanted: dict[str, Any] = {name: value for name, value in filters.items() if chance.random() < 0.5}
            conditions = [f"{name} = :{name}" for name in wanted]
            for name, comparison in (("since", ">="), ("until", "<=")):
                if chance.random() < 0.5:
                    wanted[name] = str(
                        datetime(2026, 4, 20) + timedelta(hours=chance.randrange(1200)) * chance.choice([0, 1, 1])
                    )
                    conditions.append(f"{time} {comparison} :{name}")
            if chance.random() < 0.3:
                ((before,),) = client.rows(f"SELECT {key} FROM {table} LIMIT 1 OFFSET {chance.randrange(300)}")
                wanted["before_id"] = before
                conditions.append(f"({time}, rowid) < (SELECT {time}, rowid FROM {table} WHERE {key} = :before_id)")
            wanted["limit"] = chance.choice([3, 1000])
            answer = await client.get(path, params=wanted)
            where = " AND ".join(["true", *conditions])
            sql = f"SELECT {key} FROM {table} NOT INDEXED WHERE {where} ORDER BY {time} DESC, rowid DESC LIMIT :limit"
            with contextlib.closing(sqlite3.connect(database)) as db:
                expected = [found for (found,) in db.execute(sql, wanted)]
            (rows,) = (rows for rows in answer.values() if isinstance(rows, list))
            assert [row[key] for row in rows] == expected, (sql, wanted)


def make_long_database(path: Path, rows: int) -> None:
    """A file of the version before, that has a history of each kind, of two boards of which one is quiet."""
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("PRAGMA user_version = 1")
        for table in amhrpd.TABLES.keys() - {"amhrpd_deadmen"}:
            db.execute(f"CREATE TABLE {table} ({amhrpd.TABLES[table]})")
        db.execute("CREATE INDEX ix_amhrpd_commands_type ON command_logs (device_type)")
        db.execute("CREATE INDEX ix_command_logs_status ON command_logs (status)")
        db.execute("CREATE INDEX my_own ON command_logs (status)")
        t = "2026-01-01 00:00:00.000000"
        db.executemany("INSERT INTO devices VALUES (?,'ESP32',0,?,?,?,'{}')", [(name, t, t, t) for name in ("busy", "quiet")])
        numbers = f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {rows})"
        time = "strftime('%Y-%m-%d %H:%M:%f000', 1.75e9 + i, 'unixepoch')"
        of_type = "iif(i % 2, 'A', 'B'), 'x', '{}', iif(i % 2, 'ack_success', 'ack_error')"
        db.execute(f"{numbers} INSERT INTO device_state_snapshots SELECT i, 'busy', 'ESP32', '{{}}', {time} FROM n")
        db.execute(f"{numbers} INSERT INTO device_connection_logs SELECT i, 'busy', 'x', 'connected', {time}, NULL FROM n")
        db.execute(f"{numbers} INSERT INTO command_logs SELECT i, {of_type}, {time}, NULL, NULL, NULL, 1, 1 FROM n")


def indexes(database: Path) -> set[str]:
    return {name for (name,) in rows_of(database, "SELECT name FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL")}


@in_a_loop
async def test_file_of_the_version_before_gets_its_indexes_at_the_start(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amhrpd.Database, "PROGRESS_STEPS", 100)  # of a file whose start takes no time there is nothing to tell
    make_long_database(database, 1000)
    settings = amhrpd.Settings(database_url=f"sqlite:///{database}")
    steps: list[str] = []
    for number in range(2):
        store = amhrpd.Store(settings)
        with executed() as statements:
            await store.open(lambda _: None, steps.append, asyncio.Event())
        made = [each.sql for each in statements if "INDEX" in each.sql.upper().split()[:2]]
        assert indexes(database) == amhrpd.INDEXES.keys() | {"my_own"}
        assert await store.close(5)
        if number == 0:
            told = [next(at for at, step in enumerate(steps) if name in step) for name in amhrpd.INDEXES]
            assert told == sorted(told)  # one after the other, each before it is made
            assert [sql.split()[0] for sql in made] == ["DROP"] * 2 + ["CREATE"] * len(amhrpd.INDEXES)
            steps.clear()
    assert (made, steps) == ([], [])  # nothing to do


@in_a_loop
async def test_stop_waits_for_no_index_that_is_made(database: Path) -> None:
    make_long_database(database, 100_000)
    code = "import os, signal; tell = amhrpd.tell_progress; amhrpd.Database.PROGRESS_STEPS = 1000\n"
    code += "amhrpd.tell_progress = lambda text: (tell(text), 'making' in text and os.kill(os.getpid(), signal.SIGTERM))\n"
    code += "amhrpd.main([])"
    process = Process(database, free_port(), {}, code)
    assert await process.exit_code() == 0
    assert len(indexes(database) & amhrpd.INDEXES.keys()) < len(amhrpd.INDEXES)
    async with gateway_on(database) as client:
        assert (await client.get("/state-history/busy?limit=1"))["total"] == 1
    assert amhrpd.INDEXES.keys() <= indexes(database)


@in_a_loop
async def test_no_question_takes_longer_for_a_long_history_from_the_first_moment(database: Path) -> None:
    make_long_database(database, 200_000)
    async with gateway_on(database) as client:
        for path in (
            "/command-logs?status=ack_success&device_type=B",
            "/command-logs?until=2020-01-01",
            "/command-logs?since=2030-01-01&status=ack_error",
            "/command-logs?since=2025-06-16&until=2025-06-16T00:00:01&device_type=C",
            "/state-history/busy?until=2020-01-01",
            "/state-history/busy?since=2030-01-01&before_id=200000",
            "/state-history/quiet?since=2020-01-01",
            "/device-connection-history/busy?event=timeout",
            "/device-connection-history/busy?event=disconnected&until=2026-01-01",
        ):
            times_s = []
            for _ in range(5):
                began_s = time.perf_counter()
                assert (await client.get(path))["total"] == 0
                times_s.append(time.perf_counter() - began_s)
            assert min(times_s) < 0.01, path


@in_a_loop
async def test_live_answers_never_touch_the_database(database: Path) -> None:
    async with gateway_on(database) as client, client.board("a"):
        await client.get("/command-logs")  # nothing waits any more
        with executed() as statements:
            for path in ("/health", "/devices", "/devices/a"):
                await client.get(path)
            assert of_callers(statements) == []
            await client.get("/command-logs")
            assert of_callers(statements) != []


def of_callers(statements: Sequence[Executed]) -> list[str]:
    """What was read."""
    return [each.sql for each in statements if each.thread.startswith("store-reader")]


# ======================================================================================================================
# Contract, section 8: events
# ======================================================================================================================


@dataclasses.dataclass(frozen=True)
class Heard:
    id: str
    event: str
    data: Any


class Stream:
    """Somebody who listens to `GET /events`."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.comments = 0
        self.last_id = ""

    async def next(self, *names: str) -> Heard:
        """The next event, or the next of these names. Raises EOFError at the stream's end."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                fields: dict[str, str] = {}
                while line := (await self.response.content.readline()).decode():
                    if line == "\n":
                        break
                    name, _, value = line.rstrip("\r\n").partition(": ")
                    self.comments += line.startswith(":")
                    fields[name] = value
                if not line:
                    raise EOFError
                self.last_id = fields.get("id", self.last_id)
                if "data" in fields and (not names or fields["event"] in names):
                    return Heard(fields.get("id", ""), fields["event"], json.loads(fields["data"]))

    async def until_end(self) -> list[Heard]:
        """What still comes, to the stream's end."""
        heard = []
        with contextlib.suppress(EOFError):
            while True:
                heard.append(await self.next())
        return heard


@contextlib.asynccontextmanager
async def listening(client: Client, query: str = "", **headers: str) -> AsyncIterator[Stream]:
    """A stream whose listener is known to the gateway already."""
    url = f"http://127.0.0.1:{client.port}/events{query}"
    async with client.session.get(url, headers=headers) as response:
        assert response.status == 200, await response.text()
        assert response.content_type == "text/event-stream"
        yield Stream(response)


@in_a_loop
async def test_events_tell_what_happens_as_it_happens(database: Path) -> None:
    async with gateway_on(database) as client, listening(client) as stream:
        async with client.board("servo_1", metadata={"firmware_version": "2.0.0"}) as board:
            heard = await stream.next()
            shown = await client.get("/devices/servo_1")
            assert (heard.event, heard.data) == ("device", shown | {"last_heartbeat": heard.data["last_heartbeat"]})
            assert heard.data["metadata"] == {"firmware_version": "2.0.0"}
            await say(board, "status", payload={"temperature": 21.5})
            heard = await stream.next()
            assert (heard.event, heard.data["state"]) == ("state", {"temperature": 21.5})
            assert list(heard.data) == ["device_id", "device_type", "state", "timestamp"]
            await say(board, "alert", alert_type="obstacle", message="wall")
            heard = await stream.next()
            assert heard.event == "alert"
            assert heard.data == {"device_id": "servo_1", "device_type": "ESP32", **await alert_of(client, "servo_1")}
            command = await client.post("/command", {"device_type": "*", "command_name": "blink"})
            sent = await stream.next()
            assert (sent.event, sent.data["command_id"], sent.data["status"]) == ("command", command["command_id"], "sent")
            await say(board, "command_ack", command_id=command["command_id"])
            assert (await stream.next()).data == await client.get(f"/command-logs/{command['command_id']}")
        assert (await stream.next("device")).data["is_online"] is False
        await client.post("/command", {"device_id": "servo_1", "command_name": "blink"})
        assert (await stream.next()).data["status"] == "no_devices"
        assert (await client.ask("DELETE", "/devices/servo_1"))[0] == 200
        heard = await stream.next("device")
        assert heard.data == {"device_id": "servo_1", "deleted": True}
        assert re.fullmatch(r"[0-9a-f]+-[0-9]+", heard.id)


async def alert_of(client: Client, device_id: str) -> Any:
    return (await client.get(f"/devices/{device_id}"))["alert"]


@in_a_loop
async def test_events_are_narrowed_by_device_event_and_type(database: Path) -> None:
    async with (
        gateway_on(database) as client,
        listening(client, "?device_id=a,b&event=state,command") as by_id,
        listening(client, "?device_type=ESP32-CAM") as by_type,
        client.board("a") as a,
        client.board("c", "ESP32-CAM") as c,
    ):
        assert (await by_type.next()).data["device_id"] == "c"
        await say(c, "status", payload={"n": 1})
        await say(a, "status", payload={"n": 2})
        assert (await by_id.next()).data["state"] == {"n": 2}
        assert (await by_type.next()).data["state"] == {"n": 1}
        await client.post("/command", {"device_id": "c", "command_name": "for_c"})
        await client.post("/command", {"device_type": "*", "command_name": "for_all"})
        assert (await by_id.next()).data["command_name"] == "for_all"
        assert [(await by_type.next()).data["command_name"] for _ in range(2)] == ["for_c", "for_all"]
        for query in ("?event=reset", "?device_id=a,,b", "?device=a", "?alive=2", f"?device_id={'a,' * 1000}a"):
            await client.get(f"/events{query}", 400)
        async with listening(client, f"?alive=1&event=alert&device_id={'x,' * 999}a") as by_many:
            await say(a, "alert", alert_type="obstacle", message="wall")
            assert (await by_many.next("alert")).data["message"] == "wall"


@in_a_loop
async def test_listener_hears_of_a_command_that_found_its_board_offline(database: Path) -> None:
    async with gateway_on(database) as client:
        async with client.board("a"):
            pass
        await eventually(lambda: not_online(client, "a"))
        async with listening(client, "?device_id=a&event=command") as stream:
            await client.post("/command?device_id=a&command_name=x")
            assert (await stream.next("command")).data["status"] == "no_devices"


@in_a_loop
async def test_states_come_ten_times_a_second_and_the_latest_wins(database: Path) -> None:
    async with gateway_on(database) as client, client.board("fast") as board, listening(client, "?event=state") as stream:
        began_s = time.monotonic()
        for number in range(100):
            await say(board, "status", payload={"n": number})
            await asyncio.sleep(0.003)
        heard = [await stream.next()]
        while heard[-1].data["state"]["n"] != 99:
            heard.append(await stream.next())
        assert len(heard) <= (time.monotonic() - began_s) * 10 + 2
        assert heard[0].data["state"] == {"n": 0}
        assert (await client.get("/state-history/fast?limit=1000"))["total"] == 100


@in_a_loop
async def test_listener_that_comes_back_goes_on_without_a_gap(database: Path) -> None:
    async with gateway_on(database) as client, client.board("servo_1") as board, listening(client) as other:
        async with listening(client) as stream:
            await say(board, "alert", alert_type="n", message="0")
            assert (await stream.next("alert")).data["message"] == "0"
        for number in range(1, 20):
            await say(board, "alert", alert_type="n", message=str(number))
        await eventually(lambda: alert_says(client, "servo_1", "19"))
        came = stream.last_id
        for query, headers in ((f"?last_event_id={came}", {}), ("?last_event_id=old", {"Last-Event-ID": came})):
            async with listening(client, query, **headers) as stream:
                assert [(await stream.next("alert")).data["message"] for _ in range(19)] == [str(n) for n in range(1, 20)]
        for number in range(1200):
            await say(board, "alert", alert_type="n", message=str(number))
            await other.next("alert")
        for unknown in (stream.last_id, "another-1", "nonsense", stream.last_id.partition("-")[0] + "-" + "9" * 3000):
            async with listening(client, **{"Last-Event-ID": unknown}) as stream:
                assert (await stream.next()).event == "reset"
                await say(board, "alert", alert_type="n", message="news")
                assert (await stream.next()).data["message"] == "news"


async def alert_says(client: Client, device_id: str, message: str) -> bool:
    alert = await alert_of(client, device_id)
    return alert is not None and alert["message"] == message


@in_a_loop
async def test_nothing_is_told_while_nobody_listens(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    record = amhrpd.Device.state_record

    def watched(device: amhrpd.Device) -> dict[str, Any]:
        asked.append(device.device_id)
        return record(device)

    monkeypatch.setattr(amhrpd.Events, "REPEAT_S", 0.0)
    monkeypatch.setattr(amhrpd.Device, "state_record", watched)
    async with gateway_on(database) as client, client.board("servo_1") as board:
        async with listening(client) as stream:
            await say(board, "status", payload={})
            await stream.next("state")
        assert asked

        async def is_told_nothing() -> bool:
            asked.clear()
            await say(board, "status", payload={})
            await say(board, "nonsense")
            await hear(board, "error")
            return not asked

        await eventually(is_told_nothing)  # a listener's leaving is noticed with the next event
        async with listening(client, **{"Last-Event-ID": stream.last_id}) as stream:
            assert (await stream.next()).event == "reset"


@in_a_loop
async def test_listener_that_reads_nothing_is_cut_off_and_costs_nobody_anything(database: Path) -> None:
    async with gateway_on(database) as client, client.board("servo_1") as board, listening(client) as stream:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port, limit=1024)
        writer.write(b"GET /events HTTP/1.1\r\nHost: pi\r\n\r\n")
        await reader.readuntil(b"id:")

        for batch in range(60):
            for number in range(batch * 100, batch * 100 + 100):
                await say(board, "alert", alert_type="x" * 200, message=f"{number} " + "y" * 900)
            numbers = [int((await stream.next("alert")).data["message"].split()[0]) for _ in range(100)]
            assert numbers == list(range(batch * 100, batch * 100 + 100))
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            while True:
                await reader.readexactly(1 << 16)
        writer.close()


@in_a_loop
async def test_listener_that_is_overrun_is_cut_off_without_a_traceback(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amhrpd.Events, "MAX_EVENTS", 3)
    async with gateway_on(database) as client, client.board("servo_1") as board, listening(client) as stream:
        with logged() as events:
            async with background(*(say(board, "alert", alert_type="n", message=str(number)) for number in range(50))):
                with pytest.raises((EOFError, aiohttp.ClientError)):
                    while True:
                        await stream.next()
            await eventually(lambda: alert_says(client, "servo_1", "49"))
            await asyncio.sleep(amhrpd.Events.PAUSE_S * 2)
        assert not named(events, "request_failed")


@in_a_loop
async def test_sixty_five_do_not_listen_at_once(database: Path) -> None:
    async with gateway_on(database) as client, contextlib.AsyncExitStack() as stack:
        for _ in range(64):
            await stack.enter_async_context(listening(client))
        assert (await client.get("/events", 429))["error_code"] == "RESOURCE_EXHAUSTED"


@in_a_loop
async def test_silence_is_broken_by_a_comment(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amhrpd.Events, "SILENCE_S", 0.1)
    async with gateway_on(database) as client, listening(client) as stream:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await stream.next()
        assert 2 <= stream.comments <= 5


@in_a_loop
async def test_who_left_makes_room_though_nothing_happens(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amhrpd.Events, "SILENCE_S", 0.1)
    monkeypatch.setattr(amhrpd.Events, "MAX_LISTENERS", 1)
    async with gateway_on(database) as client:
        async with listening(client, "?event=alert"):
            await client.get("/events", 429)

        async def has_room() -> bool:
            async with client.session.get(f"http://127.0.0.1:{client.port}/events") as response:
                return response.status == 200

        await eventually(has_room)


@in_a_loop
async def test_scripts_see_that_the_gateway_is_alive(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beside other events."""
    monkeypatch.setattr(amhrpd.Events, "ALIVE_S", 0.2)
    async with gateway_on(database) as client, client.board("a") as board:

        async def report() -> None:
            while True:
                await say(board, "alert", alert_type="n", message="beside")
                await asyncio.sleep(0.02)

        async with listening(client, "?alive=1") as stream, background(report()):
            heard_s: list[float] = []
            for _ in range(4):
                (timestamp,) = (await stream.next("alive")).data.values()
                assert TIME.fullmatch(timestamp)
                heard_s.append(time.monotonic())
            assert all(0.1 < after - before < 0.5 for before, after in itertools.pairwise(heard_s))


@in_a_loop
async def test_stop_tells_what_it_does_and_ends_the_streams_in_order(database: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(gateway_on(database))
        async with client.session.get(f"http://127.0.0.1:{client.port}/events") as response:
            stream = Stream(response)
            async with client.board("servo_1"):
                reading = asyncio.create_task(stream.until_end())
                began_s = time.monotonic()
                stopping = asyncio.create_task(client.gateway.stop())
                heard = await reading
                assert time.monotonic() - began_s < 1
                await stopping
            assert heard[-1].data["is_online"] is False
        assert (await client.get("/events", 503))["error_code"] == "STOPPING"


# ======================================================================================================================
# Contract, section 9: many gateways, one broker
# ======================================================================================================================


class Mosquitto:
    """A real broker, on a port of its own, that keeps nothing over a restart."""

    def __init__(self, folder: Path, *lines: str, user: str = "") -> None:
        self.port = free_port()
        self._config = folder / f"mosquitto-{self.port}.conf"
        self._config.write_text("\n".join([f"listener {self.port} 127.0.0.1", *(lines or ["allow_anonymous true"])]) + "\n")
        self.url = f"mqtt://{user}127.0.0.1:{self.port}"
        self._popen: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        self._popen = subprocess.Popen(["mosquitto", "-c", str(self._config)], stderr=subprocess.DEVNULL)
        await eventually(self._answers)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
            return True
        return False

    def signal(self, number: int) -> None:
        assert self._popen is not None
        self._popen.send_signal(number)

    def stop(self) -> None:
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGKILL)
        assert self._popen is not None
        self._popen.wait()

    @contextlib.asynccontextmanager
    async def peer(self, *topics: str, **options: Any) -> AsyncIterator[Peer]:
        """Another program at the broker."""
        async with aiomqtt.Client("127.0.0.1", self.port, **options) as client:
            peer = Peer(client)
            await client.subscribe([(topic, 0) for topic in topics or ("#",)])
            async with background(peer.listen()):
                yield peer

    async def kept(self) -> dict[str, bytes]:
        """What the broker keeps: everything by topic."""
        async with self.peer() as peer:
            mark = f"mark/{time.monotonic_ns()}"
            await peer.publish(mark)
            await eventually(lambda: peer.all(mark))
            return {m.topic.value: payload_of(m) for m in peer.messages if m.retain}


class Peer:
    """Another program at the broker, and all that it heard."""

    def __init__(self, client: aiomqtt.Client) -> None:
        self.publish = client.publish
        self.messages: list[aiomqtt.Message] = []
        self._client = client

    async def listen(self) -> None:
        async for message in self._client.messages:
            self.messages.append(message)

    def all(self, topic: str) -> list[bytes]:
        return [payload_of(message) for message in self.messages if message.topic.value == topic]

    def last(self, topic: str) -> bytes | None:
        return next(reversed(self.all(topic)), None)

    def results(self, gateway_id: str = "gw") -> list[dict[str, Any]]:
        return [json.loads(payload) for payload in self.all(f"amhrpd/{gateway_id}/result")]

    async def more(self, topic: str, count: int) -> None:
        """Wait for more than so many messages."""
        await eventually(lambda: len(self.all(topic)) > count)

    async def result(self, transaction: object, **expected: Any) -> dict[str, Any]:
        """The first result for a transaction that has these values."""

        def look() -> dict[str, Any] | None:
            for result in self.results():
                if result["transaction"] == transaction and expected.items() <= result.items():
                    return result
            return None

        found: dict[str, Any] = await eventually(look)
        return found


def payload_of(message: aiomqtt.Message) -> bytes:
    assert isinstance(message.payload, bytes)
    return message.payload


needing_broker = needing(pytest.mark.broker, "" if aiomqtt and shutil.which("mosquitto") else "no mosquitto to talk to")


def with_broker(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test beside a broker, with pauses that suit it."""

    @functools.wraps(test)
    async def body(tmp_path: Path) -> None:
        broker = Mosquitto(tmp_path)
        await broker.start()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(amhrpd.Broker, "PAUSES_S", (0.05, 0.2))
            patch.setattr(amhrpd.Broker, "TIMEOUT_S", 1.0)
            patch.setattr(amhrpd.Broker, "SETTLED_S", 0.0)
            patch.setattr(amhrpd.Broker, "HOME_PAUSE_S", (0.0, 0.1))
            patch.setattr(amhrpd.Outbox, "READINGS_PAUSE_S", 0.1)
            patch.setattr(amhrpd.Broker, "MAX_COMMANDS", amhrpd.Broker.MAX_COMMANDS)
            try:
                await test(broker, tmp_path / "amhrpd.db")
            finally:
                broker.stop()

    del body.__wrapped__  # pytest would look for the arguments there
    return needing_broker(in_a_loop(body))


def at(broker: Mosquitto, **settings: Any) -> dict[str, Any]:
    """The settings of a gateway at a broker."""
    return {"mqtt_url": broker.url, "gateway_id": "gw"} | settings


async def is_at(client: Client) -> bool:
    return bool((await client.get("/health"))["mqtt"] == "connected")


@contextlib.asynccontextmanager
async def gateway_at(broker: Mosquitto, database: Path, **settings: Any) -> AsyncIterator[Client]:
    """The daemon, connected to a broker."""
    async with gateway_on(database, **at(broker, **settings)) as client:
        await eventually(lambda: is_at(client))
        yield client


@with_broker
async def test_broker_is_told_what_happens(broker: Mosquitto, database: Path) -> None:
    async with broker.peer() as peer, gateway_at(broker, database) as client:
        await eventually(lambda: peer.last("amhrpd/gw/status") == b"online")
        device = "amhrpd/gw/device/room.1"
        async with client.board("room.1", "a/+#/b", metadata={"firmware_version": "2.0"}) as board:
            info = json.loads(await eventually(lambda: peer.last(f"{device}/info")))
            assert (info["device_type"], info["metadata"], info["is_online"]) == ("a/+#/b", {"firmware_version": "2.0"}, True)
            assert info.keys() == (await client.get("/devices/room.1")).keys() - {"state", "alert"}
            assert peer.last(f"{device}/status") == b"online"
            await board.send('{"message_type": "status", "payload": {"temperature":  21.50, "a.b/c+#": [1]}}')
            await eventually(lambda: peer.last(f"{device}/state") == b'{"temperature":21.5,"a.b/c+#":[1]}')
            await say(board, "alert", device_id="room.1", alert_type="obstacle", message="10 cm")
            alert = json.loads(await eventually(lambda: peer.last(f"{device}/alert")))
            assert alert.items() >= {"device_id": "room.1", "kind": "alert", "type": "obstacle", "message": "10 cm"}.items()
            told = len(peer.all(f"{device}/info"))
            await client.post(
                "/command", {"device_id": "room.1", "command_name": "x", "deadman": {"after": 60, "command_name": "s"}}
            )
            await eventually(lambda: [r for r in peer.results() if r["command_name"] == "x" and r["status"] == "sent"])
            assert len(peer.all(f"{device}/info")) == told  # a deadman is no news there
        await eventually(lambda: peer.last(f"{device}/status") == b"offline")
        await eventually(lambda: json.loads(peer.last(f"{device}/info") or b"")["is_online"] is False)
        kept = await broker.kept()
        assert kept.keys() >= {"amhrpd/gw/status", *(f"{device}/{kind}" for kind in ("status", "info", "state"))}
        assert not [topic for topic in kept if topic.endswith(("/alert", "/result", "/command"))]


@with_broker
async def test_commands_come_from_the_broker_and_results_go_there(broker: Mosquitto, database: Path) -> None:
    async with broker.peer() as peer, gateway_at(broker, database) as client, contextlib.AsyncExitStack() as stack:
        one, two = [await stack.enter_async_context(client.board(f"esp_{n}", kind)) for n, kind in ((1, "ESP32"), (2, "other"))]
        await stack.enter_async_context(background(answer_commands(two)))
        await peer.publish("amhrpd/gw/device/esp_1/command", "stop")
        assert (await hear(one, "command"))["command_name"] == "stop"
        order = {"command_name": "go", "payload": {"speed": 80}, "timeout": 7, "transaction": "tür/1"}
        await peer.publish(
            "amhrpd/gw/device/esp_1/command", json.dumps(order | {"deadman": {"after": 60, "command_name": "stop"}})
        )
        frame = await hear(one, "command")
        assert (frame["command_name"], frame["payload"], frame["timeout"]) == ("go", {"speed": 80}, 7)
        row = await peer.result("tür/1", status="sent")
        assert (await client.get("/devices/esp_1"))["deadman_at"] is not None
        await say(one, "command_ack", command_id=frame["command_id"], status="success")
        done = await peer.result("tür/1", status="ack_success")
        assert done == await client.get(f"/command-logs/{row['command_id']}") | {"transaction": "tür/1"}
        for topic in ("amhrpd/gw/command", "amhrpd/all/command"):
            await peer.publish(topic, json.dumps({"device_type": "other", "command_name": "blink", "transaction": topic}))
            await peer.result(topic, status="ack_success", success_count=1)
        await peer.publish("amhrpd/gw/command", json.dumps({"device_type": "none", "command_name": "x", "transaction": 7}))
        await peer.result(7, status="no_devices")
        answer = await client.post("/command", {"device_id": "esp_2", "command_name": "by_rest"})
        found = await eventually(lambda: [r for r in peer.results() if r.get("command_id") == answer["command_id"]])
        assert found[0]["transaction"] is None


@with_broker
async def test_commands_from_the_broker_are_validated_as_those_of_rest(broker: Mosquitto, database: Path) -> None:
    wrong: dict[tuple[str, bytes], tuple[str, str]] = {
        ("command", b"stop"): ("INVALID_MESSAGE", "not valid JSON"),
        ("command", b"[1]"): ("INVALID_MESSAGE", "object"),
        ("command", b"\xff"): ("INVALID_MESSAGE", "UTF-8"),
        ("command", b'{"command_name": "x"}'): ("MISSING_REQUIRED_FIELD", "device_type"),
        ("command", b'{"device_id": "ghost", "command_name": "x"}'): ("DEVICE_NOT_FOUND", "ghost"),
        ("command", b'{"device_type": "*", "command_name": "x", "timeout": 301}'): ("INVALID_FIELD_VALUE", "timeout is 301"),
        ("command", b'{"device_type": "*", "command_name": "x", "speed": 1}'): ("INVALID_FIELD_VALUE", "speed"),
        ("command", b'{"device_type": "*", "command_name": "x", "transaction": [1]}'): ("INVALID_FIELD_VALUE", "transaction"),
        ("command", b'{"device_type": "*", "command_name": "x", "transaction": "%s"}' % (b"x" * 65)): (
            "INVALID_FIELD_VALUE",
            "64",
        ),
        ("command", b"[" * 100 + b"]" * 100): ("INVALID_MESSAGE", "nested"),
        ("command", b" " * (128 << 10) + b"{}"): ("PAYLOAD_TOO_LARGE", "131074"),
        ("device/esp_1/command", b'{"command_name": "x", "device_type": "*"}'): ("INVALID_FIELD_VALUE", "the topic names"),
        ("device/esp_1/command", b'"stop"'): ("INVALID_MESSAGE", "object"),
        ("device/esp_1/command", b"\xff"): ("INVALID_MESSAGE", "UTF-8"),
        ("device/esp_1/command", b"x" * 256): ("INVALID_FIELD_VALUE", "command_name"),
        ("device/esp_1,esp_2/command", b"stop"): ("INVALID_FIELD_VALUE", "device_id"),
        ("device/ghost/command", b"stop"): ("DEVICE_NOT_FOUND", "ghost"),
    }
    async with broker.peer() as peer, gateway_at(broker, database) as client, client.board("esp_1") as board:
        for (topic, payload), (code, words) in wrong.items():
            before = len(peer.results())
            await peer.publish(f"amhrpd/gw/{topic}", payload)
            await peer.more("amhrpd/gw/result", before)
            result = peer.results()[-1]
            assert (result["error_code"], words in result["error"], result["transaction"]) == (code, True, None), result
        await peer.publish("amhrpd/gw/command", b'{"device_type": "*", "command_name": "x", "wait": -1, "transaction": true}')
        await peer.result(True, error_code="INVALID_FIELD_VALUE")
        await peer.publish("amhrpd/gw/device/esp_1/command", b"")  # this is how a retained one is deleted
        await peer.publish("amhrpd/gw/device/esp_1/command", b"stop")
        assert (await hear(board, "command"))["command_name"] == "stop"  # nothing came before it


@with_broker
async def test_a_retained_command_is_never_obeyed(broker: Mosquitto, database: Path) -> None:
    with logged() as events:
        async with broker.peer() as peer:
            topics = ("amhrpd/gw/device/esp_1/command", "amhrpd/all/command")
            order = {"device_type": "*", "command_name": "open_garage", "transaction": "door"}
            await peer.publish(topics[0], b"open_garage", retain=True)
            await peer.publish(topics[1], json.dumps(order), retain=True)
            async with gateway_at(broker, database) as client, client.board("esp_1") as board:
                for _ in range(3):
                    await eventually(lambda: is_at(client))
                    result = await peer.result("door")
                    assert "retain" in result["error"] and topics[1] in result["error"]
                    await eventually(lambda: len(peer.results()) >= 2)
                    peer.messages.clear()
                    async with broker.peer(identifier="amhrpd-gw"):  # ends the gateway's connection, which it makes anew
                        pass
                await eventually(lambda: len(peer.results()) >= 2)
                await peer.publish(topics[0], b"stop")
                assert (await hear(board, "command"))["command_name"] == "stop"
                assert len(named(events, "mqtt_command_refused")) == 2  # once a minute a topic


@with_broker
async def test_a_command_for_a_gateway_that_is_away_is_not_kept_for_it(broker: Mosquitto, database: Path) -> None:
    async with gateway_on(database) as client, client.board("esp_1"):
        pass
    async with gateway_at(broker, database):
        pass
    async with broker.peer() as peer:
        await peer.publish("amhrpd/gw/device/esp_1/command", b"go", qos=1)
        async with gateway_at(broker, database) as client:
            await peer.publish("amhrpd/gw/device/esp_1/command", b"go", qos=1)  # nor for a board that is
            await eventually(lambda: [r for r in peer.results() if r["status"] == "no_devices"])
            async with client.board("esp_1") as board:
                await peer.publish("amhrpd/gw/device/esp_1/command", b"stop", qos=1)
                assert (await hear(board, "command"))["command_name"] == "stop"


@with_broker
async def test_a_broker_that_lost_everything_is_told_it_again_and_commands_go_on(broker: Mosquitto, database: Path) -> None:
    amhrpd.Broker.PAUSES_S = (0.5, 0.5)  # the other program is back first
    async with gateway_at(broker, database) as client, client.board("esp_1") as board:
        await say(board, "status", payload={"temperature": 20})
        await eventually(broker_has(broker, "amhrpd/gw/device/esp_1/state"))
        for _ in range(2):
            broker.stop()
            await eventually(lambda: is_away(client))
            await say(board, "alert", device_id="esp_1", alert_type="collision", message="meanwhile")
            await broker.start()
            async with broker.peer() as peer:
                await eventually(lambda: peer.last("amhrpd/gw/status") == b"online")
                assert peer.messages[-1].topic.value == "amhrpd/gw/status"
                for kind in ("status", "info", "state"):
                    assert peer.all(f"amhrpd/gw/device/esp_1/{kind}"), kind
                assert peer.all("homeassistant/device/amhrpd_gw_esp_1/config")
                assert json.loads(peer.last("amhrpd/gw/device/esp_1/alert") or b"")["message"] == "meanwhile"
                await peer.publish("amhrpd/gw/device/esp_1/command", b"stop")
                assert (await hear(board, "command"))["command_name"] == "stop"


def broker_has(broker: Mosquitto, topic: str, payload: bytes | None = None) -> Callable[[], Awaitable[bool]]:
    async def look() -> bool:
        kept = await broker.kept()
        return topic in kept and payload in (None, kept[topic])

    return look


async def is_away(client: Client) -> bool:
    return "since" in (await client.get("/health"))["mqtt"]


@with_broker
async def test_a_will_that_comes_late_is_corrected(broker: Mosquitto, database: Path) -> None:
    async with broker.peer("amhrpd/gw/status") as peer, gateway_at(broker, database):
        await eventually(lambda: peer.last("amhrpd/gw/status") == b"online")
        await peer.publish("amhrpd/gw/status", b"offline", retain=True)
        await eventually(lambda: peer.all("amhrpd/gw/status")[-2:] == [b"offline", b"online"])
        assert (await broker.kept())["amhrpd/gw/status"] == b"online"


@with_broker
async def test_a_stop_leaves_everybody_offline_and_tells_what_came_last(broker: Mosquitto, database: Path) -> None:
    async with broker.peer() as peer, contextlib.AsyncExitStack() as stack:
        async with gateway_at(broker, database) as client:
            board = await stack.enter_async_context(client.board("esp_1"))  # still there when the gateway stops
            go = {"command_name": "go", "deadman": {"after": 60, "command_name": "stop"}}
            await peer.publish("amhrpd/gw/device/esp_1/command", json.dumps(go))
            await hear(board, "command")
            await say(board, "status", payload={"n": 1})
            await eventually(lambda: peer.all("amhrpd/gw/device/esp_1/state"))
            await say(board, "status", payload={"n": 2})
            await say(board, "alert", device_id="esp_1", alert_type="last", message="words")
            await eventually(lambda: peer.all("amhrpd/gw/device/esp_1/alert"))
        kept = await broker.kept()
        assert (kept["amhrpd/gw/status"], kept["amhrpd/gw/device/esp_1/status"]) == (b"offline", b"offline")
        assert json.loads(kept["amhrpd/gw/device/esp_1/state"]) == {"n": 2}  # though its second isn't over
        assert json.loads(kept["amhrpd/gw/device/esp_1/info"])["is_online"] is False
        await eventually(lambda: [result for result in peer.results() if result["command_name"] == "stop"])  # the deadman's
        assert peer.last("amhrpd/gw/status") == b"offline"


@with_broker
async def test_a_gateway_that_dies_is_offline_by_its_will(broker: Mosquitto, database: Path) -> None:
    async with process_on(database, AMHRPD_MQTT_URL=broker.url, AMHRPD_GATEWAY_ID="gw") as (process, _):
        await eventually(broker_has(broker, "amhrpd/gw/status", b"online"))
        process.send_signal(signal.SIGKILL)
        await eventually(broker_has(broker, "amhrpd/gw/status", b"offline"))


@with_broker
async def test_a_broker_that_is_not_there_is_in_nobodys_way(broker: Mosquitto, database: Path) -> None:
    broker.stop()
    async with gateway_on(database, **at(broker)) as client, client.board("esp_1") as board:
        health = await client.get("/health")
        assert health["status"] == "ok" and re.match(r"since \S+: .*[Cc]onnection refused", health["mqtt"]), health
        await client.post("/command", {"device_id": "esp_1", "command_name": "blink"})
        await hear(board, "command")
        await broker.start()
        await eventually(lambda: is_at(client))
        await eventually(broker_has(broker, "amhrpd/gw/device/esp_1/status", b"online"))
        broker.stop()


@with_broker
async def test_a_broker_that_hangs_is_in_nobodys_way_and_gets_everything_when_it_goes_on(
    broker: Mosquitto, database: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(amhrpd.Broker, "KEEPALIVE_S", 1)
        async with gateway_at(broker, database) as client, client.board("esp_1") as board:
            broker.signal(signal.SIGSTOP)
            await say(board, "status", payload={"n": 1})
            began_s = time.monotonic()
            await client.post("/command", {"device_id": "esp_1", "command_name": "blink"})
            await hear(board, "command")
            assert time.monotonic() - began_s < 1
            await eventually(lambda: is_away(client))
            await say(board, "status", payload={"n": 2})
            broker.signal(signal.SIGCONT)
            await eventually(broker_has(broker, "amhrpd/gw/device/esp_1/state", b'{"n":2}'))
            await eventually(broker_has(broker, "amhrpd/gw/status", b"online"))
            async with broker.peer() as peer:
                await peer.publish("amhrpd/gw/device/esp_1/command", b"stop")
                assert (await hear(board, "command"))["command_name"] == "stop"
            broker.signal(signal.SIGSTOP)  # nor does a stop wait for it
            began_s = time.monotonic()
    assert time.monotonic() - began_s < 5


@with_broker
async def test_a_broker_that_hangs_from_the_start_holds_up_no_stop(broker: Mosquitto, database: Path) -> None:
    broker.signal(signal.SIGSTOP)
    async with gateway_on(database, **at(broker)) as client:
        await eventually(lambda: says_of_mqtt(client, "timed out"))
        began_s = time.monotonic()
    assert time.monotonic() - began_s < 3


@with_broker
async def test_a_name_that_does_not_resolve_holds_up_no_stop(broker: Mosquitto, database: Path) -> None:
    slow = (
        "import socket, sys, time, amhrpd\n"
        "real = socket.getaddrinfo\n"
        "def getaddrinfo(host, *args, **kwargs):\n"
        "    if host == 'broker.example': time.sleep(60)\n"
        "    return real(host, *args, **kwargs)\n"
        "socket.getaddrinfo = getaddrinfo\n"
        "sys.exit(amhrpd.main([]))"
    )
    async with process_on(database, code=slow, AMHRPD_MQTT_URL="mqtt://broker.example") as (process, client):
        assert await is_away(client)
        process.send_signal(signal.SIGTERM)
        began_s = time.monotonic()
        assert await process.exit_code() == 0
        assert time.monotonic() - began_s < 5


@with_broker
async def test_two_gateways_with_one_id_say_so_and_back_off(broker: Mosquitto, database: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, logged() as events:
        patch.setattr(amhrpd.Broker, "SETTLED_S", 3.0)
        patch.setattr(amhrpd.Broker, "PAUSES_S", (0.05, 0.4))
        async with gateway_at(broker, database) as client, gateway_on(database.with_name("two.db"), **at(broker)) as other:
            for gateway in (client, other):
                notice = await eventually(functools.partial(notice_of, gateway))
                assert "another gateway with the id gw" in notice
            async with client.board("esp_1") as board:
                await client.post("/command", {"device_id": "esp_1", "command_name": "blink"})
                await hear(board, "command")
            before = len(named(events, "mqtt_connected"))
            await asyncio.sleep(1)
            assert len(named(events, "mqtt_connected")) - before <= 8
        assert [event for event in events if "another gateway" in str(event.get("problem"))]


async def notice_of(client: Client) -> str:
    return str((await client.get("/health")).get("notice") or "")


@with_broker
async def test_states_are_paced_and_the_latest_always_arrives(broker: Mosquitto, database: Path) -> None:
    async with broker.peer("amhrpd/#") as peer, gateway_at(broker, database) as client, client.board("esp_1") as board:
        began_s = time.monotonic()
        number = 0
        while time.monotonic() - began_s < 2.2:  # steadily, with no pause that anybody could wait for
            number += 1
            await say(board, "status", payload={"n": number})
            await asyncio.sleep(0.01)
        await eventually(lambda: peer.last("amhrpd/gw/device/esp_1/state") == b'{"n":%d}' % number)
        assert 3 <= len(peer.all("amhrpd/gw/device/esp_1/state")) <= 5


@with_broker
async def test_states_of_all_boards_take_turns(broker: Mosquitto, database: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(amhrpd.Outbox, "TURN", 10)
        patch.setattr(amhrpd.Outbox, "TURN_S", 0.5)  # ten boards in half a second
        patch.setattr(amhrpd.Outbox, "BOARD_PAUSE_S", 0.0)
        async with (
            broker.peer("amhrpd/#") as peer,
            gateway_at(broker, database) as client,
            contextlib.AsyncExitStack() as stack,
        ):
            boards = [await stack.enter_async_context(client.board(f"esp_{n}")) for n in range(20)]
            await eventually(lambda: all(peer.last(f"amhrpd/gw/device/esp_{n}/info") for n in range(20)))
            peer.messages.clear()

            async def flood() -> None:
                while True:
                    for board in boards:
                        await say(board, "status", payload={"t": time.monotonic()})
                    await asyncio.sleep(0.02)

            async with background(flood()):
                await eventually(lambda: len([m for m in peer.messages if m.topic.value.endswith("/state")]) >= 40)
            counts = [len(peer.all(f"amhrpd/gw/device/esp_{n}/state")) for n in range(20)]
            assert max(counts) - min(counts) <= 1, counts


@with_broker
async def test_what_is_deleted_is_gone_from_the_broker(broker: Mosquitto, database: Path) -> None:
    async with broker.peer() as peer, gateway_at(broker, database) as client:
        for device_id in ("a.1", "b"):
            async with client.board(device_id) as board:
                await say(board, "status", payload={"temperature": 1})
                await peer.more(f"amhrpd/gw/device/{device_id}/state", 0)
        await eventually(
            lambda: len([t for t in configs(peer) if "a_1" in t]) == 1 and len([t for t in configs(peer) if "gw_b/" in t]) == 1
        )
        peer.messages.clear()
        assert (await client.ask("DELETE", "/devices/a.1"))[0] == 200
        await eventually(lambda: peer.all("amhrpd/gw/device/a.1/info"))
        told = [message.topic.value for message in peer.messages]
        assert next(topic for topic in told if "a.1" in topic or "a_1" in topic).startswith("homeassistant")
        assert not [topic for topic in await broker.kept() if "a.1" in topic or "a_1" in topic]
    async with gateway_on(database) as client:  # deleted while the gateway isn't at the broker
        assert (await client.ask("DELETE", "/devices/b"))[0] == 200
    async with broker.peer() as peer:
        assert [topic for topic in await broker.kept() if "/b/" in topic]
        async with gateway_at(broker, database):
            await eventually(lambda: b"" in peer.all("amhrpd/gw/device/b/info"))
            assert not [topic for topic in await broker.kept() if "/b/" in topic or "gw_b" in topic]


def configs(peer: Peer) -> dict[str, Any]:
    """The latest lists of entities, by topic."""
    lists = {m.topic.value: payload_of(m) for m in peer.messages if m.topic.value.startswith("homeassistant/device/")}
    return {topic: json.loads(payload) for topic, payload in lists.items() if payload}


@with_broker
async def test_home_assistant_is_told_of_every_board(broker: Mosquitto, database: Path) -> None:
    state = {
        "temperature": 21.5,
        "batteryVoltage": 3.7,
        "rssi": -60,
        "door_open": False,
        "mode": "auto",
        "items": 3,
        "x' if true else cycler('": 1,
        "a.b/c+#": 1,
        "{{ 7*7 }}": "text",
        "n" * 41: 1,
        "nested": {"a": 1},
        "long": "x" * 65,
        "nothing": None,
    }
    async with broker.peer() as peer, gateway_at(broker, database) as client:
        async with client.board("esp.1", "ESP32", metadata={"firmware_version": "2.0"}) as board:
            await say(board, "status", payload=state)
            topic = await eventually(lambda: next((t for t in configs(peer) if "esp_1" in t), None))
            assert re.fullmatch(r"homeassistant/device/amhrpd_gw_esp_1_[0-9a-f]{6}/config", topic)
            await eventually(lambda: len(configs(peer)[topic]["components"]) == 10)
        config = configs(peer)[topic]
        object_id = topic.split("/")[2]
        assert config["device"] == {
            "identifiers": [object_id],
            "manufacturer": "AMHR-PD",
            "name": "esp.1",
            "model": "ESP32",
            "sw_version": "2.0",
            "via_device": "amhrpd_gw",
        }
        assert [where["topic"] for where in config["availability"]] == ["amhrpd/gw/status", "amhrpd/gw/device/esp.1/status"]
        assert config["availability_mode"] == "all"
        parts = config["components"]
        assert {part["unique_id"] for part in parts.values()} == {f"{object_id}_{key}" for key in parts}
        readings = {part["name"]: part for key, part in parts.items() if part.get("state_topic", "").endswith("/state")}
        assert readings.keys() == {"temperature", "batteryVoltage", "rssi", "door open", "mode", "items"}
        for part in readings.values():  # one that is missing, or of another type, is no error there
            template = (
                r"\{% set v = value_json\['\w+'\] if value_json is defined else none %\}\{\{ .* if v is .* else '(None)?' \}\}"
            )
            assert re.fullmatch(template, part["value_template"]), part
        assert (readings["temperature"]["unit_of_measurement"], readings["temperature"]["device_class"]) == (
            "°C",
            "temperature",
        )
        assert (readings["batteryVoltage"]["unit_of_measurement"], readings["rssi"]["device_class"]) == ("V", "signal_strength")
        assert (readings["door open"]["platform"], readings["mode"]["platform"]) == ("binary_sensor", "sensor")
        assert (parts["online"]["device_class"], parts["stop"]["payload_press"], parts["command"]["platform"]) == (
            "connectivity",
            "stop",
            "notify",
        )
        assert parts["alert"]["event_types"] == ["alert", "error"]
        gateway = configs(peer)["homeassistant/device/amhrpd_gw/config"]["components"]
        assert gateway["devices_online"]["state_topic"] == "amhrpd/gw/info"
        await eventually(lambda: json.loads(peer.last("amhrpd/gw/info") or b"{}").get("devices_online") == 0)
        order = gateway["stop"]["payload_press"]
        async with client.board("b") as board:
            await peer.publish(gateway["stop"]["command_topic"], order)
            assert (await hear(board, "command"))["command_name"] == "stop"


def test_units_follow_from_names() -> None:
    for name, unit in {
        "temperature": "°C",
        "water_temp": "°C",
        "temperature_f": "°F",
        "temperatureC": "°C",
        "battery": "%",
        "battery_percent": "%",
        "battery_voltage_mv": "mV",
        "motor_current": "A",
        "pressure_pa": "Pa",
        "distance": "cm",
        "distance_mm": "mm",
        "rssi": "dBm",
        "speed": None,
        "temperature_count": None,
        "": None,
    }.items():
        assert amhrpd.quantity_of(name).get("unit_of_measurement") == unit, name


@with_broker
async def test_home_assistant_is_told_again_only_of_new_readings_and_when_it_is_back(broker: Mosquitto, database: Path) -> None:
    topic = "homeassistant/device/amhrpd_gw_esp_1/config"
    async with broker.peer() as peer, gateway_at(broker, database) as client, client.board("esp_1") as board:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(amhrpd.Outbox, "BOARD_PAUSE_S", 0.0)
            for number, state in enumerate(({"a": 1}, {"b": 2}, {"a": "text by now"}, {"a": 2, "b": 3})):
                await say(board, "status", payload=state)
                await peer.more("amhrpd/gw/device/esp_1/state", number)
                assert json.loads(peer.last("amhrpd/gw/device/esp_1/state") or b"{}") == state
                await asyncio.sleep(0.15)
        assert 1 <= len(peer.all(topic)) <= 3  # when it came, and for each that is new
        assert configs(peer)[topic]["components"].keys() >= {"number_a", "number_b"}
        before = len(peer.all(topic))
        await peer.publish("homeassistant/status", b"online")
        await eventually(lambda: len(peer.all(topic)) == before + 1)
        await peer.more("homeassistant/device/amhrpd_gw/config", 1)


@with_broker
async def test_without_a_prefix_home_assistant_is_told_nothing(broker: Mosquitto, database: Path) -> None:
    async with broker.peer() as peer, gateway_at(broker, database, mqtt_discovery="") as client, client.board("esp_1") as board:
        await say(board, "status", payload={"a": 1})
        await eventually(lambda: peer.last("amhrpd/gw/device/esp_1/state"))
        assert not configs(peer)
    assert not [message for message in peer.messages if not message.topic.value.startswith(("amhrpd/", "mark/"))]


@with_broker
async def test_one_board_at_two_gateways_is_two(broker: Mosquitto, database: Path) -> None:
    ids = ("a", "a_b")
    async with (
        broker.peer() as peer,
        gateway_at(broker, database, gateway_id=ids[0]) as one,
        gateway_at(broker, database.with_name("two.db"), gateway_id=ids[1]) as two,
        one.board("b_c") as board_1,
        two.board("c") as board_2,
        one.board("esp_1") as board_3,
        two.board("esp_1") as board_4,
    ):
        await eventually(lambda: len(configs(peer)) == 6)
        unique_ids = [part["unique_id"] for config in configs(peer).values() for part in config["components"].values()]
        assert len(unique_ids) == len(set(unique_ids))
        await peer.publish("amhrpd/all/command", b'{"device_type": "*", "command_name": "stop"}')
        for board in (board_1, board_2, board_3, board_4):
            assert (await hear(board, "command"))["command_name"] == "stop"


@with_broker
async def test_a_flood_of_commands_holds_up_nobody_and_grows_no_queue(broker: Mosquitto, database: Path) -> None:
    def text(value: bytes) -> bytes:
        return struct.pack("!H", len(value)) + value

    def packet(kind: int, body: bytes) -> bytes:
        return bytes([kind, len(body)]) + body

    packets = [
        packet(0x30, text(b"amhrpd/gw/device/esp_1/command") + b"blink"),
        packet(0x30, text(b"amhrpd/gw/command") + b'{"device_type": "none", "command_name": "x"}'),
        packet(0x30, text(b"amhrpd/all/command") + b"{"),
    ]
    program = (
        "import socket\n"
        f"flood = socket.create_connection(('127.0.0.1', {broker.port}))\n"
        f"flood.sendall({packet(0x10, text(b'MQTT') + bytes((4, 2, 0, 0)) + text(b'flood'))!r})\n"
        f"while True: flood.sendall({b''.join(packets)!r} * 100)"
    )
    heard: set[str] = set()

    async def listen(board: ClientConnection) -> None:
        async for frame in board:
            heard.update([json.loads(frame)["command_name"]])

    amhrpd.Broker.MAX_COMMANDS = 3  # with_broker puts it back
    async with gateway_at(broker, database) as client, client.board("esp_1") as board, background(listen(board)):
        flood = subprocess.Popen([sys.executable, "-c", program])
        try:
            await eventually(lambda: "blink" in heard)
            times_s, at_once = [], 0
            for number in range(10):
                began_s = time.monotonic()
                await client.post("/command", {"device_id": "esp_1", "command_name": f"stop_{number}"})
                await eventually(functools.partial(heard.__contains__, f"stop_{number}"))
                times_s.append(time.monotonic() - began_s)
                at_once = max(at_once, len([task for task in asyncio.all_tasks() if "Broker._obey" in repr(task)]))
            assert sorted(times_s)[5] < 1.0, times_s
            assert 0 < at_once <= amhrpd.Broker.MAX_COMMANDS
        finally:
            flood.kill()
            flood.wait()
        async with broker.peer() as peer:

            async def is_obeyed() -> bool:
                await peer.publish("amhrpd/gw/device/esp_1/command", b"after")
                await asyncio.sleep(0.1)
                return "after" in heard

            await eventually(is_obeyed)


@with_broker
async def test_what_waits_for_a_broker_is_bounded_and_the_oldest_gives_way(broker: Mosquitto, database: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(amhrpd.Outbox, "MAX_QUEUED", 5)
        patch.setattr(amhrpd.Broker, "PAUSES_S", (0.5, 0.5))  # the other program is back first
        broker.stop()
        async with gateway_on(database, **at(broker)) as client, client.board("esp_1") as board:
            for number in range(12):
                await say(board, "alert", device_id="esp_1", alert_type="count", message=f"{number}")
            await eventually(lambda: metric_is(client, "amhrpd_mqtt_dropped_total", 7))
            await broker.start()
            async with broker.peer() as peer:
                await eventually(lambda: is_at(client))
                await eventually(lambda: len(peer.all("amhrpd/gw/device/esp_1/alert")) >= 5)
                alerts = [json.loads(payload)["message"] for payload in peer.all("amhrpd/gw/device/esp_1/alert")]
                assert alerts == ["7", "8", "9", "10", "11"]
            assert await metric_is(client, "amhrpd_mqtt_connected", 1)


async def metric_is(client: Client, name: str, value: float) -> bool:
    async with client.session.get(f"http://127.0.0.1:{client.port}/metrics") as response:
        families = text_string_to_metric_families(await response.text())
    found = [sample.value for family in families for sample in family.samples if sample.name == name]
    return bool(found) and sum(found) == value


@with_broker
async def test_commands_that_waited_while_the_gateway_stood_still_are_refused(broker: Mosquitto, database: Path) -> None:
    async with (
        broker.peer() as peer,
        process_on(database, AMHRPD_MQTT_URL=broker.url, AMHRPD_GATEWAY_ID="gw") as (process, client),
        client.board("esp_1") as board,
    ):
        await eventually(lambda: is_at(client))
        process.send_signal(signal.SIGSTOP)
        for number in range(3):
            await peer.publish("amhrpd/gw/device/esp_1/command", json.dumps({"command_name": "go", "transaction": number}))
        await asyncio.sleep(1.5)
        process.send_signal(signal.SIGCONT)
        for number in range(3):
            assert "waited over 1 s" in (await peer.result(number, error_code="REQUEST_TIMEOUT"))["error"]

        async def is_obeyed() -> bool:
            await peer.publish("amhrpd/gw/device/esp_1/command", b"stop")
            await asyncio.sleep(0.1)
            return any(result.get("command_name") == "stop" for result in peer.results())

        await eventually(is_obeyed)
        assert (await hear(board, "command"))["command_name"] == "stop"


@with_broker
async def test_the_password_is_shown_to_nobody(broker: Mosquitto, database: Path) -> None:
    passwords = database.with_name("passwords")
    command = ["mosquitto_passwd", "-b", "-c", str(passwords), "pi", "ge/h:eim"]
    subprocess.run(command, check=True, capture_output=True)
    guarded = Mosquitto(
        database.parent, "allow_anonymous false", f"password_file {passwords}", "user root", user="pi:ge%2Fh%3Aeim@"
    )
    await guarded.start()
    try:
        async with process_on(database, is_fresh=True, AMHRPD_MQTT_URL=guarded.url, AMHRPD_LOG_LEVEL="debug") as (
            process,
            client,
        ):
            await eventually(lambda: is_at(client))
            shown = Path(f"/proc/{process.pid}/cmdline").read_text() + process.log + str(await client.get("/health"))
        with logged() as events:
            async with gateway_on(database, mqtt_url=guarded.url.replace("eim@", "eim2@")) as client:
                await eventually(lambda: says_of_mqtt(client, "ot authori"))
                shown += str(await client.get("/health")) + str(events)
    finally:
        guarded.stop()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        patch.setenv("AMHRPD_MQTT_URL", guarded.url)
        amhrpd.main(["--help"])
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as err:
        patch.setenv("AMHRPD_MQTT_URL", f"{guarded.url}:70000")
        assert amhrpd.main([]) == 2
        assert amhrpd.main(["--mqtt-url", "mqtt://pi"]) == 2  # never a flag
    shown += out.getvalue() + err.getvalue()
    assert "AMHRPD_MQTT_URL is (hidden)" in shown and "eim" not in shown and "ge%2F" not in shown


async def says_of_mqtt(client: Client, words: str) -> bool:
    return words in (await client.get("/health"))["mqtt"]


@needing_openssl
@with_broker
async def test_tls_is_checked_against_the_certificates_that_are_set(broker: Mosquitto, database: Path) -> None:
    cert, key = database.with_name("cert.pem"), database.with_name("key.pem")
    make_certificate(cert, key, "-nodes")
    secure = Mosquitto(database.parent, "allow_anonymous true", f"certfile {cert}", f"keyfile {key}", "user root")
    await secure.start()
    url = secure.url.replace("mqtt://", "mqtts://")
    try:
        async with gateway_on(database, mqtt_url=url, mqtt_ca=cert) as client:
            await eventually(lambda: is_at(client))
        async with gateway_on(database, mqtt_url=url) as client:
            await eventually(lambda: says_of_mqtt(client, "CERTIFICATE_VERIFY_FAILED"))
        async with gateway_on(database, mqtt_url=url, mqtt_ca=cert.with_name("none.pem")) as client:
            await eventually(lambda: says_of_mqtt(client, "No such file"))
    finally:
        secure.stop()


def test_without_a_broker_nothing_of_it_is_there(database: Path) -> None:
    program = (
        "import asyncio, sys, amhrpd\n"
        "async def main():\n"
        "    stop = asyncio.Event()\n"
        f"    settings = amhrpd.Settings(host='127.0.0.1', port=0, database_url='sqlite:///{database}')\n"
        "    await amhrpd.serve(settings, stop, lambda port: stop.set())\n"
        "asyncio.run(main())\n"
        "print([name for name in sys.modules if 'mqtt' in name])"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=HERE, capture_output=True, text=True, timeout=30, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_settings_of_a_broker() -> None:
    load = functools.partial(amhrpd.load_settings, amhrpd.Settings)
    for url in ("mqtt://pi", "mqtt://u:p%40@10.0.0.1:1883/", "mqtts://u@[::1]:65535"):
        assert load({}, {"AMHRPD_MQTT_URL": url}).mqtt_url == url
    for environ in (
        {"AMHRPD_MQTT_URL": "http://u:geheim@pi"},
        {"AMHRPD_MQTT_URL": "mqtt://u:geheim@pi:65536"},
        {"AMHRPD_GATEWAY_ID": "all"},
        {"AMHRPD_GATEWAY_ID": "living.room"},
        {"AMHRPD_GATEWAY_ID": "x" * 65},
        {"AMHRPD_MQTT_DISCOVERY": "home/#"},
    ):
        with pytest.raises(amhrpd.ConfigError) as error:
            load({}, environ)
        assert next(iter(environ)) in str(error.value) and "geheim" not in str(error.value)
    with pytest.MonkeyPatch.context() as patch:
        for name, gateway_id in {"pi4.home.lan": "pi4-home-lan", "all": "gateway", "": "gateway"}.items():
            patch.setattr(socket, "gethostname", lambda name=name: name)
            assert load({}, {}).gateway_id == gateway_id
    assert load({}, {}).mqtt_discovery == "homeassistant"
    assert load({"mqtt_discovery": ""}, {"AMHRPD_MQTT_DISCOVERY": "x"}).mqtt_discovery == ""
    assert load({}, {"AMHRPD_MQTT_DISCOVERY": ""}).mqtt_discovery == ""


# ======================================================================================================================
# Settings and the command line
# ======================================================================================================================


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AMHRPD_") and name != "DATABASE_URL"}
    command = [sys.executable, str(HERE / "amhrpd.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, env=clean | environ, check=False)


def test_error_without_a_text_is_named() -> None:
    assert amhrpd.cause_of(OSError()) == "OSError"
    assert amhrpd.cause_of(sqlite3.OperationalError("disk I/O error\n[SQL: …]")) == "disk I/O error"


def test_flags_are_written_out() -> None:
    result = run("--por", "0")
    assert (result.returncode, "--por" in result.stderr) == (2, True)


def test_bad_settings_end_the_start_with_one_line() -> None:
    for environ, words in {
        ("AMHRPD_PORT", "http"): ("AMHRPD_PORT", "'http'", "0 to 65535"),
        ("AMHRPD_PING_INTERVAL", "nan"): ("AMHRPD_PING_INTERVAL", "'nan'", "number"),
        ("AMHRPD_COMMAND_TIMEOUT", "301"): ("AMHRPD_COMMAND_TIMEOUT", "'301'", "300"),
        ("AMHRPD_LOG_LEVEL", "loud"): ("AMHRPD_LOG_LEVEL", "'loud'", "debug"),
        ("AMHRPD_ALLOWED_ORIGINS", "example.org"): ("AMHRPD_ALLOWED_ORIGINS", "'example.org'", "scheme://"),
        ("DATABASE_URL", "postgresql://x/y"): ("DATABASE_URL", "sqlite:///"),
        ("DATABASE_URL", "sqlite://"): ("DATABASE_URL", "sqlite:///"),
        ("DATABASE_URL", "sqlite:///a\rb.db"): ("DATABASE_URL", "sqlite:///"),
        ("AMHRPD_SYNC_INTERVAL", "-1"): ("AMHRPD_SYNC_INTERVAL", "'-1'", "0 to 3600"),
        ("AMHRPD_TLS_CERT", "cert.pem"): ("AMHRPD_TLS_KEY", "both or neither"),
    }.items():
        with pytest.raises(amhrpd.ConfigError) as error:
            amhrpd.load_settings(amhrpd.Settings, {}, dict([environ]))
        assert all(word in str(error.value) for word in words), error.value
    for token in ("geheim äöü", "null", ""):  # nor does a token that reads like nothing leave the door open
        with pytest.raises(amhrpd.ConfigError) as error:
            amhrpd.load_settings(amhrpd.Settings, {}, {"AMHRPD_API_TOKEN": token})
        assert "AMHRPD_API_TOKEN is (hidden)" in str(error.value)
    result = run("--port", "70000")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "amhrpd: --port is '70000': it must be a whole number from 0 to 65535\n"


def test_flags_win_over_the_environment_and_defaults_are_the_documented_ones() -> None:
    settings = amhrpd.load_settings(
        amhrpd.Settings, {"port": "9000"}, {"AMHRPD_PORT": "9001", "AMHRPD_HOST": "::1", "AMHRPD_LOG_LEVEL": ""}
    )
    assert (settings.port, settings.host, settings.log_level) == (9000, "::1", "info")
    assert amhrpd.load_settings(amhrpd.Settings, {}, {"DATABASE_URL": "sqlite:////var/x.db"}).database_path == Path("/var/x.db")
    assert amhrpd.load_settings(amhrpd.Settings, {}, {"DATABASE_URL": " sqlite:///x y.db \r\n"}).database_path == Path("x y.db")
    assert (
        amhrpd.load_settings(amhrpd.Settings, {"api_token": None}, {"AMHRPD_API_TOKEN": "12345678\r\n"}).api_token == "12345678"
    )
    assert amhrpd.load_settings(amhrpd.Settings, {}, {}) == amhrpd.Settings()
    d = amhrpd.Settings()
    assert (d.host, d.port, d.database_path) == ("0.0.0.0", 8000, Path("amhrpd.db"))
    assert (d.ping_interval_s, d.heartbeat_timeout_s, d.registration_timeout_s, d.command_timeout_s) == (20, 90, 10, 30)
    assert (d.commit_interval_s, d.max_message_bytes, d.log_level, d.log_format) == (1, 65536, "info", "auto")
    assert (d.sync_interval_s, amhrpd.load_settings(amhrpd.Settings, {"sync_interval_s": "0"}, {}).sync_interval_s) == (5, 0)


@in_a_loop
async def test_folder_whose_name_is_no_utf8_is_as_good_as_any(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    async with process_on(folder / "amhrpd.db") as (_, client):
        assert (await client.get("/health"))["database"] == "ok"
    assert (folder / "amhrpd.db").stat().st_size > 0


def test_help_and_version_and_import(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(*arguments: str) -> str:
        with pytest.raises(SystemExit) as end:
            amhrpd.main(arguments)
        assert end.value.code == 0
        return capsys.readouterr().out

    assert shown("--version") == f"amhrpd {amhrpd.VERSION}\n"
    text = " ".join(shown("--help").split())
    for field in msgspec.structs.fields(amhrpd.Settings):
        assert amhrpd.variable_of(field.name) in text
    assert "a whole number from 0 to 65535" in text
    monkeypatch.setenv("AMHRPD_API_TOKEN", "token-of-callers")
    assert "--reconnect-rate" in (text := shown("simulate", "--help"))
    assert "token-of-callers" not in text
    for url in ("127.0.0.1:8000", "http://127.0.0.1:99999", "http://[::1", "http://pi/path"):
        assert amhrpd.main(("simulate", "--url", url)) == 2
        assert capsys.readouterr().err == f"amhrpd: --url is {url!r}: it must be http://host:port or https://host:port\n"
    assert amhrpd.main(("simulate", "--devices", "0")) == 2
    assert capsys.readouterr().err == "amhrpd: --devices is '0': it must be a whole number from 1 to 9999\n"
    assert subprocess.run([sys.executable, "-c", "import amhrpd"], capture_output=True, cwd=HERE, check=True).stdout == b""


def refusal(directory: Path, **flags: str) -> str:
    """Why a gateway with these settings doesn't start."""
    defaults = {"host": "127.0.0.1", "port": "0", "database_url": f"sqlite:///{directory}/fresh.db"}
    settings = amhrpd.load_settings(amhrpd.Settings, defaults | flags, {})
    with pytest.raises(amhrpd.StartError) as error:
        asyncio.run(amhrpd.serve(settings, asyncio.Event()))
    return str(error.value)


@needing_openssl
def test_locked_key_is_a_start_error_of_one_line(tmp_path: Path) -> None:
    make_certificate(tmp_path / "cert.pem", tmp_path / "locked.pem", "-passout", "pass:sesame")
    text = refusal(tmp_path, tls_cert=f"{tmp_path}/cert.pem", tls_key=f"{tmp_path}/locked.pem")
    assert ("locked.pem" in text, "encrypted" in text, "\n" in text) == (True, True, False)


def test_start_errors_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("just some notes\n")
    with contextlib.closing(sqlite3.connect(tmp_path / "foreign.db")) as db, db:
        db.execute("CREATE TABLE recipes (name TEXT)")
    with contextlib.closing(sqlite3.connect(tmp_path / "newer.db")) as db, db:
        db.execute("CREATE TABLE devices (device_id TEXT)")
        db.execute("PRAGMA user_version = 99")
    with contextlib.closing(sqlite3.connect(tmp_path / "columns.db")) as db, db:
        db.execute("CREATE TABLE devices (device_id TEXT)")
    os.mkfifo(tmp_path / "fifo.db")
    (tmp_path / "bad.pem").write_text("no certificate")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases: list[tuple[dict[str, str], tuple[str, ...]]] = [
            ({"port": port}, ("127.0.0.1", port, "in use")),
            ({"host": "192.0.2.1"}, ("can't listen on 192.0.2.1 port 0: ", "address")),
            ({"host": "127.0.0..1"}, ("127.0.0..1",)),
            ({"host": "nobody.invalid"}, ("nobody.invalid",)),
            ({"database_url": "sqlite:////proc/amhrpd.db"}, ("/proc/amhrpd.db",)),
            ({"database_url": f"sqlite:///{tmp_path}/no/such/folder.db"}, ("folder.db", "No such file")),
            ({"database_url": f"sqlite:///{tmp_path}"}, (str(tmp_path), "Is a directory")),
            ({"database_url": f"sqlite:///{tmp_path}/fifo.db"}, ("fifo.db", "no regular file")),
            ({"database_url": f"sqlite:///{tmp_path}/text.db"}, ("text.db", "no SQLite database")),
            ({"database_url": f"sqlite:///{tmp_path}/foreign.db"}, ("foreign.db", "recipes")),
            ({"database_url": f"sqlite:///{tmp_path}/newer.db"}, ("newer.db", "newer version", "99")),
            ({"database_url": f"sqlite:///{tmp_path}/columns.db"}, ("columns.db", "devices", "device_type")),
            ({"tls_cert": f"{tmp_path}/none.pem", "tls_key": f"{tmp_path}/none.pem"}, ("none.pem", "No such file")),
            ({"tls_cert": f"{tmp_path}/bad.pem", "tls_key": f"{tmp_path}/bad.pem"}, ("bad.pem", "certificate")),
        ]
        for flags, words in cases:
            text = refusal(tmp_path, **flags)
            assert all(word in text for word in words), text
            assert "\n" not in text
        result = run("--host", "127.0.0.1", "--port", port, "--database-url", f"sqlite:///{tmp_path}/fresh.db")
        assert result.returncode == 1
        assert result.stderr == f"amhrpd: can't listen on 127.0.0.1 port {port}: Address already in use\n"
    assert (tmp_path / "text.db").read_text() == "just some notes\n"


@in_a_loop
async def test_start_waits_for_no_name_that_does_not_resolve(database: Path) -> None:
    code = (
        f"import socket, sys, time; sys.path.insert(0, {str(HERE)!r}); import amhrpd\n"
        "socket.getaddrinfo = lambda *_, **__: time.sleep(60)\n"
        "amhrpd.LISTEN_TIMEOUT_S = 0.5\n"
        "amhrpd.main(['--host', 'nobody.example'])"
    )
    process = Process(database, free_port(), {}, code)
    began_s = time.monotonic()
    assert await process.exit_code() == 1
    assert time.monotonic() - began_s < 10
    assert process.log == f"amhrpd: can't listen on nobody.example port {process.port}: no answer in time\n"


def test_start_with_hardly_any_open_files_ends_with_one_line(tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100)); import amhrpd; exit(amhrpd.main([]))"
    environ = os.environ | {"DATABASE_URL": f"sqlite:///{tmp_path}/fresh.db", "AMHRPD_PORT": "0"}
    result = subprocess.run(
        [sys.executable, "-c", limit], capture_output=True, text=True, cwd=HERE, env=environ, timeout=20, check=False
    )
    assert result.returncode == 1
    assert result.stderr == "amhrpd: the system allows 100 open files (ulimit -n): it must be 200 or more\n"


def test_variable_that_nobody_knows_ends_the_start_with_the_one_that_was_meant(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in ((), ("serve",), ("simulate",)):
        for wrong, meant in {"AMHRPD_TOKEN": "AMHRPD_API_TOKEN", "AMHRPD_PROT": "AMHRPD_PORT"}.items():
            with monkeypatch.context() as patch:
                patch.setenv(wrong, "token-of-callers")
                assert amhrpd.main(words) == 2
            assert capsys.readouterr().err == f"amhrpd: {wrong} is no setting: did you mean {meant}?\n"
    monkeypatch.setenv("AMHRPD_PORT", "no number")  # the gateway's own matter
    assert amhrpd.main(("simulate", "--devices", "0")) == 2
    assert capsys.readouterr().err == "amhrpd: --devices is '0': it must be a whole number from 1 to 9999\n"


def test_flag_that_nobody_knows_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words, where in ((("--prot", "1"), "amhrpd.py"), (("simulate", "--prot", "1"), "amhrpd.py simulate")):
        assert amhrpd.main(words) == 2
        shown = f"amhrpd: unrecognized arguments: --prot 1; '{where} --help' shows all flags\n"
        assert capsys.readouterr() == ("", shown)


@in_a_loop
async def test_tokens_are_in_no_log(database: Path) -> None:
    tokens: dict[str, Any] = {"AMHRPD_API_TOKEN": "api-token-0815", "AMHRPD_DEVICE_TOKEN": "device-token-4711"}
    async with process_on(database, AMHRPD_LOG_LEVEL="debug", **tokens) as (process, client):
        await client.get("/devices", 401)
        await client.get("/devices", headers={"Authorization": "Bearer api-token-0815x"}, status=401)
        async with await connect(process.port, "a?token=device-token-4711") as board:
            await say(board, "registration", device_type="ESP32", note="device-token")
        process.send_signal(signal.SIGTERM)
        assert await process.exit_code() == 0
        assert "listening" in process.log
        assert "api-token-0815" not in process.log
        assert "device-token-4711" not in process.log


# ======================================================================================================================
# At home under systemd
# ======================================================================================================================


class NotifySocket:
    """What systemd would hear."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address.replace("@", "\0", 1))
        self._socket.setblocking(False)
        self.heard: list[str] = []

    def __enter__(self) -> NotifySocket:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def listen(self) -> list[str]:
        """All datagrams so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.heard.append(self._socket.recv(4096).decode())
        return self.heard

    def heard_since(self, count: int, text: str) -> bool:
        return text in "\n".join(self.listen()[count:])


@in_a_loop
async def test_ready_comes_when_health_answers_and_stopping_comes_first(database: Path, tmp_path: Path) -> None:
    for number, address in enumerate((str(tmp_path / "notify"), f"@amhrpd-test-{os.getpid()}"), start=1):
        with NotifySocket(address) as systemd:
            async with gateway_on(database) as client:
                port = client.port
            environ = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "600000"}
            process = Process(database, port, environ, is_fresh=True)
            try:
                while "READY=1" not in systemd.listen():
                    assert process.is_running(), process.log
                    await asyncio.sleep(0.005)
                assert await process.answers()  # at the first try
                client = Client(port, client.session, database)
                async with aiohttp.ClientSession() as client.session, client.board("a"):
                    await client.post("/command?device_type=ESP32&command_name=x")
                    wanted = f"STATUS=1 devices online, {number} open commands"  # those of the earlier run are open again
                    await eventually(lambda text=wanted: systemd.heard_since(0, text))  # type: ignore[misc]
                    await eventually(lambda: systemd.heard_since(0, "WATCHDOG=1"))
                    count = len(systemd.listen())
                    process.send_signal(signal.SIGTERM)
                    assert await process.exit_code() == 0
                    rest = [
                        text for text in systemd.listen()[count:] if text != "WATCHDOG=1" and not text.startswith("STATUS=1")
                    ]
                    assert rest[0].startswith("STOPPING=1")
            finally:
                process.send_signal(signal.SIGKILL)
                await process.exit_code()


@in_a_loop
async def test_it_says_what_to_open(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with NotifySocket(str(tmp_path / "notify")) as systemd, logged() as events:
        for host in ("0.0.0.0", "127.0.0.1", "localhost"):
            async with gateway_on(database, host=host) as client:
                shown = named(events, "listening")[-1]["open"].split()
                name = f"{socket.gethostname().partition('.')[0]}.local" if host == "0.0.0.0" else host
                assert shown[-1] == f"http://{name}:{client.port}/"
                async with client.session.get(shown[0] + "health") as response:
                    assert response.status == 200
                await eventually(lambda shown=shown: systemd.heard_since(0, f"open {shown[0]}"))  # type: ignore[misc]


@in_a_loop
async def test_library_that_repeats_itself_is_logged_once_a_minute(database: Path) -> None:
    code = (
        "import logging, amhrpd\n"
        "amhrpd.configure_logging('info', 'json')\n"
        "def fail(number): logging.getLogger('aiohttp.server').error('failed %d', number, exc_info=ValueError())\n"
        "for number in range(50): fail(number)\n"
        "amhrpd.Repeats.WINDOW_S = 0\n"
        "fail(50)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, timeout=20, check=True)
    first, last = map(json.loads, result.stderr.splitlines())
    assert (first["library"], first["text"], "ValueError" in first["exception"]) == ("aiohttp.server", "failed 0", True)
    assert (last["text"], last["repeats"]) == ("failed 50", 49)


def test_flood_of_events_is_a_line_a_minute_whatever_they_are_about() -> None:
    with logged() as events:
        for number in range(3000):
            amhrpd.log.warning("open_command_ended_early", problem="newer ones need its place")
            amhrpd.log.info("command_routed", command_id=str(number))
            amhrpd.log.warning("message_refused", device_id=f"made_up_{number}")
        assert len(named(events, "open_command_ended_early")) == 1
        assert len(named(events, "command_routed")) == 3000  # each tells something else
        assert len(named(events, "message_refused")) <= amhrpd.Repeats.MAX_KEYS


@in_a_loop
async def test_what_repeats_itself_is_kept_small(database: Path) -> None:
    def resident_mb() -> float:
        status = Path(f"/proc/{process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024

    async with process_on(database) as (process, client), client.board("a") as board:
        before_mb = resident_mb()
        for number in range(150):
            await say(board, "error", error_code=f"E{number}", error_message="m", context=[[]] * 15_000)
            await client.get("/health")
        assert resident_mb() - before_mb < 40


def test_log_lines_that_nobody_takes_stop_nothing_and_are_counted() -> None:
    code = (
        "import sys, time, amhrpd\n"
        "amhrpd.LogLines.MAX_LINES = 500\n"
        "amhrpd.configure_logging('info', 'json')\n"
        "for number in range(5000): amhrpd.log.info('line', number=number)\n"  # 500 KB; a pipe holds 64
        "print('done', flush=True)\n"
        "sys.stdin.read()\n"
        "for number in range(100): time.sleep(0.01); amhrpd.log.info('line', number=number)"
    )
    popen = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=HERE
    )
    assert popen.stdout is not None
    assert popen.stdout.readline() == b"done\n"
    _, shown = popen.communicate(timeout=20)
    events = [json.loads(line) for line in shown.splitlines()]
    dropped = sum(event.get("lines_dropped", 0) for event in events)
    assert dropped > 1000
    assert len(events) + dropped == 5100


@in_a_loop
async def test_defect_in_the_upkeep_is_a_stop_in_order_with_exit_code_1(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    with logged() as events:
        async with gateway_on(database, exit_code=1) as client, client.board("a") as board:
            monkeypatch.setattr(amhrpd.Gateway, "sweep", fail)
            assert await closed_with(board) == 1001
        assert "ZeroDivisionError" in named(events, "failed")[0]["exception"]
        assert named(events, "stopped")
    assert rows_of(database, "SELECT count(*) FROM devices WHERE is_online") == [(0,)]


@in_a_loop
async def test_file_that_is_not_what_it_was_is_a_stop_in_order_with_exit_code_1(database: Path) -> None:
    with logged() as events:
        async with gateway_on(database, exit_code=1) as client, client.board("a") as board:
            client.store.is_lost.set()
            assert await closed_with(board) == 1001
        (failed,) = named(events, "failed")
        assert (failed["error"], "exception" in failed) == ("the database's file is not what it was", False)
        assert named(events, "stopped")[0]["exit_code"] == 1
    assert rows_of(database, "SELECT count(*) FROM devices WHERE is_online") == [(0,)]


@in_a_loop
async def test_start_that_takes_its_time_says_so(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_store = amhrpd.Store.open

    async def open_slowly(self: amhrpd.Store, on_loaded: Any, on_progress: Callable[[str], None], stop: asyncio.Event) -> None:
        on_progress("making an index")
        await open_store(self, on_loaded, on_progress, stop)

    monkeypatch.setattr(amhrpd.Store, "open", open_slowly)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with NotifySocket(str(tmp_path / "notify")) as systemd, logged() as events:
        async with gateway_on(database):
            heard = systemd.listen()
            assert heard.index("STATUS=making an index\nEXTEND_TIMEOUT_USEC=600000000") < heard.index("READY=1")
        assert named(events, "starting")[0]["progress"] == "making an index"


@in_a_loop
async def test_watchdog_stops_when_the_loop_is_blocked(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "300000")
    with NotifySocket(str(tmp_path / "notify")) as systemd:
        async with gateway_on(database):
            await eventually(lambda: systemd.heard_since(0, "WATCHDOG=1"))
            systemd.listen()
            time.sleep(0.5)  # the loop, blocked for real, for five pings
            assert "WATCHDOG=1" not in systemd.listen()[len(systemd.heard) :]
            count = len(systemd.listen())
            await eventually(lambda: systemd.heard_since(count, "WATCHDOG=1"))


@in_a_loop
async def test_watchdog_stops_when_the_writer_has_died(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "300000")
    with NotifySocket(str(tmp_path / "notify")) as systemd:
        async with gateway_on(database, exit_code=1) as client:
            await eventually(lambda: systemd.heard_since(0, "WATCHDOG=1"))
            monkeypatch.setattr(amhrpd.Database, "commit", fail)
            await client.post("/command?device_type=none&command_name=x")
            await eventually(lambda: health_is(client, 503))
            count = len(systemd.listen())
            health = await client.get("/health", 503)
            assert (health["status"], health["database"]) == ("degraded", "the writer has died")
            async with client.board("a") as board, background(answer_commands(board)):  # and the robot still obeys
                answer = await client.post("/command?device_type=ESP32&command_name=stop&wait=5")
                assert (answer["status"], answer["persisted"]) == ("ack_success", False)
                await eventually(lambda: systemd.heard_since(count, "STATUS=1 devices online"))
            assert not systemd.heard_since(count, "WATCHDOG=1")


@in_a_loop
async def test_watchdog_goes_on_while_the_disk_stalls(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "300000")
    monkeypatch.setattr(amhrpd.Writer, "STALLED_S", 0.3)
    with NotifySocket(str(tmp_path / "notify")) as systemd:
        async with gateway_on(database) as client, client.board("a") as board:
            with disk_that_stalls(database):
                await say(board, "status", payload={"a": 1})
                await eventually(lambda: health_is(client, 503))
                count = len(systemd.listen())
                await eventually(lambda: "\n".join(systemd.listen()[count:]).count("WATCHDOG=1") >= 3)
            await eventually(lambda: health_is(client, 200))


async def health_is(client: Client, status: int) -> bool:
    return (await client.ask("GET", "/health"))[0] == status


@contextlib.contextmanager
def disk_that_stalls(database: Path) -> Iterator[None]:
    """Nothing can be committed until the end: the file is locked."""
    with contextlib.closing(sqlite3.connect(database, isolation_level=None, timeout=10)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


@contextlib.contextmanager
def disk_that_stalls_later(database: Path) -> Iterator[Callable[[], None]]:
    """The same from a call of what is yielded on, until the next call."""
    with contextlib.ExitStack() as stack:
        is_stalled = False

        def stall() -> None:
            nonlocal is_stalled
            if is_stalled:
                stack.close()
            else:
                stack.enter_context(disk_that_stalls(database))
            is_stalled = not is_stalled

        yield stall


def test_unit_is_what_systemd_takes() -> None:
    unit = (HERE / "amhrpd.service").read_text()
    values = dict(re.findall(r"^([A-Za-z]+)=(.*)$", unit, re.MULTILINE))
    assert values["Type"] == "notify"
    bound_s = amhrpd.Gateway.STOP_TIMEOUT_S + amhrpd.HANDLERS_TIMEOUT_S + amhrpd.STORE_CLOSE_TIMEOUT_S + 1
    assert int(values["TimeoutStopSec"].removesuffix("s")) > bound_s
    assert "TOKEN" not in "".join(line for line in unit.splitlines() if not line.startswith("#"))
    for name in re.findall(r"(AMHRPD_[A-Z_]+|DATABASE_URL)=", unit):
        assert name in {amhrpd.variable_of(field.name) for field in msgspec.structs.fields(amhrpd.Settings)}


@needing_tool("systemd-analyze", "to look at the unit with")
def test_unit_has_no_mistake_and_is_closely_confined() -> None:
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(HERE / "amhrpd.service")], capture_output=True, text=True, check=False
    )
    # The program is there only once it is installed.
    complaints = [line for line in result.stderr.splitlines() if "/opt/amhrpd/.venv/bin/python" not in line]
    assert [line for line in complaints if "amhrpd.service" in line] == []
    result = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=15", str(HERE / "amhrpd.service")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout


@in_a_loop
async def test_journal_lines_bear_their_priority_and_are_one_each(database: Path) -> None:
    async with process_on(database, AMHRPD_LOG_FORMAT="journal", AMHRPD_API_TOKEN="some-token") as (process, client):
        async with client.board("a", None) as board:
            await say(board, "alert", device_type="ESP32", alert_type="collision", message='two\nlines "quoted" \x1b[31m')
            await eventually(lambda: "device_alert" in process.log)
        await client.get("/devices", 401)
        process.send_signal(signal.SIGTERM)
        assert await process.exit_code() == 0
    lines = process.log.splitlines()
    assert all(re.match(r"<[346]>[a-z_]+( |$)", line) for line in lines), process.log
    (alert,) = [line for line in lines if "device_alert" in line]
    assert alert.startswith("<4>device_alert device_id=a type=collision ")
    assert "\x1b" not in alert
    assert any(line.startswith("<6>listening ") for line in lines)


@in_a_loop
async def test_inherited_journal_stream_makes_no_journal_of_a_file(database: Path) -> None:
    async with process_on(database, JOURNAL_STREAM="8:12345") as (process, _):
        await eventually(lambda: process.log)
        assert json.loads(process.log.splitlines()[0])["event"] == "listening"
    code = f"import os, sys; sys.path.insert(0, {str(HERE)!r}); import amhrpd; "
    code += "s = os.fstat(2); os.environ['JOURNAL_STREAM'] = f'{s.st_dev}:{s.st_ino}'; sys.exit(amhrpd.main([]))"
    async with process_on(database, code=code) as (process, _):
        await eventually(lambda: process.log)
        assert process.log.startswith("<6>listening "), process.log


@in_a_loop
async def test_clock_that_jumped_between_two_runs_ends_no_command(database: Path) -> None:
    async with gateway_on(database) as client, client.board("a"):
        answer = await client.post("/command?device_id=a&command_name=x")
    with contextlib.closing(sqlite3.connect(database)) as db, db:
        db.execute("UPDATE command_logs SET created_at = '2020-01-01 00:00:00.000000'")
    async with gateway_on(database, command_timeout_s=300) as client, client.board("a") as board:
        path = f"/command-logs/{answer['command_id']}"
        assert (await client.get(path))["status"] == "sent"
        await say(board, "command_ack", command_id=answer["command_id"])
        await eventually(lambda: row_has(client, path, status="ack_success"))


@in_a_loop
async def test_stop_under_load_loses_nothing(database: Path) -> None:
    """SIGTERM while boards send as fast as they can: what the gateway took is in the file, and it ends with 0, soon."""
    sent = 0

    async def flood(board: ClientConnection) -> None:
        nonlocal sent
        while True:
            await say(board, "status", payload={"n": sent})
            sent += 1
            await asyncio.sleep(0)

    async with process_on(database, AMHRPD_COMMIT_INTERVAL="60") as (process, client):
        boards = [await connect(client.port, f"b{n}") for n in range(5)]
        for board in boards:
            await say(board, "registration", device_type="ESP32")
        async with background(*(flood(board) for board in boards)):
            await eventually(lambda: sent > 3000)
            last = await client.get("/devices")
            began_s = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert await process.exit_code() == 0
            assert time.monotonic() - began_s < 8
        assert [await closed_with(board) for board in boards] == [1001] * 5
    for device in last["devices"]:
        if device["state"] is not None:
            stored = rows_of(
                database,
                "SELECT max(json_extract(state_data, '$.n')) FROM device_state_snapshots WHERE device_id = ?",
                device["device_id"],
            )
            assert stored[0][0] >= device["state"]["n"]
    assert rows_of(database, "SELECT count(*) FROM devices WHERE is_online") == [(0,)]
    assert rows_of(database, "SELECT event, count(*) FROM device_connection_logs GROUP BY event ORDER BY event") == [
        ("connected", 5),
        ("disconnected", 5),
    ]


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.mark.parametrize(
    "host", ["127.0.0.1", pytest.param("[::1]", marks=pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6"))]
)
@in_a_loop
async def test_both_ip_families_are_served(database: Path, host: str) -> None:
    async with gateway_on(database, host="0.0.0.0") as client:
        async with client.session.get(f"http://{host}:{client.port}/health") as response:
            assert response.status == 200
        async with client.board("a"):
            events = (await client.get("/device-connection-history/a"))["events"]
            assert events[0]["details"]["peer"] == "127.0.0.1"


# ======================================================================================================================
# Nothing lost: faults of the store
# ======================================================================================================================


@in_a_loop
async def test_board_that_waits_for_its_turn_is_not_taken_for_a_dead_one(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amhrpd, "UPKEEP_INTERVAL_S", 0.05)
    monkeypatch.setattr(amhrpd.Backlog, "CONGESTED_BYTES", 0)
    async with gateway_on(database, ping_interval_s=0.2) as client, contextlib.AsyncExitStack() as stack:
        boards = [await stack.enter_async_context(client.board(f"busy_{number}")) for number in range(8)]
        with disk_that_stalls(database):
            began_s = time.monotonic()
            for number in range(2 * amhrpd.DeviceSocket.TURN_FRAMES):  # between the two turns all of them wait for a second
                for board in boards:
                    await say(board, "status", payload={"n": number})
            for n in range(8):
                await eventually(lambda: state_is(client, f"busy_{n}", {"n": number}))  # noqa: B023 - awaited at once
            assert time.monotonic() - began_s < 8  # a second a board would be twice that
        for n in range(8):
            assert await client.events(f"busy_{n}") == ["connected"]


@in_a_loop
async def test_kill_9_loses_no_answered_command_and_only_young_telemetry(database: Path) -> None:
    taken: list[str] = []
    sent_s: list[float] = []

    async def order(client: Client) -> None:
        while True:
            answer = await client.post("/command?device_type=ESP32&command_name=x")
            if answer.get("persisted", True):
                taken.append(answer["command_id"])

    async def report(board: ClientConnection) -> None:
        while True:
            await say(board, "status", payload={"n": len(sent_s)})
            sent_s.append(time.monotonic())
            await asyncio.sleep(0.002)

    async with (
        process_on(database, AMHRPD_COMMIT_INTERVAL="0.3") as (process, client),
        client.board("a") as board,
        background(answer_commands(board), report(board), order(client)),
    ):
        await eventually(lambda: len(taken) > 100 and len(sent_s) > 500)
        process.send_signal(signal.SIGKILL)
        killed_s = time.monotonic()
        await process.exit_code()
    stored = {command_id for (command_id,) in rows_of(database, "SELECT command_id FROM command_logs")}
    assert set(taken) <= stored
    snapshots = {n for (n,) in rows_of(database, "SELECT json_extract(state_data, '$.n') FROM device_state_snapshots")}
    assert {n for n, moment_s in enumerate(sent_s) if moment_s < killed_s - 0.8} <= snapshots
    assert rows_of(database, "PRAGMA integrity_check") == [("ok",)]
    assert rows_of(database, "PRAGMA foreign_key_check") == []
    async with gateway_on(database) as client:
        assert await client.events("a") == ["connected", "disconnected"]
        assert not await client.is_online("a")


@in_a_loop
async def test_full_disk_stops_no_command_and_loses_nothing_of_what_waits(database: Path) -> None:
    """A file-size limit on the running daemon: SQLite's writes fail as on a full disk, until it is lifted."""
    async with process_on(database) as (process, client), client.board("a") as board, background(answer_commands(board)):
        await say(board, "status", payload={"n": 0})
        await eventually(lambda: state_is(client, "a", {"n": 0}))
        await client.get("/state-history/a")
        unlimited = resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        for n in range(1, 200):
            await say(board, "status", payload={"n": n, "text": "x" * 500})
        await eventually(lambda: health_is(client, 503))
        health = await client.get("/health", 503)
        assert health["status"] == "degraded"
        assert "can't write the database: " in health["database"]
        assert health["rows_waiting"] > 0
        began_s = time.monotonic()
        answer = await client.post("/command?device_type=ESP32&command_name=stop&wait=5")
        assert time.monotonic() - began_s < 1.5
        assert (answer["status"], answer["persisted"]) == ("ack_success", False)
        began_s = time.monotonic()
        assert (await client.get("/state-history/a", 503))["error_code"] == "STORE_UNAVAILABLE"
        assert time.monotonic() - began_s < 5  # a tenth of it, and not the 20 s that it would have to wait for a slow disk
        assert await client.is_online("a")
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, unlimited)
        await eventually(lambda: health_is(client, 200))
        states = (await client.get("/state-history/a?limit=1000"))["states"]
        assert [state["state_data"]["n"] for state in states] == list(range(199, -1, -1))
        row = await client.get(f"/command-logs/{answer['command_id']}")
        assert (row["status"], row["success_count"]) == ("ack_success", 1)
        assert "database_write_failed" in process.log
        assert process.log.count("database_write_failed") == 1
        assert "Traceback" not in process.log


def leave(database: Path) -> None:
    """What a run leaves that was killed while it drove a board."""
    with contextlib.closing(sqlite3.connect(database)) as db, db:
        db.execute("UPDATE devices SET is_online = 1, disconnected_at = NULL")
        db.execute("UPDATE device_connection_logs SET event = 'connected' WHERE event = 'disconnected'")
        db.execute("INSERT INTO amhrpd_deadmen VALUES ('a', 'halt', '{}')")


async def serves_without_its_file(client: Client, heal: Callable[[], Any], known: list[str]) -> None:
    """What a gateway does whose file can't be opened yet, and when it can be. `known` are the events of `a` in the file."""
    assert "can't open the database: " in (await client.get("/health", 503))["database"]
    async with client.board("a", None) as board:
        await say(board, "status", device_type="ESP32", payload={"while": "it couldn't"})
        await eventually(lambda: client.is_online("a"))
        async with background(answer_commands(board)):
            answer = await client.post("/command?device_id=a&command_name=stop&wait=5")
            assert (answer["status"], answer["persisted"]) == ("ack_success", False)
        heal()
        await eventually(lambda: health_is(client, 200))
        assert (await client.get(f"/command-logs/{answer['command_id']}"))["status"] == "ack_success"
        assert await client.events("a") == [*known, "connected"]
        states = (await client.get("/state-history/a?limit=2"))["states"]
        assert states[0]["state_data"] == {"while": "it couldn't"}
        if known:
            assert states[1]["state_data"]["n"] == 29
            assert (await hear(board, "command"))["command_name"] == "halt"  # which the last run left
            await eventually(lambda: is_disarmed(client, "a"))
            assert rows_of(client.database, "SELECT metadata_json FROM devices") == [('{"name":"it is a"}',)]


KNOWN = ["connected", "connected", "disconnected"]  # `leave` has no second one


@pytest.mark.parametrize("is_new", [False, True], ids=["old file", "new file"])
@in_a_loop
async def test_start_on_a_full_disk_serves_and_catches_up(database: Path, is_new: bool) -> None:
    """A file-size limit: SQLite's writes fail as on a full disk, until it is lifted."""
    limit = f"import resource, sys; sys.path.insert(0, {str(HERE)!r}); import amhrpd; "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY)); sys.exit(amhrpd.main([]))"
    if not is_new:
        await fill(database, 30)
        leave(database)
    async with process_on(database, code=limit) as (process, client):
        no_limit = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        heal = functools.partial(resource.prlimit, process.pid, resource.RLIMIT_FSIZE, no_limit)
        await serves_without_its_file(client, heal, [] if is_new else KNOWN)
        process.send_signal(signal.SIGTERM)
        assert await process.exit_code() == 0
        assert (process.log.count("database_write_failed"), "Traceback" in process.log) == (1, False)
    async with process_on(database.with_name("none.db"), code=limit) as (process, client):
        began_s = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert await process.exit_code() == 0  # nothing was lost
        assert time.monotonic() - began_s < 5


@pytest.mark.root
@pytest.mark.parametrize("is_new", [False, True], ids=["old file", "new file"])
@in_a_loop
async def test_start_on_a_read_only_disk_serves_and_catches_up(tmp_path: Path, is_new: bool) -> None:
    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(tmp_path / "card")], check=True)

    with small_disk(tmp_path / "card", "24m"):
        database = tmp_path / "card" / "amhrpd.db"
        if not is_new:
            await fill(database, 30)
            leave(database)
        remount("ro")
        async with gateway_on(database) as client:
            await serves_without_its_file(client, functools.partial(remount, "rw"), [] if is_new else KNOWN)


@in_a_loop
async def test_start_on_a_disk_that_stalls_serves_and_catches_up(database: Path) -> None:
    await fill(database, 30)
    leave(database)
    with disk_that_stalls_later(database) as stall:
        stall()
        async with gateway_on(database) as client:
            await serves_without_its_file(client, stall, KNOWN)


@in_a_loop
async def test_slow_disk_holds_a_command_up_for_a_second_at_most(database: Path) -> None:
    async with gateway_on(database) as client, client.board("a") as board, background(answer_commands(board)):
        with disk_that_stalls(database):
            began_s = time.monotonic()
            answer = await client.post("/command?device_type=ESP32&command_name=stop")
            assert 0.9 < time.monotonic() - began_s < 1.5
            assert (answer["status"], answer["persisted"]) == ("sent", False)
            began_s = time.monotonic()
            assert (await client.post("/command?device_type=ESP32&command_name=stop"))["persisted"] is False
            assert time.monotonic() - began_s < 0.5  # known by now
            assert await client.is_online("a")
        row = await eventually(lambda: row_has(client, f"/command-logs/{answer['command_id']}", status="ack_success"))
        assert row["success_count"] == 1


@in_a_loop
async def test_long_commit_interval_costs_no_snapshot(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amhrpd.Backlog, "CONGESTED_BYTES", 100_000)
    monkeypatch.setattr(amhrpd.Backlog, "LIMIT_BYTES", 1_000_000)
    async with contextlib.AsyncExitStack() as stack, gateway_on(database, commit_interval_s=3600) as client:
        boards = [await stack.enter_async_context(client.board(f"b{number}")) for number in range(60)]
        for number, board in enumerate(boards):
            for n in range(3):
                await say(board, "status", payload={"n": n, "text": "x" * 10_000})
            await eventually(lambda number=number: in_state(client, f"b{number}"))  # type: ignore[misc]
        health = await client.get("/health")
        assert (health["rows_dropped"], health["rows_waiting"] < 100) == (0, True)


async def in_state(client: Client, device_id: str) -> bool:
    state = (await client.get(f"/devices/{device_id}"))["state"]
    return bool(state and state["n"] == 2)


@in_a_loop
async def test_slow_disk_makes_no_timeout_of_what_was_not_sent(database: Path) -> None:
    async with gateway_on(database) as client, client.board("a"):
        with disk_that_stalls(database):
            answer = await client.post("/command", {"device_type": "ESP32", "command_name": "stop", "timeout": 1})
            assert (answer["status"], answer["persisted"]) == ("sent", False)


@in_a_loop
async def test_slow_question_about_history_holds_up_no_command(database: Path) -> None:
    async with gateway_on(database) as client, client.board("a") as board, background(answer_commands(board)):
        is_reading, may_end = threading.Event(), threading.Event()

        def linger(*_: Any) -> None:
            if threading.current_thread().name.startswith("store-reader") and not is_reading.is_set():
                is_reading.set()
                may_end.wait(PATIENCE_S)

        sa.event.listen(sa.Engine, "before_cursor_execute", linger)
        reading = asyncio.create_task(client.get("/state-history/a"))
        try:
            await eventually(is_reading.is_set)
            answer = await client.post("/command?device_id=a&command_name=x&wait=5")
            assert (answer["status"], answer.get("persisted", True)) == ("ack_success", True)
            assert (await client.get("/command-logs"))["total"] == 1  # nor a question that is cheap
        finally:
            may_end.set()
            found = await reading
            sa.event.remove(sa.Engine, "before_cursor_execute", linger)
        assert found["total"] == 0


@in_a_loop
async def test_kills_at_any_moment_lose_no_answered_command(database: Path) -> None:
    """Three of them: while it starts, while it works, and while it stops."""
    taken: list[str] = []

    async def order(client: Client) -> None:
        while True:
            with contextlib.suppress(aiohttp.ClientError, AssertionError):
                answer = await client.post("/command?device_type=none&command_name=x")
                if answer.get("persisted", True):
                    taken.append(answer["command_id"])
            await asyncio.sleep(0)

    for moment in ("starting", "working", "stopping"):
        process = Process(database, free_port(), {})
        async with aiohttp.ClientSession() as session, background(order(Client(process.port, session, database))):
            if moment == "starting":
                await eventually(database.exists, within_s=20)
            else:
                count = len(taken)
                await eventually(lambda count=count: len(taken) > count + 50)  # type: ignore[misc]
                if moment == "stopping":
                    process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGKILL)
            await process.exit_code()
    stored = {command_id for (command_id,) in rows_of(database, "SELECT command_id FROM command_logs")}
    assert len(taken) > 100
    assert set(taken) <= stored
    assert rows_of(database, "PRAGMA integrity_check") == [("ok",)]


@in_a_loop
async def test_stop_waits_for_a_disk_that_stalls_for_a_while(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amhrpd.Writer, "RETRY_S", 0.1)
    monkeypatch.setattr(amhrpd, "LOCK_TIMEOUT_S", 0.1)
    with disk_that_stalls_later(database) as stall:

        async def let_go() -> None:
            await eventually(lambda: client.gateway.is_stopping)
            await asyncio.sleep(0.5)  # longer than SQLite itself waits
            stall()

        async with background() as tasks, gateway_on(database) as client, client.board("a") as board:
            stall()
            await say(board, "status", payload={"a": 1})
            await eventually(lambda: health_is(client, 503))
            tasks.append(asyncio.create_task(let_go()))
    assert rows_of(database, "SELECT state_data FROM device_state_snapshots") == [('{"a":1}',)]
    assert rows_of(database, "SELECT event FROM device_connection_logs") == [("connected",), ("disconnected",)]


@in_a_loop
async def test_stop_before_a_disk_that_stalls_is_bounded_and_says_what_is_lost(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amhrpd, "STORE_CLOSE_TIMEOUT_S", 0.5)
    monkeypatch.setattr(amhrpd, "LOCK_TIMEOUT_S", 0.1)
    with logged() as events, disk_that_stalls_later(database) as stall:
        async with gateway_on(database, exit_code=1) as client, client.board("a") as board:
            stall()
            await say(board, "status", payload={"a": 1})
            await eventually(lambda: health_is(client, 503))
            began_s = time.monotonic()
        assert time.monotonic() - began_s < 5
    assert named(events, "rows_lost")
    assert named(events, "stopped")[0]["exit_code"] == 1


@in_a_loop
async def test_memory_for_a_disk_that_stays_away_is_bounded_and_dropping_is_counted(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amhrpd.Backlog, "LIMIT_BYTES", 50_000)
    async with gateway_on(database) as client, client.board("a") as board, background(answer_commands(board)):
        with disk_that_stalls(database):
            for n in range(300):
                await say(board, "status", payload={"n": n})
            await eventually(lambda: state_is(client, "a", {"n": 299}))
            await eventually(lambda: health_is(client, 503))
            health = await client.get("/health", 503)
            assert health["rows_dropped"] > 100
            answer = await client.post("/command?device_type=ESP32&command_name=stop&wait=5")
            assert answer["status"] == "ack_success"
        states = (await client.get("/state-history/a?limit=1000"))["states"]
        kept = [state["state_data"]["n"] for state in states]
        assert kept == list(range(len(kept) - 1, -1, -1))  # the oldest, without a gap
        assert len(kept) == 300 - health["rows_dropped"]
        assert (await client.get(f"/command-logs/{answer['command_id']}"))["status"] == "ack_success"


@in_a_loop
async def test_what_waits_for_a_disk_that_stays_away_is_counted_and_bounded(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amhrpd.Backlog, "LIMIT_BYTES", 15_000)  # ten commands
    async with gateway_on(database) as client, client.board("a") as board:
        await client.get("/state-history/a")
        with disk_that_stalls(database), monkeypatch.context() as impatient:
            impatient.setattr(amhrpd.Store, "READ_TIMEOUT_S", 0.05)
            impatient.setattr(amhrpd.Store, "FAILING_READ_TIMEOUT_S", 0.05)
            await say(board, "status", payload={})
            await eventually(lambda: health_is(client, 503))
            waiting = (await client.get("/health", 503))["rows_waiting"]
            for _ in range(5):
                await client.get("/state-history/a", 503)
            health = await client.get("/health", 503)
            assert (health["rows_waiting"] - waiting < 2, health["rows_dropped"]) == (True, 0)
            ids = [(await client.post("/command?device_id=a&command_name=x"))["command_id"] for _ in range(30)]
            health = await client.get("/health", 503)
            kept = health["rows_waiting"] - waiting
            assert 5 < kept < 12
            assert health["rows_dropped"] >= 30 - kept
        await eventually(lambda: health_is(client, 200))
        assert [row["command_id"] for row in (await client.get("/command-logs"))["logs"]] == ids[kept - 1 :: -1]


@in_a_loop
async def test_row_that_can_never_be_written_does_not_hold_up_the_rest(database: Path) -> None:
    async with gateway_on(database) as client, client.board("a") as board:
        with contextlib.closing(sqlite3.connect(database)) as db, db:
            db.execute(
                "CREATE TRIGGER poison BEFORE INSERT ON device_state_snapshots WHEN new.state_data LIKE '%poison%' "
                "BEGIN SELECT RAISE(ABORT, 'poisoned'); END"
            )
        with logged() as events:
            for n in range(100):
                await say(board, "status", payload={"n": n, "kind": "poison" if n == 50 else "good"})
            await eventually(lambda: state_is(client, "a", {"n": 99, "kind": "good"}))
            states = (await client.get("/state-history/a?limit=1000"))["states"]
        assert [state["state_data"]["n"] for state in states] == [n for n in range(99, -1, -1) if n != 50]
        health = await client.get("/health")
        assert (health["status"], health["rows_rejected"]) == ("ok", 1)
        (event,) = named(events, "row_rejected")
        assert "poisoned" in event["problem"]


@in_a_loop
async def test_row_that_is_refused_leaves_no_deadman_armed(database: Path) -> None:
    async with gateway_on(database) as client, client.board("a") as board, background(answer_commands(board)):
        await client.post("/command", driving(60, "a"))
        await eventually(lambda: len(client.rows("SELECT * FROM amhrpd_deadmen")) == 1)
        with contextlib.closing(sqlite3.connect(database)) as db, db:
            db.execute(
                "CREATE TRIGGER poison BEFORE INSERT ON command_logs WHEN new.command_name = 'stop' "
                "BEGIN SELECT RAISE(ABORT, 'poisoned'); END"
            )
        await client.post("/command?device_id=a&command_name=stop&wait=5")
        await client.get("/command-logs")  # nothing waits any more
        assert client.rows("SELECT * FROM amhrpd_deadmen") == []


def spoil(database: Path, page: int, after: int = 0) -> None:
    """Overwrite one page with rubbish, as a dying SD card does."""
    with database.open("r+b") as file:
        file.seek(4096 * page + after)
        file.write(random.Random(1).randbytes(4096 - after))


async def fill(database: Path, snapshots: int) -> None:
    async with gateway_on(database) as client, client.board("a", metadata={"name": "it is a"}) as board:
        for n in range(snapshots):
            await say(board, "status", payload={"n": n, "text": "x" * 300})
        await eventually(lambda: state_is(client, "a", {"n": snapshots - 1, "text": "x" * 300}))


@in_a_loop
async def test_damaged_file_is_moved_aside_at_the_start_and_said_loudly(database: Path) -> None:
    await fill(database, 300)
    spoil(database, 0, after=100)  # it still says that it is SQLite
    before = database.read_bytes()
    with logged() as events:
        async with gateway_on(database) as client, client.board("b") as board:
            assert "corrupt" in (await client.get("/health"))["notice"]
            (event,) = named(events, "database_corrupt")
            assert event["level"] == "error"
            aside = Path(event["moved_to"])
            assert re.fullmatch(r"amhrpd\.db\.corrupt-\d{8}T\d{6}\.\d{6}Z", aside.name)
            assert aside.read_bytes() == before
            await say(board, "status", payload={"n": 1})
            await eventually(lambda: state_is(client, "b", {"n": 1}))
            assert (await client.get("/state-history/b"))["total"] == 1


async def ends(*boards: ClientConnection) -> list[list[str]]:
    """What the boards are told while the gateway ends in order."""
    heard: list[list[tuple[str, float]]] = [[] for _ in boards]
    await asyncio.gather(*(commands_heard(board, list_) for board, list_ in zip(boards, heard, strict=True)))
    assert {await closed_with(board) for board in boards} == {1001}
    return [[name for name, _ in list_] for list_ in heard]


@in_a_loop
async def test_damage_that_is_found_when_something_is_written_ends_the_gateway_in_order(database: Path) -> None:
    await fill(database, 300)
    ((page,),) = rows_of(database, "SELECT rootpage FROM sqlite_master WHERE name = 'ix_amhrpd_commands_time'")
    spoil(database, page - 1)
    with logged() as events:
        async with gateway_on(database, exit_code=1) as client, client.board("b") as board:
            answer = await client.post("/command", driving(60, "b"))
            assert (answer["status"], answer["persisted"]) == ("sent", False)
            assert await ends(board) == [["forward", "stop"]]
    assert "damaged" in named(events, "database_lost")[0]["reason"]
    assert named(events, "rows_lost")[0]["rows"] > 0
    assert len(list(database.parent.glob("amhrpd.db.corrupt-*Z"))) == 1
    assert not database.exists()
    async with gateway_on(database) as client:  # as systemd starts it again
        assert (await client.get("/devices"))["total"] == 0
    assert len(list(database.parent.glob("*.corrupt-*"))) == 1


@in_a_loop
async def test_damage_that_only_a_reader_finds_ends_nothing(database: Path) -> None:
    await fill(database, 3000)
    spoil(database, 60)
    async with gateway_on(database) as client, client.board("b") as board, background(answer_commands(board)):
        statuses = {(await client.ask("GET", f"/state-history/a?before_id={3000 - n}"))[0] for n in range(0, 2900, 90)}
        assert statuses == {200, 503}
        assert "persisted" not in await client.post("/command?device_id=b&command_name=x&wait=5")


async def notice(client: Client) -> Any:
    return (await client.ask("GET", "/health"))[1].get("notice")


@in_a_loop
async def test_log_that_nobody_reads_stops_nothing(database: Path) -> None:
    reading, writing = os.pipe()
    port = free_port()
    environ = os.environ | {"DATABASE_URL": f"sqlite:///{database}", "AMHRPD_PORT": str(port), "AMHRPD_HOST": "127.0.0.1"}
    popen = subprocess.Popen([sys.executable, str(HERE / "amhrpd.py")], stderr=writing, env=environ)
    os.close(writing)
    try:
        async with aiohttp.ClientSession() as session:
            client = Client(port, session, database)
            await eventually(client.is_up)
            for _ in range(300):  # 110 KB of log; a pipe holds 64
                await client.post("/command?device_type=none&command_name=" + "x" * 200)
            assert (await client.get("/health"))["status"] == "ok"
            popen.terminate()
            await eventually(lambda: popen.poll() is not None)
            assert popen.returncode == 0
    finally:
        os.close(reading)
        popen.kill()
        popen.wait()
    assert rows_of(database, "SELECT count(*) FROM command_logs") == [(300,)]


@pytest.mark.parametrize("is_linked", [False, True], ids=["", "linked"])
@pytest.mark.parametrize("what", ["moved", "deleted", "a backup in its place", "no database in its place"])
@in_a_loop
async def test_file_that_is_not_in_its_place_any_more_ends_the_gateway_in_order(
    database: Path, what: str, is_linked: bool
) -> None:
    """The log that belongs to it goes with it, and a restart works on what lies there then."""
    archive, backup, file = (database.with_name(name) for name in ("archive.db", "backup.db", "real.db"))
    if is_linked:
        database.symlink_to(file)
    else:
        file = database
    with logged() as events:
        async with gateway_on(database, exit_code=1) as client, client.board("a") as board:
            await client.post("/command?device_type=none&command_name=in+both")
            with contextlib.closing(sqlite3.connect(file)) as db, contextlib.closing(sqlite3.connect(backup)) as other:
                db.backup(other)
            for n in range(500):
                await say(board, "status", payload={"n": n})
            await eventually(lambda: state_is(client, "a", {"n": 499}))
            await client.post("/command", driving(60, "a"))
            await client.get("/command-logs")  # nothing waits any more
            match what:
                case "moved":
                    file.rename(archive)
                case "deleted":
                    file.unlink()
                case "a backup in its place":
                    backup.rename(file)
                case _:
                    archive.write_text("about devices and command_logs\n")
                    archive.rename(file)
            await client.post("/command?device_type=none&command_name=too+late")
            assert await ends(board) == [["forward", "stop"]]
    assert "was deleted, moved or replaced" in named(events, "database_lost")[0]["reason"]
    assert named(events, "rows_lost")[0]["rows"] > 0
    names = "SELECT command_name FROM command_logs ORDER BY created_at"
    assert not list(file.parent.glob(f"{file.name}-*"))
    if what == "moved":
        assert rows_of(archive, names) == [("in both",), ("forward",)]
        assert rows_of(archive, "SELECT count(*) FROM device_state_snapshots") == [(500,)]
        assert rows_of(archive, "PRAGMA integrity_check") == [("ok",)]
    if what == "no database in its place":
        with pytest.raises(amhrpd.StartError, match="no SQLite database"):
            async with gateway_on(database):
                pass
        assert file.read_text() == "about devices and command_logs\n"
        return
    async with gateway_on(database) as client:
        found = [row["command_name"] for row in (await client.get("/command-logs"))["logs"]]
        assert found == (["in both"] if what == "a backup in its place" else [])
    assert rows_of(database, "PRAGMA integrity_check") == [("ok",)]
    assert not list(database.parent.glob("*.corrupt-*"))


@in_a_loop
async def test_what_never_was_sqlite_is_never_moved(database: Path) -> None:
    await fill(database, 30)
    whole = database.read_bytes()
    rubbish = random.Random(1).randbytes(4096) + whole[4096:], bytes(4096) + whole[4096:]  # nothing tells that it was SQLite
    for content in (b"\n", b"CREATE TABLE device_state_snapshots (id INTEGER);\n", b"device_state_snapshots " * 1000, *rubbish):
        database.write_bytes(content)
        with pytest.raises(amhrpd.StartError, match="no SQLite database"):
            async with gateway_on(database):
                pass
        assert database.read_bytes() == content
        assert {path.suffix for path in database.parent.iterdir()} == {".db"}


def library_of(source: str, directory: Path) -> str:
    """The path of a library to be loaded before all others, made of C source."""
    (directory / "disk.c").write_text(source)
    library = str(directory / "disk.so")
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-o", library, str(directory / "disk.c"), "-ldl"], check=True, capture_output=True
    )
    return library


READ_ERRORS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
/* While the file named by FAULTS is there, one read of a database in twenty fails as a bad cable's does. */
ssize_t pread64(int fd, void *buffer, size_t count, off64_t offset) {
    static ssize_t (*real)(int, void *, size_t, off64_t);
    char link[64], path[4096];
    if (!real) real = dlsym(RTLD_NEXT, "pread64");
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length > 3 && !memcmp(path + length - 3, ".db", 3) && !access(getenv("FAULTS"), F_OK) && rand() % 20 == 0) {
        errno = EIO;
        return -1;
    }
    return real(fd, buffer, count, offset);
}
"""


@needing_gcc
@in_a_loop
async def test_read_errors_move_no_file_that_is_whole(database: Path, tmp_path: Path) -> None:
    faults = tmp_path / "faults.on"
    await fill(database, 3000)
    async with process_on(database, is_fresh=True, LD_PRELOAD=library_of(READ_ERRORS, tmp_path), FAULTS=str(faults)) as (
        process,
        client,
    ):
        faults.touch()
        failed = 0
        for before_id in range(3000, 0, -30):
            status, _ = await client.ask("GET", f"/state-history/a?limit=30&before_id={before_id}")
            failed += status == 503
        faults.unlink()
        await eventually(lambda: health_is(client, 200))
        assert (await client.get("/state-history/a?limit=1000"))["total"] == 1000
        process.send_signal(signal.SIGTERM)
        assert await process.exit_code() == 0
        assert failed > 0, "no read failed"
    assert not list(tmp_path.glob("*.corrupt-*"))
    assert rows_of(database, "SELECT count(*) FROM device_state_snapshots") == [(3000,)]


SLOW_SYNC = """
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>
/* While the file named by FAULTS is there, a sync takes two seconds, as on a cheap card that is busy. */
static void wait(void) { if (!access(getenv("FAULTS"), F_OK)) { write(2, "a sync\\n", 7); sleep(2); } }
int fdatasync(int fd) { wait(); return syscall(SYS_fdatasync, fd); }
int fsync(int fd) { wait(); return syscall(SYS_fsync, fd); }
"""


HANGING = """
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>
/* While the file named by FAULTS is there, nothing that is written or synced comes back. */
static void wait(void) { while (!access(getenv("FAULTS"), F_OK)) sleep(1); }
long pwrite64(int fd, const void *data, size_t count, long at) { wait(); return syscall(SYS_pwrite64, fd, data, count, at); }
int fdatasync(int fd) { wait(); return syscall(SYS_fdatasync, fd); }
"""


@needing_gcc
@in_a_loop
async def test_stop_waits_for_no_thread_that_hangs_on_the_disk(database: Path, tmp_path: Path) -> None:
    faults = tmp_path / "faults.on"
    environ: dict[str, Any] = {"is_fresh": True, "LD_PRELOAD": library_of(HANGING, tmp_path), "FAULTS": str(faults)}
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import amhrpd; amhrpd.STORE_CLOSE_TIMEOUT_S = 0.5; amhrpd.main([])"
    async with process_on(database, code=code, **environ) as (process, client):
        async with client.board("a") as board:
            faults.touch()
            await say(board, "status", payload={"a": 1})
            await eventually(lambda: health_is(client, 503))
            process.send_signal(signal.SIGTERM)
            began_s = time.monotonic()
            assert await closed_with(board) == 1001
        assert await process.exit_code() == 1
        assert time.monotonic() - began_s < 5
    events = [json.loads(line) for line in process.log.splitlines()]
    assert named(events, "rows_lost")
    assert (events[-1]["event"], events[-1]["exit_code"]) == ("stopped", 1)


@needing_gcc
@in_a_loop
async def test_commands_wait_for_no_sync_of_a_card(database: Path, tmp_path: Path) -> None:
    faults = tmp_path / "faults.on"
    environ: dict[str, Any] = {
        "is_fresh": True,
        "LD_PRELOAD": library_of(SLOW_SYNC, tmp_path),
        "FAULTS": str(faults),
        "AMHRPD_SYNC_INTERVAL": "0.2",
    }
    async with process_on(database, **environ) as (process, client):
        async with client.board("a") as board, background(answer_commands(board)):
            faults.touch()
            slowest_s = 0.0
            while process.log.count("a sync") < 3:
                began_s = time.monotonic()
                answer = await client.post("/command?wait=5", {"device_type": "ESP32", "command_name": "stop"})
                assert (answer["status"], answer.get("persisted")) == ("ack_success", None)
                slowest_s = max(slowest_s, time.monotonic() - began_s)
                await asyncio.sleep(0.02)
            assert slowest_s < 0.4
        process.send_signal(signal.SIGKILL)


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that the gateway syncs, but for what SQLite does itself."""
    names: list[str] = []

    def note(fd: int) -> None:
        names.append(Path(f"/proc/self/fd/{fd}").readlink().name)

    monkeypatch.setattr(os, "fdatasync", note)
    return names


@in_a_loop
async def test_what_was_committed_is_synced_within_the_interval_and_nothing_else(database: Path, synced: list[str]) -> None:
    async with gateway_on(database, sync_interval_s=0.4) as client, client.board("a") as board:
        for _ in range(2):
            await eventually(lambda: "amhrpd.db-wal" in synced)  # what was written is on the card
            synced.clear()
            await asyncio.sleep(0.8)
            assert synced == []  # idle
            began_s = time.monotonic()
            await client.post("/command?device_type=none&command_name=x")
            await eventually(lambda: "amhrpd.db-wal" in synced)
            assert 0.3 < time.monotonic() - began_s < 0.7
        synced.clear()
        began_s = time.monotonic()
        while time.monotonic() - began_s < 1.2:
            await say(board, "status", payload={"is": "busy"})
            await asyncio.sleep(0.02)
        assert 2 <= synced.count("amhrpd.db-wal") <= 4  # one an interval
        (samples,) = (metric.samples for metric in client.store.histograms[1].collect())
        assert next(sample.value for sample in samples if sample.name.endswith("_count")) >= 4


@in_a_loop
async def test_nobody_syncs_what_every_commit_has_synced(database: Path, synced: list[str]) -> None:
    async with gateway_on(database, sync_interval_s=0) as client:
        await client.post("/command?device_type=none&command_name=x")
        await asyncio.sleep(1.2)
    assert synced == []


@in_a_loop
async def test_sync_that_fails_is_said_and_stops_no_command(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []

    def fail(fd: int) -> None:
        tries.append(fd)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(amhrpd.Writer, "RETRY_S", 0.05)
    with logged() as events:
        async with gateway_on(database, sync_interval_s=1) as client, client.board("a") as board:
            with monkeypatch.context() as patch:
                patch.setattr(os, "fdatasync", fail)
                async with background(answer_commands(board)):
                    await client.post("/command?device_id=a&command_name=x")
                    await eventually(lambda: health_is(client, 503))
                    assert "Input/output error" in (await client.get("/health", 503))["database"]
                    answer = await client.post("/command?device_id=a&command_name=stop&wait=5")
                    assert (answer["status"], answer.get("persisted")) == ("ack_success", None)
                    assert (await client.get("/command-logs"))["total"] == 2
                    await eventually(lambda: len(tries) >= 5, within_s=2)  # soon again, and not an interval later
                    assert await health_is(client, 503)
            await eventually(lambda: health_is(client, 200))
    assert len(named(events, "sync_failed")) == 1


def change(database: Path, script: str) -> None:
    """What somebody does to the file with another program."""
    with contextlib.closing(sqlite3.connect(database, timeout=5)) as db:
        db.executescript(script)


@in_a_loop
async def test_tables_that_somebody_changed_stop_no_command(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amhrpd.Writer, "RETRY_S", 0.05)
    async with gateway_on(database) as client, client.board("a") as board, background(answer_commands(board)):
        for table in amhrpd.COLUMNS:
            change(database, f"ALTER TABLE {table} ADD COLUMN note TEXT")  # who may be null hurts nobody
        assert "persisted" not in await client.post("/command?device_id=a&command_name=x&wait=5")
        change(database, "ALTER TABLE command_logs RENAME TO others")
        answer = await client.post("/command?device_id=a&command_name=x&wait=5")
        assert (answer["status"], answer["persisted"]) == ("ack_success", False)
        assert "command_logs" in (await client.get("/health", 503))["database"]
        change(database, "ALTER TABLE others RENAME TO command_logs")
        await eventually(lambda: health_is(client, 200))
        assert (await client.get(f"/command-logs/{answer['command_id']}"))["status"] == "ack_success"


@in_a_loop
async def test_start_takes_no_more_memory_than_the_run_before_it(database: Path) -> None:
    async with gateway_on(database):
        pass
    answers = json.dumps({f"b{board}": {"status": "success", "payload": {"text": "x" * 60_000}} for board in range(60)})
    now = str(amhrpd.utc_now())
    with contextlib.closing(sqlite3.connect(database)) as db, db:
        db.execute("PRAGMA synchronous = OFF")
        commands = [(f"c{number}", "ESP32", "x", "{}", "sent", now, now, None, answers, 61, 60) for number in range(20)]
        db.executemany(f"INSERT INTO command_logs VALUES ({','.join('?' * 11)})", commands)
        text = json.dumps({"text": "y" * 60_000})
        db.executemany("INSERT INTO devices VALUES (?,'ESP32',1,?,?,NULL,?)", [(f"d{n}", now, now, text) for n in range(800)])
        snapshots = [(f"d{number}", text, now) for number in range(800)]
        db.executemany(
            "INSERT INTO device_state_snapshots (device_id, device_type, state_data, timestamp) VALUES (?,'ESP32',?,?)",
            snapshots,
        )
    del commands, snapshots
    async with process_on(database) as (process, client):
        assert (await client.get("/devices/d0"))["metadata"] == {"text": "y" * 60_000}
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak_kb = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])  # type: ignore[index]
        assert peak_kb < 200_000
        assert (await client.get("/command-logs?status=ack_timeout&limit=1"))["total"] == 1


# -- what is kept how long ---------------------------------------------------------------------------------------------


@in_a_loop
async def test_what_is_older_than_keep_days_is_deleted(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amhrpd.Store, "ROWS_DELETED_AT_ONCE", 10)
    monkeypatch.setattr(amhrpd.Store, "ROWS_FOUND_AT_ONCE", 25)
    monkeypatch.setattr(amhrpd.Store, "TIDY_INTERVAL_S", 0.1)
    monkeypatch.setattr(amhrpd, "UPKEEP_INTERVAL_S", 0.1)
    await fill(database, 5)
    old, young = (str(amhrpd.utc_now() - timedelta(days=days)) for days in (8, 6))
    rows = [(-200, "2036-01-01"), *((n, old) for n in range(-199, -50)), *((n, young) for n in range(-50, -10)), (-1, old)]
    with contextlib.closing(sqlite3.connect(database)) as db, db:
        db.executemany("INSERT INTO device_state_snapshots VALUES (?,'a','ESP32','{}',?)", rows)
        db.executemany("INSERT INTO device_connection_logs VALUES (?,'a','ESP32','timeout',?,NULL)", rows)
        commands = [("old", "sent", old), ("older", "no_devices", old), ("young", "ack_error", young)]
        db.executemany("INSERT INTO command_logs VALUES (?,'x','x','{}',?,?,NULL,NULL,NULL,1,0)", commands)
    async with gateway_on(database):
        await asyncio.sleep(0.3)
        assert rows_of(database, "SELECT count(*) FROM device_state_snapshots") == [(196,)]  # for ever is the default
    async with gateway_on(database, keep_days=7, command_timeout_s=300) as client:
        await eventually(lambda: client.rows("SELECT command_id FROM command_logs ORDER BY 1") == [("old",), ("young",)])
        for table, others in (("device_state_snapshots", 5), ("device_connection_logs", 2)):
            assert client.rows(f"SELECT count(*), min(id), max(id) > 0 FROM {table}") == [(41 + others, -200, 1)]
            assert client.rows(f"SELECT min(id), max(id) FROM {table} WHERE id BETWEEN -199 AND -1") == [(-50, -11)]


def written_bytes(process: Process) -> int:
    """What the process has handed to the kernel so far."""
    return int(re.findall(r"wchar: (\d+)", Path(f"/proc/{process.pid}/io").read_text())[0])


@in_a_loop
async def test_deleting_writes_little_more_than_what_is_deleted_and_holds_no_command_up(database: Path) -> None:
    async with gateway_on(database):
        pass
    now, old = amhrpd.utc_now(), amhrpd.utc_now() - timedelta(days=8)
    with contextlib.closing(sqlite3.connect(database)) as db, db:
        db.execute("PRAGMA synchronous = OFF")
        for device_id, moment in (("old", old), ("young", now)):
            db.execute("INSERT INTO devices VALUES (?,'x',0,?,?,?,'{}')", (device_id, *[str(now)] * 3))
            rows = ((device_id, json.dumps({"t": "x" * 600}), str(moment + timedelta(seconds=n))) for n in range(20_000))
            db.executemany("INSERT INTO device_state_snapshots VALUES (NULL,?,'x',?,?)", rows)
    half_bytes = database.stat().st_size / 2
    count = "SELECT count(*) FROM device_state_snapshots"
    async with process_on(database, AMHRPD_KEEP_DAYS="7") as (process, client), client.board("a") as board:
        slowest_s = 0.0

        async def order() -> None:
            nonlocal slowest_s
            while True:
                began_s = time.monotonic()
                assert "persisted" not in await client.post("/command?device_id=a&command_name=x&wait=5")
                slowest_s = max(slowest_s, time.monotonic() - began_s)
                await asyncio.sleep(0.05)

        async with background(answer_commands(board), order()) as tasks:
            await eventually(lambda: rows_of(database, count) == [(20_000,)], within_s=20)
            assert written_bytes(process) < 3 * half_bytes
            assert (await client.ask("DELETE", "/devices/young"))[1]["deleted"] == {"snapshots": 20_000, "events": 0}
            await asyncio.sleep(1.5)  # the log is written into the file
            assert written_bytes(process) < 3 * 2 * half_bytes
            assert not [task for task in tasks if task.done()]
        assert slowest_s < 0.5  # a twentieth of it on a machine that does nothing else


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[None]:
    """A file system of its own, in memory; skips the test where that isn't allowed."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no right to mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill_up(path: Path) -> None:
    """Have a file take all the room that is left."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16) if shutil.disk_usage(path.parent).free > 1 << 16 else b"\0")


@pytest.mark.root
@in_a_loop
async def test_disk_that_another_program_fills_at_once_makes_the_oldest_rows_go(tmp_path: Path) -> None:
    with small_disk(tmp_path / "card", "64m"):
        database = tmp_path / "card" / "amhrpd.db"
        async with gateway_on(database) as client, client.board("a") as board:
            for n in range(3000):
                await say(board, "status", payload={"n": n, "text": "x" * 2000})
            await eventually(lambda: state_is_past(client, "a", 2999))
            await eventually(lambda: database.stat().st_size > 6 << 20)  # what was in the log is in the file
            for n in range(3000, 5000):
                if n % 1000 == 0:
                    fill_up(tmp_path / "card" / f"photos{n}")
                    assert shutil.disk_usage(tmp_path / "card").free == 0
                await say(board, "status", payload={"n": n, "text": "x" * 2000})
                if n % 100 == 99:
                    await eventually(lambda n=n: state_is_past(client, "a", n))  # type: ignore[misc]
                    await client.post("/command?device_type=none&command_name=x")
            states = (await client.get("/state-history/a?limit=500"))["states"]
            assert [state["state_data"]["n"] for state in states] == list(range(4999, 4499, -1))
            health = await client.get("/health")
            assert (health["status"], health["rows_dropped"], health["rows_rejected"]) == ("ok", 0, 0)
            assert "--min-free-mb" in health["notice"]
        ((oldest, newest, count),) = rows_of(database, "SELECT min(id), max(id), count(*) FROM device_state_snapshots")
        assert (newest, count, oldest > 1) == (5000, 5001 - oldest, True)
        assert rows_of(database, "SELECT event FROM device_connection_logs") == [("connected",), ("disconnected",)]
        assert rows_of(database, "SELECT count(*) FROM command_logs") == [(20,)]


@pytest.mark.root
@in_a_loop
async def test_small_disk_never_fills_up_and_keeps_what_is_newest(tmp_path: Path) -> None:
    with small_disk(tmp_path / "card", "24m"):
        database = tmp_path / "card" / "amhrpd.db"
        async with gateway_on(database) as client, client.board("a") as board:
            await client.post("/command?device_type=none&command_name=first")
            assert "notice" not in await client.get("/health")
            for n in range(6000):  # three times as much as there is room for
                await say(board, "status", payload={"n": n, "text": "x" * 12_000})
                if n % 100 == 99:
                    await eventually(lambda n=n: state_is_past(client, "a", n))  # type: ignore[misc]
                    health = await client.get("/health")
                    assert health["disk_free_bytes"] > 2 << 20
            await eventually(lambda: state_is_past(client, "a", 5999))
            states = (await client.get("/state-history/a?limit=80"))["states"]
            assert [state["state_data"]["n"] for state in states] == list(range(5999, 5919, -1))
            health = await client.get("/health")
            assert (health["status"], health["rows_dropped"], health["rows_rejected"]) == ("ok", 0, 0)
            assert "--min-free-mb" in health["notice"]
            assert 4 << 20 < health["database_bytes"] < 20 << 20
            ((oldest, count),) = client.rows("SELECT min(id), count(*) FROM device_state_snapshots")
            assert (oldest > 1, count) == (True, 6000 - oldest + 1)
            assert (await client.get("/command-logs"))["total"] == 1  # snapshots go first


async def state_is_past(client: Client, device_id: str, n: int) -> bool:
    state = (await client.get(f"/devices/{device_id}"))["state"]
    return bool(state and state["n"] >= n)


@pytest.mark.root
@in_a_loop
async def test_nothing_is_deleted_where_there_is_room_or_it_is_off(tmp_path: Path) -> None:
    for min_free_mb in (3, 0):
        with small_disk(tmp_path / f"card{min_free_mb}", "24m"):
            database = tmp_path / f"card{min_free_mb}" / "amhrpd.db"
            async with gateway_on(database, min_free_mb=min_free_mb) as client, client.board("a") as board:
                for n in range(5000):
                    await say(board, "status", payload={"n": n, "text": "x" * 1000})
                await eventually(lambda: state_is_past(client, "a", 4999))
                await client.get("/state-history/a?limit=1")
                assert client.rows("SELECT count(*) FROM device_state_snapshots") == [(5000,)]
                assert "notice" not in await client.get("/health")


@in_a_loop
async def test_second_gateway_on_the_same_file_is_refused(database: Path) -> None:
    async with gateway_on(database) as client:
        with pytest.raises(amhrpd.StartError, match="in use by another gateway"):
            async with gateway_on(database):
                pass
        assert (await client.get("/health"))["database"] == "ok"


@in_a_loop
async def test_heartbeats_alone_make_no_commits(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway_on(database) as client, client.board("a") as board:
        await client.get("/state-history/a")
        written = database.with_name("amhrpd.db-wal").read_bytes()
        for _ in range(50):
            await say(board, "heartbeat")
        await say(board, "reboot")  # its refusal tells that all were handled
        await hear(board, "error")
        client.gateway.sweep(1.0)
        stored = client.rows("SELECT last_heartbeat FROM devices")
        await client.store.flush()  # and nothing was there to write
        assert database.with_name("amhrpd.db-wal").read_bytes() == written
        monkeypatch.setattr(amhrpd.Gateway, "ACTIVITY_SAVE_INTERVAL_S", 0.0)
        client.gateway.sweep(1.0)
        await eventually(lambda: client.rows("SELECT last_heartbeat FROM devices") != stored)


# ======================================================================================================================
# Nobody let in: hostile boards
# ======================================================================================================================


def mutated_frames(count: int, seed: int) -> list[bytes]:
    """WebSocket frames whose payload is a valid message with something wrong in it, or nothing right at all."""
    rng = random.Random(seed)
    seeds = [frame.encode() for frame, _ in REFUSED if len(frame) < 2000] + [
        b'{"message_type":"status","payload":{"temperature":25.3,"list":[1,2,{"a":null}]}}',
        b'{"message_type":"heartbeat","device_type":"ESP32","rssi":-50}',
        b'{"message_type":"command_ack","command_id":"x","status":"success","payload":{"a":1},"execution_time":0.5}',
        b'{"message_type":"registration","device_type":"ESP32","metadata":{"fw":"1"},"mac":"aa"}',
        b'{"message_type":"alert","alert_type":"obstacle","message":"m"}',
        b'{"message_type":"error","error_code":"E","error_message":"m","context":{"a":[1]}}',
    ]
    spices = [
        b"\xff",
        b"\x00",
        b"\xc3",
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b"\\",
        b",",
        b":",
        b"\\ud800",
        b"NaN",
        b"1e999",
        b"9" * 50,
        b"null",
    ]
    frames = []
    for _ in range(count):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randrange(4)):
            at = rng.randrange(len(data) + 1)
            match rng.randrange(4):
                case 0:
                    data[at:at] = rng.choice(spices)
                case 1:
                    del data[at : at + rng.randrange(8)]
                case 2:
                    data[at : at + 1] = bytes([rng.randrange(256)])
                case _:
                    data += data[: rng.randrange(40)]
        frames.append(Wire.frame(bytes(data), opcode=2 if rng.random() < 0.02 else 1, mask=b"\0\0\0\0"))
    return frames


@in_a_loop
async def test_50000_mutated_frames_beside_a_working_board(database: Path) -> None:
    """No traceback, no lost command, no unreadable answer, and a flat memory line."""

    def resident_mb() -> float:
        (line,) = [line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
        return int(line.split()[1]) / 1024

    async def attack(number: int, frames: Sequence[bytes]) -> None:
        wire = await Wire.connect(client.port, f"hostile_{number}")
        wire.send(REGISTRATION)  # who floods without that is let go

        async def read() -> None:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while await wire.reader.read(1 << 16):
                    pass

        async with background(read()):
            for at in range(0, len(frames), 100):
                wire.writer.write(b"".join(frames[at : at + 100]))
                await wire.writer.drain()
            wire.send('{"message_type":"status","device_type":"ESP32","payload":{"attack":"over"}}')
            await eventually(lambda: state_is(client, f"hostile_{number}", {"attack": "over"}), within_s=60)
        await wire.close()

    async def order(times: int) -> None:
        for _ in range(times):
            answer = await client.post("/command?device_id=good&command_name=x&wait=10")
            assert answer["status"] == "ack_success"

    frames = mutated_frames(5_000, seed=1)
    async with process_on(database) as (process, client), client.board("good") as board, background(answer_commands(board)):
        await attack(0, frames * 2)
        await order(20)
        before_mb = resident_mb()
        async with background(*(attack(number, frames * 2) for number in range(1, 5))) as attacks:
            while not all(task.done() for task in attacks):
                await order(1)
            for task in attacks:
                task.result()
        await order(20)
        assert resident_mb() - before_mb < 30
        for device in (await client.get("/devices"))["devices"]:
            await client.get(f"/state-history/{device['device_id']}?limit=1000")  # reads as JSON
            await client.get(f"/device-connection-history/{device['device_id']}")
        assert (await client.get("/health"))["rows_rejected"] == 0
        assert await client.is_online("good")
        assert "Traceback" not in process.log
        # Whatever 100,000 frames say: in a minute each event of each board has ten lines at the most.
        events = [json.loads(line) for line in process.log.splitlines()]
        lines = Counter(
            (event["event"], event.get("device_id"))
            for event in events
            if event.get("device_id") != "good" and event["event"] != "command_routed"  # which are those to the good one
        )
        assert max(lines.values()) <= 10, lines.most_common(3)
        assert len(lines) < 50
    for (text,) in rows_of(database, "SELECT state_data FROM device_state_snapshots UNION SELECT metadata_json FROM devices"):
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the database"))


@in_a_loop
async def test_flood_and_a_fight_for_an_id_leave_the_others_alone(database: Path) -> None:
    async def flood(number: int) -> None:
        wire = await Wire.connect(client.port, f"flood_{number}")
        wire.send(REGISTRATION)
        chunk = Wire.frame(b'{"message_type":"status","payload":{"n":1}}') * 50 + Wire.frame(b"rubbish") * 5
        while True:
            wire.writer.write(chunk)
            await wire.writer.drain()

    async def fight() -> None:
        while True:
            wire = await Wire.connect(client.port, "contested")
            wire.send(REGISTRATION)
            await asyncio.sleep(0.01)
            wire.writer.transport.abort()

    async def dangle() -> None:
        held = []
        while True:
            held.append(await asyncio.open_connection("127.0.0.1", client.port))
            held[-1][1].write(b"GET /ws/slow HTTP/1.1\r\nHost:")
            await asyncio.sleep(0.02)

    round_trips_s: list[float] = []
    async with process_on(database) as (process, client), client.board("good") as board, background(answer_commands(board)):
        async with background(flood(1), flood(2), fight(), fight(), dangle()) as attackers:
            for _ in range(30):
                began_s = time.monotonic()
                answer = await client.post("/command?device_id=good&command_name=x&wait=10")
                assert (answer["status"], answer.get("persisted", True)) == ("ack_success", True)
                round_trips_s.append(time.monotonic() - began_s)
            assert not any(task.done() for task in attackers)
        assert sorted(round_trips_s)[len(round_trips_s) // 2] < 0.5  # a tenth of it on a machine that does nothing else
        assert await client.events("good") == ["connected"]
        history = await client.events("contested")
        assert history[::2] == ["connected"] * len(history[::2])
        assert "connected" not in history[1::2]
        assert len(history) > 10
        assert len([line for line in process.log.splitlines() if "command_routed" not in line]) < 100


@in_a_loop
async def test_connections_that_never_finish_a_request_are_dropped(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amhrpd.HttpConnection, "KEEPALIVE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(amhrpd, "BODY_TIMEOUT_S", 0.1)
    monkeypatch.setattr(amhrpd.HttpConnection, "LINGERING_TIMEOUT_S", 0.1)
    async with gateway_on(database) as client:
        for start in (
            b"",
            b"GET /ws/a HTTP/1.1\r\nHost: x\r\nUpgr",
            b"POST /command HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{",
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
            writer.write(start)
            async with asyncio.timeout(PATIENCE_S):
                answer = await reader.read()
            assert not answer or answer.startswith(b"HTTP/1.1 408 ")
            writer.close()


@in_a_loop
async def test_caller_that_takes_nothing_of_its_answer_is_dropped(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amhrpd, "UNREAD_TIMEOUT_S", 0.5)
    async with gateway_on(database) as client, client.board("a") as board:
        for n in range(200):
            await say(board, "status", payload={"n": n, "text": "x" * 60000})
        await eventually(lambda: '"n":199,' in str(getattr(client.gateway.registry.find("a"), "state", "")))
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port, limit=1024)
        began_s = time.monotonic()
        writer.write(b"GET /state-history/a?limit=1000 HTTP/1.1\r\nHost: x\r\n\r\n" * 8)
        await eventually(lambda: waiting_bytes(client) > 0)
        await eventually(lambda: waiting_bytes(client) == 0)
        assert time.monotonic() - began_s > 0.4
        with pytest.raises(ConnectionError):
            while await reader.read(1 << 20):
                pass
            raise ConnectionError("the answer ended early")
        assert await client.is_online("a")
        writer.transport.abort()


def waiting_bytes(client: Client) -> int:
    """What the gateway's callers have not taken yet."""
    return sum(c.transport.get_write_buffer_size() for c in client.server.connections if c.transport is not None)


@in_a_loop
async def test_idle_connections_over_the_limit_are_refused_and_boards_stay(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amhrpd.HttpConnection, "MAX_OTHERS", 50)
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(gateway_on(database))
        for number in range(60):  # boards that are registered are no others
            board = await stack.enter_async_context(client.board(f"b{number}"))
        await stack.enter_async_context(background(answer_commands(board)))
        idle = [await asyncio.open_connection("127.0.0.1", client.port) for _ in range(60)]

        async def is_closed(reader: asyncio.StreamReader) -> bool:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    return await reader.read() == b""
            return False

        assert sum(await asyncio.gather(*(is_closed(reader) for reader, _ in idle))) >= 10
        assert (await client.post("/command?device_id=b59&command_name=x&wait=5"))["status"] == "ack_success"
        for _, writer in idle:
            writer.close()


@in_a_loop
async def test_registered_boards_take_no_place_of_callers(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amhrpd.HttpConnection, "MAX_OTHERS", 5)
    async with gateway_on(database) as client, contextlib.AsyncExitStack() as boards:
        for number in range(20):
            await boards.enter_async_context(client.board(f"b{number}"))
        unregistered = [await connect(client.port, f"c{number}") for number in range(12)]  # and the client's own connection
        with pytest.raises((ConnectionError, EOFError, websockets.InvalidHandshake)):
            await connect(client.port, "c12")
        for board in unregistered:
            await board.close()
        await eventually(lambda: len(client.server.connections) == 21)
        async with client.board("c12"):
            pass


@in_a_loop
async def test_fleet_that_comes_at_once_waits_for_its_turn(database: Path) -> None:
    """Whom the kernel turns away tries again after one second, three, seven, …"""
    async with gateway_on(database) as client:  # it lets nobody in meanwhile: its loop is this one
        fleet = [socket.create_connection(("127.0.0.1", client.port), timeout=2) for _ in range(500)]
        for connection in fleet:
            connection.close()
        assert (await client.get("/health"))["status"] == "ok"


async def knows(client: Client, *device_ids: str) -> bool:
    """Whether these devices, in this order, are the ones in memory."""
    return tuple(device["device_id"] for device in (await client.get("/devices"))["devices"]) == device_ids


@in_a_loop
async def test_newest_device_and_newest_command_always_find_room(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amhrpd, "UPKEEP_INTERVAL_S", 0.05)  # whoever is too many goes then
    monkeypatch.setattr(amhrpd.Registry, "MAX_DEVICES", 3)
    monkeypatch.setattr(amhrpd.Dispatch, "MAX_COMMANDS", 3)
    async with gateway_on(database) as client:
        for device_id in ("a", "b", "c"):
            async with client.board(device_id, metadata={"name": f"it is {device_id}"}):
                await client.post(f"/command?device_id={device_id}&command_name=x")
            await eventually(lambda: not_online(client, device_id))  # noqa: B023 - awaited at once
        async with client.board("d") as board:  # whoever was longest away makes room
            await eventually(lambda: knows(client, "b", "c", "d"))
            assert [event["event"] for event in (await client.get("/device-connection-history/a"))["events"]][-1] == "connected"
            answer = await client.post("/command?device_id=d&command_name=stop")  # the fourth: the oldest ends early
            assert answer["status"] == "sent"
            await hear(board, "command")
            await eventually(lambda: row_has(client, "/health", open_commands=3))
            (oldest,) = (await client.get("/command-logs?status=ack_timeout"))["logs"]
            assert oldest["command_name"] == "x"
        assert (await client.post("/command?device_id=a,d&command_name=x"))["detail"] == "offline: a, d"
        async with client.board("a", None) as board:  # it is back, and what it said of itself is in the file still
            await say(board, "heartbeat", device_type="ESP32")
            await eventually(lambda: client.is_online("a"))
            await client.get("/command-logs")
            assert client.rows("SELECT metadata_json FROM devices WHERE device_id = 'a'") == [('{"name":"it is a"}',)]


@in_a_loop
async def test_devices_that_are_only_in_the_file_are_known(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway_on(database) as client:
        for device_id in ("a", "b", "c"):
            async with client.board(device_id, metadata={"name": f"it is {device_id}"}):
                pass
            await eventually(lambda: not_online(client, device_id))  # noqa: B023 - awaited at once
    monkeypatch.setattr(amhrpd, "RESTORED_DEVICES", 2)
    async with gateway_on(database) as client:
        assert {device["device_id"] for device in (await client.get("/devices"))["devices"]} == {"b", "c"}
        assert (await client.get("/state-history/a"))["total"] == 0
        assert (await client.get("/devices/a"))["metadata"] == {"name": "it is a"}
        assert (await client.post("/command?device_id=a&command_name=x"))["detail"] == "offline: a"
        await client.get("/devices/nobody", 404)
        deleted = {"device_id": "a", "deleted": {"snapshots": 0, "events": 2}}
        assert await client.ask("DELETE", "/devices/a") == (200, deleted)
        await client.get("/devices/a", 404)


@in_a_loop
async def test_late_look_up_takes_nobody_off_line(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amhrpd, "UPKEEP_INTERVAL_S", 0.05)
    monkeypatch.setattr(amhrpd.Registry, "MAX_DEVICES", 1)
    look_up, is_asked, is_late = amhrpd.Store.row, asyncio.Event(), asyncio.Event()

    async def look_up_late(self: amhrpd.Store, *args: Any, **key: Any) -> Any:
        found = await look_up(self, *args, **key)
        is_asked.set()
        await is_late.wait()
        return found

    async with gateway_on(database) as client:
        for device_id in ("a", "b"):
            async with client.board(device_id):
                pass
            await eventually(lambda device_id=device_id: not_online(client, device_id))  # type: ignore[misc]
        await eventually(lambda: knows(client, "b"))
        with monkeypatch.context() as patch:
            patch.setattr(amhrpd.Store, "row", look_up_late)
            asked = asyncio.create_task(client.get("/devices/a"))
            await is_asked.wait()
        async with client.board("a", metadata={"name": "new"}):
            is_late.set()
            assert (await asked)["is_online"]
            device = await client.get("/devices/a")
            assert (device["is_online"], device["metadata"]) == (True, {"name": "new"})


@in_a_loop
async def test_memory_for_what_boards_say_of_themselves_is_bounded(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole offline device gives way; of those online the largest state. All is in the file."""
    monkeypatch.setattr(amhrpd, "UPKEEP_INTERVAL_S", 0.05)
    monkeypatch.setattr(amhrpd.Registry, "MAX_BYTES", 8000)
    monkeypatch.setattr(amhrpd.Dispatch, "MAX_BYTES", 6000)
    async with gateway_on(database) as client, client.board("a") as a:
        async with client.board("away", metadata={"text": "x" * 3000}):
            pass
        await eventually(lambda: not_online(client, "away"))
        await say(a, "status", payload={"text": "y" * 4000})
        await eventually(lambda: state_is(client, "a", {"text": "y" * 4000}))
        await eventually(lambda: knows(client, "a"))
        assert (await client.get("/devices/away"))["metadata"] == {"text": "x" * 3000}
        async with client.board("b") as b:
            await say(b, "status", payload={"text": "z" * 5000})
            await eventually(lambda: row_has(client, "/state-history/b", total=1))
            await eventually(lambda: state_is(client, "b", None))
            assert await state_is(client, "a", {"text": "y" * 4000})
        ids = []
        for _ in range(3):
            ids.append((await client.post("/command?device_id=a&command_name=x"))["command_id"])
            await hear(a, "command")
            await say(a, "command_ack", command_id=ids[-1], payload={"text": "x" * 2000})
            await eventually(lambda: row_has(client, f"/command-logs/{ids[-1]}", status="ack_success"))
        client.gateway.sweep(1.0)
        await say(a, "command_ack", command_id=ids[0])  # forgotten for those that came after it
        assert (await hear(a, "error"))["error_code"] == "COMMAND_NOT_FOUND"
        await say(a, "command_ack", command_id=ids[2])
        await say(a, "reboot")
        assert (await hear(a, "error"))["error_code"] == "UNKNOWN_MESSAGE_TYPE"


# ======================================================================================================================
# Nobody let in: callers
# ======================================================================================================================


# ======================================================================================================================
# Bounds under load
# ======================================================================================================================


def resident_mb(process: Process) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024


HEADERS_WITHOUT_END = b"GET /health HTTP/1.1\r\n" + b"".join(b"X-%d: %s\r\n" % (n, b"x" * 4000) for n in range(30))
HALF_A_MESSAGE = Wire.frame(b"x" * 65000, mask=b"\0\0\0\0")[:64000]


@pytest.mark.parametrize(
    ("count", "sent"),
    [
        (300, HEADERS_WITHOUT_END),
        (600, b"GET /" + b"x" * 16000),
        (200, b"POST /command HTTP/1.1\r\nHost: x\r\nContent-Length: 130000\r\n\r\n" + b"x" * 120_000),
        (700, Wire.HANDSHAKE.format(device_id="half").encode() + HALF_A_MESSAGE),
    ],
    ids=["headers", "request lines", "bodies", "messages"],
)
@in_a_loop
async def test_what_is_never_whole_takes_a_bounded_amount_of_memory(database: Path, count: int, sent: bytes) -> None:
    async with process_on(database) as (process, client), client.board("good") as board, background(answer_commands(board)):
        before_mb = resident_mb(process)

        async def hold() -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
            with contextlib.suppress(ConnectionError):
                writer.write(sent)
                await writer.drain()
                await reader.read(1 << 20)
                await asyncio.Event().wait()

        async with background(*(hold() for _ in range(count))):
            for _ in range(20):
                assert (await client.post("/command?device_id=good&command_name=x&wait=10"))["status"] == "ack_success"
                await asyncio.sleep(0.05)
            assert resident_mb(process) - before_mb < 100


@in_a_loop
async def test_many_boards_that_flood_with_the_smallest_frames_take_little_memory(database: Path) -> None:
    async with process_on(database) as (process, client):

        async def flood(number: int) -> None:
            wire = await Wire.connect(client.port, f"flood_{number}")
            wire.send(REGISTRATION)
            await go.wait()
            wire.writer.write(Wire.frame(b"", opcode=9) * 10_000)
            await asyncio.Event().wait()

        go = asyncio.Event()
        async with background(*(flood(number) for number in range(200))):
            await eventually(lambda: row_has(client, "/health", devices_online=200))
            before_mb = resident_mb(process)
            go.set()
            for _ in range(10):
                await asyncio.sleep(0.1)
                assert resident_mb(process) - before_mb < 50


@in_a_loop
async def test_answers_that_nobody_takes_are_bounded_and_those_who_read_get_theirs(database: Path) -> None:
    async with gateway_on(database) as client, client.board("a", metadata={"text": "m" * 60000}) as board:
        for _ in range(40):
            await say(board, "status", payload={"text": "x" * 60000})
        await say(board, "status", payload={"is": "last"})
        await eventually(lambda: state_is(client, "a", {"is": "last"}))
        with contextlib.ExitStack() as callers:
            for path in ("/state-history/a?limit=1000", "/state-history/a?limit=1000&format=csv", "/devices"):
                for _ in range(20):
                    caller = callers.enter_context(socket.socket())
                    caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                    caller.connect(("127.0.0.1", client.port))
                    caller.sendall(b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path.encode() * 100)  # the kernel takes some
            await eventually(lambda: waiting_bytes(client) > 10 << 16)
            assert (await client.get("/state-history/a?limit=1000"))["total"] > 15
            assert waiting_bytes(client) < 60 * 300_000


@in_a_loop
async def test_history_that_is_too_long_ends_early_and_says_so(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amhrpd.Database, "MAX_ANSWER_BYTES", 50_000)
    async with gateway_on(database) as client, client.board("a") as board:
        for n in range(30):
            await say(board, "status", payload={"n": n, "text": "x" * 9000})
            await client.post("/command?device_type=none&command_name=x", {"n": n, "text": "x" * 9000})
        await eventually(lambda: '"n":29,' in str(getattr(client.gateway.registry.find("a"), "state", "")))
        for path, rows, content, key in (
            ("/state-history/a?limit=1000", "states", "state_data", "id"),
            ("/command-logs?limit=1000", "logs", "payload", "command_id"),
        ):
            seen: list[int] = []
            behind, has_more = "", True
            while has_more:
                async with client.session.get(f"http://127.0.0.1:{client.port}{path}{behind}") as response:
                    page, has_more = await response.json(), "X-AMHRPD-More" in response.headers
                assert page["total"] == len(page[rows]) < 10
                seen += [row[content]["n"] for row in page[rows]]
                behind = f"&before_id={page[rows][-1][key]}"
            assert seen == list(range(29, -1, -1))


@in_a_loop
async def test_all_devices_are_one_answer_that_is_made_as_it_is_taken(database: Path) -> None:
    page = "https://dashboard.example"
    async with gateway_on(database, allowed_origins=page) as client, contextlib.AsyncExitStack() as boards:
        for n in range(120):
            await boards.enter_async_context(client.board(f"b{n}", metadata={"text": "m" * 60000}))
        devices = await client.get("/devices")
        assert devices["total"] == len(devices["devices"]) == 120
        assert {device["metadata"]["text"] for device in devices["devices"]} == {"m" * 60000}
        _, writer = await asyncio.open_connection("127.0.0.1", client.port, limit=1024)
        writer.write(b"GET /devices HTTP/1.1\r\nHost: x\r\n\r\n")
        await eventually(lambda: waiting_bytes(client) > 0)
        assert waiting_bytes(client) < 400_000
        writer.transport.abort()
        origin = {"Origin": page}
        async with client.session.get(f"http://127.0.0.1:{client.port}/devices", headers=origin) as response:
            assert response.headers["Access-Control-Allow-Origin"] == origin["Origin"]


@in_a_loop
async def test_boards_that_say_much_take_turns_also_where_the_loop_is_slow(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop that a hundred of them keep busy hears each of them a few times a second only."""
    waited: list[str] = []
    wait_for_turn = amhrpd.Gateway.wait_for_turn

    async def wait(self: amhrpd.Gateway) -> None:
        waited.append("")
        await wait_for_turn(self)

    monkeypatch.setattr(amhrpd.Gateway, "wait_for_turn", wait)
    monkeypatch.setattr(amhrpd.DeviceSocket, "TURN_FRAMES", 20)
    async with gateway_on(database) as client, client.board("busy") as busy, client.board("calm") as calm:
        for number in range(5):
            for _ in range(5):
                await say(busy, "status", payload={"n": number})
            await say(calm, "status", payload={"n": number})
            await asyncio.sleep(0.12)  # a turn of such a loop
        await eventually(lambda: state_is(client, "calm", {"n": 4}))
    assert waited == [""]


@in_a_loop
async def test_questions_are_answered_one_a_turn_of_the_loop(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a flood of them leaves room for a stop between any two."""
    turn = 0
    turns: list[int] = []
    matching = amhrpd.Registry.matching

    def note_turn(*args: Any, **kwargs: Any) -> Any:
        turns.append(turn)
        return matching(*args, **kwargs)

    async def count_turns() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    async with gateway_on(database) as client, background(count_turns()):
        monkeypatch.setattr(amhrpd.Registry, "matching", note_turn)
        callers = [await asyncio.open_connection("127.0.0.1", client.port) for _ in range(20)]
        for _, writer in callers:
            writer.write(b"GET /devices HTTP/1.1\r\nHost: x\r\n\r\n")
        for reader, writer in callers:
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
            writer.close()
        assert len(set(turns)) == len(turns) == 20


@pytest.mark.parametrize(
    ("count", "frame"),
    [
        (3, Wire.frame(b"", opcode=9)),
        (50, Wire.frame(b'{"message_type":"status","payload":{"t":"%s"}}' % (b"x" * 2000))),
        (30, Wire.frame(b'{"message_type":"status","payload":{"t":"%s"}}' % (b"x" * 60000))),
    ],
    ids=["pings", "statuses", "large statuses"],
)
@in_a_loop
async def test_floods_hold_up_no_command_and_cost_no_status_of_others(database: Path, count: int, frame: bytes) -> None:
    async def flood(number: int) -> None:
        wire = await Wire.connect(client.port, f"flood_{number}")
        wire.send(REGISTRATION)

        async def read() -> None:
            while await wire.reader.read(1 << 16):
                pass

        async with background(read()):
            while True:
                wire.writer.write(frame * max(1, 20_000 // len(frame)))
                await wire.writer.drain()

    async with process_on(database) as (_, client), client.board("good") as board:
        times_s = []
        async with background(*(flood(number) for number in range(count))):
            await eventually(lambda: row_has(client, "/health", devices_online=count + 1))
            for n in range(15):
                await say(board, "status", payload={"n": n})
                began_s = time.monotonic()
                assert (await client.post("/command?device_id=good&command_name=stop"))["status"] == "sent"
                times_s.append(time.monotonic() - began_s)
                await asyncio.sleep(0.1)  # ten statuses a second are always taken
        assert sorted(times_s)[7] < 0.2  # half of it on a machine that does nothing else
        assert (await client.get("/state-history/good"))["total"] == 15


@in_a_loop
async def test_who_floods_without_having_registered_is_let_go(database: Path) -> None:
    async with gateway_on(database) as client:
        wire = await Wire.connect(client.port, "a")
        for _ in range(1000):
            wire.send(b"", opcode=9)
        while (await wire.receive())[0] & 15 != 8:
            pass
        await wire.close()


@in_a_loop
async def test_names_of_others_for_our_address_read_nothing(database: Path) -> None:
    async with gateway_on(database, allowed_origins="https://dashboard.example") as client:
        for host, status in (
            ("evil.example", 403),
            ("evil.example:8000", 403),
            ("127.0.0.1.evil.example", 403),
            ("127.0.0.1", 200),
            ("[::1]:8000", 200),
            ("pi", 200),
            ("pi.local:8000", 200),
            ("PI.LAN", 200),
            ("dashboard.example", 200),
        ):
            for path in ("/health", "/devices", "/api/command-logs"):
                answer = await client.get(path, status, headers={"Host": host})
                assert status == 200 or answer["error_code"] == "FORBIDDEN"
        wire = await Wire.connect(client.port, "a")
        assert b" 101 " in wire.head
        await wire.close()


@in_a_loop
async def test_whatever_bytes_a_head_has_the_error_has_the_common_shape(database: Path) -> None:
    handshake = Wire.HANDSHAKE.format(device_id="a").encode()
    get = b"GET /devices HTTP/1.1\r\nHost: x\r\n"
    heads = [
        (handshake.replace(b"Connection: Upgrade", b"Connection: \xff"), 400),
        (handshake.replace(b"websocket\r", b"web\xffsocket\r"), 400),
        (handshake.replace(b"Key: dGhl", b"Key: \xff"), 400),
        (handshake.replace(b"Key: dGhl", "Key: ü".encode()), 400),
        (get + b"Authorization: \xff\r\n\r\n", 401),
        (get + b"Origin: http://\xff\r\n\r\n", 403),
        (get + b"X: x\r\n" * 32 + b"\r\n", 413),
        (get + b"X: " + b"x" * 4200 + b"\r\n\r\n", 413),
        (b"GET /devices?" + b"x" * 17000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 413),
        ("GET /devices?device_type=Küche HTTP/1.1\r\nHost: x\r\n\r\n".encode(), 400),
    ]
    with logged() as events:
        async with gateway_on(database, api_token="token-of-callers") as client:
            for head, status in heads:
                reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
                writer.write(head)
                async with asyncio.timeout(PATIENCE_S):
                    answer = await reader.readuntil(b"}\n")
                assert answer.split()[1] == b"%d" % status, answer
                assert set(json.loads(answer.partition(b"\r\n\r\n")[2])) == {"error", "error_code"}
                writer.close()
            assert b"%C3%BC" in answer  # the last one says what to write
            for _ in range(20):
                _, writer = await asyncio.open_connection("127.0.0.1", client.port)
                writer.write(handshake)
                writer.transport.abort()
            await client.get("/health")
    assert [event for event in events if event.get("level") == "error" or "exception" in event] == []


@in_a_loop
async def test_every_route_has_a_slash_at_its_end_too(database: Path) -> None:
    async with gateway_on(database) as client, client.board("a"):
        command_id = (await client.post("/command/?device_id=a&command_name=x"))["command_id"]
        for path in (
            "/health",
            "/devices",
            "/devices/a",
            "/state-history/a",
            "/command-logs",
            f"/command-logs/{command_id}",
            "/device-connection-history/a",
        ):
            for prefix in ("", "/api"):
                await client.get(f"{prefix}{path}/")
        for path in ("/ws/b/", "/api/ws/c/"):
            async with await websockets.connect(f"ws://127.0.0.1:{client.port}{path}", proxy=None):
                pass
        await eventually(lambda: client.get("/devices/"))
        await client.ask("DELETE", "/api/devices/nobody/")


@in_a_loop
async def test_marks_in_front_and_padding_behind_are_passed_over(database: Path) -> None:
    async with gateway_on(database) as client, client.board("a") as board:
        for n, (front, behind) in enumerate((("\ufeff", ""), ("", "\0" * 40), ("\ufeff", " \r\n\0\0"))):
            await board.send(f'{front}{{"message_type":"status","payload":{{"n":{n}}}}}{behind}')
            await eventually(functools.partial(state_is, client, "a", {"n": n}))
            body = f'{front}{{"device_id":"a","command_name":"x","payload":{{"n":{n}}}}}{behind}'.encode()
            assert (await client.post("/command", body))["payload"] == {"n": n}


@in_a_loop
async def test_null_is_as_if_left_out_and_texts_are_no_numbers(database: Path) -> None:
    async with gateway_on(database) as client, client.board("a") as board:
        whole = {"device_type": "ESP32", "device_id": "a", "payload": {}, "timeout": 5, "wait": 0, "deadman": None}
        for name in whole:
            if name != "deadman":
                body = whole | {name: None, "command_name": "x"}
                assert (await client.post("/command", body))["status"] == "sent", name
        deadman = {"after": 60, "command_name": "stop", "payload": None}
        await client.post("/command", {"device_id": "a", "command_name": "x", "deadman": deadman})
        await client.post("/command?device_id=a", {"device_id": None, "command_name": "x"})
        for name in ("timeout", "wait"):
            answer = await client.post("/command", {"device_id": "a", "command_name": "x", name: "5"}, 400)
            assert answer["error_code"] == "INVALID_FIELD_TYPE"
            await client.post(f"/command?device_id=a&command_name=x&{name}=null", status=400)
        await say(board, "registration", device_type="ESP32", metadata=None)
        command_id = (await client.post("/command", {"device_id": "a", "command_name": "y"}))["command_id"]
        for _ in range(9):
            frame = json.loads(await board.recv())
            if frame.get("command_id") == command_id:
                break
        fields = {"status": None, "payload": None, "execution_time": None, "device_type": None}
        await say(board, "command_ack", command_id=command_id, **fields)
        await eventually(lambda: row_has(client, f"/command-logs/{command_id}", status="ack_success"))


@in_a_loop
async def test_errors_say_what_to_do(database: Path) -> None:
    async with gateway_on(database, api_token="token-of-callers", device_token="token-of-boards") as client:
        answer = await client.get("/devices", 401)
        assert "Authorization: Bearer" in answer["error"]
        assert "AMHRPD_API_TOKEN" in answer["error"]
        assert "AMHRPD_DEVICE_TOKEN" in (await client.get("/ws/a", 401))["error"]
        form = {"Authorization": "Bearer token-of-callers", "Content-Type": "application/x-www-form-urlencoded"}
        answer = await client.post("/command?device_type=a&command_name=x", b"count=5", 400, headers=form)
        assert '{"count": 5}' in answer["error"]


def basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


@in_a_loop
async def test_tokens_open_their_own_door_and_no_other(database: Path) -> None:
    api, device = "token-of-callers", "token-of-boards"
    async with gateway_on(database, api_token=api, device_token=device) as client:
        good: list[dict[str, str]] = [
            {"Authorization": f"Bearer {api}"},
            {"Authorization": f"bearer {api}"},
            basic("", api),
            basic("me", api),
        ]
        bad = [
            {},
            {"Authorization": f"Bearer {device}"},
            {"Authorization": f"Bearer {api}x"},
            {"Authorization": "Bearer"},
            {"Authorization": "Basic ???"},
            {"Authorization": "Bearer tök"},
            basic(api, ""),
        ]
        for headers in good:
            await client.get("/devices", headers=headers)
            await client.get("/nothing", 404, headers=headers)
            assert "app" in await client.get("/health", headers=headers)
        for headers in bad:
            await client.get("/nothing", 404, headers=headers)
            for path in ("/devices", "/api/command-logs", f"/devices?token={api}"):
                async with client.session.get(f"http://127.0.0.1:{client.port}{path}", headers=headers) as response:
                    assert response.status == 401, (path, headers)
                    assert "Basic" in response.headers["WWW-Authenticate"]
                    assert (await response.json())["error_code"] == "UNAUTHORIZED"
            assert await client.get("/health", headers=headers) == {"status": "ok"}
        url = f"ws://127.0.0.1:{client.port}/ws/a"
        for query, headers in (
            (f"?token={device}", {}),
            ("", {"Authorization": f"Bearer {device}"}),
            ("", {"Authorization": device}),
            ("", basic("board", device)),
        ):
            async with await websockets.connect(url + query, additional_headers=headers, proxy=None) as board:
                await say(board, "heartbeat", device_type="ESP32")
                await eventually(lambda: client.gateway.registry.find("a"))
        for query, headers in (("", {}), (f"?token={api}", {}), ("", {"Authorization": f"Bearer {api}"}), ("?token=", {})):
            with pytest.raises(websockets.InvalidStatus) as refusal:
                await websockets.connect(url + query, additional_headers=headers, proxy=None)
            assert refusal.value.response.status_code == 401
            assert json.loads(refusal.value.response.body or b"")["error_code"] == "UNAUTHORIZED"


@in_a_loop
async def test_web_pages_of_others_drive_no_robot(database: Path) -> None:
    async with gateway_on(database, allowed_origins="https://dashboard.example") as client, client.board("a"):
        own = f"http://127.0.0.1:{client.port}"
        for origin, host, status in (
            (None, None, 200),
            (own, None, 200),
            ("https://dashboard.example", None, 200),
            ("http://pi.local:8000", "pi.local:8000", 200),
            ("http://pi", "pi", 200),
            ("http://[fe80::1]:8000", "[fe80::1]:8000", 200),
            ("https://evil.example", None, 403),
            ("http://127.0.0.1:1", None, 403),
            ("http://rebound.evil.example:8000", "rebound.evil.example:8000", 403),  # a public name for our address
            ("null", None, 403),
            ("file://", None, 403),
            ("https://dashboard.example.evil.example", None, 403),
        ):
            headers = {name: value for name, value in (("Origin", origin), ("Host", host)) if value is not None}
            # as fetch and as a form would send it
            for content_type in ("application/json", "text/plain", "application/x-www-form-urlencoded"):
                path = "/command?device_type=none&command_name=x"
                url = f"http://127.0.0.1:{client.port}{path}"
                async with client.session.post(url, data=b"{}", headers=headers | {"Content-Type": content_type}) as response:
                    assert response.status == status, (origin, host)
                    shared = [value for name, value in response.headers.items() if name.lower().startswith("access-control")]
                    assert shared == (["https://dashboard.example"] if origin == "https://dashboard.example" else [])
            found, answer = await client.ask("OPTIONS", "/command", headers=headers)
            assert found == (405 if status == 200 else 403)
            assert set(answer) == {"error", "error_code"}
        # What a browser asks first, before it sends JSON or a token from an allowed page.
        asks = {"Origin": "https://dashboard.example:443", "Access-Control-Request-Method": "POST"}
        async with client.session.options(f"{own}/command", headers=asks) as response:
            assert response.status == 204
            assert response.headers["Access-Control-Allow-Origin"] == asks["Origin"]
            assert {"Authorization", "Last-Event-ID"} <= set(response.headers["Access-Control-Allow-Headers"].split(", "))
        async with client.session.options(f"{own}/command", headers=asks | {"Origin": "https://evil.example"}) as response:
            assert response.status == 403
            assert "Access-Control-Allow-Origin" not in response.headers
        for origin in ("file://", own, None):
            async with await connect(client.port, "b", origin=origin):
                pass
        for origin in ("https://evil.example", "null", "file:///etc"):
            with pytest.raises(websockets.InvalidStatus) as refusal:
                await connect(client.port, "b", origin=origin)
            assert refusal.value.response.status_code == 403


@in_a_loop
async def test_bodies_that_are_too_large_compressed_or_strange(database: Path) -> None:
    async with gateway_on(database) as client:
        url = "/command?device_type=none&command_name=x"
        assert (await client.post(url, b"[" + b" " * (1 << 20), 413))["error_code"] == "PAYLOAD_TOO_LARGE"
        for encoding in ("gzip", "deflate", "br", "zstd", "x"):
            answer = await client.post(url, b"\x1f\x8b\x08", 415, headers={"Content-Encoding": encoding})
            assert answer["error_code"] == "UNSUPPORTED_MEDIA_TYPE"
        await client.post(url, b"{}", headers={"Content-Type": "application/json; charset=UTF-8"})
        for head in (b"Content-Length: -1", b"Content-Length: x", b"Content-Length: 5, 6", b"Transfer-Encoding: nonsense"):
            reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
            writer.write(b"POST /command HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n{}")
            async with asyncio.timeout(PATIENCE_S):
                status = (await reader.readline()).split()[1]
            assert status.startswith(b"4"), (head, status)
            writer.close()
        assert (await client.get("/command-logs"))["total"] == 1


@in_a_loop
async def test_what_is_no_http_gets_the_same_shape_and_no_traceback(
    database: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amhrpd.HttpConnection, "LINGERING_TIMEOUT_S", 0.1)
    head = b"POST /command?device_type=none&command_name=x HTTP/1.1\r\nHost: x\r\n"
    requests = {
        b"This is a webSocket client!\r\n\r\n": b"400",
        b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n": b"400",
        b"GET /health?" + b"x" * 17000 + b" HTTP/1.1\r\nHost: x\r\n\r\n": b"413",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 9000 + b"\r\n\r\n": b"413",
        head + b"Content-Length: -5\r\n\r\n": b"400",
        head + b"Transfer-Encoding: chunked\r\n\r\nnonsense\r\n": b"400",
    }
    with logged() as events:
        async with gateway_on(database) as client:
            for request, status in requests.items():
                reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
                writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")  # not only as the first of a connection
                async with asyncio.timeout(PATIENCE_S):
                    await reader.readuntil(b'"rows_rejected":0}\n')
                    writer.write(request)
                    answer, _, body = (await reader.read()).partition(b"\r\n\r\n")
                assert answer.split()[1] == status, (request[:60], answer)
                assert set(json.loads(body)) == {"error", "error_code"}
                writer.close()
            refused = head.replace(b"=none", b"=none&x=")
            for request in (
                head + b"Content-Length: 500\r\n\r\n{",
                head + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
                refused + b"Content-Length: 500\r\n\r\n{",
                refused + b"Transfer-Encoding: chunked\r\n\r\nnonsense\r\n{",
                b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{",
            ):
                reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
                writer.write(request)
                writer.write_eof()
                async with asyncio.timeout(PATIENCE_S):
                    await reader.read()
                writer.close()
            await eventually(lambda: len(client.server.connections) <= 1)  # what is thrown away is bounded, too
            await eventually(lambda: not any("RequestHandler" in repr(task) for task in asyncio.all_tasks()))
            payload = "%20" * 5000 + "%7B%7D"
            assert (await client.post(f"/command?device_type=none&command_name=x&payload={payload}"))["payload"] == {}
            answer = await client.post("/command?device_type=none&command_name=x&payload=", status=400)
            assert "payload in the query" in answer["error"]
            await client.post("/command?device_type=none&command_name=x", b"{}", headers={"Expect": "100-continue"})
            assert (await client.post("/command", b'{"v":1e999}', 400))["error"] == "the body has a number that is out of range"
        assert [event for event in events if event.get("level") == "error" or "exception" in event] == []
    assert "Unhandled" not in capfd.readouterr().err


@needing_openssl
@in_a_loop
async def test_tls(database: Path, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make_certificate(cert, key, "-nodes")
    context = ssl.create_default_context(cafile=str(cert))
    async with gateway_on(database, tls_cert=cert, tls_key=key) as client:
        url = f"wss://127.0.0.1:{client.port}/ws/a"
        async with websockets.connect(url, ssl=context, proxy=None) as board, background(answer_commands(board)):
            await say(board, "registration", device_type="ESP32")
            await eventually(lambda: client.gateway.registry.find("a"))
            command = f"https://127.0.0.1:{client.port}/command?device_id=a&command_name=x&wait=5"
            async with client.session.post(
                command, ssl=context, headers={"Origin": f"https://127.0.0.1:{client.port}"}
            ) as response:
                assert (await response.json())["status"] == "ack_success"
        with pytest.raises(aiohttp.ClientError):
            await client.session.get(f"http://127.0.0.1:{client.port}/health")


def connected_to(port: int) -> socket.socket:
    connection = socket.socket()
    connection.connect(("127.0.0.1", port))
    connection.setblocking(False)
    return connection


def memory_kb(pid: int) -> int:
    """What the process takes of the machine's memory (VmRSS)."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0])


@needing_openssl
@in_a_loop
async def test_tls_takes_little_memory_and_leaves_none_behind(database: Path, tmp_path: Path) -> None:
    """asyncio would take 300 KB a connection, and keep those whose handshake failed."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make_certificate(cert, key, "-nodes")
    context = ssl.create_default_context(cafile=str(cert))
    port = free_port()
    process = Process(database, port, {"AMHRPD_TLS_CERT": str(cert), "AMHRPD_TLS_KEY": str(key)})

    async def is_closed(connection: socket.socket) -> bool:
        with contextlib.suppress(ConnectionError):
            while await asyncio.get_running_loop().sock_recv(connection, 100):  # a TLS alert
                pass
        return True

    try:
        await eventually(lambda: "listening" in process.log)
        async with contextlib.AsyncExitStack() as stack:

            async def board(number: int) -> None:
                url = f"wss://127.0.0.1:{port}/ws/b{number}"
                options: dict[str, Any] = {"ssl": context, "proxy": None, "compression": None, "ping_interval": None}
                connection = await stack.enter_async_context(websockets.connect(url, **options))
                await say(connection, "registration", device_type="ESP32")

            await board(0)
            before_kb = memory_kb(process.pid)
            for number in range(1, 61):
                await board(number)
            assert (memory_kb(process.pid) - before_kb) / 60 < 90
            before_kb = memory_kb(process.pid)
            for _ in range(5):
                silent = [connected_to(port) for _ in range(200)]
                for number, connection in enumerate(silent):
                    if number % 2:
                        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
                    else:
                        connection.shutdown(socket.SHUT_WR)
                assert all(await asyncio.gather(*map(is_closed, silent)))
                for connection in silent:
                    connection.close()
            assert memory_kb(process.pid) - before_kb < 15_000
        assert "Traceback" not in process.log
    finally:
        process.send_signal(signal.SIGKILL)
        await process.exit_code()


# ======================================================================================================================
# A fleet
# ======================================================================================================================


@in_a_loop
async def test_1000_boards_connect_and_heartbeat_without_one_missed(database: Path) -> None:
    """The earlier backend stopped dead at the 16th."""
    amhrpd.raise_open_files_limit()
    async with process_on(database) as (process, client):
        wires = []
        for at in range(0, 1000, 50):
            wires += await asyncio.gather(*(Wire.connect(client.port, f"b{n}") for n in range(at, at + 50)))
        for wire in wires:
            wire.send(REGISTRATION)
        await eventually(lambda: all_online(client, 1000))
        before = {d["device_id"]: d["last_heartbeat"] for d in (await client.get("/devices"))["devices"]}
        for wire in wires:
            wire.send('{"message_type":"heartbeat","device_type":"ESP32"}')
        await eventually(lambda: all_later(client, before))
        for wire in wires:
            wire.writer.transport.abort()
        await eventually(lambda: all_online(client, 0))
        assert process.is_running()
    counts = dict(rows_of(database, "SELECT event, count(*) FROM device_connection_logs GROUP BY event"))
    assert counts["connected"] == 1000


async def all_online(client: Client, count: int) -> bool:
    return bool((await client.get("/health"))["devices_online"] == count)


async def all_later(client: Client, before: dict[str, str]) -> bool:
    devices = (await client.get("/devices"))["devices"]
    return all(device["last_heartbeat"] > before[device["device_id"]] for device in devices)


@in_a_loop
async def test_connections_that_ended_leave_nothing_for_the_collector(database: Path) -> None:
    def alive() -> int:
        return sum(isinstance(thing, amhrpd.HttpConnection) for thing in gc.get_objects())

    async with gateway_on(database) as client:
        gc.collect()
        gc.disable()
        try:
            for number in range(10):
                board = await client.wire(f"b{number}")
                board.writer.transport.abort()
                _, caller = await asyncio.open_connection("127.0.0.1", client.port)
                caller.write(b"POST /command HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n" + b"x" * 50_000)
                await caller.drain()
                await asyncio.sleep(0.02)
                caller.transport.abort()
                for request in (
                    b"GET /nothing HTTP/1.1\r\nHost: x\r\n",
                    b"PUT /devices HTTP/1.1\r\nHost: x\r\n",
                    b"GET /devices?x=1 HTTP/1.1\r\nHost: x\r\n",
                    b"GET /devices HTTP/1.1\r\nHost: evil.example\r\n",
                    b"GET /ws/a HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n",
                    b"GET /ws/a b HTTP/1.1\r\nHost: x\r\n",
                    b"GET /devices HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 5000 + b"\r\n",
                    b"GET /" + b"x" * 200_000,
                    b"POST /command HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n{",
                ):
                    reader, caller = await asyncio.open_connection("127.0.0.1", client.port)
                    caller.write(request + b"\r\n")
                    assert (await reader.readline()).split()[1].startswith(b"4"), request
                    caller.close()
            await eventually(
                lambda: alive() < 10
            )  # the client's own, and what a race may leave: each kind of end comes ten times
        finally:
            gc.enable()


@in_a_loop
async def test_full_collections_are_rare_while_it_serves(database: Path) -> None:
    code = f"import gc, os, sys; sys.path.insert(0, {str(HERE)!r}); import amhrpd; end = os._exit\n"
    code += "def show(code): print('at the end', gc.get_threshold()[2], gc.get_freeze_count(), flush=True); end(code)\n"
    code += "os._exit = show; amhrpd.main([])"
    async with process_on(database, code=code) as (process, _):
        process.send_signal(signal.SIGTERM)
        assert await process.exit_code() == 0
    (found,) = re.findall(r"at the end (\d+) (\d+)", process.log)
    assert int(found[0]) == 5 * gc.get_threshold()[2]
    assert int(found[1]) > 10_000


@in_a_loop
async def test_simulated_fleet_finds_everything_kept(database: Path) -> None:
    tokens = {"AMHRPD_API_TOKEN": "token-of-callers", "AMHRPD_DEVICE_TOKEN": "token-of-boards"}
    async with gateway_on(database, api_token=tokens["AMHRPD_API_TOKEN"], device_token=tokens["AMHRPD_DEVICE_TOKEN"]) as client:
        options = (
            "--url",
            f"http://127.0.0.1:{client.port}",
            "--devices",
            "12",
            "--duration",
            "2",
            "--status-interval",
            "0.05",
        )
        mishaps = ("--reconnect-rate", "60", "--failure-rate", "0.5", "--commands", "1")
        result = await asyncio.to_thread(run, "simulate", *options, *mishaps, **tokens)
        assert result.returncode == 0, result.stdout + result.stderr
        assert re.search(r"^missing +nothing$", result.stdout, re.MULTILINE)
        (sent, found) = re.findall(r"^snapshots +(\d+) sent, (\d+) in the history", result.stdout, re.MULTILINE)[0]
        assert int(sent) >= int(found) > 20
        cuts = client.rows("SELECT count(*) FROM device_connection_logs WHERE details LIKE '%the connection was lost%'")
        assert cuts[0][0] > 0
        assert len(client.gateway.registry) == 12
        headers = {"Authorization": "Bearer token-of-callers"}
        logs = (await client.get("/command-logs", headers=headers))["logs"]
        assert len(logs) == 1


@in_a_loop
async def test_simulation_with_something_missing_ends_with_1(
    database: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def played(port: int, **plan: Any) -> tuple[int, str]:
        fleet = amhrpd.Fleet(amhrpd.FleetPlan(url=f"http://127.0.0.1:{port}", devices=2, duration_s=0.7, **plan))
        exit_code = await fleet.play(asyncio.Event())
        return exit_code, "".join(capsys.readouterr())

    with pytest.raises(amhrpd.StartError, match=r"no answer from http://127\.0\.0\.1:"):
        await played(free_port())
    async with gateway_on(database, device_token="token-of-boards") as client:
        exit_code, shown = await played(client.port, commands=0, device_token="token-of-nobody")
        assert exit_code == 1
        assert "missing: sim_0002, which never came up" in shown
    put = amhrpd.Backlog.put_telemetry

    def lose_one(self: amhrpd.Backlog, table: Any, row: amhrpd.Values, json: bytes) -> None:
        if b'"seq":3}' not in json:
            put(self, table, row, json)

    monkeypatch.setattr(amhrpd.Backlog, "put_telemetry", lose_one)
    monkeypatch.setattr(amhrpd.Dispatch, "acknowledge", lambda *_: None)
    async with gateway_on(database) as client:
        exit_code, shown = await played(client.port, commands=3, status_interval_s=0.05)
        assert exit_code == 1
        assert re.search(r"missing: sim_0001: 1 of \d+ snapshots$", shown, re.MULTILINE), shown
        assert re.search(r"missing: command \S+: 2 acks$", shown, re.MULTILINE), shown


def test_readings_of_simulated_boards_move_smoothly() -> None:
    minute = [amhrpd.readings(1, second) for second in range(60)]
    for name, step in {"temperature": 0.5, "humidity": 0.5, "battery": 1, "rssi": 2}.items():
        values = [reading[name] for reading in minute]
        assert len(set(values)) > 5
        assert all(abs(a - b) <= step for a, b in itertools.pairwise(values)), name
    assert amhrpd.readings(1, 0) != amhrpd.readings(2, 0)


@in_a_loop
async def test_simulation_without_an_end_shows_commands_and_ends_with_0_on_ctrl_c(database: Path) -> None:
    async with gateway_on(database) as client:
        master, terminal = os.openpty()
        command = [sys.executable, str(HERE / "amhrpd.py"), "simulate", "--url", f"http://127.0.0.1:{client.port}"]
        popen = subprocess.Popen([*command, "--devices", "2", "--duration", "0"], stdout=subprocess.PIPE, stderr=terminal)
        os.close(terminal)
        try:
            await eventually(lambda: all_online(client, 2))
            await client.post("/command?device_type=ESP32&command_name=wave", {"to": "you"})
            await eventually(lambda: b'sim_0002: \'wave\' {"to": "you"}' in os.read(master, 65536))
            popen.send_signal(signal.SIGINT)
            shown, _ = await asyncio.to_thread(popen.communicate, timeout=PATIENCE_S)
            assert popen.returncode == 0
            assert re.search(rb"^missing +nothing$", shown, re.MULTILINE)
        finally:
            popen.kill()
            popen.wait()
            os.close(master)


# ======================================================================================================================
# The page, in a real browser
# ======================================================================================================================

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_a_browser = needing(
    pytest.mark.browser, "" if CHROMIUM and playwright else "no Chromium or no playwright to look at the page with"
)
NETWORK_TROUBLE = r"Failed to load resource|net::ERR"  # what Chromium itself says when the gateway is away or refuses


@contextlib.asynccontextmanager
async def page_on(
    client: Client, *, allowed: str = "^$", path: str | None = "/", script: str = "", **options: Any
) -> AsyncIterator[Page]:
    """The gateway's page, open in Chromium. Whatever goes wrong in it or in its other windows, but what is allowed, fails the
    test. A script runs before the page's own.
    """
    wrong: list[str] = []
    async with chromium() as browser:
        context = await browser.new_context(**{"viewport": {"width": 1280, "height": 860}} | options)
        context.set_default_timeout(PATIENCE_S * 1000)
        context.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        context.on("weberror", lambda error: wrong.append(str(error.error)))
        context.on("request", lambda request: None if is_own(client, request.url) else wrong.append(request.url))
        page = await context.new_page()
        if script:
            await page.add_init_script(script)
        if path is not None:
            await page.goto(f"http://127.0.0.1:{client.port}{path}")
        yield page
    assert not [text for text in wrong if not re.search(allowed, text)]


@contextlib.asynccontextmanager
async def chromium(*flags: str) -> AsyncIterator[Browser]:
    async with playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *flags])
        try:
            yield browser
        finally:
            await browser.close()


def is_own(client: Client, url: str) -> bool:
    return url.startswith((f"http://127.0.0.1:{client.port}/", "data:"))


async def shows(page: Page, selector: str, text: str, *, within_s: float = PATIENCE_S) -> None:
    """Wait until an element has this text in it."""
    await page.locator(selector, has_text=text).first.wait_for(timeout=within_s * 1000)


async def send_command(page: Page, name: str) -> None:
    await page.get_by_label("Command", exact=True).fill(name)
    await page.get_by_role("button", name="Send", exact=True).click()


async def tell_waves(board: ClientConnection, interval_s: float = 0.05) -> None:
    """A temperature that moves smoothly, for ever."""
    for number in itertools.count():
        await say(board, "status", payload={"temperature": round(20 + math.sin(number / 10), 3), "mode": "hold"})
        await asyncio.sleep(interval_s)


@in_a_loop
async def test_page_is_one_small_file_that_nobody_else_can_use(database: Path) -> None:
    async with gateway_on(database) as client, client.session.get(f"http://127.0.0.1:{client.port}/") as response:
        text = await response.text()
        assert (response.status, response.content_type, response.charset) == (200, "text/html", "utf-8")
        assert len(text.encode()) < 40_000
        assert not re.search(
            r"""(src|href)=["']?(https?:)?//|@import|url\(|innerHTML|insertAdjacentHTML|document\.write""", text
        )
        policy = dict(part.strip().split(" ", 1) for part in response.headers["Content-Security-Policy"].split(";"))
        assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
        assert policy["connect-src"] == "'self'"
        assert policy["script-src"].startswith("'sha256-")
        assert policy["style-src"].startswith("'sha256-")
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Referrer-Policy"] == "no-referrer"


@in_a_browser
@in_a_loop
async def test_page_shows_a_board_live_and_sends_it_commands(database: Path) -> None:
    async with gateway_on(database) as client, page_on(client) as page:
        await shows(page, "#none", f"ws://127.0.0.1:{client.port}/ws/")
        async with client.board("servo_1", "ESP32-S3") as board:
            async with background(tell_waves(board), answer_commands(board, payload={"angle": 90})):
                card = page.locator("#boards li")
                await shows(page, "#boards li", "online")
                await shows(page, "#boards li", "ESP32-S3")
                await shows(page, "#boards li", "hold")
                reading = card.locator("dd").first
                before = await reading.inner_text()
                await eventually(lambda: differs(reading, before))
                await eventually(lambda: has_sparkline(card))
                await page.locator("#to").select_option("every ESP32-S3 (1 online)")
                await page.get_by_label("Command", exact=True).fill("turn")
                await page.get_by_label("Payload").fill('{"angle": 90')
                await page.keyboard.press("Tab")
                await page.keyboard.press("Enter")
                await shows(page, "#answer", "The payload is no JSON")
                await page.get_by_label("Payload").fill('{"angle": 90}')
                await page.get_by_role("button", name="Send", exact=True).click()
                await shows(page, "#commands li", "✓ 1 board answered success")
                await page.locator("#commands summary").click()
                await shows(page, "#commands pre", 'servo_1: success {"angle":90}')
                await page.get_by_role("button", name="Stop all boards").click()
                await shows(page, "#said", "✓ 1 board answered success")
                assert (await client.get("/command-logs?limit=1"))["logs"][0]["command_name"] == "stop"
            await say(board, "alert", alert_type="obstacle", message="wall")
            await shows(page, ".card.alert", "obstacle: wall")
        await shows(page, ".card.offline", "■ offline")
        assert (await page.title()).startswith("1 offline")


async def has_sparkline(card: Any) -> bool:
    return str(await card.locator("path").first.get_attribute("d")).count("L") > 5


async def differs(element: Any, before: str) -> bool:
    return bool(await element.inner_text() != before)


@in_a_browser
@in_a_loop
async def test_page_follows_a_clock_that_goes_back(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway_on(database) as client, page_on(client) as page, client.board("a") as board:
        await say(board, "status", payload={"n": 21})
        await shows(page, "#boards dd", "21")
        now = amhrpd.utc_now
        monkeypatch.setattr(amhrpd, "utc_now", lambda: now() - timedelta(hours=1))
        await say(board, "status", payload={"n": 25})
        await shows(page, "#boards dd", "25")


async def has_states(client: Client, device_id: str, count: int) -> bool:
    return bool((await client.get(f"/state-history/{device_id}?limit=1000"))["total"] >= count)


@in_a_browser
@in_a_loop
async def test_page_shows_one_board_in_depth(database: Path) -> None:
    async with gateway_on(database) as client, page_on(client) as page:
        async with client.board("servo_1", metadata={"firmware_version": "2.0.0"}) as board:
            for number in range(1, 31):
                await say(board, "status", payload={"angle": number, "mode": "hold"})
            await page.get_by_role("link", name="servo_1").click()
            await shows(page, ".plot", "angle")
            await shows(page, ".plot output", "30")
            assert await page.locator(".plot .y").all_inner_texts() == ["0", "10", "20", "30"]
            for name in ("An hour", "A day", "1,000 states"):
                await page.get_by_label("Range of the plots").select_option(name)
                await shows(page, ".plot output", "30")
            await say(board, "status", payload={"angle": 31})
            await shows(page, ".plot output", "31")
            await shows(page, "#record", "2.0.0")
            await shows(page, "#history tr", "connected")
            assert await page.get_by_role("button", name="Delete").is_disabled()
            table = str(await page.get_by_role("link", name="Download a table").get_attribute("href"))
            assert table.endswith("/state-history/servo_1?format=excel&limit=100000")
            async with client.session.get(table) as response:
                assert (response.status, response.content_type) == (200, "text/csv")
            assert await page.locator("#to option:checked").inner_text() == "servo_1"
        await shows(page, "#history tr", "disconnected")
        page.on("dialog", lambda dialog: dialog.accept())
        await page.get_by_role("button", name="Delete").click()
        await shows(page, "#work", "servo_1 is forgotten, with 31 states")
        await shows(page, "#none", "No board has connected yet")
        await client.get("/devices/servo_1", 404)


@in_a_browser
@in_a_loop
async def test_page_draws_a_day_of_states(database: Path) -> None:
    async with gateway_on(database) as client, client.board("old"):
        now = datetime.now(UTC).replace(tzinfo=None)
        rows = [
            ("old", "ESP32", json.dumps({"n": number}), str(now - timedelta(seconds=10 * number))) for number in range(8000)
        ]
        with contextlib.closing(sqlite3.connect(database, timeout=10)) as connection, connection:
            sql = "INSERT INTO device_state_snapshots (device_id, device_type, state_data, timestamp) VALUES (?, ?, ?, ?)"
            connection.executemany(sql, rows)
        async with page_on(client, path="/#old") as page:
            await page.get_by_label("Range of the plots").select_option("A day")
            await page.get_by_text("10000", exact=True).wait_for()  # the scale's end
            line = str(await page.locator(".plot path").nth(1).get_attribute("d"))
            assert 800 <= line.count("L") + line.count("M") <= 1000


@in_a_browser
@in_a_loop
async def test_page_asks_for_the_token_and_for_a_new_one(database: Path) -> None:
    port = free_port()
    headers = {"Authorization": "Bearer a-token-1"}
    async with gateway_on(database, port=port, api_token="a-token-1", headers=headers) as client:
        async with client.session.get(
            f"http://127.0.0.1:{port}/", headers={"Accept": "text/html,*/*", "Authorization": "none"}
        ) as response:
            assert (response.status, response.headers["WWW-Authenticate"]) == (401, 'Basic realm="AMHR-PD"')
        credentials = {"username": "anybody", "password": "a-token-1"}
        async with client.board("servo_1"), page_on(client, allowed=NETWORK_TROUBLE, http_credentials=credentials) as page:
            await shows(page, "#boards li", "servo_1")
            await shows(page, "#link", "live")
            await page.get_by_label("Command", exact=True).fill("blink")
            await page.get_by_role("button", name="Send", exact=True).click()
            await shows(page, "#commands li", "blink")
            await client.gateway.stop()
            await shows(page, "#link", "No news from the gateway since ")
            async with moved(page, port, gateway_on(database.with_name("other.db"), port=0, api_token="a-token-2")):
                await shows(page, "#notice", "wants another token")


@contextlib.asynccontextmanager
async def moved(page: Page, port: int, other: contextlib.AbstractAsyncContextManager[Client]) -> AsyncIterator[None]:
    """What the page asks of the port, it gets from another gateway."""
    async with other as client:

        async def pass_on(route: Any) -> None:
            answer = await route.fetch(url=route.request.url.replace(f":{port}/", f":{client.port}/"))
            await route.fulfill(response=answer)

        await page.route("**", pass_on)
        yield
        await page.unroute_all(behavior="ignoreErrors")


@in_a_browser
@in_a_loop
async def test_page_survives_a_restart_of_the_gateway(database: Path) -> None:
    port = free_port()
    async with contextlib.AsyncExitStack() as stack:
        async with gateway_on(database, port=port) as client:
            page = await stack.enter_async_context(page_on(client, allowed=NETWORK_TROUBLE))
            async with client.board("servo_1"):
                await shows(page, ".card", "online")
            await shows(page, "#link", "live")
        await shows(page, "#link", "No news from the gateway since ")
        async with gateway_on(database, port=port) as client, client.board("wheel_1") as board:
            await shows(page, "#link", "live · 1 of 2 boards online")
            await shows(page, ".card.offline", "servo_1")
            await say(board, "status", payload={"speed": 42})
            await shows(page, ".card", "42")
            await stack.aclose()


@in_a_browser
@in_a_loop
async def test_page_needs_no_disk_and_says_what_is_wrong_with_it(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amhrpd.Writer, "STALLED_S", 0.1)
    async with gateway_on(database) as client, client.board("servo_1") as board:
        with disk_that_stalls(database):
            await say(board, "status", payload={"angle": 1})
            await eventually(lambda: health_is(client, 503))
            async with page_on(client, allowed=NETWORK_TROUBLE) as page:
                await shows(page, "#notice", "The gateway is degraded: ")
                await say(board, "status", payload={"angle": 77})
                await shows(page, ".card", "77")
                await page.get_by_role("button", name="Stop all boards").click()
                assert (await hear(board, "command"))["command_name"] == "stop"


@in_a_browser
@in_a_loop
async def test_page_runs_nothing_that_a_board_says(database: Path) -> None:
    evil = "<img src=x onerror=alert(1)><script>alert(1)</script>\"'`${alert(1)}"
    state = {evil: 1, "text": evil, "__proto__": {"polluted": 1}, "constructor": 5, "deep": {evil: [evil]}}
    async with gateway_on(database) as client, page_on(client) as page:
        page.on("dialog", lambda dialog: pytest.fail(f"it ran: {dialog.message}"))
        async with (
            client.board("evil", evil[:50], metadata={evil: evil}) as board,
            background(answer_commands(board, "failure", payload={evil: evil})),
        ):
            for _ in range(3):
                await say(board, "status", payload=state)
            await say(board, "alert", alert_type=evil, message=evil)
            await client.post("/command", {"device_type": "*", "command_name": evil, "payload": {evil: evil}})
            await shows(page, ".card", evil)
            await shows(page, "#commands li", evil)
            await page.locator("#commands summary").click()
            await page.get_by_role("link", name="evil").click()
            await shows(page, "#record", "onerror")
            await shows(page, ".plot", evil)
            await shows(page, "#alert", evil)
        assert await page.locator("main img, main script").count() == 0
        assert await page.evaluate("({}).polluted") is None


@in_a_browser
@in_a_loop
async def test_page_shows_1000_boards_without_stutter(database: Path) -> None:
    async with gateway_on(database) as client, contextlib.AsyncExitStack() as stack:
        boards = []
        for number in range(1000):
            board = await stack.enter_async_context(await connect(client.port, f"board_{number}"))
            await say(board, "status", device_type="ESP32", payload={"temperature": 20 + number / 100, "rssi": -60})
            boards.append(board)
        page = await stack.enter_async_context(page_on(client))
        await shows(page, "#link", "live · 1000 of 1000 boards online")
        assert await page.locator("#boards li").count() == 1000
        assert await page.locator("#boards li:has(dd)").count() < 100  # those in view
        ids = await page.locator("#boards li a").evaluate_all("links => links.slice(0, 11).map(link => link.textContent)")
        assert ids == [f"board_{number}" for number in range(11)]

        async def report() -> None:
            for number in itertools.count():
                await say(boards[number % 1000], "status", payload={"temperature": number % 30, "rssi": -60})
                await asyncio.sleep(0.002)

        async with background(report()):
            longest_ms = await page.evaluate(
                """() => new Promise((done) => {
                    let longest = 0, before = performance.now(), end = before + 3000;
                    requestAnimationFrame(function look(now) {
                        [longest, before] = [Math.max(longest, now - before), now];
                        now < end ? requestAnimationFrame(look) : done(longest);
                    });
                })"""
            )
        assert longest_ms < 400  # on a machine that plays 1,000 boards and the gateway besides
        await page.get_by_label("Find boards").fill("board_999")
        await page.locator(".card", has_text="board_999").wait_for(state="visible")
        await page.locator(".card", has_text="board_1").first.wait_for(state="hidden")
        assert await page.locator(".card:visible").count() == 1


@in_a_browser
@in_a_loop
async def test_page_fits_a_phone_and_follows_light_and_dark(database: Path) -> None:
    async with gateway_on(database) as client, client.board("x" * 64, "y" * 50, metadata={"z" * 99: "w" * 99}) as board:
        await say(board, "status", payload={"a" * 90: 1.23456789e-7, "b" * 90: "c" * 900, "n": [1, 2, 3]})
        await say(board, "alert", alert_type="d" * 90, message="e" * 900)
        await client.post("/command", {"device_type": "*", "command_name": "f" * 200, "payload": {"g" * 90: 1}})
        shades = []
        for scheme in ("light", "dark"):
            size = {"width": 360, "height": 740}
            async with page_on(client, viewport=size, color_scheme=scheme, has_touch=True) as page:
                await shows(page, ".card", "online")
                assert await page.evaluate("document.documentElement.scrollWidth") <= 360
                await page.get_by_text("Send a command").tap()
                await shows(page, "#commands li", "fff")
                assert await page.get_by_label("Command", exact=True).is_visible()
                await page.get_by_text("Send a command").tap()
                await page.get_by_role("link", name="x" * 64).tap()
                await page.locator(".plot").first.wait_for()
                assert await page.evaluate("document.documentElement.scrollWidth") <= 360
                stop = await page.get_by_role("button", name="Stop all boards").bounding_box()
                assert stop is not None
                assert 44 <= stop["height"] < 740 - stop["y"] + 1  # in view and as large as a thumb
                shades.append(await page.evaluate("getComputedStyle(document.documentElement).backgroundColor"))
        assert shades[0] != shades[1]


@in_a_browser
@in_a_loop
async def test_page_is_live_only_while_it_hears_the_gateway(database: Path) -> None:
    async with process_on(database) as (process, client), client.board("servo_1") as board:
        await say(board, "status", payload={"angle": 1})
        async with page_on(client) as page:
            await shows(page, ".card", "● online")
            process.send_signal(signal.SIGSTOP)
            await shows(page, "#link", "No news from the gateway since ", within_s=14)
            await shows(page, ".old .card", "○ was online")
            assert (await page.title()).startswith("away")
            process.send_signal(signal.SIGCONT)
            await shows(page, "#link", "live · 1 of 1 board online", within_s=14)
            await say(board, "status", payload={"angle": 2})
            await shows(page, "body:not(.old) .card dd", "2")


@in_a_browser
@in_a_loop
async def test_page_knows_what_became_of_a_command_that_nobody_answered(database: Path) -> None:
    async with (
        process_on(database) as (process, client),
        client.board("servo_1") as board,
        page_on(client) as page,
        background(answer_commands(board)),
    ):
        await shows(page, "#link", "1 of 1 board online")
        process.send_signal(signal.SIGSTOP)
        await send_command(page, "turn")
        await shows(page, "#answer", "Nobody knows whether turn was sent: no answer in time")
        process.send_signal(signal.SIGCONT)
        await shows(page, "#commands li", "✓ 1 board answered success")
        await shows(page, "#commands li", "turn → all boards")
        await eventually(lambda: is_empty(page, "#answer"))
        assert [row["command_name"] for row in (await client.get("/command-logs"))["logs"]] == ["turn"]


@in_a_browser
@in_a_loop
async def test_page_says_not_sent_only_of_what_was_not_sent(database: Path) -> None:
    is_over = asyncio.Event()

    async def hold_back(route: Route) -> None:
        name = json.loads(route.request.post_data or "{}")["command_name"]
        if name == "turn":  # it arrives, and its answer doesn't
            await route.fetch()
        if name in ("turn", "blink"):
            await is_over.wait()
            with contextlib.suppress(playwright.Error):  # the page gave it up
                await route.abort()
        else:
            await route.continue_()

    async with gateway_on(database) as client, page_on(client, allowed=NETWORK_TROUBLE) as page, client.board("a"):
        await shows(page, "#link", "1 of 1 board online")
        await page.route("**/command", hold_back)
        await send_command(page, "turn")
        await shows(page, "#answer", "Nobody knows whether turn was sent")
        await eventually(lambda: is_empty(page, "#answer"))
        await send_command(page, "blink")
        await shows(page, "#answer", "Nobody knows whether blink was sent")
        await shows(page, "#answer", "Not sent: the gateway knows nothing of it")
        await send_command(page, "x" * 255)
        await shows(page, "#commands li", "xxx")
        await page.locator("#to").select_option("several boards …")
        await page.get_by_label("Boards, with commas between").fill("a, nobody")
        await send_command(page, "jump")
        await shows(page, "#answer", "Not sent: ")
        names = [row["command_name"] for row in (await client.get("/command-logs"))["logs"]]
        assert names == ["x" * 255, "turn"]
        is_over.set()


async def is_empty(page: Page, selector: str) -> bool:
    return not await page.locator(selector).inner_text()


@in_a_browser
@in_a_loop
async def test_stop_that_lay_in_a_gateway_that_stood_still_is_told_when_it_goes_on(database: Path) -> None:
    async with (
        process_on(database) as (process, client),
        client.board("wheel_1") as board,
        page_on(client) as page,
        background(answer_commands(board)),
    ):
        await shows(page, "#link", "1 of 1 board online")
        process.send_signal(signal.SIGSTOP)
        await page.get_by_role("button", name="Stop all boards").click()
        await shows(page, "#said", "STOP: no answer yet")
        await shows(page, "#said", "Nobody knows whether stop was sent")
        process.send_signal(signal.SIGCONT)
        await shows(page, "#said", "✓ 1 board answered success")
        await shows(page, "#link", "live")


@in_a_browser
@in_a_loop
async def test_page_sends_to_no_other_target_than_the_one_chosen(database: Path) -> None:
    async with gateway_on(database) as client, page_on(client) as page, client.board("other"):
        async with client.board("robot", "wheels"):
            await shows(page, "#link", "2 of 2 boards online")
            await page.locator("#to").select_option("robot")
        await client.ask("DELETE", "/devices/robot")
        await shows(page, "#to", "nobody: robot is not there any more")
        await send_command(page, "forward")
        await shows(page, "#answer", "Not sent: robot is not there any more")
        async with client.board("robot", "wheels") as robot:
            await shows(page, "#link", "2 of 2 boards online")
            await send_command(page, "forward")  # it is chosen no more, until somebody chooses
            await shows(page, "#answer", "Not sent: robot is not there any more")
            await page.locator("#to").select_option("every wheels (1 online)")
            await say(robot, "registration", device_type="legs")
            await shows(page, "#to", "nobody: every wheels is not there any more")
            await send_command(page, "forward")
            await shows(page, "#answer", "Not sent: every wheels is not there any more")
        assert (await client.get("/command-logs"))["total"] == 0


@in_a_browser
@in_a_loop
async def test_page_tells_types_apart_by_their_blanks(database: Path) -> None:
    async with gateway_on(database) as client, client.board("plain"), client.board("padded", " ESP32 ") as padded:
        async with page_on(client) as page:
            await shows(page, ".card", '" ESP32 " · seen')
            await page.locator("#to").select_option('every " ESP32 " (1 online)')
            await send_command(page, "blink")
            assert (await hear(padded, "command"))["command_name"] == "blink"
            await client.post("/command", {"device_id": ["plain", "padded"], "command_name": "both"})
            await shows(page, "#commands li", "both → 2 boards")
        devices = {row["command_name"]: row["device_type"] for row in (await client.get("/command-logs"))["logs"]}
        assert devices == {"blink": " ESP32 ", "both": "*"}


@in_a_browser
@in_a_loop
async def test_page_shows_when_a_board_was_heard_last(database: Path) -> None:
    async def age(route: Route) -> None:
        answer = await (await route.fetch()).json()
        for device in answer["devices"]:
            device["last_heartbeat"] = (datetime.now(UTC) - timedelta(seconds=41)).isoformat().removesuffix("+00:00")
        await route.fulfill(json=answer)

    async with gateway_on(database) as client, client.board("servo_1") as board, page_on(client, path=None) as page:
        await page.route("**/devices", age)
        await page.goto(f"http://127.0.0.1:{client.port}/")
        await shows(page, ".card", "seen 4")
        async with background(beat(board)):
            await shows(page, ".card", "seen now")


async def beat(board: ClientConnection) -> None:
    """A heartbeat now and then, for ever."""
    while True:
        await say(board, "heartbeat", device_type="ESP32")
        await asyncio.sleep(0.5)


@in_a_browser
@in_a_loop
async def test_page_shows_deadmen_as_they_come_and_go(database: Path) -> None:
    async with gateway_on(database) as client, page_on(client) as page, client.board("wheel_1") as board:
        await shows(page, ".card", "online")
        async with background(answer_commands(board)):
            await client.post("/command", driving(60, "wheel_1"))
            await shows(page, ".card", "deadman due")
            await client.post("/command", {"device_id": "wheel_1", "command_name": "stop"})
            await page.locator(".card", has_not_text="deadman").wait_for()
            await page.get_by_role("link", name="wheel_1").click()
            await client.post("/command", driving(1, "wheel_1"))
            await shows(page, "#facts", "deadman due")
            await page.locator("#facts", has_not_text="deadman").wait_for()


@in_a_browser
@in_a_loop
async def test_what_is_refused_once_is_asked_again_and_told_where_it_belongs(database: Path) -> None:
    async def refuse(route: Route) -> None:
        await route.fulfill(status=429, json={"error": "too many at once", "error_code": "RESOURCE_EXHAUSTED"})

    async with gateway_on(database) as client, client.board("left") as left, client.board("right") as right:
        for board in (left, right):
            for number in range(9):
                await say(board, "status", payload={"n": number})
        await eventually(lambda: has_states(client, "left", 9))
        async with page_on(client, allowed=NETWORK_TROUBLE, path=None) as page:
            await page.route("**/*-history/left?*", refuse)
            await page.goto(f"http://127.0.0.1:{client.port}/#/left")
            await shows(page, "#unread-readings", "The readings can't be read: too many at once. Trying again")
            await shows(page, "#unread-connections", "The connections can't be read: too many at once. Trying again")
            await page.get_by_role("link", name="all boards").click()
            await page.get_by_role("link", name="right").click()
            await shows(page, ".plot output", "8")
            assert await is_empty(page, "#unread-readings")
            assert await is_empty(page, "#unread-connections")
            await page.get_by_role("link", name="all boards").click()
            await eventually(lambda: has_sparkline(page.locator(".card", has_text="right")))
            assert await page.locator(".card .spark").count() == 1
            await page.unroute_all()
            await eventually(lambda: has_sparkline(page.locator(".card", has_text="left")))


@in_a_browser
@in_a_loop
async def test_page_draws_the_largest_and_the_smallest_numbers(database: Path) -> None:
    async with gateway_on(database) as client, client.board("odd") as board, page_on(client, path="/#/odd") as page:
        values = {"large": [-1e308, 1.7e308], "small": [0, 5e-324], "flat": [1e300, 1e300], "near": [1e15, 1e15 + 0.125]}
        for number in range(2):
            await say(board, "status", payload={name: pair[number] for name, pair in values.items()})
        await eventually(lambda: page.locator(".plot").count())
        await shows(page, ".plot output", "1.7e+308")
        lines = "paths => paths.map((path) => path.getAttribute('d'))"
        paths = await page.locator(".plot path").evaluate_all(lines)
        await page.get_by_role("link", name="all boards").click()
        await shows(page, ".card dd", "1.7e+308")
        await eventually(lambda: page.locator(".card .spark").count())
        paths += await page.locator(".card .spark").evaluate_all(lines)
        assert len(paths) == 4 * 2 + 4
        assert not [path for path in paths if re.search("NaN|Infinity|undefined", path)]


@in_a_browser
@in_a_loop
async def test_board_that_was_looked_at_gives_its_memory_back(database: Path) -> None:
    async with gateway_on(database) as client, contextlib.AsyncExitStack() as stack:
        ids = [f"board_{number}" for number in range(8)]
        for device_id in ids:
            await stack.enter_async_context(client.board(device_id))
        state = json.dumps({f"n{number}": number for number in range(40)})
        with contextlib.closing(sqlite3.connect(database, timeout=10)) as connection, connection:
            sql = "INSERT INTO device_state_snapshots (device_id, device_type, state_data, timestamp) VALUES (?, ?, ?, ?)"
            now = datetime.now(UTC).replace(tzinfo=None)
            moments = [str(now - timedelta(seconds=number)) for number in range(1000)]
            connection.executemany(sql, [(device_id, "ESP32", state, at) for device_id in ids for at in moments])
        page = await stack.enter_async_context(page_on(client))
        tools = await page.context.new_cdp_session(page)

        async def used_mb() -> float:
            await tools.send("HeapProfiler.collectGarbage")
            return float((await tools.send("Runtime.getHeapUsage"))["usedSize"]) / 1e6

        used: list[float] = []
        for device_id in ids:
            await page.get_by_role("link", name=device_id).click()
            await page.locator(".plot").nth(39).wait_for()
            await page.get_by_role("link", name="all boards").click()
            await page.locator(".card").first.wait_for()
            used.append(await used_mb())
        assert used[-1] < used[0] + 8, used  # one board's points take some 3 MB


@in_a_browser
@in_a_loop
async def test_stop_goes_out_at_once_from_one_of_six_windows(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_over = asyncio.Event()

    async def answer_late(*_: Any, **__: Any) -> list[Any]:
        await is_over.wait()
        return []

    async with gateway_on(database) as client, client.board("wheel_1") as board, page_on(client) as page:
        windows = [page]
        for _ in range(5):
            windows.append(await page.context.new_page())
            await windows[-1].goto(page.url)
        for number, window in enumerate(windows):
            await shows(window, "#link", "live · 1 of 1 board online")
            await say(board, "status", payload={"n": 100 + number})
            await shows(window, ".card dd", str(100 + number))
        await eventually(lambda: streams_of(windows, 1))
        monkeypatch.setattr(amhrpd.Store, "history", answer_late)
        for window in windows:  # each asks for two histories
            await window.get_by_role("link", name="wheel_1").click()
            await shows(window, "#name", "wheel_1")
        await windows[3].get_by_role("button", name="Stop all boards").click()
        assert (await hear(board, "command"))["command_name"] == "stop"
        assert await stop_waited_ms(windows[3]) < 1000
        is_over.set()
        (leader,) = [window for window in windows if await window.evaluate("stream !== null")]
        windows.remove(leader)
        await leader.close(run_before_unload=True)
        await eventually(lambda: streams_of(windows, 1))
        await say(board, "status", payload={"n": 7})
        for window in windows:
            await shows(window, ".plot output", "7")


async def stop_waited_ms(page: Page) -> float:
    """How long the request of STOP ALL waited for a connection."""
    await shows(page, "#said", "Stop, ")
    timing = "performance.getEntriesByType('resource').filter(({ name }) => name.endsWith('/command'))"
    return float(await page.evaluate(f"{timing}.map((entry) => entry.requestStart - entry.startTime)[0]"))


async def streams_of(windows: Sequence[Page], count: int) -> bool:
    return [await window.evaluate("stream !== null") for window in windows].count(True) == count


@in_a_browser
@in_a_loop
async def test_hidden_tabs_leave_their_connections_to_the_one_that_is_seen(database: Path) -> None:
    port = free_port()
    async with (
        gateway_on(database) as client,
        client.board("wheel_1") as board,
        chromium(f"--remote-debugging-port={port}"),
        playwright.async_playwright() as driver,
    ):  # as it is: what Playwright opens by itself is never hidden
        browser = await driver.chromium.connect_over_cdp(f"http://127.0.0.1:{port}", no_defaults=True)
        (context,) = browser.contexts
        context.set_default_timeout(PATIENCE_S * 1000)
        tabs, asked = [], []
        for _ in range(7):
            tabs.append(await context.new_page())
            await tabs[-1].bring_to_front()
            await tabs[-1].goto(f"http://127.0.0.1:{client.port}/")
            await shows(tabs[-1], "#link", "live · 1 of 1 board online")
        assert [await tab.evaluate("document.hidden") for tab in tabs] == [True] * 6 + [False]
        assert not any([await tab.evaluate("stream !== null") for tab in tabs[:-1]])
        for tab in tabs[:-1]:
            tab.on("request", lambda request: asked.append(request.url))
        await say(board, "status", payload={"n": 1})
        await shows(tabs[-1], ".card dd", "1")
        await tabs[-1].get_by_role("button", name="Stop all boards").click()
        assert (await hear(board, "command"))["command_name"] == "stop"
        assert await stop_waited_ms(tabs[-1]) < 1000
        async with tabs[-1].expect_request("**/health"):  # what is regular comes round
            pass
        assert asked == []
        assert await tabs[0].evaluate("boards.get('wheel_1').device.state") is None  # it hears nothing either
        await tabs[0].bring_to_front()
        await shows(tabs[0], ".card dd", "1")
        await shows(tabs[0], "#link", "live")
        await eventually(lambda: streams_of(tabs, 1))


@in_a_browser
@in_a_loop
async def test_page_tells_not_read_from_none(database: Path) -> None:
    async def refuse(route: Route) -> None:
        await route.fulfill(status=503, json={"error": "the store stalls", "error_code": "STORE_UNAVAILABLE"})

    async with gateway_on(database) as client, page_on(client, allowed=NETWORK_TROUBLE, path=None) as page:
        await page.route(re.compile("/(devices|command-logs)"), refuse)
        await page.goto(f"http://127.0.0.1:{client.port}/")
        await shows(page, "#link", "live")
        await shows(page, "#unread-boards", "The boards can't be read: the store stalls. Trying again …")
        assert "0" not in await page.locator("#link").inner_text()
        await page.unroute_all()
        await page.route("**/command-logs*", refuse)
        await shows(page, "#none", "No board has connected yet")
        await shows(page, "#unread-commands", "The commands can't be read: the store stalls")
        await page.unroute_all()
        await eventually(lambda: is_empty(page, "#unread-commands"))


@in_a_browser
@in_a_loop
async def test_page_works_in_a_browser_of_2021(database: Path) -> None:
    lacks = """
        delete AbortSignal.timeout; delete AbortSignal.any; delete window.BroadcastChannel; delete window.SharedWorker;
        for (const kind of [Array, String]) delete kind.prototype.at;
        for (const name of ["findLast", "findLastIndex", "toSorted", "toReversed", "with"]) delete Array.prototype[name];
        for (const name of ["hasOwn", "groupBy"]) delete Object[name];
        for (const name of Object.getOwnPropertyNames(Element.prototype))
            if (name.startsWith("aria")) delete Element.prototype[name];
    """
    async with (
        gateway_on(database) as client,
        client.board("servo_1") as board,
        page_on(client, script=lacks) as page,
        background(tell_waves(board), answer_commands(board)),
    ):
        await eventually(lambda: has_sparkline(page.locator(".card")))
        await send_command(page, "turn")
        await shows(page, "#commands li", "✓ 1 board answered success")
        await page.get_by_role("link", name="servo_1").click()
        await shows(page, ".plot", "temperature")
        await page.get_by_role("button", name="Stop all boards").click()
        await shows(page, "#said", "✓ 1 board answered success")
    text = amhrpd.PAGE
    assert not re.search(r"light-dark\(|[0-9]dvh|translate:|inset-inline|:has\(|content-visibility|@layer|\(\?<[=!]", text)
    async with gateway_on(database.with_name("b.db")) as client, page_on(client, java_script_enabled=False) as page:
        await shows(page, "#link", "This page needs JavaScript, and a browser of 2021 or later.")


@in_a_browser
@in_a_loop
async def test_pages_that_come_back_together_after_a_restart_all_fill(database: Path) -> None:
    port = free_port()
    async with chromium() as browser, contextlib.AsyncExitStack() as stack:
        pages = []
        async with gateway_on(database, port=port) as client:
            boards = [await stack.enter_async_context(await connect(port, f"board_{number}")) for number in range(20)]
            for board in boards:
                for number in range(3):
                    await say(board, "status", device_type="ESP32", payload={"n": number})
            for _ in range(10):
                pages.append(await (await browser.new_context(viewport={"width": 600, "height": 700})).new_page())
                await pages[-1].goto(f"http://127.0.0.1:{port}/")
                await shows(pages[-1], "#link", "20 of 20 boards online")
            await eventually(lambda: has_states(client, "board_0", 3))
        async with gateway_on(database, port=port) as client:
            for page in pages:
                await shows(page, "#link", "live · 0 of 20 boards online", within_s=14)
                await eventually(functools.partial(has_filled, page))
        await stack.aclose()


async def has_filled(page: Page) -> bool:
    return bool(await page.evaluate("[...boards.values()].every((board) => board.trails.size || !board.isSeen)"))


@in_a_browser
@in_a_loop
async def test_page_says_that_a_long_deletion_goes_on(database: Path) -> None:
    is_over = asyncio.Event()

    async def slow_down(route: Route) -> None:
        if route.request.method == "DELETE":
            await is_over.wait()
        await route.continue_()

    async with gateway_on(database) as client, page_on(client, allowed=NETWORK_TROUBLE) as page:
        page.on("dialog", lambda dialog: dialog.accept())
        for device_id in ("a", "b"):
            async with client.board(device_id) as board:
                await say(board, "status", payload={"n": 1})
                await shows(page, ".card", device_id)
        await page.route("**/devices/a", slow_down)
        await page.get_by_role("link", name="a", exact=True).click()
        await page.get_by_role("button", name="Delete").click()
        await shows(page, "#work", "Forgetting a goes on")
        is_over.set()
        await shows(page, "#work", "a is forgotten, with 1 states")
        await page.get_by_role("link", name="b", exact=True).click()
        async with client.board("b"):
            await page.evaluate("document.getElementById('delete').onclick()")  # it came back just now
            await shows(page, "#work", "Not deleted: ")


@in_a_browser
@in_a_loop
async def test_bookmark_with_the_token_in_it_works(database: Path) -> None:
    headers = {"Authorization": "Bearer a-token-1"}
    async with (
        gateway_on(database, api_token="a-token-1", headers=headers) as client,
        client.board("servo_1") as board,
        page_on(client, allowed=f"{NETWORK_TROUBLE}|x:a-token-1@", path=None) as page,
    ):
        await page.goto(f"http://x:a-token-1@127.0.0.1:{client.port}/")
        await shows(page, "#link", "live · 1 of 1 board online")
        await page.get_by_role("button", name="Stop all boards").click()
        assert (await hear(board, "command"))["command_name"] == "stop"
        await page.get_by_role("link", name="servo_1").click()
        await shows(page, "#history", "connected")
        async with page.expect_download() as download:
            await page.get_by_role("link", name="Download a table").click()
        assert (await download.value).suggested_filename.endswith(".csv")


@in_a_browser
@in_a_loop
async def test_page_comes_back_from_a_board_to_where_it_was(database: Path) -> None:
    async with gateway_on(database) as client, contextlib.AsyncExitStack() as stack:
        for number in range(500):
            board = await stack.enter_async_context(await connect(client.port, f"board_{number}"))
            state = {"temperature": 20, "humidity": 50, "run": "abc", "seq": 1, "battery": 70, "rssi": -60, "volts": 5}
            await say(board, "status", device_type="ESP32", payload=state)
        page = await stack.enter_async_context(page_on(client))
        await shows(page, "#link", "live · 500 of 500 boards online")
        heights = await page.locator(".card").evaluate_all("cards => cards.map((card) => card.offsetHeight)")
        seen = await page.locator(".card:has(dd)").count()
        assert seen < 100
        assert max(heights) - min(heights) < 30, (min(heights), max(heights))  # those that were not seen yet among them
        card = page.locator(".card", has_text="board_300")
        await card.scroll_into_view_if_needed()
        await card.locator("dd").first.wait_for()
        names = await card.locator("dt").all_inner_texts()
        assert names == ["temperature", "humidity", "run", "seq", "battery", "rssi"]
        before = await page.evaluate("scrollY")
        for go_back in (page.get_by_role("link", name="all boards").click, page.go_back):
            await page.get_by_role("link", name="board_300").click()
            await shows(page, "#name", "board_300")
            await go_back()
            await card.wait_for()
            assert abs(await page.evaluate("scrollY") - before) < 60


@in_a_browser
@in_a_loop
async def test_page_says_when_a_table_has_not_all_states(database: Path) -> None:
    async def say_more(route: Route) -> None:
        answer = await route.fetch()
        await route.fulfill(response=answer, headers=answer.headers | {"X-AMHRPD-More": "true"})

    async with gateway_on(database) as client, client.board("a") as board, page_on(client) as page:
        await say(board, "status", payload={"n": 1})
        await page.get_by_role("link", name="a", exact=True).click()
        for is_more in (False, True):
            if is_more:
                await page.route("**/*format=excel*", say_more)
            async with page.expect_download():
                await page.get_by_role("link", name="Download a table").click()
        await shows(page, "#work", "The table has the newest 100,000 states, and there are older ones.")
