#!/usr/bin/env python3
"""What can a leaked key do? Measures what a flood of made-up names costs everybody else.

    python examples/hostile.py [--reports 500000] [--server FILE] [--dir DIR]

Sends reports with one key to a real server on this host. Half of them are crashes, and every type, group, model,
version, device, session and day is new. Prints the size and time of the public answers after the flood, and the speed
of another app's reports before and after it. At the end it prunes all reports, and prints how large the file still is.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles

from benchmark import CRASH, EVENTS, FIGURES, HERE, Bench, backfeedr, over_network, process, rfc3339, say

CLIENTS = 8  # connections that send the flood
ASKED = 20  # times that each public answer is asked for
LONG = "x" * 400  # makes names long
PRUNE = """
import sys, time
sys.path.insert(0, sys.argv[1])
import backfeedr
with backfeedr.Store(sys.argv[2], lambda: time.time() + 400 * 86_400, retention_days=1) as store:
    store.prune()
"""


def names(number: int, now: float) -> dict:
    """The fields of a report with new names only."""
    return {"app_version": f"{number}.{LONG}", "device_model": f"m{number}{LONG}", "device_id_hash": f"d{number}",
            "session_id": f"s{number}", "occurred_at": rfc3339(now - 3_600 * (number % 160_000))}


def flood(url: str, reports: int) -> None:
    """Sends the reports: crashes one by one, events in batches of 100."""
    def send(first: int) -> None:
        ask, now = over_network(url), time.time()
        for start in range(first, first + reports // CLIENTS, 200):
            for number in range(start, start + 100):
                ask(CRASH.path, json.dumps({**names(number, now), "exception_type": f"t{number}{LONG}"}).encode())
            events = [{**names(number, now), "type": "session_start"} for number in range(start + 100, start + 200)]
            ask(EVENTS.path, json.dumps({"events": events}).encode())
            say(f"{start - first + 200:,} of {reports // CLIENTS:,}") if not first and start % 10_000 == 0 else None

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(send, range(0, reports, reports // CLIENTS)))


def measure(bench: Bench, file: Path, db: Path, reports: int, seconds: float) -> None:
    """Sends the flood and prints what it costs."""
    with ExitStack() as stack:
        url = stack.enter_context(backfeedr(file, "--db", db)).url
        with process(sys.executable, file, "app", "create", "Other", "--db", db) as command:
            other = f"{url}#{command.communicate()[0].strip()}"
        bodies = bench.bodies(CRASH)

        def speed() -> float:
            return bench.load([other], db, CRASH, bodies, 16, lambda: time.sleep(seconds))[0].rate

        before = speed()
        flood(url, reports)
        after, ask = speed(), over_network(url)
        print(f"{reports:,} reports; the file has {db.stat().st_size / 1e6:,.0f} MB")
        print(f"another app's crashes/s, before and after: {before:,.0f} and {after:,.0f} ({before / after:.2f})")
        for path in FIGURES:
            answers = [ask(path) for _ in range(ASKED)]
            print(f"{path:45}{len(answers[0].body):>8,} bytes {median(each.ms for each in answers):7.2f} ms,"
                  f" p95 {quantiles((each.ms for each in answers), n=20)[18]:7.2f} ms")
    began = time.monotonic()
    with process(sys.executable, "-c", PRUNE, file.parent, db) as pruning:
        pruning.wait()
    print(f"pruned in {time.monotonic() - began:,.0f} s: {db.stat().st_size / 1e6:,.2f} MB are left")


def main(*argv: str) -> int:
    parser = argparse.ArgumentParser(description="Measures what a flood of made-up names costs everybody else.")
    parser.add_argument("--reports", type=int, default=500_000, metavar="N", help="default: 500000")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="N", help="load of the other app (default: 5)")
    parser.add_argument("--server", type=Path, default=HERE.parent / "backfeedr.py", help="a backfeedr.py")
    parser.add_argument("--dir", type=Path, default=Path("."), help="folder for the database (default: here)")
    given = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="backfeedr-hostile-", dir=given.dir) as folder:
            bench = Bench(Path(folder).resolve(), uses_wrk=False)
            measure(bench, given.server.resolve(), bench.folder / "hostile.db", max(200 * CLIENTS, given.reports),
                    given.seconds)
    except (KeyboardInterrupt, Exception) as error:
        print(f"hostile: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
