// What waits for the server: one file a request, in a folder of the app, and how it gets there. A file's name has the
// time (oldest first), what it is, and a UUID, which is its Idempotency-Key: sent again after a lost answer or a kill,
// it is stored once. Events gather in a file of lines until it is sent, so a phone that is offline has few files.
import Foundation
#if canImport(FoundationNetworking)
import FoundationNetworking
#endif

extension Backfeedr {
    /// What a file holds; the name is a part of its file's name.
    enum Kind: String, CaseIterable {
        case crash, events, diagnostics

        var path: String {
            switch self {
            case .crash: return "/crashes"
            case .events: return "/events/batch"
            case .diagnostics: return "/diagnostics"
            }
        }
    }

    /// A server's answer, as far as it matters. `error` is nil where the answer is no JSON of a backfeedr server.
    struct Answer: Sendable {
        var status = 0, hasID = false
        var error: String?
        var retryAfter: Double?
        var date: Date?

        /// What tells a developer why a report was not stored.
        var summary: String { "\(status): \(error ?? "not an answer of a backfeedr server")" }
    }

    /// What an answer means for the file that was sent.
    enum Outcome: Equatable {
        case stored, refused             // it is done with
        case leaveOut(Int)               // of a batch, this event is bad
        case signAgain(Date)             // the phone's clock is wrong; that is the server's
        case wait(seconds: Double)       // the server asked for it
        case pause                       // no answer, or one that concerns all files: try again later
        case later                       // this file waits for the next launch

        init(_ answer: Answer?, of kind: Kind) {
            switch (answer?.status ?? 0, answer?.error) {
            case (200...201, _) where answer?.hasID == true: self = .stored
            case (413, _): self = .refused
            case (400, let error?):
                self = kind == .events ? Outcome.indexAtEnd(of: error).map(Outcome.leaveOut) ?? .refused : .refused
            case (422, _?): self = .refused
            case (401, "stale timestamp"): self = answer?.date.map(Outcome.signAgain) ?? .pause
            case (429, _), (503, _): self = .wait(seconds: answer?.retryAfter ?? 0)
            case (0..<400, _), (401...404, _), (502, _), (504, _): self = .pause  // a hotel's login page, a wrong key
            default: self = .later
            }
        }

        private static func indexAtEnd(of error: String) -> Int? {
            let words = error.components(separatedBy: " at index ")
            return words.count == 2 ? Int(words[1]) : nil
        }
    }

    /// The two clocks of a phone: the time of day, which may be wrong or change, and one that only goes on, in seconds.
    struct Clock: Sendable {
        var now: @Sendable () -> Date = { Date() }
        var uptime: @Sendable () -> Double = { Double(DispatchTime.now().uptimeNanoseconds) / 1e9 }
    }

    typealias Transport = @Sendable (URLRequest, @escaping @Sendable (Answer?) -> Void) -> Void

    /// The files and their way to the server. But for `add` and `markException`, use it on `work` only.
    final class Outbox: @unchecked Sendable {
        static let maxFiles = 100, maxBytes = 5_000_000, maxBatch = 100, maxBatchBytes = 256_000
        static let firstPause = 30.0, maxPause = 3600.0, maxRefusals = 10, maxAsked = 86_400.0

        let folder: URL
        let work = DispatchQueue(label: "backfeedr", qos: .utility, autoreleaseFrequency: .workItem)
        var deviceID = "", isOff = false
        let clock: Clock
        private let base: URL, key: String, transport: Transport
        private var gathered = 0, gatheredBytes = 0   // events in the file of lines, and its size
        private var skipped: Set<String> = [], refusals: [String: Int] = [:]
        private var isSending = false, waiting: [@Sendable (Bool) -> Void] = []
        private var askedUntil = 0.0, pausedUntil = 0.0, wakeAt = Double.infinity  // on the clock's uptime
        private var failures = 0
        private var ahead = 0.0                       // seconds by which the server's clock is ahead of the phone's

        init(folder: URL, base: URL, key: String, clock: Clock = Clock(), transport: @escaping Transport) {
            (self.folder, self.base, self.key, self.clock, self.transport) = (folder, base, key, clock, transport)
        }

        private var lines: URL { folder.appendingPathComponent("gathering.jsonl") }
        private func url(_ name: String) -> URL { folder.appendingPathComponent(name) }

        // MARK: Files

        /// Makes the folder, and takes what an earlier launch has left.
        func open() {
            try? FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
            var place = folder, values = URLResourceValues()
            values.isExcludedFromBackup = true
            try? place.setResourceValues(values)
            seal()
            acceptPayloads()
        }

        private func all() -> [String] { (try? FileManager.default.contentsOfDirectory(atPath: folder.path)) ?? [] }

        /// The files that wait, the oldest first.
        func names() -> [String] {
            all().filter { Outbox.kind($0) != nil }.sorted()
        }

        /// The kind in a name such as 0001773325351250-crash-D2A4F6B8-1357-3ACE-9BDF-2468ACE02468; nil for other files.
        static func kind(_ name: String) -> Kind? {
            let parts = name.split(separator: "-", maxSplits: 2)
            guard parts.count == 3, UUID(uuidString: String(parts[2])) != nil else { return nil }
            return Kind(rawValue: String(parts[1]))
        }

        private static func newName(_ kind: Kind, at date: Date) -> String {
            let microseconds = String(Int(max(0, min(date.timeIntervalSince1970 * 1e6, 9e15))))
            return String(repeating: "0", count: 16 - microseconds.count) + "\(microseconds)-\(kind)-\(UUID())"
        }

        /// Writes a request's body to the disk, from any thread; says whether the disk took it. A payload of MetricKit
        /// is not sent before `acceptPayloads`.
        func add(_ kind: Kind, _ body: Data) -> Bool {
            let name = Outbox.newName(kind, at: clock.now()) + (kind == .diagnostics ? Outbox.new : "")
            do { try body.write(to: url(name), options: .atomic) } catch { return false }
            return true
        }

        private static let new = ".new"

        /// Makes requests of new payloads, without the crashes that were reported already.
        func acceptPayloads() {
            for mark in marks() where !isFresh(mark.at) { remove(mark.name) }
            for name in all() where name.hasSuffix(Outbox.new) {
                dropReported(name)
                try? FileManager.default.moveItem(at: url(name), to: url(String(name.dropLast(Outbox.new.count))))
            }
            prune()
        }

        func remove(_ name: String) { try? FileManager.default.removeItem(at: url(name)) }

        /// Replaces what a file holds, if it is still there.
        func rewrite(_ name: String, _ body: Data) {
            guard FileManager.default.fileExists(atPath: url(name).path) else { return }
            try? body.write(to: url(name), options: .atomic)
        }

        /// Adds events, each a line of JSON. True where a batch is full, and so worth a request.
        func gather(_ events: some Sequence<Data>) -> Bool {
            var chunk = Data(), isFull = false
            for event in events {
                if gathered >= Outbox.maxBatch || gathered > 0 && gatheredBytes + event.count > Outbox.maxBatchBytes {
                    write(chunk)
                    chunk = Data()
                    seal()
                    isFull = true
                    if gathered > 0 { break }  // the disk does not let it go, so there is no place for more
                }
                chunk += event + [10]
                gathered += 1
                gatheredBytes += event.count + 1
            }
            write(chunk)
            return isFull || gathered >= Outbox.maxBatch
        }

        /// Appends lines. Of a write that fails, as on a full disk, nothing stays, so that later lines stand by
        /// themselves.
        private func write(_ chunk: Data) {
            if chunk.isEmpty { return }
            if !FileManager.default.fileExists(atPath: lines.path) {
                _ = FileManager.default.createFile(atPath: lines.path, contents: nil)
            }
            guard let file = try? FileHandle(forWritingTo: lines) else { return }
            defer { try? file.close() }
            guard let end = try? file.seekToEnd() else { return }
            do { try file.write(contentsOf: chunk) } catch { try? file.truncate(atOffset: end) }
        }

        /// Makes a request of the events so far, and lets the oldest files go where there are too many.
        func seal() {
            try? FileManager.default.moveItem(at: lines, to: url(Outbox.newName(.events, at: clock.now())))
            // What the disk does not let go counts as full, or it would grow without bound.
            gathered = FileManager.default.fileExists(atPath: lines.path) ? Outbox.maxBatch : 0
            gatheredBytes = 0
            prune()
        }

        /// Keeps the newest files, as many as the bounds allow.
        func prune() {
            var files = 0, bytes = 0
            for name in names().reversed() {
                files += 1
                bytes += (try? url(name).resourceValues(forKeys: [.fileSizeKey]))?.fileSize ?? 0
                if files > Outbox.maxFiles || bytes > Outbox.maxBytes { remove(name) }
            }
        }

        /// Deletes all that waits.
        func empty() {
            (gathered, gatheredBytes) = (0, 0)
            let waiting = all().filter { Outbox.kind($0) != nil || $0.hasSuffix(Outbox.new) }
            for name in waiting + marks().map({ $0.name }) + [lines.lastPathComponent] { remove(name) }
        }

        var isEmpty: Bool { names().isEmpty && !FileManager.default.fileExists(atPath: lines.path) }

        // MARK: Exceptions that MetricKit will tell of, too

        /// Notes that the process with this pid ended by an exception that was reported, from any thread.
        func markException(pid: Int) {
            let milliseconds = Int(max(0, clock.now().timeIntervalSince1970) * 1000)
            try? Data().write(to: url("exception-\(milliseconds)-\(pid)"))
        }

        private func marks() -> [(name: String, at: Double, pid: Int)] {
            all().compactMap { name in
                let parts = name.split(separator: "-").map(String.init)
                guard parts.count == 3, parts[0] == "exception", let at = Double(parts[1]), let pid = Int(parts[2])
                else { return nil }
                return (name, at / 1000, pid)
            }.sorted { $0.at < $1.at }
        }

        private func isFresh(_ at: Double) -> Bool { abs(clock.now().timeIntervalSince1970 - at) < 172_800 }

        /// Takes crashes out of a payload that were reported as exceptions. Only iOS 17 and later tell a pid; before,
        /// the report comes at the next launch, so an abort is the exception's. A mark is good for one crash and two
        /// days.
        func dropReported(_ name: String) {
            let fresh = marks().filter { isFresh($0.at) }
            guard !fresh.isEmpty, let data = try? Data(contentsOf: url(name)) else { return }
            guard var payload = (try? JSONSerialization.jsonObject(with: data)) as? [String: Any] else {
                if Outbox.isDeepCrash(data, ofOneOf: fresh.map { $0.pid }) { remove(name) }
                return
            }
            var left = fresh
            func isReported(_ metaData: Any?) -> Bool {
                let given = metaData as? [String: Any], pid = given?["pid"] as? Int
                let isAbort = given?["signal"] as? Int == 6
                let mark = left.firstIndex { mark in pid.map { $0 == mark.pid } ?? isAbort }
                if let mark { remove(left.remove(at: mark).name) }
                return mark != nil
            }
            if payload["crashDiagnostic"] != nil, isReported(payload["environment"]) { return remove(name) }  // iOS 27
            guard let crashes = payload["crashDiagnostics"] as? [[String: Any]] else { return }
            let others = crashes.filter { !isReported($0["diagnosticMetaData"]) }
            payload["crashDiagnostics"] = others.isEmpty ? nil : others
            guard others.count < crashes.count else { return }
            guard payload.keys.contains(where: { $0.hasSuffix("Diagnostics") }) else { return remove(name) }
            if let rest = try? JSONSerialization.data(withJSONObject: payload) { rewrite(name, rest) }
        }

        /// Whether a payload that is too deep for JSONSerialization (some 250 frames) is of one crash, and of these.
        private static func isDeepCrash(_ data: Data, ofOneOf pids: [Int]) -> Bool {
            let text = String(decoding: data, as: UTF8.self)
            guard text.components(separatedBy: "\"diagnosticMetaData\"").count == 2 else { return false }
            return pids.contains { text.range(of: "\"pid\" *: *\($0)\\b", options: .regularExpression) != nil }
        }

        // MARK: Sending

        /// Sends what waits, one request after another, and then calls `done` with whether nothing waits any more. Does
        /// not send before the server's time is up; where `isAsked`, it does not mind the pauses after failures.
        func send(isAsked: Bool = false, _ done: (@Sendable (Bool) -> Void)? = nil) {
            if let done { waiting.append(done) }
            guard !isSending else { return }
            let now = clock.uptime()
            guard !isOff, !deviceID.isEmpty else { return finish() }
            guard now >= askedUntil, isAsked || now >= pausedUntil else {
                wake(after: pausedUntil - now)
                return finish()
            }
            isSending = true
            sendNext()
        }

        /// Sends after some seconds, unless something does so sooner.
        func wake(after seconds: Double) {
            let at = clock.uptime() + seconds
            guard at < wakeAt else { return }
            wakeAt = at
            work.asyncAfter(deadline: .now() + seconds) { [weak self] in
                self?.wakeAt = .infinity
                self?.send()
            }
        }

        private func finish() {
            isSending = false
            let told = waiting, isDone = isOff || isEmpty && !deviceID.isEmpty  // before, reports wait in memory
            waiting = []
            told.forEach { $0(isDone) }
        }

        private func sendNext() {
            func next() -> String? { names().first { !skipped.contains($0) } }
            if next() == nil { seal() }  // not before: while the server is out of reach, events gather in one file
            guard !isOff, let name = next(), let kind = Outbox.kind(name) else { return finish() }
            guard var body = try? Data(contentsOf: url(name)) else { return skip(name) }  // the phone is still locked
            if kind == .events {
                let list = events(in: body)
                body = Data("{\"events\":[".utf8) + list.joined(separator: [44]) + Data("]}".utf8)
                if list.isEmpty { return settle(name, .refused) }
            }
            post(name, kind, body, isSignedAgain: false)
        }

        /// The events in a file of lines. One that is cut off, as by a kill, is left out.
        private func events(in data: Data) -> [Data] {
            data.split(separator: 10).filter { (try? JSONSerialization.jsonObject(with: Data($0))) is [String: Any] }
        }

        private func post(_ name: String, _ kind: Kind, _ body: Data, isSignedAgain: Bool) {
            var request = URLRequest(url: URL(string: base.absoluteString + kind.path) ?? base)
            let timestamp = rfc3339(clock.now().addingTimeInterval(ahead))  // each time: it is good for five minutes
            request.httpMethod = "POST"
            request.httpBody = body
            for (field, value) in [
                "Content-Type": "application/json", "X-Backfeedr-Key": key, "X-Backfeedr-Timestamp": timestamp,
                "X-Backfeedr-Signature": Outbox.signature(key: key, timestamp: timestamp, body: body),
                "Idempotency-Key": String(name.suffix(36)), "X-Backfeedr-Device": kind == .diagnostics ? deviceID : nil,
            ] { request.setValue(value, forHTTPHeaderField: field) }
            transport(request) { [weak self] answer in
                guard let self else { return }
                self.work.async {
                    let outcome = Outcome(answer, of: kind)
                    #if DEBUG
                    if outcome != .stored { print("Backfeedr: \(kind) got", answer?.summary ?? "no answer") }
                    #endif
                    guard case .signAgain(let date) = outcome, !isSignedAgain else { return self.settle(name, outcome) }
                    self.ahead = date.timeIntervalSince(self.clock.now())
                    self.post(name, kind, body, isSignedAgain: true)
                }
            }
        }

        static func signature(key: String, timestamp: String, body: Data) -> String {
            "sha256=" + Digest.hmac(key: key, timestamp + "." + Digest.sha256(body))
        }

        private func settle(_ name: String, _ outcome: Outcome) {
            switch outcome {
            case .stored, .refused:
                (failures, pausedUntil) = (0, 0)  // the server is there again
                remove(name)
                skip(name)  // where the disk refuses that, it is not sent without end
            case .leaveOut(let index): leaveOut(index, of: name)
            case .later: skip(name)
            case .wait(let seconds): pause(asked: min(seconds, Outbox.maxAsked))
            case .pause, .signAgain: pause(asked: 0)
            }
        }

        private func skip(_ name: String) {
            if FileManager.default.fileExists(atPath: url(name).path) { skipped.insert(name) }
            sendNext()
        }

        /// The rest goes under the same key: of a request that is refused, nothing is stored. Each bad event costs a
        /// request, of which all phones of an app share so many; so a file with many of them waits in between.
        private func leaveOut(_ index: Int, of name: String) {
            guard let data = try? Data(contentsOf: url(name)), !isOff else { return sendNext() }
            var left = events(in: data)
            guard left.indices.contains(index) else { return skip(name) }
            left.remove(at: index)
            rewrite(name, Data(left.joined(separator: [10])))
            refusals[name, default: 0] += 1
            if refusals[name] == Outbox.maxRefusals { skip(name) } else { sendNext() }
        }

        /// Waits as long as the server asks for, and a random while longer, or all phones come back in the same second.
        private func pause(asked: Double) {
            let pause = min(Outbox.maxPause, Outbox.firstPause * pow(2, Double(failures))) * .random(in: 0.5...1)
            failures = min(failures + 1, 10)
            askedUntil = clock.uptime() + asked
            pausedUntil = askedUntil + pause
            isSending = false
            send()  // which waits
        }
    }

    /// Sends requests with URLSession. It follows no redirect, which would carry the key away, and keeps no cookie, no
    /// cache and no long answer.
    final class HTTP: NSObject, URLSessionDataDelegate, @unchecked Sendable {
        private let pending = Locked<[Int: (received: Data, done: @Sendable (Answer?) -> Void)]>([:])
        private let configuration: URLSessionConfiguration

        init(sendsInLowDataMode: Bool) {
            configuration = .ephemeral
            configuration.timeoutIntervalForRequest = 30
            configuration.timeoutIntervalForResource = 120
            configuration.httpShouldSetCookies = false
            configuration.urlCache = nil
            #if !canImport(FoundationNetworking)  // Linux has no such mode
            configuration.allowsConstrainedNetworkAccess = sendsInLowDataMode
            #endif
        }

        private lazy var session = URLSession(configuration: configuration, delegate: self, delegateQueue: nil)

        /// Calls `done` once, on any thread, with nil where there was no complete answer.
        func post(_ request: URLRequest, _ done: @escaping @Sendable (Answer?) -> Void) {
            let task = session.dataTask(with: request)
            pending.with { $0[task.taskIdentifier] = (Data(), done) }
            task.resume()
        }

        func urlSession(_ session: URLSession, task: URLSessionTask, willPerformHTTPRedirection: HTTPURLResponse,
                        newRequest: URLRequest, completionHandler: @escaping @Sendable (URLRequest?) -> Void) {
            completionHandler(nil)
        }

        func urlSession(_ session: URLSession, dataTask: URLSessionDataTask, didReceive data: Data) {
            let length = pending.with { all in
                all[dataTask.taskIdentifier]?.received.append(data)
                return all[dataTask.taskIdentifier]?.received.count ?? 0
            }
            if length > 100_000 { dataTask.cancel() }
        }

        func urlSession(_ session: URLSession, task: URLSessionTask, didCompleteWithError error: (any Error)?) {
            guard let (received, done) = pending.with({ $0.removeValue(forKey: task.taskIdentifier) }) else { return }
            let response = task.response as? HTTPURLResponse
            done(error == nil ? response.map { HTTP.answer($0, received) } : nil)
        }

        private static func answer(_ response: HTTPURLResponse, _ body: Data) -> Answer {
            let json = (try? JSONSerialization.jsonObject(with: body)) as? [String: Any] ?? [:]
            return Answer(
                status: response.statusCode, hasID: (json["id"] ?? json["ids"]) != nil, error: json["error"] as? String,
                retryAfter: response.value(forHTTPHeaderField: "Retry-After").flatMap(UInt32.init).map(Double.init),
                date: response.value(forHTTPHeaderField: "Date").flatMap(HTTP.date))
        }

        private static func date(_ text: String) -> Date? {
            let formatter = DateFormatter()
            formatter.locale = Locale(identifier: "en_US_POSIX")
            formatter.dateFormat = "EEE, dd MMM yyyy HH:mm:ss zzz"
            return formatter.date(from: text)
        }
    }
}
