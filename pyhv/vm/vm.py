"""A VM and the threads that run its vCPUs."""

from __future__ import annotations

import errno
import os
import threading
import time

from pyhv import arguments
from pyhv.accel.data import CpuidRecord, Exit, Stop
from pyhv.errors import Cancelled, HostError
from pyhv.light import NamedTuple
from pyhv.vm import life
from pyhv.vm.devices import Devices
from pyhv.vm.idle import IdleWatch
from pyhv.vm.life import Life
from pyhv.vm.memory import GuestMemory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeVar

    from pyhv._native.link import PageSet
    from pyhv.accel.engine import AccelVcpu, AccelVm
    from pyhv.accel.protocol import Accelerator
    from pyhv.accel.state import ProcessorsState, RawState
    from pyhv.cpu.table import CpuidTable

    T = TypeVar("T")

_KICK_AGAIN = 0.005

# How often to ask what wait_for() is given, in seconds.
_LOOK = 0.005

# How often something is begun again that was interrupted; nobody presses Ctrl-C as quickly.
_ATTEMPTS = 10


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

    def __init__(self, vcpu: AccelVcpu, run: Callable[[AccelVcpu], None], idents: set[int]) -> None:
        """idents: has this thread's in it as long as the thread is there."""
        self.vcpu = vcpu
        self._run = run
        self._idents = idents
        self._runs = self._over = False
        self._turn = 0
        # Each is released for the side that waits for it.
        self._go, self._stood = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._thread = threading.Thread(target=self._loop, name=f"vcpu-{vcpu.index}", daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        self._idents.add(threading.get_ident())
        while self._go.acquire() and not self._over:
            self._run(self.vcpu)
            self._runs = False
            if self._stood.locked():  # else nobody has waited the last time
                self._stood.release()
        self._idents.discard(threading.get_ident())  # another thread may get it now

    def go(self, turn: int) -> None:
        """Lets it run; it stands. turn: a number, with which it is done once however often it is called."""
        if self._turn == turn:
            return
        self._stood.acquire(blocking=False)
        # Ctrl-C comes after a call at the earliest: all of the rest is done or nothing.
        self._turn = turn
        self._runs = True
        self._go.release()

    def stop(self) -> None:
        """Waits until it stands, after a kick. Once more, if Ctrl-C comes meanwhile."""
        while self._runs:
            # Again while it runs: the kick's signal may have come just before a blocking write to the console.
            if not self._stood.acquire(timeout=_KICK_AGAIN):
                self.vcpu.kick()

    @property
    def native_id(self) -> int:
        """The kernel's number of the thread."""
        return self._thread.native_id or 0

    def end(self) -> None:
        """Ends it, after a kick. Once more, if Ctrl-C comes meanwhile."""
        self.stop()
        if not self._over:
            self._over = True
            self._go.release()
        self._thread.join()


class Vm:
    """A VM that is paused until start(). Any thread may call: life.py has what each call does in which state; close()
    is the last one.

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
        self.life = Life()
        self._starts = 0
        self._noted = threading.Lock()  # held for moments, by the vCPUs' threads too
        # One each for who waits; released when there is news. A Condition would not stand Ctrl-C.
        self._waiters: list[threading.Lock] = []
        self._pausing = False
        # How often wait() was to be interrupted, and how often it was.
        self._interrupts = self._interrupted = 0
        self._failure: BaseException | None = None
        self._tsc_khz = 0
        self._has_capabilities = False
        self.capabilities: int | None = None
        """What the guest reads in IA32_ARCH_CAPABILITIES, of a VM that runs or has run; None where it has none."""
        self.processors: tuple[int, ...] = ()
        """Host processors that the vCPUs' threads are bound to, one after the other and from the first again; from the
        next start() on. Empty: the host's scheduler decides, or stays with what it was told."""
        self.departure: Departure | None = None
        """The migration of it that is under way."""
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
        """Rate of the guest's TSC, of a VM that runs, has run or came from elsewhere: the one that it began with. On a
        host that does not scale rates it may count at another, which is not the guest's when it goes on elsewhere."""
        return self._tsc_khz

    def tell_capabilities(self, moving: bool) -> None:
        """Sets what vCPUs whose tables show IA32_ARCH_CAPABILITIES read there; a state that is applied later brings its
        own. moving: see arch_capabilities.shown(). Raises HostError."""
        from pyhv.cpu import arch_capabilities

        self._has_capabilities = True
        for vcpu in self.vcpus:
            offered = _capabilities(vcpu)
            told = arch_capabilities.shown(offered, moving)
            if told != offered:
                vcpu.write_msrs({arch_capabilities.IA32_ARCH_CAPABILITIES: told})

    def start(self, force: bool = False) -> None:
        """Lets the vCPUs run, or run on after pause(). No effect on a running VM or one that came to its end. force:
        also one that was given away. Raises WrongState, HostError."""
        self.life.check_thread(life.START)
        self.life.perform(life.START, self._start, force)

    def _start(self) -> None:
        """For whoever holds the turn."""
        try:
            self._go()
        finally:
            if self.running:
                self.life.at = life.RUNNING

    def _go(self) -> None:
        """Lets the vCPUs run."""
        if self.running or self.stopped is not None:
            return
        self._tsc_khz = self._tsc_khz or self.vcpus[0].read_tsc_khz()
        if self._has_capabilities and self.capabilities is None:
            self.capabilities = _capabilities(self.vcpus[0])
        self.prepare_start()
        if self._starts and self._vm is not None:
            self._vm.resume()
        self._starts += 1
        _to_its_end(self._let_go)

    def _let_go(self) -> None:
        self._pausing = False
        self.devices.start_input()
        for thread in self._threads:
            thread.go(self._starts)
        self.running = True

    def rest(self) -> None:
        """Makes a VM that came from elsewhere, and was paused there, a paused one here, for whoever holds the turn."""
        self.left = time.monotonic_ns()
        self.life.at = life.PAUSED

    def prepare_start(self) -> None:
        """Does what else the first start() would take longer for."""
        for vcpu in self.vcpus[len(self._threads) :]:
            self._threads.append(_VcpuThread(vcpu, self._run_vcpu, self.life.guest_threads))

    def wait_for_entry(self, within: float) -> int:
        """Waits until the first vCPU of a VM that was started is entered; the CLOCK_MONOTONIC in ns of that. Raises
        HostError after so many seconds."""
        deadline = time.monotonic() + within
        while self.entered is None:
            if time.monotonic() > deadline:
                raise HostError("vCPU 0", errno.ETIMEDOUT, f"its thread did not begin within {within:g} seconds")
            time.sleep(0)
        return self.entered

    def pause(self) -> None:
        """Stops every vCPU between two instructions, and the input, and returns when all stand. No effect on a paused
        VM. Raises WrongState, and what a vCPU's thread failed with."""
        self.life.check_thread(life.PAUSE)
        self.life.perform(life.PAUSE, self._pause)

    def _pause(self) -> None:
        try:
            self._stand()
        finally:
            if not self.running and self.life.at == life.RUNNING:
                self.life.at = life.PAUSED
        self._raise_failure()

    def _stand(self) -> None:
        """Stops the vCPUs and the input, for whoever holds the turn."""
        if self.running:
            _to_its_end(self._stop_all)

    def _stop_all(self) -> None:
        self._pausing = True
        for vcpu in self.vcpus:
            vcpu.kick()
        for thread in self._threads:
            thread.stop()
        self.devices.stop_input()  # or bytes would get into a VM whose state is saved already
        self.running = False

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def save(self, work: Callable[[], None]) -> None:
        """Does `work` with the VM paused for it; afterwards it is as it was. Raises WrongState, what a vCPU's thread
        failed with, and what `work` raises."""
        self.life.check_thread(life.SAVE)

        def hold() -> None:
            at, running = self.life.at, self.running
            try:
                self.life.busy_thread = threading.get_ident()
                self.life.at = life.SAVING
                self._stand()
                self._raise_failure()
                if self.stopped is None:
                    work()
            finally:
                self.life.at, self.life.busy_thread = life.PAUSED if running else at, 0
                if running:
                    self._start()
            if self.stopped is not None:
                raise self.life.refusal(life.SAVE)

        self.life.perform(life.SAVE, hold)

    def leave(self, peer: str, work: Callable[[Departure], T]) -> T:
        """Does `work`, a migration to `peer`: it says what has become of the VM, which else goes on here. Raises
        WrongState, and what `work` raises."""
        self.life.check_thread(life.MIGRATE)
        self.life.check_leaving(life.MIGRATE)
        departure = Departure(self)
        with self.life.leaving:
            busy = self.life.busy_thread
            try:
                self.life.perform(life.MIGRATE, lambda: departure.begin(peer))
                self.departure = departure
                return work(departure)
            finally:
                self.departure = None
                self.life.busy_thread = busy
                if departure.is_open:
                    departure.resume()

    def wait(self, timeout: float | None = None) -> Stopped | None:
        """As wait_for(); how the guest came to its end, or None."""
        self.wait_for(timeout)
        return self.stopped

    def wait_for(self, timeout: float | None = None, found: Callable[[], bool] | None = None) -> str:
        """Waits until the guest comes to its end ("ended"; the VM is paused then), or was moved away ("moved"), or
        somebody closes the VM ("closed") or calls interrupt() ("stopped"), at most `timeout` seconds ("timeout"); which
        of them. found: is asked now and then; once it says yes that is the answer ("found").

        A guest whose vCPUs are all halted, with nothing that could wake them, has come to its end: Stop.HALTED. Raises
        WrongState, BadInput for a timeout that is none, and what a vCPU's thread failed with.
        """
        arguments.timeout(timeout)
        self.life.check_free("wait")
        deadline = None if timeout is None else time.monotonic() + timeout
        interrupts = self._interrupted
        news = threading.Lock()
        news.acquire()
        try:
            self._waiters.append(news)
            reason = self._wait(deadline, interrupts, news, found)
        finally:
            self._waiters.remove(news)
        if reason == "stopped":
            self._interrupted = self._interrupts
        elif reason == "ended":
            with self.life.turn:
                self._pause()
        return reason

    def _wait(
        self, deadline: float | None, interrupts: int, news: threading.Lock, found: Callable[[], bool] | None
    ) -> str:
        idle = IdleWatch()
        while True:
            look_at = time.monotonic() + idle.interval
            while (now := time.monotonic()) < look_at:
                reason = self._reason(interrupts)
                if found is not None and found():  # after the look: of a guest that has ended nothing more comes
                    return "found"
                if reason:
                    return reason
                if deadline is not None and now >= deadline:
                    return "timeout"
                step = look_at - now if deadline is None else min(look_at, deadline) - now
                news.acquire(timeout=step if found is None else min(step, _LOOK))
            threads = [thread.native_id for thread in self._threads]
            if idle.lies_still(threads) and not self._halted_for_good():
                idle.note_alive(threads)

    def _tell(self) -> None:
        """Wakes who waits; with `_noted` held."""
        for news in self._waiters:
            if news.locked():
                news.release()

    def _reason(self, interrupts: int) -> str:
        """Why there is nothing to wait for any more, or "". interrupts: so many were answered before."""
        if self.life.at in (life.MOVED, life.CLOSED):
            return "moved" if self.life.at == life.MOVED else "closed"
        if self.stopped is not None or self._failure is not None:
            return "ended"
        return "stopped" if self._interrupts > interrupts else ""

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
        self._vm.prepare_state(self.vcpus)

    def capture(self) -> ProcessorsState:
        """The state of the processors of a paused VM. Raises HostError."""
        from pyhv.accel import structs

        return structs.to_state(self.capture_raw())

    def capture_raw(self) -> RawState:
        """The same as capture(), in a quarter of the time."""
        assert self._vm is not None and not self.running
        state = self._vm.capture(self.vcpus)
        return state._replace(tsc_khz=self._tsc_khz or state.tsc_khz)

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
        self._vm.apply(self.vcpus, state, elapsed)
        self._tsc_khz = state.tsc_khz
        self.life.at = life.PAUSED

    def interrupt(self) -> None:
        """Makes every wait() that is under way return at once, or the next one. Any thread."""
        with self._noted:
            self._interrupts += 1
            self._tell()

    def counters(self) -> dict[str, int]:
        """Exits of all vCPUs by kind, so far; of a closed VM none. Any thread."""
        total: dict[str, int] = {}
        with self._noted:  # close() takes them away
            for vcpu in self.vcpus:
                for name, count in vcpu.counters().items():
                    total[name] = total.get(name, 0) + count
        return total

    def output(self, since: int = 0) -> tuple[bytes, int]:
        """As Devices.output(); of a closed VM nothing. Any thread."""
        with self._noted:  # close() takes it away
            return self.devices.output(since) if self.devices.bus else (b"", since)

    def take_input(self, descriptor: int) -> None:
        """Console input comes from there from now on; there was none before. The descriptor stays the caller's. Raises
        WrongState, HostError."""
        self.life.check_thread("send")
        with self.life.turn:
            if not self.life.is_here:
                raise self.life.refusal("send")
            self.devices.set_input(descriptor)
            if self.running:
                self.devices.start_input()

    def close(self) -> None:
        """Ends the VM, whatever it is doing, and gives everything back. A save or a migration is given up; one that is
        handed over already is waited for. Raises WrongState inside a callback, and what a vCPU's thread failed with."""
        self.life.check_free(life.CLOSE)
        self.life.closing = True
        try:
            with self.life.leaving:
                self.life.perform(life.CLOSE, lambda: _to_its_end(self._close))
        finally:
            self.life.closing = False
        self._raise_failure()

    def _close(self) -> None:
        """May be called once more where it was interrupted."""
        self._stand()
        for thread in self._threads:
            thread.end()
        self._threads = []
        with self._noted:
            while self.vcpus:
                self.vcpus[-1].close()
                self.vcpus.pop()
        if self._vm is not None:
            self._vm.close()
            self._vm = None
        with self._noted:
            self.devices.close()
        self.memory.close()
        with self._noted:
            self.life.at = life.CLOSED
            self._tell()

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
            with self._noted:
                self._failure = failure
                self._tell()

    def _end(self, stopped: Stopped) -> None:
        with self._noted:
            if self.stopped is None:
                self.stopped = stopped
                self.life.ended = True
            self._tell()

    def _halted_for_good(self) -> bool:
        """Looks whether any vCPU can ever run again; if none can, that is the end. A guest that can wake up is not
        paused for it."""
        with self.life.turn:
            if not self.running or not self._all_wait_for_ever():
                return False
            # One may have woken another meanwhile. That none can any more is certain only when none runs.
            at = self.life.at
            try:
                self._stand()
                if self.stopped is None and self._all_wait_for_ever():
                    regs = self.vcpus[0].get_regs()
                    self._end(Stopped(0, Exit(Stop.HALTED, 0, 0, 0, 0, regs.rip, (), b"", "")))
            finally:
                self.life.at = life.PAUSED
                try:
                    self._go()
                finally:
                    if self.running:
                        self.life.at = at
            return self.stopped is not None

    def _all_wait_for_ever(self) -> bool:
        return all(vcpu.waits_for_ever() for vcpu in self.vcpus)


class Departure:
    """What becomes of a VM that is migrated: begin(), stop(), commit() and finish() in this order, with resume() as the
    way back from each but the last."""

    def __init__(self, vm: Vm) -> None:
        self.turn = vm.life.turn
        """To be held from stop() until it is decided which side has the VM."""
        self.is_open = False
        """Whether the VM is still to be let go on here, or to be given away."""
        self._vm = vm
        self._life = vm.life
        self.ran = True
        """Whether the guest ran when it began: then it is to run afterwards, here or there."""
        self._deciding = threading.Lock()  # whether it is cancelled or given away, which excludes the other
        self._cancelled = False
        self._given = False
        self._wake: Callable[[], None] | None = None

    def cancel(self) -> bool:
        """Gives the migration up, which the thread that migrates then does: True; or False where the VM was given away
        already. Any thread."""
        with self._deciding:
            if self._given:
                return False
            self._cancelled = True
            if self._wake is not None:
                self._wake()
            return True

    def watch(self, wake: Callable[[], None] | None) -> None:
        """What cancel() is to call, that the migration's thread may not wait for long; None from then on nothing."""
        with self._deciding:
            self._wake = wake
            if wake is not None and self._cancelled:
                wake()

    def begin(self, peer: str) -> None:
        """The guest runs on meanwhile."""
        self._life.peer = peer
        self._life.busy_thread = threading.get_ident()
        self._life.at = life.MIGRATING
        self.ran = self._vm.running
        self.is_open = True

    def check(self) -> None:
        """Raises Cancelled, and WrongState where somebody wants to close the VM, which gives the migration up too."""
        if self._cancelled:
            raise Cancelled(self._life.peer)
        self._life.check_open(life.MIGRATE)

    def stop(self) -> None:
        """Stops the guest, to hand it over. Raises what a vCPU's thread failed with."""
        self._life.at = life.HANDING_OVER
        self._vm._stand()
        self._vm._raise_failure()

    def commit(self, peer: str) -> None:
        """From here on the VM is not let run here by anybody who does not insist on it. Raises Cancelled."""
        with self._deciding:
            if self._cancelled:
                raise Cancelled(peer)
            self._given = True
        self._life.peer = peer
        self._life.at = life.UNKNOWN
        self.is_open = False

    def resume(self) -> None:
        """The other side does not have it: it goes on here. Also after commit(), where that is certain."""
        with self.turn:
            if self._life.at not in (life.MIGRATING, life.HANDING_OVER, life.UNKNOWN):
                return
            self._life.at = life.PAUSED
            self.is_open = False
            if self.ran:
                self._vm._start()

    def finish(self) -> None:
        """The other side runs it."""
        with self._vm._noted:
            self._life.at = life.MOVED
            self._vm._tell()


def _to_its_end(work: Callable[[], None]) -> None:
    """Does what may be begun again to its end, and raises then what came in between: Ctrl-C, which is not to leave some
    of the vCPUs running and others not."""
    first: BaseException | None = None
    for _ in range(_ATTEMPTS):
        try:
            work()
            break
        except BaseException as error:
            first = first or error
    if first is not None:
        raise first


def _capabilities(vcpu: AccelVcpu) -> int:
    """IA32_ARCH_CAPABILITIES, of a vCPU whose table shows it. Raises HostError."""
    from pyhv.cpu.arch_capabilities import IA32_ARCH_CAPABILITIES

    return vcpu.read_msrs([IA32_ARCH_CAPABILITIES]).get(IA32_ARCH_CAPABILITIES, 0)


def _bind_thread(processor: int) -> None:
    try:
        os.sched_setaffinity(0, {processor})  # 0: this thread
    except OSError as error:
        raise HostError("sched_setaffinity", error.errno or 0, f"processor {processor}") from None
