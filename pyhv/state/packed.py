"""Records as packed bytes and back: what a migration sends while a guest stands and waits for it.

The same annotations as in codec.py, but for dicts and what may be None, in a fifth of the time. There are no names in
the bytes and no version, so that both sides must have the same records: the migration's handshake sees to that.

    U8 ... U64, S64                 little-endian
    bool                            a byte, 0 or 1 (any other is read as 1)
    str, bytes                      the number of bytes, a U32, then these; text is UTF-8
    tuple[X, ...]                   the number of items, a U32, then these
    tuple[X, Y], a NamedTuple       the fields one after the other

decode() believes nothing, as codec.py's does not: whatever does not fit is BadInput that names the field.
"""

from __future__ import annotations

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


def _scalar(code: str) -> _Packer:
    format = struct.Struct("<" + code)
    return _Packer(
        lambda value, out: out.append(format.pack(value)),
        lambda source: format.unpack(source.take(format.size))[0],
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
    bool: _scalar("?"),
    bytes: _Packer(_put, lambda source: source.take(source.count())),
    str: _Packer(lambda value, out: _put(value.encode(), out), _take_text),
}


def _fixed_sequence(inner: Sequence[_Packer]) -> _Packer:
    """tuple[X, Y]"""
    return _fields(inner, [f"[{i}]" for i in range(len(inner))], tuple)


def _named_tuple(cls: Any, inner: Sequence[_Packer]) -> _Packer:
    return _fields(inner, [f".{name}" for name in cls._fields], cls._make)


def _fields(inner: Sequence[_Packer], names: Sequence[str], make: Callable[[Iterable[Any]], Any]) -> _Packer:
    """Fields one after the other; names: their part of the path."""
    def pack(value: Any, out: list[bytes]) -> None:
        for packer, field in zip(inner, value, strict=True):
            packer.pack(field, out)

    def unpack(source: _Source) -> Any:
        values: list[Any] = []
        try:
            for packer in inner:
                values.append(packer.unpack(source))
        except _Wrong as wrong:
            wrong.path = names[len(values)] + wrong.path
            raise
        return make(values)

    return _Packer(pack, unpack)


def _sequence(inner: _Packer) -> _Packer:
    """tuple[X, ...]"""

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


def _limited(inner: _Packer, length: Length) -> _Packer:
    def check(value: Any) -> Any:
        if not length.least <= len(value) <= length.most:
            raise _Wrong(f"must be {length.least} to {length.most} long, is {len(value)}")
        return value

    return _Packer(
        lambda value, out: inner.pack(check(value), out),
        lambda source: check(inner.unpack(source)),
    )


def _impossible(*inner: _Packer) -> _Packer:
    raise TypeError("no dict and no None is packed")


_schema = Schema(
    number=lambda bits: _scalar(_CODES[bits]),
    scalars=_SCALARS,
    sequence=_sequence,
    fixed=_fixed_sequence,
    mapping=_impossible,
    named_tuple=_named_tuple,
    optional=_impossible,
    limited=_limited,
)
