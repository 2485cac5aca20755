"""What a guest sees: a host's CPUID table and a profile make the guest's tables, with the reasons.

The rule for features: a bit is visible when the profile allows it, the host has it, and all that it requires is
visible. Whatever feature table and profile do not know is hidden. Bits of inverted sense, and those that are OR-ed
across a pool, have the profile's value where the profile is an allow-list: no host decides there.

The rule for leaves: a guest's table is made from nothing, leaf by leaf. What is not made here does not exist, and an
absent leaf reads as zeros. Zeros are never stored: KVM fills sizes into a leaf 0xD that is all zeros, and would so show
a guest without XSAVE a piece of it.

    leaf                 the guest reads
    0x0                  vendor; highest leaf: the host's, or the profile's limit if that is lower
    0x1                  family, model, stepping and brand index of the host; CLFLUSH size by the profile; features;
                         APIC id and number of vCPUs
    0x2, 0x4             caches of the host; in 0x4 who shares them, and the number of cores, follow the topology
    0x3                  nothing (serial number)
    0x5                  nothing (MONITOR)
    0x6                  its feature bits (of which a guest can have ARAT); no thermal sensors
    0x7                  features; the highest subleaf is the last one with a feature
    0x9, 0xA             nothing (DCA, performance monitoring)
    0xB, 0x1F            topology, where the highest leaf allows it. More than 64 vCPUs of an Intel processor have 0xB
                         even where the host does not: leaf 0x4 cannot tell of so many
    0xD                  components, sizes and offsets of the visible XSAVE features; without XSAVE nothing
    0xF, 0x10            nothing (resource monitoring and allocation: a guest cannot have their MSRs)
    0x12                 nothing (SGX: enclave memory is the host's and cannot move)
    0x14                 nothing (processor trace is a host's own)
    0x15, 0x16           clock rates: as the host offers them where the TSC is visible, and nothing from a profile for
                         moving: rates differ
    0x17, 0x18, 0x1A     nothing (system-on-chip vendor, TLB details, kind of core)
    0x19                 nothing (key locker: the key is in the processor)
    0x1B, 0x1C, 0x20     nothing (PCONFIG, last branch records, HRESET)
    0x1D, 0x1E           the tiles' numbers, where AMX is visible; its features
    0x23                 nothing (performance monitoring)
    0x24                 AVX10's version and features, where it is visible
    0x29                 features, where APX is visible
    0x40000000, ...1     KVM's signature; its features by the profile. Of a host under another signature: nothing
    0x80000000           vendor; highest leaf as for 0x0
    0x80000001           family and package of the host, features
    0x80000002 to ...4   the host's name
    0x80000005, ...6     caches and TLBs of the host
    0x80000007           its feature bits (of which a guest can have the invariant TSC); no power management
    0x80000008           address bits: the profile's, or the host's if those are fewer; without 64-bit mode 32 bits of
                         linear address; features; AMD: number of vCPUs
    0x8000000A           nothing (SVM)
    0x80000019           TLBs for 1 GiB pages of the host, where those are visible
    0x8000001A           performance hints: features
    0x8000001B, ...1C    nothing (instruction-based sampling, lightweight profiling)
    0x8000001D, ...1E    caches of the host, with the VM's sharing, and topology, where TOPOEXT is visible
    0x8000001F           nothing (memory encryption)
    0x80000020           nothing (resource allocation)
    0x80000021           features, and the number that belongs to ERAPS
    0x80000022 and up    nothing (performance monitoring, memory encryption, the host's own topology)
    all others           nothing
"""

from __future__ import annotations

from pyhv.cpu.feature_types import Feature
from pyhv.cpu.features import BY_NAME, FEATURES, NUMBERS, closure, pack
from pyhv.cpu.host import HostDescription
from pyhv.cpu.profiles import Limits, Profile
from pyhv.cpu.table import (
    EXTENDED,
    HYPERVISOR,
    KVM_SIGNATURE,
    NAME_LEAVES,
    ZEROS,
    CpuidTable,
    Registers,
    XsaveArea,
    xsave_leaf,
)
from pyhv.errors import BadInput
from pyhv.light import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

#: APIC ids have 8 bits, and 255 is the broadcast.
MAX_VCPUS = 255

Entries = dict[tuple[int, int], Registers]

#: Leaves that are the host's own data, shown as they are.
_AS_HOST = (0x2, *NAME_LEAVES, 0x80000005, 0x80000006)

#: Leaves that are as the host offers them, unless the profile is for moving.
_AS_HOST_STAYING = (0x15, 0x16)

#: The leaf that says how many TLB entries there are for 1 GiB pages; as the host has it, where those are visible.
_TLB_1GIB = 0x80000019

#: Leaf 4 can tell of so many cores (EAX[31:26], SDM Vol. 2A, CPUID leaf 04H); a processor with more has the leaf that
#: numbers topology levels. Without it Linux takes the rest for threads.
_LEAF_4_CORES = 64
_TOPOLOGY_LEAF = 0xB

#: Leaves whose EAX is their highest subleaf, where they hold features in several.
_COUNT_SUBLEAVES = (0x7, 0x1E, 0x24)


class Topology(NamedTuple):
    """The VM's processors: one socket, a core for each vCPU, one thread a core. APIC ids are the vCPUs' numbers."""

    vcpus: int

    @property
    def id_bits(self) -> int:
        """Bits of an APIC id that number the cores."""
        return (self.vcpus - 1).bit_length()


class Hidden(NamedTuple):
    """A feature that the host offers and the guest does not see."""

    name: str
    reason: str  # "not in profile hyperv-r2", "needs avx", ...

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Levelled(NamedTuple):
    """A number that the profile has lowered."""

    what: str  # "physical address bits", ...
    host: int
    guest: int

    def __str__(self) -> str:
        return f"{self.what}: {self.guest} instead of {self.host}"


class GuestCpu:
    """The processor that a VM shows its guest.

    profile: the profile's name. topology: the VM's. hides: whether the profile hides anything that the host could give
    and take along; a profile that does not needs no proof that hiding works. visible: canonical names of the features
    that the guest sees. hidden: what the host offers and the guest does not see, with reasons. lacking: features that
    the profile lists and the host does not offer. levelled: numbers that differ from the host's. moving: whether the
    profile is for guests that move among hosts.
    """

    __slots__ = ("_first", "hidden", "hides", "lacking", "levelled", "moving", "profile", "topology", "visible")

    def __init__(
        self,
        profile: str,
        topology: Topology,
        hides: bool,
        table: CpuidTable,
        visible: frozenset[str],
        hidden: tuple[Hidden, ...],
        lacking: tuple[str, ...],
        levelled: tuple[Levelled, ...],
        moving: bool = False,
    ) -> None:
        self.profile = profile
        self.topology = topology
        self.hides = hides
        self.visible = visible
        self.hidden = hidden
        self.lacking = lacking
        self.levelled = levelled
        self.moving = moving
        self._first = table

    @property
    def table(self) -> CpuidTable:
        """What vCPU 0 answers."""
        return self._first

    def table_for(self, vcpu: int) -> CpuidTable:
        """What the vCPU of this number answers: vCPU 0's table with its own APIC id. ValueError: no such vCPU."""
        if not 0 <= vcpu < self.topology.vcpus:
            raise ValueError(f"vCPU {vcpu} of {self.topology.vcpus}")
        return self._first if vcpu == 0 else self._first.replace(_apic_ids(self._first, vcpu))

    @property
    def physical_address_bits(self) -> int:
        return self._first.physical_bits


# What KVM provides on processors of a vendor that has none: the same is said by its own bits of CPUID, and some guests
# do not start where they find both (QEMU does not show it either, since 10.1).
_NOT_HERE = {"amd": ("arch_capabilities",)}


def guest_table(host: HostDescription, profile: Profile, topology: Topology) -> GuestCpu:
    """The processor that a guest with this profile sees on this host.

    Raises BadInput for an impossible topology, and for a host whose vendor the profile is not made for.
    """
    if not 1 <= topology.vcpus <= MAX_VCPUS:
        raise BadInput(f"{topology.vcpus} vCPUs", "cannot be had", f"choose 1 to {MAX_VCPUS}")
    offered = host.table
    limits = profile.limits(offered.vendor)
    leaves = _Leaves(
        _least(offered.max_basic, limits.max_basic_leaf), _least(offered.max_extended, limits.max_extended_leaf)
    )
    if offered.lineage != "amd" and topology.vcpus > _LEAF_4_CORES and leaves.max_basic < _TOPOLOGY_LEAF:
        if limits.max_basic_leaf is not None and limits.max_basic_leaf < _TOPOLOGY_LEAF:
            problem = f"profile {profile.name} has no leaf {_TOPOLOGY_LEAF:#x}, which tells of so many"
            raise BadInput(f"{topology.vcpus} vCPUs", problem, f"choose 1 to {_LEAF_4_CORES}, or another profile")
        leaves = leaves._replace(max_basic=_TOPOLOGY_LEAF)
    areas = offered.xsave_areas() if 0xD in leaves else {}
    allowed = profile.allowed(offered.vendor)
    has = offered.features()
    vendors = ("any", offered.lineage)

    # Requirements are judged on what the host can give: hide a feature, and all that rests on it goes too.
    candidates = set()
    foreign = _NOT_HERE.get(offered.lineage, ())
    for feature in FEATURES:
        if feature.barred or feature.topology or feature.dynamic or feature.name in foreign:
            continue  # whatever a profile lists
        if feature.name in allowed and feature.vendor in vendors and feature.word.leaf in leaves:
            host_decides = feature.sense in ("plain", "hint") or profile.everything
            # A mirror follows what it repeats (it requires that), wherever there is its register.
            follows = feature.mirrors and (not feature.word.subleaf or feature.word[:2] in offered.entries)
            had = feature.name in has or follows or not host_decides
            if had and not _lacking_components(feature, areas, leaves):
                candidates.add(feature.name)
    closed = closure(candidates)
    visible = closed.kept
    if topology.vcpus > 1:
        visible |= {f.name for f in FEATURES if f.topology and f.vendor in vendors and f.word.leaf in leaves}

    hidden, lacking = [], []
    for feature in FEATURES:
        if feature.name in visible or feature.topology or feature.dynamic or feature.mirrors:
            continue
        if feature.name in foreign and feature.name in has:
            hidden.append(Hidden(feature.name, "KVM's own addition: processors of this vendor do not have it"))
        elif feature.name in has:
            hidden.append(Hidden(feature.name, _reason(feature, profile, allowed, closed.dropped, areas, leaves)))
        elif feature.name in allowed and feature.vendor in vendors and not profile.everything:
            lacking.append(feature.name)
    table = CpuidTable(_entries(offered, profile, limits, leaves, topology, visible, areas))
    return GuestCpu(
        profile=profile.name,
        topology=topology,
        hides=not profile.everything or bool(profile.hide),
        table=table,
        visible=visible,
        hidden=tuple(hidden),
        lacking=tuple(lacking),
        levelled=_levelled(offered, table),
        moving=profile.moving,
    )


class _Leaves(NamedTuple):
    """The leaves that the guest has; `leaf in leaves` asks."""

    max_basic: int
    max_extended: int

    def __contains__(self, leaf: object) -> bool:
        assert isinstance(leaf, int)
        if leaf >= EXTENDED:
            return leaf <= self.max_extended
        return leaf >= HYPERVISOR or leaf <= self.max_basic


def _least(host: int, limit: int | None) -> int:
    return host if limit is None else min(host, limit)


def _lacking_components(feature: Feature, areas: Mapping[int, XsaveArea], leaves: _Leaves) -> list[int]:
    """The XSAVE components that the feature brings and the host does not have. x87 and SSE (0 and 1) are part of XSAVE
    itself, but without leaf 0xD nothing can be learnt of them either."""
    return [n for n in feature.xsave if n not in areas and (n >= 2 or 0xD not in leaves)]


def _reason(
    feature: Feature,
    profile: Profile,
    allowed: frozenset[str],
    dropped: Mapping[str, tuple[str, ...]],
    areas: Mapping[int, XsaveArea],
    leaves: _Leaves,
) -> str:
    """Why a feature that the host offers is hidden."""
    if feature.barred == "nested":
        return "virtualization inside the guest is never shown"
    if feature.barred == "pmu":
        return "performance monitoring is never shown"
    if feature.name not in allowed:
        if not profile.everything or feature.name in profile.hide:
            return f"not in profile {profile.name}"
        if not feature.migratable:
            return "ties a guest to its host"
        if feature.kvm == "never":
            return "not known to be KVM's to give"
        return f"needs {' and '.join([name for name in feature.requires if name not in allowed])}"
    if feature.word.leaf not in leaves:
        return f"above the highest leaf of profile {profile.name}"
    if components := _lacking_components(feature, areas, leaves):
        return f"needs XSAVE component {' and '.join(map(str, components))}"
    return f"needs {' and '.join(dropped[feature.name])}"


# ------------------------------------------------------------------------------------------------------ leaves


def _entries(
    offered: CpuidTable,
    profile: Profile,
    limits: Limits,
    leaves: _Leaves,
    topology: Topology,
    visible: frozenset[str],
    areas: Mapping[int, XsaveArea],
) -> Entries:
    """vCPU 0's table, by the rules at the top of this file."""
    entries: Entries = {(0, 0): offered.get(0)._replace(eax=leaves.max_basic)}
    leaf1 = offered.get(1)
    clflush = leaf1.ebx & 0xFF00 if limits.clflush_size is None else limits.clflush_size // 8 << 8
    if "clflush" not in visible:
        clflush = 0
    entries[1, 0] = Registers(leaf1.eax, topology.vcpus << 16 | clflush | leaf1.ebx & 0xFF, 0, 0)
    rates = _AS_HOST_STAYING if "tsc" in visible and not profile.moving else ()
    for leaf in (*_AS_HOST, *rates):
        entries[leaf, 0] = offered.get(leaf)
    if "pdpe1gb" in visible:
        entries[_TLB_1GIB, 0] = offered.get(_TLB_1GIB)
    if offered.lineage != "amd":
        entries.update(_caches(_all_of(offered, 4), topology, cores=True))
    for leaf in (0xB, 0x1F):
        entries.update(_levels(leaf, topology))
    if "xsave" in visible:
        components = {n for name in visible for n in BY_NAME[name].xsave if n >= 2}
        compacts = "xsavec" in visible or "xsaves" in visible
        shown = {n: areas[n].shown(compacts, "xfd" in visible) for n in components}
        entries.update(xsave_leaf(shown, 0, compacts))
    if "hypervisor" in visible and offered.is_kvm:
        entries[HYPERVISOR, 0] = KVM_SIGNATURE

    entries[EXTENDED, 0] = offered.get(EXTENDED)._replace(eax=leaves.max_extended)
    entries[0x80000001, 0] = offered.get(0x80000001)
    linear = 32 if "lm" not in visible else offered.linear_bits if "la57" in visible else 48
    linear = min(linear, offered.linear_bits)
    entries[0x80000008, 0] = _address_leaf(offered, limits, topology, linear)
    if "topoext" in visible:  # leaf 0x8000001E is all zeros for vCPU 0: APIC id, core and node 0, one thread a core
        entries.update(_caches(_all_of(offered, 0x8000001D), topology, cores=False))

    words = pack(visible)
    for number in NUMBERS:
        if number.needs in visible:
            words[number.word] = words.get(number.word, 0) | number.shown(offered.word(number.word))
    for leaf in _COUNT_SUBLEAVES:
        subleaves = [word.subleaf for word, value in words.items() if word.leaf == leaf and value]
        entries[leaf, 0] = ZEROS._replace(eax=max(subleaves, default=0))
    for word, value in words.items():
        key = (word.leaf, word.subleaf)
        if value or key in entries:
            entries[key] = entries.get(key, ZEROS)._replace(**{word.register: value})
    return {
        key: registers
        for key, registers in entries.items()
        if key == (0, 0) or (registers != ZEROS and key[0] in leaves)
    }


def _all_of(table: CpuidTable, leaf: int) -> Entries:
    return {key: registers for key, registers in table.entries.items() if key[0] == leaf}


def _address_leaf(offered: CpuidTable, limits: Limits, topology: Topology, linear: int) -> Registers:
    """Leaf 0x80000008 but for its feature word. EAX: physical and linear address bits; ECX on AMD: the number of cores
    less one, and how many bits of an APIC id number them (APM Vol. 3, appendix E)."""
    eax = offered.get(0x80000008).eax
    if limits.physical_address_bits is None:
        eax = eax & ~0xFF00 | linear << 8
    else:
        eax = linear << 8 | min(limits.physical_address_bits, offered.physical_bits)
    ecx = topology.id_bits << 12 | topology.vcpus - 1 if offered.lineage == "amd" else 0
    return Registers(eax, 0, ecx, 0)


def _caches(leaf: Entries, topology: Topology, cores: bool) -> Entries:
    """Leaf 4 or 0x8000001D for the VM's topology. EAX[25:14]: how many threads share the cache, less one; the first two
    levels (EAX[7:5]) are a core's own, what lies beyond is everyone's. EAX[31:26], with `cores`: how many core ids the
    package has room for, less one (SDM Vol. 2A, CPUID leaf 04H; APM Vol. 3, appendix E)."""
    ids = (1 << topology.id_bits) - 1
    made = {}
    for key, registers in leaf.items():
        eax = registers.eax & 0x3FFF
        if eax & 0x1F:  # a cache, and not the end of the list
            if eax >> 5 & 7 >= 3:
                eax |= ids << 14
            if cores:
                eax |= min(ids, 0x3F) << 26
        made[key] = registers._replace(eax=eax)
    return made


def _levels(leaf: int, topology: Topology) -> Entries:
    """Leaf 0xB or 0x1F for vCPU 0: the level of threads (type 1, one a core), and of cores (type 2). EAX: how far to
    shift an id right to number the next level; EBX: logical processors in this one (SDM Vol. 2A, CPUID leaf 0BH)."""
    return {
        (leaf, 0): Registers(0, 1, 1 << 8 | 0, 0),
        (leaf, 1): Registers(topology.id_bits, topology.vcpus, 2 << 8 | 1, 0),
    }


def _apic_ids(table: CpuidTable, apic_id: int) -> Entries:
    """The entries of vCPU 0's table that hold the APIC id, for another vCPU."""
    changed = {(1, 0): table.get(1)._replace(ebx=table.get(1).ebx & 0x00FFFFFF | apic_id << 24)}
    for leaf in (0xB, 0x1F):
        for key, registers in _all_of(table, leaf).items():
            changed[key] = registers._replace(edx=apic_id)
    if table.has(BY_NAME["topoext"]) and table.max_extended >= 0x8000001E:
        changed[0x8000001E, 0] = Registers(apic_id, apic_id & 0xFF, 0, 0)
    return changed


def same_but_apic_ids(first: CpuidTable, other: CpuidTable) -> bool:
    """Whether two vCPUs' tables differ in nothing but what _apic_ids() changes from one to the next."""
    if first.indexed != other.indexed:
        return False
    mine, theirs = first.entries, other.entries
    different = [key for key, registers in mine.items() if theirs.get(key, ZEROS) != registers]
    different += [key for key, registers in theirs.items() if key not in mine and registers != ZEROS]
    return all(_without_apic_id(k[0], first.get(*k)) == _without_apic_id(k[0], other.get(*k)) for k in different)


def _without_apic_id(leaf: int, registers: Registers) -> tuple[int, int, int, int]:
    eax, ebx, ecx, edx = registers
    if leaf == 1:
        return eax, ebx & 0x00FFFFFF, ecx, edx
    if leaf in (0xB, 0x1F):
        return eax, ebx, ecx, 0
    if leaf == 0x8000001E:
        return 0, ebx & ~0xFF, ecx, edx
    return eax, ebx, ecx, edx


def _levelled(offered: CpuidTable, table: CpuidTable) -> tuple[Levelled, ...]:
    numbers = (
        ("highest basic leaf", offered.max_basic, table.max_basic),
        ("highest extended leaf", offered.max_extended, table.max_extended),
        ("physical address bits", offered.physical_bits, table.physical_bits),
        ("linear address bits", offered.linear_bits, table.linear_bits),
        ("CLFLUSH size in bytes", offered.clflush_bytes, table.clflush_bytes),
        ("XSAVE area in bytes", offered.get(0xD).ecx, table.get(0xD).ecx),
    )
    return tuple(Levelled(what, before, after) for what, before, after in numbers if before != after)
