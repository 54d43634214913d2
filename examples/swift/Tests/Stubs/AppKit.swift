// As much of AppKit as the package uses.
import Foundation

@MainActor open class NSApplication {
    public class var willTerminateNotification: Notification.Name { Notification.Name("terminate") }
}
