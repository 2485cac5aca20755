"""Packed records: everything that can be written comes back, and nothing else gets in."""

from __future__ import annotations

import struct
from typing import Annotated, Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyhv.errors import BadInput
from pyhv.state import codec, packed
from pyhv.state.codec import record
from pyhv.state.records import DeviceRecord, PlatformRecord, VcpuRecord
from pyhv.state.schema import U8, U16, U32, U64, Length

from .test_codec import SAMPLE, Part, Sample, samples


@record("tiny", 1)
class Tiny(NamedTuple):
    first: U16
    part: Part
    pair: tuple[U8, bool]
    name: str
    parts: tuple[Part, ...]
    few: Annotated[dict[U32, U64], Length(0, 2)]
    maybe: U8 | None
    last: U8


TINY = Tiny(0x1234, Part(1, 2, 3), (4, True), "grün", (Part(5, 6, 7),), {9: 10, 8: 11}, 12, 13)
# By hand, from the module's description.
BYTES = b"".join([
    bytes.fromhex("3412 0100 0200000000000000 03000000 04 01"),
    bytes.fromhex("05000000") + "grün".encode(),
    bytes.fromhex("01000000 0500 0600000000000000 07000000"),
    bytes.fromhex("02000000 08000000 0b00000000000000 09000000 0a00000000000000"),
    bytes.fromhex("01 0c 0d"),
])  # fmt: skip


def test_the_bytes_are_those_of_the_description() -> None:
    assert packed.encode(TINY) == BYTES
    assert packed.decode(Tiny, BYTES, "tiny") == TINY
    assert packed.encode(TINY._replace(maybe=None))[-2:] == b"\0\x0d"


@given(samples)
def test_round_trip(sample: Sample) -> None:
    data = packed.encode(sample)
    decoded = packed.decode(Sample, data, "sample")
    assert decoded == sample and packed.encode(decoded) == data
    # What compares equal may be of another type: what JSON makes of it shows that.
    assert codec.encode(decoded) == codec.encode(sample)


@pytest.mark.parametrize("size", range(len(BYTES)))
def test_cut_short(size: int) -> None:
    with pytest.raises(BadInput, match=r"^tiny\.\w+.*: is cut short: \d+ bytes should come, there are \d+$"):
        packed.decode(Tiny, BYTES[:size], "tiny")


def with_field(name: str, data: str) -> bytes:
    """TINY with other bytes instead of one field's."""
    return BYTES.replace({
        "name": bytes.fromhex("05000000") + "grün".encode(),
        "parts": bytes.fromhex("01000000 0500 0600000000000000 07000000"),
        "few": bytes.fromhex("02000000 08000000 0b00000000000000 09000000 0a00000000000000"),
    }[name], bytes.fromhex(data))  # fmt: skip


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (BYTES + b"\0\0", "tiny: has 2 bytes too many"),
        (BYTES[:-3] + b"\x02" + BYTES[-2:], "tiny.maybe: is neither there nor not"),
        (with_field("name", "ffffffff"), "tiny.name: is cut short"),
        (with_field("name", "01000000 ff"), "tiny.name: is no text"),
        (with_field("parts", "ffffffff"), "tiny.parts: is cut short"),
        (with_field("few", "02000000 09000000 0b00000000000000 08000000 0a00000000000000"), "each key once, in ascend"),
        (with_field("few", "02000000 08000000 0b00000000000000 08000000 0a00000000000000"), "each key once, in ascend"),
        (with_field("few", "03000000" + "010000000000000000000000" * 3), "each key once, in ascending"),
        (with_field("few", "03000000" + "".join(f"0{i}000000 0000000000000000" for i in (0, 1, 2))), "0 to 2 long, is"),
    ],
    ids=range(9),
)
def test_what_means_nothing(data: bytes, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        packed.decode(Tiny, data, "tiny")


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_or_mean_something(data: bytes) -> None:
    for cls in (Sample, Tiny, VcpuRecord, PlatformRecord, DeviceRecord):
        try:
            value = packed.decode(cls, data, "it")
        except BadInput as error:
            assert str(error).startswith("it")
        else:
            assert type(value) is cls


@given(samples, st.data())
def test_a_changed_byte_is_refused_or_means_something_of_the_right_types(sample: Sample, data: st.DataObject) -> None:
    changed = bytearray(packed.encode(sample))
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        decoded = packed.decode(Sample, bytes(changed), "sample")
    except BadInput as error:
        assert str(error).startswith("sample")
    else:
        codec.encode(decoded)


def test_a_number_of_items_takes_no_memory_by_itself() -> None:
    with pytest.raises(BadInput, match="is cut short"):
        packed.decode(Sample, struct.pack("<I", 0xFFFFFFFF) * 50, "sample")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"small": 256}, r"sample\.small: must be a number of 8 bits, is 0x100"),
        ({"signed": 1 << 63}, r"sample\.signed"),
        ({"group": None}, r"sample\.group: must be Group"),
        ({"data": "text"}, r"sample\.data: must be bytes, is text"),
        ({"text": "\ud800"}, r"sample\.text"),
        ({"page": b"abc"}, r"sample\.page: must be 4 to 8 long, is 3"),
        ({"quad": (1, 2, 3)}, r"sample\.quad: must be 4 long, is 3"),
        ({"mixed": (1, False)}, r"sample\.mixed: must be 3 long, is 2"),
        ({"mixed": (1, False, "x", "y")}, r"sample\.mixed: must be 3 long, is 4"),
        ({"msrs": {-1: 0}}, r"sample\.msrs"),
        ({"few": {1: 1, 2: 2, 3: 3}}, r"sample\.few: must be 0 to 2 long, is 3"),
        ({"nested": ((1, 256),)}, r"sample\.nested\[0\]\[1\]"),
        ({"parts": (Part(1, 2, 3), 4)}, r"sample\.parts\[1\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_its_annotation_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        packed.encode(SAMPLE._replace(**change))


def test_annotations_that_are_not_known() -> None:
    for hint in (float, tuple[float, ...], dict[str, U8], U8 | str):
        with pytest.raises(TypeError, match=r"no type of a record|must be of ints"):
            packed._schema.of(hint)
