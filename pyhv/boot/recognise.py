"""What an image file is, and which boot protocol's module reads and loads it. What cannot be run is named by
foreign.py."""

from __future__ import annotations

from pyhv.boot.image import KINDS, check_size, read_file
from pyhv.errors import BadInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyhv.accel.data import Regs, Sregs
    from pyhv.boot.elf import Elf
    from pyhv.boot.image import Content, Image, Module
    from pyhv.vm.memory import GuestMemory

    Loader = Callable[[Image, GuestMemory, str, tuple[Module, ...], int, Sregs], tuple[Regs, Sregs]]

# An ELF file may be larger than what it loads, by its debug information; a kernel's with all of it has 600 MiB.
_MAX_ELF = 1 << 30


def read(path: str, memory_size: int, kind: str = "") -> Image:
    """The image at `path`, for a guest with `memory_size` bytes of RAM. kind: a key of KINDS; "": as it is recognised,
    which is never "flat", since any file could be that. Raises BadInput with what is wrong with it."""
    if kind and kind not in KINDS:
        raise BadInput(f"boot protocol {kind}", "is unknown", f"choose one of {', '.join(KINDS)}")
    data = read_file(path, None, "give an image file or the name of a bundled guest")
    if data[:4] == b"\x7fELF" and kind not in ("flat", "linux"):
        check_size(len(data), path, max(memory_size, _MAX_ELF))
        return _read_elf(data, path, kind)
    kind = kind or _kind_of(data, path)
    check_size(len(data), path, memory_size)
    if kind == "flat":
        from pyhv.boot import flat

        return flat.parse(data, path)
    if kind == "linux":
        from pyhv.boot import linux

        return linux.parse(data, path)
    if kind == "multiboot":
        from pyhv.boot import multiboot

        return multiboot.parse(data, path)
    raise BadInput(path, f"is not an ELF file, and so not {KINDS[kind]}", "name no boot protocol")


def loader(kind: str) -> Loader:
    """What loads images of this kind, one that is neither "elf64" nor "flat" (start64.py does those)."""
    if kind == "linux":
        from pyhv.boot import linux

        return linux.load
    if kind == "pvh":
        from pyhv.boot import pvh

        return pvh.load
    from pyhv.boot import multiboot

    return multiboot.load


def _kind_of(data: Content, path: str) -> str:
    """The kind of a file that is not ELF. Raises BadInput for one that cannot be run."""
    if data[0x202:0x206] == b"HdrS":
        return "linux"
    from pyhv.boot import multiboot

    if multiboot.find(data) is not None:
        return "multiboot"
    from pyhv.boot import foreign

    raise BadInput(path, *foreign.describe(data))


def _read_elf(data: Content, path: str, kind: str) -> Image:
    from pyhv.boot import elf

    parsed = elf.read(data, path)
    kind = kind or _kind_of_elf(parsed, data, path)
    if kind == "pvh":
        from pyhv.boot import pvh

        return pvh.parse(parsed, data, path)
    if kind == "multiboot":
        from pyhv.boot import multiboot

        return multiboot.parse(data, path, parsed)
    return elf.image(parsed, data, path)


def _kind_of_elf(parsed: Elf, data: Content, path: str) -> str:
    """Raises BadInput for a file that cannot be run."""
    if parsed.is_ours:
        return "elf64"
    if parsed.pvh_entry is not None:
        return "pvh"
    from pyhv.boot import multiboot

    if multiboot.find(data) is not None:
        return "multiboot"
    from pyhv.boot import foreign

    found = foreign.describe_elf(parsed, data)
    if found is not None:
        raise BadInput(path, *found)
    return "elf64"
