#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["bottle>=0.13", "waitress>=3.0.1"]
# ///
"""backfeedr: crash reports and usage figures for iOS apps, kept on your own host.

The whole server is this file. Copy it to a machine with Python 3.9 or later, install bottle and waitress, and run
`python backfeedr.py`. It prints an API key and the curl line that sends a first crash:

    curl -X POST http://127.0.0.1:8080/api/v1/crashes -H "X-Backfeedr-Key: bf_live_..." \\
        -d '{"exception_type": "SIGABRT", "occurred_at": "2026-03-12T14:22:31Z"}'

It is a WSGI callable, too: `Backfeedr(db_path="crashes.db")` mounts in any app.

The rooms. Each uses only those above it, except that Dashboard uses Templates, which stand below it:

    Settings        what an operator may choose
    Schema          the reports in the one SQLite file
    Values          refusals, times, ids, keys
    Grouping        what a stack frame says, and the group of a crash
    Payloads        JSON in, a crash or an event out
    Apple formats   MetricKit, .ips and .crash in, the same out
    Signature       HMAC-SHA256 over a request
    RateLimiter     at most so many requests a minute for a key
    Symbols         the names of a build's functions, and how a frame gets its own
    Triage          what was decided about groups, and what is worth telling
    Figures         what is counted: tables, counting and question of each figure
    Database        connections, transactions, migrations
    Apps            apps, keys, the admin
    Commit          how reports become rows, those of several requests together
    Store           the one write path, export, and how reports go again
    Alerts          facts on their way to channels
    Metrics         the questions asked of the store
    Requests        what a request carries, and what a client may be told
    Charts          numbers in, SVG out
    Dashboard       the pages that people look at
    Templates       their HTML and CSS
    Backfeedr       the WSGI callable
    Server          waitress, how it gathers reports, and how it stops
    Operations      backup, export, import, check
    Command line    serve, app, key, device, symbols, alert, prune, and the operations

To make a change, touch:

    add an endpoint             Backfeedr._routes, and a question in Metrics
    add a field to a report     REPORT_TABLES with SCHEMA_VERSION, migrate, and Crash or Event, perhaps _CONVERTERS
    add a figure                a class in FIGURES with SCHEMA_VERSION, migrate, and a question in Metrics
    add a page                  Dashboard.routes, a method there, and a template with _PAGES above it
    add a command               a method of Commands, and a row of _COMMANDS
    add a kind of channel       a function in Alerts, and a row of CHANNELS
    accept another format       a function in Payloads or Apple formats, and a row of Backfeedr._ingestion
"""

from __future__ import annotations

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
import math
import os
import re
import secrets
import shutil
import signal
import socket
import sqlite3
import struct
import sys
import tempfile
import threading
import time
import zlib
from bisect import bisect_left, bisect_right, insort
from collections import Counter, defaultdict, deque, namedtuple
from collections.abc import Container, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import date, datetime, timedelta, timezone
from difflib import get_close_matches
from email.utils import parsedate_to_datetime
from functools import cached_property, lru_cache, partial, reduce
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from itertools import accumulate, chain, compress, groupby, islice, product, repeat, tee
from operator import add, attrgetter, itemgetter, lt, sub
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, BinaryIO, Callable, NamedTuple, Optional, TextIO, Union
from urllib.parse import parse_qs, parse_qsl, quote, unquote, urlencode, urlsplit

_MISSING = ("{} is missing; 'python3 -m venv .venv && .venv/bin/pip install bottle waitress' installs what it needs,"
            " and .venv/bin/python runs it")  # many systems' own Python refuses new packages
try:
    import bottle
except ImportError:
    if __name__ != "__main__":
        raise
    sys.exit("backfeedr: " + _MISSING.format("bottle"))

__version__ = "0.1.0"

log = logging.getLogger("backfeedr")


# == Settings ==================================================================
# Every choice an operator has, with its unit and default. An invalid value is
# refused when the settings are made, not when it is first used.

class SettingsError(ValueError):
    """A setting with an invalid value. `str()` is one line that names the setting."""

    def __init__(self, name: str, problem: str):
        super().__init__(f"{name}: {problem}")
        self.name, self.problem = name, problem


_RANGES = {"port": (0, 65535), "rate_limit": (0, 1_000_000), "max_body_size": (1, 1 << 30),
           "retention_days": (0, 36_500), "max_db_size": (0, 1 << 50), "threads": (1, 1_000)}
_TYPE_NAMES: dict[Any, str] = {str: "a text", int: "a whole number", bool: "1 or 0"}
_BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
_PREFIX = "BACKFEEDR_"
# What Kubernetes gives the containers beside services whose names begin with ours.
_KUBERNETES = re.compile(r"(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)=.*|PORT(_[0-9]+_\w+)?=.*://.*"
                         r"|PORT_[0-9]+_[A-Z]+_(PROTO|PORT|ADDR)=.*)")


@dataclass(frozen=True)
class Settings:
    """What an operator may choose. Raises SettingsError for an invalid value."""

    host: str = "127.0.0.1"
    port: int = 8080                                 # 0 takes a free one
    db_path: str = "backfeedr.db"
    api_key: str = field(default="", repr=False)     # a key of the app `default`; "": made at first start
    auth_token: str = field(default="", repr=False)  # the admin token; "": made at first start
    rate_limit: int = 100                            # requests a minute and key; 0 is off
    max_body_size: int = 1_048_576                   # bytes, as sent and again after decompression
    retention_days: int = 90                         # since receipt; 0 keeps all
    max_db_size: int = 0                             # bytes, beyond which the oldest reports go early; 0 is off
    require_signature: bool = False
    public_metrics: bool = True
    threads: int = 32
    public_url: str = ""                             # where clients reach the server, https:// where a proxy adds it
    verbose: bool = False                            # a line on standard error for each request

    def __post_init__(self) -> None:
        object.__setattr__(self, "db_path", os.fspath(self.db_path))
        for each in fields(self):
            value: Any = getattr(self, each.name)
            kind: Any = type(each.default)
            if type(value) is not kind:
                raise SettingsError(each.name, f"{repr(value) if each.repr else 'it'} is not {_TYPE_NAMES[kind]}")
            low, high = _RANGES.get(each.name, (value, value))
            if not low <= value <= high:
                raise SettingsError(each.name, f"{value} is not from {low} to {high}")
            if kind is str and (value != value.strip() or value and not value.isprintable()):
                raise SettingsError(each.name, "begins or ends with a space, or has a control character")
        if not self.host:
            raise SettingsError("host", "must name a host")
        if 0 < len(self.auth_token) < 16:
            raise SettingsError("auth_token", "has fewer than 16 characters, so that it could be guessed")
        if self.db_path in ("", ":memory:"):
            raise SettingsError("db_path", "must name a file")
        if not re.fullmatch(r"(https?://[A-Za-z0-9.:\[\]-]+(/[A-Za-z0-9._~%/-]*)?)?", self.public_url):
            raise SettingsError("public_url", f"{self.public_url!r} is not like https://crashes.example.com")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
        """Settings from the BACKFEEDR_* variables of `environ` (default: os.environ); `overrides` come first. An empty
        variable counts as unset. An unknown one is an error: a misspelt one would leave open what it was meant to
        close."""
        given = {name[len(_PREFIX):]: text for name, text in (os.environ if environ is None else environ).items()
                 if text and name.startswith(_PREFIX) and name != "BACKFEEDR_ENDPOINT"}  # of examples/client.py
        if ignored := sorted(name for name, text in given.items() if _KUBERNETES.fullmatch(f"{name}={text}")):
            log.warning("ignored %s: Kubernetes sets them for a service", ", ".join(_PREFIX + name for name in ignored))
        kinds, values = {each.name.upper(): type(each.default) for each in fields(cls)}, {}
        for name in sorted(given.keys() - set(ignored)):
            if name not in kinds:
                close = [f"did you mean {_PREFIX}{each}?" for each in get_close_matches(name, kinds, 1)]
                hint = "".join(close) or f"after {_PREFIX} comes one of {', '.join(kinds)}"
                raise SettingsError(_PREFIX + name, f"there is no such setting; {hint}")
            values[name.lower()] = _from_text(given[name], kinds[name])
        try:
            cls(**values)
        except SettingsError as error:  # also where something else is given instead
            raise SettingsError(_PREFIX + error.name.upper(), error.problem) from None
        return cls(**{**values, **overrides})


def _from_text(text: str, kind: type) -> Any:
    """The value that a variable's text stands for; the text itself if it is none, which Settings then refuses."""
    if kind is int and re.fullmatch("-?[0-9]{1,18}", text):
        return int(text)
    return _BOOLEANS.get(text.lower(), text) if kind is bool else text


# == Schema ====================================================================
# One SQLite file that its owner can open with any tool. A report is a row, under the field names of the API; times are
# milliseconds since 1970 UTC. The tables of the figures stand in the room Figures.
#
# `seq` is the time of receipt in milliseconds * 2^20 + a counter. It is the id that was answered, so the id costs no
# byte and no index. It is unique across files, and it ascends: inserts append, and retention deletes from the front.

APPLICATION_ID = 0x62666472  # "bfdr": tells our files from other people's
SCHEMA_VERSION = 6

GROUP_INDEX = """
create index crashes_by_group on crashes (  -- tells whether a group has a device, and covers what groups are counted by
    app_id, group_hash, device_id_hash, received_at, occurred_at, clock_ahead_ms, app_version, os_version,
    device_model);
"""
REPORT_TABLES = """
create table apps (
    id integer primary key autoincrement,  -- never given twice
    name text not null unique, is_test integer not null, created_at integer not null);
create table keys (
    key_hash blob primary key,             -- SHA-256; the key itself is stored nowhere
    app_id integer not null, prefix text not null, created_at integer not null, revoked_at integer
) without rowid;
create table secrets (                     -- 'admin_token', 'feed_token'
    name text primary key, hash blob not null) without rowid;
create table grants (                      -- browser sessions and one-time links, by their SHA-256
    hash blob primary key, expires_at integer not null) without rowid;

create table crashes (
    seq integer primary key, id text generated always as (printf('%016x', seq)) virtual,
    app_id integer not null, received_at integer not null, occurred_at integer not null,
    clock_ahead_ms integer not null default 0,  -- by how much the device's clock was fast
    other integer not null default 0,      -- bits of the fields that count as '(other)': see NewNames
    group_hash text not null, images text,  -- builds whose symbols can name its frames, divided by spaces
    exception_type text not null,
    app_version text, build_number text, os_version text, device_model text, device_id_hash text,
    session_id text, locale text, free_memory_mb numeric, battery_level real,  -- 0 to 1; -1 is unknown
    is_charging integer,
    -- Long values come last: SQLite reads a row only up to the last column it needs.
    -- stack_trace is JSON, and so is extra, which has the fields that this server does not know.
    exception_reason text, stack_trace text, extra text);
create table events (
    seq integer primary key, id text generated always as (printf('evt_%016x', seq)) virtual,
    app_id integer not null, received_at integer not null, occurred_at integer not null,
    clock_ahead_ms integer not null default 0, other integer not null default 0,
    type text not null, name text,
    app_version text, os_version text, device_model text, device_id_hash text, session_id text, locale text,
    properties text, extra text);

create table replays (                     -- how a stored request is recognised when it comes again
    app_id integer not null, mark blob not null,   -- digest of the Idempotency-Key or the signature
    request blob not null,                         -- digest of path and body
    first_seq integer not null, reports integer not null,  -- their seqs follow one another
    received_at integer not null, primary key (app_id, mark)) without rowid;
create index replays_by_age on replays (received_at);

create table given_seqs (                  -- all seqs that were ever given are within these
    first integer primary key, last integer not null);
-- retention_days; expired_crashes and expired_events, the highest seq that has expired; with the id of an app, early_,
-- the highest of its that went early, worse_, first_seen of its release that was told last to be worse, and deleted_,
-- the lowest seq from which on the reports of a deleted app have gone;
-- trimmed_day, on which old sums were deleted last; counted_at, when reports were last counted but not received.
create table state (name text primary key, value integer not null) without rowid;
""" + GROUP_INDEX


# == Values ====================================================================
# What a client may be told, and small conversions that many rooms use.

SECOND = 1000  # all times are in milliseconds
HOUR = 3600 * SECOND
DAY = 24 * HOUR
MAX_SKEW = 300 * SECOND  # how fast a device's clock may be and still be believed
EPOCH = 1_167_609_600_000  # 2007, when the first iPhone came: an earlier time is from a clock that was never set
SEQ_BITS = 20  # for the counter of a seq within a millisecond


class Refusal(Exception):
    """A request that is refused. `str()` is the error that the client gets, and `detail` may help its developer. After
    `retry_after` seconds the same request may succeed."""

    def __init__(self, text: str, retry_after: int | None = None, detail: str = ""):
        super().__init__(text)
        self.retry_after, self.detail = retry_after, detail


class Moved(Refusal):
    """The crashes of a group have moved to another one."""

    def __init__(self, group_hash: str):
        super().__init__("moved", detail=f"to {group_hash}")
        self.group_hash = group_hash


class StorageUnavailable(Refusal):
    """The database cannot be used now; nothing of the request was acknowledged."""

    def __init__(self) -> None:
        super().__init__("storage unavailable", retry_after=2)


_RFC3339 = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt]((?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9])(?:\.([0-9]{1,9}))?"
    r"(?:[Zz]|([+-])([01][0-9]|2[0-3]):?([0-5][0-9]))")


def parse_time(text: str) -> int:
    """Milliseconds since 1970 UTC of an RFC 3339 time with a zone. Raises ValueError. (datetime overflows where an
    offset leads out of the years 1 to 9999, and before Python 3.11 it knows neither Z nor nanoseconds.)"""
    match = _RFC3339.fullmatch(text)
    if match is None:
        raise ValueError("not an RFC 3339 time with a zone")
    day, clock, fraction, sign, hours, minutes = match.groups()
    offset = int(sign + hours) * HOUR + int(sign + minutes) * 60 * SECOND if sign else 0
    seconds = int(datetime.fromisoformat(f"{day}T{clock}+00:00").timestamp())
    return seconds * SECOND + int((fraction or "")[:3].ljust(3, "0")) - offset


FIRST_TIME, LAST_TIME = parse_time("0001-01-01T00:00:00Z"), parse_time("9999-12-31T23:59:59.999Z")  # datetime's bounds


def parse_occurred_at(value: Any) -> int:
    """Milliseconds since 1970 UTC of the time in a report. A number is seconds since 1970, or if that would be before
    2008, since 2001, which is Swift's default; from 1e12 on it is milliseconds. Raises ValueError."""
    if type(value) in (int, float):
        time_ms = value if value >= 1e12 else SECOND * (value if value >= 1.2e9 else value + 978_307_200)
        if not FIRST_TIME <= time_ms < LAST_TIME + 1:
            raise ValueError("is not within the years 1 to 9999")
        return int(time_ms)
    try:
        return parse_time(value)
    except (ValueError, TypeError):
        has_no_zone = type(value) is str and _RFC3339.fullmatch(value + "Z")
        raise ValueError("has no zone" if has_no_zone else "is not a time like 2026-03-12T14:22:31Z") from None


def iso_time(time_ms: int) -> str:
    """The RFC 3339 time in UTC. Beyond the years 1 to 9999, it is their first or last."""
    moment = datetime(1970, 1, 1) + timedelta(milliseconds=min(max(time_ms, FIRST_TIME), LAST_TIME))
    return moment.isoformat(timespec="milliseconds" if time_ms % SECOND else "seconds") + "Z"


def exact_time(time_ms: int) -> str:
    """The RFC 3339 time that `parse_time` reads back: with an offset where UTC leads out of the years 1 to 9999."""
    zone, minutes = ("+23:59", 1439) if time_ms < FIRST_TIME else ("-23:59", -1439) if time_ms > LAST_TIME else ("Z", 0)
    return iso_time(time_ms + minutes * 60 * SECOND)[:-1] + zone


def clock_ahead(latest: int, now: int) -> int:
    """By how many milliseconds a clock with this latest time is fast. All reports of a request are moved by it, so that
    durations stay right."""
    return latest - now if latest > now + MAX_SKEW else 0


def counted_at(occurred_at: int, received_at: int, ahead_ms: int) -> int:
    """When a report counts: at the device's time, less what its clock is fast; at receipt if that clock was never
    set."""
    return occurred_at - ahead_ms if EPOCH <= occurred_at - ahead_ms <= received_at + MAX_SKEW else received_at


COUNTED_AT = (f"case when occurred_at - clock_ahead_ms between {EPOCH} and received_at + {MAX_SKEW}"
              " then occurred_at - clock_ahead_ms else received_at end")  # in SQL


def first_seq(received_at: int) -> int:
    """The lowest seq of a millisecond."""
    return received_at << SEQ_BITS


def crash_id(seq: int) -> str:
    """The id of a crash as it is answered; the schema says the same."""
    return f"{seq:016x}"


def event_ids(seqs: Iterable[int]) -> list[str]:
    """The ids of events as they are answered; the schema says the same."""
    return [f"evt_{seq:016x}" for seq in seqs]


def new_key(is_test: bool) -> str:
    """A fresh API key: bf_live_ or bf_test_ and 32 hex digits."""
    return ("bf_test_" if is_test else "bf_live_") + secrets.token_hex(16)


def key_prefix(key: str) -> str:
    """What may be shown of a key: 8 of its 32 digits, or a third of a key that the operator chose."""
    return key[:16 if re.fullmatch("bf_(live|test)_[0-9a-f]{32}", key) else min(16, len(key) // 3)]


def sha256(data: bytes | str) -> bytes:
    """The digest under which keys and tokens are kept."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).digest()


_VERSION_PARTS = re.compile(  # numbers; what makes it a pre-release, -rc.1, b3 or " beta"; +48 says nothing; its build
    r"[vV]?([0-9]+(?:\.[0-9]+)*)(?:-([0-9A-Za-z.-]+)| ?([A-Za-z][0-9A-Za-z.-]*))?(?:\+[^ (]*)?(?: *\(([^()]+)\))?")


def version_key(version: str) -> tuple[Any, ...]:
    """What orders versions, and builds: 1.10 is after 1.9, 1.2 (10) after 1.2 (9), 1.2.0-rc.1 and 1.2.0b3 before 1.2.0,
    and 1.3 is 1.3.0. First is whether there are numbers to go by: without, it is below all others."""
    match = _VERSION_PARTS.fullmatch(version)
    if match is None:
        return False, [], False, _words(version), []
    numbers, further = list(map(int, match[1].split("."))), match[2] or match[3] or ""
    while numbers and not numbers[-1]:
        numbers.pop()
    return True, numbers, not further, _words(further), _words(match[4] or "")


def _words(text: str) -> list[tuple[int, int, str]]:
    return [(0, int(word), "") if word.isdecimal() else (1, 0, word)
            for word in re.findall("[0-9]+|[A-Za-z]+", text)]


# == Grouping ==================================================================
# What the frames of a stack trace say, and the group of a crash. A group is made of names, never of load addresses or
# lines, so that the same fault is one group on all phones and in the next build.

SYSTEM_BASE = 0x180000000  # Apple's own libraries are loaded at this address or above, an app below it
MAX_NAME = 1000  # characters of a symbol that count
MAX_PATH = 1024  # Darwin's bound
MAX_IMAGES = 4  # of a crash, whose symbols may name its frames

# What a frame says, under our name and under those of KSCrash, PLCrashReporter and Sentry.
_FRAME_FIELDS = {
    "symbol": ("symbol", "symbol_name", "function"), "file": ("file", "filename"), "line": ("line", "lineno"),
    "binary": ("binary", "object_name", "image", "package"), "uuid": ("uuid", "image_uuid", "debug_id"),
    "offset": ("offset",), "address": ("address", "instruction_addr"),
    "image_base": ("image_base", "image_addr", "object_addr"), "path": ("path", "package")}
_PLAIN_FIELDS = {"frame", "symbol", "file", "line"}  # those of the API
_NEVER_OWN = re.compile(r"dyld|libobjc-trampolines\.dylib|libswift\w{0,40}\.dylib")  # though they are loaded below it
# A simulator has the system's own files below Xcode.app, too.
_OWN_PATH = re.compile(r"(?!/System/|/usr/|.*/(?:RuntimeRoot|Contents/Developer)/).*\.app(?:ex)?/", re.S)
_LOCATED = re.compile(r"(.*) \+ ([0-9]{1,18})")  # symbol or binary, and an offset into it
_NO_SYMBOL = re.compile("0x[0-9a-fA-F]+|[0-9a-fA-F]{8,16}|<redacted>|<unknown>|[?]+|_{0,2}mh_(?:execute|dylib)_header|")
_CALL_STACK_LINE = re.compile(r"(?:[0-9]{1,4}\s+(\S.{0,200}?)\s+)?0x[0-9a-fA-F]{1,16} (?!\+ )(.+)")  # callStackSymbols
_UUID_DIGITS = re.compile("([0-9A-F]{8})" + 3 * "([0-9A-F]{4})" + "([0-9A-F]{12})[0-9A-F]{0,8}")


class Frame(NamedTuple):
    """What a frame says, whatever an SDK calls its fields. "" and None: not given."""

    symbol: str = ""
    file: str = ""
    binary: str = ""
    uuid: str = ""              # of the build, as dwarfdump prints it
    offset: int | None = None   # from the beginning of the binary, in bytes
    is_own: bool | None = None  # whether it is the app's own code; None: nothing tells
    is_named: bool = True       # whether the symbol is to be trusted

    @property
    def title(self) -> str:
        """What people are shown."""
        return self.symbol or (f"{self.binary} + {self.offset}" if self.binary and self.offset is not None else "")

    @property
    def is_open(self) -> bool:
        """Whether symbols of its build can name it."""
        return bool(self.uuid and self.offset is not None and self.is_own is not False and not self.is_named)

    @property
    def label(self) -> str:
        """What stands for it in a group: its name, or its build and offset."""
        if self.is_named and self.symbol or self.offset is None:
            return canonical_name(self.symbol[:MAX_NAME]) or ("" if self.file else self.binary)
        return f"{self.uuid or self.binary}+{self.offset}"


def read_frame(given: Mapping[str, Any]) -> Frame:
    """What a frame says. A device's own symbol for a frame of a known build is not trusted: in a stripped binary it is
    the name of another function before it. `symbolicated` says that the name is from symbols."""
    if given.keys() <= _PLAIN_FIELDS:
        symbol, file = _string(given.get("symbol")), _string(given.get("file"))
        return _short_frame(symbol, file) if len(symbol) + len(file) < 200 else _frame_of(symbol, file)
    symbol, file, binary, path = (_string(_said(given, name)) for name in ("symbol", "file", "binary", "path"))
    address, base, offset = (_integer(_said(given, name)) for name in ("address", "image_base", "offset"))
    if address is not None and offset is None and base is not None:
        offset = address - base
    elif address is not None and base is None and offset is not None:
        base = address - offset
    is_own = given["in_app"] if type(given.get("in_app")) is bool else None
    uuid = image_uuid(_said(given, "uuid"))
    return _frame_of(symbol, file, binary.rpartition("/")[2], path, uuid, offset, base, is_own,
                  given.get("symbolicated") is True)


def _said(given: Mapping[str, Any], field: str) -> Any:
    return next((given[name] for name in _FRAME_FIELDS[field] if given.get(name) not in (None, "")), None)


def _frame_of(symbol: str, file: str, binary: str = "", path: str = "", uuid: str = "", offset: int | None = None,
           base: int | None = None, is_own: bool | None = None, is_symbolicated: bool = False) -> Frame:
    """A frame from what was said of it. What was not said is concluded."""
    if line := _CALL_STACK_LINE.fullmatch(symbol):
        binary, symbol = binary or line[1] or "", line[2]
    located = _LOCATED.fullmatch(symbol)
    if located and (located[1] == binary or _NO_SYMBOL.fullmatch(located[1]) or not binary and int(located[2]) > 4096
                    and re.fullmatch(r"[\w. -]+", located[1])):  # no function is as long as a binary
        symbol, binary = "", binary or located[1]
        offset = int(located[2]) if offset is None else offset
    if _NO_SYMBOL.fullmatch(symbol):
        symbol = ""
    if is_own is None:
        is_own = is_own_code(file, path, base, binary)
    is_named = bool(file or symbol and (is_symbolicated or not uuid or offset is None or not is_own))
    return Frame(symbol, file, binary, uuid, offset, is_own, is_named)


_short_frame = lru_cache(maxsize=4096)(_frame_of)


def is_own_code(file: str, path: str, base: int | None, binary: str) -> bool | None:
    """Whether code is the app's own, by its source file, its path, or where it was loaded. None: nothing tells."""
    if file or path.startswith("/"):
        return bool(file or _OWN_PATH.match(path[:MAX_PATH])) and not _NEVER_OWN.fullmatch(binary)
    return base < SYSTEM_BASE and not _NEVER_OWN.fullmatch(binary) if base else None


def _string(value: Any) -> str:
    return value if type(value) is str else ""


def _integer(value: Any) -> int | None:
    """A number, also one as text, such as 0x1a2b."""
    if type(value) is str and re.fullmatch("0x[0-9a-fA-F]{1,16}|[0-9]{1,18}", value):
        return int(value, 16 if value.startswith("0x") else 10)
    return value if type(value) is int and 0 <= value < 1 << 64 else None


def image_uuid(value: Any) -> str:
    """The UUID of a build in upper case with dashes; "" for anything else."""
    digits = _UUID_DIGITS.fullmatch(_string(value).replace("-", "")[:40].upper())  # a debug_id has a number behind it
    return "-".join(digits.groups()) if digits and digits[0].strip("0") else ""  # some write zeros for none


_PREFIX_WORDS = re.compile(
    r"(?:@objc |@nonobjc |specialized |merged |dynamic |implicit |partial apply (?:forwarder )?for "
    r"|\$defer #[0-9]+ (?:\(\) )?in |(?:implicit )?(?:auto)?closure #[0-9]+ (?:[(@<].{0,200}? )?in "
    r"|\([0-9]+\) (?:suspend|await) resume partial function for "
    r"|(?:generic|function signature) specialization <[^<>]*(?:<[^<>]*>[^<>]*)*> of )+")
_BLOCK = re.compile(r"(?:__[0-9]+(?=[-+]\[)|__(?=.*_block_invoke))?(.*?)_block_invoke(?:_[0-9]+)?")
_SUFFIX = re.compile(
    r"(?: \+ [0-9]+| \([^()]*:[0-9]+\)| \(\.[\w.]+\)| \[clone [^]]*\]| (?:at )?0x[0-9a-fA-F]+|\.(?:cold|resume)"
    r"|T[YQ][0-9]+_|(?:\.(?:cold|llvm|resume|part|constprop|isra))?\.[0-9]+)+")
# Every program has these, or the compiler made them: they do not tell where a fault is.
_NOT_COUNTED = re.compile(
    r"(?:_?main|start|_?dyld_start|static .*\$main\(\)(?: -> \(\))?|\$s.*5\$mainyyFZ|<compiler-generated>"
    r"|__debug_main_executable_dylib_entry_point|protocol witness for .*|outlined .*|.* thunk"
    r"|(?:(?:reabstraction|dispatch|non-virtual|virtual) )?thunk (?:for|to|of|helper from) .*)")
# Every abort runs through these.
_OF_ABORTS = re.compile(
    r"_*(?:pthread_kill|kill|raise|abort|abort_message|assert_rtn|exceptionPreprocess|objc_exception_throw"
    r"|objc_terminate|cxa_throw|cxa_rethrow|demangling_terminate_handler|assertionFailure|fatalErrorMessage"
    r"|preconditionFailure)\b.*|_?swift_.*|Swift\._?(?:assertionFailure|fatalErrorMessage|preconditionFailure)\b.*"
    r"|(?:Swift runtime failure: .*)|[-+]\[NSException .*|std::(?:__)?terminate.*")


@lru_cache(maxsize=2048)
def canonical_name(symbol: str) -> str:
    """A symbol without what the compiler and the tools add to it, and what differs from build to build."""
    name = _PREFIX_WORDS.sub("", symbol, 1) if _PREFIX_WORDS.match(symbol) else symbol
    ends = (end.start() for end in _SUFFIX.finditer(name) if end.start() and end.end() == len(name))
    name = name[:next(ends, None)]
    block = _BLOCK.fullmatch(name)
    return block[1] if block else name


@lru_cache(maxsize=2048)
def _counts(label: str) -> bool:
    return not _NOT_COUNTED.fullmatch(label)


def _tells(label: str) -> bool:
    return _counts(label) and not _OF_ABORTS.fullmatch(label)


# Which frames make the group: those that meet the first rule that any of them meets.
_GROUP_RULES: Sequence[Callable[[Frame], object]] = (
    lambda frame: frame.is_own and _counts(frame.label),
    lambda frame: frame.symbol and _tells(frame.label),
    lambda frame: frame.label and _tells(frame.label),
    lambda frame: frame.is_own or frame.symbol,
    lambda frame: frame.label)


def group_hash(exception_type: str, frames: Iterable[Mapping[str, Any]]) -> str:
    """The group of a crash: its exception type, and the names of the first three frames of the app's own code. System
    frames stand in only where there is none. A frame without a name is its build and offset."""
    return group_of(exception_type, map(read_frame, frames))


def group_of(exception_type: str, frames: Iterable[Frame]) -> str:
    """Like group_hash, for frames that were read. Takes no more of them than it needs: mostly the first few."""
    names: list[str] = []
    for rule, candidates in zip(_GROUP_RULES, tee(frames, len(_GROUP_RULES))):
        labels = groupby(frame.label for frame in candidates if rule(frame))  # equal neighbours are one
        if names := [label for label, _ in islice(labels, 3)]:
            break
    return hashlib.sha256(":".join([exception_type, *names]).encode()).hexdigest()[:16]


def open_images(frames: Iterable[Frame]) -> str | None:
    """The builds whose symbols can name frames of the app's own code, up to MAX_IMAGES, divided by spaces."""
    uuids = dict.fromkeys(frame.uuid for frame in frames if frame.is_open)
    return " ".join(list(uuids)[:MAX_IMAGES]) or None


# == Payloads ==================================================================
# JSON in, a crash or an event out, or a Refusal; the code below trusts what comes from here. A report is a namedtuple
# whose fields are its columns. A developer sees at once that a required field is missing or wrong. What only some
# phones send must not cost a report, so other fields are converted, cut, or kept as they came, in `extra`.

EVENT_TYPES = ("session_start", "session_end", "error", "custom")
MAX_BATCH = 100  # events
MAX_TEXT = 500  # characters of versions, models, types, names, ids, locale
MAX_DEPTH = 64  # of nested JSON: far above any SDK's, far below Python's recursion limit
MAX_NUMBER = (1 << 63) - 1
MAX_STORED, MAX_STORED_BATCHED = 256_000, 32_000  # bytes of text that a report may take, and an event of a batch
MAX_NAMES = 256  # of `properties`, and of unknown fields
FIRST_FRAMES, LAST_FRAMES = 384, 128  # of a longer stack trace
FRAME_FIELDS = 32  # of each frame, where a report is cut

JsonObject = dict[str, Any]
Converters = Mapping[str, Callable[[Any], Any]]  # by field: what is stored for a value; ValueError for a wrong kind


def decode_json(body: bytes) -> JsonObject:
    """The JSON object in a body. Raises Refusal unless it is one, in UTF-8, with finite numbers. A NUL or a lone
    surrogate, which SQLite does not store, becomes U+FFFD: one bad character must not cost a report."""
    try:
        value = _DECODER.decode(_storable(body.decode()).removeprefix("\ufeff"))  # a byte order mark
    except RecursionError:
        raise Refusal("invalid JSON", detail="it is nested too deep") from None
    except UnicodeDecodeError:
        raise Refusal("invalid JSON", detail="it is not UTF-8") from None
    except ValueError as error:
        raise Refusal("invalid JSON", detail=str(error)[:100]) from None
    if type(value) is not dict:
        raise Refusal("invalid JSON", detail=f"the body is {_kind(value)}, not an object")
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is out of range")
    return number


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":"))
# What _ENCODER makes anew for each value: kept, it takes half the time.
_C_ENCODER = json.encoder.c_make_encoder and json.encoder.c_make_encoder(  # type: ignore[attr-defined]
    None, _ENCODER.default, json.encoder.encode_basestring, None, ":", ",", False, False, False)
_BRACKET_VALUES, _NO_BRACKETS = bytes.maketrans(b"{[]}", b"\2\2\0\0"), bytes(set(range(256)) - set(b"{[]}"))
_MAYBE_UNSTORABLE = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")  # a look that costs next to nothing
# An escape: a pair of surrogates, which is one character; a NUL or a surrogate alone; any other.
_ESCAPE = re.compile(r"\\(?:ud[89ab][0-9a-f]{2}\\ud[c-f][0-9a-f]{2}|(u0000|ud[89a-f][0-9a-f]{2})|.)", re.I | re.S)


def _encode(value: Any) -> str:
    """Compact JSON."""
    return "".join(_C_ENCODER(value, 0)) if _C_ENCODER else _ENCODER.encode(value)


def _storable(text: str) -> str:
    """JSON without what SQLite does not store, which UTF-8 and JSON allow only as escapes."""
    if not _MAYBE_UNSTORABLE.search(text):
        return text
    return _ESCAPE.sub(lambda match: r"\ufffd" if match[1] else match[0], text)


def _kind(value: Any) -> str:
    """What a value is called to a developer."""
    return {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}.get(
        type(value), "a number")


# Converters. Types are compared exactly, because isinstance would accept True as an int.

def _long_text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"is {_kind(value)}, not text")
    return value


def _required_text(value: Any) -> str:
    return _long_text(value)[:MAX_TEXT]


def _text(value: Any) -> str:
    return _required_text(str(value) if type(value) is int else value)


def _number(value: Any) -> int | float:
    if type(value) is str and re.fullmatch(r"-?[0-9]{1,18}(\.[0-9]{1,18})?", value):
        value = float(value) if "." in value else int(value)
    if type(value) not in (int, float) or abs(value) > MAX_NUMBER:
        raise ValueError
    return value  # type: ignore[no-any-return]


def _battery_level(value: Any) -> int | float:
    if not (0 <= (number := _number(value)) <= 1 or number == -1):
        raise ValueError
    return number


def _flag(value: Any) -> bool:
    if type(value) not in (bool, int) or value not in (0, 1):
        raise ValueError
    return bool(value)


def _event_type(value: Any) -> str:
    if type(value) is str and value not in EVENT_TYPES:
        raise Refusal("invalid event type", detail=f"it is not one of {', '.join(EVENT_TYPES)}")
    return _required_text(value)


def _object(value: Any) -> str:
    if type(value) is not dict:
        raise ValueError
    return _shallow_json(value)


def _frames(value: Any) -> str:
    if not _are_objects(value):
        raise ValueError
    return _shallow_json(value)


def _are_objects(value: Any) -> bool:
    return type(value) is list and {*map(type, value)} <= {dict}


def _shallow_json(value: Any) -> str:
    """Compact JSON. Raises ValueError or RecursionError if the value is nested too deep to be shown again."""
    text = _encode(value)
    if _is_deep(text):
        raise ValueError
    return text


def _is_deep(text: str, most: int = MAX_DEPTH) -> bool:
    """Whether JSON is nested more than so many levels deep. Counts brackets: to walk through the values would take ten
    times as long."""
    if len(text) <= 2 * most or text.count("{") + text.count("[") <= most:  # nearly always
        return False
    outside_strings = text.replace("\\\\", "").replace('\\"', "").split('"')[::2]
    brackets = "".join(outside_strings).encode().translate(_BRACKET_VALUES, _NO_BRACKETS)
    return max(map(sub, accumulate(brackets), range(1, len(brackets) + 1)), default=0) > most


Crash = namedtuple("Crash", "group_hash images exception_type exception_reason stack_trace app_version build_number"
                            " os_version device_model device_id_hash session_id locale free_memory_mb battery_level"
                            " is_charging occurred_at extra")
Crash.__doc__ = "A valid crash: the fields of the API, `images` as of open_images, `extra`, the unknown fields as JSON."
Event = namedtuple("Event", "type name properties app_version os_version device_model device_id_hash session_id locale"
                            " occurred_at extra")
Event.__doc__ = "A valid event: the fields of the API, and `extra`, the unknown ones as JSON."
Reports = Sequence[Union[Crash, Event]]

_CONVERTERS: Converters = {
    "exception_type": _required_text, "exception_reason": _long_text, "stack_trace": _frames, "type": _event_type,
    "properties": _object, "free_memory_mb": _number, "battery_level": _battery_level, "is_charging": _flag,
    "occurred_at": parse_occurred_at}
_CRASH_FIELDS: Converters = {name: _CONVERTERS.get(name, _text) for name in Crash._fields[2:-1]}
_EVENT_FIELDS: Converters = {name: _CONVERTERS.get(name, _text) for name in Event._fields[:-1]}
_REQUIRED = ("exception_type", "type", "occurred_at")


def parse_crash(given: JsonObject) -> Crash:
    """A crash from its JSON object. Raises Refusal."""
    trace: Any = given.get("stack_trace")
    frames = list(map(_plain_frame, _few(trace, more=1))) if _are_objects(trace) else []
    values = _convert({**given, "stack_trace": frames} if frames else given, _CRASH_FIELDS, MAX_STORED)
    read = list(map(read_frame, _few(frames)))
    return Crash(group_of(values[0], read), open_images(read), *values)


def own_names(frames: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Name and file of the first frames of a stack trace that are of the app itself."""
    own = islice((frame for frame in map(read_frame, frames) if frame.is_own), 20)
    return tuple(name for frame in own for name in (frame.title, frame.file))


@lru_cache(maxsize=128)
def _recent_own_names(stack_trace: str) -> tuple[str, ...]:  # of alike crashes, the traces are mostly the same
    return own_names(json.loads(stack_trace or "[]"))


def _plain_frame(frame: JsonObject) -> JsonObject:
    """A frame with symbol and file as text, and numbers that are whole numbers where they can be."""
    changes: JsonObject = {}
    for name in ("symbol", "file"):
        if type(value := frame.get(name)) is not str and value is not None:
            changes[name] = _encode(value)
    for name in ("frame", "line"):
        if type(value := frame.get(name)) is not int and value is not None:
            with suppress(ValueError):
                changes[name] = int(number) if (number := _number(value)) == int(number) else value
    return {**frame, **changes} if changes else frame


def parse_event(given: Any, limit: int = MAX_STORED) -> Event:
    """An event from its JSON object, of which so many bytes are stored. Raises Refusal."""
    if type(given) is not dict:
        raise Refusal("invalid event", detail=f"it is {_kind(given)}, not an object")
    return Event(*_convert(given, _EVENT_FIELDS, limit))


def parse_batch(given: JsonObject) -> list[Event]:
    """1 to 100 events, all or none. Raises Refusal, with the index of the first bad event. Unknown fields beside
    `events` are kept with the first event, as `batch`: a copy in each would let a small request write much."""
    events = given.get("events")
    if events in (None, "", []):
        raise Refusal("missing events")
    if type(events) is not list:
        raise Refusal("invalid events", detail=f"events is {_kind(events)}, not a list")
    if len(events) > MAX_BATCH:
        raise Refusal(f"too many events: at most {MAX_BATCH}")
    if len(given) > 1 and type(events[0]) is dict:
        unused = "batch"
        while unused in events[0]:
            unused += "_"
        events[0][unused] = {name: value for name, value in given.items() if name != "events"}
    try:
        return _alike_events(events)
    except (Refusal, ValueError, TypeError, AttributeError, RecursionError):  # one is bad, or not as most are
        parsed: list[Event] = []
    try:
        for event in events:
            parsed.append(parse_event(event, MAX_STORED_BATCHED))
    except Refusal as refusal:
        raise Refusal(f"{refusal} at index {len(parsed)}", detail=refusal.detail) from None
    return parsed


def _alike_events(events: list[JsonObject]) -> list[Event]:
    """The same as `parse_event` of each, in half the time: each distinct text is converted once, because most are the
    same from event to event. Raises an error unless all are plain."""
    columns: list[Iterable[Any]] = []
    for name, convert in _EVENT_FIELDS.items():
        values = list(map(dict.get, events, repeat(name)))
        if convert is _object:  # not hashable
            columns.append([None if value is None else _short_json(value) for value in values])
            continue
        stored = {value: convert(value) if value else None for value in set(values)}
        if {*map(type, stored)} - {str, type(None)} or name in _REQUIRED and None in stored.values():
            raise ValueError
        columns.append(map(stored.__getitem__, values))
    known = _EVENT_FIELDS.keys()
    extras: list[str | None] = [None] * len(events)
    if not known >= {*chain.from_iterable(events)}:
        extras = [None if known >= event.keys() else _short_json(
            {name: event[name] for name in event if name not in known}) for event in events]
    return list(map(partial(tuple.__new__, Event), zip(*columns, extras)))  # as Event._make, in less time


def _short_json(value: Any) -> str:
    """Compact JSON of an object. Raises ValueError if too many names or bytes may be in it."""
    if type(value) is not dict or len(text := _encode(value)) > 1000 or _is_deep(text):
        raise ValueError
    return text


def _convert(given: JsonObject, converters: Converters, limit: int) -> list[Any]:
    """What is stored for each field, None for an absent one; then the unknown fields, as JSON. What would take more
    than `limit` bytes is cut."""
    values: JsonObject = {**dict.fromkeys(converters), "extra": None}
    unknown, size = JsonObject(), 0
    for name, value in given.items():
        convert = converters.get(name)
        if convert is _text and type(value) is str:  # nearly all are
            values[name] = value[:MAX_TEXT] or None
        elif convert is None:
            unknown[name] = value
        elif value is not None and value != "":
            try:
                values[name] = converted = convert(value)
                size += len(converted) if type(converted) is str else 0
            except (ValueError, RecursionError) as error:
                if name in _REQUIRED:
                    raise Refusal(f"invalid {name}", detail=f"{name} {error}") from None
                unknown[name] = value
    for name in _REQUIRED:
        if values.get(name, "") is None:
            raise Refusal(f"missing {name}")
    if unknown:
        unknown = {name: _shallow(value) for name, value in islice(unknown.items(), MAX_NAMES + 2)}  # few are kept
        values["extra"] = _encode(unknown)
        size += len(values["extra"])
    if size > 1000:  # too many names or frames take more
        long = {name: given[name] for name in ("exception_reason", "stack_trace", "properties") if values.get(name)}
        values.update(_cut({**long, "extra": unknown}, values, limit))
    return list(values.values())


def _shallow(value: Any) -> Any:
    """A value, or its JSON as text if it is nested too deep, or longer than a report may be."""
    if type(value) not in (dict, list):
        return value
    try:
        text = _encode(value)
    except RecursionError:
        raise Refusal("invalid JSON", detail="it is nested too deep") from None
    return text[:MAX_STORED] if len(text) > MAX_STORED or _is_deep(text, MAX_DEPTH - 1) else value


def _cut(long: JsonObject, values: JsonObject, limit: int) -> JsonObject:
    """The long values of a report as they are stored, if it would take more than `limit` bytes: of each the beginning.
    `truncated` says what was cut."""
    kept = {name: _few(value) for name, value in long.items()}
    size = sum(len(value.encode()) for value in values.values() if type(value) is str)
    if size <= limit and all(kept[name] is long[name] for name in long):
        return {}
    for each in long, kept:
        each["extra"] = {"truncated_" if name == "truncated" else name: value for name, value in each["extra"].items()}
    room = limit - 200 - sum(len(str(value).encode()) for name, value in values.items() if name not in long)
    kept = kept if _size(kept) <= room else _cut_fairly(kept, room)
    kept["extra"]["truncated"] = [name.replace("extra", "unknown fields") for name in long if kept[name] != long[name]]
    return {name: value if name == "exception_reason" else _encode(value) for name, value in kept.items()}


def _cut_fairly(kept: JsonObject, room: int) -> JsonObject:
    """The long values in that many bytes: no name, no text and no other value in them takes more than its share."""
    frames = [dict(islice(frame.items(), FRAME_FIELDS)) for frame in kept.get("stack_trace", [])]
    given = [*frames, kept.get("properties", {}), kept["extra"], {"": kept.get("exception_reason", "")}]
    tables = [{name: _shallow(value) for name, value in table.items()} for table in given]
    sizes = [_size(each) for table in tables for pair in table.items() for each in pair]
    share = _fair_share(sizes, room - len(sizes) - 3 * len(tables))  # without colons, commas and braces
    *frames, properties, extra, reason = (
        {_beginning(name, share): _beginning(value, share) for name, value in table.items()} for table in tables)
    cut = {"stack_trace": frames, "properties": properties, "extra": extra, "exception_reason": reason[""]}
    return {name: cut[name] for name in kept}


def _fair_share(sizes: list[int], room: int) -> int:
    """How much each may take at most, so that together they take no more than `room`."""
    for number, size in enumerate(sorted(sizes)):
        share = room // (len(sizes) - number)
        if size > share:
            return share
        room -= size
    return max(sizes)


def _beginning(value: Any, share: int) -> Any:
    """A value that takes at most so many bytes as JSON: itself, or the beginning of its text or of its JSON."""
    encoded = _encode(value)
    if len(encoded.encode()) <= share:
        return value
    text = (value if type(value) is str else encoded)[:share]
    while (size := _size(text)) > share:
        text = text[:len(text) * share // size]
    return text


def _few(value: Any, more: int = 0) -> Any:
    """Of too many frames the first and last, of too many names the first. One more frame than is kept tells `_cut` that
    some are missing."""
    if type(value) is list and len(value) > FIRST_FRAMES + LAST_FRAMES:
        return value[:FIRST_FRAMES] + value[-LAST_FRAMES - more:]
    if type(value) is dict and len(value.keys() - {"truncated"}) > MAX_NAMES:
        return dict(islice(value.items(), MAX_NAMES))
    return value


def _size(value: Any) -> int:
    return len(_encode(value).encode())


# == Apple formats =============================================================
# What Apple makes of a crash in, the crashes and events of Payloads out, by pure functions. The formats are told apart
# by their content. Each diagnostic becomes an object like those of our own clients, and is converted, cut and grouped
# like them. What could identify a phone or a person is left behind.

UNKNOWN_FORMAT = "unknown report format"
MACH_EXCEPTIONS = dict(enumerate((
    "EXC_BAD_ACCESS", "EXC_BAD_INSTRUCTION", "EXC_ARITHMETIC", "EXC_EMULATION", "EXC_SOFTWARE", "EXC_BREAKPOINT",
    "EXC_SYSCALL", "EXC_MACH_SYSCALL", "EXC_RPC_ALERT", "EXC_CRASH", "EXC_RESOURCE", "EXC_GUARD", "EXC_CORPSE_NOTIFY"
    ), start=1))
SIGNALS = dict(enumerate((
    "SIGQUIT", "SIGILL", "SIGTRAP", "SIGABRT", "SIGEMT", "SIGFPE", "SIGKILL", "SIGBUS", "SIGSEGV", "SIGSYS", "SIGPIPE",
    "SIGALRM", "SIGTERM"), start=3))  # Darwin's numbers
BUG_TYPES = {"298": "jetsam, memory of the whole system", "202": "CPU use", "206": "CPU use", **dict.fromkeys(
    ("222", "223", "228", "328"), "a hang"), "309": "a crash", "109": "a crash"}
EVENT_NAMES = {
    "hangDiagnostic": "Hang", "cpuExceptionDiagnostic": "CPU exception", "appLaunchDiagnostic": "Slow launch",
    "diskWriteExceptionDiagnostic": "Disk write exception"}
DURATIONS = ("hangDuration", "totalCPUTime", "writesCaused", "totalWritesCaused", "launchDuration")

# The name of a person and the folder of an installation, in a path, whose slashes JSON may escape.
_PRIVATE = re.compile(r"/(?:((?:Users|home)\\?/)(?:[^\s\\/\"']|\\u[0-9A-Fa-f]{4})+"
                      r"|[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12})")
_APPLE_TIME = re.compile(
    r"([0-9-]{10})[ T]([0-9:]{8})(?:(\.[0-9]{1,9})[0-9]*)? ?(Z|[+-][0-9]{2}:?[0-9]{2})?")
_OS_VERSION = re.compile(r"(?:[A-Za-z]+ ){0,4}([0-9]+(?:\.[0-9]+)*)(?: \([\w ]{1,30}\))*")
_KILL_CODE = re.compile(r"(?:\bcode[: ] ?|^[A-Z]{1,40} )(?:0x([0-9a-f]{1,16})|([0-9]{1,19}))\b", re.I)
_UNCAUGHT = re.compile(r"uncaught exception '([^'\n]{1,200})', reason: '(.*?)(?:'(?: \*\*\*|\n)|'?\Z)", re.S)
_FATAL = re.compile("Fatal error|Precondition failed|Assertion failed|BUG IN ")
_THREAD_STARTS = ("dyld", "libdyld.dylib", "libsystem_pthread.dylib")


def parse_diagnostics(body: bytes, now: int, device: str = "") -> list[Crash | Event]:
    """The crashes and events in what Apple made, in its order: a MetricKit payload of either shape, an .ips file, a
    .crash text. [] where MetricKit had nothing to tell. `now`, in milliseconds, is when it occurred if nothing says
    that, `device` the device_id_hash. Raises Refusal."""
    try:
        text = body.decode()
        text = _storable(_PRIVATE.sub(lambda match: f"/{match[1]}USER" if match[1] else "/UUID", text))
        reports = list(islice(_apple_reports(text.removeprefix("\ufeff")), MAX_BATCH + 1))
        if len(reports) > MAX_BATCH:
            raise Refusal(f"too many diagnostics: at most {MAX_BATCH}")
        device = device.replace("\x00", "\ufffd")  # which a header may have, but no database takes
        return [parse({**given, "occurred_at": given["occurred_at"] or iso_time(now), "device_id_hash": device})
                for parse, given in reports]
    except UnicodeDecodeError:
        raise Refusal(UNKNOWN_FORMAT, detail="it is not UTF-8") from None
    except RecursionError:  # in a field that is kept as it came
        raise Refusal(UNKNOWN_FORMAT, detail="it is nested too deep") from None


def parse_crash_body(body: bytes) -> Crash:
    """The crash in a body of POST /crashes. Raises Refusal, which says where Apple's own reports belong."""
    try:
        return parse_crash(decode_json(body))
    except Refusal as refusal:
        if str(refusal) not in ("invalid JSON", "missing exception_type") or not _is_apples(body):
            raise
        raise Refusal(str(refusal), detail="it is Apple's report: POST it to /api/v1/diagnostics as it is") from None


def _is_apples(body: bytes) -> bool:
    try:
        parse_diagnostics(body, now=0)
    except Refusal as refusal:
        return str(refusal) != UNKNOWN_FORMAT
    return True


AppleReport = tuple[Callable[[JsonObject], Union[Crash, Event]], JsonObject]  # how it is parsed, and what


def _apple_reports(text: str) -> Iterable[AppleReport]:
    try:
        objects, problem = [_decode_nested(text)], ""
    except ValueError as error:
        objects, problem = _objects_on_lines(text), str(error)[:100]
    if not all(type(each) is dict for each in objects):
        raise Refusal(UNKNOWN_FORMAT, detail=f"the body is {_kind(objects[0])}, not an object")
    bug_types = filter(re.compile("[0-9]{1,9}").fullmatch, (str(each.get("bug_type")) for each in objects))
    if (bug_type := next(bug_types, "")) and BUG_TYPES.get(bug_type) != "a crash":
        what = BUG_TYPES.get(bug_type, "it")
        raise Refusal(f"unsupported bug_type {bug_type}", detail=f"{what} is no crash of the app")
    names_of_a_body = {"threads", "exception"} if bug_type else {"usedImages", "termination"}  # others have threads
    body = next((each for each in objects if each.keys() & names_of_a_body), None)
    if body is None and problem and re.search("^Exception Type:", text, re.M):
        body = _crash_as_ips(text)
    if body is not None:
        return [(parse_crash, _ips_crash(objects[0] if objects else {}, body))]
    if problem or bug_type:
        raise Refusal(UNKNOWN_FORMAT, detail="an .ips file whose body cannot be read" if bug_type else problem)
    return _metrickit_reports(objects[0])


def _objects_on_lines(text: str) -> list[JsonObject]:
    """The objects that begin a line: head and body of an .ips file, whatever stands around them; also where `curl -d`
    has joined the lines. Each try may read the whole text, so there are few, and only fast ones."""
    found, at = [], 0
    for _ in range(4):
        if match := re.compile(r"(?:^|(?<=\}))\{", re.M).search(text, at):
            at = match.end()
            with suppress(ValueError, RecursionError):
                value, at = _DECODER.raw_decode(text, match.start())
                found.append(value)
    return found


# A string that does not end is taken whole, too: to look for its end at each quote in it would take hours.
_NESTING = re.compile(r'"subFrames"\s*:\s*\[|"[^"\\]*(?:\\.[^"\\]*)*"?|[][]|NaN', re.S)


def _decode_nested(text: str) -> Any:
    """The JSON value that a text is, with `subFrames` nested as deep as they are: two levels for each frame of a call
    stack. Where Python reads no deeper, each list of them is decoded on its own, and stands as NaN, which JSON does not
    have, in the text around it. Raises ValueError or RecursionError."""
    with suppress(RecursionError):
        return _DECODER.decode(text)
    texts: list[list[str]] = [[]]  # of the whole, and of each list of frames that is open
    lists: list[list[Any]] = [[]]  # of frames, in each of these
    are_frames, at = list[bool](), 0  # of each open list; how much of `text` is in `texts`
    for token in _NESTING.finditer(text):
        if token[0] == "NaN":
            raise ValueError("a number is out of range")
        if token[0][-1] == "[":
            are_frames.append(token[0] != "[")
            if len(are_frames) - len(texts) > MAX_DEPTH:
                raise ValueError("it is nested too deep")
            if are_frames[-1]:
                texts[-1].append(text[at:token.end() - 1] + "NaN")
                texts.append([])
                lists.append([])
                at = token.end() - 1
        elif token[0] == "]" and are_frames and are_frames.pop():
            decoded = _decode_around(lists.pop(), "".join([*texts.pop(), text[at:token.end()]]))
            lists[-1].append(decoded)
            at = token.end()
    return _decode_around(lists[-1], "".join([*texts[-1], text[at:]]))


def _decode_around(lists: list[Any], text: str) -> Any:
    """The JSON value that a text is, whose NaN are these lists, one after the other."""
    left = iter(lists)
    decoder = json.JSONDecoder(
        parse_float=_finite, parse_constant=lambda word: next(left) if word == "NaN" else _finite(word))
    try:
        return decoder.decode(text)
    except json.JSONDecodeError as error:  # its place is not that in the body
        raise ValueError(f"{error.msg} in a deep call stack") from None


# Members of a kind, whatever was sent.

def _member(given: Any, name: str, kind: Callable[[], Any]) -> Any:
    """A member of an object if it is of this kind, else the empty value of the kind."""
    value = given.get(name)
    return value if type(value) is kind else kind()


def _objects(given: JsonObject, name: str) -> list[JsonObject]:
    return [item for item in _member(given, name, list) if type(item) is dict]


def _plain_members(given: JsonObject) -> JsonObject:
    return {name: value for name, value in given.items() if type(value) in (str, int) and value != ""}


def _whole(given: JsonObject, name: str) -> int | None:
    value = given.get(name)
    return value if type(value) is int and 0 <= value <= MAX_NUMBER else None


def _apple_time(*values: Any) -> Any:
    """The first of these that is a time, as `parse_occurred_at` takes it; None if there is none."""
    for value in values:
        if type(value) is str and (match := _APPLE_TIME.fullmatch(value)):
            value = f"{match[1]}T{match[2]}{match[3] or ''}{match[4] or 'Z'}"
        with suppress(ValueError):
            parse_occurred_at(value)
            return value
    return None


def _os_version(value: Any) -> Any:
    """"17.0" of "iPhone OS 17.0 (21A329)"."""
    if type(value) is dict:
        return value.get("number")
    match = _OS_VERSION.fullmatch(value[:MAX_TEXT]) if type(value) is str else None
    return match[1] if match else value


def _exception_type(name: str, kill_code: str, mach: str, signal: str) -> str:
    return name or kill_code or (signal if mach in ("", "EXC_CRASH") and signal else mach) or "Unknown"


def _kill_code(*values: Any) -> str:
    """Why the system ended the app, such as 0x8badf00d, from a code or from texts that may name one. Lower numbers are
    signals; higher ones differ from crash to crash."""
    numbers = [value for value in values if type(value) is int]
    numbers += [int(digits or decimal, 16 if digits else 10) for value in values if type(value) is str
                for digits, decimal in _KILL_CODE.findall(value)]
    return next((f"{number:#x}" for number in numbers if 0xFFFF < number <= 0xFFFFFFFF), "")


def _apple_frame(number: int, binary: str, uuid: str, offset: int | None, is_own: bool | None,
                 given: JsonObject) -> JsonObject:
    """A frame of ours. `given` is that of an .ips file, which may have more to say."""
    file, line = _member(given, "sourceFile", str).rpartition("/")[2], _whole(given, "sourceLine")
    if file == "<compiler-generated>":
        file, line = "", None
    symbol = _member(given, "symbol", str).replace("<redacted>", "")
    frame = {"frame": number, "symbol": symbol, "file": file, "line": line or None, "binary": binary[:MAX_TEXT],
             "uuid": uuid, "offset": offset, "inlined": given.get("inline") is True or None, "in_app": is_own,
             "symbolicated": bool(is_own and symbol and not file) or None}  # what a device names may be wrong
    return {name: value for name, value in frame.items() if value is not None and value != ""}


# MetricKit.

def _metrickit_reports(payload: JsonObject) -> Iterator[AppleReport]:
    kinds = [name for name in payload if re.search(r"\wDiagnostics?\Z", name)]
    if not kinds and not payload.keys() & {"timeStampBegin", "timeStampEnd", "timeRange"}:
        raise Refusal(UNKNOWN_FORMAT, detail="the object is neither a MetricKit payload nor an .ips file")
    span, environment = _member(payload, "timeRange", dict), _member(payload, "environment", dict)
    time_given = _apple_time(
        payload.get("timeStampEnd"), payload.get("timeStampBegin"), span.get("end"), span.get("begin"))
    for kind in kinds:
        value = payload[kind]
        for item in value if type(value) is list else [] if value is None else [value]:
            if type(item) is not dict:
                raise Refusal(UNKNOWN_FORMAT, detail=f"{kind[:50]} has {_kind(item)} where an object belongs")
            if report := _metrickit_report(kind[:-1] if kind[-1] == "s" else kind, item, environment):
                yield report[0], {**report[1], "occurred_at": time_given}
                if _size(environment) > MAX_STORED_BATCHED:  # a copy in each would let a small request write much
                    environment = {}


def _metrickit_report(kind: str, item: JsonObject, environment: JsonObject) -> AppleReport | None:
    """A crash, or an event for what kills nobody; None for an unknown kind without a call stack. What has no column is
    kept under Apple's names."""
    meta = {**environment, **item, **_member(item, "diagnosticMetaData", dict)}
    for name in ("callStackTree", "diagnosticMetaData", "version"):
        meta.pop(name, None)
    given = {ours: meta.pop(apples, None) or meta.pop(apples.replace("app", "application"), None) for ours, apples in (
        ("app_version", "appVersion"), ("build_number", "appBuildVersion"), ("device_model", "deviceType"))}
    given["os_version"] = _os_version(meta.pop("osVersion", None))
    is_crash = kind in ("crashDiagnostic", "memoryExceptionDiagnostic")
    trace = _metrickit_trace(_member(item, "callStackTree", dict), is_crash)
    if is_crash:
        return parse_crash, {**meta, **given, **_metrickit_exception(kind, meta), "stack_trace": trace}
    if not trace and kind not in EVENT_NAMES:
        return None
    duration = next((name for name in DURATIONS if meta.get(name)), "")
    known = {"duration": meta.pop(duration, None), "build_number": given.pop("build_number"), "stack_trace": trace}
    words = re.sub("(?<=[a-z0-9])([A-Z])", r" \1", kind[:-len("Diagnostic")][:MAX_TEXT])  # gpuHang: "Gpu hang"
    return parse_event, {**given, "type": "error", "name": EVENT_NAMES.get(kind, words.capitalize()), "properties": {
        **meta, **{name: value for name, value in known.items() if value not in (None, "", [])}}}


def _metrickit_exception(kind: str, meta: JsonObject) -> JsonObject:
    thrown, ended = _member(meta, "objectiveCexceptionReason", dict), _member(meta, "terminationReason", str)
    names = [number if type(number) is str else numbers.get(number, "") if type(number) is int else ""
             for number, numbers in ((meta.get("exceptionType"), MACH_EXCEPTIONS), (meta.get("signal"), SIGNALS))]
    name = _member(thrown, "exceptionName", str) or _member(thrown, "className", str)
    exception_type = _exception_type(name, _kill_code(ended), *names)
    if exception_type == "Unknown" and kind == "memoryExceptionDiagnostic":
        exception_type = "Memory exception"
    return {"exception_type": exception_type, "exception_reason": _member(thrown, "composedMessage", str) or ended}


def _metrickit_trace(tree: JsonObject, is_crash: bool) -> list[JsonObject]:
    """The frames of the thread in question, flat, the innermost first. Of a tree of samples, it is the path that most
    of them took, which may begin where the thread did."""
    stacks = _objects(tree, "callStacks") or _objects(tree, "callStackThreads")
    stack = next((each for each in stacks if each.get("threadAttributed") is True), stacks[0] if stacks else {})
    frames, path = _objects(stack, "callStackRootFrames") or _objects(stack, "rootFrames"), []
    while frames:
        path.append(max(frames, key=lambda frame: _whole(frame, "sampleCount") or 0))
        frames = _objects(path[-1], "subFrames")
    names = {image_uuid(each.get("uuid")): _member(each, "name", str) for each in _objects(tree, "binaryInfo")}
    from_start = [_binary(frame, names) in _THREAD_STARTS for frame in path]
    if not is_crash and from_start[:1] == [True] and not from_start[-1]:
        path.reverse()
    return [_metrickit_frame(number, frame, _binary(frame, names)) for number, frame in _few([*enumerate(path)], 1)]


def _binary(frame: JsonObject, names: Mapping[str, str]) -> str:
    return _member(frame, "binaryName", str) or names.get(image_uuid(frame.get("binaryUUID")) or "none", "")


def _metrickit_frame(number: int, given: JsonObject, binary: str) -> JsonObject:
    """MetricKit gives no paths: what was loaded below the system's libraries is the app's own. iOS 14 and 15 and macOS
    12 say where the binary was loaded in place of the offset."""
    offset, address = _whole(given, "offsetIntoBinaryTextSegment"), _whole(given, "address")
    base = None if address is None or address < (offset or 0) else address - (offset or 0)
    if offset is not None and offset >= 1 << 32:
        base, offset = offset, base
    is_own = is_own_code("", "", base, binary)
    return _apple_frame(number, binary, image_uuid(given.get("binaryUUID")), offset, is_own, {})


# .ips and .crash files.

def _ips_crash(header: JsonObject, body: JsonObject) -> JsonObject:
    """The crash in an .ips file. Only the fields that are named here are taken over."""
    exception, ended, bundle = (_member(body, name, dict) for name in ("exception", "termination", "bundleInfo"))
    notes = [note for notes in _member(body, "asi", dict).values() if type(notes) is list
             for note in notes if type(note) is str]
    why_ended = [text for name in ("reasons", "details") for text in _member(ended, name, list) if type(text) is str]
    thrown = next(filter(None, map(_UNCAUGHT.search, notes)), None)
    reasons = [thrown and thrown[2], next(filter(_FATAL.search, notes), ""), _member(exception, "subtype", str),
               " ".join(why_ended), _member(ended, "indicator", str), *notes[:1]]
    termination = _plain_members({name: ended.get(name) for name in ("namespace", "code", "indicator")})
    return {
        **_plain_members({
            "process": body.get("procName") or header.get("app_name"), "platformArchitecture": body.get("cpuType"),
            "bundleIdentifier": bundle.get("CFBundleIdentifier") or header.get("bundleID"),
            "exceptionCodes": exception.get("codes"), "exceptionSubtype": exception.get("subtype")}),
        **({"termination": termination} if termination else {}),
        "exception_type": _exception_type(
            thrown[1] if thrown else "", _kill_code(ended.get("code"), *why_ended), _member(exception, "type", str),
            _member(exception, "signal", str)),
        "exception_reason": next(filter(None, reasons), None), "stack_trace": _ips_trace(body),
        "app_version": bundle.get("CFBundleShortVersionString") or header.get("app_version"),
        "build_number": bundle.get("CFBundleVersion") or header.get("build_version"),
        "os_version": _os_version(_member(body, "osVersion", dict).get("train") or header.get("os_version")),
        "device_model": body.get("modelCode"),
        "occurred_at": _apple_time(body.get("captureTime"), header.get("timestamp"))}


def _ips_trace(body: JsonObject) -> list[JsonObject]:
    """The frames of the exception, else of the thread that crashed."""
    thread = _object_at(body, "threads", _whole(body, "faultingThread")) or next(
        (each for each in _objects(body, "threads") if each.get("triggered") is True), {})
    frames = _objects(body, "lastExceptionBacktrace") or _objects(thread, "frames")
    main_path = _member(body, "procPath", str)[:MAX_PATH]
    return [_ips_frame(number, given, _object_at(body, "usedImages", _whole(given, "imageIndex")), main_path)
            for number, given in _few([*enumerate(frames)], 1)]


def _object_at(given: JsonObject, name: str, index: int | None) -> JsonObject:
    items = _member(given, name, list)
    return items[index] if index is not None and index < len(items) and type(items[index]) is dict else {}


def _ips_frame(number: int, given: JsonObject, image: JsonObject, main_path: str) -> JsonObject:
    path, uuid = _member(image, "path", str)[:MAX_PATH], image_uuid(image.get("uuid"))
    binary = (_member(image, "name", str) or path.rpartition("/")[2]).replace("???", "")
    offset = _whole(given, "imageOffset") if binary or uuid else None  # else it is an address
    is_own = True if path and path == main_path else is_own_code("", path, None, binary)
    return _apple_frame(number, binary, uuid, offset, is_own, given)


_CRASH_HEAD = re.compile(r"^([A-Z][\w /]{1,40}):(.*)", re.M)
_CRASH_TYPE = re.compile(r"(\w+)(?: \((\w+)\))?")
_CRASH_END = re.compile(r"(?:Namespace )?(\w+),? (?:Code )?(?:0x([0-9a-f]{1,16})|([0-9]{1,19}))\b[, ]*(.*)", re.I)
_CRASH_THREAD = re.compile(r"^(?:Last Exception Backtrace:|Thread [0-9]{1,9} Crashed:).*\n", re.M)
_CRASH_FRAME = re.compile(r"^[0-9]{1,9}[ \t](.*?)0x([0-9a-f]{1,16})\b(.*)", re.M | re.I)
_CRASH_PLACE = re.compile(  # Cart.total() + 112 (Cart.swift:12)
    r"(?!0x)(.*?)(?: \+ [0-9]+)?(?: \[inlined\])?(?: \(([^():]{1,200}):([0-9]{1,9})\))?(?: \[inlined\])?")
_CRASH_IMAGE = re.compile(
    r"^[ \t]*0x([0-9a-f]{1,16})[ \t]*-[ \t]*0x([0-9a-f]{1,16})[ \t][^<\n]*<([0-9a-f-]+)>(.*)", re.M | re.I)


def _crash_as_ips(text: str) -> JsonObject:
    """The text of a .crash file as the body of an .ips file."""
    text = text.replace("\x00", "\ufffd").replace("\r\n", "\n")
    head = defaultdict(str, {name: value.strip() for name, value in reversed(_CRASH_HEAD.findall(text))})  # the first
    kind, ended = _CRASH_TYPE.match(head["Exception Type"]), _CRASH_END.match(head["Termination Reason"])
    version, _, build = head["Version"].replace("???", "").partition("(")
    explained = re.search("^<RBSTerminateContext.*", text, re.M)
    return {
        "exception": {"type": kind and kind[1], "signal": kind and kind[2], "codes": head["Exception Codes"],
                      "subtype": head["Exception Subtype"]},
        "termination": {"details": [head["Termination Description"] or (explained and explained[0])], **({
            "namespace": ended[1], "code": int(ended[2], 16) if ended[2] else int(ended[3]), "indicator": ended[4]}
            if ended else {})},
        "asi": {"": [_section(text, re.search("^Application Specific Information:.*\n", text, re.M))]},
        "bundleInfo": {"CFBundleShortVersionString": version.strip(), "CFBundleVersion": build.rstrip(") "),
                       "CFBundleIdentifier": head["Identifier"]},
        "procName": head["Process"].partition(" [")[0], "procPath": head["Path"],
        "cpuType": head["Code Type"].partition(" (")[0], "osVersion": {"train": head["OS Version"]},
        "modelCode": head["Hardware Model"], "captureTime": head["Date/Time"], **_crash_stack(text)}


def _section(text: str, title: re.Match[str] | None) -> str:
    """What stands below a title, up to an empty line."""
    return re.split(r"\n[ \t]*\n", text[title.end():], maxsplit=1)[0] if title else ""


def _crash_stack(text: str) -> JsonObject:
    """Frames and images as an .ips file has them. A frame's address tells its image."""
    found = {int(start, 16): (int(end, 16), {"path": path.strip(), "uuid": uuid})
             for start, end, uuid, path in _CRASH_IMAGE.findall(text)}
    found.pop(0, None)  # no image, though every address lies in it
    section = _section(text, _CRASH_THREAD.search(text))
    lines = _CRASH_FRAME.findall(section)
    if section[:1] == "(":  # an exception without symbols has its addresses in one line
        lines = [("", digits, "") for digits in re.findall(r"0x([0-9a-f]{1,16})\b", section)]
    starts, frames, images = sorted(found), list[JsonObject](), list[JsonObject]()
    for binary, digits, place in lines[:2000]:  # Apple's tools write 512
        address, match = int(digits, 16), _CRASH_PLACE.fullmatch(place.strip())
        start = starts[bisect_right(starts, address) - 1] if starts else 0
        end, image = found.get(start, (0, {}))
        is_known = start <= address <= end
        images.append({**(image if is_known else {}), "name": binary.strip()})
        symbol, file, line = match.groups() if match else (None, None, None)
        frames.append({"imageIndex": len(frames), "imageOffset": address - start if is_known else None,
                       "symbol": symbol, "sourceFile": file, "sourceLine": int(line) if line else None,
                       "inline": "[inlined]" in place})
    return {"usedImages": images, "lastExceptionBacktrace": frames}


# == Signature =================================================================
# HMAC-SHA256 over a timestamp and the raw body. The key travels with the request, so this hides nothing: it proves that
# the body was not changed, and that it was signed just now.

SIGNATURE_WINDOW = 300 * SECOND  # both ways


def sign(key: bytes, timestamp: bytes, body: bytes) -> str:
    """The X-Backfeedr-Signature for an X-Backfeedr-Timestamp and a raw body."""
    payload = timestamp + b"." + hashlib.sha256(body).hexdigest().encode()
    return "sha256=" + hmac.new(key, payload, hashlib.sha256).hexdigest()


def verify(key: bytes, timestamp: bytes, signature: bytes, body: bytes, now: int) -> None:
    """Raises Refusal unless the signature is right and, at `now` in milliseconds, fresh."""
    try:
        signed_at = parse_time(timestamp.decode("latin-1"))
    except ValueError:
        raise Refusal("invalid timestamp") from None
    # As bytes, because compare_digest accepts no text beyond ASCII.
    if not hmac.compare_digest(sign(key, timestamp, body).encode(), signature):
        raise Refusal("invalid signature")
    if abs(now - signed_at) > SIGNATURE_WINDOW:
        raise Refusal("stale timestamp")


# == RateLimiter ===============================================================
# The times of each key's last requests. A counter per minute would be smaller, but would allow twice the limit around
# the full minute. At most `limit` numbers are kept for a key, and only existing keys get here.

class RateLimiter:
    """Allows `limit` requests of a key in any `window` of seconds; 0 allows all. Thread-safe. `clock` gives seconds and
    never runs backwards."""

    waits = False  # True where `allow` asks another host; requests are then not checked one after the other

    def __init__(self, limit: int, window: float = 60.0, clock: Callable[[], float] = time.monotonic):
        self.limit, self.window, self._clock = limit, window, clock
        self._times: dict[bytes, deque[float]] = defaultdict(deque)
        self._lock = threading.Lock()

    def allow(self, key: bytes) -> bool:
        """Whether the key may go on. A refused request does not count."""
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

    def retry_after(self, key: bytes) -> int:
        """Whole seconds, at least 1, until `allow` says yes again."""
        with self._lock:
            times = self._times[key]
            return max(1, math.ceil(times[0] + self.window - self._clock())) if times else 1


# == Symbols ===================================================================
# What the developer's tool has read from the symbols of a build: the function, file and line of each instruction,
# inlined ones too. They come in pages, so that a look-up reads one of them.

SYMBOL_TABLES = """
create table symbols (                     -- builds whose symbols are held, or on their way
    uuid text primary key, binary_name text not null, arch text not null,
    parts integer not null, received integer not null,  -- of its requests; 0 while they are being deleted
    size integer not null, rows integer not null,
    uploaded_at integer not null           -- when the latest of its parts came
) without rowid;
create table symbol_parts (                -- that have come, and what is stored of each
    uuid text not null, part integer not null, size integer not null, rows integer not null,
    primary key (uuid, part)) without rowid;
create table symbol_pages (
    uuid text not null, first integer not null,  -- its lowest offset
    part integer not null, page blob not null,   -- see encode_page
    primary key (uuid, first)) without rowid;
create table group_aliases (               -- where the crashes of a group have moved
    app_id integer not null, group_hash text not null, target text not null,
    primary key (app_id, group_hash)) without rowid;
create table regroupings (                 -- groups whose crashes may have to move
    app_id integer not null, group_hash text not null,
    received_at integer not null, seq integer not null, target text not null,  -- of the last one that was looked at
    primary key (app_id, group_hash)) without rowid;
"""
GROUPED_LOOKUPS = 20  # instructions that are looked up for the group of a crash: three names tell it
SHOWN_LOOKUPS = 1000  # and for an answer; a look-up takes 0.3 ms
CACHED_PAGES = 64  # of a transaction
INLINE_DEPTH = 100  # functions at one instruction: its own, and those that it is inlined in
MAX_PARTS = 4000  # requests that bring the symbols of a build
MAX_PAGE_ROWS = 2000  # all of which a look-up reads
MAX_OFFSET = 1 << 40  # of an instruction, in bytes
MAX_STEP = (1 << 31) - 1  # of an offset from row to row, and of a line


class SymbolPart(NamedTuple):
    """One of the requests that bring the symbols of a build."""

    binary: str
    arch: str
    part: int   # from 0 on
    parts: int
    rows: int
    size: int   # bytes of its pages
    pages: Sequence[tuple[int, bytes]]  # lowest offset, and the page as it is stored


def parse_symbols(body: bytes) -> SymbolPart:
    """A part of a build's symbols from a body of PUT /symbols. Checked completely, so that a look-up may trust what is
    stored. Raises Refusal, whose detail says what is wrong where."""
    given = decode_json(body)
    for name in ("binary", "arch"):
        _require(_is_text(given.get(name), MAX_TEXT) and given[name],
                 f"{name} is not text of 1 to {MAX_TEXT} characters")
    _require(_are_within([given.get("parts")], 1, MAX_PARTS), f"parts is not from 1 to {MAX_PARTS}")
    _require(_are_within([given.get("part")], 0, given["parts"] - 1), "part is not from 0 to parts - 1")
    _require(type(given.get("pages")) is list and given["pages"], "pages is not a list of at least one page")
    pages, after, total = [], -1, 0
    for number, page in enumerate(given["pages"]):
        _check_page(page, after, f"pages[{number}]: ")
        first, rows = page["first"], page["rows"]
        after = first + sum(rows[::2])
        total += len(rows) // 2
        pages.append((first, encode_page(page["strings"], page["frames"], rows)))
    size = sum(len(page) for _, page in pages)
    return SymbolPart(given["binary"], given["arch"], given["part"], given["parts"], total, size, pages)


def _require(is_so: Any, problem: str) -> None:
    if not is_so:
        raise Refusal("invalid symbols", detail=problem)


def _check_page(page: Any, after: int, place: str) -> None:
    """Raises Refusal unless it is a page, as `encode_page` takes it, whose rows begin behind the offset `after`."""
    _require(type(page) is dict, place + "it is not an object")
    for name in ("strings", "frames", "rows"):
        _require(type(page.get(name)) is list, f"{place}{name} is not a list")
    strings, frames, rows = page["strings"], page["frames"], page["rows"]
    _require(all(_is_text(each, MAX_NAME) for each in strings),
             f"{place}strings has other than text of {MAX_NAME} characters")
    _require(len(frames) % 4 == 0, place + "frames is not quadruples of name, file, line and parent")
    _require(len(rows) % 2 == 0, place + "rows is not pairs of delta and frame")
    _require(1 <= len(rows) // 2 <= MAX_PAGE_ROWS, f"{place}it has not 1 to {MAX_PAGE_ROWS} rows")
    for what, values, low, high in (
            ("first", [page.get("first")], after + 1, MAX_OFFSET),
            ("a name in frames", frames[0::4], 0, len(strings) - 1),
            ("a file in frames", frames[1::4], -1, len(strings) - 1),
            ("a line in frames", frames[2::4], 0, MAX_STEP),
            ("a parent in frames", frames[3::4], -1, len(frames) // 4 - 1),
            ("the first delta in rows", rows[:1], 0, 0),
            ("a later delta in rows", rows[2::2], 1, MAX_STEP),
            ("a frame in rows", rows[1::2], -1, len(frames) // 4 - 1)):
        _require(_are_within(values, low, high), f"{place}{what} is not from {low} to {high}")
    _require(all(map(lt, frames[3::4], range(len(frames)))), place + "a parent in frames stands behind its child")
    _require(page["first"] + sum(rows[::2]) <= MAX_OFFSET, f"{place}rows has an offset above {MAX_OFFSET}")


def _is_text(value: Any, length: int) -> bool:
    return type(value) is str and len(value) <= length


def _are_within(values: Sequence[Any], low: int, high: int) -> bool:
    """Whether all are integers within these. By type first: True is an int."""
    return not values or {*map(type, values)} == {int} and low <= min(values) and max(values) <= high


def encode_page(strings: Sequence[str], frames: Sequence[int], rows: Sequence[int]) -> bytes:
    """A page as it is stored. `rows` are pairs: how far a row begins behind the one before it, and the index of its
    frame, -1 for none. `frames` are quadruples: indexes of name and file in `strings`, -1 for no file; the line, 0 for
    none; and the index of the frame that it is inlined in, -1 for none. Numbers are stored as they are in memory,
    because a look-up in JSON takes three times as long."""
    numbers = struct.pack(f"<2I{len(frames)}i{len(rows)}i", len(frames), len(rows), *frames, *rows)
    return zlib.compress(numbers + _encode(strings).encode())


class Symbols:
    """The symbols that are held, as a transaction sees them."""

    def __init__(self, db: Any):
        self._db = db
        self._held: dict[str, bool] = {}
        self._found: dict[tuple[str, int], list[tuple[str, str, int]]] = {}

    @cached_property
    def _page(self) -> Callable[[str, int], _Page]:
        # Of the connection, not of `self`: a cycle would keep the pages until the collector runs.
        return lru_cache(maxsize=CACHED_PAGES)(partial(_decoded_page, self._db))

    @property
    def lookups(self) -> int:
        """How many instructions were looked up."""
        return len(self._found)

    def is_held(self, uuid: str) -> bool:
        """Whether all symbols of a build are here."""
        if uuid not in self._held:
            self._held[uuid] = self._db.execute(
                "select 1 from symbols where uuid = ? and received = parts", (uuid,)).fetchone() is not None
        return self._held[uuid]

    def can_name(self, images: str | None) -> bool:
        """Whether the symbols of one of these builds are held."""
        return any(map(self.is_held, (images or "").split()))

    def lookup(self, uuid: str, offset: int) -> list[tuple[str, str, int]]:
        """Name, file and line of an instruction: first the innermost inlined function. "" and 0 are not known."""
        if (uuid, offset) not in self._found:
            first, = self._db.execute("select max(first) from symbol_pages where uuid = ? and first <= ?", (
                uuid, min(offset, MAX_OFFSET))).fetchone() if self.is_held(uuid) else (None,)
            self._found[uuid, offset] = [] if first is None else self._page(uuid, first).find(offset)
        return self._found[uuid, offset]

    def named(self, frames: Iterable[JsonObject], lookups: int = GROUPED_LOOKUPS) -> Iterator[JsonObject]:
        """The frames with the names, files and lines that the symbols give; an inlined one stands before the one that
        it is in. Where nothing is known, or after so many look-ups, a frame is as it was."""
        most, is_return = self.lookups + lookups, 0
        for frame in frames:
            read, found = read_frame(frame), list[tuple[str, str, int]]()
            if read.uuid and read.offset is not None and not read.file and self.is_held(read.uuid):
                key = read.uuid, max(0, read.offset - is_return)
                found = self.lookup(*key) if key in self._found or self.lookups < most else []
            if not found:
                yield frame
            for left, (symbol, file, line) in enumerate(found, 1 - len(found)):
                yield {"in_app": True, **frame, "symbol": symbol, "file": file or None, "line": line or None,
                       "symbolicated": True, **({"inlined": True} if left else {})}
            is_return = is_return or int(frame.get("inlined") is not True)  # all but the innermost are return addresses

    def group(self, crash: Crash) -> Crash:
        """The crash, in the group that its names give."""
        if not self.can_name(crash.images):
            return crash
        frames = self.named(json.loads(crash.stack_trace))
        return crash._replace(group_hash=group_of(crash.exception_type, map(read_frame, frames)))


class _Page(NamedTuple):
    """What `encode_page` has encoded."""

    begins: Sequence[int]  # offsets of its rows
    rows: Sequence[int]    # the frame of each
    frames: Sequence[int]
    strings: Sequence[str]

    def find(self, offset: int) -> list[tuple[str, str, int]]:
        """As Symbols.lookup."""
        frame, found = self.rows[bisect_right(self.begins, offset) - 1], list[tuple[str, str, int]]()
        while frame >= 0 and len(found) < INLINE_DEPTH:
            name, file, line, frame = self.frames[4 * frame:4 * frame + 4]
            found.append((self.strings[name], self.strings[file] if file >= 0 else "", line))
        return found


def _decoded_page(db: Any, uuid: str, first: int) -> _Page:
    page, = db.execute("select page from symbol_pages where uuid = ? and first = ?", (uuid, first)).fetchone()
    plain = zlib.decompress(page)
    sizes = struct.unpack_from("<2I", plain)
    numbers = struct.unpack_from(f"<{sum(sizes)}i", plain, 8)
    rows = numbers[sizes[0]:]
    return _Page(list(accumulate(rows[::2], initial=first))[1:], rows[1::2], numbers[:sizes[0]],
                 json.loads(plain[8 + 4 * sum(sizes):]))


# == Triage ====================================================================
# What somebody has decided about a group, how a crash undoes that, and the facts worth telling. All of it is written in
# the transaction of the crash.

TRIAGE_TABLES = """
create table triage (                      -- groups that somebody has decided about; outlives their crashes
    app_id integer not null, group_hash text not null,
    state text not null,                   -- 'open', 'resolved' or 'muted'
    changed_at integer not null, fixed_in text,  -- a version, perhaps with its build: 1.3.0 (48)
    until integer, crashes_left integer, devices_left integer,  -- what a mute lasts for; null: is no condition
    regressed_at integer, primary key (app_id, group_hash)) without rowid;
create table group_history (
    app_id integer not null, group_hash text not null, entry integer not null,  -- 1, 2, 3
    at integer not null, what text not null, detail text, primary key (app_id, group_hash, entry)) without rowid;
create table facts (                       -- to be told to channels, the oldest first; detail is JSON
    id integer primary key autoincrement, app_id integer not null, at integer not null, kind text not null,
    group_hash text, detail text not null);
create table channels (
    id integer primary key autoincrement, url text not null, secret text not null,
    app_id integer,                        -- null: all live apps
    kinds text not null,                   -- of facts, divided by commas
    with_reason integer not null default 0, digest_at integer,  -- when the next digest is due
    created_at integer not null, last_fact integer not null,  -- up to which facts are in messages
    ended_at integer, error text, error_at integer, sent_at integer);
create table messages (                    -- waiting, and those of the last hour; id is the webhook-id
    id text primary key, channel_id integer not null, created_at integer not null, body text not null,  -- JSON
    tries integer not null default 0, taken_until integer not null default 0,  -- nobody else sends it before
    due_at integer                         -- null: it was sent, or given up
) without rowid;
create index messages_by_time on messages (channel_id, created_at);
"""
FACT_KINDS = {  # and whether a channel that does not choose is told of it
    "crash.new": True, "crash.regressed": True, "crash.unmuted": True, "crash.spread": False,
    "release.worse": False, "digest": False}
STATES = {"open": "opened", "resolved": "resolved", "muted": "muted"}  # and what the history says of a change to it
CONDITIONS = {  # the state that each belongs to, its column, and what the history says of it
    "fixed_in": ("resolved", "fixed_in", "in {}"), "until": ("muted", "until", "until {}"),
    "more_crashes": ("muted", "crashes_left", "for {} more crashes"),
    "more_devices": ("muted", "devices_left", "for {} more devices")}
TRIAGE_FIELDS = ("state", *CONDITIONS, "comment")  # of a PATCH
MAX_HISTORY, MAX_COMMENT = 100, 5000  # entries of a group, the latest, and characters of one
SPREAD = (10, 100, 1000)  # devices of a group that are worth telling
Decision = namedtuple("Decision", "state changed_at fixed_in until crashes_left devices_left regressed_at",
                      defaults=(None, None, None, None, None))  # a row of triage


def parse_triage(given: JsonObject, now: int) -> JsonObject:
    """The fields of a PATCH of a group, with times in milliseconds. Raises Refusal, also for an unknown field: a typo
    must not silently do nothing."""
    if unknown := [name for name in given if name not in TRIAGE_FIELDS]:
        raise Refusal("invalid field", detail=f"{unknown[0][:MAX_TEXT]!r} is none of {', '.join(TRIAGE_FIELDS)}")
    if not given:
        raise Refusal("missing state", detail=f"there is none of {', '.join(TRIAGE_FIELDS)}")
    found = {}
    for name, value in given.items():
        try:
            found[name] = None if value is None and name in CONDITIONS else _triage_value(name, value, now)
        except ValueError as error:
            raise Refusal(f"invalid {name}", detail=f"{name} {error}") from None
    return found


def _triage_value(name: str, value: Any, now: int) -> Any:
    if name.startswith("more_"):
        if type(value) is not int or not 1 <= value < 1 << 31:
            raise ValueError(f"is not a whole number from 1 to {(1 << 31) - 1}")
        return value
    if name == "state" and value not in tuple(STATES):
        raise ValueError(f"is none of {', '.join(STATES)}")
    if type(value) is not str or not value.strip():
        raise ValueError("is no text")
    if name != "until":
        return value.strip()[:MAX_TEXT if name == "fixed_in" else MAX_COMMENT]
    at = parse_occurred_at(value)
    if at <= now:
        raise ValueError("is over")
    return at


def decide(db: Any, app_id: int, group_hash: str, changes: JsonObject, now: int) -> None:
    """Writes what parse_triage has read. Raises Refusal for a condition of another state than the group's."""
    before = after = _decision(db, app_id, group_hash) or Decision("open", now)
    state = changes.get("state", before.state)
    conditions = {name: changes[name] for name in CONDITIONS if name in changes}
    for name, value in conditions.items():
        if value is not None and CONDITIONS[name][0] != state:
            raise Refusal(f"invalid {name}", detail=f'it goes with "state": "{CONDITIONS[name][0]}"')
    if "state" in changes:
        after = Decision(state, now, regressed_at=None if state == "resolved" else after.regressed_at)
    if "state" in changes or conditions:
        after = after._replace(changed_at=now, **{CONDITIONS[name][1]: each for name, each in conditions.items()})
        if state != "open" or before.state != "open":
            texts = [CONDITIONS[name][2].format(iso_time(value) if name == "until" else value)
                     for name, value in conditions.items() if value is not None]
            _add_history(db, app_id, group_hash, now, STATES[state], " or ".join(texts) or None)
    _write_decision(db, app_id, group_hash, after)
    if "comment" in changes:
        _add_history(db, app_id, group_hash, now, "commented", changes["comment"])


def _decision(db: Any, app_id: int, group_hash: str) -> Decision | None:
    row = db.execute(f"select {', '.join(Decision._fields)} from triage where app_id = ? and group_hash = ?",
                     (app_id, group_hash)).fetchone()
    return Decision(*row) if row else None


def _write_decision(db: Any, app_id: int, group_hash: str, decision: Decision) -> None:
    db.execute("delete from triage where app_id = ? and group_hash = ?", (app_id, group_hash))
    write_rows(db, f"insert into triage (app_id, group_hash, {', '.join(Decision._fields)}) values *",
               [(app_id, group_hash, *decision)])


def _add_history(db: Any, app_id: int, group_hash: str, at: int, what: str, detail: str | None) -> None:
    """Adds an entry. Beyond MAX_HISTORY, the oldest one goes."""
    last, = db.execute("select coalesce(max(entry), 0) from group_history where app_id = ? and group_hash = ?",
                       (app_id, group_hash)).fetchone()
    write_rows(db, "insert into group_history values *", [(app_id, group_hash, last + 1, at, what, detail)])
    db.execute("delete from group_history where app_id = ? and group_hash = ? and entry <= ?",
               (app_id, group_hash, last + 1 - MAX_HISTORY))


def move_triage(db: Any, app_id: int, group_hash: str, target: str) -> None:
    """Moves state and history of a group to the one that has its crashes now. A state that is there already stays."""
    of_both, both = "app_id = ? and group_hash in (?, ?)", (app_id, group_hash, target)
    entries = db.execute(f"select at, what, detail from group_history where {of_both} order by at, group_hash, entry",
                         both).fetchall()[-MAX_HISTORY:]
    decision = _decision(db, app_id, target) or _decision(db, app_id, group_hash)
    for table in ("group_history", "triage"):
        db.execute(f"delete from {table} where {of_both}", both)
    write_rows(db, "insert into group_history values *",
               [(app_id, target, number, *entry) for number, entry in enumerate(entries, 1)])
    if decision:
        _write_decision(db, app_id, target, decision)


def with_build(version: str | None, build: str | None) -> str:
    """A version with its build: 1.3.0 (48). Either may be missing."""
    return " ".join(filter(None, (version, build and f"({build})")))


def _split_build(text: str) -> tuple[str, str]:
    """The version and the build of 1.3.0 (48)."""
    match = re.fullmatch(r"(.*[^ ]) *\(([^()]+)\)", text)
    return (match[1], match[2]) if match else (text, "")


def _has_reached(version: str, build: str, fixed_in: str) -> bool | None:
    """Whether a version and build is that of a fix, or a later one. None where they cannot be compared."""
    fixed_version, fixed_build = _split_build(fixed_in)
    ours, theirs = version_key(version), version_key(fixed_version)
    if version == fixed_version or ours[0] and ours == theirs:
        if fixed_build in ("", build):
            return True
        ours, theirs = version_key(build), version_key(fixed_build)
    return ours > theirs if ours[0] and theirs[0] else None


def _first_seen(db: Any, app_id: int, version: str, build: str) -> int | None:
    """When a version and build, or without a build the version, was first in any report here. Events name no build:
    they are taken for the first build of their version that a crash names."""
    builds = dict(db.execute("select build_number, first_seen from builds where app_id = ? and app_version = ?",
                             (app_id, version)).fetchall())
    first = min(filter(None, builds), key=builds.__getitem__, default="")
    return min(builds.values(), default=None) if build in ("", first) else builds.get(build)


def _regresses(db: Any, decision: Decision, crash: Any) -> bool:
    """Whether a crash shows that a resolved group is not fixed. Old builds that still crash do not."""
    app_id, build, since = crash.app_id, crash.build_number or "", decision.changed_at + 1
    if not crash.app_version:  # which says nothing, unless the app has no versions
        return crash.at >= since and not db.execute("select 1 from releases where app_id = ?", (app_id,)).fetchone()
    # As it was sent: in the figures it may be one of the others.
    version, = db.execute("select app_version from crashes where seq = ?", (crash.seq,)).fetchone()
    if decision.fixed_in:
        name, number = _split_build(version)
        if (reached := _has_reached(name, build or number, decision.fixed_in)) is not None:
            return reached
        since = _first_seen(db, app_id, *_split_build(decision.fixed_in)) or MAX_NUMBER
    seen = _first_seen(db, app_id, version, build)
    if seen is None:  # one of too many builds, or of too many versions
        seen, = db.execute("select coalesce(max(first_seen), 0) from releases where app_id = ? and app_version = ?",
                           (app_id, version)).fetchone()
    return bool(seen >= since)


def _undoing(db: Any, now: int, decision: Decision, crashes: Sequence[Any], devices: int) -> tuple[str, Any] | None:
    """What becomes of a group that is not open, `regressed` or `unmuted`, and the new crash that did it. `devices`
    counts those that are new to the group. None: it stays."""
    if decision.state == "resolved":
        first = {(each.app_version, each.build_number, each.at > decision.changed_at): each
                 for each in reversed(crashes)}
        return next((("regressed", each) for each in sorted(first.values()) if _regresses(db, decision, each)), None)
    if decision.until is not None and now > decision.until:
        return "unmuted", crashes[0]
    if decision.crashes_left is not None and decision.crashes_left <= len(crashes):
        return "unmuted", crashes[decision.crashes_left - 1]
    if decision.devices_left is not None and decision.devices_left <= devices:
        return "unmuted", crashes[-1]
    return None


def see_crashes(db: Any, now: int, rollups: RollUps, crashes: Sequence[Any], are_moved: bool = False) -> None:
    """Undoes the decisions that crashes just stored speak against, and notes the facts that they make. A test app has
    neither. Crashes that moved here from another group may be a regression, but are no news and end no mute."""
    groups: dict[tuple[int, str], list[Any]] = defaultdict(list)
    for crash in crashes:
        groups[crash.app_id, crash.group_hash].append(crash)
    fresh, accepted = rollups.figures[Groups].devices, rollups.names.accepted
    for app_id, group_hash, total, devices, exception_type, place, *triage in rows_of(db, f"""
            select column1, column2, crashes, devices, exception_type, coalesce(place, ''),
                {", ".join(Decision._fields)}
            from (values *) as keys
            cross join apps on apps.id = column1 and is_test = 0
            cross join groups on groups.app_id = column1 and groups.group_hash = column2
            left join triage on triage.app_id = column1 and triage.group_hash = column2
            where column3 > 0 or state <> 'open'""", [  # of the others, there is nothing to say
                (*key, int(fresh[key] > 0 or (key[0], "group_hash", key[1]) in accepted)) for key in groups]):
        decision, seen, new = Decision(*triage), groups[app_id, group_hash], fresh[app_id, group_hash]
        facts = []
        if decision.state == "resolved" or decision.state == "muted" and not are_moved:
            if not (undoing := _undoing(db, now, decision, seen, new)):
                if decision.crashes_left or decision.devices_left:
                    db.execute("""
                        update triage set crashes_left = crashes_left - ?, devices_left = devices_left - ?
                        where app_id = ? and group_hash = ?""", (len(seen), new, app_id, group_hash))
                continue
            _reopen(db, now, decision, *undoing)
            facts.append(undoing)
        elif not decision.state and (app_id, "group_hash", group_hash) in accepted:
            facts.append(("new", seen[0]))
        if group_hash != OTHER and not are_moved and any(devices - new < bound <= devices for bound in SPREAD):
            facts.append(("spread", seen[-1]))
        for what, crash in facts:
            note_fact(db, "crash." + what, app_id, now, group_hash, exception_type=exception_type, place=place,
                      app_version=crash.app_version, build_number=crash.build_number, crashes=total, devices=devices,
                      fixed_in=decision.fixed_in if what == "regressed" else None)


def _reopen(db: Any, now: int, decision: Decision, what: str, crash: Any) -> None:
    """Opens a group again, with the crash that did it in its history."""
    after = Decision("open", now, decision.fixed_in, regressed_at=now if what == "regressed" else decision.regressed_at)
    _write_decision(db, crash.app_id, crash.group_hash, after)
    version = f" in {with_build(crash.app_version, crash.build_number)}" if crash.app_version else ""
    _add_history(db, crash.app_id, crash.group_hash, now, what, f"crash {crash_id(crash.seq)}{version}")


def note_fact(db: Any, kind: str, app_id: int, at: int, group_hash: str | None, **detail: Any) -> None:
    """Writes a fact in the current transaction, if there is a channel to tell."""
    db.execute("""
        insert into facts (app_id, at, kind, group_hash, detail) select ?, ?, ?, ?, ?
        where exists (select 1 from channels where ended_at is null)
        """, (app_id, at, kind, group_hash, _encode(detail)))


# == Figures ===================================================================
# What the server counts. A figure is a class: its tables, how reports count in it, and the questions it answers.
# Reports count by 1 when they are stored and by -1 when a device is forgotten, in the transaction that changes their
# rows, so a sum always equals a count over the rows. When reports expire, sums that last stay as they are; all else
# describes what is kept. `check` counts everything again.

ALL_DAYS = -1_000_000  # the `day` of a label's sum over all days
WEEK = 7               # days of the overview, ending today
DURATION_DAYS = 400    # days that durations are kept: a year, and some
DEVICE_DAYS = 400      # a report that occurred more days before its receipt counts no device
HOURS_KEPT = 48        # hours for which the devices last seen in each are kept
NAME_DAYS = KEY_DAYS = 90
HEALTH_DAYS = 90       # of a release's age in which it is compared with the one before it
TRIMMED = 1000         # rows that one step of `trim` deletes from a table
MAX_RELEASES, MAX_BUILDS_OF_APP = 1000, 2000
MAX_ANSWER = 60_000    # bytes of JSON that the rows of a public answer may take: all of it stays below 64 kB

OTHER = "(other)"      # stands for names beyond these limits, which hold for an app and a UTC day
NEW_NAMES = {"group_hash": 500, "exception_type": 200, "device_model": 200, "app_version": 100, "name": 200}
FLAGS = {"exception_type": 1, "device_model": 2, "app_version": 4, "name": 8}  # bits of `other`: it counts as (other)

# Of the app that is asked for, or of all live ones.
APPS = "app_id in (select id from apps where id = :app or :app is null and is_test = 0)"

Row = tuple[Any, ...]  # of a row, or all of it
TABLES: dict[type, str] = {Crash: "crashes", Event: "events"}
COUNTED: dict[type, Any] = {  # a report as the figures see it; `at` is the time at which it counts
    Crash: namedtuple("CountedCrash", "seq app_id received_at at sent_type app_version build_number device_id_hash"
                                      " session_id group_hash images exception_type device_model exception_reason"
                                      " stack_trace"),
    Event: namedtuple("CountedEvent", "seq app_id received_at at type app_version device_id_hash session_id name")}


def counted_rows(db: Any, kind: type, source: str, parameters: Any = ()) -> list[Any]:
    """The counted reports of stored ones; `source` is all of a query that follows its columns."""
    columns = {"at": COUNTED_AT, "sent_type": "exception_type", "stack_trace": "null", **{
        name: f"case when (other & {flag}) > 0 then '{OTHER}' else {name} end" for name, flag in FLAGS.items()}}
    query = f"select {', '.join(columns.get(name, name) for name in COUNTED[kind]._fields)} {source}"
    rows = rows_of(db, query, parameters) if "values *" in query else db.execute(query, parameters)
    return list(map(COUNTED[kind]._make, rows))


def counted(kind: type, app_id: int, seqs: Sequence[int], received: Sequence[int], ahead: Sequence[int],
            flags: Sequence[int], reports: Reports) -> list[Any]:
    """The counted reports of reports that are about to be stored."""
    types = list(map(attrgetter("exception_type" if kind is Crash else "type"), reports))  # as they were sent
    if any(flags):
        reports = [report._replace(**{name: OTHER for name, flag in FLAGS.items() if flag & given})
                   for report, given in zip(reports, flags)]
    clocks = list(zip(map(attrgetter("occurred_at"), reports), received, ahead))
    at = {each: counted_at(*each) for each in set(clocks)}  # a batch has few different ones
    columns = [map(attrgetter(name), reports) for name in COUNTED[kind]._fields[5:]]
    make = partial(tuple.__new__, COUNTED[kind])  # as _make, in a third of the time
    return list(map(make, zip(seqs, repeat(app_id), received, map(at.__getitem__, clocks), types, *columns)))


class Sums:
    """A table of sums: its key beside app_id, and its columns of sums. `window` is for how many days, or hours, its
    rows are kept by their `day` or `hour`; 0: for ever. `lasts` is whether its sums stay as they are when reports
    expire."""

    def __init__(self, key: str, columns: str, window: int = 0, lasts: bool = True):
        self.key, self.columns, self.window, self.lasts = key.split(), columns.split(), window, lasts

    def schema(self, table: str) -> str:
        """The statement that makes the table."""
        numbers = {"day", "hour", "seconds", *self.columns}
        columns = [f"{name} {'integer' if name in numbers else 'text'} not null" for name in self.key + self.columns]
        return (f"create table {table} (app_id integer not null, {', '.join(columns)},\n"
                f"    primary key (app_id, {', '.join(self.key)})) without rowid;\n")


def per_day(db: Any, app: int | None, days: range, table: str, *columns: str) -> dict[str, list[int]]:
    """Sums of a table with a row a day, as a list for each column."""
    rows = {day: row for day, *row in db.execute(f"""
        select day, {", ".join(f"sum({column})" for column in columns)} from {table}
        where {APPS} and day between :first and :last
        group by day""", {"app": app, "first": days[0], "last": days[-1]})}
    empty = [0] * len(columns)
    return {column: [rows.get(day, empty)[n] for day in days] for n, column in enumerate(columns)}


class Figure:
    """One figure in one transaction."""

    TABLES = ""  # what describes the reports that are kept
    SUMS: Mapping[str, Sums] = {}
    COUNTS: tuple[type, ...] = (Crash,)  # the kinds of reports that count in it

    def __init__(self, rollups: RollUps):
        self._db, self._now, self._add = rollups.db, rollups.now, rollups.add

    def count(self, kind: type, reports: Sequence[Any], by: int) -> None:
        """Counts reports whose rows are about to be inserted (by 1), or have just been deleted (by -1)."""

    def expire(self, kind: type, reports: Sequence[Any]) -> None:
        """Takes out reports whose rows have expired; sums that last do not change meanwhile."""
        self.count(kind, reports, -1)

    def save(self) -> None:
        """Writes what has changed but the sums, which are written afterwards."""


class Entities:
    """Rows of a table of which a transaction learns more: they are read, merged and written together. `kind` is a
    named tuple of the columns beside the key, and has `merged`."""

    def __init__(self, table: str, kind: Any):
        self._table, self._kind = table, kind
        self.seen: dict[Row, Any] = {}

    def see(self, key: Row, row: Any) -> None:
        """Adds what is known of a row."""
        self.seen[key] = self.seen[key].merged(row) if key in self.seen else row

    def stored(self, db: Any, keys: Iterable[Row]) -> dict[Row, Any]:
        """The rows with these keys."""
        names = KEYS[self._table]
        return {row[:len(names)]: self._kind(*row[len(names):]) for row in rows_of(db, f"""
            select {self._table}.* from (values *) as keys
            cross join {self._table} on {" and ".join(f"{name} = column{n}" for n, name in enumerate(names, 1))}
            """, list(keys))}

    def save(self, db: Any) -> list[tuple[Row, Any, Any]]:
        """Writes what is new. Returns each key with its row before, None for none, and after."""
        stored = self.stored(db, self.seen)
        rows = [(key, stored.get(key), stored[key].merged(row) if key in stored else row)
                for key, row in self.seen.items()]
        upsert(db, self._table, [(*key, *after) for key, before, after in rows if after != before],
               ", ".join(f"{column} = excluded.{column}" for column in self._kind._fields))
        return rows


class NewNames:
    """Decides which names count by themselves: anyone who has a key can invent names without end."""

    TABLES = """
create table new_names (                   -- of an app and a UTC day
    app_id integer not null, day integer not null, field text not null, names integer not null,
    primary key (app_id, day, field)) without rowid;
"""
    FIELDS: dict[type, Row] = {Crash: ("group_hash", "exception_type", "device_model", "app_version"),
                               Event: ("app_version", "name")}

    def __init__(self, db: Any):
        self._db = db
        self.accepted: set[tuple[int, str, str]] = set()  # app_id, field, name; new in this transaction

    def limit(self, app_id: int, received: Sequence[int], reports: Sequence[Any]) -> tuple[Sequence[int], Reports]:
        """The `other` of each report, and the reports with the group under which they are stored."""
        fields = self.FIELDS[type(reports[0])]
        days: dict[tuple[int, str, str], int] = {}  # on which each name was first received
        for column in fields:
            # With types of events, because the names of the ends of sessions are not counted.
            kinds = map(attrgetter("type"), reports) if column == "name" else repeat("")
            for name, kind, came in dict.fromkeys(zip(map(attrgetter(column), reports), kinds, received)):
                if name and kind not in _ENDS:
                    days.setdefault((app_id, column, name), came // DAY)
        refused = self._refused(days)
        if not refused:
            return [0] * len(reports), reports
        others = [[field for field in fields if (app_id, field, getattr(report, field)) in refused]
                  for report in reports]
        return [sum(FLAGS.get(field, 0) for field in each) for each in others], [
            report._replace(group_hash=OTHER) if "group_hash" in each else report
            for report, each in zip(reports, others)]

    def _refused(self, days: Mapping[tuple[int, str, str], int]) -> set[tuple[int, str, str]]:
        """Of names, those that are new and beyond the limit of their day."""
        unknown = set(rows_of(self._db, f"""
            select column1, column2, column3 from (values *) as keys
            where not case column2
                when 'group_hash' then exists (
                    select 1 from groups where app_id = column1 and group_hash = column3)
                when 'app_version' then exists (
                    select 1 from builds where app_id = column1 and app_version = column3)
                when 'name' then exists (select 1 from event_names where app_id = column1 and name = column3)
                else exists (select 1 from labels
                    where app_id = column1 and field = column2 and day = {ALL_DAYS} and label = column3) end
            """, list(days.keys() - self.accepted)))
        if not unknown:
            return unknown
        fresh: dict[tuple[int, int, str], list[tuple[int, str, str]]] = defaultdict(list)  # in the order they came
        for key, day in days.items():
            if key in unknown:
                fresh[key[0], day, key[1]].append(key)
        used = {row[:3]: row[3] for row in rows_of(self._db, """
            select new_names.* from (values *) as keys
            cross join new_names on app_id = column1 and day = column2 and field = column3""", list(fresh))}
        rows = []
        for (app_id, day, each), names in fresh.items():
            room = NEW_NAMES[each] - used.get((app_id, day, each), 0)
            if each == "app_version":
                known, = self._db.execute("select count(distinct app_version) from builds where app_id = ?",
                                          (app_id,)).fetchone()
                room = min(room, MAX_RELEASES - known)
            accepted = names[:max(0, room)]
            rows.append((app_id, day, each, len(accepted)))
            self.accepted.update(accepted)
        upsert(self._db, "new_names", [row for row in rows if row[-1]], "names = new_names.names + excluded.names")
        return unknown - self.accepted


class Requests(Figure):
    """Requests per key and UTC day. No report tells of them: a commit counts them."""

    SUMS = {"key_days": Sums("day key", "requests", KEY_DAYS)}  # `key`: see key_name
    COUNTS = ()


class Crashes(Figure):
    """Crashes per UTC day; and of those that are kept, exception types and device models, per day and ALL_DAYS."""

    SUMS = {"crash_days": Sums("day", "crashes"), "labels": Sums("field day label", "crashes", lasts=False)}

    def count(self, kind: type, reports: Sequence[Any], by: int) -> None:
        days = [(crash.app_id, crash.at // DAY) for crash in reports]
        for (app_id, day), crashes in Counter(days).items():
            self._add("crash_days", app_id, day, crashes=by * crashes)
        for column in ("exception_type", "device_model"):
            for ((app_id, day), label), crashes in Counter(zip(days, map(attrgetter(column), reports))).items():
                for each in (ALL_DAYS, day) if label else ():
                    self._add("labels", app_id, column, each, label, crashes=by * crashes)

    @staticmethod
    def per_day(db: Any, app: int | None, days: range) -> JsonObject:
        """Crashes of these days."""
        return {"data": per_day(db, app, days, "crash_days", "crashes")["crashes"]}

    @staticmethod
    def most_frequent(db: Any, app: int | None, field: str, days: range | None,
                      limit: int) -> JsonObject:
        """The most frequent labels of these days, or of all that is kept, with their crashes."""
        shown = days or range(ALL_DAYS, ALL_DAYS + 1)
        return labelled(db.execute(f"""
            select label, sum(crashes) from labels
            where {APPS} and field = :field and day between :first and :last
            group by label
            order by sum(crashes) desc, label
            limit :limit""", {"app": app, "field": field, "first": shown[0], "last": shown[-1], "limit": limit}))


class Groups(Figure):
    """What a group is called, its crashes and devices, and its crashes per UTC day of the week. It goes with the last
    crash that is kept, but not before its week is over."""

    TABLES = """
create table groups (
    app_id integer not null, group_hash text not null,
    exception_type text not null,
    first_seen integer not null, first_version text,      -- of its first crash, by the time at which crashes count
    last_seen integer not null, exception_reason text,    -- of its latest; the beginning of the reason
    place text, search text,                              -- where in the app it was; in lower case what a search finds
    crashes integer not null default 0, devices integer not null default 0,  -- of the crashes that are kept
    came_at integer not null default 0,                   -- when its first crash was received: until when it is new
    primary key (app_id, group_hash)) without rowid;
"""
    SUMS = {"group_days": Sums("day group_hash", "crashes", WEEK),
            "group_images": Sums("group_hash uuid", "crashes", lasts=False)}  # builds whose symbols can name crashes

    def __init__(self, rollups: RollUps):
        super().__init__(rollups)
        self._symbols = rollups.symbols
        self._came: dict[Row, list[Any]] = defaultdict(list)  # crashes by app_id and group_hash
        self._left: dict[Row, list[Any]] = defaultdict(list)
        self.devices: Counter[Row] = Counter()  # that are new to a group, or that it has no longer

    def count(self, kind: type, reports: Sequence[Any], by: int) -> None:
        for crash in reports:
            (self._came if by > 0 else self._left)[crash.app_id, crash.group_hash].append(crash)
        alike = Counter((crash.app_id, crash.group_hash, crash.at // DAY, crash.images) for crash in reports)
        for (app_id, group, day, images), crashes in alike.items():
            self._add("group_days", app_id, day, group, crashes=by * crashes)
            for uuid in (images or "").split():
                self._add("group_images", app_id, group, uuid, crashes=by * crashes)
        # The rows of these crashes are not there yet, or no longer.
        for app_id, group in rows_of(self._db, """
                select column1, column2 from (values *) as keys where not exists (
                    select 1 from crashes
                    where app_id = column1 and group_hash = column2 and device_id_hash = column3)
                """, [each for each in set(map(_GROUP_DEVICE, reports)) if each[2]]):
            self.devices[app_id, group] += by

    def save(self) -> None:
        is_later = "case when excluded.last_seen >= groups.last_seen then excluded"
        upsert(self._db, "groups", [self._row(*each) for each in self._came.items()], f"""
            first_seen = min(groups.first_seen, excluded.first_seen),
            first_version = case when excluded.first_seen < groups.first_seen
                then excluded.first_version else groups.first_version end,
            last_seen = max(groups.last_seen, excluded.last_seen),
            exception_reason = {is_later}.exception_reason else groups.exception_reason end,
            place = {is_later}.place else groups.place end, search = {is_later}.search else groups.search end,
            crashes = groups.crashes + excluded.crashes, devices = groups.devices + excluded.devices,
            came_at = min(groups.came_at, excluded.came_at)""")
        for key, crashes in self._left.items():  # what is left of a group is shown as its latest crash
            self._db.execute("""
                update groups set crashes = crashes - ?, devices = devices + ? where app_id = ? and group_hash = ?
                """, (len(crashes), 0 if key in self._came else self.devices[key], *key))
            if self._db.execute("select 1 from groups where app_id = ? and group_hash = ? and last_seen <= ?",
                                (*key, max(crash.at for crash in crashes))).fetchone():
                self.show_latest(*key)

    def _row(self, key: Row, crashes: Sequence[Any]) -> tuple[Any, ...]:
        first, latest = min(crashes, key=_AT), max(crashes, key=_AT)
        return (*key, OTHER if key[1] == OTHER else latest.sent_type, first.at, first.app_version, latest.at,
                *self._shown(key[1], latest), len(crashes), self.devices[key], min(map(_RECEIVED_AT, crashes)))

    def drop_empty(self, limit: int = 0) -> int:
        """Deletes the groups that crashes were taken out of, and so many others, where no crash is kept and their week
        is over. Returns how many others."""
        empty = """crashes <= 0 and not exists (
            select 1 from group_days
            where app_id = groups.app_id and day >= :week and group_hash = groups.group_hash)"""
        week = self._now // DAY - WEEK
        self._db.executemany(f"delete from groups where app_id = :app and group_hash = :group and {empty}", [
            {"app": app_id, "group": group_hash, "week": week} for app_id, group_hash in self._left])
        return self._db.execute(f"""
            delete from groups where (app_id, group_hash) in (
                select app_id, group_hash from groups
                where app_id in (select id from apps) and last_seen < :before and {empty} limit :limit)
            """, {"before": week * DAY, "week": week, "limit": limit}).rowcount if limit else 0

    def _shown(self, group_hash: str, crash: Any) -> tuple[str | None, str, str]:
        """Reason, place and search text of a group whose latest crash this is."""
        reason, trace = (crash.exception_reason or "")[:MAX_TEXT] or None, crash.stack_trace or ""
        if len(trace) < 20_000 and not self._symbols.can_name(crash.images):
            names = _recent_own_names(trace)
        else:
            names = own_names(self._symbols.named(json.loads(trace or "[]")))
        words = "\n".join([crash.sent_type, reason or "", group_hash, *names])
        return reason, "".join(names[:1])[:200], words.casefold()[:4 * MAX_TEXT]

    def show_latest(self, app_id: int, group_hash: str) -> None:
        """Shows a group as its latest crash that is kept; first_seen stays."""
        seqs = self._db.execute(f"""
            select seq from crashes where app_id = ? and group_hash = ? order by {COUNTED_AT} desc, seq desc limit 1
            """, (app_id, group_hash)).fetchall()
        shown: tuple[Any, ...] = (None, None, None, group_hash)  # what its crashes said goes with them
        source = "from (values *) as keys cross join crashes on seq = column1"
        for latest in counted_rows(self._db, Crash, source, seqs):
            trace, = self._db.execute("select stack_trace from crashes where seq = ?", (latest.seq,)).fetchone()
            shown = (latest.at, *self._shown(group_hash, latest._replace(stack_trace=trace)))
        self._db.execute("""
            update groups set last_seen = coalesce(?, last_seen), exception_reason = ?, place = ?, search = ?
            where app_id = ? and group_hash = ?
            """, (*shown, app_id, group_hash))

    @staticmethod
    def recount(db: Any) -> None:
        """Sets what the groups have of the crashes that are kept."""
        db.execute("""
            update groups set (crashes, devices, came_at) = (
                select count(*), count(distinct device_id_hash), coalesce(min(received_at), groups.came_at)
                from crashes where app_id = groups.app_id and group_hash = groups.group_hash)""")

    @staticmethod
    def rename(db: Any, app_id: int, group_hash: str, target: str) -> None:
        """If all crashes of a group have moved, its name becomes an alias of the one that has them now."""
        if db.execute("select 1 from crashes where app_id = ? and group_hash = ? limit 1",
                      (app_id, group_hash)).fetchone() or not db.execute(
                          "select 1 from apps where id = ?", (app_id,)).fetchone():
            return
        db.execute("update group_aliases set target = ? where app_id = ? and target = ?", (target, app_id, group_hash))
        db.execute("delete from group_aliases where app_id = ? and group_hash = ?", (app_id, target))
        upsert(db, "group_aliases", [(app_id, group_hash, target)], "target = excluded.target")
        move_triage(db, app_id, group_hash, target)

    @staticmethod
    def most_frequent(db: Any, app: int | None, days: range, limit: int = 5) -> list[JsonObject]:
        """The most frequent groups of these days, at most the last seven; of several apps, the latest's name."""
        return dict_rows(db, f"""
            select top.group_hash, exception_type, substr(coalesce(exception_reason, ''), 1, 200) as exception_reason,
                count
            from (
                select group_hash, sum(crashes) as count from group_days
                where {APPS} and day between :first and :last
                group by group_hash
                order by count desc, group_hash
                limit :limit) as top
            cross join groups on groups.group_hash = top.group_hash and groups.app_id = (
                select app_id from groups
                where {APPS} and group_hash = top.group_hash
                order by last_seen desc, app_id
                limit 1)
            order by count desc, top.group_hash""", {"app": app, "first": days[0], "last": days[-1], "limit": limit})


_GROUP_DEVICE = attrgetter("app_id", "group_hash", "device_id_hash")
_AT = attrgetter("at", "seq")
_RECEIVED_AT = attrgetter("received_at")
_TIMES = attrgetter("at", "received_at")


class Releases(Figure):
    """When each build and release was seen; sessions, crashes and devices per release, and its sessions per UTC day of
    the week. Of an app's builds beyond the bound, only the release is known."""

    TABLES = """
create table builds (
    app_id integer not null, app_version text not null, build_number text not null,  -- '': not said, as by all events
    first_seen integer not null, last_seen integer not null,  -- when its first and its last report were received
    primary key (app_id, app_version, build_number)) without rowid;
create view releases as
    select app_id, app_version, min(first_seen) as first_seen, max(last_seen) as last_seen from builds
    group by app_id, app_version;
"""
    SUMS = {"release_sums": Sums("app_version", "sessions crashed_sessions crashes devices crashed_devices"),
            "release_days": Sums("day app_version", "sessions", WEEK)}
    COUNTS = (Crash, Event)
    BUILD: dict[type, Any] = {Crash: attrgetter("received_at", "app_id", "app_version", "build_number"),
                              Event: attrgetter("received_at", "app_id", "app_version")}

    def __init__(self, rollups: RollUps):
        super().__init__(rollups)
        self._seen: dict[Row, tuple[int, int]] = {}  # by app_id, app_version and build_number: the rest of its row

    def count(self, kind: type, reports: Sequence[Any], by: int) -> None:
        for (received, app_id, version, *build), alike in Counter(map(self.BUILD[kind], reports)).items():
            if version and kind is Crash:
                self._add("release_sums", app_id, version, crashes=by * alike)
            if version and by > 0:
                key = (app_id, version, next(filter(None, build), ""))
                first, last = self._seen.get(key, (received, received))
                self._seen[key] = min(first, received), max(last, received)

    def save(self) -> None:
        for key, times in self._seen.items():
            if not self._db.execute("""
                    update builds set first_seen = min(first_seen, ?), last_seen = max(last_seen, ?)
                    where app_id = ? and app_version = ? and build_number = ?""", (*times, *key)).rowcount:
                builds, = self._db.execute("select count(*) from builds where app_id = ?", key[:1]).fetchone()
                upsert(self._db, "builds", [(*(key if builds < MAX_BUILDS_OF_APP else (*key[:2], "")), *times)], """
                    first_seen = min(builds.first_seen, excluded.first_seen),
                    last_seen = max(builds.last_seen, excluded.last_seen)""")

    ASKED = f"""(
        select app_id, app_version, min(first_seen) as first_seen, max(last_seen) as last_seen from builds
        where {APPS} group by app_id, app_version) as releases"""  # for which SQLite would look at all of the view

    @staticmethod
    def pairs(db: Any, app: int | None) -> list[Pair]:
        """Each release with the one before it: the highest lower version that was seen before it. So neither a version
        that comes late nor one that is no release, such as 99.0, hides the others."""
        come: dict[int, list[Row]] = defaultdict(list)  # by version
        pairs = []
        rows = db.execute(f"""
            select app_id, app_version, first_seen from {Releases.ASKED} where app_version <> '{OTHER}'
            """, {"app": app})
        for app_id, version, first in sorted(rows, key=lambda row: (row[2], version_key(row[1]))):
            own = version_key(version), version, first
            place = bisect_left(come[app_id], own)
            pairs += [Pair(app_id, version, first, *come[app_id][place - 1][1:])] if place else []
            come[app_id].insert(place, own)
        return pairs

    @staticmethod
    def newest(db: Any, app: int | None, since: int) -> dict[int, str]:
        """That of each app, by its id: the last that came. An old version that comes late is none, unless more of the
        sessions since that day are its: an app may count its versions anew."""
        leaders: dict[int, Row] = {}
        for app_id, version, recent in db.execute(f"""
                select app_id, app_version, coalesce((
                    select sum(sessions) from release_days
                    where app_id = releases.app_id and day >= :since and app_version = releases.app_version), 0)
                from {Releases.ASKED} where app_version <> '{OTHER}' order by first_seen, app_version
                """, {"app": app, "since": since}):
            own, leader = version_key(version), leaders.get(app_id)
            if leader is None or own >= leader[0] or recent > leader[1]:
                leaders[app_id] = own, recent, version
        return {app_id: version for app_id, (_, _, version) in leaders.items()}

    @staticmethod
    def healths(db: Any, pairs: Sequence[Pair], now: int) -> dict[Pair, list[Health]]:
        """That of a release and of the one before it at equal ages: of the devices that came to the newer until the
        last full hour, and to the other within as long a time."""
        spans: dict[Pair, tuple[Row, Row]] = {}
        for pair in pairs:
            end = min(now, pair.first_seen + HEALTH_DAYS * DAY) // HOUR
            end_before = (pair.before_seen + end * HOUR - pair.first_seen + HOUR // 2) // HOUR
            spans[pair] = ((pair.app_id, pair.app_version, pair.first_seen // HOUR, end),
                           (pair.app_id, pair.before, pair.before_seen // HOUR, end_before))
        found = {row[:4]: Health(*row[4:]) for row in rows_of(db, """
            select column1, column2, column3, column4, sum(devices), sum(crashed_devices) from (values *) as spans
            cross join release_hours on app_id = column1 and app_version = column2
                and hour >= column3 and hour < column4
            group by column1, column2, column3, column4""", list({*chain.from_iterable(spans.values())}))}
        return {pair: [found.get(span, Health(0, 0)) for span in both] for pair, both in spans.items()}

    @staticmethod
    def latest(db: Any, app: int | None, days: range) -> list[JsonObject]:
        """The latest 100 releases, with their share of the sessions of these days: `recent` to `of_all`."""
        return dict_rows(db, f"""
            select latest.app_id, apps.name as app, latest.app_version, coalesce(sessions, 0) as sessions,
                coalesce(crashed_sessions, 0) as crashed_sessions, coalesce(crashes, 0) as crashes,
                coalesce(devices, 0) as devices, coalesce(crashed_devices, 0) as crashed_devices, first_seen, last_seen,
                (select sum(sessions) from release_days where app_id = latest.app_id
                    and day between :first and :last and app_version = latest.app_version) as recent,
                (select sum(sessions) from session_days where app_id = latest.app_id
                    and day between :first and :last) as of_all
            from (select * from {Releases.ASKED} order by first_seen desc, app_version, app_id limit 100) as latest
            join apps on apps.id = latest.app_id
            left join release_sums using (app_id, app_version)
            order by first_seen desc, latest.app_version, latest.app_id
            """, {"app": app, "first": days[0], "last": days[-1]})


class Pair(NamedTuple):
    """A release, and the one before it; times are those of their first reports, in milliseconds."""

    app_id: int
    app_version: str
    first_seen: int
    before: str
    before_seen: int


class Health(NamedTuple):
    """Devices of a release, and how many of them crashed there."""

    devices: int
    crashed: int

    @property
    def share(self) -> float:
        """Of the devices, those that never crashed."""
        return 1 - self.crashed / self.devices

    def wilson(self, z: float) -> tuple[float, float]:
        """Wilson's interval of the share, of so many standard deviations to each side."""
        z2 = z ** 2 / self.devices
        half = math.sqrt(z2 * (self.share * (1 - self.share) + z2 / 4))
        return (self.share + z2 / 2 - half) / (1 + z2), (self.share + z2 / 2 + half) / (1 + z2)


CONFIDENCE = 1.96  # standard deviations: 95 %
ALARM = 2.58       # 99 %, to tell somebody: looked at each hour, 95 % would once call a sixth of equal releases worse
HALF_WIDTH = 0.05  # of an interval that is narrow enough to say that there is no difference
FEWEST, ENOUGH = 20, 50  # devices of both releases for any verdict; for `no difference seen`, and to tell somebody


def newcombe(ours: Health, before: Health, z: float = CONFIDENCE) -> tuple[float, float]:
    """The interval of the difference of two shares, of 95 % by default: Newcombe, Interval estimation for the
    difference between independent proportions, Statistics in Medicine 17 (1998) 873-890, method 10."""
    (low, high), (low_before, high_before) = ours.wilson(z), before.wilson(z)
    difference = ours.share - before.share
    return (difference - math.hypot(ours.share - low, high_before - before.share),
            difference + math.hypot(high - ours.share, before.share - low_before))


def verdict(ours: Health, before: Health) -> JsonObject | None:
    """Whether a release is worse than the one before it, in a word and a text, with the interval of the difference in
    percentage points; None where no device is known of either. It is too early to see no difference until the smaller
    has at least 50 devices, and as many as make the interval of two equal releases 5 points wide to each side."""
    least, most = sorted((ours.devices, before.devices))
    if not most:
        return None
    low, high = newcombe(ours, before) if least else (-1.0, 1.0)
    crashed = (ours.crashed + before.crashed + 2) / (least + most + 4)  # and of two more: a few may have had luck
    needed = max(ENOUGH, math.ceil((CONFIDENCE / HALF_WIDTH) ** 2 * 2 * crashed * (1 - crashed)))
    word = ("too early" if least < FEWEST else "worse" if high < 0 else "better" if low > 0
            else "too early" if least < needed else "no difference seen")
    if word == "too early":
        text = f"about {math.ceil((needed - least) / 10) * 10} more devices"
    else:
        text = "{} of devices crash-free, {} before".format(*_percentages(ours.share, before.share))
    return {"word": word, "text": f"{word}: {text}",
            "interval": [round(100 * low, 1), round(100 * high, 1)] if least else None}


def _percentages(*shares: float) -> list[str]:
    """Shares in whole per cent; where that would not tell them from each other or from 100 %, all with one or two
    decimals."""
    decimals = next((n for n in (0, 1) if len({round(100 * each, n) for each in (*shares, 1)}) == len({*shares, 1})), 2)
    return [f"{100 * each:.{decimals}f} %" for each in shares]


class Session(NamedTuple):
    """What is known of a session; the times are those at which its start and end count, in milliseconds."""

    first_seq: int = MAX_NUMBER
    last_seq: int = 0
    started_at: int | None = None
    ended_at: int | None = None
    app_version: str | None = None  # of its start
    crashed: int = 0  # whether a crash names it: 1 or 0

    def merged(self, later: Session) -> Session:
        """What is known from both. The first start and the last end count."""
        start = min(self, later, key=lambda each: each.started_at or MAX_NUMBER)
        return Session(min(self.first_seq, later.first_seq), max(self.last_seq, later.last_seq), start.started_at,
                       max(self.ended_at or 0, later.ended_at or 0) or None, start.app_version,
                       max(self.crashed, later.crashed))

    @property
    def duration(self) -> int | None:
        """Milliseconds. None where it has not ended, or would have taken longer than a day: a clock was set."""
        length = (self.ended_at or 0) - (self.started_at or 0)
        return length if self.started_at and self.ended_at and 0 <= length <= DAY else None


_SESSION = attrgetter("app_id", "session_id", "device_id_hash")
_ENDS = {"session_start", "session_end"}


class Sessions(Figure):
    """Sessions by the UTC day on which they started, and how long they took. A session is a session_id of a
    device: SDKs that count their launches use the same ids."""

    TABLES = """
create table sessions (                    -- of which a report is kept
    app_id integer not null, session_id text not null, device integer not null,  -- see device_key
    first_seq integer not null, last_seq integer not null,  -- between them are its reports
    started_at integer, ended_at integer, app_version text, crashed integer not null,
    primary key (app_id, session_id, device)) without rowid;
create table medians (                     -- of the durations of a day that is over, so that no question sorts them
    app_id integer not null, day integer not null, seconds integer not null,
    primary key (app_id, day)) without rowid;
"""
    SUMS = {"session_days": Sums("day", "sessions ended session_ms"),  # `ended` have a duration; session_ms is the sum
            "durations": Sums("day seconds", "sessions", DURATION_DAYS)}  # seconds in two significant digits
    COUNTS = (Crash, Event)
    MEDIAN = """
        select seconds from (
            select seconds, sum(sessions) over (order by seconds) as so_far, sum(sessions) over () as total
            from durations where app_id = ended_days.app_id and day = ended_days.day) as sums
        where 2 * so_far >= total
        order by seconds
        limit 1"""

    def __init__(self, rollups: RollUps):
        super().__init__(rollups)
        self._sessions = Entities("sessions", Session)
        self._changed: set[tuple[int, int]] = set()  # app_id and day whose median is another now

    def count(self, kind: type, reports: Sequence[Any], by: int) -> None:
        gone = set()
        for (app_id, session_id, device), run in groupby(reports, _SESSION):
            events = list(run)
            ends = [Session(started_at=event.at, app_version=event.app_version) if event.type == "session_start"
                    else Session(ended_at=event.at) for event in events if event.type in _ENDS] if kind is Event else []
            key = app_id, session_id, device_key(device)
            if not session_id:
                for end in ends:
                    self._count(app_id, end, by)
            elif by < 0:  # all reports of a session are of one device, so it goes with the first of them
                gone.add(key)
            else:
                seen = Session(events[0].seq, events[-1].seq, crashed=int(kind is Crash))
                self._sessions.see(key, reduce(Session.merged, ends, seen))
        for key, session in self._sessions.stored(self._db, gone).items():
            self._count(key[0], session, -1)
        self._db.executemany("delete from sessions where app_id = ? and session_id = ? and device = ?", list(gone))

    def expire(self, kind: type, reports: Sequence[Any]) -> None:
        self._db.executemany(
            "delete from sessions where app_id = ? and session_id = ? and device = ? and last_seq <= ?",
            [(app_id, session_id, device_key(device), reports[-1].seq)
             for app_id, session_id, device in set(map(_SESSION, reports)) if session_id])

    def _count(self, app_id: int, session: Session, by: int) -> None:
        if session.started_at is None:
            return
        day, duration = session.started_at // DAY, session.duration
        self._add("session_days", app_id, day, sessions=by)
        if session.app_version:
            self._add("release_sums", app_id, session.app_version, sessions=by, crashed_sessions=by * session.crashed)
            self._add("release_days", app_id, day, session.app_version, sessions=by)
        if duration is not None:
            self._add("session_days", app_id, day, ended=by, session_ms=by * duration)
            unit = 10 ** max(0, len(str(duration // SECOND)) - 2) * SECOND  # so a day has few different ones
            self._add("durations", app_id, day, (duration + unit // 2) // unit * unit // SECOND, sessions=by)
            if day < self._now // DAY - 1:
                self._changed.add((app_id, day))

    def save(self) -> None:
        for key, before, after in self._sessions.save(self._db):
            if before is None or before[2:] != after[2:]:
                self._count(key[0], before or Session(), -1)
                self._count(key[0], after, 1)
        self._db.executemany("delete from medians where app_id = ? and day = ?", list(self._changed))

    def close_days(self) -> None:
        """Stores medians of days that are over. Those of today and yesterday change with nearly every session."""
        self._db.execute(f"""
            insert into medians select * from (
                select app_id, day, ({self.MEDIAN}) as seconds from session_days as ended_days
                where app_id in (select id from apps) and day between ? and ? and ended > 0 and not exists (
                    select 1 from medians where app_id = ended_days.app_id and day = ended_days.day)
                limit ?) as closed
            where seconds is not null""", (self._now // DAY - DURATION_DAYS, self._now // DAY - 2, TRIMMED))

    @staticmethod
    def per_day(db: Any, app: int | None, days: range) -> JsonObject:
        """Sessions, the mean and the median of their seconds. Of several apps together there is no median."""
        sums = per_day(db, app, days, "session_days", "sessions", "ended", "session_ms")
        medians = dict(db.execute(f"""
            select day, coalesce((
                select seconds from medians where app_id = ended_days.app_id and day = ended_days.day
                ), ({Sessions.MEDIAN}))
            from (
                select day, max(app_id) as app_id from session_days
                where {APPS} and day between :first and :last and ended > 0
                group by day having count(*) = 1) as ended_days""", {"app": app, "first": days[0], "last": days[-1]}))
        return {"sessions": sums["sessions"], "median_seconds": [medians.get(day) for day in days],
                "mean_seconds": [round(ms / ended / SECOND, 1) if ended else None
                                 for ms, ended in zip(sums["session_ms"], sums["ended"])]}


class SeenDevice(NamedTuple):
    """What is known of a device of an app."""

    first_day: int
    last_hour: int
    last_seq: int  # of its last report, or of an earlier one of the same hour, so that its row seldom changes

    def merged(self, later: SeenDevice) -> SeenDevice:
        is_later = (later.last_seq >> SEQ_BITS) // HOUR > (self.last_seq >> SEQ_BITS) // HOUR
        if not is_later and self.first_day <= later.first_day and self.last_hour >= later.last_hour:
            return self
        return SeenDevice(min(self.first_day, later.first_day), max(self.last_hour, later.last_hour),
                          later.last_seq if is_later else self.last_seq)


class SeenVersion(NamedTuple):
    """When the first report, and the first crash if any, of a device in a release were received."""

    first_hour: int
    crash_hour: int | None

    def merged(self, later: SeenVersion) -> SeenVersion:
        ours, theirs = self.crash_hour, later.crash_hour
        crash_hour = theirs if ours is None else ours if theirs is None else min(ours, theirs)
        return SeenVersion(min(self.first_hour, later.first_hour), crash_hour)


class Devices(Figure):
    """Devices that are active, that are new and come back, and those of each release. What is known of a device
    goes with its last report (to the hour); it is known by a digest, so that no figure holds its name."""

    TABLES = """
create table devices (                     -- of which a report is kept
    app_id integer not null, device integer not null,  -- see device_key
    first_day integer not null, last_hour integer not null,  -- by the time at which reports count
    last_seq integer not null, primary key (app_id, device)) without rowid;
create table device_days (
    app_id integer not null, device integer not null, day integer not null,
    primary key (app_id, device, day)) without rowid;
"""
    VERSIONS = """
create table device_versions (
    app_id integer not null, device integer not null, app_version text not null,
    first_hour integer not null, crash_hour integer,  -- of receipt of its first report, of its first crash if any
    primary key (app_id, device, app_version)) without rowid;
"""
    TABLES += VERSIONS
    ACTIVE = {"dau": 1, "wau": 7, "mau": 30}  # devices of a day, of the 7 and of the 30 days that end with it
    BACK = {"back_1": 1, "back_7": 7, "back_30": 30}  # of those first seen on a day, those seen n days later
    SUMS = {"device_hours": Sums("hour", "devices", HOURS_KEPT),  # by the hour in which they were last seen
            "active_days": Sums("day", "dau wau mau"), "cohorts": Sums("day", "devices back_1 back_7 back_30"),
            "release_hours": Sums("app_version hour", "devices crashed_devices")}  # by first_hour and by crash_hour
    COUNTS = (Crash, Event)

    def __init__(self, rollups: RollUps):
        super().__init__(rollups)
        self._devices = Entities("devices", SeenDevice)
        self._versions = Entities("device_versions", SeenVersion)
        self._days: dict[Row, set[int]] = defaultdict(set)  # by app_id and device
        self._spans: Counter[Row] = Counter()  # app_id, column of active_days, first day, day after the last: devices

    def count(self, kind: type, reports: Sequence[Any], by: int) -> None:
        """Reports that are forgotten do not count here: their device is forgotten as a whole."""
        runs = groupby(reports if by > 0 else (), attrgetter("app_id", "device_id_hash", "app_version"))
        for (app_id, device, version), grouped in runs:
            if not device:
                continue
            key, run = (app_id, device_key(device)), list(grouped)
            times = set(map(_TIMES, run))  # of a batch, few are different
            self._days[key].update(at // DAY for at, came in times if at // DAY >= came // DAY - DEVICE_DAYS)
            self._devices.see(key, SeenDevice(min(times)[0] // DAY, max(times)[0] // HOUR, run[-1].seq))
            if version:
                hour = min(map(_RECEIVED_AT, run)) // HOUR
                self._versions.see((*key, version), SeenVersion(hour, hour if kind is Crash else None))

    def expire(self, kind: type, reports: Sequence[Any]) -> None:
        """The days of a device that stays go when no report that is kept can be of them."""
        oldest = reports[-1].received_at // DAY - DEVICE_DAYS
        is_gone = "not exists (select 1 from devices where app_id = :app and device = :device)"
        last = {(each.app_id, each.device_id_hash): each.seq for each in reports if each.device_id_hash}
        for statement in (
                "delete from devices where app_id = :app and device = :device and last_seq <= :seq",
                f"delete from device_days where app_id = :app and device = :device and (day < :oldest or {is_gone})",
                f"delete from device_versions where app_id = :app and device = :device and {is_gone}"):
            self._db.executemany(statement, [
                {"app": app_id, "device": device_key(device), "seq": seq, "oldest": oldest}
                for (app_id, device), seq in last.items()])

    def save(self) -> None:
        devices = self._devices.save(self._db)
        self._save_days(devices)
        for (app_id, _), before, after in devices:
            if before is None or before.last_hour != after.last_hour:
                self._add("device_hours", app_id, after.last_hour, devices=1)
                if before:
                    self._add("device_hours", app_id, before.last_hour, devices=-1)
        self.save_versions()
        for (app_id, column, first, end), count in self._spans.items():  # which many devices have in common
            for day in range(first, end):
                self._add("active_days", app_id, day, **{column: count})

    def save_versions(self) -> None:
        """Writes what is new of devices in releases."""
        alike: Counter[Row] = Counter()
        for (app_id, _, version), before, after in self._versions.save(self._db):
            if before != after:
                alike[app_id, version, after] += 1
                alike[app_id, version, before] -= 1
        for (app_id, version, seen), count in alike.items():
            if seen:
                self._count_version(app_id, version, seen, count)

    def _save_days(self, devices: Sequence[tuple[Row, SeenDevice | None, SeenDevice]]) -> None:
        """Days on which a device was not seen before. Mostly there are none: its last day is in its row."""
        fresh = [each for each in devices if each[1] is None or each[2].first_day < each[1].first_day
                 or self._days[each[0]] - {each[1].last_hour // 24}]
        around = {key: {*self._days[key], self._devices.seen[key].first_day, before.first_day}
                  for key, before, _ in fresh if before}
        near: dict[Row, list[int]] = defaultdict(list)  # the days around them decide what changes
        for app_id, device, day in rows_of(self._db, """
                select app_id, device, day from (values *) as keys cross join device_days
                    on app_id = column1 and device = column2 and day between column3 and column4
                order by day""", [(*key, min(days) - 30, max(days) + 30) for key, days in around.items()]):
            near[app_id, device].append(day)
        rows = []
        for key, before, after in fresh:
            days = near[key]
            if before:
                self._count_cohort(key[0], before.first_day, days, -1)
            for day in sorted(self._days[key] - set(days)):
                self._count_active(key[0], days, day, 1)
                insort(days, day)
                rows.append((*key, day))
            self._count_cohort(key[0], after.first_day, days, 1)
        write_rows(self._db, "insert into device_days values *", rows)

    def _count_active(self, app_id: int, others: Sequence[int], day: int, by: int) -> None:
        """Counts the days that a device is active on because of one day, and not because of its others."""
        at = bisect_left(others, day)
        before, after = others[at - 1] if at else -MAX_NUMBER, others[at] if at < len(others) else MAX_NUMBER
        for column, span in self.ACTIVE.items():
            self._spans[app_id, column, max(day, before + span), min(day + span, after)] += by

    def _count_cohort(self, app_id: int, first_day: int, days: Sequence[int], by: int) -> None:
        self._add("cohorts", app_id, first_day, devices=by, **{
            column: by for column, later in self.BACK.items() if first_day + later in days})

    def _count_version(self, app_id: int, version: str, seen: SeenVersion, by: int) -> None:
        has_crashed = seen.crash_hour is not None
        self._add("release_sums", app_id, version, devices=by, crashed_devices=by * int(has_crashed))
        self._add("release_hours", app_id, version, seen.first_hour, devices=by)
        if has_crashed:
            self._add("release_hours", app_id, version, seen.crash_hour, crashed_devices=by)

    def forget(self, device_id_hash: str) -> int:
        """Takes a device out of all figures. Returns in how many apps it was known."""
        device = device_key(device_id_hash)
        rows = self._db.execute("""
            select app_id, first_day, last_hour from devices where app_id in (select id from apps) and device = ?
            """, (device,)).fetchall()
        for app_id, first_day, last_hour in rows:
            days, versions = ([row[2:] for row in self._db.execute(
                f"select * from {table} where app_id = ? and device = ? order by 3", (app_id, device))]
                for table in ("device_days", "device_versions"))
            left = [day for day, in days]
            self._add("device_hours", app_id, last_hour, devices=-1)
            self._count_cohort(app_id, first_day, left, -1)
            while left:
                self._count_active(app_id, left[:-1], left.pop(), -1)
            for version, *hours in versions:
                self._count_version(app_id, version, SeenVersion(*hours), -1)
            for table in ("devices", "device_days", "device_versions"):
                self._db.execute(f"delete from {table} where app_id = ? and device = ?", (app_id, device))
        return len(rows)

    @staticmethod
    def active(db: Any, app: int | None, days: range) -> JsonObject:
        """Devices that were active on each of these days, and on the 7 and 30 days that end with it."""
        return {**per_day(db, app, days, "active_days", *Devices.ACTIVE)}

    @staticmethod
    def retention(db: Any, app: int | None, days: range) -> JsonObject:
        """Devices that are new on each of these days, and the percentage of them that came back."""
        cohorts = per_day(db, app, days, "cohorts", "devices", *Devices.BACK)
        return {"devices": cohorts["devices"], **{f"day_{later}": [
            round(100 * back / new, 2) if new and day + later < days[-1] else None
            for day, new, back in zip(days, cohorts["devices"], cohorts[column])]
            for column, later in Devices.BACK.items()}}

    @staticmethod
    def last_24_hours(db: Any, app: int | None, now: int) -> int:
        """Devices that were seen in the last 24 hours, rounded to the full hour."""
        return int(db.execute(f"select coalesce(sum(devices), 0) from device_hours where {APPS} and hour >= :since",
                              {"app": app, "since": (now - DAY) // HOUR}).fetchone()[0])


@lru_cache(maxsize=4096)
def device_key(device_id_hash: str | None) -> int:
    """The number by which figures know a device: 63 bits of its SHA-256. 0 for none."""
    return int.from_bytes(sha256(device_id_hash)[:8], "big") >> 1 if device_id_hash else 0


class EventNames(Figure):
    """Events by name, type and UTC day, without those that begin or end a session. "" is no name."""

    SUMS = {"event_names": Sums("name type day", "events", NAME_DAYS)}
    COUNTS = (Event,)

    def count(self, kind: type, reports: Sequence[Any], by: int) -> None:
        # Without a line of Python for each event, as a batch has a hundred.
        columns = [map(attrgetter(name), reports) for name in ("app_id", "name", "type", "at")]
        alike = Counter(zip(*columns[:3], map(DAY.__rfloordiv__, columns[3])))
        for (app_id, name, type, day), count in alike.items():
            if type not in _ENDS:
                self._add("event_names", app_id, name or "", type, day, events=by * count)

    @staticmethod
    def most_frequent(db: Any, app: int | None, days: range) -> JsonObject:
        """The 50 most frequent names of these days, and their events on each."""
        parameters = {"app": app, "first": days[0], "last": days[-1]}
        found = dict_rows(db, f"""
            select name, type, sum(events) as count from event_names
            where {APPS} and day between :first and :last
            group by name, type
            order by count desc, name, type
            limit 50""", parameters)
        for row in found:
            counts = dict(db.execute(f"""
                select day, sum(events) from event_names
                where {APPS} and name = :name and type = :type and day between :first and :last
                group by day""", {**parameters, **row}))
            row["days"] = [counts.get(day, 0) for day in days]
        return {"events": found}


FIGURES: tuple[type[Figure], ...] = (Requests, Crashes, Groups, Releases, Sessions, Devices, EventNames)
SUMS = {table: sums for figure in FIGURES for table, sums in figure.SUMS.items()}
FIGURE_TABLES = (NewNames.TABLES + "".join(figure.TABLES for figure in FIGURES)
                 + "".join(sums.schema(table) for table, sums in SUMS.items()))
SCHEMA = REPORT_TABLES + SYMBOL_TABLES + TRIAGE_TABLES + FIGURE_TABLES
# The primary key of each table with rows of an app, beside the reports.
KEYS = {table: tuple(key.split(", ")) for table, key in re.findall(
    r"create table (\w+) \([^;]*?primary key \((app_id, [^)]*)\)", re.sub("--.*", "", SCHEMA))}


class RollUps:
    """All figures in one transaction: reports are counted, and then all changes are saved, once."""

    def __init__(self, db: Any, now: int, symbols: Symbols | None = None):
        self.db, self.now, self.symbols, self.names = db, now, symbols or Symbols(db), NewNames(db)
        self._is_expiry = False
        self._changes: dict[str, dict[Row, dict[str, int]]] = defaultdict(dict)  # by table and key
        self._windows = {  # the place of the day or hour in the key, and the first that is kept
            table: (KEYS[table].index(unit), now // (HOUR if unit == "hour" else DAY) - sums.window)
            for table, sums in SUMS.items() if sums.window for unit in sums.key if unit in ("day", "hour")}
        self.figures: dict[type, Any] = {each: each(self) for each in FIGURES}

    def count(self, kind: type, reports: Sequence[Any], by: int) -> None:
        """Counts reports of a kind, in the order of their seqs, as Figure.count; by 0, those that have expired."""
        self._is_expiry = not by
        for figure in self.figures.values() if reports else ():
            if kind in figure.COUNTS and by:
                figure.count(kind, reports, by)
            elif kind in figure.COUNTS:
                figure.expire(kind, reports)
        self._is_expiry = False

    def add(self, table: str, *key: Any, **counts: int) -> None:
        """Adds to the sums of a row, which is made where there is none, and deleted when all its sums are 0."""
        sums = SUMS[table]
        if self._is_expiry and sums.lasts:
            return
        place, first = self._windows.get(table, (0, 0))
        if key[place] < first:
            return
        row = self._changes[table].get(key)
        if row is None:
            row = self._changes[table][key] = dict.fromkeys(sums.columns, 0)
        for name, count in counts.items():
            row[name] += count

    def save(self) -> None:
        """Writes everything that has changed."""
        for figure in self.figures.values():
            figure.save()
        for table, changes in self._changes.items():
            self._save_sums(table, {key: row for key, row in changes.items() if any(row.values())})
        self._changes.clear()
        self.figures[Groups].drop_empty()

    def _save_sums(self, table: str, changes: Mapping[Row, Mapping[str, int]]) -> None:
        columns = SUMS[table].columns
        upsert(self.db, table, [(*key, *row.values()) for key, row in changes.items()],
               ", ".join(f"{column} = {table}.{column} + excluded.{column}" for column in columns))
        if gone := [key for key, row in changes.items() if min(row.values()) < 0]:
            tests = [f"{each} = ?" for each in KEYS[table]] + [f"{each} <= 0" for each in columns]
            self.db.executemany(f"delete from {table} where {' and '.join(tests)}", gone)

    def trim(self) -> int:
        """Once a day: deletes some of the rows whose window is over; how many."""
        self.figures[Sessions].close_days()
        deleted = self._delete_some("new_names", f"new_names where day < {self.now // DAY}")
        deleted += sum(self._delete_some(table, f"{table} where {KEYS[table][place]} < {first}")
                       for table, (place, first) in self._windows.items())
        # Beyond this age of its release, a verdict asks for no hour.
        deleted += self._delete_some("release_hours", f"""(
            select app_id, app_version, min(first_seen) / {HOUR} + {24 * HEALTH_DAYS} as last from builds
            group by app_id, app_version) as ages
            cross join release_hours using (app_id, app_version) where hour > last""")
        return deleted + int(self.figures[Groups].drop_empty(TRIMMED))

    def _delete_some(self, table: str, source: str) -> int:
        """Deletes some of the rows of a query. Each by its whole key: for `(key) in (select ...)`, SQLite would look
        through all of an app."""
        rows = self.db.execute(f"""
            select {", ".join(KEYS[table])} from {source} and app_id in (select id from apps) limit ?
            """, (TRIMMED,)).fetchall()
        self.db.executemany(f"delete from {table} where {' and '.join(f'{each} = ?' for each in KEYS[table])}", rows)
        return len(rows)


def labelled(rows: Iterable[tuple[str, int]]) -> JsonObject:
    """Labels and counts as an answer has them."""
    pairs = list(fitting(rows))
    return {"labels": [label for label, _ in pairs], "data": [count for _, count in pairs]}


def fitting(rows: Iterable[Any]) -> Iterator[Any]:
    """The first rows, as many as MAX_ANSWER holds."""
    size = 0
    for row in rows:
        size += len(json.dumps(row))
        if size > MAX_ANSWER:
            return
        yield row


STATEMENTS = 512  # prepared statements that are kept: an insert is a different one for each number of rows
ROWS, ROWS_STEP = 128, 4  # rows of a statement: at most 128, above 4 a multiple of 4. Any number would take 9 MB more.


def upsert(db: Any, table: str, rows: Sequence[Row], changes: str) -> None:
    """Inserts whole rows. Where there is one with the same key, it changes instead."""
    write_rows(db, f"insert into {table} values * on conflict ({', '.join(KEYS[table])}) do update set {changes}", rows)


def write_rows(db: Any, statement: str, rows: Sequence[Row]) -> None:
    """Runs a statement for all rows, its `values *` standing for their placeholders. In few parts: Python releases
    its lock for each, and under load has to queue for it again. executemany would queue once a row."""
    for _ in _in_parts(db, statement, rows):
        pass


def rows_of(db: Any, query: str, keys: Sequence[Row]) -> list[Row]:
    """The rows of a query for all keys, its `values *` standing for their placeholders."""
    return [row for cursor in _in_parts(db, query, keys) for row in cursor]


def _in_parts(db: Any, statement: str, rows: Sequence[Row]) -> Iterator[Any]:
    start = 0
    while most := min(len(rows) - start, ROWS):
        part = rows[start:start + (most - most % ROWS_STEP or most)]
        start += len(part)
        yield db.execute(_with_placeholders(statement, len(part), len(part[0])), list(chain.from_iterable(part)))


@lru_cache(maxsize=STATEMENTS)
def _with_placeholders(statement: str, rows: int, columns: int) -> str:
    row = "(" + ", ".join("?" * columns) + ")"
    return statement.replace("values *", "values " + ", ".join([row] * rows))


def dict_rows(db: Any, query: str, parameters: Any = ()) -> list[JsonObject]:
    """The rows of a query, each by the names of its columns."""
    rows = db.execute(query, parameters)
    names = [column[0] for column in rows.description]
    return [dict(zip(names, row)) for row in rows]


# == Database ==================================================================
# One SQLite file: its tables, and how it is read and written. A process has one
# connection that writes, behind a lock, and readers that cannot write.

BUSY_TIMEOUT = 5.0  # seconds to wait for a lock that another process holds
PRUNE_STEP = 1000  # rows, or pages, that a step deletes from a table
PAUSE = 2  # after such a step, as a multiple of its length
SET_STATE = "insert into state values (?, ?) on conflict (name) do update set value = excluded.value"


class StoreError(Exception):
    """What the store cannot do for its operator. `str()` is one line that says why."""


class Closing:
    """A context manager that calls close() at the end."""

    def __enter__(self: Any) -> Any:
        return self

    def __exit__(self: Any, *exc: object) -> None:
        self.close()


class Connection(sqlite3.Connection):
    """A connection in autocommit mode. It never makes the file: one that vanished must not come back empty."""

    def __init__(self, path: Path, query_only: bool = False, mode: str = "rw"):
        super().__init__(f"{path.as_uri()}?mode={mode}", uri=True, timeout=BUSY_TIMEOUT,
                         isolation_level=None, check_same_thread=False, cached_statements=STATEMENTS)
        self.execute("pragma synchronous = full")  # NORMAL may lose acknowledged commits in a power failure
        self.execute("pragma secure_delete = on")  # overwrite what is deleted
        self.execute("pragma journal_size_limit = 16000000")  # bytes that a WAL may keep after its peak
        # In KiB. One connection writes, and as many read as there are busy threads.
        self.execute(f"pragma cache_size = {-512 if query_only else -8192}")
        self.execute(f"pragma query_only = {int(query_only)}")

    def begin_writing(self, shared: bool) -> None:
        """Begins a transaction that writes. If it is `shared`, other engines may run transactions of other apps
        beside it; SQLite has one writer."""
        self.execute("begin immediate")  # a lock taken later may fail at once instead of waiting

    def lock_apps(self, key_hashes: Sequence[bytes]) -> None:
        """In a shared transaction: waits for others that write to the apps of these keys."""

    def reserve_seqs(self, now: int, count: int) -> int:
        """The first of `count` consecutive seqs that were never given before."""
        last, = self.execute("""
            select coalesce(max(seq), 0) from (
                select max(seq) as seq from crashes where seq < :ahead
                union all select max(seq) from events where seq < :ahead
                union all select max(last) from given_seqs where last < :ahead) as given
            """, {"ahead": first_seq(now + DAY)}).fetchone()  # a clock that was fast gave those beyond
        first: int = max(last + 1, first_seq(now) + secrets.randbits(SEQ_BITS))  # random: other files have other ids
        while given := self.execute("select last from given_seqs where first < ? and last >= ?",
                                    (first + count, first)).fetchone():
            first = given[0] + 1
        if not self.execute("""
                update given_seqs set last = ? where first = (
                    select max(first) from given_seqs where last between ? and ?)
                """, (first + count - 1, first - first_seq(DAY), first)).rowcount:
            self.execute("insert into given_seqs values (?, ?)", (first, first + count - 1))
        return first

    def try_to_write(self) -> None:
        """Needs room on the disk, as a report does."""
        self.run_script("create table trial (a);\ninsert into trial values (zeroblob(100000));\ndrop table trial")

    def append(self, table: str, columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> None:
        """Inserts rows that are new to a table."""
        write_rows(self, f"insert into {table} ({', '.join(columns)}) values *", rows)

    def run_script(self, script: str) -> None:
        """Runs statements that each end a line: executescript() would commit before it begins."""
        for statement in script.split(";\n"):
            self.execute(statement)

    def pragma(self, name: str) -> Any:
        """The first value of a pragma."""
        return self.execute(f"pragma {name}").fetchone()[0]


def get_state(db: sqlite3.Connection, name: str, default: int) -> int:
    """A value of the table `state`."""
    return int((db.execute("select value from state where name = ?", (name,)).fetchone() or (default,))[0])


def megabytes(size: int) -> str:
    """Bytes as an operator reads them."""
    return f"{size / 1e6:,.1f} MB"


def _wal_size(path: Path) -> int:
    wal = Path(f"{path}-wal")
    return wal.stat().st_size if wal.exists() else 0


class Connections:
    """The connections of one process. None may cross a fork."""

    def __init__(self) -> None:
        self.write_lock = threading.Lock()
        self.writer: Any = None
        self.readers: list[Any] = []  # those that are idle

    def close_writer(self) -> None:
        if self.writer:
            self.writer.close()
            self.writer = None

    def idle_reader(self) -> Any:
        with suppress(IndexError):
            return self.readers.pop()


class Database(Closing):
    """A file with the tables of this server. Thread-safe; works on both sides of a fork.

    Raises StoreError where the file cannot be opened or is something else. Every method may raise
    StorageUnavailable. `clock` gives seconds since 1970. A subclass for another engine
    (examples/postgres.py) replaces what only SQLite has: `Error`, `Outage`, _open, _connect,
    _check_file, reading, _shrink, _fold_in_wal, size, used, warnings and vitals.
    """

    Error: type[Exception] = sqlite3.Error  # what a connection raises
    Outage: type[Exception] = sqlite3.OperationalError  # a lock or a full disk, whatever is written
    make_process: type[Connections] = Connections

    def __init__(self, path: str, clock: Callable[[], float] = time.time, may_create: bool = True):
        self._clock = clock
        self._closed, self._trouble, self._logged = False, "", ""
        # A child leaves its parent's connections untouched here: to close them would harm the parent.
        self._processes: dict[int, Any] = {}
        self._open(path, may_create)

    def _open(self, path: str, may_create: bool) -> None:
        self.path = Path(path).absolute()
        _prepare(self.path, may_create)
        self._file = os.stat(self.path)

    def close(self) -> None:
        """Closes this process's connections, which folds in the WAL. May be called twice."""
        self._closed = True
        with self._here.write_lock:
            while self._here.readers:
                self._here.readers.pop().close()
            self._here.close_writer()  # last, because a reader cannot fold in the WAL

    @property
    def now(self) -> int:
        """The time, in milliseconds since 1970 UTC."""
        return int(self._clock() * SECOND)

    @property
    def _here(self) -> Any:
        """This process's connections, and what else it keeps."""
        pid = os.getpid()
        return self._processes.get(pid) or self._processes.setdefault(pid, self.make_process())

    def _connect(self, query_only: bool = False) -> Connection:
        self._check_file()
        return Connection(self.path, query_only)

    def _check_file(self) -> None:
        """Raises sqlite3.Error where the file is gone, or where another has taken its place: the WAL beside
        it still belongs to the first, and would spoil the second."""
        if self._closed:
            raise sqlite3.ProgrammingError("the store is closed")
        with suppress(OSError):
            if os.path.samestat(os.stat(self.path), self._file):
                return
        raise sqlite3.OperationalError(f"{self.path} was moved or replaced since the start")

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection that cannot write. For short reads, because an open one holds up the WAL."""
        here, db, is_good = self._here, None, False
        try:
            db = here.idle_reader() or self._connect(query_only=True)
            yield db
            is_good = not self._closed
        except self.Error as error:
            raise self._unavailable("read", error) from error
        finally:
            if is_good:
                here.readers.append(db)
            elif db:
                db.close()

    @contextmanager
    def writing(self, shared: bool = False) -> Iterator[Connection]:
        """The process's one writing connection, in a transaction that is durable at the end."""
        here = self._here
        with here.write_lock:
            try:
                self._check_file()
                db = here.writer = here.writer or self._connect()
                db.begin_writing(shared)
                yield db
                db.execute("commit")
            except BaseException as error:
                # Closing undoes what is left of the transaction. SQLite may have rolled back by
                # itself, after which each statement would be a transaction of its own.
                here.close_writer()
                if isinstance(error, self.Error):
                    raise self._unavailable("write", error) from error
                raise

    @contextmanager
    def writing_step(self) -> Iterator[Connection]:
        """A transaction of many. The pause after it lets other processes get the lock: SQLite polls for it, and
        seldom wins against a process that takes it again at once."""
        with self.writing() as db:
            began = time.monotonic()
            yield db
        time.sleep(PAUSE * (time.monotonic() - began))

    def _write_in_steps(self, step: Callable[[Connection], Counter[str]]) -> Counter[str]:
        """Repeats a step, each time in a transaction of its own, until it has nothing to do; the sum of what it did."""
        total: Counter[str] = Counter()
        done: Any = True
        while done and not self._closed:
            with self.writing_step() as db:
                done = step(db)
            total += done
        return total

    def _unavailable(self, verb: str, error: Exception) -> StorageUnavailable:
        """Logs a problem once. Unless it is a lock, `check` knows of it until a commit succeeds."""
        if str(error) != self._logged:
            log.error("cannot %s the database: %s", verb, error)
            self._logged = str(error)
        if verb == "write" and "locked" not in str(error):
            self._trouble = str(error)
        return StorageUnavailable()

    def _check_clock(self) -> None:
        if not EPOCH < self.now < MAX_NUMBER >> SEQ_BITS:
            raise self._unavailable("use", ValueError(f"the clock of this host says {iso_time(self.now)}: set it"))

    def check(self) -> None:
        """Raises StorageUnavailable if the file is gone or cannot be read, or if the last commit of reports failed
        and there is no room for a trial."""
        self._check_clock()
        with self.reading() as db:
            self._check_file()
            db.execute("select 1 from apps").fetchone()
        if self._trouble:
            with self.writing() as db:
                db.try_to_write()
            self._trouble = self._logged = ""

    @property
    def size(self) -> int:
        """Bytes of the database."""
        return self.path.stat().st_size

    def used(self, db: Connection) -> int:
        """Bytes of the database that are not free."""
        return int((db.pragma("page_count") - db.pragma("freelist_count")) * db.pragma("page_size"))

    def _shrink(self) -> None:
        """Returns the space of deleted rows to the disk."""
        with self.reading() as db:
            free = db.pragma("freelist_count")
        for _ in range(0, free, PRUNE_STEP):
            with self.writing_step() as db:
                for _ in range(PRUNE_STEP):  # one page each: some Pythons end a longer pragma after its first
                    db.execute("pragma incremental_vacuum(1)").fetchall()
        self._fold_in_wal()

    def _fold_in_wal(self) -> None:
        with self.reading() as db:
            db.execute("pragma wal_checkpoint(truncate)").fetchall()


_ANOTHER = "; --db or BACKFEEDR_DB_PATH names another"


def _prepare(path: Path, may_create: bool) -> None:
    """Makes the file and its tables where there are none, and brings an old schema up to date. Raises StoreError, and
    has changed nothing, where the file is something else."""
    if not may_create and not path.exists():
        raise StoreError(f"there is no database {path}{_ANOTHER}")
    check_sqlite()
    deadline = time.monotonic() + BUSY_TIMEOUT
    try:
        with suppress(FileExistsError):  # only SQLite opens an existing one: to close it would drop all our locks
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        while True:
            try:
                return _make_tables(path)
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)  # the change to WAL does not itself wait for another process
    except (OSError, sqlite3.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        hint = _ANOTHER if type(error) is sqlite3.DatabaseError else ""  # it is something else; not: locked
        raise StoreError(f"cannot open the database {path}: {reason}{hint}") from None


def check_sqlite() -> str:
    """The version of SQLite. Raises StoreError where it is too old."""
    if sqlite3.sqlite_version_info < (3, 32):  # whose statements take more than 999 values
        raise StoreError(f"SQLite 3.32 or later is needed; this Python has {sqlite3.sqlite_version}")
    return sqlite3.sqlite_version


def _make_tables(path: Path) -> None:
    with closing(Connection(path)) as db:
        check_is_ours(db, path)
        if db.pragma("user_version") == SCHEMA_VERSION:
            return
        if not db.pragma("user_version"):
            db.execute("pragma auto_vacuum = incremental")
            db.execute("pragma journal_mode = wal")
        db.execute("begin immediate")
        if (version := db.pragma("user_version")) < SCHEMA_VERSION:  # another process may have been faster
            migrate(db, version)
        db.execute(f"pragma application_id = {APPLICATION_ID}")
        db.execute(f"pragma user_version = {SCHEMA_VERSION}")
        db.execute("commit")


def check_is_ours(db: Connection, path: Path) -> None:
    """Raises StoreError where a file has other tables than ours, or those of a later version."""
    version = db.pragma("user_version")
    is_empty = not version and not db.pragma("schema_version")
    if not is_empty and db.pragma("application_id") != APPLICATION_ID:
        raise StoreError(f"{path} is a database, but not one of backfeedr's{_ANOTHER}")
    if version > SCHEMA_VERSION:
        raise StoreError(f"{path} is of a newer backfeedr (schema {version}; this one knows {SCHEMA_VERSION})")


# Sums of schema 2 that outlive reports: a table, and where its columns behind app_id come from.
_SUMS_OF_2 = {
    "crash_days": "day, crashes from old_days", "session_days": "day, sessions, ended, session_ms from old_days",
    "active_days": "day, dau, wau, mau from old_days", "device_hours": "hour, devices from old_hours",
    "cohorts": "day, newcomers, back_1, back_7, back_30 from old_days",
    "durations": "day, seconds, sessions from old_durations",
    "release_sums": "app_version, sessions, 0, crashes, devices, crashed_devices from old_releases"}


def migrate(db: Connection, version: int) -> None:
    """Makes the tables, or brings those of an older version up to date, in the current transaction."""
    if not version:
        db.run_script(SCHEMA)
    elif version == 3:
        raise StoreError("schema 3 was never released: export its reports with the backfeedr that made it")
    elif version == 5:
        db.run_script("drop index crashes_by_device;\ndrop index crashes_by_group;\n" + GROUP_INDEX)
    elif version == 4:
        _migrate_from_4(db)
    else:
        _migrate_from_2(db, version)


def _migrate_from_4(db: Connection) -> None:
    """Groups have sums of their own, and a release is what its builds are."""
    db.run_script("".join(f"alter table groups add column {name} integer not null default 0;\n"
                          for name in ("crashes", "devices", "came_at"))
                  + "alter table releases rename to old_releases;\nalter table builds rename to old_builds;\n"
                  + "drop table group_devices;\ndrop table group_sums;\ndrop index crashes_by_group;\n"
                  + Releases.TABLES + GROUP_INDEX)
    Groups.recount(db)
    db.run_script(f"""
insert into builds
    select app_id, app_version, build_number, first_seen, coalesce(last_seen, first_seen) from old_builds left join (
        select app_id, case when (other & {FLAGS["app_version"]}) > 0 then '{OTHER}' else app_version end
                as app_version, coalesce(build_number, '') as build_number, max(received_at) as last_seen
        from crashes group by 1, 2, 3) as latest using (app_id, app_version, build_number);
insert into builds select app_id, app_version, '', first_seen, last_seen from old_releases where true
    on conflict (app_id, app_version, build_number) do update set
        first_seen = excluded.first_seen, last_seen = excluded.last_seen;
drop table old_builds;
drop table old_releases;
""")


def _migrate_from_2(db: Connection, version: int) -> None:
    """Counts all reports again. Where some have expired, a sum is at least what it was."""
    if version < 2:
        db.run_script("create table grants (hash blob primary key, expires_at integer not null) without rowid")
    old = ("devices", "sessions", "hours", "days", "durations", "releases", "release_days", "labels", "groups")
    db.run_script("".join(f"alter table {table} rename to old_{table};\n" for table in old)
                  + "".join(f"alter table {table} add column {column} integer not null default 0;\n"
                            for table in TABLES.values() for column in ("clock_ahead_ms", "other"))
                  + "alter table crashes add column session_id text;\nalter table crashes add column images text;\n"
                  + "create table given_seqs (first integer primary key, last integer not null);\n"
                  + "drop index release_days_by_age;\ndrop index crashes_by_group;\n"
                  + GROUP_INDEX + SYMBOL_TABLES + TRIAGE_TABLES + FIGURE_TABLES)
    recount(db)
    groups = RollUps(db, 0).figures[Groups]
    for app_id, group_hash in db.execute("select app_id, group_hash from groups").fetchall():
        groups.show_latest(app_id, group_hash)
    if any(get_state(db, "expired_" + table, -1) >= 0 for table in TABLES.values()):
        for table, source in _SUMS_OF_2.items():
            sums = SUMS[table].columns
            db.execute(f"""
                insert into {table} select app_id, {source} where app_id > 0
                on conflict ({", ".join(KEYS[table])}) do update set
                    {", ".join(f"{each} = max({table}.{each}, excluded.{each})" for each in sums)}""")
            db.execute(f"delete from {table} where {' + '.join(sums)} = 0")
        db.execute("""
            insert into builds select app_id, app_version, '', first_seen, last_seen from old_releases where app_id > 0
            on conflict (app_id, app_version, build_number) do update set
                first_seen = min(builds.first_seen, excluded.first_seen)""")
    db.run_script("".join(f"drop table old_{table};\n" for table in old)
                  + "drop table group_hours;\ndelete from state where name = 'recent_since';\n"
                  # Names are made canonical now.
                  + "insert into regroupings select app_id, group_hash, 0, 0, '' from groups")


def recount(db: sqlite3.Connection) -> None:
    """Counts all reports again, into empty tables."""
    newest = [db.execute(f"select coalesce(max(received_at), 0) from {table}").fetchone()[0]
              for table in TABLES.values()]
    # Of the windows. Files of earlier versions have no counted_at.
    now = max(*newest, get_state(db, "counted_at", (get_state(db, "trimmed_day", -1) + 1) * DAY))
    for kind, table in TABLES.items():
        after = -1
        while page := counted_rows(db, kind, f"""
                from {table} where seq > ? and app_id in (select id from apps) order by seq limit 1000""", (after,)):
            rollups = RollUps(db, now)
            rollups.count(kind, page, 1)
            rollups.save()
            after = page[-1].seq
    Groups.recount(db)
    while RollUps(db, now).trim():
        pass


# == Apps ======================================================================
# Apps, their keys, and what lets an admin in.

class App(NamedTuple):
    """An app; `keys` counts its active ones, `created_at` is in milliseconds."""

    name: str
    is_test: bool
    created_at: int
    keys: int


class Key(NamedTuple):
    """An API key without the key itself; times are in milliseconds, `hash` is its SHA-256 in hex."""

    prefix: str
    app: str
    created_at: int
    revoked_at: int | None  # None: it is active
    hash: str
    last_used: int | None = None  # the UTC day of its last request, within 90 days
    requests: int = 0  # of the seven UTC days that end today


def key_name(key_hash: bytes) -> str:
    """The name under which the uses of a key are counted."""
    return bytes(key_hash).hex()[:16]


class FirstStart(NamedTuple):
    """The secrets that a start has made; None where there was one already."""

    key: str | None
    token: str | None


class Apps(Database):
    """A database that knows apps, keys and the admin."""

    def start(self, api_key: str = "", auth_token: str = "") -> FirstStart:
        """Gives a server what it needs to begin: an app `default` where there is none, and an admin token. Secrets
        that are given are taken; else they are made, where none is stored."""
        with self.writing() as db:
            key = token = None
            apps = {name for name, in db.execute("select name from apps").fetchall()}
            known = db.execute("select revoked_at from keys where key_hash = ?", (sha256(api_key),)).fetchone()
            if known and known[0]:
                log.warning("the API key of the settings was revoked, and stays so")
            elif not known and (api_key or not apps):
                if "default" not in apps:
                    self._make_app(db, "default", False)
                key = self._insert_key(db, "default", api_key or new_key(False))
            stored = db.execute("select hash from secrets where name = 'admin_token'").fetchone()
            if not stored and not auth_token:
                auth_token = token = "bf_admin_" + secrets.token_hex(16)
            if auth_token and stored != (sha256(auth_token),):
                self._set_secret(db, "admin_token", auth_token)
                db.execute("delete from grants")  # they were given for the old token
            return FirstStart(None if api_key else key, token)

    def secret_hash(self, name: str) -> bytes:
        """The SHA-256 of the secret `admin_token` or `feed_token`; b"" where there is none."""
        with self.reading() as db:
            row = db.execute("select hash from secrets where name = ?", (name,)).fetchone()
        return row[0] if row else b""

    def is_admin(self, token: bytes) -> bool:
        """Whether this is the admin token."""
        return hmac.compare_digest(self.secret_hash("admin_token"), sha256(token))

    def is_feed(self, token: bytes) -> bool:
        """Whether this is the token of the feed."""
        return hmac.compare_digest(self.secret_hash("feed_token"), sha256(token))

    def change_feed(self, make: bool) -> str:
        """Withdraws the token of the feed. Returns a new one, which is not kept, or "" unless it is to `make` one."""
        token = "bf_feed_" + secrets.token_hex(16) if make else ""
        with self.writing() as db:
            self._set_secret(db, "feed_token", token)
        return token

    @staticmethod
    def _set_secret(db: Connection, name: str, token: str) -> None:
        db.execute("delete from secrets where name = ?", (name,))
        if token:
            db.execute("insert into secrets values (?, ?)", (name, sha256(token)))

    def grant(self, kind: str, lifetime: int) -> str:
        """A new secret that stands for the admin token, for so many milliseconds and for one kind of use."""
        secret = secrets.token_hex(16)
        with self.writing() as db:
            db.execute("delete from grants where expires_at <= ?", (self.now,))
            db.execute("insert into grants values (?, ?)", (sha256(kind + secret), self.now + lifetime))
        return secret

    def is_granted(self, kind: str, secret: str) -> bool:
        """Whether this is such a secret, and has neither expired nor been withdrawn."""
        with self.reading() as db:
            return db.execute("select 1 from grants where hash = ? and expires_at > ?",
                              (sha256(kind + secret), self.now)).fetchone() is not None

    def withdraw(self, kind: str, secret: str) -> bool:
        """Ends a grant; whether there was one."""
        if not self.is_granted(kind, secret):  # a stranger's guess must not take the lock
            return False
        with self.writing() as db:
            return db.execute("delete from grants where hash = ?", (sha256(kind + secret),)).rowcount > 0

    def is_cached_key(self, key_hash: bytes) -> bool:
        """As is_known_key, without reading the database."""
        return key_hash in self._here.seen_keys

    def is_active_key(self, key_hash: bytes) -> bool:
        """Whether the key with this SHA-256 is active."""
        with self.reading() as db:
            is_active = db.execute("select 1 from keys where key_hash = ? and revoked_at is null",
                                   (key_hash,)).fetchone() is not None
        (self._here.seen_keys.add if is_active else self._here.seen_keys.discard)(key_hash)
        return is_active

    def is_known_key(self, key_hash: bytes) -> bool:
        """Whether the key was active when it was last looked up, which may be long ago but costs nothing."""
        return self.is_cached_key(key_hash) or self.is_active_key(key_hash)

    def create_app(self, name: str, is_test: bool = False) -> str:
        """Makes an app and returns its first key, which is not kept. Raises StoreError."""
        with self.writing() as db:
            self._make_app(db, name, is_test)
            return self._insert_key(db, name, new_key(is_test))

    def _make_app(self, db: Connection, name: str, is_test: bool) -> None:
        if name != name.strip() or not 1 <= len(name) <= 100 or not name.isprintable():
            raise StoreError("an app's name is 1 to 100 printable characters, without a space at an end")
        if not db.execute("insert into apps (name, is_test, created_at) values (?, ?, ?) on conflict do nothing",
                          (name, is_test, self.now)).rowcount:
            raise StoreError(f"there is an app named {name!r} already")

    def create_key(self, app: str) -> str:
        """A further key for an app, which is not kept. Raises StoreError where there is no such app."""
        with self.writing() as db:
            return self._insert_key(db, app, new_key(self._app(db, app)[1]))

    def _insert_key(self, db: Connection, app: str, key: str) -> str:
        db.execute("insert into keys (key_hash, app_id, prefix, created_at) values (?, ?, ?, ?)",
                   (sha256(key), self._app(db, app)[0], key_prefix(key), self.now))
        return key

    @staticmethod
    def _app(db: Connection, name: str) -> tuple[int, bool]:
        """The id of an app, and whether it is a test app. Raises StoreError where there is none."""
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
            uses = {key: used for key, *used in db.execute("""
                select key, max(day), sum(case when day > ? then requests else 0 end) from key_days group by key
                """, (self.now // DAY - WEEK,))}
            return [Key(prefix, app, created_at, revoked_at, bytes(key_hash).hex(),
                        *uses.get(key_name(key_hash), (None, 0)))
                    for key_hash, prefix, app, created_at, revoked_at in db.execute("""
                        select key_hash, prefix, name, keys.created_at, revoked_at from keys
                        join apps on apps.id = app_id order by keys.created_at, prefix""")]

    def revoke_key(self, key: str) -> Key:
        """Ends the one active key that begins with this, or is it, or has this hash. Raises StoreError."""
        key = key[:-3] if key.endswith("...") else key  # as `key list` shows it
        found = [each for each in self.keys() if each.revoked_at is None and key and (
            each.prefix.startswith(key) or each.hash in (key, sha256(key).hex()))]
        if len(found) != 1:
            raise StoreError(f"{len(found) or 'no'} active keys begin with {key!r}: see 'key list'")
        with self.writing() as db:
            db.execute("update keys set revoked_at = ? where key_hash = ?", (self.now, bytes.fromhex(found[0].hash)))
        return found[0]._replace(revoked_at=self.now)


# == Commit ====================================================================
# How reports become rows. Requests that come together share one transaction, so one
# fsync serves them all: a thread that finds none open opens a group and commits it.

class Idempotency(NamedTuple):
    """How a repeated request is recognised: digests, any of which tells that it was seen before, and a digest of
    its content."""

    marks: tuple[bytes, ...] = ()
    request: bytes = b""


class Receipt(NamedTuple):
    """What was made durable: the seqs, one a report, and whether an earlier request did it."""

    seqs: range
    replayed: bool


class StoredReport(NamedTuple):
    """A report as one store hands it to another; `received_at` is in milliseconds."""

    seq: int
    app: str
    is_test: bool
    received_at: int
    clock_ahead_ms: int
    report: Crash | Event


@dataclass(eq=False)
class Submission:
    """The reports of one request on their way to the disk, and what became of them."""

    key_hash: bytes = b""
    reports: Reports = ()
    idempotency: Idempotency = Idempotency()
    error: Exception | None = None
    receipt: Receipt | None = None

    def result(self) -> Receipt:
        """The receipt. Raises the error and drops it: its traceback holds the request, and the reference cycle
        would keep megabytes until the collector runs."""
        if self.error is not None:
            try:
                raise self.error
            finally:
                self.error = None
        assert self.receipt is not None
        return self.receipt


class Group:
    """The submissions that one commit stores."""

    def __init__(self, submissions: Sequence[Submission] = ()) -> None:
        self.submissions = list(submissions)
        self.full = threading.Event()  # it has as many as the last one, most of which come again
        self.done: list[threading.Lock] = []  # one for each thread: one Event for all costs a tenth of the speed

    def join(self, submissions: Sequence[Submission], max_waiters: int, max_rows: int) -> None:
        """Takes submissions in, or gives those for which there is no room an error."""
        rows = sum(len(each.reports) for each in self.submissions)
        for each in submissions:
            if len(self.submissions) >= max_waiters or self.submissions and rows + len(each.reports) > max_rows:
                each.error = StorageUnavailable()
            else:
                self.submissions.append(each)
                rows += len(each.reports)


class Histogram:
    """Counts values by their upper bounds. One thread adds at a time; others may read."""

    def __init__(self, *bounds: float):
        self.bounds, self.counts, self.sum = (*bounds, math.inf), [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def samples(self) -> Iterator[tuple[str, float]]:
        """What Prometheus wants of it: what follows its name, and the figure."""
        totals = list(accumulate(self.counts))
        for bound, total in zip(self.bounds, totals):
            yield '_bucket{le="%s"}' % ("+Inf" if bound == math.inf else bound), total
        yield from (("_sum", self.sum), ("_count", totals[-1]))


class Process(Connections):
    """What one process keeps of a store."""

    def __init__(self) -> None:
        super().__init__()
        self.seen_keys: set[bytes] = set()
        self.group_lock = threading.Lock()  # of the next two, and of what the group has
        self.group: Group | None = None  # which submissions may still join
        self.last_size = 0  # of the group before it
        self.commit_lock = threading.Lock()
        self.group_sizes = Histogram(1, 2, 4, 8, 16, 32, 64, 128)  # requests
        self.commit_seconds = Histogram(.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5)
        self.stored = Counter(crashes=0, events=0)
        self.worker_lock, self.next_worker = threading.Lock(), threading.Lock()  # to catch up; to wait for that

    @property
    def waiting(self) -> list[Submission]:
        group = self.group
        return group.submissions if group else []


class Commit:
    """The reports of one transaction."""

    def __init__(self, db: Connection, now: int):
        self._db, self._now, self._symbols = db, now, Symbols(db)
        self._marks: list[tuple[Any, ...]] = []  # rows of `replays`
        self._uses: Counter[tuple[int, bytes]] = Counter()  # of keys, by app and key
        # By app: seqs, times of receipt, how fast the clocks were, and the reports. As columns, because a tuple
        # for each report would set off the garbage collector.
        self._columns: dict[int, tuple[list[Any], ...]] = defaultdict(lambda: ([], [], [], []))

    def add(self, submissions: Sequence[Submission]) -> None:
        """Adds requests. Each has a receipt, for when the transaction ends, or an error where it must be refused."""
        self._db.lock_apps([each.key_hash for each in submissions])
        apps: dict[bytes, int] = dict(rows_of(self._db, """
            select key_hash, app_id from (values *) as given cross join keys on key_hash = column1
            where revoked_at is null""", list({(each.key_hash,) for each in submissions})))
        accepted = [(apps[each.key_hash], each) for each in submissions if each.key_hash in apps]
        total = sum(len(each.reports) for _, each in accepted)
        seq = self._db.reserve_seqs(self._now, total) if total else 0
        known = self._earlier({(app_id, mark) for app_id, each in accepted for mark in each.idempotency.marks})
        for each in submissions:
            if each.key_hash not in apps:
                each.error = Refusal("invalid API key")
        for app_id, each in accepted:
            marks, request = each.idempotency
            earlier, seqs = next((known[app_id, mark] for mark in marks if (app_id, mark) in known), (None, range(0)))
            if earlier not in (None, request):
                each.error = Refusal("idempotency key reused with a different body")
                continue
            each.reports = self.group(each.reports)
            if earlier is None:
                seqs = range(seq, seq + len(each.reports))
                seq = seqs.stop
                ahead = clock_ahead(max(map(attrgetter("occurred_at"), each.reports)), self._now)
                self.put(app_id, seqs, [self._now] * len(seqs), [ahead] * len(seqs), each.reports)
            each.receipt = Receipt(seqs, earlier is not None)
            self._uses[app_id, each.key_hash] += 1
            for mark in marks:
                if (app_id, mark) not in known:
                    known[app_id, mark] = request, seqs
                    self._marks.append((app_id, mark, request, seqs.start, len(seqs), self._now))

    def _earlier(self, marks: set[tuple[int, bytes]]) -> dict[tuple[int, bytes], tuple[bytes | None, range]]:
        """Digest and seqs of the requests that are stored under these marks."""
        return {(app_id, bytes(mark)): (bytes(request), range(first, first + count))
                for app_id, mark, request, first, count in rows_of(self._db, """
                    select app_id, mark, request, first_seq, reports from (values *) as given
                    cross join replays on app_id = column1 and mark = column2""", list(marks))}

    def group(self, reports: Reports) -> Reports:
        """The reports, with crashes in the groups that the symbols give."""
        return [self._symbols.group(each) if type(each) is Crash else each for each in reports]

    def put(self, app_id: int, *columns: Sequence[Any]) -> None:
        """Adds reports in the order of their seqs, as columns (see __init__)."""
        for column, values in zip(self._columns[app_id], columns):
            column.extend(values)

    def save(self) -> Counter[str]:
        """Writes the rows and the figures. Returns how many reports came to each table."""
        rollups, stored, crashes = RollUps(self._db, self._now, self._symbols), Counter[str](), []
        for (app_id, columns), (kind, table) in product(self._columns.items(), TABLES.items()):
            is_own = [type(report) is kind for report in columns[-1]]
            seqs, received, ahead, given = (list(compress(column, is_own)) for column in columns)
            if not seqs:
                continue
            flags, reports = rollups.names.limit(app_id, received, given)
            # Columns of zeros are left out: binding them costs 2 % of a batch.
            ours = {"seq": seqs, "app_id": repeat(app_id), "received_at": received, **{
                name: values for name, values in (("clock_ahead_ms", ahead), ("other", flags)) if any(values)}}
            found = counted(kind, app_id, seqs, received, ahead, flags, reports)
            rollups.count(kind, found, 1)  # before the rows are there: it looks for devices that are new to a group
            self._db.append(table, (*ours, *kind._fields), list(map(add, zip(*ours.values()), reports)))
            stored[table] += len(found)
            crashes += found if kind is Crash and self._uses else []  # imports are none
        write_rows(self._db, "insert into replays values *", self._marks)
        for (app_id, key), uses in self._uses.items():
            rollups.add("key_days", app_id, self._now // DAY, key_name(key), requests=uses)
        rollups.save()
        if crashes:
            see_crashes(self._db, self._now, rollups, crashes)
        return stored


# == Store =====================================================================
# The one path by which reports reach the disk, and how they go again.

REPLAY_DAYS = 7  # how long a phone may be offline between a request and its repetition
BUSY_GROUP = 4  # requests: after a commit of so many, the next one waits for more
GATHER_SECONDS = 0.003  # how long it waits: a commit costs as much as ten reports
MAX_WAIT = 30.0  # seconds to wait for another thread's commit: longer than any lock and sync together
EXPIRE_SLICE = 10  # rows before the first look at the clock: one may be as large as a body
EXPIRE_SECONDS = 0.02  # for which a step may delete or move reports
REPORT_BYTES = 4096  # more than most reports take, with their index entries
NEARLY_FULL = 0.9  # the share of the disk or of max_db_size from which on the operator is warned
REGROUPED = 100  # crashes that a step looks at, unless EXPIRE_SECONDS are over before
MAX_SYMBOL_BYTES, MAX_BUILDS = 200_000_000, 1000  # of a build's stored symbols, and builds that have some
UPLOAD_DAYS = 7  # after which symbols go if some of their parts never came
SYMBOL_PAGES = 100  # that a step deletes: each may take 100 kB
FACT_DAYS = 7  # after which a fact goes that nobody was told
PAGE_ROWS = 1000  # that an export reads at a time,
PAGE_TEXT = 1_000_000  # and characters: a row may be as large as a body


class Store(Apps):
    """Apps, keys and reports in one SQLite file.

    `retention_days` of 0 keeps all, and None what the last server has kept. Close it, or
    use it as a context manager.

    max_waiters: requests that may wait for a commit; further ones get a 503.
    max_rows: reports that may wait; all go into the next commit (about 0.1 s).
    max_db_size: bytes, beyond which the oldest reports of the app that holds most go early; 0 is off.
    """

    make_process = Process

    def __init__(self, path: str, clock: Callable[[], float] = time.time, retention_days: int | None = 0,
                 max_waiters: int = 256, max_rows: int = 10_000, may_create: bool = True, max_db_size: int = 0):
        super().__init__(path, clock, may_create)
        self.max_waiters, self.max_rows, self.max_db_size = max_waiters, max_rows, max_db_size
        if retention_days is None:
            with self.reading() as db:
                retention_days = get_state(db, "retention_days", Settings.retention_days)
        self.retention_days: int = retention_days
        self._expire_at = 0  # when to look next for what is older
        self._judged_hour = 0  # in which it last looked for releases that are worse
        self._largest = (0, 0)  # when the app that holds most was looked up, and its id
        self._ahead: tuple[Row, list[int]] = ((), [])  # a place in a group, and the crashes that come after it

    def start(self, api_key: str = "", auth_token: str = "") -> FirstStart:
        """As Apps.start. Also keeps the retention for commands that are not told one."""
        with self.writing() as db:
            db.execute(SET_STATE, ("retention_days", self.retention_days))
        return super().start(api_key, auth_token)

    def vitals(self) -> list[tuple[str, str, str, Iterable[tuple[str, float]]]]:
        """Figures for monitoring: name, kind, meaning, and samples as Prometheus writes them. All but sizes and rows
        are of this process. No table of reports is read."""
        here = self._here
        with self.reading() as db:
            self._check_file()
            crashes, = db.execute("""
                select coalesce(sum(crashes), 0) from labels
                where app_id in (select id from apps) and field = 'exception_type' and day = ?
                """, (ALL_DAYS,)).fetchone()
        return [
            ("commit_requests", "histogram", "Requests that one commit stored.", here.group_sizes.samples()),
            ("commit_seconds", "histogram", "From asking for the write lock until the commit was durable.",
             here.commit_seconds.samples()),
            ("waiters", "gauge", "Requests that wait for the next commit.", [("", len(here.waiting))]),
            ("reports_stored_total", "counter", "Reports stored since this process began.",
             [(f'{{table="{table}"}}', n) for table, n in here.stored.items()]),
            ("crashes_kept", "gauge", "Rows of the table crashes, by their roll-up.", [("", crashes)]),
            ("file_bytes", "gauge", "Size of the database.", [("", self.size)]),
            ("wal_bytes", "gauge", "Size of its write-ahead log.", [("", _wal_size(self.path))])]

    def warnings(self) -> list[str]:
        """What an operator should know before it is too late."""
        return size_warnings(self.path, self.max_db_size)

    # Reports that come

    def add(self, key_hash: bytes, reports: Reports, idempotency: Idempotency | None = None) -> Receipt:
        """Stores reports, all or none, and returns when they are durable. They go to the app of the key
        with that SHA-256. A repeated request, as told by `idempotency`, stores nothing and has the first one's receipt.
        Raises Refusal where an Idempotency-Key comes with another request, or the key is not active at the time of the
        commit; StorageUnavailable also where too many wait already."""
        if not reports:
            raise ValueError("no reports")
        submission = Submission(key_hash, reports, idempotency or Idempotency())
        self.add_all([submission])
        return submission.result()

    def add_all(self, submissions: Sequence[Submission]) -> None:
        """Stores several requests in one commit. Each then has a receipt or an error. An unexpected error is logged,
        and they get StorageUnavailable."""
        if not submissions:
            return
        here, own, done, is_stored = self._here, Group(), threading.Lock(), False
        group = own
        try:
            with here.group_lock:
                group = here.group = here.group or own
                group.join(submissions, self.max_waiters, self.max_rows)
                if group is not own:
                    done.acquire()
                    group.done.append(done)
                if len(group.submissions) >= here.last_size:
                    group.full.set()
            if group is own:
                self._commit(here, own)
                is_stored = True
            elif any(each.error is None for each in submissions) and not done.acquire(timeout=MAX_WAIT):
                raise StorageUnavailable()  # the committing thread is slow, or was ended by a signal
        except BaseException as error:  # also a signal, if this is the main thread
            self._give_up(here, group, None if group is own else submissions, error)
        finally:
            for each in own.done:
                each.release()
        if is_stored:
            self._expire_if_due()

    def _give_up(self, here: Process, group: Group, waiting: Sequence[Submission] | None, error: BaseException) -> None:
        """Takes submissions that have waited too long out of their group; or all, if its commit has failed. Then it
        tries each alone: one bad report must not fail its neighbours."""
        with here.group_lock:
            if here.group is group and (waiting is None or isinstance(error, Exception)):
                here.group = None
            refused = group.submissions if waiting is None else waiting
            group.submissions = [each for each in group.submissions if each not in refused]
        for each in refused:
            each.error = StorageUnavailable()
        if not isinstance(error, Exception):
            raise error
        if not isinstance(error, StorageUnavailable):
            log.exception("unexpected error")
        is_outage = isinstance(error.__cause__ or error, (self.Outage, StorageUnavailable))
        for each in refused if waiting is None and len(refused) > 1 and not is_outage else ():
            try:
                each.error = None
                self._commit(here, Group([each]))
            except Exception:
                each.error = StorageUnavailable()

    def _commit(self, here: Process, group: Group) -> None:
        """Stores a group in one transaction. Until that begins, the group grows."""
        with here.commit_lock:
            if here.last_size >= BUSY_GROUP:
                group.full.wait(GATHER_SECONDS)
            began = time.monotonic()
            self._check_clock()
            with self.writing(shared=True) as db:
                with here.group_lock:
                    if here.group is group:
                        here.last_size, here.group = len(group.submissions), None
                commit = Commit(db, self.now)
                commit.add(group.submissions)
                stored = commit.save()
            here.group_sizes.add(len(group.submissions))
            here.commit_seconds.add(time.monotonic() - began)
            here.stored.update(stored)
            self._trouble = self._logged = ""

    def export(self, kind: type[Any], app: str | None = None, since: int = 0) -> Iterator[StoredReport]:
        """The reports of a kind, Crash or Event, that are here now, in the order of their seqs: of all apps or of one,
        received at `since` or later. Raises StoreError where there is no such app."""
        with self.reading() as db:
            if app is not None:
                self._app(db, app)
        last, after = self._last_seq(kind), min(max(0, first_seq(since)), MAX_NUMBER) - 1
        while page := self._page(kind, after, last):
            yield from (each for each in page if app in (None, each.app) and each.received_at >= since)
            after = page[-1].seq

    def _last_seq(self, kind: type[Any]) -> int:
        with self.reading() as db:
            return int(db.execute(f"select coalesce(max(seq), -1) from {TABLES[kind]}").fetchone()[0])

    def _page(self, kind: type[Any], after: int, last: int) -> list[StoredReport]:
        """The reports that come next. A single long read would hold up the WAL."""
        page: list[StoredReport] = []
        size = 0
        with self.reading() as db, closing(db.execute(f"""
                select seq, apps.name, is_test, received_at, clock_ahead_ms,
                    {", ".join("reports." + each for each in kind._fields)}
                from {TABLES[kind]} as reports cross join apps on apps.id = app_id
                where seq > ? and seq <= ?
                order by seq
                limit ?""", (after, last, PAGE_ROWS))) as rows:
            for seq, name, is_test, received_at, ahead_ms, *values in rows:
                page.append(StoredReport(seq, name, bool(is_test), received_at, ahead_ms, kind._make(values)))
                size += sum(len(value) for value in values if type(value) is str)
                if size > PAGE_TEXT:
                    break
        return page

    def import_(self, reports: Sequence[StoredReport]) -> Counter[str]:
        """Stores reports that another store has exported, all or none, and makes their apps, without keys. Returns how
        many were `stored`; how many were `known`, because their seq is here already, whatever is in them; and how many
        had `expired`: their time is over, or reports as old have gone from here, maybe these, which would be counted
        twice. Raises StoreError where an app is live here and a test there."""
        counts = Counter(stored=0, known=0, expired=0)
        apps: dict[tuple[str, bool], tuple[int, int]] = {}  # by name and is_test: the id, and what went early
        # What is left of a deleted app would pass for known, and then go.
        self._write_in_steps(lambda db: self._delete_remains(db, PRUNE_STEP))
        with self.writing_step() as db:
            commit = Commit(db, self.now)
            known = {(kind, seq) for kind, table in TABLES.items() for seq, in rows_of(
                db, f"select seq from (values *) as keys cross join {table} on seq = column1",
                [(each.seq,) for each in reports])}
            expired = {kind: max(self._oldest_seq - 1, get_state(db, "expired_" + table, -1))
                       for kind, table in TABLES.items()}
            for seq, app, is_test, received_at, ahead_ms, report in sorted(reports, key=itemgetter(0)):
                kind = type(report)
                if (kind, seq) in known:
                    counts["known"] += 1
                    continue
                known.add((kind, seq))
                if seq > expired[kind] and (app, is_test) not in apps:
                    apps[app, is_test] = self._imported_app(db, app, is_test)
                if seq <= expired[kind] or seq <= apps[app, is_test][1]:
                    counts["expired"] += 1
                    continue
                commit.put(apps[app, is_test][0], [seq], [received_at], [ahead_ms], commit.group([report]))
                counts["stored"] += 1
            commit.save()
            self._expire(db)
        return counts

    def _imported_app(self, db: Connection, name: str, is_test: bool) -> tuple[int, int]:
        """The id of an app, which is made where there is none, and the highest seq of its that went early."""
        if not db.execute("select 1 from apps where name = ?", (name,)).fetchone():
            self._make_app(db, name, is_test)
        app_id, was_test = self._app(db, name)
        if was_test != is_test:
            raise StoreError(f"the app {name!r} is a {'test' if was_test else 'live'} one here")
        return app_id, get_state(db, f"early_{app_id}", -1)

    # Symbols

    def put_symbols(self, uuid: str, part: SymbolPart) -> tuple[JsonObject, bool]:
        """Stores a part of a build's symbols in place of what came as the same part before, and returns how far its
        upload is, and whether this part or all of it was here already. A build that is complete stays as it is. One
        that was begun in another number of parts is begun anew. Raises Refusal where there is no room."""
        while True:
            with self.writing() as db:
                obstacle = self._obstacle(db, uuid, part)
                if not obstacle:
                    return self._put_part(db, uuid, part)
            self._drop_symbols(obstacle)

    @staticmethod
    def _obstacle(db: Connection, uuid: str, part: SymbolPart) -> str:
        """The build whose symbols have to go first, or "": this one, if it was begun in another number of parts or is
        being deleted; or, of too many, the oldest one without crashes. Raises Refusal where all have crashes."""
        if db.execute("select 1 from symbols where uuid = ? and received < parts and (parts <> ? or received = 0)",
                      (uuid, part.parts)).fetchone():
            return uuid
        builds, = db.execute("select count(*) from symbols where uuid <> ?", (uuid,)).fetchone()
        if builds < MAX_BUILDS:
            return ""
        oldest, is_needed = db.execute("""
            select uuid, uuid in (select uuid from group_images) as is_needed from symbols where uuid <> ?
            order by is_needed, uploaded_at, uuid limit 1""", (uuid,)).fetchone()
        if is_needed:
            raise Refusal("too many symbols", detail=(
                f"those of {MAX_BUILDS} builds with crashes are held; 'symbols delete {oldest}' deletes the oldest"))
        return str(oldest)

    def _put_part(self, db: Connection, uuid: str, part: SymbolPart) -> tuple[JsonObject, bool]:
        """As put_symbols, where there is room."""
        query = "select parts, received from symbols where uuid = ?"
        parts, received = db.execute(query, (uuid,)).fetchone() or (part.parts, 0)
        was_held = received == parts
        if not was_held:
            was_held = self._store_part(db, uuid, part)
            parts, received = db.execute(query, (uuid,)).fetchone()
            if received == parts:
                self._symbols_arrived(db, uuid)
        return {"uuid": uuid, "parts": parts, "received": received, "complete": received == parts}, was_held

    def _store_part(self, db: Connection, uuid: str, part: SymbolPart) -> bool:
        """Writes a part; whether it was here already. Symbols must not take the room of reports."""
        was_held = db.execute("delete from symbol_parts where uuid = ? and part = ?", (uuid, part.part)).rowcount > 0
        if was_held:  # looks at all pages of the build
            db.execute("delete from symbol_pages where uuid = ? and part = ?", (uuid, part.part))
        ours, total = db.execute("""
            select coalesce(sum(case when uuid = ? then size end), 0), coalesce(sum(size), 0) from symbol_parts
            """, (uuid,)).fetchone()
        for size, bound, problem in (
                (ours, MAX_SYMBOL_BYTES, f"those of a build may take {megabytes(MAX_SYMBOL_BYTES)};"
                                         f" 'symbols delete {uuid}' deletes what came"),
                (total, self.max_db_size // 2 or math.inf,
                 "they would take more than half of BACKFEEDR_MAX_DB_SIZE; 'symbols delete' makes room")):
            if size + part.size > bound:
                raise Refusal("too many symbols", detail=problem)
        db.execute("""
            insert into symbols values (?, ?, ?, ?, 0, 0, 0, ?)
            on conflict (uuid) do update set binary_name = excluded.binary_name, arch = excluded.arch,
                uploaded_at = excluded.uploaded_at
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
        return was_held

    @staticmethod
    def _symbols_arrived(db: Connection, uuid: str) -> None:
        """Notes the groups whose crashes the symbols of a build can name."""
        db.execute("""
            insert into regroupings select app_id, group_hash, 0, 0, '' from group_images where uuid = ?
            on conflict (app_id, group_hash) do update set received_at = 0, seq = 0""", (uuid,))

    def delete_symbols(self, uuid: str) -> str:
        """Deletes the symbols of the one build whose UUID this is, or begins so, in at least 4 characters; its UUID.
        Raises StoreError."""
        digits = (image_uuid(uuid) or uuid).replace("-", "").upper()
        if len(digits) < 4:
            raise StoreError("a build is named by at least 4 characters of its UUID")
        with self.reading() as db:
            found = db.execute("select uuid from symbols where substr(replace(uuid, '-', ''), 1, ?) = ?",
                               (len(digits), digits)).fetchall()
        if len(found) != 1:
            raise StoreError(f"the UUIDs of {len(found) or 'no'} builds begin with {uuid!r}: see 'symbols list'")
        self._drop_symbols(found[0][0])
        self._fold_in_wal()
        return str(found[0][0])

    def _drop_symbols(self, uuid: str) -> None:
        self._write_in_steps(lambda db: self._drop_pages(db, uuid))

    @staticmethod
    def _drop_pages(db: Connection, uuid: str) -> Counter[str]:
        """A step of deleting symbols; how many rows. None of them is looked up from the first step on: the page before
        a deleted one would answer for it. The build goes last, so that an interrupted deletion can go on."""
        db.execute("update symbols set received = 0, size = 0, rows = 0 where uuid = ?", (uuid,))
        deleted = db.execute("delete from symbol_parts where uuid = ?", (uuid,)).rowcount
        deleted += db.execute("""
            delete from symbol_pages where (uuid, first) in (
                select uuid, first from symbol_pages where uuid = ? order by first limit ?)
            """, (uuid, SYMBOL_PAGES)).rowcount
        return +Counter(symbols=deleted or db.execute("delete from symbols where uuid = ?", (uuid,)).rowcount)

    def _expire_symbols(self, db: Connection) -> Counter[str]:
        """A step of deleting the symbols of a build; how many rows. They go if some parts never came; or if no crash of
        the build is kept, and symbols of a later build of its binary came before the retention began, so that few of
        its hangs are kept."""
        row = db.execute("""
            select uuid from symbols
            where received < parts and uploaded_at < :given_up or uploaded_at < :expired
                and uuid not in (select uuid from group_images) and exists (
                    select 1 from symbols as later where later.binary_name = symbols.binary_name
                        and later.received = later.parts and later.uploaded_at > symbols.uploaded_at
                        and later.uploaded_at < :expired)
            order by uuid limit 1
            """, {"given_up": self.now - UPLOAD_DAYS * DAY, "expired": self._oldest_seq >> SEQ_BITS}).fetchone()
        return self._drop_pages(db, row[0]) if row else Counter()

    # Decisions

    def triage(self, group_hash: str, changes: JsonObject, app: str | None = None) -> None:
        """Writes what parse_triage has read about a group of an app, or of the one live app that has it. Raises
        Refusal; Moved where another group has its crashes."""
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
                raise missing_group(db, app, group_hash)
            decide(db, apps[0][0], group_hash, changes, self.now)

    # Crashes that move to other groups

    def _regroup(self, db: Connection) -> int:
        """A step of moving crashes to the groups that their names give now. Returns how many it looked at, and one more
        for each group that it has finished; 0: all are where they belong."""
        looked, deadline, symbols = 0, time.monotonic() + EXPIRE_SECONDS, Symbols(db)
        while row := db.execute("select * from regroupings order by app_id, group_hash limit 1").fetchone():
            looked += self._regroup_some(db, symbols, deadline, *row)
            if time.monotonic() > deadline:
                break
        return looked

    def _regroup_some(self, db: Connection, symbols: Symbols, deadline: float, app_id: int, group: str,
                      received_at: int, seq: int, target: str) -> int:
        """Moves crashes of a group that come after this place; how many it looked at, and one more at the end."""
        moved: list[tuple[str, str | None, int]] = []
        places: dict[tuple[Any, ...], tuple[str, str | None]] = {}
        looked, at = 0, [received_at, seq]
        ahead = self._crashes_ahead(db, app_id, group, *at)
        for each in ahead[:REGROUPED]:
            for received, exception_type, images, trace, extra in db.execute("""
                    select received_at, exception_type, images, stack_trace, extra from crashes where seq = ?
                    """, (each,)).fetchall():
                at = [received, each]
                key = exception_type, trace, extra and "truncated" in extra
                places[key] = place = places.get(key) or self._place(symbols, group, exception_type, trace, extra)
                moved += [(*place, each)] if place != (group, images) else []
            looked += 1
            if time.monotonic() > deadline:
                break
        self._ahead = (app_id, group, *at), ahead[looked:]
        if moved:
            target = self._move(db, symbols, app_id, group, moved, is_first=not received_at) or target
        if looked and db.execute("select 1 from crashes where app_id = ? and group_hash = ? limit 1",
                                 (app_id, group)).fetchone():
            db.execute("""
                update regroupings set received_at = ?, seq = ?, target = ? where app_id = ? and group_hash = ?
                """, (*at, target, app_id, group))
            return looked
        db.execute("delete from regroupings where app_id = ? and group_hash = ?", (app_id, group))
        if target:
            Groups.rename(db, app_id, group, target)
        return looked + 1

    def _crashes_ahead(self, db: Connection, *place: Any) -> list[int]:
        """The seqs of crashes of a group that come after a place, by the time of receipt. They are looked up for many
        steps, because that goes through all of the group."""
        known, ahead = self._ahead
        return ahead if known == place and ahead else [seq for seq, in db.execute("""
            select seq from crashes
            where app_id = ? and group_hash = ? and (received_at, seq) > (?, ?) and group_hash <> ?
            order by received_at, seq
            limit ?""", (*place, OTHER, 100 * REGROUPED))]

    @staticmethod
    def _place(symbols: Symbols, group: str, exception_type: str, trace: str | None,
               extra: str | None) -> tuple[str, str | None]:
        """Group and images of a stored crash. If its trace was cut, the frames that made its group may be gone."""
        frames = json.loads(trace or "[]")
        images = open_images(map(read_frame, frames))
        if "stack_trace" in json.loads(extra or "{}").get("truncated", ()) and not symbols.can_name(images):
            return group, images
        return group_of(exception_type, map(read_frame, symbols.named(frames))), images

    def _move(self, db: Connection, symbols: Symbols, app_id: int, group: str,
              moved: Sequence[tuple[str, str | None, int]], is_first: bool) -> str:
        """Gives crashes of a group another group and images. The group's `first_seen` goes with its first crash,
        because earlier ones may have expired. Returns the last group that is another."""
        seqs, places = [(seq,) for *_, seq in moved], {seq: place for *place, seq in moved}
        source = "from (values *) as keys cross join crashes on seq = column1"
        rollups, before = RollUps(db, self.now, symbols), counted_rows(db, Crash, source, seqs)
        traces: dict[int, str | None] = dict(rows_of(db, "select seq, stack_trace " + source, seqs))
        after = [each._replace(group_hash=places[each.seq][0], images=places[each.seq][1],
                               stack_trace=traces[each.seq]) for each in before]
        first = db.execute("select first_seen, first_version, came_at from groups where app_id = ? and group_hash = ?",
                           (app_id, group)).fetchone() if is_first else None
        rollups.figures[Groups].count(Crash, after, 1)
        db.executemany("update crashes set group_hash = ?, images = ? where seq = ?", moved)
        rollups.figures[Groups].count(Crash, before, -1)
        rollups.save()
        self._note_counting(db)
        see_crashes(db, self.now, rollups, [each for each in after if each.group_hash != group], are_moved=True)
        if first:
            db.execute("update groups set came_at = min(came_at, ?) where app_id = ? and group_hash = ?",
                       (first[2], app_id, moved[0][0]))
            db.execute("""
                update groups set first_seen = ?, first_version = ?
                where app_id = ? and group_hash = ? and first_seen > ?
                """, (*first[:2], app_id, moved[0][0], first[0]))
        return next((each for each, *_ in reversed(moved) if each != group), "")

    # Reports that go

    @property
    def _oldest_seq(self) -> int:
        """The lowest seq of the reports that are to be kept."""
        return first_seq(self.now - self.retention_days * DAY) if self.retention_days else 0

    def _expire_if_due(self) -> None:
        """Runs one step after a commit, at most once a second, or after every commit while rows are left to delete. It
        looks before it locks: the lock is on all apps, and the answer waits for it."""
        now = self.now
        if self._expire_at - SECOND <= now < self._expire_at:  # the lower bound: the clock may have been set back
            return
        deleted: Counter[str] = Counter()
        try:
            with self.reading() as db:
                is_due = 0 < self.max_db_size < self.used(db) or any(db.execute("""
                    select (select min(received_at) from replays) < :replays, (select min(seq) from crashes) < :oldest,
                        (select min(seq) from events) < :oldest, exists (select 1 from regroupings),
                        not exists (select 1 from state where name = 'trimmed_day' and value = :today),
                        exists (select 1 from state where name like 'deleted%')
                    """, {"replays": now - REPLAY_DAYS * DAY, "oldest": self._oldest_seq,
                          "today": now // DAY}).fetchone())
                is_worse = now // HOUR != self._judged_hour and worse_releases(db, now)
                self._judged_hour = now // HOUR
            if is_due or is_worse:
                with self.writing() as db:
                    if is_worse:
                        note_worse_releases(db, now)
                    deleted = self._expire(db)
        except Exception as error:  # the reports of the commit are stored, and later commits try again
            if not isinstance(error, StorageUnavailable):
                log.exception("unexpected error")
        self._expire_at = now if deleted.keys() - {"moved"} else now + SECOND

    def _expire(self, db: Connection) -> Counter[str]:
        """A step of deleting what is older than the retention; how many rows of each table. It ends after
        EXPIRE_SECONDS, because it keeps others from writing."""
        deleted: Counter[str] = Counter()
        deadline, size = time.monotonic() + EXPIRE_SECONDS, EXPIRE_SLICE
        self._note_counting(db)
        deleted["replays"] = db.execute("""
            delete from replays where received_at <= (
                select max(received_at) from (
                    select received_at from replays where received_at < ? order by received_at limit ?) as oldest)
            """, (self.now - REPLAY_DAYS * DAY, PRUNE_STEP)).rowcount
        while reports := self._delete_oldest(db, size):
            deleted += reports
            size = min(2 * size, PRUNE_STEP)
            if time.monotonic() > deadline:
                break
        deleted["moved"] = self._regroup(db)
        if get_state(db, "trimmed_day", 0) != self.now // DAY:
            deleted["sums"] = RollUps(db, self.now).trim()
            deleted += self._expire_symbols(db)
            db.execute("delete from facts where at < ?", (self.now - FACT_DAYS * DAY,))
            deleted["aliases"] = db.execute("""
                delete from group_aliases
                where not exists (
                        select 1 from groups where app_id = group_aliases.app_id and group_hash = target)
                    and not exists (
                        select 1 from regroupings where app_id = group_aliases.app_id and group_hash = target)
                """).rowcount
            if not deleted["sums"] + deleted["symbols"]:
                db.execute(SET_STATE, ("trimmed_day", self.now // DAY))
                for warning in self.warnings():
                    log.warning("%s", warning)
        return +deleted

    def _delete_oldest(self, db: Connection, size: int) -> Counter[str]:
        """Deletes some of the reports whose time is over; or else, where the database is too large, some that go early.
        How many of each table."""
        deleted: Counter[str] = Counter()
        for kind, table in TABLES.items():
            if seqs := self._delete(db, kind, 0, f"from {table} where seq < ? order by seq limit ?",
                                    (self._oldest_seq, size)):
                db.execute(SET_STATE, ("expired_" + table, seqs[-1]))
                deleted[table] = len(seqs)
        return deleted or self._delete_remains(db, size) or self._delete_early(db, size)

    @staticmethod
    def _delete_remains(db: Connection, size: int) -> Counter[str]:
        """Deletes some rows of an app that was deleted: first reports, from the latest of all apps on, because no index
        finds events by their app; then rows of the other tables."""
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
            for table in TABLES.values():  # + keeps SQLite from looking at all crashes of the app
                db.execute(f"delete from {table} where +app_id = ? and seq >= ? and seq < ?", (app_id, first, end))
            db.execute(SET_STATE, (name, first))
            return Counter(remains=1)
        for table, (_, *rest) in KEYS.items():
            key = ", ".join(rest)
            if rows := db.execute(f"""
                    delete from {table} where app_id = ? and ({key}) in (
                        select {key} from {table} where app_id = ? limit ?)""", (app_id, app_id, size)).rowcount:
                return Counter(remains=rows)
        return Counter(remains=db.execute("delete from state where name = ?", (name,)).rowcount)

    def _delete_early(self, db: Connection, size: int) -> Counter[str]:
        """Where the database is too large, deletes some of the oldest reports of the app that holds most; towards the
        end in small steps, so that hardly more go than must."""
        deleted: Counter[str] = Counter()
        excess = self.used(db) - self.max_db_size if self.max_db_size else 0
        if excess <= 0:
            return deleted
        size = min(size, max(EXPIRE_SLICE, excess // REPORT_BYTES))
        app_id = self._largest_app(db)
        last, = db.execute("""
            select max(seq) from (
                select seq from crashes where app_id = :app union all select seq from events where app_id = :app
                order by seq limit :size) as oldest""", {"app": app_id, "size": size}).fetchone()
        if last is None:
            self._largest = (0, 0)
            return deleted
        for kind, table in TABLES.items():
            deleted[table] = len(self._delete(db, kind, 0, f"from {table} where app_id = ? and seq <= ?",
                                              (app_id, last)))
        db.execute(SET_STATE, (f"early_{app_id}", last))
        return +deleted

    def _largest_app(self, db: Connection) -> int:
        """The id of the app that holds most, where a crash counts as much as ten events; 0 for none. Looked up once an
        hour, because it counts all rows."""
        if not 0 <= self.now - self._largest[0] < HOUR:
            app_id, name = db.execute("""
                select apps.id, name from apps join (
                    select app_id, 10 * count(*) as size from crashes group by app_id
                    union all select app_id, count(*) from events group by app_id) as held on app_id = apps.id
                group by apps.id, name order by sum(size) desc, apps.id limit 1""").fetchone() or (0, "")
            self._largest = (self.now, app_id)
            log.warning("the database is larger than BACKFEEDR_MAX_DB_SIZE: the oldest reports of %s go early", name)
        return self._largest[1]

    def _delete(self, db: Connection, kind: type[Any], by: int, source: str, parameters: Any) -> list[int]:
        """Deletes the reports of a query, and counts them as RollUps.count does. Returns their seqs."""
        if reports := counted_rows(db, kind, source, parameters):
            rollups = RollUps(db, self.now)
            write_rows(db, f"delete from {TABLES[kind]} where seq in (values *)", [(each.seq,) for each in reports])
            rollups.count(kind, reports, by)
            rollups.save()
        return [each.seq for each in reports]

    def _note_counting(self, db: Connection) -> None:
        """Notes that sums that are within their window now may have changed or gone. `check` must not expect older
        ones, though the latest report may be older, or be forgotten."""
        db.execute("""
            insert into state values ('counted_at', ?)
            on conflict (name) do update set value = max(state.value, excluded.value)""", (self.now,))

    def catch_up(self) -> Counter[str]:
        """Does at once what commits do by and by: deletes all rows whose time is over or whose app is deleted, and
        moves crashes to the groups that their names give now. Returns how many rows of each table went. In steps, with
        longer pauses between them, so that no reports wait for it."""
        return self._write_in_steps(self._expire)

    def prune(self) -> Counter[str]:
        """As catch_up, and gives the space back to the disk."""
        deleted = self.catch_up()
        self._shrink()
        return deleted

    def catch_up_in_background(self) -> None:
        """As catch_up, in a thread, for which one more may wait. Where it ends early, commits go on."""
        here = self._here

        def work() -> None:
            if here.next_worker.acquire(blocking=False):
                with here.worker_lock, suppress(StorageUnavailable):
                    here.next_worker.release()  # as this one may miss what comes now
                    self.catch_up()

        threading.Thread(target=work, name="backfeedr catch-up", daemon=True).start()

    def forget_device(self, device_id_hash: str) -> Counter[str]:
        """Deletes all that is kept of a device, in all apps, and takes it out of every sum; how many rows of each
        table. `first_seen` of groups and releases stays as it is."""
        deleted: Counter[str] = Counter()
        last = {kind: self._last_seq(kind) for kind in TABLES}
        for kind, table in TABLES.items():
            for page in self._pages_of(table, device_id_hash):
                with self.writing_step() as db:
                    deleted[table] += len(self._delete(
                        db, kind, -1, f"from (values *) as keys cross join {table} on seq = column1", page))
        with self.writing_step() as db:
            for kind, table in TABLES.items():  # those that have come meanwhile
                deleted[table] += len(self._delete(db, kind, -1, f"from {table} where device_id_hash = ? and seq > ?",
                                                   (device_id_hash, last[kind])))
            rollups = RollUps(db, self.now)
            deleted["devices"] = rollups.figures[Devices].forget(device_id_hash)
            rollups.save()
            self._note_counting(db)
        self._fold_in_wal()
        return +deleted

    def _pages_of(self, table: str, device_id_hash: str) -> Iterator[list[tuple[int]]]:
        """The seqs of the reports of a device, some at a time: a single long read would hold up the WAL."""
        page = [(-1,)]
        while page:
            with self.reading() as db:
                page = db.execute(f"""
                    select seq from {table} where device_id_hash = ? and seq > ? order by seq limit ?
                    """, (device_id_hash, *page[-1], EXPIRE_SLICE)).fetchall()
            yield page

    def delete_app(self, name: str) -> None:
        """Deletes an app and its keys: from now on nothing counts or lists what it sent, and its name is free. Its rows
        go as those that expire. Raises StoreError where there is none."""
        with self.writing() as db:
            app_id = self._app(db, name)[0]
            for rows in ("messages where channel_id in (select id from channels where app_id = ?)",
                         "channels where app_id = ?", "keys where app_id = ?", "facts where app_id = ?",
                         "apps where id = ?"):
                db.execute("delete from " + rows, (app_id,))
            db.executemany("delete from state where name = ?", [(f"early_{app_id}",), (f"worse_{app_id}",)])
            db.execute(SET_STATE, (f"deleted_{app_id}", MAX_NUMBER))
            for id, body in db.execute("select id, body from messages where due_at is not null").fetchall():
                message = json.loads(body)
                facts = message["data"]["facts"] = [
                    each for each in message["data"]["facts"] if each.get("app") != name]
                db.execute("update messages set body = ?, due_at = case when ? > 0 then due_at end where id = ?",
                           (_encode(message), len(facts), id))


def worse_releases(db: Connection, now: int) -> list[tuple[Pair, str]]:
    """The newest release of each live app where it is surely worse than the one before it, unless that was told; and
    the text of the verdict."""
    newest = Releases.newest(db, None, now // DAY - WEEK + 1)
    pairs = [pair for pair in Releases.pairs(db, None) if pair.app_version == newest[pair.app_id]]
    return [(pair, (verdict(*both) or {})["text"])
            for pair, both in Releases.healths(db, pairs, now).items()
            if min(both).devices >= ENOUGH and newcombe(both[0], both[1], ALARM)[1] < 0
            and get_state(db, f"worse_{pair.app_id}", 0) != pair.first_seen]


def note_worse_releases(db: Connection, now: int) -> None:
    """Writes facts of releases that are worse, once of each."""
    for pair, text in worse_releases(db, now):
        note_fact(db, "release.worse", pair.app_id, now, None, app_version=pair.app_version, before=pair.before,
                  text=text)
        db.execute(SET_STATE, (f"worse_{pair.app_id}", pair.first_seen))


def size_warnings(path: Path, max_db_size: int) -> list[str]:
    """Says where a database or its disk is nearly full."""
    texts, size, disk = [], max_db_size and path.stat().st_size, shutil.disk_usage(path.parent)
    if size > NEARLY_FULL * max_db_size:
        texts.append(f"The database has {100 * size // max_db_size} % of BACKFEEDR_MAX_DB_SIZE; beyond it the oldest"
                     " reports go early.")
    if disk.used > NEARLY_FULL * (disk.used + disk.free):
        texts.append(f"The disk is nearly full: {megabytes(disk.free)} are free.")
    return texts


# == Alerts ====================================================================
# Facts on their way to channels. The facts of a minute become a message for each channel that wants them. A message is
# taken in one short transaction, sent in none, and settled in another: if the server dies between them, it is sent
# again under the same id. A kind of channel is a function from a message to an HTTP request; CHANNELS has them all.

GATHERED = 60 * SECOND  # for which the facts of a channel become one message
LISTED = 10  # facts in a message; it counts the others
TEXT_BYTES, LINE = 1800, 300  # of a text, and characters of a line: Discord takes 2,000 characters, ntfy 4,096 bytes
HOURLY = 30  # messages of a channel; what is beyond goes with a later one
# Between the tries of a message: the schedule of Standard Webhooks.
PAUSES = [SECOND * each for each in (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)]
TRY_SECONDS = 15.0  # for a try
TAKEN = 60 * SECOND  # for which nobody else sends a message: longer than a try
LOOK_SECONDS = 1.0  # between two looks at what is due
# What a message has of a fact. Nothing else leaves the host, whatever is in `detail`.
_TOLD = ("exception_type", "place", "app_version", "build_number", "crashes", "devices", "fixed_in", "before")
# A chat shows these as they are, and calls nobody.
_NO_MARKUP = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "@\u200b", "]": "]\u200b"})


class Undelivered(StoreError):
    """A try that failed. `str()` says why, without the address, which may be secret; `status` is that of the answer, 0
    for none; `pause` is what the receiver asks for, in milliseconds."""

    def __init__(self, text: str, status: int = 0, pause: int = 0):
        super().__init__(text)
        self.status, self.pause = status, pause
        self.is_of_receiver = not 400 <= status < 500 or status in (408, 429)  # and not of this one message


Message = JsonObject  # id, channel_id, body (JSON) and tries of a row of messages; url and secret of its channel
Post = tuple[str, bytes, dict[str, str]]  # a request: its address, body and headers


def _webhook(message: Message, now: int) -> Post:
    """As https://www.standardwebhooks.com has it."""
    timestamp, key = str(now // SECOND), base64.b64decode(message["secret"][len("whsec_"):])
    mark = hmac.new(key, f"{message['id']}.{timestamp}.{message['body']}".encode(), hashlib.sha256).digest()
    return message["url"], message["body"].encode(), {
        "webhook-id": message["id"], "webhook-timestamp": timestamp,
        "webhook-signature": "v1," + base64.b64encode(mark).decode()}


def _slack(message: Message, now: int) -> Post:
    """For Slack, Mattermost, and Discord at an address that ends with /slack."""
    text = "\n".join(message_lines(message, True, _NO_MARKUP))
    return message["url"].partition("+")[2], _encode({"text": text}).encode(), {}


def _ntfy(message: Message, now: int) -> Post:
    """As JSON: a header could not carry every title."""
    url, _, topic = message["url"].partition("+")[2].rpartition("/")
    title, *lines = message_lines(message, False, {})
    link = json.loads(message["body"])["data"].get("url")
    return url + "/", _encode({"topic": topic, "title": title, "message": "\n".join(lines),
                               **({"click": link} if link else {})}).encode(), {}


CHANNELS: dict[str, Callable[[Message, int], Post]] = {  # by the scheme of the address
    "https": _webhook, "http": _webhook, "slack+https": _slack, "slack+http": _slack, "ntfy+https": _ntfy,
    "ntfy+http": _ntfy}


def message_lines(message: Message, with_links: bool, marks: Mapping[int, str]) -> list[str]:
    """The title of a message, a line for each fact as far as they fit, and how many more there are. `marks` says what
    stands for characters that are markup."""
    data = json.loads(message["body"])["data"]
    lines = [f"{each['text'][:LINE]} {each.get('url', '') if with_links else ''}".rstrip().translate(marks)
             for each in data["facts"]]
    shown = sum(size <= TEXT_BYTES for size in accumulate(len(line.encode()) + 1 for line in lines))
    more = data["more"] + len(lines) - shown
    return [data["title"].translate(marks), *lines[:shown], *([f"and {more:,} more"] if more else [])]


def post(url: str, body: bytes, headers: Mapping[str, str]) -> None:
    """Sends a request. Raises Undelivered unless its answer is a 2xx; a redirect is none."""
    parts, began = urlsplit(url), time.monotonic()
    headers = {"Content-Type": "application/json", "User-Agent": f"backfeedr/{__version__}", **headers}
    if parts.username is not None:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = "Basic " + base64.b64encode(user.encode()).decode()
    connect = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = connect(parts.hostname or "", parts.port, timeout=TRY_SECONDS)
    late = threading.Timer(TRY_SECONDS, _hang_up, [connection])  # a socket's timeout begins anew with each byte
    late.daemon = True
    late.start()
    try:
        connection.request("POST", (parts.path or "/") + ("?" + parts.query) * bool(parts.query), body, headers)
        answer = connection.getresponse()
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise Undelivered("no answer in time" if time.monotonic() - began >= TRY_SECONDS else reason) from None
    finally:
        late.cancel()
        connection.close()
    if not 200 <= answer.status < 300:
        pause = _pause(answer.headers.get("Retry-After", ""))
        raise Undelivered(f"it answered {answer.status}", answer.status, pause)


def _hang_up(connection: HTTPConnection) -> None:
    with suppress(OSError, TypeError):  # where it has no socket
        socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)


def _pause(retry_after: str) -> int:
    """Milliseconds of a Retry-After in seconds or as a date, at most a day; 0 for none."""
    pause = int(retry_after) if re.fullmatch("[0-9]{1,9}", retry_after) else 0
    with suppress(ValueError, TypeError, OverflowError):  # it is no date
        pause = pause or int(parsedate_to_datetime(retry_after).timestamp() - time.time())
    return min(max(0, pause * SECOND), DAY)


def _apprise(url: str) -> Any:
    """What sends to one of the many other kinds of address. Raises Undelivered."""
    try:
        import apprise
    except ImportError:
        raise Undelivered("an address that is not https://, slack+https:// or ntfy+https:// needs Apprise:"
                          " pip install apprise") from None
    logging.getLogger("apprise").setLevel(logging.CRITICAL)  # it logs addresses
    sender = apprise.Apprise()
    if not sender.add(url):
        raise Undelivered("that is no address that Apprise knows")
    return sender


def _notify(message: Message) -> None:
    """Sends a message through Apprise. Raises Undelivered."""
    title, *lines = message_lines(message, True, {})
    if not _apprise(message["url"]).notify(title=title, body="\n".join(lines)):
        raise Undelivered("Apprise could not send it")


def check_address(url: str) -> str:
    """The scheme of a channel's address. Raises StoreError where there is no sending to it."""
    with suppress(ValueError):
        parts = urlsplit(url)
        is_good = bool(re.fullmatch("[!-~]+", url) and parts.netloc)
        if is_good and parts.scheme not in CHANNELS:
            _apprise(url)
        elif "ntfy" in parts.scheme and not re.fullmatch(r"(/.*)?/[\w-]{1,64}", parts.path + parts.query):
            is_good = False  # it has no topic
        if is_good and (parts.scheme not in CHANNELS or parts.hostname and parts.port != 0 and not parts.fragment):
            return parts.scheme
    raise StoreError("a channel's address is like https://example.com/hook or ntfy+https://ntfy.sh/TOPIC, and has no"
                     " spaces")


def shown_address(url: str) -> str:
    """What may be shown of an address: it may have a secret in any part but its scheme, and the host of an HTTP one."""
    parts = urlsplit(url)
    host = parts.hostname if parts.scheme in CHANNELS else ""
    rest = url.partition(parts.netloc)[2] if host else url.partition("://")[2]
    return f"{parts.scheme}://{host}" + (f"{'/' * bool(host)}...{rest[-4:] if len(rest) >= 12 else ''}" if rest else "")


class Alerts:
    """The channels, and what is on its way to them. `digest` gives the facts of an app's daily digest, or that of all
    live apps for None, from a time until another."""

    def __init__(self, store: Store, public_url: str, digest: Callable[[str | None, int, int], list[JsonObject]]):
        self._store, self._url, self._digest = store, public_url.rstrip("/"), digest
        self._stopping = threading.Event()

    # Channels

    def add(self, url: str, app: str | None = None, kinds: Sequence[str] = (), with_reason: bool = False,
            hour: int = 7) -> tuple[int, str]:
        """A new channel: its id, and the secret that signs its messages, "" where it has none. Raises StoreError.
        Without an app it is of all live ones; without kinds of facts, of those that are on in FACT_KINDS. A digest
        comes at this hour, UTC."""
        kinds = list(dict.fromkeys(kinds)) or [kind for kind, is_on in FACT_KINDS.items() if is_on]
        if unknown := [kind for kind in kinds if kind not in FACT_KINDS]:
            raise StoreError(f"there is no fact {unknown[0]!r}; there are {', '.join(FACT_KINDS)}")
        is_signed, now = check_address(url) in ("https", "http"), self._store.now
        secret = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode() if is_signed else ""
        digest_at = now - (now - hour * HOUR) % DAY + DAY if "digest" in kinds else None
        with self._store.writing() as db:
            app_id = self._store._app(db, app)[0] if app else None
            db.execute("""
                insert into channels (url, secret, app_id, kinds, with_reason, digest_at, created_at, last_fact)
                select ?, ?, ?, ?, ?, ?, ?, coalesce(max(id), 0) from facts
                """, (url, secret, app_id, ",".join(kinds), with_reason, digest_at, now))
            return db.execute("select max(id) from channels").fetchone()[0], secret

    def channels(self) -> list[JsonObject]:
        """All channels, without what is secret; the times are in milliseconds."""
        with self._store.reading() as db:
            return [{**each, "address": shown_address(each.pop("url"))} for each in dict_rows(db, """
                select channels.id, url, name as app, kinds, sent_at, error, error_at, ended_at, (
                    select count(*) from messages where channel_id = channels.id and due_at is not null) as waiting
                from channels left join apps on apps.id = app_id order by channels.id""")]

    def remove(self, id: int) -> None:
        """Ends a channel and what is on its way to it. Raises StoreError where there is none."""
        with self._store.writing() as db:
            if not db.execute("delete from channels where id = ?", (id,)).rowcount:
                raise StoreError(f"there is no channel {id}: see 'alert list'")
            db.execute("delete from messages where channel_id = ?", (id,))

    def test(self, id: int) -> None:
        """Sends a message now. Raises StoreError with what came back instead of a 2xx."""
        with self._store.reading() as db:
            found = dict_rows(db, "select id as channel_id, url, secret from channels where id = ?", (id,))
        if not found:
            raise StoreError(f"there is no channel {id}: see 'alert list'")
        body = self._body("test", "backfeedr: a test", [{"type": "test", "text": f"This is a test of channel {id}."}])
        if error := self._try({**found[0], "id": _message_id(), "body": body, "tries": 0}):
            raise StoreError(f"channel {id}: {error}")

    # Messages

    def _body(self, kind: str, title: str, facts: Sequence[JsonObject], more: int = 0) -> str:
        link = facts[0].get("url") if len(facts) == 1 else self._url and self._url + "/crashes"
        return _encode({"type": kind, "timestamp": iso_time(self._store.now), "data": {
            "title": title, "facts": facts, "more": more, **({"url": link} if link else {})}})

    def _insert(self, db: Connection, channel_id: int, body: str) -> None:
        """Adds a message, and drops those that were settled more than an hour ago."""
        now = self._store.now
        db.execute("insert into messages (id, channel_id, created_at, body, due_at) values (?, ?, ?, ?, ?)",
                   (_message_id(), channel_id, now, body, now))
        db.execute("delete from messages where due_at is null and created_at <= ?", (now - HOUR,))

    def _gather(self) -> None:
        """Makes messages of the facts that have waited for a minute, and of the digests whose hour has come."""
        now = self._store.now
        with self._store.reading() as db:
            channels = dict_rows(db, """
                select channels.*, name as app,
                    exists (select 1 from facts where id > last_fact and at not between :since and :now) as has_facts, (
                        select count(*) from messages
                        where channel_id = channels.id and (created_at > :hour or due_at > taken_until)) as messages
                from channels left join apps on apps.id = app_id
                where ended_at is null order by channels.id
                """, {"since": now - GATHERED + 1, "now": now, "hour": now - HOUR})
        for channel in channels:
            if channel["digest_at"] is not None and channel["digest_at"] <= now:
                self._gather_digest(channel)
            if channel["has_facts"] and channel["messages"] < HOURLY:
                self._gather_facts(channel)

    def _gather_digest(self, channel: JsonObject) -> None:
        """Makes a message from where the last digest ended until the hour of this one, so each moment is in one."""
        at, app = channel["digest_at"], channel["app"]
        later = at + DAY * (1 + (self._store.now - at) // DAY)
        digest = self._digest(app, at - DAY, later - DAY)
        with self._store.writing() as db:
            apps = {None, *(name for name, in db.execute("select name from apps"))}  # one may have been deleted
            facts = [{"type": "digest", **each} for each in digest if each.get("app") in apps]
            if db.execute("update channels set digest_at = ? where id = ? and digest_at = ?",
                          (later, channel["id"], at)).rowcount:
                title = f"backfeedr: the last day of {app or 'all apps'}"
                self._insert(db, channel["id"], self._body("digest", title, facts))

    def _gather_facts(self, channel: JsonObject) -> None:
        """Makes a message of a channel's facts, unless the first is not a minute old."""
        with self._store.writing() as db:  # which has all facts with lower ids before it, on any engine
            rows = dict_rows(db, """
                select kind, at, name as app, facts.group_hash, detail, exception_reason
                from facts join apps on apps.id = facts.app_id
                left join groups on groups.app_id = facts.app_id and groups.group_hash = facts.group_hash
                where facts.id > :last_fact and (facts.app_id = :app_id or :app_id is null and is_test = 0)
                    and instr(',' || :kinds || ',', ',' || kind || ',')
                order by facts.id""", channel)
            if rows and self._store.now - GATHERED < rows[0]["at"] <= self._store.now:
                return
            is_ours = db.execute("""
                update channels set last_fact = (select coalesce(max(id), last_fact) from facts)
                where id = :id and last_fact = :last_fact""", channel).rowcount
            if rows and is_ours:
                facts = [self._fact(row, channel["with_reason"]) for row in rows[:LISTED]]
                counts = Counter(row["kind"].rpartition(".")[2] for row in rows)
                title = "backfeedr: " + ", ".join(f"{count:,} {word}" for word, count in counts.items())
                self._insert(db, channel["id"], self._body(facts[0]["type"], title, facts, len(rows) - len(facts)))
            db.execute("delete from facts where id <= (select min(last_fact) from channels where ended_at is null)")

    def _fact(self, row: JsonObject, with_reason: bool) -> JsonObject:
        """What a message says of a fact."""
        app, group_hash, detail = row["app"], row["group_hash"], json.loads(row["detail"])
        reason = _one_line(row["exception_reason"] or "") if with_reason else ""
        page = f"{self._url}/crashes/{group_hash}" if group_hash else f"{self._url}/releases"
        fact = {"type": row["kind"], "at": iso_time(row["at"]), "app": app, "group_hash": group_hash,
                **{name: detail.get(name) for name in _TOLD}, "reason": reason,
                "text": ": ".join(filter(None, (_fact_text(row["kind"], app, detail), reason))),
                "url": self._url and f"{page}?{urlencode({'app': app})}"}
        return {name: value for name, value in fact.items() if value not in (None, "")}

    # Delivery

    def deliver(self) -> Counter[str]:
        """Sends what is due, each message once; how many were `sent`, and of how many the try `failed`. Where a
        receiver is down, the rest of what is due to it waits for the next call: a try may take long."""
        done, down = Counter(sent=0, failed=0), set()
        self._gather()
        with self._store.reading() as db:
            due = dict_rows(db, """
                select messages.id, channel_id, body, tries, url, secret from messages
                join channels on channels.id = channel_id
                where due_at <= :now and taken_until <= :now
                order by messages.created_at, messages.id""", {"now": self._store.now})
        for message in due:
            if message["channel_id"] not in down and not self._stopping.is_set() and self._take(message):
                error = self._try(message)
                done["failed" if error else "sent"] += 1
                if error and error.is_of_receiver:
                    down.add(message["channel_id"])
        return done

    def _take(self, message: Message) -> bool:
        """Keeps a message from all others for some time; False where another has it."""
        now = self._store.now
        with self._store.writing(shared=True) as db:
            is_ours = db.execute("""
                update messages set tries = tries + 1, taken_until = :until
                where id = :id and tries = :tries and due_at <= :now and taken_until <= :now
                """, {"id": message["id"], "tries": message["tries"], "now": now, "until": now + TAKEN}).rowcount > 0
            if is_ours:  # since it was read, an app may have been deleted, and its facts with it
                message["body"], = db.execute("select body from messages where id = ?", (message["id"],)).fetchone()
            return is_ours

    def _try(self, message: Message) -> Undelivered | None:
        """Sends a message and settles what came of it. Returns what is wrong."""
        error = None
        try:
            scheme = urlsplit(message["url"]).scheme
            if scheme in CHANNELS:
                post(*CHANNELS[scheme](message, self._store.now))
            else:
                _notify(message)
        except Undelivered as failed:
            error = failed
        except Exception as unexpected:  # one channel must not hold up the others; its text may have the address
            log.error("cannot send to channel %d: %s", message["channel_id"], type(unexpected).__name__)
            error = Undelivered(type(unexpected).__name__)
        if not self._stopping.is_set():  # else it comes again after the next start
            self._settle(message, error)
        return error

    def _settle(self, message: Message, error: Undelivered | None) -> None:
        """Notes what came of a try, and when the next one is due. An answer of 410 ends the channel."""
        now, tries, channel_id = self._store.now, message["tries"], message["channel_id"]
        due_at = now + max(PAUSES[tries], error.pause) if error and tries < len(PAUSES) else None
        is_gone = error is not None and error.status == 410
        with self._store.writing(shared=True) as db:  # the channel first, so that two hosts do not wait for each other
            db.execute("""
                update channels set error = ?, error_at = ?, sent_at = coalesce(?, sent_at),
                    ended_at = coalesce(?, ended_at) where id = ?
                """, (error and str(error), error and now, None if error else now, now if is_gone else None,
                      channel_id))
            # A refused message is taken until it is due: it does not count as waiting for the receiver, see _gather.
            taken_until = 0 if error is None or error.is_of_receiver else due_at or 0
            db.execute("update messages set due_at = ?, taken_until = ? where id = ? and due_at is not null",
                       (due_at, taken_until, message["id"]))  # null: meanwhile another sent it, or its app went
            if is_gone:
                db.execute("delete from messages where channel_id = ?", (channel_id,))

    def _run(self) -> None:
        while not self._stopping.wait(LOOK_SECONDS):
            try:
                self.deliver()
            except StorageUnavailable:
                pass  # the store has said why
            except Exception:
                log.exception("unexpected error")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Delivers in a thread, for as long as the block runs. What is being sent at the end may come again."""
        self._stopping.clear()
        thread = threading.Thread(target=self._run, name="backfeedr alerts", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            thread.join(timeout=1)


def _message_id() -> str:
    return "msg_" + secrets.token_hex(12)


def _one_line(text: str) -> str:
    """At most 200 characters of what a report says."""
    return " ".join(text.split())[:200]


def _fact_text(kind: str, app: str, detail: JsonObject) -> str:
    """A fact in a line, such as New: SIGABRT in Cart.pay() (Shop 1.3.0 (48), 3 crashes, 1 device)."""
    where = f"{app} {with_build(detail.get('app_version'), detail.get('build_number'))}".rstrip()
    if kind == "release.worse":
        return _one_line(f"{where} is {detail.get('text') or 'worse'}")
    what = detail.get("exception_type", "a crash") + (f" in {detail['place']}" if detail.get("place") else "")
    fixed_in, crashes, devices = map(detail.get, ("fixed_in", "crashes", "devices"))
    parts = filter(None, (where, fixed_in and f"fixed in {fixed_in}",
                          crashes and f"{crashes:,} crash{'es' * (crashes != 1)}",
                          devices and f"{devices:,} device{'s' * (devices != 1)}"))
    return f"{kind.rpartition('.')[2].capitalize()}: {_one_line(what)} ({_one_line(', '.join(parts))})"


# == Metrics ===================================================================
# The questions asked of the store. Public questions read figures only: an answer costs what it shows, not what is
# stored. Windows are UTC days; without an app, an answer is the sum over the live apps.

SCANNED = 20_000  # events that are looked at for a page: a page may be short, and another one follow
REPORTS = 20  # of a group that are shown at once
MAX_VERSIONS = 100  # of a group that a list has
MISSING_BUILDS = 100  # whose symbols are asked for
CANDIDATES, SHOWN_GROUPS = 20, 5  # groups that are weighed for the overview, and that it shows
SESSION_EVENTS = 20  # that are shown before a crash, of the session's latest 100
_WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


class Metrics:
    """Answers in the shapes of the API, as of now. `app` is a name; Refusal where there is none such. Lists come in
    pages of `limit`: `cursor` is the `next` of the page before, None at the end."""

    def __init__(self, store: Store):
        self._store = store

    @contextmanager
    def _snapshot(self, app: str | None = None) -> Iterator[tuple[Connection, int | None]]:
        """A connection that sees one moment, and the id of the app, None for all live ones."""
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

    def _by_day(self, question: Callable[[Connection, int | None, range], JsonObject], app: str | None,
                days: int | None) -> JsonObject:
        """A figure's answer for the last days, 30 by default, labelled with their dates."""
        shown = self._last_days(days or 30)
        with self._snapshot(app) as (db, app_id):
            return {"labels": _dates(shown), **question(db, app_id, shown)}

    def daily_crashes(self, app: str | None = None, days: int | None = None) -> JsonObject:
        """Crashes per UTC day: the seven that end today from Monday to Sunday, or `days` of them by date."""
        answer = self._by_day(Crashes.per_day, app, days or WEEK)
        if days:
            return answer
        monday = -date.fromisoformat(answer["labels"][0]).weekday() % WEEK
        return {"labels": list(_WEEKDAYS), "data": answer["data"][monday:] + answer["data"][:monday]}

    def crash_types(self, app: str | None = None, days: int | None = None) -> JsonObject:
        """Crashes per exception type, the 100 most frequent first."""
        return self._labels(app, days, "exception_type", 100)

    def devices(self, app: str | None = None, days: int | None = None) -> JsonObject:
        """Crashes per device model, the ten most frequent."""
        return self._labels(app, days, "device_model", 10)

    def _labels(self, app: str | None, days: int | None, field: str, limit: int) -> JsonObject:
        with self._snapshot(app) as (db, app_id):
            return Crashes.most_frequent(db, app_id, field, self._last_days(days) if days else None, limit)

    def overview(self, app: str | None = None) -> JsonObject:
        """The seven UTC days that end today in a few figures, and the devices of the last 24 hours."""
        week = self._last_days(WEEK)
        with self._snapshot(app) as (db, app_id):
            crashes = sum(per_day(db, app_id, week, "crash_days", "crashes")["crashes"])
            sessions = sum(per_day(db, app_id, week, "session_days", "sessions")["sessions"])
            return {"crash_free_rate_7d": crash_free_rate(crashes, sessions),
                    "dau": Devices.last_24_hours(db, app_id, self._store.now),
                    "sessions_7d": sessions, "crashes_7d": crashes,
                    "top_crashes": Groups.most_frequent(db, app_id, week)}

    def active_devices(self, app: str | None = None, days: int | None = None) -> JsonObject:
        """Per UTC day, the devices of that day, of the 7 and of the 30 days that end with it."""
        return self._by_day(Devices.active, app, days)

    def sessions(self, app: str | None = None, days: int | None = None) -> JsonObject:
        """Per UTC day, the sessions that began on it; and of those that ended, how long they took. The median is of
        durations in two significant digits. It is null where none has ended, and where those of several apps have."""
        return self._by_day(Sessions.per_day, app, days)

    def event_names(self, app: str | None = None, days: int | None = None) -> JsonObject:
        """The 50 most frequent names of events, with their events per UTC day."""
        return self._by_day(EventNames.most_frequent, app, days)

    def retention(self, app: str | None = None, days: int | None = None) -> JsonObject:
        """Of the devices first seen on a UTC day, the percentage seen again 1, 7 and 30 days later: null where that
        day is not over yet, or no device is new."""
        return self._by_day(Devices.retention, app, days)

    def releases(self, app: str | None = None, sort: str | None = None) -> JsonObject:
        """What is known of each version of an app: the latest 100, in the order in which they were first seen, or if
        `sort` is "version", in that of their versions, the highest first. null: of no session or device; as a verdict,
        of no release before it."""
        if sort not in (None, "version", "first_seen"):
            raise Refusal("invalid sort")
        with self._snapshot(app) as (db, app_id):
            rows = Releases.latest(db, app_id, self._last_days(WEEK))
            verdicts = self._verdicts(db, app_id, {(row["app_id"], row["app_version"]) for row in rows})
        if sort == "version":
            rows.sort(key=lambda row: version_key(row["app_version"]), reverse=True)
        return {"releases": list(fitting({
            **{name: row[name] for name in ("app", "app_version", "sessions", "crashes", "crashed_sessions")},
            "crash_free_sessions": crash_free_rate(row["crashed_sessions"] or row["crashes"], row["sessions"])
            if row["sessions"] else None, "by": "session" if row["crashed_sessions"] else "count",
            "crash_free_devices": crash_free_rate(row["crashed_devices"], row["devices"]) if row["devices"] else None,
            "adoption": round(100 * (row["recent"] or 0) / row["of_all"], 2) if row["of_all"] else 0.0,
            "first_seen": iso_time(row["first_seen"]), "last_seen": iso_time(row["last_seen"]),
            "verdict": verdicts.get((row["app_id"], row["app_version"]))} for row in rows))}

    def _verdicts(self, db: Connection, app_id: int | None, releases: Container[Row]) -> dict[Row, JsonObject]:
        """The verdicts of these releases, by app id and version; of those that have one."""
        pairs = [pair for pair in Releases.pairs(db, app_id) if pair[:2] in releases]
        return {pair[:2]: {**said, "before": pair.before}
                for pair, both in Releases.healths(db, pairs, self._store.now).items() if (said := verdict(*both))}

    def newest_releases(self, app: str | None = None) -> list[JsonObject]:
        """The newest release of each app with its verdict, those that are worse first. An old version that comes late
        is not the newest."""
        with self._snapshot(app) as (db, app_id):
            newest = Releases.newest(db, app_id, self._last_days(WEEK)[0])
            verdicts = self._verdicts(db, app_id, set(newest.items()))
            names = dict(db.execute("select id, name from apps"))
        rows = [{"app": names[each[0]], "app_version": each[1], "verdict": verdicts.get(each)}
                for each in newest.items()]
        return sorted(rows, key=lambda row: ((row["verdict"] or {}).get("word") != "worse", row["app"]))

    def digest(self, app: str | None, since: int, until: int) -> list[JsonObject]:
        """What was received between two times, in milliseconds, in a few facts: is the newest release worse, what is
        new, what is fixed? A fact that names an app has it as `app`, so that it goes when the app is deleted."""
        verdicts = [{"app": each["app"], "text": f"{each['app']} {each['app_version']} is {each['verdict']['text']}"}
                    for each in self.newest_releases(app) if each["verdict"]]
        with self._snapshot(app) as (db, app_id):
            parameters = {"app": app_id, "since": since, "until": until, "other": OTHER}
            crashes = per_day(db, app_id, self._last_days(3), "crash_days", "crashes")["crashes"]
            new = db.execute(f"""
                select exception_type, place from groups
                where {APPS} and came_at >= :since and came_at < :until and group_hash <> :other
                order by came_at desc, first_seen desc""", parameters).fetchall()
            resolved, regressed = db.execute(f"""
                select count(case when state = 'resolved' and changed_at >= :since and changed_at < :until then 1 end),
                    count(case when regressed_at >= :since and regressed_at < :until then 1 end)
                from triage where {APPS}""", parameters).fetchone()
        names = [f"; {_one_line(kind)}{f' in {_one_line(place)}' if place else ''}" for kind, place in new[:3]]
        return [*verdicts[:LISTED], *({"text": text} for text in (
            f"Crashes: {crashes[1]:,} yesterday, {crashes[0]:,} the day before",
            f"New: {len(new):,}{''.join(names)}",
            f"Resolved: {resolved:,}; regressed: {regressed:,}"))]

    def news(self, app: str | None = None, limit: int = 50) -> list[JsonObject]:
        """The groups that came or regressed last, the latest first; `at` is in milliseconds."""
        with self._snapshot(app) as (db, app_id):
            return dict_rows(db, f"""
                select news.what, news.at, news.app_id, apps.name as app, apps.created_at, news.group_hash,
                    exception_type, coalesce(place, '') as place, first_version
                from (
                    select 'new' as what, came_at as at, app_id, group_hash from groups
                    where {APPS} and group_hash <> :other and crashes > 0  -- else it has no page
                    union all select 'regressed', regressed_at, app_id, group_hash from triage
                    where {APPS} and regressed_at is not null
                    order by at desc, what, app_id, group_hash limit :limit) as news
                join apps on apps.id = news.app_id
                join groups on groups.app_id = news.app_id and groups.group_hash = news.group_hash
                order by news.at desc, news.what, news.app_id, news.group_hash
                """, {"app": app_id, "other": OTHER, "limit": limit})

    # Behind the admin token: these read the reports, a page at a time

    def groups(self, app: str | None = None, version: str | None = None, days: int | None = None,
               text: str | None = None, state: str | None = None, sort: str | None = None, limit: int = 50,
               cursor: str | None = None) -> JsonObject:
        """The groups of the crashes that are kept: those with most crashes first, or as `sort` says. `version` may end
        with *; `text` is in what the list shows, or in symbols and files of the app in the latest crash; `state` is one
        of GROUPS_OF: a decision also lists groups whose crashes have expired. `is_new`: first seen in this version, or
        without one, received first within 7 days."""
        if state not in GROUPS_OF:
            raise Refusal("invalid state", detail=f"it is none of {', '.join(filter(None, GROUPS_OF))}")
        if sort not in (None, *SORTS):
            raise Refusal("invalid sort")
        column = SORTS[sort or "crashes"]
        value, group = _parse_cursor(cursor, r"([0-9]{1,18})-([0-9a-f]{16}|\(other\))", (MAX_NUMBER, ""))
        shown: Sequence[int | None] = self._last_days(days) if days else [None]
        week = self._last_days(WEEK)[0] * DAY
        with self._snapshot(app) as (db, app_id):
            parameters = {"app": app_id, **_version_filter(version), "first": shown[0], "last": shown[-1],
                          "text": text and text.casefold(), "limit": limit + 1, "value": int(value), "group": group,
                          "week": week, "since": (shown[0] or 0) * DAY - MAX_SKEW if days else 0, "state": state,
                          "candidates": None}  # all groups
            if days and days <= WEEK and column == "count" and not (version or text or state or cursor):
                parameters["candidates"] = self._candidates(db, app_id, self._last_days(days), limit + 1)
            rows = dict_rows(db, f"""
                select * from (
                    select group_hash, sum(crashes) as count, sum(devices) as devices, max(latest) as last_seen, (
                        select coalesce(min(first_seen), 0) from groups
                        where {APPS} and group_hash = counts.group_hash) as first_seen
                    from ({CRASHES_OF_GROUPS if version or days else SUMS_OF_GROUPS}) as counts
                    where {GROUPS_OF[state]} and (:text is null or (app_id, group_hash) in (
                        select app_id, group_hash from groups where {APPS} and instr(search, :text)))
                    group by group_hash) as found
                where {column} < :value or {column} = :value and group_hash > :group
                order by {column} desc, group_hash
                limit :limit""", parameters)
            groups, size = [], 0
            for row in rows[:limit]:
                if size > PAGE_TEXT:
                    break
                groups.append(self._listed(db, row, {**parameters, "group": row["group_hash"]}))
                size += sum(map(len, groups[-1]["versions"]))
        last = rows[len(groups) - 1] if rows[len(groups):] else None
        return {"groups": groups, "next": last and f"{last[column]}-{last['group_hash']}"}

    def _candidates(self, db: Connection, app_id: int | None, days: range, limit: int) -> str | None:
        """The groups with most crashes on these days, divided by spaces. They are found by sums, which is quicker. None
        if the sums may differ from the crashes: some have expired, or a clock that was fast has deleted sums."""
        gone, = db.execute("select max(value) from state where name like 'expired%' or name like 'early%'").fetchone()
        sums, expected = (per_day(db, app_id, days, table, "crashes") for table in ("group_days", "crash_days"))
        if (gone or 0) >= first_seq(days[0] * DAY - MAX_SKEW) or sums != expected:
            return None
        return " ".join(group["group_hash"] for group in Groups.most_frequent(db, app_id, days, limit))

    def _listed(self, db: Connection, row: JsonObject, parameters: JsonObject) -> JsonObject:
        """A group as a list has it."""
        found = self._named(db, parameters["app"], row["group_hash"])
        first, version = (found.pop("first_version") or "")[:parameters["length"]], parameters["version"]
        is_new = (found["came_at"] or 0) >= parameters["week"] if version is None else first == version
        versions = [each for each, in db.execute(f"""
            select app_version from crashes
            where {APPS} and group_hash = :group and received_at >= :since and app_version is not null and {OF_VERSION}
                and (:first is null or {COUNTED_AT} / {DAY} between :first and :last)
            group by app_version
            order by count(*) desc, app_version
            limit {MAX_VERSIONS}""", parameters)]
        return {**_shown_group({**found, **row}), "versions": sorted(versions, key=version_key), "is_new": is_new}

    def _named(self, db: Connection, app_id: int | None, group_hash: str) -> JsonObject:
        """What is known of a group; of several apps, the name that it has where it was seen last. Of one whose crashes
        have expired, what was decided. Empty where nothing is."""
        return next(iter(dict_rows(db, f"""
            select :group as group_hash, known.app_id, coalesce(exception_type, '') as exception_type,
                coalesce(exception_reason, '') as exception_reason, coalesce(place, '') as place,
                coalesce(sum(crashes) over (), 0) as count, coalesce(sum(devices) over (), 0) as devices,
                min(first_seen) over () as first_seen, max(last_seen) over () as last_seen,
                min(came_at) over () as came_at, first_value(first_version) over (
                    order by coalesce(first_seen, {MAX_NUMBER}), known.app_id) as first_version,
                coalesce(state, 'open') as state, fixed_in, regressed_at, changed_at
            from (select app_id from groups where {APPS} and group_hash = :group
                union select app_id from triage where {APPS} and group_hash = :group) as known
            left join groups on groups.app_id = known.app_id and groups.group_hash = :group
            left join triage on triage.app_id = known.app_id and triage.group_hash = :group
            order by coalesce(groups.last_seen, 0) desc, known.app_id
            limit 1""", {"app": app_id, "group": group_hash})), {})

    def group(self, group_hash: str, app: str | None = None, limit: int = REPORTS,
              cursor: str | None = None) -> JsonObject:
        """A group, its spread, its history, and its crashes, the latest first. Refusal where no crash of it is kept,
        nor a decision."""
        at, report_id = _parse_cursor(cursor, "([0-9]{1,18})-([0-7][0-9a-f]{15})", (MAX_NUMBER, "0"))
        with self._snapshot(app) as (db, app_id):
            parameters = {"app": app_id, "group": group_hash, "at": int(at), "seq": int(report_id, 16),
                          "limit": limit + 1}
            found = self._named(db, app_id, group_hash)
            if not found or not found["count"] and found["changed_at"] is None:
                raise missing_group(db, app, group_hash)
            spread = {name: labelled(db.execute(f"""
                select {column}, count(*) from crashes
                where {APPS} and group_hash = :group and {column} is not null
                group by {column}
                order by count(*) desc, {column}
                limit 20""", parameters)) for name, column in (
                    ("versions", "app_version"), ("systems", "os_version"), ("device_models", "device_model"))}
            page = db.execute(f"""
                select seq, {COUNTED_AT} as at from crashes
                where {APPS} and group_hash = :group and ({COUNTED_AT}, seq) < (:at, :seq)
                order by at desc, seq desc
                limit :limit""", parameters).fetchall()
            history = dict_rows(db, """
                select at, what, detail from group_history where app_id = ? and group_hash = ? order by entry
                """, (found["app_id"], group_hash))
            missing = self._missing_builds(db, app_id, group_hash, 3)
            reports = _reports(db, "crashes", [seq for seq, _ in page[:limit]])
        seq, at = page[len(reports) - 1] if reports else (0, 0)
        return {**_shown_group(found), **spread, "missing_symbols": missing,
                "history": [{**each, "at": iso_time(each["at"])} for each in history], "reports": reports,
                "next": f"{at}-{crash_id(seq)}" if page[len(reports):] else None}

    def attention(self, app: str | None = None) -> JsonObject:
        """Of the open groups that crashed on the seven UTC days that end today: `new` are those that were new or
        regressed then, the latest first, of `new_count`; `first` those to be fixed first, by their `score`: devices
        that crashed in the newest release of their app, halved for each day since the last crash. A group of two apps
        is two. A group of which neither a crash nor a decision is kept has no page, so it is left out."""
        week = self._last_days(WEEK)
        since = week[0] * DAY
        with self._snapshot(app) as (db, app_id):
            parameters = {"app": app_id, "first": week[0], "last": week[-1], "since": since - MAX_SKEW}
            rows = dict_rows(db, f"""
                select groups.app_id, groups.group_hash, sums.crashes as count, groups.devices, last_seen,
                    max(came_at, coalesce(regressed_at, 0)) as news_at
                from (
                    select app_id, group_hash, sum(crashes) as crashes from group_days
                    where {APPS} and day between :first and :last and group_hash <> '{OTHER}'
                    group by app_id, group_hash) as sums
                cross join groups on groups.app_id = sums.app_id and groups.group_hash = sums.group_hash
                left join triage on triage.app_id = groups.app_id and triage.group_hash = groups.group_hash
                where coalesce(state, 'open') = 'open' and (groups.crashes > 0 or changed_at is not null)
                order by count desc, groups.group_hash, groups.app_id""", parameters)
            new = sorted((row for row in rows if row["news_at"] >= since), key=itemgetter("news_at"), reverse=True)
            by_devices = sorted(rows[CANDIDATES:], key=itemgetter("devices"), reverse=True)
            first = rows[:CANDIDATES] + by_devices[:CANDIDATES]  # one device may crash in a loop
            newest = Releases.newest(db, app_id, week[0])
            for row in first:
                row.update(self._weight(db, {**parameters, **row, "newest": newest.get(row["app_id"])}))
            first.sort(key=itemgetter("score", "devices", "count"), reverse=True)
            return {"new": self._noticed(db, new, since), "new_count": len(new),
                    "first": self._noticed(db, first, since)}

    def _noticed(self, db: Connection, rows: Sequence[JsonObject], since: int) -> list[JsonObject]:
        """The first of these groups, as the overview shows them."""
        apps = dict(db.execute("select id, name from apps"))
        found = [{**self._named(db, row["app_id"], row["group_hash"]), **row} for row in rows[:SHOWN_GROUPS]]
        return [{**_shown_group(row), "app": apps[row["app_id"]], "is_new": row["came_at"] >= since} for row in found]

    def _weight(self, db: Connection, group: JsonObject) -> JsonObject:
        devices, newest = db.execute(f"""
            select count(distinct device_id_hash),
                count(distinct case when app_version = :newest then device_id_hash end)
            from crashes
            where app_id = :app_id and group_hash = :group_hash and received_at >= :since
                and {COUNTED_AT} / {DAY} between :first and :last""", group).fetchone()
        return {"devices": devices, "score": newest * 0.5 ** (max(0, self._store.now - group["last_seen"]) / DAY)}

    def neighbours(self, crash: JsonObject, app: str | None = None) -> tuple[str | None, str | None]:
        """The ids of the crashes of its group before and after one."""
        with self._snapshot(app) as (db, app_id):
            parameters = {"app": app_id, "group": crash["group_hash"], "seq": int(crash["id"], 16)}
            older, newer = (db.execute(f"""
                select seq from crashes
                where {APPS} and group_hash = :group and ({COUNTED_AT}, seq) {side} (
                    select {COUNTED_AT}, seq from crashes where seq = :seq)
                order by {COUNTED_AT} {order}, seq {order}
                limit 1""", parameters).fetchone() for side, order in (("<", "desc"), (">", "asc")))
        return older and crash_id(older[0]), newer and crash_id(newer[0])

    def events_before(self, crash: JsonObject) -> list[JsonObject]:
        """The last events of its session up to a crash, by the device's clock, the oldest first."""
        if "session_id" not in crash:
            return []
        found = self.events(crash["app"], session_id=crash["session_id"], limit=100,
                            device_id_hash=crash.get("device_id_hash"))["events"]
        at = parse_time(crash["occurred_at"])
        found = [event for event in found if parse_time(event["occurred_at"]) <= at]
        return sorted(found, key=lambda event: (parse_time(event["occurred_at"]), event["id"]))[-SESSION_EVENTS:]

    def next_build(self, group_hash: str, app: str) -> str:
        """The first build that may be without the fault of a group: the newest of the app, or the one after it where
        the group has crashed there. "" where no version is known."""
        with self._snapshot(app) as (db, app_id):
            version = Releases.newest(db, app_id, self._last_days(WEEK)[0]).get(app_id or 0, "")
            builds = db.execute("""
                select build_number from builds where app_id = ? and app_version = ? order by first_seen desc limit 100
                """, (app_id, version))
            build = max((each for each, in builds), key=version_key, default="")
            has_crashed = db.execute("""
                select 1 from crashes where app_id = ? and group_hash = ? and app_version = ?
                    and coalesce(build_number, '') = ? limit 1""", (app_id, group_hash, version, build)).fetchone()
        name = with_build(version, build)
        return re.sub("[0-9]+(?=[^0-9]*$)", lambda last: str(int(last[0]) + 1), name) if has_crashed else name

    def group_days(self, groups: Sequence[str], app: str | None = None, version: str | None = None,
                   days: int = 30) -> JsonObject:
        """Of each of these groups, its apps, and its crashes on each of the last days, the oldest first."""
        shown = self._last_days(days)
        with self._snapshot(app) as (db, app_id):
            parameters = {"app": app_id, **_version_filter(version), "first": shown[0], "last": shown[-1],
                          "since": shown[0] * DAY - MAX_SKEW}
            return {"labels": _dates(shown), "groups": {
                group_hash: self._days_of(db, {**parameters, "group": group_hash}, shown) for group_hash in groups}}

    def _days_of(self, db: Connection, parameters: JsonObject, shown: range) -> JsonObject:
        counts = dict(db.execute(f"""
            select {COUNTED_AT} / {DAY} as day, count(*) from crashes
            where {APPS} and group_hash = :group and received_at >= :since and {OF_VERSION}
            group by day""", parameters))
        apps = db.execute(f"""
            select name from apps where {APPS.replace("app_id", "id", 1)} and (
                exists (select 1 from crashes where app_id = apps.id and group_hash = :group)
                or exists (select 1 from triage where app_id = apps.id and group_hash = :group))
            order by name""", parameters).fetchall()
        return {"days": [counts.get(day, 0) for day in shown], "apps": [name for name, in apps]}

    def is_empty(self, app: str | None = None) -> bool:
        """Whether nothing was received of an app but ends of sessions."""
        with self._snapshot(app) as (db, app_id):
            return not any(db.execute(f"""
                select exists (select 1 from crash_days where {APPS}), exists (select 1 from session_days where {APPS}),
                    exists (select 1 from event_names where {APPS})""", {"app": app_id}).fetchone())

    def crash(self, id: str, app: str | None = None) -> JsonObject:
        """One crash, as it was sent. Refusal where it is not kept."""
        with self._snapshot(app) as (db, app_id):
            seq = int(id, 16) if re.fullmatch("[0-7][0-9a-f]{15}", id) else -1
            if not db.execute(f"select 1 from crashes where seq = :seq and {APPS}",
                              {"seq": seq, "app": app_id}).fetchone():
                raise Refusal("not found")
            return _reports(db, "crashes", [seq])[0]

    def events(self, app: str | None = None, type: str | None = None, name: str | None = None,
               session_id: str | None = None, limit: int = 50, cursor: str | None = None,
               oldest_first: bool = False, device_id_hash: str | None = None) -> JsonObject:
        """The latest events that are kept. A page may be short of `limit`, or even empty, and have a next one."""
        order, start = ("asc", -1) if oldest_first else ("desc", MAX_NUMBER)
        digits, = _parse_cursor(cursor, "(?:evt_)?([0-7][0-9a-f]{15})", (f"{start:x}",))
        start = int(digits, 16)
        with self._snapshot(app) as (db, app_id):
            parameters = {"app": app_id, "type": type, "name": name, "session": session_id, "limit": limit + 1,
                          "device": device_id_hash, "scanned": SCANNED}
            first, last = 0, MAX_NUMBER
            if session_id is not None:  # its events are between its first and its last
                first, last = db.execute(f"""
                    select coalesce(min(first_seq), 0), coalesce(max(last_seq), -1) from sessions
                    where {APPS} and session_id = :session""", parameters).fetchone()
            parameters.update(first=max(first, start + 1) if oldest_first else first,
                              last=last if oldest_first else min(last, start - 1))
            scan = f"from events where seq between :first and :last order by seq {order} limit :scanned"
            seqs = [seq for seq, in db.execute(f"""
                select seq from (select seq, app_id, type, name, session_id, device_id_hash {scan}) as scanned
                where {APPS} and (:type is null or type = :type) and (:name is null or name = :name)
                    and (:session is null or session_id = :session)
                    and (:device is null or device_id_hash = :device)
                order by seq {order}
                limit :limit""", parameters)]
            end = db.execute(f"select seq from (select seq {scan}) as scanned order by seq {order}"
                             " limit 1 offset :scanned - 1", parameters).fetchone()
            found = _reports(db, "events", seqs[:limit])
        following = found[-1]["id"] if seqs[len(found):] else event_ids(end)[0] if end else None
        return {"events": found, "next": following}

    def symbols(self, app: str | None = None) -> JsonObject:
        """The builds whose symbols are held, the newest first; and those whose symbols are missing, with the crashes
        that could be named by them, the most frequent first."""
        with self._snapshot(app) as (db, app_id):
            held = dict_rows(db, """
                select uuid, binary_name as binary, arch, parts, rows, size, received = parts as complete, uploaded_at
                from symbols order by uploaded_at desc, uuid""")
            return {"symbols": [{**each, "complete": bool(each["complete"]),
                                 "uploaded_at": iso_time(each["uploaded_at"])} for each in held],
                    "missing": self._missing_builds(db, app_id)}

    def _missing_builds(self, db: Connection, app_id: int | None, group_hash: str | None = None,
                        limit: int | None = None) -> list[JsonObject]:
        """The builds whose symbols are missing, of all groups or of one."""
        return [self._missing_build(db, **each) for each in dict_rows(db, f"""
            select uuid, app_id, group_hash, total as crashes from (
                select uuid, app_id, group_hash, sum(crashes) over (partition by uuid) as total, row_number() over (
                    partition by uuid order by crashes desc, app_id, group_hash) as place
                from group_images
                where {APPS} and (:group is null or group_hash = :group)
                    and uuid not in (select uuid from symbols where received = parts)) as ranked
            where place = 1
            order by total desc, uuid
            limit :limit""", {"app": app_id, "group": group_hash, "limit": limit or MISSING_BUILDS})]

    @staticmethod
    def _missing_build(db: Connection, uuid: str, app_id: int, group_hash: str, crashes: int) -> JsonObject:
        """What is known of a build: what its latest crash says, in the group where it has most."""
        app, version, build, trace = db.execute("""
            select name, app_version, build_number, stack_trace from (
                select * from crashes where seq in (
                    select seq from crashes where app_id = ? and group_hash = ? order by seq desc limit 20)) as latest
            join apps on apps.id = app_id
            where instr(images, ?)
            order by received_at desc, seq desc
            limit 1""", (app_id, group_hash, uuid)).fetchone() or (None, None, None, None)
        binaries = (frame.binary for frame in map(read_frame, json.loads(trace or "[]")) if frame.uuid == uuid)
        return {"uuid": uuid, "binary": next(filter(None, binaries), None), "app": app, "app_version": version,
                "build_number": build, "crashes": crashes}

    def device(self, device_id_hash: str) -> JsonObject:
        """Everything that is kept of a device, in all apps."""
        device = device_key(device_id_hash)
        with self._snapshot() as (db, _):
            found = {
                "apps": dict_rows(db, """
                    select app_id, name as app, first_day, last_hour from devices join apps on apps.id = app_id
                    where device = ? order by name""", (device,)),
                **{table: _reports(db, table, [seq for seq, in db.execute(f"""
                    select seq from {table} where device_id_hash = ? and app_id in (select id from apps)
                    order by seq""", (device_id_hash,))], MAX_NUMBER)
                   for table in TABLES.values()}}
            for app in found["apps"]:
                app["versions"] = sorted((version for version, in db.execute(
                    "select app_version from device_versions where app_id = ? and device = ?",
                    (app.pop("app_id"), device))), key=version_key)
                app["first_seen"] = iso_time(app.pop("first_day") * DAY)
                app["last_seen"] = iso_time(app.pop("last_hour") * HOUR)
        return found


def missing_group(db: Connection, app: str | None, group_hash: str) -> Refusal:
    """What is said of a group of which nothing is known: where its crashes are, or that there is none."""
    alias = db.execute("""
        select target from group_aliases
        where app_id in (select id from apps where name = :app or :app is null and is_test = 0) and group_hash = :group
        order by app_id""", {"app": app, "group": group_hash}).fetchone()
    return Moved(alias[0]) if alias else Refusal("not found")


def _shown_group(found: JsonObject) -> JsonObject:
    """What an answer has of a group."""
    shown = {name: value for name, value in found.items() if name not in ("app_id", "came_at", "changed_at")}
    return {**shown, **{name: iso_time(found[name]) if found[name] else None
                        for name in ("first_seen", "last_seen", "regressed_at")}}


def _dates(days: Iterable[int]) -> list[str]:
    return [iso_time(day * DAY)[:10] for day in days]


def _reports(db: Connection, table: str, seqs: Sequence[int], max_text: int = PAGE_TEXT) -> list[JsonObject]:
    """Crashes or events as they were sent, without what was absent; and their app, and when they were received. Of
    more than so many characters, the first."""
    apps, reports, size, symbols = dict(db.execute("select id, name from apps")), [], 0, Symbols(db)
    for seq in seqs:
        row, = dict_rows(db, f"select * from {table} where seq = ?", (seq,))
        size += sum(len(value) for value in row.values() if type(value) is str)
        report = as_sent({"id": row.pop("id"), "app": apps.get(row.pop("app_id")), **row}, iso_time)
        _name_frames(symbols, report if table == "crashes" else report.get("properties", {}))
        reports.append(report)
        if size > max_text:
            break
    return reports


def _name_frames(symbols: Symbols, report: JsonObject) -> None:
    """Names the frames of a stack trace, and keeps those that were sent beside."""
    frames = report.get("stack_trace")
    if type(frames) is list and all(type(frame) is dict for frame in frames):
        report["stack_trace"] = list(symbols.named(frames, SHOWN_LOOKUPS - symbols.lookups))
        if report["stack_trace"] != frames:
            report["raw_stack_trace"] = frames


def as_sent(row: Mapping[str, Any], time_text: Callable[[int], str]) -> JsonObject:
    """A report as it was sent, from its row."""
    hidden = ("seq", "other", "images")
    report = {name: value for name, value in row.items() if value is not None and name not in hidden}
    if not report["clock_ahead_ms"]:
        del report["clock_ahead_ms"]
    for name in {"stack_trace", "properties", "extra"} & report.keys():
        report[name] = json.loads(report[name])
    for name in ("received_at", "occurred_at"):
        report[name] = time_text(report[name])
    if "is_charging" in report:
        report["is_charging"] = bool(report["is_charging"])
    return report


_IN_TRIAGE = "(app_id, group_hash) {} (select app_id, group_hash from triage where {})"
GROUPS_OF: dict[str | None, str] = {  # a state that a list is asked for: the crashes of its groups
    None: "1 = 1", "open": _IN_TRIAGE.format("not in", "state <> 'open'"),
    "resolved": _IN_TRIAGE.format("in", "state = 'resolved'"), "muted": _IN_TRIAGE.format("in", "state = 'muted'"),
    "regressed": _IN_TRIAGE.format("in", "state = 'open' and regressed_at is not null"),  # since it was resolved last
    "new": "(app_id, group_hash) in (select app_id, group_hash from groups where came_at >= :week)"}
SORTS = {"crashes": "count", "devices": "devices", "last_seen": "last_seen", "first_seen": "first_seen"}
_OUTLIVES_CRASHES = ":state in ('resolved', 'muted', 'regressed')"
SUMS_OF_GROUPS = f"""
    select app_id, group_hash, crashes, devices, last_seen as latest from groups
    where {APPS} and (crashes > 0 or {_OUTLIVES_CRASHES})
    union all select app_id, group_hash, 0, 0, 0 from triage where {APPS} and {_OUTLIVES_CRASHES}"""
OF_VERSION = "(:version is null or substr(app_version, 1, :length) = :version)"


CRASHES_OF_GROUPS = f"""
    select known.app_id, known.group_hash, count(*) as crashes, count(distinct device_id_hash) as devices,
        max({COUNTED_AT}) as latest
    from (select app_id, group_hash from groups where {APPS} and last_seen >= :since
        and (:candidates is null or instr(:candidates, group_hash))) as known
    cross join crashes on crashes.app_id = known.app_id and crashes.group_hash = known.group_hash
    where received_at >= :since and {OF_VERSION} and (:first is null or {COUNTED_AT} / {DAY} between :first and :last)
    group by known.app_id, known.group_hash"""


def _version_filter(version: str | None) -> JsonObject:
    """The parameters of OF_VERSION. A version that ends with * stands for all that begin so."""
    if version and version.endswith("*"):
        return {"version": version[:-1], "length": len(version) - 1}
    return {"version": version, "length": MAX_TEXT}


def _parse_cursor(cursor: str | None, pattern: str, default: Any) -> Any:
    """The groups of the pattern in a cursor; the default where there is none. Raises Refusal."""
    match = re.fullmatch(pattern, cursor or "")
    if cursor is not None and match is None:
        raise Refusal("invalid cursor")
    return match.groups() if match else default


def crash_free_rate(crashes: int, sessions: int) -> float:
    """Percent of sessions without a crash, with two decimals."""
    if not sessions:
        return 0.0 if crashes else 100.0
    return round(max(0.0, 100 * (1 - crashes / sessions)), 2)


# == Requests ==================================================================
# Reads what a request carries, and lists every error that a client can get. bottle's own readers are not used: they
# stop at 100 KiB, and fail on headers that are not UTF-8.

ERRORS = {  # the texts by status; one that is not here starts with `missing` or `invalid` and has status 400
    301: ("moved",),  # a group, to another
    401: ("missing API key", "invalid API key", "missing admin token", "invalid admin token",
          "invalid signature", "stale timestamp", "signature required"),
    404: ("not found",), 405: ("method not allowed",), 413: ("request body too large",),
    415: ("unsupported content encoding",), 422: ("idempotency key reused with a different body",),
    429: ("rate limit exceeded",), 431: ("request header too large",), 500: ("internal server error",),
    501: ("transfer encoding not supported",), 503: ("storage unavailable",)}
_STATUS = {"form expired": 403, **{text: status for status, texts in ERRORS.items() for text in texts}}
_HEADERS = {"Content-Type": "application/json", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}

Environ = dict[str, Any]
Answer = tuple[int, Any]  # status, and a JSON object or a text
Handler = Callable[..., Answer]  # called with an environ and the parts of the path


def _as_refusal(error: int | Exception) -> Refusal:
    """What a client is told of a status that bottle or waitress chose, or of an error; one of our own is logged."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, int):
        return Refusal(ERRORS.get(error, ("invalid request",))[0])
    log.error("unexpected error", exc_info=error)
    return Refusal("internal server error")


def _refused(refusal: Refusal) -> tuple[int, JsonObject, dict[str, str]]:
    """The status, JSON and headers of its answer."""
    status = _STATUS.get(str(refusal), 400)
    headers = {"Accept-Encoding": "gzip"} if status == 415 else {}
    if refusal.retry_after is not None:
        headers["Retry-After"] = str(refusal.retry_after)
    return status, {"error": str(refusal), **({"detail": refusal.detail} if refusal.detail else {})}, headers


def _header(environ: Environ, name: str) -> bytes:
    """A request header as the bytes that were sent; b"" where there is none."""
    return str(environ.get("HTTP_" + name, "")).encode("latin-1", "replace")


def _read_body(environ: Environ, limit: int) -> bytes:
    """The body as it was sent. Raises Refusal where it has more than `limit` bytes."""
    length = environ.get("CONTENT_LENGTH") or ""
    if not re.fullmatch("[0-9]*", length):
        raise Refusal("invalid Content-Length")
    if len(length) > 18 or int(length or 0) > limit:  # int() raises ValueError for thousands of digits
        raise Refusal("request body too large")
    if not length and not environ.get("wsgi.input_terminated"):
        return b""  # a body without a length, such as a chunked one, needs a server that marks its end
    size = int(length or limit + 1)
    try:
        body: bytes = environ["wsgi.input"].read(size)
    except Exception:  # for a lost connection or a malformed chunk, each server raises an error of its own
        raise Refusal("invalid body") from None
    if len(body) > limit:
        raise Refusal("request body too large")
    if length and len(body) < size:  # the connection was lost, and the client will send it again
        raise Refusal("invalid Content-Length")
    return body


def _decompress(environ: Environ, body: bytes, limit: int) -> bytes:
    """The body without its Content-Encoding. Raises Refusal where that has more than `limit` bytes."""
    encoding = _header(environ, "CONTENT_ENCODING").lower()
    if encoding in (b"", b"identity"):
        return body
    if encoding not in (b"gzip", b"x-gzip"):
        raise Refusal("unsupported content encoding", detail="gzip is supported")
    inflater, plain = zlib.decompressobj(wbits=31), b""  # 31: with a gzip header
    with suppress(zlib.error):
        plain = inflater.decompress(body, limit + 1)
    if len(plain) > limit:
        raise Refusal("request body too large")
    if not inflater.eof or inflater.unused_data:
        raise Refusal("invalid gzip body")
    return plain


def _idempotency(environ: Environ, signature: bytes, body: bytes) -> Idempotency:
    """What marks a repeated request: its Idempotency-Key or its signature, each of which is enough."""
    path, key = environ["PATH_INFO"].encode("latin-1", "replace"), _header(environ, "IDEMPOTENCY_KEY")
    marks = [sha256(mark)[:16] for mark, given in (
        (b"key:" + key, key), (b"signature:" + path + b":" + signature, signature)) if given]
    return Idempotency(tuple(marks), sha256(path + b":" + body)[:16] if marks else b"")


def _query(environ: Environ) -> dict[str, str]:
    """The query parameters; of several with one name, the last."""
    text = str(environ.get("QUERY_STRING", "")).encode("latin-1", "replace").decode("utf-8", "replace")
    return dict(parse_qsl(text, keep_blank_values=True))


def _parameters(query: Mapping[str, str], *names: str) -> dict[str, Any]:
    """The query parameters of these names, without empty ones. Raises Refusal for an invalid number."""
    given: dict[str, Any] = dict(query)
    for name, highest in (("days", 365), ("limit", 100)):
        if name in given:
            if not (re.fullmatch("[0-9]{1,3}", given[name]) and 1 <= int(given[name]) <= highest):
                raise Refusal(f"invalid {name}")
            given[name] = int(given[name])
    return {name: given[name] for name in names if given.get(name)}


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def curl_line(url: str, key: str) -> str:
    """The command that sends a first crash to a server at `url`."""
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return " \\\n    ".join([f"curl -X POST {url}/api/v1/crashes", '-H "Content-Type: application/json"',
                           f'-H "X-Backfeedr-Key: {key}"',
                           f"""-d '{{"exception_type": "SIGABRT", "occurred_at": "{now}"}}'"""])


# == Charts ====================================================================
# Functions from figures to SVG, and the names of devices. A drawing has one unit of width for each day, and is
# stretched to the width that the page has. Labels of days are ISO dates.

_HEIGHT = 72  # of a chart, in pixels
_NO_CHART = '<p class="empty">No data in this period.</p>'
_ROUND = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 40, 50, 60, 80, 100)  # where an axis may end, and tens of times these
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_DEVICES = """
iPhone 10,1/4 8; 10,2/5 8 Plus; 10,3/6 X; 11,2 XS; 11,4/6 XS Max; 11,8 XR; 12,1 11; 12,3 11 Pro; 12,5 11 Pro Max
iPhone 12,8 SE (2nd generation); 13,1 12 mini; 13,2 12; 13,3 12 Pro; 13,4 12 Pro Max; 14,4 13 mini; 14,5 13; 14,2 13 Pro
iPhone 14,3 13 Pro Max; 14,6 SE (3rd generation); 14,7 14; 14,8 14 Plus; 15,2 14 Pro; 15,3 14 Pro Max; 15,4 15
iPhone 15,5 15 Plus; 16,1 15 Pro; 16,2 15 Pro Max; 17,1 16 Pro; 17,2 16 Pro Max; 17,3 16; 17,4 16 Plus; 17,5 16e
iPhone 18,1 17 Pro; 18,2 17 Pro Max; 18,3 17; 18,4 Air; 18,5 17e; 19,2 18 Pro; 19,3/7 18 Pro Max; 19,4 Duo
iPad 7,5/6 (6th generation); 7,11/12 (7th generation); 11,6/7 (8th generation); 12,1/2 (9th generation)
iPad 13,18/19 (10th generation); 15,7/8 (A16); 11,1/2 mini (5th generation); 14,1/2 mini (6th generation)
iPad 16,1/2 mini (A17 Pro); 11,3/4 Air (3rd generation); 13,1/2 Air (4th generation); 13,16/17 Air (5th generation)
iPad 14,8/9 Air 11-inch (M2); 14,10/11 Air 13-inch (M2); 15,3/4 Air 11-inch (M3); 15,5/6 Air 13-inch (M3)
iPad 16,8/9 Air 11-inch (M4); 16,10/11 Air 13-inch (M4); 8,1/2/3/4 Pro 11-inch (1st generation)
iPad 8,5/6/7/8 Pro 12.9-inch (3rd generation); 8,9/10 Pro 11-inch (2nd generation)
iPad 8,11/12 Pro 12.9-inch (4th generation); 13,4/5/6/7 Pro 11-inch (3rd generation)
iPad 13,8/9/10/11 Pro 12.9-inch (5th generation); 14,3/4 Pro 11-inch (4th generation)
iPad 14,5/6 Pro 12.9-inch (6th generation); 16,3/4 Pro 11-inch (M4); 16,5/6 Pro 13-inch (M4); 17,1/2 Pro 11-inch (M5)
iPad 17,3/4 Pro 13-inch (M5)"""  # family, then the numbers of a code and the name that Apple sells it by

escape = bottle.html_escape

Values = Sequence[Optional[float]]


def _read_devices() -> Iterator[tuple[str, str]]:
    for line in _DEVICES.strip().splitlines():
        family, _, entries = line.partition(" ")
        for major, minors, name in re.findall("([0-9]+),([0-9/]+) ([^;]+)", entries):
            yield from ((f"{family}{major},{minor}", f"{family} {name}") for minor in minors.split("/"))


_DEVICE_NAMES = dict(_read_devices())


def device_name(code: str) -> str:
    """HTML of a device's code, with its name if that is known. Any other text stays as it is."""
    name = _DEVICE_NAMES.get(code)
    return f'{name} <small class="code">{code}</small>' if name else f"<bdi>{escape(_shorten(code, 80))}</bdi>"


def _shorten(text: str, length: int = 300) -> str:
    return text if len(text) <= length else text[:length] + "..."


def draw_line(ys: Values) -> str:
    """A line that None interrupts, and a dot for today, which is not over."""
    line, dots, today = "", "", len(ys) - 1
    for n, y in enumerate(ys):
        if y is not None:
            is_start = n in (0, today) or ys[n - 1] is None
            line += f"{'M' if is_start else 'L'}{n + 0.5},{y:.1f}"
            if is_start and (n >= today - 1 or ys[n + 1] is None):
                dots += f"M{n + 0.5},{y:.1f}h0"
    return f'<path d="{line}"/><path class="dot" d="{dots}"/>'


def draw_columns(ys: Values) -> str:
    """A column for each value."""
    return "".join(f'<rect x="{n + 0.15:.2f}" width="0.7" y="{y:.1f}" height="{_HEIGHT - y:.1f}"/>'
                   for n, y in enumerate(ys) if y is not None)


def chart(title: str, labels: Sequence[str], values: Values, draw: Callable[[Values], str] = draw_line,
          low: float = 0, unit: str = "") -> str:
    """One value a day from `low` up, with a tooltip for each day. None: there is no value."""
    known = [(value, label) for value, label in zip(values, labels) if value is not None]
    if not known:
        return _NO_CHART
    (highest, peak), (lowest, _) = max(known), min(known)
    tens = 10 ** max(0, len(str(int(highest))) - 2)
    high = 100 if unit else next(tens * each for each in _ROUND if highest <= tens * each)
    drawn = draw([None if value is None else _HEIGHT * (high - value) / (high - low) for value in values])
    first, last = _day(labels[0]), _day(labels[-1])
    summary = (f"{title} per day, {first} to {last}: latest {known[-1][0]:,}{unit},"
               f" highest {highest:,}{unit} on {_day(peak)}, lowest {lowest:,}{unit}")
    for n, (label, value) in enumerate(zip(labels, values)):
        text = "none" if value is None else f"{value:,}{unit}{' so far' if label == labels[-1] else ''}"
        drawn += f'<rect class="day" x="{n}" width="1" height="{_HEIGHT}"><title>{_day(label)}: {text}</title></rect>'
    return (f'<div class="chart" role="img" aria-label="{summary}">'
            f"<p><span>{high:,}{unit}</span><span>{low:,}{unit}</span></p>{_svg(len(values), _HEIGHT, drawn)}"
            f"<p><span>{first}</span><span>{last}</span></p></div>")


def _svg(width: int, height: int, content: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" height="{height}" preserveAspectRatio="none">{content}</svg>'


def _day(label: str) -> str:
    day = date.fromisoformat(label)
    return f"{day.day} {_MONTHS[day.month - 1]}"


def sparkline(values: Sequence[int], title: str) -> str:
    """A line as high as a line of text, through one value a day."""
    high, total = max(*values, 1), f"{sum(values):,} in {len(values)} days"
    line = draw_line([18 - 16 * value / high for value in values])
    return f'<span class="spark" role="img" aria-label="{title}: {total}">{_svg(len(values), 20, line)}</span>'


def bar_chart(figures: JsonObject, total: int | None = None) -> str:
    """A bar for each of the first ten labels, and the count of what is in `total` but not among them."""
    shown = list(zip(figures["labels"], figures["data"]))[:10]
    rest = (sum(figures["data"]) if total is None else total) - sum(count for _, count in shown)
    longest = max((count for _, count in shown), default=1)
    rows = [(device_name(label), count, f"{100 * count / longest:.1f}") for label, count in shown]
    rows += [("other or unknown", rest, "0")] if rest > 0 else []
    html = "".join(
        f'<tr><th scope="row">{label}</th><td><svg height="10" aria-hidden="true"><rect width="{share}%" height="10"/>'
        f'</svg></td><td class="number">{count:,}</td></tr>' for label, count, share in rows)
    return f'<table class="bars">{html}</table>' if rows else _NO_CHART


# == Dashboard =================================================================
# The pages, behind the admin token. They load nothing from other hosts and use no JavaScript. What a report contains
# is hostile: it reaches a page only through `{{ }}` or escape(), an address also through urlencode(), never a style.

SESSION_LIFETIME = 7 * DAY
LINK_LIFETIME = 600 * SECOND  # of a link that signs in once
LIST_ROWS = 25
SHOWN_VERDICTS = 5
SHOWN_FRAMES, SHOWN_TEXT = 200, 20_000  # frames and characters of a report on its page; the API has the rest

_HINTS = {
    403: "The session has changed since the page was loaded. Load the page again, then resend the form.",
    404: "It may have expired, or belong to an app that was deleted.",
    500: "The server's log has the reason.", 503: "The server's log has the reason. Try again in a moment."}
_INVALID = "The address or the form is not valid."
_OPEN_PATHS = ("/sign-in", "/crashes.atom")  # which need no session
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]")  # characters that HTML and XML do not allow
_MISLEADING = re.compile(_CONTROL.pattern + "|[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # turn text around

Response = Any  # a bottle.HTTPResponse; bottle has no types
PageHandler = Callable[..., Response]  # called with a PageRequest and the parts of the path


class PageRequest:
    """A request for a page: its address, its browser's session and, after read_form(), its form."""

    def __init__(self, environ: Environ, now: int, public_url: str, cookie: str):
        self.environ, self.now, self._public_url, self.cookie = environ, now, public_url.rstrip("/"), cookie
        mounted = quote(environ.get("SCRIPT_NAME", "").encode("latin-1", "replace"))
        self.root = (urlsplit(public_url).path or mounted).rstrip("/")  # a proxy may have stripped the prefix
        self.path = quote(environ.get("PATH_INFO", "").encode("latin-1", "replace"))
        self.section = "/" + self.path.split("/")[1] if "/" in self.path else "/"
        self.query = {name: value for name, value in _query(environ).items() if value}  # a form sends empty fields, too
        self.address = self.path + ("?" + urlencode(self.query) if self.query else "")
        self.app = self.query.get("app")
        self.apps: list[App] | None = None  # None unless the browser is signed in
        self.form: dict[str, str] = {}
        found = re.search(f"(?:^|; ?){cookie}=([0-9a-f]{{32}})(?:;|$)", environ.get("HTTP_COOKIE", ""))
        self.session = found[1] if found else ""

    @property
    def url(self) -> str:
        """The address of the server as the browser sees it, without a slash at the end."""
        host = re.fullmatch(r"[0-9A-Za-z.:\[\]-]+", self.environ.get("HTTP_HOST", ""))
        scheme = "https" if self.environ.get("wsgi.url_scheme") == "https" else "http"
        return self._public_url or f"{scheme}://{host[0] if host else 'localhost'}{self.root}"

    def parameters(self, *names: str) -> dict[str, Any]:
        """As _parameters, where days=all is no limit."""
        return _parameters({name: value for name, value in self.query.items() if (name, value) != ("days", "all")},
                           *names)

    @property
    def form_token(self) -> str:
        """What a form must carry. Another site cannot make it, as it does not know the session. Signing in has none:
        a form that is forged there would need the admin token."""
        return sha256("form" + self.session).hex()

    def read_form(self) -> None:
        """Raises Refusal unless the form comes from a page of this session."""
        fields = parse_qs(_read_body(self.environ, 65_536).decode("utf-8", "replace"), keep_blank_values=True)
        self.form = {name: values[-1] for name, values in fields.items()}
        token = self.form.get("form_token", "").encode("utf-8", "replace")
        if not hmac.compare_digest(token, self.form_token.encode()):
            raise Refusal("form expired")

    def link(self, path: str, **query: Any) -> str:
        """The address of a page about the same app, unless `query` has another. None and "" are left out of it."""
        app = self.app if any(app.name == self.app for app in self.apps or ()) else None
        given = {name: value for name, value in {"app": app, **query}.items() if value not in (None, "")}
        return self.root + path + ("?" + urlencode(given) if given else "")

    def moved(self, group_hash: str) -> str:
        """The address of this page of another group."""
        return self.root + re.sub("[0-9a-f]{16}", group_hash, self.address, count=1)

    def redirect(self, path: str) -> Response:
        return bottle.HTTPResponse(b"", 303, {**PAGE_HEADERS, "Location": self.root + path})

    def set_session(self, response: Response, session: str, lifetime: int = SESSION_LIFETIME) -> Response:
        """Sets the cookie. It is Lax, so that a link from a chat or a mail finds the browser signed in: no GET changes
        anything, and a form needs its token."""
        response.set_cookie(self.cookie, session, path=self.root + "/", httponly=True, samesite="lax",
                            secure=self.url.startswith("https:"), max_age=lifetime // SECOND)
        return response

    def when(self, time: str | int) -> str:
        """HTML of a time, as the API gives it or in milliseconds: how long ago, or a date; and exactly."""
        at = parse_time(time) if isinstance(time, str) else time
        exact, span = iso_time(at)[:19].replace("T", " "), self.now - at
        units = [(DAY, "d"), (HOUR, "h"), (60 * SECOND, "min")]
        shown = next((f"{span // unit} {name} ago" for unit, name in units if span >= unit), "just now")
        shown = shown if -MAX_SKEW <= span < 100 * DAY else exact[:10]
        return f'<time datetime="{iso_time(at)}" title="{exact}">{shown}</time>'

    def app_note(self, row: JsonObject) -> str:
        """The apps of a row of a list; "" where the page is about one app."""
        return "" if self.app or len(self.apps or ()) < 2 else ", ".join(row.get("apps") or [row["app"]])

    def show(self, value: Any) -> str:
        """HTML of a percentage, a count or a time."""
        if value is None:
            return "-"
        if isinstance(value, str):
            return self.when(value)
        return f"{value:.2f} %" if isinstance(value, float) else f"{value:,}"


class Dashboard:
    """Answers the requests for pages."""

    def __init__(self, store: Store, metrics: Metrics, refused: RefusedReports, alerts: Alerts, public_url: str = ""):
        self._store, self._metrics, self._refused, self._public_url = store, metrics, refused, public_url
        self._alerts = alerts
        # Two servers on one host share their cookies.
        self._cookie = "backfeedr_" + store.secret_hash("admin_token").hex()[:8]

    def routes(self) -> Iterator[tuple[str, str, Callable[..., Response]]]:
        """Method, path and handler of each page."""
        for method, path, handler in (
                ("GET", "/", self._overview), ("GET", "/crashes", self._crashes), ("GET", "/crashes.atom", self._feed),
                ("GET", "/crashes/<group_hash>.<form:re:txt|md>", self._group_text),
                ("GET", "/crashes/<group_hash>", self._group), ("POST", "/crashes/<group_hash>", self._triage),
                ("GET", "/events", self._events), ("GET", "/usage", self._usage),
                ("GET", "/releases", self._releases), ("GET", "/apps", self._apps),
                ("POST", "/apps", self._change_apps), ("POST", "/sign-out", self._sign_out),
                ("GET", "/sign-in", self._sign_in_page), ("POST", "/sign-in", self._sign_in)):
            yield method, path, partial(self._respond, handler)

    def invite(self, url: str) -> str:
        """A link that signs in once, within ten minutes."""
        return f"{url}/sign-in?code={self._store.grant('code', LINK_LIFETIME)}"

    def request(self, environ: Environ) -> PageRequest:
        return PageRequest(environ, self._store.now, self._public_url, self._cookie)

    def _respond(self, handler: PageHandler, **path: str) -> Response:
        """A page, or a page for the error."""
        page = self.request(bottle.request.environ)
        try:
            is_form = page.environ["REQUEST_METHOD"] == "POST"
            if page.path not in _OPEN_PATHS and not self._is_signed_in(page):
                return page.redirect("/sign-in?" + urlencode({"next": "/" if is_form else page.address}))
            if is_form:
                page.read_form()
            return handler(page, **path)
        except Moved as moved:
            return bottle.HTTPResponse(b"", 301, {**PAGE_HEADERS, "Location": page.moved(moved.group_hash)})
        except Exception as error:
            return self.error_page(page, _as_refusal(error))

    def error_page(self, page: PageRequest, refusal: Refusal) -> Response:
        status, _, headers = _refused(refusal)
        with suppress(Exception):  # without its navigation, where the database is the error
            self._is_signed_in(page)
        hint = _sentence(refusal.detail) if refusal.detail else _HINTS.get(status, _INVALID)
        response = self._render(page, _sentence(str(refusal))[:-1], "error", status, hint=hint)
        response.headers.update(headers)
        return response

    def _is_signed_in(self, page: PageRequest) -> bool:
        """Gives the page its list of apps, too."""
        if page.apps is None and self._store.is_granted("session", page.session):
            page.apps = self._store.apps()
        return page.apps is not None

    def _render(self, page: PageRequest, title: str, template: str, status: int = 200, **values: Any) -> Response:
        values.update(_TEMPLATE_GLOBALS, page=page, title=title, status=status, apps=page.apps, link=page.link,
                      when=page.when, show=page.show)
        values["body"] = _TEMPLATES[template].render(values)
        return _text_response(_TEMPLATES["layout"].render(values), "text/html", status)

    # Signing in and out

    def _sign_in_page(self, page: PageRequest, problem: str = "", status: int = 200) -> Response:
        code = page.query.get("code", "")
        if code and page.environ["REQUEST_METHOD"] == "GET":  # HEAD is a preview, and must not use up the code
            if self._store.withdraw("code", code):
                return self._start_session(page, "/")
            problem, status = "This link has been used or has expired. Sign in with the admin token.", 403
        target = page.form.get("next") or page.query.get("next", "/")
        return self._render(page, "Sign in", "sign_in", status, problem=problem, target=target)

    def _sign_in(self, page: PageRequest) -> Response:
        if not self._store.is_admin(page.form.get("token", "").strip().encode()):
            return self._sign_in_page(page, "That is not the admin token.", 403)
        return self._start_session(page, page.form.get("next", ""))

    def _start_session(self, page: PageRequest, target: str) -> Response:
        """With a new session id: an attacker may have planted the one that the browser had."""
        is_our_path = re.fullmatch(r"/(?![/\\])[!-~]*", target)
        response = page.redirect(target if is_our_path else "/")
        return page.set_session(response, self._store.grant("session", SESSION_LIFETIME))

    def _sign_out(self, page: PageRequest) -> Response:
        self._store.withdraw("session", page.session)
        return page.set_session(page.redirect("/sign-in"), "", lifetime=0)

    # The pages

    def _overview(self, page: PageRequest) -> Response:
        metrics, app = self._metrics, page.app
        return self._render(
            page, "Overview", "overview", is_empty=metrics.is_empty(app), tiles=_overview_tiles(metrics, app),
            warnings=[*self._refused.today(app), *self._store.warnings()], **metrics.attention(app),
            verdicts=metrics.newest_releases(app)[:SHOWN_VERDICTS],
            types=metrics.crash_types(app, 30), devices=metrics.devices(app, 30))

    def _crashes(self, page: PageRequest) -> Response:
        metrics, given = self._metrics, page.parameters("version", "text", "state", "sort", "cursor", "days")
        days = given.pop("days", None if {"version", "text", "days", "state"} & page.query.keys() else WEEK)
        found = metrics.groups(page.app, **given, days=days, limit=LIST_ROWS)
        details = metrics.group_days([each["group_hash"] for each in found["groups"]], page.app,
                                     given.get("version"))["groups"]
        return self._render(
            page, "Crashes", "crashes", parameters={**given, "days": days or "all"}, next=found["next"],
            groups=[{**each, **details[each["group_hash"]]} for each in found["groups"]],
            periods=[("all", "all days"), *((n, f"last {n} days" if n > 1 else "today")
                                            for n in sorted({1, 7, 30, 90, 365, days or 1}))],
            sorts=[(each, each.replace("_", " ")) for each in SORTS], states=list(filter(None, GROUPS_OF)))

    def _group(self, page: PageRequest, group_hash: str) -> Response:
        metrics, group = self._metrics, self._metrics.group(group_hash, page.app, limit=1)
        id, days = page.query.get("report"), metrics.group_days([group_hash], page.app)
        report = metrics.crash(id, page.app) if id else next(iter(group["reports"]), {})
        if report.get("group_hash", group_hash) != group_hash:
            raise Refusal("not found")
        older, newer = metrics.neighbours(report, page.app) if report else (None, None)
        apps = days["groups"][group_hash]["apps"]
        return self._render(
            page, _culprit(group), "group", group=group, group_apps=apps, report=report, older=older, newer=newer,
            next_build=metrics.next_build(group_hash, apps[0]) if len(apps) == 1 else "",
            is_latest=not id, crumbs=_crumbs(report), before=_steps(report, metrics.events_before(report)),
            chart=chart("Crashes", days["labels"], days["groups"][group_hash]["days"], draw_columns),
            frames=[_frame(frame) for frame in report.get("stack_trace", [])], max_frames=SHOWN_FRAMES,
            fields=_fields(page, report))

    def _group_text(self, page: PageRequest, group_hash: str, form: str) -> Response:
        """A group for a bug tracker, a reader or an assistant."""
        group = self._metrics.group(group_hash, page.app, limit=1)
        text = group_text(group, page.url + page.address.replace("." + form, "", 1))
        return _text_response(text, "text/markdown" if form == "md" else "text/plain")

    def _triage(self, page: PageRequest, group_hash: str) -> Response:
        """Does what a form of the page of a group asks for; a field that is empty asks for nothing."""
        given: JsonObject = {name: text for name, text in page.form.items() if name in TRIAGE_FIELDS and text.strip()}
        for name, of in (("until", "{}T00:00:00Z".format), ("more_crashes", int), ("more_devices", int)):
            with suppress(ValueError):  # then it is refused as it is
                given.update({name: of(given[name])} if name in given else {})
        self._store.triage(group_hash, parse_triage(given, page.now), page.app)
        return page.redirect(page.address)

    def _usage(self, page: PageRequest) -> Response:
        metrics, app = self._metrics, page.app
        return self._render(
            page, "Usage", "usage", tiles=_usage_tiles(metrics, app), back=_retention_tiles(metrics, app),
            releases=metrics.releases(app)["releases"][:8], events=metrics.event_names(app)["events"])

    def _events(self, page: PageRequest) -> Response:
        parameters = page.parameters("type", "name", "session_id", "device_id_hash", "cursor")
        is_session = "session_id" in parameters
        found = self._metrics.events(page.app, **parameters, limit=LIST_ROWS, oldest_first=is_session)
        return self._render(page, "Session" if is_session else "Events", "events", **found, parameters=parameters,
                            types=EVENT_TYPES)

    def _releases(self, page: PageRequest) -> Response:
        parameters = page.parameters("sort")
        return self._render(page, "Releases", "releases", **self._metrics.releases(page.app, **parameters),
                            parameters=parameters)

    def _feed(self, page: PageRequest) -> Response:
        """New and regressed groups as Atom. Without the feed's token there is nothing here."""
        if not self._store.is_feed(page.query.get("token", "").encode("utf-8", "replace")):
            raise Refusal("not found")
        news = self._metrics.news(page.app)
        return _text_response(_TEMPLATES["feed"].render(
            page=page, news=news, iso=iso_time, urlencode=urlencode,
            updated=iso_time(news[0]["at"] if news else 0)), "application/atom+xml")

    # The page of apps, keys, alerts and the feed

    def _apps(self, page: PageRequest, notice: JsonObject | None = None, status: int = 200) -> Response:
        page.apps, keys = self._store.apps(), self._store.keys()
        return self._render(page, "Apps", "apps", status, notice=notice or {}, keys={
            app.name: [key for key in keys if key.app == app.name] for app in page.apps},
            channels=self._alerts.channels(), has_feed=bool(self._store.secret_hash("feed_token")),
            fact_kinds=FACT_KINDS)

    def _change_apps(self, page: PageRequest) -> Response:
        """Does what a form of the page asks for."""
        change = self._change_alerts if "channel" in page.form.get("action", "") else self._change_keys
        try:
            return self._apps(page, change(page, page.form.get("action", ""), page.form))
        except StoreError as error:
            return self._apps(page, {"message": _sentence(str(error))}, 400)

    def _change_keys(self, page: PageRequest, action: str, form: dict[str, str]) -> JsonObject:
        """Returns what the page then says, and a secret that it shows once."""
        store, name = self._store, form.get("name", "")
        if action in ("create", "key"):
            key = store.create_app(name, "test" in form) if action == "create" else store.create_key(name)
            return {"message": f"New key of {name}, shown only once:", "secret": key,
                    "curl": curl_line(page.url, key)}
        if action == "revoke":
            revoked = store.revoke_key(form.get("key", ""))
            return {"message": f"Revoked the key {revoked.prefix}... of {revoked.app}."}
        if action == "delete":
            if form.get("typed") != name:
                raise StoreError(f"to delete it, type its name: {name}")
            store.delete_app(name)
            store.catch_up_in_background()
            return {"message": f"Deleted {name}. Its reports are being deleted."}
        if action == "make-feed":
            address = f"{page.url}/crashes.atom?token={store.change_feed(make=True)}"
            return {"message": "The feed's address, shown only once:", "secret": address}
        if action == "withdraw-feed":
            store.change_feed(make=False)
            return {"message": "Withdrew the feed's address."}
        raise StoreError("there is no such action")

    def _change_alerts(self, page: PageRequest, action: str, form: dict[str, str]) -> JsonObject:
        """As _change_keys, for channels."""
        id = int(form["id"]) if re.fullmatch("[0-9]{1,9}", form.get("id", "")) else 0
        if action == "test-channel":
            self._alerts.test(id)
            return {"message": f"Sent a test message to channel {id}."}
        if action == "remove-channel":
            self._alerts.remove(id)
            return {"message": f"Removed channel {id}."}
        hour = int(form["hour"]) if re.fullmatch("1?[0-9]|2[0-3]", form.get("hour", "")) else 7
        number, secret = self._alerts.add(form.get("url", "").strip(), form.get("app") or None, [
            kind for kind in FACT_KINDS if f"on-{kind}" in form], "reason" in form, hour)
        return {"message": f"Added channel {number}" + (". Its secret, shown only once:" if secret else "."),
                "secret": secret}


def _text_response(text: str, content_type: str, status: int = 200) -> Response:
    return bottle.HTTPResponse(_CONTROL.sub("\ufffd", text).encode("utf-8", "replace"), status, {
        **PAGE_HEADERS, "Content-Type": content_type + "; charset=utf-8"})


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


Tile = tuple[str, str, str, str]  # name, value, note and chart of a figure


def _overview_tiles(metrics: Metrics, app: str | None) -> Iterator[Tile]:
    week, crash_days, active = metrics.overview(app), metrics.daily_crashes(app, 30), metrics.active_devices(app, 30)
    labels, crashes, sessions = crash_days["labels"], crash_days["data"], metrics.sessions(app, 30)["sessions"]
    rates = [crash_free_rate(*day) if day[1] else None for day in zip(crashes, sessions)]
    lowest = min((rate for rate in rates if rate is not None), default=0)
    axis_start = max(rate for rate in (0, 50, 80, 90, 95, 99) if rate <= lowest)
    before = crash_free_rate(sum(crashes[-14:-7]), sum(sessions[-14:-7]))
    yield ("Crash-free sessions", f"{week['crash_free_rate_7d']:.2f} %" if week["sessions_7d"] else "-",
           f"7 days; {before:.2f} % in the 7 before" if sum(sessions[-14:-7]) else "7 days",
           chart("Crash-free sessions", labels, rates, low=axis_start, unit=" %"))
    yield "Active devices", f"{week['dau']:,}", "24 hours", chart("Active devices", labels, active["dau"])
    for name, days, draw in (("Sessions", sessions, draw_line), ("Crashes", crashes, draw_columns)):
        note = f"7 days; {sum(days[-14:-7]):,} in the 7 before"
        yield name, f"{sum(days[-7:]):,}", note, chart(name, labels, days, draw)


def _usage_tiles(metrics: Metrics, app: str | None) -> Iterator[Tile]:
    """Active devices, and sessions with their length: the mean, where several apps have no median."""
    active, sessions = metrics.active_devices(app, 30), metrics.sessions(app, 30)
    for column, value, period in (("dau", metrics.overview(app)["dau"], "24 hours"),
                                  ("wau", active["wau"][-1], "7 days"), ("mau", active["mau"][-1], "30 days")):
        drawn = chart(f"Devices active in {period}", active["labels"], active[column])
        yield "Active devices", f"{value:,}", period, drawn
    kind = "median" if any(each is not None for each in sessions["median_seconds"]) else "mean"
    known = [each for each in zip(sessions["labels"], sessions[kind + "_seconds"]) if each[1] is not None]
    length = f"{kind} length on {_day(known[-1][0])}: {_duration(known[-1][1])}" if known else "none has ended"
    yield ("Sessions", f"{sum(sessions['sessions'][-7:]):,}", f"7 days; {length}",
           chart("Sessions", sessions["labels"], sessions["sessions"]))


def _retention_tiles(metrics: Metrics, app: str | None) -> Iterator[Tile]:
    """Of the devices first seen on a day, the share that was seen again later."""
    cohorts = metrics.retention(app, 60)
    for later in Devices.BACK.values():
        rates, name = cohorts[f"day_{later}"], f"Back after {later} day{'s' * (later > 1)}"
        known = [(rate, devices) for rate, devices in zip(rates, cohorts["devices"]) if rate is not None]
        devices = sum(each for _, each in known)
        share = f"{sum(rate * each for rate, each in known) / devices:.0f} %" if devices else "-"
        yield name, share, f"of {devices:,} new devices in 60 days", chart(name, cohorts["labels"], rates, unit=" %")


def _duration(seconds: float) -> str:
    size, unit = next((each for each in ((3600, "h"), (60, "min")) if seconds >= 2 * each[0]), (1, "s"))
    return f"{seconds / size:.0f} {unit}"


Step = tuple[str, str, str]  # before a crash: when, what, and details of it
_CRUMB_TIMES = ("at", "timestamp", "time", "date", "occurred_at")
_CRUMB_ACTIONS = ("message", "action", "name", "event", "title", "screen", "category", "type")


def _crumbs(report: JsonObject) -> list[Step]:
    """The breadcrumbs of a crash, in the shapes that SDKs send; at most 100, and the crash itself at the end."""
    given = report.get("extra", {}).get("breadcrumbs")
    given = given.get("values") if type(given) is dict else given
    steps = [_crumb(each, report) for each in given[-100:]] if type(given) is list else []
    return steps and [*steps, ("00:00", report["exception_type"], "the crash")]


def _crumb(given: Any, report: JsonObject) -> Step:
    if type(given) is not dict:
        return "", _shorten(_as_text(given)), ""
    rest = {name: value for name, value in given.items() if value not in (None, "", [], {})}
    at = rest.pop(next((name for name in _CRUMB_TIMES if name in rest), ""), "")
    action = rest.pop(next((name for name in _CRUMB_ACTIONS if type(rest.get(name)) is str), ""), "")
    return _offset(at, report), _shorten(action), _details({"extra": rest})


def _steps(report: JsonObject, events: Sequence[JsonObject]) -> list[Step]:
    """The events of a session before a crash."""
    return [(_offset(event["occurred_at"], report), f"{event['type']} {_shorten(event.get('name', ''), 80)}".strip(),
             _details(event)) for event in events]


def _offset(at: Any, report: JsonObject) -> str:
    """How long before a crash something was, such as -00:12. What is no time near it stays as it is."""
    try:
        span = parse_occurred_at(at) - parse_time(report["occurred_at"])
    except ValueError:
        span = 100 * HOUR
    (hours, minutes), seconds = divmod(abs(span) // 60_000, 60), abs(span) // SECOND % 60
    if hours > 99:
        return _shorten(_as_text(at), 40)
    return ("+" if span > 0 else "-") + (f"{hours}:" if hours else "") + f"{minutes:02}:{seconds:02}"


def group_text(group: JsonObject, url: str) -> str:
    """A group in Markdown that also reads as text. It names no device, no session and no field that the server does not
    know. What reports say is indented in a fence: so none of it begins a line, or closes the fence."""
    parts = [f"# Crash group {group['group_hash']}\n\n{url}\n"]
    for title, text in _portrait(group):
        lines = ["    " + _MISLEADING.sub("\ufffd", line) for line in text.splitlines()]
        parts.append("\n".join([f"## {title}", "", "```text", *lines, "```", ""]))
    return "\n".join(parts)


def _portrait(group: JsonObject) -> Iterator[tuple[str, str]]:
    """The title and the text of each section."""
    report: JsonObject = next(iter(group["reports"]), {})
    reason = _shorten(report.get("exception_reason", ""), SHOWN_TEXT)
    yield "What", "\n".join(filter(None, (group["place"], group["exception_type"], reason)))
    frames = [_frame(each) for each in report.get("stack_trace", [])[:SHOWN_FRAMES]]
    yield "Stack trace of the latest crash (* is the app's own code)", "\n".join(
        f"{n:3} {'*' if is_own else ' '} {_shorten(symbol, 1000)}  {_shorten(place)}".rstrip()
        for n, (symbol, place, is_own, _) in enumerate(frames)) or "none was sent"
    spread = {"Crashes": group["count"], "Devices": group["devices"], "First seen": group["first_seen"],
              "Last seen": group["last_seen"]}
    for title, part in (("Versions", "versions"), ("Systems", "systems"), ("Models", "device_models")):
        counts = zip(group[part]["labels"], group[part]["data"])
        spread[title] = ", ".join(f"{_shorten(label, 80)} ({count})" for label, count in counts)
    yield "Spread", "\n".join(f"{title}: {value}" for title, value in spread.items() if value not in (None, ""))
    yield "History", "\n".join(f"{each['at']} {each['what']} {each['detail'] or ''}".rstrip()
                               for each in group["history"]) or "none"


def _culprit(group: JsonObject) -> str:
    """The function of the app in which a group crashes; its exception type, where none is known; its hash, where only
    that is left."""
    return canonical_name(group["place"]) or group["exception_type"] or group["group_hash"]


_SHOWN_APART = ("exception_type", "exception_reason", "stack_trace", "raw_stack_trace", "group_hash", "extra")


def _fields(page: PageRequest, report: JsonObject) -> Iterator[tuple[str, str]]:
    """Name and HTML of the other fields of a crash, known to the server or not."""
    shown: dict[str, Callable[[Any], str]] = {
        "occurred_at": page.when, "received_at": page.when, "device_model": device_name}
    for name, value in {**report, **report.get("extra", {})}.items():
        if name not in _SHOWN_APART and not (name == "breadcrumbs" and _crumbs(report)):
            html = shown[name](value) if name in shown else f"<bdi>{escape(_as_text(value))}</bdi>"
            yield name.replace("_", " "), html


def _frame(frame: JsonObject) -> tuple[str, str, bool, str]:
    """Symbol and place of a frame, with fields such as its library; whether it is one of the app itself; and where in
    its build it is."""
    read = read_frame(frame)
    line = next((frame[name] for name in _FRAME_FIELDS["line"] if frame.get(name) is not None), None)
    place = [read.file if line is None else f"{read.file}:{line}"] if read.file else []
    place += [read.binary] if read.binary and read.symbol else []
    place += ["inlined"] if frame.get("inlined") else []
    place += [_as_text(value) for name, value in frame.items() if name not in _SHOWN_FIELDS and value is not None]
    raw = f"{read.binary} + {read.offset} {read.uuid}".strip() if read.offset is not None else ""
    return read.title or "(no symbol)", ", ".join(place), bool(read.is_own), raw


_SHOWN_FIELDS = {*chain.from_iterable(_FRAME_FIELDS.values()), "frame", "in_app", "symbolicated", "inlined"}


def build_name(build: JsonObject) -> str:
    """What a build is called, such as Shop 1.3.0 (48)."""
    version = with_build(build["app_version"], build["build_number"])
    return f"{build['binary'] or 'a build'} {version}".rstrip()


def _details(event: JsonObject) -> str:
    """The first twenty properties and unknown fields of an event."""
    given = {**event.get("properties", {}), **event.get("extra", {})}
    return ", ".join(f"{name}: {_shorten(_as_text(value), 100)}" for name, value in list(given.items())[:20])


def _as_text(value: Any) -> str:
    """Any JSON value for a reader: a list has an item to a line."""
    items = value if type(value) is list else [value]
    return _shorten("\n".join(item if type(item) is str else json.dumps(item, ensure_ascii=False) for item in items),
                    SHOWN_TEXT)


# == Templates =================================================================
# The HTML and CSS of the pages. Templates know only `for` and `if`; `{{ }}` escapes, `{{! }}` takes HTML that was made
# above. What several templates share is a constant, or a function that returns their source, such as _table().

_PAGES = (("/", "Overview"), ("/crashes", "Crashes"), ("/usage", "Usage"), ("/releases", "Releases"), ("/apps", "Apps"))
_ICON = ("data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Cpath d='M1 11h4l2-8 "
         "3 11 2-6h3' fill='none' stroke='%23c0392b' stroke-width='2'/%3E%3C/svg%3E")
Column = tuple[str, str, str]  # label, template of a cell, in which `row` is what is listed, and CSS class


def _field(label: str) -> Column:
    """A column of a figure or a time, which has the name of its label."""
    name = label.lower().replace(" ", "_").replace("-", "_")
    return label, f'{{{{!show(row["{name}"])}}}}', "" if name.endswith("seen") else "number"


def _table(rows: str, *columns: Column | str, empty: str = "", note: str = "") -> str:
    """Lists `rows`, an expression, above a note. On a narrow screen a cell has its label before it, unless its class is
    "bare" or "main", which also comes first."""
    head, body = "", ""
    for label, cell, css in (_field(each) if isinstance(each, str) else each for each in columns):
        head += f'<th scope="col" class="{css}">{label}</th>\n'
        body += f'<td class="{css}" data-label="{label}">{cell}</td>\n'
    return f"""% if {rows}:
<table class="list"><thead><tr>
{head}</tr></thead><tbody>
% for row in {rows}:
<tr>
{body}</tr>
% end
</tbody></table>
{note and f'<p class="note">{note}</p>'}
% else:
<p class="empty">{empty}</p>
% end
"""


def _form(content: str, target: str = "page.path", **hidden: str) -> str:
    """A form with the token that read_form() checks; `target` are the arguments of link()."""
    fields = "".join(f'<input type="hidden" name="{name}" value="{value}">\n'
                     for name, value in {"form_token": "{{page.form_token}}", **hidden}.items())
    return f'<form method="post" action="{{{{link({target})}}}}">\n{fields}{content}</form>\n'


def _select(name: str, choices: str, chosen: str = "None") -> str:
    """A choice of values, or of pairs of a value and its label."""
    return f"""<select name="{name}">
% for value, label in (each if type(each) is tuple else (each, each) for each in {choices}):
<option value="{{{{value}}}}"{{{{" selected" if value == {chosen} else ""}}}}>{{{{label}}}}</option>
% end
</select>"""


_APP = '<small><bdi>{{page.app_note(row)}}</bdi></small>\n'
_GROUP = ("Crash", """
<a href="{{link("/crashes/" + row["group_hash"])}}"><bdi>{{shorten(culprit(row), 120)}}</bdi></a>
% if row["is_new"]:
<b class="new">new</b>
% end
% if row["state"] != "open" or row["regressed_at"]:
<b class="new">{{row["state"] if row["state"] != "open" else "regressed"}}</b>
% end
% about = (page.app_note(row), row["exception_type"] if row["place"] else "", shorten(row["exception_reason"]))
<span class="brief soft"><bdi>{{": ".join(filter(None, about))}}</bdi></span>""", "main")
_CRASHES = ("Crashes", '{{number(row["count"])}}', "number")
_VERSION = ("Version", '<bdi>{{shorten(row.get("app_version", ""), 40)}}</bdi>', "bare")
_DEVICE = ("Device", '{{!device_name(row.get("device_model", ""))}}', "bare")
_RELEASE = ("Version", """\
<a href="{{link("/crashes", app=row["app"], version=row["app_version"])}}"><bdi>{{row["app_version"]}}</bdi></a>
""" + _APP, "main")
_NO_RELEASE = "No release yet. Reports with an <code>app_version</code> appear here."
_TILES = """<div class="grid tiles">
% for name, value, note, chart in tiles:
<section><h2>{{name}}</h2><p class="figure">{{value}}</p><p class="note">{{note}}</p>{{!chart}}</section>
% end
</div>
"""
_FILTER = """<form class="filter" method="get" action="{{page.root}}{{page.path}}">
<input type="hidden" name="app" value="{{page.app or ""}}">
"""
_PAGE_LINKS = """<p>
% for label, cursor in (("First page", None), ("Next page", next)):
% if cursor or label == "First page" and "cursor" in parameters:
<a class="more" href="{{link(page.path, **{**parameters, "cursor": cursor})}}">{{label}}</a>
% end
% end
</p>
"""
_TRIAGE = """<section><h2>{{group["state"].capitalize()}}
{{"in " + group["fixed_in"] if group["fixed_in"] and group["state"] == "resolved" else ""}}
% if group["state"] == "open" and group["regressed_at"]:
again since {{!when(group["regressed_at"])}}
% end
</h2><div class="actions">
% if len(group_apps) > 1:
<p class="note">Several apps have this crash. Choose one to change its state there:
% for name in group_apps:
<a href="{{link(page.path, app=name)}}"><bdi>{{name}}</bdi></a>
% end
</p>
% else:
% if group["state"] != "resolved":
""" + _form("""<button>Resolve</button>
<label>in version <input name="fixed_in" value="{{next_build}}" maxlength="500" size="14"></label>
""", "page.path, app=group_apps[0]", state="resolved") + """\
% end
% if group["state"] != "open":
""" + _form("<button>Reopen</button>", "page.path, app=group_apps[0]", state="open") + """\
% end
% if group["state"] != "muted":
<details><summary>Mute</summary>
""" + _form("""<p><label>until <input type="date" name="until"></label>
<label>or for <input type="number" name="more_crashes" min="1" max="2147483647"> more crashes</label>
<label>or for <input type="number" name="more_devices" min="1" max="2147483647"> more devices</label></p>
<p><button>Mute</button> <span class="note">Without a condition it stays muted until somebody reopens it.</span></p>
""", "page.path, app=group_apps[0]", state="muted") + """</details>
% end
<details><summary>Comment</summary>
""" + _form("""<p><textarea name="comment" rows="3" cols="60" maxlength="5000" required></textarea></p>
<p><button>Add comment</button></p>
""", "page.path, app=group_apps[0]") + """</details>
% end
</div>
% for entry in reversed(group["history"]):
<p class="note">{{!when(entry["at"])}} <b>{{entry["what"]}}</b> <bdi>{{shorten(entry["detail"] or "", 5000)}}</bdi></p>
% end
</section>
"""

_TEMPLATES = {name: bottle.SimpleTemplate(source) for name, source in {
    "layout": """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><meta name="robots" content="noindex">
<title>{{shorten(title, 80)}} - backfeedr</title><link rel="icon" href="{{icon}}"><style>{{!style}}</style></head>
<body><a class="skip" href="#main">Skip to content</a>
<header><a class="brand" href="{{link("/")}}">backfeedr</a>
% if apps is not None:
<nav aria-label="Pages">
% tab = "/usage" if page.section == "/events" else page.section
% for path, name in pages:
<a href="{{link(path)}}"{{!' aria-current="page"' if path == tab else ""}}>{{name}}</a>
% end
</nav>
""" + _form('<button class="plain">Sign out</button>', '"/sign-out"') + """\
% end
</header>
% if apps and status == 200 and page.section != "/apps" and (len(apps) > 1 or apps[0].is_test):
<nav class="apps" aria-label="Apps">
% for name, label in [(None, "All live apps"), *((app.name, app.name + " (test)" * app.is_test) for app in apps)]:
<a href="{{link(page.section, app=name)}}"{{!' aria-current="true"' if page.app == name else ""}}
><bdi>{{label}}</bdi></a>
% end
</nav>
% end
<main id="main"><h1><bdi>{{shorten(title)}}</bdi></h1>
{{!body}}</main>
<footer>All days and times are UTC.</footer></body></html>
""",
    "error": """<p>{{hint}}</p>
<p><a href="{{page.root}}/">Overview</a></p>
""",
    "sign_in": """<div class="sign-in">
% if problem:
<p class="problem" role="alert">{{problem}}</p>
% end
""" + _form("""<input name="username" value="admin" autocomplete="username" hidden>
<p><label for="token">Admin token</label>
<input id="token" type="password" name="token" autocomplete="current-password" required autofocus></p>
<p><button>Sign in</button></p>
<p class="note">The server printed it at its first start. <code>BACKFEEDR_AUTH_TOKEN</code> sets a new one.</p>
""", next="{{target}}") + "</div>\n",
    "overview": """% for warning in warnings:
<p class="problem" role="alert">{{warning}}</p>
% end
% if is_empty:
<section class="hint"><p>Nothing received yet. Send a first crash with the key of an app
(<a href="{{link("/apps")}}">Apps</a> adds a key):</p>
<pre>{{curl_line(page.url, "bf_live_your_key")}}</pre></section>
% end
<section><h2><a href="{{link("/releases")}}">Is the latest release worse?</a></h2>
% for row in verdicts:
% verdict = row["verdict"] or {}
<p class="verdict">""" + _RELEASE[1] + """\
<b{{!' class="problem"' if verdict.get("word") == "worse" else ""}}>
{{verdict.get("text") or "no earlier release to compare with"}}</b>
% if verdict.get("before") and verdict.get("interval"):
<small>compared with <bdi>{{shorten(verdict["before"], 40)}}</bdi> at the same age:
{{"{:+.1f} to {:+.1f}".format(*verdict["interval"])}} percentage points</small>
% end
</p>
% end
% if not verdicts:
<p class="empty">""" + _NO_RELEASE + """</p>
% end
</section>
<div class="grid"><section><h2>New or regressed in the last 7 days: {{number(new_count)}}</h2>
""" + _table("new", _GROUP, _CRASHES, "Last seen", empty="No new or regressed crashes.") + """</section>
<section><h2><a href="{{link("/crashes", days=7)}}">To fix first</a></h2>
""" + _table("first", _GROUP, "Devices", _CRASHES, "Last seen", empty="No crashes in the last 7 days.", note="""
Ranked by devices that crashed in the newest release in the last 7 days, halved for each day since the last crash.
""") + """</section></div>
""" + _TILES + """<div class="grid"><section><h2>Exception types, 30 days</h2>{{!bar_chart(types)}}</section>
<section><h2>Crashing devices, 30 days</h2>{{!bar_chart(devices)}}</section></div>
""",
    "crashes": _FILTER + """<label>Version <input name="version" value="{{parameters.get("version", "")}}"></label>
<label>Period """ + _select("days", "periods", 'parameters["days"]') + """</label>
<label>Sort by """ + _select("sort", "sorts", 'parameters.get("sort", "crashes")') + """</label>
<label>State """ + _select("state", '[("", "all"), *states]', 'parameters.get("state", "")') + """</label>
<label>Text <input type="search" name="text" value="{{parameters.get("text", "")}}"></label>
<button>Show</button></form>
""" + _table(
        "groups", _GROUP, _CRASHES, "Devices", ("30 days", '{{!sparkline(row["days"], "Crashes")}}', ""),
        ("Versions", '<bdi>{{", ".join(shorten(version, 40) for version in row["versions"][-2:])}}</bdi>'
                     '{{", +{}".format(len(row["versions"]) - 2) if len(row["versions"]) > 2 else ""}}', ""),
        "First seen", "Last seen", empty="""
% if parameters != {"days": "all"}:
No matches. <a href="{{link("/crashes", days="all")}}">Show all</a>
% else:
No crashes stored{{" for " + page.app if page.app else ""}}. <a href="{{link("/apps")}}">Apps</a> has the keys for
sending one.
% end
""") + _PAGE_LINKS,
    "group": """<p><b><bdi>{{group["exception_type"] if group["place"] else ""}}</bdi></b>
<span class="soft"><bdi>{{shorten(report.get("exception_reason", ""), 5000)}}</bdi></span></p>
<dl class="facts">
% for name in ("count", "devices", "first_seen", "last_seen"):
<div><dt>{{name.replace("_", " ").replace("count", "crashes").capitalize()}}</dt><dd>{{!show(group[name])}}</dd></div>
% end
<div><dt>Group</dt><dd><code>{{group["group_hash"]}}</code></dd></div>
<div><dt>Export</dt><dd><a href="{{link(page.path + ".txt")}}">text</a>
<a href="{{link(page.path + ".md")}}">Markdown</a></dd></div></dl>
""" + _TRIAGE + """\
% if not report:
<p class="empty">The crashes of this group have expired. Its state and its history remain.</p>
% else:
<section><h2>Crashes per day</h2>{{!chart}}</section>
<section><h2>{{"Latest crash" if is_latest else "Crash"}}, {{!when(report["occurred_at"])}}</h2>
<p>
% for id, name, rel in ((older, "Older crash", "prev"), (newer, "Newer crash", "next")):
% if id:
<a class="more" href="{{link(page.path, report=id)}}" rel="{{rel}}">{{name}}</a>
% end
% end
</p>
<div class="crash"><div>
% if frames:
<ol class="trace" start="0">
% for symbol, place, is_own, raw in frames[:max_frames]:
<li{{!' class="own"' if is_own else ""}} title="{{shorten(raw)}}"><code><bdi>{{shorten(symbol, 1000)}}</bdi></code>
<span class="place"><bdi>{{shorten(place)}}</bdi></span></li>
% end
</ol>
% if frames[max_frames:]:
<p class="note">and {{number(len(frames) - max_frames)}} more frames</p>
% end
% for build in group["missing_symbols"]:
<p class="problem">Symbols of <bdi>{{build_name(build)}}</bdi> are missing: {{number(build["crashes"])}}
{{"crashes wait" if build["crashes"] > 1 else "crash waits"}} for them.
<code>python examples/symbols.py --server {{page.url}} App.xcarchive</code> sends them (build {{build["uuid"]}}).</p>
% end
% if not any(is_own for _, _, is_own, _ in frames):
<p class="note">No frame is known to be the app's own.</p>
% end
% else:
<p class="empty">This report has no stack trace.</p>
% end
</div><dl class="context">
% for name, value in fields:
<div{{!' class="long"' if len(value) > 100 and "_hash" not in name else ""}}><dt><bdi>{{shorten(name, 100)}}</bdi></dt>
<dd>{{!value}}</dd></div>
% end
</dl></div></section>
<div class="grid">
% session = {"app": report["app"], **{name: report.get(name) for name in ("session_id", "device_id_hash")}}
% for title, steps in (("Breadcrumbs", crumbs), ("Events of this session", before)):
% if steps:
<section><h2>{{title}}</h2>
""" + _table(
        "steps", ("Time", "{{row[0]}}", "bare number"),
        ("Action", '<bdi>{{row[1]}}</bdi> <span class="soft">{{row[2]}}</span>', "bare")) + """
% if steps is before:
<p><a href="{{link("/events", **session)}}">All events of this session</a></p>
% end
</section>
% end
% end
</div>
<div class="grid">
% for title, part in (("Versions", "versions"), ("Systems", "systems"), ("Devices", "device_models")):
<section><h2>{{title}}</h2>{{!bar_chart(group[part], group["count"])}}</section>
% end
</div>
% end
""",
    "events": """% if "session_id" in parameters:
<p>Session <code><bdi>{{parameters["session_id"]}}</bdi></code>
of <bdi>{{parameters.get("device_id_hash", "all devices")}}</bdi>, oldest event first.
<a href="{{link("/events")}}">All events</a></p>
% else:
""" + _FILTER + "<label>Type " + _select("type", '[("", "all"), *types]', 'parameters.get("type", "")') + """</label>
<label>Name <input name="name" value="{{parameters.get("name", "")}}"></label>
<label>Session <input name="session_id"></label> <button>Show</button></form>
% end
""" + _table(
        "events", ("Event", '{{row["type"]}} <b><bdi>{{shorten(row.get("name", ""), 80)}}</bdi></b>\n' + _APP + """
% text = details(row)
% if len(text) > 100:
<details class="soft"><summary><bdi>{{text[:100]}}...</bdi></summary><bdi>{{text}}</bdi></details>
% else:
<span class="soft"><bdi>{{text}}</bdi></span>
% end
""", "main"),
        ("Occurred", '{{!when(row["occurred_at"])}}', "bare"), _VERSION, _DEVICE, ("Session", """
% if row.get("session_id"):
<a href="{{link("/events", session_id=row["session_id"], device_id_hash=row.get("device_id_hash"))}}"><bdi>\
{{shorten(row["session_id"], 12)}}</bdi></a>
% end
""", "bare"), empty="""
% if next:
No match among the 20,000 events searched. The next page searches older ones.
% elif parameters:
No matches. <a href="{{link("/events")}}">Show all</a>
% else:
No events stored{{" for " + page.app if page.app else ""}}.
<code>examples/client.py</code> shows how an app sends its sessions.
% end
""") + _PAGE_LINKS,
    "usage": _TILES + _TILES.replace("in tiles:", "in back:") + """<div class="grid"><section>
<h2><a href="{{link("/events")}}">Events, 30 days</a></h2>
""" + _table(
        "events", ("Event", """<a href="{{link("/events", type=row["type"], name=row["name"])}}"><bdi>\
{{shorten(row["name"], 80) or "(no name)"}}</bdi></a> <span class="soft">{{row["type"]}}</span>""", "main"),
        ("30 days", '{{!sparkline(row["days"], "Events")}}', ""), ("Events", '{{!show(row["count"])}}', "number"),
        empty="No events in 30 days.") + """<p><a href="{{link("/events")}}">All events, one by one</a></p></section>
<section><h2><a href="{{link("/releases")}}">Adoption, 7 days</a></h2>
""" + _table("releases", _RELEASE, "Adoption", empty=_NO_RELEASE) + "</section></div>\n",
    "releases": """<p class="note">Sorted by
% if "sort" in parameters:
<a href="{{link("/releases")}}">first seen</a> | version</p>
% else:
first seen | <a href="{{link("/releases", sort="version")}}">version</a></p>
% end
""" + _table(
        "releases", _RELEASE, ("Verdict", '{{(row["verdict"] or {}).get("text", "-")}}', "verdict"),
        "Crash-free sessions", "Crash-free devices", "Crashes", "Sessions", "Adoption", "First seen", "Last seen",
        empty=_NO_RELEASE, note="Adoption is the share of the app's sessions in the last 7 days."),
    "apps": """% if notice:
<section class="hint" role="{{"status" if status == 200 else "alert"}}"><p
{{!' class="problem"' if status != 200 else ""}}>{{notice["message"]}}</p>
% if notice.get("secret"):
<p><code class="key">{{notice["secret"]}}</code></p>
% end
% if "curl" in notice:
<p>Put it into the app. To try it:</p><pre>{{notice["curl"]}}</pre>
% end
</section>
% end
% for app in apps:
<section><h2><bdi>{{app.name}}</bdi>{{" (test)" if app.is_test else ""}}</h2>
<p class="note">Created {{!when(app.created_at)}}. <a href="{{link("/", app=app.name)}}">Statistics</a></p>
""" + _table(
        "keys[app.name]", ("Key", "<code>{{row.prefix}}...</code>", "main"),
        ("Created", "{{!when(row.created_at)}}", ""),
        ("Last used", '{{iso(86_400_000 * row.last_used)[:10] if row.last_used else "-"}}', ""),
        ("Requests, 7 days", "{{number(row.requests)}}", "number"), ("Status", """
% if row.revoked_at:
revoked {{!when(row.revoked_at)}}
% else:
<details><summary>Revoke</summary><p>Reports sent with this key will be refused.</p>
""" + _form('<button class="danger">Revoke</button>', action="revoke", key="{{row.hash}}") + """</details>
% end
""", "bare"), empty="No key, so nothing can be sent.") + '<div class="actions">\n' + _form(
            "<button>Add key</button>", action="key", name="{{app.name}}") + """
<details><summary>Delete app</summary>
""" + _form("""<p>This deletes its keys and all its reports. Type its name to confirm.</p>
<label>Name <input name="typed" autocomplete="off" required></label> <button class="danger">Delete</button>
""", action="delete", name="{{app.name}}") + """</details></div></section>
% end
<section><h2>New app</h2>
""" + _form("""<p><label>Name <input name="name" maxlength="100" required></label></p>
<p><label><input type="checkbox" name="test" value="1"> Test app: not in public statistics</label></p>
<p><button>Create app and key</button></p>
""", action="create") + """</section>
<section><h2>Alerts</h2>
""" + _table(
        "channels", ("Channel", '<code><bdi>{{row["id"]}}: {{row["address"]}}</bdi></code>', "main"),
        ("App", '<bdi>{{row["app"] or "all live apps"}}</bdi>', ""),
        ("Alerts", '{{row["kinds"].replace(",", ", ")}}', ""),
        ("Last sent", '{{!when(row["sent_at"]) if row["sent_at"] else "never"}}', ""), ("Status", """
% if row["ended_at"]:
<span class="problem">ended {{!when(row["ended_at"])}}: its receiver asked for no more</span>
% elif row["error"]:
<span class="problem">{{row["error"]}}, {{!when(row["error_at"])}}; {{row["waiting"]}} waiting</span>
% else:
{{"{} waiting".format(row["waiting"]) if row["waiting"] else "ok"}}
% end
""", ""), ("Change", "\n" + _form('<button class="plain">Test</button>', action="test-channel", id='{{row["id"]}}')
             + _form('<button class="plain">Remove</button>', action="remove-channel", id='{{row["id"]}}'), "bare"),
        empty="No channels: nobody is told of new or regressed crashes.") + """
<details><summary>Add channel</summary>
""" + _form("""<p class="note">A webhook (https), slack+https or ntfy+https; with the package apprise, any
address that it supports.</p>
<p><label>Address <input name="url" size="30" required></label>
<label>App """ + _select("app", '[("", "all live apps"), *(app.name for app in apps)]') + """</label></p><p>
% for kind, is_on in fact_kinds.items():
<label><input type="checkbox" name="on-{{kind}}" value="1"{{" checked" if is_on else ""}}> {{kind}}</label>
% end
</p><p><label>Hour of the digest, UTC <input type="number" name="hour" min="0" max="23" value="7"></label></p>
<p><label><input type="checkbox" name="reason" value="1"> Send the reasons of crashes, too</label></p>
<p><button>Add channel</button></p>
""", action="add-channel") + """</details></section>
<section><h2>Feed</h2>
<p>An Atom feed of new and regressed crashes. {{"It has an address." if has_feed else "It has no address yet."}}</p>
<div class="actions">
""" + _form("<button>New address</button>", action="make-feed") + """\
% if has_feed:
""" + _form("<button>Withdraw address</button>", action="withdraw-feed") + """\
% end
</div></section>
""",
    "feed": """<?xml version="1.0" encoding="utf-8"?>
<feed xmlns="http://www.w3.org/2005/Atom"><title>Crashes{{" of " + page.app if page.app else ""}}</title>
<id>{{page.url}}/crashes.atom{{"?" + urlencode({"app": page.app}) if page.app else ""}}</id>
<updated>{{updated}}</updated><author><name>backfeedr</name></author>
<link rel="self" href="{{page.url}}/crashes.atom?{{urlencode(page.query)}}"/><link href="{{page.url}}/crashes"/>
% for row in news:
% link = "{}/crashes/{}?{}".format(page.url, row["group_hash"], urlencode({"app": row["app"]}))
<entry><id>{{link}}#{{row["what"] if row["what"] == "new" else row["at"]}}</id>
<title>{{row["what"].capitalize()}}: {{row["exception_type"]}}{{" in " + row["place"] if row["place"] else ""}}</title>
<updated>{{iso(row["at"])}}</updated><link href="{{link}}"/>
<summary>{{row["app"]}}{{", first in " + row["first_version"] if row["first_version"] else ""}}</summary></entry>
% end
</feed>
"""}.items()}

STYLE = """
:root { color-scheme: light dark; --paper: #fcfbf8; --ink: #1f1e1b; --soft: #66635b; --rule: #dcd8cd; --tint: #f3f0e8;
  --link: #1d5a96; --mark: #2f6da8; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --paper: #161614; --ink: #e9e6de; --soft: #a19d92; --rule: #383631;
  --tint: #201f1c; --link: #8cbcf0; --mark: #7fb0e4; --bad: #ff8f80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 0 1.25rem 2rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; -webkit-text-size-adjust: 100%; }
code, pre, .trace, .long dd { font-family: ui-monospace, Consolas, monospace; }
dl, dd, form, .figure, .chart p { margin: 0; }
th, dt, pre, footer, small, .note, .trace, .filter label { color: var(--soft); font-size: 0.9em; }
.empty, .soft, .place, .chart p { color: var(--soft); }
header, nav, .facts, .filter, .actions { display: flex; flex-wrap: wrap; gap: 0.4rem 1.3rem; align-items: baseline; }
header { padding: 0.9rem 0 0.6rem; border-bottom: 2px solid var(--ink); } header nav { flex: 1; }
.skip:not(:focus) { position: absolute; left: -99rem; }
.apps { padding: 0.5rem 0; border-bottom: 1px solid var(--rule); }
a, summary, .plain { color: var(--link); } nav a, .brand { text-decoration: none; padding: 0.2rem 0; }
h2 a, .brand, a[aria-current] { color: inherit; } a[aria-current] { border-bottom: 2px solid var(--mark); }
a[aria-current], .brand, .own, .key { font-weight: 600; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 1.4rem 0 0.8rem; } h2 { font-size: 0.95rem; margin: 0 0 0.5rem; }
section, footer { margin: 1.75rem 0 0; min-width: 0; }
footer, .tiles section { border-top: 1px solid var(--rule); padding-top: 0.6rem; }
.grid { display: grid; gap: 0 2.5rem; grid-template-columns: repeat(auto-fit, minmax(min(var(--least), 100%), 1fr));
  --least: 17rem; }
.tiles { --least: 9rem; column-gap: 2rem; } .tiles h2 { font-weight: 400; margin: 0; }
.figure { font-size: 1.9rem; line-height: 1.2; } .note, .verdict { margin: 0.2rem 0; }
.brief { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 1; overflow: hidden;
  word-break: break-all; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 400; overflow-wrap: normal; }
th, td { padding: 0.4rem 1.2rem 0.4rem 0; vertical-align: top; } :is(th, td):last-child { padding-right: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; } td.number, .list time { white-space: nowrap; }
.list tr { border-bottom: 1px solid var(--rule); }
.own, .hint, pre, .long dd, button { background: var(--tint); }
.bars :is(th, td) { padding-block: 0.15rem; } .bars th { color: inherit; font-size: 1em; width: 52%; }
.bars .number, th.number:first-child { width: 1%; } th.verdict { width: 38%; }
svg { display: block; width: 100%; overflow: visible; } .bars svg { margin-top: 0.4rem; }
rect { fill: var(--mark); } .day { fill-opacity: 0; } .day:hover { fill-opacity: 0.15; }
path { fill: none; stroke: var(--mark); stroke-width: 2; stroke-linecap: round; vector-effect: non-scaling-stroke; }
.dot { stroke-width: 5; } .spark { display: block; width: 7.4rem; }
.chart { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 0.35rem 0.6rem; }
.chart svg { border-block: 1px solid var(--rule); box-sizing: content-box; }
.chart p { display: flex; justify-content: space-between; font-size: 12px; line-height: 1; }
.chart p:first-child { flex-direction: column; text-align: right; } .chart p:last-child { grid-column: 2; }
.crash { display: grid; gap: 1.5rem 2.5rem; grid-template-columns: minmax(0, 2fr) minmax(0, 1fr); }
.trace { margin: 0; padding-left: 2.6rem; } .place { font-weight: 400; padding-left: 0.6rem; }
li { padding: 0.15rem 0 0.15rem 0.6rem; border-left: 3px solid transparent; }
.own { color: var(--ink); border-left-color: var(--bad); } .own .place { color: var(--link); }
.context > :not(.long) { display: grid; grid-template-columns: minmax(8rem, max-content) minmax(0, 1fr); gap: 0.8rem;
  padding: 0.2rem 0; }
.context dt { max-width: 9.5rem; }
pre, .long dd { margin: 0.2rem 0; padding: 0.5rem 0.7rem; white-space: pre-wrap; max-height: 22rem; overflow-y: auto; }
form, label { display: inline-block; } form, details { max-width: 100%; } p label { margin: 0 0.8rem 0.3rem 0; }
.filter { align-items: end; margin-bottom: 1rem; } .filter label { display: grid; }
input, select, button, textarea { font: inherit; color: inherit; border: 1px solid var(--soft); border-radius: 3px;
  padding: 0.3rem 0.6rem; max-width: 100%; }
input, select, textarea { background: var(--paper); } [type=number] { width: 7rem; }
input:not([type=checkbox]), select, button { min-height: 2.2rem; }
button, summary { cursor: pointer; } button:hover { border-color: var(--ink); }
.plain { border: 0; padding: 0; min-height: 0; background: none; } td form + form { margin-left: 0.8rem; }
.danger, .problem { color: var(--bad); }
.sign-in { max-width: 24rem; } .sign-in :is(form, label, #token) { display: block; width: 100%; }
.hint { padding: 0.3rem 1rem 0.8rem; border-left: 3px solid var(--mark); } .key { user-select: all; }
.actions, .list + details { margin-top: 0.6rem; } .more { margin-right: 1.5rem; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
@media (max-width: 60rem) {
  .crash { grid-template-columns: minmax(0, 1fr); }
  .list thead { position: absolute; clip-path: inset(50%); }
  .list, .list tbody { display: block; }
  .list tr { display: flex; flex-wrap: wrap; gap: 0 1.2rem; padding: 0.4rem 0; align-items: baseline; }
  .list td { padding: 0; width: auto; text-align: left; white-space: normal; }
  .list td:not(.main, .bare)::before { content: attr(data-label) " "; color: var(--soft); font: 0.85em system-ui; }
  .list .main { order: -1; flex-basis: 100%; }
  .list td:not(.main):is(:empty, :has(> bdi:empty)), :is(.list, .bars) .code { display: none; }
  .list .number + .bare { flex: 1 1 12rem; }
  .spark { display: inline-block; vertical-align: middle; }
  time::after { content: ", " attr(title); color: var(--soft); font-size: 0.9em; }
  a, nav a, .brand, summary, .plain { padding-block: 12px; }
  input:not([type=checkbox]), select, button { min-height: 40px; }
  header nav { order: 1; flex-basis: 100%; column-gap: 0.8rem; } .brand { flex: 1; }
  .apps { flex-wrap: nowrap; overflow-x: auto; white-space: nowrap; }
}
"""

PAGE_HEADERS = {
    "Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer", "Content-Security-Policy": (
        "default-src 'none'; img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'; style-src"
        f" 'sha256-{base64.b64encode(sha256(STYLE)).decode()}'")}

_TEMPLATE_GLOBALS = {
    "bar_chart": bar_chart, "build_name": build_name, "culprit": _culprit, "curl_line": curl_line, "details": _details,
    "device_name": device_name, "icon": _ICON, "iso": iso_time, "number": "{:,}".format, "pages": _PAGES,
    "shorten": _shorten, "sparkline": sparkline, "style": STYLE}


# == Backfeedr =================================================================
# The WSGI callable. A handler reads "decode, check, store, answer", and raises Refusal where it cannot go on.

_SUBMISSION = "backfeedr.submission"  # in an environ
_STATUS_LINES = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}


class Backfeedr(Closing):
    """The server as a WSGI callable, for any mount point.

    `Backfeedr(db_path="crashes.db")` takes further settings from the environment, `Backfeedr(Settings(...))` takes
    none. Raises SettingsError and StoreError. `.store` is for keys and queries from Python. Close it, or use it as a
    context manager. `clock` gives seconds since 1970. A new database gets an app and an admin token: `announce` is told
    them, once, in words for the operator. A `store` that is given takes the place of the file that the settings name,
    and is closed with the server; a `limiter` takes that of a RateLimiter, which knows of this process only.
    """

    def __init__(self, settings: Settings | None = None, *, clock: Callable[[], float] = time.time,
                 store: Store | None = None, limiter: RateLimiter | None = None,
                 announce: Callable[[str], Any] | None = None, **overrides: Any):
        if settings is not None and overrides:
            raise TypeError("give settings or single ones, not both")
        self.settings = settings or Settings.from_env(**overrides)
        self.store = store or Store(self.settings.db_path, clock, self.settings.retention_days,
                                    max_waiters=max(256, self.settings.threads), max_db_size=self.settings.max_db_size)
        self.metrics = Metrics(self.store)
        self.alerts = Alerts(self.store, self.settings.public_url, self.metrics.digest)
        self.refused = RefusedReports(self.store)
        self._limiter = limiter or RateLimiter(self.settings.rate_limit)
        # Python runs one thread at a time. Those that wait here sleep until it is their turn; those that wait for the
        # interpreter wake up each switch interval to ask.
        self._turn = threading.Lock()
        self._requests: Counter[tuple[str, str, int]] = Counter()  # by method, route and status
        self._counting = threading.Lock()
        made = self.store.start(self.settings.api_key, self.settings.auth_token)
        if made != (None, None):  # without `announce`, another server has the app, whose address is not known
            known = _url(self.settings.host, self.settings.port) if announce else "https://YOUR-SERVER"
            (announce or sys.stderr.write)(first_start_text(made, self.settings.public_url.rstrip("/") or known))
        self.pages = Dashboard(self.store, self.metrics, self.refused, self.alerts, self.settings.public_url)
        self._ingestion: dict[str, tuple[Callable[[bytes, str], Reports], Callable[..., JsonObject]]] = {
            # By path: what makes reports of a body and a device, and an answer of the reports and their seqs.
            "/api/v1/crashes": (lambda body, _: [parse_crash_body(body)], lambda crashes, seqs: {
                "id": crash_id(seqs[0]), "group_hash": crashes[0].group_hash}),
            "/api/v1/events": (lambda body, _: [parse_event(decode_json(body))], lambda events, seqs: {
                "id": event_ids(seqs)[0]}),
            "/api/v1/events/batch": (lambda body, _: parse_batch(decode_json(body)), lambda events, seqs: {
                "count": len(seqs), "ids": event_ids(seqs)}),
            "/api/v1/diagnostics": (lambda body, device: parse_diagnostics(body, self.store.now, device),
                                    _diagnostics_answer)}
        self._router = self._routes()

    def __call__(self, environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ.get("REQUEST_METHOD", ""), environ.get("PATH_INFO", "")
        if len(path) > 1 and path.endswith("/"):  # the same path
            path = path[:-1]
            environ = {**environ, "PATH_INFO": path}
        if method == "POST" and path in self._ingestion:  # not through bottle, which would take as long as our own part
            body, status, headers = self._answer(self._answer_submission, environ)
            start_response(_STATUS_LINES[status], [*headers.items(), ("Content-Length", str(len(body)))])
            self._count(method, path, status)
            return [body]
        try:
            path.encode("latin-1").decode("utf-8")
        except UnicodeError:  # bottle would drop these bytes and match what is left
            path = "/api/not found" if path.startswith("/api/") else "/not found"
        environ = {**environ, "PATH_INFO": path, "bottle.route": None}  # an outer bottle may have set it
        outer = None
        with suppress(RuntimeError):
            outer = bottle.request.environ
        answer: Iterable[bytes] = self._router(environ, start_response)
        route = environ["bottle.route"]
        self._count(route.method if route else "other", route.rule if route else "other", bottle.response.status_code)
        if outer is not None:  # an outer bottle restores the path of the request that it finds here
            bottle.request.bind(outer)
        return answer

    def _count(self, method: str, rule: str, status: int) -> None:
        """By the route and not the path: a stranger could make up paths without end."""
        with self._counting:
            self._requests[method, rule, status] += 1

    def deliver(self) -> Counter[str]:
        """Sends the alerts that are due, each once; how many were `sent`, and of how many the try `failed`. `serve`
        does so by itself; under another server, call it every minute, on one host or on several."""
        return self.alerts.deliver()

    def close(self) -> None:
        """Closes the database. May be called twice."""
        self.store.close()

    # Routes

    def _routes(self) -> bottle.Bottle:
        ask, router, admin = self.metrics, bottle.Bottle(), self._question_route
        public = partial(admin, is_public=True)
        router.default_error_handler = self._bottle_error
        routes: Iterable[tuple[str, str, Handler]] = (
            ("GET", "/api/v1/health", self._health),
            ("GET", "/api/v1/metrics/daily-crashes", public(ask.daily_crashes, "days")),
            ("GET", "/api/v1/metrics/crash-types", public(ask.crash_types, "days")),
            ("GET", "/api/v1/metrics/devices", public(ask.devices, "days")),
            ("GET", "/api/v1/metrics/active-devices", public(ask.active_devices, "days")),
            ("GET", "/api/v1/metrics/sessions", public(ask.sessions, "days")),
            ("GET", "/api/v1/metrics/retention", public(ask.retention, "days")),
            ("GET", "/api/v1/overview", public(ask.overview)),
            ("GET", "/api/v1/releases", self._releases),
            ("GET", "/api/v1/crashes", admin(
                ask.groups, "version", "days", "text", "state", "sort", "limit", "cursor")),
            ("GET", "/api/v1/crashes/<group_hash>", admin(ask.group, "limit", "cursor")),
            ("PATCH", "/api/v1/crashes/<group_hash>", self._triage),
            ("GET", "/api/v1/events", admin(ask.events, "type", "name", "session_id", "limit", "cursor")),
            ("GET", "/api/v1/symbols", admin(ask.symbols)),
            ("PUT", "/api/v1/symbols/<uuid>", self._put_symbols),
            ("GET", "/metrics", self._prometheus),
            # __call__ answers these; here they give a GET its 405.
            *(("POST", path, self._answer_submission) for path in self._ingestion))
        for method, path, handler in routes:
            router.route(path, method, partial(self._response, handler))
        for method, path, page in self.pages.routes():
            router.route(path, method, page)
        return router

    def _question_route(self, question: Callable[..., JsonObject], *names: str,
                        is_public: bool = False) -> Handler:
        """A route that answers a question about `app` and these parameters: for the admin, or if it is public and the
        settings say so, for everyone."""
        def handler(environ: Environ, **path: str) -> Answer:
            if not (is_public and self.settings.public_metrics):
                self._check_admin(environ)
            return 200, question(**path, **_parameters(_query(environ), "app", *names))
        return handler

    def _check_admin(self, environ: Environ) -> None:
        scheme, _, token = _header(environ, "AUTHORIZATION").partition(b" ")
        if scheme.lower() != b"bearer" or not token.strip():
            raise Refusal("missing admin token")
        if not self.store.is_admin(token.strip()):
            raise Refusal("invalid admin token")

    def _admin_body(self, environ: Environ) -> bytes:
        """The body of a request of the admin's, as it was sent."""
        body = _read_body(environ, self.settings.max_body_size)
        self._check_admin(environ)
        return body

    def _response(self, handler: Handler, **path: str) -> bottle.HTTPResponse:
        return bottle.HTTPResponse(*self._answer(handler, bottle.request.environ, **path))

    def _answer(self, handler: Handler, environ: Environ, **path: str) -> tuple[bytes, int, dict[str, str]]:
        """Body, status and headers of what a handler says, whatever happens: a text as it is, all else as JSON."""
        headers = dict(_HEADERS)
        try:
            status, answer = handler(environ, **path)
        except Exception as error:
            status, answer, more = _refused(_as_refusal(error))
            headers.update(more)
            if isinstance(error, Moved):
                headers["Location"] = self.pages.request(environ).moved(error.group_hash)
        if isinstance(answer, str):
            headers["Content-Type"] = "text/plain; version=0.0.4; charset=utf-8"
            return answer.encode(), status, headers
        return json.dumps(answer).encode(), status, headers

    def _bottle_error(self, error: bottle.HTTPError) -> bottle.HTTPResponse:
        """What bottle itself refuses, in JSON, or as a page for a browser that is not at the API."""
        environ, refusal = bottle.request.environ, _as_refusal(error.status_code)
        if "text/html" in environ.get("HTTP_ACCEPT", "") and not environ["PATH_INFO"].startswith("/api/"):
            answer: bottle.HTTPResponse = self.pages.error_page(self.pages.request(environ), refusal)
        else:
            answer = bottle.HTTPResponse(json.dumps({"error": str(refusal)}), error.status_code, _HEADERS)
        answer.headers.update({name: value for name, value in error.headers.items() if name == "Allow"})
        return answer

    # Handlers

    def _health(self, environ: Environ) -> Answer:
        self.store.check()
        return 200, {"status": "ok"}

    def _releases(self, environ: Environ) -> Answer:
        """As a public route; but a stranger who names no app does not learn the names of all."""
        status, answer = self._question_route(self.metrics.releases, "sort", is_public=True)(environ)
        try:
            if not _query(environ).get("app"):
                self._check_admin(environ)
        except Refusal:
            for release in answer["releases"]:
                del release["app"]
        return status, answer

    def _triage(self, environ: Environ, group_hash: str) -> Answer:
        body, named = self._admin_body(environ), _parameters(_query(environ), "app")
        given = decode_json(_decompress(environ, body, self.settings.max_body_size))
        self.store.triage(group_hash, parse_triage(given, self.store.now), **named)
        return 200, self.metrics.group(group_hash, **named)

    def _put_symbols(self, environ: Environ, uuid: str) -> Answer:
        body, build = self._admin_body(environ), image_uuid(uuid)
        if not build:
            raise Refusal("invalid uuid", detail="it is not that of a build, as dwarfdump --uuid prints it")
        part = parse_symbols(_decompress(environ, body, self.settings.max_body_size))
        answer, was_held = self.store.put_symbols(build, part)
        if answer["complete"] and not was_held:
            self.store.catch_up_in_background()
        return 200 if was_held else 201, answer

    def _prometheus(self, environ: Environ) -> Answer:
        self._check_admin(environ)
        with self._counting:
            requests = sorted(self._requests.items())
        refused = [(f"{{app={json.dumps(app, ensure_ascii=False)}}}", n) for app, n in self.refused.by_app().items()]
        figures = [
            ("requests_total", "counter", "Requests that reached the app, by route.", [
                (f'{{method="{method}",path="{path}",status="{status}"}}', n)
                for (method, path, status), n in requests]),
            ("rate_limited_total", "counter", "Requests with reports that the rate limit refused, by app.", refused),
            *self.store.vitals()]
        lines = [line for name, kind, meaning, samples in figures if samples for line in (
            f"# HELP backfeedr_{name} {meaning}", f"# TYPE backfeedr_{name} {kind}",
            *(f"backfeedr_{name}{suffix} {value:.15g}" for suffix, value in samples))]
        return 200, "\n".join([*lines, ""])

    # Reports

    def can_batch(self, method: str, path: str, key: str) -> bool:
        """Whether such a request may share a batch. It must not ask another host or the database about its key: that
        would hold up the others."""
        return (method == "POST" and path in self._ingestion and not getattr(self._limiter, "waits", True)
                and self.store.is_cached_key(sha256(key.encode("latin-1", "replace"))))

    def submit_all(self, environs: Iterable[Environ]) -> None:
        """Decodes requests to the ingestion and stores what they carry in one commit. The WSGI call, which does so for
        a request that comes alone, then only answers each."""
        submissions = []
        for environ in environs:
            environ[_SUBMISSION] = submission = Submission()
            submissions.append(submission)
            try:
                self._decode(environ, submission)
            except Refusal as refusal:
                refusal.__traceback__ = refusal.__context__ = None  # which hold the body
                submission.error = refusal
            except Exception as error:
                submission.error = error
            if not submission.reports:  # Apple's payload may be empty
                submission.receipt = Receipt(range(0), True)
        self.store.add_all([each for each in submissions if each.error is None and each.reports])
        self._recheck_keys([each for each in submissions if each.key_hash and not each.reports])

    def _recheck_keys(self, submissions: Sequence[Submission]) -> None:
        """Of what no commit has stored: a key may have been revoked since it was cached. Each is looked up once,
        because a database that is away makes each look wait."""
        for key_hash in {each.key_hash for each in submissions}:
            try:
                error = None if self.store.is_active_key(key_hash) else Refusal("invalid API key")
            except StorageUnavailable as unavailable:
                error = unavailable
            for each in submissions if error else ():
                each.error = error if each.key_hash == key_hash else each.error

    def _answer_submission(self, environ: Environ) -> Answer:
        if _SUBMISSION not in environ:
            self.submit_all([environ])
        submission = environ.pop(_SUBMISSION)  # as a host app may call again with the same one
        seqs, replayed = submission.result()
        _, answer = self._ingestion[environ["PATH_INFO"]]
        return 200 if replayed else 201, answer(submission.reports, seqs)

    def _decode(self, environ: Environ, submission: Submission) -> None:
        """Checks in the order of the contract: size, key, rate, signature, JSON, fields."""
        body = _read_body(environ, self.settings.max_body_size)
        key = _header(environ, "X_BACKFEEDR_KEY")
        key_hash = sha256(key)
        if not key:
            raise Refusal("missing API key")
        if not self.store.is_known_key(key_hash):
            raise Refusal("invalid API key")
        submission.key_hash = key_hash
        if not self._limiter.allow(key_hash):  # may ask another host, so not under the lock below
            self.refused.count(key_hash)
            raise Refusal("rate limit exceeded", self._limiter.retry_after(key_hash))
        parse, _ = self._ingestion[environ["PATH_INFO"]]
        with self._turn:
            timestamp, signature = _header(environ, "X_BACKFEEDR_TIMESTAMP"), _header(environ, "X_BACKFEEDR_SIGNATURE")
            if {"HTTP_X_BACKFEEDR_TIMESTAMP", "HTTP_X_BACKFEEDR_SIGNATURE"} & environ.keys():
                verify(key, timestamp, signature, body, self.store.now)
            elif self.settings.require_signature:
                raise Refusal("signature required")
            plain = _decompress(environ, body, self.settings.max_body_size)
            try:
                submission.reports = parse(plain, _header(environ, "X_BACKFEEDR_DEVICE").decode("utf-8", "replace"))
            except RecursionError:  # at a depth that can be read, but not written again
                raise Refusal("invalid JSON", detail="it is nested too deep") from None
            submission.idempotency = _idempotency(environ, signature, plain)


def _diagnostics_answer(reports: Sequence[Any], seqs: Sequence[int]) -> JsonObject:
    return {"count": len(seqs), "ids": [crash_id(seq) if type(each) is Crash else event_ids([seq])[0]
                                        for each, seq in zip(reports, seqs)],
            "group_hashes": [getattr(each, "group_hash", None) for each in reports]}


class RefusedReports:
    """Counts what the rate limit refuses: all phones of an app share its key, and are told no more than to come again.
    Logs it once a minute."""

    def __init__(self, store: Store):
        self._store, self._lock, self._logged_at = store, threading.Lock(), 0
        self._counts: Counter[tuple[bytes, int]] = Counter()  # by key and UTC day

    def count(self, key_hash: bytes) -> None:
        now = self._store.now
        with self._lock:
            self._counts[key_hash, now // DAY] += 1
            is_due = not 0 <= now - self._logged_at < 60 * SECOND
            self._logged_at = now if is_due else self._logged_at
        for text in self.today() if is_due else ():
            log.warning("%s", text)

    def by_app(self, day: int | None = None) -> Counter[str]:
        """Refused reports by the name of their app, of a UTC day or since this process began."""
        totals: Counter[str] = Counter()
        with self._lock:
            counts = list(self._counts.items())
        apps = {bytes.fromhex(key.hash): key.app for key in self._store.keys()} if counts else {}
        for (key_hash, of_day), count in counts:
            totals[apps.get(key_hash, "")] += count if day in (None, of_day) else 0
        return +totals

    def today(self, app: str | None = None) -> list[str]:
        """A sentence for each app of which something was refused today."""
        return [f"{n:,} report{'s' * (n > 1)} of {name} {'were' if n > 1 else 'was'} refused today: rate limit"
                for name, n in sorted(self.by_app(self._store.now // DAY).items()) if name and app in (None, name)]


def first_start_text(made: FirstStart, url: str) -> str:
    """What to tell an operator of the secrets that a start has made."""
    text = ""
    if made.key:
        text += f"Made the app 'default'. Its API key, shown only this once:\n\n    {made.key}\n\n"
    if made.token:
        text += f"The admin token, shown only this once; it opens the pages at {url}/\n\n    {made.token}\n\n"
    if made.key:
        text += "Send a first crash:\n\n    " + curl_line(url, made.key).replace("\n", "\n    ") + "\n\n"
    return text


# == Server ====================================================================
# waitress, and what has to be changed in it: it refuses in JSON, a stop answers every
# request that was sent, no client's address is logged, and reports that come together
# share a thread and a commit. Each class below says which fault of waitress it mends.

try:
    import waitress.server
    from waitress.channel import HTTPChannel
    from waitress.parser import HTTPRequestParser, ParsingError
    from waitress.task import ErrorTask, Task, ThreadedTaskDispatcher, WSGITask
except ImportError:  # only `serve` needs it; an app that runs under another server does not
    waitress = None
    HTTPChannel = HTTPRequestParser = ErrorTask = Task = ThreadedTaskDispatcher = WSGITask = object

DRAIN_SECONDS = 4.0  # how long a stop waits for requests that have begun to arrive
QUIET_SECONDS = 0.3  # after so long without a byte, a stop takes a connection to be idle
SWITCH_SECONDS = 0.002  # how long a thread may keep the interpreter while others wait for it
REQUEST_SECONDS = 60  # for a request to arrive, between two of a connection, and for an answer to get on
PIPELINED = 4  # requests that a connection may send ahead; after the answer to the last it is closed
SLOWEST = 2000  # bytes a second, of a phone on a bad day: each byte gives its request as much more time
BATCH_THREADS = 4  # one commits while the next one decodes; with two, 16 clients get 14 % less done
BATCHED_REQUESTS = 25  # in a batch; of 100 events each, the batches have as many rows as the store lets wait
BATCHED_BYTES = 1_000_000  # in a batch; decoded they take several times as much memory


def serve(settings: Settings, make: Callable[..., Backfeedr] = Backfeedr) -> None:
    """Serves until SIGTERM or SIGINT. Raises OSError where it cannot listen, and ImportError without waitress, before
    it touches the database: a first start's secrets are shown only once. `make` makes the server from settings with its
    real port, and tells `announce` what is to be printed."""
    if waitress is None:
        raise ImportError(_MISSING.format("waitress"))
    listener = _listen(settings.host, settings.port)
    settings = replace(settings, port=listener.getsockname()[1])
    made: list[str] = []
    if settings.verbose:
        log.addHandler(logging.StreamHandler())
        log.setLevel(logging.INFO)
    with listener, make(settings, announce=made.append) as app, app.alerts.running():
        server = _make_server(app, settings, listener)
        stopping = threading.Event()

        def stop(*_: Any) -> None:
            stopping.set()
            server.pull_trigger()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        print("backfeedr on", _url(settings.host, settings.port), flush=True)
        print("".join(made), end="", flush=True)
        app.store.catch_up_in_background()  # what a migration or a stop has left to do
        sys.stderr.write(_warning(settings, listener.getsockname()[0]))
        # The default of 5 ms starves the I/O thread, which has to win the interpreter back
        # after each call: reports take longer while pages are made. Much less wakes the
        # waiting threads too often. Set here and not on import, which may be in a host app.
        sys.setswitchinterval(SWITCH_SECONDS)
        gc.freeze()  # the collector no longer looks at what is here to stay: worth 5 % of a batch's time
        gc.set_threshold(20_000)  # nor again and again at what one commit counts, which has no cycles: 1 to 5 %
        while not stopping.is_set():
            server.asyncore.loop(timeout=1, use_poll=True, map=server._map, count=1)
        _drain(server)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, UnicodeError, TypeError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
        wrong = "port" if getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES) else "host"
        raise OSError(f"cannot listen on {host} port {port}: {reason};"
                      f" --{wrong} or BACKFEEDR_{wrong.upper()} takes another") from None


def _warning(settings: Settings, address: str) -> str:
    """What to tell an operator whose keys would travel in the clear; "" for others."""
    if ipaddress.ip_address(address.partition("%")[0]).is_loopback or settings.public_url.startswith("https://"):
        return ""
    return (f"backfeedr: {address} can be reached from other machines, and keys can be read on their way: put a proxy"
            " with https in front, and name its address in BACKFEEDR_PUBLIC_URL\n")


class _Parser(HTTPRequestParser):
    """A request. Answers some that waitress leaves without an answer."""

    came = 0.0  # when it was complete
    environ: Environ | None = None  # once a thread has begun with it

    def parse_header(self, header_plus: bytes) -> None:
        try:
            super().parse_header(header_plus)
        except ValueError as error:
            # For `http://[` or a length of 5,000 digits. waitress logs it and closes the connection.
            raise ParsingError(str(error)) from None
        finally:
            # Where no body follows or it is refused, waitress sends `100 Continue` and waits for one.
            if not self.chunked and not 0 < self.content_length < self.adj.max_request_body_size:
                self.expect_continue = False


class _Task(Task):
    """Common to all answers."""

    def build_response_header(self) -> Any:
        """Tells clients to send no more during a stop, which waitress does not: a client that went on sending would
        lose its last request. Logs the request."""
        if not self.channel.server.accepting:
            self.set_close_on_finish()
        if log.isEnabledFor(logging.INFO):
            request = self.request
            log.info("%s %s %.1f ms", _request_line(request), self.status[:3], 1000 * (time.monotonic() - request.came))
        return super().build_response_header()


class _ErrorTask(_Task, ErrorTask):
    """What waitress refuses, in JSON. Its own answer is plain text."""

    def execute(self) -> None:
        error = self.request.error
        body = json.dumps({"error": str(_as_refusal(error.code))}).encode()
        self.status = f"{error.code} {error.reason}"
        self.response_headers.extend(_HEADERS.items())
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class _AppTask(_Task, WSGITask):
    """An answer of the app."""

    def get_environment(self) -> Environ:
        """One for each request and not for each task: a batch has put the submission into it. A proxy on this host is
        believed that a client came by https; a header that makes no sense is not refused, as waitress would."""
        environ: Environ = self.request.environ or super().get_environment()
        if environ.get("HTTP_X_FORWARDED_PROTO") == "https" and environ["REMOTE_ADDR"] == "127.0.0.1":
            environ["wsgi.url_scheme"] = "https"
        self.request.environ = environ
        return environ


class _Channel(HTTPChannel):
    """A connection."""

    parser_class, task_class, error_task_class = _Parser, _AppTask, _ErrorTask
    __repr__ = object.__repr__  # that of waitress has the client's address, and is logged with errors
    began = last_activity = 0.0

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.requests_lock = threading.RLock()  # `received` takes it around waitress's own, which takes it, too

    def received(self, data: bytes) -> None:
        """Counts the time of a request from its beginning. waitress counts from the last byte, so a client that
        sends a byte now and then would keep its connection for ever. Takes few requests ahead: the answers to a
        packet of them, which the client need not read, are many megabytes."""
        begun, now = self.request, self.last_activity
        with self.requests_lock:  # else a worker would answer some of them meanwhile
            super().received(data)
            if len(self.requests) > PIPELINED:
                del self.requests[PIPELINED:]
                self.requests[-1].version, self.requests[-1].headers["CONNECTION"] = "1.1", "close"
        is_new = begun is None or self.request is not begun
        self.began = self.last_activity = now if is_new else min(now, self.began + len(data) / SLOWEST)

    def service(self) -> None:
        """Sends the answer at once if the next request of the connection is here already. Because of `send_bytes`
        the I/O thread would keep it until that one is answered, too."""
        super().service()
        if self.requests:
            self._flush_exception(self._flush_some, do_close=False)

    def _flush_some(self, do_close: bool = True) -> Any:
        """Takes the lock, which waitress's I/O thread does not. While that sent an answer, a worker sent the
        `100 Continue` for the next request, and both were sent twice and mixed."""
        with self.outbuf_lock:
            return self.connected and super()._flush_some(do_close)

    def writable(self) -> bool:
        """Not where `handle_write` would leave a small answer to the thread that works on it. waitress's I/O thread
        would spin until that is done, and take the interpreter from the thread that it waits for."""
        is_left = self.requests and not self.will_close and self.total_outbufs_len < self.adj.send_bytes
        return not is_left and bool(super().writable())


def _close_idle(server: Any, now: float) -> None:
    """Closes connections that were idle for too long. waitress spares those whose client does not read."""
    for channel in list(server.active_channels.values()):
        if channel.last_activity < now - REQUEST_SECONDS and (channel.total_outbufs_len or not channel.requests):
            channel.handle_close()  # at once: to a client that does not read, the socket is never ready


class _Dispatcher(ThreadedTaskDispatcher):
    """Gives all submissions that come while a thread decodes to that thread, which stores them in one commit.
    waitress wakes a thread for each request, which takes longer than the work; all others it still gets."""

    def __init__(self, app: Backfeedr, threads: int):
        super().__init__()
        self.set_thread_count(threads)
        self.app, self.is_stopped = app, False
        self.coming: SimpleQueue[_Channel | None] = SimpleQueue()  # whose requests wait for a batch; None wakes
        self.taking = threading.Lock()  # held by the thread that waits for requests and decodes them
        self.batch_threads = [threading.Thread(target=self.run, daemon=True) for _ in range(BATCH_THREADS)]
        for thread in self.batch_threads:
            thread.start()

    def add_task(self, channel: _Channel) -> None:
        request = channel.requests[0]
        request.came = time.monotonic()
        key = request.headers.get("X_BACKFEEDR_KEY", "")
        if request.error or not self.app.can_batch(request.command, request.path, key):
            super().add_task(channel)
        else:
            self.coming.put(channel)

    def run(self) -> None:
        while not self.is_stopped:
            self.store_batch()

    def store_batch(self) -> None:
        """Waits for requests, stores what they carry, and answers each."""
        batch: list[_Channel] = []
        with closing(self.take_all(batch)) as environs:
            self.attempt(self.app.submit_all, environs)
        for channel in batch:
            self.attempt(channel.service)

    def attempt(self, step: Callable[..., Any], *arguments: Any) -> None:
        """Logs an error, which must not end the thread or keep others from their answers."""
        try:
            step(*arguments)
        except BaseException:
            log.exception("unexpected error")

    def take_all(self, batch: list[_Channel]) -> Generator[Environ, None, None]:
        """Waits for a request, and takes it and all others that come while the caller decodes, into `batch`."""
        with self.taking, suppress(Empty):
            channel, size = self.coming.get(), 0
            while channel:
                batch.append(channel)
                request = channel.requests[0]
                environ = _AppTask(channel, request).get_environment()
                if time.monotonic() - request.came > BUSY_TIMEOUT:  # no thread was free for so long
                    environ[_SUBMISSION] = Submission(error=StorageUnavailable())
                elif channel.connected:
                    yield environ
                is_packed = "CONTENT_ENCODING" in request.headers  # and may become as large as any
                size += self.app.settings.max_body_size if is_packed else request.body_bytes_received
                has_room = len(batch) < BATCHED_REQUESTS and size < BATCHED_BYTES
                channel = self.coming.get_nowait() if has_room else None

    def shutdown(self, *arguments: Any, **options: Any) -> Any:
        self.is_stopped = True
        for _ in self.batch_threads:
            self.coming.put(None)
        for thread in self.batch_threads:
            thread.join(timeout=1)
        return super().shutdown(*arguments, **options)


def _make_server(app: Backfeedr, settings: Settings, listener: socket.socket) -> Any:
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # it warns of every request that waits
    server = waitress.server.create_server(
        app, _dispatcher=_Dispatcher(app, settings.threads), sockets=[listener], ident=None,
        max_request_body_size=settings.max_body_size + 65536,  # a little more: the app's own limit goes first
        connection_limit=_connection_limit(settings.threads + BATCH_THREADS),
        max_request_header_size=32768, inbuf_overflow=131072, recv_bytes=65536, cleanup_interval=10,
        asyncore_use_poll=True, clear_untrusted_proxy_headers=True,
        outbuf_high_watermark=1 << 40)  # at which a worker would wait for the client
    server.channel_class = _Channel
    server.maintenance = partial(_close_idle, server)
    # Head and body of an answer leave together, sent by the I/O thread: a tenth more speed. (As an option
    # of create_server it is deprecated.)
    server.adj.send_bytes = 16384
    return server


def _request_line(request: Any) -> str:
    """Method and path of a request as they may be logged: in printable ASCII, without query or key."""
    if not hasattr(request, "path") or request.error and request.error.code == 431:  # waitress did not read it
        return "- -"
    path = quote(request.path[:200], safe="/:@!$&'()*+,;=~", encoding="latin-1") or "-"
    return re.sub("(bf_[a-z]+_)[0-9A-Za-z]+", r"\1...", f"{request.command[:20]} {path}")


def _connection_limit(threads: int) -> int:
    """As many connections as there are files for: two each, as a large body takes one, beside the database's."""
    import resource  # which only POSIX has, and an app that runs under another server need not

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    return max(50, min(1000, (files - 3 * threads - 50) // 2))


def _drain(server: Any) -> None:
    """Stops accepting, and answers every request that was sent. waitress ends with requests in flight."""
    accepted = -1
    while len(server.active_channels) > accepted:
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
            if not is_busy and time.time() - channel.last_activity > QUIET_SECONDS:
                channel.will_close = True
    server.task_dispatcher.shutdown(timeout=1)


# == Operations ================================================================
# Back up, export, import and check a database while the server runs.

IMPORT_LINES = 1000  # at most in a transaction
IMPORT_BYTES = 1_000_000  # after which a transaction ends, too
MAX_LINE = 1 << 27  # bytes of an exported report: far above any body that a server accepts
LOW_DISK = 100_000_000  # bytes; with less than this free, `check` fails


def backup(store: Store, path: Path) -> None:
    """Copies the database as it is now to a new file that only its owner can read. Raises StoreError. The copy gets its
    name only when it is complete. One read transaction: it blocks no writer; the WAL grows until it is done."""
    if path.exists():
        raise StoreError(f"there is a file {path} already")
    try:
        # A temporary file has mode 0600, and is deleted also after an error.
        with tempfile.NamedTemporaryFile(prefix=path.name + ".", suffix=".partial", dir=path.parent) as partial, \
                closing(Connection(store.path, mode="ro")) as db:
            db.execute("vacuum into ?", (partial.name,))
            os.fsync(partial.fileno())
            os.link(partial.name, path)  # fails if another file took the name meanwhile
    except (OSError, sqlite3.Error) as error:
        raise StoreError(f"cannot write the backup {path}: {getattr(error, 'strerror', error)}") from None


def write_jsonl(out: TextIO, stored: StoredReport) -> None:
    """Writes a report as a line of JSON: as it was sent, with its id, app and time of receipt."""
    out.write(_encode(_exported(stored)) + "\n")


def csv_writer(out: TextIO, kind: Any) -> Callable[[StoredReport], Any]:
    """Writes reports as a table with a header. A spreadsheet reads no cell of it as a formula."""
    table = csv.DictWriter(out, ["id", "app", "is_test", "received_at", "clock_ahead_ms",
                                *[each for each in kind._fields if each != "images"]])
    table.writeheader()
    return lambda stored: table.writerow({name: _csv_cell(value) for name, value in _exported(stored).items()})


def _exported(stored: StoredReport) -> JsonObject:
    report_id = crash_id(stored.seq) if type(stored.report) is Crash else event_ids([stored.seq])[0]
    return as_sent({"id": report_id, **stored._asdict(), "report": None, **stored.report._asdict()}, exact_time)


# Spreadsheets skip control characters, and take the full-width signs for the others.
_FORMULA = re.compile("[-=+@\uff0d\uff1d\uff0b\uff20\x00-\x1f\x7f-\x9f]")


def _csv_cell(value: Any) -> Any:
    if type(value) in (list, dict):
        return _encode(value)
    return "'" + value if type(value) is str and _FORMULA.match(value) else value


_EXPORTED = {"app": str, "id": str, "is_test": bool, "received_at": str, "clock_ahead_ms": int, "extra": dict}


def _parse_exported(line: bytes) -> StoredReport:
    """A report from a line of `write_jsonl`, checked like one from a client. Raises Refusal."""
    given = {"extra": {}, "clock_ahead_ms": 0, **decode_json(line)}
    group = given.pop("group_hash", "")  # computed again, unless the frames that make it were cut
    for name, kind in _EXPORTED.items():
        if type(given.get(name)) is not kind:
            raise Refusal(f"invalid {name}" if given.get(name) is not None else f"missing {name}")
    app, report_id, is_test, received, ahead, extra = map(given.pop, _EXPORTED)
    if not 0 <= ahead < 10_000 * 366 * DAY:  # all years there are
        raise Refusal("invalid clock_ahead_ms")
    try:
        received_at = parse_time(received)
    except ValueError:
        raise Refusal("invalid received_at") from None
    match = re.fullmatch("(evt_)?([0-7][0-9a-f]{15})", report_id)
    # A seq is never before its time of receipt. It may be about a day later, after the server's clock was set back.
    if not match or not first_seq(received_at) <= int(match[2], 16) < first_seq(received_at + 2 * DAY):
        raise Refusal("invalid id")
    report: Any = (parse_event if match[1] else parse_crash)({**extra, **given})
    cut = extra.get("truncated")
    if type(cut) is list and "stack_trace" in cut and re.fullmatch("[0-9a-f]{16}", str(group)):
        report = report._replace(group_hash=group)
    return StoredReport(int(match[2], 16), app, is_test, received_at, ahead, report)


def import_jsonl(store: Store, lines: Iterable[bytes]) -> Counter[str]:
    """Stores what `write_jsonl` wrote and returns the summed counts of `Store.import_`. Raises StoreError with the
    number of the first bad line; the good lines before it are stored then."""
    counts: Counter[str] = Counter()
    try:
        for batch in _import_batches(lines):
            counts += store.import_(batch)
    except (StoreError, StorageUnavailable) as error:
        raise StoreError(f"{error}; {counts['stored']:,} reports before it were stored: fix this and import the"
                         " whole file again") from None
    return counts


def _import_batches(lines: Iterable[bytes]) -> Iterator[list[StoredReport]]:
    batch: list[StoredReport] = []
    size = 0
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
    """Without a WAL nobody writes; `immutable` keeps SQLite from making one."""
    return "ro" if Path(f"{path}-wal").exists() else "ro&immutable=1"


def _open_read_only(path: Path) -> Connection:
    return Connection(path, True, _read_only_mode(path))


def _check_file(path: Path) -> str:
    if not path.is_file():
        raise StoreError(f"there is no database {path}{_ANOTHER}")
    if not os.access(path, os.R_OK | os.W_OK):
        raise StoreError(f"{path} may not be read and written; a server could not use it")
    free = shutil.disk_usage(path.parent).free
    if free < LOW_DISK:
        raise StoreError(f"only {megabytes(free)} of the disk are free")
    return f"{path}, {megabytes(path.stat().st_size)}, WAL {megabytes(_wal_size(path))}, disk {megabytes(free)} free"


def _check_schema(path: Path) -> str:
    with closing(_open_read_only(path)) as db:
        check_is_ours(db, path)
        version: int = db.pragma("user_version")
        if not version:
            raise StoreError("there are no tables")
        return f"version {version}" + (
            f", which the next start upgrades to version {SCHEMA_VERSION}" if version < SCHEMA_VERSION else "")


def _check_pages(path: Path) -> str:
    with closing(_open_read_only(path)) as db:
        found = db.pragma("quick_check(1)")
        if found != "ok":
            raise StoreError(" ".join(found.splitlines()[-1:]))
        return f"{db.pragma('page_count'):,}, all sound"


def _check_roll_ups(path: Path) -> str:
    """Counts all reports again, by the same code into tables of its own, and compares."""
    with closing(sqlite3.connect("", isolation_level=None, uri=True)) as db:  # "": a temporary file
        db.execute("attach database ? as stored", (f"{path.as_uri()}?mode={_read_only_mode(path)}",))
        if db.execute("pragma stored.user_version").fetchone()[0] < SCHEMA_VERSION:
            return "not compared before the upgrade"
        db.executescript(FIGURE_TABLES)
        db.execute("begin")
        expired, = db.execute("""
            select coalesce(max(value), 0) from state where name like 'expired%' or name like 'early%'""").fetchone()
        recount(db)
        wrong = [table for figure in FIGURES for table in _unequal_tables(db, figure, expired)]
    if wrong:
        raise StoreError(f"these tables are not what they should be: {', '.join(wrong)}")
    return "agree with the reports"


# The first and the last report that a row has seen, which may have expired.
SPANS = {"sessions": ("first_seq", "last_seq"), "groups": ("first_seen", "last_seen"),
         "builds": ("first_seen", "last_seen"), "devices": ("first_day", "last_hour")}


def _unequal_tables(db: sqlite3.Connection, figure: type[Figure], expired: int) -> Iterator[str]:
    """`main` has what the reports say, `stored` what is to be checked."""
    for table, sums in figure.SUMS.items():
        if any(db.execute(query + " limit 1").fetchone() for query in _unequal_sums(table, sums, expired)):
            yield table
    for table in set(re.findall(r"create table (\w+)", figure.TABLES)) - {"medians"}:
        same = " and ".join(f"theirs.{each} = ours.{each}" for each in KEYS[table])
        first, last = SPANS.get(table, ("app_id", "app_id"))
        comparable = ""
        if "device" in table:  # which goes with its last report to the hour
            comparable = "(app_id, device) in (select app_id, device from main.devices where last_seq > :settled) and"
        elif table == "builds":  # of which others may have come first
            comparable = f"""(select count(*) from stored.builds as theirs where theirs.app_id = ours.app_id)
                < {MAX_BUILDS_OF_APP} and"""
        elif table == "groups":
            same += " and theirs.crashes = ours.crashes and theirs.devices = ours.devices"
        if db.execute(f"""
                select 1 from main.{table} as ours where {comparable} not exists (
                    select 1 from stored.{table} as theirs
                    where {same} and theirs.{first} <= ours.{first} and theirs.{last} >= ours.{last})
                limit 1""", {"settled": expired and expired + first_seq(HOUR)}).fetchone():
            yield table


def _unequal_sums(table: str, sums: Sums, expired: int) -> list[str]:
    """Queries for rows that are not as they should be. Where reports have expired, days after them are compared, and
    what cannot be less than what is left. A device or a session whose first report is gone would count on a later day,
    or for a later release."""
    columns, where = ", ".join([*KEYS[table], *sums.columns]), "app_id in (select id from apps)"  # not the deleted
    if table == "key_days":  # which no report tells
        return []
    if expired and table in ("active_days", "device_hours"):
        return [f"select 1 from main.{table} as ours left join stored.{table} as theirs using"
                f" ({', '.join(KEYS[table])}) where "
                + " or ".join(f"ours.{each} > coalesce(theirs.{each}, 0)" for each in sums.columns)]
    if expired and table in ("crash_days", "group_days", "event_names"):
        where += f" and day > {(expired >> SEQ_BITS) // DAY + 1}"
    elif expired and sums.lasts:
        return []
    elif table == "release_hours":  # of later ones, what is deleted depends on reports that may be gone
        where += f""" and hour <= (
            select min(first_seen) / {HOUR} + {24 * HEALTH_DAYS} from stored.builds as seen
            where seen.app_id = release_hours.app_id and seen.app_version = release_hours.app_version)"""
    ours, theirs = (f"select {columns} from {place}.{table} where {where}" for place in ("main", "stored"))
    less, more = f"{ours} except {theirs}", f"{theirs} except {ours}"
    return [less] if sums.window or table == "release_hours" else [less, more]  # old rows are deleted some time later


CHECKS: dict[str, Callable[[Path], str]] = {  # each returns what it found, or raises what is wrong
    "SQLite": lambda path: check_sqlite(), "file": _check_file, "schema": _check_schema, "pages": _check_pages,
    "roll-ups": _check_roll_ups}


def channel_warnings(path: Path) -> list[str]:
    """Says which channels of alerts do not get through."""
    with suppress(sqlite3.Error, TypeError), closing(_open_read_only(path)) as db:  # may be older, or damaged
        return [f"Channel {id} ({shown_address(url)}) has {'ended' if ended_at else 'failed'}: {error}"
                f" at {iso_time(error_at)}" for id, url, ended_at, error, error_at in db.execute(
                    "select id, url, ended_at, error, error_at from channels where error is not null order by id")]
    return []


# == Command line ==============================================================
# Every command works while the server runs: they share nothing but the file. To add one, write a method of Commands
# and a row of _COMMANDS.

def main(argv: Sequence[str] | None = None, make: Callable[..., Backfeedr] = Backfeedr,
         open_store: Callable[..., Store] = Store) -> int:
    """Runs a command. Returns 0, or 1 after an error; exits with 2 for wrong usage."""
    with redirect_stdout(_harmless(sys.stdout)), redirect_stderr(_harmless(sys.stderr)):
        try:
            return _run(_parser().parse_args(argv), make, open_store)
        except BrokenPipeError:  # nobody reads the output any more, nor what Python flushes at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 1
        except KeyboardInterrupt:
            problem: Any = "interrupted"
        except (SettingsError, StoreError, Refusal, OSError, UnicodeError, ImportError) as error:
            problem = error
        print(f"backfeedr: {problem}", file=sys.stderr)
        return 1


def _run(given: argparse.Namespace, make: Callable[..., Backfeedr], open_store: Callable[..., Store]) -> int:
    overrides = {each.name: getattr(given, each.name) for each in fields(Settings) if hasattr(given, each.name)}
    if given.command == "check":
        return _check(overrides)
    settings = Settings.from_env(**overrides)
    if given.command == "serve":
        serve(settings, make)
        return 0
    retention_days = settings.retention_days if os.environ.get("BACKFEEDR_RETENTION_DAYS") else None
    with open_store(settings.db_path, retention_days=retention_days,
                    may_create=given.command in ("app_create", "import")) as store:
        if said := getattr(Commands(store, given, settings), "do_" + given.command)():
            print(said, file=sys.stderr)
    return 0


class CommandParser(argparse.ArgumentParser):
    """Says which word a misspelt one may mean."""

    def error(self, message: str) -> Any:
        wrong = re.search(r"invalid choice: ('?[a-z].*) \(choose from (.+)\)", message)
        meant = wrong and get_close_matches(wrong[1].strip("'"), re.findall(r"[\w-]+", wrong[2]), 1)
        super().error(f"{message}; did you mean {meant[0]}?" if meant else message)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="backfeedr", description=(
        "Crash reports and usage figures for iOS apps, on your own host. Without a command, it serves."))
    parser.add_argument("--version", action="version", version=f"backfeedr {__version__}")
    groups = {"": parser.add_subparsers(title="commands", metavar="COMMAND")}
    for name, text, arguments in (("", "", _SERVER), *_COMMANDS):
        noun, _, verb = name.rpartition(" ")
        if noun not in groups:
            verbs = [each.split()[1] for each, *_ in _COMMANDS if each.startswith(noun + " ")]
            group = groups[""].add_parser(noun, help=", ".join(verbs))
            groups[noun] = group.add_subparsers(metavar="ACTION", required=True)
        command = groups[noun].add_parser(verb, help=text, description=text) if name else parser
        command.set_defaults(command=name.replace(" ", "_") or "serve")
        for argument, options in {**_DB, **arguments}.items():
            command.add_argument(argument, **options)
    return parser


class Commands:
    """The commands on a store. Each prints its result, and returns what else there is to say."""

    def __init__(self, store: Store, given: argparse.Namespace, settings: Settings):
        self.store, self.given, self.ask = store, given, Metrics(store)
        self.alerts = Alerts(store, settings.public_url, self.ask.digest)

    def do_app_create(self) -> str:
        print(self.store.create_app(self.given.NAME, self.given.test))
        return f"Made the app {self.given.NAME!r}. Its API key is shown only this once."

    def do_app_list(self) -> None:
        _print_table("APP KIND KEYS CREATED", [
            (app.name, "test" if app.is_test else "live", app.keys, _date(app.created_at))
            for app in self.store.apps()])

    def do_app_delete(self) -> str:
        name = self.given.NAME
        if not self.given.yes:
            if sys.stdin is None or not sys.stdin.isatty():
                raise StoreError(f"there is no terminal to confirm on; --yes deletes {name!r} without asking")
            print(f"This deletes all reports of the app {name!r}. Type its name again: ", end="", file=sys.stderr,
                  flush=True)
            if sys.stdin.readline().rstrip("\n") != name:
                raise StoreError("the names differ; nothing was deleted")
        self.store.delete_app(name)
        try:
            self.store.prune()
        except StorageUnavailable:
            raise StoreError(f"the app {name!r} is deleted, but not all its reports: 'prune' does the rest") from None
        return f"Deleted the app {name!r}, its keys and all its reports."

    def do_key_create(self) -> str:
        print(self.store.create_key(self.given.NAME))
        return f"Made another key for the app {self.given.NAME!r}. It is shown only this once."

    def do_key_list(self) -> None:
        _print_table("KEY APP CREATED REVOKED LAST_USED REQUESTS_IN_7_DAYS", [
            (key.prefix + "...", key.app, _date(key.created_at), _date(key.revoked_at),
             _date(key.last_used and key.last_used * DAY), f"{key.requests:,}") for key in self.store.keys()])

    def do_key_revoke(self) -> str:
        key = self.store.revoke_key(self.given.PREFIX)
        return f"Revoked the key {key.prefix}... of the app {key.app!r}."

    def do_device_show(self) -> None:
        found = self.ask.device(self.given.HASH)
        if not any(found.values()):
            raise StoreError(f"nothing is stored about a device {self.given.HASH!r}")
        print(json.dumps(found, indent=2, ensure_ascii=False))

    def do_device_forget(self) -> str:
        deleted = self.store.forget_device(self.given.HASH)
        if not deleted:
            raise StoreError(f"nothing is stored about a device {self.given.HASH!r}")
        return f"Forgot the device {self.given.HASH!r}: {_report_counts(deleted)}."

    def do_symbols_list(self) -> None:
        found = self.ask.symbols()
        _print_table("UUID BINARY ARCH ROWS SIZE UPLOADED", [
            (each["uuid"], each["binary"], each["arch"], f"{each['rows']:,}", megabytes(each["size"]),
             each["uploaded_at"][:10] if each["complete"] else "not complete") for each in found["symbols"]])
        print("\nMissing, though crashes wait for them:\n" if found["missing"] else "\nNone are missing.")
        if found["missing"]:
            _print_table("UUID BUILD APP CRASHES", [
                (each["uuid"], build_name(each), each["app"] or "-", f"{each['crashes']:,}")
                for each in found["missing"]])

    def do_symbols_delete(self) -> str:
        return f"Deleted the symbols of the build {self.store.delete_symbols(self.given.UUID)}."

    def do_alert_add(self) -> str:
        given, said = self.given, ""
        kinds = [kind for kind in re.split("[, ]+", given.on) if kind]
        number, secret = self.alerts.add(given.URL, given.app, kinds, given.with_reason, given.hour)
        if secret:
            print(secret)
            said += " Its secret is shown only this once."
        if "http" in urlsplit(given.URL).scheme.split("+"):
            said += "\nOthers can read what is sent over http://; use https:// unless it stays on this host."
        return f"Made channel {number}.{said}"

    def do_alert_list(self) -> None:
        _print_table("ID CHANNEL APP FACTS LAST_SENT WAITING STATE", [
            (each["id"], each["address"], each["app"] or "all live apps", each["kinds"], _date(each["sent_at"]),
             each["waiting"], "ended" if each["ended_at"] else each["error"] or "good")
            for each in self.alerts.channels()])

    def do_alert_test(self) -> str:
        self.alerts.test(self.given.ID)
        return f"Channel {self.given.ID} took a test message."

    def do_alert_remove(self) -> str:
        self.alerts.remove(self.given.ID)
        return f"Removed channel {self.given.ID}."

    def do_deliver(self) -> str:
        done = self.alerts.deliver()
        return f"Messages sent: {done['sent']:,}; failed, to be tried again: {done['failed']:,}"

    def do_prune(self) -> str:
        store, size = self.store, self.store.size
        deleted = store.prune()
        kept = f"older than {store.retention_days} days" if store.retention_days else "(the retention keeps all)"
        return (f"Deleted {_report_counts(deleted)} {kept}; gave back {megabytes(max(0, size - store.size))}"
                f" of {megabytes(size)}.")

    def do_backup(self) -> str:
        backup(self.store, Path(self.given.FILE))
        return f"Wrote {self.given.FILE}, {megabytes(os.stat(self.given.FILE).st_size)}."

    def do_export(self) -> None:
        given, kind, out = self.given, _KINDS[self.given.KIND], sys.stdout
        if given.bom and given.format != "csv":
            raise StoreError("--bom is for --format csv: import reads jsonl without one")
        out.reconfigure(encoding="utf-8", newline="")  # type: ignore[union-attr]
        out.write("\ufeff" * given.bom)
        reports = self.store.export(kind, given.app, given.since)
        write = csv_writer(out, kind) if given.format == "csv" else partial(write_jsonl, out)
        for stored in reports:
            write(stored)
        out.flush()

    def do_import(self) -> str:
        with self.given.FILE as file:
            counts = import_jsonl(self.store, iter(lambda: file.readline(MAX_LINE), b""))
        return (f"Stored {counts['stored']:,} reports; {counts['known']:,} were here already, and"
                f" {counts['expired']:,} are older than the retention.")


def _report_counts(rows: Counter[str]) -> str:
    crashes, events = rows["crashes"], rows["events"]
    return f"{crashes:,} crash{'es' * (crashes != 1)} and {events:,} event{'s' * (events != 1)}"


def _check(overrides: dict[str, Any]) -> int:
    path = Path(overrides.get("db_path") or os.environ.get("BACKFEEDR_DB_PATH") or Settings.db_path).absolute()
    checks = {"settings": lambda _: f"{len(fields(Settings.from_env(**overrides)))}, all good", **CHECKS}
    status = limit = 0
    for name, look in checks.items():
        try:
            print(f"ok  {name}: {look(path)}", flush=True)
        except (TypeError, ValueError, SettingsError, StoreError, sqlite3.Error, OSError) as error:
            is_damage = type(error) in (TypeError, ValueError)  # a column may have any kind of value then
            print(f"BAD {name}: {'the file is damaged: ' * is_damage}{error}")
            status = 1
            if name == "file" and not path.is_file():  # there is nothing more to say
                return status
    with suppress(SettingsError):  # which has been printed
        limit = Settings.from_env(**overrides).max_db_size
    for warning in (*size_warnings(path, limit), *channel_warnings(path)):
        print(f"WARN {warning}")
    return status


class _Terminal:
    """A terminal that no report controls. Characters that move the cursor, begin a command or turn the direction of
    the text are written as JSON escapes them; tabs and line ends stay."""

    CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
                          "|\r(?!\n)")

    def __init__(self, terminal: TextIO):
        self._terminal = terminal

    def __getattr__(self, name: str) -> Any:
        return getattr(self._terminal, name)

    def write(self, text: str) -> None:
        self._terminal.write(self.CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def _harmless(out: TextIO) -> Any:
    """Where to print what reports may have in them. To a pipe or a file it goes as it is."""
    return _Terminal(out) if out and out.isatty() else out  # a process may have none


def _print_table(head: str, rows: Sequence[Sequence[Any]]) -> None:
    lines = [[each.replace("_", " ") for each in head.split()], *rows]
    widths = [max(len(str(cell)) for cell in column) for column in zip(*lines)]
    for line in lines:
        print("  ".join(str(cell).ljust(width) for cell, width in zip(line, widths)).rstrip())


def _date(time_ms: int | None) -> str:
    return "-" if time_ms is None else iso_time(time_ms)[:10]


def _start_of_day(text: str) -> int:
    try:
        return parse_time(text + "T00:00:00Z")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date like 2026-03-12") from None


def _open_input(name: str) -> BinaryIO:
    """As an argument's type it runs first: a missing file must not leave a new database behind."""
    try:
        return sys.stdin.buffer if name == "-" else open(name, "rb")
    except OSError as error:
        raise StoreError(f"cannot read {name}: {error.strerror}") from None


class _PrintHandbook(argparse.Action):
    """Prints a topic of the handbook, or a line for each topic, and exits. The handbook is a file beside the program,
    in its .pyz, or where a wheel puts it."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, topic: Any,
                 option: str | None = None) -> None:
        sections = dict(part.split("\n", 1) for part in self._text().split("\n## ")[1:])
        if topic and topic not in sections:
            parser.error(f"invalid choice: {topic!r} (choose from {', '.join(sections)})")
        lines = [f"{name:12}{text.strip().splitlines()[0]}" for name, text in sections.items()]
        print(sections[topic].strip() if topic else "\n".join(lines))
        parser.exit()

    def _text(self) -> str:
        here = os.path.dirname(__file__)
        for folder in (here, os.path.join(here, "examples"), os.path.join(sys.prefix, "share", "backfeedr")):
            with suppress(OSError):
                return str(globals()["__loader__"].get_data(os.path.join(folder, "handbook.md")), "utf-8")
        raise StoreError("there is no handbook.md: copy examples/handbook.md beside backfeedr.py")


_KINDS: dict[str, Any] = {"crashes": Crash, "events": Event}
_UNSET = {"default": argparse.SUPPRESS}  # what is not given stays unset, so that the environment decides
_DB = {"--db": dict(dest="db_path", metavar="FILE", help="the database (default: backfeedr.db)", **_UNSET)}
_SERVER = {"--host": dict(help="the address to listen on (default: 127.0.0.1)", **_UNSET),
           "--port": dict(type=int, help="the port (default: 8080); 0 takes a free one", **_UNSET),
           "--verbose": dict(action="store_true", help="log a line for each request, on standard error", **_UNSET)}
_NAME = {"NAME": dict(help="the app's name")}
_HASH = {"HASH": dict(help="the device_id_hash that the app sends")}
_ID = {"ID": dict(type=int, help="the channel's number: see alert list")}
_COMMANDS: Sequence[tuple[str, str, Mapping[str, Any]]] = (  # name, help, arguments
    ("serve", "start the server", _SERVER),
    ("app create", "make an app and print its first key", {
        **_NAME, "--test": dict(action="store_true", help="a test app: it is in no public figure")}),
    ("app list", "list the apps", {}),
    ("app delete", "delete an app, its keys and all its reports", {
        **_NAME, "--yes": dict(action="store_true", help="do not ask to type the name again")}),
    ("key create", "make another key for an app and print it", _NAME),
    ("key list", "list the keys, each by its visible beginning", {}),
    ("key revoke", "end a key at once", {"PREFIX": dict(help="the key, or enough of its beginning")}),
    ("device show", "print all that is stored about a device, as JSON", _HASH),
    ("device forget", "delete all that is stored about a device", _HASH),
    ("symbols list", "list the builds whose symbols are here, and those whose are missing", {}),
    ("symbols delete", "delete the symbols of a build", {
        "UUID": dict(help="the build's UUID, or enough of its beginning")}),
    ("alert add", "add a channel for alerts; prints its secret", {
        "URL": dict(help="https://... (a webhook), slack+https://..., ntfy+https://HOST/TOPIC, or one of Apprise's"),
        "--app": dict(metavar="NAME", help="only of this app (default: of all live ones)"),
        "--on": dict(metavar="FACT,...", default="", help="of these facts: " + ", ".join(
            kind + " (default)" * is_on for kind, is_on in FACT_KINDS.items())),
        "--with-reason": dict(action="store_true", help="send the crash's reason, too"),
        "--hour": dict(type=int, choices=range(24), metavar="H", default=7, help="of the digest, UTC (default: 7)")}),
    ("alert list", "list the channels, and what is wrong with them", {}),
    ("alert test", "send a test message, and say what came back", _ID),
    ("alert remove", "remove a channel", _ID),
    ("deliver", "send the alerts that are due; a server does so by itself", {}),
    ("prune", "delete what is older than the retention, now", {}),
    ("backup", "write a copy of the database to a new file", {
        "FILE": dict(help="the new file; one that exists is not replaced")}),
    ("export", "print crashes or events", {
        "KIND": dict(choices=_KINDS, help="which reports to print"),
        "--app": dict(metavar="NAME", help="only of this app (default: of all)"),
        "--since": dict(metavar="DATE", type=_start_of_day, default=0, help="received on this day (UTC) or later"),
        "--format": dict(choices=("jsonl", "csv"), default="jsonl",
                         help="jsonl (the default), which import reads, or csv, for a spreadsheet"),
        "--bom": dict(action="store_true", help="begin csv with a byte order mark, as Excel needs for UTF-8")}),
    ("import", "store what export has printed as jsonl", {
        "FILE": dict(type=_open_input, help="the file; - is standard input")}),
    ("check", "say whether the database is as it should be", {}),
    ("help", "explain a topic; without one, list the topics", {
        "TOPIC": dict(nargs="?", default="", action=_PrintHandbook, help="one of those that help lists")}))


if __name__ == "__main__":
    sys.exit(main())
