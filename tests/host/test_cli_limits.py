"""What limits of the process, odd directories and foreign names do to commands: one line that names them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .cli import COMMAND, IN_THE_LAB, LAB_REASON, TIMEOUT, call, environment
from .named import TICKER, detach, ok

if IN_THE_LAB:
    pytest.skip(LAB_REASON, allow_module_level=True)

ROOT = Path(__file__).parents[2]


def shell(script: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs a shell script, in which "$@" is pyhv with the words."""
    return subprocess.run(
        ["bash", "-c", script, "bash", *COMMAND, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        errors="replace", timeout=TIMEOUT, check=False, env=environment() | {"PYTHONPATH": str(ROOT)} | more,
    )  # fmt: skip


LIMITS = [*(f"-n {number}" for number in range(5, 12)), *(f"-v {size}" for size in range(40000, 130000, 10000))]


@pytest.mark.parametrize("limit", LIMITS)
def test_limits_are_no_faults_of_pyhv(limit: str) -> None:
    done = shell(f'ulimit {limit}; exec "$@"', "run", "hello", "--accel", "kvm")
    if done.returncode == 0:
        assert done.stdout == "hello from a pyhv guest\n"
        return
    if "Python" in done.stderr or "shared libraries" in done.stderr:
        pytest.skip("Python itself does not start so")
    assert done.returncode in (2, 125) and done.stderr.count("\n") == 1, done
    assert "internal error" not in done.stderr and "Traceback" not in done.stderr
    if limit.startswith("-n"):
        assert "(ulimit -n)" in done.stderr


@pytest.mark.usefixtures("base")
@pytest.mark.parametrize(
    "words",
    [
        ("run", "hello"), ("save", "t", "x.pyhv"), ("migrate", "t", "unix:m"), ("receive", "unix:m", "--wait", "0.1"),
        ("soak", "--count", "1", "--state", "s"), ("verify", "x"), ("diff", "./a", "./b"), ("run", "./x"), ("ls",),
    ],
)  # fmt: skip
def test_a_working_directory_that_is_gone(words: tuple[str, ...], tmp_path: Path) -> None:
    done = shell(f'mkdir {tmp_path}/gone && cd {tmp_path}/gone && rmdir ../gone && exec "$@"', *words)
    assert "internal error" not in done.stderr
    assert done.returncode == (0 if words in (("run", "hello"), ("ls",)) else 2), done
    assert done.stderr.count("\n") == (1 if done.returncode else 0)


@pytest.mark.usefixtures("base")
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("name", ["\u65e5\u672c.pyhv", "\u00e9.pyhv", os.fsdecode(b"\xff.pyhv")])
def test_names_that_the_locale_does_not_have(tmp_path: Path, name: str, encoding: str) -> None:
    detach("t", *TICKER)
    path = str(tmp_path / name)
    ok("save", "t", path, "--stop")
    for locale in ({"PYTHONIOENCODING": encoding}, {"LC_ALL": "C", "PYTHONUTF8": "0"}):
        for command in ("verify", "inspect", "check"):
            for json in ((), ("--json",)):
                done = shell('exec "$@"', command, path, *json, **locale)
                assert (done.returncode, done.stderr) == (0, ""), done


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGQUIT, 131)])
@pytest.mark.parametrize("words", [("run", "spin"), ("receive", "unix:m")])
def test_the_status_of_a_signal_is_what_a_shell_makes_of_it(
    words: tuple[str, ...], number: signal.Signals, status: int, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [*COMMAND, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path,
        env=environment() | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    if words[0] == "run":
        process.stdout.readline()
    else:
        while not (tmp_path / "m").exists():
            assert process.poll() is None
    process.send_signal(number)
    process.communicate(timeout=TIMEOUT)
    by_default = words[0] == "receive" and number == signal.SIGQUIT  # which nobody catches there
    assert process.returncode == (-number if by_default else status)
    assert by_default or not (tmp_path / "m").exists()


def test_fail_on() -> None:
    words = ("run", "faults", "--append", "halt")
    assert call(*words).returncode == 0
    assert call(*words, "--fail-on", "reset,halted").returncode == 119
    assert call("run", "hello", "--fail-on", "halted").returncode == 0
    done = call("run", "hello", "--fail-on", "halted,bogus")
    assert done.returncode == 2 and "'bogus': is no cause of an end; there are guest-exit, " in done.stderr


@pytest.mark.usefixtures("base")
def test_fail_on_of_a_vm_in_the_background() -> None:
    detach("t", "run", "faults", "--append", "halt", "--fail-on", "halted")
    assert call("wait", "t").returncode == 119


def test_who_ignores_signals_when_the_tests_start() -> None:
    """A background job of a script: what the tests start can be interrupted nevertheless."""
    test = "tests/unit/test_cli_terminal.py::test_signals_become_bytes"
    done = shell(f'trap "" INT HUP QUIT; exec {sys.executable} -m pytest -q -p no:cacheprovider {ROOT}/{test}')
    assert done.returncode == 0, done.stdout


def test_notes_can_be_omitted(unfaithful: None) -> None:
    words = ("run", "hello", "--compat")
    note = call(*words).stderr
    assert note.count("\n") == 1 and len(note) < 160
    assert call(*words, "--quiet").stderr == ""
