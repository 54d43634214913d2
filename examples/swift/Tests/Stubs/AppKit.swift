// The part of AppKit that the package uses.
import Foundation

@MainActor open class NSApplication {
    public class var willTerminateNotification: Notification.Name { Notification.Name("terminate") }
}
