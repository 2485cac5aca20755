"""Tests with this machine's /dev/kvm, and with the emulator. Where there is no KVM, those that need it are skipped, and
say so."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyhv
from pyhv.accel import choose, probe
from pyhv.accel.protocol import Accelerator
from pyhv.cpu.host import Verdict

from .named import assert_nothing_left, processes_of

# What the emulator runs too; a test of them that compares it with KVM says so itself.
WITHOUT_KVM = ("test_emulator", "test_emulator_steps", "test_cli_soak")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        for item in items:
            if item.path.stem not in WITHOUT_KVM:
                item.add_marker(pytest.mark.skip(reason="/dev/kvm is missing or may not be opened by this user"))


@pytest.fixture(scope="session")
def accelerator() -> Accelerator:
    return choose.open_accelerator()


@pytest.fixture(scope="session")
def verdict(accelerator: Accelerator) -> Verdict:
    return probe.verdict(accelerator)


@pytest.fixture
def faithful(verdict: Verdict) -> None:
    """For tests that need a KVM that honours its CPUID table."""
    if not verdict.faithful:
        pytest.skip("this machine's KVM does not honour its CPUID table; the lab runs this on kvm_amd and kvm_intel")


@pytest.fixture
def unfaithful(verdict: Verdict) -> None:
    """For tests of what happens on a KVM that does not."""
    if verdict.faithful:
        pytest.skip("this machine's KVM honours its CPUID table")


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The runtime directory; in the end nothing must be left there, and no process."""
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(path))
    yield path
    try:
        assert_nothing_left(path)
    finally:
        for pid in processes_of(path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def run(image: str, timeout: float = 60, **options: object) -> pyhv.RunResult:
    """Runs a guest to its end and returns the result."""
    with pyhv.Machine(image, **options) as machine:  # type: ignore[arg-type]
        return machine.run(timeout)
