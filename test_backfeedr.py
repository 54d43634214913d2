"""Tests of backfeedr, in the order of its sections.

Each asserts the answer and what is stored. Time is a `Clock` moved by hand. Every
server made by `serve` is checked when its test ends: each roll-up must equal a
count over the rows, made in plain Python.
"""

from __future__ import annotations

import argparse
import base64
import csv
import dataclasses
import fnmatch
import gc
import gzip
import hashlib
import html
import http.client
import importlib.util
import io
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import stat
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import weakref
import zipfile
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import date, datetime, timezone
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction
from functools import lru_cache
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlencode, urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import pytest
import webtest

import backfeedr
from backfeedr import (DAY, HOUR, Backfeedr, Idempotency, RateLimiter, Refusal, Settings, SettingsError, Store,
                       StorageUnavailable, StoreError, group_hash, main, parse_crash, parse_event, parse_time)

HERE = Path(__file__).parent
EXAMPLES = HERE / "examples"
SERVER = Path(backfeedr.__file__)  # of a wheel, where that is tested
KEY = "bf_live_0123456789abcdef0123456789abcdef"
TOKEN = "bf_admin_0123456789abcdef0123456789abcdef"
NOW = "2026-03-12T14:30:00Z"  # a Thursday
CRASH = {"exception_type": "SIGABRT", "occurred_at": "2026-03-12T14:22:31Z"}
EVENT = {"type": "custom", "name": "purchase", "occurred_at": "2026-03-12T14:22:31Z"}
CRASHES, EVENTS, BATCH = "/api/v1/crashes", "/api/v1/events", "/api/v1/events/batch"
METRICS = ["/api/v1/metrics/daily-crashes", "/api/v1/metrics/crash-types", "/api/v1/metrics/devices",
           "/api/v1/overview", "/api/v1/metrics/active-devices", "/api/v1/metrics/sessions",
           "/api/v1/metrics/retention", "/api/v1/releases"]
REPORT_TABLES = ["crashes", "events", *backfeedr.KEYS]


class Clock:
    """Seconds since 1970 that stand still until they are moved."""

    def __init__(self, at=NOW):
        self.seconds = parse_time(at) / 1000

    def __call__(self):
        return self.seconds

    def move(self, seconds):
        self.seconds += seconds


class Api:
    """A client of one server that is called directly, without a socket."""

    def __init__(self, server, prefix=""):
        self.server, self.prefix = server, prefix
        self.web = webtest.TestApp(server)

    def post(self, path, body, key=KEY, **headers):
        """The status and the JSON of the answer to a body: an object, or bytes as they are."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if key is not None:
            given["X-Backfeedr-Key"] = key
        answer = self.web.post(self.prefix + path, raw, given, content_type="application/json", expect_errors=True)
        assert answer.content_type == "application/json"
        self.headers = answer.headers
        return answer.status_int, answer.json

    def get(self, path, **headers):
        answer = self.web.get(self.prefix + path, headers=headers, expect_errors=True)
        assert answer.content_type == "application/json"
        self.headers = answer.headers
        return answer.status_int, answer.json

    def signed(self, path, body, timestamp, key=KEY, **headers):
        signature = backfeedr.sign(key.encode(), timestamp.encode(), body)
        return self.post(path, body, key, X_Backfeedr_Timestamp=timestamp, X_Backfeedr_Signature=signature, **headers)


@pytest.fixture
def clock():
    return Clock()


# A database of PostgreSQL that is there for tests. With it, the servers of `serve` are on it, each in a schema
# of its own; tests of what is SQLite's, or of a file, ask for `sqlite_only` and are skipped.
POSTGRES = os.environ.pop("BACKFEEDR_TEST_POSTGRES", "")
needs_postgres = pytest.mark.skipif(not POSTGRES, reason="BACKFEEDR_TEST_POSTGRES names no database")
sqlite_only = pytest.mark.skipif(bool(POSTGRES), reason="is about SQLite and its file; runs without a PostgreSQL")


@lru_cache(maxsize=None)
def postgres():
    """The module examples/postgres.py."""
    return load_example("postgres")


@pytest.fixture
def schemas():
    """The URL of a schema by its name: made when it is first asked for, and gone at the end."""
    made = {}

    def url(name="test.db"):
        if name not in made:
            schema = f"t{len(made)}_{os.urandom(6).hex()}"
            with closing(postgres().Connection.connect(POSTGRES)) as db:
                db.run(f"create schema {schema}")
            made[name] = f"{POSTGRES}?options=-csearch_path%3D{schema}"
        return made[name]

    yield url
    for each in made.values():
        with closing(postgres().Connection.connect(POSTGRES)) as db:
            db.run(f"drop schema {each.rpartition('%3D')[2]} cascade")


@pytest.fixture
def serve(tmp_path, clock, schemas):
    """Makes servers; at the end, compares their roll-ups with their rows."""
    servers = []

    def make(name="test.db", **settings):
        """A server with a key and a token."""
        given = {"db_path": str(tmp_path / name), "api_key": KEY, "auth_token": TOKEN, **settings}
        limit = given.get("rate_limit", 100)
        store = POSTGRES and postgres().PostgresStore(schemas(name), clock, given.get("retention_days", 90))
        limiter = postgres().PostgresLimiter(store, limit, clock=clock) if store else RateLimiter(limit, clock=clock)
        server = Backfeedr(Settings(**given), clock=clock, store=store or None, limiter=limiter)
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
def api(serve):
    return Api(serve())


def sql(path, query, *values):
    """The rows of a query on a database, by another connection than the server's."""
    with connected(path) as db:
        return db.execute(query, values).fetchall()


@contextmanager
def connected(path):
    """A connection to a file of SQLite, or to PostgreSQL where this is a URL. What it changes is kept."""
    if str(path).startswith("postgresql:"):
        with closing(postgres().Connection.connect(path)) as db:
            yield db
    else:
        with closing(sqlite3.connect(str(path))) as db, db:
            yield db


def content_of(path):
    """All bytes of a database: of its file, or of the values in its tables."""
    if not POSTGRES:
        return path.read_bytes()
    return b"\n".join(value if isinstance(value, bytes) else str(value).encode()
                      for table in ("apps", "keys", "secrets", "grants", *REPORT_TABLES)
                      for row in sql(path, f"select * from {table}") for value in row)


def sql_run(path, statement):
    with connected(path) as db:
        db.execute(statement)


def time_text(seconds):
    """RFC 3339 of seconds since 1970."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def stored(server, *tables):
    """All that is stored of reports."""
    found = {table: sql(server.store.path, f"select * from {table}") for table in tables or REPORT_TABLES}
    # PostgreSQL gives rows in any order.
    return {table: sorted(rows, key=repr) for table, rows in found.items()} if POSTGRES else found


def report(server, table="crashes"):
    """The one stored report of a table, by column."""
    row, = rows_by_name(server.store.path, f"select * from {table}")
    return row


def rows_by_name(path, query):
    with connected(path) as db:
        return backfeedr.dict_rows(db, query)


def check_database(path, forgotten=False):
    """The file is sound, and each figure equals a slow and obvious computation over the rows.

    Where a device was forgotten, but for the times of what it was the first or last to report.
    """
    assert POSTGRES or sql(path, "pragma integrity_check") == [("ok",)]
    expected, found = recount(path), figures(path)
    if forgotten:
        for tables in expected, found:
            tables["releases"] = {}
            tables["groups"] = {key: (*row[:2], *row[3:]) for key, row in tables["groups"].items()}
    for table in expected:
        assert found[table] == expected[table], table
    assert POSTGRES or backfeedr._look_at_roll_ups(Path(path).absolute()), "and `check` sees it so"


def windows(path):
    """Of tables that hold a window only, the first day or hour of it."""
    newest = sql(path, """
        select max(at) from (select received_at as at from crashes union all select received_at from events union all
            select (value + 1) * 86400000 from state where name = 'trimmed_day') as times""")[0][0] or 0
    return dict(group_days=newest // DAY - 7, release_days=newest // DAY - 7, durations=newest // DAY - 400,
                device_hours=newest // HOUR - 48)


def figures(path):
    """What is stored beside the reports, each table by its key; without sums of 0, and without what is too old."""
    tables, since = {}, windows(path)
    for table, key in backfeedr.KEYS.items():
        rows = {row[:len(key)]: row[len(key):] for row in sql(path, f"select {', '.join(key)}, {table}.* from {table}")}
        tables[table] = {found: row[len(key):] for found, row in rows.items()
                         if found[1] >= since.get(table, found[1])}
    tables["devices"] = {key: row[:2] for key, row in tables["devices"].items()}
    return tables


def recount(path):
    """What `figures` must find, from the reports alone."""
    tables = {table: defaultdict(Counter) for table in backfeedr.KEYS if table not in ("replays", "new_names", "medians")}
    columns = dict(
        crash_days=("crashes",), labels=("crashes",), group_days=("crashes",), release_days=("sessions",),
        release_sums=("sessions", "crashes", "devices", "crashed"), device_hours=("devices",),
        session_days=("sessions", "ended", "ms"), durations=("sessions",), active_days=("dau", "wau", "mau"),
        cohorts=("devices", "back_1", "back_7", "back_30"))
    crashes, events = rows_of_table(path, "crashes"), rows_of_table(path, "events")
    for row in crashes:
        app, day = row["app_id"], row["at"] // DAY
        tables["crash_days"][app, day]["crashes"] += 1
        tables["group_days"][app, day, row["group_hash"]]["crashes"] += 1
        for field in ("exception_type", "device_model"):
            for each in (-1_000_000, day) if row[field] else ():
                tables["labels"][app, field, each, row[field]]["crashes"] += 1
        if row["app_version"]:
            tables["release_sums"][app, row["app_version"]]["crashes"] += 1
    for key, rows in grouped(crashes, "app_id", "group_hash").items():
        latest, times = max(rows, key=lambda row: (row["at"], row["seq"])), [row["at"] for row in rows]
        name = "(other)" if key[1] == "(other)" else latest["sent_type"]
        tables["groups"][key] = name, latest["exception_reason"], min(times), max(times)
    reports = sorted(crashes + events, key=lambda row: row["seq"])
    for key, rows in grouped(reports, "app_id", "app_version").items():
        times = [row["received_at"] for row in rows]
        tables["releases"][key] = min(times), max(times)
    recount_sessions(tables, events)
    recount_devices(tables, reports)
    since = windows(path)
    found = {table: {key: tuple(row[name] for name in columns[table]) if table in columns else row
                     for key, row in rows.items() if key[1] >= since.get(table, key[1])}
             for table, rows in tables.items()}
    return found


def recount_sessions(tables, events):
    for row in events:
        row["device"] = backfeedr.device_key(row["device_id_hash"])
        if row["type"] == "session_start" and not row["session_id"]:
            count_session(tables, row, None)
    for key, rows in grouped(events, "app_id", "session_id", "device").items():
        starts = [row for row in rows if row["type"] == "session_start"]
        start = min(starts, key=lambda row: (row["at"], row["seq"])) if starts else None
        end = max((row["at"] for row in rows if row["type"] == "session_end"), default=None)
        tables["sessions"][key] = (
            rows[0]["seq"], rows[-1]["seq"], start and start["at"], end, start and start["app_version"])
        if start:
            count_session(tables, start, end)


def count_session(tables, start, end):
    app, at, version = start["app_id"], start["at"], start["app_version"]
    if version:
        tables["release_sums"][app, version]["sessions"] += 1
        tables["release_days"][app, at // DAY, version]["sessions"] += 1
    tables["session_days"][app, at // DAY]["sessions"] += 1
    if end is not None and 0 <= end - at <= DAY:
        tables["session_days"][app, at // DAY].update(ended=1, ms=end - at)
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
            crashed = int(any("exception_type" in row for row in rows if row["app_version"] == version))
            tables["device_versions"][(*key, version)] = (crashed,)
            tables["release_sums"][app, version].update(devices=1, crashed=crashed)


def two_digits(ms):
    """A duration in whole seconds, from 100 s on in two significant digits; halves go up."""
    seconds = Decimal(ms) / 1000
    digits = len(str(int(seconds)))
    return int(seconds.scaleb(-max(0, digits - 2)).to_integral_value(ROUND_HALF_UP).scaleb(max(0, digits - 2)))


def rows_of_table(path, table):
    """The reports as they count: each with its time, and without the names that are beyond the day's limit."""
    rows = rows_by_name(path, f"select * from {table} order by seq")
    for row in rows:
        is_believed = 1_167_609_600_000 <= row["occurred_at"] <= row["received_at"] + 300_000
        row["at"] = row["occurred_at"] if is_believed else row["received_at"]
        row["sent_type"] = row.get("exception_type")
        for name, flag in backfeedr.FLAGS.items():
            if row["other"] & flag:
                row[name] = "(other)"
    return rows


def grouped(rows, *names):
    """The rows by what they have in these columns; those that have nothing there belong to no group."""
    groups = defaultdict(list)
    for row in rows:
        if all(row[name] is not None for name in names):
            groups[tuple(row[name] for name in names)].append(row)
    return groups


# == Settings ==================================================================

def test_defaults_are_those_of_the_contract():
    assert Settings() == Settings(
        host="127.0.0.1", port=8080, db_path="backfeedr.db", api_key="", auth_token="", rate_limit=100,
        max_body_size=1048576, retention_days=90, require_signature=False, public_metrics=True, threads=32,
        public_url="", verbose=False)


def test_every_setting_is_read_from_its_variable():
    assert Settings.from_env({
        "BACKFEEDR_HOST": "0.0.0.0", "BACKFEEDR_PORT": "0", "BACKFEEDR_DB_PATH": "/tmp/x.db",
        "BACKFEEDR_API_KEY": "k", "BACKFEEDR_AUTH_TOKEN": "t", "BACKFEEDR_RATE_LIMIT": "0",
        "BACKFEEDR_MAX_BODY_SIZE": "1000", "BACKFEEDR_RETENTION_DAYS": "0", "BACKFEEDR_REQUIRE_SIGNATURE": "1",
        "BACKFEEDR_PUBLIC_METRICS": "no", "BACKFEEDR_THREADS": "4", "BACKFEEDR_VERBOSE": "1",
        "BACKFEEDR_PUBLIC_URL": "https://crashes.example.com:8443/a/",
    }) == Settings("0.0.0.0", 0, "/tmp/x.db", "k", "t", 0, 1000, 0, True, False, 4,
                   "https://crashes.example.com:8443/a/", True)


def test_an_override_goes_before_a_variable_and_an_empty_variable_is_unset():
    environ = {"BACKFEEDR_PORT": "1", "BACKFEEDR_THREADS": ""}
    assert Settings.from_env(environ, port=2) == Settings(port=2)


@pytest.mark.parametrize("variable, text", [
    ("BACKFEEDR_PORT", "http"), ("BACKFEEDR_PORT", "65536"), ("BACKFEEDR_PORT", "-1"), ("BACKFEEDR_PORT", "8080 "),
    ("BACKFEEDR_PORT", "\u0661"), ("BACKFEEDR_PORT", "9" * 30), ("BACKFEEDR_RATE_LIMIT", "-1"),
    ("BACKFEEDR_RATE_LIMIT", "1.5"), ("BACKFEEDR_MAX_BODY_SIZE", "0"), ("BACKFEEDR_RETENTION_DAYS", "-1"),
    ("BACKFEEDR_THREADS", "0"), ("BACKFEEDR_REQUIRE_SIGNATURE", "maybe"), ("BACKFEEDR_PUBLIC_METRICS", "2"),
    ("BACKFEEDR_API_KEY", "key\n"), ("BACKFEEDR_API_KEY", " "), ("BACKFEEDR_AUTH_TOKEN", "a\x00b"),
    ("BACKFEEDR_DB_PATH", ":memory:"), ("BACKFEEDR_VERBOSE", "2"),
    *[("BACKFEEDR_PUBLIC_URL", url) for url in (
        "crashes.example.com", "ftp://example.com", "https://", "https://example.com/a b", "https://example.com/?a=1",
        "https://user:password@example.com", "https://example.com/$(reboot)", "https://exämple.com")],
])
def test_a_value_that_makes_no_sense_is_refused_by_name(variable, text):
    with pytest.raises(SettingsError) as refused:
        Settings.from_env({variable: text})
    assert str(refused.value).startswith(variable + ": ") and "\n" not in str(refused.value)


@pytest.mark.parametrize("change", [{"port": "8080"}, {"port": True}, {"public_metrics": 1}, {"db_path": ""},
                                    {"host": ""}, {"host": None}])
def test_a_python_value_that_makes_no_sense_is_refused_by_name(change):
    with pytest.raises(SettingsError, match=f"^{next(iter(change))}: "):
        Settings(**change)


def test_secrets_are_not_shown_with_the_settings():
    assert "secret" not in repr(Settings(api_key="secret-key", auth_token="secret-token"))


# == Schema ====================================================================

@sqlite_only
def test_the_file_tells_its_kind_and_version(api):
    path = api.server.store.path
    assert sql(path, "pragma application_id") == [(backfeedr.APPLICATION_ID,)]
    assert sql(path, "pragma user_version") == [(backfeedr.SCHEMA_VERSION,)]
    assert sql(path, "pragma journal_mode") == [("wal",)]


@sqlite_only
def test_only_the_owner_can_read_the_file_and_its_side_files(api):
    api.post(CRASHES, CRASH)
    files = list(api.server.store.path.parent.glob("test.db*"))
    assert {file.name for file in files} == {"test.db", "test.db-wal", "test.db-shm"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


@sqlite_only
def test_only_the_owner_can_read_the_file_whatever_the_umask(serve):
    before = os.umask(0)
    try:
        api = Api(serve())
        api.post(CRASHES, CRASH)
    finally:
        os.umask(before)
    files = list(api.server.store.path.parent.glob("test.db*"))
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o600] * 3


@pytest.mark.parametrize("table, example", [("crashes", "crash.json"), ("events", "event.json")])
def test_columns_have_the_field_names_of_the_reference(api, table, example):
    sent = json.loads((EXAMPLES / example).read_bytes())
    status, answer = api.post("/api/v1/" + table, sent)
    row = report(api.server, table)
    assert (status, row["id"]) == (201, answer["id"])
    assert row.pop("occurred_at") == parse_time(sent.pop("occurred_at"))
    for name in ("stack_trace", "properties"):
        if name in sent:
            row[name] = json.loads(row[name])
    assert {name: row[name] for name in sent} == sent
    assert row["received_at"] == parse_time(NOW) and row["extra"] is None


# == Values ====================================================================

@pytest.mark.parametrize("text, expected", [
    ("1970-01-01T00:00:00Z", 0),
    ("2026-03-12T14:22:31Z", 1773325351000),
    ("2026-03-12t14:22:31z", 1773325351000),
    ("2026-03-12T14:22:31.5Z", 1773325351500),
    ("2026-03-12T14:22:31.123456789Z", 1773325351123),
    ("2026-03-12T14:22:31.0009+00:00", 1773325351000),
    ("2026-03-12T15:22:31+01:00", 1773325351000),
    ("2026-03-12T09:52:31-04:30", 1773325351000),
    ("2024-02-29T00:00:00Z", 1709164800000),
    ("0001-01-01T00:00:00+14:00", -62135596800000 - 14 * HOUR),
    ("9999-12-31T23:59:59.999-23:59", 253402300799999 + 24 * HOUR - 60_000),
])
def test_rfc3339_times_are_read_to_the_millisecond(text, expected):
    assert parse_time(text) == expected


@pytest.mark.parametrize("text", [
    "", "2026-03-12", "2026-03-12T14:22:31", "2026-03-12 14:22:31Z", "2026-03-12T14:22Z", "2026-03-12T14:22:31.Z",
    "2026-03-12T14:22:31.1234567890Z", "2026-03-12T14:22:60Z", "2026-03-12T24:00:00Z", "2026-03-12T14:60:00Z",
    "2026-02-30T00:00:00Z", "2025-02-29T00:00:00Z", "0000-01-01T00:00:00Z", "2026-13-01T00:00:00Z",
    "2026-03-12T14:22:31+24:00", "2026-03-12T14:22:31+01:60", "2026-03-12T14:22:31+0100", "2026-W11-4T14:22:31Z",
    "2026-03-12T14:22:31Z\n", " 2026-03-12T14:22:31Z", "２026-03-12T14:22:31Z", "20260312T142231Z", "+2026-03-12T14:22:31Z",
])
def test_other_times_are_refused(text):
    with pytest.raises(ValueError):
        parse_time(text)


def frames(*pairs):
    return [{"frame": n, "symbol": symbol, "file": file, "line": 1} for n, (symbol, file) in enumerate(pairs)]


@pytest.mark.parametrize("kind, trace, expected", [
    ("EXC_BAD_ACCESS", frames(("ContentView.body.getter", "ContentView.swift")), "acc0d2dfe0c1898c"),
    ("SIGABRT", frames(("abort", None), ("A.a", "A.swift"), ("B.b", "B.swift"), ("C.c", "C.swift"), ("D.d", "D.swift")),
     "340a4fe989a59ce6"),
    ("SIGABRT", frames(("abort", None), ("raise", None), ("objc_msgSend", None), ("main", None)),
     hashlib.sha256(b"SIGABRT:abort:raise:objc_msgSend").hexdigest()[:16]),
    ("SIGABRT", frames((None, None), ("raise", None)), hashlib.sha256(b"SIGABRT:raise").hexdigest()[:16]),
    ("SIGABRT", [], hashlib.sha256(b"SIGABRT").hexdigest()[:16]),
    ("SIGABRT", frames((None, None)), hashlib.sha256(b"SIGABRT").hexdigest()[:16]),
])
def test_group_hash(kind, trace, expected):
    assert group_hash(kind, trace) == expected


def test_neither_lines_nor_addresses_change_the_group(api):
    crash = json.loads((EXAMPLES / "crash.json").read_bytes())
    first = api.post(CRASHES, crash)[1]["group_hash"]
    crash["stack_trace"][0].update(line=43, address="0x1000")
    assert api.post(CRASHES, crash)[1]["group_hash"] == first == "acc0d2dfe0c1898c"


def test_keys_have_the_form_of_the_contract_and_show_little():
    assert re.fullmatch("bf_live_[0-9a-f]{32}", backfeedr.new_key(False))
    assert re.fullmatch("bf_test_[0-9a-f]{32}", backfeedr.new_key(True))
    assert backfeedr.key_prefix(KEY) == "bf_live_01234567"
    assert backfeedr.key_prefix("hunter2hunter2") == "hunt"
    assert backfeedr.key_prefix("k") == ""


# == Payloads ==================================================================

def test_nothing_that_was_sent_is_lost(api):
    sent = {**CRASH, "free_disk_mb": 1 << 70, "breadcrumbs": [{"at": 1, "text": "tap"}], "context": {"a": [1, 2.5, None]},
            "id": "mine", "stack_trace": [{"frame": 0, "symbol": "a", "file": None, "line": None, "image": "UIKit"}]}
    assert api.post(CRASHES, sent)[0] == 201
    row = report(api.server)
    assert json.loads(row["extra"]) == {name: sent[name] for name in ("free_disk_mb", "breadcrumbs", "context", "id")}
    assert json.loads(row["stack_trace"]) == sent["stack_trace"]


def test_unknown_fields_of_an_event_and_of_a_batch_are_kept(api):
    api.post(BATCH, {"events": [{**EVENT, "sdk": "1.0"}, EVENT], "sent_at": "now"})
    assert [json.loads(extra) if extra else None for extra, in sql(api.server.store.path, "select extra from events")] \
        == [{"sdk": "1.0", "batch": {"sent_at": "now"}}, None]


@pytest.mark.parametrize("absent", [None, ""])
def test_null_and_the_empty_text_mean_absent(api, absent):
    names = ["exception_reason", "stack_trace", "app_version", "build_number", "os_version", "device_model",
             "device_id_hash", "locale", "free_memory_mb", "battery_level", "is_charging"]
    assert api.post(CRASHES, {**CRASH, **dict.fromkeys(names, absent)})[0] == 201
    assert {report(api.server)[name] for name in names} == {None}
    names = ["name", "properties", "device_id_hash", "session_id", "locale"]
    assert api.post(EVENTS, {**EVENT, "type": "session_start", **dict.fromkeys(names, absent)})[0] == 201
    assert {report(api.server, "events")[name] for name in names} == {None}
    assert stored(api.server, "devices", "sessions") == {"devices": [], "sessions": []}
    assert api.get("/api/v1/overview")[1]["sessions_7d"] == 1


def test_a_character_that_no_database_takes_is_replaced(api):
    body = (b'{"exception_type": "A\\u0000\\ud800B", "exception_reason": "\\ud83d\\ude00", "\\udfff": {"x": ["\\u0000"]},'
            b'"stack_trace": [{"symbol": "f\\ud800", "file": "F"}], "occurred_at": "2026-03-12T14:22:31Z"}')
    status, answer = api.post(CRASHES, body)
    row = report(api.server)
    assert (status, row["exception_type"], row["exception_reason"]) == (201, "A\ufffd\ufffdB", "\U0001f600")
    assert json.loads(row["extra"]) == {"\ufffd": {"x": ["\ufffd"]}}
    assert json.loads(row["stack_trace"])[0]["symbol"] == "f\ufffd"
    assert answer["group_hash"] == group_hash("A\ufffd\ufffdB", [{"symbol": "f\ufffd", "file": "F"}])


@pytest.mark.parametrize("change", [
    {"exception_type": "x" * 500}, {"exception_reason": "x" * 10_000}, {"battery_level": -1}, {"battery_level": -1.0},
    {"battery_level": 0}, {"battery_level": 1}, {"free_memory_mb": 312.5}, {"free_memory_mb": (1 << 63) - 1},
    {"is_charging": True}, {"stack_trace": []}, {"stack_trace": [{}]}, {"locale": "\U0001f1e9" * 500},
    {"deep": json.loads("[" * 60 + "]" * 60)}, {"occurred_at": "0001-01-01T00:00:00+14:00"},
])
def test_a_crash_at_the_edge_of_what_is_valid_is_stored(api, change):
    assert api.post(CRASHES, {**CRASH, **change})[0] == 201
    row = report(api.server)
    for name, value in change.items():
        if name in row and name not in ("stack_trace", "occurred_at"):
            assert row[name] == value


def changed(sent, **changes):
    return json.dumps({**sent, **changes}).encode()


def without(sent, name):
    return json.dumps({key: value for key, value in sent.items() if key != name}).encode()


def batch_of(*events):
    return json.dumps({"events": list(events)}).encode()


TEXTS = ["app_version", "os_version", "device_model", "device_id_hash", "locale"]
BAD_BODIES = [
    *[(path, body, "invalid JSON") for path in (CRASHES, EVENTS, BATCH) for body in (
        b"", b" ", b"{", b"nonsense", b'{"type": "custom"', b"[]", b'"text"', b"1", b"null", b"{}{}", b"\xff{}",
        '{"a": "é"}'.encode("latin-1"), json.dumps(CRASH).encode("utf-16"), b"\xef\xbb\xbf" + json.dumps(CRASH).encode(),
        b'{"a": NaN}', b'{"a": Infinity}', b'{"a": -Infinity}', b'{"a": 1e999}', b'{"a": "\x00"}', b"[" * 100_000,
        b'{"a":' * 100_000, b'{"a": ' + b"1" * 5_000 + b"}", b'{"a": 01}', b"{'a': 1}")],
    (CRASHES, changed(CRASH, deep=json.loads("[" * 70 + "]" * 70)), "invalid JSON"),
    (CRASHES, b'{"exception_type": "A", "occurred_at": "2026-03-12T14:22:31Z", "x": ' + b"[" * 900 + b"]" * 900 + b"}",
     "invalid JSON"),
    (CRASHES, b"{}", "missing exception_type"),
    (CRASHES, without(CRASH, "exception_type"), "missing exception_type"),
    (CRASHES, changed(CRASH, exception_type=None), "missing exception_type"),
    (CRASHES, changed(CRASH, exception_type=""), "missing exception_type"),
    (CRASHES, without(CRASH, "occurred_at"), "missing occurred_at"),
    (CRASHES, changed(CRASH, occurred_at=""), "missing occurred_at"),
    (EVENTS, without(EVENT, "type"), "missing type"),
    (EVENTS, without(EVENT, "occurred_at"), "missing occurred_at"),
    (EVENTS, changed(EVENT, type="crash"), "invalid event type"),
    (EVENTS, changed(EVENT, type="Custom"), "invalid event type"),
    (EVENTS, changed(EVENT, type=1), "invalid type"),
    (EVENTS, changed(EVENT, type=["custom"]), "invalid type"),
    *[(path, changed(sent, occurred_at=time), "invalid occurred_at")
      for path, sent in ((CRASHES, CRASH), (EVENTS, EVENT))
      for time in (1773325351, True, [], "yesterday", "2026-03-12", "2026-03-12T14:22:31", "2026-02-30T00:00:00Z",
                   "2026-03-12T14:22:31Z\n", "0000-01-01T00:00:00Z", "2026-03-12T14:22:60Z")],
    *[(CRASHES, changed(CRASH, **{name: value}), f"invalid {name}")
      for name in ["exception_type", "build_number", *TEXTS] for value in (1, True, ["a"], {"a": 1}, "x" * 501)],
    *[(EVENTS, changed(EVENT, **{name: value}), f"invalid {name}")
      for name in ["name", "session_id", *TEXTS] for value in (1, False, [], {}, "x" * 501)],
    (CRASHES, changed(CRASH, exception_reason=["a"]), "invalid exception_reason"),
    *[(CRASHES, changed(CRASH, stack_trace=value), "invalid stack_trace") for value in (
        "text", 1, {}, ["frame"], [[]], [None], [{"symbol": 1}], [{"file": []}], [{"frame": "0"}], [{"line": True}],
        [{"line": 1.5}], [{"x": json.loads("[" * 70 + "]" * 70)}])],
    *[(CRASHES, changed(CRASH, free_memory_mb=value), "invalid free_memory_mb")
      for value in ("312", True, [], 1 << 63, -(1 << 63) - 1, 1e300)],
    *[(CRASHES, changed(CRASH, battery_level=value), "invalid battery_level")
      for value in (1.01, -0.5, -2, 67, "0.67", False, [])],
    *[(CRASHES, changed(CRASH, is_charging=value), "invalid is_charging") for value in (0, 1, "false", [])],
    *[(EVENTS, changed(EVENT, properties=value), "invalid properties")
      for value in ("a", 1, True, ["a"], {"a": json.loads("[" * 70 + "]" * 70)})],
    (BATCH, b"{}", "missing events"),
    (BATCH, b'{"events": null}', "missing events"),
    (BATCH, b'{"events": []}', "missing events"),
    (BATCH, b'{"events": {}}', "invalid events"),
    (BATCH, b'{"events": "all"}', "invalid events"),
    (BATCH, batch_of(*[EVENT] * 101), "too many events: at most 100"),
    (BATCH, batch_of({}, EVENT), "missing type at index 0"),
    (BATCH, batch_of(EVENT, {"type": "custom"}, EVENT), "missing occurred_at at index 1"),
    (BATCH, batch_of(*[EVENT] * 99, {**EVENT, "type": "x"}), "invalid event type at index 99"),
    (BATCH, batch_of(EVENT, {**EVENT, "name": 1}), "invalid name at index 1"),
    (BATCH, batch_of(EVENT, None), "invalid event at index 1"),
    (BATCH, batch_of(EVENT, [EVENT]), "invalid event at index 1"),
]


def test_a_bad_body_is_refused_with_its_reason_and_nothing_is_stored(serve):
    api = Api(serve(rate_limit=0))
    api.post(CRASHES, CRASH)
    api.post(EVENTS, {**EVENT, "device_id_hash": "d"})
    before = stored(api.server)
    for path, body, text in BAD_BODIES:
        assert api.post(path, body) == (400, {"error": text}), (path, body[:200])
        assert stored(api.server) == before, (path, body[:200])
    assert api.post(CRASHES, CRASH)[0] == 201


def test_a_batch_of_100_is_stored_in_order(api):
    status, answer = api.post(BATCH, {"events": [{**EVENT, "name": str(n)} for n in range(100)]})
    assert (status, answer["count"], len(set(answer["ids"]))) == (201, 100, 100)
    assert sql(api.server.store.path, "select id, name from events order by seq") \
        == [(event_id, str(n)) for n, event_id in enumerate(answer["ids"])]


# == Signature =================================================================

VECTOR_BODY = b'{"type":"custom","name":"purchase","occurred_at":"2026-03-12T14:22:31Z"}'
VECTOR_TIME = "2026-03-12T14:22:31Z"
VECTOR = "sha256=6c3e10dd63bdf20cb9257a8a8b590969e83722725287c4009b98423fc82add3d"


def test_the_signature_of_the_contract():
    assert hashlib.sha256(VECTOR_BODY).hexdigest() == "93ced992a3f5326d7ad37afdbdbe25c7e51e29b646bd065d126afe4a5f63d54e"
    assert backfeedr.sign(KEY.encode(), VECTOR_TIME.encode(), VECTOR_BODY) == VECTOR


@pytest.mark.skipif(not shutil.which("openssl"), reason="there is no openssl")
def test_a_signature_made_by_openssl_is_accepted(api, clock):
    clock.seconds = parse_time(VECTOR_TIME) / 1000
    digest = subprocess.run(["openssl", "dgst", "-sha256", "-r"], input=VECTOR_BODY, capture_output=True, check=True)
    payload = VECTOR_TIME.encode() + b"." + digest.stdout.split()[0]
    made = subprocess.run(["openssl", "dgst", "-sha256", "-hmac", KEY, "-r"], input=payload, capture_output=True, check=True)
    signature = "sha256=" + made.stdout.split()[0].decode()
    assert api.post(EVENTS, VECTOR_BODY, X_Backfeedr_Timestamp=VECTOR_TIME, X_Backfeedr_Signature=signature)[0] == 201
    assert report(api.server, "events")["name"] == "purchase"


def flipped(data, bit):
    return data[:bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1:]


def test_one_flipped_bit_of_body_time_or_signature_is_refused(serve, clock):
    api = Api(serve(rate_limit=0))
    clock.seconds = parse_time(VECTOR_TIME) / 1000
    parts = [VECTOR_BODY, VECTOR_TIME.encode(), VECTOR.encode()]
    for which, part in enumerate(parts):
        for bit in range(0, len(part) * 8, 7):
            body, timestamp, signature = (flipped(p, bit) if n == which else p for n, p in enumerate(parts))
            environ = {"HTTP_X_BACKFEEDR_TIMESTAMP": timestamp.decode("latin-1"),
                       "HTTP_X_BACKFEEDR_SIGNATURE": signature.decode("latin-1"), "HTTP_X_BACKFEEDR_KEY": KEY}
            answer = api.web.post(EVENTS, body, extra_environ=environ, expect_errors=True)
            assert (answer.status_int, answer.json["error"]) in (
                (401, "invalid signature"), (400, "invalid timestamp")), (which, bit)
    assert stored(api.server, "events", "replays") == {"events": [], "replays": []}


@pytest.mark.parametrize("seconds, status", [(-300, 201), (-301, 401), (0, 201), (300, 201), (301, 401)])
def test_a_signature_holds_for_300_seconds_both_ways(api, clock, seconds, status):
    clock.seconds = parse_time(VECTOR_TIME) / 1000 + seconds
    got, answer = api.signed(EVENTS, VECTOR_BODY, VECTOR_TIME)
    assert got == status and (got == 201 or answer == {"error": "stale timestamp"})
    assert len(stored(api.server, "events")["events"]) == (status == 201)


@pytest.mark.parametrize("timestamp", ["2026-03-12T14:30:00.123456789Z", "2026-03-12T15:30:00+01:00"])
def test_the_timestamp_is_signed_as_it_was_sent(api, timestamp):
    assert api.signed(EVENTS, VECTOR_BODY, timestamp)[0] == 201


def test_a_signature_marks_a_request_on_its_own_path_only(api):
    """A body that is good for both paths, signed once."""
    body = json.dumps({**CRASH, **EVENT}).encode()
    assert api.signed(CRASHES, body, NOW)[0] == api.signed(EVENTS, body, NOW)[0] == 201


@pytest.mark.parametrize("headers, expected", [
    ({"X_Backfeedr_Timestamp": NOW}, (401, "invalid signature")),
    ({"X_Backfeedr_Timestamp": NOW, "X_Backfeedr_Signature": ""}, (401, "invalid signature")),
    ({"X_Backfeedr_Timestamp": "", "X_Backfeedr_Signature": ""}, (400, "invalid timestamp")),
    ({"X_Backfeedr_Signature": VECTOR}, (400, "invalid timestamp")),
    ({"X_Backfeedr_Timestamp": "now", "X_Backfeedr_Signature": VECTOR}, (400, "invalid timestamp")),
    ({"X_Backfeedr_Timestamp": VECTOR_TIME, "X_Backfeedr_Signature": VECTOR[7:]}, (401, "invalid signature")),
    ({"X_Backfeedr_Timestamp": VECTOR_TIME, "X_Backfeedr_Signature": VECTOR[:7] + VECTOR[7:].upper()},
     (401, "invalid signature")),
    ({"X_Backfeedr_Timestamp": VECTOR_TIME, "X_Backfeedr_Signature": "\u00fc"}, (401, "invalid signature")),
    ({"X_Backfeedr_Timestamp": "\u00fc", "X_Backfeedr_Signature": VECTOR}, (400, "invalid timestamp")),
])
def test_half_a_signature_or_a_malformed_one_is_an_error(api, clock, headers, expected):
    clock.seconds = parse_time(VECTOR_TIME) / 1000
    status, answer = api.post(EVENTS, VECTOR_BODY, **headers)
    assert (status, answer["error"]) == expected
    assert stored(api.server, "events") == {"events": []}


def test_a_signature_of_another_key_is_refused(api):
    other = api.server.store.create_key("default")
    signature = backfeedr.sign(other.encode(), NOW.encode(), VECTOR_BODY)
    assert api.post(EVENTS, VECTOR_BODY, X_Backfeedr_Timestamp=NOW, X_Backfeedr_Signature=signature) \
        == (401, {"error": "invalid signature"})


def test_unsigned_requests_are_refused_where_signatures_are_required(serve):
    api = Api(serve(require_signature=True))
    assert api.post(CRASHES, CRASH) == (401, {"error": "signature required"})
    assert stored(api.server, "crashes") == {"crashes": []}
    assert api.signed(CRASHES, json.dumps(CRASH).encode(), NOW)[0] == 201


# == RateLimiter ===============================================================

def test_the_101st_request_in_a_minute_waits_as_long_as_it_is_told(api, clock):
    other = api.server.store.create_key("default")
    for n in range(100):
        assert api.post(CRASHES if n % 2 else EVENTS, CRASH if n % 2 else EVENT)[0] == 201
        clock.move(0.25)
    before = stored(api.server)
    assert api.post(BATCH, {"events": [EVENT]}) == (429, {"error": "rate limit exceeded"})
    assert api.headers["Retry-After"] == "35"
    assert stored(api.server) == before
    assert api.post(CRASHES, CRASH, key=other)[0] == 201
    clock.move(34.75)
    assert api.post(CRASHES, CRASH)[0] == 429
    clock.move(0.25)
    assert api.post(CRASHES, CRASH)[0] == 201
    assert api.post(CRASHES, CRASH)[0] == 429


def test_the_window_slides_over_the_full_minute():
    clock = Clock("2026-03-12T14:30:59Z")
    limiter = RateLimiter(100, clock=clock)
    assert all(limiter.allow(b"k") for _ in range(100))
    clock.move(2)
    assert not limiter.allow(b"k") and limiter.retry_after(b"k") == 58
    clock.move(57.9)
    assert not limiter.allow(b"k") and limiter.retry_after(b"k") == 1
    clock.move(0.1)
    assert sum(limiter.allow(b"k") for _ in range(150)) == 100


def test_what_is_refused_does_not_count_and_zero_is_no_limit():
    clock = Clock()
    limiter = RateLimiter(1, clock=clock)
    assert limiter.allow(b"k") and not any(limiter.allow(b"k") for _ in range(50))
    clock.move(60)
    assert limiter.allow(b"k")
    assert all(RateLimiter(0, clock=clock).allow(b"k") for _ in range(1000))


def test_an_unknown_key_leaves_no_state_behind(api):
    before = stored(api.server)
    for n in range(50):
        assert api.post(CRASHES, CRASH, key=f"unknown-{n}")[0] == 401
    assert not (sql(api.server.store.path, "select * from rates") if POSTGRES else api.server._limiter._times)
    assert stored(api.server) == before


def test_replays_and_refused_bodies_count_against_the_limit_but_metrics_do_not(serve):
    api = Api(serve(rate_limit=3))
    assert [api.post(CRASHES, CRASH, Idempotency_Key="a")[0] for _ in range(2)] == [201, 200]
    assert api.post(CRASHES, b"{")[0] == 400
    assert api.post(CRASHES, CRASH)[0] == 429
    assert all(api.get(path)[0] == 200 for path in METRICS * 10)


# == Store =====================================================================

@sqlite_only
def test_a_commit_is_synced_before_it_is_acknowledged(api):
    with api.server.store.writing() as db:
        assert (db.pragma("synchronous"), db.pragma("journal_mode")) == (2, "wal")


@sqlite_only
def test_nobody_is_told_of_a_commit_before_it_is_made(serve, monkeypatch):
    server = serve()
    add = backfeedr.Store.add
    execute, told, seen = backfeedr.Connection.execute, [], []

    def watched(db, statement, *args):
        if statement == "commit" and not db.pragma("query_only"):
            seen.append((list(told), sql(server.store.path, "select count(*) from crashes")[0][0]))
        return execute(db, statement, *args)

    monkeypatch.setattr(backfeedr.Connection, "execute", watched)
    calls = [lambda: told.append(add(server.store, backfeedr.sha256(KEY), [parse_crash(dict(CRASH))]))] * 5
    run_together(server.store, calls)
    assert seen == [([], 0)] and len(told) == 5
    assert len(stored(server, "crashes")["crashes"]) == 5


@sqlite_only
def test_a_transaction_takes_its_lock_at_once(api):
    """Else a first read could make a later write fail without waiting."""
    with api.server.store.writing():
        with closing(sqlite3.connect(str(api.server.store.path), timeout=0)) as other:
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                other.execute("begin immediate")


def test_a_reader_cannot_write(api):
    with pytest.raises(StorageUnavailable):
        with api.server.store.reading() as db:
            db.execute("delete from apps")
    assert [app.name for app in api.server.store.apps()] == ["default"]


def test_a_key_is_kept_only_as_its_digest_and_prefix(api):
    key = api.server.store.create_app("Shop")
    api.post(CRASHES, CRASH, key=key)
    assert api.post(CRASHES, CRASH, key=key)[0] == 201
    api.server.close()
    content = content_of(api.server.store.path)
    for secret in (key, KEY, TOKEN):
        assert secret.encode() not in content and secret[-32:].encode() not in content
    assert hashlib.sha256(key.encode()).digest() in content and key[:16].encode() in content


def test_a_revoked_key_is_refused_at_once_and_its_sister_is_not(api):
    store = api.server.store
    first = store.create_app("Shop")
    second = store.create_key("Shop")
    assert [api.post(CRASHES, CRASH, key=key)[0] for key in (first, second)] == [201, 201]
    assert store.revoke_key(first[:16]).app == "Shop"
    before = stored(api.server)
    assert api.post(CRASHES, CRASH, key=first) == (401, {"error": "invalid API key"})
    assert stored(api.server) == before
    assert api.post(CRASHES, CRASH, key=second)[0] == 201
    assert [app.keys for app in store.apps() if app.name == "Shop"] == [1]


@sqlite_only
def test_a_key_that_another_process_has_revoked_is_refused_whatever_the_request(api):
    assert api.post(CRASHES, CRASH)[0] == 201
    with Store(str(api.server.store.path)) as other:
        other.revoke_key(KEY)
    before = stored(api.server)
    for body in (b"{", CRASH):
        assert api.post(CRASHES, body) == (401, {"error": "invalid API key"})
    assert stored(api.server) == before


def test_a_key_is_revoked_by_the_whole_of_it_or_by_enough_of_it(api):
    store = api.server.store
    first, second = store.create_app("Shop"), store.create_key("Shop")
    for prefix in ("bf_live_", "", "bf_live_zz", "x"):
        with pytest.raises(StoreError, match="active keys begin with"):
            store.revoke_key(prefix)
    store.revoke_key(second)
    with pytest.raises(StoreError):
        store.revoke_key(second)
    assert [api.post(CRASHES, CRASH, key=key)[0] for key in (first, second)] == [201, 401]


def test_a_key_that_was_revoked_stays_so_even_if_the_settings_name_it(serve):
    first = serve()
    first.store.revoke_key(KEY)
    first.close()
    assert Api(serve()).post(CRASHES, CRASH) == (401, {"error": "invalid API key"})


@pytest.mark.parametrize("name", ["", " ", "a ", "\n", "x" * 101, "default"])
def test_an_app_needs_a_proper_name_of_its_own(api, name):
    with pytest.raises(StoreError):
        api.server.store.create_app(name)
    assert [app.name for app in api.server.store.apps()] == ["default"]


def test_a_deleted_app_takes_everything_with_it_and_leaves_the_others(api):
    store = api.server.store
    key = store.create_app("Shop")
    crash = {**CRASH, "device_id_hash": "both", "device_model": "iPhone16,1"}
    session = {**EVENT, "type": "session_start", "session_id": "s"}
    api.post(CRASHES, crash)
    before = stored(api.server)
    api.post(CRASHES, {**crash, "occurred_at": NOW}, key=key, Idempotency_Key="k")
    api.post(BATCH, {"events": [{**session, "device_id_hash": "only"}] * 30}, key=key)
    store.delete_app("Shop")
    assert stored(api.server, *[table for table in REPORT_TABLES if table != "hours"]) \
        == {table: rows for table, rows in before.items() if table != "hours"}
    assert api.post(CRASHES, crash, key=key) == (401, {"error": "invalid API key"})
    assert api.get("/api/v1/overview?app=Shop")[0] == 404
    assert api.get("/api/v1/overview")[1]["dau"] == 1
    with pytest.raises(StoreError):
        store.delete_app("Shop")


def test_a_report_that_arrives_as_its_app_goes_is_refused(api):
    api.server.store.delete_app("default")
    with pytest.raises(Refusal, match="invalid API key"):
        api.server.store.add(backfeedr.sha256(KEY), [parse_event(dict(EVENT))])
    assert stored(api.server, "events", "hours") == {"events": [], "hours": []}


def test_a_revoked_key_of_the_settings_is_said_and_stays_revoked(serve, caplog):
    server = serve()
    server.store.revoke_key(KEY)
    other = server.store.create_key("default")
    server.close()
    api = Api(serve())
    assert "was revoked" in caplog.text
    assert [api.post(CRASHES, CRASH, key=key)[0] for key in (KEY, other)] == [401, 201]


def test_the_same_idempotency_key_and_body_give_the_same_ids_once(api, clock):
    first = api.post(BATCH, {"events": [EVENT, EVENT]}, Idempotency_Key="a")
    before = stored(api.server)
    clock.move(6 * 24 * 3600)
    again = api.post(BATCH, {"events": [EVENT, EVENT]}, Idempotency_Key="a")
    assert (first[0], again[0]) == (201, 200) and first[1] == again[1]
    assert stored(api.server) == before


def test_an_idempotency_key_with_another_body_or_path_is_refused(api):
    assert api.post(EVENTS, EVENT, Idempotency_Key="a")[0] == 201
    before = stored(api.server)
    refused = (422, {"error": "idempotency key reused with a different body"})
    assert api.post(EVENTS, {**EVENT, "name": "x"}, Idempotency_Key="a") == refused
    assert api.post(BATCH, {"events": [EVENT]}, Idempotency_Key="a") == refused
    assert stored(api.server) == before
    assert api.post(EVENTS, EVENT, key=api.server.store.create_app("Shop"), Idempotency_Key="a")[0] == 201


def test_a_request_that_was_refused_leaves_its_idempotency_key_free(api):
    assert api.post(EVENTS, b"{", Idempotency_Key="a")[0] == 400
    assert api.post(EVENTS, EVENT, Idempotency_Key="a")[0] == 201


def test_an_exact_replay_of_a_signed_request_stores_nothing(api, clock):
    body = json.dumps(CRASH).encode()
    first = api.signed(CRASHES, body, NOW)
    before = stored(api.server)
    clock.move(299)
    assert api.signed(CRASHES, body, NOW) == (200, first[1])
    assert api.signed(CRASHES, body, NOW, Idempotency_Key="added")[0] == 200
    assert stored(api.server, "crashes", "hours") == {table: before[table] for table in ("crashes", "hours")}
    assert api.signed(CRASHES, body, "2026-03-12T14:30:01Z")[0] == 201


def test_a_signed_retry_under_its_idempotency_key_cannot_be_replayed_without_it(api):
    body = json.dumps(CRASH).encode()
    assert api.signed(CRASHES, body, NOW, Idempotency_Key="a")[0] == 201
    assert api.signed(CRASHES, body, "2026-03-12T14:30:05Z", Idempotency_Key="a")[0] == 200
    assert api.signed(CRASHES, body, "2026-03-12T14:30:05Z")[0] == 200
    assert len(stored(api.server, "crashes")["crashes"]) == 1


def test_a_retry_that_is_compressed_anew_is_the_same_request(api):
    body = json.dumps(CRASH).encode()
    first = api.post(CRASHES, gzip.compress(body, mtime=1), Content_Encoding="gzip", Idempotency_Key="a")
    again = api.post(CRASHES, gzip.compress(body, mtime=2), Content_Encoding="gzip", Idempotency_Key="a")
    assert (first[0], again) == (201, (200, first[1]))


def test_identical_unsigned_requests_are_two_reports(api):
    ids = {api.post(CRASHES, CRASH)[1]["id"] for _ in range(2)}
    assert len(ids) == len(stored(api.server, "crashes")["crashes"]) == 2


def test_a_repetition_is_forgotten_after_its_week(api, clock):
    assert api.post(EVENTS, EVENT, Idempotency_Key="a")[0] == 201
    clock.move(7 * 24 * 3600 + 1)
    api.post(EVENTS, EVENT)
    assert stored(api.server, "replays") == {"replays": []}


def test_expired_rows_go_with_later_commits_and_the_counts_of_what_is_retained_with_them(serve, clock):
    server = serve(retention_days=1)
    api = Api(server)
    api.post(CRASHES, {**CRASH, "device_model": "iPhone16,1"})
    api.post(EVENTS, EVENT)
    clock.move(24 * 3600 + 1)
    api.post(CRASHES, {**CRASH, "exception_type": "LATE"})
    assert sql(server.store.path, "select exception_type from crashes") == [("LATE",)]
    assert stored(server, "events") == {"events": []}
    assert api.get("/api/v1/metrics/crash-types")[1] == {"labels": ["LATE"], "data": [1]}
    assert api.get("/api/v1/metrics/devices")[1] == {"labels": [], "data": []}
    assert sum(api.get("/api/v1/metrics/daily-crashes")[1]["data"]) == 2
    assert sql(server.store.path, "select label, crashes from labels") == [("LATE", 1)] * 2  # of its day, of all
    serve.unchecked.append(server)  # its roll-ups outlive its rows


def test_what_is_known_of_a_device_and_a_session_goes_with_its_last_report(serve, clock):
    server = serve(retention_days=1)
    serve.unchecked.append(server)
    api = Api(server)
    for event in ({"session_id": "s1", "device_id_hash": "d1", "type": "session_start"},
                  {"session_id": "s2", "device_id_hash": "d2", "type": "session_start"}):
        api.post(EVENTS, {**EVENT, **event})
    api.post(CRASHES, {**CRASH, "device_id_hash": "d3"})
    clock.move(12 * 3600)
    api.post(EVENTS, {**EVENT, "session_id": "s2", "device_id_hash": "d2"})
    clock.move(12 * 3600 + 1)
    api.post(EVENTS, EVENT)
    assert sql(server.store.path, "select device_id_hash from devices") == [("d2",)]
    assert sql(server.store.path, "select session_id from sessions") == [("s2",)]
    clock.move(12 * 3600)
    api.post(EVENTS, EVENT)
    assert stored(server, "devices", "sessions") == {"devices": [], "sessions": []}
    assert api.get("/api/v1/metrics/active-devices?days=2")[1]["mau"] == [3, 3]  # history outlives the rows


def test_a_device_keeps_its_first_fifty_versions(api):
    for n in range(52):
        api.post(CRASHES, {**CRASH, "device_id_hash": "d", "app_version": f"1.{n}"})
    (versions,), = sql(api.server.store.path, "select versions from devices")
    assert len(json.loads(versions)) == 50
    sql_run(api.server.store.path, "update devices set versions = '{}'")  # so that it can be recounted
    sql_run(api.server.store.path, "delete from releases")
    api.server.store.delete_app("default")


def fill(server, clock, seed, reports):
    """Random reports of two live apps and a test app, which share devices, versions and groups."""
    chance = random.Random(seed)
    names = [app.name for app in server.store.apps()]
    keys = [backfeedr.sha256(server.store.create_app(name, name == "Beta")) for name in ("Shop", "Beta")
            if name not in names] + [backfeedr.sha256(KEY)]
    for _ in range(reports):
        clock.move(chance.choice((1, 600, 40_000)))
        at = time_text(clock.seconds - chance.choice((-30, 0, 0, 3600, 90_000, 900_000)))
        shared = {"device_id_hash": chance.choice(("d1", "d2", "d3", "")), "occurred_at": at,
                  "app_version": chance.choice(("1.0", "1.1", ""))}
        if chance.random() < 0.4:
            report = parse_crash({**CRASH, "exception_type": chance.choice("ABC"), "device_model": "m", **shared,
                                  "exception_reason": str(chance.random())})
        else:
            report = parse_event({"type": chance.choice(("session_start", "session_end", "custom")),
                                  "session_id": chance.choice(("s1", "s2", "s3", "")) and
                                  shared["device_id_hash"] + chance.choice("abc"), **shared})
        server.store.add(chance.choice(keys), [report] * chance.choice((1, 1, 2)))


@pytest.mark.parametrize("seed", range(4))
def test_a_forgotten_device_is_in_no_row_and_no_sum_as_if_it_had_never_been(serve, clock, seed):
    server = serve()
    fill(server, clock, seed, 150)
    check_database(server.store.path)
    deleted = server.store.forget_device("d2")
    assert deleted["crashes"] and deleted["events"] and deleted["devices"]
    check_database(server.store.path, forgotten=True)
    for table in ("crashes", "events", "devices"):
        assert sql(server.store.path, f"select count(*) from {table} where device_id_hash = 'd2'") == [(0,)]
    assert server.store.forget_device("d2") == {}
    fill(server, clock, seed + 100, 50)  # and it may come again
    check_database(server.store.path, forgotten=True)
    serve.unchecked.append(server)


@pytest.mark.parametrize("name", ["default", "Shop", "Beta"])
def test_a_deleted_app_leaves_no_trace_in_the_figures_of_all_apps(serve, clock, name):
    server = serve()
    fill(server, clock, 7, 150)
    server.store.delete_app(name)
    check_database(server.store.path)
    assert not any(row[0] == 0 for row in sql(server.store.path, "select app_id from devices"))


def test_a_forgotten_device_takes_the_reason_that_it_gave_with_it(api):
    api.post(CRASHES, {**CRASH, "device_id_hash": "d1", "exception_reason": "theirs"})
    api.post(CRASHES, {**CRASH, "device_id_hash": "d2", "exception_reason": "of a person"})
    api.server.store.forget_device("d2")
    assert "person" not in str(stored(api.server))
    assert api.get("/api/v1/overview")[1]["top_crashes"][0]["exception_reason"] == "theirs"


def test_pruning_deletes_what_has_expired_and_gives_its_space_back(serve, clock):
    server = serve(retention_days=1)
    serve.unchecked.append(server)
    batch = [parse_event({**EVENT, "name": "x" * 400})] * 1000
    for _ in range(5):
        server.store.add(backfeedr.sha256(KEY), batch)
    server.store.add(backfeedr.sha256(KEY), [parse_crash(dict(CRASH))] * 50)

    def size():
        return server.store.size if POSTGRES else sql(server.store.path, "pragma page_count")[0][0]

    full = size()
    clock.move(24 * 3600 + 1)
    assert server.store.prune() == {"events": 5000, "crashes": 50}
    assert stored(server, "events", "crashes", "devices") == {"events": [], "crashes": [], "devices": []}
    assert stored(server, "labels") == {"labels": []} and len(stored(server, "groups")["groups"]) == 2
    assert POSTGRES or sql(server.store.path, "pragma freelist_count") == [(0,)]
    assert size() < full / (2 if POSTGRES else 10), "though PostgreSQL promises no more than to use it again"
    assert POSTGRES or server.store.size < full * 4096 / 10
    assert server.store.prune() == {}


def test_a_group_goes_when_no_crash_of_it_is_kept_and_none_is_of_the_week(serve, clock):
    server = serve(retention_days=1)
    serve.unchecked.append(server)
    api = Api(server)
    api.post(CRASHES, {**CRASH, "exception_reason": "about a person"})
    clock.move(3 * 24 * 3600)
    api.post(CRASHES, {**CRASH, "exception_type": "OTHER"})
    assert [top["count"] for top in api.get("/api/v1/overview")[1]["top_crashes"]] == [1, 1]
    clock.move(5 * 24 * 3600)
    api.post(CRASHES, {**CRASH, "exception_type": "OTHER"})
    assert {row[2] for row in stored(server, "groups")["groups"]} == {"OTHER"}
    assert "person" not in str(stored(server))


def test_a_device_of_two_apps_goes_from_both_with_its_last_report_in_either(serve, clock):
    """As it is one device of all apps together, what it has counted there must not be forgotten in between."""
    server = serve(retention_days=90)
    serve.unchecked.append(server)
    shop = backfeedr.sha256(server.store.create_app("Shop"))
    api = Api(server)
    api.post(EVENTS, {**EVENT, "device_id_hash": "d", "occurred_at": time_text(clock.seconds)})
    for days in (50, 45):
        clock.move(days * 24 * 3600)
        event = {**EVENT, "device_id_hash": "d", "occurred_at": time_text(clock.seconds)}
        server.store.add(shop, [parse_event(event)])
    assert len(stored(server, "devices")["devices"]) == 2 and len(stored(server, "events")["events"]) == 2
    server.store.forget_device("d")
    for name in ("active-devices", "retention"):
        figures = api.get(f"/api/v1/metrics/{name}?days=365")[1]
        assert not any(any(figures[column]) for column in figures.keys() - {"labels"}), name
    server.store.add(shop, [parse_event(event)])
    clock.move(91 * 24 * 3600)
    server.store.prune()
    assert stored(server, "devices") == {"devices": []}


def test_figures_heal_when_a_clock_that_was_years_ahead_is_set_right(serve, clock):
    server = serve(retention_days=90)
    serve.unchecked.append(server)
    api = Api(server)
    years = 3 * 365 * 24 * 3600
    clock.move(years)
    api.post(CRASHES, {**CRASH, "device_id_hash": "d", "occurred_at": time_text(clock.seconds)})
    clock.move(-years)
    for _ in range(3):
        clock.move(3600)
        api.post(CRASHES, {**CRASH, "device_id_hash": "d", "occurred_at": time_text(clock.seconds)})
    overview = api.get("/api/v1/overview")[1]
    assert overview["top_crashes"][0]["count"] == 4  # with the one that came from the future
    assert api.get("/api/v1/metrics/active-devices?days=1")[1]["mau"] == [1]
    clock.move(91 * 24 * 3600)
    server.store.prune()
    assert len(stored(server, "crashes")["crashes"]) == 1


def test_no_more_than_a_hundred_releases_of_an_app_begin_within_a_day(serve, clock):
    server = serve(rate_limit=0)
    serve.unchecked.append(server)
    api = Api(server)
    api.post(EVENTS, {**EVENT, "app_version": "1.0"})
    for n in range(120):
        event = {**EVENT, "type": "session_start", "app_version": f"junk {n}", "occurred_at": time_text(clock.seconds)}
        assert api.post(EVENTS, event)[0] == 201
    assert sql(server.store.path, "select count(*), sum(sessions) from releases") == [(100, 99)]
    clock.move(24 * 3600)
    api.post(CRASHES, {**CRASH, "app_version": "1.0"})
    api.post(EVENTS, {**EVENT, "app_version": "2.0"})
    assert sql(server.store.path, "select app_version, crashes from releases where app_version like '_.0'") == [
        ("1.0", 1), ("2.0", 0)]


def test_a_release_outlives_its_reports_and_is_never_below_zero(serve, clock):
    server = serve(retention_days=10)
    serve.unchecked.append(server)
    for version in ("1.0", "1.1", "1.1", "1.1"):
        server.store.add(backfeedr.sha256(KEY), [parse_event({
            **EVENT, "type": "session_start", "session_id": "s", "device_id_hash": "d", "app_version": version,
            "occurred_at": time_text(clock.seconds)})])
        clock.move(6 * 24 * 3600)
    server.store.forget_device("d")
    assert sql(server.store.path, "select app_version, sessions, devices from releases order by app_version") == [("1.0", 0, 0), ("1.1", 0, 0)]
    clock.move(9 * 24 * 3600)
    server.store.add(backfeedr.sha256(KEY), [parse_event(dict(EVENT))])
    assert stored(server, "release_days") == {"release_days": []}


def test_a_deleted_app_takes_the_rows_of_its_devices_in_others_that_only_waited_for_it(serve, clock):
    server = serve(retention_days=10)
    serve.unchecked.append(server)
    shop = backfeedr.sha256(server.store.create_app("Shop"))
    for key in (backfeedr.sha256(KEY), shop):
        server.store.add(key, [parse_event({**EVENT, "device_id_hash": "d"})])
        clock.move(6 * 24 * 3600)
    server.store.prune()
    assert len(stored(server, "devices")["devices"]) == 2
    server.store.delete_app("Shop")
    assert stored(server, "devices") == {"devices": []}


def test_a_crash_of_the_day_before_1970_counts_once(api):
    api.post(CRASHES, {**CRASH, "occurred_at": "1969-12-31T12:00:00Z"})
    assert api.get("/api/v1/metrics/crash-types")[1] == {"labels": ["SIGABRT"], "data": [1]}


def test_a_clock_that_goes_back_a_little_does_not_count_the_week_anew(serve, clock):
    server = serve(retention_days=1)
    serve.unchecked.append(server)
    api = Api(server)
    clock.seconds = parse_time("2026-03-12T15:00:00Z") / 1000
    api.post(CRASHES, {**CRASH, "exception_reason": "about a person"})
    clock.move(2 * 24 * 3600)
    api.post(EVENTS, EVENT)
    clock.move(-1)
    api.post(EVENTS, EVENT)
    assert api.get("/api/v1/overview")[1]["top_crashes"][0]["count"] == 1
    clock.move(8 * 24 * 3600)
    api.post(EVENTS, EVENT)
    assert stored(server, "groups", "group_hours") == {"groups": [], "group_hours": []}


def test_what_leaves_the_week_does_so_in_steps_and_is_never_counted(serve, clock, monkeypatch):
    monkeypatch.setattr(backfeedr, "LEAVING", 3)
    server = serve()
    api = Api(server)
    for n in range(10):
        api.post(CRASHES, {**CRASH, "exception_type": f"T{n}", "occurred_at": time_text(clock.seconds)})
    clock.move(8 * 24 * 3600)
    for left in (7, 4, 1, 0):
        api.post(CRASHES, {**CRASH, "exception_type": "T1", "occurred_at": time_text(clock.seconds)})
        assert {top["exception_type"] for top in api.get("/api/v1/overview")[1]["top_crashes"]} == {"T1"}
        hours = [hour for _, hour, _, _ in stored(server, "group_hours")["group_hours"]]
        assert sum(hour < clock.seconds // 3600 - 168 for hour in hours) == left


def test_a_commit_stops_deleting_large_reports_when_it_has_taken_its_time(serve, clock, monkeypatch):
    monkeypatch.setattr(backfeedr, "EXPIRE_SECONDS", 0)
    server = serve(retention_days=1)
    serve.unchecked.append(server)
    server.store.add(backfeedr.sha256(KEY), [parse_crash(dict(CRASH))] * 25)
    clock.move(24 * 3600 + 1)
    for left in (15, 5, 0):
        server.store.add(backfeedr.sha256(KEY), [parse_event(dict(EVENT))])
        assert len(stored(server, "crashes")["crashes"]) == left


@sqlite_only
def test_pruning_ends_where_the_file_cannot_shrink(serve, clock):
    server = serve(retention_days=1)
    serve.unchecked.append(server)
    server.store.add(backfeedr.sha256(KEY), [parse_event({**EVENT, "name": "x" * 400})] * 100)
    server.store.close()
    sql_run(server.store.path, "pragma auto_vacuum = none")
    with closing(sqlite3.connect(str(server.store.path), isolation_level=None)) as db:
        db.execute("pragma journal_mode = delete")
        db.execute("pragma auto_vacuum = none")
        db.execute("vacuum")
        db.execute("pragma journal_mode = wal")
    clock.move(24 * 3600 + 1)
    with Store(str(server.store.path), clock=clock, retention_days=1) as store:
        assert store.prune() == {"events": 100}


def test_forgetting_a_device_leaves_a_session_that_others_report_too(api):
    api.post(EVENTS, {**EVENT, "type": "session_start", "session_id": "s"})  # before its device was known
    api.post(EVENTS, {**EVENT, "session_id": "s", "device_id_hash": "d"})
    api.server.store.forget_device("d")
    assert api.get("/api/v1/overview")[1]["sessions_7d"] == 1
    assert len(api.get("/api/v1/events?session_id=s", **ADMIN)[1]["events"]) == 1


def test_pruning_keeps_what_has_not_expired(serve, clock):
    server = serve(retention_days=0)
    api = Api(server)
    api.post(CRASHES, CRASH)
    clock.move(9_000 * 24 * 3600)
    assert server.store.prune() == {}
    assert len(stored(server, "crashes")["crashes"]) == 1


def test_retention_keeps_up_with_large_batches(serve, clock):
    server = serve(retention_days=1)
    batch = [parse_event(dict(EVENT))] * 1000
    for _ in range(4):
        server.store.add(backfeedr.sha256(KEY), batch)
        clock.move(24 * 3600 + 1)
    assert len(stored(server, "events")["events"]) == 1000


def test_retention_of_zero_keeps_all(serve, clock):
    api = Api(serve(retention_days=0))
    api.post(CRASHES, CRASH)
    clock.move(10_000 * 24 * 3600)
    api.post(CRASHES, CRASH)
    assert len(stored(api.server, "crashes")["crashes"]) == 2


def test_ids_are_unique_and_ascend_even_if_the_clock_goes_back(api, clock):
    ids = []
    for step in (0, 0, -3600, 7200):
        clock.move(step)
        ids.append(api.post(CRASHES, CRASH)[1]["id"])
    assert ids == sorted(set(ids))


def test_many_threads_share_commits_and_lose_nothing(serve):
    server = serve()
    key_hash = backfeedr.sha256(KEY)
    seqs = []

    def send(n):
        for m in range(25):
            crash = {**CRASH, "device_id_hash": f"d{n % 3}", "device_model": f"m{m % 2}"}
            seqs.extend(server.store.add(key_hash, [parse_crash(crash)]).seqs)
            seqs.extend(server.store.add(key_hash, [parse_event({**EVENT, "session_id": f"s{n}"})] * 3).seqs)

    threads = [threading.Thread(target=send, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    rows = sql(server.store.path, "select seq from crashes union all select seq from events")
    assert sorted(seqs) == sorted(seq for seq, in rows) and len(seqs) == 8 * 25 * 4


def test_one_refused_request_does_not_hurt_its_neighbours_in_a_commit(serve):
    """Requests that wait together: a good one, a repetition, a reused key and one of an app that is gone."""
    server = serve()
    store = server.store
    key_hash = backfeedr.sha256(KEY)
    event = parse_event(dict(EVENT))
    cases = [(key_hash, Idempotency((b"a",), b"1")), (key_hash, Idempotency((b"a",), b"1")), (key_hash, Idempotency((b"a",), b"2")),
             (b"gone", Idempotency())]
    outcomes = run_together(store, [lambda case=case: store.add(case[0], [event], case[1]) for case in cases])
    kinds = sorted(str(outcome) if isinstance(outcome, Exception) else str(outcome.replayed) for outcome in outcomes)
    assert kinds in (["False", "True", "idempotency key reused with a different body", "invalid API key"],
                     ["False", "idempotency key reused with a different body",
                      "idempotency key reused with a different body", "invalid API key"])
    assert len(stored(server, "events")["events"]) == 1


def run_together(store, calls):
    """The outcomes of calls that all wait for the same commit: they are held until all have queued."""
    outcomes = [None] * len(calls)

    def run(n):
        try:
            outcomes[n] = calls[n]()
        except BaseException as error:
            outcomes[n] = error

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(calls))]
    here = store._here
    with here.write_lock:
        for thread in threads:
            thread.start()
        wait_until(lambda: len(here.queue) == len(calls))
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return outcomes


def wait_until(condition, seconds=20):
    """Returns when the condition holds: for other threads and processes, whose pace no clock of ours sets."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)


def test_a_store_works_on_both_sides_of_a_fork(serve):
    server = serve()
    api = Api(server)
    api.post(CRASHES, CRASH)
    child = os.fork()
    if not child:
        try:
            os._exit(0 if api.post(CRASHES, CRASH)[0] == 201 and api.get("/api/v1/overview")[0] == 200 else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert api.post(CRASHES, CRASH)[0] == 201
    assert len(stored(server, "crashes")["crashes"]) == 3


@sqlite_only
def test_close_may_be_called_twice_and_folds_the_wal_in(serve):
    server = serve()
    Api(server).post(CRASHES, CRASH)
    server.close()
    server.close()
    assert [file.name for file in server.store.path.parent.iterdir()] == ["test.db"]
    assert Api(server).post(CRASHES, CRASH) == (503, {"error": "storage unavailable"})
    assert len(stored(server, "crashes")["crashes"]) == 1


@pytest.mark.parametrize("content", [b"junk" * 1000, b"SQLite format 3\x00" + b"junk" * 1000])
def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "junk.db"
    path.write_bytes(content)
    with pytest.raises(StoreError, match="cannot open the database .*junk.db"):
        Store(str(path))
    assert path.read_bytes() == content


def test_the_database_of_another_program_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "other.db"
    with closing(sqlite3.connect(str(path))) as db:
        db.execute("create table theirs (a)")
    content = path.read_bytes()
    with pytest.raises(StoreError, match="not one of backfeedr's"):
        Store(str(path))
    assert path.read_bytes() == content


def version_of(path):
    query = "select value from state where name = 'schema_version'" if POSTGRES else "pragma user_version"
    return sql(path, query)[0][0]


def set_version(path, version):
    sql_run(path, f"update state set value = {version} where name = 'schema_version'" if POSTGRES
            else f"pragma user_version = {version}")


def test_a_database_of_a_newer_backfeedr_is_refused_and_left_alone(serve):
    server = serve("newer.db")
    server.close()
    set_version(server.store.path, 99)
    content = content_of(server.store.path)
    with pytest.raises(StoreError, match="newer backfeedr"):
        serve("newer.db")
    assert content_of(server.store.path) == content and version_of(server.store.path) == 99


def test_an_older_schema_is_migrated_and_keeps_its_rows(serve, monkeypatch):
    server = serve()
    Api(server).post(CRASHES, CRASH)
    server.close()
    before = stored(server)
    now = backfeedr.SCHEMA_VERSION
    monkeypatch.setattr(backfeedr, "SCHEMA_VERSION", now + 2)
    monkeypatch.setattr(backfeedr, "MIGRATIONS", {now: "alter table apps add column note text;\n",
                                                  now + 1: "update apps set note = 'two';\n"})
    again = serve()
    assert sql(again.store.path, "select note from apps") == [("two",)]
    assert version_of(again.store.path) == now + 2
    assert stored(again) == before
    assert Api(again).post(CRASHES, CRASH)[0] == 201


SINCE = {1: ["drop table grants"]}  # what undoes each migration


@pytest.mark.parametrize("version", SINCE)
def test_a_database_of_each_earlier_version_becomes_as_a_new_one(serve, version):
    server = serve()
    Api(server).post(CRASHES, CRASH)
    server.close()
    schema = ("select table_name, column_name, data_type from information_schema.columns"
              " where table_schema = current_schema() order by 1, 2" if POSTGRES
              else "select type, name, tbl_name from sqlite_master order by name")
    new, before = sql(server.store.path, schema), stored(server)
    for undone in range(backfeedr.SCHEMA_VERSION - 1, version - 1, -1):
        for statement in SINCE[undone]:
            sql_run(server.store.path, statement)
    set_version(server.store.path, version)
    again = serve()
    assert (sql(again.store.path, schema), stored(again)) == (new, before)
    assert Api(again).post(CRASHES, CRASH)[0] == 201


def test_a_migration_that_fails_leaves_the_database_as_it_was(serve, monkeypatch):
    server = serve()
    server.close()
    content = content_of(server.store.path)
    now = backfeedr.SCHEMA_VERSION
    monkeypatch.setattr(backfeedr, "SCHEMA_VERSION", now + 1)
    monkeypatch.setattr(backfeedr, "MIGRATIONS", {now: "alter table apps add column note text;\nnonsense;\n"})
    with pytest.raises(StoreError, match="syntax error"):
        serve()
    assert content_of(server.store.path) == content and version_of(server.store.path) == now


def test_a_directory_without_write_permission_is_refused(tmp_path):
    """As an ordinary user, in a process of its own: root may write everywhere."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    try:
        child = os.fork()
        if not child:
            try:
                if not os.geteuid():
                    os.seteuid(65534)
                Store(str(folder / "test.db"))
            except StoreError as error:
                os._exit(0 if str(error).endswith("Permission denied") else 3)
            finally:
                os._exit(2)
        assert os.WEXITSTATUS(os.waitpid(child, 0)[1]) == 0
        assert list(folder.iterdir()) == []
    finally:
        folder.rmdir()


def test_an_empty_file_becomes_a_database(tmp_path):
    (tmp_path / "empty.db").touch()
    with Store(str(tmp_path / "empty.db")) as store:
        assert store.apps() == []


# -- From one store to another

def hand_over(server, other, step=40):
    """Gives another server all reports that the first one keeps; the sum of what its steps say."""
    counts = Counter()
    for kind in (backfeedr.Crash, backfeedr.Event):
        reports = list(server.store.export(kind))
        for start in range(0, len(reports), step):
            counts += other.store.import_(reports[start:start + step])
    return counts


def answers(server):
    """What it answers to every question, of all apps and of each."""
    api = Api(server)
    return {(path, app): api.get(f"{path}?limit=100{app}", Authorization="Bearer " + TOKEN)
            for path in [*METRICS, CRASHES, EVENTS] for app in ("", "&app=default", "&app=Shop", "&app=Beta")}


def named_rows(server):
    """All reports, by the names of their apps: their numbers may differ from file to file."""
    return [[(*row[:4], *row[5:]) for row in sql(server.store.path, f"""
        select apps.name, is_test, reports.* from {table} as reports join apps on apps.id = app_id order by seq
        """)] for table in ("crashes", "events")]


@pytest.mark.parametrize("seed", range(4))
def test_what_a_store_exports_makes_the_same_rows_sums_and_answers_in_another(serve, clock, seed):
    server, other = serve(retention_days=365), serve("other.db", retention_days=365)
    fill(server, clock, seed, 200)
    counts = hand_over(server, other)
    assert counts == {"stored": sum(map(len, named_rows(server)))}
    assert named_rows(other) == named_rows(server)
    assert answers(other) == answers(server)
    before = stored(other)
    assert hand_over(server, other, step=77) == {"known": counts["stored"]}, "it may be repeated"
    assert stored(other) == before
    assert [key.app for key in other.store.keys()] == ["default"], "an app that is imported has no key"


def test_stores_that_hand_over_to_each_other_have_the_same_in_the_end(serve, clock):
    servers = serve(retention_days=365), serve("other.db", retention_days=365)
    for seed, server in enumerate(servers):
        fill(server, clock, seed, 100)
    theirs = [sum(map(len, named_rows(server))) for server in servers]
    assert hand_over(*servers) == {"stored": theirs[0]}
    assert hand_over(*servers[::-1]) == {"stored": theirs[1], "known": theirs[0]}
    assert answers(servers[0]) == answers(servers[1])
    assert named_rows(servers[0]) == named_rows(servers[1])


def test_an_import_takes_reports_in_any_order_and_each_once(serve, clock):
    server, other = serve(), serve("other.db")
    fill(server, clock, 1, 60)
    reports = [*server.store.export(backfeedr.Event), *server.store.export(backfeedr.Crash)]
    random.Random(1).shuffle(reports)
    assert other.store.import_(reports + reports[:9]) == {"stored": len(reports), "known": 9, "expired": 0}
    assert answers(other) == answers(server)


def test_what_has_expired_is_not_imported_and_never_counted_twice(serve, clock):
    server, other = serve(retention_days=30), serve("other.db", retention_days=60)
    for name in ("old", "new"):
        Api(server).post(EVENTS, {**EVENT, "type": "session_start", "session_id": name})
        clock.move(20 * 24 * 3600)
    exported = list(server.store.export(backfeedr.Event))
    api = Api(server)
    api.post(EVENTS, EVENT)  # the old one goes
    assert server.store.import_(exported) == {"stored": 0, "known": 1, "expired": 1}
    server.store.retention_days = 365
    assert server.store.import_(exported) == {"stored": 0, "known": 1, "expired": 1}
    assert sql(server.store.path, "select sum(sessions) from days where app_id = 1") == [(2,)]
    clock.move(30 * 24 * 3600)
    assert other.store.import_(exported) == {"stored": 1, "known": 0, "expired": 1}
    assert [row[3] for row in sql(other.store.path, "select seq, app_id, id, session_id from events")] == ["new"]
    serve.unchecked.append(server)


def test_a_test_app_is_not_imported_into_a_live_one(serve):
    server, other = serve(), serve("other.db")
    for store, is_test in ((server.store, True), (other.store, False)):
        key = store.create_app("Shop", is_test)
        store.add(backfeedr.sha256(key), [parse_crash(dict(CRASH))])
    before = stored(other)
    with pytest.raises(StoreError, match="the app 'Shop' is a live one here"):
        hand_over(server, other)
    assert stored(other) == before


def test_imported_releases_were_first_seen_when_they_were_received(serve, clock):
    """And the most that may begin in a day are counted in the day in which they did."""
    server, other = serve(), serve("other.db")
    for n in range(150):
        for path, body in ((CRASHES, CRASH), (EVENTS, EVENT)):
            Api(server).post(path, {**body, "app_version": f"1.{n}"})
        clock.move(3600)
    hand_over(server, other)
    query = "select app_version, first_seen, last_seen from releases order by app_version"
    releases = sql(other.store.path, query)
    assert len(releases) == 150
    assert releases == sql(server.store.path, query)


@sqlite_only
def test_an_export_is_of_what_was_there_when_it_began_and_reads_no_more_than_it_must(serve, clock, monkeypatch):
    server = serve()
    fill(server, clock, 1, 100)
    events = named_rows(server)[1]
    monkeypatch.setattr(backfeedr, "PAGE_ROWS", 7)
    reports = server.store.export(backfeedr.Event)
    first = next(reports)
    assert [reader.in_transaction for reader in server.store._here.readers] == [False], "a page is no open read"
    Api(server).post(EVENTS, EVENT)
    assert [first.seq, *(kept.seq for kept in reports)] == [row[2] for row in events]
    since = events[40][4]
    assert [(kept.seq, kept.app) for kept in server.store.export(backfeedr.Event, "Shop", since)] \
        == [(row[2], "Shop") for row in events if row[0] == "Shop" and row[4] >= since]
    with pytest.raises(StoreError, match="no app named 'Nope'"):
        next(server.store.export(backfeedr.Crash, "Nope"))


# -- Faults

UNAVAILABLE = (503, {"error": "storage unavailable"})


@pytest.fixture
def disk(monkeypatch):
    """A disk of so many pages for every connection that is opened from now on; None is plenty."""
    class Disk:
        pages = None

    open_connection = backfeedr.Connection.__init__

    def init(db, *args, **kwargs):
        open_connection(db, *args, **kwargs)
        if Disk.pages is not None:
            db.execute(f"pragma max_page_count = {Disk.pages}")

    monkeypatch.setattr(backfeedr.Connection, "__init__", init)
    return Disk


@sqlite_only
def test_a_full_disk_in_the_middle_of_a_group_fails_the_whole_group_until_there_is_room(serve, disk):
    server = serve()
    api = Api(server)
    api.post(CRASHES, CRASH)
    before = stored(server)
    disk.pages = sql(server.store.path, "pragma page_count")[0][0] + 3  # enough for some of the group's rows
    server.store._here.writer.close()
    server.store._here.writer = None
    batch = [parse_event({**EVENT, "properties": {"text": "x" * 300}}) for _ in range(100)]
    crash = parse_crash(dict(CRASH))
    calls = [lambda: server.store.add(backfeedr.sha256(KEY), [crash])] * 3 \
        + [lambda: server.store.add(backfeedr.sha256(KEY), batch)] * 2
    for _ in range(2):
        assert {type(outcome) for outcome in run_together(server.store, calls)} == {StorageUnavailable}
        assert stored(server) == before
    assert api.post(BATCH, {"events": [{**EVENT, "properties": {"text": "x" * 300}}] * 100}) == UNAVAILABLE
    assert int(api.headers["Retry-After"]) >= 1
    assert api.post(CRASHES, CRASH)[0] == 201, "what still finds room is stored"
    assert api.get("/api/v1/health")[0] == 200 and api.get("/api/v1/overview")[0] == 200
    disk.pages = 1_000_000
    server.store._here.writer.execute("pragma max_page_count = 1000000")
    assert {type(outcome) for outcome in run_together(server.store, calls)} == {backfeedr.Receipt}
    assert len(stored(server, "events")["events"]) == 200


@sqlite_only
def test_a_lock_of_another_process_is_waited_for_within_a_bound(serve, monkeypatch):
    monkeypatch.setattr(backfeedr, "BUSY_TIMEOUT", 0.1)
    api = Api(serve())
    before = stored(api.server)
    with closing(sqlite3.connect(str(api.server.store.path), isolation_level=None)) as other:
        other.execute("begin immediate")
        assert api.post(CRASHES, CRASH) == UNAVAILABLE
        assert api.get("/api/v1/health") == (200, {"status": "ok"})
        assert api.get("/api/v1/overview")[0] == 200
        other.execute("rollback")
    assert stored(api.server) == before
    assert api.post(CRASHES, CRASH)[0] == 201


@sqlite_only
def test_a_lock_that_is_given_up_in_time_costs_nobody_a_report(serve):
    api = Api(serve())
    with closing(sqlite3.connect(str(api.server.store.path), isolation_level=None, check_same_thread=False)) as other:
        other.execute("begin immediate")
        release = threading.Timer(0.2, other.execute, ["rollback"])
        release.start()
        assert api.post(CRASHES, CRASH)[0] == 201
        release.join()


@sqlite_only
def test_a_file_that_is_gone_is_reported_and_used_again_when_it_is_back(api):
    path = api.server.store.path
    api.post(CRASHES, CRASH)
    path.rename(path.with_suffix(".away"))
    assert api.post(CRASHES, CRASH) == UNAVAILABLE
    assert api.get("/api/v1/health") == UNAVAILABLE
    assert not path.exists(), "it must not come back empty"
    path.with_suffix(".away").rename(path)
    assert api.get("/api/v1/health") == (200, {"status": "ok"})
    assert api.post(CRASHES, CRASH)[0] == 201
    assert len(stored(api.server, "crashes")["crashes"]) == 2


@sqlite_only
def test_a_database_put_in_the_place_of_the_file_is_left_alone(serve):
    server, other = serve(), serve("other.db")
    api = Api(server)
    api.post(CRASHES, CRASH)
    other.close()
    path, content = server.store.path, other.store.path.read_bytes()
    path.rename(path.with_suffix(".away"))
    path.write_bytes(content)
    assert api.post(CRASHES, CRASH) == UNAVAILABLE
    assert api.get("/api/v1/health") == UNAVAILABLE
    assert path.read_bytes() == content
    path.with_suffix(".away").rename(path)
    assert api.post(CRASHES, CRASH)[0] == 201
    assert api.get("/api/v1/health")[0] == 200


@sqlite_only
def test_a_failed_sync_makes_health_fail_until_a_commit_succeeds(api, monkeypatch, caplog):
    execute = backfeedr.Connection.execute

    def failing(db, statement, *args):
        if statement == "commit" and db.in_transaction and not db.pragma("query_only"):
            raise sqlite3.OperationalError("disk I/O error")
        return execute(db, statement, *args)

    before = stored(api.server)
    monkeypatch.setattr(backfeedr.Connection, "execute", failing)
    assert api.post(CRASHES, CRASH) == UNAVAILABLE
    assert api.get("/api/v1/health") == UNAVAILABLE
    assert api.get("/api/v1/overview")[0] == 200
    assert "disk I/O error" in caplog.text
    assert stored(api.server) == before
    monkeypatch.setattr(backfeedr.Connection, "execute", execute)
    assert api.get("/api/v1/health")[0] == 200
    assert api.post(CRASHES, CRASH)[0] == 201


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt, MemoryError, sqlite3.DatabaseError])
def test_no_waiter_is_left_hanging_whatever_its_leader_meets(serve, monkeypatch, fault):
    server = serve()

    def fail(commit):
        raise fault("on purpose")

    with monkeypatch.context() as patched:
        patched.setattr(backfeedr._Commit, "save", fail)
        calls = [lambda: server.store.add(backfeedr.sha256(KEY), [parse_crash(dict(CRASH))])] * 5
        outcomes = run_together(server.store, calls)
    kinds = Counter(type(outcome) for outcome in outcomes)
    assert kinds[StorageUnavailable] + kinds[fault] == 5 and kinds[fault] <= 1
    assert stored(server, "crashes", "hours") == {"crashes": [], "hours": []}
    assert Api(server).post(CRASHES, CRASH)[0] == 201


def test_a_waiter_that_is_interrupted_leaves_the_queue_to_the_others(serve, monkeypatch):
    """As Ctrl-C does in an app whose main thread handles requests."""
    server = serve()
    here = server.store._here

    def add():
        return server.store.add(backfeedr.sha256(KEY), [parse_crash(dict(CRASH))])

    def interrupted(write):
        raise KeyboardInterrupt

    with here.write_lock:
        leader = threading.Thread(target=add)
        leader.start()
        wait_until(lambda: here.queue)
        monkeypatch.setattr(backfeedr._Waiter, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            add()
        assert len(here.queue) == 1
        monkeypatch.undo()
    leader.join(20)
    assert not leader.is_alive() and add().replayed is False


@pytest.mark.parametrize("limit, events", [({"max_waiters": 2}, 1), ({"max_rows": 200}, 100)])
def test_too_many_waiters_are_sent_away_at_once(tmp_path, limit, events):
    with Store(str(tmp_path / "small.db"), **limit) as store:
        key_hash = backfeedr.sha256(store.create_app("Shop"))
        batch = [parse_event(dict(EVENT)) for _ in range(events)]
        refused = []

        def one_too_many():
            wait_until(lambda: len(store._here.queue) == 2)
            with pytest.raises(StorageUnavailable) as error:
                store.add(key_hash, batch)
            refused.append(error.value.retry_after)

        threads = [threading.Thread(target=store.add, args=(key_hash, batch)) for _ in range(2)]
        with store._here.write_lock:
            for thread in threads:
                thread.start()
            one_too_many()
        for thread in threads:
            thread.join(20)
        assert refused[0] >= 1
        assert len(sql(store.path, "select seq from events")) == 2 * events
        store.add(key_hash, batch)


def test_submissions_of_one_call_share_a_commit_and_each_has_its_own_outcome(serve):
    server = serve("small.db")
    Submission, store, body = backfeedr.Submission, server.store, b"body"
    store.max_waiters = 5
    once, other = Idempotency((b"mark",), b"a"), Idempotency((b"mark",), b"b")
    key_hash, crash = backfeedr.sha256(KEY), [parse_crash(dict(CRASH))]
    submissions = [Submission(key_hash, crash, once), Submission(b"unknown", crash), Submission(key_hash, crash, once),
                   Submission(key_hash, crash, other), Submission(key_hash, crash * 2), Submission(key_hash, crash)]
    store.add_all(submissions)
    outcomes = [str(each.error or list(each.result())) for each in submissions]
    seqs = [seq for seq, in sql(store.path, "select seq from crashes order by seq")]
    assert outcomes == [
        str([range(seqs[0], seqs[0] + 1), False]), "invalid API key", str([range(seqs[0], seqs[0] + 1), True]),
        "idempotency key reused with a different body", str([range(seqs[1], seqs[2] + 1), False]),
        "storage unavailable"]
    assert len(seqs) == 3 and list(store._here.group_sizes.counts)[:4] == [0, 0, 0, 1]
    store.add_all([])


def test_a_batch_larger_than_the_limit_of_rows_is_taken_where_nobody_waits(tmp_path):
    with Store(str(tmp_path / "small.db"), max_rows=10) as store:
        batch = [parse_event(dict(EVENT)) for _ in range(100)]
        assert len(store.add(backfeedr.sha256(store.create_app("Shop")), batch).seqs) == 100


# == Metrics ===================================================================

ADMIN = {"Authorization": "Bearer " + TOKEN}
LISTS = ["/api/v1/crashes", "/api/v1/events", "/api/v1/crashes/" + group_hash("A", [])]
WEEKDAYS = "Mon Tue Wed Thu Fri Sat Sun"


def crash_at(time, kind="A", **more):
    return {"exception_type": kind, "occurred_at": time, **more}


def start_at(time, **more):
    return {"type": "session_start", "occurred_at": time, **more}


def series(labels, *data):
    return {"labels": labels.split(), "data": list(data)}


def overview(rate, dau, sessions, crashes, *top):
    return {"crash_free_rate_7d": rate, "dau": dau, "sessions_7d": sessions, "crashes_7d": crashes, "top_crashes": [
        {"group_hash": group_hash(kind, []), "exception_type": kind, "exception_reason": "".join(why), "count": count}
        for kind, count, *why in top]}


SMALL_WORLD = {  # Now is Thursday 2026-03-12, 14:30. A session counts at its first start, in whatever order they come.
    "default": [
        crash_at("2026-03-12T10:00:00Z", device_model="iPhone16,1", device_id_hash="d1"),
        crash_at("2026-03-11T23:59:59.999Z", device_model="iPhone15,2", device_id_hash="d2"),
        crash_at("2026-03-06T00:00:00Z", "B", device_model="", device_id_hash=""),  # first of 7 days
        crash_at("2026-03-05T23:59:59.999Z", "C"),  # the day before, but within 7 x 24 h
        crash_at("2026-03-05T14:00:00Z", "C"), crash_at("2026-03-05T13:59:59.999Z", "D"),
        crash_at("2026-03-12T14:35:00Z", "E", exception_reason="at once"),  # 5 minutes fast: believed
        crash_at("2026-03-12T14:35:00Z", "E", exception_reason="latest"),
        crash_at("2026-03-12T15:00:00Z", "E", device_id_hash="fast", exception_reason="30 minutes fast: at 14:30"),
        crash_at("2025-01-01T00:00:00Z", "D", device_id_hash="late", device_model="iPhone15,2"),
        start_at("2026-03-12T10:00:00Z", session_id="s1"), start_at("2026-03-12T11:00:00Z", session_id="s1"),
        start_at("2026-03-12T10:00:00Z", session_id="s2"), start_at("2026-03-05T23:59:59.999Z", session_id="s2"),
        start_at("2026-03-05T23:59:59.999Z", session_id="s3"), start_at("2026-03-12T10:00:00Z", session_id="s3"),
        start_at("2026-03-06T00:00:00Z", session_id="s4"), start_at(NOW, session_id="s5", type="session_end"),
        start_at("2026-03-10T00:00:00Z"), start_at("2026-03-10T00:00:00Z", session_id=""),
        *[start_at("2026-03-08T12:00:00Z")] * 11, {"type": "custom", "occurred_at": NOW, "device_id_hash": ""},
        {"type": "error", "occurred_at": "2026-03-11T14:00:00Z", "device_id_hash": "d3"},
        {"type": "error", "occurred_at": "2026-03-11T13:59:59.999Z", "device_id_hash": "d4"}],  # too old
    "Shop": [crash_at("2026-03-09T12:00:00Z", device_model="iPhone16,1", device_id_hash="d1"),
             start_at("2026-03-12T10:00:00Z", session_id="s1", device_id_hash="d1")],
    "Beta": [crash_at("2026-03-10T12:00:00Z", "Z", device_model="iPad", device_id_hash="d9"),
             start_at("2026-03-12T10:00:00Z", session_id="s1", device_id_hash="d9")]}


def test_figures_of_an_app_and_of_all_live_apps_are_those_worked_out_by_hand(api, clock):
    for app, reports in SMALL_WORLD.items():
        key = KEY if app == "default" else api.server.store.create_app(app, is_test=app == "Beta")
        for each in reports:
            assert api.post(CRASHES if "exception_type" in each else EVENTS, each, key=key)[0] == 201
    ties = sorted([("A", 3), ("E", 3, "latest")], key=lambda top: group_hash(top[0], []))
    expected = {
        "metrics/daily-crashes": series(WEEKDAYS, 1, 0, 1, 4, 1, 0, 0),
        "metrics/daily-crashes?app=default": series(WEEKDAYS, 0, 0, 1, 4, 1, 0, 0),
        "metrics/daily-crashes?app=Beta": series(WEEKDAYS, 0, 1, 0, 0, 0, 0, 0),
        "metrics/daily-crashes?days=1": series("2026-03-12", 4),
        "metrics/daily-crashes?days=8": series(
            " ".join(f"2026-03-{day:02}" for day in range(5, 13)), 3, 1, 0, 0, 1, 0, 1, 4),
        "metrics/crash-types": series("A E C D B", 3, 3, 2, 2, 1), "metrics/crash-types?days=1": series("E A", 3, 1),
        "metrics/crash-types?app=Shop": series("A", 1), "metrics/crash-types?app=Beta": series("Z", 1),
        "metrics/devices": series("iPhone15,2 iPhone16,1", 2, 2), "metrics/devices?app=Beta": series("iPad", 1),
        "metrics/devices?days=2": series("iPhone15,2 iPhone16,1", 1, 1),
        "overview": overview(56.25, 5, 16, 7, *ties, ("B", 1)),  # d1, d2, d3, fast; Shop's d1
        "overview?app=default": overview(60.0, 4, 15, 6, ("E", 3, "latest"), ("A", 2), ("B", 1)),
        "overview?app=Shop": overview(0.0, 1, 1, 1, ("A", 1)), "overview?app=Beta": overview(0.0, 1, 1, 1, ("Z", 1))}
    assert {path: api.get("/api/v1/" + path)[1] for path in expected} == expected
    year = api.get("/api/v1/metrics/daily-crashes?days=365")[1]
    assert (len(year["labels"]), year["labels"][0], sum(year["data"])) == (365, "2025-03-13", 10)
    clock.move(6 * 24 * 3600)  # Wednesday 18 March, 14:30
    assert api.get("/api/v1/metrics/daily-crashes")[1] == series(WEEKDAYS, 0, 0, 0, 4, 0, 0, 0)
    assert api.get("/api/v1/overview")[1] == overview(0.0, 0, 2, 4, ("E", 3, "latest"), ("A", 1))
    clock.move(2 * 24 * 3600)
    assert api.get("/api/v1/overview")[1] == overview(100.0, 0, 0, 0)
    assert api.get("/api/v1/metrics/crash-types")[1] == expected["metrics/crash-types"]


@pytest.mark.parametrize("character, length, least", [
    ("\U0001f4a5", 497, 9), ("\x01", 497, 18), ("\\", 497, 45), ("T", 1, 100)])
def test_public_answers_show_100_names_and_ten_models_or_as_many_as_fit_into_64_kb(api, character, length, least):
    name = character * length
    names = [f"{name}{n:03}" for n in range(200)]
    crashes = [crash_at(NOW, each, device_model=each, exception_reason=name, app_version=each) for each in names]
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


def test_crash_free_rate_is_within_0_and_100_with_two_decimals():
    rates = {(0, 0): 100.0, (1, 0): 0.0, (0, 5): 100.0, (5, 5): 0.0, (9, 5): 0.0, (1, 3): 66.67, (23, 12456): 99.82,
             (3, 200): 98.5}
    assert {each: backfeedr.crash_free_rate(*each) for each in rates} == rates


@pytest.mark.parametrize("occurred_at, counts", [
    ("2026-03-12T23:59:59.999Z", [0, 1, 0]), ("2026-03-13T00:00:00Z", [0, 0, 1]), ("2026-03-13T00:03:00Z", [0, 0, 1]),
    ("2026-03-13T00:03:00.001Z", [0, 1, 0]), ("2006-12-31T23:59:59.9Z", [0, 1, 0]), ("2007-01-01T00:00:00Z", [0] * 3)])
def test_a_clock_is_believed_since_2007_and_up_to_five_minutes_ahead(api, clock, occurred_at, counts):
    clock.seconds = parse_time("2026-03-12T23:58:00Z") / 1000
    api.post(CRASHES, crash_at(occurred_at))
    clock.move(24 * 3600)
    assert api.get("/api/v1/metrics/daily-crashes?days=3")[1] == series("2026-03-11 2026-03-12 2026-03-13", *counts)
    assert report(api.server)["occurred_at"] == parse_time(occurred_at)


def test_an_app_name_beyond_ascii_is_found_however_it_is_encoded(api):
    api.server.store.create_app("Caf\u00e9")
    for query in ("app=Caf%C3%A9", "app=Caf\u00c3\u00a9"):
        assert api.web.get("/api/v1/overview", extra_environ={"QUERY_STRING": query}).status_int == 200


@pytest.mark.parametrize("paths, name, values", [
    (METRICS + LISTS[:1], "days", ["0", "366", "-1", "", "x", "1.5", "%D9%A1", "7%0A", "1&days=0", "00001"]),
    (METRICS + LISTS, "app", ["nope", "%00", "%FF", "default%20", "x" * 5000, "' or 1=1 --"]),
    (LISTS, "limit", ["0", "101", "x"]), (LISTS, "cursor", ["x"])])
def test_questions_that_make_no_sense_are_refused(api, paths, name, values):
    api.post(CRASHES, crash_at(NOW))
    queries = [f"{path}?{name}={value}" for path in paths for value in values]
    assert {query: api.get(query, **ADMIN) for query in queries} == dict.fromkeys(
        queries, (404, {"error": "not found"}) if name == "app" else (400, {"error": f"invalid {name}"}))
    assert api.get("/api/v1/crashes/0123456789abcdef", **ADMIN) == (404, {"error": "not found"})


@pytest.mark.parametrize("public", [True, False])
def test_lists_need_the_admin_token_and_metrics_where_they_are_not_public(serve, public):
    api = Api(serve(public_metrics=public))
    for path in LISTS + ([] if public else METRICS):
        for header, word in ((None, "missing"), ("Basic " + TOKEN, "missing"), ("Bearer " + KEY, "invalid")):
            answer = api.get(path, **({"Authorization": header} if header else {}))
            assert answer == (401, {"error": f"{word} admin token"}), (path, header)
    for path in METRICS:
        assert api.get(path, **({} if public else ADMIN))[0] == 200
    assert api.get("/api/v1/health") == (200, {"status": "ok"})


# What each question looks up by which key. A SCAN is only of apps, of what it has put together itself, or of a page.
BY_DAY, BY_SEQ = "USING PRIMARY KEY (app_id=? AND day>? AND day<?)", "USING INTEGER PRIMARY KEY (rowid=?)"
LABELS = "labels USING PRIMARY KEY (app_id=? AND field=? AND day>? AND day<?)"
GROUP = "groups USING PRIMARY KEY (app_id=? AND group_hash=?)"
GROUP_CRASHES = "crashes USING COVERING INDEX crashes_by_group (app_id=? AND group_hash=?)"
SESSION = ["events USING INTEGER PRIMARY KEY (rowid>? AND rowid<?)",
           "sessions USING PRIMARY KEY (app_id=? AND session_id=?)"]
PLANS = {
    "daily_crashes": [f"crash_days {BY_DAY}"], "active_devices": [f"active_days {BY_DAY}"],
    "sessions": [f"session_days {BY_DAY}"], "retention": [f"cohorts {BY_DAY}"],
    "crash_types": [LABELS], "devices": [LABELS],
    "overview": [f"crash_days {BY_DAY}", f"session_days {BY_DAY}", f"group_days {BY_DAY}",
                 "device_hours USING PRIMARY KEY (app_id=? AND hour>?)", GROUP],
    "releases": [f"release_days {BY_DAY}", f"session_days {BY_DAY}", "releases USING PRIMARY KEY (app_id=?)",
                 "release_sums USING PRIMARY KEY (app_id=? AND app_version=?)", f"apps {BY_SEQ}"],
    "groups": ["crashes USING COVERING INDEX crashes_by_group (app_id=?)", GROUP, GROUP_CRASHES],
    "group": [f"crashes {BY_SEQ}", GROUP, GROUP_CRASHES], "crash": [f"crashes {BY_SEQ}"],
    "group_days": [GROUP_CRASHES[:-1] + " AND received_at>?)"], "events": SESSION, "session": SESSION,
    "a commit": [f"{table} USING PRIMARY KEY (app_id=? AND {key})" for table, key in (
        ("devices", "device=?"), ("device_days", "device=? AND day>? AND day<?"),
        ("device_versions", "device=? AND app_version=?"), ("sessions", "session_id=? AND device=?"))]}


@sqlite_only
@pytest.mark.parametrize("question", PLANS)
def test_each_question_and_a_commit_look_up_what_they_need_by_an_index(api, question):
    event = {**EVENT, "app_version": "1.0", "session_id": "s", "device_id_hash": "d"}
    crash, queries = api.post(CRASHES, {**CRASH, "app_version": "1.0"})[1], []
    api.post(EVENTS, event)
    given = {"group": {"group_hash": crash["group_hash"]}, "group_days": {"groups": [crash["group_hash"]]},
             "events": {"session_id": "s"}, "session": {"session_id": "s"}, "crash": {"id": crash["id"]}}
    with api.server.store.reading() as reader:  # is handed out again to whoever reads next
        db = api.server.store._here.writer if question == "a commit" else reader
    db.set_trace_callback(queries.append)
    if question == "a commit":
        api.post(EVENTS, {**event, "occurred_at": "2026-03-01T00:00:00Z"})
    else:
        getattr(api.server.metrics, question)(**given.get(question, {}))
    db.set_trace_callback(None)
    steps = {re.sub("(?<=SEARCH) TABLE|(?<=SCAN) TABLE| AS \\w+| LEFT-JOIN", "", step)  # as versions of SQLite differ
             for query in queries if query.split()[0].lower() in ("select", "with")
             for *_, step in db.execute("explain query plan " + query)}
    assert {f"SEARCH {step}" for step in PLANS[question]} <= steps
    assert not {step.split()[1] for step in steps if step.startswith("SCAN ")} & {"crashes", "events", *backfeedr.KEYS}


def iso_time(ms):
    return time_text(ms // 1000)[:-1] + (f".{ms % 1000:03}Z" if ms % 1000 else "Z")


def per_cent(part, whole):
    return float(round(Fraction(100 * part, whole), 2))


def slow_rate(crashes, sessions):
    """100 x (1 - crashes / sessions) within 0 to 100, as the contract has it."""
    return per_cent(max(0, sessions - crashes), sessions) if sessions else 0.0 if crashes else 100.0


def by_frequency(values, most=20):
    ranked = sorted(Counter(each for each in values if each).items(), key=lambda row: (-row[1], row[0]))[:most]
    return {"labels": [label for label, _ in ranked], "data": [count for _, count in ranked]}


class Acknowledged(dict):
    """A report that was acknowledged, as the admin sees it, and what counts of it."""

    def __init__(self, sent, app, received, id, group):
        super().__init__({name: value for name, value in sent.items() if value not in (None, "") and name != "zone"},
                         id=id, app=app, received_at=iso_time(received),
                         **({"extra": {"zone": sent["zone"]}} if "zone" in sent else {}))
        occurred = parse_time(sent["occurred_at"])
        self.at = occurred if 1_167_609_600_000 <= occurred <= received + 300_000 else received
        self.day, self.app, self.received, self.forgotten = self.at // DAY, app, received, False
        self.device = (app, self["device_id_hash"]) if "device_id_hash" in self else None
        self.version, self.group, self.type, self.model = (
            self.get("app_version"), group, self.get("exception_type"), group and self.get("device_model"))


class Slow:
    """What the README and the contract promise of a list of reports, each answer by loops over all of it."""

    def __init__(self, reports, apps, now):
        self.apps, self.now, self.today = apps, now, now // DAY
        self.ever = [report for report in reports if report.app in apps]
        self.reports = [report for report in self.ever if not report.forgotten]
        self.crashes = [report for report in self.reports if report.group]
        self.events = [report for report in self.reports if not report.group]
        self.device_days, sessions, self.sessions = defaultdict(set), defaultdict(list), []
        for n, report in enumerate(self.reports):
            self.device_days[report.device].add(report.day)
            sessions[report.app, report.get("session_id", n), report.device].append(report)
        self.device_days.pop(None, None)
        for events in sessions.values():
            starts = [event for event in events if event.get("type") == "session_start"]
            for start in sorted(starts, key=lambda event: event.at)[:1]:
                end = max((event.at for event in events if event["type"] == "session_end"), default=0)
                lasted = end - start.at if 0 <= end - start.at <= DAY else None
                self.sessions.append((start.app, start.version, start.day, lasted))

    def is_of_last(self, days, day):
        return not days or self.today - days < day <= self.today

    def per_day(self, days, figures):
        shown = range(self.today - days + 1, self.today + 1)
        rows = [{"labels": iso_time(day * DAY)[:10], **figures(day)} for day in shown]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def crashes_of(self, day):
        return {"data": sum(crash.day == day for crash in self.crashes)}

    def weekdays(self):
        week, monday = self.per_day(7, self.crashes_of)["data"], (3 - self.today) % 7  # 1970 began on a Thursday
        return series(WEEKDAYS, *week[monday:], *week[:monday])

    def labels(self, field, days, most):
        return by_frequency((getattr(crash, field) for crash in self.crashes if self.is_of_last(days, crash.day)), most)

    def active(self, day):
        return {name: sum(any(day - span < each <= day for each in days) for days in self.device_days.values())
                for name, span in (("dau", 1), ("wau", 7), ("mau", 30))}

    def sessions_of(self, day):
        mine = [(lasted, app) for app, _, started, lasted in self.sessions if started == day]
        ended = sorted(row for row in mine if row[0] is not None)
        is_of_one_app = len({app for _, app in ended}) == 1
        return {"sessions": len(mine),
                "median_seconds": two_digits(ended[(len(ended) - 1) // 2][0]) if is_of_one_app else None,
                "mean_seconds": round(sum(ms for ms, _ in ended) / len(ended) / 1000, 1) if ended else None}

    def retention(self, day):
        new = [days for days in self.device_days.values() if min(days) == day]
        return {"devices": len(new), **{
            f"day_{later}": per_cent(sum(day + later in days for days in new), len(new))
            if new and day + later < self.today else None for later in (1, 7, 30)}}

    def overview(self):
        crashes = [crash.group for crash in self.crashes if self.is_of_last(7, crash.day)]
        sessions = sum(self.is_of_last(7, day) for _, _, day, _ in self.sessions)
        hour, top = (self.now - DAY) // HOUR * HOUR, by_frequency(crashes, 5)
        return {"crash_free_rate_7d": slow_rate(len(crashes), sessions),
                "dau": len({report.device for report in self.reports if report.at >= hour} - {None}),
                "sessions_7d": sessions, "crashes_7d": len(crashes),
                "top_crashes": [{**self.named(group), "count": count} for group, count in zip(*top.values())]}

    def named(self, group):
        """With the reason of its latest crash; of two at once, of the first app's that came last there."""
        *_, latest = max((crash.at, -self.apps.index(crash.app), n, crash) for n, crash in enumerate(self.crashes)
                         if crash.group == group)
        return {"group_hash": group, "exception_reason": latest.get("exception_reason", ""),
                "exception_type": "(other)" if group == "(other)" else latest["exception_type"]}

    def releases(self):
        found = []
        for app, version in {(report.app, report.version) for report in self.ever if report.version}:
            received = [report.received for report in self.ever if (report.app, report.version) == (app, version)]
            mine = [report for report in self.reports if (report.app, report.version) == (app, version)]
            crashes = [report for report in mine if report.group]
            devices, crashed = (len({report.device for report in some} - {None}) for some in (mine, crashes))
            sessions = sum(session[:2] == (app, version) for session in self.sessions)
            recent = [row[1] for row in self.sessions if row[0] == app and self.is_of_last(7, row[2])]
            found.append((-min(received), version, self.apps.index(app), {
                "app": app, "app_version": version, "sessions": sessions, "crashes": len(crashes),
                "crash_free_sessions": slow_rate(len(crashes), sessions),
                "crash_free_devices": slow_rate(crashed, devices),
                "adoption": per_cent(recent.count(version), len(recent)) if recent else 0.0,
                "first_seen": iso_time(min(received)), "last_seen": iso_time(max(received))}))
        return {"releases": [row for *_, row in sorted(found)[:100]]}

    def groups(self, version=None, days=None):
        groups = defaultdict(list)
        for crash in self.crashes:
            if self.is_of_last(days, crash.day) and version in (None, crash.get("app_version")):
                groups[crash.group].append(crash)
        return sorted(map(self.spread, groups.values()), key=lambda row: (-row["count"], row["group_hash"]))

    def spread(self, crashes):
        return {**self.named(crashes[0].group), "count": len(crashes),
                "devices": len({crash.device for crash in crashes} - {None}),
                "first_seen": iso_time(min(crash.at for crash in crashes)),
                "last_seen": iso_time(max(crash.at for crash in crashes)),
                "versions": sorted({crash.get("app_version") for crash in crashes} - {None},
                                   key=lambda version: list(map(int, version.split("."))))}

    def group(self, group):
        crashes = [crash for crash in self.crashes if crash.group == group]
        return {**self.spread(crashes), "reports": crashes[::-1], **{
            part: by_frequency(crash.get(field) for crash in crashes) for part, field in (
                ("versions", "app_version"), ("systems", "os_version"), ("device_models", "device_model"))}}

    def answers(self, dice, with_lists):
        """Path, query and answer of each question; where the query has a limit, all pages of the list together."""
        yield "overview", {}, self.overview()
        yield "releases", {}, self.releases()
        yield "metrics/daily-crashes", {}, self.weekdays()
        for days in (None, dice.choice([1, 2, 3, 7]), dice.choice([8, 31, 60])):
            query, shown = ({"days": days}, days) if days else ({}, 30)
            yield "metrics/crash-types", query, self.labels("type", days, 100)
            yield "metrics/devices", query, self.labels("model", days, 10)
            yield "metrics/active-devices", query, self.per_day(shown, self.active)
            yield "metrics/sessions", query, self.per_day(shown, self.sessions_of)
            yield "metrics/retention", query, self.per_day(shown, self.retention)
            yield "metrics/daily-crashes", {"days": shown}, self.per_day(shown, self.crashes_of)
        if with_lists:
            for query in ({}, {"version": "2.0"}, {"days": dice.choice([1, 2, 7])}, {"version": "1.10.0", "days": 9}):
                yield "crashes", {"limit": 2, **query}, {"groups": self.groups(**query)}
            for group in {crash.group for crash in self.crashes[-2:]}:
                yield f"crashes/{group}", {"limit": 2}, self.group(group)
            for query in ({"session_id": f"s{dice.randrange(40)}"}, {"type": "error"}, {"type": "custom", "name": "x"}):
                found = [event for event in self.events[::-1] if query.items() <= event.items()]
                yield "events", {"limit": 2, **query}, {"events": found}
            yield "events", {"limit": 50}, {"events": self.events[::-1]}


class World:
    """Random reports over five weeks to three apps, with a note of each that was acknowledged."""

    def __init__(self, api, clock, seed, variety):
        self.api, self.clock, self.random, self.variety = api, clock, random.Random(seed), variety
        self.store = api.server.store
        self.keys = {"default": KEY, "Shop": self.store.create_app("Shop"), "Beta": self.store.create_app("Beta", True)}
        self.reports, self.sent, self.count, self.new_names, self.waiting = [], [], 0, Counter(), defaultdict(list)
        clock.seconds = parse_time("2026-02-20T09:00:00Z") / 1000

    def pass_time(self):
        """A step of minutes or hours, to near a midnight or to an hour sharp; or back, where a day has no limits."""
        chance, now, midnight = self.random, self.clock.seconds, (self.store.now // DAY + 1) * DAY / 1000
        self.clock.seconds = chance.choice([
            now + chance.randrange(8 * 90) / 8, now + chance.randrange(8 * 40_000) / 8,
            now - chance.randrange(8 * 10_000) / 8 if self.variety == 1 else now,
            max(now, midnight + chance.choice([-301, -300, -60, -0.125, 0, 0.125, 200])),
            midnight + 3600 * chance.randrange(30)])

    def moment(self):
        """A time on a device: mostly now, also early, late, fast, never set, or at the edge of a day or an hour."""
        chance, now = self.random, self.store.now
        return chance.choice([
            now, now, now, now + 300_000, now + 300_001, chance.choice([0, 0, 0, 1_167_609_599_999, 1_167_609_600_000]),
            *(edge - chance.randrange(2) for edge in (
                now // DAY * DAY, (now // DAY - 6) * DAY, (now - DAY) // HOUR * HOUR)),
            *(now - chance.randrange(span) for span in (60_000, 60_000, HOUR, 2 * DAY, 9 * DAY, 33 * DAY)),
            *(now + chance.randrange(span) for span in (300_001, 300_001, 9 * DAY))])

    def common(self):
        """The fields that all reports may have, some of them absent in one way or another."""
        chance = self.random
        given = {"device_id_hash": f"d{chance.randrange(14)}", "os_version": chance.choice(["18.3", "17.0"]),
                 "app_version": chance.choice(["1.9.0", "1.10.0", "1.10.0", "2.0", f"3.{self.store.now // (7 * DAY)}",
                                               f"4.{chance.randrange(self.variety)}"]),
                 "device_model": f"iPhone{chance.randrange(13 * self.variety)}", "zone": chance.randrange(9)}
        for name in chance.sample(sorted(given), chance.choice([0, 0, 1, 2])):
            given[name] = chance.choice([None, ""])
        return {name: value for name, value in given.items() if value is not None or chance.random() < 0.5}

    def crash(self):
        chance = self.random
        return {**self.common(), "exception_type": f"{chance.choice('AAABBCDEFG')}{chance.randrange(self.variety)}",
                "exception_reason": chance.choice([None, "", "why", f"crash {self.count}"]),
                "occurred_at": iso_time(self.moment()),
                "stack_trace": [{"frame": 0, "symbol": chance.choice("xy"), "file": chance.choice([None, "a.swift"])}]}

    def event(self, app):
        """One of a session, which come in any order and perhaps weeks apart, or of none."""
        waiting = self.waiting[app]
        if len(waiting) < 5 or self.random.random() < 0.2:
            self.begin_session(waiting)
        return waiting.pop(self.random.choice([0, self.random.randrange(len(waiting))]))

    def begin_session(self, waiting):
        """Mostly of one device. Some ids are used again, or are none."""
        chance, start, who = self.random, self.moment(), self.common()
        session = chance.choice([f"s{chance.randrange(40)}", f"s{chance.randrange(40)}", None, ""])
        lasts = chance.choice([0, 499, 500, 9_499, 9_500, 94_000, 104_000, DAY, DAY + 1, chance.randrange(600_000),
                               chance.randrange(9_000_000), chance.randrange(2 * DAY)])
        begin, end = ("session_start", 0), ("session_end", lasts)
        for kind, after in chance.choice([
                [begin, end], [begin, end], [begin, begin, end], [begin, ("session_end", -lasts)], [begin], [end],
                [begin, ("session_start", lasts), ("session_end", lasts // 2), ("session_end", 2 * lasts)],
                [end, begin, ("custom", 0), ("error", 0)]]):
            waiting.append({**(who if chance.random() < 0.9 else self.common()), "session_id": session,
                            "type": kind, "name": chance.choice(["x", "y", None]),
                            "occurred_at": iso_time(start + after)})

    def send(self):
        """A crash, an event or a batch; some signed, some under a key, which are now and then sent again."""
        chance, self.count = self.random, self.count + 1
        app = chance.choice(["default", "default", "Shop", "Shop", "Beta"])
        path = chance.choice([CRASHES, CRASHES, EVENTS, EVENTS, BATCH])
        bodies = [self.crash() if path == CRASHES else self.event(app)
                  for _ in range(chance.randrange(1, 9) if path == BATCH else 1)]
        raw = json.dumps({"events": bodies} if path == BATCH else bodies[0]).encode()
        headers = {"key": self.keys[app], **chance.choice([{}, {"Idempotency_Key": f"key {self.count}"}])}
        stamp = chance.choice([None, iso_time(self.store.now // 1000 * 1000)[:-1] + f".{self.count:09}Z"])
        post, args = (self.api.signed, [stamp]) if stamp else (self.api.post, [])
        status, answer = post(path, raw, *args, **headers)
        assert status == 201
        for body, id in zip(bodies, answer["ids"] if path == BATCH else [answer["id"]]):
            self.note(Acknowledged(body, app, self.store.now, id, answer.get("group_hash")))
        if stamp or len(headers) > 1:
            self.sent.append((self.store.now, 290_000 if stamp else 6 * DAY, post, (path, raw, *args), headers, answer))

    def note(self, report):
        """Beyond the day's limit of an app's new names, a report counts under (other)."""
        for field, most in zip(("group", "type", "model", "version"), backfeedr.NEW_NAMES.values()):
            name, today = getattr(report, field), (report.app, field, self.store.now // DAY)
            if name and not any(getattr(each, field) == name and each.app == report.app
                                and (field == "version" or not each.forgotten) for each in self.reports):
                self.new_names[today] += 1
                setattr(report, field, name if self.new_names[today] <= most else "(other)")
        report.update({"group_hash": report.group} if report.group else {})
        self.reports.append(report)

    def send_again(self):
        """An exact replay, while its key (7 days) or its signature (300 s) is known, whatever the clock does."""
        fresh = [row for row in self.sent if abs(self.store.now - row[0]) < row[1]]
        if fresh:
            _, _, post, args, headers, answer = self.random.choice(fresh)
            assert post(*args, **headers) == (200, answer)

    def forget(self):
        device = f"d{self.random.randrange(14)}"
        known = [each for each in self.reports if each.get("device_id_hash") == device and not each.forgotten]
        assert self.store.forget_device(device) == +Counter(
            ("crashes" if each.group else "events" for each in known), devices=len({each.app for each in known}))
        for each in known:
            each.forgotten = True

    def answer(self, path, query):
        """The answer to a question; of a list, with the rows of all its pages, each but the last one full."""
        status, answer = self.api.get(f"/api/v1/{path}?{urlencode(query)}", **ADMIN)
        assert status == 200, (path, query, answer)
        for part in answer.keys() & {"groups", "reports", "events"}:
            following = answer.pop("next")
            assert len(answer[part]) == query["limit"] if following else len(answer[part]) <= query["limit"]
            if following:
                answer[part] += self.answer(path, {**query, "cursor": following})[part]
        return answer

    def compare(self, with_lists):
        for app in (None, *self.keys):
            slow = Slow(self.reports, [app] if app else ["default", "Shop"], self.store.now)
            for path, query, expected in slow.answers(self.random, with_lists):
                query = {**query, **({"app": app} if app else {})}
                assert self.answer(path, query) == expected, (path, query)


@pytest.mark.parametrize("seed, variety", [*((seed, 1) for seed in range(6)), (6, 40), (7, 40)])
def test_all_answers_equal_a_slow_and_obvious_computation_over_all_reports(serve, clock, monkeypatch, seed, variety):
    if variety > 1:
        monkeypatch.setattr(backfeedr, "NEW_NAMES", dict(group_hash=3, exception_type=2, device_model=2, app_version=1))
    world = World(Api(serve(rate_limit=0, retention_days=0)), clock, seed, variety)
    serve.unchecked.append(world.api.server)
    world.compare(with_lists=True)
    for until in ("2026-02-27T00:00:00Z", "2026-03-05T00:00:00Z", "2026-03-27T00:00:00Z"):
        while world.store.now < parse_time(until):
            for _ in range(world.random.randrange(1, 5)):
                world.send()
            world.send_again()
            if world.random.random() < 0.05:
                world.forget()
            world.pass_time()
        clock.seconds = ((world.store.now + 301_000) // DAY + 1) * DAY / 1000 - 120
        for _ in range(12):  # so that some of the fast clocks are in the next day
            world.send()
        world.forget()
        world.compare(with_lists=True)
        clock.move(130)
        world.compare(with_lists=False)  # nothing but the day is another
    assert len(world.reports) > 150
    assert (variety > 1) == any(report.group == "(other)" for report in world.reports)
    check_database(world.store.path, forgotten=True)


# == Backfeedr =================================================================

def test_a_server_may_leave_out_an_empty_path(serve):
    answered = []
    serve()({"REQUEST_METHOD": "GET", "SCRIPT_NAME": "/m", "wsgi.errors": sys.stderr},
            lambda line, headers, exc_info=None: answered.append(line))
    assert answered == ["303 See Other"]  # to signing in


def test_every_answer_of_the_reference(api):
    assert api.get("/api/v1/health") == (200, {"status": "ok"})
    status, answer = api.post(CRASHES, (EXAMPLES / "crash.json").read_bytes())
    assert status == 201 and set(answer) == {"id", "group_hash"} and answer["group_hash"] == "acc0d2dfe0c1898c"
    status, answer = api.post(EVENTS, (EXAMPLES / "event.json").read_bytes())
    assert status == 201 and set(answer) == {"id"} and answer["id"].startswith("evt_")
    status, answer = api.post(BATCH, (EXAMPLES / "batch.json").read_bytes())
    assert status == 201 and answer["count"] == 2 and all(each.startswith("evt_") for each in answer["ids"])
    assert set(api.get("/api/v1/overview")[1]) == {
        "crash_free_rate_7d", "dau", "sessions_7d", "crashes_7d", "top_crashes"}


@pytest.mark.parametrize("kind", ["session_start", "session_end", "error", "custom"])
def test_every_event_type_of_the_reference_is_taken(api, kind):
    assert api.post(EVENTS, {"type": kind, "occurred_at": NOW})[0] == 201
    assert report(api.server, "events")["type"] == kind


def test_a_key_is_needed_and_checked(api):
    assert api.post(CRASHES, CRASH, key=None) == (401, {"error": "missing API key"})
    assert api.post(CRASHES, CRASH, key="") == (401, {"error": "missing API key"})
    for key in ("nope", KEY.upper(), KEY[:-1], KEY + "0", "\u00fc"):
        assert api.post(CRASHES, CRASH, key=key) == (401, {"error": "invalid API key"})
    assert stored(api.server, "crashes") == {"crashes": []}


def test_a_key_beyond_ascii_works(serve):
    api = Api(serve(api_key="clé"))
    assert api.post(CRASHES, CRASH, key="clé".encode().decode("latin-1"))[0] == 201


@pytest.mark.parametrize("path, status, text", [
    ("/nothing", 404, "not found"), ("/api/v1", 404, "not found"), ("/api/v1/", 404, "not found"),
    ("/api/v1/nope", 404, "not found"), ("/api/v1/health/", 404, "not found"), ("/api/v1//health", 404, "not found"),
    ("/api/v2/health", 404, "not found"), ("/api/v1/../v1/health", 404, "not found"),
    ("/api/v1/health%00", 404, "not found"), ("/api/v1/health%FF", 404, "not found"),
    (BATCH, 405, "method not allowed")])
def test_a_wrong_path_or_method_is_answered_in_json(api, path, status, text):
    assert api.get(path) == (status, {"error": text})
    assert api.headers.get("Allow") == ("POST" if status == 405 else None)
    assert (api.headers["Cache-Control"], api.headers["X-Content-Type-Options"]) == ("no-store", "nosniff")


@pytest.mark.parametrize("path", [CRASHES, EVENTS])
def test_reports_are_posted_or_read(api, path):
    answer = api.web.put(path, expect_errors=True)
    assert (answer.status_int, answer.json) == (405, {"error": "method not allowed"})
    assert set(answer.headers["Allow"].split(",")) == {"GET", "POST"}


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_metrics_can_only_be_read(api, method):
    for path in [*METRICS, "/api/v1/health"]:
        answer = api.web.request(path, method=method, expect_errors=True)
        assert (answer.status_int, answer.json, answer.headers["Allow"]) == (405, {"error": "method not allowed"}, "GET")
    assert api.web.head("/api/v1/health").status_int == 200


def test_checks_go_size_key_rate_signature_json(serve):
    """Each request has all the faults but those that were mended before it."""
    api = Api(serve(rate_limit=1, max_body_size=100))
    bad = {"X_Backfeedr_Timestamp": NOW, "X_Backfeedr_Signature": "sha256=0"}
    assert api.post(CRASHES, b"x" * 101, key="nope", **bad)[0] == 413
    assert api.post(CRASHES, b"x", key="nope", **bad) == (401, {"error": "invalid API key"})
    assert api.post(CRASHES, CRASH)[0] == 201
    assert api.post(CRASHES, b"x", **bad)[0] == 429
    api.server._limiter.limit = 100
    assert api.post(CRASHES, b"x", **bad) == (401, {"error": "invalid signature"})
    assert api.post(CRASHES, b"x") == (400, {"error": "invalid JSON"})
    assert api.post(CRASHES, b"{}") == (400, {"error": "missing exception_type"})


def padded(size):
    body = json.dumps(CRASH).encode()
    return body + b" " * (size - len(body))


def test_a_body_of_the_limit_is_taken_and_one_byte_more_is_not(serve):
    api = Api(serve(max_body_size=1000))
    assert api.post(CRASHES, padded(1000))[0] == 201
    assert api.post(CRASHES, padded(1001)) == (413, {"error": "request body too large"})
    assert api.post(CRASHES, gzip.compress(padded(1000)), Content_Encoding="gzip")[0] == 201
    assert api.post(CRASHES, gzip.compress(padded(1001)), Content_Encoding="gzip") \
        == (413, {"error": "request body too large"})
    assert api.post(CRASHES, gzip.compress(b" " * 100_000_000), Content_Encoding="gzip")[0] == 413
    assert len(stored(api.server, "crashes")["crashes"]) == 2


def test_the_default_limit_is_a_mebibyte(api):
    assert api.post(CRASHES, padded(1_048_576))[0] == 201
    assert api.post(CRASHES, padded(1_048_577))[0] == 413


@pytest.mark.parametrize("limit, status", [(len(json.dumps(CRASH)), 201), (len(json.dumps(CRASH)) - 1, 413)])
def test_a_body_without_a_length_is_bounded_too(serve, limit, status):
    server = serve(max_body_size=limit)
    body = json.dumps(CRASH).encode()
    answered = []
    environ = {**webtest.TestRequest.blank(CRASHES, method="POST").environ, "HTTP_X_BACKFEEDR_KEY": KEY,
               "wsgi.input": io.BytesIO(body), "wsgi.input_terminated": True}
    environ.pop("CONTENT_LENGTH", None)
    server(environ, lambda line, headers, exc_info=None: answered.append(int(line.split()[0])))
    assert answered == [status]


@pytest.mark.parametrize("length, expected", [
    ("9" * 5000, (413, "request body too large")), ("-1", (400, "invalid Content-Length")),
    ("1e3", (400, "invalid Content-Length")), ("\u00b2", (400, "invalid Content-Length"))])
def test_a_length_that_is_none_is_refused(serve, length, expected):
    answered = []
    environ = {**webtest.TestRequest.blank(CRASHES, method="POST").environ, "HTTP_X_BACKFEEDR_KEY": KEY,
               "CONTENT_LENGTH": length}
    body, = serve()(environ, lambda line, headers, exc_info=None: answered.append(int(line.split()[0])))
    assert (answered[0], json.loads(body)["error"]) == expected


@pytest.mark.parametrize("encoding, body, expected", [
    ("gzip", gzip.compress(json.dumps(CRASH).encode()), 201),
    ("GZIP", gzip.compress(json.dumps(CRASH).encode()), 201),
    ("identity", json.dumps(CRASH).encode(), 201),
    ("br", b"x", (415, "unsupported content encoding")),
    ("gzip, gzip", b"x", (415, "unsupported content encoding")),
    ("\u00fc", b"x", (415, "unsupported content encoding")),
    ("gzip", json.dumps(CRASH).encode(), (400, "invalid gzip body")),
    ("gzip", gzip.compress(json.dumps(CRASH).encode())[:-1], (400, "invalid gzip body")),
    ("gzip", gzip.compress(json.dumps(CRASH).encode()) + b"x", (400, "invalid gzip body")),
    ("gzip", b"", (400, "invalid gzip body"))])
def test_content_encodings(api, encoding, body, expected):
    status, answer = api.post(CRASHES, body, Content_Encoding=encoding)
    assert (status if status == 201 else (status, answer["error"])) == expected
    assert len(stored(api.server, "crashes")["crashes"]) == (status == 201)


def test_a_signature_covers_the_bytes_as_sent(api):
    assert api.signed(CRASHES, gzip.compress(json.dumps(CRASH).encode()), NOW, Content_Encoding="gzip")[0] == 201


def test_curls_default_content_type_is_taken(api):
    answer = api.web.post(CRASHES, json.dumps(CRASH).encode(), {"X-Backfeedr-Key": KEY},
                          content_type="application/x-www-form-urlencoded")
    assert answer.status_int == 201


def test_an_unexpected_error_is_logged_once_and_tells_nothing(api, caplog, monkeypatch):
    monkeypatch.setattr(backfeedr, "parse_crash", lambda given: 1 / 0)
    assert api.post(CRASHES, CRASH) == (500, {"error": "internal server error"})
    assert [record.exc_info[0] for record in caplog.records] == [ZeroDivisionError]
    assert stored(api.server, "crashes") == {"crashes": []}


def test_mounted_under_a_prefix_it_answers_there(serve):
    server = serve()

    def host(environ, start_response):
        if environ["PATH_INFO"].startswith("/crashes/"):
            environ = {**environ, "SCRIPT_NAME": "/crashes", "PATH_INFO": environ["PATH_INFO"][len("/crashes"):]}
            return server(environ, start_response)
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"host"]

    web = webtest.TestApp(host)
    assert web.get("/").text == "host"
    assert web.get("/crashes/api/v1/health").json == {"status": "ok"}
    answer = web.post("/crashes/api/v1/crashes", json.dumps(CRASH).encode(), {"X-Backfeedr-Key": KEY})
    assert answer.status_int == 201 and report(server)["id"] == answer.json["id"]
    assert web.get("/crashes/nope", expect_errors=True).json == {"error": "not found"}


def test_mounted_in_a_bottle_app_it_leaves_the_hosts_answers_alone(serve):
    import bottle
    host = bottle.Bottle()
    host.route("/", callback=lambda: "host")
    host.mount("/crashes/", serve())
    web = webtest.TestApp(host)
    answer = web.post("/crashes/api/v1/crashes", json.dumps(CRASH).encode(), {"X-Backfeedr-Key": KEY})
    assert answer.status_int == 201
    assert web.get("/").text == "host" and web.get("/").content_type == "text/html"


def test_two_instances_share_nothing(serve):
    one, two = Api(serve("one.db", rate_limit=1)), Api(serve("two.db", api_key="other"))
    assert one.post(CRASHES, CRASH)[0] == 201
    assert two.post(CRASHES, CRASH) == (401, {"error": "invalid API key"})
    assert two.post(CRASHES, CRASH, key="other")[0] == 201
    assert two.post(EVENTS, EVENT, key="other")[0] == 201
    assert one.post(CRASHES, CRASH)[0] == 429
    assert [len(stored(each.server, "crashes")["crashes"]) for each in (one, two)] == [1, 1]
    assert [len(stored(each.server, "events")["events"]) for each in (one, two)] == [0, 1]


def test_importing_starts_nothing(tmp_path):
    code = ("import threading, os, backfeedr; assert threading.active_count() == 1; "
            "assert not os.listdir('.'), os.listdir('.')")
    environ = {**os.environ, "PYTHONPATH": str(SERVER.parent), "BACKFEEDR_PORT": "nonsense",
               "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ, check=True)


def test_settings_come_from_the_environment_unless_given(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKFEEDR_API_KEY", KEY)
    with Backfeedr(db_path=str(tmp_path / "a.db"), announce=lambda text: None) as server:
        assert Api(server).post(CRASHES, CRASH)[0] == 201
    with Backfeedr(Settings(db_path=str(tmp_path / "b.db")), announce=lambda text: None) as server:
        assert Api(server).post(CRASHES, CRASH)[0] == 401
    with pytest.raises(TypeError):
        Backfeedr(Settings(), port=1)


def test_a_first_start_makes_and_tells_a_key_and_a_token_once(tmp_path):
    told = []
    settings = Settings(db_path=str(tmp_path / "first.db"), public_metrics=False)
    for _ in range(2):
        Backfeedr(settings, announce=told.append).close()
    text, = told
    key, = re.findall("^    (bf_live_[0-9a-f]{32})$", text, 8)
    token, = re.findall("^    (bf_admin_[0-9a-f]{32})$", text, 8)
    with Backfeedr(settings, announce=told.append) as server:
        api = Api(server)
        assert api.post(CRASHES, CRASH, key=key)[0] == 201
        assert api.get("/api/v1/overview", Authorization=f"Bearer {token}")[0] == 200
    assert f"X-Backfeedr-Key: {key}" in text and "curl -X POST http://127.0.0.1:8080/api/v1/crashes" in text


def test_a_first_start_tells_the_address_under_which_clients_reach_the_server(tmp_path):
    told = []
    settings = Settings(db_path=str(tmp_path / "first.db"), public_url="https://example.com/a/")
    Backfeedr(settings, announce=told.append).close()
    assert "curl -X POST https://example.com/a/api/v1/crashes " in told[0] and "127.0.0.1" not in told[0]


def test_given_secrets_are_taken_and_not_told(tmp_path):
    told = []
    settings = Settings(db_path=str(tmp_path / "first.db"), api_key="mine", auth_token="token")
    with Backfeedr(settings, announce=told.append) as server:
        assert Api(server).post(CRASHES, CRASH, key="mine")[0] == 201
        assert server.store.is_admin(b"token") and not server.store.is_admin(b"mine")
    with Backfeedr(Settings(db_path=settings.db_path, auth_token="new"), announce=told.append) as server:
        assert server.store.is_admin(b"new") and not server.store.is_admin(b"token")
        assert Api(server).post(CRASHES, CRASH, key="mine")[0] == 201
    assert told == []


def test_a_database_with_an_app_gets_no_default_one(tmp_path):
    path = str(tmp_path / "shop.db")
    with Store(path) as store:
        store.create_app("Shop")
    told = []
    with Backfeedr(Settings(db_path=path), announce=told.append) as server:
        assert [app.name for app in server.store.apps()] == ["Shop"]
    assert "bf_admin_" in told[0] and "bf_live_" not in told[0]


# -- Prometheus

def scraped(api):
    """The samples of /metrics, by what stands before them; each name has its help and its type."""
    answer = api.web.get(api.prefix + "/metrics", headers={"Authorization": "Bearer " + TOKEN})
    assert (answer.status_int, answer.content_type) == (200, "text/plain")
    assert "version=0.0.4" in answer.headers["Content-Type"]
    lines = answer.text.splitlines()
    samples = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    families = [re.sub("(_bucket|_sum|_count)?([{].*)?$", "", name) for name in samples]
    for word in ("HELP", "TYPE"):
        assert [line.split()[2] for line in lines if line.startswith(f"# {word} ")] == list(dict.fromkeys(families))
    return {name.replace("backfeedr_", "", 1): float(value) for name, value in samples.items()}


def test_requests_are_counted_by_route_and_status_and_never_by_what_a_stranger_types(api):
    api.post(CRASHES, CRASH)
    api.post(CRASHES, CRASH, key="nobody's")
    for path in ("/api/v1/crashes/1", "/api/v1/crashes/2", "/nothing", "/nothing/else"):
        api.get(path, **ADMIN)
    api.get("/api/v1/events/batch")
    requests = {name: count for name, count in scraped(api).items() if name.startswith("requests_total")}
    assert requests == {
        'requests_total{method="POST",path="/api/v1/crashes",status="201"}': 1,
        'requests_total{method="POST",path="/api/v1/crashes",status="401"}': 1,
        'requests_total{method="GET",path="/api/v1/crashes/<group_hash>",status="404"}': 2,
        'requests_total{method="other",path="other",status="404"}': 2,
        'requests_total{method="other",path="other",status="405"}': 1}
    assert scraped(api)['requests_total{method="GET",path="/metrics",status="200"}'] == 1


@sqlite_only
def test_commits_rows_and_sizes_are_told_to_prometheus(serve):
    server = serve()
    api = Api(server)
    api.post(CRASHES, CRASH)
    api.post(BATCH, {"events": [EVENT] * 5})
    api.post(BATCH, {"events": [EVENT, {}]})
    samples = scraped(api)
    assert {name: value for name, value in samples.items() if not re.match("requests|.*_seconds|.*_bytes", name)} == {
        **{f'commit_requests_bucket{{le="{bound}"}}': 2 for bound in (1, 2, 4, 8, 16, 32, 64, 128, "+Inf")},
        "commit_requests_sum": 2, "commit_requests_count": 2, "waiters": 0, "crashes_kept": 1,
        'reports_stored_total{table="crashes"}': 1, 'reports_stored_total{table="events"}': 5}
    assert samples["commit_seconds_count"] == samples['commit_seconds_bucket{le="+Inf"}'] == 2
    assert 0 < samples["commit_seconds_sum"] < 10
    for name, suffix in (("file", ""), ("wal", "-wal")):
        assert samples[name + "_bytes"] == os.stat(f"{server.store.path}{suffix}").st_size > 0
    other = Api(serve())
    other.get("/api/v1/health")
    assert scraped(other)["commit_requests_count"] == 0, "of this process and server"


def test_only_the_admin_is_told_and_a_refusal_is_json(api):
    assert api.get("/metrics") == (401, {"error": "missing admin token"})
    assert api.get("/metrics", Authorization="Bearer x") == (401, {"error": "invalid admin token"})
    assert api.post("/metrics", {}) == (405, {"error": "method not allowed"})


def test_requests_under_another_bottle_are_counted_by_their_own_routes(serve):
    server, outer = serve(), backfeedr.bottle.Bottle()
    outer.mount("/deep/", server)
    api = Api(outer, "/deep")
    for path in ("/api/v1/health", "/nothing"):
        api.get(path)
    assert {name: count for name, count in scraped(api).items() if name.startswith("requests_total")} == {
        'requests_total{method="GET",path="/api/v1/health",status="200"}': 1,
        'requests_total{method="other",path="other",status="404"}': 1}


# == Hostile input =============================================================
#
# What a stranger may send, beyond the bodies of the Payloads section: each with its answer, and with nothing
# stored. Then as much again that no table has thought of: mutations of valid requests, from a fixed seed.

def call(server, method="POST", path=CRASHES, body=None, query="", length=None, **headers):
    """The status and JSON of a request, given to the server as a web server hands over what it got: by `environ`."""
    body = json.dumps(CRASH).encode() if body is None else body
    given = {"X_Backfeedr_Key": KEY, **headers}
    environ = {"REQUEST_METHOD": method, "SCRIPT_NAME": "", "PATH_INFO": path, "QUERY_STRING": query,
               "CONTENT_LENGTH": str(len(body) if length is None else length), "CONTENT_TYPE": "application/json",
               "wsgi.input": io.BytesIO(body), "wsgi.errors": sys.stderr,
               **{"HTTP_" + name.upper(): value for name, value in given.items() if value is not None}}
    answered = []
    content = b"".join(server(environ, lambda line, headers, exc_info=None: answered.append((line, dict(headers)))))
    (line, sent), = answered
    if path in ("", "/") and sent["Content-Type"].startswith("text/html"):  # the one page among what is tried
        return int(line.split()[0]), {}
    assert sent["Content-Type"] == "application/json"
    if method == "HEAD":
        return int(line.split()[0]), content or {}
    assert int(sent["Content-Length"]) == len(content)
    return int(line.split()[0]), json.loads(content)


GZIPPED = gzip.compress(json.dumps(CRASH).encode())
LIST = {"method": "GET", "path": EVENTS, "body": b""}
GROUP = {**LIST, "path": CRASHES + "/" + "0" * 16}
BEARER = {**LIST, "Authorization": "Bearer " + TOKEN}
SIGNED = {"X_Backfeedr_Timestamp": NOW,
          "X_Backfeedr_Signature": backfeedr.sign(KEY.encode(), NOW.encode(), json.dumps(CRASH).encode())}
NOT_JSON, NO_KEY, BAD_KEY = (400, "invalid JSON"), (401, "missing API key"), (401, "invalid API key")
TOO_LARGE, BAD_GZIP, BAD_CODING = ((413, "request body too large"), (400, "invalid gzip body"),
                                   (415, "unsupported content encoding"))
BAD_TIME, BAD_SIGNATURE = (400, "invalid timestamp"), (401, "invalid signature")
NO_TOKEN, BAD_TOKEN = (401, "missing admin token"), (401, "invalid admin token")
NOT_FOUND, NOT_ALLOWED = (404, "not found"), (405, "method not allowed")

HOSTILE_REQUESTS = [
    # a length that lies, a body that is too long, and one that becomes it
    ({"length": 1000}, (400, "invalid Content-Length")), ({"length": 10}, NOT_JSON), ({"length": 0}, NOT_JSON),
    ({"length": ""}, NOT_JSON), ({"length": 10_001}, TOO_LARGE), ({"length": "9" * 5000}, TOO_LARGE),
    ({"body": b" " * 10_001}, TOO_LARGE),
    *[({"length": length}, (400, "invalid Content-Length"))
      for length in ("-1", "+5", "1e3", "0x10", "5, 5", "\u00b2", "\u0661", " 5", "5\n", "five")],
    ({"body": gzip.compress(b" " * 1_000_000), "Content_Encoding": "gzip"}, TOO_LARGE),
    ({"body": gzip.compress(gzip.compress(b" " * 1_000_000)), "Content_Encoding": "gzip"}, NOT_JSON),
    # gzip that is none, is cut, is damaged, has more after it: one member, as every gzip library writes it
    *[({"body": body, "Content_Encoding": "gzip"}, BAD_GZIP) for body in (
        b"", b"\x1f\x8b", b"{}", GZIPPED[:-1], GZIPPED[:-8], GZIPPED[:12], GZIPPED + b"\x00", GZIPPED * 2,
        GZIPPED[:-8] + bytes(4) + GZIPPED[-4:], GZIPPED[:20] + b"\xff\xff" + GZIPPED[22:],
        b"\x1f\x8b\x08\xff" + GZIPPED[4:], zlib.compress(json.dumps(CRASH).encode()))],
    *[({"Content_Encoding": coding}, BAD_CODING)
      for coding in ("br", "deflate", "zstd", "gzip, gzip", "gzip,", "x", "g\u00fczip", "identity, gzip", "\xff" * 99)],
    # headers beyond ASCII, doubled, empty, long
    *[({"X_Backfeedr_Key": key}, BAD_KEY) for key in (
        KEY + ", " + KEY, KEY + "\xff", "\xfc", "\xc3\xbc", "\u0130", "\U0001f511", KEY + "\x00", KEY.upper(),
        "x" * 30_000)],
    ({"X_Backfeedr_Key": None}, NO_KEY), ({"X_Backfeedr_Key": ""}, NO_KEY),
    *[({**SIGNED, "X_Backfeedr_Timestamp": time}, BAD_TIME) for time in (
        "", "\xff", NOW + ", " + NOW, NOW + "\n", NOW[:-1], "0000-01-01T00:00:00Z", "2026-02-30T00:00:00Z",
        "2026-03-12T14:30:60Z", "2026-03-12T14:30:00+24:00", "1773325800", "\uff12026-03-12T14:30:00Z", "9" * 5000)],
    *[({**SIGNED, "X_Backfeedr_Timestamp": time}, BAD_SIGNATURE) for time in (
        "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-23:59", "2026-03-12T15:30:00+01:00")],
    ({**SIGNED, "X_Backfeedr_Timestamp": None}, BAD_TIME), ({**SIGNED, "X_Backfeedr_Signature": None}, BAD_SIGNATURE),
    *[({**SIGNED, "X_Backfeedr_Signature": signature}, BAD_SIGNATURE) for signature in (
        "", "\xff", "sha256=", "sha256=\u00e9", SIGNED["X_Backfeedr_Signature"] * 2, "sha1=" + "0" * 40,
        "sha256=" + "0" * 64, SIGNED["X_Backfeedr_Signature"] + ", " + SIGNED["X_Backfeedr_Signature"], "x" * 30_000)],
    *[({**LIST, "Authorization": token}, NO_TOKEN) for token in (
        None, "", "Bearer", "Bearer ", TOKEN, "Basic " + TOKEN, "B\xe9arer " + TOKEN, "Bearer\x00" + TOKEN)],
    *[({**LIST, "Authorization": "Bearer " + token}, BAD_TOKEN) for token in (
        KEY, "\xff", TOKEN + ", Bearer " + TOKEN, TOKEN + "\xff", TOKEN[:-1], "x" * 30_000)],
    # paths and methods
    *[({"method": "GET", "path": path, "body": b""}, NOT_FOUND) for path in (
        "/api/v1", "/api/v1/", "/api/v1/health/", "/api//v1/health", "//api/v1/health", "/api/v1/./health",
        "/api/v1/x/../health", "/../../etc/passwd", "/api/v1/health\x00", "/api/v1/health\n", "/api/v1/health\xff",
        "/api/v1/health\xc3\xa4", "/API/V1/HEALTH", "api/v1/health", "/api/v1/health;a=1", "/api/v1/metrics",
        "/api/v1/metrics/nope", "/api/v1/\u0130", "/" + "x" * 30_000, "/" * 1000, "/api/v1/crashes/" + "0" * 16 + "/")],
    *[({**BEARER, "path": CRASHES + "/" + group}, NOT_FOUND) for group in (
        "0" * 16, "..", "\x00", "'", "*", "\xc3\xa4", "%", "x" * 30_000)],
    *[({"method": method}, NOT_ALLOWED) for method in (
        "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "ANY", "PROXY", "", "\xff", "X" * 5000)],
    *[({"method": method, "path": path}, NOT_ALLOWED)
      for path in [*METRICS, "/api/v1/health", CRASHES + "/" + "0" * 16]
      for method in ("POST", "PUT", "DELETE", "OPTIONS")],
    # query strings
    *[({**BEARER, "path": "/api/v1/metrics/sessions", "query": "days=" + days}, (400, "invalid days")) for days in (
        "", "0", "-1", "366", "1.5", "1e2", "NaN", "9" * 5000, "%00", "7%00", "\xb2", "%d9%a1", "%ff", "+7", "7,7",
        "7&days=x")],
    *[({**BEARER, "query": "limit=" + limit}, (400, "invalid limit"))
      for limit in ("", "0", "101", "-1", "1000", "x", "%F0")],
    *[({**listing, "Authorization": "Bearer " + TOKEN, "query": "cursor=" + cursor}, (400, "invalid cursor"))
      for listing in (LIST, GROUP) for cursor in (
        "x", "0", "evt_", "evt_" + "8" + "0" * 15, "g" * 16, "0" * 15, "0" * 17, "0" * 16 + "%0A", "%00", "-1",
        "9" * 5000)],
    *[({**BEARER, "path": CRASHES, "query": "cursor=" + cursor}, (400, "invalid cursor")) for cursor in (
        "x", "0", "1-", "-" + "0" * 16, "9" * 19 + "-" + "0" * 16, "1-" + "0" * 15, "1-" + "G" * 16,
        "1-" + "0" * 16 + "%0A", "1--" + "0" * 16, "evt_" + "0" * 16, "9" * 5000)],
    *[({**BEARER, "path": path, "query": "app=" + app}, NOT_FOUND) for path in [*METRICS, CRASHES, EVENTS]
      for app in ("nope", "DEFAULT", "default%00", "%00", "%ff", "\xff", "'%20or%201=1", "x" * 30_000,
                  "default&app=nope")],
]


def test_a_hostile_request_has_its_answer_and_changes_nothing(serve, caplog):
    api = Api(serve(rate_limit=0, max_body_size=10_000))
    api.post(CRASHES, {**CRASH, "device_id_hash": "d", "app_version": "1.0"})
    api.post(EVENTS, start_at(NOW, session_id="s", device_id_hash="d"))
    for request, expected in HOSTILE_REQUESTS:
        before = stored(api.server)
        assert call(api.server, **request) == (expected[0], {"error": expected[1]}), request
        assert stored(api.server) == before, request
        assert call(api.server)[0] == 201, request
    assert caplog.records == []


def test_a_report_that_breaks_off_anywhere_is_refused(serve):
    api = Api(serve(rate_limit=0))
    for path, body in ((CRASHES, (EXAMPLES / "crash.json").read_bytes().strip()), (BATCH, batch_of(EVENT, EVENT))):
        for size in range(len(body)):
            assert api.post(path, body[:size]) == (400, {"error": "invalid JSON"}), size
        assert {table: rows for table, rows in stored(api.server).items() if rows} == {}
    assert api.post(BATCH, batch_of(EVENT, EVENT))[0] == 201


@pytest.mark.parametrize("place", [0, 50, 99])
@pytest.mark.parametrize("bad, text", [
    ({}, "missing type"), (None, "invalid event"), ([], "invalid event"), ("x", "invalid event"), (True,
     "invalid event"),
    ({**EVENT, "occurred_at": "2026-03-12T14:22:31+24:00"}, "invalid occurred_at"), ({**EVENT, "type": []},
     "invalid type"),
    ({**EVENT, "properties": []}, "invalid properties"), ({**EVENT, "name": {}}, "invalid name"),
    ({**EVENT, "deep": json.loads("[" * 70 + "]" * 70)}, "invalid JSON")])
def test_a_bad_event_keeps_its_whole_batch_out(api, place, bad, text):
    events = [EVENT] * 100
    events[place] = bad
    assert api.post(BATCH, {"events": events}) == (400, {"error": f"{text} at index {place}"})
    assert {table: rows for table, rows in stored(api.server).items() if rows} == {}
    assert api.post(BATCH, {"events": [EVENT] * 100})[0] == 201


@pytest.mark.parametrize("body, column, value", [
    (b'{"exception_type": "A", "exception_type": "B", "occurred_at": "2026-03-12T14:22:31Z"}', "exception_type", "B"),
    (b'{"exception_type": "A", "x": 1, "x": 2, "occurred_at": "2026-03-12T14:22:31Z"}', "extra", '{"x":2}'),
    (changed(CRASH, x=1 << 64), "extra", '{"x":18446744073709551616}'),
    (changed(CRASH, x=-1e-300), "extra", '{"x":-1e-300}'),
    (changed(CRASH, x={"\x00": 1, "\ud800": 2}), "extra", '{"x":{"\ufffd":2}}'),
    (changed(CRASH, occurred_at="0001-01-01T00:00:00Z"), "at", -62135596800000),
    (changed(CRASH, occurred_at="0001-01-01T00:00:00+23:59"), "at", -62135596800000 - 24 * HOUR + 60_000),
    (changed(CRASH, occurred_at="9999-12-31T23:59:59-23:59"), "at", parse_time(NOW)),
    (changed(CRASH, occurred_at="2026-03-12T14:35:00Z"), "at", parse_time("2026-03-12T14:35:00Z")),
    (changed(CRASH, occurred_at="2026-03-12T14:35:00.001Z"), "at", parse_time(NOW)),
    (changed(CRASH, app_version="9" * 500), "app_version", "9" * 500),
])
def test_an_odd_report_is_kept_and_can_be_read(api, body, column, value):
    assert api.post(CRASHES, body)[0] == 201
    row, = rows_of_table(api.server.store.path, "crashes")
    assert row[column] == value
    for path in [*METRICS, CRASHES, f"{CRASHES}/{row['group_hash']}"]:
        assert api.get(path, **ADMIN)[0] == 200


def test_headers_that_are_only_compared_may_hold_any_bytes(api):
    for n, mark in enumerate(("\xff\xfe", "a, a", "x" * 30_000, "\x00")):
        first = call(api.server, Idempotency_Key=mark)
        assert (first[0], call(api.server, Idempotency_Key=mark)) == (201, (200, first[1]))
        assert len(stored(api.server, "crashes")["crashes"]) == n + 1


@pytest.mark.slow
def test_a_hostile_request_to_the_real_web_server_is_answered_in_json_and_changes_nothing(run, tmp_path):
    server = run(BACKFEEDR_MAX_BODY_SIZE="10000")
    body = json.dumps(CRASH).encode()
    key, length = b"X-Backfeedr-Key: " + KEY.encode(), b"Content-Length: %d" % len(body)
    post, chunked = b"POST /api/v1/crashes HTTP/1.1", b"Transfer-Encoding: chunked"
    requests = [
        (post, [key, b"Content-Length: 10"], body, 400), (post, [key, length, length], body, 400),
        (post, [key, b"Content-Length: 5, 5"], body, 400), (post, [key, b"Content-Length: +5"], body, 400),
        (post, [key, b"Content-Length: \xb2"], body, 400), (post, [key, b"Content-Length: 10001"], b"x" * 10_001, 413),
        (post, [key], body, 400), (post, [key, chunked], b"0\r\n\r\n", 400), (post, [key, chunked], b"x\r\n", 400),
        (post, [key, chunked], b"-5\r\n", 400), (post, [key, chunked], b"5\r\nabcdefgh", 400),
        (post, [key, chunked], b"2711\r\n" + b"x" * 10_001 + b"\r\n0\r\n\r\n", 413),
        (post, [key, chunked], b"f" * 5000 + b"\r\n" + b"x" * 80_000, 413), (post, [key, chunked], b"1" * 80_000, 413),
        (post, [key, b"Transfer-Encoding: chunked, gzip"], body, 501), (post, [key, b"Content-Encoding: \xff",
         length], body, 415),
        (post, [key, b"Content-Encoding: gzip", b"Content-Encoding: gzip", length], body, 415),
        (post, [key, key, length], body, 401), (post, [b"X-Backfeedr-Key: \xff\xfe", length], body, 401),
        (post, [b"X_Backfeedr_Key: " + KEY.encode(), length], body, 401), (post, [key + b"\x00", length], body, 400),
        (post, [key, b"X-Backfeedr-Timestamp: \xff", length], body, 400),
        (post, [key, b"X-Backfeedr-Signature: \xff", length], body, 400),
        (b"GET /api/v1/events HTTP/1.1", [b"Authorization: Bearer \xff"], b"", 401),
        (b"GET /api/v1/health%00 HTTP/1.1", [], b"", 404), (b"GET /api/v1/health\x00 HTTP/1.1", [], b"", 404),
        (b"GET /api/v1/../v1/health HTTP/1.1", [], b"", 404), (b"GET /..%2f..%2fetc/passwd HTTP/1.1", [], b"", 404),
        (b"GET /api//v1/health HTTP/1.1", [], b"", 404), (b"GET /api/v1/health/ HTTP/1.1", [], b"", 404),
        (b"GET /api/v1/h\xc3\xa4 HTTP/1.1", [], b"", 400), (b"GET /api/v1/h%C3%A4 HTTP/1.1", [], b"", 404),
        (b"GET /api/v1/h%FF HTTP/1.1", [], b"", 404), (b"get /api/v1/health HTTP/1.1", [], b"", 400),
        (b"PUT /api/v1/crashes HTTP/1.1", [], b"", 405), (b"\xff /api/v1/health HTTP/1.1", [], b"", 400),
        (b"GET /api/v1/metrics/devices?days=\xff HTTP/1.1", [], b"", 400), (b"GET", [], b"", 400), (b"\x16\x03\x01",
         [], b"", 400),
        (b"GET /api/v1/health HTTP/1.1", [b" folded"], b"", 400), (b"GET /api/v1/health HTTP/1.1", [b"a\rb: c"], b"",
         400),
        (b"GET /api/v1/health HTTP/1.1", [b"X: " + b"x" * 32_768], b"", 431),
        (b"GET /" + b"x" * 32_768 + b" HTTP/1.1", [], b"", 431), (b"GET /" + b"x" * 30_000 + b" HTTP/1.1", [], b"",
         404),
    ]
    before = None
    for line, headers, content, expected in requests:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw:
            raw.sendall(b"".join(each + b"\r\n" for each in [line, *headers, b""]) + content)
            head, answer = read_answer(raw)
        assert int(head.split()[1]) == expected, (line, headers, content[:50], head)
        assert b"\r\nContent-Type: application/json" in head and set(json.loads(answer)) == {"error"}
        assert before is None or stored_ids(tmp_path / "run.db") == before, (line, headers)
        assert server.post(CRASHES, CRASH)[0] == 201
        before = stored_ids(tmp_path / "run.db")
    assert server.stop() == (0, "", "")
    assert len(stored_ids(tmp_path / "run.db")) == len(requests)
    check_database(tmp_path / "run.db")


def test_an_unexpected_error_tells_the_log_where_and_nobody_what_was_sent(api, caplog, monkeypatch):
    """A traceback shows lines of code, and not what is in its variables."""
    def parse(given, token=TOKEN):
        return {}[len(given)]
    monkeypatch.setattr(backfeedr, "parse_crash", parse)
    before = stored(api.server)
    signed = {**SIGNED, "Authorization": "Bearer " + TOKEN, "Idempotency_Key": "private-mark"}
    assert call(api.server, query="private=1", **signed) == (500, {"error": "internal server error"})
    assert stored(api.server) == before
    record, = caplog.records
    assert "KeyError" in caplog.text and "in parse" in caplog.text and record.name == "backfeedr"
    for secret in (KEY, TOKEN, "private", "SIGABRT", SIGNED["X_Backfeedr_Signature"]):
        assert secret not in caplog.text
    monkeypatch.undo()
    assert call(api.server)[0] == 201


# -- Hostile input: mutations of valid requests, from a fixed seed

ODD_VALUES = [
    None, True, False, 0, -1, 1, 1 << 63, -(1 << 64), 10 ** 400, 0.5, -0.0, 1e308, 5e-324, "", " ", "x", "x" * 501,
    "\x00", "\ud800", "\udc00\ud800", "\uffff", "\U0001f600" * 300, "'", '"', "</script>", "%s", "NaN", "custom", NOW,
    [], {}, [[]],
    [None], {"": {}}, ["x"] * 101, "0001-01-01T00:00:00Z", "9999-12-31T23:59:59-23:59", "2026-03-12T14:22:60Z"]
ODD_TEXTS = ["", " ", "\x00", "\xff", "\xc3\xa4", "\u0130", "\ud800", "\r\n", "\t", "0", "-1", "1e9", "7", "365",
             "9" * 400, "%", "%00", "%ff", "x" * 3000, ",", "a, b", "gzip", "identity", "Bearer x", KEY, TOKEN,
             "default", NOW, "../..", "/", "custom", "evt_" + "0" * 16, "1-" + "0" * 16, "sha256=" + "0" * 64]
FUZZ_PATHS = [*METRICS, CRASHES, EVENTS, BATCH, "/api/v1/health", f"{CRASHES}/{group_hash('SIGABRT', [])}"]
FUZZ_HEADERS = ["X_Backfeedr_Key", "X_Backfeedr_Timestamp", "X_Backfeedr_Signature", "Idempotency_Key",
                "Content_Encoding", "Authorization", "Transfer_Encoding", "Host"]
# What the contract lets a server say; `invalid` and `missing` speak of what is in the request.
REFUSALS = {
    400: r"invalid JSON|(missing (exception_type|occurred_at|type|events)|invalid (event|event type|events|JSON|"
         + "|".join([*backfeedr.Crash._fields, *backfeedr.Event._fields])
         + r"))( at index [0-9]{1,2})?|too many events: at most 100"
           r"|invalid (timestamp|gzip body|Content-Length|days|limit|cursor)",
    **{status: "|".join(map(re.escape, texts)) for status, texts in backfeedr.ERRORS.items()
       if status not in (429, 431, 500, 501, 503)},
}


class Mutations:
    """Requests that began as valid ones. The same seed makes the same requests."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def request(self):
        request = self.valid()
        for _ in range(self.random.randint(1, 3)):
            getattr(self, "change_" + self.random.choice(["body", "body", "bytes", "header", "query", "path", "coding",
                                                          "method", "length"]))(request)
        return request

    def valid(self):
        path, name = self.random.choice([(CRASHES, "crash"), (EVENTS, "event"), (BATCH, "batch"), (None, None)])
        if path is None:
            return {**BEARER, "path": self.random.choice(FUZZ_PATHS)}
        body = (EXAMPLES / f"{name}.json").read_bytes()
        request = {"method": "POST", "path": path, "body": body}
        if self.random.random() < 0.3:
            request.update(X_Backfeedr_Timestamp=NOW,
                           X_Backfeedr_Signature=backfeedr.sign(KEY.encode(), NOW.encode(), body))
        return request

    def change_body(self, request):
        """Another type or length of a value, somewhere in the JSON; a field more, less, or twice."""
        try:
            whole = json.loads(request["body"])
        except (ValueError, RecursionError):
            return
        places = [each for each in self.containers(whole) if each]
        if places:
            place = self.random.choice(places)
            where = self.random.choice(list(place) if type(place) is dict else range(len(place)))
            self.random.choice([self.replace, self.replace, self.delete, self.nest, self.add])(place, where)
        request["body"] = json.dumps(whole, ensure_ascii=self.random.random() < 0.8).encode("utf-8", "surrogatepass")

    def replace(self, place, where):
        place[where] = self.random.choice(ODD_VALUES)

    def delete(self, place, where):
        del place[where]

    def nest(self, place, where):
        for _ in range(self.random.choice([3, 61, 64, 65, 250])):
            place[where] = [place[where]]

    def add(self, place, where):
        if type(place) is list:
            place *= self.random.choice([2, 50, 101])
        else:
            self.replace(place, self.random.choice(["x", "", "events", "batch", "extra", "type", "seq", "\x00"]))

    def containers(self, value):
        if type(value) in (dict, list):
            yield value
            for each in value.values() if type(value) is dict else value:
                yield from self.containers(each)

    def change_bytes(self, request):
        body, where = request["body"], self.random.randrange(len(request["body"]) + 1)
        some = bytes(self.random.randrange(256) for _ in range(self.random.randint(0, 5)))
        end = where + self.random.choice([0, 1, 5, 100])
        request["body"] = body[:where] + some * self.random.choice([1, 1, 1000]) + body[end:]

    def change_header(self, request):
        name = self.random.choice(FUZZ_HEADERS)
        before = request.get(name, KEY if name == "X_Backfeedr_Key" else "") or ""
        odd = self.random.choice(ODD_TEXTS)
        request[name] = self.random.choice([None, odd, before + odd, before + ", " + before, before[:-1]])

    def change_query(self, request):
        names = ["app", "days", "limit", "cursor", "version", "type", "name", "session_id", "x", ""]
        pairs = [self.random.choice(names) + self.random.choice("==== ") + self.random.choice(ODD_TEXTS)
                 for _ in range(self.random.choice([1, 1, 2, 50]))]
        request["query"] = self.random.choice("&&&;").join(pairs)

    def change_path(self, request):
        path = request["path"]
        where = self.random.randrange(len(path) + 1)
        request["path"] = self.random.choice([
            path[:where] + self.random.choice(ODD_TEXTS) + path[where:], path[:where] + path[where + 1:], path + "/",
            self.random.choice(FUZZ_PATHS), path.upper(), ""])

    def change_coding(self, request):
        request["Content_Encoding"] = self.random.choice(["gzip", "gzip", "gzip", "GZIP", "deflate", "identity"])
        request["body"] = gzip.compress(request["body"] * self.random.choice([1, 1, 1, 3000]), mtime=0)

    def change_method(self, request):
        request["method"] = self.random.choice(["GET", "HEAD", "POST", "PUT", "OPTIONS", "DELETE", "get", "\xff", ""])

    def change_length(self, request):
        size = len(request["body"])
        request["length"] = self.random.choice(
            [0, size + 1, size // 2, "", "-1", str(size) + " ", "9" * 30, "\xb2", 10 ** 5])


def fuzz(server, seed, count):
    """Sends mutations; what they were answered, by status. Each answer must be one that the contract knows."""
    mutations, statuses = Mutations(seed), Counter()
    for n in range(count):
        request = mutations.request()
        status, answer = call(server, **request)
        statuses[status] += 1
        if request["method"] != "HEAD" and (status, request["path"]) not in ((303, ""), (303, "/")):
            refused = list(answer) == ["error"] and re.fullmatch(REFUSALS.get(status, "$"), answer["error"])
            assert status in (200, 201) and "error" not in answer or refused, (seed, n, status, answer, request)
    return statuses


@pytest.mark.slow
def test_whatever_is_sent_is_answered_by_the_contract_and_leaves_the_database_sound(serve, caplog):
    server = serve(rate_limit=0, max_body_size=100_000)
    statuses = fuzz(server, seed=1, count=3000)
    assert set(statuses) == {200, 201, 303, 400, 401, 404, 405, 413, 415, 422}, statuses
    assert caplog.records == [] and call(server)[0] == 201
    counted = sql(server.store.path, "select (select count(*) from crashes), (select count(*) from events)")[0]
    assert min(counted) > 50
    check_database(server.store.path)


# == Dashboard =================================================================

PAGES = ["/", "/crashes", "/events", "/releases", "/apps"]
HTML = {"Accept": "text/html,application/xhtml+xml"}


class Person:
    """Somebody with a browser, who is not signed in yet."""

    def __init__(self, server, prefix=""):
        self.server, self.prefix = server, prefix
        self.web = webtest.TestApp(mounted(server, prefix) if prefix else server)

    def get(self, path, status=200):
        return self.web.get(self.prefix + path, headers=HTML, status=status)

    def sign_in(self, token=TOKEN, at="/", status=303):
        form = self.get(at, status=303).follow(headers=HTML).forms[0]
        form["token"] = token
        answer = form.submit(status=status)
        return answer.follow(headers=HTML) if status == 303 else answer

    @property
    def session(self):
        return self.web.cookies["backfeedr"]


def mounted(app, prefix):
    """The app as another one sees it that has it under a prefix, and answers 599 to all else."""
    def host(environ, start_response):
        if not environ["PATH_INFO"].startswith(prefix + "/"):
            start_response("599 Outside", [("Content-Type", "text/plain")])
            return [b""]
        return app({**environ, "SCRIPT_NAME": prefix, "PATH_INFO": environ["PATH_INFO"][len(prefix):]}, start_response)
    return host


@pytest.fixture
def person(api):
    """Signed in."""
    someone = Person(api.server)
    someone.sign_in()
    return someone


def submit(page, action, **values):
    """Sends the first form of a page that does this."""
    form = next(form for form in page.forms.values() if "action" in form.fields and form["action"].value == action
                and all(name not in form.fields or form[name].attrs.get("type") != "hidden"
                        or form[name].value == value for name, value in values.items()))
    for name, value in values.items():
        form[name] = value
    return form.submit(expect_errors=True)


def text_of(page):
    """What a page says, without its tags."""
    return " ".join(page.html_text.split()) if hasattr(page, "html_text") else " ".join(
        html.unescape(re.sub("<style>.*?</style>|<[^>]*>", " ", page.text, flags=re.S)).split())


# -- Signing in

@pytest.mark.parametrize("path", [*PAGES, "/crashes/0123456789abcdef", "/events?name=a&type=custom"])
def test_a_page_is_shown_after_signing_in_and_not_before(api, path):
    someone = Person(api.server)
    answer = someone.get(path, status=303)
    assert answer.location.endswith("/sign-in?" + urlencode({"next": path})) and not answer.body
    form = answer.follow(headers=HTML).forms[0]
    form["token"] = TOKEN
    answer = form.submit(status=303)
    assert answer.headers["Location"] == path
    someone.get(path, status=404 if "0123" in path else 200)


def test_signing_in_makes_a_new_session_and_signing_out_ends_it(api):
    someone = Person(api.server)
    page = someone.sign_in()
    during = someone.session
    assert re.fullmatch("[0-9a-f]{32}", during) and during != someone.web.cookies["backfeedr_form"]
    assert len(sql(api.server.store.path, "select * from grants")) == 1
    assert during.encode() not in content_of(api.server.store.path)
    form = next(form for form in page.forms.values() if form.action.endswith("/sign-out"))
    assert form.submit(status=303).headers["Location"] == "/sign-in"
    assert sql(api.server.store.path, "select * from grants") == []
    someone.web.set_cookie("backfeedr", during)
    someone.get("/", status=303)


def test_a_session_that_was_not_made_here_is_none(api):
    someone = Person(api.server)
    someone.get("/sign-in")
    someone.get("/", status=303)
    for made_up in ("0" * 32, "", "' or 1=1 --", "0" * 5000):
        assert api.web.get("/", headers={**HTML, "Cookie": "backfeedr=" + made_up}).status_int == 303


@pytest.mark.parametrize("token", ["", "wrong", TOKEN[:-1], TOKEN + "0", "\u00e9\u20ac", KEY])
def test_a_wrong_admin_token_does_not_sign_in(api, token):
    someone = Person(api.server)
    page = someone.sign_in(token, status=403)
    assert "That is not the admin token." in page.text and TOKEN not in page.text
    assert sql(api.server.store.path, "select * from grants") == []
    someone.get("/", status=303)


def test_after_ten_tries_a_minute_even_the_right_token_has_to_wait(api, clock):
    api.server.pages.tries = RateLimiter(backfeedr.TRIES, clock=clock)
    someone = Person(api.server)
    for _ in range(10):
        someone.sign_in("wrong", status=403)
        clock.move(1)
    answer = someone.sign_in(status=429)
    assert answer.headers["Retry-After"] == "50" and "50 seconds" in answer.text
    assert sql(api.server.store.path, "select * from grants") == []
    clock.move(50)
    assert "Overview" in someone.sign_in()


def test_a_session_is_over_after_a_week(person, clock):
    clock.move(7 * 86400 - 1)
    person.get("/")
    clock.move(1)
    person.get("/", status=303)
    person.sign_in()
    assert len(sql(person.server.store.path, "select * from grants")) == 1  # the old one is gone


def test_another_admin_token_ends_all_sessions(serve, person):
    serve()
    person.get("/")
    serve(auth_token="another")
    person.get("/", status=303)


def test_a_link_on_another_site_leaves_the_browser_signed_in(person):
    """Its request carries no cookie, as SameSite wants it; a link of the page that it gets does."""
    session = person.session
    stranger = Person(person.server)  # the same browser without its cookies
    page = stranger.web.get("/crashes?days=7", headers={**HTML, "Sec-Fetch-Site": "cross-site"}, status=200)
    assert "Set-Cookie" not in page.headers and 'href="/crashes?days=7"' in page and "Sign out" not in page
    assert "No crash fits" in person.get("/crashes?days=7")
    assert "backfeedr=" not in stranger.get("/crashes", status=303).follow(headers=HTML).headers["Set-Cookie"]
    assert person.session == session


def test_a_one_time_link_signs_in_once_and_for_ten_minutes(api, clock):
    someone, late = Person(api.server), Person(api.server)
    link, other = api.server.pages.invite(""), api.server.pages.invite("")
    late.web.head(link, status=200)  # as of somebody who looks what is there
    assert someone.get(link, status=303).headers["Location"] == "/"
    someone.get("/")
    assert "This link was good once" in late.get(link, status=403)
    clock.move(600)
    late.get(other, status=403)
    late.get("/", status=303)


@pytest.mark.parametrize("scheme, forwarded, is_secure", [
    ("http", None, False), ("https", None, True), ("http", "https", True), ("http", "http", False),
    ("http", "HTTPS, http", True)])
def test_the_cookie_stays_with_the_browser_and_the_host(api, scheme, forwarded, is_secure):
    headers = {"X-Forwarded-Proto": forwarded} if forwarded else {}
    answer = webtest.TestApp(mounted(api.server, "/here"), extra_environ={"wsgi.url_scheme": scheme}).get(
        "/here/sign-in", headers=headers)
    first, *flags = answer.headers["Set-Cookie"].split("; ")
    assert re.fullmatch("backfeedr_form=[0-9a-f]{32}", first)
    assert {flag.lower() for flag in flags} == {
        "httponly", "samesite=strict", "path=/here/", "max-age=604800", *(["secure"] if is_secure else [])}


@pytest.mark.parametrize("public_url, host, shown", [
    ("https://crashes.example.com/bf", "x", "https://crashes.example.com/bf/api"), ("", "a.example:81", "http://a.example:81/api"),
    ("", "a.example'; rm -rf /", "http://localhost/api"), ("", "", "http://localhost/api")])
def test_the_line_to_copy_names_the_address_of_the_server(serve, public_url, host, shown):
    server = serve(public_url=public_url)
    session = server.store.grant("session", 1000)
    page = webtest.TestApp(server).get("/", headers={**HTML, "Host": host, "Cookie": "backfeedr=" + session})
    assert f"curl -X POST {shown}/v1/crashes" in page


@pytest.mark.parametrize("target", ["//evil.example", "/\\evil.example", "https://evil.example", "evil", "",
                                    "/\r\nSet-Cookie: a=b", "/ space", "javascript:alert(1)", "/\u00e9"])
def test_signing_in_leads_to_no_other_host(api, target):
    someone = Person(api.server)
    form = someone.get("/sign-in?" + urlencode({"next": target})).forms[0]
    form["token"], form["next"] = TOKEN, target
    assert form.submit(status=303).headers["Location"] == "/"


def test_a_form_counts_only_with_the_token_of_its_session(api, person):
    before = stored(api.server, "apps", "keys", "grants")
    page = person.get("/apps")
    for token in ("", "0" * 64, "\u00e9", None):
        values = {"action": "create", "name": "Theirs", "form_token": token}
        answer = person.web.post("/apps", {name: value for name, value in values.items() if value is not None},
                                 headers=HTML, status=403)
        assert "Form expired" in answer and "Theirs" not in answer
        person.web.post("/sign-out", {"form_token": token or ""}, headers=HTML, status=403)
        person.web.post("/sign-in", {"form_token": token or "", "token": TOKEN}, headers=HTML, status=403)
    assert stored(api.server, "apps", "keys", "grants") == before
    stranger = Person(api.server)
    stranger.get("/sign-in")
    stranger.web.post("/apps", {"action": "create", "name": "Theirs", "form_token": page.forms[0]["form_token"].value},
                      status=303)
    assert stored(api.server, "apps", "keys", "grants") == before


# -- What every answer carries

@pytest.mark.parametrize("path, status", [
    *((path, 200) for path in PAGES), ("/sign-in", 200), ("/nothing", 404), ("/crashes/nothing", 404),
    ("/crashes?days=0", 400), ("/crashes?app=nothing", 404), ("/crashes?cursor=x", 400), ("/sign-out", 405)])
def test_every_page_allows_nothing_from_elsewhere(person, path, status):
    answer = person.get(path, status=status)
    assert answer.content_type == "text/html" and answer.charset == "utf-8"
    style, = re.findall("<style>(.*?)</style>", answer.text, re.S)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert {name: answer.headers[name] for name in (
        "Content-Security-Policy", "X-Content-Type-Options", "Referrer-Policy", "Cache-Control")} == {
        "Content-Security-Policy": "default-src 'none'; img-src data:; form-action 'self'; base-uri 'none';"
                                   f" frame-ancestors 'none'; style-src 'sha256-{digest}'",
        "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
    assert not re.search(r"<script|\sstyle=|\son\w+=|javascript:|https?://(?!localhost)", answer.text.replace(
        "xmlns=&#039;http://www.w3.org/2000/svg&#039;", ""))


def test_a_redirect_carries_the_same_headers(api):
    assert "frame-ancestors 'none'" in Person(api.server).get("/", status=303).headers["Content-Security-Policy"]


def test_what_is_wrong_is_said_to_a_browser_in_html_and_to_all_others_in_json(api):
    page = api.web.get("/nothing", headers=HTML, status=404)
    assert "Not found" in page and page.content_type == "text/html"
    assert api.get("/nothing") == (404, {"error": "not found"})
    assert api.get("/api/v1/nothing", **HTML) == (404, {"error": "not found"})
    assert api.get("/api/v1/%FF", **HTML) == (404, {"error": "not found"})
    answer = api.web.post("/crashes", headers=HTML, status=405)
    assert answer.headers["Allow"] == "GET" and answer.content_type == "text/html"


def test_a_page_that_fails_says_nothing_of_the_inside(person, monkeypatch, caplog):
    monkeypatch.setattr(person.server.metrics, "releases", lambda app: 1 / 0)
    answer = person.get("/releases", status=500)
    assert "Internal server error" in answer and "ZeroDivision" not in answer.text and "backfeedr.py" not in answer.text
    assert [record.exc_info[0] for record in caplog.records] == [ZeroDivisionError]


def test_without_the_database_a_page_says_so(person):
    person.server.close()
    answer = person.get("/", status=503)
    assert answer.headers["Retry-After"] and "Storage unavailable" in answer


@pytest.mark.parametrize("query", ["type=nothing", "type=custom%00", "cursor=x", "app=nothing"])
def test_a_list_of_what_cannot_be_is_refused(person, query):
    person.get("/events?" + query, status=404 if "app" in query else 400)


def test_an_app_that_is_gone_is_in_no_link(person):
    page = person.get("/crashes?app=gone", status=404)
    assert "gone" not in page.text and 'href="/events"' in page and "Sign out" in page


# -- Every link and every form

MADE = "Made by a form"


class Crawl:
    """Follows every link and form that it finds, a few of each kind."""

    def __init__(self, person):
        self.person, self.seen, self.kinds, self.forms = person, set(), Counter(), Counter()

    def run(self, path):
        waiting = [self.person.prefix + path]
        while waiting:
            url = waiting.pop(0)
            kind = re.sub("[0-9a-f]{16}", "*", re.sub("=[^&]*", "", url))
            if url not in self.seen and self.kinds[kind] < 3:
                self.seen.add(url)
                self.kinds[kind] += 1
                waiting += self.found(self.person.web.get(url, headers=HTML, status=200))
        answer = self.person.get("/apps").forms  # last, as links to an app that is gone are dead
        for form in answer.values():
            if "typed" in form.fields and form["name"].value == MADE:
                form["typed"] = MADE
                assert form.submit(headers=HTML).status_int == 200
                self.forms[form.action, "delete"] += 1

    def found(self, page):
        for target in re.findall(r'(?:href|src|action)="([^"]*)"', page.text):
            target = html.unescape(target)
            assert target.startswith(self.person.prefix + "/") and not target.startswith("//") or (
                target.startswith("data:image/svg+xml,")), target
            if not target.startswith("data:") and "sign-out" not in target:
                yield target
        for form in list(page.forms.values()):
            yield from self.submitted(form)

    def submitted(self, form):
        kind = form.action, form.fields["action"][0].value if "action" in form.fields else ""
        self.forms[kind] += 1
        if "sign-out" in form.action or "typed" in form.fields or kind[1] and self.forms[kind] > 1:
            return
        if kind[1] == "create":
            form["name"] = MADE
        answer = form.submit(headers=HTML)
        assert answer.status_int == 200, (kind, answer)
        if form.method.upper() == "GET":
            for name, fields in form.fields.items():
                for value, *_ in getattr(fields[0], "options", []):
                    form[name] = value
                    yield form.submit(headers=HTML).request.path_qs


@pytest.mark.parametrize("prefix", ["", "/app/crashes"])
@pytest.mark.parametrize("data", ["empty", "demo"])
def test_every_link_and_form_leads_somewhere(serve, tmp_path, clock, demo, data, prefix):
    if data == "demo" and not POSTGRES:
        shutil.copy(demo.path, tmp_path / "test.db")
    server = serve(retention_days=0)
    serve.unchecked.append(server)  # as it is large, and a form deletes of it
    if data == "demo" and POSTGRES:
        hand_over(SimpleNamespace(store=demo), server, step=1000)
    someone = Person(server, prefix)
    someone.sign_in()
    crawl = Crawl(someone)
    crawl.run("/")
    assert {path for path in crawl.kinds if "?" not in path} >= {prefix + path for path in PAGES}
    assert {action for _, action in crawl.forms} == {"", "create", "key", "revoke", "delete"}
    assert MADE not in {app.name for app in server.store.apps()}
    if data == "demo":
        assert len(crawl.seen) > 60 and crawl.kinds[prefix + "/crashes/*"] == 3


# -- What a report carries is text

HOSTILE = '"><script>alert(1)</script>\'{{7777*7777}}% end\n%import os\n</style>\u202eabc\u05d0\x07\x1b[31m\x7f'


def test_whatever_a_report_carries_is_shown_as_text(api, person):
    """In every field, and as long as it may be."""
    long = (HOSTILE * 20)[:500]
    named = {name: long for name in ("app_version", "os_version", "device_model", "device_id_hash", "locale")}
    unknown = {HOSTILE: {HOSTILE: [HOSTILE]}, "plain": HOSTILE, "many": [HOSTILE, {HOSTILE: 1}]}
    frames = [{"frame": 0, "symbol": HOSTILE, "file": HOSTILE, "line": 1}, {"symbol": HOSTILE}]
    crash = api.post(CRASHES, {**CRASH, **named, **unknown, "exception_type": long, "exception_reason": HOSTILE,
                               "build_number": long, "stack_trace": frames})[1]
    for type_ in ("session_start", "custom", "session_end"):
        assert api.post(EVENTS, {**EVENT, **named, **unknown, "type": type_, "name": long, "session_id": long,
                                 "properties": {HOSTILE: HOSTILE}})[0] == 201
    api.server.store.create_app(re.sub("[^ -~\u05d0]", " ", HOSTILE)[:70].strip())
    for path in [*PAGES, "/crashes/" + crash["group_hash"], "/crashes?" + urlencode({"version": long, "text": HOSTILE}),
                 "/events?" + urlencode({"session_id": long}), "/events?" + urlencode({"name": long}),
                 "/crashes?" + urlencode({"version": HOSTILE}), "/crashes?" + urlencode({"text": long})]:
        page = person.get(path)
        assert "<script" not in page.text and "60481729" not in page.text, path
        assert page.text.count("</style>") == 1 and not re.search("[\x00-\x08\x0b-\x1f\x7f]", page.text), path
        if path != "/releases" and path != "/apps":
            assert "script&gt;alert(1)" in page.text, path
        check_html(page.text)
    assert text_of(person.get("/crashes/" + crash["group_hash"])).count("{{7777*7777}}") > 10


def test_a_report_as_large_as_may_be_makes_no_page_much_larger(api, person):
    frames = [{"symbol": f"frame {n}", "file": "a.swift"} for n in range(15_000)]
    group = api.post(CRASHES, {**CRASH, "exception_reason": "r" * 100_000, "stack_trace": frames,
                               "notes": "n" * 200_000})[1]["group_hash"]
    page = person.get("/crashes/" + group)
    assert len(page.body) < 120_000 and "and 14,800 further frames" in page and "frame 199" in page
    assert len(person.get("/crashes").body) < 20_000


class Checker(HTMLParser):
    """Whether all that is opened is closed."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.open, self.getpos())


def check_html(text):
    checker = Checker()
    checker.feed(text)
    assert checker.open == []


# -- What the pages show

def test_the_overview_shows_the_week_and_the_last_thirty_days(api, person, clock):
    for n in range(4):
        api.post(EVENTS, {**EVENT, "type": "session_start", "session_id": f"s{n}", "device_id_hash": f"d{n}",
                          "app_version": "1.2.0", "occurred_at": "2026-03-12T10:00:00Z"})
    api.post(CRASHES, {**CRASH, "app_version": "1.2.0", "device_model": "iPhone16,1", "exception_reason": "Because"})
    api.post(CRASHES, {**CRASH, "occurred_at": "2026-03-01T10:00:00Z"})
    page = person.get("/")
    text = text_of(page)
    for said in ("Crash-free sessions 75.00 %", "Active devices 4 24 hours", "Sessions 4 7 days", "Crashes 1 7 days",
                 "1.2.0 default 75.00 % 100.0 %", "1 SIGABRT Because", "iPhone16,1 1", "SIGABRT 2"):
        assert said in text, said
    assert page.text.count('class="chart"') == 5
    assert ('aria-label="Crashes per day, 11 Feb to 12 Mar: latest 1, highest 1 on 12 Mar, lowest 0"') in page
    assert "<title>1 Mar: 1</title>" in page and "<title>2 Mar: 0</title>" in page


def test_an_empty_server_says_what_to_do_next(person):
    overview = person.get("/")
    assert "Nothing has been received yet" in overview and "curl -X POST http://localhost:80/api/v1/crashes" in overview
    for path, said in (("/", "No crash in the last 7 days"), ("/", "reports that carry an app_version"),
                       ("/crashes", "No crash is kept"), ("/crashes?days=7", "No crash fits"),
                       ("/events", "No event is kept"), ("/events?name=x", "No event fits"),
                       ("/events?session_id=x", "No event fits"), ("/releases", "reports that carry an app_version")):
        assert said in text_of(person.get(path)), path


def test_the_list_of_crashes_can_be_narrowed(api, person, clock):
    for type_, version, reason in (("SIGABRT", "1.0", "Alpha 100%"), ("SIGBUS", "1.1", "beta"), ("SIGBUS", "1.1", "beta")):
        api.post(CRASHES, {**CRASH, "exception_type": type_, "app_version": version, "exception_reason": reason})
    clock.move(86400 * 9)
    api.post(CRASHES, {**CRASH, "exception_type": "SIGFPE", "app_version": "2.0", "occurred_at": "2026-03-21T14:00:00Z"})
    person.sign_in()
    for query, shown in (("", ["SIGBUS", "SIGABRT", "SIGFPE"]), ("?version=1.1", ["SIGBUS"]), ("?days=1", ["SIGFPE"]),
                         ("?text=ALPHA", ["SIGABRT"]), ("?text=100%25", ["SIGABRT"]), ("?text=%25", ["SIGABRT"]),
                         ("?text=sig", ["SIGBUS", "SIGABRT", "SIGFPE"]), ("?text=" + group_hash("SIGBUS", []), ["SIGBUS"]),
                         ("?version=1.1&text=alpha", []), ("?app=default", ["SIGBUS", "SIGABRT", "SIGFPE"])):
        page = person.get("/crashes" + query)
        rows = re.findall(r"<bdi>(SIG\w+)</bdi></a>", page.text)
        assert sorted(rows) == sorted(shown) and rows[:1] == shown[:1], query
        assert ("No crash fits" in page) == (not shown)
    page = person.get("/crashes")
    assert 'title="2026-03-12 14:22:31 UTC">9 d ago<' in page
    assert page.text.count('aria-label="Crashes: 2 in 30 days"') == 1
    assert api.get("/api/v1/crashes?text=beta", **ADMIN)[1]["groups"][0]["exception_type"] == "SIGBUS"


def test_a_group_shows_its_latest_crash_and_the_app_s_own_frames_apart(api, person):
    crash = json.loads((EXAMPLES / "crash.json").read_text())
    crash["stack_trace"].append({"frame": 9, "symbol": "UIApplicationMain", "file": None, "line": None})
    group = api.post(CRASHES, {**crash, "breadcrumbs": [{"at": "14:22", "screen": "Cart"}, "tap"], "free_disk_mb": 70})[1]
    page = person.get("/crashes/" + group["group_hash"])
    own = re.findall(r'<li class="own"><code><bdi>(.*?)</bdi>', page.text)
    assert own == [frame["symbol"] for frame in crash["stack_trace"] if frame.get("file")]
    assert "<li><code><bdi>UIApplicationMain" in page
    text = text_of(page)
    for said in ("ContentView.swift:42", "Free memory 312 MB", "Battery 67%", "Charging no", "Locale de_DE",
                 "Version 1.2.0", "Build 47", "System 18.3.1", "free_disk_mb 70",
                 'breadcrumbs {"at": "14:22", "screen": "Cart"} tap', "Crashes 1 Devices 1"):
        assert said in text, said


def test_the_reports_of_a_group_can_be_read_one_by_one(api, person):
    for n in range(25):
        given = {**CRASH, "exception_reason": f"number {n}.", "battery_level": -1}
        group = api.post(CRASHES, given)[1]["group_hash"]
    page = person.get("/crashes/" + group)
    assert "The latest crash" in page and "number 24." in page and "Battery unknown" in text_of(page)
    older = page.click("Next page")
    assert "number 4." in older and "number 5." not in older.text
    one = older.click(index=0, href="report=")
    assert text_of(one).count("number 4.") == 2 and "The latest crash" not in one
    person.get(f"/crashes/{group}?report=0000000000000000", status=404)
    person.get(f"/crashes/{group}?report=x", status=404)
    person.get(f"/crashes/{group}?cursor=0000000000000000", status=404)  # as when what was there has expired
    person.get(f"/crashes/{group}?cursor=x", status=400)


def test_a_report_of_another_group_is_not_shown_under_this_one(api, person):
    group = api.post(CRASHES, CRASH)[1]["group_hash"]
    other = api.post(CRASHES, {**CRASH, "exception_type": "SIGBUS"})[1]["id"]
    person.get(f"/crashes/{group}?report={other}", status=404)


def test_the_events_of_a_session_are_shown_in_their_order(api, person):
    for name in ("first", "second", "third"):
        api.post(EVENTS, {**EVENT, "name": name, "session_id": "mine", "properties": {"at": name, "n": [1, {"a": 2}]}})
        api.post(EVENTS, {**EVENT, "name": "other", "session_id": "theirs"})
    names = lambda page: re.findall(r"<b><bdi>(\w+)</bdi></b>", page.text)  # noqa: E731
    page = person.get("/events")
    assert names(page) == ["other", "third", "other", "second", "other", "first"]
    assert names(page.click("mine", index=0)) == ["first", "second", "third"]
    assert 'at: third, n: 1 {"a": 2}' in text_of(page)
    assert names(person.get("/events?name=second")) == ["second"] and names(person.get("/events?type=error")) == []


def test_the_pages_of_events_follow_one_another(api, person):
    events = [{**EVENT, "name": f"n{n}", "session_id": "s"} for n in range(100)] + [{**EVENT, "name": "last"}]
    for start in (0, 100):
        api.post(BATCH, {"events": events[start:start + 100]})
    seen = []
    for path, expected in (("/events", [f"n{n}" for n in range(99, -1, -1)]),
                           ("/events?session_id=s", [f"n{n}" for n in range(100)])):
        page, seen = person.get(path), []
        while True:
            seen += re.findall(r"<b><bdi>(n\d+)</bdi></b>", page.text)
            if "Next page" not in page:
                break
            page = page.click("Next page")
        assert seen == expected and "First page" in page


def test_a_time_that_lies_ahead_is_shown_as_a_date(api, person):
    group = api.post(CRASHES, {**CRASH, "occurred_at": "2031-01-02T03:04:05Z"})[1]["group_hash"]
    assert 'title="2031-01-02 03:04:05 UTC">2031-01-02<' in person.get("/crashes/" + group)


def test_lists_of_all_apps_name_the_app(api, person):
    shop = api.server.store.create_app("Shop")
    for key in (KEY, shop):
        api.post(CRASHES, {**CRASH, "stack_trace": [{"symbol": "system"}, {"symbol": "Mine.go()", "file": "M.swift"}]}, key=key)
        group = api.post(EVENTS, EVENT, key=key) and group_hash("SIGABRT", [{"symbol": "Mine.go()", "file": "M.swift"}])
    page = text_of(person.get("/crashes"))
    assert "2 SIGABRT Mine.go() Shop, default" in page or "2 SIGABRT Mine.go() default, Shop" in page
    assert "Shop" in text_of(person.get("/events")).split("All live apps", 1)[1].split("Properties", 1)[1]
    assert text_of(person.get("/crashes/" + group)).split("Its crashes")[1].count("Shop") == 1
    assert "Shop" not in text_of(person.get("/crashes?app=default")).split("Group", 1)[1]


def test_an_only_test_app_can_be_chosen(api, person):
    api.server.store.delete_app("default")
    api.server.store.create_app("Trial", is_test=True)
    assert "Trial (test)" in text_of(person.get("/").click("Trial"))


def test_each_page_is_about_the_app_that_is_chosen(api, person):
    shop = api.server.store.create_app("Shop & Co")
    api.post(CRASHES, {**CRASH, "exception_type": "SIGFPE", "app_version": "9.9"}, key=shop)
    api.post(CRASHES, CRASH)
    page = person.get("/crashes")
    assert "SIGFPE" in page and "SIGABRT" in page
    page = page.click("Shop &amp; Co")
    assert page.request.path_qs == "/crashes?app=Shop+%26+Co"
    assert "SIGFPE" in page and "SIGABRT" not in page
    page = page.click("Releases", index=0)
    assert page.request.path_qs == "/releases?app=Shop+%26+Co" and "9.9" in page


# -- Apps and keys

def test_a_new_app_shows_its_key_once_and_the_line_that_uses_it(api, person):
    page = submit(person.get("/apps"), "create", name="Shop")
    key = re.search("bf_live_[0-9a-f]{32}", page.text)[0]
    assert page.text.count(key) == 2 and f'-H "X-Backfeedr-Key: {key}"' in html.unescape(page.text)
    assert api.post(CRASHES, CRASH, key=key)[0] == 201
    assert key not in person.get("/apps").text
    assert sql(api.server.store.path, "select name, is_test from apps where name = 'Shop'") == [("Shop", 0)]


def test_a_test_app_can_be_made(api, person):
    assert "bf_test_" in submit(person.get("/apps"), "create", name="Trial", test=True).text
    assert sql(api.server.store.path, "select is_test from apps where name = 'Trial'") == [(1,)]


@pytest.mark.parametrize("name", ["", " Shop", "default", "x" * 101, "a\nb"])
def test_an_app_that_cannot_be_is_refused_with_the_reason(api, person, name):
    before = stored(api.server, "apps", "keys")
    answer = person.web.post("/apps", {"action": "create", "name": name, "form_token": person.get(
        "/apps").forms[0]["form_token"].value}, status=400)
    assert 'role="alert"' in answer
    assert stored(api.server, "apps", "keys") == before


def test_keys_are_made_and_revoked(api, person):
    page = submit(person.get("/apps"), "key", name="default")
    key = re.search("bf_live_[0-9a-f]{32}", page.text)[0]
    assert api.post(CRASHES, CRASH, key=key)[0] == 201
    page = submit(person.get("/apps"), "revoke", key=hashlib.sha256(key.encode()).hexdigest())
    assert f"Revoked the key {key[:16]}... of default." in page
    assert api.post(CRASHES, CRASH, key=key) == (401, {"error": "invalid API key"})
    assert api.post(CRASHES, CRASH)[0] == 201


def test_an_app_goes_when_its_name_was_typed_and_not_before(api, person):
    key = api.server.store.create_app("Shop")
    api.post(CRASHES, CRASH, key=key)
    page = person.get("/apps")
    answer = submit(page, "delete", name="Shop", typed="shop")
    assert answer.status_int == 400 and "type its name" in answer
    assert len(stored(api.server, "crashes")["crashes"]) == 1
    answer = submit(page, "delete", name="Shop", typed="Shop")
    assert "Deleted Shop and all that it sent." in answer
    assert stored(api.server, "crashes")["crashes"] == [] and len(api.server.store.apps()) == 1
    assert submit(page, "delete", name="Shop", typed="Shop").status_int == 400


def test_of_two_keys_that_look_alike_the_right_one_is_revoked(serve, person):
    for key in ("companykey-A", "companykey-B"):
        serve(api_key=key)
    api = Api(person.server)
    assert person.get("/apps").text.count("comp...") == 2
    answer = submit(person.get("/apps"), "revoke", key=hashlib.sha256(b"companykey-B").hexdigest())
    assert "Revoked the key comp... of default." in answer
    assert [api.post(CRASHES, CRASH, key=key)[0] for key in ("companykey-A", "companykey-B")] == [201, 401]


def test_a_form_without_a_key_revokes_none(api, person):
    token = person.get("/apps").forms[0]["form_token"].value
    for key in ({}, {"key": ""}, {"key": "nothing"}):
        person.web.post("/apps", {"action": "revoke", "form_token": token, **key}, status=400)
    assert api.post(CRASHES, CRASH)[0] == 201


def test_an_action_that_does_not_exist_is_refused(api, person):
    token = person.get("/apps").forms[0]["form_token"].value
    assert "There is no such action" in person.web.post("/apps", {"action": "x", "form_token": token}, status=400)


# -- Charts

@pytest.mark.parametrize("value, expected", [(0, 1), (1, 1), (2, 2), (3, 3), (7, 8), (9, 10), (10, 10), (11, 15),
                                             (99, 100), (100, 100), (101, 150), (4999, 5000), (5001, 6000)])
def test_an_axis_ends_at_a_round_number(value, expected):
    assert backfeedr._ceiling(value) == expected


def test_a_line_leaves_a_gap_where_there_is_no_value():
    days = [f"2026-03-0{n}" for n in range(1, 7)]
    chart = backfeedr.line_chart("Rate", days, [100, 90, None, 95, None, 100], 90, " %")
    assert len(re.findall('<line x1="[1-9]', chart)) == 1 and chart.count("<circle") == 2  # 4 Mar, and today
    assert "<title>3 Mar: none</title>" in chart and "<title>4 Mar: 95 %</title>" in chart
    assert 'aria-label="Rate per day, 1 Mar to 6 Mar: latest 100 %, highest 100 % on 6 Mar, lowest 90 %"' in chart
    assert [float(y) for y in re.findall('y1="([0-9.]+)" y2="[0-9.]+"/><circle', chart)] == [3.0]


def test_columns_stand_on_the_axis_and_reach_their_value():
    chart = backfeedr.column_chart("Crashes", ["2026-03-01", "2026-03-02", "2026-03-03"], [0, 5, 10])
    assert re.findall(r'%" y="([0-9.]+)" height="([0-9.]+)"/>', chart) == [("69.0", "0.0"), ("36.0", "33.0"), ("3.0", "66.0")]


def test_a_chart_of_nothing_says_so():
    assert "None in these days" in backfeedr.line_chart("Rate", ["2026-03-01"], [None])
    assert "None in these days" in backfeedr.bar_chart({"labels": [], "data": []})


def test_bars_are_as_long_as_their_share_of_the_longest():
    bars = backfeedr.bar_chart({"labels": ["a<b", "c"], "data": [40, 10]}, total=60)
    assert re.findall('<rect width="([0-9.]+)%', bars) == ["100.0", "25.0"]
    assert "<bdi>a&lt;b</bdi>" in bars and re.search(r"others, or unknown.*>10</td>", bars)


# -- In a real browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


PIPED = """import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])"""


class Browser:
    """Headless Chromium, driven through its pipe."""

    def __init__(self, profile):
        ours, theirs = os.pipe(), os.pipe()
        self._send, self._receive = ours[1], theirs[0]
        # Chromium reads from descriptor 3 and writes to 4: a process in between puts them there.
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
                   "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe",
                   f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", PIPED, str(ours[0]), str(theirs[1]), *command],
            pass_fds=(ours[0], theirs[1]), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        os.close(ours[0])
        os.close(theirs[1])
        self._buffer, self._calls, self._session, self.events = b"", 0, {}, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(domain + ".enable")

    def call(self, method, **params):
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": params, **self._session}
        os.write(self._send, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda got: got.get("id") == message["id"])
        assert "error" not in answer, answer
        return answer["result"]

    def _until(self, is_it):
        while True:
            while b"\0" not in self._buffer:
                assert select.select([self._receive], [], [], 30)[0], "the browser is silent"
                received = os.read(self._receive, 65536)
                assert received, "the browser has ended"
                self._buffer += received
            message, self._buffer = self._buffer.split(b"\0", 1)
            got = json.loads(message)
            self.events.append(got)
            if is_it(got):
                return got

    def look(self, width, scheme):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1,
                  mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def go(self, url):
        self.events = []
        self.call("Page.navigate", url=url)
        self.loaded()

    def loaded(self):
        if not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self._until(lambda got: got.get("method") == "Page.loadEventFired")

    def run(self, script):
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def seen(self, method):
        return [event["params"] for event in self.events if event.get("method") == method]

    def close(self):
        os.close(self._send)  # it ends by itself
        os.close(self._receive)
        try:
            self._process.wait(20)
        finally:
            self._process.kill()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("there is no chromium here")
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


DRAWN = """[...document.querySelectorAll(".chart .marks")].map(marks => marks.getBBox().width > 100
    && getComputedStyle(marks.firstChild)[marks.firstChild.tagName == "rect" ? "fill" : "stroke"] != "none")"""


@sqlite_only
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_pages_without_an_error(browser, serve, tmp_path, demo, width, scheme):
    shutil.copy(demo.path, tmp_path / "test.db")
    server = serve(retention_days=0)
    serve.unchecked.append(server)
    with listening(server) as url:
        browser.look(width, scheme)
        browser.call("Network.clearBrowserCookies")
        browser.go(url + "/")
        assert_shown(browser, url, width, scheme, charts=0)
        browser.events = []
        browser.run(f"document.querySelector('#token').value = '{TOKEN}'; document.querySelector('main button').click()")
        browser.loaded()
        assert browser.run("document.title") == "Overview - backfeedr"
        assert_shown(browser, url, width, scheme, charts=5)
        group = browser.run("document.querySelector('.list a[href*=\"/crashes/\"]').href")
        for path, charts in ((group, 1), (url + "/crashes", 0), (url + "/events", 0), (url + "/releases", 0),
                             (url + "/apps", 0)):
            browser.go(path)
            assert_shown(browser, url, width, scheme, charts)


def assert_shown(browser, url, width, scheme, charts):
    """No error in the console, nothing to scroll sideways, no other host, charts that are drawn, the right colours."""
    assert not browser.seen("Log.entryAdded") and not browser.seen("Runtime.consoleAPICalled")
    assert not browser.seen("Runtime.exceptionThrown")
    assert all(each["request"]["url"].startswith((url, "data:")) for each in browser.seen("Network.requestWillBeSent"))
    assert browser.run("document.documentElement.scrollWidth") <= width == browser.run("innerWidth")
    assert browser.run(DRAWN) == [True] * charts
    red = int(re.findall(r"\d+", browser.run("getComputedStyle(document.body).backgroundColor"))[0])
    assert (red > 200) if scheme == "light" else (red < 50)


@contextmanager
def listening(server):
    """The address of the server behind a plain web server of the standard library."""
    class Quiet(WSGIRequestHandler):
        def log_message(self, *args):
            pass

    class Threaded(socketserver.ThreadingMixIn, WSGIServer):
        daemon_threads = True

    with Threaded(("127.0.0.1", 0), Quiet) as listener:
        listener.set_app(server)
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{listener.server_port}"
        listener.shutdown()
        thread.join()


# == Server ====================================================================

class Running:
    """A real server in its own process, on a free port."""

    def __init__(self, db, *arguments, **variables):
        environ = {name: value for name, value in os.environ.items() if not name.startswith("BACKFEEDR_")}
        environ.update({"BACKFEEDR_API_KEY": KEY, "BACKFEEDR_AUTH_TOKEN": TOKEN, "BACKFEEDR_RATE_LIMIT": "0", **variables})
        self.process = subprocess.Popen(
            [sys.executable, *self.program(db), "--port", "0", *arguments],
            env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.db = db
        self.first_line = self.process.stdout.readline().strip()
        assert self.first_line.startswith("backfeedr on http://"), self.process.communicate()
        self.url = self.first_line.split()[-1]
        self.port = int(self.url.rpartition(":")[2])

    def program(self, db):
        on_postgres = str(db).startswith("postgresql:")
        return [str(EXAMPLES / "postgres.py"), db] if on_postgres else [str(SERVER), "--db", str(db)]

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def post(self, path, body, connection=None, **headers):
        connection = connection or self.connect()
        connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode(),
                           {"X-Backfeedr-Key": KEY, **headers})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    def stop(self, number=signal.SIGTERM):
        """Its exit status and what else it has printed."""
        self.process.send_signal(number)
        try:
            out, err = self.process.communicate(timeout=20)
        finally:
            self.process.kill()
        return self.process.returncode, out, err


@pytest.fixture
def run(tmp_path):
    """Starts real servers, and ends those that a test has left."""
    started = []

    def start(*arguments, db=tmp_path / "run.db", **variables):
        started.append(Running(db, *arguments, **variables))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
        server.process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_real_server_has_all_that_it_acknowledged_on_disk_when_it_is_stopped(run, tmp_path, number):
    server = run()
    ids = [server.post(CRASHES, CRASH)[1]["id"] for _ in range(5)]
    connection = server.connect()
    for _ in range(5):
        ids += server.post(BATCH, {"events": [EVENT] * 10}, connection)[1]["ids"]
    assert server.stop(number) == (0, "", "")
    assert not (tmp_path / "run.db-wal").exists()
    assert ids == [each for table in ("crashes", "events")
                   for each, in sql(tmp_path / "run.db", f"select id from {table} order by seq")]
    check_database(tmp_path / "run.db")


@pytest.mark.slow
def test_a_first_start_prints_a_curl_line_that_works(run, tmp_path):
    server = run(BACKFEEDR_API_KEY="", BACKFEEDR_AUTH_TOKEN="")
    lines = []
    while not lines or not lines[-1].startswith("        -d"):
        lines.append(server.process.stdout.readline().rstrip("\n"))
        assert server.process.poll() is None
    command = "\n".join(lines[next(n for n, line in enumerate(lines) if "curl" in line):])
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30)
    assert set(json.loads(done.stdout)) == {"id", "group_hash"}, done
    assert server.stop()[0] == 0
    assert len(sql(tmp_path / "run.db", "select * from crashes")) == 1


@pytest.mark.slow
def test_what_the_web_server_refuses_itself_is_json_too(run):
    server = run(BACKFEEDR_MAX_BODY_SIZE="1000")
    requests = [
        (b"POST /api/v1/crashes HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n\r\n" + b"x" * 1001, 413),
        (b"POST /api/v1/crashes HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n", 413),
        (b"POST /api/v1/crashes HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
         + b"1000\r\n" + b"x" * 4096 + b"\r\n0\r\n\r\n", 413),
        (b"POST /api/v1/crashes HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"GET /api/v1/health HTTP/1.1\r\nX: " + b"x" * 40_000 + b"\r\n\r\n", 431),
        (b"GET /api/v1/health HTTP/1.1\r\nno header\r\n\r\n", 400),
        (b"POST /api/v1/crashes HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /api/v1/crashes HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", 400),
        (b"GET http://[::1/ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ]
    for request, status in requests:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw:
            raw.sendall(request)
            head, body = read_answer(raw)
            assert int(head.split()[1]) == status, (request[:80], head)
            assert b"Content-Type: application/json" in head and set(json.loads(body)) == {"error"}
    assert server.post(CRASHES, CRASH)[0] == 201
    assert server.stop() == (0, "", ""), "nothing of this is logged, least of all an address"


def read_answer(raw):
    """One answer, up to its Content-Length."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += raw.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split()[0])
    while len(body) < length:
        body += raw.recv(65536)
    return head, body


@pytest.mark.slow
@pytest.mark.skipif(not socket.has_ipv6, reason="there is no IPv6")
def test_an_ipv6_address_is_printed_as_a_url(run):
    assert re.fullmatch(r"http://\[::1\]:[0-9]+", run("--host", "::1").url)


@pytest.mark.slow
def test_a_chunked_body_is_read(run):
    server = run()
    body = json.dumps(CRASH).encode()
    connection = server.connect()
    connection.request("POST", CRASHES, iter([body[:10], body[10:]]), {"X-Backfeedr-Key": KEY}, encode_chunked=True)
    assert connection.getresponse().status == 201


class Load:
    """Clients that post crashes and batches, each on a connection of its own, until they are stopped
    or cannot go on. `acknowledged` has the ids of every 201; `lost` counts requests without an answer."""

    def __init__(self, servers, clients=8, key=KEY):
        self.acknowledged, self.lost, self.others, self.stopped = [], 0, [], threading.Event()
        self.threads = [threading.Thread(target=self._run, args=(servers[n % len(servers)], n, key))
                        for n in range(clients)]
        for thread in self.threads:
            thread.start()

    def _run(self, server, n, key):
        connection, count = server.connect(), 0
        while not self.stopped.is_set():
            count += 1
            sent = False
            try:
                if connection.sock is None:
                    connection.connect()
                sent = True
                status, answer = server.post(*self._report(n, count), connection)
            except (OSError, http.client.HTTPException):
                self.lost += sent
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
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive()


def stored_ids(path):
    return [each for table in ("crashes", "events") for each, in sql(path, f"select id from {table}")]


@pytest.mark.slow
def test_nothing_acknowledged_is_lost_by_kill_9(run, tmp_path):
    acknowledged = []
    for round in range(3):
        server = run()
        load = Load([server])
        wait_until(lambda: len(load.acknowledged) > 300 + 100 * round)
        server.process.kill()
        load.finish()
        acknowledged += load.acknowledged
        assert load.others == []
        ids = stored_ids(tmp_path / "run.db")
        assert len(set(ids)) == len(ids) and set(acknowledged) <= set(ids)
        check_database(tmp_path / "run.db")
    assert len(set(acknowledged)) == len(acknowledged) > 900


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_under_load_answers_every_client(run, tmp_path, number):
    server = run()
    load = Load([server], clients=16)
    wait_until(lambda: len(load.acknowledged) > 500)
    began = time.monotonic()
    assert server.stop(number) == (0, "", "")
    assert time.monotonic() - began < 10
    load.finish()
    assert (load.lost, load.others) == (0, [])
    assert sorted(load.acknowledged) == sorted(stored_ids(tmp_path / "run.db"))
    assert not (tmp_path / "run.db-wal").exists()
    check_database(tmp_path / "run.db")


@pytest.mark.slow
def test_a_stop_does_not_wait_for_idle_and_unfinished_connections(run):
    server = run()
    idle = server.connect()
    assert server.post(CRASHES, CRASH, idle)[0] == 201
    with socket.create_connection(("127.0.0.1", server.port)) as unfinished:
        unfinished.sendall(b"POST /api/v1/crashes HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
        began = time.monotonic()
        assert server.stop() == (0, "", "")
        assert time.monotonic() - began < 10


@pytest.mark.slow
def test_300_clients_that_send_a_byte_now_and_then_keep_no_report_out(run, tmp_path):
    server = run(BACKFEEDR_THREADS="2")
    head = f"POST {CRASHES} HTTP/1.1\r\nX-Backfeedr-Key: {KEY}\r\nContent-Length: 1000\r\n\r\n".encode()
    drips = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(300)]
    for n, drip in enumerate(drips):
        drip.sendall(head if n % 2 else head[:40])  # in the middle of a body, and of a header
    for _ in range(5):
        for drip in drips:
            drip.sendall(b" ")
        began = time.monotonic()
        assert server.post(CRASHES, CRASH)[0] == 201
        assert time.monotonic() - began < 5
    for drip in drips:
        drip.close()
    assert server.stop() == (0, "", "")
    assert len(sql(tmp_path / "run.db", "select seq from crashes")) == 5
    check_database(tmp_path / "run.db")


@pytest.fixture
def slow_server(serve, clock, monkeypatch):
    """A real web server in this process, by a clock moved by hand. `turn` lets it do what is to be done."""
    import waitress.channel
    import waitress.server
    for module in (waitress.channel, waitress.server):
        monkeypatch.setattr(module, "time", SimpleNamespace(time=clock))
    app = serve(rate_limit=0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = backfeedr._make_server(app, app.settings, listener)
        server.app, server.turn = app, lambda: server.asyncore.loop(timeout=0, use_poll=True, map=server._map, count=1)
        yield server
        server.task_dispatcher.shutdown()
        server.asyncore.close_all(server._map)


def connect_to(server):
    connection = socket.create_connection(("127.0.0.1", int(server.effective_port)))
    connection.setblocking(False)
    return connection


def received_by(connection, server):
    """What the server has sent by now; None where it has closed the connection."""
    server.turn()
    try:
        return connection.recv(65536) or None
    except BlockingIOError:
        return b""
    except ConnectionError:
        return None


@pytest.mark.parametrize("start", [b"", b"G", b"GET /api/v1/health HTTP/1.1\r\nX: ",
                                   b"POST /api/v1/crashes HTTP/1.1\r\nContent-Length: 1000\r\n\r\n",
                                   b"POST /api/v1/crashes HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3e8\r\n"])
def test_a_request_that_has_not_arrived_whole_within_a_minute_is_ended(slow_server, clock, start):
    with connect_to(slow_server) as drip:
        drip.sendall(start)
        for seconds in range(100):
            if received_by(drip, slow_server) is None:
                break
            clock.move(1)
            if start:
                drip.sendall(b"x")
    assert 60 < seconds <= 60 + 2 * 10 and not slow_server.active_channels
    assert stored(slow_server.app, "crashes") == {"crashes": []}


def test_a_report_that_takes_half_a_minute_is_taken_and_so_is_the_next_on_its_connection(slow_server, clock):
    body = json.dumps(CRASH).encode()
    head = f"POST {CRASHES} HTTP/1.1\r\nX-Backfeedr-Key: {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
    request = head.encode() + body
    with connect_to(slow_server) as slow:
        for count in (1, 2, 3):
            for part in range(30):
                slow.sendall(request[len(request) * part // 30:len(request) * (part + 1) // 30])
                clock.move(1)
                if part < 29:
                    assert received_by(slow, slow_server) == b""
            answer = bytearray()
            wait_until(lambda: answer.extend(received_by(slow, slow_server)) or answer.endswith(b"}"))
            assert answer.startswith(b"HTTP/1.1 201 ")
            assert len(stored(slow_server.app, "crashes")["crashes"]) == count


@pytest.mark.parametrize("size, expected", [(3000, 201), (1000, None)])
def test_a_large_report_has_the_time_that_a_slow_phone_takes_and_no_more(slow_server, clock, size, expected):
    """Of 300 kB, so many bytes a second: 100 s, or 300."""
    body = json.dumps({**CRASH, "log": "x" * 300_000}).encode()
    head = f"POST {CRASHES} HTTP/1.1\r\nX-Backfeedr-Key: {KEY}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    answer = bytearray()
    with connect_to(slow_server) as phone:
        phone.sendall(head)
        for start in range(0, len(body), size):
            phone.sendall(body[start:start + size])
            clock.move(1)
            received = received_by(phone, slow_server)
            if received is None:
                break
            answer.extend(received)
        else:
            wait_until(lambda: answer.extend(received_by(phone, slow_server)) or answer.endswith(b"}"))
    assert (int(answer[9:12]) if answer else None) == expected
    assert len(stored(slow_server.app, "crashes")["crashes"]) == bool(expected)


@pytest.mark.parametrize("request_line, header, status", [
    ("GET /api/v1/health", "X: 1", 200), (f"POST {CRASHES}", "Content-Length: 0", 401),
    (f"POST {CRASHES}", "Content-Length: +5", 400), (f"POST {CRASHES}", "Content-Length: 5000000", 413)])
def test_who_expects_to_be_told_to_go_on_is_answered_where_nothing_is_to_come(
        slow_server, request_line, header, status):
    answer = bytearray()
    with connect_to(slow_server) as client:
        client.sendall(f"{request_line} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n{header}\r\n\r\n".encode())
        wait_until(lambda: answer.extend(received_by(client, slow_server) or b"") or answer.endswith(b"}"))
    assert answer.startswith(b"HTTP/1.1 %d " % status)


def posted(path, body, **headers):
    headers = {"X-Backfeedr-Key": KEY, "Content-Length": len(body), **headers}
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items()]
    return f"POST {path} HTTP/1.1\r\n{''.join(lines)}\r\n".encode() + body


@pytest.fixture
def crowd(slow_server):
    """Answers requests that have all come before a thread had time for them: status by status."""
    dispatcher, called = slow_server.task_dispatcher, slow_server.task_dispatcher.submitters
    called.set_thread_count(0)
    wait_until(lambda: not called.threads)

    def crowd(*requests):
        slow_server.app.store.is_known_key(backfeedr.sha256(KEY))
        connections = [connect_to(slow_server) for _ in requests]
        for connection, request in zip(connections, requests):
            connection.sendall(request)
        wait_until(lambda: slow_server.turn() or len(dispatcher.coming) == len(requests))
        assert list(called.queue) == [dispatcher]
        while called.queue:
            called.queue.popleft().service()
        answers = [received_by(connection, slow_server) for connection in connections]
        for connection in connections:
            connection.close()
        assert (dispatcher.requests, dispatcher.bytes, dispatcher.is_called) == (0, 0, False)
        return [[int(part[:3]) for part in (answer or b"").split(b"HTTP/1.1 ")[1:]] for answer in answers]
    return crowd


def test_reports_that_come_together_are_stored_by_one_commit_and_each_is_answered(slow_server, crowd):
    crash, batch = json.dumps(CRASH).encode(), json.dumps({"events": [EVENT] * 3}).encode()
    assert crowd(posted(CRASHES, crash), posted(CRASHES, b"{"), posted(BATCH, batch), posted(EVENTS, batch),
                 posted(CRASHES, crash) + posted(CRASHES, crash) + posted(CRASHES, b"")
                 ) == [[201], [400], [201], [400], [201, 201, 400]]
    assert len(stored(slow_server.app, "crashes")["crashes"]) == 3
    assert len(stored(slow_server.app, "events")["events"]) == 3
    assert slow_server.app.store._here.group_sizes.counts[:3] == [1, 0, 1], "a commit of 3 requests, and one of another"


@pytest.mark.parametrize("limit, most", [({"TOGETHER": 2}, 2), ({"TOGETHER_BYTES": 250}, 3), ({}, 7)])
def test_no_more_is_taken_at_a_time_than_there_is_room_for(slow_server, crowd, monkeypatch, limit, most):
    crash, taken, submit = json.dumps({**CRASH, "log": "x" * 21}).encode(), [], slow_server.app.submit
    assert len(crash) == 100

    def watched(environs):
        environs = list(environs)
        taken.append(len(environs))
        submit(environs)

    for name, value in limit.items():
        monkeypatch.setattr(backfeedr, name, value)
    monkeypatch.setattr(slow_server.app, "submit", watched)
    assert crowd(*[posted(CRASHES, crash)] * 7) == [[201]] * 7
    assert max(taken) == most and sum(taken) == 7
    assert len(stored(slow_server.app, "crashes")["crashes"]) == 7


def test_a_compressed_body_takes_the_room_of_the_largest_one(slow_server, crowd, monkeypatch):
    taken, submit = [], slow_server.app.submit
    monkeypatch.setattr(slow_server.app, "submit", lambda environs: submit(taken.append(list(environs)) or taken[-1]))
    monkeypatch.setattr(backfeedr, "TOGETHER_BYTES", slow_server.app.settings.max_body_size + 1)
    packed = posted(CRASHES, gzip.compress(json.dumps(CRASH).encode()), Content_Encoding="gzip")
    assert crowd(*[packed] * 5) == [[201]] * 5
    assert list(map(len, taken)) == [2, 2, 1]


def test_who_has_waited_for_room_as_long_as_for_a_lock_is_told_to_come_again(slow_server, crowd, monkeypatch):
    crash = json.dumps(CRASH).encode()
    with monkeypatch.context() as patched:
        patched.setattr(backfeedr, "BUSY_TIMEOUT", -1)
        assert crowd(*[posted(CRASHES, crash)] * 3) == [[503]] * 3
    assert stored(slow_server.app, "crashes") == {"crashes": []}
    assert crowd(*[posted(CRASHES, crash)] * 3) == [[201]] * 3


def test_what_goes_wrong_with_reports_that_come_together_is_an_answer_too(slow_server, crowd, monkeypatch, caplog):
    crash = json.dumps(CRASH).encode()
    with monkeypatch.context() as patched:
        patched.setattr(slow_server.app.store, "add_all", lambda submissions: 1 / 0)
        assert crowd(*[posted(CRASHES, crash)] * 3) == [[500]] * 3
    with monkeypatch.context() as patched:
        patched.setattr(slow_server.app.store, "writing", lambda: 1 / 0)
        assert crowd(*[posted(CRASHES, crash)] * 3) == [[503]] * 3
    assert "ZeroDivisionError" in caplog.text
    with monkeypatch.context() as patched:
        patched.setattr(backfeedr, "_once", lambda *_: 1 / 0)
        assert crowd(*[posted(CRASHES, crash)] * 3) == [[500]] * 3
    assert stored(slow_server.app, "crashes") == {"crashes": []}
    with monkeypatch.context() as patched:
        patched.setattr(slow_server.channel_class, "service", lambda channel: 1 / 0)
        assert crowd(*[posted(CRASHES, crash)] * 3) == [[], [], []]
    assert len(stored(slow_server.app, "crashes")["crashes"]) == 3
    assert crowd(*[posted(CRASHES, crash)] * 3) == [[201]] * 3


def test_reports_are_not_taken_one_after_the_other_where_each_has_to_ask_another_host(tmp_path):
    class Asking(RateLimiter):
        waits = True

    class Plain:  # of whom nobody knows
        def allow(self, key):
            return True

    for limiter, expected in ((Asking(1), False), (Plain(), False), (RateLimiter(9), True), (None, True)):
        settings = Settings(db_path=str(tmp_path / "test.db"), api_key=KEY)
        with Backfeedr(settings, limiter=limiter, announce=str) as server:
            assert server.may_gather("POST", CRASHES, KEY) is False, "a key that has to be looked for"
            assert Api(server).post(CRASHES, CRASH)[0] == 201
            assert server.may_gather("POST", CRASHES, KEY) is expected
            assert not any(server.may_gather(*request) for request in (
                ("GET", CRASHES, KEY), ("POST", CRASHES + "/", KEY), ("POST", CRASHES, ""), ("POST", CRASHES, "\u20ac")))


@pytest.mark.parametrize("key, body, status", [
    ("", "{}", "401"), ("nope", "{}", "401"), (KEY, "{", "400"), (KEY, '{"occurred_at": 1}', "400"),
    (KEY, json.dumps(CRASH), "201"), (KEY, json.dumps(CRASH), "422"), (KEY, json.dumps(CRASH), "503")])
def test_nothing_of_a_request_is_left_in_memory_when_it_is_answered(serve, monkeypatch, key, body, status):
    """Not even until the garbage collector comes, which is rarely: a body may have a megabyte."""
    class Body(io.BytesIO):
        pass

    server = serve()
    if status == "422":
        Api(server).post(CRASHES, {**CRASH, "locale": "de"}, Idempotency_Key="a")
    if status == "503":
        monkeypatch.setattr(server.store, "max_waiters", 0)
    stream, seen = Body(body.encode()), []
    left = weakref.ref(stream)
    environ = {"REQUEST_METHOD": "POST", "PATH_INFO": CRASHES, "HTTP_X_BACKFEEDR_KEY": key, "wsgi.input": stream,
               "CONTENT_LENGTH": str(len(body)), "HTTP_IDEMPOTENCY_KEY": "a"}
    gc.disable()
    try:
        server(environ, lambda status, headers, exc_info=None: seen.append(status[:3]))
        del stream, environ
        assert (seen, left()) == ([status], None)
    finally:
        gc.enable()


def test_an_environ_that_is_used_again_is_another_request(serve):
    server, body, ids = serve(), json.dumps(CRASH).encode(), []
    environ = {"REQUEST_METHOD": "POST", "PATH_INFO": CRASHES, "HTTP_X_BACKFEEDR_KEY": KEY,
               "CONTENT_LENGTH": str(len(body))}
    for _ in range(2):
        environ["wsgi.input"] = io.BytesIO(body)
        ids.append(json.loads(b"".join(server(environ, lambda status, headers, exc_info=None: None)))["id"])
    assert sorted(ids) == sorted(stored_ids(server.store.path)) and len(set(ids)) == 2


def test_the_refused_report_of_a_key_that_has_been_revoked_is_refused_for_the_key(serve, monkeypatch):
    server = serve()
    other = server.store.create_app("Shop")
    environs = [{"REQUEST_METHOD": "POST", "PATH_INFO": CRASHES, "HTTP_X_BACKFEEDR_KEY": key, "CONTENT_LENGTH": "1",
                 "wsgi.input": io.BytesIO(b"{")} for key in (KEY, other, KEY, other)]
    for environ in environs[:2]:
        server.store.is_known_key(backfeedr.sha256(environ["HTTP_X_BACKFEEDR_KEY"].encode()))
    server.store.revoke_key(other)
    looked, is_active_key = [], server.store.is_active_key
    monkeypatch.setattr(server.store, "is_active_key", lambda key_hash: looked.append(key_hash) or is_active_key(key_hash))
    server.submit(environs)
    answers = [json.loads(b"".join(server(environ, lambda *_: None)))["error"] for environ in environs]
    assert answers == ["invalid JSON", "invalid API key"] * 2
    assert len(looked) == 2, "once for each key, as a database that is away is waited for"


def test_the_report_of_a_client_that_has_gone_is_not_stored(slow_server, crowd):
    def gone(dispatcher=slow_server.task_dispatcher, service=slow_server.task_dispatcher.service):
        dispatcher.coming[0][0].connected = False
        service()

    slow_server.task_dispatcher.service = gone
    assert crowd(*[posted(CRASHES, json.dumps(CRASH).encode())] * 2) == [[], [201]]
    assert len(stored(slow_server.app, "crashes")["crashes"]) == 1


def test_a_body_that_cannot_be_read_is_refused_and_not_logged(serve, caplog):
    """As by another web server, where a chunk is none, or the client has gone."""
    class Broken:
        def read(self, size):
            raise ConnectionResetError("gone")

    server, answered = serve(), []
    for length in ({"CONTENT_LENGTH": "5"}, {"wsgi.input_terminated": True}):
        content = b"".join(server(
            {"REQUEST_METHOD": "POST", "PATH_INFO": CRASHES, "HTTP_X_BACKFEEDR_KEY": KEY, "wsgi.input": Broken(),
             **length}, lambda status, headers, exc_info=None: answered.append(status)))
        assert json.loads(content) == {"error": "invalid body"}
    assert answered == ["400 Bad Request"] * 2 and caplog.records == []
    assert stored(server, "crashes") == {"crashes": []}


def test_a_thread_that_sends_on_a_connection_keeps_the_others_from_it(slow_server, monkeypatch):
    """Else an answer, and the `100 Continue` of the request that was sent behind it, are sent twice and mixed."""
    free = []

    def look(channel):
        free.append(channel.outbuf_lock.acquire(blocking=False) and not channel.outbuf_lock.release())

    class Watched(slow_server.channel_class):
        def send(self, data, do_close=True):
            looking = threading.Thread(target=look, args=(self,))
            looking.start()
            looking.join()
            return super().send(data, do_close)

    slow_server.channel_class = Watched
    with connect_to(slow_server) as client:
        get, answer = b"GET /api/v1/health HTTP/1.1\r\n\r\n", bytearray()
        client.sendall(get)
        wait_until(lambda: answer.extend(received_by(client, slow_server)) or answer.endswith(b"}"))
        client.sendall(get + b"POST /api/v1/crashes HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
        wait_until(lambda: answer.extend(received_by(client, slow_server)) or b"100 Continue" in answer)
    assert (answer.count(b'{"status": "ok"}'), answer.count(b"100 Continue")) == (2, 1)
    assert free and not any(free)


@pytest.mark.slow
def test_verbose_logs_method_path_status_and_time_and_nothing_that_is_nobodys_business(run):
    server = run("--verbose")
    key = b"X-Backfeedr-Key: " + KEY.encode()
    body = json.dumps({**CRASH, "device_id_hash": "private-device"}).encode()
    length = b"Content-Length: %d" % len(body)
    requests = [
        (b"POST /api/v1/crashes HTTP/1.1", [key, length], body, "POST /api/v1/crashes 201"),
        (b"POST /api/v1/events HTTP/1.1", [key, length], body, "POST /api/v1/events 400"),
        (b"POST /api/v1/crashes HTTP/1.1", [b"X-Backfeedr-Key: private-key"], b"", "POST /api/v1/crashes 401"),
        (b"GET /api/v1/overview?app=private-app HTTP/1.1", [], b"", "GET /api/v1/overview 404"),
        (b"GET /api/v1/events HTTP/1.1", [b"Authorization: Bearer " + TOKEN.encode()], b"", "GET /api/v1/events 200"),
        (b"HEAD http://private-user:private@host/api/v1/health#private HTTP/1.1", [], b"", "HEAD /api/v1/health 200"),
        (b"GET /a%0d%0aGET%20/b%1b[31m\x1b%c3%a4 HTTP/1.1", [], b"", "GET /a%0D%0AGET%20/b%1B%5B31m%1B%C3%A4 404"),
        (b"GET /api/v1/crashes/" + KEY.encode() + b" HTTP/1.1", [], b"", "GET /api/v1/crashes/bf_live_... 401"),
        (b"GET /bf%5fadmin_" + TOKEN[9:].encode() + b" HTTP/1.1", [], b"", "GET /bf_admin_... 404"),
        (b"GET ?private HTTP/1.1", [], b"", "GET - 303"),
        (b"GET /" + b"x" * 5000 + b" HTTP/1.1", [], b"", "GET /" + "x" * 199 + " 404"),
        (b"X" * 5000 + b" /api/v1/health HTTP/1.1", [], b"", "X" * 20 + " /api/v1/health 405"),
        (b"POST /api/v1/crashes HTTP/1.1", [b"Content-Length: 99999999"], b"", "POST /api/v1/crashes 413"),
        (b"POST /api/v1/crashes HTTP/1.1", [b"Content-Length: private"], b"", "POST /api/v1/crashes 400"),
        (b"POST /api/v1/crashes HTTP/1.1", [b"Transfer-Encoding: private"], b"", "POST /api/v1/crashes 501"),
        (b"GET /private HTTP/1.1", [b"private header"], b"", "- - 400"),
        (b"GET /private HTTP/1.1", [b"X: " + b"private" * 6000], b"", "- - 431"),
    ]
    for line, headers, content, _ in requests:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw:
            raw.sendall(b"\r\n".join([line, *headers, b"", content]) if headers else line + b"\r\n\r\n")
            assert raw.recv(65536).startswith(b"HTTP/1.")
    status, out, err = server.stop()
    lines = [re.fullmatch(r"(.*) [0-9]+\.[0-9] ms", line) for line in err.splitlines()]
    assert (status, out) == (0, "") and all(lines), err
    assert sorted(line[1] for line in lines) == sorted(line for *_, line in requests)
    for secret in ("private", KEY[8:], TOKEN[9:], "127.0.0.1"):
        assert secret not in err


@pytest.mark.slow
@pytest.mark.parametrize("arguments, url, warned", [
    (["--host", "0.0.0.0"], "", True), (["--host", "0.0.0.0"], "http://example.com", True),
    (["--host", "0.0.0.0"], "https://example.com", False), (["--host", "localhost"], "", False)])
def test_a_server_that_others_reach_without_https_says_so_in_a_line(run, arguments, url, warned):
    status, out, err = run(*arguments, BACKFEEDR_PUBLIC_URL=url).stop()
    assert (status, out, err.count("\n")) == (0, "", int(warned))
    assert not warned or err.startswith("backfeedr: 0.0.0.0 ") and "https" in err and "BACKFEEDR_PUBLIC_URL" in err


@pytest.mark.slow
def test_pruning_beside_a_server_under_load_disturbs_nobody(run, tmp_path):
    path = tmp_path / "run.db"
    with Store(str(path), clock=Clock()) as store:  # long ago
        store.start(KEY)
        for _ in range(20):
            store.add(backfeedr.sha256(KEY), [parse_event(dict(EVENT, device_id_hash="old"))] * 500)
    server = run(BACKFEEDR_RETENTION_DAYS="0")
    pruning = subprocess.Popen([sys.executable, str(SERVER), "prune", "--db", str(path)],
                               env={**os.environ, "BACKFEEDR_RETENTION_DAYS": "1"}, stderr=subprocess.PIPE, text=True)
    connection, statuses = server.connect(), []
    while pruning.poll() is None or len(statuses) < 20:
        statuses.append(server.post(CRASHES, {**CRASH, "device_id_hash": "new"}, connection)[0])
    assert "10,000 events" in pruning.communicate()[1] and set(statuses) == {201}
    assert server.stop()[0] == 0
    assert sql(path, "select (select count(*) from events), (select count(*) from crashes)") == [(0, len(statuses))]
    assert sql(path, "select device_id_hash from devices") == [("new",)]
    assert sql(path, "pragma integrity_check") == [("ok",)]


@pytest.mark.slow
def test_two_processes_on_one_file_lose_and_double_nothing(run, tmp_path):
    servers = [run(), run()]
    load = Load(servers, clients=8)
    wait_until(lambda: len(load.acknowledged) > 300)
    with Store(str(tmp_path / "run.db")) as store:
        shop = store.create_app("Shop")
        other = Load(servers, clients=2, key=shop)
        wait_until(lambda: len(other.acknowledged) > 30)
    other.finish()
    load.finish()
    assert [server.stop()[0] for server in servers] == [0, 0]
    assert (load.lost, load.others, other.lost, other.others) == (0, [], 0, [])
    assert sorted(load.acknowledged + other.acknowledged) == sorted(stored_ids(tmp_path / "run.db"))
    check_database(tmp_path / "run.db")


@pytest.mark.slow
def test_a_second_store_in_a_process_does_not_cost_the_first_its_locks(tmp_path):
    """POSIX drops the locks of a whole process when it closes any descriptor of the file. A command in
    another process would then take itself for the last user, and delete the WAL under the first store."""
    path = tmp_path / "twice.db"
    with Store(str(path)) as one:
        key = backfeedr.sha256(one.create_app("Shop"))
        one.add(key, [parse_event(dict(EVENT))])
        with Store(str(path)):
            pass
        subprocess.run([sys.executable, str(SERVER), "app", "list", "--db", str(path)],
                       check=True, capture_output=True)
        assert path.with_name("twice.db-wal").exists()
        one.add(key, [parse_event(dict(EVENT))])
        count = "import sqlite3, sys; print(sqlite3.connect(sys.argv[1]).execute('select count(*) from events').fetchone()[0])"
        seen = subprocess.run([sys.executable, "-c", count, str(path)], check=True, capture_output=True, text=True)
        assert seen.stdout.strip() == "2"


@pytest.mark.slow
def test_a_replay_sent_to_another_process_stores_nothing(run, tmp_path):
    one, two = run(), run()
    first = one.post(CRASHES, CRASH, **{"Idempotency-Key": "a"})
    assert two.post(CRASHES, CRASH, **{"Idempotency-Key": "a"}) == (200, first[1])
    assert len(sql(tmp_path / "run.db", "select seq from crashes")) == 1


@pytest.mark.slow
def test_processes_that_start_at_once_make_one_database(run, tmp_path):
    base = [sys.executable, str(SERVER), "app", "create"]
    started = [subprocess.Popen([*base, f"App{n}", "--db", str(tmp_path / "new.db")], stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True) for n in range(4)]
    outcomes = [(process.communicate(timeout=60), process.returncode) for process in started]
    assert [status for _, status in outcomes] == [0] * 4, outcomes
    with Store(str(tmp_path / "new.db")) as store:
        assert [app.name for app in store.apps()] == [f"App{n}" for n in range(4)]


def test_a_new_file_that_another_process_is_just_preparing_is_tried_again(tmp_path, monkeypatch):
    class Contended(backfeedr.Connection):
        refused = 0

        def execute(self, statement, *parameters):  # as when two processes change to WAL at once
            if "journal_mode" in statement and Contended.refused < 3:
                Contended.refused += 1
                raise sqlite3.OperationalError("database is locked")
            return super().execute(statement, *parameters)

    monkeypatch.setattr(backfeedr, "_Connection", Contended)
    monkeypatch.setattr(backfeedr.time, "sleep", lambda seconds: None)
    with Store(str(tmp_path / "new.db")) as store:
        store.create_app("Shop")
        assert [app.name for app in store.apps()] == ["Shop"]
    assert Contended.refused == 3


def test_a_new_file_that_stays_locked_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(backfeedr, "BUSY_TIMEOUT", 0)
    path = tmp_path / "new.db"
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("begin exclusive")
    with pytest.raises(StoreError, match="database is locked"):
        Store(str(path))
    holder.close()
    Store(str(path)).close()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(__import__("resource"), "prlimit"), reason="needs prlimit of Linux")
def test_a_server_whose_disk_is_full_recovers_without_a_restart(run, tmp_path):
    import resource
    server = run()
    assert server.post(CRASHES, CRASH)[0] == 201
    _, hard = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (300_000, hard))
    big = {"events": [{**EVENT, "properties": {"text": "x" * 2000}}] * 100}
    statuses = Counter(server.post(BATCH, big)[0] for _ in range(5))
    assert set(statuses) <= {201, 503} and statuses[503] >= 3
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
    assert server.post(BATCH, big)[0] == 201
    assert server.post(CRASHES, CRASH)[0] == 201
    status, out, err = server.stop()
    assert (status, out) == (0, "") and "Traceback" not in err
    assert len(sql(tmp_path / "run.db", "select seq from events")) == 100 * (statuses[201] + 1)
    check_database(tmp_path / "run.db")


# == Demo ======================================================================

DEMO_NOW = parse_time(NOW)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A filled database as the demo serves it."""
    path = tmp_path_factory.mktemp("demo") / "demo.db"
    backfeedr.fill_demo(str(path), DEMO_NOW)
    with Store(str(path), clock=lambda: DEMO_NOW / 1000) as store:
        yield store


def demo_answers(store):
    """What is shown on the pages, but for ids: they begin at random."""
    ask = backfeedr.Metrics(store)
    return [ask.overview(), ask.daily_crashes(days=30), ask.sessions(), ask.retention(), ask.releases(), ask.groups(),
            [{**event, "id": None} for event in ask.events()["events"]]]


def test_demo_is_the_same_for_a_seed_and_another_for_another(demo, tmp_path):
    for seed in (1, 2):
        path = str(tmp_path / f"{seed}.db")
        backfeedr.fill_demo(path, DEMO_NOW, seed)
        with Store(path, clock=lambda: DEMO_NOW / 1000) as store:
            assert (demo_answers(store) == demo_answers(demo)) == (seed == 1)


def test_demo_has_roll_ups_that_equal_its_rows(demo):
    check_database(demo.path)


def test_demo_is_of_a_size_that_is_worth_looking_at(demo):
    counts = {table: sql(demo.path, f"select count(*) from {table}")[0][0] for table in ("crashes", "events")}
    devices, = sql(demo.path, "select count(distinct device_id_hash) from events")[0]
    assert 200 <= counts["crashes"] <= 500 and 15_000 <= counts["events"] <= 26_000 and 300 <= devices <= 400
    assert sorted(app.is_test for app in demo.apps()) == [False, False, True]


def test_demo_shows_a_bad_release_that_was_fixed(demo):
    rates = {release["app_version"]: release["crash_free_sessions"]
             for release in backfeedr.Metrics(demo).releases("Tramwise")["releases"]}
    assert 92 <= rates["2.4.0"] <= 95 < rates["2.3.0"] < 99 < rates["2.4.1"]


def test_demo_has_groups_of_one_release_of_one_model_and_a_rare_one(demo):
    ask = backfeedr.Metrics(demo)
    found = [ask.group(group["group_hash"]) for group in ask.groups()["groups"]]
    assert 8 <= len(found) <= 10
    assert found[0]["versions"]["labels"] == ["2.4.0"] and found[-1]["count"] <= 6
    assert ["iPad13,18"] in [group["device_models"]["labels"] for group in found]
    assert any(all(system >= "26" for system in group["systems"]["labels"]) for group in found)
    for frames in (group["reports"][0]["stack_trace"] for group in found):
        assert 8 <= len(frames) <= 14 and {bool(frame["file"]) for frame in frames} == {True, False}


def test_demo_has_the_rhythm_of_a_week(demo):
    sessions = backfeedr.Metrics(demo).sessions("Tramwise", days=28)
    weekend = [count for label, count in zip(sessions["labels"], sessions["sessions"])
               if date.fromisoformat(label).weekday() >= 5]
    assert sum(weekend) / 8 < 0.7 * (sum(sessions["sessions"]) - sum(weekend)) / 20


def test_demo_reports_are_received_after_they_occurred(demo):
    for table in ("crashes", "events"):
        assert sql(demo.path, f"select count(*) from {table} where occurred_at > received_at") == [(0,)]
    last, = sql(demo.path, "select max(received_at) from events")[0]
    assert 60_000 <= DEMO_NOW - last <= 600_000


def test_demo_is_what_the_api_would_have_taken(demo, serve):
    api = Api(serve())
    shown = ("id", "app", "group_hash", "received_at")
    for table, path in (("crashes", CRASHES), ("events", EVENTS)):
        with demo.reading() as db:
            reports = backfeedr._reports(db, f"select * from {table} order by seq desc limit 40", {})
        for row in reports:
            given = {name: value for name, value in {**row, **row.get("extra", {})}.items()
                     if name not in (*shown, "extra")}
            assert api.post(path, given)[0] == 201


@pytest.mark.parametrize("now", ["2026-03-12T00:00:00Z", "2026-03-12T00:10:00Z", "2026-03-15T03:00:00Z"])  # a Sunday
def test_demo_has_figures_of_today_at_any_hour(tmp_path, now):
    backfeedr.fill_demo(str(tmp_path / "test.db"), parse_time(now))
    with Store(str(tmp_path / "test.db"), clock=Clock(now)) as store:
        ask = backfeedr.Metrics(store)
        assert ask.sessions(days=1)["sessions"][0] > 0 and ask.active_devices(days=1)["dau"][0] > 0
        assert len(ask.events()["events"]) == 50


# == Command line ==============================================================

@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs a command on a database of its own: its status, output and errors."""
    for name in list(os.environ):
        if name.startswith("BACKFEEDR_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        try:
            status = main(list(arguments))
        except SystemExit as done:
            status = done.code
        return (status, *capsys.readouterr())

    return run


def test_app_create_prints_the_key_alone(command):
    status, out, err = command("app", "create", "Shop")
    assert status == 0 and re.fullmatch("bf_live_[0-9a-f]{32}\n", out) and "Shop" in err
    status, out, err = command("app", "create", "Beta", "--test")
    assert status == 0 and out.startswith("bf_test_")
    assert command("key", "create", "Beta")[1].startswith("bf_test_")
    command("key", "revoke", out.strip())
    with Store("backfeedr.db") as store:
        assert [(app.name, app.is_test, app.keys) for app in store.apps()] == [("Beta", True, 1), ("Shop", False, 1)]


def test_keys_are_made_listed_and_revoked(command):
    first, second = command("app", "create", "Shop")[1].strip(), command("key", "create", "Shop")[1].strip()
    assert command("key", "revoke", first[:16])[0] == 0
    status, out, _ = command("key", "list")
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["KEY", "APP", "CREATED", "REVOKED"]
    assert {(line[0], line[1], line[3] == "-") for line in lines[1:]} \
        == {(first[:16] + "...", "Shop", False), (second[:16] + "...", "Shop", True)}
    assert first not in out and second not in out
    status, out, _ = command("app", "list")
    assert [line.split()[:3] for line in out.splitlines()] == [["APP", "KIND", "KEYS"], ["Shop", "live", "1"]]


def test_app_delete_deletes(command):
    command("app", "create", "Shop")
    assert command("app", "delete", "Shop")[0] == 0
    assert command("app", "delete", "Shop") == (1, "", "backfeedr: there is no app named 'Shop'\n")
    assert command("key", "list")[1].splitlines()[1:] == []


@pytest.mark.parametrize("arguments, status, text", [
    (["app", "create", ""], 1, "an app's name"), (["key", "create", "Nope"], 1, "there is no app named 'Nope'"),
    (["key", "revoke", "bf_live_zz"], 1, "no active keys begin with 'bf_live_zz'"),
    (["key", "revoke", "\udcff"], 1, "can't encode"), (["app", "create", "\udcff"], 1, "an app's name"),
    (["app", "list", "--db", "typo.db"], 1, "there is no database"),
    (["app", "create", "x", "--db", "no/such/dir/x.db"], 1, "cannot open the database"),
    (["--host", "\u00fc..x"], 1, "cannot listen on"),
    (["app"], 2, "usage:"), (["app", "rename", "x"], 2, "usage:"), (["nonsense"], 2, "usage:"),
    (["--port", "http"], 2, "usage:"), (["--port", "65536"], 1, "port: 65536 is not from 0 to 65535"),
    (["--host", "256.0.0.1"], 1, "cannot listen on 256.0.0.1"), (["app", "create"], 2, "usage:")])
def test_what_goes_wrong_is_one_line(command, arguments, status, text):
    command("app", "create", "Shop")
    got, out, err = command(*arguments)
    assert (got, out) == (status, "") and text in err
    assert not Path("typo.db").exists()
    if status == 1:
        assert err.count("\n") == 1 and err.startswith("backfeedr: ")


def test_a_wrong_variable_stops_the_start_with_a_line_that_names_it(command, monkeypatch):
    monkeypatch.setenv("BACKFEEDR_RATE_LIMIT", "many")
    assert command() == (1, "", "backfeedr: BACKFEEDR_RATE_LIMIT: 'many' is not a whole number\n")
    assert not Path("backfeedr.db").exists()


def test_a_taken_port_is_one_line(command):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        status, _, err = command("--port", port)
    assert status == 1 and err.startswith(f"backfeedr: cannot listen on 127.0.0.1 port {port}: ")
    assert not Path("backfeedr.db").exists(), "the secrets of a first start must not be made and then not be shown"


@pytest.mark.slow
def test_commands_work_beside_a_running_server(run, tmp_path):
    server = run()
    base = [sys.executable, str(SERVER)]
    made = subprocess.run([*base, "app", "create", "Shop", "--db", str(tmp_path / "run.db")],
                          capture_output=True, text=True, check=True)
    key = made.stdout.strip()
    assert server.post(CRASHES, CRASH, **{"X-Backfeedr-Key": key})[0] == 201
    subprocess.run([*base, "key", "revoke", key[:16], "--db", str(tmp_path / "run.db")], check=True, capture_output=True)
    assert server.post(CRASHES, CRASH, **{"X-Backfeedr-Key": key}) == (401, {"error": "invalid API key"})
    assert server.post(CRASHES, CRASH)[0] == 201


def test_prune_says_what_it_deleted_and_what_it_gave_back(command, monkeypatch):
    with Store("backfeedr.db", clock=Clock()) as store:
        key = store.create_app("Shop")
        store.add(backfeedr.sha256(key), [parse_event(dict(EVENT, name="x" * 400))] * 2000)
        store.add(backfeedr.sha256(key), [parse_crash(dict(CRASH))])
    status, out, err = command("prune")
    assert (status, out) == (0, "")
    assert re.fullmatch(r"Deleted 1 crash and 2,000 events older than 90 days; gave back [0-9.]+ MB of [0-9.]+ MB\.\n", err), err
    monkeypatch.setenv("BACKFEEDR_RETENTION_DAYS", "0")
    assert command("prune")[2].startswith("Deleted 0 crashes and 0 events")
    assert sql("backfeedr.db", "select count(*) from events") == [(0,)]


def test_prune_keeps_what_the_server_keeps_unless_it_is_told_otherwise(command, monkeypatch):
    """Else, a prune from a shell without the server's settings would delete what it was to keep."""
    long_ago = Clock()
    long_ago.seconds = time.time() - 200 * 24 * 3600
    with Backfeedr(Settings(db_path="backfeedr.db", api_key=KEY, auth_token=TOKEN, retention_days=365),
                   clock=long_ago) as server:
        server.store.add(backfeedr.sha256(KEY), [parse_event(dict(EVENT))])
    assert command("prune")[2].startswith("Deleted 0 crashes and 0 events older than 365 days")
    monkeypatch.setenv("BACKFEEDR_RETENTION_DAYS", "100")
    assert command("prune")[2].startswith("Deleted 0 crashes and 1 event older than 100 days")


def test_device_show_prints_all_that_is_kept_and_forget_deletes_it(command):
    with Store("backfeedr.db") as store:
        key_hash = backfeedr.sha256(store.create_app("Shop"))
        store.add(key_hash, [parse_crash(dict(CRASH, device_id_hash="d1", app_version="1.0", breadcrumbs=["tap"]))])
        store.add(key_hash, [parse_event(dict(EVENT, device_id_hash="d1")), parse_event(dict(EVENT))])
    status, out, err = command("device", "show", "d1")
    found = json.loads(out)
    assert (status, err) == (0, "")
    assert [app["app"] for app in found["apps"]] == ["Shop"] and found["apps"][0]["versions"] == ["1.0"]
    assert [crash["extra"] for crash in found["crashes"]] == [{"breadcrumbs": ["tap"]}]
    assert [event["name"] for event in found["events"]] == ["purchase"]
    status, out, err = command("device", "forget", "d1")
    assert (status, out) == (0, "") and "1 crash and 1 event." in err
    for action in ("show", "forget"):
        assert command("device", action, "d1") == (1, "", "backfeedr: nothing is kept of a device 'd1'\n")
    assert sql("backfeedr.db", "select name from events") == [("purchase",)]
    check_database("backfeedr.db", forgotten=True)


@pytest.fixture
def filled(command, clock):
    """A database at the commands' own path, with reports of three apps in it."""
    clock.seconds = time.time() - 40 * 24 * 3600
    with Backfeedr(Settings(db_path="backfeedr.db", api_key=KEY, auth_token=TOKEN), clock=clock) as server:
        fill(server, clock, 1, 150)
        clock.seconds = time.time()
        Api(server).post(CRASHES, {
            **CRASH, "occurred_at": "0001-01-01T00:00:00+14:00", "exception_reason": "=1+1 \u2028 \u0001",
            "battery_level": -1, "is_charging": False, "free_memory_mb": 1.5, "id": 7, "app": "me", "extra": {"x": [1e300, None]},
            "stack_trace": [{"symbol": "\ufffd\n", "line": None, "more": {"deep": [1.0, -0.0, 10 ** 30]}}]})
        Api(server).post(EVENTS, {**EVENT, "occurred_at": "9999-12-31T23:59:59.999-23:59", "received_at": "",
                                  "is_test": 0, "properties": {"cell": "\t=1"}})
        yield server


def exported(command, kind, *arguments):
    status, out, err = command("export", kind, *arguments)
    assert (status, err) == (0, "")
    return [json.loads(line) for line in out.split("\n")[:-1]]


@sqlite_only
def test_check_knows_that_a_device_goes_to_the_hour(command, serve, clock, tmp_path):
    server = serve("backfeedr.db", retention_days=1)
    serve.unchecked.append(server)
    for _ in range(2):
        Api(server).post(EVENTS, {**EVENT, "device_id_hash": "d"})
        clock.move(20 * 60)
    clock.move(24 * 3600 - 30 * 60)
    server.store.prune()
    assert len(stored(server, "events")["events"]) == 1 and stored(server, "devices") == {"devices": []}
    status, out, err = command("check", "--db", str(server.store.path))
    assert (status, err) == (0, ""), out


@sqlite_only
def test_what_export_prints_import_stores_as_it_was(command, filled, serve, tmp_path):
    for kind in ("crashes", "events"):
        Path(kind).write_bytes(command("export", kind)[1].encode())
    Path("all").write_bytes(Path("events").read_bytes() + b"\n" + Path("crashes").read_bytes())
    count = Path("all").read_bytes().count(b"\n") - 1
    status, out, err = command("import", "all", "--db", "other.db")
    assert (status, out) == (0, "")
    assert err == f"Stored {count:,} reports; 0 were here already, and the time of 0 is over.\n"
    again = command("import", "all", "--db", "other.db")[2]
    assert again == f"Stored 0 reports; {count:,} were here already, and the time of 0 is over.\n"
    for kind in ("crashes", "events"):
        assert command("export", kind, "--db", "other.db")[1].encode() == Path(kind).read_bytes()
    other = serve("other.db")
    assert named_rows(other) == named_rows(filled) and answers(other) == answers(filled)


def test_an_export_has_each_report_as_it_was_sent_and_what_the_server_knew(command, filled):
    crash = exported(command, "crashes")[-1]
    assert crash.pop("id") == sql("backfeedr.db", "select id from crashes order by seq")[-1][0]
    assert crash.pop("group_hash") and parse_time(crash.pop("received_at")) == filled.store.now
    assert parse_time(crash.pop("occurred_at")) == parse_time("0001-01-01T00:00:00+14:00")
    assert crash == {"app": "default", "is_test": False, "exception_type": "SIGABRT", "battery_level": -1.0,
                     "exception_reason": "=1+1 \u2028 \u0001", "is_charging": False, "free_memory_mb": 1.5,
                     "stack_trace": [{"symbol": "\ufffd\n", "line": None, "more": {"deep": [1.0, -0.0, 10 ** 30]}}],
                     "extra": {"id": 7, "app": "me", "extra": {"x": [1e300, None]}}}


def test_an_export_is_of_one_app_or_since_a_day_of_receipt_where_that_is_asked(command, filled):
    reports = exported(command, "events")
    day = reports[len(reports) // 2]["received_at"][:10]
    assert exported(command, "events", "--app", "Beta") == [each for each in reports if each["is_test"]]
    assert exported(command, "events", "--since", day) == [each for each in reports if each["received_at"] >= day]
    assert command("export", "events", "--app", "Nope") == (1, "", "backfeedr: there is no app named 'Nope'\n")
    assert exported(command, "events", "--since", "9999-12-31") == []
    assert exported(command, "events", "--since", "0001-01-01") == reports
    for wrong in ("yesterday", "2026-02-30", "2026-3-1"):
        status, out, err = command("export", "events", "--since", wrong)
        assert (status, out) == (2, "") and "is not a date like 2026-03-12" in err


def test_no_cell_of_a_csv_is_a_formula(command, filled):
    key_hash = backfeedr.sha256(KEY)
    for start in ("=", "+", "-", "@", "\t", "\r", "a=", '"', ",\n"):
        filled.store.add(key_hash, [parse_event({**EVENT, "name": start + "1"})])
    out = command("export", "events", "--format", "csv")[1]
    rows = list(csv.DictReader(io.StringIO(out, newline="")))
    assert [row["name"] for row in rows[-9:]] == ["'=1", "'+1", "'-1", "'@1", "'\t1", "'\r1", "a=1", '"1', ",\n1"]
    assert [row["id"] for row in rows] == [each["id"] for each in exported(command, "events")]
    assert json.loads(rows[-10]["properties"]) == {"cell": "\t=1"}
    crash = list(csv.DictReader(io.StringIO(command("export", "crashes", "--format", "csv")[1], newline="")))[-1]
    assert (crash["battery_level"], crash["exception_reason"][:5]) == ("-1.0", "'=1+1"), "a number stays one"


@pytest.mark.parametrize("change, problem", [
    (b"junk", "invalid JSON"), (b"[]", "invalid JSON"), ({"id": None}, "invalid id"),
    ({"id": "evt_" + "f" * 16}, "invalid id"),
    ({"id": "evt_0000000000000001"}, "invalid id"), ({"received_at": "2001-01-01T00:00:00Z"}, "invalid id"),
    ({"received_at": "soon"}, "invalid received_at"), ({"app": None}, "invalid app"), ({"app": ""}, "an app's name is"),
    ({"app": "x" * 101}, "an app's name is"), ({"is_test": 1}, "invalid is_test"), ({"extra": []}, "invalid extra"),
    ({"is_test": True}, "the app 'default' is a live one here"), ({"occurred_at": None}, "missing occurred_at"),
    ({"type": "click"}, "invalid event type"), ({"name": "x" * 501}, "invalid name"),
    ({"properties": 1}, "invalid properties"),
])
def test_a_bad_line_is_named_and_what_stands_before_it_is_stored(command, filled, change, problem, monkeypatch):
    monkeypatch.setattr(backfeedr, "IMPORT_LINES", 5)
    good = [json.dumps(each).encode() for each in exported(command, "events") if each["app"] == "default"]
    bad = change if type(change) is bytes else json.dumps({**json.loads(good[7]), **change}).encode()
    Path("bad").write_bytes(b"\n".join([*good[:7], bad, *good[8:]]))
    status, out, err = command("import", "bad", "--db", "other.db")
    assert (status, out) == (1, "") and err.count("\n") == 1 and problem in err, err
    assert err.startswith("backfeedr: line 8: " if "app" not in problem or change == {"app": None} else "backfeedr: ")
    before = 7 if "line 8" in err else 5  # what the store refuses ends its whole step
    assert f"{before} reports before it were stored" in err
    assert len(sql("other.db", "select * from events")) == before
    Path("bad").write_bytes(b"\n".join(good))
    assert f"Stored {len(good) - before} reports; {before} were" in command("import", "bad", "--db", "other.db")[2]
    check_database("other.db")


def test_an_import_of_a_file_that_is_not_there_makes_no_database(command):
    status, out, err = command("import", "nothing", "--db", "other.db")
    assert (status, out, err) == (1, "", "backfeedr: cannot read nothing: No such file or directory\n")
    assert not Path("other.db").exists()


def test_an_import_that_the_disk_ends_says_how_far_it_came(command, filled, monkeypatch):
    def refuse(store, reports):
        raise StorageUnavailable()

    Path("events").write_text(command("export", "events")[1])
    monkeypatch.setattr(Store, "import_", refuse)
    status, out, err = command("import", "events", "--db", "other.db")
    assert (status, out) == (1, "")
    assert err.startswith("backfeedr: storage unavailable; 0 reports before it were stored: ")
    assert sql("other.db", "select * from events") == []


def test_a_backup_is_the_whole_database_and_replaces_nothing(command, filled):
    tables = stored(filled)
    status, out, err = command("backup", "copy.db")
    assert (status, out) == (0, "") and re.fullmatch(r"Wrote copy\.db, [0-9.]+ MB\.\n", err)
    assert stat.S_IMODE(os.stat("copy.db").st_mode) == 0o600
    assert {table: sql("copy.db", f"select * from {table}") for table in tables} == tables
    check_database("copy.db")
    before = Path("copy.db").read_bytes()
    assert command("backup", "copy.db") == (1, "", "backfeedr: there is a file copy.db already\n")
    assert Path("copy.db").read_bytes() == before
    assert command("backup", "no/copy.db")[2] \
        == "backfeedr: cannot write the backup no/copy.db: No such file or directory\n"
    assert list(Path().glob("*.partial*")) == []


def test_a_backup_that_fails_leaves_nothing(filled, monkeypatch, tmp_path):
    """Nor does it take the name of a file that has come meanwhile."""
    monkeypatch.setattr(backfeedr, "BACKUP_PAGES", 1)

    def interrupt(done, pages):
        if done > pages // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        backfeedr.backup(filled.store, tmp_path / "copy", interrupt)
    assert list(tmp_path.glob("copy*")) == []
    with pytest.raises(StoreError, match="copy: File exists"):
        backfeedr.backup(filled.store, tmp_path / "copy", lambda *_: (tmp_path / "copy").write_text("mine"))
    assert [path.read_text() for path in tmp_path.glob("copy*")] == ["mine"]


@pytest.mark.slow
def test_a_backup_under_load_holds_all_that_was_acknowledged_before_it_began(run, tmp_path):
    server = run()
    load = Load([server])
    for name in ("one", "two"):
        wait_until(lambda: len(load.acknowledged) > (2000 if name == "one" else 4000))
        before = list(load.acknowledged)
        subprocess.run([sys.executable, str(HERE / "backfeedr.py"), "backup", str(tmp_path / name),
                        "--db", str(tmp_path / "run.db")], check=True, capture_output=True)
        assert len(load.acknowledged) > len(before), "and nobody had to wait for it"
        assert set(before) <= set(stored_ids(tmp_path / name))
        check_database(tmp_path / name)
    load.finish()
    assert (load.lost, load.others) == (0, [])


def test_check_says_in_a_line_each_what_is_well_and_changes_nothing(command, filled):
    for closed in (False, True):
        if closed:
            filled.close()
        before = {path: path.read_bytes() for path in Path().iterdir() if path.suffix != ".db-shm"}
        status, out, err = command("check")
        lines = [re.fullmatch("ok  ([a-zA-Z -]+): .+", line)[1] for line in out.splitlines()]
        assert (status, err) == (0, "")
        assert lines == ["settings", "SQLite", "disk", "file", "schema", "pages", "roll-ups"]
        assert {path: path.read_bytes() for path in Path().iterdir() if path.suffix != ".db-shm"} == before


@pytest.mark.parametrize("damage, line", [
    ("update labels set crashes = crashes + 1 where day > 0", "roll-ups: the labels of days are"),
    ("delete from labels", "roll-ups: the labels of crashes are"),
    ("delete from crashes where exception_type = 'A'", "roll-ups: the labels of crashes are"),
    ("delete from groups", "roll-ups: the groups of crashes"),
    ("insert into group_hours values (1, 0, 'x', 1)", "roll-ups: the groups of the week are"),
    ("update hours set sessions = sessions + 1", "roll-ups: the hours and days are"),
    ("update days set crashes = 0 where app_id = 0", "roll-ups: the days of all apps are"),
    ("delete from durations", "roll-ups: the durations of days are"),
    ("delete from devices", "roll-ups: the devices of crashes, the devices of events are"),
    ("update sessions set last_seq = first_seq", "roll-ups: the sessions of events are"),
    ("drop index crashes_by_group", "schema: there is no index crashes_by_group"),
    ("alter table crashes drop column locale", "schema: there is no table crashes with locale"),
    ("pragma user_version = 9", "schema: "), ("pragma application_id = 9", "schema: "),
])
def test_check_finds_what_is_wrong(command, filled, damage, line):
    sql_run("backfeedr.db", damage)
    status, out, err = command("check")
    bad = [each for each in out.splitlines() if not each.startswith("ok  ")]
    assert (status, err, len(bad)) == (1, "", 1) and bad[0].startswith("BAD " + line), out


def test_check_leaves_an_older_schema_to_the_next_start_and_an_empty_file_alone(command, filled, monkeypatch):
    monkeypatch.setattr(backfeedr, "SCHEMA_VERSION", backfeedr.SCHEMA_VERSION + 1)
    assert re.search(r"\nok  schema: version \d+, of which the next start makes version \d+\n", command("check")[1])
    Path("empty.db").touch()
    status, out, _ = command("check", "--db", "empty.db")
    assert status == 1 and "\nBAD schema: there are no tables\n" in out and Path("empty.db").read_bytes() == b""


def test_check_looks_at_what_a_crash_has_left_without_taking_it_in(command, filled):
    for name in ("backfeedr.db", "backfeedr.db-wal"):  # the other file beside them is lost
        shutil.copy(name, name.replace("backfeedr", "crashed"))
    before = {name: Path(name).read_bytes() for name in ("crashed.db", "crashed.db-wal")}
    assert command("check", "--db", "crashed.db")[::2] == (0, "")
    assert {name: Path(name).read_bytes() for name in before} == before


def test_check_finds_a_damaged_page_a_missing_file_a_full_disk_and_a_wrong_setting(command, filled, monkeypatch):
    filled.close()
    with open("backfeedr.db", "r+b") as file:
        file.seek(4096 * 20)
        file.write(b"\xff" * 4096 * 4)
    assert "\nBAD pages: " in command("check")[1]
    monkeypatch.setenv("BACKFEEDR_PORT", "http")
    monkeypatch.setattr(backfeedr, "LOW_DISK", 1 << 60)
    status, out, err = command("check", "--db", "typo.db")
    assert (status, err) == (1, "") and not Path("typo.db").exists()
    assert [line.split(":")[0] for line in out.splitlines()] == [
        "BAD settings", "ok  SQLite", "BAD disk", "BAD file", "BAD schema", "BAD pages", "BAD roll-ups"]


def test_long_work_shows_its_progress_on_a_terminal_only(command, filled, monkeypatch):
    Path("events").write_text(command("export", "events")[1])
    for arguments in (["export", "events"], ["import", "events"], ["backup", "copy"], ["prune"], ["check"]):
        assert "\r" not in command(*arguments)[2]
    monkeypatch.setattr(backfeedr, "PAGE_ROWS", 10)
    for arguments, shown in ((["export", "events"], "exporting: 10 events"), (["import", "events"], "importing: "),
                             (["backup", "copy2"], "copying: "), (["check"], "checking the settings"),
                             (["prune"], "deleting: ")):
        monkeypatch.setenv("BACKFEEDR_RETENTION_DAYS", "1" if arguments == ["prune"] else "90")
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        status, _, err = command(*arguments)
        assert status == 0 and f"\r\x1b[K{shown}" in err, arguments
        assert "\r" not in err.rpartition("\r\x1b[K")[2] and not err.split("\r\x1b[K")[-1].startswith(shown)


def test_an_interrupted_command_says_so_in_a_line(command, filled, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(backfeedr, "export_jsonl", interrupt)
    assert command("export", "events") == (1, "", "backfeedr: interrupted\n")


@pytest.mark.slow
def test_a_reader_that_has_had_enough_ends_an_export_quietly(command, filled):
    done = subprocess.run(["bash", "-c", f"'{sys.executable}' '{HERE / 'backfeedr.py'}' export events | head -n 1;"
                                         " echo ${PIPESTATUS[0]}"], capture_output=True, text=True, check=True)
    first, status = done.stdout.splitlines()
    assert json.loads(first) == exported(command, "events")[0] and done.stderr == "" and status in ("0", "1")


@pytest.mark.slow
def test_an_export_and_its_import_take_no_more_memory_for_more_events(command, clock):
    """Of a million it is what is measured by hand: 36 and 57 MB."""
    peaks = {}
    for count in (2_000, 40_000):
        with Store(f"{count}.db") as store:
            key_hash = backfeedr.sha256(store.create_app("Shop"))
            event = parse_event({**EVENT, "properties": {"text": "x" * 300}})
            for _ in range(count // 1000):
                store.add(key_hash, [event._replace(session_id=str(n), type="session_start") for n in range(1000)])
        for name, arguments, out in (("export", [], f"{count}"), ("import", [f"{count}"], os.devnull)):
            code = ("import resource, sys, backfeedr; assert not backfeedr.main(sys.argv[1:]); sys.stderr.write("
                    "'\\n%d' % resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
            db = f"{count}.db" if name == "export" else f"{count}-copy.db"
            with open(out, "wb") as file:
                done = subprocess.run([sys.executable, "-c", code, name, *(arguments or ["events"]), "--db", db],
                                      stdout=file, stderr=subprocess.PIPE, check=True, env={**os.environ, "PYTHONPATH": str(HERE)})
            peaks[name, count] = int(done.stderr.split()[-1])
        assert sql(f"{count}-copy.db", "select count(*) from events") == [(count,)]
    for name in ("export", "import"):
        assert peaks[name, 40_000] < peaks[name, 2_000] * 1.2, peaks


# == Examples ==================================================================

CLIENT_NOW = 1773325351.25  # 2026-03-12T14:22:31.250000Z


def load_example(name):
    """A fresh import of examples/NAME.py."""
    spec = importlib.util.spec_from_file_location("example_" + name, EXAMPLES / (name + ".py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


client_module = load_example("client")
embed_module = load_example("embed")


@contextmanager
def in_thread(server):
    """Serves in a thread, on the port that the server has taken; its address."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield "http://127.0.0.1:%d" % server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Stub(ThreadingHTTPServer):
    """Answers from a script, of which the last line is repeated, and keeps the requests it got.

    A line is (status, answer, headers), "drop" to close without a word, "cut" to close
    within the answer, or "hang" to say nothing until the client has gone.
    """

    daemon_threads = True

    def __init__(self, *script):
        super().__init__(("127.0.0.1", 0), StubHandler)
        self.script, self.requests = list(script), []


class StubHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, self.headers, body))
        line = self.server.script.pop(0) if len(self.server.script) > 1 else self.server.script[0]
        line = line(body) if callable(line) else line
        if line == "hang":
            self.rfile.read(1)
        elif line == "cut":
            self.send_response(201)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b'{"id"')
        elif line != "drop":
            self.answer(*line)

    def answer(self, status, answer, headers=()):
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in dict(headers, **{"Content-Length": len(body)}).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


STORED = 201, {"id": "evt_1"}
UNAVAILABLE = 503, {"error": "storage unavailable"}


def batch_answer(body):
    """What a server answers to a batch: an id that names the event, so that the order shows."""
    ids = ["evt_" + event["name"] for event in json.loads(body)["events"]]
    return 201, {"count": len(ids), "ids": ids}


class Sleeps(list):
    """A `sleep` that only notes how long it was asked for."""

    __call__ = list.append


def make_client(url, key=KEY, **options):
    return client_module.Client(url, key, **dict({"sleep": Sleeps(), "clock": lambda: CLIENT_NOW}, **options))


def idempotency_keys(stub):
    return [headers["Idempotency-Key"] for _, headers, _ in stub.requests]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def run_example(name, *arguments, stdin=b"", **variables):
    """Runs an example as its reader does, without the BACKFEEDR_* variables of this process."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("BACKFEEDR_")}
    return subprocess.run([sys.executable, str(EXAMPLES / (name + ".py")), *arguments], input=stdin, timeout=20,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(environ, **variables))


def quiet_server(tmp_path, **settings):
    return backfeedr.Backfeedr(db_path=str(tmp_path / "crashes.db"), announce=lambda text: None,
                               **dict({"rate_limit": 0}, **settings))


def stored_names(server):
    with server.store.reading() as db:
        return [name for name, in db.execute("select name from events order by seq")]


class LosingHandler(WSGIRequestHandler):
    """Lets the app reach the connection, to close it under its own answer."""

    def get_environ(self):
        return dict(super().get_environ(), **{"test.connection": self.connection})

    def log_message(self, *args):
        pass


def losing(app, losses):
    """The app, whose answers get lost on the way, each in the next of the ways in `losses`."""
    def lose(environ, start_response):
        loss, head = losses.pop(0) if losses else None, []
        body = b"".join(app(environ, lambda *args: head.extend(args)))
        if loss == "gateway":
            head, body = ["502 Bad Gateway", [("Content-Type", "text/html")]], b"<h1>502</h1>"
        if loss == "drop":
            environ["test.connection"].shutdown(socket.SHUT_RDWR)
        start_response(*head)
        return [body[:5] if loss == "cut" else body]
    return lose


@contextmanager
def wsgi_server(app):
    server = WSGIServer(("127.0.0.1", 0), LosingHandler)
    server.set_app(app)
    with in_thread(server) as url:
        yield url


# -- examples/client.py: one request -------------------------------------------

def test_client_signature_equals_the_vector():
    body = b'{"type":"custom","name":"purchase","occurred_at":"2026-03-12T14:22:31Z"}'
    assert client_module.signature(KEY, "2026-03-12T14:22:31Z", body) == (
        "sha256=6c3e10dd63bdf20cb9257a8a8b590969e83722725287c4009b98423fc82add3d")


@pytest.mark.parametrize("suffix", ["", "/", "/api/v1", "/api/v1/"])
@pytest.mark.parametrize("prefix", ["", "/crashes", "/a/b"])
def test_client_finds_the_api_under_any_form_of_endpoint(prefix, suffix):
    stub = Stub(STORED)
    with in_thread(stub) as url:
        client = make_client(url + prefix + suffix)
        client.crash(CRASH), client.event(EVENT)
    assert [path for path, _, _ in stub.requests] == [prefix + "/api/v1/crashes", prefix + "/api/v1/events"]


@pytest.mark.parametrize("endpoint", [
    "", "localhost:8080", "ftp://localhost", "http://", "http://:8080", "http://user:word@localhost",
    "http://localhost?app=Shop", "http://localhost:port"])
def test_client_refuses_what_is_no_endpoint(endpoint):
    with pytest.raises(ValueError):
        make_client(endpoint)


@pytest.mark.parametrize("key", ["", "bf_live_1\nX-Admin: 1", "bf_live_1\r", "\udcff"])
def test_client_refuses_what_is_no_key_without_showing_it(key):
    with pytest.raises(ValueError) as caught:
        make_client("http://localhost", key)
    assert not key or key not in str(caught.value)


def test_client_signs_the_bytes_it_sends_at_the_present_time():
    stub = Stub(STORED)
    with in_thread(stub) as url:
        assert make_client(url).event(EVENT) == {"id": "evt_1"}
    (_, headers, body), = stub.requests
    assert headers["X-Backfeedr-Timestamp"] == "2026-03-12T14:22:31.250000Z"
    assert headers["X-Backfeedr-Signature"] == client_module.signature(
        KEY, headers["X-Backfeedr-Timestamp"], body)
    assert (headers["X-Backfeedr-Key"], headers["Content-Type"]) == (KEY, "application/json")
    assert json.loads(body) == EVENT


def test_client_without_sign_sends_neither_timestamp_nor_signature():
    stub = Stub(STORED)
    with in_thread(stub) as url:
        make_client(url, sign=False).event(EVENT)
    (_, headers, _), = stub.requests
    assert headers["X-Backfeedr-Timestamp"] is None and headers["X-Backfeedr-Signature"] is None


@pytest.mark.parametrize("absent", [{}, {"occurred_at": None}, {"occurred_at": ""}])
def test_client_fills_in_a_missing_occurred_at_and_leaves_the_callers_report_as_it_is(absent):
    report = dict({"exception_type": "SIGABRT"}, **absent)
    before, stub = dict(report), Stub(STORED)
    with in_thread(stub) as url:
        make_client(url).crash(report)
    assert json.loads(stub.requests[0][2])["occurred_at"] == "2026-03-12T14:22:31.250000Z"
    assert report == before


def test_client_refuses_a_number_that_json_has_no_word_for():
    stub = Stub(STORED)
    with in_thread(stub) as url, pytest.raises(ValueError):
        make_client(url).crash({"exception_type": "SIGABRT", "free_memory_mb": float("nan")})
    assert stub.requests == []


# -- examples/client.py: attempts ----------------------------------------------

LOSSES = ["drop", "cut", "hang"]


@pytest.mark.parametrize("loss", LOSSES)
def test_client_retries_a_lost_connection_with_the_same_idempotency_key(loss):
    stub = Stub(loss, loss, STORED)
    with in_thread(stub) as url:
        client = make_client(url, timeout=0.2 if loss == "hang" else 10)
        assert client.event(EVENT) == {"id": "evt_1"}
    assert len(stub.requests) == 3
    assert len(set(idempotency_keys(stub))) == len({body for _, _, body in stub.requests}) == 1
    assert len(idempotency_keys(stub)[0]) >= 32


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_client_retries_an_answer_that_may_change_with_the_same_idempotency_key(status):
    stub = Stub((status, {"error": "later"}), STORED)
    with in_thread(stub) as url:
        assert make_client(url).event(EVENT) == {"id": "evt_1"}
    (_, _, first), (_, _, second) = stub.requests
    assert len(set(idempotency_keys(stub))) == 1 and first == second


@pytest.mark.parametrize("status", [400, 401, 404, 405, 413, 415, 422, 501])
def test_client_does_not_retry_an_answer_that_will_not_change(status):
    stub, sleeps = Stub((status, {"error": "invalid occurred_at"}, {"Retry-After": 1})), Sleeps()
    with in_thread(stub) as url, pytest.raises(client_module.ServerError) as caught:
        make_client(url, sleep=sleeps).event(EVENT)
    assert (caught.value.status, caught.value.message) == (status, "invalid occurred_at")
    assert len(stub.requests) == 1 and sleeps == []


def test_client_waits_twice_as_long_each_time_with_jitter():
    stub, sleeps = Stub(UNAVAILABLE), Sleeps()
    with in_thread(stub) as url, pytest.raises(client_module.ServerError):
        make_client(url, sleep=sleeps, attempts=10).event(EVENT)
    for pause, longest in zip(sleeps, [0.5, 1, 2, 4, 8, 16, 30, 30, 30]):
        assert longest / 2 <= pause <= longest
    assert len(sleeps) == len(set(sleeps)) == 9


@pytest.mark.parametrize("status", [429, 503])
def test_client_waits_as_long_as_the_server_asks_and_a_little_longer(status):
    stub, sleeps = Stub((status, {"error": "later"}, {"Retry-After": 17}), STORED), Sleeps()
    with in_thread(stub) as url:
        make_client(url, sleep=sleeps).event(EVENT)
    assert len(sleeps) == 1 and 17 < sleeps[0] <= 17.5


@pytest.mark.parametrize("text", ["Thu, 12 Mar 2026 14:22:31 GMT", "-5", "1.5", "", "\u0663", "9" * 5000])
def test_client_backs_off_by_itself_where_retry_after_is_no_number_of_seconds(text):
    headers = {"Retry-After": text.encode().decode("latin-1")}
    stub, sleeps = Stub((503, {"error": "storage unavailable"}, headers), STORED), Sleeps()
    with in_thread(stub) as url:
        make_client(url, sleep=sleeps).event(EVENT)
    assert len(sleeps) == 1 and 0.25 <= sleeps[0] <= 0.5


@pytest.mark.parametrize("seconds, attempts", [(300, 2), (301, 1)])
def test_client_gives_up_where_it_would_wait_longer_than_five_minutes(seconds, attempts):
    stub = Stub((503, {"error": "storage unavailable"}, {"Retry-After": seconds}))
    with in_thread(stub) as url, pytest.raises(client_module.ServerError) as caught:
        make_client(url, attempts=2).event(EVENT)
    assert len(stub.requests) == attempts and caught.value.retry_after == seconds


@pytest.mark.parametrize("attempts", [1, 2, 5])
def test_client_raises_the_servers_error_after_the_last_attempt(attempts):
    stub, sleeps = Stub((500, {"error": "internal server error"})), Sleeps()
    with in_thread(stub) as url, pytest.raises(client_module.ServerError) as caught:
        make_client(url, attempts=attempts, sleep=sleeps).event(EVENT)
    assert (caught.value.status, caught.value.message) == (500, "internal server error")
    assert (len(stub.requests), len(sleeps)) == (attempts, attempts - 1)


@pytest.mark.parametrize("loss", LOSSES)
def test_client_raises_connection_lost_after_the_last_attempt(loss):
    stub = Stub(loss)
    with in_thread(stub) as url, pytest.raises(client_module.ConnectionLost) as caught:
        make_client(url, attempts=2, timeout=0.2 if loss == "hang" else 10).event(EVENT)
    assert len(stub.requests) == 2
    assert isinstance(caught.value.__cause__, (OSError, http.client.HTTPException))


def test_client_retries_a_refused_connection():
    sleeps = Sleeps()
    with pytest.raises(client_module.ConnectionLost) as caught:
        make_client("http://127.0.0.1:%d" % free_port(), sleep=sleeps).event(EVENT)
    assert len(sleeps) == 4 and isinstance(caught.value.__cause__, ConnectionRefusedError)


def test_client_signs_each_attempt_anew():
    stub, times = Stub(UNAVAILABLE, STORED), iter([CLIENT_NOW, CLIENT_NOW + 299])
    with in_thread(stub) as url:
        make_client(url, clock=lambda: next(times)).event(EVENT)
    timestamps = [headers["X-Backfeedr-Timestamp"] for _, headers, _ in stub.requests]
    assert timestamps == ["2026-03-12T14:22:31.250000Z", "2026-03-12T14:27:30.250000Z"]
    for _, headers, body in stub.requests:
        assert headers["X-Backfeedr-Signature"] == client_module.signature(
            KEY, headers["X-Backfeedr-Timestamp"], body)


def test_client_gives_each_request_an_idempotency_key_of_its_own():
    stub = Stub(STORED)
    with in_thread(stub) as url:
        client = make_client(url)
        client.event(EVENT), client.event(EVENT)
    assert len(set(idempotency_keys(stub))) == 2


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_client_never_follows_a_redirect(status):
    elsewhere = Stub(STORED)
    with in_thread(elsewhere) as other:
        stub = Stub((status, {}, {"Location": other + "/api/v1/events"}))
        with in_thread(stub) as url, pytest.raises(client_module.ServerError) as caught:
            make_client(url).event(EVENT)
    assert caught.value.status == status and len(stub.requests) == 1 and elsewhere.requests == []


@pytest.mark.parametrize("status, answer", [
    (200, b"<html>Welcome to the hotel</html>"), (201, b""), (200, {}), (200, []), (200, "evt_1"), (204, b""),
    (202, {"id": "evt_1"})])
def test_client_does_not_believe_an_answer_that_is_not_the_servers(status, answer):
    stub = Stub((status, answer))
    with in_thread(stub) as url, pytest.raises(client_module.ServerError) as caught:
        make_client(url).event(EVENT)
    assert caught.value.status == status and len(stub.requests) == 1


def test_client_takes_a_repeated_answer_as_stored():
    stub = Stub((200, {"id": "evt_1"}))
    with in_thread(stub) as url:
        assert make_client(url).event(EVENT) == {"id": "evt_1"}


def test_client_reads_a_refusal_that_comes_before_all_is_sent():
    class Refusing(socketserver.BaseRequestHandler):
        def handle(self):  # leaves the body unread, so that the connection is reset
            self.request.recv(1024)
            self.request.sendall(b'HTTP/1.1 413 Too Large\r\nContent-Length: 18\r\n\r\n{"error": "large"}')

    server = socketserver.TCPServer(("127.0.0.1", 0), Refusing)
    with in_thread(server) as url, pytest.raises(client_module.ServerError) as caught:
        make_client(url).crash({"exception_type": "x" * 20_000_000})
    assert (caught.value.status, caught.value.message) == (413, "large")


# -- examples/client.py: batches -----------------------------------------------

def numbered_events(count):
    return [{"type": "custom", "name": str(number)} for number in range(count)]


@pytest.mark.parametrize("count, sizes", [
    (0, []), (1, [1]), (100, [100]), (101, [100, 1]), (200, [100, 100]), (250, [100, 100, 50])])
def test_client_sends_a_long_batch_in_several_and_merges_the_answers(count, sizes):
    events, stub = numbered_events(count), Stub(batch_answer)
    with in_thread(stub) as url:
        answer = make_client(url).batch(events)
    assert answer == {"count": count, "ids": ["evt_%d" % number for number in range(count)]}
    assert [len(json.loads(body)["events"]) for _, _, body in stub.requests] == sizes
    assert len(set(idempotency_keys(stub))) == len(sizes)
    assert {path for path, _, _ in stub.requests} <= {"/api/v1/events/batch"}
    assert events == numbered_events(count)


def test_client_tells_what_of_a_long_batch_is_stored_when_a_later_part_fails():
    stub = Stub(batch_answer, (400, {"error": "invalid name at index 3"}), batch_answer)
    with in_thread(stub) as url, pytest.raises(client_module.ServerError) as caught:
        make_client(url).batch(numbered_events(250))
    assert caught.value.stored == {"count": 100, "ids": ["evt_%d" % number for number in range(100)]}
    assert len(stub.requests) == 2


# -- examples/client.py: with a real server ------------------------------------

@pytest.mark.parametrize("losses", [["drop"], ["cut"], ["gateway"], ["drop", "cut", "gateway"]], ids="+".join)
@pytest.mark.parametrize("sign", [True, False], ids=["signed", "unsigned"])
def test_client_whose_answer_was_lost_stores_nothing_twice(tmp_path, losses, sign):
    with quiet_server(tmp_path) as server, wsgi_server(losing(server, list(losses))) as url:
        client = client_module.Client(url, server.store.create_app("Shop"), sign=sign, sleep=Sleeps())
        answer = client.event({"type": "custom", "name": "purchase"})
        with server.store.reading() as db:
            assert db.execute("select id, name from events").fetchall() == [(answer["id"], "purchase")]


def test_client_whose_answer_was_lost_within_a_long_batch_stores_each_event_once(tmp_path):
    losses = [None, "drop", None, "cut"]
    with quiet_server(tmp_path) as server, wsgi_server(losing(server, losses)) as url:
        answer = client_module.Client(url, server.store.create_app("Shop"), sleep=Sleeps()).batch(numbered_events(250))
        assert stored_names(server) == [str(number) for number in range(250)]
    assert losses == [] and answer["count"] == len(set(answer["ids"])) == 250


def test_client_sends_two_equal_events_in_the_same_second_as_two(tmp_path):
    seconds = iter(number / 1000 for number in range(100))
    with quiet_server(tmp_path) as server, wsgi_server(server) as url:
        start = server.store.now // 1000
        client = client_module.Client(url, server.store.create_app("Shop"), clock=lambda: start + next(seconds))
        client.event(EVENT), client.event(EVENT)
        assert stored_names(server) == ["purchase", "purchase"]


@pytest.mark.parametrize("key", ["a key of my own", "schl\u00fcssel-\u9375"])
def test_client_signs_with_whatever_text_an_operator_chose_as_key(tmp_path, key):
    with quiet_server(tmp_path, api_key=key, require_signature=True) as server, wsgi_server(server) as url:
        client_module.Client(url, key).event(EVENT)
        assert stored_names(server) == ["purchase"]


# -- examples/client.py: command line ------------------------------------------

@pytest.mark.parametrize("kind, answered", [("crash", "group_hash"), ("event", "id"), ("batch", "count")])
def test_client_command_sends_the_example_payloads(tmp_path, kind, answered):
    with quiet_server(tmp_path, require_signature=True) as server, wsgi_server(server) as url:
        done = run_example("client", kind, str(EXAMPLES / (kind + ".json")),
                           BACKFEEDR_ENDPOINT=url, BACKFEEDR_API_KEY=server.store.create_app("Shop"))
    assert (done.returncode, done.stderr) == (0, b"")
    assert answered in json.loads(done.stdout)


def test_client_command_prefers_its_options_and_reads_standard_input():
    stub = Stub(batch_answer)
    with in_thread(stub) as url:
        done = run_example("client", "--endpoint", url, "--key", "mine", "--unsigned", "batch", "-",
                           stdin=b'[{"type": "custom", "name": "7"}]',
                           BACKFEEDR_ENDPOINT="http://127.0.0.1:1", BACKFEEDR_API_KEY="other")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"count": 1, "ids": ["evt_7"]})
    (_, headers, _), = stub.requests
    assert headers["X-Backfeedr-Key"] == "mine" and headers["X-Backfeedr-Signature"] is None


@pytest.mark.parametrize("arguments", [
    [], ["crash"], ["report", "-"], ["--key", "", "crash", "-"], ["--key", "k\n", "crash", "-"],
    ["--endpoint", "localhost:8080", "crash", "-"]])
def test_client_command_ends_with_2_for_wrong_usage(arguments, capsys, monkeypatch):
    monkeypatch.setenv("BACKFEEDR_API_KEY", KEY)
    with pytest.raises(SystemExit) as caught:
        client_module.main(arguments)
    assert caught.value.code == 2 and "usage:" in capsys.readouterr().err


def run_main(monkeypatch, capsys, arguments, stdin=b""):
    """The command line within this process, where it need not sleep: status, output, errors."""
    client = client_module.Client
    monkeypatch.setattr(client_module, "Client", lambda *args, **options: client(*args, sleep=Sleeps(), **options))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    status = client_module.main(["--key", KEY, *arguments])
    return (status, *capsys.readouterr())


@pytest.mark.parametrize("kind, text, told", [
    ("crash", b"", "- is not JSON"),
    ("crash", b"{", "- is not JSON"),
    ("crash", b"\xff\xfe\xff", "- is not JSON"),
    ("crash", b"[" * 100_000, "recursion"),
    ("crash", b"[]", "- holds no JSON object"),
    ("event", b'"purchase"', "- holds no JSON object"),
    ("batch", b"{}", "- holds no list of JSON objects"),
    ("batch", b'{"events": {}}', "- holds no list of JSON objects"),
    ("batch", b'[{"type": "custom"}, 3]', "- holds no list of JSON objects"),
    ("crash", b'{"exception_type": NaN}', "not JSON compliant"),
])
def test_client_command_tells_in_one_line_what_it_cannot_send(monkeypatch, capsys, kind, text, told):
    status, out, err = run_main(monkeypatch, capsys, ["--endpoint", "http://127.0.0.1:1", kind, "-"], text)
    assert (status, out) == (1, "") and told in err and err.count("\n") == 1


@pytest.mark.parametrize("script, told", [
    ([(400, {"error": "invalid\n  locale"})], "client: the server answered 400: invalid locale"),
    ([(302, {}, {"Location": "https://example.com/"})],
     "client: the server answered 302: redirects are not followed (to https://example.com/)"),
    ([(502, b"<h1>Bad Gateway</h1>")], "client: the server answered 502: not an answer of backfeedr"),
    ([batch_answer, (413, {"error": "request body too large"})],
     "client: the server answered 413: request body too large (the first 100 events are stored)"),
])
def test_client_command_tells_in_one_line_what_the_server_answered(monkeypatch, capsys, script, told):
    with in_thread(Stub(*script)) as url:
        done = run_main(monkeypatch, capsys, ["--endpoint", url, "batch", "-"],
                        json.dumps({"events": numbered_events(101)}).encode())
    assert done == (1, "", told + "\n")


def test_client_command_tells_in_one_line_that_nobody_listens(monkeypatch, capsys):
    endpoint = "http://127.0.0.1:%d" % free_port()
    status, out, err = run_main(monkeypatch, capsys, ["--endpoint", endpoint, "event", "-"], b"{}")
    assert (status, out) == (1, "") and err.startswith("client: no answer from " + endpoint) and err.count("\n") == 1


def test_client_command_run_as_a_program_fails_without_a_traceback(tmp_path):
    done = run_example("client", "--key", KEY, "crash", str(tmp_path / "none.json"))
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode() == "client: cannot read %s: No such file or directory\n" % (tmp_path / "none.json")


# -- examples/openapi.json -----------------------------------------------------

OPENAPI = json.loads((EXAMPLES / "openapi.json").read_bytes())
OPERATIONS = [(method.upper(), path, operation) for path, operations in OPENAPI["paths"].items()
              for method, operation in operations.items()]
JSON_TYPES = {"string": str, "object": dict, "array": list, "boolean": bool, "null": type(None)}


def resolved(part):
    """A part of the description, or what it refers to."""
    while "$ref" in part:
        place = OPENAPI
        for name in part["$ref"].split("/")[1:]:
            place = place[name]
        part = place
    return part


def is_type(name, value):
    if name in ("integer", "number"):
        return type(value) is int or name == "number" and type(value) is float
    return type(value) is JSON_TYPES[name]


def faults(schema, value, where="$"):
    """Where a value is not what a schema says: as much of JSON Schema as openapi.json uses."""
    schema = resolved(schema)
    unknown = schema.keys() - {"type", "enum", "pattern", "format", "minLength", "maxLength", "minimum", "maximum",
                               "items", "minItems", "maxItems", "properties", "required", "additionalProperties", "description"}
    assert not unknown, f"{where}: {unknown} would not be checked"
    types = schema["type"] if type(schema["type"]) is list else [schema["type"]]
    wrong = [] if any(is_type(name, value) for name in types) else ["type"]
    if "enum" in schema and value not in schema["enum"]:
        wrong.append("enum")
    if type(value) is str and not wrong:
        wrong += ["pattern"] * (not re.search(schema.get("pattern", ""), value))
        wrong += ["length"] * (not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)))
    if type(value) in (int, float) and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        wrong.append("bounds")
    yield from (f"{where}: {what} of {value!r}" for what in wrong)
    if type(value) is list:
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            yield f"{where}: {len(value)} items"
        for n, item in enumerate(value):
            yield from faults(schema["items"], item, f"{where}[{n}]")
    if type(value) is dict:
        known = schema.get("properties", {})
        yield from (f"{where}: no {name}" for name in schema.get("required", []) if name not in value)
        for name, item in value.items():
            if name in known:
                yield from faults(known[name], item, f"{where}.{name}")
            elif not schema["additionalProperties"]:
                yield f"{where}: {name} is not described"


def content(part):
    return resolved(part)["content"]["application/json"]


class Documented:
    """Sends requests and checks each answer against the description of its operation."""

    def __init__(self, server):
        self.server, self.seen = server, defaultdict(set)

    def send(self, method, path, expected, query=None, body=b"", **headers):
        operation = OPENAPI["paths"][path][method.lower()]
        place = "/api/v1" + path.replace("{group_hash}", OPENAPI["components"]["parameters"]["group_hash"]["example"])
        status, answer = call(self.server, method, place, body, urlencode(query or {}), **headers)
        assert status == expected, (method, path, query, status, answer)
        assert list(faults(content(operation["responses"][str(status)])["schema"], answer)) == []
        self.seen[method, path].add(str(status))
        return answer


@pytest.mark.parametrize("schema, good, bad", [
    ({"type": "integer", "minimum": 0}, [0, 1], [True, 1.0, "1", None, -1]),
    ({"type": ["number", "null"], "maximum": 1}, [0.5, 1, None], [False, 1.5, ""]),
    ({"type": "string", "pattern": "^[a-z]$"}, ["a"], ["", "A", "ab", 1, None]),
    ({"type": "string", "minLength": 1, "maxLength": 2}, ["a", "ab"], ["", "abc"]),
    ({"type": "string", "enum": ["a"]}, ["a"], ["b", 1]),
    ({"type": "array", "minItems": 1, "maxItems": 2, "items": {"type": "boolean"}},
     [[True]], [[], [1], [True] * 3, {}]),
    ({"type": "object", "required": ["a"], "properties": {"a": {"type": "null"}}, "additionalProperties": False},
     [{"a": None}], [{}, {"a": 1}, {"a": None, "b": 1}, []]),
    ({"$ref": "#/components/schemas/Health"}, [{"status": "ok"}], [{"status": "bad"}, {}]),
])
def test_the_validator_of_these_tests_tells_good_from_bad(schema, good, bad):
    assert [list(faults(schema, value)) for value in good] == [[]] * len(good)
    assert all(list(faults(schema, value)) for value in bad)


def test_openapi_has_every_route_of_the_server_and_no_other(api):
    routes = {(route.method, re.sub("<(.*?)>", r"{\1}", route.rule)) for route in api.server._router.routes
              if route.rule.startswith("/api/")}
    assert {(method, "/api/v1" + path) for method, path, _ in OPERATIONS} == routes
    assert OPENAPI["info"]["version"] == backfeedr.__version__


def test_openapi_has_every_field_and_every_error_of_the_server():
    schemas, responses = OPENAPI["components"]["schemas"], OPENAPI["components"]["responses"].values()
    assert list(schemas["Crash"]["properties"]) == list(backfeedr._CRASH_FIELDS)
    assert list(schemas["Event"]["properties"]) == list(backfeedr._EVENT_FIELDS)
    assert schemas["Event"]["properties"]["type"]["enum"] == list(backfeedr.EVENT_TYPES)
    texts = [content(response)["schema"]["properties"]["error"] for response in responses]
    assert {text for each in texts for text in each.get("enum", [])} \
        == {text for status, texts in backfeedr.ERRORS.items() if status != 405 for text in texts}
    pattern, = (each["pattern"] for each in texts if "pattern" in each)
    assert all(re.search(pattern, text) for _, _, text in BAD_BODIES)


def test_every_example_of_openapi_is_what_its_schema_says():
    for _, path, operation in OPERATIONS:
        for status, response in operation["responses"].items():
            assert list(faults(content(response)["schema"], content(response)["example"])) == [], (path, status)
        for parameter in map(resolved, operation.get("parameters", [])):
            assert list(faults(parameter["schema"], parameter["example"])) == [], parameter
        if "requestBody" in operation:
            for example in content(operation["requestBody"])["examples"].values():
                assert list(faults(content(operation["requestBody"])["schema"], example["value"])) == [], path


def test_every_request_of_openapi_is_answered_as_it_says(serve, clock, monkeypatch):
    """Each example, with each parameter; and each refusal that a client can bring about."""
    sent = Documented(serve(max_body_size=10_000, rate_limit=1000))
    admin = {"Authorization": "Bearer " + TOKEN}
    for method, path, operation in OPERATIONS:
        if method == "POST":
            examples = [each["value"] for each in content(operation["requestBody"])["examples"].values()]
            for n, example in enumerate(examples):
                body, mark = json.dumps(example).encode(), f"{path} {n}"
                first = sent.send(method, path, 201, body=body, Idempotency_Key=mark)
                assert sent.send(method, path, 200, body=body, Idempotency_Key=mark) == first
                sent.send(method, path, 422, body=body + b" ", Idempotency_Key=mark)
                sent.send(method, path, 201, body=gzip.compress(body), Content_Encoding="gzip")
                sign = backfeedr.sign(KEY.encode(), NOW.encode(), body)
                sent.send(method, path, 201, body=body, X_Backfeedr_Timestamp=NOW, X_Backfeedr_Signature=sign)
                sent.send(method, path, 401, body=body, X_Backfeedr_Timestamp=NOW, X_Backfeedr_Signature="sha256=0")
            sent.send(method, path, 401, body=body, X_Backfeedr_Key=None)
            sent.send(method, path, 400, body=b"{}")
            sent.send(method, path, 413, body=b" " * 10_001)
            sent.send(method, path, 415, body=body, Content_Encoding="br")
    for method, path, operation in OPERATIONS:
        if method == "GET":
            parameters = [each for each in map(resolved, operation.get("parameters", [])) if each["in"] == "query"]
            sent.send(method, path, 200, **admin)
            if {} not in operation["security"]:
                sent.send(method, path, 401)
            for parameter in parameters:
                name, schema = parameter["name"], parameter["schema"]
                sent.send(method, path, 200, {name: parameter["example"]}, **admin)
                if "minimum" in schema:
                    for value, status in ((-1, 400), (0, 200)):
                        sent.send(method, path, status, {name: schema["minimum"] + value}, **admin)
                        sent.send(method, path, status, {name: schema["maximum"] - value}, **admin)
                if name == "cursor":
                    sent.send(method, path, 400, {name: "x"}, **admin)
                if name == "app":
                    sent.send(method, path, 404, {name: "nope"}, **admin)
                    sent.send(method, path, 400, {"days": "0"}, **admin)
    private = Documented(serve("private.db", public_metrics=False))
    for method, path, operation in OPERATIONS:
        if {} in operation["security"] and path != "/health":
            private.send(method, path, 401)
            private.send(method, path, 200, **admin)
            sent.seen[method, path].add("401")
    sent.server._limiter.limit = 1
    for method, path, operation in OPERATIONS:
        if method == "POST":
            sent.send(method, path, 429, body=b"{}")
    sent.server._limiter.limit = 0

    def fail(*_):
        raise StorageUnavailable
    for name in ("writing", "check", "reading"):
        monkeypatch.setattr(sent.server.store, name, fail)
    monkeypatch.setattr(sent.server.store, "is_admin", lambda token: True)
    monkeypatch.setattr(sent.server.store, "is_known_key", lambda key: True)
    monkeypatch.setattr(sent.server.store, "is_active_key", lambda key: True)
    for method, path, operation in OPERATIONS:
        examples = content(operation["requestBody"])["examples"] if method == "POST" else {"": {"value": None}}
        sent.send(method, path, 503, body=json.dumps(list(examples.values())[0]["value"]).encode(), **admin)
    by_the_web_server = {"431", "500", "501"}
    for method, path, operation in OPERATIONS:
        assert operation["responses"].keys() - by_the_web_server == sent.seen[method, path], path


# -- examples/embed.py ---------------------------------------------------------

def test_embedded_server_answers_below_its_prefix_and_the_host_app_elsewhere(tmp_path):
    with quiet_server(tmp_path) as server:
        app = webtest.TestApp(embed_module.make_app(server))
        headers = {"X-Backfeedr-Key": server.store.create_app("Shop")}
        assert app.post_json("/crashes/api/v1/events", EVENT, headers=headers).status_int == 201
        assert app.get("/crashes/api/v1/health").json == {"status": "ok"}
        assert app.get("/crashes/nothing", status=404).json == {"error": "not found"}
        assert stored_names(server) == ["purchase"]
        for path in ("/", "/crashes", "/crashesque/api/v1/health", "/api/v1/health"):
            assert app.get(path).text == "Hello\n"


def test_embedded_server_is_told_where_it_is_mounted(tmp_path):
    seen = []
    app = webtest.TestApp(embed_module.make_app(
        lambda environ, start_response: seen.append((environ["SCRIPT_NAME"], environ["PATH_INFO"]))
        or embed_module.hello(environ, start_response)))
    app.get("/crashes/api/v1/health")
    app.get("/crashes/api/v1/health", extra_environ={"SCRIPT_NAME": "/host"})
    app.get("/crashes/")
    assert seen == [("/crashes", "/api/v1/health"), ("/host/crashes", "/api/v1/health"), ("/crashes", "/")]


@pytest.mark.slow
def test_embed_command_serves_and_announces_the_mounted_address(tmp_path):
    environ = {name: value for name, value in os.environ.items() if not name.startswith("BACKFEEDR_")}
    process = subprocess.Popen([sys.executable, str(EXAMPLES / "embed.py"), "--port", "0", "--db", "e.db"],
                               cwd=str(tmp_path), env=environ, stdout=subprocess.PIPE, universal_newlines=True)
    try:
        url = re.fullmatch(r"embed on (http://127\.0\.0\.1:[1-9]\d*)\n", process.stdout.readline()).group(1)
        told = read_until(process.stdout, "-d '")
        key = re.search("bf_live_[0-9a-f]{32}", told).group()
        assert f"curl -X POST {url}/crashes/api/v1/crashes" in told
        answer = client_module.Client(url + "/crashes", key, sleep=Sleeps()).crash(CRASH)
    finally:
        process.terminate()
        process.communicate(timeout=10)
    with backfeedr.Store(str(tmp_path / "e.db")) as store, store.reading() as db:
        assert db.execute("select id from crashes").fetchall() == [(answer["id"],)]


def read_until(stream, end):
    """The lines up to the one that has `end`."""
    text = ""
    while end not in text:
        line = stream.readline()
        assert line, text
        text += line
    return text


def test_embed_command_tells_in_one_line_that_its_port_is_taken(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = run_example("embed", "--port", str(listener.getsockname()[1]), "--db", str(tmp_path / "e.db"))
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"embed: ") and done.stderr.count(b"\n") == 1


# -- examples/benchmark.py -----------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("arguments", [
    ["ingest", "--quick", "--connections", "1", "--seconds", "1"],
    ["metrics", "--events", "1000", "--small", "1000", "--requests", "3", "--rounds", "1", "--no-prune"],
    pytest.param(["postgres", "URL", "--connections", "2", "--seconds", "1"], marks=needs_postgres)])
def test_the_benchmark_runs_and_finds_all_that_was_acknowledged(tmp_path, arguments):
    """Whether it is fast is not asked here: that is for whoever runs it to see."""
    arguments = [POSTGRES if argument == "URL" else argument for argument in arguments]
    done = subprocess.run([sys.executable, str(EXAMPLES / "benchmark.py"), *arguments, "--driver", "python",
                           "--dir", str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "All that was acknowledged is stored, and the databases are sound."
    assert list(tmp_path.iterdir()) == []


# == PostgreSQL ================================================================
#
# What examples/postgres.py adds: hosts that share a database. That it answers as
# SQLite does is what the sections before say, where BACKFEEDR_TEST_POSTGRES is set.

@needs_postgres
@pytest.mark.slow
def test_two_hosts_store_once_whatever_they_acknowledge_and_their_sums_equal_the_rows(run, schemas):
    hosts = [run(db=schemas()), run(db=schemas())]
    load = Load(hosts, clients=32)
    wait_until(lambda: len(load.acknowledged) > 1500, 60)
    load.finish()
    assert [host.stop()[0] for host in hosts] == [0, 0]
    assert (load.lost, load.others) == (0, [])
    assert sorted(load.acknowledged) == sorted(stored_ids(schemas()))
    check_database(schemas())


@needs_postgres
@pytest.mark.slow
def test_the_101st_request_of_a_key_is_refused_whichever_host_it_reaches(run, schemas):
    hosts = [run(db=schemas(), BACKFEEDR_RATE_LIMIT="100") for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: hosts[n % 2].post(EVENTS, EVENT)[0], range(110)))
    assert Counter(answers) == {201: 100, 429: 10}
    assert len(stored_ids(schemas())) == 100
    for host in hosts:
        status, headers, _ = ask(host.url + EVENTS, EVENT)
        assert status == 429 and 1 <= int(headers["Retry-After"]) <= 60


@needs_postgres
@pytest.mark.slow
def test_a_replay_sent_to_another_host_stores_nothing(run, schemas):
    one, two = run(db=schemas()), run(db=schemas())
    first = one.post(CRASHES, CRASH, **{"Idempotency-Key": "a"})
    assert two.post(CRASHES, CRASH, **{"Idempotency-Key": "a"}) == (200, first[1])
    assert two.post(CRASHES, {**CRASH, "locale": "de"}, **{"Idempotency-Key": "a"})[0] == 422
    assert stored_ids(schemas()) == [first[1]["id"]]


@needs_postgres
@pytest.mark.slow
def test_a_host_that_is_killed_loses_nothing_it_acknowledged_and_does_not_hold_up_the_other(run, schemas):
    hosts = [run(db=schemas()), run(db=schemas())]
    load = Load(hosts, clients=16)
    wait_until(lambda: len(load.acknowledged) > 300, 60)
    hosts[0].process.kill()
    at_the_kill = len(load.acknowledged)
    wait_until(lambda: len(load.acknowledged) > at_the_kill + 300, 60)
    hosts.append(run(db=schemas()))
    assert hosts[2].post(CRASHES, CRASH)[0] == 201
    load.finish()
    stored_now = stored_ids(schemas())
    assert load.others == [] and set(load.acknowledged) <= set(stored_now) and len(set(stored_now)) == len(stored_now)
    assert len(stored_now) - len(load.acknowledged) <= 1 + 10 * load.lost
    check_database(schemas())


@pytest.fixture
def cluster():
    """A PostgreSQL of one's own, which a test may stop: a function that runs pg_ctl, and the URL."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs:
        pytest.skip("there is no initdb")
    folder, port = Path(tempfile.mkdtemp(prefix="backfeedr-postgres-")), free_port()
    user = []
    if os.getuid() == 0:  # as whom PostgreSQL does not run
        shutil.chown(folder, "postgres")
        user = ["runuser", "-u", "postgres", "--"]

    def pg_ctl(*arguments, program="pg_ctl"):
        subprocess.run([*user, str(programs[-1].with_name(program)), "-D", str(folder / "data"), *arguments],
                       cwd=folder, check=True, stdout=subprocess.DEVNULL, timeout=60)

    start = ("start", "-w", "-l", str(folder / "log"),
             "-o", f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}")
    try:
        pg_ctl("-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "-U", "postgres", program="initdb")
        pg_ctl(*start)
        yield SimpleNamespace(stop=lambda: pg_ctl("stop", "-m", "immediate"), start=lambda: pg_ctl(*start),
                              url=f"postgresql://postgres@127.0.0.1:{port}/postgres")
        pg_ctl("stop", "-m", "immediate")
    finally:
        shutil.rmtree(folder)


@needs_postgres
@pytest.mark.slow
def test_a_database_that_is_restarted_under_load_loses_nothing_and_the_hosts_come_back_by_themselves(run, cluster):
    hosts = [run(db=cluster.url), run(db=cluster.url, BACKFEEDR_RATE_LIMIT="1000000")]
    load = Load(hosts, clients=16)
    wait_until(lambda: len(load.acknowledged) > 300, 60)
    cluster.stop()
    for host in hosts:
        status, headers, body = ask(host.url + EVENTS, EVENT)
        assert (status, json.loads(body)) == (503, {"error": "storage unavailable"}) and headers["Retry-After"] == "2"
        assert ask(host.url + "/api/v1/health")[0] == 503
    cluster.start()
    before = len(load.acknowledged)
    wait_until(lambda: len(load.acknowledged) > before + 300, 60)
    load.finish()
    assert [ask(host.url + "/api/v1/health")[0] for host in hosts] == [200, 200]
    assert load.lost == 0 and {status for status, _ in load.others} == {503}
    assert set(load.acknowledged) <= set(stored_ids(cluster.url))
    check_database(cluster.url)


@pytest.fixture
def balancer(tmp_path):
    """nginx by examples/deploy/two-hosts.nginx.conf, but for its addresses and https."""
    needs("nginx")
    started = []

    def start(*hosts):
        port = free_port()
        started.append(Nginx(tmp_path, edited(
            "two-hosts.nginx.conf", tmp_path, ("listen 80;", f"listen 127.0.0.1:{free_port()};"),
            ("    listen [::]:80;\n", ""), ("listen 443 ssl;", f"listen 127.0.0.1:{port};"),
            ("    listen [::]:443 ssl;\n", ""), ("    ssl_certificate ", "    #"), ("    ssl_certificate_key ", "    #"),
            *((f"10.0.0.1{number}:8080", f"127.0.0.1:{host.port}") for number, host in enumerate(hosts, 1)))))
        return Elsewhere(port)

    yield start
    for nginx in started:
        nginx.stop()


class Elsewhere(Running):
    """What answers at a port as a server does."""

    def __init__(self, port):
        self.port, self.url = port, f"http://127.0.0.1:{port}"


@needs_postgres
@pytest.mark.slow
def test_a_rolling_restart_behind_the_balancer_is_noticed_by_nobody(run, schemas, balancer):
    hosts = [run(db=schemas()), run(db=schemas())]
    load = Load([balancer(*hosts)], clients=16)

    def taken_by(host):
        return 'method="POST"' in ask(host.url + "/metrics", Authorization="Bearer " + TOKEN)[2]

    for number, host in enumerate(hosts):
        wait_until(lambda: all(map(taken_by, hosts)), 60)
        assert host.stop() == (0, "", "")
        before = len(load.acknowledged)
        wait_until(lambda: len(load.acknowledged) > before + 300, 60)
        hosts[number] = run("--port", str(host.port), db=schemas())
    wait_until(lambda: all(map(taken_by, hosts)), 60)
    load.finish()
    assert (load.lost, load.others) == (0, [])
    assert sorted(load.acknowledged) == sorted(stored_ids(schemas()))
    check_database(schemas())


@needs_postgres
@pytest.mark.slow
def test_behind_the_balancer_a_host_that_is_gone_costs_what_it_had_read_and_both_are_told_as_503(
        run, schemas, balancer):
    hosts = [run(db=schemas()), run(db=schemas())]
    site = balancer(*hosts)
    load = Load([site], clients=16)
    wait_until(lambda: len(load.acknowledged) > 300, 60)
    hosts[0].process.kill()
    before = len(load.acknowledged)
    wait_until(lambda: len(load.acknowledged) > before + 300, 60)
    load.finish()
    away = (503, {"error": "storage unavailable"})
    assert load.lost == 0 and [each for each in load.others if each != away] == [] and len(load.others) <= 16
    found = stored_ids(schemas())
    assert set(load.acknowledged) <= set(found) and len(found) - len(load.acknowledged) <= 10 * len(load.others)
    hosts[1].stop()
    status, headers, body = ask(site.url + CRASHES, CRASH)
    assert (status, json.loads(body)) == away
    assert (headers["Retry-After"], headers["Content-Type"]) == ("2", "application/json")
    hosts[1] = run("--port", str(hosts[1].port), db=schemas())
    wait_until(lambda: site.post(CRASHES, CRASH)[0] == 201, 60)


@needs_postgres
def test_hosts_that_start_at_once_make_one_database(schemas):
    url = schemas()
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: postgres().PostgresStore(url), range(4)))
        made = list(pool.map(lambda store: store.start(), stores))
    for store in stores:
        store.close()
    assert sum(each.key is not None for each in made) == 1
    assert sql(url, "select name from apps") == [("default",)]


@needs_postgres
def test_hosts_that_prune_at_once_while_reports_come_in_delete_each_row_once(serve, clock, schemas):
    server = serve(retention_days=1, rate_limit=0)
    old = [parse_event(dict(EVENT, session_id=f"s{n % 50}", device_id_hash=f"d{n % 70}")) for n in range(1000)]
    for _ in range(3):
        server.store.add(backfeedr.sha256(KEY), old)
    server.store.add(backfeedr.sha256(KEY), [parse_crash(dict(CRASH, device_id_hash=f"d{n}")) for n in range(500)])
    clock.move(24 * 3600 + 1)
    other = postgres().PostgresStore(schemas(), clock, 1)
    new = [parse_event(dict(EVENT, device_id_hash="new"))]
    with closing(other), ThreadPoolExecutor(4) as pool:
        pruning = [pool.submit(store.prune) for store in (server.store, other)]
        adding = [pool.submit(store.add, backfeedr.sha256(KEY), new) for store in (server.store, other) * 20]
        seqs = {each.result().seqs[0] for each in adding}
        deleted = sum((each.result() for each in pruning), Counter())
    assert {seq for seq, in sql(schemas(), "select seq from events")} == seqs and stored(server, "crashes")["crashes"] == []
    assert deleted["events"] <= 3000 and deleted["crashes"] <= 500, "as those who add delete too"
    serve.unchecked.append(server)  # whose sums tell of the rows that are gone
    assert sql(schemas(), "select device_id_hash from devices") == [("new",)]
    assert sql(schemas(), "select session_id from sessions") == []


@needs_postgres
def test_a_grown_file_moves_to_postgres_with_its_ids_and_counts(tmp_path, clock, schemas, capsys):
    with Store(str(tmp_path / "old.db"), clock) as old, \
            Backfeedr(Settings(db_path=str(tmp_path / "old.db"), api_key=KEY, auth_token=TOKEN), clock=clock) as server:
        fill(server, clock, 1, 300)
        with open(tmp_path / "all.jsonl", "w", encoding="utf-8") as out:
            for kind in (backfeedr.Crash, backfeedr.Event):
                backfeedr.export_jsonl(old.export(kind), out)
        count = len(stored_ids(old.path))
        with closing(postgres().PostgresStore(schemas(), clock)) as store, \
                open(tmp_path / "all.jsonl", "rb") as lines:  # at the same time, as the sums of a week end with it
            assert backfeedr.import_jsonl(store, lines, lambda *_: None)["stored"] == count
        with Backfeedr(server.settings, store=postgres().PostgresStore(schemas(), clock)) as moved:
            assert answers(moved) == answers(server)
        assert sorted(stored_ids(schemas())) == sorted(stored_ids(old.path))
    check_database(schemas())
    with pytest.MonkeyPatch.context() as settings:
        settings.setenv("BACKFEEDR_RETENTION_DAYS", "0")
        assert postgres().main([schemas(), "import", str(tmp_path / "all.jsonl")]) == 0
    assert capsys.readouterr().err.startswith(f"Stored 0 reports; {count:,} were here already")


@needs_postgres
def test_a_report_of_the_longest_texts_in_the_widest_characters_is_stored(serve):
    server = serve()
    names = ("exception_type", "app_version", "os_version", "device_model", "device_id_hash", "locale")
    wide = {name: "".join(chr(0x10000 + random.Random(name + str(n)).randrange(0xffff)) for n in range(500))
            for name in names}
    assert Api(server).post(CRASHES, {**CRASH, **wide})[0] == 201
    assert {name: report(server)[name] for name in names} == wide


@needs_postgres
@pytest.mark.parametrize("arguments, line", [
    (["postgresql://127.0.0.1:1/none"], "cannot open the database: "),
    (["postgresql://127.0.0.1:1/none", "app", "list"], "cannot open the database: "),
])
def test_postgres_tells_in_one_line_what_is_wrong(capsys, arguments, line):
    assert postgres().main([*arguments[:1], *(arguments[1:] or ["--port", "0"])]) == 1
    assert re.fullmatch(f"backfeedr: {line}[^\n]*\n", capsys.readouterr().err)


# == Examples and packaging ====================================================

def clean_environ(**variables):
    """The environment without settings of its own, and with these."""
    return {**{name: value for name, value in os.environ.items() if not name.startswith("BACKFEEDR_")}, **variables}


# -- Errors that teach

ANOTHER_FILE = "; --db or BACKFEEDR_DB_PATH names another"


@pytest.mark.parametrize("arguments, variables, line", [
    ([], {"BACKFEEDR_RATELIMIT": "5"},
     "BACKFEEDR_RATELIMIT: there is no such setting; did you mean BACKFEEDR_RATE_LIMIT?"),
    (["--db", "x.db"], {"BACKFEEDR_REQUIRE_SIGNATURES": "1"},
     "BACKFEEDR_REQUIRE_SIGNATURES: there is no such setting; did you mean BACKFEEDR_REQUIRE_SIGNATURE?"),
    (["app", "create", "Shop"], {"BACKFEEDR_TOKEN": "secret"},
     "BACKFEEDR_TOKEN: there is no such setting; did you mean BACKFEEDR_AUTH_TOKEN?"),
    ([], {"BACKFEEDR_": "1"}, "BACKFEEDR_: there is no such setting; after BACKFEEDR_ comes one of HOST, PORT, *"),
    ([], {"BACKFEEDR_XYZ": "1"}, "BACKFEEDR_XYZ: there is no such setting; after BACKFEEDR_ comes one of HOST, *"),
    ([], {"BACKFEEDR_THREADS": "many"}, "BACKFEEDR_THREADS: 'many' is not a whole number"),
    (["--port", "TAKEN"], {}, "cannot listen on 127.0.0.1 port *: Address already in use*;"
                              " --port or BACKFEEDR_PORT takes another"),
    (["--host", "256.0.0.1"], {}, "cannot listen on 256.0.0.1 port 8080: *; --host or BACKFEEDR_HOST takes another"),
    (["--port", "0", "--db", "junk.db"], {},
     "cannot open the database */junk.db: file is not a database" + ANOTHER_FILE),
    (["--port", "0", "--db", "other.db"], {}, "*/other.db is a database, but not one of backfeedr's" + ANOTHER_FILE),
    (["--port", "0", "--db", "no/x.db"], {},
     "cannot open the database */no/x.db: No such file or directory"),
    (["app", "list"], {}, "there is no database */backfeedr.db" + ANOTHER_FILE),
])
def test_an_error_is_one_line_that_says_what_to_do_and_makes_nothing(command, monkeypatch, arguments, variables, line):
    Path("junk.db").write_bytes(b"junk" * 1000)
    sql_run("other.db", "create table theirs (a)")
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        status, out, err = command(*(port if each == "TAKEN" else each for each in arguments))
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert fnmatch.fnmatchcase(err, "backfeedr: " + line + "\n"), err
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


def test_a_variable_that_is_no_setting_stops_an_embedding_host_too_but_not_given_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKFEEDR_PUBLIC_METRIC", "0")
    path = tmp_path / "crashes.db"
    with pytest.raises(SettingsError, match="^BACKFEEDR_PUBLIC_METRIC: .* did you mean BACKFEEDR_PUBLIC_METRICS"):
        Backfeedr(db_path=str(path))
    assert not path.exists()
    with Backfeedr(Settings(db_path=str(path)), announce=lambda text: None) as server:
        assert [app.name for app in server.store.apps()] == ["default"]


def test_variables_of_others_are_no_settings():
    assert Settings.from_env({"BACKFEEDR_ENDPOINT": "http://x", "BACKFEEDR_RATELIMIT": "", "MY_BACKFEEDR_X": "1",
                              "PATH": "/bin", "BACKFEEDRS": "1"}) == Settings()


@pytest.mark.parametrize("missing, there", [("bottle", []), ("waitress", ["bottle"])])
def test_a_missing_package_is_one_line_that_installs_it_and_no_secrets_are_made(tmp_path, missing, there):
    shutil.copy(SERVER, tmp_path / "backfeedr.py")
    for name in there:
        shutil.copy(importlib.util.find_spec(name).origin, tmp_path)
    # -S: without what is installed
    done = subprocess.run([sys.executable, "-S", "backfeedr.py", "--port", "0"], cwd=tmp_path, timeout=30,
                          env=clean_environ(PYTHONPATH=""), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(f"backfeedr: {missing} is missing; '.*pip install bottle waitress' installs .*\n", done.stderr)
    assert not (tmp_path / "backfeedr.db").exists()


# -- Host apps

@contextmanager
def running(arguments, cwd, **variables):
    """A program in its own process, ended with its children when the block ends; its output and errors are one."""
    process = subprocess.Popen([str(each) for each in arguments], cwd=str(cwd), env=clean_environ(**variables),
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        yield process
    finally:
        try:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
            process.communicate(timeout=20)
        finally:
            process.kill()


def ask(url, body=None, key=KEY, **headers):
    """The status, the headers and the body of an answer; a body that is given is sent as JSON."""
    url = urlsplit(url)
    with closing(http.client.HTTPConnection(url.hostname, url.port, timeout=30)) as connection:
        connection.request("GET" if body is None else "POST", url.path, body and json.dumps(body),
                           {"X-Backfeedr-Key": key, "Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode()


@pytest.mark.slow
def test_the_demo_serves_its_pages_to_its_link_and_leaves_nothing_behind(tmp_path):
    with running([sys.executable, SERVER, "demo", "--port", "0"], tmp_path, TMPDIR=str(tmp_path)) as process:
        assert process.stdout.readline().startswith("backfeedr on http://127.0.0.1:")
        link = next(line.strip() for line in process.stdout if "/sign-in?code=" in line)
        url, path = link.rsplit("/", 1)
        with closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)) as connection:
            connection.request("GET", "/" + path)
            answer = connection.getresponse()
            answer.read()
            cookie = answer.headers["Set-Cookie"].split(";")[0]
            connection.request("GET", "/", headers={"Cookie": cookie})
            assert "Tramwise" in connection.getresponse().read().decode()
        assert len(list(tmp_path.iterdir())) == 1
        process.terminate()
        assert process.wait(20) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_demo_that_cannot_listen_says_so_before_it_makes_anything(tmp_path):
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        with running([sys.executable, SERVER, "demo", "--port", port], tmp_path, TMPDIR=str(tmp_path)) as process:
            assert "Address already in use" in process.stdout.read() and process.wait(20) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name, package", [("embed_bottle", "bottle"), ("embed_flask", "flask"),
                                           ("embed_django", "django")])
def test_a_host_app_of_a_framework_serves_its_pages_and_backfeedr_below_crashes(tmp_path, name, package):
    pytest.importorskip(package)
    command = [sys.executable, EXAMPLES / (name + ".py"), "--port", "0", "--db", "e.db"]
    with running(command, tmp_path, BACKFEEDR_API_KEY=KEY) as process:
        url = process.stdout.readline().split()[-1]
        assert ask(url + "/")[::2] == (200, "Hello\n")
        status, headers, body = ask(url + "/nothing")
        assert (status, headers.get_content_type()) == (404, "text/html"), "the host's own answer"
        for path in ("/crashes/nothing", "/crashes/api/v1/nothing"):
            assert ask(url + path)[::2] == (404, '{"error": "not found"}'), path
        assert 'action="/crashes/sign-in"' in ask(url + "/crashes/sign-in")[2]
        assert ask(url + "/crashes" + CRASHES, CRASH, key="wrong")[::2] == (401, '{"error": "invalid API key"}')
        assert ask(url + "/crashes" + BATCH, {"events": [{}]})[::2] == (400, '{"error": "missing type at index 0"}')
        assert json.loads(ask(url + "/crashes/api/v1/health")[2]) == {"status": "ok"}
        status, _, body = ask(url + "/crashes" + CRASHES, CRASH)
        assert status == 201
    assert sql(tmp_path / "e.db", "select id from crashes") == [(json.loads(body)["id"],)]
    check_database(tmp_path / "e.db")


# A host that notes where a connection is used by another process than that which made it.
WATCHED = """
import os
import backfeedr

class Watched(backfeedr.Connection):
    def __init__(self, *args, **options):
        self.maker = os.getpid()
        super().__init__(*args, **options)

def checked(name):
    def call(self, *args):
        if self.maker != os.getpid():
            with open("crossed.txt", "a") as file:
                file.write(name + chr(10))
        return getattr(super(Watched, self), name)(*args)
    return call

for name in ("execute", "executemany", "close"):
    setattr(Watched, name, checked(name))
backfeedr.Connection = Watched
server = backfeedr.Backfeedr()

def app(environ, start_response):
    return server(environ, lambda status, headers, *rest: start_response(
        status, [*headers, ("X-Worker", str(os.getpid()))], *rest))
"""


def both_worked(answers):
    shares = Counter(headers["X-Worker"] for _, headers, _ in answers)
    return len(shares) == 2 and min(shares.values()) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("app", [[], ["watched:app"]], ids=["as it stands", "watched"])
def test_two_gunicorn_workers_forked_from_one_server_store_all_that_they_acknowledge(tmp_path, app):
    pytest.importorskip("gunicorn")
    (tmp_path / "watched.py").write_text(WATCHED)
    command = [sys.executable, "-m", "gunicorn", "-c", EXAMPLES / "gunicorn.conf.py", "--bind", "127.0.0.1:0", *app]
    path = tmp_path / "g.db"
    with running(command, tmp_path, BACKFEEDR_API_KEY=KEY, BACKFEEDR_AUTH_TOKEN=TOKEN, BACKFEEDR_DB_PATH=str(path),
                 BACKFEEDR_RATE_LIMIT="0", PYTHONPATH=str(SERVER.parent)) as process:
        told = read_until(process.stdout, "Listening at: ")
        url = re.search(r"Listening at: (http://127\.0\.0\.1:[1-9]\d*)", told).group(1)
        answers = []
        # Which worker takes a connection is the system's choice: many at a time, until each has had some.
        while len(answers) < 60 or app and not both_worked(answers):
            with ThreadPoolExecutor(8) as pool:
                answers += pool.map(lambda _: ask(url + CRASHES, CRASH), range(20))
            assert len(answers) < 5000
        with Store(str(path)) as store:  # as the command line does, beside the server
            key = store.create_app("Shop")
        assert [ask(url + EVENTS, EVENT, key)[0] for _ in range(10)] == [201] * 10
        with Store(str(path)) as store:
            store.revoke_key(key)
        assert [ask(url + EVENTS, EVENT, key)[0] for _ in range(10)] == [401] * 10
        process.terminate()
        process.stdout.read()
        assert process.wait(20) == 0
    assert {each[0] for each in answers} == {201}
    assert {json.loads(each[2])["id"] for each in answers} == {each for each, in sql(path, "select id from crashes")}
    assert len(answers) == len(sql(path, "select 1 from crashes"))
    assert sql(path, "select count(*) from events") == [(10,)]
    assert not (tmp_path / "crossed.txt").exists()
    check_database(path)


@pytest.mark.slow
@pytest.mark.parametrize("command, free", [("waitress-serve --call backfeedr:Backfeedr", "--listen=127.0.0.1:0"),
                                           ("gunicorn 'backfeedr:Backfeedr()'", "--bind=127.0.0.1:0")])
def test_the_readmes_lines_for_other_wsgi_servers_serve_it(tmp_path, command, free):
    program, _, rest = command.partition(" ")
    pytest.importorskip(program.partition("-")[0])
    assert f"`{command}`" in " ".join(section("Put it into your own app").split("\n"))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with running(["bash", "-c", f"{program} {free} {rest}"], tmp_path, BACKFEEDR_API_KEY=KEY, PATH=path,
                 BACKFEEDR_AUTH_TOKEN=TOKEN, PYTHONPATH=str(SERVER.parent)) as process:
        url = re.search(r"http://127\.0\.0\.1:\d+", read_until(process.stdout, "http://")).group()
        status, _, answer = ask(url + CRASHES, CRASH)
        assert status == 201
    assert sql(tmp_path / "backfeedr.db", "select id from crashes") == [(json.loads(answer)["id"],)]


def test_the_library_example_makes_a_key_that_works_at_the_first_and_at_the_next_run(tmp_path):
    path = tmp_path / "l.db"
    keys = []
    for _ in range(2):
        done = run_example("library", "--db", str(path), BACKFEEDR_API_KEY=KEY, BACKFEEDR_AUTH_TOKEN=TOKEN)
        key, figures = done.stdout.decode().splitlines()
        assert (done.returncode, done.stderr) == (0, b"")
        assert set(json.loads(figures)) == {"crash_free_rate_7d", "dau", "sessions_7d", "crashes_7d", "top_crashes"}
        keys.append(key)
    with Backfeedr(Settings(db_path=str(path))) as server:
        assert [Api(server).post(CRASHES, CRASH, key=key)[0] for key in keys] == [201, 201]
        assert [(app.name, app.keys) for app in server.store.apps()] == [("Shop", 2), ("default", 1)]
    assert sql(path, "select name from crashes join apps on apps.id = app_id") == [("Shop",)] * 2


def test_the_library_example_tells_in_one_line_what_is_wrong(tmp_path):
    done = run_example("library", "--db", str(tmp_path / "no" / "l.db"))
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (1, b"", 1)
    assert done.stderr.startswith(b"library: cannot open the database ")


# -- README

README = (HERE / "README.md").read_text(encoding="utf-8")


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.M | re.S).group(1)


def code_blocks(kind, text=README):
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.M | re.S)


def marked_command(name):
    """The command between the README's markers of that name."""
    return code_blocks("sh", re.search(f"<!-- {name} -->(.*?)<!-- /{name} -->", README, re.S).group(1))[0]


def table(title, words):
    """The cells of the section's table rows, without their quotes; of those rows that begin so."""
    rows = [line.strip("|").split("|") for line in section(title).replace("\\|", "\0").splitlines()
            if line.startswith("| `" + words)]
    return [[cell.replace("\0", "|").strip() for cell in row] for row in rows]


def test_the_readmes_settings_are_those_of_the_program_with_their_defaults():
    shown = {variable.strip("`"): default.strip("`") for variable, default, _ in table("Settings", "BACKFEEDR_")}
    secrets = {"api_key": "made at first start", "auth_token": "made at first start"}
    defaults = {field.name: int(field.default) if isinstance(field.default, bool) else field.default
                for field in dataclasses.fields(Settings)}
    for name, default in defaults.items():
        told = shown.pop("BACKFEEDR_" + name.upper())
        assert told == secrets.get(name, str(default)) or default == "" and name not in secrets, name
    assert shown == {}


def programs_commands():
    """Each command of the program, in words: its names, what must be given, and the options that it takes."""
    def walk(parser, words):
        subparsers = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        for action in subparsers:
            for name, child in action.choices.items():
                yield from walk(child, [*words, name])
        if not subparsers:
            given = [action for action in parser._actions if action.dest not in ("help", "db_path")]
            yield (" ".join(words),
                   sorted(str(action.metavar or "|".join(action.choices or [action.dest]))
                          for action in given if not action.option_strings),
                   sorted(action.option_strings[-1] for action in given if action.option_strings))
    return sorted(walk(backfeedr._parser(), []))


def readmes_commands():
    for command, _ in table("Commands", "python backfeedr.py"):
        words = command.strip("`").replace("[serve]", "serve").split()[2:]
        options = [word.strip("[]") for word in words if word.strip("[").startswith("--")]
        given = [word for before, word in zip(["", *words], words)
                 if not re.match(r"\[?--", word) and not re.match(r"\[?--", before)]
        names = [word for word in given if re.fullmatch("[a-z]+", word)]
        yield (" ".join(names), sorted(word for word in given if word not in names),
               sorted(option for option in options if option != "--db"))


def test_the_readmes_commands_are_those_of_the_program():
    assert sorted(readmes_commands()) == programs_commands()
    assert all("--db" in text for text in (section("Commands"), table("Commands", "python backfeedr.py [serve]")[0][0]))


def test_each_link_of_the_readme_leads_to_a_file_and_each_example_is_run_by_a_test():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert [link for link in links if not (HERE / link).is_file()] == []
    tests = Path(__file__).read_text(encoding="utf-8")
    names = [path.name for path in EXAMPLES.rglob("*") if path.is_file() and path.suffix not in (".pyc", ".png")]
    assert [name for name in names if name not in tests and f'"{Path(name).stem}"' not in tests] == []


def test_the_readmes_lines_for_a_host_app_run_as_they_stand(tmp_path, monkeypatch):
    import bottle
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BACKFEEDR_API_KEY", KEY)
    monkeypatch.setenv("BACKFEEDR_AUTH_TOKEN", TOKEN)
    names = {"host_app": bottle.Bottle()}
    (lines,) = code_blocks("python", section("Put it into your own app"))
    mounted, closing_line, _ = lines.partition("server.close()")
    exec(mounted, names)
    answer = webtest.TestApp(names["host_app"]).post_json("/crashes" + CRASHES, CRASH,
                                                          headers={"X-Backfeedr-Key": names["key"]})
    assert answer.status_int == 201
    exec(closing_line, names)
    assert sql("crashes.db", "select crashes.id, name from crashes join apps on apps.id = app_id") \
        == [(answer.json["id"], "Shop")]
    check_database("crashes.db")


def same_shape(shown, got):
    """Whether an answer has the fields that are shown, at any depth; "..." stands for more of a list."""
    if isinstance(shown, dict):
        return isinstance(got, dict) and list(shown) == list(got) and all(
            same_shape(shown[name], got[name]) for name in shown)
    return not (isinstance(shown, list) and shown and got) or same_shape(shown[0], got[0])


@pytest.mark.slow
def test_each_request_of_the_readme_is_answered_as_it_shows(run):
    """But for the figures, which are of another database."""
    server = run()
    now = time_text(time.time())
    crash = dict(CRASH, occurred_at=now, app_version="1.0", exception_reason="of all that is shown", device_id_hash="d")
    session = dict(type="session_start", session_id="s", app_version="1.0", device_id_hash="d", occurred_at=now)
    assert [server.post(CRASHES, crash)[0], server.post(CRASHES, dict(crash, exception_type="Other"))[0],
            server.post(EVENTS, session)[0]] == [201] * 3
    shown = re.findall(r"^\$ (curl (?:.*\\\n)*.*)\n(\{.*)$", "".join(code_blocks("console")), re.M)
    assert len(shown) == README.count("\n$ curl"), "a request without an answer"
    for command, answer in shown:
        done = subprocess.run(["bash", "-c", at_server(command, server)], cwd=str(HERE), timeout=30,
                              capture_output=True, text=True)
        assert same_shape(json.loads(answer.replace(", ...", "")), json.loads(done.stdout)), (command, done)
    assert sql_count(server, "crashes") == 3


def at_server(command, server):
    """A command as it stands, but for the host and the secrets of a server that a test has started."""
    return (command.replace("http://localhost:8080", server.url).replace("bf_live_your_key", KEY)
            .replace("bf_admin_your_token", TOKEN))


def sql_count(server, table):
    (count,), = sql(server.db, f"select count(*) from {table}")
    return count


@pytest.fixture
def clone(tmp_path):
    """A clone after the README's first lines: with .venv, whose programs are first in the path."""
    folder = tmp_path / "clone"
    shutil.copytree(str(EXAMPLES), str(folder / "examples"))
    for name in ("README.md", "setup.cfg", "pyproject.toml", "LICENSE"):
        shutil.copy(str(HERE / name), str(folder))
    shutil.copy(str(SERVER), str(folder))
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def bash(command, cwd, **variables):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(["bash", "-ec", command], cwd=str(cwd), timeout=300, capture_output=True, text=True,
                          env=clean_environ(PATH=path, **variables))
    assert done.returncode == 0, done
    return done.stdout


@pytest.fixture
def pip(tmp_path):
    """Skips a test that installs packages where that can not be."""
    done = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "bottle"],
                          cwd=str(tmp_path), capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip finds no packages here: {done.stderr.splitlines()[-1]}")


@pytest.mark.slow
def test_the_readmes_client_and_signing_lines_are_stored(run, clone):
    server = run(BACKFEEDR_RATE_LIMIT="100")
    client, = [block for block in code_blocks("sh") if "client.py" in block]
    signing, = [block for block in code_blocks("sh") if "openssl" in block]
    told = json.loads(bash(at_server(client, server), clone, BACKFEEDR_ENDPOINT=server.url))
    assert sql(server.db, "select id, group_hash from crashes") == [(told["id"], told["group_hash"])]
    signed = at_server(signing, server)
    event = json.loads(bash(signed, clone))
    assert sql(server.db, "select id, name from events") == [(event["id"], "purchase")]
    assert bash(signed.replace("$time.$hash", "$time.wrong"), clone) == '{"error": "invalid signature"}'


@pytest.mark.slow
def test_the_readmes_first_lines_start_a_server(tmp_path, pip):
    shutil.copy(str(SERVER), str(tmp_path))
    environ = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    with running(["bash", "-c", marked_command("start")], tmp_path, BACKFEEDR_PORT="0",
                 BACKFEEDR_API_KEY=KEY, BACKFEEDR_AUTH_TOKEN=TOKEN, **environ) as process:
        url = re.search("backfeedr on (http://.*)\n", read_until(process.stdout, "backfeedr on ")).group(1)
        status, _, answer = ask(url + CRASHES, CRASH)
        assert status == 201
    assert sql(tmp_path / "backfeedr.db", "select id from crashes") == [(json.loads(answer)["id"],)]


# -- Packaging

@pytest.mark.slow
def test_one_command_makes_one_file_that_runs_with_nothing_but_python(clone, tmp_path, pip):
    command, = [block for block in code_blocks("sh") if "zipapp" in block]
    assert len(command.splitlines()) == 1
    bash(command, clone)
    bash(command, clone)  # for the next release
    pyz = shutil.copy(str(clone / "backfeedr.pyz"), str(tmp_path))
    shutil.rmtree(str(clone))
    isolated = [sys.executable, "-I", "-S", pyz]  # without the environment, this folder, and all that is installed
    with running([*isolated, "--port", "0"], tmp_path, BACKFEEDR_API_KEY=KEY, BACKFEEDR_AUTH_TOKEN=TOKEN) as process:
        url = process.stdout.readline().split()[-1]
        status, _, answer = ask(url + CRASHES, CRASH)
        assert status == 201
        process.terminate()
        assert (process.stdout.read(), process.wait(20)) == ("", 0)
    assert sql(tmp_path / "backfeedr.db", "select id from crashes") == [(json.loads(answer)["id"],)]

    def run_pyz(*arguments, **variables):
        done = subprocess.run([*isolated, *arguments], cwd=str(tmp_path), env=clean_environ(**variables),
                              capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr
    assert run_pyz("--version") == (0, f"backfeedr {backfeedr.__version__}\n", "")
    assert run_pyz("key", "create", "Nope") == (1, "", "backfeedr: there is no app named 'Nope'\n")
    assert run_pyz("nonsense")[0] == 2
    status, out, err = run_pyz(BACKFEEDR_RATELIMIT="5")
    assert (status, out, err.count("\n")) == (1, "", 1) and "did you mean BACKFEEDR_RATE_LIMIT?" in err


@pytest.mark.slow
def test_a_wheel_holds_exactly_one_module_and_the_version_of_it(clone, pip):
    pytest.importorskip("build")
    (clone / ".venv").unlink()
    assert "`python -m build`" in section("Releases")
    bash("python -m build", clone)
    wheel, = (clone / "dist").glob("*.whl")
    with zipfile.ZipFile(str(wheel)) as archive:
        info = f"backfeedr-{backfeedr.__version__}.dist-info/"
        names = [name for name in archive.namelist() if not name.startswith(info)]
        assert names == ["backfeedr.py"] and archive.read("backfeedr.py") == SERVER.read_bytes()
        assert b"backfeedr = backfeedr:main" in archive.read(info + "entry_points.txt")
        assert b"\nRequires-Python: >=3.9\n" in archive.read(info + "METADATA")


def test_the_readmes_latest_release_is_this_version():
    assert re.findall(r"^- \*\*(.+?)\*\*", section("Releases"), re.M)[0] == backfeedr.__version__


# -- examples/deploy

def through_proxy(url, certificate, path, body, port):
    """The status (0: cut off) and the text that curl gets from crashes.example.com, on this host."""
    done = subprocess.run(
        ["curl", "--silent", "--show-error", "--cacert", str(certificate), "--max-time", "20",
         "--resolve", f"crashes.example.com:{port}:127.0.0.1", "--write-out", "\\n%{http_code}", url + path,
         "--header", "X-Backfeedr-Key: " + KEY, "--data-binary", "@-"], input=body, capture_output=True)
    text, _, status = done.stdout.decode().rpartition("\n")
    return int(status), text or done.stderr.decode()


def check_proxy(server, certificate, https, http, waits):
    """Through a proxy a crash is stored, too large or too slow a body refused, and http sent on to https."""
    url = f"https://crashes.example.com:{https}"
    status, answer = through_proxy(url, certificate, CRASHES, json.dumps(CRASH).encode(), https)
    assert (status, sql(server.db, "select id from crashes")) == (201, [(json.loads(answer)["id"],)])
    large = json.dumps(dict(CRASH, note="x" * 1_040_000)).encode()
    assert through_proxy(url, certificate, CRASHES, large, https)[0] == 201
    assert through_proxy(url, certificate, CRASHES, large + b" " * 10_000, https) \
        == (413, '{"error": "request body too large"}'), "of the server"
    assert through_proxy(url, certificate, CRASHES, large * 2, https)[0] in (413, 502, 0), "of the proxy"
    head = f"POST {CRASHES} HTTP/1.1\r\nHost: crashes.example.com\r\nContent-Length: 1000\r\n\r\n"
    trust = ssl.create_default_context(cafile=str(certificate))
    with socket.create_connection(("127.0.0.1", https), timeout=30) as raw, \
            trust.wrap_socket(raw, server_hostname="crashes.example.com") as phone:
        phone.sendall(head.encode() + b'{"exception_type": ')
        assert waits or not re.match(b"HTTP/1.1 [23]", phone.recv(1000)), "what stops half-way must not look stored"
    status, headers, _ = ask(f"http://127.0.0.1:{http}" + CRASHES)
    assert status in (301, 308) and headers["Location"].startswith("https://")
    assert sql_count(server, "crashes") == 2
    assert server.stop() == (0, "", "")


def edited(name, folder, *changes):
    """A file of examples/deploy as it stands, but for what is particular to a host."""
    text = (EXAMPLES / "deploy" / name).read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    (folder / name).write_text(text)
    return folder / name


class Nginx:
    """nginx with a site, in a folder of its own; it listens when this returns."""

    def __init__(self, folder, site):
        folders = "".join(f"{name}_temp_path {folder}/{name}; " for name in
                          ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        user = "" if os.geteuid() else "user root; "  # another user may not come into the test's folder
        (folder / "main.conf").write_text(
            f"{user}pid {folder}/pid; error_log {folder}/error.log; events {{ }}\n"
            f"http {{ access_log {folder}/access.log; {folders} include {site}; }}\n")
        self._folder, self._command = folder, f"nginx -e {folder}/error.log -p {folder} -c {folder}/main.conf"
        bash(f"{self._command} -t -q && {self._command}", folder)

    def stop(self):
        bash(self._command + " -s stop", self._folder)


def needs(*programs):
    for program in programs:
        if not shutil.which(program):
            pytest.skip(f"{program} is not here")


@pytest.mark.slow
def test_reports_come_through_nginx(run, tmp_path):
    needs("nginx", "openssl", "curl")
    server, https, http = run(), free_port(), free_port()
    bash("openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 2"
         " -subj /CN=crashes.example.com -addext subjectAltName=DNS:crashes.example.com", tmp_path)
    site = edited("nginx.conf", tmp_path, ("listen 80;", f"listen 127.0.0.1:{http};"), ("    listen [::]:80;\n", ""),
                  ("listen 443 ssl;", f"listen 127.0.0.1:{https} ssl;"), ("    listen [::]:443 ssl;\n", ""),
                  ("/etc/letsencrypt/live/crashes.example.com/fullchain.pem", str(tmp_path / "cert.pem")),
                  ("/etc/letsencrypt/live/crashes.example.com/privkey.pem", str(tmp_path / "key.pem")),
                  ("127.0.0.1:8080", f"127.0.0.1:{server.port}"), ("body_timeout 10s", "body_timeout 1s"))
    nginx = Nginx(tmp_path, site)
    try:
        check_proxy(server, tmp_path / "cert.pem", https, http, waits=False)
        assert (tmp_path / "access.log").read_text() == ""
    finally:
        nginx.stop()


@pytest.mark.slow
def test_reports_come_through_caddy(run, tmp_path):
    needs("caddy", "curl")
    server, https, http = run(), free_port(), free_port()
    config = edited("Caddyfile", tmp_path, ("{\n\tservers", f"{{\n\thttp_port {http}\n\thttps_port {https}\n"
                                            "\tadmin off\n\tskip_install_trust\n\tservers"),
                    ("crashes.example.com {", "crashes.example.com {\n\ttls internal"),
                    ("127.0.0.1:8080", f"127.0.0.1:{server.port}"))
    if " 2.6" not in " " + bash("caddy version", tmp_path).lstrip("v"):
        config = edited(str(config), tmp_path, ("\tbuffer_requests", "\trequest_buffers 1100KB"))
    environ = {"HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    bash(f"caddy start --adapter caddyfile --config {config} --pidfile {tmp_path}/pid >log 2>&1", tmp_path, **environ)
    try:  # it has returned when it listens; its certificate comes a little later
        root = tmp_path / "caddy" / "pki" / "authorities" / "local" / "root.crt"
        site = f"crashes.example.com:{https}"
        bash(f"curl --silent --retry 20 --retry-delay 1 --retry-all-errors --cacert {root}"
             f" --resolve {site}:127.0.0.1 https://{site}/api/v1/health", HERE)
        check_proxy(server, root, https, http, waits=True)
        assert not re.search("127\\.0\\.0\\.1:[0-9]+.*POST", (tmp_path / "log").read_text())
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)


def test_the_systemd_unit_is_valid_hardened_and_lets_a_stop_end():
    needs("systemd-analyze")
    unit = str(EXAMPLES / "deploy" / "backfeedr.service")
    assert bash(f"systemd-analyze verify {unit} 2>&1 | grep -F backfeedr.service || true", HERE) == ""
    score = re.search("Overall exposure level for backfeedr.service: ([0-9.]+) ",
                      bash(f"systemd-analyze security --offline=yes --no-pager {unit}", HERE)).group(1)
    assert float(score) < 2
    text = Path(unit).read_text()
    assert int(re.search("^TimeoutStopSec=([0-9]+)$", text, re.M).group(1)) > 10
    variables = re.findall("BACKFEEDR_[A-Z_]+", text)
    assert {*variables} <= {"BACKFEEDR_" + field.name.upper() for field in dataclasses.fields(Settings)}
