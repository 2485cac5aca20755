"""Flat binaries: the whole file is loaded at 1 MiB and entered at its first byte, in 64-bit mode (see start64.py)."""

from __future__ import annotations

from pyhv.boot.image import Image, Segment
from pyhv.boot.start64 import LOAD_BASE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyhv.boot.image import Content


def parse(data: Content, name: str) -> Image:
    """The image for the file's bytes."""
    return Image(name, "flat", LOAD_BASE, (Segment(LOAD_BASE, memoryview(data), len(data)),), (), None)
