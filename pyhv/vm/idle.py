"""When a VM looks as if it might never run again, and is worth a closer look: found out without touching the guest.

The kernel counts how often each vCPU's thread has gone to sleep. While that number stays the same the guest has not
run. A guest that wakes often is never looked at, and one that sleeps for long rarely.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# In seconds: how long a VM must lie still, and how long to wait for the next try. Longer each time, for while a guest
# computes a try takes a little processor time from it.
_STILL = 0.025
_FIRST, _LAST, _LAST_BUSY = 0.025, 2.0, 0.4

_MOST_SKIPPED = 15


class IdleWatch:
    """Decides about the moments in which it is asked. Before each the caller waits for `interval` seconds."""

    def __init__(self) -> None:
        self.interval = self._pause = _FIRST
        self._before: tuple[int, ...] | None = None
        self._still: tuple[int, ...] | None = None
        self._noted: tuple[int, ...] | None = None
        self._skip = self._skipped = 0

    def lies_still(self, threads: Sequence[int]) -> bool:
        """Whether the VM whose vCPUs' threads have these native ids is worth a look: all of them have slept since the
        call before this one."""
        sleeps = sleep_counts(threads)
        before, self._before = self._before, None
        if sleeps is None:
            self._wait_longer(_LAST_BUSY)
        elif before is None:
            self._before = sleeps
            self.interval = _STILL
        elif sleeps != before:
            self._wait_longer(_LAST)
        elif sleeps == self._noted and self._skipped < self._skip:
            self._skipped += 1
            self._wait_longer(_LAST)
        else:
            self._still = sleeps
            return True
        return False

    def note_alive(self, threads: Sequence[int]) -> None:
        """The look has shown that it can wake up. As long as it sleeps on, that need not be asked again; but the guest
        may have run between the look and this call, so it is asked again, if rarely."""
        self._skip = min(2 * self._skip + 1, _MOST_SKIPPED) if self._still == self._noted else 0
        self._skipped = 0
        self._noted = sleep_counts(threads)  # the look has woken the threads
        self._wait_longer(_LAST)

    def _wait_longer(self, most: float) -> None:
        self._pause = self.interval = min(2 * self._pause, most)


def sleep_counts(threads: Sequence[int]) -> tuple[int, ...] | None:
    """How often each of this process's threads has gone to sleep; None unless all sleep now."""
    counts = []
    for thread in threads:
        try:
            with open(f"/proc/self/task/{thread}/status", "rb") as status:
                lines = status.read().splitlines()
        except OSError:
            return None
        values = dict(line.split(b":\t", 1) for line in lines if b":\t" in line)
        if not values[b"State"].startswith(b"S"):
            return None
        counts.append(int(values[b"voluntary_ctxt_switches"]))
    return tuple(counts)
