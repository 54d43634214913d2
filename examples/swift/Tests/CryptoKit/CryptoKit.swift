// The part of CryptoKit that the package uses, for the tests on Linux. Both pass the same vectors.
import Foundation

/// SHA-256 as in FIPS 180-4.
public enum SHA256 {
    private static let primes = (2...311).filter { number in !(2..<number).contains { number % $0 == 0 } }
    private static let rounds = primes.map { fraction(cbrt(Double($0))) }
    private static let start = primes.prefix(8).map { fraction(Double($0).squareRoot()) }

    /// The first 32 bits of a root's fraction. A double has 52 bits, which is enough for these primes.
    private static func fraction(_ root: Double) -> UInt32 { UInt32((root - root.rounded(.down)) * 4_294_967_296) }

    private static func turn(_ word: UInt32, _ bits: UInt32) -> UInt32 { word >> bits | word << (32 - bits) }

    public static func hash(data: some DataProtocol) -> [UInt8] { hash([UInt8](data)) }

    private static func hash(_ data: [UInt8]) -> [UInt8] {
        let zeros = [UInt8](repeating: 0, count: (119 - data.count % 64) % 64)
        let padded = data + [0x80] + zeros + withUnsafeBytes(of: UInt64(data.count * 8).bigEndian) { [UInt8]($0) }
        var state = start, words = [UInt32](repeating: 0, count: 64)
        for at in stride(from: 0, to: padded.count, by: 64) {
            for i in 0..<16 { words[i] = padded[at + 4 * i..<at + 4 * i + 4].reduce(0) { $0 << 8 | UInt32($1) } }
            for i in 16..<64 {
                let (a, b) = (words[i - 15], words[i - 2])
                let first = turn(a, 7) ^ turn(a, 18) ^ a >> 3, second = turn(b, 17) ^ turn(b, 19) ^ b >> 10
                words[i] = words[i - 16] &+ first &+ words[i - 7] &+ second
            }
            var s = state
            for i in 0..<64 {
                let choice = s[4] & s[5] ^ ~s[4] & s[6], majority = s[0] & s[1] ^ s[0] & s[2] ^ s[1] & s[2]
                let t = s[7] &+ (turn(s[4], 6) ^ turn(s[4], 11) ^ turn(s[4], 25)) &+ choice &+ rounds[i] &+ words[i]
                let top = t &+ (turn(s[0], 2) ^ turn(s[0], 13) ^ turn(s[0], 22)) &+ majority
                s = [top, s[0], s[1], s[2], s[3] &+ t, s[4], s[5], s[6]]
            }
            for i in 0..<8 { state[i] &+= s[i] }
        }
        return state.flatMap { word in withUnsafeBytes(of: word.bigEndian) { [UInt8]($0) } }
    }
}

public struct SymmetricKey {
    fileprivate let bytes: [UInt8]

    public init(data: some ContiguousBytes) { bytes = data.withUnsafeBytes { [UInt8]($0) } }
}

/// HMAC as in RFC 2104. The hash is always SHA-256.
public enum HMAC<Hash> {
    public static func authenticationCode(for data: some DataProtocol, using key: SymmetricKey) -> [UInt8] {
        var block = key.bytes.count > 64 ? SHA256.hash(data: key.bytes) : key.bytes
        block += [UInt8](repeating: 0, count: 64 - block.count)
        return SHA256.hash(data: block.map { $0 ^ 0x5c } + SHA256.hash(data: block.map { $0 ^ 0x36 } + data))
    }
}
