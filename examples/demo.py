#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["bottle>=0.13", "waitress>=3.0.1"]
# ///
"""backfeedr with a month of made-up reports, for a look at its pages.

    python examples/demo.py --port 8080
    uv run examples/demo.py

It prints a link that signs you in, once and within ten minutes. The reports come from three apps. They are in a
temporary file that is deleted when the server stops.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Callable, NamedTuple

try:
    import backfeedr
except ImportError:  # in a fresh clone it is in the parent folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import backfeedr
from backfeedr import DAY, HOUR, SECOND

DAYS = 35  # the 30 that are shown, and some before them, so that the first day has returning devices
Fields = dict[str, Any]  # of a report, as a client sends them


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until it is stopped. Returns 0, or prints an error in one line and returns 1."""
    parser = argparse.ArgumentParser(description="backfeedr with a month of made-up reports, for a look at its pages.")
    parser.add_argument("--host", default=argparse.SUPPRESS, help="the address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", default=argparse.SUPPRESS, type=int, help="default: 8080; 0 takes a free one")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the file is deleted even while it is filled
    try:
        with tempfile.TemporaryDirectory() as folder:
            backfeedr.serve(backfeedr.Settings.from_env(
                db_path=os.path.join(folder, "demo.db"), api_key="", retention_days=0, **vars(arguments)), make=make)
    except KeyboardInterrupt:
        return 1
    except (backfeedr.SettingsError, backfeedr.StoreError, OSError, ImportError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


def make(settings: backfeedr.Settings, announce: Callable[[str], Any]) -> backfeedr.Backfeedr:
    """Makes the server and its reports. `serve` calls this once it listens, so a port that is in use costs no time."""
    fill_demo(settings.db_path, int(time.time() * SECOND))
    app = backfeedr.Backfeedr(settings, announce=announce)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    announce("This is a month of made-up reports. The link signs you in, once and within ten minutes:\n\n"
             f"    {app.pages.invite(f'http://{host}:{settings.port}')}\n\n")
    return app


def fill_demo(path: str, now: int, seed: int = 1) -> None:
    """Makes the database at `path` and fills it with reports up to `now`, in milliseconds. Raises StoreError if an app
    of the demo already exists."""
    moment = now - DAYS * DAY
    with backfeedr.Store(path, clock=lambda: moment / SECOND) as store:
        keys = {app.name: backfeedr.sha256(store.create_app(app.name, app.is_test)) for app in APPS}
        for moment, batch in groupby(made_up_reports(now, seed), itemgetter(0)):  # noqa: B007 - the clock reads it
            together = [backfeedr.Submission(keys[name], [parsed(each) for each in reports])
                        for (name, _), reports in groupby(batch, itemgetter(1, 2))]
            store.add_all(together)
            for each in together:
                each.result()


def parsed(report: Report) -> Any:
    parse: Callable[[Fields], Any] = backfeedr.parse_crash if report.kind == "crash" else backfeedr.parse_event
    return parse({**report.fields, "occurred_at": backfeedr.iso_time(report.occurred_at)})


class Report(NamedTuple):
    """One report; the times are in milliseconds."""

    received_at: int
    app: str
    kind: str  # "crash" or "event"
    occurred_at: int
    fields: Fields


def made_up_reports(now: int, seed: int) -> list[Report]:
    """All reports in the order of their receipt. The same `now` and `seed` give the same reports."""
    chance = random.Random(seed)
    end = now - min(180 * SECOND, now % DAY // 2)  # the last report is some minutes old, but from today
    reports = [Report(received_at(kind, at, end, chance), app.name, kind, at, fields)
               for app in APPS
               for phone in [Phone(app, end, chance) for _ in range(app.phones)]
               for start in phone.starts()
               for kind, at, fields in phone.session(start) if at <= end]
    return sorted(reports, key=itemgetter(0, 1, 2, 3))


def received_at(kind: str, at: int, end: int, chance: random.Random) -> int:
    """When a report arrives: a crash at the next start of the app, an event soon. The older reports are, the more of
    them share a time of receipt and so a commit, which fills the file quickly."""
    delay = chance.expovariate(1 / 1200) if kind == "crash" else chance.uniform(1, 20)
    age = max(0, end - at - int(delay * SECOND))
    step = 5 * SECOND if age < HOUR else HOUR // 2 if age < DAY else 8 * HOUR
    return end - age // step * step


class Phone:
    """A made-up phone: its owner's habits and its reports."""

    def __init__(self, app: App, end: int, chance: random.Random):
        self.app, self.end, self.chance = app, end, chance
        age = min(DAYS - 1, chance.randrange(66))  # in days; about half have had the app from the first day
        self.joined_at = self.time_of(end // DAY - age)
        self.sessions, days = chance.choice(HABITS[:4] if age == DAYS - 1 else HABITS)
        self.left_at = self.joined_at + chance.expovariate(1 / days) * DAY
        self.lag = chance.expovariate(1 / chance.choice((1, 2, 2, 12))) * DAY  # from a release to its installation
        model = self.pick(MODELS)
        systems = SYSTEMS[2:] if model.startswith("iPhone17") else SYSTEMS  # these came with iOS 18
        self.about = {"device_model": model, "os_version": self.pick(systems), "locale": self.pick(LOCALES),
                      "device_id_hash": backfeedr.sha256(str(chance.random())).hex()}

    def pick(self, shares: Sequence[tuple[int, Any]]) -> Any:
        """One of the values, each in proportion to its share."""
        return self.chance.choices([each[1] for each in shares], [each[0] for each in shares])[0]

    def time_of(self, day: int) -> int:
        """A time on that day, at an hour when the app is used."""
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
        if self.joined_at < self.end < self.left_at and self.chance.random() < 0.05:  # active at any hour
            yield self.end - int(min(HOUR // 2, self.end % DAY) * self.chance.random())

    def session(self, start: int) -> Iterator[tuple[str, int, Fields]]:
        """The reports of a session: kind, time and fields."""
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
                **event, "build_number": build, **crash,
                "breadcrumbs": [{"at": backfeedr.iso_time(at), "action": name} for at, name in trail]}
        elif chance.random() < 0.93:  # the others are killed in the background, without a session_end
            yield "event", start + int(length), {**event, "type": "session_end"}

    def release(self, at: int) -> Sequence[str]:
        """The version and build that are installed at that time."""
        days = ((self.end - out * DAY, names) for out, *names in self.app.releases)
        return [names for out, names in days if at >= out + self.lag or self.joined_at >= out][-1]

    def crash(self, version: str) -> Fields | None:
        """The crash that ends a session, or None."""
        for rates, app, only, kind, reason, trace in CRASHES:
            is_concerned = self.app.name.startswith(app) and only in " {device_model} {os_version}".format(**self.about)
            if is_concerned and 1000 * self.chance.random() < rates.get(version, 0):
                return {"exception_type": kind, "exception_reason": reason, **self.condition(),
                        "stack_trace": [stack_frame(*each) for each in enumerate(trace.split(" < "))]}
        return None

    def condition(self) -> Fields:
        """What the phone was doing."""
        chance = self.chance
        return {"free_memory_mb": chance.randrange(60, 1900), "battery_level": round(chance.uniform(0.06, 1), 2),
                "is_charging": chance.random() < 0.25, "free_disk_mb": chance.randrange(900, 180_000),
                "orientation": self.pick(((4, "portrait"), (1, "landscapeLeft")))}


def stack_frame(number: int, text: str) -> Fields:
    """A frame of a trace in CRASHES."""
    place, symbol = text.split(" ", 1)
    file, _, line = place.partition(":")
    own = {"file": file, "line": int(line)} if line else {"file": None, "line": None, "library": place}
    return {"frame": number, "symbol": symbol, **own}


class App(NamedTuple):
    """A made-up app."""

    name: str
    is_test: bool
    phones: int
    seconds: int               # of a session
    week: Sequence[float]      # how much it is used on each weekday
    hours: Sequence[int]       # and in each hour, UTC
    releases: Sequence[tuple]  # days before the end, version, build
    actions: Sequence[tuple]   # share; event type, name, and the values of its properties


HABITS: Sequence[tuple[float, float]] = (  # sessions per weekday, and mean days of use; old users have the first four
    (1.9, 300), (1.1, 120), (0.7, 60), (0.6, 30), (1.3, 50), (1.2, 4), (1, 2), (0.8, 0.5))
MODELS = (
    (8, "iPhone13,2"), (12, "iPhone14,5"), (7, "iPhone14,7"), (9, "iPhone15,2"), (10, "iPhone15,4"), (11, "iPhone16,1"),
    (8, "iPhone16,2"), (9, "iPhone17,1"), (5, "iPhone17,2"), (10, "iPhone17,3"), (5, "iPad13,18"), (3, "iPad14,3"))
SYSTEMS = ((7, "17.6.1"), (3, "17.7.2"), (9, "18.5"), (24, "18.6.2"), (17, "18.7.1"), (18, "26.0"), (22, "26.1"))
LOCALES = ((44, "de_DE"), (9, "de_AT"), (7, "de_CH"), (15, "en_GB"), (8, "en_US"), (7, "fr_FR"), (5, "nl_NL"))
RIDES = (
    (40, ("custom", "board_opened", {"stop": ("Marktplatz", "Hauptbahnhof", "Hafen"), "from": ("widget", "nearby")})),
    (25, ("custom", "trip_searched", {"results": (0, 3, 4, 5, 6), "took_ms": (180, 240, 310, 420, 960)})),
    (9, ("custom", "favourite_added", {"kind": ("stop", "line", "trip")})),
    (8, ("custom", "ticket_bought", {"zone": ("A", "AB", "ABC"), "kind": ("single", "day", "month")})),
    (4, ("error", "departures_timeout", {"status": (502, 504), "retry": (1, 2, 3)})))
MEALS = (
    (40, ("custom", "recipe_opened", {"course": ("main", "soup", "baking"), "from": ("search", "home", "link")})),
    (20, ("custom", "timer_started", {"minutes": (5, 8, 10, 12, 25, 45)})),
    (3, ("error", "image_import_failed", {"reason": ("too_large", "no_access")})))
COMMUTE = (2, 1, 1, 1, 4, 14, 26, 24, 13, 9, 9, 11, 12, 11, 14, 22, 27, 20, 13, 9, 7, 6, 5, 3)
COOKING = (2, 1, 1, 1, 1, 2, 4, 6, 8, 11, 14, 12, 8, 8, 11, 17, 24, 23, 15, 9, 7, 6, 5, 3)
APPS = (
    App("Tramwise", False, 270, 75, (1.05, 1.1, 1.1, 1.08, 1, 0.5, 0.42), COMMUTE,
        ((99, "2.3.0", "418"), (22.3, "2.4.0", "431"), (12.4, "2.4.1", "437"), (3.6, "2.4.2", "441")), RIDES),
    App("Ladlebook", False, 75, 380, (0.6, 0.55, 0.6, 0.65, 0.8, 1.2, 1.35), COOKING,
        ((99, "1.8.2", "96"), (12.2, "1.9.0", "103")), MEALS),
    App("Tramwise Beta", True, 24, 60, (1, 1, 1, 1, 1, 0.2, 0.2), COMMUTE,
        ((99, "2.4.0", "426"), (6.5, "2.5.0", "452")), RIDES))

# Stack traces: frame < caller < ..., each a file and line or a library, and a symbol. First, their common parts.
MAIN = (" < CoreFoundation __CFRunLoopRun < CoreFoundation CFRunLoopRunSpecific < GraphicsServices GSEventRunModal"
        " < UIKitCore -[UIApplication _run] < UIKitCore UIApplicationMain < dyld start")
MAIN_QUEUE = (" < libdispatch.dylib _dispatch_main_queue_drain"
              " < CoreFoundation __CFRUNLOOP_IS_SERVICING_THE_MAIN_DISPATCH_QUEUE__" + MAIN)
WORKER = (" < libdispatch.dylib _dispatch_call_block_and_release < libdispatch.dylib _dispatch_lane_serial_drain"
          " < libsystem_pthread.dylib _pthread_wqthread < libsystem_pthread.dylib start_wqthread")
RAISE = "CoreFoundation __exceptionPreprocess < libobjc.A.dylib objc_exception_throw < "
FATAL = "libswiftCore.dylib _assertionFailure(_:_:file:line:flags:) < "
CRASHES: Sequence[tuple] = (  # crashes per 1,000 sessions of a version; app; model or system; type, reason, trace
    ({"2.4.0": 38}, "Tramwise", "", "EXC_BREAKPOINT",
     "Tramwise/DepartureBoard.swift:214: Fatal error: Unexpectedly found nil while unwrapping an Optional value",
     FATAL + "DepartureBoard.swift:214 closure #1 (Departure) -> BoardRow in DepartureBoard.merge(_:into:)"
     " < libswiftCore.dylib Sequence.map<A, B>(_:) < DepartureBoard.swift:209 DepartureBoard.merge(_:into:)"
     " < RealtimeFeed.swift:88 closure #2 (RealtimeUpdate) -> () in RealtimeFeed.subscribe(to:)" + MAIN_QUEUE),
    ({"2.4.2": 55}, "Tramwise", "", "SIGABRT",
     "NSInvalidArgumentException: *** -[__NSPlaceholderDictionary initWithObjects:forKeys:count:]: duplicate keys",
     RAISE + "CoreFoundation -[__NSPlaceholderDictionary initWithObjects:forKeys:count:]"
     " < WidgetTimeline.swift:83 WidgetTimeline.entries(for:until:)"
     " < WidgetTimeline.swift:41 closure #1 @Sendable () -> () in WidgetTimeline.refresh()"
     " < FavouriteStops.swift:120 FavouriteStops.didChange(_:)" + MAIN_QUEUE),
    ({"2.4.2": 80}, "Tramwise", " iPhone17", "EXC_BAD_ACCESS", "KERN_PROTECTION_FAILURE at 0x000000016d3fbff0",
     "libsystem_platform.dylib _platform_memmove < LiveActivity.swift:57 LiveActivity.update(with:)"
     " < LiveActivity.swift:22 LiveActivity.start(for:) < TripView.swift:140 TripView.follow(_:)" + WORKER),
    ({"2.3.0": 8, "2.4.0": 8, "2.4.1": 0.5, "2.4.2": 0.5}, "Tramwise", "", "EXC_BAD_ACCESS",
     "KERN_INVALID_ADDRESS at 0x0000000000000018",
     "libobjc.A.dylib objc_retain < LineMapRenderer.swift:162 LineMapRenderer.draw(_:zoomScale:in:)"
     " < LineMapRenderer.swift:97 @objc LineMapRenderer.draw(_:zoomScale:in:)"
     " < MapKit -[MKOverlayRenderer _renderTile:inContext:] < VectorKit md::OverlayTileSource::rasterize()" + WORKER),
    ({"2.3.0": 8, "2.4.0": 7, "2.4.1": 1, "2.4.2": 1, "2.5.0": 25}, "Tramwise", "", "SIGABRT",
     "NSInternalInconsistencyException: Invalid update: invalid number of items in section 0",
     RAISE + "Foundation -[NSAssertionHandler handleFailureInMethod:object:file:lineNumber:description:]"
     " < UIKitCore -[UICollectionView performBatchUpdates:completion:]"
     " < FavouritesController.swift:176 FavouritesController.reload(animated:)"
     " < FavouritesController.swift:58 closure #1 ([Stop]) -> () in FavouritesController.viewDidLoad()" + MAIN_QUEUE),
    ({"2.3.0": 4, "2.4.0": 4, "2.4.1": 0.5}, "Tramwise", "", "EXC_CRASH",
     "0x8badf00d: scene-update watchdog transgression: exhausted real (wall clock) time allowance of 10.00 seconds",
     "libsystem_kernel.dylib __ulock_wait < libdispatch.dylib _dispatch_sync_f_slow"
     " < Timetable.swift:61 Timetable.read<A>(_:) < Timetable.swift:118 Timetable.departures(at:after:)"
     " < SceneDelegate.swift:47 SceneDelegate.sceneWillEnterForeground(_:)" + MAIN_QUEUE),
    ({"2.3.0": 45, "2.4.0": 50, "2.4.1": 10, "2.4.2": 10}, "Tramwise", " iPad13,18", "EXC_RESOURCE",
     "RESOURCE_TYPE_MEMORY: high watermark memory limit exceeded (limit=2098 MB)",
     "libsystem_platform.dylib _platform_memmove < CoreGraphics CGBitmapContextCreateImage"
     " < NetworkMapTiles.swift:201 NetworkMapTiles.image(for:scale:)"
     " < NetworkMapTiles.swift:74 closure #1 @Sendable () -> () in NetworkMapTiles.preload(_:)" + WORKER),
    ({"2.3.0": 8, "2.4.0": 8, "2.4.1": 1, "2.5.0": 15}, "Tramwise", " 26.", "EXC_BREAKPOINT",
     "BUG IN CLIENT OF LIBDISPATCH: Assertion failed: Block was expected to execute on queue [com.apple.main-thread]",
     "libdispatch.dylib _dispatch_assert_queue_fail < libdispatch.dylib dispatch_assert_queue"
     " < libswift_Concurrency.dylib swift_task_isCurrentExecutorWithFlagsImpl(swift::SerialExecutorRef)"
     " < NearbyStops.swift:52 closure #1 (CMPedometerData?, Error?) -> () in NearbyStops.start()" + WORKER),
    ({"2.3.0": 1, "2.4.0": 1}, "Tramwise", "", "SIGABRT",
     "NSInvalidArgumentException: -[NSNull length]: unrecognized selector sent to instance 0x1f8d6e3a8",
     RAISE + "CoreFoundation -[NSObject(NSObject) doesNotRecognizeSelector:] < CoreFoundation ___forwarding___"
     " < FareParser.swift:39 FareParser.zone(from:) < TicketShop.swift:107 TicketShop.loadFares()" + WORKER),
    ({"1.8.2": 30, "1.9.0": 6}, "Ladlebook", "", "EXC_BREAKPOINT",
     "Swift/ContiguousArrayBuffer.swift:675: Fatal error: Index out of range",
     FATAL + "libswiftCore.dylib Array.subscript.getter < StepPager.swift:66 StepPager.step(at:)"
     " < StepPager.swift:31 closure #1 (Int) -> StepCard in StepPager.body.getter"
     " < SwiftUI ForEachState.item(at:offset:) < SwiftUI ViewGraph.updateOutputs(at:)" + MAIN))


if __name__ == "__main__":
    sys.exit(main())
