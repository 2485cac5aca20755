"""A piece of memory that a guest can be given (struct pyhv_memory)."""

from __future__ import annotations

from . import check, ffi, lib, new_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Memory:
    """`size` bytes (a multiple of 4096), fd the descriptor behind them, offset where they stand in it.

    Without `file` they are zeros in a memfd; pages take memory when they are first touched. With `file`, a descriptor
    and an offset, they are that part of the file, mapped privately. `anonymous`: zeros in no file at all, in huge pages
    where the host has them, for memory that is to be filled. Raises HostError when the host refuses.
    """

    def __init__(self, size: int, file: tuple[int, int] | None = None, anonymous: bool = False) -> None:
        self.handle: Any = ffi.new("struct pyhv_memory *")
        error = new_error()
        if anonymous:
            check(lib.pyhv_memory_create_anonymous(self.handle, size, error), error)
        elif file is None:
            check(lib.pyhv_memory_create(self.handle, size, error), error)
        else:
            check(lib.pyhv_memory_map_file(self.handle, *file, size, error), error)
        self.size = size
        self.fd: int = self.handle.fd
        self.offset: int = self.handle.offset
        self.of_a_file = bool(self.handle.of_a_file)
        """Whether the process has pages of its own, which are not in what fd is."""
        self.host: Any = self.handle.host
        """Where it is mapped in this process (uint8_t *)."""

    def read(self, offset: int, size: int) -> bytes:
        """A part of it. Raises HostError where the file behind it has become shorter."""
        buffer, error = ffi.new("uint8_t[]", size), new_error()
        check(lib.pyhv_memory_read(self.host + offset, buffer, size, error), error)
        return bytes(ffi.buffer(buffer))

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Changes a part of it. Raises HostError likewise."""
        error = new_error()
        check(lib.pyhv_memory_write(self.host + offset, ffi.from_buffer(data), len(data), error), error)

    def close(self) -> None:
        """Unmaps it. No VM may use it any more; closing twice is allowed."""
        lib.pyhv_memory_destroy(self.handle)
