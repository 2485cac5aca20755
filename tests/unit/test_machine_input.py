"""What a machine refuses before it touches the host."""

from __future__ import annotations

import pytest

from pyhv import machine, outcome
from pyhv.accel.data import Stop
from pyhv.errors import BadInput


@pytest.mark.parametrize(
    ("text", "size"),
    [("64M", 64 << 20), ("2m", 2 << 20), ("1G", 1 << 30), ("4096K", 4 << 20), ("8388608", 8 << 20), (4 << 20, 4 << 20)],
)
def test_memory_sizes(text: str | int, size: int) -> None:
    assert machine.parse_memory(text) == size


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0", "too small; the least is 2M"),
        (0, "too small"),
        (-4096, "too small"),
        ("-64M", "not a size"),
        ("", "not a size"),
        ("M", "not a size"),
        ("64BM", "not a size"),
        ("1.G", "not a size"),
        ("٣M", "not a size"),
        ("4194305", "not a multiple of 4096"),
        ("9999999T", "too much; the most is 16T"),
        ("9" * 400, "too much; the most is 16T"),
    ],
)
def test_memory_sizes_that_are_none(text: str | int, words: str) -> None:
    with pytest.raises(BadInput) as error:
        machine.parse_memory(text)
    assert words in str(error.value)


def test_images_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.find_image("./hello") == "./hello"
    assert machine.find_image("hello").endswith("hello.elf")
    with pytest.raises(BadInput, match="did you mean hello"):
        machine.find_image("helo")
    with pytest.raises(BadInput, match="the bundled guests are acpi, "):
        machine.find_image("zzzzzzzz")


def test_every_stop_has_a_cause_and_every_cause_a_status() -> None:
    for stop in Stop:
        cause = outcome.cause_of(stop)
        assert cause in outcome.CAUSES
        assert outcome.status_of(cause, 42) == (42 if cause == "guest-exit" else outcome.CAUSES[cause][0])
    failures = [status for cause, (status, _) in outcome.CAUSES.items() if status]
    assert len(failures) == len(set(failures)), "two causes share a status"
