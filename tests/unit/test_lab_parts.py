"""The parts of the lab that need no emulator: archives, tables, kinds, errors."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.lab import cli, host, image, kinds, packages, testing
from tests.lab.errors import HostFailed, LabError, Missing
from tests.lab.host import pack, unpack

# -- archives --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("cpio") is None, reason="needs cpio, the reader to compare with")
def test_the_initramfs_is_read_by_cpio(tmp_path: Path) -> None:
    archive = image.cpio(
        [("dir", 0o040755, b""), ("dir/one", 0o100644, b"x"), ("dir/four", 0o100755, b"abcd"), ("empty", 0o100644, b"")]
    )
    assert archive == image.cpio(
        [("dir", 0o040755, b""), ("dir/one", 0o100644, b"x"), ("dir/four", 0o100755, b"abcd"), ("empty", 0o100644, b"")]
    )
    subprocess.run(["cpio", "-i", "--quiet"], input=archive, cwd=tmp_path, check=True, timeout=60)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    found = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in files}
    assert found == {"dir/one": b"x", "dir/four": b"abcd", "empty": b""}
    assert (tmp_path / "dir/four").stat().st_mode & 0o111


def test_files_go_in_and_out(tmp_path: Path) -> None:
    (tmp_path / "from" / "deep").mkdir(parents=True)
    (tmp_path / "from" / "deep" / "file").write_bytes(b"content")
    data = pack({"top": tmp_path / "from"})
    unpack(data, "top", tmp_path / "to")
    assert (tmp_path / "to" / "deep" / "file").read_bytes() == b"content"
    unpack(pack({"file": b"just bytes"}), "file", tmp_path / "single")
    assert (tmp_path / "single").read_bytes() == b"just bytes"


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = kind, target
        archive.addfile(entry, io.BytesIO())
    return out.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        member("top/../../escaped"),
        member("../escaped"),
        member("/escaped"),
        member("other"),
        member("top/link", tarfile.SYMTYPE, "/etc/passwd"),
        member("top/hard", tarfile.LNKTYPE, "/etc/passwd"),
        member("top/device", tarfile.CHRTYPE),
    ],
)
def test_what_leads_elsewhere_is_not_taken_out_of_a_host(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(LabError, match="not copied"):
        unpack(data, "top", tmp_path / "to")
    assert not (tmp_path / "escaped").exists() and not list(tmp_path.rglob("link"))


# -- the kernel ------------------------------------------------------------------------------------------------


def test_module_dependencies() -> None:
    text = b"\x7fELF\0license=GPL\0depends=kvm,irqbypass\0name=kvm_amd\0"
    assert packages.module_dependencies(text) == ["kvm", "irqbypass"]
    assert packages.module_dependencies(text.replace(b"kvm,irqbypass", b"")) == []


def bzimage(payload: bytes) -> bytes:
    out = bytearray(0x800)
    out[0x1F1] = 1
    out[0x1FE:0x200] = b"\x55\xaa"
    out[0x202:0x206] = b"HdrS"
    out[0x248:0x24C] = (0x100).to_bytes(4, "little")
    out[0x24C:0x250] = len(payload).to_bytes(4, "little")
    out[1024 + 0x100 : 1024 + 0x100 + len(payload)] = payload
    return bytes(out)


@pytest.mark.parametrize("tool", ["gzip", "xz"])
def test_the_elf_in_a_bzimage(tool: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"needs {tool}")
    elf = b"\x7fELF" + bytes(1000)
    packed = subprocess.run([tool, "-c"], input=elf, capture_output=True, check=True, timeout=60).stdout
    assert packages.elf_of_bzimage(bzimage(packed + len(elf).to_bytes(4, "little"))) == elf


def test_what_is_no_bzimage() -> None:
    with pytest.raises(LabError, match="no bzImage"):
        packages.elf_of_bzimage(bytes(0x1000))
    with pytest.raises(LabError, match="packed in a way"):
        packages.elf_of_bzimage(bzimage(b"????" + bytes(100)))


def test_static_and_dynamic_executables() -> None:
    def elf(kind: int) -> bytes:
        head = bytearray(64 + 56)
        head[:4] = b"\x7fELF"
        head[32:40] = (64).to_bytes(8, "little")
        head[54], head[56] = 56, 1
        head[64] = kind
        return bytes(head)

    assert packages.has_loader(elf(3))
    assert not packages.has_loader(elf(1))


def test_missing_packages_come_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "COMMON", (packages.Need("some-package", lambda: False),))
    monkeypatch.setattr(packages.os, "geteuid", lambda: 1000)
    with pytest.raises(Missing) as caught:
        packages.provide(set())
    assert "some-package" in str(caught.value) and "\n" not in str(caught.value)
    assert "install -y --no-install-recommends some-package" in caught.value.command


# -- kinds and errors ------------------------------------------------------------------------------------------


def test_the_kinds() -> None:
    assert {kind.vendor for kind in kinds.KINDS.values()} == {"amd", "intel"}
    assert all(name.startswith(kind.vendor) for name, kind in kinds.KINDS.items())
    for names, each in ((testing.QUICK, 2), (testing.FULL, 4)):
        for vendor in ("amd", "intel"):
            assert len({kinds.find(name).model for name in names if kinds.find(name).vendor == vendor}) >= each
    assert any(kinds.find(name).tsc_factor != 1 for name in testing.FULL)


def test_a_kind_that_is_not_there_gets_its_nearest() -> None:
    with pytest.raises(LabError, match="did you mean amd-opteron-g"):
        kinds.find("amd-opteron-g9")
    with pytest.raises(LabError, match="there are: amd-"):
        kinds.find("vax")


def test_a_failed_host_shows_the_end_of_its_console(tmp_path: Path) -> None:
    one = host.Host(kinds.find("amd-epyc"), "some-host", tmp_path / "host")
    one.console.write_bytes(b"".join(b"line %d\r\n" % n for n in range(1000)) + b"\x1b[31mlast\xff\n\n")
    one._close_channel = lambda: None  # type: ignore[method-assign]
    error = one.fail("hangs")
    assert isinstance(error, HostFailed)
    lines = str(error).splitlines()
    assert lines[0] == "some-host: hangs"
    assert str(one.console) in lines[1]
    assert lines[-1] == "    ?[31mlast\N{REPLACEMENT CHARACTER}" and lines[-2] == "    line 999"
    assert len(lines) == 2 + host.TAIL
    assert one.console.exists()
    with pytest.raises(HostFailed):
        one.run(["true"])


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "soon", "1e9"])
def test_bad_patience(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYHV_LAB_PATIENCE", text)
    with pytest.raises(LabError, match="PYHV_LAB_PATIENCE"):
        host.patience()


def test_the_command_says_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "vax", "--", "true"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("pyhv-lab: vax: no such kind")


# -- outcomes --------------------------------------------------------------------------------------------------

JUNIT = b"""<?xml version="1.0" encoding="utf-8"?><testsuites><testsuite name="pytest" tests="4">
<testcase classname="test_a" name="test_x[1]" time="0.5"/>
<testcase classname="tests.inside.test_a" name="test_x[2]" time="0.5">
<failure message="short">at length</failure></testcase>
<testcase classname="test_a" name="test_y" time="1"><skipped message="why">where</skipped></testcase>
<testcase classname="test_b" name="test_z" time="1"><error message="setup">broke</error></testcase>
</testsuite></testsuites>"""


def outcome(name: str, error: str = "", text: bytes = JUNIT) -> testing.Outcome:
    return testing.Outcome(name, testing.read_junit(text), error, 0.2, 3.0)


def test_junit_is_understood() -> None:
    cases = testing.read_junit(JUNIT)
    assert [(case.function, case.outcome) for case in cases] == [
        ("test_a::test_x", "passed"), ("test_a::test_x", "failed"), ("test_a::test_y", "skipped"),
        ("test_b::test_z", "failed"),
    ]  # fmt: skip
    assert [case.message for case in cases] == ["", "at length", "where", "broke"]
    for bad in (b"", b"<a>", b"\xff"):
        with pytest.raises(LabError, match="broken"):
            testing.read_junit(bad)


def test_the_table_and_its_last_line() -> None:
    good = JUNIT.replace(b"<failure", b"<properties").replace(b"</failure", b"</properties")
    outcomes = [outcome("amd-epyc", text=good.replace(b"<error", b"<properties").replace(b"</error", b"</properties")),
                outcome("intel-penryn"), testing.Outcome("amd-phenom", (), "died", 0, 0)]  # fmt: skip
    lines = testing.table(outcomes).splitlines()
    assert lines[0].split() == ["amd", "intel", "amd"] and lines[1].split() == ["epyc", "penryn", "phenom"]
    assert lines[2].split(maxsplit=1) == ["test_a::test_x", "2 ok  FAIL 1/2  -"]
    assert lines[3].split() == ["test_a::test_y", "skip", "skip", "-"]
    assert lines[-2].split() == ["(the", "host)", "ok", "ok", "FAILED"]
    assert testing.summary(outcomes) == "4 passed, 3 failed, 2 skipped"
    assert [one.good for one in outcomes] == [True, False, False]
    assert "intel-penryn: test_a::test_x[2]\nat length" in testing.failures(outcomes)
    assert "amd-phenom: died" in testing.failures(outcomes)
    assert testing.summary(outcomes[:1]) == "3 passed, 0 failed, 1 skipped"


def test_the_table_of_generations() -> None:
    def case(moved: str, became: str = "passed") -> testing.Case:
        return testing.Case("test_generations", "test_it", became, 0, "", (("moved", moved), ("other", "a b c d")))

    cases = (case("amd-phenom amd-epyc hyperv-r2 ok"), case("amd-epyc amd-phenom hyperv-r2 ok"),
             case("amd-epyc amd-phenom host no"), case("amd-phenom amd-epyc host ok", "failed"),
             case("amd-epyc intel-penryn host no"))  # fmt: skip
    _, vendors, models, *rows = testing.generations([testing.Outcome("lab", cases, "", 0, 0)]).splitlines()
    assert vendors.split() == ["to", "amd", "to", "amd", "to", "intel"]
    assert models.split() == ["from", "phenom", "epyc", "penryn"]
    assert [row.split() for row in rows] == [
        ["amd-phenom", ".", "ok/FAIL", "."], ["amd-epyc", "ok/no", ".", "-/no"], ["intel-penryn", ".", ".", "."],
    ]  # fmt: skip
    assert testing.generations([outcome("amd-epyc")]) == ""
    recorded = JUNIT.replace(b"<failure", b'<properties><property name="moved" value="a b c ok"/></properties><failure')
    assert testing.read_junit(recorded)[1].properties == (("moved", "a b c ok"),)


def test_the_table_of_the_ring() -> None:
    hops = (("hop", "amd-phenom amd-epyc tls 1.234 0.0567 2 98765 -0.0012"),
            ("hop", "intel-penryn intel-haswell tty 9.5 7.0 1 14000 -"), ("moved", "a b c ok"))  # fmt: skip
    case = testing.Case("test_ring", "test_it", "passed", 0, "", hops)
    _, names, *rows = testing.ring([testing.Outcome("lab", (case,), "", 0, 0)]).splitlines()
    assert names.split() == ["from", "to", "over", "seconds", "downtime", "rounds", "sent", "clock"]
    assert [row.split() for row in rows] == [
        ["amd-phenom", "amd-epyc", "tls", "1.23", "57", "ms", "2", "99", "kB", "-1.2", "ms"],
        ["intel-penryn", "intel-haswell", "tty", "9.50", "7000", "ms", "1", "14", "kB", "-"],
    ]  # fmt: skip
    assert testing.ring([outcome("amd-epyc")]) == ""


def test_reports_for_machines() -> None:
    outcomes = [outcome("amd-epyc"), testing.Outcome("amd-phenom", (), "died", 0, 0)]
    again = testing.read_junit(testing.as_junit(outcomes))
    assert [case.outcome for case in again] == ["passed", "failed", "skipped", "failed", "failed"]
    data = json.loads(testing.as_json(outcomes))
    assert data["amd-phenom"]["error"] == "died" and len(data["amd-epyc"]["tests"]) == 4
