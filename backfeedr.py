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

The sections, each of which uses only those above it:

    Settings        what an operator may choose
    Schema          the one SQLite file
    Values          refusals, times, ids, keys, group hashes
    Payloads        JSON in, a crash or an event out
    Signature       HMAC-SHA256 over a request
    RateLimiter     so many requests a minute and key
    RollUps         what a report changes in the figures
    Store           connections, the one write path, apps and keys
    Metrics         the questions asked of the store
    Requests        what a request carries, and what a client may be told
    Charts          numbers in, SVG out
    Dashboard       the pages that people look at
    Templates       their HTML and CSS
    Backfeedr       the WSGI callable
    Server          waitress, and how it stops
    Operations      backup, export, import, check
    Demo            a month of made-up reports, to look at
    Command line    serve, demo, app, key, device, prune, and the operations
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
import random
import re
import secrets
import shutil
import signal
import socket
import sqlite3
import sys
import tempfile
import threading
import time
import zlib
from bisect import bisect_left
from collections import Counter, defaultdict, deque, namedtuple
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, fields, replace
from datetime import date, datetime, timezone
from difflib import get_close_matches
from functools import lru_cache
from http import HTTPStatus
from itertools import accumulate, chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import (Any, BinaryIO, Callable, Deque, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional,
                    Sequence, Set, TextIO, Tuple, Union)
from urllib.parse import parse_qs, parse_qsl, quote, urlencode

# A virtual environment, because the Pythons of many systems refuse to be added to.
_MISSING = ("{} is missing; 'python3 -m venv .venv && .venv/bin/pip install bottle waitress' installs what it needs,"
            " and .venv/bin/python runs it")
try:
    import bottle
except ImportError:
    if __name__ != "__main__":
        raise
    sys.exit("backfeedr: " + _MISSING.format("bottle"))

__version__ = "0.1.0"

log = logging.getLogger("backfeedr")


# == Settings ==================================================================
#
# Every choice an operator has, with its unit and default. A value that makes no
# sense is refused when the settings are made, not when they are first used.

class SettingsError(ValueError):
    """A setting that makes no sense. `str()` is one line that names it."""

    def __init__(self, name: str, problem: str):
        super().__init__(f"{name}: {problem}")
        self.name, self.problem = name, problem


_RANGES = {"port": (0, 65535), "rate_limit": (0, 1_000_000), "max_body_size": (1, 1 << 30),
           "retention_days": (0, 36_500), "threads": (1, 1_000)}
_KINDS = {str: "a text", int: "a whole number", bool: "1 or 0"}
_NOT_OURS = {"BACKFEEDR_ENDPOINT"}  # where examples/client.py sends to


@dataclass(frozen=True)
class Settings:
    """What an operator may choose. Raises SettingsError for a value that makes no sense."""

    host: str = "127.0.0.1"
    port: int = 8080                                 # 0 takes a free one
    db_path: str = "backfeedr.db"
    api_key: str = field(default="", repr=False)     # a key of the app `default`; "": made at first start
    auth_token: str = field(default="", repr=False)  # the admin token; "": made at first start
    rate_limit: int = 100                            # requests a minute and key; 0 is off
    max_body_size: int = 1_048_576                   # bytes, as sent and again after decompression
    retention_days: int = 90                         # by the time of receipt; 0 keeps all
    require_signature: bool = False
    public_metrics: bool = True
    threads: int = 32
    public_url: str = ""                             # where clients reach the server, https:// where a proxy adds it
    verbose: bool = False                            # a line on standard error for each request

    def __post_init__(self) -> None:
        object.__setattr__(self, "db_path", os.fspath(self.db_path))
        for each in fields(self):
            value, kind = getattr(self, each.name), type(each.default)
            low, high = _RANGES.get(each.name, (None, None))
            if type(value) is not kind:
                raise SettingsError(each.name, f"{repr(value) if each.repr else 'it'} is not {_KINDS[kind]}")
            if low is not None and not low <= value <= high:
                raise SettingsError(each.name, f"{value} is not from {low} to {high}")
            if kind is str and (value.strip() != value or value and not value.isprintable()):
                raise SettingsError(each.name, "has a space at an end or a control character")
        if not self.host or self.db_path in ("", ":memory:"):
            raise SettingsError("db_path" if self.host else "host", "must name a " + ("file" if self.host else "host"))
        if not re.fullmatch(r"(https?://[A-Za-z0-9.:\[\]-]+(/[A-Za-z0-9._~%/-]*)?)?", self.public_url):
            raise SettingsError("public_url", f"{self.public_url!r} is not like https://crashes.example.com")

    @classmethod
    def from_env(cls, environ: Optional[Mapping[str, str]] = None, **overrides: Any) -> Settings:
        """Settings from the BACKFEEDR_* variables (of os.environ, unless `environ` is given).

        `overrides` come first; an empty variable counts as unset. An error names the variable,
        also one that is no setting: a misspelt one would leave open what it was to close.
        """
        environ = os.environ if environ is None else environ
        _refuse_unknown((name for name in environ if environ[name]), [each.name.upper() for each in fields(cls)])
        variables = {each.name: "BACKFEEDR_" + each.name.upper() for each in fields(cls)
                     if each.name not in overrides and environ.get("BACKFEEDR_" + each.name.upper())}
        try:
            read = {each.name: _from_text(each.name, environ[variables[each.name]], type(each.default))
                    for each in fields(cls) if each.name in variables}
            return cls(**{**read, **overrides})
        except SettingsError as error:
            raise SettingsError(variables.get(error.name, error.name), error.problem) from None


def _refuse_unknown(variables: Iterable[str], known: Sequence[str]) -> None:
    for name in variables:
        prefix, ours, rest = name.partition("BACKFEEDR_")
        if ours and not prefix and rest not in known and name not in _NOT_OURS:
            close = get_close_matches(rest, known, 1)
            raise SettingsError(name, "there is no such setting; " + (
                f"did you mean {ours}{close[0]}?" if close else f"after {ours} comes one of {', '.join(known)}"))


def _from_text(name: str, text: str, kind: type) -> Any:
    booleans = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if kind is int and re.fullmatch("-?[0-9]{1,18}", text):
        return int(text)
    if kind is bool and text.lower() in booleans:
        return booleans[text.lower()]
    if kind is str:
        return text
    raise SettingsError(name, f"{text!r} is not {_KINDS[kind]}")


# == Schema ====================================================================
#
# One SQLite file that its owner can open with any tool. A report is a row, under
# the field names of the API; times are milliseconds since 1970 UTC. The roll-ups
# below the reports change in the same transaction as they.
#
# `seq` is the time of receipt in milliseconds * 2^20 + a counter. It is the
# answered id, which so costs no byte and no index of its own; it is unique
# across files; and it ascends with arrival: inserts append, retention cuts from
# the front. A report counts at `occurred_at`, or at `received_at` when the
# device's clock is more than five minutes fast.

APPLICATION_ID = 0x62666472  # "bfdr": tells our files from other people's
SCHEMA_VERSION = 2

SCHEMA = """
create table apps (
    id integer primary key autoincrement,  -- never given twice
    name text not null unique, is_test integer not null, created_at integer not null);
create table keys (
    key_hash blob primary key,             -- SHA-256 of the key, which is itself kept nowhere
    app_id integer not null, prefix text not null, created_at integer not null, revoked_at integer
) without rowid;
create table secrets (name text primary key, hash blob not null) without rowid;  -- 'admin_token'
create table grants (                      -- what lets a browser in, by its SHA-256
    hash blob primary key, expires_at integer not null) without rowid;

create table crashes (
    seq integer primary key, id text generated always as (printf('%016x', seq)) virtual,
    app_id integer not null, received_at integer not null, occurred_at integer not null,
    group_hash text not null, exception_type text not null,
    app_version text, build_number text, os_version text, device_model text, device_id_hash text,
    locale text, free_memory_mb numeric, battery_level real,  -- 0 to 1; -1 is unknown
    is_charging integer,
    -- What may be long comes last: SQLite reads a row only as far as it must.
    exception_reason text, stack_trace text,  -- JSON
    extra text);                           -- JSON: the fields that this server does not know
create index crashes_by_group on crashes (  -- covers what groups are counted by
    app_id, group_hash, received_at, occurred_at, app_version, os_version, device_model, device_id_hash);
create table events (
    seq integer primary key, id text generated always as (printf('evt_%016x', seq)) virtual,
    app_id integer not null, received_at integer not null, occurred_at integer not null,
    type text not null, name text,
    app_version text, os_version text, device_model text, device_id_hash text, session_id text, locale text,
    properties text, extra text);          -- JSON

-- By what a request that was stored is known when it comes again.
create table replays (
    app_id integer not null, mark blob not null,   -- digest of the Idempotency-Key or the signature
    request blob not null,                         -- digest of path and body
    first_seq integer not null, reports integer not null,  -- their seqs follow one another
    received_at integer not null, primary key (app_id, mark)) without rowid;
create index replays_by_age on replays (received_at);

-- What is known of a device and a session as long as one report of theirs is kept.
create table devices (
    app_id integer not null, device_id_hash text not null,
    first_seen integer not null, last_seen integer not null, last_seq integer not null,  -- to the hour
    days_from integer not null, days blob not null,  -- bit n, the lowest being 0: seen on the day days_from + n
    versions text not null,                -- JSON: of each app_version, whether it crashed there: 0 or 1
    primary key (app_id, device_id_hash)) without rowid;
create table sessions (
    app_id integer not null, session_id text not null,
    first_seq integer not null, last_seq integer not null,  -- between them are its events
    started_at integer, ended_at integer, app_version text,  -- of its latest start and end
    primary key (app_id, session_id)) without rowid;

-- The roll-ups: sums, and what else an answer needs so as not to read the rows
-- above. They stay when the rows expire, but for labels and groups, which tell of
-- what is kept, and what is of the last week only. App 0 is all live apps together,
-- where a phone with two of them is one device.
create table hours (
    app_id integer not null, hour integer not null,  -- hours since 1970 UTC
    crashes integer not null default 0, sessions integer not null default 0,
    devices integer not null default 0,    -- last seen in this hour: the sum until now counts each once
    primary key (app_id, hour)) without rowid;
create table days (
    app_id integer not null, day integer not null,  -- days since 1970 UTC
    crashes integer not null default 0,
    dau integer not null default 0, wau integer not null default 0,  -- devices of this day, of the
    mau integer not null default 0,        -- 7 and the 30 days that end with it
    newcomers integer not null default 0, back_1 integer not null default 0,  -- devices first seen on this
    back_7 integer not null default 0, back_30 integer not null default 0,    -- day; and again n days later
    sessions integer not null default 0, ended integer not null default 0,  -- started on this day
    session_ms integer not null default 0, median_seconds integer,          -- of those that ended
    primary key (app_id, day)) without rowid;
create table durations (                   -- of the sessions of a day
    app_id integer not null, day integer not null, seconds integer not null,  -- in two significant digits
    sessions integer not null, primary key (app_id, day, seconds)) without rowid;
create table releases (
    app_id integer not null, app_version text not null,
    first_seen integer not null, last_seen integer not null,  -- when received
    sessions integer not null default 0, crashes integer not null default 0,
    devices integer not null default 0, crashed_devices integer not null default 0,
    primary key (app_id, app_version)) without rowid;
create table release_days (                -- of the last 7 days
    app_id integer not null, app_version text not null, day integer not null, sessions integer not null,
    primary key (app_id, app_version, day)) without rowid;
create index release_days_by_age on release_days (app_id, day);
create table labels (
    app_id integer not null, field text not null,  -- exception_type or device_model
    day integer not null,                  -- -1000000: all days together
    label text not null, crashes integer not null, primary key (app_id, field, day, label)) without rowid;
create table groups (                      -- of which a crash is kept, or is of the last 7 days
    app_id integer not null, group_hash text not null,
    exception_type text not null, exception_reason text,  -- of the latest crash
    first_seen integer not null, last_seen integer not null,
    recent integer not null,               -- crashes since recent_since
    primary key (app_id, group_hash)) without rowid;
create table group_hours (                 -- what is in groups.recent
    app_id integer not null, hour integer not null, group_hash text not null, crashes integer not null,
    primary key (app_id, hour, group_hash)) without rowid;
create table state (name text primary key, value integer not null) without rowid;
insert into state values ('recent_since', 0);  -- the hour 7 days before the latest commit; also: retention_days,
                                               -- expired_crashes, expired_events: the highest seq that has
"""


# Script by script from a version of the schema to the next one.
MIGRATIONS: Dict[int, str] = {
    1: "create table grants (hash blob primary key, expires_at integer not null) without rowid;\n",
}


# == Values ====================================================================
#
# What a client may be told, and the small conversions of which the rest is made.

SECOND = 1000  # all times are in milliseconds
HOUR = 3600 * SECOND
DAY = 24 * HOUR
MAX_SKEW = 300 * SECOND  # how fast a device's clock may be and still be believed
SEQ_BITS = 20  # of a seq's counter within a millisecond
EVERY_APP = 0  # all live apps together, in some roll-ups


class Refusal(Exception):
    """A request that is not taken. `str()` is what the client is told.

    `retry_after`, in whole seconds, is set where the same request may succeed later.
    """

    def __init__(self, text: str, retry_after: Optional[int] = None):
        super().__init__(text)
        self.retry_after = retry_after


class StorageUnavailable(Refusal):
    """The database can not be used now; nothing of the request was acknowledged."""

    def __init__(self) -> None:
        super().__init__("storage unavailable", retry_after=2)


_RFC3339 = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt]([01][0-9]|2[0-3]):([0-5][0-9]):([0-5][0-9])(?:\.([0-9]{1,9}))?"
    r"(?:[Zz]|([+-])([01][0-9]|2[0-3]):([0-5][0-9]))")
_DAY_ZERO = date(1970, 1, 1).toordinal()


def parse_time(text: str) -> int:
    """Milliseconds since 1970 UTC of an RFC 3339 time with a zone. Raises ValueError.

    In whole numbers: datetime overflows where an offset leads out of the years 1
    to 9999, and before Python 3.11 it knows neither Z nor nanoseconds.
    """
    match = _RFC3339.fullmatch(text)
    if match is None:
        raise ValueError("not an RFC 3339 time with a zone")
    day, hours, minutes, seconds, fraction, sign, zone_hours, zone_minutes = match.groups()
    total = (date.fromisoformat(day).toordinal() - _DAY_ZERO) * DAY
    total += int(hours) * HOUR + int(minutes) * 60_000 + int(seconds) * SECOND
    if fraction:
        total += int(fraction[:3].ljust(3, "0"))
    if sign:
        total -= int(sign + "1") * (int(zone_hours) * HOUR + int(zone_minutes) * 60_000)
    return total


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


def counted_at(occurred_at: int, received_at: int) -> int:
    """When a report counts: at the device's time, unless the device's clock is fast."""
    return received_at if occurred_at > received_at + MAX_SKEW else occurred_at


_LIVE = "(select id from apps where is_test = 0)"  # in SQL
_COUNTED_AT = f"case when occurred_at > received_at + {MAX_SKEW} then received_at else occurred_at end"  # in SQL


def first_seq(received_at: int) -> int:
    """The lowest seq of a millisecond."""
    return received_at << SEQ_BITS


def crash_id(seq: int) -> str:
    """The id of a crash as it is answered; the schema says the same."""
    return f"{seq:016x}"


def event_ids(seqs: Iterable[int]) -> List[str]:
    """The ids of events as they are answered; the schema says the same."""
    return [f"evt_{seq:016x}" for seq in seqs]


def new_key(is_test: bool) -> str:
    """A fresh API key: bf_live_ or bf_test_ and 32 hex digits."""
    return ("bf_test_" if is_test else "bf_live_") + secrets.token_hex(16)


def key_prefix(key: str) -> str:
    """What may be shown of a key: 8 of its 32 digits, or a third of a key of the operator's own."""
    made_here = re.fullmatch("bf_(live|test)_[0-9a-f]{32}", key)
    return key[:16] if made_here else key[:min(16, len(key) // 3)]


def sha256(data: Union[bytes, str]) -> bytes:
    """The digest under which keys and tokens are kept."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).digest()


def group_hash(exception_type: str, frames: Sequence[Mapping[str, Any]]) -> str:
    """The group of a crash: its exception type, and where in the app it happened.

    Frames with a `file` are the app's own: the symbols of the first three count.
    System frames stand in only where there is none.
    """
    chosen = [f for f in frames if f.get("file")] or [f for f in frames if f.get("symbol")]
    symbols = [frame.get("symbol") or "" for frame in chosen[:3]]
    return hashlib.sha256(":".join([exception_type, *symbols]).encode()).hexdigest()[:16]


# == Payloads ==================================================================
#
# JSON in, a crash or an event out, or a Refusal; all further in trusts what comes
# from here. A report is a tuple in the order of its columns, so that it is bound
# to an insert as it is. A check takes a value and its name, and gives what is stored.

EVENT_TYPES = ("session_start", "session_end", "error", "custom")
MAX_BATCH = 100  # events
MAX_TEXT = 500  # characters of versions, models, types, names, ids, locale
MAX_DEPTH = 64  # of nested JSON: far above any SDK's, far below Python's recursion limit
MAX_NUMBER = (1 << 63) - 1

Given = Dict[str, Any]


def decode_json(body: bytes) -> Given:
    """The JSON object in a body. Raises Refusal unless it is one, in UTF-8, of finite numbers.

    A NUL or a lone surrogate, which no database takes, becomes U+FFFD: a report
    is not lost for a character.
    """
    try:
        text = body.decode("utf-8")
        value = _DECODER.decode(text)
        if "\\u" in text:  # unescaped, UTF-8 and JSON allow neither
            value = _mend(value)
    except (ValueError, RecursionError):
        raise Refusal("invalid JSON") from None
    if type(value) is not dict:
        raise Refusal("invalid JSON")
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("number out of range")
    return number


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_refuse_constant)
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":"))


def _one_encoder() -> Callable[[Any], str]:
    """_ENCODER.encode, without what it makes anew for each call: that takes longer than the encoding."""
    make = json.encoder.c_make_encoder  # type: ignore[attr-defined]
    if make is None:
        return _ENCODER.encode
    encode = make(None, _ENCODER.default, json.encoder.encode_basestring, None, ":", ",",  # type: ignore
                  False, False, False)
    return lambda value: "".join(encode(value, 0))


_encode = _one_encoder()
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def _mend(value: Any) -> Any:
    if type(value) is str:
        return _UNSTORABLE.sub("\ufffd", value)
    if type(value) is list:
        return [_mend(item) for item in value]
    if type(value) is dict:
        return {_mend(name): _mend(item) for name, item in value.items()}
    return value


def _short_text(value: Any, name: str) -> str:
    if type(value) is not str or len(value) > MAX_TEXT:
        raise Refusal(f"invalid {name}")
    return value


def _event_type(value: Any, name: str) -> str:
    if _short_text(value, name) not in EVENT_TYPES:
        raise Refusal("invalid event type")
    return value


def _time(value: Any, name: str) -> int:
    try:
        return parse_time(_short_text(value, name))
    except ValueError:
        raise Refusal(f"invalid {name}") from None


def _number(value: Any, name: str) -> Union[int, float]:
    if type(value) not in (int, float) or abs(value) > MAX_NUMBER:
        raise Refusal(f"invalid {name}")
    return value


def _battery_level(value: Any, name: str) -> Union[int, float]:
    if not 0 <= _number(value, name) <= 1 and value != -1:
        raise Refusal(f"invalid {name}")
    return value


def _object(value: Any, name: str) -> str:
    if type(value) is not dict:
        raise Refusal(f"invalid {name}")
    return _to_json(value, name)


def _of(kind: type) -> Callable[[Any, str], Any]:
    def check(value: Any, name: str) -> Any:
        if type(value) is not kind:  # isinstance would take True for an int
            raise Refusal(f"invalid {name}")
        return value
    return check


def _stack_trace(value: Any, name: str) -> str:
    if type(value) is not list or not all(map(_is_frame, value)):
        raise Refusal(f"invalid {name}")
    return _to_json(value, name)


def _is_frame(frame: Any) -> bool:
    return type(frame) is dict and all(
        frame.get(name) in (None, "") or type(frame[name]) is kind
        for name, kind in (("frame", int), ("symbol", str), ("file", str), ("line", int)))


def _to_json(value: Any, name: str) -> str:
    """Compact JSON. Raises Refusal where it is nested too deep to be shown again."""
    try:
        text = _encode(value)
    except RecursionError:
        raise Refusal(f"invalid {name}") from None
    # Counting brackets is quick and clears nearly all; only then look closely.
    if len(text) > 2 * MAX_DEPTH and text.count("{") + text.count("[") > MAX_DEPTH and _is_deeper(value, MAX_DEPTH):
        raise Refusal(f"invalid {name}")
    return text


def _is_deeper(value: Any, depth: int) -> bool:
    if type(value) not in (dict, list):
        return False
    items = value.values() if type(value) is dict else value
    return depth == 0 or any(_is_deeper(item, depth - 1) for item in items)


_CRASH_FIELDS = dict(
    exception_type=_short_text, exception_reason=_of(str), stack_trace=_stack_trace, app_version=_short_text,
    build_number=_short_text, os_version=_short_text, device_model=_short_text, device_id_hash=_short_text,
    locale=_short_text, free_memory_mb=_number, battery_level=_battery_level, is_charging=_of(bool),
    occurred_at=_time)
_EVENT_FIELDS = dict(
    type=_event_type, name=_short_text, properties=_object, app_version=_short_text, os_version=_short_text,
    device_model=_short_text, device_id_hash=_short_text, session_id=_short_text, locale=_short_text,
    occurred_at=_time)
_OF_OBJECTS = (_object, _stack_trace)
_REQUIRED = ("exception_type", "type", "occurred_at")

Crash = namedtuple("Crash", ["group_hash", *_CRASH_FIELDS, "extra"])
Crash.__doc__ = "A valid crash: the fields of the API, and `extra`, the unknown ones as JSON."
Event = namedtuple("Event", [*_EVENT_FIELDS, "extra"])
Event.__doc__ = "A valid event: the fields of the API, and `extra`, the unknown ones as JSON."
Reports = Union[Sequence[Crash], Sequence[Event]]


def parse_crash(given: Given) -> Crash:
    """A crash from its JSON object. Raises Refusal."""
    values = _checked(given, _CRASH_FIELDS)
    return Crash(group_hash(given["exception_type"], given.get("stack_trace") or ()), *values)


def parse_event(given: Any) -> Event:
    """An event from its JSON object. Raises Refusal."""
    if type(given) is not dict:
        raise Refusal("invalid event")
    return Event._make(_checked(given, _EVENT_FIELDS))


def parse_batch(given: Given) -> List[Event]:
    """1 to 100 events, all or none. Raises Refusal, with the index where one of them is the reason.

    Unknown fields beside `events` are kept with the first event, as `batch`: with
    each of them, a small request could make the database write a large one.
    """
    events = given.get("events")
    if events in (None, "", []):
        raise Refusal("missing events")
    if type(events) is not list:
        raise Refusal("invalid events")
    if len(events) > MAX_BATCH:
        raise Refusal(f"too many events: at most {MAX_BATCH}")
    if len(given) > 1 and type(events[0]) is dict:
        free = next(name for name in ("batch" + "_" * n for n in range(len(events[0]) + 1)) if name not in events[0])
        events[0][free] = {name: value for name, value in given.items() if name != "events"}
    try:
        return list(map(Event._make, _all_checked(events, _EVENT_FIELDS)))
    except (Refusal, TypeError, AttributeError):  # an event is bad, or is none, or has a list for a text
        return [_parse_event_at(index, event) for index, event in enumerate(events)]


def _parse_event_at(index: int, event: Any) -> Event:
    try:
        return parse_event(event)
    except Refusal as refusal:
        raise Refusal(f"{refusal} at index {index}") from None


Checks = Mapping[str, Callable[[Any, str], Any]]


def _checked(given: Given, checks: Checks) -> List[Any]:
    """The fields in the order of their columns, and the unknown ones as JSON."""
    return [*[_value(given.get(name), name, check) for name, check in checks.items()], _unknown(given, checks)]


def _all_checked(objects: List[Given], checks: Checks) -> Iterable[Tuple[Any, ...]]:
    """The same of each object, in a third of the time: field by field, because in a batch most are the same
    from event to event, and what was found good once need not be looked at again."""
    names, columns = set().union(*objects), []
    for name, check in checks.items():
        values = [given.get(name) for given in objects] if name in names else [None] * len(objects)
        if check in _OF_OBJECTS:
            columns.append([_value(value, name, check) for value in values])
        else:
            good = {value: _value(value, name, check) for value in set(values)}
            columns.append([good[value] for value in values] if len(good) > 1 else [good[values[0]]] * len(objects))
    columns.append([_unknown(given, checks) for given in objects] if names - checks.keys() else [None] * len(objects))
    return zip(*columns)


def _unknown(given: Given, checks: Mapping[str, Any]) -> Optional[str]:
    unknown = {name: value for name, value in given.items() if name not in checks}
    return _to_json(unknown, "JSON") if unknown else None


def _value(value: Any, name: str, check: Callable[[Any, str], Any]) -> Any:
    """A value as it is stored; null and "" mean that it is absent."""
    if value is not None and value != "":
        return check(value, name)
    if name in _REQUIRED:
        raise Refusal(f"missing {name}")
    return None


# == Signature =================================================================
#
# HMAC-SHA256 over a timestamp and the raw body. The key travels with the request,
# so this hides nothing: it proves that the body is the one that was signed, and
# that it is no recording of an hour ago.

SIGNATURE_WINDOW = 300 * SECOND  # both ways


def sign(key: bytes, timestamp: bytes, body: bytes) -> str:
    """The X-Backfeedr-Signature for an X-Backfeedr-Timestamp and a raw body."""
    payload = timestamp + b"." + hashlib.sha256(body).hexdigest().encode()
    return "sha256=" + hmac.new(key, payload, hashlib.sha256).hexdigest()


def verify(key: bytes, timestamp: bytes, signature: bytes, body: bytes, now: int) -> None:
    """Returns if the signature is right and, at `now` in milliseconds, fresh; else raises Refusal."""
    try:
        signed_at = parse_time(timestamp.decode("latin-1"))
    except ValueError:
        raise Refusal("invalid timestamp") from None
    # Bytes, because compare_digest takes no text beyond ASCII.
    if not hmac.compare_digest(sign(key, timestamp, body).encode(), signature):
        raise Refusal("invalid signature")
    if abs(now - signed_at) > SIGNATURE_WINDOW:
        raise Refusal("stale timestamp")


# == RateLimiter ===============================================================
#
# A log of each key's last requests: exact, where a counter per minute would let
# twice the limit through around the full minute. It holds at most `limit` numbers
# per key, and only keys that exist come this far.

class RateLimiter:
    """Allows `limit` requests of a key in any `window` of seconds; a limit of 0 allows all. Thread-safe.

    `clock` gives seconds and never runs backwards.
    """

    waits = False  # for another host, so that requests had better not ask one after the other

    def __init__(self, limit: int, window: float = 60.0, clock: Callable[[], float] = time.monotonic):
        self.limit, self.window, self._clock = limit, window, clock
        self._times: Dict[bytes, Deque[float]] = defaultdict(deque)
        self._lock = threading.Lock()

    def allow(self, key: bytes) -> bool:
        """Whether the key may go on. What is refused does not count."""
        if not self.limit:
            return True
        with self._lock:
            now, times = self._clock(), self._times[key]
            while times and now - times[0] >= self.window:
                times.popleft()
            if len(times) < self.limit:
                times.append(now)
                return True
            return False

    def retry_after(self, key: bytes) -> int:
        """Whole seconds, at least 1, after which `allow` says yes again."""
        with self._lock:
            times = self._times[key]
            return max(1, math.ceil(times[0] + self.window - self._clock())) if times else 1


# == RollUps ===================================================================
#
# What a report changes in the figures. Whatever adds, forgets or expires reports
# says so here in the same transaction: the sums stay equal to a count over the rows.

ALL_DAYS = -1_000_000  # the `day` of a label's sum over all days; the year 1 began on day -719162
SHOWN_DAYS = 400  # how far back a device's days are known: a year, a month before it, and some
LEAVING = 1000  # rows that leave the week in a commit, so that nobody waits for it after a quiet week
DEVICE_VERSIONS = 50  # app versions that are known of a device: far above any phone's
NEW_RELEASES = 100  # of an app within a day: as a release stays for ever, junk must not make too many

_SUMS = {  # table: the rest of its key beside the app, and its sums
    "hours": (("hour",), ("crashes", "sessions", "devices")),
    "days": (("day",), ("crashes", "dau", "wau", "mau", "newcomers", "back_1", "back_7", "back_30",
                        "sessions", "ended", "session_ms")),
    "durations": (("day", "seconds"), ("sessions",)),
    "release_days": (("app_version", "day"), ("sessions",)),
    "labels": (("field", "day", "label"), ("crashes",)),
    "group_hours": (("hour", "group_hash"), ("crashes",)),
}
_ACTIVE = (("dau", 1), ("wau", 7), ("mau", 30))
_BACK = (("back_1", 1), ("back_7", 7), ("back_30", 30))


class _Device(NamedTuple):
    """What is known of a device in an app; bit n of `days`: seen on the n-th of the days that are shown."""

    first_seen: int
    last_seen: int
    last_seq: int
    days: int
    versions: Dict[str, int]

    def merged(self, other: _Device) -> _Device:
        """What is known from both."""
        versions = self.versions
        if not other.versions.items() <= versions.items():
            versions = dict(versions)
            for version, crashed in other.versions.items():
                if version in versions or len(versions) < DEVICE_VERSIONS:
                    versions[version] = max(crashed, versions.get(version, 0))
        return _Device(min(self.first_seen, other.first_seen), max(self.last_seen, other.last_seen),
                       max(self.last_seq, other.last_seq), self.days | other.days, versions)


class _Session(NamedTuple):
    """What is known of a session."""

    first_seq: int = 0
    last_seq: int = 0
    started_at: Optional[int] = None
    ended_at: Optional[int] = None
    app_version: Optional[str] = None

    def merged(self, later: _Session) -> _Session:
        """What is known from both; of two starts at once, the later one counts."""
        starts = [each for each in (later, self) if each.started_at is not None]
        latest = max(starts, key=lambda each: each.started_at or 0) if starts else self
        ends = [each.ended_at for each in (self, later) if each.ended_at is not None]
        return _Session(min(self.first_seq, later.first_seq), max(self.last_seq, later.last_seq),
                        latest.started_at, max(ends, default=None), latest.app_version)


class RollUps:
    """The sums that one transaction changes: made before its rows change, and saved after.

    Each sum is written once, which is faster than a statement a report.
    """

    def __init__(self, db: sqlite3.Connection, now: int):
        self._db, self._now = db, now
        self._first_day = now // DAY - SHOWN_DAYS
        self._live = {app_id for app_id, in db.execute(f"select id from apps where id in {_LIVE}")}
        self._sums: Dict[str, Dict[tuple, Dict[str, int]]] = {
            table: defaultdict(lambda: defaultdict(int)) for table in _SUMS}
        self._groups: Dict[tuple, List[Any]] = {}
        self._releases: Dict[tuple, Dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self._reported: Dict[tuple, Tuple[int, int]] = {}  # when the first and the last report of one came
        self._devices: Dict[tuple, _Device] = {}
        self._sessions: Dict[tuple, _Session] = {}
        self._since = self._move_week()

    def _scopes(self, app_id: int) -> Tuple[int, ...]:
        """Where the devices and sessions of an app count."""
        return (app_id, EVERY_APP) if app_id in self._live else (app_id,)

    # Reports that come

    def add_crashes(self, app_id: int, seqs: Sequence[int], received: Sequence[int], crashes: Sequence[Crash],
                    times: Sequence[int]) -> None:
        """Counts crashes of an app, in the order of their seqs, each at its time."""
        alike = Counter((crash.exception_type, crash.device_model, crash.group_hash, crash.app_version, at // HOUR)
                        for crash, at in zip(crashes, times))
        for (*what, hour), count in alike.items():
            self._count_crash(app_id, *what, hour * HOUR, count)
        for crash, at in zip(crashes, times):
            group = self._groups.setdefault((app_id, crash.group_hash), [crash.exception_type, None, at, at, []])
            if at >= group[3]:
                group[1] = crash.exception_reason
            group[2], group[3] = min(group[2], at), max(group[3], at)
            group[4].append(at)
        self._see(app_id, seqs, received, crashes, times, crashed=1)

    def add_events(self, app_id: int, seqs: Sequence[int], received: Sequence[int], events: Sequence[Event],
                   times: Sequence[int]) -> None:
        """The same with events."""
        sessions = [event.session_id for event in events]
        last = dict(zip(sessions, seqs))
        first = dict(zip(reversed(sessions), reversed(seqs)))
        for session_id in last.keys() - {None}:
            self._see_session(app_id, session_id, first[session_id], last[session_id])
        for event, at in zip(events, times):
            if event.type in ("session_start", "session_end") and event.session_id:
                self._see_session(app_id, event.session_id, first[event.session_id], last[event.session_id],
                                  event.type, at, event.app_version)
            elif event.type == "session_start":
                self._count_session(app_id, _Session(started_at=at, app_version=event.app_version), 1)
        self._see(app_id, seqs, received, events, times, crashed=0)

    def _see_session(self, app_id: int, session_id: str, first_seq: int, last_seq: int, event_type: str = "",
                     at: Optional[int] = None, app_version: Optional[str] = None) -> None:
        seen = _Session(first_seq, last_seq)
        if event_type == "session_start":
            seen = seen._replace(started_at=at, app_version=app_version)
        elif event_type == "session_end":
            seen = seen._replace(ended_at=at)
        known = self._sessions.get((app_id, session_id))
        self._sessions[app_id, session_id] = known.merged(seen) if known else seen

    def _see(self, app_id: int, seqs: Sequence[int], received: Sequence[int], reports: Reports,
             times: Sequence[int], crashed: int) -> None:
        """Notes the versions and the devices that sent these reports: run by run, as a batch has one of each."""
        rows = zip([report.device_id_hash for report in reports], [report.app_version for report in reports],
                   times, seqs, received)
        for (device, version), run in groupby(rows, key=itemgetter(0, 1)):
            at, seq, came = zip(*(row[2:] for row in run))
            if version:
                first, last = self._reported.get((app_id, version), (came[0], came[0]))
                self._reported[app_id, version] = min(first, *came), max(last, *came)
            if device:
                found = _Device(min(at), max(at), seq[-1], sum(map(self._day_bit, {each // DAY for each in at})),
                                {version: crashed} if version else {})
                before = self._devices.get((app_id, device))
                self._devices[app_id, device] = before.merged(found) if before else found

    def _day_bit(self, day: int) -> int:
        return 1 << day - self._first_day if day >= self._first_day else 0

    # Reports that go, as rows of their tables that have just been deleted

    def remove_crashes(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes crashes from every sum, and out of their groups."""
        for row in rows:
            at = counted_at(row["occurred_at"], row["received_at"])
            self._count_crash(row["app_id"], row["exception_type"], row["device_model"], row["group_hash"],
                             row["app_version"], at, -1)
            if at // HOUR >= self._since:
                self._change_recent([(-1, row["app_id"], row["group_hash"])])
        groups = {(row["app_id"], row["group_hash"]) for row in rows}
        for app_id, group_hash in groups:
            self._db.execute(f"""
                update groups set (exception_reason, last_seen) = (
                    select max(exception_reason), coalesce(max({_COUNTED_AT}), groups.last_seen) from crashes
                    where seq = (
                        select seq from crashes
                        where app_id = :app and group_hash = :group
                        order by {_COUNTED_AT} desc, seq desc
                        limit 1))
                where app_id = :app and group_hash = :group
                """, {"app": app_id, "group": group_hash})
        self.drop_groups(groups)
        self.merge_groups({(group_hash,) for _, group_hash in groups})

    def expire_crashes(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes crashes from what counts those that are kept; all other sums stay."""
        for row in rows:
            self._count_labels(row["app_id"], row["exception_type"], row["device_model"],
                              counted_at(row["occurred_at"], row["received_at"]), -1)
        self.drop_groups({(row["app_id"], row["group_hash"]) for row in rows})

    def merge_groups(self, group_hashes: Iterable[tuple]) -> None:
        """Makes these groups of all apps anew from those of each live one."""
        for group in group_hashes:
            self._db.execute("delete from groups where app_id = ? and group_hash = ?", (EVERY_APP, *group))
            self._db.execute(f"""
                insert into groups
                select ?, group_hash, exception_type, exception_reason,
                    min(first_seen) over (), last_seen, sum(recent) over ()
                from groups
                where app_id in {_LIVE} and group_hash = ?
                order by last_seen desc, app_id
                limit 1
                """, (EVERY_APP, *group))

    def remove_events(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Takes events from every sum; their sessions become what is left of them."""
        sessions = set()
        for row in rows:
            if row["session_id"]:
                sessions.add((row["app_id"], row["session_id"]))
            elif row["type"] == "session_start":
                at = counted_at(row["occurred_at"], row["received_at"])
                self._count_session(row["app_id"], _Session(started_at=at, app_version=row["app_version"]), -1)
        for key, session in self.sessions(list(sessions)).items():
            self._count_session(key[0], session, -1)
            self._db.execute("delete from sessions where app_id = ? and session_id = ?", key)
            for seq, *event in self._db.execute(f"""
                    select seq, type, {_COUNTED_AT}, app_version from events
                    where seq between ? and ? and app_id = ? and session_id = ?
                    order by seq
                    """, (session.first_seq, session.last_seq, *key)):  # of other devices, or of none
                self._see_session(*key, seq, seq, *event)

    def remove_sums(self, app_id: int) -> None:
        """Takes the crashes and sessions of an app that is to go from those of all."""
        for table, columns in (("days", ("crashes", "sessions", "ended", "session_ms")), ("durations", ("sessions",))):
            key = _SUMS[table][0]
            for row in self._db.execute(f"select {', '.join(key + columns)} from {table} where app_id = ?", (app_id,)):
                for column, count in zip(columns, row[len(key):]):
                    self._sums[table][(EVERY_APP, *row[:len(key)])][column] -= count

    # What they count; `by` is 1, or -1 where they go

    def _count_crash(self, app_id: int, exception_type: str, device_model: Optional[str], group_hash: str,
                    app_version: Optional[str], at: int, by: int) -> None:
        self._count_labels(app_id, exception_type, device_model, at, by)
        self._sums["hours"][app_id, at // HOUR]["crashes"] += by
        for scope in self._scopes(app_id):
            self._sums["days"][scope, at // DAY]["crashes"] += by
        if at // HOUR >= self._since:
            self._sums["group_hours"][app_id, at // HOUR, group_hash]["crashes"] += by
        if app_version:
            self._releases[app_id, app_version]["crashes"] += by

    def _count_labels(self, app_id: int, exception_type: str, device_model: Optional[str], at: int, by: int) -> None:
        labels = self._sums["labels"]
        for day in (ALL_DAYS, at // DAY):
            labels[app_id, "exception_type", day, exception_type]["crashes"] += by
            if device_model:
                labels[app_id, "device_model", day, device_model]["crashes"] += by

    def _count_session(self, app_id: int, session: _Session, by: int) -> None:
        start, end, version = session.started_at, session.ended_at, session.app_version
        if start is None:
            return
        self._sums["hours"][app_id, start // HOUR]["sessions"] += by
        if version:
            self._releases[app_id, version]["sessions"] += by
            if start // DAY >= self._now // DAY - 7:
                self._sums["release_days"][app_id, version, start // DAY]["sessions"] += by
        for scope in self._scopes(app_id):
            sums = self._sums["days"][scope, start // DAY]
            sums["sessions"] += by
            if end is not None and end >= start:
                sums["ended"] += by
                sums["session_ms"] += by * (end - start)
                self._sums["durations"][scope, start // DAY, rounded_seconds(end - start)]["sessions"] += by

    def _count_device(self, app_id: int, before: Optional[_Device], after: Optional[_Device]) -> None:
        """Versions count in their own app only: those of different apps have nothing to do with each other."""
        if before and after and _counted(before) == _counted(after):
            return
        days = self._sums["days"]
        for column, span in _ACTIVE:
            old, new = (_covered(device.days, span) if device else 0 for device in (before, after))
            for bits, by in ((new & ~old, 1), (old & ~new, -1)):
                for bit in _bits(bits):
                    days[app_id, self._first_day + bit][column] += by
        for device, by in ((before, -1), (after, 1)):
            if device is not None:
                self._sums["hours"][app_id, device.last_seen // HOUR]["devices"] += by
                first = device.first_seen // DAY
                days[app_id, first]["newcomers"] += by
                for column, later in _BACK:
                    days[app_id, first][column] += by * bool(device.days & self._day_bit(first + later))
                for version, crashed in device.versions.items() if app_id != EVERY_APP else ():
                    self._releases[app_id, version]["devices"] += by
                    self._releases[app_id, version]["crashed_devices"] += by * crashed

    # To the disk

    def save(self) -> None:
        """Writes everything that has changed."""
        self._save_devices()
        self._save_sessions()
        self._save_groups()
        self._save_releases()
        for table, sums in self._sums.items():
            changed = {key: row for key, row in sums.items() if any(row.values())}
            if changed:
                self._save_sums(table, changed)
        self._save_medians({key[:2] for key in self._sums["durations"]})

    def _save_sums(self, table: str, sums: Dict[tuple, Dict[str, int]]) -> None:
        add, clear = _sum_statements(table)
        columns = _SUMS[table][1]
        insert_rows(self._db, add, [(*key, *[row[column] for column in columns]) for key, row in sums.items()])
        gone = [key for key, row in sums.items() if min(row.values()) < 0]
        if gone:
            self._db.executemany(clear, gone)

    def _save_releases(self) -> None:
        for app_id, version in {*self._releases, *self._reported}:
            release = {"sessions": 0, "crashes": 0, "devices": 0, "crashed_devices": 0,
                       **self._releases[app_id, version], "app": app_id, "version": version}
            release["first"], release["last"] = self._reported.get((app_id, version), (MAX_NUMBER, 0))
            update = """
                update releases set
                    first_seen = min(first_seen, :first), last_seen = max(last_seen, :last),
                    sessions = sessions + :sessions, crashes = crashes + :crashes,
                    devices = devices + :devices, crashed_devices = crashed_devices + :crashed_devices
                where app_id = :app and app_version = :version
                """
            if not self._db.execute(update, release).rowcount and release["last"]:
                self._db.execute("""
                    insert into releases (app_id, app_version, first_seen, last_seen)
                    select :app, :version, :first, :last
                    where :most > (
                        select count(*) from releases
                        where app_id = :app and first_seen > :first - :day and first_seen <= :first)
                    """, {**release, "day": DAY, "most": NEW_RELEASES})
                self._db.execute(update, release)

    def _save_medians(self, days: Iterable[tuple]) -> None:
        for app_id, day in days:
            self._db.execute("""
                update days set median_seconds = (
                    select seconds from (
                        select seconds, sum(sessions) over (order by seconds) as so_far, sum(sessions) over () as total
                        from durations where app_id = :app and day = :day) as sums
                    where 2 * so_far >= total
                    order by seconds
                    limit 1)
                where app_id = :app and day = :day
                """, {"app": app_id, "day": day})

    def _save_groups(self) -> None:
        for app in sorted({app_id for app_id, _ in self._groups}):  # by itself, as one statement has each group once
            insert_rows(self._db, """
                insert into groups values *
                on conflict (app_id, group_hash) do update set
                    exception_reason = case when excluded.last_seen >= groups.last_seen
                        then excluded.exception_reason else groups.exception_reason end,
                    recent = groups.recent + excluded.recent,
                    first_seen = min(groups.first_seen, excluded.first_seen),
                    last_seen = max(groups.last_seen, excluded.last_seen)
                """, [(scope, group_hash, *group, sum(at // HOUR >= self._since for at in times))
                      for (app_id, group_hash), (*group, times) in self._groups.items() if app_id == app
                      for scope in self._scopes(app_id)])

    def _move_week(self) -> int:
        """The hour from which `recent` and group_hours count: seven days ago.

        So the most frequent groups of the week cost a look at each group, not at each hour of each.
        """
        new = (self._now - 7 * DAY) // HOUR
        old, is_old = self._db.execute("""
            select value, exists (select 1 from group_hours where app_id in (select id from apps) and hour < ?)
            from state where name = 'recent_since'
            """, (new,)).fetchone()
        if old == 0 or old > new + 24:  # at the start, and where the clock went back far
            self._count_week(new)
        else:
            new = max(old, new)
        if old != new:
            self._db.execute("update state set value = ? where name = 'recent_since'", (new,))
        if is_old:
            self._leave_week(new)
        return new

    def _leave_week(self, since: int) -> None:
        """Takes out some of the hours that are too old; those that are left wait for the next commit."""
        gone = self._db.execute("""
            select crashes, app_id, group_hash, hour from group_hours
            where app_id in (select id from apps) and hour < ?
            limit ?
            """, (since, LEAVING)).fetchall()
        self._db.executemany("delete from group_hours where app_id = ? and group_hash = ? and hour = ?",
                             [row[1:] for row in gone])
        self._change_recent((-crashes, app_id, group_hash) for crashes, app_id, group_hash, _ in gone)
        self.drop_groups({row[1:3] for row in gone})

    def _count_week(self, since: int) -> None:
        self._db.execute("delete from group_hours")
        self._db.execute("update groups set recent = 0")
        self._db.execute(f"""
            insert into group_hours
            select app_id, hour, group_hash, count(*)
            from (select app_id, {_COUNTED_AT} / {HOUR} as hour, group_hash from crashes) as counted
            where hour >= ?
            group by app_id, hour, group_hash
            """, (since,))
        self._change_recent(self._db.execute(
            "select sum(crashes), app_id, group_hash from group_hours group by app_id, group_hash").fetchall())
        self.drop_groups(self._db.execute(
            "select app_id, group_hash from groups where app_id <> ? and recent = 0", (EVERY_APP,)).fetchall())

    def _change_recent(self, changes: Iterable[tuple]) -> None:
        self._db.executemany("update groups set recent = recent + ? where app_id = ? and group_hash = ?",
                             [(crashes, scope, group_hash) for crashes, app_id, group_hash in changes
                              for scope in self._scopes(app_id)])

    def drop_groups(self, groups: Iterable[tuple]) -> None:
        """Deletes those of which no crash is kept and none is of this week, by (app_id, group_hash)."""
        for app_id, group_hash in groups:
            self._db.execute("""
                delete from groups where app_id = :app and group_hash = :group and recent = 0
                    and not exists (select 1 from crashes where app_id = :app and group_hash = :group)
                """, {"app": app_id, "group": group_hash})
            self._db.execute(f"""
                delete from groups where app_id = :every and group_hash = :group
                    and not exists (select 1 from groups where app_id in {_LIVE} and group_hash = :group)
                """, {"every": EVERY_APP, "group": group_hash})

    # Devices and sessions

    def _save_devices(self) -> None:
        """Writes devices where that changes a figure: one that is busy once an hour, and not with each report."""
        stored = self._stored_devices(list(self._devices))
        seen = {key: stored[key].merged(device) if key in stored else device for key, device in self._devices.items()}
        self._replace_devices({key: after for key, after in seen.items()
                               if key not in stored or _by_hour(stored[key]) != _by_hour(after)}, stored)

    def remove_devices(self, keys: Sequence[tuple]) -> None:
        """Deletes devices, by (app_id, device_id_hash), and takes them from all figures."""
        self._replace_devices(dict.fromkeys(keys), self._stored_devices(keys))
        self._db.executemany("delete from devices where app_id = ? and device_id_hash = ?", keys)

    def expire_devices(self, last_seqs: Mapping[tuple, int]) -> None:
        """Deletes what is known of devices, by (app_id, device_id_hash), if that was the seq of their last report.

        The sums stay. In live apps a device goes from all at once, as it is one for all together.
        """
        stored = self._stored_devices(list(last_seqs))
        for (app_id, device), last_seq in last_seqs.items():
            rows = {(scope, device): stored.get((scope, device))
                    for scope in (self._live if app_id in self._live else (app_id,))}
            if all(row is None or row.last_seq <= last_seq for row in rows.values()):
                self._db.executemany("delete from devices where app_id = ? and device_id_hash = ?", list(rows))

    def _stored_devices(self, keys: Sequence[tuple]) -> Dict[tuple, _Device]:
        """What is stored of devices in these apps; and in all live ones, if one of these is live."""
        wanted = {(scope, device) for app_id, device in keys
                  for scope in (self._live if app_id in self._live else (app_id,))}
        rows = rows_of(self._db, """
            select devices.* from (values *) as keys cross join devices on app_id = column1 and device_id_hash = column2
            """, list(wanted))
        return {(app_id, device): _Device(first, last, seq, self._unpacked(days_from, days), _decode_versions(versions))
                for app_id, device, first, last, seq, days_from, days, versions in rows}

    def _replace_devices(self, changed: Mapping[tuple, Optional[_Device]], stored: Mapping[tuple, _Device]) -> None:
        now = {**stored, **changed}
        for (app_id, device), after in changed.items():
            self._count_device(app_id, stored.get((app_id, device)), after)
        for device in {device for app_id, device in changed if app_id in self._live}:
            self._count_device(EVERY_APP, self._everywhere(device, stored), self._everywhere(device, now))
        insert_rows(self._db, """
            insert into devices values *
            on conflict (app_id, device_id_hash) do update set
                first_seen = excluded.first_seen, last_seen = excluded.last_seen, last_seq = excluded.last_seq,
                days_from = excluded.days_from, days = excluded.days, versions = excluded.versions
            """, [(*key, *after[:3], *self._packed(after.days), _encode(after.versions))
                  for key, after in changed.items() if after])

    def _everywhere(self, device: str, devices: Mapping[tuple, Optional[_Device]]) -> Optional[_Device]:
        found = None
        for app_id in self._live:
            known = devices.get((app_id, device))
            found = found.merged(known) if found and known else found or known
        return found

    def _packed(self, days: int) -> Tuple[int, bytes]:
        lowest = max(0, (days & -days).bit_length() - 1)
        days >>= lowest
        return self._first_day + lowest, days.to_bytes((days.bit_length() + 7) // 8, "big")

    def _unpacked(self, days_from: int, days: bytes) -> int:
        by, bits = days_from - self._first_day, int.from_bytes(days, "big")
        return bits << by if by > 0 else bits >> -by

    def _save_sessions(self) -> None:
        stored = self.sessions(list(self._sessions))
        changed = {key: stored[key].merged(seen) if key in stored else seen for key, seen in self._sessions.items()}
        for key, after in changed.items():
            before = stored.get(key)
            if before is None or before[2:] != after[2:]:
                if before:
                    self._count_session(key[0], before, -1)
                self._count_session(key[0], after, 1)
        insert_rows(self._db, """
            insert into sessions values *
            on conflict (app_id, session_id) do update set
                first_seq = excluded.first_seq, last_seq = excluded.last_seq, started_at = excluded.started_at,
                ended_at = excluded.ended_at, app_version = excluded.app_version
            """, [(*key, *after) for key, after in changed.items()])

    def sessions(self, keys: Sequence[tuple]) -> Dict[tuple, _Session]:
        """What is stored of sessions, by (app_id, session_id)."""
        return {(app_id, session_id): _Session(*rest) for app_id, session_id, *rest in rows_of(self._db, """
            select sessions.* from (values *) as keys cross join sessions on app_id = column1 and session_id = column2
            """, keys)}


@lru_cache(maxsize=1024)
def _decode_versions(text: str) -> Dict[str, int]:
    """To be read only: most devices have the same ones."""
    return json.loads(text)


@lru_cache(maxsize=None)
def _sum_statements(table: str) -> Tuple[str, str]:
    """To add to sums; and to delete them where all of them are 0."""
    key, columns = ("app_id", *_SUMS[table][0]), _SUMS[table][1]
    return (f"""
        insert into {table} ({", ".join(key + columns)}) values *
        on conflict ({", ".join(key)}) do update set
            {", ".join(f"{each} = {table}.{each} + excluded.{each}" for each in columns)}
        """, f"""
        delete from {table} where {" and ".join([f"{each} = ?" for each in key] + [f"{each} <= 0" for each in columns])}
        """)


def _counted(device: _Device) -> tuple:
    """What of a device shows in the figures."""
    return device.first_seen // DAY, device.last_seen // HOUR, device.days, device.versions


def _by_hour(device: _Device) -> tuple:
    """The same, and the hour in which it was last received: for as long as its reports are kept."""
    return (*_counted(device), (device.last_seq >> SEQ_BITS) // HOUR)


def _covered(days: int, span: int) -> int:
    """The days on which a device that was seen on `days` is one of the last `span` days."""
    for _ in range(span - 1):
        days |= days << 1
    return days


def _bits(number: int) -> Iterator[int]:
    while number:
        lowest = number & -number
        yield lowest.bit_length() - 1
        number ^= lowest


def rounded_seconds(milliseconds: int) -> int:
    """Whole seconds in two significant digits: so a day has few different ones, however many sessions."""
    unit = 10 ** max(0, len(str(milliseconds // SECOND)) - 2) * SECOND
    return (milliseconds + unit // 2) // unit * unit // SECOND


STATEMENTS = 512  # that are kept prepared: an insert is another one for each number of rows
ROWS = 128  # in a statement


def insert_rows(db: sqlite3.Connection, statement: str, rows: Sequence[tuple]) -> None:
    """Runs an insert for all rows, its `values *` standing for their placeholders, with few statements.

    Python gives its lock away for the time of a statement, and under load has to
    queue for it after each: executemany would queue once a row.
    """
    for start in range(0, len(rows), ROWS):
        part = rows[start:start + ROWS]
        db.execute(_with_placeholders(statement, len(part), len(part[0])), list(chain.from_iterable(part)))


def rows_of(db: sqlite3.Connection, query: str, keys: Sequence[tuple]) -> List[tuple]:
    """The rows of a query for all keys, its `values *` standing for their placeholders."""
    found = []
    for start in range(0, len(keys), ROWS):
        part = keys[start:start + ROWS]
        found += db.execute(_with_placeholders(query, len(part), len(part[0])),
                            list(chain.from_iterable(part))).fetchall()
    return found


@lru_cache(maxsize=STATEMENTS)
def _with_placeholders(statement: str, rows: int, columns: int) -> str:
    row = "(" + ", ".join("?" * columns) + ")"
    return statement.replace("values *", "values " + ", ".join([row] * rows))


# == Store =====================================================================
#
# Everything that touches the file: one writing connection per process, behind a
# lock; readers, which cannot write; and one path by which a report reaches the
# disk. `add` queues it, and whoever gets the lock commits all that is queued: one
# fsync serves everyone who waits, and there is no thread that could die.

BUSY_TIMEOUT = 5.0  # seconds to wait for a lock that another process holds
REPLAY_DAYS = 7  # how long a phone may be offline between a request and its repetition
BUSY_GROUP = 4  # requests in a commit, from which on the next one waits for company
GATHER_SECONDS = 0.002  # at most: a commit costs as much as ten reports; who comes alone never waits
MAX_WAIT = 30.0  # seconds for a commit that others make: longer than any lock and sync together
STEP = 200  # rows that a commit deletes, and more where more come in: too few to be felt
PRUNE_STEP = 1000  # rows, or pages, that `prune` deletes at a time
PAUSE = 2  # the pause after such a step, in its lengths
EXPIRE_SLICE = 10  # rows after which first to look at the clock: one may be as large as a body
EXPIRE_SECONDS = 0.02  # so long a commit may go on deleting, before it writes that to the disk
PAGE_ROWS = 1000  # that an export reads at a time,
PAGE_TEXT = 1_000_000  # and characters: a row may be as large as a body


class StoreError(Exception):
    """What the store cannot do for its operator. `str()` is one line that says why."""


class App(NamedTuple):
    """An app; `keys` counts its active ones, `created_at` is in milliseconds."""

    name: str
    is_test: bool
    created_at: int
    keys: int


class Key(NamedTuple):
    """What is known of an API key; the times are in milliseconds, None while it is active. `hash`: SHA-256 in hex."""

    prefix: str
    app: str
    created_at: int
    revoked_at: Optional[int]
    hash: str


class FirstStart(NamedTuple):
    """The secrets that a start has made. None: there was one already."""

    key: Optional[str]
    token: Optional[str]


class Idempotency(NamedTuple):
    """By what a repeated request is known: digests, any of which seen before means a repetition,
    and a digest of all that is in it."""

    marks: Tuple[bytes, ...] = ()
    request: bytes = b""


class Receipt(NamedTuple):
    """What was made durable: the seqs, one a report, and whether a request before this one did it."""

    seqs: range
    replayed: bool


class StoredReport(NamedTuple):
    """A report as one store hands it to another; `received_at` is in milliseconds."""

    seq: int
    app: str
    is_test: bool
    received_at: int
    report: Union[Crash, Event]


class Submission:
    """The reports of one request on their way to the disk, and what became of them."""

    def __init__(self, key_hash: bytes = b"", reports: Reports = (), idempotency: Idempotency = Idempotency(),
                 error: Optional[Exception] = None):
        self.key_hash, self.reports, self.idempotency, self.error = key_hash, reports, idempotency, error
        self.receipt: Optional[Receipt] = None

    def result(self) -> Receipt:
        """Of reports that are durable. Raises what has kept them from being so; once, because an error that
        has been raised holds all that was at hand, and what holds it too would be a ring of megabytes."""
        if self.error is not None:
            try:
                raise self.error
            finally:
                self.error = None
        assert self.receipt is not None
        return self.receipt


class _Waiter:
    """A thread that waits for its submissions to be committed."""

    def __init__(self) -> None:
        self.submissions: List[Submission] = []
        self.leads = False
        self._turn = threading.Lock()
        self._turn.acquire()

    def wait(self) -> bool:
        """Returns when these are done with, or the thread is to lead the next commit.

        A signal may hit a leader between any two steps; so nobody waits for one for ever: False.
        """
        found = self._turn.acquire(timeout=MAX_WAIT)
        self.leads |= not found  # whoever led is gone
        return found

    def wake(self) -> None:
        self._turn.release()


class Histogram:
    """Counts values by their upper bounds. One thread adds at a time; others may read."""

    def __init__(self, *bounds: float):
        self.bounds, self.counts, self.sum = (*bounds, math.inf), [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def samples(self) -> Iterator[Tuple[str, float]]:
        """What Prometheus wants of it: what follows its name, and the figure."""
        totals = list(accumulate(self.counts))
        for bound, total in zip(self.bounds, totals):
            yield '_bucket{le="%s"}' % ("+Inf" if bound == math.inf else bound), total
        yield from (("_sum", self.sum), ("_count", totals[-1]))


class _Process:
    """What one process holds of a store. None of it may cross a fork."""

    def __init__(self) -> None:
        self.write_lock = threading.Lock()
        self.writer: Optional[Connection] = None
        self.readers: List[Connection] = []
        self.seen_keys: Set[bytes] = set()
        self.queue_lock = threading.Lock()  # of what follows
        self.queue: List[_Waiter] = []
        self.has_leader = False
        self.last_group = 0
        self.company = threading.Lock()  # free when as many wait as were in the last group
        self.company.acquire()
        self.group_sizes = Histogram(1, 2, 4, 8, 16, 32, 64, 128)  # requests
        self.commit_seconds = Histogram(.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5)
        self.stored = Counter(crashes=0, events=0)

    @property
    def waiting(self) -> List[Submission]:
        return [each for waiter in self.queue for each in waiter.submissions]

    def enqueue(self, waiter: _Waiter, submissions: Sequence[Submission], max_waiters: int, max_rows: int) -> None:
        """Lets a thread wait for those of its submissions for which there is room: for them it leads where
        nobody does. The others have an error."""
        with self.queue_lock:
            waiting = self.waiting
            requests, rows = len(waiting), sum(len(other.reports) for other in waiting)
            for each in submissions:
                if requests >= max_waiters or requests and rows + len(each.reports) > max_rows:
                    each.error = StorageUnavailable()
                else:
                    requests, rows = requests + 1, rows + len(each.reports)
                    waiter.submissions.append(each)
            if waiter.submissions:
                self.queue.append(waiter)
            if requests >= self.last_group and self.company.locked():
                self.company.release()
        if not self.has_leader:
            self.appoint_leader()

    def appoint_leader(self) -> None:
        """Lets the first in the queue commit it all; nobody, if nobody waits."""
        with self.queue_lock:
            self.has_leader = bool(self.queue)
            if self.queue and not self.queue[0].leads:
                self.queue[0].leads = True
                self.queue[0].wake()

    def withdraw(self, waiter: _Waiter) -> None:
        with self.queue_lock:
            if waiter in self.queue:
                self.queue.remove(waiter)

    def gather(self) -> None:
        """Under load, waits a moment for company: whoever was in the last group mostly comes again."""
        if self.last_group >= BUSY_GROUP:
            self.company.acquire(timeout=GATHER_SECONDS)

    def take_queue(self) -> List[_Waiter]:
        with self.queue_lock:
            self.last_group, queue, self.queue = len(self.waiting), self.queue, []
            self.company.acquire(blocking=False)
        return queue

    def idle_reader(self) -> Optional[Connection]:
        try:
            return self.readers.pop()
        except IndexError:
            return None


class Connection(sqlite3.Connection):
    """A connection in autocommit mode. It never makes the file: one that vanished must not come back empty."""

    def __init__(self, path: Path, query_only: bool = False, mode: str = "rw"):
        super().__init__(f"{path.as_uri()}?mode={mode}", uri=True, timeout=BUSY_TIMEOUT,
                         isolation_level=None, check_same_thread=False,
                         cached_statements=STATEMENTS)
        self.execute("pragma synchronous = full")  # NORMAL may lose acknowledged commits with the power
        # In KiB. One connection writes, and as many as there are busy threads read.
        self.execute(f"pragma cache_size = {-512 if query_only else -8192}")
        self.execute(f"pragma query_only = {int(query_only)}")

    def append(self, table: str, columns: Sequence[str], rows: Sequence[tuple]) -> None:
        """Inserts rows that are new to a table."""
        insert_rows(self, f"insert into {table} ({', '.join(columns)}) values *", rows)

    def pragma(self, name: str) -> Any:
        """The first value of a pragma."""
        return self.execute(f"pragma {name}").fetchone()[0]


def _close(db: Optional[Connection]) -> None:
    if db is not None:
        db.close()


def _wal_size(path: Path) -> int:
    wal = Path(f"{path}-wal")
    return wal.stat().st_size if wal.exists() else 0


def _file_identity(path: Path) -> Tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise sqlite3.OperationalError(f"{path}: {error.strerror}") from None
    return found.st_dev, found.st_ino


class Store:
    """Apps, keys and reports in one SQLite file. Thread-safe; works on both sides of a fork.

    Raises StoreError where the file cannot be opened or is something else. Every
    method may raise StorageUnavailable. `clock` gives seconds since 1970;
    `retention_days` of 0 keeps all, and None what the last server has kept. Close it,
    or use it as a context manager.

    max_waiters: requests that may wait for a commit. More than our server takes at a time,
        unless commits take so long that a phone had better come again.
    max_rows: reports that may wait for a commit; all of them go into the next one, so
        that nobody waits for two. As many take about a tenth of a second to write.

    For a store on another engine (examples/postgres.py) a class of this one replaces
    what is SQLite's own: `Error`, _open, _connect, _check_file, reading, _shrink, size.
    """

    Error: type = sqlite3.Error  # what a connection raises

    def __init__(self, path: str, clock: Callable[[], float] = time.time, retention_days: Optional[int] = 0,
                 max_waiters: int = 256, max_rows: int = 10_000, may_create: bool = True):
        self.max_waiters, self.max_rows = max_waiters, max_rows
        self._clock = clock
        self._closed, self._trouble, self._logged = False, "", ""
        # A parent's connections stay here untouched in the child: to close them would harm the parent's.
        self._processes: Dict[int, _Process] = {}
        self._open(path, may_create)
        if retention_days is None:
            with self.reading() as db:
                row = db.execute("select value from state where name = 'retention_days'").fetchone()
            retention_days = row[0] if row else Settings.retention_days
        self.retention_days: int = retention_days

    def _open(self, path: str, may_create: bool) -> None:
        self.path = Path(path).absolute()
        _prepare(self.path, may_create)
        self._file = _file_identity(self.path)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def close(self) -> None:
        """Closes this process's connections and so folds in the WAL. May be called twice."""
        self._closed = True
        here = self._here
        with here.write_lock:
            while here.readers:
                here.readers.pop().close()
            _close(here.writer)  # last, because a reader may not fold in the WAL
            here.writer = None

    @property
    def now(self) -> int:
        """The time, in milliseconds since 1970 UTC."""
        return int(self._clock() * SECOND)

    @property
    def _oldest_seq(self) -> int:
        """Of the reports that are to be kept."""
        return first_seq(self.now - self.retention_days * DAY) if self.retention_days else 0

    @property
    def _here(self) -> _Process:
        pid = os.getpid()
        return self._processes.get(pid) or self._processes.setdefault(pid, _Process())

    def _connect(self, query_only: bool = False) -> Connection:
        self._check_file()
        return Connection(self.path, query_only)

    def _check_file(self) -> None:
        """Raises sqlite3.Error where the file is gone. So it does where another has come in its place:
        the WAL beside it still belongs to the first, and would spoil the second."""
        if self._closed:
            raise sqlite3.ProgrammingError("the store is closed")
        if _file_identity(self.path) != self._file:
            raise sqlite3.OperationalError(f"{self.path} is another file than at the start")

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection that cannot write; for short reads, because an open one holds up the WAL."""
        here = self._here
        db = None
        try:
            db = here.idle_reader() or self._connect(query_only=True)
            yield db
        except BaseException as error:
            _close(db)
            if isinstance(error, self.Error):
                raise self._unavailable("read", error) from error
            raise
        if self._closed:
            db.close()
        else:
            here.readers.append(db)

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """The process's one writing connection, in a transaction that is durable at the end."""
        here = self._here
        with here.write_lock:
            try:
                self._check_file()
                db = here.writer = here.writer or self._connect()
                db.execute("begin immediate")  # a lock taken later may fail at once instead of waiting
                yield db
                db.execute("commit")
            except BaseException as error:
                # Closing undoes what is left of the transaction, also where SQLite has
                # rolled back by itself and every further statement would be its own.
                _close(here.writer)
                here.writer = None
                if isinstance(error, self.Error):
                    raise self._unavailable("write", error) from error
                raise
            self._trouble = self._logged = ""

    def _unavailable(self, verb: str, error: Exception) -> StorageUnavailable:
        """Says once in the log what is wrong; and remembers it until a commit succeeds, but for a lock."""
        if str(error) != self._logged:
            log.error("cannot %s the database: %s", verb, error)
            self._logged = str(error)
        if verb == "write" and "locked" not in str(error):
            self._trouble = str(error)
        return StorageUnavailable()

    def check(self) -> None:
        """Raises StorageUnavailable if the file is gone or cannot be read, or if the last commit has
        failed and another one, which is made to see, fails as well."""
        with self.reading() as db:
            self._check_file()
            db.execute("select 1 from apps").fetchone()
        if self._trouble:
            with self.writing() as db:
                db.execute("update secrets set hash = hash")

    def vitals(self) -> List[Tuple[str, str, str, Iterable[Tuple[str, float]]]]:
        """Figures for who watches over the server: name, kind, meaning, and samples as Prometheus writes them.

        They are of this process, but for the sizes and the rows. No table of reports is read.
        """
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
            ("reports_stored_total", "counter", "Reports stored since this process began: not what is kept now,"
             " which would take a look at every row.",
             [(f'{{table="{table}"}}', n) for table, n in here.stored.items()]),
            ("crashes_kept", "gauge", "Rows of the table crashes, by their roll-up.", [("", crashes)]),
            ("file_bytes", "gauge", "Size of the database.", [("", self.size)]),
            ("wal_bytes", "gauge", "Size of its write-ahead log.", [("", self._wal_size)])]

    @property
    def size(self) -> int:
        """Bytes of the database."""
        return self.path.stat().st_size

    @property
    def _wal_size(self) -> int:
        return _wal_size(self.path)

    # Reports

    def add(self, key_hash: bytes, reports: Reports, idempotency: Idempotency = Idempotency()) -> Receipt:
        """Stores reports of one kind, all or none, and returns when they are durable.

        They go to the app of the key with that SHA-256. A repeated request, as told by
        `idempotency`, stores nothing and has the first one's receipt. Raises Refusal where an
        Idempotency-Key comes with another request, or the key is not active at the time
        of the commit; StorageUnavailable also where too many wait already.
        """
        if not reports:
            raise ValueError("no reports")
        submission = Submission(key_hash, reports, idempotency)
        self.add_all([submission])
        return submission.result()

    def add_all(self, submissions: Sequence[Submission]) -> None:
        """The same for several requests, in one commit: each then has a receipt or an error. What nobody has
        foreseen is in the log, and StorageUnavailable to them all."""
        here, waiter = self._here, _Waiter()
        try:
            here.enqueue(waiter, submissions, self.max_waiters, self.max_rows)
            if waiter.submissions and not waiter.wait():
                here.withdraw(waiter)
                for each in waiter.submissions:
                    each.error = StorageUnavailable()
            elif waiter.leads:
                self._commit_queue(here)
        except BaseException:  # a signal, if this is the main thread
            here.withdraw(waiter)
            raise
        finally:
            if waiter.leads:
                here.appoint_leader()

    def _commit_queue(self, here: _Process) -> None:
        """Commits all that waits in one transaction, and wakes everyone who waits."""
        waiters: List[_Waiter] = []
        try:
            here.gather()
            began = time.monotonic()
            with self.writing() as db:
                waiters = here.take_queue()
                group = [each for waiter in waiters for each in waiter.submissions]
                commit = _Commit(db, self.now)
                for each in group:
                    commit.take(each)
                commit.save()
                self._expire(db, max(STEP, 3 * sum(len(each.reports) for each in group)))
            here.group_sizes.add(len(group))
            here.commit_seconds.add(time.monotonic() - began)
            here.stored.update(commit.counts())
        except BaseException as error:
            waiters = waiters or here.take_queue()
            for waiter in waiters:
                for each in waiter.submissions:
                    each.error = StorageUnavailable()
            if not isinstance(error, Exception):
                raise
            if not isinstance(error, StorageUnavailable):
                log.exception("unexpected error")
        finally:
            for waiter in waiters:
                if not waiter.leads:
                    waiter.wake()

    def export(self, kind: type, app: Optional[str] = None, since: int = 0) -> Iterator[StoredReport]:
        """The reports of a kind, Crash or Event, that are here now, in the order of their seqs: of all apps or
        of one, received at `since` or later. Raises StoreError where there is no such app.

        Page by page, as one read for as long as somebody takes the output would hold up the WAL.
        """
        with self.reading() as db:
            if app is not None:
                self._app(db, app)
            last, = db.execute(f"select coalesce(max(seq), -1) from {_TABLES[kind]}").fetchone()
        page = self._page(kind, min(max(0, first_seq(since)), MAX_NUMBER) - 1, last)
        while page:
            yield from (kept for kept in page if app in (None, kept.app) and kept.received_at >= since)
            page = self._page(kind, page[-1].seq, last)

    def _page(self, kind: type, after: int, last: int) -> List[StoredReport]:
        page: List[StoredReport] = []
        size = 0
        with self.reading() as db, closing(db.execute(f"""
                select seq, apps.name, is_test, received_at, {", ".join("reports." + each for each in kind._fields)}
                from {_TABLES[kind]} as reports cross join apps on apps.id = app_id
                where seq > ? and seq <= ?
                order by seq
                limit ?
                """, (after, last, PAGE_ROWS))) as rows:
            for seq, name, is_test, received_at, *values in rows:
                page.append(StoredReport(seq, name, bool(is_test), received_at, kind._make(values)))
                size += sum(len(value) for value in values if type(value) is str)
                if size > PAGE_TEXT:
                    break
        return page

    def import_(self, reports: Sequence[StoredReport]) -> Counter:
        """Stores reports that another store has exported, all or none, and makes their apps, without keys.

        Returns how many were `stored`; how many were `known`, because their seq is here already, whatever is
        in them; and how many had `expired`: their time is over, or reports as old have gone from here, maybe
        these, which would be counted twice. Raises StoreError where an app is live here and a test there.
        """
        counts: Counter = Counter()
        with self._in_step() as db:
            commit = _Commit(db, self.now)
            for kind, table in _TABLES.items():
                given = {kept.seq: kept for kept in reports if type(kept.report) is kind}
                known = {seq for seq, in rows_of(db, f"""
                    select seq from (values *) as keys cross join {table} on seq = column1
                    """, [(seq,) for seq in given])}
                oldest = max(self._oldest_seq, self._expired_to(db, table) + 1)
                fresh = [kept for seq, kept in given.items() if seq >= oldest and seq not in known]
                for (app, is_test), kept in groupby(sorted(fresh, key=itemgetter(1, 2, 0)), key=itemgetter(1, 2)):
                    commit.take_kept(self._imported_app(db, app, is_test), list(kept))
                counts.update(stored=len(fresh), expired=len(given.keys() - known) - len(fresh))
            commit.save()
            self._expire(db, STEP)
        counts["known"] = len(reports) - counts["stored"] - counts["expired"]
        return counts

    def _expired_to(self, db: Connection, table: str) -> int:
        """The highest seq that has expired here."""
        row = db.execute("select value from state where name = ?", ("expired_" + table,)).fetchone()
        return row[0] if row else -1

    # Reports that go

    def _expire(self, db: Connection, step: int) -> Counter:
        """Deletes at most `step` rows of each table whose time is over, and fewer where they are large; how many."""
        window = {"replays": self.now - REPLAY_DAYS * DAY, "week": self.now // DAY - 7,
                  "rows": self._oldest_seq}
        over = db.execute("""
            select (select min(received_at) from replays) < :replays,
                exists (select 1 from release_days where app_id in (select id from apps) and day < :week),
                (select min(seq) from crashes) < :rows, (select min(seq) from events) < :rows
            """, window).fetchone()
        deleted: Counter = Counter()
        if over[0]:
            deleted["replays"] = db.execute("""
                delete from replays where (app_id, mark) in (
                    select app_id, mark from replays where received_at < ? limit ?)
                """, (window["replays"], step)).rowcount
        if over[1]:
            db.execute("delete from release_days where app_id in (select id from apps) and day < :week", window)
        if over[2] or over[3]:
            deadline = time.monotonic() + EXPIRE_SECONDS
            for table in _COUNTED:
                size = EXPIRE_SLICE
                while count := self._expire_some(db, table, window["rows"], min(size, step - deleted[table])):
                    deleted[table] += count
                    size *= 2
                    if time.monotonic() > deadline:
                        break
        return +deleted

    def _expire_some(self, db: Connection, table: str, before: int, limit: int) -> int:
        """Deletes some of the oldest reports; what is known of a device or a session goes with its last one."""
        rollups = RollUps(db, self.now)
        rows = dict_rows(db, f"select {_COUNTED[table]} from {table} where seq < ? order by seq limit ?",
                         (before, limit))
        if rows:
            last = rows[-1]["seq"]
            db.execute(f"delete from {table} where seq <= ?", (last,))
            db.execute(_SET_STATE, ("expired_" + table, last))
            rollups.expire_devices({(row["app_id"], row["device_id_hash"]): row["seq"] for row in rows
                                    if row["device_id_hash"]})
            if table == "crashes":
                rollups.expire_crashes(rows)
            else:
                db.executemany("delete from sessions where app_id = ? and session_id = ? and last_seq <= ?",
                               {(row["app_id"], row["session_id"], last) for row in rows if row["session_id"]})
            rollups.save()
        return len(rows)

    def prune(self, progress: Callable[[int], Any] = lambda rows: None) -> Counter:
        """Deletes all rows whose time is over, and gives the disk their space back; how many rows of each table.

        In steps and with pauses longer than they, so that nobody else's reports wait for it.
        """
        deleted: Counter = Counter()
        while True:
            with self._in_step() as db:
                step = self._expire(db, PRUNE_STEP)
            if not step:
                break
            deleted += step
            progress(sum(deleted.values()))
        self._shrink()
        return deleted

    def _shrink(self) -> None:
        """Gives the disk the space of what is deleted."""
        free, before = 1, 0
        while free and free != before:  # it stays where the file was made without auto_vacuum
            before = free
            with self._in_step() as db:
                for _ in range(PRUNE_STEP):  # of one page each: some Pythons end a longer pragma after its first
                    db.execute("pragma incremental_vacuum(1)").fetchall()
                free = db.pragma("freelist_count")
        self._fold_in_wal()

    def _fold_in_wal(self) -> None:
        with self.reading() as db:
            db.execute("pragma wal_checkpoint(truncate)").fetchall()

    @contextmanager
    def _in_step(self) -> Iterator[Connection]:
        """A transaction of many. The pause after it lets those in that wait: SQLite's own waiting is a
        matter of luck against somebody who is always back at once."""
        with self.writing() as db:
            began = time.monotonic()
            yield db
        time.sleep(PAUSE * (time.monotonic() - began))

    def forget_device(self, device_id_hash: str) -> Counter:
        """Deletes all that is kept of a device, in all apps; how many rows of each table.

        It is taken out of every sum. When a group or a release was first seen stays as it is.
        """
        deleted: Counter = Counter()
        last = {}
        for table in _COUNTED:
            with self.reading() as db:
                last[table] = db.execute(f"select coalesce(max(seq), 0) from {table}").fetchone()[0]
                seqs = [seq for seq, in db.execute(
                    f"select seq from {table} where device_id_hash = ? and seq <= ?", (device_id_hash, last[table]))]
            for start in range(0, len(seqs), EXPIRE_SLICE):
                with self._in_step() as db:
                    deleted[table] += self._forget_rows(db, table, seqs[start:start + EXPIRE_SLICE])
        with self._in_step() as db:
            for table in last:  # what has come meanwhile
                seqs = [seq for seq, in db.execute(
                    f"select seq from {table} where device_id_hash = ? and seq > ?", (device_id_hash, last[table]))]
                deleted[table] += self._forget_rows(db, table, seqs)
            keys = db.execute("select app_id, device_id_hash from devices where app_id in (select id from apps)"
                              " and device_id_hash = ?", (device_id_hash,)).fetchall()
            rollups = RollUps(db, self.now)
            rollups.remove_devices(keys)
            rollups.save()
        self._fold_in_wal()
        return +deleted + Counter(devices=len(keys))

    def _forget_rows(self, db: Connection, table: str, seqs: Sequence[int]) -> int:
        db.execute("pragma secure_delete = on")  # overwrite what is deleted
        rollups = RollUps(db, self.now)
        rows = [row for seq in seqs
                for row in dict_rows(db, f"select {_COUNTED[table]} from {table} where seq = ?", (seq,))]
        db.executemany(f"delete from {table} where seq = ?", [(seq,) for seq in seqs])
        (rollups.remove_crashes if table == "crashes" else rollups.remove_events)(rows)
        rollups.save()
        return len(rows)

    # Apps and keys

    def start(self, api_key: str = "", auth_token: str = "") -> FirstStart:
        """Gives a server what it needs to begin: an app `default` where there is none, an admin token.

        Secrets that are given are taken; else they are made, where none is stored.
        """
        with self.writing() as db:
            db.execute(_SET_STATE, ("retention_days", self.retention_days))
            key = token = None
            known = db.execute("select revoked_at from keys where key_hash = ?", (sha256(api_key),)).fetchone()
            if known and known[0]:
                log.warning("the API key of the settings was revoked, and stays so")
            elif api_key and not known:
                db.execute("insert into apps (name, is_test, created_at) values ('default', 0, ?) on conflict do nothing",
                           (self.now,))
                self._insert_key(db, "default", api_key)
            elif not db.execute("select 1 from apps").fetchone():
                key = self._insert_app(db, "default", False)
            if not auth_token and not db.execute("select 1 from secrets").fetchone():
                auth_token = token = "bf_admin_" + secrets.token_hex(16)
            if auth_token:
                if db.execute("""
                        insert into secrets values ('admin_token', ?)
                        on conflict (name) do update set hash = excluded.hash where secrets.hash <> excluded.hash
                        """, (sha256(auth_token),)).rowcount:
                    db.execute("delete from grants")  # they were for whoever knew the old one
            return FirstStart(key, token)

    def is_admin(self, token: bytes) -> bool:
        """Whether this is the admin token."""
        with self.reading() as db:
            row = db.execute("select hash from secrets where name = 'admin_token'").fetchone()
        return row is not None and hmac.compare_digest(row[0], sha256(token))

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
        with self.writing() as db:
            return db.execute("delete from grants where hash = ? and expires_at > ?",
                              (sha256(kind + secret), self.now)).rowcount > 0

    def is_cached_key(self, key_hash: bytes) -> bool:
        """As is_known_key, but of what is known without a look at the database."""
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
            return self._insert_app(db, name, is_test)

    def _insert_app(self, db: Connection, name: str, is_test: bool) -> str:
        self._make_app(db, name, is_test)
        return self._insert_key(db, name, new_key(is_test))

    def _imported_app(self, db: Connection, name: str, is_test: bool) -> int:
        if not db.execute("select 1 from apps where name = ?", (name,)).fetchone():
            self._make_app(db, name, is_test)
        app_id, was_test = self._app(db, name)
        if was_test != is_test:
            raise StoreError(f"the app {name!r} is a {'test' if was_test else 'live'} one here")
        return app_id

    def _make_app(self, db: Connection, name: str, is_test: bool) -> None:
        if name != name.strip() or not 1 <= len(name) <= 100 or not name.isprintable():
            raise StoreError("an app's name is 1 to 100 printable characters, without a space at an end")
        if db.execute("select 1 from apps where name = ?", (name,)).fetchone():
            raise StoreError(f"there is an app named {name!r} already")
        db.execute("insert into apps (name, is_test, created_at) values (?, ?, ?)", (name, is_test, self.now))

    def create_key(self, app: str) -> str:
        """A further key for an app, which is not kept. Raises StoreError where there is no such app."""
        with self.writing() as db:
            return self._insert_key(db, app, new_key(self._app(db, app)[1]))

    def _insert_key(self, db: Connection, app: str, key: str) -> str:
        db.execute("insert into keys (key_hash, app_id, prefix, created_at) values (?, ?, ?, ?)",
                   (sha256(key), self._app(db, app)[0], key_prefix(key), self.now))
        return key

    def _app(self, db: Connection, name: str) -> Tuple[int, bool]:
        row = db.execute("select id, is_test from apps where name = ?", (name,)).fetchone()
        if row is None:
            raise StoreError(f"there is no app named {name!r}")
        return row

    def apps(self) -> List[App]:
        """All apps, by name."""
        with self.reading() as db:
            return [App(name, bool(is_test), *rest) for name, is_test, *rest in db.execute("""
                select name, is_test, created_at,
                    (select count(*) from keys where app_id = apps.id and revoked_at is null)
                from apps order by name
                """)]

    def keys(self) -> List[Key]:
        """All keys, the oldest first."""
        with self.reading() as db:
            return [Key(*row, bytes(key_hash).hex()) for key_hash, *row in db.execute("""
                select key_hash, prefix, name, keys.created_at, revoked_at from keys join apps on apps.id = app_id
                order by keys.created_at, prefix
                """)]

    def revoke_key(self, key: str) -> Key:
        """Ends the one active key that begins with this, or is it, or has this hash. Raises StoreError."""
        with self.writing() as db:
            found = db.execute("""
                select key_hash, prefix, name, keys.created_at from keys join apps on apps.id = app_id
                where revoked_at is null and :key <> ''
                    and (key_hash = :hash or key_hash = :given or substr(prefix, 1, :length) = :key)
                """, {"key": key, "hash": sha256(key), "length": len(key),
                      "given": bytes.fromhex(key) if re.fullmatch("[0-9a-f]{64}", key) else b""}).fetchall()
            if len(found) != 1:
                raise StoreError(f"{len(found) or 'no'} active keys begin with {key!r}: see 'key list'")
            (key_hash, *rest), = found
            db.execute("update keys set revoked_at = ? where key_hash = ?", (self.now, key_hash))
            return Key(*rest, self.now, bytes(key_hash).hex())

    def delete_app(self, name: str) -> None:
        """Deletes an app, its keys and all that it sent. Raises StoreError where there is none.

        In steps, so that nobody else's reports wait for it: the keys first, the app
        last, so that it can be repeated where it was cut off.
        """
        with self.writing() as db:
            app_id = self._app(db, name)[0]
            db.execute("delete from keys where app_id = ?", (app_id,))
        for table in ("events", "crashes"):
            self._delete_reports(table, app_id)
        while self._delete_devices(app_id) or self._delete_groups(app_id):
            pass
        with self.writing() as db:
            if not db.execute("select is_test from apps where id = ?", (app_id,)).fetchone()[0]:
                rollups = RollUps(db, self.now)
                rollups.remove_sums(app_id)
                rollups.save()
            for table in ("replays", "sessions", "releases", *_SUMS):
                db.execute(f"delete from {table} where app_id = ?", (app_id,))
            db.execute("delete from apps where id = ?", (app_id,))

    def _delete_reports(self, table: str, app_id: int) -> None:
        seqs = [(0,)]
        while seqs:
            with self.reading() as db:
                seqs = db.execute(f"select seq from {table} where app_id = ? and seq > ? order by seq limit ?",
                                  (app_id, seqs[-1][0], PRUNE_STEP)).fetchall()
            with self._in_step() as db:
                db.executemany(f"delete from {table} where seq = ?", seqs)

    def _delete_devices(self, app_id: int) -> bool:
        """One step of it; whether there may be more."""
        with self._in_step() as db:
            keys = db.execute("select app_id, device_id_hash from devices where app_id = ? limit ?",
                              (app_id, STEP)).fetchall()
            rollups = RollUps(db, self.now)
            rollups.remove_devices(keys)
            rollups.save()
            rollups.expire_devices(dict.fromkeys(keys, self._oldest_seq))  # in others, where they waited for it
        return bool(keys)

    def _delete_groups(self, app_id: int) -> bool:
        """One step of it; whether there may be more."""
        with self._in_step() as db:
            groups = db.execute("select group_hash from groups where app_id = ? limit ?", (app_id, STEP)).fetchall()
            db.executemany("delete from groups where app_id = ? and group_hash = ?",
                           [(app_id, *group) for group in groups])
            RollUps(db, self.now).merge_groups(groups)
        return bool(groups)


def dict_rows(db: sqlite3.Connection, query: str, parameters: Any = ()) -> List[Dict[str, Any]]:
    """The rows of a query, each by the names of its columns."""
    rows = db.execute(query, parameters)
    names = [column[0] for column in rows.description]
    return [dict(zip(names, row)) for row in rows]


_ANOTHER = "; --db or BACKFEEDR_DB_PATH names another"


def _prepare(path: Path, may_create: bool) -> None:
    """Makes the file and its tables where there are none, and brings an old schema up to date.

    Raises StoreError, and has changed nothing, where the file is something else.
    """
    if not may_create and not path.exists():
        raise StoreError(f"there is no database {path}{_ANOTHER}")
    _check_sqlite()
    try:
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:  # and never opened but by SQLite: closing it drops the locks of a whole process
            pass
        deadline = time.monotonic() + BUSY_TIMEOUT
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


def _check_sqlite() -> str:
    if sqlite3.sqlite_version_info < (3, 32):  # whose statements take more than 999 values
        raise StoreError(f"SQLite 3.32 or later is needed; this Python has {sqlite3.sqlite_version}")
    return sqlite3.sqlite_version


def _make_tables(path: Path) -> None:
    with closing(Connection(path)) as db:
        _check_file(db, path)
        if db.pragma("user_version") == SCHEMA_VERSION:
            return
        if not db.pragma("user_version"):
            db.execute("pragma auto_vacuum = incremental")
            db.execute("pragma journal_mode = wal")
        db.execute("begin immediate")
        version = db.pragma("user_version")  # again: another process may have been faster
        scripts = [MIGRATIONS[old] for old in range(version, SCHEMA_VERSION)] if version else [SCHEMA]
        for statement in _statements("".join(scripts)):
            db.execute(statement)
        db.execute(f"pragma application_id = {APPLICATION_ID}")
        db.execute(f"pragma user_version = {SCHEMA_VERSION}")
        db.execute("commit")


def _check_file(db: Connection, path: Path) -> None:
    version = db.pragma("user_version")
    is_empty = not version and not db.pragma("schema_version")
    if not is_empty and db.pragma("application_id") != APPLICATION_ID:
        raise StoreError(f"{path} is a database, but not one of backfeedr's{_ANOTHER}")
    if version > SCHEMA_VERSION:
        raise StoreError(f"{path} is of a newer backfeedr (schema {version}; this one knows {SCHEMA_VERSION})")


def _statements(script: str) -> Iterator[str]:
    """The statements of a script: executescript() would commit before it begins."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


class _Commit:
    """The reports of one transaction."""

    def __init__(self, db: Connection, now: int):
        self._db, self._now = db, now
        self._apps: Dict[bytes, Optional[Tuple[int]]] = {}  # by key
        self._next_seq: Dict[type, int] = {}
        # By kind and app: the seqs of reports, when they were received, and they themselves.
        self._taken: Dict[tuple, Tuple[List[int], List[int], List[Any]]] = defaultdict(lambda: ([], [], []))

    def take(self, submission: Submission) -> None:
        """Adds the reports of a request, unless it is a repetition or must be refused."""
        kind, idempotency = type(submission.reports[0]), submission.idempotency
        try:
            app_id = self._app(submission.key_hash)
            earlier = self._earlier(app_id, idempotency)
        except Refusal as refusal:
            submission.error = refusal
            return
        seqs = earlier or self._new_seqs(kind, len(submission.reports))
        submission.receipt = Receipt(seqs, bool(earlier))
        insert_rows(self._db, "insert into replays values * on conflict do nothing",
                    [(app_id, mark, idempotency.request, seqs[0], len(seqs), self._now) for mark in idempotency.marks])
        if not earlier:
            self._put(app_id, seqs, [self._now] * len(seqs), submission.reports)

    def take_kept(self, app_id: int, kept: Sequence[StoredReport]) -> None:
        """Adds reports of one kind that have been received before, in the order of their seqs."""
        self._put(app_id, [each.seq for each in kept], [each.received_at for each in kept],
                  [each.report for each in kept])

    def _put(self, app_id: int, seqs: Sequence[int], received: Sequence[int], reports: Reports) -> None:
        for taken, more in zip(self._taken[type(reports[0]), app_id], (seqs, received, reports)):
            taken.extend(more)

    def _app(self, key_hash: bytes) -> int:
        if key_hash not in self._apps:
            self._apps[key_hash] = self._db.execute(
                "select app_id from keys where key_hash = ? and revoked_at is null", (key_hash,)).fetchone()
        found = self._apps[key_hash]
        if found is None:
            raise Refusal("invalid API key")
        return found[0]

    def _earlier(self, app_id: int, idempotency: Idempotency) -> Optional[range]:
        """The seqs of the request that this one repeats."""
        for mark in idempotency.marks:
            row = self._db.execute("select request, first_seq, reports from replays where app_id = ? and mark = ?",
                                   (app_id, mark)).fetchone()
            if row is not None:
                if row[0] != idempotency.request:
                    raise Refusal("idempotency key reused with a different body")
                return range(row[1], row[1] + row[2])
        return None

    def _new_seqs(self, kind: type, count: int) -> range:
        if kind not in self._next_seq:
            # Seqs of a clock that was fast by more than a day are left ahead.
            last = self._db.execute(f"select max(seq) from {_TABLES[kind]} where seq < ?",
                                    (first_seq(self._now + DAY),)).fetchone()[0] or 0
            # A random start keeps the ids of two hosts apart.
            self._next_seq[kind] = max(last + 1, first_seq(self._now) + secrets.randbits(SEQ_BITS))
        first = self._next_seq[kind]
        self._next_seq[kind] += count
        return range(first, first + count)

    def counts(self) -> Counter:
        """How many reports are to go into each table."""
        counts: Counter = Counter()
        for (kind, _), (seqs, *_) in self._taken.items():
            counts[_TABLES[kind]] += len(seqs)
        return counts

    def save(self) -> None:
        """Writes the rows and the sums."""
        rollups = RollUps(self._db, self._now)
        for (kind, app_id), (seqs, received, reports) in self._taken.items():
            self._db.append(_TABLES[kind], ("seq", "app_id", "received_at", *kind._fields),
                            [(seq, app_id, came, *report) for seq, came, report in zip(seqs, received, reports)])
            times = [counted_at(report.occurred_at, came) for report, came in zip(reports, received)]
            (rollups.add_crashes if kind is Crash else rollups.add_events)(app_id, seqs, received, reports, times)
        rollups.save()


_SET_STATE = "insert into state values (?, ?) on conflict (name) do update set value = excluded.value"
_TABLES = {Crash: "crashes", Event: "events"}
_COUNTED = {  # columns by which a report counts somewhere
    "crashes": "seq, app_id, received_at, occurred_at, group_hash, exception_type, app_version, device_model,"
               " device_id_hash",
    "events": "seq, app_id, received_at, occurred_at, type, app_version, device_id_hash, session_id"}


# == Metrics ===================================================================
#
# The questions asked of the store. What anyone may ask reads roll-ups only: an
# answer costs what it shows, not what is stored. Windows begin at a full hour, or
# are UTC days; where no app is named, all live ones are meant.

ADOPTION_DAYS = 7  # of whose sessions a release has its share
SCANNED = 20_000  # events that are looked at for a page: a page may be short, and another one follow
REPORTS = 20  # of a group that are shown at once

_APPS = f"app_id in (select id from apps where id = :app or :app = {EVERY_APP} and is_test = 0)"

Figures = Dict[str, Any]


class Metrics:
    """Answers in the shapes of the API, as of now. `app` is a name; Refusal where there is none such.

    Lists come in pages of `limit`: `cursor` is the `next` of the page before, None at the end.
    """

    def __init__(self, store: Store):
        self._store = store

    @contextmanager
    def _asking(self, app: Optional[str]) -> Iterator[Tuple[Connection, int]]:
        with self._store.reading() as db:
            db.execute("begin")  # so that all figures of an answer are of one moment
            row = db.execute("select id from apps where name = ?", (app,)).fetchone()
            if app is not None and row is None:
                raise Refusal("not found")
            yield db, row[0] if row else EVERY_APP
            db.execute("commit")

    def _last_days(self, days: int) -> range:
        today = self._store.now // DAY
        return range(today - days + 1, today + 1)

    def daily_crashes(self, app: Optional[str] = None, days: Optional[int] = None) -> Figures:
        """Crashes per UTC day: the seven that end today from Monday to Sunday, or `days` of them by date."""
        figures = self._days(app, days or 7, "crashes")
        if days:
            return {"labels": figures["labels"], "data": figures["crashes"]}
        by_weekday = dict(zip((date.fromisoformat(label).weekday() for label in figures["labels"]), figures["crashes"]))
        return {"labels": list(_WEEKDAYS), "data": [by_weekday[n] for n in range(7)]}

    def crash_types(self, app: Optional[str] = None, days: Optional[int] = None) -> Figures:
        """Crashes per exception type, the most frequent first."""
        return self._labels("exception_type", app, days, limit=MAX_NUMBER)

    def devices(self, app: Optional[str] = None, days: Optional[int] = None) -> Figures:
        """Crashes per device model, the ten most frequent."""
        return self._labels("device_model", app, days, limit=10)

    def _labels(self, field: str, app: Optional[str], days: Optional[int], limit: int) -> Figures:
        shown = self._last_days(days) if days else range(ALL_DAYS, ALL_DAYS + 1)
        with self._asking(app) as (db, app_id):
            return _labelled(db.execute(f"""
                select label, sum(crashes) from labels
                where {_APPS} and field = :field and day between :first and :last
                group by label
                order by sum(crashes) desc, label
                limit :limit
                """, {"app": app_id, "field": field, "first": shown[0], "last": shown[-1], "limit": limit}))

    def overview(self, app: Optional[str] = None) -> Figures:
        """The last seven days in a few figures, and the devices of the last 24 hours."""
        week = (self._store.now - 7 * DAY) // HOUR
        with self._asking(app) as (db, app_id):
            crashes, sessions = db.execute(f"""
                select coalesce(sum(crashes), 0), coalesce(sum(sessions), 0) from hours
                where {_APPS} and hour >= :week
                """, {"app": app_id, "week": week}).fetchone()
            devices, = db.execute("select coalesce(sum(devices), 0) from hours where app_id = ? and hour >= ?",
                                  (app_id, (self._store.now - DAY) // HOUR)).fetchone()
            top = self._top_groups(db, app_id, week)
        return {"crash_free_rate_7d": crash_free_rate(crashes, sessions), "dau": devices,
                "sessions_7d": sessions, "crashes_7d": crashes, "top_crashes": top}

    def _top_groups(self, db: Connection, app_id: int, since: int) -> List[Figures]:
        """The five most frequent groups: `recent`, less what has grown too old since the last crash."""
        old = dict(db.execute(f"""
            select group_hash, sum(crashes) from group_hours
            where {_APPS} and hour < :since
            group by group_hash
            """, {"app": app_id, "since": since}).fetchall())
        # What grows less by the old ones was not further behind than there are of them.
        rows = dict_rows(db, """
            select group_hash, exception_type, coalesce(exception_reason, '') as exception_reason, recent as count
            from groups
            where app_id = ? and recent > 0
            order by recent desc, group_hash
            limit ?
            """, (app_id, 5 + len(old)))
        for row in rows:
            row["count"] -= old.get(row["group_hash"], 0)
        return sorted((row for row in rows if row["count"] > 0), key=lambda row: (-row["count"], row["group_hash"]))[:5]

    def active_devices(self, app: Optional[str] = None, days: Optional[int] = None) -> Figures:
        """Per UTC day, the devices of that day, of the 7 and of the 30 days that end with it."""
        return self._days(app, days, "dau", "wau", "mau")

    def sessions(self, app: Optional[str] = None, days: Optional[int] = None) -> Figures:
        """Per UTC day, the sessions that began on it; and of those that ended, how long they took.

        The median is of durations in two significant digits; null where none has ended.
        """
        figures = self._days(app, days, "sessions", "ended", "session_ms", "median_seconds")
        times = zip(figures.pop("session_ms"), figures.pop("ended"))
        figures["mean_seconds"] = [round(total / ended / SECOND, 1) if ended else None for total, ended in times]
        return figures

    def retention(self, app: Optional[str] = None, days: Optional[int] = None) -> Figures:
        """Of the devices first seen on a UTC day, the percentage seen again 1, 7 and 30 days later.

        null where that day is not over yet, or no device is new.
        """
        figures = self._days(app, days, "newcomers", *(column for column, _ in _BACK))
        shown = self._last_days(days or 30)
        devices = figures.pop("newcomers")
        for column, later in _BACK:
            figures["day_" + str(later)] = [
                round(100 * back / new, 2) if new and day + later < shown[-1] else None
                for day, new, back in zip(shown, devices, figures.pop(column))]
        return {"labels": figures.pop("labels"), "devices": devices, **figures}

    def _days(self, app: Optional[str], days: Optional[int], *columns: str) -> Figures:
        """Columns of the roll-up of days, as lists; 30 days unless told."""
        shown = self._last_days(days or 30)
        with self._asking(app) as (db, app_id):
            rows = {row[0]: row[1:] for row in db.execute(
                f"select day, {', '.join(columns)} from days where app_id = ? and day between ? and ?",
                (app_id, shown[0], shown[-1]))}
        empty = [None if column == "median_seconds" else 0 for column in columns]
        return {"labels": _dates(shown),
                **{column: [rows.get(day, empty)[n] for day in shown] for n, column in enumerate(columns)}}

    def releases(self, app: Optional[str] = None) -> Figures:
        """What is known of each version of an app, the latest first: at most 100 of them."""
        shown = self._last_days(ADOPTION_DAYS)
        with self._asking(app) as (db, app_id):
            rows = dict_rows(db, f"""
                with latest as (
                    select * from releases where {_APPS} order by first_seen desc, app_version, app_id limit 100)
                select apps.name as app, app_version, sessions, crashes, devices, crashed_devices,
                    first_seen, last_seen,
                    (select sum(sessions) from release_days
                        where app_id = latest.app_id and app_version = latest.app_version
                            and day between :first and :last) as recent,
                    (select sum(sessions) from days
                        where app_id = latest.app_id and day between :first and :last) as of_all
                from latest join apps on apps.id = app_id
                order by first_seen desc, app_version, app_id
                """, {"app": app_id, "first": shown[0], "last": shown[-1]})
        return {"releases": [_release(**row) for row in rows]}

    # Behind the admin token: these read the reports, a page at a time

    def groups(self, app: Optional[str] = None, version: Optional[str] = None, days: Optional[int] = None,
               text: Optional[str] = None, limit: int = 50, cursor: Optional[str] = None) -> Figures:
        """The groups of the crashes that are kept, the most frequent first; with `text` in type, reason or hash."""
        count, group = _group_cursor(cursor)
        first, last = (self._last_days(days)[0], self._last_days(days)[-1]) if days else (None, None)
        fits = f"""
            select *, {_COUNTED_AT} as at from crashes
            where {_APPS} and (:version is null or app_version = :version)
                and (:first is null or {_COUNTED_AT} / {DAY} between :first and :last)
            """
        found = f"""{fits}
                and (:text is null or (app_id, group_hash) in (
                    select app_id, group_hash from groups where {_APPS} and instr(lower(
                        exception_type || char(10) || coalesce(exception_reason, '') || char(10) || group_hash),
                        lower(:text))))
            """
        with self._asking(app) as (db, app_id):
            window = {"app": app_id, "version": version, "first": first, "last": last, "text": text,
                      "limit": limit + 1, "count": count, "group": group}
            rows = dict_rows(db, f"""
                select group_hash, count(*) as count, count(distinct device_id_hash) as devices,
                    min(at) as first_seen, max(at) as last_seen
                from ({found}) as found
                group by group_hash
                having count(*) < :count or count(*) = :count and group_hash > :group
                order by count(*) desc, group_hash
                limit :limit
                """, window)
            shown = [{
                **self._group(db, app_id, row["group_hash"]), "count": row["count"], "devices": row["devices"],
                "versions": sorted((version for version, in db.execute(f"""
                    select distinct app_version from ({fits} and group_hash = :group) as found
                    where app_version is not null
                    """, {**window, "group": row["group_hash"]})), key=_version_key),
                "first_seen": iso_time(row["first_seen"]), "last_seen": iso_time(row["last_seen"])}
                for row in rows[:limit]]
        following = "{count}-{group_hash}".format(**rows[limit - 1]) if rows[limit:] else None
        return {"groups": shown, "next": following}

    def _group(self, db: Connection, app_id: int, group_hash: str) -> Figures:
        row, = dict_rows(db, """
            select group_hash, exception_type, coalesce(exception_reason, '') as exception_reason from groups
            where app_id = ? and group_hash = ?
            """, (app_id, group_hash))
        return row

    def group(self, group_hash: str, app: Optional[str] = None, limit: int = REPORTS,
              cursor: Optional[str] = None) -> Figures:
        """A group, its spread, and its latest reports. Refusal where no crash of it is kept."""
        with self._asking(app) as (db, app_id):
            window = {"app": app_id, "group": group_hash, "before": _before(cursor), "limit": limit + 1}
            count, devices, first_seen, last_seen = db.execute(f"""
                select count(*), count(distinct device_id_hash), min({_COUNTED_AT}), max({_COUNTED_AT}) from crashes
                where {_APPS} and group_hash = :group
                """, window).fetchone()
            if not count:
                raise Refusal("not found")
            spread = {name: _labelled(db.execute(f"""
                select {column}, count(*) from crashes
                where {_APPS} and group_hash = :group and {column} is not null
                group by {column}
                order by count(*) desc, {column}
                limit 20
                """, window)) for name, column in (
                    ("versions", "app_version"), ("systems", "os_version"), ("device_models", "device_model"))}
            reports = _reports(db, f"""
                select * from crashes where seq in (
                    select seq from crashes
                    where {_APPS} and group_hash = :group and seq < :before
                    order by seq desc
                    limit :limit)
                order by seq desc
                """, window)
            return {**self._group(db, app_id, group_hash), "count": count, "devices": devices,
                    "first_seen": iso_time(first_seen), "last_seen": iso_time(last_seen), **spread,
                    "reports": reports[:limit], "next": reports[limit - 1]["id"] if reports[limit:] else None}

    def group_days(self, groups: Sequence[str], app: Optional[str] = None, days: int = 30) -> Figures:
        """Of each of these groups: its crashes on each of the last days, the oldest first; its apps; and where in
        the app its latest crash was."""
        shown = self._last_days(days)
        with self._asking(app) as (db, app_id):
            window = {"app": app_id, "first": shown[0], "last": shown[-1], "since": shown[0] * DAY - MAX_SKEW}
            return {"labels": _dates(shown), "groups": {
                group_hash: self._group_days(db, {**window, "group": group_hash}, shown) for group_hash in groups}}

    def _group_days(self, db: Connection, window: Figures, shown: range) -> Figures:
        counts = dict(db.execute(f"""
            select {_COUNTED_AT} / {DAY} as day, count(*) from crashes
            where {_APPS} and group_hash = :group and received_at >= :since
                and {_COUNTED_AT} / {DAY} between :first and :last
            group by day
            """, window))
        apps = db.execute(f"""
            select name from apps where {_APPS.replace("app_id", "id", 1)} and exists (
                select 1 from crashes where app_id = apps.id and group_hash = :group)
            order by name
            """, window).fetchall()
        latest = db.execute(f"""
            select case when length(stack_trace) < 100000 then stack_trace end from crashes
            where {_APPS} and group_hash = :group
            order by received_at desc
            limit 1
            """, window).fetchone()
        frames = json.loads(latest[0] or "[]") if latest else []
        return {"days": [counts.get(day, 0) for day in shown], "apps": [name for name, in apps],
                "place": next((frame.get("symbol") or "" for frame in frames if frame.get("file")), "")}

    def is_empty(self, app: Optional[str] = None) -> bool:
        """Whether nothing was received of an app; of its events, only the latest are looked at."""
        with self._asking(app) as (db, app_id):
            return not any(db.execute("""
                select exists (select 1 from crashes where app_id = :app or :app = :every),
                    exists (select 1 from days where app_id = :app),
                    exists (select 1 from (select app_id from events order by seq desc limit :some) as latest
                        where app_id = :app or :app = :every)
                """, {"app": app_id, "every": EVERY_APP, "some": 1000}).fetchone())

    def crash(self, id: str, app: Optional[str] = None) -> Figures:
        """One crash, as it was sent. Refusal where it is not kept."""
        with self._asking(app) as (db, app_id):
            found = _reports(db, f"select * from crashes where id = :id and seq = :seq and {_APPS}", {
                "id": id, "seq": int(id, 16) if re.fullmatch("[0-7][0-9a-f]{15}", id) else -1, "app": app_id})
        if not found:
            raise Refusal("not found")
        return found[0]

    def session(self, session_id: str, app: Optional[str] = None, limit: int = 50,
                cursor: Optional[str] = None) -> Figures:
        """The events of a session in the order in which they came; in pages as those of `events`."""
        with self._asking(app) as (db, app_id):
            window = {"app": app_id, "type": None, "name": None, "session": session_id}
            first, window["last"] = self._seqs_of_session(db, window)
            window["after"] = max(first - 1, _before(cursor) if cursor else 0)
            return self._events(db, "select * from events where seq > :after and seq <= :last order by seq",
                                window, limit)

    def events(self, app: Optional[str] = None, type: Optional[str] = None, name: Optional[str] = None,
               session_id: Optional[str] = None, limit: int = 50, cursor: Optional[str] = None) -> Figures:
        """The latest events that are kept. A page may be short of `limit`, or even empty, and have a next one."""
        with self._asking(app) as (db, app_id):
            window = {"app": app_id, "type": type, "name": name, "session": session_id,
                      "before": _before(cursor), "after": 0}
            if session_id is not None:  # its events are between its first and its last
                first, last = self._seqs_of_session(db, window)
                window["after"], window["before"] = first - 1, min(window["before"], last + 1)
            return self._events(db, "select * from events where seq > :after and seq < :before order by seq desc",
                                window, limit)

    def _seqs_of_session(self, db: Connection, window: Figures) -> Tuple[int, int]:
        """Between which its events are."""
        return db.execute(f"""
            select coalesce(min(first_seq), 0), coalesce(max(last_seq), -1) from sessions
            where {_APPS} and session_id = :session
            """, window).fetchone()

    def _events(self, db: Connection, scan: str, window: Figures, limit: int) -> Figures:
        """A page of those among the first SCANNED events of a query that fit."""
        window.update(limit=limit + 1, scanned=SCANNED)
        found = _reports(db, f"""
            select * from ({scan} limit :scanned) as scanned
            where {_APPS} and (:type is null or type = :type) and (:name is null or name = :name)
                and (:session is null or session_id = :session)
            limit :limit
            """, window)
        if found[limit:]:
            return {"events": found[:limit], "next": found[limit - 1]["id"]}
        row = db.execute(f"select seq from ({scan} limit :scanned) as scanned limit 1 offset :scanned - 1", window).fetchone()
        return {"events": found, "next": event_ids(row)[0] if row else None}

    def device(self, device_id_hash: str) -> Figures:
        """Everything that is kept of a device, in all apps."""
        with self._store.reading() as db:
            db.execute("begin")
            found = {
                "apps": dict_rows(db, """
                    select name as app, first_seen, last_seen, versions from devices join apps on apps.id = app_id
                    where device_id_hash = ? order by name
                    """, (device_id_hash,)),
                **{table: _reports(db, f"select * from {table} where device_id_hash = :device order by seq",
                                   {"device": device_id_hash}) for table in ("crashes", "events")}}
            db.execute("commit")
        for app in found["apps"]:
            app.update(first_seen=iso_time(app["first_seen"]), last_seen=iso_time(app["last_seen"]),
                       versions=sorted(json.loads(app["versions"]), key=_version_key))
        return found


def _labelled(rows: Iterable[Tuple[str, int]]) -> Figures:
    pairs = list(rows)
    return {"labels": [label for label, _ in pairs], "data": [count for _, count in pairs]}


def _dates(days: Iterable[int]) -> List[str]:
    return [date.fromordinal(_DAY_ZERO + day).isoformat() for day in days]


def _reports(db: Connection, query: str, parameters: Mapping[str, Any]) -> List[Figures]:
    """Crashes or events as they were sent, without what was absent; and their app, and when they were received."""
    apps = dict(db.execute("select id, name from apps"))
    reports = []
    for row in dict_rows(db, query, parameters):
        reports.append(_shown({"id": row.pop("id"), "app": apps.get(row.pop("app_id")), **row}, iso_time))
    return reports


def _shown(row: Mapping[str, Any], time_text: Callable[[int], str]) -> Figures:
    report = {name: value for name, value in row.items() if value is not None and name != "seq"}
    for name in {"stack_trace", "properties", "extra"} & report.keys():
        report[name] = json.loads(report[name])
    for name in ("received_at", "occurred_at"):
        report[name] = time_text(report[name])
    if "is_charging" in report:
        report["is_charging"] = bool(report["is_charging"])
    return report


def _release(app: str, app_version: str, sessions: int, crashes: int, devices: int, crashed_devices: int,
             first_seen: int, last_seen: int, recent: Optional[int], of_all: Optional[int]) -> Figures:
    return {"app": app, "app_version": app_version, "sessions": sessions, "crashes": crashes,
            "crash_free_sessions": crash_free_rate(crashes, sessions),
            "crash_free_devices": crash_free_rate(crashed_devices, devices),
            "adoption": round(100 * (recent or 0) / of_all, 2) if of_all else 0.0,
            "first_seen": iso_time(first_seen), "last_seen": iso_time(last_seen)}


def _version_key(version: str) -> List[Tuple[int, str]]:
    """Sorts 1.10 after 1.9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split("[.+-]", version)]


def _group_cursor(cursor: Optional[str]) -> Tuple[int, str]:
    if cursor is None:
        return MAX_NUMBER, ""
    match = re.fullmatch("([0-9]{1,18})-([0-9a-f]{16})", cursor)
    if match is None:
        raise Refusal("invalid cursor")
    return int(match[1]), match[2]


def _before(cursor: Optional[str]) -> int:
    """The seq of an id that a page ended with."""
    if cursor is None:
        return MAX_NUMBER
    if not re.fullmatch("(evt_)?[0-7][0-9a-f]{15}", cursor):
        raise Refusal("invalid cursor")
    return int(cursor[-16:], 16)


_WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


def crash_free_rate(crashes: int, sessions: int) -> float:
    """Percent of sessions without a crash, with two decimals."""
    if not sessions:
        return 0.0 if crashes else 100.0
    return round(max(0.0, 100 * (1 - crashes / sessions)), 2)


# == Requests ==================================================================
#
# Reads what a request carries, and lists every error that a client can get. bottle's
# own readers are not used: they stop at 100 KiB, and fail on headers that are not UTF-8.

# The error texts by status. A text that is not here starts with `missing` or `invalid` and has status 400.
ERRORS = {
    401: ("missing API key", "invalid API key", "missing admin token", "invalid admin token",
          "invalid signature", "stale timestamp", "signature required"),
    404: ("not found",),
    405: ("method not allowed",),
    413: ("request body too large",),
    415: ("unsupported content encoding",),
    422: ("idempotency key reused with a different body",),
    429: ("rate limit exceeded",),
    431: ("request header too large",),
    500: ("internal server error",),
    501: ("transfer encoding not supported",),
    503: ("storage unavailable",),
}
_STATUS = {text: status for status, texts in ERRORS.items() for text in texts}
_STATUS_LINES = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}
_HEADERS = {"Content-Type": "application/json", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}

Environ = Dict[str, Any]
Answer = Tuple[int, Union[Dict[str, Any], str]]  # status, and a JSON object or a text
Handler = Callable[..., Answer]  # called with an environ and the parts of the path


def _error_body(status: int) -> bytes:
    """The JSON for an error that bottle or waitress raised."""
    text, *_ = ERRORS.get(status, ("invalid request",))
    return json.dumps({"error": text}).encode()


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
    if encoding != b"gzip":
        raise Refusal("unsupported content encoding")
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


def _parameters(environ: Environ, *names: str) -> Dict[str, Any]:
    """The query parameters of these names, without empty ones. Raises Refusal for an invalid number."""
    found = parse_qs(_query(environ), keep_blank_values=True)
    given: Dict[str, Any] = {name: values[-1] for name, values in found.items()}
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
    return (f"curl -X POST {url}/api/v1/crashes \\\n"
            '    -H "Content-Type: application/json" \\\n'
            f'    -H "X-Backfeedr-Key: {key}" \\\n'
            f"""    -d '{{"exception_type": "SIGABRT", "occurred_at": "{now}"}}'""")


# == Charts ====================================================================
#
# Functions from numbers to SVG. Horizontal positions are percentages, so that a chart
# is as wide as the page has room for. Labels of days are ISO dates.

_HEIGHT, _EDGE = 72, 3  # pixels: the height of a chart, and the margin above and below its lines
_NO_CHART = '<p class="empty">None in these days.</p>'
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

escape = bottle.html_escape

Values = Sequence[Optional[float]]
Draw = Callable[[Values, float], str]  # SVG from y positions in pixels, and the percentage from one to the next


def line_chart(title: str, labels: Sequence[str], values: Values, low: float = 0, unit: str = "") -> str:
    """A line through one value a day, from `low` up, and a dot for today, which is not over. None leaves a gap."""
    return _chart(title, labels, values, _draw_line, low, unit)


def column_chart(title: str, labels: Sequence[str], values: Values) -> str:
    """A column for one value a day."""
    return _chart(title, labels, values, _draw_columns)


def _draw_line(ys: Values, step: float) -> str:
    xs, today = [f"{(n + 0.5) * step:.2f}%" for n in range(len(ys))], len(ys) - 1
    starts = [n for n in range(today - 1) if ys[n] is not None and ys[n + 1] is not None]
    dots = [n for n, y in enumerate(ys) if y is not None and (n == today or not {n - 1, n} & set(starts))]
    return "".join([
        *(f'<line x1="{xs[n]}" x2="{xs[n + 1]}" y1="{ys[n]:.1f}" y2="{ys[n + 1]:.1f}"/>' for n in starts),
        *(f'<circle cx="{xs[n]}" cy="{ys[n]:.1f}" r="2.5"/>' for n in dots)])


def _draw_columns(ys: Values, step: float) -> str:
    return "".join(f'<rect x="{(n + 0.15) * step:.2f}%" width="{0.7 * step:.2f}%" y="{y:.1f}"'
                   f' height="{_HEIGHT - _EDGE - y:.1f}"/>' for n, y in enumerate(ys) if y is not None)


def _chart(title: str, labels: Sequence[str], values: Values, draw: Draw, low: float = 0, unit: str = "") -> str:
    known = [(value, label) for value, label in zip(values, labels) if value is not None]
    if not known:
        return _NO_CHART
    (highest, peak), (lowest, _) = max(known), min(known)
    high, step, bottom = 100 if unit else _ceiling(highest), 100 / len(values), _HEIGHT - _EDGE
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
            f'<g class="axis">{axis}</g><g class="marks">{draw(ys, step)}</g>{days}</svg>'
            f'<p><span>{first}</span><span>{last}</span></p></div>')


def _ceiling(value: float) -> int:
    """The next round number: 1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, ..."""
    unit = 10 ** max(0, len(str(int(value))) - 2)
    steps = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 40, 50, 60, 80, 100)
    return next(unit * step for step in steps if value <= unit * step)


def _day(label: str) -> str:
    day = date.fromisoformat(label)
    return f"{day.day} {_MONTHS[day.month - 1]}"


def sparkline(values: Sequence[int], title: str) -> str:
    """A line as high as a line of text, through one value a day."""
    high, total = max(*values, 1), f"{sum(values):,} in {len(values)} days"
    points = " ".join(f"{4 * n},{19 - 17 * value / high:.1f}" for n, value in enumerate(values))
    return (f'<svg class="spark" role="img" aria-label="{title}: {total}" width="118" height="20">'
            f'<title>{total}</title><polyline points="{points}"/></svg>')


def bar_chart(figures: Figures, total: Optional[int] = None) -> str:
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
#
# The pages, for whoever has the admin token. They load nothing from other hosts and
# use no JavaScript. What a report contains is hostile: it reaches a page only through
# `{{ }}` or escape(), an address also through urlencode(), and never a style.

SESSION_LIFETIME = 7 * DAY
LINK_LIFETIME = 600 * SECOND  # of a link that signs in once
SIGN_IN_TRIES = 10  # a minute, for all clients together, because no IP address is stored
PAGE_ROWS = 25
SHOWN_FRAMES, SHOWN_TEXT = 200, 20_000  # frames and characters of a report on its page; the API has the rest

_FORM_EXPIRED = "form expired"
_FROM_ELSEWHERE = "You came here from another site, so your browser did not say who you are."
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # characters that HTML does not allow

Response = bottle.HTTPResponse
PageHandler = Callable[..., Response]  # called with a PageRequest and the parts of the path


class PageRequest:
    """A request for a page: its address, its browser's cookies and, after read_form(), its form."""

    def __init__(self, environ: Environ, now: int, public_url: str):
        self.environ, self.now, self._public_url = environ, now, public_url.rstrip("/")
        self.root = quote(environ.get("SCRIPT_NAME", "").encode("latin-1", "replace")).rstrip("/")
        self.path = quote(environ.get("PATH_INFO", "").encode("latin-1", "replace"))
        self.section = "/" + self.path.split("/")[1] if "/" in self.path else "/"
        given = parse_qsl(_query(environ))  # without the fields that a form left empty
        self.query = urlencode(given)
        self.address = self.path + ("?" + self.query if self.query else "")
        self.app: Optional[str] = dict(given).get("app")
        self.apps: Optional[List[App]] = None  # None unless the browser is signed in
        self.session = self._cookie("backfeedr")
        self.form_secret = self._cookie("backfeedr_form") or secrets.token_hex(16)
        self.form: Dict[str, str] = {}
        scheme = environ.get("wsgi.url_scheme", "")
        forwarded = environ.get("HTTP_X_FORWARDED_PROTO", scheme).split(",")[0].strip().lower()
        self.is_https = "https" in (forwarded, scheme, public_url.partition(":")[0])

    def _cookie(self, name: str) -> str:
        found = re.search(f"(?:^|; ?){name}=([0-9a-f]{{32}})(?:;|$)", self.environ.get("HTTP_COOKIE", ""))
        return found[1] if found else ""

    @property
    def url(self) -> str:
        """The address of the server as the browser sees it, without a slash at the end."""
        host = re.fullmatch(r"[0-9A-Za-z.:\[\]-]+", self.environ.get("HTTP_HOST", ""))
        return self._public_url or f"http{'s' * self.is_https}://{host[0] if host else 'localhost'}{self.root}"

    def parameters(self, *names: str) -> Dict[str, Any]:
        return _parameters({"QUERY_STRING": self.query}, *names)

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

    def redirect(self, path: str) -> Response:
        return Response(b"", 303, {**PAGE_HEADERS, "Location": self.root + path})

    def set_cookie(self, response: Response, name: str, value: str) -> None:
        response.set_cookie(name, value, path=self.root + "/", httponly=True, samesite="strict", secure=self.is_https,
                            max_age=SESSION_LIFETIME // SECOND)

    def when(self, time_text: str) -> str:
        """HTML of a time as the API gives it: how long ago it was, and the exact time as a tooltip."""
        exact = time_text[:19].replace("T", " ")
        shown = _ago(self.now - parse_time(time_text)) or exact[:10]
        return f'<time datetime="{time_text}" title="{exact} UTC">{shown}</time>'


def _ago(span: int) -> str:
    """A time span in words; "" after 100 days or in the future, where a date says more."""
    for unit, name in ((DAY, "d"), (HOUR, "h"), (60 * SECOND, "min")):
        if span >= unit:
            return f"{span // unit} {name} ago" if span < 100 * DAY else ""
    return "just now" if span >= -MAX_SKEW else ""


class Dashboard:
    """Answers the requests for pages."""

    def __init__(self, store: Store, metrics: Metrics, public_url: str = ""):
        self._store, self._metrics, self._public_url = store, metrics, public_url
        self.sign_in_limiter = RateLimiter(SIGN_IN_TRIES)
        self._templates = {name: bottle.SimpleTemplate(source) for name, source in _TEMPLATES.items()}

    def routes(self) -> Iterator[Tuple[str, str, Callable[..., Response]]]:
        """Method, path and handler of each page."""
        for method, path, handler in (
                ("GET", "/", self._overview), ("GET", "/crashes", self._crashes),
                ("GET", "/crashes/<group_hash>", self._group), ("GET", "/events", self._events),
                ("GET", "/releases", self._releases), ("GET", "/apps", self._apps),
                ("POST", "/apps", self._change_apps), ("POST", "/sign-out", self._sign_out),
                ("GET", "/sign-in", self._sign_in_page), ("POST", "/sign-in", self._sign_in)):
            yield method, path, self._with_error_pages(handler)

    def invite(self, url: str) -> str:
        """A link that signs in once, within ten minutes."""
        return f"{url}/sign-in?code={self._store.grant('code', LINK_LIFETIME)}"

    def error_page(self, environ: Environ, status: int, text: str) -> Response:
        """The page for an error that bottle raised."""
        return self._error_page(PageRequest(environ, self._store.now, self._public_url), status, text)

    def _error_page(self, page: PageRequest, status: int, text: str) -> Response:
        return self._render(page, text.capitalize(), "message", status, text=_HINTS.get(status, _HINTS[400]),
                            target="/", label="To the overview")

    def _with_error_pages(self, handler: PageHandler) -> Callable[..., Response]:
        """The handler as a callback for bottle, with a page for every error."""
        def respond(**path: str) -> Response:
            page = PageRequest(bottle.request.environ, self._store.now, self._public_url)
            try:
                return self._check_session(page) or handler(page, **path)
            except Refusal as refusal:
                status = 403 if str(refusal) == _FORM_EXPIRED else _STATUS.get(str(refusal), 400)
                response = self._error_page(page, status, str(refusal))
                if refusal.retry_after is not None:
                    response.set_header("Retry-After", str(refusal.retry_after))
                return response
            except Exception:
                log.exception("unexpected error")
                return self._error_page(page, 500, "internal server error")
        return respond

    def _check_session(self, page: PageRequest) -> Optional[Response]:
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
        page.set_cookie(response, "backfeedr_form", page.form_secret)
        return response

    def _sign_in(self, page: PageRequest) -> Response:
        if not self.sign_in_limiter.allow(b""):
            wait = self.sign_in_limiter.retry_after(b"")
            response = self._sign_in_page(page, f"Too many tries. The next one is in {wait} seconds.", 429)
            response.set_header("Retry-After", str(wait))
            return response
        if not self._store.is_admin(page.form.get("token", "").strip().encode()):
            return self._sign_in_page(page, "That is not the admin token.", 403)
        return self._start_session(page, page.form.get("next", ""))

    def _start_session(self, page: PageRequest, target: str) -> Response:
        """With a new session id: an attacker may have planted the one that the browser had."""
        is_our_path = re.fullmatch(r"/(?![/\\])[!-~]*", target)
        response = page.redirect(target if is_our_path else "/")
        page.set_cookie(response, "backfeedr", self._store.grant("session", SESSION_LIFETIME))
        return response

    def _sign_out(self, page: PageRequest) -> Response:
        self._store.withdraw("session", page.session)
        return page.redirect("/sign-in")

    # The pages

    def _overview(self, page: PageRequest) -> Response:
        metrics, app = self._metrics, page.app
        week, crashes = metrics.overview(app), metrics.daily_crashes(app, 30)
        tiles = _tiles(week, crashes["labels"], crashes["data"], metrics.sessions(app, 30)["sessions"],
                       metrics.active_devices(app, 30)["dau"])
        return self._render(
            page, "Overview", "overview", is_empty=metrics.is_empty(app), tiles=tiles, top=week["top_crashes"],
            latest=metrics.releases(app)["releases"][:4], types=metrics.crash_types(app, 30),
            devices=metrics.devices(app, 30), crashes=column_chart("Crashes", crashes["labels"], crashes["data"]))

    def _crashes(self, page: PageRequest) -> Response:
        parameters = page.parameters("version", "days", "text", "cursor")
        found = self._metrics.groups(page.app, **parameters, limit=PAGE_ROWS)
        details = self._metrics.group_days([group["group_hash"] for group in found["groups"]], page.app)["groups"]
        return self._render(page, "Crashes", "crashes", parameters=parameters, next=found["next"],
                            groups=[{**group, **details[group["group_hash"]]} for group in found["groups"]],
                            day_choices=sorted({1, 7, 30, 90, 365, parameters.get("days", 1)}),
                            versions=[each["app_version"] for each in self._metrics.releases(page.app)["releases"]])

    def _group(self, page: PageRequest, group_hash: str) -> Response:
        metrics, parameters = self._metrics, page.parameters("cursor", "report")
        group = metrics.group(group_hash, page.app, cursor=parameters.get("cursor"))
        reports = group["reports"]
        report = metrics.crash(parameters["report"], page.app) if "report" in parameters else next(iter(reports), {})
        if report.get("group_hash") != group_hash:
            raise Refusal("not found")
        days = metrics.group_days([group_hash], page.app)
        return self._render(
            page, group["exception_type"], "group", group=group, report=report, parameters=parameters,
            next=group["next"], chart=column_chart("Crashes", days["labels"], days["groups"][group_hash]["days"]),
            frames=[_frame(frame) for frame in report.get("stack_trace", [])], max_frames=SHOWN_FRAMES,
            context=_context(report), has_reasons=len({each.get("exception_reason") for each in reports}) > 1)

    def _events(self, page: PageRequest) -> Response:
        parameters = page.parameters("type", "name", "session_id", "cursor")
        if parameters.get("type", "custom") not in EVENT_TYPES:
            raise Refusal("invalid event type")
        query, title = self._metrics.events, "Events"
        if "session_id" in parameters:
            query, title = self._metrics.session, "A session"
            parameters = {name: value for name, value in parameters.items() if name not in ("type", "name")}
        found = query(app=page.app, **parameters, limit=2 * PAGE_ROWS)
        return self._render(page, title, "events", **found, parameters=parameters, types=EVENT_TYPES)

    def _releases(self, page: PageRequest) -> Response:
        return self._render(page, "Releases", "releases", **self._metrics.releases(page.app))

    def _apps(self, page: PageRequest, status: int = 200, **notice: str) -> Response:
        page.apps, keys = self._store.apps(), self._store.keys()
        return self._render(page, "Apps", "apps", status, notice=notice, keys={
            app.name: [key for key in keys if key.app == app.name] for app in page.apps})

    def _change_apps(self, page: PageRequest) -> Response:
        try:
            return self._apps(page, **self._change(page.form, page.form.get("name", "")))
        except StoreError as error:
            return self._apps(page, 400, problem=str(error).capitalize())

    def _change(self, form: Dict[str, str], name: str) -> Dict[str, str]:
        """Does what a form of the page of apps asks for. Returns what the page then says."""
        action = form.get("action")
        if action == "revoke":
            key = self._store.revoke_key(form.get("key", ""))
            return {"message": f"Revoked the key {key.prefix}... of {key.app}."}
        if action == "delete":
            return {"message": self._delete_app(name, form.get("typed"))}
        if action not in ("create", "key"):
            raise StoreError("there is no such action")
        new_key = self._store.create_key(name) if action == "key" else self._store.create_app(name, "test" in form)
        return {"message": f"The new key of {name}, shown only this once:", "key": new_key}

    def _delete_app(self, name: str, typed: Optional[str]) -> str:
        """Deletes in a thread, because a large app takes longer than a proxy waits for an answer."""
        if typed != name:
            raise StoreError(f"to delete it, type its name: {name}")
        errors: List[Exception] = []

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


def _tiles(week: Figures, labels: Sequence[str], crashes: Sequence[int], sessions: Sequence[int],
           devices: Sequence[int]) -> Iterator[Tuple[str, str, str, str]]:
    """Name, value, note and chart of the figures on top of the overview."""
    rates = [crash_free_rate(*day) if any(day) else None for day in zip(crashes, sessions)]
    lowest = min((rate for rate in rates if rate is not None), default=0)
    axis_start = max(rate for rate in (0, 50, 80, 90, 95, 99) if rate <= lowest)
    crashes_before, sessions_before = sum(crashes[-14:-7]), sum(sessions[-14:-7])
    rate = f"{week['crash_free_rate_7d']:.2f} %" if week["crashes_7d"] or week["sessions_7d"] else "-"
    rate_before = f"{crash_free_rate(crashes_before, sessions_before):.2f} % in the 7 before"
    rate_note = f"7 days; {rate_before}" if crashes_before or sessions_before else "7 days"
    yield "Crash-free sessions", rate, rate_note, line_chart("Crash-free sessions", labels, rates, axis_start, " %")
    yield "Active devices", f"{week['dau']:,}", "24 hours", line_chart("Active devices", labels, devices)
    for name, value, before, days in (("Sessions", week["sessions_7d"], sessions_before, sessions),
                                      ("Crashes", week["crashes_7d"], crashes_before, crashes)):
        yield name, f"{value:,}", f"7 days; {before:,} in the 7 before", line_chart(name, labels, days)


_CONTEXT: Dict[str, Tuple[str, Callable[[Any], str]]] = {
    "app": ("App", str), "app_version": ("Version", str), "build_number": ("Build", str),
    "os_version": ("System", str), "device_model": ("Device", str), "locale": ("Locale", str),
    "free_memory_mb": ("Free memory", "{:,} MB".format),
    "battery_level": ("Battery", lambda level: f"{level:.0%}" if level >= 0 else "unknown"),
    "is_charging": ("Charging", lambda is_charging: "yes" if is_charging else "no"),
    "device_id_hash": ("Device id", str), "id": ("Report", str)}


def _context(report: Figures) -> List[Tuple[str, str]]:
    """Name and value of what a crash says about the device, then of the fields that this server does not know."""
    known = [(name, as_text(report[field])) for field, (name, as_text) in _CONTEXT.items() if field in report]
    return known + [(name, _as_text(value)) for name, value in report.get("extra", {}).items()]


def _frame(frame: Figures) -> Tuple[str, str, bool]:
    """Symbol and place of a frame, with fields such as its library; and whether it is one of the app itself."""
    file, line = frame.get("file"), frame.get("line")
    place = [file if line is None else f"{file}:{line}"] if file else []
    place += [_as_text(value) for name, value in frame.items()
              if name not in ("frame", "symbol", "file", "line") and value is not None]
    return frame.get("symbol") or "(no symbol)", ", ".join(place), bool(file)


def _details(event: Figures) -> str:
    """The first twenty properties and unknown fields of an event."""
    given = {**event.get("properties", {}), **event.get("extra", {})}
    return ", ".join(f"{name}: {_shorten(_as_text(value), 100)}" for name, value in list(given.items())[:20])


def _as_text(value: Any) -> str:
    """Any JSON value for a reader: a list has an item to a line."""
    items = value if type(value) is list else [value]
    return _shorten("\n".join(item if type(item) is str else json.dumps(item, ensure_ascii=False) for item in items),
                    SHOWN_TEXT)


def _shorten(text: str, length: int = 300) -> str:
    return text if len(text) <= length else text[:length] + "..."


def _options(choices: Iterable[Any], chosen: Any = None) -> str:
    return "".join(f'<option{" selected" if choice == chosen else ""}>{escape(str(choice))}</option>'
                   for choice in choices)


# == Templates =================================================================
#
# The HTML and CSS of the pages. Templates know only `for` and `if`; `{{ }}` escapes,
# `{{! }}` takes HTML that was made above. What several templates share is a constant
# or a function with their source, such as _list() and _form().

_PAGES = (("/", "Overview"), ("/crashes", "Crashes"), ("/events", "Events"), ("/releases", "Releases"),
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
        head += f"{start}<th{css}>{label}</th>\n{end}"
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
_CRASH_FREE = Column("Crash-free sessions", '{{"%.2f" % row["crash_free_sessions"]}} %', "number")
_ADOPTION = Column("Adoption", '{{"%.1f" % row["adoption"]}} %', "number")
_GROUP_LINK = '<a href="{{link("/crashes/" + row["group_hash"])}}"><bdi>{{row["exception_type"]}}</bdi></a>\n'
_REASON = '<span class="reason"><bdi>{{shorten(row["exception_reason"])}}</bdi></span>'
_RELEASE_LINK = ('<a href="{{link("/crashes", app=row["app"], version=row["app_version"])}}">'
                 '<bdi>{{row["app_version"]}}</bdi></a>')
_NO_RELEASE = "No release yet: reports that carry an <code>app_version</code> show here."
_FILTER = """<form class="filter" method="get" action="{{page.root}}{{page.path}}">
<input type="hidden" name="app" value="{{page.app or ""}}">
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
    "overview": """% if is_empty:
<section class="hint"><p>Nothing has been received yet. Send a first crash, with the key of an app
(<a href="{{link("/apps")}}">Apps</a> makes a new one):</p>
<pre>{{curl_line(page.url, "bf_live_your_key")}}</pre></section>
% end
<div class="tiles">
% for name, value, note, chart in tiles:
<section><h2>{{name}}</h2><p class="figure">{{value}}</p><p class="note">{{note}}</p>{{!chart}}</section>
% end
</div>
<div class="halves"><section><h2>Crashes per day</h2>{{!crashes}}</section>
<section><h2><a href="{{link("/releases")}}">Latest releases</a></h2>
""" + _list(
        "latest", Column("Version", _RELEASE_LINK + """
<span class="reason"><bdi>{{"" if page.app else row["app"]}}</bdi></span>""", "main"),
        _CRASH_FREE, _ADOPTION, empty=_NO_RELEASE) + """</section></div>
<section><h2><a href="{{link("/crashes", days=7)}}">Most frequent crashes of 7 days</a></h2>
""" + _list(
        "top", _CRASHES, Column("Group", _GROUP_LINK + _REASON, "main"),
        empty="No crash in the last 7 days.") + """</section>
<div class="halves"><section><h2>Exception types, 30 days</h2>{{!bar_chart(types)}}</section>
<section><h2>Crashing devices, 30 days</h2>{{!bar_chart(devices)}}</section></div>
""",
    "crashes": _FILTER + """<label>Version <input name="version" list="versions"
value="{{parameters.get("version", "")}}"></label><datalist id="versions">{{!options(versions)}}</datalist>
<label>Days
<select name="days"><option value="">all</option>{{!options(day_choices, parameters.get("days"))}}</select></label>
<label>Text <input type="search" name="text" value="{{parameters.get("text", "")}}"></label>
<button>Show</button></form>
""" + _list(
        "groups", _CRASHES, Column("Group", _GROUP_LINK + """\
<code><bdi>{{shorten(row["place"], 120)}}</bdi></code>
""" + _REASON, "main"),
        _APP._replace(cell='<bdi>{{", ".join(row["apps"])}}</bdi>'),
        Column("30 days", '{{!sparkline(row["days"], "Crashes")}}'),
        Column("Devices", _COUNT % "devices", "number"),
        Column("Versions", '<bdi>{{", ".join(shorten(version, 40) for version in row["versions"][-2:])}}</bdi>'
                           '{{", +{}".format(len(row["versions"]) - 2) if len(row["versions"]) > 2 else ""}}'),
        *_SEEN, empty="""
% if parameters:
No crash fits. <a href="{{link("/crashes")}}">Show all</a>
% else:
No crash is kept{{" of " + page.app if page.app else ""}}. When one comes in, it is here at once;
<a href="{{link("/apps")}}">Apps</a> has the keys to send one with.
% end
""") + _PAGE_LINKS,
    "group": """<p class="reason"><bdi>{{shorten(report.get("exception_reason", ""), 5000)}}</bdi></p>
<dl class="facts"><div><dt>Crashes</dt><dd>{{number(group["count"])}}</dd></div>
<div><dt>Devices</dt><dd>{{number(group["devices"])}}</dd></div>
<div><dt>First seen</dt><dd>{{!when(group["first_seen"])}}</dd></div>
<div><dt>Last seen</dt><dd>{{!when(group["last_seen"])}}</dd></div>
<div><dt>Group</dt><dd><code>{{group["group_hash"]}}</code></dd></div></dl>
<section><h2>Crashes per day</h2>{{!chart}}</section>
<section><h2>{{"A crash" if parameters else "The latest crash"}}, {{!when(report["occurred_at"])}}</h2>
<div class="crash"><div>
% if frames:
<ol class="trace" start="0">
% for symbol, place, is_own in frames[:max_frames]:
<li{{!' class="own"' if is_own else ""}}><code><bdi>{{shorten(symbol, 1000)}}</bdi></code>
<span class="place"><bdi>{{shorten(place)}}</bdi></span></li>
% end
</ol>
% if frames[max_frames:]:
<p class="note">and {{number(len(frames) - max_frames)}} further frames</p>
% end
% if any(is_own for _, _, is_own in frames):
<p class="note">Frames of the app itself are those with a file.</p>
% else:
<p class="note">No frame has a file, so none is known to be the app's own.</p>
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
    ) + _PAGE_LINKS + "</section>\n",
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
    "releases": _list(
        "releases", Column("Version", _RELEASE_LINK, "main"), _APP._replace(condition="not page.app"), _CRASH_FREE,
        Column("Crash-free devices", '{{"%.2f" % row["crash_free_devices"]}} %', "number"),
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
""", action="create") + "</section>\n"}

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
.note { margin: 0.2rem 0; }
footer { margin-top: 3rem; padding-top: 0.6rem; border-top: 1px solid var(--rule); }
table { border-collapse: collapse; width: 100%; } th { text-align: left; font-weight: 400; }
th, td { padding: 0.4rem 1.2rem 0.4rem 0; vertical-align: top; } :is(th, td):last-child { padding-right: 0; }
time, .number { white-space: nowrap; } .number { text-align: right; }
.list tr { border-bottom: 1px solid var(--rule); }
.list tr[aria-current], .own, .hint, pre, .long dd, button { background: var(--tint); }
.list td:is([data-label="App"], [data-label="Versions"]) { min-width: 6.5rem; }
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
input, select, button { font: inherit; color: inherit; border: 1px solid var(--soft); border-radius: 3px;
  padding: 0.3rem 0.6rem; max-width: 100%; }
input, select { background: var(--paper); }
button, summary { cursor: pointer; } button:hover { border-color: var(--ink); }
.plain { border: 0; padding: 0.2rem 0; background: none; } .danger, .problem { color: var(--bad); }
.sign-in { max-width: 24rem; } .sign-in :is(form, input) { width: 100%; } .sign-in label { display: block; }
.hint { margin-bottom: 1.5rem; padding: 0.3rem 1rem 0.8rem; border-left: 3px solid var(--mark); }
.key { font-size: 1.1em; user-select: all; } .actions { margin-top: 0.6rem; }
.more { display: inline-block; margin: 1rem 1.5rem 0 0; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
@media (max-width: 48rem) {
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
    "bar_chart": bar_chart, "curl_line": curl_line, "details": _details, "icon": _ICON, "iso": iso_time,
    "number": "{:,}".format, "options": _options, "pages": _PAGES, "shorten": _shorten, "sparkline": sparkline,
    "style": STYLE}


# == Backfeedr =================================================================
#
# The WSGI callable. A handler reads "decode, check, store, answer"; whoever may
# not come so far has been turned away before.

class Backfeedr:
    """The server as a WSGI callable, for any mount point.

    `Backfeedr(db_path="crashes.db")` takes further settings from the environment,
    `Backfeedr(Settings(...))` takes none. Raises SettingsError and StoreError. `store`
    is for keys and queries from Python. A new database gets an app and an admin token:
    `announce` is told them, once, in words for the operator. `clock` gives seconds
    since 1970. Close it, or use it as a context manager.

    `store` takes the place of the file that the settings name, and is closed with the
    server; `limiter` takes that of a RateLimiter, which knows of this process only.
    """

    def __init__(self, settings: Optional[Settings] = None, *, clock: Callable[[], float] = time.time,
                 store: Optional[Store] = None, limiter: Optional[RateLimiter] = None,
                 announce: Optional[Callable[[str], Any]] = None, **overrides: Any):
        if settings is not None and overrides:
            raise TypeError("give settings or single ones, not both")
        self.settings = settings or Settings.from_env(**overrides)
        self.store = store or Store(self.settings.db_path, clock, self.settings.retention_days,
                                    max_waiters=max(256, self.settings.threads))
        self.metrics = Metrics(self.store)
        self._limiter = limiter or RateLimiter(self.settings.rate_limit)
        # Python runs one thread at a time. Those that wait here sleep until it is their
        # turn; those that wait for the interpreter wake up each switch interval to ask.
        self._turn = threading.Lock()
        self._requests: Counter = Counter()  # by method, route and status
        self._counting = threading.Lock()
        self.pages = Dashboard(self.store, self.metrics, self.settings.public_url)
        self._ingestion: Dict[str, Tuple[Callable[[Given], Reports], Callable[..., Dict[str, Any]]]] = {
            # By path: what makes reports of a body, and an answer of them.
            "/api/v1/crashes": (lambda given: [parse_crash(given)], _crash_answer),
            "/api/v1/events": (lambda given: [parse_event(given)], _event_answer),
            "/api/v1/events/batch": (parse_batch, _batch_answer)}
        self._router = self._routes()
        made = self.store.start(self.settings.api_key, self.settings.auth_token)
        if made != (None, None):
            url = self.settings.public_url.rstrip("/") or _url(self.settings.host, self.settings.port)
            (announce or sys.stderr.write)(first_start_text(made, url))

    def __call__(self, environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ.get("REQUEST_METHOD", ""), environ.get("PATH_INFO", "")
        if method == "POST" and path in self._ingestion:  # without bottle, whose part would be as large as ours
            body, status, headers = _answered(self._submitted, environ)
            start_response(_STATUS_LINES[status], [*headers.items(), ("Content-Length", str(len(body)))])
            self._count(method, path, status)
            return [body]
        try:
            path.encode("latin-1").decode("utf-8")
        except UnicodeError:  # of which bottle would drop the bytes, and find what is left
            path = "/api/not found" if path.startswith("/api/") else "/not found"
        environ = {**environ, "PATH_INFO": path, "bottle.route": None}  # an outer bottle may have set it
        answer = self._router(environ, start_response)
        route = environ["bottle.route"]
        self._count(route.method if route else "other", route.rule if route else "other", bottle.response.status_code)
        return answer

    def _count(self, method: str, rule: str, status: int) -> None:
        """By the route and not the path: a stranger could make up paths without end."""
        with self._counting:
            self._requests[method, rule, status] += 1

    def __enter__(self) -> Backfeedr:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def close(self) -> None:
        """Closes the database. May be called twice."""
        self.store.close()

    def _routes(self) -> bottle.Bottle:
        ask, router = self.metrics, _Router(self.pages)
        for method, path, handler in (
                ("GET", "/health", self._health),
                ("POST", "/crashes", self._submitted),
                ("POST", "/events", self._submitted),
                ("POST", "/events/batch", self._submitted),
                ("GET", "/metrics/daily-crashes", self._asked(ask.daily_crashes, "days")),
                ("GET", "/metrics/crash-types", self._asked(ask.crash_types, "days")),
                ("GET", "/metrics/devices", self._asked(ask.devices, "days")),
                ("GET", "/metrics/active-devices", self._asked(ask.active_devices, "days")),
                ("GET", "/metrics/sessions", self._asked(ask.sessions, "days")),
                ("GET", "/metrics/retention", self._asked(ask.retention, "days")),
                ("GET", "/overview", self._asked(ask.overview)),
                ("GET", "/releases", self._asked(ask.releases)),
                ("GET", "/crashes", self._read(ask.groups, "version", "days", "text", "limit", "cursor")),
                ("GET", "/crashes/<group_hash>", self._read(ask.group, "limit", "cursor")),
                ("GET", "/events", self._read(ask.events, "type", "name", "session_id", "limit", "cursor"))):
            router.route("/api/v1" + path, method, _by_bottle(handler))
        router.route("/metrics", "GET", _by_bottle(self._prometheus))
        for method, path, page in self.pages.routes():
            router.route(path, method, page)
        return router

    def _health(self, environ: Environ) -> Answer:
        self.store.check()
        return 200, {"status": "ok"}

    def _prometheus(self, environ: Environ) -> Answer:
        self._check_admin(environ)
        with self._counting:
            requests = sorted(self._requests.items())
        figures = [("requests_total", "counter", "Requests that reached the app, by route.", [
            ('{method="%s",path="%s",status="%d"}' % key, n) for key, n in requests]), *self.store.vitals()]
        lines = [line for name, kind, meaning, samples in figures for line in (
            f"# HELP backfeedr_{name} {meaning}", f"# TYPE backfeedr_{name} {kind}",
            *(f"backfeedr_{name}{suffix} {value:.15g}" for suffix, value in samples))]
        return 200, "\n".join([*lines, ""])

    def may_gather(self, method: str, path: str, key: str) -> bool:
        """Whether such a request may be submitted together with others: not where it would keep them waiting,
        because another host or the database has to be asked of it."""
        return (method == "POST" and path in self._ingestion and not getattr(self._limiter, "waits", True)
                and self.store.is_cached_key(sha256(key.encode("latin-1", "replace"))))

    def submit(self, environs: Iterable[Environ]) -> None:
        """Takes what several requests to the ingestion carry, and stores it in one commit. The WSGI call, which
        does so for a request that comes alone, then only answers each."""
        submissions: List[Submission] = []
        try:
            for environ in environs:
                environ[_SUBMISSION] = submission = Submission()
                submissions.append(submission)
                try:
                    self._take(environ, submission)
                except Refusal as refusal:
                    refusal.__traceback__ = refusal.__context__ = None  # which hold the body
                    submission.error = refusal
                except Exception as error:
                    submission.error = error
        finally:
            self.store.add_all([each for each in submissions if each.error is None])
        self._look_again([each for each in submissions if each.key_hash and not each.reports])

    def _look_again(self, refused: Sequence[Submission]) -> None:
        """A key may have been revoked since it was seen. A commit looks; so must a refusal: once for each key, as a
        database that is away is waited for."""
        for key_hash in {each.key_hash for each in refused}:
            try:
                error = None if self.store.is_active_key(key_hash) else Refusal("invalid API key")
            except StorageUnavailable:
                error = StorageUnavailable()
            for each in refused:
                if error and each.key_hash == key_hash:
                    each.error = error

    def _submitted(self, environ: Environ) -> Answer:
        if _SUBMISSION not in environ:
            self.submit([environ])
        submission = environ.pop(_SUBMISSION)  # as a host app may call again with the same one
        seqs, replayed = submission.result()
        _, answer = self._ingestion[environ["PATH_INFO"]]
        return 200 if replayed else 201, answer(submission.reports, seqs)

    def _take(self, environ: Environ, submission: Submission) -> None:
        """Checks in the order of the contract: size, key, rate, signature, JSON, fields."""
        body = _read_body(environ, self.settings.max_body_size)
        key = _header(environ, "X_BACKFEEDR_KEY")
        key_hash = sha256(key)
        if not key:
            raise Refusal("missing API key")
        if not self.store.is_known_key(key_hash):
            raise Refusal("invalid API key")
        submission.key_hash = key_hash
        parse, _ = self._ingestion[environ["PATH_INFO"]]
        self._check_rate(key_hash)  # may ask another host, for which nobody else should wait
        with self._turn:
            signature = self._check_signature(environ, key, body)
            plain = _decompress(environ, body, self.settings.max_body_size)
            submission.reports = parse(decode_json(plain))
            submission.idempotency = _idempotency(environ, signature, plain)

    def _check_rate(self, key_hash: bytes) -> None:
        if not self._limiter.allow(key_hash):
            raise Refusal("rate limit exceeded", self._limiter.retry_after(key_hash))

    def _check_signature(self, environ: Environ, key: bytes, body: bytes) -> bytes:
        """The signature, if it is good; b"" where there is none and none is required."""
        timestamp, signature = _header(environ, "X_BACKFEEDR_TIMESTAMP"), _header(environ, "X_BACKFEEDR_SIGNATURE")
        if "HTTP_X_BACKFEEDR_TIMESTAMP" in environ or "HTTP_X_BACKFEEDR_SIGNATURE" in environ:
            verify(key, timestamp, signature, body, self.store.now)
        elif self.settings.require_signature:
            raise Refusal("signature required")
        return signature

    def _asked(self, question: Callable[..., Figures], *names: str) -> Handler:
        """What anyone may ask, unless the settings say otherwise; by app, and by the parameters of these names."""
        if not self.settings.public_metrics:
            return self._read(question, *names)
        return lambda environ, **path: (200, question(**path, **_parameters(environ, "app", *names)))

    def _read(self, question: Callable[..., Figures], *names: str) -> Handler:
        """What the admin may ask."""
        def handler(environ: Environ, **path: str) -> Answer:
            self._check_admin(environ)
            return 200, question(**path, **_parameters(environ, "app", *names))
        return handler

    def _check_admin(self, environ: Environ) -> None:
        scheme, _, token = _header(environ, "AUTHORIZATION").partition(b" ")
        if scheme.lower() != b"bearer" or not token.strip():
            raise Refusal("missing admin token")
        if not self.store.is_admin(token.strip()):
            raise Refusal("invalid admin token")


class _Router(bottle.Bottle):
    """Bottle, whose own refusals are JSON, or a page of ours for a browser that is not at the API."""

    def __init__(self, pages: Dashboard):
        super().__init__()
        self._pages = pages

    def default_error_handler(self, error: bottle.HTTPError) -> bottle.HTTPResponse:
        environ, status = bottle.request.environ, error.status_code
        if "text/html" in environ.get("HTTP_ACCEPT", "") and not environ["PATH_INFO"].startswith("/api/"):
            answer = self._pages.error_page(environ, status, ERRORS.get(status, ["invalid request"])[0])
        else:
            answer = bottle.HTTPResponse(_error_body(status), status, _HEADERS)
        if "Allow" in error.headers:
            answer.set_header("Allow", error.headers["Allow"])
        return answer


_SUBMISSION = "backfeedr.submission"  # in an environ


def _answered(handler: Handler, environ: Environ, **path: str) -> Tuple[bytes, int, Dict[str, str]]:
    """Body, status and headers of what a handler says, whatever happens: a text as it is, all else as JSON."""
    headers = _HEADERS
    try:
        status, answer = handler(environ, **path)
        if type(answer) is str:
            return answer.encode(), status, {**headers, "Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
    except Refusal as refusal:
        status, answer = _STATUS.get(str(refusal), 400), {"error": str(refusal)}
        if refusal.retry_after is not None:
            headers = {**headers, "Retry-After": str(refusal.retry_after)}
    except Exception:
        log.exception("unexpected error")
        return _error_body(500), 500, headers
    return json.dumps(answer).encode(), status, headers


def _by_bottle(handler: Handler) -> Callable[..., bottle.HTTPResponse]:
    return lambda **path: bottle.HTTPResponse(*_answered(handler, bottle.request.environ, **path))


def _crash_answer(crashes: Sequence[Crash], seqs: range) -> Dict[str, Any]:
    return {"id": crash_id(seqs[0]), "group_hash": crashes[0].group_hash}


def _event_answer(events: Sequence[Event], seqs: range) -> Dict[str, Any]:
    return {"id": event_ids(seqs)[0]}


def _batch_answer(events: Sequence[Event], seqs: range) -> Dict[str, Any]:
    return {"count": len(seqs), "ids": event_ids(seqs)}


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
#
# waitress, and what it needs to be ours: what it refuses is answered in JSON, a stop
# answers everything that has been sent, no address is logged, its one I/O thread
# gets its turn, and reports that come together share a thread and a commit.

DRAIN_SECONDS = 4.0  # a stop waits so long for requests that have begun to arrive
SWITCH_SECONDS = 0.002  # how long a thread may keep the interpreter while others wait for it
QUIET_SECONDS = 0.3  # a connection that is silent so long has sent nothing more
REQUEST_SECONDS = 60  # for a request to arrive, and for a connection between two requests;
SLOWEST = 2000  # bytes a second, a phone's on a bad day: the time that they take is not counted
TOGETHER = 100  # submissions that are taken until they are durable: of batches, as many rows as may wait for a commit;
TOGETHER_BYTES = 4_000_000  # and their bytes, as decoded they need a multiple of it
SUBMITTERS = 8  # threads for them: one commits, and others take what comes meanwhile; each keeps memory of its own


def serve(settings: Settings, make: Callable[..., Backfeedr] = Backfeedr) -> None:
    """Serves until SIGTERM or SIGINT. Raises OSError where it cannot listen, and ImportError without waitress,
    before it touches the database: a first start's secrets are shown only once.

    `make` makes the server from settings with its real port, and tells `announce` what is to be printed.
    """
    try:
        import waitress  # noqa: F401 (only here: another server's host needs none)
    except ImportError:
        raise ImportError(_MISSING.format("waitress")) from None
    listener = _listen(settings.host, settings.port)
    settings = replace(settings, port=listener.getsockname()[1])
    made: List[str] = []
    if settings.verbose:
        log.addHandler(logging.StreamHandler())
        log.setLevel(logging.INFO)
    with listener, make(settings, announce=made.append) as app:
        server = _make_server(app, settings, listener)
        stopping = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: (stopping.set(), server.pull_trigger()))
        print("backfeedr on", _url(settings.host, settings.port), flush=True)
        print("".join(made), end="", flush=True)
        sys.stderr.write(_warning(settings, listener.getsockname()[0]))
        # The default of 5 ms starves the I/O thread, which has to win the interpreter back
        # after each call; much less wakes all that wait for it too often. Set here and not
        # on import: a host app's process is its own.
        sys.setswitchinterval(SWITCH_SECONDS)
        gc.freeze()  # what is here now stays; and of a batch's many objects nearly none are in cycles
        gc.set_threshold(20_000, 20, 20)
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


def _request_line(request: Any) -> str:
    """Method and path of waitress's request as they may be logged: in printable ASCII, without query or key."""
    if not hasattr(request, "path") or request.error and request.error.code == 431:  # which waitress has not read
        return "- -"
    path = quote(request.path[:200], safe="/:@!$&'()*+,;=~", encoding="latin-1") or "-"
    return re.sub("(bf_[a-z]+_)[0-9A-Za-z]+", r"\1...", f"{request.command[:20]} {path}")


def _make_server(app: Backfeedr, settings: Settings, listener: socket.socket) -> Any:
    import waitress.channel
    import waitress.parser
    import waitress.server
    import waitress.task

    class Parser(waitress.parser.HTTPRequestParser):
        environ: Optional[Environ] = None  # and since when it is worked on
        began = 0.0

        def parse_header(self, header_plus: bytes) -> None:
            try:
                super().parse_header(header_plus)
            except ValueError as error:  # a target or a length that waitress has not foreseen
                raise waitress.parser.ParsingError(str(error)) from None
            finally:  # else waitress says `100 Continue` also where nothing is to come, and waits for it
                if not self.chunked and not 0 < self.content_length < self.adj.max_request_body_size:
                    self.expect_continue = False

    class Logged:
        def service(self) -> None:
            began = self.request.began or time.perf_counter()  # type: ignore[attr-defined]
            try:
                super().service()  # type: ignore[misc]
            finally:
                if settings.verbose:
                    took = 1000 * (time.perf_counter() - began)
                    log.info("%s %s %.1f ms", _request_line(self.request), self.status[:3], took)  # type: ignore

    class ErrorTask(Logged, waitress.task.ErrorTask):
        def execute(self) -> None:
            error = self.request.error
            body = _error_body(error.code)
            self.status = f"{error.code} {error.reason}"
            self.response_headers.extend(_HEADERS.items())
            self.set_close_on_finish()
            self.content_length = len(body)
            self.write(body)

    class Task(Logged, waitress.task.WSGITask):
        def get_environment(self) -> Environ:
            request = self.request
            if request.environ is None:  # and not another one where its submission has been taken
                request.began, request.environ = time.perf_counter(), super().get_environment()
            return request.environ

        def build_response_header(self) -> bytes:
            if not self.channel.server.accepting:  # while it stops: tell the client to send no more
                self.set_close_on_finish()
            return super().build_response_header()

    class Channel(waitress.channel.HTTPChannel):
        parser_class, task_class, error_task_class = Parser, Task, ErrorTask
        __repr__ = object.__repr__  # waitress puts it in its log, with the client's address

        def begin(self) -> Environ:
            """The environ of its request, which a task then answers."""
            return Task(self, self.requests[0]).get_environment()

        def received(self, data: bytes) -> bool:
            begun = self.request
            received = super().received(data)
            now = self.last_activity
            self.began = now if begun is None or self.request is not begun else min(
                now, self.began + len(data) / SLOWEST)
            self.last_activity = self.began  # and not that of the last byte: a drip would be active for ever
            return received

        def _flush_some(self, do_close: bool = True) -> bool:
            with self.outbuf_lock:  # else a `100 Continue` from a worker and the answer before it mix, both sent twice
                return super()._flush_some(do_close)

        def writable(self) -> bool:
            # While a thread works on a request, it sends the answer itself. To ask meanwhile
            # whether there is room keeps the I/O thread spinning, and the other from finishing.
            if self.requests and not self.will_close and self.total_outbufs_len < self.adj.outbuf_high_watermark:
                return False
            return super().writable()

    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # it warns of every request that waits
    server = waitress.server.create_server(
        app, _dispatcher=_make_dispatcher(app, settings.threads), sockets=[listener], ident=None,
        max_request_body_size=settings.max_body_size + 65536,  # a little more: the app's own limit goes first
        connection_limit=_connection_limit(settings.threads + SUBMITTERS),
        max_request_header_size=32768, inbuf_overflow=131072,
        channel_timeout=REQUEST_SECONDS, cleanup_interval=10, recv_bytes=65536, asyncore_use_poll=True)
    server.channel_class = Channel
    server.adj.send_bytes = 16384  # so that head and body of an answer leave together, by the I/O thread
    return server


def _make_dispatcher(app: Backfeedr, threads: int) -> Any:
    import waitress.task

    class Dispatcher(waitress.task.ThreadedTaskDispatcher):
        """Gives one thread all submissions that have come meanwhile, for one commit, and another one any other
        request: to wake a thread for each, and again after its commit, takes longer than what it does."""

        def __init__(self) -> None:
            super().__init__()
            self.submitters = waitress.task.ThreadedTaskDispatcher()
            self.submitters.set_thread_count(SUBMITTERS)
            self.coming: Deque[Tuple[Any, float]] = deque()  # channels, and since when they wait
            self.is_called = False  # a thread, to take what comes
            self.requests = self.bytes = 0  # that are taken, and not yet durable

        def add_task(self, task: Any) -> None:
            request = task.requests[0]
            if request.error or not app.may_gather(
                    request.command, request.path, request.headers.get("X_BACKFEEDR_KEY", "")):
                return super().add_task(task)
            self.coming.append((task, time.monotonic()))
            self.call()

        def call(self) -> None:
            """Calls a thread where there is something to take, and room for it."""
            with self.lock:
                if self.is_called or not self.coming or not self.has_room():
                    return
                self.is_called = True
            self.submitters.add_task(self)

        def has_room(self) -> bool:
            return self.requests < TOGETHER and self.bytes < TOGETHER_BYTES

        def service(self) -> None:
            """In a thread: takes what comes, and answers it when it is durable."""
            taken: List[Tuple[Any, int]] = []
            self.attempt(app.submit, self.take(taken))  # what is wrong is in the answers
            with self.lock:
                self.requests -= len(taken)
                self.bytes -= sum(size for _, size in taken)
            self.call()
            for channel, _ in taken:
                self.attempt(channel.service)

        def attempt(self, step: Callable[..., Any], *arguments: Any) -> None:
            """As one must not keep the others from their answers."""
            try:
                step(*arguments)
            except Exception:
                log.exception("unexpected error")

        def take(self, taken: List[Tuple[Any, int]]) -> Iterator[Environ]:
            try:
                while self.coming and self.has_room():
                    channel, came = self.coming.popleft()
                    request = channel.requests[0]
                    is_packed = "CONTENT_ENCODING" in request.headers
                    size = app.settings.max_body_size if is_packed else request.body_bytes_received
                    taken.append((channel, size))
                    with self.lock:
                        self.requests, self.bytes = self.requests + 1, self.bytes + size
                    if channel.connected and time.monotonic() - came <= BUSY_TIMEOUT:
                        yield channel.begin()
                    elif channel.connected:  # those before it have waited as long, and in vain
                        channel.begin()[_SUBMISSION] = Submission(error=StorageUnavailable())
            finally:  # what comes from now on is for another thread
                self.is_called = False
                self.call()

        def cancel(self) -> None:
            """At a stop that has taken too long."""
            for channel, _ in list(self.coming):
                channel.cancel()

        def shutdown(self, *arguments: Any, **options: Any) -> bool:
            self.submitters.shutdown(*arguments, **options)
            return super().shutdown(*arguments, **options)

    dispatcher = Dispatcher()
    dispatcher.set_thread_count(threads)
    return dispatcher


def _connection_limit(threads: int) -> int:
    """As many as there are files for: two each, one of them for a large body, beside the database's."""
    files = 1024
    try:
        import resource
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        endless = resource.RLIM_INFINITY
        files = 4096 if hard == endless else min(4096, hard)
        if soft != endless and soft < files:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    except (ImportError, ValueError, OSError):
        pass
    return max(50, min(1000, (files - 3 * threads - 50) // 2))


def _drain(server: Any) -> None:
    """Stops accepting, and answers everything that has been sent."""
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
            busy = channel.requests or channel.request or channel.total_outbufs_len
            if not busy and time.time() - channel.last_activity > QUIET_SECONDS:
                channel.will_close = True
    server.task_dispatcher.shutdown(timeout=1)


# == Operations ================================================================
#
# What keeps the reports of a running server safe, and moves them: a copy of the file,
# and a line a report. What takes long tells somebody, `progress`, how far it has come.

BACKUP_PAGES = 1000  # between two looks at how far a backup has come
IMPORT_LINES = 1000  # in a transaction,
IMPORT_BYTES = 1_000_000  # unless they are longer than this together
MAX_LINE = 1 << 27  # bytes of a report in a file: far above any body that a server takes
LOW_DISK = 100_000_000  # free bytes, below which `check` finds something wrong

Progress = Callable[..., Any]


def backup(store: Store, path: Path, progress: Progress) -> None:
    """Writes a copy of the database as it is now to a new file that only its owner can read. Raises StoreError.

    From within one read transaction: it stops no writer, and no writer makes it begin anew,
    as happens to the backup API else. The price is a WAL that grows until it is done.
    A copy has its name only when it is complete.
    """
    if path.exists():
        raise StoreError(f"there is a file {path} already")
    partial = ""
    try:
        number, partial = tempfile.mkstemp(".partial", path.name + ".", path.parent)  # readable by its owner only
        os.close(number)
        _copy_database(store, partial, progress)
        os.link(partial, path)  # refuses what has come meanwhile
    except OSError as error:
        raise StoreError(f"cannot write the backup {path}: {error.strerror}") from None
    finally:
        if os.path.exists(partial):
            os.unlink(partial)


def _copy_database(store: Store, path: str, progress: Progress) -> None:
    with store.reading() as db, closing(sqlite3.connect(path)) as copy:
        db.execute("begin")
        db.execute("select 1 from apps").fetchone()  # from here on it sees nothing new
        try:
            db.backup(copy, pages=BACKUP_PAGES, progress=lambda _, left, pages: progress(pages - left, pages))
        except sqlite3.Error as error:
            raise StoreError(f"cannot write the backup: {error}") from None  # so it is not the store's trouble
        db.execute("commit")


def export_jsonl(reports: Iterable[StoredReport], out: TextIO) -> None:
    """Writes a JSON object a line: a report as it was sent, and what a server knew of it beside."""
    for kept in reports:
        out.write(_encode(_exported(kept)) + "\n")


def export_csv(reports: Iterable[StoredReport], out: TextIO, kind: type) -> None:
    """Writes the same as a table with a head, in which no cell is a formula to a spreadsheet."""
    names = ["id", "app", "is_test", "received_at", *kind._fields]
    table = csv.DictWriter(out, names)
    table.writeheader()
    for kept in reports:
        table.writerow({name: _cell(value) for name, value in _exported(kept).items()})


def _exported(kept: StoredReport) -> Figures:
    report_id = crash_id(kept.seq) if type(kept.report) is Crash else event_ids([kept.seq])[0]
    return _shown({"id": report_id, "app": kept.app, "is_test": kept.is_test, "received_at": kept.received_at,
                   **kept.report._asdict()}, exact_time)


def _cell(value: Any) -> Any:
    if type(value) in (list, dict):
        return _encode(value)
    return "'" + value if type(value) is str and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def read_kept(line: bytes) -> StoredReport:
    """A report from a line that `export_jsonl` wrote, checked like a client's. Raises Refusal.

    What the server makes of a report, its group_hash, is made anew.
    """
    given = decode_json(line)
    given.pop("group_hash", None)
    app, report_id = (_short_text(given.pop(name, None), name) for name in ("app", "id"))
    is_test = _of(bool)(given.pop("is_test", None), "is_test")
    came = _time(given.pop("received_at", None), "received_at")
    extra = _of(dict)(given.pop("extra", {}), "extra")
    match = re.fullmatch("(evt_)?([0-7][0-9a-f]{15})", report_id)
    seq = int(match[2], 16) if match else -1
    # A seq is not before its time; and after it by a day at most, where a clock was so fast before.
    if match is None or not first_seq(came) <= seq < first_seq(came + 2 * DAY):
        raise Refusal("invalid id")
    report = (parse_event if match[1] else parse_crash)({**extra, **given})
    return StoredReport(seq, app, is_test, came, report)


def import_jsonl(store: Store, lines: Iterable[bytes], progress: Progress) -> Counter:
    """Stores what `export_jsonl` wrote, in the way of `Store.import_`, and returns the sum of what that does.

    Raises StoreError with the number of the first bad line; what stands well before it is stored then.
    """
    counts: Counter = Counter()
    try:
        for step in _steps(lines):
            counts += store.import_(step)
            progress(sum(counts.values()))
    except (StoreError, StorageUnavailable) as error:
        raise StoreError(f"{error}; {counts['stored']:,} reports before it were stored: import the whole file"
                         " again, when this is mended") from None
    return counts


def _steps(lines: Iterable[bytes]) -> Iterator[List[StoredReport]]:
    step: List[StoredReport] = []
    size = 0
    for number, line in enumerate(lines, 1):
        try:
            step += [read_kept(line)] if line.strip() else []
        except Refusal as refusal:
            yield step
            raise StoreError(f"line {number}: {refusal}") from None
        size += len(line)
        if len(step) >= IMPORT_LINES or size > IMPORT_BYTES:
            yield step
            step, size = [], 0
    yield step


class ReadOnlyConnection(Connection):
    """A connection that changes nothing, nor the files beside: without a WAL nobody writes, and none is made."""

    def __init__(self, path: Path):
        super().__init__(path, True, "ro" if Path(f"{path}-wal").exists() else "ro&immutable=1")


def check(path: Path) -> Iterator[Tuple[str, Callable[[], str]]]:
    """What there is to look at in a database, by name. To look gives what was found, or raises what is wrong."""
    yield "SQLite", _check_sqlite
    yield "disk", lambda: _look_at_disk(path)
    yield "file", lambda: _look_at_file(path)
    yield "schema", lambda: _look_at_schema(path)
    yield "pages", lambda: _look_at_pages(path)
    yield "roll-ups", lambda: _look_at_roll_ups(path)


def _look_at_disk(path: Path) -> str:
    free = shutil.disk_usage(path.parent).free
    if free < LOW_DISK:
        raise StoreError(f"only {_megabytes(free)} are free")
    return f"{_megabytes(free)} free"


def _look_at_file(path: Path) -> str:
    if not path.is_file():
        raise StoreError(f"{path} is not there")
    if not os.access(path, os.R_OK | os.W_OK):
        raise StoreError(f"{path} may not be read and written; a server could not use it")
    return f"{path}, {_megabytes(path.stat().st_size)}, WAL {_megabytes(_wal_size(path))}"


def _look_at_schema(path: Path) -> str:
    with closing(ReadOnlyConnection(path)) as db, closing(sqlite3.connect(":memory:")) as fresh:
        _check_file(db, path)
        version = db.pragma("user_version")
        if 0 < version < SCHEMA_VERSION:
            return f"version {version}, of which the next start makes version {SCHEMA_VERSION}"
        if not version:
            raise StoreError("there are no tables")
        fresh.executescript(SCHEMA)
        expected, found = map(_shape, (fresh, db))
        if not expected <= found:
            raise StoreError(f"there is no {', '.join(sorted(expected - found))}")
        return f"version {version}"


def _shape(db: sqlite3.Connection) -> Set[str]:
    """The tables, indexes and columns."""
    return {f"{kind} {name}" + f" with {column}" * bool(column) for kind, name, column in db.execute("""
        select master.type, master.name, columns.name
        from sqlite_master as master cross join pragma_table_xinfo(master.name) as columns
        where master.type = 'table'
        union
        select master.type, master.name, columns.name
        from sqlite_master as master cross join pragma_index_info(master.name) as columns
        where master.type = 'index'
        """) if not name.startswith("sqlite_")}


def _look_at_pages(path: Path) -> str:
    with closing(ReadOnlyConnection(path)) as db:
        found = db.pragma("quick_check(1)")
        if found != "ok":
            raise StoreError(" ".join(found.splitlines()[-1:]))
        return f"{db.pragma('page_count'):,}, all sound"


def _look_at_roll_ups(path: Path) -> str:
    """Compares what is equal however much has expired. Most sums outlive their reports, so only what tells of
    those that are kept is counted again; of the rest, those that say the same in two places are compared."""
    day_columns = "crashes", "sessions", "ended", "session_ms"
    # A device goes with its last report to the hour.
    settled = (f"seq > {first_seq(HOUR)} + (select coalesce(max(value), 0) from state"
               " where name in ('expired_crashes', 'expired_events'))")
    minus, unequal = ", ".join(f"-{each}" for each in day_columns), " or ".join(f"sum({each})" for each in day_columns)
    with closing(ReadOnlyConnection(path)) as db:
        db.execute("begin")
        wrong = [what for what, query in {
            "labels of crashes": f"""
                select sum(crashes) from (
                    select app_id, 'exception_type' as field, exception_type as label, count(*) as crashes
                    from crashes group by app_id, exception_type
                    union all
                    select app_id, 'device_model', device_model, count(*)
                    from crashes where device_model is not null group by app_id, device_model
                    union all
                    select app_id, field, label, -crashes from labels where day = {ALL_DAYS})
                group by app_id, field, label having sum(crashes)""",
            "labels of days": f"""
                select sum(crashes) from labels
                group by app_id, field, label having sum(iif(day = {ALL_DAYS}, -crashes, crashes))""",
            "groups of crashes": """
                select app_id, group_hash from crashes except select app_id, group_hash from groups""",
            "groups of the week": f"""
                select sum(crashes) from (
                    select app_id, group_hash, crashes from group_hours
                    union all
                    select app_id, group_hash, -recent from groups where app_id <> {EVERY_APP})
                group by app_id, group_hash having sum(crashes)""",
            "hours and days": f"""
                select app_id from (
                    select app_id, crashes, sessions, devices from hours
                    union all
                    select app_id, -crashes, -sessions, -newcomers from days)
                where app_id <> {EVERY_APP}
                group by app_id having sum(crashes) or sum(sessions) or sum(devices)""",
            "days of all apps": f"""
                select day from (
                    select day, {", ".join(day_columns)} from days where app_id = {EVERY_APP}
                    union all
                    select day, {minus} from days where app_id in {_LIVE})
                group by day having {unequal}""",
            "durations of days": """
                select sum(sessions) from (
                    select app_id, day, sessions from durations
                    union all
                    select app_id, day, -ended from days)
                group by app_id, day having sum(sessions)""",
            "devices of crashes": f"""
                select seq from crashes where device_id_hash is not null and {settled} and not exists (
                    select 1 from devices
                    where app_id = crashes.app_id and device_id_hash = crashes.device_id_hash)""",
            "devices of events": f"""
                select seq from events where device_id_hash is not null and {settled} and not exists (
                    select 1 from devices where app_id = events.app_id and device_id_hash = events.device_id_hash)""",
            "sessions of events": """
                select seq from events where session_id is not null and not exists (
                    select 1 from sessions
                    where app_id = events.app_id and session_id = events.session_id
                        and seq between first_seq and last_seq)""",
        }.items() if db.execute(query).fetchone()]
    if wrong:
        raise StoreError(f"the {', the '.join(wrong)} are not what they should be")
    return "agree with the rows, where that can be told"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


# == Demo ======================================================================
#
# A month of made-up apps, so that there is something to look at. It goes in the way that
# all reports go, under a clock that is moved by hand; the tables are below the logic.

DEMO_DAYS = 35  # the 30 that are shown, and some before: so those begin with phones that are known


def serve_demo(settings: Settings) -> None:
    """Serves made-up reports from a file that is gone afterwards. Raises as `serve`."""
    def make(settings: Settings, announce: Callable[[str], Any]) -> Backfeedr:
        fill_demo(settings.db_path, int(time.time() * SECOND))
        app = Backfeedr(settings, announce=announce)
        announce("This is a month of made-up reports. The link signs in, once and for ten minutes:\n\n"
                 f"    {app.pages.invite(_url(settings.host, settings.port))}\n\n")
        return app

    with tempfile.TemporaryDirectory() as folder:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and so leaves nothing behind while it fills
        serve(replace(settings, db_path=os.path.join(folder, "demo.db"), api_key="", retention_days=0), make)


def fill_demo(path: str, now: int, seed: int = 1) -> None:
    """Makes the database at `path` and fills it with a month of reports that ends at `now`, in milliseconds.

    The same `now` and `seed` make the same reports. Raises StoreError where an app of the demo is there already.
    """
    chance, moment = random.Random(seed), now - DEMO_DAYS * DAY
    end = now - min(180 * SECOND, now % DAY // 2)  # the last report is some minutes old, but of today
    with Store(path, clock=lambda: moment / SECOND) as store:
        keys = {app.name: sha256(store.create_app(app.name, app.is_test)) for app in _DEMO_APPS}
        reports = sorted(chain.from_iterable(_demo_reports(app, end, chance) for app in _DEMO_APPS),
                         key=itemgetter(0, 1, 2, 3))
        for (moment, name, kind), batch in groupby(reports, itemgetter(0, 1, 2)):
            parse: Callable[[Given], Any] = parse_crash if kind == "crash" else parse_event
            store.add(keys[name], [parse({**given, "occurred_at": iso_time(at)}) for *_, at, given in batch])


def _demo_reports(app: _DemoApp, end: int, chance: random.Random) -> Iterator[Tuple[int, str, str, int, Given]]:
    """All reports of an app: when they are received, its name, their kind, when they occurred, what is in them."""
    for phone in [_DemoPhone(app, end, chance) for _ in range(app.phones)]:
        for start in phone.starts():
            for kind, at, given in phone.session(start):
                if at <= end:
                    yield _demo_arrival(kind, at, end, chance), app.name, kind, at, given


def _demo_arrival(kind: str, at: int, end: int, chance: random.Random) -> int:
    """A crash comes with the next start, all else soon; and the older, the more in one commit, to be quick."""
    delay = chance.expovariate(1 / 1200) if kind == "crash" else chance.uniform(1, 20)
    age = max(0, end - at - int(delay * SECOND))
    step = 5 * SECOND if age < HOUR else HOUR // 6 if age < DAY else 4 * HOUR
    return end - age // step * step


class _DemoPhone:
    """A made-up phone: who has it, and what it reports."""

    def __init__(self, app: _DemoApp, end: int, chance: random.Random):
        self.app, self.end, self.chance = app, end, chance
        age = min(DEMO_DAYS - 1, chance.randrange(66))  # in days; about half of them are there from the first
        self.joined_at = self.time_of(end // DAY - age)
        self.sessions, days = chance.choice(_DEMO_HABITS[:4] if age == DEMO_DAYS - 1 else _DEMO_HABITS)
        self.left_at = self.joined_at + chance.expovariate(1 / days) * DAY
        self.lag = chance.expovariate(1 / chance.choice((1, 2, 2, 12))) * DAY  # from a release until it is installed
        model = self.pick(_DEMO_MODELS)
        systems = _DEMO_SYSTEMS[2:] if model.startswith("iPhone17") else _DEMO_SYSTEMS  # which came with iOS 18
        self.about = {"device_model": model, "os_version": self.pick(systems), "locale": self.pick(_DEMO_LOCALES),
                      "device_id_hash": sha256(str(chance.random())).hex()}

    def pick(self, shares: Sequence[Tuple[int, Any]]) -> Any:
        return self.chance.choices([each[1] for each in shares], [each[0] for each in shares])[0]

    def time_of(self, day: int) -> int:
        hour, = self.chance.choices(range(24), self.app.hours)
        return day * DAY + int((hour + self.chance.random()) * HOUR)

    def starts(self) -> Iterator[int]:
        """When its sessions begin."""
        yield self.joined_at
        for day in range(self.joined_at // DAY, int(min(self.left_at, self.end)) // DAY + 1):
            mean = self.sessions * self.app.week[(day + 3) % 7]  # 1970 began on a Thursday
            for at in [self.time_of(day) for _ in range(round(self.chance.expovariate(1 / mean)))]:
                if self.joined_at < at < self.left_at:
                    yield at
        if self.joined_at < self.end < self.left_at and self.chance.random() < 0.05:  # so that it is never all quiet
            yield self.end - int(min(HOUR // 2, self.end % DAY) * self.chance.random())

    def session(self, start: int) -> Iterator[Tuple[str, int, Given]]:
        """The reports of a session, as kind, time and content."""
        chance = self.chance
        version, build = self.release(start)
        event = {**self.about, "app_version": version, "session_id": f"sess_{chance.getrandbits(48):012x}"}
        length = chance.lognormvariate(math.log(self.app.seconds), 0.8) * SECOND
        shares = sorted(chance.uniform(0.05, 0.95) for _ in range(chance.choice((1, 1, 1, 1, 1, 2, 2, 3, 4))))
        steps = [(start + int(length * share), *self.pick(self.app.actions)) for share in shares]
        yield "event", start, {**event, "type": "session_start"}
        for at, kind, name, details in steps:
            properties = {field: chance.choice(values) for field, values in details.items()}
            yield "event", at, {**event, "type": kind, "name": name, "properties": properties}
        crash = self.crash(version)
        if crash:
            trail = [(start, "launch"), *((at, name) for at, _, name, _ in steps)]
            yield "crash", steps[-1][0] + chance.randrange(2000), {
                **self.about, "app_version": version, "build_number": build, **crash,
                "breadcrumbs": [{"at": iso_time(at), "action": name} for at, name in trail]}
        elif chance.random() < 0.93:  # of the others nothing more is heard
            yield "event", start + int(length), {**event, "type": "session_end"}

    def release(self, at: int) -> Sequence[str]:
        """The version that it has, and the build."""
        days = ((self.end - out * DAY, names) for out, *names in self.app.releases)
        return [names for out, names in days if at >= out + self.lag or self.joined_at >= out][-1]

    def crash(self, version: str) -> Optional[Given]:
        """What a session ends with, if it does."""
        for rates, app, only, kind, reason, trace in _DEMO_CRASHES:
            is_concerned = self.app.name.startswith(app) and only in " {device_model} {os_version}".format(**self.about)
            if is_concerned and 1000 * self.chance.random() < rates.get(version, 0):
                return {"exception_type": kind, "exception_reason": reason, **self.condition(),
                        "stack_trace": [_demo_frame(*each) for each in enumerate(trace.split(" < "))]}
        return None

    def condition(self) -> Given:
        chance = self.chance
        return {"free_memory_mb": chance.randrange(60, 1900), "battery_level": round(chance.uniform(0.06, 1), 2),
                "is_charging": chance.random() < 0.25, "free_disk_mb": chance.randrange(900, 180_000),
                "orientation": self.pick(((4, "portrait"), (1, "landscapeLeft")))}


def _demo_frame(number: int, text: str) -> Given:
    place, symbol = text.split(" ", 1)
    file, _, line = place.partition(":")
    own = {"file": file, "line": int(line)} if line else {"file": None, "line": None, "library": place}
    return {"frame": number, "symbol": symbol, **own}


class _DemoApp(NamedTuple):
    name: str
    is_test: bool
    phones: int
    seconds: int               # that a session takes
    week: Sequence[float]      # how much it is used on each weekday,
    hours: Sequence[int]       # and in each hour in UTC
    releases: Sequence[tuple]  # days before the end, version, build
    actions: Sequence[tuple]   # how often; what: event type, name, and what its properties may be


_DEMO_HABITS: Sequence[Tuple[float, float]] = (  # sessions a weekday, and days; the first four: who stays
    (1.9, 300), (1.1, 120), (0.7, 60), (0.6, 30), (1.3, 50), (1.2, 4), (1, 2), (0.8, 0.5))
_DEMO_MODELS = (
    (8, "iPhone13,2"), (12, "iPhone14,5"), (7, "iPhone14,7"), (9, "iPhone15,2"), (10, "iPhone15,4"), (11, "iPhone16,1"),
    (8, "iPhone16,2"), (9, "iPhone17,1"), (5, "iPhone17,2"), (10, "iPhone17,3"), (5, "iPad13,18"), (3, "iPad14,3"))
_DEMO_SYSTEMS = ((7, "17.6.1"), (3, "17.7.2"), (9, "18.5"), (24, "18.6.2"), (17, "18.7.1"), (18, "26.0"), (22, "26.1"))
_DEMO_LOCALES = ((44, "de_DE"), (9, "de_AT"), (7, "de_CH"), (15, "en_GB"), (8, "en_US"), (7, "fr_FR"), (5, "nl_NL"))
_DEMO_RIDES = (
    (40, ("custom", "board_opened", {"stop": ("Marktplatz", "Hauptbahnhof", "Hafen"), "from": ("widget", "nearby")})),
    (25, ("custom", "trip_searched", {"results": (0, 3, 4, 5, 6), "took_ms": (180, 240, 310, 420, 960)})),
    (9, ("custom", "favourite_added", {"kind": ("stop", "line", "trip")})),
    (8, ("custom", "ticket_bought", {"zone": ("A", "AB", "ABC"), "kind": ("single", "day", "month")})),
    (4, ("error", "departures_timeout", {"status": (502, 504), "retry": (1, 2, 3)})))
_DEMO_MEALS = (
    (40, ("custom", "recipe_opened", {"course": ("main", "soup", "baking"), "from": ("search", "home", "link")})),
    (20, ("custom", "timer_started", {"minutes": (5, 8, 10, 12, 25, 45)})),
    (3, ("error", "image_import_failed", {"reason": ("too_large", "no_access")})))
_DEMO_COMMUTE = (2, 1, 1, 1, 4, 14, 26, 24, 13, 9, 9, 11, 12, 11, 14, 22, 27, 20, 13, 9, 7, 6, 5, 3)
_DEMO_COOKING = (2, 1, 1, 1, 1, 2, 4, 6, 8, 11, 14, 12, 8, 8, 11, 17, 24, 23, 15, 9, 7, 6, 5, 3)
_DEMO_APPS = (
    _DemoApp("Tramwise", False, 270, 75, (1.05, 1.1, 1.1, 1.08, 1, 0.5, 0.42), _DEMO_COMMUTE,
             ((99, "2.3.0", "418"), (22.3, "2.4.0", "431"), (8.4, "2.4.1", "437")), _DEMO_RIDES),
    _DemoApp("Ladlebook", False, 75, 380, (0.6, 0.55, 0.6, 0.65, 0.8, 1.2, 1.35), _DEMO_COOKING,
             ((99, "1.8.2", "96"), (12.2, "1.9.0", "103")), _DEMO_MEALS),
    _DemoApp("Tramwise Beta", True, 24, 60, (1, 1, 1, 1, 1, 0.2, 0.2), _DEMO_COMMUTE,
             ((99, "2.4.0", "426"), (6.5, "2.5.0", "452")), _DEMO_RIDES))

# Stack traces: frame < caller < ..., each a file and line or a library, and a symbol. First, how they end and begin.
_MAIN = (" < CoreFoundation __CFRunLoopRun < CoreFoundation CFRunLoopRunSpecific < GraphicsServices GSEventRunModal"
         " < UIKitCore -[UIApplication _run] < UIKitCore UIApplicationMain < dyld start")
_MAIN_QUEUE = (" < libdispatch.dylib _dispatch_main_queue_drain"
               " < CoreFoundation __CFRUNLOOP_IS_SERVICING_THE_MAIN_DISPATCH_QUEUE__" + _MAIN)
_WORKER = (" < libdispatch.dylib _dispatch_call_block_and_release < libdispatch.dylib _dispatch_lane_serial_drain"
           " < libsystem_pthread.dylib _pthread_wqthread < libsystem_pthread.dylib start_wqthread")
_RAISE = "CoreFoundation __exceptionPreprocess < libobjc.A.dylib objc_exception_throw < "
_FATAL = "libswiftCore.dylib _assertionFailure(_:_:file:line:flags:) < "
_DEMO_CRASHES: Sequence[tuple] = (  # in a thousand sessions of a version; app; on what only; type, reason, trace
    ({"2.4.0": 38}, "Tramwise", "", "EXC_BREAKPOINT",
     "Tramwise/DepartureBoard.swift:214: Fatal error: Unexpectedly found nil while unwrapping an Optional value",
     _FATAL + "DepartureBoard.swift:214 closure #1 (Departure) -> BoardRow in DepartureBoard.merge(_:into:)"
     " < libswiftCore.dylib Sequence.map<A, B>(_:) < DepartureBoard.swift:209 DepartureBoard.merge(_:into:)"
     " < RealtimeFeed.swift:88 closure #2 (RealtimeUpdate) -> () in RealtimeFeed.subscribe(to:)" + _MAIN_QUEUE),
    ({"2.3.0": 8, "2.4.0": 8, "2.4.1": 0.5}, "Tramwise", "", "EXC_BAD_ACCESS",
     "KERN_INVALID_ADDRESS at 0x0000000000000018",
     "libobjc.A.dylib objc_retain < LineMapRenderer.swift:162 LineMapRenderer.draw(_:zoomScale:in:)"
     " < LineMapRenderer.swift:97 @objc LineMapRenderer.draw(_:zoomScale:in:)"
     " < MapKit -[MKOverlayRenderer _renderTile:inContext:] < VectorKit md::OverlayTileSource::rasterize()" + _WORKER),
    ({"2.3.0": 8, "2.4.0": 7, "2.4.1": 1, "2.5.0": 25}, "Tramwise", "", "SIGABRT",
     "NSInternalInconsistencyException: Invalid update: invalid number of items in section 0",
     _RAISE + "Foundation -[NSAssertionHandler handleFailureInMethod:object:file:lineNumber:description:]"
     " < UIKitCore -[UICollectionView performBatchUpdates:completion:]"
     " < FavouritesController.swift:176 FavouritesController.reload(animated:)"
     " < FavouritesController.swift:58 closure #1 ([Stop]) -> () in FavouritesController.viewDidLoad()" + _MAIN_QUEUE),
    ({"2.3.0": 4, "2.4.0": 4, "2.4.1": 0.5}, "Tramwise", "", "EXC_CRASH",
     "0x8badf00d: scene-update watchdog transgression: exhausted real (wall clock) time allowance of 10.00 seconds",
     "libsystem_kernel.dylib __ulock_wait < libdispatch.dylib _dispatch_sync_f_slow"
     " < Timetable.swift:61 Timetable.read<A>(_:) < Timetable.swift:118 Timetable.departures(at:after:)"
     " < SceneDelegate.swift:47 SceneDelegate.sceneWillEnterForeground(_:)" + _MAIN_QUEUE),
    ({"2.3.0": 45, "2.4.0": 50, "2.4.1": 10}, "Tramwise", " iPad13,18", "EXC_RESOURCE",
     "RESOURCE_TYPE_MEMORY: high watermark memory limit exceeded (limit=2098 MB)",
     "libsystem_platform.dylib _platform_memmove < CoreGraphics CGBitmapContextCreateImage"
     " < NetworkMapTiles.swift:201 NetworkMapTiles.image(for:scale:)"
     " < NetworkMapTiles.swift:74 closure #1 @Sendable () -> () in NetworkMapTiles.preload(_:)" + _WORKER),
    ({"2.3.0": 8, "2.4.0": 8, "2.4.1": 1, "2.5.0": 15}, "Tramwise", " 26.", "EXC_BREAKPOINT",
     "BUG IN CLIENT OF LIBDISPATCH: Assertion failed: Block was expected to execute on queue [com.apple.main-thread]",
     "libdispatch.dylib _dispatch_assert_queue_fail < libdispatch.dylib dispatch_assert_queue"
     " < libswift_Concurrency.dylib swift_task_isCurrentExecutorWithFlagsImpl(swift::SerialExecutorRef)"
     " < NearbyStops.swift:52 closure #1 (CMPedometerData?, Error?) -> () in NearbyStops.start()" + _WORKER),
    ({"2.3.0": 1, "2.4.0": 1}, "Tramwise", "", "SIGABRT",
     "NSInvalidArgumentException: -[NSNull length]: unrecognized selector sent to instance 0x1f8d6e3a8",
     _RAISE + "CoreFoundation -[NSObject(NSObject) doesNotRecognizeSelector:] < CoreFoundation ___forwarding___"
     " < FareParser.swift:39 FareParser.zone(from:) < TicketShop.swift:107 TicketShop.loadFares()" + _WORKER),
    ({"1.8.2": 30, "1.9.0": 6}, "Ladlebook", "", "EXC_BREAKPOINT",
     "Swift/ContiguousArrayBuffer.swift:675: Fatal error: Index out of range",
     _FATAL + "libswiftCore.dylib Array.subscript.getter < StepPager.swift:66 StepPager.step(at:)"
     " < StepPager.swift:31 closure #1 (Int) -> StepCard in StepPager.body.getter"
     " < SwiftUI ForEachState.item(at:offset:) < SwiftUI ViewGraph.updateOutputs(at:)" + _MAIN))


# == Command line ==============================================================
#
# Every command works while the server runs: all they share is the file.

def main(argv: Optional[Sequence[str]] = None, make: Callable[..., Backfeedr] = Backfeedr,
         open_store: Callable[..., Store] = Store) -> int:
    """Runs a command. Returns 0, or 1 for what went wrong; exits with 2 for wrong usage."""
    arguments = _parser().parse_args(argv)
    overrides = {each.name: getattr(arguments, each.name) for each in fields(Settings)
                 if hasattr(arguments, each.name)}
    try:
        if arguments.run is _check:
            return _check(overrides)
        settings = Settings.from_env(**overrides)
        if arguments.run is serve:
            serve(settings, make=make)
        elif arguments.run is serve_demo:
            serve_demo(settings)
        else:
            if arguments.run is _import:  # before a database is made for it
                arguments.FILE = _open(arguments.FILE)
            retention_days = settings.retention_days if os.environ.get("BACKFEEDR_RETENTION_DAYS") else None
            with open_store(settings.db_path, retention_days=retention_days,
                            may_create=arguments.run in (_app_create, _import)) as store:
                arguments.run(store, arguments)
    except BrokenPipeError:  # whoever reads the output has had enough, also of what Python writes when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except KeyboardInterrupt:
        _say("backfeedr: interrupted")
        return 1
    except (SettingsError, StoreError, Refusal, OSError, UnicodeError, ImportError) as error:
        _say(f"backfeedr: {error}")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    options.add_argument("--db", dest="db_path", metavar="FILE", help="the database (default: backfeedr.db)")
    serving = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    serving.add_argument("--host", help="the address to listen on (default: 127.0.0.1)")
    serving.add_argument("--port", type=int, help="the port (default: 8080); 0 takes a free one")
    serving.add_argument("--verbose", action="store_true", help="log a line for each request, on standard error")
    parser = argparse.ArgumentParser(prog="backfeedr", parents=[options, serving], description=(
        "Crash reports and usage figures for iOS apps, on your own host. Without a command, it serves."))
    parser.add_argument("--version", action="version", version=f"backfeedr {__version__}")
    parser.set_defaults(run=serve)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    commands.add_parser("serve", parents=[options, serving], help="start the server").set_defaults(run=serve)
    commands.add_parser("demo", parents=[serving], help="serve made-up reports, to look at").set_defaults(run=serve_demo)
    prune = commands.add_parser("prune", parents=[options], help="delete what is older than the retention, now")
    prune.set_defaults(run=_prune)
    _add_operations(commands, options)
    for noun, actions in _COMMANDS.items():
        nouns = commands.add_parser(noun, help=f"{', '.join(actions)}").add_subparsers(metavar="ACTION", required=True)
        for verb, (run, summary, *names) in actions.items():
            action = nouns.add_parser(verb, parents=[options], help=summary, description=summary)
            action.set_defaults(run=run)
            for name in names:
                action.add_argument(name, **({"action": "store_true"} if name.startswith("--") else {}))
    return parser


def _add_operations(commands: Any, options: argparse.ArgumentParser) -> None:
    def add(name: str, run: Callable[..., Any], summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, parents=[options], help=summary, description=summary)
        command.set_defaults(run=run)
        return command
    add("backup", _backup, "write a copy of the database to a new file").add_argument("FILE")
    export = add("export", _export, "print crashes or events")
    export.add_argument("KIND", choices=_KINDS_OF_REPORTS)
    export.add_argument("--app", metavar="NAME", help="of this app (default: of all)")
    export.add_argument("--since", metavar="DATE", type=_date_ms, default=0,
                        help="received on this day (UTC) or later, like 2026-03-12")
    export.add_argument("--format", choices=("jsonl", "csv"), default="jsonl",
                        help="jsonl (the default), which import reads, or csv, for a spreadsheet")
    add("import", _import, "store what export has printed as jsonl").add_argument(
        "FILE", help="- for standard input")
    add("check", _check, "say whether the database is as it should be")


def _app_create(store: Store, arguments: argparse.Namespace) -> None:
    key = store.create_app(arguments.NAME, arguments.test)
    _say(f"Made the app {arguments.NAME!r}. Its API key, shown only this once:")
    print(key)


def _app_list(store: Store, arguments: argparse.Namespace) -> None:
    _table(("APP", "KIND", "KEYS", "CREATED"), [
        (app.name, "test" if app.is_test else "live", app.keys, _date(app.created_at)) for app in store.apps()])


def _app_delete(store: Store, arguments: argparse.Namespace) -> None:
    store.delete_app(arguments.NAME)
    _say(f"Deleted the app {arguments.NAME!r}, its keys and all that it sent.")


def _key_create(store: Store, arguments: argparse.Namespace) -> None:
    key = store.create_key(arguments.NAME)
    _say(f"Made a further key for the app {arguments.NAME!r}, shown only this once:")
    print(key)


def _key_list(store: Store, arguments: argparse.Namespace) -> None:
    _table(("KEY", "APP", "CREATED", "REVOKED"), [
        (key.prefix + "...", key.app, _date(key.created_at), key.revoked_at and _date(key.revoked_at) or "-")
        for key in store.keys()])


def _key_revoke(store: Store, arguments: argparse.Namespace) -> None:
    key = store.revoke_key(arguments.PREFIX)
    _say(f"Revoked the key {key.prefix}... of the app {key.app!r}.")


def _device_show(store: Store, arguments: argparse.Namespace) -> None:
    found = Metrics(store).device(arguments.HASH)
    if not any(found.values()):
        raise StoreError(f"nothing is kept of a device {arguments.HASH!r}")
    print(json.dumps(found, indent=2, ensure_ascii=False))


def _device_forget(store: Store, arguments: argparse.Namespace) -> None:
    deleted = store.forget_device(arguments.HASH)
    if not deleted:
        raise StoreError(f"nothing is kept of a device {arguments.HASH!r}")
    _say(f"Forgot the device {arguments.HASH!r}: {_counted_rows(deleted)}.")


def _prune(store: Store, arguments: argparse.Namespace) -> None:
    size = store.size
    with _progress("deleting: {:,} rows") as progress:
        deleted = store.prune(progress)
    kept = f"older than {store.retention_days} days" if store.retention_days else "(the retention keeps all)"
    _say(f"Deleted {_counted_rows(deleted)} {kept}; gave back"
         f" {max(0, size - store.size) / 1e6:,.1f} MB of {size / 1e6:,.1f} MB.")


def _counted_rows(rows: Mapping[str, int]) -> str:
    crashes, events = rows.get("crashes", 0), rows.get("events", 0)
    return f"{crashes:,} crash{'es' * (crashes != 1)} and {events:,} event{'s' * (events != 1)}"


def _backup(store: Store, arguments: argparse.Namespace) -> None:
    with _progress("copying: {:,} of {:,} pages") as progress:
        backup(store, Path(arguments.FILE), progress)
    _say(f"Wrote {arguments.FILE}, {_megabytes(os.stat(arguments.FILE).st_size)}.")


def _export(store: Store, arguments: argparse.Namespace) -> None:
    kind, out = _KINDS_OF_REPORTS[arguments.KIND], sys.stdout
    out.reconfigure(encoding="utf-8", newline="")  # type: ignore[union-attr]
    with _progress("exporting: {:,} " + arguments.KIND, out.isatty()) as progress:
        reports = _watched(store.export(kind, arguments.app, arguments.since), progress)
        if arguments.format == "csv":
            export_csv(reports, out, kind)
        else:
            export_jsonl(reports, out)
        out.flush()


def _open(name: str) -> BinaryIO:
    try:
        return sys.stdin.buffer if name == "-" else open(name, "rb")
    except OSError as error:
        raise StoreError(f"cannot read {name}: {error.strerror}") from None


def _import(store: Store, arguments: argparse.Namespace) -> None:
    with _progress("importing: {:,} reports") as progress, arguments.FILE as file:
        counts = import_jsonl(store, iter(lambda: file.readline(MAX_LINE), b""), progress)
    _say(f"Stored {counts['stored']:,} reports; {counts['known']:,} were here already, and the time of"
         f" {counts['expired']:,} is over.")


def _check(overrides: Dict[str, Any]) -> int:
    path = overrides.get("db_path") or os.environ.get("BACKFEEDR_DB_PATH") or Settings.db_path
    status = 0
    for name, look in chain([("settings", lambda: f"{len(fields(Settings.from_env(**overrides)))}, all good")],
                            check(Path(path).absolute())):
        try:
            with _progress("checking the " + name) as progress:
                progress()
                found = look()
            print(f"ok  {name}: {found}")
        except (SettingsError, StoreError, sqlite3.Error, OSError) as error:
            print(f"BAD {name}: {error}")
            status = 1
    return status


def _watched(reports: Iterable[StoredReport], progress: Progress) -> Iterator[StoredReport]:
    for number, kept in enumerate(reports, 1):
        yield kept
        if number % PAGE_ROWS == 0:
            progress(number)


@contextmanager
def _progress(text: str, quiet: bool = False) -> Iterator[Progress]:
    """Shows on a terminal, in a line that goes in the end, how far long work has come: at most ten times a second."""
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


def _date_ms(text: str) -> int:
    try:
        return parse_time(text + "T00:00:00Z")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date like 2026-03-12") from None


_KINDS_OF_REPORTS = {"crashes": Crash, "events": Event}
_COMMANDS = {
    "app": {
        "create": (_app_create, "make an app and print its first key", "NAME", "--test"),
        "list": (_app_list, "list the apps"),
        "delete": (_app_delete, "delete an app, its keys and all that it sent", "NAME")},
    "key": {
        "create": (_key_create, "make a further key for an app and print it", "NAME"),
        "list": (_key_list, "list the keys, by the part that may be shown"),
        "revoke": (_key_revoke, "end a key at once", "PREFIX")},
    "device": {
        "show": (_device_show, "print all that is kept of a device, as JSON", "HASH"),
        "forget": (_device_forget, "delete all that is kept of a device", "HASH")},
}


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _date(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / SECOND, timezone.utc).strftime("%Y-%m-%d")


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    lines = [head, *rows]
    widths = [max(len(str(line[column])) for line in lines) for column in range(len(head))]
    for line in lines:
        print("  ".join(str(cell).ljust(width) for cell, width in zip(line, widths)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
