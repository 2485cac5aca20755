"""Snapshots that older versions wrote on these hosts; ../../host/test_snapshot_old.py has those of others."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

import pyhv

OLD = sorted((Path(__file__).parent / "snapshots").glob("*.z"))


@pytest.mark.parametrize("compressed", OLD, ids=lambda path: path.name.removesuffix(".pyhv.z"))
def test_an_old_snapshot_is_restored(compressed: Path, tmp_path: Path, vendor: str) -> None:
    if not compressed.name.endswith(f"-{vendor}.pyhv.z"):
        pytest.skip("written on a host of the other vendor")
    path = tmp_path / "old.pyhv"
    path.write_bytes(zlib.decompress(compressed.read_bytes()))
    with pyhv.Machine.restore(str(path)) as machine:
        for _ in range(200):
            result = machine.run(0.5)
            assert result.cause == "timeout", result.console + result.message.encode()
            if result.console.count(b"round") > 2:
                return
    raise AssertionError("it does not go on")
