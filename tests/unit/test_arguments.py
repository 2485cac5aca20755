"""What Machine is given from Python: accepted, or one clear line."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import Any

import pytest

import pyhv
from pyhv import arguments, outcome


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"image": 7}, "image 7: is no path; give a str or a pathlib.Path"),
        ({"image": "a\0b"}, "image 'a\\x00b': has a NUL character in it"),
        ({"initrd": 1.5}, "initrd 1.5: is no path"),
        ({"modules": "file words"}, "modules 'file words': is a str; give a list of them"),
        ({"modules": [3]}, "modules 3: is no path"),
        ({"modules": None}, "modules None: is a NoneType; give a list of them"),
        ({"modules": Path("x")}, "modules PosixPath('x'): is a PosixPath; give a list of them"),
        ({"boot": ["pvh"]}, "boot ['pvh']: is no str"),
        ({"compat": "no"}, "compat 'no': is no bool; give True or False, not str"),
        ({"overcommit": 1}, "overcommit 1: is no bool"),
        ({"accel": "kvn"}, "accel 'kvn': is unknown; choose one of auto, kvm, emulator"),
        ({"accel": []}, "accel []: is unknown"),
        ({"intercept": "none"}, "intercept 'none': is unknown; choose one of auto, kernel, trap"),
        ({"intercept": "none", "on_cpuid": print}, "intercept 'none': is unknown"),
        ({"on_cpuid": 7}, "on_cpuid 7: cannot be called"),
        ({"cpu": 3}, "cpu 3: is no path"),
        ({"cpus": "2"}, "cpus '2': is no int; give an int, not str"),
        ({"cpus": 1.0}, "cpus 1.0: is no int; give an int, not float"),
        ({"cpus": True}, "cpus True: is no int; give an int, not bool"),
        ({"memory": 1.5e6}, "memory 1500000.0: is no int; give an int, not float"),
        ({"memory": None}, "memory None: is no int; give an int, not NoneType"),
        ({"append": b"x"}, "append b'x': is no str; give a str, not bytes"),
        ({"console_in": 9999}, "console_in 9999: is no open descriptor"),
        ({"console_in": 1 << 70}, f"console_in {1 << 70}: is no open descriptor"),
        ({"console_in": -7}, "console_in -7: is no open descriptor"),
        ({"console_out": -1}, "console_out -1: is no open descriptor"),
        ({"console_out": "x"}, "console_out 'x': is no int"),
    ],
)
def test_what_is_refused(given: dict[str, Any], words: str) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(pyhv.BadInput) as caught:
        pyhv.Machine(**{"image": "hello", **given})
    assert str(caught.value).startswith(words)
    assert os.listdir("/proc/self/fd") == before


def test_descriptors_that_are_open_the_wrong_way() -> None:
    reader, writer = os.pipe()
    try:
        arguments.descriptor("in", reader, writing=False)
        arguments.descriptor("out", writer, writing=True)
        with pytest.raises(pyhv.BadInput, match=f"console_in {writer}: is not open for reading"):
            pyhv.Machine("hello", console_in=writer)
        with pytest.raises(pyhv.BadInput, match=f"console_out {reader}: is not open for writing"):
            pyhv.Machine("hello", console_out=reader)
    finally:
        os.close(reader)
        os.close(writer)


def test_a_path_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert arguments.path("x", "hello") == "hello"
    assert arguments.path("x", Path("hello")) == "./hello"
    assert arguments.path("x", tmp_path) == str(tmp_path)
    assert arguments.path("x", b"/a") == "/a"
    with pytest.raises(pyhv.BadInput, match=r"^\./hello: "):
        pyhv.Machine(Path("hello"))
    with pytest.raises(pyhv.BadInput, match=r"\./host"):
        pyhv.Machine("hello", cpu=Path("host"))


def test_no_profile_is_not_the_empty_one() -> None:
    """An empty variable of a script must not show the guest all that the host has."""
    with pytest.raises(pyhv.BadInput, match="profile ''"):
        pyhv.Machine("hello", cpu="")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"accel": "kvn"}, "accel 'kvn': is unknown"),
        ({"intercept": 1}, "intercept 1: is unknown"),
        ({"strict_tsc": "no"}, "strict_tsc 'no': is no bool"),
        ({"verify": 1}, "verify 1: is no bool"),
        ({"overcommit": None}, "overcommit None: is no bool"),
        ({"progress": 1}, "progress 1: cannot be called"),
        ({"on_cpuid": "x"}, "on_cpuid 'x': cannot be called"),
    ],
)
def test_what_restore_refuses(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(pyhv.BadInput) as caught:
        pyhv.Machine.restore(tmp_path / "none", **given)
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"uri": None}, "uri None: is no str"),
        ({"uri": b"unix:a"}, "uri b'unix:a': is no str"),
        ({"uri": Path("a")}, "uri PosixPath('a'): is no str"),
        ({"insecure": "no"}, "insecure 'no': is no bool"),
        ({"on_listening": 3}, "on_listening 3: cannot be called"),
        ({"accel": "kvn"}, "accel 'kvn': is unknown"),
    ],
)
def test_what_receive_refuses(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(pyhv.BadInput) as caught:
        pyhv.Machine.receive(**{"uri": f"unix:{tmp_path}/r.sock", "timeout": 0.01, **given})
    assert str(caught.value).startswith(words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["downtime", "bandwidth", "timeout", "rounds", "heartbeat", "silence", "overrun"])
@pytest.mark.parametrize("value", [None, "5", True, [1], 1 << 2000])
def test_limits_that_are_no_numbers(name: str, value: object) -> None:
    limits = pyhv.Limits()._replace(**{name: value})
    with pytest.raises(pyhv.BadInput, match=f"^{name} .*: is no number"):
        limits.check()


@pytest.mark.parametrize("fail_on", [None, 1, True, print, "halted"])
def test_what_is_no_collection_of_causes(fail_on: Any) -> None:
    with pytest.raises(pyhv.BadInput, match="give a collection of causes"):
        outcome.check_fail_on(fail_on)


@pytest.mark.parametrize("timeout", ["5", float("nan"), -1, True, [1], 1 << 2000])
def test_what_is_no_timeout(timeout: object) -> None:
    with pytest.raises(pyhv.BadInput, match=r"^timeout .*: is no number of seconds from 0 on; give None"):
        arguments.timeout(timeout)


@pytest.mark.parametrize("timeout", [None, 0, 1, 0.5, float("inf")])
def test_what_is_one(timeout: float | None) -> None:
    arguments.timeout(timeout)


def test_errors_speak_of_arguments_and_the_command_line_of_options() -> None:
    say = arguments.as_options
    assert say('use accel="kvm" or cpus=1') == "use --accel kvm or --cpus 1"
    assert say("the most is 1M, with overcommit=True 2M") == "the most is 1M, with --overcommit 2M"
    assert say("give tls=Tls(certificate, key, authority)") == "give --tls-cert, --tls-key and --tls-ca"
    assert say("start(force=True), or pyhv resume NAME --force") == "pyhv resume NAME --force"
    assert say("a=b: cause=1 root=/dev/sda") == "a=b: cause=1 root=/dev/sda"


def test_no_error_that_python_raises_speaks_of_the_command_lines_options() -> None:
    """Outside the command line's own modules; pyhv's commands may be named, with their options."""
    package, own = Path(arguments.__file__).parent, ("arguments.py", "outcome.py", "soak.py", "_features.py")
    for path in package.rglob("*.py"):
        if path.parent.name in ("cli", "guests") or path.name in own:
            continue
        tree = ast.parse(path.read_text())
        said = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
        for node in ast.walk(tree):
            if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or node in said:
                continue
            if not re.match("look there;|take the kernel out of it|pyhv host --json", node.value):
                assert not re.search(r"(?<![\w-])--[a-z]", node.value), (path, node.value)
