"""Watching the CPUID instructions that the kernel answers: the tracepoint kvm:kvm_cpuid, through tracefs.

KVM has no CPUID exit to user space, but it tells its tracepoint of each one. What that has is the question and the
answer. RIP and vCPU come from kvm:kvm_exit, which kvm_intel and kvm_amd hit just before; where KVM interprets the
guest's instructions, RIP comes from kvm:kvm_emulate_insn. None of them has the CPL. The kernel looks up guests' CPUID
for its own purposes too (its emulator asks for the vendor): such an event has neither in front of it.

Everything happens in an instance of our own (Documentation/trace/ftrace.rst, "Instances"): its own buffer, its own
events, its own list of threads. Nobody else's tracing is touched.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import NamedTuple

from pyhv.errors import NotAvailable

_INSTANCE_PREFIX = "pyhv-"
_CPUID_EVENT, _EXIT_EVENT, _EMULATE_EVENT = "events/kvm/kvm_cpuid", "events/kvm/kvm_exit", "events/kvm/kvm_emulate_insn"

# The exits because of CPUID: exit reason 10 of VMX (SDM Vol. 3, appendix C), 0x72 of SVM (APM Vol. 2, appendix C).
# `isa` is KVM's own: 1 VMX, 2 SVM (arch/x86/kvm/trace.h).
_EXIT_FILTER = "(isa == 1 && exit_reason == 10) || (isa == 2 && exit_reason == 0x72)"

# How long the buffer waits for its reader, in seconds. It holds more than 1 MiB a processor: 20,000 events.
_INTERVAL = 0.02

_CHUNK = 1 << 16

# fsopen(2), fsconfig(2), fsmount(2): numbers that all architectures share, since Linux 5.2.
_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1
_FSCONFIG_CMD_CREATE = 6

# "  python3-1234  [001] d..1.  12.345678: kvm_cpuid: func 1 idx 0 rax ... rbx ... rcx ... rdx ..., cpuid entry found"
_LINE = re.compile(r"-(\d+) +\[\d+\] +\S+ +[\d.]+: (kvm_cpuid|kvm_exit|kvm_emulate_insn): (.*)")
_CPUID = re.compile(r"func ([0-9a-f]+) idx ([0-9a-f]+) rax ([0-9a-f]+) rbx ([0-9a-f]+) rcx ([0-9a-f]+) rdx ([0-9a-f]+)")
_RIP = re.compile(r"\brip 0x([0-9a-f]+)")
_VCPU = re.compile(r"\bvcpu (\d+)")
# CS base, RIP, and the bytes of CPUID after any prefixes
_EMULATED = re.compile(r"([0-9a-f]+):([0-9a-f]+):(?:[0-9a-f]{2} )*?0f a2\b")
_LOST = re.compile(r"CPU:\d+ \[LOST (\d+ )?EVENTS\]")

# KVM has no index for leaves that ignore ECX until Linux 5.8: there the event's field is missing.
_CPUID_WITHOUT_INDEX = re.compile(r"func ([0-9a-f]+) rax ([0-9a-f]+) rbx ([0-9a-f]+) rcx ([0-9a-f]+) rdx ([0-9a-f]+)")

_U32 = 0xFFFFFFFF


class Traced(NamedTuple):
    """One CPUID that the kernel answered."""

    thread: int
    """The vCPU's thread: its id in this system."""
    vcpu: int | None
    """None where the kernel did not tell."""
    rip: int | None
    """Linear address of the instruction (of kvm_exit the RIP, which is the same in 64-bit mode); None where the kernel
    did not tell, or asked for itself."""
    leaf: int
    subleaf: int
    guest: tuple[int, int, int, int]
    """EAX, EBX, ECX, EDX as the guest got them."""


class Parser:
    """Turns the lines of trace_pipe into Traced."""

    def __init__(self) -> None:
        self.lost = 0
        """Events that the kernel dropped because its buffer was full, as far as it says how many (else 1 each time)."""
        self._exits: dict[int, tuple[int | None, int | None]] = {}

    def feed(self, line: str) -> Traced | None:
        """What one line says; None for a line that is no CPUID."""
        match = _LINE.search(line)
        if match is None:
            if lost := _LOST.search(line):
                self.lost += int(lost[1] or 1)
            return None
        thread, event, fields = int(match[1]), match[2], match[3]
        if event == "kvm_exit":
            rip, vcpu = _RIP.search(fields), _VCPU.search(fields)
            self._exits[thread] = (int(vcpu[1]) if vcpu else None, int(rip[1], 16) if rip else None)
            return None
        if event == "kvm_emulate_insn":
            if place := _EMULATED.match(fields):
                self._exits[thread] = (None, int(place[1], 16) + int(place[2], 16))
            return None
        if numbers := _CPUID.match(fields):
            leaf, subleaf, *registers = (int(number, 16) & _U32 for number in numbers.groups())
        elif numbers := _CPUID_WITHOUT_INDEX.match(fields):
            leaf, *registers = (int(number, 16) & _U32 for number in numbers.groups())
            subleaf = 0
        else:
            return None
        vcpu_index, address = self._exits.pop(thread, (None, None))
        eax, ebx, ecx, edx = registers
        return Traced(thread, vcpu_index, address, leaf, subleaf, (eax, ebx, ecx, edx))


class Tracepoint:
    """A context in whose body the CPUIDs of this thread's vCPUs are reported: those that threads run which this thread
    starts from then on, and their threads.

    on_cpuid: called for each, in time order, on one thread of its own, some 20 ms later; not after the context has been
    left. sites: addresses of the guest's CPUID instructions, as far as they are known: an interpreting KVM has an event
    for each instruction, too many to look at, so only those there are asked for.

    Needs root, or whoever may use tracefs, and a kernel with the tracepoint: raises NotAvailable. Makes one instance in
    tracefs, and removes it on every way out, with what a killed predecessor left behind.
    """

    def __init__(self, on_cpuid: Callable[[Traced], None], sites: Sequence[int] = ()) -> None:
        self._on_cpuid = on_cpuid
        self._sites = sites
        self._parser = Parser()
        self._root: _Root | None = None
        self._instance = ""
        self._pipe = -1
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def lost(self) -> int:
        """How many events are missing because the kernel's buffer was full."""
        return self._parser.lost

    def __enter__(self) -> Tracepoint:
        self._root = _Root()
        try:
            with _explained():
                self._start(self._root.path)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if self._failure is not None and kind is None:
            raise self._failure

    def _start(self, root: str) -> None:
        if not os.path.exists(f"{root}/{_CPUID_EVENT}"):
            raise NotAvailable(
                "kvm:kvm_cpuid", "this kernel has no such tracepoint", "load KVM's module, or use via=\"trap\""
            )
        _remove_orphans(f"{root}/instances")
        instance = f"{root}/instances/{_INSTANCE_PREFIX}{os.getpid()}"
        os.mkdir(instance)
        self._instance = instance
        # The threads that we start from now on are followed, and those that they start.
        _write(f"{instance}/options/event-fork", "1")
        _write(f"{instance}/set_event_pid", str(threading.get_native_id()))
        # Without these two we have no RIP: no reason to fail.
        with contextlib.suppress(OSError):
            _write(f"{instance}/{_EXIT_EVENT}/filter", _EXIT_FILTER)
            _write(f"{instance}/{_EXIT_EVENT}/enable", "1")
        if self._sites:
            with contextlib.suppress(OSError):
                places = " || ".join(f"rip == {site:#x}" for site in self._sites)
                _write(f"{instance}/{_EMULATE_EVENT}/filter", places)
                _write(f"{instance}/{_EMULATE_EVENT}/enable", "1")
        _write(f"{instance}/{_CPUID_EVENT}/enable", "1")
        self._pipe = os.open(f"{instance}/trace_pipe", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._read, name="tracepoint", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            rest = b""
            while True:
                last = self._stop.wait(_INTERVAL)  # looked at before the buffer: nothing comes after it is set
                for chunk in self._chunks():
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        traced = self._parser.feed(line.decode("ascii", "replace"))
                        if traced is not None:
                            self._on_cpuid(traced)
                if last:
                    return
        except BaseException as failure:
            self._failure = failure

    def _chunks(self) -> Iterator[bytes]:
        """What is in the buffer now."""
        while True:
            try:
                chunk = os.read(self._pipe, _CHUNK)
            except (BlockingIOError, InterruptedError):
                return
            if not chunk:
                return
            yield chunk

    def close(self) -> None:
        """Stops the tracing; what happened until now has been reported when this returns. Twice is allowed."""
        if self._instance:
            with contextlib.suppress(OSError):
                _write(f"{self._instance}/tracing_on", "0")
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
        if self._instance:
            _remove(self._instance)
            self._instance = ""
        if self._root is not None:
            self._root.close()
            self._root = None


class _Root:
    """tracefs: where it is mounted, or else a mount of our own, which no path leads to and which ends with its
    descriptor."""

    def __init__(self) -> None:
        self._fd = -1
        with _explained():
            mounted = _find_mounted()
            if mounted is None:
                self._fd = _mount()
        self.path = mounted or f"/proc/self/fd/{self._fd}"

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _find_mounted() -> str | None:
    with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as mounts:
        for line in mounts:
            _, path, kind, *_ = line.split(" ")
            if kind == "tracefs":
                # Spaces, tabs, newlines and backslashes in it are octal (proc_pid_mounts(5), getmntent(3)).
                return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), path)
    return None


def _mount() -> int:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)

    def system_call(number: int, *arguments: object) -> int:
        result = int(libc.syscall(number, *arguments))
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return result

    context = system_call(_SYS_FSOPEN, b"tracefs", _FSOPEN_CLOEXEC)
    try:
        system_call(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return system_call(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(context)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turns what the system says of tracefs into what to do about it."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise NotAvailable("tracefs", "this user may not use it", 'run as root, or use via="trap"') from None
        if error.errno == errno.ENODEV:
            raise NotAvailable("tracefs", "this kernel has none", 'use via="trap"') from None
        if error.errno == errno.ENOSYS:
            advice = 'mount it (mount -t tracefs tracefs /sys/kernel/tracing), or use via="trap"'
            raise NotAvailable("tracefs", "is not mounted", advice) from None
        where = f"{error.filename}: " if error.filename else ""
        raise NotAvailable("tracefs", f"{where}{error.strerror}", 'use via="trap"') from None


def _remove_orphans(instances: str) -> None:
    """Removes the instances of processes that are no more. One that is still read cannot be removed: that of a process
    which we do not see, in another container."""
    for name in os.listdir(instances):
        pid = name.removeprefix(_INSTANCE_PREFIX)
        if name != pid and pid.isdigit() and (pid == str(os.getpid()) or not os.path.exists(f"/proc/{pid}")):
            _remove(f"{instances}/{name}")


def _remove(instance: str) -> None:
    # Of the instance's files none is open any more; disabled events may take the kernel a moment to let go.
    for _ in range(50):
        try:
            os.rmdir(instance)
            return
        except OSError as error:
            if error.errno != errno.EBUSY:
                return
        threading.Event().wait(0.01)


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
