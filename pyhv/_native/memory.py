"""A piece of memory that a guest can be given (struct pyhv_memory)."""

from __future__ import annotations

from typing import Any

from . import check, ffi, lib, new_error


class Memory:
    """`size` bytes (a multiple of 4096) of zeros, backed by a memfd; pages take memory when they are first touched.

    Raises HostError when the host refuses.
    """

    def __init__(self, size: int) -> None:
        self._memory: Any = ffi.new("struct pyhv_memory *")
        error = new_error()
        check(lib.pyhv_memory_create(self._memory, size, error), error)
        self.size = size
        self.fd: int = self._memory.fd
        self.view: Any = ffi.buffer(self._memory.host, size)

    @property
    def host(self) -> Any:
        """Where it is mapped in this process (uint8_t *)."""
        return self._memory.host

    def close(self) -> None:
        """Unmaps it. No VM may use it any more; closing twice is allowed."""
        lib.pyhv_memory_destroy(self._memory)
