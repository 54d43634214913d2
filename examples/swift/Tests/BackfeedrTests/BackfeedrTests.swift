import Foundation
import XCTest
@testable import Backfeedr
#if canImport(FoundationNetworking)
import FoundationNetworking
#endif

private struct Vectors: Decodable {
    struct Signature: Decodable { var key, timestamp, body, body_sha256, signature: String }
    struct Time: Decodable { var seconds: Double, text: String }
    struct Device: Decodable { var vendor, bundle, device_id_hash: String }
    var signatures: [Signature], times: [Time], devices: [Device]
}

private let lost: Answer? = nil
private let events = "select name, count(*) from events where type = 'custom' group by 1 order by 1"

final class VectorTests: XCTestCase {
    func testSignaturesTimesAndDevicesAreThoseOfTheServersVectors() throws {
        let data = try Data(contentsOf: examples.appendingPathComponent("vectors.json"))
        let vectors = try JSONDecoder().decode(Vectors.self, from: data)
        for each in vectors.signatures {
            let body = Data(each.body.utf8)
            XCTAssertEqual(Digest.sha256(body), each.body_sha256)
            XCTAssertEqual(Outbox.signature(key: each.key, timestamp: each.timestamp, body: body), each.signature)
        }
        for each in vectors.times {
            XCTAssertEqual(Backfeedr.rfc3339(Date(timeIntervalSince1970: each.seconds)), each.text)
        }
        for each in vectors.devices {
            XCTAssertEqual(Client.deviceID(vendor: each.vendor, bundle: each.bundle), each.device_id_hash)
        }
    }

    func testTimesThatAreNoneAreWrittenAsOneThatTheServerTakes() {
        for seconds in [Double.nan, .infinity, -1e300, 1e300] {
            XCTAssertEqual(Backfeedr.rfc3339(Date(timeIntervalSince1970: seconds)).count, 24, "\(seconds)")
        }
    }

    func testAnEndpointIsTakenWithAndWithoutItsPathAndRefusedWhereItIsNone() {
        for suffix in ["", "/", "/api/v1", "/api/v1/"] {
            XCTAssertEqual(Client.base(of: "http://h:80/a" + suffix)?.absoluteString, "http://h:80/a/api/v1", suffix)
            XCTAssertEqual(Client.base(of: "https://h" + suffix)?.absoluteString, "https://h/api/v1", suffix)
        }
        let bad = ["", "h:8080", "ftp://h", "http://", "http://user:word@h", "http://h?app=Shop", "http://h#a", "\0"]
        for bad in bad + ["http://["] {
            XCTAssertNil(Client.base(of: bad), bad)
            XCTAssertFalse(Backfeedr.start(endpoint: bad, key: key))
        }
        for bad in ["", "bf_live_1\nX-Admin: 1", "bf_live_1\r"] {
            XCTAssertFalse(Backfeedr.start(endpoint: "http://h", key: bad))
        }
    }

    func testWhatAnAnswerMeans() {
        let noon = Date(timeIntervalSince1970: 0)
        for (answer, kind, outcome) in [
            (stored, Kind.crash, Outcome.stored), (Answer(status: 200, hasID: true), .events, .stored),
            (Answer(status: 200), .crash, .pause), (Answer(status: 204), .crash, .pause),
            (refusal(302, nil), .crash, .pause), (lost, .crash, .pause),
            (refusal(401, "invalid API key"), .crash, .pause),
            (refusal(401, "stale timestamp", date: noon), .crash, .signAgain(noon)),
            (refusal(401, "stale timestamp"), .crash, .pause), (refusal(404, nil), .crash, .pause),
            (refusal(400, "invalid JSON"), .crash, .refused), (refusal(400, nil), .crash, .later),
            (refusal(400, "missing type at index 7"), .events, .leaveOut(7)),
            (refusal(400, "missing type at index 7"), .crash, .refused), (refusal(413, nil), .events, .refused),
            (refusal(422, "idempotency key reused with a different body"), .crash, .refused),
            (refusal(429, "rate limit exceeded", retryAfter: 7), .crash, .wait(seconds: 7)),
            (refusal(503, nil), .crash, .wait(seconds: 0)), (refusal(500, nil), .crash, .later),
            (refusal(502, nil), .crash, .pause), (refusal(415, "x"), .crash, .later),
        ] as [(Answer?, Kind, Outcome)] {
            XCTAssertEqual(Outcome(answer, of: kind), outcome, "\(String(describing: answer))")
        }
    }
}

final class SendingTests: XCTestCase {
    func testReportsThatWereMadeOfflineAreStoredOnceWhenTheServerIsThere() throws {
        let server = try Server()
        server.kill()
        let phone = Phone(server.endpoint)
        phone.track(["a"])
        XCTAssertFalse(phone.flush())
        phone.track(["b", "c"])
        XCTAssertFalse(phone.flush())
        XCTAssertEqual(phone.files.count, 1, "events that come later gather in one file")
        try server.start()
        XCTAssertTrue(phone.flush())
        XCTAssertEqual(try server.rows(events), ["a|1", "b|1", "c|1"])
        XCTAssertEqual(try server.rows("select distinct device_id_hash from events"), [phone.client.deviceID])
    }

    func testAKillBetweenWritingAndSendingOrBetweenSendingAndDeletingLosesAndDoublesNothing() throws {
        let server = try Server(), folder = temporaryFolder()
        let killed = Phone(server.endpoint, folder: folder, transport: { _, _ in })  // never answered
        killed.track(["a", "b"])
        killed.client.flush()
        XCTAssertTrue(waitUntil { killed.files.count == 1 })
        let name = killed.files[0], content = try Data(contentsOf: folder.appendingPathComponent(name))
        XCTAssertTrue(Phone(server.endpoint, folder: folder).flush())
        try content.write(to: folder.appendingPathComponent(name))  // as if it had been killed before it deleted this
        let next = Phone(server.endpoint, folder: folder)
        next.track(["c"])
        XCTAssertTrue(next.flush())
        XCTAssertEqual(try server.rows(events), ["a|1", "b|1", "c|1"])
    }

    func testAnAppThatIsKilledBeforeOrAfterItsRequestIsStoredLosesAndDoublesNothing() throws {
        let program = CommandLine.arguments[0]
        guard program.hasSuffix(".xctest") else { throw XCTSkip("the tests are no program of their own here") }
        let server = try Server()
        for moment in ["before", "after"] {
            let folder = temporaryFolder()
            _ = try runProgram([program, "BackfeedrTests.KilledApp/testRunsUntilItIsKilled"], environment: [
                "BACKFEEDR_KILLED": moment, "BACKFEEDR_FOLDER": folder.path, "BACKFEEDR_ENDPOINT": server.endpoint])
            XCTAssertEqual(try server.rows("select count(*) from events where name like '\(moment)%'"), [
                moment == "before" ? "0" : "50"])
            XCTAssertTrue(Phone(server.endpoint, folder: folder).flush())
        }
        XCTAssertEqual(try server.rows("select count(*), count(distinct name) from events"), ["100|100"])
    }

    func testAFullBatchIsSentByItselfAndFewerEventsWaitForMore() throws {
        let script = Script([stored]), phone = Phone("http://h", transport: script.transport)
        phone.client.becameActive()
        phone.track((0..<98).map { "\($0)" })
        phone.outbox.work.sync {}
        XCTAssertEqual(script.requests.count, 0)
        phone.track(["the hundredth"])
        XCTAssertTrue(waitUntil { script.requests.count == 1 && phone.files.isEmpty })
        phone.track(["one more"])
        phone.client.wentToBackground()
        XCTAssertTrue(waitUntil { script.requests.count == 2 }, "what waits is sent when the app leaves the front")
    }

    func testALineThatAKillCutOffIsLeftOut() throws {
        let server = try Server(), folder = temporaryFolder()
        let phone = Phone(server.endpoint, folder: folder, isKnown: false)
        let whole = #"{"type":"custom","name":"a","occurred_at":"2026-03-12T14:22:31Z"}"#
        try Data((whole + "\n" + whole.prefix(30)).utf8).write(to: folder.appendingPathComponent("gathering.jsonl"))
        XCTAssertFalse(phone.flush(), "it is not sent before the device is known")
        XCTAssertTrue(Phone(server.endpoint, folder: folder).flush())
        XCTAssertEqual(try server.rows(events), ["a|1"])
    }

    func testAPhoneThatIsToldToWaitWaitsAsLongAndThenSends() throws {
        let server = try Server(rateLimit: 1), clock = ManualClock()
        let http = HTTP(sendsInLowDataMode: false), answers = Locked<[Answer?]>([])
        let phone = Phone(server.endpoint, clock: clock.clock, transport: { request, done in
            http.post(request) { answer in
                answers.with { $0.append(answer) }
                done(answer)
            }
        })
        phone.track(["a"])
        XCTAssertTrue(phone.flush())
        phone.track(["b"])
        XCTAssertFalse(phone.flush())
        let asked = try XCTUnwrap(answers.with { $0.last }??.retryAfter)
        server.kill()
        try server.start()  // which has forgotten the first request
        clock.move(asked - 1)
        XCTAssertFalse(phone.flush())
        XCTAssertEqual(answers.with { $0.map { $0?.status } }, [201, 429], "nothing is sent while it waits")
        clock.move(1)
        XCTAssertTrue(phone.flush())
        XCTAssertEqual(try server.rows(events), ["a|1", "b|1"])
    }

    func testAWrongClockIsPutRightByTheAnswersDate() throws {
        let server = try Server()
        for ahead in [-200_000.0, 200_000] {
            let phone = Phone(server.endpoint, clock: ManualClock(ahead: ahead).clock)
            phone.track(["\(ahead)"])
            XCTAssertTrue(phone.flush())
            phone.track(["\(ahead), again"])
            XCTAssertTrue(phone.flush())
        }
        XCTAssertEqual(try server.rows("select count(*), count(distinct name) from events"), ["4|4"])
    }

    func testAClockIsPutRightOnceARequest() {
        let script = Script([refusal(401, "stale timestamp", date: Date(timeIntervalSince1970: 1e9))])
        let phone = Phone("http://h", transport: script.transport)
        phone.track(["a"])
        XCTAssertFalse(phone.flush())
        XCTAssertEqual(script.requests.count, 2)
        let timestamp = script.requests[1].value(forHTTPHeaderField: "X-Backfeedr-Timestamp")
        XCTAssertEqual(timestamp?.prefix(16), "2001-09-09T01:46")
    }

    func testABadEventIsLeftOutOfItsBatchAndTheOthersAreStored() throws {
        let server = try Server(), folder = temporaryFolder()
        let offline = Phone("http://127.0.0.1:1", folder: folder)
        offline.track((0..<20).map { "event \($0)" })
        XCTAssertFalse(offline.flush())
        let file = folder.appendingPathComponent(offline.files[0])
        var lines = try String(contentsOf: file, encoding: .utf8).split(separator: "\n").map(String.init)
        lines[3] = lines[3].replacingOccurrences(of: "custom", with: "nonsense")
        lines[19] = "{}"
        try Data(lines.joined(separator: "\n").utf8).write(to: file)
        XCTAssertTrue(Phone(server.endpoint, folder: folder).flush())
        XCTAssertEqual(try server.rows("select count(*), count(distinct name) from events"), ["18|18"])
    }

    func testABatchOfBadEventsCostsTenRequestsALaunchAndHoldsUpNothing() {
        let script = Script([Answer?](repeating: refusal(400, "missing type at index 0"), count: 10) + [stored])
        let phone = Phone("http://h", transport: script.transport)
        phone.track((0..<150).map { "\($0)" })
        XCTAssertFalse(phone.flush())
        XCTAssertEqual(script.requests.count, 11)
        XCTAssertEqual(phone.files.count, 1)
    }

    func testWhatTheServerRefusesForGoodIsDeletedAndWhatItStumblesOverHoldsUpNothing() {
        for (answer, left) in [(refusal(400, "invalid JSON"), 0), (refusal(413, nil), 0), (refusal(500, nil), 1)] {
            let script = Script([answer, stored]), phone = Phone("http://h", transport: script.transport)
            phone.client.receive(Data("1".utf8))
            XCTAssertEqual(phone.flush(), left == 0)
            phone.client.receive(Data("2".utf8))
            phone.flush()
            XCTAssertEqual(phone.files.count, left)
            XCTAssertEqual(script.requests.map { String(decoding: $0.httpBody ?? Data(), as: UTF8.self) }, ["1", "2"])
        }
    }

    func testAfterAnAnswerNoPauseOfEarlierFailuresIsLeft() {
        let script = Script([lost, lost, stored]), phone = Phone("http://h", transport: script.transport)
        phone.track(["a"])
        XCTAssertFalse(phone.flush())
        XCTAssertFalse(phone.flush())
        XCTAssertTrue(phone.flush())
        phone.track(["b"])
        phone.client.wentToBackground()
        XCTAssertTrue(waitUntil(within: 10) { script.requests.count == 4 })
    }

    func testAFlushBeforeTheDeviceIsKnownDoesNotSayThatAllIsSent() {
        let script = Script([stored]), phone = Phone("http://h", transport: script.transport, isKnown: false)
        phone.track(["a"])
        XCTAssertFalse(phone.flush())
        phone.client.identify(vendor: "vendor")
        XCTAssertTrue(phone.flush())
        XCTAssertEqual(script.requests.count, 1)
    }

    func testEventsThatTheDiskDoesNotLetGoAreAtMostABatch() throws {
        // In a folder with so long a path there may be a file of lines, but none with the longer name of a request.
        let start = temporaryFolder(), room = Int(PATH_MAX) - 40 - start.path.utf8.count
        let path = (0..<room).map { $0 % 100 == 0 && $0 < room - 1 ? "/" : "x" }.joined()
        let script = Script([stored]), folder = URL(fileURLWithPath: start.path + path)
        for _ in 0..<2 {
            let phone = Phone("http://h", folder: folder, transport: script.transport)
            phone.track((0..<250).map { "\($0)" })
            XCTAssertFalse(phone.flush())
        }
        let lines = try String(contentsOf: folder.appendingPathComponent("gathering.jsonl"), encoding: .utf8)
        XCTAssertEqual(lines.split(separator: "\n").count, Outbox.maxBatch)
        XCTAssertEqual(script.requests.count, 0)
    }

    func testARequestIsSignedAnewWithTheSameKeyAndBody() {
        let clock = ManualClock(), script = Script([lost, stored])
        let phone = Phone("http://h/a", clock: clock.clock, transport: script.transport)
        phone.track(["a"])
        XCTAssertFalse(phone.flush())
        clock.move(3600)
        XCTAssertTrue(phone.flush())
        let (one, two) = (script.requests[0], script.requests[1])
        XCTAssertEqual(one.url?.absoluteString, "http://h/a/api/v1/events/batch")
        XCTAssertEqual(one.httpBody, two.httpBody)
        func header(_ name: String) -> [String?] { [one, two].map { $0.value(forHTTPHeaderField: name) } }
        XCTAssertEqual(Set(header("Idempotency-Key")).count, 1)
        XCTAssertEqual(Set(header("X-Backfeedr-Timestamp")).count, 2)
        XCTAssertEqual(Set(header("X-Backfeedr-Signature")).count, 2)
        XCTAssertEqual(header("X-Backfeedr-Device"), [nil, nil])
    }

    func testNoRedirectIsFollowedAndALoginPageIsNotBelieved() throws {
        let program = """
            import http.server, sys
            class Handler(http.server.BaseHTTPRequestHandler):
                def do_POST(self):
                    self.rfile.read(int(self.headers["Content-Length"]))
                    print(self.path, flush=True)
                    body = b"<html>Welcome</html>" if "login" in self.path else b'{"id": "1"}'
                    self.send_response(302 if "redirect" in self.path else 200)
                    self.send_header("Location", "/stolen")
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                do_GET = do_POST
                def log_message(self, *args):
                    pass
            server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
            print(server.server_address[1], flush=True)
            server.serve_forever()
            """
        let process = Process(), pipe = Pipe()
        process.executableURL = URL(fileURLWithPath: "/usr/bin/env")
        process.arguments = [Server.python, "-c", program]
        process.standardOutput = pipe
        try process.run()
        defer { process.terminate() }
        let port = try firstLine(of: pipe)
        for (path, isStored) in [("redirect", false), ("login", false), ("plain", true)] {
            let phone = Phone("http://127.0.0.1:\(port)/\(path)")
            phone.client.receive(Data("{}".utf8))
            XCTAssertEqual(phone.flush(), isStored, path)
            XCTAssertEqual(try firstLine(of: pipe), "/\(path)/api/v1/diagnostics")
        }
    }

    func testTheOldestFilesGoWhereThereAreMoreThanAHundredOrFiveMegabytes() {
        let phone = Phone("http://127.0.0.1:1", isKnown: false)
        for number in 0..<120 { phone.client.receive(Data("\(number)".utf8)) }
        XCTAssertEqual(phone.contents, (20..<120).map { "\($0)" })
        for _ in 0..<12 { phone.client.receive(Data(count: 500_000)) }
        XCTAssertEqual(phone.files.count, 10)
    }
}

/// An app that another test starts, and that ends by SIGKILL at a moment of its request.
final class KilledApp: XCTestCase {
    func testRunsUntilItIsKilled() throws {
        let given = ProcessInfo.processInfo.environment
        guard let moment = given["BACKFEEDR_KILLED"], let folder = given["BACKFEEDR_FOLDER"],
              let endpoint = given["BACKFEEDR_ENDPOINT"] else { throw XCTSkip("another test starts this one") }
        let http = HTTP(sendsInLowDataMode: false)
        let phone = Phone(endpoint, folder: URL(fileURLWithPath: folder), transport: { request, _ in
            if moment == "before" { kill(getpid(), SIGKILL) }
            http.post(request) { _ in kill(getpid(), SIGKILL) }
        })
        phone.track((0..<50).map { "\(moment) \($0)" })
        phone.flush()
    }
}

final class ReportTests: XCTestCase {
    private struct CartError: Error { var item: Int }

    func testEveryPublicCall() throws {
        let server = try Server(), home = temporaryFolder()
        setenv("XDG_DATA_HOME", home.path, 1)
        Backfeedr.track("too early")
        Backfeedr.breadcrumb("too early")
        XCTAssertEqual(Backfeedr.deviceID, "")
        XCTAssertTrue(Backfeedr.isEnabled)
        Backfeedr.isEnabled = false
        XCTAssertTrue(Backfeedr.start(endpoint: server.endpoint, key: key))
        Backfeedr.track("disabled")
        XCTAssertTrue(flushed())
        XCTAssertFalse(Backfeedr.isEnabled)
        Backfeedr.isEnabled = true
        XCTAssertTrue(Backfeedr.start(endpoint: "http://elsewhere", key: key), "a second call changes nothing")
        Backfeedr.breadcrumb("opened the cart")
        Backfeedr.track("purchase", properties: ["items": 3, "paid": true, "sum": 9.5])
        Backfeedr.capture(CartError(item: 7), context: ["screen": "cart"])
        XCTAssertTrue(flushed())
        XCTAssertEqual(Backfeedr.deviceID.count, 64)
        XCTAssertEqual(try server.rows("select name, properties from events where type = 'custom'"), [
            #"purchase|{"items":3,"paid":true,"sum":9.5}"#])
        let error = try server.rows("""
            select name, json_extract(properties, '$.error'), json_extract(properties, '$.context.screen'),
              json_extract(properties, '$.breadcrumbs[0].text'), json_extract(properties, '$.place') like '%swift:%',
              device_id_hash, os_version > '', device_model > '', locale > ''
            from events where type = 'error'
            """)
        XCTAssertEqual(error, ["BackfeedrTests.ReportTests.CartError|CartError(item: 7)|cart|opened the cart|1|"
            + "\(Backfeedr.deviceID)|1|1|1"])
        Backfeedr.isEnabled = false
        XCTAssertTrue(Phone(server.endpoint, folder: Client.folder).files.isEmpty)
    }

    private func flushed() -> Bool {
        let done = expectation(description: "flushed"), result = Locked(false)
        Backfeedr.flush { isEmpty in
            result.with { $0 = isEmpty }
            done.fulfill()
        }
        wait(for: [done], timeout: 60)
        return result.with { $0 }
    }

    func testASessionGoesOnAfterLessThanThirtySecondsAndElseAnotherBegins() throws {
        let server = try Server(), clock = ManualClock(ahead: -1000), phone = Phone(server.endpoint, clock: clock.clock)
        for away in [29.0, 31] {
            phone.client.becameActive()
            phone.track(["used"])
            clock.move(60)
            phone.client.wentToBackground()
            clock.move(away)
        }
        phone.client.becameActive()
        XCTAssertTrue(phone.flush())
        let rows = try server.rows("""
            select group_concat(type, ' '), count(distinct session_id), max(occurred_at) - min(occurred_at)
            from (select * from events order by id) group by session_id order by min(id)
            """)
        XCTAssertEqual(rows, ["session_start custom session_end custom session_end|1|149000", "session_start|1|0"])
    }

    func testTheLastFiftyBreadcrumbsAreSentEachCutAtTwoHundredCharacters() throws {
        let script = Script([stored]), phone = Phone("http://h", transport: script.transport)
        for number in 0..<60 { phone.client.breadcrumb("\(number) " + String(repeating: "x", count: 1000)) }
        phone.client.capture(CartError(item: 1), [:], "Cart.swift:1")
        phone.flush()
        let body = try XCTUnwrap(try JSONSerialization.jsonObject(with: script.requests[0].httpBody!) as? [String: Any])
        let event = try XCTUnwrap((body["events"] as? [[String: Any]])?.first)
        let crumbs = try XCTUnwrap((event["properties"] as? [String: Any])?["breadcrumbs"] as? [[String: String]])
        XCTAssertEqual(crumbs.map { $0["text"]!.split(separator: " ")[0] }, (10..<60).map { "\($0)" })
        XCTAssertTrue(crumbs.allSatisfy { $0["text"]!.count == 200 })
    }

    private func error(in body: Data?) throws -> [String: Any] {
        let batch = try JSONSerialization.jsonObject(with: XCTUnwrap(body)) as? [String: Any]
        let event = try XCTUnwrap((batch?["events"] as? [[String: Any]])?.first)
        return try XCTUnwrap(event["properties"] as? [String: Any])
    }

    func testTheNewestBreadcrumbsOfALongErrorAreKept() throws {
        let script = Script([stored]), phone = Phone("http://h", transport: script.transport)
        for number in 0..<50 { phone.client.breadcrumb("\(number) " + String(repeating: "\u{8A9E}", count: 190)) }
        let long = Dictionary(uniqueKeysWithValues: (0..<20).map { ("\($0)", String(repeating: "x", count: 2000)) })
        phone.client.capture(CartError(item: 1), long, "")
        phone.flush()
        let crumbs = try XCTUnwrap(try error(in: script.requests[0].httpBody)["breadcrumbs"] as? [[String: String]])
        XCTAssertEqual(crumbs.count, 50)
        XCTAssertEqual(crumbs.last?["text"]?.hasPrefix("49 "), true)
        XCTAssertEqual(crumbs.first?["text"], "")
    }

    func testOfTheURLsOfAnErrorNeitherQueryNorPasswordIsSent() throws {
        struct Failed: Error { var reason: any Error }
        let secret = "https://anna:secret@h.example/cart,2?ids=1,2&token='secret'#secret"
        let error = URLError(.timedOut, userInfo: [NSURLErrorFailingURLErrorKey: URL(string: secret)!])
        for error in [error, error as NSError, Failed(reason: error)] as [any Error] {
            let script = Script([stored]), phone = Phone("http://h", transport: script.transport)
            phone.client.capture(error, [:], "")
            phone.flush()
            let text = try XCTUnwrap(try self.error(in: script.requests[0].httpBody)["error"] as? String)
            XCTAssertTrue(text.contains("https://h.example/cart,2"), text)
            XCTAssertFalse(text.contains("secret"), text)
        }
    }

    func testNoValueCostsAReportOrTheApp() throws {
        final class Opaque: Sendable {}
        enum Kind { case book }
        var deep: [String: any Sendable] = [:]
        for _ in 0..<1000 { deep = ["in": deep] }
        let lone = String(decoding: [0x61, 0xD800, 0x62] as [UInt16], as: UTF16.self)
        let values: [any Sendable] = [
            Double.nan, -Double.infinity, Float.nan, Double.greatestFiniteMagnitude, Int.min, UInt64.max, "", "\0",
            lone,
            String(repeating: "long", count: 1_000_000), "a" + String(repeating: "\u{301}", count: 1_000_000), deep,
            [Int](repeating: 1, count: 100_000), Date.distantFuture, Date.distantPast, UUID(), URL(string: "http://h")!,
            Data([0xFF]), Opaque(), Kind.book, Optional<Int>.none, Optional(3), NSNull(), [Double.nan: 1], (1, "two"),
            Dictionary(uniqueKeysWithValues: (0..<10_000).map { ("\($0)", $0) }), [[Double.nan]], ["x": Float.infinity]]
        let server = try Server(), phone = Phone(server.endpoint)
        for (number, value) in values.enumerated() {
            phone.client.add(.custom("\(number)", ["value": value, lone: value]))
            phone.client.capture(NSError(domain: "Shop", code: number), ["value": value], "")
        }
        phone.client.add(.custom(String(repeating: "\u{10FFFF}", count: 100_000), [:]))
        phone.client.breadcrumb(lone)
        XCTAssertTrue(phone.flush())
        XCTAssertEqual(try server.rows("select count(*), max(length(properties)) < 33000 from events"), [
            "\(2 * values.count + 1)|1"])
        XCTAssertEqual(try server.rows("select properties from events where name = '0'"), [
            #"{"a\#u{FFFD}b":"nan","value":"nan"}"#])
        XCTAssertEqual(try server.rows("select count(*) from events where name = 'Shop 5'"), ["1"])
    }

    func testAFolderThatCannotBeWrittenAndAFullDiskCostReportsOnly() throws {
        let file = temporaryFolder().appendingPathComponent("file")
        try Data().write(to: file)
        let phone = Phone("http://127.0.0.1:1", folder: file.appendingPathComponent("folder"))
        phone.track(["a"])
        phone.client.receive(Data("{}".utf8))
        phone.client.record(exception: "E", reason: "r", addresses: [1])
        XCTAssertTrue(phone.flush(), "there is nothing to send")

        let script = Script([stored]), full = Phone("http://h", transport: script.transport)
        let lines = full.folder.appendingPathComponent("gathering.jsonl")
        try FileManager.default.createSymbolicLink(atPath: lines.path, withDestinationPath: "/dev/full")
        full.track(["lost"])
        XCTAssertTrue(waitUntil { full.outbox.work.sync { true } })
        try FileManager.default.removeItem(at: lines)
        full.track(["kept"])
        XCTAssertTrue(full.flush())
        XCTAssertEqual(script.requests.count, 1)
        XCTAssertTrue(String(decoding: script.requests[0].httpBody!, as: UTF8.self).contains("kept"))
    }

    func testNothingIsKeptOrSentWhenDisabledAlsoAfterTheNextLaunch() throws {
        let script = Script([lost, stored]), folder = temporaryFolder()
        let phone = Phone("http://h", folder: folder, transport: script.transport)
        phone.track(["a"])
        XCTAssertFalse(phone.flush())
        phone.client.setEnabled(false)
        phone.track(["b"])
        phone.client.becameActive()
        phone.client.receive(Data("{}".utf8))
        phone.client.record(exception: "E", reason: "r", addresses: [])
        XCTAssertTrue(phone.flush())
        let next = Phone("http://h", folder: folder, transport: script.transport)
        next.track(["c"])
        XCTAssertTrue(next.flush())
        XCTAssertEqual(next.client.isEnabled, false)
        XCTAssertEqual(try FileManager.default.contentsOfDirectory(atPath: folder.path), ["off"])
        XCTAssertEqual(script.requests.count, 1)
        next.client.setEnabled(true)
        next.track(["d"])
        XCTAssertTrue(next.flush())
        XCTAssertEqual(script.requests.count, 2)
    }

    func testThreadsMayCallEverythingAtOnce() throws {
        let server = try Server(), phone = Phone(server.endpoint)
        DispatchQueue.concurrentPerform(iterations: 8) { thread in
            for number in 0..<50 {
                phone.client.add(.custom("\(thread) \(number)", ["number": number]))
                phone.client.breadcrumb("\(number)")
                if number % 10 == 0 {
                    phone.client.capture(CartError(item: number), [:], "")
                    phone.client.becameActive()
                    phone.client.wentToBackground()
                    phone.client.flush()
                    _ = phone.client.deviceID
                    phone.client.identify(vendor: "vendor")
                    phone.client.receive(Data(#"{"timeStampBegin": "2026-03-12 14:22:31 +0000"}"#.utf8))
                }
            }
        }
        XCTAssertTrue(waitUntil { phone.flush() })
        let counts = "select type, count(*) from events where type in ('custom', 'error') group by 1"
        XCTAssertEqual(try server.rows(counts), ["custom|400", "error|40"])
    }
}

final class AppleTests: XCTestCase {
    private func crash(pid: Int? = nil, signal: Int = 6) -> String {
        let frame = #"{"binaryUUID": "D2A4F6B8-1357-3ACE-9BDF-2468ACE02468", "offsetIntoBinaryTextSegment": 64}"#
        let stacks = #"[{"threadAttributed": true, "callStackRootFrames": [\#(frame)]}]"#
        let pid = pid.map { #", "pid": \#($0)"# } ?? ""
        return #"{"callStackTree": {"callStacks": \#(stacks)}, "#
            + #""diagnosticMetaData": {"signal": \#(signal), "exceptionType": 10\#(pid)}}"#
    }

    private func payload(_ crashes: [String], more: String = "") -> Data {
        let list = crashes.joined(separator: ", ")
        return Data(#"{"timeStampEnd": "2026-03-12 14:22:31 +0000", "crashDiagnostics": [\#(list)]\#(more)}"#.utf8)
    }

    func testAnUncaughtExceptionIsSentOnTheNextLaunchAndNotAgainFromMetricKit() throws {
        let server = try Server(), folder = temporaryFolder(), pid = Int(ProcessInfo.processInfo.processIdentifier)
        let dying = Phone(server.endpoint, folder: folder)
        dying.client.becameActive()
        XCTAssertTrue(dying.flush())
        dying.client.breadcrumb("opened the cart")
        dying.client.record(exception: "NSRangeException", reason: "index 9 beyond bounds", addresses: [0x1000, 0x2000])
        let next = Phone(server.endpoint, folder: folder)
        XCTAssertTrue(next.flush())
        next.client.receive(payload([crash(pid: pid), crash(pid: pid + 1, signal: 11)]))
        next.client.receive(payload([crash(pid: pid)], more: #", "hangDiagnostics": []"#))  // the mark is used up
        XCTAssertTrue(next.flush())
        let crashes = try server.rows("""
            select exception_type, exception_reason, json_extract(stack_trace, '$[1].address'), session_id is not null,
              json_extract(extra, '$.breadcrumbs[0].text'), device_id_hash = '\(next.client.deviceID)'
            from crashes order by id
            """)
        XCTAssertEqual(crashes, [
            "NSRangeException|index 9 beyond bounds|0x2000|1|opened the cart|1", "SIGSEGV|None|None|0|None|1",
            "SIGABRT|None|None|0|None|1"])
    }

    func testAnExceptionBeforeTheDeviceIsKnownTellsTheSystemAndNoDevice() throws {
        let phone = Phone("http://h", isKnown: false)
        phone.client.record(exception: "E", reason: "at launch", addresses: [])
        let crash = try JSONSerialization.jsonObject(with: Data(XCTUnwrap(phone.contents.first).utf8)) as? [String: Any]
        XCTAssertNotNil(crash?["os_version"])
        XCTAssertNil(crash?["device_id_hash"])
    }

    func testWhichCrashesOfAPayloadAreThoseOfAnException() {
        let pid = 4242, hang = #", "hangDiagnostics": [{"callStackTree": {}}]"#
        let fault = payload([crash(signal: 11)]), report = #"{"environment": {"pid": 4242}, "crashDiagnostic": {}}"#
        func deep(_ pid: Int) -> Data {
            let frames = String(repeating: #"{"subFrames": ["#, count: 300) + String(repeating: "]}", count: 300)
            return payload([#"{"diagnosticMetaData": {"pid": \#(pid)}, "callStackTree": \#(frames)}"#])
        }
        for (label, given, left) in [
            ("alone", payload([crash(pid: pid)]), nil), ("another", payload([crash(pid: 1)]), payload([crash(pid: 1)])),
            ("iOS 16 abort", payload([crash()]), nil), ("iOS 16 fault", fault, fault),
            ("deep", deep(4242), nil), ("another, deep", deep(42), deep(42)),
            ("iOS 27", Data(report.utf8), nil), ("no JSON", Data("]".utf8), Data("]".utf8)),
            ("a list", Data("[1]".utf8), Data("[1]".utf8)), ("no objects", payload(["1"]), payload(["1"])),
        ] as [(String, Data, Data?)] {
            let phone = Phone("http://h", isKnown: false)
            phone.outbox.markException(pid: pid)
            phone.client.receive(given)
            XCTAssertEqual(phone.contents, left.map { [String(decoding: $0, as: UTF8.self)] } ?? [], label)
        }
        let phone = Phone("http://h", isKnown: false)
        phone.outbox.markException(pid: pid)
        phone.client.receive(payload([crash(pid: pid)], more: hang))
        XCTAssertEqual(phone.contents.map { $0.contains("hangDiagnostics") }, [true])
        XCTAssertEqual(phone.contents.map { $0.contains("crashDiagnostics") }, [false])
    }

    func testAPayloadThatAKillLeftUnreadIsReadAtTheNextLaunch() throws {
        let folder = temporaryFolder(), phone = Phone("http://h", folder: folder, isKnown: false)
        phone.outbox.markException(pid: 4242)
        for given in [payload([crash(pid: 4242)]), payload([crash(pid: 1)])] {
            XCTAssertTrue(phone.outbox.add(.diagnostics, given))
        }
        XCTAssertEqual(phone.files, [])
        let script = Script([stored])
        XCTAssertTrue(Phone("http://h", folder: folder, transport: script.transport).flush())
        XCTAssertEqual(script.requests.map { $0.httpBody }, [payload([crash(pid: 1)])])
        XCTAssertEqual(script.requests[0].value(forHTTPHeaderField: "X-Backfeedr-Device")?.count, 64)
    }

    func testOldMarksGoAtTheNextLaunch() throws {
        let clock = ManualClock(), phone = Phone("http://h", clock: clock.clock, isKnown: false)
        for pid in 0..<3 { phone.outbox.markException(pid: pid) }
        clock.move(172_801)
        _ = Phone("http://h", folder: phone.folder, clock: clock.clock, isKnown: false)
        XCTAssertEqual(try FileManager.default.contentsOfDirectory(atPath: phone.folder.path), [])
    }

    func testAMarkIsForgottenAfterTwoDays() {
        let clock = ManualClock(), phone = Phone("http://h", clock: clock.clock, isKnown: false)
        phone.outbox.markException(pid: 4242)
        clock.move(172_801)
        phone.client.receive(payload([crash(pid: 4242)]))
        XCTAssertEqual(phone.files.count, 1)
        XCTAssertEqual(try FileManager.default.contentsOfDirectory(atPath: phone.folder.path), phone.files)
    }

    func testThePartsForUIKitAppKitAndMetricKitAreTypeChecked() throws {
        guard try runProgram(["which", "swiftc"]).status == 0 else { throw XCTSkip("swiftc is not here") }
        let modules = temporaryFolder(), path = modules.path
        func compile(_ words: [String]) throws {
            let (status, output) = try runProgram(["sh", "-c", #""$@" 2>&1"#, "sh", "swiftc", "-I", path] + words)
            XCTAssertEqual(status, 0, output)
        }
        func add(_ name: String) throws {
            try compile(["-emit-module", "-parse-as-library", "-module-name", name, "-o", "\(path)/\(name).swiftmodule",
                         package.appendingPathComponent("Tests/Stubs/\(name).swift").path])
        }
        let sources = ["Apple", "Backfeedr", "Outbox", "SHA256"].map {
            package.appendingPathComponent("Sources/Backfeedr/\($0).swift").path
        }
        for (names, flags) in [
            (["AppKit", "CryptoKit", "MachO", "ObjectiveC", "MetricKit"], ["-swift-version", "6"]),
            (["UIKit"], ["-swift-version", "5"]),
            ([], ["-swift-version", "6", "-D", "BACKFEEDR_METRICKIT_27"]),
        ] {
            try names.forEach(add)
            try compile(["-typecheck", "-warnings-as-errors"] + flags + sources)
        }
    }
}
