"""Snapshots through the command line, with all that can go wrong: the disk, the file, a process that is killed.

Whoever saves has a file that is complete, or the old one; whoever reads a file that is not right gets one line.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pyhv
from pyhv.cli import check
from pyhv.cpu import features
from pyhv.cpu.host import HostDescription
from pyhv.cpu.table import Registers
from pyhv.snapshot import file, layout
from pyhv.snapshot.container import Ram, Reader, Writer
from pyhv.snapshot.layout import ENTRY_SIZE, HEADER_SIZE, PAGE_SIZE, Section
from pyhv.state import codec
from pyhv.state.records import RECORDS

from .cli import COMMAND, IN_THE_LAB, LAB_REASON, TIMEOUT, call, call_here, environment, python
from .named import ECHO, TICKER, console, detach, ok, read_until, rounds_of, status, wait_for

if IN_THE_LAB:
    pytest.skip(LAB_REASON, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("base")

Capture = pytest.CaptureFixture[str]

# The commands that are given a snapshot.
READERS = [
    ("restore",), ("restore", "--verify"), ("inspect",), ("inspect", "--json"), ("verify",), ("check",),
    ("check", "--json"),
]  # fmt: skip


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot of a ticker that has run a little; not to be changed."""
    path = tmp_path_factory.mktemp("saved") / "t.pyhv"
    with pyhv.Machine("ticker", append="every=1", memory="4M") as machine:
        machine.run(0.3)
        machine.save(str(path))
    return path


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """One to be damaged."""
    path = tmp_path / "t.pyhv"
    shutil.copyfile(saved, path)
    return path


def numbers(console: str) -> list[int]:
    return [int(number) for number in re.findall(r"round (\d+)\n", console)]


def is_without_gap(counted: list[int]) -> bool:
    return len(counted) > 2 and counted == list(range(counted[0], counted[0] + len(counted)))


# ------------------------------------------------------------------------------------------------ what is promised


def start(*words: str, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*COMMAND, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment() | {"PYTHONPATH": str(Path(__file__).parents[2])}, bufsize=0, **options,
    )  # fmt: skip


def test_save_and_restore_as_the_readme_has_it(tmp_path: Path) -> None:
    """The lines of two terminals: the guest goes on counting without a gap, on the processor that it saw."""
    with start("run", "ticker", "--name", "t", "--compat", "--append", "every=1", "--mem", "16M") as process:
        before = read_until(process, b"round 2\n")
        saving = start("save", "t", "t.pyhv", "--stop", cwd=tmp_path)
        out, err = saving.communicate(timeout=TIMEOUT)
        err = re.sub(rb'\{"progress": "save", .*\}\n', b"", err)  # where it takes longer than a second
        assert (saving.returncode, out, err) == (0, b"", b"")
        assert process.stdout is not None and process.stderr is not None
        before += process.stdout.read()
        assert process.wait(TIMEOUT) == 0
        assert b"pyhv: stopped; vCPU 0 at rip 0x" in process.stderr.read()
    with start("restore", "t.pyhv", cwd=tmp_path) as process:
        after = read_until(process, b"round ") + read_until(process, b"\n") + read_until(process, b"\n")
        process.terminate()
        assert process.stdout is not None
        after += process.stdout.read()
        assert process.wait(TIMEOUT) == 143
    assert b"ticker: " not in re.sub(rb"ticker: (round \d+\n|\d+ pages|round \d*$|$)", b"", before + after)
    assert is_without_gap(numbers((before + after).decode()))
    assert json.loads(ok("inspect", str(tmp_path / "t.pyhv"), "--json"))["machine"]["profile"] == "hyperv-r2"


def test_a_gap_would_be_seen() -> None:
    for counted in ([1, 2, 4], [1, 2, 2, 3], [3, 2, 1], [1, 2]):
        assert not is_without_gap(counted)
    assert is_without_gap([7, 8, 9])


def test_a_restored_vm_with_a_name(saved: Path, tmp_path: Path) -> None:
    detach("t", "restore", str(saved))
    found = status("t")
    assert (found["state"], found["image"], found["memory"]) == ("running", "ticker", 4 << 20)
    detach("u", "restore", str(saved), "--verify")
    uuids = {found["uuid"], status("u")["uuid"], json.loads(ok("inspect", str(saved), "--json"))["machine"]["uuid"]}
    assert len(uuids) == 3
    with console("t") as reader:
        read_until(reader, b"\n")
        read_until(reader, b"round ")
    ok("pause", "t")
    again = tmp_path / "again.pyhv"
    ok("save", "t", str(again))
    assert ok("verify", str(again)).startswith(f"{again}: good: ")
    ok("resume", "t")
    ok("stop", "t")
    ok("stop", "u")


def test_a_restored_vm_with_a_name_in_the_foreground(saved: Path) -> None:
    with start("restore", str(saved), "--name", "t", "--json") as process:
        wait_for(lambda: "t  " in ok("ls"))
        ok("stop", "t")
        assert process.stdout is not None
        value = json.loads(process.stdout.read())
    assert (value["cause"], value["status"], process.returncode) == ("stopped", 0, 0)


def test_errors_of_a_restore_with_a_name(saved: Path, tmp_path: Path) -> None:
    done = call("restore", str(saved), "--detach")
    assert (done.returncode, done.stderr) == (2, "pyhv: --detach: needs --name; nobody could find the VM otherwise\n")
    for more in ((), ("--detach",)):
        done = call("restore", str(tmp_path / "none"), "--name", "t", *more)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"pyhv: {tmp_path}/none: cannot be read: ") and done.stderr.count("\n") == 1
    detach("t", *TICKER)
    done = call("restore", str(saved), "--name", "t")
    assert done.stderr == "pyhv: name t: is that of a VM that runs; choose another, or see pyhv ls\n"
    ok("stop", "t")
    done = call("restore", str(tmp_path / "none"), "--json")
    assert (done.returncode, json.loads(done.stdout)["cause"]) == (2, "usage")


def test_a_timeout_of_a_restored_vm(saved: Path) -> None:
    done = call("restore", str(saved), "--timeout", "0.3")
    assert done.returncode == 124 and "timeout: the guest was still running" in done.stderr
    assert is_without_gap(numbers(done.stdout[done.stdout.index("\n") + 1 :]))


def test_a_serial_port_goes_on_in_both_directions(tmp_path: Path) -> None:
    path = str(tmp_path / "e.pyhv")
    detach("t", *ECHO)
    with console("t") as reader:
        assert reader.stdin is not None
        reader.stdin.write(b"ab")
        assert read_until(reader, b"b") == b"ab"
        ok("save", "t", path, "--stop")
    done = subprocess.run(
        [*COMMAND, "restore", path], input=b"cdq", capture_output=True, timeout=TIMEOUT, check=False, env=environment()
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"cdq", b"")


def test_a_guest_that_this_host_cannot_run(saved: Path, tmp_path: Path) -> None:
    """Every feature that is missing is named, in a line of its own; and a guest of another vendor is always refused."""
    path = tmp_path / "f.pyhv"
    forger = Forger(saved, path)
    with pyhv.Machine("hello") as machine:
        has = machine.host.table
    word = (0x80000001, 6)  # EDX: 3DNow! and its extension, which only old AMD processors have
    bits = features.find("3dnow").mask | features.find("3dnowext").mask
    assert not has.get(word[0]).edx & bits

    def older(section: Section, record: Any) -> Any:
        if section.name == "vcpu":
            for entry in record["fields"]["cpuid"]:
                if entry[0] == word[0]:
                    entry[word[1]] |= bits
        return record

    def foreign(section: Section, record: Any) -> Any:
        if section.name == "vcpu":
            for entry in record["fields"]["cpuid"]:
                if entry[0] == 0:  # CentaurHauls
                    entry[4:] = [0x746E6543, 0x736C7561, 0x48727561]
        return record

    for change, problems in ((older, ("3dnow", "3dnowext")), (foreign, ("vendor",))):
        forger.write_records(change)
        for words in (("restore",), ("restore", "--name", "t"), ("restore", "--name", "t", "--detach")):
            done = call(words[0], str(path), *words[1:])
            head, *reasons = done.stderr.splitlines()
            assert (done.returncode, done.stdout) == (2, "")
            assert head.startswith(f"pyhv: {path}: cannot run on this host:")
            for problem in problems:  # a line each
                assert sum(problem in line.split() for line in reasons) == 1, done.stderr
        done = call("check", str(path))
        assert done.returncode == 1 and all(problem in done.stdout for problem in problems)


def test_inspect(saved: Path, capfd: Capture) -> None:
    code, out, err = call_here(capfd, "inspect", str(saved), "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    with file.open_snapshot(str(saved)) as snapshot:
        state, table, sections = snapshot.state, snapshot.tables[0], snapshot.reader.sections
        writer = snapshot.writer
    assert found["written"]["pyhv"] == pyhv.__version__
    assert found["written"]["kernel"] == os.uname().release
    assert found["written"]["processor"] == writer.processor != ""
    assert found["machine"]["image"] == "ticker" and found["machine"]["command_line"] == "every=1"
    assert (found["machine"]["memory"], found["machine"]["vcpus"]) == (4 << 20, 1)
    assert found["bytes"] == saved.stat().st_size >= found["bytes_on_disk"] > 0
    assert set(found["features"]) == table.features() and len(found["features"]) > 20
    assert int(found["registers"][0]["rip"], 16) == state.vcpus[0].regs.rip
    assert [section["name"] for section in found["sections"]] == [section.title for section in sections]
    assert {"uart16550", "cmos"} <= {name.split("@")[0] for name in found["devices"]}

    code, out, err = call_here(capfd, "inspect", str(saved))
    assert (code, err) == (0, "")
    rip = f"rip {state.vcpus[0].regs.rip:016x}"
    for word in (found["written"]["processor"], found["machine"]["uuid"], "ticker every=1", "4 MiB", "memory[0]", rip):
        assert word in out


def test_what_a_stranger_wrote_does_not_drive_a_terminal(tmp_path: Path) -> None:
    """Nor is it an internal error where it is no text at all."""
    path = tmp_path / "a\udcff"
    with pyhv.Machine("ticker", memory="4M", append="every=1 \x1b[2J") as machine:
        machine.save(str(path))
    for command in ("inspect", "verify", "check"):
        done = subprocess.run(
            [*COMMAND, command, path], capture_output=True, timeout=TIMEOUT, check=False, stdin=subprocess.DEVNULL,
            env=environment() | {"PYTHONIOENCODING": "utf-8:strict"},
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, b""), done
        assert rb"/a\udcff" in done.stdout and b"\x1b" not in done.stdout


def test_check_on_this_host_and_on_others(saved: Path, tmp_path: Path, capfd: Capture) -> None:
    code, out, err = call_here(capfd, "check", str(saved))
    assert (code, out.splitlines()[0], err) == (0, f"{saved} can run on this host", "")
    code, out, err = call_here(capfd, "host", "--json")
    here = json.loads(out)
    host = HostDescription.from_json(here, "here")
    one = host.table.get(1)
    without = host.table.replace({(1, 0): one._replace(ecx=one.ecx & ~(1 << 13), edx=one.edx & ~(1 << 15))})
    dump, lesser = tmp_path / "dump.txt", tmp_path / "lesser.json"
    dump.write_text(without.to_cpuid_r())
    lesser.write_text(json.dumps(host._replace(table=without).to_json()))
    (tmp_path / "here.json").write_text(out)
    assert call_here(capfd, "check", str(saved), "--on", str(tmp_path / "here.json"))[0] == 0
    content = saved.read_bytes()
    for on in (dump, lesser):
        code, out, err = call_here(capfd, "check", str(saved), "--on", str(on))
        assert (code, out.splitlines()[0], err) == (1, f"{saved} cannot run on {on}", "")
        assert "cx16" in out and "cmov" in out  # all reasons, not the first
        assert ("not compared: MSRs and the TSC's rate" in out) == (on == dump)
        code, out, err = call_here(capfd, "check", str(saved), "--on", str(on), "--json")
        value = json.loads(out)
        assert (code, value["runs"], err) == (1, False, "")
        assert len(value["reasons"]) >= 2 and all(reason["kind"] and reason["text"] for reason in value["reasons"])
    assert saved.read_bytes() == content


def test_check_on_a_dump_asks_it_for_nothing_that_it_does_not_tell(
    saved: Path, tmp_path: Path, capfd: Capture
) -> None:
    """A dump has no TSC rate; and one whose leaf 0xd is cut off is no processor without AVX."""
    host = HostDescription.from_json(json.loads(call_here(capfd, "host", "--json")[1]), "here")
    on = tmp_path / "dump.txt"
    on.write_text(host.table.to_cpuid_r())
    code, out, err = call_here(capfd, "check", str(saved), "--on", str(on), "--strict-tsc")
    assert (code, err) == (0, "")
    assert out.splitlines()[1:] == ["  not compared: MSRs and the TSC's rate, of which a dump does not tell"]
    # A guest and a host with AVX, whatever this host has.
    one = host.table.get(1)._replace(ecx=host.table.get(1).ecx | 7 << 26)
    xsave = {(0xD, 0): Registers(7, 832, 832, 0), (0xD, 1): Registers(0, 0, 0, 0), (0xD, 2): Registers(256, 576, 0, 0)}
    for told in (True, False):
        table = host.table.replace({(1, 0): one, **{key: None for key in host.table.entries if key[0] == 0xD}})
        on.write_text(table.replace(xsave if told else {(0xD, 0): xsave[0xD, 0]}).to_cpuid_r())
        with file.open_snapshot(str(saved)) as snapshot:
            guest = snapshot.tables[0].replace({(1, 0): one, **xsave})
            if told:
                assert check._there(snapshot._replace(tables=(guest,)), str(on), True)[0] == []
                continue
            with pytest.raises(pyhv.BadInput, match="leaf 0xd is cut off: it lacks subleaf 2, on which the guest dep"):
                check._there(snapshot._replace(tables=(guest,)), str(on), True)


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("made_by", ["kvm", "emulator"])
def test_check_says_what_restore_does(made_by: str, compat: bool, tmp_path: Path, capfd: Capture) -> None:
    """By `auto` too, which may take the emulator where this host's KVM cannot run the guest."""
    path = str(tmp_path / "hello.pyhv")
    try:
        with pyhv.Machine("hello", accel=made_by, compat=compat) as machine:
            machine.save(path)
    except pyhv.NotAvailable as missing:
        pytest.skip(str(missing))
    for accel in ("auto", "kvm", "emulator"):
        checked, out, _ = call_here(capfd, "check", path, "--accel", accel)
        restored, _, err = call_here(capfd, "restore", path, "--accel", accel, "--timeout", "60")
        assert (checked == 0) == (restored == 0), (accel, out, err)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[" * 100000, b'{"format": "pyhv-host/1"}', b"\0\xff" * 1000, b"CPU 0:\n", b"x" * (40 << 20)],
    ids=range(7),
)
def test_check_on_a_host_that_is_none(saved: Path, tmp_path: Path, capfd: Capture, content: bytes) -> None:
    on = tmp_path / "host"
    on.write_bytes(content)
    code, out, err = call_here(capfd, "check", str(saved), "--on", str(on))
    assert (code, out) == (2, "")
    assert err.startswith(f"pyhv: {on}") and err.count("\n") == 1


# ------------------------------------------------------------------------------------------------- hostile files


def refuse(capfd: Capture, path: Path, *words: str, problem: str = "") -> None:
    """The command must give one line, about this file, and status 2; with --json one object that says the same."""
    code, out, err = call_here(capfd, words[0], str(path), *words[1:])
    assert code == 2, words
    if "--json" in words:
        said = json.loads(out)
        assert said["status"] == 2 and f"pyhv: {said['message']}\n" == err, (out, err)
    else:
        assert out == "", words
    assert err.startswith(f"pyhv: {path}") and err.count("\n") == 1 and "internal error" not in err, err
    assert problem in err


class Forger:
    """A snapshot whose checksums are right and which is wrong: its sections, to be changed, and how it is written."""

    def __init__(self, source: Path, path: Path) -> None:
        self.path = path
        self.data = source.read_bytes()
        with Reader(str(source), RECORDS) as reader:
            self.sections = list(reader.sections)

    def change(self, title: str, **fields: Any) -> None:
        self.sections = [s._replace(**fields) if s.title == title else s for s in self.sections]

    def write(self, size: int = 0, **header: int) -> None:
        """size: of the file, which gets a hole at its end. header: version, count."""
        data = bytearray(self.data)
        start = layout.pack(self.sections)
        data[: len(start)] = start
        count = header.get("count", len(self.sections))
        struct.pack_into("<IIQ", data, 8, header.get("version", layout.VERSION), count, size or len(data))
        struct.pack_into("<Q", data, 56, layout.checksum(data[:56]))
        self.path.write_bytes(data)
        if size:
            os.truncate(self.path, size)

    def write_records(self, change: Callable[[Section, Any], Any]) -> None:
        """change: gets a section and its JSON value; what it returns is written: bytes as they are, None not at all."""
        ram = os.memfd_create("ram", os.MFD_CLOEXEC)
        memory = self.sections[-1]
        os.pwrite(ram, self.data[memory.offset : memory.end], 0)
        with Writer(str(self.path)) as writer:
            for section in self.sections[:-2]:
                made = change(section, json.loads(self.data[section.offset : section.end]))
                if made is not None:
                    content = made if isinstance(made, bytes) else json.dumps(made).encode()
                    checksum = layout.checksum(content)
                    writer._records.append((section._replace(length=len(content), checksum=checksum), content))
            writer.write_memory(Ram(ram, memory.length))
            writer.commit()
        os.close(ram)


TIB = 1 << 40


def forgeries(forger: Forger) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is wrong with each, as the error has it, and how it is made."""
    good = list(forger.sections)
    machine, vcpu, memory = (next(s for s in good if s.name == name) for name in ("machine", "vcpu", "memory"))

    def with_section(title: str, size: int = 0, **fields: Any) -> Callable[[], object]:
        def make() -> None:
            forger.sections = list(good)
            forger.change(title, **fields)
            forger.write(size)
            forger.sections = list(good)

        return make

    def with_field(section: Section, name: str, value: Any) -> Callable[[], object]:
        def change(this: Section, record: Any) -> Any:
            if this.title == section.title:
                record["fields"][name] = value
            return record

        return lambda: forger.write_records(change)

    def with_record(section: Section, value: Any) -> Callable[[], object]:
        return lambda: forger.write_records(lambda this, record: value if this.title == section.title else record)

    path = forger.path
    yield "is empty", lambda: path.write_bytes(b"")
    yield "does not begin with PYHVSNAP", lambda: path.write_bytes(b"\x7fELF" + forger.data[4:])
    yield "was cut short", lambda: path.write_bytes(b"PYHVSNAP")
    yield "header at offset 0x0 does not have its checksum", lambda: path.write_bytes(b"PYHVSNAP" + bytes(9999))
    yield "use a newer pyhv", lambda: forger.write(version=2)
    yield "impossible number of sections", lambda: forger.write(count=(1 << 32) - 1)
    yield "impossible number of sections", lambda: forger.write(TIB, count=(1 << 32) - 1)
    yield "goes beyond the file", with_section(vcpu.title, length=(1 << 64) - 1)
    yield "is too large", with_section(vcpu.title, TIB, length=codec.MAX_BYTES + 1)
    yield "is too large", with_section(vcpu.title, TIB, length=TIB // 2)
    yield "overlaps what is before it", with_section(vcpu.title, offset=machine.offset)
    yield "overlaps what is before it", with_section(vcpu.title, offset=0)
    yield "overlaps what is before it", with_section(memory.title, offset=0)
    yield "bytes of sums for", with_section(memory.title, TIB, length=TIB - memory.offset)
    yield "is unknown to this pyhv", with_section(machine.title, name="novelty")
    yield "has no section machine", with_record(machine, None)
    yield "has 0 vCPUs", with_record(vcpu, None)
    yield "is not JSON", with_record(vcpu, b"?")
    yield "nested too deeply", with_record(vcpu, b"[" * 100000)
    yield "must be an object", with_record(vcpu, [])
    yield "says 17592186044416 bytes of memory", with_field(machine, "memory", 16 << 40)
    yield "vcpu[0].cpuid", with_field(vcpu, "cpuid", [])
    yield "vcpu[0].cpuid", with_field(vcpu, "cpuid", [[1, 0, 0, 0, 0, 0, 0]])
    yield "vcpu[0].xsave", with_field(vcpu, "xsave", "00" * 20000)
    yield "vcpu[0].msrs", with_field(vcpu, "msrs", [[1 << 40, 0]])


def others(path: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is no file at all."""
    yield "No such file", lambda: None
    yield "is no regular file", path.mkdir
    yield "is no regular file", lambda: os.mkfifo(path)
    yield "is no regular file", lambda: path.symlink_to("/dev/zero")


def clear(path: Path) -> None:
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def test_hostile_files(saved: Path, tmp_path: Path, capfd: Capture) -> None:
    """Every one, given to every command."""
    path = tmp_path / "hostile.pyhv"
    for problem, make in (*forgeries(Forger(saved, path)), *others(path)):
        clear(path)
        make()
        for words in READERS:
            refuse(capfd, path, *words, problem=problem)


BOUNDED = """
import os, resource
from pathlib import Path
from tests.host import test_cli_snapshot as t
saved, path = Path(sys.argv[1]), Path(sys.argv[2])
# Once, that all modules are there.
for words in t.READERS:
    main([words[0], str(saved), *words[1:], *(["--timeout", "0.01"] if words[0] == "restore" else [])])
made = list(t.forgeries(t.Forger(saved, path)))
with open("/proc/self/status") as lines:
    used = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith("Vm")}
Path("/proc/self/clear_refs").write_text("5")  # forget the peak
for problem, make in made:
    make()
    resource.setrlimit(resource.RLIMIT_AS, (used["VmSize"] + EXTRA, resource.RLIM_INFINITY))
    for words in t.READERS:
        print("status", main([words[0], str(path), *words[1:]]), flush=True)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
with open("/proc/self/status") as lines:
    peak = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
print("peak", peak - used["VmRSS"])
"""


def in_little_memory(saved: Path, path: Path, plant: str = "") -> tuple[list[str], int]:
    """Gives all hostile files to all commands, in a process whose address space may grow by 24 MiB: the statuses, and
    the bytes by which the process grew at most. plant: code that makes pyhv worse."""
    code = f"import sys\nfrom pyhv.cli import main\n{plant}\n{BOUNDED.replace('EXTRA', str(24 << 20))}"
    done = subprocess.run(
        [sys.executable, "-c", code, str(saved), str(path)], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=TIMEOUT, check=False, env=environment() | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    said = [line.split()[1] for line in done.stdout.splitlines() if line.startswith(("status ", "peak "))]
    *codes, peak = said
    assert len(codes) == len(READERS) * len(list(forgeries(Forger(saved, path))))
    return codes, int(peak)


def test_hostile_files_in_little_memory(saved: Path, tmp_path: Path) -> None:
    codes, peak = in_little_memory(saved, tmp_path / "h.pyhv")
    assert set(codes) == {"2"}
    assert peak < 24 << 20


def test_a_greedy_reader_would_be_noticed(saved: Path, tmp_path: Path) -> None:
    plant = """
from pyhv.snapshot import layout
parse = layout.parse_header
def greedy(data, size, path):
    bytes(min(size, 64 << 20))
    return parse(data, size, path)
layout.parse_header = greedy
"""
    codes, _ = in_little_memory(saved, tmp_path / "h.pyhv", plant)
    assert "125" in codes  # MemoryError, for the files of 1 TiB


def test_cut_at_every_border(copy: Path, capfd: Capture) -> None:
    with Reader(str(copy), RECORDS) as reader:
        sections = reader.sections
    borders = {0, 8, HEADER_SIZE, *range(HEADER_SIZE, HEADER_SIZE + ENTRY_SIZE * len(sections) + 1, ENTRY_SIZE)}
    for section in sections:
        borders |= {section.offset, section.end}
    borders.remove(sections[-1].end)
    chance = random.Random(5)
    borders |= {chance.randrange(sections[-1].end) for _ in range(20)} | {sections[-1].end - 1}
    for size in sorted(borders, reverse=True):
        os.truncate(copy, size)
        for words in READERS[:2] if size % 7 else READERS:
            refuse(capfd, copy, *words, problem="is empty" if size == 0 else "short" if size >= 8 else "")


def flip(path: Path, bit: int) -> None:
    with path.open("r+b", buffering=0) as stream:
        byte = os.pread(stream.fileno(), 1, bit // 8)[0]
        os.pwrite(stream.fileno(), bytes([byte ^ 1 << bit % 8]), bit // 8)


def check_bits(path: Path) -> None:
    """Every bit of header and table, and of each section of state many: a restore finds the file damaged."""
    with Reader(str(path), RECORDS) as reader:
        sections = reader.sections
    bits = list(range(8 * (HEADER_SIZE + ENTRY_SIZE * len(sections))))
    chance = random.Random(6)
    for section in sections[:-1]:
        bits += [chance.randrange(8 * section.offset, 8 * section.end) for _ in range(100)]
    for bit in bits:
        flip(path, bit)
        with pytest.raises(pyhv.BadInput):
            pyhv.Machine.restore(str(path)).close()
        flip(path, bit)


def test_every_bit_of_header_and_table_and_many_of_the_state(copy: Path, capfd: Capture) -> None:
    check_bits(copy)
    chance = random.Random(7)
    with Reader(str(copy), RECORDS) as reader:
        head = 8 * reader.memory_offset
        end = 8 * reader.sections[-2].end
    for bit in [chance.randrange(8 * HEADER_SIZE), chance.randrange(8 * HEADER_SIZE, end), chance.randrange(end, head)]:
        flip(copy, bit)
        for words in READERS:
            refuse(capfd, copy, *words)
        flip(copy, bit)
    assert call_here(capfd, "verify", str(copy))[0] == 0


def test_the_check_of_bits_can_fail(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that does not look at the sections' contents."""
    monkeypatch.setattr(Reader, "_check_contents", lambda self: None)
    with pytest.raises(pytest.fail.Exception):
        check_bits(copy)


def test_bits_of_memory_are_found_by_verify(copy: Path, capfd: Capture) -> None:
    with Reader(str(copy), RECORDS) as reader:
        start, size = reader.memory_offset, reader.memory_size
    chance = random.Random(8)
    for _ in range(20):
        bit = 8 * start + chance.randrange(8 * size)
        flip(copy, bit)
        for words in (("verify",), ("restore", "--verify")):
            refuse(capfd, copy, *words, problem="is damaged: memory pages")
        assert call_here(capfd, "check", str(copy))[0] == 0  # which looks at the state alone
        flip(copy, bit)


# ------------------------------------------------------------------------------------------- a file that shrinks


def test_a_file_cut_short_under_a_running_vm(copy: Path, tmp_path: Path) -> None:
    """No SIGBUS: saving fails with an error, the guest's end is explained, and the process ends as it should."""
    detach("t", "restore", str(copy))
    ok("pause", "t")
    os.truncate(copy, PAGE_SIZE)
    done = call("save", "t", str(tmp_path / "u.pyhv"))
    assert (done.returncode, done.stdout) == (125, "")
    assert "the file ends at offset 0x1000" in done.stderr and "no snapshot was made" in done.stderr
    assert not (tmp_path / "u.pyhv").exists()
    with console("t") as reader:
        read_until(reader, b"round")  # it is there
        ok("resume", "t")
        assert reader.stderr is not None
        assert f"the snapshot {copy} became shorter while its memory was in use".encode() in reader.stderr.read()
        assert reader.wait(TIMEOUT) == 125
    wait_for(lambda: ok("ls").count("\n") == 1)


SHRINKS = """
import os, random, shutil, threading, time, pyhv
source, path = sys.argv[1:]
for number in range(12):
    shutil.copyfile(source, path)
    with pyhv.Machine.restore(path) as machine:
        noise = random.Random(number).randbytes(1 << 20)
        for at in range(4 << 20, machine.vm.memory.size, 1 << 20):
            machine.vm.memory.write(at, noise)  # pages of the process's own, which go too
        cut = threading.Timer(0.004 * number, os.truncate, (path, 5 << 20))
        cut.start()
        try:
            machine.save(path + ".new")
        except pyhv.HostError as error:
            assert "no snapshot was made" in str(error), error
        cut.join()
"""


def test_a_file_cut_short_while_its_vm_is_saved(large: Path, tmp_path: Path) -> None:
    """At any moment of the save: no SIGBUS."""
    done = python(SHRINKS, str(large), str(tmp_path / "t.pyhv"))
    assert (done.returncode, done.stderr) == (0, "")


def test_replacing_the_file_of_a_running_vm_is_no_harm(copy: Path) -> None:
    """Saving a restored VM over the file that it runs on."""
    detach("t", "restore", str(copy))
    for _ in range(3):
        ok("save", "t", str(copy))
        before = rounds_of("t")
        wait_for(lambda: rounds_of("t") > before)  # noqa: B023
    ok("stop", "t")
    assert call("restore", str(copy), "--verify", "--timeout", "0.2").returncode == 124


# ------------------------------------------------------------------------------------ disks that are full or break


def fails(name: str, path: Path, number: int, words: str = "") -> None:
    """Saving must fail, say why and that the VM runs on; it does; and what was at the path is there."""
    before, content, around = rounds_of(name), path.read_bytes(), sorted(os.listdir(path.parent))
    for more in ((), ("--stop",)):
        done = call("save", name, str(path), *more)
        assert (done.returncode, done.stdout) == (125, "")
        assert done.stderr.startswith(f"pyhv: write {path}: {os.strerror(number)}") and done.stderr.count("\n") == 1
        assert done.stderr.endswith(f"; {name} runs on\n") and words in done.stderr
    assert status(name)["state"] == "running"
    wait_for(lambda: rounds_of(name) > before)
    assert path.read_bytes() == content and sorted(os.listdir(path.parent)) == around


def test_file_size_limit(copy: Path) -> None:
    pid = detach("t", *TICKER)
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    fails("t", copy, errno.EFBIG, "this process may have 1048576 bytes in a file (ulimit -f)")
    resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
    ok("save", "t", str(copy))
    ok("stop", "t")


def test_a_full_disk(saved: Path, tmp_path: Path) -> None:
    """A tmpfs of 2 MiB, which only the VM's process has. It is as full as before when a save has failed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    path = disk / "t.pyhv"
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-Urm"]
    mount = f"mount -t tmpfs -o size=2m none {disk} && echo old >{path}"
    if not shutil.which("unshare") or subprocess.run([*unshare, "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no mount namespace with a tmpfs can be had here: not as root, nor in a user namespace")
    words = " ".join([*COMMAND, *TICKER, "--name", "t", "--detach"]).replace(TICKER[-1], f"'{TICKER[-1]}'")
    subprocess.run([*unshare, "sh", "-c", f"{mount} && {words}"], check=True, capture_output=True, timeout=TIMEOUT)
    inside = Path(f"/proc/{status('t')['pid']}/root{disk}")
    free = os.statvfs(inside).f_bfree
    before = rounds_of("t")
    for more in ((), ("--stop",), ()):
        done = call("save", "t", str(path), *more)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (125, "", 1)
        assert done.stderr.startswith(f"pyhv: write {path}: No space left on device")
        assert done.stderr.endswith("; no snapshot was made; t runs on\n")
        assert (inside / "t.pyhv").read_text() == "old\n" and os.listdir(inside) == ["t.pyhv"]
        assert os.statvfs(inside).f_bfree == free
    wait_for(lambda: rounds_of("t") > before)
    ok("save", "t", str(tmp_path / "elsewhere.pyhv"))
    ok("stop", "t")
    assert ok("verify", str(tmp_path / "elsewhere.pyhv"))


FAULTY = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* CALL and a count in the file $FAULT: from then on that many calls succeed, and all others fail with EIO. */
#include <fcntl.h>
static int broken(const char *call)
{
    static int left;
    static char last[64];
    char now[64] = "";
    int fd = open(getenv("FAULT"), O_RDONLY);
    if (fd < 0 || read(fd, now, sizeof now - 1) < 0)
        abort();
    close(fd);
    if (strcmp(now, last) != 0) {
        strcpy(last, now);
        left = strchr(now, ' ') ? atoi(strchr(now, ' ')) : 0;
    }
    if (strncmp(now, call, strlen(call)) != 0 || left-- > 0)
        return 0;
    errno = EIO;
    return 1;
}
#define WRAP(result, name, declared, given, ...)                                                                      \
    result name declared                                                                                               \
    {                                                                                                                  \
        static result(*real) declared;                                                                                 \
        if (!real)                                                                                                     \
            real = (result(*) declared)dlsym(RTLD_NEXT, #name);                                                        \
        return broken(__VA_ARGS__) ? -1 : real given;                                                                  \
    }
WRAP(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at), "pwrite")
WRAP(ssize_t, pwrite64, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at), "pwrite")
WRAP(int, fsync, (int fd), (fd), "fsync")
WRAP(int, ftruncate, (int fd, off_t size), (fd, size), "ftruncate")
WRAP(int, ftruncate64, (int fd, off_t size), (fd, size), "ftruncate")
"""


def test_io_errors(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that breaks at its first, second ... write, or when the file is synced."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("needs a C compiler")
    source, library, fault = tmp_path / "faulty.c", tmp_path / "faulty.so", tmp_path / "fault"
    source.write_text(FAULTY)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True, timeout=TIMEOUT)
    fault.write_text("none")
    with monkeypatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(library))
        patch.setenv("FAULT", str(fault))
        detach("t", *TICKER)
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "t.pyhv"
    shutil.copyfile(copy, path)
    for what in ("pwrite 0", "pwrite 1", "pwrite 2", "fsync 0", "ftruncate 0"):
        fault.write_text(f"{what}{' ' * 8}")
        before, content = rounds_of("t"), path.read_bytes()
        done = call("save", "t", str(path))
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (125, "", 1), what
        assert done.stderr.startswith(f"pyhv: write {path}: Input/output error"), done.stderr
        assert done.stderr.endswith("; t runs on\n")
        assert path.read_bytes() == content and os.listdir(folder) == ["t.pyhv"]
        wait_for(lambda: rounds_of("t") > before)  # noqa: B023
    fault.write_text("none")
    ok("save", "t", str(path))
    assert path.read_bytes() != content
    ok("stop", "t")
    assert ok("verify", str(path))


# ---------------------------------------------------------------------------------------------------- kill -9


LARGE = 48 << 20  # enough for a save that takes a while


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ticker with some incompressible memory that it does not use."""
    path = tmp_path_factory.mktemp("large") / "l.pyhv"
    noise = random.Random(9).randbytes(1 << 20)
    with pyhv.Machine("ticker", append="every=1 pages=64", memory=LARGE) as machine:
        for at in range(4 << 20, LARGE, 1 << 20):
            machine.vm.memory.write(at, noise)
        machine.run(0.1)
        machine.save(str(path))
    return path


def check_after_kill(path: Path, old: bytes) -> bool:
    """What is at the path is complete: the old file, or a new one, which is said. At most one leftover is beside it,
    under the name that the next save cleans up."""
    assert set(os.listdir(path.parent)) <= {path.name, f".{path.name}.pyhv-new"}
    with file.open_snapshot(str(path)) as snapshot:
        snapshot.reader.verify()
        head = os.pread(snapshot.reader.memory_fd, len(old), 0)
    return head != old


def head_of(path: Path) -> bytes:
    """Header, table and some of the state: no two snapshots have the same."""
    return path.read_bytes()[: 8 * PAGE_SIZE]


def kill_savers(large: Path, folder: Path, victim: str, times: int) -> list[bool]:
    """Kills the client of a save or its VM, at moments from its start to behind its end; for each, whether the new file
    was in place."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    path = folder / "t.pyhv"
    found = []
    pid = detach("t", "restore", str(large))
    ok("save", "t", str(path))
    started = time.monotonic()
    ok("save", "t", str(path))
    takes = time.monotonic() - started
    for _ in range(times):
        old = head_of(path)
        saving = start("save", "t", str(path))
        time.sleep(chance.uniform(0, 1.1) * takes)
        os.kill(saving.pid if victim == "client" else pid, signal.SIGKILL)
        saving.communicate(timeout=TIMEOUT)
        if victim == "client":
            wait_for(lambda: status("t")["doing"] is None)
            assert status("t")["state"] == "running"
        else:
            wait_for(lambda: not os.path.exists(f"/proc/{pid}/fd/0"))  # noqa: B023
        found.append(check_after_kill(path, old))
        if victim == "VM":
            pid = detach("t", "restore", str(large))
    ok("save", "t", str(path))
    assert os.listdir(folder) == [path.name]
    ok("stop", "t")
    return found


@pytest.mark.parametrize("victim", ["client", "VM"])
def test_kill_at_random_moments_of_a_save(large: Path, tmp_path: Path, victim: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    found = kill_savers(large, folder, victim, 8)
    assert False in found  # some were killed early enough


def test_a_half_written_file_would_be_found(large: Path, tmp_path: Path) -> None:
    """The check of the test above, against what worse writers leave."""
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "t.pyhv"
    shutil.copyfile(large, path)
    assert not check_after_kill(path, head_of(large))
    assert check_after_kill(path, b"another")
    os.truncate(path, LARGE // 2)
    with pytest.raises(pyhv.BadInput):
        check_after_kill(path, b"")
    shutil.copyfile(large, path)
    with path.open("r+b") as stream:  # the new state, and the memory of before
        os.pwrite(stream.fileno(), b"x", LARGE - PAGE_SIZE)
    with pytest.raises(pyhv.BadInput, match="memory pages"):
        check_after_kill(path, b"")
    shutil.copyfile(large, path)
    (folder / "t.pyhv.1234").touch()
    with pytest.raises(AssertionError):
        check_after_kill(path, b"")


def test_a_save_that_is_interrupted(large: Path, tmp_path: Path) -> None:
    """Ctrl-C: nothing was saved, the VM runs on."""
    detach("t", "restore", str(large))
    path = tmp_path / "x.pyhv"
    for number in range(4):
        path.unlink(missing_ok=True)
        saving = start("save", "t", str(path))
        time.sleep(0.03 * number)
        with contextlib.suppress(ProcessLookupError):
            saving.send_signal(signal.SIGINT)
        _, err = saving.communicate(timeout=TIMEOUT)
        # 1: so Python itself ends if it comes before any module of ours.
        early = b"KeyboardInterrupt" in err and b"/pyhv/" not in err
        assert saving.returncode in (0, 130, -signal.SIGINT, 1 if early else 0), err
        assert b"internal error" not in err
        wait_for(lambda: status("t")["doing"] is None)
        if path.exists():
            assert ok("verify", str(path))
    before = rounds_of("t")
    wait_for(lambda: rounds_of("t") > before)
    ok("stop", "t")
