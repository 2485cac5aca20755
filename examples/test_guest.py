"""Guests in pytest: the same guest with and without the processor compatibility mode.

Run it with `pytest test_guest.py`. A test that fails shows the guest's console, since it is part of the assertion.
"""

from __future__ import annotations

import pytest

import pyhv


@pytest.mark.parametrize("compat", [False, True], ids=["host", "compat"])
def test_a_program_that_adapts_gets_the_same_result(compat: bool) -> None:
    with pyhv.Machine("dispatch", compat=compat) as vm:
        result = vm.run(timeout=30)
    assert (result.cause, result.status) == ("guest-exit", 0), result.console.decode()
    assert b"result 0x000001fc3e12c82b ok" in result.console


def test_a_program_that_does_not_adapt_says_why_it_refuses() -> None:
    with pyhv.Machine("refuse", compat=True) as vm:
        result = vm.run(timeout=30)
    assert (result.cause, result.status) == ("guest-exit", 42), result.console.decode()
    assert b"needs SSE4.2" in result.console


def test_a_guest_that_hangs_is_a_failure_and_no_hanging_test() -> None:
    with pyhv.Machine("spin") as vm:
        result = vm.run(timeout=0.2)
    assert (result.cause, result.status) == ("timeout", 124)
