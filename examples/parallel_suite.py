"""A test suite of guests, several at a time, each with a time limit, and one report at the end.

Guests run without Python's lock, so threads are enough. `fail_on` makes failures of ends whose status is 0: a kernel
that panics may just halt or reset.
"""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyhv


class Case(NamedTuple):
    name: str
    machine: dict[str, Any]
    expected: int = 0
    """The exit status: the guest's own, or one of the README's table."""


CASES = [
    Case("hello", {"image": "hello"}),
    Case("adapts", {"image": "dispatch", "compat": True}),
    Case("refuses", {"image": "refuse", "compat": True}, expected=42),
    Case("dies of a triple fault", {"image": "faults", "append": "triple-fault"}, expected=121),
    Case("halts for good, which is a failure here", {"image": "faults", "append": "halt"}, expected=119),
]


def run(case: Case) -> tuple[bool, str]:
    began = time.monotonic()
    try:
        with pyhv.Machine(**case.machine) as vm:
            result = vm.run(timeout=30, fail_on={"halted", "reset"})
    except pyhv.PyhvError as error:
        return False, f"{case.name}: {error}"
    told = f"{case.name}: {result.cause} {result.status}, {time.monotonic() - began:.2f} s"
    return result.status == case.expected, told


def main() -> int:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = list(pool.map(run, CASES))
    for ok, told in outcomes:
        print("ok  " if ok else "FAIL", told)
    return 0 if all(ok for ok, _ in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
