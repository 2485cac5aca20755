"""Records as packed bytes and back: what a migration sends while a guest stands and waits for it.

The same records as in codec.py, by the same annotations, in a fifth of the time. There are no names in the bytes and no
version, so that both sides must have the same records: the migration's handshake sees to that.

    U8 ... U64, S64                 little-endian
    bool                            a byte, 0 or 1 (any other is read as 1)
    str, bytes                      the number of bytes, a U32, then these; text is UTF-8
    tuple[X, ...], dict             the number of items, a U32, then these; a dict's keys ascend
    tuple[X, Y], a NamedTuple       the fields one after the other
    X | None                        a byte, 0 or 1: whether there is one, then it

decode() believes nothing, as codec.py's does not: whatever does not fit is BadInput that names the field.
"""

from __future__ import annotations

import itertools
import operator
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from pyhv.errors import BadInput
from pyhv.state import codec
from pyhv.state.schema import Bits, Length, Schema

R = TypeVar("R", bound=tuple[Any, ...])

_CODES = {Bits(8): "B", Bits(16): "H", Bits(32): "I", Bits(64): "Q", Bits(64, signed=True): "q"}
_COUNT = struct.Struct("<I")


def prepare(classes: Iterable[type[tuple[Any, ...]]]) -> None:
    """Does for these records what else their first encode() or decode() does."""
    for cls in classes:
        _schema.of(cls)


def encode(value: tuple[Any, ...]) -> bytes:
    """The record as bytes. Raises BadInput about the field that does not fit its annotation."""
    pieces: list[bytes] = []
    try:
        _schema.of(type(value)).pack(value, pieces)
        return b"".join(pieces)
    except (struct.error, TypeError, ValueError, _Wrong):
        codec.encode(value)  # which knows what is wrong
        raise


def decode(cls: type[R], data: bytes, where: str) -> R:
    """The record in `data`. Raises BadInput; `where` is what it calls the record."""
    source = _Source(data)
    try:
        result: R = _schema.of(cls).unpack(source)
        if source.at != len(data):
            raise _Wrong(f"has {len(data) - source.at} bytes too many")
    except _Wrong as wrong:
        raise BadInput(where + wrong.path, wrong.problem) from None
    return result


class _Wrong(Exception):
    """Bytes are not what the annotation says. The path grows on the way out."""

    def __init__(self, problem: str) -> None:
        self.problem = problem
        self.path = ""
        super().__init__(problem)


class _Source:
    """Bytes, and how many of them have been looked at."""

    __slots__ = ("at", "data")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, size: int) -> bytes:
        piece = self.data[self.at : self.at + size]
        if len(piece) != size:
            raise _Wrong(f"is cut short: {size} bytes should come, there are {len(piece)}")
        self.at += size
        return piece

    def count(self) -> int:
        return int(_COUNT.unpack(self.take(4))[0])


class _Packer(NamedTuple):
    """One annotation's two ways."""

    pack: Callable[[Any, list[bytes]], None]
    unpack: Callable[[_Source], Any]
    row: _Row | None = None
    """How it goes as part of one that is of numbers only."""


class _Row(NamedTuple):
    """A value that always has the same numbers, as a run of them."""

    codes: str
    """Of struct, a character each."""
    spread: Callable[[Any], Sequence[Any]]
    gather: Callable[[Sequence[Any]], Any]


def _only(value: Any) -> Sequence[Any]:
    return (value,)


def _same(value: Any) -> Sequence[Any]:
    return value  # type: ignore[no-any-return]


_one = operator.itemgetter(0)


def _number(bits: Bits) -> _Packer:
    return _of_row(_Row(_CODES[bits], _only, _one))


def _of_row(row: _Row) -> _Packer:
    format = struct.Struct("<" + row.codes)
    return _Packer(
        lambda value, out: out.append(format.pack(*row.spread(value))),
        lambda source: row.gather(format.unpack(source.take(format.size))),
        row,
    )


def _put(data: bytes, out: list[bytes]) -> None:
    out.append(_COUNT.pack(len(data)))
    out.append(data)


def _take_text(source: _Source) -> str:
    try:
        return source.take(source.count()).decode()
    except UnicodeDecodeError:
        raise _Wrong("is no text") from None


_SCALARS = {
    bool: _of_row(_Row("?", _only, _one)),
    bytes: _Packer(_put, lambda source: source.take(source.count())),
    str: _Packer(lambda value, out: _put(value.encode(), out), _take_text),
}


def _fixed_sequence(inner: Sequence[_Packer]) -> _Packer:
    """tuple[X, Y]"""
    return _fields(inner, [str(i) for i in range(len(inner))], tuple)


def _named_tuple(cls: Any, inner: Sequence[_Packer]) -> _Packer:
    return _fields(inner, cls._fields, cls._make)


def _fields(inner: Sequence[_Packer], names: Sequence[str], make: Callable[[Iterable[Any]], Any]) -> _Packer:
    """Fields one after the other. Neighbours that are numbers are packed in one step."""
    if all(packer.row is not None for packer in inner):
        return _of_row(_joined([packer.row for packer in inner if packer.row], make))
    groups: list[tuple[slice, str, _Packer]] = []
    for is_row, indices in itertools.groupby(range(len(inner)), lambda index: inner[index].row is not None):
        run = list(indices)
        if is_row:
            row = _joined([packer.row for packer in inner[run[0] : run[-1] + 1] if packer.row], tuple)
            groups.append((slice(run[0], run[-1] + 1), names[run[0]], _of_row(row)))
        else:
            groups += [(slice(index, index + 1), names[index], _alone(inner[index])) for index in run]

    def pack(value: Any, out: list[bytes]) -> None:
        if len(value) != len(inner):
            raise ValueError
        for where, _, packer in groups:
            packer.pack(value[where], out)

    def unpack(source: _Source) -> Any:
        values: list[Any] = []
        for _, name, packer in groups:
            try:
                values += packer.unpack(source)
            except _Wrong as wrong:
                wrong.path = f".{name}{wrong.path}"
                raise
        return make(values)

    return _Packer(pack, unpack)


def _alone(inner: _Packer) -> _Packer:
    """A tuple of one."""
    return _Packer(lambda value, out: inner.pack(value[0], out), lambda source: (inner.unpack(source),))


def _joined(rows: Sequence[_Row], make: Callable[[Iterable[Any]], Any]) -> _Row:
    codes = "".join(row.codes for row in rows)
    if all(row.gather is _one for row in rows):
        return _Row(codes, _same, make)
    # Neighbours that are one number each go through as they are.
    parts: list[tuple[_Row | None, slice, slice]] = []
    field = at = 0
    for alone, group in itertools.groupby(rows, lambda row: row.gather is _one):
        for run in [list(group)] if alone else [[row] for row in group]:
            width = sum(len(row.codes) for row in run)
            parts.append((None if alone else run[0], slice(field, field + len(run)), slice(at, at + width)))
            field, at = field + len(run), at + width

    def spread(value: Any) -> Sequence[Any]:
        if len(value) != field:
            raise ValueError
        numbers: list[Any] = []
        for row, where, _ in parts:
            numbers += value[where] if row is None else row.spread(value[where][0])
        return numbers

    def gather(numbers: Sequence[Any]) -> Any:
        values: list[Any] = []
        for row, _, where in parts:
            if row is None:
                values += numbers[where]
            else:
                values.append(row.gather(numbers[where]))
        return make(values)

    return _Row(codes, spread, gather)


def _sequence(inner: _Packer) -> _Packer:
    """tuple[X, ...]"""
    if inner.row is not None:
        return _rows(inner.row, lambda values: values, tuple)

    def pack(value: Any, out: list[bytes]) -> None:
        out.append(_COUNT.pack(len(value)))
        for item in value:
            inner.pack(item, out)

    def unpack(source: _Source) -> Any:
        done: list[Any] = []
        try:
            for _ in range(source.count()):
                done.append(inner.unpack(source))
        except _Wrong as wrong:
            wrong.path = f"[{len(done)}]{wrong.path}"
            raise
        return tuple(done)

    return _Packer(pack, unpack)


def _rows(
    row: _Row, items: Callable[[Any], Iterable[Any]], make: Callable[[Iterable[Any]], Any]
) -> _Packer:
    """Any number of values that are rows: all packed in one step. items: of the whole; make: the whole, of items."""
    width, size = len(row.codes), struct.calcsize("<" + row.codes)

    def pack(value: Any, out: list[bytes]) -> None:
        each = items(value)
        if row.gather is not _one:
            each = itertools.chain.from_iterable(each if row.spread is _same else map(row.spread, each))
        numbers = list(each)
        count = len(numbers) // width
        out.append(struct.pack(f"<I{row.codes * count}", count, *numbers))

    def unpack(source: _Source) -> Any:
        count = source.count()
        data = source.take(count * size)
        if row.gather is _one:
            return make(struct.unpack(f"<{count}{row.codes}", data))
        found = struct.iter_unpack("<" + row.codes, data)
        return make(found if row.gather is tuple else map(row.gather, found))

    return _Packer(pack, unpack)


def _mapping(keys: _Packer, values: _Packer) -> _Packer:
    """dict[int, int]"""
    pair = _fixed_sequence((keys, values))
    if pair.row is None or len(pair.row.codes) != 2:
        raise TypeError("a dict in a record must be of ints")

    def make(items: Iterable[Any]) -> dict[int, int]:
        pairs = list(items)
        result = dict(pairs)
        if len(result) != len(pairs) or list(result) != sorted(result):
            raise _Wrong("must have each key once, in ascending order")
        return result

    return _rows(pair.row, lambda value: sorted(value.items()), make)


def _optional(inner: _Packer) -> _Packer:
    def pack(value: Any, out: list[bytes]) -> None:
        out.append(b"\0" if value is None else b"\1")
        if value is not None:
            inner.pack(value, out)

    def unpack(source: _Source) -> Any:
        there = source.take(1)
        if there not in (b"\0", b"\1"):
            raise _Wrong("is neither there nor not")
        return inner.unpack(source) if there == b"\1" else None

    return _Packer(pack, unpack)


def _limited(inner: _Packer, length: Length) -> _Packer:
    def check(value: Any) -> Any:
        if not length.least <= len(value) <= length.most:
            raise _Wrong(f"must be {length.least} to {length.most} long, is {len(value)}")
        return value

    return _Packer(
        lambda value, out: inner.pack(check(value), out),
        lambda source: check(inner.unpack(source)),
    )


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
