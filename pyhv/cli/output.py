"""How commands print: rows, lists of names, words bit by bit, JSON."""

from __future__ import annotations

import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any, Self

    from pyhv.cpu.feature_types import Word


def width() -> int:
    """Columns to print in: those of the terminal, at most 100."""
    try:
        return min(os.get_terminal_size(1).columns, 100)
    except OSError:  # no terminal
        return 100


def print_json(value: dict[str, Any]) -> None:
    """Prints what a command with --json prints: one object (docs/json.md)."""
    import json

    print(json.dumps(value, indent=2))


def console(data: bytes) -> dict[str, str]:
    """A guest's output in a JSON object: as text, in which "\\xff" may stand for a byte that is no text or for itself,
    and byte for byte."""
    import binascii

    text = data.decode("utf-8", "backslashreplace")
    return {"console": text, "console_base64": binascii.b2a_base64(data, newline=False).decode()}


def fill(text: str, first: str = "", others: str = "") -> str:
    """The text in as many lines as it takes, `first` in front of the first one and `others` of the others."""
    import textwrap

    return textwrap.fill(
        text, width(), initial_indent=first, subsequent_indent=others, break_on_hyphens=False, break_long_words=False
    )


def rows(pairs: Sequence[tuple[str, str]], column: int = 0, gap: int = 2) -> str:
    """Titles and texts in two columns. column: where the second begins at the most; a longer title has its own line."""
    left = max(len(title) for title, _ in pairs) + gap
    if column:
        left = min(left, column)
    lines = []
    for title, text in pairs:
        if len(title) + gap > left:
            lines += [title, fill(text, " " * left, " " * left)]
        else:
            lines.append(fill(text, f"{title:<{left}}", " " * left))
    return "\n".join(lines)


def print_rows(pairs: Sequence[tuple[str, str]]) -> None:
    """Prints titles and texts in two columns."""
    print(rows(pairs))


def print_names(names: Iterable[str], indent: str = "  ") -> None:
    """Prints names one after the other, in as many lines as it takes."""
    print(fill(" ".join(names), indent, indent))


def word_title(word: Word) -> str:
    """ "leaf 0x7 subleaf 1 edx"; the subleaf where it is not 0."""
    subleaf = f" subleaf {word.subleaf}" if word.subleaf else ""
    return f"leaf {word.leaf:#x}{subleaf} {word.register}"


def bits_with_carets(values: Sequence[tuple[str, int]]) -> list[str]:
    """Lines that show 32-bit values bit by bit, under each other, with carets under the bits in which they differ.

    values: a label and a value each.
    """
    left = max(len(label) for label, _ in values) + 2
    lines = [f"{label:<{left}}0x{value:08x}  {_groups(f'{value:032b}')}" for label, value in values]
    differing = 0
    for _, value in values:
        differing |= value ^ values[0][1]
    carets = _groups("".join("^" if differing >> bit & 1 else " " for bit in range(31, -1, -1)))
    lines.append((" " * (left + 12) + carets).rstrip())
    return lines


def _groups(digits: str) -> str:
    """32 characters in groups of four."""
    return " ".join(digits[i : i + 4] for i in range(0, 32, 4))


def size(count: int) -> str:
    """A number of bytes in the unit that suits it: "64 MiB", "4.2 KiB"."""
    value, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.4g} {unit}"


def bar(done: int, total: int, width: int = 30) -> str:
    """A bar that is filled as far as `done` is of `total`."""
    filled = width * done // max(total, 1)
    return f"[{'#' * filled}{'.' * (width - filled)}]"


class StatusLine:
    """A line on stderr about work that goes on: drawn anew on a terminal, elsewhere one after the other, with KEY=VALUE
    each or, where JSON is asked for, an object each. A context manager, which clears it.

    title: what the work is called there. drawn, written: seconds between two lines on a terminal and elsewhere. quiet:
    nothing is shown of work that takes no longer."""

    def __init__(self, title: str, as_json: bool, drawn: float, written: float, quiet: float = 0.0) -> None:
        self.begin = time.monotonic()
        self._title = title
        self._as_json = as_json
        self._terminal = os.isatty(2) and not as_json
        self._interval = drawn if self._terminal else written
        self._next = self.begin + max(self._interval, quiet)
        self._drawn = False

    def is_due(self) -> bool:
        """Whether it is time for another line; to be asked once for each."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._interval
        return True

    def show(self, text: str, facts: dict[str, Any]) -> None:
        """Shows the text or the facts."""
        if self._terminal:
            self._drawn = True
            line = f"\r{text}\x1b[K"
        elif self._as_json:
            import json

            line = json.dumps({"progress": self._title, **facts}) + "\n"
        else:
            line = " ".join([f"pyhv: {self._title}:", *(f"{name}={value}" for name, value in facts.items())]) + "\n"
        try:
            os.write(2, line.encode())
        except OSError:  # nobody reads it: the work goes on
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._drawn:
            os.write(2, b"\r\x1b[K")


class Progress(StatusLine):
    """Shows how far some work over bytes is, if it takes longer than a second. Call it with the bytes done and all that
    there are."""

    def __init__(self, title: str, as_json: bool) -> None:
        super().__init__(title, as_json, 0.1, 1, quiet=1)

    def __call__(self, done: int, total: int) -> None:
        if self.is_due():
            rate = round(done / (time.monotonic() - self.begin))
            text = f"{self._title} {bar(done, total)} {100 * done // max(total, 1):3}%  {size(rate)}/s"
            self.show(text, {"done": done, "total": total, "bytes_per_second": rate})
