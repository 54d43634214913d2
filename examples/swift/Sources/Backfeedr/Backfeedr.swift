// Crash reports, sessions and events of your app, on your own server. Call `Backfeedr.start` in the `init` of the App;
// all else may be called from any thread, at any time, with any value. A call appends to a list in memory; encoding,
// files and requests come later, on a queue of their own. Nothing here throws, and nothing is sent when disabled.
import Foundation

/// Reports of an app to a backfeedr server.
public enum Backfeedr {
    private static let running = Locked<(client: Client?, isEnabled: Bool?)>((nil, nil))

    static var client: Client? { running.with { $0.client } }

    /// Begins to report, once; a second call changes nothing. Call it in the `init` of the App.
    ///
    /// `endpoint` is where the server is mounted, such as https://crashes.example.com, with or without /api/v1. While
    /// the phone is in Low Data Mode, reports wait on the disk, unless `sendsInLowDataMode`. Returns false where the
    /// endpoint is no http(s) address or the key is empty or has a control character: then nothing is reported.
    @discardableResult
    public static func start(endpoint: String, key: String, sendsInLowDataMode: Bool = false) -> Bool {
        guard let base = Client.base(of: endpoint), Client.isKey(key) else { return false }
        let started: Client? = running.with { running in
            guard running.client == nil else { return nil }
            let http = HTTP(sendsInLowDataMode: sendsInLowDataMode)
            let outbox = Outbox(folder: Client.folder, base: base, key: key) { http.post($0, $1) }
            running.client = Client(outbox: outbox, isEnabled: running.isEnabled)
            return running.client
        }
        started?.followApp()
        return true
    }

    /// Reports that something happened. Properties are what JSON holds, dates, and texts of anything else; they are
    /// cut at some 20 kB. Before `start` it does nothing. The same holds for the other calls.
    public static func track(_ name: String, properties: [String: any Sendable] = [:]) {
        client?.add(.custom(name, properties))
    }

    /// Reports an error that the app has caught, with its type, its description, the place in the source, the
    /// breadcrumbs, and what you add as context. Of a URL in the description neither query nor password is sent. Keep
    /// names and paths of people out of the rest.
    public static func capture(_ error: any Error, context: [String: any Sendable] = [:],
                               file: String = #fileID, line: Int = #line) {
        client?.capture(error, context, "\(file):\(line)")
    }

    /// Notes a step of the app. The last 50, each cut at 200 characters, are sent with a crash or an error.
    public static func breadcrumb(_ text: String) { client?.breadcrumb(text) }

    /// Whether it reports. False deletes what waits, and stays across launches; it may be set before `start`.
    public static var isEnabled: Bool {
        get {
            let (client, isEnabled) = running.with { $0 }
            return client?.isEnabled ?? isEnabled ?? !FileManager.default.fileExists(atPath: Client.offSwitch.path)
        }
        set {
            let client = running.with { running in
                running.isEnabled = newValue
                return running.client
            }
            client?.setEnabled(newValue)
        }
    }

    /// What the server calls this device: a digest of the vendor's identifier and the app's. Let users read it out to
    /// support, who can show or forget what is stored of it. "" before `start` and for a moment after.
    public static var deviceID: String { client?.deviceID ?? "" }

    /// Sends what waits now, unless the server has asked for patience. `done` is called on another thread, with
    /// whether nothing waits any more.
    public static func flush(_ done: (@Sendable (Bool) -> Void)? = nil) {
        if let client { client.flush(done) } else { done?(true) }
    }
}

extension Backfeedr {
    /// A step of the app, as the user of a phone took it.
    struct Breadcrumb: Sendable {
        var at: Date, text: String
    }

    /// What a caller reported, before it is encoded.
    struct Report: Sendable {
        enum Kind: Sendable {
            case sessionStart, sessionEnd
            case custom(String, [String: any Sendable])
            case error(any Error, [String: any Sendable], place: String, [Breadcrumb])
        }

        var kind: Kind, at: Date, session: String
    }

    /// What callers write to and the queue reads. All threads share it, so it is held for moments only.
    private struct Front {
        var pending: [Report] = [], isDraining = false
        var breadcrumbs: [Breadcrumb] = []
        var session = "", leftAt: Date?       // the session's id, and since when the app is in the background
        var isEnabled: Bool?                  // nil: the disk was not asked yet
        var fields: [String: String] = [:]    // of the device and the app, with each report; empty until they are known
    }

    /// One app's reports: takes them from callers, and hands them to the outbox.
    final class Client: Sendable {
        static let maxPending = 2_000, maxBreadcrumbs = 50, grace = 30.0, sendDelay = 30.0

        let outbox: Outbox
        private let front = Locked(Front())

        init(outbox: Outbox, isEnabled: Bool? = nil) {
            self.outbox = outbox
            front.with { $0.isEnabled = isEnabled }
            outbox.work.async { [self] in
                outbox.open()
                let isOff = FileManager.default.fileExists(atPath: offSwitch.path)
                let isEnabled = front.with { front in
                    front.isEnabled = front.isEnabled ?? !isOff
                    return front.isEnabled == true
                }
                apply(isEnabled)
            }
        }

        // MARK: What callers call

        func add(_ kind: Report.Kind) {
            let at = outbox.clock.now()
            let starts = front.with { front in
                append(Report(kind: kind, at: at, session: front.session), to: &front)
            }
            if starts { outbox.work.async { self.drain() } }
        }

        func capture(_ error: any Error, _ context: [String: any Sendable], _ place: String) {
            add(.error(error, context, place: place, front.with { $0.breadcrumbs }))
        }

        func breadcrumb(_ text: String) {
            let cut = text.utf8.count > 200 ? String(text.unicodeScalars.prefix(200)) : text
            let crumb = Breadcrumb(at: outbox.clock.now(), text: cut)
            front.with { front in
                guard front.isEnabled != false else { return }
                if front.breadcrumbs.count == Client.maxBreadcrumbs { front.breadcrumbs.removeFirst() }
                front.breadcrumbs.append(crumb)
            }
        }

        var isEnabled: Bool? { front.with { $0.isEnabled } }
        var deviceID: String { front.with { $0.fields["device_id_hash"] ?? "" } }

        func setEnabled(_ isEnabled: Bool) {
            front.with { front in
                front.isEnabled = isEnabled
                if !isEnabled { (front.pending, front.breadcrumbs) = ([], []) }
            }
            outbox.work.async { self.apply(self.isEnabled ?? true) }  // the last of several calls counts
        }

        func flush(_ done: (@Sendable (Bool) -> Void)? = nil) {
            outbox.work.async {
                self.drain()
                self.outbox.send(isAsked: true, done)
            }
        }

        /// The app came to the front: a session begins, or goes on after less than 30 seconds.
        func becameActive() {
            let at = outbox.clock.now()
            let starts = front.with { front in
                let isBack = front.leftAt.map { abs(at.timeIntervalSince($0)) < Client.grace } ?? true
                front.leftAt = nil
                guard front.session.isEmpty || !isBack else { return false }
                front.session = UUID().uuidString
                return append(Report(kind: .sessionStart, at: at, session: front.session), to: &front)
            }
            outbox.work.async {
                self.outbox.send()  // what is left from before; the session's start goes with its first events
                if starts { self.drain() }
            }
        }

        /// The app left the front. The session ends with its last end, so that one that goes on ends again, later.
        func wentToBackground() {
            front.with { $0.leftAt = outbox.clock.now() }
            add(.sessionEnd)
            outbox.work.async {
                self.drain()
                self.outbox.send()
            }
        }

        /// Who this device is, from Apple's identifier or, where there is none, a number that stays in the folder.
        func identify(vendor: String?) {
            outbox.work.async { [self] in
                let fields = Client.fields(vendor: vendor ?? installation())
                front.with { $0.fields = fields }
                outbox.deviceID = fields["device_id_hash"] ?? ""
                outbox.send()
                drain()
            }
        }

        // MARK: On the queue

        private func append(_ report: Report, to front: inout Front) -> Bool {
            guard front.isEnabled != false, front.pending.count < Client.maxPending else { return false }
            front.pending.append(report)
            defer { front.isDraining = true }
            return !front.isDraining
        }

        private func drain() {
            let (reports, fields) = front.with { front in
                front.isDraining = false
                guard !front.fields.isEmpty else { return ([Report](), front.fields) }
                defer { front.pending = [] }
                return (front.pending, front.fields)
            }
            guard !outbox.isOff, !reports.isEmpty else { return }
            if outbox.gather(reports.lazy.compactMap { Client.encode($0, fields) }) {
                outbox.send()
            } else {
                outbox.wake(after: Client.sendDelay)
            }
        }

        private func apply(_ isEnabled: Bool) {
            outbox.isOff = !isEnabled
            if isEnabled {
                try? FileManager.default.removeItem(at: offSwitch)
            } else {
                outbox.empty()
                try? Data().write(to: offSwitch)
            }
        }

        private var offSwitch: URL { outbox.folder.appendingPathComponent("off") }

        private func installation() -> String {
            let file = outbox.folder.appendingPathComponent("installation")
            let known = try? String(contentsOf: file, encoding: .utf8)
            if let known, UUID(uuidString: known) != nil { return known }
            let made = UUID().uuidString
            try? Data(made.utf8).write(to: file, options: .atomic)
            return made
        }

        // MARK: What Apple tells

        /// Takes a MetricKit payload: it is on the disk when this returns.
        func receive(_ payload: Data) {
            guard isEnabled != false, outbox.add(.diagnostics, payload) else { return }
            outbox.work.async { [outbox] in
                if outbox.isOff { return outbox.empty() }
                outbox.acceptPayloads()
                outbox.send()
            }
        }

        /// Writes the crash that an exception is about to be, on its thread, for the next launch. `addresses` are the
        /// return addresses, the innermost first.
        func record(exception name: String, reason: String, addresses: [UInt]) {
            guard let front = front.ifFree({ $0 }), front.isEnabled != false else { return }
            let pid = Int(ProcessInfo.processInfo.processIdentifier)
            var trimmed = Trimmed(room: 100_000)
            var fields = front.fields
            if fields.isEmpty {  // so early in the launch that the device is not known yet: all but its id
                fields = Client.fields(vendor: "")
                fields["device_id_hash"] = nil
            }
            var crash: [String: Any] = fields
            crash["exception_type"] = name.isEmpty ? "NSException" : trimmed.text(name)
            crash["exception_reason"] = trimmed.text(reason)
            crash["stack_trace"] = addresses.prefix(512).enumerated().map { Client.frame($0.offset, at: $0.element) }
            crash["occurred_at"] = rfc3339(outbox.clock.now())
            crash["session_id"] = front.session
            crash["breadcrumbs"] = front.breadcrumbs.map { trimmed.breadcrumb($0) }
            crash["pid"] = pid
            guard let body = try? JSONSerialization.data(withJSONObject: crash) else { return }
            if outbox.add(.crash, body) { outbox.markException(pid: pid) }
        }

        // MARK: Encoding

        private static func encode(_ report: Report, _ fields: [String: String]) -> Data? {
            var trimmed = Trimmed(), event: [String: Any] = fields
            event["build_number"] = nil  // the API knows it of crashes only
            event["occurred_at"] = rfc3339(report.at)
            event["session_id"] = report.session
            switch report.kind {
            case .sessionStart: event["type"] = "session_start"
            case .sessionEnd: event["type"] = "session_end"
            case .custom(let name, let properties):
                event["type"] = "custom"
                event["name"] = trimmed.text(name)
                event["properties"] = trimmed.value(properties)
            case .error(let error, let context, let place, let breadcrumbs):
                event["type"] = "error"
                event["name"] = trimmed.text(title(error))
                // The newest breadcrumbs tell most, so where there is no room it is the oldest and the context.
                event["properties"] = [
                    "error": withoutSecrets(trimmed.text(String(describing: error))), "place": trimmed.text(place),
                    "breadcrumbs": Array(breadcrumbs.reversed().map { trimmed.breadcrumb($0) }.reversed()),
                    "context": trimmed.value(context)]
            }
            guard JSONSerialization.isValidJSONObject(event) else { return nil }
            return try? JSONSerialization.data(withJSONObject: event, options: .sortedKeys)
        }

        /// A text whose URLs have no password, query and fragment: those of URLError and the like may hold tokens.
        private static func withoutSecrets(_ text: String) -> String {
            [(#"://[^\s/?#@]*@"#, "://"), (#"(://[^\s?#"]*)[?#][^\s"]*"#, "$1")].reduce(text) { text, each in
                text.replacingOccurrences(of: each.0, with: each.1, options: .regularExpression)
            }
        }

        /// What errors are counted by: the type, or of one from Objective-C the domain and code.
        private static func title(_ error: any Error) -> String {
            let kind = type(of: error)
            if kind is NSError.Type { return "\((error as NSError).domain) \((error as NSError).code)" }
            // A private type's name has an address in it, which differs from launch to launch.
            let context = #"\(unknown context at \$[0-9a-f]+\)\."#
            return String(reflecting: kind).replacingOccurrences(of: context, with: "", options: .regularExpression)
        }

        static func fields(vendor: String) -> [String: String] {
            let version = ProcessInfo.processInfo.operatingSystemVersion
            let system = "\(version.majorVersion).\(version.minorVersion)"
            let info = Bundle.main.infoDictionary ?? [:]
            return [
                "app_version": info["CFBundleShortVersionString"] as? String ?? "",
                "build_number": info["CFBundleVersion"] as? String ?? "",
                "os_version": system + (version.patchVersion > 0 ? ".\(version.patchVersion)" : ""),
                "device_model": model(), "locale": Locale.current.identifier,
                "device_id_hash": deviceID(vendor: vendor, bundle: bundle)].filter { !$0.value.isEmpty }
        }

        /// SHA-256 of "vendor:bundle", so that the id is one app's, and leads to no other.
        static func deviceID(vendor: String, bundle: String) -> String {
            Digest.sha256(Data("\(vendor):\(bundle)".utf8))
        }

        private static func model() -> String {
            if let simulated = ProcessInfo.processInfo.environment["SIMULATOR_MODEL_IDENTIFIER"] { return simulated }
            var system = utsname()
            guard uname(&system) == 0 else { return "" }
            return withUnsafeBytes(of: &system.machine) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
        }

        // MARK: Settings

        static var bundle: String { Bundle.main.bundleIdentifier ?? ProcessInfo.processInfo.processName }
        static var offSwitch: URL { folder.appendingPathComponent("off") }

        /// Application Support, which the system does not empty and users do not see. On a Mac, apps may share it.
        static var folder: URL {
            let support = FileManager.default.urls(for: .applicationSupportDirectory, in: .userDomainMask).first
            return (support ?? FileManager.default.temporaryDirectory).appendingPathComponent("Backfeedr/\(bundle)")
        }

        /// The address of the API, of an endpoint with or without /api/v1; nil where it is no plain http(s) address.
        static func base(of endpoint: String) -> URL? {
            guard var parts = URLComponents(string: endpoint), ["http", "https"].contains(parts.scheme?.lowercased()),
                  parts.host?.isEmpty == false, parts.user == nil, parts.query == nil, parts.fragment == nil
            else { return nil }
            var path = parts.percentEncodedPath[...]
            for suffix in ["/", "/api/v1", "/"] { while path.hasSuffix(suffix) { path = path.dropLast(suffix.count) } }
            parts.percentEncodedPath = path + "/api/v1"
            return parts.url
        }

        static func isKey(_ key: String) -> Bool {
            !key.isEmpty && key.unicodeScalars.allSatisfy { !CharacterSet.controlCharacters.contains($0) }
        }
    }

    /// Makes of any value what JSON can hold, within so many bytes. What is beyond is cut.
    struct Trimmed {
        var room = 20_000
        private static let maxText = 2_000, maxItems = 256, maxDepth = 8

        mutating func text(_ text: String) -> String {
            // Scalar by scalar: a lone surrogate of an NSString becomes U+FFFD, and a character may be a megabyte.
            let cut = String(String.UnicodeScalarView(text.unicodeScalars.prefix(max(0, min(Trimmed.maxText, room)))))
            room -= cut.utf8.count + 4
            return cut
        }

        mutating func value(_ value: Any, depth: Int = 0) -> Any {
            room -= 8
            guard room > 0, depth < Trimmed.maxDepth else { return "..." }
            switch value {
            case let flag as Bool where type(of: value) == Bool.self: return flag
            case let text as String: return self.text(text)
            case let date as Date: return rfc3339(date)
            case let number as any BinaryInteger: return Int64(exactly: number) ?? text(String(describing: number))
            case let number as any BinaryFloatingPoint: return finite(Double(number))
            case let number as NSNumber: return number.doubleValue.isFinite ? number : "\(number)"
            case let items as [Any]: return items.prefix(Trimmed.maxItems).map { self.value($0, depth: depth + 1) }
            case let members as [String: Any]:
                return Dictionary(members.prefix(Trimmed.maxItems).map { (text($0), self.value($1, depth: depth + 1)) },
                                  uniquingKeysWith: { first, _ in first })  // names that are alike once they are cut
            default: return text(String(describing: value))
            }
        }

        mutating func breadcrumb(_ crumb: Breadcrumb) -> Any { ["at": rfc3339(crumb.at), "text": text(crumb.text)] }

        private func finite(_ number: Double) -> Any { number.isFinite ? number as Any : "\(number)" }
    }

    /// A time as the API has it, in UTC: 2026-03-12T14:22:31.250Z. The years are 1600 to 9999; of others, the nearest.
    static func rfc3339(_ date: Date) -> String {
        let seconds = date.timeIntervalSince1970.isFinite ? date.timeIntervalSince1970 : 0
        let within = Date(timeIntervalSince1970: max(-11_676_096_000, min(seconds, 253_402_300_799)))
        return Date.ISO8601FormatStyle(includingFractionalSeconds: true).format(within)
    }

    /// A value that threads take turns with.
    final class Locked<Value>: @unchecked Sendable {
        private let lock = NSLock()
        private var value: Value

        init(_ value: Value) { self.value = value }

        func with<Result>(_ body: (inout Value) -> Result) -> Result {
            lock.lock()
            defer { lock.unlock() }
            return body(&value)
        }

        /// The same, or nil where it is not free within half a second: for a process that is about to end.
        func ifFree<Result>(_ body: (inout Value) -> Result) -> Result? {
            guard lock.lock(before: Date(timeIntervalSinceNow: 0.5)) else { return nil }
            defer { lock.unlock() }
            return body(&value)
        }
    }
}
