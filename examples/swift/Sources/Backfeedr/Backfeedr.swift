// Crash reports, sessions and events of your app, on your own server. Call `Backfeedr.start` in the `init` of the App.
// You may call everything else from any thread, at any time, with any value. A call appends to a list in memory; an
// actor encodes, writes and sends later. Nothing here throws, and nothing is stored or sent while it is disabled.
import Foundation

/// Reports from an app to a backfeedr server.
public enum Backfeedr {
    static let running = Locked<Client?>(nil)

    static var client: Client? { running.with { $0 } }

    /// Starts reporting; call it at launch. If it is called later, the first session begins when the app next becomes
    /// active. A second call has no effect.
    ///
    /// `endpoint` is where the server is mounted, such as https://crashes.example.com, with or without /api/v1. While
    /// the phone is in Low Data Mode, reports wait on the disk, unless `sendsInLowDataMode` is true. Returns false, and
    /// reports nothing, if the endpoint is not an http(s) address, or if the key is empty or has a control character.
    @discardableResult
    public static func start(endpoint: String, key: String, sendsInLowDataMode: Bool = false) -> Bool {
        let key = key.trimmingCharacters(in: .whitespacesAndNewlines)  // as a server reads a header
        guard let base = Client.base(of: endpoint), !key.isEmpty,
              key.rangeOfCharacter(from: .controlCharacters) == nil else {
            #if DEBUG
            print("Backfeedr: not started: the endpoint must begin with https:// or http://, and the key must be set")
            #endif
            return false
        }
        let started: Client? = running.with { running in
            guard running == nil else { return nil }
            let transport = http(sendsInLowDataMode: sendsInLowDataMode)
            running = Client(folder: Client.folder, base: base, key: key, transport: transport)
            return running
        }
        started?.followApp()
        return true
    }

    /// Reports an event. A property that JSON cannot express is sent as its description. Properties are cut at about
    /// 20 kB. Before `start`, this does nothing, like the other calls.
    public static func track(_ name: String, properties: [String: any Sendable] = [:]) {
        client?.add("custom") { ["name": $0.text(name), "properties": $0.value(properties)] }
    }

    /// Reports an error that the app has caught: its type, its description, its place in the source, the breadcrumbs,
    /// and your context. URLs in the description lose their query and password; the error of a file is sent as its
    /// domain and code. Leave out people's names and paths. Each place in the source sends 100 errors a session; the
    /// end of the session says how many others there were.
    public static func capture(_ error: any Error, context: [String: any Sendable] = [:],
                               file: String = #fileID, line: Int = #line) {
        let place = "\(file):\(line)"
        guard let breadcrumbs = client?.front.with({ front in
            front.errors[place, default: 0] += 1
            return front.errors[place, default: 0] > Client.maxErrors ? nil : front.breadcrumbs
        }) else { return }
        client?.add("error") { trimmer in
            ["name": trimmer.text(title(error)), "properties": [
                "error": trimmer.text(description(of: error)),
                "place": trimmer.text(place),
                // The newest are the most useful, so the oldest are cut first, and the context before them.
                "breadcrumbs": Array(breadcrumbs.reversed().map { trimmer.value($0) }.reversed()),
                "context": trimmer.value(context)]]
        }
    }

    /// Records a step of the user. The last 50, each cut at 200 characters, are sent with an error or an exception.
    public static func breadcrumb(_ text: String) {
        let crumb: [String: any Sendable] = ["at": Date(), "text": String(text.unicodeScalars.prefix(200))]
        client?.front.with { front in
            if front.isEnabled { front.breadcrumbs = front.breadcrumbs.suffix(49) + [crumb] }
        }
    }

    /// Whether the app reports. Setting it to false cancels a running request and deletes waiting reports. The value is
    /// stored in a small file, so it persists across launches. It may be set before `start`.
    public static var isEnabled: Bool {
        get { client?.front.with { $0.isEnabled } ?? Client.isEnabled(in: Client.folder) }
        set { if let client { client.setEnabled(newValue) } else { Client.setEnabled(newValue, in: Client.folder) } }
    }

    /// The id of this device on the server: a digest of the vendor's identifier and the app's. A user can read it out
    /// to support, who can show or delete what is stored about it. It is "" before `start` and for a moment after it.
    public static var deviceID: String { client?.deviceID ?? "" }

    /// Sends the waiting reports now, unless the server has asked to wait. The task's value is true if none are left.
    /// Right after `start` it waits until the device is known, for up to 5 seconds.
    @discardableResult
    public static func flush() -> Task<Bool, Never> {
        Task.detached {
            for _ in 0..<100 where client?.deviceID == "" { try? await Task.sleep(nanoseconds: 50_000_000) }
            return await client?.send(isAsked: true) ?? true
        }
    }

    /// The description of an error; its domain and code if the description has the path of a file.
    private static func description(of error: any Error) -> String {
        let text = String(describing: error)
        if text.contains("NSFilePath=") || text.contains("file://") { return title(error as NSError) }
        return withoutSecrets(text)
    }

    /// Removes passwords, queries and fragments from URLs: the description of a URLError may contain tokens.
    private static func withoutSecrets(_ text: String) -> String {
        text.replacingOccurrences(of: #"://[^\s/?#@]*@"#, with: "://", options: .regularExpression)
            // The query is optional: else a list of 1,000 URLs without one takes seconds.
            .replacingOccurrences(of: #"(://[^\s?#"]*)([?#][^\s"]*)?"#, with: "$1", options: .regularExpression)
    }

    /// The name under which an error is counted: its type, or the domain and code of an NSError.
    private static func title(_ error: any Error) -> String {
        let kind = type(of: error)
        if kind is NSError.Type { return "\((error as NSError).domain) \((error as NSError).code)" }
        // The name of a private type contains an address, which differs from launch to launch.
        let context = #"\(unknown context at \$[0-9a-f]+\)\."#
        return String(reflecting: kind).replacingOccurrences(of: context, with: "", options: .regularExpression)
    }
}

extension Backfeedr {
    /// The state that callers write and the actor reads. All threads share it, so it is only locked for moments.
    struct Front: Sendable {
        var isEnabled: Bool
        var pending: [@Sendable (_ fields: [String: String]) -> Data?] = []  // each encodes a report
        var breadcrumbs: [[String: any Sendable]] = []
        var errors: [String: Int] = [:]  // how many were captured in this session, by place in the source
        var session = "", leftAt: Date? = .distantPast  // when the app left the foreground; nil while it is there
        var fields: [String: String] = [:]              // of the device and the app; empty until they are known
    }
}

/// Methods for any thread.
extension Backfeedr.Client {
    typealias Details = @Sendable (inout Backfeedr.Trimmer) -> [String: Any]

    nonisolated var deviceID: String { front.with { $0.fields["device_id_hash"] ?? "" } }

    /// Appends a report. `details` gives the fields of its type, and is called when the report is encoded.
    nonisolated func add(_ type: String, _ details: @escaping Details = { _ in [:] }) {
        let at = now()
        let count = front.with { front in
            guard front.isEnabled, front.pending.count < Self.maxPending else { return 0 }
            let session = front.session
            front.pending.append { Self.encode(type, at, session, $0, details) }
            return front.pending.count
        }
        if count == 1 { later { await $0.gather() } }
        #if DEBUG
        if count == Self.maxPending { print("Backfeedr: \(count) reports wait in memory: further ones are lost") }
        #endif
    }

    nonisolated func setEnabled(_ isEnabled: Bool) {
        Self.setEnabled(isEnabled, in: folder)
        let (dropped, isBack) = front.with { front in
            let isBack = isEnabled && !front.isEnabled && front.leftAt == nil  // in the foreground: a session begins
            if isBack { front.leftAt = .distantPast }
            front.isEnabled = isEnabled
            defer { if !isEnabled { (front.pending, front.breadcrumbs) = ([], []) } }
            return (front.pending, isBack)
        }
        _ = dropped  // its values are released outside of the lock, because their deinit may call us
        if !isEnabled { later { await $0.empty() } }
        if isBack { becameActive() }
    }

    /// The app came to the foreground. A session begins, or continues if the app was away for less than 30 seconds.
    nonisolated func becameActive() {
        let at = now()
        let isNew = front.with { front in
            defer { front.leftAt = nil }
            guard let leftAt = front.leftAt, abs(at.timeIntervalSince(leftAt)) >= Self.grace else { return false }
            (front.session, front.errors) = (UUID().uuidString, [:])
            return true
        }
        if isNew { add("session_start") }
    }

    /// The app left the foreground. The last end of a session counts, so a session that continues ends again later.
    nonisolated func wentToBackground() {
        let at = now()
        let (wasActive, unsent) = front.with { front in
            defer { front.leftAt = front.leftAt ?? at }
            return (front.leftAt == nil, front.errors.values.reduce(0) { $0 + max(0, $1 - Self.maxErrors) })
        }
        if wasActive { add("session_end") { _ in unsent > 0 ? ["properties": ["errors_not_sent": unsent]] : [:] } }
    }

    /// Runs a task of the actor without waiting for it.
    nonisolated func later(_ body: @escaping @Sendable (Backfeedr.Client) async -> Void) {
        Task.detached(priority: .utility) { await body(self) }
    }

    /// Runs a task of the actor and waits for it, but no longer than the seconds.
    nonisolated func wait(seconds: Double, _ body: @escaping @Sendable (Backfeedr.Client) async -> Void) {
        let done = DispatchSemaphore(value: 0)
        later { client in
            await body(client)
            done.signal()
        }
        _ = done.wait(timeout: .now() + seconds)
    }
}

/// The contents of reports, and the places where they are stored and sent.
extension Backfeedr.Client {
    private static func encode(_ type: String, _ at: Date, _ session: String, _ fields: [String: String],
                               _ details: Details) -> Data? {
        var trimmer = Backfeedr.Trimmer(), event: [String: Any] = fields
        event["build_number"] = nil  // in the API, only crashes have it
        event["type"] = type
        event["occurred_at"] = Backfeedr.rfc3339(at)
        event["session_id"] = session
        event.merge(details(&trimmer)) { $1 }
        guard JSONSerialization.isValidJSONObject(event) else { return nil }
        return try? JSONSerialization.data(withJSONObject: event, options: .sortedKeys)
    }

    /// The fields of the device and the app that each report has; without an id if there is no `vendor`.
    static func fields(vendor: String?) -> [String: String] {
        let version = ProcessInfo.processInfo.operatingSystemVersion
        let patch = version.patchVersion > 0 ? ".\(version.patchVersion)" : ""
        let info = Bundle.main.infoDictionary ?? [:]
        return [
            "app_version": info["CFBundleShortVersionString"] as? String ?? "",
            "build_number": info["CFBundleVersion"] as? String ?? "",
            "os_version": "\(version.majorVersion).\(version.minorVersion)\(patch)",
            "device_model": model(), "locale": Locale.current.identifier,
            "device_id_hash": vendor.map { deviceID(vendor: $0, bundle: bundle) } ?? ""].filter { !$0.value.isEmpty }
    }

    /// SHA-256 of "vendor:bundle": other apps have other ids for the same device.
    static func deviceID(vendor: String, bundle: String) -> String { sha256(Data("\(vendor):\(bundle)".utf8)) }

    private static func model() -> String {
        var system = utsname()
        guard uname(&system) == 0 else { return "" }
        return withUnsafeBytes(of: &system.machine) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
    }

    private static var bundle: String { Bundle.main.bundleIdentifier ?? ProcessInfo.processInfo.processName }

    /// A folder in Application Support, which the system does not empty and users do not see. Mac apps may share it.
    static var folder: URL {
        let support = FileManager.default.urls(for: .applicationSupportDirectory, in: .userDomainMask).first
        return (support ?? FileManager.default.temporaryDirectory).appendingPathComponent("Backfeedr/\(bundle)")
    }

    /// The address of the API, of an endpoint with or without /api/v1; nil if it is not a plain http(s) address.
    static func base(of endpoint: String) -> URL? {
        guard let url = URL(string: endpoint), ["http", "https"].contains(url.scheme?.lowercased()),
              url.host?.isEmpty == false, url.user == nil, url.query == nil, url.fragment == nil else { return nil }
        return url.path.hasSuffix("/api/v1") ? url : url.appendingPathComponent("api/v1")
    }
}

extension Backfeedr {
    /// Converts any value to one that JSON can express, within `room` bytes. The rest is cut.
    struct Trimmer {
        var room = 20_000
        private static let maxText = 2_000, maxItems = 256, maxDepth = 8

        mutating func text(_ text: String) -> String {
            // Scalar by scalar: a lone surrogate of an NSString becomes U+FFFD, and a character may be a megabyte.
            let cut = String(text.unicodeScalars.prefix(max(0, min(Trimmer.maxText, room))))
            room -= cut.utf8.count + 4
            return cut
        }

        mutating func value(_ value: Any, depth: Int = 0) -> Any {
            room -= 8
            guard room > 0, depth < Trimmer.maxDepth else { return "..." }
            switch value {
            case let text as String: return self.text(text)
            case let date as Date: return rfc3339(date)
            case let items as [Any]: return items.prefix(Trimmer.maxItems).map { self.value($0, depth: depth + 1) }
            case let members as [String: Any]:
                // In the order of their names, so that what is cut is always the same.
                let kept = members.sorted { $0.key < $1.key }.prefix(Trimmer.maxItems)
                return Dictionary(kept.map { (text($0), self.value($1, depth: depth + 1)) },
                                  uniquingKeysWith: { first, _ in first })  // names that are equal after they were cut
            default: return JSONSerialization.isValidJSONObject([value]) ? value : text(String(describing: value))
            }
        }
    }

    /// Formats a time for the API, in UTC: 2026-03-12T14:22:31.250Z. Limited to the years 1600 to 9999.
    static func rfc3339(_ date: Date) -> String {
        let seconds = date.timeIntervalSince1970.isFinite ? date.timeIntervalSince1970 : 0
        let within = Date(timeIntervalSince1970: max(-11_676_096_000, min(seconds, 253_402_300_799)))
        return Date.ISO8601FormatStyle(includingFractionalSeconds: true).format(within)
    }

    /// A value that one thread at a time can use.
    final class Locked<Value>: @unchecked Sendable {
        private let lock = NSLock()
        private var value: Value

        init(_ value: Value) { self.value = value }

        func with<Result>(_ body: (inout Value) -> Result) -> Result {
            lock.lock()
            defer { lock.unlock() }
            return body(&value)
        }
    }
}
