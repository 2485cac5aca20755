"""Does this accelerator show a guest what its CPUID table says, and nothing else? Asked of a guest, not of the kernel.

The probe gives a vCPU a table that hides as much as can be hidden, from an invented vendor, and executes CPUID for
every feature word at CPL 0 and at CPL 3. Whatever it sees beyond the table cannot be hidden on this host. A few
milliseconds, once per process: nothing is kept on disk, for modules are reloaded and nested hosts move.
"""

from __future__ import annotations

import struct
import threading

from pyhv._native.memory import Memory
from pyhv.accel import long_mode
from pyhv.accel.data import Regs, Stop
from pyhv.cpu import features
from pyhv.cpu.feature_types import Word
from pyhv.cpu.host import Verdict
from pyhv.cpu.table import CpuidTable, Registers
from pyhv.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyhv.accel.engine import AccelVcpu, AccelVm
    from pyhv.accel.protocol import Accelerator

# For each of R8 pairs (leaf, subleaf) at RSI: CPUID, its four registers to RDI. Ends with #UD, whose handler halts.
_CODE = bytes.fromhex(
    "8b06"  # collect: mov eax, [rsi]
    "8b4e04"  #        mov ecx, [rsi+4]
    "0fa2"  #          cpuid
    "8907"  #          mov [rdi], eax
    "895f04"  #        mov [rdi+4], ebx
    "894f08"  #        mov [rdi+8], ecx
    "89570c"  #        mov [rdi+12], edx
    "4883c608"  #      add rsi, 8
    "4883c710"  #      add rdi, 16
    "41ffc8"  #        dec r8d
    "75e1"  #          jnz collect
    "0f0b"  #          ud2
    "f4"  #            hlt
)
_CPUID_OFFSET = 5
_HANDLER_OFFSET = len(_CODE) - 1
_UD_VECTOR = 6

# The probe's 64 KiB: page tables, descriptor tables, code, stack, questions, answers.
_PML4, _PDPT, _PD, _GDT, _TSS, _IDT, _ENTRY = 0x1000, 0x2000, 0x3000, 0x4000, 0x4100, 0x5000, 0x6000
_STACK_TOP, _QUESTIONS, _ANSWERS, _SIZE = 0x9000, 0x9000, 0xA000, 0x10000

_VENDOR = b"pyhv invents"
_TIMEOUT = 2.0  # seconds; the probe takes a few milliseconds

# What 64-bit mode itself rests on; hiding it could confuse the accelerator rather than test it.
_NEEDED = "fpu pse tsc msr pae cx8 apic pge cmov fxsr sse sse2 syscall nx lm".split()

_verdicts: dict[str, Verdict] = {}
_traps: dict[tuple[str, bool, int], bool] = {}


def verdict(accelerator: Accelerator) -> Verdict:
    """The probe's verdict on the accelerator; it runs once per process. Raises HostError if it cannot be run."""
    found = _verdicts.get(accelerator.name)
    if found is None:
        found = _verdicts[accelerator.name] = _probe(accelerator)
    return found


def trap_works(accelerator: Accelerator, by_steps: bool, cpl: int) -> bool:
    """Whether `trap` sees a CPUID at this privilege level on this host, by stepping or by breakpoints: tried out, each
    once per process. Not every KVM's guest debug does all that it accepts: some ignore breakpoints, some hand what
    happens at CPL 3 to the guest. Raises HostError if it cannot be tried."""
    key = accelerator.name, by_steps, cpl
    if key not in _traps:
        _traps[key] = _try_trap(accelerator, by_steps, cpl)
    return _traps[key]


def _try_trap(accelerator: Accelerator, by_steps: bool, cpl: int) -> bool:
    """Whether the probe's one CPUID is answered from the trap's table."""
    table = least_table()
    answer = table.get(0)._replace(ebx=struct.unpack("<I", b"trap")[0])
    with _Probe(accelerator, table, [(0, 0)]) as probe:
        sites = () if by_steps else (_ENTRY + _CPUID_OFFSET,)
        probe.vcpu.trap(table.replace({(0, 0): answer}), sites)
        try:
            return probe.ask(cpl)[0, 0] == answer
        except HostError:
            return False  # the debug event went to the guest, whom it ended


def least_table(linear_bits: int = 48, physical_bits: int = 36) -> CpuidTable:
    """The table of the probe: the invented vendor, and only the features that 64-bit mode needs."""
    words: dict[tuple[int, int], dict[str, int]] = {}
    for name in _NEEDED:
        feature = features.BY_NAME[name]
        registers = words.setdefault((feature.word.leaf, feature.word.subleaf), {})
        registers[feature.word.register] = registers.get(feature.word.register, 0) | 1 << feature.bit
    ebx, edx, ecx = struct.unpack("<3I", _VENDOR)
    # Empty leaves are there too, as they are in a guest's table: some KVMs fill in a leaf only where the table has it.
    entries = {(word.leaf, word.subleaf): Registers(0, 0, 0, 0) for word in features.WORDS}
    entries |= {key: Registers(*(word.get(r, 0) for r in Registers._fields)) for key, word in words.items()}
    entries[0, 0] = Registers(max(w.leaf for w in features.WORDS if w.leaf < 0x40000000), ebx, ecx, edx)
    highest = max(w.leaf for w in features.WORDS)
    entries[0x80000000, 0] = Registers(highest, ebx, ecx, edx)
    entries[0x80000008, 0] = Registers(linear_bits << 8 | physical_bits, 0, 0, 0)
    return CpuidTable(entries)


class _Probe:
    """A vCPU with `table`, in a VM of its own, that executes CPUID for each of `questions`. A context manager."""

    def __init__(self, accelerator: Accelerator, table: CpuidTable, questions: list[tuple[int, int]]) -> None:
        self.questions = questions
        self.vm: AccelVm | None = None
        self._vcpu: AccelVcpu | None = None
        self.memory = Memory(_SIZE)
        try:
            self.vm = accelerator.create_vm(irqchip=False)
            self.vm.map(0, _SIZE, self.memory.host)
            self._vcpu = self.vm.create_vcpu(0)
            self._vcpu.set_cpuid(table)
            self._reset = self._vcpu.get_sregs()
            _write_tables(self.memory)
            self.memory.write(_QUESTIONS, b"".join(struct.pack("<2I", *question) for question in questions))
        except BaseException:
            self.close()
            raise

    @property
    def vcpu(self) -> AccelVcpu:
        assert self._vcpu is not None
        return self._vcpu

    def ask(self, cpl: int) -> dict[tuple[int, int], Registers]:
        """What the guest reads at this privilege level."""
        self.vcpu.set_sregs(long_mode.sregs(self._reset, _PML4, _GDT, _TSS, _IDT, 16 * (_UD_VECTOR + 1) - 1, cpl))
        count = len(self.questions)
        self.vcpu.set_regs(Regs(rip=_ENTRY, rsp=_STACK_TOP, rsi=_QUESTIONS, rdi=_ANSWERS, r8=count))
        # A KVM that cannot run these instructions may also hang on them: the kick is always within reach.
        timer = threading.Timer(_TIMEOUT, self.vcpu.kick)
        timer.start()
        try:
            exit = self.vcpu.run()
        finally:
            timer.cancel()
            timer.join()
        if exit.stop != Stop.HALTED:
            where = f"the guest at CPL {cpl} stopped with {exit.stop.name} at 0x{exit.rip:x}"
            raise HostError("CPUID probe", 0, where + (f": {exit.error}" if exit.error else ""))
        values = struct.iter_unpack("<4I", self.memory.read(_ANSWERS, 16 * count))
        return {question: Registers(*value) for question, value in zip(self.questions, values, strict=True)}

    def __enter__(self) -> _Probe:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Also of one that was not made to its end."""
        if self._vcpu is not None:
            self._vcpu.close()
        if self.vm is not None:
            self.vm.close()
        self.memory.close()


def _probe(accelerator: Accelerator) -> Verdict:
    table = least_table()
    words = sorted(features.WORDS)
    leaks: dict[int, dict[Word, int]] = {}
    ignored: set[int] = set()
    with _Probe(accelerator, table, sorted({(0, 0)} | {(word.leaf, word.subleaf) for word in words})) as probe:
        for cpl in (0, 3):
            answers = probe.ask(cpl)
            leaks[cpl] = _leaks(answers, table, words)
            if answers[0, 0][1:] != table.get(0)[1:]:
                ignored.add(cpl)
    return Verdict(leaks=leaks, ignored=frozenset(ignored))


def _leaks(answers: dict[tuple[int, int], Registers], table: CpuidTable, words: list[Word]) -> dict[Word, int]:
    """The feature bits that are visible though the table hides them. Bits that follow the vCPU's state, and those that
    mean that something is absent, hide nothing by being clear."""
    leaks: dict[Word, int] = {}
    for word in words:
        seen = getattr(answers[word.leaf, word.subleaf], word.register)
        shown = getattr(table.get(word.leaf, word.subleaf), word.register)
        known = sum(1 << f.bit for f in features.WORDS[word] if f.sense == "plain" and not f.dynamic)
        if extra := seen & ~shown & known:
            leaks[word] = extra
    return leaks


def _write_tables(memory: Memory) -> None:
    put = memory.write
    table = long_mode.PRESENT | long_mode.WRITABLE | long_mode.USER
    put(_PML4, struct.pack("<Q", _PDPT | table))
    put(_PDPT, struct.pack("<Q", _PD | table))
    put(_PD, struct.pack("<Q", table | long_mode.LARGE_PAGE))  # 2 MiB from address 0
    put(_GDT, long_mode.gdt(_TSS))
    put(_TSS, long_mode.task_state(_STACK_TOP))
    put(_IDT + 16 * _UD_VECTOR, long_mode.gate(_ENTRY + _HANDLER_OFFSET))
    put(_ENTRY, _CODE)
