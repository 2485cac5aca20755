"""The one place that decides what runs a guest and how its CPUID instructions are intercepted.

kernel    KVM answers from the table that it was given. Costs nothing; sound where the probe found KVM faithful.
emulator  the guest runs on the software accelerator, and the engine answers. Exact for every guest that it can run.
trap      KVM runs the guest and the engine answers, stopping the vCPU in front of each CPUID. Exact at the addresses
          that an image declares; by stepping it is exact only for a guest that takes no exceptions, and ends one that
          takes interrupts.

`auto` takes the first that is sound for this guest, in this order; else it refuses and lists the choices. A KVM that
the probe found unfaithful is none that VT-x or AMD-V is behind, and may lack what kernels use (4 MiB pages, INT3): a
kernel that was not written for pyhv goes to the emulator there, even if nothing is to be hidden.
"""

from __future__ import annotations

from pyhv.errors import BadInput, Incompatible, NotAvailable, NotFaithful
from pyhv.light import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyhv.accel.protocol import Accelerator
    from pyhv.cpu.host import HostDescription, Verdict
    from pyhv.cpu.policy import GuestCpu
    from pyhv.cpu.table import CpuidTable

ACCELERATORS = ("auto", "kvm", "emulator")
INTERCEPTS = ("auto", "kernel", "trap")

#: In place of "auto": whoever answers CPUID must keep a log of it.
LOGGED = "logged"

# APIC ids have 8 bits where the guest does not use the x2APIC; 255 is the broadcast, and in the MP table one is the I/O
# APIC's.
MAX_VCPUS = 254


class GuestFacts(NamedTuple):
    """What an image says about itself, as far as the choice depends on it."""

    name: str
    cpuid_sites: tuple[int, ...]
    """Linear addresses of all its CPUID instructions; empty if it declares none."""
    enters_user_mode: bool
    """Whether it may execute CPUID at CPL 3."""

    @property
    def unknown(self) -> bool:
        """Whether it says nothing of itself: a kernel that was not written for pyhv."""
        return self.enters_user_mode and not self.cpuid_sites


class Choice(NamedTuple):
    """What was decided."""

    accelerator: Accelerator
    intercept: str
    """ "kernel", "emulator" or "trap"."""
    sites: tuple[int, ...]
    """With trap: the addresses to stop at; empty means every instruction is stepped."""
    note: str
    """One line for the user, or "" where there is nothing to say."""
    reasons: tuple[str, ...] = ()
    """What the note speaks of, a line each, where it is several things."""

    @property
    def notes(self) -> list[str]:
        """All lines for the user."""
        return [self.note, *self.reasons] if self.note else []


class Decision(NamedTuple):
    """A choice, and what follows from its accelerator."""

    choice: Choice
    host: HostDescription
    guest: GuestCpu


def open_accelerator(name: str = "auto") -> Accelerator:
    """An accelerator of this machine; one of each kind per process. auto: KVM, or the emulator where there is no KVM.
    Raises NotAvailable, BadInput for another name."""
    if name not in ACCELERATORS:
        raise BadInput(f'accel="{name}"', "is unknown", f"choose one of {', '.join(ACCELERATORS)}")
    if name == "auto":
        try:
            return open_accelerator("kvm")
        except NotAvailable as no_kvm:
            try:
                return open_accelerator("emulator")
            except NotAvailable as no_emulator:
                advice = f"{no_kvm.advice}; or use the emulator ({no_emulator.problem}): {no_emulator.advice}"
                raise NotAvailable(no_kvm.subject, no_kvm.problem, advice) from None
    if name not in _accelerators:
        if name == "kvm":
            from pyhv.accel.kvm import Kvm

            _accelerators[name] = Kvm()
        else:
            from pyhv.accel.emulator import Emulator

            _accelerators[name] = Emulator()
    return _accelerators[name]


_accelerators: dict[str, Accelerator] = {}


def decide(
    make: Callable[[HostDescription], GuestCpu],
    facts: GuestFacts,
    vcpus: int,
    accel: str = "auto",
    intercept: str = "auto",
    whole: bool = False,
) -> Decision:
    """Decides for one guest with `vcpus` vCPUs. make: the processor that it sees on a host, or what it raises where
    that host cannot run it. accel: one of ACCELERATORS. intercept: one of INTERCEPTS, or LOGGED. whole: see
    Accelerator.describe().

    Raises NotAvailable without an accelerator, BadInput for an unknown wish and for more vCPUs than can be had,
    NotFaithful as choose() does, and what `make` raises.
    """
    if accel == "emulator":
        return _on_emulator(make, facts, vcpus, intercept, whole, "")
    try:
        kvm = open_accelerator("kvm")
    except NotAvailable as no_kvm:
        if accel == "kvm" or intercept not in ("auto", LOGGED):
            raise
        open_accelerator(accel)  # says all that is missing
        return _on_emulator(make, facts, vcpus, intercept, whole, f"{no_kvm.subject}: {no_kvm.problem}")
    _check_vcpus(kvm, vcpus)
    host = kvm.describe(whole)
    may_emulate = accel == "auto" and intercept in ("auto", LOGGED)
    try:
        guest = make(host)
    except Incompatible as incompatible:
        if may_emulate:
            why, reasons = "this host's KVM cannot run this guest:", tuple(map(str, incompatible.reasons))
            if len(reasons) == 1:
                why, reasons = f"{why} {reasons[0]}", ()
            try:
                decision = _on_emulator(make, facts, vcpus, intercept, whole, why)
                return decision._replace(choice=decision.choice._replace(reasons=reasons))
            except BadInput:
                pass  # the guest is KVM's: what KVM says of it is what counts
        raise incompatible
    why = why_not = ""
    if may_emulate and (why := _unfaithful(kvm, guest) or _limited(kvm, facts)):
        try:
            return _on_emulator(make, facts, vcpus, intercept, whole, why)
        except NotAvailable as no_emulator:
            why_not = f"{no_emulator.problem}: {no_emulator.advice}"
        except BadInput as refused:
            why_not = str(refused)
    try:
        choice = choose(kvm, guest, facts, "trap" if intercept == LOGGED else intercept)
    except NotFaithful as refusal:
        if not why_not:
            raise
        advice = f"{refusal.advice}; the emulator, which could hide them, is not to be had: {why_not}"
        raise NotFaithful(refusal.subject, refusal.problem, advice, refusal.leaks) from None
    if why and not choice.note:
        choice = choice._replace(note=f"{why}, and the emulator is not to be had: {why_not}")
    return Decision(choice, host, guest)


def look_ahead(accel: str = "auto") -> None:
    """Finds out all that decide() may need to know of this host, before the guest is known. Raises NotAvailable,
    HostError."""
    accelerator = open_accelerator(accel)
    accelerator.describe()
    if accelerator.name == "kvm":
        from pyhv.accel import probe

        probe.verdict(accelerator)


def _check_vcpus(accelerator: Accelerator, vcpus: int) -> None:
    if 1 <= vcpus <= min(MAX_VCPUS, accelerator.max_vcpus):
        return
    if vcpus > 1 and accelerator.max_vcpus == 1:
        raise BadInput(f"{vcpus} vCPUs", "the emulator runs one", 'use cpus=1, or accel="kvm" on a host with KVM')
    most = min(MAX_VCPUS, accelerator.max_vcpus)
    raise BadInput(f"{vcpus} vCPUs", "cannot be had", f"choose 1 to {most}")


def _on_emulator(
    make: Callable[[HostDescription], GuestCpu],
    facts: GuestFacts,
    vcpus: int,
    intercept: str,
    whole: bool,
    why: str,
) -> Decision:
    """The emulator, which `why` speaks for. Raises NotAvailable, BadInput, and what `make` raises."""
    if intercept not in ("auto", LOGGED):
        raise BadInput(f'intercept="{intercept}"', "is KVM's", "omit it: the emulator itself answers CPUID")
    emulator = open_accelerator("emulator")
    _check_vcpus(emulator, vcpus)
    host = emulator.describe(whole)
    note = f"the emulator runs the guest: {why}" if why else ""
    return Decision(Choice(emulator, "emulator", (), note), host, make(host))


def _unfaithful(kvm: Accelerator, guest: GuestCpu) -> str:
    """Why this KVM cannot hide what this guest must not see; "" if it can."""
    if not guest.hides:
        return ""
    from pyhv.accel import probe

    verdict = probe.verdict(kvm)
    leaks = {cpl: leaking_features(verdict, guest, cpl) for cpl in (0, 3)}
    if not leaks[0] and not leaks[3]:
        return ""
    return f"{kvm.name} on this host does not honour the CPUID table (pyhv host tells more)"


def _limited(kvm: Accelerator, facts: GuestFacts) -> str:
    """Why this KVM may not be able to run this guest; "" if it is one like any other, or the guest is pyhv's own."""
    if not facts.unknown:
        return ""
    from pyhv.accel import probe

    if probe.verdict(kvm).faithful:
        return ""
    return f"{kvm.name} on this host failed the CPUID probe and may lack what a kernel needs"


def other_way(choice: Choice, facts: GuestFacts, vcpus: int, cause: str) -> str:
    """What a user can do about a guest that ended with this cause because of what KVM lacks here; "" where KVM is not
    to blame. It is where it could not execute an instruction, and it may be where an unknown kernel had a triple fault
    on a KVM that is no ordinary one."""
    accelerator = choice.accelerator
    if accelerator.name != "kvm" or not (
        cause == "not-executable" or (cause == "triple-fault" and _limited(accelerator, facts))
    ):
        return ""
    try:
        open_accelerator("emulator")
    except NotAvailable as no_emulator:
        return f'the emulator may run this guest: accel="emulator"; {no_emulator.problem}: {no_emulator.advice}'
    one = " cpus=1" if vcpus > 1 else ""
    return f'the emulator may run this guest: accel="emulator"{one}'


def choose(accelerator: Accelerator, guest: GuestCpu, facts: GuestFacts, intercept: str = "auto") -> Choice:
    """Decides between KVM's ways. intercept: the user's wish, one of INTERCEPTS.

    Raises BadInput for an unknown wish, NotFaithful where the wish, or with "auto" anything, cannot hide what the
    guest's table hides; HostError if the probe cannot be run.
    """
    if intercept not in INTERCEPTS:
        raise BadInput(f'intercept="{intercept}"', "is unknown", f"choose one of {', '.join(INTERCEPTS)}")
    if not guest.hides and intercept != "trap":
        return Choice(accelerator, "kernel", (), "")

    from pyhv.accel import probe

    verdict = probe.verdict(accelerator)
    leaks = {cpl: leaking_features(verdict, guest, cpl) for cpl in (0, 3)}
    if intercept == "trap":
        return _trap(accelerator, facts, leaks)
    if not leaks[0] and not leaks[3]:
        return Choice(accelerator, "kernel", (), "")
    hidden = sorted({*leaks[0], *leaks[3]})
    if intercept == "kernel":
        raise NotFaithful(
            'intercept="kernel"',
            f"{accelerator.name} on this host does not hide what the CPUID table hides: {_leak_words(leaks)}",
            'use intercept="trap" or intercept="auto", or a host with kvm_intel or kvm_amd',
            hidden,
        )
    if not facts.cpuid_sites:
        why = "the image does not declare where its CPUID instructions are, so trap is not sure to see them all"
    elif missed := _missed_levels(accelerator, facts, by_steps=False):
        why = f"the guest executes CPUID at CPL {missed[-1]}, where trap does not work here"
    else:
        return _trap(accelerator, facts, leaks)
    raise NotFaithful(
        facts.name,
        f"its features cannot be hidden on this host: {accelerator.name} does not honour the CPUID table "
        f"({_leak_words(leaks)}), and {why}",
        'choices: intercept="trap" (every CPUID at CPL 0 that a step reaches), cpu="host" (hides nothing), or a host '
        "with kvm_intel or kvm_amd",
        hidden,
    )


def _levels(facts: GuestFacts) -> tuple[int, ...]:
    """The privilege levels at which the guest may execute CPUID."""
    return (0, 3) if facts.enters_user_mode else (0,)


def _missed_levels(accelerator: Accelerator, facts: GuestFacts, by_steps: bool) -> list[int]:
    """Those of them at which trap does not see it on this host."""
    from pyhv.accel import probe

    return [cpl for cpl in _levels(facts) if not probe.trap_works(accelerator, by_steps, cpl)]


def _trap(accelerator: Accelerator, facts: GuestFacts, leaks: dict[int, list[str]]) -> Choice:
    """Trap, by breakpoints where the image allows it and they work, else by stepping; the note says what it covers."""
    missed = _missed_levels(accelerator, facts, by_steps=not facts.cpuid_sites)
    sites = facts.cpuid_sites
    if sites and 0 in missed:
        sites, missed = (), _missed_levels(accelerator, facts, by_steps=True)
    if 0 in missed:
        raise NotFaithful(
            'intercept="trap"',
            f"guest debug of {accelerator.name} does not stop a guest on this host",
            'use intercept="kernel" or intercept="auto"',
            (),
        )
    if sites:
        how = f"at the {len(sites)} CPUID instruction{'s' * (len(sites) > 1)} that the image declares"
    else:
        how = "by stepping, which misses CPUID in handlers of exceptions, and ends a guest that takes interrupts"
    note = f"CPUID is answered by trap {how}"
    if leaks[0] or leaks[3]:
        note = f"{accelerator.name} on this host does not honour the CPUID table, so {note}"
    if missed:
        note += "; not covered: CPL 3"
    elif not facts.enters_user_mode and (leaks[0] or leaks[3]):
        note += "; covered: CPL 0, which this guest does not leave"
    return Choice(accelerator, "trap", sites, note)


def leaking_features(verdict: Verdict, guest: GuestCpu, cpl: int) -> list[str]:
    """Names of the features that the guest's table hides and a guest at this privilege level sees nevertheless."""
    from pyhv.cpu import features

    names: list[str] = []
    for word, mask in verdict.leaks.get(cpl, {}).items():
        hidden = mask & ~getattr(guest.table.get(word.leaf, word.subleaf), word.register)
        names.extend(f.name for f in features.WORDS[word] if hidden >> f.bit & 1)
    return names


def check_read_back(guest: GuestCpu, table: CpuidTable) -> None:
    """Compares what the accelerator says that CPUID answers, after it was given the guest's table, with that table.

    The probe has found this host faithful; this is the check that it is for this very table too. Raises NotFaithful.
    """
    from pyhv.cpu import features

    leaks = [
        f.name
        for word, in_word in features.WORDS.items()
        for f in in_word
        if f.sense == "plain" and not f.dynamic
        if getattr(table.get(word.leaf, word.subleaf), word.register) >> f.bit & 1
        and not getattr(guest.table.get(word.leaf, word.subleaf), word.register) >> f.bit & 1
    ]
    if leaks:
        raise NotFaithful(
            'intercept="kernel"',
            f"the kernel added to the CPUID table what profile {guest.profile} hides: {_some(leaks)}",
            'use intercept="trap"',
            leaks,
        )


def _leak_words(leaks: dict[int, list[str]]) -> str:
    return ", ".join(f"{len(names)} features at CPL {cpl} ({_some(names)})" for cpl, names in leaks.items() if names)


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
