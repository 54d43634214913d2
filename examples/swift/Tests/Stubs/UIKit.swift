// As much of UIKit as the package uses, so that its branch for a phone is type-checked where there is none.
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
