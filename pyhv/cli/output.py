"""How commands print: rows, lists of names, words bit by bit, JSON."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyhv.cpu.features import Word


def width() -> int:
    """Columns to print in: those of the terminal, at most 100."""
    try:
        return min(os.get_terminal_size(1).columns, 100)
    except OSError:  # no terminal
        return 100


def print_json(value: Any) -> None:
    """Prints one JSON value."""
    import json

    print(json.dumps(value, indent=2))


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


class Progress:
    """Shows how far some work over bytes is, on stderr: a bar on a terminal, a line of JSON a second elsewhere, and
    nothing for work that is over in a second. Call it with the bytes done and all that there are. A context manager."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._terminal = os.isatty(2)
        self._start = self._last = time.monotonic()
        self._drawn = False

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last < (0.1 if self._terminal and self._drawn else 1):
            return
        self._last = now
        rate = done / (now - self._start)
        if self._terminal:
            filled = 30 * done // max(total, 1)
            bar = "#" * filled + "." * (30 - filled)
            text = f"\r{self._title} [{bar}] {100 * done // max(total, 1):3}%  {size(int(rate))}/s\x1b[K"
            self._drawn = True
        else:
            numbers = f'"done": {done}, "total": {total}, "bytes_per_second": {rate:.0f}'
            text = f'{{"progress": "{self._title}", {numbers}}}\n'
        os.write(2, text.encode())

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._drawn:
            os.write(2, b"\r\x1b[K")
