"""A VM and the threads that run its vCPUs."""

from __future__ import annotations

import os
import threading
import time

from pyhv.accel.data import CpuidRecord, Exit, Stop
from pyhv.errors import HostError
from pyhv.light import NamedTuple
from pyhv.vm.devices import Devices
from pyhv.vm.memory import GuestMemory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyhv._native.link import PageSet
    from pyhv.accel.protocol import Accelerator, AccelVcpu, AccelVm
    from pyhv.accel.state import ProcessorsState, RawState
    from pyhv.cpu.table import CpuidTable

# How long a VM must look idle before it is asked whether it can ever wake up, in seconds; doubled after each "yes, it
# can" so that a guest that sleeps properly is not disturbed. While it computes, the look takes processor time from it:
# that becomes rarer too.
_FIRST_IDLE_CHECK, _LAST_IDLE_CHECK, _LAST_BUSY_CHECK = 0.05, 2.0, 0.4

_KICK_AGAIN = 0.005


class Trap(NamedTuple):
    """How the vCPUs' CPUID instructions are trapped; see AccelVcpu.trap."""

    sites: tuple[int, ...]
    log_capacity: int = 0
    on_record: Callable[[CpuidRecord], None] | None = None
    """Gets each record of the log, on the thread of its vCPU."""


class Stopped(NamedTuple):
    """Why a VM came to its end: the first vCPU that stopped it, and its exit."""

    vcpu: int
    exit: Exit


class _VcpuThread:
    """The thread of a vCPU. It waits between the runs and is there until the VM ends: a guest that is paused for a
    moment, or has just been migrated to here, need not wait until a thread has ended or begun."""

    def __init__(self, vcpu: AccelVcpu, run: Callable[[AccelVcpu], None]) -> None:
        self.vcpu = vcpu
        self._run = run
        self._runs = self._over = False
        # Each is released for the side that waits for it.
        self._go, self._stood = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._thread = threading.Thread(target=self._loop, name=f"vcpu-{vcpu.index}", daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        while self._go.acquire() and not self._over:
            self._run(self.vcpu)
            self._runs = False
            if self._stood.locked():  # else nobody has waited the last time
                self._stood.release()

    def go(self) -> None:
        """Lets it run; it stands."""
        self._stood.acquire(blocking=False)
        self._runs = True
        self._go.release()

    def stop(self) -> None:
        """Waits until it stands, after a kick. Once more, if Ctrl-C comes meanwhile."""
        while self._runs:
            # Again while it runs: the kick's signal may have come just before a blocking write to the console.
            if not self._stood.acquire(timeout=_KICK_AGAIN):
                self.vcpu.kick()

    def sleeps(self) -> bool:
        """Whether it is not using a processor right now."""
        try:
            with open(f"/proc/self/task/{self._thread.native_id}/stat", "rb") as stat:
                return stat.read().rpartition(b") ")[2][:1] == b"S"
        except OSError:
            return False

    def end(self) -> None:
        """Ends it, after a kick. Once more, if Ctrl-C comes meanwhile."""
        self.stop()
        if not self._over:
            self._over = True
            self._go.release()
        self._thread.join()


class Vm:
    """A VM that is paused until start(). Several threads may start, pause and wait; close() is the last call.

    accelerator: what runs it. memory, devices: given over; close() closes them. tables: one CPUID table a vCPU.
    trap: answer CPUID from the tables instead of letting the accelerator do it. irqchip, pit, quick: see
    Accelerator.create_vm.
    Raises HostError; what was given over is closed then too.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        memory: GuestMemory,
        devices: Devices,
        tables: Sequence[CpuidTable],
        trap: Trap | None = None,
        irqchip: bool = True,
        pit: bool = False,
        quick: bool = False,
    ) -> None:
        self.memory = memory
        self.devices = devices
        self.tables = tuple(tables)
        self.irqchip = irqchip
        self.pit = irqchip and pit
        self.vcpus: list[AccelVcpu] = []
        self.stopped: Stopped | None = None
        self._trap = trap
        self._vm: AccelVm | None = None
        self._threads: list[_VcpuThread] = []
        self.running = False
        self._control = threading.RLock()  # one start, pause or close at a time
        self._result = threading.Lock()
        self._ended = threading.Event()
        self._pausing = False
        self._interrupted = False
        self._failure: BaseException | None = None
        self._tsc_khz = 0
        self.processors: tuple[int, ...] = ()
        """Host processors that the vCPUs' threads are bound to, one after the other and from the first again; from the
        next start() on. Empty: the host's scheduler decides, or stays with what it was told."""
        self.entered: int | None = None
        """CLOCK_MONOTONIC in ns when the first vCPU was about to be entered for the first time."""
        self.left = 0
        """CLOCK_MONOTONIC in ns when the last vCPU came back from the last run, of a paused VM that has run."""
        try:
            self._vm = accelerator.create_vm(devices.bus, irqchip, pit, quick)
            for gpa, size, offset in memory.regions:
                self._vm.map(gpa, size, memory.host_address(offset))
            for index, table in enumerate(self.tables):
                vcpu = self._vm.create_vcpu(index)
                self.vcpus.append(vcpu)
                vcpu.set_cpuid(table)
                if trap is not None:
                    vcpu.trap(table, trap.sites, trap.log_capacity)
        except BaseException:
            self.close()
            raise

    @property
    def tsc_khz(self) -> int:
        """Rate of the TSC, of a VM that runs or has run. A running vCPU cannot be asked: it answers when it stands."""
        return self._tsc_khz

    def start(self) -> None:
        """Lets the vCPUs run, or run on after pause(). No effect on a running VM or one that came to its end."""
        with self._control:
            if self.running or self.stopped is not None:
                return
            self._pausing = False
            self._tsc_khz = self._tsc_khz or self.vcpus[0].read_tsc_khz()
            self.prepare_start()
            self.devices.start_input()
            self.running = True
            for thread in self._threads:
                thread.go()

    def prepare_start(self) -> None:
        """Does what else the first start() would take longer for."""
        for vcpu in self.vcpus[len(self._threads) :]:
            self._threads.append(_VcpuThread(vcpu, self._run_vcpu))

    def wait_for_entry(self) -> int:
        """Waits until the first vCPU of a VM that was started is entered; the CLOCK_MONOTONIC in ns of that."""
        while self.entered is None:
            time.sleep(0)
        return self.entered

    def pause(self) -> None:
        """Stops every vCPU between two instructions, and the input, and returns when all stand. No effect on a paused
        VM."""
        with self._control:
            self._pausing = True
            if self.running:
                for vcpu in self.vcpus:
                    vcpu.kick()
                for thread in self._threads:
                    thread.stop()
                self.devices.stop_input()  # or bytes would get into a VM whose state is saved already
                self.running = False
            failure, self._failure = self._failure, None
            if failure is not None:
                raise failure

    def wait(self, timeout: float | None = None) -> Stopped | None:
        """Waits until the guest comes to its end, at most `timeout` seconds; None if it has not, or after interrupt().

        A guest whose vCPUs are all halted with interrupts off has come to its end: Stop.HALTED.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        idle_check = _FIRST_IDLE_CHECK
        while not self._ended.is_set():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return None
            if self._ended.wait(idle_check if left is None else min(idle_check, left)):
                break
            if not self._sleeps():
                idle_check = min(2 * idle_check, _LAST_BUSY_CHECK)
            elif not self._halted_for_good():
                idle_check = min(2 * idle_check, _LAST_IDLE_CHECK)
        if self._interrupted and self.stopped is None and self._failure is None:
            self._interrupted = False
            self._ended.clear()
            return None
        self.pause()
        return self.stopped

    def log_dirty(self, on: bool) -> None:
        """Begins, or ends, to note which pages of guest RAM are written, by the guest or the host. Raises HostError."""
        assert self._vm is not None
        self.memory.written = set() if on else None
        self._vm.log_dirty(on)

    def take_dirty(self, pages: PageSet) -> None:
        """Adds the pages written since log_dirty(True), or since the last call, to `pages`. Raises HostError."""
        assert self._vm is not None and self.memory.written is not None
        by_host, self.memory.written = self.memory.written, set()
        pages.update(by_host)
        self._vm.take_dirty(pages.words)

    def warm_up(self) -> None:
        """Loads what capture() and apply() need; also while it runs."""
        assert self._vm is not None
        self._vm.warm_up(self.vcpus, self.tables)

    def capture(self) -> ProcessorsState:
        """The state of the processors of a paused VM. Raises HostError."""
        from pyhv.accel import structs

        return structs.to_state(self.capture_raw())

    def capture_raw(self) -> RawState:
        """The same as capture(), in a quarter of the time."""
        assert self._vm is not None and not self.running
        return self._vm.capture(self.vcpus, self.tables)

    def apply(self, state: ProcessorsState) -> None:
        """Puts a state into a VM that has never run and whose memory is complete. Raises HostError, and OverflowError,
        IndexError, TypeError or ValueError for one that no VM can have; the VM is then good for nothing but close()."""
        from pyhv.accel import structs

        self.apply_raw(structs.from_state(state))

    def apply_raw(self, state: RawState, elapsed: int = 0) -> None:
        """The same. The clocks go on as if the state had been taken so many nanoseconds ago."""
        assert self._vm is not None and not self.running
        if (bool(state.irqchip), state.pit) != (self.irqchip, self.pit):
            raise ValueError("it has other interrupt controllers or timers than the VM")
        self._vm.apply(self.vcpus, self.tables, state, elapsed)

    def interrupt(self) -> None:
        """Makes the current or the next wait() return at once. Any thread."""
        self._interrupted = True
        self._ended.set()

    def close(self) -> None:
        """Ends the VM, whatever it is doing, and gives everything back."""
        with self._control:
            try:
                self.pause()
            finally:
                for thread in self._threads:
                    thread.end()
                self._threads = []
                for vcpu in self.vcpus:
                    vcpu.close()
                self.vcpus = []
                if self._vm is not None:
                    self._vm.close()
                    self._vm = None
                self.devices.close()
                self.memory.close()

    def _run_vcpu(self, vcpu: AccelVcpu) -> None:
        try:
            if self.entered is None:
                self.entered = time.monotonic_ns()
            if self.processors:
                _bind_thread(self.processors[vcpu.index % len(self.processors)])
            while True:
                exit = vcpu.run()
                self.left = time.monotonic_ns()
                if self._trap is not None and self._trap.on_record is not None:
                    for record in vcpu.trap_log():
                        self._trap.on_record(record)
                if exit.stop == Stop.TRAP_LOG_FULL:
                    continue
                if exit.stop != Stop.KICKED:
                    self._end(Stopped(vcpu.index, exit))
                elif not self._pausing:
                    continue  # left over from the last pause, which had kicked more often than was needed
                return
        except BaseException as failure:
            self._failure = failure
            self._ended.set()

    def _end(self, stopped: Stopped) -> None:
        with self._result:
            if self.stopped is None:
                self.stopped = stopped
        self._ended.set()

    def _sleeps(self) -> bool:
        """Whether no vCPU is using a processor right now."""
        return all(thread.sleeps() for thread in self._threads)

    def _halted_for_good(self) -> bool:
        """Looks, with the VM paused for a moment, whether any vCPU can ever run again; if none can, that is the end."""
        with self._control:
            if not self.running:
                return False
            self.pause()
            if self.stopped is None and all(vcpu.waits_for_ever() for vcpu in self.vcpus):
                regs = self.vcpus[0].get_regs()
                self._end(Stopped(0, Exit(Stop.HALTED, 0, 0, 0, 0, regs.rip, (), b"", "")))
                return True
            self.start()
            return False


def _bind_thread(processor: int) -> None:
    try:
        os.sched_setaffinity(0, {processor})  # 0: this thread
    except OSError as error:
        raise HostError("sched_setaffinity", error.errno or 0, f"processor {processor}") from None
