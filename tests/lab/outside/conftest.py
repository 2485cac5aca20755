"""What the tests share that use the lab from without: several hosts, and the lab itself."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.lab.lab import Lab


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A lab of the test's own; its hosts are stopped at the end."""
    with Lab() as one:
        yield one


def of_vendor(vendor: str) -> list[str]:
    """The kinds of hosts that are to be tested, of one vendor, in the order given."""
    return [name for name in os.environ.get("PYHV_LAB_KINDS", "").split(",") if name.startswith(vendor)]


@pytest.fixture
def amd() -> list[str]:
    """At least two kinds of AMD hosts; the test is skipped where fewer are wanted."""
    names = of_vendor("amd")
    if len(names) < 2:
        pytest.skip("needs two kinds of AMD hosts (--kinds)")
    return names


@pytest.fixture
def intel() -> list[str]:
    """At least two kinds of Intel hosts; the test is skipped where fewer are wanted."""
    names = of_vendor("intel")
    if len(names) < 2:
        pytest.skip("needs two kinds of Intel hosts (--kinds)")
    return names
