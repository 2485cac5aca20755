"""Reading a command's options: every mistake is one line with advice, and it costs no start-up time.

argparse would do most of this, but it takes 8 ms to be imported and set up, a fifth of what a whole run may cost.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

from pyhv.errors import BadInput
from pyhv.light import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class Option(NamedTuple):
    """One option or argument of a command."""

    name: str
    """ "--mem" for an option; "IMAGE", in capitals, for an argument."""
    help: str
    value: str = ""
    """What stands for its value in the help, "SIZE"; "" for a switch."""
    default: Any = None
    convert: Callable[[str], Any] = str
    """Makes the value of what was typed; ValueError, with the problem as its text, where that is no value."""
    choices: tuple[str, ...] = ()
    required: bool = True
    """For an argument: whether it must be given."""
    repeated: bool = False
    """Whether it may be given several times: its value is a list then, empty by default. Of the arguments one may be,
    and takes what the others leave."""

    @property
    def attribute(self) -> str:
        return self.name.lstrip("-").lower().replace("-", "_")

    @property
    def shown(self) -> str:
        """With its value, as in the help."""
        value = "|".join(self.choices) or self.value
        return f"{self.name} {value}" if value else self.name


class Command:
    """What a command takes. name: as typed. summary: what it does, in one sentence. details: what else its --help says,
    as it stands, or a function that makes it; an example belongs there. either: options that exclude each other."""

    def __init__(
        self,
        name: str,
        summary: str,
        options: tuple[Option, ...],
        details: str | Callable[[], str],
        either: tuple[str, ...] = (),
    ) -> None:
        self.name = f"pyhv {name}"
        self.arguments = [option for option in options if not option.name.startswith("-")]
        self.options = {option.name: option for option in options if option.name.startswith("-")}
        self._summary = summary
        self._details = details
        self._either = either

    def parse(self, words: list[str]) -> SimpleNamespace:
        """The values of all options and arguments, by Option.attribute: a switch is a bool, what is not given has its
        default. After "--" everything is an argument. Raises BadInput. Prints the help and raises SystemExit where it
        is asked for.
        """
        given: dict[str, Any] = {}
        arguments: list[str] = []
        rest = list(words)
        while rest:
            word = rest.pop(0)
            if word == "--":
                arguments += rest
                break
            if not word.startswith("-") or word == "-":
                arguments.append(word)
                continue
            if word in ("-h", "--help"):
                sys.stdout.write(self.help())
                raise SystemExit(0)
            name, equals, value = word.partition("=")
            option = self.options.get(name)
            if option is None:
                raise self._unknown(name)
            if not (option.value or option.choices):
                if equals:
                    raise BadInput(name, "takes no value", self._advice())
                given[name] = True
                continue
            if not equals:
                if not rest:
                    raise BadInput(name, f"needs a value: {option.shown}", self._advice())
                value = rest.pop(0)
            converted = _convert(option, value)
            given[name] = [*given.get(name, []), converted] if option.repeated else converted
        both = [name for name in self._either if name in given]
        if len(both) > 1:
            raise BadInput(both[1], f"cannot be combined with {both[0]}", self._advice())
        values = {option.attribute: given.get(name, _default(option)) for name, option in self.options.items()}
        return SimpleNamespace(**values, **self._place(arguments))

    def has_switch(self, switch: str, words: list[str]) -> bool:
        """Whether the switch is among the words, which may be wrong otherwise; a value that looks like it is not it."""
        rest = iter(words)
        for word in rest:
            if word == "--":
                break
            if word == switch:
                return True
            option = self.options.get(word)
            if option is not None and (option.value or option.choices):
                next(rest, None)
        return False

    def _place(self, words: list[str]) -> dict[str, str | list[str] | None]:
        """The arguments by name. Raises BadInput where there are too few or too many."""
        single = [argument for argument in self.arguments if not argument.repeated]
        more = len(words) - len(single)
        for argument in single[len(words) :]:
            if argument.required:
                raise BadInput(argument.name, f"{self.name} needs it", self._advice())
        if more > 0 and len(single) == len(self.arguments):
            raise BadInput(words[len(single)], f"{self.name} takes no further argument", self._advice())
        placed: dict[str, str | list[str] | None] = {}
        rest = list(words)
        for argument in self.arguments:
            if argument.repeated:
                placed[argument.attribute] = [rest.pop(0) for _ in range(more)]
            else:
                placed[argument.attribute] = rest.pop(0) if rest else None
        return placed

    def _unknown(self, name: str) -> BadInput:
        import difflib

        known = [*self.options, "--help"]
        argument = name.lstrip("-").upper()
        near = [option for option in known if option.startswith(name)] if len(name) > 3 else []
        if len(near) != 1:
            near = difflib.get_close_matches(name, known, 1, 0.7)
        if argument in [option.name for option in self.arguments]:
            advice = f"it is an argument: {self.name} {argument}"
        else:
            advice = f"did you mean {near[0]}?" if near else self._advice()
        return BadInput(name, f"{self.name} has no such option", advice)

    def _advice(self) -> str:
        return f"see {self.name} --help"

    # -------------------------------------------------------------------------------------------- help

    def help(self) -> str:
        """What --help prints."""
        from pyhv.cli import output

        details = self._details if isinstance(self._details, str) else self._details()
        arguments = [(f"  {argument.name}", argument.help) for argument in self.arguments]
        options = [(f"  {option.shown}", option.help) for option in self.options.values()]
        parts = [
            output.rows([(f"usage: {self.name}", " ".join(self._usage()))], gap=1),
            output.fill(self._summary),
            output.rows([*arguments, *options, ("  -h, --help", "show this and exit")], column=24),
            details.strip("\n"),
        ]
        return "\n\n".join(parts) + "\n"

    def _usage(self) -> list[str]:
        named = [(a.name + "..." * a.repeated, a.required) for a in self.arguments]
        words = [name if required else f"[{name}]" for name, required in named]
        if self._either:
            words.append("[" + " | ".join(self.options[name].shown for name in self._either) + "]")
        return words + [f"[{option.shown}]" for name, option in self.options.items() if name not in self._either]


def _default(option: Option) -> Any:
    if option.repeated:
        return []
    return option.default if option.value or option.choices else False


def _convert(option: Option, text: str) -> Any:
    if option.choices and text not in option.choices:
        raise BadInput(f"{option.name} {text}", "is unknown", f"choose one of {', '.join(option.choices)}")
    try:
        return option.convert(text)
    except ValueError as error:
        raise BadInput(f"{option.name} {text}", str(error)) from None


def number(text: str) -> int:
    """Option.convert: a whole number, decimal."""
    # int() takes 1_0 and digits of other scripts too, and not 5,000 of them.
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) < 100):
        raise ValueError("is not a whole number")
    return int(text)


def processors(text: str) -> tuple[int, ...]:
    """Option.convert: numbers of host processors, such as 0,2,4-7."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        ends = (first, last if dash else first)
        if not all(end.isascii() and end.isdigit() and len(end) < 5 for end in ends) or int(ends[0]) > int(ends[1]):
            raise ValueError("is no list of processors, such as 0,2,4-7")
        found.extend(range(int(ends[0]), int(ends[1]) + 1))
    return tuple(found)


_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}

# Locks cannot wait longer than 292 years.
_LONGEST = 9e9


def seconds(text: str) -> float:
    """Option.convert: a time in seconds, or with a unit (500ms, 5s, 2m, 1h), more than 0 and no longer than a wait can
    be."""
    value = _time(text, "s")
    if not value > 0.0:  # as NaN is not
        raise ValueError("is not a time in seconds, more than 0, such as 5, 5s, 500ms or 2m")
    return value


def time(unit: str) -> Callable[[str], float]:
    """Option.convert: seconds from 0 on, for a number with a unit, or in this one."""

    def convert(text: str) -> float:
        value = _time(text, unit)
        if not value >= 0.0:
            raise ValueError("is not a time that is not negative, such as 20ms or 0.5s")
        return value

    return convert


def _time(text: str, unit: str) -> float:
    """Seconds; NaN for what is no time. Raises ValueError for one that is too long."""
    number = text.rstrip("umsh")
    try:
        value = float(number) * _UNITS[text[len(number) :] or unit]
        if "_" in number or not number.isascii():  # which float() takes
            value = float("nan")
    except (ValueError, KeyError):
        value = float("nan")
    if value > _LONGEST:
        raise ValueError(f"is too long; the most is {_LONGEST:.0f} seconds")
    return value


def rate(text: str) -> float:
    """Option.convert: bytes a second, for 100M, 100MB and the like; see arguments.size()."""
    from pyhv import arguments

    try:
        value = arguments.size(text.removesuffix("/s"))
    except ValueError:
        value = 0
    if not 0 < value < 1e15:
        raise ValueError("is no rate; give bytes a second, such as 100M (of 1024) or 100MB (of 1000)")
    return float(value)


def not_empty(text: str) -> str:
    """Option.convert: anything but nothing."""
    if not text.strip():
        raise ValueError("is empty; name a file")
    return text


def absolute(path: str) -> str:
    """The path for a process with another working directory. Raises BadInput where ours is gone."""
    import os

    try:
        return os.path.abspath(path)
    except FileNotFoundError:
        raise BadInput(path, "the working directory is gone", "give an absolute path") from None
