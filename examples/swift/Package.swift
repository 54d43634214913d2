// swift-tools-version:5.9
import PackageDescription

let package = Package(
    name: "Backfeedr",
    platforms: [.iOS(.v15), .macOS(.v12)],
    products: [.library(name: "Backfeedr", targets: ["Backfeedr"])],
    targets: [
        .target(name: "Backfeedr", resources: [.process("PrivacyInfo.xcprivacy")]),
        .testTarget(name: "BackfeedrTests", dependencies: ["Backfeedr"]),
    ],
    swiftLanguageVersions: [.v5, .version("6")]
)
