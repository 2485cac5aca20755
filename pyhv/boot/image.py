"""What an image is once it is read, and how files are read. recognise.py finds out what a file is."""

from __future__ import annotations

import os
import stat

from pyhv.errors import BadInput
from pyhv.light import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from mmap import mmap

    Content = bytes | mmap
    """Of a file: what is read of it, or what is mapped, read-only."""

# Each boot protocol's name, and what an error calls its images.
KINDS = {
    "elf64": "an ELF64 image",
    "flat": "a flat binary",
    "linux": "a Linux kernel (bzImage)",
    "pvh": "a PVH kernel",
    "multiboot": "a multiboot kernel",
}

_MAX_MODULES = 64
# An image of more bytes is mapped: much of a kernel's file is never loaded, and the rest is copied once.
_MAP_FROM = 1 << 20


class Segment(NamedTuple):
    """Bytes that belong at a guest-physical address, followed by zeros up to `size`."""

    gpa: int
    data: bytes | memoryview
    size: int


class Module(NamedTuple):
    """A file that a kernel gets beside its image."""

    name: str
    """The file, as the user named it."""
    arguments: str
    data: bytes


class Image(NamedTuple):
    """A guest to load: where its pieces go and where it starts."""

    name: str
    kind: str
    """The boot protocol: a key of KINDS."""
    entry: int
    segments: tuple[Segment, ...]
    cpuid_sites: tuple[int, ...]
    """Linear addresses of all its CPUID instructions, if it declares them; else empty."""
    user_word: str | None
    """What the image says of CPL 3: "" it never goes there; a word: only with that word on the command line; None:
    nothing is said."""
    isa_level: int = 1
    """The x86-64 level that it says it needs: 1 (the baseline, or nothing is said) to 4."""
    wants_pc: bool = False
    """Whether it asks for ACPI tables and a PC's devices though it declares itself."""
    longest_line: int = 4095
    """How many bytes of a command line it takes."""
    header: bytes = b""
    """Of a bzImage: its set-up header, which goes into the boot parameters."""

    @property
    def declares_itself(self) -> bool:
        """Whether it carries notes: then it is written for pyhv."""
        return self.user_word is not None or bool(self.cpuid_sites)

    @property
    def is_for_pc(self) -> bool:
        """Whether it may expect a PC: timer, ACPI tables and the devices that they tell of."""
        return self.wants_pc or not self.declares_itself

    def enters_user_mode(self, command_line: str) -> bool:
        """Whether it may execute CPUID at CPL 3, as far as it says; an image that says nothing may."""
        return self.user_word is None or (self.user_word != "" and self.user_word in command_line.split())


def read_modules(image: Image, initrd: str | None, modules: Sequence[str], memory_size: int) -> tuple[Module, ...]:
    """The files that the kernel gets beside its image. initrd: a path. modules: each "FILE ARGS". Raises BadInput for
    what cannot be read and for what this kind of image does not take."""
    what = f"{image.name} is {KINDS[image.kind]}"
    if initrd is not None and image.kind not in ("linux", "pvh"):
        advice = 'give it as a module' if image.kind == "multiboot" else ""
        raise BadInput("initrd", f"cannot be given: {what}", advice)
    if modules and image.kind not in ("multiboot", "pvh"):
        advice = "give it as the initrd" if image.kind == "linux" else ""
        raise BadInput("modules", f"cannot be given: {what}", advice)
    wanted = [(initrd, "")] if initrd is not None else []
    wanted += [(file, arguments.strip()) for file, _, arguments in (module.partition(" ") for module in modules)]
    if len(wanted) > _MAX_MODULES:
        raise BadInput("modules", f"{len(wanted)} were given; the most is {_MAX_MODULES}")
    return tuple(Module(file, arguments, bytes(read_file(file, memory_size))) for file, arguments in wanted)


def read_file(path: str, memory_size: int | None, advice: str = "") -> Content:
    """The bytes of the file at `path`, which are more than none. memory_size: the guest's, which must hold them; None:
    they may be any number, and are mapped where they are many. Raises BadInput."""
    try:
        # Not blocking: opening a FIFO would wait for a writer.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadInput(path, "is not a regular file", advice)
            if status.st_size == 0:
                raise BadInput(path, "is empty")
            if memory_size is not None:
                check_size(status.st_size, path, memory_size)
            elif status.st_size >= _MAP_FROM:
                import mmap

                return mmap.mmap(file.fileno(), status.st_size, access=mmap.ACCESS_READ)
            return file.read()
    except IsADirectoryError:
        raise BadInput(path, "is a directory", advice) from None
    except OSError as error:
        raise BadInput(path, error.strerror or str(error)) from None


def check_size(size: int, path: str, memory_size: int) -> None:
    """Raises BadInput for a file of more bytes than the guest's memory has."""
    if size > memory_size:
        sizes = f"is {size} bytes, the guest has {memory_size} bytes of memory"
        raise BadInput(path, sizes, "give the guest more memory")
