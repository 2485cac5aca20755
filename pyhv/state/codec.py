"""Records as bytes and back: what a snapshot file holds, and what a migration says before a guest stands.

A record is a typing.NamedTuple with @record(name, version); its annotations (schema.py) say what may stand in it. A
NamedTuple within another needs no name and version of its own. The bytes are JSON, compact and sorted:
{"fields":{...},"record":NAME,"version":N}, with bytes as hexadecimal text and a dict as [[key, value], ...] in
ascending order.

Both directions check everything; decode() believes nothing. An unknown, missing or doubled field, another type, an int
out of range (true is no int): each is BadInput that names the field, as in `vcpu[3].sregs.cs.limit`.

Versions: a record has one, and decode() refuses a newer one than its own. An older one goes through the record's
`upgrade`; a record without one refuses it too.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from pyhv.errors import BadInput
from pyhv.state.schema import U32, Bits, Length, Schema

# No record is larger (a vCPU's is about 20 kB), and no more of a stranger's bytes is parsed.
MAX_BYTES = 16 << 20

# The fields of an older version as they stand in the file, unchecked, and that version -> those of the current one,
# which are checked then.
Upgrade = Callable[[dict[str, Any], int], dict[str, Any]]

R = TypeVar("R", bound=tuple[Any, ...])


class _Kind(NamedTuple):
    name: str
    version: int
    upgrade: Upgrade | None


_kinds: dict[type, _Kind] = {}


def record(name: str, version: int, upgrade: Upgrade | None = None) -> Callable[[type[R]], type[R]]:
    """Makes a NamedTuple a record. name: at most 16 letters, digits and -; version: from 1, one more with each change
    of the fields, of its own or of those within it."""

    if not (name.isascii() and name.replace("-", "").isalnum() and len(name) <= 16 and version >= 1):
        raise TypeError(f"{name}, version {version}: cannot be a record's")

    def mark(cls: type[R]) -> type[R]:
        _kinds[cls] = _Kind(name, version, upgrade)
        return cls

    return mark


def name_of(cls: type[tuple[Any, ...]]) -> str:
    """The name that was given to @record."""
    return _kinds[cls].name


_encoder: Any = None  # of JSON; made when it is first used, as is _decoder


def prepare(classes: Iterable[type[tuple[Any, ...]]]) -> None:
    """Does for these records what else their first encode() or decode() does, which then takes ten times as long."""
    for cls in classes:
        _schema.of(cls)


def encode(value: tuple[Any, ...], where: str = "") -> bytes:
    """The record as bytes. Raises BadInput about the field that does not fit its annotation; `where` is what it calls
    the record (default: the record's name)."""
    global _encoder
    if _encoder is None:
        import json

        _encoder = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)
    kind = _kinds[type(value)]
    try:
        fields = _schema.of(type(value)).encode(value)
    except _Mismatch as mismatch:
        raise BadInput((where or kind.name) + mismatch.path, mismatch.problem) from None
    whole = {"record": kind.name, "version": kind.version, "fields": fields}
    data: bytes = _encoder.encode(whole).encode("ascii")
    if len(data) > MAX_BYTES:
        raise BadInput(where or kind.name, f"has {len(data)} bytes, at most {MAX_BYTES} are possible")
    return data


def decode(cls: type[R], data: bytes, where: str) -> R:
    """The record in `data`. Raises BadInput; `where` is what it calls the record ("vcpu[3]")."""
    if len(data) > MAX_BYTES:
        raise BadInput(where, f"has {len(data)} bytes, at most {MAX_BYTES} are possible")
    value = _parse(data, where)
    kind = _kinds[cls]
    try:
        envelope = _envelope(value)
        if envelope.record != kind.name:
            raise _Mismatch(f'holds the record {_quoted(envelope.record)}, not "{kind.name}"')
        fields = _current(kind, envelope)
        result: R = _schema.of(cls).decode(fields)
    except _Mismatch as mismatch:
        raise BadInput(where + mismatch.path, mismatch.problem, mismatch.advice) from None
    return result


# ------------------------------------------------------------------------------------------------------- JSON


class _Doubled(NamedTuple):
    """Stands for an object that names a field twice: whoever meets it knows where it is."""

    name: str


def _object(pairs: list[tuple[str, object]]) -> object:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen = set()
        for name, _ in pairs:
            if name in seen:
                return _Doubled(name)
            seen.add(name)
    return fields


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


_decoder: Any = None


def _parse(data: bytes, where: str) -> object:
    global _decoder
    if _decoder is None:
        import json

        _decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_number)
    try:
        # json.loads() would guess at UTF-16 and UTF-32 too.
        return _decoder.decode(data.decode("utf-8"))
    except RecursionError:
        raise BadInput(where, "is nested too deeply") from None
    except ValueError as error:  # among them UnicodeDecodeError, and an int of more digits than Python converts
        raise BadInput(where, f"is not JSON: {error}") from None


class _Envelope(NamedTuple):
    record: str
    version: U32
    fields: object


_ENVELOPE = frozenset(_Envelope._fields)


def _envelope(value: object) -> _Envelope:
    fields = _fields(value, _ENVELOPE)
    name, version = fields["record"], fields["version"]
    if type(name) is not str:
        raise _Mismatch(_must_be("text", name), ".record")
    if type(version) is not int or not 1 <= version < 1 << 32:
        raise _Mismatch(_must_be("a number of 32 bits, from 1", version), ".version")
    return _Envelope(name, version, fields["fields"])


def _current(kind: _Kind, envelope: _Envelope) -> object:
    """The fields as the current version has them."""
    if envelope.version == kind.version:
        return envelope.fields
    version = f"version {envelope.version} of this record"
    if envelope.version > kind.version:
        raise _Mismatch(f"{version} is newer than this pyhv reads ({kind.version})", advice="use a newer pyhv")
    if kind.upgrade is None:
        raise _Mismatch(f"{version} is older than this pyhv reads ({kind.version})", advice="use an older pyhv")
    if type(envelope.fields) is not dict:
        raise _Mismatch(_must_be("an object", envelope.fields))
    try:
        return kind.upgrade(envelope.fields, envelope.version)
    except (LookupError, TypeError, ValueError, AttributeError):
        raise _Mismatch(f"is not what {version} must be") from None


# ----------------------------------------------------------------------------------- types and what they become


class _Mismatch(Exception):
    """A value is not what its annotation says. The path grows on the way out, so that nothing is spent on it before."""

    def __init__(self, problem: str, path: str = "", advice: str = "") -> None:
        self.problem = problem
        self.path = path
        self.advice = advice
        super().__init__(problem)


def _must_be(expected: str, found: object) -> str:
    return f"must be {expected}, is {_show(found)}"


def _show(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return f"{value:#x}" if value.bit_length() <= 128 else f"a number of {value.bit_length()} bits"
    names: dict[type, str] = {
        float: "a fraction", str: "text", bytes: "bytes", list: "a list", dict: "an object", _Doubled: "an object",
    }
    return names.get(type(value), type(value).__name__)


class _Converter(NamedTuple):
    """Python's value to JSON's, and back. Both raise _Mismatch."""

    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]
    numbers: range | None = None
    """Of an int: what it may be. Such values are the same on both sides, and are checked many at a time."""


def _number(bits: Bits) -> _Converter:
    numbers = range(-1 << bits.width - 1, 1 << bits.width - 1) if bits.signed else range(1 << bits.width)
    expected = f"a {'signed ' if bits.signed else ''}number of {bits.width} bits"

    def check(value: object) -> object:
        if type(value) is int and value in numbers:
            return value
        raise _Mismatch(_must_be(expected, value))

    return _Converter(check, check, numbers)


def _are_numbers(values: Iterable[Any], numbers: range) -> bool:
    """Whether all are ints of the range. A vCPU has hundreds: here they cost no call each."""
    low, end = numbers.start, numbers.stop
    for value in values:  # noqa: SIM110 (all() over a generator takes half as long again)
        if type(value) is not int or not low <= value < end:
            return False
    return True


def _boolean(value: object) -> object:
    if type(value) is not bool:
        raise _Mismatch(_must_be("true or false", value))
    return value


def _text(value: object) -> object:
    if type(value) is not str:
        raise _Mismatch(_must_be("text", value))
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:  # half of a surrogate pair: JSON can write it, nothing can print it
            raise _Mismatch("must be text, has a character that Unicode does not") from None
    return value


def _bytes_to_hex(value: object) -> object:
    if type(value) is not bytes:
        raise _Mismatch(_must_be("bytes", value))
    return value.hex()


def _bytes_from_hex(value: object) -> object:
    if type(value) is not str:
        raise _Mismatch(_must_be("bytes as hexadecimal text", value))
    try:
        data = bytes.fromhex(value)
    except ValueError:
        data = b""
    if len(data) * 2 != len(value):  # no hexadecimal text, or with blanks, which fromhex() passes over
        raise _Mismatch("must be bytes as hexadecimal text, two digits each")
    return data


_SCALARS = {
    bool: _Converter(_boolean, _boolean),
    str: _Converter(_text, _text),
    bytes: _Converter(_bytes_to_hex, _bytes_from_hex),
}


def _limited(inner: _Converter, length: Length) -> _Converter:
    def check(size: int) -> None:
        if not length.least <= size <= length.most:
            span = f"{length.least}" if length.least == length.most else f"{length.least} to {length.most}"
            raise _Mismatch(f"must be {span} long, is {size}")

    def encode(value: Any) -> object:
        encoded = inner.encode(value)  # which checks that it has a length
        check(len(value))
        return encoded

    def decode(value: Any) -> object:
        decoded = inner.decode(value)
        check(len(decoded))
        return decoded

    return _Converter(encode, decode)


def _optional(inner: _Converter) -> _Converter:
    return _Converter(
        lambda value: None if value is None else inner.encode(value),
        lambda value: None if value is None else inner.decode(value),
    )


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise _Mismatch(_must_be("a list", value))
    return value


def _sequence(inner: _Converter) -> _Converter:
    """tuple[X, ...]"""

    def through(convert: Callable[[Any], Any], values: Sequence[Any]) -> Sequence[Any]:
        if inner.numbers is not None and _are_numbers(values, inner.numbers):
            return values
        done: list[Any] = []
        try:
            for item in values:
                done.append(convert(item))
        except _Mismatch as mismatch:
            mismatch.path = f"[{len(done)}]{mismatch.path}"
            raise
        return done

    def encode(value: Any) -> object:
        if type(value) is not tuple:
            raise _Mismatch(_must_be("a tuple", value))
        return through(inner.encode, value)

    return _Converter(encode, lambda value: tuple(through(inner.decode, _list(value))))


def _row(converts: list[Callable[[Any], Any]], ranges: list[range | None], labels: list[str]) -> Callable[[Any], Any]:
    """A function from a list of as many items to the list of what they become. labels: their names in a path."""
    alike: dict[range, list[int]] = {}
    for index, numbers in enumerate(ranges):
        if numbers is not None:
            alike.setdefault(numbers, []).append(index)
    groups = [(numbers, operator.itemgetter(*indices)) for numbers, indices in alike.items() if len(indices) > 1]
    single = [i for i, numbers in enumerate(ranges) if numbers is None or len(alike[numbers]) == 1]

    def run(values: list[Any]) -> list[Any]:
        indices: Iterable[int] = single
        for numbers, pick in groups:
            if not _are_numbers(pick(values), numbers):
                indices = range(len(values))  # one of them is wrong: which?
        try:
            for index in indices:
                values[index] = converts[index](values[index])
        except _Mismatch as mismatch:
            mismatch.path = labels[index] + mismatch.path
            raise
        return values

    return run


def _fixed_sequence(inner: Sequence[_Converter]) -> _Converter:
    """tuple[X, Y]"""
    ranges, labels = [converter.numbers for converter in inner], [f"[{i}]" for i in range(len(inner))]
    encode_row = _row([converter.encode for converter in inner], ranges, labels)
    decode_row = _row([converter.decode for converter in inner], ranges, labels)

    def check(size: int) -> None:
        if size != len(inner):
            raise _Mismatch(f"must be {len(inner)} long, is {size}")

    def encode(value: Any) -> object:
        if type(value) is not tuple:
            raise _Mismatch(_must_be("a tuple", value))
        check(len(value))
        return encode_row(list(value))

    def decode(value: Any) -> object:
        check(len(_list(value)))
        return tuple(decode_row(value))

    return _Converter(encode, decode)


def _mapping(keys: _Converter, values: _Converter) -> _Converter:
    """dict[int, int]"""
    if keys.numbers is None or values.numbers is None:
        raise TypeError("a dict in a record must be of ints")
    key_numbers, value_numbers = keys.numbers, values.numbers

    def encode(value: Any) -> object:
        if type(value) is not dict:
            raise _Mismatch(_must_be("a dict", value))
        if not (_are_numbers(value, key_numbers) and _are_numbers(value.values(), value_numbers)):
            for key, item in value.items():
                _at(f"[{_show(key)}]", keys.encode, key)
                _at(f"[{_show(key)}]", values.encode, item)
        return sorted(map(list, value.items()))

    def decode(value: Any) -> object:
        _list(value)
        for index, item in enumerate(value):
            if type(item) is not list or len(item) != 2:
                raise _Mismatch("must be a pair of key and value", f"[{index}]")
        indices, items = [pair[0] for pair in value], [pair[1] for pair in value]
        if not (_are_numbers(indices, key_numbers) and _are_numbers(items, value_numbers)):
            for index, (key, item) in enumerate(value):
                _at(f"[{index}]", keys.decode, key)
                _at(f"[{_show(key)}]", values.decode, item)
        if not all(map(operator.lt, indices, indices[1:])):
            raise _Mismatch("must have each key once, in ascending order")
        return dict(zip(indices, items, strict=True))

    return _Converter(encode, decode)


def _at(path: str, convert: Callable[[Any], Any], value: object) -> None:
    try:
        convert(value)
    except _Mismatch as mismatch:
        mismatch.path = path + mismatch.path
        raise


def _named_tuple(cls: Any, inner: Sequence[_Converter]) -> _Converter:
    ranges, labels = [converter.numbers for converter in inner], [f".{name}" for name in cls._fields]
    encode_row = _row([converter.encode for converter in inner], ranges, labels)
    decode_row = _row([converter.decode for converter in inner], ranges, labels)
    names = frozenset(cls._fields)

    def encode(value: Any) -> object:
        if type(value) is not cls:
            raise _Mismatch(_must_be(cls.__name__, value))
        return dict(zip(cls._fields, encode_row(list(value)), strict=True))

    def decode(value: object) -> object:
        fields = _fields(value, names)
        return cls._make(decode_row([fields[name] for name in cls._fields]))

    return _Converter(encode, decode)


def _fields(value: object, names: frozenset[str]) -> dict[str, Any]:
    """A JSON object that has exactly these fields."""
    if type(value) is _Doubled:
        raise _Mismatch(f"has the field {_quoted(value.name)} twice")
    if type(value) is not dict:
        raise _Mismatch(_must_be("an object", value))
    if value.keys() != names:
        if names - value.keys():
            raise _Mismatch(f"lacks the field {_quoted(min(names - value.keys()))}")
        raise _Mismatch(f"has the unknown field {_quoted(min(value.keys() - names))}")
    return value


def _quoted(name: str) -> str:
    """A stranger's text in an error: one short line of ASCII."""
    return '"' + ascii(name[:40])[1:-1] + '"'


_schema = Schema(
    number=_number,
    scalars=_SCALARS,
    sequence=_sequence,
    fixed=_fixed_sequence,
    mapping=_mapping,
    named_tuple=_named_tuple,
    optional=_optional,
    limited=_limited,
)
