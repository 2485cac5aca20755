"""Snapshots that older versions wrote are restored. snapshots/ has small ones, of the guest `ticker` in compatibility
mode, compressed; a name begins with the commit of the version that wrote it. The lab has some of its own
(tests/lab/inside)."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

import pyhv
from pyhv.accel import choose

from .cli import NOT_IN_THE_LAB
from .emulator import require

OLD = sorted((Path(__file__).parent / "snapshots").glob("*.z"))


@NOT_IN_THE_LAB  # whose processors have no VME
@pytest.mark.parametrize("compressed", OLD, ids=lambda path: path.name.removesuffix(".pyhv.z"))
def test_an_old_snapshot_is_restored(compressed: Path, tmp_path: Path) -> None:
    on_kvm = not compressed.name.endswith("-emulator.pyhv.z")
    if on_kvm and choose.open_accelerator("kvm").describe(False).vendor != "amd":
        pytest.skip("written on an AMD host, and this is none")
    if not on_kvm:
        require()
    path = tmp_path / "old.pyhv"
    path.write_bytes(zlib.decompress(compressed.read_bytes()))
    with pyhv.Machine.restore(str(path), accel="kvm" if on_kvm else "emulator") as machine:
        for _ in range(200):
            result = machine.run(0.2)
            assert result.cause == "timeout", result.console + result.message.encode()
            if result.console.count(b"round") > 2:
                return
    raise AssertionError("it does not go on")
