"""`pyhv run --name` and the commands over the control socket, as a user has them. No process and no file is left."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import resource
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyhv.control import client, names

from .cli import COMMAND, IN_THE_LAB, LAB_REASON, LONG, SUMS, TIMEOUT, Terminal, call, environment, summed
from .named import (
    ECHO,
    TICKER,
    assert_nothing_left,
    console,
    detach,
    ok,
    processes_of,
    read_until,
    rounds_of,
    status,
    wait_for,
)

if IN_THE_LAB:
    pytest.skip(LAB_REASON, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("base")


# -------------------------------------------------------------------------------------------------- a VM's life

@pytest.mark.parametrize("end", [("stop", "t"), ("save", "t", "FILE", "--stop")], ids=["stop", "save"])
def test_output_that_nobody_takes_is_not_lost_without_a_word(base: Path, end: tuple[str, ...], tmp_path: Path) -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    run = subprocess.Popen(
        [*COMMAND, *TICKER, "--accel", "kvm", "--name", "t", "--quiet"], stdin=subprocess.DEVNULL, stdout=writer,
        stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    os.close(writer)
    try:
        wait_for(lambda: list(base.rglob("t.sock")))

        def printed() -> int:
            return int(status("t")["counters"]["port_io"])

        wait_for(lambda: printed() > 4096 + 100)  # the pipe is full, and more is on its way
        assert call(*[str(tmp_path / "f") if word == "FILE" else word for word in end]).returncode == 0
        _, said = run.communicate(timeout=TIMEOUT)
    finally:
        run.kill()
        run.wait()
        os.close(reader)
    words = r"^pyhv: console: stdout takes no more: up to \d+ bytes of the guest's output are lost$"
    assert re.search(words, said, re.MULTILINE), said


def test_a_vm_in_the_background(base: Path) -> None:
    pid = detach("t", *TICKER)
    found = status("t")
    assert (found["name"], found["state"], found["pid"], found["image"]) == ("t", "running", pid, "ticker")
    assert (found["vcpus"], found["memory"], found["profile"], found["intercept"]) == (1, 4 << 20, "host", "kernel")
    assert (found["cause"], found["status"], found["message"], found["doing"]) == (None,) * 4
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", found["uuid"])
    assert 0 <= found["uptime"] < 60
    wait_for(lambda: status("t")["counters"]["port_io"] > 50)

    title, row = ok("ls").splitlines()
    assert title.split() == ["NAME", "STATE", "CPUS", "MEM", "PROFILE", "UPTIME", "IMAGE"]
    assert row.split()[:5] == ["t", "running", "1", "4M", "host"] and row.split()[6] == "ticker"
    assert [vm["name"] for vm in json.loads(ok("ls", "--json"))["vms"]] == ["t"]
    assert "image      ticker" in ok("status", "t")

    # A daemon: no terminal, no descriptor of who started it, and it keeps no directory busy.
    assert os.getsid(pid) == pid
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/null"}
    assert stat.S_IMODE(os.stat(base / "pyhv" / "t.sock").st_mode) == 0o600

    assert ok("stop", "t") == ""
    assert ok("ls").split() == title.split()
    assert os.listdir(base / "pyhv") == ["t.ended"]
    wait_for(lambda: not os.path.exists(f"/proc/{pid}"))


def test_the_background_keeps_no_descriptor_of_who_started_it() -> None:
    """Or whoever reads the other end would wait for the VM's end."""
    reader, writer = os.pipe()
    done = subprocess.run(
        [*COMMAND, *TICKER, "--name", "t", "--detach"], stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT,
        check=False, pass_fds=[writer], env=environment(),
    )  # fmt: skip
    os.close(writer)
    assert done.returncode == 0
    assert select.select([reader], [], [], TIMEOUT)[0]
    assert os.read(reader, 1) == b""
    os.close(reader)
    assert status("t")["state"] == "running"
    ok("stop", "t")


def test_paused_nothing_counts() -> None:
    detach("t", *TICKER)
    wait_for(lambda: rounds_of("t") >= 1)
    assert ok("pause", "t") == ""
    assert status("t")["state"] == "paused"
    before, counters = rounds_of("t"), status("t")["counters"]
    time.sleep(0.5)
    assert (rounds_of("t"), status("t")["counters"]) == (before, counters)
    ok("pause", "t")  # no effect
    assert ok("resume", "t") == ""
    ok("resume", "t")
    assert status("t")["state"] == "running"
    wait_for(lambda: rounds_of("t") > before)  # the ticker ends when it has lost anything
    ok("stop", "t")


def test_a_counter_that_does_not_stand_still_is_seen() -> None:
    """The checker above: a VM that runs on does count."""
    detach("t", *TICKER)
    wait_for(lambda: rounds_of("t") >= 1)
    before = rounds_of("t")
    wait_for(lambda: rounds_of("t") != before)
    ok("stop", "t")


def test_in_the_foreground_stop_ends_it() -> None:
    process = subprocess.Popen(
        [*COMMAND, "run", "spin", "--name", "t"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    wait_for(lambda: "t  " in ok("ls"))
    ok("stop", "t")
    out, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, out) == (0, "spin: for ever\n")
    assert err.startswith("pyhv: stopped; vCPU 0 at rip 0x1") and err.count("\n") == 1


def test_json_says_that_it_was_stopped() -> None:
    process = subprocess.Popen(
        [*COMMAND, "run", "spin", "--name", "t", "--json"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, env=environment(),
    )  # fmt: skip
    wait_for(lambda: "t  " in ok("ls"))
    ok("stop", "t")
    value = json.loads(process.communicate(timeout=TIMEOUT)[0])
    assert (value["cause"], value["status"], process.returncode) == ("stopped", 0, 0)
    assert (value["console"], value["vcpus"]) == ("spin: for ever\n", 1)


@pytest.mark.parametrize(
    ("words", "code", "out"),
    [
        (("run", "hello", "--append", "some words"), 0, "hello from a pyhv guest\ncommand line: some words\n"),
        (("run", "faults", "--append", "status=42"), 42, None),
        (("run", "faults", "--append", "triple-fault"), 121, None),
        (("run", "spin", "--timeout", "0.2"), 124, "spin: for ever\n"),
        (("run", "nosuch"), 2, ""),
        (("run", "hello", "--mem", "0"), 2, ""),
    ],
)
def test_a_name_changes_nothing_else(words: tuple[str, ...], code: int, out: str | None) -> None:
    without, named = call(*words), call(*words, "--name", "t")
    assert (named.returncode, named.stdout, named.stderr) == (without.returncode, without.stdout, without.stderr)
    assert named.returncode == code
    if out is not None:
        assert named.stdout == out


def test_all_that_a_guest_prints_arrives() -> None:
    """4,000 lines, through a pipe, a file, and a reader that is slow at first."""
    words = ("run", "ticker", "--mem", "4M", "--append", "every=1 pages=16 rounds=400")
    expected = call(*words).stdout
    assert expected.count("\n") > 400
    assert call(*words, "--name", "t").stdout == expected
    assert json.loads(call(*words, "--name", "t", "--json").stdout)["console"] == expected
    done = subprocess.run(
        ["sh", "-c", f"{' '.join(COMMAND)} {words[0]} {words[1]} --name t --append '{words[-1]}' | (sleep 0.5; cat)"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT, check=False, env=environment(),
    )  # fmt: skip
    assert done.stdout.splitlines()[1:] == expected.splitlines()[1:]


def test_stdin_reaches_a_named_vm_whole() -> None:
    text = os.urandom(20000).replace(b"q", b"") + b"q"
    done = subprocess.run(
        [*COMMAND, *ECHO, "--name", "t"], input=text, capture_output=True, timeout=TIMEOUT, check=False,
        env=environment(),
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, text, b"")


def test_a_reader_that_goes_away_ends_a_named_run_too(base: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, *TICKER, "--name", "t"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        bufsize=0, env=environment(),
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    assert os.read(process.stdout.fileno(), 10)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(TIMEOUT) == -signal.SIGPIPE


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_named_run(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [*COMMAND, "run", "spin", "--name", "t"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=environment(),
    )  # fmt: skip
    wait_for(lambda: "t  " in ok("ls"))
    process.send_signal(number)
    out, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, out) == (128 + number, b"spin: for ever\n")
    assert err.startswith(b"pyhv: interrupted; vCPU 0")


def test_a_guest_that_nobody_reads_can_be_ended() -> None:
    """stdout is a pipe that is full: the guest waits. The control socket and signals work."""
    process = subprocess.Popen(
        [*COMMAND, *TICKER[:-1], "every=1 pages=16", "--name", "t"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=environment(),
    )  # fmt: skip
    wait_for(lambda: "t  " in ok("ls"))
    wait_for(lambda: (before := status("t")["counters"], time.sleep(0.3)) and status("t")["counters"] == before)
    ok("pause", "t")
    ok("resume", "t")
    assert len(rest_of_console("t")) > 32768
    started = time.monotonic()
    ok("stop", "t")
    # Nobody reads: what was not written is lost, and the process ends.
    process.wait(TIMEOUT)
    assert process.returncode == 0
    assert time.monotonic() - started < 10
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.stderr.close()


def rest_of_console(name: str) -> bytes:
    """What of the console is kept."""
    data = b""
    with client.Client(name) as connection:
        connection.call("console")
        deadline = time.monotonic() + 0.3
        while time.monotonic() < deadline:
            for answer in connection.exchange():
                data += client.jsonrpc.decode_bytes(answer.result["data"])
            time.sleep(0.01)
    return data


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("run", "nosuch"), "pyhv: nosuch: is neither a file nor a bundled guest; "),
        (("run", "hello", "--mem", "1"), "pyhv: memory 1: is too small"),
        (("run", "hello", "--cpus", "999"), "pyhv: 999 vCPUs: cannot be had"),
    ],
)
def test_errors_of_a_start_in_the_background(words: tuple[str, ...], error: str) -> None:
    done = call(*words, "--name", "t", "--detach")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(error) and done.stderr.count("\n") == 1


def test_detach_needs_a_name() -> None:
    done = call("run", "hello", "--detach")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "pyhv: --detach: needs --name; nobody could find the VM otherwise\n"


def test_detach_in_json() -> None:
    started = json.loads(ok(*TICKER, "--name", "t", "--detach", "--json"))
    assert started == {"name": "t", "pid": status("t")["pid"]}
    done = call(*TICKER, "--name", "t", "--detach", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["facts"]["problem"] == "is that of a VM that runs"
    ok("stop", "t")


def test_notes_of_a_start_in_the_background(unfaithful: None) -> None:
    done = call(*TICKER, "--compat", "--accel", "kvm", "--name", "t", "--detach")
    assert done.returncode == 0
    assert "runs in the background" in done.stdout
    assert done.stderr.startswith("pyhv: ") and "trap" in done.stderr
    assert status("t")["intercept"] == "trap" and status("t")["note"] in done.stderr
    ok("stop", "t")


def test_a_start_in_the_background_that_is_interrupted(base: Path) -> None:
    """At any moment: either the VM runs and can be stopped, or nothing is left."""
    for step in range(12):
        process = subprocess.Popen(
            [*COMMAND, *TICKER, "--name", "t", "--detach"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=environment(), start_new_session=True,
        )  # fmt: skip
        time.sleep(0.02 * step)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=TIMEOUT)
        assert b"internal error" not in err
        if b"runs in the background" in out:
            ok("stop", "t")
        else:
            assert process.returncode != 0
            if call("stop", "t").returncode == 0:  # it ran when its starter was interrupted
                assert process.returncode in (130, -signal.SIGINT, 1)
        assert_nothing_left(base)


@pytest.mark.parametrize("command", ["status", "pause", "resume", "stop", "console", "save"])
def test_unknown_names(command: str) -> None:
    detach("ticker", *TICKER)
    more = ("x.pyhv",) if command == "save" else ()
    done = call(command, "tickre", *more)
    said = "pyhv: tickre: there is no running VM of this name; did you mean ticker?\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)
    done = call(command, "a/b", *more)
    assert done.returncode == 2 and "pyhv: name a/b: is not a name for a VM; " in done.stderr
    ok("stop", "ticker")
    done = call(command, "ticker", *more)
    if command == "status":
        assert "stopped" in done.stdout and done.stderr == ""
    else:
        assert done.stderr.startswith("pyhv: ticker: has ended: stopped; ") and done.stderr.count("\n") == 1
    ok("clear", "ticker")
    done = call(command, "ticker", *more)
    assert done.stderr == "pyhv: ticker: there is no running VM of this name; none runs at all\n"


def test_two_vms_of_one_name() -> None:
    detach("t", *TICKER)
    for words in ((), ("--detach",)):
        done = call("run", "hello", "--name", "t", *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "pyhv: name t: is that of a VM that runs; choose another, or see pyhv ls\n"
    assert status("t")["state"] == "running"
    ok("stop", "t")
    detach("t", *TICKER)  # free again, at once
    ok("stop", "t")


def test_what_a_killed_vm_leaves(base: Path) -> None:
    for clean in ("ls", "status", "run"):
        pid = detach("t", *TICKER)
        detach("other", *TICKER)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not os.path.exists(f"/proc/{pid}/fd/0"))  # noqa: B023
        assert sorted(os.listdir(base / "pyhv")) == ["other.sock", "t.sock"]
        if clean == "ls":
            assert [line.split()[0] for line in ok("ls").splitlines()] == ["NAME", "other"]
        elif clean == "status":
            assert "was killed or has crashed" in ok("status", "t")
        else:
            assert ok("run", "hello", "--name", "t") == "hello from a pyhv guest\n"
        assert sorted(os.listdir(base / "pyhv")) == ["other.sock", "t.ended"]
        ok("stop", "other")


def test_a_stopped_process() -> None:
    pid = detach("t", *TICKER)
    detach("u", *TICKER)
    os.kill(pid, signal.SIGSTOP)
    try:
        rows = [line.split() for line in ok("ls").splitlines()]
        assert rows[1] == ["t", "no", "answer"]
        assert rows[2][:2] == ["u", "running"]
        with client.Client("t") as connection, pytest.raises(client.HostError, match="is its process stopped"):
            connection.status(within=0.2)
    finally:
        os.kill(pid, signal.SIGCONT)
    ok("stop", "t")
    ok("stop", "u")


def test_an_untrusted_runtime_directory(base: Path) -> None:
    (base / "pyhv").mkdir(mode=0o700)
    (base / "pyhv").chmod(0o777)
    for words in (("ls",), ("status", "t"), ("run", "hello", "--name", "t")):
        done = call(*words)
        assert done.returncode == 2
        assert "pyhv: has the mode 0777 instead of 0700; remove it, or set XDG_RUNTIME_DIR" in done.stderr
    (base / "pyhv").chmod(0o700)


def test_without_xdg_runtime_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    name = f"test-{os.getpid()}"
    detach(name, *TICKER)
    path = Path(f"/tmp/pyhv-{os.geteuid()}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o700 and (path / f"{name}.sock").is_socket()
    ok("stop", name)
    assert not (path / f"{name}.sock").exists()


def test_the_control_socket_costs_a_run_without_a_name_nothing() -> None:
    code = "import sys\nfrom pyhv.cli import main\nmain(['run', 'hello'])\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT, check=True)
    loaded = set(done.stdout.split())
    assert "pyhv.machine" in loaded
    assert not {"pyhv.control", "pyhv.cli.named", "json", "socket", "selectors", "subprocess"} & loaded


# ------------------------------------------------------------------------------------------------------ console


def test_console_of_a_vm_in_the_background() -> None:
    detach("t", *ECHO)
    with console("t") as one:
        assert one.stdin is not None and one.stdout is not None and one.stderr is not None
        one.stdin.write(b"ab\x01c")
        assert read_until(one, b"c") == b"ab\x01c"
        with console("t") as two:  # sees what was before, and does not type
            assert two.stdin is not None and two.stderr is not None
            assert two.stderr.readline() == b"pyhv: t: another console has the keys; this one only shows\n"
            assert read_until(two, b"c") == b"ab\x01c"
            two.stdin.write(b"zzz")
            one.stdin.write(b"d")
            assert read_until(two, b"d") == b"d"
            assert read_until(one, b"d") == b"d"
            two.stdin.close()
            one.stdin.write(b"q")
            for process in (one, two):
                assert process.stdout is not None and process.stderr is not None
                assert process.stdout.read() == b"q"
                assert process.stderr.read() == b"pyhv: t has ended: guest-exit\n"
                assert process.wait(TIMEOUT) == 0


def test_console_ends_with_the_guests_status() -> None:
    detach("t", "run", "ticker", "--mem", "4M", "--append", "rounds=3 every=1 pages=64", "--timeout", "50")
    done = call("console", "t")
    assert done.returncode in (0, 2)  # 2: it had ended before
    detach("t", "run", "spin", "--timeout", "1")
    done = call("console", "t")
    assert (done.returncode, done.stdout) == (124, "spin: for ever\n")
    assert done.stderr.startswith("pyhv: t has ended: timeout: the guest was still running; vCPU 0 at rip 0x1")


def test_console_on_a_terminal() -> None:
    detach("t", *ECHO)
    with Terminal("console", "t") as terminal:
        terminal.wait_until_raw()
        for keys in (b"abc", b"\x03", b"\x1a", b"\x04"):
            terminal.send(keys)
            terminal.read_until(keys)
        terminal.send(b"\x01h")
        terminal.read_until(b"Ctrl-A x: leave the console, the VM runs on")
        terminal.send(b"\x01\x01.")
        assert terminal.read_until(b".").endswith(b"\x01.")
        terminal.send(b"\x01x")
        assert terminal.wait() == 0
        assert terminal.settings == terminal.settings_before
    assert status("t")["state"] == "running"
    with Terminal("console", "t") as terminal:  # the keys are free again
        terminal.read_until(b"abc\x03\x1a\x04\x01.")
        terminal.wait_until_raw()
        terminal.send(b"q")
        assert terminal.wait() == 0
        assert terminal.settings == terminal.settings_before


def test_a_long_paste_at_a_console_reaches_the_guest_whole(tmp_path: Path) -> None:
    """A guest that is paused takes nothing meanwhile."""
    (tmp_path / "sums").write_bytes(SUMS)
    detach("t", "run", str(tmp_path / "sums"), "--boot", "flat", "--mem", "2M", "--accel", "kvm")
    ok("pause", "t")
    with Terminal("console", "t") as terminal:
        terminal.wait_until_raw()
        terminal.paste(LONG)
        ok("resume", "t")
        assert terminal.wait() == 0
        assert summed(LONG) in terminal.output
        assert b"lost" not in terminal.output


def test_what_a_guest_does_not_take_of_a_console_is_not_lost_without_a_word() -> None:
    detach("t", "run", "spin")
    with Terminal("console", "t") as terminal:
        terminal.wait_until_raw()
        terminal.paste(b"x" * (3 << 19))
        terminal.read_until(b"the guest does not take its input: what goes beyond 1 MiB of it is lost")
        terminal.send(b"\x01x")
        assert terminal.wait() == 0
        assert b"pyhv: t: the last that was typed is lost: the guest has not taken it\r\n" in terminal.output
    ok("stop", "t")


def test_a_named_vm_on_a_terminal_and_a_console_beside_it() -> None:
    with Terminal(*ECHO, "--name", "t") as terminal:
        terminal.wait_until_raw()
        terminal.send(b"here ")
        terminal.read_until(b"here ")
        with console("t") as beside:
            assert beside.stdin is not None and beside.stdout is not None and beside.stderr is not None
            assert read_until(beside, b"here ") == b"here "
            beside.stdin.write(b"there ")
            terminal.read_until(b"there ")
            assert read_until(beside, b"there ") == b"there "
            terminal.send(b"\x01x")
            assert terminal.wait() == 130
            assert terminal.settings == terminal.settings_before
            assert b"pyhv: t has ended: interrupted; vCPU 0" in beside.stderr.read()
            assert beside.wait(TIMEOUT) == 130


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_restore_the_terminal_of_a_console(number: signal.Signals) -> None:
    detach("t", *ECHO)
    with Terminal("console", "t") as terminal:
        terminal.wait_until_raw()
        terminal.process.send_signal(number)
        assert terminal.wait() == 0
        assert terminal.settings == terminal.settings_before
    ok("stop", "t")


def test_a_console_whose_vm_is_killed() -> None:
    pid = detach("t", *ECHO)
    with Terminal("console", "t") as terminal:
        terminal.wait_until_raw()
        os.kill(pid, signal.SIGKILL)
        assert terminal.wait() == 125
        assert b"pyhv: the control socket of t: its process has ended" in terminal.output
        assert terminal.settings == terminal.settings_before
    call("ls")


def test_a_long_input_is_not_lost() -> None:
    detach("t", *ECHO)
    text = os.urandom(30000).replace(b"q", b"") + b"q"
    done = subprocess.run(
        [*COMMAND, "console", "t"], input=text, capture_output=True, timeout=TIMEOUT, check=False, env=environment()
    )
    assert done.returncode == 0
    assert done.stdout == text
    assert done.stderr == b"pyhv: t has ended: guest-exit\n"


# --------------------------------------------------------------------------------------------------------- save


def test_save(tmp_path: Path) -> None:
    detach("t", *TICKER)
    wait_for(lambda: rounds_of("t") >= 1)
    path = tmp_path / "t.pyhv"
    done = subprocess.run(
        [*COMMAND, "save", "t", "t.pyhv"], cwd=tmp_path, capture_output=True, timeout=TIMEOUT, check=False,
        env=environment() | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert path.stat().st_size > 4 << 20
    before = rounds_of("t")
    assert status("t")["state"] == "running"
    wait_for(lambda: rounds_of("t") > before)
    assert json.loads(ok("save", "t", str(path), "--json")) == {"name": "t", "path": str(path), "stopped": False}
    ok("stop", "t")
    assert ok("verify", str(path)).endswith("of memory\n")


def test_a_paused_vm_stays_paused(tmp_path: Path) -> None:
    detach("t", *TICKER)
    ok("pause", "t")
    ok("save", "t", str(tmp_path / "f"))
    assert status("t")["state"] == "paused"
    before = status("t")["counters"]
    time.sleep(0.2)
    assert status("t")["counters"] == before
    ok("stop", "t")


def test_save_and_stop_and_restore(tmp_path: Path, base: Path) -> None:
    path = str(tmp_path / "f")
    detach("t", *TICKER[:-2], "--append", "every=1 rounds=600")
    with console("t") as watching:
        before = read_until(watching, b"round 2\n")
        assert ok("save", "t", path, "--stop") == ""
        assert os.listdir(base / "pyhv") == ["t.ended"]
        assert watching.stdout is not None and watching.stderr is not None
        before += watching.stdout.read()
        assert watching.stderr.read().startswith(b"pyhv: t has ended: stopped; vCPU 0 at rip 0x1")
        assert watching.wait(TIMEOUT) == 0
    # It goes on without a gap, in the middle of a line if need be.
    done = call("restore", path)
    assert done.returncode == 0
    rounds = [int(number) for number in re.findall(r"round (\d+)\n", before.decode() + done.stdout)]
    assert rounds == list(range(1, 601))


@pytest.mark.parametrize("more", [(), ("--stop",)])
def test_a_save_that_fails_changes_nothing(tmp_path: Path, more: tuple[str, ...]) -> None:
    detach("t", *TICKER)
    done = call("save", "t", str(tmp_path), *more)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"pyhv: {tmp_path}: is a directory; name a file\n"
    done = call("save", "t", str(tmp_path / "no" / "f"), *more)
    assert done.returncode == 2 and "cannot be written" in done.stderr
    before = rounds_of("t")
    assert status("t")["state"] == "running"
    wait_for(lambda: rounds_of("t") > before)
    ok("stop", "t")


# -------------------------------------------------------------------------------------------- hostile, and many


def test_a_hostile_client(base: Path) -> None:
    pid = detach("t", *TICKER)
    wait_for(lambda: rounds_of("t") >= 1)
    before = rounds_of("t")
    stuck = []
    for index in range(80):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(0.2)
        with contextlib.suppress(OSError):
            sock.connect(str(base / "pyhv" / "t.sock"))
            sock.sendall([b"x" * 100000, b"\xff\n" * 1000, b"[" * 60000 + b"\n", b'{"jsonrpc": ', b""][index % 5])
        stuck.append(sock)
    flood = b'{"jsonrpc":"2.0","method":"status","id":1}\n' * 5000
    for sock in stuck:
        with contextlib.suppress(OSError):
            sock.sendall(flood)
    assert status("t")["state"] == "running"
    wait_for(lambda: rounds_of("t") > before)
    ok("pause", "t")
    ok("resume", "t")
    with open(f"/proc/{pid}/status") as lines:
        assert int(re.findall(r"VmRSS:\s+(\d+) kB", lines.read())[0]) < 100 << 10
    for sock in stuck:
        sock.close()
    # Nothing turns in circles: with the VM paused the process sleeps.
    ok("pause", "t")
    time.sleep(0.2)
    used = processor_time(pid)
    time.sleep(0.5)
    assert processor_time(pid) - used < 0.1
    ok("stop", "t")


def processor_time(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_twenty_vms(base: Path) -> None:
    words = [*COMMAND, "run", "faults", "--append", "echo", "--mem", "2M", "--detach", "--name"]
    starting = [
        subprocess.Popen([*words, f"vm{i:02}"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment())
        for i in range(20)
    ]
    for process in starting:
        assert process.wait(TIMEOUT) == 0
    found = json.loads(ok("ls", "--json"))["vms"]
    assert [vm["name"] for vm in found] == [f"vm{index:02}" for index in range(20)]
    assert {vm["state"] for vm in found} == {"running"}
    assert len({vm["uuid"] for vm in found}) == len({vm["pid"] for vm in found}) == 20
    stopping = [
        subprocess.Popen([*COMMAND, "stop", vm["name"]], stdin=subprocess.DEVNULL, env=environment()) for vm in found
    ]
    for process in stopping:
        assert process.wait(TIMEOUT) == 0
    assert all(entry.endswith(".ended") for entry in os.listdir(base / "pyhv"))


def test_pause_resume_and_save_at_random(tmp_path: Path) -> None:
    """Many clients at once; the ticker, which notices what is lost, is none the worse."""
    detach("t", *TICKER)
    words = [("pause", "t"), ("resume", "t"), ("status", "t"), ("save", "t", str(tmp_path / "f")), ("resume", "t")]
    running = [
        subprocess.Popen([*COMMAND, *words[index % len(words)]], stdout=subprocess.DEVNULL, env=environment())
        for index in range(20)
    ]
    for process in running:
        assert process.wait(TIMEOUT) == 0
    ok("resume", "t")
    before = rounds_of("t")
    wait_for(lambda: rounds_of("t") > before)
    ok("stop", "t")


def test_the_checker_sees_what_is_left(base: Path) -> None:
    pid = detach("t", *TICKER)
    with pytest.raises(AssertionError):
        assert_nothing_left(base, 0.1)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not processes_of(base))
    with pytest.raises(AssertionError):  # the socket
        assert_nothing_left(base)
    ok("ls")


def test_few_descriptors() -> None:
    """A VM whose process has no descriptor for another connection goes on, and answers again when it has."""
    pid = detach("t", *TICKER)
    ok("pause", "t")  # what it uses of the processor now is the server's
    used = len(os.listdir(f"/proc/{pid}/fd"))
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used, limits[1]))
    with names.connect("t"):
        before = processor_time(pid)
        time.sleep(0.5)
        assert processor_time(pid) - before < 0.2
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        assert status("t")["state"] == "paused"
    ok("stop", "t")
