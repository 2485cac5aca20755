"""Starting emulators so that none outlives the lab, whatever ends the lab."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .errors import LabError

_lock = threading.RLock()  # stop_all() may interrupt its holder, in a signal's handler
_ending = False
_spawner: ThreadPoolExecutor | None = None
_running: set[Process] = set()


class Process:
    """A child process with a session and a process group of its own.

    It gets SIGKILL from the kernel when the lab dies without a word (PR_SET_PDEATHSIG, by setpriv), and from us in
    stop() and at exit. Its output goes to the file `log`, or `stdout` to a descriptor of the caller's.
    """

    def __init__(
        self, argv: Sequence[str], log: Path, *, pass_fds: Sequence[int] = (), stdout: int | None = None
    ) -> None:
        global _spawner
        self.argv = list(argv)
        self.log = log
        guarded = list(argv)
        if setpriv := shutil.which("setpriv"):
            guarded = [setpriv, "--pdeathsig", "KILL", "--", *argv]
        with _lock:
            if _ending:
                raise LabError("the lab is being ended")
            if _spawner is None:
                # The kernel sends the signal when the *thread* that forked ends: so one thread forks them all, and
                # lives as long as the lab.
                _spawner = ThreadPoolExecutor(1, "pyhv-lab-spawner")
        with log.open("ab") as stream:
            self._popen = _spawner.submit(
                subprocess.Popen,
                guarded,
                stdin=subprocess.DEVNULL,
                stdout=stream if stdout is None else stdout,
                stderr=stream,
                pass_fds=pass_fds,
                start_new_session=True,
            ).result()
        with _lock:
            _running.add(self)
        if _ending:
            self.stop()

    @property
    def pid(self) -> int:
        return self._popen.pid

    def poll(self) -> int | None:
        """The exit status, -N for signal N, or None while it runs."""
        return self._popen.poll()

    def wait(self, timeout: float) -> int | None:
        """Waits up to `timeout` seconds for the end; the exit status or None."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._popen.wait(timeout)
        return None

    def stop(self) -> None:
        """Ends it and all of its group now. To be called any number of times."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait(30)
        with _lock:
            _running.discard(self)


@atexit.register
def end() -> None:
    """Ends every process that still runs, and lets no other start: threads that wait for hosts fail and come back."""
    global _ending
    _ending = True
    stop_all()


def stop_all() -> None:
    """Ends every process that still runs."""
    with _lock:
        left = list(_running)
    for process in left:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.stop()
