"""MSRs that guests rarely write travel like the others. What a guest can write is found out in the lab
(tests/lab/inside/test_msrs.py); here it is written from without."""

from __future__ import annotations

from pathlib import Path

import pytest

import pyhv
from pyhv.cpu import msrs
from pyhv.errors import HostError

RARE = {0x140: 1, 0x1FC: 2, 0x400: (1 << 64) - 1, 0x402: 0x1234, 0x47F: 7, 0xC0010015: 1 << 18, 0x174: 0x10}


@pytest.mark.parametrize("number", RARE, ids=hex)
def test_an_msr_is_restored(tmp_path: Path, number: int) -> None:
    with pyhv.Machine("ticker", append="every=1", memory="4M", accel="kvm") as machine:
        (vcpu,) = machine.vm.vcpus
        usual = vcpu.read_msrs([number])
        try:
            vcpu.write_msrs({number: RARE[number]})
        except HostError:
            pytest.skip("this KVM does not take it")
        written = vcpu.read_msrs([number])
        assert written != usual
        machine.save(str(tmp_path / "saved"))
    with pyhv.Machine.restore(str(tmp_path / "saved"), accel="kvm") as machine:
        assert machine.vm.vcpus[0].read_msrs([number]) == written


def test_what_is_as_usual_is_not_in_the_state() -> None:
    with pyhv.Machine("ticker", memory="4M", accel="kvm") as machine:
        found = machine.vm.capture().vcpus[0].msrs
        assert 0x174 in found and not {0x140, 0x1FC, 0x400, 0xC0010015} & found.keys()


@pytest.mark.parametrize("listed", [True, False])
def test_an_msr_that_cannot_be_read_is_lost_only_where_kvm_does_not_list_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: bool
) -> None:
    # Among those that KVM has made up, where there is none; the rules are kept by number.
    number, granted = 0x4B564DFC + listed, msrs.granted
    monkeypatch.setitem(msrs.BY_NUMBER, number, msrs.Msr(number, "MSR_OF_NOBODY", listed=listed))
    monkeypatch.setattr(msrs, "granted", lambda table: tuple(sorted([*granted(table), number])))
    monkeypatch.setattr(msrs, "UNLISTED", msrs.UNLISTED | {number})  # so that it is asked for
    with pyhv.Machine("ticker", memory="4M", accel="kvm") as machine:
        if listed:
            with pytest.raises(HostError, match=r"vCPU 0: KVM lists MSR_OF_NOBODY \(0x4b564dfd\) and does not let it"):
                machine.save(str(tmp_path / "saved"))
            assert not (tmp_path / "saved").exists()
        else:
            assert number not in machine.vm.capture().vcpus[0].msrs
