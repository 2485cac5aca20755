"""Type on a guest's console, and wait for what it answers.

expect() takes bytes or a compiled pattern, and returns the match; each call goes on behind the match of the one before.
"""

from __future__ import annotations

import re

import pyhv

# The bundled guest `faults`, told to echo, repeats what is typed until it reads a q.
with pyhv.Machine("faults", append="echo") as vm:
    vm.start()
    vm.send(b"ping 17;")
    match = vm.expect(re.compile(rb"ping (\d+);"), timeout=10)
    print("the guest repeated the number", int(match[1]))

    vm.send(b"q")
    result = vm.wait(timeout=10)
    assert result is not None, "the guest did not end in time"
    print("it ended:", result.cause, result.status)
