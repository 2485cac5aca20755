"""The life of a VM: the states that it can be in, and who may do what in each of them.

start, pause, save, migrate and close are transitions. One happens at a time, whichever thread asks for it. TABLE says
what becomes of each in each state:

    do    it is done
    -     there is nothing to do: the VM is as it was asked to be
    wait  it waits until the transition that is under way is over, and the state then decides
    end   it makes what is under way give up, waits for that, and is done
    no    it is refused with WrongState
    force it is refused, unless the caller knows better (start(force=True))

The guest's end is no call: it comes from a vCPU at any moment. A VM that was built, runs or is paused is then "ended".

Whoever calls from inside a transition, on the same thread (a progress callback), or on the thread of a vCPU (on_cpuid)
cannot wait for it: what would have to wait is refused there, and never a deadlock.

Locks. `turn` is held by whoever changes something; `leaving` by a migration from its first to its last moment, and it
is taken before `turn`. Pre-copy leaves `turn` free, for the guest runs; the hand-over holds it. Both are locks of C and
are entered by `with`, and what stands in `finally` only stores: Ctrl-C can come between any two calls, and must not
leave a lock taken or a transition marked as under way.
"""

from __future__ import annotations

import threading

from pyhv.errors import WrongState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

BUILT, RUNNING, PAUSED = "built", "running", "paused"
SAVING = "saving"
MIGRATING = "migrating"  # its memory is being copied while it runs here
HANDING_OVER = "handing over"  # it is stopped here and not yet given away
UNKNOWN = "unknown"  # given away, and no answer has come yet, or never came
MOVED = "moved"
ENDED = "ended"
CLOSED = "closed"

STATES = (BUILT, RUNNING, PAUSED, SAVING, MIGRATING, HANDING_OVER, UNKNOWN, MOVED, ENDED, CLOSED)

START, PAUSE, SAVE, MIGRATE, CLOSE = "start", "pause", "save", "migrate", "close"

TABLE: dict[str, dict[str, str]] = {
    asked: dict(zip(STATES, cells.split(), strict=True))
    for asked, cells in {
        #         built running paused saving migrating handing-over unknown moved ended closed
        START:   "do    -       do     wait   -         wait         force   force -     no",
        PAUSE:   "-     do      -      wait   no        no           -       -     do    no",
        SAVE:    "do    do      do     wait   no        no           no      no    no    no",
        MIGRATE: "no    do      do     wait   no        no           no      no    no    no",
        CLOSE:   "do    do      do     end    end       end          do      do    do    -",
    }.items()
}  # fmt: skip

# What is said of a VM in a state, and what to do; {peer}: where it goes or went.
_WORDS = {
    BUILT: ("does not run", "let it run first"),
    RUNNING: ("is running", "pause it first"),
    PAUSED: ("does not run", "let it run first"),
    SAVING: ("is being saved", "wait until that is over"),
    MIGRATING: ("is being migrated to {peer}", "wait until that is over, or give it up"),
    HANDING_OVER: ("is being handed over to {peer}", "wait until that is over"),
    UNKNOWN: (
        "was handed over to {peer}, and may run there",
        "look there; only if it does not run there: start(force=True), or pyhv resume NAME --force",
    ),
    MOVED: ("was handed over to {peer}", "it belongs to that side now"),
    ENDED: ("has come to its end", ""),
    CLOSED: ("has been closed", "make another one"),
}

# What cannot be done, for a message.
_CANNOT = {
    START: "be started",
    PAUSE: "be paused",
    SAVE: "be saved",
    MIGRATE: "be migrated",
    CLOSE: "be closed",
    "result": "be asked for a result",
    "send": "be sent input",
    "expect": "print",
}


class Life:
    """The state of one VM, and the locks for changing it."""

    def __init__(self) -> None:
        self.turn = threading.RLock()
        self.leaving = threading.RLock()
        self.at = BUILT
        """The state, but for the guest's end; for whoever holds `turn` to set."""
        self.ended = False
        """The guest has come to its end."""
        self.peer = ""
        """The side that it is migrated to."""
        self.closing = False
        """Somebody waits to close it: a save or a migration gives up."""
        self.guest_threads: set[int] = set()
        """The threads of its vCPUs, by threading.get_ident()."""
        self.busy_thread = 0
        """The thread that saves or migrates it."""
        self._doing = ""  # the transition under way, while `turn` is held

    @property
    def state(self) -> str:
        """One of STATES. Any thread; it may be another one by the time that it is looked at."""
        at = self.at
        return ENDED if self.ended and at in (BUILT, RUNNING, PAUSED) else at

    @property
    def is_away(self) -> bool:
        """Whether it was given away to `peer`."""
        return self.at in (UNKNOWN, MOVED)

    @property
    def is_here(self) -> bool:
        """Whether there is something that can be paused."""
        return self.at not in (UNKNOWN, MOVED, CLOSED)

    @property
    def is_guest_thread(self) -> bool:
        """Whether the caller is on the thread of one of its vCPUs."""
        return threading.get_ident() in self.guest_threads

    def perform(self, asked: str, work: Callable[[], None], force: bool = False) -> None:
        """Does `work`, which is the transition `asked`, if the table says so, with `turn` held. Raises WrongState."""
        self.check_leaving(asked)
        with self.turn:
            outer = self._doing
            try:
                if self.allows(asked, force):
                    self._doing = asked
                    work()
            finally:
                self._doing = outer

    def allows(self, asked: str, force: bool = False) -> bool:
        """Whether there is something to do, for whoever holds `turn`. Raises WrongState."""
        if self._doing:  # the same thread's: others wait for `turn`
            raise self.refusal(asked, f"is in the middle of {self._doing}()", "call it when that is over")
        cell = TABLE[asked][self.state]
        if cell == "-":
            return False
        if cell == "do" or (cell == "force" and force):
            return True
        raise self.refusal(asked)

    def check_leaving(self, asked: str) -> None:
        """Raises WrongState at once for what a migration refuses: its hand-over has the turn."""
        at = self.at
        if at in (MIGRATING, HANDING_OVER) and TABLE[asked][at] == "no":
            raise self.refusal(asked)

    def check_open(self, asked: str = SAVE) -> None:
        """Raises WrongState where somebody wants to close it: what is under way gives up."""
        if self.closing:
            raise self.refusal(asked, "is being closed", "make another one")

    def check_thread(self, asked: str) -> None:
        """Raises WrongState on a thread that cannot wait: that of a vCPU, which would wait for itself to stop."""
        if self.is_guest_thread:
            raise self.refusal(asked, "waits for this callback, on its vCPU's thread", "call stop() here")

    def check_free(self, asked: str) -> None:
        """Likewise, and on the one that saves or migrates it, which would wait for that to end."""
        self.check_thread(asked)
        if threading.get_ident() == self.busy_thread:
            raise self.refusal(asked, advice="to give that up raise an exception in its callback")

    def refusal(self, asked: str, problem: str = "", advice: str = "") -> WrongState:
        """The error for what cannot be done in the state that it is in."""
        state = self.state
        words, hint = _WORDS[state]
        problem = problem or words.format(peer=self.peer or "another host")
        return WrongState(state, asked, f"{problem}: it cannot {_CANNOT.get(asked, asked)}", advice or hint)
