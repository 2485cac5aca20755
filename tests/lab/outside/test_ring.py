"""One guest handed live from host to host, up and down the generations: what it sees never changes, nothing is lost.

AMD hosts do it over their network, Intel hosts over a serial cable. A ticker (guest_images/ticker.c) in compatibility
mode goes through all hosts of a vendor; without it, it is refused where the target is older; between vendors always.
`played` does it all once (../inside/ring.py in each host); each test looks at a part of it. The hops are in a table at
the end of the lab's report.
"""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.lab.host import Command, Host
from tests.lab.lab import Lab
from tests.lab.node import Node, files

from .test_generations import SHOWN, TWO_OF_A_VENDOR, hosts, rounds, vendor

#: By how much (seconds) a clock may be off after a hop: it is looked at in no time only where nobody else wants the
#: processor. On Intel hosts (Bochs), that look takes long in their own time.
CLOCK_TOLERANCE = {"amd": 0.02, "intel": 1.0}
#: A target's clock is set so much ahead (seconds) of its source's when a hop begins, for the order is on its way for a
#: while: a target that is behind counts no time that the guest stood, as it cannot know of any.
AHEAD = 0.05

#: How many pages the guest writes in every round. A page takes 0.4 s over the cable.
PAGES = {"amd": 512, "intel": 16}
LIMITS = {
    "amd": {"downtime": 2.0, "least_rounds": 2, "silence": 10.0, "heartbeat": 1.0},
    "intel": {"downtime": 60.0, "silence": 300.0, "heartbeat": 20.0, "compress": True},
}
TTY = "tty:/dev/ttyS1"
PORT = 7100


def of(one: str) -> list[str]:
    """The hosts of a vendor, the oldest first."""
    return [name for name in hosts() if vendor(name) == one]


def way(one: str) -> list[str]:
    """The hosts that the guest comes to, one after the other: up and down, and from the newest to the oldest at once
    and back where there are more than two; where there are two, as often as time allows."""
    names = of(one)
    around = names + names[-2::-1]
    if len(names) > 2:
        return [*around, names[-1], names[0]]
    return around + around[1:] * (2 if one == "amd" else 0)


def older(one: str) -> list[tuple[str, str]]:
    """Pairs of hosts where the second lacks something of the first: neighbours, and the newest and the oldest."""
    names = of(one)
    pairs = [*zip(names[:0:-1], names[-2::-1], strict=True), (names[-1], names[0])]
    return [pair for pair in dict.fromkeys(pairs) if SHOWN[pair[0]] - SHOWN[pair[1]]]


class Hop(NamedTuple):
    """One attempt to migrate."""

    source: str
    target: str
    over: str
    """The transport's scheme."""
    sent: dict[str, Any]
    """The source's words, of ring.py's migrate()."""
    came: dict[str, Any]
    """The target's, of receive()."""


class Ride(NamedTuple):
    """A guest's way. stays[i] is what Node.end() told of it on the host where it was before hop i."""

    hops: list[Hop]
    stays: list[dict[str, Any]]


class Played(NamedTuple):
    """What came of it all, by vendor; refused also by the guest's vendor."""

    rides: dict[str, Ride]
    refused: dict[tuple[str, str, str], Hop]
    """Source, target, profile -> what was tried."""


class _Player:
    def __init__(self, lab: Lab, folder: Path) -> None:
        self._lab = lab
        self._files = files()
        self._authority = Authority(folder)
        self.nodes: dict[str, Node] = {}
        self._numbers = iter(range(1, 1000))

    def start(self, one: str) -> None:
        """Starts all hosts of a vendor."""
        started = self._lab.start(*of(one), connected=True)
        with ThreadPoolExecutor(len(started)) as pool:
            everything = [{**self._files, **self._authority.issue(host)} for host in started]
            nodes = list(pool.map(Node, started, range(len(started)), everything))
        self.nodes.update({node.host.kind.name: node for node in nodes})

    def ride(self, one: str) -> Ride:
        """Lets a guest go all the way."""
        names = way(one)
        self.nodes[names[0]].ask("start", profile="hyperv-r2", pages=PAGES[one])
        hops, stays = [], []
        for number, (source, target) in enumerate(itertools.pairwise(names)):
            scheme = "tty" if one == "intel" else "tls" if number % 2 else "tcp"
            hops.append(self.hop(source, target, scheme))
            stays.append(self.nodes[source].ask("end"))
        stays.append(self.nodes[names[-1]].ask("end"))
        return Ride(hops, stays)

    def refuse(self, source: str, target: str, profile: str) -> Hop:
        """Tries to migrate a guest to where it cannot run, and sees whether it goes on."""
        one = vendor(source)
        self.nodes[source].ask("start", profile=profile, pages=16)
        scheme = "relay" if vendor(target) != one else "tty" if one == "intel" else "tcp"
        hop = self.hop(source, target, scheme)
        assert not self.nodes[source].ask("end")["ended"], "the guest did not go on at the source"
        return hop

    def hop(self, source: str, target: str, scheme: str) -> Hop:
        from_node, to_node = self.nodes[source], self.nodes[target]
        with contextlib.ExitStack() as stack:
            if scheme == "tty":
                self._lab.link.join(from_node.number, to_node.number)
                here = there = TTY
            elif scheme == "relay":
                name = f"/tmp/relay{next(self._numbers)}"
                stack.enter_context(relayed(from_node.host, to_node.host, name))
                here = there = f"relay:{name}"
            else:
                here = f"{scheme}://0.0.0.0:{PORT}"
                there = f"{scheme}://{to_node.host.address}:{PORT}"
            to_node.ask("listen", uri=here)
            # Not before that, which takes an Intel host seconds: their clocks go as quickly as they are emulated.
            ahead = int(AHEAD * 1e9)
            from_node.ask("set_clock", clock=time.time_ns())
            to_node.ask("set_clock", clock=time.time_ns() + ahead)
            to_node.order("receive", lines=2)
            sent = from_node.ask("migrate", uri=there, limits=LIMITS[vendor(source)])
            return Hop(source, target, scheme, sent, to_node.answer())


@contextlib.contextmanager
def relayed(one: Host, other: Host, name: str) -> Iterator[None]:
    """Two hosts without a link between them, connected by FIFOs in both and the lab, which carries the bytes."""
    script = f"mkfifo {name}.in {name}.out; echo ready; cat {name}.out & exec cat > {name}.in"
    ends = [host.start(["sh", "-c", script], stdin=True) for host in (one, other)]
    for end in ends:
        end.wait_for(b"ready\n")
    over = threading.Event()

    def carry(source: Command, target: Command) -> None:
        passed = len(b"ready\n")
        while not over.wait(0.02):
            if data := bytes(source.stdout[passed:]):
                target.send(data)
                passed += len(data)

    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(carry, *ends), pool.submit(carry, *ends[::-1])]
        try:
            yield
        finally:
            over.set()
            for end in ends:
                end.kill()
    for carried in done:
        carried.result()


class Authority:
    """Who says which host is which, for tls://."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._openssl("req", "-x509", "-subj", "/CN=the lab", "-keyout", "authority.key", "-out", "authority.pem")

    def _openssl(self, *words: str) -> None:
        # Valid from long ago: a host's clock is what the test sets.
        kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "3650"]
        command = ["openssl", words[0], *kind, *words[1:]]
        done = subprocess.run(command, cwd=self._folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr

    def issue(self, host: Host) -> dict[str, Path | bytes]:
        """The files of a host, for Host.put()."""
        if host.kind.vendor != "amd":
            return {}
        name = host.name
        self._openssl("req", "-x509", "-subj", f"/CN={name}", "-addext", f"subjectAltName=IP:{host.address}",
                      "-addext", "basicConstraints=critical,CA:false",
                      "-CA", "authority.pem", "-CAkey", "authority.key",
                      "-keyout", f"{name}.key", "-out", f"{name}.pem")  # fmt: skip
        files = {"certificate": f"{name}.pem", "key": f"{name}.key", "authority": "authority.pem"}
        return {f"{what}.pem": self._folder / file for what, file in files.items()}


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Played:
    """What came of it all; the hosts are gone by then."""
    if not TWO_OF_A_VENDOR:
        pytest.skip("needs two generations of a vendor (--kinds)")
    rides, refused = {}, {}
    with Lab() as lab:
        player = _Player(lab, tmp_path_factory.mktemp("ring"))

        def play(one: str) -> None:
            player.start(one)
            rides[one] = player.ride(one)
            for source, target in older(one):
                refused[source, target, "host"] = player.refuse(source, target, "host")

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(play, TWO_OF_A_VENDOR))
        for source, target, profile in foreign():
            refused[source, target, profile] = player.refuse(source, target, profile)
    return Played(rides, refused)


def foreign() -> list[tuple[str, str, str]]:
    """What is tried between vendors: their oldest, and what could more easily go wrong, their newest."""
    if len(TWO_OF_A_VENDOR) < 2:
        return []
    amd, intel = of("amd"), of("intel")
    return [
        (amd[0], intel[-1], "hyperv-r2"), (amd[0], intel[-1], "host"),
        (intel[0], amd[-1], "hyperv-r2"), (intel[0], amd[-1], "host"),
    ]  # fmt: skip


# -- judging it --------------------------------------------------------------------------------------------------


def faults(ride: Ride) -> list[str]:
    """What a guest lost on its way, as far as it or anybody else noticed."""
    wrong = []
    console = "".join(stay["console"] for stay in ride.stays)
    *lines, _ = console.split("\n")
    numbers = rounds(console)
    if numbers != list(range(1, len(lines))):  # the first line is another
        at = next((i for i, number in enumerate(numbers, 1) if number != i), len(numbers))
        said = [line for line in lines[1:] if not line.startswith("ticker: round ")]
        wrong.append(f"it counted {numbers[max(at - 3, 0) : at + 2]} and said {said}")
    for number, stay in enumerate(ride.stays):
        host = ride.hops[number].source if number < len(ride.hops) else ride.hops[-1].target
        where = f"before hop {number + 1}, on {host}"
        if len(rounds(stay["console"])) < 1:
            wrong.append(f"{where}: it completed no round")
        if stay["ended"]:
            wrong.append(f"{where}: it ended")
        if stay["tables"] != ride.stays[0]["tables"]:
            wrong.append(f"{where}: its CPUID table is another one")
        if (stay["profile"], stay["intercept"]) != ("hyperv-r2", "kernel"):
            wrong.append(f"{where}: its profile is {stay['profile']}, answered by {stay['intercept']}")
    for number, (hop, before, after) in enumerate(zip(ride.hops, ride.stays, ride.stays[1:], strict=False), 1):
        where = f"hop {number}, {hop.source} to {hop.target}"
        if hop.sent["refused"] or hop.came["refused"]:
            wrong.append(f"{where}: it was refused: {hop.sent['refused']}")
            continue
        wrong += [f"{where}: {what}" for what in clock_faults(hop, before, after)]
        # To the guest, its TSC's rate is what it was at the beginning.
        if bool(hop.came["notes"]) != (abs(after["tsc_khz"] / ride.stays[0]["tsc_khz"] - 1) > 250e-6):
            wrong.append(f"{where}: of the TSC's rate it was said: {hop.came['notes']}")
    return wrong


def drift(hop: Hop, before: dict[str, Any]) -> float:
    """By how many seconds more the guest's clock has gone on than the hosts' clocks have, from a look at the source,
    where it counts on, to one at the target. before: the guest's stay at the source."""
    left, arrived = before["look"], hop.came["look"]
    return float(arrived["time"] - left["time"] - (arrived["real"] - left["real"])) / 1e9


def is_exact(hop: Hop) -> bool:
    """Whether the two hosts' clocks agree as long as a hop takes."""
    return vendor(hop.source) == "amd" and not any(name.endswith("-tsc") for name in hop[:2])


def clock_faults(hop: Hop, before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is wrong with the guest's clocks after a hop, and with their rates on the target. before, after: its stays
    at the source and the target."""
    wrong = []
    tolerance = CLOCK_TOLERANCE[vendor(hop.source)]
    # Where the hosts' clocks do not agree, the guest is not told that it stood for longer than the hop took.
    allowed = tolerance + (0 if is_exact(hop) else hop.sent["summary"]["total_time"])
    if abs(drift(hop, before)) > allowed:
        wrong.append(f"its clock went {drift(hop, before):+.4f} s further than the hosts' clocks")
    came, left = hop.came["look"], after["look"]
    passed = (left["monotonic"] - came["monotonic"]) / 1e9
    for what, counted in (
        ("clock", (left["time"] - came["time"]) / 1e9),
        ("TSC", (left["tsc"] - came["tsc"]) / (after["tsc_khz"] * 1e3)),
    ):
        if abs(counted - passed) > tolerance + passed * 0.01:
            wrong.append(f"its {what} counted {counted:.3f} s in the {passed:.3f} s that passed there")
    if came["tsc"] < before["look"]["tsc"] - (allowed + hop.sent["summary"]["downtime"]) * before["tsc_khz"] * 1e3:
        wrong.append(f"its TSC went from {before['look']['tsc']} to {came['tsc']}")
    return wrong


# -- the tests ---------------------------------------------------------------------------------------------------

vendors = pytest.mark.parametrize("one", TWO_OF_A_VENDOR)


@vendors
def test_a_guest_goes_round(played: Played, one: str, record_property: Callable[[str, object], None]) -> None:
    ride = played.rides[one]
    for hop, before in zip(ride.hops, ride.stays, strict=False):
        facts = hop.sent.get("summary", {})
        figures = [facts.get(name, 0) for name in ("total_time", "downtime", "rounds", "bytes")]
        figures.append(drift(hop, before) if is_exact(hop) and facts else "-")
        record_property("hop", " ".join(map(str, [*hop[:3], *figures])))
    assert faults(ride) == []
    assert {hop.target for hop in ride.hops} == set(of(one))


@vendors
def test_without_compatibility_mode_it_is_refused_where_the_target_is_older(played: Played, one: str) -> None:
    pairs = older(one)
    assert pairs
    for source, target in pairs:
        hop = played.refused[source, target, "host"]
        lacking = SHOWN[source] - SHOWN[target]
        assert lacking <= set(hop.came["named"]), (source, target)
        assert hop.sent["refused"] == hop.came["refused"]
        assert all(f"does not offer {name} (" in hop.sent["message"] for name in lacking), hop.sent


@pytest.mark.parametrize("source, target, profile", foreign())
def test_between_vendors_never(played: Played, source: str, target: str, profile: str) -> None:
    hop = played.refused[source, target, profile]
    vendors = f"the guest's processor is of vendor {vendor(source)}, the host's of vendor {vendor(target)}"
    assert vendors in hop.sent["refused"] and hop.sent["refused"] == hop.came["refused"]


@vendors
def test_faults_are_noticed(played: Played, one: str) -> None:
    """What a migration could do wrong is found by faults()."""
    ride = played.rides[one]
    hop, (first, *_, stay) = ride.hops[-1], ride.stays
    line = stay["console"].splitlines(keepends=True)[1]
    look, came = stay["look"], hop.came["look"]
    hour = 3600 * 10**9
    for place, name, value, sign in (
        (stay, "console", stay["console"].replace(line, "", 1), "it counted"),
        (stay, "console", stay["console"].replace(line, line + line, 1), "it counted"),
        (stay, "console", stay["console"] + "\nticker: page 0x1000 holds 1\n", "ticker: page"),
        (look, "tsc", look["tsc"] + 3600 * 1000 * stay["tsc_khz"], "its TSC counted"),
        (look, "time", look["time"] + hour, "its clock counted"),
        (came, "time", came["time"] + hour, "its clock went +"),
        (came, "time", came["time"] - hour, "its clock went -"),
        (came, "tsc", came["tsc"] - 3600 * 1000 * stay["tsc_khz"], "its TSC went from"),
        (first, "tables", 0, "its CPUID table"),
        (first, "console", "", "it completed no round"),
    ):
        was = place[name]
        place[name] = value
        found = faults(ride)
        place[name] = was
        assert any(sign in text for text in found), (sign, found)
