#!/usr/bin/env python3
"""AMHR-PD gateway: ESP32 boards over WebSocket, people and programs over REST, history in SQLite.

    amhrpd.py [serve]     run the gateway
    amhrpd.py simulate    play a fleet of boards against a running gateway

The file reads from top to bottom; each room uses only the rooms above it:

    Configuration   Settings, from flags and environment
    Errors          what can be refused, and how a repeated event is logged
    Messages        what boards and callers send, decoded and validated in one step
    Store           the four tables, one writer thread, one reader thread
    Devices         the registry: every device known, the connections of those online
    Commands        the commands that are open or may still be answered
    Gateway         what happens when: the verbs
    Device socket   one board's connection: frame -> message -> verb, error -> reply
    REST            thin handlers, access rules, one shape for every error
    Service         logging, systemd, start and stop in order
    Simulator       boards to try the gateway with
    Command line    main()

On the event loop nothing waits for the disk: dictionaries are the truth while the gateway runs, and the database follows.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import contextlib
import dataclasses
import fcntl
import functools
import hmac
import ipaddress
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import signal
import socket
import sqlite3
import ssl
import sys
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn

import aiohttp
import dataset
import msgspec
import sqlalchemy as sa
import structlog
import websockets
from aiohttp import WSCloseCode, WSMsgType, web
from sqlalchemy.dialects.sqlite import insert as upsert_into

VERSION = "1.0.0"

log: structlog.stdlib.BoundLogger = structlog.get_logger("amhrpd")

# ======================================================================================================================
# Configuration
# ======================================================================================================================


class ConfigError(Exception):
    """A setting has a value it can't have; the text names the setting, the value and what it may be."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that can be set, checked. Durations are seconds. The defaults are those of a service on a Pi."""

    host: str = "0.0.0.0"
    port: int = 8000
    database_path: Path = Path("amhrpd.db")
    ping_interval_s: float = 20.0
    heartbeat_timeout_s: float = 90.0
    registration_timeout_s: float = 10.0
    command_timeout_s: float = 30.0
    commit_interval_s: float = 1.0
    max_message_bytes: int = 65536
    api_token: str | None = None
    device_token: str | None = None
    allowed_origins: frozenset[str] = frozenset()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    log_level: str = "info"
    log_format: str = "auto"

    @classmethod
    def load(cls, flags: Mapping[str, str | None], environ: Mapping[str, str]) -> Settings:
        """Build the settings from `flags` (field name -> text, None where not given), which win over `environ`.

        An empty variable counts as not set. Raises ConfigError on the first value that can't be.
        """
        values: dict[str, Any] = {}
        for option in OPTIONS:
            for source, text in ((option.flag, flags.get(option.field)), (option.variable, environ.get(option.variable))):
                if text:
                    try:
                        values[option.field] = option.parse(text)
                    except ValueError as error:
                        shown = "(hidden)" if option.flag is None else repr(text)
                        raise ConfigError(f"{source} is {shown}: {error}") from None
                    break
        settings = cls(**values)
        if (settings.tls_cert is None) != (settings.tls_key is None):
            raise ConfigError("--tls-cert (AMHRPD_TLS_CERT) and --tls-key (AMHRPD_TLS_KEY) go together: set both or neither")
        return settings


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One setting's outside: its flag (None: never on a command line), its variable, and text -> value (ValueError)."""

    field: str
    flag: str | None
    variable: str
    parse: Callable[[str], Any]
    metavar: str
    help: str


def _number(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise ValueError(f"it must be a number from {low:g} to {high:g}")
        return value

    return parse


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,10}", text) or not low <= int(text) <= high:
            raise ValueError(f"it must be a whole number from {low} to {high}")
        return int(text)

    return parse


def _choice(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in choices:
            raise ValueError(f"it must be one of {', '.join(choices)}")
        return text.lower()

    return parse


def _sqlite_path(text: str) -> Path:
    try:
        url = sa.make_url(text)
    except sa.exc.ArgumentError:
        url = sa.make_url("none://")
    if url.get_backend_name() != "sqlite" or url.database in (None, "", ":memory:") or url.query:
        raise ValueError("it must name a file: sqlite:///relative.db or sqlite:////absolute/path.db")
    return Path(str(url.database))


def _token(text: str) -> str:
    if not re.fullmatch(r"[!-9;-~]{8,512}", text):
        raise ValueError("a token is 8 to 512 printable ASCII characters without space or colon")
    return text


def _origins(text: str) -> frozenset[str]:
    origins = frozenset(part.strip().rstrip("/").lower() for part in text.split(",") if part.strip())
    for origin in origins:
        if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^\s/,]*", origin):
            raise ValueError(f"{origin!r} is no origin; write scheme://host or scheme://host:port, with commas between")
    return origins


OPTIONS: tuple[Option, ...] = (
    Option("host", "--host", "AMHRPD_HOST", str, "ADDRESS", "address to listen on; 0.0.0.0 is every address, IPv6 too"),
    Option("port", "--port", "AMHRPD_PORT", _integer(0, 65535), "PORT", "port to listen on; 0 lets the system choose"),
    Option("database_path", "--database-url", "DATABASE_URL", _sqlite_path, "URL", "the database, as sqlite:///./amhrpd.db"),
    Option(
        "ping_interval_s",
        "--ping-interval",
        "AMHRPD_PING_INTERVAL",
        _number(0.1, 3600),
        "S",
        "seconds between pings; a connection without an answer is given up after 1.5 of them",
    ),
    Option(
        "heartbeat_timeout_s",
        "--heartbeat-timeout",
        "AMHRPD_HEARTBEAT_TIMEOUT",
        _number(0.1, 86400),
        "S",
        "seconds of silence after which a board that sends heartbeats is given up",
    ),
    Option(
        "registration_timeout_s",
        "--registration-timeout",
        "AMHRPD_REGISTRATION_TIMEOUT",
        _number(0.1, 3600),
        "S",
        "seconds that a connection has to register",
    ),
    Option(
        "command_timeout_s",
        "--command-timeout",
        "AMHRPD_COMMAND_TIMEOUT",
        _number(1, 300),
        "S",
        "seconds that boards have to answer a command that names no timeout",
    ),
    Option(
        "commit_interval_s",
        "--commit-interval",
        "AMHRPD_COMMIT_INTERVAL",
        _number(0, 3600),
        "S",
        "telemetry is written at most once in so many seconds",
    ),
    Option(
        "max_message_bytes",
        "--max-message-bytes",
        "AMHRPD_MAX_MESSAGE_BYTES",
        _integer(1024, 1048576),
        "N",
        "longest message taken from a board",
    ),
    Option("api_token", None, "AMHRPD_API_TOKEN", _token, "TOKEN", "what callers of the REST API must show"),
    Option("device_token", None, "AMHRPD_DEVICE_TOKEN", _token, "TOKEN", "what boards must show"),
    Option(
        "allowed_origins",
        "--allowed-origins",
        "AMHRPD_ALLOWED_ORIGINS",
        _origins,
        "ORIGINS",
        "web pages, besides the gateway's own, that may call it: http://host:port, with commas between",
    ),
    Option("tls_cert", "--tls-cert", "AMHRPD_TLS_CERT", Path, "FILE", "certificate chain (PEM): serve https and wss"),
    Option("tls_key", "--tls-key", "AMHRPD_TLS_KEY", Path, "FILE", "the certificate's private key (PEM)"),
    Option(
        "log_level",
        "--log-level",
        "AMHRPD_LOG_LEVEL",
        _choice("debug", "info", "warning", "error"),
        "LEVEL",
        "least level logged",
    ),
    Option(
        "log_format",
        "--log-format",
        "AMHRPD_LOG_FORMAT",
        _choice("auto", "console", "journal", "json"),
        "FORMAT",
        "auto is console on a terminal, journal under systemd, else json",
    ),
)

# ======================================================================================================================
# Errors
# ======================================================================================================================


class GatewayError(Exception):
    """Something the gateway refuses. Its text says what and where; it goes to the caller or the board as it is."""

    status: ClassVar[int] = 400
    error_code: ClassVar[str] = "INVALID_FIELD_VALUE"


class InvalidMessage(GatewayError):
    """Not JSON, not an object, not text (contract, section 2)."""

    error_code = "INVALID_MESSAGE"


class UnknownMessageType(GatewayError):
    """A `message_type` that section 2 of the contract doesn't have."""

    error_code = "UNKNOWN_MESSAGE_TYPE"


class MissingField(GatewayError):
    """A required field is absent."""

    error_code = "MISSING_REQUIRED_FIELD"


class InvalidFieldType(GatewayError):
    """A field has a value of another JSON type."""

    error_code = "INVALID_FIELD_TYPE"


class InvalidFieldValue(GatewayError):
    """A field has the right type and a value that can't be."""


class Unauthorized(GatewayError):
    """No token, a wrong token, or a board that hasn't registered."""

    status = 401
    error_code = "UNAUTHORIZED"


class Forbidden(GatewayError):
    """A web page of another origin."""

    status = 403
    error_code = "FORBIDDEN"


class NotFound(GatewayError):
    """No such route."""

    status = 404
    error_code = "NOT_FOUND"


class DeviceNotFound(NotFound):
    """A device that was never seen."""

    error_code = "DEVICE_NOT_FOUND"


class CommandNotFound(NotFound):
    """A command that doesn't exist, or was never sent to the device that answers it."""

    error_code = "COMMAND_NOT_FOUND"


class MethodNotAllowed(GatewayError):
    """The route exists, with another method."""

    status = 405
    error_code = "METHOD_NOT_ALLOWED"


class RequestTimeout(GatewayError):
    """A body that doesn't arrive."""

    status = 408
    error_code = "REQUEST_TIMEOUT"


class PayloadTooLarge(GatewayError):
    """A body over the limit, or a command that no board could take."""

    status = 413
    error_code = "PAYLOAD_TOO_LARGE"


class UnsupportedMediaType(GatewayError):
    """A body that is compressed or in another charset than UTF-8."""

    status = 415
    error_code = "UNSUPPORTED_MEDIA_TYPE"


class ResourceExhausted(GatewayError):
    """A limit is reached; later it may work."""

    status = 429
    error_code = "RESOURCE_EXHAUSTED"


class InternalError(GatewayError):
    """A defect of the gateway; the log has the traceback."""

    status = 500
    error_code = "INTERNAL_ERROR"


class StoreUnavailable(GatewayError):
    """The database can't be read or written at the moment."""

    status = 503
    error_code = "STORE_UNAVAILABLE"


class Stopping(GatewayError):
    """The gateway is going down."""

    status = 503
    error_code = "STOPPING"


class StartError(Exception):
    """The gateway can't start; the text is the one line that says why."""


class RepeatLog:
    """Logs events that hostile or broken peers can repeat without end: a few in a minute, the rest counted.

    The count goes out with a `repeats` field when the minute is over. For the event loop's thread only.
    """

    WINDOW_S = 60.0
    MAX_KEYS = 1000  # a flood of new keys costs a bounded amount of memory: those over it share one key an event

    def __init__(self) -> None:
        self._windows: dict[tuple[str, str], _Window] = {}

    def warning(self, event: str, subject: str, *, burst: int = 1, **fields: Any) -> None:
        """Log `event` about `subject` (a device id, a peer) unless `burst` such lines went out within the minute."""
        self._emit(logging.WARNING, event, subject, burst, fields)

    def info(self, event: str, subject: str, *, burst: int = 1, **fields: Any) -> None:
        """The same at level info."""
        self._emit(logging.INFO, event, subject, burst, fields)

    def report(self) -> None:
        """Log the counts of every minute that is over, and forget it. Called about once a second."""
        now_s = time.monotonic()
        for key in [key for key, window in self._windows.items() if now_s - window.began_s >= self.WINDOW_S]:
            self._close(key)

    def report_all(self) -> None:
        """Log all counts that are open, at a stop."""
        for key in list(self._windows):
            self._close(key)

    def _close(self, key: tuple[str, str]) -> None:
        window = self._windows.pop(key)
        if window.suppressed:
            log.log(window.level, key[0], repeats=window.suppressed, **window.fields)

    def _emit(self, level: int, event: str, subject: str, burst: int, fields: dict[str, object]) -> None:
        key = (event, subject)
        if key not in self._windows and len(self._windows) >= self.MAX_KEYS:
            key = (event, "")
        window = self._windows.get(key)
        if window is None:
            window = self._windows[key] = _Window(level, time.monotonic())
        window.fields = fields
        if window.logged < burst:
            window.logged += 1
            log.log(level, event, **fields)
        else:
            window.suppressed += 1


@dataclasses.dataclass(slots=True)
class _Window:
    """A minute of one event about one subject."""

    level: int
    began_s: float
    logged: int = 0
    suppressed: int = 0
    fields: dict[str, object] = dataclasses.field(default_factory=dict)


# ======================================================================================================================
# Messages
# ======================================================================================================================

JsonText = str
"""A JSON value as text: encoded once where it comes in, kept, stored and put into answers as it is."""

# A reader's recursion must never end at something we took: Python's json stops at about 1,000, jq before 1.7 at 256,
# ArduinoJson at 10. No board in the field nests deeper than 3.
MAX_JSON_DEPTH = 32

# Contract, section 1: the boards' WebSocket library closes with 1009 on anything longer.
MAX_COMMAND_FRAME_BYTES = 15_360

MAX_COMMAND_TIMEOUT_S = 300  # contract, section 6
MAX_COMMAND_WAIT_S = 60  # contract, section 6

DEVICE_ID = r"[A-Za-z0-9._-]{1,64}"  # contract, section 2

DeviceType = Annotated[str, msgspec.Meta(min_length=1, max_length=50)]
CommandName = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
DeviceId = Annotated[str, msgspec.Meta(pattern=f"^{DEVICE_ID}$")]


class BoardMessage(msgspec.Struct, tag_field="message_type", gc=False, kw_only=True):
    """What every message of a board may bear. The identity is the path's, the time the gateway's own."""

    device_type: DeviceType | None = None


class Registration(BoardMessage, tag="registration"):
    """`metadata` holds the message's metadata object and its top-level extras; None where it had neither."""

    metadata: dict[str, Any] | None = None


class Heartbeat(BoardMessage, tag="heartbeat"):
    """Still here."""


class Status(BoardMessage, tag="status"):
    """The board's state, any keys."""

    payload: dict[str, Any]


class CommandAck(BoardMessage, tag="command_ack"):
    """The answer to a command; `execution_time` in seconds. A status that is absent or null means success."""

    command_id: str
    status: Literal["success", "failure", "error", "timeout"] | None = None
    payload: dict[str, Any] | None = None
    execution_time: float | None = None


class ErrorReport(BoardMessage, tag="error"):
    """Something went wrong on the board."""

    error_code: str | int
    error_message: str
    context: Any = None


class Alert(BoardMessage, tag="alert"):
    """Something that a person should know: an obstacle, a collision."""

    alert_type: str
    message: str


# Contract, section 4.
CREATED = "created"
SENT = "sent"
ACK_SUCCESS = "ack_success"
ACK_ERROR = "ack_error"
ACK_TIMEOUT = "ack_timeout"
NO_DEVICES = "no_devices"
OPEN_STATUSES = ("pending", CREATED, SENT)
COMMAND_STATUSES = (*OPEN_STATUSES, ACK_SUCCESS, ACK_ERROR, ACK_TIMEOUT, NO_DEVICES)
CONNECTION_EVENTS = ("connected", "disconnected", "timeout")  # contract, section 5

AnyBoardMessage = Registration | Heartbeat | Status | CommandAck | ErrorReport | Alert

_board_decoder = msgspec.json.Decoder(AnyBoardMessage)
_json_decoder = msgspec.json.Decoder()
_encoder = msgspec.json.Encoder()


class CommandRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`POST /command`, whatever form it came in. `timeout` and `wait` in seconds (contract, section 6)."""

    command_name: CommandName
    device_type: DeviceType | None = None
    device_id: DeviceId | None = None
    payload: dict[str, Any] | None = None
    timeout: Annotated[float, msgspec.Meta(ge=1, le=MAX_COMMAND_TIMEOUT_S)] | None = None
    wait: Annotated[float, msgspec.Meta(ge=0, le=MAX_COMMAND_WAIT_S)] = 0


def decode_board_message(data: bytes) -> AnyBoardMessage:
    """Decode and validate one text frame of a board.

    Raises InvalidMessage, UnknownMessageType, MissingField, InvalidFieldType or InvalidFieldValue.
    """
    try:
        data.decode()  # the decoder below doesn't look into keys that it skips
        message: AnyBoardMessage = _board_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _refusal(error) from None
    _check_depth(data)
    if isinstance(message, Registration):
        extras = decode_json(data)
        for key in ("message_type", "device_type", "device_id", "timestamp", "metadata"):
            extras.pop(key, None)
        if extras:
            message.metadata = extras | (message.metadata or {})
    return message


def decode_command(query: Mapping[str, str], body: bytes) -> CommandRequest:
    """Make one request of what the query and the body of `POST /command` say, in both forms of the contract's section 6.

    Raises InvalidMessage, MissingField, InvalidFieldType or InvalidFieldValue.
    """
    fields: dict[str, Any] = dict(query)
    if "payload" in query:
        fields["payload"] = decode_json(query["payload"].encode())
    if body.strip():
        content = decode_json(body)
        if "command_name" in query and ("device_type" in query or "device_id" in query):
            content = {"payload": content}
        if not isinstance(content, dict):
            raise InvalidMessage("the body must be a JSON object")
        if twice := sorted(fields.keys() & content.keys()):
            raise InvalidFieldValue(f"{', '.join(twice)}: given in the query and in the body")
        fields |= content
    try:
        request = msgspec.convert(fields, CommandRequest, strict=False)
    except msgspec.ValidationError as error:
        raise _refusal(error) from None
    if request.device_type is None and request.device_id is None:
        raise MissingField("missing required field `device_type` (or `device_id`)")
    return request


def decode_json(data: bytes) -> Any:
    """Decode any JSON, strictly: UTF-8, no NaN, no lone surrogates, no deep nesting. Raises a GatewayError."""
    try:
        value = _json_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _refusal(error) from None
    _check_depth(data)
    return value


def to_json(value: object) -> JsonText:
    """Encode a value of decoded JSON, structs and `msgspec.Raw` as compact JSON text."""
    return _encoder.encode(value).decode()


def raw(text: JsonText) -> msgspec.Raw:
    """JSON text, to be put as it is into something that is encoded later."""
    return msgspec.Raw(text.encode())


def utc_now() -> datetime:
    """The gateway's wall clock: naive, UTC, as the store keeps it. For records only; durations use the monotonic clock."""
    return datetime.now(UTC).replace(tzinfo=None)


def format_time(moment: datetime | None) -> str | None:
    """`2026-01-24T10:30:45.123456`, always six digits; None stays None."""
    return None if moment is None else moment.isoformat(timespec="microseconds")


def _refusal(error: Exception) -> GatewayError:
    """The contract's error for what the JSON library said about a message."""
    text = str(error)
    if isinstance(error, UnicodeDecodeError):
        return InvalidMessage(f"not valid UTF-8: byte 0x{error.object[error.start]:02x}")
    if isinstance(error, RecursionError):
        return InvalidMessage(f"nested deeper than {MAX_JSON_DEPTH} levels")
    if not isinstance(error, msgspec.ValidationError):
        return InvalidMessage(f"not valid JSON: {text}")
    if text.startswith("Object missing required field"):
        return MissingField(text.replace("Object missing", "missing", 1))
    if "`$" not in text:
        return InvalidFieldValue(text) if "unknown field" in text else InvalidMessage(f"not a JSON object: {text}")
    if text.startswith("Invalid value") and text.endswith("`$.message_type`"):
        return UnknownMessageType(text.replace("Invalid value", "unknown message_type", 1))
    if ", got `" in text or text.startswith("Expected `str` - at"):
        return InvalidFieldType(text)
    return InvalidFieldValue(text)


_JSON_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)


def _check_depth(data: bytes) -> None:
    if data.count(b"{") + data.count(b"[") <= MAX_JSON_DEPTH:
        return  # what every real message comes to, at a fraction of the price
    depth = 0
    for byte in _JSON_STRING.sub(b"", data):
        if byte in b"{[":
            depth += 1
            if depth > MAX_JSON_DEPTH:
                raise InvalidMessage(f"nested deeper than {MAX_JSON_DEPTH} levels")
        elif byte in b"}]":
            depth -= 1


# ======================================================================================================================
# Store
# ======================================================================================================================

# The columns are those of the databases in the field (contract, section 7). JSON columns hold text that was encoded at
# the edge (the engine's serializers below pass it through); None is SQL NULL.
_metadata = sa.MetaData()
_JSON = sa.JSON(none_as_null=True)

DEVICES = sa.Table(
    "devices",
    _metadata,
    sa.Column("device_id", sa.String(255), primary_key=True),
    sa.Column("device_type", sa.String(50), nullable=False),
    sa.Column("is_online", sa.Boolean, nullable=False),
    sa.Column("last_heartbeat", sa.DateTime),
    sa.Column("connected_at", sa.DateTime, nullable=False),
    sa.Column("disconnected_at", sa.DateTime),
    sa.Column("metadata_json", _JSON, nullable=False),
)

SNAPSHOTS = sa.Table(
    "device_state_snapshots",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("device_id", sa.String(255), sa.ForeignKey("devices.device_id"), nullable=False),
    sa.Column("device_type", sa.String(50), nullable=False),
    sa.Column("state_data", _JSON, nullable=False),
    sa.Column("timestamp", sa.DateTime, nullable=False),
    # Ordered by what happened last, with the timestamp aboard so that `since` and `until` are decided in the index.
    sa.Index("ix_amhrpd_snapshots", "device_id", "id", "timestamp"),
)

COMMAND_LOGS = sa.Table(
    "command_logs",
    _metadata,
    sa.Column("command_id", sa.String(255), primary_key=True),
    sa.Column("device_type", sa.String(50), nullable=False),
    sa.Column("command_name", sa.String(255), nullable=False),
    sa.Column("payload", _JSON, nullable=False),
    sa.Column("status", sa.String(50), nullable=False),
    sa.Column("created_at", sa.DateTime, nullable=False),
    sa.Column("executed_at", sa.DateTime),
    sa.Column("completed_at", sa.DateTime),
    sa.Column("response_data", _JSON),
    sa.Column("target_device_count", sa.Integer, nullable=False),
    sa.Column("success_count", sa.Integer, nullable=False),
    sa.Index("ix_amhrpd_commands_status", "status"),
    sa.Index("ix_amhrpd_commands_type", "device_type"),
)

CONNECTION_LOGS = sa.Table(
    "device_connection_logs",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("device_id", sa.String(255), sa.ForeignKey("devices.device_id"), nullable=False),
    sa.Column("device_type", sa.String(50), nullable=False),
    sa.Column("event", sa.String(50), nullable=False),
    sa.Column("timestamp", sa.DateTime, nullable=False),
    sa.Column("details", _JSON),
    sa.Index("ix_amhrpd_events", "device_id", "id", "timestamp"),
)

TABLES = (DEVICES, SNAPSHOTS, COMMAND_LOGS, CONNECTION_LOGS)

# Insertion order, which a clock that jumps can't disturb. SQLite's own name; another database would need a column.
_COMMAND_ORDER: sa.ColumnElement[int] = sa.literal_column("rowid", sa.Integer)

SCHEMA_VERSION = 1  # PRAGMA user_version; the earlier backend's files have 0
Row = dict[str, Any]

_SQLITE_MAGIC = b"SQLite format 3\x00"

ROW_OVERHEAD_BYTES = 600  # memory of a row's dictionary, its times and small texts


@dataclasses.dataclass(slots=True)
class Batch:
    """Rows on their way into the file, one transaction. A device or a command is in it once, as it is now."""

    devices: dict[str, Row] = dataclasses.field(default_factory=dict)
    snapshots: deque[Row] = dataclasses.field(default_factory=deque)
    events: deque[Row] = dataclasses.field(default_factory=deque)
    commands: dict[str, Row] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.devices) + len(self.snapshots) + len(self.events) + len(self.commands)

    def take(self, snapshots: int) -> Batch:
        """Move everything out into a new batch, but at most so many snapshots."""
        taken = Batch(self.devices, deque(), self.events, self.commands)
        self.devices, self.events, self.commands = {}, deque(), {}
        while self.snapshots and len(taken.snapshots) < snapshots:
            taken.snapshots.append(self.snapshots.popleft())
        return taken

    def cost_bytes(self) -> int:
        """What the rows count against the store's limits. Devices are free: their number is limited elsewhere."""
        return (
            sum(map(_snapshot_cost, self.snapshots))
            + len(self.events) * ROW_OVERHEAD_BYTES
            + sum(map(_command_cost, self.commands.values()))
        )


@dataclasses.dataclass(frozen=True, slots=True)
class StoreHealth:
    """Whether the store can write, and what it owes. `reason` is None when all is well."""

    reason: str | None
    notice: str | None
    rows_waiting: int
    rows_dropped: int
    rows_rejected: int


@dataclasses.dataclass(frozen=True, slots=True)
class HistoryRange:
    """What part of a history is asked for: naive UTC times, both inclusive; rows before an id; at most `limit`."""

    limit: int = 100
    since: datetime | None = None
    until: datetime | None = None
    before_id: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Restored:
    """What earlier runs left.

    Device rows, each with `state` and `state_timestamp` of its latest snapshot and the `last_event` of its connection
    history (None where there is none), and command rows that may still be answered.
    """

    devices: list[Row]
    commands: list[Row]


class Store:
    """The four tables of a SQLite file, behind one writer thread and one reader thread.

    `put_*` never wait: rows gather in memory and the writer takes all there are, one transaction at a time. A batch that
    fails for the disk's sake is kept and tried again until it is in the file; a row that the database refuses for its own
    sake is logged and left out, so that the rest gets in. `put_*` and the coroutines belong to the event loop's thread.
    """

    # Out of 512 MB. A snapshot of a real board costs about 1 KB here, so this holds some 30,000 of them.
    TELEMETRY_LIMIT_BYTES = 32 << 20
    RECORDS_LIMIT_BYTES = 48 << 20  # commands and connection events still get in when telemetry is refused
    CONGESTED_BYTES = 8 << 20  # above this, boards that flood are slowed down to what the disk takes
    BATCH_SNAPSHOTS = 2000  # about 10 ms of writing here, so a command's row never waits long behind telemetry
    RETRY_S = 0.5  # after a failed batch
    STALLED_S = 1.0  # a write that takes longer holds up commands, which is what /health is about
    RELOG_S = 60.0  # a failure that lasts is logged once a minute
    CHECKED_AT_START_BYTES = 8 << 20  # 0.2 s of an SD card's reading; a larger file is checked in the background
    READ_TIMEOUT_S = 20.0
    READS_WAITING = 64
    RESTORED_COMMANDS = 1000  # of the open, and as many of the timed out

    def __init__(self, path: Path, commit_interval_s: float) -> None:
        self._path = path
        self._commit_interval_s = commit_interval_s
        self._database: Any = None
        self._file_lock: int | None = None
        self._swap = threading.Lock()  # held by a read, and by the writer while it moves a corrupt file aside
        self._notice: str | None = None
        self._damage = ""

        self._guard = threading.Lock()  # of everything from here to the threads
        self._pending = Batch()
        self._in_flight = Batch()
        self._known_devices: dict[str, Row] = {}
        self._cost_bytes = 0
        self._records_put = self._records_written = 0
        self._snapshots_put = self._snapshots_written = 0
        self._rows_dropped = self._rows_rejected = 0
        self._failure: str | None = None
        self._writing_since_s: float | None = None

        self._arrived = threading.Event()
        self._urgent = threading.Event()
        self._closing = threading.Event()
        self._is_corrupt = threading.Event()
        self._flushes: list[tuple[int, int, asyncio.Future[None]]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._writer = threading.Thread(target=self._write_forever, name="store-writer", daemon=True)
        self._reader = ThreadPoolExecutor(1, "store-reader")
        self._reads_waiting = 0

    # -- opening -------------------------------------------------------------------------------------------------------

    def open(self) -> Restored:
        """Open or create the file, start the writer, and return what earlier runs left.

        Blocks on the disk: call it before there is anybody to serve. A corrupt file is moved aside and a fresh one begun.
        Raises StartError for a folder or file that can't be written, a file that is no database of this gateway or one of
        a newer version, and a file that another gateway has open.
        """
        try:
            self._lock_file()
            damage = self._inspect()
            restored = None
            if damage is None:
                try:
                    self._connect()
                    restored = self._load()
                except sa.exc.DatabaseError as error:
                    if not _is_corruption(error):
                        raise
                    damage = _cause(error)
            if restored is None:
                self._start_afresh(str(damage))
                restored = self._load()
        except (OSError, sqlite3.Error, sa.exc.SQLAlchemyError) as error:
            raise StartError(f"can't open the database {self._path}: {_cause(error)}") from None
        self._writer.start()
        return restored

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Say which loop's futures the writer completes, and check in the background what the start had no time for."""
        self._loop = loop
        if self._path.stat().st_size > self.CHECKED_AT_START_BYTES:
            threading.Thread(target=self._check_in_background, name="store-checker", daemon=True).start()

    def _lock_file(self) -> None:
        if self._file_lock is not None:
            os.close(self._file_lock)
        self._file_lock = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            # flock and SQLite's own locks don't see each other on Linux; the lock goes with the process.
            fcntl.flock(self._file_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError(f"the database {self._path} is in use by another gateway") from None

    def _inspect(self) -> str | None:
        """Look at the file before anything is written to it. Returns what is broken, or None. Raises StartError."""
        with self._path.open("rb") as file:
            start = file.read(1 << 20)
        if not start:
            return None
        looks_ours = b"device_state_snapshots" in start
        if not start.startswith(_SQLITE_MAGIC):
            if looks_ours or len(set(start[:512])) == 1:  # a header page that was lost: zeros, or an erased flash block
                return "the file header is damaged"
            raise StartError(f"{self._path} is no SQLite database; name another file or move this one away")
        with contextlib.closing(sqlite3.connect(self._path, timeout=5)) as connection:
            try:
                version = connection.execute("PRAGMA user_version").fetchone()[0]
                names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
                if version > SCHEMA_VERSION:
                    raise StartError(
                        f"{self._path} was written by a newer version (schema {version}, this one knows {SCHEMA_VERSION})"
                    )
                if names and not names & {table.name for table in TABLES}:
                    raise StartError(
                        f"{self._path} is no database of this gateway: it has the tables {', '.join(sorted(names))}"
                    )
                for table in TABLES:
                    found = {row[1] for row in connection.execute(f"PRAGMA table_info({table.name})")}
                    if found and (missing := [column.name for column in table.columns if column.name not in found]):
                        raise StartError(
                            f"{self._path} is no database of this gateway: {table.name} has no column {', '.join(missing)}"
                        )
                if self._path.stat().st_size > self.CHECKED_AT_START_BYTES:
                    return None
                return _quick_check(connection)
            except sqlite3.DatabaseError as error:
                if _is_corruption(error):
                    return str(error)
                raise

    def _check_in_background(self) -> None:
        try:
            with contextlib.closing(sqlite3.connect(self._path, timeout=5)) as connection:
                connection.set_progress_handler(self._closing.is_set, 10_000)
                damage = _quick_check(connection)
        except sqlite3.DatabaseError as error:
            if not _is_corruption(error):
                return  # a stop, or a disk in trouble: what reads and writes the file will say so
            damage = str(error)
        if damage is not None:
            self._report_corruption(damage)

    def _connect(self) -> None:
        self._database = dataset.connect(
            f"sqlite:///{self._path}",
            row_type=dict,
            ensure_schema=False,
            on_connect_statements=[
                "PRAGMA foreign_keys = ON",
                "PRAGMA synchronous = NORMAL",  # with WAL it never corrupts, and syncs at checkpoints only
                "PRAGMA wal_autocheckpoint = 1000",
                "PRAGMA journal_size_limit = 8388608",
            ],
            engine_kwargs={
                "json_serializer": _pass_through,
                "json_deserializer": _pass_through,
                "connect_args": {"timeout": 1.0},  # then the batch is tried again, and a stop gets through
            },
        )
        engine = self._database.engine
        _metadata.create_all(engine)
        with engine.begin() as connection:
            inspector = sa.inspect(connection)
            for table in TABLES:
                existing = {index["name"] for index in inspector.get_indexes(table.name)}
                for index in table.indexes:
                    if index.name not in existing:
                        log.info("index_created", table=table.name, index=index.name)
                        index.create(connection)
                # Those the earlier backend's ORM made, one a column: no query uses them and each costs a page a commit.
                ours = {index.name for index in table.indexes}
                for name in sorted(existing - ours, key=str):
                    if name and name.startswith(f"ix_{table.name}_"):
                        log.info("index_dropped", table=table.name, index=name)
                        connection.execute(sa.text(f'DROP INDEX "{name}"'))
            if connection.execute(sa.text("PRAGMA user_version")).scalar_one() != SCHEMA_VERSION:
                connection.execute(sa.text(f"PRAGMA user_version = {SCHEMA_VERSION}"))

    def _move_aside(self, damage: str) -> None:
        aside = self._path.with_name(f"{self._path.name}.corrupt-{utc_now():%Y%m%dT%H%M%S.%f}Z")
        for suffix in ("-wal", "-shm", ""):  # the file last: as long as it is there, the whole is
            with contextlib.suppress(FileNotFoundError):
                self._path.with_name(self._path.name + suffix).rename(aside.with_name(aside.name + suffix))
        self._notice = f"the database was corrupt ({damage}); it was moved to {aside} and a fresh one begun"
        log.error("database_corrupt", damage=damage, moved_to=str(aside))

    def _start_afresh(self, damage: str) -> None:
        if self._database is not None:
            self._database.close()
        self._move_aside(damage)
        self._lock_file()
        self._connect()

    def _load(self) -> Restored:
        devices: dict[str, Row] = {row["device_id"]: row for row in self._select(sa.select(DEVICES))}
        for row in devices.values():
            row["metadata_json"] = "{}" if row["metadata_json"] is None else _clean_json(row["metadata_json"])
            self._known_devices[row["device_id"]] = row.copy()
            row["state"] = row["state_timestamp"] = row["last_event"] = None
        for snapshot in self._select(_latest_of_each_device(SNAPSHOTS)):
            device = devices[snapshot["device_id"]]
            device["state"] = _clean_json(snapshot["state_data"])
            device["state_timestamp"] = snapshot["timestamp"]
        for event in self._select(_latest_of_each_device(CONNECTION_LOGS)):
            devices[event["device_id"]]["last_event"] = event["event"]
        # Open when the gateway stopped, and those that timed out lately: an answer may still come.
        self._close_stale_commands()
        commands = self._load_commands(OPEN_STATUSES, self.RESTORED_COMMANDS)
        commands += self._load_commands((ACK_TIMEOUT,), self.RESTORED_COMMANDS)
        return Restored(list(devices.values()), commands)

    def _close_stale_commands(self) -> None:
        """Time out what no timeout can have kept open until now: the earlier backend left commands `created` for ever."""
        before = utc_now() - timedelta(seconds=MAX_COMMAND_TIMEOUT_S)
        is_stale = COMMAND_LOGS.c.status.in_(OPEN_STATUSES) & (COMMAND_LOGS.c.created_at < before)
        try:
            with self._database.engine.begin() as connection:
                connection.execute(sa.update(COMMAND_LOGS).where(is_stale).values(status=ACK_TIMEOUT))
        except sa.exc.OperationalError as error:  # a full disk: the gateway serves, and the next start tries again
            log.warning("stale_commands_left_open", reason=_cause(error))

    def _load_commands(self, statuses: Sequence[str], limit: int) -> list[Row]:
        is_meant = COMMAND_LOGS.c.status.in_(statuses)
        rows = self._select(sa.select(COMMAND_LOGS).where(is_meant).order_by(_COMMAND_ORDER.desc()).limit(limit))
        for row in rows:
            row["payload"] = _clean_json(row["payload"])
            row["response_data"] = None if row["response_data"] is None else _clean_json(row["response_data"])
        return rows[::-1]

    # -- writing: the event loop's side --------------------------------------------------------------------------------

    def put_device(self, row: Row, *, urgent: bool = True) -> None:
        """Write a device row as it is now; `urgent=False` lets it go with the next telemetry."""
        with self._guard:
            self._known_devices[row["device_id"]] = row
            self._pending.devices[row["device_id"]] = row
            self._records_put += 1
        self._wake(urgent)

    def put_event(self, row: Row) -> None:
        """Append a row of the connection history. Dropped and counted when the records' limit is reached."""
        with self._guard:
            if self._take_room(ROW_OVERHEAD_BYTES, self.RECORDS_LIMIT_BYTES):
                self._pending.events.append(row)
                self._records_put += 1
        self._wake(urgent=True)

    def put_snapshot(self, device_id: str, device_type: str, state: JsonText, timestamp: datetime) -> bool:
        """Append a snapshot. False where the telemetry limit is reached and it was dropped (and counted)."""
        row = {"device_id": device_id, "device_type": device_type, "state_data": state, "timestamp": timestamp}
        with self._guard:
            taken = self._take_room(_snapshot_cost(row), self.TELEMETRY_LIMIT_BYTES)
            if taken:
                self._pending.snapshots.append(row)
                self._snapshots_put += 1
        if not self._arrived.is_set():
            self._arrived.set()
        return taken

    def put_command(self, row: Row) -> None:
        """Write a command row as it is now; `response_data` is a dictionary of device id -> encoded answer, or None."""
        with self._guard:
            previous = self._pending.commands.get(row["command_id"])
            growth = _command_cost(row) - (0 if previous is None else _command_cost(previous))
            if self._take_room(growth, self.RECORDS_LIMIT_BYTES):
                self._pending.commands[row["command_id"]] = row
                self._records_put += 1
        self._wake(urgent=True)

    async def commit_command(self, row: Row, timeout_s: float) -> bool:
        """Write a command row and wait until it is committed. False after `timeout_s`, or at once when writes fail now."""
        self.put_command(row)
        return self.health().reason is None and await self._written(self._records_put, 0, timeout_s)

    async def flush(self, timeout_s: float) -> bool:
        """Wait until everything put so far is committed. False after `timeout_s`."""
        return await self._written(self._records_put, self._snapshots_put, timeout_s)

    @property
    def is_congested(self) -> bool:
        """Whether telemetry comes in faster than a healthy disk takes it."""
        return self._cost_bytes > self.CONGESTED_BYTES and self._failure is None

    def health(self) -> StoreHealth:
        """How it goes; never waits."""
        since_s = self._writing_since_s
        reason = self._failure
        if not self.is_writer_alive():
            reason = "the writer thread has died"
        elif reason is None and since_s is not None and time.monotonic() - since_s > self.STALLED_S:
            reason = f"a write has been waiting for the disk for {time.monotonic() - since_s:.0f} s"
        with self._guard:
            waiting = len(self._pending) + len(self._in_flight)
        return StoreHealth(reason, self._notice, waiting, self._rows_dropped, self._rows_rejected)

    def is_writer_alive(self) -> bool:
        """Whether the writer thread runs (it does while it waits for a disk that stalls)."""
        return self._writer.is_alive()

    def _take_room(self, cost_bytes: int, limit_bytes: int) -> bool:
        if self._cost_bytes + cost_bytes > limit_bytes:
            self._rows_dropped += 1
            return False
        self._cost_bytes += cost_bytes
        return True

    def _wake(self, urgent: bool) -> None:
        if urgent:
            self._urgent.set()
        self._arrived.set()

    async def _written(self, records: int, snapshots: int, timeout_s: float) -> bool:
        flush = (records, snapshots, asyncio.get_running_loop().create_future())
        self._flushes.append(flush)  # before the first look: the writer may be done at any moment
        self._complete_flushes()
        if not flush[2].done():
            self._wake(urgent=True)
        try:
            async with asyncio.timeout(timeout_s):
                await flush[2]
        except TimeoutError:
            return False
        finally:
            self._flushes.remove(flush)
        return True

    def _complete_flushes(self) -> None:
        for records, snapshots, future in self._flushes:
            if self._records_written >= records and self._snapshots_written >= snapshots and not future.done():
                future.set_result(None)

    # -- writing: the writer thread ------------------------------------------------------------------------------------

    def _write_forever(self) -> None:
        committed_s = -math.inf
        while True:
            self._arrived.wait()
            if not self._urgent.is_set():
                self._urgent.wait(max(0.0, committed_s + self._commit_interval_s - time.monotonic()))
            self._arrived.clear()
            self._urgent.clear()
            with self._guard:
                batch = self._in_flight = self._pending.take(self.BATCH_SNAPSHOTS)
                records = self._records_put
                has_backlog = bool(self._pending.snapshots)
            if batch:
                if not self._commit_stubbornly(batch):
                    return
                committed_s = time.monotonic()
                self._account_written(batch, records)
            elif self._closing.is_set():
                return
            if has_backlog or self._closing.is_set():
                self._wake(urgent=True)

    def _account_written(self, batch: Batch, records: int) -> None:
        cost_bytes = batch.cost_bytes()
        with self._guard:
            self._cost_bytes -= cost_bytes
            self._records_written = records
            self._snapshots_written += len(batch.snapshots)
            self._in_flight = Batch()
        if self._loop is not None and self._flushes:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._complete_flushes)

    def _commit_stubbornly(self, batch: Batch) -> bool:
        """Commit the batch, however long that takes. False where a stop gave up on it."""
        logged_s = -math.inf
        while True:
            self._writing_since_s = time.monotonic()
            try:
                if self._is_corrupt.is_set():
                    self._replace_corrupt_file()
                self._commit(batch)
                if self._failure is not None:
                    log.warning("database_writes_resumed", rows=len(batch))
                self._failure = None
                return True
            except (sa.exc.OperationalError, sa.exc.DatabaseError, sqlite3.Error, OSError) as error:
                if _is_corruption(error):
                    self._report_corruption(_cause(error))
                self._failure = f"can't write the database: {_cause(error)}"
                if time.monotonic() - logged_s >= self.RELOG_S:
                    logged_s = time.monotonic()
                    log.error("database_write_failed", reason=_cause(error), rows_waiting=len(batch))
            finally:
                self._writing_since_s = None
            if self._closing.wait(self.RETRY_S):
                return self._commit_once_more(batch)

    def _commit_once_more(self, batch: Batch) -> bool:
        try:
            self._commit(batch)
        except (sa.exc.SQLAlchemyError, sqlite3.Error, OSError) as error:
            log.error("rows_lost", rows=len(batch) + len(self._pending), reason=_cause(error))
            return False
        self._failure = None
        return True

    def _commit(self, batch: Batch) -> None:
        try:
            with self._database.engine.begin() as connection:
                for statement, rows in _statements(batch):
                    connection.execute(statement, rows)
        except (sa.exc.OperationalError, sa.exc.ResourceClosedError):
            raise
        except sa.exc.StatementError as error:
            if _is_corruption(error):
                raise
            self._commit_row_by_row(batch)

    def _commit_row_by_row(self, batch: Batch) -> None:
        """Commit all rows but those that the database refuses for what they are; each of those is logged and counted."""
        # Rows of devices that somebody deleted behind our back: what refers to them would be refused for ever.
        owners = {row["device_id"] for row in itertools.chain(batch.snapshots, batch.events)}
        with self._guard:
            batch.devices = {key: self._known_devices[key] for key in owners if key in self._known_devices} | batch.devices
        rejected: list[tuple[str, Row, str]] = []
        with self._database.engine.begin() as connection:
            for statement, rows in _statements(batch):
                for row in rows:
                    try:
                        connection.execute(statement, [row])
                    except sa.exc.OperationalError:
                        raise
                    except sa.exc.StatementError as error:
                        if _is_corruption(error):
                            raise
                        rejected.append((statement.table.name, row, _cause(error)))
        for table, row, reason in rejected:
            log.error("row_rejected", table=table, reason=reason, row=repr(row))
        with self._guard:
            self._rows_rejected += len(rejected)

    def _report_corruption(self, damage: str) -> None:
        self._damage = damage
        self._is_corrupt.set()
        self._wake(urgent=True)

    def _replace_corrupt_file(self) -> None:
        """Move a file that turned out to be corrupt while in use aside, and begin a fresh one with the devices known."""
        with self._swap:
            self._start_afresh(self._damage)
        self._is_corrupt.clear()
        with self._guard:
            devices = list(self._known_devices.values())
        if devices:
            with self._database.engine.begin() as connection:
                connection.execute(_UPSERT_DEVICE, devices)

    # -- reading -------------------------------------------------------------------------------------------------------

    async def state_history(self, device_id: str, span: HistoryRange) -> list[Row]:
        """Snapshots of a device, newest first, with `state_data` ready to encode."""
        return await self._read(_within(sa.select(SNAPSHOTS).where(SNAPSHOTS.c.device_id == device_id), SNAPSHOTS, span))

    async def connection_history(self, device_id: str, event: str | None, span: HistoryRange) -> list[Row]:
        """Connection events of a device, newest first, with `details` ready to encode."""
        statement = sa.select(CONNECTION_LOGS).where(CONNECTION_LOGS.c.device_id == device_id)
        if event is not None:
            statement = statement.where(CONNECTION_LOGS.c.event == event)
        return await self._read(_within(statement, CONNECTION_LOGS, span))

    async def command_logs(self, status: str | None, device_type: str | None, span: HistoryRange) -> list[Row]:
        """Command rows, newest first, with `payload` and `response_data` ready to encode."""
        statement = sa.select(COMMAND_LOGS).order_by(_COMMAND_ORDER.desc()).limit(span.limit)
        if status is not None:
            statement = statement.where(COMMAND_LOGS.c.status == status)
        if device_type is not None:
            statement = statement.where(COMMAND_LOGS.c.device_type == device_type)
        if span.since is not None:
            statement = statement.where(COMMAND_LOGS.c.created_at >= span.since)
        if span.until is not None:
            statement = statement.where(COMMAND_LOGS.c.created_at <= span.until)
        return await self._read(statement)

    async def command(self, command_id: str) -> Row | None:
        """One command row, or None."""
        rows = await self._read(sa.select(COMMAND_LOGS).where(COMMAND_LOGS.c.command_id == command_id))
        return rows[0] if rows else None

    async def _read(self, statement: sa.Select[Any]) -> list[Row]:
        """Run a query in the reader thread, after all that was put so far is in the file.

        Raises StoreUnavailable where that can't be done in time, ResourceExhausted where too many wait already.
        """
        if self._reads_waiting >= self.READS_WAITING:
            raise ResourceExhausted(f"{self.READS_WAITING} queries are waiting already")
        self._reads_waiting += 1
        try:
            if not await self.flush(self.READ_TIMEOUT_S if self._failure is None else 2 * self.RETRY_S):
                raise StoreUnavailable(self._failure or "the database is too slow at the moment")
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(self.READ_TIMEOUT_S):
                return await loop.run_in_executor(self._reader, self._select_clean, statement)
        except TimeoutError:
            raise StoreUnavailable("the database is too slow at the moment") from None
        except (sa.exc.SQLAlchemyError, sqlite3.Error) as error:
            if _is_corruption(error):
                self._report_corruption(_cause(error))
            raise StoreUnavailable(f"can't read the database: {_cause(error)}") from None
        finally:
            self._reads_waiting -= 1

    def _select_clean(self, statement: sa.Select[Any]) -> list[Row]:
        with self._swap:
            rows = self._select(statement)
        for row in rows:
            for column in ("state_data", "details", "payload", "response_data"):
                if row.get(column) is not None:
                    row[column] = raw(_clean_json(row[column]))
            for column in ("timestamp", "created_at", "executed_at", "completed_at"):
                if column in row:
                    row[column] = format_time(row[column])
        return rows

    def _select(self, statement: sa.Select[Any]) -> list[Row]:
        return list(self._database.query(statement))

    # -- closing -------------------------------------------------------------------------------------------------------

    async def close(self, timeout_s: float) -> bool:
        """Write what is queued, checkpoint, close the file. False where that failed or took longer than `timeout_s`."""
        loop = asyncio.get_running_loop()
        self._closing.set()
        self._wake(urgent=True)
        finished = loop.create_future()
        closer = threading.Thread(target=self._close_file, args=(loop, finished, timeout_s), name="store-closer", daemon=True)
        closer.start()
        try:
            async with asyncio.timeout(timeout_s + 1):
                return bool(await finished)
        except TimeoutError:
            log.error("database_close_timeout", rows=len(self._pending), timeout_s=timeout_s)
            return False

    def _close_file(self, loop: asyncio.AbstractEventLoop, finished: asyncio.Future[bool], timeout_s: float) -> None:
        clean = False
        try:
            self._writer.join(timeout_s)
            self._reader.shutdown(wait=True, cancel_futures=True)
            clean = not self._writer.is_alive() and not self._pending and self._failure is None
            if clean:
                with self._database.engine.connect() as connection:
                    connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
                self._database.close()
                if self._file_lock is not None:
                    os.close(self._file_lock)
                    self._file_lock = None
        except (sa.exc.SQLAlchemyError, sqlite3.Error, OSError) as error:
            clean = False
            log.error("database_close_failed", reason=_cause(error))
        finally:
            with contextlib.suppress(RuntimeError):  # the loop didn't wait
                loop.call_soon_threadsafe(_complete, finished, clean)


def _pass_through(value: Any) -> Any:
    return value


def _complete(future: asyncio.Future[bool], result: bool) -> None:
    if not future.done():
        future.set_result(result)


def _upsert(table: sa.Table) -> Any:
    statement = upsert_into(table)
    keys = [column.name for column in table.primary_key]
    changes = {column.name: statement.excluded[column.name] for column in table.columns if column.name not in keys}
    return statement.on_conflict_do_update(index_elements=keys, set_=changes)


_UPSERT_DEVICE = _upsert(DEVICES)
_UPSERT_COMMAND = _upsert(COMMAND_LOGS)
_INSERT_SNAPSHOT = sa.insert(SNAPSHOTS)
_INSERT_EVENT = sa.insert(CONNECTION_LOGS)


def _statements(batch: Batch) -> Iterable[tuple[Any, list[Row]]]:
    """What a batch is in SQL, devices first: the other rows refer to them."""
    if batch.devices:
        yield _UPSERT_DEVICE, list(batch.devices.values())
    if batch.snapshots:
        yield _INSERT_SNAPSHOT, list(batch.snapshots)
    if batch.events:
        yield _INSERT_EVENT, list(batch.events)
    if batch.commands:
        rows = [
            row | {"response_data": row["response_data"] and to_json(row["response_data"])} for row in batch.commands.values()
        ]
        yield _UPSERT_COMMAND, rows


def _snapshot_cost(row: Row) -> int:
    return ROW_OVERHEAD_BYTES + len(row["state_data"])


def _command_cost(row: Row) -> int:
    answers: Mapping[str, msgspec.Raw] = row["response_data"] or {}
    return ROW_OVERHEAD_BYTES + len(row["payload"]) + sum(200 + len(memoryview(answer)) for answer in answers.values())


def _latest_of_each_device(table: sa.Table) -> sa.Select[Any]:
    """The newest row of every device: one step into the index for each, however long the history is."""
    newest = (
        sa.select(table.c.id)
        .where(table.c.device_id == DEVICES.c.device_id)
        .order_by(table.c.id.desc())
        .limit(1)
        .correlate(DEVICES)
        .scalar_subquery()
    )
    return sa.select(table).where(table.c.id.in_(sa.select(newest).select_from(DEVICES)))


def _within(statement: sa.Select[Any], table: sa.Table, span: HistoryRange) -> sa.Select[Any]:
    if span.since is not None:
        statement = statement.where(table.c.timestamp >= span.since)
    if span.until is not None:
        statement = statement.where(table.c.timestamp <= span.until)
    if span.before_id is not None:
        statement = statement.where(table.c.id < span.before_id)
    return statement.order_by(table.c.id.desc()).limit(span.limit)


def _clean_json(stored: object) -> JsonText:
    """A stored JSON value as text that every reader takes, whatever an earlier writer left there (NaN, lone surrogates)."""
    text = stored if isinstance(stored, str) else json.dumps(stored)
    try:
        return to_json(_json_decoder.decode(text))
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        pass
    try:
        value = json.loads(text, parse_constant=lambda name: None, parse_float=_finite_or_none)
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace").decode()
    except (ValueError, RecursionError):
        return json.dumps(text)  # no JSON at all: shown as the text that it is


def _finite_or_none(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _quick_check(connection: sqlite3.Connection) -> str | None:
    """What SQLite finds broken in a file, or None."""
    result = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
    return None if result == "ok" else result


def _is_corruption(error: BaseException) -> bool:
    code = getattr(getattr(error, "orig", error), "sqlite_errorcode", None)
    return code is not None and code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _cause(error: BaseException) -> str:
    """The database's own words in one line, without the statement and its parameters."""
    origin = getattr(error, "orig", None) or error
    name = getattr(origin, "sqlite_errorname", None)
    text = origin.strerror if isinstance(origin, OSError) and origin.strerror else str(origin).partition("\n")[0]
    return f"{text} ({name})" if name else text


# ======================================================================================================================
# Devices
# ======================================================================================================================


class Connection(ABC):
    """One board's connection, from the handshake to its end. A newer one has a higher `serial`."""

    _serials = itertools.count(1)

    def __init__(self, device_id: str, peer: str) -> None:
        self.serial = next(self._serials)
        self.device_id = device_id
        self.peer = peer
        self.device: Device | None = None  # once registered
        self.opened_s = time.monotonic()
        self.last_message_s = self.opened_s
        self.has_heartbeat = False  # a board that sent one promised to go on (contract, section 5)
        self.is_ended = False  # closed or replaced: what still arrives counts for nothing

    @abstractmethod
    async def send(self, frame: str) -> bool:
        """Hand one text frame to the network without waiting for the board. False where the board doesn't take it."""

    @abstractmethod
    async def close(self, code: int, reason: str) -> None:
        """Close with a code, wait for the board's echo for a bounded time, and drop the connection. Once is enough."""


@dataclasses.dataclass(slots=True, eq=False)
class Device:
    """A board that was seen at least once. Times are naive UTC; JSON is text."""

    device_id: str
    device_type: str
    connected_at: datetime
    metadata: JsonText = "{}"
    last_heartbeat: datetime | None = None
    disconnected_at: datetime | None = None
    state: JsonText | None = None
    state_timestamp: datetime | None = None
    connection: Connection | None = None
    saved_s: float = -math.inf  # monotonic time of the last row handed to the store

    @property
    def is_online(self) -> bool:
        """Whether a registered connection is there now."""
        return self.connection is not None

    def row(self) -> Row:
        """The device as a row of the table."""
        return {
            "device_id": self.device_id,
            "device_type": self.device_type,
            "is_online": self.is_online,
            "last_heartbeat": self.last_heartbeat,
            "connected_at": self.connected_at,
            "disconnected_at": self.disconnected_at,
            "metadata_json": self.metadata,
        }

    def record(self) -> dict[str, object]:
        """The device as answers show it (contract, section 6), ready to encode."""
        metadata = raw(self.metadata)
        return {
            "device_id": self.device_id,
            "device_type": self.device_type,
            "is_online": self.is_online,
            "last_heartbeat": format_time(self.last_heartbeat),
            "connected_at": format_time(self.connected_at),
            "disconnected_at": format_time(self.disconnected_at),
            "metadata_json": metadata,
            "metadata": metadata,
            "state": None if self.state is None else raw(self.state),
            "state_timestamp": format_time(self.state_timestamp),
        }


class Registry:
    """Every device known, by id. The truth about who is online."""

    # Ids are free to invent for whoever reaches the port, and each is kept for ever: 10,000 cost about 10 MB.
    MAX_DEVICES = 10_000

    def __init__(self) -> None:
        self._devices: dict[str, Device] = {}

    def __len__(self) -> int:
        return len(self._devices)

    def add(self, device: Device) -> None:
        """Take a device in. Raises ResourceExhausted when there are too many."""
        if len(self._devices) >= self.MAX_DEVICES:
            raise ResourceExhausted(f"{self.MAX_DEVICES} devices are known already; no new device_id is taken")
        self._devices[device.device_id] = device

    def restore(self, device: Device) -> None:
        """Take in a device of an earlier run, however many there are."""
        self._devices[device.device_id] = device

    def find(self, device_id: str) -> Device | None:
        """The device, or None where never seen."""
        return self._devices.get(device_id)

    def get(self, device_id: str) -> Device:
        """The device. Raises DeviceNotFound."""
        device = self._devices.get(device_id)
        if device is None:
            raise DeviceNotFound(f"device {device_id[:64]!r} was never seen")
        return device

    def online(self) -> list[Device]:
        """The devices that are connected and registered."""
        return [device for device in self._devices.values() if device.connection is not None]

    def matching(self, device_type: str | None, is_online: bool | None) -> list[Device]:
        """The devices of a type (exactly) and of a state; None is any."""
        return [
            device
            for device in self._devices.values()
            if (device_type is None or device.device_type == device_type) and is_online in (None, device.is_online)
        ]


# ======================================================================================================================
# Commands
# ======================================================================================================================


@dataclasses.dataclass(slots=True, eq=False)
class Command:
    """One command and what became of it. `recipients` is None after a restart: then any device of the type may answer."""

    device_type: str
    command_name: str
    payload: JsonText
    timeout_s: float
    target_device_count: int
    created_at: datetime
    command_id: str = dataclasses.field(default_factory=lambda: str(uuid.uuid4()))
    status: str = CREATED
    executed_at: datetime | None = None
    completed_at: datetime | None = None
    recipients: set[str] | None = dataclasses.field(default_factory=set)
    answers: dict[str, msgspec.Raw] = dataclasses.field(default_factory=dict)
    succeeded: set[str] = dataclasses.field(default_factory=set)
    failed: set[str] = dataclasses.field(default_factory=set)
    is_persisted: bool = True
    finished: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    expiry: asyncio.TimerHandle | None = None

    @classmethod
    def restore(cls, row: Row, timeout_s: float) -> Command:
        """A command of an earlier run, from its row."""
        command = cls(
            command_id=row["command_id"],
            device_type=row["device_type"],
            command_name=row["command_name"],
            payload=row["payload"],
            timeout_s=timeout_s,
            status=row["status"],
            created_at=row["created_at"],
            executed_at=row["executed_at"],
            completed_at=row["completed_at"],
            target_device_count=row["target_device_count"],
            recipients=None,
        )
        with contextlib.suppress(GatewayError):  # what an earlier writer left may be no such map
            answers = decode_json((row["response_data"] or "{}").encode())
            if not isinstance(answers, dict):
                raise InvalidMessage("no map of answers")
            for device_id, answer in answers.items():
                command.answers[device_id] = raw(to_json(answer))
                if isinstance(answer, dict) and "status" in answer:
                    (command.succeeded if answer["status"] == "success" else command.failed).add(device_id)
        return command

    def frame(self) -> str:
        """The frame for the boards: seven keys, in the order that the boards in the field need (contract, section 3)."""
        return to_json(
            {
                "message_type": "command",
                "command_id": self.command_id,
                "command_name": self.command_name,
                "device_type": self.device_type,
                "timestamp": int(time.time()),
                "timeout": int(self.timeout_s) if self.timeout_s.is_integer() else self.timeout_s,
                "payload": raw(self.payload),
            }
        )

    def may_be_answered_by(self, device: Device) -> bool:
        """Whether the command was sent to the device, as far as is known."""
        if self.recipients is None:
            is_known = device.device_id in self.answers or len(self.answers) < self.target_device_count
            return is_known and device.device_type == self.device_type
        return device.device_id in self.recipients

    def record_answer(self, device_id: str, ack: CommandAck) -> bool:
        """Count a device's answer and move the status on. False where it changes nothing.

        A repeated answer changes nothing, and a success that follows a failure of the same device doesn't undo it:
        `ack_error` holds from the first such answer on (contract, section 4).
        """
        is_success = ack.status in (None, "success")
        if device_id in self.failed or (is_success and device_id in self.succeeded):
            return False
        now = utc_now()
        if is_success:
            self.succeeded.add(device_id)
        else:
            self.succeeded.discard(device_id)
            self.failed.add(device_id)
            self.status = ACK_ERROR
        answer = {
            "status": ack.status or "success",
            "payload": ack.payload,
            "execution_time": ack.execution_time,
            "received_at": format_time(now),
        }
        self.answers[device_id] = raw(to_json(answer))
        if len(self.succeeded) + len(self.failed) >= self.target_device_count:
            self.completed_at = now
            self.finished.set()
            if not self.failed:
                self.status = ACK_SUCCESS
        return True

    def expire(self) -> None:
        """Its timeout is over with answers missing."""
        if self.status in OPEN_STATUSES:
            self.status = ACK_TIMEOUT
        self.finished.set()

    def row(self) -> Row:
        """The command as a row of the table; `response_data` is a copy, for another thread to encode."""
        return {
            "command_id": self.command_id,
            "device_type": self.device_type,
            "command_name": self.command_name,
            "payload": self.payload,
            "status": self.status,
            "created_at": self.created_at,
            "executed_at": self.executed_at,
            "completed_at": self.completed_at,
            "response_data": self.answers.copy() or None,
            "target_device_count": self.target_device_count,
            "success_count": len(self.succeeded),
        }

    def record(self, *, with_answers: bool) -> dict[str, object]:
        """The command as `POST /command` answers it (contract, section 6), ready to encode."""
        record: dict[str, object] = {
            "command_id": self.command_id,
            "device_type": self.device_type,
            "command_name": self.command_name,
            "payload": raw(self.payload),
            "status": self.status,
            "created_at": format_time(self.created_at),
            "target_device_count": self.target_device_count,
            "success_count": len(self.succeeded),
        }
        if with_answers:
            record["response_data"] = self.answers or None
        if not self.is_persisted:
            record["persisted"] = False
        return record


class Commands:
    """The commands that are open, and the latest of the finished: late and repeated answers find them here."""

    MAX_OPEN = 5000
    MAX_PAYLOAD_BYTES = 16 << 20  # of all that are open; 1,000 of the largest that a board could take
    MAX_FINISHED = 2000

    def __init__(self) -> None:
        self._open: dict[str, Command] = {}
        self._finished: dict[str, Command] = {}
        self._payload_bytes = 0

    def __len__(self) -> int:
        return len(self._open)

    def add(self, command: Command) -> None:
        """Take an open command in. Raises ResourceExhausted when too many are open."""
        size_bytes = len(command.payload)
        if len(self._open) >= self.MAX_OPEN or self._payload_bytes + size_bytes > self.MAX_PAYLOAD_BYTES:
            raise ResourceExhausted(f"{len(self._open)} commands are waiting for answers; try again when some are finished")
        self._open[command.command_id] = command
        self._payload_bytes += size_bytes

    def find(self, command_id: str) -> Command | None:
        """The command, open or finished lately, or None."""
        return self._open.get(command_id) or self._finished.get(command_id)

    def finish(self, command: Command) -> None:
        """Keep a command for late answers only. The oldest of those is forgotten when there are too many."""
        if command.expiry is not None:
            command.expiry.cancel()
            command.expiry = None
        if self._open.pop(command.command_id, None) is not None:
            self._payload_bytes -= len(command.payload)
        self._finished[command.command_id] = command
        if len(self._finished) > self.MAX_FINISHED:
            del self._finished[next(iter(self._finished))]

    def cancel_timeouts(self) -> None:
        """For a stop: no timer is left, and what is open stays open in the database."""
        for command in self._open.values():
            if command.expiry is not None:
                command.expiry.cancel()
                command.expiry = None
            command.finished.set()  # whoever waits gets the command as it is


# ======================================================================================================================
# Gateway
# ======================================================================================================================

CLOSE_REPLACED = 4000  # contract, section 3
CLOSE_TIMED_OUT = 4001


class Gateway:
    """What happens when. Owns the registry, the commands, the connections and the way into the store.

    Its methods are the verbs of the contract; all of them belong to the event loop's thread.
    """

    HEARTBEAT_SAVE_INTERVAL_S = 60.0  # a device's last activity reaches the disk this often, and at its end
    PERSIST_TIMEOUT_S = 1.0  # contract, section 6: the longest that a store holds a command up
    STOP_TIMEOUT_S = 5.0  # for all boards to echo the close

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings = settings
        self._store = store
        self.registry = Registry()
        self.commands = Commands()
        self.repeats = RepeatLog()
        self.is_stopping = False
        self._connections: set[Connection] = set()
        self._closings: set[asyncio.Task[None]] = set()
        self._started_s = time.monotonic()

    # -- start and stop ------------------------------------------------------------------------------------------------

    def start(self, restored: Restored) -> None:
        """Take up what earlier runs left: devices are offline, open commands open again."""
        now = utc_now()
        for row in restored.devices:
            device = Device(
                device_id=row["device_id"],
                device_type=row["device_type"],
                connected_at=row["connected_at"],
                metadata=row["metadata_json"],
                last_heartbeat=row["last_heartbeat"],
                disconnected_at=row["disconnected_at"],
                state=row["state"],
                state_timestamp=row["state_timestamp"],
            )
            self.registry.restore(device)
            if row["is_online"] or row["last_event"] == "connected":
                device.disconnected_at = now
                self._save_device(device)
                self._log_event(device, "disconnected", {"reason": "the gateway ended without saying goodbye"}, now)
        for row in restored.commands:
            command = Command.restore(row, self._settings.command_timeout_s)
            if command.status not in OPEN_STATUSES:
                self.commands.finish(command)
                continue
            self.commands.add(command)
            self._expire_later(command)
        if restored.devices or restored.commands:
            log.info("restored", devices=len(self.registry), open_commands=len(self.commands))

    async def stop(self) -> None:
        """Take no more commands, log every board off and close its connection with 1001. Bounded by STOP_TIMEOUT_S."""
        self.is_stopping = True
        self.commands.cancel_timeouts()
        for connection in list(self._connections):
            self.end(connection, WSCloseCode.GOING_AWAY, "the gateway stops")
        if self._closings:
            _, unfinished = await asyncio.wait(self._closings, timeout=self.STOP_TIMEOUT_S)
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)
        self.repeats.report_all()

    # -- connections ---------------------------------------------------------------------------------------------------

    def opened(self, connection: Connection) -> None:
        """A handshake is done. Nobody is online by that."""
        self._connections.add(connection)
        if self.is_stopping:
            self.end(connection, WSCloseCode.GOING_AWAY, "the gateway stops")

    def closed(self, connection: Connection, event: str, code: int | None, reason: str) -> None:
        """A connection is over; `event` is `disconnected` or `timeout`. Harmless where that was known already."""
        self._connections.discard(connection)
        self._go_offline(connection, event, code, reason)

    def end(self, connection: Connection, code: int, reason: str, event: str = "disconnected") -> None:
        """End a connection from this side: it counts for nothing at once, and is closed in the background."""
        if connection.is_ended:
            return
        self._go_offline(connection, event, code, reason)
        self._close(connection, code, reason)

    def _close(self, connection: Connection, code: int, reason: str) -> None:
        connection.is_ended = True
        task = asyncio.create_task(connection.close(code, reason))
        self._closings.add(task)
        task.add_done_callback(self._closings.discard)

    def _go_offline(self, connection: Connection, event: str, code: int | None, reason: str) -> None:
        device = connection.device
        if device is None or device.connection is not connection:
            return
        device.connection = None
        device.disconnected_at = utc_now()
        self._save_device(device)
        self._log_event(device, event, self._end_details(connection, code, reason), device.disconnected_at)

    def _come_online(self, connection: Connection, device_type: str) -> Device:
        device = self.registry.find(connection.device_id)
        now = utc_now()
        if device is None:
            device = Device(connection.device_id, device_type, connected_at=now)
            self.registry.add(device)
        previous = device.connection
        if previous is not None:
            if previous.serial > connection.serial:
                self._close(connection, CLOSE_REPLACED, "replaced by a newer connection")
                raise Unauthorized("a newer connection of this device is registered")
            details = self._end_details(previous, CLOSE_REPLACED, "replaced")
            self._log_event(device, "disconnected", details, now)
            self._close(previous, CLOSE_REPLACED, "replaced by a newer connection")
        device.device_type = device_type
        device.connected_at = now
        device.disconnected_at = None
        device.connection = connection
        connection.device = device
        return device

    def _log_event(self, device: Device, event: str, details: dict[str, Any], moment: datetime) -> None:
        row = {
            "device_id": device.device_id,
            "device_type": device.device_type,
            "event": event,
            "timestamp": moment,
            "details": to_json(details),
        }
        self._store.put_event(row)
        self.repeats.info(f"device_{event}", device.device_id, device_id=device.device_id, **details)

    def _end_details(self, connection: Connection, code: int | None, reason: str) -> dict[str, object]:
        seconds = round(time.monotonic() - connection.opened_s, 3)
        return {"reason": reason, "code": code, "peer": connection.peer, "seconds_connected": seconds}

    def _save_device(self, device: Device, *, urgent: bool = True) -> None:
        device.saved_s = time.monotonic()
        self._store.put_device(device.row(), urgent=urgent)

    # -- what boards say -----------------------------------------------------------------------------------------------

    def register(self, connection: Connection, message: Registration) -> None:
        """A board says who it is. Raises MissingField, Unauthorized, ResourceExhausted."""
        if message.device_type is None:
            raise MissingField("missing required field `device_type` in a registration")
        device = self._admit(connection, message)
        if message.metadata is not None:
            device.metadata = to_json(message.metadata)
        device.device_type = message.device_type
        self._save_device(device)

    def record_heartbeat(self, connection: Connection, message: Heartbeat) -> None:
        """A board is still here, and promises to go on. Raises Unauthorized, ResourceExhausted."""
        self._admit(connection, message)
        connection.has_heartbeat = True

    def record_status(self, connection: Connection, message: Status) -> None:
        """A board reports its state. Raises Unauthorized, ResourceExhausted."""
        device = self._admit(connection, message)
        device.state = to_json(message.payload)
        device.state_timestamp = device.last_heartbeat
        assert device.last_heartbeat is not None
        if not self._store.put_snapshot(device.device_id, device.device_type, device.state, device.last_heartbeat):
            self.repeats.warning("snapshots_dropped", "", device_id=device.device_id)

    def acknowledge(self, connection: Connection, message: CommandAck) -> None:
        """A board answers a command. Raises Unauthorized, ResourceExhausted, CommandNotFound."""
        device = self._admit(connection, message)
        command = self.commands.find(message.command_id)
        if command is None or not command.may_be_answered_by(device):
            raise CommandNotFound(f"command {message.command_id[:64]!r} was not sent to this device")
        if command.record_answer(device.device_id, message):
            self._store.put_command(command.row())
            if command.finished.is_set():
                self.commands.finish(command)
            log.debug("command_answered", command_id=command.command_id, device_id=device.device_id, status=message.status)

    def report_error(self, connection: Connection, message: ErrorReport) -> None:
        """A board says that something went wrong. Raises Unauthorized, ResourceExhausted."""
        device = self._admit(connection, message)
        self.repeats.warning(
            "device_error",
            device.device_id,
            burst=10,
            device_id=device.device_id,
            error_code=message.error_code,
            error_message=message.error_message,
            context=message.context,
        )

    def report_alert(self, connection: Connection, message: Alert) -> None:
        """A board says what a person should know. Raises Unauthorized, ResourceExhausted."""
        device = self._admit(connection, message)
        self.repeats.warning(
            "device_alert",
            device.device_id,
            burst=10,
            device_id=device.device_id,
            alert_type=message.alert_type,
            message=message.message,
        )

    def _admit(self, connection: Connection, message: BoardMessage) -> Device:
        """The device that speaks, registered by this message if it wasn't yet. Every accepted message is activity."""
        device = connection.device
        if device is None:
            if message.device_type is None:
                raise Unauthorized("device_type required: the first message must bear it")
            device = self._come_online(connection, message.device_type)
            self._save_device(device)
            self._log_event(device, "connected", {"peer": connection.peer}, device.connected_at)
        connection.last_message_s = time.monotonic()
        device.last_heartbeat = utc_now()
        return device

    async def pace(self) -> None:
        """What a board's connection owes the others now and then: their turn, and a disk that keeps up."""
        if self._store.is_congested:
            await self._store.flush(self.PERSIST_TIMEOUT_S)
        else:
            await asyncio.sleep(0)

    # -- commands ------------------------------------------------------------------------------------------------------

    async def route_command(self, request: CommandRequest) -> Command:
        """Create a command, commit its row, send it to all targets at once, and return it as sent or without devices.

        A store that can't write holds this up for PERSIST_TIMEOUT_S at the most. Raises DeviceNotFound, InvalidFieldValue,
        PayloadTooLarge, ResourceExhausted, Stopping.
        """
        if self.is_stopping:
            raise Stopping("the gateway is going down")
        device_type, targets = self._targets(request)
        command = Command(
            device_type=device_type,
            command_name=request.command_name,
            payload=to_json(request.payload or {}),
            timeout_s=float(request.timeout or self._settings.command_timeout_s),
            target_device_count=len(targets),
            created_at=utc_now(),
        )
        frame = command.frame()
        if (size_bytes := len(frame.encode())) > MAX_COMMAND_FRAME_BYTES:
            raise PayloadTooLarge(
                f"the command would be a frame of {size_bytes} bytes; boards take {MAX_COMMAND_FRAME_BYTES} at the most"
            )
        if targets:
            self.commands.add(command)
        else:
            command.status = NO_DEVICES
        command.is_persisted = await self._store.commit_command(command.row(), self.PERSIST_TIMEOUT_S)
        if targets:
            await self._send_command(command, frame, targets)
        log.info(
            "command_routed",
            command_id=command.command_id,
            command_name=command.command_name,
            device_type=device_type,
            device_id=request.device_id,
            status=command.status,
            targets=command.target_device_count,
        )
        return command

    async def wait_for_answers(self, command: Command, timeout_s: float) -> None:
        """Return when the command is finished, the time is over, or the gateway stops."""
        if command.status != NO_DEVICES:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await command.finished.wait()

    def _targets(self, request: CommandRequest) -> tuple[str, list[Device]]:
        if request.device_id is None:
            assert request.device_type is not None
            return request.device_type, self.registry.matching(request.device_type, True)
        device = self.registry.get(request.device_id)
        if request.device_type not in (None, device.device_type):
            raise InvalidFieldValue(f"device_type: device {device.device_id!r} is of type {device.device_type!r}")
        return device.device_type, [device] if device.is_online else []

    async def _send_command(self, command: Command, frame: str, targets: list[Device]) -> None:
        assert command.recipients is not None
        for device in targets:
            # Noted before the frame goes: the fastest boards answer within 2 ms.
            command.recipients.add(device.device_id)
            if device.connection is None or not await device.connection.send(frame):
                command.recipients.discard(device.device_id)
                self.repeats.warning(
                    "command_not_taken", device.device_id, device_id=device.device_id, command_id=command.command_id
                )
        if command.recipients:
            command.executed_at = utc_now()
            if command.status == CREATED:
                command.status = SENT
            if not command.finished.is_set():
                self._expire_later(command)
        else:
            command.status = NO_DEVICES
            self.commands.finish(command)
        self._store.put_command(command.row())

    def _expire_later(self, command: Command) -> None:
        command.expiry = asyncio.get_running_loop().call_later(command.timeout_s, self._expire, command)

    def _expire(self, command: Command) -> None:
        command.expire()
        self.commands.finish(command)
        self._store.put_command(command.row())
        log.info(
            "command_unanswered", command_id=command.command_id, status=command.status, answers=len(command.answers),
            targets=command.target_device_count,
        )  # fmt: skip

    # -- regular upkeep ------------------------------------------------------------------------------------------------

    def sweep(self) -> None:
        """About once a second: give up boards that broke their promise, save what activity is due, log the repeats."""
        now_s = time.monotonic()
        for device in self.registry.online():
            connection = device.connection
            assert connection is not None
            silent_s = now_s - connection.last_message_s
            if connection.has_heartbeat and silent_s > self._settings.heartbeat_timeout_s:
                self.end(connection, CLOSE_TIMED_OUT, f"nothing came for {silent_s:.0f} s", event="timeout")
            elif connection.last_message_s > device.saved_s and now_s - device.saved_s >= self.HEARTBEAT_SAVE_INTERVAL_S:
                self._save_device(device, urgent=False)
        self.repeats.report()

    def health(self) -> dict[str, object]:
        """What `GET /health` answers (contract, section 6), from memory."""
        store = self._store.health()
        health: dict[str, object] = {
            "status": "ok" if store.reason is None else "degraded",
            "app": "AMHR-PD",
            "version": VERSION,
            "timestamp": format_time(utc_now()),
            "uptime_seconds": round(time.monotonic() - self._started_s, 3),
            "devices_online": len(self.registry.online()),
            "devices_total": len(self.registry),
            "open_commands": len(self.commands),
            "database": "ok" if store.reason is None else store.reason,
            "rows_waiting": store.rows_waiting,
            "rows_dropped": store.rows_dropped,
            "rows_rejected": store.rows_rejected,
        }
        if store.notice is not None:
            health["notice"] = store.notice
        return health


# ======================================================================================================================
# Device socket
# ======================================================================================================================


class DeviceSocket(Connection):
    """One board's WebSocket: frames in, verbs out; frames to the board."""

    CLOSE_TIMEOUT_S = 2.0  # for the board's echo, which the boards in the field send at once
    # A board that leaves this much unread doesn't read. Under the transport's high-water mark (64 KiB) with one more
    # frame on top, so that sending never waits.
    UNREAD_LIMIT_BYTES = 32 << 10
    TURN_MESSAGES = 64  # about 1 ms of work, then the others have their turn

    def __init__(self, gateway: Gateway, settings: Settings, request: web.Request) -> None:
        super().__init__(request.match_info["device_id"], peer_of(request))
        self._gateway = gateway
        self._registration_timeout_s = settings.registration_timeout_s
        self._request = request
        self._receiving: asyncio.Timeout | None = None
        self._farewell: tuple[int, str] | None = None
        self._is_over = asyncio.Event()
        self._socket = web.WebSocketResponse(
            heartbeat=settings.ping_interval_s,
            max_msg_size=settings.max_message_bytes,
            timeout=self.CLOSE_TIMEOUT_S,
            compress=False,  # boards would offer what they can't inflate (contract, section 1)
            protocols=("arduino",),
            decode_text=False,
        )

    async def serve(self) -> web.WebSocketResponse:
        """Do the handshake and serve the connection until it ends."""
        await self._socket.prepare(self._request)
        self._gateway.opened(self)
        deadline = asyncio.get_running_loop().call_later(self._registration_timeout_s, self._check_registered)
        try:
            async with asyncio.timeout(None) as self._receiving:
                if self._farewell is None:
                    await self._receive_all()
        except TimeoutError:
            pass  # close() wants the connection's task for itself
        except Exception:
            log.exception("connection_failed", device_id=self.device_id)
            self._farewell = (WSCloseCode.INTERNAL_ERROR, "internal error")
        finally:
            deadline.cancel()
            self._receiving = None
            if isinstance(self._socket.exception(), TimeoutError):
                self._gateway.closed(self, "timeout", CLOSE_TIMED_OUT, "no answer to pings")
            else:
                self._gateway.closed(self, "disconnected", self._socket.close_code, self._end_reason())
            try:
                if self._farewell is not None:
                    await self._say_goodbye(*self._farewell)
            finally:
                self._is_over.set()
        return self._socket

    async def send(self, frame: str) -> bool:
        """See Connection. Never waits: what the board leaves unread is bounded."""
        transport = self._request.transport
        if self._socket.closed or transport is None or transport.get_write_buffer_size() > self.UNREAD_LIMIT_BYTES:
            return False
        try:
            await self._socket.send_str(frame)
        except ConnectionError:
            return False
        return True

    async def close(self, code: int, reason: str) -> None:
        """See Connection. Takes CLOSE_TIMEOUT_S twice at the most: to hand the frame over, and for the echo."""
        self.is_ended = True
        self._farewell = self._farewell or (code, reason)
        if self._receiving is not None:
            # The library waits for the echo only where the task that receives is the one that closes: call it back.
            self._receiving.reschedule(asyncio.get_running_loop().time())
        await self._is_over.wait()

    async def _say_goodbye(self, code: int, reason: str) -> None:
        try:
            async with asyncio.timeout(2 * self.CLOSE_TIMEOUT_S):
                await self._socket.close(code=code, message=reason.encode()[:123])
        except (TimeoutError, ConnectionError):
            if self._request.transport is not None:
                self._request.transport.abort()

    def _check_registered(self) -> None:
        if self.device is None and not self.is_ended:
            self._gateway.repeats.info("never_registered", self.device_id, device_id=self.device_id, peer=self.peer)
            self._gateway.end(self, CLOSE_TIMED_OUT, f"not registered within {self._registration_timeout_s:g} s")

    def _end_reason(self) -> str:
        match self._socket.close_code:
            case None | WSCloseCode.ABNORMAL_CLOSURE:
                return "the connection was lost"
            case WSCloseCode.MESSAGE_TOO_BIG:
                return "a message was too big"
            case WSCloseCode.PROTOCOL_ERROR | WSCloseCode.INVALID_TEXT:
                return "the device broke the WebSocket protocol"
            case _:
                return "closed by the device"

    async def _receive_all(self) -> None:
        for count in itertools.count(1):
            frame = await self._socket.receive()
            if frame.type is WSMsgType.TEXT or frame.type is WSMsgType.BINARY:
                if not self.is_ended:
                    try:
                        if frame.type is WSMsgType.BINARY:
                            raise InvalidMessage("binary frame: messages are JSON objects in text frames")
                        self._handle(frame.data)
                    except GatewayError as error:
                        await self._refuse(error)
            elif frame.type in (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR):
                return
            if count % self.TURN_MESSAGES == 0:
                await self._gateway.pace()

    def _handle(self, data: bytes) -> None:
        message = decode_board_message(data)
        match message:
            case Status():
                self._gateway.record_status(self, message)
            case Heartbeat():
                self._gateway.record_heartbeat(self, message)
            case CommandAck():
                self._gateway.acknowledge(self, message)
            case Registration():
                self._gateway.register(self, message)
            case Alert():
                self._gateway.report_alert(self, message)
            case ErrorReport():
                self._gateway.report_error(self, message)

    async def _refuse(self, error: GatewayError) -> None:
        text = str(error)
        self._gateway.repeats.warning(
            "message_refused", self.device_id, device_id=self.device_id, error_code=error.error_code, error=text
        )
        reply = {"message_type": "error", "error_code": error.error_code, "error_message": text, "error": text}
        await self.send(to_json(reply))


def peer_of(request: web.Request) -> str:
    """The caller's address; IPv4 as IPv4 also where the socket is IPv6."""
    return (request.remote or "unknown").removeprefix("::ffff:")


# ======================================================================================================================
# REST
# ======================================================================================================================

MAX_BODY_BYTES = 1 << 20
BODY_TIMEOUT_S = 10.0
_DEVICE_ID = re.compile(DEVICE_ID)

# Whoever owns a public name can point it at the gateway's address, and a browser then calls this its own origin. Names
# that nobody outside can own are safe: addresses, single labels, and the private top-level domains (RFC 6762, RFC 8375).
_PRIVATE_DOMAINS = (".local", ".localhost", ".home.arpa", ".internal", ".lan", ".home")

JsonHandler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class RestApi:
    """The routes of the contract's section 6. Handlers look up and answer; `guard` owns access and errors."""

    def __init__(self, settings: Settings, gateway: Gateway, store: Store) -> None:
        self._settings = settings
        self._gateway = gateway
        self._store = store

    def routes(self) -> list[web.RouteDef]:
        """Every route, plain and under /api."""
        table: tuple[tuple[str, str, JsonHandler], ...] = (
            ("GET", "/ws/{device_id}", self.serve_device),
            ("GET", "/health", self.health),
            ("GET", "/devices", self.devices),
            ("GET", "/devices/{device_id}", self.device),
            ("POST", "/command", self.command),
            ("GET", "/state-history/{device_id}", self.state_history),
            ("GET", "/command-logs", self.command_logs),
            ("GET", "/command-logs/{command_id}", self.command_log),
            ("GET", "/device-connection-history/{device_id}", self.connection_history),
        )
        return [web.route(method, prefix + path, handler) for prefix in ("", "/api") for method, path, handler in table]

    # -- access and errors ---------------------------------------------------------------------------------------------

    @web.middleware
    async def guard(self, request: web.Request, handler: JsonHandler) -> web.StreamResponse:
        """Let a request in or not, and give every error its one shape."""
        try:
            self._check_origin(request)
            self._check_token(request)
            return await handler(request)
        except GatewayError as error:
            return self._error_response(request, error)
        except web.HTTPException as error:
            return self._error_response(request, _translate(request, error), error.headers.get("Allow"))
        except Exception:
            log.exception("request_failed", method=request.method, path=request.path)
            return self._error_response(request, InternalError("internal error; the gateway's log says more"))

    def _error_response(self, request: web.Request, error: GatewayError, allow: str | None = None) -> web.Response:
        if isinstance(error, Unauthorized | Forbidden):
            self._gateway.repeats.warning(
                "request_refused", peer_of(request), peer=peer_of(request), path=request.path, error=str(error)
            )
        else:
            log.debug(
                "request_refused", method=request.method, path=request.path, error_code=error.error_code, error=str(error)
            )
        response = json_response({"error": str(error), "error_code": error.error_code}, error.status)
        if isinstance(error, Unauthorized):
            response.headers["WWW-Authenticate"] = 'Bearer realm="AMHR-PD", Basic realm="AMHR-PD"'
        if allow is not None:
            response.headers["Allow"] = allow
        return response

    def _check_origin(self, request: web.Request) -> None:
        """Raise Forbidden for what a browser sends on behalf of a web page that isn't ours."""
        origin = request.headers.get("Origin")
        if origin is None:
            return
        origin = origin.lower()
        if origin in self._settings.allowed_origins or _is_own_origin(origin, request.host):
            return
        if origin == "file://" and _is_device_route(request):
            return  # every board in the field says so (contract, section 1)
        raise Forbidden(f"the origin {origin[:100]!r} is not allowed here; AMHRPD_ALLOWED_ORIGINS can allow it")

    def _check_token(self, request: web.Request) -> None:
        """Raise Unauthorized where a token is set and the request doesn't show it."""
        is_device = _is_device_route(request)
        token = self._settings.device_token if is_device else self._settings.api_token
        if token is None or _is_health_route(request) or _shows_token(request, token, in_query=is_device):
            return
        raise Unauthorized(f"a valid {'device' if is_device else 'API'} token is required")

    # -- handlers ------------------------------------------------------------------------------------------------------

    async def serve_device(self, request: web.Request) -> web.StreamResponse:
        """`GET /ws/{device_id}`: a board connects."""
        if not _DEVICE_ID.fullmatch(request.match_info["device_id"]):
            raise InvalidFieldValue("device_id in the path must be 1 to 64 of A-Z a-z 0-9 . _ -")
        if self._gateway.is_stopping:
            raise Stopping("the gateway is going down")
        return await DeviceSocket(self._gateway, self._settings, request).serve()

    async def health(self, request: web.Request) -> web.Response:
        """`GET /health`: open to all; without the token, where one is set, it says no more than the status."""
        _query(request)
        health = self._gateway.health()
        status = 200 if health["status"] == "ok" else 503
        token = self._settings.api_token
        if token is not None and not _shows_token(request, token, in_query=False):
            health = {"status": health["status"]}
        return json_response(health, status)

    async def devices(self, request: web.Request) -> web.Response:
        """`GET /devices`."""
        query = _query(request, "device_type", "online")
        online = _one_of(query, "online", ("true", "false"))
        devices = self._gateway.registry.matching(query.get("device_type"), None if online is None else online == "true")
        return json_response({"total": len(devices), "devices": [device.record() for device in devices]})

    async def device(self, request: web.Request) -> web.Response:
        """`GET /devices/{device_id}`."""
        _query(request)
        return json_response(self._gateway.registry.get(request.match_info["device_id"]).record())

    async def command(self, request: web.Request) -> web.Response:
        """`POST /command`."""
        query = _query(request, "device_type", "device_id", "command_name", "payload", "timeout", "wait")
        wanted = decode_command(query, await _body(request))
        command = await self._gateway.route_command(wanted)
        if wanted.wait:
            await self._gateway.wait_for_answers(command, wanted.wait)
        return json_response(command.record(with_answers=wanted.wait > 0))

    async def state_history(self, request: web.Request) -> web.Response:
        """`GET /state-history/{device_id}`."""
        span = _span(_query(request, "limit", "since", "until", "before_id"))
        device = self._gateway.registry.get(request.match_info["device_id"])
        states = await self._store.state_history(device.device_id, span)
        return json_response({"device_id": device.device_id, "total": len(states), "states": states})

    async def connection_history(self, request: web.Request) -> web.Response:
        """`GET /device-connection-history/{device_id}`."""
        query = _query(request, "limit", "since", "until", "before_id", "event")
        device = self._gateway.registry.get(request.match_info["device_id"])
        event = _one_of(query, "event", CONNECTION_EVENTS)
        events = await self._store.connection_history(device.device_id, event, _span(query))
        return json_response({"device_id": device.device_id, "total": len(events), "events": events})

    async def command_logs(self, request: web.Request) -> web.Response:
        """`GET /command-logs`."""
        query = _query(request, "limit", "since", "until", "status", "device_type")
        status = _one_of(query, "status", COMMAND_STATUSES)
        logs = await self._store.command_logs(status, query.get("device_type"), _span(query))
        return json_response({"total": len(logs), "logs": logs})

    async def command_log(self, request: web.Request) -> web.Response:
        """`GET /command-logs/{command_id}`."""
        _query(request)
        command_id = request.match_info["command_id"]
        row = await self._store.command(command_id)
        if row is None:
            raise CommandNotFound(f"command {command_id[:64]!r} was never given")
        return json_response(row)


def json_response(content: object, status: int = 200) -> web.Response:
    """JSON, with a line end for those who read it in a shell."""
    return web.Response(body=_encoder.encode(content) + b"\n", status=status, content_type="application/json")


def _query(request: web.Request, *known: str) -> dict[str, str]:
    """The query's parameters. Raises InvalidFieldValue for one that the route doesn't have, or that is given twice."""
    query = request.query
    for name in query:
        if name not in known:
            offer = f"known here: {', '.join(known)}" if known else "there are none here"
            raise InvalidFieldValue(f"unknown query parameter {name[:64]!r}; {offer}")
        if len(query.getall(name)) > 1:
            raise InvalidFieldValue(f"query parameter {name!r} is given more than once")
    return dict(query)


def _one_of(query: Mapping[str, str], name: str, values: Sequence[str]) -> str | None:
    value = query.get(name)
    if value is not None and value not in values:
        raise InvalidFieldValue(f"{name} is {value[:64]!r}: it must be one of {', '.join(values)}")
    return value


def _span(query: Mapping[str, str]) -> HistoryRange:
    return HistoryRange(
        limit=_whole_number(query, "limit", 1, 1000) or 100,
        since=_moment(query, "since"),
        until=_moment(query, "until"),
        before_id=_whole_number(query, "before_id", 1, 2**63 - 1),
    )


def _whole_number(query: Mapping[str, str], name: str, low: int, high: int) -> int | None:
    text = query.get(name)
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,19}", text) or not low <= int(text) <= high:
        raise InvalidFieldValue(f"{name} is {text[:64]!r}: it must be a whole number from {low} to {high}")
    return int(text)


def _moment(query: Mapping[str, str], name: str) -> datetime | None:
    """An ISO 8601 time as naive UTC. A `+` that nobody escaped arrives as a space, and is meant as what it was."""
    text = query.get(name)
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(re.sub(r" (\d\d:?\d\d)$", r"+\1", text) if "T" in text else text)
        return moment if moment.tzinfo is None else moment.astimezone(UTC).replace(tzinfo=None)
    except (ValueError, OverflowError):
        raise InvalidFieldValue(f"{name} is {text[:64]!r}: it must be an ISO 8601 time such as 2026-01-24T10:30:45Z") from None


async def _body(request: web.Request) -> bytes:
    """The body, whatever its content type says it is. Raises UnsupportedMediaType, PayloadTooLarge, RequestTimeout."""
    encoding = request.headers.get("Content-Encoding", "identity").lower()
    if encoding != "identity":
        raise UnsupportedMediaType(f"Content-Encoding {encoding[:64]!r}: send the body uncompressed")
    if (request.charset or "utf-8").lower() not in ("utf-8", "utf8", "us-ascii"):
        raise UnsupportedMediaType("charset: JSON is UTF-8")
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await request.read()
    except TimeoutError:
        raise RequestTimeout(f"the body didn't arrive within {BODY_TIMEOUT_S:g} s") from None


def _translate(request: web.Request, error: web.HTTPException) -> GatewayError:
    """The gateway's own error for one that the router or the HTTP library raised."""
    match error.status:
        case 404:
            return NotFound(f"no such route: {request.path[:100]}")
        case 405:
            return MethodNotAllowed(f"{request.method} is not possible on {request.path[:100]}")
        case 413:
            return PayloadTooLarge(f"the body is larger than {MAX_BODY_BYTES} bytes")
        case 415:
            return UnsupportedMediaType(error.reason)
        case _:
            return InvalidFieldValue(error.text or error.reason)


def _is_device_route(request: web.Request) -> bool:
    return request.path.removeprefix("/api").startswith("/ws/")


def _is_health_route(request: web.Request) -> bool:
    return request.path in ("/health", "/api/health")


def _is_own_origin(origin: str, host: str) -> bool:
    scheme, _, authority = origin.partition("://")
    default_port = {"http": ":80", "https": ":443"}.get(scheme, "")
    if not default_port or authority.removesuffix(default_port) != host.lower().removesuffix(default_port):
        return False
    name = authority.rsplit(":", 1)[0] if not authority.endswith("]") else authority
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name.strip("[]"))
        return True
    return "." not in name or name.endswith(_PRIVATE_DOMAINS)


def _shows_token(request: web.Request, token: str, *, in_query: bool) -> bool:
    """Whether the request bears the token.

    As Bearer, as Basic with any user name, as the whole of the Authorization header (contract, section 1), or as `?token=`
    where that is possible.
    """
    authorization = request.headers.get("Authorization", "").strip()
    scheme, _, value = authorization.partition(" ")
    shown = authorization or (request.query.get("token", "") if in_query else "")
    match scheme.lower():
        case "bearer":
            shown = value.strip()
        case "basic":
            with contextlib.suppress(binascii.Error, ValueError):
                shown = base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
    return hmac.compare_digest(shown.encode("utf-8", "replace"), token.encode())


# ======================================================================================================================
# Service
# ======================================================================================================================

GATEWAY = web.AppKey("gateway", Gateway)
STORE = web.AppKey("store", Store)

# 1,000 boards and their callers, four times over; idle connections cost 10 KB each, so at most 40 MB.
MAX_CONNECTIONS = 4096
# Also bounds connections that never send a request or never finish its headers; callers reconnect when they poll slower.
KEEPALIVE_TIMEOUT_S = 15.0
LINGERING_TIME_S = 2.0  # for the rest of a body that was refused, so that the caller gets to read why
UNREAD_TIMEOUT_S = 30.0  # a caller that takes nothing of its answer for so long is dropped
HANDLERS_TIMEOUT_S = 3.0  # at a stop, for answers that are under way
STORE_CLOSE_TIMEOUT_S = 10.0  # at a stop, for what is queued; amhrpd.service's TimeoutStopSec is above the sum of all


def build_app(settings: Settings) -> web.Application:
    """The gateway as an aiohttp application. The store opens and closes with it.

    Whoever runs it awaits `app[GATEWAY].stop()` before its clean-up, which is deaf to the boards' close replies.
    """
    store = Store(settings.database_path, settings.commit_interval_s)
    gateway = Gateway(settings, store)
    rest = RestApi(settings, gateway, store)
    app = web.Application(middlewares=[rest.guard], client_max_size=MAX_BODY_BYTES)
    app[GATEWAY] = gateway
    app[STORE] = store
    app.add_routes(rest.routes())

    async def run_store(_: web.Application) -> AsyncIterator[None]:
        restored = store.open()  # nobody is served yet, so nobody waits for this disk access
        store.attach(asyncio.get_running_loop())
        gateway.start(restored)
        yield
        if not await store.close(STORE_CLOSE_TIMEOUT_S):
            raise StoreUnavailable("not all that was queued could be written")

    app.cleanup_ctx.append(run_store)
    return app


async def serve(settings: Settings, stop: asyncio.Event, on_ready: Callable[[int], None] = lambda port: None) -> int:
    """Run the gateway until `stop` is set; `on_ready` is told the port. Returns the exit code. Raises StartError."""
    notifier = Notifier(os.environ)
    tls = _tls_context(settings)
    sockets = _bind(settings.host, settings.port)
    app = build_app(settings)
    runner = web.AppRunner(
        app,
        access_log=None,
        keepalive_timeout=KEEPALIVE_TIMEOUT_S,
        shutdown_timeout=HANDLERS_TIMEOUT_S,
        lingering_time=LINGERING_TIME_S,
        auto_decompress=False,
    )
    loop = asyncio.get_running_loop()
    servers: list[asyncio.Server] = []
    exit_code = 0
    try:
        await runner.setup()
        assert runner.server is not None
        limit = min(MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 100)
        accept = functools.partial(_accept, runner.server, limit)
        handshake_timeout_s = None if tls is None else KEEPALIVE_TIMEOUT_S
        for listener in sockets:
            server = await loop.create_server(
                accept, sock=listener, ssl=tls, ssl_handshake_timeout=handshake_timeout_s, backlog=1024
            )
            servers.append(server)
        port = sockets[0].getsockname()[1]
        log.info(
            "listening", address=settings.host, port=port, tls=tls is not None, database=str(settings.database_path.absolute())
        )
        upkeep = asyncio.create_task(_upkeep(app, runner.server, notifier))
        notifier.send("READY=1")
        on_ready(port)
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((stopping, upkeep), return_when=asyncio.FIRST_COMPLETED)
        notifier.send("STOPPING=1", "STATUS=stopping")
        log.info("stopping", devices_online=len(app[GATEWAY].registry.online()))
        for task in (stopping, upkeep):
            task.cancel()
        for result in await asyncio.gather(stopping, upkeep, return_exceptions=True):
            if isinstance(result, Exception):
                log.error("upkeep_failed", exc_info=result)
                exit_code = 1
    finally:
        for server in servers:
            server.close()
        for listener in sockets:
            listener.close()
        await app[GATEWAY].stop()
        try:
            await runner.cleanup()
        except StoreUnavailable as error:
            log.error("stopped_with_losses", error=str(error))
            exit_code = 1
    log.info("stopped", exit_code=exit_code)
    return exit_code


def _bind(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to the address, both families where the name or the wildcard has both. Raises StartError."""
    sockets: list[socket.socket] = []
    try:
        if host in ("0.0.0.0", "::") and socket.has_dualstack_ipv6():
            return [socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)]
        for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
            sockets.append(socket.create_server((str(address[0]), address[1]), family=family, backlog=1024))
            port = port or sockets[0].getsockname()[1]
    except (OSError, UnicodeError) as error:
        for bound in sockets:
            bound.close()
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise StartError(f"can't listen on {host} port {port}: {reason}") from None
    return sockets


def _tls_context(settings: Settings) -> ssl.SSLContext | None:
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    for path in (settings.tls_cert, settings.tls_key):
        try:
            path.open("rb").close()
        except OSError as error:
            raise StartError(f"can't read {path}: {error.strerror}") from None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key)
    except ssl.SSLError as error:
        raise StartError(f"can't use the certificate {settings.tls_cert} with {settings.tls_key}: {error.reason}") from None
    return context


def _accept(server: web.Server, limit: int) -> asyncio.Protocol:
    return server() if len(server.connections) < limit else _Refusal()


class _Refusal(asyncio.Protocol):
    """What a connection over the limit gets: a cheap no. Those that are connected stay."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        transport.close()


async def _upkeep(app: web.Application, server: web.Server, notifier: Notifier) -> NoReturn:
    """Everything that is due regularly. The watchdog's ping comes from here, so it shows that the loop turns."""
    gateway, store = app[GATEWAY], app[STORE]
    stuck: dict[web.RequestHandler, tuple[int, float]] = {}
    while True:
        gateway.sweep()
        stuck = _drop_stuck(server, stuck)
        notifier.send(f"STATUS={len(gateway.registry.online())} devices online, {len(gateway.commands)} open commands")
        if store.is_writer_alive():
            notifier.send("WATCHDOG=1")
        await asyncio.sleep(notifier.interval_s)


def _drop_stuck(
    server: web.Server, stuck: dict[web.RequestHandler, tuple[int, float]]
) -> dict[web.RequestHandler, tuple[int, float]]:
    """Drop connections whose peer has taken nothing of what waits for it for UNREAD_TIMEOUT_S.

    `stuck` is what the last call returned: connections with bytes waiting, how many, and since when as many.
    """
    now_s = time.monotonic()
    still: dict[web.RequestHandler, tuple[int, float]] = {}
    for connection in server.connections:
        transport = connection.transport
        if transport is None or not (waiting_bytes := transport.get_write_buffer_size()):
            continue
        before_bytes, since_s = stuck.get(connection, (0, now_s))
        still[connection] = (waiting_bytes, since_s if waiting_bytes >= before_bytes > 0 else now_s)
        if now_s - still[connection][1] > UNREAD_TIMEOUT_S:
            transport.abort()
    return still


class Notifier:
    """systemd's notification socket (sd_notify(3)); does nothing where there is none."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Read NOTIFY_SOCKET and WATCHDOG_USEC. `interval_s` is how often a watchdog ping is due."""
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        watchdog_usec = environ.get("WATCHDOG_USEC", "")
        watchdog_s = int(watchdog_usec) / 1e6 if watchdog_usec.isdigit() else math.inf
        self.interval_s = min(1.0, watchdog_s / 3)
        self._sent_status = ""

    def send(self, *assignments: str) -> None:
        """Send one datagram, unless it says the STATUS that was said last."""
        text = "\n".join(assignments)
        if not self._address or text == self._sent_status:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
                out.setblocking(False)
                out.sendto(text.encode(), self._address)
        except OSError as error:
            log.warning("notify_failed", error=str(error))
            return
        if text.startswith("STATUS="):
            self._sent_status = text


# -- logging -----------------------------------------------------------------------------------------------------------

_JOURNAL_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
_MAX_LOGGED_TEXT = 300  # of a value; boards and callers write most of them


def configure_logging(level: str, log_format: str) -> None:
    """One line an event, on stderr; the libraries' records go the same way."""
    if log_format == "auto":
        log_format = "journal" if os.environ.get("JOURNAL_STREAM") else "console" if sys.stderr.isatty() else "json"
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
    shared: list[structlog.typing.Processor] = [structlog.stdlib.add_log_level, structlog.processors.format_exc_info]
    if log_format != "journal":  # the journal stamps its lines itself
        shared.append(stamp)
    shared.append(_tame)
    renderer: structlog.typing.Processor
    match log_format:
        case "console":
            renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        case "journal":
            renderer = _render_for_journal
        case _:
            renderer = structlog.processors.JSONRenderer(ensure_ascii=False)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer]
        )
    )
    logging.raiseExceptions = False  # a reader of stderr that went away must not make more noise
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def _tame(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Cap what others wrote, and keep it in its line."""
    for key, value in event.items():
        if isinstance(value, str) and key != "exception":
            event[key] = _one_line(value)
        elif isinstance(value, dict | list | tuple):
            event[key] = _one_line(repr(value))
    return event


def _one_line(text: str) -> str:
    if len(text) > _MAX_LOGGED_TEXT:
        text = f"{text[:_MAX_LOGGED_TEXT]}… ({len(text)} characters)"
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


_render_fields = structlog.processors.LogfmtRenderer(bool_as_flag=False)


def _render_for_journal(logger: Any, name: str, event: structlog.typing.EventDict) -> str:
    """`<4>device_alert device_id=esp32_001 …`: systemd takes the priority from the front (sd-daemon(3))."""
    priority = _JOURNAL_PRIORITIES.get(event.pop("level", "info"), 6)
    text = event.pop("event", "")
    fields = {str(key).replace(" ", "_"): value if value is None else str(value) for key, value in event.items()}
    return f"<{priority}>{text} {_render_fields(logger, name, fields)}".rstrip().replace("\n", f"\n<{priority}>")


# ======================================================================================================================
# Simulator
# ======================================================================================================================


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FleetPlan:
    """What `amhrpd.py simulate` plays. Durations are seconds, `reconnect_rate` is power cuts a board and minute."""

    url: str = "http://127.0.0.1:8000"
    devices: int = 10
    device_type: str = "ESP32"
    heartbeat_interval_s: float = 5.0  # as the servo sketch (contract, section 1)
    status_interval_s: float = 1.0
    ack_delay_s: float = 0.0015  # as the servo sketch
    failure_rate: float = 0.0
    reconnect_rate: float = 0.0
    commands: int = 10
    duration_s: float = 30.0
    api_token: str | None = None
    device_token: str | None = None


@dataclasses.dataclass(slots=True)
class Tally:
    """What a fleet has done so far. Durations in seconds."""

    boards_up: int = 0
    messages: int = 0
    acks: int = 0
    errors: int = 0
    last_error: str = ""
    post_s: list[float] = dataclasses.field(default_factory=list)
    all_acked_s: list[float] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    acked_by: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    """command_id -> device_id -> when its ack was sent (monotonic)."""
    ack_sent: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    def record_ack(self, command_id: str, device_id: str) -> None:
        """Count an ack that a board has just sent, and wake who waits for it."""
        self.acks += 1
        self.acked_by.setdefault(command_id, {})[device_id] = time.monotonic()
        self.ack_sent.set()

    def record_error(self, error: str) -> None:
        """Count an error and remember what it was."""
        self.errors += 1
        self.last_error = error


class SimulatedBoard:
    """A board that behaves on the wire as the servo sketch of the contract's section 1 does."""

    REBOOT_S = (0.5, 5.0)  # of a power cut, and of a lost connection: how soon the boards in the field are back
    CONFIRM_TIMEOUT_S = 10.0

    def __init__(self, plan: FleetPlan, run: str, number: int, tally: Tally, handshakes: asyncio.Semaphore) -> None:
        self.device_id = f"sim_{number:04d}"
        self.connections = 0
        self.snapshots_sent = 0
        self.unconfirmed: set[int] = set()  # snapshots that may have gone with the power
        self._plan = plan
        self._run = run
        self._tally = tally
        self._handshakes = handshakes
        self._first_of_connection = 0

    async def live(self, stop: asyncio.Event) -> None:
        """Connect, work, lose power, come back, until `stop`."""
        while not stop.is_set():
            try:
                await self._connect_and_work(stop)
            except (OSError, TimeoutError, websockets.exceptions.WebSocketException) as error:
                self._tally.record_error(f"{self.device_id}: {error or type(error).__name__}")
            if not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(random.uniform(*self.REBOOT_S)):
                        await stop.wait()

    async def _connect_and_work(self, stop: asyncio.Event) -> None:
        credentials = base64.b64encode(f"board:{self._plan.device_token}".encode()).decode()
        async with self._handshakes:
            socket_ = await websockets.connect(
                f"{self._plan.url.replace('http', 'ws', 1)}/ws/{self.device_id}",
                origin=websockets.Origin("file://"),
                subprotocols=[websockets.Subprotocol("arduino")],
                user_agent_header="arduino-WebSocket-Client",
                additional_headers={"Authorization": f"Basic {credentials}"} if self._plan.device_token else {},
                compression=None,
                ping_interval=None,
                max_size=MAX_COMMAND_FRAME_BYTES,
                close_timeout=5,
                proxy=None,
            )
        self._first_of_connection = self.snapshots_sent
        self.connections += 1
        self._tally.boards_up += 1
        try:
            metadata = {"device_id": self.device_id, "firmware_version": "2.0.0", "servo_count": 10}
            await self._send(
                socket_, {"message_type": "registration", "device_type": self._plan.device_type, "metadata": metadata}
            )
            rate = self._plan.reconnect_rate / 60
            work = [
                asyncio.create_task(self._heartbeat(socket_)),
                asyncio.create_task(self._report(socket_)),
                asyncio.create_task(self._answer(socket_)),
                asyncio.create_task(stop.wait()),
                asyncio.create_task(asyncio.sleep(random.expovariate(rate) if rate else 1e9)),
            ]
            done, rest = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            # The board still answers while it makes sure that what it sent has arrived.
            for task in (work[0], work[1]):
                task.cancel()
            if not work[2].done():
                await self._confirm(socket_)
            for task in rest:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)
            if stop.is_set():
                await socket_.close()
            for task in done:
                task.result()
        finally:
            self._tally.boards_up -= 1
            socket_.transport.abort()

    async def _confirm(self, socket_: websockets.ClientConnection) -> None:
        """A pong tells that the gateway has handled all that was sent before the ping."""
        try:
            async with asyncio.timeout(self.CONFIRM_TIMEOUT_S):
                await (await socket_.ping())
        except (TimeoutError, websockets.exceptions.ConnectionClosed):
            self.unconfirmed.update(range(self._first_of_connection, self.snapshots_sent))

    async def _send(self, socket_: websockets.ClientConnection, message: dict[str, object]) -> None:
        await socket_.send(to_json(message))
        self._tally.messages += 1

    async def _heartbeat(self, socket_: websockets.ClientConnection) -> None:
        while True:
            await self._send(socket_, {"message_type": "heartbeat", "device_type": self._plan.device_type})
            await asyncio.sleep(self._plan.heartbeat_interval_s)

    async def _report(self, socket_: websockets.ClientConnection) -> None:
        await asyncio.sleep(random.random() * self._plan.status_interval_s)
        while True:
            sequence = self.snapshots_sent
            self.snapshots_sent += 1
            payload = {"run": self._run, "seq": sequence, "temperature": 25.3, "humidity": 45.2, "battery": 87, "rssi": -50}
            await self._send(socket_, {"message_type": "status", "payload": payload})
            await asyncio.sleep(self._plan.status_interval_s)

    async def _answer(self, socket_: websockets.ClientConnection) -> None:
        async for frame in socket_:
            message = json.loads(frame)
            if message["message_type"] == "error":
                self._tally.record_error(f"{self.device_id}: {message['error_code']}: {message['error_message']}")
            elif message["message_type"] == "command":
                await asyncio.sleep(self._plan.ack_delay_s)
                status = "failure" if random.random() < self._plan.failure_rate else "success"
                ack = {"message_type": "command_ack", "device_type": self._plan.device_type}
                await self._send(socket_, ack | {"command_id": message["command_id"], "status": status})
                self._tally.record_ack(message["command_id"], self.device_id)


class Fleet:
    """All boards of a plan, the caller who sends commands, and the auditor who asks the gateway what it has kept."""

    FIRST_BOARDS_TIMEOUT_S = 30.0
    ALL_ACKED_TIMEOUT_S = 10.0
    HANDSHAKES_AT_ONCE = 50
    LIVE_LINE_INTERVAL_S = 0.5

    def __init__(self, plan: FleetPlan) -> None:
        self.tally = Tally()
        self._plan = plan
        self._run = uuid.uuid4().hex[:8]
        handshakes = asyncio.Semaphore(self.HANDSHAKES_AT_ONCE)
        self._boards = [SimulatedBoard(plan, self._run, n, self.tally, handshakes) for n in range(1, plan.devices + 1)]
        self._commands: dict[str, int] = {}  # command_id -> boards targeted

    async def play(self, stop: asyncio.Event) -> int:
        """Play the plan (less, when `stop` is set), print the table. Returns the exit code: 1 if anything is missing."""
        headers = {"Authorization": f"Bearer {self._plan.api_token}"} if self._plan.api_token else {}
        timeout = aiohttp.ClientTimeout(total=60)
        async with aiohttp.ClientSession(self._plan.url, headers=headers, timeout=timeout) as session:
            try:
                await self._ask(session, "/devices?device_type=none")
            except (OSError, aiohttp.ClientError, TimeoutError, LookupError) as error:
                print(f"amhrpd simulate: no gateway at {self._plan.url}: {error}", file=sys.stderr)
                return 1
            boards_stop = asyncio.Event()
            began_s = time.monotonic()
            boards = [asyncio.create_task(board.live(boards_stop)) for board in self._boards]
            screen = asyncio.create_task(self._show_progress(began_s))
            try:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._plan.duration_s):
                        caller = asyncio.create_task(self._send_commands(session))
                        await stop.wait()
                caller.cancel()
                await asyncio.gather(caller, return_exceptions=True)
                if (unsent := self._plan.commands - len(self._commands)) and not stop.is_set():
                    self.tally.missing.append(f"{unsent} of {self._plan.commands} commands were refused, or late for --duration")
                worked_s = time.monotonic() - began_s
                boards_stop.set()
                await asyncio.gather(*boards)
            finally:
                screen.cancel()
                await asyncio.gather(screen, return_exceptions=True)
            print("asking the gateway what it has kept …", file=sys.stderr)
            snapshots_found = await self._audit_snapshots(session)
            await self._audit_commands(session)
        self._print_table(worked_s, snapshots_found)
        return 1 if self.tally.missing else 0

    async def _send_commands(self, session: aiohttp.ClientSession) -> None:
        deadline_s = time.monotonic() + self.FIRST_BOARDS_TIMEOUT_S
        while not all(board.connections for board in self._boards) and time.monotonic() < deadline_s:
            await asyncio.sleep(0.1)
        pause_s = max(0.0, self._plan.duration_s - 2 * self.ALL_ACKED_TIMEOUT_S) / max(1, self._plan.commands)
        for number in range(self._plan.commands):
            began_s = time.monotonic()
            body = {"device_type": self._plan.device_type, "command_name": "blink", "payload": {"count": number}}
            try:
                async with session.post("/command", json=body) as response:
                    answer = await response.json()
                    response.raise_for_status()
            except (OSError, aiohttp.ClientError, TimeoutError) as error:
                self.tally.record_error(f"POST /command: {error or type(error).__name__}")
                continue
            self.tally.post_s.append(time.monotonic() - began_s)
            command_id, targets = answer["command_id"], answer["target_device_count"]
            self._commands[command_id] = targets
            if await self._all_acked(command_id, targets):
                last_s = max(self.tally.acked_by.get(command_id, {}).values(), default=began_s)
                self.tally.all_acked_s.append(last_s - began_s)
            await asyncio.sleep(max(0.0, began_s + pause_s - time.monotonic()))

    async def _all_acked(self, command_id: str, targets: int) -> bool:
        """Wait until so many boards have acked, or ALL_ACKED_TIMEOUT_S are over: False."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.ALL_ACKED_TIMEOUT_S):
                while len(self.tally.acked_by.get(command_id, {})) < targets:
                    self.tally.ack_sent.clear()
                    await self.tally.ack_sent.wait()
                return True
        return False

    async def _audit_snapshots(self, session: aiohttp.ClientSession) -> int:
        """Compare what every board sent with its history. Returns how many snapshots of this run were found."""
        found = 0
        for board in self._boards:
            kept: set[int] = set()
            before = ""
            while True:
                states = (await self._ask(session, f"/state-history/{board.device_id}?limit=1000{before}", "states")) or []
                ours = [s["state_data"]["seq"] for s in states if s["state_data"].get("run") == self._run]
                kept.update(ours)
                if not ours or len(states) < 1000:
                    break
                before = f"&before_id={states[-1]['id']}"
            found += len(kept)
            if lost := set(range(board.snapshots_sent)) - kept - board.unconfirmed:
                self.tally.missing.append(f"{board.device_id}: {len(lost)} of {board.snapshots_sent} snapshots")
        return found

    async def _audit_commands(self, session: aiohttp.ClientSession) -> None:
        """Compare the acks that the boards sent with the command log."""
        for command_id, targets in self._commands.items():
            answers = await self._ask(session, f"/command-logs/{command_id}", "response_data") or {}
            acked = self.tally.acked_by.get(command_id, {}).keys()
            if lost := acked - answers.keys():
                self.tally.missing.append(f"command {command_id}: {len(lost)} acks")
            if len(acked) < targets and not self._plan.reconnect_rate:
                self.tally.missing.append(f"command {command_id}: {targets - len(acked)} of {targets} boards never got it")

    async def _ask(self, session: aiohttp.ClientSession, path: str, key: str | None = None) -> Any:
        async with session.get(path) as response:
            answer = await response.json()
            if response.status == 404:
                return None
            if response.status != 200:
                raise LookupError(answer.get("error", response.reason))
            return answer if key is None else answer[key]

    async def _show_progress(self, began_s: float) -> NoReturn:
        """One live line on a terminal, else a line every ten seconds."""
        is_terminal = sys.stderr.isatty()
        try:
            while True:
                tally = self.tally
                line = (
                    f"{time.monotonic() - began_s:5.0f} s  boards up {tally.boards_up}/{self._plan.devices}  "
                    f"messages {tally.messages}  acks {tally.acks}  errors {tally.errors}"
                )
                print(f"\r{line}" if is_terminal else line, end="" if is_terminal else "\n", file=sys.stderr, flush=True)
                await asyncio.sleep(self.LIVE_LINE_INTERVAL_S if is_terminal else 10.0)
        finally:
            if is_terminal:
                print(file=sys.stderr)

    def _print_table(self, worked_s: float, snapshots_found: int) -> None:
        tally = self.tally
        sent = sum(board.snapshots_sent for board in self._boards)
        unconfirmed = sum(len(board.unconfirmed) for board in self._boards)
        rows = [
            ("boards", f"{self._plan.devices} of type {self._plan.device_type}, {worked_s:.1f} s"),
            ("messages sent", f"{tally.messages}, {tally.messages / worked_s:.0f} a second"),
            ("acks sent", str(tally.acks)),
            ("POST /command", _percentiles(tally.post_s)),
            ("all boards acked", _percentiles(tally.all_acked_s)),
            ("reconnects", str(sum(max(0, board.connections - 1) for board in self._boards))),
            ("errors", f"{tally.errors}" + (f" (the last: {tally.last_error})" if tally.errors else "")),
            ("snapshots", f"{sent} sent, {snapshots_found} in the history, {unconfirmed} under way at a power cut"),
            ("missing", "nothing" if not tally.missing else f"{len(tally.missing)} things"),
        ]
        for name, text in rows:
            print(f"{name:<18}{text}")
        for text in tally.missing[:20]:
            print(f"  missing: {text}")


def _percentiles(times_s: list[float]) -> str:
    """Nearest-rank percentiles in milliseconds."""
    if not times_s:
        return "none"
    ordered = sorted(times_s)
    p50, p95, p99 = (ordered[max(0, math.ceil(len(ordered) * share) - 1)] * 1000 for share in (0.5, 0.95, 0.99))
    return f"{len(ordered)} times, p50 {p50:.1f} ms, p95 {p95:.1f} ms, p99 {p99:.1f} ms"


# ======================================================================================================================
# Command line
# ======================================================================================================================


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for. Returns the exit code: 0, 1 for a failure, 2 for a bad setting."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _raise_file_limit()
    try:
        if words[:1] == ["simulate"]:
            return _simulate(words[1:])
        return _serve(words[1:] if words[:1] == ["serve"] else words)
    except ConfigError as error:
        _complain(error)
        return 2
    except StartError as error:
        _complain(error)
        return 1


def _complain(error: Exception) -> None:
    """One line on stderr; under the journal with the priority that shows it as an error."""
    priority = "<3>" if os.environ.get("JOURNAL_STREAM") else ""
    print(f"{priority}amhrpd: {error}", file=sys.stderr)


def _serve(words: Sequence[str]) -> int:
    settings = Settings.load(vars(_serve_parser().parse_args(words)), os.environ)
    configure_logging(settings.log_level, settings.log_format)
    known = {option.variable for option in OPTIONS}
    for name in sorted(os.environ):
        if name.startswith("AMHRPD_") and name not in known:
            log.warning("unknown_setting", variable=name)
    return asyncio.run(_until_signal(functools.partial(serve, settings)))


def _simulate(words: Sequence[str]) -> int:
    values = vars(_simulate_parser().parse_args(words))
    for name in ("api_token", "device_token"):
        values.setdefault(name, os.environ.get(f"AMHRPD_{name.upper()}") or None)
    plan = FleetPlan(**values)
    return asyncio.run(_until_signal(lambda stop: Fleet(plan).play(stop)))


async def _until_signal(run: Callable[[asyncio.Event], Awaitable[int]]) -> int:
    """Run something that ends early, and in order, when SIGTERM or SIGINT sets its event."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return await run(stop)


def _raise_file_limit() -> None:
    """Shells start programs with 1,024 files, which 1,000 boards would just about use up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + 200
    if soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard) if hard >= 0 else wanted, hard))


def _serve_parser() -> argparse.ArgumentParser:
    settings = "; ".join(f"{option.variable} ({option.help})" for option in OPTIONS if option.flag is None)
    parser = argparse.ArgumentParser(
        prog="amhrpd.py",
        description="Gateway for ESP32 boards: WebSocket for the boards, REST for callers, history in SQLite. "
        "'amhrpd.py simulate --help' tells of the fleet of boards to try it with.",
        epilog=f"Every flag has an environment variable, which the flag overrides. Only as variables: {settings}.",
    )
    parser.add_argument("--version", action="version", version=f"amhrpd {VERSION}")
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    for option in OPTIONS:
        if option.flag is not None:
            default = defaults[option.field]
            shown = "sqlite:///./amhrpd.db" if option.field == "database_path" else default
            text = f"{option.help} [{option.variable}" + (f", {shown}]" if default not in (None, frozenset()) else "]")
            parser.add_argument(option.flag, dest=option.field, metavar=option.metavar, help=text.replace("%", "%%"))
    return parser


def _simulate_parser() -> argparse.ArgumentParser:
    plan = FleetPlan()
    parser = argparse.ArgumentParser(
        prog="amhrpd.py simulate",
        description="Play a fleet of boards against a running gateway, then ask it whether all that they sent was kept. "
        "Exit code 1 if anything is missing.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def add(flag: str, field: str, parse: Callable[[str], Any], metavar: str, text: str) -> None:
        parser.add_argument(flag, dest=field, type=_argument(parse), metavar=metavar, help=text, default=getattr(plan, field))

    add("--url", "url", _http_url, "URL", "the gateway")
    add("--devices", "devices", _integer(1, 9999), "N", "how many boards")
    add("--device-type", "device_type", str, "TYPE", "their type")
    add("--heartbeat-interval", "heartbeat_interval_s", _number(0.01, 3600), "S", "seconds between a board's heartbeats")
    add("--status-interval", "status_interval_s", _number(0, 3600), "S", "seconds between a board's snapshots; 0: no pause")
    add("--ack-delay", "ack_delay_s", _number(0, 300), "S", "seconds that a board takes to answer a command")
    add("--failure-rate", "failure_rate", _number(0, 1), "P", "share of commands answered with a failure")
    add("--reconnect-rate", "reconnect_rate", _number(0, 600), "N", "power cuts a board and minute, at random")
    add("--commands", "commands", _integer(0, 1_000_000), "N", "how many commands to send to all boards, one after the other")
    add("--duration", "duration_s", _number(1, 86400), "S", "seconds")
    for kind in ("api", "device"):
        variable = f"AMHRPD_{kind.upper()}_TOKEN"
        text = f"token, better given as the variable {variable}"
        parser.add_argument(f"--{kind}-token", metavar="TOKEN", help=text, default=argparse.SUPPRESS)
    return parser


def _http_url(text: str) -> str:
    if not re.fullmatch(r"https?://[^/\s]+/?", text):
        raise ValueError("it must be http://host:port or https://host:port")
    return text.rstrip("/")


def _argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser of settings as one of argparse's, which shows a text only of its own kind of error."""

    def parse_argument(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None

    return parse_argument


if __name__ == "__main__":
    sys.exit(main())
