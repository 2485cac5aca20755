"""MSRs that guests rarely write travel like the others. What a guest can write is found out in the lab
(tests/lab/inside/test_msrs.py); here it is written from without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import pyhv
from pyhv.accel import kvm_state
from pyhv.cpu import msrs as known
from pyhv.errors import HostError

RARE = {0x140: 1, 0x1FC: 2, 0x400: (1 << 64) - 1, 0x402: 0x1234, 0x47F: 7, 0xC0010015: 1 << 18, 0x174: 0x10}


@pytest.mark.parametrize("number", RARE, ids=hex)
def test_an_msr_is_restored(tmp_path: Path, number: int) -> None:
    with pyhv.Machine("ticker", append="every=1", memory="4M", accel="kvm") as machine:
        (vcpu,) = machine.vm.vcpus
        usual = kvm_state.read_msrs(vcpu, [number])  # type: ignore[arg-type]
        try:
            kvm_state.write_msrs(vcpu, {number: RARE[number]})  # type: ignore[arg-type]
        except HostError:
            pytest.skip("this KVM does not take it")
        written = kvm_state.read_msrs(vcpu, [number])  # type: ignore[arg-type]
        assert written != usual
        machine.save(str(tmp_path / "saved"))
    with pyhv.Machine.restore(str(tmp_path / "saved"), accel="kvm") as machine:
        assert kvm_state.read_msrs(machine.vm.vcpus[0], [number]) == written  # type: ignore[arg-type]


def test_what_is_as_usual_is_not_in_the_state() -> None:
    with pyhv.Machine("ticker", memory="4M", accel="kvm") as machine:
        msrs = machine.vm.capture().vcpus[0].msrs
        assert 0x174 in msrs and not {0x140, 0x1FC, 0x400, 0xC0010015} & msrs.keys()


class WithShadowStacks:
    """The engine on a KVM that hands out the shadow-stack pointer; no processor at hand has one."""

    def __init__(self, lib: Any) -> None:
        self._lib = lib
        self.pointer, self.written = 0x1238, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lib, name)

    def pyhv_vcpu_get_ssp(self, vcpu: Any, value: Any, error: Any) -> int:
        value[0] = self.pointer
        return 0

    def pyhv_vcpu_set_ssp(self, vcpu: Any, value: Any, error: Any) -> int:
        self.written = value
        return 0


def test_the_shadow_stack_pointer_travels_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    lib, granted = WithShadowStacks(kvm_state.lib), known.granted
    monkeypatch.setattr(kvm_state, "lib", lib)
    monkeypatch.setattr(known, "granted", lambda *given: (*granted(*given), known.SSP))
    options: Any = {"memory": "4M", "accel": "kvm"}
    with pyhv.Machine("ticker", **options) as one, pyhv.Machine("ticker", **options) as other:
        state = one.vm.capture()
        assert state.vcpus[0].msrs[known.SSP] == 0x1238
        other.vm.apply(state)
        assert lib.written == 0x1238
        lib.pointer = 0
        assert known.SSP not in one.vm.capture().vcpus[0].msrs
