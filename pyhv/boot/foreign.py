"""Names for files that are no image that pyhv runs: what a user gave instead, and what to do about it.

Sources of the signatures: each format's own specification; PE: Microsoft, "PE Format"; Linux: Documentation/arch/arm64/
booting.rst, arch/riscv/boot-image-header.rst; multiboot 2: Multiboot2 Specification 2.0, 3.1.1.
"""

from __future__ import annotations

import struct

from pyhv.boot.elf import PT_INTERP, PT_LOAD

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyhv.boot.elf import Elf
    from pyhv.boot.image import Content

_UNPACK = "unpack it first"
_DISK = 'pyhv has no disks: give the kernel that is on it, and its initrd by initrd="FILE"'
_INITRD = 'give the kernel, and this by initrd="FILE"'
_OTHER_MACHINE = "give a kernel for x86-64"

# (offset, bytes there, what the file is, what to do). The first that fits counts.
_SIGNATURES = (
    (0, b"PYHVSNAP", "is a pyhv snapshot", "pyhv restore FILE lets it go on"),
    (0, b"\x1f\x8b", "is compressed by gzip", _UNPACK),
    (0, b"\xfd7zXZ\0", "is compressed by xz", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "is compressed by zstd", _UNPACK),
    (0, b"BZh", "is compressed by bzip2", _UNPACK),
    (0, b"\x04\x22\x4d\x18", "is compressed by lz4", _UNPACK),
    (0, b"\x02\x21\x4c\x18", "is compressed by lz4", _UNPACK),
    (0, b"\x89LZO\0", "is compressed by lzop", _UNPACK),
    (0, b"\x5d\0\0", "is compressed by lzma", _UNPACK),
    (0, b"LZIP", "is compressed by lzip", _UNPACK),
    (0, b"PK\3\4", "is a zip archive", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "is a 7z archive", _UNPACK),
    (257, b"ustar", "is a tar archive", _UNPACK),
    (0, b"!<arch>\n", "is an ar archive, such as a Debian package or a library", _UNPACK),
    (0, b"\xed\xab\xee\xdb", "is an RPM package", _UNPACK),
    (0, b"070701", "is a cpio archive, as initial RAM disks are", _INITRD),
    (0, b"070702", "is a cpio archive, as initial RAM disks are", _INITRD),
    (0, b"070707", "is a cpio archive, as initial RAM disks are", _INITRD),
    (0, b"\xc7\x71", "is a cpio archive, as initial RAM disks are", _INITRD),
    (0, b"QFI\xfb", "is a disk image (qcow2)", _DISK),
    (0, b"KDMV", "is a disk image (VMDK)", _DISK),
    (0, b"# Disk DescriptorFile", "is a disk image (VMDK)", _DISK),
    (0, b"vhdxfile", "is a disk image (VHDX)", _DISK),
    (0, b"conectix", "is a disk image (VHD)", _DISK),
    (0x40, b"\x7f\x10\xda\xbe", "is a disk image (VDI)", _DISK),
    (0x8001, b"CD001", "is an ISO 9660 image", _DISK),
    (512, b"EFI PART", "is a disk image with a partition table (GPT)", _DISK),
    (0, b"hsqs", "is a file system (squashfs)", _DISK),
    (0x438, b"\x53\xef", "is a file system (ext2, ext3, ext4)", _DISK),
    (0, b"XFSB", "is a file system (XFS)", _DISK),
    (0x10040, b"_BHRfS_M", "is a file system (btrfs)", _DISK),
    (0, b"\x27\x05\x19\x56", "is a U-Boot image (uImage)", "give the kernel that is in it"),
    (0, b"\xd0\x0d\xfe\xed", "is a device tree, or a U-Boot image in one (FIT)", "give the kernel that is in it"),
    (56, b"ARMd", "is a Linux kernel for arm64 (Image)", _OTHER_MACHINE),
    (56, b"RSC\5", "is a Linux kernel for RISC-V (Image)", _OTHER_MACHINE),
    (0x24, b"\x18\x28\x6f\x01", "is a Linux kernel for ARM (zImage)", _OTHER_MACHINE),
    (0, b"\0asm", "is a WebAssembly module", ""),
    (0, b"\xcf\xfa\xed\xfe", "is a Mach-O file", ""),
    (0, b"\xce\xfa\xed\xfe", "is a Mach-O file", ""),
    (0, b"\xca\xfe\xba\xbe", "is a Java class or a Mach-O file", ""),
    (0, b"%PDF-", "is a PDF document", ""),
)

_PE_MACHINES = {
    0x014C: "i386",
    0x01C2: "ARM",
    0x01C4: "ARM",
    0x5064: "RISC-V",
    0x6264: "LoongArch",
    0x8664: "x86-64",
    0xAA64: "AArch64",
}
_EFI_SUBSYSTEMS = (10, 11, 12)  # application, boot service driver, runtime driver

_MULTIBOOT2 = struct.Struct("<4I")
_MULTIBOOT2_MAGIC, _MULTIBOOT2_SEARCH = 0xE85250D6, 32768

# Where a 64-bit and a 32-bit Linux have themselves in their address space.
_LINUX_64, _LINUX_32 = 0xFFFFFFFF80000000, 0xC0000000

_MULTIBOOT2_KERNEL = (
    "is a multiboot 2 kernel",
    "pyhv speaks multiboot 1: build it with that header too, or with a PVH note",
)
_FLAT = 'if it is code for 1 MiB, boot="flat" runs it'
_TEXT_LOOKED_AT = 4096


def describe(data: Content) -> tuple[str, str]:
    """What a file is that is neither an ELF file nor any kernel that is run, and what to do about it or ""."""
    if data[:2] == b"#!":
        shell = data[2:128].partition(b"\n")[0].strip().decode("utf-8", "replace")
        return f"is a script ({shell})" if shell.isprintable() else "is a script", ""
    if data[:2] == b"MZ" and data[56:60] not in (b"ARMd", b"RSC\5"):
        return _describe_mz(data)
    for offset, magic, what, advice in _SIGNATURES:
        if data[offset : offset + len(magic)] == magic:
            return what, advice
    if _has_multiboot2(data):
        return _MULTIBOOT2_KERNEL
    if data[510:512] == b"\x55\xaa":
        return "is a boot sector or a disk image, which needs a BIOS", _DISK
    if _is_text(data[:_TEXT_LOOKED_AT]):
        return "is a text file", ""
    return "is not recognised as an image", _FLAT


def describe_elf(elf: Elf, data: Content) -> tuple[str, str] | None:
    """What an ELF executable is that no boot protocol knows; None: it may be for pyhv."""
    if _has_multiboot2(data):
        return _MULTIBOOT2_KERNEL
    high = _LINUX_64 if elf.bits == 64 else _LINUX_32
    if any(part.type == PT_LOAD and part.vaddr >= high for part in elf.headers) and data.find(b"Linux version ") >= 0:
        advice = "give its bzImage, or build it with CONFIG_PVH"
        return "is a Linux kernel (vmlinux) without CONFIG_PVH: no note says where to enter it", advice
    if elf.is_for_an_os or any(part.type == PT_INTERP for part in elf.headers):
        return "is a program for an operating system, not a guest", "build it with -nostdlib -static -no-pie"
    if elf.bits == 32:
        advice = "a 32-bit kernel is booted by a multiboot 1 header or a PVH note"
        return "is an ELF file for 32-bit i386 that has neither a multiboot header nor a PVH note", advice
    return None


def _describe_mz(data: Content) -> tuple[str, str]:
    """Of a DOS or PE file."""
    if data[4:8] == b"zimg":
        return "is a Linux kernel packed for UEFI firmware (zboot)", _OTHER_MACHINE
    at = int.from_bytes(data[0x3C:0x40], "little")
    if data[at : at + 4] != b"PE\0\0" or at + 96 > len(data):
        return "is a DOS program, or a PE file that is cut off", ""
    machine, sections, _, _, _, optional = struct.unpack_from("<HHIIIH", data, at + 4)
    table = at + 24 + optional
    names = {bytes(data[table + 40 * i : table + 40 * i + 8]).rstrip(b"\0") for i in range(sections)}
    (subsystem,) = struct.unpack_from("<H", data, at + 24 + 68)
    for_machine = _PE_MACHINES.get(machine, f"machine 0x{machine:x}")
    if b".linux" in names:
        advice = "take the kernel out of it: objcopy -O binary --only-section=.linux FILE vmlinuz (likewise .initrd)"
        return f"is a unified kernel image for UEFI firmware ({for_machine})", advice
    if subsystem in _EFI_SUBSYSTEMS:
        return f"is a program for UEFI firmware ({for_machine}), which pyhv does not have", ""
    return f"is a Windows program ({for_machine})", ""


def _has_multiboot2(data: Content) -> bool:
    """Whether there is a multiboot 2 header: in the first 32 KiB, at a multiple of 8."""
    magic = _MULTIBOOT2_MAGIC.to_bytes(4, "little")
    at = -1
    while (at := data.find(magic, at + 1, _MULTIBOOT2_SEARCH)) >= 0:
        fits = at % 8 == 0 and at + _MULTIBOOT2.size <= len(data)
        if fits and sum(_MULTIBOOT2.unpack_from(data, at)) & 0xFFFFFFFF == 0:
            return True
    return False


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # not a character cut in two
            return False
        text = head[: error.start].decode()
    return len(text) > 3 and all(character.isprintable() or character in "\t\n\r\f\x1b" for character in text)
