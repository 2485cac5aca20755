"""`pyhv host`, and what the other commands say about this host."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pyhv.cli import host
from pyhv.cpu.host import HostDescription, Verdict

from .cli import NOT_IN_THE_LAB, call, call_json

pytestmark = NOT_IN_THE_LAB


def test_json_is_a_host_description(verdict: Verdict) -> None:
    done = call("host", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    description = HostDescription.from_json(json.loads(done.stdout))
    assert description.verdict == verdict
    assert description.tsc_khz > 100_000
    assert description.vendor == host.native_table().vendor


def test_a_description_is_this_host(tmp_path: Path) -> None:
    path = tmp_path / "here.json"
    path.write_text(call("host", "--json").stdout)
    done = call("diff", str(path), "host")
    assert (done.returncode, done.stderr) == (0, "")


def test_in_words() -> None:
    done = call("host")
    assert (done.returncode, done.stderr) == (0, "")
    for title in ("processor ", "kernel ", "TSC ", "hiding features", "ways to intercept CPUID", "features that kvm "):
        assert title in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_verdict_in_words_where_hiding_works(faithful: None) -> None:
    assert "  Faithful: " in call("host").stdout


def test_verdict_in_words_where_it_does_not(unfaithful: None) -> None:
    out = call("host").stdout
    assert "  Not faithful: guests see features that their CPUID table hides." in out
    words = set(out.partition("ways to intercept")[0].split())
    assert {"CPL", "ssse3", "sse4_2", "avx"} <= words
    out = call("host", "--profile", "hyperv-r2").stdout
    assert "an image that declares its CPUID instructions: trap; an image that does not: refused" in out


def test_the_processor_is_this_one() -> None:
    flags = set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            flags = set(line.partition(":")[2].split())
            break
    seen = host.native_table().features()
    for name in ("fpu", "sse2", "cx16", "ssse3", "sse4_2", "popcnt", "avx", "avx2", "sse4a", "xsave", "smep"):
        if name in flags:  # the kernel may hide what the processor has, not the other way round
            assert name in seen


@pytest.mark.parametrize("name", ["ssse3", "sse2", "3dnow", "vmx"])
def test_a_feature_here(name: str) -> None:
    value = call_json("features", name)
    assert value["host"]["processor"] == (name in host.native_table().features())
    assert value["host"]["kvm"] == (name in host.describe().table.features())
    assert "this host" in call("features", name).stdout


def test_a_profile_here() -> None:
    value = call_json("profiles", "hyperv-r2")
    assert value["host"]["levelled"]["highest basic leaf"]["guest"] == 0xB
    assert all("hyperv-r2" in reason or "never shown" in reason for reason in value["host"]["hidden"].values())
    assert call_json("host", "--profile", "hyperv-r2")["guest"]["hidden"] == value["host"]["hidden"]
