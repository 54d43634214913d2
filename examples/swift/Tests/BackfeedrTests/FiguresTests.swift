// What reporting costs an app, and that nothing is lost while the server comes and goes. The figures are printed.
import Foundation
import XCTest
@testable import Backfeedr

final class FiguresTests: XCTestCase {
    private struct CartError: Error {}

    func testEachReportIsStoredOnceWhileTheServerIsKilledAndRestartedTwice() throws {
        let server = try Server(), clock = ManualClock(), phone = Phone(server.endpoint, clock: clock.clock)
        let hang = #"{"diagnosticMetaData": {"hangDuration": "20 sec"}}"#
        for number in 0..<1000 {
            phone.client.add(.custom("event \(number)", ["number": number]))
            if number % 50 == 0 { phone.client.capture(CartError(), ["number": number], "Cart.swift:1") }
            if number % 200 == 0 {
                let end = "2026-03-12 14:2\(number / 200):31"
                phone.client.receive(Data(#"{"timeStampEnd": "\#(end)", "hangDiagnostics": [\#(hang)]}"#.utf8))
            }
            if number % 100 == 99 { phone.client.flush() }
            if number == 333 || number == 666 { server.kill() }
            if number == 350 || number == 700 { try server.start() }
        }
        XCTAssertTrue(waitUntil { phone.flush() })
        for (what, distinct, count) in [
            ("type = 'custom'", "name", 1000), ("name = 'Hang'", "occurred_at", 5),
            ("name like '%CartError'", "json_extract(properties, '$.context.number')", 20),
        ] {
            let rows = try server.rows("select count(*), count(distinct \(distinct)) from events where \(what)")
            XCTAssertEqual(rows, ["\(count)|\(count)"], what)
        }
    }

    func testWhatACallCostsItsThreadAndAFullQueueTheApp() {
        let phone = Phone("http://127.0.0.1:1"), properties: [String: any Sendable] = ["items": 3, "screen": "cart"]
        var nanoseconds: [UInt64] = []
        for number in 0..<20_000 {
            let begin = DispatchTime.now().uptimeNanoseconds
            phone.client.add(.custom("purchase", properties))
            nanoseconds.append(DispatchTime.now().uptimeNanoseconds - begin)
            if number % 1000 == 999 { phone.outbox.work.sync {} }
        }
        nanoseconds.sort()
        print("track: median \(nanoseconds[10_000]) ns, 99th percentile \(nanoseconds[19_800]) ns")
        XCTAssertLessThan(nanoseconds[10_000], 100_000)

        let waiting = Phone("http://127.0.0.1:1", isKnown: false), before = residentKilobytes()
        for number in 0..<5_000 {
            waiting.client.add(.custom("purchase \(number)", ["items": number, "screen": "screen \(number)"]))
        }
        print("a full queue of \(Client.maxPending) reports: \(residentKilobytes() - before) kB")
        XCTAssertLessThan(residentKilobytes() - before, 10_000)
    }

    private func residentKilobytes() -> Int {
        let pages = (try? String(contentsOfFile: "/proc/self/statm", encoding: .utf8))?.split(separator: " ")
        return pages.flatMap { Int($0[1]) }.map { $0 * 4 } ?? 0
    }
}
