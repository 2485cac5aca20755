"""The state in which PVH and multiboot kernels start: 32-bit protected mode, flat segments, no paging."""

from __future__ import annotations

from pyhv.accel.data import Segment, Sregs

CODE, DATA = 0x08, 0x10
_TSS = 0x18
_CR0 = 0x11  # ET, PE


def sregs(reset: Sregs) -> Sregs:
    """Registers of a vCPU there; RFLAGS.IF and VM are clear after reset. reset: its registers then.

    The selectors stand for no descriptor table: both protocols want kernels to load their own before they use one.
    """
    data = Segment(DATA, 0, 0xFFFFFFFF, 0xC093)
    return reset._replace(
        cs=Segment(CODE, 0, 0xFFFFFFFF, 0xC09B),
        ds=data,
        es=data,
        fs=data,
        gs=data,
        ss=data,
        tr=Segment(_TSS, 0, 0x67, 0x008B),
        ldt=Segment(0, 0, 0, 1 << 16),
        cr0=_CR0,
        cr3=0,
        cr4=0,
        efer=0,
    )
