// The queue of reports: one file for each request, in a folder of the app. A file's name has a time, a kind and a UUID,
// which is the Idempotency-Key: if the answer is lost or the app is killed, the file is sent again, but stored once.
// Events are collected in one file until it is sent, so a phone that is offline has few files.
import CryptoKit
import Foundation
#if canImport(FoundationNetworking)
import FoundationNetworking
#endif

extension Backfeedr {
    /// Stores the reports of one app until it has sent them to the server.
    actor Client {
        static let maxPending = 2_000, maxErrors = 100, grace = 30.0, tick = 30.0, markAge = 172_800.0
        static let maxFiles = 100, maxBytes = 5_000_000, maxBatch = 100, fullBytes = 256_000, maxBody = 1_000_000
        static let firstPause = 30.0, maxPause = 3_600.0, maxAsked = 86_400.0, maxLeftOut = 10
        static let paths = ["crash": "crashes", "events": "events/batch", "batch": "events/batch",
                            "diagnostics": "diagnostics"]

        nonisolated let folder: URL, now: @Sendable () -> Date, front: Locked<Front>
        private let base: URL, key: String, transport: Transport
        private var batch: (name: String, events: Int, bytes: Int)?  // the file that collects events
        private var sending: Task<Void, Never>?, isWaking = false
        private var failures = 0, pausedAt = Date.distantPast, asked = 0.0, pause = 0.0  // seconds from then on
        private var stumbles: [String: Int] = [:], leftOut = 0
        private var ahead = 0.0, isClockSet = false  // seconds to the server's clock; set once per request

        init(folder: URL, base: URL, key: String, now: @escaping @Sendable () -> Date = { Date() },
             transport: @escaping Transport) {
            (self.folder, self.base, self.key, self.now, self.transport) = (folder, base, key, now, transport)
            front = Locked(Front(isEnabled: Client.isEnabled(in: folder)))
        }

        // MARK: Files

        /// Opens the queue. If two crashes wait, the app may crash at each launch, before anything is sent. So this
        /// waits up to two seconds for the sending, which needs nothing of the calling thread, be it the main one.
        nonisolated func begin(vendor: String?) {
            let crashes = all().filter { ["crash", "diagnostics"].contains(Client.kind($0)) }
            wait(seconds: crashes.count < 2 ? 0 : 2) { await $0.open(vendor: vendor) }
        }

        /// Sends the files that an earlier launch has left. `vendor` is Apple's id of the device; if there is none, an
        /// id in the folder takes its place.
        func open(vendor: String?) async {
            let old = newName("", at: now() - Client.markAge)
            for name in all() where Client.kind(name) == nil && !["off", "installation", "asked"].contains(name) {
                if !Client.isMark(name) || name < old { remove(name) }  // and writes that a kill has interrupted
            }
            let fields = Client.fields(vendor: vendor ?? installation())
            front.with { $0.fields = fields }
            let kept = (try? String(contentsOf: url("asked"), encoding: .utf8))?.split(separator: " ")
            if let times = kept?.compactMap({ Double($0) }), times.count == 2 {
                (pausedAt, asked, pause) = (Date(timeIntervalSinceReferenceDate: times[0]), times[1], times[1])
            }
            await send()
        }

        private func installation() -> String {
            if let known = try? String(contentsOf: url("installation"), encoding: .utf8) { return known }
            let made = UUID().uuidString
            write(Data(made.utf8), "installation")
            return made
        }

        private nonisolated func all() -> [String] {
            (try? FileManager.default.contentsOfDirectory(atPath: folder.path)) ?? []
        }

        /// The waiting files, the oldest first.
        func names() -> [String] { all().filter { Client.kind($0) != nil }.sorted() }

        /// The kind in a name such as 0001773325351250-crash-D2A4F6B8-1357-3ACE-9BDF-2468ACE02468; nil for other files.
        private static func kind(_ name: String) -> String? {
            let parts = name.split(separator: "-", maxSplits: 2).map(String.init)
            return parts.count == 3 && paths[parts[1]] != nil && UUID(uuidString: parts[2]) != nil ? parts[1] : nil
        }

        private nonisolated func newName(_ kind: String, _ id: String = UUID().uuidString, at: Date? = nil) -> String {
            let microseconds = (at ?? now()).timeIntervalSince1970 * 1e6
            return String(format: "%016.0f", max(0, min(microseconds, 9e15))) + "-\(kind)-\(id)"
        }

        private nonisolated func url(_ name: String) -> URL { folder.appendingPathComponent(name) }

        @discardableResult
        private func remove(_ name: String) -> Bool { (try? FileManager.default.removeItem(at: url(name))) != nil }

        private func size(_ name: String) -> Int {
            (try? url(name).resourceValues(forKeys: [.fileSizeKey]))?.fileSize ?? 0
        }

        /// Writes a file atomically. Returns false if that failed.
        @discardableResult
        private nonisolated func write(_ body: Data, _ name: String) -> Bool {
            Client.make(folder)
            return (try? body.write(to: url(name), options: .atomic)) != nil
        }

        /// Makes the folder. Its files can be written while the phone is locked, even if the app protects all others.
        private static func make(_ folder: URL) {
            try? FileManager.default.createDirectory(
                at: folder, withIntermediateDirectories: true,
                attributes: [.protectionKey: FileProtectionType.completeUntilFirstUserAuthentication])
            var place = folder, values = URLResourceValues()
            values.isExcludedFromBackup = true
            try? place.setResourceValues(values)
        }

        /// Writes the reports in memory to files. A full batch is sent at once, others within half a minute.
        func gather() async {
            if drain() { await send() } else if batch != nil { wake() }
        }

        /// Moves reports from memory to the disk, once the device is known. Returns true if a batch is full.
        private func drain() -> Bool {
            let (reports, fields) = front.with { front in
                defer { if !front.fields.isEmpty { front.pending = [] } }
                return (front.fields.isEmpty ? [] : front.pending, front.fields)
            }
            var isFull = false
            for report in reports {
                if let event = report(fields), append(event) { isFull = true }
            }
            return isFull
        }

        /// Adds a line to the batch. Returns true if the batch is full now.
        private func append(_ event: Data) -> Bool {
            if let sent = batch, size(sent.name) == 0 { batch = nil }  // another process of the app has sent it
            if batch == nil { Client.make(folder) }
            var (name, events, bytes) = batch ?? (newName("events"), 0, 0)
            let file = OutputStream(url: url(name), append: true)
            file?.open()
            // The line break comes first, to end a line that a full disk may have cut off.
            _ = file?.write([10] + [UInt8](event), maxLength: event.count + 1)
            file?.close()
            (events, bytes) = (events + 1, bytes + event.count)
            let isFull = events >= Client.maxBatch || bytes >= Client.fullBytes
            batch = isFull ? nil : (name, events, bytes)
            return isFull
        }

        /// The events in a file of lines, without those that were cut off.
        private func events(_ name: String) -> [Data] {
            let lines = (try? Data(contentsOf: url(name)))?.split(separator: 10) ?? []
            return lines.filter { (try? JSONSerialization.jsonObject(with: $0)) != nil }
        }

        /// Deletes the oldest files beyond the limits, and a file that alone is above them.
        private func prune() {
            var files = 0, bytes = 0
            for name in names().reversed() {
                let size = size(name)
                if files == Client.maxFiles || bytes + size > Client.maxBytes { remove(name); continue }
                (files, bytes) = (files + 1, bytes + size)
            }
        }

        /// Stops sending, and deletes all waiting reports.
        func empty() {
            sending?.cancel()
            batch = nil
            for name in all() where !Client.kept.contains(name) { remove(name) }
        }

        /// What stays when sending is off: that it is, and the id, which the user may need to have reports deleted.
        static let kept = ["off", "installation"]

        static func isEnabled(in folder: URL) -> Bool {
            !FileManager.default.fileExists(atPath: folder.appendingPathComponent("off").path)
        }

        static func setEnabled(_ isEnabled: Bool, in folder: URL) {
            let off = folder.appendingPathComponent("off")
            if isEnabled {
                try? FileManager.default.removeItem(at: off)
            } else {
                make(folder)
                try? Data().write(to: off)  // first, and never deleted: it must be off even after a kill
                for name in (try? FileManager.default.contentsOfDirectory(atPath: folder.path)) ?? []
                where !kept.contains(name) { try? FileManager.default.removeItem(at: folder.appendingPathComponent(name)) }
                if Client.isEnabled(in: folder) { try? Data().write(to: off) }  // the disk was full until now
            }
        }

        // MARK: Crashes

        /// Writes the crash report of an exception on the exception's own thread; the next launch sends it. `addresses`
        /// are the return addresses, the innermost first.
        nonisolated func record(exception name: String, reason: String, addresses: [UInt]) {
            let front = front.with { $0 }, pid = Int(ProcessInfo.processInfo.processIdentifier)
            guard front.isEnabled else { return }
            var trimmer = Trimmer(room: 100_000)
            // If the device is not known yet, early in the launch, the report has all fields but its id.
            var crash: [String: Any] = front.fields.isEmpty ? Client.fields(vendor: nil) : front.fields
            crash["exception_type"] = name.isEmpty ? "NSException" : trimmer.text(name)
            crash["exception_reason"] = trimmer.text(reason)
            crash["stack_trace"] = addresses.prefix(512).enumerated().map { Client.frame($0.offset, at: $0.element) }
            crash["occurred_at"] = rfc3339(now())
            crash["session_id"] = front.session
            crash["breadcrumbs"] = front.breadcrumbs.map { trimmer.value($0) }
            crash["pid"] = pid
            guard let body = try? JSONSerialization.data(withJSONObject: crash) else { return }
            if write(body, newName("crash")) { mark(pid) }
            // The events before it. Another thread encodes them: a value's description may need a lock of this one.
            wait(seconds: 1) { await $0.gather() }
        }

        /// Records that the process with this pid ended with an exception that was reported.
        nonisolated func mark(_ pid: Int) { write(Data(), newName("exception", "\(pid)")) }
        private static func isMark(_ name: String) -> Bool { name.contains("-exception-") }

        /// Takes a payload from MetricKit, and sends it.
        func receive(_ payload: Data) async {
            guard front.with({ $0.isEnabled }), let payload = unreported(Client.compact(payload)) else { return }
            let name = newName("diagnostics")
            guard write(payload, name) else { return }
            // A server that refuses a large body may close the connection before its answer is read.
            if payload.count > Client.maxBody, (split(name) ?? 0) > 1 { remove(name) }
            await send()
        }

        /// JSON without its indentation, which is nine tenths of a deep call stack. No text in JSON has a line break.
        private static func compact(_ json: Data) -> Data {
            json.split(separator: 10).reduce(into: Data()) { $0 += $1.drop { $0 == 32 } }
        }

        /// The payload without crashes that were reported as exceptions; nil if nothing else is in it.
        private func unreported(_ payload: Data) -> Data? {
            guard all().contains(where: Client.isMark),
                  var document = (try? JSONSerialization.jsonObject(with: payload)) as? [String: Any]
            else { return payload }
            if document["crashDiagnostic"] != nil, isReported(document["environment"]) { return nil }  // iOS 27
            let crashes = document["crashDiagnostics"] as? [[String: Any]] ?? []
            let others = crashes.filter { !isReported($0["diagnosticMetaData"]) }
            if others.count == crashes.count { return payload }
            document["crashDiagnostics"] = others.isEmpty ? nil : others
            guard document.keys.contains(where: { $0.hasSuffix("Diagnostics") }) else { return nil }
            return try? JSONSerialization.data(withJSONObject: document)
        }

        /// Whether a crash was reported as an exception. Before iOS 17 a crash has no pid, and the next abort is taken
        /// for the exception. A mark is used for one crash only.
        private func isReported(_ metaData: Any?) -> Bool {
            let metaData = metaData as? [String: Any], pid = metaData?["pid"] as? Int
            guard pid != nil || metaData?["signal"] as? Int == 6 else { return false }
            let marks = all().filter { name in Client.isMark(name) && pid.map { name.hasSuffix("-\($0)") } ?? true }
            return marks.min().map { remove($0) } ?? false
        }

        // MARK: Sending

        /// Sends the waiting reports, one request after another. Returns true if none are left. Always waits as long as
        /// the server asked, even across launches; pauses after failures are skipped if the app asks to send.
        @discardableResult
        func send(isAsked: Bool = false) async -> Bool {
            if !front.with({ $0.isEnabled }) { empty() }
            if isAsked { await sending?.value }  // it leaves out what has come since it began
            _ = drain()
            prune()
            let waited = now().timeIntervalSince(pausedAt)  // below 0 if the clock was set back since
            if waited >= 0, waited < (isAsked ? asked : pause) {
                wake()
            } else if sending == nil, !deviceID.isEmpty {
                sending = Task { await sendAll() }
            }
            await sending?.value
            return front.with { $0.pending.isEmpty } && names().isEmpty
        }

        /// Sends again in half a minute.
        private func wake() {
            guard !isWaking else { return }
            isWaking = true
            Task {
                try? await Task.sleep(nanoseconds: UInt64(Client.tick * 1e9))
                isWaking = false
                await send()
            }
        }

        private func sendAll() async {
            let first = batch?.name
            defer {
                sending = nil
                if batch != nil { wake() }
            }
            // A batch that begins meanwhile waits: else requests would follow each other on a slow network.
            while let next = names().filter({ $0 != batch?.name || $0 == first })
                .min(by: { (stumbles[$0] ?? 0, $0) < (stumbles[$1] ?? 0, $1) }) {
                if next == batch?.name { batch = nil }
                let name = closed(next)
                guard await settle(name, post(name)) else { return }
            }
        }

        /// Renames a file of events, so that no process of the app adds an event to a body that may be stored already.
        /// Returns the new name.
        private func closed(_ name: String) -> String {
            let closed = name.replacingOccurrences(of: "-events-", with: "-batch-")
            return (try? FileManager.default.moveItem(at: url(name), to: url(closed))) == nil ? name : closed
        }

        private func post(_ name: String) async -> Answer? {
            guard let kind = Client.kind(name), var body = try? Data(contentsOf: url(name)) else {
                stumbles[name, default: 0] += 1
                return nil
            }
            if Client.paths[kind] == "events/batch" {
                body = Data("{\"events\":[".utf8) + events(name).joined(separator: [44]) + "]}".utf8
            }
            let timestamp = rfc3339(now().addingTimeInterval(ahead))  // for each attempt: valid for five minutes
            var request = URLRequest(url: base.appendingPathComponent(Client.paths[kind] ?? ""))
            request.httpMethod = "POST"
            request.httpBody = body
            request.allHTTPHeaderFields = [
                "Content-Type": "application/json", "X-Backfeedr-Key": key, "X-Backfeedr-Timestamp": timestamp,
                "X-Backfeedr-Signature": Client.signature(key: key, timestamp: timestamp, body: body),
                "X-Backfeedr-Device": deviceID, "Idempotency-Key": String(name.suffix(36))]
            let answer = (try? await transport(request)).map(Answer.init)
            #if DEBUG
            if answer?.hasID != true {
                print("Backfeedr: \(kind):", answer.map { "\($0.status) \($0.error ?? "")" } ?? "no answer")
            }
            #endif
            return answer
        }

        /// Handles an answer. Returns whether to go on with the next file.
        private func settle(_ name: String, _ answer: Answer?) -> Bool {
            switch (answer?.status ?? 0, answer?.error) {
            case (400, let error?) where error.contains(" at index "):
                return leaveOut(error.components(separatedBy: " at index ").last.flatMap(Int.init), of: name) || pause()
            case (200...201, _) where answer?.hasID == true, (400, _?), (413, _), (422, _?):
                (failures, pause, isClockSet) = (0, 0, false)
                guard answer?.status != 413 || split(name) != nil else { return pause() }
                remove(name)  // unless it was, to make room for newer ones
                return !all().contains(name) || pause()  // one that cannot be deleted must not be sent again and again
            case (401, "stale timestamp"):
                guard let date = answer?.date, !isClockSet else { return pause() }
                (ahead, isClockSet) = (date.timeIntervalSince(now()), true)
                return true
            case (429, _), (503, _): return pause(asked: answer?.retryAfter ?? 0)
            case (0..<400, _) where size(name) <= Client.maxBody, (401...402, _), (404, _), (502, _), (504, _):
                return pause()  // a hotel's login page, a wrong key
            default:  // also a body that a firewall forbids, or a large one, whose refusal may not have been read
                stumbles[name, default: 0] += 1  // the other files go first
                return pause()
            }
        }

        /// Writes each diagnostic of a payload into a file of its own, and returns how many there are; nil if the disk
        /// is full. Their keys follow from the payload's: if the app is killed meanwhile, none is stored twice.
        private func split(_ name: String) -> Int? {
            guard Client.kind(name) == "diagnostics", let body = try? Data(contentsOf: url(name)),
                  let payload = (try? JSONSerialization.jsonObject(with: body)) as? [String: Any] else { return 0 }
            let lists = payload.compactMapValues { $0 as? [[String: Any]] }
            let others = payload.filter { lists[$0.key] == nil }, key = UInt16(name.suffix(4), radix: 16) ?? 0
            let parts = lists.sorted { $0.key < $1.key }.flatMap { kind, diagnostics in
                diagnostics.map { others.merging([kind: [$0]]) { $1 } }
            }
            for (index, part) in parts.enumerated() where parts.count > 1 {
                let newKey = String(format: "%04X", key &+ UInt16(truncatingIfNeeded: index + 1))
                guard let body = try? JSONSerialization.data(withJSONObject: part),
                      write(body, name.dropLast(4) + newKey) else { return nil }
            }
            return parts.count
        }

        /// Removes a bad event from its file. The rest keeps its key, because nothing of a refused batch is stored.
        /// Each bad event costs a request, and all phones of an app share a rate limit: so it pauses after ten.
        private func leaveOut(_ index: Int?, of name: String) -> Bool {
            var left = events(name)
            guard let index, left.indices.contains(index) else { return false }
            left.remove(at: index)
            leftOut += 1
            return write(Data(left.joined(separator: [10])), name) && leftOut % Client.maxLeftOut > 0
        }

        /// Waits as long as the server asks, plus a random time: otherwise all phones come back in the same second.
        private func pause(asked seconds: Double = 0) -> Bool {
            (pausedAt, asked) = (now(), min(seconds, Client.maxAsked))
            // For the next launch.
            if asked > 0 { write(Data("\(pausedAt.timeIntervalSinceReferenceDate) \(asked)".utf8), "asked") }
            pause = asked + min(Client.maxPause, Client.firstPause * pow(2, Double(failures))) * .random(in: 0.5...1)
            (failures, isClockSet) = (min(failures + 1, 10), false)
            wake()
            return false
        }

        static func signature(key: String, timestamp: String, body: Data) -> String {
            let text = Data("\(timestamp).\(sha256(body))".utf8), key = SymmetricKey(data: Data(key.utf8))
            return "sha256=" + hex(HMAC<SHA256>.authenticationCode(for: text, using: key))
        }

        static func sha256(_ data: Data) -> String { hex(SHA256.hash(data: data)) }

        private static func hex(_ bytes: some Sequence<UInt8>) -> String {
            bytes.map { String(format: "%02x", $0) }.joined()
        }
    }

    // MARK: The network

    /// Sends a request; throws if there was no complete answer.
    typealias Transport = @Sendable (URLRequest) async throws -> (Data, URLResponse)

    static func http(sendsInLowDataMode: Bool) -> Transport {
        let configuration = URLSessionConfiguration.ephemeral
        configuration.timeoutIntervalForResource = 120
        #if !canImport(FoundationNetworking)  // Linux has no such mode
        configuration.allowsConstrainedNetworkAccess = sendsInLowDataMode
        #endif
        let session = URLSession(configuration: configuration, delegate: NoRedirects(), delegateQueue: nil)
        return { try await session.data(for: $0) }
    }

    /// Follows no redirect: it would give the key away.
    private final class NoRedirects: NSObject, URLSessionTaskDelegate {
        func urlSession(_ session: URLSession, task: URLSessionTask, willPerformHTTPRedirection: HTTPURLResponse,
                        newRequest: URLRequest, completionHandler: @escaping @Sendable (URLRequest?) -> Void) {
            completionHandler(nil)
        }
    }

    /// The relevant parts of an answer. `error` is nil if the answer is not JSON from a backfeedr server.
    struct Answer {
        var status = 0, hasID = false
        var error: String?, retryAfter: Double?, date: Date?

        init(_ body: Data, _ response: URLResponse) {
            let json = (try? JSONSerialization.jsonObject(with: body)) as? [String: Any] ?? [:]
            (hasID, error) = ((json["id"] ?? json["ids"]) != nil, json["error"] as? String)
            guard let response = response as? HTTPURLResponse else { return }
            status = response.statusCode
            retryAfter = response.value(forHTTPHeaderField: "Retry-After").flatMap(UInt32.init).map(Double.init)
            let formatter = DateFormatter()
            formatter.locale = Locale(identifier: "en_US_POSIX")
            formatter.dateFormat = "EEE, dd MMM yyyy HH:mm:ss zzz"
            date = response.value(forHTTPHeaderField: "Date").flatMap(formatter.date)
        }
    }
}
