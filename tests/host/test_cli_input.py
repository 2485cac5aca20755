"""Bad input to `pyhv run` and `pyhv trace`: one clear line, exit status 2, no traceback."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pyhv import guests
from pyhv.machine import parse_memory

from .cli import IN_THE_LAB, LAB_REASON, call, python

if IN_THE_LAB:
    pytest.skip(LAB_REASON, allow_module_level=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Images and profiles with which something is wrong, by what it is."""
    folder = tmp_path_factory.mktemp("files")
    hello = Path(guests.path("hello")).read_bytes()
    contents = {
        "empty": b"",
        "large": bytes(0x202) + b"HdrS" + bytes(3 << 20),
        "script": b"#!/bin/sh\nexit 0\n",
        "saved": b"PYHVSNAP" + bytes(3 << 20),
        "code": b"\xf4",
        "cut.elf": hello[:100],
        "i386.elf": hello[:4] + b"\x01" + hello[5:18] + b"\x03\x00" + hello[20:],
        "arm64.elf": hello[:18] + b"\xb7\x00" + hello[20:],
        "linux": bytes(0x202) + b"HdrS" + bytes(100),
        "line.toml": b'name = "x"\ntitle = "t"\ndescription = "d"\n[features]\ncommon = ["nosuch"]\n',
        "syntax.toml": b'name = "x"\ntitle =\n',
        "field.toml": b'name = "x"\ntitle = "t"\ndescription = "d"\nmovign = true\n[features]\nall = true\n',
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "fifo")
    return {name: str(folder / name) for name in [*contents, "missing", "fifo"]} | {"folder": str(folder)}


def assert_refused(done: Any, subject: str, *words: str) -> None:
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.endswith("\n")
    assert done.stderr.startswith(f"pyhv: {subject}"), done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", ["No such file or directory"]),
        ("empty", ["is empty"]),
        ("folder", ["is a directory", "give an image file"]),
        ("large", ["3146246 bytes", "give the guest more memory"]),
        ("cut.elf", ["outside the file"]),
        ("i386.elf", ["its program headers", "outside the file"]),  # which are elsewhere in a 32-bit file
        ("arm64.elf", ["not an x86 image", "64-bit AArch64"]),
        ("linux", ["is a damaged Linux kernel"]),
        ("script", ["is a script (/bin/sh)"]),
        ("saved", ["is a pyhv snapshot; pyhv restore FILE lets it go on"]),
        ("code", ["is not recognised as an image", "--boot flat runs it"]),
        ("fifo", ["not a regular file"]),
    ],
)
def test_images(files: dict[str, str], name: str, words: list[str]) -> None:
    assert_refused(call("run", files[name], "--mem", "2M", "--timeout", "10"), files[name] + ": ", *words)


def test_a_name_that_no_guest_has() -> None:
    assert_refused(call("run", "helo"), "helo: ", "did you mean hello?")
    assert_refused(call("trace", "xyzzy"), "xyzzy: ", "the bundled guests are ", "hello")


SIZES = [
    "0", "1", "-64M", "64.1M", "1000000", "2097153", "M", "", "64Q", "99999999T", "9" * 5000, "64.M", ".5G", "64MM",
    "64iB", "64BM", "6.4.0G", "1e9", "64 M",
]  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=[size[:10] for size in SIZES])
def test_memory_sizes(size: str) -> None:
    assert_refused(call("run", "hello", f"--mem={size}"), f"memory {size[:20]}", "give a size such as 64M")


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("64M", 64 << 20), ("64m", 64 << 20), ("64MiB", 64 << 20), ("64mib", 64 << 20), ("0.5G", 512 << 20),
        ("0.0625GiB", 64 << 20), ("65536K", 64 << 20), ("64MB", 64_000_000), ("67108864", 64 << 20),
    ],
)  # fmt: skip
def test_sizes_as_people_type_them(size: str, count: int) -> None:
    assert parse_memory(size) == count


def test_memory_beyond_the_profiles_addresses() -> None:
    done = call("run", "hello", "--compat", "--mem", "4T")
    assert_refused(done, "memory 4", "physical address bits", "the most is ")


@pytest.mark.parametrize("count", ["0", "-1", "255", "100000", "9" * 30])
def test_numbers_of_vcpus(count: str) -> None:
    assert_refused(call("run", "hello", "--cpus", count), f"{count} vCPUs", "choose 1 to ")


def test_a_number_of_vcpus_that_is_none() -> None:
    assert_refused(call("run", "hello", "--cpus", "two"), "--cpus two: is not a whole number")
    assert_refused(call("run", "hello", "--cpus", "9" * 5000), "--cpus 9999", "is not a whole number")


def test_profiles(files: dict[str, str]) -> None:
    assert_refused(call("run", "hello", "--cpu", "hyperv-r1"), "profile 'hyperv-r1'", "did you mean hyperv-r2?")
    assert_refused(call("run", "hello", "--cpu", files["missing"]), files["missing"], "No such file")
    assert_refused(call("run", "hello", "--cpu", files["line.toml"]), files["line.toml"], "5", "common", "nosuch")
    assert_refused(call("run", "hello", "--cpu", files["syntax.toml"]), files["syntax.toml"], "2")
    assert_refused(call("run", "hello", "--cpu", files["field.toml"]), files["field.toml"], "4", "movign", "moving")
    assert_refused(call("run", "hello", "--cpu", "host", "--compat"), "--cpu: cannot be combined with --compat")


def test_command_lines_that_do_not_fit() -> None:
    assert_refused(call("run", "hello", "--append", "x" * 4096), "command line: is 4096 bytes long")


@pytest.mark.parametrize("command", ["run", "trace"])
@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "IMAGE: pyhv COMMAND needs it; see pyhv COMMAND --help"),
        (["hello", "more"], "more: pyhv COMMAND takes no further argument; see pyhv COMMAND --help"),
        (["hello", "--jsno"], "--jsno: pyhv COMMAND has no such option; did you mean --json?"),
        (["hello", "--mem"], "--mem: needs a value: --mem SIZE; see pyhv COMMAND --help"),
        (["hello", "--intercept", "none"], "--intercept none: is unknown; choose one of auto, kernel, trap"),
        (["hello", "--timeout", "-1"], "--timeout -1: is not a time in seconds, more than 0"),
    ],
)
def test_usage(command: str, words: list[str], error: str) -> None:
    assert_refused(call(command, *words), error.replace("COMMAND", command))


def test_what_trace_cannot_combine() -> None:
    assert_refused(call("trace", "hello", "--via", "trap", "--intercept", "kernel"), "--via trap: cannot be had with")
    assert_refused(call("trace", "hello", "--via", "tracepoint", "--intercept", "trap"), "--via tracepoint: cannot be")


@pytest.mark.parametrize("words", [["run", "hello"], ["host"], ["trace", "hello"]])
def test_no_kvm(words: list[str]) -> None:
    code = "from pyhv.accel import kvm\nkvm.DEVICE = '/dev/no-such-kvm'\nsys.exit(main(sys.argv[1:]))"
    assert_refused(python(code, *words, "--accel", "kvm"), "/dev/no-such-kvm: ", "modprobe")
    code = "import os\nos.environ['PYHV_UNICORN'] = '/no/such/library'\n" + code
    assert_refused(python(code, *words), "/dev/no-such-kvm: ", "modprobe", "pip install 'pyhv[emulator]'")


def test_no_permission(tmp_path: Path) -> None:
    device = tmp_path / "kvm"
    device.touch(mode=0)
    # Root may open anything, so it becomes another user on its way to the device.
    code = """
import os
import pyhv.machine  # all that the other user may not be able to read
from pyhv import guests
from pyhv.machine import parse_memory
from pyhv.accel import kvm
from pyhv.cli import failure, run  # all that is needed later: that user may not be able to read Python's modules
kvm.DEVICE = sys.argv.pop(1)
open_device = kvm.Kvm.__init__
def drop_and_open(self):
    if os.geteuid() == 0:
        os.seteuid(65534)
    open_device(self)
kvm.Kvm.__init__ = drop_and_open
sys.exit(main(sys.argv[1:]))
"""
    assert_refused(python(code, str(device), "run", "hello", "--accel", "kvm"), f"{device}: ", "may not", "kvm USER")


def test_features_that_this_kernel_cannot_hide(unfaithful: None) -> None:
    done = call("run", "cpuid", "--compat", "--intercept", "kernel")
    assert_refused(done, "--intercept kernel: ", "CPL 0", "CPL 3", "ssse3", "trap")
    done = call("run", "cpuid", "--compat", "--append", "cpl3", "--accel", "kvm")
    assert_refused(done, "cpuid: ", "CPL 3", "--cpu host")
    done = call("trace", "cpuid", "--compat", "--via", "tracepoint")
    assert_refused(done, "--intercept kernel: ", "ssse3")
