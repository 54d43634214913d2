// The real server, and phones that send to it.
import Foundation
import XCTest
@testable import Backfeedr
#if canImport(FoundationNetworking)
import FoundationNetworking
#endif

typealias Client = Backfeedr.Client
typealias Locked = Backfeedr.Locked
typealias Transport = Backfeedr.Transport

let key = "bf_live_0123456789abcdef0123456789abcdef"
let package = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
    .deletingLastPathComponent()
let examples = package.deletingLastPathComponent()
let python = ProcessInfo.processInfo.environment["BACKFEEDR_PYTHON"] ?? "python3"

/// Starts a program with its output connected to the pipe.
func started(_ words: [String], _ environment: [String: String] = [:]) throws -> (Process, Pipe) {
    let process = Process(), pipe = Pipe()
    process.executableURL = URL(fileURLWithPath: "/usr/bin/env")
    process.arguments = words
    let inherited = ProcessInfo.processInfo.environment.filter { !$0.key.hasPrefix("BACKFEEDR_") }
    process.environment = inherited.merging(environment) { $1 }
    process.standardOutput = pipe
    process.standardInput = FileHandle.nullDevice
    try process.run()
    return (process, pipe)
}

/// Runs a program to its end. Returns its status and output.
func runProgram(_ words: [String], _ environment: [String: String] = [:]) throws -> (status: Int32, output: String) {
    let (process, pipe) = try started(words, environment)
    let output = pipe.fileHandleForReading.readDataToEndOfFile()
    process.waitUntilExit()
    return (process.terminationStatus, String(decoding: output, as: UTF8.self))
}

/// Reads the next line of a program's output; fails if the program has ended.
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
final class Server: @unchecked Sendable {
    /// The server for tests that do not stop it: each looks only at the reports of its own phone.
    static let shared: Server = {
        atexit { _ = Server.shared.process.map { Foundation.kill($0.processIdentifier, SIGKILL) } }
        return try! Server()
    }()

    private let database = temporaryFolder().appendingPathComponent("backfeedr.db").path
    private var port = 0
    private var process: Process?

    init(rateLimit: Int = 0) throws { try start(rateLimit: rateLimit) }

    deinit { kill() }

    var endpoint: String { "http://127.0.0.1:\(port)" }

    func start(rateLimit: Int = 0) throws {
        let program = examples.deletingLastPathComponent().appendingPathComponent("backfeedr.py").path
        let (process, pipe) = try started([python, program, "--port", "\(port)", "--db", database], [
            "BACKFEEDR_API_KEY": key, "BACKFEEDR_AUTH_TOKEN": "bf_admin_0123456789", "PYTHONUNBUFFERED": "1",
            "BACKFEEDR_RATE_LIMIT": "\(rateLimit)", "BACKFEEDR_REQUIRE_SIGNATURE": "1"])
        self.process = process
        let line = try firstLine(of: pipe)
        port = try XCTUnwrap(Int(line.split(separator: ":").last ?? ""), line)
    }

    /// Kills it, like a power cut.
    func kill() {
        guard let process else { return }
        _ = Foundation.kill(process.processIdentifier, SIGKILL)
        process.waitUntilExit()
        self.process = nil
    }

    /// The rows of a query on the reports of one device, each as text with | between the values.
    func rows(_ device: String, _ sql: String) throws -> [String] {
        let program = """
            import sqlite3, sys
            database = sqlite3.connect(sys.argv[1])
            for table in ("events", "crashes"):
                database.execute("create temp view %s as select * from main.%s where device_id_hash = '%s'"
                                 % (table, table, sys.argv[2]))
            for row in database.execute(sys.argv[3]):
                print(*row, sep="|")
            """
        let (status, output) = try runProgram([python, "-c", program, database, device, sql])
        XCTAssertEqual(status, 0, output)
        return output.split(separator: "\n").map(String.init)
    }
}

/// The folder of all tests. It is removed when they end.
private let folderOfTests: URL = {
    atexit { try? FileManager.default.removeItem(at: folderOfTests) }
    return FileManager.default.temporaryDirectory.appendingPathComponent("backfeedr-\(UUID())")
}()

func temporaryFolder() -> URL {
    let folder = folderOfTests.appendingPathComponent("\(UUID())")
    try? FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    return folder
}

/// A clock that a test moves.
final class ManualClock: Sendable {
    private let at: Locked<Date>

    init(ahead: Double = 0) { at = Locked(Date() + ahead) }

    func move(_ seconds: Double) { at.with { $0 += seconds } }

    var now: Date { at.with { $0 } }
}

/// A server's answer, made by a test.
struct Reply: Sendable {
    static let stored = Reply(201, #"{"id": "1"}"#)

    var status: Int, body: String, headers: [String: String] = [:]

    init(_ status: Int, _ body: String = "") { (self.status, self.body) = (status, body) }

    init(_ status: Int, error: String, _ headers: [String: String] = [:]) {
        (self.status, self.body, self.headers) = (status, #"{"error": "\#(error)"}"#, headers)
    }
}

/// Gives the answers of a script, repeating the last; nil is a lost answer. Records the requests.
final class Script: Sendable {
    private let state: Locked<(lines: [Reply?], requests: [URLRequest])>

    init(_ lines: Reply?...) { state = Locked((lines, [])) }

    var requests: [URLRequest] { state.with { $0.requests } }
    var bodies: [String] { requests.map { String(decoding: $0.httpBody ?? Data(), as: UTF8.self) } }

    /// The events of the last request.
    func events() throws -> [[String: Any]] {
        let body = try JSONSerialization.jsonObject(with: XCTUnwrap(requests.last?.httpBody)) as? [String: Any]
        return try XCTUnwrap(body?["events"] as? [[String: Any]])
    }

    var transport: Transport {
        { request in
            let reply = self.state.with { state in
                state.requests.append(request)
                return state.lines.count > 1 ? state.lines.removeFirst() : state.lines[0]
            }
            guard let reply else { throw URLError(.networkConnectionLost) }
            return (Data(reply.body.utf8), HTTPURLResponse(
                url: request.url!, statusCode: reply.status, httpVersion: nil, headerFields: reply.headers)!)
        }
    }
}

/// An app on a phone; the public calls of `Backfeedr` use the current one. Another with the same folder and vendor is
/// its next launch.
final class Phone: Sendable {
    let client: Client, vendor: String
    var folder: URL { client.folder }

    init(_ endpoint: String = "http://h", after earlier: Phone? = nil, folder: URL? = nil, clock: ManualClock? = nil,
         transport: Transport? = nil, vendor: String = UUID().uuidString, isKnown: Bool = true) async {
        self.vendor = earlier?.vendor ?? vendor
        let folder = folder ?? earlier?.folder ?? temporaryFolder()
        client = Client(folder: folder, base: Client.base(of: endpoint)!, key: key, now: { clock?.now ?? Date() },
                        transport: transport ?? Backfeedr.http(sendsInLowDataMode: false))
        Backfeedr.running.with { $0 = client }
        if isKnown { await client.open(vendor: self.vendor) }
    }

    func track(_ names: [String]) {
        Backfeedr.running.with { $0 = client }
        names.forEach { Backfeedr.track($0) }
    }

    /// Sends, and returns whether nothing is left.
    @discardableResult
    func flush() async -> Bool { await client.send(isAsked: true) }

    func receive(_ payload: String) async { await client.receive(Data(payload.utf8)) }

    var all: [String] { ((try? FileManager.default.contentsOfDirectory(atPath: folder.path)) ?? []).sorted() }
    var files: [String] { get async { await client.names() } }

    func url(_ name: String) -> URL { folder.appendingPathComponent(name) }

    var contents: [String] {
        get async { await files.map { (try? String(contentsOf: url($0), encoding: .utf8)) ?? "" } }
    }

    var device: String { Client.fields(vendor: vendor)["device_id_hash"] ?? "" }

    /// The rows of a query on the reports of this phone.
    func rows(_ sql: String, _ server: Server = .shared) throws -> [String] { try server.rows(device, sql) }
}

/// Waits until the condition is true, or a minute is over.
func waitUntil(_ isSo: () async throws -> Bool) async rethrows -> Bool {
    let deadline = Date(timeIntervalSinceNow: 60)
    while Date() < deadline {
        if try await isSo() { return true }
        try? await Task.sleep(nanoseconds: 5_000_000)
    }
    return false
}

// XCTest's own assertions do not accept `await`.
func equal<Value: Equatable>(_ given: Value, _ expected: Value, _ message: String = "", line: UInt = #line) {
    XCTAssertEqual(given, expected, message, line: line)
}

func check(_ isSo: Bool, _ message: String = "", line: UInt = #line) { XCTAssertTrue(isSo, message, line: line) }
