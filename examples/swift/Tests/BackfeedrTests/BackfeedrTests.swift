import Foundation
import XCTest
@testable import Backfeedr
#if canImport(FoundationNetworking)
import FoundationNetworking
#endif

private struct CartError: Error {
    var item = 1
}

private let names = "select name, count(*) from events where type = 'custom' group by 1 order by 1"

final class ValueTests: XCTestCase {
    private struct Vectors: Decodable {
        struct Signature: Decodable { var key, timestamp, body, body_sha256, signature: String }
        struct Time: Decodable { var seconds: Double, text: String }
        struct Device: Decodable { var vendor, bundle, device_id_hash: String }
        var signatures: [Signature], times: [Time], devices: [Device]
    }

    func testSignaturesTimesAndDevicesAreThoseOfTheServersVectors() throws {
        let data = try Data(contentsOf: examples.appendingPathComponent("vectors.json"))
        let vectors = try JSONDecoder().decode(Vectors.self, from: data)
        for each in vectors.signatures {
            let body = Data(each.body.utf8)
            equal(Client.sha256(body), each.body_sha256)
            equal(Client.signature(key: each.key, timestamp: each.timestamp, body: body), each.signature)
        }
        for each in vectors.times { equal(Backfeedr.rfc3339(Date(timeIntervalSince1970: each.seconds)), each.text) }
        for each in vectors.devices {
            equal(Client.deviceID(vendor: each.vendor, bundle: each.bundle), each.device_id_hash)
        }
    }

    func testInvalidTimesAreWrittenAsTimesThatTheServerAccepts() {
        for seconds in [Double.nan, .infinity, -1e300, 1e300] {
            equal(Backfeedr.rfc3339(Date(timeIntervalSince1970: seconds)).count, 24, "\(seconds)")
        }
    }

    func testAnEndpointIsAcceptedWithAndWithoutItsPathAndInvalidOnesAreRefused() {
        for suffix in ["", "/", "/api/v1", "/api/v1/"] {
            for start in ["http://h:80/a", "https://h"] {
                let url = Client.base(of: start + suffix)?.appendingPathComponent("crashes")
                equal(url?.absoluteString, start + "/api/v1/crashes", suffix)
            }
        }
        let bad = ["", "h:8080", "ftp://h", "http://", "http://user:word@h", "http://h?app=Shop", "http://h#a", "\0"]
        for bad in bad + ["http://["] { check(!Backfeedr.start(endpoint: bad, key: key), bad) }
        for bad in ["", " \n", "bf_live_1\nX-Admin: 1", "bf_live_1\r1"] {
            check(!Backfeedr.start(endpoint: "http://h", key: bad), bad)
        }
    }
}

final class SendingTests: XCTestCase {
    func testReportsMadeOfflineAreStoredOnceWhenTheServerIsBack() async throws {
        let offline = await Phone("http://127.0.0.1:1")
        offline.track(["a"])
        check(await !offline.flush())
        for name in ["b", "c"] {
            offline.track([name])
            check(await !offline.flush())
        }
        equal(await offline.files.count, 2, "events that come later gather in one file")
        let online = await Phone(Server.shared.endpoint, after: offline)
        check(await online.flush())
        equal(try online.rows(names), ["a|1", "b|1", "c|1"])
        equal(await online.files, [])
    }

    func testAnAppKilledBeforeOrAfterItsRequestIsStoredLosesAndDuplicatesNothing() async throws {
        let program = CommandLine.arguments[0], server = Server.shared
        guard program.hasSuffix(".xctest") else { throw XCTSkip("the tests are no program of their own here") }
        for (moment, count) in [("before", "0"), ("after", "50")] {
            let folder = temporaryFolder(), vendor = UUID().uuidString
            _ = try runProgram([program, "BackfeedrTests.KilledApp/testRunsUntilItIsKilled"], [
                "BACKFEEDR_KILLED": moment, "BACKFEEDR_FOLDER": folder.path, "BACKFEEDR_ENDPOINT": server.endpoint,
                "BACKFEEDR_VENDOR": vendor])
            let next = await Phone(server.endpoint, folder: folder, vendor: vendor, isKnown: false)
            equal(try next.rows("select count(*) from events"), [count])
            await next.client.open(vendor: vendor)
            check(await next.flush())
            equal(try next.rows("select count(*), count(distinct name) from events"), ["50|50"])
        }
    }

    func testAFullBatchIsSentAtOnceAndFewerEventsWait() async {
        let script = Script(.stored), phone = await Phone(transport: script.transport)
        phone.client.becameActive()
        phone.track((0..<98).map { "\($0)" })
        await phone.client.gather()
        equal(script.requests.count, 0)
        phone.track(["the hundredth"])
        check(await waitUntil { await phone.files.isEmpty && script.requests.count == 1 })
    }

    func testEventsThatComeDuringARequestAreCollectedForTheNext() async throws {
        let script = Script(.stored), phone = await Phone(transport: { request in
            if script.requests.count < 5 {
                Backfeedr.track("during request \(script.requests.count)")
                await Backfeedr.client?.gather()
            }
            return try await script.transport(request)
        })
        phone.track(["a"])
        await phone.client.send()
        equal(script.requests.count, 1)
        phone.track(["b"])
        await phone.flush()
        equal(try script.events().map { $0["name"] as? String }, ["during request 0", "b"])
    }

    func testAFlushDuringARequestSendsWhatCameSinceItBegan() async throws {
        let script = Script(.stored), flush = Locked<Task<Bool, Never>?>(nil)
        let phone = await Phone(transport: { request in
            if script.requests.isEmpty {
                Backfeedr.track("b")
                await Backfeedr.client?.gather()
                flush.with { $0 = Backfeedr.flush() }
                for _ in 0..<100 { _ = await Backfeedr.client?.names() }  // until the flush waits for this request
            }
            return try await script.transport(request)
        })
        phone.track(["a"])
        await phone.client.send()
        check(await flush.with { $0 }?.value == true)
        equal(try script.events().map { $0["name"] as? String }, ["b"])
    }

    func testAFlushWaitsForTheRequestOfAnother() async {
        let count = Locked(0), phone = await Phone(transport: { _ in
            count.with { $0 += 1 }
            try await Task.sleep(nanoseconds: 100_000_000)
            throw URLError(.timedOut)
        })
        phone.track(["a"])
        for flush in (0..<20).map({ _ in Backfeedr.flush() }) { check(await !flush.value) }
        check(count.with { $0 } < 10, "\(count.with { $0 }) requests")
    }

    func testALineThatWasCutOffIsLeftOut() async throws {
        let phone = await Phone(Server.shared.endpoint, isKnown: false)
        let device = #""device_id_hash":"\#(phone.device)""#
        let line = #"{"type":"custom","name":"a","occurred_at":"2026-03-12T14:22:31Z",\#(device)}"#
        let text = "\n" + line.prefix(30) + "\n" + line + "\n" + line.prefix(30)
        for text in [text, String(line.prefix(30))] {
            let name = "0001773325351250-events-\(UUID())"
            try Data(text.utf8).write(to: phone.url(name))
        }
        check(await !phone.flush(), "nothing is sent before the device is known")
        await phone.client.open(vendor: phone.vendor)
        check(await phone.flush())
        equal(try phone.rows(names), ["a|1"])
    }

    func testEachAnswerIsHandled() async throws {
        enum Outcome { case gone, next, later, asked }
        let stale = ["Date": "Sun, 09 Sep 2001 01:46:40 GMT"]
        for (reply, outcome) in [
            (Reply.stored, .gone), (Reply(200, #"{"ids": []}"#), .gone), (Reply(200, "{}"), .later),
            (Reply(204), .later), (Reply(302), .later), (nil, .later), (Reply(200, "<html>Welcome</html>"), .later),
            (Reply(401, error: "invalid API key"), .later), (Reply(401, error: "stale timestamp", stale), .next),
            (Reply(401, error: "stale timestamp"), .later), (Reply(404), .later), (Reply(400), .later),
            (Reply(400, error: "invalid JSON"), .gone), (Reply(400, error: "missing type at index 0"), .next),
            (Reply(400, error: "missing type at index 7"), .later), (Reply(400, error: "x at index -1"), .later),
            (Reply(413), .gone), (Reply(422, error: "idempotency key reused with a different body"), .gone),
            (Reply(429, error: "rate limit exceeded", ["Retry-After": "7"]), .asked), (Reply(429, error: "x"), .later),
            (Reply(503, error: "x", ["Retry-After": "4000000000"]), .asked),
            (Reply(503, error: "x", ["Retry-After": "99999999999"]), .later),
            (Reply(500), .later), (Reply(502), .later), (Reply(415, error: "x"), .later),
        ] as [(Reply?, Outcome)] {
            let script = Script(reply, .stored)
            let phone = await Phone(clock: ManualClock(), transport: script.transport)
            phone.track(["a", "b"])
            let label = "\(String(describing: reply))", isSent = outcome == .gone || outcome == .next
            equal(await phone.flush(), isSent, label)
            equal(script.requests.count, outcome == .next ? 2 : 1, label)
            equal(await phone.flush(), outcome != .asked, label)
            equal(script.requests.count, isSent ? script.requests.count : outcome == .later ? 2 : 1, label)
            equal(await phone.files.count, outcome == .asked ? 1 : 0, label)
        }
    }

    func testAPhoneWaitsAsLongAsTheServerAsksAndThenSends() async throws {
        let server = try Server(rateLimit: 1), clock = ManualClock(), asked = Locked<Double?>(nil), count = Locked(0)
        let http = Backfeedr.http(sendsInLowDataMode: false)
        let phone = await Phone(server.endpoint, clock: clock, transport: { request in
            let (body, response) = try await http(request)
            asked.with { $0 = Backfeedr.Answer(body, response).retryAfter }
            count.with { $0 += 1 }
            return (body, response)
        })
        for (name, isSent) in [("a", true), ("b", false)] {
            phone.track([name])
            equal(await phone.flush(), isSent)
        }
        server.kill()
        try server.start()  // without any memory of the first request
        clock.move(try XCTUnwrap(asked.with { $0 }) - 1)
        check(await !phone.flush())
        equal(count.with { $0 }, 2, "nothing is sent while it waits")
        clock.move(1)
        check(await phone.flush())
        equal(try phone.rows(names, server), ["a|1", "b|1"])
    }

    func testTheNextLaunchWaitsAsLongAsTheServerAskedUnlessTheClockWasSetBack() async {
        for (seconds, isSent) in [(6.0, false), (7.0, true), (-1, true), (-86_400, true)] {
            let script = Script(Reply(429, error: "rate limit exceeded", ["Retry-After": "7"]), .stored)
            let clock = ManualClock(), phone = await Phone(clock: clock, transport: script.transport)
            phone.track(["a"])
            check(await !phone.flush())
            clock.move(seconds)
            let next = await Phone(after: phone, clock: clock, transport: script.transport)
            equal(await next.flush(), isSent, "\(seconds)")
            equal(script.requests.count, isSent ? 2 : 1, "\(seconds)")
        }
    }

    func testPausesGrowEndWhenTheClockIsSetBackAndDoNotDelayAFlush() async {
        let script = Script(nil, nil, nil, nil, .stored), clock = ManualClock()
        let phone = await Phone(clock: clock, transport: script.transport)
        phone.track(["a"])
        for (seconds, count) in [(0.0, 1), (14, 1), (16, 2), (29, 2), (31, 3), (-9000, 4)] {
            clock.move(seconds)
            check(await !phone.client.send())
            equal(script.requests.count, count, "\(seconds)")
        }
        check(await phone.flush())
        phone.track(["b"])
        check(await phone.client.send(), "no pause of earlier failures is left")
        equal(script.requests.count, 6)
    }

    func testAWrongClockIsCorrectedByTheDateOfAnAnswer() async throws {
        let server = Server.shared
        for ahead in [-200_000.0, 200_000] {
            let phone = await Phone(server.endpoint, clock: ManualClock(ahead: ahead))
            for name in ["a", "b"] {
                phone.track([name])
                check(await phone.flush())
            }
            equal(try phone.rows(names), ["a|1", "b|1"])
        }
        let stale = (1...4).map { Reply(401, error: "stale timestamp", ["Date": "Sun, 09 Sep 2001 0\($0):46:40 GMT"]) }
        let script = Script(stale[0], stale[1], stale[2], stale[3], .stored)
        let phone = await Phone(transport: script.transport)
        phone.track(["a"])
        for (isSent, requests) in [(false, 2), (false, 4), (true, 5)] {
            equal(await phone.flush(), isSent, "a clock is put right once a request")
            equal(script.requests.count, requests)
        }
        let timestamps = script.requests.map { $0.value(forHTTPHeaderField: "X-Backfeedr-Timestamp")?.prefix(13) }
        equal(timestamps.dropFirst(), ["2001-09-09T01", "2001-09-09T01", "2001-09-09T03", "2001-09-09T03"])
    }

    func testABadEventIsLeftOutOfItsBatchAndTheOthersAreStored() async throws {
        let server = Server.shared, offline = await Phone(transport: Script(nil).transport)
        offline.track((0..<20).map { "event \($0)" })
        check(await !offline.flush())
        let file = offline.url(await offline.files[0])
        var lines = await offline.contents[0].split(separator: "\n").map(String.init)
        lines[3] = lines[3].replacingOccurrences(of: "custom", with: "nonsense")
        lines[19] = "{}"
        try Data(lines.joined(separator: "\n").utf8).write(to: file)
        let phone = await Phone(server.endpoint, after: offline)
        check(await phone.flush())
        equal(try phone.rows("select count(*), count(distinct name) from events"), ["18|18"])
    }

    func testABatchOfBadEventsPausesAfterTenRequests() async {
        let bad = Reply(400, error: "missing type at index 0")
        let script = Script(bad, bad, bad, bad, bad, bad, bad, bad, bad, bad, .stored)
        let phone = await Phone(transport: script.transport)
        phone.track((0..<15).map { "\($0)" })
        check(await !phone.flush())
        equal(script.requests.count, 10)
        check(await phone.flush())
        equal(try? script.events().map { $0["name"] as? String }, ["10", "11", "12", "13", "14"])
    }

    func testALargePayloadIsSentDiagnosticByDiagnostic() async throws {
        let diagnostic = #"{"diagnosticMetaData": {"note": "\#(String(repeating: "x", count: 400_000))"}}"#
        let phone = await Phone(Server.shared.endpoint)
        await phone.receive(#"""
            {"timeStampEnd": "2026-03-12 14:22:31", "crashDiagnostics": [\#(diagnostic), \#(diagnostic)],
             "hangDiagnostics": [\#(diagnostic)]}
            """#)
        check(await phone.flush())
        equal(try phone.rows("select count(*), min(occurred_at) from crashes"), ["2|1773325351000"])
        equal(try phone.rows("select count(*), min(occurred_at) from events"), ["1|1773325351000"])
    }

    func testADeepPayloadIsSentWithoutItsIndentation() async {
        let levels = Array(0..<300)  // deeper than JSONSerialization reads
        func payload(isIndented: Bool) -> String {
            func line(_ level: Int, _ text: String) -> String {
                isIndented ? "\n" + String(repeating: " ", count: 12 * level) + text : text
            }
            let begin = levels.map { line($0, #"{"name" : "a   b\n", "subFrames" : ["#) }
            let end = levels.reversed().map { line($0, "]}") }
            return #"{"hangDiagnostics": ["# + (begin + end).joined() + "]}"
        }
        let given = payload(isIndented: true), script = Script(.stored)
        check(given.utf8.count > Client.maxBody)
        await Phone(transport: script.transport).receive(given)
        equal(script.bodies, [payload(isIndented: false)])
    }

    func testAPayloadThatTheServerFindsTooLargeIsSentInPartsWithTheSameKeysEachTime() async throws {
        let payload = #"{"timeStampEnd": "2026-03-12 14:22:31", "crashDiagnostics": [{}, {}], "hangDiagnostics": [{}]}"#
        let offline = await Phone(transport: Script(nil).transport)
        await offline.receive(payload)
        let file = offline.url(await offline.files[0]), script = Script(Reply(413), .stored, .stored, .stored)
        let phone = await Phone(after: offline, transport: script.transport)
        check(await phone.flush())
        let again = Script(Reply(413), .stored)
        try Data(payload.utf8).write(to: file)  // as if the app had been killed before it was removed
        let next = await Phone(after: phone, transport: again.transport)
        check(await next.flush())
        let keys = [script, again].map { $0.requests.map { $0.value(forHTTPHeaderField: "Idempotency-Key") } }
        equal(keys[0], keys[1])
        equal([keys[0].count, Set(keys[0]).count], [4, 4])
        equal(script.bodies.dropFirst().map { $0.contains("crashDiagnostics") }, [true, true, false])
        check(script.bodies.allSatisfy { $0.contains("2026-03-12 14:22:31") })
    }

    func testALargePayloadThatGetsNoAnswerDelaysNoOther() async {
        let script = Script(nil, .stored), phone = await Phone(transport: script.transport)
        await phone.receive(#"{"hangDiagnostics": [{"note": "\#(String(repeating: "x", count: 1_100_000))"}]}"#)
        await phone.receive("1")
        check(await phone.flush())
        equal(script.bodies.map { $0 == "1" }, [false, true, false])
    }

    func testAFileThatTheServerFailsOnOrAFirewallForbidsOrThatIsUnreadableDelaysNoOther() async throws {
        for reply in [Reply(500, error: "x"), Reply(403, "<html>Forbidden</html>")] {
            let script = Script(reply, .stored), phone = await Phone(transport: script.transport)
            await phone.receive("1")
            await phone.receive("2")
            check(await phone.flush())
            equal(script.bodies, ["1", "2", "1"])
        }
        let script = Script(.stored), phone = await Phone(transport: script.transport)
        let folder = phone.url("0001773325351250-crash-\(UUID())")
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: false)
        await phone.receive("1")
        check(await !phone.flush())
        equal(script.bodies, ["1"])
    }

    func testBeforeTheDeviceIsKnownReportsWaitInMemory() async {
        let script = Script(.stored), phone = await Phone(transport: script.transport, isKnown: false)
        phone.track(["a"])
        check(await !phone.flush())
        equal(phone.all, [])
        await phone.receive("{}")
        equal(await phone.contents, ["{}"], "a payload waits on the disk")
        await phone.client.open(vendor: nil)
        equal(script.bodies.map { $0 == "{}" }, [true, false])
        equal(script.requests.map { $0.value(forHTTPHeaderField: "X-Backfeedr-Device")?.count }, [64, 64])
        equal(phone.all, ["installation"])
        phone.client.setEnabled(false)
        check(await phone.flush())
        equal(Set(phone.all), ["installation", "off"])
        phone.client.setEnabled(true)
        let next = await Phone(after: phone, isKnown: false)
        await next.client.open(vendor: nil)
        equal(next.client.deviceID, phone.client.deviceID, "without a vendor's id, the number in the folder stays")
    }

    func testARequestIsSignedAnewWithTheSameKeyAndBody() async {
        let clock = ManualClock(), script = Script(nil, .stored)
        let phone = await Phone("http://h/a", clock: clock, transport: script.transport)
        phone.track(["a"])
        check(await !phone.flush())
        clock.move(3600)
        check(await phone.flush())
        equal(script.requests[0].url?.absoluteString, "http://h/a/api/v1/events/batch")
        equal(script.bodies[0], script.bodies[1])
        for (name, count) in [("Idempotency-Key", 1), ("X-Backfeedr-Timestamp", 2), ("X-Backfeedr-Signature", 2)] {
            equal(Set(script.requests.map { $0.value(forHTTPHeaderField: name) }).count, count, name)
        }
    }

    func testNoRedirectIsFollowed() async throws {
        let program = """
            import http.server
            class Handler(http.server.BaseHTTPRequestHandler):
                def do_POST(self):
                    self.rfile.read(int(self.headers["Content-Length"]))
                    print(self.path, flush=True)
                    self.send_response(302 if "redirect" in self.path else 200)
                    self.send_header("Location", "/stolen")
                    self.send_header("Content-Length", "11")
                    self.end_headers()
                    self.wfile.write(b'{"id": "1"}')
                do_GET = do_POST
                def log_message(self, *args):
                    pass
            server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
            print(server.server_address[1], flush=True)
            server.serve_forever()
            """
        let (process, pipe) = try started([python, "-c", program])
        defer { kill(process.processIdentifier, SIGKILL) }
        let port = try firstLine(of: pipe)
        for (path, isStored) in [("redirect", false), ("plain", true)] {
            let phone = await Phone("http://127.0.0.1:\(port)/\(path)")
            await phone.receive("{}")
            equal(await phone.flush(), isStored, path)
            for _ in 0..<(isStored ? 1 : 2) { equal(try firstLine(of: pipe), "/\(path)/api/v1/diagnostics") }
        }
    }

    func testTheOldestFilesBeyondAHundredOrFiveMegabytesAreDeleted() async throws {
        let phone = await Phone(isKnown: false)
        for number in 0..<120 {
            let file = phone.url(String(format: "%016ld", number) + "-crash-\(UUID())")
            try Data("\(number)".utf8).write(to: file)
        }
        await phone.flush()
        equal(await phone.contents, (20..<120).map { "\($0)" })
        for _ in 0..<12 { await phone.client.receive(Data(count: 500_000)) }
        equal(await phone.files.count, 10)
        let files = await phone.files
        await phone.client.receive(Data(count: 5_000_001))
        equal(await phone.files, files, "a file above the limit deletes itself only")
    }

    func testAFileThatIsDeletedForNewerOnesWhileItIsSentDoesNotDelayThem() async throws {
        let waiting = await Phone(isKnown: false), script = Script(.stored)
        for number in 0..<100 {
            try Data("\(number)".utf8).write(to: waiting.url(String(format: "%016ld", number) + "-crash-\(UUID())"))
        }
        let phone = await Phone(after: waiting, transport: { request in
            if script.requests.isEmpty {
                Backfeedr.client?.later { await $0.receive(Data("new".utf8)) }
                check(await waitUntil { await !waiting.contents.contains("0") })
            }
            return try await script.transport(request)
        }, isKnown: false)
        await phone.client.open(vendor: phone.vendor)
        equal(script.bodies, (0..<100).map { "\($0)" } + ["new"])
    }
}

/// An app that another test starts, and that kills itself at a given moment of its request.
final class KilledApp: XCTestCase {
    func testRunsUntilItIsKilled() async throws {
        let given = ProcessInfo.processInfo.environment
        guard let moment = given["BACKFEEDR_KILLED"], let folder = given["BACKFEEDR_FOLDER"],
              let endpoint = given["BACKFEEDR_ENDPOINT"], let vendor = given["BACKFEEDR_VENDOR"]
        else { throw XCTSkip("another test starts this one") }
        let http = Backfeedr.http(sendsInLowDataMode: false)
        let phone = await Phone(endpoint, folder: URL(fileURLWithPath: folder), transport: { request in
            if moment == "after" { _ = try await http(request) }
            kill(getpid(), SIGKILL)
            throw CancellationError()
        }, vendor: vendor)
        phone.track((0..<50).map { "\(moment) \($0)" })
        await phone.flush()
    }
}

final class ReportTests: XCTestCase {
    func testEveryPublicCall() async throws {
        let server = Server.shared
        setenv("XDG_DATA_HOME", temporaryFolder().path, 1)
        Backfeedr.running.with { $0 = nil }
        Backfeedr.track("too early")
        Backfeedr.breadcrumb("too early")
        Backfeedr.capture(CartError())
        equal(Backfeedr.deviceID, "")
        check(Backfeedr.isEnabled)
        let waiting = Client.folder.appendingPathComponent("0001773325351250-crash-\(UUID())")
        try FileManager.default.createDirectory(at: Client.folder, withIntermediateDirectories: true)
        try Data().write(to: waiting)
        Backfeedr.isEnabled = false
        check(!Backfeedr.isEnabled)
        equal(try FileManager.default.contentsOfDirectory(atPath: Client.folder.path), ["off"])
        check(Backfeedr.start(endpoint: server.endpoint, key: " \(key)\n"))
        check(await Backfeedr.flush().value)
        equal(Backfeedr.deviceID.count, 64, "it waits for the device, because nothing can be sent before")
        Backfeedr.track("disabled")
        check(await Backfeedr.flush().value)
        check(!Backfeedr.isEnabled)
        Backfeedr.isEnabled = true
        check(Backfeedr.start(endpoint: "http://elsewhere", key: key), "a second call changes nothing")
        Backfeedr.breadcrumb("opened the cart")
        Backfeedr.track("purchase", properties: ["items": 3, "paid": true, "sum": 9.5])
        Backfeedr.capture(CartError(item: 7), context: ["screen": "cart"])
        check(await Backfeedr.flush().value)
        equal(try server.rows(Backfeedr.deviceID, "select name, properties from events where type = 'custom'"), [
            #"purchase|{"items":3,"paid":true,"sum":9.5}"#])
        let error = try server.rows(Backfeedr.deviceID, """
            select name, json_extract(properties, '$.error'), json_extract(properties, '$.context.screen'),
              json_extract(properties, '$.breadcrumbs[0].text'), json_extract(properties, '$.place') like '%swift:%',
              os_version > '', device_model > '', locale > ''
            from events where type = 'error'
            """)
        equal(error, ["BackfeedrTests.CartError|CartError(item: 7)|cart|opened the cart|1|1|1|1"])
        Backfeedr.isEnabled = false
        check(await Backfeedr.flush().value)
        equal(Set(try FileManager.default.contentsOfDirectory(atPath: Client.folder.path)), ["installation", "off"])
    }

    func testASessionContinuesWithinThirtySecondsAndLaterAnotherBegins() async throws {
        let server = Server.shared, clock = ManualClock(ahead: -1000)
        let phone = await Phone(server.endpoint, clock: clock)
        phone.client.wentToBackground()  // a launch in the background has no session
        for away in [29.0, 31] {
            phone.client.becameActive()
            phone.client.becameActive()  // like after a phone call
            phone.track(["used"])
            clock.move(60)
            phone.client.wentToBackground()
            clock.move(away)
        }
        phone.client.becameActive()
        check(await phone.flush())
        let rows = try phone.rows("""
            select group_concat(type, ' '), count(distinct session_id), max(occurred_at) - min(occurred_at)
            from (select * from events order by id) group by session_id order by min(id)
            """)
        equal(rows, ["session_start custom session_end custom session_end|1|149000", "session_start|1|0"])
    }

    func testErrorsInALoopAreSentAHundredTimesASessionAndThenCounted() async throws {
        let clock = ManualClock(ahead: -1000), phone = await Phone(Server.shared.endpoint, clock: clock)
        for count in [150, 100] {
            phone.client.becameActive()
            for _ in 0..<count { Backfeedr.capture(CartError()) }
            Backfeedr.capture(CartError(item: 2))
            phone.client.wentToBackground()
            clock.move(31)
        }
        check(await phone.flush())
        let rows = try phone.rows("""
            select sum(type = 'error'), max(json_extract(properties, '$.error')),
              max(case type when 'session_end' then properties end)
            from events group by session_id order by min(occurred_at)
            """)
        equal(rows, ["101|CartError(item: 2)|{\"errors_not_sent\":50}", "101|CartError(item: 2)|None"])
    }

    func testTheLastFiftyBreadcrumbsAreSentAndTheNewestAreKeptIfThereIsNoRoom() async throws {
        let long = Dictionary(uniqueKeysWithValues: (0..<20).map { ("\($0)", String(repeating: "x", count: 2000)) })
        for (letter, isCut) in [("x", false), ("\u{8A9E}", true)] {
            let script = Script(.stored), phone = await Phone(transport: script.transport)
            for number in 0..<60 { Backfeedr.breadcrumb("\(number) " + String(repeating: letter, count: 1000)) }
            Backfeedr.capture(CartError(), context: long)
            await phone.flush()
            let crumbs = try XCTUnwrap((script.events()[0]["properties"] as? [String: Any])?["breadcrumbs"] as? [Any])
            let texts = crumbs.compactMap { ($0 as? [String: String])?["text"] }
            equal(crumbs.count, 50)
            check(isCut ? texts.count < 50 : texts.count == 50, letter)
            equal(texts.last.map { "\($0.split(separator: " ")[0]), \($0.count)" }, "59, 200")
        }
    }

    func testQueriesAndPasswordsInTheURLsOfAnErrorAreNotSent() async throws {
        struct Failed: Error { var reason: any Error }
        let secret = "https://anna:secret@h.example/cart,2?ids=1,2&token='secret'#secret"
        let error = URLError(.timedOut, userInfo: [NSURLErrorFailingURLErrorKey: URL(string: secret)!])
        for error in [error, error as NSError, Failed(reason: error)] as [any Error] {
            let script = Script(.stored), phone = await Phone(transport: script.transport)
            Backfeedr.capture(error)
            await phone.flush()
            check(script.bodies[0].contains(#"h.example\/cart,2"#), script.bodies[0])
            check(!script.bodies[0].contains("secret"), script.bodies[0])
        }
    }

    func testThePathOfAFileIsNotSentWithItsError() async throws {
        var errors: [any Error] = []
        let url = URL(fileURLWithPath: "/Users/anna/letter")
        do { _ = try Data(contentsOf: url) } catch { errors.append(error) }
        errors.append(CocoaError(.fileReadNoSuchFile, userInfo: [NSURLErrorKey: url]))
        errors.append(NSError(domain: "Shop", code: 7, userInfo: [NSUnderlyingErrorKey: errors[0]]))
        let why = DecodingError.Context(codingPath: [], debugDescription: "", underlyingError: errors[0])
        errors.append(DecodingError.dataCorrupted(why))
        errors.append(NSError(domain: "Shop", code: 8, userInfo: ["NSMultipleUnderlyingErrorsKey": [errors[0]]]))
        let texts = ["NSCocoaErrorDomain 260", "NSCocoaErrorDomain 260", "Shop 7", "NSCocoaErrorDomain 4864", "Shop 8"]
        for (error, text) in zip(errors, texts) {
            let script = Script(.stored), phone = await Phone(transport: script.transport)
            Backfeedr.capture(error)
            await phone.flush()
            equal((try script.events()[0]["properties"] as? [String: Any])?["error"] as? String, text)
            check(!script.bodies[0].contains("anna"), script.bodies[0])
        }
    }

    func testNoValueLosesAReportOrCrashesTheApp() async throws {
        final class Opaque: Sendable {}
        enum Kind { case book }
        var deep: [String: any Sendable] = [:]
        for _ in 0..<1000 { deep = ["in": deep] }
        let lone = String(decoding: [0x61, 0xD800, 0x62] as [UInt16], as: UTF16.self)
        let values: [any Sendable] = [
            Double.nan, -Double.infinity, Float.nan, Double.greatestFiniteMagnitude, Int.min, UInt64.max, "", "\0",
            lone,
            String(repeating: "long", count: 100_000), "a" + String(repeating: "\u{301}", count: 100_000), deep,
            [Int](repeating: 1, count: 100_000), Date.distantFuture, Date.distantPast, UUID(), URL(string: "http://h")!,
            Data([0xFF]), Opaque(), Kind.book, Optional<Int>.none, Optional(3), NSNull(), [Double.nan: 1], (1, "two"),
            Dictionary(uniqueKeysWithValues: (0..<10_000).map { ("\($0)", $0) }), [[Double.nan]], ["x": Float.infinity]]
        let phone = await Phone(Server.shared.endpoint)
        for (number, value) in values.enumerated() {
            Backfeedr.track("\(number)", properties: ["value": value, lone: value])
            Backfeedr.capture(NSError(domain: "Shop", code: number), context: ["value": value])
        }
        Backfeedr.track(String(repeating: "\u{10FFFF}", count: 100_000))
        Backfeedr.breadcrumb(lone)
        check(await phone.flush())
        equal(try phone.rows("select count(*), max(length(properties)) < 33000 from events"), [
            "\(2 * values.count + 1)|1"])
        equal(try phone.rows("select properties from events where name = '0'"), [
            #"{"a\#u{FFFD}b":"nan","value":"nan"}"#])
        equal(try phone.rows("select count(*) from events where name = 'Shop 5'"), ["1"])
    }

    func testWhatIsCutOfPropertiesFollowsFromTheirNames() async throws {
        let script = Script(.stored), phone = await Phone(transport: script.transport)
        let names = (10..<99).map { "\($0)" }, text = String(repeating: "x", count: 1500)
        Backfeedr.track("a", properties: Dictionary(uniqueKeysWithValues: names.map { ($0, text) }))
        await phone.flush()
        let properties = try XCTUnwrap(script.events()[0]["properties"] as? [String: Any])
        equal(properties.filter { $0.value as? String == text }.keys.sorted(), Array(names.prefix(13)))
    }

    func testAReadOnlyFolderAndAFullDiskLoseReportsOnly() async throws {
        let file = temporaryFolder().appendingPathComponent("file")
        try Data().write(to: file)
        let phone = await Phone(folder: file.appendingPathComponent("folder"), transport: Script(nil).transport)
        phone.track(["a"])
        await phone.receive("{}")
        phone.client.record(exception: "E", reason: "r", addresses: [1])
        check(await phone.flush(), "there is nothing to send")

        let script = Script(.stored), full = await Phone(transport: script.transport)
        full.track(["kept"])
        await full.client.gather()
        let batch = full.url(await full.files[0]), content = try Data(contentsOf: batch)
        try FileManager.default.removeItem(at: batch)
        try FileManager.default.createSymbolicLink(atPath: batch.path, withDestinationPath: "/dev/full")
        full.track(["lost"])
        await full.client.gather()
        try FileManager.default.removeItem(at: batch)
        try (content + content.prefix(20)).write(to: batch)
        full.track(["kept, too"])
        check(await full.flush())
        equal(try script.events().map { $0["name"] as? String }, ["kept", "kept, too"])
    }

    func testNothingIsStoredOrSentWhileDisabledEvenAfterTheNextLaunch() async throws {
        let script = Script(nil, .stored), phone = await Phone(transport: script.transport)
        phone.track(["a"])
        check(await !phone.flush())
        phone.client.record(exception: "E", reason: "r", addresses: [])
        phone.client.setEnabled(false)
        phone.track(["b"])
        phone.client.becameActive()
        await phone.receive("{}")
        phone.client.record(exception: "E", reason: "r", addresses: [])
        check(await phone.flush())
        let next = await Phone(after: phone, transport: script.transport)
        next.track(["c"])
        check(await next.flush())
        check(!Backfeedr.isEnabled)
        equal(next.all, ["off"])
        equal(script.requests.count, 1)
        next.client.becameActive()
        next.client.setEnabled(true)
        next.track(["d"])
        check(await next.flush())
        let events = try script.events()
        equal(events.map { $0["type"] as? String }, ["session_start", "custom"])
        equal(Set(events.map { $0["session_id"] as? String }).count, 1)
    }

    func testAFileThatAnotherProcessHasSentIsNotContinued() async throws {
        let script = Script(.stored), one = await Phone(transport: script.transport)
        let two = await Phone(after: one, transport: script.transport)
        one.track(["a"])
        await one.client.gather()
        for (name, phone) in [("a", two), ("b", two), ("c", one)] {
            if name != "a" { phone.track([name]) }
            check(await phone.flush())
            equal(try script.events().map { $0["name"] as? String }, [name])
        }
        equal(Set(script.requests.map { $0.value(forHTTPHeaderField: "Idempotency-Key") }).count, 3)
    }

    func testAnEventThatComesWhileAnotherProcessSendsItsFileIsSentInAFileOfItsOwn() async throws {
        let script = Script(.stored), isFirst = Locked(true), one = await Phone(transport: script.transport)
        let two = await Phone(after: one, transport: { request in
            if isFirst.with({ isFirst in defer { isFirst = false }; return isFirst }) {
                one.track(["b"])
                await one.client.gather()
            }
            return try await script.transport(request)
        })
        one.track(["a"])
        await one.client.gather()
        check(await two.flush())
        equal(script.bodies.map { $0.components(separatedBy: #""name":""#).dropFirst().map { $0.prefix(1) } },
              [["a"], ["b"]])
        equal(Set(script.requests.map { $0.value(forHTTPHeaderField: "Idempotency-Key") }).count, 2)
        equal(await one.files, [])
    }

    func testDisablingCancelsARunningRequest() async {
        let isRunning = Locked(false), isCancelled = Locked(false)
        let phone = await Phone(transport: { _ in
            isRunning.with { $0 = true }
            do { try await Task.sleep(nanoseconds: 60_000_000_000) } catch { isCancelled.with { $0 = true } }
            throw CancellationError()
        })
        phone.track(["a"])
        let flush = Backfeedr.flush()
        check(await waitUntil { isRunning.with { $0 } })
        Backfeedr.isEnabled = false
        check(await flush.value)
        check(isCancelled.with { $0 })
    }

    func testThreadsMayCallEverythingAtOnce() async throws {
        let phone = await Phone(Server.shared.endpoint), client = phone.client
        DispatchQueue.concurrentPerform(iterations: 8) { thread in
            for number in 0..<50 {
                Backfeedr.track("\(thread) \(number)", properties: ["number": number])
                Backfeedr.breadcrumb("\(number)")
                if number % 10 == 0 {
                    Backfeedr.capture(CartError(item: number))
                    client.becameActive()
                    client.wentToBackground()
                    Backfeedr.flush()
                    _ = Backfeedr.deviceID
                    client.later { await $0.open(vendor: phone.vendor) }
                    client.later { await $0.receive(Data(#"{"timeStampBegin": "2026-03-12 14:22:31 +0000"}"#.utf8)) }
                }
            }
        }
        check(await waitUntil { await phone.flush() })
        let counts = "select type, count(*) from events where type in ('custom', 'error') group by 1"
        equal(try phone.rows(counts), ["custom|400", "error|40"])
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

    private func payload(_ crashes: String..., more: String = "") -> String {
        let list = crashes.joined(separator: ", ")
        return #"{"timeStampEnd": "2026-03-12 14:22:31 +0000", "crashDiagnostics": [\#(list)]\#(more)}"#
    }

    func testAnUncaughtExceptionIsSentOnTheNextLaunchAndNotAgainFromMetricKit() async throws {
        let server = Server.shared, pid = Int(ProcessInfo.processInfo.processIdentifier)
        let dying = await Phone(server.endpoint)
        dying.client.becameActive()
        check(await dying.flush())
        Backfeedr.breadcrumb("opened the cart")
        dying.client.record(exception: "NSRangeException", reason: "index 9 beyond bounds", addresses: [0x1000, 0x2000])
        let next = await Phone(server.endpoint, after: dying)
        check(await next.flush())
        await next.receive(payload(crash(pid: pid), crash(pid: pid + 1, signal: 11)))
        await next.receive(payload(crash(pid: pid), more: #", "hangDiagnostics": []"#))  // the mark is used up
        check(await next.flush())
        let crashes = try next.rows("""
            select exception_type, exception_reason, json_extract(stack_trace, '$[1].address'), session_id is not null,
              json_extract(extra, '$.breadcrumbs[0].text')
            from crashes order by id
            """)
        equal(crashes, ["NSRangeException|index 9 beyond bounds|0x2000|1|opened the cart", "SIGSEGV|None|None|0|None",
                        "SIGABRT|None|None|0|None"])
    }

    func testTheEventsJustBeforeAnExceptionAreStoredUnlessOneNeedsALockOfItsThread() async {
        struct Cart: CustomStringConvertible, Sendable {
            let phone: Phone, lock: NSLock?

            var description: String {
                lock?.withLock {}
                while lock == nil, !phone.all.contains(where: { $0.contains("-exception-") }) { usleep(1000) }
                return "cart"
            }
        }
        for lock in [nil, NSLock()] {
            let phone = await Phone(transport: Script(nil).transport)
            await withCheckedContinuation { done in
                Thread.detachNewThread {
                    lock?.lock()
                    Backfeedr.track("bought", properties: ["cart": Cart(phone: phone, lock: lock)])
                    phone.client.record(exception: "E", reason: "r", addresses: [])
                    let kinds = phone.all.map { $0.split(separator: "-")[1] }.sorted()
                    equal(kinds, lock == nil ? ["crash", "events", "exception"] : ["crash", "exception"])
                    lock?.unlock()
                    done.resume()
                }
            }
        }
    }

    func testAnAppThatCrashesAtEachLaunchSendsItsCrashesBeforeStartReturns() async throws {
        for (count, sent) in [(1, 0), (2, 2)] {
            let isStarted = Locked(false), script = Script(.stored)
            let phone = await Phone(transport: { request in
                if count == 1 { check(await waitUntil { isStarted.with { $0 } }) }
                return try await script.transport(request)
            }, isKnown: false)
            for number in 0..<count { try Data().write(to: phone.url("000177332535125\(number)-crash-\(UUID())")) }
            await withCheckedContinuation { done in
                Thread.detachNewThread {
                    let begin = Date()
                    phone.client.followApp()
                    check(Date().timeIntervalSince(begin) < 1, "one crash does not delay the start")
                    equal(script.requests.count, sent)
                    isStarted.with { $0 = true }
                    done.resume()
                }
            }
        }
    }

    func testAnExceptionBeforeTheDeviceIsKnownHasTheSystemButNoDevice() async throws {
        let phone = await Phone(isKnown: false)
        phone.client.record(exception: "E", reason: "at launch", addresses: [])
        let crash = try JSONSerialization.jsonObject(with: Data(await phone.contents[0].utf8)) as? [String: Any]
        XCTAssertNotNil(crash?["os_version"])
        XCTAssertNil(crash?["device_id_hash"])
    }

    func testCrashesInAPayloadAreMatchedWithExceptions() async {
        let hang = #", "hangDiagnostics": [{"callStackTree": {}}]"#
        let fault = payload(crash(signal: 11)), report = #"{"environment": {"pid": 4242}, "crashDiagnostic": {}}"#
        for (label, given, left) in [
            ("alone", payload(crash(pid: 4242)), nil), ("another", payload(crash(pid: 1)), payload(crash(pid: 1))),
            ("a pid that ends alike", payload(crash(pid: 242)), payload(crash(pid: 242))),
            ("iOS 16 abort", payload(crash()), nil), ("iOS 16 fault", fault, fault), ("iOS 27", report, nil),
            ("no JSON", "]", "]"), ("a list", "[1]", "[1]"), ("no objects", payload("1"), payload("1")),
        ] as [(String, String, String?)] {
            let phone = await Phone(isKnown: false)
            phone.client.mark(4242)
            await phone.receive(given)
            equal(await phone.contents, left.map { [$0] } ?? [], label)
        }
        let phone = await Phone(isKnown: false)
        phone.client.mark(4242)
        await phone.receive(payload(crash(pid: 4242), more: hang))
        equal(await phone.contents.map { $0.contains("hangDiagnostics") && !$0.contains("crashDiagnostics") }, [true])
    }

    func testMarksOlderThanTwoDaysAndUnfinishedWritesAreDeletedAtTheNextLaunch() async throws {
        let clock = ManualClock(), phone = await Phone(clock: clock)
        try Data().write(to: phone.url("0001773325351250-crash-\(UUID()).sb-1234"))
        phone.client.mark(1)
        clock.move(172_801)
        phone.client.mark(2)
        let next = await Phone(after: phone, clock: clock)
        equal(next.all.map { $0.hasSuffix("-exception-2") }, [true])
    }

    func testThePartsForUIKitAppKitAndMetricKitAreTypeChecked() throws {
        guard try runProgram(["which", "swiftc"]).status == 0 else { throw XCTSkip("swiftc is not here") }
        let mac = temporaryFolder().path, phone = temporaryFolder().path
        func compile(_ commands: [[String]]) {
            DispatchQueue.concurrentPerform(iterations: commands.count) { number in
                let result = try? runProgram(["sh", "-c", #""$@" 2>&1"#, "sh", "swiftc", "-I", mac] + commands[number])
                equal(result?.status, 0, result?.output ?? "swiftc did not run")
            }
        }
        let stubs = ["AppKit", "MachO", "ObjectiveC", "MetricKit", "UIKit"].map { "Tests/Stubs/\($0).swift" }
        compile((stubs + ["Tests/CryptoKit/CryptoKit.swift"]).map { path in
            let name = path.split(separator: "/")[2].dropLast(6), folder = name == "UIKit" ? phone : mac
            let module = "\(folder)/\(name).swiftmodule", source = package.appendingPathComponent(path).path
            return ["-emit-module", "-parse-as-library", "-module-name", "\(name)", "-o", module, source]
        })
        let sources = ["Apple", "Backfeedr", "Client"].map {
            package.appendingPathComponent("Sources/Backfeedr/\($0).swift").path
        }
        compile([
            ["-swift-version", "6"], ["-swift-version", "5", "-I", phone],
            ["-swift-version", "6", "-I", phone, "-D", "BACKFEEDR_METRICKIT_27"],
        ].map { $0 + ["-typecheck", "-warnings-as-errors"] + sources })
    }
}

/// Measures and prints the cost of reporting, and checks that nothing is lost while the server restarts.
final class FiguresTests: XCTestCase {
    func testEachReportIsStoredOnceWhileTheServerIsKilledAndRestartedTwice() async throws {
        let server = try Server(), phone = await Phone(server.endpoint)
        let hang = #"{"diagnosticMetaData": {"hangDuration": "20 sec"}}"#
        for number in 0..<1000 {
            Backfeedr.track("event \(number)", properties: ["number": number])
            if number % 50 == 0 { Backfeedr.capture(CartError(), context: ["number": number]) }
            if number % 200 == 0 {
                let end = "2026-03-12 14:2\(number / 200):31"
                let payload = Data(#"{"timeStampEnd": "\#(end)", "hangDiagnostics": [\#(hang)]}"#.utf8)
                phone.client.later { await $0.receive(payload) }
            }
            if number % 100 == 99 { Backfeedr.flush() }
            if number == 333 || number == 666 { server.kill() }
            if number == 350 || number == 700 { try server.start() }
        }
        check(await waitUntil { await phone.flush() })
        for (what, distinct, count) in [
            ("type = 'custom'", "name", 1000), ("name = 'Hang'", "occurred_at", 5),
            ("name like '%CartError'", "json_extract(properties, '$.context.number')", 20),
        ] {
            let rows = try phone.rows("select count(*), count(distinct \(distinct)) from events where \(what)", server)
            equal(rows, ["\(count)|\(count)"], what)
        }
    }

    func testTheCostOfACallAndOfAFullQueue() async throws {
        let phone = await Phone(transport: Script(nil).transport)
        let properties: [String: any Sendable] = ["items": 3, "screen": "cart"]
        var nanoseconds: [UInt64] = []
        for number in 0..<2_000 {
            let begin = DispatchTime.now().uptimeNanoseconds
            Backfeedr.track("purchase", properties: properties)
            nanoseconds.append(DispatchTime.now().uptimeNanoseconds - begin)
            if number % 200 == 199 { await phone.client.gather() }
        }
        nanoseconds.sort()
        print("track: median \(nanoseconds[1_000]) ns, 99th percentile \(nanoseconds[1_980]) ns")
        check(nanoseconds[1_000] < 100_000)

        let waiting = await Phone(isKnown: false), before = residentKilobytes()
        let output = try outputOf {
            for number in 0..<5_000 {
                Backfeedr.track("purchase \(number)", properties: ["items": number, "screen": "screen \(number)"])
            }
        }
        #if DEBUG
        equal(output.components(separatedBy: "2000 reports wait in memory").count, 2, output)
        #endif
        equal(waiting.client.front.with { $0.pending.count }, Client.maxPending)
        print("a full queue of \(Client.maxPending) reports: \(residentKilobytes() - before) kB")
        check(residentKilobytes() - before < 10_000)
    }

    func testAnErrorWithManyURLsIsSentAtOnce() async {
        let script = Script(.stored), phone = await Phone(transport: script.transport), begin = Date()
        Backfeedr.capture(NSError(domain: String(repeating: "http://h,", count: 10_000), code: 1))
        check(await phone.flush())
        check(Date().timeIntervalSince(begin) < 10, "a time that grows with the square would be minutes")
    }

    /// What the body prints.
    private func outputOf(_ body: () -> Void) throws -> String {
        let pipe = Pipe(), terminal = dup(1)
        fflush(nil)
        dup2(pipe.fileHandleForWriting.fileDescriptor, 1)
        body()
        fflush(nil)
        dup2(terminal, 1)
        close(terminal)
        try pipe.fileHandleForWriting.close()
        return String(decoding: pipe.fileHandleForReading.readDataToEndOfFile(), as: UTF8.self)
    }

    private func residentKilobytes() -> Int {
        let pages = (try? String(contentsOfFile: "/proc/self/statm", encoding: .utf8))?.split(separator: " ")
        return pages.flatMap { Int($0[1]) }.map { $0 * 4 } ?? 0
    }
}
