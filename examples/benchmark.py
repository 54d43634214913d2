#!/usr/bin/env python3
"""How much can my host take? Measures backfeedr on this machine, in a few minutes.

    python examples/benchmark.py                # ingestion of reports; --quick gives a first impression
    python examples/benchmark.py metrics        # the cost of a growing database
    python examples/benchmark.py postgres URL   # SQLite, and PostgreSQL with one or two hosts and apps
    python examples/benchmark.py --server old/backfeedr.py --server new/backfeedr.py   # two versions; or `metrics`

The real server takes turns with a bare handler: bottle and waitress with the same options. The handler reads the body
and gives an answer of the same size, but stores nothing. The load comes from `wrk`, or from Python, which makes all
servers look slower. No host is quiet, so sides take short turns within a round, and a ratio is the median of rounds.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict, namedtuple
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from datetime import datetime, timezone
from functools import partial
from math import inf
from pathlib import Path
from statistics import median, quantiles
from types import SimpleNamespace
from typing import Any, Callable
from urllib.parse import urlencode, urlsplit

HERE = Path(__file__).resolve().parent
KEY, TOKEN, HEALTH = "bf_live_" + "b" * 32, "bf_admin_" + "b" * 32, "/api/v1/health"
ROUND_SECONDS, QUICK_SECONDS = 2.5, 0.8  # about how long a side is loaded in a round, and with --quick
PATIENCE = 30.0  # seconds for a server to stop or to answer
SIZE_EVENTS, TURN = 20_000, 20  # events to measure sizes and raw inserts with; requests in a side's turn
say = partial(print, file=sys.stderr, flush=True)  # progress
# == Reports ===================================================================

SPAN = 90 * 86_400  # seconds that the reports of a filled database cover
DEVICES, GROUPS, VERSIONS, MODELS, EVENTS_PER_CRASH = 20_000, 300, 40, 25, 100
EXAMPLES = {kind: json.loads((HERE / f"{kind}.json").read_text()) for kind in ("crash", "event")}
Scenario = namedtuple("Scenario", "name path table reports bodies body")  # a number of bodies, and body(number)


def rfc3339(seconds: float) -> str:
    """Formats a time for the API."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds")


def report(kind: str, device: int, at: float, share: float = 1.0) -> dict:
    """The crash or event of the examples, from a device. Versions grow with `share`, the part of SPAN that is over."""
    version = max(0, int((VERSIONS - 1) * share) - (device % 6 if device % 5 == 0 else 0))  # one in five is behind
    return {**EXAMPLES[kind], "device_id_hash": f"{device * 2654435761 % (1 << 32):08x}".ljust(16, "0"),
            "device_model": f"iPhone{10 + device % MODELS},1", "app_version": f"{1 + version // 10}.{version % 10}.0",
            "occurred_at": rfc3339(at)}


def crash(device: int, group: int, at: float, share: float = 1.0) -> dict:
    """A crash of a group."""
    first, *others = EXAMPLES["crash"]["stack_trace"]
    return {**report("crash", device, at, share), "exception_type": f"SIG{group % 8}",
            "exception_reason": f"Unexpectedly found nil in Screen{group}, item {device % 50}",
            "stack_trace": [{**first, "symbol": f"Screen{group // 8}.body.getter"}, *others]}


def batch(number: int) -> dict:
    """The start of a session and 99 of its events."""
    event = {**report("event", number, time.time()), "session_id": f"sess_{number:06x}"}
    return {"events": [{**event, "type": "session_start"}] + [event] * 99}


def visit(choose: random.Random, now: float, share: float = 1.0) -> list[dict]:
    """The 10 to 20 events of a session that took seconds to an hour and ended some minutes before `now`."""
    device, session = choose.randrange(DEVICES), f"{choose.getrandbits(128):032x}"
    seconds, ended = 2 ** choose.uniform(1, 11.8), now - choose.expovariate(1 / 600)
    times = sorted(ended - seconds * choose.random() for _ in range(choose.randint(8, 18)))
    kinds = ["session_start"] + ["custom"] * len(times) + ["session_end"]
    return [{**report("event", device, at, share), "session_id": session, "type": kind}
            for kind, at in zip(kinds, [ended - seconds, *times, ended])]


CRASH = Scenario("crash", "/api/v1/crashes", "crashes", 1, 256, lambda n: crash(n, n % 128, time.time()))
EVENTS = Scenario("batch of 100", "/api/v1/events/batch", "events", 100, 256, batch)
FRESH = EVENTS._replace(name="new batch of 100", bodies=1500)  # enough for a round: a session is new only once


# == Figures ===================================================================

class Table:
    """Figures by name and side, with a value per round or request, and the ratios of pairs of sides.

    A target is the name of a figure, the second side of its ratio or "value", the least and the most allowed.
    """

    def __init__(self, sides: Iterable[str], pairs: Sequence[tuple], targets: Iterable[tuple] = ()):
        self.sides, self.pairs, self.targets = list(sides), pairs, list(targets)
        self.values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def add(self, name: str, side: str, *values: float | None) -> None:
        """Adds values. None means that the system does not tell."""
        self.values[name][side] += [value for value in values if value is not None]

    def show(self, title: str) -> None:
        """Prints the medians, the ratios, and whether targets are met."""
        rows = [[title, *self.sides, *(f"{above} / {below}" for above, below in self.pairs), ""]]
        for name, values in self.values.items():
            figures = [values[side] for side in self.sides] + [self.ratios(name, *pair) for pair in self.pairs]
            cells = [f"{median(each):,.{0 if median(each) >= 100 else 2}f}" if each else "-" for each in figures]
            rows.append([name, *cells, self.judged(name)])
        widths = [max(map(len, column)) for column in zip(*rows)]
        for row in rows:
            cells = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:])]
            print("  ".join([row[0].ljust(widths[0]), *cells, row[-1]]).rstrip())
        print(flush=True)

    def ratios(self, name: str, above: str, below: str) -> list[float]:
        return [a / b for a, b in zip(self.values[name][above], self.values[name][below]) if b]

    def judged(self, name: str) -> str:
        texts = []
        for _, kind, least, most in (target for target in self.targets if target[0] == name):
            figures = [self.ratios(name, *pair) for pair in self.pairs if pair[1] == kind]
            figures += [self.values[name][above] for above, _ in self.pairs if kind == "value"]
            if medians := [median(each) for each in figures if each]:
                verdict = "met" if least <= min(medians) and max(medians) <= most else "NOT MET"
                texts.append(f"{kind} {f'>= {least:g}' if least else f'<= {most:g}'} {verdict}")
        return ", ".join(texts)


# == Servers and load ==========================================================

@contextmanager
def process(*command: Any, **settings: str) -> Iterator[subprocess.Popen]:
    """A subprocess without the BACKFEEDR_ variables of this one. It is terminated with the block, or killed."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("BACKFEEDR_")}
    with subprocess.Popen([*map(str, command)], env={**ours, **settings}, stdout=subprocess.PIPE, text=True) as running:
        try:
            yield running
        finally:
            running.terminate()
            try:
                running.wait(PATIENCE)
            finally:
                running.kill()


@contextmanager
def serving(*command: Any, **settings: str) -> Iterator[Any]:
    """A Python program that prints a line when it is ready; a server's line ends with its URL."""
    with process(sys.executable, *command, **settings) as running:
        words = running.stdout.readline().split()  # type: ignore[union-attr]
        if not words:
            raise ChildProcessError(f"{command[0]} did not start")
        running.url = words[-1]  # type: ignore[attr-defined]
        yield running


def backfeedr(*command: Any, keeps_days: int = 0) -> Any:
    """The real server as its operator starts it, but without a rate limit."""
    return serving(*command, "--host", "127.0.0.1", "--port", "0", BACKFEEDR_API_KEY=KEY,
                   BACKFEEDR_AUTH_TOKEN=TOKEN, BACKFEEDR_RATE_LIMIT="0", BACKFEEDR_RETENTION_DAYS=str(keeps_days))


def megabytes(pid: int, name: str) -> float | None:
    """The memory of a process now (VmRSS), or its peak (VmHWM). None if the system does not tell."""
    status = Path(f"/proc/{pid}/status")
    found = re.search(rf"{name}:\s*(\d+)", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 / 1e6 if found else None


def bare(_: str) -> None:
    """Serves the bare handler until SIGTERM, with the options of the real server."""
    import bottle
    import waitress

    app = bottle.Bottle()
    answers = {CRASH.path: {"id": "0" * 16, "group_hash": "0" * 16}, HEALTH: {"status": "ok"},
               EVENTS.path: {"count": 100, "ids": [f"evt_{n:016x}" for n in range(100)]}}

    @app.route("<path:path>", ["GET", "POST"])
    def handle(path: str) -> bottle.HTTPResponse:
        bottle.request.environ["wsgi.input"].read(bottle.request.content_length)
        return bottle.HTTPResponse(json.dumps(answers[path]).encode(), 201, {"Content-Type": "application/json"})

    server = waitress.create_server(
        app, listen="127.0.0.1:0", threads=32, ident=None, max_request_body_size=1 << 20, connection_limit=900,
        max_request_header_size=32768, recv_bytes=65536, asyncore_use_poll=True, clear_untrusted_proxy_headers=False)
    print(f"bare on http://127.0.0.1:{server.effective_port}", flush=True)
    sys.setswitchinterval(0.002)
    server.run()


def over_network(url: str) -> Callable[..., SimpleNamespace]:
    """Asks a server on one connection: headers, body, milliseconds. The URL may end with # and the key of an app."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE)
    ours = {"Content-Type": "application/json", "X-Backfeedr-Key": urlsplit(url).fragment or KEY}

    def ask(path: str, body: bytes | None = None, **headers: str) -> SimpleNamespace:
        started = time.perf_counter()
        connection.request("GET" if body is None else "POST", path, body, {**ours, **headers})
        answer = connection.getresponse()
        text, ms = answer.read(), 1000 * (time.perf_counter() - started)
        if answer.status not in (200, 201, 303):
            raise ConnectionError(f"{path} was answered {answer.status}: {text[:200].decode()}")
        return SimpleNamespace(headers=answer.headers, body=text, ms=ms)
    return ask


def client(_: str, url: str, path: str, file: str, connections: str) -> None:
    """Does what wrk does with benchmark.lua, but waits for the last answers at SIGINT, and fails at a bad answer."""
    bodies, stop, began = Path(file).read_bytes().splitlines(), threading.Event(), time.monotonic()
    signal.signal(signal.SIGINT, lambda *_: stop.set())

    def keep_busy(number: int) -> list[float]:
        ask, times = over_network(url), []  # type: Any, list[float]
        while len(times) < 2 or not stop.is_set():  # a percentile needs two
            times.append(ask(path, bodies[(number + len(times)) % len(bodies)]).ms)
        return times

    print("ready", flush=True)
    with ThreadPoolExecutor(int(connections)) as pool:
        times = [ms for part in pool.map(keep_busy, range(int(connections))) for ms in part]
    print(json.dumps({"created": len(times), "errors": 0, "seconds": time.monotonic() - began,
                      "p50": median(times), "p99": quantiles(times, n=100)[98], "longest": max(times)}))


class Bench:
    """Sends load from a folder of its own, and counts what was acknowledged and what failed."""

    def __init__(self, folder: Path, uses_wrk: bool):
        self.folder, self.uses_wrk, self.errors = folder, uses_wrk, 0
        self.problems: list[str] = []
        self.acknowledged, self.unsure = Counter(), Counter()  # type: Counter, Counter

    def bodies(self, scenario: Scenario, number: int = 0) -> Path:
        """A file of bodies, one per line; different ones for each number."""
        path, first = self.folder / f"{scenario.name}.jsonl", number * scenario.bodies
        path.write_text("".join(json.dumps(scenario.body(first + n)) + "\n" for n in range(scenario.bodies)))
        return path

    def load(self, urls: Sequence[str], db: Any, scenario: Scenario, bodies: Path, connections: int,
             meanwhile: Callable[[], Any]) -> tuple[SimpleNamespace, Any]:
        """Loads the servers of a database until `meanwhile` returns. Gives the results of both."""
        share = max(1, connections // len(urls))
        wrk = ["wrk", "-t1", f"-c{share}", f"-d{40 * PATIENCE:.0f}", f"--timeout={PATIENCE:.0f}",
               "-s", HERE / "benchmark.lua"]
        with ExitStack() as stack:
            senders = [stack.enter_context(
                process(*wrk, f"-HX-Backfeedr-Key: {urlsplit(url).fragment or KEY}", "-HContent-Type: application/json",
                        url.partition("#")[0] + scenario.path, "--", bodies) if self.uses_wrk else
                serving(__file__, "_client", url, scenario.path, bodies, share)) for url in urls]
            returned = meanwhile()
            for each in senders:
                each.send_signal(signal.SIGINT)
            parts = [json.loads(each.communicate(timeout=PATIENCE)[0].splitlines()[-1]) for each in senders]
        load = SimpleNamespace(**{name: (sum if name in ("created", "errors") else max)(part[name] for part in parts)
                                  for name in parts[0]})
        load.rate = load.created / load.seconds
        self.errors += load.errors
        self.enter(db, scenario, load.created, load.errors + (share * len(urls) if self.uses_wrk else 0))
        time.sleep(0.2)  # for the answers that wrk does not wait for
        return load, returned

    def enter(self, db: Any, scenario: Scenario, created: int, unsure: int = 0) -> None:
        """Notes how many rows a table of a database must have, and how many more it may have."""
        self.acknowledged[db, scenario.table] += created * scenario.reports
        self.unsure[db, scenario.table] += unsure * scenario.reports

    def check(self, db: Any, execute: Callable[[str], Any], since: int = 0) -> None:
        """Compares these numbers with the rows of a database that were received since then."""
        for table in [table for place, table in self.acknowledged if place == db]:
            stored, = execute(f"select count(*) from {table} where received_at >= {since}").fetchone()
            acknowledged, unsure = self.acknowledged[db, table], self.unsure[db, table]
            if not 0 <= stored - acknowledged <= unsure:
                self.problems.append(f"{db}: of {acknowledged:,} {table} {stored:,} are stored; {unsure:,} are unsure")

    def check_file(self, db: Path, since: int = 0) -> None:
        """Does the same for a file whose server has stopped, and checks that the file is sound."""
        with closing(sqlite3.connect(db)) as connection:
            self.check(db, connection.execute, since)
            self.problems += [f"{db}: {line}" for line, in connection.execute("pragma integrity_check") if line != "ok"]

    def measure(self, table: Table, sides: dict[str, tuple], scenarios: Iterable[Scenario],
                arguments: argparse.Namespace, before_each: Callable[[str], Any] = lambda name: None) -> None:
        """Loads all sides in turn, round by round. A side is the URLs of its servers, and their database."""
        def health_times() -> list[float]:  # 50 a second
            ask, deadline, times = over_network(urls[0]), time.monotonic() + arguments.round_seconds, []
            while time.monotonic() < deadline:
                times.append(ask(HEALTH).ms)
                time.sleep(0.02)
            return times

        cells = itertools.product(range(arguments.rounds), scenarios, arguments.connections)
        for cell, (number, scenario, count) in enumerate(cells):
            bodies, name = self.bodies(scenario, cell), f"{scenario.name}, {count} connections: "
            before_each(name)
            for side, (urls, db) in [*sides.items()][::-1 if number % 2 else 1]:  # a side may leave work for the next
                load, health = self.load(urls, db, scenario, bodies, count, health_times)
                say(f"round {number + 1}: {name}{side}: {load.rate:,.0f} requests/s, {load.errors} errors")
                for figure, value in {"requests/s": load.rate, "p50 ms": load.p50, "p99 ms": load.p99,
                                      "health p99 ms": quantiles(health, n=100)[98]}.items():
                    table.add(name + figure, side, value)


# == Commands ==================================================================

TARGETS = [*((f"crash, {n} connections: requests/s", "bare", 0.75, inf) for n in (16, 64)),
           *((f"batch of 100, {n} connections: requests/s", "raw", 0.55, inf) for n in (16, 64)),
           ("crash, 64 connections to 16", "value", 0.85, inf), ("MB of memory at rest", "value", 0, 42),
           ("MB of memory at most", "value", 0, 78), ("bytes on disk an event", "value", 0, 150)]


def ingest(bench: Bench, arguments: argparse.Namespace) -> None:
    """Measures ingestion: speed, latency, health, memory, bytes on disk."""
    files = dict(zip(arguments.names, arguments.server))
    pairs = [(side, below) for side in files for below in ("raw", "bare")] + [("second", "first")] * (len(files) - 1)
    table = Table(["raw", "bare", *files], pairs, [] if len(files) == 2 else TARGETS)
    dbs = {side: bench.folder / f"{side}.db" for side in table.sides}
    sizes = {side: measure_size(bench, file, bench.folder / f"{side}.size.db") for side, file in files.items()}

    def add_raw(name: str) -> None:
        if name.startswith(EVENTS.name):
            table.add(name + "requests/s", "raw", raw_rate(bench.folder / f"{arguments.names[0]}.size.db") / 100)

    with ExitStack() as stack:
        servers = {"bare": stack.enter_context(serving(__file__, "_bare")),
                   **{side: stack.enter_context(backfeedr(file, "--db", dbs[side])) for side, file in files.items()}}
        for side in 3 * [*files]:  # alerts are on if the version has them: three channels, whose receiver is down
            subprocess.run([sys.executable, files[side], "alert", "add", "http://127.0.0.1:9/", "--db", dbs[side]],
                           capture_output=True, check="alert add" in files[side].read_text())
        for side, server in servers.items():
            table.add("MB of memory at rest", side, megabytes(server.pid, "VmRSS"))
        sides = {side: ([server.url], dbs[side]) for side, server in servers.items()}
        bench.measure(table, sides, (CRASH, EVENTS), arguments, add_raw)
        for side, server in servers.items():
            table.add("MB of memory at most", side, megabytes(server.pid, "VmHWM"))
    for side in files:
        if {16, 64} <= {*arguments.connections}:
            few, many = (table.values[f"crash, {count} connections: requests/s"][side] for count in (16, 64))
            table.add("crash, 64 connections to 16", side, *(b / a for a, b in zip(few, many) if a))
        table.add("bytes on disk an event", side, sizes[side])
        bench.check_file(dbs[side])
    table.show("reports that come in")


def measure_size(bench: Bench, file: Path, db: Path) -> float:
    """The bytes of an event on disk, with indexes and sums."""
    bodies, sizes = bench.bodies(EVENTS).read_bytes().splitlines(), []
    for count in 1, SIZE_EVENTS // 100:  # the first makes the file
        with backfeedr(file, "--db", db) as server:
            ask = over_network(server.url)
            for number in range(count):
                ask(EVENTS.path, bodies[number % len(bodies)])
        bench.enter(db, EVENTS, count)
        sizes.append(db.stat().st_size)
    bench.check_file(db)
    return (sizes[1] - sizes[0]) / SIZE_EVENTS


def raw_rate(source: Path) -> float:
    """Rows per second of executemany: the same events into the same table, 100 per commit, and nothing else."""
    copy = shutil.copyfile(source, source.with_name("raw.db"))
    with closing(sqlite3.connect(copy, isolation_level=None)) as db:
        columns = [name for _, name, *_ in db.execute("pragma table_info(events)")]
        insert = f"insert into events ({', '.join(columns)}) values ({', '.join('?' * len(columns))})"
        rows = db.execute(f"select {', '.join(columns)} from events limit {SIZE_EVENTS}").fetchall()
        db.execute("pragma synchronous = full")
        db.execute("delete from events")
        db.execute("pragma wal_checkpoint(truncate)")
        started = time.perf_counter()
        for first in range(0, len(rows), 100):
            db.execute("begin immediate")
            db.executemany(insert, rows[first:first + 100])
            db.execute("commit")
        return len(rows) / (time.perf_counter() - started)


FIGURES = ["/api/v1/overview", "/api/v1/releases", *(f"/api/v1/metrics/{name}{days}" for name in (
    "daily-crashes", "crash-types", "devices", "active-devices", "sessions", "retention") for days in (
        "", "?days=90", "?days=365"))]
PAGES = [
    "/", "/crashes", "/crashes?days=30", "/crashes?text=screen", "/crashes?version=4.9.0", "/crashes/GROUP", "/apps",
    "/crashes/GROUP?report=REPORT", "/events", "/events?name=nothing", "/events?session_id=SESSION", "/releases"]
ANSWER_TARGETS = [  # a year is more than either database has: it need only be quick, so no ratio
    *((path, "value", 0, 5) for path in FIGURES), *((path, "value", 0, 30) for path in PAGES),
    *((path, "small", 0, 1.5) for path in FIGURES if "365" not in path)]


def metrics(bench: Bench, arguments: argparse.Namespace) -> None:
    """Measures the cost of a growing database: figures and pages, ingestion, pruning."""
    is_pair = len(arguments.server) == 2
    sizes = dict.fromkeys(arguments.names, arguments.events) if is_pair else {
        "small": max(1000, arguments.events // 100), "large": arguments.events}
    sides = {side: (file, bench.folder / f"{side}.db") for side, file in zip(sizes, arguments.server * 2)}
    for side, (file, db) in sides.items():
        fill(bench, file, db, sizes[side])
    measure_answers(sides, TURN if arguments.quick else 15 * TURN, [] if is_pair else ANSWER_TARGETS)
    growing = sides if is_pair else {"empty": (sides["small"][0], bench.folder / "empty.db"), "large": sides["large"]}
    targets = [(f"{FRESH.name}, {count} connections: requests/s", "empty", 0.8, inf) for count in arguments.connections]
    table = Table(growing, [tuple(growing)[::-1]], targets)
    with ExitStack() as stack:
        running = {side: ([stack.enter_context(backfeedr(file, "--db", db)).url], db)
                   for side, (file, db) in growing.items()}
        bench.measure(table, running, [FRESH], arguments)
    table.show("events that come in")
    for _, db in growing.values():
        bench.check_file(db)
    if not arguments.no_prune:
        measure_pruning(bench, sides if is_pair else {"large": sides["large"]})


def fill(bench: Bench, file: Path, db: Path, events: int) -> None:
    """Imports this many events of the last 90 days, and crashes among them."""
    say(f"filling {db.name} with {events:,} events")
    choose, stored, ended = random.Random(1), 0, time.time()
    with (bench.folder / "reports.jsonl").open("w") as out:
        while stored < events:
            share = stored / events
            now = round(ended - SPAN * (1 - share), 3)  # else the text could be a millisecond after the seq
            seq, given = round(1000 * now) << 20, {"app": "default", "is_test": False, "received_at": rfc3339(now)}
            for event in visit(choose, now, share)[:events - stored]:
                stored += 1
                print(json.dumps({"id": f"evt_{seq + stored % (1 << 20):016x}", **given, **event}), file=out)
                if stored % EVENTS_PER_CRASH == 0:
                    group = min(GROUPS, int(choose.paretovariate(0.6)))  # a few groups have most crashes
                    crashed = crash(choose.randrange(DEVICES), group, now - choose.expovariate(1 / 600), share)
                    print(json.dumps({"id": f"{seq + stored % (1 << 20):016x}", **given, **crashed}), file=out)
    with process(sys.executable, file, "import", out.name, "--db", db, BACKFEEDR_RETENTION_DAYS="0") as importing:
        importing.wait()
    bench.enter(db, EVENTS._replace(reports=1), stored)
    bench.enter(db, CRASH, stored // EVENTS_PER_CRASH)
    bench.check_file(db)


def measure_answers(sides: dict[str, tuple], requests: int, targets: list) -> None:
    """Measures how long a client waits for each figure and page."""
    table = Table(sides, [tuple(sides)[::-1]], targets)
    with ExitStack() as stack:
        asks = {side: signed_in(stack.enter_context(backfeedr(file, "--db", db)).url)
                for side, (file, db) in sides.items()}
        for path in [HEALTH, *FIGURES, *PAGES]:
            say(f"asking {path}")
            deadline = time.monotonic() + 6
            for _ in range(0, requests, TURN):
                for side, ask in asks.items():
                    table.add(path, side, *(ask(path).ms for _ in range(TURN)))
                if time.monotonic() > deadline:
                    break
            for side in sides:
                table.add(f"{path}  p99", side, quantiles(table.values[path][side], n=100)[98])
    table.show("milliseconds to answer")


def signed_in(url: str) -> Callable[..., SimpleNamespace]:
    """Asks a server as its admin. GROUP, REPORT and SESSION in a path stand for ids that it has."""
    ask, headers, places = over_network(url), {"Authorization": "Bearer " + TOKEN, "Cookie": ""}, {}  # type: ignore

    def asked(path: str, body: bytes | None = None) -> SimpleNamespace:
        answer = ask(re.sub("[A-Z]{3,}", lambda name: places[name[0]], path), body, **headers)
        headers["Cookie"] = answer.headers.get("Set-Cookie", headers["Cookie"]).split(";")[0]
        return answer

    token = re.search(rb'name="form_token" value="(\w+)"', asked("/sign-in").body)[1].decode()  # type: ignore[index]
    asked("/sign-in", urlencode({"token": TOKEN, "form_token": token}).encode())
    places["GROUP"] = json.loads(asked("/api/v1/crashes?limit=1").body)["groups"][0]["group_hash"]
    places["REPORT"] = json.loads(asked("/api/v1/crashes/GROUP?limit=1").body)["reports"][0]["id"]
    places["SESSION"] = json.loads(asked("/api/v1/events?type=session_end&limit=1").body)["events"][0]["session_id"]
    return asked


def measure_pruning(bench: Bench, sides: dict[str, tuple]) -> None:
    """Measures how long clients wait while the server, `prune` or nothing deletes all but the last day."""
    ways, first, last = ("server", "prune", "nothing"), [*sides][0], [*sides][-1]
    columns = {(way, side): f"{way} {side}" for way in ways for side in sides}
    pairs = [(columns[way, last], columns[way if first != last else "nothing", first]) for way in ways[:2]]
    table = Table(columns.values(), pairs, [("ms of the longest wait", "value", 0, 250), ("rows left", "value", 0, 0)])
    bodies, took = bench.bodies(CRASH), 1.0

    def count_expired(limit: str = "") -> int:
        since = int(1000 * (time.time() - 86_400))
        with closing(sqlite3.connect(db, timeout=PATIENCE)) as connection:
            return sum(connection.execute(f"""
                select count(*) from (select received_at from {name} order by seq {limit}) where received_at < {since}
                """).fetchone()[0] for name in ("events", "crashes"))

    def meanwhile() -> float:
        started = time.monotonic()
        if way == "prune":
            with process(sys.executable, file, "prune", "--db", db, BACKFEEDR_RETENTION_DAYS="1") as pruning:
                pruning.wait(20 * PATIENCE)
        while way == "server" and count_expired("limit 1") and time.monotonic() < started + 20 * PATIENCE:
            time.sleep(0.2)
        time.sleep(took if way == "nothing" else 0)
        return time.monotonic() - started

    for (way, side), column in columns.items():
        file, db = sides[side][0], shutil.copyfile(sides[side][1], bench.folder / f"{column}.db")
        began, size, expired = int(1000 * time.time()), db.stat().st_size, count_expired()
        with backfeedr(file, "--db", db, keeps_days=1 if way == "server" else 0) as server:
            load, seconds = bench.load([server.url], db, CRASH, bodies, 16, meanwhile)
        took = max(took, min(60.0, seconds))
        for name, value in {"seconds": seconds, "expired rows": expired, "rows left": count_expired(),
                            "MB": size / 1e6, "MB left": db.stat().st_size / 1e6, "crashes/s": load.rate,
                            "p50 ms": load.p50, "p99 ms": load.p99, "ms of the longest wait": load.longest}.items():
            table.add(name, column, value)
        bench.check_file(db, since=began)
        db.unlink()
    table.show("while old reports go")


def postgres(bench: Bench, arguments: argparse.Namespace) -> None:
    """Measures the cost of PostgreSQL, and the gain of a second host, in a schema for this run only."""
    import psycopg
    from psycopg.conninfo import conninfo_to_dict, make_conninfo

    schema, file = f"backfeedr_benchmark_{os.urandom(4).hex()}", bench.folder / "sqlite.db"
    options = f"{conninfo_to_dict(arguments.url).get('options', '')} -csearch_path={schema}".strip()
    url = make_conninfo(arguments.url, options=options)
    with closing(psycopg.connect(url, autocommit=True)) as db, ExitStack() as stack:
        for name in "server_version", "fsync", "synchronous_commit":
            print(f"PostgreSQL's {name}: {db.execute(f'show {name}').fetchone()[0]}")  # type: ignore
        db.execute(f"set lock_timeout = '{PATIENCE:.0f}s'; create schema {schema}")
        stack.callback(db.execute, f"drop schema {schema} cascade")
        with ExitStack() as servers:
            hosts = [servers.enter_context(backfeedr(HERE / "postgres.py", url)).url for _ in range(2)]
            one = servers.enter_context(backfeedr(arguments.server[0], "--db", file)).url
            with process(sys.executable, HERE / "postgres.py", url, "app", "create", "Second") as command:
                other_key = command.communicate(timeout=PATIENCE)[0].strip()
            sides = {"SQLite": ([one], file), "one host": (hosts[:1], "PostgreSQL"), "two hosts": (hosts, "PostgreSQL"),
                     "two apps": ([hosts[0], f"{hosts[1]}#{other_key}"], "PostgreSQL")}  # each by a host of its own
            table = Table(sides, [("one host", "SQLite"), ("two hosts", "one host"), ("two apps", "one host")])
            bench.measure(table, sides, (CRASH, EVENTS), arguments)
        bench.check("PostgreSQL", db.execute)
    bench.check_file(file)
    table.show("SQLite and PostgreSQL")


def main(*argv: str) -> int:
    """Runs a command. Returns 1 if a request failed or a report was lost."""
    arguments = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that all subprocesses are ended
    try:
        with tempfile.TemporaryDirectory(prefix="backfeedr-benchmark-", dir=arguments.dir) as name:
            bench = Bench(Path(name).resolve(), arguments.driver == "wrk")
            disk = subprocess.run(["stat", "-f", "-c", "%T", name], capture_output=True, text=True).stdout.strip()
            print(f"Python {sys.version.split()[0]}, SQLite {sqlite3.sqlite_version}, {os.cpu_count()} cores; load by"
                  f" {arguments.driver}, {arguments.rounds} x {arguments.round_seconds:g} s; databases on {disk or '?'}"
                  f"\nservers: {', '.join(map(str, arguments.server))}\n", flush=True)
            {"ingest": ingest, "metrics": metrics, "postgres": postgres}[arguments.command](bench, arguments)
    except (KeyboardInterrupt, Exception) as error:
        print(f"benchmark: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"Answers other than 201, and socket errors: {bench.errors}")
    print("\n".join(f"NOT AS IT SHOULD BE: {problem}" for problem in bench.problems)
          or "All that was acknowledged is stored, and the databases are sound.")
    return 1 if bench.problems or bench.errors else 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command and its options."""
    parser = argparse.ArgumentParser(description="Measures backfeedr on this host.")
    add = parser.add_argument
    add("command", nargs="?", choices=("ingest", "metrics", "postgres"), default="ingest", help="default: ingest")
    add("url", nargs="?", help="of a PostgreSQL database, for postgres")
    add("--server", action="append", type=Path, metavar="FILE", help="a backfeedr.py; twice: compare two versions")
    add("--driver", choices=("wrk", "python"), default="wrk" if shutil.which("wrk") else "python", help="what sends")
    add("--dir", type=Path, default=Path("."), help="where the temporary databases are put (default: here)")
    add("--seconds", type=float, default=10.0, metavar="N", help="of each load, over all rounds (default: 10)")
    add("--connections", metavar="N,N", default=[1, 16, 64], help="default: 1,16,64",
        type=lambda text: [int(number) for number in text.split(",")])
    add("--events", type=int, metavar="N", default=1_000_000, help="of metrics' large database (default: 1000000)")
    add("--no-prune", action="store_true", help="leave out what clients notice while old reports are deleted")
    add("--quick", action="store_true", help="a first impression, from one short round")
    given = parser.parse_args(argv)
    given.server = [file.resolve() for file in given.server or [HERE.parent / "backfeedr.py"]]
    given.names = ("first", "second") if given.server[1:] else ("backfeedr",)
    given.seconds = QUICK_SECONDS if given.quick else given.seconds
    given.rounds = max(1, round(given.seconds / ROUND_SECONDS))
    given.round_seconds = given.seconds / given.rounds
    if len(given.server) > 2 or (given.command == "postgres") != bool(given.url) or given.round_seconds < 0.2:
        parser.error("at most two servers, a URL for postgres and nothing else, and at least 0.2 seconds a round")
    return given


if __name__ == "__main__":
    programs = {"_bare": bare, "_client": client}  # this program starts itself as these
    sys.exit(programs.get("".join(sys.argv[1:2]), main)(*sys.argv[1:]))
