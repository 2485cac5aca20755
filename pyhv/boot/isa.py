"""Whether the guest's processor has the x86-64 level that an image says it needs.

Source: AMD64 ABI supplement, "Low-Level System Information", table of micro-architecture levels.
"""

from __future__ import annotations

from pyhv.cpu import features
from pyhv.errors import BadInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyhv.boot.image import Image
    from pyhv.cpu.policy import GuestCpu

# What each level adds to the one before. OSXSAVE, which the table lists, is the kernel's to set.
LEVELS = {
    2: ("cx16", "lahf_lm", "popcnt", "sse3", "sse4_1", "sse4_2", "ssse3"),
    3: ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "lzcnt", "movbe", "xsave"),
    4: ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
}


def check(image: Image, guest: GuestCpu) -> None:
    """Raises BadInput, with every feature that is missing, for an image that could not run."""
    needed = [features.find(name).name for level in range(2, image.isa_level + 1) for name in LEVELS[level]]
    missing = [name for name in needed if name not in guest.visible]
    if missing:
        raise BadInput(
            image.name,
            f"needs x86-64-v{image.isa_level}, which profile {guest.profile} cannot give on this host: "
            f"without {', '.join(missing)}",
            "choose another processor profile, or an image built for the baseline",
        )
