"""Runs the benchmarks and prints one table."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from bench.measure import Pairs, Row, Skip
from bench.rows import OPTIONAL, ROWS

_COLUMNS = ("row", "pyhv", "peer", "ratio", "noise", "goal", "")


def main() -> int:
    """Returns 0 whether a goal is met or not: benchmarks report, tests judge."""
    known = {row.name: row for row in ROWS + OPTIONAL}
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"rows to measure: {', '.join(known)}")
    parser.add_argument("--repeat", type=int, metavar="N", help="pairs of samples a row, instead of its own number")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample there too")
    parser.add_argument("--with-pykvm", action="store_true", help="add the row pykvm, which installs it for the while")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"no such row: {', '.join(unknown)}")
    if options.repeat is not None and options.repeat < 1:
        parser.error("--repeat: at least 1")
    names = options.names or [row.name for row in ROWS]
    if options.with_pykvm and "pykvm" not in names:
        names.append("pykvm")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by the way that removes files, of which some are large
    print(machine_line(), end="\n\n", flush=True)
    start, busy = time.monotonic(), busy_seconds()
    lines: list[tuple[str, ...]] = [_COLUMNS]
    notes: list[str] = []
    report: list[dict[str, Any]] = []
    for row in (known[name] for name in names):
        pairs: Pairs | None = None
        note = ""
        try:
            pairs = row.measure(options.repeat or row.pairs)
            note = f"{len(pairs.ours)} pairs" + (f"; {pairs.note}" if pairs.note else "")
        except Skip as why:
            note = f"not measured: {why}"
        except Exception as error:  # a row that is broken must not take the others with it
            note = f"not measured: {type(error).__name__}: {error}"
        lines.append(cells(row, pairs))
        notes.append(f"{row.name}: {row.title}; peer: {row.peer}; {note}")
        report.append(as_json(row, pairs, note))

    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    took = time.monotonic() - start
    others = max(0.0, busy_seconds() - busy) / (took * (os.cpu_count() or 1))
    print("", *notes, f"{took:.0f} s; others kept the CPUs {others:.0%} busy meanwhile", sep="\n")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine_line(), "rows": report}, indent=1) + "\n")
    return 0


def cells(row: Row, pairs: Pairs | None) -> tuple[str, ...]:
    """The row's line of the table."""
    goal = row.goal.words(row.unit) if row.goal else ""
    if pairs is None:
        return (row.name, "-", f"{row.peer}: -", "-", "-", goal, "not measured")
    verdict = ""
    if row.goal:
        verdict = "met" if row.goal.met(pairs) else "missed"
        if row.goal.of == "difference":
            differences = [ours - peer for ours, peer in zip(pairs.ours, pairs.peer, strict=True)]
            verdict += f": +{spread(differences, row.unit)}"
        elif row.goal.of.startswith(("least", "p99")):
            plus = "+" if row.goal.of.endswith("difference") else ""
            verdict += f": {plus}{short(row.goal.reached(pairs))} {row.unit}"
    return (
        row.name,
        spread(pairs.ours, row.unit),
        f"{row.peer}: {spread(pairs.peer, row.unit)}",
        f"{pairs.ratio():.3f}",
        f"{pairs.noise():.1%}",
        goal,
        verdict,
    )


def spread(samples: list[float], unit: str) -> str:
    """The median and, in brackets, the least and the greatest sample."""
    return f"{short(median(samples))} {unit} ({short(min(samples))}..{short(max(samples))})"


def short(value: float) -> str:
    """Three digits or more."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def as_json(row: Row, pairs: Pairs | None, note: str) -> dict[str, Any]:
    """The row for --json."""
    result: dict[str, Any] = {"name": row.name, "title": row.title, "peer": row.peer, "unit": row.unit, "note": note}
    if row.goal:
        result["goal"] = row.goal._asdict()
    if pairs is None:
        return result
    if row.goal:
        result |= {"reached": row.goal.reached(pairs), "met": row.goal.met(pairs)}
    return result | {"ratio": pairs.ratio(), "noise": pairs.noise(), "pyhv": pairs.ours, "peer_samples": pairs.peer}


def busy_seconds() -> float:
    """The seconds that this machine's processors have spent on anybody but this process and what it has started (as far
    as that has ended)."""
    try:
        with open("/proc/stat", encoding="ascii") as stat:
            user, nice, system, _, _, irq, softirq, steal = map(int, stat.readline().split()[1:9])
    except OSError:
        return 0.0
    mine = os.times()
    own = mine.user + mine.system + mine.children_user + mine.children_system
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own


def machine_line() -> str:
    """What the figures were taken on."""
    model = "unknown processor"
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            model = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), model)
    except OSError:
        pass
    return (
        f"{model}, {os.cpu_count()} CPUs, Linux {platform.release()}, Python {platform.python_version()}, "
        f"load average {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    sys.exit(main())
