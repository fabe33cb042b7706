"""The contract as tests: the real daemon, real sockets, a real SQLite file.

Most tests run `amhrpd.serve()` in their own event loop; where a process has to die, run out of disk or be watched, they
start `amhrpd.py` as a user would. Boards are played with the `websockets` package, or with raw sockets where the wire itself
is what matters. Every test ends with a look for tasks, timers and threads that were left behind.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import json
import logging
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
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import sqlalchemy as sa
import websockets
from websockets.asyncio.client import ClientConnection

import amhrpd

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
        self.store: amhrpd.Store

    async def ask(self, method: str, path: str, **kwargs: Any) -> tuple[int, Any]:
        async with self.session.request(method, f"http://127.0.0.1:{self.port}{path}", **kwargs) as response:
            text = await response.text()
            assert response.content_type == "application/json", text
            return response.status, json.loads(text)

    async def get(self, path: str, status: int = 200, **kwargs: Any) -> Any:
        found, answer = await self.ask("GET", path, **kwargs)
        assert found == status, (found, answer)
        return answer

    async def post(self, path: str, body: Any = None, status: int = 200, **kwargs: Any) -> Any:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        found, answer = await self.ask("POST", path, data=data, **kwargs)
        assert found == status, (found, answer)
        return answer

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
    values: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "database_path": database, "commit_interval_s": 0.05}
    stop = asyncio.Event()
    ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    apps: list[Any] = []
    build_app = amhrpd.build_app

    def remember(wanted: amhrpd.Settings) -> Any:
        apps.append(build_app(wanted))
        return apps[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(amhrpd, "build_app", remember)
        daemon = asyncio.create_task(amhrpd.serve(amhrpd.Settings(**values | settings), stop, ready.set_result))
        await asyncio.wait((daemon, ready), return_when=asyncio.FIRST_COMPLETED)
    if daemon.done():
        daemon.result()
    try:
        async with aiohttp.ClientSession(headers=headers) as session:
            client = Client(ready.result(), session, database)
            client.gateway, client.store = apps[0][amhrpd.GATEWAY], apps[0][amhrpd.STORE]
            yield client
    finally:
        stop.set()
        assert await daemon == exit_code


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "amhrpd.db"


class Process:
    """`amhrpd.py` as a process of its own, with its log."""

    def __init__(self, database: Path, port: int, environ: dict[str, str], *arguments: str) -> None:
        self.port = port
        self.log_path = database.with_suffix(f".{time.monotonic_ns()}.log")
        values = {"DATABASE_URL": f"sqlite:///{database}", "AMHRPD_PORT": str(port), "AMHRPD_HOST": "127.0.0.1"}
        clean = {name: value for name, value in os.environ.items() if not name.startswith("AMHRPD_")}
        with self.log_path.open("wb") as log:
            self.popen = subprocess.Popen(
                [sys.executable, str(HERE / "amhrpd.py"), *arguments], stdout=log, stderr=log, env=clean | values | environ
            )

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    async def answers(self) -> bool:
        assert self.popen.poll() is None, self.log
        try:
            async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{self.port}/health") as response:
                return response.status in (200, 503)
        except OSError:
            return False

    async def exit_code(self) -> int:
        await eventually(lambda: self.popen.poll() is not None, within_s=20)
        assert self.popen.returncode is not None
        return int(self.popen.returncode)


@contextlib.asynccontextmanager
async def process_on(database: Path, *arguments: str, **environ: str) -> AsyncIterator[tuple[Process, Client]]:
    """The daemon as a process that answers; killed at the end if it is still there."""
    process = Process(database, free_port(), environ, *arguments)
    try:
        await eventually(process.answers)
        async with aiohttp.ClientSession() as session:
            yield process, Client(process.port, session, database)
    finally:
        if process.popen.poll() is None:
            process.popen.kill()
        process.popen.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def logged() -> Iterator[list[dict[str, Any]]]:
    """The daemon's log events, from its own processors on, as a formatter gets them."""
    events: list[dict[str, Any]] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if isinstance(record.msg, dict):
                events.append(dict(record.msg))

    amhrpd.configure_logging("debug", "json")
    collector = Collector()
    logging.getLogger().addHandler(collector)
    try:
        yield events
    finally:
        logging.getLogger().removeHandler(collector)


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

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


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
        wire = await Wire.connect(client.port, "servo_1")
        wire.send(REGISTRATION)
        await eventually(lambda: client.is_online("servo_1"))
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
        await eventually(lambda: time.monotonic() - began_s > 1.5)
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
async def test_refused_boards_are_logged_once_a_minute(database: Path) -> None:
    with logged() as events:
        async with gateway_on(database, device_token="secret-of-boards") as client:
            for _ in range(20):
                with pytest.raises(websockets.InvalidStatus):
                    await connect(client.port, "servo_1")
            assert len(named(events, "request_refused")) == 1
        assert [event["repeats"] for event in named(events, "request_refused")[1:]] == [19]


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
    ('{"message_type":"status","payload":{"a":1e999}}', "INVALID_FIELD_VALUE"),
    ('{"message_type":"status","payload":{"a":' + "9" * 5000 + "}}", "INVALID_FIELD_VALUE"),
    ('{"message_type":"reboot"}', "UNKNOWN_MESSAGE_TYPE"),
    ('{"message_type":""}', "UNKNOWN_MESSAGE_TYPE"),
    ('{"message_type":7}', "INVALID_FIELD_TYPE"),
    ("{}", "MISSING_REQUIRED_FIELD"),
    ('{"message_type":"status"}', "MISSING_REQUIRED_FIELD"),
    ('{"message_type":"status","payload":5}', "INVALID_FIELD_TYPE"),
    ('{"message_type":"status","payload":null}', "INVALID_FIELD_TYPE"),
    ('{"message_type":"registration"}', "MISSING_REQUIRED_FIELD"),
    ('{"message_type":"registration","device_type":""}', "INVALID_FIELD_VALUE"),
    ('{"message_type":"registration","device_type":"' + "x" * 51 + '"}', "INVALID_FIELD_VALUE"),
    ('{"message_type":"registration","device_type":5}', "INVALID_FIELD_TYPE"),
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
            assert len(error["error"]) > 5
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
        await say(board, "status", payload={"text": "x" * 3000})
        assert await closed_with(board) == 1009
        await eventually(lambda: not_online(client, "servo_1"))


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
    assert (error["level"], error["device_id"], error["error_code"]) == ("warning", "wheel_1", "SERVO_STALL")
    assert len(error["error_message"]) < 400
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
        for bad in ("x" * 65, "a%20b", "a%00b", "%C3%BC", "a%0A"):
            assert (await client.get(f"/ws/{bad}", 400))["error_code"] == "INVALID_FIELD_VALUE"
        assert (await client.get("/ws/plain_get", 400))["error_code"] == "INVALID_FIELD_VALUE"
        assert (await client.get("/devices"))["total"] == 1


# ======================================================================================================================
# Contract, section 4: a command's life
# ======================================================================================================================


@in_a_loop
async def test_row_is_committed_before_the_first_frame_leaves(database: Path) -> None:
    async with gateway_on(database, commit_interval_s=3600) as client, client.board("servo_1") as board:
        for number in range(20):
            posting = asyncio.create_task(client.post("/command", {"device_type": "ESP32", "command_name": "blink"}))
            command = await hear(board, "command")
            assert client.rows("SELECT count(*) FROM command_logs WHERE command_id = ?", command["command_id"]) == [(1,)], (
                number
            )
            answer = await posting
            assert answer["status"] == "sent"
            assert "persisted" not in answer


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
async def test_commands_over_what_a_board_takes_are_refused(database: Path) -> None:
    async with gateway_on(database) as client, client.board("servo_1", max_size=15360) as board:
        room = 15360 - len(
            amhrpd.Command(
                device_type="ESP32", command_name="x", payload='{"t":""}', timeout_s=30.0, target_device_count=1
            ).frame()
        )
        await client.post("/command", {"device_type": "ESP32", "command_name": "x", "payload": {"t": "x" * room}})
        assert len((await hear(board, "command"))["payload"]["t"]) == room
        too_long = {"device_type": "ESP32", "command_name": "x", "payload": {"t": "x" * (room + 1)}}
        assert (await client.post("/command", too_long, 413))["error_code"] == "PAYLOAD_TOO_LARGE"
        assert (await client.get("/command-logs"))["total"] == 1


@in_a_loop
async def test_board_that_does_not_read_holds_nobody_up(database: Path) -> None:
    async with gateway_on(database) as client, client.board("reader") as reader:
        deaf = await Wire.connect(client.port, "deaf")
        deaf.send(REGISTRATION)
        await eventually(lambda: client.is_online("deaf"))
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
        connection = client.gateway.registry.get("deaf").connection
        assert isinstance(connection, amhrpd.DeviceSocket)
        assert connection._request.transport is not None
        assert 0 < connection._request.transport.get_write_buffer_size() < 64 << 10
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
async def test_newest_connection_wins_at_once_and_history_stays_balanced(database: Path) -> None:
    async with gateway_on(database) as client, client.board("servo_1") as first:
        looks: list[bool] = []

        async def watch() -> None:
            while True:
                looks.append(client.gateway.registry.get("servo_1").is_online)
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
        old = await Wire.connect(client.port, "servo_1")  # doesn't answer the close, and goes on talking
        old.send(REGISTRATION)
        await eventually(lambda: client.is_online("servo_1"))
        async with await connect(client.port, "servo_1") as new:
            await say(new, "registration", device_type="ESP32")
            assert (await old.receive())[0] == 0x88
            old.send('{"message_type":"registration","device_type":"GHOST"}')
            old.send('{"message_type":"status","payload":{"ghost":true}}')
            await say(new, "status", payload={"real": True})
            await eventually(lambda: state_is(client, "servo_1", {"real": True}))
            old.send(struct.pack("!H", 1000), opcode=8)
            await old.close()
        await eventually(lambda: not_online(client, "servo_1"))
        assert (await client.get("/state-history/servo_1"))["total"] == 1
        assert (await client.get("/devices/servo_1"))["device_type"] == "ESP32"
        assert await client.events("servo_1") == ["connected", "disconnected", "connected", "disconnected"]


@in_a_loop
async def test_older_connection_that_registers_late_does_not_take_over(database: Path) -> None:
    async with gateway_on(database) as client, client.board("servo_1", None) as older, client.board("servo_1"):
        await say(older, "registration", device_type="ESP32")
        assert (await hear(older, "error"))["error_code"] == "UNAUTHORIZED"
        assert await closed_with(older) == 4000
        assert await client.events("servo_1") == ["connected"]


@in_a_loop
async def test_dead_connection_is_given_up_when_no_pong_comes(database: Path) -> None:
    async with gateway_on(database, ping_interval_s=0.2) as client:
        wire = await Wire.connect(client.port, "half_open")
        wire.send(REGISTRATION)
        await eventually(lambda: client.is_online("half_open"))
        began_s = time.monotonic()
        assert (await wire.receive())[0] == 0x89
        await eventually(lambda: not_online(client, "half_open"))
        assert time.monotonic() - began_s < 3
        assert await client.events("half_open") == ["connected", "timeout"]
        await wire.close()


@in_a_loop
async def test_board_that_promised_heartbeats_and_falls_silent_is_given_up(database: Path) -> None:
    async with gateway_on(database, heartbeat_timeout_s=0.5) as client, client.board("servo_1") as board:
        await say(board, "heartbeat")
        assert await closed_with(board) == 4001  # though it answers every ping
        assert await client.events("servo_1") == ["connected", "timeout"]


@in_a_loop
async def test_connection_that_never_registers_is_closed(database: Path) -> None:
    async with gateway_on(database, registration_timeout_s=0.3) as client, client.board("silent", None) as board:
        assert await closed_with(board) == 4001
        await client.get("/devices/silent", 404)


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
