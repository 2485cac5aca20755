"""NamedTuple as typing has it and IntEnum as enum has it, without what those cost: 15 ms at every start.

typing imports half of the standard library, and each of its named tuples is compiled from text when its class is made;
enum does much for each class that this one does not need. For mypy they are what they stand for.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from enum import IntEnum as IntEnum
    from typing import NamedTuple as NamedTuple
else:
    from operator import itemgetter

    class _TupleType(type):
        """Makes fields of a class's annotations, and defaults of what stands beside them."""

        def __new__(cls, name, bases, space):
            fields = tuple(space.get("__annotations__", ()))
            space["_field_defaults"] = {field: space.pop(field) for field in fields if field in space}
            space.update({field: property(itemgetter(index)) for index, field in enumerate(fields)})
            extra = {"__slots__": (), "_fields": fields, "__match_args__": fields}
            return super().__new__(cls, name, bases, {**space, **extra})

    class NamedTuple(tuple, metaclass=_TupleType):
        """A tuple whose items have names. A subclass annotates each of them; it cannot be derived from in turn."""

        def __new__(cls, *values, **named):
            if named or len(values) != len(cls._fields):
                values = cls._complete(values, named)
            return tuple.__new__(cls, values)

        @classmethod
        def _complete(cls, values, named):
            """All the values: those given by place, those given by name, and defaults. Raises TypeError."""
            given = dict(zip(cls._fields, values, strict=False))
            if len(values) > len(cls._fields):
                raise TypeError(f"{cls.__name__} has {len(cls._fields)} fields, and {len(values)} values were given")
            if wrong := [name for name in named if name in given or name not in cls._fields]:
                raise TypeError(f"{cls.__name__}: {', '.join(wrong)}: given twice, or there is no such field")
            given = {**cls._field_defaults, **given, **named}
            if missing := [name for name in cls._fields if name not in given]:
                raise TypeError(f"{cls.__name__} needs {', '.join(missing)}")
            return [given[name] for name in cls._fields]

        @classmethod
        def _make(cls, values):
            """One of all its values. Raises TypeError for another number of them."""
            made = tuple.__new__(cls, values)
            if len(made) != len(cls._fields):
                raise TypeError(f"{cls.__name__} has {len(cls._fields)} fields, and {len(made)} values were given")
            return made

        def _replace(self, **changes):
            """One with other values for these fields. Raises TypeError where there is no such field."""
            return type(self)(**{**self._asdict(), **changes})

        def _asdict(self):
            return dict(zip(self._fields, self, strict=True))

        def __repr__(self):
            return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._asdict().items())})"

        def __getnewargs__(self):  # for copy and pickle
            return tuple(self)

    class _EnumType(type):
        """Makes members of a class's numbers. Calling it looks one up, and iterating gives all of them."""

        def __new__(cls, name, bases, space):
            # Not __firstlineno__, which Python 3.13 puts there.
            numbers = {key: value for key, value in space.items() if type(value) is int and key[:2] != "__"}
            made = super().__new__(cls, name, bases, {key: space[key] for key in space if key not in numbers})
            made._members = {}
            for key, number in numbers.items():
                member = made._members[number] = int.__new__(made, number)
                member.name = key
                setattr(made, key, member)
            return made

        def __call__(cls, number):
            member = cls._members.get(number)
            if member is None:
                raise ValueError(f"{number!r} is not a valid {cls.__name__}")
            return member

        def __iter__(cls):
            return iter(cls._members.values())

    class IntEnum(int, metaclass=_EnumType):
        """Numbers that have names, in a class of their own; `name` is each one's."""

        __str__ = int.__repr__

        def __repr__(self):
            return f"<{type(self).__name__}.{self.name}: {int(self)}>"

        def __reduce__(self):  # for copy and pickle
            return type(self), (int(self),)
