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
from tests.lab.lab import Lab

from .conftest import of_vendor

FOLDER = "/tmp/linux"
#: Of a guest with 256 MiB. noxsave: QEMU does not intercept a nested guest's XSETBV (README.md).
LINE = "console=ttyS0 quiet panic=-1 noxsave"


def started(vendor: str, *images: str) -> Iterator[Host]:
    """A host of the newest wanted kind of this vendor, with pyhv and the Linux guest."""
    kinds = of_vendor(vendor)
    if not kinds:
        pytest.skip(f"needs an {vendor} host (--kinds)")
    with Lab() as lab:
        (one,) = lab.start(kinds[-1])
        one.put({"site": code.pyhv() / "site"}, code.INSIDE)
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


@pytest.mark.parametrize(("image", "cpus"), [("vmlinux", 1), ("vmlinuz", 1), ("vmlinux", 4)])
def test_linux_boots_and_switches_itself_off(host: Host, image: str, cpus: int) -> None:
    check_whole(boot(host, image, "", "--cpus", str(cpus)), cpus)


@pytest.mark.parametrize("cpus", [1, 4])
def test_linux_boots_on_intel(intel_host: Host, cpus: int) -> None:
    check_whole(boot(intel_host, "vmlinuz", "", "--cpus", str(cpus)), cpus)


def check_whole(ran: tuple[Any, dict[str, str]], cpus: int) -> None:
    """A guest that has found all that it should, and has switched itself off."""
    result, said = ran
    assert (result["cause"], result["status"]) == ("power-off", 0), result["message"] + result["console"][-2000:]
    assert said["cpus"] == str(cpus)
    assert said["clocksource"] == "kvm-clock"
    assert said["serial"] == "4" and said["rtc"] == "rtc_cmos 00:01" and said["acpi"].split()[0] == "9:"
    assert said["cmdline"] == LINE
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


def test_a_kernel_without_acpi_makes_do_with_the_8259s(host: Host) -> None:
    """Debian's reads no MP table; the guest `multiboot` does. It resets by the keyboard controller then."""
    result, said = boot(host, "vmlinux", "acpi=off do=reboot")
    assert result["cause"] == "reset", result["message"] + result["console"][-2000:]
    assert said["cpus"] == "1" and said["serial"] == "4" and said["acpi"] == ""


def test_compatibility_mode_hides_from_linux_too(host: Host) -> None:
    result, said = boot(host, "vmlinux", "", "--compat")
    assert result["cause"] == "power-off", result["message"] + result["console"][-2000:]
    shown = set(said["flags"].split())
    assert {"fpu", "sse2", "cx16"} <= shown
    hidden = "ssse3 sse4_1 sse4_2 sse4a popcnt abm misalignsse xop fma4 f16c 3dnow 3dnowext avx xsave aes movbe bmi1"
    assert not shown & set(hidden.split())
