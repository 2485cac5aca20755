"""A link for migration: messages and pages over a pair of descriptors (struct pyhv_link)."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from typing import Any

from pyhv.errors import HostError

from . import check, ffi, lib, new_error
from .memory import Memory

PAGE_SIZE = 4096
MAX_MESSAGE: int = lib.PYHV_MESSAGE_MAX


class PageSet:
    """A set of the pages of a VM's RAM, a bit a page: `words` is uint64_t[], for the engine."""

    def __init__(self, size: int) -> None:
        """size: bytes of RAM; no page is in the set."""
        self.pages = size // PAGE_SIZE
        self.words: Any = ffi.new("uint64_t[]", (self.pages + 63) // 64)

    def add_content(self, memory: Memory) -> None:
        """Adds the pages that may have content. Raises HostError."""
        error = new_error()
        check(lib.pyhv_pages_find(memory.handle, self.words, error), error)

    def update(self, pages: Iterable[int]) -> None:
        """Adds pages by their numbers."""
        for page in pages:
            self.words[page // 64] |= 1 << page % 64

    def __len__(self) -> int:
        return int(lib.pyhv_pages_count(self.words, self.pages))


class Link:
    """Messages both ways over two descriptors, which stay the caller's. One thread at a time, but for cancel().

    heartbeat: after so many seconds without sending a sign of life is sent. silence: after so many seconds without a
    byte from the other side the link is broken. All calls raise HostError: errnum is EPIPE where the other side has
    closed the link, ETIMEDOUT after such a silence, ETIME after set_limit(), EBADMSG for what is no message or is
    damaged, ECANCELED.
    """

    def __init__(self, in_fd: int, out_fd: int, heartbeat: float, silence: float) -> None:
        config = ffi.new("struct pyhv_link_config *", {"in_fd": in_fd, "out_fd": out_fd, **_times(heartbeat, silence)})
        error = new_error()
        self._link: Any = check(lib.pyhv_link_create(config, error), error)
        self._message: Any = ffi.new("struct pyhv_message *")
        self.landing: Any = ffi.NULL
        """Where pages go that come in (struct pyhv_landing *); as long as it is NULL there must come none."""
        self._kept: tuple[Any, ...] = ()

    def set_times(self, heartbeat: float, silence: float) -> None:
        """Changes both limits."""
        times = _times(heartbeat, silence)
        lib.pyhv_link_set_times(self._link, times["heartbeat_ms"], times["silence_ms"])

    def send(self, kind: int, payload: bytes = b"", more: bool = False) -> None:
        """Sends a message, however long that takes. more: another follows at once, and the two may go together."""
        error = new_error()
        check(lib.pyhv_link_send(self._link, kind, payload, len(payload), more, error), error)

    def send_last(self, kind: int, payload: bytes, within: float) -> None:
        """Sends a message after which nothing comes, if the other side takes it within so many seconds; if not, or if
        the link is broken, nobody is told."""
        timer = threading.Timer(within, self.cancel)
        timer.start()
        try:
            self.send(kind, payload)
        except HostError:
            pass
        finally:
            timer.cancel()
            timer.join()

    def receive(self, timeout: float) -> tuple[int, bytes] | None:
        """The next message that is neither a sign of life nor pages; pages are put where they belong on the way. None
        when none has come within `timeout` seconds."""
        error = new_error()
        wait = max(0, min(math.ceil(timeout * 1000), 1 << 31))  # not less: whoever asks again would never sleep
        if not check(lib.pyhv_link_receive(self._link, self.landing, wait, self._message, error), error):
            return None
        return self._message.type, bytes(ffi.buffer(self._message.payload, self._message.length))

    def expect_pages(self, memory: Memory) -> None:
        """From now on pages that come in go to `memory`."""
        written, unsettled = PageSet(memory.size), PageSet(memory.size)
        places = {"ram": memory.handle, "written": written.words, "unsettled": unsettled.words}
        self.landing = ffi.new("struct pyhv_landing *", places)
        self._kept = (memory, written, unsettled)

    @property
    def landed(self) -> int:
        """How many pages have come in, those of zeros included."""
        return int(self.landing.pages + self.landing.zero_pages) if self.landing else 0

    def check_pages(self) -> None:
        """To be asked when all pages have come: fails with EBADMSG if one of them was changed on the way, and did not
        come again."""
        error = new_error()
        check(lib.pyhv_landing_check(self.landing, error), error)

    def sending(self, memory: Memory, pages: PageSet, zstd_level: int) -> Any:
        """What send_pages() works on (struct pyhv_sending *): it keeps count in there."""
        sending = ffi.new("struct pyhv_sending *", {"ram": memory.handle, "bitmap": pages.words})
        sending.zstd_level = zstd_level
        self._kept = (memory, pages)
        return sending

    def send_pages(self, sending: Any) -> bool:
        """Sends pages, and takes them out of the set, until all are sent; False if a limit came first or a message
        that should be received."""
        error = new_error()
        return bool(check(lib.pyhv_link_send_pages(self._link, sending, error), error) == 0)

    def cancel(self) -> None:
        """Makes the current call, and all later ones, fail. Any thread."""
        lib.pyhv_link_cancel(self._link)

    def revive(self) -> None:
        """Takes cancel() back, for a last word."""
        lib.pyhv_link_revive(self._link)

    def set_limit(self, seconds: float | None) -> None:
        """From now on calls fail with ETIME once so many seconds have passed, also while bytes move; None: no limit."""
        lib.pyhv_link_set_limit(self._link, 0 if seconds is None else max(1, math.ceil(seconds * 1000)))

    def counters(self) -> tuple[int, int]:
        """Bytes sent and received."""
        counters = lib.pyhv_link_counters(self._link)
        return counters.bytes_sent, counters.bytes_received

    def close(self) -> None:
        """Closing twice is allowed."""
        lib.pyhv_link_destroy(self._link)
        self._link = ffi.NULL
        self.landing = ffi.NULL


def open_zstd() -> None:
    """Raises HostError where there is no zstd library."""
    error = new_error()
    check(lib.pyhv_zstd_open(error), error)


def _times(heartbeat: float, silence: float) -> dict[str, int]:
    return {"heartbeat_ms": int(heartbeat * 1000), "silence_ms": int(silence * 1000)}
