"""What a record's annotations may be, and the walk over them that codec.py and packed.py have in common.

    U8, U16, U32, U64, S64          an int of that range; a plain `int` is a U64
    bool, str, bytes
    tuple[X, ...], tuple[X, Y]      of any length; of exactly these
    dict[U32, U64]                  or other ints
    a NamedTuple
    X | None

and Annotated[X, Length(least, most)] limits how long a str, bytes, tuple or dict may be: what C reads by a fixed size
needs one.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Bits(NamedTuple):
    """The range of an int: that of `width` bits."""

    width: int
    signed: bool = False


class Length(NamedTuple):
    """How many characters, bytes or items there may be, both ends included."""

    least: int
    most: int


U8 = Annotated[int, Bits(8)]
U16 = Annotated[int, Bits(16)]
U32 = Annotated[int, Bits(32)]
U64 = Annotated[int, Bits(64)]
S64 = Annotated[int, Bits(64, signed=True)]


class Schema(Generic[T]):
    """Makes a T of each annotation, out of those of its parts. NamedTuples are looked at once."""

    def __init__(
        self,
        *,
        number: Callable[[Bits], T],
        scalars: dict[type, T],
        sequence: Callable[[T], T],
        fixed: Callable[[Sequence[T]], T],
        mapping: Callable[[T, T], T],
        named_tuple: Callable[[Any, Sequence[T]], T],
        optional: Callable[[T], T],
        limited: Callable[[T, Length], T],
    ) -> None:
        """Who makes it: scalars: of bool, str and bytes; sequence: of tuple[X, ...]; fixed: of tuple[X, Y]; mapping: of
        dict[int, int], raising TypeError where these are none; optional: of X | None."""
        self._number, self._scalars = number, scalars
        self._sequence, self._fixed, self._mapping = sequence, fixed, mapping
        self._named_tuple, self._optional, self._limited = named_tuple, optional, limited
        self._known: dict[type, T] = {}

    def of(self, hint: Any) -> T:
        """For an annotation. Raises TypeError for one that is not known, which is a mistake in a record."""
        if isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields"):
            if hint not in self._known:
                hints = typing.get_type_hints(hint, include_extras=True)
                self._known[hint] = self._named_tuple(hint, [self.of(hints[name]) for name in hint._fields])
            return self._known[hint]
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin is Annotated:
            return self._annotated(arguments[0], arguments[1:])
        if origin is tuple and arguments[1:] == (Ellipsis,):
            return self._sequence(self.of(arguments[0]))
        if origin is tuple:
            return self._fixed([self.of(argument) for argument in arguments])
        if origin is dict:
            return self._mapping(self.of(arguments[0]), self.of(arguments[1]))
        if origin in (typing.Union, types.UnionType) and len(arguments) == 2 and arguments[1] is types.NoneType:
            return self._optional(self.of(arguments[0]))
        if hint is int:
            return self._number(Bits(64))
        if hint in self._scalars:
            return self._scalars[hint]
        raise TypeError(f"{hint}: no type of a record's field")

    def _annotated(self, hint: Any, marks: tuple[Any, ...]) -> T:
        for mark in marks:
            if isinstance(mark, Bits) and hint is int:
                return self._number(mark)
            if isinstance(mark, Length):
                return self._limited(self.of(hint), mark)
        raise TypeError(f"{hint}: what is it annotated with? {marks}")
