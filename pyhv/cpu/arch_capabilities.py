"""IA32_ARCH_CAPABILITIES (SDM Vol. 4; Intel's articles on speculative execution): what a processor says there of its
weaknesses, what a guest is told, and which host can keep it.

A guest that was told that something is harmless, or is there, may rely on it wherever it runs: a host without it is no
host for this guest. A bit that asks for care is the other way round: a host that needs care is no host for a guest that
was not told so. Bits that are not here are not shown: nobody knows which way round they are.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

IA32_ARCH_CAPABILITIES = 0x10A


class Capability(NamedTuple):
    """One bit. sense: "there": the host must have it too; "care": the guest must have been told."""

    bit: int
    name: str
    sense: Literal["there", "care"]

    @property
    def mask(self) -> int:
        return 1 << self.bit


CAPABILITIES: tuple[Capability, ...] = (
    Capability(0, "RDCL_NO", "there"),
    Capability(1, "IBRS_ALL", "there"),
    Capability(2, "RSBA", "care"),
    Capability(3, "SKIP_L1DFL_VMENTRY", "there"),
    Capability(4, "SSB_NO", "there"),
    Capability(5, "MDS_NO", "there"),
    Capability(6, "IF_PSCHANGE_MC_NO", "there"),
    Capability(7, "TSX_CTRL", "there"),
    Capability(8, "TAA_NO", "there"),
    Capability(13, "SBDR_SSDP_NO", "there"),
    Capability(14, "FBSDP_NO", "there"),
    Capability(15, "PSDP_NO", "there"),
    Capability(17, "FB_CLEAR", "there"),
    Capability(19, "RRSBA", "care"),
    Capability(20, "BHI_NO", "there"),
    Capability(24, "PBRSB_NO", "there"),
    Capability(26, "GDS_NO", "there"),
    Capability(27, "RFDS_NO", "there"),
    Capability(28, "RFDS_CLEAR", "there"),
    Capability(62, "ITS_NO", "there"),
)

_KNOWN = sum(c.mask for c in CAPABILITIES)
_CARE = sum(c.mask for c in CAPABILITIES if c.sense == "care")


def shown(offered: int, moving: bool) -> int:
    """What a new guest is told where the host offers this value. moving: it is to move among hosts, some of which may
    need care that this one does not."""
    return offered & _KNOWN | (_CARE if moving else 0)


def lacking(guest: int, host: int) -> list[str]:
    """What the guest was told that a host with this value does not have: names of bits."""
    known = [c.name for c in CAPABILITIES if c.sense == "there" and guest & c.mask and not host & c.mask]
    return known + [f"bit {bit}" for bit in range(64) if guest & ~_KNOWN & ~host & 1 << bit]


def untold(guest: int, host: int) -> list[str]:
    """What needs care on that host, of which the guest was not told."""
    return [c.name for c in CAPABILITIES if c.sense == "care" and host & c.mask and not guest & c.mask]
