"""Kernels of other boot protocols, and the PC that they find, on this machine's KVM: by the guests of guest_images/."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import time
from pathlib import Path

import pytest

import pyhv
from pyhv import guests
from pyhv.errors import BadInput

from .cli import IN_THE_LAB, LAB_REASON, NOT_IN_THE_LAB, call
from .conftest import run


def test_a_multiboot_kernel_is_told_everything(tmp_path: Path) -> None:
    """It compares what it is told by its loader with the firmware configuration itself."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"hello")
    second.write_bytes(bytes(range(256)) * 40)
    result = run("multiboot", append="some words", modules=[f"{first}", f"{second} a b"], cpus=3, memory="8M")
    assert (result.cause, result.status) == ("guest-exit", 0), result.console
    text = result.console.decode()
    assert "booted by pyhv\ncommand line: multiboot.elf some words\n" in text
    assert f"module {first}: 0x00000005 bytes, sum 0x0214\n" in text
    assert f"module {second} a b: 0x00002800 bytes, sum 0x{sum(second.read_bytes()) % 65536:04x}\n" in text
    assert "memory 0x0000100000 + 0x0000700000 type 0x01\n" in text
    assert text.endswith("vCPUs: 0x03\n")


def test_the_same_kernel_by_the_addresses_in_its_header(tmp_path: Path) -> None:
    """The a.out kludge: what the ELF file loads, as a flat file whose header says where it belongs."""
    elf = Path(guests.path("multiboot")).read_bytes()
    (phoff,) = struct.unpack_from("<I", elf, 28)
    flat = bytearray()
    for at in range(phoff, phoff + 64, 32):  # text, data
        _, offset, _, paddr, filesz, _, _, _ = struct.unpack_from("<8I", elf, at)
        flat = flat.ljust(paddr - 0x100000, b"\0") + elf[offset : offset + filesz]
    header = flat.find(struct.pack("<I", 0x1BADB002))
    flags = struct.unpack_from("<I", flat, header + 4)[0] | 1 << 16
    struct.pack_into("<II", flat, header + 4, flags, -(0x1BADB002 + flags) & 0xFFFFFFFF)
    image = tmp_path / "kludge"
    image.write_bytes(flat)
    result = run(str(image), append="x")
    assert (result.cause, result.status) == ("guest-exit", 0), result.console
    assert b"command line: kludge x\n" in result.console


def test_a_pvh_kernel_is_told_everything(tmp_path: Path) -> None:
    initrd, module = tmp_path / "initrd", tmp_path / "module"
    initrd.write_bytes(b"\1" * 5000)
    module.write_bytes(b"\2")
    result = run("pvh", append="some words", initrd=str(initrd), modules=[f"{module} its words"])
    assert (result.cause, result.status) == ("guest-exit", 0), result.console
    text = result.console.decode()
    assert "command line: some words\n" in text and "ACPI tables at 0x000e0000\n" in text
    assert "module without a string: 0x00001388 bytes, sum 0x1388\n" in text
    assert "module its words: 0x00000001 bytes, sum 0x0002\n" in text


# A kernel with a 32-bit entry, somewhere behind its beginning. It loads every selector from the table that the protocol
# asks for, prints its command line, and ends with the first byte of its initrd.
_KERNEL_32 = """
    .code32
    .fill 64, 1, 0xcc
    mov $1, %edx
    or %ebx, %ebp
    or %ebp, %edi
    jnz end
    mov $0x18, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %fs
    mov %eax, %gs
    mov %eax, %ss
    mov 0x214(%esi), %eax        # where it is
    lea reloaded - 64(%eax), %eax
    push $0x10
    push %eax
    lret
reloaded:
    mov 0x228(%esi), %ebx
    mov $0x3f8, %edx
1:  mov (%ebx), %al
    inc %ebx
    outb %al, %dx
    test %al, %al
    jnz 1b
    mov 0x218(%esi), %ebx
    mov (%ebx), %dl
end:
    mov %edx, %eax
    outb %al, $0xf4
"""


@pytest.mark.skipif(shutil.which("gcc") is None or shutil.which("objcopy") is None, reason="needs gcc and binutils")
@pytest.mark.parametrize("header", [{"flags": 0}, {"version": 0x205}], ids=["2.15", "2.05"])
@pytest.mark.parametrize("accel", ["kvm", "emulator"])
def test_a_kernel_with_a_32_bit_entry(accel: str, header: dict[str, int], tmp_path: Path) -> None:
    from tests.unit.test_boot_kernels import make_bzimage

    source, made, code, initrd = (tmp_path / name for name in ("a.S", "a.o", "code", "initrd"))
    source.write_text(_KERNEL_32)
    subprocess.run(["gcc", "-m32", "-c", "-o", str(made), str(source)], check=True, timeout=60)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", str(made), str(code)], check=True, timeout=60)
    kernel = make_bzimage(kernel=code.read_bytes(), code32_start=0x100000 + 64, **header)  # type: ignore[arg-type]
    image = tmp_path / "bzImage"
    image.write_bytes(kernel)
    initrd.write_bytes(b"\x2a rest")
    result = run(str(image), append="a line", initrd=str(initrd), accel=accel)
    assert (result.cause, result.status, result.console) == ("guest-exit", 42, b"a line\0"), result.message


@pytest.mark.parametrize(
    ("image", "append", "cause", "status"),
    [
        ("acpi", "", "power-off", 0),
        ("acpi", "reset", "reset", 0),
        ("acpi", "panic", "panic", 120),
        ("multiboot", "panic", "panic", 120),
    ],
)
def test_a_pc_ends_as_its_tables_say(image: str, append: str, cause: str, status: int) -> None:
    result = run(image, append=append, cpus=2)
    assert (result.cause, result.status) == (cause, status), result.console + result.message.encode()
    assert image != "acpi" or b"vCPUs: 2\nthe timer counts\n" in result.console


def test_images_that_declare_themselves_get_no_pc() -> None:
    for image, is_pc in (("hello", False), ("acpi", True), ("pvh", True)):
        with pyhv.Machine(image, memory="4M") as machine:
            assert machine.vm.devices.is_pc == machine.vm.pit == is_pc
            assert not vars(machine.choice.accelerator).get("_spares")  # the VM that was begun is the one that runs
            assert (machine.vm.memory.read(0xE0000, 8) == b"RSD PTR ") == is_pc
            assert {"acpi_pm", "chipset", "fw_cfg", "pvpanic", "vmgenid"}.isdisjoint(machine.vm.devices.names) != is_pc


def bios_words(machine: pyhv.Machine) -> tuple[int, ...]:
    """COM1's port, the extended area's segment, equipment, KiB of low memory, ticks since midnight."""
    return struct.unpack("<H12xHHxH87xI", machine.vm.memory.read(0x400, 0x70))


@pytest.mark.parametrize("image", ["multiboot", "pvh", "acpi", "linux"])
def test_every_protocol_finds_the_words_that_a_bios_leaves(image: str, tmp_path: Path) -> None:
    """The guest `multiboot` looks there itself. Xen puts its trampoline below 0 where they are 0."""
    if image == "linux":
        if IN_THE_LAB:
            pytest.skip(LAB_REASON)
        from tests.unit.test_boot_kernels import make_bzimage

        image = str(tmp_path / "bzImage")
        Path(image).write_bytes(make_bzimage())
    with pyhv.Machine(image) as machine:
        com1, ebda, equipment, kib, ticks = bios_words(machine)
        assert (com1, ebda, equipment, kib) == (0x3F8, 0x9FC0, 0x202, 639)
        assert 0 <= ticks < 0x1800B0
        assert machine.vm.memory.read(ebda << 4, 16) == b"\1" + bytes(15)
    with pyhv.Machine("hello") as machine:
        assert bios_words(machine) == (0,) * 5, "it declares itself, and has no use for a PC"


def generations(console: bytes) -> list[str]:
    return re.findall(r"^generation ID (.*) $", console.decode(), re.MULTILINE)


def test_every_clone_gets_a_generation_of_its_own(tmp_path: Path) -> None:
    """The guest waits for the event of a new VM generation ID, and ends when it has come and the ID is another one."""
    path = str(tmp_path / "s.pyhv")
    with pyhv.Machine("acpi", append="watch", memory="4M") as machine:
        machine.start()
        deadline = time.monotonic() + 30
        while not generations(machine.console()) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        machine.save(path)
        before = machine.vm.memory.read(machine.vm.devices.generation_id, 16)
        assert machine.run(timeout=0.2).cause == "timeout", "without a restore there is no event"
    seen = {before}
    for _ in range(2):
        with pyhv.Machine.restore(path) as clone:
            seen.add(clone.vm.memory.read(clone.vm.devices.generation_id, 16))
            result = clone.run(timeout=30)
            assert (result.cause, result.status) == ("guest-exit", 0), result.console
            assert len(generations(result.console)) == 1  # the other one was printed before it was saved
    assert len(seen) == 3


def test_a_pc_goes_on_from_a_file(tmp_path: Path) -> None:
    """With its devices' state: all that is saved comes back, and the firmware configuration still answers."""
    path = str(tmp_path / "s.pyhv")
    with pyhv.Machine("multiboot", append="some words", cpus=2) as machine:
        machine.save(path)
        devices = machine.vm.devices.save()
    with pyhv.Machine.restore(path) as machine:
        restored = machine.vm.devices.save()
        changes = {"cmos", "acpi_pm"}  # clocks
        assert restored.keys() == devices.keys()
        assert {n: s for n, s in restored.items() if n not in changes} == {
            n: s for n, s in devices.items() if n not in changes
        }
        result = machine.run(timeout=30)
        assert (result.cause, result.status) == ("guest-exit", 0), result.console
        assert result.console.endswith(b"vCPUs: 0x02\n")


def test_a_clone_whose_generation_id_is_nowhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "s.pyhv")
    with pyhv.Machine("acpi", memory="4M") as machine:
        save = machine.vm.devices.save
        monkeypatch.setattr(
            machine.vm.devices, "save", lambda: {**save(), "vmgenid": b"\1" + (1 << 40).to_bytes(8, "little")}
        )
        machine.save(path)
    with pytest.raises(BadInput, match="VM generation ID: no RAM at 0x10000000000"):
        pyhv.Machine.restore(path)


@NOT_IN_THE_LAB
def test_the_command_takes_files_and_a_kind(tmp_path: Path) -> None:
    module = tmp_path / "m"
    module.write_bytes(b"x")
    done = call("run", "multiboot", "--module", f"{module} one", "--module", f"{module} two", "--append", "a b")
    assert done.returncode == 0
    assert f"module {module} one: " in done.stdout and f"module {module} two: " in done.stdout
    done = call("run", "pvh", "--boot", "multiboot")
    assert (done.returncode, "has no multiboot header" in done.stderr) == (2, True)
    done = call("run", "hello", "--initrd", str(module))
    assert (done.returncode, "initrd: cannot be given" in done.stderr) == (2, True)


@NOT_IN_THE_LAB
def test_a_guest_that_resets_itself_is_started_again_if_asked() -> None:
    done = call("run", "faults", "--append", "reset", "--reboot", "--timeout", "1")
    assert done.returncode == 124
    assert done.stderr.count("the guest has reset itself and is started again") > 1


def test_a_pc_that_moves_is_the_same_one() -> None:
    """It keeps its VM generation ID, hears of no new one, and its timer has gone on by the time that the move took."""
    from .test_migration import hop, running

    with running("acpi", append="watch", memory="4M") as machine:
        deadline = time.monotonic() + 30
        while not generations(machine.console()) and time.monotonic() < deadline:
            time.sleep(0.01)
        before = machine.vm.memory.read(machine.vm.devices.generation_id, 16)
        counts: list[int] = []

        def look(here: pyhv.Machine, there: pyhv.Machine) -> None:
            for one in (here, there):
                counts.append(int.from_bytes(one.vm.devices.save()["acpi_pm"][5:9], "little"))

        moved = hop(machine, look=look).machine
        with moved:
            assert moved.vm.devices.names == machine.vm.devices.names and moved.vm.pit
            assert moved.vm.memory.read(moved.vm.devices.generation_id, 16) == before
            assert 0 <= counts[1] - counts[0] & 0xFFFFFFFF < 3_579_545, "the two timers are a second apart"
            assert moved.run(timeout=0.3).cause == "timeout"
