"""The record codec: everything that can be written comes back, and nothing else gets in."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyhv.errors import BadInput
from pyhv.state import codec
from pyhv.state.codec import record
from pyhv.state.schema import S64, U8, U16, U32, U64, Length


class Part(NamedTuple):
    selector: U16
    base: U64
    limit: U32


class Group(NamedTuple):
    cs: Part
    flags: int
    """A plain int is a U64."""


@record("sample", 3)
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
    msrs: dict[U32, U64]
    few: Annotated[dict[U32, U64], Length(0, 2)]
    maybe: U64 | None
    nested: tuple[tuple[U8, U8], ...] | None


def ints(bits: int) -> st.SearchStrategy[int]:
    return st.integers(0, (1 << bits) - 1)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
parts = st.builds(Part, ints(16), ints(64), ints(32))
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
    msrs=st.dictionaries(ints(32), ints(64), max_size=6),
    few=st.dictionaries(ints(32), ints(64), max_size=2),
    maybe=st.none() | ints(64),
    nested=st.none() | st.lists(st.tuples(ints(8), ints(8)), max_size=3).map(tuple),
)

SAMPLE = Sample(
    small=1,
    signed=-2,
    flag=True,
    text="grüße",
    data=b"\x00\xff",
    page=b"abcd",
    group=Group(Part(8, 0, 0xFFFFFFFF), 2),
    numbers=(1, 2),
    quad=(1, 2, 3, 4),
    mixed=(1, False, "x"),
    parts=(Part(1, 2, 3), Part(4, 5, 6)),
    msrs={0x10: 1, 0xC0000080: 2},
    few={},
    maybe=None,
    nested=((1, 2),),
)


def fields(sample: Sample = SAMPLE) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(codec.encode(sample))["fields"]
    return decoded


def pack(fields: object, name: object = "sample", version: object = 3) -> bytes:
    return json.dumps({"record": name, "version": version, "fields": fields}).encode()


def decode(data: bytes) -> Sample:
    return codec.decode(Sample, data, "sample[3]")


# ------------------------------------------------------------------------------------------------- there and back


@given(samples)
def test_round_trip(sample: Sample) -> None:
    data = codec.encode(sample)
    assert decode(data) == sample
    # The types too: 1 == True, but the kernel is given numbers.
    in_order = {name: dict(sorted(getattr(sample, name).items())) for name in ("msrs", "few")}
    assert repr(decode(data)) == repr(sample._replace(**in_order))
    assert codec.encode(decode(data)) == data


def test_bytes_are_these() -> None:
    """What is in files and on the wire does not change by accident."""

    @record("tiny", 1)
    class Tiny(NamedTuple):
        b: bytes
        a: U64
        m: dict[U32, U64]
        n: U8 | None

    assert codec.encode(Tiny(b"\x01\xab", (1 << 64) - 1, {9: 2, 3: 1}, None)) == (
        b'{"fields":{"a":18446744073709551615,"b":"01ab","m":[[3,1],[9,2]],"n":null},"record":"tiny","version":1}'
    )


def test_ends_of_ranges() -> None:
    ends = SAMPLE._replace(small=255, signed=-1 << 63, quad=(0, 0, 0, (1 << 64) - 1), maybe=(1 << 64) - 1)
    assert decode(codec.encode(ends)) == ends


# ----------------------------------------------------------------------------------------------- what is refused


def put(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Sets a value of the JSON: the path to it, and the value as the last."""

    def change(fields: dict[str, Any]) -> None:
        place: Any = fields
        for step in path[:-2]:
            place = place[step]
        place[path[-2]] = path[-1]

    return change


WRONG = [
    # of every type, the others: a bool is no int, an int no bool, a fraction neither
    (put("small", True), ".small", "must be a number of 8 bits, is true"),
    (put("small", 256), ".small", "must be a number of 8 bits, is 0x100"),
    (put("small", -1), ".small", "must be a number of 8 bits, is -0x1"),
    (put("small", 1.0), ".small", "is a fraction"),
    (put("small", "1"), ".small", "is text"),
    (put("small", None), ".small", "is null"),
    (put("small", [1]), ".small", "is a list"),
    (put("small", {}), ".small", "is an object"),
    (put("small", 1 << 300), ".small", "is a number of 301 bits"),
    (put("signed", 1 << 63), ".signed", "signed number of 64 bits"),
    (put("signed", (-1 << 63) - 1), ".signed", "signed number of 64 bits"),
    (put("flag", 1), ".flag", "must be true or false, is 0x1"),
    (put("text", 5), ".text", "must be text"),
    (put("text", "\ud800"), ".text", "a character that Unicode does not"),
    (put("data", "abc"), ".data", "hexadecimal"),
    (put("data", "ab cd"), ".data", "hexadecimal"),
    (put("data", "xy"), ".data", "hexadecimal"),
    (put("data", "\u0661\u0661"), ".data", "hexadecimal"),  # digits, but Arabic ones
    (put("data", [1]), ".data", "hexadecimal"),
    (put("page", "616263"), ".page", "must be 4 to 8 long, is 3"),
    (put("page", "00" * 9), ".page", "must be 4 to 8 long, is 9"),
    (put("quad", [1, 2, 3]), ".quad", "must be 4 long, is 3"),
    (put("quad", [1, 2, 3, 1 << 64]), ".quad[3]", "number of 64 bits"),
    (put("numbers", 7), ".numbers", "must be a list"),
    (put("numbers", [1, True]), ".numbers[1]", "is true"),
    (put("mixed", [1, False]), ".mixed", "must be 3 long, is 2"),
    (put("mixed", [1, False, "x", 1]), ".mixed", "must be 3 long, is 4"),
    (put("mixed", [1, 0, "x"]), ".mixed[1]", "must be true or false"),
    (put("group", [1]), ".group", "must be an object"),
    (put("group", "cs", "limit", 1 << 32), ".group.cs.limit", "number of 32 bits"),
    (put("group", "flags", 1 << 64), ".group.flags", "number of 64 bits"),
    (put("group", "cs", "colour", 1), ".group.cs", 'has the unknown field "colour"'),
    (put("parts", 1, "selector", 65536), ".parts[1].selector", "number of 16 bits"),
    (put("msrs", {"16": 1}), ".msrs", "must be a list"),
    (put("msrs", [[1]]), ".msrs[0]", "pair"),
    (put("msrs", [[1, 2, 3]]), ".msrs[0]", "pair"),
    (put("msrs", [[1, 2], {}]), ".msrs[1]", "pair"),
    (put("msrs", [[1, 2], [True, 2]]), ".msrs[1]", "is true"),
    (put("msrs", [[1, 2], [1 << 32, 2]]), ".msrs[1]", "number of 32 bits"),
    (put("msrs", [[1, 2], [3, 1 << 64]]), ".msrs[0x3]", "number of 64 bits"),
    (put("msrs", [[1, 2], [1, 2]]), ".msrs", "each key once"),
    (put("msrs", [[2, 2], [1, 2]]), ".msrs", "ascending"),
    (put("few", [[1, 1], [2, 2], [3, 3]]), ".few", "must be 0 to 2 long, is 3"),
    (put("maybe", "no"), ".maybe", "number of 64 bits"),
    (put("nested", [[1]]), ".nested[0]", "must be 2 long, is 1"),
    (put("nested", [[1, 2], [1, 256]]), ".nested[1][1]", "number of 8 bits"),
    (put("extra", 1), "", 'has the unknown field "extra"'),
    (put("\n\x1b[31m" * 100, 1), "", "has the unknown field \"\\n\\x1b[31m"),
    (lambda f: f.pop("text"), "", 'lacks the field "text"'),
    (lambda f: f["group"]["cs"].pop("base"), ".group.cs", 'lacks the field "base"'),
]


@pytest.mark.parametrize(("change", "path", "problem"), WRONG, ids=[f"{i}{wrong[1]}" for i, wrong in enumerate(WRONG)])
def test_wrong_field_is_named(change: Callable[[dict[str, Any]], object], path: str, problem: str) -> None:
    changed = fields()
    change(changed)
    with pytest.raises(BadInput) as caught:
        decode(pack(changed))
    assert caught.value.subject == "sample[3]" + path
    assert problem in caught.value.problem
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"{", "is not JSON"),
        (b"{}{}", "is not JSON: Extra data"),
        (b"[]", "must be an object, is a list"),
        (b"null", "must be an object, is null"),
        (b'{"fields":NaN,"record":"sample","version":3}', "NaN is no number"),
        (b'{"fields":-Infinity,"record":"sample","version":3}', "-Infinity is no number"),
        (b'{"fields":{},"record":"sample"}', 'lacks the field "version"'),
        (pack(fields(), name="other"), 'holds the record "other", not "sample"'),
        (pack(fields(), name=3), "must be text"),
        (pack(fields(), version="3"), "must be a number"),
        (pack(fields(), version=True), "must be a number"),
        (pack(fields(), version=0), "must be a number of 32 bits, from 1"),
        (pack(fields(), version=1 << 40), "must be a number of 32 bits, from 1"),
        (pack(fields(), version=4), "version 4 of this record is newer than this pyhv reads (3)"),
        (pack(fields(), version=2), "version 2 of this record is older than this pyhv reads (3)"),
        (pack([]), "must be an object, is a list"),
        (b'{"fields":' + b"[" * 100000, "nested too deeply"),
        (b'{"fields":' + b'{"a":' * 100000, "nested too deeply"),
        (b'{"fields":' + b"9" * 5000 + b',"record":"sample","version":3}', "is not JSON"),
        (b" " * (codec.MAX_BYTES + 1), "at most"),
    ],
)
def test_wrong_whole(data: bytes, problem: str) -> None:
    with pytest.raises(BadInput, match=r"^sample") as caught:
        decode(data)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_doubled_field_is_named_where_it_is() -> None:
    data = codec.encode(SAMPLE)
    assert data.count(b'"limit":4294967295') == 1
    with pytest.raises(BadInput, match=r'^sample\[3\]\.group\.cs: has the field "limit" twice$'):
        decode(data.replace(b'"limit":4294967295', b'"limit":1,"limit":4294967295'))
    with pytest.raises(BadInput, match='has the field "version" twice'):
        decode(data[:-1] + b',"version":3}')


ENCODE_WRONG: list[tuple[dict[str, Any], str]] = [
    ({"small": 256}, ".small"),
    ({"small": True}, ".small"),
    ({"flag": 1}, ".flag"),
    ({"text": b"x"}, ".text"),
    ({"text": "\ud800"}, ".text"),
    ({"data": "00"}, ".data"),
    ({"data": bytearray(2)}, ".data"),
    ({"page": b"123"}, ".page"),
    ({"group": (1, 2)}, ".group"),
    ({"group": Group(Part(0, 1 << 64, 0), 0)}, ".group.cs.base"),
    ({"numbers": [1]}, ".numbers"),
    ({"numbers": (1, None)}, ".numbers[1]"),
    ({"quad": (1,)}, ".quad"),
    ({"mixed": (1, True)}, ".mixed"),
    ({"mixed": (1, True, "x", 1)}, ".mixed"),
    ({"mixed": [1, True, "x"]}, ".mixed"),
    ({"msrs": [(1, 2)]}, ".msrs"),
    ({"msrs": {1: -1}}, ".msrs[0x1]"),
    ({"msrs": {"a": 1}}, ".msrs[text]"),
    ({"msrs": {1: 1, None: 1}}, ".msrs[null]"),
    ({"few": {1: 1, 2: 2, 3: 3}}, ".few"),
    ({"maybe": 1.5}, ".maybe"),
    ({"nested": ((1, 2), (3,))}, ".nested[1]"),
]


@pytest.mark.parametrize(("change", "path"), ENCODE_WRONG)
def test_encoding_is_as_strict(change: dict[str, Any], path: str) -> None:
    with pytest.raises(BadInput) as caught:
        codec.encode(SAMPLE._replace(**change), "vcpu[7]")
    assert caught.value.subject == "vcpu[7]" + path


def test_too_large_is_refused_on_the_way_out() -> None:
    with pytest.raises(BadInput, match=r"^sample: has 33"):
        codec.encode(SAMPLE._replace(data=bytes(codec.MAX_BYTES)))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


def check_answer(data: bytes, decode: Callable[[bytes], Sample]) -> None:
    """Whatever the bytes are: a record that can be encoded again, or BadInput in one line."""
    try:
        sample = decode(data)
    except BadInput as error:
        assert "\n" not in str(error) and len(str(error)) < 400
    else:
        assert codec.decode(Sample, codec.encode(sample), "again") == sample


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    check_answer(data, decode)


@given(st.data(), json_values)
def test_any_value_at_any_place(data: st.DataObject, value: object) -> None:
    whole = json.loads(codec.encode(SAMPLE))
    place, key = whole, data.draw(st.sampled_from(sorted(whole)))
    while isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    place[key] = value
    check_answer(json.dumps(whole).encode(), decode)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_bytes_changed(edits: list[tuple[int, int]]) -> None:
    encoded = bytearray(codec.encode(SAMPLE))
    for place, byte in edits:
        encoded[place % len(encoded)] = byte
    check_answer(bytes(encoded), decode)


def test_the_check_of_answers_can_fail() -> None:
    """A decoder that lets one thing through, or dies of one, is found out."""
    with pytest.raises(BadInput):  # it would not be encoded again
        check_answer(b"", lambda data: SAMPLE._replace(small=256))
    with pytest.raises(KeyError):
        check_answer(b"", lambda data: {}[0])  # type: ignore[return-value,misc]

    def talks_too_much(data: bytes) -> Sample:
        raise BadInput("sample", "first\nsecond")

    with pytest.raises(AssertionError):
        check_answer(b"", talks_too_much)


# ------------------------------------------------------------------------------------------------------ versions


def test_upgrade() -> None:
    """Version 1 had two numbers where version 2 has a list."""

    def upgrade(fields: dict[str, Any], version: int) -> dict[str, Any]:
        assert version == 1
        return {"values": [fields["low"], fields["high"]]}

    @record("pair", 2, upgrade)
    class Pair(NamedTuple):
        values: tuple[U8, ...]

    assert codec.decode(Pair, pack({"low": 1, "high": 2}, "pair", 1), "p") == Pair((1, 2))
    assert codec.decode(Pair, pack({"values": [3]}, "pair", 2), "p") == Pair((3,))
    with pytest.raises(BadInput, match="newer"):
        codec.decode(Pair, pack({"values": [3]}, "pair", 3), "p")
    with pytest.raises(BadInput, match=r"^p\.values\[1\]: must be a number of 8 bits"):  # what it makes is checked
        codec.decode(Pair, pack({"low": 1, "high": 256}, "pair", 1), "p")
    with pytest.raises(BadInput, match=r"^p: is not what version 1 of this record must be"):
        codec.decode(Pair, pack({"low": 1}, "pair", 1), "p")
    with pytest.raises(BadInput, match=r"^p: must be an object"):
        codec.decode(Pair, pack([1], "pair", 1), "p")


def test_mistakes_in_records_are_ours() -> None:
    for name in ("", "seventeen-letters", "no_underscore", "grün"):
        with pytest.raises(TypeError):
            record(name, 1)

    for hint in (float, list[int], dict[str, int], dict[U8, str], int | str, Annotated[str, "?"], set[int]):
        Wrong = NamedTuple("Wrong", [("field", hint)])  # type: ignore[misc]  # noqa: UP014
        record("wrong", 1)(Wrong)
        with pytest.raises(TypeError):
            codec.decode(Wrong, pack({"field": 1}, "wrong", 1), "w")
