"""What the lab says when it cannot go on."""

from __future__ import annotations


class LabError(Exception):
    """The lab cannot do what was asked: what, why and what to do, in one line."""


class Missing(LabError):
    """Something that the lab needs is not on this machine and cannot be put there; `command` would do it."""

    def __init__(self, what: str, command: str) -> None:
        super().__init__(f"{what}; get it with: {command}")
        self.command = command


class HostFailed(LabError):
    """A host did not boot, hung or died: its name, what happened, and the last lines of its console."""

    def __init__(self, name: str, what: str, log: str, tail: str) -> None:
        shown = "\n".join(f"    {line}" for line in tail.splitlines()) or "    (nothing)"
        super().__init__(f"{name}: {what}\n  the end of its console, {log}:\n{shown}")
        self.name = name
        self.what = what
        self.log = log


class CommandTimeout(LabError):
    """A command inside a host did not end in its time; it was killed, the host goes on."""
