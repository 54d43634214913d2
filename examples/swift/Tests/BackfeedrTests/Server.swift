// The real server, and phones that send to it.
import Foundation
import XCTest
@testable import Backfeedr
#if canImport(FoundationNetworking)
import FoundationNetworking
#endif

typealias Answer = Backfeedr.Answer
typealias Client = Backfeedr.Client
typealias Clock = Backfeedr.Clock
typealias Digest = Backfeedr.Digest
typealias HTTP = Backfeedr.HTTP
typealias Kind = Backfeedr.Kind
typealias Locked = Backfeedr.Locked
typealias Outbox = Backfeedr.Outbox
typealias Outcome = Backfeedr.Outcome
typealias Transport = Backfeedr.Transport

let key = "bf_live_0123456789abcdef0123456789abcdef"
let package = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
    .deletingLastPathComponent()
let examples = package.deletingLastPathComponent()

/// Runs a program to its end: its status and output.
func runProgram(_ words: [String], environment: [String: String] = [:]) throws -> (status: Int32, output: String) {
    let (process, pipe) = started(words, environment)
    try process.run()
    let output = pipe.fileHandleForReading.readDataToEndOfFile()
    process.waitUntilExit()
    return (process.terminationStatus, String(decoding: output, as: UTF8.self))
}

private func started(_ words: [String], _ environment: [String: String]) -> (Process, Pipe) {
    let process = Process(), pipe = Pipe()
    process.executableURL = URL(fileURLWithPath: "/usr/bin/env")
    process.arguments = words
    let inherited = ProcessInfo.processInfo.environment.filter { !$0.key.hasPrefix("BACKFEEDR_") }
    process.environment = inherited.merging(environment) { $1 }
    process.standardOutput = pipe
    process.standardInput = FileHandle.nullDevice
    return (process, pipe)
}

/// What a program prints up to its next line break; fails where it has ended.
func firstLine(of pipe: Pipe) throws -> String {
    var line = Data()
    while line.last != 10 {
        guard let more = try pipe.fileHandleForReading.read(upToCount: 1), !more.isEmpty else {
            throw CocoaError(.fileReadUnknown)
        }
        line += more
    }
    return String(decoding: line.dropLast(), as: UTF8.self)
}

/// A server that a test starts, kills and starts again on the same port.
final class Server {
    static let python = ProcessInfo.processInfo.environment["BACKFEEDR_PYTHON"] ?? "python3"

    let folder = temporaryFolder()
    private(set) var port = 0
    private var process: Process?

    init(rateLimit: Int = 0) throws { try start(rateLimit: rateLimit) }

    deinit {
        kill()
        try? FileManager.default.removeItem(at: folder)
    }

    var endpoint: String { "http://127.0.0.1:\(port)" }

    func start(rateLimit: Int = 0) throws {
        let program = examples.deletingLastPathComponent().appendingPathComponent("backfeedr.py").path
        let (process, pipe) = started([Server.python, program, "--port", "\(port)", "--db", database], [
            "BACKFEEDR_API_KEY": key, "BACKFEEDR_AUTH_TOKEN": "bf_admin_0123456789", "PYTHONUNBUFFERED": "1",
            "BACKFEEDR_RATE_LIMIT": "\(rateLimit)", "BACKFEEDR_REQUIRE_SIGNATURE": "1"])
        try process.run()
        self.process = process
        let line = try firstLine(of: pipe)
        port = try XCTUnwrap(Int(line.split(separator: ":").last ?? ""), line)
    }

    /// Ends it as a power cut would.
    func kill() {
        guard let process else { return }
        _ = Foundation.kill(process.processIdentifier, SIGKILL)
        process.waitUntilExit()
        self.process = nil
    }

    private var database: String { folder.appendingPathComponent("backfeedr.db").path }

    /// The rows of a query, each as text with | between the values.
    func rows(_ sql: String) throws -> [String] {
        let program = "import sqlite3, sys\n"
            + "for row in sqlite3.connect(sys.argv[1]).execute(sys.argv[2]): print(*row, sep='|')"
        let (status, output) = try runProgram([Server.python, "-c", program, database, sql])
        XCTAssertEqual(status, 0, output)
        return output.split(separator: "\n").map(String.init)
    }
}

func temporaryFolder() -> URL {
    let folder = FileManager.default.temporaryDirectory.appendingPathComponent("backfeedr-\(UUID())")
    try? FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    return folder
}

/// A clock that a test moves.
final class ManualClock: Sendable {
    private let at = Locked((day: Date(), uptime: 1000.0))

    init(ahead: Double = 0) { at.with { $0.day += ahead } }

    func move(_ seconds: Double) {
        at.with { at in
            at.day += seconds
            at.uptime += seconds
        }
    }

    var clock: Clock { Clock(now: { self.at.with { $0.day } }, uptime: { self.at.with { $0.uptime } }) }
}

/// Answers as a script says, the last line again and again; the requests that came.
final class Script: Sendable {
    private let state: Locked<(lines: [Answer?], requests: [URLRequest])>

    init(_ lines: [Answer?]) { state = Locked((lines, [])) }

    var requests: [URLRequest] { state.with { $0.requests } }

    var transport: Transport {
        { request, done in
            done(self.state.with { state in
                state.requests.append(request)
                return state.lines.count > 1 ? state.lines.removeFirst() : state.lines[0]
            })
        }
    }
}

/// An app on a phone. Another one with the same folder is its next launch.
final class Phone: Sendable {
    let client: Client
    var outbox: Outbox { client.outbox }
    var folder: URL { outbox.folder }

    init(_ endpoint: String, folder: URL = temporaryFolder(), clock: Clock = Clock(), transport: Transport? = nil,
         isEnabled: Bool? = nil, isKnown: Bool = true) {
        let http = HTTP(sendsInLowDataMode: false)
        client = Client(
            outbox: Outbox(folder: folder, base: Client.base(of: endpoint)!, key: key, clock: clock,
                           transport: transport ?? { http.post($0, $1) }), isEnabled: isEnabled)
        if isKnown { client.identify(vendor: "vendor") }
        outbox.work.sync {}
    }

    func track(_ names: [String]) { names.forEach { client.add(.custom($0, [:])) } }

    /// Sends, and says whether all has gone.
    @discardableResult
    func flush(within seconds: Double = 60) -> Bool {
        let done = DispatchSemaphore(value: 0), result = Locked(false)
        client.flush { isEmpty in
            result.with { $0 = isEmpty }
            done.signal()
        }
        return done.wait(timeout: .now() + seconds) == .success && result.with { $0 }
    }

    var files: [String] { outbox.work.sync { outbox.names() } }

    var contents: [String] {
        files.map { (try? String(contentsOf: folder.appendingPathComponent($0), encoding: .utf8)) ?? "" }
    }
}

/// Looks again until it is so, or the time is over.
func waitUntil(within seconds: Double = 60, _ isSo: () throws -> Bool) rethrows -> Bool {
    let deadline = Date(timeIntervalSinceNow: seconds)
    while Date() < deadline {
        if try isSo() { return true }
        usleep(20_000)
    }
    return false
}

let stored = Answer(status: 201, hasID: true)
func refusal(_ status: Int, _ error: String?, retryAfter: Double? = nil, date: Date? = nil) -> Answer {
    Answer(status: status, error: error, retryAfter: retryAfter, date: date)
}
