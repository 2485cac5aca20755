"""What the tests share that use the lab from without: several hosts, and the lab itself."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.lab import code
from tests.lab.host import Host
from tests.lab.lab import Lab


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A lab of the test's own; its hosts are stopped at the end."""
    with Lab() as one:
        yield one


def of_vendor(vendor: str) -> list[str]:
    """The kinds of hosts that are to be tested, of one vendor, in the order given."""
    return [name for name in os.environ.get("PYHV_LAB_KINDS", "").split(",") if name.startswith(vendor)]


def newest(vendor: str) -> Iterator[Host]:
    """A host of the newest wanted kind of this vendor, with pyhv in it; for a fixture to yield from. The test is
    skipped where none is wanted."""
    kinds = of_vendor(vendor)
    if not kinds:
        pytest.skip(f"needs an {vendor} host (--kinds)")
    with Lab() as lab:
        (one,) = lab.start(kinds[-1])
        one.put({"site": code.pyhv() / "site"}, code.INSIDE)
        yield one


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
