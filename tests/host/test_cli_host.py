"""`pyhv host`, and what the other commands say about this host."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pyhv.cli import host
from pyhv.cpu.host import HostDescription, Verdict

from .cli import call_here

Capture = pytest.CaptureFixture[str]


def call(capfd: Capture, *words: str) -> str:
    """What a command that succeeds prints."""
    status, out, err = call_here(capfd, *words)
    assert (status, err) == (0, "")
    return out


def call_json(capfd: Capture, *words: str) -> Any:
    return json.loads(call(capfd, *words, "--json"))


def test_json_is_a_host_description(verdict: Verdict, capfd: Capture) -> None:
    description = HostDescription.from_json(call_json(capfd, "host"))
    assert description.verdict == verdict
    assert description.tsc_khz > 100_000
    assert description.vendor == host.native_table().vendor


def test_a_description_is_this_host(tmp_path: Path, capfd: Capture) -> None:
    path = tmp_path / "here.json"
    path.write_text(call(capfd, "host", "--json"))
    assert call(capfd, "diff", str(path), "host") == f"{path} and host: no difference\n"


def test_in_words(capfd: Capture) -> None:
    out = call(capfd, "host")
    for title in ("processor ", "kernel ", "TSC ", "hiding features", "ways to intercept CPUID", "features that kvm "):
        assert title in out
    assert max(map(len, out.splitlines())) <= 100


def test_verdict_in_words_where_hiding_works(faithful: None, capfd: Capture) -> None:
    out = call(capfd, "host")
    assert "  Faithful: guests see what their CPUID table says and nothing else, at CPL 0 and at CPL 3." in out
    out = call(capfd, "host", "--profile", "hyperv-r2")
    assert "an image that declares its CPUID instructions: kernel; an image that does not: kernel" in out


def test_verdict_in_words_where_it_does_not(unfaithful: None, capfd: Capture) -> None:
    out = call(capfd, "host")
    assert "  Not faithful: guests see features that their CPUID table hides." in out
    words = set(out.partition("ways to intercept")[0].split())
    assert {"CPL", "ssse3", "sse4_2", "avx"} <= words
    out = call(capfd, "host", "--profile", "hyperv-r2", "--accel", "kvm")
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
def test_a_feature_here(name: str, capfd: Capture) -> None:
    value = call_json(capfd, "features", name)
    assert value["host"]["processor"] == (name in host.native_table().features())
    assert value["host"]["kvm"] == (name in host.describe().table.features())
    assert "this host" in call(capfd, "features", name)


def test_a_profile_here(capfd: Capture) -> None:
    value = call_json(capfd, "profiles", "hyperv-r2")
    # What is levelled depends on the host: a small one may have nothing above the profile's numbers.
    for what, level in value["host"]["levelled"].items():
        assert level["guest"] != level["host"]
        highest = {"highest basic leaf": 0xB, "highest extended leaf": 0x80000008}
        assert level["guest"] == highest.get(what, level["guest"])
    causes = ("hyperv-r2", "never shown", "KVM's own addition")
    assert all(any(cause in reason for cause in causes) for reason in value["host"]["hidden"].values())
    assert call_json(capfd, "host", "--profile", "hyperv-r2")["guest"]["hidden"] == value["host"]["hidden"]
