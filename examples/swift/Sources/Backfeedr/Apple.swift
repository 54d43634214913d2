// The parts for Apple's systems only: the app's life cycle, MetricKit, and uncaught Objective-C exceptions. There is no
// signal handler: Swift code is not safe in one, and MetricKit reports those crashes.
import Foundation
#if canImport(UIKit)
import UIKit
#elseif canImport(AppKit)
import AppKit
#endif
#if canImport(MetricKit)
import MetricKit
#endif
#if canImport(ObjectiveC)
import MachO
import ObjectiveC
#endif

extension Backfeedr.Client {
    /// Observes the app from its start to its end.
    nonisolated func followApp() {
        #if canImport(ObjectiveC)
        watchExceptions()
        #endif
        #if canImport(MetricKit)
        Payloads.receive(for: self)
        #endif
        #if canImport(UIKit)
        onMain { [self] in
            identify()
            observe(UIApplication.didBecomeActiveNotification) { client in
                client.onMain { client.identify() }
                client.becameActive()
            }
            observe(UIApplication.didEnterBackgroundNotification) { client in
                client.wentToBackground()
                // Asks the system not to suspend the app between a request and its answer.
                ProcessInfo.processInfo.performExpiringActivity(withReason: "Backfeedr") { isOver in
                    if !isOver { client.wait(seconds: 20) { await $0.send(isAsked: true) } }
                }
            }
        }
        #else
        begin(vendor: nil)
        becameActive()  // a Mac's app has one session from its start to its end
        #if canImport(AppKit)
        onMain { [self] in
            observe(NSApplication.willTerminateNotification) { client in
                client.wentToBackground()
                client.wait(seconds: 2) { await $0.gather() }  // until it is on the disk
            }
        }
        #endif
        #endif
    }

    #if canImport(UIKit)
    /// Waits for the identifier, which a phone does not have before it is first unlocked. Any other id would count as
    /// another device.
    @MainActor private func identify() {
        guard deviceID.isEmpty, let vendor = UIDevice.current.identifierForVendor?.uuidString else { return }
        begin(vendor: vendor)
    }
    #endif

    #if canImport(UIKit) || canImport(AppKit)
    private nonisolated func onMain(_ body: @escaping @MainActor @Sendable () -> Void) {
        if Thread.isMainThread { MainActor.assumeIsolated(body) } else { Task { @MainActor in body() } }
    }

    private nonisolated func observe(
        _ name: Notification.Name, _ body: @escaping @Sendable (Backfeedr.Client) -> Void
    ) {
        _ = NotificationCenter.default.addObserver(forName: name, object: nil, queue: nil) { _ in body(self) }
    }
    #endif

    /// A frame with what the dynamic linker knows about its address. Of a path, only the part inside the app is kept:
    /// the part before it may contain a user's name.
    static func frame(_ number: Int, at address: UInt) -> [String: Any] {
        var frame: [String: Any] = ["frame": number, "address": "0x" + String(address, radix: 16)]
        #if canImport(ObjectiveC)
        var info = Dl_info()
        guard dladdr(UnsafeRawPointer(bitPattern: address), &info) != 0, let base = info.dli_fbase,
              let name = info.dli_fname, address >= UInt(bitPattern: base) else { return frame }
        let parts = String(cString: name).components(separatedBy: "/")
        let app = parts.firstIndex { $0.hasSuffix(".app") || $0.hasSuffix(".appex") }
        frame["binary"] = parts.last
        frame["path"] = app.map { "/" + parts[$0...].joined(separator: "/") }
        frame["offset"] = address - UInt(bitPattern: base)
        frame["uuid"] = uuid(ofImageAt: UnsafeRawPointer(base))
        frame["symbol"] = info.dli_sname.map { String(cString: $0) }
        if app == nil { frame["in_app"] = false }
        #endif
        return frame
    }

    #if canImport(ObjectiveC)
    /// The UUID in the load commands of a 64-bit image. Each command begins with its kind and size.
    private static func uuid(ofImageAt base: UnsafeRawPointer) -> String? {
        let header = base.load(as: mach_header_64.self)
        guard header.magic == MH_MAGIC_64 else { return nil }
        var at = base + MemoryLayout<mach_header_64>.size
        for _ in 0..<header.ncmds {
            let command = at.load(as: load_command.self)
            if command.cmd == UInt32(LC_UUID) { return UUID(uuid: at.load(as: uuid_command.self).uuid).uuidString }
            at += Int(command.cmdsize)
        }
        return nil
    }
    #endif
}

#if canImport(ObjectiveC)
/// The earlier handler, which ours calls. It is read on first use.
private let earlierHandler = Backfeedr.Locked(NSGetUncaughtExceptionHandler())

extension Backfeedr.Client {
    fileprivate nonisolated func watchExceptions() {
        earlierHandler.with { _ in }
        NSSetUncaughtExceptionHandler { exception in
            Backfeedr.client?.record(exception: exception.name.rawValue, reason: exception.reason ?? "",
                                     addresses: exception.callStackReturnAddresses.map { $0.uintValue })
            earlierHandler.with { $0 }?(exception)
        }
    }
}
#endif

#if canImport(MetricKit)
/// Receives MetricKit's payloads: on iOS 27 the new ones, otherwise the old ones, never both.
private final class Payloads: NSObject, MXMetricManagerSubscriber {
    private static let kept = Backfeedr.Locked<[Payloads]>([])  // MetricKit does not retain them
    private let client: Backfeedr.Client

    private init(_ client: Backfeedr.Client) { self.client = client }

    static func receive(for client: Backfeedr.Client) {
        #if compiler(>=6.4) || BACKFEEDR_METRICKIT_27
        if #available(iOS 27, macOS 27, *) { return client.later { await receiveReports(for: $0) } }
        #endif
        let payloads = Payloads(client)
        kept.with { $0.append(payloads) }
        MXMetricManager.shared.add(payloads)
    }

    func didReceive(_ payloads: [MXDiagnosticPayload]) {
        for payload in payloads.map({ $0.jsonRepresentation() }) { client.later { await $0.receive(payload) } }
    }

    #if compiler(>=6.4) || BACKFEEDR_METRICKIT_27
    @available(iOS 27, macOS 27, *)
    private static func receiveReports(for client: Backfeedr.Client) async {
        let manager = MetricManager()
        for await report in manager.diagnosticReports {
            // The next report must be on the disk before this one is sent.
            if let report = try? JSONEncoder().encode(report) { client.later { await $0.receive(report) } }
        }
    }
    #endif
}
#endif
