// The part of Objective-C's exceptions that the package uses. On Apple's systems they belong to Foundation, and a
// handler is a C function; Linux has no type of C function that takes a class.
import Foundation

open class NSException: NSObject {
    public struct Name: RawRepresentable, Sendable {
        public var rawValue: String
        public init(rawValue: String) { self.rawValue = rawValue }
    }

    open var name: Name { Name(rawValue: "") }
    open var reason: String? { nil }
    open var callStackReturnAddresses: [NSNumber] { [] }
}

public func NSGetUncaughtExceptionHandler() -> ((NSException) -> Void)? { nil }
public func NSSetUncaughtExceptionHandler(_ handler: ((NSException) -> Void)?) {}
