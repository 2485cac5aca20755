"""pyhv.light beside typing and enum: whatever the one gives or refuses, the other does."""

from __future__ import annotations

import copy
import enum
import pickle
import subprocess
import sys
import typing
from collections.abc import Callable
from typing import Any

import pytest

from pyhv.light import IntEnum, NamedTuple


class Point(NamedTuple):
    """Two fields, and one with a default."""

    x: int
    y: int
    name: str = "origin"

    @property
    def sum(self) -> int:
        return self.x + self.y


class Model(typing.NamedTuple):
    """The same."""

    x: int
    y: int
    name: str = "origin"

    @property
    def sum(self) -> int:
        return self.x + self.y


class Colour(IntEnum):
    """Two numbers."""

    RED = 1
    BLUE = 5


class ModelColour(enum.IntEnum):
    """The same."""

    RED = 1
    BLUE = 5


def of(kind: Any, make: Callable[[Any], Any]) -> object:
    """What `make` gives of a class, or the kind of its error."""
    try:
        result = make(kind)
    except (TypeError, ValueError, AttributeError) as error:
        return AttributeError if isinstance(error, AttributeError) else TypeError  # typing has both for a bad field
    return tuple(result) if isinstance(result, tuple) else result


def matched(value: Any) -> object:
    match value:
        case Point(x, y) | Model(x, y) if x == 0:
            return y
        case Point(1, y, name=name) | Model(1, y, name=name):
            return y, name
        case _:
            return None


@pytest.mark.parametrize(
    "make",
    [
        lambda kind: kind(1, 2),
        lambda kind: kind(1, 2, "a"),
        lambda kind: kind(1, y=2),
        lambda kind: kind(name="a", y=2, x=1),
        lambda kind: kind(1),
        lambda kind: kind(),
        lambda kind: kind(1, 2, "a", 4),
        lambda kind: kind(1, 2, x=3),
        lambda kind: kind(1, 2, z=3),
        lambda kind: kind(1, 2, "a", z=3),
        lambda kind: kind._make([1, 2, "a"]),
        lambda kind: kind._make(iter("abc")),
        lambda kind: kind._make("abcd"),
        lambda kind: kind(1, 2)._replace(y=5),
        lambda kind: kind(1, 2)._replace(),
        lambda kind: kind(1, 2)._replace(z=5),
        lambda kind: kind(1, 2)._asdict(),
        lambda kind: (kind(1, 2).x, kind(1, 2).name, kind(1, 2).sum),
        lambda kind: kind(1, 2) == (1, 2, "origin"),
        lambda kind: hash(kind(1, 2)),
        lambda kind: kind(1, 2) < kind(1, 3),
        lambda kind: setattr(kind(1, 2), "x", 3),
        lambda kind: setattr(kind(1, 2), "other", 3),
        lambda kind: kind._fields,
        lambda kind: kind.__match_args__,
        lambda kind: matched(kind(1, 2, "a")),
        lambda kind: kind._field_defaults,
        lambda kind: kind.__mro__[-2:],
        lambda kind: repr(kind(1, "2")).partition("(")[2],
        lambda kind: copy.deepcopy(kind(1, [2])),
        lambda kind: pickle.loads(pickle.dumps(kind(1, 2))),
        lambda kind: typing.get_type_hints(kind),
    ],
)
def test_it_does_what_typing_does(make: Callable[[Any], Any]) -> None:
    assert of(Point, make) == of(Model, make)


@pytest.mark.parametrize(
    "make",
    [
        lambda kind: kind.BLUE == 5 and isinstance(kind.BLUE, int) and isinstance(kind.BLUE, kind),
        lambda kind: kind(5) is kind.BLUE,
        lambda kind: kind(2),
        lambda kind: kind("RED"),
        lambda kind: kind.GREEN,
        lambda kind: [(member.name, int(member)) for member in kind],
        lambda kind: {kind.RED: 1}[1],
        lambda kind: (str(kind.RED), f"{kind.RED}", f"{kind.RED:#x}", repr(kind.RED).partition(".")[2]),
        lambda kind: pickle.loads(pickle.dumps(kind.RED)) is kind.RED,
        lambda kind: copy.deepcopy(kind.RED) is kind.RED,
    ],
)
def test_numbers_are_as_enum_has_them(make: Callable[[Any], Any]) -> None:
    assert of(Colour, make) == of(ModelColour, make)


def test_errors_name_the_fields() -> None:
    with pytest.raises(TypeError, match="Point needs y"):
        Point(1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="Point: z: given twice, or there is no such field"):
        Point(1, 2)._replace(z=3)  # type: ignore[call-arg]


def test_a_start_of_pyhv_imports_nothing_that_is_slow() -> None:
    code = "import pyhv.cli.run, pyhv.machine, pyhv.accel.kvm, pyhv.boot.linux, pyhv.boot.pc; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"],
                          capture_output=True, text=True, check=True, timeout=60)  # fmt: skip
    slow = (
        "typing re enum signal array collections.abc importlib dataclasses inspect pathlib tempfile json tomllib "
        "subprocess logging argparse difflib ast"
    )
    assert set(slow.split()) & set(done.stdout.split()) == set()


def test_what_newer_pythons_note_in_a_class_is_no_member() -> None:
    """Python 3.13 puts an int there."""
    made: Any = type(IntEnum)("Made", (IntEnum,), {"__firstlineno__": 12, "ONE": 1})
    assert list(made) == [1] and made(1).name == "ONE"
    with pytest.raises(ValueError, match="12 is not a valid Made"):
        made(12)
