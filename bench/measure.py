"""How every row is measured: pyhv and its peer take turns, and medians are compared."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import NamedTuple


class Skip(Exception):
    """A row cannot be measured on this machine; the message says why, in one line."""


class Pairs(NamedTuple):
    """Samples taken alternately: ours[i] and peer[i] were taken one right after the other."""

    ours: list[float]
    peer: list[float]
    note: str = ""
    """What the reader should know of this measurement."""

    def ratio(self) -> float:
        """The median of the pairs' ratios: what slows the machine down for a while slows both halves of a pair."""
        return median(ours / peer for ours, peer in zip(self.ours, self.peer, strict=True))

    def difference(self) -> float:
        return median(ours - peer for ours, peer in zip(self.ours, self.peer, strict=True))

    def noise(self) -> float:
        """How far the peer's ratio to itself is from 1 in this very run: every second pair against the pairs between.

        A ratio that misses its goal by less than that has not missed it for sure, nor met it. 0.0 for under four pairs.
        """
        # By twos, because the order inside the pairs changes from one to the next.
        halves = [[sample for i, sample in enumerate(self.peer) if i // 2 % 2 == half] for half in (0, 1)]
        if not halves[0] or not halves[1]:
            return 0.0
        return abs(median(halves[0]) / median(halves[1]) - 1)


def alternate(ours: Callable[[], float], peer: Callable[[], float], pairs: int, warm_up: int = 1) -> Pairs:
    """Takes `pairs` samples of each after `warm_up` pairs that are thrown away.

    Who goes first changes from pair to pair: the second one finds caches and the processor's clock as the first left
    them.
    """
    samples: tuple[list[float], list[float]] = ([], [])
    for i in range(-warm_up, pairs):
        for side in (0, 1) if i % 2 == 0 else (1, 0):
            sample = (ours, peer)[side]()
            if i >= 0:
                samples[side].append(sample)
    return Pairs(*samples)


class Goal(NamedTuple):
    """What a row should reach. of: "ratio" (pyhv / peer), "difference" (pyhv - peer) or "value" (pyhv alone), medians
    all; or "least" and "least difference", of the least samples: for a limit in milliseconds of what mostly waits to be
    scheduled, where a median says how busy the machine is; or "p99", pyhv's 99th percentile."""

    of: str
    limit: float
    at_least: bool = False

    def reached(self, pairs: Pairs) -> float:
        if self.of == "ratio":
            return pairs.ratio()
        if self.of == "least":
            return min(pairs.ours)
        if self.of == "least difference":
            return min(pairs.ours) - min(pairs.peer)
        if self.of == "p99":
            return sorted(pairs.ours)[min(len(pairs.ours) * 99 // 100, len(pairs.ours) - 1)]
        return pairs.difference() if self.of == "difference" else median(pairs.ours)

    def met(self, pairs: Pairs) -> bool:
        reached = self.reached(pairs)
        return reached >= self.limit if self.at_least else reached <= self.limit

    def words(self, unit: str) -> str:
        sign = "at least" if self.at_least else "at most"
        if self.of == "ratio":
            return f"ratio {sign} {self.limit:g}"
        which = next((word for word in ("least", "p99") if self.of.startswith(word)), "")
        return f"{which} {sign} {'+' if self.of.endswith('difference') else ''}{self.limit:g} {unit}".lstrip()


class Row(NamedTuple):
    """One line of the table, and the function that measures it."""

    name: str
    """What the command line calls it."""
    title: str
    peer: str
    unit: str
    goal: Goal | None
    """None: reported only."""
    pairs: int
    """How many pairs are taken by default: the whole table stays under two minutes."""
    measure: Callable[[int], Pairs]
    """Takes that many pairs of samples in `unit`. Raises Skip."""
