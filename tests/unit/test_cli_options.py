"""The command line's options: what is accepted, and that every mistake is one error with advice."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyhv import arguments
from pyhv.cli import COMMANDS, migrate
from pyhv.cli.options import Command, Option, number, processors, seconds
from pyhv.cli.say import one_line
from pyhv.errors import BadInput

COMMAND = Command(
    "test",
    "Does nothing.",
    (
        Option("IMAGE", "an image"),
        Option("MORE", "something", required=False),
        Option("--compat", "a switch"),
        Option("--cpu", "a text", "PROFILE"),
        Option("--cpus", "a number", "N", 1, number),
        Option("--via", "a choice", default="auto", choices=("auto", "trap")),
    ),
    "Details.",
    ("--compat", "--cpu"),
)


def test_defaults() -> None:
    values = COMMAND.parse(["x"])
    assert vars(values) == {"image": "x", "more": None, "compat": False, "cpu": None, "cpus": 1, "via": "auto"}


@pytest.mark.parametrize(
    "words",
    [
        ["a", "b", "--cpu", "p", "--cpus", "3", "--via", "trap"],
        ["--cpu=p", "a", "--cpus=3", "b", "--via=trap"],
        ["--cpus", "9", "--cpus", "3", "--via=trap", "--cpu=p", "--", "a", "b"],
    ],
)
def test_order_and_form_do_not_matter(words: list[str]) -> None:
    values = COMMAND.parse(words)
    assert vars(values) == {"image": "a", "more": "b", "compat": False, "cpu": "p", "cpus": 3, "via": "trap"}


def test_a_value_may_look_like_an_option_or_be_empty() -> None:
    assert COMMAND.parse(["a", "--cpu", "--compat"]).cpu == "--compat"
    assert COMMAND.parse(["a", "--cpu="]).cpu == ""
    assert COMMAND.parse(["a", "--cpu=x=y"]).cpu == "x=y"
    assert COMMAND.parse(["--", "--cpu"]).image == "--cpu"
    assert COMMAND.parse(["-"]).image == "-"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "IMAGE: pyhv test needs it; see pyhv test --help"),
        (["a", "b", "c"], "c: pyhv test takes no further argument; see pyhv test --help"),
        (["a", "--comapt"], "--comapt: pyhv test has no such option; did you mean --compat?"),
        (["a", "-x"], "-x: pyhv test has no such option; see pyhv test --help"),
        (["a", "--cpu"], "--cpu: needs a value: --cpu PROFILE; see pyhv test --help"),
        (["a", "--compat=yes"], "--compat: takes no value; see pyhv test --help"),
        (["a", "--compat", "--cpu", "p"], "--cpu: cannot be combined with --compat; see pyhv test --help"),
        (["a", "--cpus", "two"], "--cpus two: is not a whole number"),
        (["a", "--cpus", "1_0"], "--cpus 1_0: is not a whole number"),
        (["a", "--cpus", "\u0663"], "--cpus \u0663: is not a whole number"),
        (["a", "--via", "tarp"], "--via tarp: is unknown; choose one of auto, trap"),
    ],
)
def test_mistakes(words: list[str], error: str) -> None:
    with pytest.raises(BadInput) as caught:
        COMMAND.parse(words)
    assert str(caught.value) == error


WORDS = st.sampled_from(["--cpu", "--cpus", "--compat", "--via", "--", "a", "3", "trap"])


@given(st.lists(st.text(max_size=8) | WORDS))
def test_anything_else_is_parsed_or_refused(words: list[str]) -> None:
    if {"-h", "--help"} & set(words):
        return
    try:
        values = COMMAND.parse(words)
    except BadInput:
        return
    assert isinstance(values.image, str)
    assert isinstance(values.cpus, int)
    assert not (values.compat and values.cpu is not None)


def test_seconds() -> None:
    assert seconds("0.25") == 0.25
    assert seconds("1e3") == 1000
    assert [seconds(text) for text in ("5s", "500ms", "2m", "1.5h")] == [5, 0.5, 120, 5400]
    for text in ("1_0", "\u0663", "0", "-1", "nan", "", "x", "5x", "s", "5sm", "5 d"):
        with pytest.raises(ValueError, match="time in seconds"):
            seconds(text)
    for text in ("inf", "1e400", "1e10", "99999999999", "3000000h"):
        with pytest.raises(ValueError, match="is too long; the most is 9000000000 seconds"):
            seconds(text)


@given(st.floats())
def test_seconds_are_what_a_wait_can_take(value: float) -> None:
    try:
        assert 0 < seconds(repr(value)) <= 9e9
    except ValueError:
        assert not 0 < value <= 9e9 or math.isnan(value)


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        COMMAND.parse(["--no-such-option", "--help"][1:])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: pyhv test IMAGE [MORE] [--compat | --cpu PROFILE] [--cpus N] [--via auto|trap]\n")
    for word in ("Does nothing.", "--help", "--via auto|trap", "a choice", "Details."):
        assert word in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    from pyhv.cli import main

    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: pyhv {command}")
    assert "example" in text
    assert f"\n  pyhv {command}" in text
    assert max(map(len, text.splitlines())) <= 120


@given(st.text())
def test_one_line_is_one_line(text: str) -> None:
    made = one_line(text)
    assert made.isprintable()
    assert one_line(made) == made
    if text.isprintable():
        assert made == text


@pytest.mark.parametrize(
    ("text", "numbers"), [("0", (0,)), ("0,2,4-7", (0, 2, 4, 5, 6, 7)), ("3,3", (3, 3)), ("12-12", (12,))]
)
def test_processors(text: str, numbers: tuple[int, ...]) -> None:
    assert processors(text) == numbers


@pytest.mark.parametrize("text", ["", ",", "1,", "a", "-1", "2-", "3-1", "1-2-3", "99999", "\u0663"])
def test_what_is_no_list_of_processors(text: str) -> None:
    with pytest.raises(ValueError, match="no list of processors"):
        processors(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("100M", 100 << 20), ("100MiB", 100 << 20), ("4096K", 4 << 20), ("0.5G", 1 << 29), ("64MB", 64_000_000)],
)
def test_a_rate_is_written_as_a_size_of_memory_is(text: str, size: int) -> None:
    assert arguments.size(text) == size
    assert migrate.COMMAND.parse(["t", "unix:m", "--bandwidth", text]).bandwidth == size
    assert migrate.COMMAND.parse(["t", "unix:m", "--bandwidth", f"{text}/s"]).bandwidth == size


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        (("--downtime", "20"), 0.02), (("--downtime", "20ms"), 0.02), (("--downtime", "0.5s"), 0.5),
        (("--downtime", "500us"), 0.0005), (("--timeout", "20"), 20), (("--timeout", "500ms"), 0.5),
        (("--silence", "2"), 2), (("--silence", "2s"), 2),
    ],
)  # fmt: skip
def test_times_of_a_migration_have_units(words: tuple[str, str], seconds: float) -> None:
    given = vars(migrate.COMMAND.parse(["t", "unix:m", *words]))
    assert given[words[0].removeprefix("--")] == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["5", "5s", "2m", "1h", "500ms", "20us", "0.5s"])
def test_all_times_have_the_same_units(text: str) -> None:
    given = migrate.COMMAND.parse(["t", "unix:m", "--timeout", text, "--silence", text, "--downtime", text])
    assert given.timeout == given.silence == seconds(text)
    assert given.downtime == (0.005 if text == "5" else seconds(text))


@pytest.mark.parametrize("text", ["64M", "64MB", "0.5G", "1T", "4096KiB"])
def test_all_sizes_and_rates_have_the_same_units(text: str) -> None:
    given = migrate.COMMAND.parse(["t", "unix:m", "--bandwidth", text])
    assert given.bandwidth == arguments.size(text)
    assert migrate.COMMAND.parse(["t", "unix:m", "--bandwidth", f"{text}/s"]).bandwidth == given.bandwidth


@pytest.mark.parametrize("text", ["", "M", "1_0M", "1.M", "-1", "nan", "1e", "1e1.5", "1PB", "1e999"])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(BadInput, match="is no rate"):
        migrate.COMMAND.parse(["t", "unix:m", f"--bandwidth={text}"])


@pytest.mark.parametrize("text", ["", "s", "nan", "-1", "1_0", "5M", "1sm", "5d"])
def test_what_is_no_time_to_migrate_in(text: str) -> None:
    with pytest.raises(BadInput, match="is not a time"):
        migrate.COMMAND.parse(["t", "unix:m", f"--silence={text}"])


def test_bytes_a_second_may_have_an_exponent() -> None:
    assert migrate.COMMAND.parse(["t", "unix:m", "--bandwidth", "1.5e8"]).bandwidth == 150e6
