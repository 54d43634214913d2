#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["bottle>=0.13", "waitress>=3.0.1"]
# ///
"""backfeedr: crash reports and usage figures for iOS apps, kept on your own host.

The whole server is this file. Copy it to a machine with Python 3.9 or later,
install bottle and waitress, and run `python backfeedr.py`. It prints an API key
and the curl line that sends a first crash:

    curl -X POST http://127.0.0.1:8080/api/v1/crashes -H "X-Backfeedr-Key: bf_live_..." \\
        -d '{"exception_type": "SIGABRT", "occurred_at": "2026-03-12T14:22:31Z"}'

It is a WSGI callable, too: `Backfeedr(db_path="crashes.db")` mounts in any app.

The rooms, each of which uses only those above it (but Templates, which stand below for their length):

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
    add a field to a report     REPORT_TABLES with SCHEMA_VERSION, migrate, and _CRASH_FIELDS or _EVENT_FIELDS
    add a figure                a class in FIGURES with SCHEMA_VERSION, migrate, and a question in Metrics
    add a page                  Dashboard.routes, a method there, and a template with _PAGES above it
    add a command               a function in Command line, and a row of _COMMANDS
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
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import date, datetime, timezone
from difflib import get_close_matches
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial, reduce
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from itertools import accumulate, chain, compress, groupby, islice, product, repeat
from json.decoder import scanstring  # type: ignore[attr-defined]
from operator import attrgetter, itemgetter, lt
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
_TYPE_NAMES = {str: "a text", int: "a whole number", bool: "1 or 0"}
_BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
_PREFIX = "BACKFEEDR_"
# What it gives the containers beside services whose names begin with ours.
_KUBERNETES = re.compile(r"BACKFEEDR_(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)=.*|PORT(_[0-9]+_\w+)?=.*://.*"
                         r"|PORT_[0-9]+_[A-Z]+_(PROTO|PORT|ADDR)=.*)")
_CLIENT_VARIABLES = {"BACKFEEDR_ENDPOINT"}  # where examples/client.py sends to


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
            value, kind = getattr(self, each.name), type(each.default)
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
        environ = os.environ if environ is None else environ
        variables = {_PREFIX + each.name.upper(): each for each in fields(cls)}
        given = {name: text for name, text in environ.items() if text and name.startswith(_PREFIX)}
        if ignored := sorted(name for name, text in given.items() if _KUBERNETES.fullmatch(f"{name}={text}")):
            log.warning("ignored %s: Kubernetes sets them for a service", ", ".join(ignored))
            given = {name: text for name, text in given.items() if name not in ignored}
        if unknown := sorted(given.keys() - variables.keys() - _CLIENT_VARIABLES):
            names = [name[len(_PREFIX):] for name in variables]
            close = get_close_matches(unknown[0][len(_PREFIX):], names, 1)
            hint = f"did you mean {_PREFIX}{close[0]}?" if close else f"after {_PREFIX} comes one of {', '.join(names)}"
            raise SettingsError(unknown[0], f"there is no such setting; {hint}")
        values = {each.name: _from_text(given[name], type(each.default))
                  for name, each in variables.items() if name in given}
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
SCHEMA_VERSION = 4

GROUP_INDEX = """
create index crashes_by_group on crashes (  -- covers what groups are counted by
    app_id, group_hash, received_at, occurred_at, clock_ahead_ms, app_version, os_version, device_model,
    device_id_hash);
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
-- the highest of its that went early, and worse_, first_seen of its release that was told last to be worse;
-- trimmed_day, on which old sums were deleted last.
create table state (name text primary key, value integer not null) without rowid;
""" + GROUP_INDEX


# == Values ====================================================================
# What a client may be told, and the small conversions of which the rest is made.

SECOND = 1000  # all times are in milliseconds
HOUR = 3600 * SECOND
DAY = 24 * HOUR
MAX_SKEW = 300 * SECOND  # how fast a device's clock may be and still be believed
SEQ_BITS = 20  # of a seq's counter within a millisecond


class Refusal(Exception):
    """A request that is not taken. `str()` is what the client is told, `detail` what may help its developer, and
    `retry_after` after how many seconds the same request may succeed."""

    def __init__(self, text: str, retry_after: int | None = None, detail: str = ""):
        super().__init__(text)
        self.retry_after, self.detail = retry_after, detail


class Moved(Refusal):
    """The crashes of a group have moved to another one."""

    def __init__(self, group_hash: str):
        super().__init__("moved", detail=f"to {group_hash}")
        self.group_hash, self.location = group_hash, ""


class StorageUnavailable(Refusal):
    """The database can not be used now; nothing of the request was acknowledged."""

    def __init__(self) -> None:
        super().__init__("storage unavailable", retry_after=2)


_RFC3339 = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt]([01][0-9]|2[0-3]):([0-5][0-9]):([0-5][0-9])(?:\.([0-9]{1,9}))?"
    r"(?:[Zz]|([+-])([01][0-9]|2[0-3]):?([0-5][0-9]))")
_DAY_ZERO = date(1970, 1, 1).toordinal()


def parse_time(text: str) -> int:
    """Milliseconds since 1970 UTC of an RFC 3339 time with a zone. Raises ValueError. (datetime overflows where an
    offset leads out of the years 1 to 9999, and before Python 3.11 it knows neither Z nor nanoseconds.)"""
    match = _RFC3339.fullmatch(text)
    if match is None:
        raise ValueError("not an RFC 3339 time with a zone")
    day, hours, minutes, seconds, fraction, sign, zone_hours, zone_minutes = match.groups()
    offset = int(sign + "1") * (int(zone_hours) * HOUR + int(zone_minutes) * 60_000) if sign else 0
    return ((date.fromisoformat(day).toordinal() - _DAY_ZERO) * DAY + int(hours) * HOUR + int(minutes) * 60_000
            + int(seconds) * SECOND + int((fraction or "")[:3].ljust(3, "0")) - offset)


def parse_occurred_at(value: Any) -> int:
    """Milliseconds since 1970 UTC of the time in a report. A number is seconds since 1970, or if that would be before
    2008, since 2001, which is Swift's default; from 1e12 on it is milliseconds. Raises ValueError."""
    if type(value) in (int, float):
        time_ms = value if value >= 1e12 else SECOND * (value if value >= 1.2e9 else value + 978_307_200)
        if not (1 - _DAY_ZERO) * DAY <= time_ms < (date.max.toordinal() + 1 - _DAY_ZERO) * DAY:
            raise ValueError("is not within the years 1 to 9999")
        return int(time_ms)
    try:
        return parse_time(value)
    except (ValueError, TypeError):
        has_no_zone = type(value) is str and _RFC3339.fullmatch(value + "Z")
        raise ValueError("has no zone" if has_no_zone else "is not a time like 2026-03-12T14:22:31Z") from None


def iso_time(time_ms: int) -> str:
    """The RFC 3339 time, in UTC and within the years 1 to 9999."""
    days, rest = divmod(time_ms, DAY)
    day = date.fromordinal(min(max(_DAY_ZERO + days, 1), date.max.toordinal())).isoformat()
    seconds, fraction = divmod(rest, SECOND)
    return (f"{day}T{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
            + (f".{fraction:03}" if fraction else "") + "Z")


def exact_time(time_ms: int) -> str:
    """The RFC 3339 time that `parse_time` reads back: not in UTC where that leads out of the years 1 to 9999."""
    for zone, minutes in (("Z", 0), ("+23:59", 1439), ("-23:59", -1439)):
        text = iso_time(time_ms + minutes * 60_000)[:-1] + zone
        if parse_time(text) == time_ms:
            break
    return text


EPOCH = 1_167_609_600_000  # 2007, when the first iPhone came: an earlier time is that of a clock that was never set


def clock_ahead(latest: int, now: int) -> int:
    """By how many milliseconds the clock is fast whose latest time this is. All reports of a request are moved by it,
    so that durations stay right."""
    return latest - now if latest > now + MAX_SKEW else 0


def counted_at(occurred_at: int, received_at: int, ahead_ms: int) -> int:
    """When a report counts: at the device's time, as far as its clock is fast before it; at receipt, if the clock was
    never set."""
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
    """What may be shown of a key: 8 of its 32 digits, or a third of a key of the operator's own."""
    return key[:16 if re.fullmatch("bf_(live|test)_[0-9a-f]{32}", key) else min(16, len(key) // 3)]


def sha256(data: bytes | str) -> bytes:
    """The digest under which keys and tokens are kept."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).digest()


def version_key(version: str) -> list[Any]:
    """Sorts 1.10 after 1.9, 1.2 (10) after 1.2 (9), and 1.2.0-rc.1 and 1.2.0b3 before 1.2.0."""
    release, *pre_releases = re.split("-|(?<=[0-9])(?=[A-Za-z])", version, maxsplit=1)
    pre_release = "".join(pre_releases)
    numbers = [[(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in re.findall("[0-9]+|[^0-9]+", text)]
               for text in (release, pre_release)]
    return [numbers[0], not pre_releases, numbers[1]]


# == Grouping ==================================================================
# What the frames of a stack trace say, and the group of a crash. It is made of names, never of load addresses or lines,
# so that the same fault is one group on all phones, and in the next build.

SYSTEM_BASE = 0x180000000  # Apple's own libraries are loaded at this address or above, an app below it
MAX_NAME = 1000  # characters of a symbol that count
MAX_PATH = 1024  # Darwin's bound
MAX_IMAGES = 4  # of a crash, whose symbols may name its frames
_NEVER_OWN = re.compile(r"dyld|libobjc-trampolines\.dylib|libswift\w{0,40}\.dylib")  # though they are loaded below it
# Of a simulator the system's own files lie below Xcode.app, too.
_OWN_PATH = re.compile(r"(?!/System/|/usr/|.*/(?:RuntimeRoot|Contents/Developer)/).*\.app(?:ex)?/", re.S)

# What a frame says, under our name and under those of KSCrash, PLCrashReporter and Sentry.
_FRAME_FIELDS = {
    "symbol": ("symbol", "symbol_name", "function"), "file": ("file", "filename"), "line": ("line", "lineno"),
    "binary": ("binary", "object_name", "image", "package"), "uuid": ("uuid", "image_uuid", "debug_id"),
    "offset": ("offset",), "address": ("address", "instruction_addr"),
    "image_base": ("image_base", "image_addr", "object_addr"), "path": ("path", "package")}
_FIELDS_OF = {name: [field for field, names in _FRAME_FIELDS.items() if name in names]
              for name in chain.from_iterable(_FRAME_FIELDS.values())}
_PLAIN_FIELDS = {"frame", "symbol", "file", "line"}  # those of the API
_LOCATED = re.compile(r"(.*) \+ ([0-9]{1,18})")  # symbol or binary, and an offset into it
# What stands where a device knows no symbol.
_ADDRESS = re.compile("0x[0-9a-fA-F]+|[0-9a-fA-F]{8,16}|<redacted>|<unknown>|[?]+|_{0,2}mh_(?:execute|dylib)_header|")
_CALL_STACK_LINE = re.compile(r"(?:[0-9]{1,4}\s+(\S.{0,200}?)\s+)?0x[0-9a-fA-F]{1,16} (?!\+ )(.+)")  # callStackSymbols
_BARE = re.compile(r"[\w. -]+")


class Frame(NamedTuple):
    """A frame, whatever an SDK calls its fields. "" and None: not given."""

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


def read_frame(given: Mapping[str, Any]) -> Frame:
    """What a frame says. A device's own symbol for a frame of a known build is not trusted: in a stripped binary it is
    that of whatever function comes before. `symbolicated` says that it is from symbols."""
    if given.keys() <= _PLAIN_FIELDS:
        symbol, file = given.get("symbol") or "", given.get("file") or ""
        if len(symbol) + len(file) < 200 and (frame := _plain_frame(symbol, file)):
            return frame
    values: dict[str, Any] = dict.fromkeys(_FRAME_FIELDS)
    for name, value in given.items():
        for field in _FIELDS_OF.get(name, ()) if value not in (None, "") else ():
            if values[field] is None or name == field:
                values[field] = value
    symbol, file, binary, path = (_string(values[name]) for name in ("symbol", "file", "binary", "path"))
    address, base, offset = (_integer(values[name]) for name in ("address", "image_base", "offset"))
    binary = binary.rpartition("/")[2]
    if line := _CALL_STACK_LINE.fullmatch(symbol):
        binary, symbol = binary or line[1] or "", line[2]
    if address is not None and offset is None and base is not None:
        offset = address - base
    elif address is not None and base is None and offset is not None:
        base = address - offset
    located = _LOCATED.fullmatch(symbol)
    if located and (located[1] == binary or _ADDRESS.fullmatch(located[1]) or not binary and int(located[2]) > 4096
                    and _BARE.fullmatch(located[1])):  # no function is as long as a binary
        symbol, binary = "", binary or located[1]
        offset = int(located[2]) if offset is None else offset
    symbol, uuid = "" if _ADDRESS.fullmatch(symbol) else symbol, image_uuid(values["uuid"])
    is_own = _is_own(given.get("in_app"), file, path, base, binary)
    is_named = bool(file or symbol and (given.get("symbolicated") is True or not uuid or offset is None or not is_own))
    return Frame(symbol, file, binary, uuid, offset, is_own, is_named)


@lru_cache(maxsize=4096)
def _plain_frame(symbol: str, file: str) -> Frame | None:
    """A frame of which nothing else is known; None where its symbol is an address."""
    if " + " in symbol or "0x" in symbol or _ADDRESS.fullmatch(symbol):
        return None
    return Frame(symbol, file, is_own=bool(file) or None)


def _is_own(in_app: Any, file: str, path: str, base: int | None, binary: str) -> bool | None:
    if type(in_app) is bool:
        return in_app
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
    digits = _string(value).replace("-", "")[:40].upper()  # Sentry's debug_id has a number behind it
    if not re.fullmatch("[0-9A-F]{32,40}", digits) or not digits.strip("0"):  # some write zeros for none
        return ""
    return "-".join(digits[start:end] for start, end in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))


_PREFIX_WORDS = re.compile(
    r"(?:@objc |@nonobjc |specialized |merged |dynamic |implicit |partial apply (?:forwarder )?for "
    r"|\$defer #[0-9]+ (?:\(\) )?in |(?:implicit )?(?:auto)?closure #[0-9]+ (?:[(@<].{0,200}? )?in "
    r"|\([0-9]+\) (?:suspend|await) resume partial function for "
    r"|(?:generic|function signature) specialization <[^<>]*(?:<[^<>]*>[^<>]*)*> of )+")
_BLOCK = re.compile(r"(?:__[0-9]+(?=[-+]\[)|__(?=.*_block_invoke))?(.*?)_block_invoke(?:_[0-9]+)?")
_SUFFIX = re.compile(
    r"(?: \+ [0-9]+| \([^()]*:[0-9]+\)| \(\.[\w.]+\)| \[clone [^]]*\]| (?:at )?0x[0-9a-fA-F]+|\.(?:cold|resume)"
    r"|T[YQ][0-9]+_|(?:\.(?:cold|llvm|resume|part|constprop|isra))?\.[0-9]+)+")
# Of every program, and made by the compiler: they tell nothing of where a fault is.
_NOT_COUNTED = re.compile(
    r"(?:_?main|start|_?dyld_start|static .*\$main\(\)(?: -> \(\))?|\$s.*5\$mainyyFZ|<compiler-generated>"
    r"|__debug_main_executable_dylib_entry_point|protocol witness for .*|outlined .*|.* thunk"
    r"|(?:(?:reabstraction|dispatch|non-virtual|virtual) )?thunk (?:for|to|of|helper from) .*)")
# What every abort runs through.
_OF_ABORTS = re.compile(
    r"_*(?:pthread_kill|kill|raise|abort|abort_message|assert_rtn|exceptionPreprocess|objc_exception_throw"
    r"|objc_terminate|cxa_throw|cxa_rethrow|demangling_terminate_handler|assertionFailure|fatalErrorMessage"
    r"|preconditionFailure)\b.*|_?swift_.*|Swift\._?(?:assertionFailure|fatalErrorMessage|preconditionFailure)\b.*"
    r"|(?:Swift runtime failure: .*)|[-+]\[NSException .*|std::(?:__)?terminate.*")


@lru_cache(maxsize=2048)
def canonical_name(symbol: str) -> str:
    """A symbol without what the compiler and the tools add to it, and what differs from build to build."""
    name = _without_suffix(_PREFIX_WORDS.sub("", symbol, 1) if _PREFIX_WORDS.match(symbol) else symbol)
    block = _BLOCK.fullmatch(name)
    return block[1] if block else name


def _without_suffix(name: str) -> str:
    for end in _SUFFIX.finditer(name):
        if end.start() and end.end() == len(name):
            return name[:end.start()]
    return name


def group_hash(exception_type: str, frames: Sequence[Mapping[str, Any]]) -> str:
    """The group of a crash: its exception type, and the names of the first three frames of the app's own code. System
    frames stand in only where there is none. A frame without a name is its build and offset."""
    return group_of(exception_type, map(read_frame, frames))


def group_of(exception_type: str, frames: Iterable[Frame]) -> str:
    """As group_hash, of frames that were read. Takes no more of them than it needs: mostly, the app's own tell."""
    seen: list[Frame] = []
    candidates = (
        (label for frame in frames if seen.append(frame) or frame.is_own and _counts(label := _label(frame))),
        (label for frame in seen if frame.symbol and _tells(label := _label(frame))),
        (label for frame in seen if (label := _label(frame)) and _tells(label)),
        (_label(frame) for frame in seen if frame.is_own or frame.symbol),
        filter(None, map(_label, seen)))
    names = next(filter(None, (list(islice((name for name, _ in groupby(labels)), 3)) for labels in candidates)), [])
    return hashlib.sha256(":".join([exception_type, *names]).encode()).hexdigest()[:16]


@lru_cache(maxsize=2048)
def _counts(label: str) -> bool:
    return not _NOT_COUNTED.fullmatch(label)


def _tells(label: str) -> bool:
    return _counts(label) and not _OF_ABORTS.fullmatch(label)


def _label(frame: Frame) -> str:
    if frame.is_named and frame.symbol:
        return canonical_name(frame.symbol[:MAX_NAME])
    if frame.offset is None:
        return canonical_name(frame.symbol[:MAX_NAME]) or ("" if frame.file else frame.binary)
    return f"{frame.uuid or frame.binary}+{frame.offset}"


def open_images(frames: Iterable[Frame]) -> str | None:
    """The builds whose symbols can name frames of the app's own code, up to MAX_IMAGES, divided by spaces."""
    uuids = dict.fromkeys(frame.uuid for frame in frames if frame.is_open)
    return " ".join(list(uuids)[:MAX_IMAGES]) or None


# == Payloads ==================================================================
# JSON in, a crash or an event out, or a Refusal; the code below trusts what comes from here. A report is a namedtuple
# whose fields are its columns. A developer sees at once that a required field is missing or wrong; what only some
# phones send must not cost a report, so other fields are converted, cut, or kept as they came, under `extra`.

EVENT_TYPES = ("session_start", "session_end", "error", "custom")
MAX_BATCH = 100  # events
MAX_TEXT = 500  # characters of versions, models, types, names, ids, locale
MAX_DEPTH = 64  # of nested JSON: far above any SDK's, far below Python's recursion limit
MAX_NUMBER = (1 << 63) - 1
MAX_STORED, MAX_STORED_BATCHED = 256_000, 32_000  # bytes of text that a report may take, and an event of a batch
MAX_NAMES = 256  # of `properties`, and of unknown fields
FIRST_FRAMES, LAST_FRAMES = 384, 128  # of a longer stack trace

JsonObject = dict[str, Any]
Converters = Mapping[str, Callable[[Any], Any]]  # by field: what is stored for a value; ValueError for a wrong kind


def decode_json(body: bytes) -> JsonObject:
    """The JSON object in a body. Raises Refusal unless it is one, in UTF-8, with finite numbers. A NUL or a lone
    surrogate, which SQLite does not store, becomes U+FFFD: one bad character must not cost a report."""
    try:
        text = _storable(body.decode())
        value = _DECODER.decode(text[1:] if text.startswith("\ufeff") else text)  # a byte order mark
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
# Its encode() makes one of these in each call, which takes longer than encoding. PyPy has none.
_C_ENCODER = json.encoder.c_make_encoder and json.encoder.c_make_encoder(  # type: ignore[attr-defined]
    None, _ENCODER.default, json.encoder.encode_basestring, None, ":", ",", False, False, False)
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

def _required_text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"is {_kind(value)}, not text")
    return value[:MAX_TEXT]


def _text(value: Any) -> str:
    return _required_text(str(value) if type(value) is int else value)


def _long_text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError
    return value


def _number(value: Any) -> float:
    if type(value) is str and re.fullmatch(r"-?[0-9]{1,18}(\.[0-9]{1,18})?", value):
        value = float(value) if "." in value else int(value)
    if type(value) not in (int, float) or abs(value) > MAX_NUMBER:
        raise ValueError
    return value


def _battery_level(value: Any) -> float:
    if not (0 <= (number := _number(value)) <= 1 or number == -1):
        raise ValueError
    return number


def _flag(value: Any) -> bool:
    if type(value) is not bool and not (type(value) is int and value in (0, 1)):
        raise ValueError
    return bool(value)


def _event_type(value: Any) -> str:
    if type(value) is str and value not in EVENT_TYPES:
        raise Refusal("invalid event type", detail=f"it is not one of {', '.join(EVENT_TYPES)}")
    return _required_text(value)


def _to_json(value: Any) -> str:
    """Compact JSON. Raises ValueError or RecursionError if it is nested too deep to be shown again."""
    text = _encode(value)
    # Counting brackets is fast and clears nearly every value.
    if len(text) > MAX_DEPTH and text.count("{") + text.count("[") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise ValueError
    return text


def _depth(value: Any) -> int:
    items = list(value.values()) if type(value) is dict else value
    return 1 + max(map(_depth, items), default=0) if type(items) is list else 0


def _object(value: Any) -> str:
    if type(value) is not dict:
        raise ValueError
    return _to_json(value)


def _frames(value: Any) -> str:
    if type(value) is not list or not all(type(frame) is dict for frame in value):
        raise ValueError
    return _to_json(value)


_CRASH_FIELDS: Converters = dict(
    exception_type=_required_text, exception_reason=_long_text, stack_trace=_frames, app_version=_text,
    build_number=_text, os_version=_text, device_model=_text, device_id_hash=_text, session_id=_text, locale=_text,
    free_memory_mb=_number, battery_level=_battery_level, is_charging=_flag, occurred_at=parse_occurred_at)
_EVENT_FIELDS: Converters = dict(
    type=_event_type, name=_text, properties=_object, app_version=_text, os_version=_text, device_model=_text,
    device_id_hash=_text, session_id=_text, locale=_text, occurred_at=parse_occurred_at)
_REQUIRED = ("exception_type", "type", "occurred_at")

Crash = namedtuple("Crash", ["group_hash", "images", *_CRASH_FIELDS, "extra"])
Crash.__doc__ = "A valid crash: the fields of the API, `images` as of open_images, `extra`, the unknown fields as JSON."
Event = namedtuple("Event", [*_EVENT_FIELDS, "extra"])
Event.__doc__ = "A valid event: the fields of the API, and `extra`, the unknown ones as JSON."
Reports = Sequence[Union[Crash, Event]]


def parse_crash(given: JsonObject) -> Crash:
    """A crash from its JSON object. Raises Refusal."""
    frames = given.get("stack_trace") or []
    if type(frames) is not list or not all(map(_is_plain_frame, frames)):
        frames = _plain_frames(frames)
        given["stack_trace"] = frames or given["stack_trace"]
    values = _convert(given, _CRASH_FIELDS, MAX_STORED)
    read = list(map(read_frame, _kept_frames(frames)))
    return Crash(group_of(values[0], read), open_images(read), *values)


def own_names(frames: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Name and file of the first frames of a stack trace that are of the app itself."""
    own = islice((frame for frame in map(read_frame, frames) if frame.is_own), 20)
    return tuple(name for frame in own for name in (frame.title, frame.file))


@lru_cache(maxsize=128)
def _recent_own_names(stack_trace: str) -> tuple[str, ...]:  # of alike crashes, the traces are mostly the same
    return own_names(json.loads(stack_trace or "[]"))


_TEXT_OR_NONE, _INTEGER_OR_NONE = {str, type(None)}, {int, type(None)}


def _is_plain_frame(frame: Any) -> bool:
    return (type(frame) is dict
            and type(frame.get("symbol")) in _TEXT_OR_NONE and type(frame.get("file")) in _TEXT_OR_NONE
            and type(frame.get("frame")) in _INTEGER_OR_NONE and type(frame.get("line")) in _INTEGER_OR_NONE)


def _plain_frames(frames: Any) -> list[JsonObject]:
    """The frames, with symbols and files that are text, and numbers that are numbers where they can be; [] where these
    are no frames."""
    if type(frames) is not list or not all(type(frame) is dict for frame in frames):
        return []
    frames = list(map(dict, frames))
    for frame, name in product(frames, ("symbol", "file")):
        if frame.get(name) is not None and type(frame[name]) is not str:
            frame[name] = _encode(frame[name])
    for frame, name in product(frames, ("frame", "line")):
        with suppress(ValueError):
            if (number := _number(frame.get(name))) == int(number):
                frame[name] = int(number)
    return frames


def parse_event(given: Any, limit: int = MAX_STORED) -> Event:
    """An event from its JSON object, of which so many bytes are stored. Raises Refusal."""
    if type(given) is not dict:
        raise Refusal("invalid event", detail=f"it is {_kind(given)}, not an object")
    return Event._make(_convert(given, _EVENT_FIELDS, limit))


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
        return list(map(Event._make, _convert_alike(events, _EVENT_FIELDS)))
    except (Refusal, ValueError, TypeError, AttributeError, RecursionError):  # a bad or odd event
        pass
    parsed: list[Event] = []
    try:
        for event in events:
            parsed.append(parse_event(event, MAX_STORED_BATCHED))
    except Refusal as refusal:
        raise Refusal(f"{refusal} at index {len(parsed)}", detail=refusal.detail) from None
    return parsed


def _convert(given: JsonObject, converters: Converters, limit: int | None) -> list[Any]:
    """What is stored for each field, None for an absent one; then the unknown fields, as JSON. What more than `limit`
    bytes would be needed for is cut."""
    values, unknown = {}, {name: value for name, value in given.items() if name not in converters}
    for name, convert in converters.items():
        value, values[name] = given.get(name), None
        if value in (None, ""):
            if name in _REQUIRED:
                raise Refusal(f"missing {name}")
            continue
        try:
            values[name] = convert(value)
        except (ValueError, RecursionError) as error:
            if name in _REQUIRED:
                raise Refusal(f"invalid {name}", detail=f"{name} {error}") from None
            unknown[name] = value
    stored = [*values.values(), _unknown_as_json(unknown) if unknown else None]
    texts = [value for value in stored if type(value) is str]
    size = sum(map(len, texts))
    if limit is None or size < 1000 or (  # too many names or frames take more
            len(unknown.keys() - {"truncated"}) <= MAX_NAMES and _length(given, "properties", dict) <= MAX_NAMES
            and _length(given, "stack_trace", list) <= FIRST_FRAMES + LAST_FRAMES and (
                size <= limit // 4 or sum(len(text.encode()) for text in texts) <= limit)):
        return stored
    return _convert(_cut(given, values, unknown, limit), converters, None)


def _kept_frames(frames: list[Any]) -> list[Any]:
    return frames if len(frames) <= FIRST_FRAMES + LAST_FRAMES else frames[:FIRST_FRAMES] + frames[-LAST_FRAMES:]


def _length(given: JsonObject, name: str, kind: type) -> int:
    return len(given[name]) if type(given.get(name)) is kind else 0


def _cut(given: JsonObject, values: JsonObject, unknown: JsonObject, limit: int) -> JsonObject:
    """As much of a report as `limit` bytes hold; `truncated` says what was cut."""
    long = {name: given[name] for name in ("exception_reason", "stack_trace", "properties")
            if values.get(name) is not None}
    kept = {name: given[name] for name, value in values.items() if value is not None and name not in long}
    parts = {**long, "unknown fields": {"truncated_" if name == "truncated" else name: value
                                        for name, value in unknown.items()}}
    room = limit - 200 - sum(len(str(value).encode()) for name, value in values.items() if name not in long)
    share, truncated = _fair_share([_size(part) for part in parts.values()], room), []
    for name, part in parts.items():
        fitting = part
        if name == "stack_trace":
            fitting = _kept_frames(part)
        elif type(part) is dict:
            fitting = dict(list(part.items())[:MAX_NAMES])
        fitting = _shortened(fitting, share)
        kept.update(fitting if name == "unknown fields" else {name: fitting})
        truncated += [name] if fitting != part else []
    return {**kept, "truncated": truncated}


def _size(value: Any) -> int:
    return len(_encode(value).encode())


def _fair_share(sizes: Sequence[int], room: int) -> int:
    """What the largest of these may have: small ones take what they need, the others as much as each other."""
    for number, size in enumerate(sorted(sizes)):
        if size > room // (len(sizes) - number):
            return max(0, room // (len(sizes) - number))
        room -= size
    return max(sizes, default=0)


def _shortened(value: Any, size: int, levels: int = 6) -> Any:
    """A value whose JSON has at most so many bytes: of too many members the first, of the largest members their
    beginning, and so of a text. What is nested deeper becomes a text: each level costs a look at all of it."""
    if _size(value) <= size:
        return value
    if type(value) in (dict, list) and levels:
        members = list(value.items() if type(value) is dict else value)
        fitting = bisect_left(list(accumulate(_size(member) + 2 for member in members)), size - 2)
        members = members[:max(fitting, size // 30)]
        parts = [part for pair in members for part in pair] if type(value) is dict else members
        share = _fair_share(list(map(_size, parts)), size - 4 - 2 * len(parts))
        parts = [_shortened(part, share, levels - 1) for part in parts]
        return dict(zip(parts[::2], parts[1::2])) if type(value) is dict else parts
    text = value if type(value) is str else _encode(value)
    while text and (length := _size(text)) > size:
        text = text[:len(text) * size // (length + 1)]
    return text


def _unknown_as_json(unknown: JsonObject) -> str:
    """The unknown fields. What is nested too deep is kept as text."""
    try:
        try:
            return _to_json(unknown)
        except ValueError:
            return _encode({name: value if _depth(value) < MAX_DEPTH else _encode(value)
                            for name, value in unknown.items()})
    except RecursionError:
        raise Refusal("invalid JSON", detail="it is nested too deep") from None


def _convert_alike(objects: list[JsonObject], converters: Converters) -> Iterable[tuple[Any, ...]]:
    """`_convert` for each object in a third of the time: field by field, and each distinct value only once, because
    most values are the same from event to event. Raises an error where one is not plain."""
    names, columns = set().union(*objects), []
    for name, convert in converters.items():
        values = [given.get(name) for given in objects] if name in names else [None] * len(objects)
        kinds = {*map(type, values)} - {type(None)}
        if kinds - {dict if convert is _object else str}:
            raise ValueError
        if convert is _object:  # not hashable
            if max(map(len, filter(None, values)), default=0) > MAX_NAMES:
                raise ValueError
            columns.append([None if value is None else _to_json(value) for value in values])
        else:
            stored = {value: convert(value) if value else None for value in set(values)}
            if name in _REQUIRED and None in stored.values():
                raise ValueError
            columns.append(map(stored.__getitem__, values))
    has_unknown = not names <= converters.keys()
    unknown = [{name: value for name, value in given.items() if name not in converters}
               for given in objects] if has_unknown else []
    columns.append([_unknown_as_json(each) if each else None for each in unknown] or [None] * len(objects))
    texts = filter(None, chain(columns[-1], columns[list(converters).index("properties")]))
    if len(names) > MAX_NAMES or max(map(len, texts), default=0) > MAX_STORED_BATCHED // 8:
        raise ValueError
    return zip(*columns)


# == Apple formats =============================================================
# What Apple makes of a crash in, the crashes and events of Payloads out, by pure functions. The formats are told apart
# by their content. A diagnostic becomes an object like those of our own clients and takes their way, so that it is
# converted, cut and grouped as theirs. What could identify a phone or a person is left behind.

UNKNOWN_FORMAT = "unknown report format"
MACH_EXCEPTIONS = {
    1: "EXC_BAD_ACCESS", 2: "EXC_BAD_INSTRUCTION", 3: "EXC_ARITHMETIC", 4: "EXC_EMULATION", 5: "EXC_SOFTWARE",
    6: "EXC_BREAKPOINT", 7: "EXC_SYSCALL", 8: "EXC_MACH_SYSCALL", 9: "EXC_RPC_ALERT", 10: "EXC_CRASH",
    11: "EXC_RESOURCE", 12: "EXC_GUARD", 13: "EXC_CORPSE_NOTIFY"}
SIGNALS = {3: "SIGQUIT", 4: "SIGILL", 5: "SIGTRAP", 6: "SIGABRT", 7: "SIGEMT", 8: "SIGFPE", 9: "SIGKILL", 10: "SIGBUS",
           11: "SIGSEGV", 12: "SIGSYS", 13: "SIGPIPE", 14: "SIGALRM", 15: "SIGTERM"}  # Darwin's numbers
BUG_TYPES = {"298": "jetsam, memory of the whole system", "202": "CPU use", "206": "CPU use", **dict.fromkeys(
    ("222", "223", "228", "328"), "a hang"), "309": "a crash", "109": "a crash"}
EVENT_NAMES = {
    "hangDiagnostic": "Hang", "cpuExceptionDiagnostic": "CPU exception", "appLaunchDiagnostic": "Slow launch",
    "diskWriteExceptionDiagnostic": "Disk write exception"}
DURATIONS = ("hangDuration", "totalCPUTime", "writesCaused", "totalWritesCaused", "launchDuration")

_UUID = "[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}"
# The name of a person and the folder of an installation, in a path, whose slashes JSON may escape.
_PRIVATE = re.compile(rf"/(?:((?:Users|home)\\?/)(?:[^\s\\/\"']|\\u[0-9A-Fa-f]{{4}})+|{_UUID})")
_OBJECT_LINE = re.compile(r"^\{", re.M)
_APPLE_TIME = re.compile(
    r"([0-9-]{10})[ T]([0-9:]{8})(?:(\.[0-9]{1,9})[0-9]*)? ?(Z|[+-][0-9]{2}:?[0-9]{2})?")
_OS_VERSION = re.compile(r"(?:[A-Za-z]+ ){0,4}([0-9]+(?:\.[0-9]+)*)(?: \([\w ]{1,30}\))*")
_KILL_CODE = re.compile(r"(?:\bcode[: ] ?|^[A-Z]{1,40} )(?:0x([0-9a-f]{1,16})|([0-9]{1,19}))\b", re.I)
_UNCAUGHT = re.compile(r"uncaught exception '([^'\n]{1,200})', reason: '")
_FATAL = re.compile("Fatal error|Precondition failed|Assertion failed|BUG IN ")
_THREAD_STARTS = ("dyld", "libdyld.dylib", "libsystem_pthread.dylib")


def parse_diagnostics(body: bytes, now: int, device: str = "") -> list[Crash | Event]:
    """The crashes and events in what Apple made, in its order: a MetricKit payload of either shape, an .ips file, a
    .crash text. [] where MetricKit had nothing to tell. `now`, in milliseconds, is when it occurred if nothing says
    that, `device` the device_id_hash. Raises Refusal."""
    try:
        text = body.decode()
        text = _storable(_PRIVATE.sub(lambda match: f"/{match[1]}USER" if match[1] else "/UUID", text))
        reports = list(islice(_apple_reports(text[1:] if text.startswith("\ufeff") else text), MAX_BATCH + 1))
        if len(reports) > MAX_BATCH:
            raise Refusal(f"too many diagnostics: at most {MAX_BATCH}")
        device = device.replace("\x00", "\ufffd")  # which a header may have, but no database takes
        return [parse({**given, "occurred_at": given["occurred_at"] or iso_time(now), "device_id_hash": device})
                for parse, given in reports]
    except UnicodeDecodeError:
        raise Refusal(UNKNOWN_FORMAT, detail="it is not UTF-8") from None
    except RecursionError:  # in a field that is kept as it came
        raise Refusal(UNKNOWN_FORMAT, detail="it is nested too deep") from None


AppleReport = tuple[Callable[[JsonObject], Union[Crash, Event]], JsonObject]  # how it is parsed, and it


def _apple_reports(text: str) -> Iterable[AppleReport]:
    try:
        objects, problem = [_decode_whole(text)], ""
    except ValueError as error:
        objects, problem = _objects_on_lines(text), str(error)[:100]
    if not all(type(each) is dict for each in objects):
        raise Refusal(UNKNOWN_FORMAT, detail=f"the body is {_kind(objects[0])}, not an object")
    bug_types = [str(each["bug_type"]) for each in objects if type(each.get("bug_type")) in (str, int)]
    bug_types = list(filter(re.compile("[0-9]{1,9}").fullmatch, bug_types))
    if bug_types and BUG_TYPES.get(bug_types[0]) != "a crash":
        raise Refusal(f"unsupported bug_type {bug_types[0]}",
                      detail=f"{BUG_TYPES.get(bug_types[0], 'it')} is no crash of the app")
    names_of_a_body = {"threads", "exception"} if bug_types else {"usedImages", "termination"}  # others have threads
    for each in objects:
        if each.keys() & names_of_a_body:
            return [(parse_crash, _ips_crash(objects[0], each))]
    if problem and re.search("^Exception Type:", text, re.M):
        return [(parse_crash, _ips_crash(objects[0] if objects else {}, _crash_as_ips(text)))]
    if problem or bug_types:
        raise Refusal(UNKNOWN_FORMAT, detail="an .ips file whose body cannot be read" if bug_types else problem)
    return _metrickit_reports(objects[0])


# Reading JSON. Each level of `subFrames` is two of JSON, and a real call stack has hundreds.

def _decode_whole(text: str) -> Any:
    """The JSON value that a text is. Raises ValueError."""
    begin = len(text) - len(text.lstrip(" \t\n\r"))
    try:
        value, end = _DECODER.raw_decode(text, begin)  # ten times as fast
    except RecursionError:
        value, end = _decode_deep(text, begin)
    if rest := text[end:].lstrip(" \t\n\r"):
        raise json.JSONDecodeError("Extra data", text, len(text) - len(rest))
    return value


def _objects_on_lines(text: str) -> list[JsonObject]:
    """The objects that begin a line: head and body of an .ips file, whatever stands around them. Each try may read the
    whole text, so there are few, and only fast ones."""
    found, at = [], 0
    for _ in range(4):
        if match := _OBJECT_LINE.search(text, at):
            at = match.end()
            with suppress(ValueError, RecursionError):
                value, at = _DECODER.raw_decode(text, match.start())
                found.append(value)
    return found


_JSON_VALUE = re.compile(
    r'[ \t\n\r]*([\[{"]|true|false|null|-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?|NaN|-?Infinity)')
_JSON_END = re.compile(r"[ \t\n\r]*[\]}]")
_JSON_NEXT = re.compile(r"[ \t\n\r]*([,\]}])")
_JSON_NAME = re.compile(r'[ \t\n\r]*"')
_JSON_COLON = re.compile(r"[ \t\n\r]*:")
_JSON_WORDS = {"true": True, "false": False, "null": None}


def _decode_deep(text: str, at: int) -> tuple[Any, int]:
    """The JSON value at a place, and where it ends, without recursion. `subFrames` and the frames in them may nest
    without end, all else by MAX_DEPTH levels. Raises ValueError."""
    def expect(pattern: re.Pattern[str], what: str) -> Any:
        nonlocal at
        if not (match := pattern.match(text, at)):
            raise json.JSONDecodeError(f"Expecting {what}", text, at)
        at = match.end()
        return match

    inside: Any = []  # the innermost container that is open
    outer: list[tuple[Any, Any, int]] = []  # those around it, their open member, their depth
    name, depth = None, 0
    while True:
        if type(inside) is dict:
            expect(_JSON_NAME, "property name enclosed in double quotes")
            name, at = scanstring(text, at)
            expect(_JSON_COLON, "':' delimiter")
        token, *parts = expect(_JSON_VALUE, "value").groups()
        if token == '"':
            value, at = scanstring(text, at)
        else:
            value = ({} if token == "{" else [] if token == "[" else _JSON_WORDS[token] if token in _JSON_WORDS
                     else _finite(token) if any(parts) or token[-1] in "Ny" else int(token))
        if type(inside) is dict:
            inside[name] = value
        else:
            inside.append(value)
        if token in ("{", "["):
            outer.append((inside, name, depth))
            is_frames = name == "subFrames" and type(inside) is not type(value)
            inside, name, depth = value, name if is_frames else None, depth if is_frames else depth + 1
            if depth > MAX_DEPTH:
                raise ValueError("it is nested too deep")
            if not _JSON_END.match(text, at):
                continue
        while outer and (end := expect(_JSON_NEXT, "',' delimiter")[1]) != ",":
            if end != ("}" if type(inside) is dict else "]"):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at - 1)
            inside, name, depth = outer.pop()
        if not outer:
            return inside[0], at


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
    """Why the system ended the app, as 0x8badf00d, of a code or of texts that may name one. Lower numbers are those of
    signals, higher ones differ from crash to crash."""
    numbers = [value for value in values if type(value) is int]
    numbers += [int(digits or decimal, 16 if digits else 10) for value in values if type(value) is str
                for digits, decimal in _KILL_CODE.findall(value)]
    return next((f"{number:#x}" for number in numbers if 0xFFFF < number <= 0xFFFFFFFF), "")


class _Image(NamedTuple):
    """What a frame says of its binary."""

    binary: str = ""
    uuid: str = ""
    is_own: bool | None = None  # None: nothing tells


def _apple_frame(number: int, image: _Image, offset: int | None, given: JsonObject) -> JsonObject:
    """A frame of ours, of a frame of an .ips file."""
    file, line = _member(given, "sourceFile", str).rpartition("/")[2], _whole(given, "sourceLine")
    if file == "<compiler-generated>":
        file, line = "", None
    symbol = _member(given, "symbol", str)
    frame = {"frame": number, "symbol": "" if symbol == "<redacted>" else symbol, "file": file, "line": line or "",
             "binary": image.binary, "uuid": image.uuid, "offset": "" if offset is None else offset}
    flags = {"inlined": given.get("inline") is True, "in_app": image.is_own,
             "symbolicated": bool(image.is_own and frame["symbol"] and not file)}  # what a device names may be wrong
    return {**{name: value for name, value in frame.items() if value != ""},
            **{name: value for name, value in flags.items() if value or name == "in_app" and value is False}}


def _numbered(frames: list[Any]) -> list[tuple[int, Any]]:
    """The frames with their numbers: of too many, one more than Payloads keeps, so that it says what it cut."""
    numbered = list(enumerate(frames))
    return numbered if len(frames) <= FIRST_FRAMES + LAST_FRAMES else (
        numbered[:FIRST_FRAMES] + numbered[-LAST_FRAMES - 1:])


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
    """A crash, or an event of what kills nobody; None of an unknown kind without a call stack. What has no column is
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
        if (type_and_reason := _metrickit_exception(meta))["exception_type"] == "Unknown" and kind[0] == "m":
            type_and_reason["exception_type"] = "Memory exception"
        unknown = {name: value for name, value in meta.items() if name not in _CRASH_FIELDS}
        return parse_crash, {**unknown, **given, **type_and_reason, "stack_trace": trace}
    if trace or kind in EVENT_NAMES:
        return parse_event, _metrickit_event(kind, meta, given, trace)
    return None


def _metrickit_event(kind: str, meta: JsonObject, given: JsonObject, trace: list[JsonObject]) -> JsonObject:
    duration = next((name for name in DURATIONS if meta.get(name)), "")
    known = {"duration": meta.pop(duration, None), "build_number": given.pop("build_number"), "stack_trace": trace}
    words = re.sub("(?<=[a-z0-9])([A-Z])", r" \1", kind[:-len("Diagnostic")][:MAX_TEXT])  # gpuHang: "Gpu hang"
    return {**given, "type": "error", "name": EVENT_NAMES.get(kind, words.capitalize()), "properties": {
        **meta, **{name: value for name, value in known.items() if value not in (None, "", [])}}}


def _metrickit_exception(meta: JsonObject) -> JsonObject:
    thrown = _member(meta, "objectiveCexceptionReason", dict)
    ended = _member(meta, "terminationReason", str)
    names = [number if type(number) is str else numbers.get(number, "") if type(number) is int else ""
             for number, numbers in ((meta.get("exceptionType"), MACH_EXCEPTIONS), (meta.get("signal"), SIGNALS))]
    name = _member(thrown, "exceptionName", str) or _member(thrown, "className", str)
    return {"exception_type": _exception_type(name, _kill_code(ended), *names),
            "exception_reason": _member(thrown, "composedMessage", str) or ended}


def _metrickit_trace(tree: JsonObject, is_crash: bool) -> list[JsonObject]:
    """The frames of the thread that it is about, flat, the innermost first. Of a tree of samples, the path that most
    of them took, which may begin where the thread did."""
    stacks = _objects(tree, "callStacks") or _objects(tree, "callStackThreads")
    stack = next((each for each in stacks if each.get("threadAttributed") is True), stacks[0] if stacks else {})
    frames, path = _objects(stack, "callStackRootFrames") or _objects(stack, "rootFrames"), []
    while frames:
        path.append(max(frames, key=lambda frame: _whole(frame, "sampleCount") or 0))
        frames = _objects(path[-1], "subFrames")
    names = {uuid: _member(each, "name", str) for each in _objects(tree, "binaryInfo")
             if (uuid := image_uuid(each.get("uuid")))}
    images = [_metrickit_image(frame, names) for frame in path]
    from_start = [image.binary in _THREAD_STARTS for image, _ in images]
    if not is_crash and from_start[:1] == [True] and not from_start[-1]:
        images.reverse()
    return [_apple_frame(number, image, offset, {}) for number, (image, offset) in _numbered(images)]


def _metrickit_image(frame: JsonObject, names: Mapping[str, str]) -> tuple[_Image, int | None]:
    """A frame's binary and its offset there. There are no paths: what was loaded below the system's libraries is the
    app's own. iOS 14 and 15 and macOS 12 say where the binary was loaded in place of the offset."""
    uuid, address = image_uuid(frame.get("binaryUUID")), _whole(frame, "address")
    binary = _member(frame, "binaryName", str) or names.get(uuid, "")
    given = _whole(frame, "offsetIntoBinaryTextSegment")
    loaded_at: int | None
    if given is not None and given >= 1 << 32:
        loaded_at, offset = given, None if address is None or address < given else address - given
    else:
        loaded_at, offset = None if address is None else address - (given or 0), given
    is_own = None if loaded_at is None else (
        0 <= loaded_at < SYSTEM_BASE and not _NEVER_OWN.fullmatch(binary))
    return _Image(binary[:MAX_TEXT], uuid, is_own), offset


# .ips and .crash files.

def _ips_crash(header: JsonObject, body: JsonObject) -> JsonObject:
    """The crash in an .ips file. Of its fields only those are taken over that are named here."""
    exception, ended, bundle = (_member(body, name, dict) for name in ("exception", "termination", "bundleInfo"))
    notes = [note for notes in _member(body, "asi", dict).values() if type(notes) is list
             for note in notes if type(note) is str]
    why_ended = [text for name in ("reasons", "details") for text in _member(ended, name, list) if type(text) is str]
    thrown = next(filter(None, map(_UNCAUGHT.search, notes)), None)
    reasons = [thrown and re.split(r"'(?: \*\*\*|\n|\Z)", thrown.string[thrown.end():], maxsplit=1)[0],
               next(filter(_FATAL.search, notes), ""), _member(exception, "subtype", str), " ".join(why_ended),
               _member(ended, "indicator", str), *notes[:1]]
    kept = {"process": body.get("procName") or header.get("app_name"), "platformArchitecture": body.get("cpuType"),
            "bundleIdentifier": bundle.get("CFBundleIdentifier") or header.get("bundleID"),
            "exceptionCodes": exception.get("codes"), "exceptionSubtype": exception.get("subtype")}
    termination = _plain_members({name: ended.get(name) for name in ("namespace", "code", "indicator")})
    return {
        **_plain_members(kept), **({"termination": termination} if termination else {}),
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
    threads, faulting = _member(body, "threads", list), _whole(body, "faultingThread")
    thread = threads[faulting] if faulting is not None and faulting < len(threads) else None
    if type(thread) is not dict:
        thread = next((each for each in _objects(body, "threads") if each.get("triggered") is True), {})
    main_path = _member(body, "procPath", str)[:MAX_PATH]
    images = [_ips_image(image, main_path) if type(image) is dict else _Image()
              for image in _member(body, "usedImages", list)]
    trace = []
    for number, given in _numbered(_objects(body, "lastExceptionBacktrace") or _objects(thread, "frames")):
        index = _whole(given, "imageIndex")
        image = images[index] if index is not None and index < len(images) else _Image()
        offset = _whole(given, "imageOffset") if image.binary or image.uuid else None  # else it is an address
        trace.append(_apple_frame(number, image, offset, given))
    return trace


def _ips_image(given: JsonObject, main_path: str) -> _Image:
    path, uuid = _member(given, "path", str)[:MAX_PATH], image_uuid(given.get("uuid"))
    binary = (_member(given, "name", str) or path.rpartition("/")[2])[:MAX_TEXT]
    is_own = bool(path == main_path or _OWN_PATH.match(path)) and not _NEVER_OWN.fullmatch(binary) if path else None
    return _Image("" if binary == "???" else binary, uuid, is_own)


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
    """What an .ips file would have, of the text of a .crash file."""
    text = text.replace("\x00", "\ufffd").replace("\r\n", "\n")
    head = {name: value.strip() for name, value in reversed(_CRASH_HEAD.findall(text))}  # the first of a name
    kind, ended = (pattern.match(head.get(name, "")) for pattern, name in (
        (_CRASH_TYPE, "Exception Type"), (_CRASH_END, "Termination Reason")))
    version, _, build = head.get("Version", "").replace("???", "").partition("(")
    explained = re.search("^<RBSTerminateContext.*", text, re.M)
    return {
        "exception": {"type": kind and kind[1], "signal": kind and kind[2], "codes": head.get("Exception Codes"),
                      "subtype": head.get("Exception Subtype")},
        "termination": {"details": [head.get("Termination Description") or (explained and explained[0])], **({
            "namespace": ended[1], "code": int(ended[2], 16) if ended[2] else int(ended[3]), "indicator": ended[4]}
            if ended else {})},
        "asi": {"": [_section(text, re.search("^Application Specific Information:.*\n", text, re.M))]},
        "bundleInfo": {"CFBundleShortVersionString": version.strip(), "CFBundleVersion": build.rstrip(") "),
                       "CFBundleIdentifier": head.get("Identifier")},
        "procName": head.get("Process", "").partition(" [")[0], "procPath": head.get("Path"),
        "cpuType": head.get("Code Type", "").partition(" (")[0], "osVersion": {"train": head.get("OS Version")},
        "modelCode": head.get("Hardware Model"), "captureTime": head.get("Date/Time"), **_crash_stack(text)}


def _section(text: str, title: re.Match[str] | None) -> str:
    """What stands below a title, up to an empty line."""
    return re.split(r"\n[ \t]*\n", text[title.end():], maxsplit=1)[0] if title else ""


def _crash_stack(text: str) -> JsonObject:
    """Frames and images as an .ips file has them. What a frame's image is, its address says."""
    found = {int(start, 16): (int(end, 16), {"path": path.strip(), "uuid": uuid})
             for start, end, uuid, path in _CRASH_IMAGE.findall(text)}
    found.pop(0, None)  # no image, though every address lies in it
    starts, frames, images = sorted(found), list[JsonObject](), list[JsonObject]()
    for binary, address, place in _crash_frames(_section(text, _CRASH_THREAD.search(text))):
        start = starts[bisect_left(starts, address + 1) - 1] if starts else 0
        end, image = found.get(start, (0, {}))
        is_known, match = start <= address <= end, _CRASH_PLACE.fullmatch(place)
        images.append({**(image if is_known else {}), "name": binary})
        symbol, file, line = match.groups() if match else (None, None, None)
        frames.append({"imageIndex": len(frames), "imageOffset": address - start if is_known else None,
                       "symbol": symbol, "sourceFile": file, "sourceLine": int(line) if line else None,
                       "inline": "[inlined]" in place})
    return {"usedImages": images, "lastExceptionBacktrace": frames}


def _crash_frames(section: str) -> Iterator[tuple[str, int, str]]:
    """Of each frame the binary, the address, and what else its line says. An exception without symbols has its
    addresses in one line. Apple's tools write 512 frames of a thread."""
    for binary, digits, place in islice(_CRASH_FRAME.findall(section), 2000) if section[:1] != "(" else (
            ("", digits, "") for digits in re.findall(r"0x([0-9a-f]{1,16})\b", section)[:2000]):
        yield binary.strip(), int(digits, 16), place.strip()


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
INLINE_DEPTH = 100  # functions of one instruction: where it is, and those that this is inlined in
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
    pages: Sequence[tuple[int, bytes]]  # lowest offset, and the page as it is stored

    @property
    def size(self) -> int:
        """Bytes of its pages."""
        return sum(len(page) for _, page in self.pages)


def parse_symbols(body: bytes) -> SymbolPart:
    """A part of a build's symbols from a body of PUT /symbols. Checked completely, so that a look-up may trust what is
    stored. Raises Refusal, whose detail says what is wrong where."""
    given = decode_json(body)
    _refuse_first(_part_rules(given), "")
    pages, after, total = [], -1, 0
    for number, page in enumerate(given["pages"]):
        _refuse_first(_page_rules(page, after), f"pages[{number}]: ")
        first, rows = page["first"], page["rows"]
        after = first + sum(rows[::2])
        total += len(rows) // 2
        pages.append((first, encode_page(page["strings"], page["frames"], rows)))
    return SymbolPart(given["binary"], given["arch"], given["part"], given["parts"], total, pages)


Rules = Iterator[tuple[Any, str]]  # whether each is kept, and what is wrong where it is not


def _refuse_first(rules: Rules, place: str) -> None:
    """Raises Refusal for the first rule that is not kept. Those after it, which rely on it, are not looked at."""
    for is_kept, problem in rules:
        if not is_kept:
            raise Refusal("invalid symbols", detail=place + problem)


def _part_rules(given: JsonObject) -> Rules:
    for name in ("binary", "arch"):
        yield _is_text(given.get(name), MAX_TEXT) and given[name], f"{name} is not text of 1 to {MAX_TEXT} characters"
    yield _are_within([given.get("parts")], 1, MAX_PARTS), f"parts is not from 1 to {MAX_PARTS}"
    yield _are_within([given.get("part")], 0, given["parts"] - 1), "part is not from 0 to parts - 1"
    yield type(given.get("pages")) is list and given["pages"], "pages is not a list of at least one page"


def _page_rules(page: Any, after: int) -> Rules:
    """What holds for a page whose rows begin behind the offset `after`."""
    yield type(page) is dict, "it is not an object"
    yield _are_within([page.get("first")], 0, MAX_OFFSET), f"first is not from 0 to {MAX_OFFSET}"
    yield page["first"] > after, "first is not behind the page before it"
    for name in ("strings", "frames", "rows"):
        yield type(page.get(name)) is list, f"{name} is not a list"
    strings, frames, rows = page["strings"], page["frames"], page["rows"]
    yield all(_is_text(each, MAX_NAME) for each in strings), f"strings has other than text of {MAX_NAME} characters"
    yield len(frames) % 4 == 0, "frames is not quadruples of name, file, line and parent"
    yield _are_within(frames[0::4], 0, len(strings) - 1), "frames has a name that is no index of strings"
    yield _are_within(frames[1::4], -1, len(strings) - 1), "frames has a file that is no index of strings, nor -1"
    yield _are_within(frames[2::4], 0, MAX_STEP), f"frames has a line that is not from 0 to {MAX_STEP}"
    yield _are_within(frames[3::4], -1, len(frames)), "frames has a parent that is no index of frames, nor -1"
    yield all(map(lt, frames[3::4], range(len(frames)))), "frames has a parent that does not stand before its child"
    yield _depth_of_chains(frames[3::4]) <= INLINE_DEPTH, f"frames has a chain of more than {INLINE_DEPTH}"
    yield len(rows) % 2 == 0, "rows is not pairs of delta and frame"
    yield 1 <= len(rows) // 2 <= MAX_PAGE_ROWS, f"it has not 1 to {MAX_PAGE_ROWS} rows"
    yield _are_within(rows[:1], 0, 0), "rows has a first delta that is not 0"
    yield _are_within(rows[2::2], 1, MAX_STEP), f"rows has a later delta that is not from 1 to {MAX_STEP}"
    yield page["first"] + sum(rows[::2]) <= MAX_OFFSET, f"rows has an offset above {MAX_OFFSET}"
    yield _are_within(rows[1::2], -1, len(frames) // 4 - 1), "rows has a frame that is no index of frames, nor -1"


def _is_text(value: Any, length: int) -> bool:
    return type(value) is str and len(value) <= length


def _are_within(values: Sequence[Any], low: int, high: int) -> bool:
    """Whether all are integers within these. By type first: True is an int."""
    return not values or {*map(type, values)} == {int} and low <= min(values) and max(values) <= high


def _depth_of_chains(parents: Sequence[int]) -> int:
    """Of frames that each stand behind their parent."""
    depths = [0]  # of -1, and then of each frame
    for parent in parents:
        depths.append(depths[parent + 1] + 1)
    return max(depths)


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
        self._pages: dict[tuple[str, int], tuple] = {}  # by UUID and lowest offset

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
            row = self._db.execute("select max(first) from symbol_pages where uuid = ? and first <= ?",
                                   (uuid, min(offset, MAX_OFFSET))).fetchone() if self.is_held(uuid) else (None,)
            self._found[uuid, offset] = [] if row[0] is None else _find(*self._page(uuid, row[0]), offset)
        return self._found[uuid, offset]

    def _page(self, uuid: str, first: int) -> tuple:
        if (uuid, first) not in self._pages:
            page, = self._db.execute("select page from symbol_pages where uuid = ? and first = ?",
                                     (uuid, first)).fetchone()
            if len(self._pages) >= CACHED_PAGES:
                self._pages.clear()
            self._pages[uuid, first] = _decode_page(first, page)
        return self._pages[uuid, first]

    def named(self, frames: Iterable[JsonObject], lookups: int = GROUPED_LOOKUPS) -> Iterator[JsonObject]:
        """The frames with the names, files and lines that the symbols give; an inlined one stands before the one that
        it is in. Where nothing is known, or after so many look-ups, a frame is as it was."""
        most, is_return = self.lookups + lookups, 0
        for frame in frames:
            read, found = read_frame(frame), []
            if read.uuid and read.offset is not None and not read.file and self.is_held(read.uuid):
                key = read.uuid, max(0, read.offset - is_return)
                found = self.lookup(*key) if key in self._found or self.lookups < most else []
            yield from [_named_frame(frame, *each, is_inlined=each is not found[-1]) for each in found] or [frame]
            is_return = is_return or int(frame.get("inlined") is not True)  # all but the innermost are return addresses

    def group(self, crash: Crash) -> Crash:
        """The crash, in the group that its names give."""
        if not self.can_name(crash.images):
            return crash
        frames = self.named(json.loads(crash.stack_trace))
        return crash._replace(group_hash=group_of(crash.exception_type, map(read_frame, frames)))


def _decode_page(first: int, page: bytes) -> tuple[list[int], Sequence[int], Sequence[int], list[str]]:
    """Where its rows begin, their frames, all frames, and the strings."""
    plain = zlib.decompress(page)
    sizes = struct.unpack_from("<2I", plain)
    numbers = struct.unpack_from(f"<{sum(sizes)}i", plain, 8)
    rows = numbers[sizes[0]:]
    return (list(accumulate(rows[::2], initial=first))[1:], rows[1::2], numbers[:sizes[0]],
            json.loads(plain[8 + 4 * sum(sizes):]))


def _find(begins: Sequence[int], rows: Sequence[int], frames: Sequence[int], strings: Sequence[str],
          offset: int) -> list[tuple[str, str, int]]:
    frame, found = rows[bisect_right(begins, offset) - 1], []
    while frame >= 0 and len(found) < INLINE_DEPTH:
        name, file, line, frame = frames[4 * frame:4 * frame + 4]
        found.append((strings[name], strings[file] if file >= 0 else "", line))
    return found


def _named_frame(frame: JsonObject, symbol: str, file: str, line: int, is_inlined: bool) -> JsonObject:
    named = {"in_app": True, **frame, "symbol": symbol, "file": file or None, "line": line or None,
             "symbolicated": True}
    return {**named, "inlined": True} if is_inlined else named


# == Triage ====================================================================
# What somebody has decided about a group, how a crash undoes that, and the facts that are worth telling. All of it is
# written in the transaction of the crash.

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
create table messages (                    -- on their way, and those of the last hour; id is the webhook-id
    id text primary key, channel_id integer not null, created_at integer not null, body text not null,  -- JSON
    tries integer not null default 0, taken_until integer not null default 0,  -- by whoever sends it
    due_at integer                         -- null: it is sent, or given up
) without rowid;
create index messages_by_time on messages (channel_id, created_at);
"""
FACT_KINDS = {  # and which of them a channel is told unless it chooses
    "crash.new": True, "crash.regressed": True, "crash.unmuted": True, "crash.spread": False,
    "release.worse": False, "digest": False}


STATES = {"open": "opened", "resolved": "resolved", "muted": "muted"}  # and what the history says of a change to it
CONDITIONS = {  # of which state each is, and its column
    "fixed_in": ("resolved", "fixed_in"), "until": ("muted", "until"),
    "more_crashes": ("muted", "crashes_left"), "more_devices": ("muted", "devices_left")}
MAX_TRIAGED = 10_000  # groups of an app; beyond, the oldest decision goes
MAX_HISTORY, MAX_COMMENT = 100, 5000  # entries of a group, the latest, and characters of one
SPREAD = (10, 100, 1000)  # devices of a group that are worth telling


class Decision(NamedTuple):
    """A row of triage."""

    state: str
    changed_at: int
    fixed_in: str | None = None
    until: int | None = None
    crashes_left: int | None = None
    devices_left: int | None = None
    regressed_at: int | None = None


def parse_triage(given: JsonObject, now: int) -> JsonObject:
    """What a PATCH asks for of a group, times in milliseconds. Raises Refusal, also for a field that is not known: a
    typo must not silently do nothing."""
    if unknown := [name for name in given if name not in _TRIAGE_FIELDS]:
        raise Refusal("invalid field", detail=f"{unknown[0][:MAX_TEXT]!r} is none of {', '.join(_TRIAGE_FIELDS)}")
    if not given:
        raise Refusal("missing state", detail=f"there is none of {', '.join(_TRIAGE_FIELDS)}")
    found = {}
    for name, value in given.items():
        try:
            found[name] = None if value is None and name in CONDITIONS else _TRIAGE_FIELDS[name](value)
            if name == "until" and (found[name] or now + 1) <= now:
                raise ValueError("is over")
        except ValueError as error:
            raise Refusal(f"invalid {name}", detail=f"{name} {error}") from None
    return found


def _state(value: Any) -> str:
    if value not in list(STATES):
        raise ValueError(f"is none of {', '.join(STATES)}")
    return value


def _some_text(value: Any) -> str:
    if type(value) is not str or not value.strip():
        raise ValueError("is no text")
    return value.strip()[:MAX_COMMENT]


def _more(value: Any) -> int:
    if not _are_within([value], 1, MAX_STEP):
        raise ValueError(f"is not a whole number from 1 to {MAX_STEP}")
    return value


_TRIAGE_FIELDS: Converters = {
    "state": _state, "fixed_in": lambda value: _some_text(value)[:MAX_TEXT],
    "until": lambda value: parse_occurred_at(_required_text(value)), "more_crashes": _more, "more_devices": _more,
    "comment": _some_text}


def decide(db: Any, app_id: int, group_hash: str, changes: JsonObject, now: int) -> None:
    """Writes what parse_triage has read. Raises Refusal for a condition that is not of the group's state."""
    before = _decision(db, app_id, group_hash)
    after = before or Decision("open", now)
    state = changes.get("state", after.state)
    for name in changes.keys() & CONDITIONS.keys():
        if changes[name] is not None and CONDITIONS[name][0] != state:
            raise Refusal(f"invalid {name}", detail=f'it goes with "state": "{CONDITIONS[name][0]}"')
    if "state" in changes:
        after = Decision(state, now, regressed_at=None if state == "resolved" else after.regressed_at)
    if changes.keys() - {"comment"}:
        after = after._replace(changed_at=now, **{
            column: changes[name] for name, (_, column) in CONDITIONS.items() if name in changes})
        if state != "open" or before and before.state != "open":
            _add_history(db, app_id, group_hash, now, STATES[state], _conditions(changes))
    _write_decision(db, app_id, group_hash, after)
    if "comment" in changes:
        _add_history(db, app_id, group_hash, now, "commented", changes["comment"])
    for each, in db.execute("""
            select group_hash from triage where app_id = ? order by changed_at desc, group_hash limit 1 offset ?
            """, (app_id, MAX_TRIAGED)).fetchall() if not before else ():
        for table in ("triage", "group_history"):
            db.execute(f"delete from {table} where app_id = ? and group_hash = ?", (app_id, each))


def _decision(db: Any, app_id: int, group_hash: str) -> Decision | None:
    row = db.execute(f"select {', '.join(Decision._fields)} from triage where app_id = ? and group_hash = ?",
                     (app_id, group_hash)).fetchone()
    return Decision(*row) if row else None


def _write_decision(db: Any, app_id: int, group_hash: str, decision: Decision) -> None:
    db.execute("delete from triage where app_id = ? and group_hash = ?", (app_id, group_hash))
    write_rows(db, f"insert into triage (app_id, group_hash, {', '.join(Decision._fields)}) values *",
               [(app_id, group_hash, *decision)])


def _conditions(changes: JsonObject) -> str | None:
    """The conditions of a change in words."""
    texts = {"fixed_in": "in {}", "until": "until {}", "more_crashes": "for {} more crashes",
             "more_devices": "for {} more devices"}
    return " or ".join(text.format(iso_time(changes[name]) if name == "until" else changes[name])
                       for name, text in texts.items() if changes.get(name) is not None) or None


def _add_history(db: Any, app_id: int, group_hash: str, at: int, what: str, detail: str | None) -> None:
    group = {"app": app_id, "group": group_hash}
    last, = db.execute("""
        select coalesce(max(entry), 0) from group_history where app_id = :app and group_hash = :group
        """, group).fetchone()
    write_rows(db, "insert into group_history values *", [(app_id, group_hash, last + 1, at, what, detail)])
    db.execute("delete from group_history where app_id = :app and group_hash = :group and entry <= :old",
               {**group, "old": last + 1 - MAX_HISTORY})


def move_triage(db: Any, app_id: int, group_hash: str, target: str) -> None:
    """Takes state and history of a group to the one that has its crashes now. A state that is there already stays."""
    both = (app_id, group_hash, target)
    entries = db.execute("""
        select at, what, detail from group_history where app_id = ? and group_hash in (?, ?)
        order by at, group_hash, entry""", both).fetchall()[-MAX_HISTORY:]
    db.execute("delete from group_history where app_id = ? and group_hash in (?, ?)", both)
    write_rows(db, "insert into group_history values *",
               [(app_id, target, number, *entry) for number, entry in enumerate(entries, 1)])
    decision = _decision(db, app_id, target) or _decision(db, app_id, group_hash)
    db.execute("delete from triage where app_id = ? and group_hash in (?, ?)", both)
    if decision:
        _write_decision(db, app_id, target, decision)


_VERSION_NUMBERS = re.compile(  # and what makes it a pre-release: 1.3.0-rc.1, 1.3.0b3; +48 says nothing
    r"[vV]?([0-9]+(?:\.[0-9]+)*)(?:-([0-9A-Za-z.-]+)|([A-Za-z][0-9A-Za-z.-]*))?(?:\+.*)?")


def _comparable(text: str) -> tuple[Any, ...] | None:
    """What orders versions, or builds: 1.3 and 1.3.0 are the same. None where it has no numbers to go by."""
    match = _VERSION_NUMBERS.fullmatch(text)
    if match is None:
        return None
    numbers, further = list(map(int, match[1].split("."))), match[2] or match[3] or ""
    while numbers and not numbers[-1]:
        numbers.pop()
    return numbers, not further, [(0, int(word), "") if word.isdecimal() else (1, 0, word)
                                  for word in re.findall("[0-9]+|[A-Za-z]+", further)]


def _split_build(text: str) -> tuple[str, str]:
    """Version and build of 1.3.0 (48)."""
    match = re.fullmatch(r"(.*[^ ]) *\(([^()]+)\)", text)
    return (match[1], match[2]) if match else (text, "")


def _has_reached(this: tuple[str, str], fixed: tuple[str, str]) -> bool | None:
    """Whether a version and build is that of a fix, or a later one. None where they cannot be compared."""
    (version, build), (fixed_version, fixed_build) = this, fixed
    numbers, fixed_numbers = _comparable(version), _comparable(fixed_version)
    if version == fixed_version or numbers and numbers == fixed_numbers:
        if not fixed_build or build == fixed_build:
            return True
        numbers, fixed_numbers = _comparable(build), _comparable(fixed_build)
    return numbers > fixed_numbers if numbers and fixed_numbers else None


def _first_seen(db: Any, app_id: int, version: str, build: str) -> int | None:
    """When a version and build, or without a build the version, was first in any report here. Events name no build:
    they are taken for the first build of their version that a crash names."""
    builds = dict(db.execute("select build_number, first_seen from builds where app_id = ? and app_version = ?",
                             (app_id, version)).fetchall())
    first = min(filter(None, builds), key=builds.__getitem__, default="")
    return min(builds.values(), default=None) if build in ("", first) else builds.get(build)


def _regresses(db: Any, decision: Decision, crash: Any) -> bool:
    """Whether a crash says that what was resolved is not. Old builds that still crash do not."""
    version, build, fixed_in = crash.app_version, crash.build_number or "", decision.fixed_in
    if not version:  # which says nothing, unless it is so with all
        return crash.at > decision.changed_at and not db.execute(
            "select 1 from releases where app_id = ? limit 1", (crash.app_id,)).fetchone()
    if version == OTHER and fixed_in:  # which is for the figures; what was sent can be compared
        version, = db.execute("select app_version from crashes where seq = ?", (crash.seq,)).fetchone()
    name, number = _split_build(version)
    if fixed_in and (reached := _has_reached((name, build or number), _split_build(fixed_in))) is not None:
        return reached
    seen, since = _first_seen(db, crash.app_id, version, build), decision.changed_at + 1
    if seen is None:  # one of too many builds
        release = db.execute("select first_seen from releases where app_id = ? and app_version = ?",
                             (crash.app_id, version)).fetchone()
        seen = release[0] if release else MAX_NUMBER
    if fixed_in:
        since = (_first_seen(db, crash.app_id, fixed_in, "")
                 or _first_seen(db, crash.app_id, *_split_build(fixed_in)) or MAX_NUMBER)
    return crash.app_version != OTHER and seen >= since


def _undoing(db: Any, now: int, decision: Decision, crashes: Sequence[Any], devices: int) -> tuple[str, Any] | None:
    """What becomes of a group that is not open, `regressed` or `unmuted`, and by which of its new crashes, of which so
    many devices are new to it. None: it stays."""
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


def see_crashes(db: Any, now: int, rollups: RollUps, crashes: Sequence[Any]) -> None:
    """Undoes the decisions that crashes just stored speak against, and notes the facts that they make. A test app has
    neither."""
    groups: dict[tuple[int, str], list[Any]] = defaultdict(list)
    for crash in crashes:
        groups[crash.app_id, crash.group_hash].append(crash)
    fresh, accepted = rollups.figures[GroupDevices].new, rollups.names.accepted
    for app_id, group_hash, total, devices, *triage in rows_of(db, f"""
            select column1, column2, crashes, devices, {", ".join(Decision._fields)} from (values *) as keys
            cross join apps on apps.id = column1 and is_test = 0
            left join group_sums on group_sums.app_id = column1 and group_sums.group_hash = column2
            left join triage on triage.app_id = column1 and triage.group_hash = column2""", list(groups)):
        key, decision, sums = (app_id, group_hash), Decision(*triage), {"crashes": total or 0, "devices": devices or 0}
        seen, new = groups[key], fresh.get(key, 0)
        if decision.state not in (None, "open"):
            undoing = _undoing(db, now, decision, seen, new)
            if not undoing:
                _count_down(db, decision, seen[0], len(seen), new)
                continue
            _reopen(db, now, decision, *undoing)
            regressed = {"fixed_in": decision.fixed_in} if undoing[0] == "regressed" else {}
            _note(db, now, "crash." + undoing[0], undoing[1], **sums, **regressed)
        elif not decision.state and (app_id, "group_hash", group_hash) in accepted:
            _note(db, now, "crash.new", seen[0], **sums)
        for bound in SPREAD if new and group_hash != OTHER else ():
            if sums["devices"] - new < bound <= sums["devices"]:
                _note(db, now, "crash.spread", seen[-1], crashes=sums["crashes"], devices=bound)


def see_moved(db: Any, now: int, crashes: Sequence[Any]) -> None:
    """Opens the resolved groups of which crashes that have just moved there say that they are not."""
    groups: dict[tuple[int, str], list[Any]] = defaultdict(list)
    for crash in crashes:
        groups[crash.app_id, crash.group_hash].append(crash)
    for app_id, group_hash, total, devices, *triage in rows_of(db, f"""
            select column1, column2, crashes, devices, {", ".join(Decision._fields)} from (values *) as keys
            cross join apps on apps.id = column1 and is_test = 0
            cross join group_sums on group_sums.app_id = column1 and group_sums.group_hash = column2
            cross join triage on triage.app_id = column1 and triage.group_hash = column2 and state = 'resolved'
            """, list(groups)):
        decision = Decision(*triage)
        if undoing := _undoing(db, now, decision, groups[app_id, group_hash], 0):
            _reopen(db, now, decision, *undoing)
            _note(db, now, "crash.regressed", undoing[1], crashes=total, devices=devices, fixed_in=decision.fixed_in)


def _note(db: Any, now: int, kind: str, crash: Any, **detail: Any) -> None:
    """Notes a fact about the group of a crash."""
    exception_type, place = db.execute("select exception_type, place from groups where app_id = ? and group_hash = ?",
                                       (crash.app_id, crash.group_hash)).fetchone()
    note_fact(db, kind, crash.app_id, now, crash.group_hash, exception_type=exception_type, place=place or "",
              app_version=crash.app_version, build_number=crash.build_number, **detail)


def _reopen(db: Any, now: int, decision: Decision, what: str, crash: Any) -> None:
    """Opens a group again, with the crash that did it in its history."""
    after = Decision("open", now, decision.fixed_in, regressed_at=now if what == "regressed" else decision.regressed_at)
    _write_decision(db, crash.app_id, crash.group_hash, after)
    build = f" ({crash.build_number})" if crash.build_number else ""
    version = f" in {crash.app_version}{build}" if crash.app_version else ""
    _add_history(db, crash.app_id, crash.group_hash, now, what, f"crash {crash_id(crash.seq)}{version}")


def _count_down(db: Any, decision: Decision, crash: Any, crashes: int, devices: int) -> None:
    """Counts crashes and devices of a mute that ends after so many."""
    if decision.crashes_left or decision.devices_left and devices:
        db.execute("""
            update triage set crashes_left = crashes_left - ?, devices_left = devices_left - ?
            where app_id = ? and group_hash = ?""", (crashes, devices, crash.app_id, crash.group_hash))


def note_fact(db: Any, kind: str, app_id: int, at: int, group_hash: str | None, **detail: Any) -> None:
    """Writes a fact in the current transaction, if there is anybody to tell it to."""
    db.has_facts |= db.execute("""
        insert into facts (app_id, at, kind, group_hash, detail) select ?, ?, ?, ?, ?
        where exists (select 1 from channels where ended_at is null)
        """, (app_id, at, kind, group_hash, _encode(detail))).rowcount > 0


# == Figures ===================================================================
# What the server counts. A figure is a class: its tables, how reports count in it, and the questions it answers.
# Reports count by 1 when they are stored and by -1 when a device is forgotten, in the transaction that changes their
# rows, so a sum always equals a count over the rows. When reports expire, sums stay; only what describes the reports
# that are kept goes with them. `check` counts all again.

ALL_DAYS = -1_000_000  # the `day` of a label's sum over all days
WEEK = 7               # days of the overview, ending today
DURATION_DAYS = 400    # days that durations are kept: a year, and some
DEVICE_DAYS = 400      # a report that occurred more days before its receipt counts no device
NAME_DAYS = 90         # days for which it is kept how often an event of a name came
HOURS_KEPT = 48        # hours for which it is kept how many devices were last seen in each
TRIMMED = 1000         # rows that one step of `trim` deletes from a table
MAX_RELEASES = 1000    # of an app, whatever the day
MAX_BUILDS_OF_APP = 2000
HEALTH_DAYS = 90       # of a release's age in which it is compared with the one before it
MAX_ANSWER = 60_000    # bytes of JSON that the rows of a public answer may take: all of it stays below 64 kB

OTHER = "(other)"      # stands for names beyond these limits, which hold for an app and a UTC day:
NEW_NAMES = {"group_hash": 500, "exception_type": 200, "device_model": 200, "app_version": 100, "name": 200}
FLAGS = {"exception_type": 1, "device_model": 2, "app_version": 4, "name": 8}  # bits of `other`: it counts as (other)

# Of the app that is asked for, or of all live ones.
APPS = "app_id in (select id from apps where id = :app or :app is null and is_test = 0)"

TABLES = {Crash: "crashes", Event: "events"}
COUNTED = {  # a report as the figures see it; `at` is the time at which it counts
    Crash: namedtuple("CountedCrash", "seq app_id received_at at sent_type app_version build_number device_id_hash"
                                      " session_id group_hash images exception_type device_model exception_reason"
                                      " stack_trace"),
    Event: namedtuple("CountedEvent", "seq app_id received_at at type app_version device_id_hash session_id name")}


def counted_rows(db: sqlite3.Connection, kind: type, source: str, parameters: Any = ()) -> list[Any]:
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
    at = {each: counted_at(*each) for each in set(clocks)}  # of which a batch has few
    columns = [map(attrgetter(name), reports) for name in COUNTED[kind]._fields[5:]]
    make = partial(tuple.__new__, COUNTED[kind])  # as _make, in a third of the time
    return list(map(make, zip(seqs, repeat(app_id), received, map(at.__getitem__, clocks), types, *columns)))


class Sums:
    """A table of sums, and in a transaction the changes to it, which are written with one statement."""

    def __init__(self, table: str, key: str, columns: str):
        self.table, self.key, self.columns = table, ["app_id", *key.split()], columns.split()
        self._changes: dict[tuple, dict[str, int]] = defaultdict(lambda: dict.fromkeys(self.columns, 0))

    @property
    def schema(self) -> str:
        texts = ("field", "label", "group_hash", "app_version", "key", "uuid", "name", "type")
        columns = [f"{name} {'text' if name in texts else 'integer'} not null" for name in self.key + self.columns]
        return (f"create table {self.table} ({', '.join(columns)},\n"
                f"    primary key ({', '.join(self.key)})) without rowid;\n")

    def add(self, *key: Any, **counts: int) -> None:
        """Adds to a row, which is made where there is none, and deleted when all its sums are 0."""
        row = self._changes[key]
        for column, count in counts.items():
            row[column] += count

    def add_each(self, column: str, counts: Mapping[tuple, int]) -> None:
        """Adds to a column of many rows."""
        for key, count in counts.items():
            self._changes[key][column] += count

    def save(self, db: sqlite3.Connection) -> list[tuple]:
        """Writes the changes; returns the keys of the rows that have changed."""
        changed = {key: row for key, row in self._changes.items() if any(row.values())}
        if not changed:
            return []
        write_rows(db, f"""
            insert into {self.table} ({", ".join(self.key + self.columns)}) values *
            on conflict ({", ".join(self.key)}) do update set
                {", ".join(f"{each} = {self.table}.{each} + excluded.{each}" for each in self.columns)}
            """, [(*key, *row.values()) for key, row in changed.items()])
        if gone := [key for key, row in changed.items() if min(row.values()) < 0]:
            tests = [f"{each} = ?" for each in self.key] + [f"{each} <= 0" for each in self.columns]
            db.executemany(f"delete from {self.table} where {' and '.join(tests)}", gone)
        self._changes.clear()
        return list(changed)


def per_day(db: sqlite3.Connection, table: str, columns: Sequence[str], app: int | None,
            days: range) -> dict[str, list[int]]:
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
    SUMS: Mapping[str, tuple[str, str]] = {}  # tables of sums: the rest of the key beside app_id, and the sums
    WINDOW = ("", "", 0)  # a table, its column of days or hours, and how many of them it holds
    COUNTS: tuple[type, ...] = (Crash,)  # the kinds of reports that count in it

    def __init__(self, db: sqlite3.Connection, now: int, releases: Releases | None = None):
        self._db, self._now, self._today = db, now, now // DAY
        self._releases: Any = releases  # in which sessions and devices count too
        self.sums = {table: Sums(table, *columns) for table, columns in self.SUMS.items()}

    @classmethod
    def tables(cls) -> str:
        """The statements that make its tables."""
        return cls.TABLES + "".join(Sums(table, *spec).schema for table, spec in cls.SUMS.items())

    def count(self, kind: type, reports: Sequence[Any], by: int) -> None:
        """Counts reports that were stored (by 1), or whose rows were deleted to be forgotten (by -1)."""
        raise NotImplementedError

    def expire(self, kind: type, reports: Sequence[Any]) -> None:
        """Deletes what describes only reports whose rows have expired."""

    def save(self) -> None:
        """Writes what has changed."""
        for sums in self.sums.values():
            sums.save(self._db)


class NewNames:
    """Decides which names count by themselves: whoever has a key can invent names without end."""

    TABLES = """
create table new_names (                   -- of an app and a UTC day
    app_id integer not null, day integer not null, field text not null, names integer not null,
    primary key (app_id, day, field)) without rowid;
"""
    WINDOW = ("new_names", "day", 0)

    def __init__(self, db: sqlite3.Connection):
        self._db = db
        self.accepted: set[tuple[int, str, str]] = set()  # app_id, field, name; new in this transaction

    def limit(self, app_id: int, received: Sequence[int], reports: Reports) -> tuple[Sequence[int], Reports]:
        """The `other` of each report, and the reports with the group under which they are stored."""
        is_event = type(reports[0]) is Event
        fields = ["app_version", "name"] if is_event else [each for each in NEW_NAMES if each != "name"]
        found = {each: set(map(attrgetter(each), reports)) for each in fields}
        if is_event:  # the ends of sessions are not counted by name
            named = set(map(attrgetter("name", "type"), reports))  # in C, as a batch has a hundred
            found["name"] = {name for name, type_ in named if type_ not in _ENDS}
        names = {(app_id, each, name) for each, of in found.items() for name in of if name}
        unknown = self._unknown(names - self.accepted)
        refused = self._refused(dict.fromkeys(  # in the order in which they came
            (app_id, came // DAY, each, getattr(report, each)) for came, report in zip(received, reports)
            for each in fields if (app_id, each, getattr(report, each)) in unknown)) if unknown else ()
        if not refused:
            return [0] * len(reports), reports
        further = [[each for each in fields if (app_id, each, getattr(report, each)) in refused] for report in reports]
        return [sum(FLAGS.get(field, 0) for field in each) for each in further], [
            report._replace(group_hash=OTHER) if "group_hash" in each else report
            for report, each in zip(reports, further)]

    def _unknown(self, names: set[tuple[int, str, str]]) -> set[tuple[int, str, str]]:
        return names - set(rows_of(self._db, f"""
            select column1, column2, column3 from (values *) as keys
            where case column2
                when 'group_hash' then exists (
                    select 1 from groups where app_id = column1 and group_hash = column3)
                when 'app_version' then exists (
                    select 1 from releases where app_id = column1 and app_version = column3)
                when 'name' then exists (select 1 from event_names where app_id = column1 and name = column3)
                else exists (select 1 from labels
                    where app_id = column1 and field = column2 and day = {ALL_DAYS} and label = column3) end
            """, list(names)))

    def _refused(self, names: Iterable[tuple[int, int, str, str]]) -> set[tuple[int, str, str]]:
        """Of new names, those beyond the limit of the day on which their first report was received."""
        fresh: dict[tuple, list[tuple]] = defaultdict(list)  # by app, day and field
        seen: set[tuple] = set()
        for app_id, day, each, text in names:
            if (app_id, each, text) not in seen:
                seen.add((app_id, each, text))
                fresh[app_id, day, each].append((app_id, each, text))
        used = {row[:3]: row[3] for row in rows_of(self._db, """
            select new_names.* from (values *) as keys
            cross join new_names on app_id = column1 and day = column2 and field = column3""", list(fresh))}
        room = {key: max(0, NEW_NAMES[key[2]] - used.get(key, 0)) for key in fresh}
        for app_id, day, each in fresh:
            if each == "app_version":
                known, = self._db.execute("select count(*) from releases where app_id = ?", (app_id,)).fetchone()
                room[app_id, day, each] = min(room[app_id, day, each], max(0, MAX_RELEASES - known))
        write_rows(self._db, """
            insert into new_names values *
            on conflict (app_id, day, field) do update set names = new_names.names + excluded.names
            """, [(*key, min(room[key], len(each))) for key, each in fresh.items() if room[key]])
        refused = {name for key, each in fresh.items() for name in each[room[key]:]}
        self.accepted |= seen - refused
        return refused


class Requests(Figure):
    """Requests per key and UTC day. No report tells of them: a commit counts them."""

    SUMS = {"key_days": ("day key", "requests")}  # `key`: see key_name
    WINDOW = ("key_days", "day", 90)
    COUNTS = ()

    def add(self, app_id: int, key: str, requests: int) -> None:
        self.sums["key_days"].add(app_id, self._today, key, requests=requests)


class Crashes(Figure):
    """Crashes per UTC day; and of those that are kept, exception types and device models, per day and ALL_DAYS."""

    SUMS = {"crash_days": ("day", "crashes"), "labels": ("field day label", "crashes")}

    def count(self, kind: type, reports: Sequence[Any], by: int) -> None:
        self._count_alike(reports, by, by)

    def expire(self, kind: type, reports: Sequence[Any]) -> None:
        self._count_alike(reports, 0, -1)

    def _count_alike(self, crashes: Sequence[Any], by_day: int, by: int) -> None:
        alike = Counter((crash.app_id, crash.at // DAY, crash.exception_type, crash.device_model) for crash in crashes)
        for (app_id, day, *labels), count in alike.items():
            self.sums["crash_days"].add(app_id, day, crashes=by_day * count)
            for name, label in zip(("exception_type", "device_model"), labels):
                for each in (ALL_DAYS, day) if label else ():
                    self.sums["labels"].add(app_id, name, each, label, crashes=by * count)

    @staticmethod
    def most_frequent(db: sqlite3.Connection, app: int | None, field: str, days: range | None,
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
    """What a group is called, and its crashes per UTC day of the week. It goes with the last crash that is kept,
    but not before its week is over."""

    TABLES = """
create table groups (
    app_id integer not null, group_hash text not null,
    exception_type text not null,
    first_seen integer not null, first_version text,      -- of its first crash, by the time at which crashes count
    last_seen integer not null, exception_reason text,    -- of its latest; the beginning of the reason
    place text, search text,                              -- where in the app it was; in lower case what a search finds
    primary key (app_id, group_hash)) without rowid;
"""
    SUMS = {"group_days": ("day group_hash", "crashes")}
    WINDOW = ("group_days", "day", WEEK)

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._first: dict[tuple, Any] = {}  # by app_id and group_hash
        self._latest: dict[tuple, Any] = {}
        self._left: dict[tuple, int] = {}  # groups that crashes were taken out of, and the latest time of these
        self.symbols = Symbols(self._db)

    def count(self, kind: type, reports: Sequence[Any], by: int) -> None:
        for crash in reports:
            key = crash.app_id, crash.group_hash
            if by < 0:
                self._left[key] = max(crash.at, self._left.get(key, 0))
                continue
            if crash.at < self._first.setdefault(key, crash).at:
                self._first[key] = crash
            if crash.at >= self._latest.setdefault(key, crash).at:
                self._latest[key] = crash
        alike = Counter((crash.app_id, crash.at // DAY, crash.group_hash) for crash in reports)
        for day_of_group, crashes in alike.items():
            if day_of_group[1] >= self._today - WEEK:
                self.sums["group_days"].add(*day_of_group, crashes=by * crashes)

    def expire(self, kind: type, reports: Sequence[Any]) -> None:
        for crash in reports:
            key = crash.app_id, crash.group_hash
            self._left[key] = max(crash.at, self._left.get(key, 0))

    def drop(self, groups: Iterable[tuple], before: int) -> None:
        """Deletes those of which no crash is kept and which were last seen before that time."""
        self._db.executemany("""
            delete from groups where app_id = :app and group_hash = :group and last_seen < :before
                and not exists (select 1 from crashes where app_id = :app and group_hash = :group)
            """, [{"app": app_id, "group": group_hash, "before": before} for app_id, group_hash in groups])

    def save(self) -> None:
        super().save()
        write_rows(self._db, """
            insert into groups values *
            on conflict (app_id, group_hash) do update set
                first_seen = min(groups.first_seen, excluded.first_seen),
                first_version = case when excluded.first_seen < groups.first_seen
                    then excluded.first_version else groups.first_version end,
                last_seen = max(groups.last_seen, excluded.last_seen),
                exception_reason = case when excluded.last_seen >= groups.last_seen
                    then excluded.exception_reason else groups.exception_reason end,
                place = case when excluded.last_seen >= groups.last_seen then excluded.place else groups.place end,
                search = case when excluded.last_seen >= groups.last_seen then excluded.search else groups.search end
            """, [(*key, OTHER if key[1] == OTHER else latest.sent_type, self._first[key].at,
                   self._first[key].app_version, latest.at, *self._shown(key[1], latest))
                  for key, latest in self._latest.items()])
        for key, latest in self._left.items():  # what is left of a group is shown as its latest crash
            if self._db.execute("select 1 from groups where app_id = ? and group_hash = ? and last_seen <= ?",
                                (*key, latest)).fetchone():
                self.show_latest(*key)
        self.drop([(app_id, group_hash) for app_id, group_hash in self._left if not self._db.execute("""
            select 1 from group_days where app_id = ? and day >= ? and group_hash = ? limit 1
            """, (app_id, self._today - WEEK, group_hash)).fetchone()], MAX_NUMBER)

    def _shown(self, group_hash: str, crash: Any) -> tuple[str | None, str, str]:
        """Reason, place and search text of a group whose latest crash this is."""
        reason, trace = (crash.exception_reason or "")[:MAX_TEXT] or None, crash.stack_trace or ""
        if len(trace) < 20_000 and not self.symbols.can_name(crash.images):
            names = _recent_own_names(trace)
        else:
            names = own_names(self.symbols.named(json.loads(trace or "[]")))
        words = "\n".join([crash.sent_type, reason or "", group_hash, *names])
        return reason, "".join(names[:1])[:200], words.casefold()[:4 * MAX_TEXT]

    def show_latest(self, app_id: int, group_hash: str) -> None:
        """Shows a group as its latest crash that is kept; first_seen stays."""
        seqs = self._db.execute(f"""
            select seq from crashes where app_id = ? and group_hash = ? order by {COUNTED_AT} desc, seq desc limit 1
            """, (app_id, group_hash)).fetchall()
        latest = counted_rows(self._db, Crash, "from (values *) as keys cross join crashes on seq = column1", seqs)
        if latest:
            trace, = self._db.execute("select stack_trace from crashes where seq = ?", (latest[0].seq,)).fetchone()
            shown = (latest[0].at, *self._shown(group_hash, latest[0]._replace(stack_trace=trace)))
        else:  # what its crashes said goes with them
            shown = (None, None, None, group_hash)
        self._db.execute("""
            update groups set last_seen = coalesce(?, last_seen), exception_reason = ?, place = ?, search = ?
            where app_id = ? and group_hash = ?
            """, (*shown, app_id, group_hash))

    def move(self, before: Sequence[Any], after: Sequence[Any]) -> None:
        """Counts crashes in their new groups. `leave` ends it for the old one, which is looked at once."""
        for crash in before:
            if crash.at // DAY >= self._today - WEEK:
                self.sums["group_days"].add(crash.app_id, crash.at // DAY, crash.group_hash, crashes=-1)
        self.count(Crash, after, 1)

    def leave(self, app_id: int, group_hash: str, target: str) -> None:
        """Shows what is left of a group whose crashes have moved. If nothing is, its name becomes an alias."""
        self._left[app_id, group_hash] = MAX_NUMBER
        self.save()
        if self._db.execute("select 1 from crashes where app_id = ? and group_hash = ? limit 1",
                            (app_id, group_hash)).fetchone() or not self._db.execute(
                                "select 1 from apps where id = ?", (app_id,)).fetchone():
            return
        self._db.execute("update group_aliases set target = ? where app_id = ? and target = ?",
                         (target, app_id, group_hash))
        self._db.execute("delete from group_aliases where app_id = ? and group_hash = ?", (app_id, target))
        move_triage(self._db, app_id, group_hash, target)
        self._db.execute("""
            insert into group_aliases values (?, ?, ?) on conflict (app_id, group_hash) do update set
                target = excluded.target""", (app_id, group_hash, target))

    @staticmethod
    def most_frequent(db: sqlite3.Connection, app: int | None, days: range) -> list[JsonObject]:
        """The five most frequent groups of these days, at most the last seven; of several apps, the latest's name."""
        return dict_rows(db, f"""
            select top.group_hash, exception_type, substr(coalesce(exception_reason, ''), 1, 200) as exception_reason,
                count
            from (
                select group_hash, sum(crashes) as count from group_days
                where {APPS} and day between :first and :last
                group by group_hash
                order by count desc, group_hash
                limit 5) as top
            cross join groups on groups.group_hash = top.group_hash and groups.app_id = (
                select app_id from groups
                where {APPS} and group_hash = top.group_hash
                order by last_seen desc, app_id
                limit 1)
            order by count desc, top.group_hash""", {"app": app, "first": days[0], "last": days[-1]})


class Images(Figure):
    """Of the crashes that are kept, those of each group that symbols of a build can name."""

    SUMS = {"group_images": ("group_hash uuid", "crashes")}

    def count(self, kind: type, reports: Sequence[Any], by: int) -> None:
        for crash in reports:
            for uuid in (crash.images or "").split():
                self.sums["group_images"].add(crash.app_id, crash.group_hash, uuid, crashes=by)

    def expire(self, kind: type, reports: Sequence[Any]) -> None:
        self.count(kind, reports, -1)


class GroupDevices(Figure):
    """Of the crashes that are kept, those of each group and of each device in it, and the devices of each group."""

    SUMS = {"group_devices": ("group_hash device", "crashes"),  # see device_key
            "group_sums": ("group_hash", "crashes devices")}

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._crashes: Counter = Counter()  # by app_id, group_hash and device
        self.new: Counter = Counter()  # by app_id and group_hash: devices that the group did not have before

    def count(self, kind: type, reports: Sequence[Any], by: int) -> None:
        for (app_id, group, device), crashes in Counter(map(_GROUP_DEVICE, reports)).items():
            self.sums["group_sums"].add(app_id, group, crashes=by * crashes)
            if device:
                self._crashes[app_id, group, device_key(device)] += by * crashes

    def expire(self, kind: type, reports: Sequence[Any]) -> None:
        self.count(kind, reports, -1)

    def save(self) -> None:
        had = {row[:3]: row[3] for row in rows_of(self._db, """
            select group_devices.* from (values *) as keys
            cross join group_devices on app_id = column1 and group_hash = column2 and device = column3
            """, list(self._crashes))}
        self.new = Counter(key[:2] for key, by in self._crashes.items() if by > 0 and key not in had)
        gone = Counter(key[:2] for key, crashes in had.items() if crashes + self._crashes[key] <= 0)
        self.sums["group_devices"].add_each("crashes", self._crashes)
        self.sums["group_sums"].add_each("devices", self.new)
        self.sums["group_sums"].add_each("devices", {key: -count for key, count in gone.items()})
        super().save()


_GROUP_DEVICE = attrgetter("app_id", "group_hash", "device_id_hash")
_RECEIVED_AT = attrgetter("received_at")


class Builds(Figure):
    """When each build was first seen. A build beyond the bound has no row; `releases` still knows its version."""

    TABLES = """
create table builds (
    app_id integer not null, app_version text not null, build_number text not null,  -- '': not said, as by all events
    first_seen integer not null,           -- when its first report was received
    primary key (app_id, app_version, build_number)) without rowid;
"""
    COUNTS = (Crash, Event)
    BUILD = {Crash: attrgetter("app_id", "app_version", "build_number"), Event: attrgetter("app_id", "app_version")}

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._received: dict[tuple, int] = {}  # by app_id, app_version and build_number
        self.new: set[tuple] = set()  # of these, the builds that were never seen before

    def count(self, kind: type, reports: Sequence[Any], by: int) -> None:
        for (app_id, version, *build), run in groupby(reports if by > 0 else (), self.BUILD[kind]):
            if version:
                key, received = (app_id, version, "".join(filter(None, build))), min(map(_RECEIVED_AT, run))
                self._received[key] = min(received, self._received.get(key, received))

    def save(self) -> None:
        known = getattr(self._db, "builds", {})  # which a server's connection has read before, and which never go
        new = [key for key, at in self._received.items() if at < known.get(key, MAX_NUMBER)]
        stored = {row[:3]: row[3] for row in rows_of(self._db, """
            select builds.* from (values *) as keys
            cross join builds on app_id = column1 and app_version = column2 and build_number = column3
            """, new)}
        if len(known) > MAX_BUILDS_OF_APP:
            known.clear()
        known.update(stored)
        self._received = {key: self._received[key] for key in new}
        changed = {key: at for key, at in self._received.items() if at < stored.get(key, MAX_NUMBER)}
        for app_id in {key[0] for key in changed.keys() - stored.keys()}:
            rows, = self._db.execute("select count(*) from builds where app_id = ?", (app_id,)).fetchone()
            fresh = [key for key in changed if key[0] == app_id and key not in stored]
            self.new.update(fresh[:max(0, MAX_BUILDS_OF_APP - rows)])
        write_rows(self._db, """
            insert into builds values *
            on conflict (app_id, app_version, build_number) do update set first_seen = excluded.first_seen
            """, [(*key, at) for key, at in changed.items() if key in stored or key in self.new])


class Releases(Figure):
    """Sessions, crashes and devices per app_version, and its sessions per UTC day of the week."""

    TABLES = """
create table releases (
    app_id integer not null, app_version text not null,
    first_seen integer not null, last_seen integer not null,  -- when its first and its last report were received
    primary key (app_id, app_version)) without rowid;
"""
    SUMS = {"release_sums": ("app_version", "sessions crashed_sessions crashes devices crashed_devices"),
            "release_days": ("day app_version", "sessions")}
    WINDOW = ("release_days", "day", WEEK)
    COUNTS = (Crash, Event)

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._received: dict[tuple, tuple[int, int]] = {}  # by app_id and app_version: the rest of its row

    def count(self, kind: type, reports: Sequence[Any], by: int) -> None:
        for (app_id, version), run in groupby(reports, attrgetter("app_id", "app_version")):
            if not version:
                continue
            received = [report.received_at for report in run]
            if kind is Crash:
                self.add(app_id, version, crashes=by * len(received))
            if by > 0:
                first, last = self._received.get((app_id, version), (received[0], received[0]))
                self._received[app_id, version] = min(first, *received), max(last, *received)

    def add(self, app_id: int, version: str | None, **counts: int) -> None:
        """Counts crashes, sessions or devices of a release."""
        if version:
            self.sums["release_sums"].add(app_id, version, **counts)

    def add_session(self, app_id: int, version: str | None, day: int, crashed: int, by: int) -> None:
        """Counts a session that started on a day."""
        self.add(app_id, version, sessions=by, crashed_sessions=by * crashed)
        if version and day >= self._today - WEEK:
            self.sums["release_days"].add(app_id, day, version, sessions=by)

    def save(self) -> None:
        super().save()
        write_rows(self._db, """
            insert into releases values *
            on conflict (app_id, app_version) do update set
                first_seen = min(releases.first_seen, excluded.first_seen),
                last_seen = max(releases.last_seen, excluded.last_seen)
            """, [(*key, *times) for key, times in self._received.items()])

    @staticmethod
    def pairs(db: sqlite3.Connection, app: int | None) -> list[Pair]:
        """Each release with the one before it: the highest lower version that was seen before it. So neither a version
        that comes late nor one that is no release, such as 99.0, hides the others."""
        rows = db.execute(f"""
            select app_id, app_version, first_seen from releases where {APPS} and app_version <> '{OTHER}'
            """, {"app": app}).fetchall()
        come: dict[int, list[tuple]] = defaultdict(list)  # by version
        pairs = []
        for app_id, version, first in sorted(rows, key=lambda row: (row[2], version_key(row[1]))):
            own = version_key(version), version, first
            place = bisect_left(come[app_id], own)
            pairs += [Pair(app_id, version, first, *come[app_id][place - 1][1:])] if place else []
            come[app_id].insert(place, own)
        return pairs

    @staticmethod
    def newest(db: sqlite3.Connection, app: int | None, since: int) -> dict[int, str]:
        """That of each app, by its id: the last that came. An old version that comes late is none, unless more of the
        sessions since that day are its: an app may count its versions anew."""
        leaders: dict[int, tuple] = {}
        for app_id, version, first, recent in db.execute(f"""
                select app_id, app_version, first_seen, coalesce((
                    select sum(sessions) from release_days
                    where app_id = releases.app_id and day >= :since and app_version = releases.app_version), 0)
                from releases where {APPS} and app_version <> '{OTHER}' order by first_seen, app_version
                """, {"app": app, "since": since}):
            own, leader = version_key(version), leaders.get(app_id)
            if leader is None or own >= leader[0] or recent > leader[1]:
                leaders[app_id] = own, recent, version
        return {app_id: leader[-1] for app_id, leader in leaders.items()}

    @staticmethod
    def healths(db: sqlite3.Connection, pairs: Sequence[Pair], now: int) -> dict[Pair, list[Health]]:
        """That of a release and of the one before it at equal ages: of the devices that came to the newer until the
        last full hour, and to the other within as long a time."""
        spans: dict[tuple, tuple] = {}
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
    def latest(db: sqlite3.Connection, app: int | None, days: range) -> list[JsonObject]:
        """The latest 100 releases, with their share of the sessions of these days: `recent` to `of_all`."""
        return dict_rows(db, f"""
            with latest as (
                select * from releases where {APPS} order by first_seen desc, app_version, app_id limit 100),
            recent as (
                select app_id, app_version, sum(sessions) as recent from release_days
                where {APPS} and day between :first and :last group by app_id, app_version),
            whole as (
                select app_id, sum(sessions) as of_all from session_days
                where {APPS} and day between :first and :last group by app_id)
            select latest.app_id, apps.name as app, latest.app_version, coalesce(sessions, 0) as sessions,
                coalesce(crashed_sessions, 0) as crashed_sessions, coalesce(crashes, 0) as crashes,
                coalesce(devices, 0) as devices,
                coalesce(crashed_devices, 0) as crashed_devices, first_seen, last_seen, recent, of_all
            from latest join apps on apps.id = latest.app_id
            left join release_sums using (app_id, app_version)
            left join recent on recent.app_id = latest.app_id and recent.app_version = latest.app_version
            left join whole on whole.app_id = latest.app_id
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
        text = "{} % of devices crash-free, {} % before".format(
            *_told_apart(100 * ours.share, 100 * before.share, 0 if word == "no difference seen" else 2))
    return {"word": word, "text": f"{word}: {text}",
            "interval": [round(100 * low, 1), round(100 * high, 1)] if least else None}


def _told_apart(value: float, other: float, digits: int) -> tuple[str, str]:
    """Two figures with no more decimals than it takes to tell them apart, and at most so many."""
    for n in range(digits + 1):
        texts = f"{value:.{n}f}", f"{other:.{n}f}"
        if texts[0] != texts[1]:
            break
    return texts


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
create table medians (                     -- of the durations of a day that is over
    app_id integer not null, day integer not null, seconds integer not null,
    primary key (app_id, day)) without rowid;
"""
    SUMS = {"session_days": ("day", "sessions ended session_ms"),  # `ended` have a duration; session_ms is their sum
            "durations": ("day seconds", "sessions")}  # seconds in two significant digits
    WINDOW = ("durations", "day", DURATION_DAYS)
    COUNTS = (Crash, Event)
    MEDIAN = """
        select seconds from (
            select seconds, sum(sessions) over (order by seconds) as so_far, sum(sessions) over () as total
            from durations where app_id = session_days.app_id and day = session_days.day) as sums
        where 2 * so_far >= total
        order by seconds
        limit 1
        """

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._seen: dict[tuple, Session] = {}  # by app_id, session_id and device

    def count(self, kind: type, reports: Sequence[Any], by: int) -> None:
        for (app_id, session_id, device), run in groupby(reports, _SESSION):
            events = list(run)
            ends = [Session(started_at=event.at, app_version=event.app_version) if event.type == "session_start"
                    else Session(ended_at=event.at) for event in events if event.type in _ENDS] if kind is Event else []
            if session_id and by > 0:
                key = app_id, session_id, device_key(device)
                seen = Session(events[0].seq, events[-1].seq, crashed=int(kind is Crash))
                self._seen[key] = reduce(Session.merged, ends, self._seen.get(key, Session()).merged(seen))
            elif not session_id:
                for session in ends:
                    self._count(app_id, session, by)
        if by < 0:  # all reports of a session are of one device, so it goes with the first of them
            gone = self._stored({(app_id, session_id, device_key(device))
                                 for app_id, session_id, device in map(_SESSION, reports) if session_id})
            for key, session in gone.items():
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
        self._releases.add_session(app_id, session.app_version, day, session.crashed, by)
        self.sums["session_days"].add(app_id, day, sessions=by)
        if duration is not None:
            self.sums["session_days"].add(app_id, day, ended=by, session_ms=by * duration)
            if day >= self._today - DURATION_DAYS:
                unit = 10 ** max(0, len(str(duration // SECOND)) - 2) * SECOND  # so a day has few different ones
                self.sums["durations"].add(app_id, day, (duration + unit // 2) // unit * unit // SECOND, sessions=by)

    def save(self) -> None:
        stored = self._stored(self._seen)
        changed = {key: stored[key].merged(seen) if key in stored else seen for key, seen in self._seen.items()}
        for key, after in changed.items():
            before = stored.get(key, Session())
            if before[2:] != after[2:]:
                self._count(key[0], before, -1)
                self._count(key[0], after, 1)
        write_rows(self._db, """
            insert into sessions values *
            on conflict (app_id, session_id, device) do update set
                first_seq = excluded.first_seq, last_seq = excluded.last_seq, started_at = excluded.started_at,
                ended_at = excluded.ended_at, app_version = excluded.app_version, crashed = excluded.crashed
            """, [(*key, *after) for key, after in changed.items()])
        self.sums["session_days"].save(self._db)
        changed_days = {key[:2] for key in self.sums["durations"].save(self._db)}
        self._db.executemany("delete from medians where app_id = ? and day = ?", list(changed_days))
        self._save_medians([key for key in changed_days if key[1] < self._today - 1])

    def _stored(self, keys: Iterable[tuple]) -> dict[tuple, Session]:
        return {row[:3]: Session(*row[3:]) for row in rows_of(self._db, """
            select sessions.* from (values *) as keys
            cross join sessions on app_id = column1 and session_id = column2 and device = column3""", list(keys))}

    def _save_medians(self, days: Sequence[tuple]) -> None:
        self._db.executemany(f"""
            insert into medians select app_id, day, ({self.MEDIAN}) from session_days
            where app_id = ? and day = ? and exists (
                select 1 from durations where app_id = session_days.app_id and day = session_days.day)
            on conflict (app_id, day) do update set seconds = excluded.seconds""", days)

    def close_days(self) -> None:
        """Stores the medians of days that are over. Those of today and yesterday change with nearly every session,
        so they are computed when they are asked for."""
        self._save_medians(self._db.execute("""
            select app_id, day from session_days
            where app_id in (select id from apps) and day between ? and ? and ended > 0
                and exists (select 1 from durations where app_id = session_days.app_id and day = session_days.day)
                and not exists (select 1 from medians where app_id = session_days.app_id and day = session_days.day)
            limit ?""", (self._today - DURATION_DAYS, self._today - 2, TRIMMED)).fetchall())

    @staticmethod
    def per_day(db: sqlite3.Connection, app: int | None, days: range) -> JsonObject:
        """Sessions, the mean and the median of their seconds. Of several apps together there is no median."""
        rows = {row[0]: row[1:] for row in db.execute(f"""
            select day, sum(sessions), sum(ended), sum(session_ms), sum(min(ended, 1)), max(app_id * min(ended, 1)),
                max((select seconds from medians where app_id = session_days.app_id and day = session_days.day))
            from session_days where {APPS} and day between :first and :last group by day
            """, {"app": app, "first": days[0], "last": days[-1]})}
        found: JsonObject = {"sessions": [], "median_seconds": [], "mean_seconds": []}
        for day in days:
            sessions, ended, total, apps, only_app, median = rows.get(day, (0, 0, 0, 0, 0, None))
            if apps == 1 and median is None:
                median, = db.execute(f"select ({Sessions.MEDIAN}) from session_days where app_id = ? and day = ?",
                                     (only_app, day)).fetchone()
            found["sessions"].append(sessions)
            found["median_seconds"].append(median if apps == 1 else None)
            found["mean_seconds"].append(round(total / ended / SECOND, 1) if ended else None)
        return found


class Device:
    """What a transaction learns of a device."""

    __slots__ = ("first_day", "days", "last_hour", "last_seq", "versions")

    def __init__(self) -> None:
        self.first_day, self.last_hour, self.last_seq = MAX_NUMBER, 0, 0
        self.days: set[int] = set()
        self.versions: dict[str, tuple[int, int]] = {}  # first_hour and crash_hour, MAX_NUMBER for none

    def see(self, reports: Sequence[Any], crashed: int) -> None:
        """Adds reports of one version."""
        times, version = [report.at for report in reports], reports[0].app_version
        oldest = reports[0].received_at // DAY - DEVICE_DAYS
        self.days.update(day for day in {at // DAY for at in times} if day >= oldest)
        self.first_day = min(self.first_day, min(times) // DAY)
        self.last_hour = max(self.last_hour, max(times) // HOUR)
        self.last_seq = max(self.last_seq, reports[-1].seq)
        if version:
            hour = min(map(_RECEIVED_AT, reports)) // HOUR
            self.versions[version] = _earliest((hour, hour if crashed else MAX_NUMBER), self.versions.get(version))


def _earliest(hours: tuple[int, int], others: tuple[int, int] | None) -> tuple[int, int]:
    return (min(hours[0], others[0]), min(hours[1], others[1])) if others else hours


class Devices(Figure):
    """Devices that are active, that are new and come back, and those of each release. What is known of a device
    goes with its last report (to the hour); it is known by a digest, so that no figure holds its name."""

    TABLES = """
create table devices (                     -- of which a report is kept
    app_id integer not null, device integer not null,  -- see device_key
    first_day integer not null, last_hour integer not null,  -- by the time at which reports count
    last_seq integer not null,             -- of its last report, or of an earlier one of the same hour
    primary key (app_id, device)) without rowid;
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
    SUMS = {"device_hours": ("hour", "devices"),  # by the hour in which they were last seen
            "active_days": ("day", "dau wau mau"), "cohorts": ("day", "devices back_1 back_7 back_30"),
            "release_hours": ("app_version hour", "devices crashed_devices")}  # by first_hour and by crash_hour
    WINDOW = ("device_hours", "hour", HOURS_KEPT)
    COUNTS = (Crash, Event)

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._seen: dict[tuple[int, int], Device] = defaultdict(Device)  # by app_id and device
        self._spans: Counter = Counter()  # app_id, column of active_days, first day, day after the last: devices

    def count(self, kind: type, reports: Sequence[Any], by: int) -> None:
        """Reports that are forgotten do not count here: their device is forgotten as a whole."""
        runs = groupby(reports if by > 0 else (), attrgetter("app_id", "device_id_hash", "app_version"))
        for (app_id, device, _), run in runs:
            if device:
                self._seen[app_id, device_key(device)].see(list(run), int(kind is Crash))

    def save(self) -> None:
        stored = {row[:2]: row[2:] for row in rows_of(self._db, """
            select devices.* from (values *) as keys cross join devices on app_id = column1 and device = column2
            """, list(self._seen))}
        self._save_days(stored)
        self.save_versions()
        changed = []
        for key, seen in self._seen.items():
            first_day, last_hour, last_seq = stored.get(key, (MAX_NUMBER, 0, 0))
            if seen.last_hour > last_hour:
                self._count_hour(key[0], last_hour, -1)
                self._count_hour(key[0], seen.last_hour, 1)
            is_of_later_hour = (seen.last_seq >> SEQ_BITS) // HOUR > (last_seq >> SEQ_BITS) // HOUR
            if seen.first_day < first_day or seen.last_hour > last_hour or is_of_later_hour:
                changed.append((*key, min(first_day, seen.first_day), max(last_hour, seen.last_hour),
                                max(last_seq, seen.last_seq)))
        write_rows(self._db, """
            insert into devices values *
            on conflict (app_id, device) do update set first_day = excluded.first_day,
                last_hour = excluded.last_hour, last_seq = excluded.last_seq""", changed)
        for (app_id, column, first, end), count in self._spans.items():  # which many devices have in common
            for day in range(first, end):
                self.sums["active_days"].add(app_id, day, **{column: count})
        super().save()

    def _save_days(self, stored: Mapping[tuple, Sequence[int]]) -> None:
        """Days on which a device was not seen before. Mostly there are none: its last day is in its row."""
        fresh = {key: seen for key, seen in self._seen.items()
                 if key not in stored or seen.first_day < stored[key][0] or seen.days - {stored[key][1] // 24}}
        near = defaultdict(list)  # the days around them, which decide what changes
        for app_id, device, day in rows_of(self._db, """
                select app_id, device, day from (values *) as keys cross join device_days
                    on app_id = column1 and device = column2 and day between column3 and column4
                order by day""", [(*key, seen.first_day - 30, max(*seen.days, seen.first_day, stored[key][0]) + 30)
                      for key, seen in fresh.items() if key in stored]):
            near[app_id, device].append(day)
        rows = []
        for key, seen in fresh.items():
            days, first_day = near[key], stored[key][0] if key in stored else None
            self._count_cohort(key[0], first_day, days, -1)
            for day in sorted(seen.days - set(days)):
                self._count_active(key[0], days, day, 1)
                insort(days, day)
                rows.append((*key, day))
            self._count_cohort(key[0], min(seen.first_day, first_day or MAX_NUMBER), days, 1)
        write_rows(self._db, "insert into device_days values *", rows)

    def _count_active(self, app_id: int, others: list[int], day: int, by: int) -> None:
        """Counts the days that a device is active on because of one day, and not because of its others."""
        at = bisect_left(others, day)
        before, after = others[at - 1] if at else -MAX_NUMBER, others[at] if at < len(others) else MAX_NUMBER
        for column, span in self.ACTIVE.items():
            self._spans[app_id, column, max(day, before + span), min(day + span, after)] += by

    def _count_cohort(self, app_id: int, first_day: int | None, days: Sequence[int], by: int) -> None:
        if first_day is not None:
            self.sums["cohorts"].add(app_id, first_day, devices=by, **{
                column: by for column, later in self.BACK.items() if first_day + later in days})

    def _count_hour(self, app_id: int, hour: int, by: int) -> None:
        if hour >= self._now // HOUR - HOURS_KEPT:
            self.sums["device_hours"].add(app_id, hour, devices=by)

    def save_versions(self) -> None:
        """Writes what is new of devices in releases."""
        seen = {(*key, version): hours for key, device in self._seen.items()
                for version, hours in device.versions.items()}
        stored = {row[:3]: row[3:] for row in rows_of(self._db, f"""
            select app_id, device, app_version, first_hour, coalesce(crash_hour, {MAX_NUMBER}) from (values *) as keys
            cross join device_versions on app_id = column1 and device = column2 and app_version = column3
            """, list(seen))}
        after = {key: _earliest(hours, stored.get(key)) for key, hours in seen.items()}
        changed = {key: hours for key, hours in after.items() if hours != stored.get(key)}
        alike = Counter((key[0], key[2], *hours) for key, hours in changed.items())
        alike.subtract((key[0], key[2], *stored[key]) for key in changed.keys() & stored.keys())
        for each, count in alike.items():
            self._count_version(*each, count)
        write_rows(self._db, """
            insert into device_versions values *
            on conflict (app_id, device, app_version) do update set
                first_hour = excluded.first_hour, crash_hour = excluded.crash_hour
            """, [(*key, first, crash if crash < MAX_NUMBER else None) for key, (first, crash) in changed.items()])

    def _count_version(self, app_id: int, version: str, first: int, crash: int, by: int) -> None:
        has_crashed = crash < MAX_NUMBER
        self._releases.add(app_id, version, devices=by, crashed_devices=by * int(has_crashed))
        self.sums["release_hours"].add(app_id, version, first, devices=by)
        if has_crashed:
            self.sums["release_hours"].add(app_id, version, crash, crashed_devices=by)

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
            self._count_hour(app_id, last_hour, -1)
            left = [day for day, in days]
            self._count_cohort(app_id, first_day, left, -1)
            while left:
                self._count_active(app_id, left[:-1], left.pop(), -1)
            for version, first, crash in versions:
                self._count_version(app_id, version, first, MAX_NUMBER if crash is None else crash, -1)
            for table in ("devices", "device_days", "device_versions"):
                self._db.execute(f"delete from {table} where app_id = ? and device = ?", (app_id, device))
        return len(rows)

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

    @staticmethod
    def last_24_hours(db: sqlite3.Connection, app: int | None, now: int) -> int:
        """Devices that were seen in the last 24 hours, rounded to the full hour."""
        return db.execute(f"select coalesce(sum(devices), 0) from device_hours where {APPS} and hour >= :since",
                          {"app": app, "since": (now - DAY) // HOUR}).fetchone()[0]


@lru_cache(maxsize=4096)
def device_key(device_id_hash: str | None) -> int:
    """The number by which figures know a device: 63 bits of its SHA-256. 0 for none."""
    return int.from_bytes(sha256(device_id_hash)[:8], "big") >> 1 if device_id_hash else 0


class EventNames(Figure):
    """Events by name, type and UTC day, without those that begin or end a session. "" is no name."""

    SUMS = {"event_names": ("name type day", "events")}
    WINDOW = ("event_names", "day", NAME_DAYS)
    COUNTS = (Event,)

    def count(self, kind: type, reports: Sequence[Any], by: int) -> None:
        # Without a line of Python for each event, of which a batch has a hundred.
        columns = [map(attrgetter(name), reports) for name in ("app_id", "name", "type", "at")]
        alike = Counter(zip(*columns[:3], map(DAY.__rfloordiv__, columns[3])))
        for (app_id, name, type, day), count in alike.items():
            if type not in _ENDS and day >= self._today - NAME_DAYS:
                self.sums["event_names"].add(app_id, name or "", type, day, events=by * count)

    @staticmethod
    def most_frequent(db: sqlite3.Connection, app: int | None, days: range, limit: int) -> list[JsonObject]:
        """The most frequent names of these days: `name`, `type`, `count`, and `days` with the events of each day."""
        parameters = {"app": app, "first": days[0], "last": days[-1], "limit": limit}
        found = dict_rows(db, f"""
            select name, type, sum(events) as count from event_names
            where {APPS} and day between :first and :last
            group by name, type
            order by count desc, name, type
            limit :limit""", parameters)
        for row in found:
            counts = dict(db.execute(f"""
                select day, sum(events) from event_names
                where {APPS} and name = :name and type = :type and day between :first and :last
                group by day""", {**parameters, **row}))
            row["days"] = [counts.get(day, 0) for day in days]
        return found


# Releases last: others count in them when they are saved.
FIGURES = (Requests, Crashes, Groups, GroupDevices, Images, Builds, Sessions, Devices, EventNames, Releases)
FIGURE_TABLES = NewNames.TABLES + "".join(figure.tables() for figure in FIGURES)
SCHEMA = REPORT_TABLES + SYMBOL_TABLES + TRIAGE_TABLES + FIGURE_TABLES
# The primary key of each table with rows of an app, beside the reports.
KEYS = {table: tuple(key.split(", ")) for table, key in re.findall(
    r"create table (\w+) \([^;]*?primary key \((app_id, [^)]*)\)", re.sub("--.*", "", SCHEMA))}


class RollUps:
    """All figures in one transaction: reports are counted, and then all changes are saved, once."""

    def __init__(self, db: sqlite3.Connection, now: int, symbols: Symbols | None = None):
        self._db, self._now, self.names, releases = db, now, NewNames(db), Releases(db, now)
        self.figures: dict[type, Any] = {each: each(db, now, releases) for each in FIGURES[:-1]}
        self.figures[Releases] = releases
        self.figures[Groups].symbols = symbols or Symbols(db)

    def count(self, kind: type, reports: Sequence[Any], by: int) -> None:
        """Counts reports of a kind, in the order of their seqs, as Figure.count; by 0, those that have expired."""
        for figure in self.figures.values() if reports else ():
            if kind in figure.COUNTS and by:
                figure.count(kind, reports, by)
            elif kind in figure.COUNTS:
                figure.expire(kind, reports)

    def save(self) -> None:
        """Writes everything that has changed."""
        for figure in self.figures.values():
            figure.save()

    def trim(self) -> int:
        """Once a day: deletes some of the rows whose window is over; how many."""
        self.figures[Sessions].close_days()
        deleted = 0
        for table, column, length in (figure.WINDOW for figure in (NewNames, *FIGURES) if figure.WINDOW[0]):
            rows = self._db.execute(f"""
                select {", ".join(KEYS[table])} from {table}
                where app_id in (select id from apps) and {column} < ? limit ?
                """, (self._now // (HOUR if column == "hour" else DAY) - length, TRIMMED)).fetchall()
            self._db.executemany(
                f"delete from {table} where {' and '.join(f'{each} = ?' for each in KEYS[table])}", rows)
            if table == "group_days":
                self.figures[Groups].drop({(row[0], row[2]) for row in rows}, (self._now // DAY - WEEK) * DAY)
            deleted += len(rows)
        return deleted


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
ROWS = 128  # in a statement


def write_rows(db: sqlite3.Connection, statement: str, rows: Sequence[tuple]) -> None:
    """Runs a statement for all rows, its `values *` standing for their placeholders. In few parts: Python releases
    its lock for each, and under load has to queue for it again. executemany would queue once a row."""
    for _ in _in_parts(db, statement, rows):
        pass


def rows_of(db: sqlite3.Connection, query: str, keys: Sequence[tuple]) -> list[tuple]:
    """The rows of a query for all keys, its `values *` standing for their placeholders."""
    return [row for cursor in _in_parts(db, query, keys) for row in cursor]


def _in_parts(db: sqlite3.Connection, statement: str, rows: Sequence[tuple]) -> Iterator[Any]:
    for start in range(0, len(rows), ROWS):
        part = rows[start:start + ROWS]
        yield db.execute(_with_placeholders(statement, len(part), len(part[0])), list(chain.from_iterable(part)))


@lru_cache(maxsize=STATEMENTS)
def _with_placeholders(statement: str, rows: int, columns: int) -> str:
    row = "(" + ", ".join("?" * columns) + ")"
    return statement.replace("values *", "values " + ", ".join([row] * rows))


def dict_rows(db: sqlite3.Connection, query: str, parameters: Any = ()) -> list[JsonObject]:
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

    has_facts = False  # whether the transaction has noted some
    builds: dict[tuple[Any, ...], int]  # see Builds

    def __init__(self, path: Path, query_only: bool = False, mode: str = "rw"):
        super().__init__(f"{path.as_uri()}?mode={mode}", uri=True, timeout=BUSY_TIMEOUT,
                         isolation_level=None, check_same_thread=False, cached_statements=STATEMENTS)
        self.builds = {}
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

    def lock_rows(self, query: str, parameters: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """The rows of a query that nobody else holds. Nobody else gets them before this transaction ends."""
        return self.execute(query, parameters).fetchall()

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
        if not (self.path.exists() and os.path.samestat(os.stat(self.path), self._file)):
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

    def _write_in_steps(self, step: Callable[[Connection], Any]) -> None:
        """Repeats a step, each time in a transaction of its own, until it returns that nothing was left to do."""
        is_left = True
        while is_left and not self._closed:
            with self.writing_step() as db:
                is_left = step(db)

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
    """Makes the tables, or brings those of version 1 or 2 up to date, in the current transaction. All reports are
    counted again. Where some have expired, a sum is at least what it was. No version between was released."""
    if not version:
        db.run_script(SCHEMA)
        return
    if version > 2:
        raise StoreError(f"schema {version} was never released: export its reports with the backfeedr that made it")
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
    for app_id, group_hash in db.execute("select app_id, group_hash from groups").fetchall():
        Groups(db, 0).show_latest(app_id, group_hash)
    if any(get_state(db, "expired_" + table, -1) >= 0 for table in TABLES.values()):
        for table, source in _SUMS_OF_2.items():
            columns = [column[0] for column in db.execute(f"select * from {table} limit 0").description]
            key, sums = columns[:len(KEYS[table])], columns[len(KEYS[table]):]
            db.execute(f"""
                insert into {table} select app_id, {source} where app_id > 0
                on conflict ({", ".join(key)}) do update set
                    {", ".join(f"{each} = max({table}.{each}, excluded.{each})" for each in sums)}""")
            db.execute(f"delete from {table} where {' + '.join(sums)} = 0")
        db.execute("""
            insert into releases select app_id, app_version, first_seen, last_seen from old_releases where app_id > 0
            on conflict (app_id, app_version) do update set first_seen = min(releases.first_seen, excluded.first_seen)
            """)
    db.run_script("".join(f"drop table old_{table};\n" for table in old)
                  + "drop table group_hours;\ndelete from state where name = 'recent_since';\n"
                  # Names are made canonical now.
                  + "insert into regroupings select app_id, group_hash, 0, 0, '' from groups")


def recount(db: sqlite3.Connection) -> None:
    """Counts all reports again, into empty tables."""
    newest = [db.execute(f"select coalesce(max(received_at), 0) from {table}").fetchone()[0]
              for table in TABLES.values()]
    now = max(*newest, (get_state(db, "trimmed_day", -1) + 1) * DAY)  # of the windows
    for kind, table in TABLES.items():
        after = -1
        while page := counted_rows(db, kind, f"from {table} where seq > ? order by seq limit 1000", (after,)):
            rollups = RollUps(db, now)
            rollups.count(kind, page, 1)
            rollups.save()
            after = page[-1].seq


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
                db.execute("""
                    insert into secrets values ('admin_token', ?)
                    on conflict (name) do update set hash = excluded.hash""", (sha256(auth_token),))
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
            db.execute("delete from secrets where name = 'feed_token'")
            if make:
                db.execute("insert into secrets values ('feed_token', ?)", (sha256(token),))
        return token

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

    def app_of_key(self, key_hash: bytes) -> str:
        """The name of the app of the key with this SHA-256; "" where there is none."""
        with self.reading() as db:
            row = db.execute("select name from keys join apps on apps.id = app_id where key_hash = ?",
                             (key_hash,)).fetchone()
        return row[0] if row else ""

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
        self.facts_noted = threading.Event()
        self.regrouping: threading.Thread | None = None

    @property
    def waiting(self) -> list[Submission]:
        group = self.group
        return group.submissions if group else []


class Commit:
    """The reports of one transaction."""

    def __init__(self, db: Connection, now: int):
        self._db, self._now, self._symbols = db, now, Symbols(db)
        self._marks: list[tuple[Any, ...]] = []  # rows of `replays`
        self._uses: Counter[tuple[int, str]] = Counter()  # of keys, by app and key
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
            self._uses[app_id, key_name(each.key_hash)] += 1
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
            self._db.append(table, (*ours, *kind._fields),
                            [(*row, *report) for row, report in zip(zip(*ours.values()), reports)])
            found = counted(kind, app_id, seqs, received, ahead, flags, reports)
            rollups.count(kind, found, 1)
            stored[table] += len(found)
            crashes += found if kind is Crash and self._uses else []  # imports are none
        write_rows(self._db, "insert into replays values *", self._marks)
        for (app_id, key), uses in self._uses.items():
            rollups.figures[Requests].add(app_id, key, uses)
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
                has_facts, db.has_facts = db.has_facts, False
            here.group_sizes.add(len(group.submissions))
            here.commit_seconds.add(time.monotonic() - began)
            here.stored.update(stored)
            self._trouble = self._logged = ""
            if has_facts:
                here.facts_noted.set()

    @property
    def facts_noted(self) -> threading.Event:
        """Set by a commit of this process that has noted facts."""
        event: threading.Event = self._here.facts_noted
        return event

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
    def _drop_pages(db: Connection, uuid: str) -> int:
        """A step of deleting symbols; how many rows. None of them is looked up from the first step on: the page before
        a deleted one would answer for it. The build goes last, so that an interrupted deletion can go on."""
        db.execute("update symbols set received = 0, size = 0, rows = 0 where uuid = ?", (uuid,))
        deleted = db.execute("delete from symbol_parts where uuid = ?", (uuid,)).rowcount
        deleted += db.execute("""
            delete from symbol_pages where (uuid, first) in (
                select uuid, first from symbol_pages where uuid = ? order by first limit ?)
            """, (uuid, SYMBOL_PAGES)).rowcount
        return deleted or db.execute("delete from symbols where uuid = ?", (uuid,)).rowcount

    def _expire_symbols(self, db: Connection) -> int:
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
        return self._drop_pages(db, row[0]) if row else 0

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

    def regroup(self) -> None:
        """Moves all crashes to the groups that their names give now. Where it ends early, commits go on."""
        with suppress(StorageUnavailable):
            self._write_in_steps(self._regroup)

    def regroup_in_background(self) -> None:
        """As `regroup`, in a thread of its own, of which a process has one."""
        here = self._here
        if here.regrouping is None or not here.regrouping.is_alive():
            here.regrouping = threading.Thread(target=self.regroup, name="backfeedr regroup", daemon=True)
            here.regrouping.start()

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
        with closing(db.execute("""
                select received_at, seq, exception_type, images, stack_trace, extra from crashes
                where app_id = ? and group_hash = ? and (received_at, seq) > (?, ?) and group_hash <> ?
                order by received_at, seq
                limit ?""", (app_id, group, received_at, seq, OTHER, REGROUPED))) as rows:
            for *at, exception_type, images, trace, extra in rows:
                key = exception_type, trace, extra and "truncated" in extra
                places[key] = place = places.get(key) or self._place(symbols, group, exception_type, trace, extra)
                moved += [(*place, at[1])] if place != (group, images) else []
                looked += 1
                if time.monotonic() > deadline:
                    break
        if moved:
            target = self._move(db, symbols, app_id, group, moved, is_first=not received_at) or target
        is_cut_off = looked == REGROUPED or looked and time.monotonic() > deadline
        if is_cut_off and db.execute("select 1 from crashes where app_id = ? and group_hash = ? limit 1",
                                     (app_id, group)).fetchone():
            db.execute("""
                update regroupings set received_at = ?, seq = ?, target = ? where app_id = ? and group_hash = ?
                """, (*at, target, app_id, group))
            return looked
        db.execute("delete from regroupings where app_id = ? and group_hash = ?", (app_id, group))
        if target:
            Groups(db, self.now).leave(app_id, group, target)
        return looked + 1

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
        seqs = [(seq,) for *_, seq in moved]
        source = "from (values *) as keys cross join crashes on seq = column1"
        rollups, before = RollUps(db, self.now, symbols), counted_rows(db, Crash, source, seqs)
        db.executemany("update crashes set group_hash = ?, images = ? where seq = ?", moved)
        traces = dict(rows_of(db, "select seq, stack_trace " + source, seqs))
        after = [each._replace(stack_trace=traces[each.seq]) for each in counted_rows(db, Crash, source, seqs)]
        rollups.figures[Groups].move(before, after)
        for figure in (rollups.figures[each] for each in (GroupDevices, Images)):
            figure.count(Crash, before, -1)
            figure.count(Crash, after, 1)
        rollups.save()
        see_moved(db, self.now, after)
        if is_first:
            db.execute("""
                update groups set (first_seen, first_version) = (
                    select first_seen, first_version from groups where app_id = :app and group_hash = :group)
                where app_id = :app and group_hash = :target and first_seen > (
                    select first_seen from groups where app_id = :app and group_hash = :group)
                """, {"app": app_id, "group": group, "target": moved[0][0]})
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
                        not exists (select 1 from state where name = 'trimmed_day' and value = :today)
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
        deleted["replays"] = db.execute("""
            delete from replays where (app_id, mark) in (
                select app_id, mark from replays where received_at < ? limit ?)
            """, (self.now - REPLAY_DAYS * DAY, PRUNE_STEP)).rowcount
        while reports := self._delete_oldest(db, size):
            deleted += reports
            size = min(2 * size, PRUNE_STEP)
            if time.monotonic() > deadline:
                break
        deleted["moved"] = self._regroup(db)
        if get_state(db, "trimmed_day", 0) != self.now // DAY:
            deleted["sums"] = RollUps(db, self.now).trim()
            deleted["symbols"] = self._expire_symbols(db)
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
        return deleted or self._delete_early(db, size)

    def _delete_early(self, db: Connection, size: int) -> Counter[str]:
        """Where the database is too large, deletes some of the oldest reports of the app that holds most."""
        deleted: Counter[str] = Counter()
        if not 0 < self.max_db_size < self.used(db):
            return deleted
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
        reports, rollups = counted_rows(db, kind, source, parameters), RollUps(db, self.now)
        write_rows(db, f"delete from {TABLES[kind]} where seq in (values *)", [(each.seq,) for each in reports])
        rollups.count(kind, reports, by)
        rollups.save()
        return [each.seq for each in reports]

    def prune(self, progress: Callable[[int], Any] = lambda rows: None) -> Counter[str]:
        """Deletes all rows whose time is over, and gives their space back to the disk; how many rows of each table. In
        steps, with longer pauses between them, so that no reports wait for it."""
        deleted: Counter[str] = Counter()

        def step(db: Connection) -> Counter[str]:
            rows = self._expire(db)
            deleted.update(rows)
            progress(sum(deleted.values()))
            return rows

        self._write_in_steps(step)
        self._shrink()
        return deleted

    def forget_device(self, device_id_hash: str) -> Counter[str]:
        """Deletes all that is kept of a device, in all apps, and takes it out of every sum; how many rows of each
        table. `first_seen` of groups and releases stays as it is."""
        deleted: Counter[str] = Counter()
        last = {kind: self._last_seq(kind) for kind in TABLES}
        for kind, table in TABLES.items():
            for page in self._pages(table, ("seq",), "device_id_hash", device_id_hash, EXPIRE_SLICE):
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
        self._fold_in_wal()
        return +deleted

    def _pages(self, table: str, key: Sequence[str], column: str, value: Any,
               size: int) -> Iterator[list[tuple[Any, ...]]]:
        """The keys of the rows with a value, so many at a time: a single long read would hold up the WAL."""
        columns, after, page = ", ".join(key), "", [()]
        while page:
            with self.reading() as db:
                page = db.execute(f"""
                    select {columns} from {table} where {column} = ? {after} order by {columns} limit ?
                    """, (value, *page[-1], size)).fetchall()
            after = f"and ({columns}) > ({', '.join('?' * len(key))})"
            yield page

    def delete_app(self, name: str) -> None:
        """Deletes an app, its keys and all that it sent. Raises StoreError where there is none. In steps, so that no
        reports of others wait for it. The keys go first and the app last, so that it can be repeated if it is
        interrupted."""
        with self.writing() as db:
            app_id = self._app(db, name)[0]
            db.execute("delete from keys where app_id = ?", (app_id,))
        for table, key in {**dict.fromkeys(TABLES.values(), ("seq",)), **KEYS}.items():
            for page in self._pages(table, key, "app_id", app_id, PRUNE_STEP):
                with self.writing_step() as db:
                    write_rows(db, f"delete from {table} where ({', '.join(key)}) in (values *)", page)
        with self.writing() as db:
            db.executemany("delete from state where name = ?", [(f"early_{app_id}",), (f"worse_{app_id}",)])
            for table, column in (("messages", "channel_id"), ("channels", "id")):
                db.execute(f"delete from {table} where {column} in (select id from channels where app_id = ?)",
                           (app_id,))
            for id, body in db.execute("select id, body from messages where due_at is not null").fetchall():
                if all(fact.get("app") == name for fact in json.loads(body)["data"]["facts"]):
                    db.execute("delete from messages where id = ?", (id,))
            db.execute("delete from facts where app_id = ?", (app_id,))
            db.execute("delete from apps where id = ?", (app_id,))


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
# Facts on their way to channels. The facts of a minute become a message of each channel that wants them. A message is
# taken in a short transaction, sent in none, and noted in another: whatever ends between these, it comes again, under
# the same id. A kind of channel is a function from a message to an HTTP request; CHANNELS has them by scheme.

GATHERED = 60 * SECOND  # for which the facts of a channel become one message
LISTED = 10  # facts in a message; it counts the others
TEXT_BYTES = 1800  # of their lines: Discord takes 2,000 characters, ntfy 4,096 bytes
CUT = 200  # characters of a line that alone is longer
HOURLY = 30  # messages of a channel; what is beyond goes with a later one
# Between the tries of a message: the schedule of Standard Webhooks.
PAUSES = [SECOND * each for each in (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)]
TRY_SECONDS = 15.0  # for a try
TAKEN = 60 * SECOND  # for which nobody else sends a message: longer than a try
LONGEST_WAIT, SHORTEST_WAIT = 60.0, 1.0  # seconds between two looks at what is due
FACT_WORDS = {  # what a message calls them, and their priority at ntfy
    "crash.new": ("new", 3), "crash.regressed": ("regressed", 4), "crash.unmuted": ("no longer muted", 3),
    "crash.spread": ("spreading", 4), "release.worse": ("worse", 4), "digest": ("digest", 2), "test": ("test", 3)}
# What a message has of a fact. Nothing else leaves the host, whatever is in `detail`.
_TOLD = ("exception_type", "place", "app_version", "build_number", "crashes", "devices", "fixed_in", "before")


class Undelivered(StoreError):
    """A try that failed. `str()` says why, without the address, which may be secret; `pause` is what the receiver asks
    for, in milliseconds, `is_gone` whether it wants nothing more, and `is_refused` whether it is about the message, so
    that another one may get through."""

    def __init__(self, text: str, pause: int = 0, is_gone: bool = False, is_refused: bool = False):
        super().__init__(text)
        self.pause, self.is_gone, self.is_refused = pause, is_gone, is_refused


class Message(NamedTuple):
    """A message that is being sent; `body` is JSON, and `tries` counts this one."""

    id: str
    channel_id: int
    body: str
    tries: int


Post = tuple[str, bytes, dict[str, str]]  # a request: its address, body and headers


def _webhook(channel: JsonObject, message: Message, now: int) -> Post:
    """As https://www.standardwebhooks.com has it."""
    timestamp, key = str(now // SECOND), base64.b64decode(channel["secret"][len("whsec_"):])
    mark = hmac.new(key, f"{message.id}.{timestamp}.{message.body}".encode(), hashlib.sha256).digest()
    return channel["url"], message.body.encode(), {
        "webhook-id": message.id, "webhook-timestamp": timestamp,
        "webhook-signature": "v1," + base64.b64encode(mark).decode()}


def _slack(channel: JsonObject, message: Message, now: int) -> Post:
    """For Slack, Mattermost, and Discord at an address that ends with /slack. What a report says is no markup there,
    and calls nobody."""
    text = "\n".join(message_lines(message, harmless=_unmarked))
    return channel["url"].partition("+")[2], _encode({"text": text}).encode(), {}


def _unmarked(text: str) -> str:
    """What a chat shows as this text, and no more."""
    for mark, instead in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("@", "@\u200b"), ("](", "]\u200b(")):
        text = text.replace(mark, instead)
    return text


def _ntfy(channel: JsonObject, message: Message, now: int) -> Post:
    """As JSON: a header could not carry every title."""
    url, _, topic = channel["url"].partition("+")[2].rpartition("/")
    data, (title, *lines) = json.loads(message.body)["data"], message_lines(message, False)
    told = {"topic": topic, "title": title, "message": "\n".join(lines), "click": data.get("url"),
            "priority": max(FACT_WORDS[each["type"]][1] for each in data["facts"])}
    return url + "/", _encode({name: value for name, value in told.items() if value}).encode(), {}


CHANNELS: dict[str, Callable[[JsonObject, Message, int], Post]] = {
    "https": _webhook, "http": _webhook, "slack+https": _slack, "slack+http": _slack, "ntfy+https": _ntfy,
    "ntfy+http": _ntfy}


def message_lines(message: Message, with_links: bool = True, harmless: Callable[[str], str] = str) -> list[str]:
    """The title of a message, a line for each fact as far as they fit, and how many more there are: what `harmless`
    makes of them, which may be longer. A line that could never fit is cut."""
    data = json.loads(message.body)["data"]

    def line(fact: JsonObject, longest: int | None = None) -> str:
        return harmless(f"{fact['text'][:longest]} {fact.get('url', '') if with_links else ''}".rstrip())

    lines = [line(each, None if len(line(each).encode()) < TEXT_BYTES else CUT) for each in data["facts"]]
    shown = sum(size <= TEXT_BYTES for size in accumulate(len(line.encode()) + 1 for line in lines))
    more = data["more"] + len(lines) - shown
    return [harmless(data["title"]), *lines[:shown], *([f"and {more:,} more"] if more else [])]


def post(url: str, body: bytes, headers: Mapping[str, str]) -> None:
    """Sends a request. Raises Undelivered unless its answer is a 2xx; a redirect is none."""
    parts = urlsplit(url)
    headers = {"Content-Type": "application/json", "User-Agent": f"backfeedr/{__version__}", **headers}
    if parts.username is not None:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = "Basic " + base64.b64encode(user.encode()).decode()
    connect = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = connect(parts.hostname or "", parts.port, timeout=TRY_SECONDS)

    def hang_up() -> None:
        with suppress(OSError, TypeError):  # where it has no socket
            socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)

    late, began = threading.Timer(TRY_SECONDS, hang_up), time.monotonic()  # a socket's timeout begins anew each byte
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
        raise Undelivered(f"it answered {answer.status}", _pause(answer.headers.get("Retry-After", "")),
                          answer.status == 410, 400 <= answer.status < 500 and answer.status not in (408, 429))


def _pause(retry_after: str) -> int:
    """Milliseconds of a Retry-After in seconds or as a date, at most a day; 0 for none."""
    pause = int(retry_after) if re.fullmatch("[0-9]{1,9}", retry_after) else 0
    with suppress(ValueError, TypeError, OverflowError):  # it is no date
        pause = pause or int(parsedate_to_datetime(retry_after).timestamp() - time.time())
    return min(max(0, pause * SECOND), DAY)


def _apprise(url: str) -> Any:
    """What sends to one of the many other kinds of address. Raises Undelivered."""
    try:
        import apprise  # type: ignore[import-not-found]
    except ImportError:
        raise Undelivered("only https://, slack+https:// and ntfy+https:// go without Apprise:"
                          " pip install 'backfeedr[alerts]' or apprise") from None
    logging.getLogger("apprise").setLevel(logging.CRITICAL)  # it logs addresses
    sender = apprise.Apprise()
    if not sender.add(url):
        raise Undelivered("that is no address that Apprise knows")
    return sender


def check_address(url: str) -> str:
    """The scheme of a channel's address. Raises StoreError where there is no sending to it."""
    with suppress(ValueError):
        parts = urlsplit(url)
        is_ours = parts.scheme in CHANNELS
        has_topic = "ntfy" not in parts.scheme or re.fullmatch(r"(/.*)?/[\w-]{1,64}", parts.path + parts.query)
        if re.fullmatch("[!-~]+", url) and parts.netloc and (not is_ours or (
                parts.hostname and parts.port != 0 and not parts.fragment and has_topic)):
            if not is_ours:
                _apprise(url)
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
    """The channels, and what is on its way to them. `digest` gives the lines of an app's daily digest, or that of all
    live apps for None, from a time until another."""

    def __init__(self, store: Store, public_url: str, digest: Callable[[str | None, int, int], list[str]]):
        self._store, self._url, self._digest = store, public_url.rstrip("/"), digest
        self._stopping = threading.Event()

    # Channels

    def add(self, url: str, app: str | None = None, kinds: Sequence[str] = (), with_reason: bool = False,
            hour: int = 7) -> tuple[int, str]:
        """A new channel: its id, and the secret that signs its messages, "" where it has none. Raises StoreError.
        Without an app, it is of all live ones; without kinds of facts, of those in FACT_KINDS that are on. A digest
        comes at this hour, UTC."""
        kinds = list(dict.fromkeys(kinds)) or [kind for kind, is_on in FACT_KINDS.items() if is_on]
        if unknown := [kind for kind in kinds if kind not in FACT_KINDS]:
            raise StoreError(f"there is no fact {unknown[0]!r}; there are {', '.join(FACT_KINDS)}")
        is_signed = check_address(url) in ("https", "http")
        secret = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode() if is_signed else ""
        now, at_hour = self._store.now, hour * HOUR
        digest_at = now - (now - at_hour) % DAY + DAY if "digest" in kinds else None
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
            found = dict_rows(db, "select * from channels where id = ?", (id,))
        if not found:
            raise StoreError(f"there is no channel {id}: see 'alert list'")
        body = self._body("test", "backfeedr: a test", [{"type": "test", "text": f"This is a test of channel {id}."}])
        if error := self._try(found[0], Message(_message_id(), id, body, 1)):
            raise StoreError(f"channel {id}: {error}")

    # Messages

    def _body(self, kind: str, title: str, facts: Sequence[JsonObject], more: int = 0) -> str:
        link = facts[0].get("url") if len(facts) == 1 else self._url and self._url + "/crashes"
        return _encode({"type": kind, "timestamp": iso_time(self._store.now), "data": {
            "title": title, "facts": facts, "more": more, **({"url": link} if link else {})}})

    def _insert(self, db: Connection, channel_id: int, body: str) -> None:
        db.execute("insert into messages (id, channel_id, created_at, body, due_at) values (?, ?, ?, ?, ?)",
                   (_message_id(), channel_id, self._store.now, body, self._store.now))

    _DUE = """
        select * from channels
        where ended_at is null
            and exists (select 1 from facts where id > last_fact and at not between :since and :now)
            and (
                select count(*) from messages
                where channel_id = channels.id and (created_at > :hour or due_at is not null)) < :most
        order by id"""

    def _gather(self) -> None:
        """Makes messages of the facts that have waited for a minute, and of the digests whose hour has come."""
        now = self._store.now
        bounds = {"since": now - GATHERED + 1, "now": now, "hour": now - HOUR, "most": HOURLY}
        with self._store.reading() as db:
            is_due = db.execute(self._DUE, bounds).fetchone()
            digests = dict_rows(db, """
                select channels.*, name from channels left join apps on apps.id = app_id
                where ended_at is null and digest_at <= ?""", (now,))
        bodies = []
        for each in digests:  # from where the one before it ended, until its hour: each moment is in one
            later = each["digest_at"] + DAY * (1 + (now - each["digest_at"]) // DAY)
            bodies.append((each, later, self._digest_body(each["name"], each["digest_at"] - DAY, later - DAY)))
        if is_due or bodies:
            with self._store.writing() as db:  # which has all facts with lower ids before it, on any engine
                for channel in dict_rows(db, self._DUE, bounds):
                    self._gather_for(db, channel)
                for channel, later, body in bodies:
                    if db.execute("update channels set digest_at = ? where id = ? and digest_at = ?",
                                  (later, channel["id"], channel["digest_at"])).rowcount:
                        self._insert(db, channel["id"], body)
                db.execute("delete from messages where due_at is null and created_at <= ?", (now - HOUR,))
                db.execute("""
                    delete from facts where id <= (select min(last_fact) from channels where ended_at is null)""")

    def _digest_body(self, app: str | None, since: int, until: int) -> str:
        facts = [{"type": "digest", "text": line} for line in self._digest(app, since, until)]
        return self._body("digest", f"backfeedr: the last day of {app or 'all apps'}", facts)

    def _gather_for(self, db: Connection, channel: JsonObject) -> None:
        """Makes a message of a channel's facts, unless the first is not a minute old."""
        wanted, now = """
            from facts join apps on apps.id = facts.app_id
            where facts.id > :last_fact and (app_id = :app_id or :app_id is null and is_test = 0)
                and instr(',' || :kinds || ',', ',' || kind || ',')""", self._store.now
        counts = db.execute(f"""
            select kind, count(*), min(facts.id), min(at) {wanted} group by kind order by min(facts.id)
            """, channel).fetchall()
        last, = db.execute("select max(id) from facts").fetchone()
        if counts and now - GATHERED < min(row[3] for row in counts) <= now:
            last, counts = counts[0][2] - 1, []
        db.execute("update channels set last_fact = ? where id = ?", (last, channel["id"]))
        if counts:
            rows = db.execute(f"""
                select kind, at, app_id, name, group_hash, detail {wanted} order by facts.id limit :most
                """, {**channel, "most": LISTED}).fetchall()
            facts = [self._fact(db, channel["with_reason"], *row) for row in rows]
            title = "backfeedr: " + ", ".join(f"{row[1]:,} {FACT_WORDS[row[0]][0]}" for row in counts)
            self._insert(db, channel["id"], self._body(
                facts[0]["type"], title, facts, sum(row[1] for row in counts) - len(facts)))

    def _fact(self, db: Connection, with_reason: bool, kind: str, at: int, app_id: int, app: str,
              group_hash: str | None, detail: str) -> JsonObject:
        """What a message says of a fact."""
        given = json.loads(detail)
        fact = {"type": kind, "at": iso_time(at), "app": app, **({"group_hash": group_hash} if group_hash else {}),
                **{name: given[name] for name in _TOLD if given.get(name) is not None},
                "text": _fact_text(kind, app, given)}
        if self._url:
            page = "/crashes/" + group_hash if group_hash else "/releases"
            fact["url"] = f"{self._url}{page}?{urlencode({'app': app})}"
        if with_reason and group_hash:
            row = db.execute("select exception_reason from groups where app_id = ? and group_hash = ?",
                             (app_id, group_hash)).fetchone()
            if row and row[0]:
                fact["reason"] = _one_line(row[0])
                fact["text"] += ": " + fact["reason"]
        return fact

    # Delivery

    def deliver(self) -> Counter:
        """Sends what is due, each message once; how many were `sent`, and of how many the try `failed`."""
        done: Counter = Counter(sent=0, failed=0)
        self._gather()
        while not self._stopping.is_set() and (taken := self._take()):
            done["failed" if self._try(*taken) else "sent"] += 1
        return done

    def _take(self) -> tuple[JsonObject, Message] | None:
        """A message that is due and its channel. Nobody else gets it for some time."""
        now = {"now": self._store.now, "until": self._store.now + TAKEN}
        due = "from messages where due_at <= :now and taken_until <= :now"
        with self._store.reading() as db:
            if not db.execute(f"select 1 {due} limit 1", now).fetchone():
                return None
        with self._store.writing(shared=True) as db:
            rows = db.lock_rows(f"select id, channel_id, body, tries + 1 {due} order by due_at, created_at, id limit 1",
                                now)
            if not rows:
                return None
            message = Message(*rows[0])
            db.execute("update messages set tries = :tries, taken_until = :until where id = :id",
                       {**now, "id": message.id, "tries": message.tries})
            return dict_rows(db, "select * from channels where id = ?", (message.channel_id,))[0], message

    def _try(self, channel: JsonObject, message: Message) -> str:
        """Sends a message and notes what came of it. Returns what is wrong, or ""."""
        error = None
        try:
            self._send(channel, message)
        except Undelivered as failed:
            error = failed
        except Exception as unexpected:  # one channel must not hold up the others; its text may have the address
            log.error("cannot send to channel %d: %s", channel["id"], type(unexpected).__name__)
            error = Undelivered(type(unexpected).__name__, is_refused=True)
        if not self._stopping.is_set():  # else it comes again after the next start
            self._note(message, error)
        return str(error or "")

    def _send(self, channel: JsonObject, message: Message) -> None:
        scheme = urlsplit(channel["url"]).scheme
        if scheme in CHANNELS:
            return post(*CHANNELS[scheme](channel, message, self._store.now))
        title, *lines = message_lines(message)
        if not _apprise(channel["url"]).notify(title=title, body="\n".join(lines)):
            raise Undelivered("Apprise could not send it")

    def _note(self, message: Message, error: Undelivered | None) -> None:
        """When a message gets through, what else waits for its channel is due. When not, the channel's others wait
        until its next try, and those that were tried no longer than a message is. A message that is refused holds up
        none, and waits for its own time whatever gets through: it is as if taken until then."""
        now = self._store.now
        pause = PAUSES[message.tries - 1] if message.tries <= len(PAUSES) else None
        values = {"id": message.id, "channel": message.channel_id, "now": now, "tries": message.tries,
                  "error": str(error), "is_gone": bool(error and error.is_gone),
                  "is_refused": bool(error and error.is_refused)}
        values["next"] = now + max(pause or PAUSES[0], error.pause if error else 0)
        values.update(retry=values["next"] if pause else None, oldest=now - sum(PAUSES))
        steps = ["update channels set error = null, error_at = null, sent_at = :now where id = :channel",
                 "update messages set due_at = null where id = :id",
                 "update messages set due_at = :now where channel_id = :channel and due_at > :now"]
        if error:
            steps = ["""
                update channels set error = :error, error_at = :now,
                    ended_at = case when :is_gone = 1 then coalesce(ended_at, :now) else ended_at end
                where id = :channel""",
                     """
                update messages set due_at = :retry, taken_until = case when :is_refused = 1 then :next else 0 end
                where id = :id and tries = :tries""",
                     """
                update messages set due_at = :next - 1
                where channel_id = :channel and due_at <= :now and :is_refused = 0""", """
                update messages set due_at = null
                where channel_id = :channel and created_at < :oldest and tries > 0""",
                     "delete from messages where channel_id = :channel and :is_gone = 1"]
        with self._store.writing(shared=True) as db:
            for step in steps:  # the channel first, so that two hosts do not wait for each other
                db.execute(step, values)

    def _seconds_to_next(self) -> float:
        """Until something is due."""
        with self._store.reading() as db:
            at, = db.execute("""
                select min(at) from (
                    select due_at as at from messages where taken_until <= :now
                    union all select taken_until from messages where taken_until > :now and due_at is not null
                    union all select digest_at from channels where ended_at is null
                    union all select min(facts.at) + :gathered from facts
                        where id > (select min(last_fact) from channels where ended_at is null)) as times
                """, {"now": self._store.now, "gathered": GATHERED}).fetchone()
        seconds = LONGEST_WAIT if at is None else (at - self._store.now) / SECOND
        return min(max(seconds, SHORTEST_WAIT), LONGEST_WAIT)

    def _run(self) -> None:
        noted = self._store.facts_noted
        while not self._stopping.is_set():
            noted.clear()
            wait = LONGEST_WAIT
            try:
                self.deliver()
                wait = 0 if self._stopping.is_set() else self._seconds_to_next()
            except StorageUnavailable:
                pass  # the store has said why
            except Exception:
                log.exception("unexpected error")
            noted.wait(wait)
            self._stopping.wait(SHORTEST_WAIT)

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
            self._store.facts_noted.set()
            thread.join(timeout=1)


def _message_id() -> str:
    return "msg_" + secrets.token_hex(12)


def _one_line(text: Any) -> str:
    """At most 200 characters of what a report says."""
    return " ".join(str(text).split())[:200]


def _fact_text(kind: str, app: str, given: JsonObject) -> str:
    version = " ".join(filter(None, (app, given.get("app_version"), given.get("build_number") and
                                     f"({given['build_number']})")))
    if kind == "release.worse":
        return _one_line(f"{version} is {given.get('text') or 'worse'}")
    what = given.get("exception_type", "a crash") + (f" in {given['place']}" if given.get("place") else "")
    counts = [f"{given[name]:,} {name[:-len(end)] if given[name] == 1 else name}"
              for name, end in (("crashes", "es"), ("devices", "s")) if given.get(name)]
    parts = [f"fixed in {given['fixed_in']}"] if given.get("fixed_in") else []
    return f"{FACT_WORDS[kind][0].capitalize()}: {_one_line(what)} ({_one_line(', '.join([version, *parts, *counts]))})"


# == Metrics ===================================================================
# The questions asked of the store. Public questions read figures only: an answer costs what it shows, not what is
# stored. Windows are UTC days; without an app, an answer is the sum over the live apps.

ADOPTION_DAYS = 7  # of whose sessions a release has its share
SCANNED = 20_000  # events that are looked at for a page: a page may be short, and another one follow
REPORTS = 20  # of a group that are shown at once
MAX_VERSIONS = 100  # of a group that a list has
MISSING_BUILDS = 100  # whose symbols are asked for
# Groups that are weighed for the overview: so many of most crashes, and of the others of most devices. And those that
# it shows of a kind.
CANDIDATES, SHOWN_GROUPS = 20, 5
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

    def daily_crashes(self, app: str | None = None, days: int | None = None) -> JsonObject:
        """Crashes per UTC day: the seven that end today from Monday to Sunday, or `days` of them by date."""
        shown = self._last_days(days or WEEK)
        with self._snapshot(app) as (db, app_id):
            crashes = per_day(db, "crash_days", ["crashes"], app_id, shown)["crashes"]
        if days:
            return {"labels": _dates(shown), "data": crashes}
        monday = -(shown[0] + 3) % WEEK  # 1970 began on a Thursday
        return {"labels": list(_WEEKDAYS), "data": crashes[monday:] + crashes[:monday]}

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
            crashes = sum(per_day(db, "crash_days", ["crashes"], app_id, week)["crashes"])
            sessions = sum(per_day(db, "session_days", ["sessions"], app_id, week)["sessions"])
            return {"crash_free_rate_7d": crash_free_rate(crashes, sessions),
                    "dau": Devices.last_24_hours(db, app_id, self._store.now),
                    "sessions_7d": sessions, "crashes_7d": crashes,
                    "top_crashes": Groups.most_frequent(db, app_id, week)}

    def active_devices(self, app: str | None = None, days: int | None = None) -> JsonObject:
        """Per UTC day, the devices of that day, of the 7 and of the 30 days that end with it."""
        shown = self._last_days(days or 30)
        with self._snapshot(app) as (db, app_id):
            return {"labels": _dates(shown), **per_day(db, "active_days", list(Devices.ACTIVE), app_id, shown)}

    def sessions(self, app: str | None = None, days: int | None = None) -> JsonObject:
        """Per UTC day, the sessions that began on it; and of those that ended, how long they took. The median is of
        durations in two significant digits. It is null where none has ended, and where those of several apps have."""
        shown = self._last_days(days or 30)
        with self._snapshot(app) as (db, app_id):
            return {"labels": _dates(shown), **Sessions.per_day(db, app_id, shown)}

    def event_names(self, app: str | None = None, days: int | None = None) -> JsonObject:
        """The 50 most frequent names of events, with their events per UTC day."""
        shown = self._last_days(days or 30)
        with self._snapshot(app) as (db, app_id):
            return {"labels": _dates(shown), "events": EventNames.most_frequent(db, app_id, shown, 50)}

    def retention(self, app: str | None = None, days: int | None = None) -> JsonObject:
        """Of the devices first seen on a UTC day, the percentage seen again 1, 7 and 30 days later: null where that
        day is not over yet, or no device is new."""
        shown = self._last_days(days or 30)
        with self._snapshot(app) as (db, app_id):
            cohorts = per_day(db, "cohorts", ["devices", *Devices.BACK], app_id, shown)
        answer = {"labels": _dates(shown), "devices": cohorts["devices"]}
        for column, later in Devices.BACK.items():
            answer[f"day_{later}"] = [
                round(100 * back / new, 2) if new and day + later < shown[-1] else None
                for day, new, back in zip(shown, cohorts["devices"], cohorts[column])]
        return answer

    def releases(self, app: str | None = None, sort: str | None = None) -> JsonObject:
        """What is known of each version of an app: the latest 100, in the order in which they were first seen, or if
        `sort` is "version", in that of their versions, the highest first. null: of no session or device; as a verdict,
        of no release before it."""
        if sort not in (None, "version", "first_seen"):
            raise Refusal("invalid sort")
        with self._snapshot(app) as (db, app_id):
            rows = Releases.latest(db, app_id, self._last_days(ADOPTION_DAYS))
            verdicts = self._verdicts(db, app_id, {(row["app_id"], row["app_version"]) for row in rows})
        if sort == "version":
            rows.sort(key=lambda row: version_key(row["app_version"]), reverse=True)
        return {"releases": list(fitting({
            "app": row["app"], "app_version": row["app_version"], "sessions": row["sessions"],
            "crashes": row["crashes"], "crashed_sessions": row["crashed_sessions"],
            "crash_free_sessions": crash_free_rate(row["crashed_sessions"] or row["crashes"], row["sessions"])
            if row["sessions"] else None, "by": "session" if row["crashed_sessions"] else "count",
            "crash_free_devices": crash_free_rate(row["crashed_devices"], row["devices"]) if row["devices"] else None,
            "adoption": round(100 * (row["recent"] or 0) / row["of_all"], 2) if row["of_all"] else 0.0,
            "first_seen": iso_time(row["first_seen"]), "last_seen": iso_time(row["last_seen"]),
            "verdict": verdicts.get((row["app_id"], row["app_version"]))} for row in rows))}

    def _verdicts(self, db: Connection, app_id: int | None, releases: Container[tuple]) -> dict[tuple, JsonObject]:
        """The verdicts of these releases, by app id and version; of those that have one."""
        pairs = [pair for pair in Releases.pairs(db, app_id) if pair[:2] in releases]
        return {pair[:2]: {**said, "before": pair.before}
                for pair, both in Releases.healths(db, pairs, self._store.now).items() if (said := verdict(*both))}

    def newest_releases(self, app: str | None = None) -> list[JsonObject]:
        """The newest release of each app with its verdict, those that are worse first. An old version that comes late
        is not the newest."""
        with self._snapshot(app) as (db, app_id):
            newest = Releases.newest(db, app_id, self._last_days(ADOPTION_DAYS)[0])
            verdicts = self._verdicts(db, app_id, set(newest.items()))
            names = dict(db.execute("select id, name from apps"))
        rows = [{"app": names[each[0]], "app_version": each[1], "verdict": verdicts.get(each)}
                for each in newest.items()]
        return sorted(rows, key=lambda row: ((row["verdict"] or {}).get("word") != "worse", row["app"]))

    def digest(self, app: str | None, since: int, until: int) -> list[str]:
        """What was received between two times, in milliseconds, in a few lines: is the newest release worse, what is
        new, what is fixed?"""
        lines = [f"{each['app']} {each['app_version']} is {each['verdict']['text']}"
                 for each in self.newest_releases(app) if each["verdict"]][:LISTED]
        with self._snapshot(app) as (db, app_id):
            parameters = {"app": app_id, "since": since, "until": until, "other": OTHER}
            crashes = per_day(db, "crash_days", ["crashes"], app_id, self._last_days(3))["crashes"]
            # What came late is new, too. What is older than the last crash that has expired may have come before.
            expired, = db.execute(
                "select coalesce(max(value), 0) from state where name = 'expired_crashes' or name like 'early%'"
                ).fetchone()
            new = db.execute(f"""
                select exception_type, place from groups
                where {APPS} and first_seen > :expired and group_hash <> :other and (
                    select min(received_at) from crashes
                    where app_id = groups.app_id and group_hash = groups.group_hash) between :since and :until - 1
                order by first_seen desc
                """, {**parameters, "expired": min(expired >> SEQ_BITS, since - MAX_SKEW)}).fetchall()
            decided = dict(db.execute(f"""
                select case when state = 'resolved' then 'resolved' else 'regressed' end as what, count(*) from triage
                where {APPS} and (state = 'resolved' and changed_at between :since and :until - 1
                    or regressed_at between :since and :until - 1) group by what
                """, parameters).fetchall())
        lines.append(f"Crashes: {crashes[1]:,} yesterday, {crashes[0]:,} the day before")
        lines.append(f"New: {len(new):,}" + "".join(
            f"; {_one_line(kind)}{f' in {_one_line(place)}' if place else ''}" for kind, place in new[:3]))
        lines.append(f"Resolved: {decided.get('resolved', 0):,}; regressed: {decided.get('regressed', 0):,}")
        return lines

    def news(self, app: str | None = None, limit: int = 50) -> list[JsonObject]:
        """The groups that came or regressed last, the latest first; `at` is in milliseconds."""
        with self._snapshot(app) as (db, app_id):
            return dict_rows(db, f"""
                select news.what, news.at, news.app_id, apps.name as app, apps.created_at, news.group_hash,
                    exception_type, coalesce(place, '') as place, first_version
                from (
                    select * from (
                        select 'new' as what, first_seen as at, app_id, group_hash from groups
                        where {APPS} and group_hash <> :other order by at desc, group_hash limit :limit) as new
                    union all select 'regressed', regressed_at, app_id, group_hash from triage
                        where {APPS} and regressed_at is not null) as news
                join apps on apps.id = news.app_id
                join groups on groups.app_id = news.app_id and groups.group_hash = news.group_hash
                order by news.at desc, news.what, news.app_id, news.group_hash
                limit :limit""", {"app": app_id, "other": OTHER, "limit": limit})

    # Behind the admin token: these read the reports, a page at a time

    def groups(self, app: str | None = None, version: str | None = None, days: int | None = None,
               text: str | None = None, state: str | None = None, sort: str | None = None, limit: int = 50,
               cursor: str | None = None) -> JsonObject:
        """The groups of the crashes that are kept: those with most crashes first, or as `sort` says. `version` may end
        with *; `text` is in what the list shows, or in symbols and files of the app in the latest crash; `state` is one
        of GROUPS_OF. `is_new`: first seen in this version, or without one, within 7 days."""
        if state not in GROUPS_OF:
            raise Refusal("invalid state", detail=f"it is none of {', '.join(filter(None, GROUPS_OF))}")
        if sort not in (None, *SORTS):
            raise Refusal("invalid sort")
        column = SORTS[sort or "crashes"]
        value, group = _parse_cursor(cursor, r"([0-9]{1,18})-([0-9a-f]{16}|\(other\))", (MAX_NUMBER, ""))
        shown, week = self._last_days(days) if days else [None], self._last_days(WEEK)[0] * DAY
        with self._snapshot(app) as (db, app_id):
            parameters = {"app": app_id, **_version_filter(version), "first": shown[0], "last": shown[-1],
                          "text": text and text.casefold(), "limit": limit + 1, "value": int(value), "group": group,
                          "week": week, "since": shown[0] * DAY - MAX_SKEW if days else 0}
            rows = dict_rows(db, f"""
                select * from (
                    select group_hash, sum(crashes) as count, sum(devices) as devices, max(latest) as last_seen, (
                        select min(first_seen) from groups where {APPS} and group_hash = counts.group_hash
                        ) as first_seen
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

    def _listed(self, db: Connection, row: JsonObject, parameters: JsonObject) -> JsonObject:
        """A group as a list has it."""
        found = self._named(db, parameters["app"], row["group_hash"])
        del found["app_id"]
        first, version = (found.pop("first_version") or "")[:parameters["length"]], parameters["version"]
        is_new = row["first_seen"] >= parameters["week"] if version is None else first == version
        versions = [each for each, in db.execute(f"""
            select app_version from crashes
            where {APPS} and group_hash = :group and app_version is not null and {OF_VERSION}
                and received_at >= :since and (:first is null or {COUNTED_AT} / {DAY} between :first and :last)
            group by app_version
            order by count(*) desc, app_version
            limit {MAX_VERSIONS}""", parameters)]
        return {**found, **row, "versions": sorted(versions, key=version_key), "is_new": is_new,
                **{name: iso_time(row[name]) for name in ("first_seen", "last_seen")}}

    def _named(self, db: Connection, app_id: int | None, group_hash: str) -> JsonObject:
        """What is known of a group; of several apps, of the one that saw it last. Of one whose crashes have expired,
        what was decided."""
        found, = dict_rows(db, f"""
            select :group as group_hash, coalesce(exception_type, '') as exception_type,
                coalesce(exception_reason, '') as exception_reason, coalesce(place, '') as place, (
                    select min(first_seen) from groups where {APPS} and group_hash = :group) as first_seen, (
                    select first_version from groups where {APPS} and group_hash = :group
                    order by first_seen, app_id limit 1) as first_version,
                coalesce(state, 'open') as state, fixed_in, regressed_at, known.app_id
            from (select app_id from groups where {APPS} and group_hash = :group
                union select app_id from triage where {APPS} and group_hash = :group) as known
            left join groups on groups.app_id = known.app_id and groups.group_hash = :group
            left join triage on triage.app_id = known.app_id and triage.group_hash = :group
            order by coalesce(last_seen, 0) desc, known.app_id
            limit 1""", {"app": app_id, "group": group_hash})
        return {**found, "regressed_at": found["regressed_at"] and iso_time(found["regressed_at"])}

    def group(self, group_hash: str, app: str | None = None, limit: int = REPORTS,
              cursor: str | None = None) -> JsonObject:
        """A group, its spread, its history, and its crashes, the latest first. Refusal where no crash of it is kept,
        nor a decision."""
        at, report_id = _parse_cursor(cursor, "([0-9]{1,18})-([0-7][0-9a-f]{15})", (MAX_NUMBER, "0"))
        with self._snapshot(app) as (db, app_id):
            parameters = {"app": app_id, "group": group_hash, "at": int(at), "seq": int(report_id, 16),
                          "limit": limit + 1}
            count, devices, last_seen = db.execute(f"""
                select coalesce(sum(crashes), 0), coalesce(sum(devices), 0), max(last_seen) from group_sums
                join groups using (app_id, group_hash)
                where {APPS} and group_hash = :group""", parameters).fetchone()
            if not count and not db.execute(f"select 1 from triage where {APPS} and group_hash = :group",
                                            parameters).fetchone():
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
            found = self._named(db, app_id, group_hash)
            history = dict_rows(db, """
                select at, what, detail from group_history where app_id = ? and group_hash = ? order by entry
                """, (found.pop("app_id"), group_hash))
            missing = self._missing_builds(db, app_id, group_hash, 3)
            reports = _reports(db, "crashes", [seq for seq, _ in page[:limit]])
        seq, at = page[len(reports) - 1] if reports else (0, 0)
        first_seen = found["first_seen"]
        return {**found, "count": count, "devices": devices, "first_seen": first_seen and iso_time(first_seen),
                "last_seen": last_seen and iso_time(last_seen), **spread, "missing_symbols": missing,
                "history": [{**each, "at": iso_time(each["at"])} for each in history], "reports": reports,
                "next": f"{at}-{crash_id(seq)}" if page[len(reports):] else None}

    def attention(self, app: str | None = None) -> JsonObject:
        """Of the open groups that crashed on the seven UTC days that end today: `new` are those that were new or
        regressed then, the latest first, of `new_count`; `first` those to be fixed first, by their `score`: devices
        that crashed in the newest release of their app, halved for each day since the last crash. A group of two apps
        is two. A group of which neither a crash nor a decision is kept has no page, so it is left out."""
        week = self._last_days(WEEK)
        with self._snapshot(app) as (db, app_id):
            parameters = {"app": app_id, "first": week[0], "last": week[-1], "since": week[0] * DAY - MAX_SKEW}
            rows = dict_rows(db, f"""
                select apps.name as app, groups.app_id, groups.group_hash, exception_type, first_seen, last_seen,
                    coalesce(exception_reason, '') as exception_reason, coalesce(place, '') as place,
                    coalesce(regressed_at, 0) as regressed_at, 'open' as state, sums.crashes as count,
                    coalesce(group_sums.devices, 0) as devices
                from (
                    select app_id, group_hash, sum(crashes) as crashes from group_days
                    where {APPS} and day between :first and :last and group_hash <> '{OTHER}'
                    group by app_id, group_hash) as sums
                cross join groups on groups.app_id = sums.app_id and groups.group_hash = sums.group_hash
                cross join apps on apps.id = groups.app_id
                left join group_sums on group_sums.app_id = groups.app_id and group_sums.group_hash = groups.group_hash
                left join triage on triage.app_id = groups.app_id and triage.group_hash = groups.group_hash
                where coalesce(state, 'open') = 'open' and coalesce(group_sums.crashes, changed_at) is not null
                order by count desc, groups.group_hash, groups.app_id""", parameters)
            by_devices = sorted(rows[CANDIDATES:], key=itemgetter("devices"), reverse=True)
            candidates = rows[:CANDIDATES] + by_devices[:CANDIDATES]  # one device may crash in a loop
            newest = Releases.newest(db, app_id, week[0])
            for row in candidates:
                row.update(self._weight(db, {**parameters, **row, "newest": newest.get(row["app_id"])}))
        first = sorted(candidates, key=lambda row: (-row["score"], -row["devices"], -row["count"]))
        for row in rows:
            row["is_new"], row["is_regressed"] = (row[at] >= week[0] * DAY for at in ("first_seen", "regressed_at"))
            row["last_seen"] = iso_time(row["last_seen"])
        new = [row for row in rows if row["is_new"] or row["is_regressed"]]
        new.sort(key=lambda row: max(row["first_seen"], row["regressed_at"]), reverse=True)
        return {"new": new[:SHOWN_GROUPS], "new_count": len(new), "first": first[:SHOWN_GROUPS]}

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
        name = f"{version} ({build})" if build else version
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
            where {APPS} and group_hash = :group and {OF_VERSION} and received_at >= :since
                and {COUNTED_AT} / {DAY} between :first and :last
            group by day""", parameters))
        apps = db.execute(f"""
            select name from apps where {APPS.replace("app_id", "id", 1)} and (
                exists (select 1 from crashes where app_id = apps.id and group_hash = :group)
                or exists (select 1 from triage where app_id = apps.id and group_hash = :group))
            order by name""", parameters).fetchall()
        return {"days": [counts.get(day, 0) for day in shown], "apps": [name for name, in apps]}

    def is_empty(self, app: str | None = None) -> bool:
        """Whether nothing was received of an app; of its events, only the latest are looked at."""
        with self._snapshot(app) as (db, app_id):
            return not any(db.execute(f"""
                select exists (select 1 from crash_days where {APPS}), exists (select 1 from session_days where {APPS}),
                    exists (select 1 from (select app_id from events order by seq desc limit 1000) as latest
                        where {APPS})""", {"app": app_id}).fetchone())

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
        with self._snapshot(app) as (db, app_id):
            first, last, order = 0, MAX_NUMBER, "asc" if oldest_first else "desc"
            parameters = {"app": app_id, "type": type, "name": name, "session": session_id, "limit": limit + 1,
                          "device": device_id_hash}
            if session_id is not None:  # its events are between its first and its last
                first, last = db.execute(f"""
                    select coalesce(min(first_seq), 0), coalesce(max(last_seq), -1) from sessions
                    where {APPS} and session_id = :session""", parameters).fetchone()
            if oldest_first:
                first = max(first, _seq_of(cursor, -1) + 1)
            else:
                last = min(last, _seq_of(cursor, MAX_NUMBER) - 1)
            parameters.update(first=first, last=last, scanned=SCANNED)
            scan = f"from events where seq between :first and :last order by seq {order} limit :scanned"
            seqs = [seq for seq, in db.execute(f"""
                select seq from (select seq, app_id, type, name, session_id, device_id_hash {scan}) as scanned
                where {APPS} and (:type is null or type = :type) and (:name is null or name = :name)
                    and (:session is null or session_id = :session)
                    and (:device is null or device_id_hash = :device)
                order by seq {order}
                limit :limit""", parameters)]
            row = db.execute(f"select seq from (select seq {scan}) as scanned order by seq {order}"
                             " limit 1 offset :scanned - 1", parameters).fetchone()
            found = _reports(db, "events", seqs[:limit])
        following = found[-1]["id"] if seqs[len(found):] else event_ids(row)[0] if row else None
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
                select * from crashes where app_id = ? and group_hash = ? order by received_at desc limit 20) as latest
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
                **{table: _reports(db, table, [seq for seq, in db.execute(
                    f"select seq from {table} where device_id_hash = ? order by seq", (device_id_hash,))], MAX_NUMBER)
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


def _dates(days: Iterable[int]) -> list[str]:
    return [date.fromordinal(_DAY_ZERO + day).isoformat() for day in days]


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
    "new": "(app_id, group_hash) in (select app_id, group_hash from groups where first_seen >= :week)"}
# Columns by which groups are sorted. Where all that are kept count, their sums know.
SORTS = {"crashes": "count", "devices": "devices", "last_seen": "last_seen", "first_seen": "first_seen"}
SUMS_OF_GROUPS = f"""
    select app_id, group_hash, crashes, devices, last_seen as latest from group_sums
    join groups using (app_id, group_hash) where {APPS}"""
OF_VERSION = "(:version is null or substr(app_version, 1, :length) = :version)"


# By group, so that the index finds those that were received since a time: see group_days.
CRASHES_OF_GROUPS = f"""
    select known.app_id, known.group_hash, count(*) as crashes, count(distinct device_id_hash) as devices,
        max({COUNTED_AT}) as latest
    from (select app_id, group_hash from groups where {APPS} and last_seen >= :since) as known
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


def _seq_of(cursor: str | None, default: int) -> int:
    """The seq of the id that a page ended with."""
    digits, = _parse_cursor(cursor, "(?:evt_)?([0-7][0-9a-f]{15})", ("",))
    return int(digits, 16) if digits else default


def crash_free_rate(crashes: int, sessions: int) -> float:
    """Percent of sessions without a crash, with two decimals."""
    if not sessions:
        return 0.0 if crashes else 100.0
    return round(max(0.0, 100 * (1 - crashes / sessions)), 2)


# == Requests ==================================================================
# Reads what a request carries, and lists every error that a client can get. bottle's
# own readers are not used: they stop at 100 KiB, and fail on headers that are not UTF-8.

# The error texts by status. A text that is not here starts with `missing` or `invalid` and has status 400.
ERRORS = {
    301: ("moved",),  # a group, to another
    401: ("missing API key", "invalid API key", "missing admin token", "invalid admin token",
          "invalid signature", "stale timestamp", "signature required"),
    404: ("not found",), 405: ("method not allowed",), 413: ("request body too large",),
    415: ("unsupported content encoding",), 422: ("idempotency key reused with a different body",),
    429: ("rate limit exceeded",), 431: ("request header too large",), 500: ("internal server error",),
    501: ("transfer encoding not supported",), 503: ("storage unavailable",)}
_STATUS = {text: status for status, texts in ERRORS.items() for text in texts}
_STATUS_LINES = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}
_HEADERS = {"Content-Type": "application/json", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}

Environ = dict[str, Any]
Answer = tuple[int, Union[dict[str, Any], str]]  # status, and a JSON object or a text
Handler = Callable[..., Answer]  # called with an environ and the parts of the path


def _error_text(status: int) -> str:
    """What a client is told of an error that bottle or waitress raised."""
    return ERRORS.get(status, ("invalid request",))[0]


def _error_body(status: int) -> bytes:
    return json.dumps({"error": _error_text(status)}).encode()


def _header(environ: Environ, name: str) -> bytes:
    """A request header as the bytes that were sent; b"" where there is none."""
    return environ.get("HTTP_" + name, "").encode("latin-1", "replace")


def _read_body(environ: Environ, limit: int) -> bytes:
    """The body as it was sent. Raises Refusal where it has more than `limit` bytes."""
    length = environ.get("CONTENT_LENGTH") or ""
    if not re.fullmatch("[0-9]*", length):
        raise Refusal("invalid Content-Length")
    if len(length) > 18 or int(length or 0) > limit:  # int() raises ValueError for thousands of digits
        raise Refusal("request body too large")
    if not length and not environ.get("wsgi.input_terminated"):
        return b""  # a body without a length, such as a chunked one, needs a server that marks its end
    size = int(length) if length else limit + 1
    try:
        body = environ["wsgi.input"].read(size)
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
    inflater = zlib.decompressobj(wbits=31)  # 31: with a gzip header
    try:
        plain = inflater.decompress(body, limit + 1)
    except zlib.error:
        raise Refusal("invalid gzip body") from None
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


def _query(environ: Environ) -> str:
    return environ.get("QUERY_STRING", "").encode("latin-1", "replace").decode("utf-8", "replace")


def _parameters(environ: Environ, *names: str) -> dict[str, Any]:
    """The query parameters of these names, without empty ones. Raises Refusal for an invalid number."""
    found = parse_qs(_query(environ), keep_blank_values=True)
    given: dict[str, Any] = {name: values[-1] for name, values in found.items()}
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
# Functions from numbers to SVG. Horizontal positions are percentages, so that a chart
# is as wide as the page has room for. Labels of days are ISO dates.

_HEIGHT, _EDGE = 72, 3  # pixels: the height of a chart, and the margin above and below its lines
_NO_CHART = '<p class="empty">None in these days.</p>'
_ROUND = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 40, 50, 60, 80, 100)  # where an axis may end, and tens of times these
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

escape = bottle.html_escape

Values = Sequence[Optional[float]]


def _shorten(text: str, length: int = 300) -> str:
    return text if len(text) <= length else text[:length] + "..."


def line_chart(title: str, labels: Sequence[str], values: Values, low: float = 0, unit: str = "") -> str:
    """A line through one value a day, from `low` up, and a dot for today, which is not over. None leaves a gap."""
    def draw(ys: Values, step: float) -> Iterator[str]:
        xs, today = [f"{(n + 0.5) * step:.2f}%" for n in range(len(ys))], len(ys) - 1
        starts = {n for n in range(today - 1) if ys[n] is not None and ys[n + 1] is not None}
        yield from (f'<line x1="{xs[n]}" x2="{xs[n + 1]}" y1="{ys[n]:.1f}" y2="{ys[n + 1]:.1f}"/>' for n in starts)
        yield from (f'<circle cx="{xs[n]}" cy="{y:.1f}" r="2.5"/>' for n, y in enumerate(ys)
                    if y is not None and (n == today or not {n - 1, n} & starts))
    return _chart(title, labels, values, draw, low, unit)


def column_chart(title: str, labels: Sequence[str], values: Values) -> str:
    """A column for one value a day."""
    def draw(ys: Values, step: float) -> Iterator[str]:
        return (f'<rect x="{(n + 0.15) * step:.2f}%" width="{0.7 * step:.2f}%" y="{y:.1f}"'
                f' height="{_HEIGHT - _EDGE - y:.1f}"/>' for n, y in enumerate(ys) if y is not None)
    return _chart(title, labels, values, draw)


def _chart(title: str, labels: Sequence[str], values: Values, draw: Callable[[Values, float], Iterable[str]],
           low: float = 0, unit: str = "") -> str:
    """`draw` makes SVG of the y positions in pixels, and of the percentage from one x position to the next."""
    known = [(value, label) for value, label in zip(values, labels) if value is not None]
    if not known:
        return _NO_CHART
    (highest, peak), (lowest, _) = max(known), min(known)
    step, bottom, tens = 100 / len(values), _HEIGHT - _EDGE, 10 ** max(0, len(str(int(highest))) - 2)
    high = 100 if unit else next(tens * each for each in _ROUND if highest <= tens * each)
    ys = [None if value is None else bottom - (bottom - _EDGE) * (value - low) / (high - low) for value in values]
    first, last = _day(labels[0]), _day(labels[-1])
    summary = (f"{title} per day, {first} to {last}: latest {known[-1][0]:,}{unit},"
               f" highest {highest:,}{unit} on {_day(peak)}, lowest {lowest:,}{unit}")
    tooltips = [f"{_day(label)}: " + ("none" if value is None else f"{value:,}{unit}")
                for label, value in zip(labels, values)]
    tooltips[-1] += " so far"
    days = "".join(f'<rect class="day" x="{n * step:.2f}%" width="{step:.2f}%" y="0" height="{_HEIGHT}">'
                   f'<title>{tooltip}</title></rect>' for n, tooltip in enumerate(tooltips))
    axis = "".join(f'<line x1="0" x2="100%" y1="{y}" y2="{y}"/>' for y in (_EDGE, bottom))
    return (f'<div class="chart" role="img" aria-label="{summary}">'
            f'<p><span>{high:,}{unit}</span><span>{low:,}{unit}</span></p><svg width="100%" height="{_HEIGHT}">'
            f'<g class="axis">{axis}</g><g class="marks">{"".join(draw(ys, step))}</g>{days}</svg>'
            f'<p><span>{first}</span><span>{last}</span></p></div>')


def _day(label: str) -> str:
    day = date.fromisoformat(label)
    return f"{day.day} {_MONTHS[day.month - 1]}"


def sparkline(values: Sequence[int], title: str) -> str:
    """A line as high as a line of text, through one value a day."""
    high, total = max(*values, 1), f"{sum(values):,} in {len(values)} days"
    points = " ".join(f"{4 * n},{19 - 17 * value / high:.1f}" for n, value in enumerate(values))
    return (f'<svg class="spark" role="img" aria-label="{title}: {total}" width="118" height="20">'
            f'<title>{total}</title><polyline points="{points}"/></svg>')


def bar_chart(figures: JsonObject, total: int | None = None) -> str:
    """A bar for each of the first ten labels, and the count of what is in `total` but not among them."""
    shown = list(zip(figures["labels"], figures["data"]))[:10]
    rest = (sum(figures["data"]) if total is None else total) - sum(count for _, count in shown)
    longest = max((count for _, count in shown), default=1)
    rows = [(f"<bdi>{escape(_shorten(label, 80))}</bdi>", count,
             f'<rect width="{100 * count / longest:.1f}%" height="10"/>') for label, count in shown]
    if rest > 0:
        rows.append(("others, or unknown", rest, ""))
    html = "".join(
        f'<tr><th scope="row">{label}</th><td><svg width="100%" height="10" aria-hidden="true">{bar}</svg></td>'
        f'<td class="number">{count:,}</td></tr>' for label, count, bar in rows)
    return f'<table class="bars">{html}</table>' if rows else _NO_CHART


# == Dashboard =================================================================
# The pages, for whoever has the admin token. They load nothing from other hosts and
# use no JavaScript. What a report contains is hostile: it reaches a page only through
# `{{ }}` or escape(), an address also through urlencode(), and never a style.

SESSION_LIFETIME = 7 * DAY
LINK_LIFETIME = 600 * SECOND  # of a link that signs in once
LIST_ROWS = 25
SHOWN_FRAMES, SHOWN_TEXT = 200, 20_000  # frames and characters of a report on its page; the API has the rest

_FORM_EXPIRED = "form expired"
_FROM_ELSEWHERE = "You came here from another site, so your browser did not say who you are."
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # characters that HTML does not allow
_NOT_XML = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]")

Response = bottle.HTTPResponse
PageHandler = Callable[..., Response]  # called with a PageRequest and the parts of the path


class PageRequest:
    """A request for a page: its address, its browser's cookies and, after read_form(), its form."""

    def __init__(self, environ: Environ, now: int, public_url: str, cookie: str):
        self.environ, self.now, self._public_url, self.cookie = environ, now, public_url.rstrip("/"), cookie
        mounted = quote(environ.get("SCRIPT_NAME", "").encode("latin-1", "replace"))
        self.root = (urlsplit(public_url).path or mounted).rstrip("/")  # a proxy may have stripped the prefix
        self.path = quote(environ.get("PATH_INFO", "").encode("latin-1", "replace"))
        self.section = "/" + self.path.split("/")[1] if "/" in self.path else "/"
        given = parse_qsl(_query(environ))  # without the fields that a form left empty
        self.query = urlencode(given)
        self.address = self.path + ("?" + self.query if self.query else "")
        self.app: str | None = dict(given).get("app")
        self._is_of_all_days = ("days", "all") in given
        self.apps: list[App] | None = None  # None unless the browser is signed in
        self.session = self._read_cookie("")
        self.form_secret = self._read_cookie("_form") or secrets.token_hex(16)
        self.form: dict[str, str] = {}
        self.is_https = "https" in (environ.get("wsgi.url_scheme"), public_url.partition(":")[0])

    def _read_cookie(self, suffix: str) -> str:
        found = re.search(f"(?:^|; ?){self.cookie}{suffix}=([0-9a-f]{{32}})(?:;|$)",
                          self.environ.get("HTTP_COOKIE", ""))
        return found[1] if found else ""

    @property
    def url(self) -> str:
        """The address of the server as the browser sees it, without a slash at the end."""
        host = re.fullmatch(r"[0-9A-Za-z.:\[\]-]+", self.environ.get("HTTP_HOST", ""))
        return self._public_url or f"http{'s' * self.is_https}://{host[0] if host else 'localhost'}{self.root}"

    def parameters(self, *names: str) -> dict[str, Any]:
        query = urlencode([each for each in parse_qsl(self.query) if each != ("days", "all")])
        return _parameters({"QUERY_STRING": query}, *names)

    def days(self, default: int | None) -> int | None:
        """The days that were chosen, None for all."""
        return None if self._is_of_all_days else self.parameters("days").get("days", default)

    @property
    def form_token(self) -> str:
        """What a form must carry. Another site cannot make it, as it does not know this browser's secret."""
        return sha256("form" + self.form_secret).hex()

    def read_form(self) -> None:
        """Raises Refusal unless the form comes from a page of this browser."""
        fields = parse_qs(_read_body(self.environ, 65_536).decode("utf-8", "replace"), keep_blank_values=True)
        self.form = {name: values[-1] for name, values in fields.items()}
        token = self.form.get("form_token", "").encode("utf-8", "replace")
        if not hmac.compare_digest(token, self.form_token.encode()):
            raise Refusal(_FORM_EXPIRED)

    def link(self, path: str, **query: Any) -> str:
        """The address of a page about the same app, unless `query` has another. None and "" are left out of it."""
        app = self.app if any(app.name == self.app for app in self.apps or ()) else None
        given = {name: value for name, value in {"app": app, **query}.items() if value not in (None, "")}
        return self.root + path + ("?" + urlencode(given) if given else "")

    def moved(self, path: str) -> str:
        """The address of what has moved there, with the same query."""
        return self.root + path + ("?" + self.query if self.query else "")

    def redirect(self, path: str) -> Response:
        return Response(b"", 303, {**PAGE_HEADERS, "Location": self.root + path})

    def set_cookie(self, response: Response, suffix: str, value: str) -> None:
        response.set_cookie(self.cookie + suffix, value, path=self.root + "/", httponly=True, samesite="strict",
                            secure=self.is_https, max_age=SESSION_LIFETIME // SECOND)

    def when(self, time_text: str) -> str:
        """HTML of a time as the API gives it: how long ago, or a date; and the exact time as a tooltip."""
        exact, span = time_text[:19].replace("T", " "), self.now - parse_time(time_text)
        units = [(DAY, "d"), (HOUR, "h"), (60 * SECOND, "min")]
        shown = next((f"{span // unit} {name} ago" for unit, name in units if span >= unit), "just now")
        shown = shown if -MAX_SKEW <= span < 100 * DAY else exact[:10]
        return f'<time datetime="{time_text}" title="{exact} UTC">{shown}</time>'


class Dashboard:
    """Answers the requests for pages."""

    def __init__(self, store: Store, metrics: Metrics, refused: RefusedReports, alerts: Alerts, public_url: str = ""):
        self._store, self._metrics, self._refused, self._public_url = store, metrics, refused, public_url
        self._alerts = alerts
        # Two servers on one host share their cookies.
        self._cookie = "backfeedr_" + store.secret_hash("admin_token").hex()[:8]
        self._templates = {name: bottle.SimpleTemplate(source) for name, source in _TEMPLATES.items()}

    def routes(self) -> Iterator[tuple[str, str, Callable[..., Response]]]:
        """Method, path and handler of each page."""
        for method, path, handler in (
                ("GET", "/", self._overview), ("GET", "/crashes", self._crashes),
                ("GET", "/crashes/<group_hash>.<form:re:txt|md>", self._group_text),
                ("GET", "/crashes/<group_hash>", self._group), ("POST", "/crashes/<group_hash>", self._triage),
                ("GET", "/events", self._events), ("GET", "/usage", self._usage),
                ("GET", "/releases", self._releases), ("GET", "/apps", self._apps),
                ("POST", "/apps", self._change_apps), ("POST", "/sign-out", self._sign_out),
                ("GET", "/sign-in", self._sign_in_page), ("POST", "/sign-in", self._sign_in)):
            yield method, path, partial(self._respond, handler)
        yield "GET", "/crashes.atom", self._feed

    def invite(self, url: str) -> str:
        """A link that signs in once, within ten minutes."""
        return f"{url}/sign-in?code={self._store.grant('code', LINK_LIFETIME)}"

    def request(self, environ: Environ) -> PageRequest:
        return PageRequest(environ, self._store.now, self._public_url, self._cookie)

    def _respond(self, handler: PageHandler, **path: str) -> Response:
        """A page, or a page for the error."""
        page = self.request(bottle.request.environ)
        try:
            return self._check_session(page) or handler(page, **path)
        except Moved as moved:
            form = "." + path["form"] if "form" in path else ""
            return Response(b"", 301, {**PAGE_HEADERS, "Location": page.moved(f"/crashes/{moved.group_hash}{form}")})
        except Refusal as refusal:
            status = 403 if str(refusal) == _FORM_EXPIRED else _STATUS.get(str(refusal), 400)
            return self.error_page(page, status, str(refusal), refusal.retry_after, refusal.detail)
        except Exception:
            log.exception("unexpected error")
            return self.error_page(page, 500, "internal server error")

    def error_page(self, page: PageRequest, status: int, text: str, retry_after: int | None = None,
                   detail: str = "") -> Response:
        """The page for an error."""
        hint = detail and f"{detail[:1].upper()}{detail[1:]}." or _HINTS.get(status, _HINTS[400])
        response = self._render(page, text[:1].upper() + text[1:], "message", status, target="/",
                                label="To the overview", text=hint)
        if retry_after is not None:
            response.set_header("Retry-After", str(retry_after))
        return response

    def _check_session(self, page: PageRequest) -> Response | None:
        """Reads the form, if there is one. Returns a page where the browser has to sign in first."""
        is_form = page.environ["REQUEST_METHOD"] == "POST"
        if page.path != "/sign-in":
            if not self._store.is_granted("session", page.session):
                if page.environ.get("HTTP_SEC_FETCH_SITE") == "cross-site" and not is_form:
                    # A link on another site brings no SameSite=strict cookie. A link on this page does.
                    return self._render(page, "Continue", "message", text=_FROM_ELSEWHERE, target=page.address,
                                        label="Go on")
                return page.redirect("/sign-in?" + urlencode({"next": "/" if is_form else page.address}))
            page.form_secret, page.apps = page.session, self._store.apps()
        if is_form:
            page.read_form()
        return None

    def _render(self, page: PageRequest, title: str, template: str, status: int = 200, **values: Any) -> Response:
        values.update(_TEMPLATE_GLOBALS, page=page, title=title, apps=page.apps, link=page.link, when=page.when)
        values["body"] = self._templates[template].render(values)
        html = self._templates["layout"].render(values)
        return Response(_CONTROL.sub("\ufffd", html).encode("utf-8", "replace"), status, PAGE_HEADERS)

    # Signing in and out

    def _sign_in_page(self, page: PageRequest, problem: str = "", status: int = 200) -> Response:
        query = parse_qs(page.query)
        code = query.get("code", [""])[-1]
        if code and page.environ["REQUEST_METHOD"] == "GET":  # HEAD is a preview, and must not use up the code
            if self._store.withdraw("code", code):
                return self._start_session(page, "/")
            problem, status = "This link was good once, for ten minutes. Sign in with the admin token.", 403
        target = page.form.get("next") or query.get("next", ["/"])[-1]
        response = self._render(page, "Sign in", "sign_in", status, problem=problem, target=target)
        page.set_cookie(response, "_form", page.form_secret)
        return response

    def _sign_in(self, page: PageRequest) -> Response:
        if not self._store.is_admin(page.form.get("token", "").strip().encode()):
            return self._sign_in_page(page, "That is not the admin token.", 403)
        return self._start_session(page, page.form.get("next", ""))

    def _start_session(self, page: PageRequest, target: str) -> Response:
        """With a new session id: an attacker may have planted the one that the browser had."""
        is_our_path = re.fullmatch(r"/(?![/\\])[!-~]*", target)
        response = page.redirect(target if is_our_path else "/")
        page.set_cookie(response, "", self._store.grant("session", SESSION_LIFETIME))
        return response

    def _sign_out(self, page: PageRequest) -> Response:
        self._store.withdraw("session", page.session)
        return page.redirect("/sign-in")

    # The pages

    def _overview(self, page: PageRequest) -> Response:
        metrics, app = self._metrics, page.app
        releases = metrics.releases(app)["releases"]
        tiles = _tiles(metrics.overview(app), metrics.daily_crashes(app, 30), metrics.sessions(app, 30)["sessions"],
                       metrics.active_devices(app, 30)["dau"])
        return self._render(
            page, "Overview", "overview", is_empty=metrics.is_empty(app), tiles=tiles, **metrics.attention(app),
            warnings=[*self._refused.today(app), *self._store.warnings()],
            verdicts=metrics.newest_releases(app), releases=releases[:4],
            types=metrics.crash_types(app, 30), devices=metrics.devices(app, 30))

    def _crashes(self, page: PageRequest) -> Response:
        parameters = page.parameters("version", "text", "state", "sort", "cursor")
        days = page.days(None if {"version", "text"} & parameters.keys() else WEEK)
        found = self._metrics.groups(page.app, **parameters, days=days, limit=LIST_ROWS)
        details = self._metrics.group_days([group["group_hash"] for group in found["groups"]], page.app,
                                           parameters.get("version"))["groups"]
        return self._render(page, "Crashes", "crashes", parameters={**parameters, "days": days or "all"},
                            next=found["next"], is_empty=not page.parameters("days")
                            and not found["groups"] and self._metrics.is_empty(page.app),
                            sorts=[(each, each.replace("_", " ")) for each in SORTS],
                            groups=[{**group, **details[group["group_hash"]]} for group in found["groups"]],
                            states=list(filter(None, GROUPS_OF)),
                            day_choices=[("all", "all"), *((n, n) for n in sorted({1, 7, 30, 90, 365, days or 1}))],
                            versions=[each["app_version"] for each in self._metrics.releases(page.app)["releases"]])

    def _group(self, page: PageRequest, group_hash: str) -> Response:
        metrics, parameters = self._metrics, page.parameters("cursor", "report")
        group = metrics.group(group_hash, page.app, cursor=parameters.get("cursor"))
        reports = group["reports"]
        report = metrics.crash(parameters["report"], page.app) if "report" in parameters else next(iter(reports), {})
        if (report or parameters) and report.get("group_hash") != group_hash:
            raise Refusal("not found")  # without either, its crashes have expired, and what was decided is left
        days = metrics.group_days([group_hash], page.app)
        ids = [each["id"] for each in reports]
        older, newer = ((ids[1:2] or [None])[0], None) if not parameters and (len(ids) > 1 or not group["next"]) \
            else metrics.neighbours(report, page.app)
        apps = days["groups"][group_hash]["apps"]
        return self._render(
            page, _culprit(group), "group", group=group, group_apps=apps, report=report, older=older, newer=newer,
            next=group["next"], next_build=metrics.next_build(group_hash, apps[0]) if len(apps) == 1 else "",
            parameters=parameters, crumbs=_crumbs(report), before=_steps(report, metrics.events_before(report)),
            chart=column_chart("Crashes", days["labels"], days["groups"][group_hash]["days"]),
            frames=[_frame(frame) for frame in report.get("stack_trace", [])], max_frames=SHOWN_FRAMES,
            context=_context(report), has_reasons=len({each.get("exception_reason") for each in reports}) > 1)

    def _group_text(self, page: PageRequest, group_hash: str, form: str) -> Response:
        """A group as text for a bug tracker, or as Markdown. It names no device, no session and no field that the
        server does not know."""
        group = self._metrics.group(group_hash, page.app, limit=1)
        query = "?" + urlencode({"app": page.app}) if page.app else ""  # without it, a test app's group is not found
        text = group_text(group, f"{page.url}/crashes/{group_hash}{query}", form == "md")
        kind = {"Content-Type": f"text/{'markdown' if form == 'md' else 'plain'}; charset=utf-8"}
        return Response(text.encode("utf-8", "replace"), 200, {**PAGE_HEADERS, **kind})

    def _usage(self, page: PageRequest) -> Response:
        metrics, app = self._metrics, page.app
        tiles = _usage_tiles(metrics.overview(app)["dau"], metrics.active_devices(app, 30), metrics.sessions(app, 30))
        return self._render(
            page, "Usage", "usage", tiles=tiles, back=_retention_tiles(metrics.retention(app, 60)),
            releases=metrics.releases(app)["releases"][:8], events=metrics.event_names(app)["events"])

    def _triage(self, page: PageRequest, group_hash: str) -> Response:
        """Does what a form of the page of a group asks for; a field that is empty asks for nothing."""
        given: JsonObject = {name: text for name, text in page.form.items() if name in _TRIAGE_FIELDS and text.strip()}
        for name, of in (("until", "{}T00:00:00Z".format), ("more_crashes", int), ("more_devices", int)):
            with suppress(ValueError):  # then it is refused as it is
                given.update({name: of(given[name])} if name in given else {})
        self._store.triage(group_hash, parse_triage(given, page.now), page.app or page.form.get("app"))
        return page.redirect(page.address)

    def _events(self, page: PageRequest) -> Response:
        parameters, title = page.parameters("type", "name", "session_id", "cursor"), "Events"
        if parameters.get("type", "custom") not in EVENT_TYPES:
            raise Refusal("invalid event type")
        if "session_id" in parameters:
            title = "A session"
            parameters = {name: value for name, value in parameters.items() if name not in ("type", "name")}
        found = self._metrics.events(page.app, **parameters, limit=2 * LIST_ROWS,
                                     oldest_first="session_id" in parameters)
        return self._render(page, title, "events", **found, parameters=parameters, types=EVENT_TYPES)

    def _releases(self, page: PageRequest) -> Response:
        parameters = page.parameters("sort")
        return self._render(page, "Releases", "releases", **self._metrics.releases(page.app, **parameters),
                            parameters=parameters)

    def _apps(self, page: PageRequest, status: int = 200, **notice: str) -> Response:
        page.apps, keys = self._store.apps(), self._store.keys()
        return self._render(page, "Apps", "apps", status, notice=notice, keys={
            app.name: [key for key in keys if key.app == app.name] for app in page.apps},
            channels=self._alerts.channels(), has_feed=bool(self._store.secret_hash("feed_token")),
            fact_kinds=FACT_KINDS)

    def _feed(self) -> Response:
        """New and regressed groups as Atom, for whoever has the token of the feed; for others there is nothing here."""
        page = self.request(bottle.request.environ)
        given = dict(parse_qsl(page.query))
        try:
            if not self._store.is_feed(given.get("token", "").encode("utf-8", "replace")):
                raise bottle.HTTPError(404)
            news = self._metrics.news(page.app)
        except Refusal as refusal:
            raise bottle.HTTPError(_STATUS.get(str(refusal), 400)) from None
        xml = self._templates["feed"].render(page=page, news=news, iso=iso_time, urn=_urn, urlencode=urlencode,
                                             updated=iso_time(news[0]["at"] if news else 0))
        return Response(_NOT_XML.sub("\ufffd", xml).encode("utf-8", "replace"), 200, {
            **PAGE_HEADERS, "Content-Type": "application/atom+xml; charset=utf-8"})

    def _change_alerts(self, page: PageRequest) -> Response | None:
        """Does what a form of alerts or of the feed asks for; None where it is of something else."""
        alerts, form, action = self._alerts, page.form, page.form.get("action", "")
        id = int(form["id"]) if re.fullmatch("[0-9]{1,9}", form.get("id", "")) else 0
        if action == "add-channel":
            kinds = [kind for kind in FACT_KINDS if f"on-{kind}" in form]
            hour = int(form["hour"]) if re.fullmatch("1?[0-9]|2[0-3]", form.get("hour", "")) else 7
            number, secret = alerts.add(form.get("url", "").strip(), form.get("app") or None, kinds, "reason" in form,
                                        hour)
            told = "; its secret, shown only this once:" if secret else "."
            return self._apps(page, message=f"Made channel {number}{told}", secret=secret)
        if action == "test-channel":
            alerts.test(id)
            return self._apps(page, message=f"Channel {id} took a test message.")
        if action == "remove-channel":
            alerts.remove(id)
            return self._apps(page, message=f"Removed channel {id}.")
        if action in ("make-feed", "withdraw-feed"):
            token = self._store.change_feed(action == "make-feed")
            return self._apps(page, secret=token and f"{page.url}/crashes.atom?token={token}", message=(
                "The address of the feed, shown only this once:" if token else "Withdrew the address of the feed."))
        return None

    def _change_apps(self, page: PageRequest) -> Response:
        """Does what a form of the page of apps asks for."""
        store, form, name = self._store, page.form, page.form.get("name", "")
        try:
            if answer := self._change_alerts(page):
                return answer
            if form.get("action") == "revoke":
                revoked = store.revoke_key(form.get("key", ""))
                return self._apps(page, message=f"Revoked the key {revoked.prefix}... of {revoked.app}.")
            if form.get("action") == "delete":
                return self._apps(page, message=self._delete_app(name, form.get("typed")))
            if form.get("action") not in ("create", "key"):
                raise StoreError("there is no such action")
            key = store.create_key(name) if form["action"] == "key" else store.create_app(name, "test" in form)
            return self._apps(page, message=f"The new key of {name}, shown only this once:", key=key)
        except StoreError as error:
            return self._apps(page, 400, problem=str(error)[:1].upper() + str(error)[1:])

    def _delete_app(self, name: str, typed: str | None) -> str:
        """Deletes in a thread, because a large app takes longer than a proxy waits for an answer. Returns what the
        page then says."""
        if typed != name:
            raise StoreError(f"to delete it, type its name: {name}")
        errors: list[Exception] = []

        def delete() -> None:
            try:
                self._store.delete_app(name)
            except Exception as error:
                log.error("cannot delete an app: %s", error)
                errors.append(error)

        thread = threading.Thread(target=delete, daemon=True)
        thread.start()
        thread.join(timeout=2)
        if errors:
            raise errors[0]
        return f"{name} is being deleted." if thread.is_alive() else f"Deleted {name} and all that it sent."


def _urn(*parts: Any) -> str:
    """An id that stays the same: of what is in the parts."""
    digits = sha256(_encode(parts)).hex()
    return f"urn:uuid:{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:32]}"


Tile = tuple[str, str, str, str]  # name, value, note and chart of a figure


def _tiles(week: JsonObject, crash_days: JsonObject, sessions: Sequence[int],
           devices: Sequence[int]) -> Iterator[Tile]:
    """Those of the overview."""
    labels, crashes = crash_days["labels"], crash_days["data"]
    rates = [crash_free_rate(*day) if day[1] else None for day in zip(crashes, sessions)]
    lowest = min((rate for rate in rates if rate is not None), default=0)
    axis_start = max(rate for rate in (0, 50, 80, 90, 95, 99) if rate <= lowest)
    crashes_before, sessions_before = sum(crashes[-14:-7]), sum(sessions[-14:-7])
    rate = f"{week['crash_free_rate_7d']:.2f} %" if week["sessions_7d"] else "-"
    rate_before = f"{crash_free_rate(crashes_before, sessions_before):.2f} % in the 7 before"
    rate_note = f"7 days; {rate_before}" if sessions_before else "7 days"
    yield "Crash-free sessions", rate, rate_note, line_chart("Crash-free sessions", labels, rates, axis_start, " %")
    yield "Active devices", f"{week['dau']:,}", "24 hours", line_chart("Active devices", labels, devices)
    yield _week_tile("Sessions", labels, sessions, line_chart)
    yield _week_tile("Crashes", labels, crashes, column_chart)


def _week_tile(name: str, labels: Sequence[str], days: Sequence[int], draw: Callable[..., str]) -> Tile:
    return (name, f"{sum(days[-7:]):,}", f"7 days; {sum(days[-14:-7]):,} in the 7 before", draw(name, labels, days))


def _usage_tiles(dau: int, active: JsonObject, sessions: JsonObject) -> Iterator[Tile]:
    """Active devices, and sessions with their length: the mean, where several apps have no median."""
    for column, value, note in (("dau", dau, "24 hours"), ("wau", active["wau"][-1], "7 days"),
                                ("mau", active["mau"][-1], "30 days")):
        name = f"Devices active in {note}"
        yield name, f"{value:,}", "", line_chart(name, active["labels"], active[column])
    yield _week_tile("Sessions", sessions["labels"], sessions["sessions"], line_chart)
    kind = "median" if any(each is not None for each in sessions["median_seconds"]) else "mean"
    lengths = sessions[kind + "_seconds"]
    known = [(each, f"{kind} of {_day(label)}") for label, each in zip(sessions["labels"], lengths) if each is not None]
    last, note = known[-1] if known else (None, "none has ended")
    yield ("Length of a session", "-" if last is None else _duration(last), note,
           line_chart("Seconds of a session", sessions["labels"], lengths))


def _retention_tiles(cohorts: JsonObject) -> Iterator[Tile]:
    """Of the devices first seen on a day, the share that was seen again later."""
    for later in Devices.BACK.values():
        rates, name = cohorts[f"day_{later}"], f"Back after {later} day{'s' * (later > 1)}"
        known = [(rate, devices) for rate, devices in zip(rates, cohorts["devices"]) if rate is not None]
        devices = sum(each for _, each in known)
        share = f"{sum(rate * each for rate, each in known) / devices:.0f} %" if devices else "-"
        yield name, share, f"of {devices:,} new devices", line_chart(name, cohorts["labels"], rates, 0, " %")


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
    time_field = next((each for each in _CRUMB_TIMES if given.get(each) not in (None, "")), "")
    action = next((each for each in _CRUMB_ACTIONS if given.get(each) and type(given[each]) is str), "")
    rest = {name: value for name, value in given.items() if name not in (time_field, action) and value not in (
        None, "", [], {})}
    return _offset(given.get(time_field, ""), report), _shorten(given.get(action, "")), _details({"extra": rest})


def _steps(report: JsonObject, events: Sequence[JsonObject]) -> list[Step]:
    """The events of a session before a crash."""
    return [(_offset(event["occurred_at"], report), f"{event['type']} {_shorten(event.get('name', ''), 80)}".strip(),
             _details(event)) for event in events]


def _offset(at: Any, report: JsonObject) -> str:
    """How long before a crash something was, such as -00:12. What is no time near it stays as it is."""
    try:
        span = parse_occurred_at(at) - parse_time(report["occurred_at"])
    except ValueError:
        return _shorten(_as_text(at), 40)
    (hours, minutes), seconds = divmod(abs(span) // 60_000, 60), abs(span) // SECOND % 60
    if hours > 99:
        return _shorten(_as_text(at), 40)
    return ("+" if span > 0 else "-") + (f"{hours}:" if hours else "") + f"{minutes:02}:{seconds:02}"


_MISLEADING = re.compile(_CONTROL.pattern + "|[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # turn text around


def group_text(group: JsonObject, url: str, is_markdown: bool) -> str:
    """A group for a bug tracker or for a reader. What its reports say is indented, or stands in a fence that it cannot
    close: none of it begins a line or is taken for markup."""
    parts = [f"{'# ' if is_markdown else ''}Crash group {group['group_hash']}\n\n{url}\n"]
    for title, text in _portrait(group):
        lines = [_MISLEADING.sub("\ufffd", line) for line in text.splitlines()]
        fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
        shown = [fence + "text", *lines, fence] if is_markdown else ["    " + line for line in lines]
        parts.append("\n".join([f"{'## ' if is_markdown else ''}{title}", *[""] * is_markdown, *shown, ""]))
    return "\n".join(parts)


def _portrait(group: JsonObject) -> Iterator[tuple[str, str]]:
    """Title and text of what is told of a group."""
    report = next(iter(group["reports"]), {})
    reason = _shorten(report.get("exception_reason", ""), SHOWN_TEXT)
    yield "What", "\n".join(filter(None, (group["place"], group["exception_type"], reason)))
    frames = [_frame(each) for each in report.get("stack_trace", [])[:SHOWN_FRAMES]]
    yield "Stack trace of the latest crash (* is the app's own code)", "\n".join(
        f"{n:3} {'*' if is_own else ' '} {_shorten(symbol, 1000)}  {_shorten(place)}".rstrip()
        for n, (symbol, place, is_own, _) in enumerate(frames)) or "none was sent"
    spread = [(title, ", ".join(f"{_shorten(label, 80)} ({count:,})" for label, count in zip(*group[part].values())))
              for title, part in (("Versions", "versions"), ("Systems", "systems"), ("Models", "device_models"))]
    yield "Spread", "\n".join([
        f"Crashes: {group['count'] or 0:,}", f"Devices: {group['devices'] or 0:,}",
        *(f"{title}: {each}" for title, each in (
            ("First seen", group["first_seen"]), ("Last seen", group["last_seen"]), *spread) if each)])
    history = "\n".join(f"{each['at']} {each['what']} {_as_text(each.get('detail') or '')}".rstrip()
                        for each in group.get("history", ()))
    if history:
        yield "History", history


def _culprit(group: JsonObject) -> str:
    """The function of the app in which a group crashes; its exception type, where none is known; its name, where that
    is all that is kept."""
    return canonical_name(group["place"]) or group["exception_type"] or group["group_hash"]


_CONTEXT: dict[str, tuple[str, Callable[[Any], str]]] = {
    "app": ("App", str), "app_version": ("Version", str), "build_number": ("Build", str),
    "os_version": ("System", str), "device_model": ("Device", str), "locale": ("Locale", str),
    "free_memory_mb": ("Free memory", "{:,} MB".format),
    "battery_level": ("Battery", lambda level: f"{level:.0%}" if level >= 0 else "unknown"),
    "is_charging": ("Charging", lambda is_charging: "yes" if is_charging else "no"),
    "device_id_hash": ("Device id", str), "session_id": ("Session", str), "id": ("Report", str),
    "clock_ahead_ms": ("Clock", lambda ms: f"fast by {ms // SECOND:,} s")}


def _context(report: JsonObject) -> list[tuple[str, str]]:
    """Name and value of what a crash says about the device, then of the fields that this server does not know."""
    known = [(name, as_text(report[field])) for field, (name, as_text) in _CONTEXT.items() if field in report]
    return known + [(name, _as_text(value)) for name, value in report.get("extra", {}).items()
                    if name != "breadcrumbs" or not _crumbs(report)]


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


def build_name(build: JsonObject) -> str:
    """What a build is called, such as Shop 1.3.0 (48)."""
    number = build["build_number"] and f"({build['build_number']})"
    return " ".join(filter(None, (build["binary"] or "a build", build["app_version"], number)))


def _tooltip(text: str) -> str:
    return f' title="{escape(_shorten(text))}"' if text else ""


_SHOWN_FIELDS = {*_FIELDS_OF, "frame", "in_app", "symbolicated", "inlined"}


def _details(event: JsonObject) -> str:
    """The first twenty properties and unknown fields of an event."""
    given = {**event.get("properties", {}), **event.get("extra", {})}
    return ", ".join(f"{name}: {_shorten(_as_text(value), 100)}" for name, value in list(given.items())[:20])


def _as_text(value: Any) -> str:
    """Any JSON value for a reader: a list has an item to a line."""
    items = value if type(value) is list else [value]
    return _shorten("\n".join(item if type(item) is str else json.dumps(item, ensure_ascii=False) for item in items),
                    SHOWN_TEXT)


def _options(choices: Iterable[Any], chosen: Any = None) -> str:
    """Of values, or of pairs of a value and its name."""
    pairs = [each if type(each) is tuple else (each, each) for each in choices]
    return "".join(f'<option value="{escape(str(value))}"{" selected" if value == chosen else ""}>'
                   f"{escape(str(name))}</option>" for value, name in pairs)


# == Templates =================================================================
# The HTML and CSS of the pages. Templates know only `for` and `if`; `{{ }}` escapes, `{{! }}` takes HTML that was made
# above. What several templates share is a constant or a function with their source, such as _list() and _form().

_PAGES = (("/", "Overview"), ("/crashes", "Crashes"), ("/usage", "Usage"), ("/releases", "Releases"),
          ("/apps", "Apps"))
_HINTS = {
    400: "The address or the form is not one that these pages make.",
    403: "This form belongs to a session that is over. Open the page again, and then send it.",
    404: "It may have expired, or belong to an app that was deleted.",
    405: "This address is for another kind of request.",
    500: "The reason is in the server's log.",
    503: "The database cannot be used now. The reason is in the server's log; try again in a moment."}
_ICON = ("data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Cpath d='M1 11h4l2-8 "
         "3 11 2-6h3' fill='none' stroke='%23c0392b' stroke-width='2'/%3E%3C/svg%3E")


class Column(NamedTuple):
    """A column of a list on a page."""

    label: str
    cell: str  # template source, in which `row` is what is listed
    css: str = ""  # on a narrow screen, a cell of the class "main" comes first, and "main" and "bare" have no label
    condition: str = ""  # an expression of the template; where it is false, the column is left out


def _list(rows: str, *columns: Column, empty: str = "", row_attributes: str = "") -> str:
    """A table of `rows`, an expression of the template. On a narrow screen, each cell shows its label instead."""
    head, body = "", ""
    for label, cell, css, condition in columns:
        css = f' class="{css}"' if css else ""
        start, end = (f"% if {condition}:\n", "% end\n") if condition else ("", "")
        head += f'{start}<th scope="col"{css}>{label}</th>\n{end}'
        body += f'{start}<td{css} data-label="{label}">{cell}</td>\n{end}'
    return (f'% if {rows}:\n<table class="list"><thead><tr>\n{head}</tr></thead><tbody>\n% for row in {rows}:\n'
            f"<tr{row_attributes}>\n{body}</tr>\n% end\n</tbody></table>\n"
            f'% else:\n<p class="empty">{empty}</p>\n% end\n')


def _form(path: str, content: str, **hidden: str) -> str:
    """A form with the token that read_form() checks."""
    fields = "".join(f'<input type="hidden" name="{name}" value="{value}">\n'
                     for name, value in {"form_token": "{{page.form_token}}", **hidden}.items())
    return f'<form method="post" action="{{{{page.root}}}}{path}">\n{fields}{content}</form>'


_COUNT, _TIME, _TEXT = '{{number(row["%s"])}}', '{{!when(row["%s"])}}', '<bdi>{{shorten(row.get("%s", ""), 40)}}</bdi>'
_CRASHES = Column("Crashes", _COUNT % "count", "number")
_VERSION, _SYSTEM = Column("Version", _TEXT % "app_version"), Column("System", _TEXT % "os_version")
_DEVICE = Column("Device", _TEXT % "device_model")
_SEEN = (Column("First seen", _TIME % "first_seen"), Column("Last seen", _TIME % "last_seen"))
_APP = Column("App", '<bdi>{{row["app"]}}</bdi>', condition="not page.app and len(apps) > 1")
_CRASH_FREE = Column("Crash-free sessions", '{{percent(row["crash_free_sessions"])}}', "number")
_ADOPTION = Column("Adoption", '{{"%.1f" % row["adoption"]}} %', "number")
_GROUP_LINK = """\
<a href="{{link("/crashes/" + row["group_hash"])}}"><bdi>{{culprit(row)}}</bdi></a>
% if row["is_new"]:
<b class="new">new</b>
% end
% if row["state"] != "open" or row["regressed_at"]:
<b class="new">{{row["state"] if row["state"] != "open" else "regressed"}}</b>
% end
"""
_GROUP = Column("Group", _GROUP_LINK + """\
<code><bdi>{{row["exception_type"] if row["place"] else ""}}</bdi></code>
<span class="reason"><bdi>{{shorten(row["exception_reason"])}}</bdi></span>""", "main")
_BRIEF_GROUP = Column("Group", _GROUP_LINK + """\
% about = [row["app"]] if not page.app and len(apps) > 1 else []
% about += [row["exception_type"]] if row["place"] else []
<span class="brief reason"><bdi>{{shorten(": ".join([*about, row["exception_reason"]]), 100)}}</bdi></span>""", "main")
_RELEASE_LINK = ('<a href="{{link("/crashes", app=row["app"], version=row["app_version"])}}">'
                 '<bdi>{{row["app_version"]}}</bdi></a>')
_TILES = """<div class="tiles">
% for name, value, note, chart in tiles:
<section><h2>{{name}}</h2><p class="figure">{{value}}</p><p class="note">{{note}}</p>{{!chart}}</section>
% end
</div>
"""
_NO_RELEASE = "No release yet: reports that carry an <code>app_version</code> show here."


def _steps_list(rows: str) -> str:
    return _list(rows, Column("Time", "{{row[0]}}", "number"), Column(
        "Action", '<bdi>{{row[1]}}</bdi> <span class="reason">{{row[2]}}</span>', "bare"))


_FILTER = """<form class="filter" method="get" action="{{page.root}}{{page.path}}">
<input type="hidden" name="app" value="{{page.app or ""}}">
"""
_TRIAGE = """<section class="triage"><h2>{{group["state"].capitalize()}}\
{{" in " + group["fixed_in"] if group["fixed_in"] and group["state"] == "resolved" else ""}}
% if group["state"] == "open" and group["regressed_at"]:
again since {{!when(group["regressed_at"])}}
% end
</h2><div class="actions">
% if len(group_apps) > 1:
<p class="note">Several apps have it. Decide for
% for name in group_apps:
<a href="{{link(page.path, app=name)}}"><bdi>{{name}}</bdi></a>
% end
</p>
% else:
% if group["state"] != "resolved":
""" + _form("{{page.address}}", """<button>Resolve</button>
<label>in version <input name="fixed_in" value="{{next_build}}" maxlength="500" size="14"></label>
""", state="resolved", app="{{group_apps[0]}}") + """
% end
% if group["state"] != "open":
""" + _form("{{page.address}}", "<button>Reopen</button>", state="open", app="{{group_apps[0]}}") + """
% end
% if group["state"] != "muted":
<details><summary>Mute</summary>
""" + _form("{{page.address}}", """<p><label>until <input type="date" name="until"></label>
<label>or for <input type="number" name="more_crashes" min="1" max="2147483647"> more crashes</label>
<label>or for <input type="number" name="more_devices" min="1" max="2147483647"> more devices</label></p>
<p><button>Mute it</button> <span class="note">With none of them: until somebody opens it.</span></p>
""", state="muted", app="{{group_apps[0]}}") + """</details>
% end
<details><summary>Comment</summary>
""" + _form("{{page.address}}", """<p><textarea name="comment" rows="3" cols="60" maxlength="5000" required>
</textarea></p>
<p><button>Add it</button></p>
""", app="{{group_apps[0]}}") + """</details>
% end
</div>
% if group["history"]:
<ol class="history">
% for entry in reversed(group["history"]):
<li>{{!when(entry["at"])}} {{entry["what"]}} <bdi class="reason">{{shorten(entry["detail"] or "", 5000)}}</bdi></li>
% end
</ol>
% end
</section>
"""
_PAGE_LINKS = """% if "cursor" in parameters:
<a class="more" href="{{link(page.path, **{**parameters, "cursor": None})}}">First page</a>
% end
% if next:
<a class="more" href="{{link(page.path, **{**parameters, "cursor": next})}}" rel="next">Next page</a>
% end
"""

_TEMPLATES = {
    "layout": """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><meta name="robots" content="noindex">
<title>{{shorten(title, 80)}} - backfeedr</title><link rel="icon" href="{{icon}}"><style>{{!style}}</style></head>
<body><header><a class="brand" href="{{link("/")}}">backfeedr</a>
% if apps is not None:
<nav aria-label="Pages">
% for path, name in pages:
<a href="{{link(path)}}"{{!' aria-current="page"' if page.section == path else ""}}>{{name}}</a>
% end
</nav>
""" + _form("/sign-out", '<button class="plain">Sign out</button>') + """
% end
</header>
% if apps and page.section != "/apps" and (len(apps) > 1 or apps[0].is_test):
<nav class="apps" aria-label="Apps">
<a href="{{link(page.section, app=None)}}"{{!' aria-current="true"' if not page.app else ""}}>All live apps</a>
% for app in apps:
<a href="{{link(page.section, app=app.name)}}"{{!' aria-current="true"' if page.app == app.name else ""}}
><bdi>{{app.name}}</bdi>{{" (test)" if app.is_test else ""}}</a>
% end
</nav>
% end
<main><h1><bdi>{{shorten(title)}}</bdi></h1>
{{!body}}</main>
<footer>All days and times are UTC.</footer></body></html>
""",
    "message": """<p>{{text}}</p>
<p><a href="{{page.root}}{{target}}">{{label}}</a></p>
""",
    "sign_in": """<div class="sign-in">
% if problem:
<p class="problem" role="alert">{{problem}}</p>
% end
""" + _form("/sign-in", """<input name="username" value="admin" autocomplete="username" hidden>
<p><label for="token">Admin token</label>
<input id="token" type="password" name="token" autocomplete="current-password" required autofocus></p>
<p><button>Sign in</button></p>
<p class="note">The server printed it at its first start. <code>BACKFEEDR_AUTH_TOKEN</code> sets another one.</p>
""", next="{{target}}") + "</div>\n",
    "overview": """% for warning in warnings:
<p class="problem" role="alert">{{warning}}</p>
% end
% if is_empty:
<section class="hint"><p>Nothing has been received yet. Send a first crash, with the key of an app
(<a href="{{link("/apps")}}">Apps</a> makes a new one):</p>
<pre>{{curl_line(page.url, "bf_live_your_key")}}</pre></section>
% end
<section><h2><a href="{{link("/releases")}}">Is the latest release worse?</a></h2>
<div class="verdicts">
% for row in verdicts:
% verdict = row["verdict"] or {}
<p>""" + _RELEASE_LINK + """ <bdi>{{"" if page.app or len(verdicts) < 2 else row["app"]}}</bdi>
<b{{!' class="problem"' if verdict.get("word") == "worse" else ""}}>
{{verdict.get("text") or "nothing to compare it with"}}</b>
% if verdict.get("before") and verdict.get("interval"):
<span class="note">compared with <bdi>{{shorten(verdict["before"], 40)}}</bdi> at the same age, in percentage points:
{{"{:+.1f} to {:+.1f}".format(*verdict["interval"])}}</span>
% end
</p>
% end
</div>
% if not verdicts:
<p class="empty">""" + _NO_RELEASE + """</p>
% end
</section>
<div class="halves"><section><h2>New and regressed in 7 days: {{number(new_count)}}</h2>
""" + _list(
        "new", _BRIEF_GROUP, _CRASHES, _SEEN[1], empty="No group is new.") + """</section>
<section><h2><a href="{{link("/crashes", days=7)}}">To fix first</a></h2>
""" + _list(
        "first", _BRIEF_GROUP, Column("Devices", _COUNT % "devices", "number"), _CRASHES, _SEEN[1],
        empty="No crash in the last 7 days.") + """
<p class="note">By devices that crashed in the newest release in 7 days, halved for each day since the last crash.</p>
</section></div>
<section>""" + _TILES + """</section>
<section><h2><a href="{{link("/releases")}}">Latest releases</a></h2>
""" + _list(
        "releases", Column("Version", _RELEASE_LINK + """
<span class="reason"><bdi>{{"" if page.app else row["app"]}}</bdi></span>""", "main"),
        _CRASH_FREE, _ADOPTION, empty=_NO_RELEASE) + """</section>
<div class="halves"><section><h2>Exception types, 30 days</h2>{{!bar_chart(types)}}</section>
<section><h2>Crashing devices, 30 days</h2>{{!bar_chart(devices)}}</section></div>
""",
    "crashes": _FILTER + """<label>Version <input name="version" list="versions"
value="{{parameters.get("version", "")}}"></label><datalist id="versions">{{!options(versions)}}</datalist>
<label>Days
<select name="days">{{!options(day_choices, parameters["days"])}}</select></label>
<label>Sorted by <select name="sort">{{!options(sorts, parameters.get("sort", "crashes"))}}</select></label>
<label>State <select name="state"><option value="">all</option>{{!options(states, parameters.get("state"))}}</select>
</label>
<label>Text <input type="search" name="text" value="{{parameters.get("text", "")}}"></label>
<button>Show</button></form>
<p class="note">
% if parameters["days"] == "all":
All days that are kept. <a href="{{link("/crashes", **{**parameters, "days": 7, "cursor": None})}}">The last 7 days</a>
% else:
The last {{"{} days".format(parameters["days"]) if parameters["days"] > 1 else "day"}}, today included.
<a href="{{link("/crashes", **{**parameters, "days": "all", "cursor": None})}}">All days</a>
% end
</p>
""" + _list(
        "groups", _CRASHES, _GROUP,
        _APP._replace(cell='<bdi>{{", ".join(row["apps"])}}</bdi>'),
        Column("30 days", '{{!sparkline(row["days"], "Crashes")}}'),
        Column("Devices", _COUNT % "devices", "number"),
        Column("Versions", '<bdi>{{", ".join(shorten(version, 40) for version in row["versions"][-2:])}}</bdi>'
                           '{{", +{}".format(len(row["versions"]) - 2) if len(row["versions"]) > 2 else ""}}'),
        *_SEEN, empty="""
% if parameters != {"days": "all"} and not is_empty:
No crash fits. <a href="{{link("/crashes", days="all")}}">Show all</a>
% else:
No crash is kept{{" of " + page.app if page.app else ""}}. When one comes in, it is here at once;
<a href="{{link("/apps")}}">Apps</a> has the keys to send one with.
% end
""") + _PAGE_LINKS,
    "group": """<p><b><bdi>{{group["exception_type"] if group["place"] else ""}}</bdi></b>
<span class="reason"><bdi>{{shorten(report.get("exception_reason", ""), 5000)}}</bdi></span></p>
<dl class="facts"><div><dt>Crashes</dt><dd>{{number(group["count"])}}</dd></div>
<div><dt>Devices</dt><dd>{{number(group["devices"])}}</dd></div>
% for label, at in (("First seen", group["first_seen"]), ("Last seen", group["last_seen"])):
<div><dt>{{label}}</dt><dd>{{!when(at) if at else "-"}}</dd></div>
% end
<div><dt>Group</dt><dd><code>{{group["group_hash"]}}</code></dd></div>
<div><dt>To pass on</dt><dd><a href="{{link(page.path + ".txt")}}">text</a>
<a href="{{link(page.path + ".md")}}">Markdown</a></dd></div></dl>
""" + _TRIAGE + """\
% if not report:
<p class="empty">Its crashes have expired. What was decided stays.</p>
% else:
<section><h2>Crashes per day</h2>{{!chart}}</section>
<section><h2>{{"A crash" if parameters else "The latest crash"}}, {{!when(report["occurred_at"])}}</h2>
<p class="note">
% for id, name, rel in ((older, "Older crash", "prev"), (newer, "Newer crash", "next")):
% if id:
<a href="{{link(page.path, report=id)}}" rel="{{rel}}">{{name}}</a>
% end
% end
</p>
<div class="crash"><div>
% if frames:
<ol class="trace" start="0">
% for symbol, place, is_own, raw in frames[:max_frames]:
<li{{!' class="own"' if is_own else ""}}{{!tooltip(raw)}}><code><bdi>{{shorten(symbol, 1000)}}</bdi></code>
<span class="place"><bdi>{{shorten(place)}}</bdi></span></li>
% end
</ol>
% if frames[max_frames:]:
<p class="note">and {{number(len(frames) - max_frames)}} further frames</p>
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
<p class="empty">This report came without a stack trace.</p>
% end
</div><dl class="context"><div><dt>Occurred</dt><dd>{{!when(report["occurred_at"])}}</dd></div>
<div><dt>Received</dt><dd>{{!when(report["received_at"])}}</dd></div>
% for name, value in context:
<div{{!' class="long"' if len(value) > 80 else ""}}><dt><bdi>{{shorten(name, 100)}}</bdi></dt>
<dd><bdi>{{value}}</bdi></dd></div>
% end
</dl></div></section>
<div class="halves">
% if crumbs:
<section><h2>Breadcrumbs</h2>
""" + _steps_list("crumbs") + """</section>
% end
% if before:
<section><h2><a href="{{link("/events", app=report["app"], session_id=report["session_id"])}}">Events of its
session</a></h2>
""" + _steps_list("before") + """</section>
% end
</div>
<div class="thirds"><section><h2>Versions</h2>{{!bar_chart(group["versions"], group["count"])}}</section>
<section><h2>Systems</h2>{{!bar_chart(group["systems"], group["count"])}}</section>
<section><h2>Devices</h2>{{!bar_chart(group["device_models"], group["count"])}}</section></div>
<section><h2>Its crashes</h2>
""" + _list(
        'group["reports"]',
        Column("Received", '<a href="{{link(page.path, report=row["id"], cursor=parameters.get("cursor"))}}">'
                           '{{!when(row["received_at"])}}</a>'),
        _APP, _VERSION, _SYSTEM, _DEVICE,
        Column("Reason", '<span class="reason"><bdi>{{shorten(row.get("exception_reason", ""), 120)}}</bdi></span>',
               condition="has_reasons"),
        row_attributes="""{{!' aria-current="true"' if row["id"] == report["id"] else ""}}"""
    ) + _PAGE_LINKS + "</section>\n% end\n",
    "events": """% if "session_id" in parameters:
<p>Session <code><bdi>{{parameters["session_id"]}}</bdi></code>, in the order in which its events came.
<a href="{{link("/events")}}">All events</a></p>
% else:
""" + _FILTER + """<label>Type
<select name="type"><option value="">all</option>{{!options(types, parameters.get("type"))}}</select></label>
<label>Name <input name="name" value="{{parameters.get("name", "")}}"></label>
<label>Session <input name="session_id"></label> <button>Show</button></form>
% end
""" + _list(
        "events", Column("Occurred", _TIME % "occurred_at"),
        Column("Event", '{{row["type"]}} <b><bdi>{{shorten(row.get("name", ""), 80)}}</bdi></b>', "main"),
        _APP, Column("Properties", '<span class="reason"><bdi>{{details(row)}}</bdi></span>'),
        _VERSION, _DEVICE, Column("Session", """
% if row.get("session_id") and "session_id" not in parameters:
<a href="{{link("/events", session_id=row["session_id"])}}"><bdi>{{shorten(row["session_id"], 12)}}</bdi></a>
% end
"""), empty="""
% if next:
None of the 20,000 events that were looked at fits.
% elif parameters:
No event fits. <a href="{{link("/events")}}">Show all</a>
% else:
No event is kept{{" of " + page.app if page.app else ""}}.
<code>examples/client.py</code> shows how an app sends its sessions.
% end
""") + _PAGE_LINKS,
    "usage": _TILES + """<section><h2>Retention of the devices first seen in the last 60 days</h2></section>
""" + _TILES.replace("in tiles:", "in back:") + """<div class="halves"><section>
<h2><a href="{{link("/events")}}">Events, 30 days</a></h2>
""" + _list(
        "events", Column("Event", '<a href="{{link("/events", type=row["type"], name=row["name"])}}"><bdi>'
                         '{{shorten(row["name"], 80) or "(no name)"}}</bdi></a> <span class="reason">'
                         '{{row["type"]}}</span>', "main"),
        Column("30 days", '{{!sparkline(row["days"], "Events")}}'), Column("Events", _COUNT % "count", "number"),
        empty="No event in 30 days.") + """<p><a href="{{link("/events")}}">All events, one by one</a></p></section>
<section><h2><a href="{{link("/releases")}}">Adoption, 7 days</a></h2>
""" + _list(
        "releases", Column("Version", _RELEASE_LINK, "main"), _APP._replace(condition="not page.app"), _ADOPTION,
        Column("Sessions in all", _COUNT % "sessions", "number"), empty=_NO_RELEASE) + "</section></div>\n",
    "releases": """<p class="note">In the order of
% if "sort" in parameters:
<a href="{{link("/releases")}}">first appearance</a> | versions</p>
% else:
first appearance | <a href="{{link("/releases", sort="version")}}">versions</a></p>
% end
""" + _list(
        "releases", Column("Version", _RELEASE_LINK, "main"),
        Column("Verdict", '{{(row["verdict"] or {}).get("text", "-")}}'), _APP._replace(condition="not page.app"),
        _CRASH_FREE, Column("Crash-free devices", '{{percent(row["crash_free_devices"])}}', "number"),
        Column("Crashes", _COUNT % "crashes", "number"), Column("Sessions", _COUNT % "sessions", "number"),
        _ADOPTION._replace(label="Adoption, 7 days"), *_SEEN, empty=_NO_RELEASE),
    "apps": """% if "problem" in notice:
<p class="problem" role="alert">{{notice["problem"]}}.</p>
% end
% if "message" in notice:
<section class="hint" role="status"><p>{{notice["message"]}}</p>
% if "key" in notice:
<p><code class="key">{{notice["key"]}}</code></p><p>It goes into the app. To try it:</p>
<pre>{{curl_line(page.url, notice["key"])}}</pre>
% end
% if notice.get("secret"):
<p><code class="key">{{notice["secret"]}}</code></p>
% end
</section>
% end
% for app in apps:
<section><h2><bdi>{{app.name}}</bdi>{{" (test)" if app.is_test else ""}}</h2>
<p class="note">Made {{!when(iso(app.created_at))}}. <a href="{{link("/", app=app.name)}}">Its figures</a></p>
""" + _list(
        "keys[app.name]", Column("Key", "<code>{{row.prefix}}...</code>"),
        Column("Made", "{{!when(iso(row.created_at))}}"), Column("In use", """
% if row.revoked_at:
revoked {{!when(iso(row.revoked_at))}}
% else:
<details><summary>Revoke</summary><p>What apps with this key send is refused from then on.</p>
""" + _form("/apps", "<button>Revoke it</button>", action="revoke", key="{{row.hash}}") + """</details>
% end
""", "bare"), empty="It has no key, so nothing can be sent to it.") + '<div class="actions">\n' + _form(
            "/apps", "<button>Make a further key</button>", action="key", name="{{app.name}}") + """
<details><summary>Delete the app</summary>
""" + _form("/apps", """<p>This deletes its keys and all that it sent. To be sure, type its name.</p>
<label>Name <input name="typed" autocomplete="off" required></label> <button class="danger">Delete it</button>
""", action="delete", name="{{app.name}}") + """</details></div></section>
% end
<section><h2>A new app</h2>
""" + _form("/apps", """<p><label>Name <input name="name" maxlength="100" required></label>
<label><input type="checkbox" name="test" value="1"> a test app, whose reports count in no public figure</label></p>
<p><button>Make it, with a first key</button></p>
""", action="create") + """</section>
<section><h2>Alerts</h2>
""" + _list(
        "channels", Column("Channel", '<code><bdi>{{row["id"]}}: {{row["address"]}}</bdi></code>', "main"),
        Column("App", '<bdi>{{row["app"] or "all live apps"}}</bdi>'),
        Column("Facts", '{{row["kinds"].replace(",", ", ")}}'),
        Column("Last sent", '{{!when(iso(row["sent_at"])) if row["sent_at"] else "never"}}'), Column("State", """
% if row["ended_at"]:
<span class="problem">ended {{!when(iso(row["ended_at"]))}}: its receiver wants no more</span>
% elif row["error"]:
<span class="problem">{{row["error"]}}, {{!when(iso(row["error_at"]))}}; {{row["waiting"]}} waiting</span>
% else:
{{"{} waiting".format(row["waiting"]) if row["waiting"] else "good"}}
% end
"""), Column("Change", _form("/apps", '<button class="plain">Test</button>', action="test-channel", id='{{row["id"]}}')
             + " " + _form("/apps", '<button class="plain">Remove</button>', action="remove-channel",
                           id='{{row["id"]}}'), "bare"),
        empty="Nobody is told of new or regressed crashes yet.") + """
<div class="actions"><details><summary>Add a channel</summary>
""" + _form("/apps", """<p class="note">A webhook (https), slack+https, ntfy+https, or what Apprise knows.</p>
<p><label>Address <input name="url" size="30" required></label>
<label>App <select name="app"><option value="">all live apps</option>{{!options(app.name for app in apps)}}</select>
</label></p><p>
% for kind, is_on in fact_kinds.items():
<label><input type="checkbox" name="on-{{kind}}" value="1"{{" checked" if is_on else ""}}> {{kind}}</label>
% end
</p><p><label>Hour of the digest, UTC <input type="number" name="hour" min="0" max="23" value="7"></label>
<label><input type="checkbox" name="reason" value="1"> with the reasons of crashes, which then leave this host</label>
</p>
<p><button>Add it</button></p>
""", action="add-channel") + """</details></div></section>
<section><h2>Feed</h2>
<p>{{"The feed of new and regressed crashes has an address." if has_feed else "A feed has new and regressed crashes."}}
""" + _form("/apps", '<button>Make a new address</button>', action="make-feed") + """
% if has_feed:
""" + _form("/apps", '<button>Withdraw it</button>', action="withdraw-feed") + """
% end
</p></section>
""",
    "feed": """<?xml version="1.0" encoding="utf-8"?>
<feed xmlns="http://www.w3.org/2005/Atom"><title>Crashes{{" of " + page.app if page.app else ""}}</title>
<id>{{page.url}}/crashes.atom{{"?" + urlencode({"app": page.app}) if page.app else ""}}</id>
<updated>{{updated}}</updated><author><name>backfeedr</name></author>
<link rel="self" href="{{page.url}}/crashes.atom?{{page.query}}"/><link href="{{page.url}}/crashes"/>
% for row in news:
<entry><id>{{urn(row["app"], row["created_at"], row["group_hash"], row["what"] != "new" and row["at"])}}</id>
<title>{{row["what"].capitalize()}}: {{row["exception_type"]}}{{" in " + row["place"] if row["place"] else ""}}</title>
<updated>{{iso(row["at"])}}</updated>
<link href="{{page.url}}/crashes/{{row["group_hash"]}}?{{urlencode({"app": row["app"]})}}"/>
<summary>{{row["app"]}}{{", first in " + row["first_version"] if row["first_version"] else ""}}</summary></entry>
% end
</feed>
"""}

STYLE = """
:root { color-scheme: light dark; --paper: #fcfbf8; --ink: #1f1e1b; --soft: #66635b; --rule: #dcd8cd; --tint: #f3f0e8;
  --link: #1d5a96; --mark: #2f6da8; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --paper: #161614; --ink: #e9e6de; --soft: #a19d92; --rule: #383631;
  --tint: #201f1c; --link: #8cbcf0; --mark: #7fb0e4; --bad: #ff8f80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 0 1.25rem 2rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; -webkit-text-size-adjust: 100%; }
code, pre, td.number, .figure, .brand, .trace, .facts dd, .long dd { font-family: ui-monospace, Consolas, monospace; }
dl, dd, form, .figure, .chart p, .tiles :is(section, h2) { margin: 0; }
th, dt, footer, .note, .trace, .filter label { color: var(--soft); font-size: 0.9em; }
.empty, .reason, .place, .chart p { color: var(--soft); }
header, nav, .facts, .filter, .actions { display: flex; flex-wrap: wrap; gap: 0.4rem 1.3rem; align-items: baseline; }
header { padding: 0.9rem 0 0.6rem; border-bottom: 2px solid var(--ink); } header nav { flex: 1; }
.apps { padding: 0.5rem 0; border-bottom: 1px solid var(--rule); font-size: 0.92em; }
.facts { column-gap: 2.2rem; }
a, summary, .plain { color: var(--link); }
h2 a, .brand, a[aria-current] { color: inherit; } a[aria-current] { border-bottom: 2px solid var(--mark); }
nav a, .brand { text-decoration: none; padding: 0.2rem 0; }
a[aria-current], .brand, .own, .key { font-weight: 600; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 1.4rem 0 0.8rem; }
h2 { font-size: 0.95rem; margin: 0 0 0.5rem; }
main section { margin: 1.75rem 0 0; min-width: 0; }
.tiles, .halves, .thirds { --least: 24rem; display: grid; gap: 0 2.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(var(--least), 100%), 1fr)); }
.tiles { --least: 9rem; gap: 1.5rem 2rem; } .thirds { --least: 17rem; }
.tiles section { border-top: 1px solid var(--rule); padding-top: 0.7rem; } .tiles h2 { font-weight: 400; }
.figure { font-size: 1.9rem; line-height: 1.2; }
.note, .verdicts p { margin: 0.2rem 0; }
.brief { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 1; overflow: hidden;
  word-break: break-all; }
footer { margin-top: 3rem; padding-top: 0.6rem; border-top: 1px solid var(--rule); }
table { border-collapse: collapse; width: 100%; } th { text-align: left; font-weight: 400; }
th, td { padding: 0.4rem 1.2rem 0.4rem 0; vertical-align: top; } :is(th, td):last-child { padding-right: 0; }
time, .number { white-space: nowrap; } .number { text-align: right; }
.list tr { border-bottom: 1px solid var(--rule); }
.list th { white-space: normal; overflow-wrap: normal; }
.list tr[aria-current], .own, .hint, pre, .long dd, button { background: var(--tint); }
.list td:is([data-label="App"], [data-label="Versions"], [data-label="Verdict"]) { min-width: 6.5rem; }
.list th.number:first-child, .bars .number { width: 1%; }
.bars th { color: inherit; font-size: 1em; width: 42%; }
.bars :is(th, td) { padding-block: 0.15rem; }
svg { display: block; } .bars svg { margin-top: 0.4rem; }
rect, circle { fill: var(--mark); } line { stroke: var(--rule); }
.marks line, polyline { stroke: var(--mark); stroke-width: 2; stroke-linecap: round; fill: none; }
.day { fill-opacity: 0; } .day:hover { fill-opacity: 0.15; }
.chart { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 0.35rem 0.6rem; }
.chart p { display: flex; justify-content: space-between; font-size: 12px; line-height: 1; }
.chart p:first-child { flex-direction: column; text-align: right; } .chart p:last-child { grid-column: 2; }
.crash { display: grid; gap: 1.5rem 2.5rem; grid-template-columns: minmax(0, 2fr) minmax(0, 1fr); }
.trace { margin: 0; padding-left: 2.6rem; }
li { padding: 0.15rem 0 0.15rem 0.6rem; border-left: 3px solid transparent; }
.own { color: var(--ink); border-left-color: var(--bad); } .own .place { color: var(--link); }
.place { font-weight: 400; padding-left: 0.6rem; }
.context > :not(.long) { display: grid; grid-template-columns: 7rem minmax(0, 1fr); gap: 0 0.8rem; padding: 0.2rem 0; }
pre, .long dd { margin: 0.2rem 0; padding: 0.5rem 0.7rem; white-space: pre-wrap; font-size: 0.88em; max-height: 22rem;
  overflow-y: auto; }
form { display: inline-block; }
.filter { align-items: end; margin-bottom: 1rem; } .filter label { display: grid; }
input, select, button, textarea { font: inherit; color: inherit; border: 1px solid var(--soft); border-radius: 3px;
  padding: 0.3rem 0.6rem; max-width: 100%; }
input, select, textarea { background: var(--paper); }
button, summary { cursor: pointer; } button:hover { border-color: var(--ink); }
.plain { border: 0; padding: 0.2rem 0; background: none; } .danger, .problem { color: var(--bad); }
.sign-in { max-width: 24rem; } .sign-in :is(form, input) { width: 100%; } .sign-in label { display: block; }
.hint { margin-bottom: 1.5rem; padding: 0.3rem 1rem 0.8rem; border-left: 3px solid var(--mark); }
[type=number] { width: 7rem; } .history { margin: 0.8rem 0 0; padding: 0; list-style: none; }
.key { font-size: 1.1em; user-select: all; } .actions { margin-top: 0.6rem; }
.more { display: inline-block; margin: 1rem 1.5rem 0 0; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
@media (max-width: 60rem) {
  .crash { grid-template-columns: minmax(0, 1fr); }
  .list thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .list, .list tbody { display: block; }
  .list tr { display: flex; flex-wrap: wrap; gap: 0 1.2rem; padding: 0.5rem 0; }
  .list td { padding: 0.1rem 0; text-align: left; white-space: normal; }
  .list td:not(.main, .bare)::before { content: attr(data-label) " "; color: var(--soft); font: 0.85em system-ui; }
  .list .main { order: -1; flex-basis: 100%; }
  .list td:empty, .list td:has(> bdi:empty), .list td:has(> .reason > bdi:empty) { display: none; }
  .list svg { display: inline-block; vertical-align: middle; }
  header nav { order: 1; flex-basis: 100%; column-gap: 0.8rem; }
  .brand { flex: 1; }
  .bars th { width: 50%; }
}
@media print { header nav, header form, .apps, .filter, .actions, .more { display: none; } }
"""

PAGE_HEADERS = {
    "Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer", "Content-Security-Policy": (
        "default-src 'none'; img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'; style-src"
        f" 'sha256-{base64.b64encode(sha256(STYLE)).decode()}'")}

_TEMPLATE_GLOBALS = {
    "bar_chart": bar_chart, "build_name": build_name,
    "culprit": lambda group: _shorten(_culprit(group), 120), "curl_line": curl_line,
    "details": _details, "icon": _ICON,
    "iso": iso_time,
    "number": "{:,}".format, "percent": lambda share: "-" if share is None else f"{share:.2f} %", "options": _options,
    "pages": _PAGES, "shorten": _shorten, "sparkline": sparkline,
    "style": STYLE, "tooltip": _tooltip}


# == Backfeedr =================================================================
# The WSGI callable. A handler reads "decode, check, store, answer"; whoever may
# not come so far has been turned away before.

class Backfeedr(Closing):
    """The server as a WSGI callable, for any mount point.

    `Backfeedr(db_path="crashes.db")` takes further settings from the environment,
    `Backfeedr(Settings(...))` takes none. Raises SettingsError and StoreError. `store`
    is for keys and queries from Python. A new database gets an app and an admin token:
    `announce` is told them, once, in words for the operator. `clock` gives seconds
    since 1970. Close it, or use it as a context manager.

    `store` takes the place of the file that the settings name, and is closed with the
    server; `limiter` takes that of a RateLimiter, which knows of this process only.
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
        self._limiter = limiter or RateLimiter(self.settings.rate_limit)
        self.refused = RefusedReports(self.store)
        # Python runs one thread at a time. Those that wait here sleep until it is their
        # turn; those that wait for the interpreter wake up each switch interval to ask.
        self._turn = threading.Lock()
        self._requests: Counter = Counter()  # by method, route and status
        self._counting = threading.Lock()
        self._ingestion: dict[str, tuple[Callable[[bytes, str], Reports], Callable[..., dict[str, Any]]]] = {
            # By path: what makes reports of a body and a device, and an answer of the reports and their seqs.
            "/api/v1/crashes": (lambda body, _: [parse_crash(decode_json(body))], lambda crashes, seqs: {
                "id": crash_id(seqs[0]), "group_hash": crashes[0].group_hash}),
            "/api/v1/events": (lambda body, _: [parse_event(decode_json(body))], lambda events, seqs: {
                "id": event_ids(seqs)[0]}),
            "/api/v1/events/batch": (lambda body, _: parse_batch(decode_json(body)), lambda events, seqs: {
                "count": len(seqs), "ids": event_ids(seqs)}),
            "/api/v1/diagnostics": (lambda body, device: parse_diagnostics(body, self.store.now, device),
                                    _diagnostics_answer)}
        made = self.store.start(self.settings.api_key, self.settings.auth_token)
        if made != (None, None):  # without `announce`, another server has the app, whose address is not known
            known = _url(self.settings.host, self.settings.port) if announce else "https://YOUR-SERVER"
            (announce or sys.stderr.write)(first_start_text(made, self.settings.public_url.rstrip("/") or known))
        self.pages = Dashboard(self.store, self.metrics, self.refused, self.alerts, self.settings.public_url)
        self._router = self._routes()

    def __call__(self, environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ.get("REQUEST_METHOD", ""), environ.get("PATH_INFO", "")
        if len(path) > 1 and path.endswith("/"):  # the same path
            path = path[:-1]
            environ = {**environ, "PATH_INFO": path}
        if method == "POST" and path in self._ingestion:  # not through bottle, which would take as long as our own part
            body, status, headers = _answer(self._answer_submission, environ)
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
        answer = self._router(environ, start_response)
        route = environ["bottle.route"]
        self._count(route.method if route else "other", route.rule if route else "other", bottle.response.status_code)
        if outer is not None:  # an outer bottle restores the path of the request that it finds here
            bottle.request.bind(outer)
        return answer

    def _count(self, method: str, rule: str, status: int) -> None:
        """By the route and not the path: a stranger could make up paths without end."""
        with self._counting:
            self._requests[method, rule, status] += 1

    def deliver(self) -> Counter:
        """Sends the alerts that are due, each once; how many were `sent`, and of how many the try `failed`. `serve`
        does so by itself; under another server, call it every minute, on one host or on several."""
        return self.alerts.deliver()

    def close(self) -> None:
        """Closes the database. May be called twice."""
        self.store.close()

    def _routes(self) -> bottle.Bottle:
        ask, router = self.metrics, _Router(self.pages)
        for method, path, handler in (
                ("GET", "/health", self._health),
                ("GET", "/metrics/daily-crashes", self.public_route(ask.daily_crashes, "days")),
                ("GET", "/metrics/crash-types", self.public_route(ask.crash_types, "days")),
                ("GET", "/metrics/devices", self.public_route(ask.devices, "days")),
                ("GET", "/metrics/active-devices", self.public_route(ask.active_devices, "days")),
                ("GET", "/metrics/sessions", self.public_route(ask.sessions, "days")),
                ("GET", "/metrics/retention", self.public_route(ask.retention, "days")),
                ("GET", "/overview", self.public_route(ask.overview)),
                ("GET", "/releases", self._releases),
                ("GET", "/crashes", self.admin_route(
                    ask.groups, "version", "days", "text", "state", "sort", "limit", "cursor")),
                ("GET", "/crashes/<group_hash>", self._group),
                ("PATCH", "/crashes/<group_hash>", self._triage),
                ("GET", "/events", self.admin_route(ask.events, "type", "name", "session_id", "limit", "cursor")),
                ("GET", "/symbols", self.admin_route(ask.symbols)),
                ("PUT", "/symbols/<uuid>", self._put_symbols)):
            router.route("/api/v1" + path, method, partial(_response, handler))
        router.route("/metrics", "GET", partial(_response, self._prometheus))
        for path in self._ingestion:  # __call__ answers these; here they give a GET its 405
            router.route(path, "POST", partial(_response, self._answer_submission))
        for method, path, page in self.pages.routes():
            router.route(path, method, page)
        return router

    def _releases(self, environ: Environ) -> Answer:
        """As a public route; but a stranger who names no app does not learn the names of all."""
        status, answer = self.public_route(self.metrics.releases, "sort")(environ)
        if not _parameters(environ, "app") and not self._is_admin(environ):
            for release in answer["releases"]:
                del release["app"]
        return status, answer

    def _group(self, environ: Environ, group_hash: str) -> Answer:
        try:
            return self.admin_route(self.metrics.group, "limit", "cursor")(environ, group_hash=group_hash)
        except Moved as moved:
            raise self._moved(environ, moved)

    def _moved(self, environ: Environ, moved: Moved) -> Moved:
        moved.location = self.pages.request(environ).moved("/api/v1/crashes/" + moved.group_hash)
        return moved

    def _triage(self, environ: Environ, group_hash: str) -> Answer:
        body = _read_body(environ, self.settings.max_body_size)
        self._check_admin(environ)
        plain = _decompress(environ, body, self.settings.max_body_size)
        changes, named = parse_triage(decode_json(plain), self.store.now), _parameters(environ, "app")
        try:
            self.store.triage(group_hash, changes, **named)
        except Moved as moved:
            raise self._moved(environ, moved)
        return 200, self.metrics.group(group_hash, **named)

    def _put_symbols(self, environ: Environ, uuid: str) -> Answer:
        body = _read_body(environ, self.settings.max_body_size)
        self._check_admin(environ)
        build = image_uuid(uuid)
        if not build:
            raise Refusal("invalid uuid", detail="it is not that of a build, as dwarfdump --uuid prints it")
        part = parse_symbols(_decompress(environ, body, self.settings.max_body_size))
        answer, was_held = self.store.put_symbols(build, part)
        if answer["complete"] and not was_held:
            self.store.regroup_in_background()
        return 200 if was_held else 201, answer

    def _health(self, environ: Environ) -> Answer:
        self.store.check()
        return 200, {"status": "ok"}

    def _prometheus(self, environ: Environ) -> Answer:
        self._check_admin(environ)
        with self._counting:
            requests = sorted(self._requests.items())
        figures = [
            ("requests_total", "counter", "Requests that reached the app, by route.", [
                ('{method="%s",path="%s",status="%d"}' % key, n) for key, n in requests]),
            *([("rate_limited_total", "counter", "Requests with reports that the rate limit refused, by app.", [
                ("{app=%s}" % json.dumps(app, ensure_ascii=False), n) for app, n in list(self.refused.total.items())])]
              if self.refused.total else []),
            *self.store.vitals()]
        lines = [line for name, kind, meaning, samples in figures for line in (
            f"# HELP backfeedr_{name} {meaning}", f"# TYPE backfeedr_{name} {kind}",
            *(f"backfeedr_{name}{suffix} {value:.15g}" for suffix, value in samples))]
        return 200, "\n".join([*lines, ""])

    def can_batch(self, method: str, path: str, key: str) -> bool:
        """Whether such a request may share a batch. One about which another host or the database has to be
        asked would hold up the others."""
        return (method == "POST" and path in self._ingestion and not getattr(self._limiter, "waits", True)
                and self.store.is_cached_key(sha256(key.encode("latin-1", "replace"))))

    def submit_all(self, environs: Iterable[Environ]) -> None:
        """Decodes requests to the ingestion and stores what they carry in one commit. The WSGI call, which does
        so for a request that comes alone, then only answers each."""
        submissions = []
        for environ in environs:
            environ[_SUBMISSION] = submission = Submission()
            submissions.append(submission)
            try:
                self._decode(environ, submission)
            except Exception as error:
                if isinstance(error, Refusal):
                    error.__traceback__ = error.__context__ = None  # which hold the body
                submission.error = error
            if not submission.reports:  # Apple's payload may be empty
                submission.receipt = Receipt(range(0), True)
        self.store.add_all([each for each in submissions if each.error is None and each.reports])
        # A key may have been revoked since it was cached, which a commit finds out, and a refusal must as well.
        # Each key is looked up once, because a database that is away makes each look wait.
        refused = [each for each in submissions if each.key_hash and not each.reports]
        for key_hash in {each.key_hash for each in refused}:
            try:
                error = None if self.store.is_active_key(key_hash) else Refusal("invalid API key")
            except StorageUnavailable as unavailable:
                error = unavailable
            for each in refused:
                if error and each.key_hash == key_hash:
                    each.error = error

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
            signature = self._check_signature(environ, key, body)
            plain = _decompress(environ, body, self.settings.max_body_size)
            try:
                submission.reports = parse(plain, _header(environ, "X_BACKFEEDR_DEVICE").decode("utf-8", "replace"))
            except RecursionError:  # at a depth that can be read, but not written again
                raise Refusal("invalid JSON", detail="it is nested too deep") from None
            submission.idempotency = _idempotency(environ, signature, plain)

    def _check_signature(self, environ: Environ, key: bytes, body: bytes) -> bytes:
        """The signature, if it is good; b"" where there is none and none is required."""
        timestamp, signature = _header(environ, "X_BACKFEEDR_TIMESTAMP"), _header(environ, "X_BACKFEEDR_SIGNATURE")
        if "HTTP_X_BACKFEEDR_TIMESTAMP" in environ or "HTTP_X_BACKFEEDR_SIGNATURE" in environ:
            verify(key, timestamp, signature, body, self.store.now)
        elif self.settings.require_signature:
            raise Refusal("signature required")
        return signature

    def public_route(self, question: Callable[..., JsonObject], *names: str) -> Handler:
        """A route for everyone, or for the admin where public_metrics is off. Takes `app` and these parameters."""
        if not self.settings.public_metrics:
            return self.admin_route(question, *names)
        return lambda environ, **path: (200, question(**path, **_parameters(environ, "app", *names)))

    def admin_route(self, question: Callable[..., JsonObject], *names: str) -> Handler:
        """A route for the admin."""
        def handler(environ: Environ, **path: str) -> Answer:
            self._check_admin(environ)
            return 200, question(**path, **_parameters(environ, "app", *names))
        return handler

    def _is_admin(self, environ: Environ) -> bool:
        scheme, _, token = _header(environ, "AUTHORIZATION").partition(b" ")
        return scheme.lower() == b"bearer" and self.store.is_admin(token.strip())

    def _check_admin(self, environ: Environ) -> None:
        if not re.match(b"(?i)bearer +[^ ]", _header(environ, "AUTHORIZATION")):
            raise Refusal("missing admin token")
        if not self._is_admin(environ):
            raise Refusal("invalid admin token")


def _diagnostics_answer(reports: Reports, seqs: Sequence[int]) -> JsonObject:
    return {"count": len(seqs), "ids": [crash_id(seq) if type(each) is Crash else event_ids([seq])[0]
                                        for each, seq in zip(reports, seqs)],
            "group_hashes": [each.group_hash if type(each) is Crash else None for each in reports]}


class RefusedReports:
    """Counts what the rate limit refuses, by app: all phones of an app share its key, and are told nothing more than
    to come again. Logs it once a minute."""

    def __init__(self, store: Store):
        self._store, self._lock, self._logged_at = store, threading.Lock(), 0
        self._apps: dict[bytes, str] = {}
        self.total: Counter = Counter()
        self._days: Counter = Counter()  # by app and day

    def count(self, key_hash: bytes) -> None:
        app = self._apps.get(key_hash) or self._apps.setdefault(key_hash, self._store.app_of_key(key_hash))
        with self._lock:
            self.total[app] += 1
            self._days[app, self._store.now // DAY] += 1
            is_due = not 0 <= self._store.now - self._logged_at < 60 * SECOND
            self._logged_at = self._store.now if is_due else self._logged_at
            texts = self._texts(app) if is_due else []
        for text in texts:
            log.warning("%s", text)

    def today(self, app: str | None = None) -> list[str]:
        """A sentence for each app of which something was refused today."""
        with self._lock:
            return self._texts(app)

    def _texts(self, app: str | None) -> list[str]:
        today = self._store.now // DAY
        return [f"{count:,} report{'s' if count > 1 else ''} of {name} {'were' if count > 1 else 'was'} refused today:"
                " rate limit"
                for (name, day), count in sorted(self._days.items()) if day == today and app in (None, name)]


class _Router(bottle.Bottle):
    """Bottle, whose own refusals are JSON, or a page of ours for a browser that is not at the API."""

    def __init__(self, pages: Dashboard):
        super().__init__()
        self._pages = pages

    def default_error_handler(self, error: bottle.HTTPError) -> bottle.HTTPResponse:
        environ, status = bottle.request.environ, error.status_code
        if "text/html" in environ.get("HTTP_ACCEPT", "") and not environ["PATH_INFO"].startswith("/api/"):
            answer = self._pages.error_page(self._pages.request(environ), status, _error_text(status))
        else:
            answer = bottle.HTTPResponse(_error_body(status), status, _HEADERS)
        if "Allow" in error.headers:
            answer.set_header("Allow", error.headers["Allow"])
        return answer


_SUBMISSION = "backfeedr.submission"  # in an environ


def _answer(handler: Handler, environ: Environ, **path: str) -> tuple[bytes, int, dict[str, str]]:
    """Body, status and headers of what a handler says, whatever happens: a text as it is, all else as JSON."""
    headers = _HEADERS
    try:
        status, answer = handler(environ, **path)
        if type(answer) is str:
            return answer.encode(), status, {**headers, "Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
    except Refusal as refusal:
        status, answer = _STATUS.get(str(refusal), 400), {"error": str(refusal)}
        if refusal.detail:
            answer["detail"] = refusal.detail
        if refusal.retry_after is not None:
            headers = {**headers, "Retry-After": str(refusal.retry_after)}
        if isinstance(refusal, Moved):
            headers = {**headers, "Location": refusal.location}
        if status == 415:
            headers = {**headers, "Accept-Encoding": "gzip"}
    except Exception:
        log.exception("unexpected error")
        return _error_body(500), 500, headers
    return json.dumps(answer).encode(), status, headers


def _response(handler: Handler, **path: str) -> bottle.HTTPResponse:
    return bottle.HTTPResponse(*_answer(handler, bottle.request.environ, **path))


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
    waitress = None  # type: ignore[assignment]
    HTTPChannel = HTTPRequestParser = ErrorTask = Task = ThreadedTaskDispatcher = WSGITask = object  # type: ignore

DRAIN_SECONDS = 4.0  # how long a stop waits for requests that have begun to arrive
QUIET_SECONDS = 0.3  # after so long without a byte, a stop takes a connection to be idle
SWITCH_SECONDS = 0.002  # how long a thread may keep the interpreter while others wait for it
REQUEST_SECONDS = 60  # for a request to arrive, between two of a connection, and for an answer to get on
PIPELINED = 4  # requests of a connection that are read ahead; what follows waits as bytes
MAX_UNSENT = 65_536  # bytes; while more wait for a client, its next request is not begun
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
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: (stopping.set(), server.pull_trigger()))
        print("backfeedr on", _url(settings.host, settings.port), flush=True)
        print("".join(made), end="", flush=True)
        app.store.regroup_in_background()  # what a migration or a stop has left to do
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
    """A request parser. Answers requests that waitress leaves without an answer, or refuses for a proxy's header."""

    came = 0.0  # when it was complete
    environ: Environ | None = None  # once a thread has begun with it

    def parse_header(self, header_plus: bytes) -> None:
        try:
            super().parse_header(header_plus)
        except ValueError as error:
            # For `http://[` or a length of 5,000 digits. waitress logs it and closes the connection.
            raise ParsingError(str(error)) from None
        finally:
            if self.headers.get("X_FORWARDED_PROTO") not in (None, "http", "https"):
                del self.headers["X_FORWARDED_PROTO"]  # waitress would refuse the request, when a batch has stored it
            # Where no body follows or it is refused, waitress sends `100 Continue` and waits for one.
            if not self.chunked and not 0 < self.content_length < self.adj.max_request_body_size:
                self.expect_continue = False


class _Task(Task):
    """Common to all answers."""

    def build_response_header(self) -> bytes:
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
        body = _error_body(error.code)
        self.status = f"{error.code} {error.reason}"
        self.response_headers.extend(_HEADERS.items())
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class _AppTask(_Task, WSGITask):
    """An answer of the app."""

    def get_environment(self) -> Environ:
        """One for each request and not for each task: a batch has put the submission into it."""
        if self.request.environ is None:
            self.request.environ = super().get_environment()
        return self.request.environ


class _Channel(HTTPChannel):
    """A connection."""

    parser_class, task_class, error_task_class = _Parser, _AppTask, _ErrorTask
    __repr__ = object.__repr__  # that of waitress has the client's address, and is logged with errors
    held = b""  # what came after PIPELINED requests
    is_paused = False  # the next request waits until the client has read answers
    progressed = 0.0  # when the last bytes were sent, or the first were there to send

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.reading = threading.Lock()

    def received(self, data: bytes) -> bool:
        """Counts the time of a request from its beginning. waitress counts from the last byte, so a client that
        sends a byte now and then would keep its connection for ever. Reads few requests ahead: waitress would make
        megabytes of a packet of them."""
        with self.reading:
            begun, self.held, received = self.request, self.held + data, False
            while self.held and len(self.requests) < PIPELINED:
                request, size = self.request, 1024
                if request is not None and request.headers_finished:
                    size = max(size, request.content_length - request.body_bytes_received)
                part, self.held = self.held[:size], self.held[size:]
                received = super().received(part)
            now = self.last_activity
            is_new = begun is None or self.request is not begun
            self.began = now if is_new else min(now, self.began + len(data) / SLOWEST)
            self.last_activity = self.began
            return received

    def service(self) -> None:
        """Sends the answer at once if the next request of the connection is here already. Because of `send_bytes`
        the I/O thread would keep it until that one is answered, too."""
        had_output = self.total_outbufs_len
        self.progressed = self.progressed if had_output else time.time()
        super().service()
        self.progressed = self.progressed if had_output else self.last_activity
        if self.held:
            self.received(b"")
        if self.requests:
            with self.outbuf_lock:
                if self.connected:
                    self._flush_exception(self._flush_some, do_close=False)

    def pause(self) -> bool:
        """Whether the next request has to wait: it would be begun for a client that does not read."""
        if self.total_outbufs_len <= MAX_UNSENT:
            return False
        with self.outbuf_lock:
            self.is_paused = self.connected and self.total_outbufs_len > MAX_UNSENT
            return self.is_paused

    def _flush_some(self, do_close: bool = True) -> bool:
        """Takes the lock, which waitress's I/O thread does not. While that sent an answer, a worker sent the
        `100 Continue` for the next request, and both were sent twice and mixed."""
        with self.outbuf_lock:
            sent = super()._flush_some(do_close)
            if sent:
                self.progressed = self.last_activity
            if self.is_paused and self.total_outbufs_len <= MAX_UNSENT:
                self.is_paused = False
                self.server.add_task(self)
            return sent

    def writable(self) -> bool:
        """Not where `handle_write` would leave a small answer to the thread that works on it. waitress's I/O thread
        would spin until that is done, and take the interpreter from the thread that it waits for."""
        if self.requests and not self.will_close and self.total_outbufs_len < self.adj.send_bytes:
            return False
        return super().writable()


def _close_stuck(server: Any, now: float) -> None:
    """Closes connections that were idle for too long. waitress spares those whose client does not read."""
    for channel in list(server.active_channels.values()):
        since = channel.progressed if channel.total_outbufs_len else channel.last_activity
        if since < now - REQUEST_SECONDS and (channel.total_outbufs_len or not channel.requests):
            channel.handle_close()  # at once: to a client that does not read, the socket is never ready


class _Dispatcher(ThreadedTaskDispatcher):
    """Gives all submissions that come while a thread decodes to that thread, which stores them in one commit.
    waitress wakes a thread for each request, which takes longer than the work; all others it still gets."""

    def __init__(self, app: Backfeedr, threads: int):
        super().__init__()
        self.set_thread_count(threads)
        self.app, self.is_stopped = app, False
        self.coming: SimpleQueue = SimpleQueue()  # of channels whose requests wait for a batch; None wakes a thread
        self.taking = threading.Lock()  # held by the thread that waits for requests and decodes them
        self.batch_threads = [threading.Thread(target=self.run, daemon=True) for _ in range(BATCH_THREADS)]
        for thread in self.batch_threads:
            thread.start()

    def add_task(self, channel: _Channel) -> None:
        if channel.pause():
            return
        request = channel.requests[0]
        request.came = time.monotonic()
        if request.error or not self.app.can_batch(
                request.command, request.path, request.headers.get("X_BACKFEEDR_KEY", "")):
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

    def take_all(self, batch: list[_Channel]) -> Iterator[Environ]:
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

    def shutdown(self, *arguments: Any, **options: Any) -> bool:
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
        max_request_header_size=32768, inbuf_overflow=131072,
        channel_timeout=REQUEST_SECONDS, cleanup_interval=10, recv_bytes=65536, asyncore_use_poll=True,
        outbuf_high_watermark=1 << 40,  # at which a worker would wait for the client
        trusted_proxy="127.0.0.1", trusted_proxy_headers={"x-forwarded-proto"}, clear_untrusted_proxy_headers=True)
    server.channel_class = _Channel
    server.maintenance = partial(_close_stuck, server)
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
    files = 1024
    with suppress(ImportError, ValueError, OSError):
        import resource
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        endless = resource.RLIM_INFINITY
        files = 4096 if hard == endless else min(4096, hard)
        if soft != endless and soft < files:
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
            busy = channel.requests or channel.request or channel.held or channel.total_outbufs_len
            if not busy and time.time() - channel.last_activity > QUIET_SECONDS:
                channel.will_close = True
    server.task_dispatcher.shutdown(timeout=1)


# == Operations ================================================================
# Back up, export, import and check a database while the server runs. What takes
# long calls `progress` with how far it has come.

BACKUP_PAGES = 1000  # copied between two calls of `progress`
IMPORT_LINES = 1000  # at most in a transaction
IMPORT_BYTES = 1_000_000  # after which a transaction ends, too
MAX_LINE = 1 << 27  # bytes of an exported report: far above any body that a server accepts
LOW_DISK = 100_000_000  # bytes; with less than this free, `check` fails

Progress = Callable[..., Any]


def backup(store: Store, path: Path, progress: Progress) -> None:
    """Copies the database as it is now to a new file that only its owner can read. Raises StoreError. The copy gets its
    name only when it is complete."""
    if path.exists():
        raise StoreError(f"there is a file {path} already")
    try:
        # A temporary file has mode 0600, and is deleted also after an error.
        with tempfile.NamedTemporaryFile(prefix=path.name + ".", suffix=".partial", dir=path.parent) as partial:
            _copy_database(store, partial.name, progress)
            os.link(partial.name, path)  # fails if another file took the name meanwhile
    except OSError as error:
        raise StoreError(f"cannot write the backup {path}: {error.strerror}") from None


def _copy_database(store: Store, path: str, progress: Progress) -> None:
    """Copies within one read transaction: it blocks no writer, and no writer makes SQLite start the copy again.
    The price is a WAL that grows until the copy is done."""
    with store.reading() as db, closing(sqlite3.connect(path)) as copy:
        db.execute("begin")
        db.execute("select 1 from apps").fetchone()  # a read transaction starts with its first read
        try:
            db.backup(copy, pages=BACKUP_PAGES, progress=lambda _, left, pages: progress(pages - left, pages))
        except sqlite3.Error as error:
            raise StoreError(f"cannot write the backup: {error}") from None  # the copy failed, not the store
        db.execute("commit")


def write_jsonl(out: TextIO, stored: StoredReport) -> None:
    """Writes a report as a line of JSON: as it was sent, with its id, app and time of receipt."""
    out.write(_encode(_exported(stored)) + "\n")


def csv_writer(out: TextIO, kind: type) -> Callable[[StoredReport], Any]:
    """Writes reports as a table with a header. A spreadsheet reads no cell of it as a formula."""
    table = csv.DictWriter(out, ["id", "app", "is_test", "received_at", "clock_ahead_ms",
                                *(each for each in kind._fields if each != "images")])
    table.writeheader()
    return lambda stored: table.writerow({name: _csv_cell(value) for name, value in _exported(stored).items()})


def _exported(stored: StoredReport) -> JsonObject:
    report_id = crash_id(stored.seq) if type(stored.report) is Crash else event_ids([stored.seq])[0]
    return as_sent({"id": report_id, "app": stored.app, "is_test": stored.is_test, "received_at": stored.received_at,
                    "clock_ahead_ms": stored.clock_ahead_ms, **stored.report._asdict()}, exact_time)


# Spreadsheets skip control characters, and take the full-width signs for the others.
_FORMULA = re.compile("[-=+@\uff0d\uff1d\uff0b\uff20\x00-\x1f\x7f-\x9f]")


def _csv_cell(value: Any) -> Any:
    if type(value) in (list, dict):
        return _encode(value)
    return "'" + value if type(value) is str and _FORMULA.match(value) else value


def _parse_exported(line: bytes) -> StoredReport:
    """A report from a line of `write_jsonl`, checked like one from a client. Raises Refusal."""
    given = {"extra": {}, "clock_ahead_ms": 0, **decode_json(line)}
    group = given.pop("group_hash", "")  # computed again, unless the frames that make it were cut
    ours = {}
    for name, kind in (("app", str), ("id", str), ("is_test", bool), ("received_at", str), ("clock_ahead_ms", int),
                       ("extra", dict)):
        ours[name] = given.pop(name, None)
        if type(ours[name]) is not kind:
            raise Refusal(f"invalid {name}" if ours[name] is not None else f"missing {name}")
    if not 0 <= ours["clock_ahead_ms"] < 10_000 * 366 * DAY:  # all years there are
        raise Refusal("invalid clock_ahead_ms")
    try:
        received_at = parse_time(ours["received_at"])
    except ValueError:
        raise Refusal("invalid received_at") from None
    match = re.fullmatch("(evt_)?([0-7][0-9a-f]{15})", ours["id"])
    # A seq is never before its time of receipt. It may be about a day later, after the server's clock was set back.
    if not match or not first_seq(received_at) <= int(match[2], 16) < first_seq(received_at + 2 * DAY):
        raise Refusal("invalid id")
    report = (parse_event if match[1] else parse_crash)({**ours["extra"], **given})
    cut = ours["extra"].get("truncated")
    if type(cut) is list and "stack_trace" in cut and re.fullmatch("[0-9a-f]{16}", str(group)):
        report = report._replace(group_hash=group)
    return StoredReport(int(match[2], 16), ours["app"], ours["is_test"], received_at, ours["clock_ahead_ms"], report)


def import_jsonl(store: Store, lines: Iterable[bytes], progress: Progress) -> Counter:
    """Stores what `write_jsonl` wrote and returns the summed counts of `Store.import_`. Raises StoreError with the
    number of the first bad line; the good lines before it are stored then."""
    counts: Counter = Counter()
    try:
        for batch in _import_batches(lines):
            counts += store.import_(batch)
            progress(sum(counts.values()))
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


def check(path: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """The checks of a database, by name. Each returns what it found, or raises what is wrong."""
    yield "SQLite", check_sqlite
    if not (path.is_file() and os.access(path, os.R_OK)):  # of which there is nothing more to say
        yield "file", lambda: _check_access(path)
        return
    yield "disk", lambda: _check_disk(path)
    yield "file", lambda: _check_access(path)
    yield "schema", lambda: _check_schema(path)
    yield "pages", lambda: _check_pages(path)
    yield "roll-ups", lambda: _check_roll_ups(path)


def _check_disk(path: Path) -> str:
    free = shutil.disk_usage(path.parent).free
    if free < LOW_DISK:
        raise StoreError(f"only {megabytes(free)} are free")
    return f"{megabytes(free)} free"


def _check_access(path: Path) -> str:
    if not path.is_file():
        raise StoreError(f"there is no database {path}{_ANOTHER}")
    if not os.access(path, os.R_OK | os.W_OK):
        raise StoreError(f"{path} may not be read and written; a server could not use it")
    return f"{path}, {megabytes(path.stat().st_size)}, WAL {megabytes(_wal_size(path))}"


def _check_schema(path: Path) -> str:
    with closing(_open_read_only(path)) as db, closing(sqlite3.connect(":memory:")) as fresh:
        check_is_ours(db, path)
        version = db.pragma("user_version")
        if not version:
            raise StoreError("there are no tables")
        if version < SCHEMA_VERSION:
            return f"version {version}, which the next start upgrades to version {SCHEMA_VERSION}"
        fresh.executescript(SCHEMA)
        if missing := _schema_parts(fresh) - _schema_parts(db):
            raise StoreError(f"there is no {', '.join(sorted(missing))}")
        return f"version {version}"


def _schema_parts(db: sqlite3.Connection) -> set[str]:
    """The tables and indexes, each with each of its columns."""
    return {f"{kind} {name}" + f" with {column}" * bool(column) for kind, name, column in db.execute("""
        select master.type, master.name, columns.name
        from sqlite_master as master cross join pragma_table_xinfo(master.name) as columns
        where master.type = 'table'
        union
        select master.type, master.name, columns.name
        from sqlite_master as master cross join pragma_index_info(master.name) as columns
        where master.type = 'index'""") if not name.startswith("sqlite_")}


def channel_warnings(path: Path) -> list[str]:
    """Says which channels of alerts do not get through."""
    with suppress(sqlite3.Error), closing(_open_read_only(path)) as db:  # its schema may be an older one
        return [f"Channel {id} ({shown_address(url)}) has {'ended' if ended_at else 'failed'}: {error}"
                f" at {iso_time(error_at)}" for id, url, ended_at, error, error_at in db.execute(
                    "select id, url, ended_at, error, error_at from channels where error is not null order by id")]
    return []


def _check_pages(path: Path) -> str:
    with closing(_open_read_only(path)) as db:
        found = db.pragma("quick_check(1)")
        if found != "ok":
            raise StoreError(" ".join(found.splitlines()[-1:]))
        return f"{db.pragma('page_count'):,}, all sound"


def _check_roll_ups(path: Path) -> str:
    """Counts all reports again, by the same code into tables of its own, and compares. Sums outlive their reports. So
    where some have expired, a sum may be larger than what is counted again."""
    with closing(sqlite3.connect("", isolation_level=None, uri=True)) as db:  # "": a temporary file
        db.execute("attach database ? as stored", (f"{path.as_uri()}?mode={_read_only_mode(path)}",))
        db.executescript(FIGURE_TABLES)
        db.execute("begin")
        expired, = db.execute("""
            select coalesce(max(value), 0) from state where name like 'expired%' or name like 'early%'""").fetchone()
        recount(db)
        wrong = [table for figure in RollUps(db, 0).figures.values() for table in _unequal_tables(db, figure, expired)]
        wrong += ["durations"] if expired and db.execute("""
            select 1 from (select app_id, day, sessions, ended, 0 as durations from stored.session_days
                where day > (select max(day) - 399 from stored.session_days) and day > :expired
                union all select app_id, day, 0, 0, sessions from stored.durations where day > :expired) as both
            group by app_id, day having sum(ended) > sum(durations) or sum(sessions) < sum(ended) limit 1
            """, {"expired": (expired >> SEQ_BITS) // DAY}).fetchone() else []
    if wrong:
        raise StoreError(f"these tables are not what they should be: {', '.join(wrong)}")
    return "agree with the reports"


# Which can only have been longer.
SPANS = {"sessions": ("first_seq", "last_seq"), "groups": ("first_seen", "last_seen"),
         "releases": ("first_seen", "last_seen"), "devices": ("first_day", "last_hour"),
         "builds": ("first_seen", "app_id")}


def _unequal_tables(db: sqlite3.Connection, figure: Figure, expired: int) -> Iterator[str]:
    """Where reports have expired, days after them are compared, and what cannot be less than what is left. A device
    or a session whose first report is gone would count on a later day, or for a later release."""
    for table, sums in figure.sums.items():
        if table == "key_days":  # which no report tells
            continue
        columns, where = ", ".join(sums.key + sums.columns), ""
        if expired and table in ("crash_days", "group_days", "event_names"):
            where = f" where day > {(expired >> SEQ_BITS) // DAY + 1}"
        ours, theirs = (f"select {columns} from {place}.{table}{where}" for place in ("main", "stored"))
        queries = [f"{ours} except {theirs}", f"{theirs} except {ours}"]
        if table == figure.WINDOW[0]:  # whose old rows are deleted some time later
            queries = queries[:1]
        if expired and table in ("active_days", "device_hours"):
            queries = [f"select 1 from main.{table} as ours left join stored.{table} as theirs using"
                       f" ({', '.join(sums.key)}) where "
                       + " or ".join(f"ours.{each} > coalesce(theirs.{each}, 0)" for each in sums.columns)]
        elif expired and not where and table not in ("labels", "group_images", "group_devices", "group_sums"):
            continue
        if any(db.execute(query + " limit 1").fetchone() for query in queries):
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
        if db.execute(f"""
                select 1 from main.{table} as ours where {comparable} not exists (
                    select 1 from stored.{table} as theirs
                    where {same} and theirs.{first} <= ours.{first} and theirs.{last} >= ours.{last})
                limit 1""", {"settled": expired and expired + first_seq(HOUR)}).fetchone():
            yield table


# == Command line ==============================================================
# Every command works while the server runs: they share nothing but the file. To
# add one, write its function and add a row to _COMMANDS.

def main(argv: Sequence[str] | None = None, make: Callable[..., Backfeedr] = Backfeedr,
         open_store: Callable[..., Store] = Store) -> int:
    """Runs a command. Returns 0, or 1 after an error; exits with 2 for wrong usage."""
    try:
        arguments = _parser().parse_args(argv)
        overrides = {each.name: getattr(arguments, each.name) for each in fields(Settings)
                     if hasattr(arguments, each.name)}
        if arguments.run is _check:
            return _check(overrides)
        settings = Settings.from_env(**overrides)
        if arguments.run is serve:
            serve(settings, make)
            return 0
        arguments.public_url = settings.public_url
        retention_days = settings.retention_days if os.environ.get("BACKFEEDR_RETENTION_DAYS") else None
        with open_store(settings.db_path, retention_days=retention_days,
                        may_create=arguments.run in (_app_create, _import)) as store:
            arguments.run(store, arguments)
        return 0
    except BrokenPipeError:  # nobody reads the output any more, nor what Python flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except KeyboardInterrupt:
        problem: Any = "interrupted"
    except (SettingsError, StoreError, Refusal, OSError, UnicodeError, ImportError) as error:
        problem = error
    _print_stderr(f"backfeedr: {problem}")
    return 1


class CommandParser(argparse.ArgumentParser):
    """Says which word a misspelt one may mean."""

    def error(self, message: str) -> Any:
        wrong = re.search(r"invalid choice: (.+) \(choose from (.+)\)", message)
        meant = wrong and get_close_matches(wrong[1].strip("'"), re.findall(r"[\w-]+", wrong[2]), 1)
        super().error(f"{message}; did you mean {meant[0]}?" if meant else message)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="backfeedr", description=(
        "Crash reports and usage figures for iOS apps, on your own host. Without a command, it serves."))
    parser.add_argument("--version", action="version", version=f"backfeedr {__version__}")
    groups = {"": parser.add_subparsers(title="commands", metavar="COMMAND")}
    for name, run, text, arguments in (("", serve, "", _SERVER), *_COMMANDS):
        noun, _, verb = name.rpartition(" ")
        if noun not in groups:
            verbs = [each.split()[1] for each, *_ in _COMMANDS if each.startswith(noun + " ")]
            group = groups[""].add_parser(noun, help=", ".join(verbs))
            groups[noun] = group.add_subparsers(metavar="ACTION", required=True)
        command = groups[noun].add_parser(verb, help=text, description=text) if name else parser
        command.set_defaults(run=run)
        for argument, options in {**_DB, **arguments}.items():
            # Without a default, one that is not given stays unset, so that the environment decides.
            command.add_argument(argument, **{"default": argparse.SUPPRESS, **options})
    return parser


def _app_create(store: Store, arguments: argparse.Namespace) -> None:
    key = store.create_app(arguments.NAME, arguments.test)
    _print_stderr(f"Made the app {arguments.NAME!r}. Its API key, shown only this once:")
    print(key)


def _app_list(store: Store, arguments: argparse.Namespace) -> None:
    _print_table(("APP", "KIND", "KEYS", "CREATED"), [
        (app.name, "test" if app.is_test else "live", app.keys, _date(app.created_at)) for app in store.apps()])


def _app_delete(store: Store, arguments: argparse.Namespace) -> None:
    if not arguments.yes:
        _confirm(arguments.NAME)
    store.delete_app(arguments.NAME)
    _print_stderr(f"Deleted the app {arguments.NAME!r}, its keys and all its reports.")


def _confirm(name: str) -> None:
    """Asks for the app's name. Raises StoreError unless it is typed again."""
    if sys.stdin is None or not sys.stdin.isatty():
        raise StoreError(f"there is no terminal to confirm on; --yes deletes {name!r} without asking")
    print(f"This deletes all reports of the app {name!r}. Type its name again: ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().rstrip("\n") != name:
        raise StoreError("the names differ; nothing was deleted")


def _key_create(store: Store, arguments: argparse.Namespace) -> None:
    key = store.create_key(arguments.NAME)
    _print_stderr(f"Made another key for the app {arguments.NAME!r}, shown only this once:")
    print(key)


def _key_list(store: Store, arguments: argparse.Namespace) -> None:
    _print_table(("KEY", "APP", "CREATED", "REVOKED", "LAST USED", "REQUESTS IN 7 DAYS"), [
        (key.prefix + "...", key.app, _date(key.created_at), _date(key.revoked_at),
         _date(key.last_used and key.last_used * DAY), f"{key.requests:,}") for key in store.keys()])


def _key_revoke(store: Store, arguments: argparse.Namespace) -> None:
    key = store.revoke_key(arguments.PREFIX)
    _print_stderr(f"Revoked the key {key.prefix}... of the app {key.app!r}.")


def _device_show(store: Store, arguments: argparse.Namespace) -> None:
    found = Metrics(store).device(arguments.HASH)
    if not any(found.values()):
        raise StoreError(f"nothing is kept of a device {arguments.HASH!r}")
    print(json.dumps(found, indent=2, ensure_ascii=False), file=_harmless(sys.stdout))


def _device_forget(store: Store, arguments: argparse.Namespace) -> None:
    deleted = store.forget_device(arguments.HASH)
    if not deleted:
        raise StoreError(f"nothing is kept of a device {arguments.HASH!r}")
    _print_stderr(f"Forgot the device {arguments.HASH!r}: {_report_counts(deleted)}.")


def _symbols_list(store: Store, arguments: argparse.Namespace) -> None:
    found = Metrics(store).symbols()
    _print_table(("UUID", "BINARY", "ARCH", "ROWS", "SIZE", "UPLOADED"), [
        (each["uuid"], each["binary"], each["arch"], f"{each['rows']:,}", megabytes(each["size"]),
         each["uploaded_at"][:10] if each["complete"] else "not complete") for each in found["symbols"]])
    print("\nMissing, though crashes wait for them:\n" if found["missing"] else "\nNone are missing.")
    if found["missing"]:
        _print_table(("UUID", "BUILD", "APP", "CRASHES"), [
            (each["uuid"], build_name(each), each["app"] or "-", f"{each['crashes']:,}") for each in found["missing"]])


def _symbols_delete(store: Store, arguments: argparse.Namespace) -> None:
    _print_stderr(f"Deleted the symbols of the build {store.delete_symbols(arguments.UUID)}.")


def _alerts(store: Store, arguments: argparse.Namespace) -> Alerts:
    return Alerts(store, arguments.public_url, Metrics(store).digest)


def _alert_add(store: Store, arguments: argparse.Namespace) -> None:
    kinds = [kind for kind in re.split("[, ]+", arguments.on) if kind]
    number, secret = _alerts(store, arguments).add(arguments.URL, arguments.app, kinds, arguments.with_reason,
                                                   arguments.hour)
    _print_stderr(f"Made channel {number}." + " Its secret, shown only this once:" * bool(secret))
    if "http" in urlsplit(arguments.URL).scheme.split("+"):
        _print_stderr("What is sent there can be read on its way: only to this host is http:// as good as https://")
    if secret:
        print(secret)


def _alert_list(store: Store, arguments: argparse.Namespace) -> None:
    _print_table(("ID", "CHANNEL", "APP", "FACTS", "LAST SENT", "WAITING", "STATE"), [
        (each["id"], each["address"], each["app"] or "all live apps", each["kinds"], _date(each["sent_at"]),
         each["waiting"], "ended" if each["ended_at"] else each["error"] or "good")
        for each in _alerts(store, arguments).channels()])


def _alert_test(store: Store, arguments: argparse.Namespace) -> None:
    _alerts(store, arguments).test(arguments.ID)
    _print_stderr(f"Channel {arguments.ID} took a test message.")


def _alert_remove(store: Store, arguments: argparse.Namespace) -> None:
    _alerts(store, arguments).remove(arguments.ID)
    _print_stderr(f"Removed channel {arguments.ID}.")


def _deliver(store: Store, arguments: argparse.Namespace) -> None:
    done = _alerts(store, arguments).deliver()
    _print_stderr(f"Messages sent: {done['sent']:,}; failed, to be tried again: {done['failed']:,}")


def _prune(store: Store, arguments: argparse.Namespace) -> None:
    size = store.size
    with _progress("deleting: {:,} rows") as progress:
        deleted = store.prune(progress)
    kept = f"older than {store.retention_days} days" if store.retention_days else "(the retention keeps all)"
    _print_stderr(f"Deleted {_report_counts(deleted)} {kept}; gave back {megabytes(max(0, size - store.size))}"
                  f" of {megabytes(size)}.")


def _report_counts(rows: Counter) -> str:
    crashes, events = rows["crashes"], rows["events"]
    return f"{crashes:,} crash{'es' * (crashes != 1)} and {events:,} event{'s' * (events != 1)}"


def _backup(store: Store, arguments: argparse.Namespace) -> None:
    with _progress("copying: {:,} of {:,} pages") as progress:
        backup(store, Path(arguments.FILE), progress)
    _print_stderr(f"Wrote {arguments.FILE}, {megabytes(os.stat(arguments.FILE).st_size)}.")


def _export(store: Store, arguments: argparse.Namespace) -> None:
    if arguments.bom and arguments.format != "csv":
        raise StoreError("--bom is for --format csv: import reads jsonl without one")
    sys.stdout.reconfigure(encoding="utf-8", newline="")  # type: ignore[union-attr]
    kind, out = _KINDS[arguments.KIND], _harmless(sys.stdout)
    with _progress("exporting: {:,} " + arguments.KIND, sys.stdout.isatty()) as progress:
        out.write("\ufeff" * arguments.bom)
        reports = store.export(kind, arguments.app, arguments.since)
        write = csv_writer(out, kind) if arguments.format == "csv" else partial(write_jsonl, out)
        for number, stored in enumerate(reports, 1):
            write(stored)
            if number % PAGE_ROWS == 0:
                progress(number)
        sys.stdout.flush()


def _import(store: Store, arguments: argparse.Namespace) -> None:
    with _progress("importing: {:,} reports") as progress, arguments.FILE as file:
        counts = import_jsonl(store, iter(lambda: file.readline(MAX_LINE), b""), progress)
    _print_stderr(f"Stored {counts['stored']:,} reports; {counts['known']:,} were here already, and"
                  f" {counts['expired']:,} are older than the retention.")


def _check(overrides: dict[str, Any]) -> int:
    path = Path(overrides.get("db_path") or os.environ.get("BACKFEEDR_DB_PATH") or Settings.db_path).absolute()
    status = 0
    for name, look in chain([("settings", lambda: f"{len(fields(Settings.from_env(**overrides)))}, all good")],
                            check(path)):
        try:
            with _progress("checking the " + name) as progress:
                progress()
                found = look()
            print(f"ok  {name}: {found}", file=_harmless(sys.stdout))
        except (SettingsError, StoreError, sqlite3.Error, OSError) as error:
            print(f"BAD {name}: {error}", file=_harmless(sys.stdout))
            status = 1
    if path.is_file():
        with suppress(SettingsError):  # which was said above
            for warning in chain(size_warnings(path, Settings.from_env(**overrides).max_db_size),
                                 channel_warnings(path)):
                print(f"WARN {warning}", file=_harmless(sys.stdout))
    return status


@contextmanager
def _progress(text: str, quiet: bool = False) -> Iterator[Progress]:
    """Shows the progress of long work in one line of a terminal, at most ten times a second; clears it at the end."""
    due, quiet = 0.0, quiet or not sys.stderr.isatty()

    def show(*figures: int) -> None:
        nonlocal due
        if not quiet and time.monotonic() >= due:
            due = time.monotonic() + 0.1
            print("\r\x1b[K" + text.format(*figures), end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        if due:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class _Terminal:
    """A terminal that no report controls. Characters that move the cursor, begin a command or turn the direction of
    the text are written as JSON escapes them; tabs and line ends stay."""

    CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
                          "|\r(?!\n)")

    def __init__(self, out: TextIO):
        self._out = out

    def write(self, text: str) -> None:
        self._out.write(self.CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def _harmless(out: TextIO) -> Any:
    """Where to print what reports may have in them. To a pipe or a file it goes as it is."""
    return _Terminal(out) if out and out.isatty() else out  # a process may have none


def _print_stderr(text: str) -> None:
    print(text, file=_harmless(sys.stderr))


def _print_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    lines = [head, *rows]
    widths = [max(len(str(line[column])) for line in lines) for column in range(len(head))]
    for line in lines:
        print("  ".join(str(cell).ljust(width) for cell, width in zip(line, widths)).rstrip(),
              file=_harmless(sys.stdout))


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


_Arguments = Mapping[str, Mapping[str, Any]]  # what argparse is told of each
_KINDS = {"crashes": Crash, "events": Event}
_APP_NAME = {"NAME": dict(help="the app's name")}
_HASH = {"HASH": dict(help="the device_id_hash that the app sends")}
_CHANNEL_ID = {"ID": dict(type=int, help="the channel's number: see alert list")}
_DB = {"--db": dict(dest="db_path", metavar="FILE", help="the database (default: backfeedr.db)")}
_SERVER = {
    "--host": dict(help="the address to listen on (default: 127.0.0.1)"),
    "--port": dict(type=int, help="the port (default: 8080); 0 takes a free one"),
    "--verbose": dict(action="store_true", help="log a line for each request, on standard error")}
_COMMANDS = (  # name, function, help, arguments beside --db
    ("serve", serve, "start the server", _SERVER),
    ("app create", _app_create, "make an app and print its first key", {
        **_APP_NAME, "--test": dict(action="store_true", default=False, help="a test app: it is in no public figure")}),
    ("app list", _app_list, "list the apps", {}),
    ("app delete", _app_delete, "delete an app, its keys and all its reports", {
        **_APP_NAME, "--yes": dict(action="store_true", default=False, help="do not ask to type the name again")}),
    ("key create", _key_create, "make another key for an app and print it", _APP_NAME),
    ("key list", _key_list, "list the keys, each by its visible beginning", {}),
    ("key revoke", _key_revoke, "end a key at once", {
        "PREFIX": dict(help="the key, or enough of its beginning")}),
    ("device show", _device_show, "print all that is kept of a device, as JSON", _HASH),
    ("device forget", _device_forget, "delete all that is kept of a device", _HASH),
    ("symbols list", _symbols_list, "list the builds whose symbols are held, and those whose are missing", {}),
    ("symbols delete", _symbols_delete, "delete the symbols of a build", {
        "UUID": dict(help="the build's UUID, or enough of its beginning")}),
    ("alert add", _alert_add, "tell somebody of new and regressed crashes; prints the channel's secret", {
        "URL": dict(help="https://... (a webhook), slack+https://..., ntfy+https://HOST/TOPIC, or one of Apprise's"),
        "--app": dict(metavar="NAME", default=None, help="of this app (default: of all live ones)"),
        "--on": dict(metavar="FACT,...", default="", help="of these facts: " + ", ".join(
            kind + " (default)" * is_on for kind, is_on in FACT_KINDS.items())),
        "--with-reason": dict(action="store_true", default=False, help="send the crash's reason, too"),
        "--hour": dict(type=int, choices=range(24), metavar="H", default=7, help="of the digest, UTC (default: 7)")}),
    ("alert list", _alert_list, "list the channels, and what is wrong with them", {}),
    ("alert test", _alert_test, "send a test message, and say what came back", _CHANNEL_ID),
    ("alert remove", _alert_remove, "end a channel", _CHANNEL_ID),
    ("deliver", _deliver, "send the alerts that are due; a server does so by itself", {}),
    ("prune", _prune, "delete what is older than the retention, now", {}),
    ("backup", _backup, "write a copy of the database to a new file", {
        "FILE": dict(help="the new file; one that exists is not replaced")}),
    ("export", _export, "print crashes or events", {
        "KIND": dict(choices=_KINDS, help="which reports to print"),
        "--app": dict(metavar="NAME", default=None, help="of this app (default: of all)"),
        "--since": dict(metavar="DATE", type=_start_of_day, default=0,
                        help="received on this day (UTC) or later, like 2026-03-12"),
        "--format": dict(choices=("jsonl", "csv"), default="jsonl",
                         help="jsonl (the default), which import reads, or csv, for a spreadsheet"),
        "--bom": dict(action="store_true", default=False,
                      help="begin csv with a byte order mark, by which Excel knows that it is UTF-8")}),
    ("import", _import, "store what export has printed as jsonl", {
        "FILE": dict(type=_open_input, help="the file; - is standard input")}),
    ("check", _check, "say whether the database is as it should be", {}),
)


if __name__ == "__main__":
    sys.exit(main())
