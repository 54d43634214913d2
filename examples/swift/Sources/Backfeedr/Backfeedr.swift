// Crash reports, sessions and events of your app, on your own server. Call `Backfeedr.start` in the `init` of the App.
// Everything else may be called from any thread, at any time, with any value. A call appends to a list in memory; an
// actor encodes, writes and sends later. Nothing here throws, and nothing is kept or sent while it is disabled.
import Foundation

/// Reports from an app to a backfeedr server.
public enum Backfeedr {
    static let running = Locked<Client?>(nil)

    static var client: Client? { running.with { $0 } }

    /// Starts to report. A second call changes nothing.
    ///
    /// `endpoint` is where the server is mounted, such as https://crashes.example.com, with or without /api/v1. While
    /// the phone is in Low Data Mode, reports wait on the disk, unless `sendsInLowDataMode`. Returns false, and reports
    /// nothing, if the endpoint is not an http(s) address, or if the key is empty or has a control character.
    @discardableResult
    public static func start(endpoint: String, key: String, sendsInLowDataMode: Bool = false) -> Bool {
        guard let base = Client.base(of: endpoint), !key.isEmpty,
              key.rangeOfCharacter(from: .controlCharacters) == nil else { return false }
        let started: Client? = running.with { running in
            guard running == nil else { return nil }
            let transport = http(sendsInLowDataMode: sendsInLowDataMode)
            running = Client(folder: Client.folder, base: base, key: key, transport: transport)
            return running
        }
        started?.followApp()
        return true
    }

    /// Reports that something happened. A property that JSON cannot hold is sent as its description. Properties are
    /// cut at about 20 kB. Before `start` this does nothing, like the other calls.
    public static func track(_ name: String, properties: [String: any Sendable] = [:]) {
        client?.add("custom") { ["name": $0.text(name), "properties": $0.value(properties)] }
    }

    /// Reports an error that the app has caught: its type, its description, its place in the source, the breadcrumbs,
    /// and your context. URLs in the description lose their query and password. Leave names and paths of people out.
    public static func capture(_ error: any Error, context: [String: any Sendable] = [:],
                               file: String = #fileID, line: Int = #line) {
        let breadcrumbs = client?.front.with { $0.breadcrumbs } ?? []
        client?.add("error") { trimmer in
            ["name": trimmer.text(title(error)), "properties": [
                "error": trimmer.text(withoutSecrets(String(describing: error))),
                "place": trimmer.text("\(file):\(line)"),
                // The newest tell most, so the oldest are cut first, and the context before them.
                "breadcrumbs": Array(breadcrumbs.reversed().map { trimmer.value($0) }.reversed()),
                "context": trimmer.value(context)]]
        }
    }

    /// Notes a step of the app. The last 50, each cut at 200 characters, are sent with an error or an exception.
    public static func breadcrumb(_ text: String) {
        let crumb: [String: any Sendable] = ["at": Date(), "text": String(text.unicodeScalars.prefix(200))]
        client?.front.with { front in
            if front.isEnabled { front.breadcrumbs = front.breadcrumbs.suffix(49) + [crumb] }
        }
    }

    /// Whether the app reports. False cancels a running request, deletes what waits, and stays across launches: the
    /// setter writes a small file. It may be set before `start`.
    public static var isEnabled: Bool {
        get { client?.front.with { $0.isEnabled } ?? Client.isEnabled(in: Client.folder) }
        set { if let client { client.setEnabled(newValue) } else { Client.setEnabled(newValue, in: Client.folder) } }
    }

    /// The server's name for this device: a digest of the vendor's identifier and the app's. Users read it out to
    /// support, who can show or forget what is stored of it. It is "" before `start` and for a moment after.
    public static var deviceID: String { client?.deviceID ?? "" }

    /// Sends now what waits, unless the server has asked for patience. The task's value says whether nothing waits
    /// any more.
    @discardableResult
    public static func flush() -> Task<Bool, Never> {
        Task.detached { await client?.send(isAsked: true) ?? true }
    }

    /// A text whose URLs have no password, query or fragment: the description of a URLError may hold tokens.
    private static func withoutSecrets(_ text: String) -> String {
        text.replacingOccurrences(of: #"://[^\s/?#@]*@"#, with: "://", options: .regularExpression)
            .replacingOccurrences(of: #"(://[^\s?#"]*)[?#][^\s"]*"#, with: "$1", options: .regularExpression)
    }

    /// What an error is counted by: its type, or the domain and code of an NSError.
    private static func title(_ error: any Error) -> String {
        let kind = type(of: error)
        if kind is NSError.Type { return "\((error as NSError).domain) \((error as NSError).code)" }
        // The name of a private type has an address in it, which differs from launch to launch.
        let context = #"\(unknown context at \$[0-9a-f]+\)\."#
        return String(reflecting: kind).replacingOccurrences(of: context, with: "", options: .regularExpression)
    }
}

extension Backfeedr {
    /// What callers write and the actor reads. All threads share it, so it is locked for moments only.
    struct Front: Sendable {
        var isEnabled: Bool
        var pending: [@Sendable (_ fields: [String: String]) -> Data?] = []  // each encodes a report
        var breadcrumbs: [[String: any Sendable]] = []
        var session = "", leftAt: Date? = .distantPast  // when the app left the front; nil while it is there
        var fields: [String: String] = [:]              // of the device and the app; empty until they are known
    }
}

/// What callers do, from any thread.
extension Backfeedr.Client {
    typealias Details = @Sendable (inout Backfeedr.Trimmer) -> [String: Any]

    nonisolated var deviceID: String { front.with { $0.fields["device_id_hash"] ?? "" } }

    /// Appends a report. `details` are the fields of its type; they are made when it is encoded.
    nonisolated func add(_ type: String, _ details: @escaping Details = { _ in [:] }) {
        let at = now()
        let isFirst = front.with { front in
            guard front.isEnabled, front.pending.count < Self.maxPending else { return false }
            let session = front.session
            front.pending.append { Self.encode(type, at, session, $0, details) }
            return front.pending.count == 1
        }
        if isFirst { later { await $0.gather() } }
    }

    nonisolated func setEnabled(_ isEnabled: Bool) {
        Self.setEnabled(isEnabled, in: folder)
        let dropped = front.with { front in
            front.isEnabled = isEnabled
            defer { if !isEnabled { (front.pending, front.breadcrumbs) = ([], []) } }
            return front.pending
        }
        _ = dropped  // its values end outside of the lock, because their deinit may call us
        if !isEnabled { later { await $0.empty() } }
    }

    /// The app came to the front. A session begins, or goes on if the app was away for less than 30 seconds.
    nonisolated func becameActive() {
        let at = now()
        let isNew = front.with { front in
            defer { front.leftAt = nil }
            guard let leftAt = front.leftAt, abs(at.timeIntervalSince(leftAt)) >= Self.grace else { return false }
            front.session = UUID().uuidString
            return true
        }
        if isNew { add("session_start") }
    }

    /// The app left the front. The last end of a session counts, so one that goes on ends again, later.
    nonisolated func wentToBackground() {
        let at = now()
        let wasActive = front.with { front in
            defer { front.leftAt = front.leftAt ?? at }
            return front.leftAt == nil
        }
        if wasActive { add("session_end") }
    }

    /// Runs what the actor is to do; the caller goes on.
    nonisolated func later(_ body: @escaping @Sendable (Backfeedr.Client) async -> Void) {
        Task.detached(priority: .utility) { await body(self) }
    }
}

/// What reports consist of, and where they go.
extension Backfeedr.Client {
    private static func encode(_ type: String, _ at: Date, _ session: String, _ fields: [String: String],
                               _ details: Details) -> Data? {
        var trimmer = Backfeedr.Trimmer(), event: [String: Any] = fields
        event["build_number"] = nil  // the API knows it of crashes only
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

    /// SHA-256 of "vendor:bundle": the id is one app's, and leads to no other.
    static func deviceID(vendor: String, bundle: String) -> String { sha256(Data("\(vendor):\(bundle)".utf8)) }

    private static func model() -> String {
        var system = utsname()
        guard uname(&system) == 0 else { return "" }
        return withUnsafeBytes(of: &system.machine) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
    }

    private static var bundle: String { Bundle.main.bundleIdentifier ?? ProcessInfo.processInfo.processName }

    /// Application Support, which the system does not empty and users do not see. On a Mac, apps may share it.
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
    /// Makes any value one that JSON can hold, within `room` bytes. The rest is cut.
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
                return Dictionary(members.prefix(Trimmer.maxItems).map { (text($0), self.value($1, depth: depth + 1)) },
                                  uniquingKeysWith: { first, _ in first })  // names that are alike once they are cut
            default: return JSONSerialization.isValidJSONObject([value]) ? value : text(String(describing: value))
            }
        }
    }

    /// A time as the API has it, in UTC: 2026-03-12T14:22:31.250Z. A year before 1600 or after 9999 becomes that year.
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
    }
}
