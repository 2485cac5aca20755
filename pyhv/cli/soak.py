"""`pyhv soak`: hands one guest round a ring of processes, as often as you like."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from typing import Any

from pyhv import soak
from pyhv.accel.choose import ACCELERATORS
from pyhv.cli import failure as failing
from pyhv.cli import options, output
from pyhv.cli.options import Command, Option
from pyhv.errors import BadInput, HostError
from pyhv.soak import FAULTS, Hop, Plan, Ring, quantile

COMMAND = Command(
    "soak",
    "Migrate one guest round a ring of processes, and check on every hop that nothing is lost.",
    (
        Option("--count", "hops (default: 1000)", "N", 1000, options.number),
        Option("--nodes", "processes in the ring (default: 4)", "K", 4, options.number),
        Option("--pages", "pages that the guest writes in a round (default: 1024, 4 MiB)", "N", 1024, options.number),
        Option(
            "--state",
            "keep what was done in FILE, and the guest in FILE.pyhv, every 10,000 hops and at the end, and go on from "
            "there: what was done since then is done anew",
            "FILE",
        ),
        Option("--no-compat", "show the guest this host's processor; the default is compatibility mode"),
        Option("--accel", "what runs it (see pyhv run --help)", default="auto", choices=ACCELERATORS),
        Option("--plant", "break something in the middle, to see that it is noticed", default=None, choices=FAULTS),
        Option("--json", "print one JSON object at the end"),
    ),
    """
The guest is ticker, which checks on its own that every page has its stamp of the last round, that CPUID says what it
said and that the TSC does not go back; it completes at least one round over all its pages on every node. The ring
checks that its rounds come out one after the other, so that exactly one copy runs, that each hop had a round of
pre-copy with dirty pages, and that no process, memory or descriptor leaks. The first thing that is wrong ends it with
status 1.

example:
  pyhv soak --count 1000
""",
)


# With --state the ring is taken down after so many hops, the guest saved, and all that was done is on record.
_LEG = 10_000


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    given = COMMAND.parse(arguments)
    failing.end_in_order()
    state = _State(given.state)
    snapshot = f"{given.state}.pyhv" if given.state else ""
    if given.count < 1:
        raise BadInput(f"--count {given.count}", "are no hops", "take one at least")
    if given.count <= state.hops:
        raise BadInput(given.state, f"has {state.hops} hops, which is all of them", "remove it to begin anew")
    plan = Plan(0, given.nodes, given.pages, not given.no_compat, save=snapshot, accel=given.accel)
    plan = plan._replace(fault=given.plant or "")
    failure = ""
    with _Progress(state.hops, given.count, given.json) as progress:
        while state.hops < given.count and not failure:
            left = given.count - state.hops
            start = snapshot if state.hops and os.path.exists(snapshot) else ""
            failure = _run(plan._replace(hops=min(left, _LEG) if snapshot else left, start=start), state, progress)
            if not failure:
                state.save()
    _report(state, failure, given.json)
    return 1 if failure else 0


def _run(plan: Plan, state: _State, progress: _Progress) -> str:
    """One ring from its start to its end; what failed, or "". Adds its hops to the state."""
    begin, done = time.monotonic(), state.hops
    directory = soak.directory_for_sockets()
    try:
        with Ring(plan, directory) as ring:
            for hop in ring.hops():
                state.add(hop)
                progress(state.hops)
            ring.finish()
    except soak.Failure as failure:
        return str(failure)
    finally:
        state.seconds += time.monotonic() - begin
        shutil.rmtree(directory, ignore_errors=True)
    assert state.hops == done + plan.hops
    return ""


def _report(state: _State, failure: str, as_json: bool) -> None:
    downtimes = sorted(state.downtimes)
    facts: dict[str, Any] = {"hops": state.hops, "failures": 1 if failure else 0, "failure": failure}
    facts["seconds"] = round(state.seconds, 3)
    if downtimes:
        for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
            facts[f"downtime_{name}_ms"] = round(quantile(downtimes, share) / 1000, 3)
    if as_json:
        output.print_json(facts)
        return
    rate = f" ({state.hops / state.seconds:.1f} a second)" if state.seconds else ""
    print(f"{state.hops} hops in {state.seconds:.1f} s{rate}, {facts['failures']} failures")
    if downtimes:
        times = ", ".join(f"{name} {facts[f'downtime_{name}_ms']:.2f} ms" for name in ("p50", "p99", "max"))
        print(f"downtime {times}")
    if failure:
        print(f"failed: {failure}")


class _State:
    """The hops that were done; in a file, if there is one. Downtimes in microseconds."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self.hops = 0
        self.seconds = 0.0
        self.downtimes: list[float] = []
        if path is None:
            return
        folder = os.path.dirname(options.absolute(path))
        if not os.access(folder, os.W_OK):  # to be known now, not after the first leg
            raise BadInput(path, f"cannot be written: {folder} is no folder, or not writable", "name another file")
        if not os.path.exists(path):
            return
        try:
            with open(path, encoding="ascii") as file:
                value = json.load(file)
            self.hops, self.seconds = int(value["hops"]), float(value["seconds"])
            self.downtimes = [float(number) for number in value["downtimes_us"]]
            if self.hops != len(self.downtimes):
                raise ValueError(f"{self.hops} hops with {len(self.downtimes)} downtimes")
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise BadInput(path, f"is no state of pyhv soak: {error}", "name another file, or remove it") from None

    def add(self, hop: Hop) -> None:
        """Counts a hop."""
        self.hops += 1
        self.downtimes.append(round(hop.downtime * 1e6))

    def save(self) -> None:
        """All or nothing."""
        if self._path is None:
            return
        text = json.dumps({"hops": self.hops, "seconds": self.seconds, "downtimes_us": self.downtimes})
        new = f"{self._path}.new"
        try:
            with open(new, "w", encoding="ascii") as file:
                file.write(text)
            os.replace(new, self._path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(new)
            detail = "the hops since the last time are not in it"
            raise HostError(f"write {self._path}", error.errno or 0, detail) from None


class _Progress(output.StatusLine):
    """Shows the hops. first: how many there were at the beginning, of `total`."""

    def __init__(self, first: int, total: int, as_json: bool) -> None:
        super().__init__("soak", as_json, 0.2, 10)
        self._first = first
        self._total = total

    def __call__(self, hops: int) -> None:
        if not self.is_due():
            return
        rate = (hops - self._first) / (time.monotonic() - self.begin)
        left = (self._total - hops) / rate
        done = f"{output.bar(hops, self._total)} {hops} of {self._total} hops"
        self.show(
            f"{done}  {rate:.1f} a second  {left:.0f} s left",
            {"hops": hops, "total": self._total, "rate": round(rate, 1)},
        )
