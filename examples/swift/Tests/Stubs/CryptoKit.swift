// As much of CryptoKit as the package uses.
import Foundation

public struct SHA256 {
    public static func hash(data: some DataProtocol) -> [UInt8] { [] }
}

public struct SymmetricKey {
    public init(data: some ContiguousBytes) {}
}

public struct HMAC<H> {
    public static func authenticationCode(for data: some DataProtocol, using key: SymmetricKey) -> [UInt8] { [] }
}
