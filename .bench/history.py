#!/usr/bin/env python3
"""Histories of a large file: how long every kind of question takes, and the start.

    .venv/bin/python .bench/history.py [--rows 10000000] [--rounds 3] [--file large.db]

The file is made as an earlier version left it, with its indexes: 1,000 devices, two and a half years. The first start replaces
those; then, from the first moment on, each question is asked five times beside 14 boards. What is printed is the median of the
questions' medians, and the slowest of them. Ten million rows take 5 GB and four minutes to make.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import re
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp

AMHRPD = str(Path(__file__).resolve().parent.parent / "amhrpd.py")
EARLIER_INDEXES = {
    "ix_amhrpd_snapshots": "device_state_snapshots (device_id, id, timestamp)",
    "ix_amhrpd_events": "device_connection_logs (device_id, id, timestamp)",
    "ix_amhrpd_events_event": "device_connection_logs (device_id, event)",
    "ix_amhrpd_commands_status": "command_logs (status)",
    "ix_amhrpd_commands_type": "command_logs (device_type)",
    "ix_amhrpd_commands_type_status": "command_logs (device_type, status)",
}
REPEATS = 5
START_TIMEOUT_S = 1800
SPAN_S = 79_000_000  # two and a half years from 2024-01-01
BARELY, FAR_BACK, LONG_AGO, MIDDLE = "2026-06-30T00:00:00", "2024-01-02T00:00:00", "2020-01-01T00:00:00", "2025-04-01T12:00:00"


def free_port() -> int:
    """A port that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Gateway:
    """A gateway on a file, and what it logs."""

    def __init__(self, path: Path) -> None:
        self.port = free_port()
        self.events: list[str] = []
        self._is_listening = threading.Event()
        environ = {"AMHRPD_PORT": str(self.port), "AMHRPD_HOST": "127.0.0.1", "DATABASE_URL": f"sqlite:///{path}"}
        began_s = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, AMHRPD, "--log-format", "journal"], env=os.environ | environ, stderr=subprocess.PIPE, text=True
        )
        threading.Thread(target=self._read, daemon=True).start()
        if not self._is_listening.wait(START_TIMEOUT_S):
            raise TimeoutError("the gateway doesn't start")
        self.start_s = time.monotonic() - began_s

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            event = re.sub("^<.>", "", line).split()[0]
            self.events.append(event)
            if event == "listening":
                self._is_listening.set()

    def stop(self) -> None:
        """Stop it, and say what went wrong if anything did."""
        self.process.send_signal(signal.SIGTERM)
        if self.process.wait(60) != 0:
            raise RuntimeError(f"exit code {self.process.returncode}")


def make(path: Path, rows: int) -> None:
    """Fill a file with so many rows of each history."""
    Gateway(path).stop()
    devices = "'d' || (i * 7 % 1000), 'T' || (i * 7 % 20)"
    seconds = f"1704067200 + i * {SPAN_S / rows}"
    when = f"strftime('%Y-%m-%d %H:%M:%S', {seconds}, 'unixepoch') || printf('.%06d', i * 7919 % 1000000)"
    event = "CASE WHEN i % 997 = 0 THEN 'timeout' WHEN i % 2 THEN 'connected' ELSE 'disconnected' END"
    status = (
        "CASE WHEN i % 1009 = 0 THEN 'ack_error' WHEN i % 101 = 0 THEN 'ack_timeout' WHEN i % 503 = 0 THEN 'no_devices' "
        "ELSE 'ack_success' END"
    )
    device_type = "CASE WHEN i % 1000003 = 5 THEN 'RARE' ELSE 'T' || (i % 20) END"
    command_id = "printf('%08x-%d', i * 2654435761 % 4294967296, i)"  # in no order
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)"
    inserts = {
        "devices": f"SELECT 'd' || (i - 1), 'T' || ((i - 1) % 20), 0, {when}, {when}, NULL, '{{}}' FROM n",
        "device_state_snapshots": f'SELECT i, {devices}, printf(\'{{"temperature":25.3,"n":%d}}\', i), {when} FROM n',
        "device_connection_logs": f'SELECT i, {devices}, {event}, {when}, \'{{"reason":"closed by the device"}}\' FROM n',
        "command_logs": f"SELECT {command_id}, {device_type}, 'blink', '{{\"k\":1}}', {status}, {when}, {when}, {when}, "
        "'{}', 10, 10 FROM n",
    }
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -1000000; BEGIN")
        for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL").fetchall():
            database.execute(f"DROP INDEX {name}")
        began_s = time.monotonic()
        for table, select in inserts.items():
            database.execute(f"INSERT INTO {table} {numbers} {select}", (1000 if table == "devices" else rows,))
            print(f"{time.monotonic() - began_s:5.0f} s  {table}", flush=True)
        for name, columns in EARLIER_INDEXES.items():
            database.execute(f"CREATE INDEX {name} ON {columns}")
            print(f"{time.monotonic() - began_s:5.0f} s  {name}", flush=True)
        database.execute("COMMIT")
        database.execute("PRAGMA journal_mode = WAL")


def questions(rows: int) -> Iterator[str]:
    """Every filter alone and with others, and some that find few rows or none."""
    times = [
        "&".join(f"{name}={value}" for name, value in zip(("since", "until"), pair, strict=True) if value)
        for pair in itertools.product((None, FAR_BACK, BARELY), (None, LONG_AGO, MIDDLE))
    ]
    for limit, before, moment in itertools.product(("limit=100", "limit=1"), ("", f"before_id={rows // 2}"), times):
        yield f"/state-history/d7?{'&'.join(filter(None, (limit, before, moment)))}"
    for event, moment in itertools.product(("", "event=connected", "event=timeout"), times):
        yield f"/device-connection-history/d7?{'&'.join(filter(None, ('limit=100', event, moment)))}"
    statuses = ("", *(f"status={status}" for status in ("ack_success", "ack_error", "no_devices", "sent")))
    types = ("", *(f"device_type={name}" for name in ("T3", "RARE", "NOBODY")))
    for status, device_type, moment in itertools.product(statuses, types, times):
        yield f"/command-logs?{'&'.join(filter(None, ('limit=100', status, device_type, moment)))}"


async def ask(session: aiohttp.ClientSession, port: int, path: str) -> float:
    """Milliseconds until a question is answered whole."""
    began_s = time.perf_counter()
    async with session.get(f"http://127.0.0.1:{port}{path}") as answer:
        await answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status}")
    return (time.perf_counter() - began_s) * 1000


async def ask_everything(gateway: Gateway, rows: int) -> dict[str, float]:
    """The median of each question, in milliseconds."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session:
        medians = {}
        for question in questions(rows):
            medians[question] = statistics.median([await ask(session, gateway.port, question) for _ in range(REPEATS)])
    return medians


def measure(path: Path, rows: int) -> None:
    """One round: a start, and all questions."""
    gateway = Gateway(path)
    url = f"http://127.0.0.1:{gateway.port}"
    fleet = subprocess.Popen(
        [sys.executable, AMHRPD, "simulate", "--url", url, "--devices", "14", "--commands", "0", "--duration", "0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        medians = asyncio.run(ask_everything(gateway, rows))
    finally:
        fleet.terminate()
        fleet.wait(30)
        gateway.stop()
    slowest = sorted(medians, key=lambda question: -medians[question])
    print(f"listening after {gateway.start_s:.2f} s; {gateway.events.count('index_dropped')} indexes replaced")
    over = sum(median > 20 for median in medians.values())
    print(f"{len(medians)} questions: median {statistics.median(medians.values()):.1f} ms, {over} over 20 ms; the slowest:")
    print(*(f"{medians[question]:8.1f} ms  {question}" for question in slowest[:3]), sep="\n", flush=True)


def main() -> None:
    """Make the file where it isn't there, and measure."""
    parser = argparse.ArgumentParser(description="How long every kind of question about a large file takes.")
    parser.add_argument("--rows", type=int, default=10_000_000, help="of each history [default %(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="[default %(default)s]")
    parser.add_argument("--file", type=Path, help="to be kept, and used where it is there already")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = (arguments.file or Path(folder) / "large.db").absolute()
        if not path.exists():
            make(path, arguments.rows)
        began_s = time.monotonic()
        subprocess.run([sys.executable, "-c", "import amhrpd"], cwd=Path(AMHRPD).parent, check=True)
        print(f"{path.stat().st_size / 1e9:.1f} GB; the imports alone take {time.monotonic() - began_s:.2f} s", flush=True)
        for _ in range(arguments.rounds):
            measure(path, arguments.rows)


if __name__ == "__main__":
    main()
