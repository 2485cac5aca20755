"""Snapshots that older versions wrote are restored. snapshots/ has small ones, of the guest `ticker` in compatibility
mode, compressed. A name has the commit of the version that wrote it, and what ran it: the emulator, this machine's KVM,
or the lab's kvm_amd (Opteron_G2) and kvm_intel (Penryn)."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

import pyhv
from pyhv.snapshot import file

from .emulator import require

OLD = sorted((Path(__file__).parent / "snapshots").glob("*.z"))


@pytest.mark.parametrize("compressed", OLD, ids=lambda path: path.name.removesuffix(".pyhv.z"))
def test_an_old_snapshot_is_restored(compressed: Path, tmp_path: Path) -> None:
    by_emulator = compressed.name.endswith("-emulator.pyhv.z")
    if by_emulator:
        require()
    path = str(tmp_path / "old.pyhv")
    Path(path).write_bytes(zlib.decompress(compressed.read_bytes()))
    with file.open_snapshot(path) as snapshot:
        before = [vcpu.regs for vcpu in snapshot.state.vcpus]
    try:
        machine = pyhv.Machine.restore(path, accel="emulator" if by_emulator else "kvm")
    except pyhv.Incompatible as refused:
        pytest.skip(f"this host cannot run it: {refused.reasons[0]}")
    with machine:
        assert [vcpu.regs for vcpu in machine.vm.capture().vcpus] == before
        for _ in range(200):
            result = machine.run(0.2)
            assert result.cause == "timeout", result.console + result.message.encode()
            if result.console.count(b"round") > 2:
                return
    raise AssertionError("it does not go on")
