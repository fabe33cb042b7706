#!/usr/bin/env python3
"""How many calls of the gateway's own functions a status frame and a command take; those of the libraries are left out.

    .venv/bin/python .bench/calls.py [--list]

The daemon runs in a thread of this process, on real sockets and a real file, and is looked at with `sys.setprofile` in each of
its threads. Counted are one status frame, from the socket into the file, and one `POST /command` to ten boards without `wait`,
until the caller has its answer; what is done behind that, until the row says `sent`, is shown too. A function that goes on
after an `await` counts once more, a comprehension is a part of its function. One at a time, after some that warm up; shown is
the median of ten, since what is due regularly may come in between. `--list` names the functions as they are called.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import sqlite3
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import aiohttp
import websockets

AMHRPD = Path(__file__).resolve().parent.parent / "amhrpd.py"
ROUNDS, WARM_UP, BOARDS = 10, 20, 10
PATIENCE_S = 10.0


def load() -> ModuleType:
    """The module beside this folder, wherever this is started from."""
    spec = importlib.util.spec_from_file_location("amhrpd", AMHRPD)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["amhrpd"] = module
    spec.loader.exec_module(module)
    return module


class Calls:
    """The functions of the module that were called, while it looks."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sent = 0  # of them, before the loop's thread sent something for the last time
        self.is_looking = False
        self.loop_thread = 0

    def note(self, frame: FrameType, event: str, what: Any) -> None:
        """What Python calls with each call, in each thread."""
        code = frame.f_code
        if not self.is_looking:
            return
        if event == "call" and code.co_filename == str(AMHRPD) and (code.co_name[0] != "<" or code.co_name == "<lambda>"):
            self.names.append(code.co_qualname)
        elif event == "c_call" and what.__name__ in ("send", "sendmsg") and threading.get_ident() == self.loop_thread:
            self.sent = len(self.names)


class Daemon:
    """The gateway in a thread and a loop of its own."""

    def __init__(self, amhrpd: ModuleType, database: Path, calls: Calls) -> None:
        self._settings = amhrpd.Settings(
            host="127.0.0.1", port=0, database_url=f"sqlite:///{database}", commit_interval_s=0.0, ping_interval_s=3600.0
        )
        self._serve, self._calls = amhrpd.serve, calls
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._is_ready = threading.Event()
        self.port = 0
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Daemon:
        threading.setprofile(self._calls.note)
        self._thread.start()
        if not self._is_ready.wait(PATIENCE_S):
            raise SystemExit("the gateway doesn't start")
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        threading.setprofile(None)

    def _run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._calls.loop_thread = threading.get_ident()
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        await self._serve(self._settings, self._stop, self._note_ready)

    def _note_ready(self, port: int) -> None:
        self.port = port
        self._is_ready.set()


async def until(look: Callable[[], Awaitable[bool]]) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(PATIENCE_S):
        while not await look():
            await asyncio.sleep(0.02)


async def count(calls: Calls, act: Callable[[int], Awaitable[None]]) -> list[tuple[list[str], int]]:
    """What each of ROUNDS acts called, after WARM_UP more, and how many of it before something was sent for the last time."""
    found = []
    for number in range(WARM_UP + ROUNDS):
        calls.names, calls.sent, calls.is_looking = [], 0, True
        await act(number)
        await asyncio.sleep(0.05)  # what follows it belongs to it
        calls.is_looking = False
        found.append((calls.names, calls.sent))
    return found[WARM_UP:]


async def measure(daemon: Daemon, database: Path, calls: Calls) -> tuple[list[tuple[list[str], int]], ...]:
    """Play the boards and the caller."""
    url = f"127.0.0.1:{daemon.port}"
    file = sqlite3.connect(f"file:{database}?mode=ro", uri=True, isolation_level=None)
    boards = [
        await websockets.connect(f"ws://{url}/ws/b{number}", compression=None, ping_interval=None, proxy=None)
        for number in range(BOARDS)
    ]
    async with aiohttp.ClientSession(f"http://{url}") as session:
        for board in boards:
            await board.send('{"message_type": "registration", "device_type": "ESP32"}')

        async def are_all_online() -> bool:
            async with session.get("/health") as response:
                return bool((await response.json())["devices_online"] == BOARDS)

        await until(are_all_online)

        async def status(number: int) -> None:
            await boards[0].send(json.dumps({"message_type": "status", "payload": {"number": number}}))

            async def is_in_the_file() -> bool:
                rows = file.execute("SELECT max(json_extract(state_data, '$.number')) FROM device_state_snapshots")
                return bool(rows.fetchone()[0] == number)

            await until(is_in_the_file)

        async def command(number: int) -> None:
            async with session.post("/command", params={"device_type": "ESP32", "command_name": f"c{number}"}) as response:
                assert (await response.json())["target_device_count"] == BOARDS
            for board in boards:
                await board.recv()

            async def is_in_the_file() -> bool:
                rows = file.execute(
                    "SELECT count(*) FROM command_logs WHERE command_name = ? AND status = 'sent'", (f"c{number}",)
                )
                return bool(rows.fetchone()[0])

            await until(is_in_the_file)

        found = await count(calls, status), await count(calls, command)
    for board in boards:
        await board.close()
    file.close()
    return found


def show(name: str, rounds: list[list[str]], *, is_listed: bool) -> None:
    """Print a line, and the functions."""
    least, *_, most = counts = sorted(map(len, rounds))
    middle = next(names for names in rounds if len(names) == counts[ROUNDS // 2])
    print(f"{name:<32}{len(middle):4} calls of {len(set(middle)):3} functions ({least} to {most})")
    if is_listed:
        print("".join(f"    {called}\n" for called in middle))


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name the functions, in the order of their calls")
    arguments = parser.parse_args()
    calls, amhrpd = Calls(), load()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the log is written as in real life
    amhrpd.configure_logging("info", "json")
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder) / "calls.db"
        with Daemon(amhrpd, database, calls) as daemon:
            statuses, commands = asyncio.run(measure(daemon, database, calls))
    show("a status frame, into the file", [names for names, _ in statuses], is_listed=arguments.list)
    show("POST /command, to its answer", [names[:sent] for names, sent in commands], is_listed=arguments.list)
    show("and behind that", [names[sent:] for names, sent in commands], is_listed=arguments.list)


if __name__ == "__main__":
    main()
