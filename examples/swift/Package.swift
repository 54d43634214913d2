// swift-tools-version:5.9
import PackageDescription

#if os(Linux)
// Linux has no CryptoKit, so the tests have a small one.
let crypto: [Target] = [.target(name: "CryptoKit", path: "Tests/CryptoKit")]
#else
let crypto: [Target] = []
#endif

let package = Package(
    name: "Backfeedr",
    platforms: [.iOS(.v15), .macOS(.v12)],
    products: [.library(name: "Backfeedr", targets: ["Backfeedr"])],
    targets: crypto + [
        .target(name: "Backfeedr", dependencies: crypto.map { .target(name: $0.name) },
                resources: [.process("PrivacyInfo.xcprivacy")]),
        .testTarget(name: "BackfeedrTests", dependencies: ["Backfeedr"]),
    ],
    swiftLanguageVersions: [.v5, .version("6")]
)
