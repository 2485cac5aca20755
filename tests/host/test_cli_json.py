"""Every command with --json prints exactly one object, as docs/json.md has it, and none prints JSON without it."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pyhv.cli import COMMANDS

from .cli import COMMAND, IN_THE_LAB, LAB_REASON, TIMEOUT, call, call_here, environment
from .named import ECHO, TICKER, detach, wait_for

if IN_THE_LAB:
    pytest.skip(LAB_REASON, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("base")

HELLO = ("run", "hello", "--mem", "4M")


def one(*words: str, status: int = 0) -> dict[str, Any]:
    done = call(*words, "--json")
    assert done.returncode == status, done
    value = json.loads(done.stdout)  # which refuses a second one
    assert isinstance(value, dict)
    return value


def run(tmp_path: Path) -> None:
    value = one(*HELLO)
    assert (value["cause"], value["status"]) == ("guest-exit", 0)
    assert base64.b64decode(value["console_base64"]).decode() == value["console"] == "hello from a pyhv guest\n"


def console(tmp_path: Path) -> None:
    detach("t", "run", "spin", "--timeout", "3")
    value = one("console", "t", status=124)
    assert (value["name"], value["cause"], value["status"], value["missed"]) == ("t", "timeout", 124, 0)


def snapshots(tmp_path: Path) -> str:
    path = str(tmp_path / "t.pyhv")
    detach("t", *TICKER)
    assert one("save", "t", path, "--stop") == {"name": "t", "path": path, "stopped": True}
    return path


def restore(tmp_path: Path) -> None:
    assert one("restore", snapshots(tmp_path), "--timeout", "0.2", status=124)["cause"] == "timeout"


def inspect(tmp_path: Path) -> None:
    assert one("inspect", snapshots(tmp_path))["machine"]["image"] == "ticker"


def verify(tmp_path: Path) -> None:
    path = snapshots(tmp_path)
    value = one("verify", path)
    assert (value["file"], value["good"], value["memory"]) == (path, True, 4 << 20)
    with open(path, "r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(b"x" * 4096)
    assert one("verify", path, status=2)["kind"] == "BadInput"


def check(tmp_path: Path) -> None:
    value = one("check", snapshots(tmp_path))
    assert (value["runs"], value["reasons"], value["on"]) == (True, [], "this host")


def pausing(tmp_path: Path) -> None:
    detach("t", *TICKER)
    assert one("pause", "t") == {"name": "t", "state": "paused"}
    assert one("status", "t")["state"] == "paused"
    assert [vm["name"] for vm in one("ls")["vms"]] == ["t"]
    assert one("resume", "t") == {"name": "t", "state": "running"}
    value = one("stop", "t")
    assert (value["name"], value["cause"], value["status"]) == ("t", "stopped", 0)
    assert value["message"].startswith("stopped")


def keeping(tmp_path: Path) -> None:
    detach("t", *HELLO)
    assert one("wait", "t") == {"name": "t", "cause": "guest-exit", "status": 0, "message": ""}
    log = one("log", "t")
    assert base64.b64decode(log["console_base64"]).decode() == log["console"] == "hello from a pyhv guest\n"
    assert one("clear", "t") == {"cleared": ["t"], "failures": []}
    (failure,) = one("clear", "t", status=2)["failures"]
    assert (failure["name"], failure["kind"]) == ("t", "BadInput")


def moving(tmp_path: Path) -> None:
    detach("t", *TICKER)
    words = [*COMMAND, "receive", f"unix:{tmp_path}/m", "--timeout", "1", "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=environment()) as there:
        wait_for(lambda: os.path.exists(tmp_path / "m"))
        value = one("migrate", "t", f"unix:{tmp_path}/m", "--silence", "10")
        assert (value["name"], value["one_clock"]) == ("t", True)
        assert json.loads(there.communicate(timeout=TIMEOUT)[0])["cause"] == "timeout"


def soak(tmp_path: Path) -> None:
    assert one("soak", "--count", "2", "--pages", "16", "--nodes", "2")["hops"] == 2


def trace(tmp_path: Path) -> None:
    *lines, last = call("trace", "hello", "--accel", "emulator", "--json").stdout.splitlines()
    assert all(json.loads(line)["event"] == "cpuid" for line in lines)
    assert json.loads(last)["event"] == "end"
    assert json.loads(call("trace", "helo", "--json").stdout)["kind"] == "BadInput"


def host(tmp_path: Path) -> None:
    path = tmp_path / "host.json"
    path.write_text(json.dumps(one("host")))
    assert one("diff", str(path), str(path))["same"] is True


CASES: dict[str, Any] = {
    "run": run, "console": console, "restore": restore, "inspect": inspect, "verify": verify, "check": check,
    "pause": pausing, "resume": pausing, "stop": pausing, "status": pausing, "ls": pausing, "save": snapshots,
    "wait": keeping, "log": keeping, "clear": keeping,
    "migrate": moving, "receive": moving, "soak": soak, "trace": trace, "host": host, "diff": host,
    "features": lambda path: one("features")["features"][0]["name"],
    "profiles": lambda path: one("profiles")["profiles"][0]["name"],
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_one_object(name: str, tmp_path: Path) -> None:
    CASES[name](tmp_path)


def test_a_guests_bytes_come_through() -> None:
    """"\\xff" may be a byte that is no text, or what the guest printed."""
    words = [*COMMAND, *ECHO, "--timeout", "3", "--json"]
    done = subprocess.run(words, input=b"\xff\\xff\x80\n", capture_output=True, timeout=TIMEOUT, env=environment())
    value = json.loads(done.stdout)
    assert base64.b64decode(value["console_base64"]).endswith(b"\xff\\xff\x80\n")
    assert value["console"].endswith("\\xff\\xff\\x80\n")


def test_stop_takes_several_names() -> None:
    detach("a", *TICKER)
    detach("b", *TICKER)
    assert [vm["cause"] for vm in one("stop", "a", "b")["vms"]] == ["stopped", "stopped"]
    assert one("ls") == {"vms": []}


def test_several_vms_are_a_list_and_one_that_fails_does_not_stop_it() -> None:
    detach("a", *TICKER)
    detach("b", *TICKER)
    value = one("pause", "a", "nobody", "b", status=2)
    assert [vm["name"] for vm in value["vms"]] == ["a", "nobody", "b"]
    assert [vm.get("state") for vm in value["vms"]] == ["paused", None, "paused"]
    assert value["vms"][1]["facts"]["problem"] == "there is no running VM of this name"
    assert [vm["cause"] for vm in one("stop", "--all")["vms"]] == ["stopped", "stopped"]
    assert one("stop", "--all") == {"vms": []}


NOBODY = ("status", "log", "wait", "console", "pause", "resume", "stop")
FAILING: dict[str, tuple[str, ...]] = {
    "run": ("helo",), "trace": ("helo",), "restore": ("/none",), "inspect": ("/none",), "verify": ("/none",),
    "check": ("/none",), "save": ("nobody", "/none/f"), "migrate": ("nobody", "unix:m"), "receive": ("unix:/none/m",),
    "soak": ("--count", "1", "--state", "/none/s"), "profiles": ("nosuch",), "features": ("popcn",),
    "diff": ("hyperv-r2", "/none"), "host": ("--accel", "nosuch"), "ls": (),
} | dict.fromkeys(NOBODY, ("nobody",))  # fmt: skip


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"clear"}))  # which lists its failures
def test_one_object_of_a_failure(name: str, base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if name == "ls":
        (base / "pyhv").mkdir()
        (base / "pyhv").chmod(0o777)
    words = (name, *FAILING[name])
    status, out, err = call_here(capfd, *words, "--json")
    value = json.loads(out)
    assert value.keys() == {"kind", "message", "facts", "cause", "status"}
    assert (value["kind"], value["cause"], value["status"]) == ("BadInput", "usage", status) and status == 2
    assert value["facts"]["subject"] and value["facts"]["problem"]
    said = err.splitlines()[-1]
    assert said == f"pyhv: {value['message']}"
    status, out, err = call_here(capfd, *words)
    assert (status, out, err.splitlines()[-1]) == (2, "", said)


def test_nobody_gets_json_unasked(tmp_path: Path) -> None:
    detach("t", *TICKER)
    with subprocess.Popen(
        [*COMMAND, "receive", f"unix:{tmp_path}/m"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
        env=environment(),
    ) as there:  # fmt: skip
        try:
            plain(tmp_path)
            assert "{" not in there.communicate(timeout=TIMEOUT)[0]
        finally:
            there.kill()


def plain(tmp_path: Path) -> None:
    """Each command without --json; the VM goes to a receiver that waits at m."""
    path = str(tmp_path / "t.pyhv")
    wait_for(lambda: os.path.exists(tmp_path / "m"))
    for words in (
        ("ls",), ("status", "t"), ("pause", "t"), ("resume", "t"), ("save", "t", path), ("inspect", path),
        ("verify", path), ("check", path), ("migrate", "t", f"unix:{tmp_path}/m", "--silence", "10"), ("stop", "t"),
        ("wait", "t"), ("log", "t"), ("status", "t"), ("ls", "--all"), ("clear", "t"), HELLO, ("trace", *HELLO[1:]),
        ("restore", path, "--timeout", "0.1"), ("host",), ("features",), ("profiles",),
        ("diff", "hyperv-r2", "hyperv-r2"), ("soak", "--count", "2", "--pages", "16", "--nodes", "2"),
    ):  # fmt: skip
        done = call(*words)
        assert done.returncode == (124 if words[0] == "restore" else 0), done
        assert not any(line.startswith(("{", "[")) for line in done.stdout.splitlines()), done
