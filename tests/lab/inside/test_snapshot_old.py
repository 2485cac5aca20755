"""The snapshot of kvm_intel's that an older version wrote; ../../host/test_snapshot_old.py has those of other hosts."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

import pyhv

OLD = sorted((Path(__file__).parent / "snapshots").glob("*.z"))


@pytest.mark.parametrize("compressed", OLD, ids=lambda path: path.name.removesuffix(".pyhv.z"))
def test_an_old_snapshot_is_restored(compressed: Path, tmp_path: Path, vendor: str) -> None:
    if vendor != "intel":
        pytest.skip("written on an Intel host, and this is none")
    path = tmp_path / "old.pyhv"
    path.write_bytes(zlib.decompress(compressed.read_bytes()))
    with pyhv.Machine.restore(str(path)) as machine:
        for _ in range(200):
            result = machine.run(0.5)
            assert result.cause == "timeout", result.console + result.message.encode()
            if result.console.count(b"round") > 2:
                return
    raise AssertionError("it does not go on")
