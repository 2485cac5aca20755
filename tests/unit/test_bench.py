"""The benchmarks' own arithmetic, and the check of a restored guest's memory, which must be able to fail."""

from __future__ import annotations

from typing import Any

import pytest

from bench import snapshots
from bench.measure import Goal, Pairs, Skip

MIB = 1 << 20


class Memory:
    """As much of GuestMemory as the rows use."""

    def __init__(self, size: int) -> None:
        self.size = size
        low = min(size, 3 << 30)
        self.regions = [(0, low, 0)] + ([(4 << 30, size - low, low)] if size > low else [])
        self.changed: dict[int, int] = {}

    def read(self, gpa: int, size: int) -> bytes:
        data = bytearray(size)
        for at, byte in self.changed.items():
            if gpa <= at < gpa + size:
                data[at - gpa] = byte
        return bytes(data)


class Machine:
    def __init__(self, size: int) -> None:
        self.vm = self
        self.memory = Memory(size)


@pytest.mark.parametrize(("goal", "reached", "met"), [
    (Goal("least", 3), 2, True),
    (Goal("least", 1.9), 2, False),
    (Goal("least difference", 1), 1, True),
    (Goal("value", 3), 4, False),
    (Goal("difference", 2), 1, True),
    (Goal("ratio", 2), 2, True),
    (Goal("p99", 8), 9, False),
])
def test_goals(goal: Goal, reached: float, met: bool) -> None:
    pairs = Pairs([2.0, 4.0, 9.0], [1.0, 2.0, 8.0])
    assert goal.reached(pairs) == reached
    assert goal.met(pairs) is met


def test_a_goal_in_words() -> None:
    assert Goal("least", 3).words("ms") == "least at most 3 ms"
    assert Goal("least difference", 3).words("ms") == "least at most +3 ms"
    assert Goal("p99", 5).words("ms") == "p99 at most 5 ms"
    assert Goal("value", 5).words("ns") == "at most 5 ns"
    assert Goal("ratio", 0.85, at_least=True).words("MB/s") == "ratio at least 0.85"


@pytest.mark.parametrize(("size", "used"), [(64, 60), (4096, 60), (4096, 64), (1024, 1024)])
def test_the_pieces_are_apart_and_in_ram(size: int, used: int) -> None:
    machine: Any = Machine(size * MIB)
    places = snapshots._places(machine, used * MIB)
    assert len(set(places)) == used and places == sorted(places)
    assert places[0] == (0 if size == used else 2 * MIB)
    for gpa in places:
        assert gpa % MIB == 0
        assert any(start <= gpa and gpa + MIB <= start + length for start, length, _ in machine.memory.regions)


def test_wrong_memory_is_found() -> None:
    memory = Memory(16 * MIB)
    saved = snapshots._Saved("", 0, [(0, bytes(2 * MIB)), (3 * MIB, bytes(MIB))])
    snapshots._check_memory(memory, saved)
    memory.changed = {0x2000: 0x60, 0x7FF8: 0x20}  # marks of the processor in the page tables
    snapshots._check_memory(memory, saved)
    for wrong in (0x0, 0x1FFF, 0x2001, 0x8000, 2 * MIB - 1, 3 * MIB, 4 * MIB - 1):
        memory.changed = {wrong: 0x60}
        with pytest.raises(Skip, match="WRONG"):
            snapshots._check_memory(memory, saved)
    memory.changed = {0x2000: 0x61}
    with pytest.raises(Skip, match="WRONG"):
        snapshots._check_memory(memory, saved)
