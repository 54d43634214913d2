// The part of Darwin's images and dynamic linker that the package uses.
public let MH_MAGIC_64: UInt32 = 0xfeed_facf
public let LC_UUID = 0x1b

public struct mach_header_64 {
    public var magic: UInt32, cputype: Int32, cpusubtype: Int32, filetype: UInt32
    public var ncmds: UInt32, sizeofcmds: UInt32, flags: UInt32, reserved: UInt32
}

public struct load_command {
    public var cmd: UInt32, cmdsize: UInt32
}

public struct uuid_command {
    public var cmd: UInt32, cmdsize: UInt32
    public var uuid: (UInt8, UInt8, UInt8, UInt8, UInt8, UInt8, UInt8, UInt8,
                      UInt8, UInt8, UInt8, UInt8, UInt8, UInt8, UInt8, UInt8)
}

public struct Dl_info {
    public var dli_fname: UnsafePointer<CChar>?, dli_fbase: UnsafeMutableRawPointer?
    public var dli_sname: UnsafePointer<CChar>?, dli_saddr: UnsafeMutableRawPointer?
    public init() { (dli_fname, dli_fbase, dli_sname, dli_saddr) = (nil, nil, nil, nil) }
}

public func dladdr(_ address: UnsafeRawPointer?, _ info: UnsafeMutablePointer<Dl_info>) -> Int32 { 0 }
