"""What can be done to a running VM by its control socket, and who does it.

Telling the status is quick, and the server's own thread does it. Everything else may take long (pausing waits for the
vCPUs, saving writes gigabytes): a worker thread does it, one call after the other, in the order in which they came.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable

from pyhv.arguments import as_options
from pyhv.errors import BadInput, HostError, PyhvError
from pyhv.outcome import status_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyhv.machine import Machine, RunResult
    from pyhv.migration.source import Progress


class Deferred:
    """What a call returns that is answered when the VM has come to its end."""


class Call:
    """One call for the worker. finished: is called once, on the worker's thread, with the result or the exception.
    progress: is called now and then with what is to be told. cancelled: may be set by anybody; a save or a migration is
    given up then."""

    def __init__(
        self,
        method: str,
        params: dict[str, Any],
        finished: Callable[[object], None],
        progress: Callable[[dict[str, Any]], None],
    ) -> None:
        self.method = method
        self.params = params
        self.finished = finished
        self.progress = progress
        self.cancelled = False


class Operations:
    """The control of one VM: of its machine, or where the guest resets itself of one after the other. A context
    manager; close() must come before the machine is looked at at its end.

    The one who runs the machine calls control(), hold(), close() and ended(); any thread may call status() and
    submit(), once control() was called.
    """

    def __init__(self, name: str) -> None:
        self.ending = ""
        """Why the VM is to end, where somebody asked for it here: a cause of pyhv.outcome."""
        self.failure: BaseException | None = None
        """What a vCPU's thread failed with, where that was found out here: the run's owner is to raise it."""
        self.held = False
        """Between hold() and the next control(): calls wait for another machine."""
        self._name = name
        self._machine: Machine | None = None
        self._lock = threading.Lock()  # the machine's counters, and _end
        self._turn = threading.Lock()  # held for as long as a call is carried out, and between two machines
        self._started = 0.0
        self._paused = False
        self._current: Call | None = None
        self._closed = False
        self._give_up = False
        self._end: dict[str, Any] | None = None
        self._registers = ""
        self._final_counters: dict[str, int] = {}
        self._facts: dict[str, Any] = {}
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._work, name="control-worker", daemon=True)

    @property
    def controls(self) -> bool:
        """Whether control() was called."""
        return self._machine is not None

    def control(self, machine: Machine) -> bool:
        """The machine runs now; calls are carried out from here on. Returns whether it is the first."""
        first = self._machine is None
        notes = [as_options(note) for note in machine.notes]
        with self._lock:
            # The machine's vm is gone when it is closed; these stay.
            self._facts = {
                "name": self._name,
                "uuid": machine.uuid,
                "profile": machine.guest.profile,
                "intercept": machine.choice.intercept,
                "note": "; ".join(notes),
                "notes": notes,
                "vcpus": len(machine.vm.vcpus),
                "memory": machine.vm.memory.size,
                "image": machine.facts.name,
                "pid": os.getpid(),
            }
            self._machine = machine
            self._paused = machine.came_paused
            if self.held:
                self.held = False
                self._turn.release()
        if first:
            self._started = time.monotonic()
            self._worker.start()
        return first

    def hold(self) -> None:
        """The guest has reset itself: carries out what has begun, and lets what is queued wait for another machine."""
        self._turn.acquire()
        with self._lock:
            assert self._machine is not None
            self._final_counters = self._machine.counters()
            self._paused = False
            self.held = True

    def status(self) -> dict[str, Any]:
        """What `pyhv status` shows; docs/control.md has the meaning of each."""
        with self._lock:
            end = self._end
            state = "ended" if end is not None else self._state()
            current = self._current
            return {
                "name": self._name,
                "state": state,
                "cause": end["cause"] if end else None,
                "status": end["status"] if end else None,
                "message": end["message"] if end else None,
                "doing": current.method if current else None,
                "uptime": round(time.monotonic() - self._started, 3),
                **self._facts,
                "counters": self._counters(),
            }

    def _counters(self) -> dict[str, int]:
        if self._closed or self.held or self._machine is None:
            return self._final_counters
        return self._machine.counters()

    def _state(self) -> str:
        if self._machine is not None and self._machine.handed_over:
            return "handed-over"
        return "paused" if self._paused else "running"

    def submit(self, call: Call) -> None:
        """Queues a call. After close() it fails with BadInput at once, unless it asks for the VM's end, and so does
        during a migration what would have to wait for it, and then find nothing."""
        if call.method == "cancel":
            call.finished(self._cancel())
            return
        current = self._current
        if current is not None and current.method == "migrate" and not self._closed:
            if call.method == "stop":  # whoever ends the VM does not wait until it is gone elsewhere
                current.cancelled = True
            else:
                already = " already" if call.method == "migrate" else ""
                call.finished(BadInput(self._name, f"is being migrated{already}", "pyhv status tells about it"))
                return
        self._calls.put(call)
        if self._closed:
            self._refuse_rest()

    def _cancel(self) -> object:
        """Gives up the migration that is under way."""
        if self._machine is not None and self._machine.cancel_migration():
            return {}
        current = self._current
        if current is not None and current.method == "migrate":
            return BadInput(self._name, "is handed over already", "pyhv status tells what becomes of it")
        return BadInput(self._name, "is not being migrated", "pyhv status tells about it")

    def close(self, give_up: bool = False) -> None:
        """Carries out what has begun, refuses what is queued, and leaves the machine alone from then on. give_up: stop
        a save in its middle. Closing twice is allowed."""
        with self._lock:
            if not self._closed and not self.held and self._machine is not None:
                self._final_counters = self._machine.counters()
            self._closed = True
            if self.held:  # there is no other machine
                self.held = False
                self._turn.release()
        self._give_up = give_up
        self._calls.put(None)
        if self._worker.ident is not None:
            self._worker.join()
        self._refuse_rest()

    def ended(self, result: RunResult) -> None:
        """After close(): the VM has come to its end."""
        with self._lock:
            self._final_counters = result.counters
            self._end = {"cause": result.cause, "status": result.status, "message": as_options(result.message)}
            self._registers = result.registers

    def failed(self, error: BaseException) -> None:
        """After close(): the VM has come to an end by a failure here."""
        internal = f"internal error: {type(error).__name__}: {error}"
        message = as_options(str(error)) if isinstance(error, PyhvError) else internal
        with self._lock:
            self._end = {"cause": "internal-error", "status": status_of("internal-error"), "message": message}

    def record(self) -> dict[str, Any]:
        """After ended() or failed(): what is to be kept of the VM, but for its console."""
        return {**self.status(), "registers": self._registers, "ended": time.time()}

    def end(self) -> dict[str, Any] | None:
        """How the VM ended: cause, status, message; None if it has not."""
        return self._end

    def __enter__(self) -> Operations:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close(give_up=True)

    # ---------------------------------------------------------------------------------------------- the worker

    def _work(self) -> None:
        while True:
            call = self._calls.get()
            if call is None or self._closed:
                if call is not None:
                    self._refuse(call)
                return
            with self._turn:
                if self._closed:
                    self._refuse(call)
                    return
                self._current = call
                try:
                    outcome: object = self._carry_out(call)
                except BaseException as error:
                    outcome = error
                self._current = None
            call.finished(outcome)

    def _refuse_rest(self) -> None:
        while True:
            try:
                call = self._calls.get_nowait()
            except queue.Empty:
                break
            if call is not None:
                self._refuse(call)
        self._calls.put(None)  # the worker, if it is still at work, needs one to come to its end

    def _refuse(self, call: Call) -> None:
        """Of a VM that has come to its end nothing but that can be had."""
        call.finished(Deferred() if call.method == "stop" else _over(self._name))

    def _carry_out(self, call: Call) -> object:
        vm = self._live.vm
        if vm.stopped is not None and call.method != "stop":
            raise _over(self._name)
        match call.method:
            case "pause":
                self._pause()
                return {}
            case "resume":
                self._resume(call.params.get("force", False))
                return {}
            case "stop":
                return self._stop("stopped")
            case "migrate":
                return self._migrate(call)
            case "save":
                return self._save(call)
            case _:
                raise AssertionError(call.method)

    @property
    def _live(self) -> Machine:
        """The machine, for the worker."""
        assert self._machine is not None
        return self._machine

    def _pause(self) -> None:
        if self._live.handed_over:
            return  # it stands already
        try:
            self._live.pause()
        except BaseException as failure:
            self.failure = failure
            raise
        if self._live.vm.stopped is not None:  # a moment before
            raise _over(self._name)
        self._paused = True

    def _resume(self, force: bool = False) -> None:
        self._live.start(force)
        self._paused = False

    def _stop(self, cause: str) -> Deferred:
        self.ending = self.ending or cause  # a VM that has left in the meantime is not stopped by anybody here
        self._live.vm.interrupt()
        return Deferred()

    def _migrate(self, call: Call) -> object:
        from pyhv.migration.source import Limits
        from pyhv.migration.transport import SSH_VARIABLES, Tls

        params = dict(call.params)
        given = {key: params.pop(key) for key in Limits._fields if key in params}
        files = [params.pop(key, "") for key in ("tls_cert", "tls_key", "tls_ca")]

        def progress(progress: Progress) -> None:
            if self._give_up or call.cancelled:
                raise BadInput(self._name, "was not migrated", "the VM ended, or nobody waits for it any more")
            call.progress(progress._asdict())

        uri = params.pop("uri")
        for name, value in params.get("environment", {}).items():
            if name not in SSH_VARIABLES or not isinstance(value, str) or "\0" in value:
                raise BadInput(f"environment {name}", "is not for ssh", f"there are {', '.join(SSH_VARIABLES)}")
        tls = Tls(*files) if any(files) else None
        summary = self._live.migrate(
            uri, limits=Limits(**given), tls=tls, name=self._name, progress=progress, **params
        )
        self._stop("migrated")
        return summary._asdict()

    def _save(self, call: Call) -> object:
        path, stop = call.params["path"], call.params.get("stop", False)
        was_paused = self._paused

        def progress(done: int, total: int) -> None:
            if self._give_up or call.cancelled:
                raise BadInput(path, "nothing was saved", "the VM ended, or nobody waits for it any more")
            call.progress({"done": done, "total": total})

        if stop:
            # The file is to have the last that there is to know: nothing runs between saving and the end.
            self._pause()
        try:
            self._live.save(path, progress)
        except BaseException as failure:
            if stop and not was_paused:
                self._resume()
            if isinstance(failure, HostError) and self._live.vm.running:
                advice = f"{failure.advice}; {self._name} runs on" if failure.advice else f"{self._name} runs on"
                raise HostError(failure.what, failure.errnum, failure.detail, advice) from None
            raise
        return self._stop("stopped") if stop else {}


def _over(name: str) -> BadInput:
    return BadInput(name, "has come to its end")
