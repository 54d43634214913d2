import XCTest
@testable import Backfeedr
final class T: XCTestCase {}
