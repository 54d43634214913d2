#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["symbolic>=13,<14"]
# ///
"""Sends the symbols of a release to backfeedr, so that its crashes are shown with names and lines.

    export BACKFEEDR_ENDPOINT=https://crashes.example.com BACKFEEDR_AUTH_TOKEN=bf_admin_...
    uv run examples/symbols.py App.xcarchive

The token is the server's admin token. Without uv: `pip install symbolic`, and `python examples/symbols.py PATH...`. A
PATH is a `.dSYM`, an `.xcarchive`, a zip or a folder with dSYMs (or files like `Shop.dSYM.zip`) anywhere in it, or a
Mach-O file with debug information. Builds that the server already has are skipped, so run it as often as you like:
after a failure, a second run sends what is missing. The exit status is 0; or 1 if a PATH has no debug information or a
dSYM cannot be sent (a line on standard error says why); or 2 for wrong usage. Only the base names and line numbers of
source files are sent, never their folders or text.

To run it automatically, set the two variables above (the token as a secret of the CI). The Python that runs these lines
needs the package. Install it once, or on a CI in each run: `python3 -m pip install --user symbolic`

- Xcode, as the last "Run Script" build phase, with ENABLE_USER_SCRIPT_SANDBOXING off, and with
  ${DWARF_DSYM_FOLDER_PATH}/${DWARF_DSYM_FILE_NAME}/Contents/Resources/DWARF/${EXECUTABLE_NAME} as its input file, so
  that it waits for the dSYM: `[ "$ACTION" != install ] || python3 symbols.py`. ACTION is install when Xcode archives.
- Xcode Cloud, in ci_post_xcodebuild.sh: `[ -z "$CI_ARCHIVE_PATH" ] || python3 symbols.py`
- fastlane, after build_app: `sh("python3", "symbols.py", lane_context[SharedValues::DSYM_OUTPUT_PATH])`

Xcode's or the toolchain's `swift-demangle` makes Swift names readable, `c++filt` C++ names. Without these programs the
names are sent as they are, and the line about the image says so.
"""

from __future__ import annotations

import argparse
import gzip
import http.client
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, Callable, NamedTuple, Optional
from urllib.parse import quote, urlsplit
from urllib.request import HTTPErrorProcessor, Request, build_opener
from uuid import UUID

try:
    from symbolic.debuginfo import Archive
    from symbolic.exceptions import SymbolicError
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"symbols: {error.name or 'symbolic'} is missing; 'pip install symbolic' installs it")

PAGE_ROWS, PAGE_STRINGS, PAGE_FRAMES = 500, 400, 4_000  # so that a page has less than 600,000 bytes of JSON
MAX_STRING = 1_000  # bytes of UTF-8; the server accepts as many characters
PART_BYTES = 500_000  # of JSON, if no page is larger; the server accepts 1 MiB in a request
ATTEMPTS, TIMEOUT = 5, 30  # seconds for each step of an attempt
FIRST_PAUSE, MAX_RETRY_AFTER = 0.5, 300  # seconds; each pause is twice the one before
RETRIED = {429, 500, 502, 503, 504}
ABOUT_ONE_IMAGE = {400, 409, 413, 422}  # after these refusals the next image may still be accepted
DEFAULT_PATHS = ("DWARF_DSYM_FOLDER_PATH", "CI_ARCHIVE_PATH")  # variables of Xcode and of Xcode Cloud
NOTHING = "no debug information"
UNREADABLE_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)
DEMANGLERS = (  # how mangled names begin, and commands that read them from standard input: the first one found is run
    ("Swift", re.compile(r"_?\$[sS]|_T"), ("xcrun swift-demangle --simplified", "swift-demangle --simplified")),
    ("C++", re.compile("_{1,4}Z"), ("llvm-cxxfilt -n", "c++filt -n")))
MANGLED = re.compile("|".join(pattern.pattern for _, pattern, _ in DEMANGLERS))

Chain = tuple[tuple[str, Optional[str], int], ...]  # name, path and line, innermost first; () if nothing is known


class SymbolsError(Exception):
    """Something was not sent. `str()` is one line that says why."""

    def __init__(self, text: object):
        super().__init__(printable(" ".join(str(text).split())))


class ServerError(SymbolsError):
    """The server did not accept a request. `stops` means that it would not accept the next image either."""

    def __init__(self, text: str, status: int | None = None, retry_after: int = 0):
        super().__init__(text)
        self.stops, self.retry_after = status not in ABOUT_ONE_IMAGE, retry_after
        self.retryable = (status is None or status in RETRIED) and retry_after <= MAX_RETRY_AFTER


def printable(text: str) -> str:
    """Replaces characters that control a terminal: names may come from anyone who has a key."""
    return "".join(character if character.isprintable() else "?" for character in text)


# == The server ================================================================

class AnyAnswer(HTTPErrorProcessor):
    """Leaves refusals to the caller, and redirects, which would give the token away."""

    def http_response(self, request: Any, response: Any) -> Any:
        return response

    https_response = http_response


class Server:
    """A backfeedr server and its admin token. The methods raise ServerError, the constructor ValueError."""

    def __init__(self, endpoint: str, token: str, sleep: Callable[[float], object] = time.sleep):
        url = urlsplit(endpoint)
        if not re.fullmatch(r"https?://[\w.:[\]-]+(/[^?#\s]*)?", endpoint, re.A) or not url.hostname or url.port == 0:
            raise ValueError(f"{endpoint!r} is not an address such as https://example.com/prefix")
        if not token:
            raise ValueError("there is no admin token: set BACKFEEDR_AUTH_TOKEN, or use --token")
        if not token.isprintable():
            raise ValueError("the admin token has a control character")
        path = quote(url.path, safe="/%").rstrip("/").removesuffix("/api/v1")
        self._url, self.endpoint, self._sleep = f"{url.scheme}://{url.netloc}{path}/api/v1/symbols", endpoint, sleep
        # http.client writes a header as Latin-1; the server reads it as UTF-8.
        self._headers = {"Authorization": ("Bearer " + token).encode().decode("latin-1")}
        self._opener = build_opener(AnyAnswer)

    def symbols(self) -> dict[str, Any]:
        """What the server has and needs: {"symbols": [...], "missing": [...]}."""
        return self._ask("symbols", Request(self._url, headers=self._headers))

    def put(self, uuid: str, part: bytes) -> dict[str, Any]:
        """Stores a part of an image's symbols; the same part twice is stored once."""
        headers = {**self._headers, "Content-Type": "application/json", "Content-Encoding": "gzip"}
        return self._ask("complete", Request(f"{self._url}/{uuid}", gzip.compress(part), headers, method="PUT"))

    def _ask(self, field: str, request: Request) -> dict[str, Any]:
        """Sends a request, again if that may help, and returns the answer, which has this field."""
        for failures in range(ATTEMPTS):
            try:
                with self._opener.open(request, timeout=TIMEOUT) as response:
                    return acknowledged(field, response.status, response.headers, response.read())
            except (OSError, http.client.HTTPException) as lost:
                reason = getattr(lost, "reason", lost)
                reason = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
                error = ServerError(f"no answer from {self.endpoint}: {reason}")
            except ServerError as refused:
                error = refused
            if not error.retryable or failures == ATTEMPTS - 1:
                break
            self._sleep(error.retry_after + random.uniform(0.5, 1) * FIRST_PAUSE * 2 ** failures)
        raise error


def acknowledged(field: str, status: int, headers: http.client.HTTPMessage, body: bytes) -> dict[str, Any]:
    """The JSON object of an answer that accepts the request and has this field. Raises ServerError for any other."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    answer = answer if isinstance(answer, dict) else {}
    if status in (200, 201) and field in answer:
        return answer
    why = str(answer.get("error") or "not an answer of backfeedr")
    if 300 <= status < 400:
        why = f"redirects are not followed (to {headers.get('Location')})"
    why += f" ({answer['detail']})" if answer.get("detail") else ""
    wait = re.fullmatch("[0-9]{1,9}", headers.get("Retry-After", ""))
    raise ServerError(f"the server answered {status}: {why}", status, int(wait[0]) if wait else 0)


# == Finding images ============================================================

def candidates(path: Path) -> Iterator[Path]:
    """The files that may be images: those of dSYMs in a folder or zip, otherwise the file itself. A file from a zip is
    deleted when the next one is asked for."""
    if path.is_dir():
        for folder, folders, names in os.walk(path):
            folders.sort()
            for link in (Path(folder, name) for name in folders if name.endswith(".dSYM")):
                if link.is_symlink() and Path(link, "Contents").is_dir():  # os.walk follows no links
                    yield from candidates(link)
            for file in (Path(folder, name) for name in sorted(names)):
                if is_image(file.absolute()):
                    yield file
                elif is_zip(file):
                    yield from candidates(file)
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
            for member in archive.infolist():
                name = PurePath(member.filename)
                if is_image(name) or is_zip(name):
                    copy = Path(folder, name.name)
                    with archive.open(member) as source, copy.open("wb") as target:
                        shutil.copyfileobj(source, target)
                    yield from candidates(copy)
                    copy.unlink()
    else:
        yield path


def is_image(path: PurePath) -> bool:
    """Whether a dSYM has its images in this place. `._Shop` only has the attributes of `Shop` in a Mac's zip."""
    return path.parts[-4:-1] == ("Contents", "Resources", "DWARF") and not path.name.startswith(".")


def is_zip(path: PurePath) -> bool:
    return path.name.lower().endswith(".dsym.zip") and not path.name.startswith(".")


# == Reading an image ==========================================================

class Image(NamedTuple):
    """One architecture of a Mach-O file. `ranges` are (start, end) of its code, in bytes from the image's start."""

    name: str
    uuid: str
    arch: str
    ranges: list[tuple[int, int]]
    reader: Any  # symbolic's

    def __str__(self) -> str:
        return f"{self.name} {self.uuid} {self.arch}"

    def chains(self, progress: Callable[[str], None]) -> Iterator[tuple[int, Chain]]:
        """The start of each run of addresses with the same chain, ascending, and that chain. Gaps have the chain ()."""
        cache, step = self.reader.make_symcache(), instruction_size(self.arch)
        last: Chain = ()
        end = 0
        for start, stop in [*self.ranges, (sys.maxsize, sys.maxsize)]:
            if last and start > end:
                yield end, ()
                last = ()
            end = stop
            for at in range(start, stop, step):
                chain = tuple((each.symbol or "<unknown>", each.full_path, each.line) for each in cache.lookup(at))
                if chain != last:
                    yield at, chain
                    last = chain
                if at % 0x4000 == 0:
                    progress(f"{self}: reading, {100 * at // self.ranges[-1][1]} %")


def instruction_size(arch: str) -> int:
    """The fewest bytes that an instruction may have."""
    return 1 if arch.startswith(("x86", "i386")) else 4 if arch.startswith("arm64") else 2


def images(path: Path) -> Iterator[Image]:
    """Each architecture of a Mach-O file. Raises SymbolsError."""
    try:
        ranges = code_ranges(path)
        for each in Archive.open(str(path)).iter_objects():
            uuid = each.debug_id[:36].upper()
            arch = re.sub("_?v8$", "", each.arch)  # arm64_32, as Apple says it
            yield Image(printable(path.name), uuid, arch, ranges.get(uuid, []), each)
    except OSError as error:
        raise SymbolsError(f"cannot read it: {error.strerror}") from None
    except (struct.error, ValueError):
        raise SymbolsError("it is not a complete zip or Mach-O file") from None
    except SymbolicError as error:
        raise SymbolsError(f"it cannot be read: {error.message}") from None


def code_ranges(path: Path) -> dict[str, list[tuple[int, int]]]:
    """The (start, end) of the code of each architecture of a Mach-O file, by UUID, in bytes from the image's start."""
    with path.open("rb") as file:
        magic, count = struct.unpack(">II", file.read(8))
        offsets = [0]
        if magic == 0xCAFEBABE:  # a fat file
            entry = struct.Struct(">8xI8x")
            offsets = [at for at, in entry.iter_unpack(file.read(entry.size * min(count, 100)))]
        return dict(slice_ranges(file, at) for at in offsets)


def slice_ranges(file: Any, offset: int) -> tuple[str, list[tuple[int, int]]]:
    """The UUID and the code ranges of the Mach-O header at an offset of a file."""
    file.seek(offset)
    magic, _, _, _, count, size, _ = struct.unpack("<7I", file.read(28))
    if magic not in (0xFEEDFACE, 0xFEEDFACF):
        raise ValueError("no Mach-O header")
    wide = magic == 0xFEEDFACF
    commands = file.read(size + 4 * wide)[4 * wide:]
    segment, section = (struct.Struct(each) for each in (
        ("<8x16s4Q8xI4x", "<16s16sQQ16xI12x") if wide else ("<8x16s4I8xI4x", "<16s16sII16xI8x")))
    at, uuid, base, found = 0, "", 0, []
    for _ in range(count):
        command, length = struct.unpack_from("<II", commands, at)
        if command == 0x1B:  # LC_UUID
            uuid = str(UUID(bytes=commands[at + 8:at + 24])).upper()
        elif command == (0x19 if wide else 0x1):  # LC_SEGMENT_64, LC_SEGMENT
            name, address, extent, _, _, sections = segment.unpack_from(commands, at)
            base = address if name.rstrip(b"\0") == b"__TEXT" else base
            found += [(address + extent, *section.unpack_from(commands, at + segment.size + n * section.size))
                      for n in range(sections)]
        at += max(length, 8)
    # Sections of instructions, pure or some, but no stubs: they would get the name of the last function before them.
    code = sorted((address - base, address - base + size, limit - base) for limit, name, _, address, size, flags
                  in found if flags & 0x80000400 and not flags & 0xFF and b"stub" not in name)
    if any(start < 0 or end > limit for start, end, limit in code):
        raise ValueError("a section outside of its segment")  # a wrong size would take years to read
    return uuid, [(start, end) for start, end, _ in code]


# == Pages and parts ===========================================================

class Page:
    """Consecutive rows, to be written as JSON."""

    def __init__(self, first: int):
        self.first = self._at = first
        self.rows: list[int] = []
        self.strings: dict[str, int] = {}
        self._frames: dict[tuple[int, int, int, int], int] = {}

    def add(self, at: int, chain: Chain) -> None:
        """Adds a row that begins at an offset from the image's start."""
        frame = -1  # none
        for name, path, line in reversed(chain):
            file = re.split(r"[/\\]", path)[-1] if path else ""
            key = (self._string(name), self._string(file) if file else -1, line, frame)
            frame = self._frames.setdefault(key, len(self._frames))
        self.rows += (at - self._at, frame)
        self._at = at

    def _string(self, text: str) -> int:
        return self.strings.setdefault(text, len(self.strings))

    def is_full(self) -> bool:
        return (len(self.rows) >= 2 * PAGE_ROWS or len(self.strings) >= PAGE_STRINGS
                or len(self._frames) >= PAGE_FRAMES)

    def document(self) -> str:
        """The page in JSON, as the server accepts it, but with mangled names."""
        return compact({"first": self.first, "strings": list(self.strings), "rows": self.rows,
                        "frames": [each for frame in self._frames for each in frame]})


def pages(chains: Iterable[tuple[int, Chain]]) -> Iterator[Page]:
    """Divides the rows of an image into pages."""
    page = None
    for at, chain in chains:
        if page and page.is_full():
            yield page
            page = None
        page = page or Page(at)
        page.add(at, chain)
    if page:
        yield page


def renamed(document: str, plain: dict[str, str]) -> str:
    """A page in JSON with plain names, cut to the length that the server accepts."""
    page = json.loads(document)
    page["strings"] = [plain.get(text, text).encode()[:MAX_STRING].decode(errors="ignore") for text in page["strings"]]
    return compact(page)


def parts(documents: Iterable[str]) -> list[str]:
    """Joins pages in JSON to lists of about PART_BYTES each."""
    gathered: list[list[str]] = []
    size = PART_BYTES
    for document in documents:
        size += len(document.encode())
        if size > PART_BYTES:
            gathered.append([])
            size = len(document.encode())
        gathered[-1].append(document)
    return [f"[{','.join(each)}]" for each in gathered]


def compact(document: Any) -> str:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


# == Names =====================================================================

def demangled(names: Iterable[str]) -> tuple[dict[str, str], str]:
    """The plain form of each mangled name, and a note about names that cannot be demangled here."""
    plain: dict[str, str] = {}
    notes = []
    for language, pattern, commands in DEMANGLERS:
        wanted = sorted(filter(pattern.match, names))
        found = next(filter(None, (answers(command, wanted) for command in commands)), None) if wanted else []
        merged = "Tm" if language == "Swift" else "-"  # ends a name that stands for several, which --simplified hides
        plain.update((name, "merged " * name.endswith(merged) + text) for name, text in zip(wanted, found or []))
        notes += [f", {language} names as they are: {commands[-1].split()[0]} is missing"] if found is None else []
    return plain, "".join(notes)


def answers(command: str, names: list[str]) -> list[str] | None:
    """Runs a command, which prints a line for each name. None if it does not work here."""
    program, *options = command.split()
    path = shutil.which(program)
    if not path:
        return None
    done = subprocess.run([path, *options], input="\n".join(names) + "\n", capture_output=True,
                          check=False, encoding="utf-8", errors="replace")
    lines = done.stdout.split("\n")[:-1]
    return lines if done.returncode == 0 and len(lines) == len(names) else None


# == The run ===================================================================

class Terminal:
    """Shows a line of progress on a terminal; prints results to standard output, failures to standard error."""

    def __init__(self, quiet: bool):
        self._quiet, self._live, self.failures = quiet, sys.stderr.isatty() and not quiet, 0

    def progress(self, text: str) -> None:
        if self._live:
            print(f"\r\033[K{text[:shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        self.progress("")
        if not self._quiet:
            print(text, flush=True)

    def fail(self, text: object) -> None:
        self.progress("")
        self.failures += 1
        print(f"symbols: {text}", file=sys.stderr, flush=True)


def send(server: Server, image: Image, terminal: Terminal) -> str:
    """Sends the symbols of an image. Returns the outcome in words; raises SymbolsError."""
    if "debug" not in image.reader.features:
        return NOTHING
    documents, names, rows = list[str](), set[str](), 0
    try:
        for page in pages(image.chains(terminal.progress)):
            documents.append(page.document())  # takes a tenth of the page's memory
            names.update(filter(MANGLED.match, page.strings))
            rows += len(page.rows) // 2
    except SymbolicError as error:
        raise SymbolsError(f"its debug information cannot be read: {error.message}") from None
    if not documents:
        return NOTHING
    terminal.progress(f"{image}: demangling {len(names):,} names")
    plain, note = demangled(names)
    lists = parts(renamed(document, plain) for document in documents)
    answer: dict[str, Any] = {}
    for number, each in enumerate(lists):
        terminal.progress(f"{image}: sending part {number + 1} of {len(lists)}")
        head = compact({"binary": image.name, "arch": image.arch, "part": number, "parts": len(lists)})
        answer = server.put(image.uuid, f'{head[:-1]},"pages":{each}}}'.encode())
    if not answer["complete"]:
        raise SymbolsError(f"the server has {answer.get('received')} of {len(lists)} parts")
    return f"{rows:,} rows, sent{note}"


def send_file(server: Server, file: Path, path: Path, held: set[str], terminal: Terminal) -> bool:
    """Sends each image of a file that is not in `held`, and adds it. Returns whether the file has any symbols."""
    what, useful = str(path) if file == path else f"{path}: {file.name}", False
    try:
        for image in images(file):
            what = str(image)
            outcome = "held already" if image.uuid in held else send(server, image, terminal)
            terminal.say(f"{image}: {outcome}")
            if outcome != NOTHING:
                held.add(image.uuid)
                useful = True
    except SymbolsError as error:
        if getattr(error, "stops", False):
            raise ServerError(f"{what}: {error}; nothing after it was sent") from error
        terminal.fail(SymbolsError(f"{what}: {error}"))
    return useful


def send_all(server: Server, paths: Sequence[Path], terminal: Terminal) -> None:
    """Sends the images in the paths that the server does not have. Raises ServerError if going on makes no sense."""
    held = {each["uuid"].upper() for each in server.symbols()["symbols"] if each["complete"]}
    for path in paths:
        failures, useful = terminal.failures, []
        try:
            useful = [send_file(server, file, path, held, terminal) for file in candidates(path)]
        except (OSError, *UNREADABLE_ZIP) as error:
            terminal.fail(SymbolsError(f"{path}: cannot read it: {getattr(error, 'strerror', None) or error}"))
        if terminal.failures == failures and not any(useful):
            terminal.fail(SymbolsError(f"no {'debug information' if useful else 'dSYM'} in {path}"))


def missing(answer: dict[str, Any]) -> Iterator[str]:
    """A line for each build whose crashes still need its symbols."""
    for each in answer.get("missing", []):
        build = each["build_number"] and f"({each['build_number']})"
        what = " ".join(filter(None, (each["binary"], each["app_version"], build)))
        plural = "es" * (each["crashes"] != 1)
        yield printable(f"still missing: {what}, {each['uuid']}: {each['crashes']:,} crash{plural}")


def main(argv: Sequence[str] | None = None) -> int:
    """Sends the symbols. Returns 0, or 1 if something was not sent; exits with 2 for wrong usage."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    paths = arguments.paths or [path for path in map(os.environ.get, DEFAULT_PATHS) if path][:1]
    if not paths:
        parser.error(f"no PATH is given, and none of {', '.join(DEFAULT_PATHS)} is set")
    try:
        server = Server(arguments.server, arguments.token)
    except ValueError as error:
        parser.error(str(error))
    terminal = Terminal(arguments.quiet)
    try:
        send_all(server, [Path(path) for path in paths], terminal)
        for line in () if arguments.quiet else missing(server.symbols()):
            terminal.say(line)
    except ServerError as error:
        terminal.fail(error)
    except KeyboardInterrupt:
        terminal.fail("interrupted; run it again to continue")
    return 1 if terminal.failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Sends the symbols of dSYMs to backfeedr.")
    parser.add_argument("--server", "--endpoint", metavar="URL",
                        default=os.environ.get("BACKFEEDR_ENDPOINT") or "http://localhost:8080",
                        help="default: $BACKFEEDR_ENDPOINT, else http://localhost:8080")
    parser.add_argument("--token", help="default: $BACKFEEDR_AUTH_TOKEN, which other users of the host cannot see",
                        default=os.environ.get("BACKFEEDR_AUTH_TOKEN", ""))
    parser.add_argument("--quiet", action="store_true", help="print failures only")
    parser.add_argument("paths", nargs="*", metavar="PATH", help="a .dSYM, an .xcarchive, a folder, a zip or a Mach-O "
                        f"file; default: ${', else $'.join(DEFAULT_PATHS)}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
