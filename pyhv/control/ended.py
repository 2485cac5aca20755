"""What is kept of VMs that have come to their end: how, with which registers, and the last of the console.

Each is a file NAME.ended beside the sockets, JSON with the keys of `status` and some more (docs/control.md). It is
there before the name is free, until another VM gets the name or somebody clears it. Only the newest KEPT are kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import Any

KEPT = 32

_SUFFIX = ".ended"

# The console's last 64 KiB as base64, and the rest.
_MAX_SIZE = 1 << 20


def leave(directory: int, name: str, record: dict[str, Any]) -> None:
    """Keeps the record of a VM, and drops the oldest ones. For whoever holds the lock on the directory (an open
    descriptor). Raises OSError."""
    entry, new = name + _SUFFIX, f".new{_SUFFIX}"
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600, dir_fd=directory)
    with open(descriptor, "w", encoding="ascii") as file:
        json.dump(record, file)
    os.rename(new, entry, src_dir_fd=directory, dst_dir_fd=directory)
    for old in names(directory)[KEPT:]:
        clear(directory, old)


def killed(name: str) -> dict[str, Any]:
    """The record of a VM whose process ended without a word."""
    return {
        "name": name,
        "state": "ended",
        "cause": "internal-error",
        "status": 125,
        "message": "its process was killed or has crashed",
        "ended": time.time(),
    }


def read(directory: int, name: str) -> dict[str, Any] | None:
    """The record of a VM, or None."""
    try:
        with open(os.open(name + _SUFFIX, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=directory), "rb") as file:
            value = json.loads(file.read(_MAX_SIZE))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def names(directory: int) -> list[str]:
    """The names of those that are kept, the last that ended first."""
    found = []
    for entry in os.listdir(directory):
        if entry.endswith(_SUFFIX) and not entry.startswith("."):
            with contextlib.suppress(OSError):
                status = os.stat(entry, dir_fd=directory, follow_symlinks=False)
                found.append((-status.st_mtime_ns, entry.removesuffix(_SUFFIX)))
    return [name for _, name in sorted(found)]


def clear(directory: int, name: str) -> bool:
    """Drops the record of a VM. Returns whether there was one."""
    try:
        os.unlink(name + _SUFFIX, dir_fd=directory)
    except OSError:
        return False
    return True
