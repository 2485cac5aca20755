"""The table of messages, what they carry, and the page that describes them."""

from __future__ import annotations

import inspect
import json
import re
import typing
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pyhv._native import ffi, lib
from pyhv.accel.state import RawState, RawVcpu
from pyhv.cli import migrate as command
from pyhv.control.server import METHODS
from pyhv.errors import BadInput, HostError
from pyhv.migration import protocol, waits
from pyhv.migration.protocol import Answer, Cancel, Commit, End, Hello, Ready, Running, Type, Vcpu
from pyhv.migration.source import Limits, Progress
from pyhv.state import codec
from pyhv.state.records import DeviceRecord, MachineRecord
from pyhv.state.schema import U32, U64, Bits, Length

# Of the shapes of all that is packed, in protocol versions 5 and 6.
PACKED = 0xEB0A866F

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")


def ints(bits: int) -> st.SearchStrategy[int]:
    return st.integers(0, (1 << bits) - 1)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
machines = st.builds(
    MachineRecord, texts, texts, texts, texts, st.booleans(), ints(64), st.tuples(ints(64)), st.booleans()
)
entries = st.tuples(*[ints(8 if i == 2 else 32) for i in range(7)])
tables = st.lists(st.lists(entries, min_size=1, max_size=3).map(tuple), min_size=1, max_size=3).map(tuple)
hellos = st.builds(
    Hello, texts, st.text("abc", max_size=64), texts, ints(32), machines, tables,
    st.lists(ints(32), max_size=5).map(tuple), st.none() | ints(64), ints(32), st.booleans(), st.booleans(),
    st.booleans(), st.lists(texts, max_size=5).map(tuple), st.booleans(), ints(32), ints(32),
)  # fmt: skip
data = st.binary(max_size=30)
vcpus = st.builds(RawVcpu, data, data, data, data, ints(64), ints(64), data, data, data, data)
devices = st.lists(st.builds(DeviceRecord, texts, st.binary(min_size=1, max_size=50)), max_size=3).map(tuple)
messages = st.one_of(
    hellos,
    st.builds(Answer, st.lists(texts, max_size=5).map(tuple), st.booleans()),
    st.builds(Vcpu, vcpus),
    st.builds(End, ints(64), ints(64), ints(32), ints(64), data, st.booleans(), ints(64), ints(32), devices),
    st.just(Ready()),
    st.just(Commit()),
    st.builds(Running, texts, ints(64)),
    st.builds(Cancel, texts),
)


# -------------------------------------------------------------------------------------------------------- the table


def test_every_type_has_one_kind() -> None:
    assert [kind.number for kind in protocol.KINDS] == list(Type)
    assert all(kind.sender in ("source", "destination", "both") for kind in protocol.KINDS)


def test_every_record_has_one_kind() -> None:
    """All records that protocol.py defines are carried by a message."""
    carried = [kind.carries for kind in protocol.KINDS if kind.carries is not None]
    assert len(carried) == len(set(carried))
    defined = {
        value for value in vars(protocol).values()
        if isinstance(value, type) and value.__module__ == protocol.__name__ and hasattr(value, "_fields")
    } - {protocol.Kind}  # fmt: skip
    assert set(carried) == defined


def test_the_engines_types_are_the_engines() -> None:
    assert (Type.HEARTBEAT, Type.PAGES, Type.PAGES_ZSTD) == (
        lib.PYHV_MESSAGE_HEARTBEAT, lib.PYHV_MESSAGE_PAGES, lib.PYHV_MESSAGE_PAGES_ZSTD,
    )  # fmt: skip


def test_names_of_messages() -> None:
    assert protocol.title(Type.HELLO) == "hello" and protocol.title(99) == "of the unknown type 99"
    assert protocol.name_of(Commit) == "commit" and protocol.type_of(Commit) == Type.COMMIT
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", protocol.boot_id())


# ------------------------------------------------------------------------------------------------- there and back


@given(hellos)
def test_a_hello_of_the_version_before_is_read(hello: Hello) -> None:
    """Which knew nothing of IA32_ARCH_CAPABILITIES, nor of a guest that stays paused."""
    whole = json.loads(protocol.encode(hello)[1])
    for name in ("capabilities", "paused"):
        whole["fields"].pop(name, None)
    whole["version"] = 5
    assert protocol.decode(Hello, json.dumps(whole).encode()) == hello._replace(capabilities=None, paused=False)
    for version in (4, 7):
        whole["version"] = version
        with pytest.raises(BadInput):
            protocol.decode(Hello, json.dumps(whole).encode())


@given(messages)
def test_every_message_comes_back(message: tuple[Any, ...]) -> None:
    kind, payload = protocol.encode(message)
    assert kind == protocol.type_of(type(message)) and len(payload) <= protocol.MAX_MESSAGE
    assert protocol.decode(type(message), payload) == message


def shape(hint: Any) -> str:
    """All that decides what a record's packed bytes mean: its fields' names and types, those within them too."""
    if hasattr(hint, "_fields"):
        hints = typing.get_type_hints(hint, include_extras=True)
        return f"({' '.join(f'{name}:{shape(hints[name])}' for name in hint._fields)})"
    parts = [shape(part) for part in typing.get_args(hint)]
    marks = [str(mark) for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Bits | Length)]
    return f"{getattr(typing.get_origin(hint) or hint, '__name__', hint)}[{' '.join(parts + marks)}]"


def layout(ctype: Any) -> str:
    """The same for a C structure."""
    if ctype.kind == "array":
        return f"{layout(ctype.item)}*{ctype.length}"
    if ctype.kind != "struct":
        return str(ctype.cname)
    return f"({' '.join(f'{name}:{field.offset}:{layout(field.type)}' for name, field in ctype.fields)})"


# What a RawState has the bytes of.
STRUCTS = ("pyhv_regs", "pyhv_sregs", "pyhv_events", "pyhv_debugregs", "pyhv_irqchip")


def test_whoever_changes_what_is_packed_gives_the_protocol_another_version() -> None:
    """Packed bytes have no names: two sides with other fields would take one for the other."""
    shapes = [shape(kind.carries) for kind in protocol.KINDS if kind.packed]
    layouts = [layout(ffi.typeof(f"struct {name}")) for name in STRUCTS]
    # In version 5 it was the same.
    assert (zlib.crc32("\n".join(shapes + layouts).encode()), codec._kinds[Hello].version) == (PACKED, 6)


def test_all_structures_that_are_sent_are_looked_at() -> None:
    assert re.findall(r"struct (\w+)", inspect.getsource(RawVcpu) + inspect.getsource(RawState)) == list(STRUCTS)


class Now(NamedTuple):
    low: U32
    high: U32


def test_a_change_of_shape_is_seen() -> None:
    others = [
        NamedTuple("Renamed", [("low", U32), ("top", U32)]), NamedTuple("Wider", [("low", U32), ("high", U64)]),
        NamedTuple("Swapped", [("high", U32), ("low", U32)]), NamedTuple("Text", [("low", U32), ("high", str)]),
        NamedTuple("More", [("low", U32), ("high", tuple[U32, ...])]),
    ]  # fmt: skip
    assert shape(Now) not in [shape(other) for other in others]


@given(st.sampled_from([Hello, Answer, Vcpu, End, Running, Cancel]), st.binary(max_size=200))
def test_hostile_payloads(cls: type[tuple[Any, ...]], payload: bytes) -> None:
    with pytest.raises(BadInput, match=f"^message {protocol.name_of(cls)}"):
        protocol.decode(cls, payload)


@given(messages, st.data())
def test_a_changed_payload_is_refused_or_means_something(message: tuple[Any, ...], data: st.DataObject) -> None:
    payload = bytearray(protocol.encode(message)[1])
    assume(payload)
    payload[data.draw(st.integers(0, len(payload) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        decoded = protocol.decode(type(message), bytes(payload))
    except BadInput as error:
        assert str(error).startswith(f"message {protocol.name_of(type(message))}")
    else:
        assert type(decoded) is type(message)


def test_a_message_that_is_too_large() -> None:
    with pytest.raises(BadInput, match=r"message cancel: has 11.* bytes, at most 1048576 are possible"):
        protocol.encode(Cancel("x" * 1100000))


def test_what_people_are_told_of_an_error() -> None:
    assert protocol.reason_of(BadInput("a", "b", "c")) == "a: b; c"
    assert protocol.reason_of(HostError("read", 32)) == "read: Broken pipe"
    named = protocol.about(HostError("read", 32, "it has gone"), "migration to x", "look there")
    assert (str(named), named.errnum) == ("migration to x: Broken pipe, read: it has gone; look there", 32)
    named = protocol.about(HostError("migration to x", 0, "no ready", "wait"), "migration to x", "look there")
    assert str(named) == "migration to x: no ready; wait"
    assert protocol.reason_of(KeyboardInterrupt()) == "it was interrupted"
    assert protocol.reason_of(ZeroDivisionError("secret")) == "internal error: ZeroDivisionError"
    assert protocol.shown("a\x1b[2J\nb\u202e") == "a [2J b "
    assert protocol.shown("x" * 501) == "x" * 500 + "..."


# ------------------------------------------------------------------------------------------------------- the limits


@pytest.mark.parametrize("good", [{}, {"downtime": 0}, {"timeout": 1e9}, {"heartbeat": 0.01, "silence": 0.02}], ids=str)
def test_limits_that_make_sense(good: dict[str, Any]) -> None:
    Limits(**good).check()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"downtime": -1}, "downtime -1: is no limit; give a number from 0 to 1e18"),
        ({"bandwidth": float("inf")}, "bandwidth inf: is no limit"),
        ({"bandwidth": 1e300}, r"bandwidth 1e\+300: is no limit"),
        ({"timeout": float("nan")}, "timeout nan: is no limit"),
        ({"bandwidth": 1}, "bandwidth 1: is too little: the other side would give up; the least is 1000 bytes"),
        ({"overrun": 0.5}, "overrun 0.5: is no factor; give a number from 1 on"),
        ({"rounds": 0}, "rounds 0: are none; take one at least"),
        ({"least_rounds": -1}, "least_rounds -1: are none"),
        ({"on_timeout": "maybe"}, "on_timeout maybe: is unknown; choose one of cancel, stop"),
        ({"heartbeat": 0}, "time limits: do not fit: heartbeat 0, silence 1; 0.01 is the least"),
        ({"heartbeat": 0.6}, "time limits: do not fit"),
        ({"silence": 3601}, "time limits: do not fit"),
        ({"silence": float("nan")}, "time limits: do not fit"),
    ],
    ids=str,
)
def test_limits_that_make_none(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        Limits(**bad).check()


def test_the_control_method_has_every_limit() -> None:
    assert set(Limits._fields) <= set(METHODS["migrate"])


# -------------------------------------------------------------------------------------------------------- the texts


SUMMARY = {
    "total_time": 1.234, "downtime": 0.0123, "one_clock": True, "rounds": 3, "pages": 7, "zero_pages": 0,
    "bytes": 5 << 20, "rate": 100 << 20,
}  # fmt: skip


def test_a_summary_for_a_person() -> None:
    said = command._describe(SUMMARY)
    assert said.startswith("migrated in 1.23 s, of which the guest stood 12.3 ms; 3 rounds, 5")
    assert "the guest stood at most 12.3 ms" in command._describe(SUMMARY | {"one_clock": False})


@pytest.mark.parametrize(("terminal", "as_json"), [(True, False), (False, False), (True, True)])
def test_progress_is_shown(
    terminal: bool, as_json: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("os.isatty", lambda fd: terminal)
    facts = Progress(2, 5 << 20, 10 << 20, 7 << 20, 1e8, 1e6, 0.04)._asdict()
    with command._Progress(as_json) as progress:
        if not as_json:
            progress(facts)  # at once is too early
        now[0] += 2
        progress(facts)
        now[0] += 2
        progress(facts | {"round": 0, "total": 0, "left": 0})
    said = capfd.readouterr().err
    if as_json:
        assert said.count('{"progress": "migrate", "round": ') == 2 == said.count("\n")
    elif terminal:
        first, second = re.findall(r"\r([^\r]+)\x1b\[K", said)
        assert first.startswith("round 2 [##########..........] 5") and "would stand 40 ms" in first
        assert second.startswith("hand-over [") and said.endswith("\r\x1b[K")
    else:
        assert said.count("pyhv: migrate: round=") == 2 == said.count("\n")


# ---------------------------------------------------------------------------------------------------------- the page


def test_the_page_has_the_table_of_messages() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| ([a-z]+) \|", PAGE, re.MULTILINE)
    assert rows == [(str(int(kind.number)), kind.number.name.lower(), kind.sender) for kind in protocol.KINDS]


def test_the_page_has_every_limit_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", PAGE, re.MULTILINE))
    for name, value in Limits()._asdict().items():
        assert rows[name].strip() == (value if isinstance(value, str) else f"{value:g}" if value else "none")


def test_the_page_has_every_wait() -> None:
    assert {value for value in vars(waits).values() if isinstance(value, waits.Wait)} == set(waits.WAITS)
    for wait in waits.WAITS:
        assert f"| {wait.who} | {wait.what} | {wait.least:g} | {wait.silences:g} | {wait.why} |" in PAGE, wait
        assert 0 < wait.seconds() <= wait.seconds(600) <= waits.MOST


def test_nothing_else_has_a_wait_of_its_own() -> None:
    """A number of seconds in the code of a migration is in the table, or it is a look at something else meanwhile."""
    for path in (ROOT / "pyhv" / "migration").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.name != "waits.py":
            assert not re.findall(r"(?:settimeout|join|wait|timeout=)\(\d", text), path


def test_the_page_has_every_field_of_the_summary_and_of_progress() -> None:
    from pyhv.migration.source import Summary

    for name in (*Summary._fields, *Progress._fields):
        assert f"`{name}`" in PAGE, name


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target


# ----------------------------------------------------------------------------------------------- the version before


def a_hello() -> Hello:
    machine = MachineRecord("u" * 36, "ticker", "every=1", "host", False, 4 << 20, (), False)
    table = ((0, 0, 0, 1, 2, 3, 4),)
    return Hello(
        pyhv="0", name="t", host="h", pid=1, machine=machine, tables=(table,), msrs=(0x10,), tsc_khz=1,
        strict_tsc=False, irqchip=True, pit=False, devices=("cmos",), zstd=False, heartbeat=100, silence=600,
        paused=False, capabilities=None,
    )  # fmt: skip


def test_a_guest_that_runs_is_announced_as_by_the_version_before() -> None:
    running = a_hello()
    value = json.loads(protocol.encode(running)[1])
    assert value["version"] == 5 and "paused" not in value["fields"]
    assert protocol.decode(Hello, protocol.encode(running)[1]) == running
    paused = running._replace(paused=True)
    assert json.loads(protocol.encode(paused)[1])["version"] == 6
    assert protocol.decode(Hello, protocol.encode(paused)[1]) == paused
    with pytest.raises(BadInput, match="is not what version 4 of this record must be"):
        protocol.decode(Hello, json.dumps(value | {"version": 4}).encode())
