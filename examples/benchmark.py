#!/usr/bin/env python3
"""What will my host hold? Measures backfeedr on this machine, in two to three minutes.

    python examples/benchmark.py              # --quick gives a first impression
    python examples/benchmark.py metrics      # what becomes of it as the database grows
    python examples/benchmark.py postgres postgresql://...   # SQLite beside PostgreSQL, by one host and by two

`ingest`, the first, starts the real server on a temporary database and beside it a bare handler: bottle
and waitress with the same options, which reads the body and gives the same answer, but
stores nothing. Both get the same load in turn, from `wrk` where it is installed and else
from client processes of its own.

`metrics` fills a small database and a large one with the life of an app, and asks both
in turn for every public figure. Then it measures how fast reports come in on the large
one and on an empty one, and how long clients wait while old reports are pruned.

`postgres` gives the same load in turn to a server on a file, to one on PostgreSQL and to two on it.
It makes a schema of its own in that database, and drops it at the end.

A host is never quiet, and the load runs on the host that it measures. So no figure stands
alone: each is a ratio to one taken seconds before. A round measures everything once,
shortly; what is shown are the medians over the rounds.
"""

from __future__ import annotations

import argparse
import http.client
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack, closing, contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from statistics import median
from types import ModuleType, SimpleNamespace
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union
from urllib.parse import urlsplit
from wsgiref.util import setup_testing_defaults

HERE = Path(__file__).resolve().parent
SERVER = HERE.parent / "backfeedr.py"
KEY = "bf_live_" + "b" * 32
HEADERS = {"Content-Type": "application/json", "X-Backfeedr-Key": KEY}

ROUND_SECONDS = 2.5  # about as long one side is measured before it is the other's turn
SWITCH_INTERVAL = 0.002  # seconds, of the bare handler's threads: as in backfeedr's `serve`
LONGEST = 600.0  # seconds that anything may take for which a load goes on
PATIENCE = 30.0  # seconds for a server to start, to stop and to answer
BODIES = 256  # distinct requests of a scenario, each of another device
BATCH = 100  # events
SIZE_EVENTS = 20_000  # for the bytes on disk, and in one go of the raw insert


class Failure(Exception):
    """The benchmark cannot go on. `str()` is one line that says why."""


# == Load ======================================================================
#
# What is sent, the reports of the reference; and what came of it.

class Scenario(NamedTuple):
    """One kind of request: where to, the table that takes it, and how many rows it becomes."""

    name: str
    path: str
    table: str
    reports: int
    make: Callable[[int, int], Dict[str, Any]]  # of a body's number and the length of a device's id


class Load(NamedTuple):
    """What came of some seconds of requests. Latencies are in milliseconds."""

    seconds: float
    answers: Dict[int, int]  # how many of each status; 0 stands for a socket error
    median: float
    p99: float
    longest: float = 0.0

    @property
    def created(self) -> int:
        return self.answers.get(201, 0)

    @property
    def errors(self) -> int:
        return sum(self.answers.values()) - self.created

    @property
    def rate(self) -> float:
        return self.created / self.seconds

    @classmethod
    def of_all(cls, loads: Sequence[Load]) -> Load:
        """Of hosts that were loaded at once, and for as long. Of their latencies those of the slowest one."""
        answers = sum((Counter(load.answers) for load in loads), Counter())
        return cls(median(load.seconds for load in loads), dict(answers), *(
            max(figures) for figures in zip(*(load[2:] for load in loads))))


def crash_body(number: int, hash_length: int) -> Dict[str, Any]:
    """The reference's crash, of one of 8 exception types, at one of 16 places."""
    crash = {**example("crash.json"), **_device(number, hash_length)}
    crash["exception_type"] = ("EXC_BAD_ACCESS", "SIGABRT", "EXC_BREAKPOINT", "SIGTRAP", "EXC_CRASH", "SIGSEGV",
                               "NSRangeException", "NSInvalidArgumentException")[number % 8]
    crash["stack_trace"][0]["symbol"] = f"ContentView{number // 8 % 16}.body.getter"
    return crash


def batch_body(number: int, hash_length: int) -> Dict[str, Any]:
    """What a phone sends: a session's start and what happened in it, events of the reference's shape."""
    event = {**example("event.json"), **_device(number, hash_length), "session_id": f"sess_{number:06x}"}
    return {"events": [{**event, "type": "session_start"}] + [event] * (BATCH - 1)}


def example(name: str) -> Dict[str, Any]:
    """A report of the reference."""
    return json.loads((HERE / name).read_text())


def _device(number: int, hash_length: int) -> Dict[str, str]:
    # A clock that is a day fast: so the server counts each report when it comes, and a
    # body that is sent again is, as from a real phone, the latest of its device.
    tomorrow = datetime.now(timezone.utc) + timedelta(days=1)
    return {"device_id_hash": device_hash(number, hash_length),
            "occurred_at": tomorrow.strftime("%Y-%m-%dT%H:%M:%SZ")}


def device_hash(number: int, length: int) -> str:
    """The device_id_hash of a device: another one for each number, and in no order."""
    return f"{number * 2654435761 % (1 << 32):08x}".ljust(length, "0")


CRASH = Scenario("crash", "/api/v1/crashes", "crashes", 1, crash_body)
EVENTS = Scenario(f"batch of {BATCH}", "/api/v1/events/batch", "events", BATCH, batch_body)
SCENARIOS = (CRASH, EVENTS)


def bodies_file(folder: Path, scenario: Scenario) -> Path:
    """Where a scenario's bodies are, one a line, for either driver."""
    return folder / f"{scenario.table}.jsonl"


# == Drivers ===================================================================
#
# Who sends. `drive` keeps so many connections busy for as long as `meanwhile` takes. At
# the end wrk `abandons` what is under way: it may be stored, though nobody saw the answer.

Meanwhile = Callable[[], Any]


class Wrk:
    """Sends with wrk, which costs the host next to nothing."""

    name, abandons = "wrk", True

    SCRIPT = """
        wrk.method, wrk.headers = "POST", {%(headers)s}
        answers = {}
        local requests, threads, last = {}, {}, 0
        function setup(thread) table.insert(threads, thread) end
        function init()
            for body in io.lines(%(bodies)s) do table.insert(requests, wrk.format(nil, nil, nil, body)) end
        end
        function request() last = last %% #requests + 1; return requests[last] end
        function response(status) answers[status] = (answers[status] or 0) + 1 end
        function done(summary, latency)
            local errors = summary.errors
            print("answers", 0, errors.connect + errors.read + errors.write + errors.timeout)
            for _, thread in ipairs(threads) do
                for status, count in pairs(thread:get("answers")) do print("answers", status, count) end
            end
            print("load", summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
                  latency.max / 1e3)
        end
        """

    def __init__(self, folder: Path, connections: int):
        self._folder = folder

    def drive(self, scenario: Scenario, urls: Sequence[str], connections: int, meanwhile: Meanwhile) -> Load:
        """Loads the servers at `urls`, each by its share of the connections."""
        with ExitStack() as stack:
            running = [stack.enter_context(self._running(scenario, url, number, share)) for number, (url, share)
                       in enumerate((url, len(range(n, connections, len(urls)))) for n, url in enumerate(urls))]
            meanwhile()
            for wrk in running:
                wrk.send_signal(signal.SIGINT)  # on which it stops and reports what it has
            return Load.of_all([self._load(wrk.communicate(timeout=PATIENCE)[0]) for wrk in running])

    @contextmanager
    def _running(self, scenario: Scenario, url: str, number: int, connections: int) -> Iterator[subprocess.Popen]:
        headers = {"Host": urlsplit(url).netloc, **HEADERS}
        script = self._folder / f"wrk{number}.lua"
        script.write_text(self.SCRIPT % {
            "headers": ", ".join(f"[{json.dumps(name)}] = {json.dumps(value)}" for name, value in headers.items()),
            "bodies": json.dumps(str(bodies_file(self._folder, scenario)), ensure_ascii=False)})
        # One thread sends far more than one Python process can answer.
        wrk = subprocess.Popen(["wrk", "-t1", f"-c{connections}", f"-d{LONGEST + PATIENCE:.0f}", "--latency",
                                f"--timeout={PATIENCE:.0f}", "-s", str(script), url + scenario.path],
                               stdout=subprocess.PIPE, text=True)
        try:
            yield wrk
        finally:
            end(wrk)

    @staticmethod
    def _load(output: str) -> Load:
        lines = [line.split("\t") for line in output.splitlines()]
        load = [float(figure) for name, *figures in lines if name == "load" for figure in figures]
        if not load:
            raise Failure(f"wrk gave no figures: {output.strip()[-200:]}")
        return Load(load[0], {int(row[1]): int(row[2]) for row in lines if row[0] == "answers"}, *load[1:])

    def close(self) -> None:
        """Nothing runs between two measurements."""


class Clients:
    """Sends with client processes. They take their share of the host, so that both sides look slower."""

    name, abandons = "python", False
    CONNECTIONS = 8  # of a process

    def __init__(self, folder: Path, connections: int):
        self._folder = folder
        self._pool = multiprocessing.Pool(math.ceil(connections / self.CONNECTIONS), leave_signals_to_the_parent)

    def drive(self, scenario: Scenario, urls: Sequence[str], connections: int, meanwhile: Meanwhile) -> Load:
        """Loads the servers at `urls`, each by its share of the connections, and waits for all answers."""
        begin, bodies = time.time() + 0.2, bodies_file(self._folder, scenario)
        stop = self._folder / "stop"  # a file, because it reaches processes that run already
        stop.unlink(missing_ok=True)
        parts = self._pool.starmap_async(client_process, [
            (urls, scenario.path, bodies, range(first, min(first + self.CONNECTIONS, connections)), begin, stop)
            for first in range(0, connections, self.CONNECTIONS)], chunksize=1)
        time.sleep(max(0.0, begin - time.time()))
        try:
            meanwhile()
        finally:
            stop.touch()
        answers = [answer for part in parts.get(2 * PATIENCE) for answer in part]
        ended = time.time()
        latencies = sorted(1000 * latency for status, latency in answers if status) or [0.0]
        return Load(ended - begin, dict(Counter(status for status, _ in answers)),
                    latencies[len(latencies) // 2], latencies[len(latencies) * 99 // 100], latencies[-1])

    def close(self) -> None:
        """Ends the processes."""
        self._pool.terminate()
        self._pool.join()


Driver = Union[Wrk, Clients]


def make_driver(choice: Optional[str], folder: Path, connections: int) -> Driver:
    """The driver of the operator's choice; without one, wrk where it is installed."""
    if choice == "wrk" and not shutil.which("wrk"):
        raise Failure("wrk is not installed")
    return (Clients if choice == "python" or not shutil.which("wrk") else Wrk)(folder, connections)


def lasting(seconds: float) -> Meanwhile:
    """For a load of so many seconds."""
    return lambda: time.sleep(seconds)


def write_bodies(folder: Path, scenario: Scenario, numbers: Iterable[int], hash_length: int) -> None:
    """Makes the bodies of a scenario for either driver."""
    bodies_file(folder, scenario).write_text("".join(
        json.dumps(scenario.make(number, hash_length)) + "\n" for number in numbers))


Answers = List[Tuple[int, float]]  # a status, 0 for a socket error, and after how many seconds it came


def leave_signals_to_the_parent() -> None:
    """In a client process: an interrupt is for the parent alone, which then ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def client_process(urls: Sequence[str], path: str, bodies: Path, numbers: range, begin: float, stop: Path) -> Answers:
    """Keeps a connection for each of `numbers` busy from `begin` until there is a file `stop`."""
    answers: Answers = []
    lines = bodies.read_bytes().splitlines()
    threads = [threading.Thread(target=client, args=(
        answers, urls[first % len(urls)], path, lines[first:] + lines[:first], begin, stop)) for first in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def client(answers: Answers, url: str, path: str, bodies: List[bytes], begin: float, stop: Path) -> None:
    """One connection: sends, waits for the answer, sends the next."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE)
    time.sleep(max(0.0, begin - time.time()))
    for body in itertools.cycle(bodies):
        started = time.perf_counter()
        try:
            status, _, _ = ask(connection, path, body)
        except (OSError, http.client.HTTPException):
            status = 0
            connection.close()  # the next request opens it again
            time.sleep(0.01)
        answers.append((status, time.perf_counter() - started))
        if stop.exists():
            return connection.close()


def ask(connection: http.client.HTTPConnection, path: str, body: bytes) -> Tuple[int, Dict[str, str], bytes]:
    """One request: its status, headers and body."""
    connection.request("POST", path, body, HEADERS)
    response = connection.getresponse()
    return response.status, dict(response.getheaders()), response.read()


# == Servers ===================================================================

class Running:
    """A server as a subprocess, until the end of `with`. Its first line says where it listens."""

    def __init__(self, *command: Union[str, Path], **environ: str):
        self._process = subprocess.Popen([sys.executable, *map(str, command)], env=environment(**environ),
                                         stdout=subprocess.PIPE, text=True)
        timer = threading.Timer(PATIENCE, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()  # type: ignore
        except BaseException:
            end(self._process)
            raise
        finally:
            timer.cancel()
        if not line:
            end(self._process)
            raise Failure(f"{command[0]} did not start")
        self.url = line.split()[-1]

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *exc: Any) -> None:
        end(self._process)

    def stop(self) -> None:
        """Ends it before that."""
        end(self._process)

    def memory(self, name: str = "VmRSS") -> Optional[float]:
        """Megabytes of memory now, or at most so far (VmHWM); None where the system does not say."""
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text()
        except OSError:
            return None
        return next((int(line.split()[1]) * 1024 / 1e6 for line in status.splitlines()
                     if line.startswith(name + ":")), None)


def environment(**settings: str) -> Dict[str, str]:
    """This process's, with these settings and none of the operator's own."""
    return {**{name: value for name, value in os.environ.items() if not name.startswith("BACKFEEDR_")}, **settings}


def end(process: subprocess.Popen) -> None:
    """Ends a process of ours, if it still runs: by SIGTERM, and by force if that takes too long."""
    process.terminate()
    try:
        process.wait(PATIENCE)
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        process.stdout.close()  # type: ignore


def backfeedr(db: Path, **environ: str) -> Running:
    """The real server, as its operator starts it; only the rate limit is off."""
    return Running(SERVER, "serve", "--host", "127.0.0.1", "--port", "0", "--db", db,
                   **{"BACKFEEDR_API_KEY": KEY, "BACKFEEDR_RATE_LIMIT": "0", **environ})


def backfeedr_module() -> ModuleType:
    """The server's file as a module, for what is measured or filled without a server."""
    if str(SERVER.parent) not in sys.path:
        sys.path.insert(0, str(SERVER.parent))
    return importlib.import_module("backfeedr")


def bare(arguments: argparse.Namespace) -> int:
    """Serves the bare handler: the options of backfeedr's own `serve`, and no storage. Runs until it is ended."""
    import logging

    import bottle
    import waitress

    app = bottle.Bottle()
    for path, (headers, answer) in json.loads(arguments.answers.read_text()).items():
        def handler(headers: Dict[str, str] = headers, answer: Dict[str, Any] = answer) -> bottle.HTTPResponse:
            environ = bottle.request.environ
            environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            return bottle.HTTPResponse(json.dumps(answer).encode(), 201, headers)
        app.post(path)(handler)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    server = waitress.create_server(
        app, host="127.0.0.1", port=0, threads=32, ident=None, max_request_body_size=1 << 20,
        max_request_header_size=32768, connection_limit=900, channel_timeout=60, cleanup_interval=10,
        recv_bytes=65536, asyncore_use_poll=True)
    print(f"bare on http://127.0.0.1:{server.effective_port}", flush=True)
    sys.setswitchinterval(SWITCH_INTERVAL)
    server.run()
    return 0


# == Measurements ==============================================================

class Ledger:
    """What a server has acknowledged, which must be what its database holds."""

    def __init__(self) -> None:
        self._acknowledged: Counter = Counter()
        self._unseen: Counter = Counter()  # may be stored as well: abandoned, or answered with an error

    def count(self, table: str, rows: int) -> None:
        """Enters rows that a store was given without a server."""
        self._acknowledged[table] += rows

    def add(self, scenario: Scenario, load: Load, abandoned: int = 0) -> None:
        """Enters a load, at the end of which so many requests were abandoned."""
        self._acknowledged[scenario.table] += load.created * scenario.reports
        self._unseen[scenario.table] += (load.errors + abandoned) * scenario.reports

    def check(self, db: Path) -> List[str]:
        """What is wrong with the database of a stopped server, a line each."""
        say("checking that what was acknowledged is stored")
        with closing(sqlite3.connect(db)) as connection:
            stored = {table: connection.execute(f"select count(*) from {table}").fetchone()[0]
                      for table in self._acknowledged}
            integrity = [problem for problem, in connection.execute("pragma integrity_check")]
        return [f"integrity check: {problem}" for problem in integrity if problem != "ok"] + self.compare(stored)

    @property
    def tables(self) -> List[str]:
        return list(self._acknowledged)

    def compare(self, stored: Mapping[str, int]) -> List[str]:
        """What is wrong with so many rows, a line each."""
        return [
            f"{table}: {count:,} acknowledged, {stored[table]:,} stored, {self._unseen[table]:,} unseen"
            for table, count in self._acknowledged.items() if not 0 <= stored[table] - count <= self._unseen[table]]

    def __str__(self) -> str:
        return " and ".join(f"{count:,} {table}" for table, count in self._acknowledged.items())


def send(server: Running, scenario: Scenario, bodies: Iterable[bytes], ledger: Ledger) -> Tuple[Dict[str, str], Any]:
    """Sends bodies one after the other; returns the headers and the JSON of the last answer."""
    with closing(http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=PATIENCE)) as connection:
        for body in bodies:
            status, headers, answer = ask(connection, scenario.path, body)
            if status != 201:
                raise Failure(f"{scenario.path} answered {status}: {answer.decode()}")
            ledger.add(scenario, Load(0, {status: 1}, 0, 0))
    return headers, json.loads(answer)


class Size(NamedTuple):
    """Of a database with SIZE_EVENTS events: bytes an event, and all it takes to insert the same rows raw."""

    bytes_per_event: float
    statements: List[str]  # that make the table and its indexes
    insert: str
    rows: List[tuple]
    problems: List[str]


def measure_size(folder: Path) -> Size:
    """Sends events to a server of their own, and looks at the file it leaves. Tells the bare handler the answers."""
    db, ledger, answers = folder / "size.db", Ledger(), {}
    bodies = {scenario: bodies_file(folder, scenario).read_bytes().splitlines() for scenario in SCENARIOS}
    with backfeedr(db) as server:
        for scenario in SCENARIOS:
            headers, answer = send(server, scenario, bodies[scenario][:1], ledger)
            of_waitress = ("connection", "content-length", "date", "server", "via")
            answers[scenario.path] = {n: v for n, v in headers.items() if n.lower() not in of_waitress}, answer
    (folder / "answers.json").write_text(json.dumps(answers))
    before = bytes_on_disk(db)
    with backfeedr(db) as server:
        send(server, EVENTS, (bodies[EVENTS][n % BODIES] for n in range(SIZE_EVENTS // BATCH)), ledger)
    size = bytes_on_disk(db) - before
    with closing(sqlite3.connect(db)) as connection:
        statements = [sql for sql, in connection.execute(
            "select sql from sqlite_master where tbl_name = 'events' and sql > '' and type in ('table', 'index')"
            " order by type desc")]  # the table first
        columns = ", ".join(name for _, name, *_ in connection.execute("pragma table_info(events)"))
        rows = connection.execute(f"select {columns} from events order by rowid limit {SIZE_EVENTS}").fetchall()
    insert = f"insert into events ({columns}) values ({', '.join('?' * len(rows[0]))})"
    return Size(size / SIZE_EVENTS, statements, insert, rows, ledger.check(db))


def bytes_on_disk(db: Path) -> int:
    """Of a database and whatever lies beside it."""
    return sum(path.stat().st_size for path in db.parent.glob(db.name + "*"))


def measure_raw(folder: Path, size: Size) -> float:
    """Rows a second of the least that can be done: `executemany` of the same rows into the same table."""
    db = folder / "raw.db"
    with closing(sqlite3.connect(db, isolation_level=None)) as connection:
        for statement in ("pragma journal_mode = wal", "pragma synchronous = full", *size.statements):
            connection.execute(statement)
        started = time.perf_counter()
        for first in range(0, len(size.rows), BATCH):
            connection.execute("begin immediate")
            connection.executemany(size.insert, size.rows[first:first + BATCH])
            connection.execute("commit")
        seconds = time.perf_counter() - started
    db.unlink()
    return len(size.rows) / seconds


class Cell:
    """A scenario at so many connections, and what was measured of it: an item a round."""

    def __init__(self, scenario: Scenario, connections: int):
        self.scenario, self.connections = scenario, connections
        self.bare: List[Load] = []
        self.ours: List[Load] = []
        self.memory: List[Optional[float]] = []

    def to(self, rates: Iterable[float]) -> float:
        """How the requests a second compare with other rates of the same rounds."""
        return median([load.rate / rate for load, rate in zip(self.ours, rates) if rate] or [0.0])

    @property
    def to_bare(self) -> float:
        return self.to(load.rate for load in self.bare)

    def to_raw(self, raw: List[float]) -> float:
        """How the reports a second compare with rows a second."""
        return self.to(rate / self.scenario.reports for rate in raw)


class Results(NamedTuple):
    """All that was measured. Memory is in megabytes, `raw` in rows a second and round."""

    driver: str
    size: Size
    at_rest: Optional[float]
    peak: Optional[float]
    raw: List[float]
    cells: List[Cell]
    ledger: Ledger
    problems: List[str]

    @property
    def errors(self) -> int:
        return sum(load.errors for cell in self.cells for load in cell.bare + cell.ours)


def measure_all(arguments: argparse.Namespace, folder: Path, driver: Driver, size: Size) -> Results:
    """Runs the rounds, and checks the database after them."""
    db, ledger, raw = folder / "bench.db", Ledger(), []
    cells = [Cell(scenario, connections) for scenario in SCENARIOS for connections in arguments.connections]
    with backfeedr(db) as ours, Running(__file__, "_bare", folder / "answers.json") as bare_server:
        at_rest = ours.memory()
        for number in range(1, arguments.rounds + 1):
            raw.append(measure_raw(folder, size))
            say(f"round {number} of {arguments.rounds}: raw executemany: {raw[-1]:,.0f} rows/s")
            for cell in cells:
                for name, server, loads in (("bare", bare_server, cell.bare), ("backfeedr", ours, cell.ours)):
                    load = driver.drive(cell.scenario, [server.url], cell.connections,
                                        lasting(arguments.seconds / arguments.rounds))
                    loads.append(load)
                    say(f"round {number} of {arguments.rounds}: {cell.scenario.name}, {cell.connections} connections,"
                        f" {name}: {load.rate:,.0f} requests/s"
                        + (f", errors: {load.answers}" if load.errors else ""))
                    time.sleep(0.1)
                ledger.add(cell.scenario, load, driver.abandons * cell.connections)
                # The answer to a last request comes after what wrk has left under way.
                with open(bodies_file(folder, cell.scenario), "rb") as bodies:
                    send(ours, cell.scenario, [bodies.readline().strip()], ledger)
                cell.memory.append(ours.memory())
        peak = ours.memory("VmHWM")
    return Results(driver.name, size, at_rest, peak, raw, cells, ledger, size.problems + ledger.check(db))


def measure_memory(events: int, connections: int, folder: Path, driver: Driver) -> List[str]:
    """Prints a server's memory after 10,000 events and after many; returns what is wrong with its database."""
    db, ledger, stored = folder / "memory.db", Ledger(), 0
    print(f"\nMemory while events come in at {connections} connections:")
    with backfeedr(db) as server:
        for goal in sorted({min(10_000, events), events}):
            while stored < goal:
                load = driver.drive(EVENTS, [server.url], connections,
                                    lasting(1.0 if goal <= 10_000 else ROUND_SECONDS))
                if not load.created or load.errors:
                    raise Failure(f"events were not stored: {load.answers}")
                ledger.add(EVENTS, load, driver.abandons * connections)
                stored += load.created * BATCH
                say(f"{stored:,} of {events:,} events")
            say("")
            print(f"  after {stored:>11,} events: {megabytes(server.memory())} MB,"
                  f" until then at most {megabytes(server.memory('VmHWM'))} MB", flush=True)
    return ledger.check(db)


# == Fill ======================================================================
#
# The life of an app over 90 days, by the store's own write path and at a clock that is
# moved by hand. It is the same each time, but for the day on which it ends.

SPAN = 90 * 86_400  # seconds
DEVICES, GROUPS, VERSIONS, MODELS = 20_000, 300, 40, 25
EVENTS_PER_CRASH = 100
MOMENTS = 2000  # at which a fill receives reports, at least; about as many as it has hours
MOST_AT_ONCE = 1000  # events
EXCEPTIONS = ("EXC_BAD_ACCESS", "SIGABRT", "EXC_BREAKPOINT", "SIGTRAP", "EXC_CRASH", "SIGSEGV", "SIGBUS",
              "NSRangeException", "NSInvalidArgumentException", "NSGenericException", "SIGILL", "EXC_GUARD")
ACTIONS = ("screen_view", "search", "add_to_cart", "remove_from_cart", "purchase", "share", "login", "refresh")
SCREENS = ("Home", "Search", "Product", "Cart", "Checkout", "Orders", "Profile", "Settings", "Help", "Offers",
           "Reviews", "Wishlist", "Login", "SignUp", "Address", "Payment", "Map", "Store", "Scanner", "Camera",
           "Chat", "News", "Video", "Gallery", "Onboarding")


class Life:
    """Who uses an app in the days until `ends_at`, with which version, and where it crashes."""

    def __init__(self, ends_at: float, seed: int = 1):
        self._began_at, self._random = ends_at - SPAN, random.Random(seed)
        self._weights = list(itertools.accumulate(1 / rank for rank in range(1, GROUPS + 1)))  # a few have most

    def device(self) -> int:
        """One of them, for a visit."""
        return self._random.randrange(DEVICES)

    def visit(self, device: int, now: float) -> List[Dict[str, Any]]:
        """The 10 to 20 events of a session of seconds to an hour, which ended some minutes before `now`."""
        choose = self._random
        moves, seconds = choose.randint(8, 18), 2 ** choose.uniform(1, 11.8)
        began_at = now - choose.expovariate(1 / 600) - seconds
        phone = {**self._phone(device, now), "session_id": f"{choose.getrandbits(128):032x}"}
        times = [began_at, *sorted(began_at + seconds * choose.random() for _ in range(moves)), began_at + seconds]
        return [{**phone, **what, "occurred_at": rfc3339(at)} for at, what in zip(times, (
            {"type": "session_start"}, *(self._move() for _ in range(moves)), {"type": "session_end"}))]

    def _move(self) -> Dict[str, Any]:
        choose = self._random
        return {"type": "error" if choose.random() < 0.02 else "custom", "name": choose.choice(ACTIONS),
                "properties": {"screen": choose.choice(SCREENS), "ms": choose.randrange(2000)}}

    def crash(self, device: int, now: float) -> Dict[str, Any]:
        """A crash of some minutes before `now`, with three frames of the app's own and twelve of the system's."""
        group, = self._random.choices(range(GROUPS), cum_weights=self._weights)
        screen = SCREENS[group // len(EXCEPTIONS)]
        frames: List[Dict[str, Any]] = [
            {"symbol": f"{screen}{what}", "file": f"{screen}{where}.swift", "line": group + 10} for what, where in (
                ("Model.load(_:)", "Model"), ("View.body.getter", "View"), ("View.refresh()", "View"))]
        frames += [{"symbol": f"-[UIApplication _callStep{n}:withContext:]"} for n in range(12)]
        return {**example("crash.json"), **self._phone(device, now),
                "exception_type": EXCEPTIONS[group % len(EXCEPTIONS)],
                "exception_reason": f"Unexpectedly found nil in {screen}Model, item {self._random.randrange(50)}",
                "stack_trace": [{"frame": n, **frame} for n, frame in enumerate(frames)],
                "occurred_at": rfc3339(now - self._random.expovariate(1 / 600))}

    def _phone(self, device: int, now: float) -> Dict[str, Any]:
        """What a report says of a device; one in five is behind by some of the versions, which follow one another."""
        newest = min(VERSIONS - 1, int(VERSIONS * (now - self._began_at) / SPAN))
        version = max(0, newest - (self._random.random() < 0.2) * self._random.randint(1, 6))
        return {"device_id_hash": device_hash(device, 64), "device_model": f"iPhone{10 + device % MODELS},1",
                "app_version": f"{1 + version // 10}.{version % 10}.0", "os_version": f"18.{device % 7}",
                "locale": "de_DE"}


def rfc3339(seconds: float) -> str:
    """A time as the API takes it."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds")


def visits_body(number: int, hash_length: int) -> Dict[str, Any]:
    """What a phone sends that was offline for a while: a hundred events, of sessions that nobody has seen before."""
    now, device = time.time(), number % DEVICES
    life = Life(now, seed=1000 + number)
    events: List[Dict[str, Any]] = []
    while len(events) < BATCH:
        events += life.visit(device, now)
    return {"events": events[:BATCH]}


VISITS = Scenario(f"batch of {BATCH}", "/api/v1/events/batch", "events", BATCH, visits_body)


def fill(db: Path, events: int, ledger: Ledger) -> None:
    """Makes a database that has received so many events, and the crashes that go with them, until now."""
    module, ends_at, stored, started = backfeedr_module(), time.time(), 0, time.monotonic()
    life, moment = Life(ends_at), SimpleNamespace(now=ends_at - SPAN)
    with module.Store(db, clock=lambda: moment.now) as store:
        store.start(api_key=KEY)
        while stored < events:
            moment.now = ends_at - SPAN * (1 - stored / events)
            batch = some_visits(module, life, moment.now, min(MOST_AT_ONCE, events // MOMENTS))[:events - stored]
            before, stored = stored, stored + len(batch)
            crashes = stored // EVENTS_PER_CRASH - before // EVENTS_PER_CRASH
            for reports in (batch, some_crashes(module, life, moment.now, crashes)):
                if reports:
                    store.add(module.sha256(KEY), reports)
            if before * 10 // events != stored * 10 // events:
                say(f"filling: {stored:,} of {events:,} events, {time.monotonic() - started:.0f} s")
    ledger.count("events", events)
    ledger.count("crashes", events // EVENTS_PER_CRASH)


def some_visits(module: ModuleType, life: Life, now: float, events: int) -> list:
    """The parsed events of whole visits: at least so many."""
    parsed = module.parse_batch({"events": life.visit(life.device(), now)})
    while len(parsed) < events:
        parsed += module.parse_batch({"events": life.visit(life.device(), now)})
    return parsed


def some_crashes(module: ModuleType, life: Life, now: float, crashes: int) -> list:
    """So many parsed crashes, each of some device."""
    return [module.parse_crash(life.crash(life.device(), now)) for _ in range(crashes)]


# == Metrics ===================================================================
#
# What becomes of the server as its database grows. All of it is asked of a small and of a
# large database in turn, so that what else the host does hits both.

# Each public figure, and whether the large database may take twice as long as the small one at
# most. A year is more than either holds: it has to be quick, whatever it is compared with.
QUESTIONS = {
    "metrics/daily-crashes": True, "metrics/daily-crashes?days=90": True, "metrics/daily-crashes?days=365": False,
    "metrics/crash-types": True, "metrics/crash-types?days=30": True,
    "metrics/devices": True,
    "overview": True,
    "metrics/active-devices?days=30": True, "metrics/active-devices?days=365": False,
    "metrics/sessions?days=30": True, "metrics/sessions?days=365": False,
    "metrics/retention": True, "metrics/retention?days=365": False,
    "releases": True,
}
# Each page, and what makes it look at most.
PAGES = ("", "crashes", "crashes?days=30", "crashes?text=home", "crashes?version=4.9.0", "crashes/GROUP",
         "crashes/GROUP?report=REPORT", "events", "events?name=nothing", "events?session_id=SESSION", "releases", "apps")
TURN = 20  # requests to one side, before it is the other's turn
ANSWER_SECONDS = 6.0  # for one question, after which fewer requests have to do
INGEST_CONNECTIONS = 16
INGEST_BODIES = 1500  # a round: about as many as are sent in it, because a session is new only once

Asked = Callable[[str], Tuple[int, float]]  # a path to a status, and after how many milliseconds it came


class Pair(NamedTuple):
    """Figures of a small or empty database, and of the large one."""

    small: List[float]
    large: List[float]

    @property
    def ratio(self) -> float:
        """How the medians compare."""
        return median(self.large) / median(self.small)


class Answered(NamedTuple):
    """How long a question took to answer, in milliseconds: in the server alone, and until a client had it."""

    path: str
    is_compared: bool
    inside: Optional[Pair]  # None: there is no such endpoint
    outside: Optional[Pair]

    @property
    def median(self) -> float:
        return median(self.inside.large) if self.inside else 0.0

    @property
    def ratio(self) -> float:
        return self.inside.ratio if self.inside and self.is_compared else 0.0

    @property
    def is_met(self) -> bool:
        return self.median <= MOST_MS and self.ratio <= MOST_RATIO


def measure_answers(small: Path, large: Path, requests: int) -> List[Answered]:
    """Asks every question of both databases, in this process and of two servers."""
    module = backfeedr_module()
    with ExitStack() as stack:
        inside = [in_process(stack.enter_context(module.Backfeedr(module.Settings(
            db_path=str(db), api_key=KEY, auth_token="admin", rate_limit=0, retention_days=0))))
            for db in (small, large)]
        outside = [over_network(stack.enter_context(backfeedr(db, BACKFEEDR_RETENTION_DAYS="0")), stack)
                   for db in (small, large)]
        return [Answered(path, is_compared, take_turns(path, inside, requests), take_turns(path, outside, requests))
                for path, is_compared in QUESTIONS.items()]


def measure_pages(large: Path, requests: int) -> Dict[str, List[float]]:
    """How long each page takes in the server, in milliseconds."""
    module, times = backfeedr_module(), {}
    with module.Backfeedr(module.Settings(db_path=str(large), retention_days=0)) as app:
        session = app.store.grant("session", 3_600_000)
        asked = in_process(app, prefix="/", HTTP_COOKIE="backfeedr=" + session)
        group = app.metrics.groups(limit=1)["groups"][0]["group_hash"]
        report = app.metrics.group(group)["reports"][-1]["id"]
        visit = app.metrics.events(type="session_end", limit=1)["events"][0]["session_id"]
        for page in PAGES:
            path = page.replace("GROUP", group).replace("REPORT", report).replace("SESSION", visit)
            say(f"opening /{path}")
            if asked(path)[0] != 200:
                raise Failure(f"/{path} did not answer 200")
            times["/" + page] = [asked(path)[1] for _ in range(min(requests, 50))]
    return times


def in_process(app: Callable[..., Iterable[bytes]], prefix: str = "/api/v1/", **headers: str) -> Asked:
    """Asks a WSGI callable."""
    def asked(path: str) -> Tuple[int, float]:
        path_info, _, query = path.partition("?")
        environ: Dict[str, Any] = {"PATH_INFO": prefix + path_info, "QUERY_STRING": query,
                                   "wsgi.input": io.BytesIO(), **headers}
        setup_testing_defaults(environ)
        statuses: List[str] = []
        started = time.perf_counter()
        b"".join(app(environ, lambda status, headers, error=None: statuses.append(status)))
        return int(statuses[0][:3]), 1000 * (time.perf_counter() - started)
    return asked


def over_network(server: Running, stack: ExitStack) -> Asked:
    """Asks a server, by one connection that is kept."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=PATIENCE)
    stack.callback(connection.close)

    def asked(path: str) -> Tuple[int, float]:
        started = time.perf_counter()
        connection.request("GET", "/api/v1/" + path)
        response = connection.getresponse()
        response.read()
        return response.status, 1000 * (time.perf_counter() - started)
    return asked


def take_turns(path: str, sides: Sequence[Asked], requests: int) -> Optional[Pair]:
    """Asks both sides the same so many times; None where there is no such endpoint."""
    say(f"asking {path}")
    statuses = {asked(path)[0] for asked in sides}  # and so what is lazy, or far from the cache, is there
    if statuses == {404}:
        return None
    if statuses != {200}:
        raise Failure(f"{path} answered {statuses}")
    pair, deadline = Pair([], []), time.monotonic() + ANSWER_SECONDS
    while len(pair.small) < requests and (time.monotonic() < deadline or not pair.small):
        for asked, times in zip(sides, pair):
            times += [asked(path)[1] for _ in range(TURN)]
    return pair


class Ingested(NamedTuple):
    """Events a second, an item a round; the answers other than 201, and what is wrong with the empty databases."""

    rates: Pair
    errors: int
    problems: List[str]


def measure_ingest(large: Path, ledger: Ledger, arguments: argparse.Namespace, driver: Driver) -> Ingested:
    """Sends batches to the large database and to a new one, in turn."""
    found, problems, errors = Pair([], []), [], 0
    for number in range(arguments.rounds):
        empty, of_empty = large.parent / f"empty{number}.db", Ledger()
        sides = [(empty, of_empty, found.small), (large, ledger, found.large)]
        for db, entered, rates in sides[::-1 if number % 2 else 1]:
            write_bodies(db.parent, VISITS, range(number * INGEST_BODIES, (number + 1) * INGEST_BODIES), 64)
            with backfeedr(db, BACKFEEDR_RETENTION_DAYS="0") as server:
                load = driver.drive(VISITS, [server.url], INGEST_CONNECTIONS, lasting(ROUND_SECONDS))
            entered.add(VISITS, load, driver.abandons * INGEST_CONNECTIONS)
            rates.append(load.rate * BATCH)
            errors += load.errors
            say(f"round {number + 1} of {arguments.rounds}: batches to {db.stem}: {rates[-1]:,.0f} events/s"
                + (f", errors: {load.answers}" if load.errors else ""))
        problems += of_empty.check(empty)
        empty.unlink()
    return Ingested(found, errors, problems)


# == Pruning ===================================================================
#
# How long clients wait while a large part of a database goes: because the server was
# started with a shorter retention, or because its operator runs `prune`. Each time on a
# copy of the large database, and once on one where nothing is to go.

BY_SERVER, BY_COMMAND, NOTHING = "by the server", "by `prune`", "nothing"
KEPT_DAYS = 1
SETTLE = 1.0  # seconds of load after the last row is gone, so that who waited then is seen, too


class Pruned(NamedTuple):
    """What a pruning did, and what came of the requests meanwhile. Sizes are in bytes."""

    name: str
    seconds: float
    expired: Tuple[int, int]  # rows before and after
    size: Tuple[int, int]
    load: Load
    problems: List[str]


def measure_pruning(large: Path, driver: Driver) -> List[Pruned]:
    """Prunes in every way there is, and then lets as much time go by without."""
    write_bodies(large.parent, CRASH, range(BODIES), 64)
    pruned = [prune(large, BY_SERVER, driver, wait_for_server, server_keeps=KEPT_DAYS)]
    if subprocess.run([sys.executable, SERVER, "prune", "--help"], stdout=subprocess.DEVNULL,
                      stderr=subprocess.DEVNULL, timeout=PATIENCE).returncode == 0:
        pruned.append(prune(large, BY_COMMAND, driver, run_prune))
    seconds = min(60.0, max(each.seconds for each in pruned))
    return pruned + [prune(large, NOTHING, driver, lambda db: time.sleep(seconds))]


def prune(large: Path, name: str, driver: Driver, meanwhile: Callable[[Path], Any], server_keeps: int = 0) -> Pruned:
    """Copies the large database, and loads a server of the copy while `meanwhile` goes on."""
    db = large.parent / "prune.db"
    took: List[float] = []
    shutil.copyfile(large, db)
    size, expired, began_at = bytes_on_disk(db), count_expired(db), time.time()

    def watched() -> None:
        started = time.monotonic()
        meanwhile(db)
        took.append(time.monotonic() - started)
        time.sleep(SETTLE)

    say(f"pruning: {name}")
    with backfeedr(db, BACKFEEDR_RETENTION_DAYS=str(server_keeps)) as server:
        load = driver.drive(CRASH, [server.url], INGEST_CONNECTIONS, watched)
    result = Pruned(name, took[0], (expired, count_expired(db)), (size, bytes_on_disk(db)), load,
                    check_pruned(db, began_at, load, driver.abandons * INGEST_CONNECTIONS))
    db.unlink()
    return result


def first_kept() -> int:
    """The lowest seq that a pruning keeps."""
    return backfeedr_module().first_seq(int(1000 * (time.time() - KEPT_DAYS * 86_400)))


def count_expired(db: Path) -> int:
    """Rows that a pruning is to delete."""
    with closing(sqlite3.connect(db)) as connection:
        return sum(connection.execute(f"select count(*) from {table} where seq < ?", (first_kept(),)).fetchone()[0]
                   for table in ("events", "crashes"))


def check_pruned(db: Path, began_at: float, load: Load, abandoned: int) -> List[str]:
    """What is wrong with a database after a pruning: what came during it must be there."""
    with closing(sqlite3.connect(db)) as connection:
        stored, = connection.execute("select count(*) from crashes where received_at >= ?",
                                     (int(1000 * began_at),)).fetchone()
        integrity = [problem for problem, in connection.execute("pragma integrity_check") if problem != "ok"]
    lost = not 0 <= stored - load.created <= load.errors + abandoned
    return integrity + ([f"crashes: {load.created:,} acknowledged, {stored:,} stored"] if lost else [])


def wait_for_server(db: Path) -> None:
    """Until a running server has deleted what had expired when this began, or LONGEST is over."""
    first, deadline = first_kept(), time.monotonic() + LONGEST
    with closing(sqlite3.connect(db, timeout=PATIENCE)) as connection:
        while time.monotonic() < deadline and any(
                connection.execute(f"select 1 from {table} where seq < ? limit 1", (first,)).fetchone()
                for table in ("events", "crashes")):
            time.sleep(0.2)


def run_prune(db: Path) -> None:
    """`prune`, as an operator calls it while the server runs; it is ended when LONGEST is over."""
    try:
        subprocess.run([sys.executable, SERVER, "prune", "--db", db], stdout=subprocess.DEVNULL, check=True,
                       stderr=subprocess.PIPE, text=True, timeout=LONGEST,
                       env=environment(BACKFEEDR_RETENTION_DAYS=str(KEPT_DAYS)))
    except subprocess.TimeoutExpired:
        pass  # the rows that are left tell
    except subprocess.CalledProcessError as error:
        raise Failure(f"prune failed: {error.stderr.strip()[-200:]}") from None


# == PostgreSQL ================================================================

POSTGRES = HERE / "postgres.py"
IN_FILE, ONE_HOST, TWO_HOSTS = "SQLite", "PostgreSQL, one host", "PostgreSQL, two hosts"


class Side(NamedTuple):
    """Servers that store in one place, what they have acknowledged, and what was measured of each load."""

    name: str
    servers: List[Running]
    ledger: Ledger
    loads: Dict[Tuple[Scenario, int], List[Load]]


def measure_postgres(arguments: argparse.Namespace, folder: Path, driver: Driver) -> Tuple[List[Side], List[str]]:
    """Loads all sides in turn. The two of PostgreSQL are on the same tables."""
    db, in_file, shared = folder / "bench.db", Ledger(), Ledger()
    with ExitStack() as stack:
        url = stack.enter_context(throw_away_schema(arguments.url))
        hosts = [stack.enter_context(Running(
            POSTGRES, url, "serve", "--host", "127.0.0.1", "--port", "0",
            BACKFEEDR_API_KEY=KEY, BACKFEEDR_RATE_LIMIT="0")) for _ in range(2)]
        file = stack.enter_context(backfeedr(db))
        sides = [Side(IN_FILE, [file], in_file, {}), Side(ONE_HOST, hosts[:1], shared, {}),
                 Side(TWO_HOSTS, hosts, shared, {})]
        for number in range(1, arguments.rounds + 1):
            for scenario in SCENARIOS:
                for connections in arguments.connections:
                    for side in sides[::1 if number % 2 else -1]:  # as one leaves work to the database for the next
                        load = driver.drive(scenario, [server.url for server in side.servers], connections,
                                            lasting(arguments.seconds / arguments.rounds))
                        side.loads.setdefault((scenario, connections), []).append(load)
                        side.ledger.add(scenario, load, driver.abandons * connections)
                        say(f"round {number} of {arguments.rounds}: {scenario.name}, {connections} connections,"
                            f" {side.name}: {load.rate:,.0f} requests/s"
                            + (f", errors: {load.answers}" if load.errors else ""))
                        time.sleep(0.3)  # in which what was abandoned is stored
        for server in (file, *hosts):
            server.stop()
        problems = shared.compare(count_rows(url, shared.tables))
    return sides, problems + in_file.check(db)


def postgres_module() -> ModuleType:
    """examples/postgres.py."""
    backfeedr_module()
    sys.path.insert(0, str(HERE))
    try:
        return importlib.import_module("postgres")
    except ImportError as error:
        raise Failure(f"{error}; 'pip install \"psycopg[binary,pool]\"' installs it") from None


@contextmanager
def throw_away_schema(url: str) -> Iterator[str]:
    """The URL of a schema that is made for this run. Raises Failure where the database does not do as it is told."""
    module, name, left = postgres_module(), f"backfeedr_benchmark_{os.urandom(4).hex()}", ""

    def run(statement: str) -> None:
        with closing(module.Connection.connect(url)) as db:  # as one that is kept may be lost on the way
            db.run(f"set lock_timeout = '{PATIENCE:.0f}s'; {statement}")

    try:
        run(f"create schema {name}")
        left = f"; the schema {name} is left there"
        try:
            options = module.conninfo_to_dict(url).get("options", "")
            ours = module.make_conninfo(url, options=f"{options} -csearch_path={name}".strip())
            with closing(module.Connection.connect(ours)) as db:
                version, fsync, commit = (db.execute(f"show {setting}").fetchone()[0] for setting in (
                    "server_version", "fsync", "synchronous_commit"))
            print(f"PostgreSQL {version}, fsync {fsync}, synchronous_commit {commit}; its data wherever it has them;"
                  " no rate limit", flush=True)
            yield ours
        finally:
            run(f"drop schema {name} cascade")
            left = ""
    except module.psycopg.Error as error:
        raise Failure(str(error).strip().splitlines()[0] + left) from None


def count_rows(url: str, tables: Iterable[str]) -> Dict[str, int]:
    """How many rows there are, by table."""
    with closing(postgres_module().Connection.connect(url)) as db:
        return {table: db.execute(f"select count(*) from {table}").fetchone()[0] for table in tables}


# == Report ====================================================================

def report(results: Results) -> None:
    """Prints what was measured, and how it compares with what was promised."""
    rows = [("driver", "scenario", "connections", "requests/s", "bare", "ratio", "events/s", "of raw",
             "p50 ms", "p99 ms", "errors", "memory MB")]
    for cell in results.cells:
        rate, is_batch = median(load.rate for load in cell.ours), cell.scenario is EVENTS
        rows.append((
            results.driver, cell.scenario.name, f"{cell.connections}", f"{rate:,.0f}",
            f"{median(load.rate for load in cell.bare):,.0f}", f"{cell.to_bare:.2f}",
            f"{rate * BATCH:,.0f}" if is_batch else "-", f"{cell.to_raw(results.raw):.2f}" if is_batch else "-",
            f"{median(load.median for load in cell.ours):.1f}", f"{median(load.p99 for load in cell.ours):.1f}",
            f"{sum(load.errors for load in cell.ours)}", megabytes(cell.memory[-1])))
    print_table(rows, left=2)
    print(f"""
bare      requests/s of bottle and waitress alone; ratio: of backfeedr to that
of raw    events/s to raw executemany of the same rows, {BATCH} a commit: {median(results.raw):,.0f} rows/s
memory    of the server: {megabytes(results.at_rest)} MB at rest, {megabytes(results.peak)} MB at most
disk      {results.size.bytes_per_event:.1f} bytes per event, indexes and roll-ups included, over {SIZE_EVENTS:,} events
errors    answers other than 201 and socket errors, of both sides: {results.errors}
stored    {results.ledger} acknowledged
""")
    print_targets(targets(results))


# What was promised: a name, the value, whether it is to be at least or at most the bound, its digits.
Target = Tuple[str, Optional[float], bool, float, int]


def print_targets(promised: Iterable[Target]) -> None:
    """Prints what was promised, and whether it is so."""
    print("Targets")
    print_table([("  " + what, "at least" if at_least else "at most", f"{bound:g}",
                  "n/a" if value is None else f"{value:.{digits}f}",
                  "" if value is None else "met" if (value >= bound if at_least else value <= bound) else "not met")
                 for what, value, at_least, bound, digits in promised], left=1)


def targets(results: Results) -> Iterator[Target]:
    """What was promised of reports that come in."""
    def of(figure: Callable[..., float], *names: Tuple[Scenario, int]) -> Optional[float]:
        return figure(*map(cells.get, names)) if cells.keys() >= set(names) else None

    cells = {(cell.scenario, cell.connections): cell for cell in results.cells}
    for number in (16, 64):
        yield f"crashes to bare, {number} connections", of(lambda cell: cell.to_bare, (CRASH, number)), True, 0.6, 3
    yield "crashes, 64 connections to 16", of(
        lambda many, few: many.to(load.rate for load in few.ours), (CRASH, 64), (CRASH, 16)), True, 0.85, 3
    for number in (16, 64):
        yield f"events to raw, {number} connections", of(
            lambda cell: cell.to_raw(results.raw), (EVENTS, number)), True, 0.55, 3
    yield "MB of memory at rest", results.at_rest, False, 60, 1
    yield "MB of memory under load", results.peak, False, 100, 1
    yield "bytes on disk per event", results.size.bytes_per_event, False, 220, 1
    yield "errors", results.errors, False, 0, 0


def report_postgres(sides: Sequence[Side]) -> None:
    """Prints how the sides compare."""
    rows: List[Sequence[str]] = [("scenario", "connections", "", "requests/s", "events/s", "to SQLite", "to one host",
                                  "p50 ms", "p99 ms", "errors")]
    in_file, one_host, _ = (side.loads for side in sides)
    for cell in in_file:
        scenario, connections = cell
        for side in sides:
            loads = side.loads[cell]
            rate = median(load.rate for load in loads)
            to_file, to_one = (median(load.rate / other.rate for load, other in zip(loads, others[cell]))
                               for others in (in_file, one_host))
            rows.append((
                scenario.name, f"{connections}", side.name, f"{rate:,.0f}",
                f"{rate * BATCH:,.0f}" if scenario is EVENTS else "-", f"{to_file:.2f}",
                f"{to_one:.2f}" if side.name == TWO_HOSTS else "-", f"{median(load.median for load in loads):.1f}",
                f"{median(load.p99 for load in loads):.1f}", f"{sum(load.errors for load in loads)}"))
    print_table(rows, left=3)


MOST_MS, MOST_RATIO = 5, 2  # of a median answer in the server
MOST_PAGE_MS = 30  # of a page


def report_answers(answers: Sequence[Answered]) -> None:
    """Prints how long every question takes."""
    rows: List[Sequence[str]] = [("milliseconds to answer", "small p50", "large p50", "ratio", "large p99",
                                  "client: small p50", "large p50", "large p99", "")]
    for each in answers:
        if each.inside and each.outside:
            rows.append(("  " + each.path, *(f"{median(times):.2f}" for times in each.inside),
                         f"{each.inside.ratio:.2f}", f"{p99(each.inside.large):.2f}",
                         *(f"{median(times):.2f}" for times in each.outside), f"{p99(each.outside.large):.2f}",
                         "met" if each.is_met else "not met"))
        else:
            rows.append(("  " + each.path, *["-"] * 7, "not there"))
    print_table(rows, left=1)
    print(f"""
met       in the server, a median of at most {MOST_MS} ms, and of {MOST_RATIO} times that with the small database
          (for a year: {MOST_MS} ms only)
client    until it had the answer, by a connection that it keeps
""", flush=True)


def report_pages(pages: Dict[str, List[float]]) -> None:
    """Prints how long every page takes."""
    rows: List[Sequence[str]] = [("milliseconds in the server, from the large database", "p50", "longest", "")]
    rows += [("  " + page, f"{median(times):.1f}", f"{max(times):.1f}",
              "met" if median(times) <= MOST_PAGE_MS else "not met") for page, times in pages.items()]
    print_table(rows, left=1)
    print(f"\nmet       a median of at most {MOST_PAGE_MS} ms\n", flush=True)


def p99(figures: Sequence[float]) -> float:
    """What one in a hundred is above."""
    return sorted(figures)[len(figures) * 99 // 100]


def report_ingest(ingested: Ingested) -> None:
    """Prints how fast events come in."""
    small, large = ingested.rates
    print(f"batches of {BATCH} at {INGEST_CONNECTIONS} connections:"
          f" {median(large):,.0f} events/s to the large database, {median(small):,.0f} to an empty one\n", flush=True)


def report_pruning(pruned: Sequence[Pruned]) -> None:
    """Prints what was pruned, and what clients felt of it."""
    rows: List[Sequence[str]] = [("pruned", "seconds", "expired rows", "after", "MB", "after", "requests", "p50 ms",
                                  "p99 ms", "longest ms", "errors")]
    rows += [(f"  {each.name}", f"{each.seconds:.1f}", *(f"{count:,}" for count in each.expired),
              *(f"{size / 1e6:.0f}" for size in each.size), f"{each.load.created:,}", f"{each.load.median:.1f}",
              f"{each.load.p99:.1f}", f"{each.load.longest:.0f}", f"{each.load.errors}") for each in pruned]
    if not any(each.name == BY_COMMAND for each in pruned):
        rows.append((f"  {BY_COMMAND}", *["-"] * 9, "not there"))
    print_table(rows, left=1)
    print(f"""
requests  crashes from {INGEST_CONNECTIONS} connections that do nothing else
""", flush=True)


def growth_targets(answers: Sequence[Answered], pages: Dict[str, List[float]], ingested: Ingested,
                   pruned: Sequence[Pruned], errors: int) -> Iterator[Target]:
    """What was promised of a database that grows."""
    there = [each for each in answers if each.inside]
    slowest, steepest = max(there, key=lambda each: each.median), max(there, key=lambda each: each.ratio)
    yield f"ms to answer, the slowest: {slowest.path}", slowest.median, False, MOST_MS, 2
    yield f"large to small, the steepest: {steepest.path}", steepest.ratio, False, MOST_RATIO, 2
    page = max(pages, key=lambda path: median(pages[path]))
    yield f"ms of the slowest page: {page.split('?')[0]}", median(pages[page]), False, MOST_PAGE_MS, 1
    rates = zip(ingested.rates.large, ingested.rates.small)
    yield "events a second, large to empty", median(large / small for large, small in rates), True, 0.8, 2
    for each in pruned:
        if each.name != NOTHING:
            yield f"ms of the longest wait, pruned {each.name}", each.load.longest, False, 250, 0
    if pruned:
        yield "expired rows left", sum(each.expired[1] for each in pruned if each.name != NOTHING), False, 0, 0
    yield "errors", errors, False, 0, 0


def print_table(rows: Sequence[Sequence[str]], left: int) -> None:
    """Prints rows in columns, the first so many to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) if number < left else cell.rjust(width)
                        for number, (cell, width) in enumerate(zip(row, widths))).rstrip())


def megabytes(value: Optional[float]) -> str:
    """For people."""
    return "n/a" if value is None else f"{value:.1f}"


def say(text: str) -> None:
    """Progress, on standard error: a line each, or, on a terminal, one line that changes."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def filesystem(folder: Path) -> str:
    """The type of the filesystem that a folder is on; "" where the system does not say."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return ""
    return max(((len(point), kind) for point, kind in mounts if Path(point) in (folder, *folder.parents)))[1]


# == Command line ==============================================================

def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs a command; without one, `ingest`. Returns 1 if a request failed or a report was lost."""
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or given[0].startswith("-") and given[0] not in ("-h", "--help"):
        given.insert(0, "ingest")
    arguments = parser().parse_args(given)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by an exception, so that all that runs is ended
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        return 130
    except (Failure, OSError, sqlite3.Error, multiprocessing.TimeoutError, subprocess.TimeoutExpired) as error:
        say("")
        print(f"benchmark: {error or type(error).__name__}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    outer = argparse.ArgumentParser(description="Measures backfeedr on this host.", epilog=(
        "Without a command: ingest. 'COMMAND --help' lists the options of a command."))
    commands = outer.add_subparsers(title="commands", metavar="COMMAND", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--driver", choices=("wrk", "python"), help="who sends (default: wrk, if it is installed)")
    shared.add_argument("--dir", type=Path, metavar="DIR", default=Path("."),
                        help="where to put the temporary databases (default: the current directory)")
    command = commands.add_parser("ingest", parents=[shared], help="reports that come in: speed, memory, bytes on disk")
    command.set_defaults(run=ingest)
    add = command.add_argument
    add("--seconds", type=float, metavar="N", default=10.0, help="of each measurement, over all rounds (default: 10)")
    add("--connections", type=connections, metavar="N,N", default=[1, 16, 64], help="default: 1,16,64")
    add("--quick", action="store_true", help="a first impression, from a single short round")
    add("--device-hash-length", type=int, metavar="N", default=len(example("event.json")["device_id_hash"]),
        help="characters of a device_id_hash; SHA-256 gives 64 (default: %(default)s, as in the reference)")
    add("--memory-events", type=int, metavar="N", default=0,
        help="at the end, store N events and compare the memory with that after 10,000")
    command = commands.add_parser("metrics", parents=[shared], help="what becomes of it as the database grows:"
                                  " the public figures, speed, pruning")
    command.set_defaults(run=metrics)
    add = command.add_argument
    add("--events", type=int, metavar="N", default=1_000_000, help="of the large database (default: 1000000)")
    add("--small", type=int, metavar="N", default=10_000, help="events of the small database (default: 10000)")
    add("--requests", type=int, metavar="N", default=300, help="of each question (default: 300)")
    add("--rounds", type=int, metavar="N", default=4, help=f"of {ROUND_SECONDS:g} s each, of ingest (default: 4)")
    add("--no-prune", action="store_true", help="leave out how clients fare while old reports are pruned")
    command = commands.add_parser("postgres", parents=[shared], help="SQLite beside PostgreSQL, by one host and by two")
    command.set_defaults(run=postgres)
    add = command.add_argument
    add("url", metavar="URL", help="of a database; a schema is made in it, and dropped at the end")
    add("--seconds", type=float, metavar="N", default=10.0, help="of each measurement, over all rounds (default: 10)")
    add("--connections", type=connections, metavar="N,N", default=[16, 64], help="default: 16,64")
    hidden = commands.add_parser("_bare")
    hidden.add_argument("answers", type=Path)
    hidden.set_defaults(run=bare)
    return outer


def connections(text: str) -> List[int]:
    """Numbers with commas between them."""
    return sorted({int(number) for number in text.split(",")})


def ingest(arguments: argparse.Namespace) -> int:
    """What the host holds of reports that come in."""
    arguments.seconds = 0.8 if arguments.quick else arguments.seconds
    arguments.rounds = max(1, round(arguments.seconds / ROUND_SECONDS))
    most = max(arguments.connections)
    if arguments.seconds < 0.2 or min(arguments.connections) < 1 or most > 512 or arguments.device_hash_length < 8:
        raise Failure("at least 0.2 seconds, 1 to 512 connections and 8 characters of a device_id_hash")
    with working_folder(arguments.dir) as folder:
        for scenario in SCENARIOS:
            write_bodies(folder, scenario, range(BODIES), arguments.device_hash_length)
        with closing(make_driver(arguments.driver, folder, most)) as driver:
            introduce(folder, f"{arguments.rounds} x {arguments.seconds / arguments.rounds:g} s for each figure; driver"
                              f" {driver.name}; device_id_hash of {arguments.device_hash_length} characters")
            say(f"measuring the bytes on disk with {SIZE_EVENTS:,} events")
            results = measure_all(arguments, folder, driver, measure_size(folder))
            say("")
            report(results)
            problems = results.problems
            if arguments.memory_events:
                problems += measure_memory(arguments.memory_events, most, folder, driver)
                say("")
    return conclude(problems, results.errors)


def metrics(arguments: argparse.Namespace) -> int:
    """What becomes of figures, speed and waits as a database grows."""
    if not 1000 <= arguments.small <= arguments.events or min(arguments.requests, arguments.rounds) < 1:
        raise Failure("at least 1000 events in the small database, no fewer in the large one, a request and a round")
    with working_folder(arguments.dir) as folder, closing(
            make_driver(arguments.driver, folder, INGEST_CONNECTIONS)) as driver:
        introduce(folder, f"{arguments.small:,} and {arguments.events:,} events, a crash for {EVENTS_PER_CRASH};"
                          f" {arguments.requests} requests of each question; driver {driver.name}")
        small, large, ledger = folder / "small.db", folder / "large.db", Ledger()
        try:
            fill(small, arguments.small, Ledger())
            fill(large, arguments.events, ledger)
        except backfeedr_module().Refusal as refusal:
            raise Failure(f"the databases cannot be filled: {refusal}") from refusal
        answers = measure_answers(small, large, arguments.requests)
        say("")
        report_answers(answers)
        pages = measure_pages(large, arguments.requests)
        say("")
        report_pages(pages)
        ingested = measure_ingest(large, ledger, arguments, driver)
        say("")
        report_ingest(ingested)
        problems = ingested.problems + ledger.check(large)
        pruned = [] if arguments.no_prune else measure_pruning(large, driver)
        say("")
        if pruned:
            report_pruning(pruned)
        errors = ingested.errors + sum(each.load.errors for each in pruned)
        print_targets(growth_targets(answers, pages, ingested, pruned, errors))
    return conclude(problems + [problem for each in pruned for problem in each.problems], errors)


def postgres(arguments: argparse.Namespace) -> int:
    """What PostgreSQL costs, and what a second host adds."""
    arguments.rounds = max(1, round(arguments.seconds / ROUND_SECONDS))
    most = max(arguments.connections)
    if arguments.seconds < 0.2 or min(arguments.connections) < 2 or most > 512:
        raise Failure("at least 0.2 seconds, and 2 to 512 connections")
    with working_folder(arguments.dir) as folder, closing(make_driver(arguments.driver, folder, most)) as driver:
        for scenario in SCENARIOS:
            write_bodies(folder, scenario, range(BODIES), len(example("event.json")["device_id_hash"]))
        introduce(folder, f"{arguments.rounds} x {arguments.seconds / arguments.rounds:g} s for each figure; driver"
                          f" {driver.name}")
        sides, problems = measure_postgres(arguments, folder, driver)
        say("")
        report_postgres(sides)
    return conclude(problems, sum(load.errors for side in sides for loads in side.loads.values() for load in loads))


def conclude(problems: Sequence[str], errors: int) -> int:
    """Prints what is wrong with the databases; returns the exit status."""
    print("".join(f"\nNOT AS IT SHOULD BE: {problem}" for problem in problems)
          or "\nAll that was acknowledged is stored, and the databases are sound.")
    return 1 if problems or errors else 0


@contextmanager
def working_folder(parent: Path) -> Iterator[Path]:
    """A folder for databases, which is gone at the end."""
    with tempfile.TemporaryDirectory(prefix="backfeedr-benchmark-", dir=parent) as name:
        yield Path(name).resolve()


def introduce(folder: Path, what: str) -> None:
    """Prints what is measured, where and how."""
    where = filesystem(folder)
    print(f"{platform.python_implementation()} {platform.python_version()}, SQLite {sqlite3.sqlite_version},"
          f" {os.cpu_count()} cores; databases in {folder}{f' ({where})' if where else ''}")
    print(what + "\n", flush=True)
    if where in ("tmpfs", "ramfs"):
        print(f"WARNING: {where} is memory: nothing here costs what it costs on a disk. See --dir.\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
