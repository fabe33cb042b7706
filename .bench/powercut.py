"""What a power cut costs: the gateway on a file system of its own, whose image is copied at random moments.

    sudo .venv/bin/python .bench/powercut.py [--cuts 10] [--sync-intervals 5,1,0]

The copy is what the card would have had: it is mounted, its journal is replayed, the database in it is looked at. The file
system writes its journal once a minute (`commit=60`), so that what is on the card is there because the gateway synced it.
Needs root, a loop device and mkfs.ext4. Exit code 1 where a file is damaged or more is missing than may be: what was answered
longer ago than the interval and a second, and with 0 anything at all.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import websockets

HERE = Path(__file__).resolve().parent.parent
BESIDE_S = 1.0  # what a sync may take
PORT = 18473


@contextlib.contextmanager
def mounted(image: Path, at: Path) -> Iterator[Path]:
    """An image as a file system."""
    at.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop,commit=60", image, at], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", at], check=True)


class Answered:
    """Commands that were answered, by when that was (monotonic)."""

    def __init__(self) -> None:
        self.at_s: dict[str, float] = {}
        self.reports = 0

    async def board(self) -> None:
        """A board that reports ten times a second and acknowledges."""
        async with websockets.connect(f"ws://127.0.0.1:{PORT}/ws/bench", proxy=None, compression=None) as board:
            await board.send(json.dumps({"message_type": "registration", "device_type": "ESP32"}))

            async def report() -> None:
                while True:
                    await board.send(json.dumps({"message_type": "status", "payload": {"n": self.reports}}))
                    self.reports += 1
                    await asyncio.sleep(0.1)

            reporting = asyncio.create_task(report())
            try:
                async for text in board:
                    command_id = json.loads(text)["command_id"]
                    await board.send(json.dumps({"message_type": "command_ack", "command_id": command_id}))
            finally:
                reporting.cancel()
                await asyncio.gather(reporting, return_exceptions=True)

    async def call(self) -> None:
        """Post commands, one after the other."""
        async with aiohttp.ClientSession() as session:
            while True:
                body = {"device_id": "bench", "command_name": "blink", "wait": 5}
                async with session.post(f"http://127.0.0.1:{PORT}/command", json=body) as response:
                    answer = await response.json()
                if response.status == 200 and answer["status"] == "ack_success" and "persisted" not in answer:
                    self.at_s[answer["command_id"]] = time.monotonic()
                await asyncio.sleep(0.02)


def look(image: Path, work: Path) -> tuple[str, set[str]]:
    """What SQLite says of the file in an image, and which commands are in it as answered."""
    with mounted(image, work / "after") as there, contextlib.closing(sqlite3.connect(there / "amhrpd.db")) as db:
        whole = str(db.execute("PRAGMA integrity_check").fetchone()[0])
        return whole, {row[0] for row in db.execute("SELECT command_id FROM command_logs WHERE status = 'ack_success'")}


async def ready() -> None:
    """Wait until the gateway answers."""
    async with aiohttp.ClientSession() as session, asyncio.timeout(30):
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"http://127.0.0.1:{PORT}/health"):
                    return
            await asyncio.sleep(0.1)


async def cut_often(interval_s: float, cuts: int, work: Path) -> bool:
    """Let the gateway work and cut its power so often; True where nothing is missing that must be there."""
    image = work / "card.img"
    image.unlink(missing_ok=True)
    with image.open("wb") as file:
        file.truncate(96 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    answered, is_good, worst_s = Answered(), True, 0.0
    with mounted(image, work / "card") as card:
        environ = {
            "DATABASE_URL": f"sqlite:///{card}/amhrpd.db",
            "AMHRPD_PORT": str(PORT),
            "AMHRPD_HOST": "127.0.0.1",
            "AMHRPD_SYNC_INTERVAL": f"{interval_s:g}",
            "AMHRPD_LOG_LEVEL": "error",
        }
        gateway = subprocess.Popen([sys.executable, HERE / "amhrpd.py"], env={"PATH": os.environ["PATH"]} | environ)
        try:
            await ready()
            tasks = [asyncio.create_task(answered.board())]
            await asyncio.sleep(0.5)
            tasks.append(asyncio.create_task(answered.call()))
            for number in range(1, cuts + 1):
                await asyncio.sleep(random.uniform(1, 3) + (interval_s if number == 1 else 0))
                gateway.send_signal(signal.SIGSTOP)
                cut_s, due = time.monotonic(), dict(answered.at_s)
                shutil.copyfile(image, work / "cut.img")
                gateway.send_signal(signal.SIGCONT)
                whole, found = await asyncio.to_thread(look, work / "cut.img", work)
                lost = {command_id: cut_s - at_s for command_id, at_s in due.items() if command_id not in found}
                oldest_s = max(lost.values(), default=0.0)
                worst_s = max(worst_s, oldest_s)
                is_good &= whole == "ok" and (not lost if interval_s == 0 else oldest_s <= interval_s + BESIDE_S)
                print(
                    f"sync interval {interval_s:g} s, cut {number:2}: file {whole}, {len(due)} answered, {len(lost)} gone, "
                    f"the oldest answered {oldest_s:.2f} s before the cut",
                    flush=True,
                )
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            gateway.terminate()
            gateway.wait(30)
    print(
        f"sync interval {interval_s:g} s: at most {worst_s:.2f} s gone: {'as promised' if is_good else 'TOO MUCH'}", flush=True
    )
    return is_good


def main() -> int:
    """Cut as the command line says. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=10, help="how often for each interval [10]")
    parser.add_argument("--sync-intervals", default="5,1,0", help="seconds, with commas between [5,1,0]")
    arguments = parser.parse_args()
    results = []
    for interval in arguments.sync_intervals.split(","):
        with tempfile.TemporaryDirectory() as work:
            results.append(asyncio.run(cut_often(float(interval), arguments.cuts, Path(work))))
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
