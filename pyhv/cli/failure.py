"""What a command says when it fails: a line on stderr, and with --json one object on stdout (docs/json.md)."""

from __future__ import annotations

import errno
import json
import os
import sys
from typing import Any

from pyhv import outcome
from pyhv.arguments import as_options
from pyhv.cli.say import complain, die_of_broken_pipe
from pyhv.errors import BadInput, Cancelled, HostError, PyhvError, TimedOut

# What writing to a full or broken device fails with.
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)


class Interrupted(KeyboardInterrupt):
    """A signal ends the command. number: which; the exit status is that which a shell gives to it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def end_in_order() -> None:
    """Lets SIGTERM and SIGHUP, unless they are ignored, end the command as Ctrl-C does: nothing is left behind."""
    import signal

    def interrupt(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends it whatever it does
        raise Interrupted(number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, interrupt)


def report(error: BaseException, as_json: bool) -> int:
    """Tells what a command ended with and returns its exit status. What it has printed already is flushed."""
    flushed = _flush()
    error = _explain(error)
    value = to_json(error)
    if isinstance(error, PyhvError):
        complain(*lines(error))
    elif not isinstance(error, KeyboardInterrupt):
        if os.environ.get("PYHV_DEBUG"):
            import traceback

            traceback.print_exception(error)
        complain(f"{value['message']}; please report this, with what PYHV_DEBUG=1 in the environment adds")
    if as_json and flushed is None:
        flushed = _flush(json.dumps(value) + "\n")
        if isinstance(flushed, PyhvError):
            complain(str(flushed))
    if isinstance(flushed, BrokenPipeError):
        return die_of_broken_pipe()
    status: int = value["status"]
    return status


def to_json(error: BaseException) -> dict[str, Any]:
    """An error as docs/json.md has it: kind, message, facts, cause and the exit status."""
    facts: dict[str, Any] = {}
    if isinstance(error, PyhvError):
        kind, message = type(error).__name__.lstrip("_"), as_options(str(error))
        cause = "usage" if isinstance(error, BadInput) else "internal-error"
        cause = "timeout" if isinstance(error, TimedOut) else cause
        cause = "interrupted" if isinstance(error, Cancelled) else cause
        facts = {name: _fact(value) for name, value in vars(error).items() if not isinstance(value, dict)}
        if "reasons" in facts:
            facts["reasons"] = [reason_to_json(reason) for reason in getattr(error, "reasons", ())]
    elif isinstance(error, KeyboardInterrupt):
        kind, message, cause = "Interrupted", "interrupted", "interrupted"
    else:
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        kind, message, cause = "InternalError", f"internal error: {what}", "internal-error"
    return {
        "kind": kind,
        "message": message,
        "facts": facts,
        "cause": cause,
        "status": 128 + error.number if isinstance(error, Interrupted) else outcome.status_of(cause),
    }


def lines(error: PyhvError) -> list[str]:
    """The error for a person: one line, or where there are several reasons one line for each of them."""
    reasons = getattr(error, "reasons", ())
    if not isinstance(error, BadInput) or len(reasons) < 2:
        return [str(error)]
    return [f"{error.subject}: {error.problem}:", *map(str, reasons)]


def _fact(value: object) -> Any:
    """A fact of an error as JSON has it."""
    if isinstance(value, str):
        return as_options(value)
    if value is None or isinstance(value, int | float):
        return value
    return [_fact(item) for item in value] if isinstance(value, tuple | list) else as_options(str(value))


def reason_to_json(reason: object) -> dict[str, str]:
    """A reason why a guest cannot go on on a host: of pyhv/cpu/compare.py, or the text of one that another process
    gave."""
    return {"kind": "Reason" if isinstance(reason, str) else type(reason).__name__, "text": as_options(str(reason))}


def _flush(text: str = "") -> OSError | PyhvError | None:
    """Writes what was printed, and the text. Returns what that failed with."""
    try:
        if sys.stdout is not None:
            sys.stdout.write(text)
            sys.stdout.flush()
    except (OSError, PyhvError) as error:
        return error
    return None


def _explain(error: BaseException) -> BaseException:
    """The error that says whose fault it is, where it is not pyhv's."""
    if isinstance(error, MemoryError):
        return HostError("memory", errno.ENOMEM)
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        advice = "this user's processes and threads (ulimit -u) or the address space (ulimit -v) may be limited"
        return HostError("start a thread", errno.EAGAIN, "", advice)
    if not isinstance(error, OSError):
        return error
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return HostError(_subject(error, "memory" if error.errno == errno.ENOMEM else "open a file"), error.errno)
    if error.errno in _WRITE_ERRORS:
        return HostError(_subject(error, "writing a file"), error.errno)
    return error


def _subject(error: OSError, otherwise: str) -> str:
    return os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else otherwise
