"""Profiles: what the built-in ones come to, bit by bit, and what a user's file is told when it is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyhv.cpu import compile_profile, profiles
from pyhv.cpu.feature_types import Word
from pyhv.cpu.features import BY_NAME, FEATURES, by_any_name, closure, pack
from pyhv.errors import BadInput

# The feature words that guests of the compatibility mode read, as whole numbers; every word not named is zero. In KVM's
# own leaf: CLOCKSOURCE, CLOCKSOURCE2 and CLOCKSOURCE_STABLE.
HYPERV_R2 = {
    "intel": {
        Word(0x1, 0, "ecx"): 0x80202001,
        Word(0x1, 0, "edx"): 0x078BFBFF,
        Word(0x80000001, 0, "ecx"): 0x00000001,
        Word(0x80000001, 0, "edx"): 0x20100800,
        Word(0x40000001, 0, "eax"): 0x01000009,
    },
    "amd": {
        Word(0x1, 0, "ecx"): 0x80202001,
        Word(0x1, 0, "edx"): 0x078BFBFF,
        Word(0x80000001, 0, "ecx"): 0x00000011,
        Word(0x80000001, 0, "edx"): 0x21D3FBFF,
        Word(0x40000001, 0, "eax"): 0x01000009,
    },
}
# What every dump of a VT-x or SVM processor has (58, 2006 to 2024): the mode shows nothing beyond it but KVM's.
COMMON = {
    "intel": {"1.ecx": 0x0000E005, "1.edx": 0xBFEBFBFF, "80000001.ecx": 0x00000001, "80000001.edx": 0x20100000},
    "amd": {"1.ecx": 0x00002001, "1.edx": 0x178BFBFF, "80000001.ecx": 0x0000001F, "80000001.edx": 0x2BD3FBFF},
}


def words(text: str) -> set[str]:
    return set(text.split())


# -------------------------------------------------------------------------------------------- the built-in ones


@pytest.mark.parametrize("vendor", ["intel", "amd"])
def test_hyperv_r2_words(vendor: str) -> None:
    values = pack(profiles.load("hyperv-r2").allowed(vendor))
    assert {word: value for word, value in values.items() if value} == HYPERV_R2[vendor]


@pytest.mark.parametrize("vendor", ["intel", "amd"])
def test_hyperv_r2_shows_what_every_processor_has(vendor: str) -> None:
    hardware = [n for n in profiles.load("hyperv-r2").allowed(vendor) if BY_NAME[n].kvm != "provides"]
    for word, value in pack(hardware).items():
        common = COMMON[vendor].get(f"{word.leaf:x}.{word.register}", 0)
        if (vendor, word) == ("intel", Word(0x80000001, 0, "edx")):
            common |= BY_NAME["syscall"].mask  # Intel shows it to 64-bit code alone, and many dumps were not
        assert value & ~common == 0, str(word)


def test_hyperv_r2_keeps_what_it_promises_and_hides_the_lists() -> None:
    kept = {vendor: profiles.load("hyperv-r2").allowed(vendor) for vendor in ("intel", "amd")}
    for vendor in kept:
        assert {"pni", "cx16", "lahf_lm", "syscall", "nx", "lm", "x2apic", "hypervisor"} <= kept[vendor]
        hidden = (
            "ssse3 sse4_1 sse4_2 sse4a popcnt abm misalignsse xop fma4 f16c 3dnow 3dnowext 3dnowprefetch xsave avx aes "
            "pclmulqdq movbe rdrand fsgsbase bmi1 bmi2 smep smap erms pcid rdtscp pdpe1gb tsc_deadline_timer invtsc "
            "tsc_adjust arat spec_ctrl amd_ibpb md_clear arch_capabilities kvm_steal_time kvm_async_pf ss ht"
        )
        assert kept[vendor].isdisjoint(words(hidden))
    assert kept["amd"] - kept["intel"] == {"cr8_legacy", "mmxext"} | {
        f.name for f in FEATURES if f.mirrors and f.word.leaf == 0x80000001
    }
    assert kept["intel"] <= kept["amd"]


def test_hyperv_r2_limits() -> None:
    profile = profiles.load("hyperv-r2")
    assert profile.limits("intel") == profiles.Limits(0xB, 0x80000008, 36, 64)
    assert profile.limits("amd") == profiles.Limits(0xB, 0x80000008, 40, 64)
    assert profile.limits("HygonGenuine") == profile.limits("amd")
    assert profile.allowed("HygonGenuine") == profile.allowed("amd")
    assert profile.moving
    for ask in (profile.allowed, profile.limits):
        with pytest.raises(BadInput, match=r"profile hyperv-r2: it is for Intel's and AMD's .* 'Vortex86 SoC'"):
            ask("Vortex86 SoC")


def test_hyperv_r2_tells_what_it_hides() -> None:
    text = profiles.load("hyperv-r2").description
    lists = "SSSE3 SSE4.1 SSE4.2 SSE4A SSE5 XOP FMA4 F16C POPCNT LZCNT 3DNow! XSAVE AVX misaligned"
    rest = "SPEC_CTRL IBPB MD_CLEAR ARCH_CAPABILITIES cannot mitigate kvmclock x86-64-v1 x86-64-v2"
    for word in words(f"{lists} {rest}"):
        assert word in text
    assert "Hidden is not blocked" in text


def test_host_shows_all_that_kvm_gives_and_that_can_be_migrated() -> None:
    host = profiles.load("host")
    shown = host.allowed("intel")
    assert shown == host.allowed("amd") == host.allowed("Vortex86 SoC")
    for feature in FEATURES:
        wanted = feature.kvm != "never" and feature.migratable and not feature.barred
        assert (feature.name in shown) == (wanted and not feature.topology and not feature.dynamic), feature.name
    assert shown >= {
        "avx512f",
        "amx_tile",
        "spec_ctrl",
        "tsc_deadline_timer",
        "x2apic",
        "fpu_mirror",
        "kvm_clocksource",
    }
    assert shown.isdisjoint(
        {"invtsc", "vmx", "svm", "npt", "perfctr_core", "pdcm", "sgx", "intel_pt", "monitor", "osxsave"}
    )
    assert host.limits("intel") == host.limits("anything") == profiles.Limits(None, None, None, None)
    assert not host.moving


@pytest.mark.parametrize("name", profiles.names())
def test_every_profile_is_sound(name: str) -> None:
    profile = profiles.load(name)
    assert (profile.name, profile.source) == (name, "built in")
    assert profile.title and "\n" not in profile.title
    assert profile.description == profile.description.strip() != ""
    for vendor in ("intel", "amd"):
        shown = profile.allowed(vendor)
        assert closure(shown).dropped == {}
        for feature in map(BY_NAME.__getitem__, shown):
            assert not (feature.barred or feature.topology or feature.dynamic)
            assert not feature.mirrors or feature.mirrors in shown
            limit = profile.limits(vendor)[feature.word.leaf >> 31]
            assert limit is None or feature.word.leaf <= limit or feature.word.leaf >> 30 == 1
        if profile.moving:
            assert shown.isdisjoint({"invtsc", "tsc_deadline_timer"})
            assert None not in profile.limits(vendor)


def test_names_and_unknown_names() -> None:
    assert profiles.names()[:2] == ["host", "hyperv-r2"]
    with pytest.raises(BadInput) as caught:
        profiles.load("hyperv-r3")
    assert str(caught.value) == (
        "profile 'hyperv-r3': there is no such profile; did you mean hyperv-r2? (a file ends in .toml)"
    )
    with pytest.raises(BadInput, match="there is no such profile; there are host, hyperv-r2"):
        profiles.load("zzz")


# ---------------------------------------------------------------------------------------------- a user's profile

SOUND = '''\
# my profile
name = "mine"
title = "One line"
description = """
[features]   looks like a table, but is text
common = ["no"]
"""
moving = true

[features]
common = [
    "fpu",   # the "first"
    "tsc", "msr", "fxsr", 'sse',
    "sse2", "pae", "cmov", "cx8", "lm",
    "sse3",
]
intel = ["ss"]
amd = ["cr8_legacy", "sse4a"]

[limits]
max_basic_leaf = 0xB
max_extended_leaf = 0x80000008
physical_address_bits = { intel = 39, amd = 40 }
clflush_size = 64
'''


def write(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "mine.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def test_a_sound_file(tmp_path: Path) -> None:
    path = write(tmp_path, SOUND)
    profile = profiles.load(path)
    assert (profile.source, profile.name, profile.title, profile.moving) == (path, "mine", "One line", True)
    assert profile.description.startswith("[features]   looks like")
    assert profile.intel == ("ss",)
    intel, amd = profile.allowed("intel"), profile.allowed("amd")
    assert intel == words("fpu tsc msr fxsr sse sse2 pae cmov cx8 lm pni ss")  # the alias became canonical
    assert amd - intel == words(
        "cr8_legacy sse4a fpu_mirror tsc_mirror msr_mirror fxsr_mirror pae_mirror cmov_mirror cx8_mirror"
    )
    assert profile.limits("intel") == profiles.Limits(0xB, 0x80000008, 39, 64)
    assert profile.limits("amd").physical_address_bits == 40


def test_all_but_some(tmp_path: Path) -> None:
    head = 'name = "mine"\ntitle = "t"\ndescription = ""\n'
    profile = profiles.load(write(tmp_path, f'{head}[features]\nall = true\nhide = ["AVX512F", "fpu"]\n'))
    host, mine = profiles.load("host").allowed("amd"), profile.allowed("amd")
    assert mine < host
    assert mine.isdisjoint({"avx512f", "avx512bw", "avx512_bf16", "fpu", "fpu_mirror", "sse2", "lm"})
    assert {"popcnt", "bmi2"} <= mine
    assert profile.limits("amd") == profiles.Limits(None, None, None, None)


# Changes that make a second problem: a misspelt key is a missing one, too, and `all` conflicts with the lists left.
MORE_THAN_ONE = ["[limits]", "clflush_size = 64", 'intel = ["ss"]']


def edited(*replacements: tuple[str, str]) -> str:
    text = SOUND
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new, 1)
    return text


# What is changed in SOUND; then the line, the field and the beginning of the text of the one problem that it makes.
FAULTS: list[tuple[tuple[str, str], int, str, str]] = [
    (('name = "mine"', ""), 1, "name", "it is missing"),
    (('name = "mine"', "name = 7"), 2, "name", "it is 7; it must be a string"),
    (('name = "mine"', 'name = "Mine!"'), 2, "name", "'Mine!' is not of lower-case letters"),
    (('title = "One line"', 'title = ""'), 3, "title", "it must be one line that is not empty"),
    (('title = "One line"', 'title = "One\\nline"'), 3, "title", "it must be one line that is not empty"),
    (('title = "One line"', ""), 1, "title", "it is missing"),
    (("moving = true", 'moving = "yes"'), 8, "moving", "it is 'yes'; it must be true or false"),
    (("moving = true", "movign = true"), 8, "movign", "unknown field (did you mean moving?); the fields here are name"),
    (("[limits]", "[limit]"), 20, "limit", "unknown field (did you mean limits?)"),
    (
        ("clflush_size = 64", "clflush_sise = 64"),
        24,
        "limits.clflush_sise",
        "unknown field (did you mean clflush_size?)",
    ),
    (("clflush_size = 64", ""), 20, "limits.clflush_size", "it is missing; a profile for moving gives max_"),
    (("clflush_size = 64", "clflush_size = 63"), 24, "limits.clflush_size", "it is 63; it must be a multiple of 8"),
    (("clflush_size = 64", "clflush_size = 4096"), 24, "limits.clflush_size", "it is 4096; it must be a multiple of 8"),
    (("clflush_size = 64", "clflush_size = 64.0"), 24, "limits.clflush_size", "it is 64.0; it must be"),
    (("max_basic_leaf = 0xB", "max_basic_leaf = true"), 21, "limits.max_basic_leaf", "it is True; it must be a basic"),
    (("= 0x80000008", "= 8"), 22, "limits.max_extended_leaf", "it is 8; it must be an extended leaf"),
    (("intel = 39", "intel = 31"), 23, "limits.physical_address_bits", "it is 31; it must be 32 to 52 bits"),
    (
        ("intel = 39, ", ""),
        23,
        "limits.physical_address_bits",
        "a table here has the keys intel and amd, and no others",
    ),
    (
        ("intel = 39", "via = 1, intel = 39"),
        23,
        "limits.physical_address_bits",
        "a table here has the keys intel and amd",
    ),
    (('"sse3"', '"sse33"'), 15, "features.common", "unknown feature 'sse33' (did you mean sse3 or "),
    (("'sse'", "'sse', 'SSE'"), 13, "features.common", "sse is there twice"),
    (('"sse3"', '"sse3", 3'), 11, "features.common", "it holds 3; it must hold feature names"),
    (('intel = ["ss"]', 'intel = "ss"'), 17, "features.intel", "it must be an array of feature names"),
    (('["ss"]', '["ss", "vmx"]'), 17, "features.intel", "vmx may be shown by no profile: guests get no virtualization"),
    (
        ('"sse4a"]', '"sse4a", "svm"]'),
        18,
        "features.amd",
        "svm may be shown by no profile: guests get no virtualization",
    ),
    (
        ('"sse4a"]', '"sse4a",\n"npt"]'),
        19,
        "features.amd",
        "npt may be shown by no profile: guests get no virtualization",
    ),
    (
        ('"sse4a"]', '"perfctr_core"]'),
        18,
        "features.amd",
        "perfctr_core may be shown by no profile: guests get no perf",
    ),
    (('["ss"]', '["ss", "pdcm"]'), 17, "features.intel", "pdcm may be shown by no profile: guests get no performance"),
    (('["ss"]', '["ss", "xop"]'), 17, "features.intel", "xop belongs under `amd`: no other vendor has it"),
    (('"sse3"', '"sse3", "sse4a"'), 15, "features.common", "sse4a belongs under `amd`"),
    (('["ss"]', '["ss", "fpu"]'), 17, "features.intel", "fpu is under `common` already"),
    (
        ('["ss"]', '["ss", "ssse3", "sse4.2"]'),
        17,
        "features.intel",
        "sse4_2 requires sse4_1, which is not listed for intel",
    ),
    (('    "fpu",   # the "first"', ""), 13, "features.common", "fxsr requires fpu, which is not listed"),
    (('"sse3"', '"sse3", "ht"'), 15, "features.common", "ht follows from the VM's number of vCPUs: leave it out"),
    (('"sse3"', '"sse3", "osxsave"'), 15, "features.common", "osxsave follows what the guest's system switches on"),
    (('"sse4a"]', '"fpu_mirror"]'), 18, "features.amd", "fpu_mirror goes where fpu goes: list that instead"),
    (('"sse3"', '"sse3", "invtsc"'), 15, "features.common", "invtsc cannot be shown by a profile for moving"),
    (('["ss"]', '["ss", "sgx"]'), 17, "features.intel", "sgx cannot be shown by a profile for moving: it ties"),
    (('"tsc"', '"tsc",\n"tsc-deadline"'), 14, "features.common", "tsc_deadline_timer cannot be shown by a profile for"),
    (('["ss"]', '["ss", "pse36"]'), 17, "features.intel", "pse36 requires pse, which is not listed for intel"),
    (('intel = ["ss"]', 'hide = ["ss"]'), 17, "features.hide", "it goes only with `all`: without, what is not listed"),
    (('intel = ["ss"]', "all = false"), 17, "features.all", "it is False; it can only be true, or be left out"),
]


@pytest.mark.parametrize(("change", "line", "field", "text"), FAULTS)
def test_faults_are_told_with_their_line(
    tmp_path: Path, change: tuple[str, str], line: int, field: str, text: str
) -> None:
    path = write(tmp_path, edited(change))
    with pytest.raises(profiles.BadProfile) as caught:
        profiles.load(path)
    problems = caught.value.problems
    assert [p for p in problems if (p.line, p.field) == (line, field) and p.text.startswith(text)], problems
    assert "\n" not in str(caught.value)
    assert len(problems) == 1 or change[0] in MORE_THAN_ONE
    if len(problems) == 1:
        assert str(caught.value).startswith(f"{path}:{line}: {field}: {text}")


def test_a_feature_above_a_limit(tmp_path: Path) -> None:
    path = write(tmp_path, edited(('"sse3"', '"sse3",\n"smep"'), ("max_basic_leaf = 0xB", "max_basic_leaf = 0x6")))
    with pytest.raises(
        profiles.BadProfile, match=r"mine\.toml: line 16: features\.common: smep is in leaf 0x7, above the limit"
    ):
        profiles.load(path)


def test_all_does_not_go_with_lists_and_needs_no_clock(tmp_path: Path) -> None:
    path = write(tmp_path, edited(("[features]\ncommon", "[features]\nall = true\nhide = ['sse99']\ncommon")))
    with pytest.raises(profiles.BadProfile) as caught:
        profiles.load(path)
    assert [(p.line, p.field, p.text.split(" (")[0]) for p in caught.value.problems] == [
        (12, "features.hide", "unknown feature 'sse99'"),
        (12, "features.hide", "tsc_deadline_timer is missing: TSC rates differ between hosts"),
        (13, "features.common", "it does not go with `all`, which shows everything but `hide`"),
        (19, "features.intel", "it does not go with `all`, which shows everything but `hide`"),
        (20, "features.amd", "it does not go with `all`, which shows everything but `hide`"),
    ]
    assert str(caught.value).startswith(f"{path}: line 12: features.hide: unknown feature 'sse99'")


@pytest.mark.parametrize(
    ("text", "line", "field", "problem"),
    [
        (b"", 1, "name", "it is missing"),
        (b'name = "a"\ntitle = "b"\ndescription = "c"\n', 1, "features", "it is missing"),
        (b'name = "a"\ntitle = "b"\ndescription = "c"\nfeatures = 1\n', 4, "features", "it must be a table"),
        (b'name = "a"\ntitle = "b"\ndescription = "c"\n[features]\n', 4, "features", "it lists nothing"),
        (
            b'name = "a"\ntitle = "b"\ndescription = "c"\nlimits = 3\nfeatures.all = true',
            4,
            "limits",
            "it must be a table",
        ),
        (
            b'name = "a"\ntitle = "b"\ndescription = "c"\nfeatures.all = 1',
            4,
            "features.all",
            "it is 1; it can only be true",
        ),
        (b'name = "a"\ntitle\n', 2, "", "Expected '=' after a key in a key/value pair (column 6)"),
        (b'name = "a"\n\nname = "b"', 3, "", "Cannot overwrite a value (at end of document)"),
        (b'name = "a"\ntitle = """\nabc\n', 3, "", "Unterminated string"),
        (b'name = "a"\n\xff\n', 2, "", "it is not UTF-8 text"),
        (b"name = " + b"[" * 100000, 1, "", "arrays or tables are nested too deep"),
        (b"name = " + b"9" * 100000, 1, "", "Exceeds the limit"),
    ],
)
def test_broken_files(tmp_path: Path, text: bytes, line: int, field: str, problem: str) -> None:
    with pytest.raises(profiles.BadProfile) as caught:
        profiles.load(write(tmp_path, text))
    assert (caught.value.problems[0].line, caught.value.problems[0].field) == (line, field)
    assert problem in f"{caught.value.problems[0].text} (at end of document)"
    assert "\n" not in str(caught.value)


def test_many_problems_are_counted_not_all_told(tmp_path: Path) -> None:
    names = ",\n".join(f'"nonsense{n}"' for n in range(1000))
    path = write(tmp_path, edited(("moving = true", "moving = false"), ('"fpu",', names + ', "fpu",')))
    with pytest.raises(profiles.BadProfile) as caught:
        profiles.load(path)
    assert [p.line for p in caught.value.problems] == list(range(12, 1012))
    assert str(caught.value).endswith("; and 990 more")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, problem in (
        (str(tmp_path / "none.toml"), "No such file or directory; give the path of a profile file"),
        (f"{tmp_path}/", "Is a directory"),
        ("a\0b.toml", "this is no file name"),
        (write(tmp_path, b"#" * ((1 << 20) + 1)), "it is larger than 1048576 bytes; this is no profile file"),
    ):
        with pytest.raises(BadInput) as caught:
            profiles.load(path)
        assert str(caught.value).startswith(f"{path}: {problem}")


# ------------------------------------------------------------------------------------------- finding the lines

KEYS = st.sampled_from(["name", "limits", "common", '"a=b"', "'#'", "x.y", "[features]"])
VALUES = st.sampled_from(
    [
        '"a"',
        "'b#'",
        '"""\nx = 1\n"""',
        "'''\n[y]\n'''",
        "[1, [2,\n 3]]",
        "{ a = 1, b = '}' }",
        '"\\""',
        "1 # n = 2",
        "true",
    ]
)


@given(st.lists(st.tuples(KEYS, VALUES, st.integers(0, 2)), max_size=12))
def test_keys_are_found_on_their_lines(items: list[tuple[str, str, int]]) -> None:
    """Against documents whose layout is known: each key where it was put, whatever stands in the values."""
    text, expected, section = "", {}, ""
    for key, value, blanks in items:
        text += "\n" * blanks
        line = text.count("\n") + 1
        if key.startswith("["):
            section = key.strip("[]") + "."
            expected.setdefault("features", line)
            text += key + " # comment\n"
        else:
            path = section + key.strip("\"'")
            expected.setdefault(path, line)
            text += f"{key} = {value}\n"
    lines = compile_profile._Lines(text)
    for path, line in expected.items():
        assert lines.of(path) == line


@given(st.text(st.sampled_from("a=\"'#[]{}\n\\.,1 "), max_size=60))
def test_any_text_ends(text: str) -> None:
    assert compile_profile._Lines(text).of("a", "a") >= 1


@given(st.text(max_size=200) | st.text(st.sampled_from("name=\"'[]{}\n\\#.,tru1 "), max_size=80))
def test_compiling_any_text_ends_in_a_profile_or_its_faults(text: str) -> None:
    with pytest.raises(compile_profile.ProfileFault) as caught:  # no such text is a whole profile
        compile_profile.compile_profile(text, by_any_name())
    highest = text.count("\n") + 1
    assert all(1 <= p.line <= highest and p.text for p in caught.value.problems)


@given(st.sets(st.sampled_from([f.name for f in FEATURES])), st.sampled_from(["intel", "amd"]))
def test_any_lists_compile_to_a_closed_set_or_are_refused(names: set[str], vendor: str) -> None:
    """Whatever a user lists: either it is refused, or exactly it (and its mirrors) may be seen, and nothing barred."""
    quoted = ", ".join(f'"{n}"' for n in sorted(names))
    text = f'name = "a"\ntitle = "b"\ndescription = ""\n[features]\n{vendor} = [{quoted}]\n'
    try:
        profile = profiles._from_literal("test", compile_profile.compile_profile(text, by_any_name()))
    except compile_profile.ProfileFault as fault:
        for problem in fault.problems:
            assert problem.line == 5
            assert (match := re.match(r"(\w+) ", problem.text)) and match[1] in names
        return
    shown = profile.allowed(vendor)
    assert {n for n in shown if not BY_NAME[n].mirrors} == names
    assert closure(shown).kept == shown
    assert not any(BY_NAME[n].barred for n in shown)
