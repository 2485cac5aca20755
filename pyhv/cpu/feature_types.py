"""What the feature table holds. features.toml says more about each field."""

from __future__ import annotations

from pyhv.light import NamedTuple


class Word(NamedTuple):
    """One output register of one CPUID leaf and subleaf."""

    leaf: int
    subleaf: int
    register: str  # "eax", "ebx", "ecx" or "edx"

    def __str__(self) -> str:
        return f"0x{self.leaf:x}{f'.{self.subleaf}' if self.subleaf else ''}.{self.register}"


class Feature(NamedTuple):
    """One CPUID bit; features.toml says more about each field."""

    name: str
    title: str
    vendor: str  # "any", "intel" or "amd"
    word: Word
    bit: int
    sense: str  # "plain", "inverted", "any-of" or "hint"
    requires: tuple[str, ...]
    xsave: tuple[int, ...]
    kvm: str  # "passes", "provides" or "never"
    migratable: bool
    linux: str
    qemu: str
    libvirt: str
    aliases: tuple[str, ...]
    mirrors: str  # the feature that this bit repeats, or ""
    topology: bool
    dynamic: bool
    barred: str  # "", "nested" or "pmu": no profile shows it

    @property
    def mask(self) -> int:
        return 1 << self.bit

    def all_names(self) -> list[str]:
        """The canonical name, then the other names, each once."""
        names = (self.name, self.linux, self.qemu, self.libvirt, *self.aliases)
        return list(dict.fromkeys(name for name in names if name))


class XsaveComponent(NamedTuple):
    """A state component of XCR0 or IA32_XSS. size, offset: bytes, in the standard format; offset is None where it
    differs between processors or where the component is supervisor state."""

    number: int
    name: str
    size: int
    offset: int | None
    supervisor: bool


class Number(NamedTuple):
    """A number in CPUID that belongs to a feature; features.toml says more about each field."""

    name: str
    title: str
    word: Word
    low: int
    bits: int
    needs: str
    most: int  # the highest value that is shown; 0: any
    compare: str  # "at most", "at least" or "equal"

    @property
    def mask(self) -> int:
        return (1 << self.bits) - 1 << self.low

    def of(self, word: int) -> int:
        """The number in a register's 32 bits."""
        return (word & self.mask) >> self.low

    def shown(self, word: int) -> int:
        """The bits that a guest is shown where the host's register is `word`."""
        value = self.of(word)
        return (min(value, self.most) if self.most else value) << self.low
