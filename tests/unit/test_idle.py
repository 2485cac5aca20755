"""When a VM is looked at: not while it runs, once where it sleeps, and again where it has slept on for long."""

from __future__ import annotations

import itertools
import threading

import pytest

from pyhv.vm import idle
from pyhv.vm.idle import IdleWatch

THREADS = (1, 2)


def looks(monkeypatch: pytest.MonkeyPatch, counts: list[tuple[int, ...] | None], woken_by_look: int = 2) -> list[int]:
    """The calls, from 0, at which a watch wants a look, where the threads show `counts` at each; a look wakes them."""
    watch, wanted, extra = IdleWatch(), [], 0
    now: tuple[int, ...] | None = None
    monkeypatch.setattr(idle, "sleep_counts", lambda _: now and tuple(value + extra for value in now))
    for number, count in enumerate(counts):
        now = count
        assert 0 < watch.interval <= 2
        if watch.lies_still(THREADS):
            wanted.append(number)
            extra += woken_by_look
            watch.note_alive(THREADS)
    return wanted


def test_a_guest_that_computes_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    assert looks(monkeypatch, [None] * 50) == []


def test_a_guest_that_wakes_often_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    assert looks(monkeypatch, [(n, 7) for n in range(50)]) == []


def test_a_guest_that_sleeps_on_is_looked_at_more_and_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = looks(monkeypatch, [(5, 7)] * 200)
    assert wanted[0] == 1, "two calls find that it lies still"
    gaps = [later - earlier for earlier, later in itertools.pairwise(wanted)]
    assert gaps == sorted(gaps) and gaps[0] <= 4 and 16 <= gaps[-1] <= 40


def test_a_guest_that_has_run_since_is_looked_at_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[tuple[int, ...] | None] = [(5, 7)] * 100
    wanted = looks(monkeypatch, [*counts, *[(6, 7)] * 3])
    assert wanted[-1] in (101, 102)


def test_sleep_counts() -> None:
    over = threading.Event()
    ready = threading.Event()

    def sleep() -> None:
        ready.set()
        over.wait()

    thread = threading.Thread(target=sleep)
    thread.start()
    ready.wait()
    try:
        assert thread.native_id is not None
        while (first := idle.sleep_counts([thread.native_id])) is None:
            pass
        assert idle.sleep_counts([thread.native_id]) == first
        assert idle.sleep_counts([threading.get_native_id()]) is None, "this one runs"
        assert idle.sleep_counts([thread.native_id, threading.get_native_id()]) is None
    finally:
        over.set()
        thread.join()
    assert idle.sleep_counts([thread.native_id]) is None, "it is gone"
