"""What callers from Python give, checked where it comes in: a wrong value has one clear line, and leaves nothing."""

from __future__ import annotations

import os

from pyhv.errors import BadInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    StrPath = str | os.PathLike[str]


# What has another form on the command line than --NAME VALUE.
_OTHERWISE = {
    "tls=Tls(certificate, key, authority)": "--tls-cert, --tls-key and --tls-ca",
    "start(force=True), or pyhv": "pyhv",
}


def as_options(text: str) -> str:
    """What an error or a note says of arguments, such as accel="kvm" or overcommit=True, as the command line has it."""
    if "=" not in text:
        return text
    import re

    for argument, option in _OTHERWISE.items():
        text = text.replace(argument, option)
    # No other numbers and words than errors have: a file may be called cpu=3.
    text = re.sub(r'\b(accel|boot|cpu|initrd|intercept|via)="(\w+)"', r"--\1 \2", text)
    return re.sub(r"\bcpus=1\b", "--cpus 1", re.sub(r"\bovercommit=True\b", "--overcommit", text))


def path(name: str, value: object) -> str:
    """A path that was given as text or as a pathlib.Path, which is a file's even where the same text is the name of a
    bundled guest or a profile. Raises BadInput."""
    try:
        found = os.fsdecode(value)  # type: ignore[arg-type]
    except TypeError:
        raise BadInput(f"{name} {value!r}", "is no path", "give a str or a pathlib.Path") from None
    if "\0" in found:
        raise BadInput(f"{name} {value!r}", "has a NUL character in it", "no file has such a name")
    return found if "/" in found or isinstance(value, str) else f"./{found}"


def text(name: str, value: object) -> str:
    """Raises BadInput for what is no str."""
    if not isinstance(value, str):
        raise BadInput(f"{name} {value!r}", "is no str", f"give a str, not {type(value).__name__}")
    return value


def number(name: str, value: object) -> int:
    """Raises BadInput for what is no int."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise BadInput(f"{name} {value!r}", "is no int", f"give an int, not {type(value).__name__}")
    return value


def size(text: str) -> int:
    """Bytes, for a number of digits with or without a part behind the point, and a unit: K, M, G and T are powers of
    1024, also as KiB, MiB ...; those of 1000 are kB, MB ... The one rule for all sizes and rates. Raises ValueError."""
    number = text.rstrip("bBiIkKmMgGtT")
    suffix = text[len(number) :].lower()
    power = "kmgt".find(suffix[:1]) + 1 if suffix else 0
    if suffix and (not power or suffix[1:] not in ("", "b", "ib")):
        raise ValueError("is not a size")
    unit: int = (1000 if suffix[1:] == "b" else 1024) ** power
    number, e, exponent = number.lower().partition("e")  # bytes a second may be given as 1e8
    whole, dot, part = number.partition(".")
    digits = [whole, *([part] if dot else []), *([exponent] if e else [])]
    if not all(some.isascii() and some.isdigit() for some in digits) or len(exponent) > 2:
        raise ValueError("is not a size")
    unit *= 10 ** int(exponent or 0)
    return int(whole[:32]) * unit + (int(part[:32]) * unit // 10 ** len(part[:32]) if dot else 0)


def flag(name: str, value: object) -> None:
    """Raises BadInput for what is no bool: "no" and "false" would count as true."""
    if not isinstance(value, bool):
        raise BadInput(f"{name} {value!r}", "is no bool", f"give True or False, not {type(value).__name__}")


def choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises BadInput for what is none of the choices."""
    if value not in choices:
        raise BadInput(f"{name} {value!r}", "is unknown", f"choose one of {', '.join(choices)}")


def callback(name: str, value: object) -> None:
    """Raises BadInput for what is neither None nor can be called."""
    if value is not None and not callable(value):
        raise BadInput(f"{name} {value!r}", "cannot be called", "give a function, or None")


def is_number(value: object) -> bool:
    """Whether it is an int or a float that can be reckoned with: no bool, and no int that no float can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return not isinstance(value, int) or value.bit_length() <= 1023


def timeout(value: object) -> None:
    """Raises BadInput for what is no time to wait for: a number of seconds, or None."""
    if value is None:
        return
    # Not a number is in no order with 0 either.
    if not is_number(value) or not value >= 0:  # type: ignore[operator]
        raise BadInput(f"timeout {value}", "is no number of seconds from 0 on", "give None to wait without end")


def descriptor(name: str, value: object, writing: bool) -> None:
    """Raises BadInput for what is no open descriptor that can be read or written."""
    found = number(name, value)
    try:
        os.fstat(found)
    except (OSError, OverflowError):
        raise BadInput(f"{name} {found}", "is no open descriptor") from None
    if found <= 2:
        return  # a program is given these, and a terminal is open both ways
    import fcntl

    mode = fcntl.fcntl(found, fcntl.F_GETFL)
    if mode & os.O_PATH or mode & os.O_ACCMODE == (os.O_RDONLY if writing else os.O_WRONLY):
        raise BadInput(f"{name} {found}", f"is not open for {'writing' if writing else 'reading'}")
