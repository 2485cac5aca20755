"""Every error that pyhv raises on purpose. Each carries its facts as attributes; str() is one line for a person."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class PyhvError(Exception):
    """The root: catch this to catch everything that pyhv raises on purpose."""


class BadInput(PyhvError):
    """Something that the caller gave is wrong: the command line ends with exit status 2.

    subject: the thing (a path, an option, a name); problem: what is wrong with it; advice: what to do, or "".
    """

    def __init__(self, subject: str, problem: str, advice: str = "") -> None:
        self.subject = subject
        self.problem = problem
        self.advice = advice
        super().__init__(f"{subject}: {problem}" + (f"; {advice}" if advice else ""))


class HostError(PyhvError):
    """The host refused or lacks something.

    what: what failed (an ioctl, a device, a system call). errnum: its errno, 0 where there is none. detail: what was
    found, in words, with the resource limit of the process that may be the reason.
    """

    def __init__(self, what: str, errnum: int, detail: str = "", advice: str = "") -> None:
        import os

        if "(ulimit -" not in detail:  # as that of an error of another process may
            detail = ", ".join(filter(None, (detail, _limit_behind(errnum))))
        self.what = what
        self.errnum = errnum
        self.detail = detail
        self.advice = advice
        parts = [p for p in (os.strerror(errnum) if errnum else "", detail) if p]
        super().__init__(f"{what}: {', '.join(parts)}" + (f"; {advice}" if advice else ""))


def _limit_behind(errnum: int) -> str:
    """The resource limit that a call fails by with this errno, in words; "" where there is none, or none is set."""
    import errno

    if errnum not in (errno.EFBIG, errno.EMFILE, errno.ENOMEM):
        return ""
    try:
        import resource
    except ImportError:  # no descriptor is left to open it with
        return "by a limit of this process (ulimit -n)"

    number, what, option = {
        errno.EFBIG: (resource.RLIMIT_FSIZE, "bytes in a file", "f"),
        errno.EMFILE: (resource.RLIMIT_NOFILE, "open files", "n"),
        errno.ENOMEM: (resource.RLIMIT_AS, "bytes of address space", "v"),
    }[errnum]
    limit = resource.getrlimit(number)[0]
    return "" if limit == resource.RLIM_INFINITY else f"this process may have {limit} {what} (ulimit -{option})"


class WrongState(BadInput):
    """What was asked of a VM cannot be done in the state that it is in; nothing was done.

    state: one of pyhv.vm.life.STATES. asked: what was asked, such as "save".
    """

    def __init__(self, state: str, asked: str, problem: str, advice: str = "") -> None:
        self.state = state
        self.asked = asked
        super().__init__("this VM", problem, advice)


class NotAvailable(BadInput):
    """What was asked for cannot be had on this machine (no /dev/kvm, no permission): exit status 2."""


class NotFaithful(BadInput):
    """This host shows guests features that the profile hides.

    leaks: names of the features that would stay visible, at any privilege level.
    """

    def __init__(self, subject: str, problem: str, advice: str, leaks: Sequence[str]) -> None:
        self.leaks = tuple(leaks)
        super().__init__(subject, problem, advice)


class Incompatible(BadInput):
    """A guest cannot go on on a host. reasons: every one of them, typed (cpu/compare.py), or as text where another
    process found them; they are not part of `problem`."""

    def __init__(self, subject: str, problem: str, reasons: Sequence[object]) -> None:
        super().__init__(subject, f"{problem}: {'; '.join(map(str, reasons))}")
        self.problem = problem
        self.reasons = tuple(reasons)


class TimedOut(PyhvError):
    """What the caller waited for did not come within the time that he gave: nobody migrated a VM to here. Nothing is
    wrong with what he gave: exit status 124.

    subject: who or what it was waited at. problem: what did not come. advice: what to do, or "".
    """

    def __init__(self, subject: str, problem: str, advice: str = "") -> None:
        self.subject = subject
        self.problem = problem
        self.advice = advice
        super().__init__(f"{subject}: {problem}" + (f"; {advice}" if advice else ""))


class Cancelled(PyhvError):
    """A migration that somebody gave up (Machine.cancel_migration): the VM goes on as if nothing had been. Exit status
    130.

    peer: the other side.
    """

    def __init__(self, peer: str) -> None:
        self.peer = peer
        super().__init__(f"migration to {peer}: it was cancelled; the VM stays here")


class GaveUp(HostError):
    """The other side of a migration gave it up: what failed is there, or somebody there wanted it. The VM stays with
    its source, as if nothing had been.

    what: the other side. reason: what it said.
    """

    def __init__(self, peer: str, reason: str) -> None:
        self.reason = reason
        super().__init__(peer, 0, f"gave the migration up: {reason}")


class HandoverUnknown(PyhvError):
    """A VM was handed over to another host, and nobody knows whether it runs there: here it is paused, and must not run
    unless it is certain that it does not run there. Not a HostError, for whoever tries again after those must not try
    again after this.

    peer: the other side. problem: why no answer came. advice: what to do.
    """

    def __init__(self, peer: str, problem: str) -> None:
        self.peer = peer
        self.problem = problem
        self.advice = "look there; only if it does not run there: start(force=True), or pyhv resume NAME --force"
        what = f"the VM was handed over and may run there, but no answer came ({problem}); here it is paused"
        super().__init__(f"migration to {peer}: {what}; {self.advice}")
