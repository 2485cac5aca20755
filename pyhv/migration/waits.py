"""How long each side of a migration waits for what: the one table of it.

Two things end a wait. Silence: nothing at all comes from the other side for Limits.silence seconds;
csrc/migration/link.c sees to that. And a deadline, for a side that gives signs of life and does not do what is due:
those are here. Where the guest runs meanwhile they are long, since waiting costs little; while it is paused they are
not.

Hosts that are emulated, or busy, are some ten times slower than others, serial lines carry 10 kB a second, and ssh logs
in as slowly as it likes: an honest side that is slow has its time.
"""

from __future__ import annotations

from typing import NamedTuple

# The longest of all waits, whatever the other side asks for; in seconds.
MOST = 3600.0

# The longest silence that a destination agrees to, in seconds: it holds a guest's memory for somebody who says nothing.
MOST_SILENCE = 600.0

# The slowest link that is worth waiting for, in bytes a second: a serial line of 115,200 baud carries 11,500.
SLOWEST = 8e3

# What can be on its way at once, in the buffers of ssh, TLS and proxies: bytes.
ON_THE_WAY = 4 << 20


class Wait(NamedTuple):
    """One row of the table."""

    who: str
    """ "source", "destination" or "both"."""
    what: str
    """What is waited for."""
    least: float
    """Seconds, at least."""
    silences: float
    """Or so many times the silence that the two sides have agreed on, if that is longer."""
    why: str

    def seconds(self, silence: float = 0.0) -> float:
        """How long, with that silence in seconds."""
        return min(max(self.least, self.silences * silence), MOST)


CONNECT = Wait("source", "a connection", 10, 0, "a host that is there answers in a round trip, or a few")
TLS = Wait("both", "the TLS handshake", 10, 0, "it takes two round trips and a signature")
HELLO = Wait("destination", "hello", 10, 0, "who connects speaks first, and others may wait for their turn")
ANSWER = Wait("source", "answer", 60, 10, "ssh logs in, and the other side makes a VM; the guest runs meanwhile")
ROUND = Wait("source", "a message of pages to be taken", 120, 10, "256 KiB over a slow line; the guest runs meanwhile")
SYNCED = Wait("source", "synced", 15, 10, "besides what the slowest link needs for what is on its way; the guest runs")
MEMORY = Wait(
    "destination", "the next message", 600, 10, "the source may keep to a bandwidth, or wait for its guest; it has said"
    " nothing else, but signs of life, for so long"
)  # fmt: skip
END = Wait("destination", "the rest of the state", 10, 10, "the guest is paused: its source gives up long before")
COMMIT = Wait("destination", "commit", 10, 10, "the same")
ENTRY = Wait("destination", "its first vCPU to be entered", 10, 0, "a thread is to begin; the source waits for running")
RUNNING = Wait("source", "running", 10, 10, "nobody knows who has the guest: an answer is worth waiting for")
LAST_WORD = Wait("both", "cancel to be taken", 1, 0, "the other side may be slow, or not there any more")
SSH_REASON = Wait("source", "what ssh says of its end", 1, 0, "it is about to end, and may not have said it yet")
SSH_END = Wait("source", "ssh to end", 5, 0, "it is killed then")
TLS_END = Wait("both", "the last bytes over TLS to be taken", 2, 0, "the connection is cut then")

WAITS = (
    CONNECT, TLS, HELLO, ANSWER, ROUND, SYNCED, MEMORY, END, COMMIT, ENTRY, RUNNING, LAST_WORD, SSH_REASON, SSH_END,
    TLS_END,
)  # fmt: skip
