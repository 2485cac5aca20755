"""Boot a kernel, wait for a line on its console, and fail when it panics: a smoke test in 20 lines.

    boot_kernel.py vmlinuz --initrd initrd.img --append "console=ttyS0 panic=-1" --until "Welcome"
"""

from __future__ import annotations

import argparse
import sys

import pyhv


def main() -> int:
    parser = argparse.ArgumentParser(description="Boot a kernel until it prints a text.")
    parser.add_argument("image", help="bzImage, vmlinux, or the name of a bundled guest")
    parser.add_argument("--initrd")
    parser.add_argument("--append", default="")
    parser.add_argument("--memory", default="512M")
    parser.add_argument("--until", required=True, help="the text that tells that it is up")
    parser.add_argument("--timeout", type=float, default=120, help="seconds")
    given = parser.parse_args()

    with pyhv.Machine(given.image, initrd=given.initrd, append=given.append, memory=given.memory) as vm:
        vm.start()
        try:
            vm.expect(given.until.encode(), timeout=given.timeout)
        except (pyhv.TimedOut, pyhv.WrongState) as error:  # too late, or the guest ended before
            sys.stderr.buffer.write(vm.console()[-2000:])
            print(f"boot_kernel: {error}", file=sys.stderr)
            return 1
        print(f"{given.image} printed {given.until!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
