"""What the emulator's CPUID shows is there: of each feature at least one instruction, or what it does.

In each mode where a processor has it, at CPL 0 and 3, whatever CR4.OSFXSR, CR0.TS and CR0.EM say, with the result that
the manuals give. A feature that is shown and has no row here fails the test. Sources: SDM Vol. 2 ("Exceptions" of each
instruction), Vol. 3 chapter "System Programming for Instruction Set Extensions"; APM Vol. 3 to 5.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pyhv._native.memory import Memory
from pyhv.accel import choose, long_mode
from pyhv.accel.data import Regs, Segment, Sregs, Stop
from pyhv.accel.emulator import FEATURES
from pyhv.cpu import features
from pyhv.cpu.table import CpuidTable, Registers
from tests.host import emulator

INVALID, NO_COPROCESSOR, PROTECTION, PAGE_FAULT = 6, 7, 13, 14


class Row(NamedTuple):
    """One piece of code of a feature.

    code: "before | what is tested | after", in gas's words. {m} is the memory at `m`.
    where: r 16-bit real mode, p 32-bit protected, c compatibility, l 64-bit. In the others it is #UD if `else_ud`.
    kind: what it depends on. "any": on none of x87's and SSE's switches; "x87", "mmx", "sse": see FAULTS.
    cpl3: "same", or "gp" where only the kernel may.
    """

    feature: str
    code: str
    before: dict[str, int]
    after: dict[str, int]
    where: str = "rpcl"
    kind: str = "any"
    m: bytes = b""
    cpl3: str = "same"
    else_ud: bool = False


#: By kind: the exception with CR4.OSFXSR 0, with CR0.TS, with CR0.EM; 0: none.
FAULTS = {
    "any": (0, 0, 0),
    "x87": (0, NO_COPROCESSOR, NO_COPROCESSOR),
    "mmx": (0, NO_COPROCESSOR, INVALID),
    "sse": (INVALID, NO_COPROCESSOR, INVALID),
}
_OSFXSR, _FSGSBASE, _TS, _EM = 1 << 9, 1 << 16, 1 << 3, 1 << 2
#: CR4's bits taken away, CR0's added.
SWITCHES = [(0, 0), (_OSFXSR, 0), (0, _TS), (0, _EM)]


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


_FXSAVE = struct.pack("<H22xI", 0x27F, 0x1F80).ljust(512, b"\0")
_TO_MM = "movd %eax, %mm0; movd %ecx, %mm1"
_TO_XMM = "movd %eax, %xmm0; movd %ecx, %xmm1"
_MM, _XMM = "movd %mm0, %edx; emms", "movd %xmm0, %edx"

_SAME_BYTES = [  # of registers and memory that are the same in each mode
    Row(
        "fpu",
        "| fninit; fildl {m}; fimull 4{m}; fistpl 8{m}; fwait | mov 8{m}, %eax",
        {},
        {"rax": 42},
        kind="x87",
        m=words(7, 6),
    ),
    Row("tsc", "| rdtsc | mov %eax, %esi; mov %edx, %ecx; rdtsc; sub %esi, %eax; sbb %ecx, %edx", {}, {"rdx": 0}),
    Row(
        "msr",
        "mov $0x174, %ecx; mov $0x1234, %eax; xor %edx, %edx | wrmsr | xor %eax, %eax; rdmsr",
        {},
        {"rax": 0x1234},
        cpl3="gp",
    ),
    Row(
        "cx8",
        "| cmpxchg8b {m} | sete %al; mov 4{m}, %edx",
        {"rax": 1, "rdx": 2, "rbx": 3, "rcx": 4},
        {"rax": 1, "rdx": 4},
        m=words(1, 2),
    ),
    Row(
        "cx8",
        "| lock cmpxchg8b {m} | sete %cl",
        {"rax": 9, "rdx": 2, "rbx": 3, "rcx": 4},
        {"rax": 1, "rdx": 2, "rcx": 0},
        m=words(1, 2),
    ),
    Row("cmov", "cmp %eax, %eax | cmovz %ecx, %edx; cmovnz %ecx, %esi", {"rcx": 5, "rsi": 6}, {"rdx": 5, "rsi": 6}),
    Row(
        "cmov",
        "fninit; fldz; fld1; cmp %eax, %eax | fcmove %st(1), %st | fistpl {m}; mov {m}, %edx",
        {},
        {"rdx": 0},
        kind="x87",
        m=words(9),
    ),
    Row("cmov", "fninit; fldz; fld1 | fcomi %st(1), %st | seta %al", {}, {"rax": 1}, kind="x87"),
    Row("clflush", "| clflush {m} | mov {m}, %eax", {}, {"rax": 5}, m=words(5)),
    Row(
        "mmx",
        f"{_TO_MM} | paddb %mm1, %mm0 | {_MM}",
        {"rax": 0x01FF7F80, "rcx": 0x01010101},
        {"rdx": 0x02008081},
        kind="mmx",
    ),
    Row("mmx", "| movq {m}, %mm0; movd %eax, %mm1; pcmpeqd %mm0, %mm0; emms |", {}, {}, kind="mmx"),
    Row("fxsr", "| fxrstor {m}; fxsave {m} | movzwl {m}, %eax", {}, {"rax": 0x27F}, kind="x87", m=_FXSAVE),
    Row(
        "sse",
        "movups {m}, %xmm0 | addps %xmm0, %xmm0 | movups %xmm0, {m}; mov {m}, %eax",
        {},
        {"rax": 0x40000000},
        kind="sse",
        m=words(0x3F800000),
    ),
    Row("sse", "| movups {m}, %xmm0 |", {}, {}, kind="sse"),
    Row("sse", "| ldmxcsr {m}; stmxcsr 4{m} | mov 4{m}, %eax", {}, {"rax": 0x1F80}, kind="sse", m=words(0x1F80)),
    Row("sse", "movups {m}, %xmm0 | cvttps2pi %xmm0, %mm0 | " + _MM, {}, {"rdx": 3}, kind="sse", m=words(0x40600000)),
    Row("sse", "| sfence; prefetchnta {m}; prefetcht0 {m} | mov {m}, %eax", {}, {"rax": 5}, m=words(5)),
    Row(
        "sse",
        f"{_TO_MM} | pmaxub %mm1, %mm0 | {_MM}",
        {"rax": 0x01FF7F80, "rcx": 0x02020202},
        {"rdx": 0x02FF7F80},
        kind="mmx",
    ),
    Row("mmxext", f"{_TO_MM} | pshufw $0xe1, %mm0, %mm0 | {_MM}", {"rax": 0x12345678}, {"rdx": 0x56781234}, kind="mmx"),
    Row(
        "mmxext",
        f"{_TO_MM} | pavgb %mm1, %mm0; psadbw %mm1, %mm0 | {_MM}",
        {"rax": 0x04040404, "rcx": 0},
        {"rdx": 8},
        kind="mmx",
    ),
    Row(
        "mmxext",
        "movd %eax, %mm0 | pinsrw $1, %ecx, %mm0; pextrw $1, %mm0, %eax; pmovmskb %mm0, %esi; movntq %mm0, {m} | emms",
        {"rcx": 0x8001},
        {"rax": 0x8001, "rsi": 8},
        kind="mmx",
    ),
    Row(
        "mmxext",
        "movd %eax, %mm0; movd %ecx, %mm1 | maskmovq %mm1, %mm0 | emms; mov {m}, %edx",
        {"rax": 0x11223344, "rcx": 0x80},
        {"rdx": 0x44},
        kind="mmx",
    ),
    Row("sse2", f"{_TO_XMM} | paddq %xmm1, %xmm0 | {_XMM}", {"rax": 5, "rcx": 6}, {"rdx": 11}, kind="sse"),
    Row(
        "sse2",
        "movups {m}, %xmm0 | addsd %xmm0, %xmm0; cvttsd2si %xmm0, %eax |",
        {},
        {"rax": 5},
        kind="sse",
        m=struct.pack("<d", 2.5),
    ),
    Row("sse2", "| movnti %eax, {m} | mov {m}, %edx", {"rax": 7}, {"rdx": 7}),
    Row("sse2", "| lfence; mfence; pause | mov $1, %eax", {}, {"rax": 1}),
    Row(
        "sse2",
        f"{_TO_MM} | paddq %mm1, %mm0; pmuludq %mm1, %mm0 | {_MM}",
        {"rax": 5, "rcx": 6},
        {"rdx": 66},
        kind="mmx",
    ),
    Row("sse2", f"{_TO_XMM} | movdq2q %xmm1, %mm0 | {_MM}", {"rcx": 6}, {"rdx": 6}, kind="sse"),
    Row(
        "pni",
        "movups {m}, %xmm0 | haddps %xmm0, %xmm0 | movd %xmm0, %eax",
        {},
        {"rax": 0x40400000},
        kind="sse",
        m=words(0x3F800000, 0x40000000),
    ),
    Row("pni", "| lddqu {m}, %xmm0 | " + _XMM, {}, {"rdx": 5}, kind="sse", m=words(5)),
    Row(
        "pni",
        "fninit; fldl {m} | fisttpl 8{m} | mov 8{m}, %eax",
        {},
        {"rax": 2},
        kind="x87",
        m=struct.pack("<d", 2.75),
    ),
    Row(
        "ssse3",
        f"{_TO_XMM} | pshufb %xmm1, %xmm0 | {_XMM}",
        {"rax": 0x11223344, "rcx": 0x00010203},
        {"rdx": 0x44332211},
        kind="sse",
    ),
    Row(
        "ssse3",
        f"{_TO_MM} | pshufb %mm1, %mm0 | {_MM}",
        {"rax": 0x11223344, "rcx": 0x00010203},
        {"rdx": 0x44332211},
        kind="mmx",
    ),
    Row(
        "ssse3",
        f"{_TO_MM} | palignr $2, %mm1, %mm0; pabsb %mm0, %mm0 | {_MM}",
        {"rax": 0x11223344, "rcx": 0xFF010000},
        {"rdx": 0x0000_0101},
        kind="mmx",
    ),
    Row("sse4_1", f"{_TO_XMM} | pmulld %xmm1, %xmm0 | {_XMM}", {"rax": 70000, "rcx": 3}, {"rdx": 210000}, kind="sse"),
    Row(
        "sse4_1",
        "pxor %xmm0, %xmm0 | pinsrd $2, %ecx, %xmm0; pextrd $2, %xmm0, %edx; ptest %xmm0, %xmm0 | setz %al",
        {"rcx": 7},
        {"rdx": 7, "rax": 0},
        kind="sse",
    ),
    Row(
        "sse4_1",
        "movups {m}, %xmm1 | roundss $1, %xmm1, %xmm0 | " + _XMM,
        {},
        {"rdx": 0x40000000},
        kind="sse",
        m=words(0x40200000),
    ),
    Row("sse4_2", f"{_TO_XMM} | pcmpgtq %xmm1, %xmm0 | {_XMM}", {"rax": 2, "rcx": 1}, {"rdx": 0xFFFFFFFF}, kind="sse"),
    Row(
        "sse4_2", f"{_TO_XMM} | pcmpistri $0, %xmm1, %xmm0 |", {"rax": 0x61, "rcx": 0x00616262}, {"rcx": 2}, kind="sse"
    ),
    Row("sse4_2", "| crc32b %cl, %eax; crc32w %cx, %eax; crc32l %ecx, %eax |", {"rax": 0, "rcx": 0}, {"rax": 0}),
    Row("sse4_2", "| crc32b %cl, %eax |", {"rax": 0xFFFFFFFF, "rcx": 0x61}, {"rax": 0x3E2FBCCF}),
    Row(
        "aes",
        "pxor %xmm0, %xmm0; pxor %xmm1, %xmm1 | aesenc %xmm1, %xmm0 | " + _XMM,
        {},
        {"rdx": 0x63636363},
        kind="sse",
    ),
    Row(
        "aes",
        "pxor %xmm0, %xmm0; pxor %xmm1, %xmm1 | aesdeclast %xmm1, %xmm0; aesimc %xmm0, %xmm0 | " + _XMM,
        {},
        {"rdx": 0x52525252},
        kind="sse",
    ),
    Row(
        "aes",
        "pxor %xmm1, %xmm1 | aeskeygenassist $1, %xmm1, %xmm0 | pextrw $2, %xmm0, %edx",
        {},
        {"rdx": 0x6362},
        kind="sse",
    ),
    Row(
        "pclmulqdq", f"{_TO_XMM} | pclmulqdq $0, %xmm1, %xmm0 | {_XMM}", {"rax": 7, "rcx": 7}, {"rdx": 0x15}, kind="sse"
    ),
    Row(
        "movbe",
        "| movbe {m}, %eax; movbe %ax, 4{m} | mov 4{m}, %edx",
        {},
        {"rax": 0x44332211, "rdx": 0x1122},
        m=words(0x11223344),
    ),
    Row("popcnt", "| popcnt %ecx, %eax; popcnt %cx, %dx |", {"rcx": 0xF00F0001}, {"rax": 9, "rdx": 1}),
    Row(
        "rdrand",
        "| 1: rdrand %ax; rdrand %ecx | setc %al; movzbl %al, %eax; test %ecx, %ecx; setnz %dl",
        {},
        {"rax": 1, "rdx": 1},
    ),
    Row("bmi1", "| tzcnt %ecx, %eax; tzcnt %edx, %esi | setc %dl", {"rcx": 8}, {"rax": 3, "rsi": 32, "rdx": 1}),
    Row(
        "abm", "| lzcnt %ecx, %eax; lzcnt %edx, %esi | setc %dl", {"rcx": 0x00010000}, {"rax": 15, "rsi": 32, "rdx": 1}
    ),
    Row("abm", "| popcnt %ecx, %eax |", {"rcx": 7}, {"rax": 3}),
    Row(
        "erms",
        "mov $8, %ecx; mov %edi, %esi; add $8, %edi | rep movsb | mov -8{m}, %eax",
        {},
        {"rax": 5, "rcx": 0},
        m=words(5),
    ),
    Row("erms", "mov $8, %ecx; mov $0x41, %al | rep stosb | mov -4{m}, %edx", {}, {"rdx": 0x41414141, "rcx": 0}),
    Row(
        "adx",
        "stc | adcx %ecx, %eax; adox %ecx, %edx | adc $0, %edx",
        {"rax": 1, "rcx": 0xFFFFFFFF},
        {"rax": 1, "rdx": 0},
    ),
    Row("clflushopt", "| clflushopt {m} | mov {m}, %eax", {}, {"rax": 5}, m=words(5)),
    Row("clwb", "| clwb {m} | mov {m}, %eax", {}, {"rax": 5}, m=words(5)),
    Row("rdtscp", "| rdtscp | ", {}, {"rcx": 0x1234}),
    Row(
        "3dnow",
        f"{_TO_MM} | pfadd %mm1, %mm0 | {_MM}",
        {"rax": 0x3F800000, "rcx": 0x40000000},
        {"rdx": 0x40400000},
        kind="mmx",
    ),
    Row("3dnow", "| femms |", {}, {}, kind="mmx"),
    Row("3dnow", "| prefetch {m}; prefetchw {m} | mov {m}, %eax", {}, {"rax": 5}, m=words(5)),
    Row("3dnowext", f"movq {{m}}, %mm1 | pswapd %mm1, %mm0 | {_MM}", {}, {"rdx": 6}, kind="mmx", m=words(5, 6)),
    Row("hypervisor", "mov $1, %eax | cpuid | shr $31, %ecx", {}, {"rcx": 1}),
    Row("mca", "mov $0x179, %ecx | rdmsr | test %al, %al; setnz %al; movzbl %al, %eax", {}, {"rax": 1}, cpl3="gp"),
    Row("mtrr", "mov $0xfe, %ecx | rdmsr | movzbl %al, %edx", {}, {"rdx": 8}, cpl3="gp"),
    Row(
        "mtrr",
        "mov $0x201, %ecx; mov $0x800, %eax; mov $0xff, %edx | wrmsr | xor %eax, %eax; xor %edx, %edx; rdmsr",
        {},
        {"rax": 0x800, "rdx": 0xFF},
        cpl3="gp",
    ),
    Row("pat", "mov $0x277, %ecx | rdmsr |", {}, {"rax": 0x00070406, "rdx": 0x00070406}, cpl3="gp"),
]

_VEX = [  # not in real mode
    Row("bmi1", "| andn %ecx, %eax, %edx | ", {"rax": 0xFF, "rcx": 0xFF0}, {"rdx": 0xF00}),
    Row("bmi1", "| bextr %eax, %ecx, %edx |", {"rax": 0x804, "rcx": 0x12345}, {"rdx": 0x34}),
    Row(
        "bmi1",
        "| blsi %ecx, %eax; blsmsk %ecx, %edx; blsr %ecx, %esi |",
        {"rcx": 0x18},
        {"rax": 8, "rdx": 0xF, "rsi": 0x10},
    ),
    Row("bmi2", "| bzhi %eax, %ecx, %edx |", {"rax": 8, "rcx": 0x12345}, {"rdx": 0x45}),
    Row("bmi2", "| mulx %ecx, %eax, %esi |", {"rdx": 0x10000, "rcx": 0x20000}, {"rsi": 2, "rax": 0}),
    Row(
        "bmi2",
        "| pdep %eax, %ecx, %edx; pext %eax, %ecx, %esi |",
        {"rax": 0xF0F0, "rcx": 0x12},
        {"rdx": 0x1020, "rsi": 1},
    ),
    Row("bmi2", "| rorx $4, %ecx, %eax |", {"rcx": 0x12345678}, {"rax": 0x81234567}),
    Row(
        "bmi2",
        "| sarx %eax, %ecx, %edx; shrx %eax, %ecx, %esi; shlx %eax, %ecx, %eax |",
        {"rax": 4, "rcx": 0x80000010},
        {"rdx": 0xF8000001, "rsi": 0x08000001, "rax": 0x100},
    ),
]

_LONG = [  # 64-bit mode alone
    Row("lm", "| mov %rax, %r8; mov %r8, %r15 | mov %r15, %rdx", {"rax": 1 << 40}, {"rdx": 1 << 40}),
    Row(
        "cx16",
        "| lock cmpxchg16b {m} | sete %al; mov 8{m}, %rdx",
        {"rax": 1, "rdx": 2, "rbx": 3, "rcx": 4},
        {"rax": 1, "rdx": 4},
        m=struct.pack("<2Q", 1, 2),
    ),
    Row("lahf_lm", "| sahf; lahf |", {"rax": 0xD700}, {"rax": 0xD700}),
    Row(
        "fsgsbase",
        "| wrfsbase %rax; rdfsbase %rdx; wrgsbase %rcx; rdgsbase %rsi |",
        {"rax": 1 << 40, "rcx": 5},
        {"rdx": 1 << 40, "rsi": 5},
    ),
    Row("fsgsbase", "| .byte 0xf3, 0x0f, 0xae, 0xc0 |", {}, {"rax": 0}),  # rdfsbase %eax
    Row("movbe", "| movbe {m}, %rax |", {}, {"rax": 0x44332211 << 32 | 0x88776655}, m=words(0x11223344, 0x55667788)),
    Row("popcnt", "| popcnt %rcx, %rax |", {"rcx": 1 << 40 | 1}, {"rax": 2}),
    Row("abm", "| lzcnt %rcx, %rax |", {"rcx": 1 << 40}, {"rax": 23}),
    Row("bmi1", "| tzcnt %rcx, %rax; blsr %rcx, %rdx |", {"rcx": 3 << 40}, {"rax": 40, "rdx": 2 << 40}),
    Row("bmi1", "| andn %r9, %r8, %rax |", {"r8": 1, "r9": 1 << 40 | 1}, {"rax": 1 << 40}),
    Row(
        "bmi2",
        "| shlx %rax, %rcx, %rdx; rorx $8, %rcx, %rsi |",
        {"rax": 40, "rcx": 1},
        {"rdx": 1 << 40, "rsi": 1 << 56},
    ),
    Row("bmi2", "| mulx %r9, %rax, %rsi |", {"rdx": 1 << 40, "r9": 1 << 40}, {"rsi": 1 << 16, "rax": 0}),
    Row(
        "adx",
        "stc | adcx %rcx, %rax; adox %rcx, %rdx |",
        {"rax": 1, "rcx": (1 << 64) - 1},
        {"rax": 1, "rdx": (1 << 64) - 1},
    ),
    Row("rdrand", "| rdrand %rcx | setc %al; shr $32, %rcx; setnz %dl", {}, {"rax": 1, "rdx": 1}),
    Row("sse4_2", "| crc32q %rcx, %rax |", {"rax": 0, "rcx": 0}, {"rax": 0}),
    Row(
        "sse4_1",
        "pxor %xmm0, %xmm0 | pinsrq $1, %rcx, %xmm0; pextrq $1, %xmm0, %rdx |",
        {"rcx": 1 << 40},
        {"rdx": 1 << 40},
        kind="sse",
    ),
    Row("sse2", "| movnti %rax, {m} | mov {m}, %rdx", {"rax": 1 << 40}, {"rdx": 1 << 40}),
]

ROWS = [
    *_SAME_BYTES,
    *(row._replace(where="pcl", else_ud=True) for row in _VEX),
    *(row._replace(where="l", else_ud=".byte" in row.code) for row in _LONG),
]

#: In 16-bit code the library gives these the operand size that they have in 32-bit code (docs/emulator.md).
OTHER_SIZE_IN_16_BITS = {"movbe", "popcnt"}

# ---------------------------------------------------------------------------------------------------- the machine

_PML4, _PDPT, _PD, _GDT, _TSS, _IDT, _HANDLERS = 0x1000, 0x2000, 0x3000, 0x4000, 0x4100, 0x5000, 0x7000
_GDT32, _TSS32, _IDT32 = 0x4200, 0x4300, 0x6000
_STACK, _STACK_0, _DATA, _CODE, _SLOT, _SIZE = 0x9000, 0xA000, 0xB000, 0x20000, 0x80, 0x200000
_IOPL = 0x3000
_WITH_ERROR = {8, 10, 11, 12, 13, 14, 17}


class Ran(NamedTuple):
    """How a piece of code ended: the exception (-1: a triple fault), at which of its bytes, and the registers then."""

    vector: int
    at: int
    regs: Regs


class Box:
    """A vCPU that executes pieces of code in any mode."""

    def __init__(self, table: CpuidTable, code: bytes = b"", irqchip: bool = False) -> None:
        self.memory = Memory(_SIZE)
        self.vm: Any = choose.open_accelerator("emulator").create_vm(irqchip=irqchip)
        self.vm.map(0, _SIZE, self.memory.host)
        self.vcpu: Any = self.vm.create_vcpu(0)
        self.vcpu.set_cpuid(table)
        self.reset = self.vcpu.get_sregs()
        self.set_msr(0xC0000103, 0x1234)
        everybody = long_mode.PRESENT | long_mode.WRITABLE | long_mode.USER
        self.put(_PML4, _PDPT | everybody)
        self.put(_PDPT, _PD | everybody)
        self.put(_PD, everybody | long_mode.LARGE_PAGE)
        self.memory.write(_GDT, long_mode.gdt(_TSS))
        self.memory.write(_TSS, long_mode.task_state(_STACK_0))
        self.memory.write(_HANDLERS, b"\xf4" * 256)
        for vector in range(32):
            handler = _HANDLERS + vector
            self.memory.write(vector * 4, struct.pack("<2H", handler, 0))
            self.memory.write(_IDT + vector * 16, long_mode.gate(handler))
            self.put(_IDT32 + vector * 8, handler | long_mode.CODE << 16 | 0x8E00 << 32)
        flat = (0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFF3000000FFFF, 0x00CFFB000000FFFF)
        for place, descriptor in enumerate(flat):
            self.put(_GDT32 + place * 8, descriptor)
        self.memory.write(_TSS32, struct.pack("<3I", 0, _STACK_0, long_mode.DATA))
        self.memory.write(_CODE, code)

    def put(self, place: int, value: int) -> None:
        self.memory.write(place, value.to_bytes(8, "little"))

    def set_msr(self, index: int, value: int) -> None:
        self.vcpu.write_msrs({index: value})

    def sregs(self, mode: str, cpl: int) -> Sregs:
        if mode == "r":
            flat = Segment(0, 0, 0xFFFF, 0x93)
            return self.reset._replace(
                cs=Segment(0, 0, 0xFFFF, 0x9B), ds=flat, es=flat, ss=flat, idt_limit=0x3FF, cr0=0x10, cr4=_OSFXSR
            )
        result = long_mode.sregs(self.reset, _PML4, _GDT, _TSS, _IDT, 0x1FF, cpl)
        if mode in "pc":
            result = result._replace(cs=result.cs._replace(attributes=0xC09B | cpl << 5))
        if mode == "p":
            tss = Segment(long_mode.TSS, _TSS32, 0x67, 0x8B)
            result = result._replace(
                cr0=0x33, cr4=_OSFXSR, efer=0, tr=tss, gdt_base=_GDT32, idt_base=_IDT32, idt_limit=0xFF
            )
        return result

    def run(self, sregs: Sregs, entry: int, regs: dict[str, int], rflags: int = _IOPL | 2) -> Ran:
        real = not sregs.cr0 & 1
        is_long = bool(sregs.efer & 0x400)
        if real:
            sregs = sregs._replace(cs=sregs.cs._replace(base=entry))
        self.vcpu.set_sregs(sregs)
        start = {"rdi": _DATA, "rsp": _STACK, "rip": 0 if real else entry, **regs}
        self.vcpu.set_regs(Regs(**start, rflags=rflags))
        stop = self.vcpu.run().stop
        after = self.vcpu.get_regs()
        if stop == Stop.TRIPLE_FAULT:
            return Ran(-1, after.rip - (0 if real else entry), after)
        assert stop == Stop.HALTED, (stop, hex(after.rip))
        vector = after.rip - _HANDLERS - 1
        width = 2 if real else 8 if is_long else 4
        place = after.rsp + (width if vector in _WITH_ERROR and not real else 0)
        at = int.from_bytes(self.memory.read(place, width), "little")
        return Ran(vector, at - (0 if real else entry), after)

    def __enter__(self) -> Box:
        return self

    def __exit__(self, *exception: object) -> None:
        self.vcpu.close()
        self.vm.close()
        self.memory.close()


def table_of(shown: AbstractSet[str], vendor: str = "AuthenticAMD") -> CpuidTable:
    """A table with these features, whatever this host's processor has."""
    name = struct.unpack("<3I", vendor.encode())
    entries = {(0, 0): [0xB, name[0], name[2], name[1]], (1, 0): [0x00A00F11, 0x800, 0, 0], (7, 0): [0, 0, 0, 0]}
    entries |= {
        (0x80000000, 0): [0x80000008, 0, 0, 0],
        (0x80000001, 0): [0, 0, 0, 0],
        (0x80000008, 0): [0x3028, 0, 0, 0],
    }
    for feature in features.FEATURES:
        if feature.name in shown or feature.mirrors in shown:
            key = feature.word.leaf, feature.word.subleaf
            entries[key][("eax", "ebx", "ecx", "edx").index(feature.word.register)] |= feature.mask
    return CpuidTable({key: Registers(*value) for key, value in entries.items()})


class Case(NamedTuple):
    row: Row
    mode: str
    whole: bool
    """All of the code, else what is tested alone."""


_MEMORY = {"r": "(%di)", "p": "(%edi)", "c": "(%edi)", "l": "(%rdi)"}
_BITS = {"r": 16, "p": 32, "c": 32, "l": 64}


def cases() -> list[Case]:
    return [
        Case(row, mode, whole)
        for row in ROWS
        for mode in "rpcl"
        if mode in row.where or row.else_ud
        for whole in (True, False)
    ]


def assemble(pieces: list[tuple[int, str]], folder: Path) -> tuple[bytes, list[int]]:
    """Code in slots of _SLOT bytes, each with UD2 at its end, and the length of each."""
    if shutil.which("as") is None or shutil.which("objcopy") is None:
        pytest.skip("no assembler")
    source, binary = folder / "code.s", folder / "code"
    lines = [f".org {n * _SLOT}\n.code{bits}\n{text}\n.balign 1\nud2" for n, (bits, text) in enumerate(pieces)]
    source.write_text("\n".join([*lines, ""]).replace("; ", "\n"))
    subprocess.run(["as", "--64", "-o", f"{binary}.o", str(source)], check=True)
    subprocess.run(["objcopy", "-O", "binary", f"{binary}.o", str(binary)], check=True)
    code = binary.read_bytes()
    slots = [code[n * _SLOT : (n + 1) * _SLOT].rstrip(b"\0") for n in range(len(pieces))]
    assert all(slot.endswith(b"\x0f\x0b") for slot in slots)
    return code, [len(slot) - 2 for slot in slots]


@pytest.fixture(autouse=True)
def _emulator() -> None:
    emulator.require()


def wrong(box: Box, case: Case, entry: int, length: int, cpl: int, off: int, on: int) -> str:
    """What is wrong with one execution, or ""."""
    row, mode = case.row, case.mode
    sregs = box.sregs(mode, cpl)
    sregs = sregs._replace(cr4=(sregs.cr4 | _FSGSBASE) & ~off, cr0=sregs.cr0 | on)
    fault = FAULTS[row.kind][SWITCHES.index((off, on)) - 1] if off or on else 0
    if cpl and row.cpl3 == "gp":
        fault = PROTECTION
    if mode not in row.where:
        fault = INVALID
    if fault and case.whole:
        return ""
    mask = (1 << 64) - 1 if mode == "l" else (1 << 32) - 1
    box.memory.write(_DATA, row.m.ljust(512, b"\0"))
    ran = box.run(sregs, entry, {name: value & mask for name, value in row.before.items()})
    if fault:
        return "" if (ran.vector, ran.at) == (fault, 0) else f"exception {ran.vector} at {ran.at}, not {fault} at 0"
    if (ran.vector, ran.at) != (INVALID, length):
        return f"exception {ran.vector} at {ran.at}"
    if not case.whole:
        return ""
    for name, value in row.after.items():
        if getattr(ran.regs, name) & mask != value & mask and (mode != "r" or row.feature not in OTHER_SIZE_IN_16_BITS):
            return f"{name} is 0x{getattr(ran.regs, name):x}, not 0x{value:x}"
    return ""


def test_instructions_of_what_is_shown(tmp_path: Path) -> None:
    every = cases()
    pieces = []
    for case in every:
        parts = case.row.code.replace("{m}", _MEMORY[case.mode]).split("|")
        chosen = parts if case.whole else parts[1:2]
        pieces.append((_BITS[case.mode], "; ".join(part.strip() for part in chosen if part.strip())))
    code, lengths = assemble(pieces, tmp_path)
    assert len(code) < _SIZE - _CODE
    found = []
    with Box(table_of(FEATURES), code) as box:
        for number, (case, length) in enumerate(zip(every, lengths, strict=True)):
            for cpl in (0,) if case.mode == "r" else (0, 3):
                for off, on in SWITCHES:
                    if what := wrong(box, case, _CODE + number * _SLOT, length, cpl, off, on):
                        switch = "no OSFXSR" if off else {0: "", _TS: "TS", _EM: "EM"}[on]
                        text = case.row.code if case.whole else case.row.code.split("|")[1]
                        where = f"mode {case.mode}, CPL {cpl} {switch}"
                        found.append(f"{case.row.feature}: {text.strip()}: {where}: {what}")
    assert found == []


#: What 64-bit mode and these tests rest on, and is not hidden in them.
NEEDED = frozenset("fpu pse tsc msr pae cx8 apic pge cmov fxsr sse sse2 mmx syscall nx lm".split())

#: What runs although its feature is hidden: docs/emulator.md lists it. Not named: what is no instruction of its own.
HIDDEN_AND_RUN = {
    "mmxext": {"pshufw", "pavgb", "pinsrw", "maskmovq"},
    "pni": {"haddps", "lddqu", "fisttpl"},
    "bmi1": {"tzcnt"},
    "abm": {"lzcnt"},
    "3dnow": {"prefetch"},
}
_NOT_ITS_OWN = {"erms", "hypervisor", "mca", "mtrr", "pat"}


def test_what_is_hidden_is_invalid_or_listed(tmp_path: Path) -> None:
    hidden = [
        case
        for case in cases()
        if not case.whole and case.mode in case.row.where and case.row.feature not in NEEDED | _NOT_ITS_OWN
    ]
    pieces = [
        (_BITS[case.mode], case.row.code.replace("{m}", _MEMORY[case.mode]).split("|")[1].strip()) for case in hidden
    ]
    code, _ = assemble(pieces, tmp_path)
    ran: dict[str, set[str]] = {}
    with Box(table_of(NEEDED), code) as box:
        for number, (case, piece) in enumerate(zip(hidden, pieces, strict=True)):
            end = box.run(box.sregs(case.mode, 0), _CODE + number * _SLOT, {})
            if (end.vector, end.at) != (INVALID, 0):
                ran.setdefault(case.row.feature, set()).add(piece[1].split()[0])
    assert ran == HIDDEN_AND_RUN


# ------------------------------------------------------------------------------------- what is no instruction

_USERS = 1 << 21  # where the user's pages are, in tests of what the kernel may do with them
_NX, _PSE, _PAE, _PGE, _DE, _MCE, _TSD = 1 << 63, 1 << 4, 1 << 5, 1 << 7, 1 << 3, 1 << 6, 1 << 2
_SMEP, _SMAP, _PG = 1 << 20, 1 << 21, 1 << 31
_READ = bytes.fromhex("8b07 0f0b")  # mov (%rdi), %eax; ud2
_JUMP = bytes.fromhex("ffe0 0f0b")  # jmp *%rax


def box_with(code: str | bytes, vendor: str = "AuthenticAMD", irqchip: bool = False) -> Box:
    code = bytes.fromhex(code) if isinstance(code, str) else code
    box = Box(table_of(FEATURES, vendor), code, irqchip)
    box.memory.write(_DATA, words(0x1234))
    return box


def reads(box: Box, sregs: Sregs, place: int) -> int:
    ran = box.run(sregs, _CODE, {"rdi": place})
    assert (ran.vector, ran.at) == (INVALID, 2)
    return ran.regs.rax


def error_code(box: Box, ran: Ran) -> int:
    return int.from_bytes(box.memory.read(ran.regs.rsp, 8), "little")


def pse() -> None:
    with box_with(_READ) as box:
        box.put(0x1000, 0x83 | 0x83 << 32)  # 4 MiB, and again
        sregs = box.sregs("p", 0)._replace(cr0=0x33 | _PG, cr3=0x1000, cr4=_OSFXSR | _PSE)
        assert reads(box, sregs, _DATA + (4 << 20)) == 0x1234


def pse36() -> None:
    with box_with(_READ) as box:
        box.put(0x1000, 0x83 | (0x83 | 1 << 13) << 32)  # the second is at 4 GiB, where there is no RAM
        sregs = box.sregs("p", 0)._replace(cr0=0x33 | _PG, cr3=0x1000, cr4=_OSFXSR | _PSE)
        assert reads(box, sregs, _DATA + (4 << 20)) == 0xFFFFFFFF


def pae() -> None:
    with box_with(_READ) as box:
        box.put(0x1000, 0x2001)
        box.put(0x1008, 0)
        box.put(0x2000, 0x83)
        box.put(0x2008, 0x83)
        sregs = box.sregs("p", 0)._replace(cr0=0x33 | _PG, cr3=0x1000, cr4=_OSFXSR | _PAE)
        assert reads(box, sregs, _DATA + (2 << 20)) == 0x1234


def pdpe1gb() -> None:
    with box_with(_READ) as box:
        box.put(_PDPT + 8, 0x87)
        assert reads(box, box.sregs("l", 3), _DATA + (1 << 30)) == 0x1234


def pge() -> None:
    # mov (%rdi), %eax; mov %rcx, (%rsi); mov %cr3, %rdx; mov %rdx, %cr3; mov (%rdi), %edx; invlpg (%rdi);
    # mov (%rdi), %edx; ud2
    with box_with("8b07 48890e 0f20da 0f22da 8b17 0f013f 8b17 0f0b") as box:
        box.put(_PD + 8, 0x187)
        box.put(_PD + 16, 0)
        regs = {"rdi": _USERS + _DATA, "rsi": _PD + 8, "rcx": 1 << 32 | 0x187}
        sregs = box.sregs("l", 0)
        ran = box.run(sregs._replace(cr4=sregs.cr4 | _PGE), _CODE, regs)
        assert (ran.vector, ran.regs.rax, ran.regs.rdx) == (INVALID, 0x1234, 0xFFFFFFFF)


def nx() -> None:
    with box_with(_JUMP) as box:
        box.put(_PD + 8, 0x87 | _NX)
        sregs = box.sregs("l", 0)
        ran = box.run(sregs._replace(efer=sregs.efer | 0x800), _CODE, {"rax": _USERS + _CODE + 2})
        assert (ran.vector, ran.at, error_code(box, ran)) == (PAGE_FAULT, _USERS + 2, 0x11)


def kernel_and_user(code: str) -> Box:
    box = box_with(code)
    box.put(_PD, 0x83)
    box.put(_PD + 8, 0x87)
    return box


def smep() -> None:
    for cr4, vector in ((0, INVALID), (_SMEP, PAGE_FAULT)):
        with kernel_and_user("ffe0 0f0b") as box:
            sregs = box.sregs("l", 0)
            ran = box.run(sregs._replace(cr4=sregs.cr4 | cr4), _CODE, {"rax": _USERS + _CODE + 2})
            assert (ran.vector, ran.at) == (vector, _USERS + 2)


def smap() -> None:
    # stac; mov (%rdi), %eax; clac; mov (%rdi), %edx
    with kernel_and_user("0f01cb 8b07 0f01ca 8b17 0f0b") as box:
        sregs = box.sregs("l", 0)
        ran = box.run(sregs._replace(cr4=sregs.cr4 | _SMAP), _CODE, {"rdi": _USERS + _DATA})
        assert (ran.vector, ran.at, ran.regs.rax, error_code(box, ran)) == (PAGE_FAULT, 8, 0x1234, 1)


def de() -> None:
    for cr4, at in ((0, 3), (_DE, 0)):
        with box_with("0f21e0 0f0b") as box:  # mov %dr4, %rax
            sregs = box.sregs("l", 0)
            ran = box.run(sregs._replace(cr4=sregs.cr4 | cr4), _CODE, {})
            assert (ran.vector, ran.at) == (INVALID, at)


def mce() -> None:
    with box_with("0f22e0 0f20e2 0f0b") as box:  # mov %rax, %cr4; mov %cr4, %rdx
        sregs = box.sregs("l", 0)
        ran = box.run(sregs, _CODE, {"rax": sregs.cr4 | _MCE})
        assert (ran.vector, ran.at, ran.regs.rdx) == (INVALID, 6, sregs.cr4 | _MCE)


def apic() -> None:
    with box_with(_READ, irqchip=True) as box:
        box.put(_PDPT + 3 * 8, 3 << 30 | 0x87)
        ran = box.run(box.sregs("l", 0)._replace(idt_limit=0), _CODE, {"rdi": 0xFEE00030})
        assert (ran.vector, ran.at, ran.regs.rax & 0xF0) == (-1, 2, 0x10)


def syscall() -> None:
    with box_with("0f05 0f0b 90 0f0b") as box:
        box.set_msr(0xC0000081, (long_mode.USER_CODE - 16) << 48 | long_mode.CODE << 32)
        box.set_msr(0xC0000082, _CODE + 5)
        box.set_msr(0xC0000083, _CODE + 5)
        for mode in "lc":
            sregs = box.sregs(mode, 3)
            ran = box.run(sregs._replace(efer=sregs.efer | 1), _CODE, {})
            assert (ran.vector, ran.at, ran.regs.rcx) == (INVALID, 5, _CODE + 2)
            ran = box.run(sregs, _CODE, {})
            assert (ran.vector, ran.at) == (INVALID, 0)


def sep() -> None:
    """An AMD processor has SYSENTER outside of long mode only."""
    for vendor, modes in (("AuthenticAMD", "p"), ("GenuineIntel", "pcl")):
        with box_with("0f34 0f0b 90 0f0b", vendor) as box:
            box.set_msr(0x174, long_mode.CODE)
            box.set_msr(0x175, _STACK_0)
            box.set_msr(0x176, _CODE + 5)
            for mode in modes:
                ran = box.run(box.sregs(mode, 3), _CODE, {})
                assert (ran.vector, ran.at) == (INVALID, 5)


def cr8_legacy() -> None:
    for mode in "pc":
        with box_with("f00f20c0 0f0b") as box:  # lock mov %cr0, %eax
            ran = box.run(box.sregs(mode, 0)._replace(cr8=5), _CODE, {})
            assert (ran.vector, ran.at, ran.regs.rax) == (INVALID, 4, 5)


def lm() -> None:
    """A task priority, and that it is read as it is."""
    with box_with("440f20c0 440f22c1 440f20c2 0f0b") as box:  # mov %cr8, %rax; mov %rcx, %cr8; mov %cr8, %rdx
        ran = box.run(box.sregs("l", 0)._replace(cr8=5), _CODE, {"rcx": 7})
        assert (ran.vector, ran.at, ran.regs.rax, ran.regs.rdx) == (INVALID, 12, 5, 7)
        assert box.vcpu.get_sregs().cr8 == 7


BEHAVIOURS = [pse, pse36, pae, pdpe1gb, pge, nx, smep, smap, de, mce, apic, syscall, sep, cr8_legacy, lm]


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda behaviour: behaviour.__name__)
def test_behaviour_of_what_is_shown(behaviour: Callable[[], None]) -> None:
    behaviour()


@pytest.mark.parametrize(("code", "cpl", "cr4"), [("0f31", 3, _TSD), ("0f01f9", 3, _TSD)], ids=["rdtsc", "rdtscp"])
def test_the_counter_can_be_kept_from_the_user(code: str, cpl: int, cr4: int) -> None:
    with box_with(code + "0f0b") as box:
        sregs = box.sregs("l", cpl)
        ran = box.run(sregs._replace(cr4=sregs.cr4 | cr4), _CODE, {})
        assert (ran.vector, ran.at) == (PROTECTION, 0)


def test_fsgsbase_is_switched_on_by_the_kernel() -> None:
    with box_with("f3480faec0 0f0b") as box:
        assert box.run(box.sregs("l", 3), _CODE, {}).at == 0


def test_nothing_is_shown_without_a_row() -> None:
    """By default, in compatibility mode (which shows less), and on any host: by the list of what is ever shown."""
    shown = choose.open_accelerator("emulator").describe().table.features()
    mirrors = {feature.name: feature.mirrors for feature in features.FEATURES if feature.mirrors}
    tested = {row.feature for row in ROWS} | {behaviour.__name__ for behaviour in BEHAVIOURS}
    assert {mirrors.get(name, name) for name in shown | FEATURES} - tested == set()
    assert tested - FEATURES == set()
