"""The JSON contract (docs/json.md): each command takes --json, and each failure is one object. None of it needs KVM."""

from __future__ import annotations

import errno
import importlib
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from pyhv import errors
from pyhv.arguments import as_options
from pyhv.cli import COMMANDS, guard, main, output
from pyhv.cli.options import Command, Option
from pyhv.control import jsonrpc
from pyhv.cpu import compare

DOC = (Path(__file__).resolve().parents[2] / "docs" / "json.md").read_text(encoding="utf-8")

INCOMPATIBLE = errors.Incompatible(
    "t.pyhv", "cannot run here", [compare.OtherVendor("amd", "intel"), compare.MissingFeature("avx", "AVX")]
)


def command(name: str) -> Command:
    found: Command = importlib.import_module(f"pyhv.cli.{name}").COMMAND
    return found


def objects(text: str) -> list[Any]:
    """Every JSON value in the text, which has nothing else."""
    found, decoder = [], json.JSONDecoder()
    text = text.strip()
    while text:
        value, end = decoder.raw_decode(text)
        found.append(value)
        text = text[end:].strip()
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_it_and_says_what_it_prints(name: str) -> None:
    option = command(name).options["--json"]
    assert not option.value and not option.choices  # a switch
    assert "JSON" in option.help


@pytest.mark.parametrize("name", COMMANDS)
def test_every_failure_is_one_object(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    for words in (["--no-such-option", "--json"], ["--json", "--no-such-option"]):
        assert main([name, *words]) == 2
        out, err = capfd.readouterr()
        (value,) = objects(out)
        assert value == {
            "kind": "BadInput",
            "message": err.removeprefix("pyhv: ").rstrip("\n"),
            "facts": value["facts"],
            "cause": "usage",
            "status": 2,
        }
        assert value["facts"]["subject"] == "--no-such-option"
        assert value["facts"]["problem"] == f"pyhv {name} has no such option"


@pytest.mark.parametrize("words", [["rum", "--json"], ["--json"]])
def test_what_is_no_command_fails_the_same_way(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    (value,) = objects(capfd.readouterr().out)
    assert (value["kind"], value["status"]) == ("BadInput", 2)


def test_nobody_gets_json_unasked(capfd: pytest.CaptureFixture[str]) -> None:
    for words in (["run"], ["run", "--append", "--json"], ["run", "--nosuch", "--", "--json"], ["features", "popcn"]):
        assert main(words) == 2
        assert capfd.readouterr().out == ""


@pytest.mark.parametrize("as_json", [False, True])
def test_progress_is_json_only_where_that_is_asked_for(as_json: bool, capfd: pytest.CaptureFixture[str]) -> None:
    with output.StatusLine("work", as_json, 0, 0) as line:
        line.show("1 of 2", {"done": 1, "total": 2})
    err = capfd.readouterr().err
    if as_json:
        assert json.loads(err) == {"progress": "work", "done": 1, "total": 2}
    else:
        assert err == "pyhv: work: done=1 total=2\n"


def failing(error: BaseException, as_json: bool = True) -> int:
    def work() -> int:
        raise error

    return guard(work, lambda: as_json)


ERRORS = [
    errors.PyhvError("what"),
    errors.BadInput("x", "is wrong", "mend it"),
    errors.WrongState("saving", "start", "is being saved"),
    errors.NotAvailable("x", "is missing"),
    errors.NotFaithful("x", "shows", "hide", ["avx", "sse4_2"]),
    INCOMPATIBLE,
    errors.HostError("open", 13, "denied"),
    errors.GaveUp("unix:/m", "no room"),
    errors.HandoverUnknown("unix:/m", "silence"),
    errors.Cancelled("unix:/m"),
    errors.TimedOut("unix:/m", "nobody came", "start it there"),
]


def test_every_class_of_error_is_tried_below() -> None:
    defined = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.PyhvError)}
    assert {type(error) for error in ERRORS} == defined


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_keep_their_facts(error: errors.PyhvError, capfd: pytest.CaptureFixture[str]) -> None:
    status = failing(error)
    out, err = capfd.readouterr()
    (value,) = objects(out)
    assert out.count("\n") == 1
    others = {errors.TimedOut: 124, errors.Cancelled: 130}
    assert value["status"] == status == (2 if isinstance(error, errors.BadInput) else others.get(type(error), 125))
    assert value["cause"] == {2: "usage", 124: "timeout", 125: "internal-error", 130: "interrupted"}[status]
    assert (value["kind"] == type(error).__name__ and f"`{value['kind']}`" in DOC) or type(error) is errors.PyhvError
    assert value["message"] == as_options(str(error))
    assert set(value["facts"]) == set(vars(error))
    assert err.startswith("pyhv: ")


def test_several_reasons_are_a_list(capfd: pytest.CaptureFixture[str]) -> None:
    assert failing(INCOMPATIBLE) == 2
    out, err = capfd.readouterr()
    first, second = map(str, INCOMPATIBLE.reasons)
    assert err == f"pyhv: t.pyhv: cannot run here:\n  {first}\n  {second}\n"
    facts = json.loads(out)["facts"]
    assert facts["problem"] == "cannot run here"
    assert facts["reasons"] == [{"kind": "OtherVendor", "text": first}, {"kind": "MissingFeature", "text": second}]


def test_one_reason_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert failing(errors.Incompatible("t", "cannot run", ["no avx"]), as_json=False) == 2
    assert capfd.readouterr().err == "pyhv: t: cannot run: no avx\n"


def test_reasons_cross_the_control_socket() -> None:
    line = jsonrpc.encode_error(1, INCOMPATIBLE)
    error = jsonrpc.parse_answer(line, "t").error
    assert isinstance(error, errors.Incompatible)
    assert (str(error), error.problem) == (str(INCOMPATIBLE), INCOMPATIBLE.problem)
    assert error.reasons == tuple(map(str, INCOMPATIBLE.reasons))
    # A client of the version before knows three facts.
    data = json.loads(line)["error"]["data"]
    assert str(errors.BadInput(data["subject"], data["problem"], data["advice"])) == str(INCOMPATIBLE)


def test_other_failures(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYHV_DEBUG", raising=False)
    assert failing(KeyboardInterrupt()) == 128 + signal.SIGINT
    out, err = capfd.readouterr()
    assert (json.loads(out)["kind"], err) == ("Interrupted", "")
    assert failing(IndexError("list")) == 125
    out, err = capfd.readouterr()
    assert json.loads(out) == {
        "kind": "InternalError", "message": "internal error: IndexError: list", "facts": {},
        "cause": "internal-error", "status": 125,
    }  # fmt: skip
    assert "please report this" in err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "memory: Cannot allocate memory"),
        (OSError(errno.ENOMEM, ""), "memory: Cannot allocate memory"),
        (OSError(errno.EMFILE, "", "a"), "a: Too many open files"),
        (RuntimeError("can't start new thread"), "start a thread: Resource temporarily unavailable"),
        (OSError(errno.ENOSPC, "", b"b"), "b: No space left on device"),
    ],
)
def test_what_a_limit_causes_is_no_fault_of_pyhv(
    error: Exception, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert failing(error) == 125
    out, err = capfd.readouterr()
    assert json.loads(out)["kind"] == "HostError"
    assert err.startswith(f"pyhv: {said}") and "report" not in err and err.count("\n") == 1


def test_arguments_of_which_one_may_be_several() -> None:
    made = Command(
        "x", "", (Option("NAME", "", required=False, repeated=True), Option("FILE", ""), Option("--json", "")), ""
    )
    assert vars(made.parse(["a"])) == {"name": [], "file": "a", "json": False}
    assert vars(made.parse(["a", "b", "--json", "c"])) == {"name": ["a", "b"], "file": "c", "json": True}
    with pytest.raises(errors.BadInput, match="FILE: pyhv x needs it"):
        made.parse([])
    assert "[NAME...] FILE" in made.help()
