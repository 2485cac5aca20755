"""`pyhv features`, `profiles` and `diff`: what they print, and that bad input is one line. None of it needs KVM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pyhv.cli import COMMANDS, main, output
from pyhv.cpu import features, profiles
from pyhv.cpu.table import CpuidTable, Registers
from pyhv.errors import NotAvailable

INTEL = (0x756E6547, 0x6C65746E, 0x49656E69)  # EBX, ECX, EDX of leaf 0


def call(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Runs a command; its status, stdout and stderr."""
    status = main(list(words))
    captured = capfd.readouterr()
    return status, captured.out, captured.err


def call_json(capfd: pytest.CaptureFixture[str], *words: str, status: int = 0) -> Any:
    found, out, err = call(capfd, *words, "--json")
    assert (found, err) == (status, "")
    return json.loads(out)


@pytest.fixture
def no_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyhv.accel import choose

    def refuse(name: str = "auto") -> None:
        raise NotAvailable("/dev/kvm", "there is no such device", "load the kernel's module")

    monkeypatch.setattr(choose, "open_accelerator", refuse)


def table(ecx: int = 0, edx: int = 0x078BFBFF, brand: int = 0) -> CpuidTable:
    return CpuidTable(
        {
            (0, 0): Registers(1, *INTEL),
            (1, 0): Registers(0x506E3, 0x800 | brand, ecx, edx),
            (0x80000000, 0): Registers(0x80000001, 0, 0, 0),
            (0x80000001, 0): Registers(0, 0, 1, 0x20100800),
        }
    )


@pytest.fixture
def dump(tmp_path: Path) -> Any:
    def write(name: str, made: CpuidTable) -> str:
        path = tmp_path / name
        path.write_text(made.to_cpuid_r())
        return str(path)

    return write


# ------------------------------------------------------------------------------------------------ pyhv itself


def test_version_and_help(capfd: pytest.CaptureFixture[str]) -> None:
    import pyhv

    assert call(capfd, "--version") == (0, f"pyhv {pyhv.__version__}\n", "")
    status, out, err = call(capfd, "--help")
    assert (status, err) == (0, "")
    for command in COMMANDS:
        assert f"\n  {command} " in out
    assert "example" in out
    for words in (("help",), ("help", "run")):
        assert call(capfd, *words) == call(capfd, *words[1:], "--help") != (0, "", "")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], f"command: none was given; there are {', '.join(COMMANDS)}; see pyhv --help"),
        (["rum"], "rum: is no command; did you mean run?"),
        (["kill", "t"], "kill: is no command; did you mean stop?"),
        (["run", "--image", "x"], "--image: pyhv run has no such option; it is an argument: pyhv run IMAGE"),
        (["run", "x", "--module", ""], "--module : is empty; name a file"),
        (["run", "x", "--timeout", "99999999999"], "--timeout 99999999999: is too long; the most is "),
        (["help", "run", "x"], "x: pyhv help takes one command and no more; see pyhv help run"),
        (["help", "rum"], "rum: is no command; did you mean run?"),
        (["--verison"], "--verison: is no option of pyhv; "),
        (["features", "popcn"], "feature 'popcn': there is no such feature; did you mean popcnt"),
        (["features", "--leaf", "seven"], "--leaf seven: is not a leaf; give a number such as 7, 7.1 or 0x80000001"),
        (["features", "--leaf", "99"], "--leaf 99: no feature that pyhv knows is there; leaves with features are "),
        (["features", "avx", "--leaf", "1"], "--leaf: cannot be combined with the name of a feature"),
        (["profiles", "hyperv"], "profile 'hyperv': there is no such profile; did you mean hyperv-r2?"),
        (["profiles", "/nonexistent.toml"], "/nonexistent.toml: No such file or directory; "),
        (["diff", "hyperv-r2"], "B: pyhv diff needs it; see pyhv diff --help"),
        (["diff", "hyperv-r2", "hyprev-r2"], "hyprev-r2: is neither a file nor a profile; did you mean hyperv-r2?"),
        (["diff", "hyperv-r2", "/nonexistent"], "/nonexistent: No such file or directory"),
        (["diff", "hyperv-r2", "/"], "/: Is a directory"),
    ],
)
def test_bad_input_is_one_line(words: list[str], error: str, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = call(capfd, *words)
    assert (status, out) == (2, "")
    assert err.startswith(f"pyhv: {error}")
    assert err.count("\n") == 1 and err.endswith("\n")


def test_names_cannot_break_the_line(capfd: pytest.CaptureFixture[str]) -> None:
    status, _, err = call(capfd, "profiles", "./no\nsuch\x1b[31m\udcff.toml")
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("pyhv: ./no\\nsuch\\x1b[31m\\udcff.toml: ")


def test_unexpected_errors_ask_for_a_report(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("PYHV_DEBUG", raising=False)
    monkeypatch.setattr(features, "find", lambda name: [][0])
    status, out, err = call(capfd, "features", "avx")
    assert (status, out) == (125, "")
    assert err.startswith("pyhv: internal error: IndexError: list index out of range; please report this")
    assert err.count("\n") == 1
    monkeypatch.setenv("PYHV_DEBUG", "1")
    status, out, err = call(capfd, "features", "avx")
    assert (status, out) == (125, "")
    assert "Traceback" in err and "pyhv: internal error: IndexError" in err


# ------------------------------------------------------------------------------------------- features, profiles


def test_features_lists_all(capfd: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capfd, "features")
    lines = [line.split()[1] for line in out.splitlines() if line[:5].strip().isdigit()]
    assert lines == [feature.name for feature in features.FEATURES]
    assert [row["name"] for row in call_json(capfd, "features")["features"]] == lines


def test_features_of_a_leaf(capfd: pytest.CaptureFixture[str]) -> None:
    for text, leaf, subleaves in (("7", 7, {0, 1, 2}), ("7.1", 7, {1}), ("0x80000001", 0x80000001, {0})):
        rows = call_json(capfd, "features", "--leaf", text)["features"]
        assert {int(row["leaf"], 16) for row in rows} == {leaf}
        assert {row["subleaf"] for row in rows} == subleaves


@pytest.mark.usefixtures("no_kvm")
@pytest.mark.parametrize("name", ["lzcnt", "ABM", "abm"])
def test_all_about_one_feature(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = call(capfd, "features", name)
    assert (status, err) == (0, "")
    assert out.startswith("abm: ")
    assert "leaf 0x80000001 ecx, bit 5 (mask 0x00000020)" in out
    assert "lzcnt" in out
    assert "not known: /dev/kvm: there is no such device" in " ".join(out.split())


@pytest.mark.usefixtures("no_kvm")
def test_what_requires_a_feature(capfd: pytest.CaptureFixture[str]) -> None:
    value = call_json(capfd, "features", "avx")
    assert "xsave" in value["requires"]
    assert {"avx2", "fma", "f16c"} <= set(value["required_by"])
    assert value["xsave"] == [2]
    assert value["profiles"] == {"host": ["intel", "amd"], "hyperv-r2": []}
    assert value["host"] is None and "/dev/kvm" in value["host_error"]
    # The profile shows MMXEXT on AMD only.
    assert call_json(capfd, "features", "mmxext")["profiles"]["hyperv-r2"] == ["amd"]


def test_profiles_lists_the_built_in_ones(capfd: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capfd, "profiles")
    assert [line.split()[0] for line in out.splitlines()] == profiles.names()


@pytest.mark.usefixtures("no_kvm")
def test_a_profile_with_its_words(capfd: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capfd, "profiles", "hyperv-r2")
    assert status == 0
    # The published base of both vendors: the check of kvm-facts' reader, less what is not for guests.
    assert "leaf 0x1 edx          078bfbff    078bfbff" in out
    assert "leaf 0x1 ecx          80202001    80202001" in out
    assert "36 on Intel, 40 on AMD" in out
    assert "Hidden is not blocked" in out
    assert "not known: /dev/kvm" in out
    value = call_json(capfd, "profiles", "hyperv-r2")
    assert value["intel"]["limits"]["physical_address_bits"] == 36
    assert "ssse3" not in value["intel"]["features"] and "cx16" in value["amd"]["features"]


def test_a_malformed_profile_names_file_line_and_field(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\ntitle = "t"\ndescription = "d"\n\n[features]\ncommon = ["fpu", "nosuch"]\n')
    status, out, err = call(capfd, "profiles", str(path))
    assert (status, out, err.count("\n")) == (2, "", 1)
    for word in (str(path), "6", "common", "nosuch"):
        assert word in err


# ---------------------------------------------------------------------------------------------------- diff


def test_no_difference(dump: Any, capfd: pytest.CaptureFixture[str]) -> None:
    a, b = dump("a", table()), dump("b", table())
    assert call(capfd, "diff", a, b) == (0, f"{a} and {b}: no difference\n", "")
    assert call(capfd, "diff", "hyperv-r2", "hyperv-r2")[0] == 0
    assert call_json(capfd, "diff", a, b)["same"] is True


def test_numbers_beside_features_differ_as_numbers(dump: Any, capfd: pytest.CaptureFixture[str]) -> None:
    def avx10(version: int) -> CpuidTable:
        made = table()
        changes = {(0, 0): made.get(0)._replace(eax=0x24), (0x24, 0): Registers(0, 7 << 16 | version, 0, 0)}
        return made.replace(changes)

    a, b = dump("a", avx10(1)), dump("b", avx10(2))
    value = call_json(capfd, "diff", a, b, status=1)
    (comparison,) = value["comparisons"]
    assert (comparison["only_in_a"], comparison["only_in_b"], comparison["words"]) == ([], [], [])
    assert [(row["what"], row["a"], row["b"]) for row in comparison["numbers"]] == [
        ("avx10_version (version of AVX10)", 1, 2)
    ]
    # To a profile, which says nothing of it, it is no difference.
    value = call_json(capfd, "diff", "hyperv-r2", b, status=1)
    assert not [name for name in value["comparisons"][0]["only_in_b"] if name.startswith("0x24")]


def test_differences_by_name_and_bit(dump: Any, capfd: pytest.CaptureFixture[str]) -> None:
    # PNI and bit 16, which nobody defines; POPCNT and SSSE3; and the brand index, which is a number
    a, b = dump("a", table(ecx=0x00010001)), dump("b", table(ecx=0x00800200, brand=7))
    status, out, err = call(capfd, "diff", a, b)
    assert (status, err) == (1, "")
    assert "only in A: 2\n  pni 0x1.ecx[16]\n" in out
    assert "only in B: 2\n  ssse3 popcnt\n" in out
    assert (
        "leaf 0x1 ecx\n"
        "  A  0x00010001  0000 0000 0000 0001 0000 0000 0000 0001\n"
        "  B  0x00800200  0000 0000 1000 0000 0000 0010 0000 0000\n"
        "                           ^       ^        ^          ^\n"
    ) in out
    assert "numbers that differ\n  0x1.ebx  0x00000800  0x00000807\n" in out
    value = call_json(capfd, "diff", a, b, status=1)
    (comparison,) = value["comparisons"]
    assert comparison["only_in_b"] == ["ssse3", "popcnt"]
    assert comparison["words"] == [
        {"leaf": "0x1", "subleaf": 0, "register": "ecx", "a": "0x00010001", "b": "0x00800200", "differ": "0x00810201"}
    ]


def test_an_absent_leaf_is_zeros(dump: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with_zeros = table().replace({(0x80000001, 0): table().get(0x80000001), (1, 0): table().get(1)})
    more = CpuidTable({**with_zeros.entries, (0x40000000, 0): Registers(0, 0, 0, 0)})
    assert call(capfd, "diff", dump("a", table()), dump("b", more))[0] == 0


def test_a_table_against_a_profile(dump: Any, capfd: pytest.CaptureFixture[str]) -> None:
    # HT follows from the number of vCPUs, OSXSAVE from the guest: no profile decides them, so they are no difference.
    ht, osxsave = features.find("ht"), features.find("osxsave")
    made = table(ecx=0x80202001 | osxsave.mask, edx=0x078BFBFF | ht.mask)
    value = call_json(capfd, "diff", "hyperv-r2", dump("a", made), status=1)
    (comparison,) = value["comparisons"]
    assert comparison["vendor"] == "intel"
    assert comparison["only_in_b"] == []
    assert set(comparison["only_in_a"]) == {"kvm_clocksource", "kvm_clocksource2", "kvm_clocksource_stable"}
    assert {"what": "max basic leaf", "a": 0xB, "b": 1} in comparison["numbers"]


def test_two_profiles_are_compared_for_both_vendors(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "less.toml"
    path.write_text('name = "less"\ntitle = "t"\ndescription = "d"\n[features]\ncommon = ["fpu"]\namd = ["de"]\n')
    value = call_json(capfd, "diff", "hyperv-r2", str(path), status=1)
    assert [comparison["vendor"] for comparison in value["comparisons"]] == ["intel", "amd"]
    intel, amd = value["comparisons"]
    assert "de" in intel["only_in_a"] and "de" not in amd["only_in_a"]


@pytest.mark.usefixtures("no_kvm")
def test_host_is_this_host(capfd: pytest.CaptureFixture[str]) -> None:
    status, _, err = call(capfd, "diff", "host", "hyperv-r2")
    assert (status, err) == (2, "pyhv: /dev/kvm: there is no such device; load the kernel's module\n")


# ------------------------------------------------------------------------------------------------ small things


def test_carets_stand_under_the_bits() -> None:
    lines = output.bits_with_carets([("a", 0x80000000), ("bb", 0x00000001), ("c", 0x00000001)])
    assert len(lines) == 4
    columns = [i for i, character in enumerate(lines[3]) if character == "^"]
    assert [lines[0][i] for i in columns] == ["1", "0"]
    assert [lines[1][i] for i in columns] == ["0", "1"]
    for line in lines[:3]:
        assert line[lines[0].index("0x") :][:10] == f"0x{int(line.split()[1], 16):08x}"
