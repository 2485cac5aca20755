"""What a host can give a guest: one description, the same whether it is this machine, a file, or a migration's peer.

`pyhv host --json` writes it, --on reads it, the migration handshake sends it; as_kvm_host() makes one of a raw
processor dump, so that a move can be judged without the machine.
"""

from __future__ import annotations

from pyhv.cpu.feature_types import Word
from pyhv.cpu.features import BY_NAME, FEATURES, NUMBERS, WORDS
from pyhv.cpu.table import (
    EXTENDED,
    HYPERVISOR,
    KVM_SIGNATURE,
    NAME_LEAVES,
    REGISTERS,
    ZEROS,
    CpuidTable,
    Registers,
    XsaveArea,
    hex_from_json,
    xsave_leaf,
)
from pyhv.errors import BadInput
from pyhv.light import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_FORMAT = "pyhv-host/1"
_U32 = 0xFFFFFFFF
_FIELDS = (
    *("format", "processor", "kernel", "accelerator", "tsc_khz", "tsc_scaling"),
    *("cpuid", "feature_msrs", "msrs", "verdict"),
)
_MAX_MSRS = 4096
_MAX_TEXT = 256

#: KVM's own features (Documentation/virt/kvm/x86/cpuid.rst).
KVM_FEATURES = HYPERVISOR + 1


class Verdict(NamedTuple):
    """What the probe found: does this accelerator show guests their CPUID table and nothing else?

    leaks: privilege level (0 and 3) -> feature word -> the bits that guests see although their table hides them.
    ignored: the privilege levels at which the table is ignored altogether.
    """

    leaks: Mapping[int, Mapping[Word, int]]
    ignored: frozenset[int] = frozenset()

    @property
    def faithful(self) -> bool:
        """Whether hiding works at every privilege level."""
        return not self.ignored and not any(mask for words in self.leaks.values() for mask in words.values())

    def to_json(self) -> dict[str, Any]:
        leaks = {
            str(cpl): [
                {"leaf": f"{w.leaf:#x}", "subleaf": w.subleaf, "register": w.register, "mask": f"0x{mask:08x}"}
                for w, mask in sorted(words.items())
            ]
            for cpl, words in sorted(self.leaks.items())
        }
        return {"faithful": self.faithful, "leaks": leaks, "ignored": sorted(self.ignored)}

    @classmethod
    def from_json(cls, value: object, name: str) -> Verdict:
        """Raises BadInput naming the field. `faithful` is for readers; it must agree with the rest."""
        fields = _object(value, ("faithful", "leaks", "ignored"), "verdict", name)
        leaks: dict[int, dict[Word, int]] = {}
        for cpl, rows in _object(fields["leaks"], None, "verdict.leaks", name).items():
            where = f"verdict.leaks.{cpl}"
            if cpl not in ("0", "3"):
                raise BadInput(name, f"{where}: the privilege levels are 0 and 3")
            words = leaks[int(cpl)] = {}
            for i, row in enumerate(_list(rows, 256, where, name)):
                item = _object(row, ("leaf", "subleaf", "register", "mask"), f"{where}[{i}]", name)
                if item["register"] not in REGISTERS:
                    raise BadInput(name, f"{where}[{i}].register must be one of {', '.join(REGISTERS)}")
                leaf = hex_from_json(item["leaf"], 8, f"{where}[{i}].leaf", name)
                word = Word(leaf, _number(item["subleaf"], _U32, f"{where}[{i}].subleaf", name), item["register"])
                if word in words:
                    raise BadInput(name, f"{where}[{i}] is there twice")
                words[word] = hex_from_json(item["mask"], 8, f"{where}[{i}].mask", name)
        ignored = _list(fields["ignored"], 2, "verdict.ignored", name)
        if any(type(cpl) is not int or cpl not in (0, 3) for cpl in ignored):
            raise BadInput(name, "verdict.ignored: the privilege levels are 0 and 3")
        verdict = cls(leaks, frozenset(ignored))
        if fields["faithful"] is not verdict.faithful:
            raise BadInput(name, "verdict.faithful contradicts the leaks")
        return verdict


class HostDescription(NamedTuple):
    """What a host can give its guests."""

    table: CpuidTable
    """CPUID as the accelerator offers it to guests (KVM_GET_SUPPORTED_CPUID), with its own leaves, and with the
    processor's name (table.NAME_LEAVES), which KVM leaves to whoever makes the guest's table."""
    kernel: str = ""
    """The kernel's release, "" where it is not known."""
    accelerator: str = ""
    """What would run the guest: "kvm", ..."""
    feature_msrs: Mapping[int, int] = {}
    """Index -> value of the MSRs that describe the processor (KVM_GET_MSR_FEATURE_INDEX_LIST)."""
    msrs: tuple[int, ...] = ()
    """Indices of the MSRs that make up a vCPU's state (KVM_GET_MSR_INDEX_LIST), ascending."""
    tsc_khz: int = 0
    """Rate of the time-stamp counter, 0 where it is not known."""
    tsc_scaling: bool = False
    """Whether a guest may have another rate (KVM_CAP_TSC_CONTROL)."""
    verdict: Verdict | None = None
    """The probe's verdict, None where no probe was made."""

    # What the CPUID table says, by its name.

    @property
    def vendor(self) -> str:
        """ "intel", "amd" or the vendor's 12 characters."""
        return self.table.vendor

    @property
    def processor(self) -> str:
        """The processor's name, "" where it has none."""
        return self.table.brand

    @property
    def xsave(self) -> dict[int, XsaveArea]:
        """Size, offset and flags of each XSAVE component beyond x87 and SSE."""
        return self.table.xsave_areas()

    @property
    def physical_bits(self) -> int:
        return self.table.physical_bits

    @property
    def linear_bits(self) -> int:
        return self.table.linear_bits

    @property
    def kvm_features(self) -> int:
        """KVM's paravirtual features: leaf 0x40000001 EAX, 0 where the accelerator has none."""
        return self.table.get(KVM_FEATURES).eax if self.table.is_kvm else 0

    def to_json(self) -> dict[str, Any]:
        """A JSON object, `"format": "pyhv-host/1"`."""
        return {
            "format": _FORMAT,
            "processor": self.processor,
            "kernel": self.kernel,
            "accelerator": self.accelerator,
            "tsc_khz": self.tsc_khz,
            "tsc_scaling": self.tsc_scaling,
            "cpuid": self.table.to_json(),
            "feature_msrs": {f"{index:#x}": f"{value:#x}" for index, value in sorted(self.feature_msrs.items())},
            "msrs": [f"{index:#x}" for index in self.msrs],
            "verdict": None if self.verdict is None else self.verdict.to_json(),
        }

    @classmethod
    def from_json(cls, value: object, name: str = "host description") -> HostDescription:
        """The other way; `value` is what json.loads() gave, `name` is what errors call it. Nothing in it is trusted:
        BadInput names the field. `processor` is for readers; it must agree with the CPUID table."""
        if not isinstance(value, dict) or value.get("format") != _FORMAT:
            raise BadInput(name, f'no host description: "format" must be "{_FORMAT}"', "pyhv host --json writes one")
        fields = _object(value, _FIELDS, "", name)
        for field in ("processor", "kernel", "accelerator"):
            text = fields[field]
            if not isinstance(text, str) or len(text) > _MAX_TEXT or not text.isprintable():
                raise BadInput(name, f"{field} must be a line of at most {_MAX_TEXT} characters")
        if type(fields["tsc_scaling"]) is not bool:
            raise BadInput(name, "tsc_scaling must be true or false")
        feature_msrs = _object(fields["feature_msrs"], None, "feature_msrs", name)
        if len(feature_msrs) > _MAX_MSRS:
            raise BadInput(name, f"feature_msrs has {len(feature_msrs)} fields, at most {_MAX_MSRS} are possible")
        msrs = [
            hex_from_json(index, 8, f"msrs[{i}]", name)
            for i, index in enumerate(_list(fields["msrs"], _MAX_MSRS, "msrs", name))
        ]
        table = CpuidTable.from_json(fields["cpuid"], name)
        if fields["processor"] != table.brand:
            raise BadInput(name, "processor contradicts the name in cpuid")
        return cls(
            table=table,
            kernel=fields["kernel"],
            accelerator=fields["accelerator"],
            feature_msrs={
                hex_from_json(index, 8, f"feature_msrs: {index!r}", name): hex_from_json(
                    number, 16, f"feature_msrs.{index}", name
                )
                for index, number in feature_msrs.items()
            },
            msrs=tuple(sorted(set(msrs))),
            tsc_khz=_number(fields["tsc_khz"], _U32, "tsc_khz", name),
            tsc_scaling=fields["tsc_scaling"],
            verdict=None if fields["verdict"] is None else Verdict.from_json(fields["verdict"], name),
        )


def _object(value: object, fields: tuple[str, ...] | None, where: str, name: str) -> dict[str, Any]:
    """The JSON object that `value` must be, with exactly these fields (None: any)."""
    prefix = f"{where}: " if where else ""
    if not isinstance(value, dict):
        raise BadInput(name, f"{where} must be an object")
    if fields is not None:
        for field in value:
            if field not in fields:
                raise BadInput(name, f'{prefix}unknown field "{field}"')
        for field in fields:
            if field not in value:
                raise BadInput(name, f'{prefix}the field "{field}" is missing')
    return value


def _list(value: object, most: int, where: str, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise BadInput(name, f"{where} must be a list")
    if len(value) > most:
        raise BadInput(name, f"{where} has {len(value)} items, at most {most} are possible")
    return value


def _number(value: object, most: int, where: str, name: str) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise BadInput(name, f"{where} must be a whole number from 0 to {most}")
    return value


# ---------------------------------------------------------------------------------- a host made of a raw dump

#: The highest leaves that KVM passes on, whatever the processor has (__do_cpuid_func(), Linux 6.18).
_KVM_MAX_BASIC = 0x24
_KVM_MAX_EXTENDED = 0x80000022
_KVM_MAX_SUBLEAF_7 = 2

#: Leaves that KVM passes on as the processor answers them, but for the feature words in them; and the processor's name.
_KVM_PASSES = frozenset(
    {0x0, 0x1, 0x2, 0x4, EXTENDED, 0x80000001, *NAME_LEAVES, 0x80000005, 0x80000006, 0x80000019, 0x8000001D}
)

#: And these, where the feature that announces the leaf is visible.
_KVM_ANNOUNCED = {0x12: "sgx", 0x14: "intel_pt"}


def as_kvm_host(
    raw: CpuidTable, *, tsc_khz: int = 0, tsc_scaling: bool = False, name: str = "processor dump"
) -> HostDescription:
    """The host that KVM would make of the processor that answered `raw`: what KVM_GET_SUPPORTED_CPUID would give there.

    Each feature by its column `kvm` of the feature table: as the processor has it, provided on every host, or never
    given; with what KVM adds and leaves out by the processor's kind (_adjusted()). Leaves are limited as KVM limits
    them, KVM's own are added, and APIC ids are zero. What a dump cannot say is the caller's to give or unknown: the
    TSC's rate and scaling, MSRs (none), the kernel.

    Raises BadInput, called `name`, where the dump's numbers make no table.
    """
    max_basic = min(raw.max_basic, _KVM_MAX_BASIC)
    max_extended = min(raw.max_extended, _KVM_MAX_EXTENDED)
    if max_extended >= 0x8000001D:
        # LFENCE's being serializing and NullSegClearsBase are told there, also where the processor has no such leaf.
        max_extended = max(max_extended, 0x80000021)

    words = _kvm_words(raw, max_basic, max_extended)

    def visible(feature: str) -> bool:
        wanted = BY_NAME[feature]
        return bool(words[wanted.word] & wanted.mask)

    for number in NUMBERS:
        if visible(number.needs):
            words[number.word] = words.get(number.word, 0) | number.shown(raw.word(number.word))

    entries: dict[tuple[int, int], Registers] = {}
    announced = {leaf for leaf, feature in _KVM_ANNOUNCED.items() if visible(feature)}
    for (leaf, subleaf), registers in raw.entries.items():
        if leaf <= (max_extended if leaf >= EXTENDED else max_basic) and (leaf in _KVM_PASSES or leaf in announced):
            entries[leaf, subleaf] = registers
    entries[0, 0] = entries[0, 0]._replace(eax=max_basic)
    # EBX: brand index and CLFLUSH size stay; the number of logical processors and the APIC id are the topology's.
    if max_basic >= 1:
        entries[1, 0] = raw.get(1)._replace(ebx=raw.get(1).ebx & 0xFFFF)
    if max_basic >= 7:
        entries[7, 0] = ZEROS._replace(eax=min(raw.get(7).eax, _KVM_MAX_SUBLEAF_7))
    for leaf in (0x1E, 0x24):
        entries[leaf, 0] = ZEROS._replace(eax=max((w.subleaf for w in words if w.leaf == leaf and words[w]), default=0))
    if visible("xsave"):
        # KVM enables the components of the features it gives; not that of processor trace, which it handles by MSRs.
        # Bit 2 of the flags: whether XFD can disable the component.
        components = {n for f in FEATURES for n in f.xsave if words[f.word] & f.mask and f.migratable}
        xfd = visible("xfd")
        areas = {n: area.shown(True, xfd) for n, area in raw.xsave_areas().items() if n in components}
        entries.update(xsave_leaf(areas, 0, visible("xsavec") or visible("xsaves")))
    if (EXTENDED, 0) in entries:
        entries[EXTENDED, 0] = entries[EXTENDED, 0]._replace(eax=max_extended)
    if max_extended >= 0x80000008:
        # EAX[23:16], the addresses that nested paging can map, is the physical width up to 48 bits.
        physical, linear = raw.physical_bits, max(raw.linear_bits, 48)
        mapped = min(physical, 48) if _has_nested_paging(raw) else 0
        entries[0x80000008, 0] = Registers(mapped << 16 | linear << 8 | physical, 0, 0, 0)
    if visible("svm"):
        entries[0x8000000A, 0] = Registers(1, 8, 0, 0)  # revision 1, 8 address space ids
    entries[HYPERVISOR, 0] = KVM_SIGNATURE

    for word, value in words.items():
        key = (word.leaf, word.subleaf)
        if value or key in entries:
            entries[key] = entries.get(key, ZEROS)._replace(**{word.register: value})
    try:
        return HostDescription(
            CpuidTable(entries),
            accelerator="kvm",
            tsc_khz=tsc_khz,
            tsc_scaling=tsc_scaling,
        )
    except BadInput as error:
        raise BadInput(name, error.problem) from None


def _kvm_words(raw: CpuidTable, max_basic: int, max_extended: int) -> dict[Word, int]:
    """The feature words that KVM would offer on this processor."""
    vendors = ("any", raw.lineage)
    adjusted = _adjusted(raw)
    words = {}
    for word, features in WORDS.items():
        if word.leaf >= EXTENDED:
            in_range = word.leaf <= max_extended
        elif word.leaf >= HYPERVISOR:
            in_range = True
        else:
            in_range = word.leaf <= max_basic
        if word.leaf == 7:
            in_range = in_range and word.subleaf <= min(raw.get(7).eax, _KVM_MAX_SUBLEAF_7)
        elif word.leaf in (0x1E, 0x24):
            in_range = in_range and word.subleaf <= raw.get(word.leaf).eax
        words[word] = 0
        if in_range:
            ours = [f for f in features if f.vendor in vendors]
            passed = sum(f.mask for f in ours if f.kvm == "passes")
            provided = sum(f.mask for f in ours if f.kvm == "provides")
            words[word] = raw.word(word) & passed | provided
            words[word] |= sum(f.mask for f in ours if adjusted.get(f.name) is True)
            words[word] &= ~sum(f.mask for f in ours if adjusted.get(f.name) is False)
    return words


def _adjusted(raw: CpuidTable) -> dict[str, bool]:
    """What KVM adds to the features that this processor's CPUID tells of, or leaves out of them, by what Linux knows of
    the processor: kvm_set_cpu_caps(), and vmx_set_cpu_caps() or svm_set_cpu_caps() (arch/x86/kvm, Linux 6.18);
    arch/x86/kernel/cpu for what Linux finds out. True: KVM offers it where its leaf exists. What only an MSR tells is
    taken to be as the newest kernel and microcode have it on that family."""
    has = raw.features()
    family, model, _ = raw.signature
    found: dict[str, bool] = {}

    # Linux keeps one flag for each ability of SPEC_CTRL, whichever vendor's bit tells of it, and KVM shows both bits.
    ibrs = "spec_ctrl" in has or "amd_ibrs" in has
    ibpb = "spec_ctrl" in has or "amd_ibpb" in has
    stibp = "intel_stibp" in has or "amd_stibp" in has
    if ibrs:
        found["amd_ibrs"] = True
    if ibpb:
        found["amd_ibpb"] = True
    if stibp:
        found |= {"amd_stibp": True, "intel_stibp": True}
    if "spec_ctrl_ssbd" in has:
        found["amd_ssbd"] = True
    if "amd_ssbd" in has:
        found["spec_ctrl_ssbd"] = True
    if {"amd_ibpb_ret", "amd_ibpb", "amd_ibrs"} <= has:
        found["spec_ctrl"] = True
    # Return predictions outlive IBPB on the processors that have enhanced IBRS, of which ARCH_CAPABILITIES would tell.
    if "spec_ctrl" in has and "arch_capabilities" not in has:
        found["amd_ibpb_ret"] = True

    if not _has_nested_paging(raw):
        found |= {"pdpe1gb": "lm" in has, "pku": False}  # KVM walks 1 GiB pages of the guest's itself

    if raw.lineage == "intel":
        # SYSCALL is shown to 64-bit code only (SDM Vol. 2A, CPUID leaf 80000001H): a dump that a 32-bit program made
        # lacks it, while KVM asks in 64-bit mode.
        if raw.vendor == "intel" and "lm" in has:
            found["syscall"] = True
        # What UMIP forbids can be intercepted (descriptor-table exiting) since the generation that brought EPT.
        if _has_nested_paging(raw):
            found["umip"] = True
    elif raw.lineage == "amd":
        found |= {"bus_lock_detect": False, "lfence_rdtsc": True}
        if family == 0x17 and model >= 0x30:  # Zen 2 clears the base and does not tell of it; its successors do
            found["null_sel_clr_base"] = True
        if family in (0xF, 0x10, 0x11, 0x12):
            found["amd_ssb_no"] = True
        if "amd_ssbd" in has or (family in (0x15, 0x16, 0x17) and "virt_ssbd" not in has):
            found["virt_ssbd"] = True  # by SPEC_CTRL, or by the MSR that these families have for it
        if family == 0x17 and "amd_ibpb" in has:
            found["ibpb_brtype"] = True
        elif family in (0x19, 0x1A):
            found |= {"ibpb_brtype": True, "sbpb": True}
        if family == 0x19:
            found["verw_clear"] = True
        else:
            found |= {"tsa_sq_no": True, "tsa_l1_no": True}
    return found


def _has_nested_paging(raw: CpuidTable) -> bool:
    """Whether KVM has nested paging there. AMD tells; of Intel's, which have it since Nehalem, only an MSR tells."""
    if raw.lineage == "amd":
        return raw.has(BY_NAME["npt"])
    if raw.vendor != "intel":
        return raw.lineage == "intel"
    family, model, _ = raw.signature
    return family == 6 and model not in _INTEL_WITHOUT_EPT


#: Models of Intel's family 6 that have VT-x and no EPT: Yonah, Merom, Penryn, Dunnington, Bonnell.
_INTEL_WITHOUT_EPT = (14, 15, 22, 23, 28, 29)
