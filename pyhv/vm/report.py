"""What to tell a person about a VM that did not end by itself."""

from __future__ import annotations

from pyhv.accel.data import Exit, Stop
from pyhv.vm.vm import Stopped, Vm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyhv.accel.engine import AccelVcpu
    from pyhv.accel.protocol import Accelerator


def message(accelerator: Accelerator, vm: Vm, cause: str, stopped: Stopped | None) -> str:
    """One line: what happened, on which vCPU, where, and the bytes there. stopped: None where the VM was paused."""
    if stopped is None:
        places = ", ".join(f"vCPU {vcpu.index} {_whereabouts(vcpu)}" for vcpu in vm.vcpus[:4])
        more = f" and {len(vm.vcpus) - 4} more" if len(vm.vcpus) > 4 else ""
        what = {"timeout": "timeout: the guest was still running", "interrupted": "interrupted"}.get(cause, cause)
        return f"{what}; {places}{more}"
    exit = stopped.exit
    if exit.stop == Stop.TRIPLE_FAULT and was_reset(vm.vcpus[stopped.vcpu]):
        return (
            f"vCPU {stopped.vcpu}: triple fault; where, and what was in its registers, is gone: KVM resets an AMD "
            "vCPU then (the emulator keeps them)"
        )
    place = f"at rip 0x{exit.rip:x}"
    if exit.instruction:
        place += f" (bytes there: {exit.instruction.hex(' ')})"
    return f"vCPU {stopped.vcpu}: {_what(accelerator, exit)} {place}"


def was_reset(vcpu: AccelVcpu) -> bool:
    """Whether the vCPU is where a processor begins after a reset (SDM Vol. 3, "First Instruction Executed"). kvm_amd
    puts it there on a triple fault: the processor leaves no state behind then (shutdown_interception(), svm.c)."""
    return vcpu.get_regs().rip == 0xFFF0 and vcpu.get_sregs().cs.base == 0xFFFF0000


def registers(vcpu: AccelVcpu) -> str:
    """The vCPU's registers, several lines."""
    regs = vcpu.get_regs()._asdict()
    sregs = vcpu.get_sregs()
    pairs = [f"{name:>6} {value:016x}" for name, value in regs.items()]
    lines = ["".join(f"{pair:24}" for pair in pairs[i : i + 4]).rstrip() for i in range(0, len(pairs), 4)]
    for names in (("cs", "ss", "ds", "es"), ("fs", "gs", "tr", "ldt")):
        parts = []
        for name in names:
            segment = getattr(sregs, name)
            parts.append(f"{name:>6} {segment.selector:04x} base {segment.base:x}")
        lines.append("  ".join(parts))
    lines.append(f"   cr0 {sregs.cr0:x}  cr2 {sregs.cr2:x}  cr3 {sregs.cr3:x}  cr4 {sregs.cr4:x}  efer {sregs.efer:x}")
    lines.append(f"   gdt {sregs.gdt_base:x}+{sregs.gdt_limit:x}  idt {sregs.idt_base:x}+{sregs.idt_limit:x}")
    return "\n".join(lines)


def _whereabouts(vcpu: AccelVcpu) -> str:
    if vcpu.waits_for_ever():
        return "is halted with interrupts off, or was never started"
    regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
    return f"at rip 0x{sregs.cs.base + regs.rip:x} with interrupts {'on' if regs.rflags & 1 << 9 else 'off'}"


def _what(accelerator: Accelerator, exit: Exit) -> str:
    match exit.stop:
        case Stop.RESET:
            return "the guest asked for a reset"
        case Stop.HALTED:
            return "halted with interrupts off, as all others are"
        case Stop.TRIPLE_FAULT:
            return "triple fault"
        case Stop.PANIC:
            return "the guest's kernel has panicked"
        case Stop.TRAP_LOST:
            return "the image declares a CPUID instruction where there is none"
        case Stop.TRAP_EVENT:
            return (
                "an interrupt waits, which trap by stepping cannot deliver (the emulator can, and trap for an image "
                "that declares its CPUID instructions)"
            )
        case Stop.FAILED:
            return f"{exit.error}, the vCPU stands"
        case Stop.SYSTEM_EVENT:
            return f"system event {exit.suberror}"
        case _:
            return accelerator.explain(exit)
