#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["bottle>=0.13", "waitress>=3.0.1"]
# ///
"""backfeedr: crash reports and usage figures for iOS apps, on your own host.

The whole server is this file. Copy it to a machine with Python 3.9 or later, install bottle and waitress, and run
`python backfeedr.py`. It prints an API key, an admin token and a command that sends a first crash:

    curl -X POST http://127.0.0.1:8080/api/v1/crashes -H "X-Backfeedr-Key: bf_live_..." \\
        -d '{"exception_type": "SIGABRT", "occurred_at": "2026-03-12T14:22:31Z"}'

It is also a WSGI callable: `Backfeedr(db_path="crashes.db")` can be mounted in any app.

The sections. Each uses only those above it, except that the sections of figures use the tables and keys in Roll-ups,
Dashboard uses Templates, and Database names the queue of Commit:

    Settings        what an operator can configure
    Schema          the tables for apps, keys, reports, triage and alerts
    Values          refusals, times, ids, API keys, versions
    Grouping        stack frames, and the group of a crash
    JSON            how it is read and written
    Payloads        our JSON in, crashes and events out
    Apple formats   what Apple's reports have in common
    MetricKit       its diagnostics
    Crash files     .ips and .crash
    Diagnostics     any of Apple's reports in, crashes and events out
    Signature       HMAC-SHA256 over a request
    RateLimiter     how many requests a key may send each minute
    Symbols         functions, files and lines for the addresses in a build
    Statements      one statement for many rows, and what commits remember
    Verdict         whether a release is worse than the one before
    Figures         what each figure is made of: reports as they are counted, tables of sums, rows that are merged
    Crash figures   crashes, their types and device models, groups
    Release figures releases and sessions
    Device figures  active devices, those that come back, events by name
    Roll-ups        all figures in one transaction, and the limits of new names
    Triage          the state of each group, and the facts that alerts send
    Connection      a connection to SQLite
    Migrations      makes the tables, and upgrades older ones
    Database        the file: how it is opened, read and written
    Apps            apps, keys, the admin
    Commit          how the reports of several requests become rows in one transaction
    Deletion        expiry, forgotten devices, deleted apps, a database that is too large
    Stored symbols  uploads, and crashes that move to other groups because of them
    Store           how reports are stored, exported and imported; upkeep
    Channels        where alerts are sent, and in which form
    Alerts          how facts are delivered to channels
    Public metrics  the queries behind the public API
    Stored reports  reports as they were sent
    Group metrics   the queries about groups
    Metrics         the queries about single reports, devices and symbols, and the digest
    Requests        what a request carries, and what a client may be told
    Charts          numbers in, SVG out; names of devices
    Page content    what the pages show, as values and text
    Style           their CSS
    Page requests   a request for a page, and its session
    Dashboard       the pages that people look at
    Template parts  parts of their templates
    Templates       their HTML
    Backfeedr       the WSGI callable
    Connections     waitress: how requests arrive, are gathered and answered
    Server          how it starts and stops
    Operations      backup, export, import, check
    Commands        app, key, device, symbols, alert, prune, and the operations
    Command line    how they are called

To make a change, edit:

    add an endpoint             Backfeedr._routes; a query that takes `app`: in PublicMetrics, from figures alone and
                                cut by rows_that_fit, if anyone may ask, else in GroupMetrics or Metrics, for `admin`; a
                                handler if that is not enough; ERRORS for a refusal that is no 400
    add a field to a report     REPORT_TABLES, SCHEMA_VERSION, and _ADDED_COLUMNS under the new version; Crash or Event,
                                before occurred_at; _CONVERTERS unless it is short text; _AS_SENT for a boolean or JSON;
                                for long text or JSON, _convert and _truncate_fairly
    add a figure                a class in FIGURES, its fields at the end of COUNTED; a query and a route, as above;
                                SCHEMA_VERSION, and where migrate does not count all again, a count of the stored
                                reports; for text that clients make up, MAX_NEW_NAMES, OTHER_FLAGS, NewNames.FIELDS and
                                KNOWN_IN, and STORED if anyone may ask
    add a page                  a query, as above; Dashboard.routes, a method there, a row of _TEMPLATES, and of
                                _NAVIGATION for the menu
    add a command               a method do_... of Commands, a row of _COMMANDS, and a method of the store
    add a kind of channel       a function in Channels, a row of CHANNELS, and the texts that name "ntfy+https"; perhaps
                                check_address, and Alerts.add if it signs its messages
    accept another format       a function that makes a Diagnostic, and _read_diagnostics; for another path, _ingestion

Tests name what must follow: README's tables (it may have 250 lines), examples/openapi.json, and in test_backfeedr.py
DOWNGRADES, recount(), fill(), TABLES_OF, and the rows of an old database.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 9) and __name__ == "__main__":
    sys.exit("backfeedr needs Python 3.9 or later, and this is " + sys.version.split()[0])

import argparse
import base64
import csv
import errno
import gc
import hashlib
import hmac
import ipaddress
import json
import logging
import marshal
import math
import os
import re
import secrets
import shutil
import signal
import socket
import sqlite3
import struct
import tempfile
import threading
import time
import zlib
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict, deque, namedtuple
from collections.abc import Container, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import date, datetime, timedelta, timezone
from difflib import get_close_matches
from email.utils import parsedate_to_datetime
from functools import cache, cached_property, lru_cache, partial
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from importlib.machinery import SourceFileLoader
from importlib.util import MAGIC_NUMBER, cache_from_source
from itertools import accumulate, chain, compress, groupby, islice, repeat, tee
from operator import add, attrgetter, floordiv, itemgetter, lt, rshift, sub
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, BinaryIO, Callable, NamedTuple, Optional, TextIO, Union
from urllib.parse import parse_qs, parse_qsl, quote, unquote, urlencode, urlsplit

_MISSING_PACKAGE = ("{} is missing; 'python3 -m venv .venv && .venv/bin/pip install bottle waitress' installs it,"
            " and .venv/bin/python runs it")  # a venv, because many systems' own Python refuses new packages
try:
    import bottle
except ImportError:
    if __name__ != "__main__":
        raise
    sys.exit("backfeedr: " + _MISSING_PACKAGE.format("bottle"))

__version__ = "0.1.0"

log = logging.getLogger("backfeedr")


# == Settings ==================================================================
# What an operator can configure. An invalid value is refused when the settings are made, not when it is first used.

class SettingsError(ValueError):
    """A setting with an invalid value. `str()` is one line that names the setting."""

    def __init__(self, name: str, problem: str):
        super().__init__(f"{name}: {problem}")
        self.name, self.problem = name, problem


_RANGES = {"port": (0, 65535), "rate_limit": (0, 1_000_000), "max_body_size": (1_000, 1 << 30),
           "retention_days": (0, 36_500), "max_db_size": (0, 1 << 50), "threads": (1, 1_000)}
MIN_DB_SIZE = 500_000  # bytes; without any report, a database takes 213,000
_TYPE_NAMES: dict[Any, str] = {str: "text", int: "a whole number", bool: "1 or 0"}
_BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
_PREFIX = "BACKFEEDR_"
# What Kubernetes sets for services named backfeedr or backfeedr-..., without the prefix: PORT=tcp://10.0.0.1:80.
_KUBERNETES_VARIABLE = re.compile(r"(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)=.*|PORT(_[0-9]+_\w+)?=.*://.*"
                                  r"|PORT_[0-9]+_[A-Z]+_(PROTO|PORT|ADDR)=.*)")


@dataclass(frozen=True)
class Settings:
    """All settings, with their defaults and units. Raises SettingsError for an invalid value."""

    host: str = "127.0.0.1"
    port: int = 8080                                 # 0 takes a free one
    db_path: str = "backfeedr.db"
    api_key: str = field(default="", repr=False)     # a key of the app `default`; "": generated at the first start
    auth_token: str = field(default="", repr=False)  # the admin token; "": generated at the first start
    rate_limit: int = 100                            # requests per minute and key; 0 is off
    max_body_size: int = 1_048_576                   # bytes, before and after decompression
    retention_days: int = 90                         # since receipt; 0 keeps everything
    max_db_size: int = 0                             # bytes; above it, the oldest reports are deleted early; 0 is off
    require_signature: bool = False
    public_metrics: bool = True
    threads: int = 32
    public_url: str = ""                             # where clients reach the server, such as the URL of a proxy
    verbose: bool = False                            # logs each request to standard error

    def __post_init__(self) -> None:
        object.__setattr__(self, "db_path", os.fspath(self.db_path))
        for setting in fields(self):
            value: Any = getattr(self, setting.name)
            kind: Any = type(setting.default)
            if type(value) is not kind:
                raise SettingsError(setting.name, f"{repr(value) if setting.repr else 'it'} is not {_TYPE_NAMES[kind]}")
            low, high = _RANGES.get(setting.name, (value, value))
            if not low <= value <= high:
                raise SettingsError(setting.name, f"{value} is not from {low} to {high}")
            if kind is str and (value != value.strip() or value and not value.isprintable()):
                raise SettingsError(setting.name, "begins or ends with a space, or has a control character")
        if 0 < self.max_db_size < MIN_DB_SIZE:
            raise SettingsError("max_db_size", f"{self.max_db_size} bytes would leave no room for reports: give at"
                                               f" least {MIN_DB_SIZE}, or 0 for no limit")
        if not self.host:
            raise SettingsError("host", "must name a host")
        if 0 < len(self.auth_token) < 16:
            raise SettingsError("auth_token", "has fewer than 16 characters, so it could be guessed")
        if self.db_path in ("", ":memory:"):
            raise SettingsError("db_path", "must name a file")
        if not re.fullmatch(r"(https?://[A-Za-z0-9.:\[\]-]+(/[A-Za-z0-9._~%/-]*)?)?", self.public_url):
            raise SettingsError("public_url", f"{self.public_url!r} is not like https://crashes.example.com")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
        """Settings from the BACKFEEDR_* variables of `environ` (default: os.environ), and from `overrides`, which take
        precedence. An empty variable counts as unset. An unknown one is an error: if BACKFEEDR_PUBLIC_METRICS=0 is
        misspelt, the metrics must not stay public."""
        variables = {name[len(_PREFIX):]: text for name, text in (os.environ if environ is None else environ).items()
                     if text and name.startswith(_PREFIX) and name != "BACKFEEDR_ENDPOINT"}  # for examples/client.py
        ignored = sorted(name for name, text in variables.items() if _KUBERNETES_VARIABLE.fullmatch(f"{name}={text}"))
        if ignored:
            log.warning("ignored %s, set by Kubernetes for a service", ", ".join(_PREFIX + name for name in ignored))
        types, values = {setting.name.upper(): type(setting.default) for setting in fields(cls)}, {}
        for name in sorted(variables.keys() - set(ignored)):
            if name not in types:
                best = "".join(get_close_matches(name, types, 1))
                hint = f"did you mean {_PREFIX}{best}?" if best else f"after {_PREFIX} comes one of {', '.join(types)}"
                raise SettingsError(_PREFIX + name, f"there is no such setting; {hint}")
            values[name.lower()] = _from_text(variables[name], types[name])
        try:
            cls(**values)  # refuses an invalid variable even if it is overridden
        except SettingsError as error:
            raise SettingsError(_PREFIX + error.name.upper(), error.problem) from None
        return cls(**{**values, **overrides})


def _from_text(text: str, kind: type) -> Any:
    """The value that a variable's text stands for. Invalid text stays as it is, for Settings to refuse."""
    if kind is int and re.fullmatch("-?[0-9]{1,18}", text):
        return int(text)
    return _BOOLEANS.get(text.lower(), text) if kind is bool else text


# == Schema ====================================================================
# One SQLite file that its owner can open with any tool. Each report is a row whose columns are named like the fields of
# the API. Times are milliseconds since 1970 UTC. The tables of symbols and figures are in their own sections.
#
# `seq` is the time of receipt in milliseconds * 2^20 + a counter. The id of a report is its seq in hexadecimal, so it
# takes no space and needs no index. Seqs ascend, so inserts append and retention deletes at the front. If the host's
# clock is set back, they run ahead of it, by `seq_ahead_ms`. A random part keeps seqs unique across files.

APPLICATION_ID = 0x62666472  # "bfdr" marks a file as ours
SCHEMA_VERSION = 7

REPORT_TABLES = """
create table apps (
    id integer primary key autoincrement,  -- never reused
    name text not null unique, is_test integer not null, created_at integer not null);
create table keys (
    key_hash blob primary key,             -- SHA-256; the key itself is not stored
    app_id integer not null, prefix text not null, created_at integer not null, revoked_at integer
) without rowid;
create table secrets (                     -- 'admin_token', 'feed_token'
    name text primary key, hash blob not null) without rowid;
create table grants (                      -- browser sessions and one-time links, by their SHA-256
    hash blob primary key, expires_at integer not null) without rowid;

create table crashes (
    seq integer primary key, id text generated always as (printf('%016x', seq)) virtual,
    app_id integer not null, received_at integer generated always as ((seq >> 20) - seq_ahead_ms) virtual,
    seq_ahead_ms integer not null default 0, occurred_at integer not null,
    clock_ahead_ms integer not null default 0,  -- how far the device's clock was ahead
    other integer not null default 0,      -- bits (OTHER_FLAGS) of the fields that are counted as '(other)'
    group_hash text not null, images text,  -- UUIDs of builds whose symbols can name its frames, separated by spaces
    exception_type text not null,
    app_version text, build_number text, os_version text, device_model text, device_id_hash text,
    session_id text, locale text, free_memory_mb numeric, battery_level real,  -- 0 to 1; -1 is unknown
    is_charging integer,
    -- Long values come last: SQLite reads a row only up to the last column it needs.
    -- stack_trace and extra are JSON; extra has the fields that this server does not know.
    exception_reason text, stack_trace text, extra text);
create index crashes_by_group on crashes (  -- finds the devices of a group, and covers all that is counted by group
    app_id, group_hash, device_id_hash, seq_ahead_ms, occurred_at, clock_ahead_ms, app_version, os_version,
    device_model);
create table events (
    seq integer primary key, id text generated always as (printf('evt_%016x', seq)) virtual,
    app_id integer not null, received_at integer generated always as ((seq >> 20) - seq_ahead_ms) virtual,
    seq_ahead_ms integer not null default 0, occurred_at integer not null,
    clock_ahead_ms integer not null default 0, other integer not null default 0,
    type text not null, name text,
    app_version text, os_version text, device_model text, device_id_hash text, session_id text, locale text,
    properties text, extra text);

create table replays (                     -- recognizes a stored request that is sent again
    app_id integer not null, mark blob not null,   -- digest of the Idempotency-Key or the signature
    request blob not null,                         -- digest of path and body
    first_seq integer not null, reports integer not null,  -- the reports have consecutive seqs
    received_at integer not null, primary key (app_id, mark)) without rowid;
create index replays_by_age on replays (received_at);

create table given_seqs (                  -- ranges that contain every seq ever assigned
    first integer primary key, last integer not null);
-- state has retention_days; grouping_version; expired_crashes and expired_events, the highest seq that retention
-- deleted; trimmed_day, when old sums were last deleted; counted_at, the end of the windows of figures unless a later
-- report came. Per app: early_ID, the highest seq deleted early for lack of space; 'worse_ID VERSION', when that
-- release was reported as worse; deleted_ID, how far the deletion of the app has come: its reports from this seq on
-- are gone.
create table state (name text primary key, value integer not null) without rowid;
"""
TRIAGE_TABLES = """
create table triage (                      -- groups that somebody has decided about; outlives their crashes
    app_id integer not null, group_hash text not null,
    state text not null,                   -- 'open', 'resolved' or 'muted'
    changed_at integer not null, fixed_in text,  -- a version, perhaps with its build: 1.3.0 (48)
    until integer, crashes_left integer, devices_left integer,  -- when a mute ends; null: not by this
    regressed_at integer, primary key (app_id, group_hash)) without rowid;
create table group_history (
    app_id integer not null, group_hash text not null, entry integer not null,  -- 1, 2, 3
    at integer not null, what text not null, detail text, primary key (app_id, group_hash, entry)) without rowid;
create table facts (                       -- to be sent to channels, the oldest first; detail is JSON
    id integer primary key autoincrement, app_id integer not null, at integer not null, kind text not null,
    group_hash text, detail text not null);
create table channels (
    id integer primary key autoincrement, url text not null, secret text not null,
    app_id integer,                        -- null: all live apps
    kinds text not null,                   -- of facts, separated by commas
    with_reason integer not null default 0, digest_at integer,  -- when the next digest is due
    created_at integer not null, last_fact integer not null,  -- the last fact that is in a message
    ended_at integer, error text, error_at integer, sent_at integer);
create table messages (                    -- those that wait, and those of the last hour; id is the webhook-id
    id text primary key, channel_id integer not null, created_at integer not null, body text not null,  -- JSON
    tries integer not null default 0, taken_until integer not null default 0,  -- no other process sends it before
    due_at integer           -- of the next try; null: sent or given up; = taken_until: refused, but the receiver is up
) without rowid;
create index messages_by_time on messages (channel_id, created_at);
"""


# == Values ====================================================================
# Refusals, which tell a client what is wrong, and small conversions that many sections use.

SECOND = 1000  # times are in milliseconds; timeouts are in seconds, as Python takes them
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
DAY = 24 * HOUR
MAX_SKEW = 5 * MINUTE  # how far a device's clock may be ahead and still be believed
EARLIEST_PLAUSIBLE = 1_167_609_600_000  # 2007, the first iPhone: earlier times are from clocks that were never set
MIN_TIME, MAX_TIME = -62_135_596_800_000, 253_402_300_799_999  # the years 1 to 9999, datetime's bounds
SEQ_BITS = 20  # for the counter of a seq within a millisecond


class Refusal(Exception):
    """A request that is refused. `str()` is the error that the client gets, and decides the status (see ERRORS);
    `detail` helps its developer. If `retry_after` is given, the same request may succeed after that many seconds."""

    def __init__(self, text: str, retry_after: int | None = None, detail: str = ""):
        super().__init__(text)
        self.retry_after, self.detail = retry_after, detail


class GroupMoved(Refusal):
    """The crashes of a group have moved to another group."""

    def __init__(self, group_hash: str):
        super().__init__("moved", detail=f"to {group_hash}")
        self.group_hash = group_hash


class StorageUnavailable(Refusal):
    """The database cannot be used now. Nothing of the request was acknowledged."""

    def __init__(self) -> None:
        super().__init__("storage unavailable", retry_after=2)


_RFC3339 = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2}[Tt](?:[01][0-9]|2[0-3]):[0-5][0-9]):([0-5][0-9])(?:\.([0-9]{1,9}))?"
    r"([Zz]|[+-](?:[01][0-9]|2[0-3]):?[0-5][0-9])")


def parse_time(text: str) -> int:
    """Milliseconds since 1970 UTC of an RFC 3339 time with a zone, cut to MIN_TIME and MAX_TIME, beyond which datetime
    overflows. Raises ValueError. (Before Python 3.11, datetime knows neither Z nor nanoseconds.)"""
    match = _RFC3339.fullmatch(text)
    if match is None:
        raise ValueError("not an RFC 3339 time with a zone")
    minute, seconds, fraction, zone = match.groups()
    time_ms = _parse_minute(minute, zone) + int(seconds) * SECOND
    if fraction:
        time_ms += int(fraction[:3].ljust(3, "0"))
    return min(max(time_ms, MIN_TIME), MAX_TIME)


@lru_cache(maxsize=1024)  # most reports are from the last minutes
def _parse_minute(minute: str, zone: str) -> int:
    time_ms = int(datetime.fromisoformat(minute + ":00+00:00").timestamp()) * SECOND
    if zone in "Zz":
        return time_ms
    offset = int(zone[1:3]) * HOUR + int(zone[-2:]) * MINUTE
    return time_ms - offset if zone[0] == "+" else time_ms + offset


def parse_occurred_at(value: Any) -> int:
    """Milliseconds since 1970 UTC of the time in a report: RFC 3339 text, milliseconds (from 1e12 on), seconds (from
    1.2e9 on, which is 2008), or smaller numbers as seconds since 2001, Swift's default. Raises ValueError."""
    if type(value) in (int, float):
        time_ms = value if value >= 1e12 else SECOND * (value if value >= 1.2e9 else value + 978_307_200)
        if not MIN_TIME <= time_ms < MAX_TIME + 1:
            raise ValueError("is not within the years 1 to 9999")
        return int(time_ms)
    try:
        return parse_time(value)
    except (ValueError, TypeError):
        has_no_zone = type(value) is str and _RFC3339.fullmatch(value + "Z")
        raise ValueError("has no zone" if has_no_zone else "is not a time like 2026-03-12T14:22:31Z") from None


def iso_time(time_ms: int) -> str:
    """The RFC 3339 time in UTC. A time outside the years 1 to 9999 becomes their first or last moment."""
    moment = datetime(1970, 1, 1) + timedelta(milliseconds=min(max(time_ms, MIN_TIME), MAX_TIME))
    return moment.isoformat(timespec="milliseconds" if time_ms % SECOND else "seconds") + "Z"


def iso_day(day: int) -> str:
    """The date of a UTC day, which is a number of days since 1970."""
    return iso_time(day * DAY)[:10]


def counted_at(occurred_at: int, received_at: int, ahead_ms: int) -> int:
    """The time at which a report counts: the device's time, corrected by how far its clock is ahead. If that is not
    plausible, as from a clock that was never set, it is the time of receipt."""
    corrected = occurred_at - ahead_ms
    return corrected if EARLIEST_PLAUSIBLE <= corrected <= received_at + MAX_SKEW else received_at


RECEIVED_AT = f"((seq >> {SEQ_BITS}) - seq_ahead_ms)"  # unlike the column, lets SQLite answer from an index alone
COUNTED_AT = (f"case when occurred_at - clock_ahead_ms between {EARLIEST_PLAUSIBLE} and {RECEIVED_AT} + {MAX_SKEW}"
              f" then occurred_at - clock_ahead_ms else {RECEIVED_AT} end")  # counted_at in SQL


def seq_at(received_at: int) -> int:
    """The lowest seq of a millisecond."""
    return received_at << SEQ_BITS


def random_seq(received_at: int) -> int:
    """A seq of a millisecond, random so that different files have different ids. It is in the lower half, so the
    seqs of a commit seldom run into the next millisecond."""
    return seq_at(received_at) + secrets.randbits(SEQ_BITS - 1)


def crash_id(seq: int) -> str:
    """The public id of a crash, equal to the column `id`."""
    return f"{seq:016x}"


def event_ids(seqs: Sequence[int]) -> list[str]:
    """The public ids of events, equal to the column `id`. Formatting each one separately takes twice as long."""
    return ["evt_" + digits for digits in struct.pack(f">{len(seqs)}Q", *seqs).hex(" ", 8).split()]


def plural(count: int, word: str, ending: str = "s") -> str:
    """A count with its noun: 1 crash, 2,000 crashes."""
    return f"{count:,} {word}{ending * (count != 1)}"


def new_key(is_test: bool) -> str:
    """A new API key: bf_live_ or bf_test_ and 32 hex digits."""
    return ("bf_test_" if is_test else "bf_live_") + secrets.token_hex(16)


def key_prefix(key: str) -> str:
    """The part of a key that may be shown: 8 of its 32 digits, or up to a third of a key that the operator chose."""
    return key[:16 if re.fullmatch("bf_(live|test)_[0-9a-f]{32}", key) else min(16, len(key) // 3)]


def sha256(data: bytes | str) -> bytes:
    """The digest under which keys and tokens are stored."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).digest()


_VERSION_PARTS = re.compile(  # numbers; pre-release, such as -rc.1, b3 or " beta"; metadata, such as +48; (build)
    r"[vV]?([0-9]+(?:\.[0-9]+)*)(?:-([0-9A-Za-z.-]+)| ?([A-Za-z][0-9A-Za-z.-]*))?(?:\+[^ (]*)?(?: *\(([^()]+)\))?")


def version_key(version: str) -> tuple[Any, ...]:
    """A sort key for versions and builds: 1.10 is after 1.9, 1.2 (10) after 1.2 (9), 1.2.0-rc.1 and 1.2.0b3 before
    1.2.0, and 1.3 equals 1.3.0. Its first item is whether the version has numbers; one without is below all others.
    Only the first 64 characters count, so that the cache stays small."""
    return _version_key(version[:64])


@lru_cache(maxsize=4096)  # the list of releases sorts up to 1,000 of an app
def _version_key(version: str) -> tuple[Any, ...]:
    match = _VERSION_PARTS.fullmatch(version)
    if match is None:
        return False, [], False, _version_words(version), []
    numbers, pre_release = list(map(int, match[1].split("."))), match[2] or match[3] or ""
    while numbers and not numbers[-1]:
        numbers.pop()
    return True, numbers, not pre_release, _version_words(pre_release), _version_words(match[4] or "")


def _version_words(text: str) -> list[tuple[int, int, str]]:
    words = re.findall("[0-9]+|[A-Za-z]+", text)
    return [(0, int(word), "") if word.isdecimal() else (1, 0, word) for word in words]


# == Grouping ==================================================================
# Stack frames, and the group of a crash. A group is made of names, never of load addresses or line numbers, so the same
# fault is one group on all phones and in the next build.

GROUPING_VERSION = 3  # of these rules. A start with newer rules moves stored crashes to their new groups
SYSTEM_BASE = 0x180000000  # Apple's own libraries are loaded from this address on, an app below it
MAX_SYMBOL = 1000  # characters of a symbol that are used for grouping
MAX_PATH = 1024  # Darwin's limit
MAX_IMAGES = 4  # builds stored with a crash: those whose symbols can name its frames

# The fields of a frame, under our names and those of KSCrash, PLCrashReporter and Sentry.
_FRAME_FIELDS = {
    "symbol": ("symbol", "symbol_name", "function"), "file": ("file", "filename"), "line": ("line", "lineno"),
    "binary": ("binary", "object_name", "image", "package"), "uuid": ("uuid", "image_uuid", "debug_id"),
    "offset": ("offset",), "address": ("address", "instruction_addr"),
    "image_base": ("image_base", "image_addr", "object_addr"), "path": ("path", "package")}
_API_FRAME_FIELDS = {"frame", "symbol", "file", "line"}
_SYSTEM_BINARY = re.compile(r"dyld|libobjc-trampolines\.dylib|libswift\w{0,40}\.dylib")  # system code, wherever loaded
# The system files of a simulator are below Xcode.app, too.
_APP_PATH = re.compile(r"(?!/System/|/usr/|.*/(?:RuntimeRoot|Contents/Developer)/).*\.app(?:ex)?/", re.S)
_SWIFT_LIBRARY = "specialized ", "merged specialized "  # compiled into an app, if the file is "<compiler-generated>"
_NAME_AND_OFFSET = re.compile(r"(.*) \+ ([0-9]{1,18})")
_PLACEHOLDER = re.compile("0x[0-9a-fA-F]+|[0-9a-fA-F]{8,16}|<redacted>|<unknown>|[?]+|_?_?mh_(?:execute|dylib)_header|")
_CALL_STACK_LINE = re.compile(  # of callStackSymbols. \S before \s+: with a dot, a million spaces would take 5 s
    r"(?:[0-9]{1,4}\s+(\S(?:.{0,199}?\S)??)\s+)?0x[0-9a-fA-F]{1,16} (?!\+ )(.+)")
_UUID_DIGITS = re.compile("([0-9A-F]{8})" + 3 * "([0-9A-F]{4})" + "([0-9A-F]{12})[0-9A-F]{0,8}")


class Frame(NamedTuple):
    """A stack frame, whatever an SDK calls its fields. Empty text and None mean that a field is missing."""

    symbol: str = ""
    file: str = ""
    binary: str = ""
    uuid: str = ""              # of the build, as dwarfdump prints it
    offset: int | None = None   # from the start of the binary, in bytes
    is_own: bool | None = None  # whether it is the app's own code; None: unknown
    has_trusted_name: bool = True

    @property
    def title(self) -> str:
        """The name that is shown to people."""
        return self.symbol or (f"{self.binary} + {self.offset}" if self.binary and self.offset is not None else "")

    @property
    def label(self) -> str:
        """The text by which groups tell frames apart: its name, or its build and offset."""
        if self.has_trusted_name and self.symbol or self.offset is None:
            return canonical_name(self.symbol[:MAX_SYMBOL]) or ("" if self.file else self.binary)
        return f"{self.uuid or self.binary}+{self.offset}"


def read_frame(frame: Mapping[str, Any]) -> Frame:
    """A frame from its JSON object. The symbol that a device gives to the app's own code in a known build is not
    trusted: for a stripped binary, a device names an earlier function. `symbolicated` marks one that can be trusted."""
    if frame.keys() <= _API_FRAME_FIELDS:
        symbol, file = _string(frame.get("symbol")), _string(frame.get("file"))
        return _cached_frame(symbol, file) if len(symbol) + len(file) < 200 else _make_frame(symbol, file)
    symbol, file, binary, path = (_string(_first_value(frame, name)) for name in ("symbol", "file", "binary", "path"))
    address, base, offset = (_integer(_first_value(frame, name)) for name in ("address", "image_base", "offset"))
    if address is not None and offset is None and base is not None:
        offset = address - base
    elif address is not None and base is None and offset is not None:
        base = address - offset
    is_own = frame["in_app"] if type(frame.get("in_app")) is bool else None
    return _make_frame(symbol, file, binary.rpartition("/")[2], path, image_uuid(_first_value(frame, "uuid")), offset,
                       base, is_own, frame.get("symbolicated") is True)


def _first_value(frame: Mapping[str, Any], field: str) -> Any:
    """The value of a field under the first of its names that has one."""
    for name in _FRAME_FIELDS[field]:  # a generator would take twice as long
        value = frame.get(name)
        if value is not None and value != "":
            return value
    return None


def _make_frame(symbol: str, file: str, binary: str = "", path: str = "", uuid: str = "", offset: int | None = None,
                base: int | None = None, is_own: bool | None = None, is_symbolicated: bool = False) -> Frame:
    """A frame in which missing fields are derived from the others."""
    if line := _CALL_STACK_LINE.fullmatch(symbol):
        binary, symbol = binary or line[1] or "", line[2]
    if match := _NAME_AND_OFFSET.fullmatch(symbol):
        name, distance = match[1], int(match[2])
        could_be_binary = not binary and distance > 4096 and re.fullmatch(r"[\w. -]+", name)  # no function is this long
        if name == binary or _PLACEHOLDER.fullmatch(name) or could_be_binary:
            symbol, binary = "", binary or name
            offset = distance if offset is None else offset
        else:
            symbol = name  # the distance from the start of the function does not matter
    if _PLACEHOLDER.fullmatch(symbol):
        symbol = ""
    if is_own is None:
        is_own = is_own_code(file, path, base, binary)
    if file == "<compiler-generated>" and symbol.startswith(_SWIFT_LIBRARY):
        is_own = False
    is_trusted = bool(file or symbol and (is_symbolicated or not uuid or offset is None or not is_own))
    return Frame(symbol, file, binary[:MAX_SYMBOL], uuid, offset, is_own, is_trusted)


_cached_frame = lru_cache(maxsize=4096)(_make_frame)


def is_own_code(file: str, path: str, base: int | None, binary: str) -> bool | None:
    """Whether code is the app's own, judged by its source file, its path, or its load address. None if unknown."""
    if file or path.startswith("/"):
        is_own = bool(file or _APP_PATH.match(path[:MAX_PATH]))
    elif base:
        is_own = base < SYSTEM_BASE
    else:
        return None
    return is_own and not _SYSTEM_BINARY.fullmatch(binary)


def _string(value: Any) -> str:
    return value if type(value) is str else ""


def _integer(value: Any) -> int | None:
    """A number that is not negative, also from text such as 0x1a2b. None for anything else."""
    if type(value) is str and re.fullmatch("0[xX][0-9a-fA-F]{1,16}|[0-9]{1,19}", value):
        return int(value, 16 if value.lower().startswith("0x") else 10)
    return value if type(value) is int and 0 <= value < 1 << 64 else None


def image_uuid(value: Any) -> str:
    """The UUID of a build in upper case with dashes; "" for anything else."""
    return _image_uuid(_string(value)[:60])


@lru_cache(maxsize=1024)  # most frames of a trace are of few builds
def _image_uuid(text: str) -> str:
    digits = _UUID_DIGITS.fullmatch(text.replace("-", "")[:40].upper())  # a debug_id may end with an age
    return "-".join(digits.groups()) if digits and digits[0].strip("0") else ""  # some SDKs write zeros for none


_COMPILER_PREFIXES = re.compile(
    r"(?:@objc |@nonobjc |specialized |merged |dynamic |implicit |partial apply (?:forwarder )?for "
    r"|invocation function for block in "
    r"|\$defer #[0-9]+ (?:\(\) )?in |(?:implicit )?(?:auto)?closure #[0-9]+ (?:[(@<].{0,200}? )?in "
    r"|\([0-9]+\) (?:suspend|await) resume partial function for "
    r"|(?:generic|function signature) specialization <[^<>]*(?:<[^<>]*>[^<>]*)*> of )+")
_COMPILER_SUFFIXES = re.compile(
    r"(?: \+ (?:0x[0-9a-fA-F]+|[0-9]+)| \((?:in [^()]*|[^()]*:[0-9]+|\.[\w.]+)\)| at [^ ():]+(?::[0-9]+){1,2}"
    r"| \[clone [^]]*\]| (?:at )?[\[(]?0x[0-9a-fA-F]+[\])]?|\.(?:cold|resume)"
    r"|::h[0-9a-f]{16}|\$VARIANT\$\w+"  # the hash of a build by Rust; the chip; and then helpers by Swift
    r"|(?:\.[0-9]+|(?<=[0-9A-Z_)])|(?<=v[gsM])|(?<=destroy)|(?<=_[gs]et))Tm"
    r"|T[YQ][0-9]+_|(?:\.(?:cold|llvm|resume|part|constprop|isra))?\.[0-9]+)+")
_BLOCK = re.compile(r"(?:(?:__[0-9]+)+(?=[-+]\[)|__(?=.*_block_invoke))?(.*?)(?:_block_invoke(?:_[0-9]+)?)+")
# Functions in every program, of C++'s library (but not those that return a type of it), or made by the compiler.
_UNSPECIFIC = re.compile(
    r"_?main|start|_?dyld_start|__debug_main_executable_dylib_entry_point|static .*\$main\(\)(?: -> \(\))?"
    r"|\$s.*5\$mainyyFZ|(?:decltype\(.*\) |[^(]*[\w*&>] (?<! as |mut |dyn )(?<!operator ))?std::"
    r"(?!.*[\w*&>] (?<!operator )(?!std::|const\b)\w+(?:::|[(<])).*"
    r"|<compiler-generated>|protocol witness for .*|outlined .*|OUTLINED_FUNCTION_[0-9]+|.*\.unsafeMutableAddressor"
    r"|.* thunk|(?:(?:reabstraction|dispatch|non-virtual|virtual) )?thunk (?:for|to|of|helper from) .*")
# Functions that a program runs through when it aborts. Some of their runtimes are linked into the app.
_ABORTING = re.compile(
    r"_*(?:pthread_kill|kill|raise|abort|abort_message|assert_rtn|exceptionPreprocess|objc_exception_throw"
    r"|objc_terminate|cxa_throw|cxa_rethrow|demangling_terminate_handler|assertionFailure|fatalErrorMessage"
    r"|preconditionFailure)\b.*|_*swift_.*|Swift\._?(?:assertionFailure|fatalErrorMessage|preconditionFailure)\b.*"
    r"|Swift runtime failure: .*|[-+]\[NSException .*|\w*TerminateHandler\b.*"
    r"|__rust_.*|rust_(?:panic|begin_unwind).*|_RNv\w*rust_begin_unwind"  # Rust
    r"|core::(?:panicking::|(?:\w+::)+(?:\w*_fail(?:ed)?\b|panic_)).*|alloc::\w+::handle_\w*error.*"
    r"|konan::abort.*|.*(?:terminateWith|process)UnhandledException.*"  # Kotlin
    r"|xamarin_.*|native_to_managed_.*"  # .NET
    r"|il2cpp::vm::Exception::.*|il2cpp_codegen_raise_.*|NullCheck\b.*"  # Unity
    r"|RCTFatal\b.*|-\[RCTExceptionsManager .*")  # React Native


@lru_cache(maxsize=2048)
def canonical_name(symbol: str) -> str:
    """A symbol without what compilers and tools add to it, and without what differs from build to build."""
    prefixes = _COMPILER_PREFIXES.match(symbol)
    name = symbol[prefixes.end():] if prefixes else symbol
    for suffixes in _COMPILER_SUFFIXES.finditer(name):  # a search that ends with \Z could take quadratic time
        if suffixes.start() > 0 and suffixes.end() == len(name):
            name = name[:suffixes.start()]
    block = _BLOCK.fullmatch(name)
    return re.sub(r"\$_[0-9]+", "$_", block[1] if block else name)  # C++ numbers its lambdas by build


@lru_cache(maxsize=2048)
def _is_specific(label: str) -> bool:
    return not (_UNSPECIFIC.fullmatch(label) or _ABORTING.fullmatch(label))


# The first of these rules that any frame meets chooses the frames of the group: own code, else other code with a
# symbol, else with a binary, all with specific names; else anything own or with a symbol, else anything.
_GROUP_RULES: Sequence[Callable[[Frame], object]] = (
    lambda frame: frame.is_own and _is_specific(frame.label),
    lambda frame: frame.symbol and _is_specific(frame.label),
    lambda frame: frame.label and _is_specific(frame.label),
    lambda frame: frame.is_own or frame.symbol,
    lambda frame: frame.label)


def group_hash(exception_type: str, frames: Iterable[Frame]) -> str:
    """The group of a crash: a hash of its exception type and of the first three names in frames of the app's own code.
    Without own code, other frames count. A frame without a name counts as its build and offset. Reads few frames."""
    names: list[str] = []
    for rule in _GROUP_RULES:
        candidates, frames = tee(frames)  # as they are read lazily
        for frame in candidates:
            if rule(frame) and (label := frame.label) not in names[-1:]:  # without repeated neighbours
                names.append(label)
                if len(names) == 3:
                    break
        if names:
            break
    return hashlib.sha256(":".join([exception_type, *names]).encode()).hexdigest()[:16]


def builds_to_symbolicate(frames: Iterable[Frame]) -> str | None:
    """The UUIDs of up to MAX_IMAGES builds whose symbols can name any of these frames, separated by spaces; or None."""
    uuids = {frame.uuid: None for frame in frames
             if frame.uuid and frame.offset is not None and frame.is_own is not False and not frame.has_trusted_name}
    return " ".join(list(uuids)[:MAX_IMAGES]) or None


# == JSON ======================================================================
# How JSON is read and written: UTF-8, finite numbers, no characters that SQLite cannot store, and not too deep.

MAX_DEPTH = 64  # of JSON that is stored as it was sent: far more than SDKs send
MAX_READ_DEPTH = 500  # of JSON that is read. Python 3.13 reads 10,000 levels, but a thread's stack may end before that

JsonObject = dict[str, Any]


def decode_json(body: bytes) -> JsonObject:
    """The JSON object in a body. Raises Refusal unless it is a UTF-8 object of finite numbers that is not too deep."""
    try:
        value = _DECODER.decode(not_deep(decode_text(body)))
    except ValueError as error:
        raise Refusal("invalid JSON", detail=json_problem(error)) from None
    if type(value) is not dict:
        raise Refusal("invalid JSON", detail=f"the body is {_json_type(value)}, not an object")
    return value


def json_problem(error: ValueError) -> str:
    """What is wrong with JSON, for its developer."""
    return "a number is out of range" if "int_max_str_digits" in str(error) else str(error)[:100]


def decode_text(body: bytes) -> str:
    """The text of a body in UTF-8. Raises ValueError. A NUL or a lone surrogate, which in JSON is always an escape, and
    which SQLite cannot store, becomes U+FFFD: one bad character must not cost a report."""
    try:
        text = body.decode().removeprefix("\ufeff")  # a byte order mark
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    if "\\" in text and _MAYBE_UNSTORABLE.search(text):  # most have no escapes, and `in` takes no time to find that
        return _ESCAPE.sub(lambda match: r"\ufffd" if match[1] else match[0], text)
    return text


def _parse_finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is out of range")
    return number


def _parse_integer(text: str) -> int:
    """For Pythons without a limit of their own: for a million digits, int() would take seconds."""
    if len(text) > 4300:
        raise ValueError("a number is out of range")
    return int(text)


_make_decoder = partial(json.JSONDecoder, parse_float=_parse_finite,
                        parse_int=int if hasattr(sys, "get_int_max_str_digits") else _parse_integer)
_DECODER = _make_decoder(parse_constant=_parse_finite)
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":"),
                            default=lambda _: "(nested too deep)")  # for the deques of _decode_nested
# json makes its encoder anew for each value. Keeping it halves the time. Not every Python has it.
_make_encoder = json.encoder.c_make_encoder or (lambda *_: None)  # type: ignore[attr-defined]
_C_ENCODER = _make_encoder(None, _ENCODER.default, json.encoder.encode_basestring, None, ":", ",", False, False, False)
_C_ASCII_ENCODER = _make_encoder(None, json.JSONEncoder().default, json.encoder.encode_basestring_ascii, None, ": ",
                                 ", ", False, False, True)
_NESTING_STEPS = {**dict.fromkeys(b"{[", 1), **dict.fromkeys(b"]}", -1)}
_NO_BRACKETS = bytes(set(range(256)) - _NESTING_STEPS.keys())
_MAYBE_UNSTORABLE = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")  # a cheap check before the exact one
# An escape: a pair of surrogates, which is one character; a lone surrogate or a NUL, which is group 1; any other.
_ESCAPE = re.compile(r"\\(?:ud[89ab][0-9a-f]{2}\\ud[c-f][0-9a-f]{2}|(u0000|ud[89a-f][0-9a-f]{2})|.)", re.I | re.S)


def to_json(value: Any) -> str:
    """A value as compact JSON."""
    return "".join(_C_ENCODER(value, 0)) if _C_ENCODER else _ENCODER.encode(value)


def to_ascii_json(value: Any) -> str:
    """A value as json.dumps writes it, in half the time."""
    return "".join(_C_ASCII_ENCODER(value, 0)) if _C_ASCII_ENCODER else json.dumps(value)


def _json_size(value: Any) -> int:
    return len(to_json(value).encode())


def _json_type(value: Any) -> str:
    """The type of a JSON value, in words for a developer."""
    return {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}.get(
        type(value), "a number")


def not_deep(text: str) -> str:
    """The same JSON. Raises ValueError if it is nested deeper than MAX_READ_DEPTH."""
    if _is_deep(text, MAX_READ_DEPTH):
        raise ValueError("it is nested too deep")
    return text


def _is_deep(text: str, max_depth: int = MAX_DEPTH) -> bool:
    """Whether JSON is nested too deep. Counts brackets: walking through the values would take ten times as long."""
    if len(text) <= max_depth or text.count("{") + text.count("[") <= max_depth:  # nearly always
        return False
    outside_strings = text.replace("\\\\", "").replace('\\"', "").split('"')[::2]
    brackets = "".join(outside_strings).encode().translate(None, _NO_BRACKETS)
    return any(map(max_depth.__lt__, accumulate(map(_NESTING_STEPS.__getitem__, brackets))))  # ends at the first


# == Payloads ==================================================================
# JSON in, a crash or an event out, or a Refusal; the code below trusts what comes from here. A report is a namedtuple
# whose fields are its columns. A missing or wrong required field is refused, so that a developer sees it at once. A
# wrong optional field, perhaps of a few phones only, must not cost a report: it is converted, cut, or kept in `extra`.

EVENT_TYPES = ("session_start", "session_end", "error", "custom")
MAX_BATCH = 100  # events
MAX_TEXT = 500  # characters of versions, models, types, names, ids, locale
MAX_NUMBER = (1 << 63) - 1
MAX_REPORT_SIZE, MAX_BATCHED_SIZE = 256_000, 32_000  # bytes of text stored for a report, and for an event of a batch
MAX_PAYLOAD_SIZE = 1_000_000  # bytes of an Apple payload; reports beyond may only have MAX_BATCHED_SIZE each
SMALL_SIZE = 1000  # characters: shorter JSON cannot have too many fields or frames
MAX_FIELDS = 256  # of `properties`, and of unknown fields
MAX_FRAME_FIELDS = 32  # of each frame, if a report is cut
FRAME_ROOM = 200  # bytes for each frame, if a report is cut: the others are dropped, so that these stay whole
FIRST_FRAMES, LAST_FRAMES = 384, 128  # that are kept of a longer stack trace
GROUPED_FRAMES = 1000  # of a longer stack trace: these first ones and LAST_FRAMES decide the group
Converters = Mapping[str, Callable[[Any], Any]]  # by field: gives the value to store; an error if it is wrong


# Converters. They compare types exactly, because isinstance would accept True as an int.

def _long_text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"is {_json_type(value)}, not text")
    return value


def _cut_text(value: Any) -> str:
    return _long_text(value)[:MAX_TEXT]


def _short_text(value: Any) -> str:
    return _cut_text(str(value) if type(value) is int else value)


def _number(value: Any) -> int | float:
    if type(value) is str and re.fullmatch(r"-?[0-9]{1,18}(\.[0-9]{1,18})?", value):
        value = float(value) if "." in value else int(value)
    if type(value) not in (int, float) or abs(value) > MAX_NUMBER:
        raise ValueError
    return value  # type: ignore[no-any-return]


def _battery_level(value: Any) -> int | float:
    number = _number(value)
    if not (0 <= number <= 1 or number == -1):
        raise ValueError
    return number


def _boolean(value: Any) -> bool:
    if type(value) not in (bool, int) or value not in (0, 1):
        raise ValueError
    return bool(value)


def _event_type(value: Any) -> str:
    if type(value) is str and value not in EVENT_TYPES:
        raise Refusal("invalid event type", detail=(
            f"it is not one of {', '.join(EVENT_TYPES)}; an event of your own is custom and has a name"))
    return _cut_text(value)


def _object(value: Any, max_length: int = sys.maxsize) -> str:
    if type(value) is not dict or len(text := to_json(value)) > max_length or _is_deep(text):
        raise ValueError
    return text


def _stack_trace(value: Any) -> str:
    if not _is_list_of_objects(value) or _is_deep(text := to_json(value)):
        raise ValueError
    return text


def _is_list_of_objects(value: Any) -> bool:
    return type(value) is list and {*map(type, value)} <= {dict}


Crash = namedtuple("Crash", "group_hash images exception_type exception_reason stack_trace app_version build_number"
                            " os_version device_model device_id_hash session_id locale free_memory_mb battery_level"
                            " is_charging occurred_at extra")
Crash.__doc__ = "A valid crash. `images` is made by builds_to_symbolicate; `extra` has the unknown fields as JSON."
Event = namedtuple("Event", "type name properties app_version os_version device_model device_id_hash session_id locale"
                            " occurred_at extra")
Event.__doc__ = "A valid event. `extra` has the unknown fields as JSON."
Reports = Sequence[Union[Crash, Event]]

_CONVERTERS: Converters = {
    "exception_type": _cut_text, "exception_reason": _long_text, "stack_trace": _stack_trace,
    "type": _event_type, "properties": _object, "free_memory_mb": _number, "battery_level": _battery_level,
    "is_charging": _boolean, "occurred_at": parse_occurred_at}
_FIELDS: Mapping[type, Converters] = {kind: {name: _CONVERTERS.get(name, _short_text) for name in names}
                                      for kind, names in ((Crash, Crash._fields[2:-1]), (Event, Event._fields[:-1]))}
_ABSENT: Mapping[type, JsonObject] = {kind: dict.fromkeys((*names, "extra")) for kind, names in _FIELDS.items()}
_REQUIRED = ("exception_type", "type", "occurred_at")


def report_id(kind: type, seq: int) -> str:
    """The public id of a report."""
    return crash_id(seq) if kind is Crash else event_ids([seq])[0]


def parse_crash(sent: JsonObject, max_size: int = MAX_REPORT_SIZE) -> Crash:
    """A crash from its JSON object, cut to `max_size` bytes. Raises Refusal."""
    trace: Any = sent.get("stack_trace")
    # One frame more than is kept: from it, _truncate knows that frames are missing.
    frames = list(map(_normalize_frame, _limit_length(trace, spare_frames=1))) if _is_list_of_objects(trace) else []
    values = _convert({**sent, "stack_trace": frames} if frames else sent, Crash, max_size)
    kept = list(map(read_frame, _limit_length(frames)))
    grouped: Iterable[Frame] = kept
    if len(frames) > len(kept):  # frames of the app may be among those that are dropped
        others = trace[FIRST_FRAMES:GROUPED_FRAMES] + trace[GROUPED_FRAMES:][-LAST_FRAMES:]
        grouped = chain(kept[:FIRST_FRAMES], map(read_frame, map(_normalize_frame, others)))
    return Crash(group_hash(values[0], grouped), builds_to_symbolicate(kept), *values)


def own_frame_names(frames: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """The name and then the file of each of the first 20 frames of the app's own code, those that count first."""
    own = sorted(islice((frame for frame in map(read_frame, frames) if frame.is_own), 20),
                 key=lambda frame: not _is_specific(frame.label))
    return tuple(name for frame in own for name in (frame.title, frame.file))


@lru_cache(maxsize=128)
def _cached_own_frame_names(stack_trace: str) -> tuple[str, ...]:  # crashes of a group mostly have the same trace
    return own_frame_names(json.loads(stack_trace or "[]"))


def _normalize_frame(frame: JsonObject) -> JsonObject:
    """A frame in which a number sent for a text is text, and `frame` and `line` are whole numbers where possible."""
    changes: JsonObject = {name: str(value) for name in ("symbol", "file")
                           if type(value := frame.get(name)) in (int, float)}
    for name in ("frame", "line"):
        if type(value := frame.get(name)) is not int and value is not None:
            with suppress(ValueError):
                if (number := _number(value)) == int(number):
                    changes[name] = int(number)
    return {**frame, **changes} if changes else frame


def parse_event(sent: Any, max_size: int = MAX_REPORT_SIZE) -> Event:
    """An event from its JSON object, cut to `max_size` bytes. Raises Refusal."""
    if type(sent) is not dict:
        raise Refusal("invalid event", detail=f"it is {_json_type(sent)}, not an object")
    return Event(*_convert(sent, Event, max_size))


def parse_batch(sent: JsonObject) -> list[Event]:
    """The events of a batch, all or none. Raises Refusal with the index of the first bad event. Unknown fields beside
    `events` are kept with the first event, as `batch`: copies in each would let a small request write a lot."""
    events = sent.get("events")
    if events in (None, "", []):
        raise Refusal("missing events")
    if type(events) is not list:
        raise Refusal("invalid events", detail=f"events is {_json_type(events)}, not a list")
    if len(events) > MAX_BATCH:
        raise Refusal(f"too many events: at most {MAX_BATCH}")
    if len(sent) > 1 and type(events[0]) is dict:
        unused_name = "batch"
        while unused_name in events[0]:
            unused_name += "_"
        events[0][unused_name] = {name: value for name, value in sent.items() if name != "events"}
    try:
        return _parse_usual_events(events)
    except (Refusal, ValueError, TypeError, AttributeError):  # an event is invalid or unusual
        parsed = []
    for index, event in enumerate(events):
        try:
            parsed.append(parse_event(event, MAX_BATCHED_SIZE))
        except Refusal as refusal:
            raise Refusal(f"{refusal} at index {index}", detail=refusal.detail) from None
    return parsed


def _parse_usual_events(events: list[JsonObject]) -> list[Event]:
    """The events as `parse_event` makes them, in half the time: each distinct text of a field is converted once,
    because most texts are the same in all events. Raises an error if an event is invalid or unusual."""
    columns: list[Iterable[Any]] = []
    for name, convert in _FIELDS[Event].items():
        values = list(map(dict.get, events, repeat(name)))
        if convert is _object:  # not hashable
            columns.append(_usual_objects(values))
            continue
        converted = {value: convert(value) if value else None for value in set(values)}
        has_other_types = {*map(type, converted)} - {str, type(None)}  # such as True and 1, which are one key
        if has_other_types or name in _REQUIRED and None in converted.values():
            raise ValueError
        columns.append(map(converted.__getitem__, values) if len(converted) > 1 else repeat(converted[values[0]]))
    known = _FIELDS[Event].keys()
    extras: list[str | None] = [None] * len(events)
    if not known >= {*chain.from_iterable(events)}:
        extras = [None if known >= event.keys() else _object(
            {name: value for name, value in event.items() if name not in known}, SMALL_SIZE) for event in events]
    return list(map(partial(tuple.__new__, Event), zip(*columns, extras)))  # faster than Event._make


def _usual_objects(values: list[Any]) -> Iterable[str | None]:
    """The JSON of objects, None for None. Raises an error if one is anything else, long or deep."""
    if not {*map(type, values)} <= {dict, type(None)}:
        raise ValueError
    texts = list(map("".join, map(_C_ENCODER, values, repeat(0))) if _C_ENCODER else map(_ENCODER.encode, values))
    longest = max(map(len, texts))
    if longest > SMALL_SIZE or longest > 2 * MAX_DEPTH and any(map(_is_deep, texts)):  # each level has two brackets
        raise ValueError
    return texts if None not in values else [None if value is None else text for value, text in zip(values, texts)]


def _convert(sent: JsonObject, kind: type, max_size: int) -> list[Any]:
    """The values to store: one for each field, None if it is absent, and last the unknown fields as JSON. A report of
    more than `max_size` bytes is cut. Raises Refusal."""
    converters, values, unknown, size = _FIELDS[kind], dict(_ABSENT[kind]), {}, 0
    for name, value in sent.items():
        convert = converters.get(name)
        if convert is _short_text and type(value) is str:  # nearly all are
            values[name] = value[:MAX_TEXT] or None
        elif convert is None:
            unknown[name] = value
        elif value is not None and value != "":
            try:
                values[name] = converted = convert(value)
                if type(converted) is str:
                    size += len(converted)
            except ValueError as error:
                if name in _REQUIRED:
                    raise Refusal(f"invalid {name}", detail=f"{name} {error}") from None
                unknown[name] = value
    for name in _REQUIRED:
        if name in values and values[name] is None:  # a crash has no `type`, an event no `exception_type`
            raise Refusal(f"missing {name}")
    if unknown:
        # Two more than are kept: `truncated` is not counted, and from the other, _truncate knows that some are missing.
        unknown = {name: _flatten_if_deep(value) for name, value in islice(unknown.items(), MAX_FIELDS + 2)}
        values["extra"] = to_json(unknown)
        size += len(values["extra"])
    if size > SMALL_SIZE:
        long = {name: sent[name] for name in ("exception_reason", "stack_trace", "properties") if values.get(name)}
        values.update(_truncate({**long, "extra": unknown}, values, max_size))
    return list(values.values())


def _flatten_if_deep(value: Any) -> Any:
    """A value, or the beginning of its JSON as text if it is nested too deep or longer than a report may be."""
    if type(value) not in (dict, list):
        return value
    text = to_json(value)
    return text[:MAX_REPORT_SIZE] if len(text) > MAX_REPORT_SIZE or _is_deep(text, MAX_DEPTH - 1) else value


def _truncate(long: JsonObject, values: JsonObject, max_size: int) -> JsonObject:
    """The long values of a report, cut to fit; {} if they fit. The unknown field `truncated` lists what was cut."""
    kept = {name: _limit_length(value) for name, value in long.items()}
    size = sum(len(value.encode()) for value in values.values() if type(value) is str)
    if size <= max_size and all(kept[name] is long[name] for name in long):
        return {}
    for part in long, kept:  # a client's own `truncated` gives way to ours
        part["extra"] = {"truncated_" if name == "truncated" else name: value for name, value in part["extra"].items()}
    short_size = sum(len(str(value).encode()) for name, value in values.items() if name not in long)
    room = max_size - short_size - 200  # for `truncated`
    if _json_size(kept) > room:
        kept = _truncate_fairly(kept, room)
    kept["extra"]["truncated"] = [name.replace("extra", "unknown fields") for name in long if kept[name] != long[name]]
    return {name: value if name == "exception_reason" else to_json(value) for name, value in kept.items()}


def _truncate_fairly(long: JsonObject, room: int) -> JsonObject:
    """The long values, cut to `room` bytes. Each name and each value in them may take the same share."""
    trace, most = long.get("stack_trace", []), max(4, room // FRAME_ROOM)
    if len(trace) > most:
        trace = trace[:most - most // 4] + trace[-(most // 4):]
    frames = [dict(islice(frame.items(), MAX_FRAME_FIELDS)) for frame in trace]
    objects = [*frames, long.get("properties", {}), long["extra"], {"": long.get("exception_reason", "")}]
    objects = [{name: _flatten_if_deep(value) for name, value in members.items()} for members in objects]
    sizes = [_json_size(part) for members in objects for part in chain.from_iterable(members.items())]
    share = _fair_share(sizes, room - len(sizes) - 3 * len(objects))  # for colons, commas and braces
    *frames, properties, extra, reason = (
        {_beginning(name, share): _beginning(value, share) for name, value in members.items()} for members in objects)
    cut = {"stack_trace": frames, "properties": properties, "extra": extra, "exception_reason": reason[""]}
    return {name: cut[name] for name in long}


def is_trace_cut(extra: str | None) -> bool:
    """Whether the stack trace of a crash was cut. A client may send anything under the name `truncated`."""
    cut = json.loads(extra).get("truncated") if extra and "truncated" in extra else None
    return type(cut) is list and "stack_trace" in cut


def _fair_share(sizes: list[int], room: int) -> int:
    """The largest size that each part may have so that all together fit in `room`."""
    for index, size in enumerate(sorted(sizes)):
        share = room // (len(sizes) - index)
        if size > share:
            return share
        room -= size
    return max(sizes)


def _beginning(value: Any, max_size: int) -> Any:
    """A value that takes at most `max_size` bytes as JSON, or 2 if that is less: itself, or its beginning as text."""
    encoded = to_json(value)
    if len(encoded.encode()) <= max_size:
        return value
    text = (value if type(value) is str else encoded)[:max(0, max_size)]
    while text and (size := _json_size(text)) > max_size:
        text = text[:len(text) * max_size // size]
    return text


def _limit_length(value: Any, spare_frames: int = 0) -> Any:
    """The first and last frames of a long stack trace, the first MAX_FIELDS fields of an object, or the whole value."""
    if type(value) is list and len(value) > FIRST_FRAMES + LAST_FRAMES:
        return value[:FIRST_FRAMES] + value[-LAST_FRAMES - spare_frames:]
    if type(value) is dict and len(value.keys() - {"truncated"}) > MAX_FIELDS:
        return dict(islice(value.items(), MAX_FIELDS))
    return value


# == Apple formats =============================================================
# What Apple's reports have in common. Each diagnostic becomes a JSON object like those of our own clients, and is
# converted, cut and grouped like them, by pure functions. What could identify a phone or a person is left out.

UNKNOWN_FORMAT = "unknown report format"
_APPLE_TIME = re.compile(r"([0-9-]{10})[ T]([0-9:]{8})(?:(\.[0-9]{1,9})[0-9]*)? ?(Z|[+-][0-9]{2}:?[0-9]{2})?")
_OS_VERSION = re.compile(r"(?:[A-Za-z]+ ){0,4}([0-9]+(?:\.[0-9]+)*)(?: \([\w ]{1,30}\))*")
_KILL_CODE = re.compile(r"(?:\bcode[: ] ?|^[A-Z]{1,40} )(0x[0-9a-f]{1,16}|[0-9]{1,19})\b", re.I)
# parse_crash or parse_event, and its input, whose `occurred_at` may be None.
Diagnostic = tuple[Callable[[JsonObject, int], Union[Crash, Event]], JsonObject]


def _member(parent: Any, name: str, kind: Callable[[], Any]) -> Any:
    """A member of an object if it has this type, else the type's empty value."""
    value = parent.get(name)
    return value if type(value) is kind else kind()


def _member_objects(parent: JsonObject, name: str) -> list[JsonObject]:
    return [item for item in _member(parent, name, list) if type(item) is dict]


def _member_number(parent: JsonObject, name: str) -> int | None:
    value = parent.get(name)
    return value if type(value) is int and 0 <= value <= MAX_NUMBER else None


def _member_object_at(parent: JsonObject, name: str, index: int | None) -> JsonObject:
    items = _member(parent, name, list)
    return items[index] if index is not None and index < len(items) and type(items[index]) is dict else {}


def _plain_members(parent: JsonObject) -> JsonObject:
    return {name: value for name, value in parent.items() if type(value) in (str, int) and value != ""}


def _apple_time(*values: Any) -> Any:
    """The first of these values that is a time, in a form that `parse_occurred_at` takes; None if there is none."""
    for value in values:
        if type(value) is str and (match := _APPLE_TIME.fullmatch(value)):
            value = f"{match[1]}T{match[2]}{match[3] or ''}{match[4] or 'Z'}"
        with suppress(ValueError):
            parse_occurred_at(value)
            return value
    return None


def _os_version(value: Any) -> Any:
    """The number alone, such as "17.0" for "iPhone OS 17.0 (21A329)"."""
    if type(value) is dict:
        return value.get("number")
    match = _OS_VERSION.fullmatch(value[:MAX_TEXT]) if type(value) is str else None
    return match[1] if match else value


def _exception_type(name: str, kill_code: str, mach: str, signal: str) -> str:
    """The most specific of these names. EXC_CRASH says less than the signal."""
    return name or kill_code or (mach if mach != "EXC_CRASH" else "") or signal or mach or "Unknown"


def _kill_code(*values: Any) -> str:
    """The code with which the system ended the app, such as 0x8badf00d: one of these numbers, or a number in one of
    these texts; or "". Numbers up to 0xFFFF are signals; those above 32 bits differ from crash to crash."""
    codes = [code for value in values for code in (_KILL_CODE.findall(value) if type(value) is str else [value])]
    return next((f"{number:#x}" for number in map(_integer, codes) if number and 0xFFFF < number <= 0xFFFFFFFF), "")


def _api_frame(number: int, binary: str, uuid: str, offset: int | None, is_own: bool | None,
               ips_frame: JsonObject) -> JsonObject:
    """A frame of our API. One from an .ips file may have a symbol and a source line."""
    file, line = _member(ips_frame, "sourceFile", str).rpartition("/")[2], _member_number(ips_frame, "sourceLine")
    symbol = _member(ips_frame, "symbol", str).replace("<redacted>", "")
    if file == "<compiler-generated>":
        is_own = is_own and not symbol.startswith(_SWIFT_LIBRARY)
        file, line = "", None
    frame = {"frame": number, "symbol": symbol, "file": file, "line": line or None, "binary": binary[:MAX_TEXT],
             "uuid": uuid, "offset": offset, "inlined": ips_frame.get("inline") is True or None, "in_app": is_own,
             "symbolicated": bool(is_own and symbol and not file) or None}  # makes read_frame trust it
    return {name: value for name, value in frame.items() if value is not None and value != ""}


# == MetricKit =================================================================
# The crashes, hangs and other diagnostics in a payload from MetricKit, in either of its shapes.

MACH_EXCEPTIONS = {
    1: "EXC_BAD_ACCESS", 2: "EXC_BAD_INSTRUCTION", 3: "EXC_ARITHMETIC", 4: "EXC_EMULATION", 5: "EXC_SOFTWARE",
    6: "EXC_BREAKPOINT", 7: "EXC_SYSCALL", 8: "EXC_MACH_SYSCALL", 9: "EXC_RPC_ALERT", 10: "EXC_CRASH",
    11: "EXC_RESOURCE", 12: "EXC_GUARD", 13: "EXC_CORPSE_NOTIFY"}
SIGNALS = {  # Darwin's numbers
    3: "SIGQUIT", 4: "SIGILL", 5: "SIGTRAP", 6: "SIGABRT", 7: "SIGEMT", 8: "SIGFPE", 9: "SIGKILL", 10: "SIGBUS",
    11: "SIGSEGV", 12: "SIGSYS", 13: "SIGPIPE", 14: "SIGALRM", 15: "SIGTERM"}
EVENT_NAMES = {"cpuExceptionDiagnostic": "CPU exception", "appLaunchDiagnostic": "Slow launch"}  # others by their kinds
DURATIONS = {  # the kinds that they tell
    "hangDuration": "hangDiagnostic", "totalCPUTime": "cpuExceptionDiagnostic", "launchDuration": "appLaunchDiagnostic",
    "writesCaused": "diskWriteExceptionDiagnostic", "totalWritesCaused": "diskWriteExceptionDiagnostic"}
_THREAD_STARTS = ("dyld", "libdyld.dylib", "libsystem_pthread.dylib")


# A string without an end is one token, too: searching for an end from each quote in it would take hours.
_NESTING = re.compile(r'"subFrames"\s*:\s*\[|"[^"]*"?|[][]|NaN')


def _decode_nested(text: str) -> Any:
    """The value of JSON whose `subFrames` may be nested to any depth: a call stack has two levels for each frame. In
    deep JSON each list of `subFrames` is decoded by itself, becomes a path (see _heaviest_path), and NaN, which JSON
    does not have, stands for it in the text around it. Raises ValueError."""
    if not _is_deep(text, MAX_READ_DEPTH):
        return _DECODER.decode(text)
    unused = deque[Any]()  # the lists for the next NaNs. One decoder: a new one for each list takes a third longer
    decoder = _make_decoder(parse_constant=lambda word: unused.popleft() if word == "NaN" else _parse_finite(word))
    pieces, lists = [list[str]()], [list[Any]()]  # of each open text, and the lists that NaN stands for in it
    open_brackets, position = list[bool](), 0  # whether each open "[" is of `subFrames`; where the next piece begins

    def decode(end: int) -> Any:
        """The value of the innermost open text, which ends there."""
        unused.extend(lists.pop())
        try:
            return decoder.decode(not_deep("".join([*pieces.pop(), text[position:end]])))
        except json.JSONDecodeError as error:  # its position is not that in the body
            raise ValueError(f"{error.msg} in a deep call stack") from None

    for token in _NESTING.finditer(text.replace("\\\\", "  ").replace('\\"', "  ")):  # the other escapes do no harm
        if token[0] == "NaN":
            raise ValueError("a number is out of range")
        if token[0].endswith("["):
            open_brackets.append(token[0] != "[")
            if open_brackets[-1]:
                pieces[-1].append(text[position:token.end() - 1] + "NaN")
                pieces.append([])
                lists.append([])
                position = token.end() - 1
        elif token[0] == "]" and open_brackets and open_brackets.pop():
            path = _heaviest_path(decode(token.end()))
            lists[-1].append(path)
            position = token.end()
    return decode(len(text))


def _heaviest_path(frames: Any) -> deque[JsonObject]:
    """The path that most samples took, from one of these frames inwards. It is not nested: deleting 5,000 nested
    objects takes more stack than a thread may have."""
    path, steps = deque[JsonObject](), list[JsonObject]()
    while type(frames) is list and (objects := [frame for frame in frames if type(frame) is dict]):
        steps.append(max(objects, key=lambda frame: _member_number(frame, "sampleCount") or 0))
        frames = steps[-1].pop("subFrames", None)
        if type(frames) is deque:
            path = frames
    path.extendleft(reversed(steps))
    return path


def _metrickit_diagnostics(payload: JsonObject) -> Iterator[Diagnostic]:
    if {"callStackTree", "diagnosticMetaData"} <= payload.keys():  # one diagnostic, without its payload
        meta = _member(payload, "diagnosticMetaData", dict)
        kind = next((kind for name, kind in DURATIONS.items() if name in meta), "crashDiagnostic")
        payload = {**payload, kind: payload}
    kinds = [name for name in payload if re.search(r"\wDiagnostics?\Z", name)]
    if not kinds and not payload.keys() & {"timeStampBegin", "timeStampEnd", "timeRange"}:
        hint = "; POST a crash of our own form to /api/v1/crashes" if "exception_type" in payload else ""
        raise Refusal(UNKNOWN_FORMAT, detail="the object is neither a MetricKit payload nor an .ips file" + hint)
    span, environment = _member(payload, "timeRange", dict), _member(payload, "environment", dict)
    occurred_at = _apple_time(
        payload.get("timeStampEnd"), payload.get("timeStampBegin"), span.get("end"), span.get("begin"))
    for kind in kinds:
        items = [] if payload[kind] is None else payload[kind]
        for item in items if type(items) is list else [items]:
            if type(item) is not dict:
                raise Refusal(UNKNOWN_FORMAT, detail=f"{kind[:50]} has {_json_type(item)} where an object belongs")
            if diagnostic := _metrickit_diagnostic(kind.removesuffix("s"), item, environment):
                parse, sent = diagnostic
                yield parse, {**sent, "occurred_at": occurred_at}
                if _json_size(environment) > MAX_BATCHED_SIZE:  # with copies in each, a small request could write a lot
                    environment = {}


def _metrickit_diagnostic(kind: str, item: JsonObject, environment: JsonObject) -> Diagnostic | None:
    """A crash, or an event for a diagnostic that did not end the app. None for an unknown kind without a call stack.
    Values without a column are kept under Apple's names."""
    meta = {**environment, **item, **_member(item, "diagnosticMetaData", dict)}
    for name in ("callStackTree", "diagnosticMetaData", "version"):
        meta.pop(name, None)
    columns = {  # since iOS 27, the names begin with "application"
        "app_version": meta.pop("appVersion", None) or meta.pop("applicationVersion", None),
        "build_number": meta.pop("appBuildVersion", None) or meta.pop("applicationBuildVersion", None),
        "device_model": meta.pop("deviceType", None) or None, "os_version": _os_version(meta.pop("osVersion", None))}
    is_crash = kind in ("crashDiagnostic", "memoryExceptionDiagnostic")
    trace = _metrickit_trace(_member(item, "callStackTree", dict), is_crash)
    if is_crash:
        return parse_crash, {**meta, **columns, **_metrickit_exception(kind, meta), "stack_trace": trace}
    if not trace and kind not in DURATIONS.values():
        return None
    duration = next((name for name in DURATIONS if meta.get(name)), "")
    known = {"duration": meta.pop(duration, None), "build_number": columns.pop("build_number"), "stack_trace": trace}
    known = {name: value for name, value in known.items() if value not in (None, "", [])}
    properties = {**known, **meta, **known}  # what is known comes first, and replaces fields of the same name
    words = re.sub("(?<=[a-z0-9])([A-Z])", r" \1", kind[:-len("Diagnostic")][:MAX_TEXT])  # gpuHang: "Gpu hang"
    name = EVENT_NAMES.get(kind, words.capitalize())
    return parse_event, {**columns, "type": "error", "name": name, "properties": properties}


def _metrickit_exception(kind: str, meta: JsonObject) -> JsonObject:
    thrown, termination = _member(meta, "objectiveCexceptionReason", dict), _member(meta, "terminationReason", str)
    mach, signal = _code_name(MACH_EXCEPTIONS, meta.get("exceptionType")), _code_name(SIGNALS, meta.get("signal"))
    name = _member(thrown, "exceptionName", str) or _member(thrown, "className", str)
    exception_type = _exception_type(name, _kill_code(termination), mach, signal)
    if exception_type == "Unknown" and kind == "memoryExceptionDiagnostic":
        exception_type = "Memory exception"
    reason = _member(thrown, "composedMessage", str) or termination
    return {"exception_type": exception_type, "exception_reason": reason}


def _code_name(names: Mapping[int, str], code: Any) -> str:
    return code if type(code) is str else names.get(code, "") if type(code) is int else ""


def _metrickit_trace(tree: JsonObject, is_crash: bool) -> list[JsonObject]:
    """The frames of the thread in question, innermost first. In a tree of samples, the path that most samples took."""
    stacks = _member_objects(tree, "callStacks") or _member_objects(tree, "callStackThreads")
    stack = next((stack for stack in stacks if stack.get("threadAttributed") is True), stacks[0] if stacks else {})
    path = _heaviest_path(_member_objects(stack, "callStackRootFrames") or _member_objects(stack, "rootFrames"))
    images = _member_objects(tree, "binaryInfo")
    names = {uuid: _member(image, "name", str)[:MAX_TEXT]
             for image in images if (uuid := image_uuid(image.get("uuid")))}
    steps = [(frame, _member(frame, "binaryName", str) or names.get(image_uuid(frame.get("binaryUUID")), ""))
             for frame in path]
    # A sampled path may begin where its thread began, and end with the innermost frame.
    if not is_crash and path and steps[0][1] in _THREAD_STARTS and steps[-1][1] not in _THREAD_STARTS:
        steps.reverse()
    return [_metrickit_frame(number, *step) for number, step in _limit_length([*enumerate(steps)], spare_frames=1)]


def _metrickit_frame(number: int, frame: JsonObject, binary: str) -> JsonObject:
    """A frame of our API from one of MetricKit. It has no path, so its load address tells whether it is own code."""
    offset, address = _member_number(frame, "offsetIntoBinaryTextSegment"), _member_number(frame, "address")
    base = address - (offset or 0) if address is not None and address >= (offset or 0) else None
    if offset is not None and offset >= 1 << 32:  # iOS 14 and 15 and macOS 12 give the load address as the offset
        base, offset = offset, base
    is_own = is_own_code("", "", base, binary)
    return _api_frame(number, binary, image_uuid(frame.get("binaryUUID")), offset, is_own, {})


# == Crash files ===============================================================
# The crash in an .ips file, or in the text of a .crash file, which is brought into the form of an .ips file first.

_UNCAUGHT = re.compile(r"uncaught exception '([^\n]{1,500}?)', reason: '(.*?)(?:'(?: \*\*\*|\n)|'?\Z)", re.S)
_FATAL = re.compile("Fatal error|Precondition failed|Assertion failed|BUG IN ")
_UNINFORMATIVE = re.compile(r"^(?:abort\(\) called|Performing @selector\(.*)$", re.M)


def _ips_crash(header: JsonObject, body: JsonObject) -> JsonObject:
    """The crash in an .ips file. Only the fields that are named here are kept."""
    exception, termination, bundle = (_member(body, name, dict) for name in ("exception", "termination", "bundleInfo"))
    notes = [note for notes in _member(body, "asi", dict).values() if type(notes) is list  # "application-specific"
             for note in notes if type(note) is str]
    details = [text for name in ("reasons", "details") for text in _member(termination, name, list)
               if type(text) is str]
    informative = [text for note in notes if (text := _UNINFORMATIVE.sub("", note).strip())]
    thrown = next(filter(None, map(_UNCAUGHT.search, notes)), None)
    name, message = (_member(_member(body, "exceptionReason", dict), member, str) for member in (
        "name", "composed_message"))
    reasons = [message, thrown and thrown[2], next(filter(_FATAL.search, informative), ""), *informative[:1],
               " ".join(_member(exception, part, str).strip() for part in ("subtype", "message")).strip(),
               " ".join(details), _member(termination, "indicator", str), *notes[:1]]
    kept_termination = _plain_members({name: termination.get(name) for name in ("namespace", "code", "indicator")})
    return {
        **_plain_members({
            "process": body.get("procName") or header.get("app_name"), "platformArchitecture": body.get("cpuType"),
            "bundleIdentifier": bundle.get("CFBundleIdentifier") or header.get("bundleID"),
            "exceptionCodes": exception.get("codes"), "exceptionSubtype": exception.get("subtype")}),
        **({"termination": kept_termination} if kept_termination else {}),
        "exception_type": _exception_type(
            name or (thrown[1] if thrown else ""), _kill_code(termination.get("code"), *details),
            _member(exception, "type", str), _member(exception, "signal", str).partition(" ")[0]),
        "exception_reason": next(filter(None, reasons), None), "stack_trace": _ips_trace(body),
        "app_version": header.get("app_version") or bundle.get("CFBundleShortVersionString"),
        "build_number": header.get("build_version") or bundle.get("CFBundleVersion"),
        "os_version": _os_version(_member(body, "osVersion", dict).get("train") or header.get("os_version")),
        "device_model": body.get("modelCode"),
        "occurred_at": _apple_time(body.get("captureTime"), header.get("timestamp"))}


def _ips_trace(body: JsonObject) -> list[JsonObject]:
    """The frames of the exception, or of the thread that crashed if there is no exception."""
    triggered = (thread for thread in _member_objects(body, "threads") if thread.get("triggered") is True)
    thread = _member_object_at(body, "threads", _member_number(body, "faultingThread")) or next(triggered, {})
    frames = _member_objects(body, "lastExceptionBacktrace") or _member_objects(thread, "frames")
    main_path, trace = _member(body, "procPath", str)[:MAX_PATH], []
    for number, frame in _limit_length([*enumerate(frames)], spare_frames=1):
        image = _member_object_at(body, "usedImages", _member_number(frame, "imageIndex"))
        path, uuid = _member(image, "path", str)[:MAX_PATH], image_uuid(image.get("uuid"))
        binary = (_member(image, "name", str) or path.rpartition("/")[2]).replace("???", "")
        offset = _member_number(frame, "imageOffset") if binary or uuid else None  # without an image it is an address
        is_own = True if path and path == main_path else is_own_code("", path, _member_number(image, "base"), binary)
        trace.append(_api_frame(number, binary, uuid, offset, is_own, frame))
    return trace


_CRASH_HEADER = re.compile(r"^([A-Z][\w /]{1,40}):(.*)", re.M)
_CRASH_TYPE = re.compile(r"(\w+)(?: \((\w+))?")
_TERMINATION = re.compile(r"(?:Namespace )?(\w+),? (?:Code )?(0x[0-9a-f]{1,16}|[0-9]{1,19})\b[, ]*(.*)", re.I)
_CRASH_THREAD = re.compile(r"^(?:Last Exception Backtrace:|Thread [0-9]{1,9} Crashed:).*\n", re.M)
_CRASH_FRAME = re.compile(r"^[0-9]{1,9}[ \t](.*?)0x([0-9a-f]{1,16})\b(.*)", re.M | re.I)
_CRASH_SYMBOL = re.compile(  # Cart.total() + 112 (Cart.swift:12), or Cart.total() (in Shop) (Cart.swift:12) + 112
    r"(?!0x)(.*?)(?: \(in [^()]{1,200}\))?(?: \+ [0-9]+)?(?: \[inlined\])?"
    r"(?: \((<compiler-generated>|[^():]{1,200}(?=:)|[^():.][^():]{0,199}\.(?:swift|mm?|[chs]|cc|cpp|cxx|hpp|metal))"
    r"(?::([0-9]{1,9})(?::[0-9]{1,9})?)?\)| \(:-1\))?"
    r"(?: \+ [0-9]+)?(?: \[inlined\])?")
_BRACKETED = re.compile(r"\A0x[0-9a-f]+ \+ [0-9]+ \((.+)\)\Z")  # 0x1000d8000 + 36288 (-[Cart total] + 168), by KSCrash
_CRASH_IMAGE = re.compile(
    r"^[ \t]*0x([0-9a-f]{1,16})[ \t]*-[ \t]*0x([0-9a-f]{1,16})[ \t][^<\n]*<([0-9a-f-]+)>(.*)", re.M | re.I)


def _crash_text_as_ips(text: str) -> JsonObject:
    """The text of a .crash file in the form of an .ips body."""
    text = text.replace("\x00", "\ufffd").replace("\r\n", "\n")
    headers = reversed(_CRASH_HEADER.findall(text))  # of two with the same name, the first counts
    header = defaultdict(str, {name: value.strip() for name, value in headers})
    types, termination = _CRASH_TYPE.match(header["Exception Type"]), _TERMINATION.match(header["Termination Reason"])
    version, _, build = header["Version"].replace("???", "").rstrip(") ").partition("(")
    # These wrote the build first.
    if re.match(r"(?:iPhone OS|iOS) ([0-9]|1[0-4])\b|Watch OS [1-7]\b", header["OS Version"]):
        version, build = build, version
    below = re.search(r"^(?:Termination Reason|Dyld Error Message):.*\n[ \t]*(?!Term|Trig|High|Thread|Exception)(\S.*)",
                      text, re.M)
    return {
        "exception": {"type": types and types[1], "signal": types and types[2], "codes": header["Exception Codes"],
                      "subtype": header["Exception Subtype"] or re.sub("^[^A-Z].*", "", header["Exception Codes"]),
                      "message": header["Exception Message"]},
        "exceptionReason": {"composed_message": header["Exception Reason"]},
        "termination": {"details": [header["Termination Description"] or (below and below[1])],
                        "namespace": termination and termination[1], "code": termination and _integer(termination[2]),
                        "indicator": termination[3] if termination else header["Termination Reason"]},
        "asi": {"": [_paragraph_after(re.search("^Application Specific Information:.*\n", text, re.M))]},
        "bundleInfo": {"CFBundleShortVersionString": version.strip(), "CFBundleVersion": build.strip(),
                       "CFBundleIdentifier": header["Identifier"]},
        "procName": header["Process"].partition(" [")[0], "procPath": header["Path"],
        "cpuType": header["Code Type"].partition(" (")[0], "osVersion": {"train": header["OS Version"]},
        "modelCode": header["Hardware Model"], "captureTime": header["Date/Time"], **_crash_text_stack(text)}


def _paragraph_after(title: re.Match[str] | None) -> str:
    """The text between a title and the next empty line."""
    return re.split(r"\n[ \t]*\n", title.string[title.end():], maxsplit=1)[0] if title else ""


def _crash_text_stack(text: str) -> JsonObject:
    """The frames and images in the form of an .ips body. A frame's address tells which image it is in."""
    images_by_start = {int(start, 16): (int(end, 16), {"path": path.strip(), "uuid": uuid})
                       for start, end, uuid, path in _CRASH_IMAGE.findall(text)}
    images_by_start.pop(0, None)  # the image "???" contains every address
    section = _paragraph_after(_CRASH_THREAD.search(text))
    lines = _CRASH_FRAME.findall(section)
    if section[:1] == "(":  # the backtrace of an exception without symbols is one line of addresses
        lines = [("", digits, "") for digits in re.findall(r"0x([0-9a-f]{1,16})\b", section)]
    starts, frames, images = sorted(images_by_start), list[JsonObject](), list[JsonObject]()
    for binary, digits, place in lines[:2000]:  # Apple's tools write up to 512
        address, match = int(digits, 16), _CRASH_SYMBOL.fullmatch(_BRACKETED.sub(r"\1", place.strip()))
        start = starts[bisect_right(starts, address) - 1] if starts else 0
        end, image = images_by_start.get(start, (0, {}))
        is_known = start <= address <= end
        images.append({**(image if is_known else {"base": address}), "name": binary.strip()})
        symbol, file, line = match.groups() if match else (None, None, None)
        frames.append({"imageIndex": len(frames), "imageOffset": address - start if is_known else None,
                       "symbol": symbol, "sourceFile": file, "sourceLine": int(line) if line else None,
                       "inline": "[inlined]" in place})
    return {"usedImages": images, "lastExceptionBacktrace": frames}


# == Diagnostics ===============================================================
# Any of Apple's reports in, the crashes and events of Payloads out. The content tells which format it is.

BUG_TYPES = {"109": "a crash", "309": "a crash", "202": "CPU use", "206": "CPU use", "222": "a hang", "223": "a hang",
             "228": "a hang", "328": "a hang", "298": "a jetsam report on all apps"}
_LIKELY_APPLE = re.compile(
    rb'"(?:bug_type|usedImages|timeStampBegin|diagnosticMetaData)"|Diagnostics?"|^Exception Type:', re.M)
# A person's name or the folder of an installation, in a path. JSON may escape its slashes. The name is not just
# (?:...|...)+, because `re` would take 190 bytes for each character.
_PRIVATE = re.compile(r"/(?:((?:Users|home)\\?/)(?=[^\s\\/\"']|\\u[0-9A-Fa-f]{4})"
                      r"[^\s\\/\"']*(?:\\u[0-9A-Fa-f]{4}[^\s\\/\"']*)*"
                      r"|[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12})")
_OBJECT_START = re.compile(r"(?:^|(?<=\}))\{", re.M)


def parse_diagnostics(body: bytes, now: int, device: str = "") -> list[Crash | Event]:
    """The crashes and events in an Apple report, in its order: a MetricKit payload of either shape, an .ips file or a
    .crash text. [] if MetricKit has nothing to report. A diagnostic without a time gets `now`, in milliseconds;
    `device` is the device_id_hash. Raises Refusal."""
    try:
        text = _PRIVATE.sub(lambda match: f"/{match[1]}USER" if match[1] else "/UUID", decode_text(body))
    except ValueError as error:
        raise Refusal(UNKNOWN_FORMAT, detail=str(error)) from None
    diagnostics = list(islice(_read_diagnostics(text), MAX_BATCH + 1))
    if len(diagnostics) > MAX_BATCH:
        raise Refusal(f"too many diagnostics: at most {MAX_BATCH}")
    device = device.replace("\x00", "\ufffd")  # a header may contain it, but no database takes it
    reports, size = list[Union[Crash, Event]](), 0
    for parse, sent in diagnostics:  # all their frames may share a long name in `binaryInfo`
        sent = {**sent, "occurred_at": sent["occurred_at"] or iso_time(now), "device_id_hash": device}
        reports.append(parse(sent, MAX_REPORT_SIZE if size < MAX_PAYLOAD_SIZE else MAX_BATCHED_SIZE))
        size += sum(len(value.encode()) for value in reports[-1] if type(value) is str)
    return reports


def parse_crash_body(body: bytes) -> Crash:
    """The crash in a body of POST /crashes. Raises Refusal; for an Apple report, it says where that belongs."""
    try:
        return parse_crash(decode_json(body))
    except Refusal as refusal:
        if str(refusal) in ("invalid JSON", "missing exception_type") and _LIKELY_APPLE.search(body):
            raise Refusal(str(refusal), detail="POST Apple's reports unchanged to /api/v1/diagnostics") from None
        raise


def _read_diagnostics(text: str) -> Iterable[Diagnostic]:
    if not text.strip():
        raise Refusal(UNKNOWN_FORMAT, detail="the body is empty")
    try:
        objects, problem = [_decode_nested(text)], ""
    except ValueError as error:
        objects, problem = _objects_on_lines(text), json_problem(error)
    if not all(type(value) is dict for value in objects):
        raise Refusal(UNKNOWN_FORMAT, detail=f"the body is {_json_type(objects[0])}, not an object")
    bug_types = [str(value.get("bug_type")) for value in objects]
    bug_type = next(filter(re.compile("[0-9]{1,9}").fullmatch, bug_types), "")
    if bug_type and BUG_TYPES.get(bug_type) != "a crash":
        raise Refusal(f"unsupported bug_type {bug_type}",
                      detail=f"{BUG_TYPES.get(bug_type, 'it')} is not a crash of the app")
    # Without a header, the fields must be ones that no other format has.
    ips_fields = {"threads", "exception"} if bug_type else {"usedImages", "termination"}
    ips_body = next((value for value in objects if value.keys() & ips_fields), None)
    if ips_body is None and problem and re.search("^Exception Type:", text, re.M):
        ips_body = _crash_text_as_ips(text)
    if ips_body is not None:
        return [(parse_crash, _ips_crash(objects[0] if objects else {}, ips_body))]
    if problem or bug_type:
        if "Exception Type:" in text:  # but not at the start of a line
            problem = "a .crash file without its line ends; curl keeps them with --data-binary"
        elif text.lstrip()[0] not in "{[":
            problem = "the body is neither a MetricKit payload nor an .ips or .crash file"
        raise Refusal(UNKNOWN_FORMAT, detail="an .ips file whose body cannot be read" if bug_type else problem)
    return _metrickit_diagnostics(objects[0])


def _objects_on_lines(text: str) -> list[JsonObject]:
    """The first JSON objects that begin a line, or follow an object because `curl -d` joined the lines: the header and
    the body of an .ips file, whatever is around them. Only 4 tries, because each may read all of the text."""
    objects, position = [], 0
    for _ in range(4):
        if match := _OBJECT_START.search(text, position):
            position = match.end()
            with suppress(ValueError):
                value, length = _DECODER.raw_decode(not_deep(text[match.start():]))
                objects.append(value)
                position = match.start() + length
    return objects


# == Signature =================================================================
# HMAC-SHA256 over a timestamp and the raw body. The key travels with the request, so a signature hides nothing. It only
# proves that the body was signed just now and was not changed since.

SIGNATURE_WINDOW = 5 * MINUTE  # before and after the server's time


def sign(key: bytes, timestamp: bytes, body: bytes) -> str:
    """The X-Backfeedr-Signature of a raw body with an X-Backfeedr-Timestamp."""
    payload = timestamp + b"." + hashlib.sha256(body).hexdigest().encode()
    return "sha256=" + hmac.new(key, payload, hashlib.sha256).hexdigest()


def verify(key: bytes, timestamp: bytes, signature: bytes, body: bytes, now: int) -> None:
    """Raises Refusal unless the signature is right and, at `now` in milliseconds, fresh."""
    try:
        signed_at = parse_time(timestamp.decode("latin-1"))
    except ValueError:
        raise Refusal("invalid timestamp") from None
    # As bytes, because compare_digest accepts only ASCII as text.
    if not hmac.compare_digest(sign(key, timestamp, body).encode(), signature):
        raise Refusal("invalid signature")
    if abs(now - signed_at) > SIGNATURE_WINDOW:
        raise Refusal("stale timestamp")


# == RateLimiter ===============================================================
# The times of each key's latest requests. A counter per minute would be smaller, but would allow twice the limit around
# the turn of a minute. At most `limit` times are kept for a key, and only existing keys get here.

CPU_SECONDS_PER_REQUEST = 0.1  # of decoding: each counts as one more request


class RateLimiter:
    """Allows each key `limit` requests in any span of `window` seconds; a limit of 0 allows all. Thread-safe. `clock`
    gives seconds and must never run backwards."""

    waits = False  # a limiter whose `allow` waits for another host sets True, so that requests are checked in parallel

    def __init__(self, limit: int, window: float = 60.0, clock: Callable[[], float] = time.monotonic):
        self.limit, self.window, self._clock = limit, window, clock
        self._times: dict[bytes, deque[float]] = defaultdict(deque)
        self._lock = threading.Lock()

    def allow(self, key: bytes) -> bool:
        """Counts a request if the key may send it now; returns whether it may."""
        if not self.limit:
            return True
        with self._lock:
            now, times = self._clock(), self._times[key]
            while times and now - times[0] >= self.window:
                times.popleft()
            if len(times) >= self.limit:
                return False
            times.append(now)
            return True

    def charge(self, key: bytes, seconds: float) -> None:
        """Counts an allowed request again for each CPU_SECONDS_PER_REQUEST in `seconds`, the CPU time of decoding it.
        Otherwise, a few requests that are made to be slow could keep out the reports of other apps."""
        if again := int(seconds / CPU_SECONDS_PER_REQUEST):
            with self._lock:
                times = self._times[key]
                times.extend([self._clock()] * min(again, self.limit - len(times)))

    def retry_after(self, key: bytes) -> int:
        """The seconds until the key may send again: a whole number, at least 1."""
        with self._lock:
            times = self._times[key]
            return max(1, math.ceil(times[0] + self.window - self._clock())) if times else 1


# == Symbols ===================================================================
# The symbols of a build name the function, file and line of each instruction, and inlined functions too. They are
# uploaded and stored in pages, so that a look-up reads only one.

SYMBOL_TABLES = """
create table symbols (                     -- builds whose symbols are stored, at least in part
    uuid text primary key, binary_name text not null, arch text not null,
    parts integer not null, received integer not null,  -- requests of its upload, and those that came; 0 in a deletion
    size integer not null, rows integer not null,
    uploaded_at integer not null           -- when the latest part came
) without rowid;
create table symbol_parts (                -- the parts that were received
    uuid text not null, part integer not null, size integer not null, rows integer not null,
    primary key (uuid, part)) without rowid;
create table symbol_pages (
    uuid text not null, first integer not null,  -- the lowest offset of the page
    part integer not null, page blob not null,   -- see encode_page
    primary key (uuid, first)) without rowid;
create table group_aliases (               -- groups whose crashes have all moved to the group `target`
    app_id integer not null, group_hash text not null, target text not null,
    primary key (app_id, group_hash)) without rowid;
create table regroupings (                 -- groups whose crashes may have to move
    app_id integer not null, group_hash text not null,
    seq integer not null,                  -- of the last crash that was looked at
    target text not null,                  -- where the last crash moved
    primary key (app_id, group_hash)) without rowid;
"""
GROUPED_LOOKUPS = 20  # instructions to look up for the group of a crash, which three names decide
REQUEST_LOOKUPS = 100  # instructions to look up for the crashes of a request, before they are stored
SHOWN_LOOKUPS = 1000  # instructions to look up for an answer; each takes 0.3 ms
CACHED_PAGES = 64  # in a transaction
INLINE_DEPTH = 100  # functions at one instruction: its own, and those that it is inlined in
MAX_PARTS = 4000  # requests of an upload
MAX_PAGE_ROWS = 2000  # a look-up decodes all of them
MAX_OFFSET = 1 << 40  # of an instruction, in bytes
MAX_INT32 = (1 << 31) - 1  # numbers of a page are stored in 32 bits


class SymbolPart(NamedTuple):
    """One of the requests that upload the symbols of a build."""

    binary: str
    arch: str
    part: int   # from 0 on
    parts: int
    rows: int
    size: int   # bytes of its pages
    pages: Sequence[tuple[int, bytes]]  # lowest offset, and the page as it is stored


def parse_symbols(body: bytes) -> SymbolPart:
    """A part of a build's symbols, checked because look-ups trust what is stored. Raises Refusal with a detail."""
    upload = decode_json(body)
    for name in ("binary", "arch"):
        _require(type(upload.get(name)) is str and 1 <= len(upload[name]) <= MAX_TEXT,
                 f"{name} is not text of 1 to {MAX_TEXT} characters")
    _require(_are_integers([upload.get("parts")], 1, MAX_PARTS), f"parts is not from 1 to {MAX_PARTS}")
    _require(_are_integers([upload.get("part")], 0, upload["parts"] - 1), "part is not from 0 to parts - 1")
    _require(upload.get("pages") and type(upload["pages"]) is list, "pages is not a list of at least one page")
    pages, last_offset, row_count = [], -1, 0
    for number, page in enumerate(upload["pages"]):
        _check_page(page, f"pages[{number}]: ", last_offset + 1)
        first, rows = page["first"], page["rows"]
        last_offset = first + sum(rows[::2])
        row_count += len(rows) // 2
        pages.append((first, encode_page(page["strings"], page["frames"], rows)))
    size = sum(len(page) for _, page in pages)
    return SymbolPart(upload["binary"], upload["arch"], upload["part"], upload["parts"], row_count, size, pages)


def _require(condition: Any, problem: str) -> None:
    if not condition:
        raise Refusal("invalid symbols", detail=problem)


def _check_page(page: Any, prefix: str, lowest_offset: int) -> None:
    """Raises Refusal unless `page` is what encode_page takes, and begins at `lowest_offset` or later."""
    _require(type(page) is dict, prefix + "it is not an object")
    for name in ("strings", "frames", "rows"):
        _require(type(page.get(name)) is list, f"{prefix}{name} is not a list")
    strings, frames, rows = page["strings"], page["frames"], page["rows"]
    _require(all(type(string) is str and len(string) <= MAX_SYMBOL for string in strings),
             f"{prefix}strings has other than text of {MAX_SYMBOL} characters")
    _require(len(frames) % 4 == 0, prefix + "frames is not quadruples of name, file, line and parent")
    _require(len(rows) % 2 == 0, prefix + "rows is not pairs of delta and frame")
    _require(1 <= len(rows) // 2 <= MAX_PAGE_ROWS, f"{prefix}it has not 1 to {MAX_PAGE_ROWS} rows")
    for what, values, low, high in (
            ("first", [page.get("first")], lowest_offset, MAX_OFFSET),
            ("a name in frames", frames[0::4], 0, len(strings) - 1),
            ("a file in frames", frames[1::4], -1, len(strings) - 1),
            ("a line in frames", frames[2::4], 0, MAX_INT32),
            ("a parent in frames", frames[3::4], -1, len(frames) // 4 - 1),
            ("the first delta in rows", rows[:1], 0, 0),
            ("a later delta in rows", rows[2::2], 1, MAX_INT32),
            ("a frame in rows", rows[1::2], -1, len(frames) // 4 - 1)):
        _require(_are_integers(values, low, high), f"{prefix}{what} is not from {low} to {high}")
    _require(all(map(lt, frames[3::4], range(len(frames)))), prefix + "a parent in frames comes after its child")
    _require(page["first"] + sum(rows[::2]) <= MAX_OFFSET, f"{prefix}rows has an offset above {MAX_OFFSET}")


def _are_integers(values: Sequence[Any], low: int, high: int) -> bool:
    """Whether all values are integers from `low` to `high`. Compares types exactly, because True is an int."""
    return not values or {*map(type, values)} == {int} and low <= min(values) and max(values) <= high


def encode_page(strings: Sequence[str], frames: Sequence[int], rows: Sequence[int]) -> bytes:
    """A page as it is stored. `rows` are pairs: the distance from the previous row, in bytes, and the index of a frame,
    or -1. `frames` are quadruples: the index of the name in `strings`; that of the file, or -1; the line, or 0; and the
    index of the frame it is inlined in, or -1. Numbers are binary: a look-up in JSON takes three times as long."""
    numbers = struct.pack(f"<2I{len(frames)}i{len(rows)}i", len(frames), len(rows), *frames, *rows)
    return zlib.compress(numbers + to_json(strings).encode())


Function = tuple[str, str, int]  # name, file or "", and line or 0


class Symbols:
    """The stored symbols, as one transaction sees them."""

    def __init__(self, db: Any):
        self._db = db
        self._held: dict[str, bool] = {}
        self._functions: dict[tuple[str, int], list[Function]] = {}  # by build and offset
        self._page: Any = None  # a cached _read_page, made late because few commits need it
        self.max_lookups = MAX_NUMBER  # in the transaction

    @property
    def lookups(self) -> int:
        """How many instructions were looked up."""
        return len(self._functions)

    def is_held(self, uuid: str) -> bool:
        """Whether all symbols of a build are stored."""
        if uuid not in self._held:
            self._held[uuid] = self._db.execute(
                "select 1 from symbols where uuid = ? and received = parts", (uuid,)).fetchone() is not None
        return self._held[uuid]

    def can_name(self, images: str | None) -> bool:
        """Whether the symbols of any of these builds are stored."""
        return any(map(self.is_held, (images or "").split()))

    def lookup(self, uuid: str, offset: int) -> Iterator[Function]:
        """The functions at an instruction of a build whose symbols are stored, innermost first."""
        first, = self._db.execute("select max(first) from symbol_pages where uuid = ? and first <= ?",
                                  (uuid, min(offset, MAX_OFFSET))).fetchone()
        if first is None:
            return
        # Bound to the connection, not to `self`: a reference cycle would keep the pages until the collector runs.
        self._page = self._page or lru_cache(maxsize=CACHED_PAGES)(partial(_read_page, self._db))
        offsets, row_frames, frames, strings = self._page(uuid, first)
        frame, depth = row_frames[bisect_right(offsets, offset) - 1], 0
        while frame >= 0 and depth < INLINE_DEPTH:
            name, file, line, frame = frames[4 * frame:4 * frame + 4]
            yield strings[name], strings[file] if file >= 0 else "", line
            depth += 1

    def symbolicated(self, frames: Iterable[JsonObject], new_lookups: int = GROUPED_LOOKUPS) -> Iterator[JsonObject]:
        """The frames, symbolicated: each becomes a frame for every function at its instruction, innermost first. A
        frame stays as it is if its symbols are unknown, or after `new_lookups` more look-ups."""
        max_lookups, is_return_address = min(self.lookups + new_lookups, self.max_lookups), False
        for frame in frames:
            functions: list[Function] = []
            read = read_frame(frame)
            if read.uuid and read.offset is not None and not read.file and self.is_held(read.uuid):
                instruction = read.uuid, max(0, read.offset - int(is_return_address))  # the call, not what follows it
                if instruction not in self._functions and self.lookups < max_lookups:
                    self._functions[instruction] = list(self.lookup(*instruction))
                functions = self._functions.get(instruction, [])
            if not functions:
                yield frame
            for number, (symbol, file, line) in enumerate(functions, 1):
                yield {"in_app": True, **frame, "symbol": symbol, "file": file or None, "line": line or None,
                       "symbolicated": True, **({"inlined": True} if number < len(functions) else {})}
            # The frames of all callers have return addresses.
            is_return_address = is_return_address or frame.get("inlined") is not True

    def group_of(self, frames: Iterable[JsonObject], exception_type: str, group: str, is_cut: bool) -> str:
        """The group that follows from symbolicated frames. If others were cut and none of these is the app's own, the
        crash stays in its group: the frames that decided it may be gone."""
        named, searched = tee(map(read_frame, self.symbolicated(frames)))
        if is_cut and not any(map(_GROUP_RULES[0], searched)):
            return group
        return group_hash(exception_type, named)


def _read_page(db: Any, uuid: str, first: int) -> tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[str]]:
    """A page that encode_page made: the offset and the frame of each of its rows, its frames, and its strings."""
    page, = db.execute("select page from symbol_pages where uuid = ? and first = ?", (uuid, first)).fetchone()
    data = zlib.decompress(page)
    frame_numbers, row_numbers = struct.unpack_from("<2I", data)
    numbers = struct.unpack_from(f"<{frame_numbers + row_numbers}i", data, 8)
    frames, rows = numbers[:frame_numbers], numbers[frame_numbers:]
    offsets = list(accumulate(rows[2::2], initial=first))
    return offsets, rows[1::2], frames, json.loads(data[8 + 4 * len(numbers):])


# == Statements ================================================================
# How one statement runs for many rows, and which rows need not be read again.

CACHED_STATEMENTS = 512  # prepared statements to keep: an insert is a different one for each number of rows
ROWS_PER_STATEMENT = 128
ROWS_STEP = 4  # larger numbers of rows are multiples of it: statements for all numbers would take 9 MB more
Row = tuple[Any, ...]  # a row of the database, or a part of it


def write_rows(db: Any, statement: str, rows: Sequence[Row]) -> None:
    """Runs a statement for all rows; `values *` in it stands for their placeholders. executemany would release Python's
    lock for each row, and under load wait to get it again."""
    for part in _parts(rows):
        db.execute(_with_placeholders(statement, len(part), len(part[0])), list(chain.from_iterable(part)))


def rows_of(db: Any, query: str, keys: Sequence[Row]) -> list[Row]:
    """The rows of a query for all keys; `values *` in it stands for their placeholders. SQLite names the columns of the
    keys column1, column2, ...; a `cross join` after them makes it read them first."""
    return [row for part in _parts(keys) for row in db.execute(
        _with_placeholders(query, len(part), len(part[0])), list(chain.from_iterable(part)))]


def _parts(rows: Sequence[Row]) -> Sequence[Sequence[Row]]:
    """The rows, divided as they go into statements."""
    if len(rows) <= ROWS_STEP:  # mostly
        return [rows] if rows else []
    parts, start = [], 0
    while size := min(len(rows) - start, ROWS_PER_STATEMENT):
        parts.append(rows[start:start + (size if size < ROWS_STEP else size - size % ROWS_STEP)])
        start += len(parts[-1])
    return parts


@lru_cache(maxsize=CACHED_STATEMENTS)
def _with_placeholders(statement: str, rows: int, columns: int) -> str:
    row = "(" + ", ".join("?" * columns) + ")"
    return statement.replace("values *", "values " + ", ".join([row] * rows))


class KnownRows:
    """What commits have read or written, so that the next one need not read it again. This saves half of its queries.
    It is cleared when anything but a commit of this process may have changed these rows, and when a commit fails."""

    MAX_ITEMS = 5_000  # about 2 MB, or 20 MB if all texts are as long as they may be

    def __init__(self) -> None:
        self.clear()

    def clear(self, version: Any = None) -> None:
        """Forgets everything. `version` is that of the database."""
        self._version = version
        self.app_of_key: dict[bytes, int] = {}  # app_id by the hash of an active key
        self.names: set[Row] = set()  # app_id, field and name: those that do not count as `(other)`
        # The last seq given, the first seq of the next range in `given_seqs` (or None), and the limit between the two.
        self.given: Row = ()
        self.group_devices: set[Row] = set()  # app_id, group_hash and device_id_hash of crashes
        self.open_groups: set[Row] = set()  # app_id and group_hash: a known device changes nothing in their triage
        self.rows: dict[str, dict[Row, Any]] = defaultdict(dict)  # by table and key

    def begin(self, version: Any) -> None:
        """Begins a transaction. `version` differs from the last one if others have written since, and is None if this
        transaction may change any row."""
        if version is None or version != self._version:
            self.clear(version)

    def end(self) -> None:
        """Ends a transaction. Forgets everything if there is too much."""
        parts = (self.app_of_key, self.names, self.group_devices, self.open_groups, *self.rows.values())
        if sum(map(len, parts)) > self.MAX_ITEMS:
            self.clear()


def dict_rows(db: Any, query: str, parameters: Any = ()) -> list[JsonObject]:
    """The rows of a query as dicts, by the names of the columns."""
    rows = db.execute(query, parameters)
    names = [column[0] for column in rows.description]
    return [dict(zip(names, row)) for row in rows]


# == Verdict ===================================================================
# Whether a release is worse than the one before: by the devices that crashed, not by sessions.

Z_95 = 1.96  # standard deviations to each side, for a confidence of 95 %
Z_99 = 2.58  # 99 %, for alerts: with a check each hour, 95 % would in time call one in six equal releases worse
MAX_HALF_WIDTH = 0.05  # of an interval that is narrow enough to say that there is no difference
MIN_DEVICES, ENOUGH_DEVICES = 20, 50  # that each release needs: for a verdict; for `no difference seen` and an alert


class ReleasePair(NamedTuple):
    """A release and the previous one. Times are when their first reports were received, in milliseconds."""

    app_id: int
    app_version: str
    first_seen: int
    previous: str
    previous_seen: int


class Health(NamedTuple):
    """How many devices had a release, and how many of those crashed in it."""

    devices: int
    crashed: int

    @property
    def share(self) -> float:
        """The share of devices without a crash."""
        return 1 - self.crashed / self.devices

    def wilson_interval(self, z: float) -> tuple[float, float]:
        """Wilson's confidence interval of the share, `z` standard deviations to each side."""
        z2 = z ** 2 / self.devices
        half = math.sqrt(z2 * (self.share * (1 - self.share) + z2 / 4))
        return (self.share + z2 / 2 - half) / (1 + z2), (self.share + z2 / 2 + half) / (1 + z2)


def newcombe_interval(newer: Health, previous: Health, z: float = Z_95) -> tuple[float, float]:
    """The confidence interval of the difference of two shares: Newcombe, Interval estimation for the difference between
    independent proportions, Statistics in Medicine 17 (1998) 873-890, method 10."""
    (low, high), (low_previous, high_previous) = newer.wilson_interval(z), previous.wilson_interval(z)
    difference = newer.share - previous.share
    return (difference - math.hypot(newer.share - low, high_previous - previous.share),
            difference + math.hypot(high - newer.share, previous.share - low_previous))


def verdict(newer: Health, previous: Health) -> JsonObject | None:
    """The verdict on a release, compared with the previous one: a word, a text, and the interval of the difference in
    percentage points. None if no device of either is known. "No difference" needs 50 devices in the smaller one, and as
    many as narrow the interval of two equal releases to 5 points on each side."""
    least, most = sorted((newer.devices, previous.devices))
    if not most:
        return None
    low, high = newcombe_interval(newer, previous) if least else (-1.0, 1.0)
    # Agresti and Coull add two devices that crashed and two that did not: few devices without a crash prove little.
    share = (newer.crashed + previous.crashed + 2) / (least + most + 4)
    needed = max(ENOUGH_DEVICES, math.ceil((Z_95 / MAX_HALF_WIDTH) ** 2 * 2 * share * (1 - share)))
    needed = needed if low <= 0 <= high else MIN_DEVICES  # to see a difference
    if least < needed:
        word, text = "too early", f"about {math.ceil((needed - least) / 10) * 10} more devices needed"
    else:
        word = "worse" if high < 0 else "better" if low > 0 else "no difference seen"
        text = "{} of devices crash-free, {} before".format(*_percentages(newer.share, previous.share))
    return {"word": word, "text": f"{word}: {text}",
            "interval": [round(100 * low, 1), round(100 * high, 1)] if least else None}


def crash_free_rate(crashes: int, sessions: int) -> float:
    """The percentage of sessions without a crash, with two decimals."""
    if not sessions:
        return 0.0 if crashes else 100.0
    return round(max(0.0, 100 * (1 - crashes / sessions)), 2)


def _percentages(*shares: float) -> list[str]:
    """Shares in percent, with as many decimals, up to two, as tell them from each other and from 100 %."""
    for decimals in range(3):
        if len({round(100 * share, decimals) for share in (*shares, 1)}) == len({*shares, 1}):
            break
    return [f"{100 * share:.{decimals}f} %" for share in shares]


# == Figures ===================================================================
# What the server counts. Each figure is a class: its tables, and how reports count in it. A report counts by 1 when it
# is stored and by -1 when its device is forgotten, in the same transaction, so each sum equals a count over the rows.
# When reports expire, lasting sums, medians, builds and the first_seen of groups stay as they are; everything else
# describes the reports that are kept. The command `check` counts nearly everything again.

ALL_DAYS = -1_000_000  # the `day` of a label's sum over all days
WEEK_DAYS = 7          # days of the overview, ending today
DURATION_DAYS = 400    # days for which durations are kept: a year, and some more
DEVICE_DAYS = 400      # a report received more than so many days after it occurred makes no device active
NAME_DAYS = KEY_DAYS = 90  # days for which events by name, and requests by key, are kept
HEALTH_DAYS = 90       # the age up to which a release is compared with the previous one
STEP_ROWS = 1000       # rows, or pages, that one step deletes, or that an export reads at a time
SEARCHED_CRASHES = 10_000  # that a deletion reads to find the latest one of each group: more would hold up writers
MAX_NAMES = 1000  # releases of an app, and its exception types and device models of which crashes are kept
MAX_BUILDS_OF_APP = 2000
MAX_ANSWER = 60_000    # bytes of JSON for the rows of a public answer, so that the whole answer stays below 64 kB

OTHER = "(other)"      # stands for new names beyond these limits, which are per app and UTC day
MAX_NEW_NAMES = {"group_hash": 500, "exception_type": 200, "device_model": 200, "app_version": 100, "name": 200}
OTHER_FLAGS = {"exception_type": 1, "device_model": 2, "app_version": 4, "name": 8}  # bits of the column `other`

# Selects one app, or all live apps if none is given.
APP_FILTER = "app_id in (select id from apps where id = :app or :app is null and is_test = 0)"
SESSION_TYPES = {"session_start", "session_end"}  # of events
TABLES: dict[type, str] = {Crash: "crashes", Event: "events"}
# A report as the figures see it. `at` and `day` are the time and the UTC day at which it counts; `sent_type` is the
# exception type that was sent, even if it counts as `(other)`.
_FIELDS_OF_BOTH = "seq app_id received_at at day app_version device_id_hash session_id "  # first, for _TIMES and _RUN
COUNTED: dict[Any, Any] = {
    Crash: namedtuple("CountedCrash", _FIELDS_OF_BOTH + "sent_type build_number group_hash images exception_type"
                                      " device_model exception_reason stack_trace"),
    Event: namedtuple("CountedEvent", _FIELDS_OF_BOTH + "type name")}


def columns_getter(kind: Any, *names: str) -> Callable[[Any], Any]:
    """Like attrgetter, for the fields of a named tuple, in half the time."""
    return itemgetter(*map(kind._fields.index, names))


_TIMES, _RUN = (columns_getter(COUNTED[Event], *names.split()) for names in (
    "at received_at", "app_id device_id_hash session_id app_version"))


class CountedReports(list[Any]):
    """Reports as the figures see them, in the order of their seqs."""

    @cached_property
    def runs(self) -> list[tuple[list[Any], list[tuple[int, int]]]]:
        """The same in runs: reports of one app, device, session and version that follow each other, as in most batches.
        Each with its distinct pairs of `at` and `received_at`, ascending."""
        runs = []
        for _, grouped in groupby(self, _RUN):
            reports = list(grouped)
            times = sorted(set(map(_TIMES, reports))) if len(reports) > 1 else [_TIMES(reports[0])]
            runs.append((reports, times))
        return runs


def counted_rows(db: Any, kind: type, source: str, keys: Sequence[Row]) -> CountedReports:
    """Stored reports as the figures see them, without stack traces. `source` is the query from `from` on; `values *` in
    it stands for the keys, as in rows_of. A query without `values *` takes its parameters from the only key."""
    columns = {"received_at": RECEIVED_AT, "at": COUNTED_AT, "day": f"{COUNTED_AT} / {DAY}",
               "sent_type": "exception_type", "stack_trace": "null"}
    columns.update({name: f"case when (other & {flag}) > 0 then '{OTHER}' else {name} end"
                    for name, flag in OTHER_FLAGS.items()})
    query = f"select {', '.join(columns.get(name, name) for name in COUNTED[kind]._fields)} {source}"
    return CountedReports(map(COUNTED[kind]._make, rows_of(db, query, keys)))


def counted_reports(kind: Any, app_id: int, seqs: Sequence[int], received: Sequence[int], ahead: Sequence[int],
                    flags: Sequence[int], reports: Reports) -> CountedReports:
    """Reports that are about to be stored, as the figures see them."""
    columns: dict[str, Any] = dict(zip(kind._fields, zip(*reports)))
    at = columns["occurred_at"]
    if any(ahead) or min(at) < EARLIEST_PLAUSIBLE or max(at) > min(received) + MAX_SKEW:  # seldom
        at = list(map(counted_at, at, received, ahead))
    columns.update(seq=seqs, app_id=repeat(app_id), received_at=received, at=at, day=map(floordiv, at, repeat(DAY)),
                   sent_type=columns.get("exception_type"))
    for name in OTHER_FLAGS.keys() & columns.keys() if any(flags) else ():
        columns[name] = [OTHER if OTHER_FLAGS[name] & bits else value for value, bits in zip(columns[name], flags)]
    make = partial(tuple.__new__, COUNTED[kind])  # faster than _make
    return CountedReports(map(make, zip(*map(columns.__getitem__, COUNTED[kind]._fields))))


class Sums:
    """A table of sums, by app_id and the columns of `key`. Its rows are kept for `window` days; 0 is forever.
    If it `lasts`, reports that expire stay counted. Once some have expired, the command `check` compares only "recent"
    days of such a table, or checks that its sums are "at least" those of the reports that are left; without `check`, it
    skips the table. A key column is text unless it is named day, hour or seconds."""

    def __init__(self, key: str, columns: str, window: int = 0, lasts: bool = True, check: str = ""):
        self.key, self.columns, self.window, self.lasts = key.split(), columns.split(), window, lasts
        self.check = check

    def schema(self, table: str) -> str:
        """The statement that makes the table."""
        numbers = {"day", "hour", "seconds", *self.columns}
        columns = [f"{name} {'integer' if name in numbers else 'text'} not null" for name in self.key + self.columns]
        return (f"create table {table} (app_id integer not null, {', '.join(columns)},\n"
                f"    primary key (app_id, {', '.join(self.key)})) without rowid;\n")


def sums_per_day(db: Any, app: int | None, days: range, table: str, *columns: str) -> JsonObject:
    """Sums from a table with a row per day: for each column, a list with one sum per day. `labels` has their dates."""
    rows = {day: sums for day, *sums in db.execute(f"""
        select day, {", ".join(f"sum({column})" for column in columns)} from {table}
        where {APP_FILTER} and day between :first and :last
        group by day""", {"app": app, "first": days[0], "last": days[-1]})}
    zeros = [0] * len(columns)
    return {"labels": list(map(iso_day, days)),
            **{column: [rows.get(day, zeros)[n] for day in days] for n, column in enumerate(columns)}}


class Figure:
    """One figure in one transaction. It holds parts of its RollUps, not the whole, because a reference cycle would keep
    the reports of each commit in memory until the next garbage collection."""

    TABLES = ""  # the statements that make its tables, other than those of sums
    SUMS: Mapping[str, Sums] = {}
    COUNTS: tuple[type, ...] = (Crash,)  # the kinds of reports that count in it

    def __init__(self, rollups: RollUps):
        self._db, self._now, self._sums, self._known = rollups.db, rollups.now, rollups.changes, rollups.known

    def count(self, kind: type, reports: CountedReports, by: int) -> None:
        """Counts reports: `by` is 1 before they are inserted, and -1 after they were deleted. A recount counts stored
        reports, so it cannot tell which devices are new to a group: Groups.recount() counts these."""

    def expire(self, kind: type, reports: CountedReports) -> None:
        """Takes out reports that were deleted because they expired. Changes to lasting sums are ignored."""
        self.count(kind, reports, -1)

    def save(self) -> None:
        """Writes all changes except those to sums, which are written afterwards."""


class MergedRows:
    """Collects what a transaction learns about rows of a table, and merges it into them with one read and one write.
    `kind` is a named tuple of the columns after the key with a method `merged`; the first `uncounted` are in no sum."""

    def __init__(self, rollups: RollUps, table: str, kind: Any, uncounted: int = 0):
        self._db, self._table, self._kind, self._known = rollups.db, table, kind, rollups.known.rows[table]
        self._uncounted = uncounted
        self.learned: dict[Row, Any] = {}  # by key

    def learn(self, key: Row, row: Any) -> None:
        """Adds what reports say about a row."""
        self.learned[key] = self.learned[key].merged(row) if key in self.learned else row

    def stored(self, keys: Iterable[Row]) -> Mapping[Row, Any]:
        """The stored rows with these keys, and those that are known."""
        unknown = [key for key in keys if key not in self._known]  # not `keys - ...`, which goes through all of them
        if unknown:
            width, make = len(PRIMARY_KEYS[self._table]), self._kind._make
            for row in rows_of(self._db, QUERIES_BY_KEY[self._table], unknown):
                self._known[row[:width]] = make(row[width:])
        return self._known

    def save(self) -> list[tuple[Row, Any, int]]:
        """Writes the rows that change. Returns those that change a sum, with their keys: the old with -1, the new 1."""
        counts, changed, stored = [], [], self.stored(self.learned)
        for key, row in self.learned.items():
            before = stored.get(key)
            after = before.merged(row) if before else row
            if after != before:
                if not before or before[self._uncounted:] != after[self._uncounted:]:
                    counts += [(key, before, -1), (key, after, 1)] if before else [(key, after, 1)]
                changed.append((*key, *after))
                self._known[key] = after
        upsert(self._db, self._table, changed, _replacements(self._kind._fields))
        return counts


def upsert(db: Any, table: str, rows: Sequence[Row], changes: str) -> None:
    """Inserts whole rows, or makes these changes to rows whose keys exist already."""
    if rows:
        write_rows(db, _upsert_statement(table, changes), rows)


@lru_cache(maxsize=CACHED_STATEMENTS)
def _upsert_statement(table: str, changes: str) -> str:
    return f"insert into {table} values * on conflict ({', '.join(PRIMARY_KEYS[table])}) do update set {changes}"


@cache
def _replacements(columns: Sequence[str]) -> str:
    """The changes that give new values to these columns."""
    return ", ".join(f"{name} = excluded.{name}" for name in columns)


def delete_rows(db: Any, table: str, keys: Iterable[Row], condition: str = "true", *parameters: Any) -> None:
    """Deletes the rows with these keys that meet a condition, one by one: `(key) in (...)` would scan all of an app."""
    rows = [(*key, *parameters) for key in keys]
    if rows:  # few commits have any
        tests = " and ".join([*(f"{column} = ?" for column in PRIMARY_KEYS[table]), condition])
        db.executemany(f"delete from {table} where {tests}", rows)


def labels_and_counts(rows: Iterable[tuple[str, int]]) -> JsonObject:
    """Labels and their counts, in the form of an answer."""
    pairs = list(rows_that_fit(rows))
    return {"labels": [label for label, _ in pairs], "data": [count for _, count in pairs]}


def rows_that_fit(rows: Iterable[Any], limit: int = MAX_ANSWER,
                  size_of: Callable[[Any], int] = lambda row: len(to_ascii_json(row))) -> Iterator[Any]:
    """The first row, and as many of the next as fit in the limit with it."""
    size = 0
    for number, row in enumerate(rows):
        size += size_of(row)
        if size > limit and number:
            return
        yield row


def text_size(values: Iterable[Any]) -> int:
    """The number of characters in those values that are text."""
    return sum(len(value) for value in values if type(value) is str)


@lru_cache(maxsize=4096)
def device_key(device_id_hash: str | None) -> int:
    """The number by which figures know a device: 63 bits of the SHA-256 of its id. 0 is no device."""
    return int.from_bytes(sha256(device_id_hash)[:8], "big") >> 1 if device_id_hash else 0


# == Crash figures =============================================================
# How many crashes there were, of which type and on which device model, and in which groups.

class Crashes(Figure):
    """Crashes per UTC day; exception types and device models of the crashes that are kept, per day and in total."""

    SUMS = {"crash_days": Sums("day", "crashes", check="recent"),
            "labels": Sums("field day label", "crashes", lasts=False)}

    def count(self, kind: type, reports: CountedReports, by: int) -> None:
        crash_days, labels = self._sums["crash_days"]["crashes"], self._sums["labels"]["crashes"]
        for crash in reports:
            app_id, day = crash.app_id, crash.day
            crash_days[app_id, day] += by
            for column, label in (("exception_type", crash.exception_type), ("device_model", crash.device_model)):
                if label:
                    labels[app_id, column, ALL_DAYS, label] += by
                    labels[app_id, column, day, label] += by


class Groups(Figure):
    """The description of each group, its crashes and devices, and its crashes per UTC day of the last week. Its row is
    deleted when no crash of it is kept and it had none in that week."""

    TABLES = """
create table groups (
    app_id integer not null, group_hash text not null, exception_type text not null,
    first_seen integer not null, first_version text,      -- of its first crash, by the time at which crashes count
    last_seen integer not null, exception_reason text,    -- of its latest crash; the beginning of the reason
    place text, search text,                              -- the app's function; what a search looks in, in lower case
    crashes integer not null default 0, devices integer not null default 0,  -- of the crashes that are kept
    came_at integer not null default 0,                   -- when its first crash was received
    primary key (app_id, group_hash)) without rowid;
"""
    SUMS = {"group_days": Sums("day group_hash", "crashes", WEEK_DAYS, check="recent"),
            "group_images": Sums("group_hash uuid", "crashes", lasts=False)}  # builds whose symbols can name crashes
    IS_EMPTY = """crashes <= 0 and not exists (
        select 1 from group_days where app_id = groups.app_id and day >= ? and group_hash = groups.group_hash)"""

    def __init__(self, rollups: RollUps):
        super().__init__(rollups)
        self._symbols = rollups.symbols
        self._inserted: dict[Row, list[Any]] = defaultdict(list)  # crashes by app_id and group_hash
        self._deleted: dict[Row, list[Any]] = defaultdict(list)
        self.new_devices: dict[Row, int] = defaultdict(int)  # by app_id and group_hash
        self._lost_devices: dict[Row, int] = defaultdict(int)
        self.may_search = SEARCHED_CRASHES  # crashes that `save` may read to find the latest ones of groups

    def count(self, kind: type, reports: CountedReports, by: int) -> None:
        crashes_of, devices_of = (self._inserted, self.new_devices) if by > 0 else (self._deleted, self._lost_devices)
        group_days, group_images = self._sums["group_days"]["crashes"], self._sums["group_images"]["crashes"]
        for crash in reports:
            app_id, group = crash.app_id, crash.group_hash
            crashes_of[app_id, group].append(crash)
            group_days[app_id, crash.day, group] += by
            for uuid in (crash.images or "").split():
                group_images[app_id, group, uuid] += by
        # A group gains a device with its first crash there, which is not inserted yet, and loses it with the last one.
        devices = {(crash.app_id, crash.group_hash, crash.device_id_hash) for crash in reports if crash.device_id_hash}
        if by > 0:
            devices = {device for device in devices if device not in self._known.group_devices}
            self._known.group_devices |= devices
        for key in rows_of(self._db, """
                select column1, column2 from (values *) as keys where not exists (
                    select 1 from crashes where app_id = column1 and group_hash = column2 and device_id_hash = column3)
                """, list(devices)):
            devices_of[key] += 1

    def save(self) -> None:
        of_latest = ", ".join(f"""{column} = case when groups.crashes <= 0 or excluded.last_seen >= groups.last_seen
            then excluded.{column} else groups.{column} end"""
            for column in ("last_seen", "exception_reason", "place", "search"))
        upsert(self._db, "groups", [self._row(*item) for item in self._inserted.items()], f"""
            first_version = case when excluded.first_seen < groups.first_seen
                then excluded.first_version else groups.first_version end,
            first_seen = min(groups.first_seen, excluded.first_seen), {of_latest},
            crashes = groups.crashes + excluded.crashes, devices = groups.devices + excluded.devices,
            came_at = min(groups.came_at, excluded.came_at)""")
        for key, crashes in self._deleted.items():
            self._db.execute("""
                update groups set crashes = crashes - ?, devices = devices - ? where app_id = ? and group_hash = ?
                """, (len(crashes), self._lost_devices[key], *key))
            self._describe_again(key, crashes)

    def _row(self, key: Row, crashes: Sequence[Any]) -> Row:
        in_order = sorted(crashes, key=attrgetter("at", "seq")) if len(crashes) > 1 else crashes
        first, latest, came_at = in_order[0], in_order[-1], min([crash.received_at for crash in crashes])
        return (*key, OTHER if key[1] == OTHER else latest.sent_type, first.at, first.app_version, latest.at,
                *self._shown(key[1], latest), len(crashes), self.new_devices[key], came_at)

    def _describe_again(self, key: Row, deleted: Sequence[Any]) -> None:
        """Describes a group again if its latest crash was deleted, now or earlier without a search for the next one."""
        latest = max(crash.at for crash in deleted)
        if key in self._inserted and latest <= max(crash.at for crash in self._inserted[key]):
            return  # a crash of the group was stored again with other images, and `save` has described the group
        for crashes, in self._db.execute("""
                select crashes from groups where app_id = ? and group_hash = ? and (last_seen <= ? or search = ?)
                """, (*key, latest, key[1])).fetchall():
            is_searched = crashes <= self.may_search
            self.may_search -= crashes * is_searched
            self.show_latest(*key, is_searched=is_searched)

    def drop_empty(self) -> None:
        """Deletes the groups whose last crash was just deleted, unless they had one in the last week."""
        delete_rows(self._db, "groups", self._deleted, self.IS_EMPTY, self._now // DAY - WEEK_DAYS)

    def _shown(self, group_hash: str, crash: Any) -> tuple[str | None, str, str]:
        """The reason, place and search text of a group whose latest crash is this one."""
        reason, trace = (crash.exception_reason or "")[:MAX_TEXT] or None, crash.stack_trace or ""
        if len(trace) < 20_000 and not self._symbols.can_name(crash.images):
            names = _cached_own_frame_names(trace)
        else:
            names = own_frame_names(self._symbols.symbolicated(json.loads(trace or "[]")))
        words = "\n".join([crash.sent_type, reason or "", group_hash, *names])
        return reason, "".join(names[:1])[:200], words.casefold()[:4 * MAX_TEXT]

    def show_latest(self, app_id: int, group_hash: str, *, is_searched: bool = True) -> None:
        """Describes a group by its latest crash that is kept; first_seen stays. If none is kept, or if the latest is
        not searched for, describes it by its hash alone, and leaves last_seen as it is, until a later crash comes."""
        shown: Row = None, None, None, group_hash
        for latest in counted_rows(self._db, Crash, f"""
                from crashes where seq = (select seq from crashes where app_id = ? and group_hash = ?
                    order by {COUNTED_AT} desc, seq desc limit 1)""", [(app_id, group_hash)] if is_searched else ()):
            trace, = self._db.execute("select stack_trace from crashes where seq = ?", (latest.seq,)).fetchone()
            shown = latest.at, *self._shown(group_hash, latest._replace(stack_trace=trace))
        self._db.execute("""
            update groups set last_seen = coalesce(?, last_seen), exception_reason = ?, place = ?, search = ?
            where app_id = ? and group_hash = ?
            """, (*shown, app_id, group_hash))

    @staticmethod
    def recount(db: Any) -> None:
        """Counts the crashes that are kept, and their devices, for each group."""
        db.execute(f"""
            update groups set (crashes, devices, came_at) = (
                select count(*), count(distinct device_id_hash), coalesce(min({RECEIVED_AT}), groups.came_at)
                from crashes where app_id = groups.app_id and group_hash = groups.group_hash)""")

    @staticmethod
    def most_frequent(db: Any, app: int | None, days: range, limit: int = 5) -> list[JsonObject]:
        """The most frequent groups of these days of the last week, described by the app that has the latest crash."""
        return dict_rows(db, f"""
            select top.group_hash, exception_type, substr(coalesce(exception_reason, ''), 1, 200) as exception_reason,
                count
            from (
                select group_hash, sum(crashes) as count from group_days
                where {APP_FILTER} and day between :first and :last
                group by group_hash
                order by count desc, group_hash
                limit :limit) as top
            cross join groups on groups.group_hash = top.group_hash and groups.app_id = (
                select app_id from groups
                where {APP_FILTER} and group_hash = top.group_hash
                order by crashes > 0 desc, last_seen desc, app_id
                limit 1)
            order by count desc, top.group_hash""", {"app": app, "first": days[0], "last": days[-1], "limit": limit})


# == Release figures ===========================================================
# When releases were seen, how they compare with the previous one, and how often and how long the app is used.

class SeenBuild(NamedTuple):
    """When the first and the last report of a build were received, in milliseconds."""

    first_seen: int
    last_seen: int  # of reports in the same second, the first counts: so the row changes at most once a second

    def merged(self, other: SeenBuild) -> SeenBuild:
        is_same_second = self.last_seen // SECOND == other.last_seen // SECOND
        return SeenBuild(min(self.first_seen, other.first_seen),
                         (min if is_same_second else max)(self.last_seen, other.last_seen))


class Releases(Figure):
    """When each build and release was seen; the sessions, crashes and devices of each release, and its sessions per UTC
    day of the last week. Builds beyond MAX_BUILDS_OF_APP count only for their release."""

    TABLES = """
create table builds (
    app_id integer not null, app_version text not null, build_number text not null,  -- '': not known, as in all events
    first_seen integer not null, last_seen integer not null,  -- when its first and its last report were received
    primary key (app_id, app_version, build_number)) without rowid;
create view releases as
    select app_id, app_version, min(first_seen) as first_seen, max(last_seen) as last_seen from builds
    group by app_id, app_version;
"""
    SUMS = {"release_sums": Sums("app_version", "sessions crashed_sessions crashes devices crashed_devices"),
            "release_days": Sums("day app_version", "sessions", WEEK_DAYS)}
    COUNTS = (Crash, Event)

    def __init__(self, rollups: RollUps):
        super().__init__(rollups)
        self._builds = MergedRows(rollups, "builds", SeenBuild)

    def count(self, kind: type, reports: CountedReports, by: int) -> None:
        for crash in reports if kind is Crash else ():
            if crash.app_version:
                self._sums["release_sums"]["crashes"][crash.app_id, crash.app_version] += by
                if by > 0:
                    self._builds.learn((crash.app_id, crash.app_version, crash.build_number or ""),
                                       SeenBuild(crash.received_at, crash.received_at))
        for run, times in reports.runs if kind is Event and by > 0 else ():
            if run[0].app_version:
                for received_at in {received_at for _, received_at in times}:  # mostly one
                    self._builds.learn((run[0].app_id, run[0].app_version, ""), SeenBuild(received_at, received_at))

    def save(self) -> None:
        learned, stored = self._builds.learned, self._builds.stored(self._builds.learned)
        added: dict[int, int] = defaultdict(int)  # by app_id
        for key in [key for key in learned if key not in stored]:  # mostly none
            builds, = self._db.execute("select count(*) from builds where app_id = ?", key[:1]).fetchone()
            added[key[0]] += 1
            if builds + added[key[0]] > MAX_BUILDS_OF_APP:
                self._builds.learn((*key[:2], ""), learned.pop(key))
        self._builds.save()


class SeenReleases:
    """The releases of an app, or of all live apps if none is given, as one transaction sees them. They are read once,
    because grouping their builds takes much of the time of an answer. Sessions are those of the last week."""

    def __init__(self, db: Any, app: int | None, now: int):
        self._db, self._now = db, now
        self._parameters = {"app": app, "first": now // DAY - WEEK_DAYS + 1, "last": now // DAY}
        self._releases = db.execute(f"""
            select app_id, app_version, min(first_seen) as first_seen, max(last_seen) from builds
            where {APP_FILTER}
            group by app_id, app_version
            order by first_seen, app_version, app_id""", self._parameters).fetchall()  # the view would read all apps
        self._sessions_of_release = self._sessions("release_days", "app_id, app_version")

    def _sessions(self, table: str, columns: str) -> dict[Row, int]:
        """The sessions in a table with a row per day, by some of its columns."""
        return {tuple(key): sessions for *key, sessions in self._db.execute(f"""
            select {columns}, sum(sessions) from {table}
            where {APP_FILTER} and day between :first and :last
            group by {columns}""", self._parameters)}

    @cached_property
    def _sums(self) -> dict[Row, Row]:
        """The sums of each release, by app_id and version."""
        return defaultdict(lambda: (0,) * 5, {row[:2]: row[2:] for row in self._db.execute(
            f"select * from release_sums where {APP_FILTER}", self._parameters)})

    def latest(self) -> Iterator[JsonObject]:
        """The latest 100 releases, the last to appear first, as the API shows them."""
        latest = sorted(self._releases, key=itemgetter(2), reverse=True)[:100]  # by first_seen
        names = dict(self._db.execute("select id, name from apps"))
        of_app = self._sessions("session_days", "app_id")
        recent = {release[:2] for release in latest if release[2] > self._now - HEALTH_DAYS * DAY}
        verdicts = self.verdicts(recent | self.current().keys())  # on all they would take long
        for app_id, version, first_seen, last_seen in latest:
            key = app_id, version
            sessions, crashed_sessions, crashes, devices, crashed_devices = self._sums[key]
            yield {"app": names[app_id], "app_version": version, "sessions": sessions, "crashes": crashes,
                   "crashed_sessions": crashed_sessions,
                   "crash_free_sessions": crash_free_rate(crashed_sessions or crashes, sessions) if sessions else None,
                   "by": "session" if crashed_sessions else "count",
                   "devices": devices,
                   "crash_free_devices": crash_free_rate(crashed_devices, devices) if devices else None,
                   "adoption": round(100 * self._sessions_of_release.get(key, 0) / (of_app.get((app_id,)) or 1), 2),
                   "first_seen": iso_time(first_seen), "last_seen": iso_time(last_seen), "verdict": verdicts.get(key)}

    def current(self) -> dict[Row, None]:
        """The app_id and version of the newest release of each app, then of the one with the most sessions if that is
        another: a few testers of the next version must not hide a bad release. The newest is the one that appeared
        last; a lower version only if it has more sessions, as the app may have restarted its numbers."""
        newest, most_used = dict[int, Row](), dict[int, Row]()  # by app_id: sessions, version key, version
        for app_id, version, *_ in self._releases:
            release = self._sessions_of_release.get((app_id, version), 0), version_key(version), version
            other = newest.get(app_id, (-1, (), ""))
            if version != OTHER and (release[1] >= other[1] or release[0] > other[0]):
                newest[app_id] = release
            if version != OTHER and release[0] > most_used.get(app_id, (0,))[0]:
                most_used[app_id] = release
        return {(app_id, release[2]): None for releases in (newest, most_used) for app_id, release in releases.items()}

    def _pairs(self, wanted: Container[Row]) -> list[ReleasePair]:
        """Each release of `wanted`, by app_id and version, with its previous one: the highest lower version that was
        seen earlier, if possible on a tenth as many devices. This skips versions that came late, were withdrawn, were
        only for testers, or are no release at all (99.0)."""
        pairs, earlier = [], defaultdict[int, list[Row]](list)  # the releases of each app that came before, by version
        for app_id, version, first_seen, _ in sorted(
                self._releases, key=lambda release: (release[2], version_key(release[1]), release[1])):
            if version != OTHER:
                release, lower = (version_key(version), version, first_seen), earlier[app_id]
                n = bisect_left(lower, release)
                if n and (app_id, version) in wanted:
                    least = self._sums[app_id, version][3] / 10  # of its devices
                    previous = next((other for other in reversed(lower[:n])
                                     if self._sums[app_id, other[1]][3] >= least), lower[n - 1])
                    pairs.append(ReleasePair(app_id, version, first_seen, *previous[1:]))
                lower.insert(n, release)
        return pairs

    def compared(self, wanted: Container[Row]) -> dict[ReleasePair, list[Health]]:
        """The health of each release of `wanted`, by app_id and version, and of the previous one, at equal ages. Counts
        the devices that came to the newer one until the last full hour, and to the previous one in as many hours."""
        spans: dict[ReleasePair, tuple[Row, Row]] = {}  # app_id, app_version, first hour, hour after the last
        for pair in self._pairs(wanted):
            end = min(self._now, pair.first_seen + HEALTH_DAYS * DAY) // HOUR
            end_before = (pair.previous_seen + end * HOUR - pair.first_seen + HOUR // 2) // HOUR
            spans[pair] = ((pair.app_id, pair.app_version, pair.first_seen // HOUR, end),
                           (pair.app_id, pair.previous, pair.previous_seen // HOUR, end_before))
        healths = {row[:4]: Health(*row[4:]) for row in rows_of(self._db, """
            select column1, column2, column3, column4, sum(devices), sum(crashed_devices) from (values *) as spans
            cross join release_hours on app_id = column1 and app_version = column2
                and hour >= column3 and hour < column4
            group by column1, column2, column3, column4""", list({*chain.from_iterable(spans.values())}))}
        return {pair: [healths.get(span, Health(0, 0)) for span in both] for pair, both in spans.items()}

    def verdicts(self, wanted: Container[Row]) -> dict[Row, JsonObject]:
        """The verdicts on releases of `wanted`, by app_id and version. Those without a verdict are left out."""
        verdicts = {pair: verdict(*both) for pair, both in self.compared(wanted).items()}
        return {pair[:2]: {**found, "before": pair.previous} for pair, found in verdicts.items() if found}


class Session(NamedTuple):
    """What is known of a session. Times are when its start and its end count, in milliseconds."""

    first_seq: int = MAX_NUMBER
    last_seq: int = 0
    started_at: int | None = None
    ended_at: int | None = None
    app_version: str | None = None  # of its start
    crashed: int = 0  # 1 if a crash names it

    def merged(self, other: Session) -> Session:
        """What is known from both. The first start and the last end count; of two starts at the same time, the one of
        the lower version counts, so the order of an import does not matter."""
        start = min(self, other, key=lambda session: (session.started_at or MAX_NUMBER, session.app_version or ""))
        return Session(min(self.first_seq, other.first_seq), max(self.last_seq, other.last_seq), start.started_at,
                       max(self.ended_at or 0, other.ended_at or 0) or None, start.app_version,
                       max(self.crashed, other.crashed))

    @property
    def duration(self) -> int | None:
        """Milliseconds. None if start or end is unknown, or if the end is before the start or over a day after it."""
        length = (self.ended_at or 0) - (self.started_at or 0)
        return length if self.started_at and self.ended_at and 0 <= length <= DAY else None


class Sessions(Figure):
    """Sessions by the UTC day on which they started, and how long they took. A session is a session_id of one device:
    SDKs that count launches use the same ids on every device."""

    TABLES = """
create table sessions (                    -- those of which a report is kept
    app_id integer not null, session_id text not null, device integer not null,  -- see device_key
    first_seq integer not null, last_seq integer not null,  -- of its first and its last report
    started_at integer, ended_at integer, app_version text, crashed integer not null,
    primary key (app_id, session_id, device)) without rowid;
create table medians (                     -- of the durations of a day that is over, which take long to sort
    app_id integer not null, day integer not null, seconds integer not null,
    primary key (app_id, day)) without rowid;
"""
    SUMS = {"session_days": Sums("day", "sessions ended session_ms"),  # `ended` have a duration; session_ms is the sum
            "durations": Sums("day seconds", "sessions", DURATION_DAYS)}  # seconds in two significant digits
    COUNTS = (Crash, Event)
    MEDIAN = """
        select seconds from (
            select seconds, sum(sessions) over (order by seconds) as so_far from durations
            where app_id = ended_days.app_id and day = ended_days.day) as sums
        where 2 * so_far >= ended
        order by seconds
        limit 1"""

    def __init__(self, rollups: RollUps):
        super().__init__(rollups)
        self._sessions = MergedRows(rollups, "sessions", Session, uncounted=2)
        self._changed_days: set[Row] = set()  # app_id and day of each stored median that is no longer right

    def count(self, kind: type, reports: CountedReports, by: int) -> None:
        forgotten: set[Row] = set()
        for run, _ in reports.runs:
            app_id, session_id = run[0].app_id, run[0].session_id
            if not session_id and kind is Crash:
                continue
            key = app_id, session_id, device_key(run[0].device_id_hash)
            bounds = [Session(started_at=event.at, app_version=event.app_version) if event.type == "session_start"
                      else Session(ended_at=event.at)
                      for event in (run if kind is Event else ()) if event.type in SESSION_TYPES]
            if not session_id:
                for session in bounds:  # such a start is a session of its own
                    self._count_session(app_id, session, by)
            elif by > 0:
                for session in (Session(run[0].seq, run[-1].seq, crashed=int(kind is Crash)), *bounds):
                    self._sessions.learn(key, session)
            else:  # the whole session, because all its reports are of the device that is forgotten
                forgotten.add(key)
        stored = self._sessions.stored(forgotten)
        for key in forgotten:
            if key in stored:
                self._count_session(key[0], stored[key], -1)
        delete_rows(self._db, "sessions", forgotten)

    def expire(self, kind: type, reports: CountedReports) -> None:
        keys = {(run[0].app_id, run[0].session_id, device_key(run[0].device_id_hash)): None
                for run, _ in reports.runs if run[0].session_id}
        delete_rows(self._db, "sessions", keys, "last_seq <= ?", reports[-1].seq)

    def _count_session(self, app_id: int, session: Session, by: int) -> None:
        if session.started_at is None:
            return
        day, duration, version, sums = session.started_at // DAY, session.duration, session.app_version, self._sums
        sums["session_days"]["sessions"][app_id, day] += by
        if version:
            sums["release_sums"]["sessions"][app_id, version] += by
            sums["release_sums"]["crashed_sessions"][app_id, version] += by * session.crashed
            sums["release_days"]["sessions"][app_id, day, version] += by
        if duration is not None:
            sums["session_days"]["ended"][app_id, day] += by
            sums["session_days"]["session_ms"][app_id, day] += by * duration
            unit = 10 ** max(0, len(str(duration // SECOND)) - 2) * SECOND  # two digits, so that a day has few rows
            sums["durations"]["sessions"][app_id, day, (duration + unit // 2) // unit * unit // SECOND] += by
            if day < self._now // DAY - 1:
                self._changed_days.add((app_id, day))

    def save(self) -> None:
        for key, session, by in self._sessions.save():
            self._count_session(key[0], session, by)
        delete_rows(self._db, "medians", self._changed_days)

    def store_medians(self) -> None:
        """Stores the medians of days before yesterday. Later ones change with nearly every session."""
        self._db.execute(f"""
            insert into medians select * from (
                select app_id, day, ({self.MEDIAN}) as seconds from session_days as ended_days
                where app_id in (select id from apps) and day between ? and ? and ended > 0 and not exists (
                    select 1 from medians where app_id = ended_days.app_id and day = ended_days.day)
                limit ?) as closed
            where seconds is not null""", (self._now // DAY - DURATION_DAYS, self._now // DAY - 2, STEP_ROWS))


# == Device figures ============================================================
# Which devices use the app, whether they come back, and what events they send.

class SeenDevice(NamedTuple):
    """What is known of a device of an app."""

    first_day: int
    last_hour: int
    last_seq: int  # of its last report, or of an earlier one from the same hour, so that the row seldom changes

    def merged(self, other: SeenDevice) -> SeenDevice:
        is_later = (other.last_seq >> SEQ_BITS) // HOUR > (self.last_seq >> SEQ_BITS) // HOUR
        if not is_later and self.first_day <= other.first_day and self.last_hour >= other.last_hour:
            return self
        return SeenDevice(min(self.first_day, other.first_day), max(self.last_hour, other.last_hour),
                          other.last_seq if is_later else self.last_seq)


class SeenVersion(NamedTuple):
    """When the first report of a device in a release, and its first crash there if any, were received."""

    first_hour: int
    crash_hour: int | None

    def merged(self, other: SeenVersion) -> SeenVersion:
        crash_hour = min(self.crash_hour or MAX_NUMBER, other.crash_hour or MAX_NUMBER)
        if crash_hour == (self.crash_hour or MAX_NUMBER) and self.first_hour <= other.first_hour:
            return self  # mostly
        return SeenVersion(min(self.first_hour, other.first_hour), crash_hour if crash_hour < MAX_NUMBER else None)


class Devices(Figure):
    """Devices that are active, that are new and that come back, and the devices of each release. A device is known by a
    digest, so that no figure has its id, and is forgotten when its last report expires, or up to an hour before."""

    TABLES = """
create table devices (                     -- those of which a report is kept
    app_id integer not null, device integer not null,  -- see device_key
    first_day integer not null, last_hour integer not null,  -- by the time at which reports count
    last_seq integer not null, primary key (app_id, device)) without rowid;
create table device_days (
    app_id integer not null, device integer not null, day integer not null,
    primary key (app_id, device, day)) without rowid;
create table device_versions (
    app_id integer not null, device integer not null, app_version text not null,
    first_hour integer not null, crash_hour integer,  -- when its first report, and its first crash, were received
    primary key (app_id, device, app_version)) without rowid;
"""
    ACTIVE = {"dau": 1, "wau": 7, "mau": 30}  # devices seen within so many days that end with this one
    BACK = {"back_1": 1, "back_7": 7, "back_30": 30}  # devices first seen on this day and again so many days later
    SUMS = {"device_hours": Sums("hour", "devices", 2, check="at least"),  # by the hour of their last report
            "active_days": Sums("day", "dau wau mau", check="at least"),
            "cohorts": Sums("day", "devices back_1 back_7 back_30"),
            "release_hours": Sums("app_version hour", "devices crashed_devices")}  # by first_hour and by crash_hour
    COUNTS = (Crash, Event)

    def __init__(self, rollups: RollUps):
        super().__init__(rollups)
        self._devices = MergedRows(rollups, "devices", SeenDevice)
        self._versions = MergedRows(rollups, "device_versions", SeenVersion)
        self._days: dict[Row, set[int]] = defaultdict(set)  # by app_id and device: days on which it was seen
        # Devices by app_id, column of active_days, first day, and day after the last
        self._spans: dict[Row, int] = defaultdict(int)

    def count(self, kind: type, reports: CountedReports, by: int) -> None:
        """Counts new reports. Deleted ones stay counted: `forget` takes out a device as a whole."""
        for run, times in reports.runs if by > 0 else ():
            if not run[0].device_id_hash:
                continue
            key, version = (run[0].app_id, device_key(run[0].device_id_hash)), run[0].app_version
            self._days[key].update([at // DAY for at, received_at in times
                                    if at // DAY >= received_at // DAY - DEVICE_DAYS])
            self._devices.learn(key, SeenDevice(times[0][0] // DAY, times[-1][0] // HOUR, run[-1].seq))
            if version:
                hour = min([received_at for _, received_at in times]) // HOUR
                self._versions.learn((*key, version), SeenVersion(hour, hour if kind is Crash else None))

    def expire(self, kind: type, reports: CountedReports) -> None:
        """Deletes devices without reports, and days of the others that are too old for any report that is kept."""
        oldest = reports[-1].received_at // DAY - DEVICE_DAYS
        is_gone = "not exists (select 1 from devices where app_id = :app and device = :device)"
        last_seqs = {(report.app_id, report.device_id_hash): report.seq for report in reports if report.device_id_hash}
        for statement in (
                "delete from devices where app_id = :app and device = :device and last_seq <= :seq",
                f"delete from device_days where app_id = :app and device = :device and (day < :oldest or {is_gone})",
                f"delete from device_versions where app_id = :app and device = :device and {is_gone}"):
            self._db.executemany(statement, [
                {"app": app_id, "device": device_key(device), "seq": seq, "oldest": oldest}
                for (app_id, device), seq in last_seqs.items()])

    def save(self) -> None:
        self._save_days()
        for (app_id, _), device, by in self._devices.save():
            self._sums["device_hours"]["devices"][app_id, device.last_hour] += by
        for (app_id, column, first, end), count in self._spans.items():  # many devices share a span
            for day in range(first, end) if count else ():
                self._sums["active_days"][column][app_id, day] += count
        for (app_id, _, version), seen, by in self._versions.save():
            self._count_version(app_id, version, seen, by)

    def _save_days(self) -> None:
        """Saves days on which devices were not seen before. Mostly last_hour shows that there are none."""
        stored, changed, ranges = self._devices.stored(self._devices.learned), [], []  # ranges of days that may change
        for key, seen in self._devices.learned.items():
            before = stored.get(key)
            if before is None or seen.first_day < before.first_day or self._days[key] - {before.last_hour // 24}:
                changed.append((key, before, before.merged(seen) if before else seen))
                if before:
                    days = {*self._days[key], seen.first_day, before.first_day}
                    ranges.append((*key, min(days) - 30, max(days) + 30))
        days_of: dict[Row, list[int]] = defaultdict(list)
        for app_id, device, day in rows_of(self._db, """
                select app_id, device, day from (values *) as keys cross join device_days
                    on app_id = column1 and device = column2 and day between column3 and column4
                order by day""", ranges):
            days_of[app_id, device].append(day)
        rows = []
        for key, before, after in changed:
            known = days_of[key]
            if before:
                self._count_days(key[0], before.first_day, known, -1)
            self._count_days(key[0], after.first_day, sorted(self._days[key].union(known)), 1)
            rows += [(*key, day) for day in self._days[key].difference(known)]
        write_rows(self._db, "insert into device_days values *", rows)

    def _count_days(self, app_id: int, first_day: int, days: Sequence[int], by: int) -> None:
        """Counts a device that was first seen on `first_day`, and on these days, which are in order."""
        for day, following in zip(days, [*days[1:], MAX_NUMBER]):
            for column, span in self.ACTIVE.items():
                self._spans[app_id, column, day, min(day + span, following)] += by
        cohorts = self._sums["cohorts"]
        cohorts["devices"][app_id, first_day] += by
        for column, later in self.BACK.items():
            if first_day + later in days:
                cohorts[column][app_id, first_day] += by

    def _count_version(self, app_id: int, version: str, seen: SeenVersion, by: int) -> None:
        for column, hour in (("devices", seen.first_hour), ("crashed_devices", seen.crash_hour)):
            if hour is not None:
                self._sums["release_sums"][column][app_id, version] += by
                self._sums["release_hours"][column][app_id, version, hour] += by

    def forget(self, device_id_hash: str) -> int:
        """Takes a device out of all figures of devices; returns in how many apps it was known."""
        device = device_key(device_id_hash)
        rows = self._db.execute("""
            select app_id, first_day, last_hour from devices where app_id in (select id from apps) and device = ?
            """, (device,)).fetchall()
        for app_id, first_day, last_hour in rows:
            key = app_id, device
            days = [day for day, in self._db.execute(
                "select day from device_days where app_id = ? and device = ? order by day", key)]
            self._sums["device_hours"]["devices"][app_id, last_hour] -= 1
            self._count_days(app_id, first_day, days, -1)
            for version, *hours in self._db.execute("""
                    select app_version, first_hour, crash_hour from device_versions where app_id = ? and device = ?
                    """, key):
                self._count_version(app_id, version, SeenVersion(*hours), -1)
            for table in ("devices", "device_days", "device_versions"):
                self._db.execute(f"delete from {table} where app_id = ? and device = ?", key)
        return len(rows)


class EventNames(Figure):
    """Events by name, type and UTC day, without those that start or end a session. The name "" means none."""

    SUMS = {"event_names": Sums("name type day", "events", NAME_DAYS, check="recent")}
    COUNTS = (Event,)
    KEY = staticmethod(columns_getter(COUNTED[Event], "app_id", "name", "type", "day"))

    def count(self, kind: type, reports: CountedReports, by: int) -> None:
        sums = self._sums["event_names"]["events"]
        for (app_id, name, type, day), events in Counter(map(self.KEY, reports)).items():
            if type not in SESSION_TYPES:
                sums[app_id, name or "", type, day] += by * events


# == Roll-ups ==================================================================
# All figures together: their tables, which new names they count, and how a transaction changes them.

Name = tuple[int, str, str]  # app_id, field, name


class NewNames:
    """Decides which new names are counted by themselves, because anyone who has a key can invent names without end."""

    TABLES = """
create table new_names (                   -- how many were new on a UTC day
    app_id integer not null, day integer not null, field text not null, names integer not null,
    primary key (app_id, day, field)) without rowid;
"""
    FIELDS = {kind: {name: columns_getter(kind, name) for name in names} for kind, names in (
        (Crash, ("group_hash", "exception_type", "device_model", "app_version")), (Event, ("app_version", "name")))}
    KNOWN_IN = {"group_hash": "groups where group_hash", "app_version": "builds where app_version",
                "name": "event_names where name", **dict.fromkeys(
                    ("exception_type", "device_model"), f"labels where field = column2 and day = {ALL_DAYS} and label")}
    STORED = {"app_version": "select count(distinct app_version) from builds where app_id = ?", **{
        name: f"select count(*) from labels where app_id = ? and field = '{name}' and day = {ALL_DAYS}"
        for name in ("exception_type", "device_model")}}

    def __init__(self, db: Any, known: set[Row]):
        self._db, self._known = db, known
        self.accepted: set[Name] = set()  # the new names of this transaction that are counted by themselves

    def limit(self, app_id: int, received: Sequence[int], reports: Sequence[Any]) -> tuple[Sequence[int], Reports]:
        """Accepts or refuses new names. Returns the column `other`, and the reports: a crash whose group is refused is
        in the group `(other)`."""
        fields = self.FIELDS[type(reports[0])]
        days: dict[Name, int] = {}  # the day on which each unknown name was first received
        for column, value_of in fields.items():
            names = set(map(value_of, reports))
            unknown = {name for name in names if name and (app_id, column, name) not in self._known}
            for report, at in zip(reports, received) if unknown else ():  # mostly none is unknown
                # The names of events that start or end a session are not counted.
                if (name := value_of(report)) in unknown and not (column == "name" and report.type in SESSION_TYPES):
                    days.setdefault((app_id, column, name), at // DAY)
        refused = self._refused(days) if days else set()
        if not refused:
            return [0] * len(reports), reports
        flags, limited = [], []
        for report in reports:
            others = [field for field in fields if (app_id, field, getattr(report, field)) in refused]
            flags.append(sum(OTHER_FLAGS.get(field, 0) for field in others))
            limited.append(report._replace(group_hash=OTHER) if "group_hash" in others else report)
        return flags, limited

    def _refused(self, days: Mapping[Name, int]) -> set[Name]:
        """Accepts new names up to the limits of their days; returns those that are refused."""
        tests = [f"when '{field}' then exists (select 1 from {self.KNOWN_IN[field]} = column3 and app_id = column1)"
                 for field in MAX_NEW_NAMES]
        unknown = set(rows_of(self._db, f"""
            select column1, column2, column3 from (values *) as keys where not case column2 {" ".join(tests)} end
            """, list(days.keys() - self.accepted)))
        self._known.update(days.keys() - unknown - self.accepted)  # not the accepted: an old event leaves no row
        new: dict[Row, list[Name]] = defaultdict(list)  # by app_id, day and field, in the order of receipt
        for name, day in days.items():
            if name in unknown:
                new[name[0], day, name[1]].append(name)
        for key, names in new.items():
            used, = self._db.execute("""
                select coalesce(sum(names), 0) from new_names where app_id = ? and day = ? and field = ?
                """, key).fetchone()
            room = MAX_NEW_NAMES[key[2]] - used
            if key[2] in self.STORED:  # their number decides how long a public answer takes
                stored, = self._db.execute(self.STORED[key[2]], key[:1]).fetchone()
                room = min(room, MAX_NAMES - stored)
            if accepted := names[:max(0, room)]:
                upsert(self._db, "new_names", [(*key, len(accepted))], "names = new_names.names + excluded.names")
                self.accepted.update(accepted)
        return unknown - self.accepted


FIGURES: tuple[type[Figure], ...] = (Crashes, Groups, Releases, Sessions, Devices, EventNames)
SUMS = {"key_days": Sums("day key", "requests", KEY_DAYS),  # counted by Commit, not from reports; `key`: see key_name
        **{table: sums for figure in FIGURES for table, sums in figure.SUMS.items()}}
FIGURE_TABLES = (NewNames.TABLES + "".join(figure.TABLES for figure in FIGURES)
                 + "".join(sums.schema(table) for table, sums in SUMS.items()))
SCHEMA = REPORT_TABLES + SYMBOL_TABLES + TRIAGE_TABLES + FIGURE_TABLES
# The primary keys of all tables that have rows of an app, except those of the reports.
PRIMARY_KEYS = {table: tuple(key.split(", ")) for table, key in re.findall(
    r"create table (\w+) \([^;]*?primary key \((app_id, [^)]*)\)", re.sub("--.*", "", SCHEMA))}
# The queries for the rows with given keys.
QUERIES_BY_KEY = {table: f"select {table}.* from (values *) as keys cross join {table} on " + " and ".join(
    f"{name} = column{n}" for n, name in enumerate(key, 1)) for table, key in PRIMARY_KEYS.items()}
# The changes that add to the sums of a row.
ADDITIONS = {table: ", ".join(f"{name} = {table}.{name} + excluded.{name}" for name in sums.columns)
             for table, sums in SUMS.items()}


class RollUps:
    """All figures in one transaction: reports are counted, then all changes are saved, once."""

    def __init__(self, db: Any, now: int, symbols: Symbols | None = None, known: KnownRows | None = None):
        self.db, self.now, self.symbols, self.known = db, now, symbols or Symbols(db), known or KnownRows()
        self.names = NewNames(db, self.known.names)
        self.changes: dict[str, dict[str, dict[Row, int]]] = defaultdict(  # to sums, by table, column and key
            partial(defaultdict, partial(defaultdict, int)))
        self.figures: dict[type, Any] = {figure: figure(self) for figure in FIGURES}

    def count(self, kind: type, reports: CountedReports, by: int) -> None:
        """Counts reports, which are in the order of their seqs, in all figures: see Figure.count."""
        for figure in self.figures.values() if reports else ():
            if kind in figure.COUNTS:
                figure.count(kind, reports, by)

    def expire(self, kind: type, reports: CountedReports) -> None:
        """Like count(), but takes out expired reports: see Figure.expire. Such a transaction counts no others."""
        for figure in self.figures.values():
            if kind in figure.COUNTS:
                figure.expire(kind, reports)
        for table in [table for table in self.changes if SUMS[table].lasts]:
            del self.changes[table]

    def save(self) -> None:
        """Writes everything that has changed."""
        for figure in self.figures.values():
            figure.save()
        for table, changes in self.changes.items():
            self._save_sums(table, changes)
        self.changes.clear()
        self.figures[Groups].drop_empty()  # after the sums, because it reads group_days

    def _save_sums(self, table: str, changes: dict[str, dict[Row, int]]) -> None:
        """Adds to the rows of a table, except those whose window is over. Deletes those that became zero."""
        columns = SUMS[table].columns
        if len(columns) == 1:
            rows = [(*key, count) for key, count in changes[columns[0]].items() if count]
        else:
            counts = [changes.get(column, {}) for column in columns]
            rows = [(*key, *[by_key.get(key, 0) for by_key in counts])
                    for key in dict.fromkeys(chain.from_iterable(counts))]
            rows = [row for row in rows if any(row[-len(columns):])]
        if SUMS[table].window:
            position, first = self._window(table)
            rows = [row for row in rows if row[position] >= first]
        upsert(self.db, table, rows, ADDITIONS[table])
        if lowered := [row[:-len(columns)] for row in rows if min(row[-len(columns):]) < 0]:
            delete_rows(self.db, table, lowered, " and ".join(f"{name} <= 0" for name in columns))

    def _window(self, table: str) -> tuple[int, int]:
        """The position of the day or the hour in the key of a table with a window, and the first one that is kept."""
        unit, length = ("day", DAY) if "day" in PRIMARY_KEYS[table] else ("hour", HOUR)
        return PRIMARY_KEYS[table].index(unit), (self.now - SUMS[table].window * DAY) // length

    def trim(self, oldest: int = 0) -> int:
        """Stores medians, and deletes up to STEP_ROWS old rows of each table; returns how many, 0 when none is left.
        Reports that were received before `oldest`, in milliseconds, have expired."""
        self.figures[Sessions].store_medians()
        today = self.now // DAY
        deleted = self._delete_some("new_names", "new_names where day < ?", today)
        for table in [table for table, sums in SUMS.items() if sums.window]:
            position, first = self._window(table)
            deleted += self._delete_some(table, f"{table} where {PRIMARY_KEYS[table][position]} < ?", first)
        # No verdict needs the hours in which a release was older than HEALTH_DAYS.
        deleted += self._delete_some("release_hours", f"""(
            select app_id, app_version, min(first_seen) / {HOUR} + {24 * HEALTH_DAYS} as last from builds
            group by app_id, app_version) as ages
            cross join release_hours using (app_id, app_version) where hour > last""")
        deleted += self._drop_old_releases(oldest)
        return deleted + self._delete_some("groups", f"groups where last_seen < ? and {Groups.IS_EMPTY}",
                                           (today - WEEK_DAYS) * DAY, today - WEEK_DAYS)

    def _drop_old_releases(self, oldest: int) -> int:
        """Deletes releases without reports in apps that have as many as they may. Otherwise somebody with a key could
        fill the list for ever with made-up ones."""
        releases = self.db.execute(f"""
            select app_id, app_version from builds
            where app_id in (
                select app_id from builds where app_id in (select id from apps)
                group by app_id having count(distinct app_version) >= {MAX_NAMES})
            group by app_id, app_version
            having max(last_seen) < ? limit ?""", (oldest - SECOND, STEP_ROWS)).fetchall()
        for table in ("builds", "release_sums", "release_hours"):
            self.db.executemany(f"delete from {table} where app_id = ? and app_version = ?", releases)
        return len(releases)

    def _delete_some(self, table: str, source: str, *parameters: int) -> int:
        """Deletes up to STEP_ROWS rows of a query, which is given from its `from` on; returns how many."""
        keys = self.db.execute(f"""
            select {", ".join(PRIMARY_KEYS[table])} from {source} and app_id in (select id from apps) limit ?
            """, (*parameters, STEP_ROWS)).fetchall()
        delete_rows(self.db, table, keys)
        return len(keys)


# == Triage ====================================================================
# What people decide about a group, how a new crash undoes it, and the facts that are worth an alert. The effects of a
# crash are written in the transaction that stores it.

FACT_KINDS = {  # each with whether a channel gets it by default
    "crash.new": True, "crash.regressed": True, "crash.unmuted": True, "crash.spread": False,
    "release.worse": False, "digest": False}
STATES = {"open": "opened", "resolved": "resolved", "muted": "muted"}  # each with its verb in the history
CONDITIONS: dict[str, tuple[str, str, Callable[[Any], str]]] = {  # each with its state, column and text in the history
    "fixed_in": ("resolved", "fixed_in", "in {}".format),
    "until": ("muted", "until", lambda time_ms: f"until {iso_time(time_ms)}"),
    "more_crashes": ("muted", "crashes_left", lambda count: f"for {plural(count, 'more crash', 'es')}"),
    "more_devices": ("muted", "devices_left", lambda count: f"for {plural(count, 'more device')}")}
TRIAGE_FIELDS = ("state", *CONDITIONS, "comment")  # of a PATCH
MAX_HISTORY, MAX_COMMENT = 100, 5000  # entries that are kept of a group, and characters of a comment
SPREAD_BOUNDS = (10, 100, 1000)  # a fact is noted when a group reaches this many devices
Decision = namedtuple("Decision", "state changed_at fixed_in until crashes_left devices_left regressed_at",
                      defaults=(None, None, None, None, None))  # a row of triage


def parse_triage(fields: JsonObject, now: int) -> JsonObject:
    """The changes in a PATCH, with times in milliseconds. Raises Refusal, also for a typo: it must not go unnoticed."""
    if unknown := [name for name in fields if name not in TRIAGE_FIELDS]:
        raise Refusal("invalid field", detail=f"{unknown[0][:MAX_TEXT]!r} is not one of {', '.join(TRIAGE_FIELDS)}")
    if not fields:
        raise Refusal("missing state", detail=f"there is none of {', '.join(TRIAGE_FIELDS)}")
    changes = {}
    for name, value in fields.items():
        try:
            changes[name] = None if value is None and name in CONDITIONS else _triage_value(name, value, now)
        except ValueError as error:
            raise Refusal(f"invalid {name}", detail=f"{name} {error}") from None
    return changes


def _triage_value(name: str, value: Any, now: int) -> Any:
    if name.startswith("more_"):
        if type(value) is not int or not 1 <= value < 1 << 31:
            raise ValueError(f"is not a whole number from 1 to {(1 << 31) - 1}")
        return value
    if name == "state" and value not in tuple(STATES):  # not `in STATES`, which raises an error for a list
        raise ValueError(f"is not one of {', '.join(STATES)}")
    if type(value) is not str or not value.strip():
        raise ValueError("is empty or not text")
    if name != "until":
        return value.strip()[:MAX_TEXT if name == "fixed_in" else MAX_COMMENT]
    until = parse_occurred_at(value)
    if until <= now:
        raise ValueError("is in the past")
    return until


def decide(db: Any, app_id: int, group_hash: str, changes: JsonObject, now: int) -> None:
    """Applies changes from parse_triage to a group. Raises Refusal for a condition that belongs to another state."""
    row = db.execute(f"select {', '.join(Decision._fields)} from triage where app_id = ? and group_hash = ?",
                     (app_id, group_hash)).fetchone()
    before = after = Decision(*row) if row else Decision("open", 0)  # 0: nobody has decided it
    state, history = changes.get("state", before.state), []
    for name, (state_of_condition, _, _) in CONDITIONS.items():
        if changes.get(name) is not None and state != state_of_condition:
            raise Refusal(f"invalid {name}", detail=f'it goes with "state": "{state_of_condition}"')
    if "state" in changes:
        after = Decision(state, now, regressed_at=None if state == "resolved" else before.regressed_at)
    if changes.keys() != {"comment"}:
        after = after._replace(changed_at=now, **{
            column: changes[name] for name, (_, column, _) in CONDITIONS.items() if name in changes})
        texts = [to_text(value) for _, column, to_text in CONDITIONS.values()
                 if (value := getattr(after, column)) is not None]
        if (before.state, state) != ("open", "open"):
            history.append((STATES[state], " or ".join(texts) or None))
    if "comment" in changes:
        history.append(("commented", changes["comment"]))
    _write_decision(db, app_id, group_hash, after, now, history)


def _write_decision(db: Any, app_id: int, group_hash: str, decision: Decision, now: int,
                    history: Sequence[tuple[str, str | None]]) -> None:
    """Writes a decision, and adds these entries to the history."""
    upsert(db, "triage", [(app_id, group_hash, *decision)], _replacements(Decision._fields))
    _add_history(db, app_id, group_hash, now, *history)


def _add_history(db: Any, app_id: int, group_hash: str, now: int, *history: tuple[str, str | None]) -> None:
    """Adds entries to a history, and deletes the oldest ones beyond MAX_HISTORY."""
    last, = db.execute("select coalesce(max(entry), 0) from group_history where app_id = ? and group_hash = ?",
                       (app_id, group_hash)).fetchone()
    write_rows(db, "insert into group_history values *",
               [(app_id, group_hash, number, now, *entry) for number, entry in enumerate(history, last + 1)])
    _trim_history(db, app_id, group_hash)


def _trim_history(db: Any, app_id: int, group_hash: str) -> None:
    """Deletes the oldest entries of a history beyond MAX_HISTORY. Merged histories are not numbered in their order."""
    db.execute("""
        delete from group_history where app_id = :app and group_hash = :group and entry not in (
            select entry from group_history where app_id = :app and group_hash = :group
            order by at desc, entry desc limit :most)""", {"app": app_id, "group": group_hash, "most": MAX_HISTORY})


def rename_group(db: Any, app_id: int, group_hash: str, target: str) -> None:
    """Makes a group without crashes an alias of the group `target`, which gets its history and its decision. If both
    have one, that of `target` stays, unless it is the earlier one and only leaves the group open."""
    names = {"app": app_id, "group": group_hash, "target": target}
    if not db.execute("""
            select 1 from apps where id = :app and not exists (
                select 1 from crashes where app_id = apps.id and group_hash = :group)""", names).fetchone():
        return
    for statement in (
            "update group_aliases set target = :target where app_id = :app and target = :group",
            "delete from group_aliases where app_id = :app and group_hash = :target",
            """insert into group_aliases values (:app, :group, :target)
                on conflict (app_id, group_hash) do update set target = excluded.target""",
            """update group_history set group_hash = :target, entry = entry + (
                    select coalesce(max(entry), 0) from group_history where app_id = :app and group_hash = :target)
                where app_id = :app and group_hash = :group""",
            """delete from triage where app_id = :app and group_hash = :target and state = 'open'
                and regressed_at is null and changed_at < (
                    select changed_at from triage where app_id = :app and group_hash = :group)""",
            """update triage set group_hash = :target where app_id = :app and group_hash = :group and not exists (
                select 1 from triage where app_id = :app and group_hash = :target)""",
            "delete from triage where app_id = :app and group_hash = :group"):
        db.execute(statement, names)
    _trim_history(db, app_id, target)


def unknown_group_refusal(db: Any, app: str | None, group_hash: str) -> Refusal:
    """The refusal for an unknown group. It says where the crashes are now if they were moved."""
    alias = db.execute("""
        select target from group_aliases
        where app_id in (select id from apps where name = :app or :app is null and is_test = 0) and group_hash = :group
        order by app_id limit 1""", {"app": app, "group": group_hash}).fetchone()
    return GroupMoved(alias[0]) if alias else Refusal("not found")


def with_build(version: str | None, build: str | None) -> str:
    """A version with its build: 1.3.0 (48). Either may be missing."""
    return " ".join(filter(None, (version, build and f"({build})")))


def _split_build(text: str) -> tuple[str, str]:
    """The version and the build in text such as 1.3.0 (48). The build is "" if there is none."""
    match = re.fullmatch(r"(.*[^ ]) *\(([^()]+)\)", text)
    return (match[1], match[2].strip()) if match else (text, "")


def _has_fix(version: str, build: str, fixed_in: str) -> bool | None:
    """Whether this version and build is the one with the fix, or later. None if they cannot be compared."""
    fixed_version, fixed_build = _split_build(fixed_in)
    key, fixed_key = version_key(version), version_key(fixed_version)
    if version == fixed_version or key[0] and key == fixed_key:
        if fixed_build in ("", build):
            return True
        key, fixed_key = version_key(build), version_key(fixed_build)
    return key >= fixed_key if key[0] and fixed_key[0] else None


def _first_seen(db: Any, app_id: int, version: str, build: str, if_never: int) -> int:
    """When a build, or a version if `build` is "", was first seen. Events name none, so the first build that a crash
    names is as old as its version; and so is an unknown one (see MAX_BUILDS_OF_APP) if `if_never` is 0."""
    builds = dict(db.execute("select build_number, first_seen from builds where app_id = ? and app_version = ?",
                             (app_id, version)).fetchall())
    first_build = min(filter(None, builds), key=builds.__getitem__, default="")
    version_seen: int = min(builds.values(), default=if_never)
    return version_seen if build in ("", first_build) else builds.get(build, if_never or version_seen)


def _is_regression(db: Any, decision: Decision, crash: Any) -> bool:
    """Whether a crash shows that a resolved group is not fixed. An old build that still crashes does not."""
    app_id, build, since = crash.app_id, crash.build_number or "", decision.changed_at + 1
    if not crash.app_version:  # such a crash tells nothing, unless the app has no versions at all
        return crash.at >= since and not db.execute("select 1 from builds where app_id = ?", (app_id,)).fetchone()
    # The version that was sent: the crash may count under "(other)".
    version, = db.execute("select app_version from crashes where seq = ?", (crash.seq,)).fetchone()
    if decision.fixed_in:
        version_alone, build_in_version = _split_build(version)
        has_fix = _has_fix(version_alone, build or build_in_version, decision.fixed_in)
        if has_fix is not None:
            return has_fix
        since = _first_seen(db, app_id, *_split_build(decision.fixed_in), if_never=MAX_NUMBER)
    return bool(_first_seen(db, app_id, version, build, if_never=0) >= since)


def _find_reopening(db: Any, now: int, decision: Decision, crashes: list[Any], devices: int) -> tuple[str, Any] | None:
    """Why a group reopens, "regressed" or "unmuted", and the crash that did it; or None. `devices` counts new ones."""
    if decision.state == "resolved":  # one crash of each build before the decision, and one after it, are enough
        first_of_build = {(crash.app_version, crash.build_number, crash.at > decision.changed_at): crash
                          for crash in reversed(crashes)}
        return next((("regressed", crash) for crash in sorted(first_of_build.values())
                     if _is_regression(db, decision, crash)), None)
    until, crashes_left, devices_left = (
        limit or MAX_NUMBER for limit in (decision.until, decision.crashes_left, decision.devices_left))
    if now > until or crashes_left <= len(crashes):
        return "unmuted", crashes[0 if now > until else crashes_left - 1]
    return ("unmuted", crashes[-1]) if devices_left <= devices else None


def update_triage(db: Any, now: int, rollups: RollUps, crashes: Sequence[Any], are_moved: bool = False) -> None:
    """Reopens resolved and muted groups that crashed again, but none of a test app, and writes the facts for alerts.
    Crashes that were moved from another group can be a regression, but they are not new and end no mute."""
    groups: dict[tuple[int, str], list[Any]] = defaultdict(list)
    for crash in crashes:
        groups[crash.app_id, crash.group_hash].append(crash)
    devices_of, accepted = rollups.figures[Groups].new_devices, rollups.names.accepted
    # Nothing can happen to an open group that is not new and has no new device.
    keys = [(*key, int(devices_of[key] > 0 or (key[0], "group_hash", key[1]) in accepted)) for key in groups]
    keys = [key for key in keys if key[2] or key[:2] not in rollups.known.open_groups]
    rollups.known.open_groups.update(key[:2] for key in keys)
    for app_id, group, crash_count, device_count, exception_type, place, *triage in rows_of(db, f"""
            select column1, column2, crashes, devices, exception_type, coalesce(place, ''),
                {", ".join(Decision._fields)}
            from (values *) as keys
            cross join apps on apps.id = column1
            cross join groups on groups.app_id = column1 and groups.group_hash = column2
            left join triage on triage.app_id = column1 and triage.group_hash = column2
            where (column3 > 0 or state <> 'open') and (is_test = 0 or coalesce(state, 'open') = 'open')""", keys):
        decision, stored, new_devices = Decision(*triage), groups[app_id, group], devices_of[app_id, group]
        facts = [("new", stored[0])] * ((app_id, "group_hash", group) in accepted)
        if decision.state in ("resolved", "muted"):
            rollups.known.open_groups.discard((app_id, group))
            facts = [] if are_moved and decision.state == "muted" else _reopen(db, now, decision, stored, new_devices)
            if not facts:
                continue
        bound = max((n for n in SPREAD_BOUNDS if device_count - new_devices < n <= device_count), default=0)
        spread = "spread", f"to {bound} devices"
        if bound and group != OTHER and not are_moved and not db.execute("""
                select 1 from group_history where app_id = ? and group_hash = ? and what = ? and detail = ?
                """, (app_id, group, *spread)).fetchone():  # the number falls as crashes expire, and rises again
            facts.append(("spread", stored[-1]))
            _add_history(db, app_id, group, now, spread)
        for what, crash in facts:
            note_fact(db, "crash." + what, app_id, now, group, exception_type=exception_type, place=place,
                      app_version=crash.app_version, build_number=crash.build_number, crashes=crash_count,
                      devices=device_count, fixed_in=decision.fixed_in if what == "regressed" else None)


def _reopen(db: Any, now: int, decision: Decision, crashes: list[Any], new_devices: int) -> list[tuple[str, Any]]:
    """Opens a group again, and returns the fact; or counts the crashes for the end of the mute, and returns none."""
    app_id, group = crashes[0].app_id, crashes[0].group_hash
    reopening = _find_reopening(db, now, decision, crashes, new_devices)
    if not reopening:
        if decision.crashes_left or decision.devices_left:
            db.execute("""
                update triage set crashes_left = crashes_left - ?, devices_left = devices_left - ?
                where app_id = ? and group_hash = ?""", (len(crashes), new_devices, app_id, group))
        return []
    what, crash = reopening
    version = f" in {with_build(crash.app_version, crash.build_number)}" if crash.app_version else ""
    after = Decision("open", now, decision.fixed_in, regressed_at=now if what == "regressed" else decision.regressed_at)
    _write_decision(db, app_id, group, after, now, [(what, f"crash {crash_id(crash.seq)}{version}")])
    return [reopening]


def note_fact(db: Any, kind: str, app_id: int, at: int, group_hash: str | None, **detail: Any) -> None:
    """Writes a fact in the current transaction, if there is any channel."""
    db.execute("""
        insert into facts (app_id, at, kind, group_hash, detail) select ?, ?, ?, ?, ?
        where exists (select 1 from channels where ended_at is null)
        """, (app_id, at, kind, group_hash, to_json(detail)))


# == Connection ================================================================
# A connection to the SQLite file. A process has one that writes, behind a lock, and readers that cannot write.

BUSY_TIMEOUT = 5.0  # seconds to wait for a lock that another process holds
SET_STATE = "insert into state values (?, ?) on conflict (name) do update set value = excluded.value"
RAISE_STATE = SET_STATE.replace("= excluded.value", "= max(state.value, excluded.value)")  # a clock may go back
SET_SECRET = "insert into secrets values (?, ?) on conflict (name) do update set hash = excluded.hash"
DB_PATH_HINT = "; --db or BACKFEEDR_DB_PATH names another"


class StoreError(Exception):
    """A problem for the operator to solve. `str()` explains it in one line."""


class Closing(AbstractContextManager[Any]):
    """A context manager that calls close() at the end."""

    def __exit__(self: Any, *exc: object) -> None:
        self.close()


class Connection(sqlite3.Connection):
    """A connection in autocommit mode. It never creates the file: a deleted database must not come back empty."""

    stream = sqlite3.Connection.execute  # other engines would read all rows before the first is used

    def __init__(self, path: Path, query_only: bool = False, mode: str = "rw"):
        super().__init__(f"{path.as_uri()}?mode={mode}", uri=True, timeout=BUSY_TIMEOUT,
                         isolation_level=None, check_same_thread=False, cached_statements=CACHED_STATEMENTS)
        self.execute("pragma synchronous = full")  # NORMAL may lose acknowledged commits in a power failure
        self.execute("pragma fullfsync = on")  # on macOS, fsync alone leaves data in the drive's cache
        self.execute("pragma secure_delete = on")  # overwrites what is deleted
        self.execute("pragma journal_size_limit = 16000000")  # bytes that a WAL may keep after its peak
        # In KiB. There is one writer, but as many readers as busy threads.
        self.execute(f"pragma cache_size = {-512 if query_only else -8192}")
        self.execute(f"pragma query_only = {int(query_only)}")

    def begin_writing(self, shared: bool) -> Any:
        """Begins a transaction that writes. Other engines may run `shared` ones of different apps side by side. Returns
        the version of the database for KnownRows.begin(); None makes that forget everything."""
        self.execute("begin immediate")  # a lock taken later may fail at once instead of waiting
        return self.pragma("data_version") if shared else None

    def lock_apps(self, key_hashes: Sequence[bytes]) -> None:
        """In a shared transaction, waits for other writers to the apps of these keys. In SQLite there are none."""

    def reserve_seqs(self, now: int, count: int, known: KnownRows) -> int:
        """Reserves `count` consecutive seqs that were never given before; returns the first."""
        limit = seq_at(now + DAY)  # higher ones were given while the clock was fast
        if not known.given or abs(limit - known.given[2]) > seq_at(HOUR):  # the clock was set, or time passed
            known.given = *self.execute("""
                select coalesce(max(seq), 0), (select min(first) from given_seqs where last >= :limit) from (
                    select max(seq) as seq from crashes where seq < :limit
                    union all select max(seq) from events where seq < :limit
                    union all select max(last) from given_seqs where last < :limit) as given
                """, {"limit": limit}).fetchone(), limit
        last, next_range, asked_limit = known.given
        first: int = max(last + 1, random_seq(now))
        while next_range and first + count > next_range and (overlap := self.execute(
                "select last from given_seqs where first < ? and last >= ?", (first + count, first)).fetchone()):
            first = overlap[0] + 1
        # After a gap of over a day, a new range begins, so that a fast clock does not make one cover years.
        if not self.execute("""
                update given_seqs set last = ? where first = (
                    select max(first) from given_seqs where last between ? and ?)
                """, (first + count - 1, first - seq_at(DAY), first)).rowcount:
            self.execute("insert into given_seqs values (?, ?)", (first, first + count - 1))
        known.given = first + count - 1, next_range, asked_limit
        return first

    def try_to_write(self) -> None:
        """Raises an error if the disk has no room for a report."""
        self.run_script("create table trial (a);\ninsert into trial values (zeroblob(100000));\ndrop table trial")

    def append(self, table: str, columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> None:
        """Inserts new rows into a table."""
        write_rows(self, f"insert into {table} ({', '.join(columns)}) values *", rows)

    def run_script(self, script: str) -> None:
        """Runs statements that each end a line with a semicolon. executescript() would commit the transaction first."""
        for statement in script.split(";\n"):
            self.execute(statement)

    def pragma(self, name: str) -> Any:
        """The first value of a pragma."""
        return self.execute(f"pragma {name}").fetchone()[0]


def get_state(db: sqlite3.Connection, name: str, default: int) -> int:
    """A value from the table `state`, or the default."""
    return int((db.execute("select value from state where name = ?", (name,)).fetchone() or (default,))[0])


def last_deleted_seq(db: sqlite3.Connection) -> int:
    """The highest seq that expired or was deleted early; 0 if none was."""
    return int(db.execute("""
        select coalesce(max(value), 0) from state where name like 'expired%' or name like 'early%'""").fetchone()[0])


def megabytes(size: int) -> str:
    """A number of bytes, as an operator reads it."""
    return f"{size / 1e6:,.1f} MB"


def _wal_size(path: Path) -> int:
    wal = Path(f"{path}-wal")
    return wal.stat().st_size if wal.exists() else 0


# == Migrations ================================================================
# Makes the tables, or brings those of an older schema up to date.

def check_compatible(db: Connection, path: Path) -> None:
    """Raises StoreError if the file belongs to another application or to a newer backfeedr."""
    version = db.pragma("user_version")
    is_empty = not version and not db.pragma("schema_version")
    if not is_empty and db.pragma("application_id") != APPLICATION_ID:
        raise StoreError(f"{path} is a database, but not one of backfeedr's{DB_PATH_HINT}")
    if version > SCHEMA_VERSION:
        raise StoreError(f"{path} was made by a newer backfeedr (schema {version}; this one knows {SCHEMA_VERSION})")
    if 0 < version < 7 and sqlite3.sqlite_version_info < (3, 35, 5):  # older ones may damage a file that loses a column
        raise StoreError(f"to upgrade {path}, SQLite 3.35.5 or later is needed; this Python has"
                         f" {sqlite3.sqlite_version}: export its reports with the backfeedr that made it")


# The tables of earlier schemas that new ones replace. Of schema 2, these are all tables that count reports.
_REPLACED = {2: ("devices", "sessions", "hours", "days", "durations", "releases", "release_days", "labels", "groups",
                 "group_hours"),
             4: ("groups", "builds", "releases", "group_devices", "group_sums")}
# What older tables lack, by the first schema that has it.
_ADDED_COLUMNS = {4: """
alter table crashes add column clock_ahead_ms integer not null default 0;
alter table crashes add column other integer not null default 0;
alter table crashes add column session_id text;
alter table crashes add column images text;
alter table events add column clock_ahead_ms integer not null default 0;
alter table events add column other integer not null default 0;
""", 7: "".join(f"""
alter table {table} add column seq_ahead_ms integer not null default 0;
update {table} set seq_ahead_ms = (seq >> 20) - received_at where received_at <> seq >> 20;
alter table {table} drop column received_at;
alter table {table} add column received_at integer generated always as ((seq >> 20) - seq_ahead_ms) virtual;
""" for table in TABLES.values())}
# Sums of schema 2 that outlive their reports: for each table, its columns after app_id.
_SUMS_OF_2 = {
    "crash_days": "day, crashes from old_days", "session_days": "day, sessions, ended, session_ms from old_days",
    "active_days": "day, dau, wau, mau from old_days", "device_hours": "hour, devices from old_hours",
    "cohorts": "day, newcomers, back_1, back_7, back_30 from old_days",
    "durations": "day, seconds, sessions from old_durations",
    "release_sums": "app_version, sessions, 0, crashes, devices, crashed_devices from old_releases"}


def migrate(db: Connection, version: int) -> None:
    """Makes the tables, or brings those of an older schema up to date, in the current transaction."""
    if version == 3:
        raise StoreError("schema 3 was never released: export its reports with the backfeedr that made it")
    if version:
        log.warning("upgrading the database from schema %s to %s", version, SCHEMA_VERSION)
    version = 2 if version == 1 else version  # 1 lacks only the table `grants`
    replaced = _REPLACED.get(version, ())
    db.run_script("drop index if exists crashes_by_group;\ndrop index if exists crashes_by_device;\n"
                  + "".join(f"alter table {table} rename to old_{table};\n" for table in replaced)
                  + "".join(script for schema, script in _ADDED_COLUMNS.items() if 0 < version < schema)
                  + "drop view if exists releases;\n"
                  + (re.sub("create (table|index)", r"create \1 if not exists", SCHEMA) if version else SCHEMA))
    if 4 <= version < 7:  # lists the groups from their first crash again
        db.run_script("alter table regroupings drop column received_at;\nupdate regroupings set seq = 0")
    if version == 2:
        _recount_2(db)
    elif version == 4:
        _complete_4(db)
    if replaced:
        db.execute("""
            insert into builds select app_id, app_version, '', first_seen, last_seen from old_releases where app_id > 0
            on conflict (app_id, app_version, build_number) do update set
                first_seen = min(builds.first_seen, excluded.first_seen),
                last_seen = max(builds.last_seen, excluded.last_seen)""")
    db.run_script("".join(f"drop table old_{table};\n" for table in replaced))


def _recount_2(db: Connection) -> None:
    """Counts all reports of schema 2 again. If some have expired, lasting sums stay at least as high as they were."""
    recount(db)
    groups = RollUps(db, 0).figures[Groups]
    for app_id, group_hash in db.execute("select app_id, group_hash from groups").fetchall():
        groups.show_latest(app_id, group_hash)
    if any(get_state(db, "expired_" + table, -1) >= 0 for table in TABLES.values()):
        for table, source in _SUMS_OF_2.items():
            sums = SUMS[table].columns
            db.execute(f"""
                insert into {table} select app_id, {source} where app_id > 0
                on conflict ({", ".join(PRIMARY_KEYS[table])}) do update set
                    {", ".join(f"{name} = max({table}.{name}, excluded.{name})" for name in sums)}""")
            db.execute(f"delete from {table} where {' + '.join(sums)} = 0")
    db.execute("delete from state where name = 'recent_since'")


def _complete_4(db: Connection) -> None:
    """Counts what schema 4 did not count: the crashes and devices of groups, and when each build was last seen. (A
    figure with SUMS is counted in RollUps, whose save() writes these.)"""
    db.execute("insert into groups select *, 0, 0, 0 from old_groups")
    db.execute("insert into builds select *, first_seen from old_builds")
    Groups.recount(db)
    releases = RollUps(db, 0).figures[Releases]
    for page in _pages_to_count(db, Crash):
        releases.count(Crash, page, 1)
    releases.save()


def recount(db: sqlite3.Connection) -> None:
    """Counts all reports again, into empty tables."""
    newest = [db.execute(f"select coalesce(max({RECEIVED_AT}), 0) from {table}").fetchone()[0]
              for table in TABLES.values()]
    # The end of all windows. Files of earlier versions have no counted_at.
    now = max(*newest, get_state(db, "counted_at", (get_state(db, "trimmed_day", -1) + 1) * DAY))
    for kind in TABLES:
        for page in _pages_to_count(db, kind):
            rollups = RollUps(db, now)
            rollups.count(kind, page, 1)
            rollups.save()
    Groups.recount(db)
    while RollUps(db, now).trim():
        pass


def _pages_to_count(db: sqlite3.Connection, kind: type[Any]) -> Iterator[CountedReports]:
    """All reports of a kind, as the figures see them, except those of deleted apps."""
    page = CountedReports()
    while page := counted_rows(db, kind, f"""
            from {TABLES[kind]} where seq > ? and app_id in (select id from apps) order by seq limit 1000
            """, [(page[-1].seq if page else -1,)]):
        yield page


# == Database ==================================================================
# One file with these tables: how it is opened, read and written.

UPGRADE_TIMEOUT = 3600  # seconds to wait while another process upgrades the tables; for a gigabyte, it needs 30
PAUSE_FACTOR = 2  # the pause after a step is this many times as long as the step
PAGE_CHARACTERS = 1_000_000  # of text in a page of an export or a list: a row may be as large as a body


class Process:
    """What one process keeps of a store. No connection may be used on the other side of a fork."""

    def __init__(self) -> None:
        self.write_lock = threading.Lock()
        self.writer: Any = None
        self.readers: list[Any] = []  # the idle ones
        self.known = KnownRows()  # write_lock guards it
        self.active_keys: set[bytes] = set()  # hashes of keys that were active when they were looked up
        self.queue_lock = threading.Lock()  # guards the next two, and the content of the queue
        self.queue: CommitQueue | None = None  # the one that submissions may join
        self.last_queue_length = 0  # of the queue before it
        self.commit_lock = threading.Lock()
        self.commits, self.committed_requests, self.commit_seconds = 0, 0, 0.0
        self.stored = Counter(crashes=0, events=0)
        self.upkeep_lock = threading.Lock()
        self.worker_lock, self.next_worker = threading.Lock(), threading.Lock()  # of catch_up_in_background

    def close_writer(self) -> None:
        self.known.clear()
        if self.writer:
            self.writer.close()
            self.writer = None

    def fold_in_wal(self) -> None:
        """Folds in the WAL of a file that was moved, if no other program reads it, and closes the writer. SQLite itself
        would leave the WAL, and that would corrupt the file that takes the place."""
        with suppress(sqlite3.Error, AttributeError):  # there may be no writer
            timeout = self.writer.pragma("busy_timeout")
            self.writer.execute("pragma busy_timeout = 0")
            is_busy, *_ = self.writer.execute("pragma wal_checkpoint(truncate)").fetchone()
            self.writer.execute(f"pragma busy_timeout = {timeout}")
            if not is_busy:  # only once: the next WAL there is that of a server that has opened the new file
                self.close_writer()

    @property
    def waiting(self) -> list[Submission]:
        queue = self.queue
        return queue.submissions if queue else []


class Database(Closing):
    """A file with the tables of this server. Thread-safe; works on both sides of a fork.

    Raises StoreError if the file cannot be opened or is not a database of backfeedr. Every method may raise
    StorageUnavailable. `clock` returns seconds since 1970. A subclass of Store for another engine
    (examples/postgres.py) replaces what only SQLite has: `Error`, `Outage`, _open, _connect, _require_same_file,
    _unavailable, reading, writing, close, _shrink, _fold_in_wal, size, warnings and vitals; and its connections have
    the methods of Connection.
    """

    Error: type[Exception] = sqlite3.Error  # the base of all errors of a connection
    Outage: type[Exception] = sqlite3.OperationalError  # what every write would meet: a lock, a full disk

    def __init__(self, path: str, clock: Callable[[], float] = time.time, may_create: bool = True):
        self._clock = clock
        self._closed, self._write_error, self._passed_error, self._last_error = False, "", "", ("", 0.0)
        # By process id. A child keeps its parent's connections here untouched: closing them would harm the parent.
        self._processes: dict[int, Process] = {}
        self._open(path, may_create)

    def _open(self, path: str, may_create: bool) -> None:
        self._given_path = os.path.abspath(path)
        self.path = Path(os.path.realpath(path))  # if it is a link, SQLite puts the WAL beside the file
        _prepare_file(self.path, may_create)
        self._file_status = os.stat(self.path)

    def close(self) -> None:
        """Closes this process's connections, which folds in the WAL. May be called twice."""
        self._closed = True
        with self._process.write_lock:
            self._process.fold_in_wal()
            while self._process.readers:
                self._process.readers.pop().close()
            self._process.close_writer()  # last, because a reader cannot fold in the WAL

    @property
    def now(self) -> int:
        """The time, in milliseconds since 1970 UTC."""
        return int(self._clock() * SECOND)

    @property
    def _process(self) -> Process:
        """The connections and other state of the current process."""
        pid = os.getpid()
        return self._processes.get(pid) or self._processes.setdefault(pid, Process())

    def _connect(self, query_only: bool = False) -> Connection:
        self._require_same_file()
        db = Connection(self.path, query_only)
        if not query_only:
            db.execute("pragma journal_mode = wal")  # a restored backup has another
        return db

    def _require_same_file(self) -> None:
        """Raises sqlite3.Error if the file is gone or replaced: the old file's WAL would corrupt the new one."""
        if self._closed:
            raise sqlite3.ProgrammingError("the store is closed")
        with suppress(OSError):  # a link that was given may lead elsewhere now; realpath() would take ten times as long
            if all(os.path.samestat(os.stat(path), self._file_status) for path in (self.path, self._given_path)):
                return
        raise sqlite3.OperationalError(f"{self.path} was moved or replaced since the start")

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection that cannot write. Only for short reads: the WAL grows as long as one is open."""
        process, db, is_reusable = self._process, None, False
        try:
            with suppress(IndexError):  # if no reader is idle
                db = process.readers.pop()
            db = db or self._connect(query_only=True)
            yield db
            is_reusable = not self._closed
        except self.Error as error:
            raise self._unavailable("read", error) from error
        finally:
            if is_reusable:
                process.readers.append(db)
            elif db:
                db.close()

    def _pages(self, query: str, after: int, *parameters: Any) -> Iterator[Sequence[Row]]:
        """The rows of a query, of which the first column is the seq, in pages: one long read would keep the WAL
        growing. The parameters of the query are the seq after which a page begins, the given ones, and a limit."""
        while True:
            with self.reading() as db, closing(db.stream(query, (after, *parameters, STEP_ROWS))) as rows:
                page = list(rows_that_fit(rows, PAGE_CHARACTERS, text_size))
            if not page:
                return
            yield page
            after = page[-1][0]

    @contextmanager
    def writing(self, shared: bool = False) -> Iterator[Connection]:
        """The process's one writing connection, in a transaction that is durable at the end."""
        process = self._process
        with process.write_lock:
            try:
                self._require_same_file()
            except self.Error as error:  # the writer stays open until its WAL can be folded in
                process.fold_in_wal()
                raise self._unavailable("write", error) from error
            try:
                db = process.writer = process.writer or self._connect()
                process.known.begin(db.begin_writing(shared))
                yield db
                db.execute("commit")
                process.known.end()
            except BaseException as error:
                # Closing rolls back. SQLite may have done so itself, and then each statement would be a transaction.
                process.close_writer()
                if isinstance(error, (self.Error, MemoryError)):
                    raise self._unavailable("write", error) from error
                raise

    @contextmanager
    def writing_step(self) -> Iterator[Connection]:
        """One of many short transactions. The pause after it lets other processes write: they poll for SQLite's lock,
        and would seldom get it from a process that takes it again at once."""
        with self.writing() as db:
            began = time.monotonic()
            yield db
        time.sleep(PAUSE_FACTOR * (time.monotonic() - began))

    def _repeat_step(self, step: Callable[[Connection], Counter[str]],
                     prepare: Callable[[], Any] = lambda: None) -> Counter[str]:
        """Repeats `prepare` and a step in its own transaction until that returns no counts; returns the sum of all."""
        total: Counter[str] = Counter()
        while not self._closed:
            prepare()
            with self.writing_step() as db:
                counts = step(db)
            if not counts:
                break
            total += counts
        return total

    def _unavailable(self, verb: str, error: Exception) -> StorageUnavailable:
        """Logs an error, unless it was the last one, less than a minute ago; returns the exception to raise. After a
        write that failed for another reason than a lock, `check` makes trial writes until one succeeds or reports are
        stored again."""
        text, now = str(error) or type(error).__name__, self._clock()
        if text != self._last_error[0] or now > self._last_error[1] + 60:
            log.error("cannot %s the database: %s", verb, text)
        self._last_error = text, now
        if verb == "write" and "locked" not in text:
            self._write_error = text
        return StorageUnavailable()

    def _check_clock(self) -> None:
        if not EARLIEST_PLAUSIBLE < self.now < MAX_NUMBER >> SEQ_BITS:
            today = iso_day(self.now // DAY)  # no time, so that it is logged once
            raise self._unavailable("use", ValueError(f"the clock of this host says {today}: set it"))

    def check(self) -> None:
        """Raises StorageUnavailable if the clock is wrong, if reading fails, or if the last write and a trial fail. If
        an error comes again although a trial has passed, such as a damaged page, the next trial is a minute later."""
        self._check_clock()
        with self.reading() as db:
            self._require_same_file()
            db.execute("select 1 from apps").fetchone()
        if self._write_error:
            if self._write_error == self._passed_error and abs(self._clock() - self._last_error[1]) < 60:
                raise StorageUnavailable
            with self.writing() as db:
                db.try_to_write()
            self._passed_error, self._write_error = self._write_error, ""

    @property
    def size(self) -> int:
        """The size of the database without its WAL, in bytes."""
        return self.path.stat().st_size

    def used_size(self, db: Connection) -> int:
        """The size of the database without its free pages, in bytes."""
        return int((db.pragma("page_count") - db.pragma("freelist_count")) * db.pragma("page_size"))

    def _shrink(self) -> None:
        """Returns the space of deleted rows to the disk."""
        with self.reading() as db:
            free_pages = db.pragma("freelist_count")
        for _ in range(0, free_pages, STEP_ROWS):
            with self.writing_step() as db:
                for _ in range(STEP_ROWS):  # page by page: some Pythons end a longer pragma after its first page
                    db.execute("pragma incremental_vacuum(1)").fetchall()
        self._fold_in_wal()

    def _fold_in_wal(self) -> None:
        with self.reading() as db:
            is_busy, *_ = db.execute("pragma wal_checkpoint(truncate)").fetchone()
        if is_busy:
            log.warning("the WAL keeps deleted data until another program ends its read of the database")


def _prepare_file(path: Path, may_create: bool) -> None:
    """Creates the file and its tables if they are missing, and upgrades an old schema. Raises StoreError, and changes
    nothing, if the file is something else."""
    if not may_create and not os.path.exists(path):
        raise StoreError(f"there is no database {path}{DB_PATH_HINT}")
    check_sqlite()
    began = time.monotonic()
    try:
        with suppress(FileExistsError):  # only SQLite may open an existing file: closing it here would drop its locks
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        while True:
            try:
                return _prepare_tables(path)
            except sqlite3.OperationalError as error:
                if "locked" not in str(error):
                    raise  # at once: a second look could fail in another way, and hide this
                is_upgrading = _needs_upgrade(path)
                if time.monotonic() > began + (UPGRADE_TIMEOUT if is_upgrading else BUSY_TIMEOUT):
                    raise
                if is_upgrading:
                    log.warning("waiting for another process, which may be upgrading the database")
                time.sleep(0.01)  # SQLite does not wait for a lock when it changes to WAL
    except (OSError, sqlite3.Error) as error:
        reason = (f"there is no folder {path.parent}" if isinstance(error, FileNotFoundError)
                  else "it is a folder" if os.path.isdir(path) else getattr(error, "strerror", error))
        hint = DB_PATH_HINT if type(error) is sqlite3.DatabaseError else ""  # not a database; a lock raises a subclass
        raise StoreError(f"cannot open the database {path}: {reason}{hint}") from None


def check_sqlite() -> str:
    """The version of SQLite. Raises StoreError if it is too old."""
    if sqlite3.sqlite_version_info < (3, 32):  # older ones take at most 999 values in a statement
        raise StoreError(f"SQLite 3.32 or later is needed; this Python has {sqlite3.sqlite_version}")
    return sqlite3.sqlite_version


def _needs_upgrade(path: Path) -> bool:
    with closing(Connection(path)) as db:
        return 0 < int(db.pragma("user_version")) < SCHEMA_VERSION


def _prepare_tables(path: Path) -> None:
    with closing(Connection(path)) as db:
        check_compatible(db, path)
        if db.pragma("user_version") == SCHEMA_VERSION:
            return
        if not db.pragma("user_version"):
            db.execute("pragma auto_vacuum = incremental")
            db.execute("pragma journal_mode = wal")
        db.execute("begin immediate")
        check_compatible(db, path)  # again: it may have waited for a newer one
        if (version := db.pragma("user_version")) < SCHEMA_VERSION:  # another process may have been faster
            migrate(db, version)
        db.execute(f"pragma application_id = {APPLICATION_ID}")
        db.execute(f"pragma user_version = {SCHEMA_VERSION}")
        db.execute("commit")


# == Apps ======================================================================
# Apps, their keys, and the secrets that let in an admin or a reader of the feed.

class App(NamedTuple):
    """An app. `keys` counts its active keys; `created_at` is in milliseconds."""

    name: str
    is_test: bool
    created_at: int
    keys: int


class Key(NamedTuple):
    """What is known of an API key. The first two times are in milliseconds; `hash` is its SHA-256 in hex."""

    prefix: str
    app: str
    created_at: int
    revoked_at: int | None  # None: it is active
    hash: str
    last_used: int | None = None  # UTC day of its last request; None if there was none in the last 90 days
    requests: int = 0  # in the last seven UTC days, including today


def key_name(key_hash: bytes) -> str:
    """The name under which the requests of a key are counted."""
    return bytes(key_hash).hex()[:16]


class Apps(Database):
    """A database of apps, their keys, and the secrets of the admin and of the feed."""

    retention_days, max_db_size = 0, 0  # see Store

    def start(self, api_key: str = "", auth_token: str = "") -> tuple[str | None, str | None]:
        """Stores the given API key, for the app `default`, and the given admin token. Without a given one, generates a
        key if there is no app, and a token if none is stored. Returns the generated key and token, else None."""
        key = generated_token = None
        with self.writing() as db:
            db.execute(SET_STATE, ("retention_days", self.retention_days))  # for commands that are not given it
            if get_state(db, "grouping_version", 1) < GROUPING_VERSION:
                db.execute("""
                    insert into regroupings select app_id, group_hash, 0, '' from groups where true
                    on conflict (app_id, group_hash) do update set seq = 0""")
                db.execute(SET_STATE, ("grouping_version", GROUPING_VERSION))
            apps = {name for name, in db.execute("select name from apps").fetchall()}
            stored_key = db.execute("select revoked_at from keys where key_hash = ?", (sha256(api_key),)).fetchone()
            if stored_key and stored_key[0]:
                log.warning("BACKFEEDR_API_KEY was revoked, and stays revoked")
            elif not stored_key and (api_key or not apps):
                if "default" not in apps:
                    self._insert_app(db, "default", False)
                key = self._insert_key(db, "default", api_key or new_key(False))
            stored_token = db.execute("select hash from secrets where name = 'admin_token'").fetchone()
            if not stored_token and not auth_token:
                auth_token = generated_token = "bf_admin_" + secrets.token_hex(16)
            if auth_token and stored_token != (sha256(auth_token),):
                db.execute(SET_SECRET, ("admin_token", sha256(auth_token)))
                db.execute("delete from grants")  # they stand for the old token
        return None if api_key else key, generated_token

    def secret_hash(self, name: str) -> bytes:
        """The SHA-256 of `admin_token` or `feed_token`; b"" if there is none."""
        with self.reading() as db:
            row = db.execute("select hash from secrets where name = ?", (name,)).fetchone()
        return row[0] if row else b""

    def is_secret(self, name: str, token: bytes) -> bool:
        """Whether this is the stored `admin_token` or `feed_token`."""
        return hmac.compare_digest(self.secret_hash(name), sha256(token))

    def create_feed_token(self) -> str:
        """Creates a token of the feed, which replaces an earlier one; returns it. Only its hash is stored."""
        token = "bf_feed_" + secrets.token_hex(16)
        with self.writing() as db:
            db.execute(SET_SECRET, ("feed_token", sha256(token)))
        return token

    def revoke_feed_token(self) -> None:
        """Closes the feed to everyone until another token is created."""
        with self.writing() as db:
            db.execute("delete from secrets where name = 'feed_token'")

    def grant(self, kind: str, lifetime: int) -> str:
        """Creates a secret that replaces the admin token for one kind of use and `lifetime` ms; returns it."""
        secret = secrets.token_hex(16)
        with self.writing() as db:
            db.execute("delete from grants where expires_at <= ?", (self.now,))
            db.execute("insert into grants values (?, ?)", (sha256(kind + secret), self.now + lifetime))
        return secret

    def is_granted(self, kind: str, secret: str) -> bool:
        """Whether the secret was granted for this kind of use, and is still valid."""
        with self.reading() as db:
            return db.execute("select 1 from grants where hash = ? and expires_at > ?",
                              (sha256(kind + secret), self.now)).fetchone() is not None

    def withdraw(self, kind: str, secret: str) -> bool:
        """Ends a grant; returns whether it was valid."""
        if not self.is_granted(kind, secret):  # a stranger's guess must not take the lock
            return False
        with self.writing() as db:
            return db.execute("delete from grants where hash = ?", (sha256(kind + secret),)).rowcount > 0

    def is_cached_key(self, key_hash: bytes) -> bool:
        """Whether the key was active when it was last looked up. Does not read the database."""
        return key_hash in self._process.active_keys

    def is_active_key(self, key_hash: bytes) -> bool:
        """Looks up whether the key with this SHA-256 is active, and remembers it for is_cached_key()."""
        with self.reading() as db:
            is_active = db.execute("select 1 from keys where key_hash = ? and revoked_at is null",
                                   (key_hash,)).fetchone() is not None
        (self._process.active_keys.add if is_active else self._process.active_keys.discard)(key_hash)
        return is_active

    def create_app(self, name: str, is_test: bool = False) -> str:
        """Creates an app; returns its first key, stored only as a hash. Raises StoreError for a bad or taken name."""
        with self.writing() as db:
            self._insert_app(db, name, is_test)
            return self._insert_key(db, name, new_key(is_test))

    def _insert_app(self, db: Connection, name: str, is_test: bool) -> None:
        if name != name.strip() or not 1 <= len(name) <= 100 or not name.isprintable():
            raise StoreError("an app's name is 1 to 100 printable characters, without a space at either end")
        if not db.execute("insert into apps (name, is_test, created_at) values (?, ?, ?) on conflict do nothing",
                          (name, is_test, self.now)).rowcount:
            raise StoreError(f"there is an app named {name!r} already, to which you can add a key")

    def create_key(self, app: str) -> str:
        """Creates another key; returns it, as only its hash is stored. Raises StoreError if there is no such app."""
        with self.writing() as db:
            return self._insert_key(db, app, new_key(self.find_app(db, app)[1]))

    def _insert_key(self, db: Connection, app: str, key: str) -> str:
        db.execute("insert into keys (key_hash, app_id, prefix, created_at) values (?, ?, ?, ?)",
                   (sha256(key), self.find_app(db, app)[0], key_prefix(key), self.now))
        return key

    @staticmethod
    def find_app(db: Connection, name: str) -> tuple[int, bool]:
        """The id of an app, and whether it is a test app. Raises StoreError if there is no such app."""
        row = db.execute("select id, is_test from apps where name = ?", (name,)).fetchone()
        if row is None:
            raise StoreError(f"there is no app named {name!r}")
        return row[0], bool(row[1])

    def apps(self) -> list[App]:
        """All apps, by name."""
        with self.reading() as db:
            return [App(name, bool(is_test), *rest) for name, is_test, *rest in db.execute("""
                select name, is_test, created_at,
                    (select count(*) from keys where app_id = apps.id and revoked_at is null)
                from apps order by name""")]

    def keys(self) -> list[Key]:
        """All keys, the oldest first."""
        with self.reading() as db:
            usage = {name: counts for name, *counts in db.execute("""
                select key, max(day), sum(case when day > ? then requests else 0 end) from key_days group by key
                """, (self.now // DAY - WEEK_DAYS,))}
            return [Key(prefix, app, created_at, revoked_at, bytes(key_hash).hex(),
                        *usage.get(key_name(key_hash), (None, 0)))
                    for key_hash, prefix, app, created_at, revoked_at in db.execute("""
                        select key_hash, prefix, name, keys.created_at, revoked_at from keys
                        join apps on apps.id = app_id order by keys.created_at, prefix""")]

    def revoke_key(self, key: str) -> Key:
        """Revokes the one active key that has this prefix or hash, or is this key; returns it. Raises StoreError, also
        for a short prefix: nobody can send with a key that was revoked by mistake, and phones cannot get another."""
        prefix = key[:-3] if key.endswith("...") else key  # `key list` prints prefixes with an ellipsis
        is_long = len(prefix) >= (12 if prefix.startswith("bf_") else 4)  # 4 after bf_live_ or bf_test_
        matches = [stored for stored in self.keys() if stored.revoked_at is None and prefix and (
            stored.prefix.startswith(prefix) and (is_long or stored.prefix == prefix)
            or stored.hash in (prefix, sha256(prefix).hex()))]
        if len(matches) != 1:
            raise StoreError(f"{prefix!r} names {len(matches) or 'no'} active keys; give its first 12 characters, or"
                             " more: see 'key list'")
        with self.writing() as db:
            db.execute("update keys set revoked_at = ? where key_hash = ?", (self.now, bytes.fromhex(matches[0].hash)))
        return matches[0]._replace(revoked_at=self.now)


# == Commit ====================================================================
# How reports become rows. Requests that arrive together share one transaction, so one fsync serves them all: the first
# thread opens a queue and commits it; threads that come before the transaction begins join the queue and wait. In our
# own server, a thread brings all requests that _Dispatcher has gathered.

class Idempotency(NamedTuple):
    """How a repeated request is recognized. All values are digests; without any, a repetition is not recognized."""

    marks: tuple[bytes, ...] = ()  # any of them shows that a request was seen before
    request: bytes = b""  # of path and body: shows that it is the same request


class Receipt(NamedTuple):
    """What is durable: the seqs of a request's reports, and whether an earlier request stored them."""

    seqs: range
    replayed: bool


@dataclass(eq=False)
class Submission:
    """The reports of one request on their way to the disk, and the outcome: a receipt or an error."""

    key_hash: bytes = b""
    reports: Reports = ()
    idempotency: Idempotency = Idempotency()
    error: Exception | None = None
    receipt: Receipt | None = None

    def result(self) -> Receipt:
        """The receipt. Raises the error if there is one, and drops it: its traceback refers to the request, and this
        cycle would keep megabytes until the garbage collector runs."""
        if self.error is not None:
            try:
                raise self.error
            finally:
                self.error = None
        assert self.receipt is not None
        return self.receipt


class CommitQueue:
    """The submissions that one commit stores."""

    def __init__(self, submissions: Sequence[Submission] = ()) -> None:
        self.submissions = list(submissions)
        # Held until the queue is as long as the last one: then most clients have sent again. An Event is slower.
        self.grown = threading.Lock()
        self.grown.acquire()
        self.thread_locks: list[threading.Lock] = []  # one per waiting thread: one Event for all is 10 % slower

    def join(self, submissions: Sequence[Submission], max_waiters: int, max_rows: int) -> None:
        """Adds submissions. Those that find no room get an error."""
        rows = sum(len(queued.reports) for queued in self.submissions)
        for submission in submissions:
            is_too_much = self.submissions and rows + len(submission.reports) > max_rows  # one alone may exceed it
            if len(self.submissions) >= max_waiters or is_too_much:
                submission.error = StorageUnavailable()
            else:
                self.submissions.append(submission)
                rows += len(submission.reports)


class Commit:
    """The reports of one transaction, and the rows that change with them."""

    def __init__(self, db: Connection, now: int, known: KnownRows | None = None):
        self._db, self._now, self._symbols, self._known = db, now, Symbols(db), known or KnownRows()
        self._replays: list[tuple[Any, ...]] = []  # new rows of the table `replays`
        self._key_uses: dict[tuple[int, bytes], int] = defaultdict(int)  # requests by app and key
        self._to_move: set[str] = set()  # groups with crashes that belong to others
        # By app_id and kind: seqs, times of receipt, how far the clocks were ahead, reports. Columns, because a tuple
        # for each report would set off the garbage collector.
        self._columns: dict[tuple[int, Any], tuple[list[Any], ...]] = defaultdict(lambda: ([], [], [], []))

    def add_submissions(self, submissions: Sequence[Submission]) -> None:
        """Adds requests. Gives each a receipt, which is valid once the transaction ends, or an error."""
        self._db.lock_apps([submission.key_hash for submission in submissions])
        apps = self._known.app_of_key
        apps.update(rows_of(self._db, """
            select key_hash, app_id from (values *) as given cross join keys on key_hash = column1
            where revoked_at is null""", list({(submission.key_hash,) for submission in submissions
                                               if submission.key_hash not in apps})))
        for submission in submissions:
            if submission.key_hash not in apps:
                submission.error = Refusal("invalid API key")
        accepted = [(apps[submission.key_hash], submission) for submission in submissions if not submission.error]
        total = sum(len(submission.reports) for _, submission in accepted)
        seq = self._db.reserve_seqs(self._now, total, self._known) if total else 0
        known = self._known_requests({(app_id, mark) for app_id, submission in accepted
                                      for mark in submission.idempotency.marks})
        for app_id, submission in accepted:
            marks, request = submission.idempotency
            earlier = next((known[app_id, mark] for mark in marks if (app_id, mark) in known), None)
            if earlier and earlier[0] != request:
                submission.error = Refusal("idempotency key reused with a different body")
                continue
            self._symbols.max_lookups = self._symbols.lookups + REQUEST_LOOKUPS  # as nobody else can write meanwhile
            submission.reports = reports = self.regrouped(submission.reports)  # also of a replay, for its answer
            seqs = earlier[1] if earlier else range(seq, seq + len(reports))
            if not earlier:
                seq = seqs.stop
                ahead = max([report.occurred_at for report in reports]) - self._now
                ahead = ahead if ahead > MAX_SKEW else 0  # the same for all, so that durations between them stay right
                self.add_reports(app_id, seqs, [self._now] * len(seqs), [ahead] * len(seqs), reports)
            submission.receipt = Receipt(seqs, earlier is not None)
            self._key_uses[app_id, submission.key_hash] += 1
            for mark in marks:
                if (app_id, mark) not in known:
                    known[app_id, mark] = request, seqs  # the same request may come twice in one commit
                    self._replays.append((app_id, mark, request, seqs.start, len(seqs), self._now))

    def _known_requests(self, marks: set[tuple[int, bytes]]) -> dict[tuple[int, bytes], tuple[bytes, range]]:
        """The stored requests with these apps and marks: the digest and the seqs of each."""
        return {(app_id, bytes(mark)): (bytes(request), range(first, first + count))
                for app_id, mark, request, first, count in rows_of(self._db, """
                    select app_id, mark, request, first_seq, reports from (values *) as given
                    cross join replays on app_id = column1 and mark = column2""", list(marks))}

    def regrouped(self, reports: Reports) -> Reports:
        """The reports, with each crash in the group that follows from the stored symbols. If that needs more look-ups
        than are allowed, upkeep moves the others later."""
        done: list[Any] = []  # list[Any]() would take 30 times as long
        for report in reports:
            if type(report) is Crash and self._symbols.can_name(report.images):
                report = report._replace(group_hash=self._symbols.group_of(
                    json.loads(report.stack_trace), report.exception_type, report.group_hash,
                    is_trace_cut(report.extra)))
                if self._symbols.lookups >= self._symbols.max_lookups:
                    self._to_move.add(report.group_hash)
            done.append(report)
        return done

    def add_reports(self, app_id: int, *columns: Sequence[Any]) -> None:
        """Adds reports of an app in the order of their seqs, as columns (see __init__)."""
        kinds = list(map(type, columns[-1]))
        for kind in TABLES:  # both, so that crashes are always counted first
            stored, added = self._columns[app_id, kind], kinds.count(kind)
            for column, values in zip(stored, columns) if added else ():
                column.extend(values if added == len(kinds) else compress(values, [kind is other for other in kinds]))

    def save(self) -> Counter[str]:
        """Writes the rows and the figures; returns the number of new rows in each table of reports."""
        rollups = RollUps(self._db, self._now, self._symbols, self._known)
        stored: Counter[str] = Counter()
        crashes: list[Any] = []
        for (app_id, kind), (seqs, received, ahead, sent) in self._columns.items():
            if not seqs:
                continue
            table = TABLES[kind]
            flags, reports = rollups.names.limit(app_id, received, sent)
            is_one_time = len({seqs[0] >> SEQ_BITS, seqs[-1] >> SEQ_BITS, *received}) == 1  # nearly always
            seq_ahead = () if is_one_time else list(map(sub, map(rshift, seqs, repeat(SEQ_BITS)), received))
            # Columns of zeros are left out: binding them costs 2 % of a batch.
            own_columns = {"seq": seqs, "app_id": repeat(app_id), **{name: values for name, values in (
                ("seq_ahead_ms", seq_ahead), ("clock_ahead_ms", ahead), ("other", flags)) if any(values)}}
            new = counted_reports(kind, app_id, seqs, received, ahead, flags, reports)
            rollups.count(kind, new, 1)  # before the insert, because it looks for devices that are new to a group
            self._db.append(table, (*own_columns, *kind._fields), list(map(add, zip(*own_columns.values()), reports)))
            stored[table] += len(new)
            if kind is Crash and self._key_uses:  # an import uses no key; it must not reopen groups or alert anybody
                crashes += new
            if kind is Crash and self._to_move:
                groups = self._to_move.intersection(map(attrgetter("group_hash"), reports))
                upsert(self._db, "regroupings", [(app_id, group, 0, "") for group in groups], "seq = 0")
        write_rows(self._db, "insert into replays values *", self._replays)
        for (app_id, key), uses in self._key_uses.items():
            rollups.changes["key_days"]["requests"][app_id, self._now // DAY, key_name(key)] += uses
        rollups.save()
        if crashes:
            update_triage(self._db, self._now, rollups, crashes)
        return stored


# == Deletion ==================================================================
# Deletes reports, each from its table and from the figures: those that have expired, those of a forgotten device or a
# deleted app, and the oldest of a database that is too large.

STEP_SECONDS = 0.02  # time that a step may take to delete or move reports
EXPIRE_ROWS = 10  # rows to delete before the first look at the clock: a row may be as large as a body
ROW_BYTES = 300  # that a report takes besides its text, about, with its index entries; a replay takes half of it
SAMPLED_BYTES = 50_000_000  # of a larger database, only every second, third, ... report is measured


class LargestApp(NamedTuple):
    """The app that loses rows, which are reports and replays, if the database is too large."""

    id: int = 0         # 0: there are none
    chosen_at: int = 0  # in milliseconds
    rows: int = 0       # that it loses before the largest app is chosen again
    row_bytes: int = 1  # of each, on average


class Deletion(Apps):
    """Apps, and what deletes their reports. A step of upkeep returns counts; none if nothing was left to do."""

    _largest_app = LargestApp()
    _early_seq = -1  # the largest app has no reports up to this one, but other apps may have many

    @property
    def _first_kept_seq(self) -> int:
        """The lowest seq within the retention."""
        return seq_at(self.now - self.retention_days * DAY) if self.retention_days else 0

    def _delete_due(self, db: Connection, size: int) -> Counter[str]:
        """Deletes expired reports; else rows of a deleted app; else, if the database is too large, other reports."""
        deleted: Counter[str] = Counter()
        for kind, table in TABLES.items():
            if seqs := self._delete_reports(db, kind, f"from {table} where seq < ? order by seq limit ?",
                                            [(self._first_kept_seq, size)]):
                db.execute(RAISE_STATE, ("expired_" + table, seqs[-1]))
                deleted[table] = len(seqs)
        return deleted or self._delete_app_rows(db, size) or self._delete_early(db, size)

    @staticmethod
    def _delete_app_rows(db: Connection, size: int) -> Counter[str]:
        """Deletes some rows of a deleted app: first its reports, backwards through the reports of all apps, because
        events have no index on their app; then its rows in the other tables."""
        name, end = db.execute("""
            select name, value from state where name like 'deleted%' limit 1""").fetchone() or ("", 0)
        if not name:
            return Counter()
        app_id = int(name.partition("_")[2])
        first, = db.execute("""
            select min(seq) from (
                select seq from crashes where seq < :end union all select seq from events where seq < :end
                order by seq desc limit :size) as latest""", {"end": end, "size": size}).fetchone()
        if first is not None:
            for table in TABLES.values():  # the + keeps SQLite from looking at all crashes of the app
                db.execute(f"delete from {table} where +app_id = ? and seq >= ? and seq < ?", (app_id, first, end))
            db.execute(SET_STATE, (name, first))
            return Counter(remains=1)
        for table, (_, *rest) in PRIMARY_KEYS.items():
            key = ", ".join(rest)
            if rows := db.execute(f"""
                    delete from {table} where app_id = ? and ({key}) in (
                        select {key} from {table} where app_id = ? limit ?)""", (app_id, app_id, size)).rowcount:
                return Counter(remains=rows)
        return Counter(remains=db.execute("delete from state where name = ?", (name,)).rowcount)

    def _delete_early(self, db: Connection, size: int) -> Counter[str]:
        """If the database is too large, deletes some of the oldest reports of the largest app, and its replays of that
        time. Steps get smaller towards the end, so that little more is deleted than necessary."""
        app, after = self._largest_app, self._early_seq
        if not self.max_db_size or app.rows <= 0 or (excess := self.used_size(db) - self.max_db_size) <= 0:
            return Counter()
        size = min(size, max(EXPIRE_ROWS, excess // app.row_bytes))
        oldest = db.execute("""
            select seq, app_id from crashes where seq > :after
            union all select seq, app_id from events where seq > :after
            union all select first, app_id from (
                select received_at << 20 as first, app_id from replays where received_at > :after >> 20
                order by received_at limit :rows)
            order by seq limit :rows""", {"after": after, "rows": 10 * size}).fetchall()
        if not oldest:
            self._largest_app = LargestApp()
            return Counter()
        of_app = [seq for seq, app_id in oldest if app_id == app.id][:size]
        self._early_seq = of_app[0] - 1 if of_app else oldest[-1][0]  # not of_app[-1]: this step may be rolled back
        if not of_app:
            return Counter(remains=1)
        db.execute(RAISE_STATE, (f"early_{app.id}", of_app[-1]))
        self._largest_app = app._replace(rows=app.rows - len(of_app))
        deleted = Counter({table: len(self._delete_reports(  # +app_id: else SQLite reads the whole app
            db, kind, f"from {table} where +app_id = ? and seq > ? and seq <= ?", [(app.id, after, of_app[-1])]))
            for kind, table in TABLES.items()})
        deleted["replays"] = db.execute(
            "delete from replays where +app_id = ? and received_at >= ? and received_at <= ?",
            (app.id, max(after, 0) >> SEQ_BITS, of_app[-1] >> SEQ_BITS)).rowcount
        return +deleted

    def _choose_largest_app(self) -> bool:
        """Returns whether the database is too large. If so, chooses the largest app: once an hour, because this reads
        all rows, or when the last one has lost a tenth of its reports, because another may be larger by then. Never
        call it in a transaction that writes: it takes a second per gigabyte."""
        if not self.max_db_size:
            return False
        chosen = self._largest_app
        with self.reading() as db:
            used_size = self.used_size(db)
            is_too_large = used_size > self.max_db_size
            if is_too_large and (chosen.rows <= 0 or not 0 <= self.now - chosen.chosen_at < HOUR):
                self._largest_app = self._find_largest_app(db, 1 + used_size // SAMPLED_BYTES)
                self._early_seq = -1
        return is_too_large

    def _find_largest_app(self, db: Connection, step: int) -> LargestApp:
        """The app whose reports and replays take most, judged by each whose seq is a multiple of `step`."""
        sizes = " union all ".join(
            f"select app_id, {ROW_BYTES} + " + " + ".join(f"coalesce(length({name}), 0)" for name in _ABSENT[kind])
            + f" as size from {table} where seq % {step} = 0" for kind, table in TABLES.items())
        sizes += f" union all select app_id, {ROW_BYTES // 2} from replays where first_seq % {step} = 0"
        app_id, name, count, size = db.execute(f"""
            select apps.id, name, count(*), sum(size) from ({sizes}) as reports join apps on apps.id = app_id
            group by apps.id, name order by sum(size) desc, apps.id limit 1""").fetchone() or (0, "", 0, 0)
        if app_id and app_id != self._largest_app.id:
            log.warning("the database exceeds BACKFEEDR_MAX_DB_SIZE: the oldest reports of %s are deleted", name)
        return LargestApp(app_id, self.now, max(EXPIRE_ROWS, step * count // 10), max(1, size // max(1, count)))

    def _delete_reports(self, db: Connection, kind: type, source: str, keys: Any, expired: bool = True) -> list[int]:
        """Deletes the reports of a query, also from the figures; lasting sums keep expired ones. Returns their seqs."""
        if reports := counted_rows(db, kind, source, keys):
            rollups = RollUps(db, self.now)
            write_rows(db, f"delete from {TABLES[kind]} where seq in (values *)", [(report.seq,) for report in reports])
            if expired:
                rollups.expire(kind, reports)
            else:
                rollups.figures[Groups].may_search = MAX_NUMBER  # nothing may describe the group later
                rollups.count(kind, reports, -1)
            rollups.save()
        return [report.seq for report in reports]

    def _note_windows(self, db: Connection) -> None:
        """Notes the end of the windows for `check`: after a deletion, the latest report may be too old to tell it."""
        db.execute(RAISE_STATE, ("counted_at", self.now))

    def _last_seq(self, kind: type[Any]) -> int:
        with self.reading() as db:
            return int(db.execute(f"select coalesce(max(seq), -1) from {TABLES[kind]}").fetchone()[0])

    def forget_device(self, device_id_hash: str) -> Counter[str]:
        """Deletes everything about a device from all apps and figures; returns how many rows, by table. `first_seen` of
        groups and releases stays."""
        deleted: Counter[str] = Counter()
        last = {kind: self._last_seq(kind) for kind in TABLES}
        with self.writing_step() as db:  # first, so that an interruption leaves only reports, which expire
            deleted["devices"] = self._forget_in_figures(db, device_id_hash)
        for kind, table in TABLES.items():
            for seqs in self._pages(f"""
                    select seq from {table} where seq > ? and device_id_hash = ? order by seq limit ?
                    """, -1, device_id_hash):
                while seqs:
                    with self.writing_step() as db:
                        seqs = self._forget_some(db, kind, seqs, deleted)
        with self.writing_step() as db:
            for kind, table in TABLES.items():  # reports that arrived meanwhile
                deleted[table] += len(self._delete_reports(
                    db, kind, f"from {table} where device_id_hash = ? and seq > ?", [(device_id_hash, last[kind])],
                    expired=False))
            deleted["devices"] = max(deleted["devices"], self._forget_in_figures(db, device_id_hash))
            self._note_windows(db)
        self._fold_in_wal()
        return +deleted

    def _forget_in_figures(self, db: Connection, device_id_hash: str) -> int:
        """Takes a device out of the figures; returns in how many apps it was known."""
        rollups = RollUps(db, self.now)
        apps: int = rollups.figures[Devices].forget(device_id_hash)
        rollups.save()
        return apps

    def _forget_some(self, db: Connection, kind: type, seqs: Sequence[Row], deleted: Counter[str]) -> Sequence[Row]:
        """One step of deleting the reports with these seqs. It deletes ever more at once: a device can have so many
        that a sync for every ten takes an hour. Adds to `deleted`; returns the seqs that are left."""
        deadline, size, table = time.monotonic() + STEP_SECONDS, EXPIRE_ROWS, TABLES[kind]
        while seqs:
            deleted[table] += len(self._delete_reports(
                db, kind, f"from (values *) as keys cross join {table} on seq = column1", seqs[:size], expired=False))
            seqs, size = seqs[size:], 2 * size
            if time.monotonic() > deadline:
                break
        return seqs

    def delete_app(self, name: str) -> None:
        """Deletes an app and its keys. From then on its reports are neither listed nor counted, and its name is free;
        its rows are deleted step by step, like expired ones. Raises StoreError if there is no such app."""
        with self.writing() as db:
            app_id = self.find_app(db, name)[0]
            for rows in ("messages where channel_id in (select id from channels where app_id = ?)",
                         "channels where app_id = ?", "keys where app_id = ?", "facts where app_id = ?",
                         "apps where id = ?"):
                db.execute("delete from " + rows, (app_id,))
            db.execute("delete from state where name in (?, ?) or name like ?",
                       (f"early_{app_id}", f"worse_{app_id}", f"worse_{app_id} %"))  # old files have no version
            db.execute(SET_STATE, (f"deleted_{app_id}", MAX_NUMBER))
            self._drop_waiting_facts(db, name)

    @staticmethod
    def _drop_waiting_facts(db: Connection, app: str) -> None:
        """Drops the facts of an app from messages that are not sent yet. One that loses all its facts is not sent."""
        for id, body in db.execute("select id, body from messages where due_at is not null").fetchall():
            message = json.loads(body)
            message["data"]["facts"] = facts = [fact for fact in message["data"]["facts"] if fact.get("app") != app]
            db.execute("update messages set body = ?, due_at = case when ? > 0 then due_at end where id = ?",
                       (to_json(message), len(facts), id))


# == Stored symbols ============================================================
# The symbols that were uploaded, and the crashes that move to other groups when symbols name their frames.

REGROUP_ROWS = 100  # the most crashes of a group in a batch; a batch also ends after STEP_SECONDS
MAX_SYMBOL_BYTES = 200_000_000  # of stored symbols for each build
MAX_SYMBOL_BUILDS = 1000  # that may have symbols
UPLOAD_DAYS = 7  # after which an incomplete upload of symbols is deleted
SYMBOL_PAGES = 100  # pages of symbols that a step deletes: each may take 100 kB


class SymbolStore(Deletion):
    """Apps and their reports, and the symbols of builds."""

    _to_regroup: tuple[Row, list[int]] = ((), [])  # a position in a group, and the crashes after it

    def put_symbols(self, uuid: str, part: SymbolPart) -> tuple[JsonObject, bool]:
        """Stores a part of the symbols of a build; an earlier upload of the same part is replaced. Returns the progress
        of the upload, and whether this part, or the whole build, was stored before. A complete build stays as it is. An
        upload with another number of parts starts over. Raises Refusal if there is no room."""
        while True:
            with self.writing() as db:
                build = self._build_to_delete(db, uuid, part)
                if not build:
                    was_stored = self._store_part(db, uuid, part)
                    progress, = dict_rows(db, "select uuid, parts, received from symbols where uuid = ?", (uuid,))
                    progress["complete"] = progress["received"] == progress["parts"]
                    if progress["complete"] and not was_stored:
                        self._symbols_arrived(db, uuid)
                    return progress, was_stored
            self._repeat_step(partial(self._drop_symbols, uuid=build))

    @staticmethod
    def _build_to_delete(db: Connection, uuid: str, part: SymbolPart) -> str:
        """The build whose symbols must be deleted first; "" for none. That is this build, if its upload began with
        another number of parts or its symbols are being deleted; or the oldest build without crashes, if there are too
        many. Raises Refusal if all have crashes."""
        if db.execute("select 1 from symbols where uuid = ? and received < parts and (parts <> ? or received = 0)",
                      (uuid, part.parts)).fetchone():
            return uuid
        builds, = db.execute("select count(*) from symbols where uuid <> ?", (uuid,)).fetchone()
        if builds < MAX_SYMBOL_BUILDS:
            return ""
        oldest, has_crashes = db.execute("""
            select uuid, uuid in (select uuid from group_images) as has_crashes from symbols where uuid <> ?
            order by has_crashes, uploaded_at, uuid limit 1""", (uuid,)).fetchone()
        if has_crashes:
            raise Refusal("too many symbols", detail=(
                f"those of {MAX_SYMBOL_BUILDS} builds with crashes are held;"
                f" 'symbols delete {oldest}' deletes the oldest"))
        return str(oldest)

    def _store_part(self, db: Connection, uuid: str, part: SymbolPart) -> bool:
        """Writes a part, unless the build is complete. Returns whether the part was stored before."""
        if Symbols(db).is_held(uuid):
            return True
        was_stored = db.execute("delete from symbol_parts where uuid = ? and part = ?", (uuid, part.part)).rowcount > 0
        if was_stored:  # only then, because this reads all pages of the build
            db.execute("delete from symbol_pages where uuid = ? and part = ?", (uuid, part.part))
        build_size, total_size = db.execute("""
            select coalesce(sum(case when uuid = ? then size end), 0), coalesce(sum(size), 0) from symbol_parts
            """, (uuid,)).fetchone()
        if build_size + part.size > MAX_SYMBOL_BYTES:
            raise Refusal("too many symbols", detail=f"those of a build may take {megabytes(MAX_SYMBOL_BYTES)};"
                                                     f" 'symbols delete {uuid}' deletes what came")
        if total_size + part.size > (self.max_db_size // 2 or math.inf):  # symbols must leave room for reports
            raise Refusal("too many symbols", detail="they would take more than half of BACKFEEDR_MAX_DB_SIZE;"
                                                     " 'symbols delete' makes room")
        db.execute("""
            insert into symbols values (?, ?, ?, ?, 0, 0, 0, ?) on conflict (uuid) do update set
                binary_name = excluded.binary_name, arch = excluded.arch, uploaded_at = excluded.uploaded_at
            """, (uuid, part.binary, part.arch, part.parts, self.now))
        write_rows(db, """
            insert into symbol_pages values *
            on conflict (uuid, first) do update set part = excluded.part, page = excluded.page
            """, [(uuid, first, part.part, page) for first, page in part.pages])
        db.execute("insert into symbol_parts values (?, ?, ?, ?)", (uuid, part.part, part.size, part.rows))
        db.execute("""
            update symbols set (received, size, rows) = (
                select count(*), sum(size), sum(rows) from symbol_parts where uuid = :uuid)
            where uuid = :uuid""", {"uuid": uuid})
        return was_stored

    @staticmethod
    def _symbols_arrived(db: Connection, uuid: str) -> None:
        """Queues the groups whose crashes may get names from the symbols of a build."""
        db.execute("""
            insert into regroupings select app_id, group_hash, 0, '' from group_images where uuid = ?
            on conflict (app_id, group_hash) do update set seq = 0""", (uuid,))

    def delete_symbols(self, uuid: str) -> str:
        """Deletes the symbols of the one build whose UUID begins with these characters, at least 4; returns the whole
        UUID. Raises StoreError if there is not exactly one."""
        digits = (image_uuid(uuid) or uuid).replace("-", "").upper()
        if len(digits) < 4:
            raise StoreError("a build is named by at least 4 characters of its UUID")
        with self.reading() as db:
            matches = db.execute("select uuid from symbols where substr(replace(uuid, '-', ''), 1, ?) = ?",
                                 (len(digits), digits)).fetchall()
        if len(matches) != 1:
            raise StoreError(f"{len(matches) or 'no'} builds have a UUID that begins with {uuid!r}: see 'symbols list'")
        self._repeat_step(partial(self._drop_symbols, uuid=matches[0][0]))
        self._fold_in_wal()
        return str(matches[0][0])

    @staticmethod
    def _drop_symbols(db: Connection, uuid: str) -> Counter[str]:
        """One step of deleting the symbols of a build. From the first step on, the build counts as incomplete, so no
        look-up gets the page before a deleted one. Its own row goes last, so an interrupted deletion can continue."""
        db.execute("update symbols set received = 0, size = 0, rows = 0 where uuid = ?", (uuid,))
        deleted = db.execute("delete from symbol_parts where uuid = ?", (uuid,)).rowcount
        deleted += db.execute("""
            delete from symbol_pages where (uuid, first) in (
                select uuid, first from symbol_pages where uuid = ? order by first limit ?)
            """, (uuid, SYMBOL_PAGES)).rowcount
        return +Counter(symbols=deleted or db.execute("delete from symbols where uuid = ?", (uuid,)).rowcount)

    def _expire_symbols(self, db: Connection) -> Counter[str]:
        """One step of deleting useless symbols: those of an upload that was never completed, and those of an old build.
        A build is old if no crash of it is stored, and a later build of the binary got its symbols before the retention
        began: then hardly any hang of the old build is stored either."""
        row = db.execute("""
            select uuid from symbols
            where received < parts and uploaded_at < :given_up or uploaded_at < :expired
                and uuid not in (select uuid from group_images) and exists (
                    select 1 from symbols as later where later.binary_name = symbols.binary_name
                        and later.received = later.parts and later.uploaded_at > symbols.uploaded_at
                        and later.uploaded_at < :expired)
            order by uuid limit 1
            """, {"given_up": self.now - UPLOAD_DAYS * DAY, "expired": self._first_kept_seq >> SEQ_BITS}).fetchone()
        return self._drop_symbols(db, row[0]) if row else Counter()

    # Moving crashes to other groups

    def _regroup(self, db: Connection) -> int:
        """One step of moving crashes to the groups that they belong to now. Returns how many batches it checked."""
        batches, deadline, symbols = 0, time.monotonic() + STEP_SECONDS, Symbols(db)
        while row := db.execute("select * from regroupings order by app_id, group_hash limit 1").fetchone():
            self._regroup_crashes(db, symbols, deadline, row)
            batches += 1
            if time.monotonic() > deadline:
                break
        return batches

    def _regroup_crashes(self, db: Connection, symbols: Symbols, deadline: float, row: Row) -> None:
        """Checks a batch of crashes of a group, those after the seq in a row of `regroupings`. Moves those that belong
        to another group now, and updates the row, or deletes it when no crash is left."""
        app_id, group, last_seq, target = row
        is_first = not last_seq
        moves: dict[int, tuple[str, str | None]] = {}  # by seq: the new group and images
        target_of = lru_cache(None)(partial(_group_and_images, symbols, group))  # equal crashes are common
        checked, pending = 0, self._crashes_after(db, app_id, group, last_seq)
        for seq in pending[:REGROUP_ROWS]:
            for images, exception_type, trace, extra in db.execute("""
                    select images, exception_type, stack_trace, extra from crashes where seq = ?
                    """, (seq,)).fetchall():  # none if it was deleted meanwhile
                last_seq = seq
                new = target_of(exception_type, trace, is_trace_cut(extra))
                if new != (group, images):
                    moves[seq] = new
            checked += 1
            if time.monotonic() > deadline:
                break
        self._to_regroup = (app_id, group, last_seq), pending[checked:]
        if moves:
            target = self._move_crashes(db, symbols, app_id, group, moves, is_first) or target
        if checked and db.execute("select 1 from crashes where app_id = ? and group_hash = ? limit 1",
                                  (app_id, group)).fetchone():
            db.execute("update regroupings set seq = ?, target = ? where app_id = ? and group_hash = ?",
                       (last_seq, target, app_id, group))
            return
        db.execute("delete from regroupings where app_id = ? and group_hash = ?", (app_id, group))
        if target:
            rename_group(db, app_id, group, target)
        if db.execute("""
                select 1 from groups where app_id = ? and group_hash = ? and search = group_hash and crashes > 0
                """, (app_id, group)).fetchone():  # its latest crash has moved, and it is too large for `save`
            RollUps(db, self.now, symbols).figures[Groups].show_latest(app_id, group)

    def _crashes_after(self, db: Connection, *position: Any) -> list[int]:
        """The seqs of crashes after a position: app_id, group_hash and seq. Each look-up goes through the whole group,
        so it fetches enough for many steps."""
        known_position, seqs = self._to_regroup
        return seqs if known_position == position and seqs else [seq for seq, in db.execute("""
            select seq from crashes
            where app_id = ? and group_hash = ? and seq > ? and group_hash <> ?
            order by seq limit ?""", (*position, OTHER, 100 * REGROUP_ROWS))]

    def _move_crashes(self, db: Connection, symbols: Symbols, app_id: int, group: str,
                      moves: Mapping[int, tuple[str, str | None]], is_first: bool) -> str:
        """Gives crashes of a group another group and images. `first_seen` moves with the first crash of the group,
        because earlier ones may have expired. Returns the last new group; "" if only images changed."""
        seqs, source = [(seq,) for seq in moves], "from (values *) as keys cross join crashes on seq = column1"
        rollups, before = RollUps(db, self.now, symbols), counted_rows(db, Crash, source, seqs)
        traces: dict[int, str | None] = dict(rows_of(db, "select seq, stack_trace " + source, seqs))
        after = [crash._replace(group_hash=moves[crash.seq][0], images=moves[crash.seq][1],
                                stack_trace=traces[crash.seq]) for crash in before]
        first = db.execute("select first_seen, first_version, came_at from groups where app_id = ? and group_hash = ?",
                           (app_id, group)).fetchone() if is_first else None
        rollups.figures[Groups].count(Crash, after, 1)
        db.executemany("update crashes set group_hash = ?, images = ? where seq = ?",
                       [(*new, seq) for seq, new in moves.items()])
        rollups.figures[Groups].count(Crash, before, -1)
        rollups.save()
        self._note_windows(db)
        update_triage(db, self.now, rollups, [crash for crash in after if crash.group_hash != group], are_moved=True)
        targets = [target for target, _ in moves.values()]
        if first:
            first_seen, first_version, came_at = first
            db.execute("""
                update groups set came_at = min(came_at, ?), first_seen = min(first_seen, ?),
                    first_version = case when first_seen > ? then ? else first_version end
                where app_id = ? and group_hash = ?
                """, (came_at, first_seen, first_seen, first_version, app_id, targets[0]))
        return next((target for target in reversed(targets) if target != group), "")


def _group_and_images(symbols: Symbols, group: str, exception_type: str, trace: str | None,
                      is_cut: bool) -> tuple[str, str | None]:
    """The group that a stored crash belongs to now, and its images."""
    frames = json.loads(trace or "[]")
    images = builds_to_symbolicate(map(read_frame, frames))
    if not symbols.can_name(images):  # as Commit.regrouped() does it: trusted names stay as they are
        return group if is_cut else group_hash(exception_type, map(read_frame, frames)), images
    return symbols.group_of(frames, exception_type, group, is_cut), images


# == Store =====================================================================
# How reports are stored, exported and imported, and the upkeep that goes on beside.

REPLAY_DAYS = 7  # how long a phone may be offline between a request and its repetition
BUSY_COMMIT = 4  # requests: after a commit of at least so many, the next one waits for more
COMMIT_GATHER_SECONDS = 0.003  # how long it waits, because a commit costs as much as ten reports
MAX_COMMIT_WAIT = 30.0  # seconds to wait for another thread's commit: longer than any lock and sync together
NEARLY_FULL = 0.9  # share of the disk or of max_db_size above which the operator is warned
FACT_DAYS = 7  # after which a fact that no channel took is deleted


class StoredReport(NamedTuple):
    """A report as `export` gives it and `import_` takes it. Times are in milliseconds."""

    seq: int
    app: str
    is_test: bool
    received_at: int
    clock_ahead_ms: int
    report: Crash | Event


class Store(SymbolStore):
    """Apps, keys and reports in one SQLite file.

    A `retention_days` of 0 keeps everything, and None takes the value that the last server used. Close the store, or
    use it as a context manager.

    max_waiters: requests that may wait for a commit; more get a 503.
    max_rows: reports that may wait; the next commit stores them all, in about 0.1 s.
    max_db_size: in bytes; above it, the oldest reports of the largest app are deleted early; 0 means no limit.
    """

    def __init__(self, path: str, clock: Callable[[], float] = time.time, retention_days: int | None = 0,
                 max_waiters: int = 256, max_rows: int = 10_000, may_create: bool = True, max_db_size: int = 0):
        super().__init__(path, clock, may_create)
        self.max_waiters, self.max_rows, self.max_db_size = max_waiters, max_rows, max_db_size
        if retention_days is None:
            with self.reading() as db:
                retention_days = get_state(db, "retention_days", Settings.retention_days)
        self.retention_days = retention_days
        self._next_upkeep = 0  # when to look again for reports to delete
        self._judged_hour = 0  # the hour in which it last looked for releases that are worse

    def vitals(self) -> list[tuple[str, str, str, Iterable[tuple[str, float]]]]:
        """Figures for monitoring: name, kind, help text, and samples as Prometheus writes them. All but the sizes and
        `crashes_kept` concern only this process. Does not read the tables of reports."""
        process = self._process
        with self.reading() as db:
            self._require_same_file()
            crashes, = db.execute("""
                select coalesce(sum(crashes), 0) from labels
                where app_id in (select id from apps) and field = 'exception_type' and day = ?
                """, (ALL_DAYS,)).fetchone()
        return [
            ("commit_requests", "summary", "Requests that one commit stored.",
             [("_sum", process.committed_requests), ("_count", process.commits)]),
            ("commit_seconds", "summary", "From asking for the write lock until the commit was durable.",
             [("_sum", process.commit_seconds), ("_count", process.commits)]),
            ("waiters", "gauge", "Requests that wait for the next commit.", [("", len(process.waiting))]),
            ("reports_stored_total", "counter", "Reports stored since this process began.",
             [(f'{{table="{table}"}}', n) for table, n in process.stored.items()]),
            ("crashes_kept", "gauge", "Rows of the table crashes, by their roll-up.", [("", crashes)]),
            ("file_bytes", "gauge", "Size of the database.", [("", self.size)]),
            ("wal_bytes", "gauge", "Size of its write-ahead log.", [("", _wal_size(self.path))])]

    def warnings(self) -> list[str]:
        """Warnings about the database and its disk: see file_warnings."""
        return file_warnings(self.path, self.max_db_size)

    def add(self, key_hash: bytes, reports: Reports, idempotency: Idempotency | None = None) -> Receipt:
        """Stores reports, all or none, in the app of the key with this SHA-256. Returns when they are durable. If
        `idempotency` shows that the request was stored before, stores nothing and returns the first receipt. Raises
        ValueError without reports; Refusal if an Idempotency-Key is reused for another request, or if the key is not
        active at the time of the commit; StorageUnavailable also if too many requests wait already."""
        if not reports:
            raise ValueError("no reports")
        submission = Submission(key_hash, reports, idempotency or Idempotency())
        self.add_all([submission])
        return submission.result()

    def add_all(self, submissions: Sequence[Submission]) -> None:
        """Stores several requests in one commit. Each then has a receipt or an error. After an unexpected error, which
        is logged, each is committed alone, and gets StorageUnavailable if that fails, too."""
        if not submissions:
            return
        process, own_queue, done, is_stored = self._process, CommitQueue(), threading.Lock(), False
        queue = own_queue
        try:
            with process.queue_lock:
                queue = process.queue = process.queue or own_queue
                queue.join(submissions, self.max_waiters, self.max_rows)
                if queue is not own_queue:
                    done.acquire()
                    queue.thread_locks.append(done)
                if len(queue.submissions) >= process.last_queue_length and queue.grown.locked():
                    queue.grown.release()
            if queue is own_queue:
                self._commit(process, queue)
                is_stored = True
            elif any(not submission.error for submission in submissions) and not done.acquire(timeout=MAX_COMMIT_WAIT):
                raise StorageUnavailable()  # the committing thread is slow, or was ended by a signal
        except BaseException as error:  # also a signal, if this is the main thread
            for submission in self._leave_queue(process, queue, submissions, queue is own_queue, error):
                self._commit_alone(process, submission)
        finally:
            for waiting_thread in own_queue.thread_locks:
                waiting_thread.release()
        if is_stored:  # after the release: nobody needs to wait for this
            self._upkeep_if_due()

    def _leave_queue(self, process: Process, queue: CommitQueue, submissions: Sequence[Submission], owns_queue: bool,
                     error: BaseException) -> Sequence[Submission]:
        """Takes submissions out of their queue and gives them an error: all if its commit failed, else only these,
        which can wait no longer. Returns those that may be stored if each is committed alone. Re-raises signals."""
        with process.queue_lock:
            if process.queue is queue and (owns_queue or isinstance(error, Exception)):
                process.queue = None
            failed = queue.submissions if owns_queue else submissions
            queue.submissions = [submission for submission in queue.submissions if submission not in failed]
        for submission in failed:
            submission.error = StorageUnavailable()
        if not isinstance(error, Exception):
            raise error
        if not isinstance(error, StorageUnavailable):
            log.exception("unexpected error")
        is_outage = isinstance(error.__cause__ or error, (self.Outage, StorageUnavailable))
        return failed if owns_queue and len(failed) > 1 and not is_outage else []

    def _commit_alone(self, process: Process, submission: Submission) -> None:
        """Commits a submission without the others, so that one bad report fails only its own request."""
        try:
            submission.error = None
            self._commit(process, CommitQueue([submission]))
        except Exception:
            submission.error = StorageUnavailable()

    def _commit(self, process: Process, queue: CommitQueue) -> None:
        """Stores a queue in one transaction. Until it begins, other threads may join the queue."""
        with process.commit_lock:
            if process.last_queue_length >= BUSY_COMMIT:
                queue.grown.acquire(timeout=COMMIT_GATHER_SECONDS)
            began = time.monotonic()
            self._check_clock()
            with self.writing(shared=True) as db:
                with process.queue_lock:
                    if process.queue is queue:
                        process.last_queue_length, process.queue = len(queue.submissions), None
                commit = Commit(db, self.now, process.known)
                commit.add_submissions(queue.submissions)
                stored = commit.save()
            process.commits += 1
            process.committed_requests += len(queue.submissions)
            process.commit_seconds += time.monotonic() - began
            process.stored.update(stored)
            self._write_error = self._passed_error = ""

    def export(self, kind: type[Any], app: str | None = None, since: int = 0) -> Iterator[StoredReport]:
        """The stored reports of a kind, Crash or Event, in the order of their seqs: of all apps or of one, received at
        `since` (in ms) or later. Leaves out reports that arrive meanwhile. Raises StoreError for an unknown app."""
        with self.reading() as db:
            if app is not None:
                self.find_app(db, app)
        pages = self._pages(f"""
            select seq, apps.name, is_test, received_at, clock_ahead_ms,
                {", ".join("reports." + field for field in kind._fields)}
            from {TABLES[kind]} as reports cross join apps on apps.id = app_id
            where seq > ? and seq <= ? order by seq limit ?
            """, min(max(0, seq_at(since)), MAX_NUMBER) - 1, self._last_seq(kind))
        for seq, name, is_test, received_at, ahead_ms, *values in chain.from_iterable(pages):
            if app in (None, name) and received_at >= since:
                yield StoredReport(seq, name, bool(is_test), received_at, ahead_ms, kind._make(values))

    def import_(self, reports: Sequence[StoredReport]) -> Counter[str]:
        """Stores reports that another store exported, all or none, and creates their apps, without keys. Returns how
        many were `stored`; how many were `known`, because there is a report with their seq; and how many had `expired`.
        A report counts as expired if it is too old, or if others as old were deleted here: it may be one of them, and
        must not be counted twice. Raises StoreError if a test app has the name of a live one, or vice versa."""
        counts = Counter(stored=0, known=0, expired=0)
        # Rows left over from a deleted app would be taken for known reports, and then be deleted.
        self._repeat_step(lambda db: self._delete_app_rows(db, STEP_ROWS))
        with self.writing_step() as db:
            commit, import_app = Commit(db, self.now), lru_cache(None)(partial(self._import_app, db))
            last_early = lru_cache(None)(lambda app_id: get_state(db, f"early_{app_id}", -1))
            known = {(kind, seq) for kind, table in TABLES.items() for seq, in rows_of(
                db, f"select seq from (values *) as keys cross join {table} on seq = column1",
                [(stored.seq,) for stored in reports])}
            last_expired = {kind: max(self._first_kept_seq - 1, get_state(db, "expired_" + table, -1))
                            for kind, table in TABLES.items()}
            for seq, app, is_test, received_at, ahead_ms, report in sorted(reports, key=itemgetter(0)):
                kind = type(report)
                if (kind, seq) in known:
                    counts["known"] += 1
                    continue
                known.add((kind, seq))
                if seq <= last_expired[kind] or seq <= last_early(app_id := import_app(app, is_test)):
                    counts["expired"] += 1
                    continue
                commit.add_reports(app_id, [seq], [received_at], [ahead_ms], commit.regrouped([report]))
                counts["stored"] += 1
            commit.save()
            self._upkeep_step(db)
        return counts

    def _import_app(self, db: Connection, name: str, is_test: bool) -> int:
        """Creates an app unless it exists; returns its id. Raises StoreError if it exists as the other kind of app."""
        if not db.execute("select 1 from apps where name = ?", (name,)).fetchone():
            self._insert_app(db, name, is_test)
        app_id, was_test = self.find_app(db, name)
        if was_test != is_test:
            raise StoreError(f"the app {name!r} is a {'test' if was_test else 'live'} one here")
        return app_id

    def triage(self, group_hash: str, changes: JsonObject, app: str | None = None) -> None:
        """Writes the result of parse_triage() to a group of an app, or of the only live app that has it. Raises
        Refusal, or GroupMoved if its crashes are in another group now."""
        with self.writing() as db:
            apps = db.execute("""
                select id, name from apps
                where (name = :app or :app is null and is_test = 0) and (
                    exists (select 1 from groups where app_id = apps.id and group_hash = :group)
                    or exists (select 1 from triage where app_id = apps.id and group_hash = :group))
                order by name""", {"app": app, "group": group_hash}).fetchall()
            if len(apps) > 1:
                raise Refusal("missing app", detail=f"it is a group of {', '.join(name for _, name in apps)}"[:500])
            if not apps:
                raise unknown_group_refusal(db, app, group_hash)
            decide(db, apps[0][0], group_hash, changes, self.now)

    # Upkeep

    def _upkeep_if_due(self) -> None:
        """Runs one step of upkeep after a commit: at most once a second, or after every commit while there are rows
        left to delete. Once an hour it looks for worse releases. It reads first, as a write keeps others waiting."""
        now, process, deleted = self.now, self._process, Counter[str]()
        is_done = self._next_upkeep - SECOND <= now < self._next_upkeep  # the lower bound: a clock may be set back
        if is_done or not process.upkeep_lock.acquire(blocking=False):
            return
        try:
            is_too_large = self._choose_largest_app()
            with self.reading() as db:
                is_due = is_too_large or any(db.execute("""
                    select (select min(received_at) from replays) < :replays, (select min(seq) from crashes) < :oldest,
                        (select min(seq) from events) < :oldest, exists (select 1 from regroupings),
                        not exists (select 1 from state where name = 'trimmed_day' and value = :today),
                        exists (select 1 from state where name like 'deleted%')
                    """, {"replays": now - REPLAY_DAYS * DAY, "oldest": self._first_kept_seq,
                          "today": now // DAY}).fetchone())
                is_worse = now // HOUR != self._judged_hour and worse_releases(db, now)
            if is_due or is_worse:
                with self.writing() as db:
                    if is_worse:
                        note_worse_releases(db, now)
                    deleted = self._upkeep_step(db)
            self._judged_hour = now // HOUR
        except Exception as error:  # the reports of the commit are stored, and later commits try again
            if not isinstance(error, StorageUnavailable):
                log.exception("unexpected error")
        finally:
            # Deletions must keep up with new reports. Moves need not: catch_up_in_background does most of them.
            self._next_upkeep = now if deleted.keys() - {"moved"} else now + SECOND
            process.upkeep_lock.release()

    def _upkeep_step(self, db: Connection) -> Counter[str]:
        """One step of expiring, moving and trimming. It ends after STEP_SECONDS, because nobody can write meanwhile."""
        deadline, size = time.monotonic() + STEP_SECONDS, EXPIRE_ROWS
        self._note_windows(db)
        deleted = Counter(replays=db.execute("""
            delete from replays where received_at <= (
                select max(received_at) from (
                    select received_at from replays where received_at < ? order by received_at limit ?) as oldest)
            """, (self.now - REPLAY_DAYS * DAY, STEP_ROWS)).rowcount)
        while reports := self._delete_due(db, size):
            deleted += reports
            size = min(2 * size, STEP_ROWS)
            if time.monotonic() > deadline:
                break
        deleted["moved"] = self._regroup(db)
        if get_state(db, "trimmed_day", 0) != self.now // DAY:
            deleted += self._trim(db)
        return +deleted

    def _trim(self, db: Connection) -> Counter[str]:
        """One step of what is due once a day: deletions, and at their end the warnings."""
        sums = RollUps(db, self.now).trim(self._first_kept_seq >> SEQ_BITS)
        deleted = Counter(sums=sums) + self._expire_symbols(db)
        db.execute("delete from facts where at < ?", (self.now - FACT_DAYS * DAY,))
        db.execute("delete from messages where due_at is null and created_at <= ?", (self.now - HOUR,))
        if not deleted:
            db.execute("""
                delete from group_history where what = 'spread' and not exists (
                    select 1 from groups where app_id = group_history.app_id and group_hash = group_history.group_hash)
                """)
            db.execute(SET_STATE, ("trimmed_day", self.now // DAY))
            for warning in self.warnings():
                log.warning("%s", warning)
        deleted["aliases"] = db.execute("""
            delete from group_aliases
            where not exists (select 1 from groups where app_id = group_aliases.app_id and group_hash = target)
                and not exists (select 1 from regroupings where app_id = group_aliases.app_id and group_hash = target)
            """).rowcount
        return deleted

    def catch_up(self) -> Counter[str]:
        """Does at once what commits would do step by step: deletes all rows that have expired or whose app is deleted.
        It also moves crashes to the groups that they belong to now. Between its steps it lets reports in."""
        return self._repeat_step(self._upkeep_step, self._choose_largest_app)

    def prune(self) -> Counter[str]:
        """Like catch_up(), but also returns the space to the disk."""
        deleted = self.catch_up()
        self._shrink()
        return deleted

    def catch_up_in_background(self) -> None:
        """Runs catch_up() in a thread. One more call may wait for it. If it fails, commits continue its work."""
        process = self._process

        def work() -> None:
            if process.next_worker.acquire(blocking=False):
                with process.worker_lock, suppress(StorageUnavailable):
                    process.next_worker.release()  # from now on another may wait: this one may miss what comes later
                    self.catch_up()

        threading.Thread(target=work, name="backfeedr catch-up", daemon=True).start()


def worse_releases(db: Connection, now: int) -> list[tuple[ReleasePair, str]]:
    """The current releases of live apps that are certainly worse than the one before, and the texts of the verdicts.
    Those that were reported already are left out."""
    releases = SeenReleases(db, None, now)
    return [(pair, (verdict(*healths) or {})["text"])
            for pair, healths in releases.compared(releases.current()).items()
            if min(healths).devices >= ENOUGH_DEVICES and newcombe_interval(healths[0], healths[1], Z_99)[1] < 0
            and not get_state(db, f"worse_{pair.app_id} {pair.app_version[:40]}", 0)]


def note_worse_releases(db: Connection, now: int) -> None:
    """Writes a fact about each release that is worse, but only once."""
    for pair, text in worse_releases(db, now):
        note_fact(db, "release.worse", pair.app_id, now, None, app_version=pair.app_version, before=pair.previous,
                  text=text)
        db.execute(SET_STATE, (f"worse_{pair.app_id} {pair.app_version[:40]}", now))


def file_warnings(path: Path, max_db_size: int) -> list[str]:
    """Warnings that a database or its disk is nearly full, or that every user of the host can read the database."""
    texts, size, disk = [], max_db_size and path.stat().st_size, shutil.disk_usage(path.parent)
    if path.stat().st_mode & 0o004:
        texts.append(f"Every user of this host can read {path.name}: chmod 600 it.")
    if size > NEARLY_FULL * max_db_size:
        texts.append(f"The database is at {100 * size // max_db_size} % of BACKFEEDR_MAX_DB_SIZE; above it, the oldest"
                     " reports are deleted.")
    if disk.used > NEARLY_FULL * (disk.used + disk.free):
        texts.append(f"The disk is nearly full: {megabytes(disk.free)} are free.")
    return texts


# == Channels ==================================================================
# Where alerts are sent. A kind of channel is a function that sends a message there, or raises DeliveryError.

CHAT_BYTES = 1800  # of a chat message: Discord takes 2,000 characters, ntfy 4,096 bytes
FACT_LENGTH = 300  # characters of a fact in a chat message
SEND_TIMEOUT = 15.0  # seconds
# Keeps a chat from reading text as markup or as a mention of somebody.
_MENTION_ESCAPES = str.maketrans({"@": "@\u200b", "]": "]\u200b"})
_MARKUP_ESCAPES = {**_MENTION_ESCAPES, **str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})}


class DeliveryError(StoreError):
    """A message could not be sent. `str()` says why, without the address, which may be secret. `status` is the HTTP
    status, or 0 without an answer; `retry_after` is the pause that the receiver asks for, in milliseconds."""

    def __init__(self, text: str, status: int = 0, retry_after: int = 0):
        super().__init__(text)
        self.status, self.retry_after = status, retry_after
        self.is_receiver_down = not 400 <= status < 500 or status in (408, 429)  # else it refuses only this message


Message = JsonObject  # id, channel_id, body (JSON) and tries of a message; url, secret and with_reason of its channel


def _send_to_webhook(message: Message, now: int) -> None:
    """Signs a message according to https://www.standardwebhooks.com."""
    timestamp, key = str(now // SECOND), base64.b64decode(message["secret"][len("whsec_"):])
    signature = hmac.new(key, f"{message['id']}.{timestamp}.{message['body']}".encode(), hashlib.sha256).digest()
    post(message["url"], message["body"], {
        "webhook-id": message["id"], "webhook-timestamp": timestamp,
        "webhook-signature": "v1," + base64.b64encode(signature).decode()})


def _send_to_slack(message: Message, now: int) -> None:
    """Sends to Slack, to Mattermost, or to Discord at an address that ends with /slack."""
    text = "\n".join(message_lines(message, True, _MARKUP_ESCAPES))
    post(message["url"].partition("+")[2], to_json({"text": text}), {})


def _send_to_ntfy(message: Message, now: int) -> None:
    """Sends JSON, because a header cannot carry every title."""
    url, _, topic = message["url"].partition("+")[2].rpartition("/")
    title, *lines = message_lines(message, False, {})
    link = json.loads(message["body"])["data"].get("url")
    post(url + "/", to_json({"topic": topic, "title": title, "message": "\n".join(lines),
                             **({"click": link} if link else {})}), {})


def _send_by_apprise(message: Message, now: int) -> None:
    title, *lines = message_lines(message, True, _MENTION_ESCAPES)
    # Otherwise Apprise would take the text for HTML where a channel may get that.
    if not _apprise_sender(message["url"]).notify(title=title, body="\n".join(lines), body_format="text"):
        raise DeliveryError("Apprise could not send it")


CHANNELS: dict[str, Callable[[Message, int], None]] = {  # by the scheme of the address; Apprise knows all others
    "https": _send_to_webhook, "http": _send_to_webhook, "slack+https": _send_to_slack, "slack+http": _send_to_slack,
    "ntfy+https": _send_to_ntfy, "ntfy+http": _send_to_ntfy}


def message_lines(message: Message, with_links: bool, escapes: Mapping[int, str]) -> list[str]:
    """The title of a message, a line for each fact as far as they fit, and the number of others. `escapes` maps the
    characters that are markup in the channel to what replaces them."""
    data = json.loads(message["body"])["data"]
    lines = [f"{fact['text'][:FACT_LENGTH]} {fact.get('url', '') if with_links else ''}".rstrip().translate(escapes)
             for fact in data["facts"]]
    sizes = accumulate(len(line.encode()) + 1 for line in lines)
    shown = [line for line, size in zip(lines, sizes) if size <= CHAT_BYTES]
    more = data["more"] + len(lines) - len(shown)
    return [data["title"].translate(escapes), *shown, *([f"and {more:,} more"] if more else [])]


def post(url: str, body: str, headers: Mapping[str, str]) -> None:
    """Sends JSON. Raises DeliveryError unless the answer is a 2xx; redirects are not followed."""
    parts, started = urlsplit(url), time.monotonic()
    headers = {"Content-Type": "application/json", "User-Agent": f"backfeedr/{__version__}", **headers}
    if parts.username is not None:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = "Basic " + base64.b64encode(user.encode()).decode()
    connect = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = connect(parts.hostname or "", parts.port, timeout=SEND_TIMEOUT)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    deadline = threading.Timer(SEND_TIMEOUT, _shut_down, [connection])  # a socket's timeout restarts with each byte
    deadline.daemon = True
    deadline.start()
    try:
        connection.request("POST", target, body.encode(), headers)
        with connection.getresponse() as answer:  # else it keeps the socket open
            pass
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise DeliveryError("no answer in time" if time.monotonic() - started >= SEND_TIMEOUT else reason) from None
    finally:
        deadline.cancel()
        connection.close()
    if not 200 <= answer.status < 300:
        retry_after = _retry_after_ms(answer.headers.get("Retry-After", ""))
        raise DeliveryError(f"it answered {answer.status}", answer.status, retry_after)


def _shut_down(connection: HTTPConnection) -> None:
    with suppress(OSError, TypeError):  # TypeError: it has no socket yet, or no longer
        socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)


def _retry_after_ms(text: str) -> int:
    """The pause that a Retry-After header asks for, in seconds or until a date: at most a day, 0 without one."""
    with suppress(ValueError, TypeError, OverflowError):  # it is neither a number nor a date
        is_number = re.fullmatch("[0-9]{1,9}", text)
        seconds = int(text) if is_number else int(parsedate_to_datetime(text).timestamp() - time.time())
        return min(max(0, seconds * SECOND), DAY)
    return 0


def _apprise_sender(url: str) -> Any:
    """A sender of Apprise, which knows a hundred more kinds of addresses. Raises DeliveryError."""
    try:
        import apprise
    except ImportError:
        raise DeliveryError("an address that is not https://, slack+https:// or ntfy+https:// needs Apprise:"
                            " pip install apprise, and backfeedr.py instead of the .pyz") from None
    logging.getLogger("apprise").setLevel(logging.CRITICAL)  # it logs addresses
    sender = apprise.Apprise()
    if not sender.add(url):
        raise DeliveryError("that is no address that Apprise knows")
    return sender


# Hosts that take no signed webhooks, with the form of address that works.
_CHAT_ADDRESSES = {"hooks.slack.com": "slack+https://hooks.slack.com/...", "ntfy.sh": "ntfy+https://ntfy.sh/TOPIC",
                   **dict.fromkeys(("discord.com", "discordapp.com"), "slack+https://discord.com/.../slack")}


def check_address(url: str) -> None:
    """Raises StoreError if nothing can be sent to an address."""
    with suppress(ValueError):  # from urlsplit() or .port
        parts = urlsplit(url)
        is_bad_discord = "discord" in (parts.hostname or "") and not parts.path.endswith("/slack")
        if parts.hostname in _CHAT_ADDRESSES and (parts.scheme in ("https", "http") or is_bad_discord):
            raise StoreError(f"give {_CHAT_ADDRESSES[parts.hostname]} as the address for {parts.hostname}")
        is_url = re.fullmatch("[!-~]+", url) and parts.netloc
        if is_url and parts.scheme not in CHANNELS:
            _apprise_sender(url)
            return
        has_topic = re.fullmatch(r"(/.*)?/[\w-]{1,64}", parts.path + parts.query) or "ntfy" not in parts.scheme
        if is_url and has_topic and parts.hostname and parts.port != 0 and not parts.fragment:
            return
    raise StoreError("a channel's address is like https://example.com/hook or ntfy+https://ntfy.sh/TOPIC, and has no"
                     " spaces")


def redacted_address(url: str) -> str:
    """An address without its secrets: its scheme, host and port if it is an HTTP address, and a hint."""
    parts = urlsplit(url)
    is_http = parts.scheme.endswith(("http", "https"))  # elsewhere, the place of the host may have a token
    start = f"{parts.scheme}://{parts.netloc.rpartition('@')[2] if is_http else ''}"
    secret = url.partition(parts.netloc if is_http else "://")[2]
    ending = "/" * is_http + "..." + secret[-4:] * (len(secret) >= 12)
    return start + ending if secret else start


# == Alerts ====================================================================
# Sends facts to channels. Facts of a minute become one message per channel. One transaction claims a message, another
# records the outcome. None is open in between; if the server dies there, the message is sent again under the same id.

FACT_DELAY = MINUTE  # how long a fact waits for others that share its message
MAX_FACTS = 10  # facts that a message lists; it only counts the others
MAX_HOURLY_MESSAGES = 30  # to a channel; other facts wait for a later message
RETRY_SECONDS = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)  # the schedule of Standard Webhooks
CLAIM_TIME = MINUTE  # how long nobody else sends a claimed message; longer than SEND_TIMEOUT
POLL_SECONDS = 1.0  # between two looks for messages that are due
# The only parts of a fact's `detail` that leave the host.
_FACT_FIELDS = ("exception_type", "place", "app_version", "build_number", "crashes", "devices", "fixed_in", "before")


class Alerts:
    """Channels and their messages. `digest(app, since, until)` gives the facts of a digest; None is all live apps."""

    def __init__(self, store: Store, public_url: str, digest: Callable[[str | None, int, int], list[JsonObject]]):
        self._store, self._public_url, self._digest = store, public_url.rstrip("/"), digest
        self._stopping = threading.Event()

    # Channels

    def add(self, url: str, app: str | None = None, kinds: Sequence[str] = (), with_reason: bool = False,
            hour: int = 7) -> tuple[int, str]:
        """Adds a channel for one app, or for all live apps. Returns its id, and the secret that signs its messages or
        "" if they are not signed. Without `kinds` it gets the facts that FACT_KINDS turns on. `hour` is when a digest
        is due, in UTC. Raises StoreError."""
        kinds = list(dict.fromkeys(kinds)) or [kind for kind, is_on in FACT_KINDS.items() if is_on]
        if unknown := [kind for kind in kinds if kind not in FACT_KINDS]:
            raise StoreError(f"there is no fact {unknown[0]!r}; there are {', '.join(FACT_KINDS)}")
        check_address(url)
        is_signed, now = CHANNELS.get(urlsplit(url).scheme) is _send_to_webhook, self._store.now
        secret = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode() if is_signed else ""
        digest_at = now - (now - hour * HOUR) % DAY + DAY if "digest" in kinds else None  # the next such hour
        with self._store.writing() as db:
            app_id = self._store.find_app(db, app)[0] if app else None
            db.execute("""
                insert into channels (url, secret, app_id, kinds, with_reason, digest_at, created_at, last_fact)
                select ?, ?, ?, ?, ?, ?, ?, coalesce(max(id), 0) from facts
                """, (url, secret, app_id, ",".join(kinds), with_reason, digest_at, now))
            return db.execute("select max(id) from channels").fetchone()[0], secret

    def channels(self) -> list[JsonObject]:
        """All channels without their secrets; times are in milliseconds."""
        with self._store.reading() as db:
            return [{**row, "address": redacted_address(row.pop("url"))} for row in dict_rows(db, """
                select channels.id, url, name as app, kinds, sent_at, error, error_at, ended_at, (
                    select count(*) from messages where channel_id = channels.id and due_at is not null) as waiting
                from channels left join apps on apps.id = app_id order by channels.id""")]

    def remove(self, id: int) -> None:
        """Removes a channel and its messages. Raises StoreError if there is no such channel."""
        with self._store.writing() as db:
            if not db.execute("delete from channels where id = ?", (id,)).rowcount:
                raise StoreError(f"there is no channel {id}: see 'alert list'")
            db.execute("delete from messages where channel_id = ?", (id,))

    def test(self, id: int) -> None:
        """Sends a test message now. Raises StoreError if there is no such channel, or if the message did not arrive."""
        with self._store.reading() as db:
            channels = dict_rows(db, "select id as channel_id, url, secret from channels where id = ?", (id,))
        if not channels:
            raise StoreError(f"there is no channel {id}: see 'alert list'")
        facts = [{"type": "test", "text": f"This is a test of channel {id}."}]
        if error := self._attempt({**channels[0], **self._message(id, "test", "backfeedr: a test", facts)}):
            raise StoreError(f"channel {id}: {error}")

    # Messages

    def _message(self, channel_id: int, kind: str, title: str, facts: Sequence[JsonObject], more: int = 0) -> Message:
        link = facts[0].get("url") if len(facts) == 1 else self._public_url and self._public_url + "/crashes"
        return {"id": "msg_" + secrets.token_hex(12), "channel_id": channel_id, "tries": 0, "body": to_json({
            "type": kind, "timestamp": iso_time(self._store.now), "data": {
                "title": title, "facts": facts, "more": more, **({"url": link} if link else {})}})}

    def _queue(self, db: Connection, message: Message) -> None:
        db.execute("""
            insert into messages (id, channel_id, created_at, body, due_at) values (:id, :channel_id, :now, :body, :now)
            """, {**message, "now": self._store.now})

    def _queue_messages(self) -> None:
        """Makes messages of the facts that have waited for a minute, and of the digests that are due. A channel gets no
        more messages for facts while MAX_HOURLY_MESSAGES are under an hour old or wait for a receiver that is down."""
        now = self._store.now
        with self._store.reading() as db:
            channels = dict_rows(db, """
                select channels.*, name as app, case
                    when exists (select 1 from facts where id > last_fact and at not between :since and :now) then (
                        select count(*) from messages  -- due_at = taken_until if only this message was refused
                        where channel_id = channels.id and (created_at > :hour or due_at > taken_until)
                    ) else :most end as messages  -- without new facts, nothing is counted: that reads whole messages
                from channels left join apps on apps.id = app_id
                where ended_at is null order by channels.id
                """, {"since": now - FACT_DELAY + 1, "now": now, "hour": now - HOUR,  # at > now: a clock was set back
                      "most": MAX_HOURLY_MESSAGES})
        for channel in channels:
            if channel["digest_at"] is not None and channel["digest_at"] <= now:
                self._queue_digest(channel)
            if channel["messages"] < MAX_HOURLY_MESSAGES:
                self._queue_facts(channel)

    def _queue_digest(self, channel: JsonObject) -> None:
        """Makes a digest that begins where the last one ended, so that no moment is left out or repeated."""
        id, due_at, app = channel["id"], channel["digest_at"], channel["app"]
        next_due_at = due_at + DAY * (1 + (self._store.now - due_at) // DAY)
        digest = self._digest(app, due_at - DAY, next_due_at - DAY)
        with self._store.writing() as db:
            apps = {None, *(name for name, in db.execute("select name from apps"))}  # one may have been deleted
            facts = [{"type": "digest", **fact} for fact in digest if fact.get("app") in apps]
            if db.execute("update channels set digest_at = ? where id = ? and digest_at = ?",
                          (next_due_at, id, due_at)).rowcount:  # 0 if another process was first
                self._queue(db, self._message(id, "digest", f"backfeedr: the last day of {app or 'all apps'}", facts))

    def _queue_facts(self, channel: JsonObject) -> None:
        """Makes a message of a channel's facts, unless the oldest is less than a minute old."""
        now = self._store.now
        with self._store.writing() as db:  # waits for other commits, so no fact with a lower id can come later
            rows = dict_rows(db, """
                select facts.id, kind, at, name as app, group_hash, detail from facts join apps on apps.id = app_id
                where facts.id > :last_fact and (app_id = :app_id or :app_id is null and is_test = 0)
                    and instr(',' || :kinds || ',', ',' || kind || ',')
                order by row_number() over (partition by app_id order by facts.id), facts.id  -- so no app hides another
                """, channel)
            if rows and now - FACT_DELAY < rows[0]["at"] <= now:
                return
            is_first = db.execute("""
                update channels set last_fact = (select coalesce(max(id), last_fact) from facts)
                where id = :id and last_fact = :last_fact""", channel).rowcount  # 0 if another process was first
            if rows and is_first:
                facts = list(map(self._fact_json, sorted(rows[:MAX_FACTS], key=itemgetter("id"))))
                counts = Counter(row["kind"].rpartition(".")[2] for row in rows)
                title = "backfeedr: " + ", ".join(f"{count:,} {word}" for word, count in counts.items())
                self._queue(db, self._message(channel["id"], rows[0]["kind"], title, facts, len(rows) - len(facts)))
            db.execute("delete from facts where id <= (select min(last_fact) from channels where ended_at is null)")

    def _fact_json(self, row: JsonObject) -> JsonObject:
        app, group_hash, detail = row["app"], row["group_hash"], json.loads(row["detail"])
        page = f"{self._public_url}/crashes/{group_hash}" if group_hash else f"{self._public_url}/releases"
        fact = {"type": row["kind"], "at": iso_time(row["at"]), "app": app, "group_hash": group_hash,
                **{name: detail.get(name) for name in _FACT_FIELDS}, "text": _fact_text(row["kind"], app, detail),
                "url": self._public_url and f"{page}?{urlencode({'app': app})}"}
        return {name: value for name, value in fact.items() if value not in (None, "")}

    # Delivery

    def deliver(self) -> Counter[str]:
        """Tries once to send each message that is due; returns how many were `sent` and how many `failed`. If a
        receiver is down, its other messages wait for the next call, because a try may take a long time."""
        counts, down = Counter(sent=0, failed=0), set()
        self._queue_messages()
        with self._store.reading() as db:
            due = dict_rows(db, """
                select messages.id, channel_id, messages.created_at, body, tries, url, secret, with_reason from messages
                join channels on channels.id = channel_id
                where due_at <= :now and taken_until <= :now
                order by messages.created_at, messages.id""", {"now": self._store.now})
        for message in due:
            if message["channel_id"] not in down and not self._stopping.is_set() and self._claim(message):
                error = self._attempt(message)
                counts["failed" if error else "sent"] += 1
                if error and error.is_receiver_down:
                    down.add(message["channel_id"])
        return counts

    def _claim(self, message: Message) -> bool:
        """Keeps others from sending a message for CLAIM_TIME; returns False if another process has claimed it."""
        now = self._store.now
        with self._store.writing(shared=True) as db:
            is_claimed = db.execute("""
                update messages set tries = tries + 1, taken_until = :until
                where id = :id and tries = :tries and due_at <= :now and taken_until <= :now
                """, {**message, "now": now, "until": now + CLAIM_TIME}).rowcount
            if is_claimed:  # reads the body again: an app may have been deleted meanwhile, and its facts with it
                message["body"], = db.execute("select body from messages where id = ?", (message["id"],)).fetchone()
                if message["with_reason"]:
                    message["body"] = _with_reasons(db, message["body"])
            return bool(is_claimed)

    def _attempt(self, message: Message) -> DeliveryError | None:
        """Sends a message and records what came of it. Returns the error, if there was one."""
        error = None
        try:
            CHANNELS.get(urlsplit(message["url"]).scheme, _send_by_apprise)(message, self._store.now)
        except DeliveryError as failure:
            error = failure
        except Exception as unexpected:  # must not hold up other channels; its text may contain the address
            log.error("cannot send to channel %d: %s", message["channel_id"], type(unexpected).__name__)
            error = DeliveryError(type(unexpected).__name__)
        if not self._stopping.is_set():  # else the message is sent again after the next start
            self._record(message, error)
        return error

    def _record(self, message: Message, error: DeliveryError | None) -> None:
        """Records the outcome of a try, and when the next is due. 410 ends the channel, until a test succeeds."""
        now, tries, due_at, taken_until = self._store.now, message["tries"], None, 0
        has_ended = error is not None and error.status == 410
        retry_until = message.get("created_at", 0) + sum(RETRY_SECONDS) * SECOND  # early tries must not shorten this
        if error and (tries < len(RETRY_SECONDS) or now < retry_until):
            pause = RETRY_SECONDS[min(tries, len(RETRY_SECONDS) - 1)] * SECOND
            due_at = now + max(pause, error.retry_after)
            taken_until = due_at  # so that it neither counts as waiting for a receiver that is down, nor is sent early
            if error.is_receiver_down and tries < len(RETRY_SECONDS):  # after ten tries, it is the message
                taken_until = min(now + error.retry_after, due_at - 1) if error.retry_after else 0
        with self._store.writing(shared=True) as db:  # the channel first, so that two hosts do not deadlock
            db.execute("""
                update channels set error = ?, error_at = ?, sent_at = coalesce(?, sent_at),
                    ended_at = case when ? > 0 then null else coalesce(?, ended_at) end
                where id = ?""", (error and str(error), now if error else None, None if error else now,
                                  int(not error), now if has_ended else None, message["channel_id"]))
            db.execute("""
                update messages set due_at = :due, taken_until = :taken,
                    body = case when :due is null then '' else body end
                where id = :id and due_at is not null  -- null: another process sent it, or its app was deleted
                """, {"due": due_at, "taken": taken_until, "id": message["id"]})
            if not error:  # the receiver is up again: nothing waits for hours
                db.execute("update messages set due_at = ? where channel_id = ? and due_at > ? and taken_until <= ?",
                           (now, message["channel_id"], now + HOUR, now))
            if has_ended:
                db.execute("delete from messages where channel_id = ?", (message["channel_id"],))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Delivers in a thread while the block runs. A message that is being sent at the end may be sent again."""
        def deliver_until_stopped() -> None:
            while not self._stopping.wait(POLL_SECONDS):
                try:
                    with suppress(StorageUnavailable):  # the store has logged it
                        self.deliver()
                except Exception:
                    log.exception("unexpected error")

        self._stopping.clear()
        thread = threading.Thread(target=deliver_until_stopped, name="backfeedr alerts", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            thread.join(timeout=1)


def _one_line(text: str) -> str:
    """The first 200 characters of a text, with single spaces and no line breaks."""
    return " ".join(text.split())[:200]


def _with_reasons(db: Connection, body: str) -> str:
    """The body of a message with the reasons of its crashes. They are not stored with it, but looked up for each try:
    a reason must not outlive its report."""
    message = json.loads(body)
    for fact in message["data"]["facts"]:
        reason, = db.execute("""
            select max(exception_reason) from groups join apps on apps.id = app_id where name = ? and group_hash = ?
            """, (fact.get("app"), fact.get("group_hash"))).fetchone()
        if reason := _one_line(reason or ""):
            fact.update(reason=reason, text=f"{fact['text']}: {reason}")
    return to_json(message)


def _fact_text(kind: str, app: str, detail: JsonObject) -> str:
    """A line such as "New: SIGABRT in Cart.pay() (Shop 1.3.0 (48), 3 crashes, 1 device)"."""
    release = f"{app} {with_build(detail.get('app_version'), detail.get('build_number'))}".rstrip()
    if kind == "release.worse":
        return _one_line(f"{release} is {detail.get('text') or 'worse'}")
    crash = detail.get("exception_type", "a crash") + (f" in {detail['place']}" if detail.get("place") else "")
    fixed_in, crashes, devices = map(detail.get, ("fixed_in", "crashes", "devices"))
    notes = filter(None, (release, fixed_in and f"fixed in {fixed_in}",
                          crashes and plural(crashes, "crash", "es"), devices and plural(devices, "device")))
    return f"{kind.rpartition('.')[2].capitalize()}: {_one_line(crash)} ({_one_line(', '.join(notes))})"


# == Public metrics ============================================================
# Answers from figures alone, so that their cost depends on what they show and not on what is stored. Windows are UTC
# days. Without an app, an answer is the sum over the live apps.

class PublicMetrics:
    """Answers questions about figures as of now, in the shapes of the API. Raises Refusal for an unknown app."""

    def __init__(self, store: Store):
        self._store = store

    @contextmanager
    def _snapshot(self, app: str | None = None) -> Iterator[tuple[Connection, int | None]]:
        """A connection that sees one moment, and the id of the app, or None for all live apps."""
        with self._store.reading() as db:
            db.execute("begin")
            row = db.execute("select id from apps where name = ?", (app,)).fetchone()
            if app is not None and row is None:
                raise Refusal("not found")
            yield db, row[0] if row else None
            db.execute("commit")

    def _last_days(self, days: int) -> range:
        today = self._store.now // DAY
        return range(today - days + 1, today + 1)

    def _sums(self, app: str | None, days: int | None, table: str, *columns: str) -> JsonObject:
        """See sums_per_day: the last days, 30 by default."""
        with self._snapshot(app) as (db, app_id):
            return sums_per_day(db, app_id, self._last_days(days or 30), table, *columns)

    def daily_crashes(self, app: str | None = None, days: int | None = None) -> JsonObject:
        """The crashes per UTC day: of the last `days` by date, or of the last seven from Monday to Sunday."""
        labels, crashes = self._sums(app, days or WEEK_DAYS, "crash_days", "crashes").values()
        if days:
            return {"labels": labels, "data": crashes}
        counts = {date.fromisoformat(day).weekday(): n for day, n in zip(labels, crashes)}
        return {"labels": ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"], "data": [counts[n] for n in range(7)]}

    def crash_types(self, app: str | None = None, days: int | None = None) -> JsonObject:
        """The crashes of the 100 most frequent exception types: of the last `days`, or all that are stored."""
        return self._most_frequent(app, days, "exception_type", 100)

    def devices(self, app: str | None = None, days: int | None = None) -> JsonObject:
        """The crashes of the ten most frequent device models: of the last `days`, or all that are stored."""
        return self._most_frequent(app, days, "device_model", 10)

    def _most_frequent(self, app: str | None, days: int | None, field: str, limit: int) -> JsonObject:
        """The most frequent labels of the last days, or of all crashes that are kept."""
        shown: Sequence[int] = self._last_days(days) if days else [ALL_DAYS]
        with self._snapshot(app) as (db, app_id):
            return labels_and_counts(db.execute(f"""
                select label, sum(crashes) from labels
                where {APP_FILTER} and field = :field and day between :first and :last
                group by label
                order by sum(crashes) desc, label
                limit :limit""", {"app": app_id, "field": field, "first": shown[0], "last": shown[-1], "limit": limit}))

    def overview(self, app: str | None = None) -> JsonObject:
        """A summary of the seven UTC days that end today, with the devices of the last 24 hours, to the full hour."""
        week, since = self._last_days(WEEK_DAYS), (self._store.now - DAY) // HOUR
        with self._snapshot(app) as (db, app_id):
            crashes = sum(sums_per_day(db, app_id, week, "crash_days", "crashes")["crashes"])
            sessions = sum(sums_per_day(db, app_id, week, "session_days", "sessions")["sessions"])
            devices, = db.execute(f"""
                select coalesce(sum(devices), 0) from device_hours where {APP_FILTER} and hour >= :since
                """, {"app": app_id, "since": since}).fetchone()
            return {"crash_free_rate_7d": crash_free_rate(crashes, sessions), "dau": int(devices),
                    "sessions_7d": sessions, "crashes_7d": crashes,
                    "top_crashes": Groups.most_frequent(db, app_id, week)}

    def active_devices(self, app: str | None = None, days: int | None = None) -> JsonObject:
        """The devices of each UTC day, and of the 7 and 30 days that end with it."""
        return self._sums(app, days, "active_days", *Devices.ACTIVE)

    def sessions(self, app: str | None = None, days: int | None = None) -> JsonObject:
        """The sessions that began on each UTC day, and their mean and median duration: null if none has ended. The
        median, of durations with two significant digits, is also null if they are of several apps."""
        shown = self._last_days(days or 30)
        with self._snapshot(app) as (db, app_id):
            sums = sums_per_day(db, app_id, shown, "session_days", "sessions", "ended", "session_ms")
            medians = dict(db.execute(f"""
                select day, coalesce((
                    select seconds from medians where app_id = ended_days.app_id and day = ended_days.day
                    ), ({Sessions.MEDIAN}))
                from (
                    select day, max(app_id) as app_id, max(ended) as ended from session_days
                    where {APP_FILTER} and day between :first and :last and ended > 0
                    group by day having count(*) = 1) as ended_days
                """, {"app": app_id, "first": shown[0], "last": shown[-1]}))
        return {"labels": sums["labels"], "sessions": sums["sessions"],
                "median_seconds": [medians.get(day) for day in shown],
                "mean_seconds": [round(ms / ended / SECOND, 1) if ended else None
                                 for ms, ended in zip(sums["session_ms"], sums["ended"])]}

    def event_names(self, app: str | None = None, days: int | None = None) -> JsonObject:
        """The events of each UTC day, for the 50 most frequent pairs of name and type."""
        shown = self._last_days(days or 30)
        with self._snapshot(app) as (db, app_id):
            parameters = {"app": app_id, "first": shown[0], "last": shown[-1]}
            events = dict_rows(db, f"""
                select name, type, sum(events) as count from event_names
                where {APP_FILTER} and day between :first and :last
                group by name, type
                order by count desc, name, type
                limit 50""", parameters)
            for event in events:
                counts = dict(db.execute(f"""
                    select day, sum(events) from event_names
                    where {APP_FILTER} and name = :name and type = :type and day between :first and :last
                    group by day""", {**parameters, **event}))
                event["days"] = [counts.get(day, 0) for day in shown]
        return {"labels": list(map(iso_day, shown)), "events": events}

    def retention(self, app: str | None = None, days: int | None = None) -> JsonObject:
        """The percentage of the devices first seen on a UTC day that came back 1, 7 and 30 days later. It is null if
        that later day is not over yet, or if no device was new."""
        labels, devices, *back = self._sums(app, days, "cohorts", "devices", *Devices.BACK).values()
        return {"labels": labels, "devices": devices, **{
            f"day_{later}": [round(100 * count / new, 2) if new and later < days_ago else None
                             for count, new, days_ago in zip(counts, devices, reversed(range(len(labels))))]
            for later, counts in zip(Devices.BACK.values(), back)}}

    def releases(self, app: str | None = None, sort: str | None = None) -> JsonObject:
        """The latest 100 releases: the last to appear first, or for `sort` "version" the highest first. Rates are null
        without sessions or devices, and a verdict is null without an earlier release."""
        if sort not in (None, "version", "first_seen"):
            raise Refusal("invalid sort", detail="it is not one of version, first_seen")
        with self._snapshot(app) as (db, app_id):
            releases = list(SeenReleases(db, app_id, self._store.now).latest())
        if sort == "version":
            releases.sort(key=lambda release: version_key(release["app_version"]), reverse=True)
        return {"releases": list(rows_that_fit(releases))}

    def current_releases(self, app: str | None = None) -> list[JsonObject]:
        """The newest release of each app, and the one with the most sessions if that is another, with their verdicts,
        those that are worse than before first."""
        with self._snapshot(app) as (db, app_id):
            seen, names = SeenReleases(db, app_id, self._store.now), dict(db.execute("select id, name from apps"))
            current = seen.current()
            verdicts = seen.verdicts(current)
        releases = [{"app": names[id], "app_version": version, "verdict": verdicts.get((id, version))}
                    for id, version in current]
        return sorted(releases, key=lambda row: (row["verdict"] or {}).get("word") != "worse")

    def is_empty(self, app: str | None = None) -> bool:
        """Whether an app has sent nothing yet. Ends of sessions do not count."""
        with self._snapshot(app) as (db, app_id):
            return not any(db.execute(f"select 1 from {table} where {APP_FILTER} limit 1", {"app": app_id}).fetchone()
                           for table in ("crash_days", "session_days", "event_names"))


# == Stored reports ============================================================
# Crashes and events as they were sent, with symbols, and where a page of a list begins.

def _load_reports(db: Connection, table: str, seqs: Sequence[int], max_text: int = PAGE_CHARACTERS) -> list[JsonObject]:
    """Crashes or events as they were sent, each with its app and the time of its receipt: the first one, and those that
    fit with it in `max_text` characters."""
    apps, reports, symbols = dict(db.execute("select id, name from apps")), [], Symbols(db)
    rows = (dict_rows(db, f"select * from {table} where seq = ?", (seq,))[0] for seq in seqs)
    for row in rows_that_fit(rows, max_text, lambda row: text_size(row.values())):
        report = as_sent({"id": row.pop("id"), "app": apps.get(row.pop("app_id")), **row})
        _symbolicate(symbols, report if table == "crashes" else report.get("properties", {}))
        reports.append(report)
    return reports


def _symbolicate(symbols: Symbols, report: JsonObject) -> None:
    """Names the frames of `stack_trace`. If that changes them, keeps those that were sent as `raw_stack_trace`."""
    frames: Any = report.get("stack_trace")
    if _is_list_of_objects(frames):
        report["stack_trace"] = list(symbols.symbolicated(frames, SHOWN_LOOKUPS - symbols.lookups))
        if report["stack_trace"] != frames:
            report["raw_stack_trace"] = frames


_NOT_SENT = ("seq", "seq_ahead_ms", "other", "images")  # columns that are the server's own
_AS_SENT: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("stack_trace", "properties", "extra"), json.loads), "is_charging": bool,
    **dict.fromkeys(("received_at", "occurred_at"), iso_time)}


def as_sent(row: Mapping[str, Any]) -> JsonObject:
    """The report in a row as it was sent, without what was absent."""
    return {name: _AS_SENT[name](value) if name in _AS_SENT else value for name, value in row.items()
            if value is not None and name not in _NOT_SENT and (value or name != "clock_ahead_ms")}


def _parse_cursor(cursor: str | None, pattern: str, default: Any) -> Any:
    """The parts of a cursor that the pattern captures, or the default for None. Raises Refusal."""
    match = re.fullmatch(pattern, cursor or "")
    if cursor is not None and match is None:
        raise Refusal("invalid cursor")
    return match.groups() if match else default


# == Group metrics =============================================================
# Answers about groups of crashes. Most of them read reports, a page at a time.

GROUP_REPORTS = 20  # crashes on a page of a group
MAX_VERSIONS = 100  # versions that a list names for a group
MAX_MISSING_BUILDS = 100  # builds without symbols in a list
SCORED_GROUPS, SHOWN_GROUPS = 20, 5  # groups that get a score: by crashes, and as many by devices; and those shown

STATE_CONDITIONS: dict[str | None, str] = {  # the condition of each `state` by which a list can be filtered
    None: "1 = 1", "open": "coalesce(state, 'open') = 'open'", "resolved": "state = 'resolved'",
    "muted": "state = 'muted'", "regressed": "state = 'open' and regressed_at is not null", "new": "came_at >= :week"}
SORT_COLUMNS = {"crashes": "count", "devices": "devices", "last_seen": "last_seen", "first_seen": "first_seen"}
IN_GROUP = f"{APP_FILTER} and group_hash = :group"
APPS_OF_GROUP = f"select app_id from groups where {IN_GROUP} union select app_id from triage where {IN_GROUP}"
_HAS_TEXT = "(:text is null or instr(search, :text))"
_LISTED_WITHOUT_CRASHES = ":state in ('resolved', 'muted', 'regressed')"
STORED_GROUP_COUNTS = f"""
    select app_id, group_hash, crashes, devices, last_seen, came_at from groups
    where {APP_FILTER} and {_HAS_TEXT} and (crashes > 0 or {_LISTED_WITHOUT_CRASHES})
    union all select app_id, group_hash, 0, 0, 0, 0 from triage
    where {APP_FILTER} and :text is null and {_LISTED_WITHOUT_CRASHES}"""
IS_LISTED = f"""{RECEIVED_AT} >= :since and (:version is null or substr(app_version, 1, :length) = :version)
        and (:first is null or {COUNTED_AT} / {DAY} between :first and :last)"""  # the crashes that a list counts
FILTERED_GROUP_COUNTS = f"""
    select known.app_id, known.group_hash, count(*) as crashes, count(distinct device_id_hash) as devices,
        max({COUNTED_AT}) as last_seen, min(came_at) as came_at
    from (select app_id, group_hash, came_at from groups where {APP_FILTER} and last_seen >= :since
        and {_HAS_TEXT} and (:candidates is null or instr(:candidates, group_hash))) as known
    cross join crashes on crashes.app_id = known.app_id and crashes.group_hash = known.group_hash
    where {IS_LISTED}
    group by known.app_id, known.group_hash"""


class GroupMetrics(PublicMetrics):
    """Answers about groups. Lists come in pages of `limit`; `cursor` is the `next` of the page before, or None."""

    def news(self, app: str | None = None) -> list[JsonObject]:
        """The 50 groups that appeared or regressed last, the latest first; `at` is in milliseconds."""
        with self._snapshot(app) as (db, app_id):
            rows = dict_rows(db, f"""
                select 'new' as what, came_at as at, app_id, group_hash from groups
                where {APP_FILTER} and group_hash <> :other and crashes > 0  -- else the group has no page
                union all select 'regressed', regressed_at, app_id, group_hash from triage
                where {APP_FILTER} and regressed_at is not null and exists (
                    select 1 from groups where app_id = triage.app_id and group_hash = triage.group_hash)
                order by at desc, what, app_id, group_hash limit 50""", {"app": app_id, "other": OTHER})
            return self._described(db, rows)

    def groups(self, app: str | None = None, version: str | None = None, days: int | None = None,
               text: str | None = None, state: str | None = None, sort: str | None = None, limit: int = 50,
               cursor: str | None = None) -> JsonObject:
        """The groups of stored crashes, by number of crashes or as `sort` says. `version` may end with *. `text` is
        searched for in type and hash, and in the reason, own symbols and files of the latest crash. `state` is one
        of STATE_CONDITIONS; without `version` or `days`, resolved, muted and regressed groups need no stored crash. A
        group `is_new` if first seen in `version`, or without a version, first received within 7 days."""
        if state not in STATE_CONDITIONS:
            raise Refusal("invalid state", detail=f"it is not one of {', '.join(filter(None, STATE_CONDITIONS))}")
        if sort not in (None, *SORT_COLUMNS):
            raise Refusal("invalid sort", detail=f"it is not one of {', '.join(SORT_COLUMNS)}")
        column = SORT_COLUMNS[sort or "crashes"]
        value, group = _parse_cursor(cursor, r"([0-9]{1,18})-([0-9a-f]{16}|\(other\))", (MAX_NUMBER, ""))
        shown_days: Sequence[int | None] = self._last_days(days) if days else [None]
        week = self._last_days(WEEK_DAYS)[0] * DAY
        with self._snapshot(app) as (db, app_id):
            parameters = {"app": app_id, **_version_filter(version), "first": shown_days[0], "last": shown_days[-1],
                          "text": text and text.casefold(), "limit": limit + 1, "value": int(value), "group": group,
                          "week": week, "since": (shown_days[0] or 0) * DAY - MAX_SKEW if days else 0, "state": state,
                          "column": column, "candidates": None}  # all groups
            if days and days <= WEEK_DAYS and column == "count" and not (version or text or state or cursor):
                parameters["candidates"] = self._most_crashing(db, app_id, self._last_days(days), limit + 1)
            rows = dict_rows(db, f"""
                select * from (
                    select group_hash, sum(crashes) as count, sum(devices) as devices, max(last_seen) as last_seen,
                        coalesce(min(first_at), 0) as first_seen
                    from ({FILTERED_GROUP_COUNTS if version or days else STORED_GROUP_COUNTS}) as counts
                    left join triage using (app_id, group_hash)
                    left join (  -- read once, and only for this order: a look-up would try all apps for each group
                        select group_hash, min(first_seen) as first_at from groups
                        where :column = 'first_seen' and {APP_FILTER} group by group_hash) as firsts
                        using (group_hash)
                    where {STATE_CONDITIONS[state]}
                    group by group_hash) as found
                where {column} < :value or {column} = :value and group_hash > :group
                order by {column} desc, group_hash
                limit :limit""", parameters)
            listed = (self._list_row(db, row, {**parameters, "group": row["group_hash"]}) for row in rows[:limit])
            groups = list(rows_that_fit(listed, PAGE_CHARACTERS, lambda group: text_size(group["versions"])))
        last = rows[len(groups) - 1] if rows[len(groups):] else None
        return {"groups": groups, "next": last and f"{last[column]}-{last['group_hash']}"}

    def _most_crashing(self, db: Connection, app_id: int | None, days: range, limit: int) -> str | None:
        """The groups with the most crashes on these days, separated by spaces: figures find them faster than a scan of
        crashes. None if they may be wrong: crashes have expired, or sums were deleted while a clock was fast."""
        sums, expected = (sums_per_day(db, app_id, days, table, "crashes") for table in ("group_days", "crash_days"))
        if last_deleted_seq(db) >= seq_at(days[0] * DAY - MAX_SKEW) or sums != expected:
            return None
        return " ".join(group["group_hash"] for group in Groups.most_frequent(db, app_id, days, limit))

    def _list_row(self, db: Connection, row: JsonObject, parameters: JsonObject) -> JsonObject:
        """A group as a list shows it. `row` has its sums."""
        group = self._summary(db, parameters["app"], row["group_hash"])
        first, version = (group.pop("first_version") or "")[:parameters["length"]], parameters["version"]
        is_new = (group["came_at"] or 0) >= parameters["week"] if version is None else first == version
        return {**_group_json({**group, **row, "first_seen": group["first_seen"]}),
                "versions": self._versions(db, parameters, MAX_VERSIONS), "is_new": is_new}

    @staticmethod
    def _versions(db: Connection, parameters: JsonObject, limit: int) -> list[str]:
        """The versions in which a group crashed, those with the most crashes, in ascending order."""
        return sorted((version for version, in db.execute(f"""
            select app_version from crashes
            where {IN_GROUP} and app_version is not null and {IS_LISTED}
            group by app_version
            order by count(*) desc, app_version
            limit {limit}""", parameters)), key=version_key)

    def versions_of(self, group_hash: str, app: str | None = None) -> list[str]:
        """The versions in which a group crashed, in ascending order."""
        with self._snapshot(app) as (db, app_id):
            return self._versions(db, {"app": app_id, "group": group_hash, **_version_filter(None), "since": 0,
                                       "first": None, "last": None}, MAX_NAMES)

    def _summary(self, db: Connection, app_id: int | None, group_hash: str) -> JsonObject:
        """A summary of a group: sums and times are those of all its apps, the rest is that of the app with its latest
        crash. If its crashes have expired, only the decision about it is left. {} for an unknown group."""
        return next(iter(dict_rows(db, f"""
            select :group as group_hash, known.app_id, coalesce(exception_type, '') as exception_type,
                coalesce(exception_reason, '') as exception_reason, coalesce(place, '') as place,
                coalesce(sum(crashes) over (), 0) as count, coalesce(sum(devices) over (), 0) as devices,
                min(first_seen) over () as first_seen, max(last_seen) over () as last_seen,
                min(came_at) over () as came_at, first_value(first_version) over (
                    order by coalesce(first_seen, {MAX_NUMBER}), known.app_id) as first_version,
                coalesce(state, 'open') as state, fixed_in, regressed_at, changed_at
            from ({APPS_OF_GROUP}) as known
            left join groups on groups.app_id = known.app_id and groups.group_hash = :group
            left join triage on triage.app_id = known.app_id and triage.group_hash = :group
            order by coalesce(crashes, 0) > 0 desc, coalesce(groups.last_seen, 0) desc, known.app_id
            limit 1""", {"app": app_id, "group": group_hash})), {})

    def group(self, group_hash: str, app: str | None = None, limit: int = GROUP_REPORTS,
              cursor: str | None = None) -> JsonObject:
        """A group with its spread, its history, and its crashes, the latest first. Raises Refusal if it is unknown."""
        at, id = _parse_cursor(cursor, "([0-9]{1,18})-([0-7][0-9a-f]{15})", (MAX_NUMBER, "0"))
        with self._snapshot(app) as (db, app_id):
            parameters = {"app": app_id, "group": group_hash, "at": int(at), "seq": int(id, 16), "limit": limit + 1}
            summary = self._summary(db, app_id, group_hash)
            if not summary or not summary["count"] and summary["changed_at"] is None:
                raise unknown_group_refusal(db, app, group_hash)
            spread = {name: labels_and_counts(db.execute(f"""
                select {column}, count(*) from crashes
                where {IN_GROUP} and {column} is not null
                group by {column} order by count(*) desc, {column} limit 20""", parameters)) for name, column in (
                    ("versions", "app_version"), ("systems", "os_version"), ("device_models", "device_model"))}
            page = db.execute(f"""
                select seq, {COUNTED_AT} as at from crashes
                where {IN_GROUP} and ({COUNTED_AT}, seq) < (:at, :seq)
                order by at desc, seq desc limit :limit""", parameters).fetchall()
            history = dict_rows(db, """
                select at, what, detail from group_history where app_id = ? and group_hash = ? order by at, entry
                """, (summary["app_id"], group_hash))
            missing = self._missing_builds(db, app_id, group_hash, 3)
            reports = _load_reports(db, "crashes", [seq for seq, _ in page[:limit]])
        seq, at = page[len(reports) - 1] if reports else (0, 0)
        return {**_group_json(summary), **spread, "missing_symbols": missing,
                "history": [{**entry, "at": iso_time(entry["at"])} for entry in history], "reports": reports,
                "next": f"{at}-{crash_id(seq)}" if page[len(reports):] else None}

    def attention(self, app: str | None = None) -> JsonObject:
        """The open groups that crashed on the seven UTC days that end today. `new` has the latest that were new or
        regressed then, and `new_count` counts all of these. `first` has those with the highest score: the devices that
        crashed in the app's current releases, halved for each day since the last crash. A group of two apps is listed
        twice. A group without a stored crash or decision has no page, so it is left out."""
        week = self._last_days(WEEK_DAYS)
        since = week[0] * DAY
        with self._snapshot(app) as (db, app_id):
            parameters = {"app": app_id, "first": week[0], "last": week[-1], "since": since - MAX_SKEW}
            rows = dict_rows(db, f"""
                select groups.app_id, groups.group_hash, sums.crashes as count, groups.devices, last_seen,
                    max(came_at, coalesce(regressed_at, 0)) as news_at
                from (
                    select app_id, group_hash, sum(crashes) as crashes from group_days
                    where {APP_FILTER} and day between :first and :last and group_hash <> '{OTHER}'
                    group by app_id, group_hash) as sums
                cross join groups on groups.app_id = sums.app_id and groups.group_hash = sums.group_hash
                left join triage on triage.app_id = groups.app_id and triage.group_hash = groups.group_hash
                where coalesce(state, 'open') = 'open' and (groups.crashes > 0 or changed_at is not null)
                order by count desc, groups.group_hash, groups.app_id""", parameters)
            new = sorted((row for row in rows if row["news_at"] >= since), key=itemgetter("news_at"), reverse=True)
            by_devices = sorted(rows[SCORED_GROUPS:], key=itemgetter("devices"), reverse=True)
            first = rows[:SCORED_GROUPS] + by_devices[:SCORED_GROUPS]  # crashes alone say little: one device may loop
            current = SeenReleases(db, app_id, self._store.now).current()
            for row in first:
                versions: list[Any] = [version for id, version in current if id == row["app_id"]] or [None]
                row["devices"], row["of_current"] = db.execute(f"""
                    select count(distinct device_id_hash),
                        count(distinct case when app_version in (:newest, :most_used) then device_id_hash end)
                    from crashes
                    where app_id = :app_id and group_hash = :group_hash and {RECEIVED_AT} >= :since
                        and {COUNTED_AT} / {DAY} between :first and :last
                    """, {**parameters, **row, "newest": versions[0], "most_used": versions[-1]}).fetchone()
                row["has_release"] = versions != [None]
                row["score"] = row["of_current"] * 0.5 ** (max(0, self._store.now - row["last_seen"]) / DAY)
            first.sort(key=itemgetter("score", "devices", "count"), reverse=True)
            shown = {name: [{**_group_json(group), "is_new": group["came_at"] >= since}
                            for group in self._described(db, groups[:SHOWN_GROUPS])]
                     for name, groups in (("new", new), ("first", first))}
        return {**shown, "new_count": len(new)}

    def _described(self, db: Connection, rows: Sequence[JsonObject]) -> list[JsonObject]:
        """The summaries of groups of single apps, with the names of these apps."""
        apps = dict(db.execute("select id, name from apps"))
        return [{**self._summary(db, row["app_id"], row["group_hash"]), "app": apps[row["app_id"]], **row}
                for row in rows]

    def neighbours(self, crash: JsonObject, app: str | None = None) -> tuple[str | None, str | None]:
        """The ids of the crashes before and after this one in its group, or None."""
        with self._snapshot(app) as (db, app_id):
            parameters = {"app": app_id, "group": crash["group_hash"], "seq": int(crash["id"], 16)}
            rows = [db.execute(f"""
                select seq from crashes
                where {IN_GROUP} and ({COUNTED_AT}, seq) {comparison} (
                    select {COUNTED_AT}, seq from crashes where seq = :seq)
                order by {COUNTED_AT} {order}, seq {order} limit 1
                """, parameters).fetchone() for comparison, order in (("<", "desc"), (">", "asc"))]
        older, newer = (row and crash_id(row[0]) for row in rows)
        return older, newer

    def next_build(self, group_hash: str, app: str) -> str:
        """The first build that may have the fix of a group: the newest of the app or, if the group has crashed in that
        one, the next. "" if no version of the app is known."""
        with self._snapshot(app) as (db, app_id):
            version = next(iter(SeenReleases(db, app_id, self._store.now).current()), (0, ""))[1]
            build = max((number for number, in db.execute("""
                select build_number from builds where app_id = ? and app_version = ? order by first_seen desc limit 100
                """, (app_id, version))), key=version_key, default="")
            has_crashed = db.execute("""
                select 1 from crashes where app_id = ? and group_hash = ? and app_version = ?
                    and coalesce(build_number, '') = ? limit 1""", (app_id, group_hash, version, build)).fetchone()
        name = with_build(version, build)
        return re.sub("[0-9]+(?=[^0-9]*$)", lambda number: str(int(number[0]) + 1), name) if has_crashed else name

    def days_of_groups(self, groups: Sequence[str], app: str | None = None, version: str | None = None,
                       days: int = 30) -> JsonObject:
        """The apps of each of these groups, and its crashes on each of the last days, the oldest first."""
        shown_days, answer = self._last_days(days), {}
        with self._snapshot(app) as (db, app_id):
            parameters = {"app": app_id, **_version_filter(version), "first": shown_days[0], "last": shown_days[-1],
                          "since": shown_days[0] * DAY - MAX_SKEW}
            for group in groups:
                parameters["group"] = group
                counts = dict(db.execute(f"""
                    select {COUNTED_AT} / {DAY} as day, count(*) from crashes where {IN_GROUP} and {IS_LISTED}
                    group by day""", parameters))
                apps = db.execute(f"select name from apps where id in ({APPS_OF_GROUP}) order by name", parameters)
                answer[group] = {"days": [counts.get(day, 0) for day in shown_days], "apps": [name for name, in apps]}
        return {"labels": list(map(iso_day, shown_days)), "groups": answer}

    def _missing_builds(self, db: Connection, app_id: int | None, group: str | None, limit: int) -> list[JsonObject]:
        """The builds whose symbols are missing, in all groups or in one."""
        return [self._missing_build(db, **row) for row in dict_rows(db, f"""
            select uuid, app_id, group_hash, total as crashes from (
                select uuid, app_id, group_hash, sum(crashes) over (partition by uuid) as total, row_number() over (
                    partition by uuid order by crashes desc, app_id, group_hash) as rank
                from group_images
                where {APP_FILTER} and (:group is null or group_hash = :group)
                    and uuid not in (select uuid from symbols where received = parts)) as ranked
            where rank = 1 order by total desc, uuid limit :limit""", {"app": app_id, "group": group, "limit": limit})]

    @staticmethod
    def _missing_build(db: Connection, uuid: str, app_id: int, group_hash: str, crashes: int) -> JsonObject:
        """A build without symbols, described by its latest crash in the group where it has the most crashes."""
        app, version, build, trace = db.execute("""
            select name, app_version, build_number, stack_trace from (
                select * from crashes where seq in (
                    select seq from crashes where app_id = ? and group_hash = ? and group_hash <> '(other)'
                    order by seq desc limit 20)) as latest  -- '(other)' may have very many
            join apps on apps.id = app_id
            where instr(images, ?)
            order by seq desc limit 1""", (app_id, group_hash, uuid)).fetchone() or [None] * 4
        binaries = (frame.binary for frame in map(read_frame, json.loads(trace or "[]")) if frame.uuid == uuid)
        return {"uuid": uuid, "binary": next(filter(None, binaries), None), "app": app, "app_version": version,
                "build_number": build, "crashes": crashes}


def _group_json(group: JsonObject) -> JsonObject:
    """A group from _summary() as the API shows it."""
    answer = {name: value for name, value in group.items() if name not in ("app_id", "came_at", "changed_at")}
    return {**answer, **{name: iso_time(group[name]) if group[name] else None
                         for name in ("first_seen", "last_seen", "regressed_at")}}


def _version_filter(version: str | None) -> JsonObject:
    """The version in the parameters of IS_LISTED. A version that ends with * stands for all that begin like it."""
    if version and version.endswith("*"):
        return {"version": version[:-1], "length": len(version) - 1}
    return {"version": version, "length": MAX_TEXT}


# == Metrics ===================================================================
# Answers about single reports, devices and symbols, and the daily digest.

SCANNED_EVENTS = 200_000  # events that are read for a page, which may be short although another page follows
EVENTS_BEFORE_CRASH = 20  # events that the page of a crash shows, out of the session's latest 100


class Metrics(GroupMetrics):
    """Answers all questions. Lists come in pages, as in GroupMetrics."""

    def digest(self, app: str | None, since: int, until: int) -> list[JsonObject]:
        """The facts of a digest from `since` to `until`, in milliseconds: are the current releases worse, what is new,
        what is fixed? A fact about one app has its name as `app`, so that it can be dropped if the app is deleted."""
        verdicts = [{"app": row["app"], "text": f"{row['app']} {row['app_version']} is {row['verdict']['text']}"}
                    for row in self.current_releases(app) if row["verdict"]]
        with self._snapshot(app) as (db, app_id):
            parameters = {"app": app_id, "since": since, "until": until, "other": OTHER}
            crashes = sums_per_day(db, app_id, self._last_days(3), "crash_days", "crashes")["crashes"]
            new = db.execute(f"""
                select exception_type, place from groups
                where {APP_FILTER} and came_at >= :since and came_at < :until and group_hash <> :other
                order by came_at desc, first_seen desc""", parameters).fetchall()
            resolved, regressed = db.execute(f"""
                select count(case when state = 'resolved' and changed_at >= :since and changed_at < :until then 1 end),
                    count(case when regressed_at >= :since and regressed_at < :until then 1 end)
                from triage where {APP_FILTER}""", parameters).fetchone()
        names = [_one_line(kind) + (f" in {_one_line(place)}" if place else "") for kind, place in new[:3]]
        return [*verdicts[:MAX_FACTS],
                {"text": f"Crashes: {crashes[1]:,} yesterday, {crashes[0]:,} the day before"},
                {"text": "; ".join([f"New: {len(new):,}", *names])},
                {"text": f"Resolved: {resolved:,}; regressed: {regressed:,}"}]

    def crash(self, id: str, app: str | None = None) -> JsonObject:
        """A crash as it was sent. Raises Refusal if it is not stored."""
        with self._snapshot(app) as (db, app_id):
            seq = int(id, 16) if re.fullmatch("[0-7][0-9a-f]{15}", id) else -1
            if not db.execute(f"select 1 from crashes where seq = :seq and {APP_FILTER}",
                              {"seq": seq, "app": app_id}).fetchone():
                raise Refusal("not found")
            return _load_reports(db, "crashes", [seq])[0]

    def events_before(self, crash: JsonObject) -> list[JsonObject]:
        """The last events of the session before a crash, by the device's clock, the oldest first."""
        if "session_id" not in crash:
            return []
        events = self.events(crash["app"], session_id=crash["session_id"], limit=100,
                             device_id_hash=crash.get("device_id_hash"))["events"]
        events.sort(key=lambda event: (parse_time(event["occurred_at"]), event["id"]))
        crashed_at = parse_time(crash["occurred_at"])
        return [event for event in events if parse_time(event["occurred_at"]) <= crashed_at][-EVENTS_BEFORE_CRASH:]

    def events(self, app: str | None = None, type: str | None = None, name: str | None = None,
               session_id: str | None = None, limit: int = 50, cursor: str | None = None,
               oldest_first: bool = False, device_id_hash: str | None = None) -> JsonObject:
        """The stored events, the latest first. A page may be short, or empty, although another page follows."""
        order, after = ("asc", -1) if oldest_first else ("desc", MAX_NUMBER)
        after = int(_parse_cursor(cursor, "(?:evt_)?([0-7][0-9a-f]{15})", (f"{after:x}",))[0], 16)
        with self._snapshot(app) as (db, app_id):
            parameters = {"app": app_id, "type": type, "name": name, "session": session_id, "limit": limit + 1,
                          "device": device_id_hash, "scanned": SCANNED_EVENTS}
            first, last = 0, MAX_NUMBER
            if session_id is not None:  # the scan need not go beyond the session
                first, last = db.execute(f"""
                    select coalesce(min(first_seq), 0), coalesce(max(last_seq), -1) from sessions
                    where {APP_FILTER} and session_id = :session""", parameters).fetchone()
            parameters.update(first=max(first, after + 1) if oldest_first else first,
                              last=last if oldest_first else min(last, after - 1))
            scan = f"from events where seq between :first and :last order by seq {order} limit"
            seqs = [seq for seq, in db.execute(f"""
                select seq from (select seq, app_id, type, name, session_id, device_id_hash {scan} :scanned) as scanned
                where {APP_FILTER} and (:type is null or type = :type) and (:name is null or name = :name)
                    and (:session is null or session_id = :session)
                    and (:device is null or device_id_hash = :device)
                order by seq {order} limit :limit""", parameters)]
            scan_end = db.execute(f"select seq {scan} 1 offset :scanned - 1", parameters).fetchone()
            events = _load_reports(db, "events", seqs[:limit])
        following = events[-1]["id"] if seqs[len(events):] else event_ids(scan_end)[0] if scan_end else None
        return {"events": events, "next": following}

    def crashes_of_device(self, device_id_hash: str, app: str | None = None) -> list[JsonObject]:
        """The last 25 crashes that a device sent; `at` is in milliseconds."""
        with self._snapshot(app) as (db, app_id):
            return dict_rows(db, f"""
                select seq, name as app, group_hash, sent.exception_type, coalesce(place, '') as place, app_version,
                    {COUNTED_AT} as at
                from (select * from crashes where {APP_FILTER} and device_id_hash = :device
                    order by seq desc limit 25) as sent
                join apps on apps.id = app_id left join groups using (app_id, group_hash)
                order by seq desc""", {"app": app_id, "device": device_id_hash})

    def symbols(self, app: str | None = None) -> JsonObject:
        """The builds whose symbols are stored, the newest first; and those whose symbols are missing, with the number
        of crashes that would get names, the highest number first."""
        with self._snapshot(app) as (db, app_id):
            stored = dict_rows(db, """
                select uuid, binary_name as binary, arch, parts, rows, size, received = parts as complete, uploaded_at
                from symbols order by uploaded_at desc, uuid""")
            return {"symbols": [{**row, "complete": bool(row["complete"]), "uploaded_at": iso_time(row["uploaded_at"])}
                                for row in stored],
                    "missing": self._missing_builds(db, app_id, None, MAX_MISSING_BUILDS)}

    def device(self, device_id_hash: str) -> JsonObject:
        """Everything that is stored about a device, in all apps."""
        device = device_key(device_id_hash)
        with self._snapshot() as (db, _):
            apps = dict_rows(db, """
                select app_id, name as app, first_day, last_hour from apps cross join devices on app_id = apps.id
                where device = ? order by name""", (device,))
            for app in apps:
                key = app.pop("app_id"), device
                days = db.execute("select day from device_days where app_id = ? and device = ? order by day", key)
                versions = db.execute("select app_version from device_versions where app_id = ? and device = ?", key)
                app["versions"] = sorted((version for version, in sorted(versions)), key=version_key)
                app["days"] = [iso_day(day) for day, in days]
                app["first_seen"] = iso_time(app.pop("first_day") * DAY)
                app["last_seen"] = iso_time(app.pop("last_hour") * HOUR)
            answer = {"apps": apps}
            for table in TABLES.values():
                seqs = [seq for seq, in db.execute(f"""
                    select seq from {table} where device_id_hash = ? and app_id in (select id from apps)
                    order by seq""", (device_id_hash,))]
                answer[table] = _load_reports(db, table, seqs, MAX_NUMBER)
        return answer


# == Requests ==================================================================
# Reads the parts of a request, and turns errors into answers. bottle's own readers are not used: they stop at 100 KiB,
# and fail on headers that are not UTF-8.

ERRORS = {  # the texts of refusals by status; every other refusal has the status 400
    301: ("moved",),  # a group has moved to another
    401: ("missing API key", "invalid API key", "missing admin token", "invalid admin token",
          "invalid signature", "stale timestamp", "signature required"), 403: ("form expired",),
    404: ("not found",), 405: ("method not allowed",), 413: ("request body too large",),
    415: ("unsupported content encoding",), 422: ("idempotency key reused with a different body",),
    429: ("rate limit exceeded",), 431: ("request header too large",), 500: ("internal server error",),
    501: ("transfer encoding not supported",), 503: ("storage unavailable",)}
_STATUS_OF = {text: status for status, texts in ERRORS.items() for text in texts}
_JSON_HEADERS = {"Content-Type": "application/json", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}

Environ = dict[str, Any]
Answer = tuple[int, Any]  # a status, and a JSON object or a text
Handler = Callable[..., Answer]  # takes an environ and the variable parts of the path


def _as_refusal(error: int | Exception) -> Refusal:
    """The refusal for an error, which is logged if unexpected, or for a status that bottle or waitress gave."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, int):
        return Refusal(ERRORS.get(error, ("invalid request",))[0])
    log.error("unexpected error", exc_info=error)
    return Refusal("internal server error")


def _refusal_answer(refusal: Refusal) -> tuple[int, JsonObject, dict[str, str]]:
    """The status, JSON and headers that answer a refused request."""
    status = _STATUS_OF.get(str(refusal), 400)
    headers = {"Accept-Encoding": "gzip"} if status == 415 else {}
    if refusal.retry_after is not None:
        headers["Retry-After"] = str(refusal.retry_after)
    return status, {"error": str(refusal), **({"detail": refusal.detail} if refusal.detail else {})}, headers


def _with_length(headers: Mapping[str, str], body: bytes) -> list[tuple[str, str]]:
    return [*headers.items(), ("Content-Length", str(len(body)))]


def _header(environ: Environ, name: str) -> bytes:
    """The bytes of a request header, b"" if it is missing."""
    return str(environ.get("HTTP_" + name, "")).encode("latin-1", "replace")


def _read_body(environ: Environ, limit: int) -> bytes:
    """The body as it was sent. Raises Refusal if it has more than `limit` bytes."""
    length = environ.get("CONTENT_LENGTH") or ""
    if length and not (length.isascii() and length.isdecimal()):
        raise Refusal("invalid Content-Length")
    if len(length) > 18 or int(length or 0) > limit:  # int() raises ValueError for thousands of digits
        raise Refusal("request body too large")
    if not length and not environ.get("wsgi.input_terminated"):
        return b""  # without a length, as in a chunked request, only some servers mark the end of the body
    size = int(length or limit + 1)
    try:
        body: bytes = environ["wsgi.input"].read(size)
    except Exception:  # each server has its own errors for a lost connection and a malformed chunk
        raise Refusal("invalid body") from None
    if len(body) > limit:
        raise Refusal("request body too large")
    if length and len(body) < size:  # the connection was lost, and the client will send it again
        raise Refusal("invalid Content-Length")
    return body


def _decompress(environ: Environ, body: bytes, limit: int) -> bytes:
    """The body without its Content-Encoding. Raises Refusal if that has more than `limit` bytes."""
    if "HTTP_CONTENT_ENCODING" not in environ:
        return body
    encoding = _header(environ, "CONTENT_ENCODING").lower()
    if encoding in (b"", b"identity"):
        return body
    if encoding not in (b"gzip", b"x-gzip"):
        raise Refusal("unsupported content encoding", detail="gzip is supported")
    inflater, plain = zlib.decompressobj(wbits=31), b""  # 31 expects a gzip header
    with suppress(zlib.error):
        plain = inflater.decompress(body, limit + 1)
    if len(plain) > limit:
        raise Refusal("request body too large")
    if not inflater.eof or inflater.unused_data:
        raise Refusal("invalid gzip body")
    return plain


def _idempotency(environ: Environ, signature: bytes, body: bytes) -> Idempotency:
    """The digests that identify a repeated request: of its Idempotency-Key or its signature; either is enough."""
    key = _header(environ, "IDEMPOTENCY_KEY")
    if not key and not signature:
        return Idempotency()
    path, marks = environ["PATH_INFO"].encode("latin-1", "replace"), [b"key:" + key] if key else []
    if signature:
        marks.append(b"signature:" + path + b":" + signature)
    return Idempotency(tuple(sha256(mark)[:16] for mark in marks), sha256(path + b":" + body)[:16])


def _query(environ: Environ) -> dict[str, str]:
    """The query parameters. If several have the same name, the last one counts."""
    text = str(environ.get("QUERY_STRING", "")).encode("latin-1", "replace").decode("utf-8", "replace")
    return dict(parse_qsl(text, keep_blank_values=True))


def _parameters(query: Mapping[str, str], *names: str) -> dict[str, Any]:
    """The query parameters of these names, without empty ones. Raises Refusal for an invalid number."""
    values: dict[str, Any] = dict(query)
    for name, highest in (("days", 365), ("limit", 100)):
        if name in values:
            values[name] = int(values[name]) if re.fullmatch("[0-9]{1,3}", values[name]) else 0
            if not 1 <= values[name] <= highest:
                raise Refusal(f"invalid {name}", detail=f"it is not a whole number from 1 to {highest}")
    return {name: values[name] for name in names if values.get(name)}


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def curl_line(url: str, key: str) -> str:
    """The command that sends a first crash to the server at `url`."""
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return " \\\n    ".join([f"curl -X POST {url}/api/v1/crashes", '-H "Content-Type: application/json"',
                           f'-H "X-Backfeedr-Key: {key}"',
                           f"""-d '{{"exception_type": "SIGABRT", "occurred_at": "{now}"}}'"""])


class RateLimitedRequests:
    """Counts the requests that the rate limit refuses, and logs their number at most once a minute. All phones of an
    app share its key; without this, only they would learn that they send too much."""

    def __init__(self, store: Store):
        self._store, self._lock, self._logged_at = store, threading.Lock(), 0
        self._counts: Counter[tuple[bytes, int]] = Counter()  # by key and UTC day

    def count(self, key_hash: bytes) -> None:
        now = self._store.now
        with self._lock:
            self._counts[key_hash, now // DAY] += 1
            if 0 <= now - self._logged_at < MINUTE:
                return
            self._logged_at = now
        for text in self.today():
            log.warning("%s", text)

    def by_app(self, day: int | None = None) -> Counter[str]:
        """The number of refused requests by app, on a UTC day or since this process started."""
        totals: Counter[str] = Counter()
        with self._lock:
            counts = list(self._counts.items())
        apps = {bytes.fromhex(key.hash): key.app for key in self._store.keys()} if counts else {}
        for (key_hash, counted_day), count in counts:
            if day in (None, counted_day):
                totals[apps.get(key_hash, "")] += count
        return totals

    def today(self, app: str | None = None) -> list[str]:
        """A warning for each app whose requests were refused today, or only for `app`."""
        return [f"The rate limit refused {plural(count, 'request')} of {name} today."
                for name, count in sorted(self.by_app(self._store.now // DAY).items()) if name and app in (None, name)]


# == Charts ====================================================================
# Functions that turn figures into SVG and text into HTML, and the names of devices. A chart is one unit wide for each
# day and is stretched to the width of its place on the page. Labels of days are ISO dates.

_CHART_HEIGHT = 72  # pixels
_NO_DATA = '<p class="empty">No data in this period.</p>'
_AXIS_ENDS = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 40, 50, 60, 80, 100)  # each also times a power of ten
# A line has a family, then the numbers of device codes, each with the name under which Apple sells the device.
_DEVICE_TABLE = """
iPhone 10,1/4 8; 10,2/5 8 Plus; 10,3/6 X; 11,2 XS; 11,4/6 XS Max; 11,8 XR; 12,1 11; 12,3 11 Pro; 12,5 11 Pro Max
iPhone 12,8 SE (2nd generation); 13,1 12 mini; 13,2 12; 13,3 12 Pro; 13,4 12 Pro Max; 14,4 13 mini; 14,5 13
iPhone 14,2 13 Pro; 14,3 13 Pro Max; 14,6 SE (3rd generation); 14,7 14; 14,8 14 Plus; 15,2 14 Pro; 15,3 14 Pro Max
iPhone 15,4 15; 15,5 15 Plus; 16,1 15 Pro; 16,2 15 Pro Max; 17,1 16 Pro; 17,2 16 Pro Max; 17,3 16; 17,4 16 Plus
iPhone 17,5 16e; 18,1 17 Pro; 18,2 17 Pro Max; 18,3 17; 18,4 Air; 18,5 17e; 19,2 18 Pro; 19,3/7 18 Pro Max; 19,4 Duo
iPad 7,5/6 (6th generation); 7,11/12 (7th generation); 11,6/7 (8th generation); 12,1/2 (9th generation)
iPad 13,18/19 (10th generation); 15,7/8 (A16); 11,1/2 mini (5th generation); 14,1/2 mini (6th generation)
iPad 16,1/2 mini (A17 Pro); 11,3/4 Air (3rd generation); 13,1/2 Air (4th generation); 13,16/17 Air (5th generation)
iPad 14,8/9 Air 11-inch (M2); 14,10/11 Air 13-inch (M2); 15,3/4 Air 11-inch (M3); 15,5/6 Air 13-inch (M3)
iPad 16,8/9 Air 11-inch (M4); 16,10/11 Air 13-inch (M4); 8,1/2/3/4 Pro 11-inch (1st generation)
iPad 8,5/6/7/8 Pro 12.9-inch (3rd generation); 8,9/10 Pro 11-inch (2nd generation)
iPad 8,11/12 Pro 12.9-inch (4th generation); 13,4/5/6/7 Pro 11-inch (3rd generation)
iPad 13,8/9/10/11 Pro 12.9-inch (5th generation); 14,3/4 Pro 11-inch (4th generation)
iPad 14,5/6 Pro 12.9-inch (6th generation); 16,3/4 Pro 11-inch (M4); 16,5/6 Pro 13-inch (M4); 17,1/2 Pro 11-inch (M5)
iPad 17,3/4 Pro 13-inch (M5)"""

_DEVICE_NAMES = {
    f"{family}{major},{minor}": f"{family} {name}" for family, devices in re.findall("(.+?) (.+)", _DEVICE_TABLE)
    for major, minors, name in re.findall("([0-9]+),([0-9/]+) ([^;]+)", devices) for minor in minors.split("/")}

escape = bottle.html_escape
DayValues = Sequence[Optional[float]]  # one per day; None for a day without one


def text_html(text: str, length: int = 300) -> str:
    """HTML for at most `length` characters of any text, which cannot change the direction of the text around it."""
    return f"<bdi>{escape(_shorten(text, length))}</bdi>"


def device_html(code: str) -> str:
    """HTML with the device's name, if it is known, and its code. Other text is only escaped."""
    name = _DEVICE_NAMES.get(code)
    return f'{name} <small class="code">{code}</small>' if name else text_html(code, 80)


def _shorten(text: str, length: int = 300) -> str:
    return text if len(text) <= length else text[:length] + "..."


def draw_line(ys: DayValues) -> str:
    """SVG for a line with gaps at None. A point without neighbours is a dot; so is today, which is not over yet."""
    line, dots, today = "", "", len(ys) - 1
    for n, y in enumerate(ys):
        if y is not None:
            starts_line = n in (0, today) or ys[n - 1] is None
            line += f"{'M' if starts_line else 'L'}{n + 0.5},{y:.1f}"
            if starts_line and (n >= today - 1 or ys[n + 1] is None):
                dots += f"M{n + 0.5},{y:.1f}h0"
    return f'<path d="{line}"/><path class="dot" d="{dots}"/>'


def draw_columns(ys: DayValues) -> str:
    """SVG for one column per value."""
    return "".join(f'<rect x="{n + 0.15:.2f}" width="0.7" y="{y:.1f}" height="{_CHART_HEIGHT - y:.1f}"/>'
                   for n, y in enumerate(ys) if y is not None)


def chart(title: str, labels: Sequence[str], values: DayValues, draw: Callable[[DayValues], str] = draw_line,
          unit: str = "") -> str:
    """HTML for a chart of one value per day: of counts, or of percentages if the unit is " %"."""
    known = [(value, label) for value, label in zip(values, labels) if value is not None]
    if not known:
        return _NO_DATA
    (highest, peak), (lowest, _) = max(known), min(known)
    low, scale = 0, 10 ** max(0, len(str(int(highest))) - 2)
    high = next(scale * end for end in _AXIS_ENDS if scale * end >= highest)
    if unit:
        low, high = max(start for start in (0, 50, 80, 90, 95, 99) if start <= lowest), 100
    drawing = draw([None if value is None else _CHART_HEIGHT * (high - value) / (high - low) for value in values])
    for n, (label, value) in enumerate(zip(labels, values)):
        text = "none" if value is None else f"{value:,}{unit}{' so far' if label == labels[-1] else ''}"
        drawing += (f'<rect class="day" x="{n}" width="1" height="{_CHART_HEIGHT}">'
                    f"<title>{_day_name(label)}: {text}</title></rect>")
    first, last = _day_name(labels[0]), _day_name(labels[-1])
    so_far = " so far" * (known[-1][1] == labels[-1])
    summary = (f"{title}, day by day, {first} to {last}: latest {known[-1][0]:,}{unit}{so_far},"
               f" highest {highest:,}{unit} on {_day_name(peak)}, lowest {lowest:,}{unit}")
    return (f'<div class="chart" role="img" aria-label="{summary}">'
            f"<p><span>{high:,}{unit}</span> <span>{low:,}{unit}</span></p>{_svg(len(values), _CHART_HEIGHT, drawing)}"
            f"<p><span>{first}</span> <span>{last}</span></p></div>")


def _svg(width: int, height: int, content: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" height="{height}" preserveAspectRatio="none">{content}</svg>'


def _day_name(label: str) -> str:
    day = date.fromisoformat(label)
    return f"{day.day} {day:%b}"


def sparkline(values: Sequence[int], title: str) -> str:
    """HTML for a line through one value per day, as high as a line of text."""
    high, total = max(*values, 1), f"{sum(values):,} in {len(values)} days"
    line = draw_line([18 - 16 * value / high for value in values])
    return f'<span class="spark" role="img" aria-label="{title}: {total}">{_svg(len(values), 20, line)}</span>'


def bar_chart(counts: JsonObject, total: int | None = None) -> str:
    """HTML for a bar for each of the first ten labels. A last row has the rest of `total`, or the other labels."""
    shown = list(zip(counts["labels"], counts["data"]))[:10]
    rest = (sum(counts["data"]) if total is None else total) - sum(count for _, count in shown)
    longest = max((count for _, count in shown), default=1)
    rows = [(device_html(label), count, f"{100 * count / longest:.1f}") for label, count in shown]
    rows += [("other or unknown", rest, "0")] if rest > 0 else []
    html = "".join(
        f'<tr><th scope="row">{label}</th><td><svg height="10" aria-hidden="true"><rect width="{share}%" height="10"/>'
        f'</svg></td><td class="number">{count:,}</td></tr>' for label, count, share in rows)
    return f'<table class="bars">{html}</table>' if rows else _NO_DATA


# == Page content ==============================================================
# What the pages show: tiles, the steps towards a crash, frames, and a group as text.

SHOWN_FRAMES, LAST_SHOWN = 200, 50  # frames of a trace on its page: the first and the last; the API has the others
SHOWN_TEXT = 20_000  # characters of a field there
_CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]")  # not allowed in HTML and XML
_MISLEADING_CHARACTERS = re.compile(  # these, and characters that end a line or change the direction of text
    _CONTROL_CHARACTERS.pattern + "|[\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def _tile(name: str, value: str, note: str, labels: Sequence[str], values: DayValues, unit: str = "",
          draw: Callable[[DayValues], str] = draw_line) -> str:
    """HTML for a figure with a chart of its values per day."""
    drawing = chart(f"{name}, {note}" if name == "Active devices" else name, labels, values, draw, unit)
    return f'<section><h2>{name}</h2><p class="figure">{value}</p><p class="note">{note}</p>{drawing}</section>'


def _overview_tiles(metrics: Metrics, app: str | None) -> Iterator[str]:
    week, daily, active = metrics.overview(app), metrics.daily_crashes(app, 30), metrics.active_devices(app, 30)
    labels, crashes, sessions = daily["labels"], daily["data"], metrics.sessions(app, 30)["sessions"]
    rates = [crash_free_rate(*day) if day[1] else None for day in zip(crashes, sessions)]
    rate_before = crash_free_rate(sum(crashes[-14:-7]), sum(sessions[-14:-7]))
    yield _tile("Crash-free sessions", f"{week['crash_free_rate_7d']:.2f} %" if week["sessions_7d"] else "-",
                f"7 days; {rate_before:.2f} % the week before" if any(sessions[-14:-7]) else "7 days",
                labels, rates, " %")
    yield _tile("Active devices", f"{week['dau']:,}", "24 hours", labels, active["dau"])
    for name, counts, draw in (("Sessions", sessions, draw_line), ("Crashes", crashes, draw_columns)):
        note = f"7 days; {sum(counts[-14:-7]):,} the week before"
        yield _tile(name, f"{sum(counts[-7:]):,}", note, labels, counts, draw=draw)


def _usage_tiles(metrics: Metrics, app: str | None) -> Iterator[str]:
    """Tiles for active devices, and for sessions with their length: the mean, if several apps have no common median."""
    active, sessions = metrics.active_devices(app, 30), metrics.sessions(app, 30)
    labels, counts = active["labels"], (metrics.overview(app)["dau"], active["wau"][-1], active["mau"][-1])
    for column, period, count in zip(("dau", "wau", "mau"), ("24 hours", "7 days", "30 days"), counts):
        yield _tile("Active devices", f"{count:,}", period, labels, active[column])
    average = "median" if any(seconds is not None for seconds in sessions["median_seconds"]) else "mean"
    length = "none has ended yet"
    days = list(zip(labels, sessions[average + "_seconds"]))
    for day, seconds in days[-1:] + days[:-1]:  # today only if there is no other
        if seconds is not None:
            length = f"{average} length on {_day_name(day)}: " + "{} min {} s".format(*divmod(round(seconds), 60))
    yield _tile("Sessions", f"{sum(sessions['sessions'][-7:]):,}", f"7 days; {length}", labels, sessions["sessions"])


def _retention_tiles(metrics: Metrics, app: str | None) -> Iterator[str]:
    """Tiles with the share of devices that came back 1, 7 and 30 days after the day on which they were first seen."""
    cohorts = metrics.retention(app, 60)
    for days in Devices.BACK.values():
        rates = cohorts[f"day_{days}"]
        known = [(rate, size) for rate, size in zip(rates, cohorts["devices"]) if rate is not None]
        devices = sum(size for _, size in known)
        share = f"{sum(rate * size for rate, size in known) / devices:.0f} %" if devices else "-"
        note = f"of {devices:,} new devices in 60 days"
        yield _tile(f"Back after {plural(days, 'day')}", share, note, cohorts["labels"], rates, " %")


Step = tuple[str, str, str]  # towards a crash: the time, what happened, and its details
_BREADCRUMB_TIMES = ("at", "timestamp", "time", "date", "occurred_at")
_BREADCRUMB_ACTIONS = ("message", "action", "name", "event", "title", "screen", "category", "type")


def _breadcrumb_steps(report: JsonObject) -> list[Step]:
    """The last 100 breadcrumbs of a crash, in any shape that SDKs send, and the crash itself at the end."""
    breadcrumbs = report.get("extra", {}).get("breadcrumbs")
    breadcrumbs = breadcrumbs.get("values") if type(breadcrumbs) is dict else breadcrumbs
    if type(breadcrumbs) is not list or not breadcrumbs:
        return []
    steps = []
    for each in breadcrumbs[-100:]:
        fields = each if type(each) is dict else {"message": _json_text(each)}
        fields = {name: value for name, value in fields.items() if value not in (None, "", [], {})}
        time = fields.pop(next((name for name in _BREADCRUMB_TIMES if name in fields), ""), "")
        action = fields.pop(next((name for name in _BREADCRUMB_ACTIONS if type(fields.get(name)) is str), ""), "")
        steps.append((_time_to_crash(time, report), action, _event_details({"extra": fields})))
    return [*steps, ("00:00", report["exception_type"], "the crash")]


def _event_step(event: JsonObject, report: JsonObject) -> Step:
    title = f"{event['type']} {_shorten(event.get('name', ''), 80)}".strip()
    return _time_to_crash(event["occurred_at"], report), title, _event_details(event)


def _time_to_crash(time: Any, report: JsonObject) -> str:
    """A time relative to a crash, such as -00:12. Other values, and times four days or more away, stay as they are."""
    with suppress(ValueError):
        span = parse_occurred_at(time) - parse_time(report["occurred_at"])
        if abs(span) < 4 * DAY:
            distance = str(timedelta(seconds=abs(span) // SECOND))
            return ("+" if span > 0 else "-") + distance.removeprefix("0:")
    return _shorten(_json_text(time), 40)


def group_text(group: JsonObject, url: str) -> str:
    """A group as Markdown that is also readable as text. It leaves out device ids, sessions and a crash's unknown
    fields. Text from reports is indented in a fence, so that it neither starts a line nor closes the fence."""
    report: JsonObject = next(iter(group["reports"]), {})
    spread = {"Crashes": group["count"], "Devices": group["devices"], "First seen": group["first_seen"],
              "Last seen": group["last_seen"]}
    for title, name in (("Versions", "versions"), ("Systems", "systems"), ("Models", "device_models")):
        counts = zip(group[name]["labels"], group[name]["data"])
        spread[title] = ", ".join(f"{_shorten(label, 80)} ({count})" for label, count in counts)
    text = f"# Crash group {group['group_hash']}\n\n{url}\n"
    for title, parts in (
            ("Crash", [group["place"], group["exception_type"], report.get("exception_reason", "")]),
            ("Stack trace of the latest crash (* marks the app's own code)", [
                f"{frame.number:3} {'*' if frame.is_own else ' '} {_shorten(frame.symbol, 1000)}  "
                + _shorten(frame.place) for frame in _trace_rows(report, only_known=True)]),
            ("Spread", [f"{name}: {value}" for name, value in spread.items() if value not in (None, "")]),
            ("History", [f"{entry['at']} {entry['what']} {entry['detail'] or ''}" for entry in group["history"]])):
        lines = chain.from_iterable(_shorten(part, SHOWN_TEXT).splitlines() for part in parts or ["none"])
        indented = "\n".join("    " + _MISLEADING_CHARACTERS.sub("\ufffd", line.rstrip()) for line in lines)
        text += f"\n## {title}\n\n```text\n{indented}\n```\n"
    return text


def _group_title(group: JsonObject) -> str:
    """The app's function that crashes, or its binary and offset, or else the exception type, or the group's hash."""
    place = group["place"]
    name = place if _NAME_AND_OFFSET.fullmatch(place) else canonical_name(place)
    return str(next(filter(str.strip, (name, place, group["exception_type"])), group["group_hash"]))


_KNOWN_FRAME_FIELDS = {*chain.from_iterable(_FRAME_FIELDS.values()), "frame", "in_app", "symbolicated", "inlined"}
FrameRow = namedtuple("FrameRow", "number symbol place is_own address")  # what a page shows of a frame


def _trace_rows(report: JsonObject, only_known: bool = False) -> list[FrameRow]:
    """The frames of a crash, or those in the properties of an event, such as a hang. `place` is the file and line, the
    binary and unknown fields; `address` is within the binary. The last frames of an endless recursion tell how it
    began, so of a long trace, one row stands for those between."""
    trace, rows = report.get("properties", report).get("stack_trace"), list[FrameRow]()
    for sent in trace if type(trace) is list else []:
        if type(sent) is dict:
            frame, line = read_frame(sent), _first_value(sent, "line")
            file = frame.file if line is None or not frame.file else f"{frame.file}:{line}"
            unknown = [_json_text(value) for name, value in sent.items()
                       if name not in _KNOWN_FRAME_FIELDS and value is not None and not only_known]
            place = [file, frame.binary if frame.symbol else "", "inlined" if sent.get("inlined") else "", *unknown]
            address = f"{frame.binary} + {frame.offset} {frame.uuid}".strip() if frame.offset is not None else ""
            rows.append(FrameRow(
                len(rows), frame.title or "(no symbol)", ", ".join(filter(None, place)), frame.is_own, address))
    if left_out := rows[SHOWN_FRAMES:-LAST_SHOWN]:
        own = next((f"among them {frame.symbol} {frame.place}" for frame in left_out if frame.is_own), "")
        rows[SHOWN_FRAMES:-LAST_SHOWN] = [
            FrameRow(SHOWN_FRAMES, "and " + plural(len(left_out), "more frame"), own, bool(own), "")]
    return rows


def trace_html(frames: Sequence[FrameRow]) -> str:
    """HTML for a stack trace. Empty without frames."""
    items = "".join(
        f'<li value="{frame.number}" title="{escape(_shorten(frame.address))}"'
        + (' class="own"><span class="skip">own code: </span>' if frame.is_own else ">")
        + f'<code>{text_html(frame.symbol, 1000)}</code> <span class="place">{text_html(frame.place)}</span></li>'
        for frame in frames)
    return f'<ol class="trace">{items}</ol>' if frames else ""


def build_name(build: JsonObject) -> str:
    """The name of a build, such as Shop 1.3.0 (48)."""
    return f"{build['binary'] or 'a build'} {with_build(build['app_version'], build['build_number'])}".rstrip()


def _event_details(event: JsonObject, length: int = 100) -> str:
    """The first twenty properties and unknown fields of an event but its stack trace, the short ones first, cut."""
    hidden = ("stack_trace", "raw_stack_trace") if _trace_rows(event) else ()
    fields = {**event.get("properties", {}), **event.get("extra", {})}
    in_order = sorted(fields.items(), key=lambda item: len(_json_text(item[1])) > 100)
    return ", ".join(f"{name}: {_shorten(_json_text(value), length)}" for name, value in in_order[:20]
                     if name not in hidden)


def _json_text(value: Any) -> str:
    """Any JSON value as text for a reader, a list with one item per line."""
    items = value if type(value) is list else [value]
    lines = [item if type(item) is str else json.dumps(item, ensure_ascii=False) for item in items]
    return _shorten("\n".join(lines), SHOWN_TEXT)


# == Style =====================================================================
# The CSS of the pages, and the headers that let a browser load nothing else.

STYLE = """
:root { color-scheme: light dark; --paper: #fcfbf8; --ink: #1f1e1b; --soft: #66635b; --rule: #dcd8cd; --tint: #f3f0e8;
  --link: #1d5a96; --mark: #2f6da8; --bad: #b3261e; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #161614; --ink: #e9e6de; --soft: #a19d92;
  --rule: #383631; --tint: #201f1c; --link: #8cbcf0; --mark: #7fb0e4; --bad: #ff8f80; } }
* { box-sizing: border-box; text-underline-offset: 0.3em; } dl, dd, form, .figure, .chart p { margin: 0; }
body { margin: 0 auto; max-width: 78rem; padding: 0 1.25rem 2rem; background: var(--paper); color: var(--ink);
  font: 0.94rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; -webkit-text-size-adjust: 100%; }
code, pre, .trace, .key, .long dd { font-family: ui-monospace, Consolas, monospace; } p:empty { display: none; }
th, dt, pre, footer, small, .note, .trace, label { color: var(--soft); font-size: 0.9em; }
.empty, .soft, .place, .chart p { color: var(--soft); } .danger, .problem, .worse { color: var(--bad); }
header, nav, .facts, .actions { display: flex; flex-wrap: wrap; gap: 0.4rem 1.3rem; align-items: baseline; }
header { padding: 0.9rem 0 0.6rem; border-bottom: 2px solid var(--ink); } header nav { flex: 1; }
.apps { padding: 0.5rem 0; border-bottom: 1px solid var(--rule); } .actions, .list ~ details { margin-top: 0.6rem; }
a, summary, .plain { color: var(--link); } nav a, .brand { text-decoration: none; padding: 0.2rem 0; }
h2 a, .brand, a[aria-current] { color: inherit; } a[aria-current] { border-bottom: 2px solid var(--mark); }
a[aria-current], .brand, .own, .key { font-weight: 600; } .skip:not(:focus) { position: absolute; left: -99rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 1.4rem 0 0.8rem; } h2 { font-size: 0.95rem; margin: 0 0 0.5rem; }
section, footer { margin: 1.75rem 0 0; min-width: 0; } .note { margin: 0.2rem 0; }
footer, .tiles section { border-top: 1px solid var(--rule); padding-top: 0.6rem; }
.grid { display: grid; gap: 0 2.5rem; grid-template-columns: repeat(auto-fit, minmax(min(var(--least), 100%), 1fr));
  --least: 17rem; } .tiles { --least: 9rem; column-gap: 2rem; } .tiles h2 { font-weight: 400; margin: 0; }
.figure { font-size: 1.9rem; line-height: 1.2; } :is(dd, p) bdi { white-space: pre-wrap; }
.brief { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 1; overflow: hidden;
  word-break: break-all; } [open] .brief { -webkit-line-clamp: none; }
table { border-collapse: collapse; width: 100%; } .list tr { border-bottom: 1px solid var(--rule); }
th { text-align: left; font-weight: 400; } thead { overflow-wrap: normal; }
th, td { padding: 0.4rem 1.2rem 0.4rem 0; vertical-align: top; } :is(th, td):last-child { padding-right: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; } td.main { max-width: 30rem; }
td.number, td.session, .list time { white-space: nowrap; } .actions { align-items: last baseline; }
:is(dd, h2, .bare) > time::after { content: ", " attr(title); color: var(--soft); font-size: 0.9em; }
.bars :is(th, td) { padding-block: 0.15rem; } .bars th { color: inherit; font-size: 1em; width: 52%; }
.bars .number, th.number:first-child { width: 1%; } .own, .hint, pre, .long dd, button { background: var(--tint); }
svg { display: block; width: 100%; overflow: visible; } .bars svg { margin-top: 0.4rem; }
rect { fill: var(--mark); } .day { fill-opacity: 0; } .day:hover { fill-opacity: 0.15; }
path { fill: none; stroke: var(--mark); stroke-width: 2; stroke-linecap: round; vector-effect: non-scaling-stroke; }
.dot { stroke-width: 5; } .spark { display: block; width: 7.4rem; }
.chart { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 0.35rem 0.6rem; }
.chart svg { border-block: 1px solid var(--rule); box-sizing: content-box; }
.chart p { display: flex; justify-content: space-between; font-size: 0.75rem; line-height: 1; }
.chart p:first-child { flex-direction: column; text-align: right; } .chart p:last-child { grid-column: 2; }
.crash { display: grid; gap: 1.5rem 2.5rem; grid-template-columns: minmax(0, 2fr) minmax(0, 1fr); }
.trace { margin: 0; padding-left: 2.6rem; } .place { font-weight: 400; padding-left: 0.6rem; }
li { padding: 0.15rem 0 0.15rem calc(0.6rem + 3px); }
.own { color: var(--ink); border-left: 3px solid var(--bad); padding-left: 0.6rem; } .own .place { color: var(--link); }
.context > :not(.long) { display: grid; grid-template-columns: 9rem minmax(0, 1fr); gap: 0.4rem; padding: 0.2rem 0; }
pre, .long dd { margin: 0.2rem 0; padding: 0.5rem 0.7rem; white-space: pre-wrap; }
@media screen { pre, .long dd { max-height: 22rem; overflow-y: auto; } }
form { display: inline-flex; flex-wrap: wrap; gap: 0.4rem 1.3rem; align-items: end; } .filter { margin-bottom: 1rem; }
form, label, details { max-width: 100%; } label > :is(select, input:not([type=checkbox])) { display: block; }
input, select, button, textarea { font: inherit; color: inherit; border: 1px solid var(--soft); border-radius: 3px;
  padding: 0.3rem 0.6rem; max-width: 100%; } input:not([type=checkbox]), select, button { min-height: 2.5rem; }
input, select, textarea { background: var(--paper); color: var(--ink); font-size: 1rem; } [type=number] { width: 7rem; }
label:has([type=checkbox]) { display: inline-flex; flex-direction: row-reverse; gap: 0.4rem; color: inherit; }
button, summary { cursor: pointer; } button { white-space: nowrap; } button:hover { border-color: var(--ink); }
.plain { border: 0; padding: 0; min-height: 0; background: none; } td form { margin-right: 0.8rem; }
.hint { padding: 0.3rem 1rem 0.8rem; border-left: 3px solid var(--mark); } .key { user-select: all; }
@media (max-width: 60rem) {
  .crash { grid-template-columns: minmax(0, 1fr); } .spark { display: inline-block; vertical-align: middle; }
  .list thead { position: absolute; clip-path: inset(50%); } .list, .list tbody { display: block; }
  .list tr { display: flex; flex-wrap: wrap; gap: 0 1.2rem; padding: 0.4rem 0; align-items: baseline; }
  .list :is(td, time) { padding: 0; width: auto; text-align: left; white-space: normal; }
  .list td:not(.main, .bare)::before { content: attr(data-label) " "; color: var(--soft); font: 0.85em system-ui; }
  .list .main { order: -1; flex-basis: 100%; max-width: 100%; } .list .number + .bare { flex: 1 1 12rem; }
  .list td:not(.main):is(:empty, :has(> bdi:empty)), :is(.list, .bars) .code { display: none; }
  time::after { content: ", " attr(title); color: var(--soft); font-size: 0.9em; }
  a, nav a, .brand, summary, .plain, label:has([type=checkbox]) { padding-block: 12px; }
  details:not([open]) > .brief { padding-block: 0; line-height: 40px; }
  header nav { order: 1; flex-basis: 100%; column-gap: 0.8rem; } .brand { flex: 1; }
  section > div:not([class]) { padding-block: 10px; }
  .apps { flex-wrap: nowrap; overflow-x: auto; white-space: nowrap; } .apps [aria-current] { order: -1; }
}
"""

PAGE_HEADERS = {
    "Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer", "Content-Security-Policy": (
        "default-src 'none'; img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'; style-src"
        f" 'sha256-{base64.b64encode(sha256(STYLE)).decode()}'")}


# == Page requests =============================================================
# What a request for a page carries (its address, session and form), and the parts of a page that depend on it.

SESSION_LIFETIME = 7 * DAY
Response = Any  # a bottle.HTTPResponse; bottle has no types


class PageRequest:
    """A request for a page: its address, its browser's session and, after read_form(), its form."""

    def __init__(self, environ: Environ, now: int, public_url: str, cookie: str):
        self.environ, self.now, self._public_url, self.cookie = environ, now, public_url.rstrip("/"), cookie
        script_name = quote(environ.get("SCRIPT_NAME", "").encode("latin-1", "replace"))
        self.root = (urlsplit(public_url).path or script_name).rstrip("/")  # a proxy may have stripped the prefix
        self.path = quote(environ.get("PATH_INFO", ""))  # bottle has decoded it
        self.section = "/" + self.path.split("/")[1] if "/" in self.path else "/"  # such as /crashes
        self.query = {name: value for name, value in _query(environ).items() if value}  # forms send empty fields, too
        self.path_and_query = self.path + ("?" + urlencode(self.query) if self.query else "")
        self.app = self.query.get("app")
        self.apps: list[App] | None = None  # None unless the browser is signed in
        self.form: dict[str, str] = {}
        cookie_match = re.search(f"(?:^|; ?){cookie}=([0-9a-f]{{32}})(?:;|$)", environ.get("HTTP_COOKIE", ""))
        self.session = cookie_match[1] if cookie_match else ""
        # Another site does not know the session, so it cannot make this. (The sign-in form has none.)
        self.form_token = sha256("form" + self.session).hex()

    @property
    def url(self) -> str:
        """The address of the server as the browser sees it, without a slash at the end."""
        host = re.fullmatch(r"[0-9A-Za-z.:\[\]-]+", self.environ.get("HTTP_HOST", ""))
        scheme = "https" if self.environ.get("wsgi.url_scheme") == "https" else "http"
        return self._public_url or f"{scheme}://{host[0] if host else 'localhost'}{self.root}"

    def read_form(self) -> None:
        """Reads the form. Raises Refusal unless it comes from a page of this session."""
        fields = parse_qs(_read_body(self.environ, 65_536).decode("utf-8", "replace"), keep_blank_values=True)
        self.form = {name: values[-1].replace("\r\n", "\n") for name, values in fields.items()}
        token = self.form.get("form_token", "").encode("utf-8", "replace")
        if not hmac.compare_digest(token, self.form_token.encode()):
            raise Refusal("form expired")

    def link(self, path: str, /, **query: Any) -> str:
        """The address of a page about the same app, unless `query` names another. None and "" are left out."""
        app = self.app if any(app.name == self.app for app in self.apps or ()) else None
        query = {name: value for name, value in {"app": app, **query}.items() if value not in (None, "")}
        return self.root + path + ("?" + urlencode(query) if query else "")

    def anchor(self, text: str, path: str, /, **query: Any) -> str:
        """HTML for a link() with this text."""
        return f'<a href="{escape(self.link(path, **query))}">{text_html(text, 120)}</a>'

    def form_html(self, button: str, *parts: str, css: str = "", path: str = "", **hidden: str) -> str:
        """HTML for a form that posts to `path`, or to this page: hidden fields, with the token that read_form() checks,
        then parts in HTML and a button."""
        fields = "".join(f'<input type="hidden" name="{name}" value="{escape(value)}">'
                         for name, value in {"form_token": self.form_token, **hidden}.items())
        content = "\n".join([*parts, f'<button class="{css}">{button}</button>'])
        return f'<form method="post" action="{escape(self.link(path or self.path))}">{fields}\n{content}</form>'

    def moved(self, group_hash: str) -> str:
        """The address of this page for another group."""
        return self.root + re.sub("[0-9a-f]{16}", group_hash, self.path_and_query, count=1)

    def redirect(self, path: str) -> Response:
        return bottle.HTTPResponse(b"", 303, {**PAGE_HEADERS, "Location": self.root + path})

    def set_session(self, response: Response, session: str, lifetime: int = SESSION_LIFETIME) -> Response:
        """Sets the session's cookie. It is Lax, so that a link from a chat or an email opens in the same session. That
        is safe, because no GET changes anything and every form needs its token."""
        response.set_cookie(self.cookie, session, path=self.root + "/", httponly=True, samesite="lax",
                            secure=self.url.startswith("https:"), max_age=lifetime // SECOND)
        return response

    def value_html(self, value: str | float | None) -> str:
        """HTML for a percentage, a count or a time."""
        if isinstance(value, str):
            return self.time_html(parse_time(value))
        return "-" if value is None else f"{value:.2f} %" if isinstance(value, float) else f"{value:,}"

    def time_html(self, at: int) -> str:
        """HTML for a time in milliseconds: its age, or its date if it is old. A tooltip has the rest."""
        exact, age = iso_time(at)[:19].replace("T", " "), self.now - at
        units = [(DAY, "d"), (HOUR, "h"), (MINUTE, "min")]
        age_text = next((f"{age // unit} {name} ago" for unit, name in units if age >= unit), "just now")
        shown, title = (age_text, exact) if -MAX_SKEW <= age < 100 * DAY else (exact[:10], exact[11:])
        return f'<time datetime="{iso_time(at)}" title="{title}">{shown}</time>'

    def app_names(self, row: JsonObject) -> str:
        """The apps of a row of a list, or "" if there is only one or the page is about one."""
        return "" if self.app or len(self.apps or ()) < 2 else ", ".join(row.get("apps") or [row["app"]])


def _text_response(text: str, content_type: str, status: int = 200) -> Response:
    text = _CONTROL_CHARACTERS.sub("\ufffd", text.replace("\r\n", "\n"))  # browsers send \r\n
    return bottle.HTTPResponse(text.encode("utf-8", "replace"), status, {
        **PAGE_HEADERS, "Content-Type": content_type + "; charset=utf-8"})


# == Dashboard =================================================================
# The pages, behind the admin token. They load nothing from other hosts and use no JavaScript. The content of a report
# is hostile: it reaches a page only through `{{ }}` or escape(), an address also through urlencode(), never a style.

LINK_LIFETIME = 10 * MINUTE  # of a link that signs in once
LIST_ROWS, SHOWN_VERDICTS = 25, 5  # of crashes or events on a page, and of releases on the overview
_ERROR_HINTS = {
    403: "The session has changed since the page was loaded. Go back, reload that page and submit the form again.",
    404: "The address is wrong, or what was here has expired or been deleted.",
    500: "The server log has the reason.", 503: "The server log has the reason. Try again in a moment."}
PageHandler = Callable[..., Response]  # called with a PageRequest and the parts of the path


class Dashboard:
    """Answers the requests for pages."""

    def __init__(self, store: Store, metrics: Metrics, rate_limited: RateLimitedRequests, alerts: Alerts,
                 public_url: str):
        self._store, self._metrics, self._rate_limited, self._alerts = store, metrics, rate_limited, alerts
        self._public_url = public_url
        # The name differs between servers, because two servers on one host get each other's cookies.
        self._cookie = "backfeedr_" + store.secret_hash("admin_token").hex()[:8]

    def routes(self) -> Iterator[tuple[str, str, Callable[..., Response]]]:
        """The method, path and handler of each page."""
        for method, path, handler in (
                ("GET", "/", self._overview), ("GET", "/crashes", self._crashes), ("GET", "/crashes.atom", self._feed),
                ("GET", "/crashes/<group_hash>.<suffix:re:txt|md>", self._group_export),
                ("GET", "/crashes/<group_hash>", self._group), ("POST", "/crashes/<group_hash>", self._triage),
                ("GET", "/events", self._events), ("GET", "/usage", self._usage), ("GET", "/releases", self._releases),
                ("GET", "/apps", self._apps), ("POST", "/apps", self._change_apps),
                ("GET", "/sign-in", self._sign_in), ("POST", "/sign-in", self._sign_in),
                ("POST", "/sign-out", self._sign_out)):
            yield method, path, partial(self._respond, handler)

    def invite(self, url: str) -> str:
        """A link that signs in once, within LINK_LIFETIME."""
        return f"{url}/sign-in?code={self._store.grant('code', LINK_LIFETIME)}"

    def request(self, environ: Environ) -> PageRequest:
        return PageRequest(environ, self._store.now, self._public_url, self._cookie)

    def _respond(self, handler: PageHandler, **path: str) -> Response:
        page = self.request(bottle.request.environ)
        try:
            is_form, is_open = page.environ["REQUEST_METHOD"] == "POST", page.path in ("/sign-in", "/crashes.atom")
            if not is_open and not self._load_session(page):
                # Cut, because nginx takes a host for broken if the headers of an answer have more than 4 kB.
                target = page.path_and_query.replace("/sign-out", "/")[:1000]
                unsaved = {"unsaved": 1} if is_form and page.path != "/sign-out" else {}
                return page.redirect("/sign-in?" + urlencode({"next": target, **unsaved}))
            if is_form:
                page.read_form()
            return handler(page, **path)
        except GroupMoved as moved:
            return bottle.HTTPResponse(b"", 301, {**PAGE_HEADERS, "Location": page.moved(moved.group_hash)})
        except Exception as error:
            return self.error_page(page, _as_refusal(error))

    def error_page(self, page: PageRequest, refusal: Refusal) -> Response:
        status, _, headers = _refusal_answer(refusal)
        with suppress(Exception):  # if the database fails here, too, the page has no navigation
            self._load_session(page)
        hint = _sentence(refusal.detail) or _ERROR_HINTS.get(status, "The address or the form is not valid.")
        response = self._render(page, _sentence(str(refusal), end=""), "error", status, hint=hint)
        response.headers.update(headers)
        return response

    def _load_session(self, page: PageRequest) -> bool:
        """Gives the page its apps if the browser is signed in; returns whether it is."""
        if page.apps is None and self._store.is_granted("session", page.session):
            page.apps = self._store.apps()
        return page.apps is not None

    def _render(self, page: PageRequest, title: str, template: str, status: int = 200, **values: Any) -> Response:
        """A page. Its template can use these values, the names of this file, and a few methods of the page."""
        values.update(page=page, title=title, status=status, link=page.link, anchor=page.anchor, form=page.form_html,
                      time_html=page.time_html, value_html=page.value_html)
        body = _TEMPLATES[template].render(globals(), values)
        return _text_response(_TEMPLATES["layout"].render(globals(), values, body=body), "text/html", status)

    # Signing in and out

    def _sign_in(self, page: PageRequest) -> Response:
        """The form for the admin token; or a new session, for the token or for the code of a link."""
        method, code, is_right, status = page.environ["REQUEST_METHOD"], page.query.get("code"), False, 200
        problem = "You were signed out, so what you sent was not saved." if "unsaved" in page.query else ""
        if method == "POST":
            is_right = self._store.is_secret("admin_token", page.form.get("token", "").strip().encode())
            status, problem = 403, "That is not the admin token."
        elif code and method == "GET":  # a link preview sends HEAD, and must not use up the code
            is_right = self._store.withdraw("code", code)
            status, problem = 403, "This link has been used or has expired. Sign in with the admin token."
        target = page.form.get("next") or page.query.get("next", "/")
        if not is_right:
            return self._render(page, "Sign in", "sign_in", status, problem=problem, target=target)
        is_path_here = re.fullmatch(r"/(?![/\\])[!-~]*", target)  # browsers read //x and /\x as another host
        response = page.redirect(target if is_path_here else "/")
        # The id is a new one, because an attacker may have planted the one that the browser had.
        return page.set_session(response, self._store.grant("session", SESSION_LIFETIME))

    def _sign_out(self, page: PageRequest) -> Response:
        self._store.withdraw("session", page.session)
        return page.set_session(page.redirect("/sign-in"), "", lifetime=0)

    # Pages

    def _overview(self, page: PageRequest) -> Response:
        metrics, app = self._metrics, page.app
        return self._render(
            page, "Overview", "overview", is_empty=metrics.is_empty(app), tiles=_overview_tiles(metrics, app),
            warnings=[*self._rate_limited.today(app), *self._store.warnings()], **metrics.attention(app),
            verdicts=metrics.current_releases(app)[:SHOWN_VERDICTS],
            types=metrics.crash_types(app, 30), devices=metrics.devices(app, 30))

    def _crashes(self, page: PageRequest) -> Response:
        query = dict(page.query)
        if not {"version", "text", "days", "state"} & query.keys():
            query["days"] = str(WEEK_DAYS)
        if query.get("days") == "all":
            del query["days"]
        parameters = _parameters(query, "version", "text", "state", "sort", "cursor", "days")
        listing = self._metrics.groups(page.app, **parameters, limit=LIST_ROWS)
        hashes = [group["group_hash"] for group in listing["groups"]]
        details = self._metrics.days_of_groups(hashes, page.app, parameters.get("version"))["groups"]
        days = parameters.setdefault("days", "all")
        periods = [(n, f"last {n} days" if n > 1 else "today") for n in sorted({1, 7, 30, 90, 365, days} - {"all"})]
        fields = (("Version", "version"), ("Period", "days", [("all", "all days"), *periods]),
                  ("Sort by", "sort", [(sort, sort.replace("_", " ")) for sort in SORT_COLUMNS]),
                  ("State", "state", [("", "all"), *((state, state) for state in STATE_CONDITIONS if state)]),
                  ("Search", "text"))
        return self._render(
            page, "Crashes", "crashes", parameters=parameters, fields=fields, next=listing["next"],
            groups=[{**group, **details[group["group_hash"]]} for group in listing["groups"]])

    def _group(self, page: PageRequest, group_hash: str) -> Response:
        metrics, app, id = self._metrics, page.app, page.query.get("report")
        group, crashes_per_day = metrics.group(group_hash, app, limit=2), metrics.days_of_groups([group_hash], app)
        report = metrics.crash(id, app) if id else next(iter(group["reports"]), {})
        if report.get("group_hash", group_hash) != group_hash:
            raise Refusal("not found")
        older, newer = next((crash["id"] for crash in group["reports"][1:]), None), None  # of the latest
        if id:
            older, newer = metrics.neighbours(report, app)
        details = crashes_per_day["groups"][group_hash]
        apps = details["apps"]
        return self._render(
            page, _group_title(group), "group", group=group, group_apps=apps, report=report, older=older, newer=newer,
            next_build=metrics.next_build(group_hash, apps[0]) if len(apps) == 1 else "",
            breadcrumbs=_breadcrumb_steps(report), versions=metrics.versions_of(group_hash, app),
            events=[_event_step(event, report) for event in metrics.events_before(report)],
            chart=chart("Crashes", crashes_per_day["labels"], details["days"], draw_columns),
            frames=_trace_rows(report), fields=_field_rows(page, report))

    def _group_export(self, page: PageRequest, group_hash: str, suffix: str) -> Response:
        """A group as text for a bug tracker or an assistant."""
        group = self._metrics.group(group_hash, page.app, limit=1)
        text = group_text(group, page.url + page.path_and_query.replace("." + suffix, "", 1))
        return _text_response(text, "text/markdown" if suffix == "md" else "text/plain")

    def _triage(self, page: PageRequest, group_hash: str) -> Response:
        """Applies the change of a form on a group's page. Empty fields do not count."""
        change: JsonObject = {name: text for name, text in page.form.items() if name in TRIAGE_FIELDS and text.strip()}
        for name, text in change.items():
            if name == "until":
                change[name] = text + "T00:00:00Z"
            elif name.startswith("more_") and re.fullmatch("[0-9]{1,10}", text):  # else it is refused
                change[name] = int(text)
        self._store.triage(group_hash, parse_triage(change, page.now), page.app)
        return page.redirect(page.path_and_query)

    def _usage(self, page: PageRequest) -> Response:
        metrics, app = self._metrics, page.app
        return self._render(
            page, "Usage", "usage", tiles=_usage_tiles(metrics, app), retention_tiles=_retention_tiles(metrics, app),
            releases=sorted(metrics.releases(app)["releases"], key=itemgetter("adoption"), reverse=True)[:8],
            events=metrics.event_names(app)["events"])

    def _events(self, page: PageRequest) -> Response:
        parameters = _parameters(page.query, "type", "name", "session_id", "device_id_hash", "cursor")
        is_session = "session_id" in parameters
        listing = self._metrics.events(page.app, **parameters, limit=LIST_ROWS, oldest_first=is_session)
        crashes = []
        if (device := parameters.get("device_id_hash")) and not is_session and "cursor" not in parameters:
            crashes = self._metrics.crashes_of_device(device, page.app)
        fields = (("Type", "type", [("", "all"), *zip(EVENT_TYPES, EVENT_TYPES)]), ("Name", "name"),
                  ("Session id", "session_id"), ("Device id hash", "device_id_hash"))
        return self._render(page, "Session" if is_session else "Events", "events", **listing, parameters=parameters,
                            fields=fields, is_session=is_session, crashes=crashes)

    def _releases(self, page: PageRequest) -> Response:
        releases = self._metrics.releases(page.app, **_parameters(page.query, "sort"))
        return self._render(page, "Releases", "releases", **releases)

    def _feed(self, page: PageRequest) -> Response:
        """New and regressed groups as Atom, or a 404 without the feed's token."""
        if not self._store.is_secret("feed_token", page.query.get("token", "").encode("utf-8", "replace")):
            raise Refusal("not found")
        feed = _TEMPLATES["feed"].render(globals(), page=page, news=self._metrics.news(page.app))
        return _text_response(feed, "application/atom+xml")

    # The page of apps, keys, alerts and the feed

    def _apps(self, page: PageRequest, message: str = "", secret: str = "", status: int = 200) -> Response:
        """The page of apps, keys, alerts and the feed; with the message and the secret of a change."""
        page.apps = self._store.apps()
        return self._render(
            page, "Apps", "apps", status, message=message, secret=secret, keys=self._store.keys(),
            channels=self._alerts.channels(), has_feed=bool(self._store.secret_hash("feed_token")))

    def _change_apps(self, page: PageRequest) -> Response:
        try:
            message, secret = self._change(page, page.form.get("action", ""), page.form.get("name", ""))
        except StoreError as error:
            return self._apps(page, _sentence(str(error)), status=400)
        page.form = {}
        return self._apps(page, message, secret)

    def _change(self, page: PageRequest, action: str, name: str) -> tuple[str, str]:
        """Changes an app, key, channel or the feed; returns a message, and a secret that is shown once, or ""."""
        store, alerts, form = self._store, self._alerts, page.form
        id = int(form["id"]) if re.fullmatch("[0-9]{1,9}", form.get("id", "")) else 0
        if action in ("create", "key"):
            key = store.create_app(name, "test" in form) if action == "create" else store.create_key(name)
            return f"New key for {name}, shown only once:", key
        if action == "revoke":
            revoked = store.revoke_key(form.get("key", ""))
            return f"Revoked the key {revoked.prefix}... of {revoked.app}.", ""
        if action == "delete":
            if form.get("typed") != name:
                raise StoreError(f"to delete the app, type its name: {name}")
            store.delete_app(name)
            store.catch_up_in_background()
            return f"Deleted {name}. Its reports are being deleted.", ""
        if action == "test-channel":
            alerts.test(id)
            return f"Sent a test message to channel {id}.", ""
        if action == "remove-channel":
            alerts.remove(id)
            return f"Removed channel {id}.", ""
        if action == "add-channel":
            id, secret = self._add_channel(form)
            return f"Added channel {id}" + (". Its signing secret, shown only once:" if secret else "."), secret
        if action == "make-feed":
            return "The feed's address, shown only once:", f"{page.url}/crashes.atom?token={store.create_feed_token()}"
        if action == "withdraw-feed":
            store.revoke_feed_token()
            return "Withdrew the feed's address.", ""
        raise StoreError("there is no such action")

    def _add_channel(self, form: Mapping[str, str]) -> tuple[int, str]:
        kinds = [kind for kind in FACT_KINDS if f"on-{kind}" in form]
        if not kinds:  # add() would take the usual ones
            raise StoreError("check at least one fact")
        hour = int(form["hour"]) if re.fullmatch("1?[0-9]|2[0-3]", form.get("hour", "")) else 7
        return self._alerts.add(form.get("url", "").strip(), form.get("app") or None, kinds, "reason" in form, hour)


def _sentence(text: str, end: str = ".") -> str:
    return text[:1].upper() + text[1:] + end if text else ""


_SHOWN_ELSEWHERE = ("exception_type", "exception_reason", "stack_trace", "raw_stack_trace", "group_hash", "extra")


def _field_rows(page: PageRequest, report: JsonObject) -> Iterator[tuple[str, str]]:
    """The label and HTML of each field of a crash that is not shown elsewhere, even if the server does not know it. An
    unknown field may have the name of a known one, and any value."""
    formats = {"occurred_at": page.value_html, "received_at": page.value_html, "device_model": device_html}
    known = [(name, value, formats.get(name)) for name, value in report.items() if name not in _SHOWN_ELSEWHERE]
    unknown = [(name, value, None) for name, value in report.get("extra", {}).items()
               if name != "breadcrumbs" or not _breadcrumb_steps(report)]
    for name, value, to_html in known + unknown:
        yield name.replace("_", " "), to_html(value) if to_html else text_html(_json_text(value), SHOWN_TEXT)


# == Template parts ============================================================
# Parts of templates: constants, and functions that return HTML or, like _table(), template source. `{{ }}` escapes;
# `{{! }}` inserts HTML, made above.

_NAVIGATION = (
    ("/", "Overview"), ("/crashes", "Crashes"), ("/usage", "Usage"), ("/releases", "Releases"), ("/apps", "Apps"))
Column = tuple[str, str, str]  # label, template of a cell of `row`, and CSS class


def field_html(label: str, name: str, value: Any = "", choices: Iterable[tuple[Any, str]] = (), more: str = "",
               is_checked: bool | None = None) -> str:
    """HTML for a labelled field of a form: a drop-down list if there are choices, pairs of a value and its label; a
    checkbox if it is known whether it is checked; else an input with `more` attributes."""
    if choices:
        options = (f'<option value="{escape(str(each))}"{" selected" if each == value else ""}>{escape(text)}</option>'
                   for each, text in choices)
        return f'<label>{label} <select name="{name}">{"".join(options)}</select></label>'
    if is_checked is not None:
        more = 'type="checkbox"' + " checked" * is_checked
    return f'<label>{label} <input name="{name}" value="{escape(str(value))}" {more}></label>'


def _channel_form(page: PageRequest) -> str:
    """The form that adds a channel. If one was refused, it has what was typed."""
    typed, is_new = page.form, "url" not in page.form
    apps = [("", "all live apps"), *((app.name, app.name) for app in page.apps or ())]
    kinds = (field_html(kind, f"on-{kind}", 1, is_checked=is_on if is_new else f"on-{kind}" in typed)
             for kind, is_on in FACT_KINDS.items())
    return page.form_html(
        "Add channel", field_html("Address", "url", typed.get("url", ""), more='size="30" required'),
        field_html("App", "app", typed.get("app"), apps), *kinds,
        field_html("Hour of the digest (UTC)", "hour", typed.get("hour", 7), more='type="number" min="0" max="23"'),
        field_html("Include exception reasons", "reason", 1, is_checked="reason" in typed), action="add-channel")


def _filter_form(page: PageRequest, fields: Iterable[tuple[Any, ...]], parameters: JsonObject) -> str:
    """The form above a list. Each field has a label, a name and perhaps choices."""
    inputs = "\n".join(field_html(label, name, parameters.get(name, ""), *choices) for label, name, *choices in fields)
    return (f'<form class="filter" method="get" action="{page.root}{page.path}"><input type="hidden" name="app"'
            f' value="{escape(page.app or "")}">\n{inputs}\n<button>Show</button></form>')


def _value_column(label: str, name: str = "") -> Column:
    """A column for the field with this name, else with the name of its label: a figure or a time."""
    name = name or label.lower().replace(" ", "_").replace("-", "_")
    unknown = " or None" * (name == "devices")  # 0 if no crash named its device
    return label, f'{{{{!value_html(row["{name}"]{unknown})}}}}', "" if name.endswith("seen") else "number"


def _table(rows: str, *columns: Column | str, empty: str = "", note: str = "") -> str:
    """A table of `rows`, a template expression, with a note below. A mere label stands for _value_column(). On a narrow
    screen, a cell starts with its label, unless its class is "bare" or "main"; a main cell comes first."""
    cells = [_value_column(column) if isinstance(column, str) else column for column in columns]
    head = "\n".join(f'<th scope="col" class="{css}">{label}</th>' for label, _, css in cells)
    body = "\n".join(f'<td class="{css}" data-label="{label}">{cell}</td>' for label, cell, css in cells)
    return f"""
% if {rows}:
<table class="list"><thead><tr>{head}</tr></thead><tbody>
% for row in {rows}:
<tr>{body}</tr>
% end
</tbody></table><p class="note">{note}</p>
% else:
<p class="empty">{empty}</p>
% end
"""


_APP_NAMES = '<small>{{!text_html(page.app_names(row))}}</small>'
_COUNT_COLUMN = _value_column("Crashes", "count")
_GROUP_COLUMN = ("Crash", """{{!anchor(_group_title(row), "/crashes/" + row["group_hash"])}}
<b>{{"new" if row["is_new"] else ""}}
{{row["state"] if row["state"] != "open" else "regressed" if row["regressed_at"] else ""}}</b>
% brief = (page.app_names(row), row["exception_type"] if row["place"] else "", row["exception_reason"])
<span class="brief soft">{{!": ".join(text_html(text) for text in brief if text)}}</span>""", "main")
_SCORED_DEVICES_COLUMN = ("Devices", """{{!value_html(row["devices"])}} <small>
% if row["has_release"] and row["of_current"] != row["devices"]:
({{!value_html(row["of_current"])}} current)
% end
</small>""", "number")
_RELEASE_COLUMN = ("Version", """
{{!anchor(_shorten(row["app_version"], 40), "/crashes", app=row["app"], version=row["app_version"])}}
""" + _APP_NAMES, "main")
_NO_RELEASES = '<span class="soft">No releases yet. They appear once reports have an <code>app_version</code>.</span>'
_PAGE_LINKS = """<p class="actions">
{{!anchor("First page", page.path, **{**parameters, "cursor": None}) if "cursor" in parameters else ""}}
{{!anchor("Next page", page.path, **{**parameters, "cursor": next}) if next else ""}}</p>
"""


# == Templates =================================================================
# The HTML of the pages. Templates loop, choose and format; what they show is made above.

_ICON = "data:image/svg+xml," + quote(
    "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'><path d='M1 11h4l2-8 3 11 2-6h3' fill='none'"
    " stroke='#c0392b' stroke-width='2'/></svg>")
_TEMPLATES = {name: bottle.SimpleTemplate(source) for name, source in {
    "layout": """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex">
<title>{{_shorten(title, 80)}}{{" - " + page.app if page.app and status == 200 else ""}} - backfeedr</title>
<link rel="icon" href="{{_ICON}}"><style>{{!STYLE}}</style></head>
<body><a class="skip" href="#main">Skip to content</a>
<header><a class="brand" href="{{link("/")}}">backfeedr</a>
% apps, tab = page.apps, "/usage" if page.section == "/events" else page.section
% if apps is not None:
<nav aria-label="Pages">
% for path, name in _NAVIGATION:
<a href="{{link(path)}}"{{!' aria-current="page"' if path == tab else ""}}>{{name}}</a>
% end
</nav>{{!form("Sign out", css="plain", path="/sign-out")}}
% end
</header>
% if apps and status == 200 and tab != "/apps" and (len(apps) > 1 or apps[0].is_test):
<nav class="apps" aria-label="Apps">
% for name, mark in [(None, ""), *((app.name, " (test)" if app.is_test else "") for app in apps)]:
<a href="{{link(page.section, app=name)}}"{{!' aria-current="true"' if page.app == name else ""}}
><bdi>{{name or "All live apps"}}{{mark}}</bdi></a>
% end
</nav>
% end
<main id="main"><h1>{{!text_html(title)}}</h1>
{{!body}}</main>
<footer>All dates and times are in UTC.</footer></body></html>
""",
    "error": '<p>{{hint}}</p><p>{{!anchor("Overview", "/")}}</p>',
    "sign_in": """<p class="problem" role="alert">{{problem}}</p>
% user = '<input name="username" value="admin" autocomplete="username" hidden>'  # for password managers
% attributes = 'id="token" type="password" autocomplete="current-password" required autofocus'
{{!form("Sign in", user, field_html("Admin token", "token", more=attributes), next=target)}}
<p class="note">The server printed it when it first started. Set <code>BACKFEEDR_AUTH_TOKEN</code> to change it.</p>
""",
    "overview": """% for warning in warnings:
<p class="problem" role="alert">{{warning}}</p>
% end
% if is_empty:
<section class="hint"><p>No reports yet. Send a first crash with the key of an app. You can add a key under
{{!anchor("Apps", "/apps")}}.</p><pre>{{curl_line(page.url, "bf_live_your_key")}}</pre></section>
% end
<section><h2>{{!anchor("Is the latest release worse?", "/releases")}}</h2>
% for row in verdicts:
% verdict = row["verdict"] or {"word": "", "text": "nothing to compare with yet"}
<div>""" + _RELEASE_COLUMN[1] + """ <b class="{{verdict["word"]}}">{{verdict["text"]}}</b>
% if verdict.get("before") and verdict.get("interval"):
<small>compared with {{!text_html(verdict["before"], 40)}} at the same age:
{{"{:+.1f} to {:+.1f}".format(*verdict["interval"])}} percentage points</small>
% end
</div>
% end
{{!"" if verdicts else _NO_RELEASES}}</section>
<div class="grid"><section><h2>New or regressed in the last 7 days: {{!value_html(new_count)}}</h2>
""" + _table("new", _GROUP_COLUMN, _COUNT_COLUMN, "Last seen", empty="No new or regressed crashes.", note="""
{{!anchor("All new", "/crashes", state="new")}} | {{!anchor("All regressed", "/crashes", state="regressed")}}""") + """
</section><section><h2>{{!anchor("To fix first", "/crashes", days=7)}}</h2>
""" + _table("first", _GROUP_COLUMN, _SCORED_DEVICES_COLUMN, _COUNT_COLUMN, "Last seen",
                    empty="No crashes in the last 7 days.", note="""Ranked by devices that crashed in a current
release (newest or most used) in the last 7 days, halved for each day since the last crash.""") + """</section></div>
<div class="grid tiles">{{!"".join(tiles)}}</div>
<div class="grid"><section><h2>Crashes by type, 30 days</h2>{{!bar_chart(types)}}</section>
<section><h2>Crashes by model, 30 days</h2>{{!bar_chart(devices)}}</section></div>
""",
    "crashes": "{{!_filter_form(page, fields, parameters)}}" + _table(
        "groups", _GROUP_COLUMN, _COUNT_COLUMN, "Devices", ("30 days", '{{!sparkline(row["days"], "Crashes")}}', ""),
        ("Versions", """{{!text_html(", ".join(_shorten(version, 40) for version in row["versions"][-2:]))}}\
{{", {} more".format(len(row["versions"]) - 2) if len(row["versions"]) > 2 else ""}}""", ""), "First seen", "Last seen",
        empty="""No matches. {{!anchor("Show all", "/crashes", days="all")}}. In Version, 1.3* stands for
all that begin with 1.3. To send a first crash, see {{!anchor("Apps", "/apps")}}.""") + _PAGE_LINKS,
    "group": """<p><b>{{!text_html(group["exception_type"] if group["place"] else "")}}</b>
<span class="soft">{{!text_html(report.get("exception_reason", ""), 5000)}}</span></p>
<dl class="facts">
% facts = {"Crashes": "count", "Devices": "devices", "First seen": "first_seen", "Last seen": "last_seen"}
% for label, name in facts.items():
<div><dt>{{label}}</dt><dd>{{!value_html(group[name] or (0 if name == "count" else None))}}</dd></div>
% end
% first_to_last = " to ".join(dict.fromkeys(versions[:1] + versions[-1:]))
<div><dt>Versions</dt><dd>{{!text_html(first_to_last or "-", 100)}}</dd></div>
<div><dt>Group</dt><dd><code>{{group["group_hash"]}}</code></dd></div>
<div><dt>Export</dt><dd>{{!anchor("text", page.path + ".txt")}} {{!anchor("Markdown", page.path + ".md")}}</dd></div>
</dl><section><h2>{{group["state"].capitalize()}}
{{"in " + group["fixed_in"] if group["fixed_in"] and group["state"] == "resolved" else ""}}
{{!"- regressed " + value_html(group["regressed_at"]) if group["regressed_at"] and group["state"] == "open" else ""}}
</h2><div class="actions">
% if len(group_apps) > 1:
<p class="note">Several apps have this crash. Choose one to change its state there:
{{!" ".join(anchor(name, page.path, app=name) for name in group_apps)}}</p>
% else:
% fixed_in = (group["fixed_in"] or "") if group["state"] == "resolved" else next_build
{{!form("Resolve", field_html("Fixed in version", "fixed_in", fixed_in), state="resolved")}}
{{!form("Reopen", state="open") if group["state"] != "open" else ""}}
<details><summary>Mute</summary>
<p class="note">Without a condition, it stays muted until somebody reopens it.</p>
% until = field_html("Until", "until", more='type="date" min="{}"'.format(iso_day(page.now // DAY + 1)))
% more_crashes = field_html("or for more crashes", "more_crashes", more='type="number" min="1"')
% more_devices = field_html("or more devices", "more_devices", more='type="number" min="1"')
{{!form("Mute", until, more_crashes, more_devices, state="muted")}}
</details>
% comment = '<textarea name="comment" aria-label="Comment" rows="3" cols="60" maxlength="5000" required></textarea>'
<details><summary>Comment</summary>{{!form("Add comment", comment)}}</details>
% end
</div>
% for n, entry in enumerate(reversed(group["history"])):
{{!"<details><summary>Earlier</summary>" if n == 3 else ""}}
% crash = entry["what"] != "commented" and re.match("crash ([0-9a-f]{16})", entry["detail"] or "")
<p class="note">{{!value_html(entry["at"])}} <b>{{entry["what"]}}</b> {{!text_html(entry["detail"] or "", 5000)}}
{{!anchor("Show", page.path, report=crash[1]) if crash else ""}}</p>
% end
{{!"</details>" if group["history"][3:] else ""}}</section>
% if not report:
<p class="empty">The crashes in this group have expired. Its state and history remain.</p>
% else:
<section><h2>Crashes per day</h2>{{!chart}}</section>
<section><h2>{{"Crash" if newer else "Latest crash"}}, {{!value_html(report["occurred_at"])}}</h2>
<p class="actions">{{!anchor("Older crash", page.path, report=older) if older else ""}}
{{!anchor("Newer crash", page.path, report=newer) if newer else ""}}
% device = {"app": report["app"], "device_id_hash": report.get("device_id_hash"), "cursor": report["id"]}
{{!anchor("Earlier events of this device", "/events", **device) if device["device_id_hash"] else ""}}</p>
<div class="crash"><div>
% for build in group["missing_symbols"]:
<p class="problem">Symbols for {{!text_html(build_name(build))}} are missing: {{!value_html(build["crashes"])}}
{{"crashes are" if build["crashes"] > 1 else "crash is"}} waiting for them. To upload the symbols of this build
({{build["uuid"]}}): <code>uv run examples/symbols.py --server {{page.url}} App.xcarchive</code></p>
% end
{{!trace_html(frames)}}
% if not any(frame.is_own for frame in frames):
<p class="note">{{"No frame is known to belong to the app." if frames else "This report has no stack trace."}}</p>
% end
</div><dl class="context">
% for label, html in fields:
<div{{!' class="long"' if len(html) > 100 else ""}}><dt>{{!text_html(label, 100)}}</dt><dd>{{!html}}</dd></div>
% end
</dl></div></section>
<div class="grid">
% for title, steps in (("Breadcrumbs", breadcrumbs), ("Events of this session", events)):
% if steps:
<section><h2>{{title}}</h2>""" + _table(
        "steps", ("Time", "{{row[0]}}", "bare number"),
        ("Action", '{{!text_html(row[1])}} <span class="soft">{{row[2]}}</span>', "bare")) + """
% session = {name: report.get(name) for name in ("app", "session_id", "device_id_hash")}
<p>{{!anchor("All events of this session", "/events", **session) if steps is events else ""}}</p></section>
% end
% end
</div>
<div class="grid">
% for title, part in (("Versions", "versions"), ("Systems", "systems"), ("Models", "device_models")):
<section><h2>{{title}}</h2>{{!bar_chart(group[part], group["count"])}}</section>
% end
</div>
% end
""",
    "events": """{{!_filter_form(page, fields, parameters)}}
<p class="note">{{"First" if is_session else "Last"}} received first.
% if "device_id_hash" in parameters:
<code>python backfeedr.py device forget</code> deletes all that a device sent.
% end
</p>
% if crashes:
<section><h2>Latest crashes of this device</h2>
""" + _table("crashes", ("Crash", """
% path = "/crashes/" + row["group_hash"]
{{!anchor(_group_title(row), path, app=row["app"], report=crash_id(row["seq"]))}}
<span class="soft">{{!text_html(row["exception_type"])}}</span>""", "main"),
             ("Occurred", '{{!time_html(row["at"])}}', "bare"),
             ("Version", '{{!text_html(row["app_version"] or "", 40)}}', "bare")) + """
</section><section><h2>Events of this device</h2></section>
% end
""" + _table(
        "events", ("Event", """{{row["type"]}} <b>{{!text_html(row.get("name", ""), 80)}}</b>
""" + _APP_NAMES + """
% text, frames = _event_details(row, 3000), _trace_rows(row)
% if frames or len(text) > 100:
<details><summary class="brief">{{!text_html(text or "Stack trace", 5000)}}</summary>{{!trace_html(frames)}}</details>
% else:
<span class="soft">{{!text_html(text)}}</span>
% end
""", "main"),
        ("Occurred", '{{!value_html(row["occurred_at"])}}', "bare"),
        ("Version", '{{!text_html(row.get("app_version", ""), 40)}}', "bare"),
        ("Device", '{{!device_html(row.get("device_model", ""))}}', "bare"), ("Session", """
% session = {name: row.get(name) for name in ("session_id", "device_id_hash")}
{{!anchor(_shorten(row["session_id"], 12), "/events", **session) if "session_id" in row else ""}}""", "bare session"),
        empty="""
% if next:
No matches among the {{!value_html(SCANNED_EVENTS)}} events searched. The next page searches older ones.
% else:
No matches. {{!anchor("Show all", "/events")}}. To send events, see <code>examples/client.py</code>.
% end
""") + _PAGE_LINKS,
    "usage": """<div class="grid tiles">{{!"".join(tiles)}}</div>
<div class="grid tiles">{{!"".join(retention_tiles)}}</div>
<div class="grid"><section>
<h2>Events, 30 days</h2>
""" + _table(
        "events", ("Event", """
{{!anchor(row["name"][:80] or "(no name)", "/events", type=row["type"], name=row["name"])}}
<span class="soft">{{row["type"]}}</span>""", "main"),
        ("30 days", '{{!sparkline(row["days"], "Events")}}', ""), _value_column("Events", "count"),
        empty="No events in 30 days.", note="The 50 most frequent.") + """
<p>{{!anchor("All events", "/events")}}</p></section>
<section><h2>{{!anchor("Adoption, 7 days", "/releases")}}</h2>
""" + _table("releases", _RELEASE_COLUMN, "Adoption", empty=_NO_RELEASES) + "</section></div>\n",
    "releases": """<p class="note">Sorted by
{{!anchor("first seen", "/releases") if "sort" in page.query else "first seen"}} |
{{!anchor("version", "/releases", sort="version") if "sort" not in page.query else "version"}}</p>
""" + _table(
        "releases", _RELEASE_COLUMN, ("Verdict", """<span class="{{row["verdict"] and row["verdict"]["word"]}}">
{{row["verdict"]["text"] if row["verdict"] else "-"}}</span>
<small>{{!text_html("vs. " + row["verdict"]["before"], 40) if row["verdict"] else ""}}</small>""", ""),
        "Crash-free sessions", "Crash-free devices", "Crashes", "Sessions", "Devices", "Adoption", "First seen",
        "Last seen", empty=_NO_RELEASES, note="""A verdict compares two releases at the same age. Adoption is the share
of the app's sessions in the last 7 days. At most 100 releases are shown."""),
    "apps": """% if message:
<section class="hint" role="{{"status" if status == 200 else "alert"}}">
<p class="{{"" if status == 200 else "problem"}}">{{message}}</p><p class="key">{{secret}}</p>
% if secret.startswith(("bf_live_", "bf_test_")):
<p>Add it to your app. To try it:</p><pre>{{curl_line(page.url, secret)}}</pre>
% end
</section>
% end
% for app in page.apps:
<section><h2>{{!text_html(app.name)}}{{" (test)" if app.is_test else ""}}</h2>
<p class="note">Created {{!time_html(app.created_at)}}. {{!anchor("Overview", "/", app=app.name)}}</p>
""" + _table(
        "[key for key in keys if key.app == app.name]", ("Key", "<code>{{row.prefix}}...</code>", "main"),
        ("Created", "{{!time_html(row.created_at)}}", ""),
        ("Last used", '{{iso_day(row.last_used) if row.last_used else "-"}}', ""),
        ("Requests in 7 days", "{{!value_html(row.requests)}}", "number"), ("State", """
% if row.revoked_at:
revoked {{!time_html(row.revoked_at)}}
% else:
<details><summary>Revoke</summary><p>Reports sent with this key will be refused.</p>
{{!form("Revoke", css="danger", action="revoke", key=row.hash)}}</details>
% end
""", "bare"), empty="No keys, so this app cannot send anything.") + """
<div class="actions">{{!form("Add key", action="key", name=app.name)}}
<details><summary>Delete app</summary>
<p>This deletes its keys and all its reports. Type its name to confirm.</p>
% typed = field_html("Name", "typed", more='autocomplete="off" required')
{{!form("Delete", typed, css="danger", action="delete", name=app.name)}}</details></div></section>
% end
<section><h2>New app</h2>
% refused = page.form.get("name", "") if page.form.get("action") == "create" else ""
% name = field_html("Name", "name", refused, more='maxlength="100" required')
% is_test = field_html("Test app (left out of public figures)", "test", 1, is_checked=False)
{{!form("Create app and key", name, is_test, action="create")}}</section>
<section><h2>Alerts</h2>
""" + _table(
        "channels", ("Channel", '<code><bdi>{{row["id"]}}: {{row["address"]}}</bdi></code>', "main"),
        ("App", '{{!text_html(row["app"] or "all live apps")}}', ""),
        ("Facts", '{{row["kinds"].replace(",", ", ")}}', ""),
        ("Last sent", '{{!time_html(row["sent_at"]) if row["sent_at"] else "never"}}', ""), ("State", """
% if row["ended_at"]:
<span class="problem">ended {{!time_html(row["ended_at"])}}: the receiver answered 410 Gone</span>
% elif row["error"]:
<span class="problem">{{row["error"]}}, {{!time_html(row["error_at"])}}; {{row["waiting"]}} waiting</span>
% else:
{{"{} waiting".format(row["waiting"]) if row["waiting"] else "no errors"}}
% end
""", ""), ("Change", """{{!form("Test", css="plain", action="test-channel", id=str(row["id"]))}}
<details><summary>Remove</summary>
{{!form("Remove", css="danger", action="remove-channel", id=str(row["id"]))}}</details>""", "bare"),
        empty="No channels, so nobody is notified of new or regressed crashes.") + """
<details{{" open" if "url" in page.form else ""}}><summary>Add channel</summary>
<p class="note">An https webhook, slack+https or ntfy+https. With the package apprise installed,
any address that it supports. <code>python backfeedr.py help alerts</code> explains the facts.</p>
{{!_channel_form(page)}}</details></section>
<section><h2>Feed</h2><p>An Atom feed of new and regressed crashes.
{{"A new address replaces the old one." if has_feed else "It has no address yet."}}</p>
<div class="actions">{{!form("New address", action="make-feed")}}
{{!form("Withdraw address", action="withdraw-feed") if has_feed else ""}}</div></section>
""",
    "feed": """<?xml version="1.0" encoding="utf-8"?>
<feed xmlns="http://www.w3.org/2005/Atom"><title>Crashes{{" of " + page.app if page.app else ""}}</title>
<id>{{page.url}}/crashes.atom{{"?" + urlencode({"app": page.app}) if page.app else ""}}</id>
<updated>{{iso_time(news[0]["at"] if news else 0)}}</updated><author><name>backfeedr</name></author>
<link rel="self" href="{{page.url}}/crashes.atom?{{urlencode(page.query)}}"/><link href="{{page.url}}/crashes"/>
% for row in news:
% link = "{}/crashes/{}?{}".format(page.url, row["group_hash"], urlencode({"app": row["app"]}))
<entry><id>{{link}}#{{row["what"] if row["what"] == "new" else row["at"]}}</id>
<title>{{row["what"].capitalize()}}: {{row["exception_type"]}}{{" in " + row["place"] if row["place"] else ""}}</title>
<updated>{{iso_time(row["at"])}}</updated><link href="{{link}}"/>
<summary>{{row["app"]}}{{", first in " + row["first_version"] if row["first_version"] else ""}}</summary></entry>
% end
</feed>
"""}.items()}


# == Backfeedr =================================================================
# The WSGI callable. A handler decodes, checks, stores and answers; it raises Refusal to stop.

_SUBMISSION = "backfeedr.submission"  # a key of an environ
_STATUS_LINES = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}


class Backfeedr(Closing):
    """The server as a WSGI callable, for any mount point.

    `Backfeedr(db_path="crashes.db")` takes other settings from the environment, `Backfeedr(Settings(...))` does not.
    Raises SettingsError, StoreError, and StorageUnavailable if the database is locked. Close it, or use it as a context
    manager. `.store` is for keys, `.metrics` for questions. `clock` returns seconds since 1970. A new database gets an
    app and an admin token: `announce` is called once, with a text that shows the operator the app's key and the token.
    A `store` replaces the settings' file; it is closed with the server. A `limiter` may count for several processes.
    """

    # By path: the parser of a body, which also gets the time and the header's device; and the answer to stored reports.
    _ingestion: Mapping[str, tuple[Callable[[bytes, int, str], Reports], Callable[..., JsonObject]]] = {
        "/api/v1/crashes": (lambda body, *_: [parse_crash_body(body)],
                            lambda crashes, seqs: {"id": crash_id(seqs[0]), "group_hash": crashes[0].group_hash}),
        "/api/v1/events": (lambda body, *_: [parse_event(decode_json(body))],
                           lambda events, seqs: {"id": event_ids(seqs)[0]}),
        "/api/v1/events/batch": (lambda body, *_: parse_batch(decode_json(body)),
                                 lambda events, seqs: {"count": len(seqs), "ids": event_ids(seqs)}),
        "/api/v1/diagnostics": (parse_diagnostics, lambda reports, seqs: {
            "count": len(seqs), "ids": list(map(report_id, map(type, reports), seqs)),
            "group_hashes": [getattr(report, "group_hash", None) for report in reports]})}

    def __init__(self, settings: Settings | None = None, *, clock: Callable[[], float] = time.time,
                 store: Store | None = None, limiter: RateLimiter | None = None,
                 announce: Callable[[str], Any] | None = None, **overrides: Any):
        if settings is not None and overrides:
            raise TypeError("give either `settings` or keyword settings, not both")
        self.settings = settings or Settings.from_env(**overrides)
        self.store = store or Store(self.settings.db_path, clock, self.settings.retention_days,
                                    max_waiters=max(256, self.settings.threads), max_db_size=self.settings.max_db_size)
        self.metrics = Metrics(self.store)
        self.alerts = Alerts(self.store, self.settings.public_url, self.metrics.digest)
        self.rate_limited = RateLimitedRequests(self.store)
        self._limiter = limiter or RateLimiter(self.settings.rate_limit)
        self._charge = getattr(self._limiter, "charge", lambda *_: None)
        # Python runs one thread at a time. A thread that waits for this lock sleeps until its turn comes; one that
        # waits for the interpreter wakes up each switch interval to ask for it.
        self._decode_lock = threading.Lock()
        self._request_counts: Counter[tuple[str, str, int]] = Counter()  # by method, route and status
        self._counts_lock = threading.Lock()
        key, token = self.store.start(self.settings.api_key, self.settings.auth_token)
        if key or token:  # without `announce` another web server calls this one, at an unknown address
            url = _url(self.settings.host, self.settings.port) if announce else "https://YOUR-SERVER"
            (announce or sys.stderr.write)(first_start_text(key, token, self.settings.public_url.rstrip("/") or url))
        self.pages = Dashboard(self.store, self.metrics, self.rate_limited, self.alerts, self.settings.public_url)
        self._router = self._routes()

    def __call__(self, environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ.get("REQUEST_METHOD", "").upper(), environ.get("PATH_INFO", "")
        if len(path) > 1 and path.endswith("/"):  # one slash at the end makes no difference
            path = path[:-1]
            environ = {**environ, "PATH_INFO": path}
        if method == "POST" and path in self._ingestion:  # bottle would double the time that this takes
            status_line, headers, body = self.answer_submission(environ)
            start_response(status_line, headers)
            return [body]
        try:
            path.encode("latin-1").decode("utf-8")
        except UnicodeError:  # bottle would drop these bytes and match the rest
            path = "/api/not found" if path.startswith("/api/") else "/not found"
        # An outer bottle may have set a route. bottle takes `post` for POST, so pages must, too.
        environ = {**environ, "PATH_INFO": path, "REQUEST_METHOD": method, "bottle.route": None}
        outer_environ = None
        with suppress(RuntimeError):
            outer_environ = bottle.request.environ
        answer: Iterable[bytes] = self._router(environ, start_response)
        route = environ["bottle.route"]
        method, rule = (route.method, route.rule) if route else ("other", "other")  # paths could be made up without end
        self._count_request(method, rule, bottle.response.status_code)
        if outer_environ is not None:  # an outer bottle restores the path of the request that it finds here
            bottle.request.bind(outer_environ)
        return answer

    def _count_request(self, method: str, rule: str, status: int) -> None:
        with self._counts_lock:
            self._request_counts[method, rule, status] += 1

    def answer_submission(self, environ: Environ) -> tuple[str, list[tuple[str, str]], bytes]:
        """Answers a request with reports, which submit_all() may have stored: status line, headers and body."""
        body, status, headers = self._call(self._answer_submission, environ)
        self._count_request("POST", environ["PATH_INFO"], status)
        return _STATUS_LINES[status], _with_length(headers, body), body

    def deliver(self) -> Counter[str]:
        """Sends the alerts that are due; returns how many were `sent` and how many `failed`. `serve` does this by
        itself. Under another server, call it every minute, on one host or on several."""
        return self.alerts.deliver()

    def close(self) -> None:
        """Closes the database. May be called twice."""
        self.store.close()

    # Routes

    def _routes(self) -> bottle.Bottle:
        metrics, router, admin = self.metrics, bottle.Bottle(), self._question_route
        public = partial(admin, is_public=True)
        router.default_error_handler = self._bottle_error
        routes: Iterable[tuple[str, str, Handler]] = (
            ("GET", "/api/v1/health", self._health),
            ("GET", "/api/v1/metrics/daily-crashes", public(metrics.daily_crashes, "days")),
            ("GET", "/api/v1/metrics/crash-types", public(metrics.crash_types, "days")),
            ("GET", "/api/v1/metrics/devices", public(metrics.devices, "days")),
            ("GET", "/api/v1/metrics/active-devices", public(metrics.active_devices, "days")),
            ("GET", "/api/v1/metrics/sessions", public(metrics.sessions, "days")),
            ("GET", "/api/v1/metrics/retention", public(metrics.retention, "days")),
            ("GET", "/api/v1/overview", public(metrics.overview)),
            ("GET", "/api/v1/releases", self._releases),
            ("GET", "/api/v1/crashes", admin(
                metrics.groups, "version", "days", "text", "state", "sort", "limit", "cursor")),
            ("GET", "/api/v1/crashes/<group_hash>", admin(metrics.group, "limit", "cursor")),
            ("PATCH", "/api/v1/crashes/<group_hash>", self._triage),
            ("GET", "/api/v1/events", admin(metrics.events, "type", "name", "session_id", "limit", "cursor")),
            ("GET", "/api/v1/symbols", admin(metrics.symbols)),
            ("PUT", "/api/v1/symbols/<uuid>", self._put_symbols),
            ("GET", "/metrics", self._prometheus),
            # __call__ answers these. They are here so that bottle answers a GET with 405.
            *(("POST", path, self._answer_submission) for path in self._ingestion))
        for method, path, handler in routes:
            router.route(path, method, partial(self._bottle_response, handler))
        for method, path, page in self.pages.routes():
            router.route(path, method, page)
        return router

    def _question_route(self, question: Callable[..., JsonObject], *names: str, is_public: bool = False) -> Handler:
        """A handler that answers a question: to the admin only, unless the question and the metrics are public."""
        def handler(environ: Environ, **path: str) -> Answer:
            if not (is_public and self.settings.public_metrics):
                self._check_admin(environ)
            return 200, question(**path, **_parameters(_query(environ), "app", *names))
        return handler

    def _check_admin(self, environ: Environ) -> None:
        scheme, _, token = _header(environ, "AUTHORIZATION").partition(b" ")
        if scheme.lower() != b"bearer" or not token.strip():
            raise Refusal("missing admin token")
        if not self.store.is_secret("admin_token", token.strip()):
            raise Refusal("invalid admin token")

    def _admin_body(self, environ: Environ) -> bytes:
        """The body that the admin sent, still compressed. Raises Refusal for anyone else."""
        body = _read_body(environ, self.settings.max_body_size)
        self._check_admin(environ)
        return body

    def _bottle_response(self, handler: Handler, **path: str) -> bottle.HTTPResponse:
        return bottle.HTTPResponse(*self._call(handler, bottle.request.environ, **path))

    def _call(self, handler: Handler, environ: Environ, **path: str) -> tuple[bytes, int, dict[str, str]]:
        """The body, status and headers of what a handler answers, text or JSON, or of the error that it raises."""
        headers = dict(_JSON_HEADERS)
        try:
            status, answer = handler(environ, **path)
        except Exception as error:
            status, answer, error_headers = _refusal_answer(_as_refusal(error))
            headers.update(error_headers)
            if isinstance(error, GroupMoved):
                headers["Location"] = self.pages.request(environ).moved(error.group_hash)
        if isinstance(answer, str):
            headers["Content-Type"] = "text/plain; version=0.0.4; charset=utf-8"
            return answer.encode(), status, headers
        return to_ascii_json(answer).encode(), status, headers

    def _bottle_error(self, error: bottle.HTTPError) -> bottle.HTTPResponse:
        """Answers what bottle itself refuses: as a page for a browser outside the API, else as JSON."""
        error.__traceback__ = error.__context__ = None  # bottle's frame keeps the error: a cycle that keeps the request
        environ, refusal = bottle.request.environ, _as_refusal(error.status_code)
        if "text/html" in environ.get("HTTP_ACCEPT", "") and not environ["PATH_INFO"].startswith("/api/"):
            answer: bottle.HTTPResponse = self.pages.error_page(self.pages.request(environ), refusal)
        else:
            answer = bottle.HTTPResponse(json.dumps({"error": str(refusal)}), error.status_code, _JSON_HEADERS)
        answer.headers.update({name: value for name, value in error.headers.items() if name == "Allow"})
        return answer

    # Handlers

    def _health(self, environ: Environ) -> Answer:
        self.store.check()
        return 200, {"status": "ok"}

    def _releases(self, environ: Environ) -> Answer:
        """Answers like a public route, but does not tell a stranger the names of all apps."""
        status, answer = self._question_route(self.metrics.releases, "sort", is_public=True)(environ)
        try:
            if not _query(environ).get("app"):
                self._check_admin(environ)
        except Refusal:
            for release in answer["releases"]:
                del release["app"]
        return status, answer

    def _triage(self, environ: Environ, group_hash: str) -> Answer:
        body, app = self._admin_body(environ), _parameters(_query(environ), "app")
        changes = decode_json(_decompress(environ, body, self.settings.max_body_size))
        self.store.triage(group_hash, parse_triage(changes, self.store.now), **app)
        return 200, self.metrics.group(group_hash, **app)

    def _put_symbols(self, environ: Environ, uuid: str) -> Answer:
        body, build = self._admin_body(environ), image_uuid(uuid)
        if not build:
            raise Refusal("invalid uuid", detail="it is not a UUID as dwarfdump --uuid prints it")
        part = parse_symbols(_decompress(environ, body, self.settings.max_body_size))
        answer, was_stored = self.store.put_symbols(build, part)
        if answer["complete"] and not was_stored:
            self.store.catch_up_in_background()
        return 200 if was_stored else 201, answer

    def _prometheus(self, environ: Environ) -> Answer:
        self._check_admin(environ)
        with self._counts_lock:
            counts = sorted(self._request_counts.items())
        by_route = [(f'{{method="{method}",path="{rule}",status="{status}"}}', count)
                    for (method, rule, status), count in counts]
        by_app = [(f"{{app={json.dumps(app, ensure_ascii=False)}}}", count)
                  for app, count in self.rate_limited.by_app().items()]
        lines = []
        for name, kind, meaning, samples in (
                ("requests_total", "counter", "Requests that reached the app, by route.", by_route),
                ("rate_limited_total", "counter", "Requests that the rate limit refused, by app.", by_app),
                *self.store.vitals()):
            if samples:
                lines += [f"# HELP backfeedr_{name} {meaning}", f"# TYPE backfeedr_{name} {kind}"]
                lines += [f"backfeedr_{name}{suffix} {value:.15g}" for suffix, value in samples]
        return 200, "\n".join([*lines, ""])

    # Reports

    def can_share_commit(self, method: str, path: str, key: str) -> bool:
        """Whether a request may be stored together with others. One whose key must be looked up, in the database or by
        a limiter on another host, would hold up the others."""
        return (method == "POST" and path in self._ingestion and not getattr(self._limiter, "waits", True)
                and self.store.is_cached_key(sha256(key.encode("latin-1", "replace"))))

    def submit_all(self, environs: Iterable[Environ]) -> None:
        """Decodes requests and stores their reports in one commit. Puts each submission into its environ: the WSGI call
        that follows only answers. Without a submission there, the WSGI call does all of this itself."""
        to_store, to_recheck = [], []
        for environ in environs:
            environ[_SUBMISSION] = submission = Submission()
            try:
                self._decode(environ, submission)
            except Exception as error:
                submission.error = error
                if isinstance(error, Refusal):  # its traceback is never logged, and holds the body
                    error.__traceback__ = error.__context__ = None
            if not submission.reports:  # it was refused, or is an empty payload from Apple
                submission.receipt = Receipt(range(0), True)  # as if replayed: an empty payload is answered with 200
                to_recheck.append(submission)
            elif submission.error is None:
                to_store.append(submission)
        self.store.add_all(to_store)
        self._recheck_keys(to_recheck)

    def _recheck_keys(self, submissions: Sequence[Submission]) -> None:
        """Refuses submissions whose key was revoked after it was cached: a commit would do so, but these are in none.
        Looks up each key once, because each look-up waits if the database is locked."""
        for key_hash in {submission.key_hash for submission in submissions} - {b""}:
            try:
                error = None if self.store.is_active_key(key_hash) else Refusal("invalid API key")
            except StorageUnavailable as unavailable:
                error = unavailable
            for submission in submissions:
                if error and submission.key_hash == key_hash:
                    submission.error = error

    def _answer_submission(self, environ: Environ) -> Answer:
        if _SUBMISSION not in environ:
            self.submit_all([environ])
        submission = environ.pop(_SUBMISSION)  # a host app may call again with the same environ
        seqs, is_replay = submission.result()
        _, answer = self._ingestion[environ["PATH_INFO"]]
        return 200 if is_replay else 201, answer(submission.reports, seqs)

    def _decode(self, environ: Environ, submission: Submission) -> None:
        """Fills a submission. Checks size, key, rate, signature, JSON and fields, in this order."""
        body = _read_body(environ, self.settings.max_body_size)
        key = _header(environ, "X_BACKFEEDR_KEY")
        if not key:
            raise Refusal("missing API key")
        key_hash = sha256(key)
        if not (self.store.is_cached_key(key_hash) or self.store.is_active_key(key_hash)):
            raise Refusal("invalid API key")
        submission.key_hash = key_hash
        if not self._limiter.allow(key_hash):  # may ask another host, so it stays outside the lock
            self.rate_limited.count(key_hash)
            raise Refusal("rate limit exceeded", self._limiter.retry_after(key_hash))
        began = time.thread_time()
        try:
            with self._decode_lock:
                self._parse(environ, body, key, submission)
        finally:  # an error of the limiter then fails only this request
            self._charge(key_hash, time.thread_time() - began)

    def _parse(self, environ: Environ, body: bytes, key: bytes, submission: Submission) -> None:
        signature = b""
        if "HTTP_X_BACKFEEDR_TIMESTAMP" in environ or "HTTP_X_BACKFEEDR_SIGNATURE" in environ:
            signature = _header(environ, "X_BACKFEEDR_SIGNATURE")
            verify(key, _header(environ, "X_BACKFEEDR_TIMESTAMP"), signature, body, self.store.now)
        elif self.settings.require_signature:
            raise Refusal("signature required")
        plain = _decompress(environ, body, self.settings.max_body_size)
        parse, _ = self._ingestion[environ["PATH_INFO"]]
        device = _header(environ, "X_BACKFEEDR_DEVICE").decode("utf-8", "replace")
        submission.reports = parse(plain, self.store.now, device)
        submission.idempotency = _idempotency(environ, signature, plain)


def first_start_text(key: str | None, token: str | None, url: str) -> str:
    """The text that shows the operator the secrets of a first start."""
    text = f"Created the app 'default'. Its API key, shown only this once:\n\n    {key}\n\n" if key else ""
    if token:
        text += f"The admin token, shown only this once; it opens the pages at {url}/\n\n    {token}\n\n"
    if key:
        text += "Send a first crash:\n\n    " + curl_line(url, key).replace("\n", "\n    ") + "\n\n"
    return text


# == Connections ===============================================================
# The web server: waitress with a few changes. Errors are JSON, a stop answers every request that was sent, no client's
# address is logged, and reports that arrive together share a commit. Classes and methods say what they change and why.

try:
    import waitress.server
    from waitress.channel import HTTPChannel
    from waitress.parser import HTTPRequestParser, ParsingError
    from waitress.task import ErrorTask, Task, ThreadedTaskDispatcher, WSGITask
    from waitress.utilities import RequestEntityTooLarge, build_http_date
except ImportError:  # only `serve` needs waitress; under another WSGI server it may be missing
    waitress = None
    HTTPChannel = HTTPRequestParser = ErrorTask = Task = ThreadedTaskDispatcher = WSGITask = object

IDLE_TIMEOUT = 60  # seconds for a request to arrive, between two requests, or without progress in an answer
MIN_BYTES_PER_SECOND = 2000  # a request that arrives at this rate, as from a slow phone, never times out
MAX_PIPELINED = 4  # requests that may wait on a connection; if more come, it is closed after these
COMMIT_THREADS = 4  # one commits while the next one decodes; with only two, 16 clients get 14 % less done
MAX_GATHERED_REQUESTS = 25  # of 100 events each: then all threads hold as many rows as may wait in the store
MAX_GATHERED_BYTES = 1_000_000  # decoded, they take several times as much memory
MAX_CHUNK_LINE = 4096  # bytes
_AS_SPACES = bytes.maketrans(b"\t\r\n", b"   ")  # a pattern would take 20 times as long


class _RequestParser(HTTPRequestParser):
    """A request that is answered where waitress would only close the connection, or wait."""

    arrived_at = 0.0  # time.monotonic() when it was complete
    environ: Environ | None = None  # set when a thread begins to handle it

    def received(self, data: bytes) -> int:
        """Refuses a chunk's first line, or a trailer, that does not end: waitress would copy it for each packet."""
        consumed = int(super().received(data))
        receiver = self.body_rcv
        if self.chunked and receiver is not None and len(receiver.control_line + receiver.trailer) > MAX_CHUNK_LINE:
            self.error, self.completed = RequestEntityTooLarge("a chunk's line"), True
        return consumed

    def parse_header(self, header_plus: bytes) -> None:
        if b" " * 32 in header_plus.translate(_AS_SPACES):  # waitress takes n * n steps for n spaces: 16 s for 32 kB
            raise ParsingError("too many spaces")
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # for `http://[` or a length of 5,000 digits
            raise ParsingError(str(error)) from None  # the only error that waitress answers
        finally:
            # waitress would send `100 Continue` and wait, even if no body follows or the body is refused.
            if not self.chunked and not 0 < self.content_length < self.adj.max_request_body_size:
                self.expect_continue = False


class _Task(Task):
    """What all answers have in common."""

    def build_response_header(self) -> bytes:
        """The head of an answer, which has a Content-Length. Logs the request. During a stop, tells the client to send
        no more: its next request would be lost. waitress's own method serves any app, and takes six times as long."""
        request, is_last = self.request, not self.channel.server.accepting
        if is_last or self.version == "1.0" or request.headers.get("CONNECTION", "").lower() == "close":
            self.set_close_on_finish()
        if log.isEnabledFor(logging.INFO):
            milliseconds = 1000 * (time.monotonic() - request.arrived_at)
            log.info("%s %s %.1f ms", _request_line(request), self.status[:3], milliseconds)
        return "\r\n".join([f"HTTP/{self.version} {self.status}", *map(": ".join, self.response_headers),
                            f"Date: {build_http_date(self.start_time)}", "", ""]).encode("latin-1")

    def answer(self, status: str, headers: Iterable[tuple[str, str]], body: bytes) -> None:
        """Writes an answer in one piece."""
        self.status = status
        self.response_headers.extend(headers)
        self.channel.write_soon(self.build_response_header() + body)
        self.wrote_header = True


class _ErrorTask(_Task, ErrorTask):
    """Answers in JSON what waitress refuses and would itself answer in plain text."""

    def execute(self) -> None:
        error = self.request.error
        body = json.dumps({"error": str(_as_refusal(error.code))}).encode()
        self.set_close_on_finish()
        self.channel.is_refused = True
        self.answer(f"{error.code} {error.reason}", _with_length(_JSON_HEADERS, body), body)


class _AppTask(_Task, WSGITask):
    """An answer of the app."""

    def get_environment(self) -> Environ:
        """The request's only environ: submit_all() may have put a submission into it. A proxy on this host is believed
        if it says that the client uses https. waitress could do that, too, but would refuse a senseless header."""
        environ: Environ = self.request.environ or super().get_environment()
        if environ.get("HTTP_X_FORWARDED_PROTO") == "https" and environ["REMOTE_ADDR"] in ("127.0.0.1", "::1"):
            environ["wsgi.url_scheme"] = "https"
        self.request.environ = environ
        return environ

    def execute(self) -> None:
        """Answers stored reports without the checks that waitress makes of what an app answers."""
        environ = self.get_environment()
        if _SUBMISSION in environ:
            self.answer(*self.channel.server.application.answer_submission(environ))
        else:
            super().execute()


def _request_line(request: Any) -> str:
    """Method and path for the log, in printable ASCII, without the query or a key."""
    if not hasattr(request, "path") or request.error and request.error.code == 431:  # waitress did not parse it
        return "- -"
    path = quote(request.path[:200], safe="/:@!$&'()*+,;=~", encoding="latin-1") or "-"
    return re.sub("(bf_[a-z]+_)[0-9A-Za-z]+", r"\1...", f"{request.command[:20]} {path}")


class _Channel(HTTPChannel):
    """A connection."""

    parser_class, task_class, error_task_class = _RequestParser, _AppTask, _ErrorTask
    __repr__ = object.__repr__  # that of waitress has the client's address, and is logged with errors
    request_began = last_activity = 0.0
    is_refused = False  # waitress has refused a request, perhaps before all of its body was here
    # For mypy; waitress sets them: whether to close after these answers, and the request that is still arriving.
    close_when_flushed, request = False, None

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.requests_lock = threading.RLock()  # not a Lock: `received` takes it around a method that takes it again

    def received(self, data: bytes) -> None:
        """Measures the time of a request from its first byte. waitress measures from the last one, so a client that
        sends a byte now and then would keep its connection for ever. Drops requests beyond MAX_PIPELINED: a client that
        reads no answers could otherwise make many megabytes of requests wait."""
        previous, now = self.request, self.last_activity  # waitress has just set the time
        if previous is None and data.startswith(b"\x16"):  # TLS: an https:// client would wait for its handshake's end
            data = b"TLS\r\n\r\n"  # is refused at once
        with self.requests_lock:  # keeps workers from answering some of them meanwhile
            if not self.is_refused:
                super().received(data)
            if len(self.requests) > MAX_PIPELINED:
                del self.requests[MAX_PIPELINED:]
                last = self.requests[-1]
                last.version, last.headers["CONNECTION"] = "1.1", "close"  # so its answer closes the connection
        is_same = self.is_refused or previous is not None and self.request is previous
        # The timeout counts from last_activity: each byte moves it on as if it came at the lowest rate.
        self.request_began = min(now, self.request_began + len(data) / MIN_BYTES_PER_SECOND) if is_same else now
        self.last_activity = self.request_began

    def service(self) -> None:
        """Sends the answer even if the connection's next request is here already. The I/O thread would keep a small
        answer until the next one is ready, too."""
        super().service()
        if self.requests:
            self._flush_exception(self._flush_some, do_close=False)

    def handle_write(self) -> None:
        """Closes only the server's side after a refused request; `received` drops what comes until the client closes.
        waitress would close both at once, which resets the connection if the body is still on its way: the client would
        then send it again instead of seeing a 413."""
        if self.is_refused and self.close_when_flushed:
            self._flush_exception(self._flush_some)
            if self.connected and not self.will_close:
                if not self.total_outbufs_len:
                    self.close_when_flushed, self.request = False, None  # a stop would wait for the rest of it
                    self.socket.shutdown(socket.SHUT_WR)  # if this fails, the client is gone: waitress closes then
                return
        super().handle_write()

    def _flush_some(self, do_close: bool = True) -> Any:
        """Takes the lock, which waitress's I/O thread does not. Otherwise it could send an answer while a worker sends
        the `100 Continue` for the next request: both would go out twice and mixed up."""
        with self.outbuf_lock:
            return self.connected and super()._flush_some(do_close)

    def writable(self) -> bool:
        """Whether there is something to send. False if `handle_write` would leave a small answer to the worker that
        makes it: waitress's I/O thread would spin until then, and take the interpreter from that worker."""
        is_left = self.requests and not self.will_close and self.total_outbufs_len < self.adj.send_bytes
        return not is_left and bool(super().writable())


def _close_idle(server: Any, now: float) -> None:
    """Closes idle connections, also those whose client reads no answer, which waitress keeps."""
    for channel in list(server.active_channels.values()):
        if channel.last_activity < now - IDLE_TIMEOUT and (channel.total_outbufs_len or not channel.requests):
            channel.handle_close()  # at once: if the client does not read, the socket never becomes writable


class _Dispatcher(ThreadedTaskDispatcher):
    """Reports that arrive while a thread decodes others go to that thread, which stores all in one commit. For every
    other request, waitress wakes a thread, which takes longer than decoding a report."""

    def __init__(self, app: Backfeedr, threads: int):
        super().__init__()
        self.set_thread_count(threads)
        self.app, self.is_stopped = app, False
        self.waiting: SimpleQueue[_Channel] = SimpleQueue()  # those with a report
        self.gathering = threading.Lock()  # held while a thread gathers them, or is about to
        self.turn = threading.Lock()  # wakes one thread when it is released; a queue would wake one more each time
        self.turn.acquire()
        self.commit_threads = [threading.Thread(target=self.store_all, daemon=True) for _ in range(COMMIT_THREADS)]
        for thread in self.commit_threads:
            thread.start()

    def add_task(self, channel: _Channel) -> None:
        request = channel.requests[0]
        request.arrived_at = time.monotonic()
        key = request.headers.get("X_BACKFEEDR_KEY", "")
        if request.error or not self.app.can_share_commit(request.command, request.path, key):
            super().add_task(channel)
        else:
            self.waiting.put(channel)
            self.wake_thread()

    def wake_thread(self) -> None:
        """Wakes a thread if reports wait, or all threads must end. One that is gathering looks again by itself."""
        if (self.is_stopped or not self.waiting.empty()) and self.gathering.acquire(blocking=False):
            self.turn.release()

    def store_all(self) -> None:
        while self.turn.acquire() and not self.is_stopped:
            self.store_gathered()
        self.turn.release()  # wakes the next thread, so that all end

    def store_gathered(self) -> None:
        """Takes requests that wait, stores their reports, and answers each."""
        channels: list[_Channel] = []
        environs = self.gather(channels)
        self.log_errors(self.app.submit_all, environs)
        # This ends the generator, which frees `gathering`. After an error, the others are then stored one by one.
        self.log_errors(list, environs)
        for channel in channels:
            self.log_errors(channel.service)

    def log_errors(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Makes a call and logs its error, which must not end the thread or keep others from their answers."""
        try:
            call(*arguments)
        except BaseException:
            log.exception("unexpected error")

    def gather(self, channels: list[_Channel]) -> Generator[Environ, None, None]:
        """The environs of the requests that wait or come while others are decoded. Fills `channels` with theirs."""
        size = 0
        try:
            while len(channels) < MAX_GATHERED_REQUESTS and size < MAX_GATHERED_BYTES:
                channel = self.waiting.get_nowait()
                channels.append(channel)
                request = channel.requests[0]
                environ = _AppTask(channel, request).get_environment()
                if time.monotonic() - request.arrived_at > BUSY_TIMEOUT:  # no thread was free for so long
                    environ[_SUBMISSION] = Submission(error=StorageUnavailable())
                elif channel.connected:
                    yield environ
                is_compressed = "CONTENT_ENCODING" in request.headers  # so it may become as large as the limit
                size += self.app.settings.max_body_size if is_compressed else request.body_bytes_received
        except Empty:
            pass
        finally:
            self.gathering.release()
            self.wake_thread()

    def shutdown(self, *arguments: Any, **options: Any) -> Any:
        self.is_stopped = True
        self.wake_thread()
        for thread in self.commit_threads:
            thread.join(timeout=1)
        return super().shutdown(*arguments, **options)


# == Server ====================================================================
# How the web server is started and stopped.

DRAIN_SECONDS = 4.0  # how long a stop waits for requests that have begun to arrive
DRAIN_IDLE_SECONDS = 0.3  # a stop closes a connection that has been silent for so long
SWITCH_INTERVAL = 0.002  # seconds that a thread may keep the interpreter while others wait for it


def serve(settings: Settings, make: Callable[..., Backfeedr] = Backfeedr) -> None:
    """Serves until SIGTERM or SIGINT. Before it makes a database, raises OSError if it cannot listen, and ImportError
    without waitress. `make` gets the settings with the real port, and `announce`, which takes a text to print."""
    if waitress is None:
        raise ImportError(_MISSING_PACKAGE.format("waitress"))
    listener = _listen(settings.host, settings.port)
    settings = replace(settings, port=listener.getsockname()[1])
    announcements: list[str] = []  # not printed yet
    if settings.verbose:
        log.addHandler(logging.StreamHandler())
        log.setLevel(logging.INFO)
    try:
        with listener, make(settings, announce=announcements.append) as app, app.alerts.running():
            _run_server(app, settings, listener, announcements)
    except BaseException as error:  # a full disk, too few threads: secrets of a first start cannot be shown again
        print("".join(announcements), end="", file=sys.stderr)
        if "start new thread" in str(error):
            raise OSError(error) from None
        raise


def _run_server(app: Backfeedr, settings: Settings, listener: socket.socket, announcements: list[str]) -> None:
    server = _make_server(app, settings, listener)
    stopping = threading.Event()

    def stop(*_: Any) -> None:
        stopping.set()
        server.pull_trigger()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    out = sys.stdout or sys.stderr
    print("backfeedr on", _url(settings.host, settings.port), file=out, flush=True)
    print("".join(announcements), end="", file=out, flush=True)
    announcements.clear()
    app.store.catch_up_in_background()  # finishes what a migration or a stop left undone
    if (warning := _unencrypted_warning(settings, listener.getsockname()[0])) and sys.stderr:
        sys.stderr.write(warning)
    # The default of 5 ms starves the I/O thread, which needs the interpreter back after each call. Much less would wake
    # waiting threads too often. These three are not set at import, which may happen in a host app.
    sys.setswitchinterval(SWITCH_INTERVAL)
    gc.freeze()  # the collector then skips what stays anyway: saves 5 % of a batch's time
    gc.set_threshold(20_000)  # fewer passes over the objects of a commit, which has no cycles: saves 1 to 5 %
    while not stopping.is_set():
        server.asyncore.loop(timeout=1, use_poll=True, map=server._map, count=1)
    _drain(server)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, UnicodeError, TypeError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]  # without the address again
        option = "port" if getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES) else "host"
        raise OSError(f"cannot listen on {host} port {port}: {reason};"
                      f" choose another with --{option} or BACKFEEDR_{option.upper()}") from None


def _unencrypted_warning(settings: Settings, address: str) -> str:
    """A warning if other machines can reach the server and no proxy is known to add https; otherwise ""."""
    if ipaddress.ip_address(address.partition("%")[0]).is_loopback or settings.public_url.startswith("https://"):
        return ""
    return (f"backfeedr: other machines can reach {address}, and the keys they send are not encrypted: put a proxy with"
            " https in front, and set BACKFEEDR_PUBLIC_URL to its address\n")


def _make_server(app: Backfeedr, settings: Settings, listener: socket.socket) -> Any:
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # it warns of every request that waits
    server = waitress.server.create_server(
        app, _dispatcher=_Dispatcher(app, settings.threads), sockets=[listener], ident=None,
        max_request_body_size=settings.max_body_size + 65536,  # more than the app's own limit, which refuses first
        connection_limit=_connection_limit(settings.threads + COMMIT_THREADS),
        max_request_header_size=32768, inbuf_overflow=131072, recv_bytes=65536, cleanup_interval=10,
        asyncore_use_poll=True,
        clear_untrusted_proxy_headers=False,  # the app reads none; True would wrap the app, which _AppTask calls
        outbuf_high_watermark=1 << 40)  # so that a worker never waits for the client
    server.channel_class = _Channel
    server.maintenance = partial(_close_idle, server)
    # The I/O thread sends all answers: a worker would give up the interpreter for each. With 16 clients, a third less
    # would get done. (As an option of create_server this is deprecated.)
    server.adj.send_bytes = 16384
    return server


def _connection_limit(threads: int) -> int:
    """Raises the soft limit of open files; returns how many connections it allows. Each needs two files, one of them
    for a large body; the database needs three for each thread."""
    import resource  # here, because only POSIX has it, and only `serve` needs it

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    if (connections := (files - 3 * threads - 50) // 2) < 10:  # without a limit that fits, a full table floods the log
        raise OSError(f"only {files} open files are allowed (ulimit -n): {3 * threads + 70} are needed, or a lower"
                      " BACKFEEDR_THREADS")
    return min(1000, connections)


def _drain(server: Any) -> None:
    """Stops accepting, and answers every request that was sent. waitress itself would drop those in progress."""
    accepted = -1
    while len(server.active_channels) > accepted:  # until no connection waits to be accepted
        accepted = len(server.active_channels)
        server.handle_accept()
    server.accepting = False
    server.del_channel()
    server.socket.close()
    deadline = time.monotonic() + DRAIN_SECONDS
    while server.active_channels and time.monotonic() < deadline:
        server.asyncore.loop(timeout=0.05, use_poll=True, map=server._map, count=1)
        for channel in list(server.active_channels.values()):
            is_busy = channel.requests or channel.request or channel.total_outbufs_len
            if not is_busy and time.time() - channel.last_activity > DRAIN_IDLE_SECONDS:
                channel.will_close = True
    server.task_dispatcher.shutdown(timeout=1)


# == Operations ================================================================
# Backs up, exports, imports and checks a database while the server runs.

IMPORT_LINES = 1000  # the most lines in a transaction
IMPORT_BYTES = 1_000_000  # after which a transaction ends, too
MAX_LINE = 1 << 27  # bytes of an exported report: far more than any server accepts in a body
LOW_DISK = 100_000_000  # bytes; with less than this free, `check` fails


def backup(store: Store, path: Path) -> None:
    """Copies the database as it is now to a new file that only its owner can read. Raises StoreError. The file gets its
    name only when it is complete. One read transaction copies it: it blocks no writer, but the WAL grows meanwhile."""
    if path.exists():
        raise StoreError(f"the file {path} already exists")
    try:
        # This folder is closed to others, and is deleted even after an error.
        with tempfile.TemporaryDirectory(prefix=path.name + ".", suffix=".partial", dir=path.parent) as folder, \
                closing(Connection(store.path, mode="ro")) as db:
            unfinished = os.path.join(folder, "copy")
            with open(os.open(unfinished, os.O_CREAT | os.O_RDWR, 0o600)) as file:
                db.execute("vacuum into ?", (unfinished,))
                os.fsync(file.fileno())
            try:
                os.link(unfinished, path)  # fails if another file has taken the name meanwhile
            except OSError as error:
                if isinstance(error, FileExistsError) or path.exists():
                    raise
                os.replace(unfinished, path)  # exFAT has no links
    except (OSError, sqlite3.Error) as error:
        raise StoreError(f"cannot write the backup {path}: {getattr(error, 'strerror', error)}") from None


def write_jsonl(out: TextIO, stored: StoredReport) -> None:
    """Writes a report as a line of JSON: as it was sent, with its id, app and time of receipt."""
    out.write(to_json(_exported(stored)) + "\n")


def csv_writer(out: TextIO, kind: Any) -> Callable[[StoredReport], Any]:
    """Writes the header of a table; returns a function that writes a report as a row."""
    table = csv.DictWriter(out, ["id", "app", "is_test", "received_at", "clock_ahead_ms",
                                *[name for name in kind._fields if name != "images"]])
    table.writeheader()
    return lambda stored: table.writerow({name: _csv_cell(value) for name, value in _exported(stored).items()})


def _exported(stored: StoredReport) -> JsonObject:
    id = report_id(type(stored.report), stored.seq)
    return as_sent({"id": id, **stored._asdict(), "report": None, **stored.report._asdict()})


# Where a formula begins: at a sign, which may be full-width, at the start of a cell, or after what some spreadsheets
# take for the end of one. They skip control characters.
_SIGN, _CONTROL = "-=+@\uff0d\uff1d\uff0b\uff20", "\x00-\x1f\x7f-\x9f"
_FORMULA = re.compile(f"(^(?=[{_SIGN}{_CONTROL}])|[;{_CONTROL}](?=[{_SIGN}]))")


def _csv_cell(value: Any) -> Any:
    """The value as a cell that no spreadsheet takes for a formula."""
    text = to_json(value) if type(value) in (list, dict) else value
    return _FORMULA.sub(r"\1'", text) if type(text) is str else text


# What an export adds to the fields of a report.
_EXPORT_FIELDS = {"app": str, "id": str, "is_test": bool, "received_at": str, "clock_ahead_ms": int, "extra": dict}


def _parse_exported(line: bytes) -> StoredReport:
    """The report in a line of write_jsonl(), checked like one from a client. Raises Refusal."""
    values = {"extra": {}, "clock_ahead_ms": 0, **decode_json(line)}
    group = values.pop("group_hash", "")  # computed again, unless the frames that it depends on were cut
    for name, kind in _EXPORT_FIELDS.items():
        if type(values.get(name)) is not kind:
            raise Refusal(f"{'missing' if values.get(name) is None else 'invalid'} {name}")
    app, id, is_test, received, ahead_ms, extra = map(values.pop, _EXPORT_FIELDS)
    if not 0 <= ahead_ms < 10_000 * 366 * DAY:  # longer than all the years that a time can have
        raise Refusal("invalid clock_ahead_ms")
    try:
        received_at = parse_time(received)
    except ValueError:
        raise Refusal("invalid received_at") from None
    match = re.fullmatch("(evt_)?([0-7][0-9a-f]{15})", id)
    # A seq is never before its time of receipt, and after it only if the server's clock was set back: perhaps by years.
    if not match or not seq_at(received_at) <= int(match[2], 16) < seq_at(received_at + 3650 * DAY):
        raise Refusal("invalid id")
    report: Any = (parse_event if match[1] else parse_crash)({**extra, **values})
    if "truncated" in extra and is_trace_cut(to_json(extra)) and re.fullmatch("[0-9a-f]{16}", str(group)):
        report = report._replace(group_hash=group)
    return StoredReport(int(match[2], 16), app, is_test, received_at, ahead_ms, report)


def import_jsonl(store: Store, lines: Iterable[bytes]) -> Counter[str]:
    """Stores what write_jsonl() wrote; returns the sum of the counts of Store.import_(). Raises StoreError, for
    a bad line with its number; the lines before it are then stored."""
    counts: Counter[str] = Counter()
    try:
        for batch in _import_batches(lines):
            counts += store.import_(batch)
    except (StoreError, StorageUnavailable) as error:
        raise StoreError(f"{error}; {counts['stored']:,} reports before it were stored: fix this and import the"
                         " whole file again") from None
    return counts


def _import_batches(lines: Iterable[bytes]) -> Iterator[list[StoredReport]]:
    batch, size = list[StoredReport](), 0
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                batch.append(_parse_exported(line))
        except Refusal as refusal:
            yield batch
            raise StoreError(f"line {number}: {refusal}") from None
        size += len(line)
        if len(batch) >= IMPORT_LINES or size > IMPORT_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


def _read_only_mode(path: Path) -> str:
    """The `mode` that changes no file. Without a WAL nobody writes, and `immutable` keeps SQLite from making one."""
    return "ro" if Path(f"{path}-wal").exists() else "ro&immutable=1"


def _open_read_only(path: Path) -> Connection:
    return Connection(path, True, _read_only_mode(path))


def _check_file(path: Path) -> str:
    if not path.is_file():
        raise StoreError(f"there is no database {path}{DB_PATH_HINT}")
    for place in (path, path.parent):
        if not os.access(place, os.R_OK | os.W_OK):
            raise StoreError(f"no permission to read and write {place}, which a server needs")
    free = shutil.disk_usage(path.parent).free
    if free < LOW_DISK:
        raise StoreError(f"only {megabytes(free)} are free on the disk")
    return f"{path}, {megabytes(path.stat().st_size)}, WAL {megabytes(_wal_size(path))}, disk {megabytes(free)} free"


def _check_schema(path: Path) -> str:
    with closing(_open_read_only(path)) as db:
        check_compatible(db, path)
        version: int = db.pragma("user_version")
    if not version:
        raise StoreError("there are no tables")
    upgrade = f", which the next start upgrades to version {SCHEMA_VERSION}" if version < SCHEMA_VERSION else ""
    return f"version {version}{upgrade}"


def _check_pages(path: Path) -> str:
    with closing(_open_read_only(path)) as db:
        result, pages = db.pragma("quick_check(1)"), db.pragma("page_count")
    if result != "ok":
        raise StoreError(result.rpartition("\n")[2])
    return f"{pages:,}, all sound"


def _check_roll_ups(path: Path) -> str:
    """Compares the figures with those that the same code counts again from all reports, into temporary tables."""
    with closing(sqlite3.connect("", isolation_level=None, uri=True)) as db:  # "": a temporary file
        db.execute("attach database ? as stored", (f"{path.as_uri()}?mode={_read_only_mode(path)}",))
        if db.execute("pragma stored.user_version").fetchone()[0] < SCHEMA_VERSION:
            return "not compared before the upgrade"
        db.executescript(FIGURE_TABLES)
        db.execute("begin")
        expired = last_deleted_seq(db)
        recount(db)
        wrong_tables = _wrong_tables(db, expired)
    if wrong_tables:
        raise StoreError(f"these tables do not agree with the reports: {', '.join(wrong_tables)}")
    return "agree with the reports"


def _wrong_tables(db: sqlite3.Connection, expired: int) -> list[str]:
    """The tables that differ between `stored` and the recounted `main`. Reports up to the seq `expired` may be gone."""
    row_tables = re.findall(r"create table (\w+)", "".join(figure.TABLES for figure in FIGURES))
    queries = [(table, query) for table, sums in SUMS.items() for query in _wrong_sums(table, sums, expired)]
    queries += [(table, _wrong_rows(table)) for table in row_tables if table != "medians"]  # a cache
    settled = expired + seq_at(HOUR) if expired else 0  # devices that were last seen before may be gone already
    wrong = [name for name, query in queries if db.execute(query + " limit 1", {"settled": settled}).fetchone()]
    return list(dict.fromkeys(wrong))


def _wrong_sums(table: str, sums: Sums, expired: int) -> list[str]:
    """Queries for rows that differ. If reports have expired, they only look at later days, or for sums that are too
    small: without its first report, a device or session counts on a later day or for a later release."""
    if table == "key_days":  # counts requests, and no report tells of them
        return []
    if expired and sums.check == "at least":
        is_less = " or ".join(f"counted.{column} > coalesce(kept.{column}, 0)" for column in sums.columns)
        return [f"""select 1 from main.{table} as counted left join stored.{table} as kept
                    using ({', '.join(PRIMARY_KEYS[table])}) where {is_less}"""]
    where = "app_id in (select id from apps)"  # not of deleted apps
    if expired and sums.check == "recent":
        where += f" and day > {(expired >> SEQ_BITS) // DAY + 1}"
    elif expired and sums.lasts:
        return []
    elif table == "release_hours":  # whether later hours are kept depends on reports that may be gone
        where += f""" and hour <= (
            select min(first_seen) / {HOUR} + {24 * HEALTH_DAYS} from stored.builds as seen
            where seen.app_id = release_hours.app_id and seen.app_version = release_hours.app_version)"""
    columns = ", ".join([*PRIMARY_KEYS[table], *sums.columns])
    counted, kept = (f"select {columns} from {schema}.{table} where {where}" for schema in ("main", "stored"))
    missing, extra = f"{counted} except {kept}", f"{kept} except {counted}"
    may_be_old = sums.window or table == "release_hours"  # rows that are too old are deleted some time later
    return [missing] if may_be_old else [missing, extra]


# The columns with the times of a row's first and last report. Both reports may have expired.
SPAN_COLUMNS = {"sessions": ("first_seq", "last_seq"), "groups": ("first_seen", "last_seen"),
                "builds": ("first_seen", "last_seen"), "devices": ("first_day", "last_hour")}


def _wrong_rows(table: str) -> str:
    """A query for rows that are not stored, or whose span is shorter than that of the reports that are left."""
    first, last = SPAN_COLUMNS.get(table, ("app_id", "app_id"))  # equal anyway, so without a span nothing is compared
    same = [*PRIMARY_KEYS[table], *(("crashes", "devices") if table == "groups" else ())]
    condition, unit = "true", SECOND if table == "builds" else 1  # see SeenBuild.last_seen
    if "device" in table:
        condition = "(app_id, device) in (select app_id, device from main.devices where last_seq > :settled)"
    elif table == "sessions":  # its last crash may expire in an earlier step than its events
        condition = "last_seq > :settled"
    elif table == "builds":  # at the limit, other builds may have come first
        condition = f"(select count(*) from stored.builds where app_id = counted.app_id) < {MAX_BUILDS_OF_APP}"
    return f"""
        select 1 from main.{table} as counted where {condition} and not exists (
            select 1 from stored.{table} as kept
            where {" and ".join(f"kept.{column} = counted.{column}" for column in same)}
            and kept.{first} <= counted.{first} and kept.{last} / {unit} >= counted.{last} / {unit})"""


def content_warnings(path: Path) -> list[str]:
    """A warning for each app without a key, as after an import, and for each channel whose last message failed."""
    with suppress(sqlite3.Error, TypeError), closing(_open_read_only(path)) as db:  # the file may be older, or damaged
        apps = db.execute("""
            select name from apps where id not in (select app_id from keys where revoked_at is null) order by id""")
        rows = db.execute("select id, url, ended_at, error, error_at from channels where error is not null order by id")
        return [*(f"App {name!r} has no key, so it refuses all reports: see 'key create'" for name, in apps),
                *(f"Channel {id} ({redacted_address(url)}) has {'ended' if ended_at else 'failed'}: {error}"
                  f" at {iso_time(error_at)}" for id, url, ended_at, error, error_at in rows)]
    return []


# == Commands ==================================================================
# What the commands do. Every one works while the server runs: they share nothing but the file.

_REPORT_TYPES: dict[str, Any] = {table: kind for kind, table in TABLES.items()}


class Commands:
    """The commands that use a store. Each prints its result, and may return a message for standard error."""

    def __init__(self, store: Store, options: argparse.Namespace, settings: Settings):
        self.store, self.options, self.metrics = store, options, Metrics(store)
        self.alerts = Alerts(store, settings.public_url, self.metrics.digest)

    def do_app_create(self) -> str:
        print(self.store.create_app(self.options.NAME, self.options.test))
        return f"Created the app {self.options.NAME!r}. Its API key is shown only this once."

    def do_app_list(self) -> None:
        _print_table("APP, KIND, KEYS, CREATED", [
            (app.name, "test" if app.is_test else "live", app.keys, _date(app.created_at))
            for app in self.store.apps()])

    def do_app_delete(self) -> str:
        name = self.options.NAME
        with self.store.reading() as db:
            self.store.find_app(db, name)  # raises an error before it asks
        if not self.options.yes:
            if sys.stdin is None or not sys.stdin.isatty():
                raise StoreError(f"there is no terminal to confirm on; --yes deletes {name!r} without asking")
            question = f"This deletes all reports of the app {name!r}. Type its name to confirm: "
            print(question, end="", file=sys.stderr, flush=True)
            if sys.stdin.readline().rstrip("\n") != name:
                raise StoreError("the names differ; nothing was deleted")
        self.store.delete_app(name)
        try:
            self.store.prune()
        except StorageUnavailable:
            raise StoreError(f"the app {name!r} is deleted, but some reports are left: run 'prune'") from None
        return f"Deleted the app {name!r}, its keys and all its reports."

    def do_key_create(self) -> str:
        print(self.store.create_key(self.options.NAME))
        return f"Created another key for the app {self.options.NAME!r}. It is shown only this once."

    def do_key_list(self) -> None:
        _print_table("KEY, APP, CREATED, REVOKED, LAST USED, REQUESTS IN 7 DAYS", [
            (key.prefix + "...", key.app, _date(key.created_at), _date(key.revoked_at),
             _date(key.last_used and key.last_used * DAY), f"{key.requests:,}") for key in self.store.keys()])

    def do_key_revoke(self) -> str:
        key = self.store.revoke_key(self.options.PREFIX)
        return f"Revoked the key {key.prefix}... of the app {key.app!r}."

    def do_device_show(self) -> None:
        device = self.metrics.device(self.options.HASH)
        if not any(device.values()):
            raise StoreError(f"nothing is stored about a device {self.options.HASH!r}")
        print(json.dumps(device, indent=2, ensure_ascii=False))

    def do_device_forget(self) -> str:
        deleted = self.store.forget_device(self.options.HASH)
        if not deleted:
            raise StoreError(f"nothing is stored about a device {self.options.HASH!r}")
        return f"Forgot the device {self.options.HASH!r}: {_report_counts(deleted)}."

    def do_symbols_list(self) -> None:
        answer = self.metrics.symbols()
        _print_table("UUID, BINARY, ARCH, ROWS, SIZE, UPLOADED", [
            (build["uuid"], build["binary"], build["arch"], f"{build['rows']:,}", megabytes(build["size"]),
             build["uploaded_at"][:10] if build["complete"] else "not complete") for build in answer["symbols"]])
        print("\nMissing, though crashes need them:\n" if answer["missing"] else "\nNone are missing.")
        if answer["missing"]:
            _print_table("UUID, BUILD, APP, CRASHES", [
                (build["uuid"], build_name(build), build["app"] or "-", f"{build['crashes']:,}")
                for build in answer["missing"]])

    def do_symbols_delete(self) -> str:
        return f"Deleted the symbols of the build {self.store.delete_symbols(self.options.UUID)}."

    def do_alert_add(self) -> str:
        options = self.options
        kinds = options.on.replace(",", " ").split()
        if options.hour is not None and "digest" not in kinds:
            raise StoreError("--hour is that of the digest, which --on does not name")
        channel, secret = self.alerts.add(options.URL, options.app, kinds, options.with_reason,
                                          7 if options.hour is None else options.hour)
        message = f"Created channel {channel}."
        if secret:
            print(secret)
            message += " Its secret is shown only this once."
        if "http" in urlsplit(options.URL).scheme.split("+"):
            message += "\nOthers can read what is sent over http://; use https:// unless it stays on this host."
        return message

    def do_alert_list(self) -> None:
        _print_table("ID, CHANNEL, APP, FACTS, LAST SENT, WAITING, STATE", [
            (channel["id"], channel["address"], channel["app"] or "all live apps", channel["kinds"],
             _date(channel["sent_at"]), channel["waiting"],
             "ended" if channel["ended_at"] else channel["error"] or "no errors")
            for channel in self.alerts.channels()])

    def do_alert_test(self) -> str:
        self.alerts.test(self.options.ID)
        return f"Channel {self.options.ID} accepted a test message."

    def do_alert_remove(self) -> str:
        self.alerts.remove(self.options.ID)
        return f"Removed channel {self.options.ID}."

    def do_deliver(self) -> str:
        counts = self.alerts.deliver()
        return f"Messages sent: {counts['sent']:,}; failed: {counts['failed']:,}."

    def do_prune(self) -> str:
        size = self.store.size
        deleted = self.store.prune()
        freed = megabytes(max(0, size - self.store.size))
        return f"Deleted {_report_counts(deleted)}; freed {freed} of {megabytes(size)}."

    def do_backup(self) -> str:
        backup(self.store, Path(self.options.FILE))
        return f"Wrote {self.options.FILE}, {megabytes(os.stat(self.options.FILE).st_size)}."

    def do_export(self) -> None:
        options, kind, out = self.options, _REPORT_TYPES[self.options.KIND], sys.stdout
        if options.bom and options.format != "csv":
            raise StoreError("--bom is for --format csv: import reads jsonl without one")
        out.reconfigure(encoding="utf-8", newline="")  # type: ignore[union-attr]
        out.write("\ufeff" * options.bom)
        reports = self.store.export(kind, options.app, options.since)
        write = csv_writer(out, kind) if options.format == "csv" else partial(write_jsonl, out)
        for stored in reports:
            write(stored)
        out.flush()

    def do_import(self) -> str:
        with self.options.FILE as file:
            counts = import_jsonl(self.store, iter(lambda: file.readline(MAX_LINE), b""))
        return (f"Stored {plural(counts['stored'], 'report')}; {counts['known']:,} were here already, and"
                f" {counts['expired']:,} are older than what is kept here. Keys are not imported.")


def _report_counts(rows: Counter[str]) -> str:
    return f"{plural(rows['crashes'], 'crash', 'es')} and {plural(rows['events'], 'event')}"


def _run_checks(overrides: dict[str, Any]) -> int:
    given_path = overrides.get("db_path") or os.environ.get("BACKFEEDR_DB_PATH") or Settings.db_path
    path = Path(os.path.realpath(given_path))
    checks: dict[str, Callable[[Path], str]] = {  # each returns what it found, or raises an error
        "settings": lambda _: f"{len(fields(Settings.from_env(**overrides)))}, all good",
        "SQLite": lambda _: check_sqlite(), "file": _check_file, "schema": _check_schema, "pages": _check_pages,
        "roll-ups": _check_roll_ups}
    status = size_limit = 0
    for name, check in checks.items():
        try:
            print(f"ok  {name}: {check(path)}", flush=True)
        except (TypeError, ValueError, SettingsError, StoreError, sqlite3.Error, OSError) as error:
            is_damage = type(error) in (TypeError, ValueError)  # a column may then have any type of value
            print(f"BAD {name}: {'the file is damaged: ' * is_damage}{error}")
            status = 1
            if name == "file" and not path.is_file():  # so all other checks would fail
                return status
    with suppress(SettingsError):  # reported above
        size_limit = Settings.from_env(**overrides).max_db_size
    for warning in (*file_warnings(path, size_limit), *content_warnings(path)):
        print(f"WARN {warning}")
    return status


def _print_table(titles: str, rows: Sequence[Sequence[Any]]) -> None:
    lines = [titles.split(", "), *rows]
    widths = [max(len(str(cell)) for cell in column) for column in zip(*lines)]
    for line in lines:
        print("  ".join(str(cell).ljust(width) for cell, width in zip(line, widths)).rstrip())


def _date(time_ms: int | None) -> str:
    return "-" if time_ms is None else iso_time(time_ms)[:10]


# == Command line ==============================================================
# How a command is called. To add one, write a method of Commands and a row of _COMMANDS.

def main(argv: Sequence[str] | None = None, make: Callable[..., Backfeedr] = Backfeedr,
         open_store: Callable[..., Store] = Store) -> int:
    """Runs a command. Returns 0, or 1 after an error; exits with 2 for wrong usage."""
    # If standard error is closed, print() would write to standard output.
    with open(os.devnull, "w") as nowhere, redirect_stdout(_escaped(sys.stdout)), \
            redirect_stderr(_escaped(sys.stderr or nowhere)):
        try:
            return _run(_parser().parse_args(argv), make, open_store)
        except BrokenPipeError:  # nobody reads the output any more, nor what Python flushes when it exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 1
        except (KeyboardInterrupt, SettingsError, StoreError, Refusal, OSError, UnicodeError, ImportError) as error:
            problem = "interrupted" if isinstance(error, KeyboardInterrupt) else error
            print(f"backfeedr: {problem}", file=sys.stderr)
            return 1


def _run(options: argparse.Namespace, make: Callable[..., Backfeedr], open_store: Callable[..., Store]) -> int:
    overrides = {name: value for name, value in vars(options).items() if name in Settings.__dataclass_fields__}
    if options.command == "check":
        return _run_checks(overrides)
    if options.command == "help":
        print(options.handbook_text)
        return 0
    if options.command == "serve":
        _restart_compiled()
        serve(Settings.from_env(**overrides), make)
        return 0
    if sys.stdout is None:
        raise StoreError("standard output is closed")  # it would get the new key or the export
    settings = Settings.from_env(**overrides)
    retention_days = settings.retention_days if os.environ.get("BACKFEEDR_RETENTION_DAYS") else None
    may_create = options.command in ("app_create", "import")
    with open_store(settings.db_path, retention_days=retention_days, may_create=may_create) as store:
        if message := getattr(Commands(store, options, settings), "do_" + options.command)():
            print(message, file=sys.stderr)
    return 0


def _restart_compiled() -> None:
    """Replaces this process, if it runs the script, with one that runs the same code as a compiled module: Python keeps
    the syntax tree of a script until it ends, 22 MB. Does nothing if Python cannot store a compiled module beside the
    script, if it was told to ignore the environment, or if it is older than 3.10."""
    frame, loader, path = sys._getframe(), globals().get("__loader__"), os.pathsep.join(map(str, sys.path))
    while frame.f_back:
        frame = frame.f_back
    if not isinstance(loader, SourceFileLoader) or not hasattr(sys, "orig_argv"):
        return
    is_script = frame.f_globals is globals() and loader.path == __file__ and __file__.endswith(".py")  # not a profiler
    keeps_path = not sys.flags.ignore_environment and path.split(os.pathsep) == sys.path
    if not is_script or not keeps_path or sys.dont_write_bytecode:
        return
    with suppress(OSError):
        status, compiled = os.stat(__file__), cache_from_source(__file__)
        times = struct.pack("<3I", 0, int(status.st_mtime) & 0xFFFFFFFF, status.st_size & 0xFFFFFFFF)  # by PEP 552
        content = MAGIC_NUMBER + times + marshal.dumps(frame.f_code)  # what runs, never what was stored before
        loader.set_data(compiled, content)  # does nothing if it cannot write
        if Path(compiled).read_bytes() == content:
            os.execve(sys.executable, [*sys.orig_argv[:-len(sys.argv)], compiled, *sys.argv[1:]],
                      {**os.environ, "PYTHONPATH": path})  # packages may be beside the script


class CommandParser(argparse.ArgumentParser):
    """A parser that suggests the right word for a misspelt one, on every Python in the same words."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.suggest_on_error = False  # what Python 3.15 says by itself

    def error(self, message: str) -> Any:
        invalid = re.search(r"invalid choice: ('?[a-z].*) \(choose from (.+)\)", message)
        similar = invalid and get_close_matches(invalid[1].strip("'"), re.findall(r"[\w-]+", invalid[2]), 1)
        super().error(f"{message}; did you mean {similar[0]}?" if similar else message)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="backfeedr", description=(
        "Crash reports and usage figures for iOS apps, on your own host. Without a command, it serves."))
    parser.add_argument("--version", action="version", version=f"backfeedr {__version__}")
    actions = {"": parser.add_subparsers(title="commands", metavar="COMMAND")}  # by noun
    for name, text, arguments in (("", "", _SERVE_OPTIONS), *_COMMANDS):  # "": no command
        noun, _, verb = name.rpartition(" ")
        if noun not in actions:
            verbs = [command.split()[1] for command, *_ in _COMMANDS if command.startswith(noun + " ")]
            noun_parser = actions[""].add_parser(noun, help=", ".join(verbs))
            actions[noun] = noun_parser.add_subparsers(metavar="ACTION", required=True)
        subparser = actions[noun].add_parser(verb, help=text, description=text) if name else parser
        subparser.set_defaults(command=name.replace(" ", "_") or "serve")
        for argument, details in {**_DB_OPTION, **arguments}.items():
            subparser.add_argument(argument, **details)
    return parser


class _SafeTerminal:
    """A terminal that text from reports cannot control. Characters that move the cursor, start an escape sequence or
    reverse the direction of text are written as in JSON; tabs and line ends stay."""

    ESCAPED = re.compile(f"(?!\r\n)(?:{_MISLEADING_CHARACTERS.pattern})")

    def __init__(self, terminal: TextIO):
        self._terminal = terminal

    def __getattr__(self, name: str) -> Any:
        return getattr(self._terminal, name)

    def write(self, text: str) -> None:
        self._terminal.write(self.ESCAPED.sub(lambda match: f"\\u{ord(match[0]):04x}", text))


def _escaped(out: TextIO) -> Any:
    """The stream for text from reports: escaped on a terminal, unchanged to a pipe or a file."""
    return _SafeTerminal(out) if out and out.isatty() else out  # a process may have no `out`


def _parse_date(text: str) -> int:
    try:
        return parse_time(text + "T00:00:00Z")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date like 2026-03-12") from None


def _parse_number(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a channel's number")
    return int(text)


def _open_input(name: str) -> BinaryIO:
    """Opens an input file. It is an argument's type, so that a missing file is found before a new database is made."""
    if name == "-" and sys.stdin is None:
        raise StoreError("standard input is closed")
    try:
        return sys.stdin.buffer if name == "-" else open(name, "rb")
    except OSError as error:
        raise StoreError(f"cannot read {name}: {error.strerror}") from None


def _read_handbook(topic: str) -> str:
    """The text of a topic, or for "" a line about each topic. The handbook is beside the program, in its .pyz, or where
    a wheel puts it. As an argument's type, this refuses a wrong topic like any other wrong choice."""
    here = os.path.dirname(__file__)
    for folder in (here, os.path.join(here, "examples"), os.path.join(sys.prefix, "share", "backfeedr")):
        with suppress(OSError):
            handbook = str(globals()["__loader__"].get_data(os.path.join(folder, "handbook.md")), "utf-8")
            break
    else:
        raise StoreError("there is no handbook.md: copy examples/handbook.md beside backfeedr.py")
    topics = dict(section.split("\n", 1) for section in handbook.split("\n## ")[1:])
    if topic and topic not in topics:
        raise argparse.ArgumentTypeError(f"invalid choice: {topic!r} (choose from {', '.join(topics)})")
    summaries = [f"{name:12}{text.strip().splitlines()[0]}" for name, text in topics.items()]
    return topics[topic].strip() if topic else "\n".join(summaries)


_UNSET = {"default": argparse.SUPPRESS}  # an option that is not given leaves the setting to the environment
_DB_OPTION = {"--db": dict(dest="db_path", metavar="FILE", help="the database (default: backfeedr.db)", **_UNSET)}
_SERVE_OPTIONS = {"--host": dict(help="the address to listen on (default: 127.0.0.1)", **_UNSET),
                  "--port": dict(type=int, help="the port (default: 8080); 0 takes a free one", **_UNSET),
                  "--verbose": dict(action="store_true", help="log each request to standard error", **_UNSET)}
_APP_NAME = {"NAME": dict(help="the app's name")}
_DEVICE_HASH = {"HASH": dict(type=_cut_text, help="the device_id_hash that the app sends")}
_CHANNEL_ID = {"ID": dict(type=_parse_number, help="the channel's number: see alert list")}
_COMMANDS: Sequence[tuple[str, str, Mapping[str, Any]]] = (  # name, help, arguments
    ("serve", "start the server", _SERVE_OPTIONS),
    ("app create", "create an app and print its first key", {
        **_APP_NAME, "--test": dict(action="store_true", help="a test app: its reports are in no public figure")}),
    ("app list", "list the apps", {}),
    ("app delete", "delete an app, its keys and all its reports", {
        **_APP_NAME, "--yes": dict(action="store_true", help="do not ask for the name again")}),
    ("key create", "create another key for an app and print it", _APP_NAME),
    ("key list", "list the keys, by their first characters, and their use", {}),
    ("key revoke", "revoke a key at once", {"PREFIX": dict(help="the key, or enough of its beginning")}),
    ("device show", "print everything stored about a device, as JSON", _DEVICE_HASH),
    ("device forget", "delete everything stored about a device", _DEVICE_HASH),
    ("symbols list", "list the builds with symbols, and those that need them", {}),
    ("symbols delete", "delete the symbols of a build", {"UUID": dict(help="the UUID, or enough of its beginning")}),
    ("alert add", "add a channel for alerts and print its secret, if it has one", {
        "URL": dict(help="https://... (a webhook), slack+https://..., ntfy+https://HOST/TOPIC, or a URL of Apprise"),
        "--app": dict(metavar="NAME", help="only for this app (default: all live apps)"),
        "--on": dict(metavar="FACT,...", default="", help="only these facts: " + ", ".join(
            kind + " (default)" * is_default for kind, is_default in FACT_KINDS.items())),
        "--with-reason": dict(action="store_true", help="also send the crash's reason"),
        "--hour": dict(type=int, choices=range(24), metavar="H", help="of the digest, UTC (default: 7)")}),
    ("alert list", "list the channels and their last error", {}),
    ("alert test", "send a test message and print the result", _CHANNEL_ID),
    ("alert remove", "remove a channel", _CHANNEL_ID),
    ("deliver", "send due alerts once; a server does this by itself", {}),
    ("prune", "delete expired reports now", {}),
    ("backup", "write a copy of the database to a new file", {"FILE": dict(help="the new file; it must not exist")}),
    ("export", "print crashes or events", {
        "KIND": dict(choices=_REPORT_TYPES, help="which reports to print"),
        "--app": dict(metavar="NAME", help="only of this app (default: all apps)"),
        "--since": dict(metavar="DATE", type=_parse_date, default=0, help="received on this day (UTC) or later"),
        "--format": dict(choices=("jsonl", "csv"), default="jsonl",
                         help="jsonl (the default), which import reads, or csv for a spreadsheet"),
        "--bom": dict(action="store_true", help="begin csv with a byte order mark, which Excel needs for UTF-8")}),
    ("import", "store what export printed as jsonl", {"FILE": dict(type=_open_input, help="- is standard input")}),
    ("check", "check settings, disk, database and alerts", {}),
    ("help", "print a topic of the handbook, or list the topics", {
        "handbook_text": dict(metavar="TOPIC", nargs="?", default="", type=_read_handbook,
                              help="one of the listed topics")}))


if __name__ == "__main__":
    sys.exit(main())
