"""Snapshots of earlier versions go on. Those in snapshots/ were written by the version in their name, from `ticker`
with 4 MiB in compatibility mode: by the emulator, and by kvm_amd (Opteron_G2) and kvm_intel (Penryn)."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

import pyhv
from pyhv.snapshot import file

EVERY = 5  # rounds, of which it prints one
SNAPSHOTS = sorted((Path(__file__).parent / "snapshots").glob("*.gz"))


@pytest.mark.parametrize("path", SNAPSHOTS, ids=lambda path: path.name.removesuffix(".pyhv.gz"))
def test_an_old_snapshot_goes_on(tmp_path: Path, path: Path) -> None:
    saved = tmp_path / "saved"
    saved.write_bytes(gzip.decompress(path.read_bytes()))
    with file.open_snapshot(str(saved)) as snapshot:
        before = [vcpu.regs for vcpu in snapshot.state.vcpus]
    try:
        machine = pyhv.Machine.restore(str(saved))
    except pyhv.Incompatible as refused:
        pytest.skip(f"this host cannot run it: {refused.reasons[0]}")
    with machine:
        assert [vcpu.regs for vcpu in machine.vm.capture().vcpus] == before
        rounds = [int(number) for number in re.findall(rb"round (\d+)", machine.run(2).console)]
    assert len(rounds) > 1 and rounds == list(range(rounds[0], rounds[-1] + 1, EVERY))
