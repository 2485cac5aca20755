"""Builds the C engine as a Python extension (cffi, API mode): the compiler itself checks every declaration."""

import os
import re
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"


def declarations(header: str) -> str:
    """What cffi reads of pyhv.h: everything but the preprocessor's lines; integer #defines stay."""
    header = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    lines = (line for line in header.splitlines() if not line.startswith("#") or re.match(r"#define \w+ +\d+$", line))
    return "\n".join(lines)


# setuptools wants the paths relative to the project's root, where the build runs.
sources = sorted(str(path.relative_to(ROOT)) for path in CSRC.glob("**/*.c"))

ffibuilder = FFI()
ffibuilder.cdef(declarations((CSRC / "pyhv.h").read_text(encoding="utf-8")))
ffibuilder.set_source(
    "pyhv._native._pyhv",
    '#include "pyhv.h"',
    sources=sources,
    depends=sorted(str(path.relative_to(ROOT)) for path in CSRC.glob("**/*.h")),
    include_dirs=["csrc"],
    # PYHV_CFLAGS: our own builds add -Werror and sanitizers; a warning of a newer compiler must not fail a user's.
    extra_compile_args=[
        "-std=c11",
        "-D_GNU_SOURCE",
        "-O2",
        "-g",
        "-Wall",
        "-Wextra",
        "-fvisibility=hidden",
        *os.environ.get("PYHV_CFLAGS", "").split(),
    ],
    extra_link_args=os.environ.get("PYHV_LDFLAGS", "").split(),
)
