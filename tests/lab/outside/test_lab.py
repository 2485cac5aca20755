"""The lab's own promises, on real hosts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.lab import cache, process
from tests.lab.errors import CommandTimeout, HostFailed
from tests.lab.lab import Lab
from tests.lab.qemu import QemuHost


def emulators(parent: int) -> set[int]:
    """The process ids of the emulators that a process has started: others may use the lab at the same time."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # pid (comm) state ppid ...
            head, _, tail = (folder / "stat").read_text().rpartition(")")
        except OSError:
            continue
        if int(tail.split()[1]) == parent and head.partition("(")[2].startswith(("qemu-system", "bochs")):
            found.add(int(folder.name))
    return found


def alive(pids: set[int]) -> set[int]:
    """Which of these still are the emulators they were."""
    names = {pid: Path(f"/proc/{pid}/comm") for pid in pids}
    return {pid for pid, comm in names.items() if comm.exists() and comm.read_text()[:4] in ("qemu", "boch")}


@pytest.fixture(scope="session")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """guest/probe.c, compiled for any host."""
    target = tmp_path_factory.mktemp("probe") / "probe"
    source = Path(__file__).resolve().parents[1] / "guest" / "probe.c"
    subprocess.run(["gcc", "-static", "-O2", "-o", str(target), str(source)], check=True, timeout=120)
    return target


def test_a_guest_of_each_host_reads_exactly_its_table(lab: Lab, amd: list[str], probe: Path) -> None:
    for host in lab.start(*amd):
        host.put({"probe": probe})
        result = host.run(["/tmp/probe"])
        assert result.status == 0, f"{host.name}: {result.text}"


def test_commands(lab: Lab, amd: list[str]) -> None:
    host = lab.start_one(amd[0])
    result = host.run(["sh", "-c", "cat; echo err >&2; exit 3"], stdin=b"in\n")
    assert (result.status, result.stdout, result.stderr) == (3, b"in\n", b"err\n")
    assert host.run(["sh", "-c", "kill -9 $$"]).status == -9
    with pytest.raises(FileNotFoundError):
        host.run(["no-such-command"])
    with pytest.raises(CommandTimeout, match="before the end"):
        host.run(["sh", "-c", "echo before the end; sleep 1000"], timeout=0.5)
    # What a command leaves behind in its process group is gone with it, and the host goes on.
    host.run(["sh", "-c", "sleep 12345 & exit 0"])
    assert "12345" not in host.run(["ps"]).text
    # Two at once, one of them talked to.
    talker, other = host.start(["cat"], stdin=True), host.start(["echo", "meanwhile"])
    assert other.wait().stdout == b"meanwhile\n"
    talker.send(b"hello\n")
    talker.wait_for(b"hello\n")
    talker.end_input()
    assert talker.wait().status == 0


def test_files_in_and_out(lab: Lab, amd: list[str], tmp_path: Path) -> None:
    host = lab.start_one(amd[0])
    content = os.urandom(3_000_000)
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "deep" / "file").write_bytes(content)
    host.put({"here": tmp_path / "folder", "text": b"#!/bin/sh\necho ran\n"}, "/tmp/new/place")
    assert host.run(["/tmp/new/place/text"]).stdout == b"ran\n"
    host.get("/tmp/new/place/here", tmp_path / "back")
    assert (tmp_path / "back" / "deep" / "file").read_bytes() == content


def test_restored_hosts_are_not_the_same(lab: Lab, amd: list[str]) -> None:
    one, two = lab.start(amd[0], amd[0])
    read = ["cat", "/proc/sys/kernel/random/uuid"]
    assert one.run(read).text != two.run(read).text
    for host in (one, two):
        assert abs(float(host.run(["date", "+%s"]).text) - time.time()) < 30


def test_amd_hosts_talk_over_their_network(lab: Lab, amd: list[str]) -> None:
    one, two = lab.start(*amd[:2], connected=True)
    assert isinstance(one, QemuHost)
    # With a standard input that stays open: at its end this nc would close the connection.
    listener = two.start(["nc", "-l", "-p", "7000"], stdin=True)
    deadline = time.monotonic() + 30
    while "7000" not in two.run(["netstat", "-tln"]).text:
        assert time.monotonic() < deadline
    data = os.urandom(2_000_000)
    assert one.run(["nc", "-w", "20", two.address, "7000"], stdin=data).status == 0
    assert listener.wait().stdout == data
    one.set_link(False)
    assert one.run(["ping", "-c", "1", "-W", "1", two.address]).status != 0
    one.set_link(True)
    # The carrier may take a moment to come back.
    assert one.run(["ping", "-c", "10", "-W", "5", two.address]).status == 0


def test_another_tsc_rate_is_another_clock(lab: Lab, amd: list[str]) -> None:
    """Its seconds are 1.25 of ours: what its KVM calls a kHz of TSC is as much more."""
    usual, other = lab.start("amd-epyc", "amd-epyc-tsc")
    rates = []
    for host in (usual, other):
        text = host.run(["dmesg"]).text
        line = next(line for line in reversed(text.splitlines()) if "tsc: Detected" in line)
        rates.append(float(line.split("Detected")[1].split()[0]))
    assert rates[1] / rates[0] == pytest.approx(1.25, rel=1e-3)


def test_intel_hosts_talk_over_their_cable(lab: Lab, intel: list[str], probe: Path) -> None:
    one, two = lab.start(*intel[:2], connected=True)
    setup = ["sh", "-c", "stty -F /dev/ttyS1 raw -echo 115200; echo set"]
    for host in (one, two):
        assert host.run(setup).stdout == b"set\n"
        host.put({"probe": probe})
        result = host.run(["/tmp/probe"])
        assert result.status == 0, f"{host.name}: {result.text}"
    reader = two.start(["sh", "-c", "echo ready; head -c 1000 /dev/ttyS1"])
    reader.wait_for(b"ready\n")
    data = bytes(range(250)) * 4
    assert one.run(["sh", "-c", "cat > /dev/ttyS1"], stdin=data).status == 0
    assert reader.wait(120).stdout == b"ready\n" + data
    assert lab.link.passed == [1000, 0]


def test_a_host_that_dies_says_so_and_leaves_nothing(lab: Lab, amd: list[str]) -> None:
    host = lab.start_one(amd[0])
    command = host.start(["sh", "-c", "echo 'last words' > /dev/console; echo c > /proc/sysrq-trigger"])
    with pytest.raises(HostFailed) as caught:
        command.wait(60)
    text = str(caught.value)
    assert text.startswith(f"{amd[0]}: died: its emulator exited with status")
    assert "Kernel panic" in text or "</TASK>" in text, text
    log = Path(caught.value.log).read_text(errors="replace")
    assert "last words" in log and "sysrq triggered crash" in log
    assert not emulators(os.getpid())
    with pytest.raises(HostFailed):
        host.run(["true"])


def test_a_host_that_hangs_is_ended(lab: Lab, amd: list[str]) -> None:
    host = lab.start_one(amd[0])
    assert isinstance(host, QemuHost)
    host.pause()
    with pytest.raises(HostFailed, match="hangs: a command did not end within"):
        host.run(["true"], timeout=0.5)
    assert not emulators(os.getpid())


def test_a_host_that_cannot_start_is_named(lab: Lab, amd: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QemuHost, "_arguments", lambda self: ["qemu-system-x86_64", "-M", "nonsense"])
    with pytest.raises(HostFailed) as caught:
        lab.start(amd[0])
    assert str(caught.value).startswith(f"{amd[0]}: died: QEMU exited with status 1")
    assert "unsupported machine type" in str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("what", ["run", "test"])
def test_nothing_is_left_when_the_lab_is_killed(amd: list[str], what: str, number: int) -> None:
    command = [sys.executable, "-m", "tests.lab", what]
    command += [amd[0], "--", "sleep", "1000"] if what == "run" else ["--inside", "--kinds", amd[0]]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as victim:
        deadline = time.monotonic() + 60
        while not (started := emulators(victim.pid)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        victim.send_signal(number)
        assert victim.wait(20) == (-number if number == signal.SIGKILL else 128 + number)
    deadline = time.monotonic() + 20
    while alive(started):
        assert time.monotonic() < deadline, "an emulator outlives the lab"
        time.sleep(0.05)


def test_an_interrupted_snapshot_is_not_taken_for_one(amd: list[str], tmp_path: Path) -> None:
    """A cache whose maker was killed half-way: the next maker starts again and gets a good one."""
    real = cache.root()
    for item in real.iterdir():
        if item.name not in ("logs", "locks", "unfinished") and not item.name.startswith("snapshot-"):
            (tmp_path / item.name).symlink_to(item)
    environment = {**os.environ, "PYHV_LAB_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "tests.lab", "run", amd[0], "--", "echo", "came up"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as victim:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("unfinished/snapshot-*/ram")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.5)
        victim.kill()
    assert list(tmp_path.glob("unfinished/snapshot-*/ram"))
    assert not list(tmp_path.glob("snapshot-*"))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "came up\n"), done.stderr
    assert not list(tmp_path.glob("unfinished/snapshot-*"))


def test_stop_all_is_thorough(lab: Lab, amd: list[str]) -> None:
    lab.start(amd[0], amd[1])
    assert len(emulators(os.getpid())) == 2
    process.stop_all()
    assert not emulators(os.getpid())
