"""A profile of your own: take one feature away, and see what goes with it.

A profile is a TOML file (pyhv/cpu/profiles shows the built-in ones). Whatever requires a hidden feature is hidden too.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pyhv

PROFILE = """
name = "no-sse4-2"
title = "This host without SSE4.2"
description = "To see what a program does on a processor that is a little older."

[features]
all = true
hide = ["sse4_2"]
"""

with tempfile.TemporaryDirectory() as directory:
    path = Path(directory, "no-sse4-2.toml")
    path.write_text(PROFILE, encoding="utf-8")
    with pyhv.Machine("refuse", cpu=path) as vm:  # a guest that will not start without SSE4.2
        print("hidden:", ", ".join(sorted(hidden.name for hidden in vm.guest.hidden)))
        result = vm.run(timeout=30)

print(result.console.decode().strip())
print("status", result.status)
