"""The peer of the row `pykvm`: the guest of `exits`, run by pykvm, the one Python binding for KVM that ever was.

Started by the benchmark with pykvm's place on PYTHONPATH. argv: the image, bytes of RAM. Each line on standard input
asks for one sample, in nanoseconds (bench/peer.h). pykvm has no devices: its run() comes back at every port access and
is called again; nothing answers the reads. It leaks each VM, so one VM serves all samples, set to its start each time.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path

_LOAD_BASE = 0x100000


def main() -> None:
    code, ram_bytes = Path(sys.argv[1]).read_bytes(), int(sys.argv[2])
    kvm = importlib.import_module("pykvm.kvm")
    vm = kvm.VM(os.open("/dev/kvm", os.O_RDWR), ram_bytes)
    vm.ram.obj[_LOAD_BASE : _LOAD_BASE + len(code)] = list(code)
    io = vm.vcpu._run_obj.exit_reasons.io
    for _ in sys.stdin:
        vm.vcpu.init_state(rip=_LOAD_BASE, rsp=0x80000, bits=32)
        start = time.perf_counter_ns()
        while True:
            vm.run()
            if io.port == 0xF4:
                break
        print(time.perf_counter_ns() - start, flush=True)


main()
