"""Machine: a guest image, the processor it may see, and a VM to run it in. The face of pyhv."""

from __future__ import annotations

import os
import sys
import time

from pyhv import arguments, outcome
from pyhv.accel import choose
from pyhv.accel.data import CpuidRecord, Regs, Sregs
from pyhv.boot import image as boot_image
from pyhv.boot import recognise, start64
from pyhv.cpu import policy, profiles
from pyhv.errors import BadInput, GaveUp, HostError, Incompatible, PyhvError, TimedOut
from pyhv.light import NamedTuple
from pyhv.vm import life
from pyhv.vm.devices import Devices, is_pc
from pyhv.vm.memory import HIGH_RAM_BASE, LOW_RAM_LIMIT, PAGE_SIZE, GuestMemory, check_fits
from pyhv.vm.vm import Departure, Stopped, Trap, Vm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from re import Match, Pattern
    from types import TracebackType
    from typing import Self

    from pyhv.arguments import StrPath
    from pyhv.cpu.table import CpuidTable
    from pyhv.migration.destination import Destination
    from pyhv.migration.source import Limits, Progress, Summary
    from pyhv.migration.transport import Channel, Tls
    from pyhv.state.needs import Needs
    from pyhv.state.records import MachineRecord
    from pyhv.vm.console import Console

# The start state and an image at 1 MiB must fit.
MIN_MEMORY = 2 << 20
MAX_MEMORY = 16 << 40  # no host has more; a number beyond it is a slip of the hand

# Causes that memory which is gone can have.
_FAULTS = ("triple-fault", "not-executable", "internal-error")

_REHEARSALS = 10

# So many vCPUs at most are rehearsed once more while the guest comes to stand: the pages have driven all of that out of
# the processor's caches. Of many the first does it for the others.
_FEW_VCPUS = 4

# Each CPUID is handed over before the next one is answered: a trace is read while it happens.
_LOG_CAPACITY = 1


class RunResult(NamedTuple):
    """How a run ended."""

    cause: str
    """A key of pyhv.outcome.CAUSES."""
    status: int
    """The exit status by pyhv.outcome's table: with cause "guest-exit" the byte that the guest wrote."""
    console: bytes
    """What the guest has printed so far, where the console is captured."""
    message: str
    """One line that says what happened; "" when the guest ended by itself."""
    registers: str
    """The registers of the vCPU that the message is about, in several lines, or ""."""
    counters: dict[str, int]
    """Exits of all vCPUs by kind."""
    console_dropped: int = 0
    """So many bytes the guest had printed before `console`, which are kept no longer."""
    vcpu: int | None = None
    """The vCPU that the message is about, where there are registers."""
    regs: Regs | None = None
    """Its general registers, RIP and RFLAGS."""
    sregs: Sregs | None = None
    """Its segment, descriptor-table and control registers."""


class _Plan(NamedTuple):
    """What a VM is made of; see Vm."""

    memory: GuestMemory
    tables: Sequence[CpuidTable]
    irqchip: bool = True
    pit: bool = False
    quick: bool = False
    pc: bool = False


class Machine:
    """A VM with its guest loaded, paused in front of its first instruction.

    image: path of an image file, or the name of a bundled guest. boot: the boot protocol, a key of boot.image.KINDS;
    "": as the image is recognised, which is never "flat". initrd: path of a file, for a Linux or PVH kernel. modules:
    "FILE ARGS" each, for a multiboot or PVH kernel. compat: the processor compatibility mode, short for
    cpu="hyperv-r2". cpu: the name of a profile or the path of a profile file (default "host"). cpus: number of
    vCPUs. memory: bytes, or a string such as "64M". overcommit: allow more of it than the host has free. append: the
    guest's command line. accel: "auto", "kvm" or "emulator"; intercept: "auto", "kernel" or "trap" (see
    accel/choose.py). console_in, console_out: descriptors for the serial port, which stay the caller's; without
    console_out the output is captured. on_cpuid: gets each CPUID that the guest executes, on its vCPU's thread; needs
    the emulator or trap.

    Raises BadInput (NotAvailable, NotFaithful) for what the caller can mend, HostError for what the host refuses.
    Needs close(), or use as a context manager. One that is dropped without that is closed with a ResourceWarning.
    restore(), receive() and arrive() make an object of a subclass without calling its __init__.
    """

    _rehearsed: tuple[str, ...] = ()  # accelerators, by this process
    _arrival: Destination | None = None  # of a VM that was migrated to here and has not run yet

    came_paused = False
    """Whether it was migrated to here while it was paused; then settle() keeps it so."""

    on_arrival: Callable[[], None] = staticmethod(lambda: None)
    """Called once, when a VM that was migrated to here runs and its source has not been told of it yet."""

    def __init__(
        self,
        image: StrPath,
        *,
        boot: str = "",
        initrd: StrPath | None = None,
        modules: Sequence[StrPath] = (),
        compat: bool = False,
        cpu: StrPath | None = None,
        cpus: int = 1,
        memory: int | str = "64M",
        overcommit: bool = False,
        append: str = "",
        accel: str = "auto",
        intercept: str = "auto",
        console_in: int = -1,
        console_out: int | None = None,
        on_cpuid: Callable[[CpuidRecord], None] | None = None,
    ) -> None:
        image = arguments.path("image", image)
        initrd = None if initrd is None else arguments.path("initrd", initrd)
        cpu = None if cpu is None else arguments.path("cpu", cpu)
        arguments.number("cpus", cpus)
        arguments.text("append", append)
        arguments.text("boot", boot)
        arguments.flag("compat", compat)
        if isinstance(modules, str) or not hasattr(modules, "__iter__"):
            raise BadInput(f"modules {modules!r}", f"is a {type(modules).__name__}", "give a list of them")
        files = [arguments.path("modules", module) for module in modules]
        size = parse_memory(memory)
        _check_host_options(overcommit, accel, intercept, console_in, console_out, on_cpuid)
        choose.open_accelerator(accel).prepare()
        if compat and cpu is not None:
            raise BadInput(f"cpu={cpu}", "cannot be combined with compatibility mode, which is a profile of its own")
        profile = profiles.load("hyperv-r2" if compat else "host" if cpu is None else cpu)
        self.image: boot_image.Image | None = recognise.read(find_image(image), size, boot)
        """What was loaded, without its bytes once they are; None for a restored VM."""
        self._modules = boot_image.read_modules(self.image, initrd, files, size)
        self.facts = choose.GuestFacts(image, self.image.cpuid_sites, self.image.enters_user_mode(append))
        self.choice, self.host, self.guest = choose.decide(
            lambda host: policy.guest_table(host, profile, policy.Topology(cpus)),
            self.facts,
            cpus,
            accel,
            _wish(intercept, on_cpuid),
        )
        if self.image.isa_level > 1:
            from pyhv.boot import isa

            isa.check(self.image, self.guest)
        self.notes = self.choice.notes
        """What the user should know, a line each."""
        self.command_line = append
        self.uuid = _new_uuid()
        check_address_width(size, self.guest, memory)
        check_fits(size, f"memory {memory}", overcommit)
        tables = [self.guest.table_for(index) for index in range(cpus)]
        # An image with notes is written for pyhv and has no use for a PIT, which takes long to take down, nor for much
        # memory. A kernel fills what it gets, sooner in huge pages.
        pc = self.image.is_for_pc
        plan = _Plan(GuestMemory(size, anonymous=pc), tables, pit=pc, pc=pc)
        self._build(plan, self._boot, console_in, console_out, on_cpuid)

    @classmethod
    def restore(
        cls,
        path: StrPath,
        *,
        verify: bool = False,
        strict_tsc: bool = False,
        overcommit: bool = False,
        accel: str = "auto",
        intercept: str = "auto",
        console_in: int = -1,
        console_out: int | None = None,
        on_cpuid: Callable[[CpuidRecord], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Self:
        """A VM that goes on where the one that was saved to `path` stood; paused. The file is not changed, and must not
        be while the VM lives: its memory is mapped from there. Each VM restored from a file is a clone: it has a UUID
        of its own.

        verify: check every byte of the memory first; progress: is then called with the bytes done and all that there
        are. strict_tsc: refuse a host whose time-stamp counter has another rate and cannot be scaled, even where the
        guest was never promised one. The others as in Machine().

        Raises BadInput for a file that is damaged or no snapshot, Incompatible with every reason why this host cannot
        run the guest, NotFaithful, HostError. Nothing is left behind then.
        """
        from pyhv.snapshot import file
        from pyhv.state import capture

        path = arguments.path("path", path)
        arguments.flag("verify", verify)
        arguments.flag("strict_tsc", strict_tsc)
        arguments.callback("progress", progress)
        _check_host_options(overcommit, accel, intercept, console_in, console_out, on_cpuid)
        with file.open_snapshot(path) as snapshot:
            if verify:
                snapshot.reader.verify(progress)
            saved = snapshot.state.machine
            machine = cls._for_state(saved, snapshot.needs, path, strict_tsc, accel, _wish(intercept, on_cpuid))
            machine.uuid = _new_uuid()
            check_fits(saved.memory, path, overcommit)
            memory = GuestMemory(saved.memory, (snapshot.reader.memory_fd, snapshot.reader.memory_offset))
            irqchip = snapshot.state.platform.irqchip
            pit = irqchip is not None and bool(irqchip.pit)
            pc = is_pc(device.name for device in snapshot.state.devices)
            plan = _Plan(memory, snapshot.tables, irqchip is not None, pit, True, pc)

            def prepare(vm: Vm) -> None:
                capture.apply(vm, snapshot.state, path)
                if pc:
                    from pyhv.boot.pc import renew_generation

                    renew_generation(vm)

            machine._build(plan, prepare, console_in, console_out, on_cpuid)
        return machine

    @classmethod
    def _for_state(
        cls, saved: MachineRecord, needs: Needs, where: str, strict_tsc: bool, accel: str, intercept: str
    ) -> Self:
        """A machine without a VM yet, for a guest that has run elsewhere. where: what errors call it.

        Raises Incompatible with every reason why this host cannot run the guest, NotFaithful."""
        from pyhv.state.needs import decide, facts_of

        machine = cls.__new__(cls)
        machine.image = None
        machine.facts = facts_of(saved)
        machine.choice, machine.host, machine.guest = decide(machine.facts, needs, where, strict_tsc, accel, intercept)
        machine.notes = needs.notes(machine.host)
        machine.notes += machine.choice.notes
        machine.command_line = saved.command_line
        machine.uuid = saved.uuid
        return machine

    @classmethod
    def receive(
        cls,
        uri: str,
        *,
        insecure: bool = False,
        tls: Tls | None = None,
        timeout: float | None = None,
        on_listening: Callable[[str], None] | None = None,
        overcommit: bool = False,
        accel: str = "auto",
        intercept: str = "auto",
        console_in: int = -1,
        console_out: int | None = None,
        on_cpuid: Callable[[CpuidRecord], None] | None = None,
    ) -> Self:
        """A VM that is migrated to here, paused: it is this side's now, and start() or run() lets it go on. Do that
        soon, for its guest stands and waits; until then, or close(), Python collects no garbage (gc.disable).

        uri: where to wait for it (migration/transport.py). insecure: tcp:// to other addresses than loopback. tls: for
        tls://. timeout: seconds to wait for somebody to come. on_listening: is called with the URI that the
        source is to be given, once it can come: it has the port that was chosen where the port is 0. The others as in
        Machine().

        Raises BadInput for an address that cannot be used, TimedOut if nobody came; Incompatible with every reason why
        this host cannot run the guest, NotFaithful, HostError. The VM goes on at the source then.
        """
        from pyhv.migration import transport
        from pyhv.migration.destination import Destination

        arguments.timeout(timeout)
        arguments.callback("on_listening", on_listening)
        _check_host_options(overcommit, accel, intercept, console_in, console_out, on_cpuid)
        with transport.Listener(transport.parse(uri, insecure), tls) as listener:
            cls.prepare_arrival(accel)  # while nobody has come yet
            if on_listening is not None:
                on_listening(listener.where)
            channel = listener.accept(timeout)
        if channel is None:
            raise TimedOut(uri, f"nobody came within {timeout:g} seconds", "start pyhv migrate at the source")
        return cls.arrive(
            Destination(channel),
            overcommit=overcommit,
            accel=accel,
            intercept=intercept,
            console_in=console_in,
            console_out=console_out,
            on_cpuid=on_cpuid,
        )

    @classmethod
    def arrive(
        cls,
        destination: Destination,
        *,
        overcommit: bool = False,
        accel: str = "auto",
        intercept: str = "auto",
        console_in: int = -1,
        console_out: int | None = None,
        on_cpuid: Callable[[CpuidRecord], None] | None = None,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> Self:
        """As receive(), over a connection that is there; closes it. while_waiting: is called now and then, and may
        raise to give the migration up."""
        from pyhv.migration import protocol
        from pyhv.state import capture

        machine: Machine | None = None
        try:
            hello = destination.greet()
            where = f"the guest {hello.name or hello.machine.image}"
            try:
                wish = _wish(intercept, on_cpuid)
                needs = hello.needs()
                candidate = cls._for_state(hello.machine, needs, where, hello.strict_tsc, accel, wish)
                size = parse_memory(hello.machine.memory)
                check_fits(size, where, overcommit)
                memory = GuestMemory(size, anonymous=True)
                plan = _Plan(memory, needs.tables, hello.irqchip, hello.pit, True, is_pc(hello.devices))
                candidate._build(plan, lambda vm: vm.devices.check(hello.devices), console_in, console_out, on_cpuid)
                machine = candidate
            except Incompatible as refusal:
                destination.refuse([str(reason) for reason in refusal.reasons])
                raise
            except PyhvError as error:
                destination.refuse([str(error)])
                raise
            protocol.warm_up()
            machine._rehearse()
            destination.accept(hello, memory.ram)
            # The first pages are on their way meanwhile.
            machine.vm.prepare_start()
            few = len(needs.tables) <= _FEW_VCPUS
            rehearse = _rehearsal(machine.vm) if few else lambda: None
            received = destination.receive(hello, while_waiting, rehearse)
            capture.apply_raw(machine.vm, received.state, where, received.elapsed)
            destination.confirm(while_waiting)
            machine._arrival = destination
            machine.came_paused = hello.paused
            return machine
        except BaseException as error:
            destination.close(error)
            if machine is not None:
                machine.close()
            raise

    @classmethod
    def prepare_arrival(cls, accel: str = "auto") -> None:
        """Does what arrive() needs and can be done while nobody has come yet. Raises what Machine() raises."""
        with Machine("hello", accel=accel, memory=MIN_MEMORY) as machine:  # a subclass may be made in another way
            machine._rehearse()
        choose.look_ahead(accel)
        choose.open_accelerator(accel).prepare()

    def _rehearse(self) -> None:
        """Moves the state of a VM made for that, like this one but small, all the way from it and back, in the life of
        the process once: the first time takes ten times as long, the first times (Python then knows which types there
        are) half as long again, and a guest would stand and wait."""
        from pyhv.migration import protocol

        accelerator = self.choice.accelerator
        if accelerator.name in Machine._rehearsed:
            return
        Machine._rehearsed += (accelerator.name,)
        protocol.warm_up()
        memory = GuestMemory(MIN_MEMORY)
        try:
            devices = Devices(memory.low_size, 0, pc=self.vm.devices.is_pc)
        except BaseException:
            memory.close()
            raise
        vm = Vm(accelerator, memory, devices, self.vm.tables[:1], irqchip=self.vm.irqchip, quick=True)
        try:
            for _ in range(_REHEARSALS):
                _rehearsal(vm)()
        finally:
            vm.close()

    def migrate(
        self,
        uri: str,
        *,
        limits: Limits | None = None,
        name: str = "",
        insecure: bool = False,
        tls: Tls | None = None,
        strict_tsc: bool = False,
        environment: Mapping[str, str] | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> Summary:
        """Gives the VM to the side that waits at `uri` (Machine.receive, pyhv receive), while it runs. One that is
        paused stays paused there.

        limits: how (migration/source.py). name: what the other side is told that the VM is called. strict_tsc: see
        restore(). environment: for ssh://, the variables of transport.SSH_VARIABLES instead of this process's.
        progress: is called now and then; what it raises gives the migration up. The others as in receive().

        Afterwards the VM is paused here, for good, and only close() is left to do. On failure it runs on as if nothing
        had been: Incompatible with every reason of the other side, GaveUp, BadInput, HostError, Cancelled. Only after
        HandoverUnknown it is paused, since it may run there; start(force=True) lets it run nevertheless.
        """
        from pyhv.migration import source, transport

        address = transport.parse(uri, insecure)
        arguments.text("name", name)
        arguments.flag("strict_tsc", strict_tsc)
        arguments.callback("progress", progress)
        if limits is not None:
            if not isinstance(limits, source.Limits):
                raise BadInput(f"limits {limits!r}", "is no pyhv.Limits")
            limits.check()

        def go(departure: Departure) -> Summary:
            with transport.connect(address, tls, environment=environment) as channel:
                try:
                    return self._depart(departure, channel, limits, name, strict_tsc, progress, lambda: True)
                except GaveUp:  # it has said why
                    raise
                except HostError as error:
                    complaint = channel.complaint()
                    if not complaint:
                        raise
                    detail = f"{error.detail}: {complaint}"
                    raise HostError(error.what, error.errnum, detail, error.advice) from None

        return self.vm.leave(uri, go)  # before the other side, who takes one VM, is bothered

    def cancel_migration(self) -> bool:
        """Gives up the migration that another thread, or this one in a callback, is in: its migrate() raises Cancelled,
        and the VM goes on here. Returns at once whether that is so: False where there is no migration, or the VM is
        given away already and the other side decides."""
        departure = self.vm.departure
        return departure is not None and departure.cancel()

    def depart(
        self,
        channel: Channel,
        *,
        limits: Limits | None = None,
        name: str = "",
        strict_tsc: bool = False,
        progress: Callable[[Progress], None] | None = None,
        may_stop: Callable[[], bool] = lambda: True,
    ) -> Summary:
        """As migrate(), over a connection that is there and stays the caller's. may_stop: the guest is not stopped
        before it says so."""
        if limits is not None:
            limits.check()
        return self.vm.leave(
            channel.peer,
            lambda departure: self._depart(departure, channel, limits, name, strict_tsc, progress, may_stop),
        )

    def _depart(
        self,
        departure: Departure,
        channel: Channel,
        limits: Limits | None,
        name: str,
        strict_tsc: bool,
        progress: Callable[[Progress], None] | None,
        may_stop: Callable[[], bool],
    ) -> Summary:
        from pyhv.migration import protocol, source
        from pyhv.state import capture

        departure.check()
        limits = limits or source.Limits()
        record = self._record()
        host = self.choice.accelerator.describe()
        self._rehearse()
        hello = protocol.hello(self.vm, record, host, limits.heartbeat, limits.silence)
        paused = not departure.ran
        hello = hello._replace(name=name, strict_tsc=strict_tsc, zstd=limits.compress, paused=paused)

        def tell(facts: Progress) -> None:
            if progress is not None:
                progress(facts)
            departure.check()

        outgoing = source.Outgoing(self.vm, hello, lambda: capture.capture_raw(self.vm), departure)
        return source.Source(outgoing, channel, limits, tell, may_stop).run()

    def save(self, path: StrPath, progress: Callable[[int, int], None] | None = None) -> None:
        """Writes the VM's whole state to `path`, in place of a file that is there.

        Needs: a VM that has not come to its end. Does: pauses a running VM until its memory is written, and lets it
        run on; a paused VM stays paused. progress: is called with the bytes of memory done and all that there are. On
        failure: the VM is as it was, and so is what was at `path`.

        Raises BadInput, HostError.
        """
        from pyhv.snapshot import file
        from pyhv.state import capture

        where = arguments.path("path", path)
        arguments.callback("progress", progress)
        writers = []

        def write() -> None:
            state = capture.capture(self.vm, self._record())
            writers.append(file.begin(where, capture.writer(self.host), state, self.vm.memory, tell))

        def tell(done: int, total: int) -> None:
            if progress is not None:
                progress(done, total)
            self.vm.life.check_open()

        try:
            self.vm.save(write)
        except BaseException:
            for writer in writers:
                writer.close()
            raise
        writers[0].commit()

    def _record(self) -> MachineRecord:
        from pyhv.state.records import MachineRecord

        return MachineRecord(
            uuid=self.uuid,
            image=self.facts.name,
            command_line=self.command_line,
            profile=self.guest.profile,
            hides=self.guest.hides,
            memory=self.vm.memory.size,
            cpuid_sites=self.facts.cpuid_sites,
            enters_user_mode=self.facts.enters_user_mode,
        )

    def _build(
        self,
        plan: _Plan,
        prepare: Callable[[Vm], None],
        console_in: int,
        console_out: int | None,
        on_cpuid: Callable[[CpuidRecord], None] | None,
    ) -> None:
        """Makes the VM and its console. plan: its memory is given over. prepare: puts the guest into the VM."""
        memory = plan.memory
        self._has_input, self._captured = console_in >= 0, console_out is None
        devices: Devices | None = None
        try:
            out = -1 if console_out is None else console_out
            devices = Devices(memory.low_size, memory.size - memory.low_size, console_in, out, plan.pc)
            if self._captured:
                devices.keep_output()
        except BaseException:
            if devices is not None:
                devices.close()
            memory.close()
            raise
        trap = None
        if self.choice.intercept == "trap" or on_cpuid:
            trap = Trap(self.choice.sites, _LOG_CAPACITY if on_cpuid else 0, on_cpuid)
        try:
            self.vm = Vm(
                self.choice.accelerator, memory, devices, plan.tables, trap, plan.irqchip, plan.pit, plan.quick
            )
            if self.choice.intercept == "kernel" and self.guest.hides:
                choose.check_read_back(self.guest, self.vm.vcpus[0].get_cpuid())
            if "arch_capabilities" in self.guest.visible:
                self.vm.tell_capabilities(self.guest.moving)
            prepare(self.vm)
        except BaseException:
            if hasattr(self, "vm"):
                self.vm.close()
            raise

    def _boot(self, vm: Vm) -> None:
        """Loads the image."""
        assert self.image is not None
        boot = vm.vcpus[0]
        rsdp = 0
        if vm.devices.is_pc:
            from pyhv.boot import pc

            rsdp = pc.furnish(vm, self.command_line, self.uuid)
        if self.image.kind in ("elf64", "flat"):
            regs, sregs = start64.load(self.image, vm.memory, self.command_line, len(vm.vcpus), boot.get_sregs())
        else:
            load = recognise.loader(self.image.kind)
            regs, sregs = load(self.image, vm.memory, self.command_line, self._modules, rsdp, boot.get_sregs())
        boot.set_sregs(sregs)
        boot.set_regs(regs)
        self.image, self._modules = self.image._replace(segments=()), ()  # they are in guest memory now

    @property
    def state(self) -> str:
        """Where the VM is in its life, one of pyhv.vm.life.STATES: "built", "running", "paused", "ended" ... Any thread
        may ask."""
        return self.vm.life.state

    @property
    def handed_over(self) -> str:
        """The side that this VM was handed over to by a migration; "" if it is here."""
        return self.vm.life.peer if self.vm.life.is_away else ""

    def run(self, timeout: float | None = None, *, fail_on: Collection[str] = ()) -> RunResult:
        """Runs the guest until it ends, at most `timeout` seconds; then it is paused and can be run on. So it is after
        stop() in another thread or a callback; after a migration in another thread it is there, and the cause is
        "migrated". One that is under way when the time is over is waited for. fail_on: causes that are failures though
        their status is 0, such as "halted" and "reset" for a kernel that panics so: the status is outcome.FAILED then.

        Raises WrongState, also where another thread closes the VM, and what a callback on a vCPU's thread raised.
        """
        arguments.timeout(timeout)
        outcome.check_fail_on(fail_on)
        self.start()
        reason = ""
        try:
            reason = self.vm.wait_for(timeout)
        finally:
            # All in one turn: nobody can let it run again before its registers are read.
            with self.vm.life.leaving, self.vm.life.turn:
                if self.vm.life.is_here:
                    self.pause()
                if reason:
                    result = self._result_of(reason, fail_on)
        return result

    def wait(self, timeout: float | None = None, *, fail_on: Collection[str] = ()) -> RunResult | None:
        """Waits until the guest, which start() lets run, comes to its end, or leaves by a migration, or stop() is
        called, at most `timeout` seconds. It is paused then; but None is returned where none of that has happened, and
        nothing is changed. fail_on: as in run(). Raises what run() raises.
        """
        outcome.check_fail_on(fail_on)
        reason = self.vm.wait_for(timeout)
        if reason == "timeout":
            return None
        with self.vm.life.leaving, self.vm.life.turn:
            if self.vm.life.is_here:
                self.pause()
            return self._result_of(reason, fail_on)

    def stop(self) -> None:
        """Makes the run() or wait() that is under way, or else the next one, return with the cause "stopped". Any
        thread, and callbacks."""
        self.vm.interrupt()

    def _result_of(self, reason: str, fail_on: Collection[str]) -> RunResult:
        """The result of a VM that is paused now, for what wait_for() said. Raises WrongState."""
        at = self.vm.life.at
        if at in (life.CLOSED, life.UNKNOWN):
            raise self.vm.life.refusal("run")
        if at == life.MOVED:
            return self.result(None, "migrated", fail_on)
        # It may have come to its end just before it was paused.
        return self.result(self.vm.stopped, "stopped" if reason == "stopped" else "timeout", fail_on)

    def pin(self, processors: Sequence[int]) -> None:
        """Binds the vCPUs to host processors, vCPU 0 to the first of them and so on, from the first again where there
        are fewer; from the next start() on. None: the host decides. Raises BadInput for one that cannot be used."""
        check_processors(processors)
        self.vm.processors = tuple(processors)

    def start(self, force: bool = False) -> None:
        """Lets the guest run in the background. force: also one that was handed over to another host, and may run
        there: two copies that both write to the outside world do harm. Raises BadInput."""
        if self._arrival is None:
            self.vm.start(force)
            return
        from pyhv.migration import waits

        with self.vm.life.turn:  # of a VM that has not run: no vCPU's thread calls this
            arrival, self._arrival = self._arrival, None
            try:
                if arrival is not None:
                    arrival.begin()  # from here on nobody says that the VM has not run here
                self.vm.start(force)
            except BaseException:
                if not self.vm.running:  # whoever starts it the next time tells its source, or close() hangs up
                    self._arrival = arrival
                elif arrival is not None:
                    arrival.close()
                raise
        if arrival is not None:
            try:
                since = self.vm.wait_for_entry(waits.ENTRY.seconds())
                self.on_arrival()
                arrival.announce(since)
            finally:
                arrival.close()

    def settle(self) -> None:
        """Instead of start(), for a VM that was migrated to here: tells the source that it is here, and keeps it
        paused. No effect on others."""
        with self.vm.life.turn:
            arrival, self._arrival = self._arrival, None
            if arrival is not None:
                arrival.begin()
                self.vm.rest()
        if arrival is not None:
            try:
                self.on_arrival()
                arrival.announce(time.monotonic_ns())
            finally:
                arrival.close()

    def pause(self) -> None:
        """Stops the guest between two instructions."""
        self.vm.pause()

    def result(
        self, stopped: Stopped | None, cause: str = "timeout", fail_on: Collection[str] = ()
    ) -> RunResult:
        """The result for a paused VM; `cause` says why it is paused where the guest has not ended (stopped is None).
        fail_on: as in run(). Raises WrongState for one that is running or closed."""
        self.vm.life.check_free("result")
        with self.vm.life.turn:
            if self.vm.running or self.vm.life.at == life.CLOSED:
                raise self.vm.life.refusal("result")
            result = self._result(stopped, cause)
        return result._replace(status=outcome.status_of(result.cause, result.status, fail_on))

    def _result(self, stopped: Stopped | None, cause: str) -> RunResult:
        cut_short = False
        if stopped is not None:
            cause = outcome.cause_of(stopped.exit.stop)
            # KVM_RUN gives EFAULT for memory that is gone, or the guest falls over it: neither would tell a user why.
            cut_short = cause in _FAULTS and self.vm.memory.is_cut_short()
            if cut_short:
                cause = "internal-error"
            status = outcome.status_of(cause, stopped.exit.status)
        else:
            status = outcome.status_of(cause)
        message = registers = ""
        about: tuple[int, Regs, Sregs] | tuple[()] = ()
        if cause == "migrated":
            message = f"migrated to {self.handed_over}"
        elif cause not in ("guest-exit", "power-off"):
            from pyhv.vm import report

            message = report.message(self.choice.accelerator, self.vm, cause, stopped)
            if cut_short:
                name = self.vm.memory.file()
                message = f"the snapshot {name} became shorter while its memory was in use: parts are gone; {message}"
            elif advice := choose.other_way(self.choice, self.facts, len(self.vm.vcpus), cause):
                message += f"; {advice}"
            vcpu = self.vm.vcpus[stopped.vcpu if stopped else 0]
            if not (cause == "triple-fault" and report.was_reset(vcpu)):
                about = (vcpu.index, vcpu.get_regs(), vcpu.get_sregs())
                if cause not in ("reset", "halted"):
                    registers = report.registers(vcpu)
        errnum, lost = self.vm.devices.lost_output()
        if errnum and cause != "migrated":
            ended = message or (f"the guest ended with status {status}" if cause == "guest-exit" else "it is off")
            message = f"console: {os.strerror(errnum)}: {lost} bytes of the guest's output are lost; {ended}"
            cause, status = "internal-error", outcome.status_of("internal-error")
        console, dropped = self.vm.output()
        return RunResult(cause, status, console, message, registers, self.counters(), dropped, *about)

    def counters(self) -> dict[str, int]:
        """Exits of all vCPUs by kind, so far. Any thread may ask."""
        return self.vm.counters()

    def console(self) -> bytes:
        """What the guest has printed so far, where the console is captured; else nothing. The last 16 MiB are kept
        (vm.devices.KEPT): console_dropped says how much came before them."""
        return self.vm.output()[0]

    @property
    def console_dropped(self) -> int:
        """How many bytes the guest had printed before what console() returns, which are kept no longer."""
        return self.vm.output()[1]

    def send(self, data: bytes, timeout: float | None = None) -> None:
        """Types `data` on the guest's console. Returns when all of it waits for the guest or was read by it; up to
        64 KiB may wait. What was not read when the VM is migrated does not travel. For a machine without console_in.

        Raises BadInput, WrongState where there is no guest here to read it, TimedOut after `timeout` seconds.
        """
        arguments.timeout(timeout)
        self.vm.life.check_thread("send")
        self._conversation().send(data, timeout)

    def expect(self, what: bytes | Pattern[bytes], timeout: float | None = None) -> Match[bytes]:
        """Waits until the guest, which start() lets run, has printed what `what` matches: bytes as they are, or a
        compiled pattern; the match. Each call looks at what came behind the match of the one before. For a machine
        without console_out. A pattern sees what has come so far: let it end in something that tells that all is there.

        Raises TimedOut after `timeout` seconds, WrongState where it cannot come any more (the guest ended, was moved or
        closed, or stop() was called), BadInput, and what a callback on a vCPU's thread raised.
        """
        arguments.timeout(timeout)
        self.vm.life.check_free("expect")
        return self._conversation().expect(what, timeout)

    def _conversation(self) -> Console:
        from pyhv.vm.console import Console

        if "_console" not in self.__dict__:  # made by one of the threads that come first
            self.__dict__.setdefault("_console", Console(self.vm, self._captured, self._has_input))
        made: Console = self.__dict__["_console"]
        return made

    def close(self) -> None:
        """Ends the VM and gives everything back; closing twice is allowed."""
        try:
            self.vm.close()
        finally:
            if self.vm.life.state == life.CLOSED:
                with self.vm.life.turn:
                    arrival, self._arrival = self._arrival, None
                if arrival is not None:
                    arrival.close()
                if "_console" in self.__dict__:
                    self._conversation().close()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        vm: Vm | None = self.__dict__.get("vm")
        if vm is None or vm.life.at == life.CLOSED:
            return
        if is_finalizing():  # no thread of Python's runs any more that could be waited for
            return
        import warnings

        what = f"a machine was dropped without close(): {self.facts.name}"
        warnings.warn(what, ResourceWarning, stacklevel=2, source=self)
        if vm.life.is_guest_thread:  # collected there, which cannot wait for itself
            import threading

            threading.Thread(target=self.close, name="close-dropped").start()
        else:
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_host_options(
    overcommit: bool, accel: str, intercept: str, console_in: int, console_out: int | None, on_cpuid: object
) -> None:
    """What every way to a Machine takes. Raises BadInput."""
    arguments.flag("overcommit", overcommit)
    arguments.choice("accel", accel, choose.ACCELERATORS)
    arguments.choice("intercept", intercept, choose.INTERCEPTS)
    arguments.callback("on_cpuid", on_cpuid)
    if console_in != -1:
        arguments.descriptor("console_in", console_in, writing=False)
    if console_out is not None:
        arguments.descriptor("console_out", console_out, writing=True)


def _rehearsal(vm: Vm) -> Callable[[], None]:
    """Takes the state of a VM that has never run, and returns what puts it back from the bytes of its messages."""
    from pyhv.migration import protocol
    from pyhv.state import capture

    state = capture.capture_raw(vm)
    vcpus, end = protocol.parts(state, 0, 0, 0)
    messages = [(type(message), protocol.encode(message)[1]) for message in (*vcpus, end)]

    def arrive() -> None:
        for cls, payload in messages:
            protocol.decode(cls, payload)
        capture.apply_raw(vm, state, "")

    return arrive


def check_processors(processors: Sequence[int]) -> None:
    """Raises BadInput where this process may not use one of these host processors."""
    usable = os.sched_getaffinity(0)
    for processor in processors:
        if processor not in usable:
            some = ", ".join(map(str, sorted(usable)[:16]))
            raise BadInput(f"processor {processor}", "cannot be used by this process", f"it has {some}")


def find_image(image: str) -> str:
    """The path for what the user named: a bundled guest, else a file (./NAME names a file of the same name).

    Raises BadInput with the nearest name.
    """
    if "/" in image:
        return image
    from pyhv import guests

    if image in guests.names():
        return guests.path(image)
    if os.path.exists(image):
        return image
    import difflib

    near = difflib.get_close_matches(image, guests.names(), 1)
    raise BadInput(
        image,
        "is neither a file nor a bundled guest",
        f"did you mean {near[0]}?" if near else f"the bundled guests are {', '.join(guests.names())}",
    )


def parse_memory(memory: int | str) -> int:
    """Bytes of guest memory for a number of bytes or a string such as 64M, 64MiB, 0.5G (of 1024) or 64MB (of 1000).
    Raises BadInput."""
    advice = "give a size such as 64M or 1G"
    if isinstance(memory, str):
        try:
            size = arguments.size(memory.strip())
        except ValueError as error:
            raise BadInput(f"memory {memory}", str(error), advice) from None
    else:
        size = arguments.number("memory", memory)
    if size < MIN_MEMORY:
        raise BadInput(f"memory {memory}", f"is too small; the least is {MIN_MEMORY >> 20}M", advice)
    if size > MAX_MEMORY:
        raise BadInput(f"memory {memory}", f"is too much; the most is {MAX_MEMORY >> 40}T", advice)
    if size % PAGE_SIZE:
        raise BadInput(f"memory {memory}", f"is not a multiple of {PAGE_SIZE} bytes (a page)", advice)
    return size


def check_address_width(size: int, guest: policy.GuestCpu, label: object) -> None:
    """Raises BadInput, naming the size as the user gave it, where RAM lies beyond the physical addresses that the
    guest's processor has."""
    bits = guest.physical_address_bits
    highest = size - 1 if size <= LOW_RAM_LIMIT else HIGH_RAM_BASE + size - LOW_RAM_LIMIT - 1
    if highest >> bits:
        raise BadInput(
            f"memory {label}",
            f"reaches beyond the {bits} physical address bits that profile {guest.profile} shows",
            f"the most is {(1 << bits) - (HIGH_RAM_BASE - LOW_RAM_LIMIT) >> 20}M",
        )


def _wish(intercept: str, on_cpuid: object) -> str:
    """What choose.decide() is asked for: the kernel tells of no CPUID, so it is no way for one who wants them all."""
    if not on_cpuid:
        return intercept
    return choose.LOGGED if intercept == "auto" else "trap"


def _new_uuid() -> str:
    """A random UUID (RFC 9562, version 4). The module uuid would cost start-up time."""
    digits = f"{int.from_bytes(os.urandom(16), 'big') & ~(0xF << 76 | 3 << 62) | 4 << 76 | 2 << 62:032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
