"""What guests can do with model-specific registers on real KVM. The guest `msrs` writes to all that let themselves be
written; see guest_images/msrs/msrs.c."""

from __future__ import annotations

import re
from functools import lru_cache

import pytest

import pyhv
from pyhv.cpu import msrs

PROFILES = ("host", "hyperv-r2")
HELD = re.compile(r"msrs: (0x[0-9a-f]{8}) holds (0x[0-9a-f]{16})\n")

KVM_OWN = range(0x4B564D00, 0x4B564E00)
K7_COUNTERS = range(0xC0010000, 0xC0010008)


@lru_cache(maxsize=len(PROFILES))
def held(profile: str) -> tuple[dict[int, int], tuple[int, ...]]:
    """The MSRs in which a guest of this profile finds what it wrote, with that value; and those that travel."""
    with pyhv.Machine("msrs", cpu=profile, memory="4M", append="rounds=1") as machine:
        result = machine.run(timeout=300)
        console = result.console.decode()
        assert (result.cause, result.status) == ("guest-exit", 0), console[-500:] + result.message
        found = {int(number, 16): int(value, 16) for number, value in HELD.findall(console)}
        assert f"msrs: {len(found)} hold what was written\n" in console
        return found, msrs.granted(machine.vm.tables[0])


@pytest.mark.parametrize("profile", PROFILES)
def test_a_paravirtual_msr_is_there_where_its_feature_is_visible(profile: str) -> None:
    found, travel = held(profile)
    there = {number for number in found if number in KVM_OWN}
    assert there <= set(travel)
    assert bool({0x4B564D03} & there) == (profile == "host"), "steal time, which compatibility mode hides"


@pytest.mark.parametrize("profile", PROFILES)
def test_there_are_no_performance_counters(profile: str) -> None:
    assert not [hex(number) for number in held(profile)[0] if number in K7_COUNTERS]
