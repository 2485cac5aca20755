"""The feature table: its generator, its look-ups, and its facts against independent lists of the same facts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyhv.cpu import feature_table, features, generate
from pyhv.cpu.feature_types import Word
from pyhv.cpu.features import (
    BY_NAME,
    FEATURES,
    NUMBERS,
    WORDS,
    XSAVE_COMPONENTS,
    by_any_name,
    closure,
    find,
    lineage,
    pack,
)
from pyhv.errors import BadInput

ROOT = Path(__file__).resolve().parents[2]
TABLE_PATH = ROOT / "pyhv" / "cpu" / "features.toml"
PROCESSORS = ROOT.parent / "shared" / "processors"

canonical_names = st.sampled_from([feature.name for feature in FEATURES])


# ---------------------------------------------------------------------------------------------------- the facts


def test_published_list_stands_at_its_bits() -> None:
    """The lists of features that processor compatibility mode hides, each with its published place."""
    places = {
        "ssse3": (Word(0x1, 0, "ecx"), 9),
        "sse4_1": (Word(0x1, 0, "ecx"), 19),
        "sse4_2": (Word(0x1, 0, "ecx"), 20),
        "popcnt": (Word(0x1, 0, "ecx"), 23),
        "xsave": (Word(0x1, 0, "ecx"), 26),
        "avx": (Word(0x1, 0, "ecx"), 28),
        "lzcnt": (Word(0x80000001, 0, "ecx"), 5),
        "sse4a": (Word(0x80000001, 0, "ecx"), 6),
        "misalignsse": (Word(0x80000001, 0, "ecx"), 7),
        "sse5": (Word(0x80000001, 0, "ecx"), 11),
        "fma4": (Word(0x80000001, 0, "ecx"), 16),
        "f16c": (Word(0x1, 0, "ecx"), 29),
        "3dnow": (Word(0x80000001, 0, "edx"), 31),
        "3dnowext": (Word(0x80000001, 0, "edx"), 30),
        "prefetchw": (Word(0x80000001, 0, "ecx"), 8),
    }
    for name, place in places.items():
        assert (find(name).word, find(name).bit) == place, name


def test_required_words_are_there() -> None:
    wanted = {
        (0x1, 0): "ecx edx",
        (0x6, 0): "eax ecx",
        (0x7, 0): "ebx ecx edx",
        (0x7, 1): "eax ebx ecx edx",
        (0x7, 2): "edx",
        (0xD, 1): "eax",
        (0x14, 0): "ebx ecx",
        (0x19, 0): "ebx",
        (0x80000001, 0): "ecx edx",
        (0x80000007, 0): "ebx edx",
        (0x80000008, 0): "ebx",
        (0x8000000A, 0): "edx",
        (0x80000021, 0): "eax ecx",
        (0x40000001, 0): "eax",
    }
    missing = [(place, r) for place, rs in wanted.items() for r in rs.split() if Word(*place, r) not in WORDS]
    assert not missing
    assert len(FEATURES) > 380


def test_masks_of_whole_groups() -> None:
    """Sums over many bits catch an entry that slid to a neighbouring bit."""
    mirrors = [f.name for f in FEATURES if f.mirrors and f.word.leaf == 0x80000001]
    assert pack(mirrors)[Word(0x80000001, 0, "edx")] == 0x0183F3FF  # AMD's copies of leaf 1 EDX
    for name in mirrors:
        mirror, original = find(name), find(find(name).mirrors)
        assert (mirror.bit, original.word) == (original.bit, Word(0x1, 0, "edx"))
    avx512 = [f.name for f in FEATURES if f.name.startswith("avx512") and f.word == Word(0x7, 0, "ebx")]
    assert pack(avx512)[Word(0x7, 0, "ebx")] == 0xDC230000
    base = "fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2"
    assert pack(base.split())[Word(0x1, 0, "edx")] == 0x078BFBFF


def test_inverted_and_any_of_bits() -> None:
    inverted = {f.name for f in FEATURES if f.sense == "inverted"}
    assert {"fdp_excptn_only", "zero_fcs_fds", "efer_lmsle_mbz", "no_smm_ctl_msr"} <= inverted
    assert {"md_clear", "verw_clear", "wrmsr_xx_base_ns"} == {f.name for f in FEATURES if f.sense == "any-of"}


def test_dynamic_topology_and_barred_bits() -> None:
    assert {f.name for f in FEATURES if f.dynamic} == {"osxsave", "ospke"}
    assert {f.name for f in FEATURES if f.topology} == {"ht", "cmp_legacy"}
    assert {f.name for f in WORDS[Word(0x8000000A, 0, "edx")]} | {"vmx", "svm", "skinit"} == {
        f.name for f in FEATURES if f.barred == "nested"
    }
    pmu = {f.name for f in FEATURES if f.barred == "pmu"}
    assert {"pdcm", "perfctr_core", "perfctr_nb", "perfctr_llc", "arch_perfmon_ext", "arch_lbr", "ibs", "dts"} <= pmu


def test_what_kvm_does_with_what_it_began_to_offer() -> None:
    """kvm_set_cpu_caps() of Linux 6.18: IBRS_SAME_MODE is passed on, CPUID faulting in user mode is emulated."""
    assert find("ibrs_same_mode").kvm == "passes"
    assert find("gp_on_user_cpuid").kvm == "provides"
    assert ("rap_size", "eraps") in [(number.name, number.needs) for number in NUMBERS]


@pytest.mark.parametrize(
    ("hidden", "gone"),
    [
        (
            "xsave",
            "osxsave avx xsaveopt xsavec xgetbv1 xsaves xfd mpx pku ospke amx_tile amx_int8 amx_bf16 amx_fp16 "
            "amx_complex amx_fp8 lwp cet_ss ibt fma f16c xop fma4 avx2 avx512f avx10",
        ),
        (
            "avx",
            "fma f16c xop fma4 avx2 vaes vpclmulqdq avx_vnni avx_ifma avx_vnni_int8 avx_vnni_int16 avx_ne_convert "
            "sha512 sm3 sm4 avx512f avx512dq avx512cd avx512bw avx512vl avx512ifma avx512vbmi avx512_vbmi2 "
            "avx512_vnni avx512_bitalg avx512_vpopcntdq avx512_bf16 avx512_fp16 avx512_vp2intersect avx512pf "
            "avx512er avx512_4vnniw avx512_4fmaps avx512_bmm avx10 avx10_vnni_int amx_avx512",
        ),
        ("pni", "ssse3 sse4_1 sse4_2 sse4a"),
        ("ssse3", "sse4_1 sse4_2"),
        ("sse4_1", "sse4_2"),
        ("3dnow", "3dnowext"),
        ("pae", "lm nx lahf_lm cx16 pdpe1gb la57 pcid fsgsbase pae_mirror"),
        ("sse2", "pni aes pclmulqdq sha_ni gfni avx lm"),
        ("hypervisor", "kvm_clocksource kvm_clocksource2 kvm_clocksource_stable kvm_async_pf"),
        ("kvm_clocksource2", "kvm_clocksource_stable"),
        ("svm", "npt vgif vnmi"),
        ("fpu", "fpu_mirror mmx fxsr sse"),
    ],
)
def test_hiding_takes_dependants_along(hidden: str, gone: str) -> None:
    everything = {feature.name for feature in FEATURES}
    dropped = closure(everything - {hidden}).dropped
    assert not set(gone.split()) - set(dropped)


@pytest.mark.parametrize(
    "name", ["popcnt", "abm", "bmi1", "bmi2", "adx", "movbe", "rdrand", "3dnowprefetch", "invpcid"]
)
def test_features_that_stand_alone(name: str) -> None:
    assert find(name).requires == ()


# Linux's table of requirements (arch/x86/kernel/cpu/cpuid-deps.c), by our names: what it switches off with a feature
# must not be left to a guest that does not see that feature. Not here: cmov and mmx, which Linux ties to FXSR and
# processors do not, and what it has as features of its own.
LINUX_REQUIRES = """
    xsaveopt xsave; xsavec xsave; xsaves xsave; avx xsave; pku xsave; mpx xsave; xgetbv1 xsave; mmxext mmx
    fxsr_opt fxsr; fxsr fpu; xsave fxsr; sse fxsr; sse2 sse; pni sse2; sse4_1 sse2; sse4_2 sse2; ssse3 sse2
    sse4a pni; sha_ni sse2; pclmulqdq sse2; gfni sse2; aes sse2; lm sse2; f16c sse2; fma avx; vaes avx
    vpclmulqdq avx; avx2 avx; avx512f avx
    avx512ifma avx512f; avx512pf avx512f; avx512er avx512f; avx512cd avx512f; avx512dq avx512f; avx512bw avx512f
    avx512vl avx512f; avx512vbmi avx512f; avx512_vbmi2 avx512vl; avx512_vnni avx512vl; avx512_bitalg avx512vl
    avx512_4vnniw avx512f; avx512_4fmaps avx512f; avx512_vpopcntdq avx512f; avx512_vp2intersect avx512vl
    avx512_bf16 avx512vl; avx512_fp16 avx512bw; enqcmd xsaves; sgx_lc sgx; xfd xsaves; xfd xgetbv1; amx_tile xfd
    amx_fp16 amx_tile; amx_bf16 amx_tile; amx_int8 amx_tile; cet_ss xsaves; fred lkgs; lass smap
    spec_ctrl_ssbd spec_ctrl
    intel_stibp spec_ctrl; intel_psfd spec_ctrl; ipred_ctrl spec_ctrl; rrsba_ctrl spec_ctrl; bhi_ctrl spec_ctrl
    avx10 avx512f; avx10 avx512bw; avx10 avx512vl; avx10 avx512dq; avx10 avx512cd
"""


@pytest.mark.parametrize("pair", re.findall(r"\w+ \w+", LINUX_REQUIRES))
def test_requires_what_linux_does(pair: str) -> None:
    """And, in the last two lines, what only manuals say: SPEC_CTRL's bits are in the MSR that spec_ctrl announces (SDM
    Vol. 4), and AVX10 comes with these parts of AVX-512 (Intel's AVX10 specification)."""
    feature, needs = pair.split()
    assert feature in closure({f.name for f in FEATURES} - {needs}).dropped


def test_every_avx512_and_amx_feature_needs_its_foundation() -> None:
    for prefix, foundation in (("avx512", "avx512f"), ("amx_", "amx_tile")):
        group = {f.name for f in FEATURES if f.name.startswith(prefix)} - {foundation}
        dropped = set(closure({f.name for f in FEATURES} - {foundation}).dropped)
        assert group <= dropped, group - dropped


def test_xsave_components() -> None:
    """Numbers, sizes and the fixed offsets (SDM Vol. 1, 13.1 and 13.4)."""
    assert {n: c.size for n, c in XSAVE_COMPONENTS.items() if not c.supervisor} == {
        0: 160, 1: 256, 2: 256, 3: 64, 4: 64, 5: 64, 6: 512, 7: 1024, 9: 8, 17: 64, 18: 8192, 19: 128, 62: 128,
    }  # fmt: skip
    assert {n for n, c in XSAVE_COMPONENTS.items() if c.supervisor} == {8, 10, 11, 12, 13, 14, 15, 16}
    offsets = {n: c.offset for n, c in XSAVE_COMPONENTS.items() if c.offset is not None}
    assert offsets == {0: 0, 1: 160, 2: 576, 19: 960}
    brings = {"xsave": (0, 1), "avx": (2,), "mpx": (3, 4), "avx512f": (5, 6, 7), "pku": (9,), "cet_ss": (11, 12)}
    brings |= {"ibt": (11, 12), "amx_tile": (17, 18), "apx_f": (19,), "lwp": (62,)}
    for name, components in brings.items():
        assert find(name).xsave == components
    for feature in FEATURES:  # whatever brings state needs XSAVE, but for hardware's own and the base
        if set(feature.xsave) - {8, 13, 16} and feature.name != "xsave":
            assert feature.name in closure({f.name for f in FEATURES} - {"xsave"}).dropped, feature.name


def read_dump(path: Path) -> dict[Word, int]:
    values: dict[Word, int] = {}
    seen: dict[int, int] = {}
    for leaf, registers in re.findall(r"^CPUID ([0-9A-F]{8}): (\S+)", path.read_text(), re.MULTILINE):
        subleaf = seen[int(leaf, 16)] = seen.get(int(leaf, 16), -1) + 1
        for register, value in zip(("eax", "ebx", "ecx", "edx"), registers.split("-"), strict=True):
            values[Word(int(leaf, 16), subleaf, register)] = int(value, 16)
    return values


@pytest.mark.skipif(not PROCESSORS.is_dir(), reason="no ../shared/processors (raw dumps)")
def test_real_processors_are_closed_over_requirements() -> None:
    """No requirement may take a bit away from any real processor: then it would be wrong. Nor may a processor show a
    bit that the table gives to the other vendor alone."""
    dumps = sorted(PROCESSORS.glob("*.cpuid"))
    assert len(dumps) >= 27
    for path in dumps:
        values = read_dump(path)
        highest = (values[Word(0, 0, "eax")], values.get(Word(0x80000000, 0, "eax"), 0))
        shown = {
            f.name for f in FEATURES if f.word.leaf <= highest[f.word.leaf >> 31] and values.get(f.word, 0) & f.mask
        }
        assert len(shown) > 30
        assert closure(shown).dropped == {}, path.name
        vendor = path.name.partition("-")[0]
        assert {n for n in shown if BY_NAME[n].vendor not in ("any", vendor)} == set(), path.name


@pytest.mark.skipif(not PROCESSORS.is_dir(), reason="no ../shared/processors (raw dumps)")
def test_real_processors_have_the_sizes_of_the_table() -> None:
    """Each component that leaf 0xD of a processor describes has the size, the offset and the kind of one that the
    table knows and the processor lists. (The dumps leave subleaves out: the number of a line does not tell which.)"""
    met: set[int] = set()
    differs = []
    for path in sorted(PROCESSORS.glob("*.cpuid")):
        values = read_dump(path)
        if values[Word(0, 0, "eax")] < 0xD:
            continue
        answers = [[values.get(Word(0xD, n, r), 0) for r in ("eax", "ebx", "ecx")] for n in range(1, 63)]
        has_subleaf_1 = answers[0][1] != 0x240  # some dumps have AVX's line (offset 576) in its place
        listed = values[Word(0xD, 0, "eax")] | values[Word(0xD, 0, "edx")] << 32
        listed |= answers[0][2] if has_subleaf_1 else 0
        components = [c for n, c in XSAVE_COMPONENTS.items() if n > 1 and listed >> n & 1]
        for size, offset, flags in answers[has_subleaf_1:]:
            fits = [c for c in components if (c.size, c.supervisor) == (size, bool(flags & 1))]
            if size and not any(c.offset in (None, offset) for c in fits):
                differs.append((path.name, size, offset, flags))
            met.update(c.number for c in fits)
    assert differs == [("amd-zen2-ryzen-3950x.cpuid", 64, 832, 0)]  # PKRU: features.toml tells of it
    assert met >= {2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 62}


# ------------------------------------------------------------------------------------------------- the look-ups


def test_names_aliases_and_bits_are_unique() -> None:
    assert len({f.name for f in FEATURES}) == len(FEATURES) == len({(f.word, f.bit) for f in FEATURES})
    owners: dict[str, str] = {}
    for feature in FEATURES:
        for name in {feature.name, feature.linux, feature.qemu, feature.libvirt, *feature.aliases} - {""}:
            assert owners.setdefault(name, feature.name) == feature.name, name
            assert by_any_name()[name] is feature
        assert BY_NAME[feature.name] is feature
    assert owners.keys() == by_any_name().keys() and len(BY_NAME) == len(FEATURES)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("sse3", "pni"),
        ("SSE4.1", "sse4_1"),
        ("sse4-2", "sse4_2"),
        ("Lzcnt", "abm"),
        ("xd", "nx"),
        ("ds", "dts"),
        ("tsc-deadline", "tsc_deadline_timer"),
        ("invtsc", "invtsc"),
        ("constant_tsc", "invtsc"),
        ("cr8legacy", "cr8_legacy"),
        ("pause_filter", "pausefilter"),
        ("avx512-vnni", "avx512_vnni"),
        ("pclmuldq", "pclmulqdq"),
        ("kvmclock", "kvm_clocksource2"),
        (" apx ", "apx_f"),
    ],
)
def test_aliases_resolve(alias: str, name: str) -> None:
    assert find(alias).name == name


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(BadInput) as caught:
        find("avx51f")
    assert str(caught.value).startswith("feature 'avx51f': there is no such feature; did you mean avx512f or ")
    with pytest.raises(BadInput, match="`pyhv features` lists all"):
        find("q" * 50)


def test_lineage() -> None:
    assert [lineage(v) for v in ("intel", "amd", "HygonGenuine", "  Shanghai  ", "NoSuchVendor")] == [
        "intel", "amd", "amd", "intel", "",
    ]  # fmt: skip


@given(st.sets(canonical_names))
def test_closure_is_closed_and_idempotent(names: set[str]) -> None:
    kept, dropped = closure(names)
    assert kept.isdisjoint(dropped) and kept | set(dropped) == names
    for name in kept:
        assert set(BY_NAME[name].requires) <= kept
    for name, missing in dropped.items():
        assert missing and set(missing) <= set(BY_NAME[name].requires)
        assert kept.isdisjoint(missing)
    assert closure(kept) == features.Closure(kept, {})


@given(st.sets(canonical_names), st.sets(canonical_names))
def test_closure_is_monotone(some: set[str], more: set[str]) -> None:
    assert closure(some).kept <= closure(some | more).kept


def test_closure_keeps_everything_and_refuses_aliases() -> None:
    everything = frozenset(f.name for f in FEATURES)
    assert closure(everything).kept == everything
    with pytest.raises(KeyError):
        closure(["sse3"])


@given(st.sets(canonical_names))
def test_pack_sets_exactly_the_bits(names: set[str]) -> None:
    values = pack(names)
    assert values.keys() == WORDS.keys()
    assert {f.name for f in FEATURES if values[f.word] & f.mask} == names


# ------------------------------------------------------------------------------------------------ the generator


def test_generated_files_are_fresh() -> None:
    table = feature_table.parse_table(TABLE_PATH.read_text())
    profiles = generate.compile_builtin(TABLE_PATH.parent / "profiles", table)
    module, header = TABLE_PATH.parent / "_features.py", ROOT / "csrc" / "gen" / "cpuid_bits.h"
    assert module.read_text() == generate.render_module(table, profiles), "run python pyhv/cpu/generate.py"
    assert header.read_text() == generate.render_header(table), "run python pyhv/cpu/generate.py"


def test_header_has_the_bits_that_c_needs() -> None:
    header = generate.render_header(feature_table.parse_table(TABLE_PATH.read_text()))
    assert dict(re.findall(r"^#define (PYHV_CPUID_\w+) (0x[0-9A-F]{8})u ", header, re.MULTILINE)) == {
        "PYHV_CPUID_1_ECX_XSAVE": "0x04000000",
        "PYHV_CPUID_1_ECX_OSXSAVE": "0x08000000",
        "PYHV_CPUID_1_ECX_MWAIT": "0x00000008",
        "PYHV_CPUID_1_EDX_APIC": "0x00000200",
        "PYHV_CPUID_7_EBX_FSGSBASE": "0x00000001",
        "PYHV_CPUID_7_EBX_SMEP": "0x00000080",
        "PYHV_CPUID_7_EBX_SMAP": "0x00100000",
        "PYHV_CPUID_7_ECX_PKU": "0x00000008",
        "PYHV_CPUID_7_ECX_OSPKE": "0x00000010",
        "PYHV_CPUID_D1_EAX_XSAVEC": "0x00000002",
        "PYHV_CPUID_D1_EAX_XSAVES": "0x00000008",
    }


def test_writing_leaves_unchanged_files_alone(tmp_path: Path) -> None:
    source = tmp_path / "cpu"
    (source / "profiles").mkdir(parents=True)
    for path in (TABLE_PATH, *TABLE_PATH.parent.glob("profiles/*.toml")):
        (source / path.relative_to(TABLE_PATH.parent)).write_bytes(path.read_bytes())
    module, header = source / "_features.py", tmp_path / "gen" / "bits.h"
    generate.generate(source, module, header)
    before = [(p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_ino) for p in (module, header)]
    generate.generate(source, module, header)
    assert [(p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_ino) for p in (module, header)] == before
    text = (source / "features.toml").read_text().replace('title = "SSE3"', 'title = "SSE 3"')
    (source / "features.toml").write_text(text)
    generate.generate(source, module, header)
    assert module.read_bytes() != before[0][0]
    assert header.stat().st_ino == before[1][2], "the header did not change: it must not be written"
    assert sorted(p.name for p in header.parent.iterdir()) == ["bits.h"]


def test_runs_as_a_script_before_the_build(tmp_path: Path) -> None:
    """As the build does: plain Python, isolated, nothing built yet; a fault is one line and exit status 1."""
    source, cpu = ROOT / "pyhv", tmp_path / "pyhv" / "cpu"
    (cpu / "profiles").mkdir(parents=True)
    for path in (TABLE_PATH, *source.glob("*.py"), *source.glob("cpu/*.py"), *source.glob("cpu/profiles/*.toml")):
        if path.name != "_features.py":
            (tmp_path / path.relative_to(ROOT)).write_bytes(path.read_bytes())
    command = [sys.executable, "-I", "-S", str(cpu / "generate.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (cpu / "_features.py").exists() and (tmp_path / "csrc" / "gen" / "cpuid_bits.h").exists()
    (cpu / "features.toml").write_text(TABLE_PATH.read_text().replace('requires = ["avx2"]', 'requires = ["avx3"]', 1))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == (
        "generate.py: features.toml: word 0x7.ebx: avx512f: requires 'avx3', which is no feature's canonical name\n"
    )


SOUND = """
[[word]]
leaf = 0x1
register = "ecx"
vendor = "any"
kvm = "passes"
features = [
    { bit = 0, name = "one", title = "The first", linux = "=", aliases = ["uno"] },
    { bit = 1, name = "two", title = "The second", requires = ["one"], xsave = [2], c = "PYHV_CPUID_TWO" },
    { bit = 2, name = "three", title = "The third", requires = ["two"], kvm = "never", vendor = "amd" },
]

[[word]]
leaf = 0x80000001
register = "edx"
vendor = "amd"
kvm = "passes"
features = [
    { bit = 0, name = "one_mirror", title = "The first again", mirrors = "one" },
    { bit = 1, name = "secret", title = "Not shown", barred = "pmu", migratable = false, sense = "inverted" },
]

[[xsave]]
number = 2
name = "state"
size = 256
offset = 576
supervisor = false

[[number]]
leaf = 0x1
register = "ecx"
low = 8
bits = 4
name = "count"
title = "A number"
needs = "one"
most = 3
compare = "at most"
"""


def test_a_sound_table_passes() -> None:
    table = feature_table.parse_table(SOUND)
    assert [e.name for e in table.entries] == ["one", "two", "three", "one_mirror", "secret"]
    assert table.numbers == (("count", "A number", (1, 0, "ecx"), 8, 4, "one", 3, "at most"),)
    assert (table.entries[0].linux, table.entries[3].requires, table.entries[2].kvm) == ("one", ("one",), "never")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "two"', 'name = "one"', "word 0x1.ecx: one: the name 'one' is one's too (word 0x1.ecx)"),
        ('["uno"]', '["two"]', "word 0x1.ecx: one: the name 'two' is two's too (word 0x1.ecx)"),
        ("bit = 1, name", "bit = 0, name", "word 0x1.ecx: two: bit 0 is one's too (word 0x1.ecx)"),
        ("bit = 1, name", "bit = 32, name", "word 0x1.ecx: two: bit 32 is not in 0 to 31"),
        ("bit = 1, name", 'bit = "1", name', "word 0x1.ecx: two: bit is '1'; it must be of type int"),
        ("bit = 1, name", "bit = true, name", "word 0x1.ecx: two: bit is True; it must be of type int"),
        ("{ bit = 1, name", "{ name", "word 0x1.ecx: two: no bit"),
        ('name = "two", ', "", "word 0x1.ecx: bit 1: no name"),
        (
            'name = "two"',
            'name = "Two"',
            "word 0x1.ecx: Two: the name 'Two' is not of lower-case letters, digits and _",
        ),
        ('["uno"]', '["U no"]', "word 0x1.ecx: one: the name 'U no' is not of lower-case letters, digits, _ - and ."),
        ('title = "The second"', 'title = " "', "word 0x1.ecx: two: the title is empty or has more than one line"),
        ('["one"]', '["none"]', "word 0x1.ecx: two: requires 'none', which is no feature's canonical name"),
        ('["one"]', '["uno"]', "word 0x1.ecx: two: requires 'uno', which is no feature's canonical name"),
        ('["one"]', "[1]", "word 0x1.ecx: two: requires holds 1; it must hold str only"),
        ('["one"]', '["two"]', "two: requires itself: two -> two"),
        ("linux = ", 'requires = ["two"], linux = ', "one: requires itself: one -> two -> one"),
        ('requires = ["two"]', 'requirs = ["two"]', "word 0x1.ecx: three: unknown key 'requirs'"),
        ('vendor = "any"', 'vendor = "via"', "word 0x1.ecx: one: vendor is 'via'; it must be one of any, intel, amd"),
        ('kvm = "never"', 'kvm = "no"', "word 0x1.ecx: three: kvm is 'no'; it must be one of passes, provides, never"),
        (
            '"inverted"',
            '"odd"',
            "word 0x80000001.edx: secret: sense is 'odd'; it must be one of plain, inverted, any-of, hint",
        ),
        ('barred = "pmu"', 'barred = "x"', "word 0x80000001.edx: secret: barred is 'x'; it must be one of nested, pmu"),
        ("PYHV_CPUID_TWO", "TWO", "word 0x1.ecx: two: c is 'TWO'; it must begin with PYHV_CPUID_"),
        ('kvm = "passes"\nfeatures', "features", "word 0x1.ecx: one: no kvm"),
        ('["one"], xsave', '["three"], xsave', "two: requires itself: two -> three -> two"),
        (
            'c = "PYHV_CPUID_TWO" }',
            'c = "PYHV_CPUID_TWO" }, { bit = 3, name = "a", title = "A", c = "PYHV_CPUID_TWO" }',
            "word 0x1.ecx: a: the C name PYHV_CPUID_TWO is two's too (word 0x1.ecx)",
        ),
        (
            'mirrors = "one" }',
            'requires = ["three"] }',
            "word 0x80000001.edx: one_mirror: requires three, but KVM passes it, and never gives that one",
        ),
        (
            'vendor = "amd" }',
            'vendor = "intel" }, { bit = 3, name = "a", title = "A", requires = ["three"], kvm = "never" }',
            "word 0x1.ecx: a: requires three, but its vendor is any, and that one's intel",
        ),
        (
            'mirrors = "one" }',
            'requires = ["secret"] }',
            "word 0x80000001.edx: one_mirror: requires secret, but it is migratable, and that one is not",
        ),
        (
            'mirrors = "one" }',
            'requires = ["secret"], migratable = false }',
            "word 0x80000001.edx: one_mirror: requires secret, but that one is barred, and it is not",
        ),
        (
            'mirrors = "one" }',
            'requires = ["secret"], migratable = false, barred = "pmu" }',
            "word 0x80000001.edx: one_mirror: requires secret, but that one does not mean that something is there",
        ),
        (
            'mirrors = "one" }',
            'mirrors = "one", kvm = "never" }',
            "word 0x80000001.edx: one_mirror: cannot mirror one: kvm differs, or the word does not",
        ),
        (
            'mirrors = "one" }',
            'mirrors = "nil" }',
            "word 0x80000001.edx: one_mirror: requires 'nil', which is no feature's",
        ),
        ("leaf = 0x80000001", "leaf = -1", "[[word]] number 2: leaf is -1; it must be a number of 32 bits"),
        ('register = "edx"', 'register = "rdx"', "[[word]] number 2: register is 'rdx'; it must be one of eax, ebx"),
        ('leaf = 0x80000001\nregister = "edx"', 'leaf = 1\nregister = "ecx"', "word 0x1.ecx: it is there twice"),
        ("xsave = [2]", "xsave = [3]", "word 0x1.ecx: two: brings xsave component 3, which has no [[xsave]] table"),
        ("xsave = [2], ", "", "xsave component 2: no feature brings it"),
        ("size = 256", "size = 0", "xsave component 2: size and offset must not be negative, nor the size 0"),
        ("number = 2", "number = 63", "xsave component 63: the number is not in 0 to 62"),
        (
            "supervisor = false",
            "supervisor = true",
            "xsave component 2: supervisor state has no offset in the standard",
        ),
        ('name = "state"', "name = 2", "xsave component 2: name is 2; it must be of type str"),
        ("low = 8", "low = 0", "number count: bit 0 of word 0x1.ecx is one's too"),
        ("low = 8", "low = 29", "number count: 4 bits from bit 29 are not in 0 to 31"),
        ("low = 8\n", "", "number count: no low"),
        ("most = 3", "most = 16", "number count: most is 16, which does not fit 4 bits"),
        ("most = 3", "mast = 3", "number count: unknown key 'mast'"),
        ('"at most"', '"more"', "number count: compare is 'more'; it must be one of at most, at least, equal"),
        ('needs = "one"', 'needs = "uno"', "number count: needs 'uno', which is no feature's canonical name"),
        ('name = "count"', 'name = "one"', "number one: the name is one's too"),
        ('bits = 4', 'bits = "4"', "number count: bits is '4'; it must be of type int"),
        ("[[xsave]]", "[[xsav]]", "unknown table 'xsav'"),
        ("[[xsave]]", "[[xsave", "Expected ']]' at the end of an array declaration (at line 23, column 8)"),
    ],
)
def test_generator_rejects(old: str, new: str, message: str) -> None:
    assert old in SOUND
    with pytest.raises(feature_table.TableError) as caught:
        feature_table.parse_table(SOUND.replace(old, new, 1))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_import_is_quick_and_light() -> None:
    """Start-up counts: importing the table pulls in nothing slow. (How long it takes, the benchmarks say.)"""
    code = (
        "import sys, types, typing, os\n"
        "package = types.ModuleType('pyhv'); package.__path__ = [sys.argv[1]]; sys.modules['pyhv'] = package\n"
        "before = set(sys.modules)\n"
        "import pyhv.cpu.features, pyhv.cpu.profiles\n"
        "pyhv.cpu.profiles.load('hyperv-r2').allowed('amd')\n"
        "print(*sorted(set(sys.modules) - before))\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(ROOT / "pyhv")], capture_output=True, text=True, timeout=60, check=True
    )
    cpu = {f"pyhv.cpu{name}" for name in ("", "._features", ".feature_types", ".features", ".profiles")}
    assert set(done.stdout.split()) == {*cpu, "pyhv.errors", "pyhv.light", "__future__"}
