"""How a run ends, and the one table of exit statuses (the README shows it).

A guest that writes a byte to port 0xf4 decides the status itself, so a status alone cannot tell a guest that wrote 124
from a timeout; the cause, which `--json` and RunResult carry, can.
"""

from __future__ import annotations

from pyhv.accel.data import Stop
from pyhv.errors import BadInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection

# cause: (exit status, what it means)
CAUSES: dict[str, tuple[int, str]] = {
    "guest-exit": (0, "the guest wrote its exit status, the byte itself, to port 0xf4"),
    "power-off": (0, "the guest switched itself off"),
    "reset": (0, "the guest reset itself; only --reboot starts it again"),
    "halted": (0, "all vCPUs halted with interrupts off: nothing can wake them"),
    "stopped": (0, "pyhv stop or pyhv save --stop ended it"),
    "migrated": (0, "it was migrated: the guest runs on elsewhere, and its console and status with it"),
    "usage": (2, "bad input or usage: nothing was run"),
    "panic": (120, "the guest's kernel said that it has panicked (port 0x505)"),
    "triple-fault": (121, "an exception in the guest that it had no handler for, three deep"),
    "not-executable": (122, "the accelerator cannot execute an instruction, or refuses the vCPU's state"),
    "system-event": (123, "the platform reported an event that pyhv does not know"),
    "timeout": (124, "--timeout passed, the guest was still running; or nobody came within pyhv receive --wait"),
    "internal-error": (125, "pyhv or the host failed"),
    "interrupted": (130, "the user ended it (escape key, Ctrl-C); 143 by SIGTERM, 129 by SIGHUP, 131 by SIGQUIT"),
}

FAILED = 119
"""The status where the caller counts the cause as a failure (fail_on) and its own status would be 0."""

_STOPS = {
    Stop.GUEST_EXIT: "guest-exit",
    Stop.POWER_OFF: "power-off",
    Stop.RESET: "reset",
    Stop.HALTED: "halted",
    Stop.TRIPLE_FAULT: "triple-fault",
    Stop.PANIC: "panic",
    Stop.INTERNAL_ERROR: "not-executable",
    Stop.FAIL_ENTRY: "not-executable",
    Stop.TRAP_EVENT: "not-executable",
    Stop.SYSTEM_EVENT: "system-event",
}


def cause_of(stop: Stop) -> str:
    """The cause for what stopped a vCPU; what no guest can bring about by itself is internal-error."""
    return _STOPS.get(stop, "internal-error")


def status_of(cause: str, guest_status: int = 0, fail_on: Collection[str] = ()) -> int:
    """The exit status for a cause; guest_status is the byte of guest-exit. fail_on: causes that are failures: where the
    status would be 0 it is FAILED."""
    status = guest_status if cause == "guest-exit" else CAUSES[cause][0]
    return FAILED if status == 0 and cause in fail_on else status


def check_fail_on(fail_on: Collection[str]) -> None:
    """Raises BadInput for what are no causes that a run can have."""
    causes = [cause for cause in CAUSES if cause != "usage"]
    if isinstance(fail_on, str) or not hasattr(fail_on, "__contains__") or not hasattr(fail_on, "__iter__"):
        raise BadInput(f"fail_on {fail_on!r}", f"is a {type(fail_on).__name__}", "give a collection of causes")
    for cause in fail_on:
        if cause not in causes:
            raise BadInput(f"fail_on {cause!r}", "is no cause of an end", f"there are {', '.join(causes)}")
