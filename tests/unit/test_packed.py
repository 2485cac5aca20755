"""Packed records: everything that can be written comes back, and nothing else gets in."""

from __future__ import annotations

import struct
from typing import Annotated, Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyhv.errors import BadInput
from pyhv.migration import protocol
from pyhv.state import codec, packed
from pyhv.state.codec import record
from pyhv.state.schema import S64, U8, U16, U32, U64, Length

from .test_codec import Group, Part, ints, parts, texts


@record("sample", 1)
class Sample(NamedTuple):
    small: U8
    signed: S64
    flag: bool
    text: str
    data: bytes
    page: Annotated[bytes, Length(4, 8)]
    group: Group
    numbers: tuple[U32, ...]
    quad: Annotated[tuple[U64, ...], Length(4, 4)]
    mixed: tuple[U8, bool, str]
    parts: tuple[Part, ...]
    last: tuple[tuple[U8, U8], ...]


samples = st.builds(
    Sample,
    small=ints(8),
    signed=st.integers(-1 << 63, (1 << 63) - 1),
    flag=st.booleans(),
    text=texts,
    data=st.binary(max_size=40),
    page=st.binary(min_size=4, max_size=8),
    group=st.builds(Group, parts, ints(64)),
    numbers=st.lists(ints(32), max_size=5).map(tuple),
    quad=st.tuples(ints(64), ints(64), ints(64), ints(64)),
    mixed=st.tuples(ints(8), st.booleans(), texts),
    parts=st.lists(parts, max_size=3).map(tuple),
    last=st.lists(st.tuples(ints(8), ints(8)), max_size=3).map(tuple),
)
SAMPLE = Sample(
    1, -2, True, "text", b"data", b"page", Group(Part(1, 2, 3), 4), (5, 6), (1, 2, 3, 4), (7, False, "x"),
    (Part(4, 5, 6),), ((1, 2),),
)  # fmt: skip


@record("tiny", 1)
class Tiny(NamedTuple):
    first: U16
    part: Part
    pair: tuple[U8, bool]
    name: str
    parts: tuple[Part, ...]
    few: Annotated[tuple[U32, ...], Length(0, 2)]
    last: U8


TINY = Tiny(0x1234, Part(1, 2, 3), (4, True), "grün", (Part(5, 6, 7),), (9, 8), 13)
# By hand, from the module's description.
FIELDS = {
    "first": bytes.fromhex("3412"),
    "part": bytes.fromhex("0100 0200000000000000 03000000"),
    "pair": bytes.fromhex("04 01"),
    "name": bytes.fromhex("05000000") + "grün".encode(),
    "parts": bytes.fromhex("01000000 0500 0600000000000000 07000000"),
    "few": bytes.fromhex("02000000 09000000 08000000"),
    "last": bytes.fromhex("0d"),
}
BYTES = b"".join(FIELDS.values())


def test_the_bytes_are_those_of_the_description() -> None:
    assert packed.encode(TINY) == BYTES
    assert packed.decode(Tiny, BYTES, "tiny") == TINY


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
    return b"".join((FIELDS | {name: bytes.fromhex(data)}).values())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (BYTES + b"\0\0", "tiny: has 2 bytes too many"),
        (with_field("name", "ffffffff"), "tiny.name: is cut short"),
        (with_field("name", "01000000 ff"), "tiny.name: is no text"),
        (with_field("parts", "ffffffff"), r"tiny.parts\[0\].limit: is cut short"),
        (with_field("few", "03000000 01000000 02000000 03000000"), "tiny.few: must be 0 to 2 long, is 3"),
    ],
    ids=range(5),
)
def test_what_means_nothing(data: bytes, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        packed.decode(Tiny, data, "tiny")


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_or_mean_something(data: bytes) -> None:
    for cls in (Sample, Tiny, protocol.Vcpu, protocol.End):
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
        ({"last": ((1, 256),)}, r"sample\.last\[0\]\[1\]"),
        ({"parts": (Part(1, 2, 3), 4)}, r"sample\.parts\[1\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_its_annotation_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        packed.encode(SAMPLE._replace(**change))


def test_annotations_that_are_not_known() -> None:
    for hint in (float, tuple[float, ...], U8 | str, dict[U32, U64], U8 | None):
        with pytest.raises(TypeError, match=r"no type of a record|no dict and no None is packed"):
            packed._schema.of(hint)
