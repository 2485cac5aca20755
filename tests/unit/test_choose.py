"""The decision between ways to intercept, in every case that design allows, with an accelerator made of paper."""

from __future__ import annotations

from typing import Any

import pytest

from pyhv.accel import choose, probe
from pyhv.cpu import features
from pyhv.cpu.host import Verdict
from pyhv.cpu.table import CpuidTable, Registers
from pyhv.errors import BadInput, HostError, Incompatible, NotAvailable, NotFaithful

AVX = features.find("avx")
TABLE = CpuidTable({(0, 0): Registers(1, 0x68747541, 0x444D4163, 0x69746E65), (1, 0): Registers(0, 0, 1, 0)})
FAITHFUL = Verdict(leaks={0: {}, 3: {}}, ignored=frozenset())
LEAKS_AT_3 = Verdict(leaks={0: {}, 3: {AVX.word: 1 << AVX.bit}}, ignored=frozenset({3}))
LEAKS_EVERYWHERE = Verdict(leaks={0: {AVX.word: 1 << AVX.bit}, 3: {AVX.word: 1 << AVX.bit}}, ignored=frozenset({3}))


class Guest:
    """As much of GuestCpu as the choice looks at."""

    def __init__(self, hides: bool = True, table: CpuidTable = TABLE) -> None:
        self.hides = hides
        self.table = table
        self.profile = "test"


class PaperAccelerator:
    name = "paper"


def facts(sites: tuple[int, ...] = (0x100010,), user: bool = False) -> choose.GuestFacts:
    return choose.GuestFacts("guest", sites, user)


def decide(
    monkeypatch: pytest.MonkeyPatch,
    verdict: Verdict,
    facts: choose.GuestFacts,
    wish: str = "auto",
    breakpoints: tuple[int, ...] = (0,),
    steps: tuple[int, ...] = (0,),
    **guest: Any,
) -> choose.Choice:
    """breakpoints, steps: the privilege levels at which trap works on this paper host."""
    monkeypatch.setitem(probe._verdicts, "paper", verdict)
    for cpl in (0, 3):
        monkeypatch.setitem(probe._traps, ("paper", False, cpl), cpl in breakpoints)
        monkeypatch.setitem(probe._traps, ("paper", True, cpl), cpl in steps)
    return choose.choose(PaperAccelerator(), Guest(**guest), facts, wish)  # type: ignore[arg-type]


def test_a_profile_that_hides_nothing_needs_no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "verdict", lambda _: pytest.fail("probed"))
    for wish in ("auto", "kernel"):
        choice = choose.choose(PaperAccelerator(), Guest(hides=False), facts(), wish)  # type: ignore[arg-type]
        assert (choice.intercept, choice.note) == ("kernel", "")


@pytest.mark.parametrize("wish", ["auto", "kernel"])
def test_a_faithful_host_intercepts_in_the_kernel(monkeypatch: pytest.MonkeyPatch, wish: str) -> None:
    for user in (False, True):
        choice = decide(monkeypatch, FAITHFUL, facts((), user), wish)
        assert (choice.intercept, choice.note) == ("kernel", "")


@pytest.mark.parametrize("verdict", [LEAKS_AT_3, LEAKS_EVERYWHERE])
def test_auto_traps_what_declares_its_cpuids_and_stays_at_cpl_0(
    monkeypatch: pytest.MonkeyPatch, verdict: Verdict
) -> None:
    choice = decide(monkeypatch, verdict, facts())
    assert (choice.intercept, choice.sites) == ("trap", (0x100010,))
    assert "covered: CPL 0, which this guest does not leave" in choice.note
    assert "\n" not in choice.note


def test_auto_traps_at_cpl_3_where_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = decide(monkeypatch, LEAKS_AT_3, facts(user=True), breakpoints=(0, 3))
    assert (choice.intercept, choice.sites) == ("trap", (0x100010,))
    assert "not covered" not in choice.note


def test_auto_refuses_what_trap_cannot_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFaithful, match=r"executes CPUID at CPL 3.*choices: ") as refusal:
        decide(monkeypatch, LEAKS_AT_3, facts(user=True))
    assert refusal.value.leaks == ("avx",)
    with pytest.raises(NotFaithful, match="does not declare where"):
        decide(monkeypatch, LEAKS_EVERYWHERE, facts(sites=(), user=True))


def test_kernel_is_refused_with_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFaithful, match=r"1 features at CPL 3 \(avx\)") as refusal:
        decide(monkeypatch, LEAKS_AT_3, facts(), "kernel")
    assert refusal.value.leaks == ("avx",)


def test_a_leak_of_what_the_guest_may_see_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    table = TABLE.replace({(1, 0): Registers(0, 0, 1 << AVX.bit, 0)})
    assert decide(monkeypatch, LEAKS_EVERYWHERE, facts(), "kernel", table=table).intercept == "kernel"


def test_auto_does_not_trust_breakpoints_that_do_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFaithful, match="CPL 0, where trap does not work here"):
        decide(monkeypatch, LEAKS_EVERYWHERE, facts(), breakpoints=())


def test_trap_is_given_when_asked_for_and_says_what_it_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "misses CPUID in handlers" in decide(monkeypatch, FAITHFUL, facts(()), "trap").note
    assert decide(monkeypatch, FAITHFUL, facts(), "trap", hides=False).intercept == "trap"
    assert decide(monkeypatch, LEAKS_AT_3, facts(user=True), "trap").note.endswith("not covered: CPL 3")


def test_trap_steps_where_breakpoints_do_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = decide(monkeypatch, FAITHFUL, facts(), "trap", breakpoints=())
    assert (choice.intercept, choice.sites) == ("trap", ())
    assert "by stepping" in choice.note
    with pytest.raises(NotFaithful, match="does not stop a guest"):
        decide(monkeypatch, FAITHFUL, facts(), "trap", breakpoints=(), steps=())


def test_unknown_wishes_are_refused() -> None:
    with pytest.raises(BadInput, match="choose one of auto, kernel, trap"):
        choose.choose(PaperAccelerator(), Guest(), facts(), "magic")  # type: ignore[arg-type]


def test_the_read_back_is_compared_with_the_guests_table() -> None:
    guest: Any = Guest()
    choose.check_read_back(guest, TABLE)
    osxsave = features.find("osxsave")
    choose.check_read_back(guest, TABLE.replace({(1, 0): Registers(0, 0, 1 | 1 << osxsave.bit, 0)}))
    with pytest.raises(NotFaithful, match="avx"):
        choose.check_read_back(guest, TABLE.replace({(1, 0): Registers(0, 0, 1 | 1 << AVX.bit, 0)}))


# ------------------------------------------------------------------------------------- between KVM and the emulator


class PaperEmulator:
    name = "emulator"
    max_vcpus = 1

    def describe(self, whole: bool = True) -> str:
        return "emulated host"


class PaperKvm:
    name = "paper"
    max_vcpus = 8

    def describe(self, whole: bool = True) -> str:
        return "real host"


def between(
    monkeypatch: pytest.MonkeyPatch,
    verdict: Verdict | None,
    emulator: bool = True,
    make: Any = lambda host: Guest(),
    facts: choose.GuestFacts = facts(),  # noqa: B008
    vcpus: int = 1,
    accel: str = "auto",
    intercept: str = "auto",
) -> choose.Decision:
    """verdict: of KVM, None where there is none. emulator: whether it is installed."""

    def opened(name: str = "auto") -> Any:
        if name == "kvm" and verdict is not None:
            return PaperKvm()
        if name in ("auto", "emulator") and emulator:
            return PaperEmulator()
        raise NotAvailable({"kvm": "/dev/kvm", "emulator": "the emulator"}.get(name, name), "is missing", "get it")

    monkeypatch.setattr(choose, "open_accelerator", opened)
    if verdict is not None:
        monkeypatch.setitem(probe._verdicts, "paper", verdict)
    for cpl in (0, 3):
        monkeypatch.setitem(probe._traps, ("paper", False, cpl), cpl == 0)
        monkeypatch.setitem(probe._traps, ("paper", True, cpl), cpl == 0)
    return choose.decide(make, facts, vcpus, accel, intercept)


def test_faithful_kvm_goes_before_the_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    choice, host, _ = between(monkeypatch, FAITHFUL)
    assert (choice.intercept, choice.note, host) == ("kernel", "", "real host")
    hides_nothing = between(monkeypatch, LEAKS_EVERYWHERE, make=lambda host: Guest(hides=False))
    assert hides_nothing.choice.intercept == "kernel"


def test_the_emulator_goes_before_trap(monkeypatch: pytest.MonkeyPatch) -> None:
    for where in (facts(), facts(user=True), facts(sites=())):
        choice, host, _ = between(monkeypatch, LEAKS_EVERYWHERE, facts=where)
        assert (choice.intercept, host) == ("emulator", "emulated host")
        assert "does not honour the CPUID table" in choice.note and "\n" not in choice.note


UNKNOWN = facts(sites=(), user=True)


def test_a_kernel_that_says_nothing_of_itself_goes_to_the_emulator_on_a_limited_kvm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Even if nothing is to be hidden; what says what it is, and is therefore pyhv's, stays."""

    def hides_nothing(host: Any) -> Any:
        return Guest(hides=False)

    for verdict in (LEAKS_AT_3, LEAKS_EVERYWHERE):
        choice = between(monkeypatch, verdict, make=hides_nothing, facts=UNKNOWN).choice
        assert choice.intercept == "emulator"
        assert "paper on this host failed the CPUID probe and may lack what a kernel needs" in choice.note
        for known in (facts(), facts(user=True), facts(sites=())):
            assert between(monkeypatch, verdict, make=hides_nothing, facts=known).choice.intercept == "kernel"
    assert between(monkeypatch, FAITHFUL, make=hides_nothing, facts=UNKNOWN).choice.intercept == "kernel"
    # Whoever insists gets KVM, and so does who cannot have the emulator; the one knows, the other is told.
    for wish, told in (
        ({"accel": "kvm"}, ""),
        ({"intercept": "kernel"}, ""),
        ({"emulator": False}, "get it"),
        ({"vcpus": 2}, "runs one"),
    ):
        choice = between(monkeypatch, LEAKS_AT_3, make=hides_nothing, facts=UNKNOWN, **wish).choice  # type: ignore[arg-type]
        assert choice.intercept == "kernel" and bool(choice.note) == bool(told) and told in choice.note, wish


def test_guests_that_are_known_are_not_probed_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "verdict", lambda _: pytest.fail("probed"))
    for known in (facts(), facts(user=True), facts(sites=())):
        assert between(monkeypatch, None, facts=known).choice.intercept == "emulator"
        monkeypatch.setattr(choose, "open_accelerator", lambda name="auto": PaperKvm())
        assert choose.decide(lambda host: Guest(hides=False), known, 1).choice.intercept == "kernel"  # type: ignore[arg-type,return-value]


def test_who_dies_of_what_kvm_lacks_is_told_of_the_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kvm(PaperKvm):
        name = "kvm"

    def told(cause: str, verdict: Verdict, emulator: bool = True, vcpus: int = 1, given: Any = UNKNOWN) -> str:
        def opened(name: str) -> Any:
            if emulator:
                return PaperEmulator()
            raise NotAvailable("the emulator", "it is not installed", "install it")

        monkeypatch.setattr(choose, "open_accelerator", opened)
        monkeypatch.setitem(probe._verdicts, "kvm", verdict)
        return choose.other_way(choose.Choice(Kvm(), "kernel", (), ""), given, vcpus, cause)  # type: ignore[arg-type]

    advice = 'the emulator may run this guest: accel="emulator"'
    for verdict in (FAITHFUL, LEAKS_AT_3):
        assert told("not-executable", verdict) == advice == told("not-executable", verdict, given=facts())
    assert told("not-executable", FAITHFUL, vcpus=2) == f"{advice} cpus=1"
    assert told("not-executable", FAITHFUL, emulator=False) == f"{advice}; it is not installed: install it"
    assert told("triple-fault", LEAKS_AT_3) == advice
    # A triple fault on an ordinary KVM, or of a guest that was tried with this one, is the guest's own.
    assert told("triple-fault", FAITHFUL) == told("triple-fault", LEAKS_AT_3, given=facts()) == ""
    assert told("reset", LEAKS_AT_3) == told("timeout", LEAKS_AT_3) == ""
    choice = choose.Choice(PaperEmulator(), "emulator", (), "")  # type: ignore[arg-type]
    assert choose.other_way(choice, UNKNOWN, 1, "not-executable") == ""


def test_trap_where_the_emulator_is_not_there_or_cannot_run_the_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    assert between(monkeypatch, LEAKS_EVERYWHERE, emulator=False).choice.intercept == "trap"
    assert between(monkeypatch, LEAKS_EVERYWHERE, vcpus=2).choice.intercept == "trap"
    with pytest.raises(NotFaithful, match=r"choices: .*the emulator, which could hide them, .*runs one"):
        between(monkeypatch, LEAKS_EVERYWHERE, facts=facts(user=True), vcpus=2)


def test_without_kvm_the_emulator_or_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = between(monkeypatch, None).choice
    assert choice.intercept == "emulator" and "/dev/kvm: is missing" in choice.note
    with pytest.raises(NotAvailable):
        between(monkeypatch, None, emulator=False)
    with pytest.raises(NotAvailable, match="/dev/kvm"):
        between(monkeypatch, None, accel="kvm")
    with pytest.raises(BadInput, match='2 vCPUs: the emulator runs one; use cpus=1, or accel="kvm"'):
        between(monkeypatch, None, vcpus=2)


def test_a_guest_that_only_the_emulator_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(host: Any) -> Any:
        if host == "real host":
            raise Incompatible("guest", "cannot run", ["no SSE3"])
        return Guest()

    choice = between(monkeypatch, FAITHFUL, make=make).choice
    assert choice.intercept == "emulator" and choice.note.endswith("this host's KVM cannot run this guest: no SSE3")
    for wish in ({"accel": "kvm"}, {"intercept": "trap"}, {"emulator": False}):
        with pytest.raises(Incompatible, match="no SSE3"):
            between(monkeypatch, FAITHFUL, make=make, **wish)  # type: ignore[arg-type]


def test_several_reasons_for_the_emulator_are_a_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(host: Any) -> Any:
        if host == "real host":
            raise Incompatible("guest", "cannot run", ["no SSE3; at all", "no AVX"])
        return Guest()

    first, *others = between(monkeypatch, FAITHFUL, make=make).choice.notes
    assert first.endswith("this host's KVM cannot run this guest:")
    assert others == ["no SSE3; at all", "no AVX"]


def test_whoever_wants_every_cpuid(monkeypatch: pytest.MonkeyPatch) -> None:
    assert between(monkeypatch, FAITHFUL, intercept=choose.LOGGED).choice.intercept == "trap"
    assert between(monkeypatch, LEAKS_EVERYWHERE, intercept=choose.LOGGED).choice.intercept == "emulator"
    assert between(monkeypatch, FAITHFUL, accel="emulator", intercept=choose.LOGGED).choice.note == ""
    with pytest.raises(BadInput, match='intercept="trap": is KVM'):
        between(monkeypatch, FAITHFUL, accel="emulator", intercept="trap")


@pytest.mark.parametrize("fails", ["create_vm", "map", "create_vcpu", "set_cpuid", "get_sregs"])
def test_a_probe_that_cannot_be_made_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    opened: list[str] = []
    closed: list[str] = []

    class Paper:
        name = "paper"

        def __init__(self, kind: str) -> None:
            self.kind = kind
            self.host = None
            opened.append(kind)

        def close(self) -> None:
            closed.append(self.kind)

        def __getattr__(self, what: str) -> Any:
            def call(*arguments: object, **named: object) -> Any:
                if what == fails:
                    raise HostError(what, 12)
                return Paper(what) if what in ("create_vm", "create_vcpu") else None

            return call

    monkeypatch.setattr(probe, "Memory", lambda size: Paper("memory"))
    with pytest.raises(HostError, match=fails):
        probe._Probe(Paper("accelerator"), probe.least_table(), [])  # type: ignore[arg-type]
    assert sorted(closed) == sorted(opened[1:]) and "memory" in closed
