"""The kinds of hosts that the lab can start: which emulator, which processor, which generation."""

from __future__ import annotations

from typing import NamedTuple

from .errors import LabError

#: Every SVM processor has the last two; QEMU's models Opteron_G2 to G5 lack both and phenom the second.
_EVERY_SVM = "+svm,+npt,+mmxext,+cr8legacy"


class Kind(NamedTuple):
    name: str
    vendor: str  # "amd": QEMU with kvm_amd inside; "intel": Bochs with kvm_intel inside
    model: str  # QEMU's -cpu, or Bochs' cpu model
    year: int  # in which processors like it came out
    title: str
    #: The kernel inside is told that its TSC runs at this multiple of the true rate, so that its clocks, and with them
    #: its KVM, are those of a machine with another rate; its seconds are as many times longer.
    tsc_factor: float = 1.0


def _amd(name: str, model: str, extra: str, year: int, title: str, tsc_factor: float = 1.0) -> Kind:
    flags = _EVERY_SVM + (f",{extra}" if extra else "")
    return Kind(name, "amd", f"{model},{flags}", year, title, tsc_factor)


KINDS = {
    kind.name: kind
    for kind in (
        # The model has no 3DNow!, which every K8 had. It has no CMPXCHG16B either, which every SVM processor has.
        _amd("amd-opteron-g1", "Opteron_G1", "+3dnow,+3dnowext", 2003, "K8 without CMPXCHG16B: a host to refuse"),
        _amd("amd-opteron-g2", "Opteron_G2", "", 2006, "K8 revision F: CMPXCHG16B, nothing newer"),
        _amd("amd-opteron-g3", "Opteron_G3", "", 2007, "K10: SSE4A, POPCNT, LZCNT"),
        _amd("amd-phenom", "phenom", "", 2007, "K10 with 3DNow! and 1 GiB pages"),
        # Without XSAVEOPT the kernel hangs early in its start.
        _amd("amd-opteron-g4", "Opteron_G4", "+xsaveopt", 2011, "Bulldozer: SSSE3, SSE4, AES, XSAVE, AVX"),
        _amd("amd-opteron-g5", "Opteron_G5", "+xsaveopt", 2012, "Piledriver: and F16C, FMA"),
        _amd("amd-epyc", "EPYC", "", 2017, "Zen: and AVX2, MOVBE, BMI, SMEP, SMAP, RDRAND"),
        _amd("amd-epyc-rome", "EPYC-Rome", "", 2019, "Zen 2: and CLWB, UMIP"),
        _amd("amd-epyc-milan", "EPYC-Milan", "", 2020, "Zen 3: and ERMS, PKU"),
        _amd("amd-epyc-tsc", "EPYC", "", 2017, "Zen whose TSC runs at another rate than the others'", 1.25),
        Kind("intel-penryn", "intel", "core2_penryn_t9600", 2008, "Core 2: SSE4.1, XSAVE; no EPT"),
        Kind("intel-lynnfield", "intel", "corei5_lynnfield_750", 2009,
             "Nehalem: SSE4.2, POPCNT, EPT for paging guests only"),
        Kind("intel-sandybridge", "intel", "corei7_sandy_bridge_2600k", 2011, "Sandy Bridge: AVX, AES"),
        Kind("intel-haswell", "intel", "corei7_haswell_4770", 2013, "Haswell: AVX2, FMA, BMI, MOVBE"),
    )
}  # fmt: skip


def find(name: str) -> Kind:
    """The kind of this name. Raises LabError naming the nearest ones."""
    if name in KINDS:
        return KINDS[name]
    import difflib

    near = difflib.get_close_matches(name, KINDS, 3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(KINDS)}"
    raise LabError(f"{name}: no such kind of host; {hint}")
