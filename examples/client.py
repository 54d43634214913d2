"""The reference client of backfeedr: one file, the standard library only.

    python examples/client.py --key bf_live_... crash examples/crash.json

Read it before you write an SDK. The rules for a client, in the order of the code:

1. Sign the bytes that are sent, with a timestamp finer than a second: the server takes
   requests with the same timestamp and body for one request.
2. Take a report for stored only if the answer is 200 or 201 and has its id: a hotel's
   login page says 200, too. Never follow a redirect: it would give the key away.
3. Repeat requests that may succeed later, with the same body and Idempotency-Key, so
   that a report whose answer was lost is not counted twice. An SDK that keeps reports
   on disk between launches stores that key with them.
4. Wait before each repetition: as long as the server asks for, plus a random time.
   Otherwise a million phones come back in the same second.
5. If the phone's clock is wrong, sign with the server's time, which is in each answer.
6. Remove a bad event from its batch, so that the others are stored.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import hmac
import http.client
import json
import os
import random
import re
import sys
import time
import uuid
from collections.abc import Sequence
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Callable
from urllib.parse import quote, urlsplit

MAX_BATCH = 100  # events in a request
MAX_REFUSED = 10  # bad events removed from a batch: each costs a request, and an app's phones share a rate limit
MAX_ANSWER = 1_000_000  # bytes; no answer to a report is longer
RETRIED = {429, 500, 502, 503, 504}
FIRST_PAUSE, MAX_PAUSE = 0.5, 30.0  # seconds; each pause is twice the one before
MAX_RETRY_AFTER = 300  # seconds; if the server asks for more, the caller gets the error at once


class BackfeedrError(Exception):
    """A request that was not acknowledged. `str()` is one line that says why.

    `retry_after` is the wait in seconds that the server asks for. For a batch, `stored` is the
    answer for the events that were stored, and `refused` has the reasons for others by index.
    """

    retryable, retry_after = True, 0
    status, message, detail = 0, "", ""  # see ServerError

    def __init__(self, text: str):
        super().__init__(" ".join(text.split()))
        self.stored: dict[str, Any] = {"count": 0, "ids": []}
        self.refused: dict[int, str] = {}


class ServerError(BackfeedrError):
    """The server refused a request. `message` is its `error` text, or says what else is wrong with the answer; `detail`
    may say more. `date` is the time of the answer in seconds since 1970, if it has one."""

    def __init__(self, status: int, message: str, retry_after: int = 0, detail: str = "", date: float | None = None):
        super().__init__(f"the server answered {status}: {message}" + (f" ({detail})" if detail else ""))
        self.status, self.message, self.detail, self.date = status, message, detail, date
        self.retryable, self.retry_after = status in RETRIED, retry_after


class ConnectionLost(BackfeedrError):
    """There was no complete answer, so the reports may be stored or not."""


def rfc3339(seconds: float) -> str:
    """Formats seconds since 1970 for the API, in UTC: 2026-03-12T14:22:31.000000Z."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def signature(api_key: str, timestamp: str, body: bytes) -> str:
    """The X-Backfeedr-Signature for an X-Backfeedr-Timestamp and the raw body."""
    payload = timestamp + "." + hashlib.sha256(body).hexdigest()
    return "sha256=" + hmac.new(api_key.encode(), payload.encode(), hashlib.sha256).hexdigest()


def acknowledged(status: int, headers: http.client.HTTPMessage, body: bytes) -> dict[str, Any]:
    """The JSON object of an answer that acknowledges a report. Raises ServerError for any other answer."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    answer = answer if isinstance(answer, dict) else {}
    if status in (200, 201) and ("id" in answer or "ids" in answer):
        return answer
    if 300 <= status < 400:
        raise ServerError(status, f"redirects are not followed (to {headers.get('Location')})")
    wait = re.fullmatch("[0-9]{1,9}", headers.get("Retry-After", ""))  # the other form, a date, is ignored
    raise ServerError(status, str(answer.get("error") or "not an answer of backfeedr"), int(wait[0]) if wait else 0,
                      str(answer.get("detail") or ""), date_of(headers))


def date_of(headers: http.client.HTTPMessage) -> float | None:
    """The time of an answer in seconds since 1970, or None."""
    try:
        return parsedate_to_datetime(headers["Date"]).timestamp()
    except (TypeError, ValueError, IndexError, OverflowError):  # which one depends on the version of Python
        return None


def batch_error(stored: dict[str, Any], refused: dict[int, str]) -> ServerError:
    """The error for a batch that was stored without some events."""
    index, why = next(iter(refused.items()))
    more = f", and {len(refused) - 1} more events" if len(refused) > 1 else ""
    error = ServerError(400, f"{why} at index {index}{more}")
    error.stored, error.refused = stored, refused
    return error


class Client:
    """Sends reports with one API key. Thread-safe; it holds no connection between requests.

    `endpoint` is where the server is mounted, with or without /api/v1. All times are in
    seconds; `timeout` is for each step of an attempt. The methods add the present time as
    `occurred_at` if it is missing, and do not change the caller's objects. They raise
    ServerError or ConnectionLost after the last attempt, and ValueError (NaN) or TypeError
    for what JSON cannot express. The constructor raises ValueError for a bad endpoint or key.
    """

    def __init__(self, endpoint: str, api_key: str, sign: bool = True, timeout: float = 10.0, attempts: int = 5,
                 sleep: Callable[[float], object] = time.sleep, clock: Callable[[], float] = time.time):
        url = urlsplit(endpoint)
        if url.scheme not in ("http", "https") or not url.hostname or "@" in url.netloc or url.query or url.fragment:
            raise ValueError(f"{endpoint!r} is not an address such as https://example.com/prefix")
        if not api_key or not api_key.isprintable():
            raise ValueError("the API key is empty or has a control character")
        self.endpoint, self._api_key, self._sign = endpoint, api_key, sign
        self._timeout, self._attempts, self._sleep, self._clock = timeout, attempts, sleep, clock
        self._behind = 0  # whole seconds from the clock to the server's; 0 until a timestamp is refused as stale
        self._is_tls, self._host = url.scheme == "https", url.hostname
        self._port = url.port or (443 if self._is_tls else 80)
        self._base = quote(url.path, safe="/%").rstrip("/").removesuffix("/api/v1").rstrip("/") + "/api/v1"

    def crash(self, report: dict[str, Any]) -> dict[str, Any]:
        """Sends a crash report. Returns its `id` and `group_hash` once it is stored."""
        return self._submit("/crashes", self._dated(report))

    def event(self, event: dict[str, Any]) -> dict[str, Any]:
        """Sends an event. Returns its `id` once it is stored."""
        return self._submit("/events", self._dated(event))

    def batch(self, events: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Sends events in as many requests as needed. Returns the `count` and `ids` of all.

        A request is stored as a whole or not at all. If the server refuses an event, the
        others are sent without it, and then ServerError is raised. If a request fails for
        another reason, or for an eleventh bad event, nothing after it is sent.
        """
        merged: dict[str, Any] = {"count": 0, "ids": []}
        refused: dict[int, str] = {}
        left = list(enumerate(map(self._dated, events)))
        while left:
            part = left[:MAX_BATCH]
            try:
                answer = self._submit("/events/batch", {"events": [event for _, event in part]})
            except BackfeedrError as error:
                bad = re.fullmatch("(.*) at index ([0-9]{1,2})", error.message)
                if not bad or error.status != 400 or int(bad[2]) >= len(part):
                    error.stored, error.refused = merged, refused
                    raise
                index, _ = left.pop(int(bad[2]))
                refused[index] = bad[1] + (f" ({error.detail})" if error.detail else "")
                if len(refused) > MAX_REFUSED:
                    break
            else:
                left = left[len(part):]
                merged["count"] += answer["count"]
                merged["ids"] += answer["ids"]
        if refused:
            raise batch_error(merged, refused)
        return merged

    def _dated(self, report: dict[str, Any]) -> dict[str, Any]:
        return {**report, "occurred_at": report.get("occurred_at") or rfc3339(self._clock())}

    def _submit(self, path: str, document: dict[str, Any]) -> dict[str, Any]:
        """Sends a document. If its timestamp is stale, signs it once more with the server's time."""
        body = json.dumps(document, allow_nan=False, separators=(",", ":")).encode()
        idempotency_key = str(uuid.uuid4())
        try:
            return self._send(path, body, idempotency_key)
        except ServerError as error:
            if (error.status, error.message) != (401, "stale timestamp") or error.date is None:
                raise
            self._behind = round(error.date - self._clock())  # whole: the clock's fractions must stay
        return self._send(path, body, idempotency_key)

    def _send(self, path: str, body: bytes, idempotency_key: str) -> dict[str, Any]:
        """Sends a body until it is answered, or until another attempt makes no sense."""
        for failures in range(self._attempts - 1):
            try:
                return self._attempt(path, body, idempotency_key)
            except BackfeedrError as error:
                if not error.retryable or error.retry_after > MAX_RETRY_AFTER:
                    raise
                pause = min(MAX_PAUSE, FIRST_PAUSE * 2 ** failures)
                self._sleep(error.retry_after + random.uniform(pause / 2, pause))
        return self._attempt(path, body, idempotency_key)

    def _attempt(self, path: str, body: bytes, idempotency_key: str) -> dict[str, Any]:
        kind = http.client.HTTPSConnection if self._is_tls else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self._timeout)
        try:
            connection.connect()
            # The server may refuse a request, such as one that is too large, before all of it is sent: read the answer.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request("POST", self._base + path, body, self._headers(body, idempotency_key))
            response = connection.getresponse()
            answer = response.read(MAX_ANSWER)
            if response.length:  # bytes that are still to come
                raise http.client.IncompleteRead(answer)
            return acknowledged(response.status, response.headers, answer)
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionLost(f"no answer from {self.endpoint}: {str(error) or type(error).__name__}") from error
        finally:
            connection.close()

    def _headers(self, body: bytes, idempotency_key: str) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Idempotency-Key": idempotency_key,
                   "X-Backfeedr-Key": self._api_key.encode()}  # bytes: a key may be any text
        if self._sign:
            timestamp = rfc3339(self._clock() + self._behind)  # new for each attempt: it is valid for five minutes
            headers["X-Backfeedr-Timestamp"] = timestamp
            headers["X-Backfeedr-Signature"] = signature(self._api_key, timestamp, body)
        return headers


def main(argv: Sequence[str] | None = None) -> int:
    """Sends a file. Returns 0, or 1 after an error; exits with 2 for wrong usage."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if not arguments.key:
        parser.error("there is no API key: set BACKFEEDR_API_KEY, or use --key")
    try:
        client = Client(arguments.endpoint, arguments.key, sign=not arguments.unsigned)
    except ValueError as error:
        parser.error(str(error))
    try:
        answer = getattr(client, arguments.kind)(_read(arguments.kind, arguments.file))
    except (BackfeedrError, ValueError, RecursionError) as error:
        stored = getattr(error, "stored", {}).get("count")
        print(f"client: {error}" + (f"; {stored} events are stored" if stored else ""), file=sys.stderr)
        return 1
    print(json.dumps(answer))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Sends a crash, an event or a batch of events to backfeedr.")
    parser.add_argument("--endpoint", "--server", metavar="URL",
                        default=os.environ.get("BACKFEEDR_ENDPOINT") or "http://localhost:8080",
                        help="default: $BACKFEEDR_ENDPOINT, else http://localhost:8080")
    parser.add_argument("--key", help="default: $BACKFEEDR_API_KEY, which other users of the host cannot see",
                        default=os.environ.get("BACKFEEDR_API_KEY", ""))
    parser.add_argument("--unsigned", action="store_true", help="do not sign the request")
    parser.add_argument("kind", choices=("crash", "event", "batch"), help="what FILE holds")
    parser.add_argument("file", metavar="FILE", help="JSON; - is standard input")
    return parser


def _read(kind: str, file: str) -> Any:
    """Reads JSON from a file: an object, or for a batch a list of objects. Raises ValueError."""
    try:
        document = json.loads(sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes())
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from None
    except RecursionError:
        raise ValueError(f"{file} is nested too deep") from None
    except ValueError as error:
        hint = "; Apple's reports go to /api/v1/diagnostics" if file.endswith((".ips", ".crash")) else ""
        raise ValueError(f"{file} is not JSON: {error}{hint}") from None
    if kind == "batch" and isinstance(document, dict):
        document = document.get("events")
    objects = document if kind == "batch" else [document]
    if not isinstance(objects, list) or not all(isinstance(each, dict) for each in objects):
        raise ValueError(f"{file} holds no " + ("list of JSON objects" if kind == "batch" else "JSON object"))
    return document


if __name__ == "__main__":
    sys.exit(main())
