#!/usr/bin/env python3
"""AMHR-PD gateway: ESP32 boards over WebSocket, people and programs over REST, history in SQLite; see `amhrpd.py --help`.

On the event loop nothing waits for the disk: dictionaries are the truth while the gateway runs, and the database follows.
The file reads from top to bottom; each room uses only the rooms above it:

    Configuration   Settings, from flags and environment
    Errors          what can be refused
    Messages        what boards and callers send, decoded and validated in one step
    Store           the tables, the file, a thread that writes, some that read, one that syncs
    Devices         the registry: every device known, the connections of those online
    Commands        a command and what became of it
    Events          who listens to what happens
    Gateway         what happens when: the verbs
    Device socket   one board's connection: frame -> message -> verb, error -> reply
    Page            what a browser shows at /
    REST            thin handlers, access rules, one shape for every error
    Broker          many gateways at one MQTT broker, and Home Assistant
    Service         logging, what repeats itself once a minute; systemd; start and stop in order
    Simulator       boards to try the gateway with
    Command line    main()
"""

from __future__ import annotations

import argparse
import asyncio
import asyncio.sslproto
import base64
import contextlib
import dataclasses
import difflib
import enum
import errno
import fcntl
import functools
import gc
import hashlib
import hmac
import itertools
import json
import logging
import math
import operator
import os
import queue
import random
import re
import resource
import shutil
import signal
import socket
import sqlite3
import ssl
import struct
import sys
import threading
import time
import urllib.parse
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, NoReturn, TypeVar, get_args

import aiohttp
import dataset
import msgspec
import prometheus_client
import sqlalchemy as sa
import structlog
import websockets
from aiohttp import WebSocketError, WSCloseCode, WSMsgType, web
from aiohttp.http import RawRequestMessage
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from aiohttp.typedefs import Handler
from aiohttp_sse import sse_response
from prometheus_client import core as prometheus

if TYPE_CHECKING:
    import aiomqtt

VERSION = "1.0.0"

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("amhrpd")

# ======================================================================================================================
# Configuration
# ======================================================================================================================


AnyStruct = TypeVar("AnyStruct", bound=msgspec.Struct)


class ConfigError(Exception):
    """A setting has a value it can't have; the text names the setting, the value and what it may be."""


def number(low: float, high: float, text: str) -> Any:
    """What is said of a number in a setting's type: its range, and its help."""
    return msgspec.Meta(ge=low, le=high, description=text)


def about(text: str) -> Any:
    """What is said of any other setting in its type: its help."""
    return msgspec.Meta(description=text)


def text_like(pattern: str, title: str) -> Any:
    """What is said of a text in its type: what it may be, as a pattern and in words."""
    return msgspec.Meta(pattern=pattern, title=title)


Token = Annotated[str, text_like(r"\A[!-9;-~]{8,512}\Z", "8 to 512 printable ASCII characters without space or colon")]
ORIGINS_PATTERN = r"(?i)\A(\s*([a-z][a-z0-9+.-]*://[^\s/,]*/?\s*)?(,|\Z))*\Z"
Origins = Annotated[str, text_like(ORIGINS_PATTERN, "scheme://host or scheme://host:port, with commas between")]
SQLITE_URL_PATTERN = r"\Asqlite:///(?!:memory:)[^?\x00-\x1f]*[^?/\x00-\x1f]\Z"
SqliteUrl = Annotated[str, text_like(SQLITE_URL_PATTERN, "sqlite:///relative.db or sqlite:////absolute/path.db: a file")]
PORT_PATTERN = "([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
MQTT_URL_PATTERN = rf"\Amqtts?://([^\s/@:?#]+(:[^\s/@?#]*)?@)?([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:{PORT_PATTERN})?/?\Z"
MQTT_URL_TITLE = "mqtt://user:password@host:1883 or mqtts://…:8883, with %-escapes for / @ : ? # in user and password"
MqttUrl = Annotated[str, text_like(MQTT_URL_PATTERN, MQTT_URL_TITLE)]
GatewayId = Annotated[str, text_like(r"\A(?!all\Z)[A-Za-z0-9_-]{1,64}\Z", "1 to 64 of A-Z a-z 0-9 _ -, but not `all`")]
TOPIC_PREFIX_PATTERN = r"\A([A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*)?\Z"
TopicPrefix = Annotated[str, text_like(TOPIC_PREFIX_PATTERN, "a topic of A-Z a-z 0-9 _ - and / between, or empty for none")]
LogFormat = Literal["auto", "console", "journal", "json"]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that can be set, checked. Durations are seconds. Flags, variables and help follow from names and types."""

    host: Annotated[str, about("address to listen on; 0.0.0.0 is every address, IPv6 too")] = "0.0.0.0"
    port: Annotated[int, number(0, 65535, "port to listen on; 0 lets the system choose")] = 8000
    database_url: Annotated[SqliteUrl, about("the database's file")] = "sqlite:///./amhrpd.db"
    ping_interval_s: Annotated[float, number(0.1, 3600, "seconds between pings, which have half of it for an answer")] = 20.0
    heartbeat_timeout_s: Annotated[float, number(0.1, 86400, "seconds of silence that end a board with heartbeats")] = 90.0
    registration_timeout_s: Annotated[float, number(0.1, 3600, "seconds that a connection has to register")] = 10.0
    command_timeout_s: Annotated[float, number(1, 300, "seconds to answer a command that names no timeout")] = 30.0
    commit_interval_s: Annotated[float, number(0, 3600, "seconds between two writes of telemetry, at least")] = 1.0
    sync_interval_s: Annotated[float, number(0, 3600, "seconds a power cut may cost; 0: no answer before it is safe")] = 5.0
    keep_days: Annotated[int, number(0, 36500, "days that history is kept; 0 is for ever")] = 0
    min_free_mb: Annotated[int, number(0, 1000000, "MB of the disk to leave free: the oldest rows make room; 0 is off")] = 512
    max_message_bytes: Annotated[int, number(1024, 1048576, "longest message taken from a board")] = 65536
    api_token: Annotated[Token | None, about("what callers of the REST API must show")] = None
    device_token: Annotated[Token | None, about("what boards must show")] = None
    allowed_origins: Annotated[Origins, about("pages of others that may call the API: http://host:port, …")] = ""
    mqtt_url: Annotated[MqttUrl | None, about("the broker that boards are shown to and take commands from")] = None
    mqtt_ca: Annotated[str | None, about("certificates (PEM) that the broker's is checked against, not the system's")] = None
    gateway_id: Annotated[GatewayId, about("what the broker knows this gateway by; the host's name if left out")] = ""
    mqtt_discovery: Annotated[TopicPrefix, about("where Home Assistant looks for boards")] = "homeassistant"
    tls_cert: Annotated[str | None, about("certificate chain (PEM): serve https and wss")] = None
    tls_key: Annotated[str | None, about("the certificate's private key (PEM)")] = None
    log_level: Annotated[Literal["debug", "info", "warning", "error"], about("least level logged")] = "info"
    log_format: Annotated[LogFormat, about("auto is console on a terminal, journal under systemd, else json")] = "auto"

    def __post_init__(self) -> None:
        if not self.gateway_id:
            name = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())[:64]
            msgspec.structs.force_setattr(self, "gateway_id", name if name not in ("", "all") else "gateway")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("--tls-cert (AMHRPD_TLS_CERT) and --tls-key (AMHRPD_TLS_KEY) go together: set both or neither")

    @property
    def database_path(self) -> Path:
        """The file that `database_url` names."""
        return Path(self.database_url.removeprefix("sqlite:///"))


def flag_of(field: str) -> str | None:
    """The flag of a setting. None for secrets: command lines are seen by everybody on the machine."""
    is_secret = field.endswith("_token") or field == "mqtt_url"
    return None if is_secret else "--" + field.removesuffix("_s").replace("_", "-")


def variable_of(field: str) -> str:
    """The environment variable of a setting."""
    return "DATABASE_URL" if field == "database_url" else "AMHRPD_" + field.removesuffix("_s").upper()


def load_settings(kind: type[AnyStruct], flags: Mapping[str, str | None], environ: Mapping[str, str]) -> AnyStruct:
    """The settings of `environ` and `flags` (field name -> text or None), which win; an empty text counts only for a token, and
    where it means none. Raises ConfigError, also for a variable that nobody knows: a misspelt token would leave the door open.
    """
    known = [variable_of(name) for name in Settings.__struct_fields__]
    for variable in sorted(environ):
        if variable.startswith("AMHRPD_") and variable not in known:
            (meant,) = difflib.get_close_matches(variable, known, n=1, cutoff=0)
            raise ConfigError(f"{variable} is no setting: did you mean {meant}?")
    values: dict[str, Any] = {}
    for field in msgspec.structs.fields(kind):
        flag, variable = flag_of(field.name), variable_of(field.name)
        may_be_empty = field.name.endswith("_token") or field.name == "mqtt_discovery"
        for source, text in ((flag, flags.get(field.name)), (variable, environ.get(variable))):
            if text is None or not (text.strip() or may_be_empty):
                continue
            try:
                values[field.name] = msgspec.convert(from_text(text.strip(), field.type), field.type)
                break
            except msgspec.ValidationError:
                shown = repr(text.strip()[:80]) if flag else "(hidden)"
                raise ConfigError(f"{source} is {shown}: it must be {requirement(field.type)}") from None
    return kind(**values)


@functools.cache
def schema_of(kind: Any) -> Mapping[str, Any]:
    """What JSON Schema says of a type, where it may be null too of the other one."""
    schema = msgspec.json.schema(kind)
    first = schema.get("anyOf", [schema])[0]
    return schema | ({"type": "object"} if "$ref" in first else first)


def requirement(kind: Any) -> str:
    """What a value of a type may be, in words that follow "it must be"."""
    match schema_of(kind):
        case {"title": title}:
            return str(title)
        case {"enum": choices}:
            return f"one of {', '.join(choices)}"
        case {"type": of_type, "minimum": low, "maximum": high}:
            return f"a {'whole number' if of_type == 'integer' else 'number'} from {low} to {high}"
        case schema:
            return {"object": "a JSON object", "number": "a number"}.get(schema.get("type", ""), "a text")


def wrong_value(name: str, value: object, kind: Any) -> str:
    """What is wrong with a value: "wait is 99: it must be a number from 0 to 60"."""
    shown = msgspec.json.encode(value).decode() if isinstance(value, dict | list | bool | None) else repr(value)
    return f"{name} is {shown if len(shown) <= 80 else shown[:80] + '…'}: it must be {requirement(kind)}"


def from_text(given: str, kind: Any) -> Any:
    """What a setting or a query parameter, which are texts, stands for as a value of a type; where nothing, the text."""
    with contextlib.suppress(ValueError, OverflowError):
        match schema_of(kind):
            case {"type": "integer" | "number"} if given.isdecimal():
                return int(given)
            case {"type": "integer" | "number"} if "_" not in given and math.isfinite(value := float(given)):
                return int(value) if value.is_integer() else value
            case {"enum": _}:
                return given.lower()
            case {"type": "array"}:
                return given.split(",")
            case {"format": "date-time"}:  # a `+` that nobody escaped arrives as a space
                return naive_utc(datetime.fromisoformat(re.sub(r"(:.*) (\d\d:?\d\d)$", r"\1+\2", given.upper())))
    return given


def naive_utc(moment: datetime) -> datetime:
    """A moment as the store keeps it; one without a zone is taken as UTC."""
    return moment if moment.tzinfo is None else moment.astimezone(UTC).replace(tzinfo=None)


# ======================================================================================================================
# Errors
# ======================================================================================================================


class Code(enum.Enum):
    """Every `error_code` of the contract (sections 2 and 6), with the HTTP status that it goes with and what it means."""

    INVALID_MESSAGE = 400, "not JSON, not an object, not text"
    UNKNOWN_MESSAGE_TYPE = 400, "a message_type that the contract doesn't have"
    MISSING_REQUIRED_FIELD = 400, "a required field is absent"
    INVALID_FIELD_TYPE = 400, "a field has a value of another JSON type"
    INVALID_FIELD_VALUE = 400, "a field has the right type and a value that can't be"
    UNAUTHORIZED = 401, "no token, a wrong one, or a board that hasn't registered"
    FORBIDDEN = 403, "a web page of another origin"
    NOT_FOUND = 404, "no such route"
    DEVICE_NOT_FOUND = 404, "a device that was never seen"
    COMMAND_NOT_FOUND = 404, "a command that doesn't exist, or was never sent to the device that answers it"
    METHOD_NOT_ALLOWED = 405, "the route exists, with another method"
    DEVICE_ONLINE = 409, "a device that can be deleted only when it is offline"
    REQUEST_TIMEOUT = 408, "a body that doesn't arrive"
    PAYLOAD_TOO_LARGE = 413, "a body over the limit, or a command that no board could take"
    UNSUPPORTED_MEDIA_TYPE = 415, "a body that is compressed"
    RESOURCE_EXHAUSTED = 429, "a limit is reached; later it may work"
    INTERNAL_ERROR = 500, "a defect of the gateway; the log has the traceback"
    STORE_UNAVAILABLE = 503, "the database can't be read or written at the moment"
    STOPPING = 503, "the gateway is going down"


class GatewayError(Exception):
    """What the gateway doesn't do, and why. The text says what and where; it goes to the caller or the board as it is."""

    def __init__(self, code: Code, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.status: int = code.value[0]  # of an answer that says it


class StartError(Exception):
    """The gateway can't start; the text is the one line that says why."""


# ======================================================================================================================
# Messages
# ======================================================================================================================

Json = bytes
"""A JSON value, encoded once where it comes in, kept, stored and put into answers as it is."""

# A reader's recursion must never end at something we took: Python's json stops at about 1,000, jq before 1.7 at 256,
# ArduinoJson at 10. No board in the field nests deeper than 3.
MAX_JSON_DEPTH = 32

# Contract, section 1: the boards' WebSocket library closes with 1009 on anything longer.
MAX_COMMAND_FRAME_BYTES = 15_360

DEVICE_ID_PATTERN = r"\A(?!\.\.?\Z)[A-Za-z0-9._-]{1,64}\Z"  # contract, section 2: no browser can ask for `.` and `..`
DEVICE_ID_TITLE = "1 to 64 of A-Z a-z 0-9 . _ -, and neither . nor .."

EVERY_TYPE = "*"  # contract, section 6: as a target every device online, in a row devices of several types
DeviceType = Annotated[str, msgspec.Meta(min_length=1, max_length=50, title="a text of 1 to 50 characters")]
CommandName = Annotated[str, msgspec.Meta(min_length=1, max_length=255, title="a text of 1 to 255 characters")]
BOARD_TYPE_TITLE = "a text of 1 to 50 characters, but not `*`, which stands for every type"
BoardType = Annotated[str, text_like(r"(?s)\A(?!\*\Z).{1,50}\Z", BOARD_TYPE_TITLE)]
DeviceId = Annotated[str, text_like(DEVICE_ID_PATTERN, DEVICE_ID_TITLE)]
DeviceIds = Annotated[list[DeviceId], msgspec.Meta(min_length=1, max_length=1000, title=f"1 to 1000 ids of {DEVICE_ID_TITLE}")]
MOMENT_TITLE = "an ISO 8601 time such as 2026-01-24T10:30:45Z"
Moment = Annotated[datetime, msgspec.Meta(title=MOMENT_TITLE, extra_json_schema={"format": "date-time"})]


class BoardMessage(msgspec.Struct, tag_field="message_type", gc=False, kw_only=True):
    """What every message of a board may bear. The identity is the path's, the time the gateway's own."""

    device_type: BoardType | None = None


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


AnyBoardMessage = Registration | Heartbeat | Status | CommandAck | ErrorReport | Alert
BOARD_MESSAGES: Mapping[str, type[BoardMessage]] = {str(kind.__struct_config__.tag): kind for kind in get_args(AnyBoardMessage)}


class Deadman(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What a device gets `after` so many seconds, unless it is disarmed before (contract, section 4)."""

    after: Annotated[float, msgspec.Meta(ge=0.2, le=60)]
    command_name: CommandName
    payload: dict[str, Any] | None = None


class CommandRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`POST /command`, whatever form it came in (contract, section 6). `timeout` and `wait` in seconds; None is left out."""

    command_name: CommandName
    device_type: DeviceType | None = None
    device_id: DeviceIds | None = None  # `decode_command` takes one as a text, too
    payload: dict[str, Any] | None = None
    deadman: Deadman | None = None
    timeout: Annotated[float, msgspec.Meta(ge=1, le=300)] | None = None
    wait: Annotated[float, msgspec.Meta(ge=0, le=60)] | None = None


json_decoder = msgspec.json.Decoder()
board_decoder = msgspec.json.Decoder(AnyBoardMessage)
to_json: Callable[[object], Json] = msgspec.json.Encoder().encode
raw = msgspec.Raw  # JSON, to be put as it is into something that is encoded later


def decode_board_message(data: bytes) -> AnyBoardMessage:
    """Decode and validate one text frame of a board. Raises GatewayError."""
    try:  # what nearly all of them come to, in a third of the time
        plain: AnyBoardMessage = board_decoder.decode(data)
        data.decode()  # the decoder doesn't look into keys that it skips
        if not isinstance(plain, Registration) and data.count(b"{") + data.count(b"[") <= MAX_JSON_DEPTH:
            return plain
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass  # what is wrong is said below
    values = decode_json(without_padding(data))
    match values:
        case {"message_type": str(tag)} if tag in BOARD_MESSAGES:
            message: AnyBoardMessage = convert_fields(values, BOARD_MESSAGES[tag])  # type: ignore[assignment]
        case {"message_type": str(tag)}:
            known = ", ".join(BOARD_MESSAGES)
            raise GatewayError(Code.UNKNOWN_MESSAGE_TYPE, f"unknown message_type {tag[:64]!r}: it must be one of {known}")
        case {"message_type": tag}:
            raise GatewayError(Code.INVALID_FIELD_TYPE, wrong_value("message_type", tag, str))
        case {}:
            raise GatewayError(Code.MISSING_REQUIRED_FIELD, "missing required field `message_type`")
        case _:
            raise GatewayError(Code.INVALID_MESSAGE, "not a JSON object")
    if isinstance(message, Registration):
        known_keys = ("message_type", "device_type", "device_id", "timestamp", "metadata")
        if extras := {key: value for key, value in values.items() if key not in known_keys}:
            message.metadata = extras | (message.metadata or {})
    return message


def decode_command(query: Mapping[str, Any], body: bytes) -> CommandRequest:
    """One request of what the query and the body of `POST /command` say, in both forms (section 6). Raises GatewayError."""
    fields = dict(query)
    if isinstance(payload := query.get("payload"), str):
        fields["payload"] = decode_json(payload.encode(), "payload in the query")
    if body := without_padding(body):
        content = decode_json(body, "the body")
        if "command_name" in query and ("device_type" in query or "device_id" in query):
            content = {"payload": content}
        if not isinstance(content, dict):
            raise GatewayError(Code.INVALID_MESSAGE, "the body must be a JSON object")
        if twice := sorted(name for name in fields.keys() & content.keys() if content[name] is not None):
            raise GatewayError(Code.INVALID_FIELD_VALUE, f"{', '.join(twice)}: given in the query and in the body")
        fields = content | fields
    if isinstance(fields.get("device_id"), str):
        fields["device_id"] = fields["device_id"].split(",")
    request = convert_fields(fields, CommandRequest)
    if request.device_type is None and request.device_id is None:
        raise GatewayError(Code.MISSING_REQUIRED_FIELD, "missing required field `device_type` (or `device_id`)")
    return request


def without_padding(data: bytes) -> bytes:
    """Text without a byte order mark in front, and without blanks and NUL bytes behind: Arduino sketches send whole buffers."""
    return data.removeprefix(b"\xef\xbb\xbf").rstrip(b"\0 \t\r\n")


NO_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|[^]["{}]+', re.DOTALL)


def depth_of(data: bytes) -> int:
    """How deep JSON is nested; of what isn't that deep in any case, how many brackets it has, which is quicker."""
    count = data.count(b"{") + data.count(b"[")
    if count <= MAX_JSON_DEPTH:
        return count
    return max(itertools.accumulate(1 if byte in b"{[" else -1 for byte in NO_BRACKETS.sub(b"", data)))


def decode_json(data: bytes, name: str = "the message") -> Any:
    """Decode JSON strictly: UTF-8, no NaN, no lone surrogates, no deep nesting. Raises GatewayError, saying of `name` what."""
    code, problem = Code.INVALID_MESSAGE, f"is nested deeper than {MAX_JSON_DEPTH} levels"
    try:
        data.decode()
        if depth_of(data) <= MAX_JSON_DEPTH:
            return json_decoder.decode(data)
    except UnicodeDecodeError as error:
        problem = f"is not valid UTF-8: byte 0x{data[error.start]:02x}"
    except msgspec.ValidationError:  # there is no other where any type is right
        code, problem = Code.INVALID_FIELD_VALUE, "has a number that is out of range"
    except msgspec.DecodeError:
        problem = f'is not valid JSON, such as {{"count": 5}}: {data[:40].decode(errors="replace")!r}'
    raise GatewayError(code, f"{name} {problem}")


@functools.cache
def fields_of(kind: type[msgspec.Struct]) -> Mapping[str, msgspec.structs.FieldInfo]:
    """A struct's fields, by name."""
    return {field.name: field for field in msgspec.structs.fields(kind)}


JSON_TYPES: Mapping[str | None, Any] = {"integer": int | float, "number": int | float, "array": list, "object": dict}


def convert_fields(values: Mapping[str, Any], kind: type[AnyStruct], within: str = "") -> AnyStruct:
    """A struct of values that are decoded already. Raises GatewayError, which names a field with what it is `within`."""
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError:
        known = fields_of(kind)
    if kind.__struct_config__.forbid_unknown_fields and (unknown := values.keys() - known.keys()):
        name = within + min(unknown)[:64]
        raise GatewayError(Code.INVALID_FIELD_VALUE, f"unknown {name!r}; known here: {', '.join(known) or 'nothing'}")
    for name, field in known.items():
        value = values.get(name, field.default)
        if value is msgspec.NODEFAULT:
            raise GatewayError(Code.MISSING_REQUIRED_FIELD, f"missing required field `{within}{name}`")
        try:
            msgspec.convert(value, field.type)
        except msgspec.ValidationError:
            if Deadman in get_args(field.type) and isinstance(value, dict):
                convert_fields(value, Deadman, f"{name}.")
            json_type = JSON_TYPES.get(schema_of(field.type).get("type"), str)
            is_of_type = isinstance(value, json_type) and not isinstance(value, bool)
            code = Code.INVALID_FIELD_VALUE if is_of_type else Code.INVALID_FIELD_TYPE
            raise GatewayError(code, wrong_value(within + name, value, field.type)) from None
    raise AssertionError(f"each field is right, and {kind.__name__} is not")


EPOCH = datetime.fromisoformat("1970-01-01")


def utc_now() -> datetime:
    """The gateway's wall clock: naive, UTC, as the store keeps it. For records only; durations use the monotonic clock."""
    return EPOCH + timedelta(0, time.time())  # in a quarter of the time that `datetime.now(UTC).replace(tzinfo=None)` takes


def format_time(moment: datetime | None) -> str | None:
    """`2026-01-24T10:30:45.123456`, always six digits; None stays None."""
    return None if moment is None else moment.isoformat(timespec="microseconds")


# ======================================================================================================================
# Store
# ======================================================================================================================

Row = dict[str, Any]
"""A table's row by column, as it is read."""
Values = tuple[Any, ...]
"""A table's row in the order of COLUMNS, without `id`, as it is written: times and JSON as `stored_time` and Json make them."""
RowNow = Callable[[], Values]
"""What makes a row as it is when its turn to be written comes."""
TableName = Literal["devices", "device_state_snapshots", "command_logs", "device_connection_logs", "amhrpd_deadmen"]

# The tables of the databases in the field, and one of our own (contract, section 7). SQLite keeps DATETIME and JSON as text.
TABLES: Mapping[TableName, str] = {
    "devices": """device_id VARCHAR(255) NOT NULL PRIMARY KEY, device_type VARCHAR(50) NOT NULL, is_online BOOLEAN NOT NULL,
        last_heartbeat DATETIME, connected_at DATETIME NOT NULL, disconnected_at DATETIME, metadata_json JSON NOT NULL""",
    "device_state_snapshots": """id INTEGER NOT NULL PRIMARY KEY,
        device_id VARCHAR(255) NOT NULL REFERENCES devices (device_id), device_type VARCHAR(50) NOT NULL,
        state_data JSON NOT NULL, timestamp DATETIME NOT NULL""",
    "command_logs": """command_id VARCHAR(255) NOT NULL PRIMARY KEY, device_type VARCHAR(50) NOT NULL,
        command_name VARCHAR(255) NOT NULL, payload JSON NOT NULL, status VARCHAR(50) NOT NULL, created_at DATETIME NOT NULL,
        executed_at DATETIME, completed_at DATETIME, response_data JSON, target_device_count INTEGER NOT NULL,
        success_count INTEGER NOT NULL""",
    "device_connection_logs": """id INTEGER NOT NULL PRIMARY KEY,
        device_id VARCHAR(255) NOT NULL REFERENCES devices (device_id), device_type VARCHAR(50) NOT NULL,
        event VARCHAR(50) NOT NULL, timestamp DATETIME NOT NULL, details JSON""",
    "amhrpd_deadmen": """device_id VARCHAR(255) NOT NULL PRIMARY KEY, command_name VARCHAR(255) NOT NULL,
        payload JSON NOT NULL""",
}
COLUMNS = {table: {part.split()[0]: part.split()[1] for part in text.split(",")} for table, text in TABLES.items()}
"""Table -> column -> type."""


# A table that grows -> the column with a row's time, and the condition that it may go. What stands first makes room first.
HISTORIES: Mapping[TableName, tuple[str, str]] = {
    "device_state_snapshots": ("timestamp", "true"),
    "device_connection_logs": ("timestamp", "true"),
    "command_logs": ("created_at", "status NOT IN ('created', 'sent')"),
}
# Which index a question goes by: that of its table whose columns are those that it filters by. Behind them each has the time
# and, as all of SQLite's, the rowid, so no answer has to be sorted. A question names its index, since planners differ: SQLite
# 3.53 takes (device_type, time) for both filters, which is 309 ms on a million rows.
INDEXES: Mapping[str, tuple[TableName, tuple[str, ...]]] = {
    "ix_amhrpd_snapshots_device_time": ("device_state_snapshots", ("device_id",)),
    "ix_amhrpd_events_device_time": ("device_connection_logs", ("device_id",)),
    "ix_amhrpd_events_device_event_time": ("device_connection_logs", ("device_id", "event")),
    "ix_amhrpd_commands_time": ("command_logs", ()),
    "ix_amhrpd_commands_status_time": ("command_logs", ("status",)),
    "ix_amhrpd_commands_type_time": ("command_logs", ("device_type",)),
    "ix_amhrpd_commands_type_status_time": ("command_logs", ("device_type", "status")),
}
INDEX_OF = {(table, frozenset(filters)): name for name, (table, filters) in INDEXES.items()}
SCHEMA_VERSION = 1  # PRAGMA user_version; the earlier backend's files have 0

# What `command_logs.status` holds (contract, section 4; `pending`, before there is a row, has no value here) ...
CREATED = "created"
SENT = "sent"
ACK_SUCCESS = "ack_success"
ACK_ERROR = "ack_error"
ACK_TIMEOUT = "ack_timeout"
NO_DEVICES = "no_devices"
OPEN_STATUSES = (CREATED, SENT)
# ... and `device_connection_logs.event` (contract, section 5).
CONNECTED = "connected"
DISCONNECTED = "disconnected"
TIMEOUT = "timeout"


Loaded = Mapping[TableName, list[Row]]
"""What memory takes up of a file, as `for_memory` gives it: the devices that were seen last, the latest first, with `state` and
`state_timestamp`; commands that may still be answered, oldest first; the deadmen that the last run left armed."""


# -- what is written ---------------------------------------------------------------------------------------------------


def insertion(table: TableName) -> str:
    """The statement that puts a row into a table, in place of the one with its key. (dataset's own take twice as long.)"""
    columns = {column: kind for column, kind in COLUMNS[table].items() if column != "id"}
    marks = ["CAST(? AS TEXT)" if kind == "JSON" else "?" for kind in columns.values()]
    insert = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join(marks)})"
    if "id" in COLUMNS[table]:
        return insert
    values = {column: f"excluded.{column}" for column in columns}
    if table == "devices":  # a registration that says nothing of it leaves what is known (contract, section 2)
        values["metadata_json"] = "CASE excluded.metadata_json WHEN '{}' THEN metadata_json ELSE excluded.metadata_json END"
    changes = ", ".join(f"{column} = {value}" for column, value in values.items())
    return f"{insert} ON CONFLICT DO UPDATE SET {changes}"


INSERTIONS = {table: insertion(table) for table in TABLES}
DISARM = "DELETE FROM amhrpd_deadmen WHERE device_id = ?"


class Batch(NamedTuple):
    """What one transaction writes, and who waits for it."""

    rows: dict[str, list[Values]]  # by statement; devices first, since others refer to them
    waiting: list[asyncio.Future[None]]
    size_bytes: int


class Backlog:
    """What waits to be written, and who waits for that. Belongs to the event loop; nothing here waits. Devices, commands and
    deadmen all go with the next batch, as they are then; telemetry, which is appended, bit by bit.
    """

    LIMIT_BYTES = 48 << 20  # out of the unit's 320 MB; telemetry gets two thirds: some 80,000 snapshots of a real board
    CONGESTED_BYTES = 8 << 20  # above this no commit interval is waited for
    OVERHEAD_BYTES = 300  # of a row: its tuple, its time and small texts
    SOON_S = 0.003  # what happens to commands and connections within it is one transaction
    BATCH_BYTES = 1 << 18  # of telemetry; some 3 ms of writing, so a command's row never waits long behind it

    def __init__(self, commit_interval_s: float) -> None:
        """Telemetry that nobody asks for is written once in `commit_interval_s`."""
        self._commit_interval_s = commit_interval_s
        self._latest: dict[tuple[TableName, str], tuple[str, RowNow, int]] = {}  # statement, row, bytes
        self._telemetry: deque[tuple[str, Values, int]] = deque()
        self._telemetry_taken = 0
        self._waiting: dict[int, asyncio.Future[None]] = {}  # by how much telemetry is taken before it
        self._size_bytes = 0  # of all that waits or is in flight
        self._in_flight = 0  # rows that were taken and are not settled
        self.rows_dropped = 0
        self.is_due = asyncio.Event()  # what waits is to be written now
        self._telemetry_due_s = 0.0  # monotonic, as the loop's timers are: not before this
        self._due_s = math.inf  # when `is_due` will be set, or was
        self._alarm: asyncio.TimerHandle | None = None

    @property
    def rows_waiting(self) -> int:
        """How many rows are not in the file yet."""
        return len(self._latest) + len(self._telemetry) + self._in_flight

    @property
    def is_congested(self) -> bool:
        """Whether much waits."""
        return self._size_bytes > self.CONGESTED_BYTES

    def call_writer(self, due_s: float = 0.0) -> None:
        """Have the writer come at this monotonic time; 0 is at once."""
        if due_s < self._due_s:
            if self._alarm is not None:
                self._alarm.cancel()
            self._due_s, self._alarm = due_s, asyncio.get_running_loop().call_at(due_s, self.is_due.set)
            if due_s == 0:
                self.is_due.set()

    def put(self, table: TableName, key: str, row: RowNow | None, size_bytes: int = 300, *, urgent: bool = True) -> bool:
        """Write a row in place of the one of its key that waits; None takes a deadman's away. What isn't `urgent` waits for the
        commit interval. False where too much waits: a new row is dropped, but for a deadman's.
        """
        *_, before_bytes = self._latest.get((table, key), (0,))
        if before_bytes == 0 and self._size_bytes > self.LIMIT_BYTES and table != "amhrpd_deadmen":
            self.rows_dropped += 1
            return False
        self._latest[table, key] = (INSERTIONS[table], row, size_bytes) if row else (DISARM, lambda: (key,), size_bytes)
        self._size_bytes += size_bytes - before_bytes
        self.call_writer(time.monotonic() + self.SOON_S if urgent else self._telemetry_due_s)
        return True

    def put_telemetry(self, table: TableName, row: Values, json: Json) -> None:
        """Append a row, whose only long value is this JSON. Where too much waits, it is dropped."""
        if self._size_bytes > self.LIMIT_BYTES * 2 // 3:
            self.rows_dropped += 1
            log.warning("rows_dropped", problem="too many wait for the disk")
            return
        size_bytes = self.OVERHEAD_BYTES + len(json)
        self._telemetry.append((INSERTIONS[table], row, size_bytes))
        self._size_bytes += size_bytes
        is_event = table == "device_connection_logs"
        soon_s = time.monotonic() + self.SOON_S if is_event else self._telemetry_due_s
        self.call_writer(0.0 if self.is_congested else soon_s)

    def join(self, *, behind_telemetry: bool) -> asyncio.Future[None]:
        """A future that is done when all that was put before is written: with the telemetry, or without."""
        self.call_writer()
        before = self._telemetry_taken + len(self._telemetry) if behind_telemetry else 0
        if before not in self._waiting:
            self._waiting[before] = asyncio.get_running_loop().create_future()
        return self._waiting[before]

    def take(self) -> Batch:
        """Everything for the next batch, of the telemetry as much as it may have."""
        rows: dict[str, list[Values]] = {statement: [] for statement in (*INSERTIONS.values(), DISARM)}
        size_bytes = telemetry_bytes = 0
        for statement, row, row_bytes in self._latest.values():
            rows[statement].append(row())
            size_bytes += row_bytes
        self._latest.clear()
        while self._telemetry and telemetry_bytes < self.BATCH_BYTES:
            statement, values, row_bytes = self._telemetry.popleft()
            rows[statement].append(values)
            telemetry_bytes += row_bytes
            self._telemetry_taken += 1
        waiting = [self._waiting.pop(before) for before in list(self._waiting) if before <= self._telemetry_taken]
        self._in_flight = sum(map(len, rows.values()))
        if not self._telemetry:  # else what is left goes on at once
            self.is_due.clear()
            self._due_s = math.inf
            if self._alarm is not None:
                self._alarm.cancel()
        self._telemetry_due_s = time.monotonic() + self._commit_interval_s
        return Batch(rows, waiting, size_bytes + telemetry_bytes)

    def settle(self, batch: Batch) -> None:
        """What was taken is written."""
        self._in_flight = 0
        self._size_bytes -= batch.size_bytes
        for waiting in batch.waiting:
            if not waiting.done():
                waiting.set_result(None)


# -- reading a file as well as it goes ---------------------------------------------------------------------------------


def stored_time(moment: datetime | None) -> str | None:
    """A naive UTC time as the file has it: `2026-01-24 10:30:45.123456`."""
    return None if moment is None else moment.isoformat(" ", "microseconds")


def read_time(stored: object) -> datetime | None:
    """The time that a file has, naive UTC. A file in the field may hold anything: what is no time reads as none."""
    try:
        return naive_utc(datetime.fromisoformat(stored))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None


def read_json(stored: object) -> Json | None:
    """Stored JSON as every reader takes it, whatever an earlier writer left there (NaN, lone surrogates, no JSON)."""
    if stored is None:
        return None
    text = stored.decode("utf-8", "replace") if isinstance(stored, bytes) else str(stored)
    with contextlib.suppress(msgspec.DecodeError, UnicodeError, RecursionError):
        return to_json(json_decoder.decode(text))
    try:
        value = json.loads(text, parse_constant=lambda name: None)
        return to_json(value)  # a number that is out of range is null, too
    except UnicodeError:
        return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    except (ValueError, RecursionError):
        return json.dumps(text).encode()  # shown as the text that it is


def for_memory(table: TableName, row: Row) -> Row:
    """A row as memory takes it up: the contract's columns, times as times, JSON as Json, and nothing missing that is needed."""
    read = {"DATETIME": read_time, "JSON": read_json}
    found: Row = {name: read.get(kind, lambda value: value)(row[name]) for name, kind in COLUMNS[table].items()}
    if table == "devices":
        found["device_type"] = found["device_type"] or ""
        found["connected_at"] = found["connected_at"] or found["last_heartbeat"] or utc_now()
        found["metadata_json"] = b"{}" if found["metadata_json"] in (None, b"null") else found["metadata_json"]
    elif table == "command_logs":
        found["payload"], found["target_device_count"] = found["payload"] or b"null", found["target_device_count"] or 0
        found["created_at"] = found["created_at"] or utc_now()
    return found


def for_answer(table: TableName, row: Row) -> Row:
    """A row as answers show it: the contract's columns, times as text, JSON as it is."""
    shown: Row = {name: row[name] for name in COLUMNS[table]}
    for name, kind in COLUMNS[table].items():
        if kind == "DATETIME":
            shown[name] = format_time(read_time(row[name]))
        elif kind == "JSON" and row[name] is not None:
            shown[name] = raw(read_json(row[name]) or b"")
    return shown


# -- what goes wrong with a file ---------------------------------------------------------------------------------------

Durations = functools.partial(  # of what /metrics shows
    prometheus_client.Histogram,
    registry=None,
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
STORE_ERRORS = (sa.exc.SQLAlchemyError, sqlite3.Error, OSError)  # which a TimeoutError is, too
LOCK_TIMEOUT_S = 1.0  # for another program's lock; then the batch is tried again, and a stop gets through


class FileLostError(OSError):
    """The file was moved, replaced, deleted or found damaged while it was in use. The gateway ends in order."""


class Fault(enum.Enum):
    """What an error of the store comes from."""

    ROW = "the database refused what it was given: trying the same again is in vain"
    DAMAGE = "SQLite says that the file is damaged; it says so of a single read error, too"
    PASSING = "a disk that is full, read-only or fails, another program's lock: it may be over later"
    OTHER = "anything else"


PASSING_CODES = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
PASSING_CODES |= {sqlite3.SQLITE_INTERRUPT}  # a stop, while an index is made
PASSING_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def fault_of(error: BaseException) -> Fault:
    """What an error of the store comes from."""
    if isinstance(error, OSError):
        return Fault.PASSING if error.errno in PASSING_NUMBERS else Fault.OTHER
    origin = getattr(error, "orig", error)
    code = getattr(origin, "sqlite_errorcode", 0) & 0xFF  # the primary one
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return Fault.DAMAGE
    if code in PASSING_CODES:
        return Fault.PASSING
    is_refused = isinstance(origin, sqlite3.Error) and not isinstance(origin, sqlite3.OperationalError)
    return Fault.ROW if is_refused else Fault.OTHER


def cause_of(error: BaseException) -> str:
    """The database's own words in one line, without the statement and its parameters."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    origin = getattr(error, "orig", None) or error
    name = getattr(origin, "sqlite_errorname", None)
    text = origin.strerror if isinstance(origin, OSError) and origin.strerror else str(origin).partition("\n")[0]
    return f"{text or type(origin).__name__}{f' ({name})' if name else ''}"


class DatabaseFile:
    """The database as a file: whose it is, whether it is whole, where it went. Blocks on the disk. It is looked at by `sqlite3`
    alone, while no other connection of this process has it open.
    """

    MAGIC = b"SQLite format 3\x00"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notice: str | None = None  # for people: what happened to the file
        self._lock_fd: int | None = None

    def beside(self, suffix: str) -> Path:
        """The path of a file beside this one: SQLite's `-wal` and `-shm`, our `-spare`."""
        path = self.path.resolve()  # not beside a link that names the file
        return path.with_name(path.name + suffix)

    def lock(self) -> None:
        """Have the file, created where there was none, for this process alone. Raises StartError where it can't be, OSError."""
        self._lock_fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            if not self.path.is_file():
                raise StartError(f"the database {self.path} is no regular file")
            # flock and SQLite's own locks don't see each other on Linux; the lock goes with the process.
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError(f"the database {self.path} is in use by another gateway") from None

    def unlock(self) -> None:
        """Let others have it. POSIX takes SQLite's locks away with any descriptor that closes: first close all connections."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def check_place(self) -> None:
        """Raise FileLostError where the file that is locked, if any, is not the one that its path names."""
        with contextlib.suppress(FileNotFoundError):
            if self._lock_fd is None or os.path.samestat(self.path.stat(), os.fstat(self._lock_fd)):
                return
        raise FileLostError(f"{self.path} was deleted, moved or replaced while it was in use")

    def move_log_along(self) -> None:
        """Put the write-ahead log of a file that was moved beside it again, where it is now: the log has no name of its file
        in it, and SQLite would replay it over what lies at the path now. For the time before the connections close.
        """
        assert self._lock_fd is not None
        moved_to = Path(f"/proc/self/fd/{self._lock_fd}").readlink()
        is_there = moved_to.exists() and os.path.samestat(moved_to.stat(), os.fstat(self._lock_fd))
        log_path = self.beside("-wal")
        if log_path.exists() and any(fd.exists() and fd.samefile(log_path) for fd in Path("/proc/self/fd").iterdir()):
            if is_there:
                log_path.rename(moved_to.with_name(moved_to.name + "-wal"))
            else:
                log_path.unlink()
            self.beside("-shm").unlink(missing_ok=True)
        log.error("database_left", path=str(self.path), moved_to=str(moved_to) if is_there else None)

    def check_kind(self) -> None:
        """Raise StartError where the file, or a table in it, is none of ours; sqlite3.Error, OSError."""
        with self.path.open("rb") as file:
            start = file.read(len(self.MAGIC))
        if start and start != self.MAGIC:
            raise StartError(f"{self.path} is no SQLite database; name another file or move this one away")
        with contextlib.closing(sqlite3.connect(self.path, timeout=LOCK_TIMEOUT_S)) as connection:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version > SCHEMA_VERSION:
                raise StartError(f"{self.path} was written by a newer version ({version}, this one knows {SCHEMA_VERSION})")
            names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            problem = None if names & COLUMNS.keys() or not names else f"it has the tables {', '.join(sorted(names))}"
            for table in names & COLUMNS.keys():
                columns = {name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})")}
                if missing := COLUMNS[table].keys() - columns:
                    problem = f"{table} has no column {', '.join(sorted(missing))}"
        if problem:
            raise StartError(f"{self.path} is no database of this gateway: {problem}")

    def find_damage(self) -> str | None:
        """The second look at a file of which SQLite said that it is damaged, as it says of a single read error, too: what is
        broken in it, or None. Raises OSError where it can't be read from end to end.
        """
        for path in (self.path, self.beside("-wal")):
            if path.exists():
                with path.open("rb", buffering=0) as file:
                    while file.read(1 << 20):
                        pass
        try:
            with contextlib.closing(sqlite3.connect(self.path, timeout=LOCK_TIMEOUT_S)) as connection:
                found = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
        except sqlite3.DatabaseError as error:
            found = str(error)
        return None if found == "ok" else found

    def move_aside(self, damage: str) -> None:
        """Move a damaged file out of the way of a fresh one. Raises OSError."""
        aside = self.beside(f".corrupt-{utc_now():%Y%m%dT%H%M%S.%f}Z")
        for suffix in ("-wal", "-shm", ""):  # the file last: as long as it is there, the whole is
            with contextlib.suppress(FileNotFoundError):
                self.beside(suffix).rename(aside.with_name(aside.name + suffix))
        self.unlock()
        self.notice = f"the database was corrupt ({damage}); it was moved to {aside} and a fresh one begun"
        log.error("database_corrupt", damage=damage, moved_to=str(aside))


class DiskSpace:
    """What is free beside the file. Where too little is, the oldest rows make room (contract, section 7). Blocks on the disk.
    On a file system of less than twice `min_free_bytes`, half of it is what is kept free.
    """

    SMALL_FILE_BYTES = 1 << 20  # never has to make room, so that something is kept on a card that others filled
    NOTICE_S = 3600.0
    ROWS_AT_ONCE = 50

    def __init__(self, file: DatabaseFile, min_free_bytes: int) -> None:
        self._folder, self._spare = file.path.parent, file.beside("-spare")
        self._min_free_bytes = min_free_bytes
        self._made_s = -math.inf  # monotonic time of the latest
        self._text = f"the disk has too little room (--min-free-mb {min_free_bytes >> 20}): the oldest rows are deleted"

    def is_short(self, wanted_bytes: int = 0) -> bool:
        """Whether the file system has too little free, or would have with so much more. Raises OSError."""
        usage = shutil.disk_usage(self._folder)
        return usage.free - wanted_bytes < min(self._min_free_bytes, usage.total // 2)

    def keep_spare(self, size_bytes: int) -> None:
        """Hold a spare file, for when others fill the disk at once. Raises OSError."""
        if self._min_free_bytes and not self._spare.exists() and not self.is_short(size_bytes):
            with self._spare.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size_bytes)

    def give_spare(self) -> None:
        """The disk may be full, or the gateway ends: let others have the spare file's room."""
        with contextlib.suppress(OSError):
            self._spare.unlink(missing_ok=True)

    def make(self, transaction: Callable[[], contextlib.AbstractContextManager[sqlite3.Connection]], needed_bytes: int) -> None:
        """Delete the oldest rows until so much fits into the file's free pages. Raises STORE_ERRORS."""
        for table, (_, may_go) in HISTORIES.items():
            oldest = f"SELECT rowid FROM {table} WHERE {may_go} ORDER BY rowid LIMIT {self.ROWS_AT_ONCE}"
            count = 1
            while count:
                with transaction() as connection:
                    found = connection.execute("SELECT * FROM pragma_page_size, pragma_page_count, pragma_freelist_count")
                    page_bytes, pages, free_pages = found.fetchone()
                    if pages * page_bytes < self.SMALL_FILE_BYTES or free_pages * page_bytes > needed_bytes + (128 << 10):
                        return
                    count = connection.execute(f"DELETE FROM {table} WHERE rowid IN ({oldest})").rowcount
                if count and self.notice is None:
                    log.warning("oldest_rows_deleted", reason=self._text)
                    self._made_s = time.monotonic()

    @property
    def notice(self) -> str | None:
        """What people should know about it."""
        return self._text if time.monotonic() < self._made_s + self.NOTICE_S else None


# -- what the last run left --------------------------------------------------------------------------------------------

RESTORED_DEVICES = 10_000  # as many as are kept in memory
RESTORED_COMMANDS = 1000  # of those that lack answers and are not open any more
RESTORED_BYTES = 8 << 20  # of the devices and as much of the commands, so that a start takes no more than a run


def end_last_run(tables: Any, began: datetime) -> None:
    """Whatever the file says is online is not: its device row and its connection history say so, as of when this run began."""
    ends = """INSERT INTO device_connection_logs (device_id, device_type, event, timestamp, details)
        SELECT device_id, ifnull(device_type, ''), 'disconnected', :now, :details FROM devices WHERE is_online"""
    tables.query(ends, now=stored_time(began), details='{"reason":"the gateway ended without saying goodbye"}')
    tables.query("UPDATE devices SET is_online = 0, disconnected_at = :now WHERE is_online", now=stored_time(began))


def load_devices(tables: Any) -> Iterator[Row]:
    """Those that were seen last, with their latest states: RESTORED_DEVICES, or as many as RESTORED_BYTES hold."""
    index = INDEX_OF["device_state_snapshots", frozenset({"device_id"})]
    newest = f"""SELECT rowid FROM device_state_snapshots INDEXED BY {index} WHERE device_id = d.device_id
        ORDER BY timestamp DESC, rowid DESC LIMIT 1"""  # one step into the index, however long the history is
    question = f"""SELECT d.*, h.state_data AS state, h.timestamp AS state_timestamp
        FROM (SELECT * FROM devices ORDER BY last_heartbeat DESC LIMIT {RESTORED_DEVICES}) d
        LEFT JOIN device_state_snapshots h ON h.rowid = ({newest})"""
    budget_bytes = RESTORED_BYTES
    for row in tables.query(question, _step=20):
        state = read_json(row["state"])
        device = for_memory("devices", row) | {"state": state, "state_timestamp": read_time(row["state_timestamp"])}
        budget_bytes -= len(device["metadata_json"]) + len(state or b"")
        if budget_bytes < 0:
            return
        yield device


def load_commands(tables: Any) -> Iterator[Row]:
    """The open commands and the latest that lack an answer, as many as RESTORED_BYTES hold; those over that end."""
    budget_bytes = RESTORED_BYTES
    for status, limit in {CREATED: -1, SENT: -1, ACK_TIMEOUT: RESTORED_COMMANDS, ACK_ERROR: RESTORED_COMMANDS}.items():
        for row in list(newest_rows(tables, "command_logs", limit, status=status)):
            command = for_memory("command_logs", row)
            budget_bytes -= 1500 + len(command["payload"]) + len(command["response_data"] or b"")
            if budget_bytes > 0:
                yield command
            elif status in OPEN_STATUSES:
                tables["command_logs"].update({"command_id": row["command_id"], "status": ACK_TIMEOUT}, ["command_id"])


# -- the database ------------------------------------------------------------------------------------------------------


def newest_rows(tables: Any, table: TableName, limit: int, offset: int = 0, **wanted: Any) -> Iterator[Row]:
    """Rows of a history, newest first and then by rowid, without the first `offset`. `wanted`: columns with their values, times
    `since` and `until` as stored, `before`: the key of a row that they come behind; None is any. Raises LookupError without it.
    """
    time, _ = HISTORIES[table]
    values = {name: value for name, value in wanted.items() if value is not None}
    index = INDEX_OF[table, frozenset(values.keys() & COLUMNS[table].keys())]
    conditions = {"since": f"{time} >= :since", "until": f"{time} <= :until", "before": f"({time}, rowid) < (:moment, :number)"}
    where = " AND ".join(["true", *(conditions.get(name, f"{name} = :{name}") for name in values)])
    if (before := values.pop("before", None)) is not None:
        key = next(iter(COLUMNS[table]))
        found = list(tables.query(f"SELECT {time} AS moment, rowid AS number FROM {table} WHERE {key} = :key", key=before))
        if not found:
            raise LookupError(before)
        values |= found[0]
    order = f"ORDER BY {time} DESC, rowid DESC LIMIT :limit OFFSET :offset"
    question = f"SELECT * FROM {table} INDEXED BY {index} WHERE {where} {order}"
    yield from tables.query(question, _step=20, limit=limit, offset=offset, **values)


def old_rows(tables: Any, table: TableName, before: str, count: int) -> Iterator[Row]:
    """The rowids (`number`) of rows from before a stored time that may go, about `count`: the oldest of each device, so that
    together they lie side by side in the file.
    """
    time, may_go = HISTORIES[table]
    owners: list[Row] = [{}] if table == "command_logs" else list(tables.query("SELECT device_id FROM devices"))
    limit = max(20, count // max(1, len(owners)))
    for owner in owners:
        of_owner = "device_id = :device_id AND" if owner else ""
        old = f"{of_owner} {time} < :before AND {may_go} ORDER BY {time} LIMIT {limit}"
        index = INDEX_OF[table, frozenset(owner)]
        yield from tables.query(f"SELECT rowid AS number FROM {table} INDEXED BY {index} WHERE {old}", before=before, **owner)


class Database:
    """The tables, through `dataset`. Blocks on the disk. `read` belongs to the readers' threads, `sync` to the card's, all else
    to the writer's. A write that failed may leave a lock behind: its connection is closed, and the next write has a new one.
    """

    PROGRESS_STEPS = 10_000_000  # of SQLite's between two news of an index that is being made: some seconds
    MAX_ANSWER_BYTES = 1 << 20  # of rows: a question with more ends early, after the row that is over
    # How long the write-ahead log gets before it is written into the file, a 32nd of the file system at the most: long, so
    # that a page that changes often is written there once. With SQLite's 4 MB one command in 200 took some ms longer.
    LOG_LIMIT_BYTES = 8 << 20

    def __init__(self, path: Path, min_free_bytes: int, *, is_each_commit_synced: bool) -> None:
        self.file = DatabaseFile(path)
        self.disk_space = DiskSpace(self.file, min_free_bytes)
        self.sizes: dict[str, int] = {}  # as `GET /health` shows them
        self.rows_rejected = 0
        self.commit_seconds = Durations("amhrpd_commit_seconds", "of a transaction")
        self._log_limit_bytes = self.LOG_LIMIT_BYTES
        self._synchronous = "FULL" if is_each_commit_synced else "NORMAL"
        self._writing: Any = None
        self._reading: Any = None
        self._is_doubted = False  # SQLite said that the file is damaged

    # -- opening and closing -------------------------------------------------------------------------------------------

    def open(self, began: datetime, progress: Callable[[str], bool]) -> Loaded:
        """Open or create the file, end what the last run left open, as of when this one `began`, and load it. `progress` hears
        what takes long, and may end it. Raises StartError for a file that can't be used, STORE_ERRORS for what may pass.
        """
        try:
            self.file.lock()
            self.file.check_kind()
            self._log_limit_bytes = min(self.LOG_LIMIT_BYTES, shutil.disk_usage(self.file.path.parent).total // 32)
            self._writing = self._connect()
            self._create_tables(progress)
            with self._writing as tables:
                end_last_run(tables, began)
                commands = sorted(load_commands(tables), key=operator.itemgetter("created_at"))
                deadmen = [for_memory("amhrpd_deadmen", row) for row in tables["amhrpd_deadmen"]]
                loaded: Loaded = {"devices": list(load_devices(tables)), "command_logs": commands, "amhrpd_deadmen": deadmen}
            self._reading = self._connect()
            return loaded
        except BaseException as error:
            self._disconnect()
            self.file.unlock()
            fault = fault_of(error)
            if fault is Fault.PASSING:
                self.disk_space.give_spare()  # that a run left behind which was killed: the disk may be full
            if not isinstance(error, STORE_ERRORS) or fault is Fault.PASSING:
                raise
            if fault is not Fault.DAMAGE or (damage := self.file.find_damage()) is None:
                raise StartError(f"can't open the database {self.file.path}: {cause_of(error)}") from None
        self.file.move_aside(damage)
        return self.open(began, progress)

    def _connect(self) -> Any:
        limit_bytes = self._log_limit_bytes
        connected = dataset.connect(
            "sqlite:///file",  # whose name, which may be no text at all, is given below
            row_type=dict,
            ensure_schema=False,
            engine_kwargs={"creator": self._connect_sqlite},
            on_connect_statements=[
                "PRAGMA foreign_keys = ON",
                f"PRAGMA synchronous = {self._synchronous}",
                # `sync` sees to the log; within a COMMIT only what it doesn't get to.
                f"PRAGMA wal_autocheckpoint = {3 * limit_bytes // 4096}",
                # Once written into the file the log begins anew and is cut to this: longer it is only if it has grown since.
                f"PRAGMA journal_size_limit = {limit_bytes - (64 << 10)}",
            ],
        )
        # dataset reflects the tables; what is text in the file is text in their rows.
        dialect: Any = connected.executable.dialect
        dialect.ischema_names = dialect.ischema_names | {"JSON": sa.Text, "DATETIME": sa.Text}
        return connected

    def _connect_sqlite(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.file.path, timeout=LOCK_TIMEOUT_S, check_same_thread=False)  # another closes it
        connection.text_factory = functools.partial(str, encoding="utf-8", errors="replace")  # earlier writers left anything
        return connection

    def _disconnect(self) -> None:
        for connected in filter(None, (self._writing, self._reading)):
            connected.close()
        self._writing = self._reading = None

    def _create_tables(self, progress: Callable[[str], bool]) -> None:
        """Create what is missing of the tables and their indexes; first drop indexes of an earlier backend or version."""
        with self._writing as tables:
            for table, columns in TABLES.items():
                tables.query(f"CREATE TABLE IF NOT EXISTS {table} ({columns})")
            tables.query(f"PRAGMA user_version = {SCHEMA_VERSION}")
            found = {row["name"]: row["tbl_name"] for row in tables.query("SELECT * FROM sqlite_master WHERE type = 'index'")}
            for name in found.keys() - INDEXES.keys():
                if found[name] in COLUMNS and name.startswith((f"ix_{found[name]}_", "ix_amhrpd_")):
                    progress(f"dropping an index of an earlier version: {name}")
                    tables.query(f'DROP INDEX "{name}"')
        missing = [name for name in INDEXES if name not in found]
        for number, name in enumerate(missing, start=1):
            table, filters = INDEXES[name]
            say = functools.partial(progress, f"making index {number} of {len(missing)} for the histories: {name}")
            with self._writing as tables:
                connection = tables.executable.connection.dbapi_connection
                connection.set_progress_handler(say, self.PROGRESS_STEPS)
                tables.query(f"CREATE INDEX {name} ON {table} ({', '.join((*filters, HISTORIES[table][0]))})")
                connection.set_progress_handler(None, 0)

    def close(self) -> None:
        """Write the write-ahead log into the file and close it; one that was moved takes it along, and one that is damaged at
        a second look is moved aside. No other thread may be at it any more. Raises STORE_ERRORS.
        """
        if self._reading is None:  # it was never opened
            return
        try:
            self.file.check_place()
            list(self._reading.query("PRAGMA wal_checkpoint(TRUNCATE)"))
        except FileLostError:
            self.file.move_log_along()
        except STORE_ERRORS as error:
            self._is_doubted |= fault_of(error) is Fault.DAMAGE
            raise
        finally:
            self._disconnect()
            self.disk_space.give_spare()
            if self._is_doubted and (damage := self.file.find_damage()):
                self.file.move_aside(damage)
            self.file.unlock()

    # -- writing -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A transaction in the open file, for the writer's thread. Raises FileLostError, also for damage, STORE_ERRORS."""
        self.file.check_place()
        try:
            if self._writing is None:
                self._writing = self._connect()
                list(self._writing.query("PRAGMA wal_checkpoint(PASSIVE)"))  # on a full disk the log can be used again then
            with self._writing.executable.connection.dbapi_connection as connection:  # in half the time of dataset's own
                yield connection
            self.file.check_place()  # else what was committed is not in the file that answers come from
        except BaseException as error:
            fault = fault_of(error)
            if fault is not Fault.ROW and self._writing is not None:
                self._writing.close()
                self._writing = None
            if fault is Fault.DAMAGE:
                self._is_doubted = True
                raise FileLostError(f"{self.file.path} is damaged: {cause_of(error)}") from error
            if fault is Fault.PASSING:
                self.disk_space.give_spare()
            raise

    def commit(self, batch: Batch) -> None:
        """Write a batch in one transaction; the oldest rows make room where need be. Rows that the database refuses for what
        they are stay out, and are logged. Raises FileLostError, STORE_ERRORS.
        """
        if self.disk_space.is_short():
            self.disk_space.make(self.transaction, 6 * batch.size_bytes)  # with their indexes
        began_s = time.monotonic()
        try:
            with self.transaction() as connection:
                for statement, rows in batch.rows.items():
                    if rows:
                        connection.executemany(statement, rows)
        except sqlite3.Error as error:
            if fault_of(error) is not Fault.ROW:
                raise
            self._commit_one_by_one(batch)
        self.commit_seconds.observe(time.monotonic() - began_s)

    def _commit_one_by_one(self, batch: Batch) -> None:
        refused: list[str] = []
        with self.transaction() as connection:
            for statement, row in [(statement, row) for statement, rows in batch.rows.items() for row in rows]:
                try:
                    connection.execute(statement, row)
                except sqlite3.Error as error:
                    if fault_of(error) is not Fault.ROW:
                        raise
                    table = statement.split()[2]  # INSERT INTO table, DELETE FROM table
                    refused.append(f"{table}: {cause_of(error)}: {row!r}")
        for problem in refused:
            log.error("row_rejected", problem=problem)
        self.rows_rejected += len(refused)

    def execute(self, statement: str, values: Sequence[Values]) -> int:
        """Do something for each of these values, in one transaction: to how many rows. Raises FileLostError, STORE_ERRORS."""
        with self.transaction() as connection:
            return connection.executemany(statement, values).rowcount

    def inspect(self) -> None:
        """See that the file is in its place, and look at its size and what is free. Raises FileLostError, OSError."""
        self.file.check_place()
        self.disk_space.keep_spare(3 * self._log_limit_bytes)  # to write the log into the file, and to delete rows
        database_bytes = self.file.path.stat().st_size + self._log_bytes()
        self.sizes = {"database_bytes": database_bytes, "disk_free_bytes": shutil.disk_usage(self.file.path.parent).free}

    def _log_bytes(self) -> int:
        path = self.file.beside("-wal")
        return path.stat().st_size if path.exists() else 0

    def sync(self, *, is_log_synced: bool) -> None:
        """Have what was committed on the card, and write a log that has grown long into the file. Commits go on beside it.
        Raises OSError where the card fails to.
        """
        path = self.file.beside("-wal")
        for synced in (path, path.parent) if is_log_synced else ():  # the folder, where the log has been since a moment ago
            fd = os.open(synced, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)
        if self._log_bytes() > self._log_limit_bytes:
            with contextlib.suppress(*STORE_ERRORS):  # it is tried again, and commits say what is wrong
                list(self._reading.query("PRAGMA wal_checkpoint(PASSIVE)"))

    def read(self, ask: Callable[[Any], Iterable[Row]]) -> list[Row]:
        """What `ask` finds in the tables, up to MAX_ANSWER_BYTES. Raises STORE_ERRORS, and what `ask` does."""
        if self._reading is None:
            raise sqlite3.OperationalError("the database is not open yet")
        rows: list[Row] = []
        budget_bytes = self.MAX_ANSWER_BYTES
        with self._reading as tables:
            for row in ask(tables):
                rows.append(row)
                budget_bytes -= sum(len(value) for value in row.values() if isinstance(value, str | msgspec.Raw))
                if budget_bytes <= 0:
                    break
        return rows


# -- the way in and out ------------------------------------------------------------------------------------------------


class Writer:
    """Opens the database, hands what waits to its thread, one transaction at a time, and has it on the card in time. Its state
    belongs to the event loop. What fails for the disk's sake is tried again until it is done.
    """

    OPEN_PATIENCE_S = 5.0  # a start waits so long for a disk on which nothing gets on ...
    PROGRESS_PATIENCE_S = 600.0  # ... and so long for the next news of indexes that are made
    RETRY_S = 0.5  # after a try that failed twice, or a sync
    STALLED_S = 1.0  # a write that takes longer holds up commands, which is what /health is about
    LOG_LOOK_S = 1.0  # where every commit syncs, and only the log is to be kept short

    def __init__(self, database: Database, backlog: Backlog, sync_interval_s: float) -> None:
        """Sync once in `sync_interval_s`; with 0 every commit has done it."""
        self._database = database
        self._backlog = backlog
        self._sync_interval_s = sync_interval_s
        self._busy_since_s: float | None = None
        self._has_written = asyncio.Event()  # something that may not be on the card yet
        self._has_tried = asyncio.Event()  # to open the file
        self._patient_until_s = time.monotonic() + self.OPEN_PATIENCE_S
        self.writing, self.syncing = ThreadPoolExecutor(1, "store-writer"), ThreadPoolExecutor(1, "store-card")
        self.deadline_s = math.inf  # of a stop, for what is queued
        self.failure: str | None = "the database is not open yet"  # why nothing can be written, while that is so
        self.sync_failure: str | None = None  # why what is written may not be on the card
        self.is_open = False
        self.is_lost = asyncio.Event()  # the file is gone or can't be used: the gateway ends
        self.sync_seconds = Durations("amhrpd_sync_seconds", "until what was committed is on the card")

    async def wait_for_open(self, stop: asyncio.Event) -> None:
        """Return once the file is open, or couldn't be opened, or the disk seems to stall, or the gateway is to stop."""
        while not (self._has_tried.is_set() or stop.is_set()):
            if time.monotonic() > self._patient_until_s:
                log.error("database_open_stalled", path=str(self._database.file.path))
                return
            await asyncio.sleep(0.005)

    def problem(self) -> str | None:
        """Why nothing can be written now, if that is so."""
        stalled_s = 0.0 if self._busy_since_s is None else time.monotonic() - self._busy_since_s
        if self.failure is None and stalled_s > self.STALLED_S:
            return f"a write has been waiting for the disk for {stalled_s:.0f} s"
        return self.failure

    def lose(self, error: FileLostError | StartError) -> None:
        """The file is gone, damaged or none that can be written: the gateway has to end."""
        if not self.is_lost.is_set():
            self.failure = str(error)
            log.error("database_lost", reason=self.failure)
            self.is_lost.set()

    async def write_forever(self, on_loaded: Callable[[Loaded], None], on_progress: Callable[[str], None]) -> None:
        """Open the file, and write until a stop, and then until nothing waits or its time is over."""
        loop = asyncio.get_running_loop()

        def progress(text: str) -> bool:
            self._patient_until_s = time.monotonic() + self.PROGRESS_PATIENCE_S
            loop.call_soon_threadsafe(on_progress, text)
            return self.deadline_s < math.inf

        try:
            on_loaded(await self._insist(self._database.open, utc_now(), progress))
            self.is_open = True
            self._has_tried.set()
            while self.deadline_s == math.inf or self._backlog.rows_waiting or self._backlog.is_due.is_set():
                if self.deadline_s == math.inf:
                    await self._backlog.is_due.wait()
                batch = self._backlog.take()
                if any(batch.rows.values()):
                    await self._insist(self._database.commit, batch)
                self._backlog.settle(batch)
        except TimeoutError:
            pass  # a stop has waited long enough
        except (FileLostError, StartError) as error:
            self.lose(error)
        except Exception:
            self.failure = "the writer has died"
            log.exception("writer_died")
            raise
        finally:
            self._has_tried.set()

    async def _insist(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Do something in the thread, again and again where the disk fails, from the second time on after a pause. Raises
        FileLostError, StartError, and TimeoutError where a stop can't wait for another try.
        """
        while True:
            failed_before = self.failure
            self._busy_since_s = time.monotonic()
            try:
                result = await asyncio.get_running_loop().run_in_executor(self.writing, work, *arguments)
                if failed_before and self._backlog.rows_waiting:
                    log.warning("database_writes_resumed", rows_waiting=self._backlog.rows_waiting)
                self.failure = None
                self._has_written.set()
                return result
            except FileLostError:
                raise
            except STORE_ERRORS as error:
                self.failure = f"can't {'write' if self.is_open else 'open'} the database: {cause_of(error)}"
                if failed_before != self.failure:
                    log.error("database_write_failed", reason=cause_of(error), rows_waiting=self._backlog.rows_waiting)
            finally:
                self._busy_since_s = None
            self._has_tried.set()
            pause_s = self.RETRY_S if failed_before else 0.0
            is_for_nothing = self.deadline_s < math.inf and not self._backlog.rows_waiting
            if is_for_nothing or time.monotonic() + pause_s > self.deadline_s:
                raise TimeoutError
            await asyncio.sleep(pause_s)

    async def sync_forever(self) -> None:
        """Have what was written on the card `sync_interval_s` later, soon again where that failed; keep the log short."""
        while True:
            await self._has_written.wait()
            await asyncio.sleep(self.RETRY_S if self.sync_failure else self._sync_interval_s or self.LOG_LOOK_S)
            self._has_written.clear()  # what is written from now on may be too late for this sync
            sync = functools.partial(self._database.sync, is_log_synced=self._sync_interval_s > 0)
            try:
                with self.sync_seconds.time() if self._sync_interval_s else contextlib.nullcontext():
                    await asyncio.get_running_loop().run_in_executor(self.syncing, sync)
                self.sync_failure = None
            except STORE_ERRORS as error:
                if self.sync_failure is None:
                    log.error("sync_failed", reason=cause_of(error))
                self.sync_failure = f"what is written may not be on the card: {cause_of(error)}"
                self._has_written.set()


async def end_tasks(tasks: Collection[asyncio.Task[Any]]) -> list[Exception]:
    """Cancel what still runs, and wait for its end. Returns what went wrong."""
    for task in tasks:
        task.cancel()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    return [end for end in ends if isinstance(end, Exception)]


class Store:
    """The database as the event loop sees it: what is put (see Backlog) gets into the file, and what is read is all of it."""

    READ_TIMEOUT_S = 20.0
    FAILING_READ_TIMEOUT_S = 1.0  # where writes fail: two more tries of the writer
    READERS = 2  # so that a stalled read leaves another way
    TIDY_INTERVAL_S = 3600.0
    ROWS_FOUND_AT_ONCE = 20_000  # to be deleted ...
    ROWS_DELETED_AT_ONCE = 1000  # ... in 5 to 10 ms; fewer write the same pages of indexes more often

    def __init__(self, settings: Settings) -> None:
        self._keep_days = settings.keep_days
        path, min_free_bytes = settings.database_path.absolute(), settings.min_free_mb << 20
        self._database = Database(path, min_free_bytes, is_each_commit_synced=settings.sync_interval_s == 0)
        self._backlog = Backlog(settings.commit_interval_s)
        self._writer = Writer(self._database, self._backlog, settings.sync_interval_s)
        self._readers = ThreadPoolExecutor(self.READERS, "store-reader")
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._tidied_s = -math.inf
        self.is_lost = self._writer.is_lost  # set where the file is gone or damaged: the gateway has to end
        self.histograms = (self._database.commit_seconds, self._writer.sync_seconds)
        self.put, self.put_telemetry = self._backlog.put, self._backlog.put_telemetry

    # -- start and stop ------------------------------------------------------------------------------------------------

    async def open(self, on_loaded: Callable[[Loaded], None], on_progress: Callable[[str], None], stop: asyncio.Event) -> None:
        """Open or create the file, and look after it from then on. `on_loaded` is told what it has, `on_progress` again and
        again what takes long, which a `stop` ends. Raises StartError where it can't be used. A disk that is full, read-only or
        stalled is waited for while the gateway serves.
        """
        self._tasks["write"] = asyncio.create_task(self._writer.write_forever(on_loaded, on_progress))
        self._tasks["sync"] = asyncio.create_task(self._writer.sync_forever())
        await self._writer.wait_for_open(stop)
        if self.is_lost.is_set():
            await self._end()
            raise StartError(self._writer.failure)

    async def close(self, timeout_s: float) -> bool:
        """Write what is queued, end the log, close the file. False where that failed or took longer than `timeout_s`."""
        is_clean = self.is_writer_alive
        self._writer.deadline_s = time.monotonic() + timeout_s
        self._backlog.is_due.set()
        try:
            async with asyncio.timeout(timeout_s + 1):  # the last try may have begun just before
                await asyncio.wait((self._tasks["write"],))
                await end_tasks(self._tasks.values())
                for threads in (self._readers, self._writer.syncing):  # no connection may be closed while another uses it
                    await self._run(threads.shutdown)
                await self._run(self._database.close)
        except STORE_ERRORS as error:
            is_clean = False
            log.error("database_close_failed", reason=cause_of(error), timeout_s=timeout_s)
        finally:
            await self._end()
        if lost := self._backlog.rows_waiting:
            log.error("rows_lost", rows=lost, reason=self._writer.failure)
        return is_clean and not lost

    async def _end(self) -> None:
        """Leave no task behind, and no thread but one that hangs on a disk."""
        await end_tasks(self._tasks.values())
        for threads in (self._readers, self._writer.syncing, self._writer.writing):
            threads.shutdown(wait=False)

    async def _run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Do something in the writer's thread, between two batches. Raises what it raises."""
        return await asyncio.get_running_loop().run_in_executor(self._writer.writing, work, *arguments)

    # -- health --------------------------------------------------------------------------------------------------------

    @property
    def is_writer_alive(self) -> bool:
        """Whether what is put gets onto the card at last (it does while a disk stalls)."""
        return not any(self._tasks[name].done() for name in ("write", "sync"))

    def problem(self) -> str | None:
        """Why nothing can be written, or brought to the card, now, if that is so."""
        return self._writer.problem() or self._writer.sync_failure

    def figures(self) -> Row:
        """What `GET /health` shows of it (contract, section 6); the `notice` may be empty, sizes may be unknown."""
        return {
            "database": self.problem() or "ok",
            **self._database.sizes,
            "rows_waiting": self._backlog.rows_waiting,
            "rows_dropped": self._backlog.rows_dropped,
            "rows_rejected": self._database.rows_rejected,
            "notice": "; ".join(filter(None, (self._database.file.notice, self._database.disk_space.notice))),
        }

    # -- what is kept how long -----------------------------------------------------------------------------------------

    def maintain(self) -> None:
        """For every second: see that the file is in its place, look at its size, delete what is too old; one at a time."""
        if self._writer.is_open and ("tidy" not in self._tasks or self._tasks["tidy"].done()):
            self._tasks["tidy"] = asyncio.create_task(self._tidy())

    async def _tidy(self) -> None:
        try:
            await self._run(self._database.inspect)
            if self._keep_days and time.monotonic() > self._tidied_s + self.TIDY_INTERVAL_S:
                self._tidied_s = time.monotonic()
                before = stored_time(utc_now() - timedelta(days=self._keep_days)) or ""
                for table in HISTORIES:
                    find = functools.partial(old_rows, table=table, before=before, count=self.ROWS_FOUND_AT_ONCE)
                    if deleted := await self._delete(table, find):
                        log.info("old_rows_deleted", table=table, rows=deleted, before=before)
        except FileLostError as error:
            self._writer.lose(error)
        except STORE_ERRORS as error:
            log.warning("file_not_looked_after", problem=cause_of(error))

    async def _execute(self, statement: str, values: Sequence[Values]) -> int:
        """One step of a deletion: how many rows it changed. Raises STORE_ERRORS, of them TimeoutError where the disk stalls."""
        async with asyncio.timeout(self.READ_TIMEOUT_S):
            return int(await self._run(self._database.execute, statement, values))

    async def _delete(self, table: TableName, find: Callable[[Any], Iterable[Row]]) -> int:
        """Delete the rows whose rowids (`number`) are found, until none is, in steps between batches: how many it were."""
        deleted, step = 0, self.ROWS_DELETED_AT_ONCE
        while rows := await self._ask(find):
            numbers = sorted((row["number"],) for row in rows)  # as they lie in the file
            for start in range(0, len(numbers), step):
                statement = f"DELETE FROM {table} WHERE rowid = ?"
                await self._execute(statement, numbers[start : start + step])
                await asyncio.sleep(0.01)  # a batch that waits has its turn in any case, and the disk some rest
            deleted += len(numbers)
        return deleted

    async def delete_device(self, device_id: str) -> dict[str, int]:
        """Delete what was put of a device so far, in steps between batches. Returns how many snapshots and events it were. What
        comes of it meanwhile stays. Raises STORE_UNAVAILABLE; then a part may be deleted, and its row is still there.
        """
        histories: Mapping[str, TableName] = {"snapshots": "device_state_snapshots", "events": "device_connection_logs"}
        deleted: dict[str, int] = {}
        await self.flush()
        try:
            what_it_said_of_itself = "UPDATE devices SET metadata_json = '{}' WHERE device_id = ?"
            await self._execute(what_it_said_of_itself, [(device_id,)])
            newest = ", ".join(f"(SELECT max(rowid) FROM {table}) AS {name}" for name, table in histories.items())
            (until,) = await self._ask(operator.methodcaller("query", f"SELECT {newest}"))
            for name, table in histories.items():
                # While the newest row is there, no number is given again: what comes meanwhile is behind it. So it goes last.
                index = INDEX_OF[table, frozenset({"device_id"})]
                old = f"SELECT rowid AS number FROM {table} INDEXED BY {index} WHERE device_id = :device_id AND rowid < :until"
                of = {"device_id": device_id, "until": until[name] or 0}
                find = operator.methodcaller("query", f"{old} LIMIT {self.ROWS_FOUND_AT_ONCE}", **of)
                deleted[name] = await self._delete(table, find)
                last = f"DELETE FROM {table} WHERE device_id = ? AND rowid = ?"
                deleted[name] += await self._execute(last, [(device_id, until[name])])
            is_empty = " AND ".join(f"NOT EXISTS (SELECT 1 FROM {table} WHERE device_id = ?)" for table in histories.values())
            gone = f"DELETE FROM devices WHERE device_id = ? AND {is_empty}"  # else it is back
            await self._execute(gone, [(device_id,) * 3])
        except STORE_ERRORS as error:
            raise GatewayError(Code.STORE_UNAVAILABLE, f"can't delete all of it: {cause_of(error)}") from None
        return deleted

    # -- waiting for what was put --------------------------------------------------------------------------------------

    def write_command(self, command_id: str, row: RowNow, size_bytes: int) -> asyncio.Future[None] | None:
        """Write a command's row at once, and all that was put but telemetry: a future that is done when that is committed. None
        where nothing can be written now.
        """
        is_put = self._backlog.put("command_logs", command_id, row, size_bytes)
        return self._backlog.join(behind_telemetry=False) if is_put and not self._writer.problem() else None

    async def wait_while_congested(self) -> None:
        """Wait, a second at the most, where much telemetry waits: for those who send so much."""
        if self._backlog.is_congested:
            await asyncio.wait((self._backlog.join(behind_telemetry=True),), timeout=1.0)

    async def flush(self) -> None:
        """Wait until everything put so far is committed. Raises STORE_UNAVAILABLE where that takes too long or fails."""
        if self._backlog.rows_waiting == 0:
            return
        written = self._backlog.join(behind_telemetry=True)
        timeout_s = self.READ_TIMEOUT_S if self._writer.failure is None else self.FAILING_READ_TIMEOUT_S
        await asyncio.wait((written,), timeout=timeout_s)
        if not written.done():
            raise GatewayError(Code.STORE_UNAVAILABLE, self._writer.failure or "the database is too slow at the moment")

    # -- reading -------------------------------------------------------------------------------------------------------

    async def history(self, table: TableName, limit: int, **wanted: Any) -> list[Row]:
        """Rows of a history, ready to encode: see `newest_rows`. Raises GatewayError, see `_read`."""
        return await self._read(lambda tables: (for_answer(table, row) for row in newest_rows(tables, table, limit, **wanted)))

    async def row(self, table: TableName, shape: Callable[[TableName, Row], Row], **key: str) -> Row | None:
        """The row with a key as `for_answer` or `for_memory` shape it, or None. Raises GatewayError, see `_read`."""
        (column,) = key
        question = f"SELECT * FROM {table} WHERE {column} = :{column}"
        rows = await self._read(lambda tables: [shape(table, row) for row in tables.query(question, **key)])
        return rows[0] if rows else None

    async def _read(self, ask: Callable[[Any], Iterable[Row]]) -> list[Row]:
        """Ask the tables in a reader's thread, after all that was put so far is in the file. Raises STORE_UNAVAILABLE where
        that can't be done in time, INVALID_FIELD_VALUE where the row is gone behind which an answer should begin.
        """
        await self.flush()
        try:
            return await self._ask(ask)
        except LookupError as error:
            raise GatewayError(Code.INVALID_FIELD_VALUE, f"before_id is {error.args[0]!r}: there is no such row") from None
        except STORE_ERRORS as error:
            raise GatewayError(Code.STORE_UNAVAILABLE, f"can't read the database: {cause_of(error)}") from None

    async def _ask(self, ask: Callable[[Any], Iterable[Row]]) -> list[Row]:
        async with asyncio.timeout(self.READ_TIMEOUT_S):
            return await asyncio.get_running_loop().run_in_executor(self._readers, self._database.read, ask)


# ======================================================================================================================
# Devices
# ======================================================================================================================

CLOSE_REPLACED = 4000  # contract, section 3
CLOSE_TIMED_OUT = 4001


def server_frame(opcode: WSMsgType, payload: bytes) -> bytes:
    """A frame to a board, whole and unmasked (RFC 6455, section 5.2). Made once, it goes to all targets of a command."""
    size = bytes([len(payload)]) if len(payload) < 126 else struct.pack("!BH", 126, len(payload))
    return bytes([0x80 | opcode]) + size + payload


@dataclasses.dataclass(slots=True, eq=False)
class ArmedDeadman:
    """What the devices that took a command get unless it is disarmed in time (contract, section 4)."""

    command_name: str
    payload: Json
    after_s: float = 0.0
    device_type: str = EVERY_TYPE  # of the command that it goes with; after a crash nobody knows
    armed_by: str = ""  # its id
    sent_s: float = -math.inf  # monotonic: when it was sent, and this armed
    due_at: datetime = dataclasses.field(default_factory=lambda: utc_now())


@dataclasses.dataclass(slots=True, eq=False)
class Device:
    """A board that was seen at least once. Times are naive UTC."""

    device_id: str
    device_type: str
    connected_at: datetime
    metadata: Json = b"{}"
    last_heartbeat: datetime | None = None
    disconnected_at: datetime | None = None
    state: Json | None = None
    state_timestamp: datetime | None = None
    alert: Row | None = None  # the latest, in memory only
    deadman: ArmedDeadman | None = None  # until it is disarmed, or has arrived
    connection: DeviceSocket | None = None

    @classmethod
    def restore(cls, row: Row) -> Device:
        """A device of an earlier run, which is offline, from its row as memory takes it up (see `for_memory`)."""
        return cls(metadata=row["metadata_json"], **{name: row[name] for name in row.keys() - {"metadata_json", "is_online"}})

    @property
    def is_online(self) -> bool:
        """Whether a registered connection is there now."""
        return self.connection is not None

    @property
    def size_bytes(self) -> int:
        """What it takes in memory, about."""
        return 1000 + len(self.metadata) + len(self.state or b"")

    def row(self) -> Values:
        """The device as a row of the table."""
        times = map(stored_time, (self.last_heartbeat, self.connected_at, self.disconnected_at))
        return (self.device_id, self.device_type, self.is_online, *times, self.metadata)

    def record(self) -> Row:
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
            "state": raw(self.state or b"null"),
            "state_timestamp": format_time(self.state_timestamp),
            "alert": self.alert,
            "deadman_at": None if self.deadman is None else format_time(self.deadman.due_at),
        }

    def state_record(self) -> Row:
        """The latest state as listeners get it (contract, section 8), ready to encode."""
        record = {"device_id": self.device_id, "device_type": self.device_type, "state": raw(self.state or b"null")}
        return record | {"timestamp": format_time(self.state_timestamp)}


def surplus(kept: Collection[Any], max_count: int, max_bytes: int) -> Iterator[Any]:
    """The first of some devices or commands, as many as are too many, or too large with the others."""
    count, size_bytes = len(kept), sum(each.size_bytes for each in kept)
    for each in list(kept):
        if count <= max_count and size_bytes <= max_bytes:
            return
        count, size_bytes = count - 1, size_bytes - each.size_bytes
        yield each


class Registry:
    """Every device in memory, by id: the truth about who is online, and the rows that tell of it."""

    # Ids are free to invent for whoever reaches the port. Who was longest away makes room, and is only in the file then.
    MAX_DEVICES = RESTORED_DEVICES
    MAX_BYTES = 24 << 20
    TAKEOVER_WRITTEN_AFTER_S = 5.0  # contract, section 5

    def __init__(self, store: Store) -> None:
        self._store = store
        self._devices: dict[str, Device] = {}
        self._offline: dict[str, Device] = {}  # who was longest away first

    def __len__(self) -> int:
        return len(self._devices)

    def find(self, device_id: str) -> Device | None:
        """The device, or None where it isn't in memory."""
        return self._devices.get(device_id)

    @property
    def online(self) -> int:
        """How many are online."""
        return len(self._devices) - len(self._offline)

    def matching(self, device_type: str | None = None, *, is_online: bool | None = None) -> list[Device]:
        """The devices of a type (exactly) and of a state; None is any."""
        return [
            device
            for device in self._devices.values()
            if (device_type is None or device.device_type == device_type) and is_online in (None, device.connection is not None)
        ]

    def know(self, device: Device) -> None:
        """Take in a device that is offline."""
        self._devices[device.device_id] = self._offline[device.device_id] = device

    def forget(self, device: Device) -> None:
        """Let go of a device that is offline."""
        self._devices.pop(device.device_id, None)
        self._offline.pop(device.device_id, None)

    def make_room(self) -> None:
        """Let go of what is too much: devices that were longest away, and then, of those online, the largest states."""
        online = sorted(self.matching(is_online=True), key=operator.attrgetter("size_bytes"), reverse=True)
        left_bytes = self.MAX_BYTES - sum(device.size_bytes for device in online)
        for device in surplus(self._offline.values(), self.MAX_DEVICES - len(online), left_bytes):
            self.forget(device)
        for device in surplus(online, len(online), self.MAX_BYTES):
            log.warning("state_not_kept", device_id=device.device_id, problem="the states of all boards take too much memory")
            device.state = device.state_timestamp = None

    # -- coming and going ----------------------------------------------------------------------------------------------

    def come_online(self, connection: DeviceSocket, device_type: str) -> Device:
        """A connection registers; its device's row is to be put next. Of two connections of a device the one that was opened
        later wins: it takes over, and at no moment the device reads as offline. Raises UNAUTHORIZED on the other one.
        """
        now = utc_now()
        device = self.find(connection.device_id) or Device(connection.device_id, device_type, now)
        previous, reason = device.connection, "replaced by a newer connection"
        if previous is not None and previous.opened_s > connection.opened_s:
            connection.hang_up(CLOSE_REPLACED, reason)
            raise GatewayError(Code.UNAUTHORIZED, reason)
        # Two boards with one id replace each other for ever, and would fill the history.
        is_written = previous is None or time.monotonic() - previous.opened_s > self.TAKEOVER_WRITTEN_AFTER_S
        if not is_written:
            log.warning("takeovers_not_written", device_id=device.device_id, reason="do two boards have this device_id?")
        elif previous is not None:
            self._write_event(device, DISCONNECTED, previous, now, CLOSE_REPLACED, "replaced")
        device.device_type, device.connection, connection.device = device_type, connection, device
        device.connected_at = device.last_heartbeat = now
        device.disconnected_at = None
        if previous is not None:
            previous.hang_up(CLOSE_REPLACED, reason)
        self._devices[device.device_id] = device
        self._offline.pop(device.device_id, None)
        if is_written:
            self._write_event(device, CONNECTED, connection, now)
        return device

    def go_offline(self, device: Device, connection: DeviceSocket, event: str, code: int | None, reason: str) -> None:
        """A device's connection is over."""
        device.connection = None
        device.disconnected_at = utc_now()
        self._offline[device.device_id] = device
        self._store.put("devices", device.device_id, device.row, device.size_bytes)
        self._write_event(device, event, connection, device.disconnected_at, code, reason)

    def _write_event(
        self, device: Device, event: str, connection: DeviceSocket, at: datetime, code: int | None = None, reason: str = ""
    ) -> None:
        details: Row = {"peer": connection.peer}
        if event != CONNECTED:
            seconds = round(time.monotonic() - connection.opened_s, 3)
            details |= {"reason": reason, "code": None if code is None else int(code), "seconds_connected": seconds}
        log.info(f"device_{event}", device_id=device.device_id, **details)
        said = to_json(details)
        row = (device.device_id, device.device_type, event, stored_time(at), said)
        self._store.put_telemetry("device_connection_logs", row, said)


# ======================================================================================================================
# Commands
# ======================================================================================================================


@dataclasses.dataclass(slots=True, eq=False)
class Command:
    """One command and what became of it (contract, section 4)."""

    device_type: str
    command_name: str
    payload: Json
    timeout_s: float
    target_device_count: int
    created_at: datetime = dataclasses.field(default_factory=lambda: utc_now())
    command_id: str = dataclasses.field(default_factory=lambda: str(uuid.uuid4()))
    status: str = CREATED
    executed_at: datetime | None = None
    completed_at: datetime | None = None
    deadman: ArmedDeadman | None = None
    named: Collection[str] = ()  # the ids that the caller named
    recipients: set[str] | None = dataclasses.field(default_factory=set)  # None after a restart: any device of the type
    answers: dict[str, msgspec.Raw] = dataclasses.field(default_factory=dict)
    answer_bytes: int = 0
    succeeded: set[str] = dataclasses.field(default_factory=set)
    failed: set[str] = dataclasses.field(default_factory=set)
    is_persisted: bool = True
    transaction: object = None  # what its caller at a broker calls it
    came_s: float = dataclasses.field(default_factory=time.monotonic)
    sent_s: float = -math.inf  # monotonic, too
    has_left: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)  # it was sent, or found no device
    released: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)  # nobody need wait for answers any more
    expiry: asyncio.TimerHandle | None = None

    MAX_ANSWER_BYTES: ClassVar[int] = 4 << 20  # beyond them answers are counted and not kept

    @classmethod
    def restore(cls, row: Row, timeout_s: float) -> Command:
        """A command of an earlier run, from its row as memory takes it up (see `for_memory`)."""
        values = {name: row[name] for name in row.keys() - {"response_data", "success_count"}}
        command = cls(timeout_s=timeout_s, recipients=None, **values)
        with contextlib.suppress(msgspec.ValidationError):  # the earlier backend left there what it liked
            command.answers = msgspec.json.decode(row["response_data"] or b"{}", type=dict[str, msgspec.Raw])
        for device_id, answer in command.answers.items():
            command.answer_bytes += 200 + len(answer)
            match json_decoder.decode(answer):
                case {"status": status}:
                    (command.succeeded if status == "success" else command.failed).add(device_id)
        return command

    @property
    def size_bytes(self) -> int:
        """What it takes in memory, about: the object, an entry of a set for each recipient, the answers."""
        return 1500 + 64 * self.target_device_count + len(self.payload) + self.answer_bytes

    def message(self) -> bytes:
        """What the boards get: seven keys, in the order that those in the field need (contract, section 3)."""
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

    def check_size(self) -> None:
        """Raise PAYLOAD_TOO_LARGE where no board could take it."""
        if (size_bytes := len(self.message())) > MAX_COMMAND_FRAME_BYTES:
            problem = f"the command would be a frame of {size_bytes} bytes; boards take {MAX_COMMAND_FRAME_BYTES} at the most"
            raise GatewayError(Code.PAYLOAD_TOO_LARGE, problem)

    def may_be_answered_by(self, device: Device) -> bool:
        """Whether the command was sent to the device, as far as is known."""
        if self.recipients is None:
            return self.device_type in (device.device_type, EVERY_TYPE)
        return device.device_id in self.recipients

    def count_answer(self, device_id: str, ack: CommandAck) -> bool:
        """Count a device's answer. False where it changes nothing: it is repeated, or a success after a failure."""
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
            "payload": ack.payload if self.answer_bytes < self.MAX_ANSWER_BYTES else None,
            "execution_time": ack.execution_time,
            "received_at": format_time(now),
        }
        self.answers[device_id] = raw(to_json(answer))
        self.answer_bytes += 200 + len(self.answers[device_id])  # with the entry and its key
        if len(self.succeeded) + len(self.failed) >= self.target_device_count:
            self.completed_at = now
        return True

    async def persist(self, written: asyncio.Future[None] | None, timeout_s: float) -> None:
        """Wait for its row to be written, and note whether it is."""
        if written is not None and not written.done():
            await asyncio.wait((written,), timeout=timeout_s)
        self.is_persisted = written is not None and written.done()

    def release(self) -> None:
        """Who waits gets the command as it is, and no timer is left."""
        self.released.set()
        if self.expiry is not None:
            self.expiry.cancel()

    def row(self) -> Values:
        """The command as a row of the table."""
        times = map(stored_time, (self.created_at, self.executed_at, self.completed_at))
        answers = to_json(self.answers) if self.answers else None
        what = (self.command_id, self.device_type, self.command_name, self.payload, self.status)
        return (*what, *times, answers, self.target_device_count, len(self.succeeded))

    def record(self) -> Row:
        """The row as the command log shows it, ready to encode."""
        return {
            "command_id": self.command_id,
            "device_type": self.device_type,
            "command_name": self.command_name,
            "payload": raw(self.payload),
            "status": self.status,
            "created_at": format_time(self.created_at),
            "executed_at": format_time(self.executed_at),
            "completed_at": format_time(self.completed_at),
            "response_data": self.answers or None,
            "target_device_count": self.target_device_count,
            "success_count": len(self.succeeded),
        }

    def answer(self, *, with_answers: bool) -> Row:
        """The command as `POST /command` answers it (contract, section 6), ready to encode."""
        hidden = ("executed_at", "completed_at", *(() if with_answers else ("response_data",)))
        answer = {name: value for name, value in self.record().items() if name not in hidden}
        if (deadman := self.deadman) is not None:
            shown = {"after": deadman.after_s, "command_name": deadman.command_name, "payload": raw(deadman.payload)}
            answer["deadman"] = shown
        return answer if self.is_persisted else answer | {"persisted": False}


# ======================================================================================================================
# Events
# ======================================================================================================================


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to some devices. `data` is JSON; `text` is all of it as it goes to `GET /events`."""

    text: bytes
    name: str = ""
    device_type: str = ""
    device_ids: Collection[str] = ()
    data: Json = b"{}"
    of: str = ""  # the device or command whose state it tells


@dataclasses.dataclass(slots=True, eq=False)
class Listener:
    """Somebody who follows what happens. A filter that is None lets everything pass; `cut_off` ends the connection."""

    cut_off: Callable[[], None]
    names: frozenset[str] | None = None
    device_ids: frozenset[str] | None = None
    device_type: str | None = None
    seen: int = 0  # the number of the last event that was theirs to take

    def wants(self, event: Event) -> bool:
        """Whether an event passes the filters. A command to several types is one to each of them."""
        return (
            (self.names is None or event.name in self.names)
            and (self.device_ids is None or not self.device_ids.isdisjoint(event.device_ids))
            and (self.device_type is None or event.device_type in (self.device_type, EVERY_TYPE))
        )


class Events:
    """What happens, for those who listen (contract, section 8): one ring of the latest events, each encoded once. A listener
    has a place in the ring, and who falls out of it is cut off. While nobody listens or observes nothing is kept.
    """

    MAX_EVENTS = 1000
    MAX_BYTES = 4 << 20  # of all events; a state can be 64 KB
    MAX_LISTENERS = 64
    TURN_EVENTS = 20  # that a listener is given at a time: 1.3 MB at the most
    REPEAT_S = 0.1  # between two events of the same kind about the same thing: the latest wins
    PAUSE_S = 0.05  # between two looks, so that 64 listeners and 2,000 events a second are few wake-ups
    ALIVE_S = 5.0  # contract, section 8
    SILENCE_S = 15.0

    def __init__(self) -> None:
        self.observers: list[Callable[[Event], None]] = []  # are called with each event, from the start on
        self._run = uuid.uuid4().hex[:8]  # an id of another run must not look like one of ours
        self._last = 0  # the number of the latest event
        self._ring: deque[Event] = deque()
        self._ring_bytes = 0
        self._listeners: set[Listener] = set()
        self._latest: dict[str, Callable[[], None] | None] = {}  # what was told just now, and what to tell of it next
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    def tell(self, name: str, device_type: str, device_ids: Collection[str], record: Callable[[], Row], of: str = "") -> None:
        """Something happened; `record` is asked for it where anybody listens. Where it tells the state `of` something that was
        told just now, it waits for REPEAT_S to be over, and the latest wins.
        """
        if not self._listeners and not self.observers:
            return
        publish, key = functools.partial(self._publish, name, device_type, device_ids, record, of), f"{name} {of}"
        if key in self._latest:
            self._latest[key] = publish
            return
        if of:
            self._latest[key] = None
            self._timer = self._timer or asyncio.get_running_loop().call_later(self.REPEAT_S, self._tell_latest)
        publish()

    def _tell_latest(self) -> None:
        waiting = {key: publish for key, publish in self._latest.items() if publish is not None}
        self._latest = dict.fromkeys(waiting)
        self._timer = asyncio.get_running_loop().call_later(self.REPEAT_S, self._tell_latest) if waiting else None
        for publish in waiting.values():
            publish()

    def _publish(self, name: str, device_type: str, device_ids: Collection[str], record: Callable[[], Row], of: str) -> None:
        self._last += 1
        data = to_json(record())
        text = b"id: %s-%d\nevent: %s\ndata: %s\n\n" % (self._run.encode(), self._last, name.encode(), data)
        event = Event(text, name, device_type, device_ids, data, of)
        self._ring.append(event)
        self._ring_bytes += len(text)
        while len(self._ring) > self.MAX_EVENTS or (self._ring_bytes > self.MAX_BYTES and len(self._ring) > 1):
            self._ring_bytes -= len(self._ring.popleft().text)
        for listener in self._listeners:
            if listener.seen < self._last - len(self._ring):
                listener.cut_off()
        for observe in self.observers:
            observe(event)

    @contextlib.contextmanager
    def listening(self, listener: Listener) -> Iterator[None]:
        """The time in which somebody listens. Raises RESOURCE_EXHAUSTED, STOPPING."""
        if self._is_closed:
            raise GatewayError(Code.STOPPING, "the gateway is going down")
        if len(self._listeners) >= self.MAX_LISTENERS:
            raise GatewayError(Code.RESOURCE_EXHAUSTED, f"{self.MAX_LISTENERS} listen already")
        if not self._listeners and not self.observers:  # nobody was told what happened meanwhile
            self._last += 1
            self._ring.clear()
            self._ring_bytes = 0
        self._listeners.add(listener)
        listener.seen = self._last
        try:
            yield
        finally:
            self._listeners.discard(listener)

    async def follow(self, listener: Listener, after: str | None = None, *, alive: bool = False) -> AsyncIterator[list[Event]]:
        """What happens from now on, or `after` the event with this id, some at a time, with a sign of life now and then: a
        comment, or with `alive` an event. Where there is a gap it begins with `reset`. Ends when the gateway stops, and where
        the listener was cut off.
        """
        known = {f"{self._run}-{number}": number for number in range(self._last - len(self._ring), self._last + 1)}
        listener.seen = known.get(after or "", self._last)
        reset = "" if after is None or after in known else "event: reset\ndata: {}\n"
        retry_ms = random.randint(500, 2500)  # so that not all come back at once, with an id before any event
        yield [Event(f"retry: {retry_ms}\nid: {self._run}-{listener.seen}\n{reset}\n".encode())]
        interval_s, told_s = self.ALIVE_S if alive else self.SILENCE_S, time.monotonic()
        while (first := listener.seen - (self._last - len(self._ring))) >= 0:
            turn = list(itertools.islice(self._ring, first, first + self.TURN_EVENTS))
            listener.seen += len(turn)
            wanted = list(filter(listener.wants, turn))
            if time.monotonic() - told_s >= interval_s:
                told_s = time.monotonic()
                data = to_json({"timestamp": format_time(utc_now())})
                wanted.append(Event(b"event: alive\ndata: %s\n\n" % data if alive else b":\n\n"))
            if wanted:
                yield wanted
            elif not turn and self._is_closed:
                return
            elif not turn:
                await asyncio.sleep(self.PAUSE_S)

    def close(self) -> None:
        """Tell what waits to be told, and let everybody go."""
        self._tell_latest()
        if self._timer is not None:
            self._timer.cancel()
        self._is_closed = True


# ======================================================================================================================
# Gateway
# ======================================================================================================================


def tell_of(events: Events, device: Device) -> None:
    """Have listeners know a device as it is now."""
    events.tell("device", device.device_type, (device.device_id,), device.record, of=device.device_id)


class Dispatch:
    """Commands on their way: the one line in which they leave, to whom they go, what comes back, and what deadmen send."""

    PERSIST_TIMEOUT_S = 1.0  # contract, section 6: the longest that a store holds a command up
    TURN_TARGETS = 64  # under a millisecond of sending, then the others have their turn
    MAX_COMMANDS = 5000  # that are open, and of those that were: late and repeated answers find them
    MAX_BYTES = 8 << 20  # of each

    def __init__(self, settings: Settings, store: Store, registry: Registry, events: Events) -> None:
        self._timeout_s = settings.command_timeout_s
        self._store = store
        self._registry = registry
        self._events = events
        self.open: dict[str, Command] = {}  # until all have answered, or their time is over
        self._closed: dict[str, Command] = {}
        self._filed: dict[str, ArmedDeadman] = {}  # by device_id: what the file has, or is about to
        self._alarm: asyncio.TimerHandle | None = None  # for the next deadman that is due
        self._line: asyncio.Queue[Callable[[], Awaitable[None]] | None] = asyncio.Queue()  # one leaves at a time; None: the end
        self._sending: asyncio.Task[None] | None = None
        self.ended: Counter[str] = Counter()  # commands by the status they ended with
        self.answer_seconds = Durations("amhrpd_answer_seconds", "until the last answer")

    # -- the line ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to send."""
        self._sending = asyncio.create_task(self._send_in_order())

    async def _send_in_order(self) -> None:
        while (leave := await self._line.get()) is not None:
            try:
                await leave()
            except Exception:
                log.exception("command_failed")

    async def stop(self) -> None:
        """Send what is in the line and every armed deadman, and await no more answers. What is open stays so in the file."""
        self._line.put_nowait(functools.partial(self._fire, all_armed=True))  # with what is armed by those before it
        self._line.put_nowait(None)
        if self._sending is not None:
            await self._sending  # takes a second at the most: nothing more comes into the line
        for command in self.open.values():
            command.release()

    async def command(self, request: CommandRequest, device_type: str, targets: list[Device], transaction: object) -> Command:
        """A command for these targets, as it left. Raises PAYLOAD_TOO_LARGE."""
        timeout_s = float(request.timeout or self._timeout_s)
        command = Command(device_type, request.command_name, to_json(request.payload or {}), timeout_s, len(targets))
        command.named, command.transaction = request.device_id or (), transaction
        command.check_size()
        if (wanted := request.deadman) is not None:
            payload, armed_by = to_json(wanted.payload or {}), command.command_id
            command.deadman = ArmedDeadman(wanted.command_name, payload, wanted.after, device_type, armed_by)
            self._command_of(command.deadman, targets).check_size()  # one that boards can't take is refused whole
        for device in targets if command.deadman is not None else ():
            self._file(device.device_id, command.deadman)  # before the command leaves, so that no crash comes between
        written = self._store.write_command(command.command_id, command.row, command.size_bytes)
        self._line.put_nowait(functools.partial(self._leave, command, targets, written))
        await command.has_left.wait()
        return command

    async def _leave(self, command: Command, targets: Collection[Device], written: asyncio.Future[None] | None) -> None:
        """Send a command once its row is written, or a second after it came."""
        try:
            await command.persist(written, command.came_s + self.PERSIST_TIMEOUT_S - time.monotonic())
            await self._send(command, targets)
        finally:
            command.has_left.set()

    async def _send(self, command: Command, targets: Collection[Device], fired: ArmedDeadman | None = None) -> None:
        """Send a command, which may be that of a deadman, to its targets, all at once; arm its own deadman on those that take
        it, and save what became of it.
        """
        assert command.recipients is not None
        frame, deadman = server_frame(WSMsgType.TEXT, command.message()), command.deadman
        self._await_answers(command)
        command.sent_s = time.monotonic()
        if deadman is not None:
            deadman.sent_s, deadman.due_at = command.sent_s, utc_now() + timedelta(seconds=deadman.after_s)
        for number, device in enumerate(targets, start=1):
            connection = device.connection
            disarms = device.deadman is not None and device.deadman.command_name == command.command_name
            # The pong to a ping right behind the frame shows that it has arrived.
            proof = server_frame(WSMsgType.PING, command.command_id.encode()) if disarms else b""
            if connection is None or not connection.send(frame + proof):
                log.warning("command_not_taken", device_id=device.device_id, command=command.command_id)
                if deadman is not None:
                    self._file(device.device_id, device.deadman)  # as it was
                continue
            command.recipients.add(device.device_id)
            if deadman is not None:
                self.set_deadman(device, deadman)
            elif fired is not None:
                connection.fired = fired
                tell_of(self._events, device)
            if number % self.TURN_TARGETS == 0:
                await asyncio.sleep(0)
        if deadman is not None:
            self.fire_due()  # sets the alarm
        if command.recipients:
            command.executed_at = utc_now()
            command.status = SENT if command.status == CREATED else command.status
            self._save(command)
        else:
            self._conclude(command, NO_DEVICES)
        what = {"command_name": command.command_name, "device_type": command.device_type, "status": command.status}
        log.info("command_routed", command_id=command.command_id, **what, targets=command.target_device_count)

    # -- deadmen (contract, section 4) ---------------------------------------------------------------------------------

    def _file(self, device_id: str, deadman: ArmedDeadman | None) -> None:
        """Have the file know a device's deadman."""
        if deadman is None and self._filed.pop(device_id, None) is not None:
            self._store.put("amhrpd_deadmen", device_id, None)
        elif deadman is not None and self._filed.get(device_id) is not deadman:
            self._filed[device_id] = deadman
            self._store.put("amhrpd_deadmen", device_id, lambda: (device_id, deadman.command_name, deadman.payload))

    def set_deadman(self, device: Device, deadman: ArmedDeadman | None) -> None:
        """Have a device's deadman in place of the one that it has; None disarms it."""
        if deadman is not None or self._filed.get(device.device_id) is device.deadman:  # else that of a command in the line
            self._file(device.device_id, deadman)
        device.deadman = deadman
        tell_of(self._events, device)

    def meet(self, device: Device) -> None:
        """A device is here anew: the deadman that it had when it was forgotten, or the last run ended, is its own again."""
        filed = self._filed.get(device.device_id)
        is_in_line = filed is not None and filed.armed_by != "" and filed.sent_s == -math.inf  # with a command yet to be sent
        self.set_deadman(device, device.deadman or (None if is_in_line else filed))
        if device.deadman is not None:
            self.fire_due()

    def fire_due(self) -> None:
        """Send the deadmen that are due, when their turn comes: behind what came before."""
        self._line.put_nowait(self._fire)

    async def _fire(self, *, all_armed: bool = False) -> None:
        """Send the deadmen that are due, or all, where they weren't sent on the device's connection yet: one command for all
        devices that are due by the same one. It waits for no row of its own. Sets the alarm for what is due next.
        """
        if self._alarm is not None:
            self._alarm.cancel()
        loop, due = asyncio.get_running_loop(), defaultdict[ArmedDeadman, list[Device]](list)
        next_due_s = math.inf
        for device in filter(None, map(self._registry.find, self._filed)):
            if (deadman := device.deadman) is None:
                continue  # that of a command which is still in the line
            if (due_s := deadman.sent_s + deadman.after_s) > loop.time() + 0.001 and not all_armed:  # its timers are that early
                next_due_s = min(next_due_s, due_s)
            elif device.connection is not None and device.connection.fired is not deadman:
                due[deadman].append(device)
        if next_due_s < math.inf:
            self._alarm = loop.call_at(next_due_s, self.fire_due)
        for deadman, devices in due.items():
            command = self._command_of(deadman, devices)
            log.warning("deadman_fired", command_id=command.command_id, armed_by=deadman.armed_by, targets=len(devices))
            await self._send(command, devices, deadman)

    def _command_of(self, deadman: ArmedDeadman, targets: Collection[Device]) -> Command:
        return Command(deadman.device_type, deadman.command_name, deadman.payload, self._timeout_s, len(targets))

    # -- answers and their end -----------------------------------------------------------------------------------------

    def restore(self, commands: Iterable[Row], deadmen: Iterable[Row]) -> None:
        """Know the commands of an earlier run, of which the open ones are open again, for the default timeout, and what it
        left armed, which is due as soon as its device is online.
        """
        for row in commands:
            command = Command.restore(row, self._timeout_s)
            if command.status in OPEN_STATUSES:
                self._await_answers(command)
            else:
                self._closed[command.command_id] = command
        for row in deadmen:
            self._filed.setdefault(row["device_id"], ArmedDeadman(row["command_name"], row["payload"]))
            if (device := self._registry.find(row["device_id"])) is not None:
                self.meet(device)

    def find(self, command_id: str) -> Command | None:
        """The command, where it is open or was lately."""
        return self.open.get(command_id) or self._closed.get(command_id)

    async def wait_for_answers(self, command: Command, timeout_s: float) -> None:
        """Return when the command is finished, the time is over, or the gateway stops."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):  # no task of its own: the row goes with the commit that was just called for
                await command.released.wait()
        written = self._store.write_command(command.command_id, command.row, command.size_bytes)
        await command.persist(written, self.PERSIST_TIMEOUT_S)  # what the caller is told of has to outlast a crash

    def acknowledge(self, device: Device, message: CommandAck) -> None:
        """A board answers a command. Raises COMMAND_NOT_FOUND."""
        command = self.note_arrival(device, message.command_id)
        if command is None:
            raise GatewayError(Code.COMMAND_NOT_FOUND, f"command {message.command_id[:64]!r} was not sent to this device")
        if not command.count_answer(device.device_id, message):
            return
        log.debug("command_answered", command_id=command.command_id, device_id=device.device_id, status=message.status)
        if command.completed_at is None:
            self._save(command)
            return
        if command.command_id in self.open and command.recipients is not None:
            self.answer_seconds.observe(time.monotonic() - command.came_s)
        self._conclude(command, ACK_ERROR if command.failed else ACK_SUCCESS)

    def note_arrival(self, device: Device, command_id: str) -> Command | None:
        """A command has arrived, as its acknowledgement or the pong to the ping behind it shows: the deadman of its name that
        was armed before is disarmed. Returns the command, None where it was never sent to this device.
        """
        command, deadman = self.find(command_id), device.deadman
        if command is None or not command.may_be_answered_by(device):
            return None
        if deadman is not None and command.command_name == deadman.command_name and command.sent_s > deadman.sent_s:
            self.set_deadman(device, None)
        return command

    def _await_answers(self, command: Command) -> None:
        self.open[command.command_id] = command
        command.expiry = asyncio.get_running_loop().call_later(command.timeout_s, self._expire, command)

    def _expire(self, command: Command) -> None:
        log.info("command_unanswered", command_id=command.command_id, status=command.status, answers=len(command.answers))
        self._conclude(command, ACK_TIMEOUT if command.status in OPEN_STATUSES else command.status)

    def _conclude(self, command: Command, status: str) -> None:
        """No answer is awaited any more; one that comes all the same moves the status on."""
        command.status = status
        command.release()
        if self.open.pop(command.command_id, None) is not None:
            self._closed[command.command_id] = command
            self.ended[status] += 1
        self._save(command)

    def _save(self, command: Command) -> None:
        """Have the file know a command as it is now, and tell of it."""
        if command.completed_at is None:
            self._store.put("command_logs", command.command_id, command.row, command.size_bytes)
        else:  # its caller may wait for it
            self._store.write_command(command.command_id, command.row, command.size_bytes)
        device_ids = command.recipients or command.named or command.answers
        self._events.tell("command", command.device_type, device_ids, command.record, of=command.command_id)

    def make_room(self) -> None:
        """Let go of the oldest commands that are too many; of those that are open the oldest end early."""
        for command in surplus(self.open.values(), self.MAX_COMMANDS, self.MAX_BYTES):
            log.warning("open_command_ended_early", problem="newer ones need its place")
            self._expire(command)
        for command in surplus(self._closed.values(), self.MAX_COMMANDS, self.MAX_BYTES):
            del self._closed[command.command_id]


class Gateway:
    """What happens when: the verbs of the contract. All of it belongs to the event loop's thread."""

    ACTIVITY_SAVE_INTERVAL_S = 60.0  # a device's last activity reaches the disk this often, and at its end
    STOP_TIMEOUT_S = 5.0  # for all boards to echo the close
    TURN_PAUSE_S = 0.001  # between the turns of boards that say much: for the others, and for the writer's thread

    def __init__(self, settings: Settings, store: Store) -> None:
        self.ping_interval_s = settings.ping_interval_s
        self._store = store
        self.registry = Registry(store)
        self.events = Events()
        self.dispatch = Dispatch(settings, store, self.registry, self.events)
        self.is_stopping = self.is_restored = False
        self.connections: set[DeviceSocket] = set()  # each is put in by itself, and goes when it is over
        self._turn = asyncio.Lock()  # of boards that say much, one at a time
        self.messages: Counter[type[BoardMessage]] = Counter()  # of boards
        self.refused: Counter[str] = Counter()  # of boards and callers, by code
        self.health_parts: list[Callable[[], Row]] = [store.figures]  # others add theirs to `GET /health`
        self.metrics = prometheus_client.CollectorRegistry()  # where others register their own figures
        self.loop_late_s = Durations("amhrpd_loop_late_seconds", "by how much timers are late")
        self._started_s = self._swept_s = self._saved_s = time.monotonic()

    # -- start and stop ------------------------------------------------------------------------------------------------

    def restore(self, loaded: Loaded) -> None:
        """Know what a file has. Its devices are offline, but for those that came meanwhile."""
        self.is_restored = True
        for row in reversed(loaded["devices"]):
            if self.registry.find(row["device_id"]) is None:
                self.registry.know(device := Device.restore(row))
                tell_of(self.events, device)  # where the file was opened late
        self.dispatch.restore(loaded["command_logs"], loaded["amhrpd_deadmen"])
        if any(loaded.values()):
            log.info("restored", **{table: len(rows) for table, rows in loaded.items()})

    async def stop(self) -> None:
        """Take no more commands, send every armed deadman, log every board off and close its connection with 1001; then
        listeners have heard it all and go. Takes a second for the commands, and STOP_TIMEOUT_S for the boards, at the most.
        """
        self.is_stopping = True
        await self.dispatch.stop()
        for connection in list(self.connections):
            connection.hang_up(WSCloseCode.GOING_AWAY, "the gateway stops")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.STOP_TIMEOUT_S):
                while self.connections:
                    await asyncio.sleep(0.01)
        self.events.close()

    # -- what callers ask for ------------------------------------------------------------------------------------------

    async def command(self, request: CommandRequest, transaction: object = None) -> Command:
        """Create a command, commit its row, which a store may hold up for a second at the most, send it to all targets at once,
        and return it as sent or without devices. Its `transaction` is kept with it. Raises GatewayError: nothing was sent.
        """
        device_type, targets = await self._targets(request)
        if self.is_stopping:
            raise GatewayError(Code.STOPPING, "the gateway is going down")
        return await self.dispatch.command(request, device_type, targets, transaction)

    async def _targets(self, request: CommandRequest) -> tuple[str, list[Device]]:
        """The type that a command's row has, and the devices that are online of those that are meant."""
        if request.device_id is None:
            device_type = request.device_type or EVERY_TYPE
            return device_type, self.registry.matching(None if device_type == EVERY_TYPE else device_type, is_online=True)
        devices = await self.find_devices(*request.device_id, timeout_s=Dispatch.PERSIST_TIMEOUT_S)  # who sends a stop waits
        for device in devices:
            if request.device_type not in (None, EVERY_TYPE, device.device_type):
                problem = f"device_type: device {device.device_id!r} is of type {device.device_type!r}"
                raise GatewayError(Code.INVALID_FIELD_VALUE, problem)
        types = {device.device_type for device in devices}
        return types.pop() if len(types) == 1 else EVERY_TYPE, [device for device in devices if device.is_online]

    def explain_no_devices(self, request: CommandRequest, command: Command) -> str:
        """Why a command found none: which ids are offline, or which types there are and how many of each are online."""
        if command.target_device_count:
            return f"{command.target_device_count} online, but none takes what it is sent"
        if request.device_id is not None:
            return f"offline: {', '.join(dict.fromkeys(request.device_id))}"
        devices = self.registry.matching()
        online = Counter(device.device_type for device in devices if device.is_online)
        types = [f"{name} ({online[name]} online)" for name in sorted({device.device_type for device in devices})]
        return f"no device of type {request.device_type} is online; types known: {', '.join(types[:50]) or 'none yet'}"

    async def find_devices(self, *device_ids: str, timeout_s: float | None = None) -> list[Device]:
        """The devices, each once, from the file where they aren't in memory. Raises DEVICE_NOT_FOUND, STORE_UNAVAILABLE."""
        found: dict[str, Device] = {}
        try:
            async with asyncio.timeout(timeout_s):
                for device_id in device_ids:
                    device = self.registry.find(device_id)
                    if device is None and (row := await self._store.row("devices", for_memory, device_id=device_id)):
                        device = self.registry.find(device_id) or Device.restore(row)  # it may have come meanwhile
                    if device is not None:
                        found[device_id] = device
        except TimeoutError:
            raise GatewayError(Code.STORE_UNAVAILABLE, "nobody can look now whether all of these were ever seen") from None
        if unknown := [device_id for device_id in device_ids if device_id not in found]:
            raise GatewayError(Code.DEVICE_NOT_FOUND, f"never seen: {', '.join(unknown)[:300]}")
        return list(found.values())

    async def delete_device(self, device_id: str) -> dict[str, int]:
        """Forget a device, its snapshots and its connection history: how many of each. Its deadman stays. One that comes back
        meanwhile is simply new. Raises DEVICE_NOT_FOUND, DEVICE_ONLINE, STORE_UNAVAILABLE.
        """
        (device,) = await self.find_devices(device_id)
        if device.is_online:
            raise GatewayError(Code.DEVICE_ONLINE, f"device {device_id!r} is online; only one that is offline can be deleted")
        self.registry.forget(device)
        try:
            deleted = await self._store.delete_device(device_id)
        except BaseException:  # what is left of it is still known
            if self.registry.find(device_id) is None:
                self.registry.know(device)
            raise
        log.info("device_deleted", device_id=device_id, **deleted)
        if (back := self.registry.find(device_id)) is not None:
            self._store.put("devices", device_id, back.row, back.size_bytes)  # its row may be gone with the others
        else:
            record = {"device_id": device_id, "deleted": True}
            self.events.tell("device", device.device_type, (device_id,), lambda: record, of=device_id)
        return deleted

    # -- what boards say -----------------------------------------------------------------------------------------------

    async def wait_for_turn(self) -> None:
        """Wait until the boards that say much and came before have had their turns, and the store keeps up with them."""
        async with self._turn:
            await asyncio.sleep(self.TURN_PAUSE_S)
        await self._store.wait_while_congested()

    def handle(self, connection: DeviceSocket, message: AnyBoardMessage) -> None:
        """A board says something: the first message that bears a type registers it. Raises GatewayError."""
        device = connection.device
        if device is None or isinstance(message, Registration):
            device = self._register(connection, message)
        now = utc_now()  # once a message: on some machines the clock takes longer than the rest
        match message:
            case Status():
                self._handle_status(device, message, now)
            case CommandAck():
                self.dispatch.acknowledge(device, message)
            case Alert():
                self._handle_alert(device, now, "alert", message.alert_type, message.message)
            case ErrorReport():
                self._handle_alert(device, now, "error", str(message.error_code), message.error_message, message.context)
        device.last_heartbeat = now
        self.messages[type(message)] += 1

    def _register(self, connection: DeviceSocket, message: AnyBoardMessage) -> Device:
        """A board says what it is, for the first time or again."""
        if message.device_type is None:
            code = Code.MISSING_REQUIRED_FIELD if isinstance(message, Registration) else Code.UNAUTHORIZED
            raise GatewayError(code, "device_type required: the first message, and every registration, must bear it")
        device = connection.device or self.registry.come_online(connection, message.device_type)
        device.device_type = message.device_type
        if isinstance(message, Registration) and message.metadata is not None:
            device.metadata = to_json(message.metadata)
        self._store.put("devices", device.device_id, device.row, device.size_bytes)
        self.dispatch.meet(device)
        return device

    def _handle_status(self, device: Device, message: Status, now: datetime) -> None:
        state = device.state = to_json(message.payload)
        device.state_timestamp = now
        row = (device.device_id, device.device_type, state, stored_time(now))
        self._store.put_telemetry("device_state_snapshots", row, state)
        self.events.tell("state", device.device_type, (device.device_id,), device.state_record, of=device.device_id)

    def _handle_alert(self, device: Device, now: datetime, kind: str, of_type: str, text: str, context: object = None) -> None:
        """A board says what a person should know."""
        device.alert = {"kind": kind, "type": of_type[:200], "message": text[:1000], "timestamp": format_time(now)}
        record = {"device_id": device.device_id, "device_type": device.device_type, **device.alert}
        self.events.tell("alert", device.device_type, (device.device_id,), lambda: record)
        log.warning(f"device_{kind}", device_id=device.device_id, type=of_type, message=text, context=context)

    def went_away(self, connection: DeviceSocket, event: str, code: int | None, reason: str) -> None:
        """A connection has ended, or is about to; `event` is `disconnected` or `timeout`. Its device is offline by that."""
        if (device := connection.device) is not None and device.connection is connection:
            self.registry.go_offline(device, connection, event, code, reason)
            tell_of(self.events, device)

    # -- what is due regularly -----------------------------------------------------------------------------------------

    def sweep(self, interval_s: float) -> None:
        """Every `interval_s`: ping, give up silent boards, save activity, make room, fire what couldn't be before."""
        now_s = time.monotonic()
        late_s = max(0.0, now_s - self._swept_s - interval_s)
        self.loop_late_s.observe(late_s)
        self._swept_s = now_s
        for connection in list(self.connections):
            connection.check_liveness(now_s, stood_still=late_s > interval_s)
        if now_s - self._saved_s >= self.ACTIVITY_SAVE_INTERVAL_S:
            self._saved_s = now_s
            for device in self.registry.matching(is_online=True):
                self._store.put("devices", device.device_id, device.row, device.size_bytes, urgent=False)
        self.registry.make_room()
        self.dispatch.make_room()
        self.dispatch.fire_due()

    def health(self) -> Row:
        """What `GET /health` answers (contract, section 6), from memory."""
        parts = [part() for part in self.health_parts]
        notice = "; ".join(filter(None, (part.pop("notice", None) for part in parts)))
        health: Row = {
            "status": "ok" if self._store.problem() is None else "degraded",
            "app": "AMHR-PD",
            "version": VERSION,
            "timestamp": format_time(utc_now()),
            "uptime_seconds": round(time.monotonic() - self._started_s, 3),
            "devices_online": self.registry.online,
            "devices_total": len(self.registry),
            "open_commands": len(self.dispatch.open),
        }
        for part in parts:
            health |= part
        return health | ({"notice": notice} if notice else {})


# ======================================================================================================================
# Device socket
# ======================================================================================================================

FRAMES_READ_BYTES = 4 << 10  # at once: as tiny frames they take 130 KB


def read_at_once(transport: Any, size_bytes: int) -> None:
    """Take so much of what waits on a connection at once; then the next one that sent something has its turn."""
    if isinstance(transport, asyncio.sslproto._SSLProtocolTransport):  # which would read 256 KB ahead of a board that waits
        transport.set_read_buffer_limits(32 << 10)  # two records: with less than one it could wait for its end for ever
    else:
        transport.max_size = size_bytes


def peer_of(request: web.BaseRequest) -> str:
    """The caller's address; IPv4 as IPv4 also where the socket is IPv6."""
    return (request.remote or "unknown").removeprefix("::ffff:")


class DeviceSocket:
    """One board's WebSocket: frames in, verbs out; frames to the board. The task that serves the handshake owns it all. aiohttp
    does the handshake and reads; what goes out is written here, since it goes to many boards at once and never waits.
    """

    CLOSE_TIMEOUT_S = 2.0  # for the board's echo, which the boards in the field send at once
    UNREAD_LIMIT_BYTES = 16 << 10  # a board that leaves this much unread doesn't read
    # Who says more in so short a time takes turns: some 4 ms of work, a frame more for every 256 bytes; real boards send 83.
    TURN_FRAMES, TURN_S = 250, 1.0

    def __init__(self, gateway: Gateway, settings: Settings, request: web.Request) -> None:
        if request.transport is None:
            raise ConnectionResetError("the board went away again")
        self.device_id = request.match_info["device_id"]
        self.peer = peer_of(request)
        self.device: Device | None = None  # once it is registered
        self.fired: ArmedDeadman | None = None  # the deadman that was sent on this connection
        self.opened_s = self._heard_s = self._said_s = time.monotonic()
        self._gateway = gateway
        self._settings = settings
        self._request = request
        self._transport = request.transport
        self._pinged_s = math.inf  # when the ping went out that nothing came behind yet
        self._has_heartbeat = False  # a board that sent one promised to go on (contract, section 5)
        self._has_ended = False  # it is over, or was hung up on: what arrives marks nobody online (contract, section 1)
        self._socket = web.WebSocketResponse(
            max_msg_size=settings.max_message_bytes + 1,  # the library refuses from its limit on
            autoping=False,
            autoclose=False,
            compress=False,  # boards would offer what they can't inflate (contract, section 1)
            protocols=("arduino",),
            decode_text=False,
        )

    async def serve(self) -> web.WebSocketResponse:
        """Do the handshake and serve the connection until it ends."""
        await self._socket.prepare(self._request)
        read_at_once(self._transport, FRAMES_READ_BYTES)
        self._gateway.connections.add(self)
        try:
            if self._gateway.is_stopping:
                self.hang_up(WSCloseCode.GOING_AWAY, "the gateway stops")
            await self._receive()
        except Exception:
            log.exception("connection_failed", device_id=self.device_id)
            self.hang_up(WSCloseCode.INTERNAL_ERROR, "internal error")
        finally:
            self._end(DISCONNECTED, None, "the connection was lost")
            self._gateway.connections.discard(self)
            self._transport.close()
            if (error := self._socket.exception()) is not None:  # it would keep all of this until a full collection
                error.__traceback__ = error.__context__ = None
        return self._socket

    def send(self, frames: bytes) -> bool:
        """Hand frames to the network, without waiting. False where the board doesn't take them."""
        transport = self._transport
        if self._has_ended or transport.is_closing() or transport.get_write_buffer_size() > self.UNREAD_LIMIT_BYTES:
            return False
        transport.write(frames)
        return True

    def hang_up(self, code: int, reason: str, event: str = DISCONNECTED) -> None:
        """End it from this side: its device is offline at once, and the board may echo the close. The first call says why."""
        if self._has_ended:
            return
        self.send(server_frame(WSMsgType.CLOSE, struct.pack("!H", code) + reason.encode()[:123]))
        self._end(event, code, reason)
        asyncio.get_running_loop().call_later(self.CLOSE_TIMEOUT_S, self._transport.abort)

    def _end(self, event: str, code: int | None, reason: str) -> None:
        if not self._has_ended:
            self._has_ended = True
            self._gateway.went_away(self, event, code, reason)

    def check_liveness(self, now_s: float, *, stood_still: bool) -> None:
        """Ping the board, or hang up on it where it is silent for too long; it isn't where nobody listened to it."""
        if self._has_ended or self._transport.is_closing():
            return
        if stood_still or not self._transport.is_reading():  # it waits for its turn
            self._said_s, self._heard_s, self._pinged_s = now_s, now_s, math.inf
        silent_s, settings = now_s - self._said_s, self._settings
        if self.device is None and silent_s > settings.registration_timeout_s:
            log.info("never_registered", device_id=self.device_id, peer=self.peer)
            self.hang_up(CLOSE_TIMED_OUT, f"not registered within {settings.registration_timeout_s:g} s")
        elif now_s - self._pinged_s > settings.ping_interval_s / 2:
            self.hang_up(CLOSE_TIMED_OUT, "no answer to pings", event=TIMEOUT)
        elif self._has_heartbeat and silent_s > settings.heartbeat_timeout_s:
            self.hang_up(CLOSE_TIMED_OUT, f"nothing came for {silent_s:.0f} s", event=TIMEOUT)
        elif self._pinged_s == math.inf and now_s - self._heard_s > settings.ping_interval_s:
            self._pinged_s = now_s
            self.send(server_frame(WSMsgType.PING, b""))

    async def _receive(self) -> None:
        """Receive until the connection ends; after a `hang_up` until the echo, since answers on their way still count."""
        frames, turn_s = 0, self.opened_s
        while True:
            frame = await self._socket.receive()
            self._heard_s, self._pinged_s = time.monotonic(), math.inf
            match frame.type:
                case WSMsgType.TEXT | WSMsgType.BINARY:
                    self._handle(frame)
                case WSMsgType.PING:
                    self.send(server_frame(WSMsgType.PONG, frame.data))
                case WSMsgType.PONG:
                    if self.device is not None:  # it is activity, and shows what has arrived
                        self._gateway.dispatch.note_arrival(self.device, bytes(frame.data).decode("ascii", "replace"))
                        self.device.last_heartbeat = self.device.last_heartbeat if self._has_ended else utc_now()
                case WSMsgType.CLOSE:
                    self._handle_close(frame.data)
                    return
                case _:
                    if isinstance(frame.data, WebSocketError):
                        is_too_big = frame.data.code == WSCloseCode.MESSAGE_TOO_BIG
                        reason = "a message was too big" if is_too_big else "the device broke the WebSocket protocol"
                        self._end(DISCONNECTED, frame.data.code, reason)
                    return
            if self._heard_s - turn_s > self.TURN_S:
                frames, turn_s = 0, self._heard_s
            frames += 1 + len(frame.data) // 256
            if frames >= self.TURN_FRAMES:
                if self.device is None:
                    self.hang_up(WSCloseCode.POLICY_VIOLATION, "said too much before it registered")
                self._transport.pause_reading()  # what waits, waits at the board
                await self._gateway.wait_for_turn()
                frames, turn_s = 0, time.monotonic()
                self._transport.resume_reading()

    def _handle(self, frame: aiohttp.WSMessage) -> None:
        try:
            if frame.type is WSMsgType.BINARY:
                raise GatewayError(Code.INVALID_MESSAGE, "binary frame: messages are JSON objects in text frames")
            message = decode_board_message(frame.data)
            if not self._has_ended:
                self._gateway.handle(self, message)
                self._has_heartbeat |= isinstance(message, Heartbeat)
            elif isinstance(message, CommandAck) and self.device is not None:
                self._gateway.dispatch.acknowledge(self.device, message)
        except GatewayError as error:
            text, code = str(error), error.code.name
            self._gateway.refused[code] += 1
            log.warning("message_refused", device_id=self.device_id, error_code=code, error=text)
            reply = {"message_type": "error", "error_code": code, "error_message": text, "error": text}
            self.send(server_frame(WSMsgType.TEXT, to_json(reply)))
        if self.device is not None:
            self._said_s = self._heard_s  # wrong as it may be, it is no silence

    def _handle_close(self, code: int | None) -> None:
        """The board closes the connection, or echoes our own close frame."""
        if not self._has_ended:
            self.send(server_frame(WSMsgType.CLOSE, struct.pack("!H", code or WSCloseCode.OK)))
            self._end(DISCONNECTED, code or 1005, "closed by the device")  # RFC 6455, section 7.1.5: it gave none


# ======================================================================================================================
# Page
# ======================================================================================================================

PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>AMHR-PD</title>
<link rel="icon" href="data:,">
<style>
:root {
  color-scheme: light dark; font: 16px/1.4 system-ui, sans-serif; color: var(--text); background: var(--page);
  --page: #f3f5f7; --card: #fff; --line: #dce1e7; --text: #161b22; --soft: #566270;
  --blue: #0a5bc8; --good: #0b6e38; --bad: #b3221a; --odd: #855300;
}
@media (prefers-color-scheme: dark) {
  :root { --page: #0e1216; --card: #181e25; --line: #2c3540; --text: #e8ecf1; --soft: #9ba8b7; }
  :root { --blue: #78b4ff; --good: #56cf93; --bad: #ff8a7d; --odd: #f3bd55; }
}
* { box-sizing: border-box; margin: 0; padding: 0; } body { word-break: break-word; overflow-wrap: anywhere; }
[hidden], p:empty, output:empty { display: none !important; }
h1 { font-size: 1.4rem; outline: none; } h2 { font-size: 1rem; } ul { list-style: none; } a { color: var(--blue); }
small, th, dt { color: var(--soft); font-weight: normal; }
.good { color: var(--good); } .bad { color: var(--bad); } .odd { color: var(--odd); }
button, .button, input, select, textarea {
  min-height: 2.75rem; padding: .4rem .8rem; font: inherit; color: inherit; background: var(--card);
  border: 1px solid var(--line); border-radius: .6rem;
}
input, select, textarea { width: 100%; } ::placeholder { color: var(--soft); }
textarea, pre, td { font: .9rem/1.4 ui-monospace, monospace; } button:disabled { opacity: .5; cursor: default; }
button, .button, summary { cursor: pointer; text-decoration: none; } .button { line-height: 1.8; }
#stop, #send { color: #fff; font-weight: 700; border: 0; background: #0a5bc8; }
#stop { flex: 1 0 9rem; min-height: 3.5rem; background: #b3221a; } #notice, #work { order: -1; flex-basis: 100%; }
header { position: sticky; top: 0; z-index: 2; padding: .6rem 1rem; background: var(--card); box-shadow: 0 0 1px var(--soft); }
header h1 { font-size: 1rem; } header a { color: inherit; text-decoration: none; } #link { flex: 99 1 9rem; }
header, .bar { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; } .bar select { width: auto; }
main, #fleet, #board, #plots { display: grid; gap: 1rem; grid-template-columns: minmax(0, 1fr); align-items: start; }
main { max-width: 92rem; margin: auto; padding: 1rem; } .old #boards, .old #board { opacity: .7; filter: grayscale(1); }
#boards { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
.card, .panel { background: var(--card); border: 1px solid var(--line); border-radius: .9rem; padding: .8rem 1rem; }
.card { position: relative; border-left: .35rem solid var(--good); }
.card.alert { border-color: var(--odd); } .card.offline { border-color: var(--bad); }
.card h2, figcaption, .x { display: flex; gap: .2rem .6rem; justify-content: space-between; }
.card a { color: inherit; } .card a::after { content: ""; position: absolute; inset: 0; } .card small { display: block; }
.card dl { margin-top: .5rem; } .card p { max-height: 4.2em; overflow: hidden; }
.card dl div { display: grid; gap: .7rem; grid-template-columns: minmax(0, 6.3rem) 1fr minmax(4.2rem, auto); }
.card dl div { align-items: center; } .card dt { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.card dd { text-align: right; font-weight: 600; line-height: 1.8; font-variant-numeric: tabular-nums; }
.card.offline :is(dd, svg) { color: var(--soft); font-weight: normal; }
svg { display: block; width: 100%; height: 1.2rem; overflow: visible; color: var(--blue); }
path { fill: none; stroke: currentColor; stroke-width: 1.6; stroke-linecap: round; vector-effect: non-scaling-stroke; }
.grid { stroke: var(--line); stroke-width: 1; }
.area { position: relative; } .area, .x { margin: .6rem .5rem .3rem 3.6rem; } .area svg { height: 8rem; }
.y { position: absolute; right: calc(100% + .5rem); transform: translateY(-50%); }
.plot small { font-size: .75rem; font-variant-numeric: tabular-nums; } .y, h2 span { white-space: nowrap; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; word-break: normal; overflow-wrap: normal; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; } pre { white-space: pre-wrap; }
form { display: grid; gap: .6rem; margin: .6rem 0; } label { display: grid; gap: .2rem; }
#commands li { padding: .5rem 0; border-top: 1px solid var(--line); } summary { min-height: 1.8rem; } #command { order: -1; }
@media (max-width: 60rem) { header { position: fixed; top: auto; bottom: 0; width: 100%; } body { padding-bottom: 11rem; } }
@media (min-width: 60rem) {
  main { grid-template-columns: minmax(0, 1fr) 22rem; }
  #plots { grid-template-columns: repeat(auto-fill, minmax(24rem, 1fr)); }
  #command { order: 0; position: sticky; top: 5.5rem; max-height: calc(100vh - 6.5rem); overflow: auto; }
}
</style>
<header>
  <h1><a href="#">AMHR-PD</a></h1>
  <p id="link" role="status">This page needs JavaScript, and a browser of 2021 or later.</p>
  <output id="said" role="alert"></output>
  <button id="stop" aria-label="Stop all boards">■ STOP ALL</button>
  <p id="notice" role="status" class="odd"></p>
  <p id="work" role="status"></p>
</header>
<main>
  <section id="fleet" aria-label="Boards">
    <input id="find" type="search" placeholder="Find: a name, a type, offline, alert" aria-label="Find boards">
    <ul id="boards"></ul>
    <p id="none" role="status"></p>
    <p id="unread-boards" role="status" class="odd">The boards are not read yet.</p>
  </section>
  <section id="board" aria-labelledby="name" hidden>
    <div><a href="#">← all boards</a><h1 id="name" tabindex="-1"></h1><p id="facts"></p><p id="alert" class="odd"></p></div>
    <div class="bar">
      <select id="range" aria-label="Range of the plots">
        <option value="0">1,000 states<option value="3600000">An hour<option value="86400000">A day</select>
      <a id="table" class="button" download>Download a table</a>
      <button id="delete" title="Only a board that is offline can be deleted">Delete …</button>
    </div>
    <p id="unread-readings" role="status" class="odd"></p>
    <div id="plots" aria-live="off"></div>
    <p id="unread-connections" role="status" class="odd"></p>
    <div class="panel"><h2>Connections</h2><div class="wide"><table><thead><tr><th>When<th>What<th>Why<th>Lasted</thead>
      <tbody id="history"></tbody></table></div></div>
    <div class="panel"><h2>Latest state, and what it says of itself</h2><pre id="record"></pre></div>
  </section>
  <details id="command" class="panel">
    <summary><strong>Send a command</strong></summary>
    <form id="form" autocomplete="off">
      <label>To <select id="to"></select></label>
      <label id="several" hidden>Boards, with commas between <input id="ids" spellcheck="false"></label>
      <label>Command <input id="verb" required maxlength="255" autocapitalize="off" placeholder="blink"></label>
      <label>Payload (JSON, may be empty) <textarea id="payload" rows="2" placeholder='{"count": 5}'></textarea></label>
      <button id="send">Send</button>
      <output id="answer" role="alert" class="bad"></output>
    </form>
    <h2>Latest commands</h2><p id="unread-commands" role="status" class="odd"></p>
    <ul id="commands"></ul>
  </details>
</main>
<script>
"use strict";
const $ = (id) => document.getElementById(id);
const SPARK_POINTS = 120, PLOT_POINTS = 1000, MAX_READINGS = 40, MAX_COMMANDS = 15;
const AWAY_MS = 11000;  // the gateway's sign of life comes every 5 s: two of them are missed
const order = new Intl.Collator(undefined, { numeric: true }).compare;
const base = location.origin + location.pathname;  // a bookmark may have a token in its address, which fetch refuses
const boards = new Map(), deviceOf = (id) => boards.get(id)?.device ?? {};
let shown = null, skewMs = 0;  // the board that is shown in depth; how far the gateway's clock is ahead

// -- what boards say goes into the page here, as text
function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}
function say(node, text, className = node.className) {
  if (node.textContent !== text) node.textContent = text;
  if (node.className !== className) node.className = className;
}
function makeShape(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
const SQUARE = { viewBox: "0 0 100 100", preserveAspectRatio: "none", "aria-hidden": "true" };  // is stretched
const draw = (...lines) => makeShape("svg", SQUARE, ...lines.map(([name, d]) => makeShape("path", { class: name, d })));

// -- times, numbers, words
const pause = (ms) => new Promise((done) => setTimeout(done, ms));
const millis = (time) => Date.parse(time + "Z");
const gatewayTime = (ms) => new Date(ms + skewMs).toISOString().slice(0, -1);
const clock = (ms, options = { timeStyle: "medium" }) => new Date(ms).toLocaleString(undefined, options);
const age = (time) => (Date.now() + skewMs - millis(time)) / 1000;
const ago = (time) => !time ? "never" : age(time) < 3 ? "now" : lasting(age(time)) + " ago";
function lasting(s) {
  const [unit, word] = s < 90 ? [1, "s"] : s < 5400 ? [60, "min"] : s < 129600 ? [3600, "h"] : [86400, "days"];
  return `${Math.max(0, Math.round(s / unit))} ${word}`;
}
const last = (list) => list[list.length - 1];
const counted = (n) => `${n} board${n === 1 ? "" : "s"}`;
const write = (value) => typeof value === "number" ? String(+value.toPrecision(7))
  : typeof value === "string" ? value : JSON.stringify(value);
const typeWords = (type) => /^\s|\s\s|\s$/.test(type) ? JSON.stringify(type) : type;  // blanks tell types apart
const targetWords = ({ device_type: type, device_id: ids }) => type === "*" ? "all boards"
  : type ? `every ${typeWords(type)}` : [ids].flat().join(", ");
const alertWords = ({ alert }) => alert ? `⚠ ${alert.type}: ${alert.message} (${ago(alert.timestamp)})` : "";
const boardWords = ({ device_type: type, is_online, last_heartbeat, deadman_at: due }) => typeWords(type)
  + ` · ${is_online ? "" : "last "}seen ${ago(last_heartbeat)}${due ? ` · deadman due ${clock(millis(due))}` : ""}`;
const stateWords = ({ is_online }) => link !== "live" ? [is_online ? "○ was online" : "○ was offline", ""]
  : is_online ? ["● online", "good"] : ["■ offline", "bad"];

// -- readings
function readings(state, prefix = "") {  // names with values; an object inside gives `outer.inner`
  return Object.entries(state ?? {}).slice(0, MAX_READINGS).flatMap(([name, value]) =>
    value && typeof value === "object" && !Array.isArray(value) && !prefix ? readings(value, name + ".")
      : [[prefix + name, value]]);
}
function remember(board, state, time) {
  for (const [name, value] of readings(state)) {
    const trail = board.trails.get(name) ?? [];
    if (typeof value !== "number" || (!trail.length && board.trails.size >= MAX_READINGS)) continue;
    board.trails.set(name, trail);
    trail.push([millis(time), value]);
    if (trail.length > (board === shown ? PLOT_POINTS : SPARK_POINTS)) trail.shift();
  }
}
const finite = (value) => Math.max(-Number.MAX_VALUE, Math.min(Number.MAX_VALUE, value));
function span(points) {
  const values = points.map(([, value]) => value), low = Math.min(...values), high = Math.max(...values);
  const size = Math.max(Math.abs(low), Math.abs(high)), room = size > 1e-300 ? size / 2 : 1;
  return high - low > Math.max(size * 1e-9, 1e-300) ? [low, high] : [finite(low - room), finite(high + room)];
}
const height = (value, low, high) => 100 - (value / 2 - low / 2) / (high / 2 - low / 2) * 100;  // halves don't run over
function trace(points, [low, high] = span(points), gapMs = Infinity) {
  const from = points[0][0], lengthMs = last(points)[0] - from || 1;
  return points.map(([ms, value], index) => {
    const x = (ms - from) / lengthMs * 100, isStart = index === 0 || ms - points[index - 1][0] > gapMs;
    return `${isStart ? "M" : "L"}${x.toFixed(2)} ${height(value, low, high).toFixed(2)}${isStart ? "h0" : ""}`;
  }).join("");
}

// -- asking the gateway
const reads = new Set();  // what is under way and makes way for a stop
async function ask(path, options = {}, limitMs = 15000) {  // an error with a `status` is a refusal; any other leaves it open
  const aborter = new AbortController(), timer = limitMs && setTimeout(() => aborter.abort(), limitMs);
  if (!options.method) reads.add(aborter);
  try {
    const how = { signal: aborter.signal, cache: "no-store", ...options };  // windows wait for each other at the cache
    const answer = await fetch(new URL(path, base), how), content = await answer.json();
    if (answer.status === 401) say($("notice"), "The gateway wants another token: load the page again to enter it.");
    if (content.error) throw Object.assign(new Error(content.error), { status: answer.status });
    return content;
  } catch (error) {
    throw error.status ? error : new Error(aborter.signal.aborted ? "no answer in time" : "the gateway can't be reached");
  } finally {
    clearTimeout(timer);
    reads.delete(aborter);
  }
}
async function read(path, isWanted = () => true, what = "") {  // until there is an answer; null if it's refused or unwanted
  const tell = (problem) => { if (what && isWanted()) say($("unread-" + what), problem); };
  for (let pauseMs = 500; ; pauseMs = Math.min(2 * pauseMs, 4000)) {
    while (document.hidden) await pause(500);
    if (!isWanted()) return null;
    try {
      const content = await ask(path);
      tell("");
      return isWanted() ? content : null;
    } catch (error) {
      const isFinal = error.status < 500 && ![408, 429].includes(error.status);
      tell(`The ${what} can't be read: ${error.message}.${isFinal ? "" : " Trying again …"}`);
      if (isFinal) return null;
      await pause(pauseMs * (0.5 + Math.random()));  // pages that lost the gateway together don't come back together
    }
  }
}
async function look() {
  const health = await read("health");
  if (health?.timestamp) {  // without the token it says no more than the status
    const problem = health.status === "ok" ? "" : `The gateway is degraded: ${health.database}.`;
    say($("notice"), `${problem} ${health.notice ?? ""}`.trim());
  }
  const online = await ask("devices?online=true").catch(() => null);
  for (const { device_id, last_heartbeat } of online?.devices ?? [])  // a heartbeat is no event
    Object.assign(deviceOf(device_id), { last_heartbeat });
  setTimeout(look, 5000);
}

// -- what happens: one stream for all windows, as a browser has six connections to a gateway and a stop needs one of them
const acts = { device: onDevice, state: onState, command: onCommand, alert: onAlert };
const me = Date.now() + Math.random(), channel = window.BroadcastChannel && new BroadcastChannel("amhrpd");
let link = "connecting";  // or "live", or "away"
let stream = null, dueMs = 0, heardMs = 0, lastLive = 0;  // when a new stream is due; when the gateway was heard
let held = null;  // what happens while the boards are read, for afterwards
function join() {  // while nobody sees this window, others have its connections
  if (stream) tellOthers("bye");
  makeWay();
  letGo();
  [link, heardMs] = ["connecting", performance.now()];
  if (!document.hidden) follow();
}
function tellOthers(name, data) { channel?.postMessage({ from: me, name, data }); }
function onWord({ from, name, data }) {  // of another window
  if (name === "way") makeWay();
  else if (name === "bye") { if (!stream) letGo(0); }
  else if (stream?.readyState === EventSource.OPEN && me < from) {  // the oldest stream is enough for all
    if (name === "open") tellOthers("alive", "{}");
  } else { letGo(); hear(name, data); }
}
function letGo(ms = Infinity) {  // of the stream, and make a new one in a while
  stream?.close();
  stream = null;
  dueMs = performance.now() + ms;
}
function follow() {
  letGo(AWAY_MS);
  stream = new EventSource(new URL("events?alive=1", base));
  stream.onerror = () => { heardMs = -Infinity; };  // it comes back by itself, after a while that the gateway told it
  for (const name of ["open", "alive", ...Object.keys(acts)])
    stream.addEventListener(name, ({ data = "{}" }) => {
      tellOthers(name, data);
      hear(name, data);
    });
}
function hear(name, data) {
  [heardMs, lastLive] = [performance.now(), Date.now()];
  dueMs = heardMs + (stream ? AWAY_MS : 0.7 * AWAY_MS);
  if (name === "open" || link !== "live") load();
  link = "live";
  const content = JSON.parse(data);
  if (name === "alive" && content.timestamp) skewMs = millis(content.timestamp) - Date.now();
  if (name in acts) held ? held.push(() => acts[name](content)) : acts[name](content);
  paintLater();
}
function makeWay() {  // for a stop
  reads.forEach((aborter) => aborter.abort());
  if (!channel || link !== "live") letGo(2000);
}
async function load() {
  const mine = held = [], answer = await read("devices", () => held === mine, "boards");
  if (held === mine) held = null;
  if (!answer) return;
  [...boards.keys()].filter((id) => !answer.devices.some(({ device_id }) => device_id === id)).forEach(forget);
  answer.devices.sort((one, other) => order(other.device_id, one.device_id)).forEach(onDevice);
  mine.forEach((act) => act());
  boards.forEach((board) => { board.isFilled = false; fill(board); });
  if (shown) loadHistory();
  route();
  paintLater();
  const log = await read(`command-logs?limit=${MAX_COMMANDS}`, () => !held, "commands");
  log?.logs.reverse().forEach((row) => onCommand(row));
}
function onDevice(device) {
  const id = device.device_id, board = boards.get(id) ?? { id, trails: new Map() };
  if (device.deleted) return forget(id);
  if (!boards.has(id)) addCard(board, device.state);
  const isNews = board.device?.is_online !== device.is_online || board.device.connected_at !== device.connected_at;
  board.device = device;
  if (board === shown && isNews) loadHistory();
}
function onState({ device_id, state, timestamp }) {
  const board = boards.get(device_id);
  if (!board || board.device.state_timestamp === timestamp) return;
  Object.assign(board.device, { state, state_timestamp: timestamp, last_heartbeat: timestamp });
  remember(board, state, timestamp);
}
function onAlert({ device_id, ...alert }) { Object.assign(deviceOf(device_id), { alert }); }
function forget(id) {
  boards.get(id)?.card.remove();
  boards.delete(id);
  if (shown?.id === id) location.hash = "";
}

// -- painting: a few times a second, and only what is in view
let timer = 0;
function paintLater() { timer ||= setTimeout(() => requestAnimationFrame(paint), 300); }
function paint() {
  timer = 0;
  if (performance.now() > dueMs) follow();
  if (performance.now() - heardMs > AWAY_MS) link = "away";
  document.body.classList.toggle("old", link !== "live");
  paintFleet();
  paintTargets();
  for (const board of boards.values()) if (board.isSeen) paintCard(board);
  if (shown) paintBoard(shown);
}
const watcher = new IntersectionObserver((entries) => {
  for (const { target: { board }, isIntersecting } of entries) {
    board.isSeen = isIntersecting;
    if (!board.isFilled) fill(board);
  }
  paintLater();
}, { rootMargin: "200px" });
async function fill(board) {  // with its newest states; where it is shown in depth, with the range that is chosen
  const mine = board.filling = {}, isWanted = () => board.filling === mine && (board.isSeen || board === shown);
  const [points, what] = board === shown ? [PLOT_POINTS, "readings"] : [SPARK_POINTS];
  const lengthMs = what ? Number($("range").value) : 0, begin = Date.now() - lengthMs, parts = lengthMs ? 50 : 1, rows = [];
  for (let part = 0; part < parts; part += 1) {  // as many states of each part of a time until now
    const [since, until] = [part, part + 1].map((at) => gatewayTime(begin + at * lengthMs / parts));
    const path = `state-history/${board.id}?limit=${points / parts}${lengthMs ? `&since=${since}&until=${until}` : ""}`;
    const answer = await read(path, isWanted, what);
    if (!answer) return;
    rows.push(...answer.states.reverse());
  }
  board.isFilled = true;
  board.trails.clear();
  for (const { state_data, timestamp } of rows) remember(board, state_data, timestamp);
  const { state, state_timestamp: at } = board.device;
  if (at > (last(rows)?.timestamp ?? "")) remember(board, state, at);  // it came meanwhile
  paintLater();
}
function addCard(board, state) {
  Object.assign(board, { word: make("span"), body: make("div") });
  const head = make("h2", {}, make("a", { href: "#/" + board.id }, board.id), board.word);
  const style = `min-height: ${4.8 + 1.8 * Math.min(6, readings(state).length)}rem`;  // as high as it will be when it's seen
  board.card = make("li", { className: "card", style, board }, head, board.body);
  const next = [...$("boards").children].find((card) => order(card.board.id, board.id) > 0);
  $("boards").insertBefore(board.card, next ?? null);
  boards.set(board.id, board);
  watcher.observe(board.card);
}
function paintCard({ device, trails, card, word, body }) {
  const all = readings(device.state), hasAlert = device.alert && age(device.alert.timestamp) < 3600;
  const rows = all.slice(0, 6).map(([name, value]) => make("div", {}, make("dt", { title: name }, name),
    draw(...trails.has(name) ? [["spark", trace(trails.get(name))]] : []), make("dd", {}, write(value).slice(0, 60))));
  card.className = `card ${!device.is_online ? "offline" : hasAlert ? "alert" : ""}`;
  say(word, ...stateWords(device));
  body.replaceChildren(make("small", {}, boardWords(device)), make("p", { className: "odd" }, alertWords(device)),
    make("dl", {}, ...rows), make("small", {}, all.length > 6 ? `and ${all.length - 6} more` : ""));
}
function paintFleet() {
  const all = [...boards.values()], offline = all.filter(({ device }) => !device.is_online).length;
  const sought = $("find").value.trim().toLowerCase(), isRead = !$("unread-boards").textContent;
  const words = ({ id, device }) => [id, device.device_type, stateWords(device)[0], device.alert ? "alert" : ""].join(" ");
  for (const board of all) board.card.hidden = !words(board).toLowerCase().includes(sought);
  const none = `No board has connected yet. Boards connect to ${new URL("ws/its_id", base).href.replace("http", "ws")}.`;
  say($("none"), isRead && !all.length ? none : "");
  const live = `● live${isRead ? ` · ${all.length - offline} of ${counted(all.length)} online` : ""}`;
  const away = `■ No news from the gateway${lastLive ? ` since ${clock(lastLive)}` : ""}. Trying again …`;
  say($("link"), ...{ connecting: ["○ connecting …", ""], live: [live, "good"], away: [away, "bad"] }[link]);
  document.title = (link === "away" ? "away · " : offline ? `${offline} offline · ` : "") + "AMHR-PD";
}

// -- one board in depth
let fleetY = 0;  // where one was among the cards
history.scrollRestoration = "manual";
function route() {
  const board = boards.get(location.hash.replace(/^#\/?/, "")) ?? null;
  if (board === shown) return;
  if (shown) Object.assign(shown, { trails: new Map(), isFilled: false });
  else fleetY = scrollY;
  shown = board;
  $("fleet").hidden = Boolean(board);
  $("board").hidden = !board;
  scrollTo(0, board ? 0 : fleetY);
  if (!board) return;
  $("history").replaceChildren();
  for (const what of ["readings", "connections"]) say($("unread-" + what), "");
  say($("name"), board.id);
  $("name").focus();
  $("table").href = new URL(`state-history/${board.id}?format=excel&limit=100000`, base);
  paintTargets();
  $("to").value = JSON.stringify({ device_id: board.id });
  paintBoard(board);
  fill(board);
  loadHistory();
}
async function loadHistory() {
  const board = shown, cell = (text, className = "") => make("td", { className }, text);
  const path = `device-connection-history/${board.id}?limit=30`;
  const answer = await read(path, () => board === shown, "connections");
  if (answer) $("history").replaceChildren(...answer.events.map(({ event, timestamp, details }) => make("tr", {},
    cell(clock(millis(timestamp), { dateStyle: "short", timeStyle: "medium" })),
    cell(event, event === "connected" ? "good" : "bad"), cell(String(details?.reason ?? details?.peer ?? "")),
    cell(details?.seconds_connected === undefined ? "" : lasting(details.seconds_connected)))));
}
function paintBoard({ device, trails }) {
  const [word, className] = stateWords(device), since = device.is_online ? ` · connected ${ago(device.connected_at)}` : "";
  say($("facts"), `${word} · ${boardWords(device)}${since}`, className);
  say($("alert"), alertWords(device));
  $("delete").disabled = device.is_online;
  say($("record"), JSON.stringify({ state: device.state, metadata: device.metadata }, null, 2));
  $("plots").replaceChildren(...[...trails].map(plot));
}
function plot([name, points]) {
  const [from] = points[0], [to, number] = last(points), marks = ticks(...span(points)), range = [marks[0], last(marks)];
  const gapMs = Math.max(10000, 24 * (to - from) / points.length);  // a line is broken where the board was away
  const options = to - from > 86400e3 ? { dateStyle: "short" } : { timeStyle: to - from > 300e3 ? "short" : "medium" };
  const heights = marks.map((mark) => height(mark, ...range)), grid = heights.map((y) => `M0 ${y}H100`).join("");
  return make("figure", { className: "plot panel" },
    make("figcaption", {}, make("strong", {}, name), make("output", {}, write(number))),
    make("div", { className: "area" }, draw(["grid", grid], ["line", trace(points, range, gapMs)]),
      ...marks.map((mark, index) => make("small", { className: "y", style: `top: ${heights[index]}%` }, write(mark)))),
    make("div", { className: "x" }, ...[from, (from + to) / 2, to].map((ms) => make("small", {}, clock(ms, options)))));
}
function ticks(low, high) {  // about four round numbers that hold all
  const rough = high / 3 - low / 3, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((part) => part * power).find((part) => part >= rough);
  const first = Math.floor(low / step), end = Math.ceil(high / step);
  return Array.from({ length: end - first + 1 }, (_, index) => finite((first + index) * step));
}
$("table").onclick = async () => {
  const answer = await fetch($("table").href, { method: "HEAD" }).catch(() => null);
  const isMore = answer?.headers.get("X-AMHRPD-More") === "true";
  say($("work"), isMore ? "The table has the newest 100,000 states, and there are older ones." : "");
};
$("delete").onclick = async () => {
  const { id } = shown, tell = (text) => say($("work"), text);
  if (!confirm(`Forget ${id}, with its readings and its connection history?`)) return;
  tell(`Forgetting ${id} goes on; a long history takes minutes …`);
  try {
    const { deleted } = await ask(`devices/${id}`, { method: "DELETE" }, 0);
    tell(`${id} is forgotten, with ${deleted.snapshots.toLocaleString()} states.`);
  } catch (error) {
    tell(error.status ? `Not deleted: ${error.message}.` : `Nobody knows whether ${id} is deleted: no answer.`);
  }
};

// -- commands
let targets = "", gone = "";  // what can be chosen; what was chosen and is there no more: no other takes its place
function paintTargets() {
  const counts = new Map([["*", 0]]);  // how many of a type are online
  for (const { device: { device_type, is_online } } of boards.values())
    for (const type of ["*", device_type]) counts.set(type, (counts.get(type) ?? 0) + is_online);
  const types = [...counts].map(([device_type, n]) => [{ device_type }, `${targetWords({ device_type })} (${n} online)`]);
  const ids = [...boards.keys()].sort(order).map((device_id) => [{ device_id }, device_id]);
  const options = [...types, [{ device_id: [] }, "several boards …"], ...ids]
    .map(([target, words]) => [JSON.stringify(target), words]);
  const chosen = $("to").value;
  $("several").hidden = chosen !== '{"device_id":[]}';
  if (chosen) gone = options.some(([value]) => value === chosen) ? "" : targetWords(JSON.parse(chosen));
  if (gone) options.unshift(["", `nobody: ${gone} is not there any more`]);
  if (JSON.stringify(options) === targets || (document.activeElement === $("to") && !gone)) return;
  targets = JSON.stringify(options);
  $("to").replaceChildren(...options.map(([value, words]) => make("option", { value }, words)));
  $("to").value = gone ? "" : chosen || options[0][0];
}
async function send(target, command_name, payload, tell, tries = 1) {
  const body = JSON.stringify({ ...target, command_name, payload }), headers = { "Content-Type": "application/json" };
  const beganMs = Date.now(), text = JSON.stringify([command_name, payload]), to = targetWords(target);
  for (let left = tries; left; left -= 1)
    try {
      return onCommand(await ask("command", { method: "POST", headers, body, keepalive: true }, 5000), to);
    } catch (error) {
      if (error.status && error.status !== 500) throw error;
      tell(`Nobody knows whether ${command_name} was sent: ${error.message}. It is looked up when there is an answer.`);
    }
  await read("health");
  await pause(3000);  // what lay in a gateway that stood still is sent when that goes on
  const log = await read(`command-logs?limit=100&since=${gatewayTime(beganMs)}`);
  const row = log?.logs.find((row) => JSON.stringify([row.command_name, row.payload]) === text);
  if (log && !row) throw new Error("the gateway knows nothing of it");
  return row && onCommand(row, to);
}
function outcome({ status, target_device_count: targets, success_count: good, response_data }) {
  const answered = Object.keys(response_data ?? {}).length;
  return {
    ack_success: [`✓ ${counted(targets)} answered success`, "good"],
    ack_error: [`✗ ${counted(answered - good)} failed, ${good} of ${targets} succeeded`, "bad"],
    ack_timeout: [`✗ no answer from ${targets - answered} of ${counted(targets)}`, "bad"],
    no_devices: ["✗ no board was online for it", "bad"],
  }[status] ?? [`… sent, ${answered} of ${counted(targets)} answered`, ""];
}
function onCommand(news, to) {  // `to` is known of what was sent from here
  const id = "command " + news.command_id, item = $(id) ?? make("li", { id },
    make("strong"), make("p"), make("details", {}, make("summary"), make("pre")));
  const row = item.row = "response_data" in news ? news : { ...news, ...item.row };  // an answer may be there before it
  const type = row.device_type === "*" ? counted(row.target_device_count) : typeWords(row.device_type);
  const lines = Object.entries(row.response_data ?? {}).slice(0, 200)
    .map(([id, answer]) => `${id}: ${answer?.status} ${answer?.payload ? JSON.stringify(answer.payload) : ""}`);
  const [words, className] = outcome(row), time = clock(millis(row.created_at));
  const [name, state, summary, answers] = item.querySelectorAll("strong, p, summary, pre");
  item.to = to ?? item.to;
  say(name, `${row.command_name} → ${item.to ?? type}`);
  say(state, words, className);
  say(summary, `${time} · details`);
  say(answers, [`payload ${JSON.stringify(row.payload)}`, ...lines].join("\n"));
  if (row.command_id === stop) say($("said"), `Stop, ${time}: ${words}`, className);
  const list = $("commands"), next = [...list.children].find((other) => other.row.created_at <= row.created_at);
  if (!item.isConnected) list.insertBefore(item, next ?? null);
  if (list.children.length > MAX_COMMANDS) list.lastElementChild.remove();
  return row;
}
$("form").onsubmit = async (event) => {
  event.preventDefault();
  const tell = (text) => say($("answer"), text);
  paintTargets();
  try {
    if (!$("to").value) throw new Error(`${gone} is not there any more. Choose whom to send it to.`);
    const target = JSON.parse($("to").value), payload = JSON.parse($("payload").value || "{}");
    if (Array.isArray(target.device_id)) target.device_id = $("ids").value.split(",").map((id) => id.trim());
    const row = await send(target, $("verb").value.trim(), payload, tell);
    if (row) tell(row.detail ?? "");
  } catch (error) {
    tell(error instanceof SyntaxError ? `The payload is no JSON: ${error.message}` : `Not sent: ${error.message}`);
  }
};
let stop = null;  // the latest press, then the id of its command
$("stop").onclick = async () => {
  const press = stop = {}, tell = (text) => { if (stop === press) say($("said"), text, "bad"); };
  tell("STOP: no answer yet …");
  makeWay();
  tellOthers("way");
  try {
    const row = await send({ device_type: "*" }, "stop", {}, tell, 3);
    if (row && stop === press) stop = row.command_id;
    if (row) onCommand(row);
  } catch (error) { tell(`STOP WAS NOT SENT: ${error.message}`); }
};

// -- begin
$("find").oninput = $("to").onchange = paintLater;
$("range").onchange = () => fill(shown);
$("command").open = innerWidth >= 960;
if (channel) channel.onmessage = ({ data }) => { if (!document.hidden) onWord(data); };
addEventListener("hashchange", route);
document.addEventListener("visibilitychange", join);
setInterval(paintLater, 1000);  // the page says how long ago things were
look();
join();
</script>
"""
"""What `GET /` answers (contract, section 8): looks, words and behaviour, in this order. It asks the routes below."""


def page_headers(page: str) -> dict[str, str]:
    """What a browser is told to allow the page: its own style and script, its own origin, nobody's frame."""
    policy = "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
    for tag in ("style", "script"):
        content = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        policy += f"; {tag}-src 'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
    return {
        "Content-Security-Policy": f"{policy}; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


# ======================================================================================================================
# REST
# ======================================================================================================================

MAX_BODY_BYTES = 128 << 10  # a command's 1,000 longest ids and its payloads
READ_BYTES = 16 << 10  # at once, of asyncio's 256 KiB
BODY_TIMEOUT_S = 10.0
BROKEN_OFF = (ConnectionError, aiohttp.ClientError, HttpProcessingError, web.RequestPayloadError)  # how reading a body can end
UNREAD_TIMEOUT_S = 30.0  # for a peer that takes nothing of what waits for it, which would stay in memory for ever

# -- what callers ask --------------------------------------------------------------------------------------------------


class NoQuery(msgspec.Struct, forbid_unknown_fields=True):
    """No parameters."""


class DevicesQuery(NoQuery):
    """`GET /devices`."""

    device_type: str | None = None
    online: Literal["true", "false"] | None = None


EventName = Literal["device", "state", "command", "alert"]
EventNames = Annotated[list[EventName], msgspec.Meta(title="device, state, command, alert, or several with commas between")]


class ListenQuery(NoQuery):
    """`GET /events`."""

    device_id: DeviceIds | None = None
    event: EventNames | None = None
    device_type: str | None = None
    last_event_id: str | None = None
    alive: Literal["1"] | None = None


MAX_ROWS = {"json": 1000, "csv": 100_000, "excel": 100_000}  # contract, section 6
LIMIT_TITLE = f"a whole number from 1 to {MAX_ROWS['json']}, or with format=csv or excel to {MAX_ROWS['csv']}"
Limit = Annotated[int, msgspec.Meta(ge=1, title=LIMIT_TITLE, extra_json_schema={"maximum": MAX_ROWS["json"]})]


class HistoryQuery(NoQuery):
    """`GET /state-history/{device_id}`, and what every history takes."""

    table: ClassVar[TableName] = "device_state_snapshots"
    rows_name: ClassVar[str] = "states"  # in the answer

    limit: Limit = 100
    since: Moment | None = None
    until: Moment | None = None
    before_id: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)] | None = None
    format: Literal["json", "csv", "excel"] = "json"

    def __post_init__(self) -> None:
        if self.limit > MAX_ROWS[self.format]:
            raise GatewayError(Code.INVALID_FIELD_VALUE, wrong_value("limit", self.limit, Limit))

    def filters(self, last: Row | None = None) -> dict[str, Any]:
        """The rows that are wanted, behind `last` where that is known, in the words of Store's `history`."""
        before = self.before_id if last is None else last[next(iter(COLUMNS[self.table]))]
        own = {name: value for name in ("event", "status", "device_type") if (value := getattr(self, name, None)) is not None}
        return {"since": stored_time(self.since), "until": stored_time(self.until), "before": before, **own}


class ConnectionHistoryQuery(HistoryQuery):
    """`GET /device-connection-history/{device_id}`."""

    table = "device_connection_logs"
    rows_name = "events"

    event: Literal["connected", "disconnected", "timeout"] | None = None


class CommandLogsQuery(HistoryQuery):
    """`GET /command-logs`."""

    table = "command_logs"
    rows_name = "logs"

    before_id: CommandName | None = None  # type: ignore[assignment] # commands have ids of letters
    status: Literal["created", "sent", "ack_success", "ack_error", "ack_timeout", "no_devices"] | None = None
    device_type: str | None = None


def query_values(request: web.Request, kind: type[msgspec.Struct]) -> dict[str, Any]:
    """The query's parameters as values for a type. Raises GatewayError for one that is given twice."""
    known = fields_of(kind)
    if twice := [name for name in request.query if len(request.query.getall(name)) > 1]:
        raise GatewayError(Code.INVALID_FIELD_VALUE, f"query parameter {twice[0][:64]!r} is given more than once")
    return {name: from_text(text, known[name].type) if name in known else text for name, text in request.query.items()}


async def read_body(request: web.Request) -> bytes:
    """The body, whatever its content type says it is. Raises GatewayError, HTTPRequestEntityTooLarge."""
    encoding = request.headers.get("Content-Encoding", "identity").lower()
    if encoding != "identity":
        raise GatewayError(Code.UNSUPPORTED_MEDIA_TYPE, f"Content-Encoding {encoding[:64]!r}: send the body uncompressed")
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await request.read()
    except TimeoutError:
        raise GatewayError(Code.REQUEST_TIMEOUT, f"the body didn't arrive within {BODY_TIMEOUT_S:g} s") from None
    except BROKEN_OFF as error:
        error.__traceback__ = None  # the reader keeps it, and it would keep what was read
        raise GatewayError(Code.INVALID_MESSAGE, f"the body ended early or is broken: {type(error).__name__}") from None


# -- what they get -----------------------------------------------------------------------------------------------------

PIECE_BYTES = 16 << 10  # of an answer that is made as it is taken; about a millisecond of encoding
MORE = "X-AMHRPD-More"  # the header of a history that has more rows than were asked for
CSV_PAGE_ROWS = 1000  # contract, section 6: as many are in memory at a time, and decide on the columns
MAX_STATE_COLUMNS = 1000  # boards may use as many keys as they like; more are in `other`


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """JSON, with a line end for those who read it in a shell."""
    return web.Response(body=to_json(content) + b"\n", status=status, content_type="application/json", headers=headers)


async def in_pieces(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """An answer of any length, PIECE_BYTES at a time, as it is made and taken; others have their turn between."""
    piece = bytearray()
    async for part in parts:
        piece += part
        if len(piece) >= PIECE_BYTES:
            yield bytes(piece)
            piece.clear()
            await asyncio.sleep(0)
    yield bytes(piece)


async def csv_history(query: HistoryQuery, read: Callable[..., Awaitable[list[Row]]], rows: list[Row]) -> AsyncIterator[bytes]:
    """The rows that a query wants as CSV, in parts; `rows` are the first of them, and the others are `read` as it is taken."""
    is_of_states, is_for_people = query.table == "device_state_snapshots", query.format == "excel"
    header = list(COLUMNS[query.table])
    if is_of_states:
        keys = dict.fromkeys(key for row in rows for key in state_of(row) if key not in ("timestamp", "other"))
        header = ["timestamp", *itertools.islice(keys, MAX_STATE_COLUMNS), "other"]
    yield ("\ufeff" if is_for_people else "").encode() + csv_line(header)  # a mark by which spreadsheets know UTF-8
    left = query.limit
    while rows:
        for row in rows:
            state = state_of(row) if is_of_states else {}
            known = [state.pop(key, None) for key in header[1:-1]]
            cells = [row["timestamp"], *known, state or None] if is_of_states else list(row.values())
            yield csv_line(cells, is_for_people=is_for_people)
        left -= len(rows)
        last, rows = rows[-1], []  # one page in memory at a time
        rows = await read(min(left, CSV_PAGE_ROWS), **query.filters(last)) if left else []


def state_of(snapshot: Row) -> dict[str, Any]:
    """The state that a row has."""
    state = json_decoder.decode(snapshot["state_data"] or b"null")
    return state if isinstance(state, dict) else {"other": state}  # the earlier backend left there what it liked


_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}\.[0-9]{6}")
_MARK = "=+@\t\r\n\uff1d\uff0b\uff0d\uff20-"  # what a formula begins with; those of four digits are full-width
_NUMBER = r"[+-]?[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?(?:[;\t]|\Z)"
_FORMULA = re.compile(rf"(?:\A|(?<=[;\t]))(?=[{_MARK}])(?!{_NUMBER})")  # some spreadsheets split at `;` or tabs
_TO_QUOTE = re.compile(r'[,;"\t\r\n]')


def csv_line(values: Iterable[Any], *, is_for_people: bool = False) -> bytes:
    """Values as a line of CSV (RFC 4180): null is empty, what is no text is JSON, a formula has a `'` in front."""
    cells = []
    for value in values:
        text = "" if value is None else value if isinstance(value, str) else to_json(value).decode()
        if is_for_people and _TIME.fullmatch(text):  # as spreadsheets know it
            text = f"{text[:10]} {text[11:23]}"
        text = _FORMULA.sub("'", text)
        cells.append('"' + text.replace('"', '""') + '"' if _TO_QUOTE.search(text) else text)
    return (",".join(cells) + "\r\n").encode()


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def error_of(request: web.BaseRequest, problem: BaseException | None) -> GatewayError:
    """The gateway's own error for one that a handler, the router or the HTTP library raised."""
    match problem:
        case GatewayError():
            return problem
        case ConnectionError():
            return GatewayError(Code.INVALID_MESSAGE, "the caller went away")
        case LineTooLong() | HttpProcessingError(message="Too many headers received"):  # which has no class of its own
            text = "a request line may have 16 KB, a header 4 KB, a request 32 headers; what is longer goes into a body"
            return GatewayError(Code.PAYLOAD_TOO_LARGE, text)
        case HttpProcessingError():
            text = "not valid HTTP; in a URL a blank is written %20, and ü %C3%BC (curl -G --data-urlencode does it)"
            return GatewayError(Code.INVALID_MESSAGE, text)
        case web.HTTPNotFound():
            return GatewayError(Code.NOT_FOUND, f"no such route: {request.path[:100]}")
        case web.HTTPMethodNotAllowed():
            return GatewayError(Code.METHOD_NOT_ALLOWED, f"{request.method} is not possible on {request.path[:100]}")
        case web.HTTPRequestEntityTooLarge():
            return GatewayError(Code.PAYLOAD_TOO_LARGE, f"the body is larger than {MAX_BODY_BYTES} bytes")
        case _:
            log.error("request_failed", method=request.method, path=request.path, exc_info=problem)
            return GatewayError(Code.INTERNAL_ERROR, "internal error; the gateway's log says more")


def refuse(request: web.BaseRequest, problem: BaseException | None, refused: Counter[str]) -> web.Response:
    """The answer for what went wrong, in the one shape that every error has; counted, logged where somebody will ask why.
    Raises ConnectionError where an answer is under way: aiohttp then cuts it off, so that the caller sees that this isn't all.
    """
    error = error_of(request, problem)
    refused[error.code.name] += 1
    is_of_note = error.status in (401, 403) or isinstance(problem, HttpProcessingError) or "Upgrade" in request.headers
    note = log.warning if is_of_note else log.debug
    note("request_refused", peer=peer_of(request), path=request.path, error_code=error.code.name, error=str(error))
    if problem is not None:
        problem.__traceback__ = None  # whose frames hold the problem: it would keep the request until a full collection
    if request.writer.output_size > 0:
        raise ConnectionError("the answer was under way")
    response = json_response({"error": str(error), "error_code": error.code.name}, error.status)
    if isinstance(problem, web.HTTPMethodNotAllowed):
        response.headers["Allow"] = problem.headers["Allow"]
    if error.status == 401:
        # A browser asks for what is named first; of what a page's script fetches it must not ask.
        is_page = "text/html" in request.headers.get("Accept", "")
        response.headers["WWW-Authenticate"] = ("" if is_page else 'Bearer realm="AMHR-PD", ') + 'Basic realm="AMHR-PD"'
    return response


class HttpConnection(web.RequestHandler):
    """A caller's or a board's connection. How many there may be is bounded, and what each holds and for how long."""

    MAX_OTHERS = 800  # that are no board, or three times as many that haven't registered: with heads half there, 250 MB
    KEEPALIVE_TIMEOUT_S = 15.0  # also bounds who never sends a request; callers reconnect when they poll slower
    LINGERING_TIMEOUT_S = 2.0  # for the rest of a body that was refused, so that the caller gets to read why

    def __init__(self, server: web.Server, gateway: Gateway, limit: int) -> None:
        """`limit` is how many there may be in all."""
        super().__init__(
            server,
            max_line_size=16 << 10,  # contract, section 6
            max_field_size=4 << 10,
            max_headers=32,
            read_bufsize=READ_BYTES,
            auto_decompress=False,
            access_log=None,  # type: ignore[arg-type] # the lines would cost more than the requests
            keepalive_timeout=self.KEEPALIVE_TIMEOUT_S,
            lingering_time=self.LINGERING_TIMEOUT_S,
            loop=asyncio.get_running_loop(),
        )
        self._gateway = gateway
        self._limit = limit
        self._server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """What asyncio calls first."""
        count, boards, online = len(self._server.connections), len(self._gateway.connections), self._gateway.registry.online
        super().connection_made(transport)
        if count >= self._limit or count - boards + (boards - online) / 3 >= self.MAX_OTHERS:
            log.warning("connections_refused", problem="too many connections")
            transport.close()
            return
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(UNREAD_TIMEOUT_S * 1000))
        read_at_once(transport, READ_BYTES)

    def data_received(self, data: bytes) -> None:
        """What asyncio calls with what came."""
        super().data_received(data)
        for message, _ in self._messages:
            if not isinstance(message, RawRequestMessage):  # it can't be parsed, and would live until a full collection
                message.exc.__traceback__ = None

    def handle_error(self, request: web.BaseRequest, status: int = 500, exc: Any = None, message: Any = None) -> web.Response:
        """What aiohttp calls for what never reaches a route: requests that can't be parsed, and defects."""
        response = refuse(request, exc, self._gateway.refused)
        response.force_close()
        return response

    def log_exception(self, *args: Any, **kwargs: Any) -> None:
        """What aiohttp calls for defects, for an answer that can't go on and is cut off, and for a body that breaks off."""
        error = kwargs.get("exc_info")
        if isinstance(error, GatewayError):
            log.warning("answer_cut_off", problem=str(error))
        elif self.transport is not None and not isinstance(error, BROKEN_OFF):
            super().log_exception(*args, **kwargs)


# -- who gets in -------------------------------------------------------------------------------------------------------

# Whoever owns a public name can point it at the gateway's address, and a browser then calls this its own origin. Names
# that nobody outside can own are safe: addresses, single labels, and the private top-level domains (RFC 6762, RFC 8375).
PRIVATE_HOST = re.compile(r"(?i)(\[[0-9a-f:.]+\]|[0-9.]+|[^.:]*\.?|.*\.(local(host)?|home(\.arpa)?|internal|lan)\.?)(:[0-9]*)?")

# What a browser asks before it lets a page of an allowed origin call with JSON or a token (the Fetch standard's CORS).
PREFLIGHT_HEADERS = {
    "Access-Control-Allow-Methods": "GET, POST, DELETE",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, Last-Event-ID",
    "Access-Control-Max-Age": "600",
}


def normal_origin(origin: str) -> str:
    """An origin as browsers write it: in lower case, without the port that its scheme implies (RFC 6454)."""
    return re.sub(r"\A(http://.*):80\Z|\A(https://.*):443\Z", r"\1\2", origin.lower())


class Route(NamedTuple):
    """One line of the table of routes. The handler returns what is to be JSON, or a response of its own."""

    method: str
    path: str
    handler: Callable[[web.Request, Any], Awaitable[object]]
    query: type[msgspec.Struct] | None = NoQuery  # None: the handler looks at it
    answer: type[msgspec.Struct] | str = ""  # for OpenAPI: of JSON, or a content type; without it for people and boards
    body: type[msgspec.Struct] | None = None  # for OpenAPI
    access: str | None = "api_token"  # the setting with the token that it wants, where one is set

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """What aiohttp calls with a request that `RestApi.admit` let in."""
        try:
            query = None if self.query is None else convert_fields(query_values(request, self.query), self.query)
        except GatewayError as error:
            raise GatewayError(Code.INVALID_FIELD_VALUE, f"in the query: {error}") from None
        answer = await self.handler(request, query)
        return answer if isinstance(answer, web.StreamResponse) else json_response(answer)

    def paths(self) -> Iterator[str]:
        """The route plain and under /api, and with a slash at its end too."""
        for prefix in ("", "/api"):
            plain = prefix + self.path.rstrip("/")
            yield from (plain, plain + "/") if plain else ("/",)


def shows_token(request: web.Request, settings: Settings, access: str) -> bool:
    """Whether the request bears the token, in one of the forms of the contract's section 1, or none is set."""
    token: str | None = getattr(settings, access)
    if token is None:
        return True
    authorization = request.headers.get("Authorization", "").strip()
    scheme, _, value = authorization.partition(" ")
    shown = authorization or (request.query.get("token", "") if access == "device_token" else "")
    if scheme.lower() == "bearer":
        shown = value.strip()
    elif scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            shown = base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
    return hmac.compare_digest(shown.encode("utf-8", "replace"), token.encode())


# -- figures for Prometheus --------------------------------------------------------------------------------------------


class Metrics(NamedTuple):
    """What `GET /metrics` shows, from plain numbers when it is asked for. Every label that is known is there from the start."""

    gateway: Gateway
    store: Store

    def collect(self) -> Iterator[prometheus.Metric]:
        """What prometheus_client calls for an answer."""
        gateway, health = self.gateway, self.gateway.health()
        ends = (NO_DEVICES, ACK_SUCCESS, ACK_ERROR, ACK_TIMEOUT)
        counts: Mapping[tuple[str, str], Mapping[str, float]] = {
            **{(f"amhrpd_{name}", ""): {"": health.pop(name)} for name in ("rows_dropped", "rows_rejected")},
            ("amhrpd_messages", "type"): {tag: gateway.messages[kind] for tag, kind in BOARD_MESSAGES.items()},
            ("amhrpd_refusals", "code"): {code.name: gateway.refused[code.name] for code in Code},
            ("amhrpd_commands", "status"): {end: gateway.dispatch.ended[end] for end in ends},
            ("process_cpu_seconds", ""): {"": time.process_time()},
        }
        # prometheus_client's own collector shows the process only where it may read /proc/stat, which amhrpd.service hides.
        pages, resident_pages, *_ = map(int, Path("/proc/self/statm").read_text().split())
        gauges = {
            "amhrpd_database_ok": health["status"] == "ok",
            "amhrpd_devices_known": health.pop("devices_total"),
            "amhrpd_connections": len(gateway.connections),
            "process_resident_memory_bytes": resident_pages * resource.getpagesize(),
            "process_virtual_memory_bytes": pages * resource.getpagesize(),
            "process_open_fds": sum(1 for _ in Path("/proc/self/fd").iterdir()),
            **{f"amhrpd_{name}": value for name, value in health.items() if isinstance(value, int | float)},
        }
        for name, value in gauges.items():
            yield prometheus.GaugeMetricFamily(name, name.replace("_", " "), float(value))
        for (name, label), by_label in counts.items():
            family = prometheus.CounterMetricFamily(name, name.replace("_", " "), labels=[label] if label else [])
            for key, count in by_label.items():
                family.add_metric([key] if label else [], count)
            yield family
        for histogram in (gateway.dispatch.answer_seconds, *self.store.histograms, gateway.loop_late_s):
            yield from histogram.collect()


# -- OpenAPI -----------------------------------------------------------------------------------------------------------


def answer(name: str, keys: Mapping[str, Any], sometimes: Mapping[str, Any] = {}) -> Any:
    """The type of an answer, for OpenAPI: the types of the keys that are always there, and of those that may be."""
    optional = [(key, kind | msgspec.UnsetType, msgspec.UNSET) for key, kind in sometimes.items()]
    return msgspec.defstruct(name, [*keys.items(), *optional])


def columns_of(table: TableName) -> dict[str, Any]:
    """The types of a table's columns in answers."""
    kinds: Mapping[str, Any] = {"JSON": Any, "INTEGER": int | None, "BOOLEAN": bool | None}
    return {column: kinds.get(kind, str | None) for column, kind in COLUMNS[table].items()}


REFERENCE = "#/components/schemas/{name}"
ERROR = answer("Error", {"error": str, "error_code": Literal[tuple(code.name for code in Code)]})
HEALTH = answer("Health", {"status": Literal["ok", "degraded"]})
DEVICE_KEYS = {"metadata": Any, "state": Any, "state_timestamp": str | None, "alert": Any, "deadman_at": str | None}
DEVICE: Any = answer("Device", columns_of("devices") | DEVICE_KEYS)
DEVICES = answer("Devices", {"total": int, "devices": list[DEVICE]})
DELETED = answer("Deleted", {"device_id": str, "deleted": dict[str, int]})
COMMAND_TEXTS = dict.fromkeys(("command_id", "device_type", "command_name", "status", "created_at"), str)
COMMAND_KEYS = COMMAND_TEXTS | {"payload": dict[str, Any], "target_device_count": int, "success_count": int}
COMMAND_EXTRAS = {"response_data": dict[str, Any] | None, "deadman": Deadman, "detail": str, "persisted": bool}
COMMAND = answer("Command", COMMAND_KEYS, sometimes=COMMAND_EXTRAS)
STATE: Any = answer("State", columns_of("device_state_snapshots"))
STATE_HISTORY = answer("StateHistory", {"device_id": str, "total": int, "states": list[STATE]})
EVENT: Any = answer("ConnectionEvent", columns_of("device_connection_logs"))
CONNECTION_HISTORY = answer("ConnectionHistory", {"device_id": str, "total": int, "events": list[EVENT]})
COMMAND_LOG: Any = answer("CommandLog", columns_of("command_logs"))
COMMAND_LOGS = answer("CommandLogs", {"total": int, "logs": list[COMMAND_LOG]})


def content_of(kind: Any) -> Row:
    """What OpenAPI says of a body: of which type its JSON is, or its content type."""
    is_json = not isinstance(kind, str)
    return {"application/json": {"schema": {"$ref": REFERENCE.format(name=kind.__name__)}}} if is_json else {kind: {}}


def openapi(table: Iterable[Route]) -> msgspec.Raw:
    """The routes that have an answer, as OpenAPI 3.1."""
    routes = [route for route in table if route.answer]
    kinds = [kind for route in routes for kind in (route.query, route.body, route.answer) if isinstance(kind, type)]
    _, schemas = msgspec.json.schema_components([ERROR, *kinds], ref_template=REFERENCE)
    request = schemas["CommandRequest"]
    one_or_several = request["properties"]["device_id"]["anyOf"]
    one_or_several.append(one_or_several[0]["items"])
    given, absent = {"not": {"type": "null"}}, {"type": "null"}
    pairs = itertools.permutations(("device_type", "device_id"))  # both are possible, and then checked against each other
    request["anyOf"] = [{"required": [one], "properties": {one: given, other: absent}} for one, other in pairs]
    paths: dict[str, Row] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = operation(route, schemas)
    schemes = {name: {"type": "http", "scheme": name} for name in ("bearer", "basic")}
    document = {
        "openapi": "3.1.0",
        "info": {"title": "AMHR-PD gateway", "version": VERSION},
        "paths": paths,
        "security": [{}, {"bearer": []}, {"basic": []}],
        "components": {"schemas": schemas, "securitySchemes": schemes},
    }
    return raw(to_json(document).replace(rb"\\A", b"^").replace(rb"\\Z", b"$"))  # JSON Schema's patterns are JavaScript's


def operation(route: Route, schemas: Mapping[str, Any]) -> Row:
    """What OpenAPI says of one route."""
    names = re.findall(r"{(\w+)}", route.path)
    parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    for name, schema in (schemas[route.query.__name__]["properties"] if route.query else {}).items():
        # In a query nothing is null: that is what is left out. Lists have commas.
        parameters.append({"name": name, "in": "query", "schema": schema.get("anyOf", [schema])[0], "explode": False})
    done: Row = {"description": "done", "content": content_of(route.answer)}
    if issubclass(route.query or NoQuery, HistoryQuery):
        done["content"]["text/csv"] = {}
        done["headers"] = {MORE: {"description": "true: there are more rows", "schema": {"const": "true"}}}
    refused = {"description": "refused", "content": content_of(ERROR)}
    responses = {"200": done, "4XX": refused, "5XX": refused}
    if route.answer is HEALTH:
        responses["503"] = {"description": "the database can't be written", "content": content_of(HEALTH)}
    said: Row = {"parameters": parameters, "responses": responses}
    if route.body is not None:
        said["requestBody"] = {"required": True, "content": content_of(route.body)}
    return said


# -- the routes --------------------------------------------------------------------------------------------------------


class RestApi:
    """The routes of the contract's section 6, who may use them, and the one shape of errors. Handlers look up and answer."""

    def __init__(self, settings: Settings, gateway: Gateway, store: Store) -> None:
        self._settings = settings
        self._gateway = gateway
        self._store = store
        gateway.metrics.register(Metrics(gateway, store))
        self.routes = (
            Route("GET", "/", self.page),
            Route("GET", "/ws/{device_id}", self.serve_device, query=None, access="device_token"),
            Route("GET", "/health", self.health, answer=HEALTH, access=None),
            Route("GET", "/events", self.events, ListenQuery, "text/event-stream"),
            Route("GET", "/devices", self.devices, DevicesQuery, DEVICES),
            Route("GET", "/devices/{device_id}", self.device, NoQuery, DEVICE),
            Route("DELETE", "/devices/{device_id}", self.delete_device, NoQuery, DELETED),
            Route("POST", "/command", self.command, None, COMMAND, body=CommandRequest),
            Route("GET", "/state-history/{device_id}", self.history, HistoryQuery, STATE_HISTORY),
            Route("GET", "/command-logs", self.history, CommandLogsQuery, COMMAND_LOGS),
            Route("GET", "/command-logs/{command_id}", self.command_log, NoQuery, COMMAND_LOG),
            Route("GET", "/device-connection-history/{device_id}", self.history, ConnectionHistoryQuery, CONNECTION_HISTORY),
            Route("GET", "/metrics", self.metrics, NoQuery, "text/plain"),
            Route("GET", "/openapi.json", self.openapi, NoQuery, "application/json"),
        )
        origins = filter(None, map(str.strip, settings.allowed_origins.split(",")))
        self._origins = {normal_origin(origin.rstrip("/")) for origin in origins}
        self._turn = asyncio.Lock()
        self._access = {path: route.access for route in self.routes for path in route.paths()}

    def serve_in(self, app: web.Application) -> None:
        """Have an application serve the routes."""
        app.middlewares.append(self.admit)
        app.on_response_prepare.append(self.dress)
        for route in self.routes:
            app.add_routes(web.route(route.method, path, route.serve) for path in route.paths())

    # -- who gets in ---------------------------------------------------------------------------------------------------

    @web.middleware
    async def admit(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Serve a request that may come in; all of them pass here, those that have no route, too."""
        resource = request.match_info.route.resource
        access = "api_token" if resource is None else self._access[resource.canonical]
        try:
            if isinstance(no_route := request.match_info.http_exception, web.HTTPNotFound):
                raise no_route  # a board with a wrong path is told that, whatever its origin
            self._check_origin(request, access)
            is_preflight = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
            if is_preflight and self._is_from_allowed_page(request):
                return web.Response(status=204, headers=PREFLIGHT_HEADERS)
            if access is not None and not shows_token(request, self._settings, access):
                how = "send `Authorization: Bearer <token>`, or the token as a Basic password"
                text = f"a token is required: {how}; the gateway has it from {variable_of(access)}"
                raise GatewayError(Code.UNAUTHORIZED, text)
            if request.method == "GET" and access != "device_token":  # one in a turn of the loop: a flood holds up no command
                async with self._turn:
                    await asyncio.sleep(0)
            response = await handler(request)
        except (GatewayError, web.HTTPException, ConnectionError) as problem:
            response = refuse(request, problem, self._gateway.refused)
        if "Upgrade" in request.headers and not response.prepared:
            response.force_close()  # a refused board says more, which is no request (contract, section 1)
        return response

    async def dress(self, request: web.Request, response: web.StreamResponse) -> None:
        """Give every answer, before its head goes out, the headers that it needs."""
        if self._is_from_allowed_page(request):
            response.headers["Access-Control-Allow-Origin"] = request.headers["Origin"]
            response.headers["Vary"] = "Origin"

    def _check_origin(self, request: web.Request, access: str | None) -> None:
        """Raise FORBIDDEN for what a browser sends on behalf of a web page that isn't ours."""
        origin, host = request.headers.get("Origin"), request.headers.get("Host", "")
        # Every board in the field says file://, whatever host was compiled in (contract, section 1).
        if self._is_from_allowed_page(request) or (access == "device_token" and origin in (None, "file://")):
            return
        authorities = {normal_origin(f"{scheme}://{host}") for scheme in ("http", "https")}
        can_allow_it = "AMHRPD_ALLOWED_ORIGINS can allow it"
        if not PRIVATE_HOST.fullmatch(host) and not authorities & self._origins:
            raise GatewayError(Code.FORBIDDEN, f"the host {host[:100]!r} is not known here; {can_allow_it}")
        if origin is not None and normal_origin(origin) not in authorities:
            raise GatewayError(Code.FORBIDDEN, f"the origin {origin[:100]!r} is not allowed here; {can_allow_it}")

    def _is_from_allowed_page(self, request: web.Request) -> bool:
        return normal_origin(request.headers.get("Origin", "")) in self._origins

    # -- handlers ------------------------------------------------------------------------------------------------------

    async def page(self, request: web.Request, query: NoQuery) -> object:
        """`GET /`."""
        return web.Response(text=PAGE, content_type="text/html", headers=page_headers(PAGE))

    async def serve_device(self, request: web.Request, query: None) -> object:
        """`GET /ws/{device_id}`: a board connects."""
        if not re.fullmatch(DEVICE_ID_PATTERN, request.match_info["device_id"]):
            raise GatewayError(Code.INVALID_FIELD_VALUE, f"device_id in the path must be {DEVICE_ID_TITLE}")
        try:
            return await DeviceSocket(self._gateway, self._settings, request).serve()
        except (web.HTTPBadRequest, ValueError):
            text = "boards connect here: a WebSocket handshake is expected, of version 13"
            raise GatewayError(Code.INVALID_FIELD_VALUE, text) from None

    async def health(self, request: web.Request, query: NoQuery) -> object:
        """`GET /health`: open to all; without the token, where one is set, it says no more than the status."""
        health = self._gateway.health()
        is_shown = shows_token(request, self._settings, "api_token")
        return json_response(health if is_shown else {"status": health["status"]}, 200 if health["status"] == "ok" else 503)

    async def events(self, request: web.Request, query: ListenQuery) -> object:
        """`GET /events`: what happens, as it happens, as server-sent events."""
        assert request.transport is not None
        names, device_ids = (None if wanted is None else frozenset(wanted) for wanted in (query.event, query.device_id))
        listener = Listener(request.transport.abort, names, device_ids, query.device_type)
        events = self._gateway.events
        with events.listening(listener):
            async with sse_response(request, ping_interval=math.inf, send_timeout=UNREAD_TIMEOUT_S) as response:
                last_event_id = response.last_event_id or query.last_event_id
                async for happened in events.follow(listener, last_event_id, alive=query.alive is not None):
                    await response.write(b"".join(event.text for event in happened))
                return response

    async def devices(self, request: web.Request, query: DevicesQuery) -> object:
        """`GET /devices`."""
        is_online = None if query.online is None else query.online == "true"
        devices = self._gateway.registry.matching(query.device_type, is_online=is_online)
        is_short = sum(device.size_bytes for device in devices) < Database.MAX_ANSWER_BYTES
        if is_short:  # then the answer says its length, which simple callers need
            return {"total": len(devices), "devices": [device.record() for device in devices]}

        async def parts() -> AsyncIterator[bytes]:
            yield b'{"total":%d,"devices":[' % len(devices)
            for number, device in enumerate(devices):
                yield (b"," if number else b"") + to_json(device.record())
            yield b"]}\n"

        return web.Response(body=in_pieces(parts()), content_type="application/json")

    async def device(self, request: web.Request, query: NoQuery) -> object:
        """`GET /devices/{device_id}`."""
        (device,) = await self._gateway.find_devices(request.match_info["device_id"])
        return device.record()

    async def delete_device(self, request: web.Request, query: NoQuery) -> object:
        """`DELETE /devices/{device_id}`."""
        device_id = request.match_info["device_id"]
        return {"device_id": device_id, "deleted": await self._gateway.delete_device(device_id)}

    async def command(self, request: web.Request, query: None) -> object:
        """`POST /command`."""
        wanted = decode_command(query_values(request, CommandRequest), await read_body(request))
        command = await self._gateway.command(wanted)
        if wanted.wait:
            await self._gateway.dispatch.wait_for_answers(command, wanted.wait)
        answer = command.answer(with_answers=bool(wanted.wait))
        if command.status == NO_DEVICES:
            answer["detail"] = self._gateway.explain_no_devices(wanted, command)
        return answer

    async def history(self, request: web.Request, query: HistoryQuery) -> object:
        """`GET /state-history/{device_id}`, `GET /device-connection-history/{device_id}`, `GET /command-logs`."""
        of: Row = dict(request.match_info)
        if of:
            await self._gateway.find_devices(of["device_id"])
        read: Callable[..., Awaitable[list[Row]]] = functools.partial(self._store.history, query.table, **of)
        rows = await read(min(query.limit, CSV_PAGE_ROWS), **query.filters())
        to_come = 0 if query.format == "json" else query.limit - len(rows)
        has_more = rows and await read(1, offset=to_come, **query.filters(rows[-1]))
        headers = {MORE: "true"} if has_more else {}
        if query.format == "json":
            return json_response({**of, "total": len(rows), query.rows_name: rows}, headers=headers)
        name = re.sub(r"[^A-Za-z0-9._]+", "-", request.path).strip("-")
        headers |= {"Content-Type": "text/csv; charset=utf-8", "Content-Disposition": f'attachment; filename="{name}.csv"'}
        return web.Response(body=in_pieces(csv_history(query, read, rows)), headers=headers)

    async def command_log(self, request: web.Request, query: NoQuery) -> object:
        """`GET /command-logs/{command_id}`."""
        command_id = request.match_info["command_id"]
        row = await self._store.row("command_logs", for_answer, command_id=command_id)
        if row is None:
            raise GatewayError(Code.COMMAND_NOT_FOUND, f"command {command_id[:64]!r} was never given")
        return row

    async def metrics(self, request: web.Request, query: NoQuery) -> object:
        """`GET /metrics`."""
        content_type = {"Content-Type": prometheus_client.CONTENT_TYPE_LATEST}
        return web.Response(body=prometheus_client.generate_latest(self._gateway.metrics), headers=content_type)

    async def openapi(self, request: web.Request, query: NoQuery) -> object:
        """`GET /openapi.json`."""
        return openapi(self.routes)


# ======================================================================================================================
# Broker
# ======================================================================================================================

# A reading's word -> Home Assistant's device class and units: the first one where no suffix (`temperature_f`) names another.
QUANTITIES: Mapping[str, tuple[str, ...]] = {
    "temperature": ("temperature", "°C", "°F", "K"),
    "temp": ("temperature", "°C", "°F", "K"),
    "humidity": ("humidity", "%"),
    "battery": ("battery", "%"),
    "voltage": ("voltage", "V", "mV"),
    "current": ("current", "A", "mA"),
    "pressure": ("pressure", "hPa", "Pa", "kPa", "mbar", "bar", "psi"),
    "rssi": ("signal_strength", "dBm"),
    "distance": ("distance", "cm", "mm", "m"),
}
# A reading's kind -> its platform and the template of its value `v`; what is missing or of another kind by now floods no log.
KINDS: Mapping[str, tuple[str, str]] = {
    "number": ("sensor", "v if v is number and v is not boolean else ''"),
    "flag": ("binary_sensor", "'ON' if v is true else 'OFF' if v is false else ''"),
    "text": ("sensor", "v[:250] if v is string else 'None'"),
}
# What the gateway, and each board, is at Home Assistant; topics are behind amhrpd/<gateway>/, or a board's device/<device_id>/.
GATEWAY_ENTITIES: Mapping[str, Row] = {
    "devices_online": {"platform": "sensor", "name": "Devices online", "state_topic": "info", "state_class": "measurement"}
    | {"value_template": "{{ value_json.devices_online | default('') }}"},
    "stop": {"platform": "button", "name": "Stop all", "command_topic": "command"}
    | {"payload_press": '{"device_type": "*", "command_name": "stop"}'},
}
BOARD_ENTITIES: Mapping[str, Row] = {
    "online": {"platform": "binary_sensor", "name": "Online", "state_topic": "status", "device_class": "connectivity"}
    | {"payload_on": "online", "payload_off": "offline"},
    "stop": {"platform": "button", "name": "Stop", "command_topic": "command", "payload_press": "stop"},
    "command": {"platform": "notify", "name": "Command", "command_topic": "command"},
    "alert": {"platform": "event", "name": "Alert", "state_topic": "alert", "event_types": ["alert", "error"]}
    | {"value_template": "{{ dict(value_json, event_type=value_json.kind) | to_json }}"},
}
MAX_READINGS = 40
MAX_TEXT = 64  # a longer one is no reading
MAX_TRANSACTION = 64  # characters


def object_of(text: Json | None) -> dict[str, Any]:
    """What JSON holds where it is an object: a file of others may have anything there."""
    value = json_decoder.decode(text or b"{}")
    return value if isinstance(value, dict) else {}


def kind_of(name: str, value: object) -> str | None:
    """The kind of a reading; None where Home Assistant can't show it, or its name could be more than a name in a template."""
    is_name = re.fullmatch("[A-Za-z0-9_]{1,40}", name)
    is_long = isinstance(value, str) and len(value) > MAX_TEXT
    return {bool: "flag", int: "number", float: "number", str: "text"}.get(type(value)) if is_name and not is_long else None


def quantity_of(name: str) -> Row:
    """Device class and unit of a number, where its name tells them."""
    plain = "_" + re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    for word, (device_class, *units) in QUANTITIES.items():
        for unit in units:
            suffix = unit.lower().strip("°").replace("%", "percent")
            if plain.endswith((f"_{word}", f"_{word}_{suffix}")):
                return {"device_class": device_class, "unit_of_measurement": unit}
    return {}


def reading_entity(kind: str, name: str) -> Row:
    """A reading as Home Assistant is told of it."""
    platform, shown = KINDS[kind]
    template = f"{{% set v = value_json['{name}'] if value_json is defined else none %}}{{{{ {shown} }}}}"
    entity = {"platform": platform, "name": name.replace("_", " "), "state_topic": "state", "value_template": template}
    return entity | ({"state_class": "measurement"} | quantity_of(name) if kind == "number" else {})


def discovery_id(gateway_id: str, device_id: str = "") -> str:
    """What Home Assistant calls a board, or the gateway: a hash tells those apart that would be called the same."""
    plain = "_".join(filter(None, ("amhrpd", gateway_id, re.sub("[^A-Za-z0-9_-]", "_", device_id))))
    if "_" not in gateway_id and plain.endswith(device_id):
        return plain
    return f"{plain}_{hashlib.sha256(f'{gateway_id}/{device_id}'.encode()).hexdigest()[:6]}"


def discovery(gateway_id: str, device: Device | None, readings: Iterable[tuple[str, str]] = ()) -> Json:
    """How Home Assistant finds a board, or the gateway: one message that lists its entities (2024.11 and later)."""
    device_id = device.device_id if device else ""
    object_id, gateway = discovery_id(gateway_id, device_id), f"amhrpd/{gateway_id}"
    base, entities = gateway, GATEWAY_ENTITIES
    about: Row = {"name": f"Gateway {gateway_id}", "model": "AMHR-PD gateway", "sw_version": VERSION}
    available = [{"topic": f"{gateway}/status"}]
    if device is not None:
        base = f"{gateway}/device/{device_id}"
        entities = {**BOARD_ENTITIES, **{f"{kind}_{name}": reading_entity(kind, name) for kind, name in readings}}
        entities["online"] = BOARD_ENTITIES["online"] | {"availability": available}
        available = [*available, {"topic": f"{base}/status"}]
        about = {"name": device_id, "model": device.device_type, "via_device": discovery_id(gateway_id)}
        if isinstance(firmware := object_of(device.metadata).get("firmware_version"), str):
            about["sw_version"] = firmware[:MAX_TEXT]
    components: dict[str, Row] = {}
    for key, entity in entities.items():
        whole = {name: f"{base}/{value}" if name.endswith("_topic") else value for name, value in entity.items()}
        components[key] = whole | {"unique_id": f"{object_id}_{key}"}
    config = {
        "device": {"identifiers": [object_id], "manufacturer": "AMHR-PD", **about},
        "origin": {"name": "AMHR-PD", "sw_version": VERSION},
        "availability": available,
        "availability_mode": "all",
        "components": components,
    }
    return to_json(config)


Outgoing = tuple[str, bytes, int, bool]
"""A message as `publish` takes it: its topic and payload, QoS, and whether the broker is to keep it."""


@dataclasses.dataclass(slots=True)
class Told:
    """What the broker was told of a board, or of the gateway, and what is there to tell Home Assistant of."""

    of: dict[str, object] = dataclasses.field(default_factory=dict)  # by the topic's end: what the message was made from
    readings: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # the kinds and names that it had so far
    grew_s: float = dataclasses.field(default_factory=time.monotonic)  # when one was new
    told_s: float = -math.inf


class Outbox:
    """What goes out: alerts and results, the oldest of which give way, and what the broker keeps of boards: that is made from
    memory when its turn comes, and compared with what was told, so the latest wins and nothing is told twice.
    """

    MAX_QUEUED, MAX_QUEUED_BYTES = 1000, 4 << 20
    MAX_BOARDS = 20_000
    TURN, TURN_S = 22, 0.05  # messages at once, three more with the last board's, and the pause behind them: 500 a second
    BOARD_PAUSE_S = 1.0  # contract, section 9
    READINGS_PAUSE_S = 2.0  # boards tell of themselves bit by bit

    def __init__(self, settings: Settings, gateway: Gateway) -> None:
        self._gateway_id, self._prefix = settings.gateway_id, settings.mqtt_discovery
        self.base = f"amhrpd/{settings.gateway_id}"
        self._gateway, self._registry = gateway, gateway.registry
        self._due: dict[str, None] = {}  # device_ids, in turn; "" is the gateway's own
        self._told: defaultdict[str, Told] = defaultdict(Told)  # by device_id
        self._queue: deque[Outgoing] = deque()
        self._leaving: list[Outgoing] = []  # of the queue: sent, and perhaps not taken
        self._news = asyncio.Event()  # there is something to send
        self.is_ending = False  # then all that is left goes at once
        what = "Alerts and results that gave way."
        self._dropped = prometheus_client.Counter("amhrpd_mqtt_dropped", what, registry=gateway.metrics)

    # -- what is to go -------------------------------------------------------------------------------------------------

    def put(self, device_id: str) -> None:
        """The broker may not know the latest of a board, or of the gateway."""
        if len(self._due) < self.MAX_BOARDS:
            self._due[device_id] = None
        self._news.set()

    def put_all(self) -> None:
        """The broker, or Home Assistant, may know nothing: it is told of everything, and `online` behind that."""
        for device_id in (*[device.device_id for device in self._registry.matching()], ""):
            self._told[device_id] = Told(readings=self._told[device_id].readings, grew_s=-math.inf)
            self._due.pop(device_id, None)
            self.put(device_id)

    def queue(self, topic: str, payload: bytes) -> None:
        """Send what the broker doesn't keep: an alert or a result."""
        self._queue.append((f"{self.base}/{topic}", payload, 1, False))
        while len(self._queue) > self.MAX_QUEUED or sum(len(waiting) for _, waiting, *_ in self._queue) > self.MAX_QUEUED_BYTES:
            self._queue.popleft()
            self._dropped.inc()
        self._news.set()

    def note(self, event: Event) -> None:
        """Something happened."""
        if event.name == "command":
            command = self._gateway.dispatch.find(event.of)
            transaction = to_json(command.transaction if command else None)
            self.queue("result", event.data[:-1] + b',"transaction":' + transaction + b"}")
        elif event.name == "alert":
            self.queue(f"device/{next(iter(event.device_ids))}/alert", event.data)
        else:
            self.put(event.of)
            if event.name == "device":
                self.put("")  # how many are online

    # -- what goes -----------------------------------------------------------------------------------------------------

    async def send(self, client: aiomqtt.Client) -> None:
        """Send what there is to send, until the end, when nothing is left. Raises what aiomqtt raises."""
        while self._leaving or self._queue or self._due or not self.is_ending:
            await self._news.wait()
            self._leaving += [self._queue.popleft() for _ in range(min(self.TURN - len(self._leaving), len(self._queue)))]
            kept: list[Outgoing] = []
            for device_id in list(self._due):
                kept += self._kept(device_id) if len(kept) < self.TURN else ()
            await asyncio.gather(*(client.publish(*message) for message in (*self._leaving, *kept)))
            self._leaving.clear()
            if not self._queue and not self._due:
                self._news.clear()
            await asyncio.sleep(0 if self.is_ending else self.TURN_S)

    def _kept(self, device_id: str) -> list[Outgoing]:
        """What the broker is to keep of a board, or of the gateway, and doesn't yet: nothing of a board that is gone."""
        if len(self._told) > self.MAX_BOARDS:
            self._told.clear()  # then all is told twice
        device, told, now_s = self._registry.find(device_id), self._told[device_id], time.monotonic()
        if now_s < told.told_s + self.BOARD_PAUSE_S and not self.is_ending:
            return []  # it stays due
        del self._due[device_id]
        if device is not None:
            now = self._of_board(device, told)
        elif device_id:
            told = self._told[device_id] = Told(grew_s=-math.inf)
            now = dict.fromkeys(("config", "status", "info", "state"), (b"", bytes))  # Home Assistant is told first
        else:
            info = to_json({"version": VERSION, "devices_online": self._registry.online, "devices_total": len(self._registry)})
            config = functools.partial(discovery, self._gateway_id, None)
            now = {"config": (VERSION, config), "info": (info, lambda: info), "status": (True, lambda: b"online")}
        if not self._prefix:
            del now["config"]
        elif now_s < told.grew_s + self.READINGS_PAUSE_S and not self.is_ending:
            del now["config"]
            self.put(device_id)
        news = {kind: payload() for kind, (source, payload) in now.items() if told.of.get(kind) != source}
        told.of |= {kind: source for kind, (source, _) in now.items()}
        told.told_s = now_s if news else told.told_s
        base = f"{self.base}/device/{device_id}" if device_id else self.base
        topics = {"config": f"{self._prefix}/device/{discovery_id(self._gateway_id, device_id)}/config"}
        return [(topics.get(kind, f"{base}/{kind}"), payload, int(kind != "state"), True) for kind, payload in news.items()]

    def _of_board(self, device: Device, told: Told) -> dict[str, tuple[object, Callable[[], bytes]]]:
        """What the messages about a board are made from, and how, by their topics' ends: from the same comes the same."""
        for name, value in object_of(device.state).items():
            kind = kind_of(name, value)  # a number may be a text when its sensor fails
            if kind is not None and (kind, name) not in told.readings and len(told.readings) < MAX_READINGS:
                told.readings.append((kind, name))
                if "config" in told.of:
                    told.grew_s = time.monotonic()
        facts = (device.is_online, device.device_type, device.connected_at, device.metadata)  # an armed deadman is none
        return {
            "config": (len(told.readings), functools.partial(discovery, self._gateway_id, device, told.readings)),
            "status": (device.is_online, lambda: b"online" if device.is_online else b"offline"),
            "info": (facts, lambda: to_json({k: v for k, v in device.record().items() if k not in ("state", "alert")})),
            "state": (device.state_timestamp, lambda: device.state or b""),  # nothing, where it is back already and new
        }


def command_fields(topic: str, payload: bytes) -> dict[str, Any]:
    """The fields of a command that came to a topic; to a board's it may be just a name. Raises GatewayError."""
    if len(payload) > MAX_BODY_BYTES:
        text = f"the message has {len(payload)} bytes; the gateway takes {MAX_BODY_BYTES} at the most"
        raise GatewayError(Code.PAYLOAD_TOO_LARGE, text)
    payload, (*_, device_id, _) = without_padding(payload), topic.split("/")
    is_for_board = "/device/" in topic
    if is_for_board and payload[:1] not in (b"{", b"[", b'"'):
        with contextlib.suppress(UnicodeDecodeError):
            payload = to_json({"command_name": payload.decode()})
    fields = decode_json(payload)
    if not isinstance(fields, dict):
        raise GatewayError(Code.INVALID_MESSAGE, "the message must be a JSON object")
    if named := sorted(fields.keys() & {"device_id", "device_type"} if is_for_board else ()):
        raise GatewayError(Code.INVALID_FIELD_VALUE, f"{', '.join(named)}: the topic names the device")
    return fields | ({"device_id": [device_id]} if is_for_board else {})


class Broker:
    """The way to an MQTT broker and back (contract, section 9). Whatever happens there, the gateway goes on."""

    KEEPALIVE_S = 20
    TIMEOUT_S = 5.0  # for the broker's answer to anything
    PAUSES_S = (1.0, 60.0)  # between attempts to connect: the first, and the longest
    SETTLED_S = 180.0  # longer than two gateways that end each other's connections would pause
    MAX_TAKEOVERS = 3
    HOME_PAUSE_S = (1.0, 5.0)  # before Home Assistant, which is back, is told of the boards: not by all gateways at once
    MAX_COMMANDS = 100  # at once: a flood beyond that is dropped without an answer
    MAX_WAITING = 1000  # messages that came: under a second of work
    MAX_AGE_S, TICK_S = 1.0, 0.25  # contract, section 9: of a command; how often this process sees that it runs
    STOP_TIMEOUT_S = 2.0
    HANG_UP_TIMEOUT_S = 0.5

    def __init__(self, settings: Settings, gateway: Gateway) -> None:
        self._settings = settings
        self._gateway = gateway
        self._outbox = Outbox(settings, gateway)
        self._problem: str | None = "not connected yet"  # None where it is connected
        self._away_since = utc_now()
        self._connected_s = 0.0
        self._takeovers, self._notice = 0, ""
        self._commands: set[asyncio.Task[None]] = set()
        self._stale_until_s = -math.inf  # what comes before that may have waited while this process stood still
        gauge = prometheus_client.Gauge("amhrpd_mqtt_connected", "1 with a broker.", registry=gateway.metrics)
        gauge.set_function(lambda: self._problem is None)
        gateway.health_parts.append(self.health)
        gateway.events.observers.append(self._outbox.note)
        self._running = asyncio.create_task(self._stay_connected())

    def health(self) -> Row:
        """What `GET /health` says of it."""
        away = f"since {format_time(self._away_since)}: {self._problem}"
        return {"mqtt": "connected" if self._problem is None else away, "notice": self._notice}

    async def stop(self) -> None:
        """Send what the gateway told last, and `offline`, where a broker takes it in time; then hang up."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.STOP_TIMEOUT_S):
                await asyncio.gather(*self._commands)
                self._outbox.is_ending = True
                self._outbox.put("")
                if self._problem is None:
                    await self._running
        self._running.cancel()
        await asyncio.wait([self._running])

    # -- connections ---------------------------------------------------------------------------------------------------

    async def _stay_connected(self) -> None:
        """Connect, again and again, until the gateway stops."""
        pause_s, longest_s = self.PAUSES_S
        while not self._outbox.is_ending:
            try:
                await self._converse(self._client())
            except Exception as error:
                cause = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
                problem = str(cause) or type(cause).__name__
                if self._problem is None:
                    self._away_since = utc_now()
                    if time.monotonic() - self._connected_s > self.SETTLED_S:
                        self._takeovers, self._notice, pause_s = 0, "", self.PAUSES_S[0]
                    elif "timed out" not in problem:
                        self._takeovers += 1
                    if self._takeovers >= self.MAX_TAKEOVERS:
                        ended = f"the broker ended {self._takeovers} connections soon after they were made"
                        self._notice = f"{ended}: is there another gateway with the id {self._settings.gateway_id}?"
                self._problem = problem
                is_defect = not isinstance(cause, OSError | ImportError) and type(cause).__name__[:4] != "Mqtt"
                log.warning("mqtt_away", problem=self._notice or problem, exc_info=is_defect)
                await asyncio.sleep(pause_s * random.uniform(0.75, 1.25))
                pause_s = min(pause_s * 2, longest_s)

    def _client(self) -> aiomqtt.Client:
        """A connection to be made. Raises OSError, ImportError."""
        import aiomqtt  # who has no broker pays nothing for it

        url = urllib.parse.urlsplit(self._settings.mqtt_url or "")
        tls = ssl.create_default_context(cafile=self._settings.mqtt_ca) if url.scheme == "mqtts" else None
        return aiomqtt.Client(
            url.hostname or "",
            url.port or (8883 if tls else 1883),
            username=None if url.username is None else urllib.parse.unquote(url.username),
            password=None if url.password is None else urllib.parse.unquote(url.password),
            identifier=f"amhrpd-{self._settings.gateway_id}",
            clean_session=True,
            will=aiomqtt.Will(f"{self._outbox.base}/status", b"offline", qos=1, retain=True),
            keepalive=self.KEEPALIVE_S,
            timeout=self.TIMEOUT_S,
            max_queued_incoming_messages=self.MAX_WAITING,
            tls_context=tls,
            logger=logging.Logger("aiomqtt", logging.CRITICAL + 1),  # what it has to say comes as exceptions, too
        )

    async def _converse(self, client: aiomqtt.Client) -> None:
        """One connection, to its end or the gateway's. Raises what aiomqtt raises, alone or in a group."""
        topics = [f"{self._outbox.base}/{topic}" for topic in ("command", "device/+/command", "status", "device/+/info")]
        if prefix := self._settings.mqtt_discovery:
            topics.append(f"{prefix}/status")
        try:
            await client.__aenter__()
            await client.subscribe([(topic, 0) for topic in ("amhrpd/all/command", *topics)])
            self._outbox.put_all()
            self._problem, self._connected_s = None, time.monotonic()
            log.info("mqtt_connected", gateway_id=self._settings.gateway_id)
            async with asyncio.TaskGroup() as group:
                others = [group.create_task(self._receive(client)), group.create_task(self._note_standstill())]
                await self._outbox.send(client)
                for task in others:
                    task.cancel()
        finally:  # also where connecting failed: aiomqtt would leave its socket and a task behind
            client.timeout = self.HANG_UP_TIMEOUT_S
            with contextlib.suppress(Exception):  # what broke it is known
                await client.publish(f"{self._outbox.base}/status", b"offline", qos=1, retain=True)
            with contextlib.suppress(Exception):
                await client.__aexit__(None, None, None)

    async def _note_standstill(self) -> None:
        while True:
            before_s = time.monotonic()
            await asyncio.sleep(self.TICK_S)
            if time.monotonic() - before_s > self.MAX_AGE_S:
                self._stale_until_s = time.monotonic() + self.MAX_AGE_S

    # -- what comes ----------------------------------------------------------------------------------------------------

    async def _receive(self, client: aiomqtt.Client) -> None:
        async for message in client.messages:
            topic, payload, is_retained = message.topic.value, bytes(message.payload), bool(message.retain)
            if topic.endswith("/command"):
                if len(self._commands) >= self.MAX_COMMANDS:
                    log.warning("mqtt_command_dropped", problem=f"over {self.MAX_COMMANDS} at once")
                elif payload and not self._outbox.is_ending:  # an empty one deletes one that is retained
                    task = asyncio.create_task(self._obey(topic, payload, is_retained=is_retained))
                    self._commands.add(task)
                    task.add_done_callback(self._commands.discard)
            elif topic == f"{self._outbox.base}/status" and payload != b"online":  # a will that came late
                self._outbox.put_all()
            elif topic == f"{self._settings.mqtt_discovery}/status" and payload == b"online" and not is_retained:
                asyncio.get_running_loop().call_later(random.uniform(*self.HOME_PAUSE_S), self._outbox.put_all)
            elif topic.endswith("/info") and payload and is_retained and self._gateway.is_restored and not self._notice:
                self._outbox.put(topic.split("/")[3])  # perhaps a ghost

    async def _obey(self, topic: str, payload: bytes, *, is_retained: bool) -> None:
        """Give a command to the gateway, or refuse it."""
        transaction = None
        try:
            fields = command_fields(topic, payload)
            value = fields.pop("transaction", None)
            if isinstance(value, dict | list) or len(str(value)) > MAX_TRANSACTION:
                text = f"transaction must be a JSON scalar of {MAX_TRANSACTION} characters at the most"
                raise GatewayError(Code.INVALID_FIELD_VALUE, text)
            transaction = value
            if is_retained:
                text = f"a retained command is never obeyed: publish it to {topic} without the retain flag"
                raise GatewayError(Code.INVALID_MESSAGE, text)
            if time.monotonic() < self._stale_until_s:
                raise GatewayError(Code.REQUEST_TIMEOUT, f"it waited over {self.MAX_AGE_S:g} s: the gateway stood still")
            await self._gateway.command(decode_command({}, to_json(fields)), transaction)
        except GatewayError as error:
            log.warning("mqtt_command_refused", problem=str(error), topic=topic, error_code=error.code.name)
            answer = {"error": str(error), "error_code": error.code.name, "transaction": transaction}
            self._outbox.queue("result", to_json(answer))
        except Exception:
            log.error("mqtt_command_failed", topic=topic, exc_info=True)


# ======================================================================================================================
# Service
# ======================================================================================================================

RESERVED_FILES = 100  # of those the process may have open: for the database, the log, and what Python itself needs
ACCEPTED_AT_ONCE = 8  # in a turn of the loop: their handshakes take it some 5 ms, then commands have theirs
LISTEN_BACKLOG = 1024  # connections that wait to be let in, a fleet after a power cut; the kernel caps it at net.core.somaxconn
LISTEN_TIMEOUT_S = 10.0  # for the look-up of a name
TLS_HANDSHAKE_TIMEOUT_S = 5.0  # an ESP32 takes one to three
HANDLERS_TIMEOUT_S = 3.0  # at a stop, for answers that are under way
STORE_CLOSE_TIMEOUT_S = 10.0  # at a stop, for what is queued; amhrpd.service's TimeoutStopSec is above the sum of all
UPKEEP_INTERVAL_S = 1.0
EVERY_ADDRESS = ("0.0.0.0", "::")  # either one means IPv4 and IPv6
MAX_LOGGED_TEXT = 300  # of a value; boards and callers write most of them
GATEWAY = web.AppKey("gateway", Gateway)
STORE = web.AppKey("store", Store)

# -- logging -----------------------------------------------------------------------------------------------------------


class LogLines(logging.Handler):
    """Lines on their way to stderr, written by a thread: a reader that stalls stops nothing. Libraries' lines become events."""

    MAX_LINES = 10_000
    CLOSE_TIMEOUT_S = 1.0

    def __init__(self) -> None:
        super().__init__()
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """What `logging` calls. The problem is the text before anything is put in: it is what repeats itself."""
        about = {"library": record.name, "problem": str(record.msg).partition("\n")[0]}
        with contextlib.suppress(TypeError, ValueError, LookupError):  # what is to be put in doesn't fit
            about["text"] = record.getMessage()
        log.log(record.levelno, "library_message", **about, exc_info=record.exc_info)

    def admit(self, _: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        """A processor of structlog: drop an event while MAX_LINES wait, and say with the next one how many it were."""
        if self._lines.qsize() >= self.MAX_LINES:
            self._dropped += 1
            raise structlog.DropEvent
        if self._dropped:
            event["lines_dropped"], self._dropped = self._dropped, 0
        return event

    def msg(self, line: str) -> None:
        """What structlog calls with a line."""
        self._lines.put(line)

    debug = info = warning = error = critical = msg

    def close(self) -> None:
        """Return when all is written, after CLOSE_TIMEOUT_S at the latest."""
        self._lines.put(None)
        self._thread.join(self.CLOSE_TIMEOUT_S)
        super().close()

    def _write(self) -> None:
        for line in iter(self._lines.get, None):
            data = f"{line}\n".encode("utf-8", "backslashreplace")
            with contextlib.suppress(OSError):  # who read it went away
                while data:
                    data = data[os.write(2, data) :]  # past Python's own buffer, whose lock would hold up the exit


class Repeats:
    """A processor of structlog: what repeats itself passes once a minute, and says as `repeats` how much didn't before. That is
    an event about the same device, peer or problem, or an exception; one with a `command_id` is none.
    """

    WINDOW_S = 60.0
    MAX_KEYS = 1000  # whoever makes up more in a minute shares one an event

    def __init__(self) -> None:
        self._passed: dict[int, tuple[float, int]] = {}  # by hash, latest last: when, and how many were dropped since

    def __call__(self, _: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        """Return the event, or raise DropEvent."""
        about = event.get("device_id") or event.get("peer") or event.get("problem")
        if "command_id" in event or (about is None and "exc_info" not in event):
            return event
        earliest_s = time.monotonic() - self.WINDOW_S
        key = hash((event["event"], about, str(event.get("type") or event.get("error_code"))))
        if key not in self._passed and len(self._passed) >= self.MAX_KEYS:
            if self._passed[oldest := next(iter(self._passed))][0] <= earliest_s:
                self._passed.pop(oldest, None)  # another thread may be here, too
            else:
                key = hash(event["event"])
        passed_s, dropped = self._passed.pop(key, (-math.inf, 0))
        if passed_s > earliest_s:
            self._passed[key] = passed_s, dropped + 1
            raise structlog.DropEvent
        self._passed[key] = time.monotonic(), 0
        return {**event, "repeats": dropped} if dropped else event


def configure_logging(level: str, log_format: str) -> LogLines:
    """One line an event, on stderr, in `log_format`."""
    if log_format == "auto":
        stream = os.fstat(2)  # children inherit the variable alone
        is_journal = os.environ.get("JOURNAL_STREAM") == f"{stream.st_dev}:{stream.st_ino}"
        log_format = "journal" if is_journal else "console" if sys.stderr.isatty() else "json"
    theirs = structlog.processors
    stamp = theirs.TimeStamper(fmt="iso", utc=True)
    endings: dict[str, list[structlog.typing.Processor]] = {
        "console": [stamp, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())],
        "journal": [_render_for_journal],  # which has its own time
        "json": [stamp, theirs.JSONRenderer(ensure_ascii=False)],
    }
    lines = LogLines()
    structlog.configure(
        processors=[Repeats(), lines.admit, theirs.add_log_level, theirs.format_exc_info, _tame, *endings[log_format]],
        logger_factory=lambda *_: lines,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        cache_logger_on_first_use=True,  # else a line that isn't written costs as much as ten calls
    )
    logging.basicConfig(handlers=[lines], level=level.upper(), force=True)
    for library in ("asyncio", "aiohttp.websocket"):  # slow callbacks; subprotocols that boards offer
        logging.getLogger(library).setLevel(logging.ERROR)
    return lines


def _tame(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Cap what others wrote, and keep it in its line."""
    for key, value in event.items():
        if isinstance(value, str | dict | list | tuple) and key != "exception":
            text = value if isinstance(value, str) else repr(value)
            if len(text) > MAX_LOGGED_TEXT:
                text = f"{text[:MAX_LOGGED_TEXT]}… ({len(text)} characters)"
            event[key] = text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return event


def _render_for_journal(logger: Any, name: str, event: structlog.typing.EventDict) -> str:
    """`<4>device_alert device_id=esp32_001 …`: systemd takes the priority from the front (sd-daemon(3), syslog(3))."""
    priority = {"debug": 7, "info": 6, "warning": 4}.get(event.pop("level"), 3)
    text, render = event.pop("event"), structlog.processors.LogfmtRenderer(bool_as_flag=False)
    return f"<{priority}>{text} {render(logger, name, event)}".rstrip()


# -- listening ---------------------------------------------------------------------------------------------------------


def raise_open_files_limit() -> int:
    """Ask for all open files that the system allows: shells give 1,024. Returns for how many connections. Raises StartError."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2 * RESERVED_FILES:
        raise StartError(f"the system allows {hard} open files (ulimit -n): it must be {2 * RESERVED_FILES} or more")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard - RESERVED_FILES


class TlsConnection(asyncio.sslproto.SSLProtocol):
    """asyncio's TLS, which takes 300 KB a connection and keeps those whose handshake failed, in 12 KB."""

    max_size = 16 << 10  # a TLS record; asyncio would read 256 KiB at once, into a buffer for each connection

    def _wakeup_waiter(self, exc: BaseException | None = None) -> None:
        # Nobody waits for a handshake's error, whose traceback would keep all of the connection (before Python 3.13).
        super()._wakeup_waiter()
        if exc is not None:
            exc.__traceback__ = None


def _tls_options(settings: Settings) -> dict[str, Any]:
    """What `create_server` takes for the certificate that is set, if one is. Raises StartError."""
    if settings.tls_cert is None or settings.tls_key is None:
        return {}
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password="")  # a service has nobody to ask for one
    except OSError as error:
        files = f"the certificate {settings.tls_cert} with {settings.tls_key}, which must not be encrypted"
        raise StartError(f"can't use {files}: {error.strerror or error}") from None
    asyncio.sslproto.SSLProtocol = TlsConnection  # type: ignore[misc] # asyncio has no argument for it
    return {"ssl": context, "ssl_handshake_timeout": TLS_HANDSHAKE_TIMEOUT_S}


async def listen(settings: Settings, connection: Callable[[], HttpConnection], tls: Mapping[str, Any]) -> asyncio.Server:
    """Let connections in at every address of the host, all by one port. Raises StartError."""
    host, port = None if settings.host in EVERY_ADDRESS else settings.host, settings.port
    try:
        if port == 0:  # each address would be given one of its own
            with socket.create_server(("", 0)) as probe:
                port = probe.getsockname()[1]
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(LISTEN_TIMEOUT_S):
            listener = await loop.create_server(connection, host, port, backlog=ACCEPTED_AT_ONCE, **tls)
        for accepting in listener.sockets:
            with accepting.dup() as waiting:
                waiting.listen(LISTEN_BACKLOG)  # asyncio has one number for both: with 1,024 for both 5,000 boards took 20 s
        return listener
    except (OSError, UnicodeError) as error:
        number = getattr(error, "errno", None) or 0  # a resolver's are negative
        reason = os.strerror(number) if number > 0 else cause_of(error)
        raise StartError(f"can't listen on {settings.host} port {settings.port}: {reason}") from None


def page_urls(scheme: str, host: str, port: int) -> str:
    """What to open in a browser: the page, at the address that the machine has just now, and at its name."""
    hosts = [f"[{host}]" if ":" in host else host]
    if host in EVERY_ADDRESS:
        hosts = ["127.0.0.1", socket.gethostname().partition(".")[0] + ".local"]
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # nobody's (RFC 5737): nothing is sent, but the way there begins here
            hosts[0] = probe.getsockname()[0]
    return " ".join(f"{scheme}://{host}:{port}/" for host in hosts)


# -- start and stop ----------------------------------------------------------------------------------------------------


def notify(*assignments: str) -> None:
    """Tell systemd such assignments as READY=1 (sd_notify(3)), where it listens."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.setblocking(False)
            out.sendto("\n".join(assignments).encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)


def tell_progress(text: str) -> None:
    """What a start is busy with, for the log and for systemd, which then waits ten minutes for the next such news."""
    log.info("starting", progress=text)
    notify(f"STATUS={text}", "EXTEND_TIMEOUT_USEC=600000000")


def build_app(settings: Settings) -> web.Application:
    """The gateway as an aiohttp application; its parts are GATEWAY and STORE in it."""
    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app[STORE] = store = Store(settings)
    app[GATEWAY] = gateway = Gateway(settings, store)
    RestApi(settings, gateway, store).serve_in(app)
    return app


async def do_what_is_due(gateway: Gateway, store: Store, urls: Callable[[], str], stop: asyncio.Event) -> None:
    """Do what is due regularly until `stop` is set. The watchdog's ping comes from here, so it shows that the loop turns.
    Raises STORE_UNAVAILABLE where the database's file is not what it was.
    """
    watchdog_s = int(os.environ.get("WATCHDOG_USEC") or 0) / 1e6 or math.inf
    interval_s = min(UPKEEP_INTERVAL_S, gateway.ping_interval_s / 4, watchdog_s / 3)
    while not stop.is_set():
        if store.is_lost.is_set():
            raise GatewayError(Code.STORE_UNAVAILABLE, "the database's file is not what it was")
        gateway.sweep(interval_s)
        store.maintain()
        health = gateway.health()
        notify(f"STATUS={health['devices_online']} devices online, {health['open_commands']} open commands; open {urls()}")
        if store.is_writer_alive:
            notify("WATCHDOG=1")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), interval_s)


async def serve(settings: Settings, stop: asyncio.Event, on_ready: Callable[[int], None] = lambda port: None) -> int:
    """Run the gateway until `stop` is set; `on_ready` is told the port. Returns the exit code. Raises StartError."""
    limit, tls_options = raise_open_files_limit(), _tls_options(settings)
    app = build_app(settings)
    gateway, store = app[GATEWAY], app[STORE]
    runner = web.AppRunner(app, shutdown_timeout=HANDLERS_TIMEOUT_S)
    await store.open(gateway.restore, tell_progress, stop)
    exit_code = 1
    try:
        async with contextlib.AsyncExitStack() as way_out:  # each of its steps is taken, whatever became of the others
            await runner.setup()
            way_out.push_async_callback(runner.cleanup)  # answers that are under way end
            assert runner.server is not None
            connection = functools.partial(HttpConnection, runner.server, gateway, limit)
            listener = await listen(settings, connection, tls_options)
            gateway.dispatch.start()
            if settings.mqtt_url:
                way_out.push_async_callback(Broker(settings, gateway).stop)
            way_out.push_async_callback(gateway.stop)  # boards and listeners are logged off
            way_out.callback(listener.close)
            way_out.callback(log.info, "stopping")
            way_out.callback(notify, "STOPPING=1", "STATUS=stopping")
            port = listener.sockets[0].getsockname()[1]
            urls = functools.partial(page_urls, "https" if tls_options else "http", settings.host, port)
            log.info("listening", open=urls(), address=settings.host, database=str(settings.database_path.absolute()))
            notify("READY=1")
            on_ready(port)
            await do_what_is_due(gateway, store, urls, stop)
        exit_code = 0
    except StartError:
        raise
    except Exception as error:
        log.error("failed", error=str(error), exc_info=not isinstance(error, GatewayError))
    finally:
        if not await store.close(STORE_CLOSE_TIMEOUT_S):
            exit_code = 1
    log.info("stopped", exit_code=exit_code)
    return exit_code


# ======================================================================================================================
# Simulator
# ======================================================================================================================

URL_PATTERN = r"\Ahttps?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:([1-5]?[0-9]{1,4}|6[0-5][0-9]{3}))?/?\Z"
Url = Annotated[str, text_like(URL_PATTERN, "http://host:port or https://host:port")]
NO_ANSWER = (OSError, aiohttp.ClientError, LookupError, ValueError)  # a timeout is an OSError, what is no JSON a ValueError


class FleetPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What `amhrpd.py simulate` plays, checked. Flags follow from the fields as they do in Settings."""

    url: Annotated[Url, about("the gateway")] = "http://127.0.0.1:8000"
    devices: Annotated[int, number(1, 9999, "how many boards")] = 10
    device_type: Annotated[DeviceType, about("their type")] = "ESP32"
    heartbeat_interval_s: Annotated[float, number(0.01, 3600, "seconds between a board's heartbeats")] = 5.0
    status_interval_s: Annotated[float, number(0, 3600, "seconds between a board's snapshots, 0 is no pause")] = 1.0
    ack_delay_s: Annotated[float, number(0, 300, "seconds that a board takes to answer a command")] = 0.0015
    failure_rate: Annotated[float, number(0, 1, "share of commands answered with a failure")] = 0.0
    reconnect_rate: Annotated[float, number(0, 600, "power cuts a board and minute, at random")] = 0.0
    commands: Annotated[int, number(-1, 1_000_000, "how many commands to all boards; -1 is one every 3 s")] = -1
    duration_s: Annotated[float, number(0, 86400, "seconds to play, 0 is until Ctrl-C")] = 30.0
    api_token: Token | None = None
    device_token: Token | None = None


def readings(number: int, at_s: float) -> dict[str, float]:
    """What board `number` measures at a moment (s): °C, % humidity, % battery, dBm. Slow waves, shifted from board to board."""
    waves = {"temperature": (23, 4, 120), "humidity": (48, 12, 300), "battery": (70, 25, 900), "rssi": (-60, 9, 45)}
    return {
        name: round(middle + swing * math.sin(math.tau * at_s / period_s + number), 2 if name == "temperature" else 1)
        for name, (middle, swing, period_s) in waves.items()
    }


class SimulatedBoard:
    """A board that behaves on the wire as the servo sketch of the contract's section 1 does."""

    POWER_ON_STEP_S = 0.002  # boards come up one after the other, 500 a second
    REBOOT_S = (0.5, 5.0)  # of a power cut, and of a lost connection: how soon the boards in the field are back
    CONFIRM_TIMEOUT_S = 30.0  # boards without a pause leave some 2 MB in the network's buffers each

    def __init__(self, fleet: Fleet, number: int) -> None:
        self.device_id = f"sim_{number:04d}"
        self.is_up = False
        self.times_up = 0
        self.snapshots = 0  # sent; the next one has this number
        self.confirmed: set[int] = set()  # those that the gateway has handled for certain
        self._fleet, self._plan, self._number = fleet, fleet.plan, number

    async def live(self, stop: asyncio.Event) -> None:
        """Connect, do what boards do, lose power, come back, until `stop` is set. A cut waits for what was sent to be there."""
        token, cuts_a_minute = self._plan.device_token, self._plan.reconnect_rate
        await asyncio.sleep(self._number * self.POWER_ON_STEP_S)
        while not stop.is_set():
            try:
                async with websockets.connect(
                    f"{self._plan.url.rstrip('/').replace('http', 'ws', 1)}/ws/{self.device_id}",
                    origin=websockets.Origin("file://"),
                    subprotocols=[websockets.Subprotocol("arduino")],
                    additional_headers={"Authorization": aiohttp.encode_basic_auth("board", token)} if token else {},
                    compression=None,
                    ping_interval=None,
                    proxy=None,
                ) as socket_:
                    metadata = {"device_id": self.device_id, "firmware_version": "2.0.0", "servo_count": 10}
                    await self._send(socket_, "registration", metadata=metadata)
                    first, self.is_up = self.snapshots, True
                    self.times_up += 1
                    works = (self._heartbeat(socket_), self._report(socket_), self._answer(socket_), stop.wait())
                    tasks = [asyncio.create_task(work) for work in works]
                    until_cut_s = random.expovariate(cuts_a_minute / 60) if cuts_a_minute else None
                    await asyncio.wait(tasks, timeout=until_cut_s, return_when=asyncio.FIRST_COMPLETED)
                    self.is_up = False
                    for error in await end_tasks(tasks):
                        raise error
                    async with asyncio.timeout(self.CONFIRM_TIMEOUT_S):
                        await (await socket_.ping())  # answered after all that came before it was handled
                    self.confirmed.update(range(first, self.snapshots))
                    socket_.transport.abort()  # a power cut has no close frame
            except (OSError, websockets.WebSocketException) as error:
                self._fleet.errors.append(cause_of(error))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), random.uniform(*self.REBOOT_S))

    async def _send(self, socket_: websockets.ClientConnection, message_type: str, **fields: object) -> None:
        await socket_.send(json.dumps({"message_type": message_type, "device_type": self._plan.device_type, **fields}))
        self._fleet.messages += 1

    async def _heartbeat(self, socket_: websockets.ClientConnection) -> None:
        while True:
            await self._send(socket_, "heartbeat")
            await asyncio.sleep(self._plan.heartbeat_interval_s)

    async def _report(self, socket_: websockets.ClientConnection) -> None:
        await asyncio.sleep(random.random() * self._plan.status_interval_s)
        while True:
            payload = readings(self._number, time.monotonic()) | {"run": self._fleet.run, "seq": self.snapshots}
            self.snapshots += 1
            await self._send(socket_, "status", payload=payload)
            await asyncio.sleep(self._plan.status_interval_s)

    async def _answer(self, socket_: websockets.ClientConnection) -> None:
        async for frame in socket_:
            message = json.loads(frame)
            if message["message_type"] == "error":
                self._fleet.errors.append(message["error_message"])
                continue
            if self._plan.devices <= 10 and sys.stderr.isatty():  # \x1b[K clears what the live line had there
                shown = f"{self.device_id}: {message['command_name']!r} {json.dumps(message['payload'])}"
                print(f"\r{shown[:200]}\x1b[K", file=sys.stderr)
            await asyncio.sleep(self._plan.ack_delay_s)
            status = "failure" if random.random() < self._plan.failure_rate else "success"
            await self._send(socket_, "command_ack", command_id=message["command_id"], status=status)
            self._fleet.acks[message["command_id"]].add(self.device_id)


class Fleet:
    """All boards of a plan, the caller who sends commands, and the auditor who asks the gateway what it has kept."""

    def __init__(self, plan: FleetPlan) -> None:
        self.plan = plan
        self.run = uuid.uuid4().hex[:8]  # tells its snapshots from those of another time
        self.messages = 0  # sent
        self.acks: defaultdict[str, set[str]] = defaultdict(set)  # command_id -> which boards sent theirs
        self.errors: list[str] = []
        self._boards = [SimulatedBoard(self, number) for number in range(1, plan.devices + 1)]
        self._posts_s: list[float] = []  # how long each POST took ...
        self._answers_s: list[float] = []  # ... and, by the gateway's own times, each command until all had answered
        self._missing: list[str] = []
        self._session: aiohttp.ClientSession

    async def play(self, stop: asyncio.Event) -> int:
        """Play until the plan's duration is over or `stop` is set, audit, print the table. Returns the exit code: 1 if anything
        is missing. Raises StartError if the gateway doesn't answer, before or after.
        """
        headers = {"Authorization": f"Bearer {self.plan.api_token}"} if self.plan.api_token else {}
        try:
            async with aiohttp.ClientSession(self.plan.url, headers=headers) as self._session:
                await self._ask("GET", "/devices?device_type=none")
                began_s = time.monotonic()
                if self.plan.duration_s:
                    asyncio.get_running_loop().call_later(self.plan.duration_s, stop.set)
                boards = [asyncio.create_task(board.live(stop)) for board in self._boards]
                others = [asyncio.create_task(work) for work in (self._show_progress(), self._send_commands())]
                await stop.wait()
                await end_tasks(others)
                await asyncio.gather(*boards)
                worked_s = time.monotonic() - began_s
                print("\nasking the gateway what it has kept …", file=sys.stderr)
                found = await self._audit()
        except NO_ANSWER as error:
            raise StartError(f"no answer from {self.plan.url}: {cause_of(error)}") from None
        self._print_table(worked_s, found)
        return 1 if self._missing else 0

    async def _ask(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        async with self._session.request(method, path, json=body) as response:
            answer: dict[str, Any] = await response.json()
        if response.status not in (200, 404):  # 404: it knows nothing of it
            raise LookupError(answer.get("error", response.reason))
        return answer

    async def _send_commands(self) -> None:
        """Send as many commands as planned, evenly over the duration."""
        count = self.plan.commands
        interval_s = self.plan.duration_s / (count + 1) if count > 0 and self.plan.duration_s else 3.0
        for number in itertools.count() if count < 0 else range(count):
            await asyncio.sleep(interval_s)
            body = {"device_type": self.plan.device_type, "command_name": "blink", "payload": {"count": number}}
            posted_s = time.monotonic()
            try:
                await self._ask("POST", "/command", body)
                self._posts_s.append(time.monotonic() - posted_s)
            except NO_ANSWER as error:
                self._missing.append(f"command {number}: {cause_of(error)}")

    async def _show_progress(self) -> None:
        """One live line on a terminal, else a line every ten seconds."""
        begin, end, pause_s = ("\r", "", 0.5) if sys.stderr.isatty() else ("", "\n", 10.0)
        for tick in itertools.count():
            up = f"boards up {sum(board.is_up for board in self._boards)}/{self.plan.devices}"
            counts = f"messages {self.messages}  acks {sum(map(len, self.acks.values()))}  errors {len(self.errors)}"
            print(f"{begin}{int(tick * pause_s):5} s  {up}  {counts}", end=end, file=sys.stderr, flush=True)
            await asyncio.sleep(pause_s)

    async def _audit(self) -> int:
        """Note what is missing of what was sent. Returns how many of the snapshots the gateway has kept."""
        found = 0
        for board in self._boards:
            kept = await self._kept(board.device_id)
            found += len(kept)
            if not board.times_up:
                self._missing.append(f"{board.device_id}, which never came up")
            if lost := board.confirmed - kept:
                self._missing.append(f"{board.device_id}: {len(lost)} of {board.snapshots} snapshots")
        for command_id, acks in self.acks.items():
            row = await self._ask("GET", f"/command-logs/{command_id}")
            if unknown := acks - (row.get("response_data") or {}).keys():
                self._missing.append(f"command {command_id}: {len(unknown)} acks")
            if row.get("completed_at"):
                created, completed = (datetime.fromisoformat(row[name]) for name in ("created_at", "completed_at"))
                self._answers_s.append((completed - created).total_seconds())
        return found

    async def _kept(self, device_id: str) -> set[int]:
        """The numbers of a board's snapshots of this run, which are the newest in its history."""
        kept, before = set[int](), ""
        while True:
            states = (await self._ask("GET", f"/state-history/{device_id}?limit=1000{before}")).get("states", ())
            ours = [state for state in states if state["state_data"].get("run") == self.run]
            if not ours:
                return kept
            kept.update(state["state_data"]["seq"] for state in ours)
            before = f"&before_id={ours[-1]['id']}"

    def _print_table(self, worked_s: float, found: int) -> None:
        sent, confirmed = sum(board.snapshots for board in self._boards), sum(len(board.confirmed) for board in self._boards)
        table = {
            "boards": f"{self.plan.devices} of type {self.plan.device_type}, {worked_s:.1f} s",
            "messages sent": f"{self.messages}, {self.messages / worked_s:.0f} a second",
            "acks sent": sum(map(len, self.acks.values())),
            "POST /command": percentiles(self._posts_s),
            "all boards acked": percentiles(self._answers_s),
            "reconnects": sum(max(0, board.times_up - 1) for board in self._boards),
            "errors": f"{len(self.errors)}{f' (the last: {self.errors[-1]})' if self.errors else ''}",
            "snapshots": f"{sent} sent, {found} in the history, {sent - confirmed} not confirmed",
            "missing": f"{len(self._missing)} things" if self._missing else "nothing",
        }
        for name, value in table.items():
            print(f"{name:17} {value}")
        for text in self._missing[:20]:
            print(f"  missing: {text}")


def percentiles(times_s: Sequence[float]) -> str:
    """Nearest-rank percentiles of durations (s), written in milliseconds."""
    ordered = sorted(times_s)
    shown = (f"p{share} {ordered[math.ceil(len(ordered) * share / 100) - 1] * 1000:.1f} ms" for share in (50, 95, 99))
    return f"{len(ordered)} times, {', '.join(shown)}" if ordered else "none"


# ======================================================================================================================
# Command line
# ======================================================================================================================

USES = """
  amhrpd.py [serve] [flags]    run the gateway: boards connect to ws://HOST:8000/ws/{device_id},
                               callers and browsers to http://HOST:8000/
  amhrpd.py simulate [flags]   play a fleet of boards against a running gateway, then ask it whether all that they
                               sent was kept: exit code 1 if anything is missing
"""


class Parser(argparse.ArgumentParser):
    """A flag for each setting of a type. What can't be parsed raises ConfigError: one line, not the whole usage."""

    def __init__(self, use: str, kind: type[msgspec.Struct], description: str) -> None:
        fields = {field.name: field for field in msgspec.structs.fields(kind)}
        flags = {name: flag for name in fields if (flag := flag_of(name)) is not None}
        super().__init__(
            prog=f"amhrpd.py {use}".rstrip(),
            usage="%(prog)s [flags]",
            allow_abbrev=False,
            description=description,
            epilog=f"Only as variables: {', '.join(variable_of(name) for name in fields if name not in flags)}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for name, flag in flags.items():
            field = fields[name]
            notes = [variable_of(name)] if kind is Settings else []
            notes += [f"default {field.default}"] if field.default not in (None, "") else []
            text = f"{schema_of(field.type)['description']}; {requirement(field.type)} [{' '.join(notes)}]".removesuffix(" []")
            metavar = "S" if name.endswith("_s") else name.rpartition("_")[2].upper()
            self.add_argument(flag, dest=name, metavar=metavar, help=text.replace("%", "%%"))

    def error(self, message: str) -> NoReturn:
        """What argparse calls for a flag or a word that it doesn't know."""
        raise ConfigError(f"{message}; '{self.prog} --help' shows all flags")


def _gateway(words: Sequence[str]) -> Callable[[asyncio.Event], Coroutine[Any, Any, int]]:
    parser = Parser("", Settings, f"Gateway for ESP32 boards: WebSocket for boards, REST for callers, SQLite.\n{USES}")
    parser.add_argument("--version", action="version", version=f"amhrpd {VERSION}")
    settings = load_settings(Settings, vars(parser.parse_args(words)), os.environ)
    configure_logging(settings.log_level, settings.log_format)
    # Full garbage collections are made rare, five times as rare as by default: one stops the loop for about half a microsecond
    # an object, 80 ms with 1,000 boards, measured on a server. What was imported lives for ever: nothing to look through.
    gc.freeze()
    gc.set_threshold(*gc.get_threshold()[:2], 50)
    sys.setswitchinterval(0.001)  # the writer's thread waits so long for each of its turns beside a busy loop, not 5 ms
    return functools.partial(serve, settings)


def _fleet(words: Sequence[str]) -> Callable[[asyncio.Event], Coroutine[Any, Any, int]]:
    parser = Parser("simulate", FleetPlan, f"Play a fleet of boards against a running gateway.\n{USES}")
    raise_open_files_limit()
    plan = load_settings(FleetPlan, vars(parser.parse_args(words)), os.environ)
    return Fleet(plan).play


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for, and end the process: with 0, or 1 for a failure. Returns 2 for a bad setting."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    use = words.pop(0) if words[:1] in (["serve"], ["simulate"]) else "serve"
    try:
        work = (_fleet if use == "simulate" else _gateway)(words)
        runner, stop = asyncio.Runner(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
                runner.get_loop().add_signal_handler(number, stop.set)
        exit_code = runner.run(work(stop))
    except (ConfigError, StartError) as error:
        print(f"amhrpd: {error}", file=sys.stderr)
        if isinstance(error, ConfigError):
            return 2
        exit_code = 1
    logging.shutdown()
    sys.stdout.flush()
    os._exit(exit_code)  # the loop's end, and Python's own, would wait for threads that a disk or a resolver keeps


if __name__ == "__main__":
    sys.exit(main())
