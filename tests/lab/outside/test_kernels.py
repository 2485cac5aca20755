"""Kernels as Debian ships them, of protocols that its Linux for x86-64 does not need, on real kvm_amd: a 32-bit Linux
and memory testers by the 32-bit entry of Linux's protocol, Xen by multiboot."""

from __future__ import annotations

import gzip
import json
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab import code, debian, image
from tests.lab.host import Host

from .conftest import newest

FOLDER = "/tmp/kernels"
SOURCE = Path(__file__).resolve().parents[1] / "guest" / "init32.S"


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    yield from newest("amd")


def boot(host: Host, files: dict[str, bytes], name: str, *options: str) -> Any:
    """What `pyhv run --json` says of a guest."""
    host.put(files, FOLDER)
    command = ["python3", "-m", "pyhv", "run", f"{FOLDER}/{name}", "--mem", "128M", "--json", *options]
    done = host.run(command, timeout=400, env=code.ENVIRONMENT)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def test_a_32_bit_linux_boots_and_switches_itself_off(host: Host, tmp_path: Path) -> None:
    """Not Debian's other one, for PAE: QEMU sets a nested guest's page-directory-pointer entries accessed, a bit that
    is reserved there, and KVM then refuses the guest's next write to CR4."""
    (kernel,) = debian.files("linux-image-686", r"\./boot/vmlinuz-.*", "i386").values()
    program = tmp_path / "init"
    build = ["gcc", "-m32", "-nostdlib", "-static", "-no-pie", "-s", "-o", str(program), str(SOURCE)]
    subprocess.run(build, check=True, timeout=60)
    entries = [
        ("dev", stat.S_IFDIR | 0o755, b""),
        ("init", stat.S_IFREG | 0o755, program.read_bytes()),
    ]
    files = {"vmlinuz": kernel, "initrd": image.cpio(entries)}
    options = ("--initrd", f"{FOLDER}/initrd", "--append", "console=ttyS0 panic=-1", "--timeout", "300")
    result = boot(host, files, "vmlinuz", *options)
    assert (result["cause"], result["status"]) == ("power-off", 0), result["message"] + result["console"][-2000:]
    assert "Run /init as init process" in result["console"]


@pytest.mark.parametrize("name", ["memtest86+ia32.bin", "memtest86+x64.bin"])
def test_a_memory_tester_runs(host: Host, name: str) -> None:
    """The one has a 32-bit entry only; the other's last 16 bytes are not whole."""
    files = debian.files("memtest86+", r"\./boot/memtest86\+.*\.bin")
    result = boot(host, files, name, "--append", "console=ttyS0,115200", "--timeout", "90")
    assert (result["cause"], result["status"]) == ("timeout", 124), result["message"]
    assert "Memtest86+ v" in result["console"] and "Memory  :  128MB" in result["console"].replace("\0", "")


def test_xen_finds_room_for_its_trampoline(host: Host) -> None:
    """By the words of the BIOS data area; without a kernel for its first domain it gives up, and says so."""
    (packed,) = debian.files("xen-system-amd64", r"\./boot/xen-.*-amd64\.gz").values()
    line = "console=com1 com1=115200,8n1 no-real-mode noreboot"
    result = boot(host, {"xen": gzip.decompress(packed)}, "xen", "--append", line, "--timeout", "120")
    assert "(XEN) Bootloader: pyhv" in result["console"], result["message"] + result["console"][-2000:]
    assert "dom0 kernel not specified" in result["console"]
    assert result["cause"] == "halted"
