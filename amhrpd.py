#!/usr/bin/env python3
"""AMHR-PD gateway: ESP32 boards over WebSocket, people and programs over REST, history in SQLite.

    amhrpd.py [serve]     run the gateway
    amhrpd.py simulate    play a fleet of boards against a running gateway

The file reads from top to bottom; each room uses only the rooms above it:

    Configuration   Settings, from flags and environment
    Errors          what can be refused
    Messages        what boards and callers send, decoded and validated in one step
    Store           the four tables, the file, one writer thread, a few reader threads
    Devices         the registry: every device known, the connections of those online
    Commands        the commands that are open or may still be answered
    Events          who listens to what happens
    Gateway         what happens when: the verbs
    Device socket   one board's connection: frame -> message -> verb, error -> reply
    Page            what a browser shows at /
    REST            thin handlers, access rules, one shape for every error
    Service         logging, what repeats itself once a minute; systemd; start and stop in order
    Simulator       boards to try the gateway with
    Command line    main()

On the event loop nothing waits for the disk: dictionaries are the truth while the gateway runs, and the database follows.
"""

from __future__ import annotations

import argparse
import asyncio
import asyncio.sslproto
import base64
import contextlib
import csv
import dataclasses
import difflib
import enum
import errno
import fcntl
import functools
import gc
import hashlib
import hmac
import io
import ipaddress
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
import stat
import struct
import sys
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import GenericAlias
from typing import Annotated, Any, ClassVar, Generic, Literal, NamedTuple, NoReturn, Protocol, TypeVar, get_args

import aiohttp
import dataset
import msgspec
import prometheus_client
import sqlalchemy as sa
import structlog
import websockets
from aiohttp import WebSocketError, WSCloseCode, WSMsgType, web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from aiohttp_sse import sse_response
from prometheus_client import core as prometheus

VERSION = "1.0.0"

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("amhrpd")

# ======================================================================================================================
# Configuration
# ======================================================================================================================


class ConfigError(Exception):
    """A setting has a value it can't have; the text names the setting, the value and what it may be."""


def number(low: float, high: float, text: str) -> Any:
    """What is said of a number in a setting's type: its range, and its help."""
    return msgspec.Meta(ge=low, le=high, description=text)


def about(text: str) -> Any:
    """What is said of any other setting in its type: its help."""
    return msgspec.Meta(description=text)


# What a text may be is said by the `title` of its type; numbers and choices speak for themselves.
Token = Annotated[
    str,
    msgspec.Meta(pattern=r"\A[!-9;-~]{8,512}\Z", title="a token of 8 to 512 printable ASCII characters without space or colon"),
]
ORIGINS_PATTERN = r"(?i)\A(\s*([a-z][a-z0-9+.-]*://[^\s/,]*/?\s*)?(,|\Z))*\Z"
Origins = Annotated[
    str, msgspec.Meta(pattern=ORIGINS_PATTERN, title="scheme://host or scheme://host:port, with commas between")
]
SQLITE_URL_PATTERN = r"\Asqlite:///(?!:memory:)[^?]+\Z"
SqliteUrl = Annotated[
    str,
    msgspec.Meta(pattern=SQLITE_URL_PATTERN, title="sqlite:///relative.db or sqlite:////absolute/path.db, which names a file"),
]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["auto", "console", "journal", "json"]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that can be set, checked. Durations are seconds.

    A field's flag and variable follow from its name without `_s` (see `flag_of`, `variable_of`), its range, choices and
    help from its type.
    """

    host: Annotated[str, about("address to listen on; 0.0.0.0 is every address, IPv6 too")] = "0.0.0.0"
    port: Annotated[int, number(0, 65535, "port to listen on; 0 lets the system choose")] = 8000
    database_url: Annotated[SqliteUrl, about("the database's file")] = "sqlite:///./amhrpd.db"
    ping_interval_s: Annotated[float, number(0.1, 3600, "seconds between pings, which have half of it for an answer")] = 20.0
    heartbeat_timeout_s: Annotated[float, number(0.1, 86400, "seconds of silence that end a board with heartbeats")] = 90.0
    registration_timeout_s: Annotated[float, number(0.1, 3600, "seconds that a connection has to register")] = 10.0
    command_timeout_s: Annotated[float, number(1, 300, "seconds to answer a command that names no timeout")] = 30.0
    commit_interval_s: Annotated[float, number(0, 3600, "seconds between two writes of telemetry, at least")] = 1.0
    keep_days: Annotated[int, number(0, 36500, "days that history is kept; 0 is for ever")] = 0
    min_free_mb: Annotated[int, number(0, 1000000, "MB of the disk to leave free: the oldest rows make room; 0 is off")] = 512
    max_message_bytes: Annotated[int, number(1024, 1048576, "longest message taken from a board")] = 65536
    api_token: Annotated[Token | None, about("what callers of the REST API must show")] = None
    device_token: Annotated[Token | None, about("what boards must show")] = None
    allowed_origins: Annotated[Origins, about("pages of others that may call the API: http://host:port, …")] = ""
    tls_cert: Annotated[Path | None, about("certificate chain (PEM): serve https and wss")] = None
    tls_key: Annotated[Path | None, about("the certificate's private key (PEM)")] = None
    log_level: Annotated[LogLevel, about("least level logged")] = "info"
    log_format: Annotated[LogFormat, about("auto is console on a terminal, journal under systemd, else json")] = "auto"

    @property
    def database_path(self) -> Path:
        """The file that `database_url` names."""
        return Path(self.database_url.removeprefix("sqlite:///"))

    @property
    def origins(self) -> frozenset[str]:
        """`allowed_origins` one by one, as `normal_origin` writes them."""
        return frozenset(normal_origin(part.strip().rstrip("/")) for part in self.allowed_origins.split(",") if part.strip())

    @classmethod
    def load(cls, flags: Mapping[str, str | None], environ: Mapping[str, str]) -> Settings:
        """The settings of `flags` (field name -> text, None where not given) and `environ`. Raises ConfigError."""
        settings = cls(**read_settings(cls, flags, environ))
        if (settings.tls_cert is None) != (settings.tls_key is None):
            raise ConfigError("--tls-cert (AMHRPD_TLS_CERT) and --tls-key (AMHRPD_TLS_KEY) go together: set both or neither")
        return settings


def flag_of(field: str) -> str | None:
    """The flag of a setting. None for tokens: command lines are seen by everybody on the machine."""
    return None if field.endswith("_token") else "--" + field.removesuffix("_s").replace("_", "-")


def variable_of(field: str) -> str:
    """The environment variable of a setting."""
    return "DATABASE_URL" if field == "database_url" else "AMHRPD_" + field.removesuffix("_s").upper()


def read_settings(kind: type[msgspec.Struct], flags: Mapping[str, str | None], environ: Mapping[str, str]) -> dict[str, Any]:
    """What `flags`, which win, and `environ` set of `kind`'s fields. An empty text counts as not given, but for a token,
    without which the door would be open.

    The variables are always the gateway's, so that the simulator can run with the same ones. Raises ConfigError for the
    first value that can't be, and for a variable that nobody knows: a token with a misspelt name would leave the door open.
    """
    known = [variable_of(name) for name in Settings.__struct_fields__]
    for variable in sorted(environ):
        if variable.startswith("AMHRPD_") and variable not in known:
            (meant,) = difflib.get_close_matches(variable, known, n=1, cutoff=0)
            raise ConfigError(f"{variable} is no setting: did you mean {meant}?")
    values: dict[str, Any] = {}
    for field in msgspec.structs.fields(kind):
        source, text = flag_of(field.name), flags.get(field.name)
        if not text and (variable := variable_of(field.name)) in known:
            source, text = variable, environ.get(variable)
        if text is None or (text == "" and not field.name.endswith("_token")):
            continue
        if isinstance(base_type(field.type), msgspec.inspect.LiteralType):
            text = text.lower()
        try:
            values[field.name] = msgspec.convert(from_text(text, field.type), field.type)
        except msgspec.ValidationError:
            shown = f"{source} is (hidden): it must be {requirement(field.type)}"
            raise ConfigError(shown if field.name.endswith("_token") else wrong_value(source, text, field.type)) from None
    return values


@functools.cache
def base_type(kind: Any) -> Any:
    """What a type is when it isn't None, without its metadata: one of msgspec.inspect's types."""
    info = msgspec.inspect.type_info(kind)
    while isinstance(info, msgspec.inspect.Metadata | msgspec.inspect.UnionType):
        info = info.type if isinstance(info, msgspec.inspect.Metadata) else info.types[0]
    return info


def metadata_of(kind: Any, key: str) -> str | None:
    """A type's `title` or `description`, also where the type is optional."""
    schema = msgspec.json.schema(kind, schema_hook=lambda _: {"type": "string"})
    return next((part[key] for part in (schema, *schema.get("anyOf", ())) if key in part), None)


def requirement(kind: Any) -> str:
    """What a value of a type may be, in words that follow "it must be"."""
    if (title := metadata_of(kind, "title")) is not None:
        return title
    match info := base_type(kind):
        case msgspec.inspect.IntType(ge=int(), le=int()):
            return f"a whole number from {info.ge} to {info.le}"
        case msgspec.inspect.FloatType(ge=int() | float(), le=int() | float()):
            return f"a number from {info.ge:g} to {info.le:g}"
        case msgspec.inspect.FloatType():
            return "a number"
        case msgspec.inspect.LiteralType():
            return f"one of {', '.join(map(str, info.values))}"
        case msgspec.inspect.StrType(min_length=int(), max_length=int()):
            return f"a text of {info.min_length} to {info.max_length} characters"
        case msgspec.inspect.DictType() | msgspec.inspect.StructType():
            return "a JSON object"
        case _:
            return "a text"


def wrong_value(name: str | None, value: object, kind: Any) -> str:
    """What is wrong with a value: "wait is 99: it must be a number from 0 to 60"."""
    shown = msgspec.json.encode(value).decode() if isinstance(value, dict | list | bool | None) else repr(value)
    return f"{name} is {shown if len(shown) <= 80 else shown[:80] + '…'}: it must be {requirement(kind)}"


def from_text(text: str, kind: Any) -> Any:
    """What a setting or a query parameter, which are texts, stands for as a value of a type; where nothing, the text."""
    with contextlib.suppress(ValueError, OverflowError):
        match base_type(kind):
            case msgspec.inspect.IntType() | msgspec.inspect.FloatType() if re.fullmatch("[0-9]{1,20}", text):
                return int(text)
            case msgspec.inspect.FloatType() if math.isfinite(value := float(text)):
                return value
            case msgspec.inspect.CustomType():
                return Path(text)
            case msgspec.inspect.DateTimeType():  # a `+` that nobody escaped arrives as a space
                return naive_utc(datetime.fromisoformat(re.sub(r"(:.*) (\d\d:?\d\d)$", r"\1+\2", text.upper())))
    return text


def naive_utc(moment: datetime) -> datetime:
    """A moment as the store keeps it; one without a zone is taken as UTC."""
    return moment if moment.tzinfo is None else moment.astimezone(UTC).replace(tzinfo=None)


def normal_origin(origin: str) -> str:
    """An origin as browsers write it: in lower case, without the port that its scheme implies (RFC 6454)."""
    origin = origin.lower()
    default_port = {"http": ":80", "https": ":443"}.get(origin.partition("://")[0], "")
    return origin.removesuffix(default_port) if default_port else origin


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
    UNSUPPORTED_MEDIA_TYPE = 415, "a body that is compressed or in another charset than UTF-8"
    RESOURCE_EXHAUSTED = 429, "a limit is reached; later it may work"
    INTERNAL_ERROR = 500, "a defect of the gateway; the log has the traceback"
    STORE_UNAVAILABLE = 503, "the database can't be read or written at the moment"
    STOPPING = 503, "the gateway is going down"


class GatewayError(Exception):
    """What the gateway doesn't do, and why. The text says what and where; it goes to the caller or the board as it is."""

    def __init__(self, code: Code, text: str) -> None:
        super().__init__(text)
        self.code = code

    @property
    def status(self) -> int:
        """The HTTP status of an answer that says it."""
        return int(self.code.value[0])


class StartError(Exception):
    """The gateway can't start; the text is the one line that says why."""


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

DEVICE_ID_PATTERN = r"[A-Za-z0-9._-]{1,64}"  # contract, section 2

DeviceType = Annotated[str, msgspec.Meta(min_length=1, max_length=50)]
CommandName = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
DeviceId = Annotated[str, msgspec.Meta(pattern=rf"\A{DEVICE_ID_PATTERN}\Z", title="1 to 64 of A-Z a-z 0-9 . _ -")]
DeviceIds = Annotated[
    list[DeviceId],
    msgspec.Meta(min_length=1, max_length=1000, title="one device_id or several, 1 to 64 of A-Z a-z 0-9 . _ - each"),
]
Moment = Annotated[
    datetime,
    msgspec.Meta(title="an ISO 8601 time such as 2026-01-24T10:30:45Z", extra_json_schema={"format": "date-time"}),
]


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


AnyBoardMessage = Registration | Heartbeat | Status | CommandAck | ErrorReport | Alert
BOARD_MESSAGES: Mapping[str, type[BoardMessage]] = {str(kind.__struct_config__.tag): kind for kind in get_args(AnyBoardMessage)}


class Deadman(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What a device gets when no other command reaches it within `after` seconds (contract, section 4)."""

    after: Annotated[float, msgspec.Meta(ge=0.2, le=60)]
    command_name: CommandName
    payload: dict[str, Any] | None = None


EVERY_TYPE = "*"  # contract, section 6: as a target every device online, in a row devices of several types


class CommandRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`POST /command`, whatever form it came in (contract, section 6). `timeout` and `wait` in seconds; None is left out."""

    command_name: CommandName
    device_type: DeviceType | None = None
    device_id: DeviceIds | None = None  # `decode_command` takes one as a text, too
    payload: dict[str, Any] | None = None
    deadman: Deadman | None = None
    timeout: Annotated[float, msgspec.Meta(ge=1, le=300)] | None = None
    wait: Annotated[float, msgspec.Meta(ge=0, le=60)] | None = None


board_decoder = msgspec.json.Decoder(AnyBoardMessage)
json_decoder = msgspec.json.Decoder()
json_encoder = msgspec.json.Encoder()
AnyStruct = TypeVar("AnyStruct", bound=msgspec.Struct)


def decode_board_message(data: bytes) -> AnyBoardMessage:
    """Decode and validate one text frame of a board. Raises GatewayError."""
    data = without_padding(data)
    try:
        data.decode()  # the decoder below doesn't look into keys that it skips
        message: AnyBoardMessage = board_decoder.decode(data)
        check_depth(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        message = convert_board_message(decode_json(data))  # once more, to say what is wrong
    if isinstance(message, Registration):
        extras = decode_json(data)
        for key in ("message_type", "device_type", "device_id", "timestamp", "metadata"):
            extras.pop(key, None)
        if extras:
            message.metadata = extras | (message.metadata or {})
    return message


def convert_board_message(values: Any) -> AnyBoardMessage:
    """The message that decoded JSON is. Raises GatewayError."""
    match values:
        case {"message_type": str(tag)} if tag in BOARD_MESSAGES:
            message: Any = convert_fields(values, BOARD_MESSAGES[tag])
        case {"message_type": str(tag)}:
            known = ", ".join(BOARD_MESSAGES)
            raise GatewayError(Code.UNKNOWN_MESSAGE_TYPE, f"unknown message_type {tag[:64]!r}: it must be one of {known}")
        case {"message_type": tag}:
            raise GatewayError(Code.INVALID_FIELD_TYPE, wrong_value("message_type", tag, str))
        case {}:
            raise GatewayError(Code.MISSING_REQUIRED_FIELD, "missing required field `message_type`")
        case _:
            raise GatewayError(Code.INVALID_MESSAGE, "not a JSON object")
    return message  # type: ignore[no-any-return]


def decode_command(query: Mapping[str, str], body: bytes) -> CommandRequest:
    """Make one request of what the query and the body of `POST /command` say, in both forms of the contract's section 6.

    Raises GatewayError.
    """
    kinds = field_types(CommandRequest)
    fields: dict[str, Any] = {name: from_text(text, kinds[name]) for name, text in query.items()}
    if "payload" in query:
        fields["payload"] = decode_json(query["payload"].encode(), "payload in the query: {}")
    if body := without_padding(body):
        content = decode_json(body, 'the body is {}. It must be JSON, such as {{"count": 5}}')
        if "command_name" in query and ("device_type" in query or "device_id" in query):
            content = {"payload": content}
        if not isinstance(content, dict):
            raise GatewayError(Code.INVALID_MESSAGE, "the body must be a JSON object")
        content = {name: value for name, value in content.items() if value is not None or name not in fields}
        if twice := sorted(fields.keys() & content.keys()):
            raise GatewayError(Code.INVALID_FIELD_VALUE, f"{', '.join(twice)}: given in the query and in the body")
        fields |= content
    if isinstance(fields.get("device_id"), str):
        fields["device_id"] = fields["device_id"].split(",")
    request = convert_fields(fields, CommandRequest)
    if request.device_type is None and request.device_id is None:
        raise GatewayError(Code.MISSING_REQUIRED_FIELD, "missing required field `device_type` (or `device_id`)")
    return request


def without_padding(data: bytes) -> bytes:
    """Text without a byte order mark in front, and without blanks and NUL bytes behind: Arduino sketches send whole buffers."""
    return data.removeprefix(b"\xef\xbb\xbf").rstrip(b"\0 \t\r\n")


def decode_json(data: bytes, said: str = "{}") -> Any:
    """Decode any JSON, strictly: UTF-8, no NaN, no lone surrogates, no deep nesting.

    Raises GatewayError, its text as `said` with what is wrong in it.
    """
    code = Code.INVALID_MESSAGE
    try:
        data.decode()
        value = json_decoder.decode(data)
        check_depth(data)
        return value
    except UnicodeDecodeError as error:
        problem = f"not valid UTF-8: byte 0x{data[error.start]:02x}"
    except msgspec.ValidationError:  # there is no other where any type is right
        code, problem = Code.INVALID_FIELD_VALUE, "a number is out of range"
    except msgspec.DecodeError as error:
        problem = f"not valid JSON: {str(error).partition(' (')[0]}"
    except RecursionError:
        problem = f"nested deeper than {MAX_JSON_DEPTH} levels"
    raise GatewayError(code, said.format(problem))


_JSON_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)


def check_depth(data: bytes) -> None:
    """Raise RecursionError for JSON that is nested deeper than MAX_JSON_DEPTH."""
    if data.count(b"{") + data.count(b"[") <= MAX_JSON_DEPTH:
        return  # what every real message comes to, at a fraction of the price
    depth = 0
    for byte in _JSON_STRING.sub(b"", data):
        depth += (byte in b"{[") - (byte in b"}]")
        if depth > MAX_JSON_DEPTH:
            raise RecursionError


@functools.cache
def field_types(kind: type[msgspec.Struct]) -> Mapping[str, Any]:
    """The types of a struct's fields, by name."""
    return {field.name: field.type for field in msgspec.structs.fields(kind)}


def convert_fields(values: Mapping[str, Any], kind: type[AnyStruct], within: str = "") -> AnyStruct:
    """A struct of values that are decoded already; errors name a field with what it is `within`.

    Raises GatewayError, in the gateway's own words.
    """
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$")
    kinds, name = field_types(kind), path.strip(".`").partition("[")[0].partition(".")[0]
    code, inner = Code.INVALID_FIELD_VALUE, base_type(kinds.get(name, str))
    if isinstance(inner, msgspec.inspect.StructType) and isinstance(values[name], dict):
        convert_fields(values[name], inner.cls, f"{within}{name}.")
    if "missing required field" in reason:
        missing = reason.rpartition(" ")[2].strip("`")
        raise GatewayError(Code.MISSING_REQUIRED_FIELD, f"missing required field `{within}{missing}`")
    if "unknown field" in reason:
        unknown = reason.partition("`")[2].rstrip("`")[:64]
        raise GatewayError(code, f"unknown {within + unknown!r}; known here: {', '.join(kinds) or 'nothing'}")
    if "out of range" in reason:
        raise GatewayError(code, f"{within}{name[:64] or 'a number'} is out of range")
    if name not in kinds:
        raise GatewayError(code, f"{within}{name[:64]}: {reason[:100].lower()}")
    if isinstance(values[name], str):
        is_of_type = isinstance(inner, msgspec.inspect.StrType | msgspec.inspect.LiteralType)
    else:
        is_of_type = ", got `" not in reason
    raise GatewayError(code if is_of_type else Code.INVALID_FIELD_TYPE, wrong_value(within + name, values[name], kinds[name]))


def to_json(value: object) -> JsonText:
    """Encode a value of decoded JSON, structs and `msgspec.Raw` as compact JSON text."""
    return json_encoder.encode(value).decode()


def raw(text: JsonText) -> msgspec.Raw:
    """JSON text, to be put as it is into something that is encoded later."""
    return msgspec.Raw(text.encode())


EPOCH = datetime.fromtimestamp(0, UTC).replace(tzinfo=None)


def utc_now() -> datetime:
    """The gateway's wall clock: naive, UTC, as the store keeps it. For records only; durations use the monotonic clock."""
    return EPOCH + timedelta(0, time.time())  # in half the time that `datetime.now(UTC).replace(tzinfo=None)` takes


def format_time(moment: datetime | None) -> str | None:
    """`2026-01-24T10:30:45.123456`, always six digits; None stays None."""
    return None if moment is None else moment.isoformat(timespec="microseconds")


# ======================================================================================================================
# Store
# ======================================================================================================================

Row = dict[str, Any]
TableName = Literal["devices", "device_state_snapshots", "command_logs", "device_connection_logs"]

# The tables of the databases in the field (contract, section 7). SQLite keeps DATETIME and JSON as text, and so do rows here:
# times as `stored_time` writes them, JSON encoded where it came in.
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
}
COLUMNS = {table: {part.split()[0]: part.split()[1] for part in text.split(",")} for table, text in TABLES.items()}
"""Table -> column -> type."""
# Each in the order of rowids (SQLite appends them), which is that of what happened last. What a time has to do with it is the
# matter of `Survey`; an index by time would double what is written of a calm fleet's snapshots.
INDEXES = {
    "ix_amhrpd_snapshots": "device_state_snapshots (device_id, id, timestamp)",
    "ix_amhrpd_events": "device_connection_logs (device_id, id, timestamp)",
    "ix_amhrpd_events_event": "device_connection_logs (device_id, event)",
    "ix_amhrpd_commands_status": "command_logs (status)",
    "ix_amhrpd_commands_type": "command_logs (device_type)",
    "ix_amhrpd_commands_type_status": "command_logs (device_type, status)",
}
LATER_INDEXES = ("ix_amhrpd_events_event", "ix_amhrpd_commands_type_status")
"""Those that a start can do without: a large file gets them when nobody waits for it."""


class History(NamedTuple):
    """A table that grows: the column with the time of a row, and the condition that a row may be deleted."""

    time: str
    may_go: str


HISTORIES: Mapping[TableName, History] = {  # in the order in which they make room
    "device_state_snapshots": History("timestamp", "true"),
    "device_connection_logs": History("timestamp", "true"),
    "command_logs": History("created_at", "status NOT IN ('created', 'sent')"),
}
SCHEMA_VERSION = 1  # PRAGMA user_version; the earlier backend's files have 0

PAGE_BYTES = 4096  # of SQLite's files and logs

IN_THE_FILE = "null"  # as a device's metadata: leave what the file has

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


@dataclasses.dataclass(slots=True)
class Batch:
    """Rows for one transaction, and who waits for it. A device or a command is in it once."""

    devices: dict[str, Row] = dataclasses.field(default_factory=dict)
    snapshots: list[Row] = dataclasses.field(default_factory=list)
    connections: list[Row] = dataclasses.field(default_factory=list)  # of the connection history
    commands: list[Row] = dataclasses.field(default_factory=list)
    waiting: list[asyncio.Future[None]] = dataclasses.field(default_factory=list)
    snapshot_bytes: dict[str, int] = dataclasses.field(default_factory=dict)  # what they take, by device

    def __len__(self) -> int:
        return len(self.devices) + len(self.snapshots) + len(self.connections) + len(self.commands)

    def tables(self) -> Iterator[tuple[TableName, list[Row]]]:
        """Rows table by table, devices first: the others refer to them."""
        yield "devices", list(self.devices.values())
        yield "device_state_snapshots", self.snapshots
        yield "device_connection_logs", self.connections
        yield "command_logs", self.commands


@dataclasses.dataclass(frozen=True, slots=True)
class Restored:
    """What a file has: device rows, each with `state` and `state_timestamp` of its latest snapshot (None where there is
    none), and the rows of commands that may still be answered, oldest first.
    """

    devices: list[Row]  # RESTORED_DEVICES at the most
    commands: list[Row]


# -- what waits to be written ------------------------------------------------------------------------------------------

Value = TypeVar("Value")


class Bounded(Generic[Value]):
    """A dictionary with a limit of entries and of bytes: what is newest wins, and the oldest make room."""

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self.max_entries = max_entries
        self.max_bytes = max_bytes
        self.gave_way = 0  # entries that had to make room, of all time
        self.size_bytes = 0
        self._entries: OrderedDict[str, tuple[Value, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Value]:
        return iter([value for value, _ in self._entries.values()])

    def get(self, key: str) -> Value | None:
        """The value, or None."""
        value, _ = self._entries.get(key, (None, 0))
        return value

    def pop(self, key: str) -> None:
        """Take an entry out, if it is in."""
        _, size_bytes = self._entries.pop(key, (None, 0))
        self.size_bytes -= size_bytes

    def put(self, key: str, value: Value, size_bytes: int, *, is_news: bool = True) -> list[Value]:
        """Put a value in, which is the newest then, or (without `is_news`) as old as it was. Returns those that gave way."""
        _, before_bytes = self._entries.get(key, (None, 0))
        self._entries[key] = value, size_bytes
        self.size_bytes += size_bytes - before_bytes
        if is_news:
            self._entries.move_to_end(key)
        gone: list[Value] = []
        while (len(self._entries) > self.max_entries or self.size_bytes > self.max_bytes) and len(self._entries) > 1:
            oldest = next(other for other in self._entries if other != key)
            gone.append(self._entries[oldest][0])
            self.pop(oldest)
        self.gave_way += len(gone)
        return gone


class Stored(Protocol):
    """A device or a command: it waits as an object, and becomes a row when its turn comes."""

    @property
    def content_bytes(self) -> int:
        """What it takes in memory, about."""

    def row(self) -> Row:
        """The row as it is now."""


class Backlog:
    """What waits to be written, and who waits for that. Belongs to the event loop; `put_*` never wait."""

    # Out of the unit's 320 MB. A snapshot of a real board costs about 1 KB here, so this holds some 30,000 of them.
    TELEMETRY_LIMIT_BYTES = 32 << 20
    CONGESTED_BYTES = 8 << 20  # above this no commit interval is waited for, and boards that flood are slowed down
    SNAPSHOT_OVERHEAD_BYTES = 600  # of a row's dictionary, its times and small texts
    MIN_SHARES = 32  # no device may have more than this part of the limit
    MAX_CONNECTION_ROWS = 20_000  # of the connection history, 600 bytes each
    MAX_COMMANDS = 10_000  # with what follows: as many commands as a caller who drives a robot gives in over an hour
    COMMANDS_LIMIT_BYTES = 16 << 20
    SOON_S = 0.003  # what happens to commands and connections within it is one transaction
    BATCH_BYTES = 1 << 19  # of snapshots; about 5 ms of writing here, so a command's row never waits long behind telemetry
    BESIDE_COMMANDS_BYTES = 1 << 15  # taken along with commands: 0.5 ms, and fewer batches of their own hold commands up

    def __init__(self, commit_interval_s: float) -> None:
        """Telemetry that nobody asks for is written once in `commit_interval_s`."""
        self._commit_interval_s = commit_interval_s
        self._telemetry_due_s = -math.inf  # monotonic: not before this
        self.known_devices: Mapping[str, Stored] = {}  # what other rows refer to must be there, in a fresh file too
        self.in_flight = Batch()
        self.rows_dropped = 0
        self.is_due = asyncio.Event()  # what waits is to be written now
        self._alarm: asyncio.TimerHandle | None = None  # for what may wait some time
        self._devices: dict[str, Stored] = {}
        self._commands: Bounded[Stored] = Bounded(self.MAX_COMMANDS, self.COMMANDS_LIMIT_BYTES)
        self._connections: list[Row] = []
        self._snapshots: deque[Row | asyncio.Future[None]] = deque()  # a future is somebody who waits for all before it
        self._waiting: list[asyncio.Future[None]] = []  # for the others: devices, commands, connections
        self._is_joined = False  # somebody waits, for either
        self._snapshot_count = self._snapshot_bytes = 0  # of those that wait or are in flight
        self._shares: Counter[str] = Counter()  # their bytes for each device that has any

    @property
    def rows_waiting(self) -> int:
        """How many rows are not in the file yet."""
        others = len(self._devices) + len(self._commands) + len(self._connections)
        return others + len(self.in_flight) - len(self.in_flight.snapshots) + self._snapshot_count

    @property
    def is_awaited(self) -> bool:
        """Whether anybody waits for what is queued, or it gets much."""
        is_taken_awaited = bool(self.in_flight.commands or self.in_flight.waiting)
        is_congested = self._snapshot_bytes > self.CONGESTED_BYTES
        return bool(self._commands) or self._is_joined or is_taken_awaited or is_congested

    def call_writer(self, within_s: float = 0.0) -> None:
        """Have the writer come within so many seconds."""
        if within_s <= 0:
            self.is_due.set()
        elif not self.is_due.is_set():
            loop = asyncio.get_running_loop()
            if self._alarm is None or loop.time() + within_s < self._alarm.when():
                self.silence_alarm()
                self._alarm = loop.call_later(within_s, self.is_due.set)

    def silence_alarm(self) -> None:
        """Leave no timer behind."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _call_for_telemetry(self) -> None:
        if not self.is_due.is_set():
            is_congested = self._snapshot_bytes > self.CONGESTED_BYTES
            self.call_writer(0.0 if is_congested else self._telemetry_due_s - time.monotonic())

    def is_device_waiting(self, device_id: str) -> bool:
        """Whether a change of a device isn't in the file yet."""
        return device_id in self._devices or device_id in self.in_flight.devices

    def has_rows_of(self, device_id: str) -> bool:
        """Whether anything of a device isn't in the file yet; its coming and going puts the device, too."""
        return device_id in self._shares or self.is_device_waiting(device_id)

    def device_rows(self, device_ids: Iterable[str]) -> dict[str, Row]:
        """The rows, as they are now, of those that are known."""
        return {key: self.known_devices[key].row() for key in device_ids if key in self.known_devices}

    def put_device(self, device_id: str, device: Stored, *, urgent: bool = True) -> None:
        """Write a device's row; `urgent=False` lets it wait for the commit interval, as telemetry does."""
        self._devices[device_id] = device
        if urgent:
            self.call_writer(self.SOON_S)
        else:
            self._call_for_telemetry()

    def put_command(self, command_id: str, command: Stored) -> None:
        """Write a command's row. Where too many wait, the oldest are dropped."""
        self.rows_dropped += len(self._commands.put(command_id, command, command.content_bytes, is_news=False))
        self.call_writer(self.SOON_S)

    def put_connection_event(self, row: Row) -> bool:
        """Append a row of the connection history. False where too many wait and it was dropped."""
        if len(self._connections) >= self.MAX_CONNECTION_ROWS:
            self.rows_dropped += 1
            return False
        self._connections.append(row)
        self.call_writer(self.SOON_S)
        return True

    def has_its_share_waiting(self, device_id: str) -> bool:
        """Whether as much of a device's telemetry waits as it may have, whatever others do."""
        return self._shares[device_id] > self.TELEMETRY_LIMIT_BYTES // max(self.MIN_SHARES, len(self._shares))

    def put_snapshot(self, row: Row) -> bool:
        """Append a snapshot. False where the limit is reached, and the device's share of it, and it was dropped."""
        if self._snapshot_bytes > self.TELEMETRY_LIMIT_BYTES and self.has_its_share_waiting(row["device_id"]):
            self.rows_dropped += 1
            return False
        size_bytes = self._size_bytes(row)
        self._snapshot_count += 1
        self._snapshot_bytes += size_bytes
        self._shares[row["device_id"]] += size_bytes
        self._snapshots.append(row)
        self._call_for_telemetry()
        return True

    def _size_bytes(self, snapshot: Row) -> int:
        return self.SNAPSHOT_OVERHEAD_BYTES + len(snapshot["state_data"])

    def join(self, *, behind_snapshots: bool) -> asyncio.Future[None]:
        """Stand in line. The future is done when all that was put before is written: with the snapshots, or without."""
        line: deque[Any] | list[Any] = self._snapshots if behind_snapshots else self._waiting
        if not line or not isinstance(line[-1], asyncio.Future):  # else somebody stands here, for the same
            line.append(asyncio.get_running_loop().create_future())
        self._is_joined = True
        self.call_writer()
        written: asyncio.Future[None] = line[-1]
        return written

    def take(self) -> Batch:
        """Everything for the next batch, of the snapshots as much as it may have. It is in flight until `settle`."""
        batch = Batch(
            devices={device_id: device.row() for device_id, device in self._devices.items()},
            commands=[command.row() for command in self._commands],
            connections=self._connections,
            waiting=self._waiting,
        )
        self._devices, self._connections, self._waiting = {}, [], []
        self._commands = Bounded(self.MAX_COMMANDS, self.COMMANDS_LIMIT_BYTES)
        budget_bytes = self.BESIDE_COMMANDS_BYTES if batch.commands else self.BATCH_BYTES
        while self._snapshots and budget_bytes > 0:
            item = self._snapshots.popleft()
            if isinstance(item, asyncio.Future):
                batch.waiting.append(item)
            else:
                size_bytes = self._size_bytes(item)
                batch.snapshots.append(item)
                batch.snapshot_bytes[item["device_id"]] = batch.snapshot_bytes.get(item["device_id"], 0) + size_bytes
                budget_bytes -= size_bytes
        self.silence_alarm()
        if not self._snapshots:  # a backlog goes on at once
            self.is_due.clear()
            self._is_joined = False
        self._telemetry_due_s = time.monotonic() + self._commit_interval_s
        self.in_flight = batch
        return batch

    def settle(self) -> None:
        """What was in flight is written."""
        batch, self.in_flight = self.in_flight, Batch()
        self._snapshot_count -= len(batch.snapshots)
        for device_id, size_bytes in batch.snapshot_bytes.items():
            self._snapshot_bytes -= size_bytes
            self._shares[device_id] -= size_bytes
            if self._shares[device_id] == 0:
                del self._shares[device_id]
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


def read_json(stored: object) -> JsonText:
    """Stored JSON as text that every reader takes, whatever an earlier writer left there (NaN, lone surrogates, no JSON)."""

    def finite_or_none(text: str) -> float | None:
        value = float(text)
        return value if math.isfinite(value) else None

    if stored is None:
        return "null"
    text = stored.decode("utf-8", "replace") if isinstance(stored, bytes) else str(stored)
    with contextlib.suppress(msgspec.DecodeError, UnicodeError, RecursionError):
        return to_json(json_decoder.decode(text))
    try:
        value = json.loads(text, parse_constant=lambda name: None, parse_float=finite_or_none)
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace").decode()
    except (ValueError, RecursionError):
        return json.dumps(text)  # shown as the text that it is


def readable(table: TableName, row: Row, of_time: Callable[[datetime | None], Any], of_json: Callable[[JsonText], Any]) -> Row:
    """A row of the contract's columns, its times and its JSON (NULL stays None) turned into what is wanted of them."""
    found: Row = {}
    for name, kind in COLUMNS[table].items():
        found[name] = value = row[name]
        if kind == "DATETIME":
            found[name] = of_time(read_time(value))
        elif kind == "JSON" and value is not None:
            found[name] = of_json(read_json(value))
    return found


def presentable(table: TableName, row: Row) -> Row:
    """A row as answers show it: the contract's columns, times as text, JSON as it is."""
    return readable(table, row, format_time, raw)


def restorable(table: TableName, row: Row) -> Row:
    """A row as Restored has it: times as times, JSON as text, and nothing missing that is needed."""
    found = readable(table, row, lambda time: time, lambda text: text)
    if table == "devices":
        found["device_type"] = found["device_type"] or ""
        found["connected_at"] = found["connected_at"] or found["last_heartbeat"] or utc_now()
        found["metadata_json"] = "{}" if found["metadata_json"] in (None, IN_THE_FILE) else found["metadata_json"]
        found |= {"state": None, "state_timestamp": None}
    elif table == "command_logs":
        found["payload"] = found["payload"] or "null"
        found["created_at"] = found["created_at"] or utc_now()
    return found


class LenientConnection(sqlite3.Connection):
    """A connection that reads text of a damaged or foreign writer as well as it goes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.text_factory = functools.partial(str, encoding="utf-8", errors="replace")


# -- what goes wrong with a file ---------------------------------------------------------------------------------------

BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)  # of every duration at /metrics
STORE_ERRORS = (sa.exc.SQLAlchemyError, sqlite3.Error, OSError)  # which a TimeoutError is, too
LOCK_TIMEOUT_S = 1.0  # for another program's lock; then the batch is tried again, and a stop gets through


def sqlite_code(error: BaseException) -> int | None:
    """SQLite's primary result code, where the error is SQLite's."""
    code = getattr(getattr(error, "orig", error), "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def is_corruption(error: BaseException) -> bool:
    """Whether SQLite says that the file is damaged. It says so of a single read error, too."""
    return sqlite_code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def is_lack_of_room(error: BaseException) -> bool:
    """Whether a full disk would explain it. SQLite says so or, where a shared-memory file can't grow, "I/O error"."""
    is_full = sqlite_code(error) in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
    return is_full or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


def is_fault_of_a_row(error: BaseException) -> bool:
    """Whether the database refused what it was given, where trying the same again is in vain."""
    is_of_the_disk = isinstance(error, sa.exc.OperationalError) or is_corruption(error)
    return isinstance(error, sa.exc.StatementError) and not is_of_the_disk


def cause_of(error: BaseException) -> str:
    """The database's own words in one line, without the statement and its parameters."""
    origin = getattr(error, "orig", None) or error
    name = getattr(origin, "sqlite_errorname", None)
    text = origin.strerror if isinstance(origin, OSError) and origin.strerror else str(origin).partition("\n")[0]
    text = text or type(origin).__name__
    return f"{text} ({name})" if name else text


def quick_check(connection: sqlite3.Connection) -> str | None:
    """What SQLite finds broken in a file, or None. Raises OSError where it couldn't be read, which says nothing of it."""
    result = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
    code = re.search(r"error code=(\d+)", result)
    if code is not None and int(code[1]) & 0xFF == sqlite3.SQLITE_IOERR:
        raise OSError(errno.EIO, f"{os.strerror(errno.EIO)} ({result})")
    return None if result == "ok" else result


def check_schema(path: Path, connection: sqlite3.Connection) -> None:
    """Raise StartError where a file's tables are none of ours, or not as rows can be written to them."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        raise StartError(f"{path} was written by a newer version (schema {version}, this one knows {SCHEMA_VERSION})")
    kinds = dict(connection.execute("SELECT name, type FROM sqlite_master WHERE type IN ('table', 'view')").fetchall())
    if kinds and not kinds.keys() & COLUMNS.keys():
        raise StartError(f"{path} is no database of this gateway: it has the tables {', '.join(sorted(kinds))}")
    for table in kinds.keys() & COLUMNS.keys():
        if kinds[table] == "view":
            raise StartError(f"{path} can't be used: {table} is a view")
        found = connection.execute(f"PRAGMA table_info({table})").fetchall()
        if missing := COLUMNS[table].keys() - {name for _, name, *_ in found}:
            raise StartError(f"{path} is no database of this gateway: {table} has no column {', '.join(sorted(missing))}")
        for _, name, _, is_required, default, _ in found:
            if is_required and default is None and name not in COLUMNS[table]:
                what = "that was added, must not be null and has no default"
                raise StartError(f"{path} can't be used: {table} has a column {name} {what}")


class LockedFile:
    """The database as a file: whose it is, whether it is whole, where it went. Looked at by `sqlite3` alone, before anything
    is written and while no other connection of this process has it open (but for `check`). Blocks on the disk.
    """

    CHECKED_AT_START_BYTES = 8 << 20  # 0.2 s of an SD card's reading; a larger file is checked while it serves
    MAGIC = b"SQLite format 3\x00"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notice: str | None = None  # for people: what happened to the file
        self.is_doubted = False  # SQLite reported damage, and the whole file is to be looked at
        self.is_unchecked = False  # it is large, and was opened without that
        self._lock_fd: int | None = None

    @property
    def is_large(self) -> bool:
        """Whether a check of the whole file would hold up a start."""
        return self.path.exists() and self.path.stat().st_size > self.CHECKED_AT_START_BYTES

    def beside(self, suffix: str) -> Path:
        """The path of a file that SQLite keeps beside this one: `-wal`, `-shm`."""
        path = self.path.resolve()  # not beside a link that names the file
        return path.with_name(path.name + suffix)

    def lock(self) -> bool:
        """Have the file, created where there was none, for this process alone. True where that was to do.

        Raises StartError where another gateway has it or it is no regular file, OSError.
        """
        if self._lock_fd is not None:
            return False
        self._lock_fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            if not stat.S_ISREG(os.fstat(self._lock_fd).st_mode):
                raise StartError(f"the database {self.path} is no regular file")
            # flock and SQLite's own locks don't see each other on Linux; the lock goes with the process.
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException as error:
            self.unlock()
            if isinstance(error, BlockingIOError):
                raise StartError(f"the database {self.path} is in use by another gateway") from None
            raise
        return True

    def unlock(self) -> None:
        """Let others have it. POSIX takes SQLite's locks away with any descriptor that closes: first close all connections."""
        if self._lock_fd is not None:
            lock_fd, self._lock_fd = self._lock_fd, None
            os.close(lock_fd)

    def sync(self) -> None:
        """Have what was written to the file on the disk. Raises OSError."""
        if self._lock_fd is not None:
            os.fdatasync(self._lock_fd)

    def is_in_place(self) -> bool:
        """Whether the file that is locked, if any, is the one that its path names."""
        try:
            return self._lock_fd is None or os.path.samestat(self.path.stat(), os.fstat(self._lock_fd))
        except FileNotFoundError:
            return False

    def leave(self, disconnect: Callable[[], None]) -> None:
        """Let go of a file that was moved, with its write-ahead log, before SQLite replays that over what lies at the path now:
        it has no name of its file in it. What was written to a file must be in that file.
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
        self.is_doubted = False
        self.notice = f"{self.path} was deleted or replaced while it was in use: what is there now goes on"
        log.error("database_replaced", path=str(self.path), moved_to=str(moved_to) if is_there else None)
        disconnect()
        self.unlock()
        if is_there:
            with contextlib.closing(sqlite3.connect(moved_to, timeout=LOCK_TIMEOUT_S)) as connection:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def move_aside_if_damaged(self, *, is_new: bool) -> bool:
        """Look at the file, as a whole where it is new here or doubted and, where it is damaged, move it aside and lock a fresh
        one. True where that was so.

        Only what a second look finds as well, in a file that can be read from end to end, is believed: one read error is
        reported as damage, too. Raises StartError for a file that is none of ours, sqlite3.Error, OSError.
        """
        with self.path.open("rb") as file:
            start = file.read(len(self.MAGIC))
        if start and start != self.MAGIC:
            raise StartError(f"{self.path} is no SQLite database; name another file or move this one away")
        self.is_unchecked |= is_new and self.is_large
        damage = self._look(is_whole=self.is_doubted or (is_new and not self.is_large)) if start else None
        if damage is not None:
            for path in (self.path, self.beside("-wal")):
                if path.exists():
                    with path.open("rb", buffering=0) as file:
                        while file.read(4096):
                            pass
            damage = self._look(is_whole=True)
        self.is_doubted = False
        if damage is None:
            return False
        aside = self.beside(f".corrupt-{utc_now():%Y%m%dT%H%M%S.%f}Z")
        for suffix in ("-wal", "-shm", ""):  # the file last: as long as it is there, the whole is
            with contextlib.suppress(FileNotFoundError):
                self.beside(suffix).rename(aside.with_name(aside.name + suffix))
        self.unlock()
        self.notice = f"the database was corrupt ({damage}); it was moved to {aside} and a fresh one begun"
        log.error("database_corrupt", damage=damage, moved_to=str(aside))
        return self.lock()

    def _look(self, *, is_whole: bool, is_over: Callable[[], bool] | None = None) -> str | None:
        with contextlib.closing(sqlite3.connect(self.path, timeout=LOCK_TIMEOUT_S)) as connection:
            connection.set_progress_handler(is_over, 10_000)
            try:
                check_schema(self.path, connection)
                return quick_check(connection) if is_whole else None
            except sqlite3.DatabaseError as error:
                if is_corruption(error):
                    return str(error)
                raise

    def check(self, is_over: Callable[[], bool]) -> None:
        """Look for damage in a large file while it is in use, once: minutes. For a thread of its own."""
        self.is_unchecked = False
        with contextlib.suppress(*STORE_ERRORS, StartError):  # what reads and writes the file will say so
            self.is_doubted |= self._look(is_whole=True, is_over=is_over) is not None


# -- what the last run left --------------------------------------------------------------------------------------------

RESTORED_DEVICES = 10_000  # as many as are kept in memory
RESTORED_CLOSED_COMMANDS = 1000  # the latest that still lack answers
RESTORED_BYTES = 8 << 20  # of the devices' contents and as many of the commands', so that a start takes no more than a run


def end_last_run(tables: Any, online: Collection[str]) -> None:
    """Whatever the file says is online is not, but for `online`: its device row and its connection history say so."""
    now = stored_time(utc_now())
    latest = "SELECT event FROM device_connection_logs h WHERE h.device_id = d.device_id ORDER BY id DESC LIMIT 1"
    said_online = f"SELECT device_id, device_type FROM devices d WHERE is_online OR ({latest}) = '{CONNECTED}'"
    left = [row for row in tables.query(said_online) if row["device_id"] not in online]
    details = to_json({"reason": "the gateway ended without saying goodbye"})
    ended = {"event": DISCONNECTED, "timestamp": now, "details": details}
    offline = {"is_online": False, "disconnected_at": now}
    tables["devices"].update_many([{"device_id": row["device_id"]} | offline for row in left], ["device_id"])
    tables["device_connection_logs"].insert_many(
        [{"device_id": row["device_id"], "device_type": row["device_type"] or ""} | ended for row in left]
    )


def load_devices(tables: Any) -> list[Row]:
    """Those that were seen last, RESTORED_DEVICES of them, with metadata (None beyond) and states of RESTORED_BYTES."""
    budget_bytes = RESTORED_BYTES
    devices: dict[str, Row] = {}
    for row in tables["devices"].find(order_by="-last_heartbeat", _limit=RESTORED_DEVICES, _step=20):
        device = devices[row["device_id"]] = restorable("devices", row)
        budget_bytes -= len(device["metadata_json"])
        if budget_bytes < 0:
            device["metadata_json"] = None
    # One step into the index for each device, however long the history is.
    newest = "SELECT id FROM device_state_snapshots h WHERE h.device_id = d.device_id ORDER BY id DESC LIMIT 1"
    latest = f"SELECT * FROM device_state_snapshots WHERE id IN (SELECT ({newest}) FROM devices d) ORDER BY id DESC"
    for row in tables.query(latest, _step=20):
        snapshot = restorable("device_state_snapshots", row)
        state = snapshot["state_data"] or "null"
        budget_bytes -= len(state)
        if budget_bytes > 0 and snapshot["device_id"] in devices:
            devices[snapshot["device_id"]] |= {"state": state, "state_timestamp": snapshot["timestamp"]}
    return list(devices.values())


def load_commands(tables: Any) -> list[Row]:
    """Of the open commands all, but for the oldest that would take more than RESTORED_BYTES, which end as `ack_timeout`; of
    those that lack an answer the latest.
    """
    kept: list[Row] = []
    overdue: list[Row] = []
    budget_bytes = RESTORED_BYTES
    for statuses, limit in ((OPEN_STATUSES, -1), ((ACK_TIMEOUT, ACK_ERROR), RESTORED_CLOSED_COMMANDS)):
        # One step into the index for each row, however many there are and whatever their status.
        newest = [
            f"SELECT * FROM (SELECT rowid FROM command_logs WHERE status = '{status}' ORDER BY rowid DESC LIMIT {limit})"
            for status in statuses
        ]
        rowids = " UNION ALL ".join(newest)
        question = f"SELECT * FROM command_logs WHERE rowid IN ({rowids}) ORDER BY rowid DESC LIMIT {limit}"
        for row in tables.query(question, _step=1):
            command = restorable("command_logs", row)
            # Text may take four bytes a character, and the object some.
            budget_bytes -= 4 * (len(command["payload"]) + len(command["response_data"] or "")) + 1000
            if budget_bytes > 0:
                kept.append(command)
            elif statuses is OPEN_STATUSES:
                overdue.append({"command_id": command["command_id"], "status": ACK_TIMEOUT})
    tables["command_logs"].update_many(overdue, ["command_id"])
    return kept[::-1]


# -- histories ---------------------------------------------------------------------------------------------------------


class Zone(NamedTuple):
    """ZONE_ROWS rows of a history that follow each other: the rowid of the last, the earliest and the latest of their times."""

    last: int
    earliest: str
    latest: str


class Survey:
    """A zone map of a history, as column stores and PostgreSQL's BRIN have it: from when to when the rows of each zone are.

    A question about a time reads only the zones that can have it, however long the history is and whatever the clock did.
    `extend` reads the history from its beginning once after a start, and then what came since; it may run beside `ranges`, in
    another thread, one at a time.
    """

    ZONE_ROWS = 2048  # 5,000 zones and 1 MB of memory for ten million rows
    ZONES_AT_ONCE = 10  # some 10 ms of reading
    FIRST, LAST = -(2**63), 2**63 - 1  # of all rowids
    ANY_TIME = ("", "~")  # before and after whatever a file has in place of a time

    def __init__(self, table: TableName) -> None:
        time = HISTORIES[table].time
        some = f"SELECT rowid AS row, {time} AS time FROM {table} WHERE rowid > :row ORDER BY rowid LIMIT {self.ZONE_ROWS}"
        earliest, latest = (f"iif(typeof(time) = 'text', time, '{other}')" for other in self.ANY_TIME)
        self._next = (
            f"SELECT max(row) AS last, min({earliest}) AS earliest, max({latest}) AS latest, count(*) AS n FROM ({some})"
        )
        self._row = f"SELECT rowid AS row, {time} AS time FROM {table} WHERE rowid = :row"
        self._zones: list[Zone] = []
        self._mark: Row | None = None  # the last row of the last zone

    def extend(self, tables: Any) -> list[Row]:
        """Look at the rows that come next, and return what was found; nothing where all have been looked at."""
        if not self._still_matches(tables):
            self._zones, self._mark = [], None
        found: list[Row] = []
        while len(found) < self.ZONES_AT_ONCE:
            (zone,) = tables.query(self._next, row=self._zones[-1].last if self._zones else self.FIRST)
            if zone.pop("n") < self.ZONE_ROWS:
                break
            found.append(zone)
            (self._mark,) = tables.query(self._row, row=zone["last"])
            self._zones.append(Zone(**zone))
        return found

    def _still_matches(self, tables: Any) -> bool:
        """Whether the last row of the last zone is still there: SQLite gives rowids at the end again that were deleted."""
        return self._mark is None or list(tables.query(self._row, row=self._mark["row"])) == [self._mark]

    def ranges(self, tables: Any, since: str | None, until: str | None) -> Iterator[tuple[int, int]]:
        """First and last rowid of each part that may have rows of a time, the newest first."""
        zones = self._zones[:] if (since or until) and self._still_matches(tables) else []
        earliest, latest = since or self.ANY_TIME[0], until or self.ANY_TIME[1]
        first, last = (zones[-1].last + 1 if zones else self.FIRST), self.LAST  # what has not been looked at yet
        for number in range(len(zones) - 1, -1, -1):
            zone = zones[number]
            if zone.earliest <= latest and zone.latest >= earliest:
                if first != zone.last + 1:
                    yield first, last
                    last = zone.last
                first = zones[number - 1].last + 1 if number else self.FIRST
        yield first, last


# -- the database ------------------------------------------------------------------------------------------------------


def insertion(table: TableName) -> str:
    """The statement that puts a row into a table, in a keyed one in place of that with its key. Its columns are named
    parameters.
    """
    columns = [column for column in COLUMNS[table] if column != "id"]
    insert = f"INSERT INTO {table} ({', '.join(columns)}) VALUES (:{', :'.join(columns)})"
    if "id" in COLUMNS[table]:
        return insert
    key, *others = columns
    values = {column: f"excluded.{column}" for column in others}
    if "metadata_json" in others:
        is_kept = f"excluded.metadata_json = '{IN_THE_FILE}'"
        values["metadata_json"] = f"iif({is_kept}, {table}.metadata_json, excluded.metadata_json)"
    changes = ", ".join(f"{column} = {value}" for column, value in values.items())
    return f"{insert} ON CONFLICT ({key}) DO UPDATE SET {changes}"


INSERTIONS = {table: insertion(table) for table in TABLES}


def write_rows(tables: Any, table: TableName, rows: list[Row]) -> None:
    """Put rows into a table. dataset's `insert_many` takes twice as long a row, and its upserts three statements."""
    tables.executable.exec_driver_sql(INSERTIONS[table], rows)


def delete_rows(tables: Any, table: TableName, which: str, **values: Any) -> int:
    """Delete the rows whose rowids a SELECT finds, and return how many it were."""
    return int(tables.executable.execute(sa.text(f"DELETE FROM {table} WHERE rowid IN ({which})"), values).rowcount)


def create_tables(tables: Any, indexes: Iterable[str]) -> None:
    """Create what is missing of the tables and of these indexes, and drop indexes that no query uses."""
    for table, columns in TABLES.items():
        tables.query(f"CREATE TABLE IF NOT EXISTS {table} ({columns})")
    for index in indexes:
        tables.query(f"CREATE INDEX IF NOT EXISTS {index} ON {INDEXES[index]}")
    # Those the earlier backend's ORM made, one a column: no query uses them and each costs a page a commit.
    for row in list(tables.query("SELECT name, tbl_name FROM sqlite_master WHERE type = 'index'")):
        if row["tbl_name"] in COLUMNS and row["name"].startswith(f"ix_{row['tbl_name']}_"):
            log.info("index_dropped", index=row["name"])
            tables.query(f'DROP INDEX "{row["name"]}"')
    tables.query(f"PRAGMA user_version = {SCHEMA_VERSION}")


class DiskSpace:
    """What is free beside the file, and the oldest rows, which make room where too little is (contract, section 7).

    On a file system of less than twice `min_free_bytes`, half of it is what is kept free.
    """

    SMALL_FILE_BYTES = 1 << 20  # never has to make room, so that something is kept on a card that others filled
    NOTICE_S = 3600.0
    # Of the write-ahead log, 64 MB: then SQLite has a commit end it. Database's `checkpoint` sees to it at a quarter of that.
    # A commit beside one takes some ms longer: with SQLite's 1,000 pages that was one command in 200.
    LOG_PAGES = 16_000
    LOOK_INTERVAL_S = 1.0  # to ask for three sizes takes as long as to write 20 rows

    def __init__(self, file: LockedFile, min_free_bytes: int) -> None:
        self.sizes: dict[str, int] = {}  # as `GET /health` shows them
        self.written_bytes = 0  # by the writer's thread, most of it into the log
        self._looked_s = -math.inf
        self._file = file
        self._min_free_bytes = min_free_bytes
        self._made_s = self._logged_s = -math.inf  # monotonic time of the latest, and of when that was said

    def look(self) -> None:
        """Look at the size of the file with its log, at what is free beside it, and at what was written, once in
        LOOK_INTERVAL_S. For the writer's thread.
        """
        if time.monotonic() < self._looked_s + self.LOOK_INTERVAL_S:
            return
        self._looked_s = time.monotonic()
        sizes = {}
        with contextlib.suppress(OSError):
            sizes["database_bytes"] = self._file.path.stat().st_size
            with contextlib.suppress(FileNotFoundError):
                sizes["database_bytes"] += self._file.beside("-wal").stat().st_size
            sizes["disk_free_bytes"] = shutil.disk_usage(self._file.path.parent).free
            # proc(5). A kernel that doesn't count has a commit end each log.
            self.written_bytes = int(Path("/proc/thread-self/io").read_text().partition("wchar: ")[2].split()[0])
        self.sizes = sizes

    def log_pages(self) -> int:
        """How long the write-ahead log may get: fewer than LOG_PAGES on a small file system."""
        system = os.statvfs(self._file.path)
        return min(self.LOG_PAGES, system.f_blocks * system.f_frsize // 8 // PAGE_BYTES or self.LOG_PAGES)

    def is_short(self) -> bool:
        """Whether the file system has too little free."""
        try:
            system = os.statvfs(self._file.path)
        except OSError:
            return False  # the commit will say it
        spare_bytes = min(self._min_free_bytes, system.f_blocks * system.f_frsize // 2)
        return system.f_bavail * system.f_frsize < spare_bytes

    def make(self, tables: Any, batch: Batch) -> None:
        """Delete the oldest rows until the batch fits into the file's free pages."""
        size_bytes = sum(len(to_json(rows)) for _, rows in batch.tables())
        deleted = 0
        for table, history in HISTORIES.items():
            while self._lacks_pages(tables, size_bytes):
                oldest = f"SELECT rowid FROM {table} WHERE {history.may_go} ORDER BY rowid LIMIT 50"
                if (count := delete_rows(tables, table, oldest)) == 0:
                    break
                deleted += count
        if deleted:
            self._made_s = time.monotonic()
            if self._made_s > self._logged_s + self.NOTICE_S:
                self._logged_s = self._made_s
                log.warning("oldest_rows_deleted", reason=self.notice)

    def _lacks_pages(self, tables: Any, size_bytes: int) -> bool:
        """Whether a file that isn't small would have to grow for rows of this size. They may take twice that, and indexes."""
        (pages,) = tables.query("SELECT * FROM pragma_page_count, pragma_freelist_count, pragma_page_size")
        is_small = pages["page_count"] * pages["page_size"] < self.SMALL_FILE_BYTES
        return not is_small and pages["freelist_count"] * pages["page_size"] < 2 * size_bytes + 32 * pages["page_size"]

    @property
    def notice(self) -> str | None:
        """What people should know about it."""
        if time.monotonic() > self._made_s + self.NOTICE_S:
            return None
        return f"the disk has too little room (--min-free-mb {self._min_free_bytes >> 20}): the oldest rows are deleted"


class Database:
    """The four tables, through `dataset`. Blocks on the disk.

    `read` belongs to the readers' threads, all else to the writer's, and the owner sees to it that nobody reads while the file
    is opened or closed. After whatever fails `open` is the one way back: from a start, a full disk, damage, a file that was
    moved, removed or replaced. (Closing is also the cure for dataset's lock after a failed COMMIT.)
    """

    MAX_ANSWER_BYTES = 1 << 20  # of rows: a question with more ends early, after the row that is over
    DELETED_AT_ONCE = 50  # rows: of many devices, so each costs a page of an index; 500 tripled a command's p99

    def __init__(self, path: Path, min_free_bytes: int) -> None:
        self.file = LockedFile(path)
        self.disk_space = DiskSpace(self.file, min_free_bytes)
        self._dataset: Any = None
        self._has_failed = False
        self._checkpoint_bytes = 0  # how much is written between two checkpoints
        self._checkpointed_bytes = 0  # what had been written when the latest began
        self.is_indexing = False  # an index is being created, which holds up telemetry and nothing else
        self.surveys = {table: Survey(table) for table in HISTORIES}

    @property
    def is_usable(self) -> bool:
        """Whether it is open, and nothing is known to be wrong with it."""
        return self._dataset is not None and not self._has_failed and not self.file.is_doubted

    def open(self, online: Collection[str]) -> Restored | None:
        """Open or create the file, end what the last run left open (but for the devices that are online), and load it.

        None where it is the file that was loaded before. Raises StartError, see LockedFile, and STORE_ERRORS.
        """
        must_load = False
        try:
            if not self.file.is_in_place():
                self.file.leave(self._disconnect)
            self._disconnect()
            must_load = self.file.lock()
            must_load |= self.file.move_aside_if_damaged(is_new=must_load)
            self._connect()
            if not must_load:
                return None
            self.surveys = {table: Survey(table) for table in HISTORIES}
            with self._dataset as tables:
                end_last_run(tables, online)
                return Restored(load_devices(tables), load_commands(tables))
        except BaseException as error:
            self.file.is_doubted |= is_corruption(error)
            self._disconnect()
            if must_load:  # what is locked has been loaded
                self.file.unlock()
            raise

    def _disconnect(self) -> None:
        self._has_failed = False
        if self._dataset is not None:
            connected, self._dataset = self._dataset, None
            connected.close()

    def _connect(self) -> None:
        log_pages = self.disk_space.log_pages()
        self._checkpoint_bytes = log_pages * PAGE_BYTES // 4
        self._dataset = dataset.connect(
            sa.URL.create("sqlite", database=str(self.file.path)).render_as_string(),
            row_type=dict,
            ensure_schema=False,
            engine_kwargs={"connect_args": {"timeout": LOCK_TIMEOUT_S, "factory": LenientConnection}},
            on_connect_statements=[
                "PRAGMA foreign_keys = ON",
                "PRAGMA synchronous = NORMAL",  # with WAL it never corrupts, and syncs at checkpoints only
                f"PRAGMA wal_autocheckpoint = {log_pages}",
                f"PRAGMA journal_size_limit = {log_pages * PAGE_BYTES}",  # to truncate takes longer than to use again
            ],
        )
        # dataset reflects the tables; what is text in the file is text in their rows.
        dialect: Any = self._dataset.executable.dialect
        dialect.ischema_names = dialect.ischema_names | {"JSON": sa.Text, "DATETIME": sa.Text}
        with self._dataset as tables:
            create_tables(tables, INDEXES.keys() - LATER_INDEXES if self.file.is_large else INDEXES)
        self.disk_space.look()

    def create_missing_index(self, is_over: Callable[[], bool]) -> str | None:
        """Create one of the indexes that the file lacks, if any: its name. Broken off when `is_over` says so.

        SQLite locks the file from the begin to the end of it. Raises STORE_ERRORS.
        """
        self._check_place()
        with self._dataset as tables:
            found = {row["name"] for row in tables.query("SELECT name FROM sqlite_master WHERE type = 'index'")}
            missing = next((name for name in INDEXES if name not in found), None)
            if missing is not None:
                connection = tables.executable.connection.dbapi_connection
                connection.set_progress_handler(is_over, 10_000)
                self.is_indexing = True
                try:
                    tables.query(f"CREATE INDEX {missing} ON {INDEXES[missing]}")
                finally:
                    self.is_indexing = False
                    connection.set_progress_handler(None, 0)
            return missing

    def _check_place(self) -> None:
        """Raise OSError where the file was deleted or replaced: who connects now would get the old log over the new file."""
        if self._dataset is None:
            raise sqlite3.OperationalError("the database is not open")
        if not self.file.is_in_place():
            self._has_failed = True
            raise OSError(f"{self.file.path} was deleted or replaced")

    # -- writing -------------------------------------------------------------------------------------------------------

    def commit(self, batch: Batch) -> None:
        """Write a batch in one transaction, all or nothing; the oldest rows make room where need be. Raises STORE_ERRORS."""
        try:
            self._check_place()
            if self.disk_space.is_short():
                with self._transaction() as tables:
                    self.disk_space.make(tables, batch)
            with self._transaction() as tables:
                for table, rows in batch.tables():
                    if rows:
                        write_rows(tables, table, rows)
        finally:
            self.disk_space.look()

    def commit_row_by_row(self, batch: Batch) -> list[tuple[str, Row, str]]:
        """Write a batch but for the rows that the database refuses for what they are: table, row and reason of each.

        Raises StartError where not the rows are at fault but what somebody did to the tables, and STORE_ERRORS.
        """
        refused: list[tuple[str, Row, str]] = []
        with self._transaction() as tables:
            check_schema(self.file.path, tables.executable.connection.dbapi_connection)
            for table, rows in batch.tables():
                for row in rows:
                    try:
                        write_rows(tables, table, [row])
                    except sa.exc.StatementError as error:
                        if not is_fault_of_a_row(error):
                            raise
                        refused.append((table, row, cause_of(error)))
        return refused

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Any]:
        """A transaction. What fails in it, but for a row's own fault, leaves the database unusable until it is opened anew."""
        if self._dataset is None:
            raise sqlite3.OperationalError("the database is not open")
        try:
            with self._dataset as tables:
                yield tables
        except BaseException as error:
            self.file.is_doubted |= is_corruption(error)
            self._has_failed |= not is_fault_of_a_row(error)
            raise

    def read(self, ask: Callable[[Any], Iterable[Row]], is_over: Callable[[], bool]) -> list[Row]:
        """What `ask` finds in the tables, up to MAX_ANSWER_BYTES. Broken off when `is_over` says so. Raises STORE_ERRORS."""
        self._check_place()
        rows: list[Row] = []
        budget_bytes = self.MAX_ANSWER_BYTES
        try:
            with self._dataset as tables:
                tables.executable.connection.dbapi_connection.set_progress_handler(is_over, 10_000)
                for row in ask(tables):
                    rows.append(row)
                    budget_bytes -= sum(len(value) for value in row.values() if isinstance(value, str | msgspec.Raw))
                    if budget_bytes <= 0:
                        break
                return rows
        except sa.exc.DatabaseError as error:
            self.file.is_doubted |= is_corruption(error)
            raise

    @property
    def is_checkpoint_due(self) -> bool:
        """Whether the write-ahead log has got long."""
        return self.disk_space.written_bytes - self._checkpointed_bytes > self._checkpoint_bytes

    def checkpoint(self, tables: Any) -> Iterable[Row]:
        """Write the log into the file, for `read`. Commits go on beside it: a card's syncs take seconds, and within a COMMIT,
        where SQLite does it otherwise, whoever waits for a command's row would wait for them.

        While commits go on without a pause SQLite never comes to the end of the log, nor to its sync of the file. So that is
        done here, and what is left to the COMMIT that ends the log is little.
        """
        self._checkpointed_bytes = self.disk_space.written_bytes
        yield from tables.query("PRAGMA wal_checkpoint(PASSIVE)")
        self.file.sync()

    def newest(
        self,
        tables: Any,
        table: TableName,
        limit: int,
        since: str | None = None,
        until: str | None = None,
        before: int | str | None = None,
        **equal: str,
    ) -> Iterator[Row]:
        """Rows of a history with these values, of a time and from before the row with a key, newest first.

        That is in the order of rowids, which a clock that jumps can't disturb.
        """
        key, time = next(iter(COLUMNS[table])), HISTORIES[table].time
        conditions = [f"{name} = :{name}" for name in equal]
        conditions += [f"{time} >= :since"] if since else []
        conditions += [f"{time} <= :until"] if until else []
        before_row = f"(SELECT rowid FROM {table} WHERE {key} = :before)" if key == "command_id" else ":before"
        last = f"min(:last, {before_row} - 1)" if before else ":last"
        wanted = " AND ".join([*conditions, f"rowid >= :first AND rowid <= {last}"])
        question = f"SELECT * FROM {table} WHERE {wanted} ORDER BY rowid DESC LIMIT :limit"
        values = {"since": since, "until": until, "before": before, **equal}
        for first, last_row in self.surveys[table].ranges(tables, since, until):
            for row in tables.query(question, _step=20, limit=limit, first=first, last=last_row, **values):
                yield row
                limit -= 1
            if limit == 0:
                break

    @property
    def notice(self) -> str | None:
        """What people should know about the file."""
        return "; ".join(text for text in (self.file.notice, self.disk_space.notice) if text) or None

    def close(self) -> None:
        """Write the write-ahead log into the file and close it. Raises STORE_ERRORS."""
        try:
            if self._dataset is not None:
                list(self._dataset.query("PRAGMA wal_checkpoint(TRUNCATE)"))
        finally:
            self._disconnect()
            self.file.unlock()

    # -- what is kept how long -----------------------------------------------------------------------------------------

    def delete_of_device(self, table: TableName, device_id: str) -> int:
        """Delete up to DELETED_AT_ONCE rows of a device, and return how many it were. Raises STORE_ERRORS."""
        with self._transaction() as tables:
            some = f"SELECT rowid FROM {table} WHERE device_id = :device_id LIMIT {self.DELETED_AT_ONCE}"
            return delete_rows(tables, table, some, device_id=device_id)

    def delete_before(self, table: TableName, before: str) -> int:
        """Delete up to DELETED_AT_ONCE rows of a history that has been surveyed, those from before a stored time: how many.

        Raises STORE_ERRORS.
        """
        with self._transaction() as tables:
            time, may_go = HISTORIES[table]
            count = 0
            for first, last in reversed(list(self.surveys[table].ranges(tables, None, before))):
                part = f"SELECT rowid FROM {table} WHERE rowid >= {first} AND rowid <= {last}"
                old = f"{part} AND {time} < :before AND {may_go} LIMIT {self.DELETED_AT_ONCE - count}"
                count += delete_rows(tables, table, old, before=before)
                if count == self.DELETED_AT_ONCE:
                    break
            return count


# -- the way in and out ------------------------------------------------------------------------------------------------


class Reader:
    """Asks the database in threads, THREADS at a time, and breaks off what nobody waits for. Belongs to the event loop."""

    THREADS = 3  # so that a cheap question needn't wait for a dear one
    BREAK_OFF_TIMEOUT_S = 1.0  # SQLite looks every 10,000 steps; only a disk that hangs takes longer, and a checkpoint

    def __init__(self, database: Database) -> None:
        self._database = database
        self._free = asyncio.Semaphore(self.THREADS)
        self._asked: dict[asyncio.Future[list[Row]], threading.Event] = {}  # with what breaks each off
        self._may_ask = asyncio.Event()
        self._may_ask.set()
        self.threads = ThreadPoolExecutor(self.THREADS, "store-reader")

    async def ask(self, ask: Callable[[Any], Iterable[Row]]) -> list[Row]:
        """Have a question answered. One whose asker is gone is broken off. Raises STORE_ERRORS."""
        async with self._free:
            while not self._may_ask.is_set():
                await self._may_ask.wait()
            is_over = threading.Event()
            answer = asyncio.get_running_loop().run_in_executor(self.threads, self._database.read, ask, is_over.is_set)
            self._asked[answer] = is_over
            answer.add_done_callback(self._forget)
            try:
                return await asyncio.shield(answer)
            except asyncio.CancelledError:
                is_over.set()
                await asyncio.wait((answer,), timeout=self.BREAK_OFF_TIMEOUT_S)
                raise

    def _forget(self, answer: asyncio.Future[list[Row]]) -> None:
        del self._asked[answer]
        if not answer.cancelled():
            answer.exception()  # nobody may be there any more to be told

    @contextlib.asynccontextmanager
    async def silence(self) -> AsyncIterator[None]:
        """While this lasts nobody reads: what is being answered is broken off (but for a checkpoint), and what comes waits."""
        self._may_ask.clear()
        try:
            for is_over in self._asked.values():
                is_over.set()
            if self._asked:
                await asyncio.wait(self._asked)
            yield
        finally:
            self._may_ask.set()


class Writer:
    """Hands what waits to its thread, one transaction at a time, and brings the file back whatever happens to it.

    A batch that fails for the disk's sake is kept and tried again until it is in the file; a row that the database refuses
    for its own sake is logged and left out, so that the rest gets in. Its state belongs to the event loop.
    """

    RETRY_S = 0.5  # after a batch that failed twice
    STALLED_S = 1.0  # a write that takes longer holds up commands, which is what /health is about

    def __init__(self, database: Database, reader: Reader, backlog: Backlog) -> None:
        self._database = database
        self._reader = reader
        self._backlog = backlog
        self.deadline_s = math.inf  # of a stop, for what is queued
        self.failure: str | None = None  # why writes fail, while they do
        self._writing_since_s: float | None = None
        self.rows_rejected = 0
        self.rejected_commands: deque[str] = deque(maxlen=1000)  # the ids of the latest
        self.on_restored: Callable[[Restored], None] = lambda restored: None  # called whenever a file was opened
        self._has_been_open = False
        self.commit_seconds = prometheus_client.Histogram(
            "amhrpd_commit_seconds", "of a transaction", registry=None, buckets=BUCKETS_S
        )
        self.thread = ThreadPoolExecutor(1, "store-writer")

    async def run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Do something in the writer's thread, between two batches. Raises what it raises."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, work, *arguments)

    def problem(self) -> str | None:
        """Why nothing can be written now, if that is so."""
        stalled_s = 0.0 if self._writing_since_s is None else time.monotonic() - self._writing_since_s
        if self.failure is None and stalled_s > self.STALLED_S and not self._database.is_indexing:
            return f"a write has been waiting for the disk for {stalled_s:.0f} s"
        return self.failure

    def call_if_unusable(self) -> None:
        """Have the file opened anew where something else failed that says so."""
        if not self._database.is_usable:
            self._backlog.call_writer()

    async def open_file(self) -> None:
        """Open or create the file; what it has is told to `on_restored`. Raises StartError, STORE_ERRORS."""
        rows = self._backlog.device_rows(self._backlog.known_devices)
        online = [device_id for device_id, row in rows.items() if row["is_online"]]
        async with self._reader.silence():
            restored = await self.run(self._database.open, online if self._has_been_open else ())
        self._has_been_open = True
        if restored is not None:
            self.on_restored(restored)

    async def write_forever(self) -> None:
        """Write until a stop, and then until nothing waits or its time is over."""
        checkpoint: asyncio.Task[None] | None = None
        try:
            while self.deadline_s == math.inf or self._backlog.rows_waiting or self._backlog.is_due.is_set():
                if self.deadline_s == math.inf:
                    await self._backlog.is_due.wait()
                if not await self._commit_stubbornly(self._backlog.take()):
                    log.error("rows_lost", rows=self._backlog.rows_waiting, reason=self.failure)
                    return
                self._backlog.settle()
                if self._database.is_checkpoint_due and (checkpoint is None or checkpoint.done()):
                    checkpoint = asyncio.create_task(self._checkpoint())
        except Exception:
            log.exception("writer_died")
            raise
        finally:
            if checkpoint is not None:
                checkpoint.cancel()
                await asyncio.wait((checkpoint,))  # Reader sees to it that this takes no longer than BREAK_OFF_TIMEOUT_S

    async def _checkpoint(self) -> None:
        try:
            await self._reader.ask(self._database.checkpoint)
        except STORE_ERRORS as error:
            log.warning("checkpoint_failed", problem=cause_of(error))
            self.call_if_unusable()
        except Exception:
            log.exception("checkpoint_failed")

    async def _commit_stubbornly(self, batch: Batch) -> bool:
        """Commit the batch: again at once where it fails, then however long that takes. False where a stop gave up on it."""
        while True:
            self._writing_since_s = time.monotonic()
            pause_s = 0.0 if self.failure is None else self.RETRY_S
            try:
                await self._commit(batch)
                if self.failure is not None:
                    log.warning("database_writes_resumed", rows_waiting=self._backlog.rows_waiting)
                self.failure = None
                return True
            except (*STORE_ERRORS, StartError) as error:
                if self.failure is None:
                    log.error("database_write_failed", reason=cause_of(error), rows_waiting=self._backlog.rows_waiting)
                self.failure = f"can't write the database: {cause_of(error)}"
            finally:
                self._writing_since_s = None
            if self.deadline_s < math.inf and not batch:
                return True
            if time.monotonic() + pause_s > self.deadline_s:
                return False
            await asyncio.sleep(pause_s)

    async def _commit(self, batch: Batch) -> None:
        if not self._database.is_usable:  # the file that there is now may know none of the devices
            await self.open_file()
            batch.devices = self._backlog.device_rows(self._backlog.known_devices) | batch.devices
        if not batch:
            return
        try:
            with self.commit_seconds.time():
                await self.run(self._database.commit, batch)
        except sa.exc.StatementError as error:
            if not is_fault_of_a_row(error):
                raise
            # Rows of devices that somebody deleted behind our back would be refused for ever.
            owners = {row["device_id"] for row in itertools.chain(batch.snapshots, batch.connections)}
            batch.devices = self._backlog.device_rows(owners) | batch.devices
            refused = await self.run(self._database.commit_row_by_row, batch)
            for table, row, reason in refused:
                log.error("row_rejected", table=table, reason=reason, row=repr(row))
                if table == "command_logs":
                    self.rejected_commands.append(row["command_id"])
            self.rows_rejected += len(refused)


class Upkeep:
    """Looks after the file in small steps between batches: zone maps, indexes, what is too old, whether a large file is whole.

    Belongs to the event loop.
    """

    INTERVAL_S = 60.0  # as many rows come meanwhile as a question about a time may have to look at in vain
    TIDY_INTERVAL_S = 3600.0
    INDEX_RETRY_S = 600.0  # until it finds a quiet moment that is long enough
    SURVEY_TIMEOUT_S = 20.0

    def __init__(self, database: Database, reader: Reader, writer: Writer, backlog: Backlog, keep_days: int) -> None:
        self._database = database
        self._reader = reader
        self._writer = writer
        self._backlog = backlog
        self._keep_days = keep_days

    async def run(self) -> None:
        """Look after the file for ever."""
        tidied_s = index_tried_s = -math.inf
        while True:
            now_s = time.monotonic()
            try:
                await self._writer.run(self._database.disk_space.look)
                for table in HISTORIES:
                    await self._survey(table)
                if now_s - index_tried_s >= self.INDEX_RETRY_S:
                    index_tried_s = now_s
                    await self._create_missing_indexes()
                if self._keep_days and now_s - tidied_s >= self.TIDY_INTERVAL_S:
                    tidied_s = now_s
                    await self._tidy()
                await self._check()
            except STORE_ERRORS as error:
                log.warning("file_not_looked_after", reason=cause_of(error))
                self._writer.call_if_unusable()
            except Exception:
                log.exception("file_not_looked_after")
            await asyncio.sleep(self.INTERVAL_S)

    async def _check(self) -> None:
        """Look for damage in a large file that was opened, once, while it serves."""
        if not self._database.file.is_unchecked:
            return
        loop, checked, is_over = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

        def check() -> None:
            try:
                self._database.file.check(is_over.is_set)
            finally:
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(checked.set)

        # A thread that ends with the process: SQLite before 3.41 can't be interrupted in this, and it would hold up a stop.
        threading.Thread(target=check, name="store-check", daemon=True).start()
        try:
            await checked.wait()
        finally:
            is_over.set()
        self._writer.call_if_unusable()

    async def _survey(self, table: TableName) -> None:
        is_behind = True
        while is_behind:
            async with asyncio.timeout(self.SURVEY_TIMEOUT_S):
                is_behind = bool(await self._reader.ask(self._database.surveys[table].extend))
            if is_behind:
                await asyncio.sleep(0.01)  # for who wants the processor and the disk meanwhile

    async def _create_missing_indexes(self) -> None:
        """Telemetry waits in memory meanwhile. What somebody waits for ends it, and it is begun anew another time."""
        try:
            while name := await self._writer.run(self._database.create_missing_index, self._gives_way):
                log.info("index_created", index=name)
        except sa.exc.OperationalError as error:
            if sqlite_code(error) != sqlite3.SQLITE_INTERRUPT:
                raise
            log.debug("index_postponed", retry_s=self.INDEX_RETRY_S)

    def _gives_way(self) -> bool:
        return self._backlog.is_awaited or self._writer.deadline_s < math.inf

    async def _tidy(self) -> None:
        """Delete what is older than `keep_days`, in steps between batches."""
        before = stored_time(utc_now() - timedelta(days=self._keep_days))
        for table in HISTORIES:
            deleted, count = 0, self._database.DELETED_AT_ONCE
            while count == self._database.DELETED_AT_ONCE:
                count = await self._writer.run(self._database.delete_before, table, before)
                deleted += count
                await asyncio.sleep(0.01)  # a batch that waits has its turn in any case, and the disk some rest
            if deleted:
                log.info("old_rows_deleted", table=table, rows=deleted, before=before)


class Store:
    """The database as the event loop sees it: what is put into `backlog` gets into the file, and what is read is all of it."""

    READ_TIMEOUT_S = 20.0  # contract, section 6
    FAILING_READ_TIMEOUT_S = 1.0  # where writes fail: two more tries of the writer
    READS_WAITING = 64  # at some milliseconds each

    def __init__(self, settings: Settings) -> None:
        self._database = Database(settings.database_path.absolute(), settings.min_free_mb << 20)
        self._reader = Reader(self._database)
        self.backlog = Backlog(settings.commit_interval_s)
        self.writer = Writer(self._database, self._reader, self.backlog)
        self._writing: asyncio.Task[None] | None = None
        self._upkeep = Upkeep(self._database, self._reader, self.writer, self.backlog, settings.keep_days)
        self._looking_after: asyncio.Task[None] | None = None
        self._reads: set[asyncio.Timeout] = set()  # those under way
        self._is_ending = False

    # -- start and stop ------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Open or create the file, begin to write, and look after it from then on.

        Raises StartError where it can't be used, but for a full disk: then the writer goes on trying.
        """
        try:
            await self.writer.open_file()
        except (*STORE_ERRORS, StartError) as error:
            problem = f"can't open the database {self._database.file.path}: {cause_of(error)}"
            if isinstance(error, StartError) or not is_lack_of_room(error):
                self._end_threads()
                raise error if isinstance(error, StartError) else StartError(problem) from None
            log.error("database_open_failed", reason=cause_of(error))
            self.writer.failure = problem
            self.backlog.call_writer()
        self._writing = asyncio.create_task(self.writer.write_forever())
        self._looking_after = asyncio.create_task(self._upkeep.run())

    def end_reads(self) -> None:
        """Before a stop: break off what is read, and read no more."""
        self._is_ending = True
        for time_left in [time_left for time_left in self._reads if not time_left.expired()]:
            time_left.reschedule(asyncio.get_running_loop().time())

    async def close(self, timeout_s: float) -> bool:
        """Write what is queued, checkpoint, close the file. False where that failed or took longer than `timeout_s`."""
        assert self._writing is not None
        assert self._looking_after is not None
        self.writer.deadline_s = time.monotonic() + timeout_s
        self._looking_after.cancel()
        is_clean = self.is_writer_alive
        self.backlog.call_writer()
        try:
            async with asyncio.timeout(timeout_s + 1):  # the last try may have begun just before
                await asyncio.wait((self._writing,))
                self.backlog.silence_alarm()
                is_clean = is_clean and self._writing.exception() is None and self.backlog.rows_waiting == 0
                async with self._reader.silence():
                    await self.writer.run(self._database.close)
        except TimeoutError:
            is_clean = False
            log.error("database_close_timeout", rows=self.backlog.rows_waiting, timeout_s=timeout_s)
        except STORE_ERRORS as error:
            is_clean = False
            log.error("database_close_failed", reason=cause_of(error))
        finally:
            self._writing.cancel()
            await asyncio.gather(self._writing, self._looking_after, return_exceptions=True)
            self._end_threads()
        return is_clean

    def _end_threads(self) -> None:
        self.writer.thread.shutdown(wait=False)
        self._reader.threads.shutdown(wait=False)

    # -- health --------------------------------------------------------------------------------------------------------

    @property
    def is_writer_alive(self) -> bool:
        """Whether the writer runs (it does while it waits for a disk that stalls)."""
        return self._writing is not None and not self._writing.done()

    def problem(self) -> str | None:
        """Why nothing can be written now, if that is so."""
        return self.writer.problem() if self.is_writer_alive else "the writer has died"

    def figures(self) -> Row:
        """What `GET /health` shows of it (contract, section 6); sizes only where they are known."""
        return {
            "database": self.problem() or "ok",
            **self._database.disk_space.sizes,
            "rows_waiting": self.backlog.rows_waiting,
            "rows_dropped": self.backlog.rows_dropped,
            "rows_rejected": self.writer.rows_rejected,
        }

    @property
    def notice(self) -> str | None:
        """What people should know about the file."""
        return self._database.notice

    # -- waiting for what was put --------------------------------------------------------------------------------------

    async def commit_command(
        self, command_id: str, command: Stored, timeout_s: float, is_urged: asyncio.Future[None] | None = None
    ) -> bool:
        """Write a command's row and wait until it is committed.

        False after `timeout_s`, when it is urged, where the database refused the row, and at once when writes fail now.
        """
        self.backlog.put_command(command_id, command)
        if self.problem() is not None:
            return False
        written = self.backlog.join(behind_snapshots=False)
        ends = {written} if is_urged is None else {written, is_urged}
        await asyncio.wait(ends, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        return written.done() and command_id not in self.writer.rejected_commands

    async def flush(self) -> bool:
        """Wait until everything put so far is committed. False after READ_TIMEOUT_S, sooner where writes fail now."""
        if self.backlog.rows_waiting == 0:
            return True
        written = self.backlog.join(behind_snapshots=True)
        timeout_s = self.READ_TIMEOUT_S if self.writer.failure is None else self.FAILING_READ_TIMEOUT_S
        await asyncio.wait((written,), timeout=timeout_s)
        return written.done()

    # -- reading -------------------------------------------------------------------------------------------------------

    async def history(self, table: TableName, limit: int, **wanted: Any) -> list[Row]:
        """Rows of a history, ready to encode: see Database's `newest`. Raises GatewayError, see `_read`."""
        return await self._read(table, lambda tables: self._database.newest(tables, table, limit, **wanted))

    async def command(self, command_id: str) -> Row | None:
        """One command row, ready to encode, or None. Raises GatewayError, see `_read`."""
        rows = await self._read("command_logs", lambda tables: tables["command_logs"].find(command_id=command_id))
        return rows[0] if rows else None

    async def device(self, device_id: str) -> Row | None:
        """The row of a device, as in Restored, or None. Raises GatewayError, see `_read`."""
        rows = await self._read("devices", lambda tables: tables["devices"].find(device_id=device_id))
        return rows[0] if rows else None

    async def _read(self, table: TableName, ask: Callable[[Any], Iterable[Row]]) -> list[Row]:
        """Ask for rows of a table in a reader's thread, after all that was put so far is in the file.

        Raises STORE_UNAVAILABLE where that can't be done in time, RESOURCE_EXHAUSTED where too many wait already, STOPPING.
        """
        if len(self._reads) >= self.READS_WAITING:
            raise GatewayError(Code.RESOURCE_EXHAUSTED, f"{self.READS_WAITING} queries are waiting already")
        show = functools.partial(restorable if table == "devices" else presentable, table)
        time_left = asyncio.timeout(0.0 if self._is_ending else self.READ_TIMEOUT_S)
        self._reads.add(time_left)
        too_slow = "the database is too slow at the moment"
        try:
            async with time_left:
                if not await self.flush():
                    raise GatewayError(Code.STORE_UNAVAILABLE, self.writer.failure or too_slow)
                return await self._reader.ask(lambda tables: map(show, ask(tables)))
        except TimeoutError:
            if self._is_ending:
                raise GatewayError(Code.STOPPING, "the gateway is going down") from None
            raise GatewayError(Code.STORE_UNAVAILABLE, too_slow) from None
        except STORE_ERRORS as error:
            self.writer.call_if_unusable()
            raise GatewayError(Code.STORE_UNAVAILABLE, f"can't read the database: {cause_of(error)}") from None
        finally:
            self._reads.discard(time_left)

    # -- deleting ------------------------------------------------------------------------------------------------------

    async def delete_device(self, device_id: str, is_back: Callable[[], bool]) -> dict[str, int]:
        """Delete a device's snapshots, its connection history and then itself, in steps between batches.

        Nothing of it may be queued. Ends early where it is back meanwhile. Returns how many snapshots and events it were.
        Raises STORE_UNAVAILABLE.
        """
        deleted: dict[TableName, int] = {"device_state_snapshots": 0, "device_connection_logs": 0, "devices": 0}
        try:
            for table in deleted:
                count = self._database.DELETED_AT_ONCE
                while count == self._database.DELETED_AT_ONCE and not is_back():
                    async with asyncio.timeout(self.READ_TIMEOUT_S):
                        count = await self.writer.run(self._database.delete_of_device, table, device_id)
                    deleted[table] += count
        except STORE_ERRORS as error:
            self.writer.call_if_unusable()
            raise GatewayError(Code.STORE_UNAVAILABLE, f"can't delete all of it: {cause_of(error)}") from None
        return {"snapshots": deleted["device_state_snapshots"], "events": deleted["device_connection_logs"]}


# ======================================================================================================================
# Devices
# ======================================================================================================================

CLOSE_REPLACED = 4000  # contract, section 3
CLOSE_TIMED_OUT = 4001


class Connection(ABC):
    """One board's connection, from the handshake to its end. A newer one has a higher `serial`."""

    _serials = itertools.count(1)

    def __init__(self, device_id: str, peer: str) -> None:
        self.serial = next(self._serials)
        self.device_id = device_id
        self.peer = peer
        self.device: Device | None = None  # once registered
        self.opened_s = time.monotonic()
        self.last_message_s = self.opened_s  # of any kind, once it is registered
        self.heard_s = self.opened_s  # the same with pongs
        self.pinged_s: float | None = None  # when the ping went out whose pong hasn't come yet
        self.has_heartbeat = False  # a board that sent one promised to go on (contract, section 5)

    def end_details(self, code: int | None, reason: str) -> Row:
        """What the connection history says of its end."""
        seconds = round(time.monotonic() - self.opened_s, 3)
        code = None if code is None else int(code)
        return {"reason": reason, "code": code, "peer": self.peer, "seconds_connected": seconds}

    @property
    @abstractmethod
    def is_ending(self) -> bool:
        """Whether it was hung up on."""

    @abstractmethod
    async def send(self, frame: str) -> bool:
        """Hand one text frame to the network without waiting for the board. False where the board doesn't take it."""

    @abstractmethod
    async def ping(self) -> None:
        """Send a ping, without waiting for the board."""

    @abstractmethod
    def hang_up(self, code: int, reason: str, event: str = DISCONNECTED) -> None:
        """End it from this side.

        The close frame, the bounded wait for the board's echo and the end of the TCP connection follow by themselves.
        What still arrives marks nobody online. Only the first call says why.
        """


@dataclasses.dataclass(slots=True, eq=False)
class Device:
    """A board that was seen at least once. Times are naive UTC; JSON is text."""

    device_id: str
    device_type: str
    connected_at: datetime
    metadata: JsonText | None = "{}"  # None: it gave way to that of others, and is in the file
    last_heartbeat: datetime | None = None
    disconnected_at: datetime | None = None
    state: JsonText | None = None
    state_timestamp: datetime | None = None
    alert: Row | None = None  # the latest, in memory only
    deadman: ArmedDeadman | None = None
    unconfirmed: ArmedDeadman | None = None  # one that fired, while nothing was heard from the device since
    connection: Connection | None = None
    saved_s: float = -math.inf  # monotonic time of the last row handed to the store
    takeovers: tuple[float, ...] = ()  # the latest ones' monotonic times
    unlogged_takeovers: int = 0

    @property
    def is_online(self) -> bool:
        """Whether a registered connection is there now."""
        return self.connection is not None

    @property
    def content_bytes(self) -> int:
        """What its state and metadata take."""
        return len(self.metadata or "") + len(self.state or "")

    def row(self) -> Row:
        """The device as a row of the table. Metadata that is only in the file stays there (see Database)."""
        return {
            "device_id": self.device_id,
            "device_type": self.device_type,
            "is_online": self.is_online,
            "last_heartbeat": stored_time(self.last_heartbeat),
            "connected_at": stored_time(self.connected_at),
            "disconnected_at": stored_time(self.disconnected_at),
            "metadata_json": IN_THE_FILE if self.metadata is None else self.metadata,
        }

    def record(self) -> Row:
        """The device as answers show it (contract, section 6), ready to encode."""
        metadata = raw(self.metadata or "{}")
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
            "alert": self.alert,
            "deadman_at": None if self.deadman is None else format_time(self.deadman.due_at),
        }

    def state_record(self) -> Row:
        """The latest state as listeners get it (contract, section 8), ready to encode."""
        record = self.record()
        return {name: record[name] for name in ("device_id", "device_type", "state")} | {"timestamp": record["state_timestamp"]}

    @classmethod
    def restore(cls, row: Row) -> Device:
        """A device of an earlier run, from its row (see Restored); it is offline."""
        names = ("device_id", "device_type", "connected_at", "last_heartbeat", "disconnected_at", "state", "state_timestamp")
        return cls(metadata=row["metadata_json"], **{name: row[name] for name in names})


class Registry:
    """Every device known, by id: the truth about who is online, and the rows that tell of it."""

    # Ids are free to invent for whoever reaches the port: 10,000 cost about 10 MB, and what they say of themselves on top.
    MAX_DEVICES = 10_000
    MAX_CONTENT_BYTES = 16 << 20
    LOOKUP_TIMEOUT_S = 1.0  # for what the file knows of a device that isn't in memory any more
    MAX_TAKEOVERS = 10  # in TAKEOVER_WINDOW_S, then they are counted and not written (contract, section 5)
    TAKEOVER_WINDOW_S = 60.0

    def __init__(self, store: Store) -> None:
        self._store = store
        self._devices: dict[str, Device] = {}
        store.backlog.known_devices = self._devices
        self.contents: Bounded[Device] = Bounded(self.MAX_DEVICES, self.MAX_CONTENT_BYTES)  # their states and metadata
        self.forgotten = 0  # devices that made room for newer ones, and are only in the file
        self._is_complete = False  # there is no device that only the file knows
        self._being_deleted: dict[str, Device] = {}
        self._deletions = 0

    def __len__(self) -> int:
        return len(self._devices)

    def find(self, device_id: str) -> Device | None:
        """The device, or None where it isn't in memory."""
        return self._devices.get(device_id)

    def matching(self, device_type: str | None = None, *, is_online: bool | None = None) -> list[Device]:
        """The devices of a type (exactly) and of a state; None is any."""
        return [
            device
            for device in self._devices.values()
            if (device_type is None or device.device_type == device_type) and is_online in (None, device.is_online)
        ]

    def types(self) -> str:
        """Which types there are and how many of each are online: "ESP32 (2 online), cam (0 online)"."""
        online = Counter(device.device_type for device in self.matching(is_online=True))
        return ", ".join(f"{name} ({online[name]} online)" for name in sorted({d.device_type for d in self.matching()})[:50])

    @staticmethod
    def type_of(devices: Iterable[Device]) -> str:
        """The type that they have, EVERY_TYPE where it differs."""
        types = {device.device_type for device in devices}
        return types.pop() if len(types) == 1 else EVERY_TYPE

    def take_up(self, rows: Collection[Row]) -> None:
        """Know the devices of a file, see Restored; they are offline, but for those that came meanwhile."""
        self._is_complete = len(rows) < RESTORED_DEVICES
        for row in rows:
            device = self.find(row["device_id"])
            if device is None:
                self.know(Device.restore(row))
            elif device.metadata is None:
                device.metadata = row["metadata_json"]
                self.keep_content(device)

    async def look_up(self, device_id: str) -> Device:
        """The device, from the file where it isn't in memory any more. Raises DEVICE_NOT_FOUND, STORE_UNAVAILABLE."""
        device = self.find(device_id)
        if device is None:
            may_file_say_more = not self._is_complete and device_id not in self._being_deleted
        else:
            may_file_say_more = device.metadata is None
        if may_file_say_more:
            deletions = self._deletions
            try:
                async with asyncio.timeout(self.LOOKUP_TIMEOUT_S):
                    row = await self._store.device(device_id)
            except (GatewayError, TimeoutError):
                if (device := self.find(device_id)) is None:
                    text = f"nobody can look now whether device {device_id[:64]!r} was ever seen"
                    raise GatewayError(Code.STORE_UNAVAILABLE, text) from None
                return device
            device = self.find(device_id)  # it may have come meanwhile, and have said more
            if device is not None and device.metadata is None:
                device.metadata = row["metadata_json"] if row else "{}"
                self.keep_content(device)
            elif device is None and row is not None and deletions == self._deletions:
                self.know(device := Device.restore(row))
        if device is None:
            raise GatewayError(Code.DEVICE_NOT_FOUND, f"device {device_id[:64]!r} was never seen")
        return device

    async def look_up_all(self, device_ids: Iterable[str]) -> dict[str, Device | None]:
        """The devices with these ids; None where one was never seen. Raises STORE_UNAVAILABLE."""
        found = {device_id: self.find(device_id) for device_id in device_ids}
        try:
            async with asyncio.timeout(self.LOOKUP_TIMEOUT_S):
                for device_id in [device_id for device_id, device in found.items() if device is None]:
                    try:
                        found[device_id] = await self.look_up(device_id)
                    except GatewayError as error:
                        if error.code is not Code.DEVICE_NOT_FOUND:
                            raise
        except TimeoutError:
            raise GatewayError(Code.STORE_UNAVAILABLE, "nobody can look now whether all of these were ever seen") from None
        return found

    async def targets(self, request: CommandRequest) -> tuple[str, list[Device]]:
        """The type that a command's row has, and the devices that are online of those that are meant.

        Raises DEVICE_NOT_FOUND, INVALID_FIELD_VALUE, STORE_UNAVAILABLE.
        """
        if request.device_id is None:
            assert request.device_type is not None
            wanted = None if request.device_type == EVERY_TYPE else request.device_type
            return request.device_type, self.matching(wanted, is_online=True)
        found = await self.look_up_all(request.device_id)
        if unknown := [device_id for device_id, device in found.items() if device is None]:
            raise GatewayError(Code.DEVICE_NOT_FOUND, f"never seen: {', '.join(unknown)[:300]}")
        devices = [device for device in found.values() if device is not None]
        for device in devices:
            if request.device_type not in (None, EVERY_TYPE, device.device_type):
                raise GatewayError(
                    Code.INVALID_FIELD_VALUE, f"device_type: device {device.device_id!r} is of type {device.device_type!r}"
                )
        return self.type_of(devices), [device for device in devices if device.is_online]

    def know(self, device: Device) -> None:
        """Take a device in. The one that was longest away makes room, where it has to."""
        self._devices[device.device_id] = device
        self.keep_content(device)
        if len(self._devices) > self.MAX_DEVICES:
            idle = (other for other in self._devices.values() if not (other.is_online or other.deadman or other is device))
            if (oldest := min(idle, key=lambda other: other.last_heartbeat or other.connected_at, default=None)) is not None:
                self.forgotten += 1
                self._is_complete = False
                self._forget(oldest)

    def _forget(self, device: Device) -> None:
        self._devices.pop(device.device_id, None)
        self.contents.pop(device.device_id)

    async def delete(self, device: Device) -> dict[str, int]:
        """Forget a device that is offline, its snapshots and its connection history: how many of each.

        Raises DEVICE_NOT_FOUND where another caller was first, DEVICE_ONLINE also where it comes back meanwhile, and
        STORE_UNAVAILABLE.
        """
        device_id = device.device_id
        is_queued = not device.is_online
        while is_queued and not device.is_online:  # what is queued of it would be written after it is gone
            if not await self._store.flush():
                raise GatewayError(Code.STORE_UNAVAILABLE, "can't delete anything while the database can't be written")
            is_queued = self._store.backlog.has_rows_of(device_id)
        if device.is_online:
            raise GatewayError(Code.DEVICE_ONLINE, f"device {device_id!r} is online; only one that is offline can be deleted")
        if self.find(device_id) is not device:
            raise GatewayError(Code.DEVICE_NOT_FOUND, f"device {device_id!r} was deleted already")
        self._forget(device)
        self._being_deleted[device_id] = device
        self._deletions += 1
        try:
            deleted = await self._store.delete_device(device_id, lambda: self.find(device_id) is not None)
        except GatewayError:  # what is left of it is still known
            if self.find(device_id) is None:
                self.know(device)
            raise
        finally:
            self._being_deleted.pop(device_id, None)
        log.info("device_deleted", device_id=device_id, **deleted)
        if self.find(device_id) is not None:
            raise GatewayError(Code.DEVICE_ONLINE, f"device {device_id!r} came back; a part of its history is deleted")
        return deleted

    def keep_content(self, device: Device) -> None:
        """Count what a device's state and metadata take now. Those that changed longest ago make room."""
        for other in self.contents.put(device.device_id, device, device.content_bytes):
            other.state = None
            if not self._store.backlog.is_device_waiting(other.device_id):  # else the file hasn't got its metadata yet
                other.metadata = None

    def save(self, device: Device, *, urgent: bool = True) -> None:
        """Have the store write a device's row; see Backlog."""
        device.saved_s = time.monotonic()
        self._store.backlog.put_device(device.device_id, device, urgent=urgent)

    # -- coming and going ----------------------------------------------------------------------------------------------

    def come_online(self, connection: Connection, device_type: str) -> Device:
        """A connection registers. Raises UNAUTHORIZED where a newer one of its device did."""
        now = utc_now()
        device = self.find(connection.device_id)
        if device is None:
            new = Device(connection.device_id, device_type, now, metadata="{}" if self._is_complete else None)
            device = self._being_deleted.get(connection.device_id, new)  # whose deadman may be due
            self.know(device)
        is_logged = True
        if device.connection is not None:
            is_logged = self._replace(device, device.connection, connection, now)
        device.device_type = device_type
        device.connected_at = device.last_heartbeat = now
        device.disconnected_at = None
        device.connection = connection
        connection.device = device
        self.save(device)
        if is_logged:
            self._log_connection(device, CONNECTED, {"peer": connection.peer}, now)
        return device

    def _replace(self, device: Device, previous: Connection, connection: Connection, now: datetime) -> bool:
        """A takeover: the newer connection wins, also where the older one registers last, which raises UNAUTHORIZED.

        At no moment the device reads as offline. Returns whether the history is to have it: two boards with one id would
        fill that.
        """
        reason = "replaced by a newer connection"
        if previous.serial > connection.serial:
            connection.hang_up(CLOSE_REPLACED, reason)
            raise GatewayError(Code.UNAUTHORIZED, "a newer connection of this device is registered")
        device.takeovers = (*device.takeovers, time.monotonic())[-self.MAX_TAKEOVERS :]
        within_s = device.takeovers[-1] - device.takeovers[0]
        is_logged = len(device.takeovers) < self.MAX_TAKEOVERS or within_s > self.TAKEOVER_WINDOW_S
        if is_logged:
            self._log_connection(device, DISCONNECTED, previous.end_details(CLOSE_REPLACED, "replaced"), now)
        else:
            device.unlogged_takeovers += 1
            log.warning("takeovers_not_written", device_id=device.device_id, reason="two boards have this device_id")
        previous.hang_up(CLOSE_REPLACED, reason)
        return is_logged

    def go_offline(self, connection: Connection, event: str, code: int | None, reason: str) -> Device | None:
        """A connection is over. Returns its device where it went offline by that."""
        device = connection.device
        if device is None or device.connection is not connection:
            return None
        device.connection = None
        device.disconnected_at = utc_now()
        self.save(device)
        self._log_connection(device, event, connection.end_details(code, reason), device.disconnected_at)
        return device

    def _log_connection(self, device: Device, event: str, details: Row, moment: datetime) -> None:
        if device.unlogged_takeovers:
            details["takeovers"], device.unlogged_takeovers = device.unlogged_takeovers, 0
        row = {
            "device_id": device.device_id,
            "device_type": device.device_type,
            "event": event,
            "timestamp": stored_time(moment),
            "details": to_json(details),
        }
        log.info(f"device_{event}", device_id=device.device_id, **details)
        if not self._store.backlog.put_connection_event(row):
            log.warning("event_dropped", device_id=device.device_id, dropped=event)


# ======================================================================================================================
# Commands
# ======================================================================================================================


@dataclasses.dataclass(slots=True, eq=False)
class Command:
    """One command and what became of it. `recipients` is None after a restart: then any device of the type may answer.

    Its `status` is that of the contract's section 4. It is open until every target has answered or its time is over: with
    `created` or `sent`, or with `ack_error` from the first failure on. An answer that comes later still counts.
    """

    device_type: str
    command_name: str
    payload: JsonText
    timeout_s: float
    target_device_count: int
    created_at: datetime
    command_id: str = dataclasses.field(default_factory=lambda: str(uuid.uuid4()))
    status: str = CREATED
    is_open: bool = True
    executed_at: datetime | None = None
    completed_at: datetime | None = None
    deadman: Deadman | None = None
    recipients: set[str] | None = dataclasses.field(default_factory=set)
    meant: Collection[str] = ()  # the ids that the caller named
    answers: dict[str, msgspec.Raw] = dataclasses.field(default_factory=dict)
    answer_bytes: int = 0
    succeeded: set[str] = dataclasses.field(default_factory=set)
    failed: set[str] = dataclasses.field(default_factory=set)
    alerts: list[Row] = dataclasses.field(default_factory=list)  # of its targets, while somebody waits for the answers
    is_persisted: bool = True
    released: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)  # nobody need wait for answers any more
    expiry: asyncio.TimerHandle | None = None
    began_s: float = dataclasses.field(default_factory=time.monotonic)

    OVERHEAD_BYTES: ClassVar[int] = 1500  # of the object and its parts
    ANSWER_OVERHEAD_BYTES: ClassVar[int] = 200  # of a dictionary's entry and its key

    @classmethod
    def restore(cls, row: Row, timeout_s: float) -> Command:
        """A command of an earlier run, from its row."""
        names = ("command_id", "device_type", "command_name", "payload", "status", "created_at", "executed_at", "completed_at")
        command = cls(
            timeout_s=timeout_s,
            is_open=row["status"] in OPEN_STATUSES,
            target_device_count=row["target_device_count"] or 0,
            recipients=None,
            **{name: row[name] for name in names},
        )
        answers = json_decoder.decode(row["response_data"] or "{}")  # deeper than what comes in: `read_json` let it pass
        if isinstance(answers, dict):  # the earlier backend left there what it liked
            for device_id, answer in answers.items():
                command._keep_answer(device_id, answer)
                if isinstance(answer, dict) and "status" in answer:
                    (command.succeeded if answer["status"] == "success" else command.failed).add(device_id)
        return command

    @property
    def content_bytes(self) -> int:
        """What it takes in memory."""
        return self.OVERHEAD_BYTES + len(self.payload) + self.answer_bytes

    def frame(self) -> str:
        """The frame for the boards: seven keys, in the order that the boards in the field need (contract, section 3).

        Raises PAYLOAD_TOO_LARGE.
        """
        frame = to_json(
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
        if (size_bytes := len(frame.encode())) > MAX_COMMAND_FRAME_BYTES:
            raise GatewayError(
                Code.PAYLOAD_TOO_LARGE,
                f"the command would be a frame of {size_bytes} bytes; boards take {MAX_COMMAND_FRAME_BYTES} at the most",
            )
        return frame

    def may_be_answered_by(self, device: Device) -> bool:
        """Whether the command was sent to the device, as far as is known."""
        if self.recipients is None:
            answered = self.succeeded | self.failed
            is_missing = len(answered) < self.target_device_count
            return (device.device_id in answered or is_missing) and self.device_type in (device.device_type, EVERY_TYPE)
        return device.device_id in self.recipients

    def count_answer(self, device_id: str, ack: CommandAck) -> bool:
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
        self._keep_answer(device_id, answer)
        if len(self.succeeded) + len(self.failed) >= self.target_device_count:
            self.completed_at = now
            self.conclude(ACK_ERROR if self.failed else ACK_SUCCESS)
        return True

    def _keep_answer(self, device_id: str, answer: object) -> None:
        before_bytes = len(self.answers[device_id]) if device_id in self.answers else -self.ANSWER_OVERHEAD_BYTES
        encoded = to_json(answer).encode()
        self.answers[device_id] = msgspec.Raw(encoded)
        self.answer_bytes += len(encoded) - before_bytes

    def cancel_expiry(self) -> None:
        """Its time is not limited any more."""
        if self.expiry is not None:
            self.expiry.cancel()
            self.expiry = None

    def conclude(self, status: str) -> None:
        """No answer is awaited any more."""
        self.status = status
        self.is_open = False
        self.released.set()

    def row(self) -> Row:
        """The command as a row of the table."""
        return {
            "command_id": self.command_id,
            "device_type": self.device_type,
            "command_name": self.command_name,
            "payload": self.payload,
            "status": self.status,
            "created_at": stored_time(self.created_at),
            "executed_at": stored_time(self.executed_at),
            "completed_at": stored_time(self.completed_at),
            "response_data": to_json(self.answers) if self.answers else None,
            "target_device_count": self.target_device_count,
            "success_count": len(self.succeeded),
        }

    def shown(self) -> Row:
        """The row as the command log shows it, ready to encode."""
        return presentable("command_logs", self.row())

    def record(self, *, with_answers: bool) -> Row:
        """The command as `POST /command` answers it (contract, section 6), ready to encode."""
        record: Row = {
            "command_id": self.command_id,
            "device_type": self.device_type,
            "command_name": self.command_name,
            "payload": raw(self.payload),
            "status": self.status,
            "created_at": format_time(self.created_at),
            "target_device_count": self.target_device_count,
            "success_count": len(self.succeeded),
        }
        if self.deadman is not None:
            record["deadman"] = self.deadman
        if with_answers:
            record |= {"response_data": self.answers or None, "alerts": self.alerts}
        return record if self.is_persisted else record | {"persisted": False}


@dataclasses.dataclass(frozen=True, slots=True)
class ArmedDeadman:
    """What a device gets when no other command reaches it in time (contract, section 4)."""

    armed_by: Command
    due_s: float  # monotonic
    due_at: datetime  # the same for people

    @classmethod
    def due_in(cls, armed_by: Command, after_s: float) -> ArmedDeadman:
        """One that is due after so many seconds."""
        return cls(armed_by, time.monotonic() + after_s, utc_now() + timedelta(seconds=after_s))


class Commands:
    """The commands that are open, and the latest of those that were: late and repeated answers find them here."""

    MAX_OPEN = 5000
    MAX_CLOSED = 2000
    MAX_CONTENT_BYTES = 8 << 20  # of those that are open and of the others: 1,000 of the largest payloads

    def __init__(self) -> None:
        self.open: Bounded[Command] = Bounded(self.MAX_OPEN, self.MAX_CONTENT_BYTES)
        self._closed: Bounded[Command] = Bounded(self.MAX_CLOSED, self.MAX_CONTENT_BYTES)

    def keep(self, command: Command) -> list[Command]:
        """Know a command, as large as it is now. Returns open ones, the oldest, that have to end early to make room."""
        if command.is_open:
            return self.open.put(command.command_id, command, command.content_bytes, is_news=False)
        self.close(command)
        return []

    def find(self, command_id: str) -> Command | None:
        """The command, open or closed lately, or None."""
        return self.open.get(command_id) or self._closed.get(command_id)

    def close(self, command: Command) -> None:
        """Keep a command for late answers only."""
        command.cancel_expiry()
        self.open.pop(command.command_id)
        self._closed.put(command.command_id, command, command.content_bytes, is_news=False)

    def release_all(self) -> None:
        """For a stop: who waits gets the command as it is, no timer is left, and what is open stays so in the database."""
        for command in self.open:
            command.cancel_expiry()
            command.released.set()


# ======================================================================================================================
# Events
# ======================================================================================================================


SILENCE_S = 15.0  # after which a listener is told that the connection is alive (contract, section 8)


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to some devices, as it goes over the wire."""

    name: str
    device_type: str
    device_ids: Collection[str]
    text: bytes


@dataclasses.dataclass(slots=True, eq=False)
class Listener:
    """A caller of `GET /events`. A filter that is None lets everything pass; `cut_off` ends the connection."""

    cut_off: Callable[[], None]
    names: Collection[str] | None = None
    device_ids: Collection[str] | None = None
    device_type: str | None = None
    seen: int = 0  # the number of the last event that was theirs to take

    def wants(self, event: Event) -> bool:
        """Whether an event passes the filters. A command to several types is one to each of them."""
        return (
            (self.names is None or event.name in self.names)
            and (self.device_ids is None or any(device_id in event.device_ids for device_id in self.device_ids))
            and (self.device_type is None or event.device_type in (self.device_type, EVERY_TYPE))
        )


class Events:
    """What happens, for those who listen (contract, section 8): one ring of the latest events, each encoded once.

    A listener has a place in the ring, and who falls out of it is cut off.
    """

    MAX_EVENTS = 1000
    MAX_BYTES = 4 << 20  # of all events; a state can be 64 KB
    MAX_LISTENERS = 64
    PIECE_BYTES = 64 << 10  # what a listener's connection gets at a time
    REPEAT_S = 0.1  # between two events of the same kind about the same thing: the latest wins
    PAUSE_S = 0.05  # between two pieces, so that 64 listeners and 2,000 events a second are few wake-ups
    LINGER_S = 60.0  # events go on without a listener, for one that was cut off or reloads
    CLOSE_TIMEOUT_S = 0.5  # at a stop, for the last events to be taken

    def __init__(self) -> None:
        self._run = uuid.uuid4().hex[:8]  # an id of another run must not look like one of ours
        self._last = 0  # the number of the latest event
        self._ring: deque[Event] = deque()
        self._ring_bytes = 0
        self._listeners: set[Listener] = set()
        self._is_wanted_until_s: float | None = None  # nobody listens, nor did lately
        self._news = asyncio.Event()
        self._latest: dict[str, Callable[[], None] | None] = {}  # what was told just now, and what to tell of it next
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    def tell(self, name: str, device_type: str, device_ids: Collection[str], record: Callable[[], Row], of: str = "") -> None:
        """Something happened; `record` is asked for it where anybody listens. Where it tells the state `of` something that was
        told just now, it waits for REPEAT_S to be over, and the latest wins.
        """
        if not self.is_wanted():
            return
        publish = functools.partial(self._publish, name, device_type, device_ids, record)
        if (key := f"{name} {of}") in self._latest:
            self._latest[key] = publish
            return
        if of:
            self._latest[key] = None
            self._timer = self._timer or asyncio.get_running_loop().call_later(self.REPEAT_S, self._tell_latest)
        publish()

    def is_wanted(self) -> bool:
        """Whether somebody listens, or did lately."""
        if self._is_wanted_until_s is not None and time.monotonic() > self._is_wanted_until_s:
            self._is_wanted_until_s = None
        return self._is_wanted_until_s is not None

    def _tell_latest(self) -> None:
        waiting = {key: publish for key, publish in self._latest.items() if publish is not None}
        self._latest = dict.fromkeys(waiting)
        self._timer = asyncio.get_running_loop().call_later(self.REPEAT_S, self._tell_latest) if waiting else None
        for publish in waiting.values():
            publish()

    def _publish(self, name: str, device_type: str, device_ids: Collection[str], record: Callable[[], Row]) -> None:
        self._last += 1
        text = f"id: {self._run}-{self._last}\nevent: {name}\ndata: {to_json(record())}\n\n".encode()
        self._ring.append(Event(name, device_type, device_ids, text))
        self._ring_bytes += len(text)
        while len(self._ring) > self.MAX_EVENTS or (self._ring_bytes > self.MAX_BYTES and len(self._ring) > 1):
            self._ring_bytes -= len(self._ring.popleft().text)
        for listener in self._listeners:
            if self._has_lost(listener):
                listener.cut_off()
        self._news.set()

    def _has_lost(self, listener: Listener) -> bool:
        """Whether events that the listener has yet to take are out of the ring already."""
        return listener.seen < self._last - len(self._ring)

    @contextlib.contextmanager
    def listening(self, listener: Listener) -> Iterator[None]:
        """The time in which somebody listens. Raises RESOURCE_EXHAUSTED, STOPPING."""
        if self._is_closed:
            raise GatewayError(Code.STOPPING, "the gateway is going down")
        if len(self._listeners) >= self.MAX_LISTENERS:
            raise GatewayError(Code.RESOURCE_EXHAUSTED, f"{self.MAX_LISTENERS} listen already")
        if not self.is_wanted():  # nobody was told what happened meanwhile
            self._last += 1
            self._ring.clear()
            self._ring_bytes = 0
        self._listeners.add(listener)
        self._is_wanted_until_s = math.inf
        try:
            yield
        finally:
            self._listeners.discard(listener)
            if not self._listeners:
                self._is_wanted_until_s = time.monotonic() + self.LINGER_S

    async def follow(self, listener: Listener, last_event_id: str | None) -> AsyncIterator[bytes]:
        """What happens from now on, or after the event that the listener had last, in pieces. Ends when the gateway stops."""
        run, _, digits = (last_event_id or "").rpartition("-")
        number = int(digits) if run == self._run and re.fullmatch("[0-9]{1,18}", digits) else -1
        is_known = self._last - len(self._ring) <= number <= self._last
        listener.seen = number if is_known else self._last
        reset = "" if is_known or last_event_id is None else "event: reset\ndata: {}\n"
        yield f"retry: 1000\nid: {self._run}-{listener.seen}\n{reset}\n".encode()  # an id to come back with before any event
        while True:
            while listener.seen < self._last and not self._has_lost(listener):
                piece = self._take_piece(listener)
                for start in range(0, len(piece), self.PIECE_BYTES):
                    yield piece[start : start + self.PIECE_BYTES]
            if self._is_closed or self._has_lost(listener):
                return
            yield b""  # a look whether it is still there
            await asyncio.sleep(self.PAUSE_S)
            if listener.seen == self._last and not self._is_closed:
                self._news.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(SILENCE_S):
                        await self._news.wait()

    def _take_piece(self, listener: Listener) -> bytes:
        """The next events that the listener wants, as many as make a piece."""
        texts: list[bytes] = []
        size_bytes = 0
        for event in itertools.islice(self._ring, len(self._ring) - (self._last - listener.seen), None):
            if listener.wants(event):
                size_bytes += len(event.text)
                if texts and size_bytes > self.PIECE_BYTES:
                    break
                texts.append(event.text)
            listener.seen += 1
        return b"".join(texts)

    async def close(self) -> None:
        """Tell what waits to be told, and let everybody go. Who doesn't take it in time is cut off."""
        self._tell_latest()
        if self._timer is not None:
            self._timer.cancel()
        self._is_closed = True
        self._news.set()
        over_s = time.monotonic() + self.CLOSE_TIMEOUT_S
        while self._listeners and time.monotonic() < over_s:
            await asyncio.sleep(0.01)
        for listener in self._listeners:
            listener.cut_off()


# ======================================================================================================================
# Gateway
# ======================================================================================================================


class Departure:
    """A command that waits for its row before it goes to these devices."""

    def __init__(self, device_ids: Collection[str]) -> None:
        self.device_ids = set(device_ids)
        self.is_urged: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_over = asyncio.Event()  # it went, or never will


class Departures:
    """Has commands to one device go in the order in which they came: what is posted later must never drive on a robot that
    this stops.
    """

    def __init__(self) -> None:
        self._waiting: list[Departure] = []  # in that order

    @contextlib.contextmanager
    def waiting(self, device_ids: Collection[str]) -> Iterator[Departure]:
        """The time in which a command to these devices (others may be added) waits, and is sent."""
        departure = Departure(device_ids)
        self._waiting.append(departure)
        try:
            yield departure
        finally:
            self._waiting.remove(departure)
            departure.is_over.set()

    async def let_go_before(self, departure: Departure) -> None:
        """A command is due: those before it to any of its devices go now, whether their rows are written or not.

        That takes what sending them takes, and LOOKUP_TIMEOUT_S where their targets are still looked up.
        """
        for other in self._waiting[: self._waiting.index(departure)]:
            if other.device_ids & departure.device_ids:
                if not other.is_urged.done():
                    other.is_urged.set_result(None)
                await other.is_over.wait()


class Dispatch:
    """Commands on their way: to whom they go, what comes back, and the deadmen that go with them."""

    PERSIST_TIMEOUT_S = 1.0  # contract, section 6: the longest that a store holds a command up
    TURN_TARGETS = 64  # about 2 ms of sending, then the others have their turn
    MAX_ALERTS = 100  # in an answer

    def __init__(self, settings: Settings, store: Store, registry: Registry, events: Events) -> None:
        self._settings = settings
        self._store = store
        self._registry = registry
        self._events = events
        self.commands = Commands()
        self._awaited: set[Command] = set()  # those whose caller waits for the answers
        self._deadmen: dict[str, Device] = {}  # the devices that have one armed
        self._next_due: asyncio.TimerHandle | None = None
        self._firing: set[asyncio.Task[None]] = set()
        self._departures = Departures()
        self._is_stopping = False
        self.ended: Counter[str] = Counter()  # commands by the status they ended with
        self.answer_seconds = prometheus_client.Histogram(
            "amhrpd_answer_seconds", "until the last answer", registry=None, buckets=BUCKETS_S
        )

    async def route(self, request: CommandRequest) -> Command:
        """Create a command, commit its row, send it to all targets at once, and return it as sent or without devices.

        A store that can't write holds this up for PERSIST_TIMEOUT_S at the most. See `Registry.targets` for what it raises.
        """
        with self._departures.waiting(request.device_id or ()) as departure:
            device_type, targets = await self._registry.targets(request)
            departure.device_ids.update(device.device_id for device in targets)
            if request.deadman is not None:  # one that boards can't take is refused whole
                self._build(device_type, request.deadman.command_name, request.deadman.payload, targets).frame()
            command = self._build(device_type, request.command_name, request.payload, targets)
            command.timeout_s = float(request.timeout or command.timeout_s)
            command.deadman, command.meant = request.deadman, request.device_id or ()
            frame = command.frame()
            self._enter(command)
            command.is_persisted = await self._store.commit_command(
                command.command_id, command, self.PERSIST_TIMEOUT_S, departure.is_urged
            )
            await self._departures.let_go_before(departure)
            await self._send(command, frame, targets)
        return command

    def _build(self, device_type: str, name: str, payload: dict[str, Any] | None, targets: Collection[Device]) -> Command:
        return Command(
            device_type=device_type,
            command_name=name,
            payload=to_json(payload or {}),
            timeout_s=self._settings.command_timeout_s,
            target_device_count=len(targets),
            created_at=utc_now(),
        )

    def _save(self, command: Command) -> None:
        self._store.backlog.put_command(command.command_id, command)
        device_ids = command.answers if command.recipients is None else command.recipients or command.meant
        self._events.tell("command", command.device_type, device_ids, command.shown, of=command.command_id)

    def _enter(self, command: Command) -> None:
        """Have the command among the open ones, where it has targets. Whatever happens to its caller, it ends."""
        if command.target_device_count == 0:
            command.conclude(NO_DEVICES)
            self.ended[NO_DEVICES] += 1
            return
        self._expire_later(command, self.PERSIST_TIMEOUT_S + command.timeout_s)
        self._keep(command)

    def _keep(self, command: Command) -> None:
        for oldest in self.commands.keep(command):
            log.warning("open_command_ended_early", command_id=oldest.command_id, reason="newer ones need its place")
            self._expire(oldest)

    def take_up(self, row: Row) -> None:
        """Know a command of an earlier run. What was open is open again, for the default timeout."""
        if self.commands.find(row["command_id"]) is None:
            command = Command.restore(row, self._settings.command_timeout_s)
            if command.is_open:
                self._expire_later(command, command.timeout_s)
            self._keep(command)

    async def wait_for_answers(self, command: Command, timeout_s: float) -> None:
        """Return when the command is finished, the time is over, or the gateway stops."""
        self._awaited.add(command)
        try:
            async with asyncio.timeout(timeout_s):
                await command.released.wait()
        except TimeoutError:
            pass
        finally:
            self._awaited.discard(command)
        # What the caller is told of has to outlast a crash.
        command.is_persisted = await self._store.commit_command(command.command_id, command, self.PERSIST_TIMEOUT_S)

    def explain_no_devices(self, request: CommandRequest, command: Command) -> str:
        """Why a command found none: which ids are offline, or which types there are and how many of each are online."""
        if command.target_device_count:
            return f"{command.target_device_count} online, but none takes what it is sent"
        if request.device_id is not None:
            return f"offline: {', '.join(dict.fromkeys(request.device_id))}"
        return f"no device of type {request.device_type} is online; types known: {self._registry.types() or 'none yet'}"

    async def _send(
        self, command: Command, frame: str, targets: Collection[Device], *, armed_by: Command | None = None
    ) -> None:
        """Send a command to its targets, all at once, and save what became of it.

        A deadman's, which another command armed, goes at a stop too, and waits for who doesn't take frames just now.
        """
        assert command.recipients is not None
        for number, device in enumerate(targets, start=1):
            # Noted before the frame goes: the fastest boards answer within 2 ms.
            command.recipients.add(device.device_id)
            may_go = armed_by is not None or not self._is_stopping
            if may_go and device.connection is not None and await device.connection.send(frame):
                self.disarm(device)
                if armed_by is not None:
                    device.unconfirmed = ArmedDeadman.due_in(armed_by, 0)
                if command.deadman is not None:
                    self.arm(device, ArmedDeadman.due_in(command, command.deadman.after))
                if command.status == CREATED:
                    command.status = SENT
                command.executed_at = command.executed_at or utc_now()
            else:
                command.recipients.discard(device.device_id)
                if armed_by is not None and device.deadman is None:
                    self.arm(device, ArmedDeadman.due_in(armed_by, 0))
                log.warning("command_not_taken", device_id=device.device_id, command=command.command_id)
            if number % self.TURN_TARGETS == 0:
                await asyncio.sleep(0)
        if targets and not command.recipients:
            command.conclude(NO_DEVICES)
            self.ended[NO_DEVICES] += 1
            self.commands.close(command)
        elif command.is_open:
            self._expire_later(command, command.timeout_s)
        if command.deadman is not None:
            self.fire_due()
        self._save(command)
        log.info(
            "command_routed",
            command_id=command.command_id,
            command_name=command.command_name,
            device_type=command.device_type,
            status=command.status,
            targets=command.target_device_count,
        )

    # -- answers and their end -----------------------------------------------------------------------------------------

    def acknowledge(self, device: Device, message: CommandAck) -> None:
        """A board answers a command. Raises COMMAND_NOT_FOUND."""
        command = self.commands.find(message.command_id)
        if command is None or not command.may_be_answered_by(device):
            raise GatewayError(Code.COMMAND_NOT_FOUND, f"command {message.command_id[:64]!r} was not sent to this device")
        was_open, was_complete = command.is_open, command.completed_at is not None
        if command.answer_bytes > Commands.MAX_CONTENT_BYTES // 2:
            message.payload = None  # counted all the same
            log.warning("answer_not_kept", device_id=device.device_id, reason="the answers to this command take too much")
        if command.count_answer(device.device_id, message):
            self._keep(command)
            if was_open and not command.is_open:
                self.ended[command.status] += 1
            if command.completed_at is not None and not was_complete and command.recipients is not None:
                self.answer_seconds.observe(time.monotonic() - command.began_s)
            self._save(command)
            log.debug("command_answered", command_id=command.command_id, device_id=device.device_id, status=message.status)

    def note_alert(self, device: Device, alert: Row) -> None:
        """A board raised an alert: who waits for its answer gets to see it (a locked wheel sends nothing else)."""
        for command in self._awaited:
            if command.recipients and device.device_id in command.recipients and len(command.alerts) < self.MAX_ALERTS:
                command.alerts.append({"device_id": device.device_id, **alert})

    def _expire_later(self, command: Command, delay_s: float) -> None:
        command.cancel_expiry()
        command.expiry = asyncio.get_running_loop().call_later(delay_s, self._expire, command)

    def _expire(self, command: Command) -> None:
        command.conclude(ACK_TIMEOUT if command.status in OPEN_STATUSES else command.status)
        self.ended[command.status] += 1
        self.commands.close(command)
        self._save(command)
        log.info("command_unanswered", command_id=command.command_id, status=command.status, answers=len(command.answers))

    # -- deadmen -------------------------------------------------------------------------------------------------------

    def arm(self, device: Device, deadman: ArmedDeadman) -> None:
        """Have a deadman fire when it is due, and the device is online."""
        device.deadman = deadman
        self._deadmen[device.device_id] = device

    def disarm(self, device: Device) -> None:
        """Nothing is due to the device any more."""
        device.deadman = device.unconfirmed = None
        if self._deadmen.get(device.device_id) is device:  # another device may have come under the id of a deleted one
            del self._deadmen[device.device_id]

    def fire_due(self, *, is_stopping: bool = False) -> None:
        """Send what is due, at a stop whatever is armed: one command for all devices that are due by the same one.

        A device that is offline keeps its deadman until it registers again. The next one that is due calls this again.
        """
        now_s = time.monotonic() + 0.001  # the loop's timers are that early
        due: dict[Command, list[Device]] = {}
        next_due_s = math.inf
        for device in self._deadmen.values():
            if device.deadman is None or not device.is_online:
                continue
            if is_stopping or device.deadman.due_s <= now_s:
                due.setdefault(device.deadman.armed_by, []).append(device)
            else:
                next_due_s = min(next_due_s, device.deadman.due_s)
        for armed_by, devices in due.items():
            task = asyncio.create_task(self._fire(armed_by, devices))
            self._firing.add(task)
            task.add_done_callback(self._firing.discard)
            for device in devices:
                self.disarm(device)
        if self._next_due is not None:
            self._next_due.cancel()
        self._next_due = None
        if next_due_s < math.inf:
            self._next_due = asyncio.get_running_loop().call_later(next_due_s - time.monotonic(), self.fire_due)

    async def _fire(self, armed_by: Command, devices: list[Device]) -> None:
        """Stopping a robot waits for no disk: the frames go first, and the row follows."""
        assert armed_by.deadman is not None
        command = self._build(armed_by.device_type, armed_by.deadman.command_name, armed_by.deadman.payload, devices)
        log.warning("deadman_fired", command_id=command.command_id, armed_by=armed_by.command_id, targets=len(devices))
        self._enter(command)
        await self._send(command, command.frame(), devices, armed_by=armed_by)

    def fire_what_waits_for(self, device: Device) -> None:
        """A device is back: what fired into a connection that then was lost without a word may not have arrived."""
        if device.unconfirmed is not None:
            self.arm(device, device.unconfirmed)
        if device.deadman is not None:
            self.fire_due()

    async def stop(self) -> None:
        """Send every armed deadman, and await no more answers. What was under way drives nobody on behind that."""
        self._is_stopping = True
        self.fire_due(is_stopping=True)
        for problem in await asyncio.gather(*self._firing, return_exceptions=True):
            if problem is not None:
                log.error("deadman_failed", exc_info=problem)
        self.commands.release_all()


class Gateway:
    """What happens when. Owns the registry, the commands, the connections and the way into the store.

    Its methods are the verbs of the contract; all of them belong to the event loop's thread.
    """

    HEARTBEAT_SAVE_INTERVAL_S = 60.0  # a device's last activity reaches the disk this often, and at its end
    STOP_TIMEOUT_S = 5.0  # for all boards to echo the close
    MAX_FAST = 64  # at 500 KB each, if they turn to tiny frames
    LANE_PAUSE_S = 0.001  # between the turns of those that flood: for the others, and for the writer's thread

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings = settings
        self.ping_interval_s = settings.ping_interval_s
        self._store = store
        self.registry = Registry(store)
        store.writer.on_restored = self.take_up
        self.events = Events()
        self.dispatch = Dispatch(settings, store, self.registry, self.events)
        self.is_stopping = False
        self._fast: set[Connection] = set()
        self._lane = asyncio.Lock()  # for boards that flood, one at a time
        self.connections: set[Connection] = set()
        self.messages: Counter[type[BoardMessage]] = Counter()  # of boards, by type
        self.refused: Counter[str] = Counter()  # of boards and callers, by code
        self.loop_late_s = prometheus_client.Histogram(
            "amhrpd_loop_late_seconds", "by how much timers are late", registry=None, buckets=BUCKETS_S
        )
        self._started_s = self._swept_s = time.monotonic()

    # -- start and stop ------------------------------------------------------------------------------------------------

    def take_up(self, restored: Restored) -> None:
        """Know what a file has: its devices, which are offline, and its open commands, which are open again."""
        self.registry.take_up(restored.devices)
        for row in restored.commands:
            self.dispatch.take_up(row)
        if restored.devices or restored.commands:
            log.info("restored", devices=len(restored.devices), open_commands=len(self.dispatch.commands.open))

    async def stop(self) -> None:
        """Take no more commands, stop what a deadman stops, log every board off and close its connection with 1001; then
        listeners have heard it all and go.

        Acknowledgements that arrive before a board's echo still count. Bounded by STOP_TIMEOUT_S.
        """
        self.is_stopping = True
        self._store.end_reads()
        await self.dispatch.stop()
        for connection in list(self.connections):
            self.end(connection, WSCloseCode.GOING_AWAY, "the gateway stops")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.STOP_TIMEOUT_S):
                while self.connections:
                    await asyncio.sleep(0.01)
        await self.events.close()

    async def delete_device(self, device_id: str) -> dict[str, int]:
        """Forget a device, its snapshots and its connection history: how many of each.

        Raises DEVICE_NOT_FOUND, DEVICE_ONLINE, STORE_UNAVAILABLE.
        """
        device = await self.registry.look_up(device_id)
        try:
            deleted = await self.registry.delete(device)
        finally:
            if self.registry.find(device_id) is not device:
                self.dispatch.disarm(device)
        self._tell_of(device, "device", lambda: {"device_id": device_id, "deleted": True})
        return deleted

    def _tell_of(self, device: Device, name: str, record: Callable[[], Row]) -> None:
        """Tell listeners the state of a device."""
        self.events.tell(name, device.device_type, (device.device_id,), record, of=device.device_id)

    # -- connections ---------------------------------------------------------------------------------------------------

    async def opened(self, connection: Connection) -> None:
        """A handshake is done. Nobody is online by that; what the file knows of the device is looked up where it has to be."""
        self.connections.add(connection)
        if self.is_stopping:
            self.end(connection, WSCloseCode.GOING_AWAY, "the gateway stops")
        with contextlib.suppress(GatewayError):
            await self.registry.look_up(connection.device_id)

    def end(self, connection: Connection, code: int, reason: str, event: str = DISCONNECTED) -> None:
        """End a connection from this side: its device is offline at once."""
        self._go_offline(connection, event, code, reason)
        connection.hang_up(code, reason, event)

    def closed(self, connection: Connection, event: str, code: int | None, reason: str) -> None:
        """A connection is over; `event` is `disconnected` or `timeout`. Its device goes offline if it didn't by `end`."""
        self.connections.discard(connection)
        self._fast.discard(connection)
        self._go_offline(connection, event, code, reason)

    def _go_offline(self, connection: Connection, event: str, code: int | None, reason: str) -> None:
        if (device := self.registry.go_offline(connection, event, code, reason)) is not None:
            self._tell_of(device, "device", device.record)

    # -- what boards say -----------------------------------------------------------------------------------------------

    def handle(self, connection: Connection, message: AnyBoardMessage) -> None:
        """A board says something: the first message that bears a type registers it. Raises GatewayError."""
        device = connection.device
        if message.device_type is None and isinstance(message, Registration):
            raise GatewayError(Code.MISSING_REQUIRED_FIELD, "missing required field `device_type` in a registration")
        if device is None:
            if message.device_type is None:
                raise GatewayError(Code.UNAUTHORIZED, "device_type required: the first message must bear it")
            device = self.registry.come_online(connection, message.device_type)
            self.dispatch.fire_what_waits_for(device)
            if not isinstance(message, Registration):  # which says more, and is told of then
                self._tell_of(device, "device", device.record)
        now = utc_now()  # once a message: on some machines the clock takes longer than the rest
        match message:
            case Status():
                self._take_status(device, message, now)
            case Heartbeat():
                connection.has_heartbeat = True
            case CommandAck():
                self.dispatch.acknowledge(device, message)
            case Registration():
                self._register(device, message)
            case Alert():
                self._take_alert(device, now, "alert", message.alert_type, message.message)
            case ErrorReport():
                self._take_alert(device, now, "error", str(message.error_code), message.error_message, message.context)
        self.messages[type(message)] += 1
        self.note_activity(connection, now)
        connection.last_message_s = connection.heard_s

    def note_activity(self, connection: Connection, now: datetime) -> None:
        """Something came of a board, and be it a pong."""
        connection.heard_s = time.monotonic()
        connection.pinged_s = None
        if connection.device is not None:
            connection.device.last_heartbeat = now
            connection.device.unconfirmed = None

    def _register(self, device: Device, message: Registration) -> None:
        device.device_type = message.device_type or device.device_type
        if message.metadata is not None:
            device.metadata = to_json(message.metadata)
            self.registry.keep_content(device)
        self.registry.save(device)
        self._tell_of(device, "device", device.record)

    def _take_status(self, device: Device, message: Status, now: datetime) -> None:
        device.state, device.state_timestamp = to_json(message.payload), now
        self.registry.keep_content(device)
        row = {
            "device_id": device.device_id,
            "device_type": device.device_type,
            "state_data": device.state,
            "timestamp": stored_time(now),
        }
        if not self._store.backlog.put_snapshot(row):
            log.warning("snapshots_dropped", device_id=device.device_id)
        self._tell_of(device, "state", device.state_record)

    def _take_alert(self, device: Device, now: datetime, kind: str, of_type: str, text: str, context: object = None) -> None:
        """A board says what a person should know."""
        device.alert = {"kind": kind, "type": of_type[:200], "message": text[:1000], "timestamp": format_time(now)}
        self.dispatch.note_alert(device, device.alert)
        record = {"device_id": device.device_id, "device_type": device.device_type, **device.alert}
        self.events.tell("alert", device.device_type, (device.device_id,), lambda: record)
        log.warning(f"device_{kind}", device_id=device.device_id, type=of_type, message=text, context=context)

    def may_be_fast(self, connection: Connection, *, says_much: bool) -> bool:
        """Whether a board that floods is read in large pieces. MAX_FAST may, and none that says next to nothing."""
        if not says_much:
            self._fast.discard(connection)
        elif len(self._fast) < self.MAX_FAST:
            self._fast.add(connection)
        return connection in self._fast

    async def take_turn(self, device_id: str) -> None:
        """Wait until the boards that flood and came before have had theirs, and until its share of what waits is written."""
        async with self._lane:
            await asyncio.sleep(self.LANE_PAUSE_S)
        if self._store.backlog.has_its_share_waiting(device_id):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(Dispatch.PERSIST_TIMEOUT_S):
                    await self._store.flush()

    # -- regular upkeep ------------------------------------------------------------------------------------------------

    async def sweep(self, interval_s: float) -> None:
        """Every `interval_s`: ping, give up boards that are silent, save what activity is due, fire what couldn't be before.

        Time in which the gateway itself stood still is nobody's silence: what is on its way is read first.
        """
        now_s = time.monotonic()
        late_s = max(0.0, now_s - self._swept_s - interval_s)
        stood_still_s = late_s if late_s > interval_s else 0.0
        self.loop_late_s.observe(late_s)
        self._swept_s = now_s
        for connection in list(self.connections):
            if stood_still_s:
                connection.last_message_s += stood_still_s
                connection.heard_s += stood_still_s
                connection.pinged_s = connection.pinged_s and connection.pinged_s + stood_still_s
            await self._look_after(connection, now_s)
        self.dispatch.fire_due()

    async def _look_after(self, connection: Connection, now_s: float) -> None:
        if connection.is_ending:
            return
        device, silent_s = connection.device, now_s - connection.last_message_s
        registration_timeout_s = self._settings.registration_timeout_s
        if device is None and silent_s > registration_timeout_s:
            log.info("never_registered", device_id=connection.device_id, peer=connection.peer)
            self.end(connection, CLOSE_TIMED_OUT, f"not registered within {registration_timeout_s:g} s")
        elif connection.pinged_s is not None and now_s - connection.pinged_s > self.ping_interval_s / 2:
            self.end(connection, CLOSE_TIMED_OUT, "no answer to pings", event=TIMEOUT)
        elif connection.has_heartbeat and silent_s > self._settings.heartbeat_timeout_s:
            self.end(connection, CLOSE_TIMED_OUT, f"nothing came for {silent_s:.0f} s", event=TIMEOUT)
        elif connection.pinged_s is None and now_s - connection.heard_s > self.ping_interval_s:
            await connection.ping()
        if device is None or not device.is_online:
            return
        is_due = now_s - device.saved_s >= self.HEARTBEAT_SAVE_INTERVAL_S
        if connection.heard_s > device.saved_s and is_due:
            self.registry.save(device, urgent=False)

    def health(self) -> Row:
        """What `GET /health` answers (contract, section 6), from memory."""
        commands, problem = self.dispatch.commands, self._store.problem()
        health: Row = {
            "status": "ok" if problem is None else "degraded",
            "app": "AMHR-PD",
            "version": VERSION,
            "timestamp": format_time(utc_now()),
            "uptime_seconds": round(time.monotonic() - self._started_s, 3),
            "devices_online": len(self.registry.matching(is_online=True)),
            "devices_total": len(self.registry),
            "open_commands": len(commands.open),
            **self._store.figures(),
        }
        gave_way = {
            "devices": self.registry.forgotten,
            "states": self.registry.contents.gave_way,
            "open_commands": commands.open.gave_way,
        }
        news = {"gave_way": gave_way if any(gave_way.values()) else None, "notice": self._store.notice}
        return health | {name: value for name, value in news.items() if value is not None}


# ======================================================================================================================
# Device socket
# ======================================================================================================================


NO_STATUS_RECEIVED = 1005  # a close frame without a code (RFC 6455, section 7.1.5)
READ_BYTES = 16 << 10  # at once, of asyncio's 256 KiB
# Of tiny frames: the smallest has 6 bytes and takes 200 once it is read, so 1,000 boards that flood with them take 35 MB.
READ_OF_TINY_BYTES = 1 << 10
TINY_BYTES = 64  # less than any status of a real board


def read_at_once(transport: asyncio.BaseTransport | None, size_bytes: int) -> None:
    """Take so much of what waits on a connection; then the next one that sent something has its turn."""
    with contextlib.suppress(AttributeError):  # TLS has a buffer of its own
        transport.max_size = size_bytes  # type: ignore[union-attr]


def peer_of(request: web.BaseRequest) -> str:
    """The caller's address; IPv4 as IPv4 also where the socket is IPv6."""
    return (request.remote or "unknown").removeprefix("::ffff:")


class DeviceSocket(Connection):
    """One board's WebSocket: frames in, verbs out; frames to the board. The task that serves the handshake owns it all."""

    CLOSE_TIMEOUT_S = 2.0  # for the board's echo, which the boards in the field send at once
    # A board that leaves this much unread doesn't read. No more than asyncio's low-water mark, below which sending never
    # waits, also after the buffer was full.
    UNREAD_LIMIT_BYTES = 16 << 10
    # What a board may say without waiting for its turn: ten times what the boards in the field can. A message counts once, and
    # once more for every 2 KB.
    ALLOWANCE_PER_S = 100.0
    ALLOWANCE = 100.0
    TURN_S = 0.008  # of one that says more; then the others have theirs
    ENDINGS: ClassVar[Mapping[int | None, str]] = {
        None: "the connection was lost",
        WSCloseCode.MESSAGE_TOO_BIG: "a message was too big",
        WSCloseCode.PROTOCOL_ERROR: "the device broke the WebSocket protocol",
        WSCloseCode.INVALID_TEXT: "the device broke the WebSocket protocol",
    }

    def __init__(self, gateway: Gateway, settings: Settings, request: web.Request, on_whole: Callable[[], None]) -> None:
        """`on_whole` is called when a message is there whole."""
        super().__init__(request.match_info["device_id"], peer_of(request))
        self._gateway = gateway
        self._on_whole = on_whole
        self._request = request
        self._our_close: tuple[str, int, str] | None = None  # event, code, reason
        self._has_sent_close = False
        self._close_code: int | None = None  # of a close that came from the other side, or from what it sent
        self._receiving: asyncio.Timeout | None = None
        self._allowance = self.ALLOWANCE
        self._counted_s = self._turn_ends_s = time.monotonic()
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
        try:
            await self._gateway.opened(self)
            if self._our_close is None:
                await self._receive_until_called_back()
            if self._our_close is not None:
                await self._send_close()
        except ConnectionError:
            pass  # the board went while it was written to
        except Exception:
            log.exception("connection_failed", device_id=self.device_id)
            self._our_close = DISCONNECTED, WSCloseCode.INTERNAL_ERROR, "internal error"
            with contextlib.suppress(TimeoutError, ConnectionError):
                await self._send_close()
        finally:
            if self._request.transport is not None:
                self._request.transport.close()
            self._gateway.closed(self, *self._how_it_ended())
            if (error := self._socket.exception()) is not None:  # it would keep all of this until a full collection
                error.__traceback__ = error.__context__ = None
        return self._socket

    @property
    def is_ending(self) -> bool:
        """See Connection."""
        return self._our_close is not None

    async def send(self, frame: str) -> bool:
        """See Connection."""
        if not await self._send(frame):
            return False
        self._allowance += 2  # for the answer, of up to 2 KB: who does what it is told doesn't flood
        return True

    async def _send(self, frame: str) -> bool:
        """Never waits: what the board leaves unread is bounded."""
        transport = self._request.transport
        if self._socket.closed or transport is None or transport.get_write_buffer_size() > self.UNREAD_LIMIT_BYTES:
            return False
        try:
            await self._socket.send_str(frame)
        except ConnectionError:
            return False
        return True

    async def ping(self) -> None:
        """See Connection."""
        self.pinged_s = time.monotonic()
        transport = self._request.transport
        if transport is not None and transport.get_write_buffer_size() <= self.UNREAD_LIMIT_BYTES:
            with contextlib.suppress(ConnectionError):
                await self._socket.ping()

    def hang_up(self, code: int, reason: str, event: str = DISCONNECTED) -> None:
        """See Connection. Takes CLOSE_TIMEOUT_S twice at the most: to hand the close frame over, and for the echo."""
        if self._our_close is None:
            self._our_close = event, code, reason
            if self._receiving is not None:
                self._receiving.reschedule(asyncio.get_running_loop().time())

    async def _receive_until_called_back(self) -> None:
        try:
            async with asyncio.timeout(None) as self._receiving:
                await self._receive()
        except TimeoutError:
            pass  # by hang_up()
        finally:
            self._receiving = None

    async def _send_close(self) -> None:
        """Send the close frame, and go on listening until the board's echo: an answer that was on its way still counts."""
        assert self._our_close is not None
        _, code, reason = self._our_close
        self._has_sent_close = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.CLOSE_TIMEOUT_S):
                await self._socket.send_frame(struct.pack("!H", code) + reason.encode()[:123], WSMsgType.CLOSE)
                await self._receive()

    def _how_it_ended(self) -> tuple[str, int | None, str]:
        """How the connection ended: event, close code, reason."""
        if self._our_close is not None:
            return self._our_close
        return DISCONNECTED, self._close_code, self.ENDINGS.get(self._close_code, "closed by the device")

    async def _receive(self) -> None:
        """Receive until the connection ends."""
        while True:
            frame = await self._socket.receive()
            self._on_whole()
            match frame.type:
                case WSMsgType.TEXT | WSMsgType.BINARY:
                    try:
                        self._handle(frame)
                    except GatewayError as error:
                        await self._refuse(error)
                case WSMsgType.PING:
                    await self._socket.pong(frame.data)
                case WSMsgType.PONG:
                    if self._our_close is None:
                        self._gateway.note_activity(self, utc_now())
                case WSMsgType.CLOSE:
                    if self._our_close is None:
                        self._close_code = frame.data or NO_STATUS_RECEIVED
                        await self._socket.close(code=frame.data or WSCloseCode.OK)
                    return
                case _:
                    if isinstance(frame.data, WebSocketError):
                        self._close_code = frame.data.code
                    return
            await self._wait_for_turn(len(frame.data))

    def _handle(self, frame: aiohttp.WSMessage) -> None:
        if frame.type is WSMsgType.BINARY:
            raise GatewayError(Code.INVALID_MESSAGE, "binary frame: messages are JSON objects in text frames")
        message = decode_board_message(frame.data)
        if self._our_close is None:
            self._gateway.handle(self, message)
        elif isinstance(message, CommandAck) and self.device is not None:
            # What a board still says after it was hung up on marks nobody online (contract, section 1).
            self._gateway.dispatch.acknowledge(self.device, message)

    async def _wait_for_turn(self, size_bytes: int) -> None:
        """Let a board that floods wait: all of them together get about one TURN_S of the loop, and then the others are next."""
        now_s = time.monotonic()
        self._allowance = min(self.ALLOWANCE, self._allowance + (now_s - self._counted_s) * self.ALLOWANCE_PER_S)
        self._allowance -= 1 + size_bytes / 2048
        self._counted_s = now_s
        if self._allowance >= 0 or now_s < self._turn_ends_s:
            return
        if self.device is None:
            self._gateway.end(self, WSCloseCode.POLICY_VIOLATION, "said too much before it registered")
        self._allowance = max(self._allowance, -self.ALLOWANCE)
        transport = self._request.transport
        is_fast = self._gateway.may_be_fast(self, says_much=size_bytes >= TINY_BYTES)
        read_at_once(transport, READ_BYTES if is_fast else READ_OF_TINY_BYTES)
        is_held_up = transport is None or not transport.is_reading()  # by the library
        if transport is not None and not is_held_up:
            transport.pause_reading()  # what waits, waits at the board
        try:
            await self._gateway.take_turn(self.device_id)
        finally:
            if transport is not None and not is_held_up:
                transport.resume_reading()
        self._turn_ends_s = time.monotonic() + self.TURN_S

    async def _refuse(self, error: GatewayError) -> None:
        if self._has_sent_close:  # nothing may follow a close frame (RFC 6455, section 5.5.1)
            return
        if self.device is not None:
            self.last_message_s = time.monotonic()  # wrong as it is, it is no silence
        text = str(error)
        self._gateway.refused[error.code.name] += 1
        log.warning("message_refused", device_id=self.device_id, error_code=error.code.name, error=text)
        reply = {"message_type": "error", "error_code": error.code.name, "error_message": text, "error": text}
        await self._send(to_json(reply))


# ======================================================================================================================
# Page
# ======================================================================================================================

PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>AMHR-PD</title>
<link rel="icon" href="data:image/svg+xml,
  %3Csvg xmlns='http://www.w3.org/2000/svg'%3E%3Ccircle cx='8' cy='8' r='7' fill='%230a5bc8'/%3E%3C/svg%3E">
<style>
:root {
  color-scheme: light dark; font: 16px/1.4 system-ui, sans-serif; color: var(--text); background: var(--page);
  --page: light-dark(#f3f5f7, #0e1216); --card: light-dark(#fff, #181e25); --line: light-dark(#dce1e7, #2c3540);
  --text: light-dark(#161b22, #e8ecf1); --soft: light-dark(#566270, #9ba8b7); --blue: light-dark(#0a5bc8, #78b4ff);
  --good: light-dark(#0b6e38, #56cf93); --bad: light-dark(#b3221a, #ff8a7d); --odd: light-dark(#855300, #f3bd55);
}
* { box-sizing: border-box; margin: 0; padding: 0; }
[hidden] { display: none !important; }
:focus-visible { outline: 3px solid var(--blue); outline-offset: 2px; } h1:focus-visible { outline: none; }
body { padding-bottom: 9rem; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1rem; margin-bottom: .5rem; } ul { list-style: none; } a { color: var(--blue); }
small, th, dt { color: var(--soft); font-weight: normal; }
.good { color: var(--good); } .bad { color: var(--bad); } .odd { color: var(--odd); }
button, .button, input, select, textarea {
  min-height: 2.75rem; padding: .4rem .8rem; font: inherit; color: inherit; background: var(--card);
  border: 1px solid var(--line); border-radius: .6rem;
}
input, select, textarea { width: 100%; } ::placeholder { color: var(--soft); }
textarea, pre, td { font: .9rem/1.4 ui-monospace, monospace; }
button, .button { cursor: pointer; text-decoration: none; } .button { line-height: 1.8; }
button:disabled { opacity: .5; cursor: default; }
[aria-pressed=true] { border-color: var(--blue); box-shadow: inset 0 0 0 1px var(--blue); }
#stop, #send { color: #fff; font-weight: 700; }
#stop { background: #b3221a; border-color: #b3221a; } #send { background: #0a5bc8; border-color: #0a5bc8; }
header, .reach { background: var(--card); border: 0 solid var(--line); padding: .6rem 1rem; }
header {
  position: sticky; top: 0; z-index: 2; border-bottom-width: 1px;
  display: flex; flex-wrap: wrap; gap: .2rem 1rem; align-items: center;
}
header h1 { font-size: 1rem; } header a { color: inherit; text-decoration: none; }
#link { flex: 1; } #notice { flex-basis: 100%; }
.reach {
  position: fixed; inset: auto 0 0; z-index: 3; border-top-width: 1px;
  display: grid; grid-template-columns: 1fr 1fr; gap: .6rem; align-items: center;
}
.reach output { grid-column: 1 / -1; } .reach output:empty { display: none; }
.reach button { min-height: 3.5rem; font-weight: 700; }
main { max-width: 92rem; margin: auto; padding: 1rem; }
.bar { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; } .bar input { flex: 1 1 12rem; }
#fleet, #board, #plots { display: grid; gap: 1rem; grid-template-columns: minmax(0, 1fr); }
#boards { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
.card, .panel { background: var(--card); border: 1px solid var(--line); border-radius: .9rem; padding: .8rem 1rem; }
.card { position: relative; border-left: .35rem solid var(--good); }
.card { content-visibility: auto; contain-intrinsic-size: auto 12rem; min-height: 6rem; }
.card.look { border-color: var(--odd); } .card.offline { border-color: var(--bad); }
.card h2 { display: flex; gap: .6rem; justify-content: space-between; margin: 0; } .card h2 span { white-space: nowrap; }
.card a { color: inherit; } .card a::after { content: ""; position: absolute; inset: 0; } .card small { display: block; }
.card dl { margin-top: .5rem; } .card p { max-height: 4.2em; overflow: hidden; }
.card dl div { display: grid; gap: .7rem; grid-template-columns: minmax(0, 6.3rem) 1fr minmax(4.2rem, auto); }
.card dl div { align-items: center; }
.card dt { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.card dd { text-align: right; font-weight: 600; line-height: 1.8; font-variant-numeric: tabular-nums; }
.card .odd * { color: var(--odd); } .card.offline :is(dd, svg) { color: var(--soft); font-weight: normal; }
svg { display: block; width: 100%; height: 1.2rem; overflow: visible; color: var(--blue); }
path { fill: none; stroke: currentColor; stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: round; }
path { vector-effect: non-scaling-stroke; }
.grid, .cursor { stroke: var(--line); stroke-width: 1; } .cursor { stroke: var(--text); }
.plot figcaption { display: flex; flex-wrap: wrap; gap: .2rem .8rem; justify-content: space-between; }
.area { position: relative; margin: .6rem .5rem 1.4rem 3.6rem; touch-action: pan-y; } .area svg { height: 8rem; }
.area small { position: absolute; white-space: nowrap; font-size: .75rem; font-variant-numeric: tabular-nums; }
.area .y { right: calc(100% + .5rem); translate: 0 -50%; } .area .x { top: calc(100% + .3rem); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; overflow-wrap: normal; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; } pre { white-space: pre-wrap; }
form { display: grid; gap: .6rem; } label { display: grid; gap: .2rem; }
#again { display: flex; flex-wrap: wrap; gap: .4rem; margin: .8rem 0; }
#again button { max-width: 100%; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; font-size: .9rem; }
#commands li { padding: .5rem 0; border-top: 1px solid var(--line); } summary { min-height: 1.8rem; cursor: pointer; }
#command {
  position: fixed; inset: auto 0 4.7rem; z-index: 2; max-height: 75dvh; overflow: auto; display: none;
  border-radius: .9rem .9rem 0 0; box-shadow: 0 -.5rem 2rem #0005;
}
#command.open { display: block; }
@media (min-width: 60rem) {
  body { padding-bottom: 0; } #ask { display: none; }
  main { display: grid; grid-template-columns: minmax(0, 1fr) 22rem; gap: 1rem; align-items: start; }
  #plots { grid-template-columns: repeat(auto-fill, minmax(24rem, 1fr)); }
  .reach { position: static; border: 0; padding: 0; grid-template-columns: auto auto; } .reach output { grid-column: auto; }
  .reach button { min-height: 2.75rem; padding: 0 1.4rem; }
  #command { display: block; position: sticky; top: 5rem; max-height: calc(100dvh - 6rem); }
  #command { border-radius: .9rem; box-shadow: none; }
}
</style>
<header>
  <h1><a href="#">AMHR-PD</a></h1>
  <p id="link" role="status">○ connecting …</p>
  <p id="notice" role="status" class="odd" hidden></p>
  <div class="reach">
    <output id="said" role="alert"></output>
    <button id="ask" aria-expanded="false" aria-controls="command">Command …</button>
    <button id="stop" aria-label="Stop all boards">■ STOP ALL</button>
  </div>
</header>
<main>
  <section id="fleet" aria-label="Boards">
    <div class="bar">
      <div id="filters" class="bar" role="group" aria-label="Which boards to show"></div>
      <input id="find" type="search" placeholder="Find a board or a type" aria-label="Find a board or a type">
    </div>
    <ul id="boards"></ul>
    <p id="none" hidden>No board has connected yet. Boards connect to <code id="address"></code>.</p>
  </section>
  <section id="board" aria-labelledby="name" hidden>
    <div><a href="#">← all boards</a><h1 id="name" tabindex="-1"></h1><p id="facts"></p><p id="alert" class="odd"></p></div>
    <div class="bar">
      <div id="ranges" class="bar" role="group" aria-label="Range of the plots"></div>
      <a id="csv" class="button" download>Download CSV</a><button id="delete">Delete …</button>
    </div>
    <div id="plots" aria-live="off"></div>
    <div class="panel" id="others"><h2>Other readings</h2><pre id="texts"></pre></div>
    <div class="panel"><h2>Connections</h2><div class="wide"><table><thead><tr><th>When<th>What<th>Why<th>Lasted</thead>
      <tbody id="history"></tbody></table></div></div>
    <div class="panel"><h2>Metadata</h2><pre id="metadata"></pre></div>
  </section>
  <aside id="command" class="panel" aria-labelledby="title">
    <h2 id="title">Send a command</h2>
    <form id="form">
      <label>To <select id="to"></select></label>
      <label id="several" hidden>Boards, with commas between <input id="ids" autocomplete="off" spellcheck="false"></label>
      <label>Command <input id="verb" list="verbs" required maxlength="255" autocapitalize="off" autocomplete="off"
        placeholder="blink"></label><datalist id="verbs"></datalist>
      <label>Payload (JSON, may be empty) <textarea id="payload" rows="2" spellcheck="false"
        placeholder='{"count": 5}'></textarea></label>
      <button id="send">Send</button>
      <output id="answer" role="alert" class="bad"></output>
    </form>
    <div id="again" role="group" aria-label="Fill in a command sent before"></div>
    <h2>Latest commands</h2>
    <ul id="commands"></ul>
  </aside>
</main>
<script>
"use strict";
const $ = (id) => document.getElementById(id);
const SPARK_POINTS = 120, PLOT_POINTS = 1000, MAX_READINGS = 40, MAX_COMMANDS = 15, PAINT_MS = 300;
const order = new Intl.Collator(undefined, { numeric: true }).compare;
const boards = new Map(), commands = new Map();
let shown = null, filter = "all", range = "states", skewMs = 0, stream = null, isAway = true;

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
function draw(lines) {  // class -> path, in a square of 100 by 100 that is stretched
  const create = (tag, attributes) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  };
  const svg = create("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", "aria-hidden": "true" });
  svg.append(...Object.entries(lines).map(([name, d]) => create("path", { class: name, d })));
  return svg;
}

// -- times, numbers, words
const millis = (time) => Date.parse(time + "Z");
const clock = (ms, options = { timeStyle: "medium" }) => new Date(ms).toLocaleString(undefined, options);
const age = (time) => (Date.now() + skewMs - millis(time)) / 1000;
const ago = (time) => !time ? "never" : age(time) < 3 ? "now" : lasting(age(time)) + " ago";
function lasting(s) {
  const [unit, word] = s < 90 ? [1, "s"] : s < 5400 ? [60, "min"] : s < 129600 ? [3600, "h"] : [86400, "days"];
  return `${Math.max(0, Math.round(s / unit))} ${word}`;
}
const counted = (n) => `${n} board${n === 1 ? "" : "s"}`;
const write = (value) => typeof value === "number" ? String(+value.toPrecision(7))
  : typeof value === "string" ? value : JSON.stringify(value);
const alertWords = ({ alert }) => alert ? `⚠ ${alert.type}: ${alert.message} (${ago(alert.timestamp)})` : "";
function seenWords({ is_online, state_timestamp, last_heartbeat, disconnected_at }) {
  const heard = [state_timestamp, last_heartbeat].filter(Boolean).sort().at(-1);
  return is_online ? `seen ${ago(heard)}` : `last seen ${ago(disconnected_at ?? heard)}`;
}

// -- readings
function* readings(state, prefix = "") {  // an object inside gives `outer.inner`
  for (const [name, value] of Object.entries(state ?? {}).slice(0, MAX_READINGS))
    if (value && typeof value === "object" && !Array.isArray(value) && !prefix) yield* readings(value, name + ".");
    else yield [prefix + name, value];
}
function remember(trails, state, time, points) {
  for (const [name, value] of readings(state)) {
    if (typeof value !== "number" || (!trails.has(name) && trails.size >= MAX_READINGS)) continue;
    if (!trails.has(name)) trails.set(name, Object.assign([], { middle: value, spread: 0, isOdd: false }));
    const trail = trails.get(name);
    judge(trail, value);
    trail.push([millis(time), value]);
    if (trail.length > points) trail.shift();
  }
}
function judge(trail, value) {  // odd is what is far from where this reading was lately; its first values teach that
  const isLearning = trail.length < 12, share = 1 / (trail.isOdd ? 500 : Math.min(trail.length + 1, 64));
  const awayBy = Math.abs(value - trail.middle), usual = Math.max(trail.spread, Math.abs(trail.middle) / 100);
  const step = isLearning ? awayBy : Math.min(awayBy, 3 * usual || 1);
  trail.isOdd = !isLearning && usual > 0 && awayBy > Math.max(8 * usual, Math.abs(trail.middle) / 4);
  trail.middle += Math.sign(value - trail.middle) * step * share;
  trail.spread += (step - trail.spread) * share;
}
function span(points) {
  const values = points.map(([, value]) => value), low = Math.min(...values), high = Math.max(...values);
  return high > low ? [low, high] : [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
}
function trace(points, [low, high], gapMs = Infinity) {
  const from = points[0][0], lengthMs = points.at(-1)[0] - from || 1;
  return points.map(([ms, value], index) => {
    const x = (ms - from) / lengthMs * 100, y = (high - value) / (high - low) * 100;
    const isStart = index === 0 || ms - points[index - 1][0] > gapMs;
    return `${isStart ? "M" : "L"}${x.toFixed(2)} ${y.toFixed(2)}${isStart ? "h0" : ""}`;
  }).join("");
}

// -- the gateway
async function ask(path, options) {
  const answer = await fetch(path, { signal: AbortSignal.timeout(15000), ...options }), content = await answer.json();
  if (answer.status === 401 && !$("notice").querySelector("button")) {  // opened again, the browser asks for the token
    const again = make("button", { onclick: () => location.reload() }, "Enter the token");
    $("notice").replaceChildren("The gateway wants another token. ", again);
    $("notice").hidden = false;
  }
  if (content.error) throw new Error(content.error);
  return content;
}
function follow() {
  stream?.close();
  stream = new EventSource("events");
  stream.addEventListener("open", () => { isAway = false; paintAll(); });
  stream.addEventListener("open", load, { once: true });
  stream.addEventListener("reset", load);
  stream.addEventListener("error", () => {
    isAway = true;
    paintAll();
    if (stream.readyState !== EventSource.CLOSED) return;  // then it tries again by itself
    setTimeout(follow, 2000);
    ask("devices?device_type=-").catch(() => {});  // says why
  });
  for (const [name, act] of Object.entries({ device: onDevice, state: onState, command: onCommand, alert: onAlert }))
    stream.addEventListener(name, ({ data }) => held ? held.push([act, JSON.parse(data)]) : act(JSON.parse(data)));
}
let held = null;  // what happens while the boards are read, for afterwards
async function load() {
  const mine = held = [];
  try {
    const soon = { signal: AbortSignal.timeout(3000) };  // the boards come from memory; a disk must not keep them back
    const [{ devices }, { logs }] = await Promise.all([
      ask("devices"), ask(`command-logs?limit=${MAX_COMMANDS}`, soon).catch(() => ({ logs: [] }))]);
    if (mine !== held) return;
    held = null;
    const known = new Set(devices.map(({ device_id }) => device_id));
    [...boards.keys()].filter((id) => !known.has(id)).forEach(forget);
    devices.sort((a, b) => order(a.device_id, b.device_id)).forEach(onDevice);
    logs.reverse().forEach(onCommand);
    const isKnown = ([act, { device_id, timestamp }]) =>  // what is told meanwhile may be in what was read already
      act === onState && boards.get(device_id)?.device.state_timestamp >= timestamp;
    mine.forEach((one) => isKnown(one) || one[0](one[1]));
    watcher.disconnect();  // observed anew, those in view are filled anew
    for (const board of boards.values()) { board.isFilled = false; watcher.observe(board.card); }
    if (shown) loadPlots();
    route();
  } catch { if (mine === held) setTimeout(load, 2000); }
}
async function look() {
  try {
    const { status, database, notice, timestamp } = await ask("health");
    if (!timestamp) return;  // without the token it says no more than the status
    skewMs = millis(timestamp) - Date.now();
    say($("notice"), [status === "ok" ? "" : `The gateway is degraded: ${database}.`, notice ?? ""].join(" ").trim());
    $("notice").hidden = !$("notice").textContent;
  } catch { /* the stream tells that it is away */ }
}

// -- what happens
function onDevice(device) {
  const id = device.device_id, board = boards.get(id) ?? { id, trails: new Map(), isSeen: false, isFilled: false };
  if (device.deleted) return forget(id);
  if (!boards.has(id)) addCard(board);
  board.device = device;
  if (board === shown) loadHistory();
  dirty.add(board);
  paintAll();
}
function onState({ device_id, state, timestamp }) {
  const board = boards.get(device_id);
  if (!board || board.device.state_timestamp === timestamp) return;
  Object.assign(board.device, { state, state_timestamp: timestamp });
  remember(board.trails, state, timestamp, SPARK_POINTS);
  if (board === shown && board.series) remember(board.series, state, timestamp, PLOT_POINTS);
  dirty.add(board);
  paintLater();
}
function onAlert({ device_id, ...alert }) {
  const board = boards.get(device_id);
  if (!board) return;
  board.device.alert = alert;
  dirty.add(board);
  paintAll();
}
function forget(id) {
  const board = boards.get(id);
  if (!board) return;
  boards.delete(id);
  dirty.delete(board);
  watcher.unobserve(board.card);
  board.card.remove();
  if (board === shown) location.hash = "";
  paintAll();
}

// -- painting: a few times a second, and only what is in view
const dirty = new Set(), toFill = [];
let timer = 0, filling = 0, isFleetNew = true;
function paintLater() { timer ||= setTimeout(() => requestAnimationFrame(paint), PAINT_MS); }
function paintAll() { isFleetNew = true; paintLater(); }
function paint() {
  timer = 0;
  for (const board of dirty) if (board.isSeen) { dirty.delete(board); paintCard(board); }
  if (isFleetNew) paintFleet();
  if (shown) paintBoard(shown);
  for (const command of commands.values()) if (command.isNew) paintCommand(command);
}
const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const board = boards.get(target.dataset.id);
    if (!board) continue;
    board.isSeen = isIntersecting;
    if (isIntersecting) { dirty.add(board); toFill.push(board); }
  }
  paintLater();
  fill();
}, { rootMargin: "200px" });
async function fill() {  // sparklines begin with what the history has
  while (filling < 3 && toFill.length) {
    const board = toFill.pop();
    if (!board.isSeen || board.isFilled) continue;
    board.isFilled = true;
    filling += 1;
    try {
      const { states } = await ask(`state-history/${board.id}?limit=${SPARK_POINTS}`);
      board.trails.clear();
      for (const { state_data, timestamp } of states.reverse()) remember(board.trails, state_data, timestamp, SPARK_POINTS);
      dirty.add(board);
      paintAll();
    } catch { board.isFilled = false; }
    filling -= 1;
  }
}
function addCard(board) {
  board.word = make("span");
  board.body = make("div");
  board.card = make("li", {}, make("h2", {}, make("a", { href: "#" + board.id }, board.id), board.word), board.body);
  board.card.dataset.id = board.id;
  const isAfter = (card) => order(card.dataset.id, board.id) > 0, last = $("boards").lastElementChild;
  $("boards").insertBefore(board.card, last && isAfter(last) ? [...$("boards").children].find(isAfter) : null);
  boards.set(board.id, board);
  watcher.observe(board.card);
}
const isOffline = ({ device }) => !device.is_online;
const isOdd = ({ device, trails }) => device.alert && age(device.alert.timestamp) < 3600
  || [...trails.values()].some((trail) => trail.isOdd);
function paintCard(board) {
  const { device, trails, card, word, body } = board, all = [...readings(device.state)];
  const rows = all.slice(0, 6).map(([name, value]) => {
    const trail = trails.get(name), [className, mark, title] = trail?.isOdd ? ["odd", "⚠ ", "unusual"] : ["", "", ""];
    return make("div", { className, title }, make("dt", { title: name }, name),
      draw(trail ? { spark: trace(trail, span(trail)) } : {}), make("dd", {}, mark + write(value).slice(0, 60)));
  });
  card.className = `card ${isOffline(board) ? "offline" : isOdd(board) ? "look" : ""}`;
  say(word, ...stateWords(device));
  body.replaceChildren(make("small", {}, `${device.device_type} · ${seenWords(device)}`),
    make("p", { className: "odd" }, alertWords(device)), make("dl", {}, ...rows),
    make("small", {}, all.length > 6 ? `and ${all.length - 6} more` : ""));
}
const stateWords = ({ is_online }) => is_online ? ["● online", "good"] : ["■ offline", "bad"];
const FILTERS = { all: ["All", () => true, ""], offline: ["■ Offline", isOffline, "bad"], look: ["⚠ Look at", isOdd, "odd"] };
function paintFleet() {
  isFleetNew = false;
  const all = [...boards.values()], offline = all.filter(isOffline).length, sought = $("find").value.trim().toLowerCase();
  for (const button of $("filters").children) {
    const [word, fits, className] = FILTERS[button.value], count = all.filter(fits).length;
    say(button, `${word} ${count}`, count ? className : "");
    button.ariaPressed = String(filter === button.value);
  }
  for (const board of all)
    board.card.hidden = !FILTERS[filter][1](board) || !`${board.id} ${board.device.device_type}`.toLowerCase().includes(sought);
  $("none").hidden = all.length > 0 || isAway;
  const live = `● live · ${all.length - offline} of ${counted(all.length)} online`;
  say($("link"), ...isAway ? ["■ The gateway doesn't answer. Trying again …", "bad"] : [live, "good"]);
  document.title = (isAway ? "away · " : offline ? `${offline} offline · ` : "") + "AMHR-PD";
  paintTargets(all);
}

// -- one board in depth
function route() {
  const board = boards.get(location.hash.slice(1)) ?? null;
  if (board === shown) return;
  shown = board;
  $("fleet").hidden = Boolean(board);
  $("board").hidden = !board;
  $("plots").replaceChildren();
  if (!board) return;
  Object.assign(board, { plots: new Map(), series: null });
  say($("name"), board.id);
  $("name").focus();
  scrollTo(0, 0);
  $("csv").href = `state-history/${board.id}?format=csv&limit=100000`;
  $("to").value = "id " + board.id;
  $("to").onchange();
  loadPlots();
  loadHistory();
  paintLater();
}
const RANGES = { states: ["1,000 states", 0], hour: ["An hour", 3600e3], day: ["A day", 86400e3] };
async function readSeries(board, lengthMs, parts) {  // the newest states, or as many of each part of a time until now
  const series = new Map(), begin = Date.now() + skewMs - lengthMs, limit = PLOT_POINTS / parts;
  const iso = (part) => new Date(begin + part * lengthMs / parts).toISOString();
  let count = 0, newest = "";
  for (let part = 0; part < parts; part += 1) {
    const time = lengthMs ? `&since=${iso(part)}&until=${iso(part + 1)}` : "";
    const { states } = await ask(`state-history/${board.id}?limit=${limit}${time}`);
    for (const { state_data, timestamp } of states.reverse()) remember(series, state_data, newest = timestamp, PLOT_POINTS);
    count += states.length;
  }
  const { state, state_timestamp } = board.device;
  if (state_timestamp > newest) remember(series, state, state_timestamp, PLOT_POINTS);  // it came meanwhile
  return [series, count];
}
async function loadPlots() {
  const board = shown, mine = board.loading = {}, lengthMs = RANGES[range][1];
  try {
    let [series, count] = await readSeries(board, lengthMs, 1);
    if (lengthMs && count >= PLOT_POINTS) [series] = await readSeries(board, lengthMs, 50);  // too many to draw them all
    if (board.loading === mine) board.series = series;
    paintLater();
  } catch (error) { say($("said"), `The readings of ${board.id} can't be read: ${error.message}`, "bad"); }
}
async function loadHistory() {
  const board = shown, cell = (text, className = "") => make("td", { className }, text);
  const { events } = await ask(`device-connection-history/${board.id}?limit=30`).catch(() => ({ events: [] }));
  if (board === shown) $("history").replaceChildren(...events.map(({ event, timestamp, details }) => make("tr", {},
    cell(clock(millis(timestamp), { dateStyle: "short", timeStyle: "medium" })),
    cell(event, event === "connected" ? "good" : "bad"), cell(String(details?.reason ?? details?.peer ?? "")),
    cell(details?.seconds_connected === undefined ? "" : lasting(details.seconds_connected)))));
}
function paintBoard({ device, plots, series }) {
  const [word, className] = stateWords(device), texts = [...readings(device.state)].filter(([name]) => !series?.has(name));
  $("facts").replaceChildren(make("span", { className }, word), ` · ${device.device_type} · ${seenWords(device)}`,
    device.is_online ? ` · connected ${ago(device.connected_at)}` : "",
    device.deadman_at ? ` · deadman due ${clock(millis(device.deadman_at))}` : "");
  say($("alert"), alertWords(device));
  $("delete").disabled = device.is_online;
  $("delete").title = device.is_online ? "Only a board that is offline can be deleted" : "";
  say($("texts"), texts.map(([name, value]) => `${name}: ${write(value)}`).join("\n"));
  $("others").hidden = !texts.length;
  say($("metadata"), JSON.stringify(device.metadata, null, 2));
  for (const [name, points] of series ?? []) {
    if (!plots.has(name)) plots.set(name, makePlot(name));
    paintPlot(Object.assign(plots.get(name), { points }));
  }
  for (const [name, { figure }] of plots) if (!series?.has(name)) { plots.delete(name); figure.remove(); }
}
function makePlot(name) {  // `at` is the point that is read; null is the latest
  const value = make("output"), area = make("div", { className: "area", tabIndex: 0, role: "slider", ariaLabel: name });
  const figure = make("figure", { className: "plot panel" }, make("figcaption", {}, make("strong", {}, name), value), area);
  const plot = { figure, area, value, points: [], at: null };
  const read = (at) => { plot.at = at; paintPlot(plot); };
  area.onpointermove = area.onpointerdown = ({ clientX }) => {
    const { left, width } = area.getBoundingClientRect(), { points } = plot, from = points[0][0];
    const ms = from + (clientX - left) / width * (points.at(-1)[0] - from);
    read(points.reduce((best, [at], index) => Math.abs(at - ms) < Math.abs(points[best][0] - ms) ? index : best, 0));
  };
  area.onpointerleave = area.onblur = () => read(null);
  area.onkeydown = ({ key }) => {
    const last = plot.points.length - 1, step = { ArrowLeft: -1, ArrowRight: 1, Home: -last, End: last }[key];
    if (step) read(Math.max(0, Math.min(last, (plot.at ?? last) + step)));
  };
  $("plots").append(figure);
  return plot;
}
function paintPlot({ area, value, points, at }) {
  const [from, to] = [points[0][0], points.at(-1)[0]], [ms, number] = points[at ?? -1] ?? points.at(-1);
  const marks = ticks(...span(points)), low = marks[0], high = marks.at(-1), y = (mark) => (high - mark) / (high - low) * 100;
  const gaps = points.slice(1).map(([ms], index) => ms - points[index][0]).sort((a, b) => a - b);
  const line = trace(points, [low, high], Math.max(10000, 8 * gaps[gaps.length >> 1]));  // broken where the board was away
  const cursor = at === null ? "" : `M${(ms - from) / (to - from || 1) * 100} 0V100`;
  const label = (className, text, side, part) => {
    const node = make("small", { className }, text);
    node.style[side] = part + "%";
    if (side === "left") node.style.translate = `-${part}%`;
    return node;
  };
  const options = to - from > 86400e3 ? { dateStyle: "short" } : { timeStyle: to - from > 300e3 ? "short" : "medium" };
  area.replaceChildren(draw({ grid: marks.map((mark) => `M0 ${y(mark)}H100`).join(""), line, cursor }),
    ...marks.map((mark) => label("y", write(mark), "top", y(mark))),
    ...[0, 50, 100].map((part) => label("x", clock(from + (to - from) * part / 100, options), "left", part)));
  say(value, at === null ? write(number) : `${write(number)} at ${clock(ms)}`);
  Object.assign(area, { ariaValueNow: number, ariaValueMin: low, ariaValueMax: high, ariaValueText: value.textContent });
}
function ticks(low, high) {  // about four round numbers that hold all
  const rough = (high - low) / 3, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((part) => part * power).find((part) => part >= rough);
  const first = Math.floor(low / step), last = Math.ceil(high / step);
  return Array.from({ length: last - first + 1 }, (_, index) => (first + index) * step);
}

// -- commands
function paintTargets(all) {
  const online = all.filter((board) => !isOffline(board)).map(({ device }) => device.device_type);
  const types = [...new Set(all.map(({ device }) => device.device_type))].sort(order);
  const options = [["*", `all boards (${online.length} online)`],
    ...types.map((type) => ["type " + type, `every ${type} (${online.filter((other) => other === type).length} online)`]),
    ["several", "several boards …"], ...all.map(({ id }) => id).sort(order).map((id) => ["id " + id, id])];
  const before = $("to").value, texts = [...$("to").options].map(({ text }) => text);
  if (options.map(([, text]) => text).join() === texts.join() || document.activeElement === $("to")) return;
  $("to").replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
  $("to").value = shown && !before ? "id " + shown.id : options.some(([value]) => value === before) ? before : "*";
  $("to").onchange();
}
$("to").onchange = () => { $("several").hidden = $("to").value !== "several"; };
const targetWords = ({ to, ids }) =>
  to === "*" ? "all boards" : to === "several" ? ids : to.replace(/^type /, "every ").replace(/^id /, "");
function remembered() {
  try { return JSON.parse(localStorage.getItem("commands")) ?? []; } catch { return []; }
}
function paintRemembered() {
  const latest = remembered(), known = [...commands.values()].map(({ row }) => row.command_name);
  const verbs = new Set([...latest.map(({ verb }) => verb), ...known]);
  $("verbs").replaceChildren(...[...verbs].map((value) => make("option", { value })));
  $("again").replaceChildren(...latest.map((entry) => make("button", { onclick: () => {
    for (const [id, text] of Object.entries(entry)) $(id).value = text;
    if (!$("to").value) $("to").value = "*";
    $("to").onchange();
  } }, `${entry.verb} ${entry.payload} → ${targetWords(entry)}`)));
}
async function send(target, command_name, payload, to) {
  const body = JSON.stringify({ ...target, command_name, payload });
  const headers = { "Content-Type": "application/json" }, signal = AbortSignal.timeout(5000);
  const row = await ask("command", { method: "POST", headers, body, signal });
  if (!commands.has(row.command_id)) onCommand(row);
  Object.assign(commands.get(row.command_id), { to, isNew: true });
  paintLater();
  return row;
}
$("form").onsubmit = async (event) => {
  event.preventDefault();
  const entry = Object.fromEntries(["to", "ids", "verb", "payload"].map((id) => [id, $(id).value.trim()]));
  const ids = entry.ids.split(",").map((id) => id.trim()), one = entry.to.replace(/^(type|id) /, "");
  const target = entry.to === "several" ? { device_id: ids }
    : entry.to.startsWith("id ") ? { device_id: one } : { device_type: one };
  try {
    const row = await send(target, entry.verb, JSON.parse(entry.payload || "{}"), targetWords(entry));
    say($("answer"), row.detail ?? "");
    const others = remembered().filter((other) => JSON.stringify(other) !== JSON.stringify(entry));
    try { localStorage.setItem("commands", JSON.stringify([entry, ...others].slice(0, 6))); } catch { /* it keeps nothing */ }
    paintRemembered();
  } catch (error) {
    say($("answer"), error instanceof SyntaxError ? `The payload is no JSON: ${error.message}` : `Not sent: ${error.message}`);
  }
};
let stop = null;  // the id of the latest
$("stop").onclick = async () => {
  say($("said"), "Stopping …", "");
  for (let left = 3; left; left -= 1)
    try {
      stop = (await send({ device_type: "*" }, "stop", {}, "all boards")).command_id;
      return;
    } catch (error) {
      say($("said"), `STOP WAS NOT SENT: ${error.message}`, "bad");
      await new Promise((done) => setTimeout(done, 700));
    }
};
function onCommand(row) {
  const command = commands.get(row.command_id) ?? {};
  commands.set(row.command_id, Object.assign(command, { row: { ...command.row, ...row }, isNew: true }));
  if (commands.size > MAX_COMMANDS) {
    const [oldest] = commands.keys();
    commands.get(oldest).item?.remove();
    commands.delete(oldest);
  }
  paintLater();
}
function outcome({ status, target_device_count: targets, success_count: good, response_data }) {
  const answered = Object.keys(response_data ?? {}).length;
  switch (status) {
    case "ack_success": return [`✓ ${counted(targets)} answered success`, "good"];
    case "ack_error": return [`✗ ${counted(answered - good)} failed, ${good} of ${targets} succeeded`, "bad"];
    case "ack_timeout": return [`✗ no answer from ${targets - answered} of ${counted(targets)}`, "bad"];
    case "no_devices": return ["✗ no board was online for it", "bad"];
    default: return [`… sent, ${answered} of ${counted(targets)} answered`, ""];
  }
}
function paintCommand(command) {
  const { row, to } = command, [words, className] = outcome(row), time = clock(millis(row.created_at));
  command.isNew = false;
  if (!command.item) {
    command.parts = [make("strong"), make("p"), make("summary"), make("pre")];
    const [name, state, ...details] = command.parts;
    command.item = make("li", {}, name, state, make("details", {}, ...details));
    $("commands").prepend(command.item);
    paintRemembered();
  }
  const [name, state, summary, answers] = command.parts, lines = Object.entries(row.response_data ?? {}).slice(0, 200)
    .map(([id, answer]) => `${id}: ${answer?.status} ${answer?.payload ? JSON.stringify(answer.payload) : ""}`);
  say(name, `${row.command_name} → ${to ?? row.device_type.replace(/^\*$/, "all boards")}`);
  say(state, words, className);
  say(summary, `${time} · details`);
  say(answers, [`payload ${JSON.stringify(row.payload)}`, ...lines].join("\n"));
  if (row.command_id === stop) say($("said"), `Stop, ${time}: ${words}`, className);
}

// -- begin
function addButtons(id, choices, choose) {
  for (const [value, [word]] of Object.entries(choices))
    $(id).append(make("button", { value, onclick: () => choose(value) }, word));
}
function chooseRange(value) {
  range = value;
  for (const button of $("ranges").children) button.ariaPressed = String(button.value === value);
  if (shown) loadPlots();
}
addButtons("filters", FILTERS, (value) => { filter = value; paintAll(); });
addButtons("ranges", RANGES, chooseRange);
chooseRange(range);
$("find").oninput = paintAll;
$("ask").onclick = () => {
  const isOpen = $("command").classList.toggle("open");
  $("ask").ariaExpanded = String(isOpen);
  say($("ask"), isOpen ? "Close" : "Command …");
  if (isOpen) $("verb").focus();
};
$("command").onkeydown = ({ key }) => { if (key === "Escape" && $("command").classList.contains("open")) $("ask").click(); };
$("delete").onclick = async () => {
  if (!confirm(`Forget ${shown.id}, with its readings and its connection history?`)) return;
  await ask(`devices/${shown.id}`, { method: "DELETE" }).catch((error) => say($("said"), error.message, "bad"));
};
$("address").textContent = `${location.protocol.replace("http", "ws")}//${location.host}/ws/its_id`;
addEventListener("hashchange", route);
addEventListener("online", follow);
let awakeMs = Date.now();
setInterval(() => {
  if (Date.now() - awakeMs > 30000) follow();  // the machine slept: the stream may be dead without knowing
  awakeMs = Date.now();
  boards.forEach((board) => dirty.add(board));  // they say how long ago things were
  paintAll();
}, 5000);
setInterval(look, 10000);
look();
paintRemembered();
follow();
</script>
"""
"""What `GET /` answers (contract, section 8): looks, words and behaviour, in this order. It asks the routes below."""


def page_headers(page: str) -> dict[str, str]:
    """What a browser is told to allow the page: its own style and script, its own origin, nobody's frame."""
    hashes = {}
    for tag in ("style", "script"):
        content = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        hashes[tag] = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    own = "".join(f"; {tag}-src 'sha256-{digest}'" for tag, digest in hashes.items())
    return {
        "Content-Security-Policy": f"default-src 'none'{own}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


# ======================================================================================================================
# REST
# ======================================================================================================================

MAX_BODY_BYTES = 128 << 10  # a command's 1,000 longest ids, its payload and its deadman's
MAX_LINE_BYTES = 64 << 10  # a payload as long as a board takes, every byte of it escaped in the query
MAX_HEADER_BYTES = 8190
BODY_TIMEOUT_S = 10.0
UNREAD_TIMEOUT_S = 30.0  # for a peer that takes nothing of what waits for it, which would stay in memory for ever

# -- what callers ask --------------------------------------------------------------------------------------------------


class NoQuery(msgspec.Struct, forbid_unknown_fields=True):
    """No parameters."""


class DevicesQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`GET /devices`."""

    device_type: str | None = None
    online: Literal["true", "false"] | None = None


class CommandQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`POST /command`; `decode_command` looks at the values, with those of the body."""

    device_type: str | None = None
    device_id: str | None = None
    command_name: str | None = None
    payload: str | None = None
    timeout: str | None = None
    wait: str | None = None


DeviceIdsText = Annotated[
    str,
    msgspec.Meta(
        pattern=rf"\A{DEVICE_ID_PATTERN}(,{DEVICE_ID_PATTERN})*\Z", title="one device_id or several, with commas between"
    ),
]
EventNames = Annotated[
    str,
    msgspec.Meta(
        pattern=r"\A(device|state|command|alert)(,(device|state|command|alert))*\Z",
        title="device, state, command or alert, or several of them with commas between",
    ),
]


class ListenQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`GET /events`."""

    device_id: DeviceIdsText | None = None
    event: EventNames | None = None
    device_type: str | None = None


MAX_ROWS = {"json": 1000, "csv": 100_000}  # contract, section 6
Limit = Annotated[
    int,
    msgspec.Meta(
        ge=1,
        title=f"a whole number from 1 to {MAX_ROWS['json']}, or with format=csv to {MAX_ROWS['csv']}",
        extra_json_schema={"maximum": MAX_ROWS["json"]},  # a schema can't say the rest
    ),
]
RowId = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]


class HistoryQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What every history takes."""

    table: ClassVar[TableName]
    rows_name: ClassVar[str]  # in the answer
    key: ClassVar[str] = "id"  # what `before_id` names

    limit: Limit = 100
    since: Annotated[Moment | None, msgspec.Meta(description="this time and later; UTC where no zone is given")] = None
    until: Annotated[Moment | None, msgspec.Meta(description="this time and earlier")] = None
    before_id: Any = None
    format: Literal["json", "csv"] = "json"

    def __post_init__(self) -> None:
        """Raise GatewayError for more rows than the format may have."""
        if self.limit > MAX_ROWS[self.format]:
            raise GatewayError(Code.INVALID_FIELD_VALUE, wrong_value("limit", self.limit, Limit))

    def filters(self, last: Row | None = None) -> dict[str, Any]:
        """The rows that are wanted, after `last` where that is known, in the words of Store's `history`."""
        before = self.before_id if last is None else last[self.key]
        return {"since": stored_time(self.since), "until": stored_time(self.until), "before": before}


BEFORE = msgspec.Meta(description="only rows before the one with this id: the last one of an answer, to go on behind it")


class StateHistoryQuery(HistoryQuery, kw_only=True):
    """`GET /state-history/{device_id}`."""

    table: ClassVar[TableName] = "device_state_snapshots"
    rows_name = "states"

    before_id: Annotated[RowId | None, BEFORE] = None


class ConnectionHistoryQuery(HistoryQuery, kw_only=True):
    """`GET /device-connection-history/{device_id}`."""

    table: ClassVar[TableName] = "device_connection_logs"
    rows_name = "events"

    before_id: Annotated[RowId | None, BEFORE] = None
    event: Literal["connected", "disconnected", "timeout"] | None = None

    def filters(self, last: Row | None = None) -> dict[str, Any]:
        """See HistoryQuery."""
        return super().filters(last) | ({"event": self.event} if self.event else {})


class CommandLogsQuery(HistoryQuery, kw_only=True):
    """`GET /command-logs`."""

    table: ClassVar[TableName] = "command_logs"
    rows_name = "logs"
    key = "command_id"

    before_id: Annotated[Annotated[str, msgspec.Meta(min_length=1, max_length=255)] | None, BEFORE] = None
    status: Literal["created", "sent", "ack_success", "ack_error", "ack_timeout", "no_devices"] | None = None
    device_type: str | None = None

    def filters(self, last: Row | None = None) -> dict[str, Any]:
        """See HistoryQuery."""
        equal = {"status": self.status, "device_type": self.device_type}
        return super().filters(last) | {name: value for name, value in equal.items() if value is not None}


def parse_query(request: web.Request, kind: type[AnyStruct]) -> AnyStruct:
    """The query's parameters. Raises GatewayError for one that the route doesn't have, that is given twice or can't be."""
    kinds = field_types(kind)
    values: dict[str, Any] = {}
    for name, text in request.query.items():
        if name in values:
            raise GatewayError(Code.INVALID_FIELD_VALUE, f"query parameter {name[:64]!r} is given more than once")
        values[name] = from_text(text, kinds.get(name, str))
    try:
        return convert_fields(values, kind)
    except GatewayError as error:
        raise GatewayError(Code.INVALID_FIELD_VALUE, f"in the query: {error}") from None


async def read_body(request: web.Request) -> bytes:
    """The body, whatever its content type says it is.

    Raises UNSUPPORTED_MEDIA_TYPE, INVALID_MESSAGE, REQUEST_TIMEOUT, and HTTPRequestEntityTooLarge.
    """
    encoding = request.headers.get("Content-Encoding", "identity").lower()
    if encoding != "identity":
        raise GatewayError(Code.UNSUPPORTED_MEDIA_TYPE, f"Content-Encoding {encoding[:64]!r}: send the body uncompressed")
    if (request.charset or "utf-8").lower() not in ("utf-8", "utf8", "us-ascii"):
        raise GatewayError(Code.UNSUPPORTED_MEDIA_TYPE, "charset: JSON is UTF-8")
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await request.read()
    except TimeoutError:
        raise GatewayError(Code.REQUEST_TIMEOUT, f"the body didn't arrive within {BODY_TIMEOUT_S:g} s") from None
    except (ConnectionError, aiohttp.ClientError, HttpProcessingError) as error:
        error.__traceback__ = None  # the reader keeps it, and it would keep what was read
        raise GatewayError(Code.INVALID_MESSAGE, f"the body ended early or is broken: {type(error).__name__}") from None


# -- what they get -----------------------------------------------------------------------------------------------------

STREAM_BYTES = 16 << 10  # of an answer that is made as it is taken; about a millisecond of encoding
CSV_PAGE_ROWS = 1000  # contract, section 6: as many are in memory at a time
MAX_STATE_COLUMNS = 1000  # boards may use as many keys as they like; more are in `other`


def json_response(content: object, status: int = 200) -> web.Response:
    """JSON, with a line end for those who read it in a shell."""
    return web.Response(body=json_encoder.encode(content) + b"\n", status=status, content_type="application/json")


async def stream(request: web.Request, response: web.StreamResponse, parts: AsyncIterable[bytes]) -> web.StreamResponse:
    """Give an answer of any length, STREAM_BYTES at a time, as it is made and taken; others have their turn between.

    An empty part means that what there is goes out now.
    """
    assert isinstance(request.protocol, HttpConnection)
    if request.method == "HEAD":
        return response
    waiting = bytearray()
    async for part in parts:
        waiting += part
        if part and len(waiting) < STREAM_BYTES:
            continue
        if request.transport is None:
            raise ConnectionError("the caller went away")
        if not response.prepared:
            await response.prepare(request)
        request.protocol.held.note(len(waiting))
        await response.write(bytes(waiting))
        waiting.clear()
        await asyncio.sleep(0)
    if not response.prepared:
        response.content_length = len(waiting)
        await response.prepare(request)
    await response.write_eof(bytes(waiting))
    return response


async def device_list(devices: Sequence[Device]) -> AsyncIterator[bytes]:
    """What `GET /devices` answers, in parts."""
    yield b'{"total":%d,"devices":[' % len(devices)
    for number, device in enumerate(devices):
        yield (b"," if number else b"") + json_encoder.encode(device.record())
    yield b"]}\n"


ReadRows = Callable[..., Awaitable[list[Row]]]
"""What gives up to `limit` rows that match filters, newest first."""


async def json_history(query: HistoryQuery, read: ReadRows, about: Row) -> Row:
    """The rows that a query wants, and what they are `about`.

    One that ended early, at MAX_ANSWER_BYTES, says with what `before_id` the next one goes on.
    """
    rows = await read(query.limit, **query.filters())
    encoded = json_encoder.encode(rows)
    is_cut = len(rows) < query.limit and len(encoded) > Database.MAX_ANSWER_BYTES
    goes_on = {"before_id": rows[-1][query.key]} if is_cut else {}
    return {**about, "total": len(rows), query.rows_name: msgspec.Raw(encoded), **goes_on}


async def csv_history(query: HistoryQuery, read: ReadRows) -> AsyncIterator[bytes]:
    """The rows that a query wants as CSV, in parts, written out as they are read."""
    keys: dict[str, None] = {}
    left, last = CSV_PAGE_ROWS, None
    is_of_states = query.table == "device_state_snapshots"
    while is_of_states and left and len(keys) <= MAX_STATE_COLUMNS + 2 and (rows := await read(left, **query.filters(last))):
        keys |= dict.fromkeys(key for row in rows for key in state_of(row))
        left, last = left - len(rows), rows[-1]
    sheet = StateSheet(keys) if is_of_states else Sheet(query.table)
    left, rows = query.limit, await read(min(query.limit, CSV_PAGE_ROWS), **query.filters())
    yield csv_line(sheet.header)
    while rows:
        for row in rows:
            yield csv_line(sheet.cells(row))
        yield b""
        left -= len(rows)
        last, rows = rows[-1], []  # one page in memory at a time
        rows = await read(min(left, CSV_PAGE_ROWS), **query.filters(last)) if left else []


def csv_line(values: Iterable[Any]) -> bytes:
    """Values as a line of CSV."""
    text = io.StringIO(newline="")
    csv.writer(text).writerow(map(csv_cell, values))
    return text.getvalue().encode()


_FORMULA_MARKS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # the last are full-width
_NUMBER = re.compile(r"[+-]?[0-9]*\.?[0-9]+([eE][+-]?[0-9]+)?")


def csv_cell(value: Any) -> str:
    """A value as a cell: text that a spreadsheet would take for a formula gets a `'` in front, null is empty, the rest JSON."""
    if isinstance(value, str):
        return "'" + value if value.startswith(_FORMULA_MARKS) and not _NUMBER.fullmatch(value) else value
    return "" if value is None else to_json(value)


class Sheet:
    """Rows of a history as they are: a column each."""

    def __init__(self, table: TableName) -> None:
        self.header = list(COLUMNS[table])

    def cells(self, row: Row) -> list[Any]:
        """A row's values in the header's order."""
        return [row[name] for name in self.header]


class StateSheet(Sheet):
    """States: a column for each of these top-level keys, and what a state has besides as JSON in `other`."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = [key for key in keys if key not in ("timestamp", "other")][:MAX_STATE_COLUMNS]
        self.header = ["timestamp", *self._keys, "other"]

    def cells(self, row: Row) -> list[Any]:
        """See Sheet."""
        state = state_of(row)
        known = [state.pop(key, None) for key in self._keys]
        return [row["timestamp"], *known, state or None]


def state_of(snapshot: Row) -> dict[str, Any]:
    """The state that a row has."""
    state = json_decoder.decode(snapshot["state_data"] or b"null")
    return state if isinstance(state, dict) else {"other": state}  # the earlier backend left there what it liked


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def error_of(request: web.BaseRequest, problem: BaseException | None) -> GatewayError:
    """The gateway's own error for one that a handler, the router or the HTTP library raised."""
    match problem:
        case GatewayError():
            return problem
        case ConnectionError():
            return GatewayError(Code.INVALID_MESSAGE, "the caller went away")
        case LineTooLong():
            text = f"the request line is over {MAX_LINE_BYTES} bytes, or a header over {MAX_HEADER_BYTES}"
            return GatewayError(Code.PAYLOAD_TOO_LARGE, text)
        case HttpProcessingError():
            text = problem.message.strip().partition("\n")[0][:100].rstrip(":")
            hint = ". What isn't ASCII is written with % there: ü as %C3%BC (curl -G --data-urlencode does it)"
            return GatewayError(Code.INVALID_MESSAGE, f"not valid HTTP: {text}{hint if 'url' in text else ''}")
        case web.HTTPNotFound():
            return GatewayError(Code.NOT_FOUND, f"no such route: {request.path[:100]}")
        case web.HTTPMethodNotAllowed():
            return GatewayError(Code.METHOD_NOT_ALLOWED, f"{request.method} is not possible on {request.path[:100]}")
        case web.HTTPRequestEntityTooLarge():
            return GatewayError(Code.PAYLOAD_TOO_LARGE, f"the body is larger than {MAX_BODY_BYTES} bytes")
        case web.HTTPException():
            return GatewayError(Code.INVALID_FIELD_VALUE, problem.text or problem.reason)
        case _:
            log.error("request_failed", method=request.method, path=request.path, exc_info=problem)
            return GatewayError(Code.INTERNAL_ERROR, "internal error; the gateway's log says more")


def error_response(request: web.BaseRequest, error: GatewayError) -> web.Response:
    """The one shape that every error has (contract, section 6). Where an answer is under way, that is cut off instead."""
    if request.writer.output_size > 0:
        if request.transport is not None and not request.transport.is_closing():  # the caller must see that this isn't all
            log.warning("answer_cut_off", peer=peer_of(request), path=request.path, error=str(error))
            request.transport.abort()
        raise ConnectionError("the answer was under way")
    return json_response({"error": str(error), "error_code": error.code.name}, error.status)


# -- connections -------------------------------------------------------------------------------------------------------


class Held:
    """What all connections together hold: of requests and messages that aren't whole yet, and of answers that nobody takes.

    Over the limit those that hold most are let go; a board or a caller that gets on holds next to nothing.
    """

    LIMIT_BYTES = 8 << 20  # headers take two and a half times as much once they are parsed
    LOOK_BYTES = 2 << 20  # of traffic between two looks, which take a millisecond with 4,000 connections

    def __init__(self, server: web.Server) -> None:
        self._server = server
        self._unseen_bytes = 0

    def note(self, size_bytes: int) -> None:
        """So much came in, or is about to go out."""
        self._unseen_bytes += size_bytes
        if self._unseen_bytes < self.LOOK_BYTES:
            return
        self._unseen_bytes = 0
        connections = [connection for connection in self._server.connections if isinstance(connection, HttpConnection)]
        held_bytes = sum(connection.held_bytes for connection in connections)
        if held_bytes <= self.LIMIT_BYTES:
            return
        for connection in sorted(connections, key=operator.attrgetter("held_bytes"), reverse=True):
            held_bytes -= connection.held_bytes
            connection.let_go()
            if held_bytes <= self.LIMIT_BYTES * 3 // 4:  # so that not every look has to
                break


class HttpConnection(web.RequestHandler):
    """A caller's or a board's connection: what it may hold, and errors of the one shape also for what is no HTTP."""

    __slots__ = ("_answer_bytes", "_asking", "_is_full", "_unfinished_bytes", "held")

    def __init__(self, server: web.Server, *, held: Held, is_full: bool, **options: Any) -> None:
        super().__init__(server, **options)
        self.held = held
        self._is_full = is_full
        self._unfinished_bytes = 0
        self._answer_bytes = 0  # of one that is going out
        self._asking: asyncio.Task[Any] | None = None

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """While this lasts, the task is for this caller alone: it is cancelled when the caller goes."""
        self._asking = asyncio.current_task()
        try:
            yield
        finally:
            self._asking = None

    def connection_lost(self, error: BaseException | None) -> None:
        """What asyncio calls at the end."""
        super().connection_lost(error)
        if self._asking is not None:
            self._asking.cancel()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """What asyncio calls first. The kernel drops the connection when its peer takes nothing for UNREAD_TIMEOUT_S."""
        super().connection_made(transport)
        if self._is_full:
            log.warning("connections_refused", problem="too many connections")
            transport.close()
            return
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(UNREAD_TIMEOUT_S * 1000))
        read_at_once(transport, READ_BYTES)

    @property
    def held_bytes(self) -> int:
        """What it has sent that isn't whole yet, and has not taken of what is for it."""
        waiting_bytes = self.transport.get_write_buffer_size() if self.transport is not None else 0
        return self._unfinished_bytes + self._answer_bytes + waiting_bytes

    def let_go(self) -> None:
        """End it at once."""
        log.warning("connection_let_go", problem="too much is unfinished", held_bytes=self.held_bytes)
        if self.transport is not None:
            self.transport.abort()

    def note_whole(self) -> None:
        """A message is there whole, or a request is answered."""
        self._unfinished_bytes = 0

    def data_received(self, data: bytes) -> None:
        """What asyncio calls with what a peer sends."""
        self._unfinished_bytes += len(data)
        self.held.note(len(data))
        super().data_received(data)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """What aiohttp calls with an answer; it returns when the answer is taken, but for what the kernel and 64 KB hold."""
        if isinstance(resp, web.HTTPException):  # an `Expect` that never reaches a route
            resp = error_response(request, error_of(request, resp))
        if isinstance(resp, web.Response) and isinstance(resp.body, bytes):
            self.held.note(len(resp.body))
            self._answer_bytes = len(resp.body)
        finished = await super().finish_response(request, resp, start_time)
        self._answer_bytes = 0
        if isinstance(resp, web.Response):
            resp.body = None  # aiohttp keeps the response until the next one
        if not self._messages:  # of several requests sent at once
            self.note_whole()
        return finished

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """What aiohttp calls for what never reaches a route: requests that can't be parsed, and defects."""
        response = error_response(request, error_of(request, exc))
        response.force_close()
        return response


async def send_continue(request: web.Request) -> None:
    """What goes out before a body is read, for a caller that waits for it (RFC 9110, section 10.1.1)."""
    if request.headers["Expect"].lower() == "100-continue" and request.version >= aiohttp.HttpVersion11:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # the answer itself has not begun


# -- who gets in -------------------------------------------------------------------------------------------------------

# Whoever owns a public name can point it at the gateway's address, and a browser then calls this its own origin. Names
# that nobody outside can own are safe: addresses, single labels, and the private top-level domains (RFC 6762, RFC 8375).
PRIVATE_DOMAINS = (".local", ".localhost", ".home.arpa", ".internal", ".lan", ".home")

# What a browser asks before it lets a page of an allowed origin call with JSON or a token (the Fetch standard's CORS).
PREFLIGHT_HEADERS = {
    "Access-Control-Allow-Methods": "GET, POST, DELETE",
    "Access-Control-Allow-Headers": "Authorization, Content-Type",
    "Access-Control-Max-Age": "600",
}


class Access(enum.Enum):
    """Whom a route lets in."""

    CALLERS = enum.auto()  # with the API token, where one is set
    BOARDS = enum.auto()  # with the device token, where one is set, and with the origin that their library sends
    ALL = enum.auto()


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    """One line of the table of routes.

    The handler is given the request and its query, a `query`, and returns what is to be JSON, or a response of its own.
    """

    method: str
    path: str
    handler: Callable[[web.Request, Any], Awaitable[object]]
    query: type[msgspec.Struct] | None = NoQuery  # None: whatever was compiled into a board
    answer: Any = None  # for OpenAPI: a type of JSON, or another content type; None is for people and boards
    body: type[msgspec.Struct] | None = None  # for OpenAPI
    access: Access = Access.CALLERS

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """What aiohttp calls with a request that Guard let in."""
        query = None if self.query is None else parse_query(request, self.query)
        answer = await self.handler(request, query)
        return answer if isinstance(answer, web.StreamResponse) else json_response(answer)

    def definitions(self) -> Iterator[web.RouteDef]:
        """The route plain and under /api, and with a slash at its end too."""
        for prefix in ("", "/api"):
            plain = prefix + self.path.rstrip("/")
            for path in (plain, plain + "/") if plain else ("/",):
                yield web.route(self.method, path, self.serve, expect_handler=send_continue)


@functools.lru_cache(maxsize=64)  # callers stay where they are
def is_private(host: str) -> bool:
    """Whether a `Host` is an address or a name that nobody outside can own."""
    name = host.lower().rsplit(":", 1)[0] if not host.endswith("]") else host
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name.strip("[]"))
        return True
    return "." not in name.rstrip(".") or name.rstrip(".").endswith(PRIVATE_DOMAINS)


def shows_token(request: web.Request, token: str | None, *, in_query: bool = False) -> bool:
    """Whether the request bears the token, or none is set.

    As Bearer, as Basic with any user name, as the whole of the Authorization header (contract, section 1), or as `?token=`
    where that is possible.
    """
    if token is None:
        return True
    authorization = request.headers.get("Authorization", "").strip()
    scheme, _, value = authorization.partition(" ")
    shown = authorization or (request.query.get("token", "") if in_query else "")
    match scheme.lower():
        case "bearer":
            shown = value.strip()
        case "basic":
            with contextlib.suppress(ValueError):
                shown = base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
    return hmac.compare_digest(shown.encode("utf-8", "replace"), token.encode())


class Guard:
    """Lets requests in or not, and gives every error its one shape."""

    def __init__(self, settings: Settings, refused: Counter[str]) -> None:
        """What it refuses is counted in `refused`, by code."""
        self._settings = settings
        self._origins = settings.origins
        self._refused = refused

    @web.middleware
    async def admit(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Serve a request that may come in; all of them pass here, those that have no route, too."""
        route = getattr(request.match_info.handler, "__self__", None)  # whose `serve` it is; no Route's where there is none
        access = route.access if isinstance(route, Route) else Access.CALLERS
        try:
            self._check_origin(request, access)
            is_preflight = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
            if is_preflight and self._is_from_allowed_page(request):
                return web.Response(status=204, headers=PREFLIGHT_HEADERS)
            self._check_token(request, access)
            response = await handler(request)
        except (GatewayError, web.HTTPException, ConnectionError) as problem:
            response = self._refuse(request, problem)
        if access is Access.BOARDS and not response.prepared:
            response.force_close()  # a refused board says more, which is no request (contract, section 1)
        return response

    async def dress(self, request: web.Request, response: web.StreamResponse) -> None:
        """Give every answer, before its head goes out, the headers that it needs."""
        if self._is_from_allowed_page(request):
            response.headers["Access-Control-Allow-Origin"] = request.headers["Origin"]
            response.headers["Vary"] = "Origin"

    def _refuse(self, request: web.Request, problem: Exception) -> web.Response:
        error = error_of(request, problem)
        self._refused[error.code.name] += 1
        if error.status in (401, 403):
            log.warning("request_refused", peer=peer_of(request), path=request.path, error=str(error))
        else:
            log.debug("request_refused", method=request.method, path=request.path, error_code=error.code.name, error=str(error))
        response = error_response(request, error)
        if isinstance(problem, web.HTTPMethodNotAllowed):
            response.headers["Allow"] = problem.headers["Allow"]
        if error.status == 401:
            # A browser asks for what is named first; of what a page's script fetches it must not ask.
            is_page = "text/html" in request.headers.get("Accept", "")
            response.headers["WWW-Authenticate"] = ("" if is_page else 'Bearer realm="AMHR-PD", ') + 'Basic realm="AMHR-PD"'
        return response

    def _check_origin(self, request: web.Request, access: Access) -> None:
        """Raise FORBIDDEN for what a browser sends on behalf of a web page that isn't ours."""
        headers = request.headers
        try:
            "".join(headers.values()).encode()
        except UnicodeEncodeError:
            raise GatewayError(Code.INVALID_MESSAGE, "not valid HTTP: a header that is not UTF-8") from None
        origin, host = headers.get("Origin"), headers.get("Host", "")
        if access is Access.BOARDS and origin in (None, "file://"):
            return  # every board in the field says so, whatever host was compiled in (contract, section 1)
        if self._is_from_allowed_page(request):
            return
        authorities = {normal_origin(f"{scheme}://{host}") for scheme in ("http", "https")}
        can_allow_it = "AMHRPD_ALLOWED_ORIGINS can allow it"
        if not is_private(host) and not authorities & self._origins:
            raise GatewayError(Code.FORBIDDEN, f"the host {host[:100]!r} is not known here; {can_allow_it}")
        if origin is not None and normal_origin(origin) not in authorities:
            raise GatewayError(Code.FORBIDDEN, f"the origin {origin[:100]!r} is not allowed here; {can_allow_it}")
        is_link = (request.method, request.path, headers.get("Sec-Fetch-Dest", "document")) == ("GET", "/", "document")
        is_link &= headers.get("Sec-Fetch-Mode") == "navigate"
        if origin is None and headers.get("Sec-Fetch-Site") == "cross-site" and not is_link:
            raise GatewayError(Code.FORBIDDEN, "a web page from elsewhere asks for this, and doesn't say which")

    def _is_from_allowed_page(self, request: web.Request) -> bool:
        return normal_origin(request.headers.get("Origin", "")) in self._origins

    def _check_token(self, request: web.Request, access: Access) -> None:
        """Raise UNAUTHORIZED where a token is set and the request doesn't show it."""
        how = "send the header `Authorization: Bearer <token>`, or the token as a Basic password; the gateway has it from"
        if access is Access.BOARDS and not shows_token(request, self._settings.device_token, in_query=True):
            raise GatewayError(Code.UNAUTHORIZED, f"a valid device token is required: {how} AMHRPD_DEVICE_TOKEN")
        if access is Access.CALLERS and not shows_token(request, self._settings.api_token):
            raise GatewayError(Code.UNAUTHORIZED, f"a valid API token is required: {how} AMHRPD_API_TOKEN")


# -- figures for Prometheus --------------------------------------------------------------------------------------------


class Metrics:
    """What `GET /metrics` shows, collected when it is asked for: nobody counts but with plain numbers where it happens."""

    FIGURES: ClassVar[Mapping[str, str]] = {
        "devices_online": "Devices that are online.",
        "devices_known": "Devices that are known.",
        "connections": "WebSocket connections.",
        "open_commands": "Commands that wait for answers.",
        "uptime_seconds": "Since the start.",
        "database_ok": "1 where the database can be written.",
        "database_bytes": "Size of the database file.",
        "disk_free_bytes": "Free space beside the database.",
        "rows_waiting": "Rows that are not in the database yet.",
        "rows_dropped": "Rows that were dropped because too many waited.",
        "rows_rejected": "Rows that the database refused.",
    }

    def __init__(self, gateway: Gateway, store: Store) -> None:
        self._gateway = gateway
        self._store = store

    def collect(self) -> Iterator[prometheus.Metric]:
        """What prometheus_client calls for an answer."""
        gateway, health = self._gateway, self._gateway.health()
        values = health | {
            "devices_known": len(gateway.registry),
            "connections": len(gateway.connections),
            "database_ok": health["status"] == "ok",
        }
        for name, text in self.FIGURES.items():
            is_counter = name in ("rows_dropped", "rows_rejected")
            kind = prometheus.CounterMetricFamily if is_counter else prometheus.GaugeMetricFamily
            if name in values:
                yield kind(f"amhrpd_{name}", text, float(values[name]))
        messages = {str(kind.__struct_config__.tag): count for kind, count in gateway.messages.items()}
        yield self._counts("messages", "Messages of boards that were accepted.", "type", messages)
        yield self._counts("refusals", "Messages and requests that were refused.", "code", gateway.refused)
        yield self._counts("commands", "Commands that ended.", "status", gateway.dispatch.ended)
        for histogram in (gateway.dispatch.answer_seconds, self._store.writer.commit_seconds, gateway.loop_late_s):
            yield from histogram.collect()

    def _counts(self, name: str, text: str, label: str, counts: Mapping[str, int]) -> prometheus.Metric:
        family = prometheus.CounterMetricFamily(f"amhrpd_{name}", text, labels=[label])
        for value, count in counts.items():
            family.add_metric([value], count)
        return family


# -- OpenAPI -----------------------------------------------------------------------------------------------------------


def answer_type(name: str, always: Row, sometimes: Row | None = None) -> Any:
    """A type of JSON answers: keys with their types, those that are always there and those that may be."""
    optional = [(key, kind | msgspec.UnsetType, msgspec.UNSET) for key, kind in (sometimes or {}).items()]
    return msgspec.defstruct(name, [*always.items(), *optional])


def list_of(kind: Any) -> Any:
    """The type of a list."""
    return GenericAlias(list, (kind,))


def columns_of(table: TableName) -> Row:
    """A table's columns with the types that they have in answers."""
    types = {"id": int, "is_online": bool, "target_device_count": int, "success_count": int}
    return {key: Any if kind == "JSON" else types.get(key, str) | None for key, kind in COLUMNS[table].items()}


TIME = str | None
ERROR = answer_type("Error", {"error": str, "error_code": Literal[tuple(code.name for code in Code)]})
HEALTH = answer_type("Health", {"status": Literal["ok", "degraded"]})
DEVICE = answer_type(
    "Device",
    columns_of("devices") | {"metadata": Any, "state": Any, "state_timestamp": TIME, "alert": dict | None, "deadman_at": TIME},
)
DEVICES = answer_type("Devices", {"total": int, "devices": list_of(DEVICE)})
DELETED = answer_type("Deleted", {"device_id": str, "deleted": dict[str, int]})
COMMAND = answer_type(
    "Command",
    dict.fromkeys(("command_id", "device_type", "command_name", "status", "created_at"), str)
    | {"payload": dict, "target_device_count": int, "success_count": int},
    {"response_data": Any, "alerts": list, "deadman": Deadman, "detail": str, "persisted": bool},
)
# Where a history ended early, `before_id` is the parameter that the next question goes on with.
STATES = list_of(answer_type("State", columns_of("device_state_snapshots")))
STATE_HISTORY = answer_type("StateHistory", {"device_id": str, "total": int, "states": STATES}, {"before_id": int})
EVENTS = list_of(answer_type("ConnectionEvent", columns_of("device_connection_logs")))
CONNECTION_HISTORY = answer_type("ConnectionHistory", {"device_id": str, "total": int, "events": EVENTS}, {"before_id": int})
COMMAND_LOG = answer_type("CommandLog", columns_of("command_logs"))
COMMAND_LOGS = answer_type("CommandLogs", {"total": int, "logs": list_of(COMMAND_LOG)}, {"before_id": str})


def openapi(table: Iterable[Route]) -> msgspec.Raw:
    """The routes that have an answer, as OpenAPI 3.1."""
    routes = [route for route in table if route.answer is not None]
    kinds = [kind for route in routes for kind in (route.query, route.body, route.answer) if isinstance(kind, type)]
    _, schemas = msgspec.json.schema_components([ERROR, *kinds], ref_template="#/components/schemas/{name}")
    request = schemas["CommandRequest"]
    one_or_several = request["properties"]["device_id"]["anyOf"]
    one_or_several.append(one_or_several[0]["items"])
    given, absent = {"not": {"type": "null"}}, {"type": "null"}
    request["anyOf"] = [  # both are possible, and then checked against each other
        {"required": ["device_type"], "properties": {"device_type": given, "device_id": absent}},
        {"required": ["device_id"], "properties": {"device_type": absent, "device_id": given}},
    ]
    paths: dict[str, Row] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = operation(route, schemas)
    document = {
        "openapi": "3.1.0",
        "info": {"title": "AMHR-PD gateway", "version": VERSION},
        "paths": paths,
        "security": [{}, {"bearer": []}, {"basic": []}],
        "components": {
            "schemas": schemas,
            "securitySchemes": {name: {"type": "http", "scheme": name} for name in ("bearer", "basic")},
        },
    }
    return raw(to_json(document).replace(r"\\A", "^").replace(r"\\Z", "$"))  # JSON Schema's patterns are JavaScript's


def operation(route: Route, schemas: Mapping[str, Any]) -> Row:
    """What OpenAPI says of one route."""

    def json_of(kind: type) -> Row:
        return {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}

    content: Row = json_of(route.answer) if isinstance(route.answer, type) else {route.answer: {}}
    names = re.findall(r"{(\w+)}", route.path)
    parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    if route.query is not None and route.body is None:  # a query in place of the body can't be said beside it
        for name, schema in schemas[route.query.__name__]["properties"].items():
            about = {"description": schema["description"]} if "description" in schema else {}
            # In a query nothing is null: that is what is left out.
            parameters.append({"name": name, "in": "query", "schema": schema.get("anyOf", [schema])[0], **about})
        if issubclass(route.query, HistoryQuery):
            content["text/csv"] = {}
    responses = {"200": {"description": "done", "content": content}}
    responses |= {status: {"description": "refused", "content": json_of(ERROR)} for status in ("4XX", "5XX")}
    if route.answer is HEALTH:
        responses["503"] = {"description": "the database can't be written", "content": content}
    said: Row = {
        "operationId": route.handler.__name__,
        "summary": (route.handler.__doc__ or "").partition("\n")[0],
        "parameters": parameters,
        "responses": responses,
    }
    return said if route.body is None else said | {"requestBody": {"required": True, "content": json_of(route.body)}}


# -- the routes --------------------------------------------------------------------------------------------------------


class RestApi:
    """The routes of the contract's section 6. Handlers look up and answer; see Route, and Guard for access and errors."""

    def __init__(self, settings: Settings, gateway: Gateway, store: Store) -> None:
        self._settings = settings
        self._gateway = gateway
        self._store = store
        self._page_headers = page_headers(PAGE)
        self._metrics = prometheus_client.CollectorRegistry()
        self._metrics.register(Metrics(gateway, store))
        prometheus_client.ProcessCollector(registry=self._metrics)
        self.routes = (
            Route("GET", "/", self.page),
            Route("GET", "/ws/{device_id}", self.serve_device, query=None, access=Access.BOARDS),
            Route("GET", "/health", self.health, answer=HEALTH, access=Access.ALL),
            Route("GET", "/events", self.events, ListenQuery, "text/event-stream"),
            Route("GET", "/devices", self.devices, DevicesQuery, DEVICES),
            Route("GET", "/devices/{device_id}", self.device, NoQuery, DEVICE),
            Route("DELETE", "/devices/{device_id}", self.delete_device, NoQuery, DELETED),
            Route("POST", "/command", self.command, CommandQuery, COMMAND, body=CommandRequest),
            Route("GET", "/state-history/{device_id}", self.state_history, StateHistoryQuery, STATE_HISTORY),
            Route("GET", "/command-logs", self.command_logs, CommandLogsQuery, COMMAND_LOGS),
            Route("GET", "/command-logs/{command_id}", self.command_log, NoQuery, COMMAND_LOG),
            Route(
                "GET",
                "/device-connection-history/{device_id}",
                self.connection_history,
                ConnectionHistoryQuery,
                CONNECTION_HISTORY,
            ),
            Route("GET", "/metrics", self.metrics, NoQuery, "text/plain"),
            Route("GET", "/openapi.json", self.openapi, NoQuery, "application/json"),
        )

    async def page(self, request: web.Request, query: NoQuery) -> object:
        """`GET /`."""
        return web.Response(text=PAGE, content_type="text/html", headers=self._page_headers)

    async def serve_device(self, request: web.Request, query: None) -> object:
        """`GET /ws/{device_id}`: a board connects."""
        if not re.fullmatch(DEVICE_ID_PATTERN, request.match_info["device_id"]):
            raise GatewayError(Code.INVALID_FIELD_VALUE, "device_id in the path must be 1 to 64 of A-Z a-z 0-9 . _ -")
        if self._gateway.is_stopping:
            raise GatewayError(Code.STOPPING, "the gateway is going down")
        try:
            assert isinstance(request.protocol, HttpConnection)
            read_at_once(request.transport, READ_OF_TINY_BYTES)
            return await DeviceSocket(self._gateway, self._settings, request, request.protocol.note_whole).serve()
        except (web.HTTPBadRequest, ValueError):
            raise GatewayError(
                Code.INVALID_FIELD_VALUE, "boards connect here: a WebSocket handshake is expected, of version 13"
            ) from None

    async def health(self, request: web.Request, query: NoQuery) -> object:
        """`GET /health`: open to all; without the token, where one is set, it says no more than the status."""
        health = self._gateway.health()
        is_shown = shows_token(request, self._settings.api_token)
        return json_response(health if is_shown else {"status": health["status"]}, 200 if health["status"] == "ok" else 503)

    async def events(self, request: web.Request, query: ListenQuery) -> object:
        """`GET /events`: what happens, as it happens, as server-sent events."""
        assert request.transport is not None
        names, device_ids = (None if text is None else text.split(",") for text in (query.event, query.device_id))
        listener = Listener(request.transport.abort, names, device_ids, query.device_type)
        events = self._gateway.events
        with events.listening(listener):
            async with sse_response(request, ping_interval=SILENCE_S, send_timeout=UNREAD_TIMEOUT_S) as response:
                return await stream(request, response, events.follow(listener, response.last_event_id))

    async def devices(self, request: web.Request, query: DevicesQuery) -> object:
        """`GET /devices`."""
        is_online = None if query.online is None else query.online == "true"
        devices = self._gateway.registry.matching(query.device_type, is_online=is_online)
        size_bytes = sum(500 + device.content_bytes for device in devices)
        if size_bytes < Database.MAX_ANSWER_BYTES:  # an answer that says its length is what simple callers can read
            return {"total": len(devices), "devices": [device.record() for device in devices]}
        return await stream(request, web.StreamResponse(headers={"Content-Type": "application/json"}), device_list(devices))

    async def device(self, request: web.Request, query: NoQuery) -> object:
        """`GET /devices/{device_id}`."""
        return (await self._gateway.registry.look_up(request.match_info["device_id"])).record()

    async def delete_device(self, request: web.Request, query: NoQuery) -> object:
        """`DELETE /devices/{device_id}`."""
        device_id = request.match_info["device_id"]
        return {"device_id": device_id, "deleted": await self._gateway.delete_device(device_id)}

    async def command(self, request: web.Request, query: CommandQuery) -> object:
        """`POST /command`."""
        wanted = decode_command(request.query, await read_body(request))
        if self._gateway.is_stopping:
            raise GatewayError(Code.STOPPING, "the gateway is going down")
        command = await self._gateway.dispatch.route(wanted)
        if wanted.wait:
            await self._gateway.dispatch.wait_for_answers(command, wanted.wait)
        answer = command.record(with_answers=bool(wanted.wait))
        if command.status == NO_DEVICES:
            answer["detail"] = self._gateway.dispatch.explain_no_devices(wanted, command)
        return answer

    async def state_history(self, request: web.Request, query: HistoryQuery) -> object:
        """`GET /state-history/{device_id}`."""
        device_id = (await self._gateway.registry.look_up(request.match_info["device_id"])).device_id
        read = functools.partial(self._store.history, query.table, device_id=device_id)
        return await self._history(request, query, read, {"device_id": device_id})

    async def connection_history(self, request: web.Request, query: ConnectionHistoryQuery) -> object:
        """`GET /device-connection-history/{device_id}`."""
        return await self.state_history(request, query)

    async def command_logs(self, request: web.Request, query: CommandLogsQuery) -> object:
        """`GET /command-logs`."""
        return await self._history(request, query, functools.partial(self._store.history, query.table), {})

    async def _history(self, request: web.Request, query: HistoryQuery, read: ReadRows, about: Row) -> object:
        name = re.sub(r"[^A-Za-z0-9._]+", "-", request.path).strip("-")
        headers = {"Content-Type": "text/csv; charset=utf-8", "Content-Disposition": f'attachment; filename="{name}.csv"'}
        assert isinstance(request.protocol, HttpConnection)
        with request.protocol.asking():
            if query.format == "json":
                return await json_history(query, read, about)
            return await stream(request, web.StreamResponse(headers=headers), csv_history(query, read))

    async def command_log(self, request: web.Request, query: NoQuery) -> object:
        """`GET /command-logs/{command_id}`."""
        command_id = request.match_info["command_id"]
        row = await self._store.command(command_id)
        if row is None:
            raise GatewayError(Code.COMMAND_NOT_FOUND, f"command {command_id[:64]!r} was never given")
        return row

    async def metrics(self, request: web.Request, query: NoQuery) -> object:
        """`GET /metrics`."""
        content_type = {"Content-Type": prometheus_client.CONTENT_TYPE_LATEST}
        return web.Response(body=prometheus_client.generate_latest(self._metrics), headers=content_type)

    async def openapi(self, request: web.Request, query: NoQuery) -> object:
        """`GET /openapi.json`."""
        return openapi(self.routes)


# ======================================================================================================================
# Service
# ======================================================================================================================

MAX_CONNECTIONS = 6000  # 5,000 boards and their callers; idle connections cost 10 KB each, so at most 60 MB
RESERVED_FILES = 100  # of those the process may have open: for the database, the log, and what Python itself needs
# Also bounds connections that never send a request or never finish its headers; callers reconnect when they poll slower.
KEEPALIVE_TIMEOUT_S = 15.0
TLS_HANDSHAKE_TIMEOUT_S = 5.0  # an ESP32 takes one to three; until it is over nobody counts the connection
LINGERING_TIME_S = 2.0  # for the rest of a body that was refused, so that the caller gets to read why
HANDLERS_TIMEOUT_S = 3.0  # at a stop, for answers that are under way
STORE_CLOSE_TIMEOUT_S = 10.0  # at a stop, for what is queued; amhrpd.service's TimeoutStopSec is above the sum of all
UPKEEP_INTERVAL_S = 1.0
ACCEPTED_AT_ONCE = 8  # in a turn of the loop: their handshakes take it some 5 ms, then commands have theirs
LISTEN_BACKLOG = 1024  # a whole fleet after a power cut; the kernel caps it at net.core.somaxconn
SIOCGIFADDR = 0x8915  # netdevice(7); Python has no name for it

# -- logging -----------------------------------------------------------------------------------------------------------


class BackgroundHandler(logging.Handler):
    """Writes lines to stderr in a thread of its own: a terminal or a journal that stalls must stop no robot, nor an exit.

    Lines over the limit are dropped, and how many is said as soon as all that waited is written.
    """

    MAX_WAITING = 10_000
    CLOSE_TIMEOUT_S = 1.0

    def __init__(self) -> None:
        super().__init__()
        self._waiting: queue.Queue[bytes] = queue.Queue(self.MAX_WAITING)
        self._dropped = 0
        self._writer = threading.Thread(target=self._write_until_closed, name="log-writer", daemon=True)
        self._writer.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Hand a record to the thread. Never waits."""
        try:
            self._waiting.put_nowait(self._line(record))
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Write what waits, for twice CLOSE_TIMEOUT_S at the most. `logging` calls it at the end of the program."""
        with contextlib.suppress(queue.Full):
            self._waiting.put(b"", timeout=self.CLOSE_TIMEOUT_S)
            self._writer.join(self.CLOSE_TIMEOUT_S)
        super().close()

    def _line(self, record: logging.LogRecord) -> bytes:
        return self.format(record).encode("utf-8", "backslashreplace") + b"\n"

    def _write_until_closed(self) -> None:
        is_closed = False
        while not is_closed:
            line = self._waiting.get()
            is_closed = line == b""
            if self._dropped and self._waiting.empty():
                about = {
                    "name": "amhrpd",
                    "levelname": "WARNING",
                    "msg": "log_lines_dropped count=%d",
                    "args": (self._dropped,),
                }
                self._dropped = 0
                line += self._line(logging.makeLogRecord(about))
            with contextlib.suppress(OSError):  # who read it went away
                while line:
                    line = line[os.write(2, line) :]


class Repeats(logging.Filter):
    """Lets what repeats itself pass once a minute: an event about the same device, peer or problem, a library's same text.

    When the minute is over it goes out once more, with how often it was dropped as `repeats`. An event with a `command_id`
    is no repeat, nor one that is about nothing.
    """

    WINDOW_S = 60.0
    MAX_KEYS = 1000  # a flood of new keys costs a bounded amount of memory: those over it share one an event

    def __init__(self) -> None:
        super().__init__()
        self._windows: dict[tuple[object, ...], tuple[float, int, structlog.typing.EventDict]] = {}

    def __call__(self, _: Any, level: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        """The gateway's own events, as a processor of structlog: the first, since a flood of them costs more than itself."""
        if self._is_repeat(event, level):
            raise structlog.DropEvent
        return event

    def filter(self, record: logging.LogRecord) -> bool:
        """Those of libraries, whose text is compared before anything is put in."""
        if isinstance(record.msg, dict):
            return True
        return not self._is_repeat({"event": record.msg, "problem": record.name}, record.levelname)

    def _is_repeat(self, event: structlog.typing.EventDict, level: str) -> bool:
        about = event.get("device_id") or event.get("peer") or event.get("problem")
        if "repeats" in event or "command_id" in event or (about is None and "exc_info" not in event):
            return False
        kind = str(event.get("type") or event.get("error_code") or "")[:_MAX_LOGGED_TEXT]  # boards write it
        key: tuple[object, ...] = (event["event"], about, kind)
        if key not in self._windows and len(self._windows) >= self.MAX_KEYS:
            key = (event["event"],)
        if (window := self._windows.get(key)) is not None:
            began_s, count, first = window
            self._windows[key] = began_s, count + 1, first
            return True
        first = {name: value for name, value in event.items() if name != "exc_info"} | {"level": level}
        self._windows[key] = time.monotonic(), 0, _tame(None, level, first)
        return False

    def report(self, *, everything: bool = False) -> None:
        """Log the counts of the minutes that are over, or of all."""
        now_s = time.monotonic()
        for key, (began_s, count, event) in list(self._windows.items()):
            if everything or now_s - began_s >= self.WINDOW_S:
                del self._windows[key]
                if count:
                    level = event.pop("level").upper()
                    log.log(logging.getLevelNamesMapping().get(level, logging.ERROR), **event, repeats=count)


repeats = Repeats()

_JOURNAL_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3}  # syslog(3)
_MAX_LOGGED_TEXT = 300  # of a value; boards and callers write most of them


def is_stderr_the_journal() -> bool:
    """Whether stderr is the stream that JOURNAL_STREAM names by device and inode: children inherit the variable alone."""
    stream = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{stream.st_dev}:{stream.st_ino}"


def configure_logging(level: str, log_format: str) -> None:
    """One line an event, on stderr, in `log_format`; the libraries' records go the same way."""
    if log_format == "auto":
        log_format = "journal" if is_stderr_the_journal() else "console" if sys.stderr.isatty() else "json"
    renderers: dict[str, structlog.typing.Processor] = {
        "console": structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        "journal": _render_for_journal,
        "json": structlog.processors.JSONRenderer(ensure_ascii=False),
    }
    shared: list[structlog.typing.Processor] = [structlog.stdlib.add_log_level, structlog.processors.format_exc_info, _tame]
    if log_format != "journal":  # the journal stamps its lines itself
        shared.append(structlog.processors.TimeStamper(fmt="iso", utc=True))
    handler = BackgroundHandler()
    handler.addFilter(repeats)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderers[log_format]],
        )
    )
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    for library in ("asyncio", "aiohttp.websocket"):  # slow callbacks; subprotocols that boards offer
        logging.getLogger(library).setLevel(logging.ERROR)
    structlog.configure(
        processors=[repeats, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        cache_logger_on_first_use=True,
    )


def _tame(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Cap what others wrote, and keep it in its line."""
    for key, value in event.items():
        if isinstance(value, str | dict | list | tuple) and key != "exception":
            text = value if isinstance(value, str) else repr(value)
            if len(text) > _MAX_LOGGED_TEXT:
                text = f"{text[:_MAX_LOGGED_TEXT]}… ({len(text)} characters)"
            event[key] = text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return event


_render_fields = structlog.processors.LogfmtRenderer(bool_as_flag=False)


def _render_for_journal(logger: Any, name: str, event: structlog.typing.EventDict) -> str:
    """`<4>device_alert device_id=esp32_001 …`: systemd takes the priority from the front (sd-daemon(3))."""
    priority = _JOURNAL_PRIORITIES.get(event.pop("level"), 6)
    text = event.pop("event")
    fields = {str(key).replace(" ", "_"): value if value is None else str(value) for key, value in event.items()}
    return f"<{priority}>{text} {_render_fields(logger, name, fields)}".rstrip().replace("\n", f"\n<{priority}>")


# -- listening ---------------------------------------------------------------------------------------------------------


def raise_open_files_limit() -> int:
    """Ask for as many open files as the system allows: shells give 1,024, which 1,000 boards use up. Returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


class LeanTls(asyncio.sslproto.SSLProtocol):
    """asyncio's TLS for a fleet: 12 KB a board in place of 300, and nothing of a connection stays behind it."""

    max_size = 16 * 1024  # a TLS record; asyncio would read 256 KiB at once, into a buffer for each connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """What asyncio calls first."""
        super().connection_made(transport)
        # As much as without TLS, of asyncio's 512 KiB. What lies below has 64 KiB at the most when it asks for more.
        self._set_write_buffer_limits(128 << 10, 64 << 10)  # type: ignore[attr-defined]

    def _get_write_buffer_size(self) -> int:
        # asyncio forgets what is encrypted and not sent.
        below: Any = self._transport
        encrypted_bytes = below.get_write_buffer_size() if below is not None else 0
        return int(super()._get_write_buffer_size() + encrypted_bytes)  # type: ignore[misc]

    def _wakeup_waiter(self, exc: BaseException | None = None) -> None:
        # A handshake that failed was closed by now. Its error would be kept in the frames of its own traceback, a
        # cycle that holds the connection's buffers until a full collection.
        super()._wakeup_waiter()
        if exc is not None:
            exc.__traceback__ = None


def _no_password() -> str:
    raise ValueError("the key is encrypted, and a service has nobody to ask for its password")


def _tls_options(settings: Settings) -> dict[str, Any]:
    """What `create_server` takes for the certificate that is set, if one is. Raises StartError."""
    if settings.tls_cert is None or settings.tls_key is None:
        return {}
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password=_no_password)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise StartError(f"can't use the certificate {settings.tls_cert} with {settings.tls_key}: {reason}") from None
    asyncio.sslproto.SSLProtocol = LeanTls  # type: ignore[misc] # asyncio has no argument for it
    return {"ssl": context, "ssl_handshake_timeout": TLS_HANDSHAKE_TIMEOUT_S}


def let_in(server: web.Server, held: Held, limit: int) -> web.RequestHandler:
    """What serves a connection that arrives. Those over the limit are closed, and those that are in stay."""
    return HttpConnection(
        server,
        held=held,
        is_full=len(server.connections) >= limit,
        loop=asyncio.get_running_loop(),
        access_log=None,  # none: the lines would cost more than the requests
        keepalive_timeout=KEEPALIVE_TIMEOUT_S,
        lingering_time=LINGERING_TIME_S,
        read_bufsize=READ_BYTES,
        max_line_size=MAX_LINE_BYTES,
        max_field_size=MAX_HEADER_BYTES,
        auto_decompress=False,
    )


async def addresses_here(host: str) -> Sequence[str]:
    """The addresses of a host that this machine has: `localhost` names ::1 also where IPv6 is off. Raises OSError."""
    addresses = []
    for family, _, _, _, address in await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM):
        with contextlib.suppress(OSError), socket.socket(family) as probe:
            probe.bind(address)
            addresses.append(str(address[0]))
    return addresses or [host]  # then listening on it says what is wrong


async def listen(settings: Settings, server: web.Server, tls_options: Mapping[str, Any]) -> asyncio.Server:
    """Let connections in at the host's addresses; all of both families are one socket. Raises StartError."""
    limit = min(MAX_CONNECTIONS, raise_open_files_limit() - RESERVED_FILES)
    where: dict[str, Any] = {"port": settings.port}
    try:
        where["host"] = await addresses_here(settings.host)
        if settings.host in ("0.0.0.0", "::"):
            has_ipv6 = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if has_ipv6 else socket.AF_INET
            where = {"sock": socket.create_server(("", settings.port), family=family, dualstack_ipv6=has_ipv6)}
        protocol = functools.partial(let_in, server, Held(server), limit)
        loop = asyncio.get_running_loop()
        listener = await loop.create_server(protocol, **where, backlog=ACCEPTED_AT_ONCE, **tls_options)
        for accepting in listener.sockets:
            with accepting.dup() as queue:
                queue.listen(LISTEN_BACKLOG)  # asyncio has one number for both
        return listener
    except (OSError, UnicodeError) as error:
        # What asyncio says of a bind names the address once more, since Python 3.13 without a number where the machine
        # doesn't have the address; a resolver's numbers are negative and no errno.
        number = (error.errno or errno.EADDRNOTAVAIL) if isinstance(error, OSError) else 0
        reason = os.strerror(number) if number > 0 else getattr(error, "strerror", error)
        raise StartError(f"can't listen on {settings.host} port {settings.port}: {reason}") from None


def page_urls(scheme: str, listener: asyncio.Server) -> str:
    """What to open in a browser: the page, at addresses that the machine has just now."""
    host, port, *_ = listener.sockets[0].getsockname()
    hosts = own_addresses() if host in ("0.0.0.0", "::") else [f"[{host}]" if ":" in host else host]
    return " ".join(f"{scheme}://{host}:{port}/" for host in hosts)


def own_addresses() -> list[str]:
    """The machine's IPv4 addresses; the loopback's if it has no other."""
    found: list[str] = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for interface in sorted(Path("/sys/class/net").iterdir()):  # if_nameindex() takes netlink, which the unit forbids
            with contextlib.suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", interface.name.encode()))
                found.append(socket.inet_ntoa(answer[20:24]))
    return [address for address in found if not address.startswith("127.")] or ["127.0.0.1"]


# -- start and stop ----------------------------------------------------------------------------------------------------


GATEWAY = web.AppKey("gateway", Gateway)
STORE = web.AppKey("store", Store)


def build_app(settings: Settings) -> web.Application:
    """The gateway as an aiohttp application. The store opens and closes with it.

    Whoever runs it awaits `app[GATEWAY].stop()` before its clean-up, which is deaf to the boards' close replies.
    """
    store = Store(settings)
    gateway = Gateway(settings, store)
    guard = Guard(settings, gateway.refused)
    app = web.Application(middlewares=[guard.admit], client_max_size=MAX_BODY_BYTES)
    app[GATEWAY] = gateway
    app[STORE] = store
    for route in RestApi(settings, gateway, store).routes:
        app.add_routes(route.definitions())
    app.on_response_prepare.append(guard.dress)

    async def run_store(_: web.Application) -> AsyncIterator[None]:
        await store.open()
        yield
        if not await store.close(STORE_CLOSE_TIMEOUT_S):
            raise GatewayError(Code.STORE_UNAVAILABLE, "the database could not be closed as it should be")

    app.cleanup_ctx.append(run_store)
    return app


def notify(*assignments: str) -> None:
    """Tell systemd such assignments as READY=1 (sd_notify(3)), where it listens."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        address = "\0" + address[1:] if address.startswith("@") else address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
                out.setblocking(False)
                out.sendto("\n".join(assignments).encode(), address)
        except OSError as error:
            log.warning("notify_failed", problem=str(error))


async def keep_up(gateway: Gateway, store: Store, urls: Callable[[], str], stop: asyncio.Event) -> None:
    """Do what is due regularly until `stop` is set. The watchdog's ping comes from here, so it shows that the loop turns."""
    watchdog_s = int(os.environ.get("WATCHDOG_USEC") or 0) / 1e6 or math.inf
    interval_s = min(UPKEEP_INTERVAL_S, gateway.ping_interval_s / 4, watchdog_s / 3)
    while not stop.is_set():
        await gateway.sweep(interval_s)
        repeats.report()
        online, open_commands = len(gateway.registry.matching(is_online=True)), len(gateway.dispatch.commands.open)
        notify(f"STATUS={online} devices online, {open_commands} open commands; open {urls()}")
        if store.is_writer_alive:
            notify("WATCHDOG=1")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(interval_s):
                await stop.wait()


async def log_everybody_off(gateway: Gateway, listener: asyncio.Server) -> None:
    """Let nobody in any more, and log every board off."""
    notify("STOPPING=1", "STATUS=stopping")
    log.info("stopping", devices_online=len(gateway.registry.matching(is_online=True)))
    listener.close()
    await gateway.stop()


async def serve(settings: Settings, stop: asyncio.Event, on_ready: Callable[[int], None] = lambda port: None) -> int:
    """Run the gateway until `stop` is set; `on_ready` is told the port. Returns the exit code. Raises StartError.

    A stop: nobody is let in; armed deadmen are sent; who waits for answers gets what there is; every board is offline in
    its history, gets a close frame and has some seconds to echo it, and what it acknowledges until then counts; listeners
    hear of all that and go (`Gateway.stop`). Then answers that are under way end, the store writes what is queued and closes
    the file (`runner.cleanup`).
    """
    tls_options = _tls_options(settings)
    app = build_app(settings)
    gateway, store = app[GATEWAY], app[STORE]
    runner = web.AppRunner(app, shutdown_timeout=HANDLERS_TIMEOUT_S)
    try:
        await runner.setup()
        assert runner.server is not None
        listener = await listen(settings, runner.server, tls_options)
    except BaseException:
        await runner.cleanup()
        raise
    urls = functools.partial(page_urls, "https" if tls_options else "http", listener)
    log.info("listening", open=urls(), address=settings.host, database=str(settings.database_path.absolute()))
    notify("READY=1")
    on_ready(listener.sockets[0].getsockname()[1])

    exit_code = 0
    for step in (
        functools.partial(keep_up, gateway, store, urls, stop),
        functools.partial(log_everybody_off, gateway, listener),
        runner.cleanup,
    ):
        try:
            await step()
        except Exception as error:
            exit_code = 1  # and the steps that follow are taken all the same
            log.error("step_failed", error=str(error), exc_info=not isinstance(error, GatewayError))
    repeats.report(everything=True)
    log.info("stopped", exit_code=exit_code)
    return exit_code


# ======================================================================================================================
# Simulator
# ======================================================================================================================

URL_PATTERN = r"\Ahttps?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:([1-5]?[0-9]{1,4}|6[0-5][0-9]{3}))?/?\Z"


class FleetPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What `amhrpd.py simulate` plays, checked. Durations are seconds. Flags follow from the fields as they do in Settings."""

    url: Annotated[
        str, msgspec.Meta(pattern=URL_PATTERN, title="http://host:port or https://host:port", description="the gateway")
    ] = "http://127.0.0.1:8000"
    devices: Annotated[int, number(1, 9999, "how many boards")] = 10
    device_type: Annotated[DeviceType, about("their type")] = "ESP32"
    heartbeat_interval_s: Annotated[float, number(0.01, 3600, "seconds between a board's heartbeats")] = 5.0
    status_interval_s: Annotated[float, number(0, 3600, "seconds between a board's snapshots, 0 is no pause")] = 1.0
    ack_delay_s: Annotated[float, number(0, 300, "seconds that a board takes to answer a command")] = 0.0015
    failure_rate: Annotated[float, number(0, 1, "share of commands answered with a failure")] = 0.0
    reconnect_rate: Annotated[float, number(0, 600, "power cuts a board and minute, at random")] = 0.0
    commands: Annotated[
        Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] | None,
        about("how many commands to all boards; one every 3 s if left out"),
    ] = None
    duration_s: Annotated[float, number(0, 86400, "seconds to play, 0 is until Ctrl-C")] = 30.0
    api_token: Token | None = None
    device_token: Token | None = None


def readings(number: int, at_s: float) -> dict[str, float]:
    """What board `number` measures at a moment (s): °C, % humidity, % battery, dBm. Slow waves, shifted from board to board."""

    def wave(middle: float, swing: float, period_s: float) -> float:
        return middle + swing * math.sin(math.tau * at_s / period_s + number)

    air = {"temperature": round(wave(23, 4, 120), 2), "humidity": round(wave(48, 12, 300), 1)}
    return air | {"battery": round(wave(70, 25, 900), 1), "rssi": round(wave(-60, 9, 45))}


async def end_tasks(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel what still runs, wait for its end, raise what went wrong."""
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            raise result


class SimulatedBoard:
    """A board that behaves on the wire as the servo sketch of the contract's section 1 does."""

    POWER_ON_STEP_S = 0.002  # boards come up one after the other, 500 a second
    REBOOT_S = (0.5, 5.0)  # of a power cut, and of a lost connection: how soon the boards in the field are back
    CONFIRM_TIMEOUT_S = 30.0  # boards without a pause leave some 2 MB in the network's buffers each

    def __init__(self, fleet: Fleet, number: int) -> None:
        self.device_id = f"sim_{number:04d}"
        self.is_up = self.has_been_up = False
        self.snapshots = 0  # sent; the next one has this number
        self.confirmed: set[int] = set()  # those that the gateway has handled for certain
        self._fleet, self._plan, self._number = fleet, fleet.plan, number

    async def live(self) -> NoReturn:
        """Connect, work, lose power, come back, until cancelled; then say goodbye, in CONFIRM_TIMEOUT_S and 5 s at most."""
        token = self._plan.device_token
        await asyncio.sleep(self._number * self.POWER_ON_STEP_S)
        while True:
            try:
                async with websockets.connect(
                    f"{self._plan.url.rstrip('/').replace('http', 'ws', 1)}/ws/{self.device_id}",
                    origin=websockets.Origin("file://"),
                    subprotocols=[websockets.Subprotocol("arduino")],
                    user_agent_header="arduino-WebSocket-Client",
                    additional_headers={"Authorization": aiohttp.encode_basic_auth("board", token)} if token else {},
                    compression=None,
                    ping_interval=None,
                    max_size=MAX_COMMAND_FRAME_BYTES,
                    close_timeout=5,
                    proxy=None,
                ) as socket_:
                    try:
                        await self._work(socket_)
                    except asyncio.CancelledError:
                        await socket_.close()  # else it says 1011, internal error
                        raise
                    socket_.transport.abort()  # a power cut has no close frame
            except (OSError, websockets.exceptions.WebSocketException) as error:
                self._fleet.note_error(error)
            await asyncio.sleep(random.uniform(*self.REBOOT_S))

    async def _work(self, socket_: websockets.ClientConnection) -> None:
        """Do what boards do until a power cut, the connection's end or a cancellation; then see that what was sent arrived."""
        metadata = {"device_id": self.device_id, "firmware_version": "2.0.0", "servo_count": 10}
        await self._send(socket_, "registration", device_type=self._plan.device_type, metadata=metadata)
        first, self.is_up = self.snapshots, True
        self._fleet.done["reconnects"] += self.has_been_up
        self.has_been_up = True
        until_cut_s = random.expovariate(self._plan.reconnect_rate / 60) if self._plan.reconnect_rate else None
        tasks = [asyncio.create_task(work(socket_)) for work in (self._heartbeat, self._report, self._answer)]
        try:
            await asyncio.wait(tasks, timeout=until_cut_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.is_up = False
            try:
                await end_tasks(tasks)
                async with asyncio.timeout(self.CONFIRM_TIMEOUT_S):
                    await (await socket_.ping())  # answered after all that came before it was handled
                self.confirmed.update(range(first, self.snapshots))
            except (OSError, websockets.exceptions.WebSocketException) as error:
                self._fleet.note_error(error)

    async def _send(self, socket_: websockets.ClientConnection, message_type: str, **fields: object) -> None:
        await socket_.send(to_json({"message_type": message_type} | fields))
        self._fleet.done["messages"] += 1

    async def _heartbeat(self, socket_: websockets.ClientConnection) -> None:
        while True:
            await self._send(socket_, "heartbeat", device_type=self._plan.device_type)
            await asyncio.sleep(self._plan.heartbeat_interval_s)

    async def _report(self, socket_: websockets.ClientConnection) -> None:
        await asyncio.sleep(random.random() * self._plan.status_interval_s)
        while True:
            payload = {"run": self._fleet.run, "seq": self.snapshots} | readings(self._number, time.monotonic())
            self.snapshots += 1
            await self._send(socket_, "status", payload=payload)
            await asyncio.sleep(self._plan.status_interval_s)

    async def _answer(self, socket_: websockets.ClientConnection) -> None:
        async for frame in socket_:
            message = json.loads(frame)
            if message["message_type"] == "error":
                self._fleet.note_error(message["error_message"])
                continue
            if self._plan.devices <= 10 and sys.stderr.isatty():  # \x1b[K clears what the live line had there
                shown = f"{self.device_id}: {message['command_name']!r} {json.dumps(message['payload'])}"
                print(f"\r{shown[:200]}\x1b[K", file=sys.stderr)
            await asyncio.sleep(self._plan.ack_delay_s)
            command_id, status = message["command_id"], "failure" if random.random() < self._plan.failure_rate else "success"
            await self._send(socket_, "command_ack", command_id=command_id, device_type=self._plan.device_type, status=status)
            self._fleet.done["acks"] += 1
            self._fleet.acked.setdefault(command_id, {})[self.device_id] = time.monotonic()


# What a question to the gateway can end with; a timeout is an OSError, an answer that is no JSON a ValueError.
NO_ANSWER = (OSError, aiohttp.ClientError, LookupError, ValueError)


class Fleet:
    """All boards of a plan, the caller who sends commands, and the auditor who asks the gateway what it has kept."""

    def __init__(self, plan: FleetPlan) -> None:
        self.plan = plan
        self.run = uuid.uuid4().hex[:8]  # tells its snapshots from those of another time
        self.done: Counter[str] = Counter()  # messages, acks, reconnects, errors
        self.acked: dict[str, dict[str, float]] = {}  # command_id -> device_id -> when it sent its ack (monotonic)
        self._last_error = ""
        self._boards = [SimulatedBoard(self, number) for number in range(1, plan.devices + 1)]
        self._posted: dict[str, tuple[float, float, int]] = {}  # command_id -> posted, answered (monotonic), boards targeted
        self._missing: list[str] = []
        self._session: aiohttp.ClientSession

    def note_error(self, error: Exception | str) -> None:
        """Something went wrong at a board."""
        self.done["errors"] += 1
        self._last_error = str(error) or type(error).__name__

    async def play(self, stop: asyncio.Event) -> int:
        """Play until the plan's duration is over or `stop` is set, audit, print the table.

        Returns the exit code: 1 if anything is missing. Raises StartError if the gateway doesn't answer, before or after.
        """
        headers = {"Authorization": f"Bearer {self.plan.api_token}"} if self.plan.api_token else {}
        try:
            async with aiohttp.ClientSession(self.plan.url, headers=headers) as self._session:
                await self._ask("GET", "/devices?device_type=none")
                began_s = time.monotonic()
                work = [self._show_progress(), self._send_commands(), *(board.live() for board in self._boards)]
                tasks = [asyncio.create_task(each) for each in [*work, stop.wait()]]
                try:
                    await asyncio.wait(tasks[-1:], timeout=self.plan.duration_s or None)
                finally:
                    await end_tasks(tasks)
                worked_s = time.monotonic() - began_s
                print("\nasking the gateway what it has kept …", file=sys.stderr)
                found = sum([await self._audit_board(board) for board in self._boards])
                for command_id, acks in self.acked.items():
                    answers = (await self._ask("GET", f"/command-logs/{command_id}")).get("response_data") or {}
                    if lost := acks.keys() - answers.keys():
                        self._missing.append(f"command {command_id}: {len(lost)} acks")
        except NO_ANSWER as error:
            raise StartError(f"no answer from {self.plan.url}: {error or type(error).__name__}") from None
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
        count, duration_s = self.plan.commands, self.plan.duration_s
        interval_s = duration_s / (count + 1) if count and duration_s else 3.0
        for number in itertools.count() if count is None else range(count):
            await asyncio.sleep(interval_s)
            body = {"device_type": self.plan.device_type, "command_name": "blink", "payload": {"count": number}}
            posted_s = time.monotonic()
            try:
                answer = await self._ask("POST", "/command", body)
                self._posted[answer["command_id"]] = (posted_s, time.monotonic(), answer["target_device_count"])
            except NO_ANSWER as error:
                self._missing.append(f"command {number}: {error or type(error).__name__}")

    async def _audit_board(self, board: SimulatedBoard) -> int:
        """Compare what a board sent with its history. Returns how many of its snapshots are there."""
        kept: set[int] = set()
        path = page = f"/state-history/{board.device_id}?limit=1000"
        while states := (await self._ask("GET", page)).get("states"):
            ours = [state["state_data"]["seq"] for state in states if state["state_data"].get("run") == self.run]
            kept.update(ours)
            if len(ours) < len(states):
                break
            page = f"{path}&before_id={states[-1]['id']}"
        if not board.has_been_up:
            self._missing.append(f"{board.device_id}, which never came up")
        if lost := board.confirmed - kept:
            self._missing.append(f"{board.device_id}: {len(lost)} of {board.snapshots} snapshots")
        return len(kept)

    async def _show_progress(self) -> None:
        """One live line on a terminal, else a line every ten seconds."""
        begin, end, pause_s = ("\r", "", 0.5) if sys.stderr.isatty() else ("", "\n", 10.0)
        for tick in itertools.count():
            up = f"boards up {sum(board.is_up for board in self._boards)}/{self.plan.devices}"
            counts = "  ".join(f"{name} {self.done[name]}" for name in ("messages", "acks", "errors"))
            print(f"{begin}{int(tick * pause_s):5} s  {up}  {counts}", end=end, file=sys.stderr, flush=True)
            await asyncio.sleep(pause_s)

    def _print_table(self, worked_s: float, found: int) -> None:
        sent = sum(board.snapshots for board in self._boards)
        unconfirmed = sent - sum(len(board.confirmed) for board in self._boards)
        acked_s = {command_id: self.acked.get(command_id, {}).values() for command_id in self._posted}
        whole_s = [
            max(acked_s[id_]) - at_s for id_, (at_s, _, boards) in self._posted.items() if len(acked_s[id_]) >= boards > 0
        ]
        for name, text in {
            "boards": f"{self.plan.devices} of type {self.plan.device_type}, {worked_s:.1f} s",
            "messages sent": f"{self.done['messages']}, {self.done['messages'] / worked_s:.0f} a second",
            "acks sent": f"{self.done['acks']}",
            "POST /command": percentiles([answered_s - at_s for at_s, answered_s, _ in self._posted.values()]),
            "all boards acked": percentiles(whole_s),
            "reconnects": f"{self.done['reconnects']}",
            "errors": f"{self.done['errors']}" + (f" (the last: {self._last_error})" if self._last_error else ""),
            "snapshots": f"{sent} sent, {found} in the history, {unconfirmed} not confirmed",
            "missing": f"{len(self._missing)} things" if self._missing else "nothing",
        }.items():
            print(f"{name:<18}{text}")
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


# Collections of the middle generation before a full one, five times as many as Python would wait for.
FULL_COLLECTION_THRESHOLD = 50

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
            default = "" if field.default in (None, "") else str(field.default)
            variable = variable_of(name) if kind is Settings else ""
            notes = " ".join(filter(None, (variable, default and f"default {default}")))
            text = f"{metadata_of(field.type, 'description')}; {requirement(field.type)}{notes and f' [{notes}]'}"
            metavar = "S" if name.endswith("_s") else name.rpartition("_")[2].upper()
            self.add_argument(flag, dest=name, metavar=metavar, help=text.replace("%", "%%"))

    def error(self, message: str) -> NoReturn:
        """What argparse calls for a flag or a word that it doesn't know."""
        raise ConfigError(f"{message}; '{self.prog} --help' shows all flags")


def _serve(words: Sequence[str]) -> int:
    parser = Parser("", Settings, f"Gateway for ESP32 boards: WebSocket for boards, REST for callers, SQLite.\n{USES}")
    parser.add_argument("--version", action="version", version=f"amhrpd {VERSION}")
    settings = Settings.load(vars(parser.parse_args(words)), os.environ)
    configure_logging(settings.log_level, settings.log_format)
    # Full garbage collections are made rare: one stops the loop for about half a microsecond an object, which is 80 ms
    # with 1,000 boards connected, measured on a server. What was imported lives for ever: nothing to look through.
    gc.freeze()
    gc.set_threshold(*gc.get_threshold()[:2], FULL_COLLECTION_THRESHOLD)
    return asyncio.run(_until_signal(functools.partial(serve, settings)))


def _simulate(words: Sequence[str]) -> int:
    parser = Parser("simulate", FleetPlan, f"Play a fleet of boards against a running gateway.\n{USES}")
    raise_open_files_limit()
    plan = FleetPlan(**read_settings(FleetPlan, vars(parser.parse_args(words)), os.environ))
    return asyncio.run(_until_signal(Fleet(plan).play))


async def _until_signal(run: Callable[[asyncio.Event], Awaitable[int]]) -> int:
    """Run something that ends early, and in order, when a signal sets its event. nohup's SIGHUP stays ignored."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return await run(stop)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for. Returns the exit code: 0, 1 for a failure, 2 for a bad setting."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] == ["simulate"]:
            return _simulate(words[1:])
        return _serve(words[1:] if words[:1] == ["serve"] else words)
    except (ConfigError, StartError) as error:
        priority = "<3>" if is_stderr_the_journal() else ""
        print(f"{priority}amhrpd: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    sys.exit(main())
