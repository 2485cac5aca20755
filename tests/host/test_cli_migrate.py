"""`pyhv migrate` and `pyhv receive`, as a user has them. No process, no name and no socket is left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

import pyhv
from pyhv.control import names
from pyhv.control.client import Client
from pyhv.errors import BadInput, HostError
from pyhv.migration import protocol
from pyhv.migration.protocol import Ready, Running, Type

from .cli import COMMAND, IN_THE_LAB, LAB_REASON, TIMEOUT, Terminal, call, environment
from .frames import Speaker
from .migration import APPEND, check_console, greet, take_all
from .named import detach, ok, processes_of, read_until, rounds_of, status, wait_for

if IN_THE_LAB:
    pytest.skip(LAB_REASON, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("base")

TICKER = ("run", "ticker", "--mem", "3M", "--append", APPEND)
HEAVY = ("run", "ticker", "--mem", "20M", "--append", "pages=4000 every=1")


def receiver(*words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*COMMAND, "receive", *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment(), bufsize=0,
    )  # fmt: skip


def waiting(path: Path, *words: str) -> subprocess.Popen[bytes]:
    """A receiver that waits at unix:PATH."""
    process = receiver(f"unix:{path}", *words)
    wait_for(path.exists)
    return process


def migrate(*words: str) -> str:
    """What `pyhv migrate` prints when it goes through, however busy this machine is."""
    done = call("migrate", *words, "--silence", "10")
    assert done.returncode == 0, done
    return done.stdout


def test_a_vm_and_its_name_move(tmp_path: Path) -> None:
    source = subprocess.Popen(
        [*COMMAND, *TICKER, "--name", "t"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment(), bufsize=0,
    )  # fmt: skip
    console = read_until(source, b"round 2\n")
    before = status("t")
    there = waiting(tmp_path / "m")
    said = migrate("t", f"unix:{tmp_path}/m")
    form = r"t: migrated in \d+\.\d\d s, of which the guest stood \d+\.\d ms; \d+ rounds, [\d.]+ [KM]iB sent, at .*/s\n"
    assert re.fullmatch(form, said), said
    rest, error = source.communicate(timeout=TIMEOUT)
    assert source.returncode == 0
    assert error.decode() == f"pyhv: migrated to unix:{tmp_path}/m\n"

    after = status("t")  # the same name leads to it
    assert after["pid"] == there.pid != before["pid"]
    assert (after["uuid"], after["state"], after["image"]) == (before["uuid"], "running", "ticker")
    wait_for(lambda: rounds_of("t") > 20)
    ok("stop", "t")
    out, error = there.communicate(timeout=TIMEOUT)
    assert there.returncode == 0 and error.startswith(b"pyhv: stopped; ")
    assert check_console(console + rest + out) > 20
    assert os.listdir(tmp_path) == ["run"]


def test_the_name_leads_to_one_of_the_two_at_every_moment(tmp_path: Path) -> None:
    detach("t", *TICKER)
    wait_for(lambda: rounds_of("t") >= 2)
    there = waiting(tmp_path / "m")
    missing: list[BadInput] = []
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            try:
                names.connect("t").close()
            except BadInput as error:
                missing.append(error)
            time.sleep(0.0005)  # its backlog must not be full when the receiver looks

    thread = threading.Thread(target=look)
    thread.start()
    migrate("t", f"unix:{tmp_path}/m")
    assert status("t")["pid"] == there.pid
    over.set()
    thread.join()
    assert missing == []
    ok("stop", "t")
    there.communicate(timeout=TIMEOUT)


def test_json(tmp_path: Path) -> None:
    pid = detach("t", *HEAVY)
    there = waiting(tmp_path / "m", "--json")
    wait_for(lambda: rounds_of("t") >= 1)
    limits = ("--bandwidth", "40M", "--rounds", "2", "--on-timeout", "stop")
    done = call("migrate", "t", f"unix:{tmp_path}/m", "--json", "--silence", "10", *limits)
    last, progress = json.loads(done.stdout), [json.loads(line) for line in done.stderr.splitlines()]
    assert (last["name"], last["uri"]) == ("t", f"unix:{tmp_path}/m")
    assert progress[0]["progress"] == "migrate" and set(progress[0]) == {"progress", *protocol_progress()}
    assert last["bytes"] > 16 << 20 and last["rounds"] >= 1 and last["one_clock"] is True
    assert 0 < last["downtime"] < last["total_time"]
    assert status("t")["pid"] == there.pid
    wait_for(lambda: not os.path.exists(f"/proc/{pid}"))
    ok("stop", "t")
    out, error = there.communicate(timeout=TIMEOUT)
    result = json.loads(out)
    assert (result["cause"], result["status"]) == ("stopped", 0) and error.startswith(b"pyhv: stopped; ")
    assert "round" in result["console"]


def protocol_progress() -> tuple[str, ...]:
    from pyhv.migration.source import Progress

    return Progress._fields


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    detach("t", *HEAVY)
    there = waiting(tmp_path / "m")
    wait_for(lambda: rounds_of("t") >= 1)
    with Terminal("migrate", "t", f"unix:{tmp_path}/m", "--bandwidth", "20M", "--downtime", "10000") as terminal:
        terminal.read_until(b"round 1 [")
        terminal.read_until(b"left")
        terminal.read_until(b"guest writes")
        terminal.read_until(b"would stand")
        assert terminal.wait() == 0, terminal.output
        assert b"t: migrated in" in terminal.output
    ok("stop", "t")
    there.communicate(timeout=TIMEOUT)


def run_json() -> subprocess.Popen[str]:
    """A VM in the foreground, which runs."""
    process = subprocess.Popen(
        [*COMMAND, *TICKER, "--name", "t", "--json"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    wait_for(lambda: call("status", "t").returncode == 0)
    return process


def check_migrated(run: subprocess.Popen[str], peer: str) -> None:
    """What it says in the end."""
    out, _ = run.communicate(timeout=TIMEOUT)
    result = json.loads(out)
    assert (result["cause"], result["status"], run.returncode) == ("migrated", 0, 0)
    assert result["message"] == f"migrated to {peer}"


def test_json_tells_how_the_run_at_the_source_ended(tmp_path: Path) -> None:
    source = run_json()
    there = waiting(tmp_path / "m", "--name", "other", "--detach")
    migrate("t", f"unix:{tmp_path}/m")
    check_migrated(source, f"unix:{tmp_path}/m")
    said, _ = there.communicate(timeout=TIMEOUT)
    assert re.fullmatch(rb"other runs in the background, pid \d+\n", said)
    assert status("other")["state"] == "running"
    ok("stop", "other")


def test_ssh_by_a_command_that_stays_here(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The receiver inherits its runtime directory from what stands for ssh: that is another host's."""
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    script = tmp_path / "ssh"
    script.write_text(f"#!/bin/sh\necho \"$1\" > {tmp_path}/host\nshift\nXDG_RUNTIME_DIR={other} exec sh -c \"$*\"\n")
    script.chmod(0o700)
    detach("t", *TICKER)  # before: what counts is the environment of pyhv migrate
    monkeypatch.setenv("PYHV_SSH", str(script))
    monkeypatch.setenv("PYHV_REMOTE", " ".join(COMMAND))
    wait_for(lambda: rounds_of("t") >= 1)
    try:
        migrate("t", "ssh://me@there")
        assert (tmp_path / "host").read_text() == "me@there\n"
        wait_for(lambda: ok("ls").count("\n") == 1)
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(other))
        wait_for(lambda: rounds_of("t") >= 3)
        assert os.readlink(f"/proc/{status('t')['pid']}/fd/0") == "/dev/null"
    finally:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(other))
        call("stop", "t")
    wait_for(lambda: not processes_of(other))


def test_ssh_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "ssh"
    script.write_text("#!/bin/sh\necho 'ssh: connect to host there port 22: Connection refused' >&2\nexit 255\n")
    script.chmod(0o700)
    monkeypatch.setenv("PYHV_SSH", str(script))
    detach("t", *TICKER)
    done = call("migrate", "t", "ssh://there")
    assert done.returncode in (2, 125)
    assert "ssh: connect to host there port 22: Connection refused" in done.stderr
    assert status("t")["state"] == "running"
    ok("stop", "t")


def interrupt_migrate(tmp_path: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*COMMAND, "migrate", "t", f"unix:{tmp_path}/m", "--bandwidth", "1M", "--json"], stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), bufsize=0,
    )  # fmt: skip


def test_ctrl_c_of_migrate_leaves_it_running(tmp_path: Path) -> None:
    detach("t", *HEAVY)
    there = waiting(tmp_path / "m")
    command = interrupt_migrate(tmp_path)
    assert command.stderr is not None
    assert b"progress" in command.stderr.readline()
    assert status("t")["doing"] == "migrate"
    command.send_signal(signal.SIGINT)
    command.communicate(timeout=TIMEOUT)
    assert command.returncode == 130
    _, error = there.communicate(timeout=TIMEOUT)
    assert there.returncode == 125
    assert b"the source: gave the migration up: t: was not migrated; the VM ended, or nobody waits for it any" in error
    assert status("t")["doing"] is None and status("t")["state"] == "running"
    before = rounds_of("t")
    wait_for(lambda: rounds_of("t") > before)
    ok("stop", "t")


def test_a_paused_vm_moves_and_stays_paused(tmp_path: Path) -> None:
    detach("t", *TICKER)
    wait_for(lambda: rounds_of("t") >= 2)
    ok("pause", "t")
    there = waiting(tmp_path / "m")
    migrate("t", f"unix:{tmp_path}/m")
    assert (status("t")["pid"], status("t")["state"]) == (there.pid, "paused")
    assert rounds_of("t") == 0
    ok("resume", "t")
    wait_for(lambda: rounds_of("t") >= 3)
    ok("stop", "t")
    there.communicate(timeout=TIMEOUT)


def test_receive_forever(tmp_path: Path) -> None:
    """VM after VM, also where one of them is none, until a signal; then those that came run on."""
    detach("a", *TICKER)
    detach("b", *TICKER)
    there = receiver("tcp://127.0.0.1:0", "--forever")
    assert there.stderr is not None
    where = there.stderr.readline().decode().split()[-1]
    port = int(where.rpartition(":")[2])
    before = {name: status(name)["pid"] for name in "ab"}
    migrate("a", where)
    with socket.create_connection(("127.0.0.1", port)) as nobody:
        nobody.sendall(b"GET / HTTP/1.0\r\n\r\n" * 10)
        with contextlib.suppress(ConnectionError):
            nobody.recv(1)
    migrate("b", where)
    for name in "ab":
        assert status(name)["pid"] not in (before[name], there.pid)
        wait_for(lambda name=name: rounds_of(name) >= 2)  # type: ignore[misc]
    there.send_signal(signal.SIGTERM)
    out, _ = there.communicate(timeout=TIMEOUT)
    assert there.returncode == 143
    assert re.fullmatch(rb"a runs in the background, pid \d+\nb runs in the background, pid \d+\n", out), out
    for name in "ab":
        assert status(name)["state"] == "running"
        ok("stop", name)


def test_migrate_cancel(tmp_path: Path) -> None:
    detach("t", *HEAVY)
    for words in (("migrate", "t", "--cancel"), ("migrate", "t", "unix:m", "--cancel"), ("migrate", "t")):
        assert call(*words).returncode == 2
    assert call("migrate", "t", "--cancel").stderr == "pyhv: t: is not being migrated; pyhv status tells about it\n"
    there = waiting(tmp_path / "m")
    command = interrupt_migrate(tmp_path)
    assert command.stderr is not None and b"progress" in command.stderr.readline()
    assert ok("migrate", "t", "--cancel") == "t: its migration is cancelled; it stays here\n"
    _, error = command.communicate(timeout=TIMEOUT)
    assert command.returncode == 130 and b"it was cancelled; the VM stays here" in error
    _, error = there.communicate(timeout=TIMEOUT)
    assert there.returncode == 125 and b"the source: gave the migration up: migration to unix:" in error
    assert status("t")["state"] == "running"
    before = rounds_of("t")
    wait_for(lambda: rounds_of("t") > before)
    ok("stop", "t")


@pytest.mark.parametrize("uri", ["tcp://127.0.0.1:0", "unix"])
def test_a_name_is_not_given_to_who_says_that_he_has_it(tmp_path: Path, uri: str) -> None:
    """A source that names the process of a running VM as its own."""
    pid = detach("t", *TICKER)
    there = receiver(f"unix:{tmp_path}/m" if uri == "unix" else uri)
    if uri == "unix":
        wait_for((tmp_path / "m").exists)
        where = f"unix:{tmp_path}/m"
    else:
        assert there.stderr is not None
        where = there.stderr.readline().decode().split()[-1]
    with pyhv.Machine("ticker", append="every=1", memory="4M") as machine:
        machine.start()
        lie = {"getpid": lambda: pid}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(protocol, "os", types.SimpleNamespace(**lie))
            with pytest.raises(pyhv.PyhvError):
                machine.migrate(where, name="t")
        assert machine.vm.running
    _, error = there.communicate(timeout=TIMEOUT)
    assert there.returncode == 2 and b"name t: is that of a VM that runs" in error
    assert status("t")["pid"] == pid and status("t")["state"] == "running"
    ok("stop", "t")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ending_receive_leaves_it_running(tmp_path: Path, number: int) -> None:
    detach("t", *HEAVY)
    there = waiting(tmp_path / "m")
    command = interrupt_migrate(tmp_path)
    assert command.stderr is not None
    assert b"progress" in command.stderr.readline()
    there.send_signal(number)
    _, error = command.communicate(timeout=TIMEOUT)
    assert command.returncode in (2, 125)
    broken = rb"pyhv: migration to unix:\S+: Broken pipe, .*; the VM runs on here\n"
    assert re.search(rb"gave the migration up|" + broken, error), error
    there.communicate(timeout=TIMEOUT)
    assert there.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert status("t")["state"] == "running"
    before = rounds_of("t")
    wait_for(lambda: rounds_of("t") > before)
    ok("stop", "t")
    ok("ls")  # removes what the killed one left


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ending_a_receiver_that_waits(tmp_path: Path, number: int) -> None:
    there = waiting(tmp_path / "m")
    there.send_signal(number)
    there.communicate(timeout=TIMEOUT)
    assert there.returncode == 128 + number
    assert os.listdir(tmp_path) == ["run"]


def test_a_second_migration_at_once_is_refused(tmp_path: Path) -> None:
    detach("t", *HEAVY)
    there = waiting(tmp_path / "m")
    command = interrupt_migrate(tmp_path)
    assert command.stderr is not None
    assert b"progress" in command.stderr.readline()
    done = call("migrate", "t", f"unix:{tmp_path}/other")
    assert (done.returncode, done.stderr) == (2, "pyhv: t: is being migrated already; pyhv status tells about it\n")
    ok("stop", "t")  # whoever ends it does not wait for the other end
    command.communicate(timeout=TIMEOUT)
    assert command.returncode != 0
    there.communicate(timeout=TIMEOUT)
    assert there.returncode == 125


def take(speaker: Speaker) -> None:
    """Says what a destination says, until the VM is its own."""
    greet(speaker)
    take_all(speaker)
    speaker.say(*protocol.encode(Ready()))
    assert speaker.hear().kind == Type.COMMIT


def is_ending() -> bool:
    """Whether the VM that is being migrated takes no more calls, since it is about to end."""
    done = call("pause", "t")
    if done.stderr == "pyhv: t: is being migrated; pyhv status tells about it\n":
        return False
    assert (done.returncode, done.stderr) == (2, "pyhv: t: has come to its end\n")
    return True


def test_ending_a_vm_that_is_handed_over_says_that_it_has_moved(tmp_path: Path) -> None:
    source = run_json()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/m")
        listener.listen()
        words = ("migrate", "t", f"unix:{tmp_path}/m", "--silence", "60")
        command = subprocess.Popen([*COMMAND, *words], env=environment())
        sock, _ = listener.accept()
    with sock:
        speaker = Speaker(sock)
        take(speaker)
        source.send_signal(signal.SIGTERM)
        wait_for(is_ending)
        speaker.say(*protocol.encode(Running("another host", 0)))
        check_migrated(source, f"unix:{tmp_path}/m")
    assert command.wait(TIMEOUT) == 0


def test_after_a_commit_without_an_answer_only_force_lets_it_run(tmp_path: Path) -> None:
    detach("t", *TICKER)
    wait_for(lambda: rounds_of("t") >= 2)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{tmp_path}/m")
    listener.listen()

    def take_and_vanish() -> None:
        sock, _ = listener.accept()
        with sock:
            take(Speaker(sock))

    thread = threading.Thread(target=take_and_vanish)
    thread.start()
    done = call("migrate", "t", f"unix:{tmp_path}/m")
    thread.join(TIMEOUT)
    listener.close()
    assert done.returncode == 125
    assert "the VM was handed over and may run there, but no answer came (" in done.stderr
    assert "here it is paused; look there; only if it does not run there: pyhv resume NAME --force\n" in done.stderr
    assert status("t")["state"] == "handed-over"
    counted = rounds_of("t")
    for words in (("resume", "t"), ("migrate", "t", f"unix:{tmp_path}/m"), ("save", "t", f"{tmp_path}/s")):
        refused = call(*words)
        assert refused.returncode == 2
        assert f"was handed over to unix:{tmp_path}/m, and may run there: it cannot be " in refused.stderr
    time.sleep(0.1)
    assert rounds_of("t") == counted
    ok("resume", "t", "--force")
    wait_for(lambda: rounds_of("t") > counted)
    there = waiting(tmp_path / "n")
    migrate("t", f"unix:{tmp_path}/n")  # and later it goes
    ok("stop", "t")
    there.communicate(timeout=TIMEOUT)
    os.unlink(tmp_path / "m")


def test_the_control_socket_says_what_it_was(tmp_path: Path) -> None:
    detach("t", *TICKER)
    with Client("t") as client:
        with pytest.raises(BadInput, match="cannot be reached"):
            client.migrate(f"unix:{tmp_path}/nobody")
        with pytest.raises(BadInput, match="downtime -1"):
            client.migrate(f"unix:{tmp_path}/nobody", {"downtime": -1})
        with pytest.raises(BadInput, match="time limits: do not fit"):
            client.migrate(f"unix:{tmp_path}/nobody", {"silence": 0.1})
        with pytest.raises(BadInput, match="is of no kind that pyhv knows"):
            client.migrate("http://nobody")
        with pytest.raises(HostError, match="uri"):
            client.call("migrate")
    ok("stop", "t")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("migrate", "t", "x"), "x: is no URI; name unix:PATH"),
        (("migrate", "t", "fd:3"), "fd:3: descriptor 3 is not open"),
        (("migrate", "t", "-"), "-: names descriptors of this process"),
        (("migrate", "t", "tcp://192.0.2.1:9"), "would send a VM's memory unprotected, and take anybody's"),
        (("migrate", "t", "unix:x", "--bandwidth", "0"), "is no rate; give bytes a second, such as 100M"),
        (("migrate", "t", "unix:x", "--bandwidth", "nan"), "is no rate"),
        (("migrate", "t", "unix:x", "--downtime", "-1"), "is not a time that is not negative, such as 20ms"),
        (("migrate", "t", "unix:x", "--on-timeout", "maybe"), "--on-timeout"),
        (("migrate", "nobody", "unix:x"), "there is no running VM of this name"),
        (("receive", "ssh://there"), "cannot be listened at; the source runs pyhv receive - here by itself"),
        (("receive", "tls://localhost:0"), "needs certificates; give --tls-cert, --tls-key and --tls-ca"),
        (("receive", "tcp://0.0.0.0:0"), "take anybody's"),
        (("receive", "unix:/no/such/folder/x"), "cannot be listened at: No such file or directory"),
        (("receive", "unix:x", "--name", "a b"), "is not a name for a VM"),
        (("receive", "fd:1"), "fd:1: descriptor 1 is not open for reading; name one that is open both ways"),
        (("receive", "-", "--json"), "cannot be combined with -; stdout is the link"),
        (("receive", "tty:/dev/null"), "is no serial line"),
    ],
)
def test_what_is_refused(words: tuple[str, ...], said: str) -> None:
    done = call(*words)
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1], done.stderr


def test_nobody_comes() -> None:
    done = call("receive", "tcp://localhost:0", "--wait", "0.05")
    assert done.returncode == 124
    said = "pyhv: tcp://localhost:0: nobody came within 0.05 seconds; start pyhv migrate at the source"
    assert done.stderr.splitlines()[-1] == said


def test_a_name_that_another_vm_took_meanwhile(tmp_path: Path, base: Path) -> None:
    """Same name, other VM: refused before anything moves."""
    detach("t", *TICKER)
    detach("u", *TICKER)
    there = waiting(tmp_path / "m", "--name", "u")
    done = call("migrate", "t", f"unix:{tmp_path}/m")
    assert done.returncode == 2 and "name u: is that of a VM that runs" in done.stderr
    _, error = there.communicate(timeout=TIMEOUT)
    assert there.returncode == 2 and b"name u: is that of a VM that runs" in error
    assert status("t")["state"] == "running"
    ok("stop", "t")
    ok("stop", "u")


def test_without_a_name(tmp_path: Path) -> None:
    """A guest from Python that has no name ends up in a receiver without one, whose exit status is the guest's."""
    code = (
        "import sys, pyhv\nwith pyhv.Machine('ticker', memory='3M', append='pages=64 every=9 rounds=3600') as m:\n"
        "    m.start()\n    m.migrate(sys.argv[1])\n"
    )
    there = waiting(tmp_path / "m")
    done = subprocess.run(
        [sys.executable, "-c", code, f"unix:{tmp_path}/m"], capture_output=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == 0, done.stderr
    out, error = there.communicate(timeout=TIMEOUT)
    assert (there.returncode, error) == (0, b"")
    assert b"ticker: round 3600\n" in out


def test_a_port_that_the_host_chooses() -> None:
    there = receiver("tcp://127.0.0.1:0")
    assert there.stderr is not None
    said = there.stderr.readline().decode()
    match = re.fullmatch(r"pyhv: waiting at (tcp://127\.0\.0\.1:\d+)\n", said)
    assert match, said
    detach("t", *TICKER)
    migrate("t", match[1])
    wait_for(lambda: status("t")["pid"] == there.pid)
    ok("stop", "t")
    there.communicate(timeout=TIMEOUT)
