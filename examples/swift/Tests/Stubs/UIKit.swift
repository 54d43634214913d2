// The part of UIKit that the package uses, so that the code for phones is type-checked on other systems.
import Foundation

@MainActor open class UIDevice {
    public static let current = UIDevice()
    public var identifierForVendor: UUID? { nil }
}

@MainActor open class UIApplication {
    public class var didBecomeActiveNotification: Notification.Name { Notification.Name("active") }
    public class var didEnterBackgroundNotification: Notification.Name { Notification.Name("background") }
}

extension ProcessInfo {
    public func performExpiringActivity(withReason: String, using block: @escaping @Sendable (Bool) -> Void) {}
}
