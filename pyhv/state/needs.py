"""What a guest needs of a host that it is to go on on, and whether a host has it: the same question for a snapshot and
for a migration, asked before anything is touched."""

from __future__ import annotations

import functools
from typing import NamedTuple

from pyhv.accel import choose
from pyhv.cpu import compare, policy, profiles
from pyhv.cpu.features import NUMBERS
from pyhv.cpu.host import HostDescription
from pyhv.cpu.table import CpuidTable
from pyhv.errors import Incompatible
from pyhv.state.records import MachineRecord


class Needs(NamedTuple):
    """What a host is asked for."""

    profile: str
    hides: bool
    """Whether the profile hides anything."""
    tables: tuple[CpuidTable, ...]
    """The CPUID table of each vCPU."""
    msrs: frozenset[int]
    """Numbers of the MSRs in the guest's state."""
    tsc_khz: int
    capabilities: int | None = None
    """The guest's IA32_ARCH_CAPABILITIES; None where it has none, or what it is told is not known."""

    def reasons_against(self, host: HostDescription, strict_tsc: bool = False) -> list[compare.Reason]:
        """Every reason why the guest cannot go on on this host."""
        first = self.tables[0]
        found = compare.problems(first, host, self.msrs, self.tsc_khz, strict_tsc, self.capabilities)
        reasons: list[compare.Reason] = [*found]
        for vcpu, table in enumerate(self.tables[1:], 1):
            if not policy.same_but_apic_ids(first, table):
                reasons.append(compare.VcpusDiffer(vcpu))
                own = compare.problems(table, host, self.msrs, self.tsc_khz, strict_tsc)
                reasons += [compare.OnVcpu(vcpu, reason) for reason in own if reason not in found]
        return reasons

    def check(self, host: HostDescription, where: str, strict_tsc: bool = False) -> None:
        """Raises Incompatible, about `where`, with every reason against running the guest on this host."""
        if reasons := self.reasons_against(host, strict_tsc):
            raise Incompatible(where, "cannot run on this host", reasons)

    def notes(self, host: HostDescription) -> list[str]:
        """What a user should know about the guest on this host though it is no reason against it."""
        if not compare.tsc_differs(self.tsc_khz, host):
            return []
        rates = f"the guest's TSC will run at {host.tsc_khz} kHz instead of {self.tsc_khz}, which cannot be scaled here"
        return [f"{rates}; kvmclock is right, a guest that counts TSC cycles is not"]

    def guest_cpu(self, host: HostDescription) -> policy.GuestCpu:
        """The processor that the guest saw, as it will see it here.

        It hides something if its profile did, or if this host could show it more than it saw: then hiding must be
        proved.
        """
        table, topology = self.tables[0], policy.Topology(len(self.tables))
        visible = table.features()
        most = _most(host.table, topology)
        more = any(n.of(most.table.word(n.word)) > n.of(table.word(n.word)) for n in NUMBERS)
        hides = self.hides or more or not most.visible <= visible
        return policy.GuestCpu(self.profile, topology, hides, table, visible, (), (), ())


def facts_of(saved: MachineRecord) -> choose.GuestFacts:
    """What a saved machine says of its image."""
    return choose.GuestFacts(saved.image, saved.cpuid_sites, saved.enters_user_mode)


def decide(
    facts: choose.GuestFacts,
    needs: Needs,
    where: str,
    strict_tsc: bool = False,
    accel: str = "auto",
    intercept: str = "auto",
) -> choose.Decision:
    """What runs this guest, which has run elsewhere, on this host. where: what errors call it. strict_tsc: see
    reasons_against(); accel, intercept: see choose.decide().

    Raises Incompatible with every reason why this host cannot run the guest, and what choose.decide() raises.
    """

    def make(host: HostDescription) -> policy.GuestCpu:
        needs.check(host, where, strict_tsc)
        return needs.guest_cpu(host)

    return choose.decide(make, facts, len(needs.tables), accel, intercept, whole=True)


@functools.lru_cache(maxsize=4)  # a quarter of the time that a restore takes, and always the same on one host
def _most(offered: CpuidTable, topology: policy.Topology) -> policy.GuestCpu:
    """The processor of a guest that is shown all that a host which offers this table can show."""
    return policy.guest_table(HostDescription(offered), profiles.load("host"), topology)
