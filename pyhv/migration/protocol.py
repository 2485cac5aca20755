"""The messages of a migration, in one table, and what they carry.

A migration goes

    source                          destination
    hello                      ->                     what the guest is and needs
                               <-   answer            no reasons: it can run here; else every one against it
    pages ..., sync            ->                     a round of pre-copy, the guest runs
                               <-   synced            all of it has been taken
    ...                                               until little enough is left
    pages ..., vcpu ..., end   ->                     the guest stands: what is left of its memory, and its state
                               <-   ready             all has come and is in place
    commit                     ->                     from here on the source never runs it again
                               <-   running           the guest runs here

Either side may say `cancel` with a reason instead of what is due, up to `commit`; then the source goes on running the
guest and the destination forgets it. How messages are framed, checked and timed is in csrc/migration/link.c.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Annotated, Any, NamedTuple, TypeVar

from pyhv._native.link import MAX_MESSAGE
from pyhv.accel.state import RawState, RawVcpu
from pyhv.cpu import msrs
from pyhv.cpu.table import CpuidTable
from pyhv.errors import BadInput, HostError, PyhvError
from pyhv.state import codec, packed
from pyhv.state.codec import record
from pyhv.state.needs import Needs
from pyhv.state.records import CpuidEntry, DeviceRecord, MachineRecord, RawMachine
from pyhv.state.schema import U32, U64, Length
from pyhv.version import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyhv.cpu.host import HostDescription
    from pyhv.vm.vm import Vm

R = TypeVar("R", bound=tuple[Any, ...])


class Type(IntEnum):
    """What kind of message it is; the first three are the engine's (csrc/pyhv.h)."""

    HEARTBEAT = 1
    PAGES = 2
    PAGES_ZSTD = 3
    HELLO = 16
    ANSWER = 17
    SYNC = 18
    SYNCED = 19
    VCPU = 20
    END = 21
    READY = 22
    COMMIT = 23
    RUNNING = 24
    CANCEL = 25


def _upgrade_hello(fields: dict[str, Any], version: int) -> dict[str, Any]:
    """Version 5 did not say what the guest was told in IA32_ARCH_CAPABILITIES, and brought none that is paused."""
    if version != 5:
        raise ValueError(version)
    return {**fields, "capabilities": None, "paused": False}


@record("hello", 6, _upgrade_hello)
class Hello(NamedTuple):
    """What the guest is and what it needs of a host. Its version is that of the protocol: of the messages, and of the
    fields of all that is packed."""

    pyhv: str
    """The source's version, for people."""
    name: Annotated[str, Length(0, 64)]
    """The VM's name, which travels with it; "" without one."""
    host: str
    """The source's boot id (random(4)): on the same one the two sides have the same CLOCK_MONOTONIC."""
    pid: U32
    """The source's process: on the same host, the destination takes the name over from it."""
    machine: MachineRecord
    tables: Annotated[tuple[Annotated[tuple[CpuidEntry, ...], Length(1, 256)], ...], Length(1, 254)]
    """The CPUID table of each vCPU."""
    msrs: Annotated[tuple[U32, ...], Length(0, 512)]
    """The MSRs that the vCPUs' state has whatever they hold."""
    capabilities: U64 | None
    """IA32_ARCH_CAPABILITIES; None where the guest has none."""
    tsc_khz: U32
    strict_tsc: bool
    irqchip: bool
    pit: bool
    devices: Annotated[tuple[str, ...], Length(0, 32)]
    zstd: bool
    """Whether the source would compress pages."""
    heartbeat: U32
    """Both sides give a sign of life after so many milliseconds."""
    silence: U32
    """After so many milliseconds without one the link is broken."""
    paused: bool
    """Whether the guest is paused, and is to be so there. New in version 6: one that runs is announced by version 5,
    which the pyhv before this one understands; a paused one, which it would let run, it refuses."""

    def needs(self) -> Needs:
        """What the guest needs of a host. Raises BadInput for CPUID tables that make no sense."""
        tables = tuple(CpuidTable.from_entries(entries) for entries in self.tables)
        machine, numbers = self.machine, frozenset(self.msrs)
        return Needs(machine.profile, machine.hides, tables, numbers, self.tsc_khz, self.capabilities)


def hello(vm: Vm, machine: MachineRecord, host: HostDescription, heartbeat: float, silence: float) -> Hello:
    """What a VM says about itself; name, strict_tsc, zstd and paused are the caller's to fill in. Times in seconds."""
    return Hello(
        pyhv=VERSION,
        name="",
        host=boot_id(),
        pid=os.getpid(),
        machine=machine,
        tables=tuple(tuple(table.as_entries()) for table in vm.tables),
        msrs=tuple(sorted({number for table in vm.tables for number in msrs.required(table, host.msrs)})),
        capabilities=vm.capabilities,
        tsc_khz=vm.tsc_khz,
        strict_tsc=False,
        irqchip=vm.irqchip,
        pit=vm.pit,
        devices=vm.devices.names,
        zstd=False,
        heartbeat=round(heartbeat * 1000),
        silence=round(silence * 1000),
        paused=False,
    )


@record("answer", 1)
class Answer(NamedTuple):
    """Whether the destination takes the guest."""

    reasons: tuple[str, ...]
    """Every reason why not."""
    zstd: bool
    """Whether it can decompress pages."""


@record("sync", 1)
class Sync(NamedTuple):
    """Asks for a word when all that was sent before has been taken."""

    may_stand: bool
    """Whether the guest may have to stand after this round."""


@record("synced", 1)
class Synced(NamedTuple):
    """It has."""


@record("vcpu", 1)
class Vcpu(NamedTuple):
    """The state of the next vCPU."""

    state: RawVcpu


@record("end", 3)
class End(NamedTuple):
    """The rest of the state, after which nothing comes. What must have come by now, and when the state was taken."""

    pages: U64
    """How often a page with content was sent."""
    zero_pages: U64
    vcpus: U32
    taken: U64
    """CLOCK_REALTIME in ns when the guest's clock was read: the destination adds what has passed since."""
    irqchip: bytes
    pit: bool
    clock: U64
    tsc_khz: U32
    """These are the rest of a RawState."""
    devices: Annotated[tuple[DeviceRecord, ...], Length(0, 32)]

    def with_vcpus(self, vcpus: Sequence[Vcpu]) -> RawMachine:
        """The whole state, of which these have come before."""
        shared = self.irqchip, self.pit, self.clock, self.tsc_khz
        return RawMachine(RawState(tuple([vcpu.state for vcpu in vcpus]), *shared), self.devices)


def parts(state: RawMachine, pages: int, zero_pages: int, taken: int) -> tuple[list[Vcpu], End]:
    """The messages that bring this state."""
    vcpus = [Vcpu(vcpu) for vcpu in state.processors.vcpus]
    return vcpus, End(pages, zero_pages, len(vcpus), taken, *state.processors[1:], state.devices)


@record("ready", 1)
class Ready(NamedTuple):
    """The destination has it all, checked and in place, and waits for the word."""


@record("commit", 1)
class Commit(NamedTuple):
    """The source has recorded that it will not run the guest again."""


@record("running", 1)
class Running(NamedTuple):
    """The guest runs."""

    host: str
    """The destination's boot id."""
    since: U64
    """Its CLOCK_MONOTONIC in ns when the first vCPU was entered."""


@record("cancel", 1)
class Cancel(NamedTuple):
    """The sender gives the migration up."""

    reason: str


class Kind(NamedTuple):
    """One kind of message: who may send it, and what it carries."""

    number: Type
    sender: str
    """ "source", "destination" or "both"."""
    carries: type[tuple[Any, ...]] | None
    """Its record; None where the engine makes it."""
    packed: bool = False
    """Whether the guest stands and waits for it: then it is packed (state/packed.py). The others can be read by every
    version, which tells that it is another one."""


KINDS = (
    Kind(Type.HEARTBEAT, "both", None),
    Kind(Type.PAGES, "source", None),
    Kind(Type.PAGES_ZSTD, "source", None),
    Kind(Type.HELLO, "source", Hello),
    Kind(Type.ANSWER, "destination", Answer),
    Kind(Type.SYNC, "source", Sync, packed=True),
    Kind(Type.SYNCED, "destination", Synced, packed=True),
    Kind(Type.VCPU, "source", Vcpu, packed=True),
    Kind(Type.END, "source", End, packed=True),
    Kind(Type.READY, "destination", Ready, packed=True),
    Kind(Type.COMMIT, "source", Commit, packed=True),
    Kind(Type.RUNNING, "destination", Running, packed=True),
    Kind(Type.CANCEL, "both", Cancel),
)

_BY_RECORD = {kind.carries: kind for kind in KINDS if kind.carries is not None}


def warm_up() -> None:
    """Prepares for all messages: what is done once is done before a guest stands and waits for it."""
    for is_packed, module in ((False, codec), (True, packed)):
        module.prepare([cls for cls, kind in _BY_RECORD.items() if kind.packed == is_packed])


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """While a guest stands there is no time to look for garbage: it is as much work as taking the guest's state."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def encode(message: tuple[Any, ...]) -> tuple[int, bytes]:
    """Type and payload of a message that carries a record. Raises BadInput for one that is too large."""
    kind = _BY_RECORD[type(message)]
    payload = packed.encode(message) if kind.packed else codec.encode(message)
    if isinstance(message, Hello) and not message.paused and message.capabilities is None:
        payload = _as_version_5(payload)
    if len(payload) > MAX_MESSAGE:
        problem = f"has {len(payload)} bytes, at most {MAX_MESSAGE} are possible"
        raise BadInput(f"message {kind.number.name.lower()}", problem)
    return kind.number, payload


def _as_version_5(hello: bytes) -> bytes:
    import json

    value = json.loads(hello)
    del value["fields"]["paused"], value["fields"]["capabilities"]
    return json.dumps(value | {"version": 5}, sort_keys=True, separators=(",", ":")).encode("ascii")


def decode(cls: type[R], payload: bytes) -> R:
    """What a message carries, from bytes that need not be trusted. Raises BadInput."""
    kind = _BY_RECORD[cls]
    where = f"message {kind.number.name.lower()}"
    return packed.decode(cls, payload, where) if kind.packed else codec.decode(cls, payload, where)


def type_of(cls: type[tuple[Any, ...]]) -> Type:
    """The type of the message that carries this record."""
    return _BY_RECORD[cls].number


def name_of(cls: type[tuple[Any, ...]]) -> str:
    """What people call that message."""
    return type_of(cls).name.lower()


def title(number: int) -> str:
    """What people call a message of this type."""
    try:
        return Type(number).name.lower()
    except ValueError:
        return f"of the unknown type {number}"


def about(error: HostError, what: str, advice: str) -> HostError:
    """The same of this migration: the engine's errors name a system call."""
    detail = error.detail if error.what == what else f"{error.what}: {error.detail}"
    return HostError(what, error.errnum, detail, error.advice or advice)


def reason_of(error: BaseException) -> str:
    """What the other side, or a person, is told of an error."""
    if isinstance(error, KeyboardInterrupt):
        return "it was interrupted"
    return shown(str(error) if isinstance(error, PyhvError) else f"internal error: {type(error).__name__}")


def shown(text: str) -> str:
    """What the other side wrote: not longer than a person reads, and nothing that drives a terminal."""
    cut = text[:500] + "..." if len(text) > 500 else text
    return "".join(c if c.isprintable() else " " for c in cut)


def boot_id() -> str:
    """What tells this boot of this host from all others (random(4), /proc/sys/kernel/random/boot_id)."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
