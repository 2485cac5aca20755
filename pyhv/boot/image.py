"""Reading an image file and recognising what it is."""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from pyhv.errors import BadInput


class Segment(NamedTuple):
    """Bytes that belong at a guest-physical address, followed by zeros up to `size`."""

    gpa: int
    data: bytes
    size: int


class Image(NamedTuple):
    """A guest to load: where its pieces go and where it starts."""

    name: str
    kind: str
    """The boot protocol: "elf64" or "flat"."""
    entry: int
    segments: tuple[Segment, ...]
    cpuid_sites: tuple[int, ...]
    """Linear addresses of all its CPUID instructions, if it declares them; else empty."""
    user_word: str | None
    """What the image says of CPL 3: "" it never goes there; a word: only with that word on the command line; None:
    nothing is said."""

    @property
    def declares_itself(self) -> bool:
        """Whether it carries notes: then it is written for pyhv."""
        return self.user_word is not None or bool(self.cpuid_sites)

    def enters_user_mode(self, command_line: str) -> bool:
        """Whether it may execute CPUID at CPL 3, as far as it says; an image that says nothing may."""
        return self.user_word is None or (self.user_word != "" and self.user_word in command_line.split())


def read(path: str, memory_size: int) -> Image:
    """The image at `path`, for a guest with `memory_size` bytes of RAM. Raises BadInput with what is wrong with it."""
    data = _read_file(path, memory_size)
    if data[:4] == b"\x7fELF":
        from pyhv.boot import elf

        return elf.parse(data, path)
    if data[0x202:0x206] == b"HdrS":
        raise BadInput(path, "is a Linux kernel (bzImage)", "pyhv boots ELF64 images and flat binaries")
    from pyhv.boot import flat

    return flat.parse(data, path)


def _read_file(path: str, memory_size: int) -> bytes:
    try:
        # Not blocking: opening a FIFO would wait for a writer.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadInput(path, "is not a regular file", "give an image file or the name of a bundled guest")
            if status.st_size == 0:
                raise BadInput(path, "is empty")
            if status.st_size > memory_size:
                sizes = f"is {status.st_size} bytes, the guest has {memory_size} bytes of memory"
                raise BadInput(path, sizes, "give it more (--mem)")
            return file.read()
    except IsADirectoryError:
        raise BadInput(path, "is a directory", "give an image file or the name of a bundled guest") from None
    except OSError as error:
        raise BadInput(path, error.strerror or str(error)) from None
