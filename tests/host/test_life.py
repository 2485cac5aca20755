"""The life of a VM: whoever asks for what, from wherever and whenever, there is one owner and one copy."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import pyhv
from pyhv.accel import choose
from pyhv.migration.destination import Destination
from pyhv.migration.source import Limits
from pyhv.migration.transport import Channel
from pyhv.vm import life

from .cli import IN_THE_LAB
from .migration import APPEND, MEMORY, TIMEOUT, check_console, descriptors, wait_for_rounds

LIMITS = Limits(downtime=10.0, rounds=1, silence=10.0)  # one that always suffices, on slow hosts too
OPERATIONS = ("start", "pause", "save", "migrate", "close", "run", "wait", "stop", "result", "look")
STAGES = ("built", "running", "paused", "ended", "moved", "closed")
REPEATED = 1 if IN_THE_LAB else 8  # its hosts have one processor, which is ten times slower


def new(console: int | None = None, append: str = APPEND, **options: Any) -> pyhv.Machine:
    return pyhv.Machine("ticker", append=append, memory=MEMORY, console_out=console, **options)


class Trial:
    """A machine at a stage of its life, and what several threads do to it. All copies of its guest print to one
    console, where two that run would be seen."""

    def __init__(self, directory: Path) -> None:
        self.console = os.memfd_create("console")
        self.path = str(directory / "saved")
        self.machine = new(self.console)
        self.arrived: list[pyhv.Machine] = []
        self.errors: list[BaseException] = []
        self._receivers: list[threading.Thread] = []

    def bring_to(self, stage: str) -> None:
        if stage == "built":
            return
        self.machine.start()
        wait_for_rounds(self.machine, 1)
        if stage == "paused":
            self.machine.pause()
        elif stage == "moved":
            self.migrate()
        elif stage == "closed":
            self.machine.close()
        elif stage == "ended":
            self.machine.vm.memory.write(0x200000, bytes(0x10000))  # it notices, and ends
            self.machine.vm.wait(TIMEOUT)

    def do(self, operation: str) -> None:
        """What must come to an end, and to nothing but success or a refusal that is typed."""
        try:
            getattr(self, operation)()
        except pyhv.PyhvError:
            pass
        except BaseException as error:
            self.errors.append(error)

    def start(self) -> None:
        self.machine.start()

    def pause(self) -> None:
        self.machine.pause()

    def save(self) -> None:
        self.machine.save(self.path)

    def close(self) -> None:
        self.machine.close()

    def run(self) -> None:
        self.machine.run(0.001)

    def wait(self) -> None:
        self.machine.wait(0.001)

    def stop(self) -> None:
        self.machine.stop()

    def result(self) -> None:
        self.machine.result(None)

    def look(self) -> None:
        assert self.machine.state in life.STATES
        self.machine.console()
        self.machine.counters()

    def migrate(self) -> None:
        ours, theirs = socket.socketpair()

        def take() -> None:
            channel = Channel(theirs.fileno(), theirs.fileno(), "the source", theirs.close)
            with contextlib.suppress(pyhv.PyhvError):
                there = pyhv.Machine.arrive(Destination(channel), console_out=self.console)
                self.arrived.append(there)
                there.start()

        receiver = threading.Thread(target=take, name="receiver")
        self._receivers.append(receiver)
        receiver.start()
        try:
            with Channel(ours.fileno(), ours.fileno(), "the destination", ours.close) as channel:
                self.machine.depart(channel, limits=LIMITS)
        finally:
            receiver.join(TIMEOUT)

    def check(self) -> None:
        """Nothing failed, one copy ran, and what was saved is whole."""
        assert not self.errors, self.errors
        assert len(self.arrived) <= 1
        machine = self.machine
        if self.arrived:
            assert machine.state in (life.MOVED, life.CLOSED) and not machine.vm.running
            with pytest.raises(pyhv.WrongState):
                machine.start()
        elif machine.state != life.CLOSED:
            # Whatever came together, it is where it says it is, and goes on from there.
            assert machine.vm.running == (machine.state == life.RUNNING)
            if machine.state != life.ENDED:
                machine.start()
                wait_for_rounds(machine, 1)
        for there in self.arrived:
            wait_for_rounds(there, 1)
            there.close()
        machine.close()
        text = os.pread(self.console, os.fstat(self.console).st_size, 0)
        lines = [line for line in text.splitlines(keepends=True) if b" holds " not in line]  # how it was ended
        if b"".join(lines).count(b"\n") > 1:
            check_console(b"".join(lines))
        if os.path.exists(self.path):
            with pyhv.Machine.restore(self.path, verify=True) as clone:
                assert clone.state == life.PAUSED
                clone.start()
                wait_for_rounds(clone, 1)

    def clean_up(self) -> None:
        for machine in (self.machine, *self.arrived):
            machine.close()
        os.close(self.console)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


def together(trial: Trial, operations: tuple[str, ...], chance: random.Random) -> None:
    """Does all of them at about the same time."""
    barrier = threading.Barrier(len(operations))

    def go(operation: str, delay: float) -> None:
        barrier.wait()
        time.sleep(delay)
        trial.do(operation)

    threads = [
        threading.Thread(target=go, args=(operation, chance.choice((0, 0, 0.0002, 0.001, 0.004))), daemon=True)
        for operation in operations
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
        if thread.is_alive():
            faulthandler.dump_traceback(all_threads=True)
            raise AssertionError(f"{operations}: one does not come to its end")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    gc.collect()  # what the tests before have left to it
    choose.open_accelerator().prepare()
    before, threads = descriptors(), threading.active_count()
    yield
    choose.open_accelerator().prepare()
    assert (descriptors(), threading.active_count()) == (before, threads)


@pytest.mark.parametrize("stage", STAGES)
def test_every_pair_of_operations_from_two_threads(stage: str, tmp_path: Path) -> None:
    pyhv.Machine.prepare_arrival()
    chance = random.Random(stage)
    pairs = list(itertools.combinations_with_replacement(OPERATIONS, 2))
    for _ in range(REPEATED):
        for pair in chance.sample(pairs, len(pairs)):
            trial = Trial(tmp_path)
            try:
                trial.bring_to(stage)
                together(trial, pair, chance)
                trial.check()
            except BaseException as error:
                error.add_note(f"{stage}: {pair}, {trial.machine.state}")
                raise
            finally:
                trial.clean_up()


def test_all_at_once(tmp_path: Path) -> None:
    chance = random.Random(1)
    for _ in range(20):
        trial = Trial(tmp_path)
        try:
            trial.bring_to("running")
            together(trial, tuple(chance.choices(OPERATIONS, k=8)), chance)
            trial.check()
        finally:
            trial.clean_up()


def test_two_copies_would_be_seen(tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    try:
        trial.bring_to("moved")
        trial.machine.start(force=True)
        wait_for_rounds(trial.machine, 2)
        trial.machine.pause()
        trial.machine.vm.life.at = life.MOVED
        with pytest.raises(AssertionError, match="more than one copy"):
            trial.check()
    finally:
        trial.clean_up()


# ------------------------------------------------------------------------------------------- what is under way is held


class Held:
    """A transition that is held in its middle, on a thread of its own."""

    def __init__(self, trial: Trial, operation: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trial = trial
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.error: BaseException | None = None
        self.calls: list[Callable[[], None]] = []  # to be made there, while it is held
        machine = trial.machine

        def hold() -> None:
            if machine.state == state and not self.reached.is_set():
                for call in self.calls:
                    call()
                self.reached.set()
                assert self.go_on.wait(TIMEOUT)

        if operation == "save":
            save = machine.save
            monkeypatch.setattr(machine, "save", lambda path: save(path, lambda done, total: hold()))
        else:
            depart = machine.depart
            monkeypatch.setattr(
                machine, "depart", lambda channel, limits: depart(channel, limits=limits, progress=lambda p: hold())
            )
            if state == life.HANDING_OVER:
                capture = pyhv.state.capture.capture_raw  # type: ignore[attr-defined]

                def held(vm: Any) -> object:
                    if vm is machine.vm:
                        hold()
                    return capture(vm)

                monkeypatch.setattr("pyhv.state.capture.capture_raw", held)
        self._operation = operation
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            getattr(self.trial, self._operation)()
        except BaseException as error:
            self.error = error
            self.reached.set()

    def begin(self) -> None:
        self.thread.start()
        assert self.reached.wait(TIMEOUT)

    def end(self) -> None:
        self.go_on.set()
        self.thread.join(TIMEOUT)
        assert not self.thread.is_alive()


UNDER_WAY = [("save", life.SAVING), ("migrate", life.MIGRATING), ("migrate", life.HANDING_OVER)]


@pytest.mark.parametrize("asked", life.TABLE)
@pytest.mark.parametrize(("under_way", "state"), UNDER_WAY)
def test_what_is_asked_while_something_is_under_way(
    asked: str, under_way: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for it, ends it or is refused, as the table has it."""
    trial = Trial(tmp_path)
    trial.bring_to("running")
    held = Held(trial, under_way, state, monkeypatch)
    other = tmp_path / "other"
    calls: dict[str, Callable[[], object]] = {
        "save": lambda: pyhv.Machine.save(trial.machine, str(other)),
        "migrate": lambda: trial.machine.migrate("unix:/nowhere"),
    }
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            calls.get(asked, getattr(trial.machine, asked))()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    try:
        held.begin()
        assert trial.machine.state == state
        thread.start()
        cell = life.TABLE[asked][state]
        thread.join(0.3 if cell in ("wait", "end") else TIMEOUT)
        assert thread.is_alive() == (cell in ("wait", "end"))
        if cell == "no":
            (refused,) = errors
            assert isinstance(refused, pyhv.WrongState)
            assert (refused.state, refused.asked) == (state, asked)
        held.end()
        thread.join(TIMEOUT)
        assert not thread.is_alive()
        if cell == "end":
            assert trial.machine.state == life.CLOSED and not errors
        # What is in the hand-over may get through.
        if cell == "end" and not (state == life.HANDING_OVER and trial.arrived):
            assert isinstance(held.error, pyhv.WrongState) and "is being closed" in str(held.error)
            assert not trial.arrived and not os.path.exists(trial.path)
        else:
            assert held.error is None
        trial.check()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(other)
    finally:
        held.go_on.set()
        trial.clean_up()


REFUSED_INSIDE = ("start", "pause", "save", "migrate", "close", "run", "wait", "result")


@pytest.mark.parametrize(("under_way", "state"), UNDER_WAY)
def test_a_callback_that_calls_back(
    under_way: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the same thread nothing can wait: it is refused, and what is under way goes on."""
    trial = Trial(tmp_path)
    trial.bring_to("running")
    held = Held(trial, under_way, state, monkeypatch)
    held.go_on.set()
    outcomes: dict[str, object] = {}

    def call(name: str) -> None:
        calls: dict[str, Callable[[], object]] = {
            "save": lambda: pyhv.Machine.save(trial.machine, str(tmp_path / "other")),
            "migrate": lambda: trial.machine.migrate("unix:/nowhere"),
            "run": lambda: trial.machine.run(1),
            "result": lambda: trial.machine.result(None),
        }
        try:
            outcomes[name] = calls.get(name, getattr(trial.machine, name))()
        except BaseException as error:
            outcomes[name] = error

    held.calls = [lambda name=name: call(name) for name in (*REFUSED_INSIDE, "stop", "console", "counters")]  # type: ignore[misc]
    try:
        held.begin()
        held.end()
        assert held.error is None
        for name in REFUSED_INSIDE:
            if name == "start" and state == life.MIGRATING:
                assert outcomes[name] is None  # it runs
            else:
                assert isinstance(outcomes[name], pyhv.WrongState), (name, outcomes[name])
        assert outcomes["stop"] is None and isinstance(outcomes["counters"], dict)
        trial.check()
    finally:
        trial.clean_up()


@pytest.mark.parametrize("name", REFUSED_INSIDE)
def test_a_callback_on_a_vcpus_thread_that_calls_back(name: str) -> None:
    """It runs on: a vCPU cannot wait for itself to stop."""
    errors: list[BaseException] = []
    arguments: dict[str, tuple[object, ...]] = {"save": ("x",), "migrate": ("unix:/nowhere",), "result": (None,)}

    def call(record: object) -> None:
        if not errors:
            try:
                getattr(machine, name)(*arguments.get(name, ()))
            except pyhv.WrongState as error:
                errors.append(error)

    with pyhv.Machine("cpuid", on_cpuid=call) as machine:
        assert machine.run(TIMEOUT).cause == "guest-exit"
    assert "waits for this callback, on its vCPU's thread: it cannot" in str(errors[0])
    assert str(errors[0]).endswith("call stop() here")


def test_stop_in_a_callback_ends_the_run() -> None:
    with pyhv.Machine("cpuid", on_cpuid=lambda record: machine.stop()) as machine:
        result = machine.run(TIMEOUT)
        assert (result.cause, result.status, machine.state) == ("stopped", 0, life.PAUSED)


def test_an_arrival_may_be_paused_by_who_hears_of_it() -> None:
    ours, theirs = socket.socketpair()
    with new() as here:
        here.start()
        wait_for_rounds(here)
        found: list[pyhv.Machine] = []

        def take() -> None:
            there = pyhv.Machine.arrive(Destination(Channel(theirs.fileno(), theirs.fileno(), "s", theirs.close)))
            there.on_arrival = there.pause  # type: ignore[method-assign]
            there.start()
            found.append(there)

        thread = threading.Thread(target=take)
        thread.start()
        with Channel(ours.fileno(), ours.fileno(), "d", ours.close) as channel:
            here.depart(channel, limits=LIMITS)
        thread.join(TIMEOUT)
        with found[0] as there:
            assert (here.state, there.state) == (life.MOVED, life.PAUSED)


def test_an_arrival_that_could_not_be_started_is_told_of_when_it_is() -> None:
    """Its source waits meanwhile, and hears then who has the VM."""
    ours, theirs = socket.socketpair()
    with new() as here:
        here.start()
        wait_for_rounds(here)
        found: list[pyhv.Machine] = []
        failures: list[pyhv.HostError] = []

        def take() -> None:
            there = pyhv.Machine.arrive(Destination(Channel(theirs.fileno(), theirs.fileno(), "s", theirs.close)))
            found.append(there)
            start = there.vm.start

            def fail(force: bool) -> None:
                raise pyhv.HostError("start a thread", 11)

            there.vm.start = fail  # type: ignore[assignment,method-assign]
            try:
                there.start()
            except pyhv.HostError as error:
                failures.append(error)
            there.vm.start = start  # type: ignore[method-assign]
            there.start()

        thread = threading.Thread(target=take)
        thread.start()
        with Channel(ours.fileno(), ours.fileno(), "d", ours.close) as channel:
            here.depart(channel, limits=LIMITS)
        thread.join(TIMEOUT)
        with found[0] as there:
            assert failures and (here.state, there.state) == (life.MOVED, life.RUNNING)


def test_a_vcpu_that_is_never_entered_is_not_waited_for_for_ever() -> None:
    with new() as machine, pytest.raises(pyhv.HostError, match=r"vCPU 0: .*did not begin within 0.01 seconds"):
        machine.vm.wait_for_entry(0.01)


# ------------------------------------------------------------------------------------------------ dropped, and derived


@pytest.mark.parametrize("stage", ["built", "running", "paused", "moved"])
def test_a_dropped_machine_gives_all_back_and_warns(stage: str, tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    try:
        trial.bring_to(stage)
        with pytest.warns(ResourceWarning, match="a machine was dropped without close"):
            trial.machine = new()  # what the old one had is missed at the end of the test
        if not trial.arrived:
            assert not [thread for thread in threading.enumerate() if thread.name.startswith("vcpu-")]
    finally:
        trial.clean_up()


def test_one_that_was_closed_or_never_made_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    machine = new()
    machine.close()
    del machine
    with pytest.raises(pyhv.BadInput):
        new(cpus=0)
    assert not [warning for warning in recwarn if warning.category is ResourceWarning]


def test_one_that_lives_at_the_end_of_the_program_does_not_hold_it_up() -> None:
    # A guest without exits; in the lab's hosts their own timers stop meanwhile (tests/lab/README.md).
    guest = "'ticker', append='every=1'" if IN_THE_LAB else "'spin', append='cli'"
    code = f"import pyhv; machine = pyhv.Machine({guest}); machine.start()"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, timeout=TIMEOUT)
    assert (done.returncode, done.stderr) == (0, b"")


class Named(pyhv.Machine):
    """A subclass that is made in its own way."""

    def __init__(self, name: str) -> None:
        super().__init__("ticker", append=APPEND, memory=MEMORY)
        self.name = name


def test_a_subclass_is_saved_restored_and_received(tmp_path: Path) -> None:
    with Named("x") as machine:
        machine.start()
        wait_for_rounds(machine)
        machine.save(tmp_path / "saved")
        uri = f"unix:{tmp_path}/m"
        found: list[Named] = []
        listens = threading.Event()

        def receive() -> None:
            found.append(Named.receive(uri, timeout=TIMEOUT, on_listening=lambda uri: listens.set()))

        receiver = threading.Thread(target=receive)
        receiver.start()
        assert listens.wait(TIMEOUT)
        there = threading.Thread(target=lambda: (receiver.join(TIMEOUT), found[0].start()))
        there.start()
        machine.migrate(uri, limits=LIMITS)
        there.join(TIMEOUT)
    for got in (found[0], Named.restore(tmp_path / "saved")):
        with got:
            assert type(got) is Named
            got.start()
            wait_for_rounds(got)


# ------------------------------------------------------------------------------------------------ waiting, and its end


@pytest.mark.parametrize("wait", ["run", "wait"])
def test_who_waits_hears_that_another_thread_closes_it(wait: str) -> None:
    machine = new()
    machine.start()
    wait_for_rounds(machine)
    closer = threading.Timer(0.1, machine.close)
    closer.start()
    with pytest.raises(pyhv.WrongState, match="this VM: has been closed: it cannot run; make another one"):
        getattr(machine, wait)()
    closer.join()


def test_who_runs_hears_that_another_thread_migrates_it(tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    results: list[pyhv.RunResult] = []
    runner = threading.Thread(target=lambda: results.append(trial.machine.run()))
    runner.start()
    try:
        wait_for_rounds(trial.machine)
        trial.migrate()
        runner.join(TIMEOUT)
        (result,) = results
        assert (result.cause, result.status, result.message) == ("migrated", 0, "migrated to the destination")
        trial.check()
    finally:
        trial.clean_up()


def test_a_closed_machine_says_so() -> None:
    machine = new()
    machine.close()
    machine.close()
    assert machine.state == life.CLOSED and machine.console() == b"" and machine.counters() == {}
    for call in (
        machine.start,
        machine.pause,
        machine.run,
        machine.wait,
        lambda: machine.save("x"),
        lambda: machine.migrate("unix:x"),
        lambda: machine.result(None),
    ):
        with pytest.raises(pyhv.WrongState, match="this VM: has been closed: it cannot "):
            call()
    with pytest.raises(pyhv.BadInput, match="no RAM"):
        machine.vm.memory.read(0x200000, 8)


@pytest.mark.parametrize("timeout", [float("nan"), -1, -0.001])
def test_what_is_no_timeout(timeout: float) -> None:
    with new() as machine:
        for call in (machine.run, machine.wait):
            with pytest.raises(pyhv.BadInput, match="is no number of seconds from 0 on"):
                call(timeout)
        assert machine.state == life.BUILT


def test_any_other_time_can_be_waited_for() -> None:
    for timeout in (float("inf"), 1e300, None):
        with pyhv.Machine("hello") as machine:
            assert machine.run(timeout).cause == "guest-exit"
    with new() as machine:
        assert machine.run(0).cause == "timeout"


def test_wait_and_stop() -> None:
    with new() as machine:
        assert (machine.wait(0.01), machine.state) == (None, life.BUILT)
        machine.start()
        assert (machine.wait(0.01), machine.state) == (None, life.RUNNING)
        threading.Timer(0.05, machine.stop).start()
        result = machine.wait()
        assert result is not None
        assert (result.cause, machine.state) == ("stopped", life.PAUSED)
        machine.stop()  # the next one
        assert machine.run(TIMEOUT).cause == "stopped"
        assert machine.run(0.01).cause == "timeout"
    with pyhv.Machine("hello") as machine:
        machine.start()
        result = machine.wait(TIMEOUT)
        assert result is not None
        assert (result.cause, result.status, machine.state) == ("guest-exit", 0, life.ENDED)


def test_all_who_wait_are_stopped() -> None:
    with new() as machine:
        machine.start()
        results: list[object] = []
        threads = [threading.Thread(target=lambda: results.append(machine.wait())) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        machine.stop()
        for thread in threads:
            thread.join(TIMEOUT)
        assert [result.cause for result in results] == ["stopped"] * 3  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------------- Ctrl-C at any moment


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it may come in a weak reference's end
def test_ctrl_c_at_any_moment_of_anything(tmp_path: Path) -> None:
    """A transition is done or not done, and the machine is good for the next one."""
    armed: list[bool] = []
    turns, caught = 100 if IN_THE_LAB else 600, 0

    def interrupt(number: int, frame: FrameType | None) -> None:
        if armed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    chance = random.Random(7)
    path = str(tmp_path / "saved")
    machine = new(cpus=2)
    try:
        machine.start()
        wait_for_rounds(machine)
        operations: list[Callable[[], object]] = [
            machine.start, machine.pause, lambda: machine.save(path), lambda: machine.run(0.001),
        ]  # fmt: skip
        for turn in range(turns):
            if turn % 100 == 99:
                operations.append(machine.close)
            try:
                armed.append(True)
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-5, 2e-3))
                with contextlib.suppress(pyhv.WrongState):  # after close()
                    for _ in range(3):
                        chance.choice(operations)()
                armed.clear()
            except KeyboardInterrupt:
                caught += 1
            finally:
                armed.clear()
                signal.setitimer(signal.ITIMER_REAL, 0)
            if turn % 100 == 99:
                operations.pop()
                machine.close()
                assert machine.state == life.CLOSED
                assert not [thread for thread in threading.enumerate() if thread.name.startswith("vcpu-")]
                machine = new(cpus=2)
                operations[:2] = [machine.start, machine.pause]
            assert machine.state in (life.BUILT, life.RUNNING, life.PAUSED)
            assert machine.vm.running == (machine.state == life.RUNNING)
            machine.start()
            wait_for_rounds(machine, 1)
            if chance.random() < 0.5:
                machine.pause()
    finally:
        signal.signal(signal.SIGALRM, before)
        machine.close()
        # Between open(2) and the place where Python keeps its result an exception loses the descriptor: of new files.
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/self/fd/{name}").startswith(str(tmp_path)):
                    os.close(int(name))
    assert caught > turns // 2
