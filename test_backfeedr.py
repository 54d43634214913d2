"""Tests of backfeedr, in the order of its sections.

Each test asserts the answer and what is stored. Time is a `Clock` that is moved by
hand. Every server made by `serve` is checked when its test ends: each roll-up must
equal a count over the rows in plain Python.
"""

from __future__ import annotations

import argparse
import base64
import csv
import dataclasses
import errno
import fnmatch
import gc
import gzip
import hashlib
import html
import http.client
import http.server
import importlib.util
import io
import json
import lzma
import os
import plistlib
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import weakref
import zipfile
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import date, datetime, timezone
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction
from functools import cache, lru_cache, partial
from itertools import accumulate, islice, product
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlencode, urlsplit
from uuid import UUID
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.validate import validator
from xml.etree import ElementTree

import jsonschema
import pytest
import webtest
from jsonschema import Draft202012Validator

import backfeedr
from backfeedr import (DAY, HOUR, Backfeedr, Idempotency, RateLimiter, Refusal, Settings, SettingsError,
                       StorageUnavailable, Store, StoreError, group_hash, main, parse_crash, parse_event, parse_time,
                       read_frame)

HERE = Path(__file__).parent
EXAMPLES = HERE / "examples"
SERVER = Path(backfeedr.__file__)  # in a wheel, if that is tested
KEY = "bf_live_0123456789abcdef0123456789abcdef"
TOKEN = "bf_admin_0123456789abcdef0123456789abcdef"
NOW = "2026-03-12T14:30:00Z"  # a Thursday
CRASH = {"exception_type": "SIGABRT", "occurred_at": "2026-03-12T14:22:31Z"}
EVENT = {"type": "custom", "name": "purchase", "occurred_at": "2026-03-12T14:22:31Z"}
CRASHES, EVENTS, BATCH = "/api/v1/crashes", "/api/v1/events", "/api/v1/events/batch"
DIAGNOSTICS = "/api/v1/diagnostics"
METRICS = ["/api/v1/metrics/daily-crashes", "/api/v1/metrics/crash-types", "/api/v1/metrics/devices",
           "/api/v1/overview", "/api/v1/metrics/active-devices", "/api/v1/metrics/sessions",
           "/api/v1/metrics/retention", "/api/v1/releases"]
REPORT_TABLES = ["crashes", "events", *backfeedr.PRIMARY_KEYS]


class Clock:
    """A clock that stands still until it is moved, in seconds since 1970."""

    def __init__(self, at=NOW):
        self.seconds = parse_time(at) / 1000

    def __call__(self):
        return self.seconds

    def move(self, seconds):
        self.seconds += seconds


class Api:
    """A client of one server. It calls the server directly, without a socket."""

    def __init__(self, server, prefix=""):
        self.server, self.prefix = server, prefix
        self.web = webtest.TestApp(server)

    def post(self, path, body, key=KEY, **headers):
        """Sends an object as JSON, or bytes as they are. Returns the status and the JSON of the answer."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        http_headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if key is not None:
            http_headers["X-Backfeedr-Key"] = key
        return self.read(self.web.post(
            self.prefix + path, raw, http_headers, content_type="application/json", expect_errors=True))

    def get(self, path, **headers):
        return self.read(self.web.get(self.prefix + path, headers=headers, expect_errors=True))

    def read(self, answer):
        assert answer.content_type == "application/json"
        self.headers = answer.headers
        return answer.status_int, answer.json

    def signed(self, path, body, timestamp, key=KEY, **headers):
        signature = backfeedr.sign(key.encode(), timestamp.encode(), body)
        return self.post(path, body, key, X_Backfeedr_Timestamp=timestamp, X_Backfeedr_Signature=signature, **headers)


@pytest.fixture
def clock():
    return Clock()


# The URL of a PostgreSQL database for tests. If it is set, only those tests run that use the fixture `schemas`, as all
# do that use `serve`. Each gets a schema of its own. Tests about SQLite or its file are marked `sqlite_only`.
POSTGRES = os.environ.pop("BACKFEEDR_TEST_POSTGRES", "")
needs_postgres = pytest.mark.skipif(not POSTGRES, reason="BACKFEEDR_TEST_POSTGRES is not set")
sqlite_only = pytest.mark.skipif(bool(POSTGRES), reason="is about SQLite and its file; runs without a PostgreSQL")


@pytest.fixture(autouse=True)
def not_twice(request):
    """Skips tests without a database if the tests run on PostgreSQL, because they also run without it."""
    marks = [mark.name for mark in request.node.own_markers]
    if POSTGRES and not {"schemas", "cluster"} & {*request.fixturenames} and "skipif" not in marks:
        pytest.skip("uses no database; runs without PostgreSQL")


@cache
def postgres():
    """The module examples/postgres.py."""
    return load_example("postgres")


@lru_cache(maxsize=8)
def postgres_connection(url):
    """A connection that is kept, because making one takes longer than most queries."""
    return postgres().Connection.connect(url)


@pytest.fixture(scope="session")
def spare_schemas():
    """The URLs of schemas with empty tables. Emptying a schema takes less time than making one."""
    spare = []
    yield spare
    for url in spare:
        postgres_connection(POSTGRES).run(f"drop schema {url.rpartition('%3D')[2]} cascade")


@pytest.fixture
def schemas(spare_schemas):
    """A function from a name to the URL of a schema, which is emptied or dropped when the test ends."""
    made = {}

    def url(name="test.db", has_tables=True):
        if name not in made and spare_schemas and has_tables:
            made[name] = spare_schemas.pop()
        elif name not in made:
            schema = f"t{os.urandom(6).hex()}"
            postgres_connection(POSTGRES).run(f"create schema {schema}")
            made[name] = f"{POSTGRES}?options=-csearch_path%3D{schema}"
        return made[name]

    yield url
    for schema_url in made.values():
        if sql(schema_url, TRANSACTIONS) == [(1,)]:  # else the test has changed more than rows
            sql_run(schema_url, EMPTY_TABLES)
            spare_schemas.append(schema_url)
        else:
            postgres_connection(POSTGRES).run(f"drop schema {schema_url.rpartition('%3D')[2]} cascade")


TRANSACTIONS = """
select count(distinct xmin::text) from pg_class where relnamespace = current_schema()::regnamespace"""
EMPTY_TABLES = f"""
do $$
declare place oid := current_schema()::regnamespace; each regclass;
begin
    for each in select oid from pg_class where relnamespace = place and relkind = 'r' loop
        execute 'delete from ' || each;
    end loop;
    insert into state values ('writer', 0), ('schema_version', {backfeedr.SCHEMA_VERSION});
    perform setval(seqrelid, seqstart, false) from pg_sequence join pg_class on pg_class.oid = seqrelid
        where relnamespace = place;
end $$
"""


@cache
def new_database():
    """The bytes of a new database with a key and a token. Copying it is faster than many calls of fsync."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "new.db")
        Backfeedr(Settings(db_path=str(path), api_key=KEY, auth_token=TOKEN), clock=Clock()).close()
        return path.read_bytes()


@pytest.fixture
def serve(tmp_path, clock, schemas):
    """A function that makes servers. When the test ends, their roll-ups are compared with their rows."""
    servers = []

    def make(name="test.db", **settings):
        """A server with a key and a token."""
        all_settings = Settings(**{"db_path": str(tmp_path / name), "api_key": KEY, "auth_token": TOKEN, **settings})
        db_path, limit = Path(all_settings.db_path), all_settings.rate_limit
        if not (POSTGRES or db_path.exists() or settings.keys() & {"api_key", "auth_token"}):
            db_path.touch(0o600)
            db_path.write_bytes(new_database())
        store = POSTGRES and postgres().PostgresStore(schemas(name), clock, all_settings.retention_days)
        limiter = postgres().PostgresLimiter(store, limit, clock=clock) if store else RateLimiter(limit, clock=clock)
        server = Backfeedr(all_settings, clock=clock, store=store or None, limiter=limiter)
        servers.append((server, limiter))
        return server

    make.unchecked = []
    yield make
    for server, limiter in servers:
        server.close()
        if POSTGRES:
            limiter.close()
        if server not in make.unchecked:
            check_database(server.store.path)


@pytest.fixture
def server(serve):
    return serve()


@pytest.fixture
def api(server):
    return Api(server)


def sql(path, query, *values):
    """The rows of a query, read through a connection other than the server's."""
    with connected(path) as db:
        return db.execute(query, values).fetchall()


def path_of(place):
    """The path of the database of a server; anything else is a path, or a connection, already."""
    return place.store.path if hasattr(place, "store") else place


@contextmanager
def connected(place):
    """A connection to the database of a server, to an SQLite file, or to PostgreSQL if the place is a URL. Its changes
    are committed. An open connection is returned as it is: opening a file takes longer than most queries, because
    SQLite reads the schema."""
    path = path_of(place)
    if not isinstance(path, (str, Path)):
        yield path
    elif str(path).startswith("postgresql:"):
        yield postgres_connection(path)
    else:
        with closing(sqlite3.connect(str(path))) as db, db:
            yield db


def content_of(path):
    """All bytes of a database: its file, or the values in its tables on PostgreSQL."""
    if not POSTGRES:
        return path_of(path).read_bytes()
    return b"\n".join(value if isinstance(value, bytes) else str(value).encode()
                      for table in ("apps", "keys", "secrets", "grants", *REPORT_TABLES)
                      for row in sql(path, f"select * from {table}") for value in row)


def sql_run(path, statement):
    with connected(path) as db:
        db.execute(statement)


def raising(error):
    """A function that raises this error, whatever it is given."""
    def fail(*_, **__):
        raise error
    return fail


def time_text(seconds):
    """RFC 3339 of seconds since 1970."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def stored(server, *tables):
    """The rows of these tables, or of all tables that reports are stored in."""
    with connected(server.store.path) as db:
        contents = {table: db.execute(f"select * from {table}").fetchall() for table in tables or REPORT_TABLES}
    # PostgreSQL returns rows in any order.
    return {table: sorted(rows, key=repr) for table, rows in contents.items()} if POSTGRES else contents


def commits_of(store):
    """How many commits a store has made, and how many requests they stored."""
    return store._process.commits, store._process.committed_requests


def report(server, table="crashes"):
    """The one stored report of a table, by column."""
    row, = rows_by_name(server.store.path, f"select * from {table}")
    return row


def rows_by_name(path, query):
    with connected(path) as db:
        return backfeedr.dict_rows(db, query)


def check_database(path, forgotten=False):
    """The file is sound, and each figure equals a slow and obvious computation over the rows.

    If a device was forgotten, first and last times are not compared, because its reports may have set them.
    """
    with connected(path) as db:  # only one connection, because each reads the whole schema first
        assert POSTGRES or db.execute("pragma integrity_check").fetchall() == [("ok",)]
        expected, actual = recount(db), figures(db)
    if forgotten:
        for tables in expected, actual:
            tables["builds"] = {}
            tables["groups"] = {key: (row[0], *row[3:-1]) for key, row in tables["groups"].items()}
    for table in expected:
        assert actual[table] == expected[table], table
    assert POSTGRES or backfeedr._check_roll_ups(Path(path_of(path)).absolute()), "`check` comes to the same result"


def windows(db):
    """Whether a table holds a key: some hold only a window of time."""
    newest = db.execute("""
        select max(at) from (select received_at as at from crashes union all select received_at from events union all
            select value from state where name = 'counted_at') as times""").fetchone()[0] or 0
    first = dict(group_days=newest // DAY - 7, release_days=newest // DAY - 7, durations=newest // DAY - 400,
                 event_names=newest // DAY - 90, device_hours=newest // HOUR - 48)  # a day or an hour
    return lambda table, key: table not in first or key[3 if table == "event_names" else 1] >= first[table]


def figures(db):
    """The stored figures: each table by its key, the first columns, without rows from before its window."""
    is_held = windows(db)
    tables = {table: {row[:len(key)]: row[len(key):] for row in db.execute(f"select * from {table}")
                      if is_held(table, row)} for table, key in backfeedr.PRIMARY_KEYS.items()}
    tables["devices"] = {key: row[:2] for key, row in tables["devices"].items()}
    tables["groups"] = {key: row[:5] + row[7:] for key, row in tables["groups"].items()}
    return tables


def recount(db):
    """What `figures` must return, computed from the reports alone."""
    not_from_reports = {"replays", "new_names", "medians", "key_days",
                        "regroupings", "group_aliases", "triage", "group_history"}
    tables = {table: defaultdict(Counter) for table in backfeedr.PRIMARY_KEYS.keys() - not_from_reports}
    crashes, events = rows_of_table(db, "crashes"), rows_of_table(db, "events")
    for row in crashes:
        app, day = row["app_id"], row["at"] // DAY
        tables["crash_days"][app, day]["crashes"] += 1
        tables["group_days"][app, day, row["group_hash"]]["crashes"] += 1
        for uuid in (row["images"] or "").split():
            tables["group_images"][app, row["group_hash"], uuid]["crashes"] += 1
        for field in ("exception_type", "device_model"):
            for each in (-1_000_000, day) if row[field] else ():
                tables["labels"][app, field, each, row[field]]["crashes"] += 1
        if row["app_version"]:
            tables["release_sums"][app, row["app_version"]]["crashes"] += 1
    for key, rows in grouped(crashes, "app_id", "group_hash").items():
        first, latest = (choose(rows, key=lambda row: (row["at"], row["seq"])) for choose in (min, max))
        name = "(other)" if key[1] == "(other)" else latest["sent_type"]
        reason = (latest["exception_reason"] or "")[:500] or None
        tables["groups"][key] = (
            name, first["at"], first["app_version"], latest["at"], reason, len(rows),
            len(grouped(rows, "device_id_hash")), min(row["received_at"] for row in rows))
    for row in events:
        if row["type"] in ("error", "custom"):
            tables["event_names"][row["app_id"], row["name"] or "", row["type"], row["at"] // DAY]["events"] += 1
    reports = sorted(crashes + events, key=lambda row: row["seq"])
    for row in reports:
        row["build"] = row.get("build_number") or ""
    for key, rows in grouped(reports, "app_id", "app_version", "build").items():
        times = [row["received_at"] for row in rows]
        tables["builds"][key] = min(times), max(times)
    recount_sessions(tables, reports)
    recount_devices(tables, reports)
    is_held = windows(db)
    for table, rows in tables.items():
        names = [each[0] for each in db.execute(f"select * from {table}").description]
        sums = names[len(backfeedr.PRIMARY_KEYS[table]):]
        tables[table] = {key: tuple(row[name] for name in sums) if type(row) is Counter else row
                         for key, row in rows.items() if is_held(table, key)}
    return tables


def recount_sessions(tables, reports):
    for row in reports:
        row["device"] = backfeedr.device_key(row["device_id_hash"])
        if row.get("type") == "session_start" and not row["session_id"]:
            count_session(tables, row, None, 0)
    for key, rows in grouped(reports, "app_id", "session_id", "device").items():
        starts = [row for row in rows if row.get("type") == "session_start"]
        start = min(starts, key=lambda row: (row["at"], row["app_version"] or "")) if starts else None
        end = max((row["at"] for row in rows if row.get("type") == "session_end"), default=None)
        crashed = int(any("exception_type" in row for row in rows))
        tables["sessions"][key] = (
            rows[0]["seq"], rows[-1]["seq"], start and start["at"], end, start and start["app_version"], crashed)
        if start:
            count_session(tables, start, end, crashed)


def count_session(tables, start, end, crashed):
    app, at, version = start["app_id"], start["at"], start["app_version"]
    if version:
        tables["release_sums"][app, version].update(sessions=1, crashed_sessions=crashed)
        tables["release_days"][app, at // DAY, version]["sessions"] += 1
    tables["session_days"][app, at // DAY]["sessions"] += 1
    if end is not None and 0 <= end - at <= DAY:
        tables["session_days"][app, at // DAY].update(ended=1, session_ms=end - at)
        tables["durations"][app, at // DAY, two_digits(end - at)]["sessions"] += 1


def recount_devices(tables, reports):
    for (app, device), rows in grouped(reports, "app_id", "device_id_hash").items():
        key, times = (app, backfeedr.device_key(device)), [row["at"] for row in rows]
        first, seen = min(times) // DAY, {row["at"] // DAY for row in rows
                                          if row["at"] // DAY >= row["received_at"] // DAY - 400}
        tables["devices"][key] = first, max(times) // HOUR
        tables["device_days"].update({(*key, day): () for day in seen})
        tables["device_hours"][app, max(times) // HOUR]["devices"] += 1
        for name, span in (("dau", 1), ("wau", 7), ("mau", 30)):
            for day in {day + later for day in seen for later in range(span)}:
                tables["active_days"][app, day][name] += 1
        tables["cohorts"][app, first].update(devices=1, **{f"back_{n}": int(first + n in seen) for n in (1, 7, 30)})
        for version in {row["app_version"] for row in rows} - {None}:
            hours = [(row["received_at"] // HOUR, "exception_type" in row) for row in rows
                     if row["app_version"] == version]
            first, crashed = min(hours)[0], min((hour for hour, is_crash in hours if is_crash), default=None)
            tables["device_versions"][(*key, version)] = first, crashed
            tables["release_hours"][app, version, first]["devices"] += 1
            if crashed is not None:
                tables["release_hours"][app, version, crashed]["crashed_devices"] += 1
            tables["release_sums"][app, version].update(devices=1, crashed_devices=int(crashed is not None))


def two_digits(ms):
    """A duration in whole seconds, rounded half up to two significant digits from 100 s on."""
    seconds = Decimal(ms) / 1000
    digits = len(str(int(seconds)))
    return int(seconds.scaleb(-max(0, digits - 2)).to_integral_value(ROUND_HALF_UP).scaleb(max(0, digits - 2)))


def rows_of_table(db, table):
    """The reports as they are counted: with the time that counts, and `(other)` for names beyond the day's limit."""
    rows = backfeedr.dict_rows(db, f"select * from {table} order by seq")
    for row in rows:
        at = row["occurred_at"] - row["clock_ahead_ms"]
        is_believed = 1_167_609_600_000 <= at <= row["received_at"] + 300_000
        row["at"] = at if is_believed else row["received_at"]
        row["sent_type"] = row.get("exception_type")
        for name, flag in backfeedr.OTHER_FLAGS.items():
            if row["other"] & flag:
                row[name] = "(other)"
    return rows


def grouped(rows, *names):
    """The rows by their values in these columns. Rows with a null there are left out."""
    groups = defaultdict(list)
    for row in rows:
        if all(row[name] is not None for name in names):
            groups[tuple(row[name] for name in names)].append(row)
    return groups


# == Settings ==================================================================

SETTINGS = [  # a field, its default, the text of its variable, and the value of that text
    ("host", "127.0.0.1", "0.0.0.0", "0.0.0.0"), ("port", 8080, "0", 0),
    ("db_path", "backfeedr.db", "/tmp/x.db", "/tmp/x.db"), ("api_key", "", "k", "k"), ("auth_token", "", TOKEN, TOKEN),
    ("rate_limit", 100, "0", 0), ("max_body_size", 1048576, "1000", 1000), ("retention_days", 90, "0", 0),
    ("max_db_size", 0, "5000000", 5_000_000),
    ("require_signature", False, "1", True), ("public_metrics", True, "no", False), ("threads", 32, "4", 4),
    ("public_url", "", "https://a.example.com:8443/a/", "https://a.example.com:8443/a/"), ("verbose", False, "1", True)]


def test_each_setting_has_a_default_and_is_read_from_its_variable_unless_overridden():
    assert dataclasses.asdict(Settings()) == {name: default for name, default, _, _ in SETTINGS}
    environ = {"BACKFEEDR_" + name.upper(): text for name, _, text, _ in SETTINGS}
    assert dataclasses.asdict(Settings.from_env(environ)) == {name: value for name, _, _, value in SETTINGS}
    assert Settings.from_env({"BACKFEEDR_PORT": "1", "BACKFEEDR_THREADS": ""}, port=2) == Settings(port=2)
    assert "secret" not in repr(Settings(api_key="secret-key", auth_token="secret-token-of-mine"))


@pytest.mark.parametrize("variable, text", [
    *[("PORT", text) for text in ("http", "65536", "-1", "8080 ", "\u0661", "9" * 30)],
    ("RATE_LIMIT", "-1"), ("RATE_LIMIT", "1.5"), ("MAX_BODY_SIZE", "999"), ("RETENTION_DAYS", "-1"), ("THREADS", "0"),
    ("REQUIRE_SIGNATURE", "maybe"), ("PUBLIC_METRICS", "2"), ("VERBOSE", "2"), ("DB_PATH", ":memory:"),
    ("API_KEY", "key\n"), ("API_KEY", " "), ("AUTH_TOKEN", "a\x00b"),
    *[("PUBLIC_URL", url) for url in (
        "crashes.example.com", "ftp://example.com", "https://", "https://example.com/a b", "https://example.com/?a=1",
        "https://user:password@example.com", "https://example.com/$(reboot)", "https://exämple.com")]])
def test_an_invalid_variable_is_refused_by_name_even_beside_an_override(variable, text):
    for overrides in ({}, {"port": 80}):
        with pytest.raises(SettingsError, match=rf"\ABACKFEEDR_{variable}: .*\Z"):  # one line
            Settings.from_env({"BACKFEEDR_" + variable: text}, **overrides)


@pytest.mark.parametrize("name, value, problem", [
    ("port", "8080", "'8080' is not a whole number"), ("port", True, "True is not a whole number"),
    ("public_metrics", 1, "1 is not 1 or 0"), ("db_path", "", "must name a file"), ("host", "", "must name a host"),
    ("host", None, "None is not text"),
    *(("max_db_size", size, f"{size} bytes would leave no room for reports: give at least 500000, or 0 for no limit")
      for size in (1, 10, 499_999)),
    ("auth_token", "x" * 15, "has fewer than 16 characters, so it could be guessed")])
def test_an_invalid_python_value_is_refused_by_name(name, value, problem):
    with pytest.raises(SettingsError) as refused:
        Settings(**{name: value})
    assert str(refused.value) == f"{name}: {problem}"
    assert Settings(auth_token="x" * 16, max_db_size=500_000).auth_token


def test_variables_that_kubernetes_sets_for_a_service_are_ignored_with_one_warning(caplog):
    environ = {"BACKFEEDR_" + name: value for name, value in {
        "PORT": "tcp://10.0.0.1:8080", "SERVICE_HOST": "10.0.0.1", "SERVICE_PORT": "8080", "SERVICE_PORT_HTTP": "80",
        "PORT_8080_TCP": "tcp://10.0.0.1:8080", "PORT_8080_TCP_PROTO": "tcp", "PORT_8080_TCP_PORT": "8080",
        "PORT_8080_TCP_ADDR": "10.0.0.1", "DB_SERVICE_HOST": "10.0.0.2",
        "POSTGRES_PORT": "tcp://10.0.0.2:5432"}.items()}
    assert Settings.from_env({**environ, "BACKFEEDR_HOST": "0.0.0.0"}) == Settings(host="0.0.0.0")
    assert [record.message for record in caplog.records] == [
        f"ignored {', '.join(sorted(environ))}, set by Kubernetes for a service"]
    for name in ("SERVICE_HOSTS", "PORTS", "PORT_TCP"):
        with pytest.raises(SettingsError, match=f"^BACKFEEDR_{name}: there is no such setting"):
            Settings.from_env({f"BACKFEEDR_{name}": "1"})


# == Schema ====================================================================

@sqlite_only
@pytest.mark.parametrize("umask", [0o022, 0])
def test_the_file_has_our_application_id_and_version_and_only_its_owner_can_read_it(serve, tmp_path, umask):
    before = os.umask(umask)
    try:
        Api(serve(auth_token=TOKEN)).post(CRASHES, CRASH)  # a token of its own: no copy of new_database
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("test.db*")}
    assert modes == {"test.db": 0o600, "test.db-wal": 0o600, "test.db-shm": 0o600}
    names = "application_id", "user_version", "journal_mode"
    assert [sql(tmp_path / "test.db", "pragma " + name)[0][0] for name in names] \
        == [backfeedr.APPLICATION_ID, backfeedr.SCHEMA_VERSION, "wal"]


def assert_columns(row, expected):
    """A row has these values. Objects and lists are stored as compact JSON."""
    compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    as_stored = {name: compact(value) if type(value) in (dict, list) else value for name, value in expected.items()}
    assert {name: row[name] for name in expected} == as_stored


# == Values ====================================================================

@pytest.mark.parametrize("text, expected, written", [
    ("1970-01-01T00:00:00Z", 0, ...), ("2024-02-29T00:00:00Z", 1709164800000, ...),
    *[(text, 1773325351000, "2026-03-12T14:22:31Z") for text in (
        "2026-03-12T14:22:31Z", "2026-03-12t14:22:31z", "2026-03-12T14:22:31.0009+00:00", "2026-03-12T15:22:31+01:00",
        "2026-03-12T09:52:31-04:30")],
    ("2026-03-12T14:22:31.5Z", 1773325351500, "2026-03-12T14:22:31.500Z"),
    ("2026-03-12T14:22:31.123456789Z", 1773325351123, "2026-03-12T14:22:31.123Z"),
    ("0001-01-01T00:00:00+14:00", -62135596800000, "0001-01-01T00:00:00Z"),  # not before the first year
    ("9999-12-31T23:59:59.999-23:59", 253402300799999, "9999-12-31T23:59:59.999Z")])
def test_rfc3339_times_are_read_to_the_millisecond_and_written_in_utc(text, expected, written):
    assert parse_time(text) == expected == parse_time(backfeedr.iso_time(expected))
    assert backfeedr.iso_time(expected) == (text if written is ... else written)


@pytest.mark.parametrize("text", [
    "", "2026-03-12", "2026-03-12T14:22:31", "2026-03-12 14:22:31Z", "2026-03-12T14:22Z", "2026-03-12T14:22:31.Z",
    "2026-03-12T14:22:31.1234567890Z", "2026-03-12T14:22:60Z", "2026-03-12T24:00:00Z", "2026-03-12T14:60:00Z",
    "2025-02-29T00:00:00Z", "0000-01-01T00:00:00Z", "2026-13-01T00:00:00Z", "2026-03-12T14:22:31+24:00",
    "2026-03-12T14:22:31+01:60", "2026-03-12T14:22:31+010", "2026-W11-4T14:22:31Z", "20260312T142231Z",
    "2026-03-12T14:22:31Z\n", " 2026-03-12T14:22:31Z", "+2026-03-12T14:22:31Z", "２026-03-12T14:22:31Z"])
def test_text_that_is_not_an_rfc3339_time_is_refused(text):
    with pytest.raises(ValueError):
        parse_time(text)


def test_new_keys_have_the_documented_form_and_prefixes_show_only_a_part():
    assert re.fullmatch("bf_live_[0-9a-f]{32} bf_test_[0-9a-f]{32}", " ".join(map(backfeedr.new_key, (False, True))))
    assert [backfeedr.key_prefix(key) for key in (KEY, "hunter2hunter2", "k")] == ["bf_live_01234567", "hunt", ""]


# == Grouping ==================================================================

BUILD = "5a1b0c0d-0000-4000-8000-00000000beef"


def hashed(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def own(offset, uuid=BUILD, **more):
    """A frame of the app's own code without a name, as in MetricKit."""
    return {"binary": "Shop", "uuid": uuid, "offset": offset, "in_app": True, **more}


def system(offset, binary="UIKitCore", **more):
    return {"binary": binary, "uuid": "77" * 16, "offset": offset, "address": 0x190000000 + offset, **more}


def calls(*names, **more):
    return [{"symbol": name, **more} for name in names]


@pytest.mark.parametrize("symbol, name", [  # vectors.json has more
    *((name, name) for name in (
        "A.b", "Shop.Cart.total() -> Swift.Int", "-[Cart totalOf:with:]", "cart_total", "v.2x", "$s4Shop1AV1byyF",
        "operator new(unsigned long)", "Cart.subscript.getter", "A.b(c: Swift.Int) throws -> ()", ".cold.1")),
    *((prefix + "A.b()", "A.b()") for prefix in (
        "@nonobjc ", "merged ", "autoclosure #1 in ", "implicit closure #2 in ", "$defer #1 () in ",
        "closure #1 @Sendable () async -> () in ", "closure #1 <A>(A) -> () in ", "@objc specialized ",
        "closure #12 (Swift.Int) async throws -> Swift.Array<(A)> in ", "closure #2 () in closure #1 in ",
        "partial apply for ", "partial apply forwarder for closure #1 in ",
        "(2) suspend resume partial function for ", "(1) await resume partial function for ",
        "generic specialization <Swift.Array<Swift.Int>> of ",
        "function signature specialization <Arg[0] = Dead> of ")),
    *(("A.b()" + suffix, "A.b()") for suffix in (
        " + 123", " (.cold.1)", " [clone .cold.1]", ".llvm.1234567", ".resume.0", ".cold", " at 0x10", ".12 + 4",
        " + 0x7b", " (in Shop) (Cart.swift:12) + 8", " [0x104d1d1d8]", " (0x104d1d1d8)", " at a.rs:1:2",
        "::h0123456789abcdef", "$VARIANT$armv81", ".6Tm", "Tm")),
    *((name + "Tm", name) for name in ("objectdestroy", "keypath_set", "__swift_project_boxed_opaque_existential_1")),
    *((name, name) for name in ("DateToTm", "readTm", "_Z4readTm")),
    ("invocation function for block in Cart::total()", "Cart::total()"),
    ("__45__12-[Cart total]_block_invoke_block_invoke_2", "-[Cart total]"),
    ("__cart_total_block_invoke.17", "cart_total"), ("__9-[X y]_block_invoke_2.45.cold.1", "-[X y]"),
    ("a(int)::$_12::operator()() const", "a(int)::$_::operator()() const"),
    ("$s4Shop1AV1byyYaFTQ0_", "$s4Shop1AV1byyYaF")])
def test_what_a_compiler_adds_to_a_name_does_not_change_the_group(symbol, name):
    assert backfeedr.canonical_name(symbol) == name
    assert group_hash("A", map(read_frame, calls(symbol, file="a.swift"))) == hashed(f"A:{name}")


@pytest.mark.parametrize("trace, names", [  # vectors.json has more
    ([{"symbol": "A.b", "file": "x", "line": 43, "address": "0x1"}], "A.b"),
    (calls("abort", "raise", "objc_msgSend", "main"), "objc_msgSend"), (calls(None, "raise"), "raise"),
    (calls(None), ""),
    # Own frames have a file, in_app, an image inside the app, or a low load address.
    ([system(1), own(2), own(3), own(4), own(5)], ":".join(f"{BUILD.upper()}+{n}" for n in (2, 3, 4))),
    ([*calls("a", file="a.c", in_app=False), *calls("b", in_app=True)], "b"),
    ([*calls("a", path="/usr/lib/liba.dylib"), *calls("b", path="/private/var/Bundle/0/Shop.app/Shop")], "b"),
    ([*calls("a", address=0x18000000f, image_base=0x180000000), *calls("b", address=9, image_base=4)], "b"),
    # Names that say nothing are skipped.
    (calls("@objc A.b()", "A.b()", "A.b()", "thunk for @escaping () -> ()", "C.d()", "main", file="a"),
     "A.b():C.d()"),
    ([*calls("static Shop.$main()", "static Shop.App.$main() -> ()", "dispatch thunk of A.c()", "main", "A.b()",
             "non-virtual thunk to X::y()", "reabstraction thunk helper from @escaping () -> ()", "outlined copy of A?",
             file="a")], "A.b()"), (calls("main", file="a"), "main"),
    ([*calls("UIApplicationMain"), *calls("main", file="a")], "UIApplicationMain"),
    # Without own frames, the functions that every abort runs through are skipped.
    (calls("__pthread_kill", "pthread_kill", "abort", "Shop.Cart.total()"), "Shop.Cart.total()"),
    (calls("__exceptionPreprocess", "objc_exception_throw", "-[NSException raise]", "-[A b]", *"cde"), "-[A b]:c:d"),
    (calls("_assertionFailure(_:_:file:line:flags:)", "swift_unexpectedError", "_swift_runtime_on_report", "A.b()"),
     "A.b()"),
    (calls("abort", "raise"), "abort:raise"), (calls("aborted()", "x"), "aborted():x"),
    *((calls(name, "A.b()", file="a"), "A.b()") for name in (  # runtimes that are linked into the app
        "Swift runtime failure: Index out of range", "konan::abort()", "rust_panic", "std::panicking::panic_with_hook",
        "(anonymous namespace)::terminateWithUnhandledException(ObjHeader*)::$_1::operator()() const",
        "NullCheck(void*)", "core::panicking::panic_fmt::h0123456789abcdef",
        "_RNvCsiGVaDesi5rv_7___rustc17rust_begin_unwind", "xamarin_process_managed_exception",
        "il2cpp::vm::Exception::Raise(Il2CppException*, MethodInfo*)",
        "-[RCTExceptionsManager reportFatal:stack:]", "FIRCLSTerminateHandler()", "core::option::expect_failed",
        "__rust_start_panic", "core::slice::index::slice_end_index_len_fail", "core::cell::panic_already_borrowed",
        "alloc::alloc::handle_alloc_error", "__swift_destroy_boxed_opaque_existential_1Tm", "OUTLINED_FUNCTION_12",
        "Store.shared.unsafeMutableAddressor", "std::__1::vector<int>::at[abi:ne200100](unsigned long) const",
        "unsigned long std::__1::count<A<int>>(std::vector<A<int>> const&)",
        "std::string std::operator+<char>(std::vector<int> const&, char)", "void* std::__1::__thread_proxy<A>(void*)",
        "decltype(static_cast<A&>(fp)(1)) std::__1::__invoke[abi:ne200100]<A&>(A&)", "int* std::find<int*>(int*, int*)",
        "app::Item& std::vector<app::Item>::emplace_back<int>(int&&)", "std::string::operator bool() const")),
    *((calls(name, file="a"), name) for name in (  # these return a type of the library
        "std::vector<int> cart::items<int>(std::vector<int> const&)", "std::vector<int>& app::get<int>()",
        "std::string const& app::name<int>(int)", "std::error_code net::read<Buf>(Buf&)", "std::string label<int>(int)",
        "std::enable_if<true, int>::type app::parse<int>(char const*)", "app::Path::operator std::string() const",
        "<app::Log as std::io::Write>::write", "app::process::<&mut std::fs::File>")),
    ([*calls("specialized Array._checkIndex(_:)", file="<compiler-generated>", in_app=True, symbolicated=True),
      *calls("merged specialized Array.x", file="<compiler-generated>", in_app=True, symbolicated=True),
      *calls("specialized Cart.at(_:)", file="Cart.swift")], "Cart.at(_:)"),  # the others are of Swift's library
    (calls("rust_add", file="a"), "rust_add"),
    (calls("rust_panic", file="a"), "rust_panic"),
    # Frames without names count as build and offset, or as binary and offset.
    ([*calls("abort"), {"binary": "UIKitCore", "offset": 7}], "UIKitCore+7"),
    *((calls(text, **binary), "Shop+15424") for text, binary in (
        ("Shop + 15424", {"binary": "Shop"}), ("Shop + 15424", {}), ("0x1040c8000 + 15424", {"binary": "Shop"}),
        ("0   Shop                    0x0000000104f5c4d8 0x1040c8000 + 15424", {}), ("0x1040cbc40 Shop + 15424", {}),
        ("__mh_execute_header + 15424", {"binary": "Shop"}),
        ("_mh_execute_header", {"binary": "Shop", "offset": 15424}))),
    (calls("1   Shop                    0x0000000104f5c4d8 Cart.total() + 120"), "Cart.total()"),
    (calls("My App + 15424"), "My App+15424"), (calls("total + 15424", binary="Shop"), "total"),
    *(([own(9, symbol=text)], f"{BUILD.upper()}+9") for text in (
        "0x1040c8000", "00000001040c8000", "<redacted>", "???", "Shop + 9", "the.function.before")),
    (calls("0x1040c8000", "a"), "a"), (calls("-[A b] + 15424"), "-[A b]"), (calls(7, "a"), "a"),
    # A device's symbol is trusted if no symbols can be uploaded for it, or if the frame is symbolicated.
    ([{"symbol": "A.b()", "binary": "Shop", "offset": 9, "in_app": True}], "A.b()"),
    ([own(9, symbol="A.b()", symbolicated=True)], "A.b()"),
    ([own(9, symbol="A.b()", file="a.swift")], "A.b()")])
def test_the_group_is_made_of_the_first_three_specific_names(trace, names):
    assert group_hash("SIGABRT", map(read_frame, trace)) == hashed(f"SIGABRT:{names}".rstrip(":"))


@pytest.mark.parametrize("is_own, frames", [
    (True, [("a.swift", "", None, "x"), ("a.swift", "/usr/lib/x", 1 << 40, "x"), ("", "", 0x17fffffff, "x"),
            *(("", path, None, "x") for path in (
                "/private/var/containers/Bundle/Application/1/Shop.app/Shop", "/Users/x/Shop.app/Contents/MacOS/Shop",
                "/var/Shop.app/PlugIns/Share.appex/Share", "/var/Share.appex/Share", "/var/Shop.app/Shop.debug.dylib",
                "/private/x/Shop.app/Frameworks/Cart.framework/Cart"))]),
    (False, [("", "", 0x180000000, "x"), *(("", *place, binary) for binary in (
                 "dyld", "libobjc-trampolines.dylib", "libswiftCore.dylib") for place in (
                     ("/var/Shop.app/Frameworks/" + binary, None), ("", 4))),
             *(("", path, None, "x") for path in (
                 "/usr/lib/libobjc.A.dylib", "/System/Library/CoreServices/X.app/X", "/opt/x", "/var/Shop.appx/Shop",
                 "/Applications/Xcode.app/Contents/Developer/Platforms/P/usr/lib/libc.dylib",
                 "/Applications/Xcode.app/R/RuntimeRoot/System/Library/UIKit"))]),
    (None, [("", "", None, "x"), ("", "", 0, "x"), ("", "Shop.app/Shop", None, "x")])])
def test_own_code_is_recognized_by_its_file_or_path_or_load_address(is_own, frames):
    assert [frame for frame in frames if backfeedr.is_own_code(*frame) is not is_own] == []


LOADED = 0x104F00000
SDK_FRAMES = {
    "ours": {"binary": "Shop", "uuid": BUILD, "offset": 20924, "in_app": True},
    "addresses": {"binary": "Shop", "uuid": BUILD, "address": LOADED + 20924, "image_base": LOADED},
    "KSCrash": {"object_name": "Shop", "uuid": BUILD.upper(), "instruction_addr": LOADED + 20924, "object_addr": LOADED,
                "symbol_name": "<redacted>"},
    "PLCrashReporter": {"image": "Shop", "image_uuid": BUILD.replace("-", ""), "address": hex(LOADED + 20924),
                        "image_base": hex(LOADED)},
    "Sentry": {"package": "/private/var/containers/Bundle/Application/0/Shop.app/Shop", "debug_id": BUILD,
               "instruction_addr": hex(LOADED + 20924), "image_addr": hex(LOADED), "function": "<redacted>",
               "in_app": True}}


def test_the_group_is_the_same_for_every_sdk_and_load_address(api):
    for frame, slide in product(SDK_FRAMES.values(), (0, 0x3A4000)):
        moved = {name: hex(int(value, 16) + slide) if type(value) is str and value.startswith("0x1") else
                 value + slide if type(value) is int and value >= LOADED else value for name, value in frame.items()}
        crash = {**CRASH, "stack_trace": [system(7 + slide), moved]}
        assert api.post(CRASHES, crash)[1]["group_hash"] == hashed(f"SIGABRT:{BUILD.upper()}+20924")
        row = latest_row(api, CRASHES)
        assert row["images"] == BUILD.upper() and json.loads(row["stack_trace"]) == crash["stack_trace"], "unchanged"


def test_a_crash_with_odd_frames_is_stored(api):
    for n, frame in enumerate([
            {"symbol": 7, "file": ["x"], "binary": 1.5, "uuid": {}, "offset": "much", "address": -1},
            {"image_base": True, "uuid": "5a" * 15, "offset": 1 << 70},
            {"address": "0x" + "f" * 17, "image_addr": "0x"},
            {"in_app": "yes", "path": 7}, {"offset": "20924", "uuid": BUILD + "-0"}, {"symbol": " + 1"},
            {"symbol": "(" * 400 + "closure #1 (" * 400}, {"function": None, "filename": "", "lineno": None}]):
        status, answer = api.post(CRASHES, {**CRASH, "exception_type": f"E{n}", "stack_trace": [frame]})
        assert (status, answer["group_hash"]) == (201, latest_row(api, CRASHES)["group_hash"]), frame
        assert api.get(f"{CRASHES}/{answer['group_hash']}", **ADMIN)[1]["count"] == 1


# == Payloads ==================================================================

def nested(depth):
    """A list in a list in a list ..."""
    return json.loads("[" * depth + "]" * depth)


def changed(sent, **changes):
    """The JSON of a report with these changes; `...` removes a field."""
    return json.dumps({name: value for name, value in {**sent, **changes}.items() if value is not ...}).encode()


VALID = json.dumps(CRASH).encode()
GZIPPED = gzip.compress(VALID)
ZIPPED = {"Content_Encoding": "gzip"}
FRAME = {"frame": 0, "symbol": "a", "file": None, "line": None, "image": "UIKit"}
UNKNOWN = {"free_disk_mb": 1 << 70, "breadcrumbs": [{"at": 1, "text": "tap"}], "context": {"a": [1, 2.5, None]},
           "id": "mine"}
BODIES_KEPT = [  # a body, and what is stored
    (changed(CRASH, **UNKNOWN, stack_trace=[FRAME]), {"extra": UNKNOWN, "stack_trace": [FRAME]}),
    *[(changed(CRASH, **{name: value}), {name: value}) for name, value in [
        ("exception_type", "x" * 500), ("exception_reason", "x" * 10_000), ("locale", "\U0001f1e9" * 500),
        *(("battery_level", level) for level in (-1, -1.0, 0, 1)), ("free_memory_mb", 312.5),
        ("free_memory_mb", (1 << 63) - 1), ("is_charging", True), ("stack_trace", []), ("stack_trace", [{}])]],
    *[(changed(CRASH, x=value), {"extra": {"x": value}}) for value in (1 << 64, -1e-300, nested(60))],
    # a repeated field: the last one counts
    (VALID[:-1] + b', "exception_type": "B"}', {"exception_type": "B"}),
    (VALID[:-1] + b', "x": 1, "x": 2}', {"extra": {"x": 2}}),
    # characters that no database can store
    (changed(CRASH, exception_type="A\x00\ud800B", exception_reason="\U0001f600", **{"\udfff": {"x": ["\x00"]}},
             stack_trace=[{"symbol": "f\ud800", "file": "F"}]),
     {"exception_type": "A\ufffd\ufffdB", "exception_reason": "\U0001f600", "extra": {"\ufffd": {"x": ["\ufffd"]}},
      "stack_trace": [{"symbol": "f\ufffd", "file": "F"}], "group_hash": hashed("A\ufffd\ufffdB:f\ufffd")}),
    (changed(CRASH, x={"\x00": 1, "\ud800": 2}), {"extra": {"x": {"\ufffd": 2}}}),
    # times of a clock that is ahead or was never set are counted at receipt
    *[(changed(CRASH, occurred_at=time), {"occurred_at": expected, "at": parse_time(NOW)}) for time, expected in [
        ("0001-01-01T00:00:00+23:59", -62135596800000), ("2006-12-31T23:59:59.999Z", 1_167_609_599_999),
        ("2026-03-12T14:35:00.001Z", parse_time(NOW) + 300_001), ("9999-12-31T23:59:59-23:59", 253402300799999)]],
    *[(changed(CRASH, occurred_at=time), {"occurred_at": parse_time(time), "at": parse_time(time)})
      for time in ("2007-01-01T00:00:00Z", "2026-03-12T14:35:00Z")]]


def test_everything_sent_is_stored_and_can_be_shown(serve):
    api = Api(serve(rate_limit=0))
    for body, expected in BODIES_KEPT:
        status, answer = api.post(CRASHES, body)
        with connected(api.server.store.path) as db:
            row = rows_of_table(db, "crashes")[-1]
        assert (status, answer["group_hash"]) == (201, row["group_hash"]), body[:200]
        assert_columns(row, expected)
        assert api.get(f"{CRASHES}/{row['group_hash']}", **ADMIN)[0] == 200
    assert [api.get(path, **ADMIN)[0] for path in [*METRICS, CRASHES]] == [200] * (len(METRICS) + 1)


def test_null_and_empty_text_mean_that_a_field_is_absent(api):
    required = {"exception_type", "type", "occurred_at"}
    for absent, (path, sent, kind) in product((None, ""), [
            (CRASHES, CRASH, backfeedr.Crash), (EVENTS, {**EVENT, "type": "session_start"}, backfeedr.Event)]):
        names = {*kind._fields} - required - {"group_hash", "images", "extra"}
        assert api.post(path, {**sent, **dict.fromkeys(names, absent)})[0] == 201
        row = latest_row(api, path)
        assert {row[name] for name in names} == {None}
    assert stored(api.server, "devices", "sessions") == {"devices": [], "sessions": []}
    assert api.get("/api/v1/overview")[1]["sessions_7d"] == 2


def batch_of(*events):
    return json.dumps({"events": list(events)}).encode()


INVALID_VALUES = [  # a path, a valid body, its field, and invalid values
    *[(path, sent, "occurred_at", [
        True, [], "yesterday", "2026-02-30T00:00:00Z", "2026-03-12T14:22:31Z\n", "1773325351", 1e18, -1e12])
      for path, sent in ((CRASHES, CRASH), (EVENTS, EVENT))],
    (CRASHES, CRASH, "exception_type", [1, True, ["a"], {"a": 1}]), (EVENTS, EVENT, "type", [1, ["custom"]])]
SHORT = [(47, "47"), ("x" * 501, "x" * 500)]
CONVERTED = [  # a field, values with what is stored for them, and values of a wrong type, which are kept in `extra`
    *[(CRASHES, name, SHORT, [1.5, True, ["a"], {"a": 1}]) for name in (
        "app_version", "build_number", "os_version", "device_model", "device_id_hash", "session_id", "locale")],
    *[(EVENTS, name, SHORT, [1.5, False, {"a": 1}]) for name in ("name", "session_id")],
    (CRASHES, "exception_type", SHORT[1:], []), (CRASHES, "exception_reason", [], [["a"], 1, False]),
    (CRASHES, "free_memory_mb", [("312", 312), ("312.5", 312.5)], ["many", "1_0", True, [1], 1 << 63, 1e300, "nan"]),
    (CRASHES, "battery_level", [("0.67", 0.67), ("-1", -1), ("1", 1)], ["nan", "inf", 1.01, -0.5, -2, 67, False, [1]]),
    (CRASHES, "is_charging", [(0, 0), (1, 1), (True, 1)], [2, 1.0, "false", [1]]),
    (CRASHES, "stack_trace", [], ["text", 1, {"a": 1}, ["frame"], [[]], [None]]),
    (EVENTS, "properties", [({}, "{}")], ["a", 1, True, ["a"]]),
    *[(path, "occurred_at", [
        ("2026-03-12T14:22:31+0000", 1773325351000), ("2026-03-12T14:22:31.5-0130", 1773330751500),
        (785000000.125, 1763307200125), (1773325351, 1773325351000), (1773325351.25, 1773325351250),
        (1199999999, 2178307199000), (1200000000, 1200000000000), (1773325351000, 1773325351000),
        (-1, 978307199000)], [])
      for path in (CRASHES, EVENTS)]]
FRAMES = [({"line": "42", "frame": "0"}, {"line": 42, "frame": 0}), ({"line": 42.0}, {"line": 42}),
          ({"line": "x"},) * 2, ({"line": 1.5},) * 2, ({"line": True},) * 2,
          ({"symbol": 1, "file": []}, {"symbol": "1", "file": []})]
BAD_BODIES = [  # a path, a body, its error, and perhaps the detail
    *[(path, changed(sent, **{name: value}), f"invalid {name}")
      for path, sent, name, values in INVALID_VALUES for value in values],
    *[(path, body, "invalid JSON") for path in (CRASHES, EVENTS, BATCH) for body in (
        b"", b" ", b"{", b"nonsense", b'{"type": "custom"', b"[]", b'"text"', b"1", b"null", b"{}{}", b"\xff{}",
        '{"a": "é"}'.encode("latin-1"), json.dumps(CRASH).encode("utf-16"),
        b'{"a": NaN}', b'{"a": Infinity}', b'{"a": -Infinity}', b'{"a": 1e999}', b'{"a": "\x00"}', b"[" * 100_000,
        b'{"a":' * 100_000, b'{"a": ' + b"1" * 5_000 + b"}", b'{"a": 01}', b"{'a': 1}")],
    *[(path, changed(sent, **{name: absent}), "missing " + name)
      for path, sent, name in ((CRASHES, CRASH, "exception_type"), (CRASHES, CRASH, "occurred_at"),
                               (EVENTS, EVENT, "type"), (EVENTS, EVENT, "occurred_at"))
      for absent in (..., None, "")],
    (CRASHES, b"{}", "missing exception_type", None),
    *[(CRASHES, body, "invalid JSON", detail) for body, detail in [
        (b"[]", "the body is a list, not an object"), (b'"a"', "the body is text, not an object"),
        (b"{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        *((b'{"a": %s}' % number, "a number is out of range") for number in (b"1e999", b"9" * 5000)),
        (b'{"a":' * 100_000, "it is nested too deep")]],
    *[(EVENTS, changed(EVENT, occurred_at=time), "invalid occurred_at", f"occurred_at {problem}") for time, problem in [
        ("2026-03-12T14:22:31", "has no zone"), (1e18, "is not within the years 1 to 9999"),
        *((time, "is not a time like 2026-03-12T14:22:31Z") for time in ("yesterday", [1]))]],
    (CRASHES, changed(CRASH, exception_type=5), "invalid exception_type", "exception_type is a number, not text"),
    *[(EVENTS, changed(EVENT, type=kind), "invalid event type", "it is not one of session_start, session_end, error,"
       " custom; an event of your own is custom and has a name") for kind in ("crash", "Custom")],
    *[(BATCH, body, "missing events") for body in (b"{}", b'{"events": null}', b'{"events": []}')],
    *[(BATCH, b'{"events": %s}' % value, "invalid events", f"events is {kind}, not a list")
      for value, kind in ((b"{}", "an object"), (b'"all"', "text"))],
    (BATCH, batch_of(EVENT, "x"), "invalid event at index 1", "it is text, not an object"),
    (BATCH, batch_of(*[EVENT] * 101), "too many events: at most 100"),
    *[(BATCH, batch_of(*[EVENT] * index, bad, *[EVENT] * (99 - index)), f"{text} at index {index}")
      for index in (0, 1, 50, 99) for text, invalid in [
          ("missing type", [{}]), ("missing occurred_at", [{"type": "custom"}]),
          ("invalid event type", [{**EVENT, "type": "x"}]), ("invalid event", [None, [], [EVENT], "x", True]),
          ("invalid type", [{**EVENT, "type": []}]),
          ("invalid occurred_at", [{**EVENT, "occurred_at": "2026-03-12T14:22:31+24:00"}])] for bad in invalid]]


def test_a_number_of_thousands_of_digits_is_refused_on_old_pythons_too():
    assert backfeedr._parse_integer("9" * 4300) == int("9" * 4300)
    with pytest.raises(ValueError):
        backfeedr._parse_integer("9" * 4301)


def test_an_invalid_body_is_refused_with_the_reason_and_nothing_is_stored(serve):
    api = Api(serve(rate_limit=0))
    api.post(CRASHES, CRASH)
    api.post(EVENTS, {**EVENT, "device_id_hash": "d"})
    before = stored(api.server)
    for path, body, text, *details in BAD_BODIES:
        status, answer = api.post(path, body)
        assert (status, answer["error"]) == (400, text), (path, body[:200])
        assert not details or details == [answer.get("detail")]
    assert stored(api.server) == before
    assert api.post(CRASHES, CRASH)[0] == 201


def latest_row(api, path):
    return rows_by_name(api.server.store.path, f"select * from {path.split('/')[3]} order by seq desc limit 1")[0]


def parsed(path, fields, batched=False):
    """What is stored for a crash or an event with these fields, by column."""
    if batched:
        return backfeedr.parse_batch({"events": [{**EVENT, **fields}]})[0]._asdict()
    return (parse_crash({**CRASH, **fields}) if path == CRASHES else parse_event({**EVENT, **fields}))._asdict()


def test_an_optional_field_is_converted_or_kept_unchanged():
    for path, name, converted, wrong in CONVERTED:
        for (value, expected), batched in product(
                [*converted, *((value, None) for value in wrong)], {False, path == EVENTS}):
            row = parsed(path, {name: value}, batched)
            extra = {} if expected is not None else {name: value}
            assert (row[name], json.loads(row["extra"] or "{}")) == (expected, extra), (name, value)
    for frame, expected in FRAMES:
        assert json.loads(parsed(CRASHES, {"stack_trace": [frame]})["stack_trace"]) == [expected]
    assert backfeedr.decode_json(b"\xef\xbb\xbf" + VALID) == CRASH, "a byte order mark"
    for path, name, value in ((CRASHES, "deep", nested(70)), (EVENTS, "deep", nested(70)),
                              (EVENTS, "properties", {"a": nested(70)}), (CRASHES, "stack_trace", [{"a": nested(70)}])):
        kept = json.loads(parsed(path, {name: value})["extra"])[name]
        assert json.loads(kept) == value, "as text, because it is nested too deep to be shown"


FRAME_OF = dict(symbol="Shop.Cart.total()", file="Cart.swift", line=7)


@pytest.mark.parametrize("path, fields, expected, cut", [  # what is stored, and what `truncated` says
    (CRASHES, {"stack_trace": [dict(FRAME_OF, frame=n) for n in range(600)]},
     {"stack_trace": [dict(FRAME_OF, frame=n) for n in (*range(384), *range(472, 600))]}, "stack_trace"),
    (EVENTS, {"properties": {f"p{n:03}": n for n in range(300)}},
     {"properties": {f"p{n:03}": n for n in range(256)}}, "properties"),
    (EVENTS, {f"p{n:03}": n for n in range(300)}, {"extra": {f"p{n:03}": n for n in range(256)}}, "unknown fields"),
    (CRASHES, {"exception_reason": "why", "breadcrumbs": ["tap"], "stack_trace": [dict(
        FRAME_OF, frame=n, image="Shop", address="0x1", note="x" * 100) for n in range(2000)]},
     {"stack_trace": [dict(FRAME_OF, frame=n, image="Shop", address="0x1", note="x" * 100)
                      for n in (*range(384), *range(1872, 2000))], "extra": {"breadcrumbs": ["tap"]}}, "stack_trace"),
    (EVENTS, {**dict.fromkeys(("app_version", "os_version", "device_model", "locale"), "\U0001f600" * 500),
              "properties": {"a": "x" * 400_000}}, {}, "properties"),
    (CRASHES, {"truncated": "mine", "x": "x" * 400_000}, {}, "unknown fields"),
    *[(path, {name: value}, {}, "unknown fields" if name in ("x", "locale") else name) for path, name, value in (
        (CRASHES, "exception_reason", "x" * 400_000), (CRASHES, "x", "\x01" * 100_000),
        (CRASHES, "x", ["\U0001f600" * 9] * 8_000), (CRASHES, "locale", ["x" * 400_000]),
        (CRASHES, "stack_trace", [dict(FRAME_OF, symbol="x" * 2_000)] * 400),
        (EVENTS, "properties", {"a": {"b": {"c": "x" * 400_000}}, "d": "kept"}),
        (EVENTS, "properties", {"x" * 300_000: "y" * 300_000}),
        (EVENTS, "properties", {f"p{n}": [1] * 2_000 for n in range(150)}))]], ids=lambda value: str(value)[:20])
def test_a_report_that_is_too_large_is_cut_at_the_end_and_says_so(path, fields, expected, cut):
    for batched, limit in [(False, 256_000), (True, 32_000)][:1 + (path == EVENTS)]:
        row = parsed(path, fields, batched)
        size = sum(len(text.encode()) for text in row.values() if isinstance(text, str))
        extra = json.loads(row["extra"])
        assert size <= limit and extra.pop("truncated") == [cut]
        assert expected or size > 0.9 * limit, "no more is cut than necessary"
        for name, value in expected.items():
            assert (extra if name == "extra" else json.loads(row[name])) == value


def test_frames_that_are_not_kept_decide_the_group_too():
    for position, count in ((450, 700), (999, 5000), (4990, 5000)):
        frames = calls(*(f"lib{n}" for n in range(count)))
        frames[position] = {"symbol": "App.a", "file": "a.swift"}
        assert parse_crash({**CRASH, "stack_trace": frames}).group_hash == hashed("SIGABRT:App.a")


@pytest.mark.parametrize("is_own, is_cut, group", [
    (False, False, hashed("E:A.b")), (False, True, "g"), (True, True, hashed("E:A.b")), (True, False, hashed("E:A.b"))])
def test_symbols_move_a_cut_crash_only_by_frames_of_the_app(monkeypatch, is_own, is_cut, group):
    monkeypatch.setattr(backfeedr.Symbols, "symbolicated", lambda self, frames: iter(frames))
    frames = [{"symbol": "A.b", "in_app": is_own}]
    assert backfeedr.Symbols(None).group_of(frames, "E", "g", is_cut) == group


def test_a_large_nested_value_in_a_report_that_is_cut_becomes_text():
    event = parse_event({**EVENT, "properties": {"a": [[["x" * 9]] * 20_000] * 2, "b": [{"c": [1]}]}})
    properties = json.loads(event.properties)
    assert properties["a"].startswith('[[["xxxxxxxxx"],["xxxxxxxxx"],') and properties["b"] == [{"c": [1]}]
    frame = {f"f{n}": "x" * 200 for n in range(40)}
    kept = json.loads(parse_crash({**CRASH, "stack_trace": [{"symbol": "f", "line": 7, **frame}] * 100}).stack_trace)[0]
    assert (kept["symbol"], kept["line"], kept["f0"][:3], len(kept)) == ("f", 7, "xxx", 32)
    frames = [dict.fromkeys(frame, 1)] * 513  # too many, but small
    assert json.loads(parse_crash({**CRASH, "stack_trace": frames}).stack_trace) == frames[:512]


def test_a_crash_with_little_room_loses_frames_in_the_middle_and_the_others_stay_whole():
    frames = [{"frame": n, "binary": "Shop", "uuid": "A" * 32, "offset": 4096 + n, "in_app": True} for n in range(512)]
    wide = dict.fromkeys(("app_version", "build_number", "os_version", "device_model", "session_id"),
                         "\U0001F600" * 500)
    for fields, least in (({}, 120), (wide, 60), ({**wide, **{f"k{n}": n for n in range(255)}}, 60)):
        sent = {**CRASH, **fields, "stack_trace": frames}
        crash = parse_crash(sent, backfeedr.MAX_BATCHED_SIZE)
        kept = json.loads(crash.stack_trace)
        last = len(kept) // 4
        assert len(kept) >= least and kept == frames[:len(kept) - last] + frames[-last:]
        assert "stack_trace" in json.loads(crash.extra)["truncated"]
        assert crash.group_hash == parse_crash(sent).group_hash
        assert sum(len(value.encode()) for value in crash if type(value) is str) <= backfeedr.MAX_BATCHED_SIZE


@pytest.mark.parametrize("room", [-5, 0, 1, 2, 9])
def test_parts_of_a_report_that_have_no_room_become_empty_text(room):
    for value in ("", "a" * 10, "\u20ac" * 10, 10**12, [1] * 9, {"a": "b"}, None):
        part = backfeedr._beginning(value, room)
        assert len(backfeedr.to_json(part).encode()) <= max(2, room) and (room > 2 or part in ("", value))


def test_parsing_takes_few_passes_over_a_body_of_any_shape(monkeypatch):
    """Walking through half a million lists a dozen times takes many seconds."""
    monkeypatch.setattr(backfeedr, "MAX_REPORT_SIZE", 25_600)
    monkeypatch.setattr(backfeedr, "MAX_BATCHED_SIZE", 3_200)
    encode, encoded, calls = backfeedr.to_json, [], []
    monkeypatch.setattr(backfeedr, "to_json", lambda value: encoded.append(len(text := encode(value))) or text)
    for (shape, wrap, parse), part in product([
            ("a field", lambda many: {**CRASH, "x": many}, parse_crash),
            ("fields", lambda many: {**CRASH, **{f"x{n}": value for n, value in enumerate(many)}}, parse_crash),
            ("a frame", lambda many: {**CRASH, "stack_trace": [{"x": many}]}, parse_crash),
            ("frames", lambda many: {**CRASH, "stack_trace": [{"symbol": value} for value in many]}, parse_crash),
            ("an event", lambda many: {"events": [{**EVENT, "properties": {"x": many}}]}, backfeedr.parse_batch),
            ("a batch", lambda many: {"events": [{**EVENT}], "x": many}, backfeedr.parse_batch)],
            ["[]", '{"":[1.5]}', '{"a":' * 63 + "1" + "}" * 63, "[" * 70 + "]" * 70]):  # wide or deep
        given = wrap([json.loads(part)] * (60_000 // len(part)))
        encoded.clear(), calls.clear()
        before = sys.getprofile()
        sys.setprofile(lambda frame, event, _: calls.append(1) if event == "call" else None)
        try:
            parse(given)
        finally:
            sys.setprofile(before)
        assert sum(encoded) < 2_000_000 and len(calls) < 20_000, (shape, part)


def test_events_of_a_batch_with_different_fields_are_converted_together():
    """One by one, it takes four times as long."""
    events = [{**EVENT, "name": f"n{n}", **({"screen": [n]} if n else {})} for n in range(3)]
    assert backfeedr._parse_usual_events(events) == list(map(parse_event, events))


def test_an_event_in_a_batch_is_stored_like_a_single_one():
    """Even if values such as True and 1 are equal, but not the same."""
    for pair in product([0, 1, True, 1.0, "1", "", None, nested(63), nested(64)], repeat=2):
        events = [{**EVENT, "name": value, "x": value} for value in pair]
        assert backfeedr.parse_batch({"events": events}) == list(map(parse_event, events))


def test_an_unknown_field_becomes_text_only_if_it_is_nested_too_deep():
    for value, kept in [*[(value, value) for value in (nested(63), ["\\", "[" * 140], ['"' + "{" * 140])],
                        (nested(64), "[" * 64 + "]" * 64)]:
        assert json.loads(parse_event({**EVENT, "x": value}).extra)["x"] == kept
    many = {"truncated": 1, **{f"n{n}": n for n in range(256)}}
    assert json.loads(parse_event({**EVENT, **many, "last": 1}).extra) == {
        **{name.replace("truncated", "truncated_"): many[name] for name in list(many)[:256]},
        "truncated": ["unknown fields"]}


def test_a_cut_crash_keeps_its_group_when_it_is_imported(api, serve):
    long = [{"symbol": f"{n % 10}" * 3_000, "file": "a.swift"} for n in range(300)]
    body = gzip.compress(json.dumps({**CRASH, "stack_trace": long}).encode())
    group = api.post(CRASHES, body, **ZIPPED)[1]["group_hash"]
    line, other = io.StringIO(), serve("other.db")
    backfeedr.write_jsonl(line, *api.server.store.export(backfeedr.Crash))
    assert backfeedr.import_jsonl(other.store, [line.getvalue().encode()])["stored"] == 1
    assert report(other)["group_hash"] == group and "truncated" in report(other)["extra"]


def test_deep_json_is_read_no_further_than_to_the_level_that_is_too_deep(monkeypatch):
    def first_levels(steps):
        yield from islice(accumulate(steps), 501)
        pytest.fail("it reads on")
    monkeypatch.setattr(backfeedr, "accumulate", first_levels)
    with pytest.raises(ValueError, match="nested too deep"):
        backfeedr.not_deep("[" * 1_000_000)


def test_a_body_of_500_levels_is_stored_and_one_of_501_is_refused(serve, monkeypatch):
    monkeypatch.setattr(backfeedr, "MAX_REPORT_SIZE", 10_000)
    api = Api(serve(rate_limit=0))
    event = changed(EVENT, properties=1)
    for path, body, levels in (
            (CRASHES, changed(CRASH, x=1, y="y" * 11_000), 1),
            (CRASHES, changed(CRASH, stack_trace=[{"symbol": 1}]), 3),
            (EVENTS, event, 1), (BATCH, b'{"events": [' + event + b"]}", 3)):
        for depth, expected in ((60, 201), (500 - levels, 201), (501 - levels, 400), (990, 400), (9_000, 400)):
            deep = b'{"a":' * depth + b"1" + b"}" * depth
            status, answer = api.post(path, re.sub(rb'("x"|"properties"|"symbol"): 1', rb"\1: " + deep, body))
            assert (status, answer.get("detail")) == (expected, "it is nested too deep" if expected == 400 else None)
    assert (count(api.server, "crashes"), count(api.server, "events")) == (4, 4)


def test_deep_json_does_not_end_a_server_whose_threads_have_small_stacks():
    """Python 3.13 reads 10,000 levels, for which the stack of a thread on Alpine is too small."""
    def read(parse, text):
        try:
            report, = parse(text.encode())
            return json.loads(report.extra)["x"]
        except Refusal as refusal:
            return refusal.detail

    def read_all():
        return [{str(read(parse, around % (start * depth + "1" + end * depth))) for depth in (501, 5000, 9000)}
                for (start, end), around, parse in product(
                    (("[", "]"), ('{"a":', "}"), ('{"subFrames":[', "]}")), ("%s", diagnostic),
                    (lambda body: [backfeedr.parse_crash_body(body)], partial(backfeedr.parse_diagnostics, now=0)))]

    diagnostic = json.dumps(payload_of(meta={**META, "x": "%s"})).replace('"%s"', "%s")
    deep, apple = {"it is nested too deep"}, {"POST Apple's reports unchanged to /api/v1/diagnostics"}
    previous = threading.stack_size(1 << 18)
    try:
        with ThreadPoolExecutor(1) as pool:
            texts = pool.submit(read_all).result()
    finally:
        threading.stack_size(previous)
    assert texts == [
        *[deep, deep, apple, deep] * 2, deep, {"the object is neither a MetricKit payload nor an .ips file"}, apple,
        {"{'subFrames': '(nested too deep)'}"}]


def test_a_batch_of_100_events_is_stored_in_order_with_its_unknown_fields(api):
    sent = [(kind, str(n)) for n in range(25) for kind in backfeedr.EVENT_TYPES]
    events = [{**EVENT, "type": kind, "name": name} for kind, name in sent]
    status, answer = api.post(BATCH, {"events": [{**events[0], "sdk": "1.0"}, *events[1:]], "sent_at": "now"})
    assert (status, answer["count"], len(set(answer["ids"]))) == (201, 100, 100)
    extras = ['{"sdk":"1.0","batch":{"sent_at":"now"}}', *[None] * 99]
    assert sql(api.server, "select id, type, name, extra from events order by seq") \
        == [(event_id, *event, extra) for event_id, event, extra in zip(answer["ids"], sent, extras)]


# == Apple formats =============================================================

SHOP, KIT, MALLOC = ("11111111-2222-3333-4444-55555555555" + last for last in "ABC")  # builds
ADDRESS = {"Shop": 0x100400000, "Kit": 0x100800000, "libsystem_malloc.dylib": 0x1a0000000, "dyld": 0x100200000,
           "libsystem_pthread.dylib": 0x1b0000000, "libobjc-trampolines.dylib": 0x100300000, "UIKitCore": 0x180000000}
BUILDS = {"Shop": SHOP, "Kit": KIT, "libsystem_malloc.dylib": MALLOC}
SPAN = {"timeStampBegin": "2026-03-11 09:00:00", "timeStampEnd": "2026-03-12 09:00:00"}
META = {"appVersion": "1.2.0", "appBuildVersion": "47", "osVersion": "iPhone OS 26.1 (23B85)",
        "deviceType": "iPhone16,1", "exceptionType": 6, "signal": 5}


def sampled(binary, offset, *sub_frames, **more):
    """A frame of MetricKit with the frames nested in it."""
    frame = {"binaryName": binary, "binaryUUID": BUILDS.get(binary, KIT), "offsetIntoBinaryTextSegment": offset,
             "address": ADDRESS.get(binary, 0x100000000) + offset, "sampleCount": 1, **more}
    return {**frame, "subFrames": list(sub_frames)} if sub_frames else frame


def tree_of(*roots, **more):
    return {"callStackPerThread": True, "callStacks": [
        {"threadAttributed": True, "callStackRootFrames": list(roots), **more}]}


def payload_of(kind="crashDiagnostics", tree=None, meta=META, **more):
    item = {"version": "1.0.0", "diagnosticMetaData": meta, "callStackTree": tree or tree_of(sampled("Shop", 16))}
    return {**SPAN, kind: [item], **more}


def nest(depth, frame='{"binaryName":"Shop","offsetIntoBinaryTextSegment":%d'):
    """A payload with `depth` frames, each nested in the one before."""
    frames = "".join((frame % number if "%" in frame else frame) + ',"subFrames":[' for number in range(depth))
    head, tail = json.dumps(payload_of(tree=tree_of("..."))).split('"..."')
    return (head + frames + "]}" * depth + tail).encode()


MIXED = {**payload_of("hangDiagnostics"), **payload_of(), **payload_of("cpuExceptionDiagnostics"),
         **payload_of("memoryExceptionDiagnostics", meta={"appVersion": "1.1"})}  # an event, a crash, an event, a crash
IMAGES = [{"name": name, "path": path, "uuid": uuid.lower(), "base": 0x100000000 * (number + 1), "size": 4096}
          for number, (name, path, uuid) in enumerate([
              ("Shop", "/private/var/containers/Bundle/Application/%s/Shop.app/Shop" % KIT, SHOP),
              ("Kit", "/private/var/containers/Bundle/Application/%s/Shop.app/Frameworks/Kit.framework/Kit" % KIT, KIT),
              ("UIKitCore", "/System/Library/PrivateFrameworks/UIKitCore.framework/UIKitCore", MALLOC)])]
IPS_HEAD = {"app_name": "Shop", "bug_type": "309", "timestamp": "2026-03-12 10:00:09.00 +0100",
            "incident_id": "incident-secret", "os_version": "iPhone OS 26.1 (23B85)"}
IPS_BODY = {
    "procName": "Shop", "procPath": IMAGES[0]["path"], "cpuType": "ARM-64", "modelCode": "iPhone16,1",
    "captureTime": "2026-03-12 10:00:07.1234 +0100", "crashReporterKey": "reporter-secret",
    "storeInfo": {"deviceIdentifierForVendor": "vendor-secret"}, "osVersion": {"train": "iPhone OS 26.1"},
    "bundleInfo": {"CFBundleShortVersionString": "1.2.0", "CFBundleVersion": "47",
                   "CFBundleIdentifier": "com.example.Shop"},
    "exception": {"type": "EXC_BREAKPOINT", "signal": "SIGTRAP", "codes": "0x1, 0x2"},
    "termination": {"namespace": "SIGNAL", "code": 5, "indicator": "Trace/BPT trap: 5", "byProc": "proc-secret"},
    "faultingThread": 1, "threads": [{"frames": [{"imageIndex": 2, "imageOffset": 1, "symbol": "other-secret"}]}, {
        "triggered": True, "threadState": {"x": "register-secret"}, "frames": [
            {"imageIndex": 2, "imageOffset": 8, "symbol": "UIApplicationMain"},
            {"imageIndex": 0, "imageOffset": 32, "symbol": "Cart.total()", "sourceFile": "Cart.swift",
             "sourceLine": 12, "inline": True, "symbolLocation": 4},
            {"imageIndex": 1, "imageOffset": 64}]}],
    "usedImages": IMAGES}


def ips_of(head=IPS_HEAD, **changes):
    return b"\n".join(json.dumps(part).encode() for part in (head, {**IPS_BODY, **changes}) if part is not None)


CRASH_TEXT = """\
Incident Identifier: incident-secret
CrashReporter Key:   reporter-secret
Hardware Model:      iPhone16,1
Process:             Shop [4711]
Path:                /private/var/containers/Bundle/Application/11111111-2222-3333-4444-55555555555B/Shop.app/Shop
Identifier:          com.example.Shop
Version:             1.2.0 (47)
Code Type:           ARM-64 (Native)
Date/Time:           2026-03-12 10:00:07.1234 +0100
OS Version:          iPhone OS 26.1 (23B85)

Exception Type:  EXC_CRASH (SIGABRT)
Exception Codes: 0x0000000000000000, 0x0000000000000000
Termination Reason: SIGNAL 6 Abort trap: 6
Triggered by Thread:  1

Thread 0 name:  Dispatch queue: com.apple.main-thread
Thread 0:
0   UIKitCore                     \t0x0000000180000001 other-secret + 1

Thread 1 Crashed:
0   UIKitCore                     \t0x0000000180000008 UIApplicationMain + 340
1   Shop                          \t0x0000000100400020 Cart.total() + 4 (Cart.swift:12) [inlined]
2   Pay Kit                       \t0x0000000100800040 0x100800000 + 64

Thread 1 crashed with ARM Thread State (64-bit):
    x0: 0x0000000000000000   x1: 0x0000000000000000

Binary Images:
0x100400000 - 0x10040ffff Shop arm64  <1111111122223333444455555555555a> /private/var/containers/Bundle/Application/\
11111111-2222-3333-4444-55555555555B/Shop.app/Shop
0x100800000 - 0x10080ffff Pay Kit arm64  <1111111122223333444455555555555b> /private/var/containers/Bundle/\
Application/11111111-2222-3333-4444-55555555555B/Shop.app/Frameworks/Pay Kit.framework/Pay Kit
0x180000000 - 0x18fffffff UIKitCore arm64e  <1111111122223333444455555555555c> /System/Library/UIKitCore
0x0 - 0xffffffffffffffff ??? unknown-arch  <00000000000000000000000000000000> ???
"""


def crash_text(*changes):
    """CRASH_TEXT with these replacements."""
    text = CRASH_TEXT
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    return text.encode()


def diagnosed(body, device=""):
    """The reports that are read from a body, as objects without absent fields."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return [{name: json.loads(value) if name in ("stack_trace", "properties", "extra") else value
             for name, value in report._asdict().items() if value is not None}
            for report in backfeedr.parse_diagnostics(body, parse_time(NOW), device)]


def only(body):
    report, = diagnosed(body)
    return report


def trace_of(body):
    """The frames of the one crash or event in a body."""
    report = only(body)
    return report.get("properties", report)["stack_trace"]


FLAT = [{"frame": 0, "symbol": "UIApplicationMain", "binary": "UIKitCore", "uuid": MALLOC, "offset": 8,
         "in_app": False},
        {"frame": 1, "symbol": "Cart.total()", "file": "Cart.swift", "line": 12, "binary": "Shop", "uuid": SHOP,
         "offset": 32, "inlined": True, "in_app": True},
        {"frame": 2, "binary": "Kit", "uuid": KIT, "offset": 64, "in_app": True}]
COLUMNS = {"app_version": "1.2.0", "build_number": "47", "os_version": "26.1", "device_model": "iPhone16,1"}
AT_CAPTURE = {"occurred_at": parse_time("2026-03-12T09:00:07.123Z")}
PROCESS = {"process": "Shop", "bundleIdentifier": "com.example.Shop", "platformArchitecture": "ARM-64"}
WHOLE_REPORTS = [
    (ips_of(), {
        **COLUMNS, **AT_CAPTURE, "exception_type": "EXC_BREAKPOINT", "exception_reason": "Trace/BPT trap: 5",
        "stack_trace": FLAT, "extra": {**PROCESS, "exceptionCodes": "0x1, 0x2", "termination": {
            "namespace": "SIGNAL", "code": 5, "indicator": "Trace/BPT trap: 5"}}}),
    (crash_text(), {
        **COLUMNS, **AT_CAPTURE, "exception_type": "SIGABRT", "exception_reason": "Abort trap: 6",
        "stack_trace": [*FLAT[:2], {**FLAT[2], "binary": "Pay Kit"}], "extra": {
            **PROCESS, "exceptionCodes": "0x0000000000000000, 0x0000000000000000",
            "termination": {"namespace": "SIGNAL", "code": 6, "indicator": "Abort trap: 6"}}}),
    (payload_of(meta={**META, "terminationReason": "Namespace SIGNAL, Code 0x5", "regionFormat": "DE", "pid": 7}), {
        **COLUMNS, "occurred_at": parse_time("2026-03-12T09:00:00Z"), "exception_type": "EXC_BREAKPOINT",
        "exception_reason": "Namespace SIGNAL, Code 0x5", "extra": {
            "exceptionType": 6, "signal": 5, "terminationReason": "Namespace SIGNAL, Code 0x5", "regionFormat": "DE",
            "pid": 7},
        "stack_trace": [{"frame": 0, "binary": "Shop", "uuid": SHOP, "offset": 16, "in_app": True}]}),
    (payload_of("hangDiagnostics", meta={**META, "hangDuration": "3 sec", "pid": 7, "exceptionType": None}), {
        "type": "error", "name": "Hang", "occurred_at": parse_time("2026-03-12T09:00:00Z"), "properties": {
            "duration": "3 sec", "build_number": "47", "pid": 7, "signal": 5, "exceptionType": None, "stack_trace": [
                {"frame": 0, "binary": "Shop", "uuid": SHOP, "offset": 16, "in_app": True}]},
        **{name: value for name, value in COLUMNS.items() if name != "build_number"}}),
    ({"timeRange": {"begin": 794998800.0, "end": 795002400.5}, "environment": {
        "osVersion": {"platform": "iOS", "number": "27.0", "buildNumber": "24A1"}, "deviceType": "iPhone18,1",
        "applicationVersion": "1.3.0", "applicationBuildVersion": "48", "pid": 9}, "memoryExceptionDiagnostic": {
            "callStackTree": {"binaryInfo": [{"uuid": SHOP.lower(), "name": "Shop"}], "callStackThreads": [
                {"rootFrames": [{"address": 1}]}, {"threadAttributed": True, "rootFrames": [
                    {"binaryUUID": SHOP, "address": 0x100400010, "offsetIntoBinaryTextSegment": 16}]}]}}}, {
        "exception_type": "Memory exception", "app_version": "1.3.0", "build_number": "48", "os_version": "27.0",
        "device_model": "iPhone18,1", "occurred_at": (978307200 + 795002400) * 1000 + 500, "extra": {"pid": 9},
        "stack_trace": [{"frame": 0, "binary": "Shop", "uuid": SHOP, "offset": 16, "in_app": True}]})]


@pytest.mark.parametrize("body, expected", WHOLE_REPORTS, ids=["ips", "crash", "MetricKit", "hang", "iOS 27"])
def test_an_apple_report_becomes_a_crash_or_an_event(body, expected):
    report = only(body)
    unnamed = [frame["uuid"] for frame in report.get("stack_trace", ()) if frame["in_app"] and "symbol" not in frame]
    assert report.pop("images", "") == " ".join(unnamed), "builds of own frames without a symbol"
    if "exception_type" in expected:
        frames = map(read_frame, report["stack_trace"])
        expected = {**expected, "group_hash": group_hash(report["exception_type"], frames)}
    assert report == expected
    assert [each["device_id_hash"] for each in diagnosed(body, "d1")] == ["d1"]


def test_nothing_that_identifies_a_phone_or_a_person_is_kept():
    path = "/Users/ann/Shop/Cart.swift and /home/bob, /private/var/mobile/Containers/Data/Application/%s/x" % KIT
    for reason in (path, path.replace("ann", "Jos\u00e9")):
        asi = {"asi": {"libswiftCore.dylib": ["Fatal error: " + reason]}}
        for body in (ips_of(**asi), ips_of(**asi).replace(b"/", b"\\/"), crash_text(
                ("Triggered", "Application Specific Information:\nFatal error: " + reason + "\n\nTriggered")),
                payload_of(meta={"terminationReason": reason, "objectiveCexceptionReason": {"arguments": [reason]}})):
            report = only(body)
            assert report["exception_reason"].endswith(
                "/Users/USER/Shop/Cart.swift and /home/USER /private/var/mobile/Containers/Data/Application/UUID/x")
            text = json.dumps(report, ensure_ascii=False)
            assert not [word for word in ("secret", "ann", "Jos", "bob", "Application/" + KIT, "Shop.app", "4711")
                        if word in text]


def test_an_apple_report_sent_as_a_crash_is_refused_with_a_detail_that_says_where_it_belongs(api):
    for body, errors in [  # Python 3.13 reads any depth
            *((body, ["invalid JSON"]) for body in (ips_of(), crash_text(), ips_of({**IPS_HEAD, "bug_type": "298"}))),
            *((body, ["missing exception_type"]) for body in (
                ips_of(None), payload_of(), payload_of()["crashDiagnostics"][0], WHOLE_REPORTS[4][0], SPAN,
                json.dumps(IPS_HEAD).encode())),
            (nest(3000), ["invalid JSON", "missing exception_type"])]:
        status, answer = api.post(CRASHES, body)
        assert status == 400 and answer.pop("error") in errors
        assert answer == {"detail": "POST Apple's reports unchanged to /api/v1/diagnostics"}
    status, answer = api.post(CRASHES, changed(CRASH, occurred_at=None, lastDiagnostic=1))
    assert status == 400 and answer["error"] == "missing occurred_at" and "Apple" not in str(answer)
    assert stored(api.server, "crashes", "events") == {"crashes": [], "events": []}


@pytest.mark.parametrize("field, kind", [
    ("signal", "crash"), ("hangDuration", "hang"), ("totalCPUTime", "cpuException"),
    ("writesCaused", "diskWriteException"), ("launchDuration", "appLaunch")])
def test_one_diagnostic_of_metrickit_is_read_without_its_payload(field, kind):
    payload = payload_of(kind + "Diagnostics", meta={**META, field: 5})
    diagnostic, = payload[kind + "Diagnostics"]
    assert only(diagnostic) == {**only(payload), "occurred_at": parse_time(NOW)}
    assert only({**diagnostic, **SPAN})["occurred_at"] == only(payload)["occurred_at"]


def test_all_diagnostics_of_a_payload_are_read_in_order():
    kinds = {"appLaunchDiagnostics": "Slow launch", "crashDiagnostics": None, "hangDiagnostics": "Hang",
             "cpuExceptionDiagnostics": "CPU exception", "diskWriteExceptionDiagnostics": "Disk write exception",
             "fooBarDiagnostics": "Foo bar", "gpuDiagnostic": "Gpu", "memoryExceptionDiagnostics": None}
    diagnostics = {kind: payload_of(kind)[kind] * 2 for kind in kinds}
    diagnostics["fooBarDiagnostics"].append({"callStackTree": {}})  # of an unknown kind without frames: skipped
    names = [report.get("name") for report in diagnosed({**SPAN, **diagnostics})]
    assert names == [name for name in kinds.values() for _ in range(2)]


@pytest.mark.parametrize("name, kind", [
    ("hangDuration", "hang"), ("totalCPUTime", "cpuException"), ("writesCaused", "diskWriteException"),
    ("launchDuration", "appLaunch")])
def test_the_duration_or_amount_of_an_event_is_kept_as_apple_wrote_it(name, kind):
    meta = {name: "2,5 Sek.", "totalSampledTime": "3 Sek.", "isTestFlightApp": False}
    properties = only(payload_of(kind + "Diagnostics", meta=meta))["properties"]
    del properties["stack_trace"]
    assert properties == {"duration": "2,5 Sek.", "totalSampledTime": "3 Sek.", "isTestFlightApp": False}


KILLED = {"type": "EXC_CRASH", "signal": "SIGKILL"}
ABORTED = "SIGNAL 6 Abort trap: 6"
THROWN = {"exceptionName": "NSRangeException", "composedMessage": "index 3 beyond bounds", "className": "NSException"}
WATCHDOG = "<RBSTerminateContext| domain:10 code:0x8BADF00D explanation:scene-create watchdog>"
UNQUOTED = "RCTFatalException: TypeError: Cannot read property 'cart' of undefined"
ASI = "*** Terminating app due to uncaught exception 'NSRangeException', reason: 'it's 3\nof 2'\n%s terminating"


@pytest.mark.parametrize("body, kind, reason", [
    *[(payload_of(meta=meta), kind, None) for meta, kind in [
        ({"exceptionType": 1, "signal": 11}, "EXC_BAD_ACCESS"), ({"exceptionType": 10, "signal": 6}, "SIGABRT"),
        ({"exceptionType": 10}, "EXC_CRASH"), ({"signal": 9}, "SIGKILL"), ({}, "Unknown"),
        ({"exceptionType": 99, "signal": 99}, "Unknown"), ({"exceptionType": [1], "signal": None}, "Unknown")]],
    *[(payload_of(meta={"exceptionType": 10, "signal": 9, "terminationReason": reason}), kind, reason)
      for reason, kind in [
          (WATCHDOG, "0x8badf00d"), ("Namespace X, Code 0xDEAD10CC", "0xdead10cc"),
          ("Namespace X, Code 65536", "0x10000"), ("FRONTBOARD 2343432205", "0x8badf00d"),
          ("Namespace SIGNAL, Code 0xffff", "SIGKILL"), ("code:", "SIGKILL")]],
    (payload_of(meta={"signal": 6, "objectiveCexceptionReason": THROWN, "terminationReason": WATCHDOG}),
     "NSRangeException", "index 3 beyond bounds"), *[
    (ips_of(**changes), kind, reason) for changes, kind, reason in [
        ({"exception": KILLED, "termination": {"code": 2343432205}}, "0x8badf00d", None),
        ({"exception": KILLED, "termination": {"code": 1, "details": [WATCHDOG]}}, "0x8badf00d", WATCHDOG),
        ({"exception": {"type": "EXC_GUARD"}, "termination": {"code": 1 << 61, "reasons": ["fd", "7"]}},
         "EXC_GUARD", "fd 7"),
        ({"exception": {"type": "EXC_BAD_ACCESS", "subtype": "KERN_INVALID_ADDRESS at 0x0"}}, "EXC_BAD_ACCESS",
         "KERN_INVALID_ADDRESS at 0x0"),
        ({"asi": {"CoreFoundation": ["noise", ASI % "libc++"]}}, "NSRangeException", "it's 3\nof 2"),
        ({"asi": {"CoreFoundation": [ASI.replace("NSRangeException", UNQUOTED) % ""]}}, UNQUOTED, "it's 3\nof 2"),
        ({"exception": {"type": "EXC_GUARD", "subtype": "GUARD_TYPE_MACH_PORT", "message": " INVALID_NAME on 786 "}},
         "EXC_GUARD", "GUARD_TYPE_MACH_PORT INVALID_NAME on 786"),
        ({"exception": {**KILLED, "signal": "SIGKILL - CODESIGNING"}, "termination": {}}, "SIGKILL", None),
        ({"asi": {"a": ["noise"], "b": ["Shop/Cart.swift:12: Fatal error: empty"]}}, "EXC_BREAKPOINT",
         "Shop/Cart.swift:12: Fatal error: empty"),
        ({"exception": KILLED, "asi": {"libsystem_c.dylib": ["abort() called"]}, "exceptionReason": {
            "name": "NSRangeException", "composed_message": "index 3", "class": "NSException"}},
         "NSRangeException", "index 3"),
        *[({"exception": {"type": "EXC_BAD_ACCESS", "subtype": "KERN_X"}, "termination": {"indicator": "Abort trap: 6"},
            "asi": {"a": ["abort() called"], "b": [lines]}}, "EXC_BAD_ACCESS", reason) for lines, reason in (
                ("Could not cast value of type 'A' (0x1) to 'B' (0x2).",) * 2, ("Performing @selector(a:)", "KERN_X"),
                ("abort() called\nterminating due to std::runtime_error: boo",
                 "terminating due to std::runtime_error: boo"))],
        ({"exception": 1, "termination": [], "asi": []}, "Unknown", None),
        ({"exception": {}, "termination": {}, "asi": {"a": ["noise"]}}, "Unknown", "noise")]], *[
    (crash_text(change), kind, reason) for change, kind, reason in [
        (("EXC_CRASH (SIGABRT)", "EXC_BAD_ACCESS (SIGSEGV)\nException Subtype: KERN_X at 0x1"),
         "EXC_BAD_ACCESS", "KERN_X at 0x1"),
        (("EXC_CRASH (SIGABRT)\nException Codes: 0x", "EXC_BAD_ACCESS (SIGSEGV)\nException Codes: KERN_X at 0x1\n0x"),
         "EXC_BAD_ACCESS", "KERN_X at 0x1"),
        (("(SIGABRT)", "(SIGKILL (Code Signature Invalid))"), "SIGKILL", "Abort trap: 6"),
        ((ABORTED, "Namespace SPRINGBOARD, Code 0x8badf00d"), "0x8badf00d", None),
        ((ABORTED, "RUNNINGBOARD 3735883980 "), "0xdead10cc", None),
        ((ABORTED, "FRONTBOARD\n" + WATCHDOG), "0x8badf00d", WATCHDOG),
        ((ABORTED, "DYLD 1 Library missing\nLibrary not loaded: @rpath/Kit\nReferenced from: Shop"), "SIGABRT",
         "Library not loaded: @rpath/Kit"),
        ((ABORTED, "DYLD, [0x5] Code Signature\n\nDyld Error Message:\n  Library not loaded: @rpath/Kit"), "SIGABRT",
         "Library not loaded: @rpath/Kit"),
        ((ABORTED, "TCC 0 \nThis app has crashed, for lack of a key"), "SIGABRT",
         "This app has crashed, for lack of a key"),
        ((ABORTED, "TCC, This app has crashed, for lack of a key"), "SIGABRT",
         "TCC, This app has crashed, for lack of a key"),
        ((ABORTED, "RUNNINGBOARD 3735883980 \nHighlighted by Thread:  0"), "0xdead10cc", None),
        (("(SIGABRT)", "(SIGABRT)\nException Reason: +[Cart a]: unrecognized"), "SIGABRT", "+[Cart a]: unrecognized"),
        (("(SIGABRT)", "(SIGABRT)\nException Subtype: GUARD_X\nException Message: on port 7"), "SIGABRT",
         "GUARD_X on port 7"),
        (("Triggered", "Application Specific Information:\n" + ASI % "x" + "\n\nTriggered"),
         "NSRangeException", "it's 3\nof 2")]]], ids=lambda value: str(value)[-40:])
def test_the_exception_type_is_the_most_specific_one(body, kind, reason):
    report = only(body)
    assert (report["exception_type"], report.get("exception_reason")) == (kind, reason)


@pytest.mark.parametrize("sent, expected", [
    ("iPhone OS 14.0.1 (18A393)", "14.0.1"), ("visionOS 2.0 (22N320)", "2.0"), ("Mac OS X 10.15.7 (19H2)", "10.15.7"),
    ("iPhone OS 16.4.1 (a) (20E772520a)", "16.4.1"), ("Version 17.0 (Build 21A329)", "17.0"), ("17.5", "17.5"),
    ("Something else", "Something else"), ("iOS 17 beta", "iOS 17 beta"), ({"number": "27.0"}, "27.0")])
def test_the_os_version_is_the_number_alone(sent, expected):
    assert only(payload_of(meta={"osVersion": sent}))["os_version"] == expected


@pytest.mark.parametrize("system, head, release", [
    ("iPhone OS 26.1 (23B85)", "", ("1.2.0", "47")), ("macOS 12.1 (21C52)", "", ("1.2.0", "47")),
    ("iPhone OS 15.0", "", ("1.2.0", "47")), ("iPhone OS 14.4 (18D52)", "", ("47", "1.2.0")),
    ("iPhone OS 9.3", "", ("47", "1.2.0")), ("iOS 8.1.3 (12B466)", "", ("47", "1.2.0")),
    ("iOS 18.3.1 (22D72)", "", ("1.2.0", "47")), ("Watch OS 6.3", "", ("47", "1.2.0")),
    ("Watch OS 8.0", "", ("1.2.0", "47")),
    ("iPhone OS 14.4", '{"app_version": "3", "build_version": "4", "bug_type": "109"}\n', ("3", "4"))])
def test_a_crash_text_has_its_version_first_or_before_ios_15_its_build(system, head, release):
    report = only(head.encode() + crash_text(("iPhone OS 26.1 (23B85)", system)))
    assert (report["app_version"], report["build_number"]) == release


@pytest.mark.parametrize("place, file, line", [
    ("Cart.total() + 80 (Cart.swift:12)", "Cart.swift", 12), ("Cart.total() + 80 (Cart.swift)", "Cart.swift", None),
    ("Cart.total() (in Shop) (Cart.swift:12) + 80", "Cart.swift", 12), ("Cart.total() (in Shop) + 80", None, None),
    ("Cart.total() + 80 (<compiler-generated>)", None, None), ("Cart.total() + 80", None, None),
    ("Cart.total() + 80 (Cart.swift:12) [inlined]", "Cart.swift", 12), ("Cart.total()", None, None),
    ("Cart.total() (Cart.swift:12:5) + 80", "Cart.swift", 12), ("Cart.total() + 80 (:-1)", None, None),
    ("0x100400000 + 32 (Cart.total() + 80)", None, None)])  # KSCrash's
def test_a_frame_of_a_crash_text_has_its_name_file_and_line_in_any_form_of_apples_tools(place, file, line):
    frame = only(crash_text(("Cart.total() + 4 (Cart.swift:12) [inlined]", place)))["stack_trace"][1]
    assert (frame["symbol"], frame.get("file"), frame.get("line")) == ("Cart.total()", file, line)
    assert "file" not in only(crash_text(("Cart.swift:12", ".cold.1")))["stack_trace"][1]


def test_an_empty_value_of_apple_is_no_version_build_or_model():
    for empty in ("", 0, False, None, [], {}):
        report = only(payload_of(meta=dict.fromkeys(["appVersion", "appBuildVersion", "deviceType"], empty)))
        assert not {"app_version", "build_number", "device_model", "extra"} & report.keys()


def during(**span):
    return {"crashDiagnostics": payload_of()["crashDiagnostics"], **span}


@pytest.mark.parametrize("body, expected", [
    *[(during(**span), "2026-03-12T01:00:00Z") for span in (
        {"timeStampBegin": "2026-03-11 01:00:00 +0000", "timeStampEnd": "2026-03-12 01:00:00 +0000"},
        {"timeStampEnd": "2026-03-12 03:00:00 +0200"}, {"timeStampBegin": "2026-03-12 01:00:00"},
        {"timeStampBegin": "2026-03-12 01:00:00", "timeStampEnd": "yesterday"},
        {"timeRange": {"begin": 1, "end": "2026-03-12T01:00:00Z"}}, {"timeRange": {"begin": 794970000, "end": None}})],
    (during(timeRange={"begin": "2026-03-12T01:00:00.5000000001Z"}), "2026-03-12T01:00:00.500Z"),
    (ips_of(captureTime=None), "2026-03-12T09:00:09Z"),
    *[(body, NOW) for body in (
        during(), during(timeRange=[]), during(timeStampEnd=True, timeStampBegin=1e300),
        during(timeStampEnd="2026-13-01 00:00:00"), ips_of(None, captureTime="?"),
        crash_text(("Date/Time:  ", "Date/Mime:  ")))]])
def test_a_diagnostic_occurred_at_the_end_of_its_span_or_when_captured_else_at_receipt(body, expected):
    assert only(body)["occurred_at"] == parse_time(expected)


BASE = 0x100400000


@pytest.mark.parametrize("changes, expected", [  # to a frame; its binary, offset, and whether it is the app's own
    ({"address": BASE + 5, "offsetIntoBinaryTextSegment": 5}, ("Shop", 5, True)),
    ({"address": BASE + 5, "offsetIntoBinaryTextSegment": BASE}, ("Shop", 5, True)),  # iOS 14
    ({"address": (1 << 33) + 5, "offsetIntoBinaryTextSegment": 1 << 33}, ("Shop", 5, False)),
    ({"address": 0x180000000 + 4, "offsetIntoBinaryTextSegment": 5}, ("Shop", 5, True)),
    ({"address": 0x180000000 + 5, "offsetIntoBinaryTextSegment": 5}, ("Shop", 5, False)),
    ({"address": BASE, "binaryName": "dyld"}, ("dyld", 16, False)),
    ({"address": BASE, "binaryName": None}, (None, 16, True)),
    ({"address": None}, ("Shop", 16, False)),
    ({"address": None, "offsetIntoBinaryTextSegment": BASE}, ("Shop", None, True)),
    ({"address": BASE, "offsetIntoBinaryTextSegment": None}, ("Shop", None, True)),
    ({"address": 5, "offsetIntoBinaryTextSegment": 6}, ("Shop", 6, False)),
    ({"address": BASE - 1, "offsetIntoBinaryTextSegment": BASE}, ("Shop", None, True)),
    ({"address": str(BASE), "offsetIntoBinaryTextSegment": "0x12"}, ("Shop", None, False)),
    ({"address": -5, "offsetIntoBinaryTextSegment": -5}, ("Shop", None, False)),
    ({"address": 1 << 70, "offsetIntoBinaryTextSegment": True}, ("Shop", None, False))])
def test_a_frame_of_metrickit_has_an_offset_and_is_own_below_the_system_libraries(changes, expected):
    frame, = trace_of(payload_of(tree=tree_of(sampled("Shop", 16, **changes))))
    assert (frame.get("binary"), frame.get("offset"), frame.get("in_app", False)) == expected


@pytest.mark.parametrize("changes, is_own", [
    ({}, True), ({"path": "/opt/tool"}, True), ({"path": "/opt/other"}, False), ({"path": ""}, True),
    ({"path": None, "base": 0x1a0000000}, False), ({"path": None, "base": None}, None),
    ({"path": "/var/Shop.app/Frameworks/libswiftUI.dylib", "name": "libswiftUI.dylib"}, False)])
def test_an_image_inside_the_app_or_that_of_the_process_is_own_code(changes, is_own):
    body = ips_of(procPath="/opt/tool", usedImages=[{**IMAGES[0], **changes}])
    assert "in_app" not in trace_of(body)[0] and trace_of(body)[1].get("in_app") is is_own


def test_without_images_the_load_address_tells_the_own_code_of_a_crash_text():
    text, _ = crash_text(("UIApplicationMain + 340", "start (Main.c:3)")).split(b"Binary Images")
    assert [(frame.get("file"), frame["in_app"]) for frame in trace_of(text)] == [
        ("Main.c", False), ("Cart.swift", True), (None, True)]


IN_SHOP = {"binary": "Shop", "uuid": SHOP, "in_app": True}


@pytest.mark.parametrize("changes, expected", [
    *[({"imageIndex": index}, {}) for index in (7, -1, "0", None, 3, 4, 5)], ({"imageOffset": "0x20"}, IN_SHOP),
    ({"symbol": "<redacted>"}, {**IN_SHOP, "offset": 32}),
    ({"sourceFile": "/Users/x/Cart.swift", "sourceLine": "12"}, {**IN_SHOP, "offset": 32, "file": "Cart.swift"}),
    *[({"sourceFile": "/<compiler-generated>", "sourceLine": 3, "symbol": symbol}, {
        **IN_SHOP, "offset": 32, "symbol": symbol, "in_app": is_own, **({"symbolicated": True} if is_own else {})})
      for symbol, is_own in (("Cart.x.getter", True), ("specialized Array.subscript.getter", False),
                             ("merged specialized Array.x", False))]])
def test_unknown_parts_of_a_frame_are_left_out(changes, expected):
    images = [*IMAGES, {"name": "???", "path": "", "uuid": SHOP.translate(str.maketrans("12345A", "0" * 6))}, 5, []]
    frame = {"imageIndex": 0, "imageOffset": 32, **changes}
    assert trace_of(ips_of(usedImages=images, threads=[{"frames": [frame]}], faultingThread=0)) == [
        {"frame": 0, **expected}]


DEEP = sampled("Shop", 1, sampled("Kit", 2, sampleCount=3), sampled("Kit", 3, sampled("Kit", 4), sampleCount=5),
               sampled("Kit", 5, sampleCount=5))
TREES = [  # a kind, its tree, and the offsets of the frames that are kept
    ("crash", tree_of(sampled("Shop", 1), sampled("Shop", 2, sampleCount=2)), [2]),
    ("crash", {"callStacks": [{"callStackRootFrames": [sampled("Shop", n)], "threadAttributed": n == 2}
                              for n in (1, 2, 3)]}, [2]),
    ("crash", {"callStacks": [{"callStackRootFrames": [sampled("Shop", n)]} for n in (1, 2)]}, [1]),
    ("hang", tree_of(DEEP), [1, 3, 4]), ("crash", tree_of(DEEP, threadAttributed=None), [1, 3, 4]),
    *[(kind, tree_of(sampled(start, 1, sampled("UIKitCore", 2, sampled("Shop", 3)))), order)
      for start in ("dyld", "libsystem_pthread.dylib")
      for kind, order in (("hang", [3, 2, 1]), ("cpuException", [3, 2, 1]), ("crash", [1, 2, 3]))],
    ("hang", tree_of(sampled("dyld", 1, sampled("Shop", 2, sampled("dyld", 3)))), [1, 2, 3]),  # dyld was loading
    ("hang", tree_of(sampled("Shop", 1, sampled("dyld", 2))), [1, 2])]


@pytest.mark.parametrize("kind, tree, offsets", TREES)
def test_the_frames_are_those_of_the_attributed_thread_the_innermost_first(kind, tree, offsets):
    trace = trace_of(payload_of(kind + "Diagnostics", tree))
    assert [(frame["frame"], frame["offset"]) for frame in trace] == list(enumerate(offsets))


def test_the_backtrace_of_an_exception_takes_precedence_over_that_of_the_thread():
    for changes, offsets in (
            ({"lastExceptionBacktrace": [{"imageIndex": 0, "imageOffset": 3}]}, [3]),
            ({"lastExceptionBacktrace": [], "faultingThread": 9}, [8, 32, 64]), ({"faultingThread": 0}, [1])):
        assert [frame["offset"] for frame in trace_of(ips_of(**changes))] == offsets
    for backtrace in ("(0x100400010 0x180000002)", "0   Shop  0x100400010 0x100400000 + 16\n1  X\t0x180000002 f + 2"):
        trace = trace_of(crash_text(("Thread 0 name", f"Last Exception Backtrace:\n{backtrace}\n\nThread 0 name")))
        assert [(frame["offset"], frame.get("in_app")) for frame in trace] == [(16, True), (2, False)]


@pytest.mark.parametrize("body", [
    ips_of(None), ips_of({}), b"\xef\xbb\xbf" + ips_of(), ips_of() + b"\n\nModel: Mac, BootROM 1\nDisplay: {LCD}\n",
    b'"timestamp":"2026-03-12"}\n' + ips_of(None), ips_of({**IPS_HEAD, "bug_type": 109}), b"\n\n" + ips_of(),
    b"----\nTranslated Report (Full Report Below)\n----\n" + crash_text(("Cart.total", "Wrong.one")) + ips_of(),
    json.dumps(IPS_HEAD).encode() + b"\n" + json.dumps(IPS_BODY, indent=2).encode(),
    ips_of().replace(b"\n", b""),  # as `curl -d` sends it
    json.dumps({**IPS_HEAD, "bug_type": "109"}).encode() + b"\n" + crash_text(),
    crash_text().replace(b"\n", b"\r\n"), crash_text() + b"\x00",
    crash_text(("Triggered", "Version: 9.9 (9)\n\nTriggered")),  # of two equal headers, the first counts
    b"----\nTranslated Report (Full Report Below)\n----\n" + crash_text() + ips_of()[:-50]])
def test_a_file_is_read_whatever_is_around_its_body(body):
    assert only(body)["stack_trace"][1] == FLAT[1] and only(body)["app_version"] == "1.2.0"


UNREADABLE = [
    *[(body, "unknown report format", detail) for body, detail in [
        (b"", "the body is empty"), (b" \n", "the body is empty"),
        (b"hello", "the body is neither a MetricKit payload nor an .ips or .crash file"),
        (b"\xff", "it is not UTF-8"), (b"[]", "the body is a list, not an object"),
        (b"1", "the body is a number, not an object"),
        (b"{}", "the object is neither a MetricKit payload nor an .ips file"),
        *((body, "the object is neither a MetricKit payload nor an .ips file; POST a crash of our own form to"
           " /api/v1/crashes") for body in ({**CRASH, "threads": [], "exception": {}}, json.dumps(CRASH).encode())),
        (b'{"crashDiagnostics": [1, 2', "Expecting ',' delimiter: line 1 column 27 (char 26)"),
        (b'{"crashDiagnostics": []} x', "Extra data: line 1 column 26 (char 25)"),
        (b'{"crashDiagnostics": [NaN]}', "a number is out of range"),
        (b'{"crashDiagnostics": [[]]}', "crashDiagnostics has a list where an object belongs"),
        (b'{"hangDiagnostic": 1}', "hangDiagnostic has a number where an object belongs"),
        (json.dumps(IPS_HEAD).encode(), "an .ips file whose body cannot be read"),
        (ips_of()[:-50], "an .ips file whose body cannot be read"),
        (b"[" * 100_000, "it is nested too deep"), (b'{"a":' * 100_000, "it is nested too deep"),
        # Deeper than any Python reads by itself: 3.14 reads 65,000 levels.
        (b'{"subFrames":' * 75_000, "it is nested too deep"),
        (b'{"subFrames":[' * 1000 + b"[" * 100_000, "it is nested too deep"),
        (b'{"subFrames":[' * 60_000, "Expecting value in a deep call stack"),
        (b'{"subFrames":[' * 60_000 + b'"' + b'\\"' * 90_000,
         "Unterminated string starting at in a deep call stack")]],
    (ips_of({**IPS_HEAD, "bug_type": "298"}), "unsupported bug_type 298",
     "a jetsam report on all apps is not a crash of the app"),
    (b'{"bug_type": "228"}\n{"x": 1}', "unsupported bug_type 228", "a hang is not a crash of the app"),
    (b'{"bug_type": 7777}\nx', "unsupported bug_type 7777", "it is not a crash of the app"),
    ({"crashDiagnostics": [{}] * 60, "hangDiagnostics": [{}] * 41}, "too many diagnostics: at most 100", "")]


def test_a_hundred_diagnostics_are_stored_in_little_more_than_was_sent():
    for length, count in ((1000, 100), (100_000, 1)):  # their common environment is copied only if it is small
        body = {"environment": {"x": "y" * length, "applicationVersion": "1"}, "crashDiagnostic": [{}] * 100}
        assert [len(report["extra"]["x"]) for report in diagnosed(body) if "extra" in report] == [length] * count
    body = json.loads(nest(150, '{"binaryUUID":"%s"' % SHOP))  # frames that share a name of 2,000 bytes
    body["crashDiagnostics"][0]["callStackTree"]["binaryInfo"] = [{"uuid": SHOP, "name": "\U0001f600" * 500}]
    crashes = diagnosed({"crashDiagnostics": body["crashDiagnostics"] * 100})
    sizes = [len(backfeedr.to_json(crash["stack_trace"]).encode()) for crash in crashes]
    assert min(sizes[:4]) > 250_000 and 20_000 < max(sizes[4:]) < 32_000, "after the first megabyte, less is stored"


def crashes_in_long_binaries(name):
    """20 crashes in binaries whose names are new. They were kept to tell whether they are specific."""
    for _ in range(20):
        parse_crash({**CRASH, "stack_trace": [{"binary": os.urandom(4).hex() + name}]})


@pytest.mark.parametrize("parse, body", [
    (backfeedr.parse_crash_body, changed(CRASH, stack_trace=[{"symbol": "1 a" + 1_000_000 * " " + "b"}])),
    (diagnosed, b'{"timeRange": {}, "x": "/home/' + 1_000_000 * b"a" + b'"}'),
    (diagnosed, nest(260)[:-1] + b', "x": "' + 500_000 * b"\\n" + b'"}'),
    (crashes_in_long_binaries, "\U0001f600" * 100_000)],
    ids=["spaces in a symbol", "a long name in a path", "escapes in deep JSON", "long names of binaries"])
def test_long_text_takes_little_time_and_memory(parse, body):
    """The first took 5 s, the second 190 MB, the third 65 MB, and the fourth kept up to 8 GB."""
    started = time.process_time()
    parse(body)
    assert time.process_time() - started < 2
    tracemalloc.start()
    try:
        parse(body)
        kept, most = tracemalloc.get_traced_memory()
        assert kept < 4_000_000 and most < 15_000_000
    finally:
        tracemalloc.stop()


def test_the_examples_of_apple_formats_are_read():
    crash, hang = diagnosed((EXAMPLES / "diagnostics.json").read_bytes())
    assert (crash["exception_type"], hang["name"]) == ("EXC_BREAKPOINT", "Hang")
    report = only((EXAMPLES / "crash.ips").read_bytes())
    assert report["exception_reason"] == "Shop/Cart.swift:42: Fatal error: Index out of range"
    assert [frame["symbol"] for frame in report["stack_trace"] if frame.get("in_app")] == [
        "Cart.item(at:)", "CartView.body.getter"]


@pytest.mark.parametrize("depth", [30, 70, 490, 600, 3000])
def test_a_call_stack_may_be_nested_to_any_depth(depth):
    report = only(nest(depth))
    kept = [*range(depth)] if depth <= 512 else [*range(384), *range(depth - 128, depth)]
    assert [(frame["frame"], frame["offset"]) for frame in report["stack_trace"]] == [(n, n) for n in kept]
    assert report["extra"].get("truncated") == (None if depth <= 512 else ["stack_trace"])
    assert report["device_model"] == "iPhone16,1"


DEEP_FRAMES = '{"sampleCount": 1, "subFrames" :\n[{}, ' * 700 + "0" + "]}" * 700


def with_paths(value):
    """A value in which each list of `subFrames` is the path of the heaviest frames."""
    def path_of(frames):
        frame = max((frame for frame in frames if type(frame) is dict),
                    key=lambda frame: frame.get("sampleCount", 0), default=None)
        if frame is None:
            return []
        inner = frame.get("subFrames")
        rest = {name: value for name, value in frame.items() if name != "subFrames"}
        return [rest, *path_of(inner if type(inner) is list else [])]

    if type(value) is list:
        return list(map(with_paths, value))
    if type(value) is dict:
        return {name: deque(map(with_paths, path_of(inner))) if name == "subFrames" and type(inner) is list
                else with_paths(inner) for name, inner in value.items()}
    return value


@pytest.mark.parametrize("value", [
    "-12", "1.5e3", "true", "[ ]", '"a\\"\\\\\\/\\b\\u00e9\\ud83d\\ude00"', '[1, [2, {}], {"a": [null]}]',
    '{"a": 1, "a": 2}', "[" * 60 + "]" * 60, '"]"', '"\\"subFrames\\":["', '"subFrames"', '{"subFrames": {}}',
    '{"x": "NaN", "subFrames": [1, {"subFrames": [[]]}, 2]}', "1e400", "9" * 5000, "NaN", "-Infinity", "[NaN]",
    '{"subFrames": [{"subFrames": []}, {"subFrames": [3]}], "b": {"subFrames": [4]}}', '{"subFrames": NaN}',
    '{"subFrames": [NaN]}', '{"subFrames": [}', '{"subFrames": []', '{"subFrames": []]}', "[1,]", "[1", "[1}", "}", "]",
    "{'a': 1}", '"a', '"a\nb"', "\u00a01", ""], ids=lambda value: value[:20])
def test_json_beside_deep_frames_is_read_like_any_other(value):
    for text in ('{"x": %s, "deep": %s}', '{"deep": %s, "x": %s}'):
        text %= (value, DEEP_FRAMES) if text[2] == "x" else (DEEP_FRAMES, value)
        try:
            expected = backfeedr._DECODER.decode(value)
        except ValueError:
            with pytest.raises(ValueError):
                backfeedr._decode_nested(text)
            continue
        decoded = backfeedr._decode_nested(text)
        assert repr(decoded["x"]) == repr(with_paths(expected)), value
        assert decoded["deep"] == {"sampleCount": 1, "subFrames": deque([{"sampleCount": 1}] * 699 + [{}])}


def test_characters_that_no_database_can_store_are_replaced_in_apple_reports():
    body = payload_of(meta={"terminationReason": "a\x00\ud800b\\u0000", "\udc00": 1, "regionFormat": "\U0001f600"})
    for sent in (json.dumps(body), '%s, "x": %s}' % (json.dumps(body)[:-1], DEEP_FRAMES)):
        report = only(sent.encode())
        assert report["exception_reason"] == "a\ufffd\ufffdb\\u0000"
        assert report["extra"]["\ufffd"] == 1 and report["extra"]["regionFormat"] == "\U0001f600"


def apple_mutant(mutations):
    """An Apple report with random changes, for test_random_requests_get_documented_answers."""
    sources = [[json.dumps(body).encode()] for body in (*(body for body, _ in WHOLE_REPORTS[2:]), {
        "hangDiagnostics": [{"callStackTree": tree} for _, tree, _ in TREES]})]
    parts = mutations.pick([*sources, ips_of().split(b"\n"), crash_text().split(b"\n")])
    for _ in range(mutations.random.randint(1, 4)):
        where = mutations.random.randrange(len(parts))
        request = {"body": parts[where]}
        mutations.pick([mutations.change_json] * 3 + [mutations.change_bytes])(request)
        parts[where] = request["body"]
        if len(parts) > 2:  # text: a line is repeated elsewhere
            parts.insert(mutations.random.randrange(len(parts)), mutations.pick(parts))
    return b"\n".join(parts)


# == Signature =================================================================

VECTOR_BODY = b'{"type":"custom","name":"purchase","occurred_at":"2026-03-12T14:22:31Z"}'


def sign(body, timestamp=NOW, key=KEY):
    return backfeedr.sign(key.encode(), timestamp.encode(), body)


SIGNATURE = sign(VALID)
SIGNED = {"X_Backfeedr_Timestamp": NOW, "X_Backfeedr_Signature": SIGNATURE}


def test_a_flipped_bit_in_body_timestamp_or_signature_is_refused(serve):
    server = serve(rate_limit=0)
    for part, valid in [("body", VALID), *((name, text.encode()) for name, text in SIGNED.items())]:
        for bit in range(0, len(valid) * 8, 7):
            flipped = (int.from_bytes(valid, "big") ^ 1 << bit).to_bytes(len(valid), "big")
            assert call(server, **{**SIGNED, part: flipped if part == "body" else flipped.decode("latin-1")}) in [
                (401, {"error": "invalid signature"}), (400, {"error": "invalid timestamp"})], (part, bit)
    assert stored(server, "crashes", "replays") == {"crashes": [], "replays": []}


def test_a_signature_is_valid_for_300_seconds_before_and_after_its_time(api, clock):
    start, stale = clock.seconds, (401, {"error": "stale timestamp"})
    for seconds, accepted in ((-301, 0), (-300, 1), (0, 2), (300, 3), (301, 3)):
        clock.seconds = start + seconds
        answer = api.signed(EVENTS, b'{"n": %d, %s' % (seconds, VECTOR_BODY[1:]), NOW)
        assert (answer == stale) if abs(seconds) > 300 else answer[0] == 201 and "id" in answer[1]
        assert count(api.server, "events") == accepted


def test_a_signed_body_is_new_on_another_path_and_refused_with_another_key(api):
    body = json.dumps({**CRASH, **EVENT}).encode()
    assert api.signed(CRASHES, body, NOW)[0] == api.signed(EVENTS, body, NOW)[0] == 201
    signature = sign(VECTOR_BODY, key=api.server.store.create_key("default"))
    assert api.post(EVENTS, VECTOR_BODY, X_Backfeedr_Timestamp=NOW, X_Backfeedr_Signature=signature) \
        == (401, {"error": "invalid signature"})


def test_unsigned_requests_are_refused_if_signatures_are_required(serve):
    api = Api(serve(require_signature=True))
    assert api.post(CRASHES, CRASH) == (401, {"error": "signature required"})
    assert count(api.server, "crashes") == 0
    assert api.signed(CRASHES, VALID, NOW)[0] == 201


# == RateLimiter ===============================================================

def test_the_101st_request_in_a_minute_is_refused_until_retry_after_has_passed(api, clock):
    other = api.server.store.create_key("default")
    for path, body, status in [(EVENTS, EVENT, 201), (CRASHES, CRASH, 201), *[(BATCH, b"{", 400)] * 8] * 10:
        assert api.post(path, body)[0] == status
        clock.move(0.25)
    before = stored(api.server)
    assert api.post(BATCH, {"events": [EVENT]}) == (429, {"error": "rate limit exceeded"})
    assert (api.headers["Retry-After"], stored(api.server)) == ("35", before)
    assert api.post(CRASHES, CRASH, key=other)[0] == 201
    clock.move(34.75)
    assert api.post(CRASHES, CRASH)[0] == 429
    clock.move(0.25)
    assert [api.post(CRASHES, CRASH)[0] for _ in range(2)] == [201, 429]


def test_the_window_slides_across_the_full_minute(clock):
    clock.move(59)
    limiter = RateLimiter(100, clock=clock)
    assert sum(limiter.allow(b"k") for _ in range(150)) == 100
    for seconds, wait in (2, 58), (57.9, 1):
        clock.move(seconds)
        assert not limiter.allow(b"k") and limiter.retry_after(b"k") == wait
    clock.move(0.1)
    assert sum(limiter.allow(b"k") for _ in range(150)) == 100


def test_an_unknown_key_leaves_no_state_behind(api, monkeypatch):
    before, asked = stored(api.server), []
    for name in ("allow", "retry_after"):
        monkeypatch.setattr(postgres().PostgresLimiter if POSTGRES else RateLimiter, name, asked.append)
    answers = [api.post(CRASHES, CRASH, key=f"unknown-{n}") for n in range(50)]
    assert answers == [(401, {"error": "invalid API key"})] * 50
    assert asked == [] and not (POSTGRES and sql(api.server.store.path, "select * from rates"))
    assert stored(api.server) == before


def test_replays_and_invalid_bodies_count_against_the_limit_but_metrics_do_not(serve):
    api = Api(serve(rate_limit=3))
    assert [api.post(CRASHES, CRASH, Idempotency_Key="a")[0] for _ in range(2)] == [201, 200]
    assert [api.post(CRASHES, body)[0] for body in (b"{", CRASH)] == [400, 429]
    assert all(api.get(path)[0] == 200 for path in METRICS * 10)


def test_a_request_counts_again_for_each_tenth_of_a_second_that_it_took_to_decode(serve, clock, monkeypatch):
    api, ticks = Api(serve(rate_limit=10)), iter(range(100))
    monkeypatch.setattr(time, "thread_time", lambda: next(ticks) * 0.25)
    answers = [api.post(CRASHES, body)[0] for body in (CRASH, b"{", CRASH, CRASH, CRASH)]
    assert answers == [201, 400, 201, 201, 429] and count(api.server, "crashes") == 3
    clock.move(60)
    monkeypatch.setattr(time, "thread_time", lambda: next(ticks) * 0.09)
    assert [api.post(CRASHES, CRASH)[0] for _ in range(11)] == [201] * 10 + [429], "less time is not counted"
    clock.move(60)
    monkeypatch.setattr(time, "thread_time", lambda: next(ticks) * 1000)
    assert [api.post(CRASHES, CRASH)[0] for _ in range(2)] == [201, 429]
    clock.move(60)
    assert api.post(CRASHES, CRASH)[0] == 201, "a minute later, whatever it took"


# == Symbols ===================================================================

SYMBOLS = "/api/v1/symbols"
HELD, OTHER_BUILD = "3F1B6A52-9C0D-3E84-8A77-5D2E9B4C6F10", "3F1BFFFF-51B8-3F96-B3AA-07E6D41C2F85"
PAGE = {"first": 1000, "strings": ["total", "Cart.swift", "add"], "frames": [0, 1, 12, -1, 2, -1, 0, 0, 2, 1, 7, 1],
        "rows": [0, 0, 8, 2, 12, -1, 20, 1]}
PART = {"binary": "Shop", "arch": "arm64", "part": 0, "parts": 1, "pages": [PAGE]}
LATER_PAGE = {"first": 2000, "strings": ["later"], "frames": [0, -1, 3, -1], "rows": [0, 0]}
BOTH_PARTS = [{**PART, "parts": 2}, {**PART, "parts": 2, "part": 1, "pages": [LATER_PAGE]}]


def upload(server, part=PART, uuid=HELD, **headers):
    """Uploads a part of a build's symbols and waits for the background work. Returns the status and the answer."""
    body = part if isinstance(part, bytes) else json.dumps(part).encode()
    answer = call(server, "PUT", f"{SYMBOLS}/{uuid}", body, **{**ADMIN, **headers})
    wait_for_catch_up()
    return answer


def wait_for_catch_up():
    """Waits for background threads; not by join(), which refuses a thread that is about to start."""
    wait_until(lambda: all(thread.name != "backfeedr catch-up" for thread in threading.enumerate()))


def list_symbols(server, query=""):
    """The stored symbols, and the missing ones."""
    status, answer = call(server, **{**BEARER, "path": SYMBOLS}, query=query)
    assert status == 200
    return answer["symbols"], answer["missing"]


def functions_at(server, offset, uuid=HELD):
    with server.store.reading() as db:
        symbols = backfeedr.Symbols(db)
        return list(symbols.lookup(uuid, offset)) if symbols.is_held(uuid) else []


def symbol_rows(server):
    return stored(server, "symbols", "symbol_parts", "symbol_pages")


def frame_of(uuid, offset=16_400, **fields):
    return {"binary": "Shop", "uuid": uuid, "offset": offset, "in_app": True, **fields}


TOTAL = ("total", "Cart.swift", 12)


def test_a_lookup_gives_the_functions_at_an_offset_innermost_first(api):
    add = ("add", "", 0)
    expected = {offset: functions for offsets, functions in {
        (0, 999): [], (1000, 1007): [TOTAL], (1008, 1019): [("add", "Cart.swift", 7), add, TOTAL], (1020, 1039): [],
        (1040, 1999): [add, TOTAL], (2000, 2001, 1 << 40, 1 << 63): [("later", "", 3)]}.items() for offset in offsets}
    for part in reversed(BOTH_PARTS):
        assert not any(functions_at(api.server, offset) for offset in expected), "the upload is not complete"
        assert upload(api.server, part)[0] == 201
    assert {offset: functions_at(api.server, offset) for offset in expected} == expected
    assert not any(functions_at(api.server, offset, OTHER_BUILD) for offset in expected)


def test_a_caller_is_looked_up_before_its_return_address(api):
    upload(api.server)
    for fields, names in (({}, ["total", "total"]), ({"inlined": True}, ["total", "add", "add", "total"])):
        with api.server.store.reading() as db:
            named = backfeedr.Symbols(db).symbolicated([frame_of(HELD, 1000, **fields), frame_of(HELD, 1008)])
            assert [frame["symbol"] for frame in named] == names


def part_of(parts, n):
    """One of the parts of an upload, with one page."""
    return {**PART, "part": n, "parts": parts, "pages": [{**PAGE, "first": 1000 * n}]}


@pytest.fixture
def completed(monkeypatch):
    """The uploads that were completed: the UUID of each, and how many parts were stored at that time."""
    uploads = []
    monkeypatch.setattr(Store, "_symbols_arrived", lambda store, db, uuid: uploads.append(
        (uuid, db.execute("select received from symbols").fetchone()[0])))
    return uploads


@pytest.mark.parametrize("order", ["012", "201", "11210"])
def test_an_upload_in_any_order_and_with_repeats_completes_once(api, completed, order):
    received = set()
    for n in map(int, order * 2):
        status, answer = upload(api.server, part_of(3, n))
        assert status == (200 if n in received else 201)
        received.add(n)
        assert answer == {"uuid": HELD, "parts": 3, "received": len(received), "complete": len(received) == 3}
        assert completed == [(HELD, 3)] * answer["complete"]
    (held,), missing = list_symbols(api.server)
    rows = symbol_rows(api.server)
    assert held == {"uuid": HELD, "binary": "Shop", "arch": "arm64", "parts": 3, "rows": 12, "complete": True,
                    "uploaded_at": NOW, "size": sum(len(row[3]) for row in rows["symbol_pages"])}
    assert missing == [] and len(rows["symbol_parts"]) == len(rows["symbol_pages"]) == 3


def test_a_concurrent_upload_completes_once(api, completed):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: upload(api.server, part_of(20, n % 20)), range(40)))
    assert Counter(status for status, _ in answers) == {201: 20, 200: 20}
    assert completed == [(HELD, 20)] and list_symbols(api.server)[0][0]["rows"] == 80


def test_the_last_part_is_stored_together_with_the_groups_to_move_or_not_at_all(api, monkeypatch):
    assert upload(api.server, BOTH_PARTS[0])[0] == 201
    before = symbol_rows(api.server)
    monkeypatch.setattr(Store, "_symbols_arrived", raising(StorageUnavailable))
    assert upload(api.server, BOTH_PARTS[1])[0] == 503 and symbol_rows(api.server) == before
    monkeypatch.undo()
    assert upload(api.server, BOTH_PARTS[1])[1]["complete"]


def test_a_part_can_be_replaced_until_the_upload_is_complete(api, clock):
    two_pages = {**BOTH_PARTS[0], "pages": [{**PAGE, "first": 5}, LATER_PAGE], "arch": "x86_64"}
    assert upload(api.server, two_pages)[0] == 201
    clock.move(60)
    assert upload(api.server, BOTH_PARTS[0])[0] == 200, "without one of its pages"
    assert [row[:3] for row in symbol_rows(api.server)["symbol_pages"]] == [(HELD, 1000, 0)]
    other = {**BOTH_PARTS[1], "pages": [{**LATER_PAGE, "first": 1000}]}
    assert upload(api.server, other, OTHER_BUILD)[0] == upload(api.server, BOTH_PARTS[0], OTHER_BUILD)[0] == 201
    assert functions_at(api.server, 1000, OTHER_BUILD) == [TOTAL], "the last of the pages at one offset"
    api.server.store.delete_symbols(OTHER_BUILD)
    assert upload(api.server, BOTH_PARTS[1])[0] == 201
    before = symbol_rows(api.server)
    for part in (*BOTH_PARTS, {**PART, "parts": 9}, {**PART, "binary": "Other", "pages": [LATER_PAGE]}):
        clock.move(60)
        assert upload(api.server, part) == (200, {"uuid": HELD, "parts": 2, "received": 2, "complete": True})
    assert symbol_rows(api.server) == before
    (held,), _ = list_symbols(api.server)
    assert (held["arch"], held["uploaded_at"]) == ("arm64", "2026-03-12T14:31:00Z")


def test_another_number_of_parts_restarts_the_upload(api, monkeypatch):
    pages = [{**PAGE, "first": 1000 * n} for n in range(7)]
    assert upload(api.server, {**PART, "parts": 2, "pages": pages})[0] == 201
    upload(api.server, uuid=OTHER_BUILD)
    steps, writing_step = [], Store.writing_step
    monkeypatch.setattr(backfeedr, "SYMBOL_PAGES", 3)
    monkeypatch.setattr(Store, "writing_step", lambda store: steps.append(1) or writing_step(store))
    assert upload(api.server, {**PART, "parts": 3, "part": 2}) == (
        201, {"uuid": HELD, "parts": 3, "received": 1, "complete": False})
    assert len(steps) == 5, "three delete pages, one the build, one finds nothing"
    assert [row[:3] for row in symbol_rows(api.server)["symbol_pages"]] == [(HELD, 1000, 2), (OTHER_BUILD, 1000, 0)]


ODD_INTEGERS = (None, True, "1", 1.0, [])


@pytest.mark.parametrize("problem, parts", [
    *((f"{name} is not text of 1 to 500 characters", [{**PART, name: value} for value in (None, "", 1, "x" * 501)])
      for name in ("binary", "arch")),
    ("parts is not from 1 to 4000", [{**PART, "parts": value} for value in (*ODD_INTEGERS, 0, -1, 4001)]),
    ("part is not from 0 to parts - 1", [{**PART, "part": value} for value in (*ODD_INTEGERS, -1, 1)]),
    ("pages is not a list of at least one page", [{**PART, "pages": value} for value in (None, [], {}, "x", 1)]),
    ("pages[1]: it is not an object", [{**PART, "pages": [PAGE, value]} for value in (None, [], "x", 1)]),
    *((f"pages[1]: first is not from 1041 to {1 << 40}", [{**PART, "pages": [PAGE, {**LATER_PAGE, "first": first}]}])
      for first in (*ODD_INTEGERS, -1, 0, 1000, 1039, 1040, (1 << 40) + 1)),
    *(("pages[0]: " + problem, [{**PART, "pages": [{**PAGE, "rows": [0, -1], name: value}]} for value in values])
      for problem, name, values in (
          (f"first is not from 0 to {1 << 40}", "first", (*ODD_INTEGERS, -1, (1 << 40) + 1)),
          *((f"{name} is not a list", name, (None, {}, "x", 1)) for name in ("strings", "frames", "rows")),
          ("strings has other than text of 1000 characters", "strings", (
              ["total", "Cart.swift", value] for value in (None, 1, [], {}, "x" * 1001))),
          ("frames is not quadruples of name, file, line and parent", "frames", ([0], [0, -1, 0], [0, -1, 0, -1, 0])),
          *((f"a {column} in frames is not from {low} to {high}", "frames", [  # in the first, second or third frame
              ([0, -1, 0, -1] * 3)[:index] + [value] + ([0, -1, 0, -1] * 3)[index + 1:]
              for value in (*ODD_INTEGERS, low - 1, high + 1, 1 << 64)])
            for index, (column, low, high) in enumerate([
                ("name", 0, 2), ("file", -1, 2), ("line", 0, (1 << 31) - 1), ("parent", -1, 2)] * 3)),
          ("a parent in frames comes after its child", "frames", (
              [0, -1, 0, 0], [0, -1, 0, -1, 0, -1, 0, 1], [0, -1, 0, 1, 0, -1, 0, -1])),
          ("rows is not pairs of delta and frame", "rows", ([0], [0, 0, 1])),
          ("it has not 1 to 2000 rows", "rows", ([], [0, -1] + [1, -1] * 2000)),
          ("the first delta in rows is not from 0 to 0", "rows", ([value, 0] for value in (*ODD_INTEGERS, 1, -1))),
          ("a later delta in rows is not from 1 to 2147483647", "rows", (
              [0, 0, 1, 0, value, 0] for value in (*ODD_INTEGERS, 0, -1, 1 << 31))),
          ("rows has an offset above 1099511627776", "rows", ([0, 0] + [1 << 30, 0] * 1024,)),
          ("a frame in rows is not from -1 to 2", "rows", ([0, value] for value in (*ODD_INTEGERS, -2, 3)))))])
def test_invalid_parts_are_refused_and_store_nothing(api, problem, parts):
    for part in parts:
        assert upload(api.server, part) == (400, {"error": "invalid symbols", "detail": problem}), part
    assert symbol_rows(api.server) == {"symbols": [], "symbol_parts": [], "symbol_pages": []}


@pytest.mark.parametrize("page, functions", [  # a page, and the functions at its last offset
    ({"first": 0, "strings": [], "frames": [], "rows": [0, -1]}, []),
    ({"first": 1 << 40, "strings": [""], "frames": [0, 0, 0, -1], "rows": [0, 0]}, [("", "", 0)]),
    ({"first": 0, "strings": ["x" * 1000], "frames": [0, -1, (1 << 31) - 1, -1], "rows": [0, -1, (1 << 31) - 1, 0],
      "more": 1}, [("x" * 1000, "", (1 << 31) - 1)]),
    ({"first": 0, "strings": ["f"], "frames": [number for n in range(100) for number in (0, -1, n, n - 1)],
      "rows": [0, 99] + [1, 99] * 1999}, [("f", "", n) for n in reversed(range(100))]),
    ({"first": 0, "strings": ["\0\ud800\u00fc"], "frames": [0, -1, 0, -1], "rows": [0, 0]},
     [("\ufffd\ufffd\u00fc", "", 0)]),
    ({"first": 0, "strings": ["f"], "frames": [number for n in range(300) for number in (0, -1, n, n - 1)],
      "rows": [0, 299]}, [("f", "", n) for n in range(299, 199, -1)])])  # the innermost of too many
def test_a_part_at_the_limits_is_stored_and_looked_up(api, page, functions):
    part = {**PART, "pages": [page]}
    assert upload(api.server, {**part, "arch": "x" * 500, "part": 3998, "parts": 4000}, OTHER_BUILD)[0] == 201
    assert upload(api.server, part, Content_Encoding="identity")[0] == 201
    assert functions_at(api.server, 1 << 41) == functions


def test_a_uuid_is_accepted_in_every_usual_form(api):
    for uuid in (HELD[:-1], "x" * 32, "nope", "%00"):
        status, answer = upload(api.server, uuid=uuid)
        assert (status, answer["error"], count(api.server, "symbols")) == (400, "invalid uuid", 0)
    for uuid in (HELD, HELD.lower(), HELD.replace("-", ""), HELD + "0"):
        assert upload(api.server, uuid=uuid)[1]["uuid"] == HELD
        assert [row[0] for row in symbol_rows(api.server)["symbols"]] == [HELD]


def test_a_request_is_checked_by_size_token_uuid_encoding_and_json_in_this_order(serve):
    server = serve(max_body_size=1000)
    wrong = [("part", b" " * 1001), ("Authorization", None), ("uuid", "x"), ("Content_Encoding", "br")]
    for n, expected in enumerate([(413, "request body too large"), (401, "missing admin token"), (400, "invalid uuid"),
                                  (415, "unsupported content encoding"), (400, "invalid JSON")]):
        status, answer = upload(server, **{"part": b"{", **dict(wrong[n:])})
        assert (status, answer["error"]) == expected
    assert upload(server, Authorization="Bearer x")[1] == {"error": "invalid admin token"}
    assert upload(server, gzip.compress(b"[" * 100_000), Content_Encoding="gzip")[0] == 413
    assert upload(server, b"[" * 1000)[1]["error"] == "invalid JSON"
    assert symbol_rows(server)["symbols"] == []
    assert upload(server, gzip.compress(json.dumps(PART).encode()), **ZIPPED)[0] == 201
    for method, path, allowed in (("POST", SYMBOLS, "GET"), ("GET", f"{SYMBOLS}/{HELD}", "PUT"),
                                  ("DELETE", f"{SYMBOLS}/{HELD}", "PUT")):
        status, headers, _ = call_with_headers(server, method, path, b"", **ADMIN)
        assert (status, headers["Allow"]) == (405, allowed)
    assert call(server, "GET", SYMBOLS, b"") == (401, {"error": "missing admin token"})


def test_the_bytes_of_a_build_and_the_number_of_builds_are_limited(api, monkeypatch, clock):
    size = len(backfeedr.encode_page(*(PAGE[name] for name in ("strings", "frames", "rows"))))
    parts = [part_of(3, n) for n in range(3)]
    monkeypatch.setattr(backfeedr, "MAX_SYMBOL_BYTES", 2 * size)
    assert [upload(api.server, part)[0] for part in (*parts[:2], parts[1])] == [201, 201, 200], "not counted twice"

    def assert_refused(*request):
        before = symbol_rows(api.server)
        status, answer = upload(api.server, *request)
        assert (status, answer["error"]) == (400, "too many symbols") and f"'symbols delete {HELD}'" in answer["detail"]
        assert symbol_rows(api.server) == before

    assert_refused(parts[2])
    clock.move(1)
    monkeypatch.setattr(backfeedr, "MAX_SYMBOL_BUILDS", 2)
    add(api.server, stack_trace=[frame_of(HELD)])
    third = backfeedr.image_uuid("ab" * 16)
    assert upload(api.server, uuid=OTHER_BUILD)[0] == upload(api.server, uuid=third)[0] == 201
    held = {row[0] for row in symbol_rows(api.server)["symbols"]}
    assert held == {HELD, third}, "the oldest one has a crash, so it stays"
    add(api.server, stack_trace=[frame_of(third)])
    assert_refused(PART, OTHER_BUILD)
    assert upload(api.server, uuid=third)[0] == 200 and upload(api.server, parts[1])[0] == 200


@sqlite_only
def test_symbols_take_at_most_half_of_max_db_size_and_displace_no_reports(serve):
    server = serve("small.db", max_db_size=800_000, rate_limit=0)
    add(server, 5)
    strings = [hashlib.sha256(bytes([n % 256, n // 256])).hexdigest() * 15 for n in range(200)]  # hardly compressible
    page = {"first": 0, "strings": strings, "frames": [x for n in range(200) for x in (n, -1, 1, -1)], "rows": [0, 0]}
    answers = [upload(server, {**PART, "part": n, "parts": 60, "pages": [{**page, "first": n}]}) for n in range(60)]
    assert {status for status, _ in answers} == {201, 400}
    assert "half of BACKFEEDR_MAX_DB_SIZE" in answers[-1][1]["detail"]
    add(server, 5)
    server.store.prune()
    assert count(server, "crashes") == 10


def missing_build(*values):
    """An entry of the list of missing symbols."""
    return dict(zip(("uuid", "binary", "app", "app_version", "build_number", "crashes"), values))


def test_missing_symbols_are_listed_with_the_crashes_that_wait_for_them(api, clock, monkeypatch):
    server, third = api.server, "ABCDEF01-0000-0000-0000-000000000000"
    add(server, 2, stack_trace=[frame_of(HELD)], app_version="1.0", build_number="1")
    clock.move(1)
    add(server, stack_trace=[frame_of(HELD)], app_version="1.1", build_number="2")
    add(server, stack_trace=[frame_of(HELD, 99)], app_version="9")
    add(server, 5, key=server.store.create_app("Shop"), exception_type="X", app_version="3.0", stack_trace=[
        {"symbol": "abort", "binary": "libc"}, {"image_uuid": OTHER_BUILD, "offset": 5},
        frame_of(third, binary="/a/Kit")])
    add(server, 7, key=server.store.create_app("Beta", True), stack_trace=[frame_of(OTHER_BUILD, binary="Beta")])
    add(server, stack_trace=[{"symbol": "f", "file": "f.swift", "uuid": third, "offset": 1}])
    of_default = missing_build(HELD, "Shop", "default", "1.1", "2", 4)
    of_shop = [missing_build(*build, "Shop", "3.0", None, 5) for build in ((OTHER_BUILD, None), (third, "Kit"))]
    assert list_symbols(server) == ([], [*of_shop, of_default])
    with monkeypatch.context() as patch:
        patch.setattr(backfeedr, "MAX_MISSING_BUILDS", 2)
        assert list_symbols(server) == ([], of_shop), "those with the most crashes"
    assert list_symbols(server, "app=Shop") == ([], of_shop)
    assert list_symbols(server, "app=Beta") == ([], [missing_build(OTHER_BUILD, "Beta", "Beta", None, None, 7)])
    assert call(server, **{**BEARER, "path": SYMBOLS}, query="app=x")[0] == 404
    upload(server, BOTH_PARTS[0])
    clock.move(1)
    upload(server, uuid=OTHER_BUILD)
    held, waiting = list_symbols(server)
    assert [(row["uuid"], row["complete"]) for row in held] == [(OTHER_BUILD, True), (HELD, False)], "newest first"
    assert waiting == [of_shop[1], of_default], "until the upload is complete"
    upload(server, BOTH_PARTS[1])
    assert list_symbols(server)[1] == [of_shop[1]]


RETENTION = [  # uploads (a part) and crashes (None) with their days; the day and second of the deletion; what is kept
    *(([(0, HELD, PART), (after, OTHER_BUILD, later), *crashes], 90 + days, seconds, kept)
      for after, later, crashes, days, seconds, kept in (
          (1, PART, [], 1, 0, [HELD, OTHER_BUILD]), (1, PART, [], 1, 1, [OTHER_BUILD]),
          (0, PART, [], 1, 1, [HELD, OTHER_BUILD]),                            # neither is later than the other
          (1, {**PART, "binary": "Other"}, [], 9, 0, [HELD, OTHER_BUILD]),
          (85, BOTH_PARTS[0], [], 1, 1, [HELD, OTHER_BUILD]),                  # the later one is not complete
          (1, PART, [(30, HELD, None)], 1, 1, [HELD, OTHER_BUILD]),            # a crash of it is kept
          (1, PART, [(30, OTHER_BUILD, None)], 1, 1, [OTHER_BUILD]))),
    ([(0, HELD, PART)], 300, 0, [HELD]),
    *(([(0, HELD, BOTH_PARTS[0])], 7, seconds, kept) for seconds, kept in ((0, [HELD]), (1, []))),
    ([(0, HELD, BOTH_PARTS[0]), (5, HELD, BOTH_PARTS[0])], 12, 0, [HELD]),  # its latest part counts
    ([(0, HELD, BOTH_PARTS[0]), (5, HELD, BOTH_PARTS[0])], 12, 1, [])]


@pytest.mark.parametrize("how", ["after a commit", "by prune"])
def test_symbols_are_deleted_when_no_crash_needs_them_and_a_later_build_exists(keeping, clock, how):
    server = keeping(90)
    for received, day, seconds, kept in RETENTION if how == "after a commit" else RETENTION[:3]:
        start = clock.seconds
        for day_of_receipt, uuid, part in received:
            clock.seconds = start + day_of_receipt * A_DAY
            assert upload(server, part, uuid)[0] in (200, 201) if part else add(server, stack_trace=[frame_of(uuid)])
        clock.seconds = start + day * A_DAY + seconds
        for _ in range(5):
            server.store.prune() if how == "by prune" else add(server, type="custom")
        case = received, day, seconds
        assert [row[0] for row in symbol_rows(server)["symbols"]] == kept, case
        assert {row[0] for rows in symbol_rows(server).values() for row in rows} == set(kept), case
        clock.move(1000 * A_DAY)
        for uuid in kept:
            server.store.delete_symbols(uuid)
        server.store.prune()


def test_symbols_whose_last_crash_has_expired_are_deleted_the_next_day(keeping, later):
    server = keeping(90)
    upload(server)
    add(server, stack_trace=[frame_of(HELD)])
    later(server, A_DAY)
    upload(server, uuid=OTHER_BUILD)
    for days, kept in ((88.9, [HELD, OTHER_BUILD]), (0.2, [HELD, OTHER_BUILD]), (1, [OTHER_BUILD])):
        later(server, days * A_DAY)
        for _ in range(5):
            later(server, 1)
        assert [row[0] for row in symbol_rows(server)["symbols"]] == kept


def test_without_retention_only_incomplete_symbols_are_deleted(keeping, later, clock):
    server = keeping(0)
    upload(server)
    upload(server, BOTH_PARTS[0], OTHER_BUILD)
    clock.move(1)
    upload(server, uuid="ab" * 16)
    for _ in range(5):
        later(server, 1000 * A_DAY)
    assert count(server, "symbols") == 2


@pytest.mark.parametrize("then", ["it is deleted again", "it is sent again"])
def test_no_lookup_gives_a_wrong_name_while_symbols_are_deleted(api, monkeypatch, then):
    monkeypatch.setattr(backfeedr, "SYMBOL_PAGES", 2)
    assert upload(api.server, {**PART, "pages": [{**PAGE, "first": 1000 * n} for n in range(5)]})[0] == 201
    before_steps, writing_step = [], Store.writing_step

    def watched_step(store):
        before_steps.append((functions_at(api.server, 1000), count(api.server, "symbol_pages")))
        if len(before_steps) == 3:
            raise StorageUnavailable
        return writing_step(store)
    monkeypatch.setattr(Store, "writing_step", watched_step)
    with pytest.raises(StorageUnavailable):
        api.server.store.delete_symbols(HELD)
    assert before_steps == [([TOTAL], 5), ([], 3), ([], 1)]
    assert [build["complete"] for build in list_symbols(api.server)[0]] == [False]
    if then == "it is deleted again":
        assert api.server.store.delete_symbols("3f1b6a52") == HELD
        assert not any(symbol_rows(api.server).values())
    assert upload(api.server, {**PART, "pages": [LATER_PAGE]})[0] == 201
    assert [row[1] for row in symbol_rows(api.server)["symbol_pages"]] == [2000], "the old pages are gone"


def test_symbols_are_deleted_only_if_the_uuid_names_one_build(api):
    for uuid in (HELD, OTHER_BUILD):
        upload(api.server, uuid=uuid)
    for given, problem in [
            ("3F1", "at least 4 characters"), ("---3F1", "at least 4 characters"), ("", "at least 4 characters"),
            ("3F1B", "2 builds have a UUID that begins with '3F1B'"), ("0000", "no builds have"),
            ("%%%%", "no builds have"), (HELD[:-1] + "1", "no builds have")]:
        with pytest.raises(StoreError, match=problem):
            api.server.store.delete_symbols(given)
    assert count(api.server, "symbols") == 2
    assert api.server.store.delete_symbols(HELD.lower()[:7]) == HELD


def test_the_commands_list_and_delete_symbols(command, clock):
    with opened(clock) as server:
        assert command("symbols", "list") == (0, "UUID  BINARY  ARCH  ROWS  SIZE  UPLOADED\n\nNone are missing.\n", "")
        add(server, 2, stack_trace=[frame_of(OTHER_BUILD)], app_version="1.2", build_number="47")
        add(server, stack_trace=[{"image_uuid": "1" * 32, "offset": 5}])
        upload(server)
        clock.move(1)
        upload(server, BOTH_PARTS[0], "ab" * 16)
        status, out, err = command("symbols", "list")
        assert (status, err) == (0, "")
        assert [re.sub(" +", " ", line) for line in out.splitlines()[1:]] == [
            "ABABABAB-ABAB-ABAB-ABAB-ABABABABABAB Shop arm64 4 0.0 MB not complete",
            f"{HELD} Shop arm64 4 0.0 MB 2026-03-12", "", "Missing, though crashes need them:", "",
            "UUID BUILD APP CRASHES", f"{OTHER_BUILD} Shop 1.2 (47) default 2",
            "11111111-1111-1111-1111-111111111111 a build default 1"]
        assert command("symbols", "delete", HELD[:6]) == (0, "", f"Deleted the symbols of the build {HELD}.\n")
        assert command("symbols", "delete", HELD[:6]) == (
            1, "", "backfeedr: no builds have a UUID that begins with '3F1B6A': see 'symbols list'\n")
        assert command("symbols", "delete")[0] == 2 and count(server, "symbols") == 1


# -- Symbolicated frames and groups

NEXT_PART = {**PART, "pages": [{**PAGE, "first": 5000}]}  # of OTHER_BUILD, which has the same code at other offsets
UNNAMED = hashed(f"SIGABRT:{HELD}+1009")  # the group of a crash at offset 1008 without symbols
NAMED = hashed("SIGABRT:add:total")  # and with them: two functions are named "add", and equal neighbours are one


def shop_crash(offset, uuid=HELD, **fields):
    """A crash whose second frame was called at this offset, so that it returns to the next one."""
    return {**CRASH, "stack_trace": [system(7), frame_of(uuid, offset + 1)], **fields}


def group_of_crash(api, clock, *place, **fields):
    """Sends a crash that occurs now, and returns its group."""
    return api.post(CRASHES, shop_crash(*place, occurred_at=time_text(clock.seconds), **fields))[1]["group_hash"]


def test_a_request_with_many_instructions_to_look_up_is_stored_at_once_and_its_crashes_move_later(api, monkeypatch):
    upload(api.server)
    monkeypatch.setattr(backfeedr, "REQUEST_LOOKUPS", 1)
    monkeypatch.setattr(api.server.store, "_upkeep_if_due", lambda: None)
    sent = [{**CRASH, "stack_trace": [frame_of(HELD, offset + 1) for offset in offsets]}
            for offsets in ((1008, 1000), (1000,), (1004, 1000))]
    api.server.store.add(KEY_HASH, list(map(parse_crash, sent)))
    assert count(api.server, "regroupings") == 3
    api.server.store.catch_up()
    assert count(api.server, "regroupings") == 0
    groups = [group for group, in sql(api.server, "select group_hash from crashes order by seq")]
    monkeypatch.setattr(backfeedr, "REQUEST_LOOKUPS", 100)
    assert groups == [api.post(CRASHES, crash)[1]["group_hash"] for crash in sent] and len(set(groups)) == 2


def stored_groups(server):
    return [group for group, in sql(server, "select distinct group_hash from crashes")]


def test_symbols_bring_the_crashes_of_two_builds_into_one_group(api, person, clock):
    shared = {"device_id_hash": "d1", "session_id": "s1"}
    assert group_of_crash(api, clock, 1008, app_version="1.0", **shared) == UNNAMED
    clock.move(60)
    unnamed_next = group_of_crash(api, clock, 5008, OTHER_BUILD, app_version="1.1")
    assert upload(api.server)[0] == 201
    assert group_of_crash(api, clock, 1009, app_version="1.0", **shared) == NAMED
    assert upload(api.server, NEXT_PART, OTHER_BUILD)[0] == 201
    assert group_of_crash(api, clock, 5008, OTHER_BUILD, app_version="1.1") == NAMED
    group = api.get(f"{CRASHES}/{NAMED}", **ADMIN)[1]
    first = group["reports"][-1]["occurred_at"]
    assert (group["count"], group["first_version"], group["first_seen"]) == (4, "1.0", first)
    assert sql(api.server, "select group_hash, first_version, place from groups") == [(NAMED, "1.0", "add")]
    assert count(api.server, "regroupings") == 0 and stored_groups(api.server) == [NAMED]
    for old in (UNNAMED, unnamed_next):
        status, headers, answer = call_with_headers(api.server, "GET", f"{CRASHES}/{old}", query="limit=1", **ADMIN)
        assert (status, answer) == (301, {"error": "moved", "detail": f"to {NAMED}"})
        assert headers["Location"] == f"{CRASHES}/{NAMED}?limit=1"
        page = person.web.get(f"/crashes/{old}?app=default", headers=HTML)
        assert (page.status_int, page.headers["Location"]) == (301, f"/crashes/{NAMED}?app=default")
    assert api.get(f"{CRASHES}/{'0' * 16}", **ADMIN)[0] == 404


def test_crashes_move_in_steps_that_continue_after_a_restart(serve, clock, monkeypatch):
    monkeypatch.setattr(backfeedr, "STEP_SECONDS", -1)  # a step looks at one crash
    monkeypatch.setattr(Store, "catch_up_in_background", lambda store: None)
    server = serve("steps.db", rate_limit=0)
    api = Api(server)
    for n in range(8):
        group_of_crash(api, clock, 1008, device_id_hash=f"d{n % 3}")
        clock.move(1)
    upload(server)

    def moved_and_left():
        moved = count(server, "crashes", f"group_hash = '{NAMED}'")
        return moved, count(server, "crashes") - moved

    serve.unchecked.append(server)  # the old group keeps the first_seen of crashes that have moved
    for _ in range(3):
        with server.store.writing() as db:
            assert server.store._regroup(db)
    assert moved_and_left() == (3, 5)
    check_database(server, forgotten=True)
    assert api.get(f"{CRASHES}/{UNNAMED}", **ADMIN)[1]["count"] == 5, "some of its crashes are still there"
    server.store.forget_device("d1")
    assert moved_and_left() == (2, 3)
    server.close()
    server = serve("steps.db", rate_limit=0)
    for left in (2, 1, 0, 0):  # a commit is followed by a step, once a second
        clock.move(2)
        for _ in range(2):
            group_of_crash(Api(server), clock, 1008)
            assert moved_and_left()[1] == left
        check_database(server, forgotten=True)
    assert moved_and_left() == (13, 0) and count(server, "regroupings") == 0


def test_a_crash_sent_again_or_imported_after_its_symbols_gets_its_new_group(api, serve):
    crash, key, other = shop_crash(1008), {"Idempotency_Key": "k"}, serve("other.db")
    first = api.post(CRASHES, crash, **key)[1]
    exported = list(api.server.store.export(backfeedr.Crash))
    for server in (api.server, other):
        upload(server)
    other.store.import_(exported)
    assert api.post(CRASHES, crash, **key) == (200, {**first, "group_hash": NAMED})
    assert [report(server)["group_hash"] for server in (api.server, other)] == [NAMED] * 2


def test_crashes_in_the_group_other_do_not_move(api, monkeypatch):
    monkeypatch.setitem(backfeedr.MAX_NEW_NAMES, "group_hash", 0)
    api.post(CRASHES, shop_crash(1008))
    upload(api.server)
    assert report(api.server)["group_hash"] == "(other)"
    assert not any(stored(api.server, "regroupings", "group_aliases").values())


def test_aliases_follow_their_group_and_are_deleted_with_it_or_its_app(api, clock):
    frames = [frame_of(HELD, 1009), frame_of(OTHER_BUILD, 5041)]  # a framework's and the app's
    old = api.post(CRASHES, {**CRASH, "stack_trace": [system(7), *frames]})[1]["group_hash"]
    upload(api.server, NEXT_PART, OTHER_BUILD)
    between = report(api.server)["group_hash"]
    upload(api.server)
    last = report(api.server)["group_hash"]
    assert len({old, between, last}) == 3 and last == hashed("SIGABRT:add:total:add")
    prune_after(api.server, clock, A_DAY)
    assert dict(row[1:] for row in stored(api.server, "group_aliases")["group_aliases"]) == {old: last, between: last}
    prune_after(api.server, clock, 100 * A_DAY)
    assert not any(stored(api.server, "crashes", "groups", "group_images", "group_aliases").values())
    api.post(CRASHES, shop_crash(1008))
    api.server.store.delete_symbols(HELD)
    assert api.post(CRASHES, shop_crash(1008))[1]["group_hash"] == UNNAMED
    upload(api.server)
    assert count(api.server, "group_aliases") == count(api.server, "groups") == 1
    api.server.store.delete_app("default")
    api.server.store.prune()
    assert not any(stored(api.server, "group_aliases", "regroupings", "group_images").values())


@pytest.mark.parametrize("seconds", [60, -1])  # of a step: it looks at all crashes, or at one
def test_first_seen_moves_with_the_first_crash_of_a_group_and_its_address_with_the_last(
        api, clock, monkeypatch, seconds):
    """It may be from a crash that has expired. If a group splits, the other part was first seen with its own crash."""
    monkeypatch.setattr(backfeedr, "STEP_SECONDS", seconds)
    old = {}
    for version, offset in (("1.0", 1008), ("1.1", 1040), ("1.2", 1040)):
        old[version] = group_of_crash(api, clock, offset, app_version=version)
        clock.move(A_DAY)
    with api.server.store.writing() as db:  # all were in one group, and its first crash has expired
        db.execute("update crashes set group_hash = 'aaaaaaaaaaaaaaaa'")
        for table in backfeedr.PRIMARY_KEYS:
            db.execute(f"delete from {table}")
        backfeedr.recount(db)
        db.execute("update groups set first_seen = 1, first_version = '0.9'")
        db.execute("insert into regroupings values (1, 'aaaaaaaaaaaaaaaa', 0, '')")
    api.server.store.catch_up()
    seen = dict(sql(api.server, "select group_hash, first_version from groups"))
    assert seen == {old["1.0"]: "0.9", old["1.1"]: "1.1"}
    assert sql(api.server.store.path, "select target from group_aliases") == [(old["1.2"],)]
    # As a count over the rows that are left finds it.
    sql_run(api.server.store.path, "update groups set first_seen = (select min(occurred_at) from crashes where"
            " crashes.group_hash = groups.group_hash), first_version = case first_version when '0.9' then '1.0' else"
            " first_version end")


def test_uploads_during_a_catch_up_start_exactly_one_more(api, monkeypatch):
    started, may_end = [], threading.Event()
    monkeypatch.setattr(Store, "catch_up", lambda store: started.append(1) or may_end.wait(10))
    body = json.dumps(PART).encode()
    for n in range(1, 6):
        assert call(api.server, "PUT", f"{SYMBOLS}/{n:032x}", body, **ADMIN)[0] == 201
        wait_until(lambda: started)
    wait_until(lambda: [thread.name for thread in threading.enumerate()].count("backfeedr catch-up") == 2)
    assert started == [1], "the second waits for the first; it does what that one may have missed"
    may_end.set()
    wait_for_catch_up()
    assert started == [1, 1]


def test_reports_show_symbolicated_frames_beside_those_that_were_sent(api, person):
    for _ in range(2):
        api.post(CRASHES, shop_crash(1008, app_version="1.3.0", build_number="48"))
    hang = {"type": "error", "name": "Hang", "occurred_at": NOW, "properties": {"stack_trace": [frame_of(HELD, 1000)]}}
    api.post(EVENTS, hang)
    group, = stored_groups(api.server)
    page = person.text(f"/crashes/{group}")
    assert "Symbols for Shop 1.3.0 (48) are missing: 2 crashes are waiting for them." in page
    assert "uv run examples/symbols.py --server http://localhost:80 App.xcarchive" in page and "Shop + 1009" in page
    missing = missing_build(HELD, "Shop", "default", "1.3.0", "48", 2)
    assert api.get(f"{CRASHES}/{group}", **ADMIN)[1]["missing_symbols"] == [missing]
    upload(api.server)
    group, = stored_groups(api.server)
    answer = api.get(f"{CRASHES}/{group}", **ADMIN)[1]
    raw = shop_crash(1008)["stack_trace"]
    symbolicated = [{**raw[1], "symbol": name, "file": file, "line": line, "symbolicated": True, **inlined}
                    for name, file, line, inlined in (
                        ("add", "Cart.swift", 7, {"inlined": True}), ("add", None, None, {"inlined": True}),
                        ("total", "Cart.swift", 12, {}))]
    assert answer["missing_symbols"] == []
    for crash in answer["reports"]:
        assert (crash["stack_trace"], crash["raw_stack_trace"]) == ([raw[0], *symbolicated], raw)
    shown = person.get(f"/crashes/{group}")
    assert f'title="Shop + 1009 {HELD}" class="own">{OWN_CODE}<code><bdi>add</bdi></code>' in shown.text
    assert "Cart.swift:7, Shop, inlined" in person.text(f"/crashes/{group}") and "missing" not in shown.text
    event, = api.get(EVENTS, **ADMIN)[1]["events"]
    assert event["properties"]["stack_trace"][-1] == {**frame_of(HELD, 1000), "symbol": "total", "file": "Cart.swift",
                                                      "line": 12, "symbolicated": True}
    assert event["properties"]["raw_stack_trace"] == hang["properties"]["stack_trace"]
    assert "Hang Stack trace own code: total Cart.swift:12, Shop just now" in person.text("/events")
    api.post(EVENTS, {**hang, "properties": {**hang["properties"], "duration": "2 s"}})
    assert "Hang duration: 2 s own code: total Cart.swift:12, Shop just now" in person.text("/events"), "once"


def test_the_lookups_for_a_report_are_limited(api, monkeypatch):
    monkeypatch.setattr(backfeedr, "SHOWN_LOOKUPS", 5)
    monkeypatch.setattr(backfeedr.Symbols.symbolicated, "__defaults__", (4,))
    lookups, lookup = [], backfeedr.Symbols.lookup
    monkeypatch.setattr(backfeedr.Symbols, "lookup", lambda *args: lookups.append(args[1:]) or lookup(*args))
    upload(api.server)
    status, answer = api.post(CRASHES, {**CRASH, "stack_trace": [frame_of(HELD, 1000 + n) for n in range(50)]})
    assert status == 201 and len(set(lookups)) == 8, "4 for the group of the crash, 4 for the name of the group"
    lookups.clear()
    trace = api.get(f"{CRASHES}/{answer['group_hash']}", **ADMIN)[1]["reports"][0]["stack_trace"]
    assert len(set(lookups)) == 5 and trace[-1] == frame_of(HELD, 1049) and len(trace) >= 50


# == Triage ====================================================================

ABORTS = group_hash("SIGABRT", [])
UNDECIDED = {"state": "open", "fixed_in": None, "regressed_at": None}


def patch(server, body, group=ABORTS, query="", **headers):
    """The status and the JSON of the answer to a PATCH of a group."""
    return call(server, "PATCH", f"{CRASHES}/{group}", json.dumps(body).encode(), query, **{**ADMIN, **headers})


def set_triage(server, body, group=ABORTS):
    status, answer = patch(server, body, group)
    assert status == 200, answer
    return answer


def build_of(text):
    """The fields of a version and a build: "1.3.0 48". The version may name a build, too: "1.3.0 (48) 47"."""
    return dict(zip(("app_version", "build_number"), re.split(r" (?!\()", text) if text else ()))


def report_now(api, clock, build="", **fields):
    """Sends a crash, or an event if the build is "event " and a version, that occurs a second later. Returns its id."""
    clock.move(1)
    path, body = (EVENTS, EVENT) if build.startswith("event ") else (CRASHES, CRASH)
    build = build_of(build.replace("event ", ""))
    status, answer = api.post(path, {**body, "occurred_at": time_text(clock.seconds), **build, **fields})
    assert status == 201
    return answer["id"]


def state_of(server, group=ABORTS):
    return server.metrics.group(group)["state"]


def history_of(server, group=ABORTS):
    return [(entry["what"], entry["detail"]) for entry in server.metrics.group(group)["history"]]


def facts_of(server):
    return [(kind, {name: value for name, value in json.loads(detail).items() if value is not None})
            for kind, detail in sql(server, "select kind, detail from facts order by id")]


@pytest.fixture
def subscribed(api):
    """A client of a server that has a channel for its facts."""
    api.server.alerts.add("https://example.com")
    return api


@pytest.mark.parametrize("seen, fixed_in, crashes", [  # builds before it was resolved; builds after, 1 regresses
    # resolved without a version: regresses in builds first seen later
    (["1.0 47"], None, {"1.0 47": 0, "1.0 48": 1}), (["1.0 47"], None, {"1.1 47": 1}), (["1.0 47"], None, {"1.1": 1}),
    (["1.0 47", "0.9 50", "1.0 46"], None, {"0.9 50": 0, "1.0 46": 0, "1.0": 0, "0.9": 0, "0.8 1": 1}),
    (["1.0 47", "event 0.9"], None, {"0.9 40": 0, "0.9": 0, "0.9 41": 1}),
    (["1.0 47", "0.9 40", "event 0.9"], None, {"0.9 40": 0, "0.9 41": 1}),
    (["1.0 47"], None, {"event 1.1": 0, "1.0 47": 0, "1.1 48": 1}),
    # a crash without a version regresses a group of an app without versions, if it occurred later
    (["1.0 47"], None, {"": 0}), (["", "event 1.0"], "1.0", {"": 0}), ([""], "1.3.0", {"": 1}),
    ([""], None, {"as before": 0, "": 1}),
    # fixed in a version: regresses in that version and in later ones
    (["1.2.0 47"], "1.3.0", {
        **dict.fromkeys(["1.2.9", "1.2.10 99", "1.3.0-rc.1 48", "1.3.0b2", "1.3.0-0", "0.9", "1.2", "v1.2.99"], 0),
        **dict.fromkeys(["1.3.0", "1.3", "1.3.0 1", "1.3.0.1", "1.3.1-beta", "1.10", "2", "v1.3.0", "1.3.0+7"], 1)}),
    (["1.0 1"], "1.3.0 (48)", {
        **dict.fromkeys(["1.3.0 47", "1.3.0 9", "1.3.0-rc.1 99", "1.2 100"], 0),
        **dict.fromkeys(["1.3.0 48", "1.3 48", "1.3.0 100", "1.3.1 1", "1.3.0 48.1", "1.3.0 048", "1.3.0 48.0"], 1)}),
    ([""], "1.3.0 ( 48.1 )", {"1.3.0 48": 0, "1.3.0 48.1.0": 1}),
    ([""], "1.3.0", {"1.3 5": 1}), (["1.0 1"], "1.3.0-rc.2", {
        "1.3.0-rc.1": 0, "1.3.0-beta.3": 0, "1.3.0-rc.2": 1, "1.3.0-rc.10": 1, "1.3.0rc2": 1, "1.3.0": 1}),
    ([""], "1.3.0 (48)", {"1.3.0 (47)": 0, "1.3.0 (48)": 1}),
    (["1.2 46"], "1.3.0 (48)", {"1.3.0 (48) 47": 0, "1.3.0 (47) 49": 1}),  # the build of a crash counts first
    # versions that cannot be compared: regresses in those first seen later
    ([""], "winter", {"autumn": 0, "spring": 0, "winter": 1}), (["winter"], "winter", {"autumn": 1}),
    (["autumn"], "winter", {"autumn": 0, "event winter": 0, "spring": 1}), (["1.0"], "winter", {"1.0": 0, "1.1": 0}),
    (["autumn 7", "winter 8"], "winter (8)", {"autumn 7": 0, "winter 9": 1}),
    (["winter b", "winter a"], "winter (a)", {"winter b": 0, "winter a": 1}),
    (["1.3.0 48"], "1.3.0 (49)", {"1.3.0": 0, "1.3.0 49": 1})])
def test_a_resolved_group_regresses_only_in_builds_that_have_the_fix(api, clock, seen, fixed_in, crashes):
    for exception_type, build in zip(["SIGABRT", "SIGBUS", "SIGBUS"], seen):
        report_now(api, clock, build, exception_type=exception_type)
    resolve, before = {"state": "resolved", "fixed_in": fixed_in}, {"occurred_at": time_text(clock.seconds)}
    assert set_triage(api.server, resolve)["fixed_in"] == fixed_in
    clock.move(1)
    for build, regressed in crashes.items():
        change = resolve if state_of(api.server) == "open" else {"comment": "Still."}
        assert set_triage(api.server, change)["regressed_at"] is None
        id = report_now(api, clock, **before) if build == "as before" else report_now(api, clock, build)
        group = api.server.metrics.group(ABORTS)
        assert (group["state"], group["regressed_at"]) == (
            ("open", time_text(clock.seconds)) if regressed else ("resolved", None)), build
        name = re.sub(r" ([^ (]+)$", r" (\1)", build)
        last = ("regressed", f"crash {id}" + f" in {name}" * bool(build)) if regressed else ("commented", "Still.")
        assert history_of(api.server)[-1] == last


@pytest.mark.parametrize("muted, crashes", [  # seconds to each crash, its device, and the state after it
    ({}, [(1, "a", "muted"), (10 * 86_400, "b", "muted")]),
    ({"until": 60}, [(60, "a", "muted"), (0.001, "a", "open")]),
    ({"more_crashes": 1}, [(1, "a", "open")]),
    ({"more_crashes": 3}, [(1, "a", "muted"), (1, "a", "muted"), (1, "a", "open")]),
    ({"more_devices": 2}, [*((1, device, "muted") for device in ("a", "b", "b", "")), (1, "c", "open")]),
    ({"until": 60, "more_crashes": 2}, [(1, "a", "muted"), (1, "a", "open")]),
    ({"until": 60, "more_crashes": 2}, [(61, "a", "open")]),
    ({"more_crashes": 9, "more_devices": 1}, [(1, "a", "muted"), (1, "b", "open")])])
def test_a_mute_ends_with_the_first_of_its_conditions(subscribed, clock, muted, crashes):
    server = subscribed.server
    add(server, device_id_hash="a")
    until = {"until": time_text(clock.seconds + muted["until"])} if "until" in muted else {}
    set_triage(server, {"state": "muted", **muted, **until})
    for seconds, device, state in crashes:
        clock.move(seconds)
        add(server, device_id_hash=device)
        assert state_of(server) == state
    ended = state == "open"
    assert [kind for kind, _ in facts_of(server)][1:] == ["crash.unmuted"] * ended
    assert [what for what, _ in history_of(server)] == ["muted"] + ["unmuted"] * ended


def test_each_crash_of_a_commit_counts_for_a_mute_and_the_first_alone_is_a_regression(subscribed, clock):
    crash, server = parse_crash({**CRASH, "app_version": "1.0"}), subscribed.server

    def commit(requests, *crashes):
        return run_together(server.store, [partial(server.store.add, KEY_HASH, crashes)] * requests)

    add(server)
    set_triage(server, {"state": "muted", "more_crashes": 3})
    for requests, state in ((2, "muted"), (3, "open")):
        commit(requests, crash)
        assert state_of(server) == state
    set_triage(server, {"state": "resolved", "fixed_in": "1.0"})
    first = min(receipt.seqs[0] for receipt in commit(4, crash, crash))
    commit(1, crash)
    assert history_of(server)[-1] == ("regressed", f"crash {first:016x} in 1.0")
    assert [what for what, _ in history_of(server)] == ["muted", "unmuted", "resolved", "regressed"]
    assert [kind for kind, _ in facts_of(server)] == ["crash.new", "crash.unmuted", "crash.regressed"]


def test_two_hosts_that_commit_side_by_side_reopen_a_group_once(serve, clock):
    server, other = serve(), serve()
    report_now(Api(server), clock)
    for _ in range(5):
        set_triage(server, {"state": "resolved", "fixed_in": "1.0"})
        clock.move(1)
        crash = parse_crash({**CRASH, "app_version": "1.0"})
        with ThreadPoolExecutor(4) as pool:
            for future in [pool.submit(host.store.add, KEY_HASH, [crash]) for host in (server, other) * 2]:
                future.result(30)
    assert [what for what, _ in history_of(server)] == ["resolved", "regressed"] * 5


def test_replays_imports_and_test_apps_reopen_no_group_but_a_test_app_has_new_ones(serve, subscribed, clock):
    key, new = {"Idempotency_Key": "k"}, {**CRASH, "app_version": "2.0"}
    server, other = subscribed.server, serve("other.db")
    test_key = server.store.create_app("trial", is_test=True)
    subscribed.post(CRASHES, new, **key)
    subscribed.post(CRASHES, new, key=test_key)
    assert sql(server, "select kind, app_id from facts order by id") == [("crash.new", 1), ("crash.new", 2)]
    for query in ("", "app=trial"):
        assert patch(server, {"state": "resolved", "fixed_in": "2.0"}, query=query)[0] == 200
    clock.move(1)
    add(other, **new)
    assert server.store.import_(list(other.store.export(backfeedr.Crash)))["stored"] == 1
    assert subscribed.post(CRASHES, new, **key)[0] == 200 and subscribed.post(CRASHES, new, key=test_key)[0] == 201
    assert [server.metrics.group(ABORTS, app)["state"] for app in (None, "trial")] == ["resolved"] * 2
    subscribed.post(CRASHES, new)
    assert state_of(server) == "open" and [kind for kind, _ in facts_of(server)][2:] == ["crash.regressed"]


def test_crashes_that_stay_in_their_group_during_a_catch_up_do_not_regress_it(server, clock):
    report_now(Api(server), clock, "1.0 47")
    set_triage(server, {"state": "resolved", "fixed_in": "1.0"})
    sql_run(server, "update crashes set images = 'outdated'")
    sql_run(server, "insert into regroupings select app_id, group_hash, 0, '' from groups")
    server.store.catch_up()
    assert sql(server, "select images from crashes") == [(None,)] and state_of(server) == "resolved"


def test_crashes_of_older_rules_move_to_the_groups_of_the_new_ones_with_their_decision(keeping):
    server, old = keeping(), "0123456789abcdef"
    for changes in ({}, {"exception_reason": "Another."}, {"exception_type": "B"}):
        add(server, **{**CRASH, **changes})
    groups = {row["group_hash"]: row["count"] for row in server.metrics.groups()["groups"]}
    for table in ("crashes", "groups", "group_days"):  # as if one group had all of them
        sql_run(server, f"delete from {table} where group_hash <> '{ABORTS}'" * (table != "crashes") or "select 1")
        sql_run(server, f"update {table} set group_hash = '{old}'")
    server.store.triage(old, {"state": "resolved"})
    for version, moved in ((backfeedr.GROUPING_VERSION, {old: 3}), (1, groups)):
        sql_run(server, f"update state set value = {version} where name = 'grouping_version'")
        server = keeping()
        server.store.catch_up()
        assert dict(sql(server, "select group_hash, count(*) from crashes group by group_hash")) == moved
    assert sql(server, "select group_hash from group_aliases") == [(old,)]
    assert sorted(server.metrics.group(group)["state"] for group in groups) == ["open", "resolved"], "the last has it"
    assert sql(server, "select value from state where name = 'grouping_version'") == [(backfeedr.GROUPING_VERSION,)]


def test_crashes_stay_in_their_group_if_its_rules_have_not_changed(server):
    assert upload(server, {**PART, "pages": [{**PAGE, "first": 0}]}, SHOP)[0] == 201
    named = {"imageIndex": 0, "imageOffset": 12, "symbol": "Cart.other()"}  # by Xcode, so it is trusted
    for body in (ips_of(threads=[{"triggered": True, "frames": [named]}]), ips_of(), crash_text(), payload_of()):
        assert Api(server).post(DIAGNOSTICS, body)[0] == 201
    groups = sql(server, "select group_hash, images from crashes order by seq")
    sql_run(server, "insert into regroupings select app_id, group_hash, 0, '' from groups")
    server.store.catch_up()
    assert sql(server, "select group_hash, images from crashes order by seq") == groups


def test_state_and_history_outlive_the_crashes_so_a_later_crash_can_be_a_regression(serve, clock):
    server = serve(retention_days=30)
    api = Api(server)
    report_now(api, clock, "1.0 47")
    set_triage(server, {"state": "resolved", "comment": "Fixed."})
    prune_after(server, clock, 60 * A_DAY)
    assert not any(stored(server, "crashes", "groups").values())
    group = api.get(f"{CRASHES}/{ABORTS}", **ADMIN)[1]
    assert (group["state"], group["count"], group["reports"], group["first_seen"]) == ("resolved", 0, [], None)
    assert set_triage(server, {"comment": "Still?"})["history"][-1]["detail"] == "Still?", "it can still be triaged"
    for state, sort in product(backfeedr.STATE_CONDITIONS, backfeedr.SORT_COLUMNS):
        groups = server.metrics.groups(state=state, sort=sort)["groups"]
        assert [(group["group_hash"], group["count"], group["last_seen"]) for group in groups] \
            == [(ABORTS, 0, None)] * (state == "resolved")
    sql_run(server, f"""
        insert into triage (app_id, group_hash, state, changed_at) values (1, '{"f" * 16}', 'resolved', 0)""")
    for sort in backfeedr.SORT_COLUMNS:
        cursor = server.metrics.groups(state="resolved", sort=sort, limit=1)["next"]
        page = server.metrics.groups(state="resolved", sort=sort, cursor=cursor)["groups"]
        assert [group["group_hash"] for group in page] == ["f" * 16]
    check_schema({"$ref": "#/components/schemas/Groups"}, api.get(f"{CRASHES}?state=resolved", **ADMIN)[1])
    assert f"{ABORTS} resolved 0 -" in Person(server).signed_in().text("/crashes?state=resolved")
    server.alerts.add("https://example.com")
    report_now(api, clock, "1.0 47")
    assert state_of(server) == "resolved"
    report_now(api, clock, "1.1 50")
    assert state_of(server) == "open" and [kind for kind, _ in facts_of(server)] == ["crash.regressed"]
    assert [what for what, _ in history_of(server)] == ["resolved", "commented", "commented", "regressed"]
    prune_after(server, clock, 60 * A_DAY)
    report_now(api, clock, "1.1 50")
    assert [kind for kind, _ in facts_of(server)] == ["crash.new"], "as the list and the feed say"
    server.store.delete_app("default")
    server.store.prune()
    assert not any(stored(server, "triage", "group_history").values())


def test_facts_say_what_where_and_how_often_and_a_spread_is_one_once_per_bound(subscribed, monkeypatch):
    assert backfeedr.SPREAD_BOUNDS == (10, 100, 1000)
    monkeypatch.setattr(backfeedr, "SPREAD_BOUNDS", (3, 6, 8, 9))
    server, sent, noted = subscribed.server, "", []
    crash = {**CRASH, "stack_trace": [{"symbol": "Cart.total()", "file": "Cart.swift"}]}
    group = group_hash("SIGABRT", map(read_frame, crash["stack_trace"]))
    for devices, build, decision, facts in (  # those of a commit, their build, the decision before it
            ("1", "1.2 47", {}, ["new"]), ("12", "1.2 47", {}, []), ("23", "1.2 47", {}, ["spread"]),
            ("345", "1.2 47", {}, []), ("67", "1.2 47", {}, ["spread"]), ("7", "1.2 47", {}, []),
            ("8", "1.3", {"state": "resolved", "fixed_in": "1.3"}, ["regressed", "spread"]),
            ("9a", "1.3", {"state": "muted"}, [])):
        if decision:
            set_triage(server, decision, group)
        server.store.add(KEY_HASH, [
            parse_crash({**crash, "device_id_hash": device, **build_of(build)}) for device in devices])
        sent += devices
        detail = {"exception_type": "SIGABRT", "place": "Cart.total()", **build_of(build), "crashes": len(sent),
                  "devices": len(set(sent))}
        noted += [(f"crash.{fact}", {**detail, **({"fixed_in": "1.3"} if fact == "regressed" else {})})
                  for fact in facts]
        assert facts_of(server) == noted
    assert sql(server, "select distinct app_id, group_hash from facts") == [(1, group)]


def test_a_group_spreads_to_a_number_of_devices_once_although_crashes_expire_meanwhile(keeping, clock, monkeypatch):
    monkeypatch.setattr(backfeedr, "SPREAD_BOUNDS", (2, 3))
    server = keeping(2)
    server.alerts.add("https://example.com")
    for device in "abcdefgh":  # of which two or three are kept at a time
        add(server, device_id_hash=device)
        clock.move(A_DAY * 0.9)
    server.store.prune()
    assert [detail["devices"] for kind, detail in facts_of(server) if kind == "crash.spread"] == [2, 3]
    assert history_of(server) == [("spread", "to 2 devices"), ("spread", "to 3 devices")]
    check_schema({"$ref": "#/components/schemas/Group"}, server.metrics.group(ABORTS))
    prune_after(server, clock, 30 * A_DAY)
    assert count(server, "group_history") == 0, "the group is gone, so its return is told"
    for device in "ab":
        add(server, device_id_hash=device)
    assert [kind for kind, _ in facts_of(server)] == ["crash.new", "crash.spread"]


def test_the_group_other_makes_no_facts(subscribed, monkeypatch):
    monkeypatch.setitem(backfeedr.MAX_NEW_NAMES, "group_hash", 1)
    subscribed.server.store.add(KEY_HASH, [
        parse_crash({**CRASH, "exception_type": f"E{n}", "device_id_hash": f"d{n}"}) for n in range(30)])
    assert ("(other)",) in sql(subscribed.server, "select group_hash from groups")
    assert [kind for kind, _ in facts_of(subscribed.server)] == ["crash.new"]


@pytest.mark.parametrize("error, bodies", {
    "invalid JSON": (b"x", b"[]"), "missing state": [{}],
    "invalid field": [{"State": "open"}, {"state": "open", "fixedin": "1"}],
    "invalid state": [{"state": value} for value in ("", "closed", "regressed", "Open", None, 1, [], {}, True)],
    "invalid comment": [{"comment": value} for value in ("", " \n", None, 1, [])],
    # also a condition of another state; if no state is given, the group's own counts
    "invalid fixed_in": [*({"state": "resolved", "fixed_in": value} for value in ("", " ", 1, [], True)),
                         {"fixed_in": "1.0"}, *({"state": state, "fixed_in": "1.0"} for state in ("open", "muted"))],
    "invalid until": [*({"state": "muted", "until": value} for value in (
        "", "soon", "2026-03-20", "2026-03-20T00:00:00", NOW, "2026-03-12T14:29:59Z", 1_800_000_000, True, [])),
        *({"state": state, "until": "2026-03-20T00:00:00Z"} for state in ("open", "resolved"))],
    **{f"invalid {name}": [*({"state": "muted", name: value} for value in (0, -1, 1.0, "1", 1 << 31, True, [], "")),
                           {name: 1}, {"state": "resolved", name: 1}] for name in ("more_crashes", "more_devices")},
}.items())
def test_invalid_decisions_are_refused_and_change_nothing(api, error, bodies):
    add(api.server, **CRASH)
    for body in bodies:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, answer = call(api.server, "PATCH", f"{CRASHES}/{ABORTS}", raw, **ADMIN)
        assert (status, answer["error"]) == (400, error) and answer["detail"], body
    assert not any(stored(api.server, "triage", "group_history").values())


def test_a_decision_needs_the_token_a_known_group_and_the_app_if_two_have_the_group(api, person):
    server = api.server
    server.store.create_app("trial", is_test=True)
    for key in (KEY, server.store.create_app("Shop")):
        add(server, key=key)
    for query, group in (("app=nope", ABORTS), ("app=trial", ABORTS), ("", "0" * 16), ("", "x")):
        assert patch(server, {"state": "open"}, group, query) == (404, {"error": "not found"})
    for token in (None, "Bearer x"):
        assert patch(server, {"state": "open"}, query="app=Shop", Authorization=token)[0] == 401
    assert patch(server, {"state": "resolved"}) == (
        400, {"error": "missing app", "detail": "it is a group of Shop, default"})
    assert not any(stored(server, "triage", "group_history").values())
    assert patch(server, {"state": "resolved"}, query="app=Shop")[1]["state"] == "resolved"
    assert [server.metrics.group(ABORTS, app)["state"] for app in ("Shop", "default")] == ["resolved", "open"]
    page = person.get("/crashes/" + ABORTS)
    assert "Several apps have this crash" in page.text and "Resolve" not in page.text
    assert person.text(f"/crashes/{ABORTS}?app=Shop").count("Reopen") == 1


def test_each_decision_is_in_the_history_and_can_be_changed_in_part(api, clock):
    server, until, none = api.server, "2026-03-20T00:00:00Z", (None,) * 3
    at = parse_time(until)
    add(server, **CRASH)
    for body, state, fixed_in, mute, entries in (  # mute: the columns until, crashes_left, devices_left
            ({"state": "open"}, "open", None, none, []),
            ({"comment": " a\0b "}, "open", None, none, [("commented", "a\ufffdb")]),
            ({"state": "muted", "until": until, "more_crashes": 1}, "muted", None, (at, 1, None), [
                ("muted", f"until {until} or for 1 more crash")]),
            ({"more_devices": 2, "comment": "c"}, "muted", None, (at, 1, 2), [
                ("muted", f"until {until} or for 1 more crash or for 2 more devices"), ("commented", "c")]),
            ({"until": None}, "muted", None, (None, 1, 2), [("muted", "for 1 more crash or for 2 more devices")]),
            ({"state": "resolved", "fixed_in": "1.0"}, "resolved", "1.0", none, [("resolved", "in 1.0")]),
            ({"fixed_in": "1.1"}, "resolved", "1.1", none, [("resolved", "in 1.1")]),
            ({"fixed_in": None}, "resolved", None, none, [("resolved", None)]),
            ({"state": "open"}, "open", None, none, [("opened", None)]),
            ({"state": "muted"}, "muted", None, none, [("muted", None)])):
        clock.move(1)
        before = history_of(server)
        answer = set_triage(server, body)
        assert (answer["state"], answer["fixed_in"], history_of(server)) == (state, fixed_in, before + entries)
        assert sql(server, "select until, crashes_left, devices_left from triage") == [mute]


def test_a_history_keeps_its_latest_entries_also_when_two_groups_become_one(api, monkeypatch):
    monkeypatch.setattr(backfeedr, "MAX_HISTORY", 4)
    add(api.server)
    gone = "0" * 16
    with api.server.store.writing() as db:
        for n, group in enumerate([gone, ABORTS, gone, ABORTS, ABORTS, gone]):
            backfeedr.decide(db, 1, group, {"comment": str(n)}, backfeedr.MINUTE * n)
        backfeedr.rename_group(db, 1, gone, ABORTS)
    assert [detail for _, detail in history_of(api.server)] == ["2", "3", "4", "5"]
    set_triage(api.server, {"comment": "x" * 6000})
    assert [detail for _, detail in history_of(api.server)] == ["3", "4", "5", "x" * 5000]
    assert count(api.server, "group_history") == 4


@pytest.mark.parametrize("of_target, of_group, state", [  # what is decided, the last one first or last; the outcome
    ({"comment": "x"}, {"state": "resolved"}, "resolved"), ({"state": "open"}, {"state": "muted"}, "muted"),
    ({"state": "resolved"}, {"state": "muted"}, "resolved"), ({"state": "resolved"}, {"comment": "x"}, "resolved")])
def test_a_comment_does_not_replace_a_decision_when_two_groups_become_one(api, of_target, of_group, state):
    add(api.server)
    group = "0" * 16
    with api.server.store.writing() as db:
        backfeedr.decide(db, 1, ABORTS, of_target, 1)
        backfeedr.decide(db, 1, group, of_group, 2)
        backfeedr.rename_group(db, 1, group, ABORTS)
        assert db.execute("select group_hash, state from triage").fetchall() == [(ABORTS, state)]
        backfeedr.decide(db, 1, group, {"state": "muted"}, 3)
        backfeedr.decide(db, 1, ABORTS, {"state": "open"}, 4)  # unlike a comment, this is a decision
        backfeedr.rename_group(db, 1, group, ABORTS)
    assert state_of(api.server) == "open"


def test_groups_are_listed_by_state(api, person, clock):
    types = ["open", "resolved", "muted", "again", "fresh"]  # of exceptions, named for what becomes of their groups
    for exception_type in types[:-1]:
        report_now(api, clock, exception_type=exception_type)
    for exception_type, state in (("muted", "muted"), ("resolved", "resolved"), ("again", "resolved")):
        set_triage(api.server, {"state": state}, group_hash(exception_type, []))
    clock.move(8 * A_DAY)
    for exception_type in types[-2:]:
        report_now(api, clock, exception_type=exception_type)
    person.sign_in()
    for state, expected in {"open": ["again", "fresh", "open"], "resolved": ["resolved"], "muted": ["muted"],
                            "regressed": ["again"], "new": ["fresh"], "": types}.items():
        groups = {group["exception_type"]: (group["state"], group["regressed_at"] is not None)
                  for group in api.get(f"{CRASHES}?state={state}", **ADMIN)[1]["groups"]}
        page = person.get(f"/crashes?days=all&state={state}").text
        rows = re.findall(r"<bdi>(\w+)</bdi></a>\s*<b>\s*(\w*)\s*</b>", page)
        assert sorted(groups) == sorted(expected) == sorted(name for name, _ in rows)
    assert groups == {"open": ("open", False), "resolved": ("resolved", False), "muted": ("muted", False),
                      "again": ("open", True), "fresh": ("open", False)}
    assert dict(rows) == {"open": "", "resolved": "resolved", "muted": "muted", "again": "regressed", "fresh": "new"}
    assert api.get(f"{CRASHES}?state=closed", **ADMIN)[0] == 400
    set_triage(api.server, {"state": "muted"}, group_hash("again", []))
    assert api.get(f"{CRASHES}?state=regressed", **ADMIN)[1]["groups"] == []


@pytest.mark.parametrize("builds, crashed_in, expected", [
    ([], "", ""), (["1.2 9", "1.2 47"], "1.2 47", "1.2 (48)"), (["1.2 47", "1.10 3"], "1.2 47", "1.10 (3)"),
    (["1.2"], "1.2", "1.3"), (["1.9"], "1.9", "1.10"), (["2.0 1", "1.9 8"], "2.0 1", "2.0 (2)"),
    (["dev"], "dev", "dev")])
def test_the_next_version_or_build_is_suggested_for_the_fix(api, clock, builds, crashed_in, expected):
    for build in builds:
        report_now(api, clock, build, exception_type="SIGBUS")
    report_now(api, clock, crashed_in)
    assert api.server.metrics.next_build(ABORTS, "default") == expected


def test_invented_builds_and_versions_hide_no_regression(serve, subscribed, clock, monkeypatch):
    serve.unchecked.append(subscribed.server)  # builds beyond the bound are not counted
    monkeypatch.setattr(backfeedr, "MAX_BUILDS_OF_APP", 3)
    for n in range(3):
        report_now(subscribed, clock, f"1.0 {n}", exception_type="other")
    report_now(subscribed, clock, "1.0 1")
    for fixed_in, versions, crashes in (
            (None, 200, {"1.0 9": "resolved", "1.1 10": "open"}),  # 1.1 is new, though its build has no row
            ("1.2", 0, {"1.1.9 11": "resolved", "1.3 12": "open"}),  # 1.3 comes after it, though it counts as (other)
            (None, 0, {"1.4 13": "resolved"})):  # it is not known when 1.4 was first seen
        monkeypatch.setitem(backfeedr.MAX_NEW_NAMES, "app_version", versions)
        set_triage(subscribed.server, {"state": "resolved", "fixed_in": fixed_in})
        for build, state in crashes.items():
            report_now(subscribed, clock, build)
            assert state_of(subscribed.server) == state, build
    assert ("1.3",) in sql(subscribed.server, "select app_version from crashes")


def test_a_crash_that_symbols_move_to_a_resolved_group_may_regress_it(subscribed, clock, monkeypatch):
    monkeypatch.setattr(backfeedr, "SPREAD_BOUNDS", (2, 3))
    upload(subscribed.server)
    report_now(subscribed, clock, "1.0 1", **shop_crash(1008, exception_type="SIGABRT", device_id_hash="d1"))
    set_triage(subscribed.server, {"state": "resolved", "fixed_in": "1.1"}, NAMED)
    report_now(subscribed, clock, "1.0 1", **shop_crash(5008, OTHER_BUILD, occurred_at=NOW, device_id_hash="d2"))
    new = {**shop_crash(5012, OTHER_BUILD), "occurred_at": time_text(clock.seconds), **build_of("1.2 3")}
    assert subscribed.post(CRASHES, new)[0] == 201
    assert state_of(subscribed.server, NAMED) == "resolved", "the symbols are not there yet"
    upload(subscribed.server, NEXT_PART, OTHER_BUILD)
    assert state_of(subscribed.server, NAMED) == "open" and history_of(subscribed.server, NAMED)[-1][0] == "regressed"
    assert facts_of(subscribed.server)[-1][0] == "crash.regressed", "a move is no spread"


def test_a_version_that_is_no_release_hides_neither_verdicts_nor_the_next_version(keeping, clock):
    api = Api(keeping())
    for version, devices, crashed in (("99.0", 1, 1), ("1.0", 100, 4), ("0.9", 1, 0), ("1.1", 100, 30)):
        send_devices(api.server, version, devices, crashed)
        api.server.store.add(KEY_HASH, [parse_event({
            **EVENT, "type": "session_start", "session_id": f"{version} {n}", "app_version": version,
            "device_id_hash": f"{version} {n}", "occurred_at": time_text(clock.seconds)}) for n in range(devices)])
        clock.move(A_DAY)
    assert verdicts(api)["1.1"] == "worse: 70 % of devices crash-free, 96 % before"
    assert api.server.metrics.next_build(ABORTS, "default") == "1.2", "the group has crashed in 1.1"


def test_names_of_session_events_use_up_no_event_names(api, clock, monkeypatch):
    monkeypatch.setitem(backfeedr.MAX_NEW_NAMES, "name", 3)
    for event in [*({"type": "session_start", "session_id": f"s{n}", "name": f"launch {n}"} for n in range(9)),
                  *({"type": "custom", "name": name} for name in "abcd")]:
        add(api.server, **event)
    assert [row[0] for row in sql(api.server, "select name from event_names order by 1")] == ["(other)", "a", "b", "c"]


def state_form(page, state):
    return next(form for form in forms_of(page) if "state" in form.fields and form["state"].value == state)


def test_a_group_is_triaged_on_its_page(api, person, clock):
    report_now(api, clock, "1.2 47")
    path = f"/crashes/{ABORTS}?app=default"

    def decide(form, **values):
        assert send(form, **values).headers["Location"] == path

    form = state_form(person.get(path), "resolved")
    assert form["fixed_in"].value == "1.2 (48)"
    decide(form)
    for expected in ("Resolved in 1.2 (48) Fixed in version Resolve Reopen", "just now resolved in 1.2 (48)"):
        assert expected in person.text(path)
    form = state_form(person.get(path), "resolved")
    assert form["fixed_in"].value == "1.2 (48)", "as decided"
    decide(form, fixed_in="1.2 (49)")
    assert "Resolved in 1.2 (49)" in person.text(path), "changed without reopening it first"
    decide(state_form(person.get(path), "open"))
    decide(state_form(person.get(path), "muted"), until="2026-04-01", more_crashes="7", more_devices="2")
    assert "Muted Fixed in version Resolve Reopen Mute" in person.text(path)
    assert history_of(api.server)[-1] == (
        "muted", "until 2026-04-01T00:00:00Z or for 7 more crashes or for 2 more devices")
    decide(state_form(person.get(path), "resolved"), fixed_in="")
    assert api.server.metrics.group(ABORTS)["fixed_in"] is None
    decide(next(form for form in forms_of(person.get(path)) if "comment" in form.fields), comment=HOSTILE)
    decide(next(form for form in forms_of(person.get(path)) if "comment" in form.fields), comment="8 letters\r\n" * 470)
    assert history_of(api.server)[-1] == ("commented", "8 letters\n" * 469 + "8 letters"), "5,000 with one per line end"
    assert "<script" not in person.get(path).text and "alert(1)" in person.text(path)
    report_now(api, clock, "1.3 50")
    assert "Open - regressed just now" in person.text(path)
    regressed = person.get(path).click("Show", index=0)
    assert "report=" in regressed.request.query_string and "1.3" in regressed, "the crash that did it"
    set_triage(api.server, {"comment": "crash 0123456789abcdef is the same"})
    assert person.get(path).text.count("<bdi>Show</bdi>") == 1
    assert "Versions 1.2 to 1.3" in person.text(path)
    for version in 2 * [f"1.{n}" for n in range(2, 23)] + ["1.23", "1.3"]:
        report_now(api, clock, version)
    assert "Versions 1.2 to 1.23" in person.text(path), "however few of its crashes are in the newest one"
    assert person.get(path).text.count("<summary>Earlier</summary>") == 1, "more than three entries"
    before, form = stored(api.server, "triage", "group_history"), state_form(person.get(path), "muted")
    assert re.search("Invalid until.*Until is in the past[.]", send(form, 400, until="2026-03-01").text, re.S)
    send(form, 403, form_token="0" * 64)
    assert Person(api.server).post(path, 303, state="open").headers["Location"].startswith("/sign-in")
    assert stored(api.server, "triage", "group_history") == before


def test_state_and_history_move_with_the_crashes(api, clock):
    group_of_crash(api, clock, 1008)
    set_triage(api.server, {"state": "resolved", "fixed_in": "1.0", "comment": "old"}, UNNAMED)
    upload(api.server)
    group = api.server.metrics.group(NAMED)
    assert (group["state"], group["fixed_in"]) == ("resolved", "1.0")
    assert [entry["detail"] for entry in group["history"]] == ["in 1.0", "old"]
    assert sql(api.server, "select group_hash from triage") == [(NAMED,)]
    status, headers, answer = call_with_headers(
        api.server, "PATCH", f"{CRASHES}/{UNNAMED}", b'{"state": "open"}', **ADMIN)
    assert (status, answer) == (301, {"error": "moved", "detail": f"to {NAMED}"})
    assert headers["Location"] == f"{CRASHES}/{NAMED}"
    api.server.store.delete_symbols(HELD)
    group_of_crash(api, clock, 1008)
    clock.move(1)
    set_triage(api.server, {"comment": "between"}, UNNAMED)  # it is a group again
    upload(api.server)
    assert [detail for _, detail in history_of(api.server, NAMED)] == ["in 1.0", "old", "between"]
    assert state_of(api.server, NAMED) == "resolved"


# == Store =====================================================================

KEY_HASH = backfeedr.sha256(KEY)
A_DAY = 24 * 3600  # in seconds, as a clock is moved
ENTITIES = ("devices", "device_days", "device_versions", "sessions")  # tables with a row while a report is stored


def add(server, times=1, key=KEY, **fields):
    """Stores reports of this moment without HTTP: events if there is a `type`, else crashes. Returns the receipt."""
    fields.setdefault("occurred_at", time_text(server.store.now / 1000))
    if "type" not in fields:
        fields.setdefault("exception_type", "SIGABRT")
    report = (parse_event if "type" in fields else parse_crash)(fields)
    return server.store.add(backfeedr.sha256(key), [report] * times)


def count(server, table, where="1 = 1"):
    return sql(server, f"select count(*) from {table} where {where}")[0][0]


@pytest.fixture
def keeping(serve):
    """Makes a server that keeps reports for some days. Its sums outlive them, so the two are not compared."""
    def make(days=90):
        serve.unchecked.append(serve(retention_days=days))
        return serve.unchecked[-1]
    return make


@pytest.fixture
def one_day(keeping):
    """A server that keeps reports for a day. `check` compares as much as it can."""
    server = keeping(1)
    yield server
    assert POSTGRES or backfeedr._check_roll_ups(server.store.path)


def prune_after(server, clock, seconds):
    """Lets time pass, then deletes what has expired. Returns how many rows of each kind."""
    clock.move(seconds)
    return server.store.prune()


@pytest.fixture
def later(clock):
    """Stores an event, or other reports, some time later. After their commit, expired reports are deleted."""
    def later(server, seconds, **fields):
        clock.move(seconds)
        return add(server, **(fields if "exception_type" in fields else {"type": "custom", **fields}))
    return later


@sqlite_only
def test_a_transaction_takes_its_lock_at_the_beginning_and_is_synced_at_the_end(api):
    """If it took the lock after a read, a write could fail without waiting for the lock."""
    with api.server.store.writing() as db, closing(sqlite3.connect(str(api.server.store.path), timeout=0)) as other:
        assert (db.pragma("synchronous"), db.pragma("journal_mode"), db.pragma("secure_delete")) == (2, "wal", 1)
        assert db.pragma("journal_size_limit") == 16_000_000, "what a WAL may keep after its peak"
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("begin immediate")


@sqlite_only
def test_a_commit_is_durable_before_its_answer_and_before_anything_expires(serve, monkeypatch):
    server, execute, answered, seen = serve(), backfeedr.Connection.execute, [], []

    def watched(db, statement, *args):
        if statement == "commit" and not db.pragma("query_only"):
            seen.append((len(answered), count(server, "crashes")))
        return execute(db, statement, *args)

    monkeypatch.setattr(backfeedr.Connection, "execute", watched)
    run_together(server.store, [lambda: answered.append(add(server))] * 5)
    assert seen[0] == (0, 0) and [crashes for _, crashes in seen] == [0, 5], "one commit, then the expiry"
    assert len(answered) == count(server, "crashes") == 5


def test_only_the_digest_and_the_prefix_of_a_key_are_stored(api):
    key = api.server.store.create_app("Shop")
    assert [api.post(CRASHES, CRASH, key=key)[0] for _ in range(2)] == [201, 201]
    api.server.close()
    content = content_of(api.server)
    assert not [secret for each in (key, KEY, TOKEN) for secret in (each, each[-32:]) if secret.encode() in content]
    assert hashlib.sha256(key.encode()).digest() in content and key[:16].encode() in content


@pytest.mark.parametrize("how", ["by its prefix", "as a whole", pytest.param("by another process", marks=sqlite_only),
                                 "before a restart with settings that name it"])
def test_a_revoked_key_is_refused_at_once_but_not_the_other_keys_of_its_app(serve, caplog, how):
    api = Api(serve())
    other = api.server.store.create_key("default")
    assert [api.post(CRASHES, CRASH, key=key)[0] for key in (KEY, other)] == [201, 201]
    if how == "by another process":
        with Store(str(api.server.store.path)) as store:
            store.revoke_key(KEY)
    else:
        assert api.server.store.revoke_key(KEY[:16] if how == "by its prefix" else KEY).app == "default"
    if "restart" in how:
        api.server.close()
        api = Api(serve())
        assert "was revoked" in caplog.text
    before = stored(api.server)
    assert [api.post(CRASHES, body) for body in (b"{", CRASH)] == [(401, {"error": "invalid API key"})] * 2
    assert stored(api.server) == before
    assert api.post(CRASHES, CRASH, key=other)[0] == 201
    assert [app.keys for app in api.server.store.apps()] == [1]


def test_no_key_is_revoked_unless_four_characters_or_all_that_is_shown_name_exactly_one_active_key(api, serve):
    store = api.server.store
    revoked, other = store.create_key("default"), store.create_key("default")
    store.revoke_key(revoked)
    for key in ("bf_live_", "", "bf_live_zz", "x", revoked):
        with pytest.raises(StoreError, match="names (no|2) active keys"):
            store.revoke_key(key)
        assert [api.post(CRASHES, CRASH, key=each)[0] for each in (KEY, other, revoked)] == [201, 201, 401]
    store.revoke_key(other[:12])
    for key in ("b", "bf_l", "bf_live", "bf_live_", KEY[:11], KEY[:11] + "..."):
        with pytest.raises(StoreError, match="names no active keys; give its first 12 characters"):
            store.revoke_key(key)
        assert api.post(CRASHES, CRASH)[0] == 201
    assert serve(api_key="my-own").store.revoke_key("my").prefix == "my", "all that is shown of a short key"


def test_an_app_needs_a_valid_unique_name_and_a_reader_cannot_write(api):
    for name in ("", " ", "a ", "\n", "x" * 101, "default"):
        with pytest.raises(StoreError):
            api.server.store.create_app(name)
    with pytest.raises(StorageUnavailable), api.server.store.reading() as db:
        db.execute("delete from apps")
    assert [app.name for app in api.server.store.apps()] == ["default"]


# -- Repetitions

def signed(time=NOW, path=CRASHES, body=VALID, **headers):
    """A signed request; without a body, one for a crash."""
    return path, body, {"X_Backfeedr_Timestamp": time, "X_Backfeedr_Signature": sign(body, time), **headers}


TWICE, UNDER_A, IN_TIME = {"events": [EVENT, EVENT]}, {"Idempotency_Key": "a"}, "2026-03-12T14:30:05Z"
MIXED_BYTES = json.dumps(MIXED).encode()
ZIPPED_TWICE = [(CRASHES, gzip.compress(VALID, mtime=n), {**ZIPPED, **UNDER_A}) for n in (1, 2)]
REPETITIONS = {  # a request, and later ones, each with the seconds before it and its status
    "same body": ((BATCH, TWICE, UNDER_A), (6 * A_DAY, (BATCH, TWICE, UNDER_A), 200)),
    "another body": ((EVENTS, EVENT, UNDER_A), (0, (EVENTS, {**EVENT, "name": "x"}, UNDER_A), 422)),
    "another path": ((EVENTS, EVENT, UNDER_A), (0, (BATCH, {"events": [EVENT]}, UNDER_A), 422)),
    "compressed anew": (ZIPPED_TWICE[0], (0, ZIPPED_TWICE[1], 200)),
    "neither key nor signature": ((CRASHES, CRASH, {}), (0, (CRASHES, CRASH, {}), 201)),
    "signed": (signed(), (299, signed(), 200), (0, signed(Idempotency_Key="added"), 200),
               (0, signed("2026-03-12T14:30:01Z"), 201)),
    "signed retry under its key, replayed without": (
        signed(**UNDER_A), (0, signed(IN_TIME, **UNDER_A), 200), (0, signed(IN_TIME), 200)),
    "of several kinds": ((DIAGNOSTICS, MIXED, UNDER_A), (3600, (DIAGNOSTICS, MIXED, UNDER_A), 200),
                         (0, (DIAGNOSTICS, {**MIXED, "x": 1}, UNDER_A), 422), (0, (CRASHES, CRASH, UNDER_A), 422),
                         (0, (DIAGNOSTICS, MIXED, {**UNDER_A, "X_Backfeedr_Device": "d"}), 200)),
    "of several kinds, signed": (
        signed(NOW, DIAGNOSTICS, MIXED_BYTES), (0, signed(NOW, DIAGNOSTICS, MIXED_BYTES, **UNDER_A), 200),
        (0, (DIAGNOSTICS, gzip.compress(MIXED_BYTES), {**ZIPPED, **UNDER_A}), 200),
        (0, (DIAGNOSTICS, MIXED_BYTES, {}), 201))}


@pytest.mark.parametrize("first, later", [(first, later) for first, *later in REPETITIONS.values()], ids=REPETITIONS)
def test_a_repeated_request_gets_the_same_ids_and_stores_nothing(api, clock, first, later):
    status, ids = api.post(*first[:2], **first[2])
    assert status == 201
    for seconds, (path, body, headers), expected in later:
        before = stored(api.server)
        clock.move(seconds)
        status, answer = api.post(path, body, **headers)
        assert status == expected and (answer == ids) == (expected == 200)
        assert expected != 422 or answer == {"error": "idempotency key reused with a different body"}
        after = stored(api.server)
        before["key_days"] = after["key_days"]  # which counts repeated requests too
        before["new_names"] = after["new_names"]  # which are deleted when their day is over
        if expected != 201 and headers != first[2]:
            before["replays"] = after["replays"] = None  # the request gets a further mark
        assert (after == before) == (expected != 201)


def test_an_idempotency_key_is_free_after_a_refusal_in_another_app_and_after_a_week(api, clock):
    shop = api.server.store.create_app("Shop")
    assert [api.post(EVENTS, *request, Idempotency_Key="a")[0] for request in ((b"{",), (EVENT,), (EVENT, shop))] \
        == [400, 201, 201]
    clock.move(7 * A_DAY + 1)
    api.post(EVENTS, EVENT)
    assert count(api.server, "replays") == 0


# -- Expiry

@sqlite_only
def test_a_failed_expiry_loses_no_report_and_is_tried_again(one_day, later):
    add(one_day)
    sql_run(one_day, "create trigger broken before delete on crashes begin select raise(abort, 'no'); end")
    assert later(one_day, A_DAY + 1)
    assert (count(one_day, "crashes"), count(one_day, "events")) == (1, 1)
    sql_run(one_day, "drop trigger broken")
    later(one_day, 1)
    assert (count(one_day, "crashes"), count(one_day, "events")) == (0, 2)


def test_reports_and_their_counts_expire_at_most_once_a_second(one_day, clock, later, monkeypatch):
    api, left = Api(one_day), []
    add(one_day, device_model="iPhone16,1")
    add(one_day, type="custom")
    later(one_day, 0.5, exception_type="SIGABRT")
    clock.move(A_DAY - 0.25)
    for seconds in (0, 0, 0.75, 0.25):  # two expire; none is left; too early; one expires
        later(one_day, seconds, exception_type="LATE")
        left.append((count(one_day, "crashes", "exception_type <> 'LATE'"), count(one_day, "events")))
    assert left == [(1, 0), (1, 0), (1, 0), (0, 0)]
    assert api.get("/api/v1/metrics/crash-types")[1] == {"labels": ["LATE"], "data": [4]}
    assert api.get("/api/v1/metrics/devices")[1] == {"labels": [], "data": []}
    assert sum(api.get("/api/v1/metrics/daily-crashes")[1]["data"]) == 6
    assert sql(one_day, "select label, crashes from labels") == [("LATE", 4)] * 2  # of the day and of all
    monkeypatch.setattr(Store, "_upkeep_step", lambda *args: pytest.fail("it took the lock although nothing was due"))
    for _ in range(3):
        later(one_day, 5)


def test_expiry_is_limited_in_time_and_keeps_up_with_large_batches(one_day, later, monkeypatch):
    monkeypatch.setattr(backfeedr, "STEP_SECONDS", 0)
    add(one_day, 25)
    for seconds, left in ((A_DAY + 1, 15), (0, 5), (0, 0)):
        later(one_day, seconds)
        assert count(one_day, "crashes") == left
    monkeypatch.setattr(backfeedr, "STEP_SECONDS", 60)  # however slow the machine
    for _ in range(2):
        later(one_day, A_DAY + 1, times=1000)
    assert count(one_day, "events") == 1000


def test_what_expired_while_a_clock_was_fast_stays_noted_when_it_is_set_back(one_day, later):
    fast, *_ = [later(one_day, days * A_DAY, exception_type="SIGABRT").seqs[0] for days in (3, 2, -5, 1.5)]
    assert sql(one_day, "select value from state where name = 'expired_crashes'") == [(fast,)]


def test_a_client_may_send_anything_as_truncated_and_its_crashes_still_regroup_and_expire(
        one_day, later, monkeypatch):
    """Stored crashes have a field of this name if they were cut."""
    monkeypatch.setattr(backfeedr, "STEP_SECONDS", 60)  # however slow the machine
    for value in (5, None, True, {}, ["stack_trace"]):
        add(one_day, truncated=value, stack_trace=[{"uuid": "5a" * 16, "offset": 4660, "in_app": True}])
    with one_day.store.writing() as db:
        one_day.store._symbols_arrived(db, backfeedr.image_uuid("5a" * 16))
    assert one_day.store.prune() == {"moved": 2}, "the five crashes were checked, and then their group was finished"
    later(one_day, A_DAY + 1)
    assert count(one_day, "crashes") == 0


def test_retention_of_zero_keeps_all_reports(serve, clock):
    server = serve(retention_days=0)
    add(server)
    assert prune_after(server, clock, 10_000 * A_DAY) == {"sums": 4}  # one day of group and key, two of new names
    add(server)
    assert count(server, "crashes") == 2


def test_pruning_deletes_expired_rows_and_returns_their_space(one_day, clock):
    def size():
        return one_day.store.size if POSTGRES else sql(one_day, "pragma page_count")[0][0]

    text = os.urandom(1500).hex()  # PostgreSQL cannot compress it
    add(one_day, 1000, type="custom", properties={"text": text})
    add(one_day, 50)
    full = size()
    assert prune_after(one_day, clock, A_DAY + 1) == {"events": 1000, "crashes": 50, "sums": 2}, "new names of a day"
    assert not any(stored(one_day, "events", "crashes", "devices", "labels").values())
    assert count(one_day, "groups") == 1
    if POSTGRES:  # vacuum keeps rows that transactions of other tests may still see
        wait_until(lambda: one_day.store.prune() == {} and size() < full / 2)
    else:
        assert sql(one_day, "pragma freelist_count") == [(0,)]
        assert size() < full / 10 and one_day.store.size < full * 4096 / 10
    assert one_day.store.prune() == {}


@sqlite_only
def test_pruning_ends_even_if_the_file_cannot_shrink(one_day, clock):
    add(one_day, 100, type="custom", name="x" * 400)
    one_day.store.close()
    with closing(sqlite3.connect(str(one_day.store.path), isolation_level=None)) as db:
        for each in "pragma journal_mode = delete", "pragma auto_vacuum = none", "vacuum", "pragma journal_mode = wal":
            db.execute(each)
    clock.move(A_DAY + 1)
    with Store(str(one_day.store.path), clock=clock, retention_days=1) as store:
        assert store.prune() == {"events": 100, "sums": 1}


def test_rows_of_a_device_and_of_a_session_expire_with_its_last_report(one_day, later):
    for n in (1, 2):
        add(one_day, type="session_start", session_id=f"s{n}", device_id_hash=f"d{n}", app_version="1.0")
    add(one_day, device_id_hash="d3")
    later(one_day, A_DAY / 2, session_id="s2", device_id_hash="d2")
    later(one_day, A_DAY / 2 + 1)
    assert {device for table in ENTITIES for device, in sql(one_day, f"select device from {table}")} \
        == {backfeedr.device_key("d2")}
    assert sql(one_day, "select session_id from sessions") == [("s2",)]
    later(one_day, A_DAY / 2)
    assert not any(stored(one_day, *ENTITIES).values())
    assert Api(one_day).get("/api/v1/metrics/active-devices?days=2")[1]["mau"] == [3, 3]  # sums outlive their reports


@pytest.mark.parametrize("steps, tops, last, left", [  # an exception type is that of a crash, "" an event
    ([(0, "A"), (3 * A_DAY, "B")], [1, 1], (5 * A_DAY, "B"), {"B"}),
    ([(1800, "A"), (2 * A_DAY, ""), (-1, "")], [1], (8 * A_DAY, ""), set())], ids=["a week", "a clock set back"])
def test_a_group_is_deleted_when_its_crashes_have_expired_and_its_week_is_over(one_day, later, steps, tops, last, left):
    for seconds, kind in [*steps, last]:
        before = Api(one_day).get("/api/v1/overview")[1]["top_crashes"]
        later(one_day, seconds, **({"exception_type": kind, "exception_reason": f"reason {kind}"} if kind else {}))
    assert [top["count"] for top in before] == tops
    assert {row[2] for row in stored(one_day, "groups")["groups"]} == left
    assert count(one_day, "group_days") == 2 * len(left), "B has crashed on two days"
    assert "reason A" not in str(stored(one_day))


def test_a_release_outlives_its_reports_and_its_sums_never_fall_below_zero(keeping, clock, later):
    server = keeping(10)
    for version in ("1.0", "1.1", "1.1", "1.1"):
        add(server, type="session_start", session_id="s", device_id_hash="d", app_version=version)
        clock.move(6 * A_DAY)
    server.store.forget_device("d")
    assert sql(server, "select app_version from releases order by app_version") == [("1.0",), ("1.1",)]
    assert count(server, "release_sums", "sessions <> 0 or devices <> 0") == 0
    later(server, 9 * A_DAY)
    assert count(server, "release_days") == 0


def test_hours_of_a_release_are_deleted_when_no_verdict_needs_them(keeping, later):
    server = keeping(0)
    for days in (0, 89, 2):
        later(server, days * A_DAY, app_version="1.0", device_id_hash=f"d{days}")
    assert count(server, "release_hours") == 2, "the hour of the first day was deleted on day 91"
    assert sql(server, "select devices from release_sums") == [(3,)]
    assert server.store.forget_device("d0")["events"] == 1, "then the reports say that the release is younger"
    assert POSTGRES or backfeedr._check_roll_ups(server.store.path)


def test_releases_beyond_the_limits_of_a_day_and_of_an_app_count_as_other_which_is_never_the_newest(
        keeping, later, monkeypatch):
    monkeypatch.setitem(backfeedr.MAX_NEW_NAMES, "app_version", 1)
    monkeypatch.setattr(backfeedr, "MAX_NAMES", 5)
    server = keeping(0)
    later(server, 1, type="session_start", app_version="1.0")
    later(server, 1, times=3, type="session_start", app_version="2.0")
    assert set(sql(server, "select app_version, sessions from release_sums")) == {("1.0", 1), ("(other)", 3)}
    assert [release["app_version"] for release in server.metrics.current_releases()] == ["1.0"]
    for n in range(1, 8):
        later(server, A_DAY, exception_type="SIGABRT", app_version=f"1.{n}")
    assert {row["app_version"] for row in Api(server).get("/api/v1/releases", **ADMIN)[1]["releases"]} \
        == {"(other)", *(f"1.{n}" for n in range(4))}
    check_database(server)


def test_types_and_models_beyond_the_limit_of_an_app_count_as_other_until_others_expire(keeping, later, monkeypatch):
    monkeypatch.setattr(backfeedr, "MAX_NAMES", 3)
    server = keeping(10)
    for n in range(5):
        later(server, A_DAY, exception_type=f"E{n}", device_model=f"iPhone{n},1")
    for seconds in (7.5 * A_DAY, 1):  # E0 and E1 expire after the first
        later(server, seconds, exception_type="E9", device_model="iPhone9,1")
    for question, label in (("crash-types", "E{}"), ("devices", "iPhone{},1")):
        answer = Api(server).get(f"/api/v1/metrics/{question}")[1]
        assert dict(zip(answer["labels"], answer["data"])) == {
            "(other)": 3, label.format(2): 1, label.format(9): 1}
    assert count(server, "crashes") == 5
    assert POSTGRES or backfeedr._check_roll_ups(server.store.path)


def test_a_device_of_two_apps_expires_in_each_with_its_last_report_there(keeping, clock, later):
    server = keeping()
    event = {"type": "custom", "device_id_hash": "d", "key": server.store.create_app("Shop")}
    add(server, type="custom", device_id_hash="d")
    for days in (50, 45):
        later(server, days * A_DAY, **event)
    assert server.store.forget_device("d") == {"events": 2, "devices": 1}, "the first one has expired"
    for name in ("active-devices", "retention"):
        figures = Api(server).get(f"/api/v1/metrics/{name}?days=365&app=Shop")[1]
        assert not any(any(figures[column]) for column in figures.keys() - {"labels"}), name
    add(server, **event)
    prune_after(server, clock, 91 * A_DAY)
    assert count(server, "devices") == 0


def test_after_a_clock_was_years_ahead_figures_recover_ids_stay_unique_and_reports_expire(keeping, clock):
    server, years = keeping(1), 3 * 365 * A_DAY
    api = Api(server)
    seqs = [add(server, type=type, session_id="s", device_id_hash="before").seqs[0]
            for type in ("session_start", "session_end")]
    for seconds in (years, 3600 - years, 3600, 3600):
        clock.move(seconds)
        seqs += [*add(server, device_id_hash="d").seqs, *add(server, type="custom").seqs]
    assert len(set(seqs)) == 10 and seqs[4:] == sorted(seqs[4:]) and seqs[1] < seqs[4] and seqs[-1] < seqs[2]
    assert api.get("/api/v1/overview")[1]["top_crashes"][0]["count"] == 3, "without the crash of a future day"
    assert api.get("/api/v1/metrics/active-devices?days=1")[1]["mau"] == [2]
    for days, left in ((0, 4), (3, 1), (88, 1)):
        prune_after(server, clock, days * A_DAY)
        assert (api.get("/api/v1/health")[0], count(server, "crashes"), count(server, "events")) == (200, left, left)


@sqlite_only
def test_check_knows_that_old_sums_were_deleted_while_a_clock_was_ahead(keeping, clock):
    server = keeping(0)
    add(server, type="custom")
    for days in (100, -100):
        prune_after(server, clock, days * A_DAY)
        assert backfeedr._check_roll_ups(server.store.path)


@sqlite_only
def test_check_knows_that_deleted_builds_took_the_place_of_later_ones(keeping, clock, monkeypatch):
    monkeypatch.setattr(backfeedr, "MAX_BUILDS_OF_APP", 3)
    server = keeping(1)
    for build in (None, "1", "2", "3"):
        add(server, app_version="1.0", build_number=build)
        clock.move(A_DAY)
    server.store.prune()
    assert count(server, "builds") == 3 and backfeedr._check_roll_ups(server.store.path)


def test_a_crash_dated_before_1970_counts_once_and_today(api):
    add(api.server, occurred_at="1969-12-31T12:00:00Z")
    for days in ("", "?days=1"):
        assert api.get("/api/v1/metrics/crash-types" + days)[1] == {"labels": ["SIGABRT"], "data": [1]}


# -- Forgotten devices, deleted apps

def fill(server, clock, seed, reports):
    """Stores random reports of two live apps and a test app that share devices, versions and groups. Three requests
    share a commit."""
    chance = random.Random(seed)
    names = [app.name for app in server.store.apps()]
    keys = [backfeedr.sha256(server.store.create_app(name, name == "Beta")) for name in ("Shop", "Beta")
            if name not in names] + [KEY_HASH]

    def submission():
        at = time_text(clock.seconds - chance.choice((-30, 0, 0, 3600, 90_000, 900_000)))
        shared = {"device_id_hash": chance.choice(("d1", "d2", "d3", "")), "occurred_at": at,
                  "app_version": chance.choice(("1.0", "1.1", ""))}
        if chance.random() < 0.4:
            kind = chance.choice("ABC")
            trace = [{"binary": "Shop", "uuid": "5a" * 16, "offset": 4660, "in_app": True}] if kind == "A" else []
            report = parse_crash({**CRASH, "exception_type": kind, "device_model": "m", **shared,
                                  "stack_trace": trace, "exception_reason": str(chance.random())})
        else:
            report = parse_event({"type": chance.choice(("session_start", "session_end", "custom")), **shared,
                                  "session_id": chance.choice(("s1", "s2", "s3", "")) and
                                  shared["device_id_hash"] + chance.choice("abc")})
        return backfeedr.Submission(chance.choice(keys), [report] * chance.choice((1, 1, 2)))

    for _ in range(0, reports, 3):
        clock.move(chance.choice((1, 1800, 120_000)))
        server.store.add_all([submission() for _ in range(3)])


@pytest.mark.parametrize("seed", range(2))
def test_a_forgotten_device_is_in_no_row_and_no_sum_until_it_returns(keeping, clock, seed):
    server = keeping()
    fill(server, clock, seed, 90)
    server.store.prune()  # so that the windows end today, whatever is forgotten
    check_database(server)
    deleted = server.store.forget_device("d2")
    assert deleted["crashes"] and deleted["events"] and deleted["devices"]
    check_database(server, forgotten=True)
    assert not any(count(server, table, "device_id_hash = 'd2'") for table in ("crashes", "events"))
    assert not any(count(server, table, f"device = {backfeedr.device_key('d2')}") for table in ENTITIES)
    assert server.store.forget_device("d2") == {}
    fill(server, clock, seed + 100, 30)
    check_database(server, forgotten=True)
    server.store.retention_days = 5
    fill(server, clock, seed + 200, 50)
    server.store.prune()
    assert count(server, "crashes") > 0 and (POSTGRES or backfeedr._check_roll_ups(server.store.path))


def test_a_device_whose_forgetting_was_interrupted_is_in_no_figure_of_devices_and_its_reports_expire(keeping, clock):
    server = keeping(30)
    add(server, 3, device_id_hash="d", app_version="1.0")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(server.store, "_forget_some", raising(KeyboardInterrupt))
        server.store.forget_device("d")
    assert count(server, "crashes") == 3 and not any(count(server, table) for table in (
        "devices", "device_days", "device_versions", "active_days", "cohorts", "device_hours"))
    prune_after(server, clock, 31 * A_DAY)
    assert count(server, "crashes") == 0 and (POSTGRES or backfeedr._check_roll_ups(server.store.path))


def test_a_report_that_comes_while_its_device_is_forgotten_is_forgotten_too(keeping, monkeypatch):
    server = keeping()
    add(server, 3, device_id_hash="d")
    pages = server.store._pages
    monkeypatch.setattr(server.store, "_pages", lambda *query: add(server, device_id_hash="d") and pages(*query))
    assert server.store.forget_device("d")["crashes"] == 5
    assert not any(count(server, table) for table in ("crashes", "devices", "device_days", "device_hours"))
    check_database(server, forgotten=True)


@sqlite_only
def test_forgetting_warns_if_a_reader_keeps_deleted_data_in_the_wal(keeping, caplog, monkeypatch):
    monkeypatch.setattr(backfeedr, "BUSY_TIMEOUT", 0.01)
    server = keeping()
    add(server, device_id_hash="person")
    with connected(server) as reader:
        reader.execute("begin")
        reader.execute("select * from crashes").fetchall()
        server.store.forget_device("person")
        assert "the WAL keeps deleted data until another program ends its read" in caplog.text
        caplog.clear()
    server.store.prune()
    assert caplog.text == "" and b"person" not in b"".join(
        path.read_bytes() for path in server.store.path.parent.glob("test.db*"))


def test_figures_agree_when_the_first_device_of_a_second_is_forgotten(keeping, clock):
    server = keeping()
    for device in "ab":
        add(server, app_version="1.0", device_id_hash=device)
        clock.move(0.2)
    server.store.forget_device("a")
    check_database(server, forgotten=True)


def test_figures_agree_when_devices_are_forgotten_days_after_the_last_report(keeping, clock):
    server = keeping(0)
    for n in range(6):
        for hours in (0, 30, 160):
            for fields in ({}, {"type": "session_start", "session_id": f"s{hours}"}, {"type": "error", "name": "x"}):
                add(server, device_id_hash=f"d{n}", app_version="1.0", **fields,
                    occurred_at=time_text(clock.seconds - 3600 * hours))
        clock.move(3600)
    for n, days in enumerate((0, 3, 5, 32, 60)):
        clock.move(days * A_DAY)
        assert server.store.forget_device(f"d{n}")["crashes"] == 3
        check_database(server, forgotten=True)


@sqlite_only
def test_figures_agree_when_the_only_report_of_the_day_is_forgotten_during_the_daily_trim(keeping, clock, monkeypatch):
    server = keeping(0)
    monkeypatch.setattr(backfeedr, "STEP_ROWS", 1)
    for kind in "ABC":
        add(server, exception_type=kind)
    clock.move(8 * 86_400)
    add(server, device_id_hash="d1")
    assert count(server, "group_days") == 3, "one row was trimmed, and today has another"
    assert server.store.forget_device("d1")["crashes"] == 1
    check_database(server, forgotten=True)


def test_a_report_dated_too_long_ago_counts_no_device_and_neither_does_its_import(serve, clock):
    server, copy = serve(retention_days=0), serve("copy.db", retention_days=0)
    for seconds in (clock.seconds, clock.seconds - 400 * A_DAY):
        add(server, device_id_hash="d", occurred_at=time_text(seconds))
        clock.move(A_DAY)
    copy.store.import_(list(server.store.export(backfeedr.Crash)))
    assert count(copy, "crashes") == 2 and count(server, "device_days") == count(copy, "device_days") == 1


def test_the_exception_reason_of_a_forgotten_device_is_deleted(one_day, later):
    def crashes_of_the_week():
        week = Api(one_day).get("/api/v1/overview")[1]
        return week["crashes_7d"], [(each["count"], each["exception_reason"]) for each in week["top_crashes"]]

    for device, reason in (("d1", "theirs"), ("d2", "of a person")):
        add(one_day, device_id_hash=device, exception_reason=reason)
    one_day.store.forget_device("d2")
    assert "person" not in str(stored(one_day)) and crashes_of_the_week() == (1, [(1, "theirs")])
    later(one_day, A_DAY + 1)
    add(one_day, device_id_hash="d2", exception_reason="my secret")
    one_day.store.forget_device("d2")
    assert crashes_of_the_week() == (1, [(1, "")]), "the crash still counts in its week"


def test_equal_session_ids_of_two_devices_are_two_sessions_and_events_without_a_device_stay(api, clock):
    for device, lasted in (("d1", 60), ("d2", 3600)):
        for type, ago in (("session_start", lasted), ("session_end", 0)):
            add(api.server, type=type, session_id="1", device_id_hash=device, occurred_at=time_text(clock() - ago))
    assert api.get("/api/v1/overview")[1]["sessions_7d"] == 2
    assert api.get("/api/v1/metrics/sessions?days=1")[1] \
        == {"labels": [NOW[:10]], "sessions": [2], "median_seconds": [60], "mean_seconds": [1830.0]}
    add(api.server, type="session_start", session_id="s")
    add(api.server, type="custom", session_id="s", device_id_hash="d2")
    api.server.store.forget_device("d2")
    assert api.get("/api/v1/metrics/sessions?days=1")[1]["mean_seconds"] == [60.0]
    assert api.get("/api/v1/overview")[1]["sessions_7d"] == 2
    assert len(api.get("/api/v1/events?session_id=s", **ADMIN)[1]["events"]) == 1


def rows_of_apps(server):
    """The number of rows in each table, by the id of their app."""
    found = defaultdict(dict)
    for table, app_id, rows in sql(server, " union all ".join(
            f"select '{table}', app_id, count(*) from {table} group by app_id" for table in ("keys", *REPORT_TABLES))):
        found[app_id][table] = rows
    return found


def test_a_deleted_app_disappears_at_once_and_pruning_deletes_its_rows(server, clock):
    api, store = Api(server), server.store
    fill(server, clock, 7, 60)

    def seen():
        return answers(server), server.metrics.device("d1"), server.metrics.symbols()

    for name, app_id in sql(server, "select name, id from apps"):
        key = store.create_key(name)
        assert api.post(CRASHES, {**CRASH, "device_id_hash": "d1"}, key=key, Idempotency_Key="a")[0] == 201
        before = rows_of_apps(server)
        store.delete_app(name)
        assert api.post(CRASHES, CRASH, key=key) == (401, {"error": "invalid API key"})
        assert name not in [app.name for app in store.apps()] and api.get(f"/api/v1/overview?app={name}")[0] == 404
        with pytest.raises(StoreError):
            store.delete_app(name)
        assert POSTGRES or backfeedr._check_roll_ups(store.path)
        shown = seen() if name == "Shop" else None
        assert store.prune()["remains"]
        assert shown is None or shown == seen()
        assert before.pop(app_id) and rows_of_apps(server) == before
    with pytest.raises(Refusal, match="invalid API key"):
        add(server, type="custom")  # a request that arrives while its app is deleted
    assert not any(stored(server).values()) and count(server, "state", "name like 'deleted%'") == 0


def test_a_device_with_many_reports_is_forgotten_in_few_transactions(keeping, monkeypatch):
    server, steps = keeping(), []
    for device in ("d", "other"):
        add(server, 150, type="custom", device_id_hash=device)
        add(server, 50, device_id_hash=device)
    for seconds in (60, -1):  # however fast the machine
        monkeypatch.setattr(backfeedr, "STEP_SECONDS", seconds)
        monkeypatch.setattr(server.store, "writing_step",
                            lambda: steps.append(seconds) or Store.writing_step(server.store))
        deleted = server.store.forget_device("d" if seconds > 0 else "other")
        assert deleted == {"crashes": 50, "events": 150, "devices": 1}
    assert Counter(steps) == {60: 4, -1: 22}, "one for each table and two for the rest, or each ten"
    assert (count(server, "crashes"), count(server, "events")) == (0, 0)


def test_commits_delete_a_deleted_app_in_bounded_steps_beside_a_new_app_of_its_name(serve, server, clock, monkeypatch):
    store = server.store
    fill(server, clock, 7, 60)
    app_id = dict(sql(store.path, "select name, id from apps"))["Shop"]
    store.delete_app("Shop")
    key, steps = store.create_app("Shop"), [rows_of_apps(server)[app_id]]
    monkeypatch.setattr(backfeedr, "STEP_SECONDS", 0)
    while steps[-1] and len(steps) < 100:
        clock.move(1)
        add(server, key=key)
        steps.append(rows_of_apps(server)[app_id])
        if len(steps) % 5 == 0:
            assert bool(store.forget_device("d2")) == (len(steps) == 5)
            assert POSTGRES or backfeedr._check_roll_ups(store.path)
    sizes = [sum(before.values()) - sum(after.values()) for before, after in zip(steps, steps[1:])]
    assert 20 < len(steps) < 100 and max(sizes[5:]) == backfeedr.EXPIRE_ROWS
    assert Api(server).get("/api/v1/overview?app=Shop")[1]["crashes_7d"] == len(steps) - 1
    serve.unchecked.append(server)
    check_database(store.path, forgotten=True)


# -- Windows and names

WINDOWS = {"new_names": 0, "device_hours": 2, "group_days": 7, "release_days": 7, "event_names": 90,
           "durations": 400}  # in days


@pytest.fixture
def windows_filled(keeping, clock):
    """A server with ten rows from the last ten hours in each table that holds a window."""
    server = keeping()
    clock.move(-10 * 3600)
    for n in range(10):
        clock.move(3600)
        shared = dict(session_id=str(n), device_id_hash=f"d{n}", app_version=f"1.{n}")
        add(server, exception_type=f"T{n}")
        add(server, type="custom", name=f"n{n}", device_id_hash=f"d{n}")
        add(server, type="session_start", occurred_at=time_text(clock.seconds - 60 * n), **shared)
        add(server, type="session_end", **shared)
    assert {table: count(server, table) for table in WINDOWS} == {**dict.fromkeys(WINDOWS, 10), "new_names": 4}
    return server


def test_each_window_is_kept_for_its_days_and_trimmed_on_the_next(windows_filled, clock):
    rows = {**dict.fromkeys(WINDOWS, 10), "new_names": 4}
    for day, moved in (0, 0), (1, 1), (2, 1), (3, 1), (7, 4), (8, 1), (90, 82), (91, 1), (400, 309), (401, 1):
        prune_after(windows_filled, clock, moved * A_DAY)
        if day == 2:
            rows["device_hours"] = 1  # the only ones that are deleted hour by hour
        assert {table: count(windows_filled, table) for table in WINDOWS} \
            == {table: rows[table] if day <= days else 0 for table, days in WINDOWS.items()}, day


def test_windows_are_trimmed_in_bounded_steps_and_rows_not_yet_trimmed_do_not_count(windows_filled, clock, monkeypatch):
    monkeypatch.setattr(backfeedr, "STEP_ROWS", 3)
    clock.move(401 * A_DAY)
    for crashes, left in enumerate((7, 4, 1, 0), 1):
        add(windows_filled, exception_type="T1")
        top, = Api(windows_filled).get("/api/v1/overview")[1]["top_crashes"]
        assert (top["exception_type"], top["count"]) == ("T1", crashes)
        # The new crash adds a day of its group, and two new names where there were three.
        assert {table: count(windows_filled, table) for table in WINDOWS} == {
            **dict.fromkeys(WINDOWS, left), "group_days": left + 1, "new_names": int(crashes == 1)}


def test_reports_with_made_up_times_leave_only_lasting_sums_behind(one_day, clock):
    now = one_day.store.now
    for days in (-3000, 0, 0.9, 2.1, 7, 8, 399, 400, 401, 3000, 6900, 30_000):  # ago
        at = dict(occurred_at=time_text(clock.seconds - days * A_DAY), device_id_hash=f"d{days}", app_version="1.0")
        add(one_day, **at)
        for type in ("session_start", "custom", "session_end"):
            add(one_day, type=type, session_id="s", **at)
    for table, days in {**WINDOWS, "device_days": 400}.items():
        column, newest, kept = ("hour", now // HOUR, 48) if table == "device_hours" else ("day", now // DAY, days)
        assert count(one_day, table) and not count(one_day, table, f"{column} not between {newest - kept} and {newest}")
    prune_after(one_day, clock, 402 * A_DAY)
    assert {table for table in REPORT_TABLES if count(one_day, table)} \
        == {"crash_days", "session_days", "active_days", "cohorts", "release_sums", "release_hours", "builds"}


LABELS = f"select label, crashes from labels where day = {backfeedr.ALL_DAYS} and field = "
NAMES = {  # the limit of new names in a day, the query for names and their reports, and the fields of the nth name
    "group": (500, "select group_hash, sum(crashes) from group_days group by group_hash",
              lambda n: {"stack_trace": [{"symbol": f"f{n}"}]}),
    "type": (200, LABELS + "'exception_type'", lambda n: {"exception_type": f"T{n}"}),
    "model": (200, LABELS + "'device_model'", lambda n: {"device_model": f"m{n}"}),
    "release": (100, "select app_version, crashes from release_sums", lambda n: {"app_version": f"1.{n}"}),
    "event": (200, "select name, sum(events) from event_names group by name",
              lambda n: {"type": "custom", "name": f"n{n}"})}


@pytest.mark.parametrize("limit, query, fields", NAMES.values(), ids=NAMES)
def test_new_names_beyond_the_limit_of_an_app_and_day_count_as_other(server, clock, limit, query, fields):
    shop = server.store.create_app("Shop")

    def send(*numbers, key=KEY):
        """Returns the number of names, and the reports of `(other)` and of the most frequent other name."""
        reports = [{**CRASH, **fields(n)} for n in numbers]
        server.store.add(backfeedr.sha256(key), [
            (parse_event if "type" in each else parse_crash)(each) for each in reports])
        names = Counter(dict(sql(server, query)))
        return len(names), names.pop("(other)", 0), max(names.values())

    assert send(*range(limit - 1)) == (limit - 1, 0, 1)
    assert send(limit - 1) == (limit, 0, 1)
    assert send(limit) == (limit + 1, 1, 1)
    assert send(0, limit, limit + 1) == (limit + 1, 3, 2), "a known name counts by itself"
    assert send("x", key=shop) == (limit + 2, 3, 2), "another app has a limit of its own"
    clock.seconds = parse_time("2026-03-12T23:59:59Z") / 1000
    assert send(limit) == (limit + 2, 4, 2)
    clock.move(1)
    assert send(limit) == (limit + 3, 4, 2), "the next day begins"
    assert count(server, "events", "name = '(other)'") == 0, "the stored reports keep their names"


def test_events_are_counted_by_name_type_and_day_until_they_are_forgotten(keeping, clock):
    server = keeping()
    for type, name in [("custom", "a")] * 3 + [("error", "a"), ("custom", None), ("session_start", "a")]:
        add(server, type=type, name=name, device_id_hash="d")
    clock.move(A_DAY)
    add(server, type="custom", name="a")
    add(server, type="custom", name="a", occurred_at=time_text(clock.seconds - A_DAY), device_id_hash="d")

    def found(**query):
        return [(each["name"], each["type"], each["count"], each["days"])
                for each in backfeedr.Metrics(server.store).event_names(**query)["events"]]
    assert found(days=2) == [("a", "custom", 5, [4, 1]), ("", "custom", 1, [1, 0]), ("a", "error", 1, [1, 0])]
    assert found(days=1) == [("a", "custom", 1, [1])] and len(found()[0][3]) == 30
    server.store.create_app("Shop")
    assert found(app="Shop") == []
    server.store.forget_device("d")
    assert found(days=2) == [("a", "custom", 1, [0, 1])]


def test_a_group_is_named_by_its_exception_type_even_if_that_counts_as_other(keeping, later, monkeypatch):
    monkeypatch.setitem(backfeedr.MAX_NEW_NAMES, "exception_type", 1)
    server, names = keeping(), []
    add(server, exception_type="A")
    for act in (lambda: add(server, exception_type="T"),
                lambda: later(server, A_DAY, exception_type="T", device_id_hash="d"),
                lambda: server.store.forget_device("d")):
        act()
        names += sql(server, "select exception_type from groups where exception_type <> 'A'")
    assert names == [("T",)] * 3
    check_database(server, forgotten=True)


def test_crashes_and_events_share_the_limit_of_releases(api, server):
    add(server, type="custom", app_version="1.0")
    for parse, body in ((parse_crash, CRASH), (parse_event, {**EVENT, "type": "session_start"})):
        server.store.add(KEY_HASH, [parse({**body, "app_version": f"{body.get('type')} {n}"}) for n in range(60)])
    assert count(server, "releases") == 101
    sums = {version: rest for version, *rest in sql(server, "select app_version, crashes, sessions from release_sums")}
    assert list(map(sum, zip(*sums.values()))) == [60, 60] and sums["(other)"] == [0, 21]


@pytest.mark.parametrize("reports, counted_days", [  # days of receipt, of occurrence, and by which the clock was ahead
    ([(10, 13, 0), (15, 15, 0)], [10, 15]), ([(15, 15, 0), (15, 15, 3)], [12, 15]), ([(10, 4, 0)], [4])])
@pytest.mark.parametrize("kind, table", [("crash", "crash_days"), ("event", "event_names")])
def test_each_report_of_an_import_counts_on_its_own_day(server, reports, counted_days, kind, table):
    today = server.store.now // DAY
    stored_reports = []
    for n, (received, occurred, ahead) in enumerate(reports):
        received, occurred = (DAY * (today - 30 + day) for day in (received, occurred))
        report = parse_crash(crash_at(occurred)) if kind == "crash" else parse_event({**EVENT, "occurred_at": occurred})
        stored_reports.append(backfeedr.StoredReport(
            backfeedr.seq_at(received) + n, "default", False, received, ahead * DAY, report))
    server.store.import_(stored_reports)
    assert sql(server, f"select day - {today - 30} from {table} order by day") == [(day,) for day in counted_days]


def test_other_is_shown_like_any_name_with_its_reports_until_they_are_forgotten_or_expire(one_day, later, monkeypatch):
    for field in backfeedr.MAX_NEW_NAMES:
        monkeypatch.setitem(backfeedr.MAX_NEW_NAMES, field, 1)
    api = Api(one_day)

    def add_two_of_a_device():
        for n in (1, 2):
            add(one_day, exception_type=f"B{n}", exception_reason=f"reason {n}", device_model=f"m{n}",
                app_version=f"2.{n}", device_id_hash="d")
        check_database(one_day, forgotten=True)

    def public_answers():
        return {path.rpartition("/")[2]: api.get(path)[1] for path in METRICS}

    for kind, model, version in (("A", "m", "1.0"), ("B0", "m0", "2.0")):
        add(one_day, exception_type=kind, device_model=model, app_version=version)
    before = public_answers()
    add_two_of_a_device()
    check_database(one_day)
    answers = public_answers()
    other = {"group_hash": "(other)", "exception_type": "(other)", "exception_reason": "reason 2", "count": 3}
    assert answers["overview"]["top_crashes"] == [other, {
        "group_hash": group_hash("A", []), "exception_type": "A", "exception_reason": "", "count": 1}]
    assert answers["crash-types"] == {"labels": ["(other)", "A"], "data": [3, 1]}
    assert answers["devices"] == {"labels": ["(other)", "m"], "data": [3, 1]}
    assert [(each["app_version"], each["crashes"], each["crash_free_devices"])
            for each in answers["releases"]["releases"]] == [("(other)", 3, 0.0), ("1.0", 1, None)]
    assert api.get(CRASHES, **ADMIN)[1]["groups"][0] \
        == {**other, "place": "", "is_new": True, "devices": 1, "versions": ["2.0", "2.1", "2.2"],
            "first_seen": NOW, "last_seen": NOW, **UNDECIDED}
    group = api.get("/api/v1/crashes/(other)", **ADMIN)[1]
    assert {name: group[name] for name in other} == other
    assert [(each["exception_type"], each["device_model"]) for each in group["reports"]] \
        == [("B2", "m2"), ("B1", "m1"), ("B0", "m0")]
    person = Person(api.server).signed_in()
    assert "/crashes/(other)" in html.unescape(person.get("/crashes").text)
    assert "reason 1" in person.get("/crashes/(other)").click("Older crash")
    one_day.store.forget_device("d")
    assert public_answers() == before
    check_database(one_day, forgotten=True)
    add_two_of_a_device()
    later(one_day, A_DAY + 1, exception_type="LATE")
    answers = public_answers()
    assert answers["crash-types"] == {"labels": ["LATE"], "data": [1]} and answers["devices"]["labels"] == []
    assert answers["overview"]["top_crashes"][0]["group_hash"] == "(other)"
    later(one_day, 7 * A_DAY)
    assert [row[2] for row in stored(one_day, "groups")["groups"]] == ["LATE"]


def test_two_starts_of_a_session_at_once_count_alike_in_whatever_order_they_are_imported(serve):
    server, other = serve(), serve("other.db")
    for version in ("1.1", "1.0"):
        add(server, type="session_start", session_id="s", device_id_hash="d", app_version=version)
    for stored_report in reversed(list(server.store.export(backfeedr.Event))):
        other.store.import_([stored_report])
    assert stored(server, "release_sums") == stored(other, "release_sums")
    assert stored(other, "release_sums")["release_sums"][0][:3] == (1, "1.0", 1)


def test_releases_without_reports_make_room_for_new_ones_when_there_are_as_many_as_may_be(keeping, clock, monkeypatch):
    monkeypatch.setattr(backfeedr, "MAX_NAMES", 5)
    server = keeping(30)
    old = {"1.0", "1.1", "1.2", "1.3"}
    for version in old:
        add(server, app_version=version, device_id_hash="d")
    prune_after(server, clock, 31 * A_DAY)
    assert count(server, "builds") == count(server, "release_sums") == 4, "there is room"
    for version in ("2.0", "2.1", "2.0"):
        add(server, app_version=version, device_id_hash="d")
    assert {name for name, in sql(server, "select app_version from releases")} == {*old, "2.0", "(other)"}
    prune_after(server, clock, A_DAY)
    add(server, app_version="2.1", device_id_hash="d")
    for table in ("releases", "release_sums", "release_hours"):
        names = {name for name, in sql(server, f"select app_version from {table}")} - {"(other)"}
        assert names == {"2.0", "2.1"}, table
    assert POSTGRES or backfeedr._check_roll_ups(server.store.path)


@sqlite_only
def test_reports_of_the_largest_app_are_deleted_early_if_the_file_is_too_large(keeping, clock, caplog, monkeypatch):
    monkeypatch.setattr(backfeedr, "STEP_SECONDS", 60)  # so that a fast disk does not decide how many go
    server, text = keeping(), {"text": "x" * 3_000}
    shop = server.store.create_app("Shop")
    first = add(server, 2, key=shop, type="custom").seqs
    for _ in range(10):
        add(server, 100, type="custom", properties=text)
        clock.move(1)
    with server.store.reading() as db:
        used = server.store.used_size(db)
    crashes = add(server, 5).seqs
    server.store.max_db_size = used * 2 // 3
    assert server.store.warnings()[0].endswith("of BACKFEEDR_MAX_DB_SIZE; above it, the oldest reports are deleted.")
    for _ in range(20):
        clock.move(1)
        add(server, type="custom", properties=text)
    with server.store.reading() as db:
        assert server.store.used_size(db) <= server.store.max_db_size
    assert 600 < count(server, "events") < 700, "no more are deleted than necessary"
    assert count(server, "events", f"seq <= {first[-1]}") == 2, "those of the small app stay"
    assert count(server, "crashes") == 5 and min(crashes) > sql(server, """
        select value from state where name like 'early%'""")[0][0], "newer reports of any kind stay"
    assert backfeedr._check_roll_ups(server.store.path)
    for app in ("default", "Shop"):
        server.store.delete_app(app)
    server.store.max_db_size = 1
    assert server.store.prune() is not None, "it ends if there is nothing left to delete"
    assert "the oldest reports of default are deleted" in caplog.text


@sqlite_only
def test_a_step_of_early_deletion_reads_no_older_reports_of_other_apps_again(keeping, clock):
    server, work = keeping(), Counter()
    server.store.create_app("Shop")
    add(server, 100)
    with server.store.writing() as db:
        db.execute("""
            with recursive numbers (n) as (select 1 union all select n + 1 from numbers where n < 5000)
            insert into events (seq, app_id, occurred_at, type) select n, 2, 0, 'custom' from numbers""")
        server.store.max_db_size = 1
        server.store._largest_app = backfeedr.LargestApp(1, server.store.now, 1000)
        for step in range(60):
            db.set_progress_handler(partial(work.update, [step]), 100)
            server.store._delete_early(db, 10)
        db.set_progress_handler(None, 0)
    assert max(work.values()) < 200, "each reads 100 reports at most"
    assert count(server, "crashes") == 0 and count(server, "events") == 5000


@sqlite_only
def test_early_deletion_takes_from_the_app_with_the_most_bytes_and_chooses_again_after_a_tenth(keeping, caplog):
    server = keeping()
    shop = server.store.create_app("Shop")
    add(server, 300)
    for key, number, fields, steps, left in (
            (shop, 100, {"type": "custom", "properties": {"text": "x" * 3_000}}, 4, (300, 90)),
            (KEY, 50, {"exception_reason": "x" * 10_000}, 7, (280, 90))):
        server.store.max_db_size = 0
        add(server, number, key=key, **fields)
        server.store.max_db_size = 1
        caplog.clear()
        for _ in range(steps):  # three pass over the older reports of the other app
            assert server.store._choose_largest_app()
            with server.store.writing() as db:
                server.store._delete_early(db, 10)
        assert (count(server, "crashes"), count(server, "events")) == left
        assert len(caplog.messages) == 1, "a warning for each app that loses reports"


@sqlite_only
def test_early_deletion_takes_replays_of_the_app_that_made_them(keeping, clock):
    server, event = keeping(), [parse_event(dict(EVENT))]
    shop = server.store.create_app("Shop")
    add(server, 20, key=shop)
    server.store.add(backfeedr.sha256(shop), event, Idempotency((b"shop",), b"request"))
    for number in range(100):
        clock.move(1)
        server.store.add(KEY_HASH, event, Idempotency((b"key %d" % number, b"signature %d" % number), b"request"))
    server.store.max_db_size = 1
    for left in 90, 80, 70:  # of the requests, each with a row in `events` and two in `replays`
        assert server.store._choose_largest_app()
        with server.store.writing() as db:
            server.store._delete_early(db, 30)
        assert (count(server, "events", "app_id = 1"), count(server, "replays", "app_id = 1")) == (left, 2 * left)
    assert (count(server, "crashes"), count(server, "replays", "app_id = 2")) == (20, 1)


@sqlite_only
def test_early_deletion_repeats_a_step_that_failed_and_notes_what_is_gone_for_imports_and_check(keeping, clock):
    server = keeping()
    shop, seqs = server.store.create_app("Shop"), add(server, 30).seqs
    later = next(server.store.export(backfeedr.Crash))._replace(seq=seqs[-1] + 1)
    clock.move(1)
    add(server, 100, key=shop, type="custom", properties={"text": "x" * 3000})
    server.store.max_db_size, server.store._largest_app = 1, backfeedr.LargestApp(1, server.store.now, 1000)
    with pytest.raises(KeyError), server.store.writing() as db:
        server.store._delete_early(db, 10)
        raise KeyError("as if the disk were full")
    for size, left in ((10, seqs[10:]), (50, [])):
        with server.store.writing() as db:
            server.store._delete_early(db, size)
        assert sql(server, "select seq from crashes order by seq") == [(seq,) for seq in left]
    server.store.max_db_size = 0
    assert server.store.import_([later])["stored"] == 1
    clock.move(-3 * A_DAY)  # it was fast
    add(server, 30, exception_reason="x" * 20_000)
    server.store.max_db_size = 1
    server.store._choose_largest_app()
    with server.store.writing() as db:
        server.store._delete_early(db, 10)
    assert count(server, "crashes") == 21 and backfeedr._check_roll_ups(server.store.path)


@sqlite_only
def test_the_overview_warns_of_a_disk_that_is_nearly_full(api, person, monkeypatch):
    usage = SimpleNamespace(total=100_000_000, used=95_000_000, free=5_000_000)
    assert "nearly full" not in person.get("/") or shutil.disk_usage(".").free < 1e9
    monkeypatch.setattr(backfeedr.shutil, "disk_usage", lambda path: usage)
    assert "The disk is nearly full: 5.0 MB are free." in person.get("/")


def test_each_report_has_its_time_of_receipt_even_after_the_clock_was_set_back(serve, clock, monkeypatch):
    monkeypatch.setattr("secrets.randbits", lambda bits: (1 << bits) - 1)  # the last one
    server, expected = serve(), []
    for seconds in (0, -3600, 3000, 700, -2 * A_DAY, 60):
        clock.move(seconds)
        add(server, 100, type="custom")
        expected.append((server.store.now, 100))
    assert sql(server, "select received_at, count(*) from events group by received_at order by 1") == sorted(expected)


@sqlite_only
@pytest.mark.parametrize("deletes", [True, False])
def test_no_id_is_given_twice_after_any_clock_changes_and_deletions(keeping, clock, monkeypatch, deletes):
    monkeypatch.setattr(backfeedr.secrets, "randbits", lambda bits: 0)  # else equal ids would be unlikely anyway
    server, ids, start = keeping(0), [], clock.seconds
    for days in (0, 10, 0, 1, 9.5, 10, 10, 11, 3, 10, 4000, 12, 4000, 13):
        clock.seconds = start + days * A_DAY
        new = [*add(server, 3, device_id_hash="d").seqs, *add(server, 3, type="custom", device_id_hash="d").seqs]
        assert max(new) < backfeedr.seq_at(server.store.now + 2000 * A_DAY), "a fast clock has no lasting effect"
        ids += new
        if deletes:
            server.store.forget_device("d")
    assert len(ids) == len(set(ids)) == 14 * 6 and count(server, "crashes") == (0 if deletes else 14 * 3)


@pytest.mark.parametrize("at", ["1970-01-01T00:00:10Z", "2300-01-01T00:00:00Z"])
def test_a_host_whose_clock_was_never_set_refuses_everything_and_logs_why(serve, clock, caplog, at):
    api, seconds = Api(serve()), clock.seconds
    clock.seconds = parse_time(at) / 1000
    for _ in range(2):
        assert api.post(CRASHES, CRASH) == api.get("/api/v1/health") == UNAVAILABLE
        clock.move(0.001)
    assert caplog.text.count(f"the clock of this host says {at[:10]}: set it") == 1
    clock.seconds = seconds
    assert api.post(CRASHES, CRASH)[0] == 201


# -- What `check` finds

SUMS = {table: sums.columns for table, sums in backfeedr.SUMS.items()
        if table != "key_days"}  # which is not counted from reports
MADE_UP = {"crash_days": "1, 1, 1", "labels": "1, 'device_model', 1, 'x', 1", "session_days": "1, 1, 1, 0, 0",
           "active_days": "1, 1, 1, 1, 1", "cohorts": "1, 1, 1, 0, 0, 0", "release_sums": "1, 'x', 1, 0, 0, 0, 0"}
TAMPERED = [
    *((table, f"delete from {table}") for table in (*SUMS, "groups", "builds", *ENTITIES)),
    *(("groups", f"update groups set {column} = {column} + 1") for column in ("crashes", "devices")),
    *((table, f"insert into {table} values ({row})") for table, row in MADE_UP.items()),
    *((table, f"update {table} set {column} = {column} {by}") for table, span in backfeedr.SPAN_COLUMNS.items()
      for column, by in zip(span, ("+ 1", "- 1"))),
    *((table, f"update {table} set {column} = {column} {by}") for table, columns in SUMS.items()
      for column in columns for by in ("+ 1", "- 1"))]
DAMAGED = [  # damage that is found although reports have expired
    ("crash_days", "update crash_days set crashes = crashes + 1000"), ("active_days", "update active_days set dau = 0"),
    *((table, f"delete from {table}") for table in (
        "labels", "devices", "active_days", "groups", "builds", "group_days", "event_names", "device_hours"))]


@sqlite_only
@pytest.mark.parametrize("days, damages", [(90, TAMPERED), (5, DAMAGED)], ids=["none has expired", "some have expired"])
def test_check_names_the_table_that_was_tampered_with(keeping, clock, later, monkeypatch, days, damages):
    server = keeping(days)
    fill(server, clock, 9, 30)
    for n in range(8):
        ends = {"session_id": f"s{n}", "device_id_hash": "d", "app_version": "1.0"}
        later(server, A_DAY, type="session_start", **ends)
        add(server, type="session_end", **ends)
        add(server, device_id_hash="d")
        add(server, type="custom", name="tap")
    server.store.prune()
    assert [table for table in dict(damages) if not count(server, table)] == []
    server.close()
    path = server.store.path
    assert backfeedr._check_roll_ups(path)
    content = path.read_bytes()
    for table, damage in damages:
        path.write_bytes(content)
        sql_run(path, damage)
        with pytest.raises(StoreError, match=f"^these tables do not agree with the reports: {table}$"):
            backfeedr._check_roll_ups(path)


# -- What a commit knows from the ones before it

CHANGES_BY_OTHERS = {  # made by another process between two commits
    "a revoked key": lambda other, crash: other.revoke_key(KEY),
    "a deleted app": lambda other, crash: other.delete_app("default"),
    "a forgotten device": lambda other, crash: other.forget_device("d"),
    "a resolved group": lambda other, crash: other.triage(crash["group_hash"], {"state": "resolved"}),
    "a muted group": lambda other, crash: other.triage(crash["group_hash"], {"state": "muted", "more_crashes": 1}),
    "new rows": lambda other, crash: [other.add(KEY_HASH, [parse_crash(dict(CRASH, device_id_hash="e"))])]}


@pytest.mark.parametrize("process", ["another process", "this process"])
@pytest.mark.parametrize("change", CHANGES_BY_OTHERS)
def test_a_commit_sees_what_was_changed_since_the_last_one(serve, server, clock, change, process):
    api, crash = Api(server), {**CRASH, "device_id_hash": "d", "app_version": "1.0", "session_id": "s"}
    server.alerts.add("https://example.com/")
    answer = [api.post(CRASHES, crash)[1] for _ in range(2)][0]
    other = serve() if process == "another process" else server
    CHANGES_BY_OTHERS[change](other.store, answer)
    devices, _ = count(server, "devices"), clock.move(1)
    outcomes = api.post(DIAGNOSTICS, SPAN), api.post(CRASHES, {**crash, "app_version": "1.1"})
    if change in ("a revoked key", "a deleted app"):
        assert outcomes == ((401, {"error": "invalid API key"}),) * 2
    elif change == "a forgotten device":
        assert count(server, "devices") == devices + 1
        check_database(server, forgotten=True)
        serve.unchecked += [server, other]
    facts = {"a deleted app": [], "a forgotten device": ["crash.new"] * 2,  # its group was deleted with it
             "a resolved group": ["crash.new", "crash.regressed"], "a muted group": ["crash.new", "crash.unmuted"]}
    assert [kind for kind, in sql(server, "select kind from facts order by id")] == facts.get(change, ["crash.new"])
    server.store.catch_up()  # deletes what is left of the app


def test_what_a_failed_commit_wrote_is_not_taken_for_known(server, monkeypatch):
    crash = {"device_id_hash": "d", "session_id": "s", "app_version": "1.0", "device_model": "iPhone16,1"}
    add(server, exception_type="SIGTRAP")
    with monkeypatch.context() as patched:
        patched.setattr(backfeedr, "update_triage", raising(server.store.Outage("disk I/O error")))
        with pytest.raises(StorageUnavailable):
            add(server, **crash)
    assert [count(server, table) for table in ("crashes", "groups", *ENTITIES)] == [1, 1, 0, 0, 0, 0]
    for _ in range(2):
        add(server, **crash)
    assert [count(server, table) for table in ("crashes", "groups", *ENTITIES)] == [3, 2, 1, 1, 1, 1]
    assert sql(server, "select field, names from new_names where names > 1 order by field") == [
        ("exception_type", 2), ("group_hash", 2)]


@sqlite_only
def test_commits_know_no_more_than_they_may_and_read_the_rest_again(serve, clock, monkeypatch):
    monkeypatch.setattr(backfeedr.KnownRows, "MAX_ITEMS", 20)
    server = serve()
    fill(server, clock, 5, 40)
    known, sizes = server.store._process.known, []
    for n in range(30):
        add(server, device_id_hash=f"device {n}", app_version="1.0")
        sizes.append(sum(map(len, (known.names, known.group_devices, *known.rows.values()))))
    assert max(sizes) <= 20 and sizes.count(min(sizes)) > 2, "it begins anew"
    server.store.add(KEY_HASH, [parse_crash({**CRASH, "device_id_hash": f"device {n}"}) for n in range(30)])
    assert not known.rows and not known.group_devices, "one commit may know more, but not keep it"


@pytest.mark.parametrize("is_known", [True, False])
def test_a_name_that_left_no_row_is_not_taken_for_known(serve, monkeypatch, is_known):
    monkeypatch.setitem(backfeedr.MAX_NEW_NAMES, "name", 1)
    server = serve()
    server.store.catch_up()  # else the first commit would do it
    for occurred_at in ("2025-03-12T14:00:00Z", NOW):  # the first is too old to be counted by name
        add(server, type="custom", name="tap", occurred_at=occurred_at)
        if not is_known:
            server.store._process.known.clear()
    assert sql(server, "select name, events from event_names") == [("(other)", 1)]


@pytest.mark.parametrize("order", [1, -1])
def test_the_crashes_of_a_commit_come_first_whatever_the_order_of_its_requests(serve, monkeypatch, order):
    monkeypatch.setitem(backfeedr.MAX_NEW_NAMES, "app_version", 1)
    server = serve()
    reports = [parse_crash({**CRASH, "app_version": "1.0"}),
               parse_event({"type": "custom", "occurred_at": NOW, "app_version": "2.0"})]
    server.store.add_all([backfeedr.Submission(KEY_HASH, [report]) for report in reports[::order]])
    assert sql(server, "select app_version from builds order by 1") == [("(other)",), ("1.0",)]


@sqlite_only
def test_builds_are_read_together_and_written_once_a_second_and_only_new_ones_look_how_many_there_are(serve, clock):
    server, queries = serve(), []
    reports = [parse_crash({**CRASH, "app_version": "1.0", "build_number": str(n)}) for n in range(20)]
    server.store.add(KEY_HASH, reports)
    server.store.catch_up()  # clears what is known
    server.store._process.writer.set_trace_callback(queries.append)
    for seconds, expected in ((1, ["select", "insert"]), (0.9, []), (0.1, ["insert"])):
        clock.move(seconds)
        server.store.add(KEY_HASH, reports)
        assert [query.split()[0] for query in queries if " builds" in query and "groups" not in query] == expected
        queries.clear()


# -- Concurrent requests

def run_together(store, calls, meanwhile=lambda: None):
    """Runs calls that share a commit, which begins when all of them wait for it. Returns their results or errors."""
    def outcome(call):
        try:
            return call()
        except BaseException as error:
            return error

    pool, process = ThreadPoolExecutor(len(calls)), store._process
    with process.write_lock:
        outcomes = [pool.submit(outcome, call) for call in calls]
        wait_until(lambda: len(process.waiting) == len(calls))
        meanwhile()
    pool.shutdown(wait=False)  # else a call that hangs would hang the test, too
    return [each.result(30) for each in outcomes]


def wait_until(condition, seconds=20):
    """Waits for other threads or processes, which a `Clock` cannot move."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.005)


def test_many_threads_share_commits_and_lose_nothing(api):
    server, seqs = api.server, []

    def send(n):
        for m in range(10):
            seqs.extend(add(server, device_id_hash=f"d{n % 3}", device_model=f"m{m % 2}").seqs)
            seqs.extend(add(server, 3, session_id=f"s{n}", type="custom").seqs)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(send, range(8)))
    rows = sql(server, "select seq from crashes union all select seq from events")
    assert sorted(seqs) == sorted(seq for seq, in rows) and len(seqs) == 8 * 10 * 4


def test_no_waiting_request_hangs_whatever_error_the_commit_meets(api, monkeypatch):
    for fault in RuntimeError, KeyboardInterrupt, MemoryError, sqlite3.DatabaseError:
        before = stored(api.server)
        with monkeypatch.context() as patched:
            patched.setattr(backfeedr.Commit, "save", raising(fault("on purpose")))
            kinds = Counter(map(type, run_together(api.server.store, [lambda: add(api.server)] * 5)))
        assert kinds[StorageUnavailable] + kinds[fault] == 5 and kinds[fault] <= 1
        assert stored(api.server) == before
        assert api.post(CRASHES, CRASH)[0] == 201


def test_an_interrupted_request_leaves_the_queue_and_the_others_are_stored(api):
    """Ctrl-C does that in an app whose main thread handles requests."""
    process = api.server.store._process
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored in a background job of a shell

    def interrupt():
        wait_until(lambda: len(process.waiting) == 2)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    def wait_to_be_interrupted():
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            add(api.server)
        assert len(process.waiting) == 1

    leader, = run_together(api.server.store, [lambda: add(api.server)], wait_to_be_interrupted)
    assert leader.replayed is add(api.server).replayed is False


@pytest.mark.parametrize("limits, max_wait, others, events", [
    ({"max_waiters": 2}, 30, 2, 1), ({"max_rows": 200}, 30, 2, 100), ({}, 0.1, 1, 1)])
def test_a_request_that_waits_too_long_or_with_too_many_is_not_stored_but_a_large_one_alone_is(
        server, monkeypatch, limits, max_wait, others, events):
    monkeypatch.setattr(backfeedr, "MAX_COMMIT_WAIT", max_wait)
    vars(server.store).update(limits)
    batch = [parse_event(dict(EVENT))] * events

    def one_too_many():
        with pytest.raises(StorageUnavailable) as error:
            server.store.add(KEY_HASH, batch)
        assert error.value.retry_after >= 1

    run_together(server.store, [lambda: server.store.add(KEY_HASH, batch)] * others, one_too_many)
    assert count(server, "events") == others * events
    assert len(server.store.add(KEY_HASH, batch * 3).seqs) == 3 * events


def test_submissions_of_one_call_share_a_commit_and_each_has_its_own_outcome(api):
    Submission, store, crash = backfeedr.Submission, api.server.store, [parse_crash(dict(CRASH))]
    mixed, events = backfeedr.parse_diagnostics(MIXED_BYTES, parse_time(NOW)), [parse_event(dict(EVENT))] * 2
    store.max_waiters = 6
    once, other = Idempotency((b"mark",), b"a"), Idempotency((b"mark",), b"b")
    submissions = [Submission(KEY_HASH, mixed, once), Submission(b"unknown", crash), Submission(KEY_HASH, mixed, once),
                   Submission(KEY_HASH, crash, other), Submission(KEY_HASH, events), Submission(KEY_HASH, crash * 2),
                   Submission(KEY_HASH, crash)]
    store.add_all(submissions)
    assert [str(each.error) if each.error else each.result().replayed for each in submissions] == [
        False, "invalid API key", True, "idempotency key reused with a different body", False, False,
        "storage unavailable"]
    rows = dict(sql(api.server, "select seq, exception_type from crashes union all select seq, name from events"))
    for each in submissions:
        assert [rows[seq] for seq in (each.receipt.seqs if each.receipt else ())] == [
            getattr(report, "exception_type", None) or report.name for report in each.reports if each.receipt]
    assert len(rows) == 4 + 2 + 2 and submissions[0].receipt.seqs == submissions[2].receipt.seqs
    assert commits_of(store) == (1, 6) and store.keys()[0].requests == 4, "as many as have a receipt"
    store.add_all([])


def test_ids_ascend_after_small_clock_changes_and_deletions(keeping, clock):
    server, seqs = keeping(1), []
    store, shop = server.store, server.store.create_app("Shop")
    for seconds, key, deletes in ((0, KEY, None), (0, KEY, lambda: store.forget_device("d")), (-3600, KEY, store.prune),
                                  (-20 * 3600, shop, lambda: store.delete_app("Shop")), (7200, KEY, None),
                                  (2 * A_DAY, KEY, store.prune), (60 - A_DAY, KEY, None)):
        clock.move(seconds)
        for kind in ({}, {"type": "custom"}, {}):
            seqs += add(server, key=key, device_id_hash="d", **kind).seqs
        if deletes:
            deletes()
    server.close()
    seqs += add(keeping(), type="custom").seqs
    assert seqs == sorted(set(seqs)) and len(seqs) == 22


def in_a_child(check):
    """Whether a function returns true in a forked process."""
    child = os.fork()
    if not child:
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitpid(child, 0)[1] == 0


def test_a_store_works_on_both_sides_of_a_fork(api):
    def works():
        return api.post(CRASHES, CRASH)[0] == 201 and api.get("/api/v1/overview")[0] == 200

    assert works() and in_a_child(works) and works()
    assert count(api.server, "crashes") == 3


# -- The file and its schema

@sqlite_only
def test_close_may_be_called_twice_and_folds_the_wal_in(api, server):
    api.post(CRASHES, CRASH)
    server.close()
    server.close()
    assert [file.name for file in server.store.path.parent.iterdir()] == ["test.db"]
    assert api.post(CRASHES, CRASH) == UNAVAILABLE
    assert count(server, "crashes") == 1


def test_a_foreign_file_is_refused_unchanged_and_an_empty_one_becomes_a_database(tmp_path):
    path, broken = tmp_path / "other.db", "cannot open the database .*other.db"
    sql_run(tmp_path / "theirs.db", "create table theirs (a)")
    for content, error in ((b"junk" * 1000, broken), (b"SQLite format 3\x00" + b"junk" * 1000, broken),
                           ((tmp_path / "theirs.db").read_bytes(), "not one of backfeedr's")):
        path.write_bytes(content)
        with pytest.raises(StoreError, match=error):
            Store(str(path))
        assert path.read_bytes() == content
    path.write_bytes(b"")
    with Store(str(path)) as store:
        assert store.apps() == []


def test_a_directory_without_write_permission_is_refused():
    """Runs as an ordinary user in a process of its own, because root may write everywhere."""
    def is_refused():
        if not os.geteuid():
            os.seteuid(65534)
        with pytest.raises(StoreError, match="Permission denied$"):
            Store(folder + "/test.db")
        return True

    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        assert in_a_child(is_refused) and os.listdir(folder) == []


def version_of(path):
    query = "select value from state where name = 'schema_version'" if POSTGRES else "pragma user_version"
    return sql(path, query)[0][0]


def set_version(path, version):
    sql_run(path, f"update state set value = {version} where name = 'schema_version'" if POSTGRES
            else f"pragma user_version = {version}")


@pytest.mark.parametrize("version, problem", [(99, "newer backfeedr"), (3, "schema 3 was never released")])
def test_a_database_of_a_newer_backfeedr_or_an_unreleased_one_is_refused_unchanged(serve, version, problem):
    server = serve("other.db")
    server.close()
    path = server.store.path
    if version == 3:
        skip_without_upgrades()
    set_version(path, version)
    content = content_of(path)
    with pytest.raises(StoreError, match=problem):
        serve("other.db")
    assert content_of(path) == content and version_of(path) == version


@sqlite_only
@pytest.mark.parametrize("is_old, timeout", [(True, 3600), (False, 5)])
def test_a_start_waits_longer_for_a_process_that_may_be_upgrading(serve, monkeypatch, caplog, is_old, timeout):
    server, now = serve(), [0.0]
    server.close()
    if is_old:
        downgrade(server.store.path, 6)
    monkeypatch.setattr(backfeedr, "_prepare_tables", raising(sqlite3.OperationalError("database is locked")))
    monkeypatch.setattr(backfeedr.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(backfeedr.time, "sleep", lambda _: now.append(now.pop() + 4))
    with pytest.raises(StoreError, match="database is locked"):
        serve()
    assert timeout < now[0] <= timeout + 4 and ("waiting for another process" in caplog.text) == is_old
    monkeypatch.setattr(backfeedr, "_prepare_tables", raising(sqlite3.OperationalError("disk I/O error")))
    monkeypatch.setattr(backfeedr, "_needs_upgrade", raising(sqlite3.DatabaseError("another")))
    with pytest.raises(StoreError, match="disk I/O error"):
        serve()


@sqlite_only
def test_an_upgrade_needs_a_sqlite_that_drops_columns_without_damage_and_no_newer_start_meanwhile(
        serve, server, monkeypatch):
    server.close()
    downgrade(server.store.path, 6)
    with monkeypatch.context() as older, pytest.raises(
            StoreError, match="to upgrade .*test.db, SQLite 3.35.5 or later is needed; this Python has"):
        older.setattr(sqlite3, "sqlite_version_info", (3, 35, 4))
        serve()
    assert version_of(server.store.path) == 6
    seen = []
    monkeypatch.setattr(backfeedr, "check_compatible", lambda db, path: seen.append(db.in_transaction))
    serve()
    assert seen == [False, True], "nobody else can write after the second look"


def skip_without_upgrades():
    if not POSTGRES and sqlite3.sqlite_version_info < (3, 35, 5):
        pytest.skip("this SQLite cannot drop columns")


def make_old_database(path, version):
    """Makes a database of version 1 or 2: two apps with three crashes and six events. Tables that a migration drops
    unread are empty."""
    skip_without_upgrades()
    script = zlib.decompress(base64.b85decode("".join(VERSION_2.split()))).decode()
    with connected(path) as db:
        db.executescript(script + "drop table grants;" * (version == 1) + f"""
            pragma application_id = {backfeedr.APPLICATION_ID};
            pragma user_version = {version};""")


DOWNGRADES = {  # what takes a database back to each version from the next one
    6: "drop index crashes_by_group;" + "".join(f"""
        alter table {table} add column received bigint not null default 0;
        update {table} set received = received_at;
        alter table {table} drop column received_at;
        alter table {table} drop column seq_ahead_ms;
        alter table {table} rename column received to received_at;""" for table in ("crashes", "events")) + """
        create index crashes_by_group on crashes (app_id, group_hash, received_at);
        alter table regroupings add column received_at bigint not null default 0;""",
    5: """
        drop index crashes_by_group;
        create index crashes_by_group on crashes (app_id, group_hash, received_at, device_id_hash);
        create index crashes_by_device on crashes (device_id_hash, app_id, group_hash);""",
    4: """
        create table rows as select * from releases;
        drop view releases;
        alter table rows rename to releases;
        drop index crashes_by_device;
        alter table builds drop column last_seen;
        alter table groups drop column crashes;
        alter table groups drop column devices;
        alter table groups drop column came_at;
        create table group_devices (app_id integer);
        create table group_sums (app_id integer);"""}


def downgrade(path, version):
    """Takes a database back to an earlier version."""
    skip_without_upgrades()
    with connected(path) as db:
        for step in range(backfeedr.SCHEMA_VERSION - 1, version - 1, -1):
            (db.run if POSTGRES else db.executescript)(DOWNGRADES[step])
    set_version(path, version)


def columns_of(path):
    return sql(path, """
        select master.type, master.name, columns.name, columns.type, columns.pk
        from sqlite_master as master, pragma_table_xinfo(master.name) as columns
        where master.name not like 'sqlite_%'
        union all select master.type, master.name, columns.name, '', columns.seqno
        from sqlite_master as master, pragma_index_info(master.name) as columns
        order by 1, 2, 5, 3
        """)


@sqlite_only
@pytest.mark.parametrize("version", [1, 2])
def test_an_older_database_gets_the_new_schema_and_keeps_its_reports(tmp_path, keeping, serve, version):
    path = tmp_path / "test.db"
    make_old_database(path, version)
    reports = [rows_by_name(path, f"select * from {table}") for table in ("crashes", "events")]
    server = keeping()
    api = Api(server)
    check_database(path)
    assert count(server, "regroupings"), "because names are made canonical now"
    server.store.prune()
    check_database(path)
    assert not count(server, "regroupings")
    assert version_of(path) == backfeedr.SCHEMA_VERSION and columns_of(path) == columns_of(serve("new.db"))
    assert [[{**row, "other": 0, "clock_ahead_ms": 0, "seq_ahead_ms": 0, "session_id": row.get("session_id"),
               **({"images": None} if "group_hash" in row else {})} for row in rows]
            for rows in reports] == [rows_by_name(path, f"select * from {table}") for table in ("crashes", "events")]
    assert {name: api.get("/api/v1/overview")[1][name] for name in ("sessions_7d", "crashes_7d", "dau")} \
        == {"sessions_7d": 3, "crashes_7d": 3, "dau": 1}
    assert api.get("/api/v1/metrics/retention?days=3&app=default")[1]["day_1"] == [100.0, None, None]
    again = server.store.add(KEY_HASH, [parse_event(dict(EVENT))], Idempotency((b"a",), b"1"))
    assert again.replayed and list(again.seqs) == [row["seq"] for row in reports[1] if row["type"] == "error"]
    for type in ("session_start", "session_end"):  # of a known session and device
        add(server, type=type, session_id="s0", device_id_hash="d1", app_version="1.0")
    assert api.get("/api/v1/overview")[1]["sessions_7d"] == 3
    assert server.store.forget_device("d1") == {"crashes": 3, "events": 6, "devices": 2}
    check_database(path, forgotten=True)


def named_rows(server):
    """All reports, by column, with the names of their apps instead of the ids, which may differ between files."""
    return [[{**row, "app_id": None} for row in rows_by_name(server, f"""
        select apps.name as app, is_test, reports.* from {table} as reports join apps on apps.id = app_id order by seq
        """)] for table in ("crashes", "events")]


@pytest.mark.parametrize("version", [4, 5, 6])  # 3 was never released
def test_a_migration_loses_nothing_on_any_engine(keeping, serve, clock, caplog, version):
    server = keeping()
    fill(server, clock, version, 60)
    for _ in range(2):
        clock.move(60)
        add(server, app_version="1.0", build_number="7")  # schema 4 does not know when it was seen last
    clock.move(-7200)
    add(server, app_version="1.0", device_id_hash="d")
    assert count(server, "crashes", "seq_ahead_ms > 7000000") == 1
    server.store.triage(ABORTS, {"state": "resolved"}, app="default")
    server.close()
    sql_run(server, "insert into regroupings values (1, 'aaaaaaaaaaaaaaaa', 0, 'bbbbbbbbbbbbbbbb')")
    before, reports = stored(server), named_rows(server)
    sql_run(server, "update regroupings set seq = 5")
    downgrade(server.store.path, version)
    keeping().close()
    assert version_of(server.store.path) == backfeedr.SCHEMA_VERSION
    assert f"upgrading the database from schema {version} to {backfeedr.SCHEMA_VERSION}" in caplog.text
    after = stored(server)
    assert named_rows(server) == reports
    for rows in (before, after) if version == 4 else ():  # "" has the times of its version, as schema 4 knew no others
        rows["builds"] = [row for row in rows["builds"] if row[2]]
    for table in after.keys() - {"crashes", "events"}:
        assert sorted(after[table], key=repr) == sorted(before[table], key=repr), table
    check_database(server, forgotten=version == 4)
    if not POSTGRES:
        assert columns_of(server) == columns_of(serve("new.db"))
    else:
        assert sql(server, """
            select tablename, indexname from pg_indexes where schemaname = current_schema() and indexname like '%_by_%'
            order by 1, 2""") == [("crashes", "crashes_by_group"), ("crashes", "crashes_by_seq"),
                                  ("events", "events_by_seq"), ("messages", "messages_by_time"),
                                  ("replays", "replays_by_age")]


@sqlite_only
def test_a_migration_keeps_the_sums_of_reports_that_have_expired(tmp_path, keeping):
    path = tmp_path / "test.db"
    make_old_database(path, 2)
    with connected(path) as db:
        db.executescript("""
            insert into state values ('expired_crashes', 1);
            insert into days (app_id, day, crashes, sessions, ended, session_ms, dau, wau, mau, newcomers, back_1)
                values (0, 20000, 9, 9, 9, 9, 9, 9, 9, 9, 9), (1, 20000, 7, 6, 5, 4, 3, 2, 1, 2, 1);
            insert into durations values (1, 20000, 60, 5);
            insert into releases values (1, '0.9', 5, 6, 8, 7, 6, 5);
            update releases set crashes = 70, first_seen = 4, last_seen = 1 << 50
                where app_id = 1 and app_version = '1.0';""")
    keeping().close()
    for table, row in {
            "crash_days": (1, 20000, 7), "session_days": (1, 20000, 6, 5, 4), "active_days": (1, 20000, 3, 2, 1),
            "cohorts": (1, 20000, 2, 1, 0, 0), "durations": (1, 20000, 60, 5), "builds": (1, "0.9", "", 5, 6),
            "release_sums": (1, "0.9", 8, 0, 7, 6, 5)}.items():
        found = sql(path, f"select * from {table}")
        assert row in found and not [each for each in found if each[0] == 0], table
        key_length = len(backfeedr.PRIMARY_KEYS[table])
        assert not [each for each in found if not any(each[key_length:])], "it has rows of zeros"
    assert sql(path, "select crashes from release_sums where app_id = 1 and app_version = '1.0'") == [(70,)]
    assert sql(path, "select first_seen, last_seen from releases where app_id = 1 and app_version = '1.0'") == [
        (4, 1 << 50)]


@sqlite_only
def test_a_migration_that_fails_leaves_the_database_as_it_was(tmp_path, serve):
    path = tmp_path / "test.db"
    make_old_database(path, 2)
    sql_run(path, "drop table group_hours")
    content = path.read_bytes()
    with pytest.raises(StoreError, match="no such table: group_hours"):
        serve()
    assert path.read_bytes() == content and version_of(path) == 2


VERSION_2 = """
c-p;K$!_B~5WUY==rT|Y2n|xZFefM7eQL~QFhJh~S}Hq2v^6C;$=^>=yJ&532Av>^$)c)Wy;?{*;J`{yN_L7tVR>FC4^gN@X$cqLO3tH%@pt6~-W67rS(FAG
5=cu;Nm+ug!CR@M8U9sqtW;_As{&1l3crM+?6q_YG$p95g+99#9{&0x7-K<`hy|biGb^5zQ=FZ~a5MqdA3+_A<Q&e?+Z5ZXX-(m9&0eO$gYp`c&skL}JbR5o
30(m=ED_*9!vx%bx%Y2X--WYOs9W$A-tve;G0WSk-hiV*K*a_8nu{t1D{SCjAO$WMQds=Tkb8!2;mWi;Kd65aYQL!(y8Y{LP_7X#D;BSWfI|S$b&2gP2rAB(
q!*r5c@uOggzy$XUPf8!m+v{qQUT@)yg+#^(v(vb#i5^8$q5ZKQ&}Oc3E>(A;3ruK@pLK*2N0SPX90_$9h^DfE0ART-A^#YRRTN;&>$;Iz_}Q%s14%~*ToP#
Gk%HEOXuv^6I@jEV2Y9jFMi2c&{@I<XZ7cyKB6>)w=S~&>D{jxQ&3AE?Iti|E+;XWgkZwln4u{-GB0wyqRVv#e=gDBTKc~;+2#_dFX_3Qx;udiD8yTSOM{eA
InQ$7WrV?74tzs2hddUvJuDJ}oWD$)k01$KGxlU@`W*41^v5w9zmjJhL;6w1$D2l<i2~DMsaG`_-8v>Rnq5HTbMNZNpiD<Y_8J{C;h13n(wSFdwkexqE);H@
d6q25<S4WmRmj+8nUu<KYo96_&CB#iiMca5R=me9#-}?irZYx(I&)iEv)&HqHatZEUvpE)XHO(e%akQZ^O;p~sSs@-acxnThihwQJruw;d<)m>9mRKg7P4wp
{<<MgHsmS11{rRS>nKiQ*Q47@ob4qB`FtenT-~F_Pu3MB5JoJ;DhaYQEQZvdFKhO`l?4@Un;XSEp9&I!+u|?wwsF+otJ{FfA;z=KYG;;v!2i*fcZGOYZR{xM
Mo;M9UHl^k_R;BY^nw*imvZA{88A64t|e`^sSmIxJNvCSjXKHgn4KVAbNC!V9PV?q)^&R?oKJ-X_iJ-)9n|^`TNgV#fv@4e_qwxig}A$J#1SjqeViLm@A2Qi
b8}wi=7Uia`ab{~PcZm->27~zaRuA=@F*?tL@(B5%@-^6d&mOS)V3|C8quiZ7}PRI{d3SBbWQ!|Im>TFQ;qf4Bb~;d>XEqQ+oSPhe0S`p<Iy-$^7zfw=_B<X
pWLt3ll!PYJ$*G@o6@6Wo38u)yKPd7nC{UeuB~c_>U8#FJZ1ZY>V|3Ajygr4{r&Hc9}<i%4!v)#<>{_vyQsr;h;0yxnx|^&k?EPuNVP1F0Sk$%+h%Avo~o%w
{G(rpT3c)$YJzhi9Z!vfe7qJ(oWSsii?%fVH^88`FihKa9h2D9vUJb%S~d*bat9c?(ZdMO4mboXqEpK>&nB9CtYO^RT*NVbND*uA>9YZ|Ob3Va0kd?gh1i{b
>T`aJ;D#rGO)ZEFP>zkTXp;qt-Ke*SC$mr5^IYmVbUqjE@{sPbs4rOjxQF}f8MBOva$NCn=VR8OIb+cFY|rTo0_PcDD4S46&u&midE0##Fm%zMs*P;?R1JLY
KqTpFwxmuQ(M*q8u8v(7p`(jpLbq(YpP=#zTCbpv7;2=SFh#>7;|X0_fl6tsLziFC$FEQcaya%M8yYt6cA?g4=zrTliA9z^6_Eyxyr@pmiLQF4jh|KTP0dPU
)?%-Y?g2*k0HZB1DghJ!tuZdT2bX@Mjm&A2DDUrFW8Q@tOKd44kYY?nW}2~_!|j!5bQGw|e62UMXlql=K5)B%3?tI7)<2+o3bQ%>bQsm<Wat-B8h|SD)6|9I
IA7wt=prI9Rn0^4{sR-EcAE
"""


# -- Export and import

def hand_over(server, other, step=40):
    """Imports all reports of a server into another one, in any order. Returns the summed counts."""
    reports = [*server.store.export(backfeedr.Event), *server.store.export(backfeedr.Crash)]
    random.Random(step).shuffle(reports)
    return sum((Counter(other.store.import_(reports[start:start + step])) for start in range(0, len(reports), step)),
               Counter())


def answers(server):
    """The answers to every question, about all apps and about each."""
    api = Api(server)
    return {(path, app): api.get(f"{path}?limit=100{app}", Authorization="Bearer " + TOKEN)
            for path in [*METRICS, CRASHES, EVENTS] for app in ("", "&app=default", "&app=Shop", "&app=Beta")}


@pytest.mark.parametrize("seed, days", [(0, 0), (1, 10)])
def test_imported_reports_make_the_same_rows_sums_and_answers_in_any_order_and_each_once(serve, clock, seed, days):
    server, other, third = (serve(name, retention_days=365) for name in ("test.db", "other.db", "third.db"))
    fill(server, clock, seed, 60)
    clock.move(days * A_DAY)
    counts = hand_over(server, other)
    assert counts == {"stored": sum(map(len, named_rows(server)))}
    assert (named_rows(other), answers(other)) == (named_rows(server), answers(server))
    before = stored(other)
    assert hand_over(server, other, step=77) == {"known": counts["stored"]}, "repeating it changes nothing"
    assert stored(other) == before
    assert [key.app for key in other.store.keys()] == ["default"], "an imported app has no key"
    fill(third, clock, seed + 10, 40)
    theirs = sum(map(len, named_rows(third)))
    some = list(server.store.export(backfeedr.Crash))[:9]
    assert third.store.import_(some * 2) == {"stored": 9, "known": 9, "expired": 0}
    assert hand_over(server, third) == {"stored": counts["stored"] - 9, "known": 9}
    assert hand_over(third, server) == {"stored": theirs, "known": counts["stored"]}
    assert (named_rows(third), answers(third)) == (named_rows(server), answers(server)), "both have all reports"


def test_an_export_keeps_only_a_few_large_reports_in_memory(server):
    large = parse_crash({**CRASH, "context": {str(n): "x" * 1000 for n in range(200)}})
    for _ in range(8):
        server.store.add(KEY_HASH, [large] * 50)

    def exported():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert sum(len(stored.report.extra) > 200_000 for stored in server.store.export(backfeedr.Crash)) == 400
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 40_000  # of 80,000 kB

    assert in_a_child(exported)


def test_reports_of_an_app_that_was_just_deleted_can_be_imported_again(server, clock):
    fill(server, clock, 1, 60)
    clock.move(1)
    reports, before = [*server.store.export(backfeedr.Event), *server.store.export(backfeedr.Crash)], named_rows(server)
    server.store.delete_app("Shop")
    assert server.store.import_(reports)["stored"] == sum(each.app == "Shop" for each in reports) > 0
    server.store.prune()
    assert named_rows(server) == before


def test_expired_reports_are_not_imported_and_never_counted_twice(keeping, serve, clock):
    server, other = keeping(30), serve("other.db", retention_days=60)
    for name in ("old", "new"):
        add(server, type="session_start", session_id=name)
        clock.move(20 * A_DAY)
    exported = list(server.store.export(backfeedr.Event))
    add(server, type="custom")  # after which the old one expires
    for server.store.retention_days in (30, 365):
        assert server.store.import_(exported) == {"stored": 0, "known": 1, "expired": 1}
    assert sql(server, "select sum(sessions) from session_days") == [(2,)]
    clock.move(30 * A_DAY)
    exported[0] = exported[0]._replace(app="Gone")
    assert other.store.import_(exported) == {"stored": 1, "known": 0, "expired": 1}
    assert sql(other, "select session_id from events") == [("new",)]
    assert [app.name for app in other.store.apps()] == ["default"], "none is made for expired reports"


def test_imported_names_count_as_new_on_the_day_of_their_receipt(serve, clock, monkeypatch):
    """So the limit of a day does not apply to the names of many days."""
    monkeypatch.setitem(backfeedr.MAX_NEW_NAMES, "app_version", 5)
    server, other = serve(), serve("other.db")
    for n in range(9):
        for more in ({}, {"type": "custom"}):
            add(server, app_version=f"1.{n}", **more)
        clock.move(12 * 3600)
    hand_over(server, other)
    theirs, ours = (sql(each, "select app_version, first_seen, last_seen from releases order by app_version")
                    for each in (server, other))
    assert theirs == ours and len(ours) == 9


@sqlite_only
def test_an_export_has_the_reports_from_when_it_began_and_reads_them_in_pages(server, clock, monkeypatch):
    fill(server, clock, 1, 60)
    events = named_rows(server)[1]
    monkeypatch.setattr(backfeedr, "STEP_ROWS", 7)
    reports = server.store.export(backfeedr.Event)
    first = next(reports)
    assert [reader.in_transaction for reader in server.store._process.readers] == [False], "no read stays open"
    add(server, type="custom")
    assert [first.seq, *(kept.seq for kept in reports)] == [row["seq"] for row in events]
    since = events[20]["received_at"]
    assert [(kept.seq, kept.app) for kept in server.store.export(backfeedr.Event, "Shop", since)] \
        == [(row["seq"], "Shop") for row in events if row["app"] == "Shop" and row["received_at"] >= since]


# -- Faults

UNAVAILABLE = (503, {"error": "storage unavailable"})


@sqlite_only
def test_a_full_disk_fails_whole_commits_and_health_until_there_is_room(server, monkeypatch):
    def open_with_limit(db, *arguments, **options):
        open_connection(db, *arguments, **options)
        db.execute(f"pragma max_page_count = {max_pages}")

    api, event = Api(server), {**EVENT, "properties": {"text": "x" * 300}}
    add(server)
    before = stored(server)
    max_pages = sql(server, "pragma page_count")[0][0] + 3  # enough for some rows of the commit
    open_connection = backfeedr.Connection.__init__
    monkeypatch.setattr(backfeedr.Connection, "__init__", open_with_limit)
    server.store._process.close_writer()
    calls = [lambda: add(server)] * 3 + [lambda: add(server, 100, **event)] * 2
    for _ in range(2):
        assert {type(outcome) for outcome in run_together(server.store, calls)} == {StorageUnavailable}
        assert stored(server) == before
    assert api.post(BATCH, {"events": [event] * 100}) == UNAVAILABLE
    assert int(api.headers["Retry-After"]) >= 1
    assert api.post(CRASHES, CRASH)[0] == 201, "a small report still finds room"
    assert api.get("/api/v1/health")[0] == api.get("/api/v1/overview")[0] == 200
    for _ in range(2):
        assert api.post(BATCH, {"events": [event] * 100}) == UNAVAILABLE
        server.store.grant("session", 1000)  # a small write finds room, but proves nothing about reports
        assert api.get("/api/v1/health") == UNAVAILABLE
    max_pages = 1_000_000
    assert api.get("/api/v1/health")[0] == 200
    assert {type(outcome) for outcome in run_together(server.store, calls)} == {backfeedr.Receipt}
    assert count(server, "events") == 200


def test_a_report_that_cannot_be_stored_does_not_fail_the_others_in_its_commit(server, monkeypatch):
    connection = type(server.store._connect())
    append = connection.append

    def fail_on_poison(db, table, columns, rows):
        if any("poison" in map(str, row) for row in rows):
            raise OverflowError("a sum is too large")
        append(db, table, columns, rows)

    monkeypatch.setattr(connection, "append", fail_on_poison)
    kinds = ["fine", "poison", "good"]
    outcomes = run_together(server.store, [partial(add, server, exception_type=kind) for kind in kinds])
    assert [type(outcome) for outcome in outcomes] == [backfeedr.Receipt, StorageUnavailable, backfeedr.Receipt]
    assert sorted(sql(server, "select exception_type from crashes")) == [("fine",), ("good",)]


@contextmanager
def locked(path, *_):
    """Another connection holds the lock, until the end or until it rolls back."""
    with closing(sqlite3.connect(str(path), isolation_level=None, check_same_thread=False)) as other:
        other.execute("begin immediate")
        yield other


@contextmanager
def moved_away(path, *_, is_replaced=False):
    away = path.with_suffix(".away")
    path.rename(away)
    if is_replaced:
        shutil.copy(away, path)
    content = is_replaced and path.read_bytes()
    yield
    assert (path.exists() and path.read_bytes()) == content, "the file must not come back empty, nor a copy change"
    away.rename(path)


replaced = partial(moved_away, is_replaced=True)  # by a copy, such as a restored backup


@contextmanager
def broken_sync(path, monkeypatch, caplog):
    def failing(db, statement, *args):
        if statement == "commit" and db.in_transaction and not db.pragma("query_only"):
            raise sqlite3.OperationalError("disk I/O error")
        return execute(db, statement, *args)

    execute = backfeedr.Connection.execute
    with monkeypatch.context() as broken:
        broken.setattr(backfeedr.Connection, "execute", failing)
        yield
    assert "disk I/O error" in caplog.text


@sqlite_only
@pytest.mark.parametrize("fault, health, overview", [
    (locked, 200, 200), (moved_away, 503, None), (replaced, 503, None), (broken_sync, 503, 200)])
def test_a_fault_is_answered_with_503_until_its_cause_is_gone(serve, monkeypatch, caplog, fault, health, overview):
    monkeypatch.setattr(backfeedr, "BUSY_TIMEOUT", 0.1)
    api = Api(serve())
    assert api.post(CRASHES, CRASH)[0] == 201
    before = stored(api.server)
    with fault(api.server.store.path, monkeypatch, caplog):
        assert api.post(CRASHES, CRASH) == UNAVAILABLE
        assert api.get("/api/v1/health") == (UNAVAILABLE if health == 503 else (200, {"status": "ok"}))
        assert overview is None or api.get("/api/v1/overview")[0] == overview
    assert stored(api.server) == before
    assert api.get("/api/v1/health") == (200, {"status": "ok"})
    assert api.post(CRASHES, CRASH)[0] == 201
    assert count(api.server, "crashes") == 2


@sqlite_only
def test_health_fails_while_a_damage_that_a_trial_does_not_meet_refuses_reports_and_the_log_has_it_once(
        api, clock, caplog):
    sql_run(api.server, "alter table key_days rename to other")
    for outcome in (200, 503, 503):  # it lies beside what the first trial writes
        assert api.post(CRASHES, CRASH) == UNAVAILABLE
        assert api.get("/api/v1/health")[0] == outcome
    assert caplog.text.count("cannot write the database: no such table: key_days") == 1
    clock.move(61)
    assert api.post(CRASHES, CRASH) == UNAVAILABLE
    assert caplog.text.count("no such table: key_days") == 2, "a minute later"
    sql_run(api.server, "alter table other rename to key_days")
    assert api.post(CRASHES, CRASH)[0] == 201 and api.get("/api/v1/health")[0] == 200
    assert count(api.server, "crashes") == 1
    sql_run(api.server, "alter table key_days rename to other")
    for seconds, outcome in ((0, 200), (0, 503), (61, 503)):  # stored reports, or a minute, make a trial worth it again
        assert api.post(CRASHES, CRASH) == UNAVAILABLE
        assert api.get("/api/v1/health")[0] == outcome
        clock.move(seconds)
    assert api.get("/api/v1/health")[0] == 200
    sql_run(api.server, "alter table other rename to key_days")


def test_a_commit_without_enough_memory_is_answered_with_503_and_logged_in_one_line(api, monkeypatch, caplog):
    with monkeypatch.context() as short:
        short.setattr(backfeedr.Commit, "save", lambda commit: bytearray(sys.maxsize))
        assert api.post(CRASHES, CRASH) == UNAVAILABLE
    assert [record.getMessage() for record in caplog.records] == ["cannot write the database: MemoryError"]
    assert api.post(CRASHES, CRASH)[0] == 201 and count(api.server, "crashes") == 1


def test_a_start_is_refused_if_too_few_files_may_be_open_for_its_threads(monkeypatch):
    changed = []
    monkeypatch.setattr("resource.setrlimit", lambda *limit: changed.append(limit[1]))
    for hard, connections in ((1 << 20, 1000), (1000, 421), (178, 10), (177, None)):
        monkeypatch.setattr("resource.getrlimit", lambda _, hard=hard: (64, hard))
        if connections:
            assert backfeedr._connection_limit(36) == connections
        else:
            with pytest.raises(OSError, match="only 177 open files are allowed .*: 178 are needed"):
                backfeedr._connection_limit(36)
    assert changed == [(4096, 1 << 20), (1000, 1000), (178, 178), (177, 177)]


@sqlite_only
@pytest.mark.parametrize("posts, is_read", [(0, False), (1, False), (2, True)])
def test_a_file_that_replaces_that_of_a_running_server_is_not_damaged_by_its_wal(serve, command, posts, is_read):
    server, copy = serve(), Path("copy.db")
    add(server, 20)
    backfeedr.backup(server.store, copy)
    add(server, 20)
    path, away = server.store.path, Path("away.db")
    with closing(sqlite3.connect(str(path), isolation_level=None)) as other:
        if is_read:
            other.execute("begin")
            other.execute("select count(*) from crashes").fetchone()
        path.rename(away)
        copy.rename(path)
        for _ in range(posts):
            assert Api(server).post(CRASHES, CRASH) == UNAVAILABLE
            if is_read and other.in_transaction:
                other.execute("commit")
    if posts:  # another server has opened the new file: its WAL has the same name
        settings = dataclasses.replace(server.settings, db_path=str(path))
        with closing(Backfeedr(settings, clock=server.store._clock)) as new:
            add(new, 10)
            assert Api(server).post(CRASHES, CRASH) == UNAVAILABLE
            add(new, 10)
            server.close()
    else:
        server.close()
    for each, crashes in ((path, 40 if posts else 20), (away, 40)):
        assert "all good" in command("check", "--db", str(each))[1]
        with closing(sqlite3.connect(str(each))) as db:
            assert db.execute("select count(*) from crashes").fetchone() == (crashes,)


@sqlite_only
def test_a_lock_that_is_released_in_time_loses_no_report(api):
    with locked(api.server.store.path) as other:
        release = threading.Timer(0.1, other.execute, ["rollback"])
        release.start()
        assert api.post(CRASHES, CRASH)[0] == 201
        release.join()


# == Alerts ====================================================================

class Receiver(http.server.ThreadingHTTPServer):
    """A receiver of alerts on a free port. It keeps its requests, and answers as it is told."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), ReceiverHandler)
        self.requests, self.status, self.headers, self.on_request = [], 204, {}, lambda: None
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # a sender that was killed

    @property
    def ids(self):
        return [request.headers["webhook-id"] for request in self.requests]

    @property
    def bodies(self):
        return [json.loads(request.body) for request in self.requests]

    def facts(self, field):
        """This field of the facts, a list for each message."""
        return [[fact.get(field) for fact in body["data"]["facts"]] for body in self.bodies]


class ReceiverHandler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        self.server.requests.append(SimpleNamespace(
            path=self.path, headers=self.headers, body=body, connection=self.connection))
        self.server.on_request()
        self.send_response(self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *arguments):
        pass


@pytest.fixture
def receivers():
    with Receiver() as one, Receiver() as two, Receiver() as three:
        yield one, two, three
        for receiver in (one, two, three):
            receiver.shutdown()


@pytest.fixture
def receiver(receivers):
    return receivers[0]


@pytest.fixture
def alerting(server, clock, receiver):
    """A server with a channel to `receiver`."""
    server.channel, _ = server.alerts.add(receiver.url + "/hook")
    return server


def note(server, kind="crash.new", app="default", group="0123456789abcdef", times=1, **detail):
    """Notes a fact, as a commit does, or `times` facts of different groups."""
    with server.store.writing() as db:
        (app_id,), = db.execute("select id from apps where name = ?", (app,))
        for number in range(times):
            backfeedr.note_fact(db, kind, app_id, server.store.now, f"{number:016x}" if times > 1 else group, **{
                "exception_type": "SIGABRT", "place": "Cart.pay()", "app_version": "1.3.0", **detail})


def deliver_later(server, clock, seconds=60):
    clock.move(seconds)
    return dict(server.deliver())


def channel_values(server, *names):
    """These values of the only channel."""
    channel, = server.alerts.channels()
    return tuple(channel[name] for name in names)


ONE_SENT, ONE_FAILED, NONE_DUE = {"sent": 1, "failed": 0}, {"sent": 0, "failed": 1}, {"sent": 0, "failed": 0}


def test_a_webhook_is_signed_and_shaped_as_standard_webhooks_says(serve, clock, receiver):
    webhooks = pytest.importorskip("standardwebhooks")
    clock.seconds = time.time()  # which the package looks at
    server = serve(public_url="https://crashes.example.com/x/")
    _, secret = server.alerts.add(receiver.url + "/hook?a=b")
    assert re.fullmatch("whsec_[A-Za-z0-9+/]{43}=", secret)
    note(server, build_number="48", crashes=3, devices=1, exception_reason="secret")
    noted_at = backfeedr.iso_time(server.store.now)
    assert deliver_later(server, clock) == ONE_SENT
    request, = receiver.requests
    body = webhooks.Webhook(secret).verify(request.body, dict(request.headers))
    assert (request.path, request.headers["Content-Type"]) == ("/hook?a=b", "application/json")
    url = "https://crashes.example.com/x/crashes/0123456789abcdef?app=default"
    assert body == {"type": "crash.new", "timestamp": backfeedr.iso_time(server.store.now), "data": {
        "title": "backfeedr: 1 new", "more": 0, "url": url, "facts": [{
            "type": "crash.new", "at": noted_at, "app": "default", "group_hash": "0123456789abcdef",
            "exception_type": "SIGABRT", "place": "Cart.pay()", "app_version": "1.3.0", "build_number": "48",
            "crashes": 3, "devices": 1, "url": url,
            "text": "New: SIGABRT in Cart.pay() (default 1.3.0 (48), 3 crashes, 1 device)"}]}}
    for wrong in (secret[:-4] + "AAA=", server.alerts.add(receiver.url)[1]):
        with pytest.raises(webhooks.WebhookVerificationError):
            webhooks.Webhook(wrong).verify(request.body, dict(request.headers))


def test_each_kind_of_fact_is_described_in_a_line(serve, clock, receiver):
    server = serve(public_url="https://example.com")
    server.alerts.add(receiver.url, kinds=[kind for kind in backfeedr.FACT_KINDS if kind != "digest"])
    facts = [
        ("crash.new", {}, "New: SIGABRT in Cart.pay() (default 1.3.0)"),
        ("crash.new", {"place": "", "app_version": None}, "New: SIGABRT (default)"),
        ("crash.new", {"exception_type": "A\n" * 999}, "New: " + "A " * 99 + "A  (default 1.3.0)"),
        ("crash.regressed", {"fixed_in": "1.2.9"}, "Regressed: SIGABRT in Cart.pay() (default 1.3.0, fixed in 1.2.9)"),
        ("crash.unmuted", {"crashes": 1}, "Unmuted: SIGABRT in Cart.pay() (default 1.3.0, 1 crash)"),
        ("crash.spread", {"devices": 1000}, "Spread: SIGABRT in Cart.pay() (default 1.3.0, 1,000 devices)"),
        ("release.worse", {"before": "1.2.0", "text": "worse: 88 % of devices crash-free, 96 % before"},
         "default 1.3.0 is worse: 88 % of devices crash-free, 96 % before")]
    for kind, detail, _ in facts:
        note(server, kind, group="ab" * 8 if "crash" in kind else None, **detail)
    assert deliver_later(server, clock) == ONE_SENT and receiver.facts("text") == [[text for *_, text in facts]]
    assert receiver.bodies[0]["data"]["title"] == "backfeedr: 3 new, 1 regressed, 1 unmuted, 1 spread, 1 worse"
    assert receiver.facts("url")[0][-2:] == [
        f"https://example.com/{page}?app=default" for page in ("crashes/" + "ab" * 8, "releases")]


def test_slack_and_ntfy_get_text_without_markup_from_reports(serve, clock, receivers):
    slack, ntfy, protected = receivers
    server = serve(public_url="https://crashes.example.com")
    for url in (f"slack+{slack.url}/services/T0/B0/secret", f"ntfy+{ntfy.url}/base/my-topic",
                protected.url.replace("http://", "ntfy+http://:tk_a%3Ab@") + "/t"):
        assert server.alerts.add(url)[1] == ""
    note(server, place="<!channel> @here & co")
    note(server, "crash.regressed")
    assert deliver_later(server, clock) == {"sent": 3, "failed": 0}
    link = "https://crashes.example.com/crashes/0123456789abcdef?app=default"
    assert (slack.requests[0].path, slack.bodies) == ("/services/T0/B0/secret", [{"text": "\n".join([
        "backfeedr: 1 new, 1 regressed",
        f"New: SIGABRT in &lt;!channel&gt; @\u200bhere &amp; co (default 1.3.0) {link}",
        f"Regressed: SIGABRT in Cart.pay() (default 1.3.0) {link}"])}])
    assert (ntfy.requests[0].path, ntfy.bodies) == ("/base/", [{
        "topic": "my-topic", "title": "backfeedr: 1 new, 1 regressed",
        "click": "https://crashes.example.com/crashes", "message": "\n".join([
            "New: SIGABRT in <!channel> @here & co (default 1.3.0)",
            "Regressed: SIGABRT in Cart.pay() (default 1.3.0)"])}])
    assert protected.requests[0].headers["Authorization"] == "Basic " + base64.b64encode(b":tk_a:b").decode()


@pytest.mark.parametrize("text, shown", [
    ("<" * 300, "&lt;" * 300), ("&" * 700, "&amp;" * 300), ("@" * 900, "@\u200b" * 300),
    ("[x](https://e)", "[x]\u200b(https://e)"), ("![x](https://e)" * 9, "![x]\u200b(https://e)" * 9),
    ("\u20ac" * 500, "\u20ac" * 300), ("\U0001f600" * 900, "\U0001f600" * 300)])
@pytest.mark.parametrize("facts", [1, 10])
def test_a_chat_message_has_no_markup_from_reports_and_counts_the_facts_that_do_not_fit(
        monkeypatch, text, shown, facts):
    requests = []
    monkeypatch.setattr(backfeedr, "post", lambda *request: requests.append(request))
    body = {"data": {"title": "2 new", "facts": [{"text": text, "url": "https://c/1"}] * facts, "more": 2}}
    backfeedr.CHANNELS["slack+https"]({"url": "slack+https://e.com/1", "body": json.dumps(body)}, 0)
    (_, request, _), = requests
    sent = json.loads(request)["text"]
    lines = sent.splitlines()
    assert len(sent.encode()) < 2000 and (lines[0], lines[1][:len(shown)]) == ("2 new", shown)
    assert lines[1].endswith(" https://c/1") and not re.search(r"[<>]|\]\(|@(?!\u200b)|&(?!lt;|amp;)", sent)
    assert lines[-1] == f"and {facts + 2 - sum(line.startswith(shown) for line in lines)} more"


@pytest.mark.parametrize("size, lines", [(11, ["\u20ac12", "and 2 more"]), (12, ["\u20ac12"] * 2 + ["and 1 more"])])
def test_a_chat_message_is_filled_to_the_last_byte(monkeypatch, size, lines):
    monkeypatch.setattr(backfeedr, "CHAT_BYTES", size)
    body = {"data": {"title": "3 new", "facts": [{"text": "\u20ac12"}] * 3, "more": 0}}
    assert backfeedr.message_lines({"body": json.dumps(body)}, False, {}) == ["3 new", *lines]


SCHEDULE = (5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400)
# The facts of each message. Then facts, seconds until the delivery, the answer of the receiver, and how many messages
# are sent and fail. For None, messages are only queued; 204 is an answer to all facts but "r", which get a 422.
DELIVERIES = {
    "the facts of a minute share a message": (["A B C", "D", "E"], [
        ("A", 0, 204, 0, 0), ("B", 30, 204, 0, 0), ("C", 29, 204, 0, 0), ("", 1, 204, 1, 0), ("D", 59, 204, 0, 0),
        ("", 1, 204, 1, 0), ("E", -3600, 204, 1, 0)]),  # at last, the clock was set back
    "a channel gets 3 messages an hour, and further facts in a later one": (["A", "B", "C", "D E"], [
        *((fact, 60, 204, 1, 0) for fact in "ABC"), *((fact, 60, 204, 0, 0) for fact in "DE"),
        ("", 3359, 204, 0, 0), ("", 1, 204, 1, 0)]),
    "a message is tried ten times by the schedule": (["A", "B"], [
        ("A", 60, 500, 0, 1),
        *(step for pause in SCHEDULE for step in (("", pause - 1, 500, 0, 0), ("", 1, 500, 0, 1))),
        ("", 864_000, 200, 0, 0), ("B", 60, 204, 1, 0)]),
    "a try waits for the time that Retry-After asks for": (["A", "B"], [
        ("A", 60, "429 7200", 0, 1), ("", 7199, 204, 0, 0), ("", 1, 204, 1, 0),
        ("B", 60, "429 1", 0, 1), ("", 4, 204, 0, 0), ("", 1, 204, 1, 0)]),
    "a receiver that was down for a day gets all messages": (["A", "B", "C"], [
        *((fact, 6 * 3600, 503, 0, 1) for fact in "ABC"), ("", 24 * 3600, 200, 3, 0), ("", 48 * 3600, 200, 0, 0)]),
    **{"what waits for hours is sent once the receiver takes another message" + even: (["A", "B"], [
        ("A", 60, 500, 0, 1), *(("", pause, 500, 0, 1) for pause in SCHEDULE[:4]), ("B", seconds, 204, 1, 0),
        ("", 0, 204, 1, 0)]) for even, seconds in (("", 60), (" even if the clock was fast", -86_400))},
    "but a try that Retry-After put off is not sent early": (["A", "B"], [
        ("A", 60, "429 7200", 0, 1), ("B", 60, 204, 1, 0), ("", 7139, 204, 0, 0), ("", 1, 204, 1, 0)]),
    "a channel that is down queues an hour's messages": (["A", "B", "C", "D E F"], [
        *((fact, 2 * 3600, 500, 0, 1) for fact in "ABCDEF"), ("", 86_400, 204, 3, 0), ("", 60, 204, 1, 0)]),
    "a channel that refuses messages gets more": (list("ABCDEF"), [
        *((fact, 2 * 3600, 400, 0, failed) for fact, failed in zip("ABCDEF", (1, 2, 3, 4, 5, 5))),
        ("", 86_400, 204, 6, 0), ("", 60, 204, 0, 0)]),
    "a message that is refused delays no other, and keeps its own schedule": (list("ArB" + 12 * "C"), [
        *((fact, 60, None, 0, 0) for fact in "ArB"), ("", 0, 204, 2, 1),
        *(("C", 6 * 3600, 204, 1, failed) for failed in (1, 1, 1, 1, 1, 0, 1, 0, 0, 1, 0, 0)),
        ("", 86_400, 200, 1, 0), ("", 86_400, 200, 0, 0)]),
    **{f"{status} delays {'the channel' if failed == 1 else 'no other message'}": (list("ABC"), [
        *((fact, 60, None, 0, 0) for fact in "ABC"), ("", 0, status, 0, failed), ("", 5, 200, 3, 0)])
        for status, failed in {500: 1, 503: 1, 429: 1, 408: 1, 301: 1, 400: 3, 401: 3, 404: 3, 413: 3}.items()}}


@pytest.mark.parametrize("messages, steps", DELIVERIES.values(), ids=DELIVERIES)
def test_messages_are_sent_as_the_limits_and_the_schedule_say(alerting, clock, receiver, monkeypatch, messages, steps):
    assert backfeedr.MAX_HOURLY_MESSAGES == 30
    monkeypatch.setattr(backfeedr, "MAX_HOURLY_MESSAGES", 3)

    def respond():
        is_refused = answer == 204 and receiver.facts("exception_type")[-1] == ["r"]
        receiver.status = 422 if is_refused else int(status)

    receiver.on_request = respond
    for facts, seconds, answer, sent, failed in steps:
        for fact in facts:
            note(alerting, exception_type=fact)
        if answer is None:
            clock.move(seconds)
            alerting.alerts._queue_messages()
            continue
        status, *retry_after = str(answer).split()
        receiver.headers = dict(zip(["Retry-After"], retry_after))
        error, sent_at = channel_values(alerting, "error", "sent_at")
        with monkeypatch.context() as patched:
            if not sent + failed:  # then it takes no write lock
                patched.setattr(alerting.store, "writing", None)
            assert deliver_later(alerting, clock, seconds) == {"sent": sent, "failed": failed}
        assert channel_values(alerting, "error", "sent_at") == (
            None if sent else f"it answered {status}" if failed else error, alerting.store.now if sent else sent_at)
    tries = dict(zip(receiver.ids, map(" ".join, receiver.facts("exception_type"))))
    assert list(tries.values()) == messages, "each try has the id of the first"
    assert stored(alerting, "facts") == {"facts": []} and channel_values(alerting, "waiting", "ended_at") == (0, None)


def test_a_message_that_fails_while_others_arrive_is_tried_for_three_days_like_any_other(alerting, clock, receiver):
    def respond():
        is_bad = receiver.facts("exception_type")[-1] == ["bad"]
        receiver.status = 500 if is_bad else 204
        tried.extend([clock.seconds] * is_bad)

    tried, receiver.on_request = [], respond
    note(alerting, exception_type="bad")
    for _ in range(50):
        deliver_later(alerting, clock, 2 * 3600)
        note(alerting)
    assert len(SCHEDULE) < len(tried) < len(SCHEDULE) + 6
    assert sum(SCHEDULE) <= tried[-1] - tried[0] < sum(SCHEDULE) + SCHEDULE[-1]
    assert channel_values(alerting, "waiting") == (0,)


@pytest.mark.parametrize("value, seconds", [
    ("7200", 7200), ("0", 0), ("-5", 0), ("soon", 0), ("", 0), ("9" * 50, 0), ("999999999", 86400),
    ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("an hour", 0), ("\xe4", 0)])
def test_retry_after_is_honoured_up_to_a_day(value, seconds):
    assert backfeedr._retry_after_ms(value) == 1000 * seconds
    at = datetime.fromtimestamp(time.time() + 3600, timezone.utc)
    assert 3_590_000 <= backfeedr._retry_after_ms(at.strftime("%a, %d %b %Y %H:%M:%S GMT")) <= 3_600_000


def test_a_flood_of_facts_makes_one_message_with_a_count_and_hides_no_fact_of_another_app(alerting, clock, receiver):
    alerting.store.create_app("Shop")
    note(alerting, times=250)
    note(alerting, "crash.regressed", app="Shop")
    note(alerting, times=250)
    alerting.alerts.add(f"slack+{receiver.url}")
    assert deliver_later(alerting, clock) == ONE_SENT, "the second channel is younger"
    assert deliver_later(alerting, clock, 3600) == NONE_DUE
    assert receiver.facts("app") == [["default"] * 9 + ["Shop"]]
    assert receiver.facts("group_hash")[0][:9] == [f"{number:016x}" for number in range(9)]
    data = receiver.bodies[0]["data"]
    assert (data["title"], data["more"], data.get("url")) == ("backfeedr: 500 new, 1 regressed", 491, None)
    assert len(receiver.requests[0].body) < 4000 and stored(alerting, "facts") == {"facts": []}


def test_a_channel_that_answers_410_ends_until_a_test_succeeds_and_the_page_says_so(alerting, clock, receiver):
    receiver.status = 410
    note(alerting)
    assert deliver_later(alerting, clock) == ONE_FAILED
    receiver.status = 200
    note(alerting)
    assert deliver_later(alerting, clock, 86400) == NONE_DUE and len(receiver.requests) == 1
    assert stored(alerting, "messages", "facts") == {"messages": [], "facts": []}, "there is no channel any more"
    assert "ended 1 d ago : the receiver answered 410 Gone" in Person(alerting).signed_in().text("/apps")
    receiver.status = 500
    with pytest.raises(StoreError):
        alerting.alerts.test(alerting.channel)
    receiver.status = 200
    note(alerting)
    assert deliver_later(alerting, clock, 3600) == NONE_DUE, "it has still ended"
    alerting.alerts.test(alerting.channel)
    note(alerting)
    assert deliver_later(alerting, clock) == ONE_SENT
    assert "no errors" in Person(alerting).signed_in().text("/apps")


def test_a_redirect_is_not_followed_no_socket_stays_open_and_https_is_no_plain_text(alerting, receivers, monkeypatch):
    receiver, elsewhere, _ = receivers
    sockets, connect = [], http.client.HTTPConnection.connect
    monkeypatch.setattr(http.client.HTTPConnection, "connect",
                        lambda connection: connect(connection) or sockets.append(connection.sock))
    for status in (301, 302, 303, 307, 308):
        receiver.status, receiver.headers = status, {"Location": elsewhere.url}
        with pytest.raises(StoreError, match=f"channel {alerting.channel}: it answered {status}"):
            alerting.alerts.test(alerting.channel)
    assert (len(receiver.requests), elsewhere.requests) == (5, [])
    assert [each.fileno() for each in sockets] == [-1] * 5
    number, _ = alerting.alerts.add(receiver.url.replace("http", "https"))
    with pytest.raises(StoreError, match=f"channel {number}: "):
        alerting.alerts.test(number)
    assert len(receiver.requests) == 5


def drip(connection):
    """Answers a byte at a time, each within the timeout of a socket."""
    with suppress(OSError):
        for byte in b"HTTP/1.1 200 OK\r\n" + b"X: " + b"x" * 60000:
            connection.sendall(bytes([byte]))
            threading.Event().wait(0.05)


@pytest.mark.parametrize("answer, error", [
    (lambda connection: connection.recv(1), "no answer in time"), (drip, "no answer in time"),
    (lambda connection: connection.sendall(b"what?\r\n\r\n"), "BadStatusLine"),
    (lambda connection: connection.shutdown(socket.SHUT_RDWR), "RemoteDisconnected")])
def test_a_receiver_that_answers_late_or_nonsense_does_not_hold_up_others(
        alerting, clock, receivers, monkeypatch, answer, error):
    monkeypatch.setattr(backfeedr, "SEND_TIMEOUT", 0.2)
    bad, good, _ = receivers
    bad.on_request = lambda: answer(bad.requests[0].connection)
    alerting.alerts.add(good.url)
    note(alerting)
    began = time.monotonic()
    assert deliver_later(alerting, clock) == {"sent": 1, "failed": 1} and time.monotonic() - began < 5
    assert len(good.requests) == 1 and alerting.alerts.channels()[0]["error"] == error


def test_an_unexpected_error_delays_no_other_channel_and_its_log_line_has_no_address(
        serve, clock, receiver, monkeypatch, caplog):
    server, secret = serve(), "slack+http://secret.example.com/secret"
    monkeypatch.setitem(backfeedr.CHANNELS, "slack+http", raising(KeyError(secret)))
    for url in (secret, receiver.url):
        server.alerts.add(url)
    note(server)
    assert deliver_later(server, clock) == {"sent": 1, "failed": 1}
    assert [channel["error"] for channel in server.alerts.channels()] == ["KeyError", None]
    assert "cannot send to channel" in caplog.text and "secret" not in caplog.text


def test_two_servers_that_deliver_at_once_send_each_message_once(server, clock, receiver):
    other = Store(server.store.path, clock) if not POSTGRES else postgres().PostgresStore(server.store.path, clock)
    for _ in range(20):
        server.alerts.add(receiver.url)
    note(server)
    clock.move(60)
    both = [server.alerts, backfeedr.Alerts(other, "", list)]
    with other, ThreadPoolExecutor(2) as pool:
        done = sum(pool.map(lambda alerts: alerts.deliver(), both), Counter())
    assert done == Counter(sent=20) and len(set(receiver.ids)) == len(receiver.ids) == 20


def test_a_message_that_is_being_sent_is_claimed_and_blocks_no_report_or_question(alerting, clock, receiver):
    meanwhile, api = [], Api(alerting)
    receiver.on_request = lambda: meanwhile.append((
        dict(alerting.deliver()), api.post(CRASHES, CRASH)[0], api.get("/api/v1/overview")[0]))
    note(alerting)
    assert deliver_later(alerting, clock) == ONE_SENT and meanwhile == [(NONE_DUE, 201, 200)]


@pytest.mark.slow
def test_kill_9_between_commit_and_delivery_loses_no_alert(alerting, clock, receiver):
    clock.seconds = time.time() - 300
    note(alerting)
    db = alerting.store.path
    program = [EXAMPLES / "postgres.py", db] if POSTGRES else PROGRAM
    sending, killed = threading.Event(), threading.Event()
    receiver.on_request = lambda: (sending.set(), killed.wait(20))
    process = start_python(*program, "deliver", *([] if POSTGRES else ["--db", db]))
    assert sending.wait(20)
    process.kill()
    process.communicate()
    killed.set()
    receiver.on_request = lambda: None
    clock.seconds = time.time()
    assert dict(alerting.deliver()) == NONE_DUE, "the process that was killed has claimed it"
    assert deliver_later(alerting, clock, 61) == ONE_SENT and deliver_later(alerting, clock, 3600) == NONE_DUE
    assert len(receiver.ids) == 2 and len(set(receiver.ids)) == 1


@pytest.mark.slow
def test_a_server_delivers_in_a_thread_and_stops_even_while_a_receiver_hangs(alerting, clock, receiver, run):
    hung, over = threading.Event(), threading.Event()
    clock.seconds = time.time() - 300
    note(alerting)
    server = run(db=alerting.store.path)
    wait_until(lambda: alerting.alerts.channels()[0]["sent_at"])
    receiver.on_request = lambda: (hung.set(), over.wait(20))
    note(alerting)
    assert hung.wait(20)
    assert server.stop(seconds=8)[::2] == (0, "")
    over.set()


def test_facts_are_kept_only_while_there_is_a_channel_for_them(server, clock, receiver):
    note(server)
    assert stored(server, "facts") == {"facts": []}, "there is no channel"
    server.alerts.add(receiver.url, kinds=["crash.spread"])
    note(server)
    assert deliver_later(server, clock) == NONE_DUE and stored(server, "facts") == {"facts": []}, "no channel wants it"
    note(server)
    clock.move(8 * 86400)
    assert Api(server).post(CRASHES, CRASH)[0] == 201
    assert [row[4] for row in stored(server, "facts")["facts"]] == [group_hash("SIGABRT", [])], "nothing was delivered"


def test_a_channel_gets_the_facts_it_asked_for_of_its_app_or_of_all_live_apps(server, clock, receivers):
    server.store.create_app("Beta", is_test=True)
    server.store.create_app("Shop")
    for receiver, options in zip(receivers, (
            {}, {"app": "Beta"}, {"app": "Shop", "kinds": ["crash.spread", "crash.new"]})):
        server.alerts.add(receiver.url, **options)
    for app in ("default", "Beta", "Shop"):
        for kind in ("crash.new", "crash.regressed", "crash.unmuted", "crash.spread", "release.worse"):
            note(server, kind, app)
    assert deliver_later(server, clock) == {"sent": 3, "failed": 0}
    on = ["crash.new", "crash.regressed", "crash.unmuted"]
    assert [(receiver.facts("app"), receiver.facts("type")) for receiver in receivers] == [
        ([["default"] * 3 + ["Shop"] * 3], [on * 2]), ([["Beta"] * 3], [on]),
        ([["Shop"] * 2], [["crash.new", "crash.spread"]])]


def test_nothing_of_an_app_is_sent_once_it_is_deleted_even_during_a_delivery(alerting, clock, receiver):
    def delete_shop():
        if len(receiver.requests) == 1:
            alerting.store.delete_app("Shop")

    alerting.store.create_app("Shop")
    for apps in (["Shop"], ["Shop"], ["Shop", "default"], ["default"]):
        for app in apps:
            note(alerting, app=app)
        clock.move(60)
        alerting.alerts._queue_messages()
    alerting.alerts.add(receiver.url, app="Shop")
    note(alerting, app="Shop")
    receiver.on_request, receiver.status = delete_shop, 400  # which does not hold up the next message
    assert deliver_later(alerting, clock) == {"sent": 0, "failed": 3}
    assert len(alerting.alerts.channels()) == 1 and stored(alerting, "facts") == {"facts": []}
    receiver.status = 204
    assert deliver_later(alerting, clock) == {"sent": 2, "failed": 0}, "a message without facts is deleted"
    assert receiver.facts("app") == [["Shop"], *[["default"]] * 4]


def test_a_reason_leaves_the_host_only_if_a_channel_asks_for_it(server, clock, receivers):
    for receiver, scheme, with_reason in zip(receivers, ("", "", "slack+"), (False, True, True)):
        server.alerts.add(scheme + receiver.url, with_reason=with_reason)
    add(server, exception_reason="Card 4111", device_id_hash="d" * 64)
    note(server, group=ABORTS, device_id_hash="d" * 64, exception_reason="Card 4111", user="me")
    assert deliver_later(server, clock) == {"sent": 3, "failed": 0}
    plain, with_reason, chat = (receiver.requests[0].body for receiver in receivers)
    assert not re.search("4111|dddd|me\"", plain)
    assert receivers[1].facts("reason") == [["Card 4111"] * 2] and "dddd" not in with_reason
    assert "(default 1.3.0): Card 4111" in chat


@pytest.mark.parametrize("ends", ["is forgotten", "expires"])
def test_a_reason_is_kept_no_longer_for_a_message_than_in_its_report(one_day, clock, receiver, ends):
    one_day.alerts.add(receiver.url, with_reason=True)
    add(one_day, exception_reason="Card 4111", device_id_hash="d")
    receiver.status = 500
    assert deliver_later(one_day, clock) == ONE_FAILED and deliver_later(one_day, clock, 3600) == ONE_FAILED
    clock.move(A_DAY)
    assert one_day.store.forget_device("d") if ends == "is forgotten" else one_day.store.catch_up()
    assert "4111" not in str(stored(one_day, "messages", *REPORT_TABLES))
    receiver.status = 204
    assert deliver_later(one_day, clock) == ONE_SENT and receiver.facts("type") == [["crash.new"]] * 3
    assert receiver.facts("reason") == [["Card 4111"]] * 2 + [[None]]
    first, second, (last,) = receiver.facts("text")
    assert first == second == [last + ": Card 4111"]
    assert sql(one_day, "select body from messages") == [("",)]
    clock.move(A_DAY)
    one_day.store.catch_up()
    assert count(one_day, "messages") == 0


@pytest.mark.parametrize("problem, urls", {
    "a channel's address is like https": [
        "", "example.com", "https://", "https://a b/", "https://a\n/", "https://a:99999/", "https://a:0/", "https://[",
        "https://a/#b", "https://\xe4.de/", "ntfy+https://ntfy.sh", "ntfy+https://ntfy.sh/", "file:///etc/passwd",
        "ntfy+https://ntfy.sh/a?b=c", "ntfy+https://ntfy.sh/a.b"],
    "an address that is not https://, slack[+]https:// or ntfy[+]https:// needs Apprise": ["gopher://a/b"],
    "give slack[+]https://hooks.slack.com/[.]{3} as the address for hooks.slack.com$": [
        "https://hooks.slack.com/services/T0/B0/x"],
    "give slack[+]https://discord.com/[.]{3}/slack as the address for discord(app)?.com$": [
        "https://discord.com/api/webhooks/1/x", "https://DiscordApp.com/api/webhooks/1/x",
        "slack+https://discord.com/api/webhooks/1/x"],
    "give ntfy[+]https://ntfy.sh/TOPIC as the address for ntfy.sh$": ["http://ntfy.sh/topic"]}.items())
def test_an_address_to_which_nothing_can_be_sent_is_refused_with_a_form_that_works(server, monkeypatch, problem, urls):
    monkeypatch.setitem(sys.modules, "apprise", None)
    for url in urls:
        with pytest.raises(StoreError, match=f"^{problem}"):
            server.alerts.add(url)
    assert server.alerts.channels() == []
    if form := re.search(r"(\w+)\[[+]\]https://[a-z]", problem):
        ending = "/slack" * ("discord" in problem)
        assert {server.alerts.add(f"{form[1]}+https://{url.partition('://')[2]}{ending}")[1] for url in urls} == {""}


def test_other_addresses_go_through_apprise_if_it_is_installed(server, clock, monkeypatch):
    notified = []

    class Apprise:
        def add(self, url):
            self.url = url
            return url.startswith("tgram:")

        def notify(self, title, body, body_format):
            notified.append((self.url, title, body, body_format))
            return len(notified) > 1

    monkeypatch.setitem(sys.modules, "apprise", SimpleNamespace(Apprise=Apprise))
    with pytest.raises(StoreError, match="no address that Apprise knows"):
        server.alerts.add("other://a/b")
    assert server.alerts.add("tgram://bottoken/ChatID")[1] == ""
    note(server, exception_type="[x](y)@all")
    for seconds, outcome, error in ((60, ONE_FAILED, "Apprise could not send it"), (5, ONE_SENT, None)):
        assert deliver_later(server, clock, seconds) == outcome and channel_values(server, "error") == (error,)
    message = ("tgram://bottoken/ChatID", "backfeedr: 1 new",
               "New: [x]\u200b(y)@\u200ball in Cart.pay() (default 1.3.0)", "text")
    assert notified == [message] * 2
    monkeypatch.setitem(sys.modules, "apprise", None)
    note(server)
    assert deliver_later(server, clock) == ONE_FAILED and "pip install" in channel_values(server, "error")[0]


@pytest.mark.parametrize("url, shown", [
    ("https://hooks.slack.com/services/T0/B0/abcdefgh", "https://hooks.slack.com/...efgh"),
    ("slack+https://hooks.slack.com/services/T0/B0/abcdefgh", "slack+https://hooks.slack.com/...efgh"),
    ("https://user:password@example.com:8443/a?token=abcdefghijkl", "https://example.com:8443/...ijkl"),
    ("ntfy+https://ntfy.sh/topic", "ntfy+https://ntfy.sh/..."), ("https://example.com", "https://example.com"),
    ("https://e.com/abcdefghijk", "https://e.com/...hijk"), ("https://e.com/abcdefghij", "https://e.com/..."),
    ("tgram://123456:bottoken/ChatID", "tgram://...atID"), ("pover://user@tok", "pover://...")])
def test_an_address_is_shown_without_its_secrets(url, shown):
    assert backfeedr.redacted_address(url) == shown


@pytest.fixture
def digesting(keeping, clock, receiver):
    """A server that keeps reports for a day and sends a digest at 15:00; it is 14:30."""
    server = keeping(1)
    server.alerts.add(receiver.url, kinds=["digest"], hour=15)
    return server


@pytest.mark.parametrize("steps", [  # crashes by how many hours ago they occurred; seconds; the digest that comes then
    # one at its hour each day, even after days without a server
    [({}, 29 * 60, None), ({}, 60, "New: 0"), ({}, 86_399, None), ({}, 1, "New: 0"), ({}, 5 * 86_400 + 60, "New: 0"),
     ({}, 86_400 - 61, None), ({}, 1, "New: 0")],
    # a group is new in exactly one, however late its crash or the digest is
    [({}, 1800, "New: 0"), ({"Old": 30, "Older": 1200, "Fast": -0.08}, 86_407, "New: 3; Fast; Old; Older"),
     ({"After": 1, "Old": 1}, 86_393, "New: 1; After"), ({}, 172_803, "New: 0"), ({}, 86_397, "New: 0")],
    # also if its first crashes have expired
    [({"A": 0}, 172_800, "New: 1; A"), *[({"A": 0}, 172_800, "New: 0")] * 3]])
def test_a_digest_comes_once_a_day_and_says_which_groups_are_new_since_the_last_one(digesting, clock, receiver, steps):
    for crashes, seconds, new in steps:
        for name, hours_ago in crashes.items():
            add(digesting, exception_type=name, occurred_at=time_text(clock.seconds - hours_ago * 3600))
        digesting.store.prune()
        receiver.requests = []
        assert deliver_later(digesting, clock, seconds) == (ONE_SENT if new else NONE_DUE)
        assert [texts[-2] for texts in receiver.facts("text")] == [new] * bool(new)


def test_a_digest_says_how_many_crashes_there_were_and_what_is_new_resolved_and_regressed(digesting, clock, receiver):
    for name in "A", "B":
        Api(digesting).post(CRASHES, {**CRASH, "exception_type": name, "app_version": "1.0"})
        set_triage(digesting, {"state": "resolved", "fixed_in": "1.0"}, group_hash(name, []))
    Api(digesting).post(CRASHES, {**CRASH, "exception_type": "B", "app_version": "1.0"})
    for seconds in (30 * 60, 86_400):
        assert deliver_later(digesting, clock, seconds) == ONE_SENT
    assert receiver.facts("text") == [
        ["Crashes: 0 yesterday, 0 the day before", "New: 2; A; B", "Resolved: 1; regressed: 1"],
        ["Crashes: 3 yesterday, 0 the day before", "New: 0", "Resolved: 0; regressed: 0"]]
    assert {(body["type"], body["data"]["title"]) for body in receiver.bodies} == {
        ("digest", "backfeedr: the last day of all apps")}


def test_a_digest_has_the_verdict_on_the_newest_release_of_each_live_app(server, clock):
    keys = [KEY_HASH, *(backfeedr.sha256(server.store.create_app(app, is_test=app == "Test"))
                        for app in ("Shop", "Test", "Quiet"))]
    for version, crashed in (("1.9", (4, 40, 4)), ("1.10", (4, 80, 80)), ("1.2", (0, 0, 0))):  # 1.2 comes late
        for key_hash, number in zip(keys, crashed):
            send_devices(server, version, 100 if crashed[1] else 1, number, key_hash)
        clock.move(A_DAY)
    texts = {"default": "default 1.10 is too early: about 50 more devices needed",
             "Shop": "Shop 1.10 is worse: 20 % of devices crash-free, 60 % before",
             "Test": "Test 1.10 is worse: 20 % of devices crash-free, 96 % before"}
    for app, lines in ((None, [texts["Shop"], texts["default"]]), ("Quiet", []),
                       *((app, [text]) for app, text in texts.items())):
        digest = server.metrics.digest(app, server.store.now - A_DAY * 1000, server.store.now)
        assert [fact["text"] for fact in digest[:-3]] == lines


@pytest.mark.parametrize("is_made", [True, False])
def test_a_digest_names_no_app_that_is_deleted_while_the_digest_is_made_or_waits(server, clock, receiver, is_made):
    shop = backfeedr.sha256(server.store.create_app("Shop"))
    server.alerts.add(receiver.url, kinds=["digest"], hour=15)
    play(server, clock, ("1.0", 20, 0), 12, ("1.0", 20, 0, shop), 12, ("1.1", 20, 20), 12, ("1.1", 20, 20, shop), 12)
    digest, receiver.status = server.alerts._digest, 503
    if not is_made:
        server.alerts._digest = lambda *arguments: (digest(*arguments), server.store.delete_app("Shop"))[0]
    assert dict(server.deliver()) == ONE_FAILED
    if is_made:
        server.store.delete_app("Shop")
    receiver.status, receiver.requests = 204, []
    assert deliver_later(server, clock) == ONE_SENT
    assert receiver.facts("app") == [["default", None, None, None]]


# == Metrics ===================================================================

ADMIN = {"Authorization": "Bearer " + TOKEN}
LISTS = ["/api/v1/crashes", "/api/v1/events", "/api/v1/crashes/" + group_hash("A", [])]
WEEKDAYS = "Mon Tue Wed Thu Fri Sat Sun"


def crash_at(time, kind="A", **more):
    return {"exception_type": kind, "occurred_at": time, **more}


def start_at(time, session_id="", **more):
    return {"type": "session_start", "occurred_at": time, "session_id": session_id, **more}


def series(labels, *data):
    return {"labels": labels.split(), "data": list(data)}


def overview(rate, dau, sessions, crashes, *top):
    return {"crash_free_rate_7d": rate, "dau": dau, "sessions_7d": sessions, "crashes_7d": crashes, "top_crashes": [
        {"group_hash": group_hash(kind, []), "exception_type": kind, "exception_reason": "".join(why), "count": count}
        for kind, count, *why in top]}


SMALL_WORLD = {  # Now is Thursday 2026-03-12, 14:30. A session counts at its first start, in whatever order they come.
    "default": [
        crash_at("2026-03-12T10:00:00Z", device_model="iPhone16,1", device_id_hash="d1", exception_reason="1st app"),
        crash_at("2026-03-11T23:59:59.999Z", device_model="iPhone15,2", device_id_hash="d2"),
        crash_at("2026-03-06T00:00:00Z", "B", device_model="", device_id_hash=""),  # first of 7 days
        crash_at("2026-03-05T23:59:59.999Z", "C"),  # the day before, but within 7 x 24 h
        crash_at("2026-03-12T14:35:00Z", "E", exception_reason="latest"),  # 5 minutes fast: believed
        crash_at("2026-03-12T15:00:00Z", "E", device_id_hash="fast", exception_reason="30 minutes fast: at 14:30"),
        crash_at("2025-01-01T00:00:00Z", "D", device_id_hash="late", device_model="iPhone15,2"),
        *[start_at(time, id) for id, times in [
            ("s1", ["2026-03-12T10:00:00Z", "2026-03-12T11:00:00Z"]), ("s3", ["2026-03-06T00:00:00Z"]),
            ("s2", ["2026-03-12T10:00:00Z", "2026-03-05T23:59:59.999Z"]), ("", ["2026-03-08T12:00:00Z"] * 7)]
          for time in times],
        start_at(NOW, "s4", type="session_end"), {"type": "custom", "occurred_at": NOW, "device_id_hash": ""},
        {"type": "error", "occurred_at": "2026-03-11T14:00:00Z", "device_id_hash": "d3"},
        {"type": "error", "occurred_at": "2026-03-11T13:59:59.999Z", "device_id_hash": "d4"}],  # too old
    "Shop": [crash_at("2026-03-12T10:00:00Z", device_model="iPhone16,1", device_id_hash="d1", exception_reason="2nd"),
             start_at("2026-03-12T10:00:00Z", "s1", device_id_hash="d1")],
    "Beta": [crash_at("2026-03-10T12:00:00Z", "Z", device_model="iPad", device_id_hash="d9"),
             start_at("2026-03-12T10:00:00Z", "s1", device_id_hash="d9")]}


def test_figures_of_an_app_and_of_all_live_apps_are_those_worked_out_by_hand(api, clock):
    for app, reports in SMALL_WORLD.items():
        key = KEY if app == "default" else api.server.store.create_app(app, is_test=app == "Beta")
        for report in reports:
            assert api.post(CRASHES if "exception_type" in report else EVENTS, report, key=key)[0] == 201
    days = " ".join(f"2026-03-{day:02}" for day in range(5, 13))
    assert_answers(api, {
        "metrics/daily-crashes": series(WEEKDAYS, 0, 0, 1, 4, 1, 0, 0),
        "metrics/daily-crashes?app=Beta": series(WEEKDAYS, 0, 1, 0, 0, 0, 0, 0),
        "metrics/daily-crashes?days=8": series(days, 1, 1, 0, 0, 0, 0, 1, 4),
        "metrics/crash-types": series("A E B C D", 3, 2, 1, 1, 1), "metrics/crash-types?days=1": series("A E", 2, 2),
        "metrics/crash-types?app=Beta": series("Z", 1), "metrics/devices?app=Beta": series("iPad", 1),
        "metrics/devices": series("iPhone15,2 iPhone16,1", 2, 2),
        "overview": overview(40.0, 5, 10, 6, ("A", 3, "1st app"), ("E", 2, "latest"), ("B", 1)),  # d1, d2, d3, fast; d1
        "overview?app=Shop": overview(0.0, 1, 1, 1, ("A", 1, "2nd")),
        "overview?app=Beta": overview(0.0, 1, 1, 1, ("Z", 1))})
    groups = api.get("/api/v1/crashes?limit=1", **ADMIN)[1]["groups"]
    assert [groups[0][name] for name in ("exception_type", "exception_reason", "count")] == ["A", "1st app", 3]
    ties = sorted([("A", 2, "1st app"), ("E", 2, "latest")], key=lambda top: group_hash(top[0], []))
    clock.move(6 * 24 * 3600)  # Wednesday 18 March, 14:30
    assert_answers(api, {"metrics/daily-crashes": series(WEEKDAYS, 0, 0, 0, 4, 0, 0, 0),
                         "overview": overview(0.0, 0, 2, 4, *ties)})
    clock.move(2 * 24 * 3600)
    assert_answers(api, {"overview": overview(100.0, 0, 0, 0),
                         "metrics/crash-types": series("A E B C D", 3, 2, 1, 1, 1)})


def assert_answers(api, expected):
    assert {path: api.get("/api/v1/" + path)[1] for path in expected} == expected


def test_a_page_has_its_first_row_whatever_its_size():
    for rows, limit, page in (("aaa", 2, ["aaa"]), ("aaa b", 4, ["aaa", "b"]), ("aaa bb", 4, ["aaa"]), ("", 1, [])):
        assert list(backfeedr.rows_that_fit(rows.split(), limit, len)) == page


@pytest.mark.parametrize("character, length, least", [
    ("\U0001f4a5", 497, 9), ("\x01", 497, 18), ("\\", 497, 45), ("T", 1, 100)])
def test_public_answers_have_100_names_and_ten_models_or_as_many_as_fit_into_64_kb(api, character, length, least):
    name = character * length
    names = [f"{name}{n:03}" for n in range(105)]
    crashes = [crash_at(NOW, kind, device_model=kind, exception_reason=name, app_version=kind) for kind in names]
    api.server.store.add(backfeedr.sha256(KEY), [parse_crash(crash) for crash in crashes])
    versions = sorted(["(other)", *names[:100]])
    for query in ("", "?app=default", "?days=365"):
        answers = {path.rpartition("/")[2]: api.web.get(path + query) for path in METRICS}
        assert max(len(answer.body) for answer in answers.values()) <= 64_000
        types = answers["crash-types"].json["labels"]
        releases = [row["app_version"] for row in answers["releases"].json["releases"]]
        assert least <= len(types) <= 100 and types == names[:len(types)]
        assert least <= len(releases) <= 100 and releases == versions[:len(releases)]
        assert answers["devices"].json["labels"] == names[:10][:len(types)]
        assert [top["exception_reason"] for top in answers["overview"].json["top_crashes"]] == [name[:200]] * 5


def test_an_app_name_beyond_ascii_is_found_however_it_is_encoded(api):
    api.server.store.create_app("Caf\u00e9")
    for query in ("app=Caf%C3%A9", "app=Caf\u00c3\u00a9"):
        assert api.web.get("/api/v1/overview", extra_environ={"QUERY_STRING": query}).status_int == 200


# The tables of figures and reports that each question searches: by at least two columns of a key, or by all of an app
# where the name is marked *. The crashes of a group are read from the index alone.
TABLES_OF = {
    "daily_crashes": "crash_days", "active_devices": "active_days", "devices": "labels", "crash_types": "labels",
    "sessions": "session_days", "retention": "cohorts", "event_names": "event_names event_names*",
    "overview": "crash_days session_days group_days groups device_hours",
    "releases": "release_days session_days builds* release_sums* release_hours",
    "groups": "groups groups* triage* crashes", "groups, of days": "crash_days group_days groups groups* crashes",
    "group": "groups group_images* crashes", "crash": "crashes", "neighbours": "crashes", "days_of_groups": "crashes",
    "attention": "group_days groups triage builds* crashes",
    "events": "events sessions", "events, oldest first": "events sessions", "device": "devices device_days",
    "a commit": "devices device_days device_versions builds sessions crashes"}


@sqlite_only
def test_each_question_and_a_commit_use_an_index(api):
    event = {**EVENT, "app_version": "1.0", "session_id": "s", "device_id_hash": "d"}
    crash, session = api.post(CRASHES, {**CRASH, "app_version": "1.0"})[1], {"session_id": "s"}
    for version in ("1.0", "1.1"):
        api.post(EVENTS, {**event, "app_version": version})
    arguments = {
        "group": {"group_hash": crash["group_hash"]}, "days_of_groups": {"groups": [crash["group_hash"]]},
        "groups, of days": {"days": 7}, "events": session, "events, oldest first": {**session, "oldest_first": True},
        "crash": {"id": crash["id"]}, "neighbours": {"crash": crash}, "device": {"device_id_hash": "d"}}
    for question, tables in TABLES_OF.items():
        with api.server.store.reading() as reader:  # the question will get the same connection
            db, queries = api.server.store._process.writer if question == "a commit" else reader, []
        db.set_trace_callback(queries.append)
        if question == "a commit":
            api.server.store._process.known.clear()  # else it would ask less
            api.post(EVENTS, {**event, "occurred_at": "2026-03-01T00:00:00Z"})
            api.post(CRASHES, {**CRASH, "device_id_hash": "d"})
        else:
            getattr(api.server.metrics, question.partition(",")[0])(**arguments.get(question, {}))
        db.set_trace_callback(None)
        # Versions of SQLite differ in these words.
        steps = {re.sub("(?<=SEARCH) TABLE|(?<=SCAN) TABLE| AS \\w+| LEFT-JOIN", "", step)
                 for query in queries if query.split()[0].lower() in ("select", "with", "update")
                 for *_, step in db.execute("explain query plan " + query)}
        large = {*backfeedr.PRIMARY_KEYS, *(("crashes", "events") if question != "device" else ())}  # that reads all
        assert not large & {step.split()[1] for step in steps if step.startswith("SCAN ")}, question
        searches = [re.fullmatch(r"SEARCH (\w+) USING (.*)\((.*)\)", step) for step in steps]
        by_key = {match[1] + "*" * (match[3] == "app_id=?") for match in searches if match and match[1] in large}
        assert set(tables.split()) <= by_key, question
        assert {name for name in by_key if "*" in name} <= set(tables.split()), question
        if "crashes" in by_key and question != "crash":
            assert any("COVERING INDEX crashes_by_group" in step for step in steps), question


def iso_time(ms):
    return time_text(ms // 1000)[:-1] + (f".{ms % 1000:03}Z" if ms % 1000 else "Z")


def per_cent(part, whole):
    return float(round(Fraction(100 * part, whole), 2))


def slow_rate(crashes, sessions):
    """100 x (1 - crashes / sessions), within 0 to 100."""
    return per_cent(max(0, sessions - crashes), sessions) if sessions else 0.0 if crashes else 100.0


def by_frequency(values, most=20):
    ranked = sorted(Counter(values).items(), key=lambda row: (-row[1], row[0] or ""))
    return {name: [row[n] for row in ranked if row[0]][:most] for n, name in enumerate(("labels", "data"))}


class SlowMetrics:
    """Answers questions about some apps as the README promises, by loops over all reports and what `recount` finds."""

    def __init__(self, tables, crashes, events, apps, now):
        self.apps, self.now, self.today = apps, now, now // DAY
        self.tables = {table: {key: row for key, row in rows.items() if key[0] in apps}
                       for table, rows in tables.items()}
        self.crashes, self.events = ([row for row in rows if row["app_id"] in apps] for rows in (crashes, events))
        self.tables["releases"] = releases = {}
        for (app, version, _), (first, last) in self.tables["builds"].items():
            known = releases.get((app, version), (first, last))
            releases[app, version] = min(first, known[0]), max(last, known[1])
        self.session_sums = self.totals("session_days", "sessions", "ended", "ms")
        self.cohort_sums = self.totals("cohorts", "devices", 1, 7, 30)

    def is_of_last(self, days, day):
        return not days or self.today - days < day <= self.today

    def totals(self, table, *names):
        """Returns a function that sums up the rows of a day in a table; `names` are those of the columns."""
        days = grouped([{"day": key[1], "row": row} for key, row in self.tables[table].items()], "day")
        return lambda day: {name: sum(item["row"][n] for item in days[day,]) for n, name in enumerate(names)}

    def per_day(self, days, figures):
        shown = range(self.today - days + 1, self.today + 1)
        rows = [{"labels": iso_time(day * DAY)[:10], **figures(day)} for day in shown]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def weekdays(self):
        week = self.per_day(7, self.totals("crash_days", "data"))["data"]
        monday = (3 - self.today) % 7  # 1970 began on a Thursday
        return series(WEEKDAYS, *week[monday:], *week[:monday])

    def labels(self, field, days, most):
        return by_frequency((row[field] for row in self.crashes if self.is_of_last(days, row["at"] // DAY)), most)

    def sessions_of(self, day):
        sessions, ended, ms = self.session_sums(day).values()
        durations = sorted((seconds, app) for (app, started, seconds), (count,) in self.tables["durations"].items()
                           for _ in range(count) if started == day)
        is_of_one_app = len({app for _, app in durations}) == 1
        return {"sessions": sessions, "median_seconds": durations[(ended - 1) // 2][0] if is_of_one_app else None,
                "mean_seconds": round(ms / ended / 1000, 1) if ended else None}

    def retention_of(self, day):
        devices, *back = self.cohort_sums(day).values()
        return {"devices": devices, **{
            f"day_{later}": per_cent(count, devices) if devices and day + later < self.today else None
            for later, count in zip((1, 7, 30), back)}}

    def overview(self):
        crashes = [row["group_hash"] for row in self.crashes if self.is_of_last(7, row["at"] // DAY)]
        sessions, top = sum(self.per_day(7, self.sessions_of)["sessions"]), by_frequency(crashes, 5)
        dau = sum(row[0] for key, row in self.tables["device_hours"].items() if key[1] >= (self.now - DAY) // HOUR)
        return {"crash_free_rate_7d": slow_rate(len(crashes), sessions), "dau": dau, "sessions_7d": sessions,
                "crashes_7d": len(crashes),
                "top_crashes": [{**{name: self.description(group)[name] for name in (
                    "group_hash", "exception_type", "exception_reason")}, "count": count}
                    for group, count in zip(*top.values())]}

    def description(self, group):
        """A group as its latest crash describes it, in the first app where several apps have one at that time."""
        groups = [(row, key[0]) for key, row in sorted(self.tables["groups"].items()) if key[1] == group]
        (name, _, _, _, reason, *_), app = max(groups, key=lambda group: group[0][3])
        first_version = min(groups, key=lambda group: group[0][1])[0][2]
        crashes = [row for row in self.crashes if (row["app_id"], row["group_hash"]) == (app, group)]
        frame, = max(crashes, key=lambda row: (row["at"], row["seq"]))["sent"]["stack_trace"]
        return {"group_hash": group, "exception_reason": reason or "", "exception_type": name,
                "first_seen": min(row[1] for row, _ in groups), "first_version": first_version,
                "came_at": min(row[-1] for row, _ in groups),
                "place": frame["symbol"] if frame.get("file") else ""}

    def releases(self):
        releases = []
        for (app, version), (first, last) in self.tables["releases"].items():
            sums = self.tables["release_sums"].get((app, version), [0] * 5)
            sessions, crashed_sessions, crashes, devices, crashed = sums
            recent, adopted = (sum(row[0] for key, row in self.tables[table].items() if key[0] == app
                                   and self.is_of_last(7, key[1]) and key[2:] in ((), (version,)))
                               for table in ("session_days", "release_days"))
            releases.append((-first, version, app, {
                "app": self.apps[app], "app_version": version, "sessions": sessions, "crashes": crashes,
                "crashed_sessions": crashed_sessions, "by": "session" if crashed_sessions else "count",
                "crash_free_sessions": slow_rate(crashed_sessions or crashes, sessions) if sessions else None,
                "devices": devices, "crash_free_devices": slow_rate(crashed, devices) if devices else None,
                "adoption": per_cent(adopted, recent) if recent else 0.0,
                "first_seen": iso_time(first), "last_seen": iso_time(last)}))
        return {"releases": [row for *_, row in sorted(releases)[:100]]}

    def groups(self, version=None, days=None, sort="crashes"):
        rows = [row for row in self.crashes if self.is_of_last(days, row["at"] // DAY)
                and version in (None, row["sent"].get("app_version"))]
        groups = list(map(self.spread, grouped(rows, "group_hash").values()))
        for group in groups:
            first_version, came_at = group.pop("first_version"), group.pop("came_at")
            group["is_new"] = first_version == version if version else came_at >= (self.today - 6) * DAY
        column = "count" if sort == "crashes" else sort
        groups.sort(key=lambda row: row["group_hash"])
        return sorted(groups, key=lambda row: parse_time(row[column]) if "seen" in sort else row[column], reverse=True)

    def spread(self, rows):
        times, versions = [row["at"] for row in rows], {row["sent"].get("app_version") for row in rows} - {None}
        group = self.description(rows[0]["group_hash"])
        return {**group, **UNDECIDED, "count": len(rows), "devices": len(grouped(rows, "app_id", "device_id_hash")),
                "first_seen": iso_time(group["first_seen"]), "last_seen": iso_time(max(times)),
                "versions": sorted(versions, key=lambda version: list(map(int, version.split("."))))}

    def group(self, group):
        rows = [row for row in self.crashes if row["group_hash"] == group]
        rows.sort(key=lambda row: (row["at"], row["seq"]))
        spread = self.spread(rows)
        del spread["came_at"]
        return {**spread, "missing_symbols": [], "history": [],
                "reports": [{**row["sent"], "group_hash": group} for row in rows[::-1]], **{
            part: by_frequency(row["sent"].get(field) for row in rows) for part, field in (
                ("versions", "app_version"), ("systems", "os_version"), ("device_models", "device_model"))}}

    def answers(self, dice, with_lists):
        """Yields path, query and answer of questions. If the query has a limit, the answer has all pages in one."""
        yield "overview", {}, self.overview()
        yield "releases", {}, self.releases()
        yield "metrics/daily-crashes", {}, self.weekdays()
        for days in (None, dice.choice([1, 2, 3, 7]), dice.choice([8, 31, 60, 365])):
            query, shown = ({"days": days}, days) if days else ({}, 30)
            yield "metrics/crash-types", query, self.labels("exception_type", days, 100)
            yield "metrics/devices", query, self.labels("device_model", days, 10)
            yield "metrics/active-devices", query, self.per_day(shown, self.totals("active_days", "dau", "wau", "mau"))
            yield "metrics/sessions", query, self.per_day(shown, self.sessions_of)
            yield "metrics/retention", query, self.per_day(shown, self.retention_of)
            yield "metrics/daily-crashes", {"days": shown}, self.per_day(shown, self.totals("crash_days", "data"))
        if with_lists:
            for query in ({}, {"version": "2.0"}, {"days": dice.choice([1, 2, 7])}, {"version": "1.10.0", "days": 9},
                          *({"sort": sort, **dice.choice([{}, {"days": 9}])} for sort in backfeedr.SORT_COLUMNS)):
                yield "crashes", {"limit": 2, **query}, {"groups": self.groups(**query)}
            for group in {row["group_hash"] for row in self.crashes[-2:]}:
                yield f"crashes/{group}", {"limit": 2}, self.group(group)
            events = [row["sent"] for row in self.events[::-1]]
            for query in ({"session_id": f"s{dice.randrange(40)}"}, {"type": "error"}, {"type": "custom", "name": "x"}):
                yield "events", {"limit": 2, **query}, {
                    "events": [event for event in events if query.items() <= event.items()]}
            yield "events", {"limit": 50}, {"events": events}


class Simulation:
    """Sends random reports of three apps over five weeks. `sent` has each acknowledged report as the admin sees it."""

    def __init__(self, api, clock, seed, variety):
        self.api, self.clock, self.random, self.variety = api, clock, random.Random(seed), variety
        self.store, self.sent, self.waiting = api.server.store, {}, defaultdict(list)
        self.keys = {"default": KEY, "Shop": self.store.create_app("Shop"), "Beta": self.store.create_app("Beta", True)}
        clock.seconds = parse_time("2026-02-20T09:00:00Z") / 1000

    def pass_time(self):
        """Moves the clock by minutes or hours, to near midnight, to a full hour, or back if names are not limited."""
        chance, now, midnight = self.random, self.clock.seconds, (self.store.now // DAY + 1) * DAY / 1000
        self.clock.seconds = chance.choice([
            now + chance.randrange(8 * 90) / 8, now + chance.randrange(8 * 40_000) / 8,
            now - chance.randrange(8 * 10_000) / 8 if self.variety == 1 else now,
            max(now, midnight + chance.choice([-301, -300, -60, -0.125, 0, 0.125, 200])),
            midnight + 3600 * chance.randrange(30)])

    def device_time(self):
        """A time by a device's clock: mostly now, or early, late, fast, never set, or at the edge of a day or hour."""
        chance, now = self.random, self.store.now
        return chance.choice([
            now, now, now, now + 300_000, now + 300_001, chance.choice([0, 0, 0, 1_167_609_599_999, 1_167_609_600_000]),
            *(edge - chance.randrange(2) for edge in (
                now // DAY * DAY, (now // DAY - 6) * DAY, (now - DAY) // HOUR * HOUR)),
            *(now - chance.randrange(span) for span in (60_000, 60_000, HOUR, 2 * DAY, 9 * DAY, 33 * DAY)),
            *(now + chance.randrange(span) for span in (300_001, 300_001, 9 * DAY))])

    def fields(self):
        """The fields that all reports may have. Some are missing, null or empty."""
        chance = self.random
        versions = ["1.9.0", "1.10.0", "1.10.0", "2.0", f"3.{self.store.now // (7 * DAY)}",
                    f"4.{chance.randrange(self.variety)}"]
        return {"device_id_hash": chance.choice([None, "", *(f"d{n}" for n in range(14))]), "zone": 7,
                "os_version": chance.choice(["18.3", "17.0", None]), "app_version": chance.choice([*versions, ""]),
                "device_model": chance.choice([None, "", *(f"iPhone{n}" for n in range(13 * self.variety))])}

    def crash(self):
        chance = self.random
        return {**self.fields(), "exception_type": f"{chance.choice('AAABBCDEFG')}{chance.randrange(self.variety)}",
                "exception_reason": chance.choice([None, "", "why", f"crash {len(self.sent)}"]),
                "session_id": chance.choice([None, f"s{chance.randrange(40)}"]),
                "occurred_at": iso_time(self.device_time()),
                "stack_trace": [{"frame": 0, "symbol": chance.choice("xy"), "file": chance.choice([None, "a.swift"])}]}

    def event(self, app):
        """An event. Those of a session come in any order, perhaps weeks apart."""
        waiting = self.waiting[app]
        if len(waiting) < 5 or self.random.random() < 0.2:
            waiting += self.session()
        return waiting.pop(self.random.choice([0, self.random.randrange(len(waiting))]))

    def session(self):
        """The events of a session, mostly of one device. Some ids are used twice, and some are missing."""
        chance, start, who = self.random, self.device_time(), self.fields()
        session = chance.choice([f"s{chance.randrange(40)}", f"s{chance.randrange(40)}", None, ""])
        lasts = chance.choice([0, 499, 500, 9_499, 9_500, 94_000, 104_000, DAY, DAY + 1, chance.randrange(600_000),
                               chance.randrange(9_000_000), chance.randrange(2 * DAY)])
        begin, end = ("session_start", 0), ("session_end", lasts)
        for kind, after in chance.choice([
                [begin, end], [begin, end], [begin, begin, end], [begin, ("session_end", -lasts)], [begin], [end],
                [begin, ("session_start", lasts), ("session_end", lasts // 2), ("session_end", 2 * lasts)],
                [end, begin, ("custom", 0), ("error", 0)]]):
            yield {**(who if chance.random() < 0.9 else self.fields()), "session_id": session, "type": kind,
                   "name": chance.choice(["x", "y", None]), "occurred_at": iso_time(start + after)}

    def send(self):
        """A crash, an event or a batch."""
        app = self.random.choice(["default", "default", "Shop", "Shop", "Beta"])
        path = self.random.choice([CRASHES, CRASHES, EVENTS, EVENTS, BATCH])
        bodies = [self.crash() if path == CRASHES else self.event(app)
                  for _ in range(self.random.randrange(1, 9) if path == BATCH else 1)]
        status, answer = self.api.post(path, {"events": bodies} if path == BATCH else bodies[0], key=self.keys[app])
        assert status == 201
        ahead_ms = max(parse_time(body["occurred_at"]) for body in bodies) - self.store.now
        for body, id in zip(bodies, answer["ids"] if path == BATCH else [answer["id"]]):
            self.sent[id] = {name: value for name, value in body.items() if value not in (None, "") and name != "zone"}
            self.sent[id].update(id=id, app=app, received_at=iso_time(self.store.now), extra={"zone": 7},
                                 **({"clock_ahead_ms": ahead_ms} if ahead_ms > 300_000 else {}))

    def answer(self, path, query):
        """The answer to a question, with all pages of a list in one. Each page but the last must be full."""
        status, answer = self.api.get(f"/api/v1/{path}?{urlencode(query)}", **ADMIN)
        assert status == 200, (path, query, answer)
        for row in answer.get("releases", ()):
            del row["verdict"]  # see RELEASES
        for part in answer.keys() & {"groups", "reports", "events"}:
            following = answer.pop("next")
            assert len(answer[part]) == query["limit"] if following else len(answer[part]) <= query["limit"]
            if following:
                answer[part] += self.answer(path, {**query, "cursor": following})[part]
        return answer

    def compare(self, with_lists):
        path = self.store.path
        with connected(path) as db:
            reports = [[{**row, "sent": self.sent[row["id"]]} for row in rows_of_table(db, table)]
                       for table in ("crashes", "events")]
            tables = recount(db)
        assert sum(map(len, reports)) == len(self.sent)
        for app in (None, *self.keys):
            names = [app] if app else ["default", "Shop"]
            apps = {id: name for id, name in sql(path, "select id, name from apps") if name in names}
            slow = SlowMetrics(tables, *reports, apps, self.store.now)
            for question, query, expected in slow.answers(self.random, with_lists):
                query = {**query, **({"app": app} if app else {})}
                assert self.answer(question, query) == expected, (question, query)


@pytest.mark.parametrize("seed, variety", [*((seed, 1) for seed in range(4)), (4, 40), (5, 40)])
def test_all_answers_equal_a_slow_and_obvious_computation(serve, clock, monkeypatch, seed, variety):
    if variety > 1:
        monkeypatch.setattr(backfeedr, "MAX_NEW_NAMES", dict(
            group_hash=3, exception_type=2, device_model=2, app_version=1, name=1))
    simulation = Simulation(Api(serve(rate_limit=0, retention_days=0)), clock, seed, variety)
    simulation.compare(with_lists=True)
    for until in ("2026-02-27T00:00:00Z", "2026-03-05T00:00:00Z", "2026-03-27T00:00:00Z"):
        while simulation.store.now < parse_time(until):
            for _ in range(simulation.random.randrange(1, 5)):
                simulation.send()
            simulation.pass_time()
        clock.seconds = ((simulation.store.now + 301_000) // DAY + 1) * DAY / 1000 - 120
        for _ in range(12):  # some devices with fast clocks are in the next day already
            simulation.send()
        simulation.compare(with_lists=True)
        clock.move(130)
        simulation.compare(with_lists=False)  # only the day has changed
    assert len(simulation.sent) > 150
    assert (variety > 1) == bool(count(simulation, "crashes", "group_hash = '(other)'"))


def test_a_late_event_within_a_session_leaves_the_stored_median_of_its_day(api, clock):
    session = {"session_id": "s", "device_id_hash": "d"}
    for type, ahead in (("session_start", 0), ("session_end", 60)):
        add(api.server, type=type, occurred_at=time_text(clock.seconds + ahead), **session)
    clock.move(3 * 86_400)
    api.server.store.prune()
    before = stored(api.server, "medians")["medians"]
    add(api.server, type="custom", name="late", **session)
    assert [row[2] for row in before] == [60] and stored(api.server, "medians")["medians"] == before


CLOCKS = [  # seconds by which the events of a batch are ahead, and the day and the duration of their session
    ("a day fast", [86_400, 87_000], (0, 600)), ("6 minutes fast", [-240, 360], (0, 600)),
    ("5 minutes fast", [-300, 300], (0, 600)), ("slow", [-7200, -6600], (0, 600)),
    ("set meanwhile", [-3 * 86_400, 0], (-3, None)), ("of 1970", [-1773325800, -1773325200], (0, 0)),
    ("of 2001", [-795018600, -795018000], (0, 0)), ("of the year 8", [-61_880_000_000, -61_879_999_400], (0, 0))]


@pytest.mark.parametrize("name, ahead, expected", CLOCKS, ids=[name for name, *_ in CLOCKS])
def test_a_session_counts_whatever_the_phones_clock_says(api, name, ahead, expected):
    start, end = (backfeedr.iso_time(api.server.store.now + 1000 * seconds) for seconds in ahead)
    session = {"session_id": "s", "device_id_hash": "d", "app_version": "1.0"}
    assert api.post(BATCH, {"events": [{"type": "session_start", "occurred_at": start, **session},
                                       {"type": "session_end", "occurred_at": end, **session}]})[0] == 201
    answer = api.get("/api/v1/metrics/sessions?days=4")[1]
    day, seconds = expected
    assert answer["sessions"] == [int(n == day) for n in range(-3, 1)]
    assert answer["median_seconds"][day - 1] == seconds
    assert set(sql(api.server, "select occurred_at from events")) == {
        (parse_time(start),), (parse_time(end),)}, "the times are stored as they were sent"


def test_a_search_finds_what_the_list_shows_and_the_apps_own_frames(api):
    group = api.post(CRASHES, crash_at(NOW, "\u00dcberlauf", exception_reason="Limit \u00dcBERSCHRITTEN", stack_trace=[
        {"symbol": "abort"}, {"symbol": "Shop.Cart.total()", "file": "Cart.swift"},
        {"symbol": "Shop.main", "file": "main.swift"}]))[1]["group_hash"]
    api.post(CRASHES, crash_at(NOW, "Other"))
    for text, expected in {"\u00fcberschritten": [group], "cart.SWIFT": [group], "shop.main": [group],
                           "\u00fcberlauf": [group], group.upper(): [group], "abort": [], "%": []}.items():
        groups = api.get(f"{CRASHES}?{urlencode({'text': text})}", **ADMIN)[1]["groups"]
        assert [found["group_hash"] for found in groups] == expected, text


def test_text_of_an_expired_crash_is_no_longer_listed_or_found(keeping, clock):
    server = keeping(5)
    api = Api(server)
    add(server, exception_type="A", exception_reason="Secret", device_id_hash="d", occurred_at=time_text(clock.seconds))
    clock.move(86_400)
    add(server, exception_type="A", exception_reason="Old", occurred_at=time_text(clock.seconds - 9 * 86_400))
    clock.move(4 * 86_400 + 60)
    for _ in range(2):
        server.store.prune()
    group, = api.get(CRASHES, **ADMIN)[1]["groups"]
    assert (group["exception_reason"], group["last_seen"]) == ("Old", "2026-03-04T14:30:00Z")
    assert [len(api.get(f"{CRASHES}?text={text}", **ADMIN)[1]["groups"]) for text in ("secret", "old")] == [0, 1]


def test_a_very_large_group_is_described_by_its_hash_from_the_loss_of_its_latest_crash_until_it_is_smaller(
        keeping, clock, monkeypatch):
    monkeypatch.setattr(backfeedr, "SEARCHED_CRASHES", 2)
    server = keeping(5)

    def shown():
        server.store.prune()
        assert POSTGRES or backfeedr._check_roll_ups(Path(server.store.path).absolute())
        (reason, last_seen), = sql(server, "select exception_reason, last_seen from groups")
        return reason, (last_seen - start) / 1000

    start = server.store.now
    for n in range(5):
        add(server, exception_type="A", exception_reason=f"crash {n}", occurred_at=time_text(clock.seconds - 9 * n))
        clock.move(1)
    assert shown() == ("crash 0", 0)
    clock.move(5 * 86_400 - 5)
    for expected in (None, 0), (None, 0), ("crash 3", -24):
        clock.move(1)
        assert shown() == expected
    add(server, exception_type="A", exception_reason="new", occurred_at=time_text(clock.seconds))
    assert shown() == ("new", 5 * 86_400 + 3)


def test_a_large_group_is_described_after_a_device_is_forgotten_and_after_its_crashes_have_stayed_or_moved(
        serve, server, clock, monkeypatch):
    monkeypatch.setattr(backfeedr, "SEARCHED_CRASHES", 2)
    serve.unchecked.append(server)  # at the end, figures do not know of a changed type
    for n in range(5):
        add(server, exception_type="A", exception_reason=f"crash {n}", device_id_hash=f"d{n}",
            occurred_at=time_text(clock.seconds + n))
    server.store.forget_device("d4")
    assert sql(server, "select exception_reason, crashes from groups") == [("crash 3", 4)]
    sql_run(server, "update group_images set uuid = 'outdated'")
    for change, groups in (("images = 'outdated'", [("crash 3", 4)]), (
            "exception_type = 'B' where exception_reason = 'crash 3'", [("crash 3", 1), ("crash 2", 3)])):
        sql_run(server, "update crashes set " + change)
        sql_run(server, "insert into regroupings select app_id, group_hash, 0, '' from groups")
        server.store.catch_up()
        assert sql(server, "select distinct images from crashes") == [(None,)]
        assert sql(server, "select exception_reason, crashes from groups order by crashes") == groups
        assert len(groups) > 1 or not check_database(server)


def test_a_deletion_searches_few_crashes_for_the_latest_ones_of_all_groups_together(keeping, clock, monkeypatch):
    monkeypatch.setattr(backfeedr, "SEARCHED_CRASHES", 2)
    server, start = keeping(5), clock.seconds
    for n in (2, 1):
        for kind in "ABC":
            add(server, exception_type=kind, exception_reason=f"crash {n}", occurred_at=time_text(start + n))
        clock.move(86_400)
    clock.move(3.5 * 86_400)
    server.store.prune()
    assert dict(sql(server, "select exception_reason, count(*) from groups group by 1")) == {"crash 1": 2, None: 1}


def test_a_group_of_two_apps_is_described_by_the_one_that_still_has_a_crash_of_it(keeping, clock):
    server = keeping(2)
    other = server.store.create_app("B")
    add(server, exception_reason="of the first")
    clock.move(1.5 * A_DAY)
    add(server, key=other, exception_reason="late", occurred_at=time_text(clock.seconds - 2 * A_DAY))
    clock.move(A_DAY)
    server.store.prune()
    assert [top["exception_reason"] for top in server.metrics.overview()["top_crashes"]] == ["late"]
    assert [group["exception_reason"] for group in server.metrics.groups()["groups"]] == ["late"]


def test_an_emptied_group_was_last_seen_at_the_crash_that_comes_next(one_day, clock):
    for empty in (lambda: one_day.store.forget_device("d"), lambda: (clock.move(86_460), one_day.store.prune())):
        add(one_day, exception_type="A", exception_reason="Gone", device_id_hash="d")
        empty()
        old = time_text(clock.seconds - 2 * 86_400)
        add(one_day, exception_type="A", exception_reason="Old", occurred_at=old)
        group, = Api(one_day).get(CRASHES, **ADMIN)[1]["groups"]
        assert (group["exception_reason"], group["last_seen"]) == ("Old", old)


@pytest.mark.parametrize("retention, leap, kept", [(5, 0, "B"), (90, 30, "AC")])
def test_a_list_of_a_week_counts_what_is_kept_after_an_expiry_or_a_fast_clock(keeping, clock, retention, leap, kept):
    server = keeping(retention)
    for kinds, times in (("AC", 3), ("B", 2)):
        for kind in kinds:
            add(server, times, exception_type=kind)
        clock.move(86_400)

    def first_listed():
        return server.metrics.groups(days=7, limit=1)["groups"][0]["exception_type"]

    assert first_listed() in "AC"
    clock.move((3.5 + leap) * 86_400)
    server.store.prune()  # deletes crashes, or sums
    clock.move(-leap * 86_400)
    assert first_listed() in kept


def test_a_list_of_a_version_counts_its_crashes_and_says_which_groups_are_new_in_it(api, clock):
    for version in ("2.3", "2.4.1", "2.4.2"):
        api.post(CRASHES, crash_at(time_text(clock.seconds), "Old", app_version=version))
        clock.move(10 * 86400)
    api.post(CRASHES, crash_at(time_text(clock.seconds), "New", app_version="2.4.2"))

    def groups(query):
        return {group["exception_type"]: (group["count"], group["first_seen"], group["is_new"], group["versions"])
                for group in api.get("/api/v1/crashes" + query, **ADMIN)[1]["groups"]}

    late = time_text(clock.seconds)
    assert groups("") == {"Old": (3, NOW, False, ["2.3", "2.4.1", "2.4.2"]), "New": (1, late, True, ["2.4.2"])}
    assert groups("?version=2.4.2") == {"Old": (1, NOW, False, ["2.4.2"]), "New": (1, late, True, ["2.4.2"])}
    assert groups("?version=2.3") == {"Old": (1, NOW, True, ["2.3"])} and groups("?version=2.4") == {}
    assert groups("?version=2.4*") == {"Old": (2, NOW, False, ["2.4.1", "2.4.2"]), "New": (1, late, True, ["2.4.2"])}
    old = group_hash("Old", [])
    assert sum(api.server.metrics.days_of_groups([old], version="2.4*")["groups"][old]["days"]) == 2


def test_versions_sort_as_people_expect():
    for one, other in (("v1.3+48", "1.3.0"), ("1.3 beta (4)", "1.3.0-beta (4)")):
        assert str(backfeedr.version_key(one)) == str(backfeedr.version_key(other))
    ordered = ["nightly", "1.2.0b3", "1.2.0b10", "1.2.0-rc.1", "1.2.0-rc.2", "1.2.0-rc.10", "1.2.0", "1.2.0 (9)",
               "1.2.0 (10)", "1.9", "1.10", "1.11b1", "1.11", "2024.1"]
    shuffled = random.Random(1).sample(ordered, len(ordered))
    assert sorted(shuffled, key=backfeedr.version_key) == ordered
    assert backfeedr.version_key("1." * 200) == backfeedr.version_key("1." * 32), "a longer key would take much memory"


def test_releases_are_sorted_by_first_appearance_or_version_and_name_apps_only_to_the_admin(api, clock):
    for version in ("1.10", "1.9", "2.0-rc.1"):
        add(api.server, app_version=version)
        clock.move(1)
    for query, expected in (("", ["2.0-rc.1", "1.9", "1.10"]), ("&sort=first_seen", ["2.0-rc.1", "1.9", "1.10"]),
                            ("&sort=version", ["2.0-rc.1", "1.10", "1.9"])):
        releases = api.get("/api/v1/releases?app=default" + query)[1]["releases"]
        assert [row["app_version"] for row in releases] == expected
    for path, sorts in (("/api/v1/releases", "version, first_seen"), (CRASHES, ", ".join(backfeedr.SORT_COLUMNS))):
        assert api.get(path + "?sort=x", **ADMIN) == (400, {
            "error": "invalid sort", "detail": f"it is not one of {sorts}"})
    assert [[row.get("app") for row in api.get("/api/v1/releases" + query, **headers)[1]["releases"]]
            for query, headers in (("", {}), ("", ADMIN), ("?app=default", {}))] == [
        [None] * 3, ["default"] * 3, ["default"] * 3]


@pytest.mark.parametrize("before, newer, text, interval", [  # devices, and those that crashed, of two releases
    ((100, 4), (100, 12), "worse: 88 % of devices crash-free, 96 % before", [-16.2, -0.3]),
    ((300, 36), (300, 12), "better: 96 % of devices crash-free, 88 % before", [3.7, 12.5]),
    ((400, 16), (400, 16), "no difference seen: 96 % of devices crash-free, 96 % before", [-2.8, 2.8]),
    ((100_000, 1000), (100_000, 1200), "worse: 98.8 % of devices crash-free, 99.0 % before", [-0.3, -0.1]),
    ((100_000, 4), (100_000, 44), "worse: 99.96 % of devices crash-free, 100.00 % before", [-0.1, -0.0]),
    ((500, 113), (162, 59), "worse: 64 % of devices crash-free, 77 % before", [-22.2, -5.8]),
    ((500, 50), (500, 1), "better: 99.8 % of devices crash-free, 90.0 % before", [7.3, 12.7]),
    ((20, 0), (20, 20), "worse: 0 % of devices crash-free, 100 % before", [-100.0, -77.2]),
    ((19, 0), (19, 19), "too early: about 10 more devices needed", [-100.0, -76.2]),
    ((60, 60), (60, 60), "no difference seen: 0 % of devices crash-free, 0 % before", [-6.0, 6.0]),
    ((500, 0), (0, 0), "too early: about 50 more devices needed", None),
    ((0, 0), (500, 0), "too early: about 50 more devices needed", None)])
def test_a_verdict_says_what_the_interval_of_the_difference_allows(before, newer, text, interval):
    verdict = backfeedr.verdict(backfeedr.Health(*newer), backfeedr.Health(*before))
    assert verdict == {"word": text.partition(":")[0], "text": text, "interval": interval}


def test_without_devices_there_is_no_verdict_and_intervals_are_those_of_the_paper():
    assert backfeedr.verdict(backfeedr.Health(0, 0), backfeedr.Health(0, 0)) is None
    for newer, before, expected in (  # Newcombe 1998, table II, method 10: cases a, b, e and h
            ((70, 14), (80, 32), (0.0524, 0.3339)), ((10, 1), (10, 7), (0.1705, 0.8090)),
            ((10, 10), (20, 20), (-0.1611, 0.2775)), ((10, 0), (10, 10), (0.6075, 1.0))):
        interval = backfeedr.newcombe_interval(backfeedr.Health(*newer), backfeedr.Health(*before))
        assert interval == pytest.approx(expected, abs=0.0002)


def test_equal_releases_are_seldom_called_worse_and_a_worse_one_is():
    chance, total = random.Random(7), Counter()

    def words(*releases):
        """Counts the words of 400 verdicts on two random releases, given their devices and the share that crashes."""
        return Counter(backfeedr.verdict(*(
            backfeedr.Health(devices, sum(chance.random() < share for _ in range(devices)))
            for devices, share in releases))["word"] for _ in range(400))

    for devices, before, share in ((50, 50, 0.2), (50, 400, 0.04), (300, 300, 0.04), (300, 1000, 0.5),
                                   (300, 300, 0.005)):
        counts = words((devices, share), (before, share))
        assert counts["worse"] <= 20, (devices, before, share)
        total += counts
    assert total["worse"] + total["better"] <= 0.05 * sum(total.values())
    assert words((300, 0.2), (300, 0.04)) == {"worse": 400}


def send_devices(server, version, devices, crashed, key_hash=KEY_HASH):
    """Sends an event of each device of a release, and a crash of each of the first `crashed` devices."""
    server.store.add(key_hash, [kind({**body, "app_version": version, "device_id_hash": f"{version} {n}"})
                                for kind, body, number in ((parse_event, EVENT, devices), (parse_crash, CRASH, crashed))
                                for n in range(number)])


def play(server, clock, *steps):
    """Sends devices of releases; numbers are hours that pass in between."""
    for step in steps:
        if isinstance(step, tuple):
            send_devices(server, *step)
        else:
            clock.move(step * 3600)


def verdicts(api):
    return {row["app_version"]: row["verdict"] and row["verdict"]["text"]
            for row in api.get("/api/v1/releases?app=default")[1]["releases"]}


def said(word, after, before):
    return f"{word}: {after} % of devices crash-free, {before} % before"


# What is sent: a version, devices, and how many of them crash. Numbers are hours that pass. Then the verdicts.
RELEASES = {
    "a release is compared with the one before it at equal ages": [
        ("1.9", 100, 4), 5, ("1.9", 200, 200), 24,  # at an age that the next release has not reached
        ("1.10", 100, 12), {"1.10": None, "1.9": None}, 1,  # the first hour is not over
        ("1.8", 100, 100), {"1.8": None, "1.10": said("worse", 88, 96), "1.9": None}, 5,  # it is old, but late
        {"1.10": said("better", 88, 0)},
        ("1.11", 100, 0), 1, {"1.11": said("better", 100, 88)},
        lambda server: [server.store.forget_device(f"1.10 {n}") for n in range(12)],  # those that crashed
        {"1.11": said("no difference seen", 100, 100)}],
    "releases that appear together are compared in the order of their versions": [
        ("1.10", 100, 50), ("1.9", 100, 1), 1, {"1.10": said("worse", 50, 99), "1.9": None}],
    "a release is not compared with one that hardly anybody had": [
        ("1.0", 200, 2), 24, ("1.1", 19, 0), 24, ("1.2", 200, 40), 24, {"1.2": said("worse", 80, 99)},
        ("1.3", 60, 0), 24, {"1.3": said("better", 100, 80)}],  # 19 devices of 1.1 are enough, but 1.2 is nearer
    "one that a tenth had is enough, and the sum of other names is never compared": [
        ("(other)", 100, 0), 24, ("1.0", 200, 2), 24, ("1.1", 20, 10), 24, ("1.2", 200, 40), 24,
        {"(other)": None, "1.0": None, "1.2": said("better", 80, 50)}],
    "releases first seen more than 90 days ago are judged only if current": [
        ("1.0", 100, 4), 1, ("1.1", 100, 30), 1 + 89 * 24, ("1.2", 1, 0), {"1.1": said("worse", 70, 96)}, 24,
        {"1.1": None, "1.2": "too early: about 660 more devices needed"}, 90 * 24,
        ("1.2", 300, 300), 1, {"1.2": "too early: about 660 more devices needed"}],  # those came after its 90 days
    "the hours of the one before are rounded to full ones": [
        ("1.0", 100, 4), 2, ("1.0", 200, 200), 3.5, ("1.1", 100, 12), 2, {"1.1": said("better", 88, 0)}],
    "a verdict stays after its devices have expired": [
        ("1.0", 100, 4), 48, ("1.1", 100, 24), 22 * 24, lambda server: count(server, "device_versions") == 0,
        {"1.1": said("worse", 76, 96), "1.0": None}]}


@pytest.mark.parametrize("steps", RELEASES.values(), ids=RELEASES)
def test_a_release_is_judged_against_the_right_one_before_it_at_the_right_age(keeping, clock, steps):
    api = Api(keeping(10))
    for step in steps:
        api.server.store.prune()
        if isinstance(step, dict):
            found = verdicts(api)
            assert {version: found[version] for version in step} == step
        elif callable(step):
            assert step(api.server)
        else:
            play(api.server, clock, step)


def told_as_worse(server, clock, days=1):
    """Lets days pass, with an event on each. Returns the versions that have been reported as worse."""
    for _ in range(days):
        clock.move(A_DAY)
        add(server, type="custom")
    return [detail["app_version"] for kind, detail in facts_of(server) if kind == "release.worse"]


def test_a_worse_release_is_not_reported_if_it_is_the_newest_of_another_app_only(subscribed, clock):
    server = subscribed.server
    shop = backfeedr.sha256(server.store.create_app("Shop"))
    play(server, clock, ("1.0", 100, 4), ("1.0", 100, 4, shop), 24, ("1.1", 100, 4), ("1.1", 100, 50, shop), 1,
         ("1.2", 100, 4, shop))
    assert told_as_worse(server, clock) == []


def test_a_few_testers_of_the_next_version_do_not_hide_a_release_that_is_worse(subscribed, clock):
    server = subscribed.server
    play(server, clock, ("1.0", 100, 4), 24, ("1.1", 100, 30), 24, ("2.0", 5, 0))
    add(server, type="session_start", app_version="1.1", device_id_hash="1.1 0")
    add(server, exception_type="Beta", app_version="2.0", device_id_hash="2.0 0")
    clock.move(3600)
    add(server, type="custom")
    assert [(row["app_version"], (row["verdict"] or {}).get("word")) for row in server.metrics.current_releases()] \
        == [("1.1", "worse"), ("2.0", "too early")]
    assert told_as_worse(server, clock, days=0) == ["1.1"]
    first = server.metrics.attention("default")["first"]
    assert [(group["exception_type"], group["of_current"]) for group in first] == [("SIGABRT", 30), ("Beta", 1)]
    assert " 34 (30 current) " in Person(server).signed_in().text("/?app=default")
    send_devices(server, "2.0", 100, 60)
    assert told_as_worse(server, clock, days=2) == ["1.1", "2.0"]


def test_a_release_that_only_testers_had_is_told_as_worse_and_then_the_one_that_all_have(subscribed, clock):
    server = subscribed.server
    play(server, clock, ("1.0", 300, 3), 24, ("1.1", 5, 0), 1, ("2.0", 60, 30))
    for devices, crashed, told in ((5, 0, ["2.0"]), (300, 100, ["2.0", "1.1"])):
        send_devices(server, "1.1", devices, crashed)
        add(server, type="session_start", app_version="1.1", device_id_hash="1.1 0")
        assert told_as_worse(server, clock, days=2) == told
    sql_run(server, "update builds set first_seen = first_seen - 3600000")  # as an import of older reports does
    assert told_as_worse(server, clock) == ["2.0", "1.1"]
    sql_run(server, "update builds set first_seen = first_seen + 3600000")
    sql_run(server, "insert into state values ('worse_1', 5), ('worse_11 1.0', 5)")
    server.store.create_app("Shop")
    server.store.delete_app("default")
    assert sql(server, "select name from state where name like 'worse%'") == [("worse_11 1.0",)]


def test_the_newest_release_of_each_app_comes_before_the_most_used_ones(server, clock):
    for name in ("A", "B"):
        key = server.store.create_app(name)
        add(server, key=key, type="session_start", app_version="1.0", device_id_hash="d")
        clock.move(1)
        add(server, key=key, type="custom", app_version="2.0", device_id_hash="t")
    assert [(row["app"], row["app_version"]) for row in server.metrics.current_releases()] == [
        ("A", "2.0"), ("B", "2.0"), ("A", "1.0"), ("B", "1.0")]


@pytest.mark.parametrize("devices, crashed, is_reported", [(50, 15, True), (49, 15, False), (50, 8, False)])
def test_a_release_that_is_surely_worse_is_reported_once(
        subscribed, clock, monkeypatch, devices, crashed, is_reported):
    """It takes 50 devices. 8 of 50 are worse than 4 of 100, but with a look each hour, chance would do as much."""
    server = subscribed.server
    play(server, clock, ("1.0", 100, 4), 24, ("1.1", devices, crashed), 24)
    verdict = backfeedr.verdict(backfeedr.Health(devices, crashed), backfeedr.Health(100, 4))
    assert verdict["word"] == "worse"
    assert [row["verdict"] for row in subscribed.get("/api/v1/releases")[1]["releases"]] == [
        {**verdict, "before": "1.0"}, None]
    with monkeypatch.context() as failing:  # then a later commit reports it
        failing.setattr(Store, "_upkeep_step", raising(StorageUnavailable))
        add(server, type="custom")
    clock.move(1)
    for _ in range(3):
        add(server, type="custom")
        clock.move(3600)
    assert [detail for kind, detail in facts_of(server) if kind == "release.worse"] == [{
        "app_version": "1.1", "before": "1.0", "text": "worse: 70 % of devices crash-free, 96 % before"}] * is_reported
    server.store.delete_app("default")
    assert count(server, "state", "name like 'worse%'") == 0


def test_beyond_a_limit_the_builds_of_an_app_are_counted_as_one(keeping, monkeypatch):
    monkeypatch.setattr(backfeedr, "MAX_BUILDS_OF_APP", 5)
    server = keeping()
    for n in range(4):
        server.store.add(KEY_HASH, [parse_crash({**CRASH, "app_version": "1.0", "build_number": str(build)})
                                    for build in (2 * n, 2 * n + 1)])
    add(server, key=server.store.create_app("Shop"), app_version="1.0")
    assert sql(server, "select app_id, count(*) from builds group by app_id order by 1") \
        == [(1, 6), (2, 1)], "each release has one build for all others"
    assert POSTGRES or backfeedr._check_roll_ups(server.store.path)


# == Backfeedr =================================================================

def test_the_examples_of_the_reference_get_its_answers_and_are_stored_in_columns_of_the_same_names(api):
    assert api.get("/api/v1/health") == (200, {"status": "ok"})
    assert call(api.server, "HEAD", "/api/v1/health", b"") == (200, {})
    for path, name, more in ((CRASHES, "crash", {"group_hash": "acc0d2dfe0c1898c"}), (EVENTS, "event", {})):
        sent = json.loads((EXAMPLES / f"{name}.json").read_bytes())
        status, answer = api.post(path, sent)
        assert (status, answer) == (201, {"id": answer["id"], **more})
        times = {"occurred_at": parse_time(sent["occurred_at"]), "received_at": parse_time(NOW)}
        assert_columns(latest_row(api, path), {**sent, **times, "id": answer["id"], "extra": None})
    status, batch = api.post(BATCH, (EXAMPLES / "batch.json").read_bytes())
    assert (status, batch["count"]) == (201, 2) and all(id.startswith("evt_") for id in [answer["id"], *batch["ids"]])


@pytest.mark.parametrize("path, good, status, unreadable, error", [
    (CRASHES, CRASH, 201, b"{}", "missing exception_type"),
    (DIAGNOSTICS, {"crashDiagnostics": []}, 200, b"{}", "unknown report format")])
def test_checks_are_size_key_rate_signature_coding_json_in_order(serve, clock, path, good, status, unreadable, error):
    """Each request has all faults but those of the checks before."""
    api = Api(serve(rate_limit=1, max_body_size=1000))
    bad = {"X_Backfeedr_Timestamp": NOW, "X_Backfeedr_Signature": "sha256=0", "Content_Encoding": "br"}
    assert api.post(path, b"x" * 1001, key="nope", **bad)[0] == 413
    assert api.post(path, b"x", key="nope", **bad) == (401, {"error": "invalid API key"})
    assert api.post(path, good)[0] == status, "which uses up the rate limit"
    assert api.post(path, b"x", **bad)[0] == 429
    for body, headers, expected in (
            (b"x", bad, (401, "invalid signature")),
            (b"x", {"Content_Encoding": "br"}, (415, "unsupported content encoding")),
            (b"x", {}, (400, "invalid JSON" if path == CRASHES else error)), (unreadable, {}, (400, error))):
        clock.move(60)
        status, answer = api.post(path, body, **headers)
        assert (status, answer["error"]) == expected
        assert status != 415 or (answer["detail"], api.headers["Accept-Encoding"]) == ("gzip is supported", "gzip")
    assert count(api.server, "crashes") == (path == CRASHES)


@pytest.mark.parametrize("settings, limit", [({}, 1 << 20), ({"max_body_size": 1000}, 1000)])
def test_a_body_of_the_maximum_size_is_taken_and_a_byte_more_is_refused(serve, settings, limit):
    server, without_length = serve(**settings), {"environ": {"CONTENT_LENGTH": None, "wsgi.input_terminated": True}}
    for n, (form, pack) in enumerate(((ZIPPED, gzip.compress), ({}, bytes), (without_length, bytes)), 1):
        assert call(server, body=pack(VALID.ljust(limit)), **form)[0] == 201
        assert call(server, body=pack(VALID.ljust(limit + 1)), **form) == (413, {"error": "request body too large"})
        assert count(server, "crashes") == n


def test_every_valid_form_of_a_request_is_taken(api):
    marks = [{"Idempotency_Key": mark} for mark in ("\xff\xfe", "a, a", "x" * 30_000, "\x00")]
    as_curl_sends_it = {"environ": {"CONTENT_TYPE": "application/x-www-form-urlencoded"}}
    for n, request in enumerate([
            as_curl_sends_it, {"Content_Encoding": "identity"},
            *[{"body": GZIPPED, "Content_Encoding": name} for name in ("gzip", "x-gzip", "GZIP")],
            *[{"body": body, **headers, "X_Backfeedr_Timestamp": when, "X_Backfeedr_Signature": sign(body, when)}
              for body, headers in ((VALID, {}), (GZIPPED, ZIPPED))  # it covers the bytes as sent
              for when in (NOW, "2026-03-12T14:30:00.123456789Z", "2026-03-12T15:30:00+01:00")], *marks], 1):
        status, answer = call(api.server, **request)
        assert status == 201 and (request not in marks or call(api.server, **request) == (200, answer)), request
        assert len(stored(api.server, "crashes")["crashes"]) == n


def mounted(app, prefix):
    """The app, mounted under a prefix of another app."""
    host = backfeedr.bottle.Bottle()
    host.route("/", callback=lambda: "host")
    host.mount(prefix, app)
    return host


def test_a_mounted_app_answers_under_its_prefix_and_counts_only_its_own_requests(server):
    api = Api(mounted(server, "/deep"), "/deep")
    status, answer = api.post(CRASHES, CRASH)
    assert (status, report(server)["id"]) == (201, answer["id"])
    assert api.get("/api/v1/health") == (200, {"status": "ok"})
    assert api.get("/nothing") == (404, {"error": "not found"})
    assert call(server, "GET", "", b"", environ={"SCRIPT_NAME": "/deep", "PATH_INFO": None})[0] == 303  # to sign in
    home = api.web.get("/")
    assert (home.text, home.content_type) == ("host", "text/html")
    assert requests_counted(api) == {("POST", CRASHES, "201"): 1, ("GET", "/api/v1/health", "200"): 1,
                                     ("other", "other", "404"): 1, ("GET", "/", "303"): 1}


def test_two_instances_share_nothing(serve):
    one, two = Api(serve("one.db", rate_limit=1)), Api(serve("two.db", api_key="cl\u00e9"))
    key = "cl\u00e9".encode().decode("latin-1")  # as a web server gives the header
    assert one.post(CRASHES, CRASH)[0] == 201
    assert two.post(CRASHES, CRASH) == (401, {"error": "invalid API key"})
    assert [two.post(path, body, key=key)[0] for path, body in ((CRASHES, CRASH), (EVENTS, EVENT))] == [201, 201]
    assert one.post(CRASHES, CRASH)[0] == 429
    assert [(count(api.server, "crashes"), count(api.server, "events")) for api in (one, two)] == [(1, 0), (1, 1)]


def test_importing_starts_nothing(tmp_path):
    code = "import threading, os, backfeedr; assert (threading.active_count(), os.listdir('.')) == (1, [])"
    environ = {**os.environ, "PYTHONPATH": str(SERVER.parent), "BACKFEEDR_PORT": "nonsense",
               "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ, check=True)


@pytest.fixture
def start(tmp_path):
    """Starts servers on a database that is new to the first of them; `start.texts` has what they announced."""
    def start_server(**settings):
        return Backfeedr(Settings(db_path=str(tmp_path / "first.db"), **settings), announce=start_server.texts.append)

    start_server.texts = []
    return start_server


def test_settings_come_from_the_environment_unless_given(start, tmp_path, monkeypatch):
    monkeypatch.setenv("BACKFEEDR_API_KEY", KEY)
    with Backfeedr(db_path=str(tmp_path / "a.db"), announce=lambda text: None) as one, start() as other:
        assert [Api(server).post(CRASHES, CRASH)[0] for server in (one, other)] == [201, 401]
    with pytest.raises(TypeError):
        Backfeedr(Settings(), port=1)


@pytest.mark.parametrize("url", ["", "https://example.com/a/"])
def test_a_first_start_makes_a_key_and_a_token_and_announces_them_once(start, url):
    for _ in range(2):
        start(public_metrics=False, public_url=url).close()
    text, = start.texts
    key, token = re.findall("(?m)^    (bf_(?:live|admin)_[0-9a-f]{32})$", text)
    with start(public_metrics=False) as server:
        assert Api(server).post(CRASHES, CRASH, key=key)[0] == 201
        assert Api(server).get("/api/v1/overview", Authorization=f"Bearer {token}")[0] == 200
    assert len(start.texts) == 1 and f"X-Backfeedr-Key: {key}" in text and ("127.0.0.1" in text) == (not url)
    assert f"curl -X POST {url or 'http://127.0.0.1:8080/'}api/v1/crashes " in text


def test_secrets_of_the_settings_are_used_and_not_announced(start):
    for settings, token, other in (({"api_key": "mine"}, "token" * 4, "mine"), ({}, "new" * 6, "token" * 4)):
        with start(auth_token=token, **settings) as server:
            assert server.store.is_secret("admin_token", token.encode())
            assert not server.store.is_secret("admin_token", other.encode())
            assert Api(server).post(CRASHES, CRASH, key="mine")[0] == 201
    assert start.texts == []


def test_a_database_with_an_app_gets_no_default_one(start, tmp_path):
    with Store(str(tmp_path / "first.db")) as store:
        store.create_app("Shop")
    with start() as server:
        assert [app.name for app in server.store.apps()] == ["Shop"]
    assert "bf_admin_" in start.texts[0] and "bf_live_" not in start.texts[0]


def test_requests_that_the_rate_limit_refuses_are_shown_on_the_overview_in_the_log_and_in_metrics(serve, clock, caplog):
    api = Api(serve(rate_limit=2))
    shop = api.server.store.create_app("Shop")
    for key, times in ((KEY, 2), (shop, 5)):
        statuses = [api.post(BATCH, {"events": [EVENT] * 2}, key=key)[0] for _ in range(times)]
    assert statuses == [201, 201, 429, 429, 429]
    assert [record.message for record in caplog.records] == ["The rate limit refused 1 request of Shop today."]
    assert scraped(api)['rate_limited_total{app="Shop"}'] == 3
    person = Person(api.server).signed_in()
    assert "The rate limit refused 3 requests of Shop today." in person.get("/")
    assert "refused" not in person.get("/?app=default")
    clock.move(86_400)
    assert "refused" not in person.get("/")


def test_a_slash_at_the_end_of_a_path_makes_no_difference(api):
    for method, path, status in (("GET", "/api/v1/health/", 200), ("PUT", CRASHES + "/", 405),
                                 ("PUT", EVENTS + "/", 405), ("GET", "/api/v1/overview/", 200),
                                 ("GET", "/api/v1/health//", 404)):
        assert call(api.server, method, path, b"")[0] == status, path
    assert api.post(CRASHES + "/", CRASH)[0] == api.post(BATCH + "/", {"events": [EVENT]})[0] == 201


def test_under_another_web_server_the_first_curl_line_has_no_port(tmp_path, capsys):
    with Backfeedr(Settings(db_path=str(tmp_path / "first.db"))):
        text = capsys.readouterr().err
    assert "curl -X POST https://YOUR-SERVER/api/v1/crashes" in text and ":8080" not in text


# -- Apple's reports, by HTTP

NOTHING = {"count": 0, "ids": [], "group_hashes": []}


def send_apples(api, body, **headers):
    """Sends a body of Apple's and returns the ids of its reports."""
    status, answer = api.post(DIAGNOSTICS, body, **headers)
    assert status == 201 and answer["count"] == len(answer["ids"]) == len(answer["group_hashes"])
    return answer["ids"]


def test_a_payload_becomes_crashes_and_events_in_its_order_in_one_commit(api):
    status, answer = api.post(DIAGNOSTICS, MIXED, X_Backfeedr_Device="d1")
    path, kept = api.server.store.path, "id, name, app_version, device_id_hash"
    crashes = sql(path, "select id, exception_type, app_version, device_id_hash from crashes order by seq")
    events = sql(path, f"select {kept} from events order by seq")
    assert [row[1:] for row in crashes] == [("EXC_BREAKPOINT", "1.2.0", "d1"), ("Memory exception", "1.1", "d1")]
    assert [row[1:] for row in events] == [("Hang", "1.2.0", "d1"), ("CPU exception", "1.2.0", "d1")]
    groups = [group for group, in sql(path, "select group_hash from crashes order by seq")]
    assert (status, answer) == (201, {"count": 4, "ids": [row[0] for pair in zip(events, crashes) for row in pair],
                                      "group_hashes": [None, groups[0], None, groups[1]]})
    assert sorted(answer["ids"], key=lambda id: id[-16:]) == answer["ids"]
    assert commits_of(api.server.store)[0] == 1


def test_a_payload_without_diagnostics_is_taken_and_nothing_is_stored(api):
    before = stored(api.server)
    for body in map(json.dumps, (SPAN, {"crashDiagnostics": []}, {**SPAN, "hangDiagnostics": None}, {"timeRange": {}},
                                 {"fooDiagnostics": [{}, {"callStackTree": 1}]})):
        body = body.encode()
        for headers in ({}, UNDER_A, UNDER_A, ZIPPED, signed(NOW, DIAGNOSTICS, body)[2]):
            sent = gzip.compress(body) if headers is ZIPPED else body
            assert api.post(DIAGNOSTICS, sent, **headers) == (200, NOTHING)
    assert api.post(DIAGNOSTICS, body, key="nope") == (401, {"error": "invalid API key"})
    assert stored(api.server) == before
    send_apples(api, MIXED, **UNDER_A)  # the idempotency key was not used up


def test_the_format_is_recognised_by_the_content_whatever_its_type_and_coding(api):
    types = [None, "", "application/json", "text/plain; charset=latin-1", "application/octet-stream",
             "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "\xff"]
    for n, body in enumerate((ips_of(), crash_text(), json.dumps(payload_of()).encode()), 1):
        for content_type, coding, pack in [*((kind, {}, bytes) for kind in types), ("\xff", ZIPPED, gzip.compress)]:
            status, answer = call(api.server, path=DIAGNOSTICS, body=pack(body),
                                  environ={"CONTENT_TYPE": content_type}, **coding)
            assert (status, answer["count"]) == (201, 1)
        rows = sql(api.server, "select group_hash, stack_trace, extra from crashes")
        assert (len(rows), len(set(rows))) == (9 * n, n)


def test_a_header_names_the_device_of_all_reports_in_a_body(api):
    for header, device in (
            (None, None), ("", None), ("d1", "d1"), ("x" * 500, "x" * 500), ("x" * 501, "x" * 500),
            ("y" * 20_000, "y" * 500), ("cl\xc3\xa9", "cl\u00e9"), ("\xff\xfe", "\ufffd\ufffd"), ("a\x00b", "a\ufffdb"),
            ("a, b", "a, b"), ("\xed\xa0\x80", "\ufffd" * 3), ("/Users/ann/x", "/Users/ann/x")):
        status, answer = call(api.server, path=DIAGNOSTICS, body=MIXED_BYTES, X_Backfeedr_Device=header)
        assert status == 201
        devices = dict(sql(api.server, """
            select id, device_id_hash from crashes union all select id, device_id_hash from events"""))
        assert {devices[id] for id in answer["ids"]} == {device}, header


def test_an_unreadable_body_is_refused_whole_with_the_reason(api):
    before = stored(api.server)
    for body, text, detail in UNREADABLE:
        answer = api.post(DIAGNOSTICS, body, **UNDER_A)
        assert answer == (400, {"error": text, **({"detail": detail} if detail else {})}), body[:100]
    assert api.post(DIAGNOSTICS, {**MIXED, "diskWriteExceptionDiagnostics": [7]})[0] == 400
    assert stored(api.server) == before
    assert len(send_apples(api, {"crashDiagnostics": [{}] * 60, "hangDiagnostics": [{}] * 40})) == 100


def test_a_call_stack_of_thousands_of_frames_is_stored_and_shown(api):
    id_, = send_apples(api, nest(3000))
    kept, = api.get(f"{CRASHES}/{report(api.server)['group_hash']}", **ADMIN)[1]["reports"]
    assert (kept["id"], kept["extra"]["truncated"], len(kept["stack_trace"])) == (id_, ["stack_trace"], 512)


@sqlite_only
@pytest.mark.parametrize("body", [
    ips_of(asi={"x": ["Fatal error: /Users/ann/Shop/Cart.swift, /home/ann/x"]}),
    crash_text(("Triggered by", "Application Specific Information:\nin /Users/ann/x, /home/ann/x\n\nTriggered by")),
    payload_of(meta={**META, "x": "/Users/ann/y"})], ids=["ips", "crash", "json"])
def test_nothing_that_identifies_a_phone_or_a_person_reaches_the_disk(api, body):
    send_apples(api, body)
    files = list(api.server.store.path.parent.glob(api.server.store.path.name + "*"))
    content = b"".join(path.read_bytes() for path in files)
    assert len(files) >= 2 and SHOP.encode() in content and b"/Users/USER" in content
    assert not [word for word in (b"-secret", b"/ann", b"4711", b"/private", b"Shop.app", b"Application/")
                if word in content]


# -- Prometheus

def scraped(api):
    """The values of /metrics by their names and labels. Each name has a help text and a type."""
    answer = api.web.get(api.prefix + "/metrics", headers=ADMIN)
    assert (answer.status_int, answer.content_type) == (200, "text/plain")
    assert "version=0.0.4" in answer.headers["Content-Type"]
    lines = answer.text.splitlines()
    samples = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    families = [re.sub("(_sum|_count)?([{].*)?$", "", name) for name in samples]
    for word in ("HELP", "TYPE"):
        assert [line.split()[2] for line in lines if line.startswith(f"# {word} ")] == list(dict.fromkeys(families))
    return {name.replace("backfeedr_", "", 1): float(value) for name, value in samples.items()}


def requests_counted(api):
    """How often each method, path and status was counted."""
    return {tuple(re.findall('"(.*?)"', name)): count for name, count in scraped(api).items()
            if re.fullmatch('requests_total{method="[^"]*",path="[^"]*",status="[^"]*"}', name)}


def test_requests_are_counted_by_route_and_status_and_not_by_path(api):
    for key in (KEY, "nobody's"):
        api.post(CRASHES, CRASH, key=key)
    for path in (CRASHES + "/1", CRASHES + "/2", "/nothing", "/nothing/else", BATCH):
        api.get(path, **ADMIN)
    expected = {("POST", CRASHES, "201"): 1, ("POST", CRASHES, "401"): 1, ("GET", CRASHES + "/<group_hash>", "404"): 2,
                ("other", "other", "404"): 2, ("other", "other", "405"): 1}
    assert requests_counted(api) == expected
    assert requests_counted(api) == {**expected, ("GET", "/metrics", "200"): 1}


@sqlite_only
def test_metrics_have_commits_rows_and_sizes(serve):
    api, other = Api(serve()), Api(serve())
    api.server.store._process.commit_seconds = 100.0
    for path, body in ((CRASHES, CRASH), (BATCH, {"events": [EVENT] * 5}), (BATCH, {"events": [EVENT, {}]})):
        api.post(path, body)
    samples = scraped(api)
    assert {name: value for name, value in samples.items() if not re.match("requests|.*_seconds|.*_bytes", name)} == {
        "commit_requests_sum": 2, "commit_requests_count": 2, "waiters": 0, "crashes_kept": 1,
        'reports_stored_total{table="crashes"}': 1, 'reports_stored_total{table="events"}': 5}
    assert samples["commit_seconds_count"] == 2 and 100 < samples["commit_seconds_sum"] < 110
    for name, suffix in (("file_bytes", ""), ("wal_bytes", "-wal")):
        assert samples[name] == os.stat(f"{api.server.store.path}{suffix}").st_size > 0
    other.get("/api/v1/health")
    assert scraped(other)["commit_requests_count"] == 0, "it counts only its own commits"


# == Hostile input =============================================================
#
# Requests that a stranger may send, beyond the bodies of the Payloads section: each gets its answer and stores
# nothing. Then random mutations of valid requests, with a fixed seed.

def environ_of(method="POST", path=CRASHES, body=VALID, query="", length=None, environ=None, **headers):
    """The environ of a request, as a web server makes it. Values of None are left out."""
    headers = {"HTTP_" + name.upper(): value for name, value in {"X_Backfeedr_Key": KEY, **headers}.items()}
    request = {"REQUEST_METHOD": method, "SCRIPT_NAME": "", "PATH_INFO": path, "QUERY_STRING": query,
               "CONTENT_LENGTH": str(len(body) if length is None else length), "CONTENT_TYPE": "application/json",
               "wsgi.input": io.BytesIO(body), "wsgi.errors": sys.stderr, **headers, **(environ or {})}
    return {name: value for name, value in request.items() if value is not None}


def answer_to(server, environ):
    """The status, the headers and the JSON of an answer."""
    method, path, answers = environ["REQUEST_METHOD"], environ.get("PATH_INFO", ""), []
    content = b"".join(server(environ, lambda line, headers, exc_info=None: answers.append((line, dict(headers)))))
    (line, sent), = answers
    status = int(line[:3])
    if path in ("", "/") and sent["Content-Type"].startswith("text/html"):  # the only page that these tests ask for
        return status, sent, {}
    assert (sent["Content-Type"], sent["X-Content-Type-Options"], sent["Cache-Control"]) \
        == ("application/json", "nosniff", "no-store")
    if method == "HEAD":
        return status, sent, content or {}
    assert int(sent["Content-Length"]) == len(content)
    return status, sent, json.loads(content)


def call_with_headers(server, *arguments, **headers):
    return answer_to(server, environ_of(*arguments, **headers))


def call(server, *arguments, **headers):
    """The status and the JSON of an answer."""
    return call_with_headers(server, *arguments, **headers)[::2]


TYPED = {"method": "GET", "body": b""}
BEARER = {**TYPED, "path": EVENTS, "Authorization": "Bearer " + TOKEN}
ONE_GROUP = CRASHES + "/" + "0" * 16
NOT_JSON, NOT_FOUND, TOO_LARGE = (400, "invalid JSON"), (404, "not found"), (413, "request body too large")
BAD_TIME, BAD_SIGNATURE = (400, "invalid timestamp"), (401, "invalid signature")

HOSTILE_REQUESTS = [  # the answer, the request, a part of it, and the values of this part that get the answer
    # wrong lengths; bodies that are cut, too long, or too long after decompression
    ((400, "invalid Content-Length"), {}, "length", [
        1000, "-1", "+5", "1e3", "0x10", "5, 5", "\u00b2", "\u0661", " 5", "5\n", "five"]),
    (NOT_JSON, {}, "length", [10, 0, ""]), (TOO_LARGE, {}, "length", [10_001, "9" * 5000]),
    *[(NOT_JSON, {"path": path}, "body", [body[:size] for size in range(len(body))]) for path, body in (
        (CRASHES, (EXAMPLES / "crash.json").read_bytes().strip()), (BATCH, batch_of(EVENT, EVENT)))],
    (TOO_LARGE, ZIPPED, "body", [gzip.compress(b" " * size) for size in (1_000_000, 10_000_000)]),
    (NOT_JSON, ZIPPED, "body", [gzip.compress(gzip.compress(b" " * 1_000_000))]),
    # not gzip, cut, damaged, or with something after the first member: every gzip library writes just one
    ((400, "invalid gzip body"), ZIPPED, "body", [
        b"", b"\x1f\x8b", b"{}", VALID, GZIPPED[:-1], GZIPPED[:-8], GZIPPED[:12], GZIPPED + b"\x00", GZIPPED + b"x",
        GZIPPED * 2, GZIPPED[:-8] + bytes(4) + GZIPPED[-4:], GZIPPED[:20] + b"\xff\xff" + GZIPPED[22:],
        b"\x1f\x8b\x08\xff" + GZIPPED[4:], zlib.compress(VALID)]),
    ((415, "unsupported content encoding"), {}, "Content_Encoding", [
        "br", "deflate", "zstd", "gzip, gzip", "gzip,", "x", "\xfc", "g\u00fczip", "identity, gzip", "\xff" * 99]),
    # headers beyond ASCII, doubled, empty, long
    ((401, "invalid API key"), {}, "X_Backfeedr_Key", [
        "nope", KEY[:-1], KEY + "0", KEY + ", " + KEY, KEY + "\xff", "\xfc", "\xc3\xbc", "\u0130", "\U0001f511",
        KEY + "\x00", KEY.upper(), "x" * 30_000]),
    ((401, "missing API key"), {}, "X_Backfeedr_Key", [None, ""]),
    (BAD_TIME, SIGNED, "X_Backfeedr_Timestamp", [
        None, "", "now", "\xff", "\xfc", NOW + ", " + NOW, NOW + "\n", NOW[:-1], "0000-01-01T00:00:00Z",
        "2026-02-30T00:00:00Z", "2026-03-12T14:30:60Z", "2026-03-12T14:30:00+24:00", "1773325800",
        "\uff12026-03-12T14:30:00Z", "9" * 5000]),
    (BAD_TIME, {"X_Backfeedr_Signature": ""}, "X_Backfeedr_Timestamp", [""]),
    (BAD_SIGNATURE, SIGNED, "X_Backfeedr_Timestamp", [
        "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-23:59", "2026-03-12T15:30:00+01:00"]),
    (BAD_SIGNATURE, SIGNED, "X_Backfeedr_Signature", [
        None, "", "\xff", "\xfc", "sha256=", "sha256=\u00e9", SIGNATURE[7:], SIGNATURE[:7] + SIGNATURE[7:].upper(),
        SIGNATURE * 2, SIGNATURE + ", " + SIGNATURE, "sha1=" + "0" * 40, "sha256=" + "0" * 64, "x" * 30_000]),
    (BAD_SIGNATURE, {"X_Backfeedr_Timestamp": "2026-03-12T14:22:31Z"}, "X_Backfeedr_Signature", [None, ""]),
    *[request for path in (EVENTS, "/metrics") for request in (
        ((401, "missing admin token"), {**TYPED, "path": path}, "Authorization", [
            None, "", "Bearer", "Bearer ", TOKEN, "Basic " + TOKEN, "B\xe9arer " + TOKEN, "Bearer\x00" + TOKEN]),
        ((401, "invalid admin token"), {**TYPED, "path": path}, "Authorization", ["Bearer " + token for token in (
            "x", KEY, "\xff", TOKEN + ", Bearer " + TOKEN, TOKEN + "\xff", TOKEN[:-1], "x" * 30_000)]))],
    # paths and methods
    (NOT_FOUND, TYPED, "path", [
        "/nothing", "/api/v1", "/api/v1/", "/api/v1/nope", "/api/v2/health", "/api/v1//health", "/api/v1/../v1/health",
        "/api/v1/health//", "/api//v1/health", "//api/v1/health", "/api/v1/./health", "/api/v1/x/../health",
        "/../../etc/passwd", "/api/v1/health\x00", "/api/v1/health\n", "/api/v1/health\xff", "/api/v1/health\xc3\xa4",
        "/API/V1/HEALTH", "api/v1/health", "/api/v1/health;a=1", "/api/v1/metrics", "/api/v1/metrics/nope",
        "/api/v1/\u0130", "/" + "x" * 30_000, "/" * 1000]),
    (NOT_FOUND, BEARER, "path", [f"{CRASHES}/{group}" for group in (
        "0" * 16, "0123456789abcdef", "..", "\x00", "'", "*", "\xc3\xa4", "%", "x" * 30_000)]),
    *[((405, "method not allowed", allowed), {"path": path, "body": b""}, "method", methods)
      for paths, allowed, methods in (
          ([CRASHES], "GET,POST", ["PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "ANY", "PROXY", "", "\xff",
                                   "X" * 5000]),
          ([EVENTS], "GET,POST", ["PUT"]), ([BATCH], "POST", ["GET"]),
          ([ONE_GROUP], "GET,PATCH", ["POST", "PUT", "DELETE", "OPTIONS"]),
          ([*METRICS, "/api/v1/health", "/metrics"], "GET", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"]))
      for path in paths],
    # query strings
    *[((status, text), {**BEARER, "path": path}, "query", [f"{name}={value}" for value in values])
      for paths, status, text, name, values in (
          ([*METRICS, CRASHES], 400, "invalid days", "days", [
              "", "0", "-1", "366", "1.5", "1e2", "x", "NaN", "00001", "9" * 5000, "%00", "7%00", "7%0A", "\xb2",
              "%d9%a1", "%ff", "+7", "7,7", "7&days=x", "1&days=0"]),
          (LISTS, 400, "invalid limit", "limit", ["", "0", "101", "-1", "1000", "x", "%F0"]),
          ([EVENTS, ONE_GROUP, LISTS[2]], 400, "invalid cursor", "cursor", [
              "x", "0", "evt_", "evt_8" + "0" * 15, "g" * 16, "0" * 15, "0" * 17, "0" * 16 + "%0A", "%00", "-1",
              "9" * 5000]),
          ([CRASHES], 400, "invalid cursor", "cursor", [
              "x", "0", "1-", "-" + "0" * 16, "9" * 19 + "-" + "0" * 16, "1-" + "0" * 15, "1-" + "G" * 16,
              "1-" + "0" * 16 + "%0A", "1--" + "0" * 16, "evt_" + "0" * 16, "9" * 5000]),
          ([*METRICS, *LISTS], 404, "not found", "app", [
              "nope", "DEFAULT", "default%00", "default%20", "%00", "%ff", "\xff", "'%20or%201=1", "' or 1=1 --",
              "x" * 30_000, "default&app=nope"])) for path in paths]]


def test_a_hostile_request_gets_its_answer_and_changes_nothing(serve, caplog):
    api = Api(serve(rate_limit=0, max_body_size=10_000))
    api.post(CRASHES, {**crash_at(NOW), "device_id_hash": "d", "app_version": "1.0"})
    api.post(EVENTS, start_at(NOW, "s", device_id_hash="d"))
    before = stored(api.server)
    for (expected, text, *allowed), request, part, values in HOSTILE_REQUESTS:
        for value in values:
            what = {**request, part: value}
            status, headers, answer = call_with_headers(api.server, **what)
            assert (status, answer["error"]) == (expected, text), what
            assert [",".join(sorted(headers[name].split(","))) for name in headers if name == "Allow"] == allowed, what
        assert stored(api.server) == before, (request, part)
    assert call(api.server)[0] == 201, "the server still works"
    assert caplog.records == []


def test_an_unexpected_error_is_logged_without_anything_from_the_request(api, caplog, monkeypatch):
    """A traceback shows lines of code, but not the values of variables."""
    def parse(body, token=TOKEN):
        return {}[len(body)]
    monkeypatch.setattr(backfeedr, "parse_crash", parse)
    before = stored(api.server)
    headers = {**SIGNED, **ADMIN, "Idempotency_Key": "private-mark"}
    assert call(api.server, query="private=1", **headers) == (500, {"error": "internal server error"})
    assert stored(api.server) == before
    record, = caplog.records
    assert (record.name, record.exc_info[0]) == ("backfeedr", KeyError) and "in parse" in caplog.text
    for secret in (KEY, TOKEN, "private", "SIGABRT", SIGNATURE):
        assert secret not in caplog.text
    monkeypatch.undo()
    assert call(api.server)[0] == 201


# -- Hostile input: mutations of valid requests, from a fixed seed

ODD_VALUES = [
    None, True, False, 0, -1, 1, 1 << 63, -(1 << 64), 10 ** 400, 0.5, -0.0, 1e308, 5e-324, "", " ", "x", "x" * 501,
    "\x00", "\ud800", "\udc00\ud800", "\uffff", "\U0001f600" * 300, "'", '"', "</script>", "%s", "NaN", "custom", NOW,
    "0001-01-01T00:00:00Z", "9999-12-31T23:59:59-23:59", "2026-03-12T14:22:60Z", [], {}, [None], {"": {}}, ["x"] * 101,
    *map(nested, (2, 3, 61, 64, 65, 250)), *([EVENT] * count for count in (1, 50, 101))]
ODD_TEXTS = [KEY, TOKEN, NOW, "default", "\ud800", "\t", "1e9", "365", "a, b", "../..", "%s", *dict.fromkeys(
    value for *_, values in HOSTILE_REQUESTS for value in values if type(value) is str and len(value) < 6000)]
FUZZ_PATHS = [*METRICS, CRASHES, EVENTS, BATCH, DIAGNOSTICS, SYMBOLS, f"{SYMBOLS}/{HELD}", "/api/v1/health",
              f"{CRASHES}/{group_hash('SIGABRT', [])}"]
FUZZ_HEADERS = ["X_Backfeedr_Key", "X_Backfeedr_Timestamp", "X_Backfeedr_Signature", "X_Backfeedr_Device",
                "Idempotency_Key", "Content_Encoding", "Authorization", "Transfer_Encoding", "Host"]
FUZZ_POSTS = [*[(path, (EXAMPLES / f"{name}.json").read_bytes()) for path, name in (
                  (CRASHES, "crash"), (EVENTS, "event"), (BATCH, "batch"))],
              *[(DIAGNOSTICS, body) for body in (MIXED_BYTES, ips_of(), crash_text())]]
FITTING = {"path": FUZZ_PATHS, "method": ["GET", "HEAD", "POST", "PUT"], "Content_Encoding": ["gzip", "identity"],
           "Idempotency_Key": ["a", "b"]}
# Texts that the server may answer; `invalid` and `missing` are followed by a part of the request.
REFUSALS = {
    400: "invalid JSON|(missing (exception_type|occurred_at|type|events)|invalid (event|event type|events|JSON|"
         f"{'|'.join([*backfeedr.Crash._fields, *backfeedr.Event._fields])}))( at index [0-9]{{1,2}})?"
         "|too many events: at most 100|invalid (timestamp|gzip body|Content-Length|days|limit|cursor)"
         "|unknown report format|unsupported bug_type [0-9]{1,9}|too many diagnostics: at most 100|too many symbols"
         "|invalid (symbols|uuid)",
    **{status: "|".join(map(re.escape, texts)) for status, texts in backfeedr.ERRORS.items()
       if status not in (403, 429, 431, 500, 501, 503)}}


class Mutations:
    """Makes mutations of valid requests. The same seed makes the same requests."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.pick = self.random.choice

    def request(self):
        path, body = self.pick([*FUZZ_POSTS, (DIAGNOSTICS, apple_mutant(self))])
        build = self.pick([SHOP, KIT, MALLOC, UUID(int=self.random.randrange(1 << 20))])
        page = json.dumps({**PART, "pages": [{**PAGE, "first": 0}]}).encode()
        report = {"method": "POST", "path": path, "body": body}
        request = dict(self.pick([
            *[report] * 4, *[{**report, "X_Backfeedr_Timestamp": NOW, "X_Backfeedr_Signature": sign(body)}] * 2,
            *[{**BEARER, "path": self.pick(FUZZ_PATHS)}] * 2,
            {**BEARER, "method": "PUT", "path": f"{SYMBOLS}/{build}", "body": page}]))
        for _ in range(self.random.randint(1, 3)):
            self.pick([self.change_json, self.change_json, self.change_bytes, self.change_coding,
                       *[self.change_text] * 3])(request)
        return request

    def change_json(self, request):
        """Replaces, adds or deletes a value somewhere in the JSON."""
        try:
            whole = json.loads(request["body"])
        except (ValueError, RecursionError):
            return
        place, where = self.pick([*places(whole), (None, None)])
        if place and self.random.random() < 0.2:
            del place[where]
        elif place:
            names = ["x", "", "events", "batch", "extra", "type", "seq", "\x00"] if type(place) is dict else [where]
            place[self.pick([where, where, self.pick(names)])] = self.pick(ODD_VALUES)
        request["body"] = json.dumps(whole, ensure_ascii=self.random.random() < 0.8).encode("utf-8", "surrogatepass")

    def change_bytes(self, request):
        body, where = request["body"], self.random.randrange(len(request["body"]) + 1)
        some = self.random.randbytes(self.random.randint(0, 5)) * self.pick([1, 1, 1000])
        request["body"] = body[:where] + some + body[where + self.pick([0, 1, 5, 100]):]

    def change_coding(self, request):
        request["Content_Encoding"] = self.pick(["gzip", "gzip", "gzip", "GZIP", "deflate", "identity"])
        times = min(self.pick([1, 1, 1, 3000]), 1_000_000 // (len(request["body"]) + 1) + 1)  # this may be called twice
        request["body"] = gzip.compress(request["body"] * times, compresslevel=1, mtime=0)

    def change_text(self, request):
        """Changes the method, the path, the query, the length, or a header."""
        part, odd = self.pick(["method", "path", "query", "length", self.pick(FUZZ_HEADERS)]), self.pick(ODD_TEXTS)
        before = str(request.get(part) or {"length": len(request["body"]), "X_Backfeedr_Key": KEY}.get(part, ""))
        where = self.random.randrange(len(before) + 1)
        request[part] = self.query() if part == "query" and self.random.random() < 0.4 else self.pick([
            odd, before[:where] + odd + before[where:], before[:where] + before[where + 1:], before + ", " + before,
            before + "/", before.upper(), "", *FITTING.get(part, [])])

    def query(self):
        names = self.random.choices(["app", "days", "limit", "cursor", "version", "type", "name", "session_id", ""],
                                    k=self.pick([1, 2, 50]))
        return self.pick("&&&;").join(name + self.pick("==== ") + self.pick(ODD_TEXTS) for name in names)


def places(value):
    """Yields the place of each value within this one: its container, and its name or index there."""
    for where in value if type(value) is dict else range(len(value)) if type(value) is list else ():
        yield value, where
        yield from places(value[where])


@pytest.mark.slow
def test_random_requests_get_documented_answers_and_leave_the_database_sound(serve, caplog):
    server = serve(rate_limit=0, max_body_size=100_000)
    mutations, statuses = Mutations(seed=2), Counter()
    for n in range(3000):
        request = mutations.request()
        status, answer = call(server, **request)
        statuses[status] += 1
        if request["method"] != "HEAD" and (status, request["path"]) not in ((303, ""), (303, "/")):
            refused = {*answer} <= {"error", "detail"} and re.fullmatch(
                REFUSALS.get(status, "$"), answer.get("error", "?"))
            assert status in (200, 201) and "error" not in answer or refused, (n, status, answer, request)
    assert set(statuses) == {200, 201, 303, 400, 401, 404, 405, 413, 415, 422}, statuses
    assert caplog.records == [] and call(server)[0] == 201
    wait_for_catch_up()
    assert all(len(rows) > 50 for rows in stored(server, "crashes", "events").values())
    assert count(server, "symbols") > 10 and count(server, "group_aliases") > 0


# == Dashboard =================================================================

PAGES = ["/", "/crashes", "/usage", "/events", "/releases", "/apps"]
HTML = {"Accept": "text/html,application/xhtml+xml"}
SIGN_IN = urlencode({"token": TOKEN, "form_token": backfeedr.sha256("form").hex()})  # from a browser without a cookie


def assert_tags_are_closed(page):
    open_tags = []
    for slash, tag, is_empty in re.findall("<(/?)([a-z][a-z0-9]*)[^>]*?(/?)>", page):
        if slash:
            assert open_tags and open_tags.pop() == tag, (tag, open_tags)
        elif not is_empty and tag not in ("meta", "link", "input"):
            open_tags.append(tag)
    assert open_tags == []


def cookie_of(server):
    return "backfeedr_" + server.store.secret_hash("admin_token").hex()[:8]


class Person:
    """A person with a browser, not signed in yet."""

    def __init__(self, server, prefix=""):
        self.server, self.prefix = server, prefix
        self.web = webtest.TestApp(mounted(server, prefix) if prefix else server)

    def get(self, path, status=200, **headers):
        answer = self.web.get(self.prefix + path, headers={**HTML, **headers}, status=status)
        assert_tags_are_closed(answer.text)
        return answer

    def text(self, path):
        """Returns the text of a page, without tags."""
        text = re.sub("<style>.*?</style>|<[^>]*>", " ", self.get(path).text, flags=re.S)
        return " ".join(html.unescape(text).split())

    def post(self, path, status, **fields):
        return self.web.post(path, fields, headers=HTML, status=status)

    def sign_in(self, token=TOKEN):
        return send(forms_of(self.get("/", 303).follow(headers=HTML))[0], token=token).follow(headers=HTML)

    def signed_in(self):
        """Signs in with a single request."""
        self.get(self.server.pages.invite(""), 303)
        return self

    def submit(self, action, status=200, **values):
        """Submits the form of the Apps page that has this action and the given values in its hidden fields."""
        for form in forms_of(self.get("/apps")):
            hidden = {name: field.value for name, (field, *_) in form.fields.items()
                      if field.attrs.get("type") == "hidden"}
            wanted = {**hidden, "action": action, **values}
            if "action" in hidden and all(wanted[name] == value for name, value in hidden.items()):
                return send(form, status, **values)
        raise AssertionError("there is no such form")


def forms_of(page):
    """Returns the same as `page.forms`, which is slow."""
    return [webtest.forms.Form(page, text) for text in re.findall("<form.*?</form>", page.text, re.S)]


def send(form, status=303, **values):
    """Fills in a form and submits it."""
    for name, value in values.items():
        form[name] = value
    return form.submit(headers=HTML, status=status)


def post_crash(api, **fields):
    """Sends a crash and returns the hash of its group."""
    return api.post(CRASHES, {**CRASH, **fields})[1]["group_hash"]


@pytest.fixture
def person(api):
    """A person who is signed in."""
    return Person(api.server).signed_in()


# -- Signing in

def test_a_page_is_shown_only_after_signing_in(api):
    for path in [*PAGES, "/crashes/0123456789abcdef", "/events?name=a&type=custom"]:
        person = Person(api.server)
        redirect = person.get(path, 303)
        assert redirect.location.endswith("/sign-in?" + urlencode({"next": path})) and not redirect.body
        assert "frame-ancestors 'none'" in redirect.headers["Content-Security-Policy"]
        assert send(forms_of(redirect.follow(headers=HTML))[0], token=TOKEN).headers["Location"] == path
        person.get(path, 404 if "0123" in path else 200)
        for forged in ("0" * 32, "", "' or 1=1 --", "0" * 5000):
            Person(api.server).get(path, 303, Cookie=f"{cookie_of(api.server)}={forged}")


def test_a_session_ends_by_signing_out_after_a_week_or_with_a_new_admin_token(serve, server, clock):
    person, cookie = Person(server), cookie_of(server)
    sign_out, session = forms_of(person.sign_in())[0], person.web.cookies[cookie]
    assert re.fullmatch("[0-9a-f]{32}", session)
    assert len(stored(server, "grants")["grants"]) == 1 and session.encode() not in content_of(server)
    assert (sign_out.action, send(sign_out).headers["Location"]) == ("/sign-out", "/sign-in")
    assert stored(server, "grants") == {"grants": []} and cookie not in person.web.cookies
    person.web.set_cookie(cookie, session)
    person.sign_in()  # fails unless the first page asks to sign in
    clock.move(7 * 86400 - 1)
    person.get("/")
    clock.move(1)
    person.sign_in()
    assert len(stored(server, "grants")["grants"]) == 1, "the expired session is deleted"
    serve()
    person.get("/")
    serve(auth_token="another" * 3)
    person.get("/", 303)


def test_a_wrong_admin_token_is_refused_and_locks_nobody_out(api):
    form = forms_of(Person(api.server).get("/sign-in"))[0]
    for token in ["", "wrong", TOKEN[:-1], TOKEN + "0", "\u00e9\u20ac", KEY, *["wrong"] * 30]:
        page = send(form, 403, token=token)
        assert "That is not the admin token." in page.text and TOKEN not in page.text
    assert stored(api.server, "grants") == {"grants": []}
    assert "Overview" in Person(api.server).sign_in()


def test_two_servers_on_one_host_have_separate_sessions(serve):
    first, second = serve(), serve("second.db", auth_token="another" * 3)
    person = Person(first)
    assert cookie_of(first) != cookie_of(second)
    for server, token in ((first, TOKEN), (second, "another" * 3)):
        person.web.app = server  # on another port of the host, so the browser sends the cookies of both
        person.sign_in(token)
    person.web.app = first
    person.get("/")


def test_a_one_time_link_signs_in_once_and_within_ten_minutes(api, clock):
    person, late = Person(api.server), Person(api.server)
    link, unused = api.server.pages.invite(""), api.server.pages.invite("")
    late.web.head(link, status=200)  # like a link preview
    assert person.get(link, 303).headers["Location"] == "/"
    person.get("/")
    assert "This link has been used or has expired." in late.get(link, 403)
    clock.move(600)
    late.get(unused, 403)
    late.get("/", 303)
    with api.server.store._process.write_lock:  # a made-up code does not wait for it
        assert late.get("/sign-in?code=" + "0" * 32, 403)


def test_links_and_the_cookie_use_the_path_and_the_scheme_of_the_server(serve):
    direct = serve()
    mounted_app, behind_proxy = mounted(direct, "/here"), serve(public_url="https://example.com/here")
    for app, prefix, scheme, headers, secure in (
            (mounted_app, "/here", "http", {}, []), (mounted_app, "/here", "https", {}, ["secure"]),
            (mounted_app, "/here", "http", {"X-Forwarded-Proto": "https"}, []),  # only the WSGI server may trust it
            (behind_proxy, "", "http", {}, ["secure"])):  # the proxy strips the prefix
        web = webtest.TestApp(app, extra_environ={"wsgi.url_scheme": scheme})
        assert web.get(prefix + "/", status=303).headers["Location"] == "/here/sign-in?next=%2F"
        page = web.get(prefix + "/sign-in")
        form, = forms_of(page)
        assert form.action == "/here/sign-in" and 'href="/here/"' in page
        form["token"] = TOKEN
        answer = web.post(prefix + "/sign-in", form.submit_fields(), headers=headers, status=303)
        session, *flags = answer.headers["Set-Cookie"].split("; ")
        assert re.fullmatch(cookie_of(direct) + "=[0-9a-f]{32}", session)
        assert {flag.lower() for flag in flags} == {
            "httponly", "samesite=lax", "path=/here/", "max-age=604800", *secure}, (prefix, scheme, headers)
    assert web.get("/crashes/%C3%A9", status=303).headers["Location"] == "/here/sign-in?next=%2Fcrashes%2F%25C3%25A9"
    assert len(web.get("/?a=" + "%FF" * 1000, status=303).headers["Location"]) < 3100, "nginx takes 4 kB of headers"


def test_the_curl_line_names_the_address_of_the_server(serve):
    for public_url, host, address in (
            ("https://crashes.example.com/bf", "x", "https://crashes.example.com/bf/api"),
            ("", "a.example:81", "http://a.example:81/api"),
            ("", "a.example'; rm -rf /", "http://localhost/api"), ("", "", "http://localhost/api")):
        server = serve(public_url=public_url)
        page = Person(server).get("/", Host=host, Cookie=f"{cookie_of(server)}={server.store.grant('session', 1000)}")
        assert f"curl -X POST {address}/v1/crashes" in page


def test_signing_in_redirects_to_no_other_host(api):
    for target in ("//evil.example", "/\\evil.example", "https://evil.example", "evil", "", "/\r\nSet-Cookie: a=b",
                   "/ space", "javascript:alert(1)", "/\u00e9"):
        form, = forms_of(Person(api.server).get("/sign-in?" + urlencode({"next": target})))
        assert send(form, token=TOKEN, next=target).headers["Location"] == "/", target


def test_a_form_is_refused_without_the_token_of_its_session(api, person):
    before, stranger = stored(api.server, "apps", "keys", "grants"), Person(api.server)
    form_token = forms_of(person.get("/apps"))[0]["form_token"].value
    for forged in ({"form_token": ""}, {"form_token": "0" * 64}, {"form_token": "\u00e9"}, {}):
        answer = person.post("/apps", 403, action="create", name="Forged", **forged)
        assert "Form expired" in answer and "Forged" not in answer
        person.post("/sign-out", 403, **forged)
        person.post("/sign-in", 403, token=TOKEN, **forged)
    person.web.post("/sign-out", headers=HTML, status=403, extra_environ={"REQUEST_METHOD": "post"})
    for path, query in (("/apps", {"next": "/apps", "unsaved": 1}), ("/sign-out", {"next": "/"}),
                        ("/crashes/00ab?app=A", {"next": "/crashes/00ab?app=A", "unsaved": 1})):
        answer = stranger.post(path, 303, action="create", name="Forged", form_token=form_token)
        assert answer.headers["Location"] == "/sign-in?" + urlencode(query)
        assert ("was not saved" in stranger.get(answer.headers["Location"])) == ("unsaved" in query)
    assert stored(api.server, "apps", "keys", "grants") == before


# -- Headers and errors

def test_pages_load_nothing_from_other_hosts_and_a_get_changes_nothing(api, person):
    tables = ("apps", "keys", "grants", "secrets", "channels", "triage", "crashes")
    paths = {
        200: [*PAGES, "/sign-in"], 405: ["/sign-out"],
        404: ["/nothing", *("/crashes/nothing" + suffix for suffix in ("", ".txt", ".md", ".html")),
              "/crashes?app=nothing", "/usage?app=nothing", "/events?app=nothing"],
        400: ["/crashes?days=0", "/crashes?days=All", "/crashes?cursor=x", "/crashes?state=x", "/releases?sort=x",
              "/events?cursor=x"]}
    before = stored(api.server, *tables)
    for answer in (person.get(path, status) for status in paths for path in paths[status]):
        assert (answer.content_type, answer.charset) == ("text/html", "utf-8")
        style, = re.findall("<style>(.*?)</style>", answer.text, re.S)
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        expected = {
            "Content-Security-Policy": "default-src 'none'; img-src data:; form-action 'self'; base-uri 'none';"
                                       f" frame-ancestors 'none'; style-src 'sha256-{digest}'",
            "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
        assert {name: answer.headers[name] for name in expected} == expected, answer.request.path
        assert 'href="#main"' in answer and not re.search("<th[ >](?!scope=)", answer.text)
        assert not re.search(r"<script|\sstyle=|\son\w+=|javascript:|https?://(?!localhost)", answer.text.replace(
            "xmlns=&#039;http://www.w3.org/2000/svg&#039;", ""))
    assert stored(api.server, *tables) == before


def test_errors_are_pages_for_browsers_and_json_for_other_clients(api, person):
    for path in ("/crashes?app=gone", "/nothing", "/crashes/0123456789abcdef"):
        page = person.get(path, 404)
        assert "gone" not in page.text and 'href="/usage"' in page and "Sign out" in page
    page = api.web.get("/nothing", headers=HTML, status=404)
    assert "Not found" in page and page.content_type == "text/html" and "Sign out" not in page
    for path, headers in (("/nothing", {}), ("/api/v1/nothing", HTML), ("/api/v1/%FF", HTML)):
        assert api.get(path, **headers) == (404, {"error": "not found"})
    answer = api.web.post("/crashes", headers=HTML, status=405)
    assert (answer.headers["Allow"], answer.content_type) == ("GET", "text/html")


def test_a_page_that_fails_reveals_no_internals(person, monkeypatch, caplog):
    monkeypatch.setattr(person.server.metrics, "releases", raising(ZeroDivisionError))
    answer = person.get("/releases", 500)
    assert "Internal server error" in answer and "Retry-After" not in answer.headers
    assert "ZeroDivision" not in answer.text and "backfeedr.py" not in answer.text
    monkeypatch.undo()
    person.server.close()
    answer = person.get("/releases", 503)
    assert "Storage unavailable" in answer and "Retry-After" in answer.headers and "backfeedr.py" not in answer.text
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError]


# -- Every link and every form

class Crawl:
    """Follows all links and submits all forms that it finds, up to two of each kind."""

    APP = "Made by a form"

    def __init__(self, person):
        self.person, self.seen, self.kinds, self.forms = person, set(), Counter(), Counter()
        urls = [person.prefix + "/"]
        for url in urls:  # which grows meanwhile
            kind = re.sub("=[^&]*|[0-9a-f]{16}", "*", url)
            if url not in self.seen and self.kinds[kind] < 2:
                self.seen.add(url)
                self.kinds[kind] += 1
                page = person.web.get(url, headers=HTML, status=200)
                urls += [*self.links(page), *self.submit_forms(page)]
        # Last, because the links to a deleted app are dead.
        person.submit("delete", name=self.APP, typed=self.APP)

    def links(self, page):
        for target in map(html.unescape, re.findall(r'(?:href|src|action)="([^"]*)"', page.text)):
            if not target.startswith(("data:image/svg+xml,", "#main")):
                assert target.startswith(self.person.prefix + "/") and not target.startswith("//"), target
                if "sign-out" not in target:
                    yield target

    def submit_forms(self, page):
        """Submits the forms of a page. Yields the address for each option of a filter."""
        for form in forms_of(page):
            action = form["action"].value if "action" in form.fields else ""
            is_triage = form.method.upper() == "POST" and form.action.startswith(self.person.prefix + "/crashes/")
            if is_triage:
                action = form["state"].value if "state" in form.fields else "comment"
            self.forms[action] += 1
            if "sign-out" in form.action or action == "delete" or action and self.forms[action] > 1:
                continue
            send(form, 303 if is_triage else 200, **{
                "create": {"name": self.APP}, "add-channel": {"url": "https://example.com/hook"},
                "comment": {"comment": "Seen."}}.get(action, {}))
            self.kinds["form of " + form.action] += 1
            if form.method.upper() == "GET" and self.kinds["form of " + form.action] == 1:
                for name, (field, *_) in form.fields.items():
                    for value, *_ in getattr(field, "options", []):
                        path = send(form, 200, **{name: value}).request.path_qs
                        yield path.replace("//", "/", 1)  # the path after bottle's mount has two slashes


@pytest.mark.parametrize("data, prefix", [("empty", ""), ("demo", "/app/crashes")])
def test_every_link_and_form_works(serve, tmp_path, demo, data, prefix, receiver):
    if data == "demo" and not POSTGRES:
        shutil.copy(demo.path, tmp_path / "test.db")
    server = serve(retention_days=0)
    serve.unchecked.append(server)  # as a form deletes reports
    if data == "demo" and POSTGRES:
        recent = SimpleNamespace(export=partial(demo.export, since=DEMO_NOW - 3 * DAY))  # all would take a minute
        hand_over(SimpleNamespace(store=recent), server, step=1000)
    server.alerts.add(receiver.url)
    server.store.create_feed_token()
    crawl = Crawl(Person(server, prefix).signed_in())
    assert {path for path in crawl.kinds if "?" not in path} >= {prefix + path for path in PAGES}
    assert set(crawl.forms) - {"open"} == {
        "", "create", "key", "revoke", "delete", "add-channel", "test-channel", "remove-channel", "make-feed",
        "withdraw-feed"} | ({"resolved", "muted", "comment"} if data == "demo" else set())
    assert Crawl.APP not in {app.name for app in server.store.apps()}
    assert data == "empty" or len(crawl.seen) > 40 and crawl.kinds[prefix + "/crashes/*"] == 2


# -- Hostile reports

HOSTILE = '"><script>alert(1)</script>\'{{7777*7777}}% end\n%import os\n</style>\u202eabc\u05d0\x07\x1b[31m\x7f'


def test_every_field_of_a_report_is_shown_as_text(api, person):
    long = (HOSTILE * 20)[:500]
    fields = {**dict.fromkeys(("app_version", "os_version", "device_model", "device_id_hash", "locale"), long),
              "breadcrumbs": [HOSTILE, {"at": HOSTILE, "message": HOSTILE, HOSTILE: HOSTILE}], "session_id": long,
              HOSTILE: {HOSTILE: [HOSTILE]}, "plain": HOSTILE, "many": [HOSTILE, {HOSTILE: 1}]}
    frames = [{"frame": 0, "symbol": HOSTILE, "file": HOSTILE, "line": 1}, {"symbol": HOSTILE}]
    group = post_crash(api, **{**fields, "exception_type": long, "exception_reason": HOSTILE, "build_number": long,
                               "stack_trace": frames})
    events = [{**EVENT, **fields, "type": type_, "name": long, "session_id": long, "properties": {HOSTILE: HOSTILE}}
              for type_ in ("session_start", "custom", "session_end")]
    assert api.post(BATCH, {"events": events})[0] == 201
    api.server.store.create_app(re.sub("[^ -~\u05d0]", " ", HOSTILE)[:70].strip())
    lists = [("crashes", {"version": long, "text": HOSTILE}), ("events", {"session_id": long, "device_id_hash": long}),
             ("events", {"name": long}), ("crashes", {"version": HOSTILE}), ("crashes", {"text": long})]
    for path in [*PAGES, "/crashes/" + group, *(f"/{page}?{urlencode(query)}" for page, query in lists)]:
        page = person.get(path).text
        assert "<script" not in page and "60481729" not in page, path
        assert page.count("</style>") == 1 and not re.search("[\x00-\x08\x0b-\x1f\x7f]", page), path
        assert path in ("/releases", "/apps") or "script&gt;alert(1)" in page, path
    assert person.text("/crashes/" + group).count("{{7777*7777}}") > 10


def test_an_unknown_field_may_have_the_name_of_a_known_one_and_any_value(api, person):
    for value in ({}, ["x"], 1.5, True, "2026-13-45T00:00:00Z", "9999999-01-01T00:00:00Z"):
        names = [*parse_crash(CRASH)._fields, "received_at", "clock_ahead_ms", "id", "app", "raw_stack_trace"]
        sent = {**dict.fromkeys(names, value), "exception_type": "E", "occurred_at": NOW}
        assert api.post(CRASHES, sent)[0] == 201
        person.get("/crashes/" + hashed("E"), status=200)
        report = api.server.metrics.group(hashed("E"))["reports"][0]
        assert report["extra"]["received_at"] == value and report["received_at"] == NOW


def test_the_page_of_a_huge_report_is_small(api, person):
    frames = [{"symbol": f"frame {n}", "file": "a.swift"} for n in range(15_000)]
    group = post_crash(api, exception_reason="r" * 100_000, stack_trace=frames, notes="n" * 200_000)
    page = person.get("/crashes/" + group)
    assert len(page.body) < 120_000 and "and 262 more frames" in page and "frame 199" in page
    assert '<li value="462"' in page and "frame 14999" in page, "the frames that began an endless recursion"
    for own, text in ((None, "and 1 more frame "), (200, "and 1 more frame among them Deep.swift")):
        trace = [{"symbol": f"s{n}", "file": "Deep.swift" * (n == own)} for n in range(251)]
        text_of_page = person.text("/crashes/" + post_crash(api, exception_type=f"Own{own}", stack_trace=trace))
        assert f"s199 {text}" in text_of_page.replace("own code: ", "").replace(" s200", "") and "s250" in text_of_page
    assert "462 * frame 14950" in person.get(f"/crashes/{group}.txt") and "frame 14949" not in page
    assert len(person.get("/crashes").body) < 20_000


# -- What the pages show

FULL = {**json.loads((EXAMPLES / "crash.json").read_text()), "free_disk_mb": 70,
        "breadcrumbs": [{"at": "14:22", "screen": "Cart"}, "tap"]}
FULL["stack_trace"].append({"frame": 9, "symbol": "UIApplicationMain", "file": None, "line": None})
OWN_CODE = '<span class="skip">own code: </span>'  # for those who do not see the colour
OWN = [frame["symbol"] for frame in FULL["stack_trace"] if frame.get("file")]


@pytest.mark.parametrize("reports, texts_by_path", [
    ([], {"/": ["No reports yet", "curl -X POST http://localhost:80/api/v1/crashes",
                "No crashes in the last 7 days", "once reports have an app_version"],
          "/crashes": ["No matches", "In Version, 1.3* stands", '<option value="7" selected>last 7 days'],
          "/crashes?days=all": ["To send a first crash, see Apps .", '<option value="all" selected>all'],
          "/usage": ["No events in 30 days", "none has ended yet", "once reports have an app_version"],
          **dict.fromkeys(("/events", "/events?name=x", "/events?session_id=x"),
                          ["No matches. Show all . To send events, see examples/client.py"]),
          "/releases": ["once reports have an app_version"]}),
    ([*(start_at("2026-03-12T10:00:00Z", f"s{n}", device_id_hash=f"d{n}", app_version="1.2.0") for n in range(4)),
      {**CRASH, "app_version": "1.2.0", "device_model": "iPhone16,1", "exception_reason": "Because"},
      {**CRASH, "occurred_at": "2026-03-01T10:00:00Z"}],
     {"/": ["Crash-free sessions 75.00 %", "Active devices 4 24 hours", "Sessions 4 7 days", "Crashes 1 7 days",
            "SIGABRT new Because 0 1", "iPhone 15 Pro iPhone16,1 1", "SIGABRT 2",
            'aria-label="Crashes, day by day, 11 Feb to 12 Mar: latest 1 so far, highest 1 on 12 Mar, lowest 0"',
            "<title>1 Mar: 1</title>", "<title>2 Mar: 0</title>"],
      "/releases": ["1.2.0 - 75.00 % 100.00 % 1 4 4 100.00 %"]}),
    ([FULL], {"/crashes/{group}": [
        "ContentView.swift:42", "free memory mb 312", "battery level 0.67", "is charging false", "locale de_DE",
        "app version 1.2.0", "build number 47", "os version 18.3.1", "free disk mb 70",
        "Time Action 14:22 Cart tap 00:00", "Crashes 1 Devices 1", ' title=""><code><bdi>UIApplicationMain',
        *(f'<li value="{n}" title="" class="own">{OWN_CODE}<code><bdi>{name}</bdi>' for n, name in enumerate(OWN))]}),
    ([{**CRASH, "occurred_at": "2031-01-02T03:04:05Z"}], {"/crashes/{group}": ['title="03:04:05">2031-01-02<']}),
    ([{**CRASH, "exception_type": " "}], {"/crashes": [f"<bdi>{hashed(' ')}</bdi></a>"]}),
    ([{**CRASH, "device_id_hash": "d"}], {"/": [  # without versions there is no newest release
        "To fix first Crash Devices Crashes Last seen SIGABRT new 1 1 7 min ago"]}),
    *(([{**CRASH, "stack_trace": [frame]}], {"/crashes/{group}": [title + " - backfeedr "]}) for frame, title in (
        # without what compilers add, or else the binary and the offset
        ({"binary": "Shop", "offset": 1280, "path": "/x/Shop.app/Shop"}, "Shop + 1280"),
        ({"binary": "My Shop", "offset": 70000, "path": "/x/My Shop.app/My Shop"}, "My Shop + 70000"),
        ({"binary": "Tom's (App)", "offset": 128, "path": "/x/Tom's (App).app/x"}, "Tom's (App) + 128"),
        ({"symbol": "closure #1 in Cart.total() + 112", "file": "Cart.swift"}, "Cart.total()"),
        ({"symbol": "main + 52", "file": "main.c"}, "main"), ({}, "SIGABRT")))])
def test_each_page_shows_its_figures_or_says_what_to_do(api, person, reports, texts_by_path):
    group = ""
    for report in reports:
        group = api.post(CRASHES if "exception_type" in report else EVENTS, report)[1].get("group_hash")
    for path, expected in texts_by_path.items():
        page, text = (read(path.format(group=group)) for read in (person.get, person.text))
        assert [line for line in expected if line not in text and line not in page.text] == []
        assert reports or not re.search("Ranked by|Adoption is", text), "a note on an empty table"


def test_the_list_of_crashes_can_be_filtered_and_shows_its_period(api, person, clock):
    for type_, version, reason in (("SIGABRT", "1.0", "Alpha 100%"), *[("SIGBUS", "1.1", "beta")] * 2):
        post_crash(api, exception_type=type_, app_version=version, exception_reason=reason)
    clock.move(9 * A_DAY)
    api.post(CRASHES, crash_at("2026-03-21T14:00:00Z", "SIGFPE", app_version="2.0"))
    person.signed_in()
    all_types = ["SIGBUS", "SIGABRT", "SIGFPE"]
    for query, days, expected in (
            ("", "7", ["SIGFPE"]), ("?days=all&app=default", "all", all_types), ("?version=1.1", "all", ["SIGBUS"]),
            ("?days=1", "1", ["SIGFPE"]), ("?version=1.1&days=7", "7", []), ("?text=sig", "all", all_types),
            *((f"?text={text}", "all", ["SIGABRT"]) for text in ("ALPHA", "100%25", "%25")),
            ("?text=" + group_hash("SIGBUS", []), "all", ["SIGBUS"]), ("?version=1.1&text=alpha", "all", [])):
        page = person.get("/crashes" + query)
        types = re.findall(r"<bdi>(SIG\w+)</bdi></a>", page.text)
        assert sorted(types) == sorted(expected) and types[:1] == expected[:1], query
        assert ("No matches" in page) == (not expected) and f'<option value="{days}" selected>' in page, query
    page = person.get("/crashes?days=all")
    assert 'title="2026-03-12 14:22:31">9 d ago<' in page
    assert page.text.count('aria-label="Crashes: 2 in 30 days"') == 1
    form = forms_of(person.get("/crashes?version=1.0&days=30"))[1]
    assert (form["days"].value, form["version"].value) == ("30", "1.0")


def test_a_group_is_titled_by_its_function_and_links_to_older_and_newer_crashes(api, person):
    trace = [{"symbol": "closure #1 in Shop.Cart.total()", "file": "Cart.swift", "line": 4}]
    answers = [api.post(CRASHES, crash_at(f"2026-03-12T14:{minute:02}:00Z", exception_reason=f"at {minute}",
                                          stack_trace=trace))[1] for minute in (5, 20, 10)]
    ids, path = [answer["id"] for answer in answers], "/crashes/" + answers[0]["group_hash"]
    page = person.get(path)
    assert "<title>Shop.Cart.total() - backfeedr" in page and "<h1><bdi>Shop.Cart.total()</bdi></h1>" in page
    assert "A at 20" in person.text(path) and "Latest crash" in page and "Newer crash" not in page
    for link, id in (("Older", ids[2]), ("Older", ids[0]), ("Newer", ids[2]), ("Newer", ids[1])):
        page = page.click(link + " crash")
        assert page.request.path_qs.endswith("report=" + id) and ("Latest crash" in page) == (id == ids[1])
    assert "Newer crash" not in page and "A at 5 " in person.text(f"{path}?report={ids[0]}")
    assert all("Shop.Cart.total()</bdi></a>" in person.get(path) for path in ("/crashes", "/"))
    nameless = api.post(CRASHES, {**CRASH, "stack_trace": [{"symbol": "Shop + 31384", "in_app": True}]})[1]
    assert "<h1><bdi>Shop + 31384</bdi></h1>" in person.get("/crashes/" + nameless["group_hash"]), "without symbols"
    for report_id in ("0000000000000000", "x", nameless["id"]):
        person.get(f"{path}?report={report_id}", 404)


def test_breadcrumbs_of_every_known_shape_are_listed_as_steps_up_to_the_crash(api, person):
    for number, (breadcrumbs, steps) in enumerate((
            (["launch", "tap <Pay>"], ["launch", "tap <Pay>"]),
            ([{"at": "2026-03-12T14:22:19Z", "action": "tap", "screen": "Cart"}], ["-00:12 tap screen: Cart"]),
            ({"values": [{"timestamp": 1773325339.5, "category": "ui.click", "message": "Pay", "data": {}}]},
             ["-00:11 Pay category: ui.click"]),
            ([{"time": "2026-03-12T12:20:00Z", "type": "navigation"}], ["-2:02:31 navigation"]),
            ([{"at": "2026-03-12T14:22:33Z", "name": "late"}], ["+00:02 late"]),
            ([{"at": "14:22", "screen": "Cart"}, {"n": 1}, 7, None, ["a"]], ["14:22 Cart", "n: 1", "7", "null", "a"]),
            ([{"at": "2019-01-01T00:00:00Z", "message": "old"}, {"timestamp": 1e300, "message": ""}],
             ["2019-01-01T00:00:00Z old", "1e+300"]),
            *((unknown, None) for unknown in ("none", 7, {"a": 1}, {"values": 3}, [])))):
        kind = f"Kind{number}"
        text = person.text("/crashes/" + post_crash(api, exception_type=kind, breadcrumbs=breadcrumbs))
        if steps:
            assert " ".join(["Breadcrumbs Time Action", *steps, f"00:00 {kind} the crash"]) in text
        else:
            assert "Breadcrumbs" not in text and "breadcrumbs" in text


def test_a_crash_shows_the_last_twenty_events_of_its_session_before_it(api, person):
    session = {"session_id": "1", "device_id_hash": "d"}
    events = [{**EVENT, **session, "name": f"n{n}", "occurred_at": f"2026-03-12T14:22:{n}Z"} for n in range(10, 34)]
    others = [{**events[5], "name": "other", **changed} for changed in ({"device_id_hash": "e"}, {"session_id": "2"})]
    api.post(BATCH, {"events": [*others, *events[14:], *events[:14]]})
    group = post_crash(api, **session)
    page, text = person.get("/crashes/" + group), person.text("/crashes/" + group)
    expected = " ".join(f"-00:{31 - n:02} custom n{n}" for n in range(12, 32))
    assert f"Events of this session Time Action {expected} All events" in text
    page = page.click("All events of this session")
    assert page.request.path_qs == "/events?app=default&session_id=1&device_id_hash=d" and "other" not in page
    page = person.get("/events?session_id=1")
    assert "other" in page and "other" not in page.click("1", href="hash=d", index=0)
    assert "Events of this session" not in person.text("/crashes/" + post_crash(api, exception_type="Alone"))


def test_a_device_has_its_crashes_and_a_crash_the_earlier_events_of_its_device(api, person, clock):
    for name in ("before", "after"):
        api.post(EVENTS, {**EVENT, "name": name, "device_id_hash": "d"})
        if name == "before":
            group = post_crash(api, device_id_hash="d", app_version="1.2", stack_trace=calls("Cart.pay", file="a"))
            post_crash(api, exception_type="OfAnother", device_id_hash="e")
        clock.move(60)
    earlier = person.get("/crashes/" + group).click("Earlier events of this device")
    assert "<bdi>before</bdi>" in earlier and "<bdi>after</bdi>" not in earlier
    page = earlier.click("First page")
    assert "<bdi>after</bdi>" in page and "device forget" in page and "OfAnother" not in page
    shown = page.click("Cart.pay").request
    assert shown.path == "/crashes/" + group and "report=" in shown.query_string
    assert re.search(r"Latest crashes of this device Crash Occurred Version Cart.pay SIGABRT .* 1[.]2 Events of this"
                     " device Event", person.text(page.request.path_qs))
    assert "Latest crashes" not in person.get("/events?device_id_hash=none")
    assert "device forget" in earlier and "Latest crashes" not in earlier
    assert "device forget" not in (page := person.get("/events?app=default")) and "<title>Events - default -" in page


def test_a_group_is_exported_as_text_or_markdown_without_devices_and_sessions(api, person):
    trace = [{**frame, "user": "who"} for frame in FULL["stack_trace"]]
    for n in range(2):
        group = post_crash(api, **{**FULL, "stack_trace": trace, "device_id_hash": f"phone{n}", "session_id": "sess",
                                   "secret": "who"})
    page = person.get("/crashes/" + group)
    text, markdown = page.click("text", index=0), page.click("Markdown")
    assert (text.content_type, markdown.content_type, text.text) == ("text/plain", "text/markdown", markdown.text)
    assert text.text.startswith(f"# Crash group {group}\n\nhttp://localhost:80/crashes/{group}\n\n"
                                f"## Crash\n\n```text\n    {OWN[0]}\n    {FULL['exception_type']}\n")
    for line in (f"\n      0 * {OWN[0]}  ContentView.swift:42\n", "    Versions: 1.2.0 (2)\n", "Crashes: 2\n",
                 "Devices: 2\n", FULL["exception_reason"]):
        assert line in text.text
    assert not re.search("phone|sess|secret|who|Cart", text.text) and text.text.endswith("\n```\n")
    group = api.post(CRASHES, CRASH, key=api.server.store.create_app("Trial & Co", is_test=True))[1]["group_hash"]
    text = person.web.get(f"/crashes/{group}.txt?app=Trial+%26+Co").text
    link = re.search("http://localhost:80(.*)", text)[1]
    assert link == f"/crashes/{group}?app=Trial+%26+Co" and person.get(link).status_int == 200


def test_hostile_text_stays_indented_in_the_fences_of_an_export(api, person):
    for hostile in ("```\n# Title\n[a](javascript:b)", "`" * 70 + "\n- x", "~~~\n</pre><script>", "=1+1\n@x\n-x\n+x",
                    "a\rb\x1b[31m\x85=x", "\u2028# x\u2029=y\x0b=z", "\u202eabc\u2066", "\tx\n\n\n## Spread"):
        names = ("exception_type", "exception_reason", "app_version", "os_version", "device_model")
        group = post_crash(api, **dict.fromkeys(names, hostile), stack_trace=[{"symbol": hostile, "file": hostile}])
        text = person.web.get(f"/crashes/{group}.txt").text
        titles = ["Crash", "Stack trace of the latest crash (* marks the app's own code)", "Spread", "History"]
        # Four spaces before a fence keep it from closing another one.
        assert [line for line in text.split("\n") if line and line[:4] != "    "] == [
            f"# Crash group {group}", f"http://localhost:80/crashes/{group}",
            *(line for title in titles for line in ("## " + title, "```text", "```"))]
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", text)


def test_the_overview_lists_new_groups_and_those_to_fix_first(api, clock, person):
    def crash(version, kinds, *devices):
        for kind, device in product(kinds, devices):
            add(api.server, exception_type=kind, device_id_hash=device, app_version=version)

    clock.move(-9 * A_DAY)
    crash("1.0", ["Old"], "d0")
    crash("1.0", ["Gone", "Fixed", "Back"], "d1")
    clock.move(7 * A_DAY)
    crash("1.0", ["Old"], "d1", "d2", "d3", "d4", "d5")
    crash("2.0", ["Stale"], "d1", "d2", "d3")  # three, halved twice, is less than one
    clock.move(2 * A_DAY)
    crash("2.0", ["Fresh", "Fixed", "Muted", "Back"], "d1")
    for kind, state, at in (("Fixed", "resolved", "null"), ("Muted", "muted", "null"),
                            ("Back", "open", api.server.store.now)):
        sql_run(api.server, f"""
            insert into triage (app_id, group_hash, state, changed_at, regressed_at)
            values (1, '{group_hash(kind, [])}', '{state}', 0, {at})""")
    new, first = map(api.server.metrics.attention().get, ("new", "first"))
    assert [(group["exception_type"], group["is_new"], group["regressed_at"] is not None) for group in new] == [
        *sorted([("Fresh", True, False), ("Back", False, True)], key=lambda row: group_hash(row[0], [])),
        ("Stale", True, False)]
    assert {group["exception_type"]: (group["devices"], group["score"], group["count"]) for group in first} == {
        "Fresh": (1, 1.0, 1), "Back": (1, 1.0, 1), "Stale": (3, 0.75, 3), "Old": (5, 0.0, 5)}
    assert [group["exception_type"] for group in first[2:]] == ["Stale", "Old"]
    text = person.text("/").split("Is the latest release worse?")[1].split("Crash-free")[0]
    assert re.search("2[.]0 .*New or regressed .* 7 days: 3 .*Back regressed .*To fix first .*Stale new 3 3 2 d", text)
    assert re.search(r"Old 5 \(0 current\) 5 2 d", text), "the list says why it ranks below Stale"
    assert not re.search("Gone|Fixed|Muted", text) and "halved for each day since the last crash" in text
    api.server.store.create_app("Shop")
    assert api.server.metrics.attention("Shop") == {"new": [], "new_count": 0, "first": []}


def test_late_reports_of_an_old_version_do_not_hide_the_newest_release(keeping, clock):
    server = keeping()
    shop, person = server.store.create_app("Shop"), Person(server).signed_in()
    clock.move(-3600)
    add(server, key=shop, app_version="7.0", device_id_hash="s")
    clock.move(3600)
    send_devices(server, "1.1", 100, 4)
    clock.move(A_DAY)
    send_devices(server, "1.2", 100, 12)
    clock.move(3600)
    add(server, exception_type="Rare", app_version="0.9", device_id_hash="old")
    text = person.text("/releases?app=default")
    assert "Version Verdict Crash-free" in text and " 1.2 worse: 88 % of devices crash-free, 96 % before" in text
    assert " 0.9 - " in text
    server.store.add(KEY_HASH, [parse_crash({**CRASH, "app_version": f"0.8.{n}", "device_id_hash": "old"})
                                for n in range(99)])  # with 0.9 these fill the list of releases
    text = person.text("/").split("Is the latest release worse?")[1]
    assert re.match(" 1[.]2 default worse: 88 % of devices .* 7[.]0 Shop nothing to compare with yet New", text)
    assert "worse" in person.text("/?app=default") and server.metrics.digest(None, 0, 1)[0]["text"].startswith(
        "default 1.2 is worse: ")
    first = server.metrics.attention("default")["first"]
    assert {group["exception_type"]: group["score"] > 0 for group in first} == {"SIGABRT": True, "Rare": False}


def test_a_group_on_many_devices_ranks_above_groups_that_crash_more_often_on_one(api, person):
    api.server.store.add(KEY_HASH, [
        parse_crash(crash_at(NOW, kind, app_version="1.0", device_id_hash=device)) for kind, device, times in (
            *((f"Loop{n}", "one", 5) for n in range(25)), *(("Spread", f"d{n}", 1) for n in range(4)))
        for _ in range(times)])
    first = api.server.metrics.attention()["first"][0]
    assert (first["exception_type"], first["devices"]) == ("Spread", 4)
    assert re.search("To fix first Crash Devices Crashes Last seen Spread new 4 4", person.text("/"))


@pytest.mark.parametrize("days_later", [2, 20])  # the group's name is kept for a week
def test_a_group_whose_crashes_have_expired_has_its_history_and_can_change_its_state(one_day, later, days_later):
    person, path = Person(one_day), f"/crashes/{ABORTS}"
    for kind in ("SIGABRT", "Undecided"):
        id = backfeedr.crash_id(add(one_day, exception_type=kind).seqs[0])
    set_triage(one_day, {"state": "resolved", "comment": "It was the cart."})
    feed = "/crashes.atom?token=" + one_day.store.create_feed_token()
    assert len(feed_of(person, feed)[0]) == 2
    later(one_day, days_later * A_DAY)
    one_day.store.prune()
    assert count(one_day, "crashes") == 0 and count(one_day, "groups") == (2 if days_later < 7 else 0)
    assert feed_of(person, feed)[0] == []
    text = person.signed_in().text(path)
    assert re.search(f"{'SIGABRT' if days_later < 7 else ABORTS} - backfeedr", text)
    for expected in ("Resolved Fixed in version Resolve Reopen Mute", "Crashes 0 Devices -",
                     "commented It was the cart.", "have expired"):
        assert expected in text
    for form, state in (("open", "Open Fixed"), ("muted", "Muted Fixed"), ("open", "Open Fixed")):
        answer = send(state_form(person.get(path), form))
        assert state in person.text(urlsplit(answer.headers["Location"]).path)
    for query in ("?report=" + id, "?report=0000000000000000"):
        person.get(path + query, 404)
    person.get("/crashes/" + group_hash("Undecided", []), 404)
    links = set(re.findall('href="(/crashes/[0-9a-f]{16})"', person.get("/").text))
    assert links == ({path} if days_later < 7 else set())
    assert person.web.get(path + ".txt").text.startswith(f"# Crash group {ABORTS}\n")


def test_the_usage_page_shows_active_devices_session_lengths_and_retention(api, clock, person):
    start = clock.seconds
    for day, devices in ((-8, "abcd"), (-7, "a"), (-1, "ab"), (0, "abe")):
        clock.seconds = start + day * A_DAY
        api.server.store.add(KEY_HASH, [parse_event({
            "type": type, "name": f"bought {device}", "device_id_hash": device, "session_id": f"{device}{day}",
            "app_version": "2.0" if device == "e" else "1.0", "occurred_at": time_text(clock.seconds - seconds)})
            for device in devices
            for type, seconds in (("session_start", 300), ("custom", 200), ("session_end", 0))])
    text = person.text("/usage?app=default")
    for expected in ("Active devices 3 24 hours", "Active devices 3 7 days", "Active devices 5 30 days",
                     "Sessions 5 7 days; median length on 11 Mar: 5 min 0 s",
                     "Back after 1 day 25 % of 4 new devices", "Back after 7 days 50 % of 4 new devices",
                     "Back after 30 days - of 0 new devices", "bought a custom 4",
                     "Adoption, 7 days Version Adoption 1.0 80.00 % 2.0 20.00 % All"):
        assert expected in text
    page = person.get("/usage?app=default")
    assert 'aria-label="Events: 4 in 30 days"' in page
    assert page.click("bought a").request.path_qs == "/events?app=default&type=custom&name=bought+a"
    events = page.click("All events")
    assert "bought a" in events and 'aria-current="page">Usage' in events


def test_events_are_listed_newest_first_and_those_of_a_session_oldest_first(api, person, monkeypatch):
    names = [f"n{n}" for n in range(60)]
    in_first = [name for name in names if name[-1] < "7"]
    api.post(BATCH, {"events": [{**EVENT, "name": name, "session_id": "first" if name in in_first else "second",
                                 "properties": {"at": name, "n": [1, {"a": 2}]}} for name in names]})
    api.post(EVENTS, {**EVENT, "name": "last", "properties": {"long": "x" * 100}})
    text = person.text("/events")
    assert 'at: n59, n: 1 {"a": 2}' in text and f"long: {'x' * 100}" in text
    assert person.get("/events").click("first", index=0).request.path_qs == "/events?session_id=first"
    for query, expected in (("", ["last", *names[::-1]]), ("?session_id=first", in_first), ("?name=n7", ["n7"]),
                            ("?type=error", [])):
        pages = [person.get("/events" + query)]
        while "Next page" in pages[-1]:
            pages.append(pages[-1].click("Next page"))
        listed = [name for page in pages for name in re.findall(r"<b><bdi>(\w+)</bdi></b>", page.text)]
        assert listed == expected and (len(listed) < 25 or "First page" in pages[-1]), query
    monkeypatch.setattr(backfeedr, "SCANNED_EVENTS", 2)
    assert "No matches among the 2 events searched. The next page" in person.text("/events?name=n7")


def test_a_page_covers_all_live_apps_and_names_them_or_covers_the_chosen_app(api, person):
    store, frame = api.server.store, {"symbol": "Own.go()", "file": "M.swift"}
    shop = store.create_app("Shop & Co")
    for key in (KEY, shop):
        api.post(CRASHES, {**CRASH, "stack_trace": [{"symbol": "system"}, frame]}, key=key)
        api.post(EVENTS, EVENT, key=key)
    api.post(CRASHES, {**CRASH, "exception_type": "SIGFPE", "app_version": "9.9"}, key=shop)
    post_crash(api, exception_type="SIGBUS")
    assert re.search("Own.go[(][)] new (Shop & Co, default|default, Shop & Co) : SIGABRT", person.text("/crashes"))
    assert "purchase Shop & Co" in person.text("/events")
    assert "Shop" not in person.text("/crashes?app=default").split("Versions", 1)[1]
    page = person.get("/crashes")
    assert "SIGFPE" in page and "SIGBUS" in page
    page = page.click("Shop &amp; Co")
    assert page.request.path_qs == "/crashes?app=Shop+%26+Co" and "SIGFPE" in page and "SIGBUS" not in page
    page = page.click("Releases", index=0)
    assert page.request.path_qs == "/releases?app=Shop+%26+Co" and "9.9" in page
    for name in ("default", "Shop & Co"):
        store.delete_app(name)
    store.create_app("Trial", is_test=True)
    assert "Trial (test)" in person.text(person.get("/").click("Trial").request.path_qs), "without a live app"


# -- Apps and keys

def test_a_new_app_shows_its_key_once_and_is_deleted_only_after_its_name_is_typed(api, person):
    for name, options, kind in (("Shop", {}, "live"), ("Trial", {"test": True}, "test")):
        page = person.submit("create", name=name, **options)
        key = re.search(f"bf_{kind}_[0-9a-f]{{32}}", page.text)[0]
        assert page.text.count(key) == 2 and f'-H "X-Backfeedr-Key: {key}"' in html.unescape(page.text)
        assert api.post(CRASHES, CRASH, key=key)[0] == 201
        assert key not in person.get("/apps").text
        assert re.search(f"{name}.*?{key[:16]}... just now 2026-03-12 1 Revoke", person.text("/apps"))
    apps = sql(api.server, "select name, is_test from apps order by name")
    assert apps == [("Shop", 0), ("Trial", 1), ("default", 0)]
    form = next(form for form in forms_of(person.get("/apps"))
                if "typed" in form.fields and form["name"].value == "Shop")
    for typed, status, message, kept in (
            ("shop", 400, "type its name", 2), ("Shop", 200, "Deleted Shop. Its reports are being deleted.", 1),
            ("Shop", 400, 'role="alert"', 1)):
        answer = send(form, status, typed=typed)
        assert message in answer and ('<p class="problem">' in answer) == (status == 400)
        wait_for_catch_up()
        assert len(stored(api.server, "crashes")["crashes"]) == kept == len(api.server.store.apps()) - 1


def test_an_impossible_change_is_refused_with_the_reason(api, person):
    before, form_token = stored(api.server, "apps", "keys"), forms_of(person.get("/apps"))[0]["form_token"].value
    for fields in [*({"action": "create", "name": name} for name in ("", " Shop", "default", "x" * 101, "a\nb")),
                   *({"action": "revoke", **key} for key in ({}, {"key": ""}, {"key": "nothing"})), {"action": "x"},
                   {"action": "delete", "name": "gone", "typed": "gone"}, {"action": "remove-channel", "id": "1"}]:
        answer = person.post("/apps", 400, form_token=form_token, **fields)
        assert 'role="alert"' in answer and ("There is no such action" in answer) == (fields["action"] == "x"), fields
        new_app = next(form for form in forms_of(answer) if "test" in form.fields)
        assert new_app["name"].value == (fields["name"] if fields["action"] == "create" else ""), "what was typed"
        assert stored(api.server, "apps", "keys") == before, fields
    assert "There is no channel 1" in answer
    assert api.post(CRASHES, CRASH)[0] == 201


def test_the_right_one_of_two_keys_with_the_same_prefix_is_revoked(serve, person):
    for key in ("companykey-A", "companykey-B"):
        serve(api_key=key)
    api, apps = Api(person.server), person.submit("key", name="default")
    key = re.search("bf_live_[0-9a-f]{32}", apps.text)[0]
    assert api.post(CRASHES, CRASH, key=key)[0] == 201 and apps.text.count("comp...") == 2
    for revoked, prefix in ((key, key[:16]), ("companykey-B", "comp")):
        answer = person.submit("revoke", key=hashlib.sha256(revoked.encode()).hexdigest())
        assert f"Revoked the key {prefix}... of default." in answer
        assert api.post(CRASHES, CRASH, key=revoked) == (401, {"error": "invalid API key"})
    assert [api.post(CRASHES, CRASH, key=key)[0] for key in ("companykey-A", KEY)] == [201, 201]


# -- Charts

def test_an_axis_ends_at_a_round_number_and_columns_are_drawn_to_scale():
    def chart(*values):
        return backfeedr.chart("Crashes", ["2026-03-01", "2026-03-02", "2026-03-03"], values, backfeedr.draw_columns)

    for value, top in ((0, "1"), (1, "1"), (2, "2"), (3, "3"), (7, "8"), (9, "10"), (10, "10"), (11, "15"),
                       (99, "100"), (100, "100"), (101, "150"), (4999, "5,000"), (5001, "6,000")):
        assert re.search('aria-label="[^"]*"><p><span>(.*?)</span>', chart(0, value, 0))[1] == top
    columns = re.findall('y="([0-9.]+)" height="([0-9.]+)"/>', chart(0, 5, 10))
    assert columns == [("72.0", "0.0"), ("36.0", "36.0"), ("0.0", "72.0")]


def test_a_line_has_a_gap_where_a_value_is_missing_and_today_is_a_dot():
    days = [f"2026-03-0{n}" for n in range(1, 7)]
    chart = backfeedr.chart("Rate", days, [100, 90, None, 95, None, 100], unit=" %")
    for part in ('<path d="M0.5,0.0L1.5,72.0M3.5,36.0M5.5,0.0"/><path class="dot" d="M3.5,36.0h0M5.5,0.0h0"/>',
                 "<title>3 Mar: none</title>", "<title>4 Mar: 95 %</title>", "<title>6 Mar: 100 % so far</title>",
                 'aria-label="Rate, day by day, 1 Mar to 6 Mar: latest 100 % so far, highest 100 % on 6 Mar,'
                 ' lowest 90 %"'):
        assert part in chart
    assert "latest 90 %, highest" in backfeedr.chart("Rate", days, [100, 90, None], unit=" %")
    assert '"M0.5,3.0L1.5,2.0M2.5,1.0"/><path class="dot" d="M2.5,1.0h0"' in backfeedr.draw_line([3, 2, 1])
    assert "No data in this period" in backfeedr.chart("Rate", days[:1], [None])


def test_bars_are_drawn_relative_to_the_longest():
    bars = backfeedr.bar_chart({"labels": ["a<b", "c"], "data": [40, 10]}, total=60)
    assert re.findall('<rect width="([0-9.]+)%', bars) == ["100.0", "25.0", "0"]
    assert "<bdi>a&lt;b</bdi>" in bars and re.search(r"other or unknown.*>10</td>", bars)
    assert "No data in this period" in backfeedr.bar_chart({"labels": [], "data": []})


def test_a_known_device_has_its_name_beside_its_code_and_an_unknown_one_has_only_its_code():
    for code, name in (("iPhone10,6", "iPhone X"), ("iPhone14,6", "iPhone SE (3rd generation)"),
                       ("iPhone16,1", "iPhone 15 Pro"), ("iPhone18,4", "iPhone Air"),
                       ("iPad8,4", "iPad Pro 11-inch (1st generation)"), ("iPad13,18", "iPad (10th generation)"),
                       ("Watch7,5", None), ("iPhone99,9", None), ("arm64", None), ("<b>", None)):
        shown = f'{name} <small class="code">{code}</small>' if name else f"<bdi>{html.escape(code)}</bdi>"
        assert backfeedr.device_html(code) == shown


# -- In a real browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """Headless Chromium, driven through a socket. It keeps all messages since the last page began to load."""

    def __init__(self, profile, *options):
        self._socket, pipe = socket.socketpair()
        self._socket.settimeout(30)
        self._incoming = self._socket.makefile("rb")
        # Chromium reads from descriptor 3 and writes to 4.
        command = ["bash", "-c", f'exec "$@" 3<&{pipe.fileno()} 4>&3', "", CHROMIUM, "--headless=new", "--no-sandbox",
                   "--disable-gpu", "--no-first-run", "--disable-sync", "--disable-background-networking",
                   "--disable-component-update", "--remote-debugging-pipe", f"--user-data-dir={profile}", *options,
                   "about:blank"]
        self._process = subprocess.Popen(command, pass_fds=[pipe.fileno()], stdin=subprocess.DEVNULL,
                                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        pipe.close()
        self._calls, self._session, self._messages = 0, {}, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(domain + ".enable")
        wait_until(lambda: self.run("document.readyState") == "complete")

    def call(self, method, **params):
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": params, **self._session}
        self._socket.sendall(json.dumps(message).encode() + b"\0")
        return self._wait_for("id", self._calls)[0]["result"]

    def _wait_for(self, name, value):
        while not (matches := [message for message in self._messages if message.get(name) == value]):
            text = b"".join(iter(lambda: self._incoming.read(1) or b"\0", b"\0"))
            assert text, "the browser has ended"
            self._messages.append(json.loads(text))
        return matches

    def run(self, script):
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def load(self, method, **params):
        """Makes a call that loads another page, and waits for the page."""
        self._messages = []
        self.call(method, **params)
        self._wait_for("method", "Page.loadEventFired")

    def seen(self, method):
        return [message["params"] for message in self._messages if message.get("method") == method]

    def close(self):
        self._socket.shutdown(socket.SHUT_RDWR)  # then the browser ends by itself
        try:
            self._process.wait(20)
        finally:
            self._process.kill()


class Threaded(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True


CHARTS_DRAWN = """[...document.querySelectorAll(".chart svg")].map(chart => chart.getBoundingClientRect().width > 100
    && ["fill", "stroke"].some(name => getComputedStyle(chart.firstChild)[name] != "none"))"""
SMALL_LINKS = """[...document.querySelectorAll("a, button, summary, select, label:has(input), :read-write")]
    .filter(link => link.offsetParent && !link.matches(".skip")
        && Math.max(...[...link.getClientRects()].map(box => box.height)) < 39.5).map(link => link.outerHTML)"""


@sqlite_only
@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")
@pytest.mark.once
def test_a_browser_shows_the_pages_without_errors(serve, tmp_path, demo):
    """The console is empty, no page scrolls sideways or loads from another host, charts are drawn, and the colours are
    right. A phone shows exact times, large links and fields. The overview has its answers on the first screen."""
    shutil.copy(demo.path, tmp_path / "test.db")
    server = serve(retention_days=0)
    serve.unchecked.append(server)
    long = parse_crash({**CRASH, **dict.fromkeys(("exception_type", "device_model", "app_version"), 200 * "x")})
    server.store.add(backfeedr.sha256(server.store.create_app(100 * "W")), [long])
    web = Threaded(("127.0.0.1", 0), ScriptedHandler)
    web.set_app(server)
    sign_in = f"document.querySelector('#token').value = '{TOKEN}'; document.querySelector('main button').click()"
    group = "location = [...document.querySelectorAll('.list a[href*=\"/crashes/\"]')].pop().href"
    with in_thread(web) as url, closing(Browser(tmp_path / "profile")) as browser:
        for title, charts, method, params in (
                ("Sign in", 0, "Page.navigate", {"url": url + "/"}),
                ("Overview", 4, "Runtime.evaluate", {"expression": sign_in}),
                ("", 1, "Runtime.evaluate", {"expression": group}),
                *((path[1:].title(), 7 * (path == "/usage"), "Page.navigate", {"url": url + path})
                  for path in PAGES[1:])):
            browser.load(method, **params)
            assert browser.run("document.title").endswith(title + " - backfeedr")
            for width, scheme in ((1280, "light"), (1280, "dark"), (970, "light"), (390, "dark"), (390, "light")):
                browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1,
                             mobile=width < 600)
                browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
                assert browser.run("document.documentElement.scrollWidth") <= width == browser.run("innerWidth")
                assert browser.run(CHARTS_DRAWN) == [True] * charts
                red, *_ = re.findall(r"\d+", browser.run("getComputedStyle(document.body).backgroundColor"))
                assert int(red) > 200 if scheme == "light" else int(red) < 50
                assert title != "Overview" or width < 1280 or browser.run(
                    "document.querySelector('.grid').getBoundingClientRect().bottom") < 900
            assert browser.run(SMALL_LINKS) == []
            assert browser.run("document.documentElement.scrollHeight") < 4000
            browser.run("document.querySelectorAll('details').forEach(details => details.open = true)")
            assert browser.run("document.documentElement.scrollWidth") <= 390, "with all details open"
            browser.run("document.documentElement.style.fontSize = '200%'")
            assert browser.run("document.documentElement.scrollWidth") <= 390, "with text twice as large"
            assert {text[:2] for text in browser.run("""["body", "input", "select", "textarea"].flatMap(name => [
                ...document.querySelectorAll(name)].map(node => getComputedStyle(node).fontSize))""")} <= {"30", "32"}
            dark = [{"name": "prefers-color-scheme", "value": "dark"}]
            browser.call("Emulation.setEmulatedMedia", features=dark, media="print")
            assert browser.run("getComputedStyle(document.body).color") == "rgb(31, 30, 27)", "on paper"
            assert {text[:3] for text in browser.run("""[...document.querySelectorAll("time")].map(
                time => getComputedStyle(time, "::after").content)""")} <= {'", '}
            assert not any(map(browser.seen, ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")))
            requests = [event["request"]["url"] for event in browser.seen("Network.requestWillBeSent")]
            assert requests and all(request.startswith((url, "data:")) for request in requests)


# -- Alerts and the feed

def test_the_apps_page_adds_tests_and_removes_channels_and_shows_a_secret_once(api, clock, person, receiver):
    page = person.submit("add-channel", url=receiver.url + "/a/secret/path", app="default", hour="9",
                         **{"on-crash.spread": True})
    secret, = re.findall("whsec_[A-Za-z0-9+/=]+", html.unescape(page.text))
    assert sql(api.server, "select url, secret, app_id, kinds, with_reason, digest_at from channels") == [
        (receiver.url + "/a/secret/path", secret, 1, "crash.new,crash.regressed,crash.unmuted,crash.spread", 0, None)]
    assert not re.search("whsec|secret/path", person.get("/apps").text) and "...path" in person.text("/apps")
    assert "Sent a test message to channel 1." in person.submit("test-channel", id="1")
    assert "Facts Last sent State" in person.text("/apps") and "just now no errors" in person.text("/apps")
    assert receiver.bodies[0]["data"]["facts"] == [{"type": "test", "text": "This is a test of channel 1."}]
    receiver.status = 500
    assert "Channel 1: it answered 500." in person.submit("test-channel", 400, id="1")
    assert "it answered 500, just now ; 0 waiting" in person.text("/apps")
    page = person.submit("add-channel", 400, url="ftp:/", reason=True, **{"on-digest": True, "on-crash.new": False})
    assert "A channel&#039;s address is like https://" in page.text
    form, = (form for form in forms_of(page) if "url" in form.fields)
    assert [form[name].checked for name in ("on-crash.new", "on-digest", "reason")] == [False, True, True]
    assert "<details open" in page.text and form["url"].value == "ftp:/"
    nothing = dict.fromkeys((f"on-{kind}" for kind in backfeedr.FACT_KINDS), False)
    assert "Check at least one fact." in send(form, 400, url="https://example.com", **nothing)
    page = send(form, 200, url="slack+https://example.com/1", **{"on-digest": True})
    assert "Added channel 2." in page.text and "whsec" not in page.text
    assert sql(api.server, "select with_reason, app_id, digest_at from channels where id = 2") == [
        (1, None, parse_time("2026-03-13T07:00:00Z"))]
    for number in "1", "2":
        assert f"Removed channel {number}." in person.submit("remove-channel", id=number)
    assert "nobody is notified" in person.text("/apps")


def feed_of(person, path):
    """Returns title, time, id and link of each entry of the feed, and the feed itself."""
    answer = person.web.get(path)
    assert answer.content_type == "application/atom+xml"
    feed = ElementTree.fromstring(answer.text.replace(' xmlns="http://www.w3.org/2005/Atom"', "", 1))
    return [(*map(entry.findtext, ("title", "updated", "id")), entry.find("link").attrib["href"])
            for entry in feed.iter("entry")], feed


def test_the_feed_lists_new_and_regressed_groups_and_needs_its_token(serve, clock):
    api = Api(serve(public_url="http://crashes.example.com"))
    api.server.store.create_app("Beta", is_test=True)
    person, stranger, hashes = Person(api.server).signed_in(), Person(api.server), []
    for kind in ("A", "<b>&'\"\x01\ufffe\ud800]]>"):
        hashes.append(post_crash(api, exception_type=kind, app_version="1.0"))
        clock.move(60)
    for query in ("", "?token=", "?token=" + TOKEN, "?token=\xff"):  # there is no token yet
        assert "Not found" in person.web.get("/crashes.atom" + query, status=404)
    url, = re.findall(r"http://crashes.example.com(/crashes.atom\?token=bf_feed_[0-9a-f]{32})<",
                      person.submit("make-feed").text)
    assert "bf_feed_" not in person.get("/apps").text
    assert url[-40:].encode() not in content_of(api.server)
    entries, feed = feed_of(stranger, url)
    assert [entry[:2] for entry in entries] == [
        ("New: <b>&'\"\ufffd\ufffd\ufffd]]>", "2026-03-12T14:31:00Z"), ("New: A", NOW)]
    assert entries[1][3] == f"http://crashes.example.com/crashes/{hashes[0]}?app=default"
    assert feed.find("link[@rel='self']").attrib["href"] == "http://crashes.example.com" + url
    assert feed.findtext("updated") == entries[0][1]
    api.post(CRASHES, {**CRASH, "exception_type": "A"})
    sql_run(api.server, f"""
        insert into triage (app_id, group_hash, state, changed_at, regressed_at)
        values (1, '{hashes[0]}', 'open', 0, {api.server.store.now})""")
    later, _ = feed_of(stranger, url + "&app=default")
    assert later[0][:2] == ("Regressed: A", "2026-03-12T14:32:00Z") and later[1:] == entries
    assert later[0][2] != entries[1][2] and feed_of(stranger, url + "&app=Beta")[0] == []
    stranger.web.get(url + "&app=nobody", status=404)
    api.server.store.add(KEY_HASH, [parse_crash({**CRASH, "exception_type": f"E{number}"}) for number in range(60)])
    assert len(feed_of(stranger, url)[0]) == 50
    person.submit("make-feed")
    stranger.web.get(url, status=404)
    person.submit("withdraw-feed")
    assert sql(api.server, "select name from secrets") == [("admin_token",)]


# == Server ====================================================================

PROGRAM = "-m", "backfeedr"  # not the file's name: Python would compile it at each start


def start_python(*arguments, stdout=subprocess.PIPE, **variables):
    """A Python process with no settings but these."""
    environ = clean_environ(**{"PYTHONPATH": str(SERVER.parent), **variables})
    return subprocess.Popen([sys.executable, *arguments], env=environ, stdout=stdout, stderr=subprocess.PIPE, text=True)


class Running:
    """A real server in its own process, on a free port."""

    def __init__(self, db, *arguments, program=PROGRAM, **variables):
        program = [EXAMPLES / "postgres.py", db] if str(db).startswith("postgresql:") else [*program, "--db", db]
        self.db, self.process = db, start_python(*program, "--port", "0", *arguments, **{
            "BACKFEEDR_API_KEY": KEY, "BACKFEEDR_AUTH_TOKEN": TOKEN, "BACKFEEDR_RATE_LIMIT": "0", **variables})
        line = self.process.stdout.readline()
        assert line.startswith("backfeedr on http://"), self.process.communicate()
        self.url = line.split()[-1]
        self.port = urlsplit(self.url).port

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def post(self, path, body, connection=None, **headers):
        connection = connection or self.connect()
        raw = json.dumps(body).encode() if isinstance(body, dict) else body
        connection.request("POST", path, raw, {"X-Backfeedr-Key": KEY, **headers})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    def send(self, request):
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        connection.sendall(request)
        return connection

    def stop(self, number=signal.SIGTERM, seconds=20):
        """Its exit status, output and errors; raises TimeoutExpired after these seconds."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, out, err


@pytest.fixture
def run(tmp_path):
    """Starts real servers; at the end, kills those that still run."""
    started = []

    def start(*arguments, db=tmp_path / "run.db", **variables):
        started.append(Running(db, *arguments, **variables))
        return started[-1]

    yield start
    for server in started:
        server.process.kill()
        server.process.communicate()


def pytest_generate_tests(metafunc):
    """Marks each test that starts a real server with `run`, or installs packages, as slow."""
    if {"run", "pip"} & {*metafunc.fixturenames}:
        pytest.mark.slow(metafunc.function)


class Load:
    """Clients that post crashes and batches, each on its own connection, until they are stopped or cannot go on.
    `acknowledged` has the ids of every 201, `others` all other answers; `lost` counts requests without an answer."""

    def __init__(self, servers, clients=8, key=KEY):
        self.acknowledged, self.lost, self.others, self.stopped = [], 0, [], threading.Event()
        self.pool = ThreadPoolExecutor(clients)
        self.clients = [self.pool.submit(self._run, servers[n % len(servers)], n, key) for n in range(clients)]

    def _run(self, server, n, key):
        connection, count = server.connect(), 0
        while not self.stopped.is_set():
            count += 1
            try:
                status, answer = server.post(*self._report(n, count), connection, **{"X-Backfeedr-Key": key})
            except ConnectionRefusedError:  # nothing was sent
                return
            except (OSError, http.client.HTTPException):
                self.lost += 1
                return
            if status == 201:
                self.acknowledged += answer.get("ids") or [answer["id"]]
            else:
                self.others.append((status, answer))

    def _report(self, n, count):
        device = {"device_id_hash": f"device{n}-{count % 5}"}
        if count % 2:
            return CRASHES, {**CRASH, **device, "exception_type": f"T{count % 7}", "device_model": f"M{n % 3}"}
        start = {**EVENT, **device, "type": "session_start", "session_id": f"s{n}-{count}"}
        return BATCH, {"events": [start, *[{**EVENT, **device}] * 9]}

    def finish(self):
        self.stopped.set()
        for client in self.clients:
            client.result(30)


def stored_ids(path):
    return [id for table in ("crashes", "events") for id, in sql(path, f"select id from {table} order by seq")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stop_answers_every_request_and_a_kill_loses_nothing_acknowledged(run, number):
    server = run()
    connection, sent = server.connect(), [server.post(CRASHES, CRASH)[1]["id"] for _ in range(5)]
    for _ in range(5):
        sent += server.post(BATCH, {"events": [EVENT] * 10}, connection)[1]["ids"]
    load = Load([server], clients=16)
    wait_until(lambda: len(load.acknowledged) >= 480)
    status = server.stop(number, seconds=10)
    load.finish()
    acknowledged, ids = sent + load.acknowledged, stored_ids(server.db)
    assert load.others == [] and [id for id in ids if id in set(sent)] == sent
    assert len(set(ids)) == len(ids) and not Counter(acknowledged) - Counter(ids)
    if number != signal.SIGKILL:
        assert (status, load.lost, len(ids)) == ((0, "", ""), 0, len(acknowledged))
        assert not server.db.with_name("run.db-wal").exists()
    check_database(server.db)


def test_a_first_start_prints_its_url_and_a_curl_line_that_works_even_for_ipv6(run):
    host = "127.0.0.1"
    with suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        host = "::1"  # many containers have no IPv6
    server = run("--host", host, BACKFEEDR_API_KEY="", BACKFEEDR_AUTH_TOKEN="")
    assert server.url == f"http://{f'[{host}]' if ':' in host else host}:{server.port}"
    outcome = run_program("bash", "-c", printed(server.process, r"curl(?s:.*)\n        -d .*\n")[0])
    assert set(json.loads(outcome[1])) == {"id", "group_hash"}, outcome
    assert server.stop()[0] == 0 and len(stored_ids(server.db)) == 1


def test_300_clients_that_send_byte_by_byte_delay_neither_reports_nor_a_stop(run):
    """A stop takes at most 10 s; this test shortens its wait by 3 s."""
    program = "import backfeedr; backfeedr.DRAIN_SECONDS -= 3; raise SystemExit(backfeedr.main())"
    server = run(program=("-c", program), BACKFEEDR_THREADS="2")
    head = f"POST {CRASHES} HTTP/1.1\r\nX-Backfeedr-Key: {KEY}\r\nContent-Length: 1000\r\n\r\n".encode()
    slow = [server.send(head if n % 2 else head[:40]) for n in range(300)]  # within a body, or within a header
    fast = server.connect()
    for _ in range(5):
        for connection in slow:
            connection.sendall(b" ")
        began = time.monotonic()
        assert server.post(CRASHES, CRASH, fast)[0] == 201 and time.monotonic() - began < 5
    assert server.stop(seconds=10 - 3) == (0, "", "")
    for connection in slow:
        connection.close()
    assert len(stored_ids(server.db)) == 5


@pytest.fixture
def web_server(serve, clock, monkeypatch):
    """A real web server in this process, with a clock moved by hand. `run_once` lets it handle what has arrived."""
    for module in ("channel", "server"):
        monkeypatch.setattr(f"waitress.{module}.time", SimpleNamespace(time=clock))
    app = serve(rate_limit=0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = backfeedr._make_server(app, app.settings, listener)
        server.app = app
        server.run_once = lambda: server.asyncore.loop(timeout=0, use_poll=True, map=server._map, count=1)
        yield server
        server.task_dispatcher.shutdown()
        server.asyncore.close_all(server._map)


def test_500_requests_at_once_get_four_answers_and_a_client_that_does_not_read_is_closed(
        web_server, clock, monkeypatch):
    answered = []
    monkeypatch.setattr(web_server.app, "_health", lambda _: answered.append(1) or (200, {"status": "x" * 25_000}))
    web_server.app._router = web_server.app._routes()
    request, send = b"GET /api/v1/health HTTP/1.1\r\nHost: x\r\n\r\n", backfeedr._Channel.send
    for reads_later in (True, False):
        monkeypatch.setattr(backfeedr._Channel, "send", lambda *_, **__: 0)  # the client reads nothing
        connection = connect_and_send(web_server, request * 500)
        wait_until(lambda: web_server.run_once() or web_server.active_channels)
        channel, = web_server.active_channels.values()
        wait_until(lambda: web_server.run_once() or channel.close_when_flushed)
        assert channel.requests == [] and channel.total_outbufs_len < 30_000 * len(answered)
        assert len(answered) == backfeedr.MAX_PIPELINED == 4
        clock.move(59)
        web_server.maintenance(clock.seconds)
        assert web_server.active_channels
        if reads_later:
            monkeypatch.setattr(backfeedr._Channel, "send", send)
            answers = read_until(connection, web_server, b"Connection: close")
            wait_until(lambda: answers.extend(read_some(connection, web_server) or b"")
                       or answers.count(b"x" * 25_000) == len(answered))
            assert answers.count(b"200 OK") == len(answered)
        else:
            clock.move(2)
            web_server.maintenance(clock.seconds)
        wait_until(lambda: web_server.run_once() or web_server.active_channels == {})
        connection.close()
        answered.clear()


LARGE_HEAD = b"POST /api/v1/crashes HTTP/1.1\r\nContent-Length: 5000000\r\n\r\n"


def test_a_client_that_sends_all_of_a_refused_body_before_it_reads_sees_the_answer_and_no_reset(run):
    server = run()
    with server.send(LARGE_HEAD + b"x" * 5_000_000) as raw:
        answer = http.client.HTTPResponse(raw)
        answer.begin()
        assert (answer.status, json.loads(answer.read())) == (413, {"error": "request body too large"})
        assert raw.recv(1) == b""
    assert server.stop() == (0, "", "")


def refuse(server, body=b""):
    """A connection whose 413 is made but not sent yet, as the client and the server see it."""
    connection = connect_and_send(server, LARGE_HEAD + body)
    wait_until(lambda: server.active_channels or server.run_once())
    channel, = server.active_channels.values()
    wait_until(lambda: channel.requests or channel.close_when_flushed or server.run_once())
    wait_until(lambda: channel.close_when_flushed and not channel.requests)
    return connection, channel


@pytest.mark.parametrize("requests, duration", [(0, [61]), (1, range(64, 70)), (12, [200])])  # of 180 bytes, a second
def test_what_comes_after_a_refused_request_is_dropped_and_times_out_if_it_comes_slowly(
        web_server, clock, requests, duration):
    connection, channel = refuse(web_server)
    assert b" 413 " in read_until(connection, web_server)
    wait_until(lambda: read_some(connection, web_server) is None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else most are not sent before the clock moves
    seconds = 0
    while channel.connected and seconds < 200:
        connection.sendall(raw_post() * requests)
        web_server.run_once()
        clock.move(1)
        web_server.maintenance(clock.seconds)
        seconds += 1
    connection.close()
    assert seconds in duration and count(web_server.app, "crashes") == 0


@pytest.mark.parametrize("loss", ["closed", "reset", "timed out"])
def test_a_connection_that_is_lost_before_its_413_is_closed(web_server, caplog, monkeypatch, loss):
    connection, channel = refuse(web_server)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", loss == "reset", 0))
    if loss == "timed out":
        monkeypatch.setattr(backfeedr._Channel, "send", raising(TimeoutError(errno.ETIMEDOUT, loss)))
        web_server.run_once()
        assert (channel.socket, web_server.active_channels) == (None, {})
    connection.close()
    wait_until(lambda: web_server.run_once() or not web_server.active_channels)
    assert (caplog.messages == [] or loss == "timed out") and count(web_server.app, "crashes") == 0


def test_a_413_that_cannot_be_sent_at_once_is_sent_later_and_what_came_with_its_request_is_forgotten(
        web_server, monkeypatch):
    connection, channel = refuse(web_server, b"x" * 1000)
    tries, send = iter([True]), backfeedr._Channel.send
    monkeypatch.setattr(backfeedr._Channel, "send", lambda *data, **options: (
        0 if next(tries, False) else send(*data, **options)))
    assert b" 413 " in read_until(connection, web_server)
    wait_until(lambda: read_some(connection, web_server) is None)
    assert channel.connected and channel.request is None, "a stop would wait for the rest of a request"
    connection.sendall(b"x" * 1000)
    connection.close()
    wait_until(lambda: web_server.run_once() or not web_server.active_channels)
    assert count(web_server.app, "crashes") == 0


def test_x_forwarded_proto_is_believed_from_this_host_and_never_refused(web_server):
    https = b"X-Forwarded-Proto: https"
    for address, header, secure in (
            ("127.0.0.1", https, True), ("127.0.0.1", b"Host: x", False), ("127.0.0.1", https + b", http", False),
            ("127.0.0.1", b"X-Forwarded-Proto: ftp", False), ("::1", https, True), ("10.1.2.3", https, False)):
        with connect_and_send(web_server, b"GET " + web_server.app.pages.invite("").encode()) as connection:
            wait_until(lambda: web_server.run_once() or web_server.active_channels)
            for channel in web_server.active_channels.values():
                channel.addr = (address, 1)
            connection.sendall(b" HTTP/1.1\r\n" + header + b"\r\n\r\n")
            head = read_until(connection, web_server, b"\r\n\r\n").lower().partition(b"\r\n\r\n")[0]
        assert b" 303 " in head and (b"; secure" in head) == secure, (address, header)


def connect_and_send(server, request):
    connection = socket.create_connection(("127.0.0.1", int(server.effective_port)))
    connection.setblocking(False)
    connection.sendall(request)
    return connection


def read_some(connection, server):
    """What the server has sent by now; None if it has closed the connection."""
    server.run_once()
    try:
        return connection.recv(65536) or None
    except BlockingIOError:
        return b""
    except ConnectionError:
        return None


def read_until(connection, server, last=b"}"):
    """What the server sends until `last` is in it."""
    answer = bytearray()
    wait_until(lambda: answer.extend(read_some(connection, server) or b"") or last in answer)
    return answer


def raw_post(path=CRASHES, body=CRASH, **headers):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"X-Backfeedr-Key": KEY, "Content-Length": len(raw), **headers}
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items()]
    return f"POST {path} HTTP/1.1\r\n{''.join(lines)}\r\n".encode() + raw


@pytest.mark.parametrize("request_bytes, status", [
    (raw_post(), b"201 Created"), (raw_post(X_Backfeedr_Key="?"), b"401 Unauthorized"),
    (b"GET /api/v1/health HTTP/1.1\r\nHost: x\r\n\r\n", b"200 OK"),
    (b"GET /api/v1/nowhere HTTP/1.1\r\nHost: x\r\n\r\n", b"404 Not Found")])
def test_an_answer_says_its_length_and_whether_the_connection_ends(web_server, request_bytes, status):
    for version, header, is_last in (
            (b"HTTP/1.1", b"Connection: keep-alive", False), (b"HTTP/1.1", b"Connection: Close", True),
            (b"HTTP/1.0", b"Host: x", True)):
        request = request_bytes.replace(b"HTTP/1.1\r\n", version + b"\r\n" + header + b"\r\n")
        with connect_and_send(web_server, request) as connection:
            head, _, body = bytes(read_until(connection, web_server)).partition(b"\r\n\r\n")
            if is_last:
                wait_until(lambda: read_some(connection, web_server) is None)
        first, *lines = head.split(b"\r\n")
        names = [line.partition(b": ")[0] for line in lines]
        assert first == version + b" " + status
        assert b"Content-Length: %d" % len(body) in lines and (b"Connection: close" in lines) == is_last
        assert len({*names}) == len(names) and {b"Date", b"Content-Type"} < {*names}
    assert count(web_server.app, "crashes") == (3 if status == b"201 Created" else 0)


@pytest.mark.parametrize("start", [b"", b"G", b"GET /api/v1/health HTTP/1.1\r\nX: ",
                                   b"POST /api/v1/crashes HTTP/1.1\r\nContent-Length: 1000\r\n\r\n",
                                   b"POST /api/v1/crashes HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3e8\r\n"])
def test_a_connection_with_an_incomplete_request_is_closed_after_a_minute(web_server, clock, start):
    with connect_and_send(web_server, start) as connection:
        seconds = 0
        while read_some(connection, web_server) is not None and seconds < 100:
            clock.move(1)
            seconds += 1
            connection.sendall(b"x" if start else b"")
    assert 60 < seconds <= 60 + 2 * 10 and not web_server.active_channels and count(web_server.app, "crashes") == 0


@pytest.mark.parametrize("size, seconds, statuses", [(0, 30, [201] * 3), (300_000, 100, [201]), (300_000, 300, [None])])
def test_a_slow_phone_has_time_for_its_report_but_not_for_ever(web_server, clock, size, seconds, statuses):
    """Three reports on one connection may take 30 s each; 300 kB may take 100 s, but not 300 s."""
    request = raw_post(body={**CRASH, "log": "x" * size})
    with connect_and_send(web_server, b"") as phone:
        for n, status in enumerate(statuses, 1):
            for second in range(seconds):
                phone.sendall(request[len(request) * second // seconds:len(request) * (second + 1) // seconds])
                clock.move(1)
                received = second + 1 < seconds and read_some(phone, web_server)
                if received is None:
                    break
                assert not received
            assert (None if received is None else int(read_until(phone, web_server)[9:12])) == status
            assert count(web_server.app, "crashes") == (n if status else 0)


def test_only_one_thread_at_a_time_sends_on_a_connection(web_server):
    """Otherwise an answer and the `100 Continue` of the next request would be mixed, and both sent twice."""
    was_free = []

    class WatchedChannel(web_server.channel_class):
        def send(self, data, do_close=True):
            lock = self.outbuf_lock
            with ThreadPoolExecutor(1) as other:
                was_free.append(other.submit(lambda: lock.acquire(blocking=False) and not lock.release()))
            return super().send(data, do_close)

    web_server.channel_class = WatchedChannel
    get = b"GET /api/v1/health HTTP/1.1\r\n\r\n"
    with connect_and_send(web_server, get) as client:
        answer = read_until(client, web_server)
        client.sendall(get + b"POST /api/v1/crashes HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
        answer += read_until(client, web_server, b"100 Continue")
    assert (answer.count(b'{"status": "ok"}'), answer.count(b"100 Continue")) == (2, 1)
    assert was_free and not any(attempt.result() for attempt in was_free)


@pytest.fixture
def answer_together(web_server, monkeypatch):
    """Sends requests, each on its own connection, for one commit; gives the statuses of the answers on each."""
    dispatcher = web_server.task_dispatcher
    dispatcher.shutdown()
    monkeypatch.setattr(dispatcher, "wake_thread", lambda: None)
    assert Api(web_server.app).post(CRASHES, b"{")[0] == 400  # from now on the key is cached

    def send(*requests):
        connections = [connect_and_send(web_server, request) for request in requests]
        wait_until(lambda: web_server.run_once() or dispatcher.waiting.qsize() >= len(requests))
        while not dispatcher.waiting.empty():
            dispatcher.gathering.acquire(blocking=False)
            dispatcher.store_gathered()
            assert not dispatcher.gathering.locked(), "another thread may gather"
        answers = [read_some(connection, web_server) for connection in connections]
        for connection in connections:
            connection.close()
        return [[int(part[:3]) for part in (answer or b"").split(b"HTTP/1.1 ")[1:]] for answer in answers]
    return send


@pytest.mark.parametrize("limit, is_gzip, expected", [
    ({"REQUESTS": 2}, False, [2, 2, 2, 1]), ({"BYTES": 250}, False, [3, 3, 1]), ({}, False, [7]),
    ({"BYTES": Settings.max_body_size + 1}, True, [2, 2, 2, 1])])  # each may become that large
def test_gathered_requests_have_a_limit(web_server, answer_together, monkeypatch, limit, is_gzip, expected):
    batches, submit_all = [], web_server.app.submit_all

    def watch(environs):
        batches.append(list(environs))
        submit_all(batches[-1])

    monkeypatch.setattr(web_server.app, "submit_all", watch)
    for name, value in limit.items():
        monkeypatch.setattr(backfeedr, "MAX_GATHERED_" + name, value)
    crash = json.dumps(CRASH).encode().ljust(100)
    request = raw_post(body=gzip.compress(crash), Content_Encoding="gzip") if is_gzip else raw_post(body=crash)
    assert answer_together(*[request] * 7) == [[201]] * 7
    assert list(map(len, batches)) == expected and count(web_server.app, "crashes") == 7


def test_reports_that_arrive_together_share_a_commit_or_an_error_and_each_client_is_answered(
        web_server, answer_together, monkeypatch, caplog):
    app, dispatcher, batch, total = web_server.app, web_server.task_dispatcher, {"events": [EVENT] * 3}, 3
    assert answer_together(
        raw_post(), raw_post(body=b"{"), raw_post(BATCH, batch), raw_post(EVENTS, batch),
        raw_post() + raw_post() + raw_post(body=b"")) == [[201], [400], [201], [400], [201, 201, 400]]
    assert count(app, "crashes") == count(app, "events") == total
    assert commits_of(app.store) == (2, 4), "one of one request, one of three"

    def disconnect_first(store_gathered=dispatcher.store_gathered):
        channel = dispatcher.waiting.get()
        channel.connected = False
        dispatcher.waiting.put(channel)
        store_gathered()

    fail = raising(ZeroDivisionError)
    for owner, name, value, answers, stored_count in (
            (backfeedr, "BUSY_TIMEOUT", -1, [[503]] * 3, 0),  # so each has waited too long for a thread
            (app, "submit_all", fail, [[500]] * 3, 0), (app.store, "add_all", fail, [[500]] * 3, 0),
            (app.store, "writing", fail, [[503]] * 3, 0),
            (backfeedr, "decode_json", fail, [[500]] * 3, 0), (web_server.channel_class, "service", fail, [[]] * 3, 3),
            (dispatcher, "store_gathered", disconnect_first, [[], [201], [201]], 2)):
        caplog.clear()
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, value)
            assert answer_together(*[raw_post()] * 3) == answers
        assert ("ZeroDivisionError" in caplog.text) == (value is fail) and count(app, "crashes") == total + stored_count
        assert answer_together(*[raw_post()] * 3) == [[201]] * 3
        total += stored_count + 3


@pytest.mark.parametrize("limiter, expected", [
    (SimpleNamespace(allow=lambda key: True, waits=True), False), (SimpleNamespace(allow=lambda key: True), False),
    (RateLimiter(9), True), (None, True)])
def test_only_reports_that_need_no_other_host_share_a_commit(tmp_path, limiter, expected):
    with Backfeedr(Settings(db_path=str(tmp_path / "test.db"), api_key=KEY), limiter=limiter, announce=str) as server:
        assert server.can_share_commit("POST", CRASHES, KEY) is False, "the key is not cached yet"
        assert Api(server).post(CRASHES, CRASH)[0] == 201
        assert server.can_share_commit("POST", CRASHES, KEY) is expected
        assert not any(server.can_share_commit(*request) for request in (
            ("GET", CRASHES, KEY), ("POST", CRASHES + "/", KEY), ("POST", CRASHES, ""), ("POST", CRASHES, "\u20ac")))


@pytest.mark.parametrize("key, body, status", [
    ("", b"{}", 401), ("nope", b"{}", 401), (KEY, b"{", 400), (KEY, b'{"occurred_at": 1}', 400),
    *[(KEY, json.dumps(CRASH).encode(), status) for status in (201, 422, 503)]])
def test_an_answered_request_leaves_nothing_in_memory(serve, monkeypatch, key, body, status):
    """It does not wait for the garbage collector, which runs rarely: a body may have a megabyte."""
    server, environ = serve(), environ_of(body=body, X_Backfeedr_Key=key, Idempotency_Key="a")
    if status == 422:
        Api(server).post(CRASHES, {**CRASH, "locale": "de"}, Idempotency_Key="a")
    if status == 503:
        monkeypatch.setattr(server.store, "max_waiters", 0)
    body_stream = weakref.ref(environ["wsgi.input"])
    gc.collect()
    gc.disable()
    try:
        answered, *_ = answer_to(server, environ)
        del environ
        assert (answered, body_stream()) == (status, None)
        assert not {backfeedr.Commit, backfeedr.RollUps, backfeedr.Symbols} & {*map(type, gc.get_objects())}
    finally:
        gc.enable()


def test_an_environ_that_is_used_again_counts_as_another_request(serve):
    server, environ, ids = serve(), {}, []
    for _ in range(2):
        environ.update(environ_of())
        ids.append(answer_to(server, environ)[2]["id"])
    assert sorted(ids) == sorted(stored_ids(server.store.path)) and len(set(ids)) == 2


def test_a_bad_report_with_a_revoked_key_is_refused_for_the_key(server, monkeypatch):
    other = server.store.create_app("Shop")
    for key in (KEY, other):
        assert Api(server).post(CRASHES, b"{", key=key)[0] == 400  # from now on the key is cached
    server.store.revoke_key(other)
    lookups, is_active_key = [], server.store.is_active_key
    monkeypatch.setattr(server.store, "is_active_key", lambda key: lookups.append(key) or is_active_key(key))
    environs = [environ_of(body=b"{", X_Backfeedr_Key=key) for key in (KEY, other, KEY, other)]
    server.submit_all(environs)
    answers = [answer_to(server, environ)[2]["error"] for environ in environs]
    assert answers == ["invalid JSON", "invalid API key"] * 2
    assert len(lookups) == 2, "once for each key, because each lookup waits for a database that is down"


def test_a_limiter_that_fails_for_a_key_fails_no_other_request_of_the_batch(server, monkeypatch):
    other = server.store.create_app("Shop")
    monkeypatch.setattr(server, "_charge", lambda key, seconds: 1 / (key == KEY_HASH))
    environs = [environ_of(X_Backfeedr_Key=key) for key in (KEY, other, KEY)]
    server.submit_all(environs)
    assert [answer_to(server, environ)[0] for environ in environs] == [201, 500, 201]
    assert count(server, "crashes") == 2


def test_an_empty_payload_has_its_own_answer_among_others(server):
    other = server.store.create_app("Shop")

    def answers(*requests):
        environs = [environ_of(path=path, body=json.dumps(body).encode(), X_Backfeedr_Key=key)
                    for path, body, key in requests]
        server.submit_all(environs)
        return [answer_to(server, environ)[::2] for environ in environs]

    batch = [(DIAGNOSTICS, MIXED, KEY), (DIAGNOSTICS, SPAN, other), (DIAGNOSTICS, {}, KEY), (CRASHES, CRASH, other)]
    mixed, empty, refused, crash = answers(*batch)
    assert (mixed[0], empty, refused[0], crash[0]) == (201, (200, NOTHING), 400, 201)
    assert sorted([*mixed[1]["ids"], crash[1]["id"]]) == sorted(stored_ids(server.store.path))
    assert commits_of(server.store) == (1, 2), "two requests in one commit"
    server.store.revoke_key(other)
    assert [status for status, _ in answers(*batch)] == [201, 401, 400, 401]
    assert [status for status, _ in answers(*batch[1:3])] == [401, 400] and len(stored_ids(server.store.path)) == 9


@pytest.mark.parametrize("length", [{"CONTENT_LENGTH": "5"}, {"CONTENT_LENGTH": "", "wsgi.input_terminated": True}])
def test_a_body_that_cannot_be_read_is_refused_and_not_logged(serve, caplog, length):
    """The client may have gone, or another web server may be unable to read a chunk."""
    server, gone = serve(), SimpleNamespace(read=raising(ConnectionResetError))
    assert call(server, environ={"wsgi.input": gone, **length}) == (400, {"error": "invalid body"})
    assert caplog.records == [] and count(server, "crashes") == 0


PRIVATE_CRASH = json.dumps({**CRASH, "device_id_hash": "private-device"}).encode()
KEY_LINE, LENGTH = b"X-Backfeedr-Key: " + KEY.encode(), b"Content-Length: %d" % len(PRIVATE_CRASH)
CHUNKED, EXPECT, HEALTH = b"Transfer-Encoding: chunked", b"Expect: 100-continue", b"/api/v1/health"


def raw_request(path, *headers, method=b"GET", body=b""):
    return b"\r\n".join([b"%s %s HTTP/1.1" % (method, path), *headers, b"", body])


def raw_crash(*headers, path=b"/api/v1/crashes", body=PRIVATE_CRASH):
    return raw_request(path, *headers, method=b"POST", body=body)


HOSTILE_BYTES = {  # by the status of the answer
    400: [*[raw_crash(KEY_LINE, *lengths) for lengths in ([LENGTH, LENGTH], [])],
          *[raw_crash(KEY_LINE, b"Content-Length: " + value) for value in (b"10", b"5, 5", b"+5", b"\xb2")],
          *[raw_crash(KEY_LINE, CHUNKED, body=part) for part in (b"0\r\n\r\n", b"x\r\n", b"-5\r\n", b"5\r\nabcdefgh")],
          *[raw_crash(KEY_LINE, LENGTH, name + b": \xff") for name in (
              b"X-Backfeedr-Timestamp", b"X-Backfeedr-Signature")],
          *[raw_request(b"/api/v1/" + path) for path in (b"h\xc3\xa4", b"metrics/devices?days=\xff")],
          *[raw_request(HEALTH, method=method) for method in (b"get", b"\xff")],
          *[raw_request(HEALTH, header) for header in (b" folded", b"a\rb: c")], raw_crash(KEY_LINE + b"\x00", LENGTH),
          raw_request(HEALTH, b"X: " + b" " * 32_000 + b"x"),  # would take waitress 16 s
          b"GET\r\n\r\n", b"\x16\x03\x01"],  # the start of TLS, which does not end
    401: [*[raw_crash(*keys, LENGTH) for keys in (
              [KEY_LINE, KEY_LINE], [b"X-Backfeedr-Key: \xff\xfe"], [b"X_Backfeedr_Key: " + KEY.encode()])],
          raw_request(b"/api/v1/events", b"Authorization: Bearer \xff")],
    404: [raw_request(b"/" + path) for path in (
        b"api/v1/health%00", b"api/v1/health\x00", b"api/v1/../v1/health", b"..%2f..%2fetc/passwd",
        b"api//v1/health", b"api/v1/health//", b"api/v1/h%C3%A4", b"api/v1/h%FF", b"x" * 30_000)],
    405: [raw_request(b"/api/v1/crashes", method=b"PUT")],
    413: [raw_crash(KEY_LINE, CHUNKED, body=part) for part in (
        b"2711\r\n" + b"x" * 10_001 + b"\r\n0\r\n\r\n", b"f" * 5000 + b"\r\n" + b"x" * 80_000, b"1" * 5_000,
        b"0\r\n" + b"a: b\r\n" * 1_000)],
    415: [raw_crash(KEY_LINE, LENGTH, *coding) for coding in (
        [b"Content-Encoding: \xff"], [b"Content-Encoding: gzip"] * 2)],
    431: [raw_request(b"/" + b"x" * 32_768), raw_request(HEALTH, b"X: " + b"x" * 32_768)],
    501: [raw_crash(KEY_LINE, b"Transfer-Encoding: chunked, gzip")]}
RAW_REQUESTS = [  # each with what is logged
    *((f"* {status}", request) for status, several in HOSTILE_BYTES.items() for request in several),
    ("POST /api/v1/crashes 201", raw_crash(KEY_LINE, LENGTH)),
    ("POST /api/v1/crashes 201", raw_crash(KEY_LINE, CHUNKED, body=b"%x\r\n%s\r\n0\r\n\r\n" % (
        len(PRIVATE_CRASH), PRIVATE_CRASH))),
    ("POST /api/v1/crashes 413", raw_crash(b"Content-Length: 10001", body=b"x" * 10_001)),
    ("POST /api/v1/events 400", raw_crash(KEY_LINE, LENGTH, path=b"/api/v1/events")),
    ("GET /api/v1/overview 404", raw_request(b"/api/v1/overview?app=private-app")),
    ("GET /api/v1/events 200", raw_request(b"/api/v1/events", b"Authorization: Bearer " + TOKEN.encode())),
    ("HEAD /api/v1/health 200", raw_request(b"http://private-user:private@host/api/v1/health#private", method=b"HEAD")),
    ("GET /a%0D%0AGET%20/b%1B%5B31m%1B%C3%A4 404", raw_request(b"/a%0d%0aGET%20/b%1b[31m\x1b%c3%a4")),
    ("GET /api/v1/crashes/bf_live_... 401", raw_request(b"/api/v1/crashes/" + KEY.encode())),
    ("GET /bf_admin_... 404", raw_request(b"/bf%5fadmin_" + TOKEN[9:].encode())),
    ("GET - 303", raw_request(b"?private")), ("- - 400", raw_request(b"http://[::1/")),
    ("GET /" + "x" * 199 + " 404", raw_request(b"/" + b"x" * 5000)),
    ("X" * 20 + " /api/v1/health 405", raw_request(HEALTH, method=b"X" * 5000)),
    ("GET /api/v1/health 200", raw_request(HEALTH, EXPECT, b"X: 1")),
    ("- - 400", raw_request(HEALTH, b"private header")), ("- - 431", raw_request(HEALTH, b"X: " + b"private" * 6000)),
    *((f"POST /api/v1/crashes {status}", raw_crash(header, body=b"")) for header, status in (
        (b"X-Backfeedr-Key: private-key", 401), (b"Content-Length: private", 400), (b"Content-Length: -1", 400),
        (b"Content-Length: " + b"9" * 5000, 400 if hasattr(sys, "get_int_max_str_digits") else 413),
        (b"Content-Length: 99999999", 413),
        (b"Content-Length: 99999999999", 413), (b"Transfer-Encoding: private", 501),
        (b"Transfer-Encoding: gzip", 501), (EXPECT + b"\r\nContent-Length: 0", 401),
        (EXPECT + b"\r\nContent-Length: +5", 400), (EXPECT + b"\r\nContent-Length: 5000000", 413)))]


def test_every_request_is_answered_in_json_and_logged_without_private_data_and_a_hostile_one_changes_nothing(run):
    server, ids = run("--verbose", BACKFEEDR_MAX_BODY_SIZE="10000"), []
    for logged, request in RAW_REQUESTS:
        with server.send(request) as raw:
            start = raw.recv(12, socket.MSG_PEEK | socket.MSG_WAITALL)
            assert start[:7] == b"HTTP/1." and start[9:] == logged[-3:].encode(), (request[:200], start)  # never 100
            answer = http.client.HTTPResponse(raw, method=logged.split()[0])
            answer.begin()
            assert answer.status < 400 or set(json.loads(answer.read())) <= {"error", "detail"}
            assert answer.status == 303 or answer.headers["Content-Type"] == "application/json"
        assert stored_ids(server.db) == ids or answer.status == 201, request[:200]
        assert server.post(CRASHES, CRASH)[0] == 201
        ids = stored_ids(server.db)
    status, out, err = server.stop()
    lines = re.findall(r"^(.*) [0-9]+\.[0-9] ms\n", err, re.M)
    assert (status, out, len(lines)) == (0, "", err.count("\n")) and {*lines[1::2]} == {"POST /api/v1/crashes 201"}
    assert [line for line, (logged, _) in zip(lines[::2], RAW_REQUESTS) if not fnmatch.fnmatchcase(line, logged)] == []
    assert len(lines) == 2 * len(RAW_REQUESTS) == 2 * (len(ids) - 2)
    assert not re.search(f"private|{KEY[8:]}|{TOKEN[9:]}|127.0.0.1", err), err
    check_database(server.db)


@pytest.mark.parametrize("address, public_url, is_warned", [
    ("0.0.0.0", "", True), ("192.0.2.1", "http://example.com", True), ("0.0.0.0", "https://example.com", False),
    ("127.0.0.2", "", False), ("::1", "", False), ("fe80::1%eth0", "", True)])
def test_a_server_open_to_others_without_https_warns(address, public_url, is_warned):
    warning = backfeedr._unencrypted_warning(Settings(public_url=public_url), address)
    assert bool(warning) == is_warned == (f" {address}, " in warning) == ("_PUBLIC_URL" in warning)


def test_a_start_finishes_an_interrupted_deletion_without_any_request(run, tmp_path):
    with Store(str(tmp_path / "run.db")) as store:
        for name in "Shop", "Kept":
            store.add(backfeedr.sha256(store.create_app(name)), [parse_event(dict(EVENT))] * 20)
        store.delete_app("Shop")
    server = run()
    wait_until(lambda: not sql(server.db, "select 1 from state where name like 'deleted%'"))
    assert server.stop() == (0, "", "")
    assert sql(server.db, "select app_id, count(*) from events group by app_id") == [(2, 20)]
    check_database(server.db)


def test_pruning_beside_a_server_under_load_refuses_no_report(run, tmp_path):
    path = tmp_path / "run.db"
    with Store(str(path), clock=Clock()) as store:  # the clock is far behind
        store.start(KEY)
        for _ in range(4):
            store.add(backfeedr.sha256(KEY), [parse_event(dict(EVENT, device_id_hash="old"))] * 500)
    server = run(BACKFEEDR_RETENTION_DAYS="0")
    pruning = start_python(*PROGRAM, "prune", "--db", path, BACKFEEDR_RETENTION_DAYS="1")
    connection, statuses = server.connect(), []
    while pruning.poll() is None or len(statuses) < 20:
        statuses.append(server.post(CRASHES, {**CRASH, "device_id_hash": "new"}, connection)[0])
    assert "2,000 events" in pruning.communicate()[1] and set(statuses) == {201}
    assert server.stop()[0] == 0
    assert sql(path, "select (select count(*) from events), (select count(*) from crashes)") == [(0, len(statuses))]
    assert sql(path, "select device from devices") == [(backfeedr.device_key("new"),)]
    assert sql(path, "pragma integrity_check") == [("ok",)]


def test_two_servers_commands_and_a_backup_on_one_file_lose_and_duplicate_nothing(run, command):
    servers = [run(), run()]
    first, again = [server.post(CRASHES, CRASH, **{"Idempotency-Key": "a"}) for server in servers]
    assert again == (200, first[1]) and stored_ids(servers[0].db) == [first[1]["id"]]
    key = command("app", "create", "Shop", "--db", "run.db")[1].strip()
    load, other = Load(servers, clients=8), Load(servers, clients=2, key=key)
    wait_until(lambda: len(load.acknowledged) > 150 and len(other.acknowledged) > 20)
    before = load.acknowledged + other.acknowledged
    assert start_python(*PROGRAM, "backup", "copy.db", "--db", "run.db").wait() == 0
    assert len(load.acknowledged + other.acknowledged) > len(before), "the backup blocks nobody"
    for clients in load, other:
        clients.finish()
        assert (clients.lost, clients.others) == (0, [])
    assert set(before) <= set(stored_ids("copy.db"))
    check_database("copy.db")
    acknowledged = [first[1]["id"], *load.acknowledged, *other.acknowledged]
    assert command("key", "revoke", key[:16], "--db", "run.db")[0] == 0
    for server in servers:
        assert server.post(CRASHES, CRASH, **{"X-Backfeedr-Key": key}) == (401, {"error": "invalid API key"})
        acknowledged.append(server.post(CRASHES, CRASH)[1]["id"])
    assert [server.stop()[0] for server in servers] == [0, 0]
    assert sorted(acknowledged) == sorted(stored_ids(servers[0].db))
    check_database(servers[0].db)


@pytest.mark.slow
def test_processes_that_start_together_share_one_database_and_a_second_store_keeps_the_locks_of_the_first(tmp_path):
    """POSIX drops all locks of a process on a file when it closes any of its descriptors. A command in another process
    would then take itself for the last user, and delete the WAL under the first store."""
    path = str(tmp_path / "new.db")
    started = [start_python(*PROGRAM, "app", "create", "--db", path, f"App{n}") for n in range(4)]
    outcomes = [(process.communicate(timeout=60), process.returncode) for process in started]
    assert [status for _, status in outcomes] == [0] * 4, outcomes
    with Store(path) as one:
        assert [app.name for app in one.apps()] == [f"App{n}" for n in range(4)]
        key = backfeedr.sha256(one.create_app("Shop"))
        one.add(key, [parse_event(dict(EVENT))])
        Store(path).close()
        assert start_python(*PROGRAM, "app", "list", "--db", path).wait() == 0
        assert Path(path + "-wal").exists()
        one.add(key, [parse_event(dict(EVENT))])
        count = f"import sqlite3; print(*sqlite3.connect({path!r}).execute('select count(*) from events'))"
        assert start_python("-c", count).communicate()[0] == "(2,)\n"


def test_a_locked_new_file_is_tried_again_until_the_timeout(tmp_path, monkeypatch):
    refused, path, execute = [], tmp_path / "new.db", backfeedr.Connection.execute

    def fail_three_times(connection, statement, *parameters):  # like two processes that change to WAL at once
        if "journal_mode" in statement and len(refused) < 3:
            refused.append(statement)
            raise sqlite3.OperationalError("database is locked")
        return execute(connection, statement, *parameters)

    with connected(path) as holder, monkeypatch.context() as patched:
        holder.execute("begin exclusive")
        patched.setattr(backfeedr, "BUSY_TIMEOUT", 0)
        with pytest.raises(StoreError, match="database is locked"):
            Store(str(path))
    monkeypatch.setattr(backfeedr.Connection, "execute", fail_three_times)
    monkeypatch.setattr(backfeedr.time, "sleep", lambda seconds: None)
    with Store(str(path)) as store:
        store.create_app("Shop")
        assert [app.name for app in store.apps()] == ["Shop"] and len(refused) == 3


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs prlimit of Linux")
def test_a_server_whose_disk_is_full_recovers_without_a_restart(run):
    server = run()
    assert server.post(CRASHES, CRASH)[0] == 201
    _, hard = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (300_000, hard))
    big = {"events": [{**EVENT, "properties": {"text": "x" * 2000}}] * 100}
    statuses = Counter(server.post(BATCH, big)[0] for _ in range(5))
    assert set(statuses) <= {201, 503} and statuses[503] >= 3
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
    assert server.post(BATCH, big)[0] == server.post(CRASHES, CRASH)[0] == 201
    status, out, err = server.stop()
    assert (status, out) == (0, "") and "Traceback" not in err
    assert count(server.db, "events") == 100 * (statuses[201] + 1)
    check_database(server.db)


def test_an_answer_does_not_wait_for_the_next_request_of_its_connection(run):
    server = run()
    with closing(sqlite3.connect(server.db, isolation_level=None)) as other, Store(str(server.db)) as store:
        # A report is batched only with a key that has been seen.
        for path, key in (("/api/v1/health", KEY), ("/api/v1/overview", store.create_app("Shop"))) * 2:
            other.execute("begin immediate")
            with server.send(f"GET {path} HTTP/1.1\r\n\r\n".encode() + raw_post(**{"X-Backfeedr-Key": key})) as client:
                for seconds, status in ((2.5, 200), (20, 201)):  # half the time that the second may wait for the lock
                    client.settimeout(seconds)
                    answer = http.client.HTTPResponse(client)
                    answer.begin()
                    assert answer.status == status and json.loads(answer.read())
                    other.execute("rollback" if status == 200 else "select 1")
    assert len(stored_ids(server.db)) == 4


# == Demo ======================================================================

DEMO_NOW = parse_time(NOW)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A store that the demo has filled, and the reports that it made up."""
    path, module = str(tmp_path_factory.mktemp("demo") / "demo.db"), load_example("demo")
    module.made_up_reports = lru_cache(module.made_up_reports)
    module.fill_demo(path, DEMO_NOW)
    with Store(path, clock=lambda: DEMO_NOW / 1000) as store:
        store.made_up = module.made_up_reports(DEMO_NOW, 1)
        yield store


def test_the_demo_makes_the_same_reports_for_the_same_seed_only():
    module = load_example("demo")
    module.DAYS = 2
    one, again, other = (module.made_up_reports(DEMO_NOW, seed) for seed in (1, 1, 2))
    assert one == again != other


def test_the_demo_has_something_to_show_on_every_page_and_its_roll_ups_equal_its_rows(demo):
    check_database(demo.path)
    for table in ("crashes", "events"):
        rows = sql(demo.path, f"select occurred_at, device_id_hash from {table}")
        assert Counter(rows) == Counter((report.occurred_at, report.fields["device_id_hash"])
                                        for report in demo.made_up if report.kind in table)
    metrics = backfeedr.Metrics(demo)
    crashes, events, devices = sql(demo.path, """
        select (select count(*) from crashes), count(*), count(distinct device_id_hash) from events""")[0]
    assert 200 <= crashes <= 500 and 15_000 <= events <= 26_000 and 300 <= devices <= 400
    assert sorted(app.is_test for app in demo.apps()) == [False, False, True]
    # A bad release, and one that fixed it.
    rates = {release["app_version"]: release["crash_free_sessions"]
             for release in metrics.releases("Tramwise")["releases"]}
    assert 92 <= rates["2.4.0"] <= 95 < rates["2.3.0"] < 99 < rates["2.4.1"]
    # Fewer sessions at weekends.
    sessions = metrics.sessions("Tramwise", days=28)
    weekend = [count for label, count in zip(sessions["labels"], sessions["sessions"])
               if date.fromisoformat(label).weekday() >= 5]
    assert sum(weekend) / 8 < 0.7 * (sum(sessions["sessions"]) - sum(weekend)) / 20
    # Groups of one release, of one model, of new systems, and a rare one.
    groups = [metrics.group(group["group_hash"]) for group in metrics.groups()["groups"]]
    assert 8 <= len(groups) <= 10 and groups[0]["versions"]["labels"] == ["2.4.0"] and groups[-1]["count"] <= 6
    assert ["iPad13,18"] in [group["device_models"]["labels"] for group in groups]
    assert any(all(system >= "26" for system in group["systems"]["labels"]) for group in groups)
    # A latest release that is worse, with new groups, breadcrumbs and events before their crashes.
    latest, attention = metrics.releases("Tramwise")["releases"][0], metrics.attention()
    assert latest["app_version"] == "2.4.2" and latest["verdict"]["word"] == "worse"
    assert {group["place"].partition(".")[0] for group in attention["new"]} == {"WidgetTimeline", "LiveActivity"}
    assert attention["first"][0]["place"].startswith("WidgetTimeline")
    for report in (group["reports"][0] for group in groups):
        assert report["extra"]["breadcrumbs"] and metrics.events_before(report)
    for frames in (group["reports"][0]["stack_trace"] for group in groups):
        assert 8 <= len(frames) <= 14 and {bool(frame["file"]) for frame in frames} == {True, False}


def test_the_demos_reports_are_received_after_they_occurred_and_the_api_accepts_them(demo, serve):
    api = Api(serve())
    for table, kind, path in (("crashes", "crash", CRASHES), ("events", "event", EVENTS)):
        assert sql(demo.path, f"select count(*) from {table} where occurred_at > received_at") == [(0,)]
        for report in [report for report in demo.made_up if report.kind == kind][-40:]:
            assert api.post(path, {**report.fields, "occurred_at": backfeedr.iso_time(report.occurred_at)})[0] == 201
    assert 60_000 <= DEMO_NOW - sql(demo.path, "select max(received_at) from events")[0][0] <= 600_000


@pytest.mark.parametrize("now", ["2026-03-12T00:00:00Z", "2026-03-12T00:10:00Z", "2026-03-15T03:00:00Z"])  # a Sunday
def test_the_demo_has_figures_for_today_at_any_hour(tmp_path, now):
    module, path = load_example("demo"), str(tmp_path / "test.db")
    module.DAYS = 2  # less than by default, which is slow
    module.fill_demo(path, parse_time(now))
    with Store(path, clock=Clock(now)) as store:
        metrics = backfeedr.Metrics(store)
        assert metrics.sessions(days=1)["sessions"][0] > 0 and metrics.active_devices(days=1)["dau"][0] > 0
        assert len(metrics.events()["events"]) == 50


# == Command line ==============================================================

@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs a command in a folder of its own; gives its status, output and errors."""
    for name in [name for name in os.environ if name.startswith("BACKFEEDR_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        try:
            status = main(list(arguments))
        except SystemExit as done:
            status = done.code
        return (status, *capsys.readouterr())

    return run


def output_of(command, *arguments):
    """The output of a command that succeeds without a message."""
    status, out, err = command(*arguments)
    assert (status, err) == (0, ""), (out, err)
    return out


def check_printed(outcome, text, status=0):
    """A program ended with this status and printed only this text, as an error, in which * stands for anything."""
    *ended, err = outcome
    assert ended == [status, ""] and fnmatch.fnmatchcase(err, text), outcome


def check_one_line(outcome, line):
    """A program failed, and its only output is this line, in which * stands for anything."""
    check_printed(outcome, line + "\n", status=1)
    assert outcome[2].count("\n") == 1, outcome


def test_a_server_runs_as_its_compiled_module_but_never_as_that_of_another_version(run, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # in many containers it is set
    script = tmp_path / "our server.py"
    compiled = importlib.util.cache_from_source(script)
    (tmp_path / "beside.py").touch()
    for version, is_damaged, variables in (
            ("1", False, {"PYTHONDONTWRITEBYTECODE": "1"}), ("1", False, {}), ("2", False, {}), ("2", True, {})):
        script.write_text(SERVER.read_text(encoding="utf-8").replace('__name__ == "__main__":\n', f"""\\
__name__ == "__main__":
    import beside
    print("{version}", sys.flags.utf8_mode, __file__, file=sys.stderr)
"""), encoding="utf-8")
        os.utime(script, (1_700_000_000, 1_700_000_000))  # size and time are those of the other version
        if is_damaged and Path(compiled).exists():
            os.truncate(compiled, 100_000)
        server = run("--verbose", program=["-X", "utf8", script], BACKFEEDR_PORT_80_TCP="tcp://h:80", **variables)
        assert server.post("/api/v1/crashes", CRASH)[0] == 201
        status, _, err = server.stop()
        assert status == 0 and err.count("ignored BACKFEEDR_PORT_80_TCP") == 1 and "POST /api/v1/crashes 201" in err
        is_restarted = hasattr(sys, "orig_argv") and not variables
        assert re.findall(rf"^{version} 1 (.*)", err, re.M) == [str(script), *[compiled] * is_restarted]


def test_apps_and_keys_are_created_listed_revoked_and_deleted(command):
    def listed(noun, columns):
        return [line.split()[:columns] for line in command(noun, "list")[1].splitlines()]

    expected = set()
    for app, prefix, argument, *options in (
            ("Shop", "bf_live_", "{:.16}"), ("Beta", "bf_test_", "{}", "--test"), ("Dots", "bf_live_", "{:.16}...")):
        status, key, err = command("app", "create", app, *options)
        keys = [key, command("key", "create", app)[1]]
        assert status == 0 and app in err and all(re.fullmatch(prefix + "[0-9a-f]{32}\n", k) for k in keys)
        assert command("key", "revoke", argument.format(key.strip())) == (
            0, "", f"Revoked the key {key[:16]}... of the app '{app}'.\n")
        expected |= {(k[:16] + "...", app, k != key) for k in keys}
    head, *lines = listed("key", 4)
    assert head == ["KEY", "APP", "CREATED", "REVOKED"]
    assert {(key, app, revoked == "-") for key, app, _, revoked in lines} == expected and len(lines) == 6
    assert not re.search("bf_[a-z]+_[0-9a-f]{9}", command("key", "list")[1]), "no key is shown whole"
    assert listed("app", 3) == [
        ["APP", "KIND", "KEYS"], ["Beta", "test", "1"], ["Dots", "live", "1"], ["Shop", "live", "1"]]
    for app in "Shop", "Beta", "Dots":
        assert command("app", "delete", app, "--yes")[0] == 0
        assert command("app", "delete", app, "--yes") == (1, "", f"backfeedr: there is no app named '{app}'\n")
    assert listed("key", 4) == [head]


def test_key_list_shows_the_day_of_the_last_use_and_the_requests_of_seven_days(command, clock):
    today = time.time()
    with opened(clock) as server:
        keys = {name: server.store.create_key("default") for name in ("never", "long ago", "now and then")}
        for name, days_ago, requests in (("long ago", 20, 3), ("now and then", 20, 2), ("now and then", 4, 5)):
            clock.seconds = today - days_ago * 86400
            for _ in range(requests):
                assert Api(server).post(EVENTS, EVENT, keys[name])[0] == 201
    head, *lines = command("key", "list")[1].splitlines()
    assert head.endswith("  REVOKED  LAST USED   REQUESTS IN 7 DAYS")
    cells = {line.split()[0][:16]: tuple(line.split()[-3:]) for line in lines}
    day = {days: time_text(today - days * 86400)[:10] for days in (4, 20)}
    assert [cells[key[:16]] for key in keys.values()] == [("-", "-", "0"), ("-", day[20], "0"), ("-", day[4], "5")]


def test_alert_commands_add_list_test_and_remove_channels_and_deliver_sends(command, clock, receiver):
    clock.seconds = time.time() - 120
    with opened(clock) as server:
        server.store.create_app("Shop")
        status, secret, err = command("alert", "add", receiver.url + "/hook/secret", "--app", "Shop", "--on",
                                      "crash.new,digest", "--hour", "23")
        assert status == 0 and re.fullmatch("whsec_.{44}\n", secret)
        assert "Created channel 1." in err and "can read what is sent" in err and "/hook" not in err
        assert command("alert", "add", f"slack+{receiver.url}/2", "--with-reason")[:2] == (0, "")
        note(server, app="Shop")
        lines = command("alert", "list")[1].splitlines()
        assert [line.split()[:3] for line in lines[1:]] == [
            ["1", f"{receiver.url}/...cret", "Shop"], ["2", f"slack+{receiver.url}/...", "all"]]
    assert command("deliver") == (0, "", "Messages sent: 2; failed: 0.\n")
    assert command("deliver") == (0, "", "Messages sent: 0; failed: 0.\n")
    assert command("alert", "test", "1") == (0, "", "Channel 1 accepted a test message.\n")
    assert "WARN" not in command("check")[1].replace("disk is nearly full", "")
    receiver.status = 404
    assert command("alert", "test", "1") == (1, "", "backfeedr: channel 1: it answered 404\n")
    assert "it answered 404" in command("alert", "list")[1]
    status, out, _ = command("check")
    assert status == 0 and f"\nWARN Channel 1 ({receiver.url}/...cret) has failed: it answered 404 at 20" in out
    receiver.status = 410
    assert command("alert", "test", "2") == (1, "", "backfeedr: channel 2: it answered 410\n")
    assert f"\nWARN Channel 2 (slack+{receiver.url}/...) has ended: it answered 410 at 20" in command("check")[1]
    assert command("alert", "remove", "1") == (0, "", "Removed channel 1.\n")
    for verb in "remove", "test":
        assert command("alert", verb, "1") == (1, "", "backfeedr: there is no channel 1: see 'alert list'\n")
    for options, problem in ((["--app", "Shopp"], "no app named"), (["--on", "crash.old"], "no fact 'crash.old'")):
        check_one_line(command("alert", "add", receiver.url, *options), f"*{problem}*")
    assert command("alert", "add", receiver.url, "--hour", "24")[0] == 2
    check_one_line(command("alert", "add", receiver.url, "--hour", "6"), "*the digest, which --on does not name*")
    assert len(command("alert", "list")[1].splitlines()) == 2


def test_an_app_deleted_twice_at_once_is_gone_and_each_command_prints_one_line(command, monkeypatch):
    with opened() as server:
        for path, body in ((EVENTS, EVENT), (CRASHES, CRASH)):
            assert Api(server).post(path, body)[0] == 201
    prune, outcomes = Store.prune, []

    def delete_again_and_prune(store):
        if not outcomes:
            outcomes.append(command("app", "delete", "default", "--yes"))
        return prune(store)

    monkeypatch.setattr(Store, "prune", delete_again_and_prune)
    outcomes.append(command("app", "delete", "default", "--yes"))
    assert outcomes == [(1, "", "backfeedr: there is no app named 'default'\n"),
                        (0, "", "Deleted the app 'default', its keys and all its reports.\n")]
    assert [sql("backfeedr.db", f"select * from {table}") for table in ("apps", "keys", *REPORT_TABLES)] \
        == [[]] * (2 + len(REPORT_TABLES))


def test_an_app_is_deleted_even_if_some_reports_are_left_and_the_error_says_so(command, monkeypatch):
    command("app", "create", "Shop")
    with monkeypatch.context() as patch:
        patch.setattr(Store, "catch_up", raising(StorageUnavailable))
        check_one_line(command("app", "delete", "Shop", "--yes"), (
            "backfeedr: the app 'Shop' is deleted, but some reports are left: run 'prune'"))
    assert sql("backfeedr.db", "select name from state where name like 'deleted%'") == [("deleted_1",)]
    command("prune")
    assert sql("backfeedr.db", "select name from state where name like 'deleted%'") == []


@pytest.mark.parametrize("is_terminal, typed, printed", [
    (True, "Shop\n", "*Type its name to confirm: Deleted the app 'Shop', its keys and all its reports.\n"),
    *[(True, typed, "*Type its name to confirm: *nothing was deleted\n") for typed in ("shop\n", "Shop \n", "\n", "")],
    *[(False, typed, "backfeedr: there is no terminal to confirm on; --yes deletes 'Shop' without asking\n")
      for typed in ("Shop\n", None)]])
def test_app_delete_asks_for_the_name_on_a_terminal_and_needs_yes_elsewhere(
        command, monkeypatch, is_terminal, typed, printed):
    command("app", "create", "Shop")
    monkeypatch.setattr(sys, "stdin", typed if typed is None else io.StringIO(typed))
    if is_terminal:
        sys.stdin.isatty = lambda: True
    is_left = "Deleted" not in printed
    check_printed(command("app", "delete", "Shop"), printed, status=is_left)
    assert len(command("app", "list")[1].splitlines()) == len(command("key", "list")[1].splitlines()) == 1 + is_left
    assert command("app", "delete", "Shop", "--yes")[0] == 1 - is_left


def test_every_argument_and_option_has_a_help_text():
    parsers, missing = [backfeedr._parser()], []
    for parser in parsers:
        for action in parser._actions:
            described = [action]
            if isinstance(action, argparse._SubParsersAction):
                described += action._choices_actions
                parsers += action.choices.values()
            missing += [item.dest for item in described if not item.help and item.dest != "==SUPPRESS=="]
    assert len(parsers) > 10 and missing == []


def opened(clock=time.time, **settings):
    """A server on the commands' own database."""
    return Backfeedr(Settings(db_path="backfeedr.db", api_key=KEY, auth_token=TOKEN, **settings), clock=clock)


def test_prune_uses_the_servers_retention_unless_told_otherwise_and_prints_what_it_deleted(command, clock, monkeypatch):
    """Otherwise a prune from a shell without the server's environment would delete what the server keeps."""
    clock.seconds = time.time() - 200 * A_DAY
    with opened(clock, retention_days=365) as server:
        add(server)
        add(server, 2000, type="custom", name="x" * 400)
        clock.move(50 * A_DAY)
        add(server, type="custom")
    for days, printed, left in (
            ("", "0 crashes and 0 events", 2001), ("0", "0 crashes and 0 events", 2001),
            ("180", "1 crash and 2,000 events", 1), ("100", "0 crashes and 1 event", 0)):
        monkeypatch.setenv("BACKFEEDR_RETENTION_DAYS", days)
        check_printed(command("prune"), f"Deleted {printed}; freed [0-9]*.[0-9] MB of [0-9]*.[0-9] MB.\n")
        assert count("backfeedr.db", "events") == left


def test_device_show_prints_everything_stored_and_forget_deletes_it(command):
    with opened() as server:
        Api(server).post(CRASHES, {**CRASH, "device_id_hash": "d1", "app_version": "1.0", "breadcrumbs": ["tap"]})
        Api(server).post(BATCH, {"events": [{**EVENT, "device_id_hash": "d1"}, EVENT]})
    device = json.loads(output_of(command, "device", "show", "d1"))
    [app], [crash], [event] = map(device.get, ("apps", "crashes", "events"))
    assert (app["app"], app["versions"], app["days"]) == ("default", ["1.0"], ["2026-03-12"])
    assert crash["extra"] == {"breadcrumbs": ["tap"]} and event["name"] == "purchase"
    check_printed(command("device", "forget", "d1"), "*1 crash and 1 event.*")
    for action in ("show", "forget"):
        assert command("device", action, "d1") == (1, "", "backfeedr: nothing is stored about a device 'd1'\n")
    assert sql("backfeedr.db", "select name from events") == [("purchase",)]


@pytest.fixture(scope="session")
def random_reports(tmp_path_factory):
    """A file with the reports of three apps from the last 40 days; made once."""
    path, clock = tmp_path_factory.mktemp("random") / "backfeedr.db", Clock()
    clock.seconds = time.time() - 40 * 24 * 3600
    with Backfeedr(Settings(db_path=str(path), api_key=KEY, auth_token=TOKEN), clock=clock) as server:
        fill(server, clock, 1, 150)
    return path


ODD_CRASH = {"exception_type": "SIGABRT", "exception_reason": "=1+1 \u2028 \u0001", "battery_level": -1.0,
             "is_charging": False, "free_memory_mb": 1.5,
             "stack_trace": [{"symbol": "\ufffd\n", "line": None, "more": {"deep": [1.0, -0.0, 10 ** 30]}}]}
NOT_OURS = {"id": 7, "app": "me", "extra": {"x": [1e300, None]}}


@pytest.fixture
def filled(command, clock, random_reports):
    """A server on the commands' own database, with reports of three apps."""
    shutil.copy(random_reports, "backfeedr.db")
    clock.seconds = time.time()
    with opened(clock) as server:
        Api(server).post(CRASHES, {**ODD_CRASH, **NOT_OURS, "occurred_at": "0001-01-01T00:00:00+14:00"})
        Api(server).post(EVENTS, {**EVENT, "occurred_at": "9999-12-31T23:59:59.999-23:59", "received_at": "",
                                  "is_test": 0, "properties": {"cell": "\t=1"}})
        yield server


def exported(command, kind, *arguments):
    return [json.loads(line) for line in output_of(command, "export", kind, *arguments).split("\n")[:-1]]


@sqlite_only
def test_check_allows_for_devices_that_expire_by_the_hour(one_day, clock):
    for minutes in (20, 23 * 60 + 50):
        add(one_day, type="custom", device_id_hash="d")
        clock.move(minutes * 60)
    one_day.store.prune()
    assert count(one_day, "events") == 1 and count(one_day, "devices") == 0
    assert backfeedr._check_roll_ups(one_day.store.path)


@sqlite_only
def test_an_import_restores_what_export_printed(command, filled):
    for kind in ("crashes", "events"):
        Path(kind).write_bytes(command("export", kind)[1].encode())
    Path("all").write_bytes(Path("events").read_bytes() + b"\n" + Path("crashes").read_bytes())
    count = Path("all").read_bytes().count(b"\n") - 1
    command("app", "create", "Old", "--db", "expired.db")
    sql_run("expired.db", f"insert into state values ('expired_crashes', {1 << 62}), ('expired_events', {1 << 62})")
    for path, new, known, old in (("other.db", count, 0, 0), ("other.db", 0, count, 0), ("expired.db", 0, 0, count)):
        assert command("import", "all", "--db", path) == (0, "", (
            f"Stored {new:,} reports; {known:,} were here already, and {old:,} are older than what is kept here."
            " Keys are not imported.\n"))
    for kind in ("crashes", "events"):
        assert command("export", kind, "--db", "other.db")[1].encode() == Path(kind).read_bytes()


@sqlite_only
def test_check_accepts_a_session_of_which_the_crash_has_expired_before_the_events(one_day, clock):
    add(one_day, 3, type="custom", session_id="s", device_id_hash="d")
    add(one_day, session_id="s", device_id_hash="d")
    clock.move(A_DAY + 1)
    with one_day.store.writing() as db:
        assert one_day.store._delete_due(db, 1) == {"crashes": 1, "events": 1}
    assert count(one_day, "events") == 2 and not count(one_day, "sessions")
    assert backfeedr._check_roll_ups(one_day.store.path)


@sqlite_only
def test_check_accepts_an_import_of_reports_that_are_too_old_for_some_sums(command, serve, monkeypatch):
    monkeypatch.setenv("BACKFEEDR_RETENTION_DAYS", "0")
    with serve("backfeedr.db", retention_days=0) as server:
        add(server, 3)
        add(server, 3, type="custom", device_id_hash="d")
    for kind in ("crashes", "events"):
        Path(kind).write_bytes(command("export", kind)[1].encode() + b"junk")
        assert command("import", kind, "--db", "other.db")[0] == 1, "the last line is junk"
        assert "\nok  roll-ups: " in output_of(command, "check", "--db", "other.db")
    keyless = "\nWARN App 'default' has no key, so it refuses all reports: see 'key create'\n"
    assert keyless in output_of(command, "check", "--db", "other.db")
    command("key", "create", "default", "--db", "other.db")
    assert keyless not in output_of(command, "check", "--db", "other.db")


def test_an_export_has_each_report_as_sent_with_what_the_server_added_filtered_by_app_or_day(command, filled):
    crash = exported(command, "crashes")[-1]
    assert crash.pop("id") == sql("backfeedr.db", "select id from crashes order by seq")[-1][0]
    assert crash.pop("group_hash") and parse_time(crash.pop("received_at")) == filled.store.now
    assert parse_time(crash.pop("occurred_at")) == parse_time("0001-01-01T00:00:00+14:00")
    assert crash == {**ODD_CRASH, "app": "default", "is_test": False, "extra": NOT_OURS}
    reports = exported(command, "events")
    assert exported(command, "events", "--app", "Beta") == [report for report in reports if report["is_test"]]
    for since in (reports[len(reports) // 2]["received_at"][:10], "9999-12-31", "0001-01-01"):
        expected = [report for report in reports if report["received_at"] >= since]
        assert exported(command, "events", "--since", since) == expected
    assert command("export", "events", "--app", "Nope") == (1, "", "backfeedr: there is no app named 'Nope'\n")
    for wrong in ("yesterday", "2026-02-30", "2026-3-1"):
        check_printed(command("export", "events", "--since", wrong), "*is not a date like 2026-03-12*", status=2)


def test_no_csv_cell_is_a_formula_and_a_byte_order_mark_is_written_on_request(command, filled):
    formulas = "=+-@\t\r\n\v\x1b\x01\x7f\x9b\uff1d\uff0b\uff0d\uff20"
    texts = ["a=", '"', ",\n", "a\x1b[2J\x9b", "\u00e9=", "a; -"]
    ends = ";\t\r\n\x01"  # of cells, for some spreadsheets
    for start in (*formulas, *texts, *(f"a{end}=" for end in ends)):
        Api(filled).post(EVENTS, {**EVENT, "name": start + "1"})
    written = {kind: command("export", kind, "--format", "csv")[1] for kind in ("crashes", "events")}
    assert command("export", "events", "--format", "csv", "--bom") == (0, "\ufeff" + written["events"], "")
    crashes, rows = ([*csv.DictReader(io.StringIO(text, newline=""))] for text in written.values())
    added = len(formulas) + len(texts) + len(ends)
    assert [row["name"] for row in rows[-added:]] == [
        *("'" + start + "1" for start in formulas), *(start + "1" for start in texts), *(f"a{end}'=1" for end in ends)]
    assert [row["id"] for row in rows] == [event["id"] for event in exported(command, "events")]
    assert json.loads(rows[-added - 1]["properties"]) == {"cell": "\t=1"}
    number, text = (crashes[-1][name] for name in ("battery_level", "exception_reason"))
    assert (number, text[:5]) == ("-1.0", "'=1+1"), "a negative number is no formula"


CONTROLS = "\x07\x08\x0c\r\x1b\x7f\x85\x9b\u061c\u200e\u200f\u2028\u202a\u202e\u2066\u2069"


def test_reports_are_escaped_on_a_terminal_and_exact_elsewhere(command, filled, monkeypatch):
    text = f"a{CONTROLS}\tb"
    Api(filled).post(EVENTS, {**EVENT, "device_id_hash": "d", "name": text, "properties": {text: text}})
    sql_run("backfeedr.db", f"update apps set name = name || '{text}'")
    sql_run("backfeedr.db", f"update keys set prefix = prefix || '{text}'")
    escaped = "a" + "".join(f"\\u{ord(character):04x}" for character in CONTROLS) + "\tb"
    for arguments, is_json in (
            (["device", "show", "d"], True), (["export", "events"], True), (["export", "events", "--format", "csv"], 0),
            (["app", "list"], False), (["key", "list"], False)):
        exact = output_of(command, *arguments)
        with monkeypatch.context() as terminal:
            terminal.setattr(sys.stdout, "isatty", lambda: True)
            shown = output_of(command, *arguments)
        assert not set(shown.replace("\r\n", "\n")) & set(CONTROLS), arguments
        if is_json:
            lines = [exact, shown] if arguments[0] == "device" else [each.split("\n")[-2] for each in (exact, shown)]
            before, after = map(json.loads, lines)
            assert before == after and (before.get("events") or [before])[0]["properties"] == {text: text}
            assert {"\x7f", "\x9b", "\u202e"} < set(exact), "JSON itself does not escape them"
        else:
            assert text in exact and escaped in shown
    for is_terminal, name in ((False, f"\n{CONTROLS}"), (True, "\n" + escaped[1:-2])):
        monkeypatch.setattr(sys.stderr, "isatty", lambda is_terminal=is_terminal: is_terminal)
        assert command("import", f"\n{CONTROLS}")[2] == f"backfeedr: cannot read {name}: No such file or directory\n"


def test_import_names_a_bad_line_and_stores_the_lines_before_it(command, filled, monkeypatch):
    monkeypatch.setattr(backfeedr, "IMPORT_LINES", 5)
    good = [json.dumps(event).encode() for event in exported(command, "events") if event["app"] == "default"][:12]
    Path("good").write_bytes(b"\n".join(good))
    for change, problem in (
            (b"junk", "invalid JSON"), (b"[]", "invalid JSON"), ({"id": None}, "missing id"),
            ({"id": "evt_" + "f" * 16}, "invalid id"), ({"id": "evt_0000000000000001"}, "invalid id"),
            ({"received_at": "2001-01-01T00:00:00Z"}, "invalid id"), ({"received_at": "soon"}, "invalid received_at"),
            ({"app": 1}, "invalid app"), ({"is_test": 1}, "invalid is_test"), ({"extra": []}, "invalid extra"),
            ({"occurred_at": None}, "missing occurred_at"), ({"type": "click"}, "invalid event type"),
            *[({"clock_ahead_ms": ahead}, "invalid clock_ahead_ms") for ahead in (-1, 10 ** 15, 10 ** 30, True, "1")],
            # The store refuses these, with the whole batch that they are in.
            *[({"app": name}, "an app's name is") for name in ("", "x" * 101)],
            ({"is_test": True}, "the app 'default' is a live one here")):
        start, before = ("line 8: ", 7) if problem.startswith(("invalid", "missing")) else ("", 5)
        bad = change if type(change) is bytes else json.dumps({**json.loads(good[7]), **change}).encode()
        Path("bad").write_bytes(b"\n".join([*good[:7], bad, *good[8:]]))
        Path("other.db").write_bytes(new_database())
        status, out, err = command("import", "bad", "--db", "other.db")
        assert (status, out, err.count("\n"), "line 8" in err) == (1, "", 1, before == 7), (change, err)
        assert err.startswith("backfeedr: " + start + problem) and f"{before} reports before it were stored" in err
        assert len(sql("other.db", "select * from events")) == before
        if before == 5 or change == b"junk":  # the other changes leave the same database
            message = command("import", "good", "--db", "other.db")[2]
            assert f"Stored {len(good) - before} reports; {before} were" in message
            check_database("other.db")


def test_a_report_that_came_after_a_clock_was_set_back_by_a_year_is_imported_with_its_time_of_receipt(command, filled):
    event = exported(command, "events")[0]
    received_at = parse_time(event["received_at"]) - 366 * DAY
    Path("events").write_text(json.dumps({**event, "received_at": iso_time(received_at)}))
    assert command("import", "events", "--db", "other.db")[0] == 0
    assert sql("other.db", "select id, received_at from events") == [(event["id"], received_at)]
    assert [each["received_at"] for each in exported(command, "events", "--db", "other.db")] == [iso_time(received_at)]


def test_an_import_without_disk_and_an_interrupted_export_end_with_one_line(command, filled, monkeypatch):
    Path("events").write_text(command("export", "events")[1])
    monkeypatch.setattr(Store, "import_", raising(StorageUnavailable()))
    check_one_line(command("import", "events", "--db", "other.db"),
                   "backfeedr: storage unavailable; 0 reports before it were stored: *")
    assert sql("other.db", "select * from events") == []
    monkeypatch.setattr(backfeedr, "write_jsonl", raising(KeyboardInterrupt))
    assert command("export", "events") == (1, "", "backfeedr: interrupted\n")


@pytest.mark.parametrize("cause", ["no thread", "full", "closed"])
def test_a_first_start_that_cannot_print_its_secrets_shows_them_on_standard_error(command, monkeypatch, cause):
    failure = RuntimeError("can't start new thread") if cause == "no thread" else OSError("No space left on device")
    if cause == "closed":
        monkeypatch.setattr(sys, "stdout", None)
    elif cause == "full":
        monkeypatch.setattr(sys.stdout, "write", raising(failure))
    # The last is called after the secrets were shown, and ends this server.
    monkeypatch.setattr(backfeedr, "_make_server" if cause == "no thread" else "_unencrypted_warning", raising(failure))
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]
    status, _, err = command("serve", "--port", "0")
    for handler in handlers:
        signal.signal(*handler)
    assert status == 1 and err.endswith(f"backfeedr: {failure}\n")
    assert len(re.findall("(?m)^    bf_(?:live|admin)_[0-9a-f]{32}$", err)) == 2


@sqlite_only
def test_behind_a_link_the_wal_is_seen_and_the_database_is_made(command, tmp_path):
    Path("data").mkdir()
    Path("link.db").symlink_to("data/real.db")
    with Backfeedr(Settings(db_path="link.db", api_key=KEY, auth_token=TOKEN, rate_limit=0)) as server:
        add(server, 50, type="custom")
        wal = os.stat("data/real.db-wal").st_size
        assert scraped(Api(server))["wal_bytes"] == wal > 0
        assert f"WAL {wal / 1e6:.1f} MB" in command("check", "--db", "link.db")[1]
        Path("data/real.db").rename("moved.db")
        for target in ("data/real.db", "moved.db"):  # the second is the file, but its WAL would be in another place
            Path("link.db").unlink()
            Path("link.db").symlink_to(target)
            with pytest.raises(StorageUnavailable):
                add(server, type="custom")
    Path("loop.db").symlink_to("loop.db")
    assert command("app", "list", "--db", "loop.db")[2].startswith("backfeedr: there is no database ")


def test_a_backup_is_complete_or_not_there_and_replaces_no_file(command, filled, monkeypatch):
    tables, copy = stored(filled), Path("copy.db").absolute()
    check_printed(command("backup", "copy.db"), "Wrote copy.db, [0-9]*.[0-9]* MB.\n")
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert {table: sql(copy, f"select * from {table}") for table in tables} == tables
    before = copy.read_bytes()
    assert command("backup", "copy.db") == (1, "", "backfeedr: the file copy.db already exists\n")
    assert copy.read_bytes() == before
    assert command("backup", "no/copy.db")[2] \
        == "backfeedr: cannot write the backup no/copy.db: No such file or directory\n"
    for meanwhile, error in ((raising(KeyboardInterrupt), KeyboardInterrupt),
                             (lambda _: copy.write_text("mine"), StoreError)):
        copy.unlink()
        monkeypatch.setattr(os, "fsync", meanwhile)
        with pytest.raises(error, match="^$|copy.db: File exists"):
            backfeedr.backup(filled.store, copy)
        assert [path.read_text() for path in Path().glob("copy*")] == ["mine"] * (error is StoreError)
        copy.touch()
    copy.unlink()
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(os, "link", raising(PermissionError("exFAT")))
    backfeedr.backup(filled.store, copy)
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600 and [*Path().glob("copy*")] == [Path("copy.db")]
    check_database(copy)


@pytest.mark.parametrize("stream, arguments, problem", [
    ("stdout", ("export", "crashes"), "standard output is closed"),
    ("stdout", ("app", "create", "Shop"), "standard output is closed"),
    ("stdin", ("import", "-"), "standard input is closed")])
def test_a_command_that_needs_a_closed_stream_does_nothing_and_says_so(
        command, filled, monkeypatch, stream, arguments, problem):
    apps = filled.store.apps()
    with monkeypatch.context() as closed:
        closed.setattr(sys, stream, None)
        outcome = command(*arguments)
    assert outcome == (1, "", f"backfeedr: {problem}\n") and filled.store.apps() == apps


def test_without_standard_error_a_message_does_not_go_to_standard_output(command, filled, monkeypatch):
    with monkeypatch.context() as closed:
        closed.setattr(sys, "stderr", None)
        status, out, _ = command("key", "create", "default")
    assert status == 0 and re.fullmatch("bf_live_[0-9a-f]{32}\n", out)


def test_a_number_that_no_channel_has_is_refused_and_a_long_device_is_cut_like_that_of_a_report(command, filled):
    for action, number in product(("test", "remove"), ("9" * 20, "x", "1.5", "-9")):
        problem = "is not a channel's number" if number != "-9" else ""  # Python takes it for an option
        check_printed(command("alert", action, number), f"*{problem}*", status=2)
    add(filled, device_id_hash="d" * 600)
    assert json.loads(output_of(command, "device", "show", "d" * 600))["crashes"]
    assert command("device", "forget", "d" * 501)[0] == 0 and command("device", "show", "d" * 600)[0] == 1


def test_check_finds_a_file_or_a_folder_that_a_server_could_not_write_to(command, filled, monkeypatch):
    path = Path("backfeedr.db").absolute()
    for place in (path, path.parent):
        monkeypatch.setattr(os, "access", lambda asked, mode, place=place: asked != place)
        assert f"BAD file: no permission to read and write {place}, which a server needs\n" in command("check")[1]


@pytest.mark.parametrize("name", ["backfeedr.db", "closed.db", "crashed.db"])
def test_check_prints_a_line_for_each_check_and_changes_nothing(command, filled, monkeypatch, name):
    def contents():
        return {path: path.read_bytes() for path in Path().iterdir() if path.suffix != ".db-shm"}

    if name == "closed.db":
        filled.close()
    if name != "backfeedr.db":  # the WAL beside a crashed one must stay as it is
        for path in contents():
            shutil.copy(path, path.name.replace("backfeedr.db", name))
    before = contents()
    monkeypatch.setattr(backfeedr, "NEARLY_FULL", 1)  # so that a full disk gives no warning
    lines = output_of(command, "check", "--db", name).splitlines()
    assert [re.fullmatch("ok  ([a-zA-Z -]+): .+", line)[1] for line in lines] \
        == ["settings", "SQLite", "file", "schema", "pages", "roll-ups"]
    assert contents() == before


def test_check_finds_damage_and_leaves_an_older_schema_to_the_next_start(command, filled, monkeypatch):
    filled.close()
    sound, unequal = Path("backfeedr.db").read_bytes(), "roll-ups: these tables do not agree with the reports: "
    for damage, line in (
            ("delete from labels", unequal + "labels"),
            ("update sessions set last_seq = first_seq", unequal + "sessions"),
            ("update groups set last_seen = first_seen", unequal + "groups"),
            ("drop table labels", "roll-ups: no such table: stored.labels"),
            ("update crashes set exception_reason = x'00'", "roll-ups: the file is damaged: "),
            ("pragma user_version = 9", "schema: "), ("pragma application_id = 9", "schema: "),
            (b"", "schema: there are no tables\n"),
            (sound[:4096 * 20] + b"\xff" * 4096 * 4 + sound[4096 * 24:], "pages: ")):
        is_sql = type(damage) is str
        Path("backfeedr.db").write_bytes(sound if is_sql else damage)
        if is_sql:
            sql_run("backfeedr.db", damage)
        status, out, err = command("check")
        assert (status, err) == (1, "") and f"\nBAD {line}" in out, out
        assert out.count("\nBAD ") == 1 if is_sql else Path("backfeedr.db").read_bytes() == damage
    Path("backfeedr.db").write_bytes(sound)
    monkeypatch.setattr(backfeedr, "SCHEMA_VERSION", backfeedr.SCHEMA_VERSION + 1)
    sql_run("backfeedr.db", "drop table labels")
    out = output_of(command, "check")
    assert out.endswith("\nok  roll-ups: not compared before the upgrade\n")
    assert re.search(r"\nok  schema: version \d+, which the next start upgrades to version \d+\n", out)
    missing = f"BAD file: there is no database {Path('typo.db').absolute()}; --db or BACKFEEDR_DB_PATH names another"
    for name in ("typo.db", "no/typo.db"):
        status, out, err = command("check", "--db", name)
        assert (status, err, Path(name).exists()) == (1, "", False)
        assert [line for line in out.splitlines() if line[:3] != "ok "] == [missing.replace("typo.db", name)]
    monkeypatch.setenv("BACKFEEDR_PORT", "http")
    monkeypatch.setattr(backfeedr, "LOW_DISK", 1 << 60)
    assert re.findall("^BAD (.+?):", command("check")[1], re.MULTILINE) == ["settings", "file"]


def test_check_warns_above_90_percent_of_the_disk_or_the_size_limit(command, filled, monkeypatch):
    size = Path("backfeedr.db").stat().st_size
    monkeypatch.setattr(backfeedr, "MIN_DB_SIZE", 1)
    large = "WARN The database is at {} % of BACKFEEDR_MAX_DB_SIZE; above it, the oldest reports are deleted."
    full = "WARN The disk is nearly full: 9,900.0 MB are free."
    for percent, limit, warnings in (
            (90, 0, []), (90.1, 0, [full]), (90, size * 10 // 9 + 9, []), (90, size * 10 // 9 - 9, [large.format(90)]),
            (90.1, size // 2, [large.format(200), full])):
        monkeypatch.setenv("BACKFEEDR_MAX_DB_SIZE", str(limit))
        used = int(percent * 10 ** 9)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, used=used: SimpleNamespace(used=used, free=10 ** 11 - used))
        assert [line for line in output_of(command, "check").splitlines() if line[:4] != "ok  "] == warnings
    Path("backfeedr.db").chmod(0o644)
    assert "WARN Every user of this host can read backfeedr.db: chmod 600 it.\n" in output_of(command, "check")


@pytest.mark.slow
def test_an_export_ends_quietly_when_its_reader_stops(command, filled):
    process = start_python(*PROGRAM, "export", "events")
    first = process.stdout.readline()
    process.stdout.close()
    assert json.loads(first) == exported(command, "events")[0]
    assert process.stderr.read() == "" and process.wait() in (0, 1)


@pytest.mark.slow
def test_export_and_import_take_no_more_memory_for_more_events(command):
    """Measured by hand with a million events: 36 and 57 MB."""
    # A small process starts the command, because the peak of a child begins with that of its parent.
    code = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)")
    start, peaks = {**EVENT, "type": "session_start", "properties": {"text": "x" * 30_000}}, {}
    for size in (300, 900):  # the first fills the page cache of 8 MB
        with Store(f"{size}.db") as store:
            store.start(KEY)
            for _ in range(size // 100):
                store.add(KEY_HASH, [parse_event({**start, "session_id": str(n)}) for n in range(100)])
        for *args, db, output in (("export", "events", f"{size}.db", f"{size}"),
                                  ("import", f"{size}", f"{size}-copy.db", os.devnull)):
            with open(output, "w") as file:
                process = start_python("-I", "-S", "-c", code, sys.executable, *PROGRAM, *args, "--db", db, stdout=file)
            peaks[args[0], size] = int(process.communicate()[1].split()[-1])
        assert count(f"{size}-copy.db", "events") == size
    for name in ("export", "import"):
        assert peaks[name, 900] < peaks[name, 300] * 1.1, peaks


def test_help_lists_topics_prints_one_and_suggests_one_for_a_misspelling(command):
    lines = dict(line.split(None, 1) for line in output_of(command, "help").splitlines())
    assert list(lines) == re.findall("^## (.*)", HANDBOOK, re.M)
    for topic, line in lines.items():
        out = output_of(command, "help", topic)
        assert out.startswith(line + "\n\n") and f"## {topic}\n\n{out}" in HANDBOOK
    check_printed(command("help", "privcy"), "*; did you mean privacy[?]\n", status=2)
    assert not Path("backfeedr.db").exists()


@pytest.mark.parametrize("place", ["handbook.md", "examples/handbook.md", "share/backfeedr/handbook.md"])
def test_help_finds_the_handbook_in_three_places_or_says_what_to_copy(command, monkeypatch, tmp_path, place):
    monkeypatch.setattr(backfeedr, "__file__", str(tmp_path / "backfeedr.py"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert command("help", "limits") == (
        1, "", "backfeedr: there is no handbook.md: copy examples/handbook.md beside backfeedr.py\n")
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text("# A handbook\n\n## limits\n\nHow much.\n")
    assert command("help", "limits") == (0, "How much.\n", "")


# == Examples and packaging ====================================================

README, HANDBOOK = (path.read_text(encoding="utf-8") for path in (HERE / "README.md", EXAMPLES / "handbook.md"))
PROGRAMS = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
SECRETS = {"BACKFEEDR_API_KEY": KEY, "BACKFEEDR_AUTH_TOKEN": TOKEN}
URL = r"http://127\.0\.0\.1:[1-9]\d*"
LISTENER = socket.create_server(("127.0.0.1", 0))
TAKEN = str(LISTENER.getsockname()[1])  # a port, as long as the tests run
DEFAULTS = {"BACKFEEDR_" + field.name.upper(): field.default for field in dataclasses.fields(Settings)}


def load_example(name):
    """A fresh import of examples/NAME.py."""
    spec = importlib.util.spec_from_file_location("example_" + name, EXAMPLES / (name + ".py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


client_module = load_example("client")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def clean_environ(**variables):
    """The environment without BACKFEEDR_ variables, plus these variables."""
    return {**{name: value for name, value in os.environ.items() if not name.startswith("BACKFEEDR_")}, **variables}


def run_program(*command, cwd=None, stdin="", **variables):
    """Runs a program to its end; gives its status, output and errors."""
    done = subprocess.run([str(each) for each in command], cwd=cwd, input=stdin, timeout=300, capture_output=True,
                          text=True, env=clean_environ(**variables))
    return done.returncode, done.stdout, done.stderr


def run_example(name, *arguments, **options):
    return run_program(sys.executable, EXAMPLES / (name + ".py"), *arguments, **options)


def bash(command, cwd, **variables):
    done = run_program("bash", "-ec", command, cwd=cwd, PATH=PROGRAMS, **variables)
    assert done[0] == 0, done
    return done[1]


def needs(*programs):
    for program in programs:
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")


@contextmanager
def running(*command, cwd, **variables):
    """Runs a program in a process group, which is ended with the block. Its errors are in its output."""
    process = subprocess.Popen([str(each) for each in command], cwd=cwd, env=clean_environ(**variables), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield process
    finally:
        try:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
            process.communicate(timeout=20)
        finally:
            process.kill()


def printed(process, pattern):
    """Reads what a program prints until it matches a pattern, and returns the match."""
    text = ""
    while not re.search(pattern, text):
        line = process.stdout.readline()
        assert line, text
        text += line
    return re.search(pattern, text)


def ask(url, body=None, key=KEY, **headers):
    """The status, headers and body of an answer to a GET, or to a POST of `body` as JSON."""
    url = urlsplit(url)
    path = url.path + ("?" + url.query if url.query else "")
    with closing(http.client.HTTPConnection(url.hostname, url.port, timeout=30)) as connection:
        connection.request("GET" if body is None else "POST", path, body and json.dumps(body),
                           {"X-Backfeedr-Key": key, "Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode()


def check_stores_a_crash(url, db, key=KEY):
    """A server acknowledges a crash, and it is in the database."""
    status, _, answer = ask(url + CRASHES, CRASH, key)
    assert status == 201 and sql(db, "select id from crashes") == [(json.loads(answer)["id"],)]


@contextmanager
def in_thread(server):
    """Runs a server in a thread; gives its address."""
    with server, ThreadPoolExecutor(1) as pool:
        pool.submit(server.serve_forever, poll_interval=0.01)
        try:
            yield "http://127.0.0.1:%d" % server.server_address[1]
        finally:
            server.shutdown()


ScriptedHandler = type("ScriptedHandler", (WSGIRequestHandler,), {"log_message": lambda *_: None})  # logs no requests


@contextmanager
def scripted(script, app=webtest.TestResponse(b'{"id": "evt_1"}', 201)):
    """A server that answers as a script says, repeating its last line; gives its URL and the list of its requests.

    A line is None for the app's own answer, a tuple (status, answer, headers), a function that gets the request and
    gives such a tuple, "drop" to close without an answer, "cut" to close within it, or "hang" until the client closes.
    """
    requests = []

    def answer(environ, start_response):
        stream, request = environ["wsgi.input"], webtest.TestRequest(environ)
        request.make_body_seekable()  # reads it
        requests.append(request)
        response = request.get_response(app)
        line = script.pop(0) if script[1:] else script[0]
        line = line(request) if callable(line) else line
        if type(line) is tuple:
            status, given, *more = line
            response = webtest.TestResponse(given if isinstance(given, bytes) else json.dumps(given).encode(),
                                            f"{status} x", [(name, str(value)) for name, value in dict(*more).items()])
        if line == "hang":
            stream.read(1)
        if line in ("hang", "drop"):
            raise ConnectionAbortedError  # wsgiref takes it for the client's, and closes the connection
        start_response(response.status, response.headerlist)
        return [response.body[:5] if line == "cut" else response.body]

    web = WSGIServer(("127.0.0.1", 0), ScriptedHandler)
    web.set_app(answer)
    with in_thread(web) as url:
        yield url, requests


def malformed_requests():
    """Bytes that are not a valid HTTP request."""
    long, chunked = b"a" * 100_000, b"POST /api/v1/crashes HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    yield from (b"junk\r\n\r\n", b"G\0T / HTTP/1.1\r\n\r\n", b"GET /" + long + b" HTTP/1.1\r\n\r\n",
                chunked + b"zz\r\n", b"GET / HTTP/9.9\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                b"PROXY TCP4 10.1.2.3 10.1.2.4 1 2\r\n")
    for header in (b"no colon", b"X: " + long, b"X: a\r\n b", b"Host: a\r\nHost: b", b"Content-Length: -1",
                   b"Transfer-Encoding: foo", b"Content-Length: 9\r\nContent-Length: 8", b"Expect: nonsense",
                   b"X-Forwarded-Proto: https\r\nX-Forwarded-Ssl: off", b"Content-Length: 1000"):
        yield b"POST /api/v1/crashes HTTP/1.1\r\n" + header + b"\r\n\r\n"
    hello, context = ssl.MemoryBIO(), ssl.create_default_context()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), hello, server_hostname="crashes.example.com").do_handshake()
    greeting = hello.read()
    yield greeting
    at = greeting.index(b"\0\x1d\0\x20") + 4  # the start of its x25519 key share
    yield greeting[:at] + bytes(32) + greeting[at + 32:]


def send_malformed(port):
    """Sends each malformed request twice: once waits until the server closes the connection, once closes it first."""
    for request in malformed_requests():
        for waits in (True, False):
            with socket.create_connection(("127.0.0.1", port), timeout=20) as connection, suppress(OSError):
                connection.sendall(request)
                if waits:
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(65536):
                        pass


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# -- examples/client.py

CLIENT_NOW = 1773325351.25  # 2026-03-12T14:22:31.250000Z
LOST, ServerError = client_module.ConnectionLost, client_module.ServerError
STORED, LATER = (201, {"id": "evt_1"}), {"error": "later"}
BACKOFF = [(longest / 2, longest) for longest in (0.5, 1, 2, 4, 8, 16, 30, 30, 30)]


def batch_answer(request):
    """An answer to a batch, with the name of each event in its id, to check the order."""
    ids = ["evt_" + event["name"] for event in request.json["events"]]
    return 201, {"count": len(ids), "ids": ids}


def numbered_events(count):
    return [{"type": "custom", "name": str(number)} for number in range(count)]


def make_client(url, key=KEY, **options):
    return client_module.Client(url, key, **{"sleep": lambda seconds: None, "clock": lambda: CLIENT_NOW, **options})


def outcome_of(url, send=lambda client: client.event(EVENT), **options):
    """The result of a call to a client: the answer (or the error's type, or its status and message) and the waits."""
    got = SimpleNamespace(error=None, sleeps=[])
    try:
        got.answer = send(make_client(url, **{"sleep": got.sleeps.append, **options}))
    except (client_module.BackfeedrError, ValueError) as error:
        got.error = error
        got.answer = (error.status, error.message) if type(error) is ServerError else type(error)
    return got


def sent(*script, suffix="", **options):
    """The same with a scripted server, and the requests that it received."""
    with scripted([*script]) as (url, requests):
        got = outcome_of(url + suffix, **options)
    got.requests, got.keys = requests, {each.headers["Idempotency-Key"] for each in requests}
    return got


def test_client_finds_the_api_under_any_form_of_endpoint():
    for prefix, suffix in product(("", "/crashes", "/a/b"), ("", "/", "/api/v1", "/api/v1/")):
        got = sent(STORED, suffix=prefix + suffix, send=lambda client: (client.crash(CRASH), client.event(EVENT)))
        assert [each.path for each in got.requests] == [prefix + CRASHES, prefix + EVENTS] and len(got.keys) == 2


@pytest.mark.parametrize("endpoint, key", [*((endpoint, KEY) for endpoint in (
    "", "localhost:8080", "ftp://localhost", "http://", "http://:8080", "http://user:word@localhost",
    "http://localhost?app=Shop", "http://localhost:port")), *(("http://localhost", key) for key in (
        "", "bf_live_1\nX-Admin: 1", "bf_live_1\r", "\udcff"))])
def test_client_refuses_an_invalid_endpoint_or_key_without_showing_the_key(endpoint, key):
    with pytest.raises(ValueError) as caught:
        make_client(endpoint, key)
    assert not key or key not in str(caught.value)


def test_client_signs_the_bytes_of_each_attempt_unless_told_not_to():
    times = iter([CLIENT_NOW, CLIENT_NOW + 299])
    got = sent(UNAVAILABLE, STORED, clock=lambda: next(times))
    assert got.answer == {"id": "evt_1"} and len(got.requests) == 2
    for each, stamp in zip(got.requests, ("2026-03-12T14:22:31.250000Z", "2026-03-12T14:27:30.250000Z")):
        assert (each.headers["X-Backfeedr-Timestamp"], each.headers["X-Backfeedr-Signature"]) == (
            stamp, client_module.signature(KEY, stamp, each.body))
        assert (each.headers["X-Backfeedr-Key"], each.headers["Content-Type"]) == (KEY, "application/json")
        assert each.json == EVENT
    unsigned, = sent(STORED, sign=False).requests
    assert not {"X-Backfeedr-Timestamp", "X-Backfeedr-Signature"} & {*unsigned.headers}


def test_client_adds_a_missing_occurred_at_without_changing_the_callers_report_and_refuses_nan():
    for report in ({"name": "a"}, {"name": "a", "occurred_at": None}, {"name": "a", "occurred_at": ""}):
        before = dict(report)
        request, = sent(STORED, send=lambda client: client.crash(report)).requests
        assert request.json == {"name": "a", "occurred_at": "2026-03-12T14:22:31.250000Z"} and report == before
    got = sent(STORED, send=lambda client: client.crash({"free_memory_mb": float("nan")}))
    assert (got.answer, got.requests) == (ValueError, [])


WAYS_TO_LOSE = [("drop", 10), ("cut", 10), ("hang", 0.2)]  # how an answer is lost, and the client's timeout
ATTEMPTS = {  # the server's script, the answer, the bounds of each wait before a further attempt, options
    **{loss: ([loss, loss, STORED], STORED[1], BACKOFF[:2], {"timeout": seconds}) for loss, seconds in WAYS_TO_LOSE},
    **{loss + " to the end": ([loss], LOST, BACKOFF[:1], {"timeout": seconds, "attempts": 2})
       for loss, seconds in WAYS_TO_LOSE},
    **{f"{status} once": ([(status, LATER), STORED], STORED[1], BACKOFF[:1], {})
       for status in (429, 500, 502, 503, 504)},
    **{f"{status}, {n} attempts": ([(status, LATER)], (status, "later"), BACKOFF[:n - 1], {"attempts": n})
       for status, n in ((500, 1), (500, 2), (500, 5), (503, 10))},
    **{f"{status} is final": ([(status, LATER, {"Retry-After": 1})], (status, "later"), [], {})
       for status in (400, 401, 404, 405, 413, 415, 422, 501)},
    **{f"{status} is not followed": (
        [(status, {}, {"Location": EVENTS})], (status, f"redirects are not followed (to {EVENTS})"), [], {})
       for status in (301, 302, 303, 307, 308)},
    **{f"{status} {answer} is not the server's": ([(status, answer)], (status, "not an answer of backfeedr"), [], {})
       for status, answer in ((200, b"<html>Welcome to the hotel</html>"), (201, b""), (200, {}), (200, []),
                              (200, "evt_1"), (204, b""), (202, {"id": "evt_1"}))},
    "200 with deep JSON is not the server's": ([(200, b"[" * 100_000)], (200, "not an answer of backfeedr"), [], {}),
    "an answer without end": ([(200, b'{"id": 1}'.rjust(1_000_001))], LOST, BACKOFF[:1], {"attempts": 2}),
    **{f"{status} {text} names no event": (
        [(status, {"error": text})], (status, text), [], {"send": lambda client: client.batch(numbered_events(2))})
       for status, text in ((400, "invalid name at index 2"), (400, "invalid name at index -1"),
                            (422, "invalid name at index 0"), (400, "invalid name"))},
    "a repeated answer": ([(200, {"id": "evt_1"})], {"id": "evt_1"}, [], {}),
    **{f"{status} with Retry-After": ([(status, LATER, {"Retry-After": 17}), STORED], STORED[1], [(17.25, 17.5)], {})
       for status in (429, 503)},
    **{f"Retry-After {text[:9]!r} is no number of seconds": (
        [(503, LATER, {"Retry-After": text.encode().decode("latin-1")}), STORED], STORED[1], BACKOFF[:1], {})
       for text in ("Thu, 12 Mar 2026 14:22:31 GMT", "-5", "1.5", "", "\u0663", "9" * 5000)},
    **{f"Retry-After {seconds}": ([(503, LATER, {"Retry-After": seconds})], (503, "later"), waits, {"attempts": 2})
       for seconds, waits in ((300, [(300.25, 300.5)]), (301, []))},
}


@pytest.mark.parametrize("script, answer, waits, options", ATTEMPTS.values(), ids=ATTEMPTS)
def test_client_waits_and_repeats_only_requests_that_may_succeed_later(script, answer, waits, options):
    got = sent(*script, **options)
    assert got.answer == answer
    if answer is LOST:
        assert isinstance(got.error.__cause__, (OSError, http.client.HTTPException))
    elif got.error:
        assert got.error.retry_after == int(dict(*script[-1][2:]).get("Retry-After", 0)) and not got.error.refused
    assert len(got.sleeps) == len(set(got.sleeps)) == len(waits) == len(got.requests) - 1
    assert all(least <= seconds <= most for seconds, (least, most) in zip(got.sleeps, waits))
    assert len({each.body for each in got.requests}) == 1
    key, = got.keys
    assert len(key) >= 32


def test_client_retries_a_refused_connection_and_reads_an_early_refusal():
    got = outcome_of(f"http://127.0.0.1:{free_port()}")
    assert (got.answer, len(got.sleeps)) == (LOST, 4) and isinstance(got.error.__cause__, ConnectionRefusedError)

    class Refusing(socketserver.BaseRequestHandler):
        def handle(self):  # leaves the body unread, so that the connection is reset
            self.request.recv(1024)
            self.request.sendall(b'HTTP/1.1 413 Too Large\r\nContent-Length: 18\r\n\r\n{"error": "large"}')

    with in_thread(socketserver.TCPServer(("127.0.0.1", 0), Refusing)) as url:
        got = outcome_of(url, send=lambda client: client.crash({"exception_type": "x" * 20_000_000}))
    assert got.answer == (413, "large")


@pytest.mark.parametrize("count, sizes", [
    (0, []), (1, [1]), (100, [100]), (101, [100, 1]), (200, [100, 100]), (250, [100, 100, 50])])
def test_client_sends_a_long_batch_in_several_requests_and_merges_the_answers(count, sizes):
    events = numbered_events(count)
    got = sent(batch_answer, send=lambda client: client.batch(events))
    assert got.answer == {"count": count, "ids": ["evt_%d" % number for number in range(count)]}
    assert [(each.path, len(each.json["events"])) for each in got.requests] == [(BATCH, size) for size in sizes]
    assert len(got.keys) == len(sizes) and events == numbered_events(count)


def test_client_tells_which_part_of_a_long_batch_is_stored_when_a_later_part_fails():
    got = sent(batch_answer, (413, {"error": "request body too large"}), batch_answer,
               send=lambda client: client.batch(numbered_events(250)))
    assert got.answer == (413, "request body too large") and len(got.requests) == 2
    assert got.error.stored == {"count": 100, "ids": ["evt_%d" % number for number in range(100)]}


@pytest.mark.parametrize("count, bad, message", [
    (100, {0}, "at index 0"), (100, {99}, "at index 99"), (1, {0}, "at index 0"), (101, {100}, "at index 100"),
    (250, {7, 8, 107, 108, 249}, "at index 7, and 4 more events"), (50, {*range(50)}, "at index 0, and 10 more events")
])
def test_client_removes_bad_events_from_a_batch_names_them_and_sends_the_rest(serve, clock, count, bad, message):
    server, events = serve(require_signature=True), numbered_events(count)
    for index in bad:
        events[index]["occurred_at"] = "2026-03-12T14:22:31"
    with scripted([None], server) as (url, requests):
        got = outcome_of(url, lambda client: client.batch(events), clock=clock)
    why = "invalid occurred_at (occurred_at has no zone) "
    assert (got.answer, got.sleeps) == ((400, why + message), [])
    assert [*got.error.refused] == sorted(bad)[:11] and not got.error.retryable, "it gives up after 11"
    good = [(str(index),) for index in range(count) if index not in bad]
    assert sql(server.store.path, "select name from events order by seq") == good
    assert got.error.stored == {"count": len(good), "ids": stored_ids(server.store.path)}
    assert len({each.headers["Idempotency-Key"] for each in requests}) == len(requests)


def test_client_with_a_wrong_clock_signs_with_the_servers_time_from_the_second_attempt_on(run):
    server = run(BACKFEEDR_REQUIRE_SIGNATURE="1")
    for ahead in (-600, 600, 365 * 24 * 3600):
        client, times = make_client(server.url, attempts=1), []
        client._clock = lambda: times.append(time.time() + ahead) or times[-1]
        assert [client.event(dict(EVENT, name=f"{ahead} {n}"))["id"] for n in range(2)] == stored_ids(server.db)[-2:]
        assert len(times) == 4, "two attempts with a look at the clock between them, then one attempt"
        client._clock = lambda: time.time()  # it is correct now
        assert client.batch(numbered_events(2))["count"] == 2
    assert sql(server.db, "select count(*), count(distinct id) from events") == [(12, 12)]


STALE = 401, {"error": "stale timestamp"}
DATE = {"Date": "Thu, 12 Mar 2026 15:00:00 GMT"}


@pytest.mark.parametrize("script, answer, stamps", [
    ([(*STALE, DATE), STORED], STORED[1], ["14:22:31.250000", "15:00:00.250000"]),
    ([(*STALE, DATE)], (401, "stale timestamp"), ["14:22:31.250000", "15:00:00.250000"]),
    ([(*STALE, DATE), (*UNAVAILABLE, DATE), STORED], STORED[1], ["14:22:31.250000"] + ["15:00:00.250000"] * 2),
    ([(*STALE, {"Date": "now"})], (401, "stale timestamp"), ["14:22:31.250000"]),
    ([(401, {"error": "invalid signature"}, DATE)], (401, "invalid signature"), ["14:22:31.250000"])])
def test_client_signs_only_once_with_the_date_of_a_stale_timestamp_answer(script, answer, stamps):
    got = sent(*script)
    assert got.answer == answer and len(got.keys) == 1
    assert [each.headers["X-Backfeedr-Timestamp"] for each in got.requests] == [f"2026-03-12T{at}Z" for at in stamps]


@pytest.mark.parametrize("sign", [True, False], ids=["signed", "unsigned"])
def test_client_whose_answers_were_lost_stores_nothing_twice(serve, clock, sign):
    server, script, ids = serve(), [None], []
    gateway = 502, b"<h1>502</h1>", {"Content-Type": "text/html"}
    with scripted(script, server) as (url, _):
        client = make_client(url, sign=sign, clock=clock)
        for losses in (["drop"], ["cut"], [gateway], ["drop", "cut", gateway]):
            script[:] = [*losses, None]
            clock.move(1)
            ids.append(client.event({"type": "custom", "name": "purchase"})["id"])
            assert script == [None]
        script[:] = [None, "drop", None, "cut", None]
        answer = client.batch(numbered_events(250))
    assert script == [None] and answer["count"] == 250
    names = ["purchase"] * 4 + [str(number) for number in range(250)]
    assert sql(server.store.path, "select id, name from events order by seq") == [*zip(ids + answer["ids"], names)]


@pytest.mark.parametrize("key", ["a key of my own", "schl\u00fcssel-\u9375"])
def test_client_signs_with_any_key_and_two_equal_events_within_a_second_are_both_stored(serve, clock, key):
    server = serve(api_key=key, require_signature=True)
    with scripted([None], server) as (url, _):
        for _ in range(2):
            make_client(url, key, clock=clock).event(EVENT)
            clock.move(0.001)
    assert sql(server.store.path, "select name from events") == [("purchase",)] * 2


def test_client_command_sends_the_example_payloads(serve, clock, capsys, monkeypatch):
    server = serve()
    monkeypatch.setenv("BACKFEEDR_API_KEY", KEY)
    with scripted([None], server) as (url, _):
        clock.seconds = time.time()
        monkeypatch.setenv("BACKFEEDR_ENDPOINT", url)
        for kind, answered in (("crash", "group_hash"), ("event", "id"), ("batch", "count")):
            assert client_module.main([kind, str(EXAMPLES / f"{kind}.json")]) == 0
            out, err = capsys.readouterr()
            assert answered in json.loads(out) and err == ""
    assert len(stored_ids(server.store.path)) == 4


def test_client_command_prefers_its_options_and_reads_standard_input():
    with scripted([batch_answer]) as (url, requests):
        status, out, _ = run_example("client", "--endpoint", url, "--key", "mine", "--unsigned", "batch", "-",
                                     stdin='[{"type": "custom", "name": "7"}]',
                                     BACKFEEDR_ENDPOINT="http://127.0.0.1:1", BACKFEEDR_API_KEY="other")
    assert (status, json.loads(out)) == (0, {"count": 1, "ids": ["evt_7"]})
    request, = requests
    assert request.headers["X-Backfeedr-Key"] == "mine" and "X-Backfeedr-Signature" not in request.headers


NOT_SENT = {  # an error, and kinds and texts that are not sent because of it
    "- is not JSON*": [("crash", b""), ("crash", b"{"), ("crash", b"\xff\xfe\xff")],
    "- holds no JSON object": [("crash", b"[]"), ("event", b'"purchase"')],
    "- holds no list of JSON objects": [
        ("batch", text) for text in (b"{}", b'{"events": {}}', b'[{"type": "custom"}, 3]')],
    "- is nested too deep": [("crash", b"[" * 100_000)],
    "*not JSON compliant*": [("crash", b'{"exception_type": NaN}')],
    "no answer from http://127.0.0.1:*": [("event", b"{}")]}
REFUSED = [  # the answers to a batch of 101 events, and the error
    ([(400, {"error": "invalid\n  locale"})], "400: invalid locale"),
    ([(302, {}, {"Location": "https://example.com/"})], "302: redirects are not followed (to https://example.com/)"),
    ([(502, b"<h1>Bad Gateway</h1>")], "502: not an answer of backfeedr"),
    ([batch_answer, (413, {"error": "request body too large"})],
     "413: request body too large; 100 events are stored"),
    ([(400, {"error": "invalid name at index 7", "detail": "name is odd"}), batch_answer],
     "400: invalid name (name is odd) at index 7; 100 events are stored")]


@pytest.mark.parametrize("script, kind, text, error", [
    *((["drop"], *each, error) for error, given in NOT_SENT.items() for each in given),
    *((script, "batch", json.dumps({"events": numbered_events(101)}).encode(), f"the server answered {error}")
      for script, error in REFUSED)])
def test_client_command_prints_one_line_for_an_error(monkeypatch, capsys, script, kind, text, error):
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 0)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
    with scripted([*script]) as (url, _):
        status = client_module.main(["--key", KEY, "--endpoint", url, kind, "-"])
    check_one_line((status, *capsys.readouterr()), "client: " + error)


# -- examples/vectors.json, and the Swift client

VECTORS = json.loads((EXAMPLES / "vectors.json").read_bytes())  # the tests in examples/swift read it, too


def test_signatures_groups_names_times_and_devices_match_the_vectors_of_which_some_are_documented():
    assert VECTORS["signatures"][0]["signature"] \
        == "sha256=6c3e10dd63bdf20cb9257a8a8b590969e83722725287c4009b98423fc82add3d"
    for given in VECTORS["signatures"]:
        key, timestamp, body = given["key"], given["timestamp"], given["body"].encode()
        assert hashlib.sha256(body).hexdigest() == given["body_sha256"]
        assert backfeedr.sign(key.encode(), timestamp.encode(), body) == given["signature"]
        assert client_module.signature(key, timestamp, body) == given["signature"]
        parse_time(timestamp)
    for given in VECTORS["groups"]:
        assert group_hash(given["exception_type"], map(read_frame, given["frames"])) == given["group_hash"]
    assert {given["group_hash"] for given in VECTORS["groups"]} >= {"acc0d2dfe0c1898c", "340a4fe989a59ce6"}
    for given in VECTORS["names"]:
        assert backfeedr.canonical_name(given["symbol"]) == given["name"]
    for given in VECTORS["times"]:
        assert parse_time(given["text"]) == round(given["seconds"] * 1000)
    for given in VECTORS["devices"]:
        digest = hashlib.sha256(f"{given['vendor']}:{given['bundle']}".encode()).hexdigest()
        assert digest == given["device_id_hash"]


def test_the_swift_packages_privacy_manifest_matches_its_readme():
    swift = EXAMPLES / "swift"
    manifest = plistlib.loads((swift / "Sources/Backfeedr/PrivacyInfo.xcprivacy").read_bytes())
    kinds = manifest["NSPrivacyCollectedDataTypes"]
    assert not manifest["NSPrivacyTracking"] and not manifest["NSPrivacyAccessedAPITypes"]
    readme = (swift / "README.md").read_text(encoding="utf-8")
    for kind in kinds:
        name = kind["NSPrivacyCollectedDataType"][len("NSPrivacyCollectedDataType"):]
        assert "*" + re.sub("(?<=[a-z])(?=[A-Z])", " ", name) + "*" in readme
        assert not kind["NSPrivacyCollectedDataTypeLinked"] and not kind["NSPrivacyCollectedDataTypeTracking"]
    assert len(readme.splitlines()) <= 60 and len(kinds) == 5


# -- examples/symbols.py

# The image of a dSYM for arm64, DWARF 5, compressed. Made from two C files with `clang -target arm64-apple-ios15.0
# -gdwarf-5 -O1 -ffile-prefix-map=$PWD=/secret/Shop -fdebug-compilation-dir=/secret/Shop -c`, `ld64.lld -arch arm64
# -platform_version ios 15.0 15.0` and dsymutil (LLVM 21, 14 and 19); then its tables that nobody reads were zeroed. In
# basket.c, basket_sum (line 13) has price_of (line 3) inlined in its line 17, and calls discount (line 8), which is
# static. In main.c, pay (line 5), whose symbol is a mangled Swift name, calls basket_sum, and main (line 11) calls pay.
SHOP_UUID = "4C4C4477-5555-3144-A1A5-8052A9FBFB44"
SHOP_IMAGE = lzma.decompress(base64.b85decode(
    "000010RR90|NsC0{{Uyeg%?G#U|nQSRe)1i8Mk*9CUrQbsEEM&)nH5V4=H=wkypk4&1E3{D<JiH8gtZ*$z;@%i%#mkd6i=yxiy9!q7wbC-xR9tGIt"
    "1|CPkUqOf2YQX%#Ek&GnLbnqKhBtBviMm<Wi7U!)uBB>0p?MbjYC^of;idICx$+x8N^vyzwE_G$T@wJC#f>cOA@{nhY0jFU1<5Q!~~izq^W*W0WSo"
    "dM6usZ?b07&jYY+tp-f8blC8o%)aJuum`*0FYg}xQgxhOKX1y^r|*VOEsF2OTLak+9IzPm&7GuR9;w)o2e-a9M^n!Zq{Fqa7^5{Yic2_Z-@BH@t-$"
    "_N?M1HzU8yTFj}t2l<9d080Gr%(Bu2I#|LtiZNj9Ht**!Jz1pE|H*P|^&~L5DBs56Wr&&~&0p!KBCMH_b!Nok8a;0tPG`z~BMwH2D4W>Vv-|biTdd"
    "$4L9=+;@{hu?y&Ahi|_ToxeEft}?f4r)kvBdXI)|2?4HGeF=$}{|vfo)R27$l^$F8oM&`$r~W?dxA5m+nRGHRSt_ABkNej#mKE*$JU)6TfvZo44@z"
    "PpT8gU#1`@?@WPJ3{j0XPgg^oob^J%OF!6w4N1FJ)oMgmC&xE0s=5UyS3vBH_$(xTtnQ*GsGi5x9owtMT?3h#*fUk-l9(&|i_y#ZU@=hC^ttorP*h"
    "9wf-p@muC|VgHflkJ4m)+*eMjKoY!Ci5wws%02hM4)-M1OZ(HN@^h3Y%=cOb%0yV;rR9pjk6*YsYmfLzug!S?vh(n?~4EqV21HgR{Y|K7a}C_HOw$"
    "r~IXedrjz6UT|YV9)ru_lM|ug+(*`Qrd$(eOqQzS(Fdxy)NNM`f8XM@Rl@OS%@pF<=Z3(`Yc<#+kPQbFjwgHQh9%e5KnfzcPaOH?(x(rttjM(J?h)"
    "4FFkJPl~*DWFtkq1j8<-5hUGG2^}-)eVjBJ34ALFFqfJ3$@K<cIe9*AIL>9ZW$vU-Hx5*v>P5mzF68A8`NyCoCf3=0Xi`&1kEz{J$0;Sk#E<!?up~"
    "U%AhsEL3pjD^4M<7<8W80hea>yhpK-14PvXmf~oTYld`Q)&h@xHY01DQVj-zGszY3y{dHpu3-9{61ZvRe+|bHWd9>aOkQc0yg)TM&HG!XU-V0S<ye"
    "Q^{nTDDD#%=WB%BC3Wvl_wur!Q2NJVhR3g{G5W_5DByZe_|z!=2zoqq$@RueJA_ZuO%pv<^PW-x8XiQ(A+!Z*OieP26-I?SPmCVS!qRr0N%h;H!L_"
    "QwLD>1nZS&vPF3QApv++wpW+Op&+WKMapW-<MYsXdP!&`Va)#f=`kbEh9CrHQi1c>_2!2EXwK=fDR34!bEqPHe?rG;NvE{hXgcwJK3CL0zHx(XcmE"
    "2%2kAGBS$Ko|#L&8cdI*D7Aof{c``k86}BPiXOVX!#mRpS59T;cE>L$~cYe(>l8tjQ*=@^%`^h_#2@#Abk@wYv07mq~5O}RHLladSp(st!J~$)DKP"
    "SPAp7v4W{MCI%&8hqSJF(+A#OsKiSj}3!w0^<tH5X;3LpG1D~5Werv}6^Uzre"))
SHOP_SYMBOLS = {  # an offset from the image's start, and what is there, innermost first
    0x3FFC: [], 0x4000: [("basket_sum", "basket.c", 14)], 0x4018: [("basket_sum", "basket.c", 16)],
    0x401C: [("price_of", "basket.c", 5), ("basket_sum", "basket.c", 17)],  # its first and last instruction:
    0x4020: [("basket_sum", "basket.c", 17)], 0x404C: [("basket_sum", "basket.c", 18)],
    0x4050: [("discount", "basket.c", 10)], 0x406C: [("discount", "basket.c", 10)],
    0x4070: [("Basket.pay()", "main.c", 6)], 0x407C: [("Basket.pay()", "main.c", 7)],
    0x4088: [("Basket.pay()", "main.c", 8)], 0x4090: [("main", "main.c", 13)], 0x4094: []}
OTHER_UUID = "00112233-4455-6677-8899-AABBCCDDEEFF"
SENT = f"Shop {SHOP_UUID} arm64: 15 rows, sent"


@pytest.fixture
def symbols_module(monkeypatch):
    pytest.importorskip("symbolic")
    module = load_example("symbols")
    monkeypatch.setattr(module, "FIRST_PAUSE", 0)
    monkeypatch.setenv("no_proxy", "*")
    for name in ("BACKFEEDR_ENDPOINT", *module.DEFAULT_PATHS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BACKFEEDR_AUTH_TOKEN", TOKEN)
    return module


@pytest.fixture
def send_symbols(server, symbols_module, capsys, monkeypatch, tmp_path):
    """Runs examples/symbols.py with `server` in a new folder, without demanglers; see `command` and `scripted`."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", str(tmp_path))

    def run(*arguments, script=None):
        with scripted([script], server) as (url, requests):
            status = symbols_module.main(["--server", url, *map(str, arguments)])
        assert {each.headers["Authorization"] for each in requests} <= {f"Bearer {TOKEN}"}
        for each in requests:
            assert each.method == "GET" or b"secret" not in gzip.decompress(each.body), "the folder of the sources"
        return status, *capsys.readouterr()
    return run


def held_by(server):
    """The builds whose symbols a server has."""
    return {uuid for uuid, in sql(server, "select uuid from symbols where received = parts")}


def dsym(name="Shop", uuid=SHOP_UUID, folder=".", image=SHOP_IMAGE):
    """Writes a dSYM whose image has this UUID; gives its path."""
    path = Path(folder, f"{name}.dSYM")
    place = path / "Contents" / "Resources" / "DWARF"
    place.mkdir(parents=True)
    (place / name).write_bytes(image.replace(UUID(SHOP_UUID).bytes, UUID(uuid).bytes))
    (path / "Contents" / "Info.plist").write_text("<plist/>")
    return path


def zipped(name, folder, *more):
    """Zips a folder as a Mac does; gives the path of the zip."""
    Path(name).parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(name, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in [*Path(folder).rglob("*"), *map(Path, more)]:
            archive.write(path)
            archive.writestr(f"__MACOSX/{path.parent}/._{path.name}", b"\0\5\x16\7")
    return Path(name)


def fat(*slices):
    """Writes a Mach-O file with several architectures; gives its path."""
    at, head, body = 4096, struct.pack(">II", 0xCAFEBABE, len(slices)), b""
    for each in slices:
        head += struct.pack(">5I", 0x100000C, 0, at + len(body), len(each), 12)
        body += each.ljust(-(-len(each) // 4096) * 4096, b"\0")
    Path("Shop").write_bytes(head.ljust(at, b"\0") + body)
    return "Shop"


@pytest.mark.parametrize("flags", [0x80000400, 0x400])  # a section of pure instructions, and of some
def test_symbols_are_sent_with_names_lines_and_inlined_functions_but_without_folders(
        send_symbols, server, tmp_path, flags):
    at = SHOP_IMAGE.index(b"__text\0") + 64
    assert SHOP_IMAGE[at:at + 4] == struct.pack("<I", 0x80000400)
    demangler = tmp_path / "swift-demangle"
    demangler.write_text("#!/bin/sh\nwhile read -r name; do echo 'Basket.pay()'; done\n")
    demangler.chmod(0o755)
    image = SHOP_IMAGE[:at] + struct.pack("<I", flags) + SHOP_IMAGE[at + 4:]
    assert send_symbols(dsym(image=image)) == (0, SENT + "\n", "")
    assert sql(server, "select uuid, binary_name, arch, parts, rows from symbols") == [
        (SHOP_UUID, "Shop", "arm64", 1, 15)]
    assert {offset: functions_at(server, offset, SHOP_UUID) for offset in SHOP_SYMBOLS} == SHOP_SYMBOLS


def test_names_stay_mangled_without_a_demangler_and_the_output_says_so(send_symbols, server):
    assert send_symbols(dsym()) == (0, f"{SENT}, Swift names as they are: swift-demangle is missing\n", "")
    assert functions_at(server, 0x4070, SHOP_UUID) == [("$s4Shop6BasketC3payyyF", "main.c", 6)]


def test_a_name_says_that_a_function_stands_for_several_and_blocks_in_cpp_have_names(
        send_symbols, symbols_module, tmp_path):
    for name in ("swift-demangle", "llvm-cxxfilt"):
        (tmp_path / name).write_text("#!/bin/sh\nwhile read -r name; do echo \"plain $name\"; done\n")
        (tmp_path / name).chmod(0o755)
    merged, *others = "$s4Shop6BasketC3insyySiFTm", "$s4Shop6BasketC3insyySiF", "___ZN1A1bEv_block_invoke", "_Z4readTm"
    assert symbols_module.demangled([merged, *others, "b_Z1"]) == (
        {merged: "merged plain " + merged, **{name: "plain " + name for name in others}}, "")


def test_complete_builds_are_skipped_incomplete_ones_are_sent_and_missing_ones_are_named(send_symbols, server):
    upload(server, uuid=SHOP_UUID)
    add(server, 1037, app_version="1.3.0", build_number="48", stack_trace=[frame_of(OTHER_UUID)])
    paths, skipped = [dsym(), dsym("Kit", OTHER_UUID, "b")], f"Shop {SHOP_UUID} arm64: held already\n"
    assert send_symbols(paths[0]) == (
        0, f"{skipped}still missing: Shop 1.3.0 (48), {OTHER_UUID}: 1,037 crashes\n", "")
    assert send_symbols("--quiet", paths[0]) == (0, "", "") and functions_at(server, 1000, SHOP_UUID) == [TOTAL]
    status, out, err = send_symbols(*paths)
    assert (status, err, held_by(server)) == (0, "", {SHOP_UUID, OTHER_UUID}) and "missing: Shop" not in out
    server.store.delete_symbols(SHOP_UUID)
    upload(server, BOTH_PARTS[0], SHOP_UUID)
    assert send_symbols(paths[0], paths[0])[1].splitlines()[1:] == skipped.splitlines()
    assert held_by(server) == {SHOP_UUID, OTHER_UUID}


def test_progress_is_one_line_on_a_terminal_only(send_symbols, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    status, out, err = send_symbols(dsym())
    assert (status, out.count("\n"), err.count("\n")) == (0, 1, 0)
    shown = [text.partition("arm64: ")[2] for text in err.split("\r\033[K")]
    assert shown == ["", "reading, 99 %", "demangling 1 names", "sending part 1 of 1", ""], "the last clears the line"


def linked(folder):
    """A folder with links to the dSYMs of another folder, and to itself."""
    Path("links").mkdir()
    for link in [*folder.iterdir(), Path(".")]:
        Path("links", link.name or "up.dSYM").symlink_to(link.absolute())
    return "links"


@pytest.mark.parametrize("path_to", [
    lambda dsyms: dsyms, lambda dsyms: "App.xcarchive", linked, partial(zipped, "appDsyms.zip"),
    lambda dsyms: zipped("out/Shop.app.dSYM.zip", dsyms).parent,
    lambda dsyms: zipped("all.zip", "none", zipped("Shop.dSYM.ZIP", dsyms)),
    lambda dsyms: fat(*(image.read_bytes() for image in dsyms.glob("*/Contents/Resources/DWARF/*")))],
    ids=["folder", "archive", "links in a folder", "zip", "zips in a folder", "zip in a zip", "Mach-O"])
def test_images_are_found_in_each_kind_of_path(send_symbols, server, path_to):
    dsyms = Path("App.xcarchive/dSYMs")
    dsym("Shop", folder=dsyms), dsym("Kit", OTHER_UUID, dsyms)
    Path("App.xcarchive/Shop").write_bytes(b"the app itself is not read")
    status, out, err = send_symbols(path_to(dsyms))
    assert (status, err, len(out.splitlines())) == (0, "", 2), out
    for uuid in (SHOP_UUID, OTHER_UUID):
        assert functions_at(server, 0x401C, uuid) == SHOP_SYMBOLS[0x401C]


@pytest.mark.parametrize("variable", ["DWARF_DSYM_FOLDER_PATH", "CI_ARCHIVE_PATH"])
def test_a_build_in_xcode_needs_no_path(send_symbols, monkeypatch, variable):
    monkeypatch.setenv(variable, str(dsym().absolute().parent))
    assert send_symbols()[0] == 0


NO_MACHO = "it is not a complete zip or Mach-O file"
STRIPPED = SHOP_IMAGE.replace(b"__debug_", b"__others_")


def with_text_at(address, size):
    """The image, with another address and size of its code."""
    at = SHOP_IMAGE.index(b"__text\0") + 32
    return SHOP_IMAGE[:at] + struct.pack("<QQ", address, size) + SHOP_IMAGE[at + 16:]


def damaged(path):
    """The zip, with some bytes of its image changed."""
    data = bytearray(path.read_bytes())
    at = data.index(b"DWARF/Shop") + 500
    data[at:at + 50] = bytes(50)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("make, line", [
    (lambda: "none", "none: cannot read it: No such file or directory"),
    (lambda: Path("empty").mkdir() or "empty", "no dSYM in empty"),
    (lambda: zipped("a.zip", "empty"), "no dSYM in a.zip"),
    (lambda: Path("a.txt").write_text("a") and "a.txt", f"a.txt: {NO_MACHO}"),
    (lambda: damaged(zipped("a.zip", dsym())), "a.zip: cannot read it: *"),
    *((partial(dsym, image=image), f"Shop.dSYM: Shop: {NO_MACHO}") for image in (
        b"", SHOP_IMAGE[:500], SHOP_IMAGE[:32], b"\x7fELF" + bytes(100), with_text_at(0x100004000, 0x4001),
        with_text_at(0xffffc000, 0x94)))])
def test_an_unreadable_path_is_one_line_and_the_next_is_sent(send_symbols, server, make, line):
    path = make()
    check_one_line(send_symbols(path), f"symbols: {line}")
    status, _, err = send_symbols(path, dsym("Kit", OTHER_UUID, "b"))
    assert (status, held_by(server)) == (1, {OTHER_UUID}) and fnmatch.fnmatchcase(err, f"symbols: {line}\n"), err


def test_an_image_without_debug_information_is_reported_and_is_an_error_if_it_is_the_only_one(send_symbols):
    dsym("Kit", OTHER_UUID, image=STRIPPED)
    reported = f"Kit {OTHER_UUID} arm64: no debug information\n"
    assert send_symbols("Kit.dSYM") == (1, reported, "symbols: no debug information in Kit.dSYM\n")
    dsym()
    status, out, err = send_symbols(".")
    assert (status, out.startswith(reported + SENT), err) == (0, True, "")


@pytest.mark.parametrize("answer, line", [  # an answer that the next image would also get, and the line
    ((401, {"error": "invalid token"}), "the server answered 401: invalid token"),
    ((302, {}, {"Location": "https://example.com/"}),
     "the server answered 302: redirects are not followed (to https://example.com/)"),
    ((200, b"<h1>Welcome</h1>"), "the server answered 200: not an answer of backfeedr"),
    ((200, b"[" * 100_000), "the server answered 200: not an answer of backfeedr"),
    ((503, {"error": "storage unavailable"}, {"Retry-After": 301}), "the server answered 503: storage unavailable"),
    ("drop", "no answer from http://127.0.0.1:*"), ("cut", "no answer from http://127.0.0.1:*")])
@pytest.mark.parametrize("part", [False, True])
def test_a_server_that_accepts_no_symbols_is_one_line_and_gets_no_further_image(send_symbols, answer, line, part):
    outcome = send_symbols(dsym(), dsym("Kit", OTHER_UUID, "b"),
                           script=lambda request: None if part and request.method == "GET" else answer)
    check_one_line(outcome, f"symbols: Shop {SHOP_UUID} arm64: {line}; nothing after it was sent" if part else
                   f"symbols: {line}")
    assert TOKEN not in outcome[2]


@pytest.mark.parametrize("answer, line", [
    ((400, {"error": "invalid pages", "detail": "page 0\n\x1b"}), "the server answered 400: invalid pages (page 0 ?)"),
    ((200, {"uuid": SHOP_UUID, "complete": False, "received": 0}), "the server has 0 of 1 parts")])
def test_a_refused_image_is_one_line_and_the_next_is_sent(send_symbols, server, answer, line):
    status, out, err = send_symbols(dsym(), dsym("Kit", OTHER_UUID, "b"),
                                    script=lambda request: answer if SHOP_UUID in request.path else None)
    assert (status, err) == (1, f"symbols: Shop {SHOP_UUID} arm64: {line}\n")
    assert OTHER_UUID in held_by(server) and out.startswith(f"Kit {OTHER_UUID} arm64: 15 rows, sent")


def test_requests_that_may_succeed_later_are_repeated_after_the_pause_that_the_server_asks_for(symbols_module, server):
    pauses, busy = [], (503, {"error": "storage unavailable"}, {"Retry-After": 7})
    limited = 429, {"error": "rate limit exceeded"}, {"Retry-After": 60}
    with scripted([busy, "drop", limited, None], server) as (url, sent):
        answer = symbols_module.Server(url + "/api/v1/", TOKEN, pauses.append).symbols()
    assert (answer["symbols"], pauses, {each.path for each in sent}) == ([], [7, 0, 60], {"/api/v1/symbols"})
    with scripted([busy]) as (url, sent), pytest.raises(symbols_module.ServerError, match="503: storage unavailable"):
        symbols_module.Server(url, TOKEN, pauses.append).put(SHOP_UUID, b"{}")
    assert len(sent) == symbols_module.ATTEMPTS and len({each.body for each in sent}) == 1


def test_a_large_image_is_sent_in_parts_that_the_server_accepts_and_long_names_are_cut(symbols_module, server):
    """It has more rows, longer names and deeper inlining than a page may have, and sections that touch."""
    names = ["a" * 2_000, "\u00e9" * 600, "short"]

    def lookup(at):
        n = at // 8
        return [SimpleNamespace(symbol=f"{n % 997}-{depth}-{names[n % 3]}", full_path=f"C:\\x\\{n % 7}.c", line=at)
                for depth in range(at // 128 % 40)]
    reader = SimpleNamespace(features={"debug"}, make_symcache=lambda: SimpleNamespace(lookup=lookup))
    ranges = [(5120, 7_000), (7_000, 9_000), (9_500, 10_000)]
    image = symbols_module.Image("Big", SHOP_UUID, "arm64", ranges, reader)
    with scripted([None], server) as (url, _):
        outcome = symbols_module.send(symbols_module.Server(url, TOKEN), image, symbols_module.Terminal(quiet=True))
    (rows, parts, received), = sql(server, "select rows, parts, received from symbols")
    assert outcome == f"{rows:,} rows, sent" and received == parts > 2
    expected = {at: [(each.symbol.encode()[:1_000].decode(errors="ignore"), each.full_path[5:], each.line)
                     for each in lookup(at)] for first, end in ranges for at in range(first, end, 4)}
    expected.update({9_000: [], 9_496: [], 10_000: []})  # outside of the ranges
    with server.store.reading() as db:
        symbols = backfeedr.Symbols(db)
        assert {at: list(symbols.lookup(SHOP_UUID, at)) for at in expected} == expected


# -- examples/openapi.json

OPENAPI = json.loads((EXAMPLES / "openapi.json").read_bytes())
OPERATIONS = [(method.upper(), path, operation) for path, operations in OPENAPI["paths"].items()
              for method, operation in operations.items()]
INTEGERS = Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)  # 1.0 is none
Validator = jsonschema.validators.extend(Draft202012Validator, type_checker=INTEGERS)


def resolved(part):
    """A part of the description, after following its references."""
    while "$ref" in part:
        kind, name = part["$ref"].split("/")[2:]
        part = OPENAPI["components"][kind][name]
    return part


def content(part):
    return resolved(part)["content"]["application/json"]


def bodies(operation):
    """The examples of a request's body."""
    return [each["value"] for each in content(operation["requestBody"])["examples"].values()]


def check_schema(schema, value):
    """A value matches a schema."""
    Validator({**schema, "components": OPENAPI["components"]}).validate(value)


def test_openapi_has_every_route_field_and_error_of_the_server_and_no_other(api):
    assert {(method, "/api/v1" + path) for method, path, _ in OPERATIONS} == {
        (route.method, re.sub("<(.*?)>", r"{\1}", route.rule)) for route in api.server._router.routes
        if route.rule.startswith("/api/")}
    assert OPENAPI["info"]["version"] == backfeedr.__version__
    schemas, responses = OPENAPI["components"]["schemas"], OPENAPI["components"]["responses"]
    assert list(schemas["Crash"]["properties"]) == list(backfeedr._FIELDS[backfeedr.Crash])
    assert list(schemas["Event"]["properties"]) == list(backfeedr._FIELDS[backfeedr.Event])
    assert schemas["Event"]["properties"]["type"]["enum"] == list(backfeedr.EVENT_TYPES)
    texts = {name: content(response)["schema"]["properties"]["error"] for name, response in responses.items()}
    assert {text for each in texts.values() for text in each.get("enum", [])} \
        == {text for status, texts in backfeedr.ERRORS.items() if status not in (403, 405) for text in texts}
    patterns = {name: each["pattern"] for name, each in texts.items() if "pattern" in each}
    assert {name for text in [text for _, _, text, *_ in BAD_BODIES] for name, pattern in patterns.items()
            if re.search(pattern, text)} == {"BadRequest"}
    assert {name for text in [text for _, text, _ in UNREADABLE] for name, pattern in patterns.items()
            if re.search(pattern, text)} == {"BadDiagnostics"}


@pytest.mark.once
def test_every_example_of_openapi_matches_its_schema():
    for schema in OPENAPI["components"]["schemas"].values():
        Validator.check_schema(schema)
    for method, _, operation in OPERATIONS:
        for each in operation["responses"].values():
            check_schema(content(each)["schema"], content(each)["example"])
        for each in map(resolved, operation.get("parameters", [])):
            check_schema(each["schema"], each["example"])
        for body in bodies(operation) if method != "GET" else ():
            check_schema(content(operation["requestBody"])["schema"], body)


def operations_of(method):
    """The paths and operations of a method."""
    return [(path, operation) for each, path, operation in OPERATIONS if each == method]


def requests_of(method, path, operation):
    """The status, body and headers of requests with each example of a body, and with each error of a sender."""
    examples, who = [json.dumps(each).encode() for each in bodies(operation)], {} if method == "POST" else ADMIN
    for n, body in enumerate(examples):
        under, signature = {"Idempotency_Key": f"{path} {n}"}, backfeedr.sign(KEY.encode(), NOW.encode(), body)
        if method == "PATCH" or not json.loads(body).keys() - SPAN.keys():  # an empty payload of Apple's
            yield 200, body, who
        elif method == "PUT":
            yield from ((201, body, who), (200, body, who))
        else:
            yield from ((201, body, under), (200, body, under), (422, body + b" ", under),
                        (201, gzip.compress(body), {"Content_Encoding": "gzip"}),
                        (201, body, {"X_Backfeedr_Timestamp": NOW, "X_Backfeedr_Signature": signature}),
                        (401, body, {"X_Backfeedr_Timestamp": NOW, "X_Backfeedr_Signature": "sha256=0"}))
    yield from ((401, body, {"X_Backfeedr_Key": None}), (400, b"{}", who), (413, b" " * 10_001, who),
                (415, body, {**who, "Content_Encoding": "br"}))


def questions_of(operation):
    """The status and query of requests without parameters, and with the example, bounds and errors of each."""
    yield 200, {}
    for each in map(resolved, operation.get("parameters", [])):
        name, schema = each["name"], each["schema"]
        if each["in"] == "query":
            yield 200, {name: each["example"]}
            if "minimum" in schema:
                yield from ((200, {name: schema["minimum"]}), (400, {name: schema["minimum"] - 1}),
                            (200, {name: schema["maximum"]}), (400, {name: schema["maximum"] + 1}))
            yield from {"cursor": [(400, {"cursor": "x"})],
                        "sort": [(200, {"sort": "first_seen"}), (400, {"sort": "x"})],
                        "state": [*((200, {"state": each}) for each in schema.get("enum", [])), (400, {"state": "x"})],
                        "app": [(404, {"app": "nope"}), (400, {"days": "0"})]}.get(name, [])


def send_files(send):
    """Sends Apple's files, and asks for their groups."""
    for text, missing in ((EXAMPLES / "crash.ips").read_bytes(), 0), (crash_text(), 1):
        answer = send("POST", "/diagnostics", 201, text, X_Backfeedr_Device="d", environ={"CONTENT_TYPE": "text/plain"})
        waiting = send("GET", "/crashes/{group_hash}", 200, group=answer["group_hashes"][0], **ADMIN)
        assert len(waiting["missing_symbols"]) == missing


def ask_questions(send, private):
    for path, operation in operations_of("GET"):
        is_public = {} in operation["security"]
        for status, query in questions_of(operation):
            for who in [ADMIN, {}] if is_public else [ADMIN]:
                send("GET", path, status, query=query, **who)
        if path != "/health":
            asked = {"server": private} if is_public else {}
            send("GET", path, 401, **asked)
            send("GET", path, 200, **asked, **ADMIN)


MOVED = shop_crash(16_392)  # it moves to another group when the symbols of the example arrive


def test_every_request_of_openapi_gets_an_answer_that_matches_its_schema(serve):
    server = serve(max_body_size=10_000, rate_limit=1000)
    group, seen = resolved({"$ref": "#/components/parameters/group_hash"})["example"], defaultdict(set)

    def send(method, path, expected, body=b"", query=(), server=server, group=group, **headers):
        place = "/api/v1" + path.replace("{group_hash}", group).replace("{uuid}", HELD)
        status, got, answer = call_with_headers(server, method, place, body, urlencode(query), **headers)
        assert status == expected, (method, path, query, status, answer)
        response = resolved(OPENAPI["paths"][path][method.lower()]["responses"][str(status)])
        assert response.get("headers", {}).keys() <= got.keys()
        check_schema(content(response)["schema"], answer)
        seen[method, path].add(str(status))
        return answer

    def send_all(method):
        answer = None
        for path, operation in operations_of(method):
            for status, body, headers in requests_of(method, path, operation):
                before, answer = answer, send(method, path, status, body, **headers)
                assert (status, "Idempotency_Key" in headers) != (200, True) or answer == before

    send_all("POST")
    send_files(send)
    old = send("POST", "/crashes", 201, json.dumps(MOVED).encode())["group_hash"]
    odd = dict(bodies(OPENAPI["paths"]["/crashes"]["post"])[0], occurred_at=2e9, device_model="x" * 501, is_charging=1,
               build_number=47, battery_level="nan", locale=[], memory={"free": 1})
    odd["stack_trace"] = [{**odd["stack_trace"][0], "frame": "0", "line": "many"}, {"symbol": 7},
                         {"symbol": True, "file": []}]
    assert send("POST", "/crashes", 201, json.dumps(odd).encode())["group_hash"] == group, "asked for below"
    send_all("PUT")
    wait_for_catch_up()
    send_all("PATCH")
    for path, operation in operations_of("PATCH"):
        body = json.dumps(bodies(operation)[0]).encode()
        send("PATCH", path, 404, body, group="0" * 16, **ADMIN)
        send("PATCH", path, 301, body, group=old, **ADMIN)
    moved = send("GET", "/crashes/{group_hash}", 301, group=old, **ADMIN)["detail"]
    named = send("GET", "/crashes/{group_hash}", 200, group=moved.split()[1], **ADMIN)["reports"][0]
    assert named["raw_stack_trace"] == MOVED["stack_trace"] and len(named["stack_trace"]) == 3
    ask_questions(send, serve("private.db", public_metrics=False))
    found = send("GET", "/crashes", 200, query={"version": "1.2*"}, **ADMIN)["groups"]
    assert [each["is_new"] for each in found] == [True] * 4, "first seen in one of these versions"
    limited = serve("limited.db", rate_limit=1)
    call(limited)
    for path, _ in operations_of("POST"):
        send("POST", path, 429, b"{}", server=limited)

    server.store.close()
    for method, path, operation in OPERATIONS:
        body = b"null" if method == "GET" else json.dumps(bodies(operation)[0]).encode()
        send(method, path, 503, body, **ADMIN)
        by_the_web_server = {"431", "500", "501"}
        assert operation["responses"].keys() - by_the_web_server == seen[method, path], path


# -- Host apps

@pytest.mark.parametrize("path, mount", [("/api/v1/health", ""), ("/", ""), ("/api/v1/health", "/host")])
def test_an_embedded_server_knows_where_it_is_mounted(path, mount):
    def inner(environ, start_response):
        assert (environ["SCRIPT_NAME"], environ["PATH_INFO"]) == (mount + "/crashes", path)
        start_response("204 No Content", [])
        return []
    app = webtest.TestApp(validator(load_example("embed").make_app(inner)))
    app.get("/crashes" + path, extra_environ={"SCRIPT_NAME": mount}, status=204)
    redirected = app.get("/crashes", extra_environ={"SCRIPT_NAME": mount}, status=308)
    assert redirected.headers["Location"] == mount + "/crashes/"
    assert app.get("/crashesque").text == "Hello\n", "a path of the host app"


@pytest.mark.slow
@pytest.mark.parametrize("name, status, kind", [("embed", 200, "text/plain"), *(
    (name, 404, "text/html") for name in ("embed_bottle", "embed_flask", "embed_django"))])
def test_a_host_app_serves_its_own_pages_and_backfeedr_under_crashes_and_prints_its_url(tmp_path, name, status, kind):
    pytest.importorskip(name.partition("_")[2] or "waitress")
    with running(sys.executable, EXAMPLES / f"{name}.py", "--port", "0", "--db", "e.db", cwd=tmp_path) as process:
        url, key = printed(process, rf"(?s)\Aembed on ({URL})\n.*(bf_live_[0-9a-f]{{32}}).*curl -X POST \1/crashes"
                                    rf"{CRASHES} .*-d '").groups()
        mounted = url + "/crashes"
        assert ask(url + "/")[::2] == (200, "Hello\n")
        for path in ("/nothing", "/crashesque/api/v1/health", "/api/v1/health"):
            got, headers, _ = ask(url + path)
            assert (got, headers.get_content_type()) == (status, kind), "the host app's own answer"
        got, headers, _ = ask(mounted)
        assert (got, urlsplit(headers["Location"]).path) == (308, "/crashes/")
        for path in ("/nothing", "/api/v1/nothing"):
            assert ask(mounted + path)[::2] == (404, '{"error": "not found"}'), path
        assert 'action="/crashes/sign-in"' in ask(mounted + "/sign-in")[2]
        assert ask(mounted + CRASHES, CRASH, key="wrong")[::2] == (401, '{"error": "invalid API key"}')
        assert ask(mounted + BATCH, {"events": [{}]}, key)[::2] == (400, '{"error": "missing type at index 0"}')
        assert json.loads(ask(mounted + "/api/v1/health")[2]) == {"status": "ok"}
        check_stores_a_crash(mounted, tmp_path / "e.db", key)


# Appended to the server: writes a file if a process uses a connection that another process has made.
FORK_WATCHER = """
class Connection(Connection):
    def __init__(self, *args, **options):
        self.maker = os.getpid()
        super().__init__(*args, **options)

    def __getattribute__(self, name):
        if super().__getattribute__("maker") != os.getpid():
            print(name, file=open("crossed.txt", "a"))
        return super().__getattribute__(name)

class Backfeedr(Backfeedr):
    def __call__(self, environ, start_response):
        return super().__call__(environ, lambda status, headers, *rest: start_response(
            status, [*headers, ("X-Worker", str(os.getpid()))], *rest))
"""


@pytest.mark.slow
def test_two_gunicorn_workers_forked_from_one_server_store_everything_they_acknowledge_and_log_nothing(tmp_path):
    pytest.importorskip("gunicorn")
    (tmp_path / "backfeedr.py").write_text(SERVER.read_text(encoding="utf-8") + FORK_WATCHER, encoding="utf-8")
    path, port, answers, shares = tmp_path / "backfeedr.db", free_port(), [], Counter()
    with running(sys.executable, "-m", "gunicorn", "-c", EXAMPLES / "gunicorn.conf.py", "--bind", f"127.0.0.1:{port}",
                 cwd=tmp_path, **SECRETS, BACKFEEDR_RATE_LIMIT="0", PYTHONPATH=str(tmp_path)) as process:
        wait_until(lambda: listens(port))
        send_malformed(port)
        url = f"http://127.0.0.1:{port}"
        # The system chooses the worker of a connection: open many at a time, until each worker has had some.
        while len(answers) < 60 or len(shares) < 2 or min(shares.values()) < 5:
            with ThreadPoolExecutor(8) as pool:
                answers += pool.map(lambda _: ask(url + CRASHES, CRASH), range(20))
            shares = Counter(headers["X-Worker"] for _, headers, _ in answers)
            assert len(answers) < 5000
        with Store(str(path)) as store:  # like a command beside the server
            key = store.create_app("Shop")
        assert [ask(url + EVENTS, EVENT, key)[0] for _ in range(10)] == [201] * 10
        with Store(str(path)) as store:
            store.revoke_key(key)
        assert [ask(url + EVENTS, EVENT, key)[0] for _ in range(10)] == [401] * 10
        process.terminate()
        assert (process.stdout.read(), process.wait(20)) == ("", 0)
    assert {status for status, _, _ in answers} == {201}
    assert sorted(json.loads(body)["id"] for _, _, body in answers) \
        == sorted(each for each, in sql(path, "select id from crashes"))
    assert sql(path, "select count(*) from events") == [(10,)]
    assert not (tmp_path / "crossed.txt").exists()
    check_database(path)


@pytest.mark.slow
@pytest.mark.parametrize("command, port, free", [
    ("waitress-serve --listen=127.0.0.1:8080 --call backfeedr:Backfeedr", ":8080", ":0"),
    ("gunicorn 'backfeedr:Backfeedr()'", "gunicorn", "gunicorn --bind=127.0.0.1:0")])
def test_the_readmes_commands_for_other_wsgi_servers_serve_this_host_only(tmp_path, command, port, free):
    pytest.importorskip(re.match(r"\w+", command)[0])
    assert f"`{command}`" in section("Embed the server in a web app").replace("\n", " ")
    with running("bash", "-c", command.replace(port, free), cwd=tmp_path, **SECRETS, PATH=PROGRAMS,
                 PYTHONPATH=str(SERVER.parent)) as process:
        check_stores_a_crash(printed(process, URL)[0], tmp_path / "backfeedr.db")


def test_the_library_example_makes_a_working_key_at_each_run(tmp_path):
    path = tmp_path / "l.db"
    runs = [run_example("library", "--db", path) for _ in range(2)]
    with Backfeedr(Settings(db_path=str(path))) as server:
        for status, out, err in runs:
            key, figures = out.splitlines()
            assert (status, err, Api(server).post(CRASHES, CRASH, key=key)[0]) == (0, "", 201)
            assert set(json.loads(figures)) == {"crash_free_rate_7d", "dau", "sessions_7d", "crashes_7d", "top_crashes"}
        assert [(app.name, app.keys) for app in server.store.apps()] == [("Shop", 2)], "no other app is made"


@pytest.mark.slow
def test_the_demos_link_signs_in_and_nothing_is_left_after_a_stop(tmp_path):
    shorter = "import sys, demo; demo.DAYS = 2; sys.exit(demo.main())"
    with running(sys.executable, "-c", shorter, "--port", "0", cwd=tmp_path, TMPDIR=str(tmp_path),
                 PYTHONPATH=os.pathsep.join([str(EXAMPLES), str(SERVER.parent)])) as process:
        link = printed(process, rf"(?s)\Abackfeedr on {URL}\n.*?({URL}/sign-in\?code=\S+)")[1]
        cookie = ask(link)[1]["Set-Cookie"].split(";")[0]
        assert "Tramwise" in ask(link.rpartition("sign-in")[0], Cookie=cookie)[2]
        assert len(list(tmp_path.iterdir())) == 1
        process.terminate()
        assert process.wait(20) == 0
    assert list(tmp_path.iterdir()) == []


def run_shortened(name, change, *arguments, folder):
    """The output of an example with less work, and with a server whose code is cached. No file is left behind."""
    start = folder / "start.py"
    start.write_text("import sys, backfeedr; sys.exit(backfeedr.main())")
    code = f"import sys, {name} as its; {change}; sys.exit(its.main(*sys.argv[1:]))"
    status, out, err = run_program(sys.executable, "-c", code, *arguments, "--server", start, "--dir", folder,
                                   PYTHONPATH=os.pathsep.join([str(EXAMPLES), str(SERVER.parent)]))
    assert (status, [*folder.iterdir()]) == (0, [start]), err
    return out


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.parametrize("command", [
    "ingest --seconds 0.2 --connections 1",  # by wrk and benchmark.lua, where wrk is installed
    "metrics --quick --connections 2 --driver python --events 1000 --no-prune",
    pytest.param(f"postgres {POSTGRES} --quick --connections 2 --driver python", id="postgres",
                 marks=needs_postgres)])
def test_the_benchmark_runs_and_finds_everything_acknowledged(tmp_path, command):
    """This does not check the speed that it measures."""
    less = ("its.TURN, its.SIZE_EVENTS, its.QUICK_SECONDS = 2, 1000, 0.2; its.CRASH, its.EVENTS, its.FRESH ="
            " (each._replace(bodies=50) for each in (its.CRASH, its.EVENTS, its.FRESH))")
    out = run_shortened("benchmark", less, *command.split(), folder=tmp_path)
    assert out.splitlines()[-1] == "All that was acknowledged is stored, and the databases are sound."


@pytest.mark.slow
@pytest.mark.once
def test_a_flood_of_new_names_leaves_answers_small_and_expires(tmp_path):
    """Measured by examples/hostile.py."""
    out = run_shortened("hostile", "its.CLIENTS, its.ASKED = 4, 2", "--reports", "1600", "--seconds", "0.2",
                        folder=tmp_path)
    assert len(re.findall("^/api/v1/[a-z-]+.* bytes .* ms, p95", out, re.M)) == 20
    assert max(int(size.replace(",", "")) for size in re.findall("([0-9,]+) bytes", out)) < 64_000
    assert re.search("^pruned in [0-9]+ s: 0.[0-9]+ MB are left$", out, re.M), "the flood is gone"


# -- Helpful errors

NO_SETTING, ANOTHER_FILE = "there is no such setting; ", "; --db or BACKFEEDR_DB_PATH names another"
ERRORS = {  # variables (without BACKFEEDR_) and arguments of a command, and its line of error
    "RATELIMIT=5": f"BACKFEEDR_RATELIMIT: {NO_SETTING}did you mean BACKFEEDR_RATE_LIMIT?",
    "TOKEN=secret app create Shop": f"BACKFEEDR_TOKEN: {NO_SETTING}did you mean BACKFEEDR_AUTH_TOKEN?",
    "=1": f"BACKFEEDR_: {NO_SETTING}after BACKFEEDR_ comes one of HOST, PORT, *",
    "XYZ=1": f"BACKFEEDR_XYZ: {NO_SETTING}after BACKFEEDR_ comes one of HOST, *",
    "THREADS=many": "BACKFEEDR_THREADS: 'many' is not a whole number",
    "--port 65536": "*port: 65536 is not from 0 to 65535",
    "--port TAKEN":
        f"cannot listen on 127.0.0.1 port {TAKEN}: Address already *; choose another with --port or BACKFEEDR_PORT",
    "--host 256.0.0.1": "cannot listen on 256.0.0.1 port 8080: *; choose another with --host or BACKFEEDR_HOST",
    "--host \u00fc..x": "cannot listen on *",
    "--port 0 --db junk.db": f"cannot open the database */junk.db: file is not a database{ANOTHER_FILE}",
    "--port 0 --db other.db": f"*/other.db is a database, but not one of backfeedr's{ANOTHER_FILE}",
    "--port 0 --db no/x.db": "cannot open the database */no/x.db: there is no folder */no",
    "app create x --db no/x.db": "cannot open the database */no/x.db: there is no folder */no",
    "app list": f"there is no database */backfeedr.db{ANOTHER_FILE}",
    "import nothing": "cannot read nothing: No such file or directory",
    "app create '' --db shop.db": "an app's name *", "app create \udcff --db shop.db": "an app's name *",
    "key create Nope --db shop.db": "there is no app named 'Nope'*",
    "key revoke bf_live_zz --db shop.db": "'bf_live_zz' names no active keys; give its first 12 characters, *",
    "app delete Nope --db shop.db": "there is no app named 'Nope'*",
    "--port 0 --db .": "cannot open the database *: it is a folder",
    "--port 0 --db " + "x" * 300: "cannot open the database *: File name too long",
    "app list --db " + "x" * 300: f"there is no database *{ANOTHER_FILE}",
    "key revoke \udcff --db shop.db": "*can't encode*",
    "export events --bom --db shop.db": "--bom is for --format csv: *"}
MISUSES = {  # arguments of a command, and the end of the line after its usage, without quotes
    "--port http": "", "app": "", "app rename x": "", "app create": "", "nonsense": "*check*)",
    "aap": "; did you mean app?", "key lst": "; did you mean list?", "exprot x": "; did you mean export?",
    "export event": "; did you mean events?", "alert add https://a.example --hour 25": ", 23)"}


def test_an_error_is_one_line_that_says_what_to_do_and_no_file_is_made(command, monkeypatch):
    Path("junk.db").write_bytes(b"junk" * 1000)
    sql_run("other.db", "create table theirs (a)")
    command("app", "create", "Shop", "--db", "shop.db")
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    for words, line in ERRORS.items():
        with monkeypatch.context() as environ:
            for name, value in re.findall("([A-Z_]*)=([a-z0-9]+)", words):
                environ.setenv("BACKFEEDR_" + name, value)
            check_one_line(command(*shlex.split(words.replace("TAKEN", TAKEN))["=" in words:]), "backfeedr: " + line)
    for words, line in MISUSES.items():
        status, out, err = command(*words.split())  # since 3.14, Python quotes numbers, too
        check_printed((status, out, err.replace("'", "")), f"usage: *{line}\n", status=2)
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


@pytest.mark.parametrize("name, arguments, line", [
    ("client", ["--key", KEY, "crash", "none.json"], "cannot read none.json: No such file or directory"),
    ("demo", ["--port", "TAKEN"], "*Address already in use*"), ("embed", ["--port", "TAKEN", "--db", "e.db"], "*"),
    ("library", ["--db", "no/l.db"], "cannot open the database *"),
    ("client", ["--key", KEY, "crash", EXAMPLES / "crash.ips"], "*Apple's reports go to /api/v1/diagnostics")])
def test_an_error_of_an_example_is_one_line_and_no_file_is_made(tmp_path, name, arguments, line):
    given = [str(argument).replace("TAKEN", TAKEN) for argument in arguments]
    check_one_line(run_example(name, *given, cwd=tmp_path, TMPDIR=str(tmp_path)), f"{name}: {line}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name, arguments, error", [
    *(("client", arguments, "*") for arguments in ([], ["crash"], ["report", "-"])),
    ("client", ["--key", "", "crash", "-"], "there is no API key: set BACKFEEDR_API_KEY, or use --key"),
    ("client", ["--server", "http://h", "--key", "k\n", "crash", "-"], "the API key is empty or has a control *"),
    ("client", ["--endpoint", "localhost:8080", "crash", "-"], "'localhost:8080' is not an address *"),
    ("symbols", [], "no PATH is given, *"), ("symbols", ["a"], "'http://a b' is not an address *"),
    ("symbols", ["--server", "http://h", "--token", "", "a"], "there is no admin token: *"),
    ("symbols", ["--server", "http://h", "--token", "a\n", "a"], "the admin token has a control character"),
    *(("symbols", ["--server", address, "a"], f"'{address}' is not an address *") for address in (
        "localhost:8080", "http://host:0", "https://me:secret@example.com", "http://:80"))])
def test_a_tool_ends_with_2_for_wrong_usage(monkeypatch, capsys, name, arguments, error):
    pytest.importorskip("symbolic" if name == "symbols" else "json")
    for variable, value in {**SECRETS, "BACKFEEDR_ENDPOINT": "http://a b"}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit) as caught:
        load_example(name).main(arguments)
    check_printed((caught.value.code, *capsys.readouterr()), f"usage: *error: {error}\n", status=2)


def test_an_unknown_backfeedr_variable_stops_a_host_app_without_settings_and_others_do_not(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKFEEDR_PUBLIC_METRIC", "0")
    path = tmp_path / "crashes.db"
    with pytest.raises(SettingsError, match="^BACKFEEDR_PUBLIC_METRIC: .* did you mean BACKFEEDR_PUBLIC_METRICS"):
        Backfeedr(db_path=str(path))
    assert not path.exists()
    with Backfeedr(Settings(db_path=str(path)), announce=lambda text: None) as server:
        assert [app.name for app in server.store.apps()] == ["default"]
    assert Settings.from_env({"BACKFEEDR_ENDPOINT": "http://x", "BACKFEEDR_RATELIMIT": "", "MY_BACKFEEDR_X": "1",
                              "PATH": "/bin", "BACKFEEDRS": "1"}) == Settings()


def test_a_missing_package_is_one_line_with_the_install_command_and_no_secrets_are_made(tmp_path):
    def run(*command):  # -S: without installed packages
        return run_program(sys.executable, "-S", *command, cwd=tmp_path, PYTHONPATH="")

    check_one_line(run(EXAMPLES / "symbols.py", "none"), "symbols: symbolic is missing; 'pip install symbolic' *")
    for missing, copied in (("bottle", SERVER), ("waitress", importlib.util.find_spec("bottle").origin)):
        shutil.copy(copied, tmp_path)
        check_one_line(run("backfeedr.py", "--port", "0"),
                       f"backfeedr: {missing} is missing; '*pip install bottle waitress' installs *")
        assert not (tmp_path / "backfeedr.db").exists()


def test_python_3_8_gets_one_line_that_names_the_version_it_needs(tmp_path):
    program = f"import runpy, sys; sys.version_info = (3, 8); runpy.run_path({str(SERVER)!r}, run_name='__main__')"
    check_one_line(run_program(sys.executable, "-c", program, cwd=tmp_path), "backfeedr needs Python 3.9 or later, *")


# -- README and packaging

def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.M | re.S).group(1)


def code_blocks(kind, words=""):
    """The code blocks of this kind in the README and the handbook that contain these words."""
    return [block for block in re.findall(rf"^```{kind}\n(.*?)^```$", README + HANDBOOK, re.M | re.S) if words in block]


def table(title):
    """The cells of the table in a section, without its head and without backquotes."""
    rows = re.findall(r"^\| `(.*) \|$", section(title).replace("\\|", "\0"), re.M)
    return [[cell.strip(" `").replace("\0", "|") for cell in row.split("|")] for row in rows]


def usages(command, *words):
    """The usage of each command of the program, or of those that begin with these words."""
    text = command(*words, "--help")[1]
    names = re.findall(r"^    (\w+)", text, re.M)
    for name in names:
        yield from usages(command, *words, name)
    if not names:
        yield text.partition("\n\n")[0].replace(",", "|")


def words_and_options(usage):
    """The words of a usage in their order, without brackets, and the set of its options except --db."""
    words = re.sub(r"\[-.*?\]", "", usage, flags=re.S).split()[2:]
    return [word.strip("[]{}") for word in words], {*re.findall(r"--[\w-]+", usage)} - {"--db"}


def test_the_readmes_latest_release_settings_commands_and_endpoints_match_the_program(command):
    assert re.findall(r"^- \*\*(.+?)\*\*", section("Changelog"), re.M)[0] == backfeedr.__version__
    assert {variable: default for variable, default, _ in table("Settings")} == {
        **{name: str(int(default) if isinstance(default, bool) else default) for name, default in DEFAULTS.items()},
        **dict.fromkeys(SECRETS, "made at first start")}
    shown = [cells[0] for cells in table("Commands")]
    expected = sorted(map(words_and_options, usages(command)))
    assert sorted(words_and_options("python backfeedr.py " + cell) for cell in shown) == expected
    assert shown[0].startswith("[serve]") and "--db" in shown[0]
    shown = [cells[0].replace("GROUP_HASH", "{group_hash}").replace("UUID", "{uuid}") for cells in table("API")]
    assert sorted(shown) == sorted(["GET /metrics", *(f"{method} /api/v1{path}" for method, path, _ in OPERATIONS)])


def test_the_readme_is_short_its_links_work_and_each_example_has_a_test(command):
    lines = README.splitlines()
    assert len(lines) <= 250 and [line for line in lines if len(line) > 120 and not line.startswith("![")] == []
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert [link for link in links if not (HERE / link).is_file()] == []
    titles = {re.sub("[^a-z -]", "", title.lower()).replace(" ", "-") for title in re.findall("^## (.*)", README, re.M)}
    assert {*re.findall(r"\]\(#([^)]+)\)", README)} == titles
    topics = {line.split()[0] for line in command("help")[1].splitlines()}
    assert {*re.findall(r"`help\s([a-z]+)`", README + HANDBOOK)} <= topics
    tests = Path(__file__).read_text(encoding="utf-8")
    names = [path.name for path in EXAMPLES.rglob("*")  # `swift test` runs all of the Swift package
             if path.is_file() and path.suffix not in (".pyc", ".png") and "swift" not in path.parts]
    assert [name for name in names if name not in tests and f'"{Path(name).stem}"' not in tests] == []


def test_the_readmes_lines_for_a_host_app_run_unchanged(tmp_path, monkeypatch):
    import bottle
    monkeypatch.chdir(tmp_path)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    names = {"host_app": bottle.Bottle()}
    lines, = code_blocks("python", "host_app")
    mounted, closing_line, _ = lines.partition("server.close()")
    exec(mounted, names)
    answer = webtest.TestApp(names["host_app"]).post_json(
        "/crashes" + CRASHES, CRASH, headers={"X-Backfeedr-Key": KEY}, status=201)
    exec(closing_line, names)
    stored_as = sql("crashes.db", "select crashes.id, name from crashes join apps on apps.id = app_id")
    assert stored_as == [(answer.json["id"], "default")]


def same_shape(shown, got):
    """Whether an answer has the fields that are shown, at any depth; "..." stands for further items."""
    if isinstance(shown, dict):
        return isinstance(got, dict) and list(shown) == list(got) and all(map(same_shape, shown.values(), got.values()))
    return not (isinstance(shown, list) and shown and got) or same_shape(shown[0], got[0])


@pytest.mark.once
def test_the_requests_of_the_readme_and_handbook_get_the_answers_that_are_shown(run):
    """With another host and secrets, and other figures, because the database is another one."""
    server, now = run(BACKFEEDR_RATE_LIMIT="100"), time_text(time.time())

    def answer_to(command):
        for old, new in (("http://localhost:8080", server.url), ("http://127.0.0.1:8080", server.url),
                         ("bf_live_your_key", KEY), ("bf_admin_your_token", TOKEN)):
            command = command.replace(old, new)
        return json.loads(bash(command, HERE, BACKFEEDR_ENDPOINT=server.url))

    (send,), (sign,), (apples,) = (code_blocks("sh", words) for words in ("client.py", "openssl", "crash.ips"))
    told, event = answer_to(send), answer_to(sign)
    assert sql(server.db, "select id, group_hash from crashes") == [(told["id"], told["group_hash"])]
    assert sql(server.db, "select id, name from events") == [(event["id"], "purchase")]
    assert answer_to(sign.replace("$time.$hash", "$time.wrong")) == {"error": "invalid signature"}
    read, = re.findall(r"The answer is `(\{.*?\})`", README)
    assert json.loads(read.replace("...", "")).keys() == answer_to(apples).keys()
    assert sql(server.db, "select exception_type from crashes")[1:] == [("EXC_BREAKPOINT",)]

    crash = dict(CRASH, occurred_at=now, app_version="1.0", exception_reason="of all that is shown", device_id_hash="d")
    session = dict(type="session_start", session_id="s", app_version="1.0", device_id_hash="d", occurred_at=now)
    for path, body in ((CRASHES, crash), (CRASHES, dict(crash, exception_type="Other")), (EVENTS, session)):
        assert server.post(path, body)[0] == 201
    shown = re.findall(r"^\$ (curl (?:.*\\\n)*.*)\n(\{.*(?:\n .*)*)$", "".join(code_blocks("console")), re.M)
    assert len(shown) == (README + HANDBOOK).count("\n$ curl"), "a request is shown without an answer"
    for command, answer in shown:
        got = answer_to(command)
        assert same_shape(json.loads(answer.replace(", ...", "")), got), (command, got)
    assert sql(server.db, "select count(*) from crashes") == [(5,)]


@pytest.fixture(scope="module")
def pip(tmp_path_factory):
    """Variables that let pip install bottle and waitress from a folder; skips a test if they cannot be downloaded."""
    folder = tmp_path_factory.mktemp("pip")
    status, _, err = run_program(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "bottle", "waitress",
                                 cwd=folder)
    if status:
        pytest.skip(f"pip cannot download packages: {err.splitlines()[-1]}")
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_NO_COMPILE": "1"}


@pytest.mark.once
def test_the_readmes_first_lines_start_a_server_and_its_pyz_runs_with_python_alone(tmp_path, pip):
    clone = tmp_path / "clone"
    (clone / "examples").mkdir(parents=True)
    shutil.copy(SERVER, clone)
    shutil.copy(EXAMPLES / "handbook.md", clone / "examples")
    start = re.search("<!-- start -->\n```sh\n(.*?)```\n<!-- /start -->", README, re.S)[1]
    # With the installed pip: to install another into .venv takes longer than everything else.
    for old, new in (("venv .venv", "venv --without-pip .venv"),
                     (".venv/bin/pip", f"'{sys.executable}' -m pip --python .venv/bin/python")):
        assert start.count(old) == 1
        start = start.replace(old, new)
    with running("bash", "-c", start, cwd=clone, BACKFEEDR_PORT="0", PATH=PROGRAMS, **SECRETS, **pip) as process:
        check_stores_a_crash(printed(process, f"(?<=backfeedr on ){URL}")[0], clone / "backfeedr.db")

    command, = code_blocks("sh", "zipapp")
    (clone / "build/pyz").mkdir(parents=True)
    (clone / "build/pyz/bottle.py").write_text("raise SystemExit('of an earlier build')")
    bash(command.replace(old, new), clone, **pip)
    # Without the environment, this folder and installed packages.
    isolated = [sys.executable, "-I", "-S", shutil.copy(clone / "backfeedr.pyz", tmp_path)]
    shutil.rmtree(clone)
    with running(*isolated, "--port", "0", cwd=tmp_path, **SECRETS) as process:
        check_stores_a_crash(printed(process, URL)[0], tmp_path / "backfeedr.db")
        process.terminate()
        assert (process.stdout.read(), process.wait(20)) == ("", 0)
    status, out, err = run_program(*isolated, "help", "limits", cwd=tmp_path)
    assert (status, err) == (0, "") and out in HANDBOOK


@pytest.mark.slow
@pytest.mark.once
def test_a_wheel_contains_only_the_module_its_metadata_and_the_handbook(tmp_path):
    for name in ("build", "setuptools", "wheel"):
        pytest.importorskip(name)
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns(".build"))
    for path in (SERVER, *(HERE / name for name in ("README.md", "setup.cfg", "pyproject.toml", "LICENSE"))):
        shutil.copy(path, tmp_path)
    assert "`python -m build`" in section("Changelog")
    bash("python -m build --wheel --no-isolation", tmp_path)
    wheel, = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        info, data = (f"backfeedr-{backfeedr.__version__}.{kind}/" for kind in ("dist-info", "data"))
        assert sorted(name for name in archive.namelist() if not name.startswith(info)) == [
            data + "data/share/backfeedr/handbook.md", "backfeedr.py"]
        assert archive.read("backfeedr.py") == SERVER.read_bytes()
        assert b"backfeedr = backfeedr:main" in archive.read(info + "entry_points.txt")
        assert b"\nRequires-Python: >=3.9\n" in archive.read(info + "METADATA")


# -- examples/deploy

def edited(name, folder, *changes):
    """A file of examples/deploy with changes for this host."""
    text = (EXAMPLES / "deploy" / name).read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    (folder / name).write_text(text)
    return folder / name


@contextmanager
def nginx(folder, name, http, *changes):
    """Runs nginx with a file of examples/deploy and its http on that port; it listens when the block begins."""
    site = edited(name, folder, ("listen 80;", f"listen 127.0.0.1:{http};"), ("    listen [::]:80;\n", ""),
                  ("    listen [::]:443 ssl;\n", ""), *changes)
    folders = "".join(f"{each}_temp_path {folder}/{each}; "
                      for each in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    user = "" if os.geteuid() else "user root; "  # another user may not read the test's folder
    (folder / "main.conf").write_text(
        f"{user}pid {folder}/pid; error_log {folder}/error.log; events {{ }}\n"
        f"http {{ access_log {folder}/access.log; {folders} include {site}; }}\n")
    with running("nginx", "-e", folder / "error.log", "-p", folder, "-c", folder / "main.conf", "-g", "daemon off;",
                 cwd=folder):
        wait_until(lambda: listens(http))
        yield


def curl(certificate, port, path, *options, **given):
    """The status (0: cut off) and text that curl gets from crashes.example.com, which resolves to this host."""
    site = f"crashes.example.com:{port}"
    _, out, err = run_program(
        "curl", "--silent", "--show-error", "--max-time", "20", "--write-out", "\\n%{http_code}", "--cacert",
        certificate, "--resolve", f"{site}:127.0.0.1", f"https://{site}{path}", *options, **given)
    text, _, status = out.rpartition("\n")
    return int(status), text or err


def check_proxy(server, certificate, https, http):
    """A proxy passes crashes on, refuses a body that is too large or too slow, and redirects http to https. A browser's
    cookie is for https only. At the end the server is stopped, and malformed requests could fill the proxy's log."""
    def post(body, *options):
        return curl(certificate, https, CRASHES, "--header", f"X-Backfeedr-Key: {KEY}", "--data-binary", "@-", *options,
                    stdin=body)

    status, answer = post(json.dumps(CRASH))
    assert (status, sql(server.db, "select id from crashes")) == (201, [(json.loads(answer)["id"],)])
    large = json.dumps(dict(CRASH, note="x" * 1_040_000))
    assert post(large)[0] == 201
    assert post(large + " " * 10_000) == (413, '{"error": "request body too large"}'), "by the server"
    assert post(large * 2)[0] in (413, 502, 0), "by the proxy"
    stopped = post('{"exception_type": ', "--header", "Content-Length: 1000", "--max-time", "2")
    assert not 200 <= stopped[0] < 400, "half a report must not look stored"
    status, headers, _ = ask(f"http://127.0.0.1:{http}" + CRASHES)
    assert status in (301, 308) and headers["Location"].startswith("https://")
    assert sql(server.db, "select count(*) from crashes") == [(2,)]
    assert "; secure" in curl(certificate, https, "/sign-in", "--dump-header", "-", "--data", SIGN_IN)[1].lower()
    assert server.stop() == (0, "", "")
    assert curl(certificate, https, "/api/v1/health")[0] == 502
    for port in (http, https):
        send_malformed(port)


def https_nginx(folder, server, http, https, *changes):
    """nginx with its own certificate, cert.pem, in front of a server; see `nginx`."""
    bash("openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -keyout key.pem"
         " -out cert.pem -subj /CN=crashes.example.com -addext subjectAltName=DNS:crashes.example.com", folder)
    certificates = "/etc/letsencrypt/live/crashes.example.com"
    return nginx(folder, "nginx.conf", http, ("listen 443 ssl;", f"listen 127.0.0.1:{https} ssl;"),
                 (f"{certificates}/fullchain.pem", f"{folder}/cert.pem"),
                 (f"{certificates}/privkey.pem", f"{folder}/key.pem"), *changes,
                 ("127.0.0.1:8080", f"127.0.0.1:{server.port}"))


@pytest.mark.once
def test_reports_pass_through_nginx(run, tmp_path):
    needs("nginx", "openssl", "curl")
    server, https, http = run(), free_port(), free_port()
    with https_nginx(tmp_path, server, http, https, ("body_timeout 10s", "body_timeout 1s")):
        check_proxy(server, tmp_path / "cert.pem", https, http)
    assert (tmp_path / "access.log").read_text() == ""
    assert "client" not in (tmp_path / "error.log").read_text(), "no address is logged"


@pytest.mark.once
def test_a_browser_signs_in_creates_an_app_and_signs_out_behind_nginx_under_a_path(run, tmp_path):
    """nginx strips the path /crashes, as the comment in nginx.conf says."""
    needs("chromium", "nginx", "openssl", "curl")
    options, https = ("--host-resolver-rules=MAP crashes.example.com 127.0.0.1", "--no-proxy-server"), free_port()
    url = f"https://crashes.example.com:{https}/crashes"
    server, line = run(BACKFEEDR_PUBLIC_URL=url), "proxy_pass http://127.0.0.1:8080"
    lines = re.sub("\n# *", " ", (EXAMPLES / "deploy/nginx.conf").read_text())
    assert f"`location /crashes/ {{` and `{line}/;`" in lines
    with https_nginx(tmp_path, server, free_port(), https, ("    location / {", "    location /crashes/ {"),
                     (f"        {line};", f"        {line}/;")), \
            closing(Browser(tmp_path / "profile", *options)) as browser:
        def check_page(title, address, script):
            """A script loads this page without errors. All links and requests are under the path."""
            browser.load("Runtime.evaluate", expression=script)
            assert browser.run("[document.title, location.href]") == [title + " - backfeedr", url + address]
            requests = [event["request"]["url"] for event in browser.seen("Network.requestWillBeSent")]
            links = browser.run("""[...document.querySelectorAll("[href], [action]")].map(
                each => new URL(each.getAttribute("href") || each.getAttribute("action"), location).href)""")
            assert requests and links
            assert all((each + "/").startswith((url + "/", "data:")) for each in requests + links)
            assert not any(map(browser.seen, ("Log.entryAdded", "Runtime.exceptionThrown")))

        def click(selector):
            return f"document.querySelector('{selector}').click()"

        browser.call("Security.setIgnoreCertificateErrors", ignore=True)
        check_page("Sign in", "/sign-in?next=%2F", f"location = '{url}'")
        wait_until(lambda: browser.run("document.activeElement.id") == "token")
        browser.call("Input.insertText", text=TOKEN)
        check_page("Overview", "/", click("main button"))
        cookie, = browser.call("Network.getCookies", urls=[url + "/"])["cookies"]
        flags = [cookie.get(name) for name in ("secure", "httpOnly", "sameSite", "path", "domain")]
        assert flags == [True, True, "Lax", "/crashes/", "crashes.example.com"]
        for path, title in backfeedr._NAVIGATION:
            check_page(title, path, click(f'nav a[href="/crashes{path}"]'))
            if path == "/usage":
                check_page("Events", "/events", click('main a[href="/crashes/events"]'))
        browser.run("document.querySelector('[name=name][required]').focus()")
        browser.call("Input.insertText", text="My App")
        check_page("Apps", "/apps", click("form:has([name=test]) button"))
        key = browser.run("document.querySelector('.key').textContent")
        assert f"{url}{CRASHES}" in browser.run("document.querySelector('.hint pre').textContent")
        assert curl(tmp_path / "cert.pem", https, "/crashes" + CRASHES, "--header", f"X-Backfeedr-Key: {key}",
                    "--data", json.dumps(CRASH))[0] == 201
        check_page("Overview", "/", click(".brand"))

        check_page("Sign in", "/sign-in", click("header form button"))
        check_page("Sign in", "/sign-in?next=%2F", "history.back()")
    assert server.stop() == (0, "", "")


@pytest.mark.once
def test_reports_pass_through_caddy(run, tmp_path):
    needs("caddy", "curl")
    server, https, http, health = run(), free_port(), free_port(), "/api/v1/health"
    is_old = " 2.6" in " " + bash("caddy version", tmp_path).lstrip("v")
    config = edited("Caddyfile", tmp_path, ("\tservers", f"\thttp_port {http}\n\thttps_port {https}\n"
                                            "\tadmin off\n\tskip_install_trust\n\tservers"),
                    ("crashes.example.com {", "crashes.example.com {\n\ttls internal"),
                    ("127.0.0.1:8080", f"127.0.0.1:{server.port}"),
                    ("\tbuffer_requests", "\tbuffer_requests" if is_old else "\trequest_buffers 1100KB"))
    environ = dict.fromkeys(("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"), str(tmp_path))
    root = tmp_path / "caddy" / "pki" / "authorities" / "local" / "root.crt"  # made a little after the start
    with running("caddy", "run", "--adapter", "caddyfile", "--config", config, cwd=tmp_path, **environ) as process:
        assert curl(root, https, health, "--retry", "20", "--retry-delay", "1", "--retry-all-errors")[0] == 200
        check_proxy(server, root, https, http)
        process.terminate()
        log = process.stdout.read()
    assert [word for word in ("remote_ip", "POST", "connection refused", "127.0.0.1") if word in log] == [], \
        "no address is logged"


@pytest.mark.once
def test_the_systemd_unit_is_valid_and_hardened_and_waits_for_a_stop():
    needs("systemd-analyze")
    unit = EXAMPLES / "deploy" / "backfeedr.service"
    assert bash(f"systemd-analyze verify {unit} 2>&1 | grep -F backfeedr.service || true", HERE) == ""
    security, text = bash(f"systemd-analyze security --offline=yes --no-pager {unit}", HERE), unit.read_text()
    assert float(re.search("Overall exposure level for backfeedr.service: ([0-9.]+) ", security)[1]) < 2
    assert int(re.search("^TimeoutStopSec=([0-9]+)$", text, re.M)[1]) > 10
    assert {*re.findall("BACKFEEDR_[A-Z_]+", text)} <= DEFAULTS.keys()
    for name, value in re.findall("^Environment=(.*?)=(.*)", text, re.M):
        assert Settings.from_env({name: value}) != Settings(), name


@pytest.mark.once
def test_the_steps_of_the_dockerfile_start_a_server_as_an_unprivileged_user(pip):
    """Runs the lines of the Dockerfile in a folder instead of an image, and if this is root, as the user they name."""
    user, python = [], sys.executable
    if os.geteuid() == 0:
        needs("setpriv")
        user = ["setpriv", "--reuid=10001", "--regid=10001", "--clear-groups"]
        if run_program(*user, "bash", "-c", f"{python} -V")[0]:
            python = "/usr/bin/python3"  # that of the tests is in a folder of root
    with tempfile.TemporaryDirectory(prefix="backfeedr-container-") as name:
        root, programs = Path(name), Path(name, "bin")
        root.chmod(0o755)
        text = re.sub(r"(?<=[ =\"])(?=/(app|data)\b)", name, (EXAMPLES / "deploy/Dockerfile").read_text())
        words, (base, install, copy, prepare, owner, place, volume, variables, port, health, start) = zip(
            *re.findall("^([A-Z]+) (.*)$", text, re.M))
        assert " ".join(words) == "FROM RUN COPY RUN USER WORKDIR VOLUME ENV EXPOSE HEALTHCHECK CMD"
        assert (base, owner, port, place, volume) == (
            "python:3.13-slim", "10001:10001", "8080", f"{root}/app", f"{root}/data")
        programs.mkdir()
        (programs / "python").symlink_to(python)
        (programs / "pip").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pip "$@" --quiet --target {root}/site\n')
        (programs / "pip").chmod(0o755)
        environ = {**pip, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": f"{root}/site",
                   **dict(each.split("=") for each in variables.split())}
        assert {name for name in environ if name.startswith("BACKFEEDR_")} <= DEFAULTS.keys()
        *files, folder = copy.split()
        Path(folder).mkdir()
        for file in files:
            shutil.copy(SERVER if file == SERVER.name else HERE / file, folder)
        for step in (install, prepare if user else prepare.replace("-o 10001 -g 10001 ", "")):
            assert run_program("bash", "-ec", step, cwd=root, **environ)[0] == 0, step
        environ.update(SECRETS, BACKFEEDR_HOST="127.0.0.1", BACKFEEDR_PORT=str(free_port()))
        check_health = [*user, "bash", "-c", health.partition(" CMD ")[2]]
        status, _, err = run_program(*check_health, **environ)
        assert status == 1 and "Connection refused" in err, (status, err)  # before it has started
        with running(*user, *json.loads(start), cwd=place, **environ) as process:
            url = printed(process, URL)[0]
            assert run_program(*check_health, **environ) == (0, "", "")
            check_stores_a_crash(url, root / "data/backfeedr.db")
            process.terminate()
            assert process.wait(20) == 0
        owners = {path.stat().st_uid for path in [root / "data", *(root / "data").iterdir()]}
        assert owners == {10001 if user else os.getuid()} and (root / "data").stat().st_mode & 0o777 == 0o700
        assert run_program(*user, "test", "-w", root / "app")[0] == (1 if user else 0)


def test_the_compose_file_builds_the_container_and_keeps_its_volume_and_each_file_sets_the_public_url():
    deploy = EXAMPLES / "deploy"
    texts = {path.name: path.read_text() for path in deploy.iterdir()}
    compose, dockerfile = texts["compose.yaml"], texts["Dockerfile"]
    context, build = re.findall("(?:context|dockerfile): (.*)", compose)
    assert (deploy / context / build).resolve() == (deploy / "Dockerfile").resolve()
    (volume,), (port,) = (re.findall(f"^{word} (.*)$", dockerfile, re.M) for word in ("VOLUME", "EXPOSE"))
    assert f"- data:{volume}\n" in compose and f'- "127.0.0.1:{port}:{port}"' in compose
    assert [name for name in texts if "BACKFEEDR_PUBLIC_URL=https://crashes.example.com" not in texts[name]] == []


# == PostgreSQL ================================================================
# What examples/postgres.py adds: hosts that share a database. With BACKFEEDR_TEST_POSTGRES,
# the sections above check that it gives the same answers as SQLite.

@pytest.fixture
def database(schemas):
    """The URL of an empty database; skips the test if there is no PostgreSQL."""
    return schemas() if POSTGRES else pytest.skip("BACKFEEDR_TEST_POSTGRES is not set")


@pytest.fixture
def hosts(database, run):
    """Two servers that share a database."""
    return [run(db=database), run(db=database)]


def wait_for_more(load, reports):
    """Waits until this many more reports have been acknowledged."""
    before = len(load.acknowledged)
    wait_until(lambda: len(load.acknowledged) > before + reports, 60)


def check_all_stored(load, url):
    """Every report was acknowledged and is stored, nothing else is stored, and the sums equal the rows."""
    assert (load.lost, load.others) == (0, [])
    assert sorted(load.acknowledged) == sorted(stored_ids(url))
    check_database(url)


def test_two_hosts_store_everything_they_acknowledge_once_even_if_one_is_killed(hosts, run, database):
    one, two = hosts
    first = one.post(CRASHES, CRASH, **{"Idempotency-Key": "a"})
    assert first[0] == 201 and two.post(CRASHES, CRASH, **{"Idempotency-Key": "a"}) == (200, first[1])
    assert two.post(CRASHES, {**CRASH, "locale": "de"}, **{"Idempotency-Key": "a"})[0] == 422
    assert stored_ids(database) == [first[1]["id"]]
    load = Load(hosts, clients=32)
    wait_for_more(load, 1500)
    load.finish()
    load.acknowledged.append(first[1]["id"])
    check_all_stored(load, database)

    before, load = set(load.acknowledged), Load(hosts, clients=16)
    wait_for_more(load, 300)
    one.process.kill()
    wait_for_more(load, 300)
    assert run(db=database).post(CRASHES, CRASH)[0] == 201
    load.finish()
    assert two.stop()[0] == 0
    new = [id for id in stored_ids(database) if id not in before]
    assert load.others == [] and set(load.acknowledged) <= set(new) and len(set(new)) == len(new)
    assert len(new) - len(load.acknowledged) <= 1 + 10 * load.lost
    check_database(database)


def test_the_101st_request_of_a_key_is_refused_by_any_host(database, run):
    hosts = [run(db=database, BACKFEEDR_RATE_LIMIT="100") for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: hosts[n % 2].post(EVENTS, EVENT)[0], range(110)))
    assert Counter(answers) == {201: 100, 429: 10} and len(stored_ids(database)) == 100
    for host in hosts:
        status, headers, _ = ask(host.url + EVENTS, EVENT)
        assert status == 429 and 1 <= int(headers["Retry-After"]) <= 60


@pytest.fixture
def cluster():
    """A PostgreSQL that a test may stop: its URL, and functions that stop and start it."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("there is no initdb")
    folder, port, user = tempfile.mkdtemp(prefix="backfeedr-postgres-"), free_port(), ""
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        shutil.chown(folder, "postgres")
        user = "runuser -u postgres -- "

    def run_as_user(program, options):
        bash(f"{user}{programs[-1]}/{program} -D {folder}/data {options}", folder)

    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
    made = SimpleNamespace(url=f"postgresql://postgres@127.0.0.1:{port}/postgres",
                           start=lambda: run_as_user("pg_ctl", f"start -w -l {folder}/log -o '{options}'"),
                           stop=lambda: run_as_user("pg_ctl", "stop -m immediate"))
    try:
        run_as_user("initdb", "-A trust -E UTF8 --locale=C.UTF-8 -U postgres --no-sync")
        made.start()
        yield made
        made.stop()
    finally:
        shutil.rmtree(folder)


@needs_postgres
def test_a_database_restart_under_load_loses_nothing_and_the_hosts_recover_by_themselves(run, cluster):
    hosts = [run(db=cluster.url), run(db=cluster.url, BACKFEEDR_RATE_LIMIT="1000000")]
    load = Load(hosts, clients=16)
    wait_for_more(load, 300)
    cluster.stop()
    with ThreadPoolExecutor() as pool:
        health_of_pairs = [pool.submit(ask, host.url + "/api/v1/health") for host in hosts]
        for status, headers, body in pool.map(lambda host: ask(host.url + EVENTS, EVENT), hosts):
            assert (status, json.loads(body), headers["Retry-After"]) == (*UNAVAILABLE, "2")
    assert [each.result()[0] for each in health_of_pairs] == [503, 503]
    cluster.start()
    wait_for_more(load, 300)
    load.finish()
    assert [ask(host.url + "/api/v1/health")[0] for host in hosts] == [200, 200]
    assert load.lost == 0 and {status for status, _ in load.others} == {503}
    assert set(load.acknowledged) <= set(stored_ids(cluster.url))
    check_database(cluster.url)


def test_lost_connections_fail_no_request(database, serve, monkeypatch):
    monkeypatch.setitem(postgres()._OPTIONS, "application_name", "to-be-lost")
    server = serve(rate_limit=1000)

    def end_connections():
        return sql(database, """
            select count(pg_terminate_backend(pid)) from pg_stat_activity
            where pid <> pg_backend_pid() and application_name = 'to-be-lost'""")[0][0]

    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(server.store.reading())
    assert server._limiter.allow(KEY_HASH) and end_connections() >= 6
    wait_until(lambda: end_connections() == 0)
    assert Api(server).post(CRASHES, CRASH)[0] == 201
    for _ in range(5):
        assert server._limiter.allow(KEY_HASH) and server.store.apps()


def test_a_lock_of_another_program_makes_no_host_unhealthy(database, serve, monkeypatch):
    monkeypatch.setattr(postgres(), "_SESSION", postgres()._SESSION.replace("5s", "100ms"))
    api = Api(serve())
    with closing(postgres().Connection.connect(database)) as db:
        db.run("begin; select 1 from apps for update")
        assert [api.post(CRASHES, CRASH), api.get("/api/v1/health")[0]] == [UNAVAILABLE, 200]


@needs_postgres
@pytest.mark.parametrize("table", ["apps", "groups", "sessions"])
def test_a_schema_with_tables_of_another_program_is_refused_unchanged(schemas, table):
    sql_run(schemas(has_tables=False), f"create table {table} (id bigint)")
    sql_run(schemas(), "create table another (id bigint)")
    with pytest.raises(StoreError, match=f'^cannot open the database: relation "{table}" already exists$'):
        postgres().PostgresStore(schemas())
    assert sql(schemas(), """
        select relname from pg_class where relnamespace = current_schema()::regnamespace order by 1
        """) == [("another",), (table,)]


def test_a_rolling_restart_behind_the_balancer_is_not_noticed_and_a_lost_host_loses_only_requests_it_was_reading(
        hosts, run, database, tmp_path):
    needs("nginx")
    balancer = object.__new__(Running)  # without a process of its own
    balancer.port = free_port()
    with nginx(tmp_path, "two-hosts.nginx.conf", free_port(), ("listen 443 ssl;", f"listen 127.0.0.1:{balancer.port};"),
               ("    ssl_certificate ", "    #"), ("    ssl_certificate_key ", "    #"),
               *((f"10.0.0.1{number}:8080", f"127.0.0.1:{host.port}") for number, host in enumerate(hosts, 1))):
        load = Load([balancer], clients=16)

        def all_take_reports():
            metrics = [ask(host.url + "/metrics", Authorization="Bearer " + TOKEN)[2] for host in hosts]
            return all('method="POST"' in each for each in metrics)

        for number, host in enumerate(hosts):
            wait_until(all_take_reports, 60)
            assert host.stop() == (0, "", "")
            wait_for_more(load, 300)
            hosts[number] = run("--port", str(host.port), db=database)
        wait_until(all_take_reports, 60)
        load.finish()
        check_all_stored(load, database)

        before, load = set(load.acknowledged), Load([balancer], clients=16)
        wait_for_more(load, 300)
        hosts[0].process.kill()
        wait_for_more(load, 300)
        load.finish()
        assert load.lost == 0 and [each for each in load.others if each != UNAVAILABLE] == [] and len(load.others) <= 16
        found = set(stored_ids(database)) - before
        assert set(load.acknowledged) <= found and len(found) - len(load.acknowledged) <= 10 * len(load.others)
        hosts[1].stop()
        status, headers, body = ask(f"http://127.0.0.1:{balancer.port}{CRASHES}", CRASH)
        assert (status, json.loads(body)) == UNAVAILABLE
        assert (headers["Retry-After"], headers["Content-Type"]) == ("2", "application/json")
        run("--port", str(hosts[1].port), db=database)
        wait_until(lambda: balancer.post(CRASHES, CRASH)[0] == 201, 60)


@needs_postgres
def test_hosts_that_start_together_make_one_database(schemas):
    url = schemas(has_tables=False)
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: postgres().PostgresStore(url), range(4)))
        made = list(pool.map(lambda store: store.start(), stores))
    for store in stores:
        store.close()
    assert sum(key is not None for key, _ in made) == 1
    assert sql(url, "select name from apps") == [("default",)]


def test_hosts_that_prune_together_while_reports_arrive_delete_each_row_once(serve, clock, database):
    server = serve(retention_days=1, rate_limit=0)
    old = [parse_event(dict(EVENT, session_id=f"s{n % 50}", device_id_hash=f"d{n % 70}")) for n in range(600)]
    for reports in (old, old, [parse_crash(dict(CRASH, device_id_hash=f"d{n}")) for n in range(300)]):
        server.store.add(KEY_HASH, reports)
    clock.move(A_DAY + 1)
    new = [parse_event(dict(EVENT, device_id_hash="new"))]
    with closing(postgres().PostgresStore(database, clock, 1)) as other, ThreadPoolExecutor(4) as pool:
        pruning = [pool.submit(store.prune) for store in (server.store, other)]
        adding = [pool.submit(store.add, KEY_HASH, new) for store in (server.store, other) * 20]
        seqs = {each.result().seqs[0] for each in adding}
        deleted = sum((each.result() for each in pruning), Counter())
    assert {seq for seq, in sql(database, "select seq from events")} == seqs and count(server, "crashes") == 0
    assert deleted["events"] <= 1200 and deleted["crashes"] <= 300, "adding deletes some, too"
    serve.unchecked.append(server)  # its sums still include the deleted rows
    assert sql(database, "select device from devices") == [(backfeedr.device_key("new"),)]
    assert count(server, "sessions") == 0


def test_export_and_import_move_a_file_to_postgres_with_ids_and_counts(tmp_path, clock, database, capsys, monkeypatch):
    path, lines = str(tmp_path / "old.db"), tmp_path / "all.jsonl"
    with Backfeedr(Settings(db_path=path, api_key=KEY, auth_token=TOKEN), clock=clock) as server:
        fill(server, clock, 1, 300)
        with open(lines, "w", encoding="utf-8") as out:
            for kind in (backfeedr.Crash, backfeedr.Event):
                for stored in server.store.export(kind):
                    backfeedr.write_jsonl(out, stored)
        # At the same time, because the sums of the week depend on it.
        with closing(postgres().PostgresStore(database, clock)) as store, open(lines, "rb") as given:
            assert backfeedr.import_jsonl(store, given)["stored"] == len(stored_ids(path))
        with Backfeedr(server.settings, store=postgres().PostgresStore(database, clock)) as moved:
            assert answers(moved) == answers(server)
        assert sorted(stored_ids(database)) == sorted(stored_ids(path))
    check_database(database)
    monkeypatch.setenv("BACKFEEDR_RETENTION_DAYS", "0")
    assert postgres().main([database, "import", str(lines)]) == 0
    assert capsys.readouterr().err.startswith(f"Stored 0 reports; {len(stored_ids(path)):,} were here already")


def test_a_report_of_the_longest_texts_in_the_widest_characters_is_stored(database, serve):
    server, dice = serve(), random.Random(1)
    wide = {name: "".join(chr(dice.randrange(0x10000, 0x1ffff)) for _ in range(500)) for name in (
        "exception_type", "app_version", "os_version", "device_model", "device_id_hash", "locale")}
    assert Api(server).post(CRASHES, {**CRASH, **wide})[0] == 201
    assert {name: report(server)[name] for name in wide} == wide


def test_hosts_give_no_id_twice_even_if_a_clock_is_days_ahead_and_all_reports_are_deleted(database, monkeypatch):
    monkeypatch.setattr("secrets.randbits", lambda bits: 0)  # so that equal times would give equal ids
    clocks, given = (Clock(), Clock()), []
    stores = [postgres().PostgresStore(database, clock) for clock in clocks]
    stores[0].start(KEY)
    for number, (host, days) in enumerate([
            (0, 0), (1, 0), (0, 3), (1, 0), (0, 3), (1, 3), (0, 0), (1, 3), (0, -40), (1, 3), (0, 0), (1, 3), (0, 5)]):
        clocks[host].seconds = Clock().seconds + days * 86400 + (0 if days else number / 1000)
        for _ in range(2):
            given += stores[host].add(KEY_HASH, [parse_event(EVENT)] * 3).seqs
            first = backfeedr.seq_at(stores[host].now)
            assert first <= given[-3] < given[-1] < first + backfeedr.seq_at(2), "an id tells the time of receipt"
        sql_run(database, "delete from events")
    for store in stores:
        store.close()
    assert len(given) == len(set(given)) == 78


def test_a_report_that_the_database_refuses_loses_no_other_and_health_checks_for_space(database, api):
    def add_together():
        together = [backfeedr.Submission(KEY_HASH, [parse_event({**EVENT, "name": name})])
                    for name in ("good", "poison", "too")]
        api.server.store.add_all(together)
        return [each.error and str(each.error) for each in together], count(api.server, "events")

    sql_run(database, "alter table events add constraint harmless check (name <> 'poison')")
    assert add_together() == ([None, "storage unavailable", None], 2) and api.get("/api/v1/health")[0] == 200
    sql_run(database, """
        create function no_room() returns trigger language plpgsql as
            $$ begin raise exception 'no room' using errcode = 'disk_full'; end $$;
        create trigger no_room before insert on events execute function no_room();
        create table trial (at bigint)""")
    assert add_together() == (["storage unavailable"] * 3, 2)
    for _ in range(2):  # the trial of the health check also fails
        assert api.get("/api/v1/health") == UNAVAILABLE
    sql_run(database, "drop table trial")
    assert [api.get("/api/v1/health")[0] for _ in range(2)] == [200, 200]
    assert sql(database, "select to_regclass('trial')") == [(None,)]


def test_postgres_refuses_what_names_a_file(database, capsys):
    for words in ("backup x", "check", "--db x", "app list --d x", "app delete default --yes --db=x"):
        with pytest.raises(SystemExit, match="2"):
            postgres().main([database, *words.split()])
        assert " is for SQLite's file; " in capsys.readouterr().err, words


@needs_postgres
@pytest.mark.parametrize("arguments, settings, problem", [
    (["--port", "0"], {}, "cannot open the database: *"), (["app", "list"], {}, "cannot open the database: *"),
    (["--port", "0"], {"BACKFEEDR_MAX_DB_SIZE": "1000000000"},
     "BACKFEEDR_MAX_DB_SIZE is for SQLite's file: unset it, and limit the database")])
def test_postgres_prints_one_line_if_it_cannot_start(capsys, monkeypatch, arguments, settings, problem):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    status = postgres().main(["postgresql://127.0.0.1:1/none", *arguments])
    check_one_line((status, *capsys.readouterr()), "backfeedr: " + problem)
