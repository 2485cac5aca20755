"""The thin wrapper over the C engine (csrc/pyhv.h): no logic, errors become exceptions."""

from __future__ import annotations

from pyhv.errors import HostError

from ._pyhv import ffi as _ffi
from ._pyhv import lib as _lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# cffi's objects have no static types; every use of them is in the modules that wrap one C object each.
ffi: Any = _ffi
lib: Any = _lib


def new_error() -> Any:
    """A fresh struct pyhv_error to hand to a call."""
    return ffi.new("struct pyhv_error *")


def to_exception(error: Any) -> HostError:
    """The exception for a filled struct pyhv_error."""
    what = ffi.string(error.what).decode("ascii", "replace")
    return HostError(what, error.errnum, ffi.string(error.detail).decode("utf-8", "replace"))


def check(result: Any, error: Any) -> Any:
    """The result of a C call that returns -1 or NULL on failure; raises HostError then."""
    if result == ffi.NULL if isinstance(result, ffi.CData) else result < 0:
        raise to_exception(error)
    return result


def cpuid(leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
    """EAX, EBX, ECX, EDX as the processor that runs this code answers."""
    out = ffi.new("uint32_t[4]")
    lib.pyhv_cpuid_host(leaf, subleaf, out)
    return out[0], out[1], out[2], out[3]
