// SHA-256 and HMAC as lower-case hex. On a phone they are CryptoKit's; Linux has none without a dependency, so
// that the tests run there on a small one of our own. The vectors of the tests hold for both.
import Foundation
#if canImport(CryptoKit)
import CryptoKit
#endif

extension Backfeedr {
    enum Digest {
        /// SHA-256 of the data, as 64 digits.
        static func sha256(_ data: Data) -> String {
            #if canImport(CryptoKit)
            return hex(SHA256.hash(data: data))
            #else
            return hex(hash([UInt8](data)))
            #endif
        }

        /// HMAC-SHA256 of the text under the key, as 64 digits.
        static func hmac(key: String, _ text: String) -> String {
            #if canImport(CryptoKit)
            return hex(HMAC<SHA256>.authenticationCode(for: Data(text.utf8), using: SymmetricKey(data: Data(key.utf8))))
            #else
            var block = [UInt8](key.utf8)
            block = block.count > 64 ? hash(block) : block
            block += [UInt8](repeating: 0, count: 64 - block.count)
            return hex(hash(block.map { $0 ^ 0x5c } + hash(block.map { $0 ^ 0x36 } + text.utf8)))
            #endif
        }

        private static func hex(_ bytes: some Sequence<UInt8>) -> String {
            bytes.map { ($0 < 16 ? "0" : "") + String($0, radix: 16) }.joined()
        }

        #if !canImport(CryptoKit)
        private static let primes = (2...311).filter { number in !(2..<number).contains { number % $0 == 0 } }

        /// The first 32 bits behind the point of a root. A double has 52 of them, which is enough for these primes.
        private static func fraction(_ root: Double) -> UInt32 { UInt32((root - root.rounded(.down)) * 4_294_967_296) }

        private static let rounds = primes.map { fraction(cbrt(Double($0))) }
        private static let start = primes.prefix(8).map { fraction(Double($0).squareRoot()) }

        /// SHA-256 after FIPS 180-4.
        private static func hash(_ message: [UInt8]) -> [UInt8] {
            var state = start, words = [UInt32](repeating: 0, count: 64)
            let padding = [0x80] + [UInt8](repeating: 0, count: (119 - message.count % 64) % 64)
            let padded = message + padding + withUnsafeBytes(of: UInt64(message.count * 8).bigEndian) { [UInt8]($0) }
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

        private static func turn(_ word: UInt32, _ bits: UInt32) -> UInt32 { word >> bits | word << (32 - bits) }
        #endif
    }
}
