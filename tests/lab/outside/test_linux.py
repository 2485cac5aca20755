"""Debian's Linux under pyhv on real kvm_amd and kvm_intel: it boots, finds its devices, and each of its ends has its
cause."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab import code, linux
from tests.lab.host import Host

from .conftest import newest
from .test_generations import SHOWN
from .test_linux_ride import HIDDEN

FOLDER = "/tmp/linux"
#: Of a guest with 256 MiB. noxsave: QEMU does not intercept a nested guest's XSETBV (README.md).
LINE = "console=ttyS0 quiet panic=-1 noxsave"


def started(vendor: str, *images: str) -> Iterator[Host]:
    """The newest host, and the Linux guest in it."""
    for one in newest(vendor):
        one.put({name: linux.guest() / name for name in (*images, "initrd")}, FOLDER)
        yield one


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    yield from started("amd", "vmlinuz", "vmlinux")


@pytest.fixture(scope="module")
def intel_host() -> Iterator[Host]:
    yield from started("intel", "vmlinuz")


def boot(host: Host, image: str, line: str = "", *options: str) -> tuple[Any, dict[str, str]]:
    """What `pyhv run --json` says of a guest, and what the guest says of itself."""
    command = ["python3", "-m", "pyhv", "run", f"{FOLDER}/{image}", "--initrd", f"{FOLDER}/initrd", "--mem", "256M"]
    command += ["--append", f"{LINE} {line}".strip(), "--json", "--timeout", "300", *options]
    done = host.run(command, timeout=400, env=code.ENVIRONMENT)
    assert done.stdout, done.stderr
    result = json.loads(done.stdout)
    assert result["status"] == done.status, result
    return result, dict(re.findall(r"^linux: (\S+) ?(.*?)\r?$", result["console"], re.MULTILINE))


@pytest.mark.parametrize(("image", "cpus"), [("vmlinux", 1), ("vmlinuz", 1), ("vmlinux", 4), ("vmlinux", 64)])
def test_linux_boots_and_switches_itself_off(host: Host, image: str, cpus: int) -> None:
    check_whole(boot(host, image, "", "--cpus", str(cpus)), cpus)


def test_a_process_takes_little_beyond_the_guests_memory(host: Host) -> None:
    command = ["python3", "-m", "pyhv", "run", f"{FOLDER}/vmlinux", "--initrd", f"{FOLDER}/initrd", "--mem", "256M"]
    command += ["--append", f"{LINE} do=sleep", "--cpus", "4", "--name", "t"]
    running = host.start(command, env=code.ENVIRONMENT)
    running.wait_for(b"linux: pages", 300)
    status = host.run(["python3", "-m", "pyhv", "status", "t", "--json"], env=code.ENVIRONMENT, check=True)
    maps = host.run(["cat", f"/proc/{json.loads(status.stdout)['pid']}/smaps"], check=True).text
    host.run(["python3", "-m", "pyhv", "stop", "t"], env=code.ENVIRONMENT, check=True)
    running.wait()
    found = re.findall(r"^Size: +(\d+) kB.*?^Rss: +(\d+) kB", maps, re.MULTILINE | re.DOTALL)
    ram = sum(int(rss) for size, rss in found if int(size) >= 256 << 10)
    beyond = sum(int(rss) for _, rss in found) - ram
    assert ram > 32 << 10 and 0 < beyond <= 40 << 10, maps


@pytest.mark.parametrize(("cpus", "options"), [(1, ()), (4, ("--compat",))])
def test_linux_boots_on_intel(intel_host: Host, cpus: int, options: tuple[str, ...]) -> None:
    ran = boot(intel_host, "vmlinuz", "", "--cpus", str(cpus), *options)
    check_whole(ran, cpus)
    shown = set(ran[1]["flags"].split())
    assert {"fpu", "sse2", "cx16"} <= shown
    assert bool(shown & HIDDEN) != bool(options)


def check_whole(ran: tuple[Any, dict[str, str]], cpus: int) -> None:
    """A guest that has found all that it should, and has switched itself off."""
    result, said = ran
    assert (result["cause"], result["status"]) == ("power-off", 0), result["message"] + result["console"][-2000:]
    assert said["cpus"] == str(cpus)
    assert said["clocksource"] == "kvm-clock"
    assert said["serial"] == "4" and said["rtc"] == "rtc_cmos 00:01" and said["acpi"].split()[0] == "9:"
    assert said["maker"] == "pyhv" and re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", said["uuid"])
    assert said["cmdline"] == LINE
    # Asked to be quiet, it has nothing to complain of: that it finds no way to ask for PCI devices, say.
    assert "PCI:" not in result["console"], result["console"]
    # The hosts' date is this machine's, and the guest takes it from its RTC. (Time runs on its own on Intel hosts.)
    assert abs(int(said["date"]) - time.time()) < 600
    assert 50_000 < int(said["pages"]) < 65_536


@pytest.mark.parametrize(
    ("line", "cause", "status", "words"),
    [
        ("do=reboot", "reset", 0, "the guest asked for a reset"),
        ("do=halt", "halted", 0, "halted with interrupts off"),
        ("do=panic load=pvpanic,pvpanic-mmio", "panic", 120, "the guest's kernel has panicked"),
        ("do=sleep", "timeout", 124, "the guest was still running"),
    ],
)
def test_each_end_has_its_cause(host: Host, line: str, cause: str, status: int, words: str) -> None:
    result, said = boot(host, "vmlinux", line, *(["--timeout", "20"] if cause == "timeout" else []))
    assert (result["cause"], result["status"]) == (cause, status), result["message"] + result["console"][-2000:]
    assert words in result["message"] and said["cmdline"].endswith(line)


def test_input_that_was_there_before_the_guest_is_not_lost(host: Host) -> None:
    """Linux's serial driver clears the FIFO again and again, and reads from it, until it is up."""
    text = " ".join(str(n) for n in range(100, 180))
    command = ["python3", "-m", "pyhv", "run", f"{FOLDER}/vmlinux", "--initrd", f"{FOLDER}/initrd", "--mem", "256M"]
    command += ["--append", f"{LINE} do=read", "--timeout", "300"]
    done = host.run(command, timeout=400, env=code.ENVIRONMENT, stdin=f"{text}\n".encode())
    assert f"linux: read {text}" in done.stdout.decode().replace("\r", ""), done.stdout[-2000:]
    assert done.status == 0


def test_a_guest_that_works_forgives_a_pause(host: Host) -> None:
    """Its watchdog barks after 4 s without a turn; told by kvmclock that it was stopped it does not."""
    command = ["python3", "-m", "pyhv", "run", f"{FOLDER}/vmlinux", "--initrd", f"{FOLDER}/initrd", "--mem", "256M"]
    command += ["--append", f"{LINE} watchdog_thresh=2 do=work", "--name", "w"]
    running = host.start(command, env=code.ENVIRONMENT)

    def works() -> int:
        return running.stdout.count(b"linux: works")

    def wait_for_work(seconds: int) -> None:
        wanted, deadline = works() + seconds, time.monotonic() + 300
        while works() < wanted and time.monotonic() < deadline:
            time.sleep(0.1)
        assert works() >= wanted, running.stdout[-2000:]

    wait_for_work(3)
    for verb in ("pause", "save"):
        host.run(["python3", "-m", "pyhv", "pause", "w"], env=code.ENVIRONMENT, check=True)
        before = works()
        time.sleep(12)
        if verb == "save":
            host.run(["python3", "-m", "pyhv", "save", "w", "/tmp/w.pyhv"], env=code.ENVIRONMENT, check=True)
        assert works() == before
        host.run(["python3", "-m", "pyhv", "resume", "w"], env=code.ENVIRONMENT, check=True)
        wait_for_work(3)
    host.run(["python3", "-m", "pyhv", "stop", "w"], env=code.ENVIRONMENT, check=True)
    running.wait()
    said = running.stdout.decode()
    assert not re.search("lockup|stall|hung", said), said


def test_a_kernel_without_acpi_makes_do_with_the_8259s(host: Host) -> None:
    """Debian's reads no MP table; the guest `multiboot` does. It resets by the keyboard controller then."""
    result, said = boot(host, "vmlinux", "acpi=off do=reboot")
    assert result["cause"] == "reset", result["message"] + result["console"][-2000:]
    assert said["cpus"] == "1" and said["serial"] == "4" and said["acpi"] == ""


#: Makes of the vmlinux in this folder one, `marked`, that says that it needs x86-64-v2: one more program header, for
#: which there is room, of a note behind the end, of owner GNU (AMD64 ABI supplement, "Program Property").
MARK = """\
import shutil, struct
shutil.copyfile("vmlinux", "marked")
with open("marked", "r+b") as file:
    header = bytearray(file.read(4096))
    at, count = struct.unpack_from("<Q", header, 32)[0], struct.unpack_from("<H", header, 56)[0]
    end = file.seek(0, 2)
    note = struct.pack("<III4sIIII", 4, 16, 5, b"GNU", 0xc0008002, 4, 2, 0)
    file.write(note)
    assert not any(header[at + 56 * count : at + 56 * (count + 1)])
    struct.pack_into("<IIQQQQQQ", header, at + 56 * count, 4, 4, end, 0, 0, len(note), len(note), 8)
    struct.pack_into("<H", header, 56, count + 1)
    file.seek(0)
    file.write(header)
"""


def test_a_kernel_that_needs_more_than_the_baseline_is_refused_in_compatibility_mode(host: Host) -> None:
    host.run(["python3", "-c", MARK], cwd=FOLDER, check=True)
    command = ["python3", "-m", "pyhv", "run", f"{FOLDER}/marked", "--append", LINE, "--mem", "256M"]
    refused = host.run([*command, "--compat", "--timeout", "60"], env=code.ENVIRONMENT)
    assert (refused.status, refused.stdout) == (2, b""), refused
    words = b"needs x86-64-v2, which profile hyperv-r2 cannot give on this host: without popcnt, sse4_1, sse4_2, ssse3"
    assert words in refused.stderr, refused.stderr
    # Without it the same image begins to run where the processor is one of these.
    if not {"popcnt", "sse4_1", "sse4_2", "ssse3"} <= SHOWN[host.kind.name]:
        return
    begun = host.run([*command, "--timeout", "2"], env=code.ENVIRONMENT)
    assert begun.status == 124, begun
