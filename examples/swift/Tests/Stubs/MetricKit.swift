// The part of MetricKit that the package uses: that of iOS 26 and before, and that of iOS 27.
import Foundation

open class MXDiagnosticPayload: NSObject {
    open func jsonRepresentation() -> Data { Data() }
}

public protocol MXMetricManagerSubscriber: NSObjectProtocol {
    func didReceive(_ payloads: [MXDiagnosticPayload])
}

open class MXMetricManager: NSObject, @unchecked Sendable {
    public static let shared = MXMetricManager()
    open func add(_ subscriber: any MXMetricManagerSubscriber) {}
}

public struct DiagnosticReport: Codable, Sendable {}

public final class MetricManager {
    public init() {}
    public var diagnosticReports: some AsyncSequence<DiagnosticReport, Never> {
        AsyncStream { $0.finish() }
    }
}
