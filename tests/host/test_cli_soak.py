"""`pyhv soak`: a ring that runs, faults that are noticed, and a state to go on from."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyhv import soak
from pyhv.errors import BadInput
from pyhv.migration import transport

from . import emulator
from .cli import COMMAND, IN_THE_LAB, NOT_IN_THE_LAB, TIMEOUT, call, call_json, environment
from .named import processes_with

SMALL = ("--pages", "16" if IN_THE_LAB else "64")


@pytest.fixture(autouse=True)
def sockets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where rings have theirs; in the end nothing must be left there."""
    with tempfile.TemporaryDirectory() as place:
        monkeypatch.setenv("TMPDIR", place)
        yield Path(place)
        assert os.listdir(place) == []


@NOT_IN_THE_LAB
@pytest.mark.parametrize("nodes", [2, 4])
def test_sixty_hops(nodes: int) -> None:
    done = call_json("soak", "--count", "60", "--nodes", str(nodes))
    assert (done["exit"], done["hops"], done["failures"], done["failure"]) == (0, 60, 0, "")
    assert 0 < done["downtime_p50_ms"] <= done["downtime_p99_ms"] <= done["downtime_max_ms"]


@NOT_IN_THE_LAB
def test_what_it_prints() -> None:
    done = call("soak", "--count", "4", "--nodes", "2", "--no-compat", *SMALL)
    assert done.returncode == 0
    form = r"4 hops in [\d.]+ s \([\d.]+ a second\), 0 failures\ndowntime p50 [\d.]+ ms, p99 [\d.]+ ms, max [\d.]+ ms\n"
    assert re.fullmatch(form, done.stdout)


NOTICED = {
    "stale-page": r"the guest: ticker: page 0x0000000000200000 holds \d+, expected \d+",
    "dropped-page": r"the guest: ticker: page 0x0000000000200000 holds 0, expected \d+",
    "cpuid-bit": r"ticker: CPUID leaf 0x00000001 subleaf 0x00 ECX was|is not of the processors that message hello",
    "tsc-back": r"the guest: ticker: the TSC went back from",
    "second-copy": r"more than one copy, or none, ran|the guest: ",  # who write into each other's lines
}


def test_every_fault_has_a_test() -> None:
    assert set(NOTICED) == set(soak.FAULTS)


@pytest.mark.parametrize("fault", soak.FAULTS)
def test_a_planted_fault_is_noticed(fault: str, request: pytest.FixtureRequest) -> None:
    accel = "auto"
    if fault == "tsc-back":
        if not request.getfixturevalue("verdict").faithful:  # such a KVM may show guests the host's TSC as it is
            emulator.require()
            accel = "emulator"
    elif IN_THE_LAB:
        pytest.skip("runs outside the lab")
    done = call_json("soak", "--count", "8", "--nodes", "2", *SMALL, "--plant", fault, "--accel", accel)
    assert (done["exit"], done["failures"]) == (1, 1), done
    assert re.search(NOTICED[fault], done["failure"]), done["failure"]


def test_both_sides_of_a_hop_that_failed_are_heard() -> None:
    """Which of them speaks first is a matter of chance, and which of them knows what was wrong."""
    ring = soak.Ring(soak.Plan(1), "")
    reader, writer = os.pipe()
    ring._events, ring._buffers = {reader: 1}, {reader: b""}
    os.write(writer, b'{"event": "failed", "node": 1, "error": "it took too long"}\nend\n')
    os.close(writer)
    with contextlib.closing(ring), pytest.raises(soak.Failure) as failure:
        ring._take({"event": "failed", "node": 0, "error": "the link is broken"}, 6)
    assert str(failure.value) == "hop 7, node 0: the link is broken; node 1: it took too long"


@NOT_IN_THE_LAB
def test_it_goes_on_where_it_was_killed(tmp_path: Path, sockets: Path) -> None:
    state = str(tmp_path / "s.json")
    first = call_json("soak", "--count", "6", "--nodes", "2", *SMALL, "--state", state)
    assert (first["exit"], first["hops"]) == (0, 6)
    assert sorted(os.listdir(tmp_path)) == ["s.json", "s.json.pyhv"]

    driver = subprocess.Popen(
        [*COMMAND, "soak", "--count", "100000", "--nodes", "2", *SMALL, "--state", state], stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment() | {"PYHV_SOAK_TEST": str(tmp_path)},
    )  # fmt: skip
    deadline = time.monotonic() + TIMEOUT
    while len(nodes := processes_with(f"PYHV_SOAK_TEST={tmp_path}")) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    while nodes := processes_with(f"PYHV_SOAK_TEST={tmp_path}"):  # they end: nobody hears of their hops
        assert time.monotonic() < deadline, nodes
        time.sleep(0.02)
    (left,) = sockets.glob("pyhv-soak-*")  # of the one that was killed
    shutil.rmtree(left)

    again = call_json("soak", "--count", "10", "--nodes", "2", *SMALL, "--state", state)
    assert (again["exit"], again["hops"]) == (0, 10), again  # the leg that was killed is done anew
    assert len(json.loads(Path(state).read_text())["downtimes_us"]) == 10
    done = call("soak", "--count", "10", "--state", state)
    assert (done.returncode, done.stderr) == (
        2, f"pyhv: {state}: has 10 hops, which is all of them; remove it to begin anew\n",
    )  # fmt: skip


GOOD_HOP = soak.Hop(1, 0, 0.02, 0.001, 1, 1)
CENSUS = {"node": 0, "descriptors": 12, "threads": 3, "memory": 30 << 20}
BAD_ENDS: list[tuple[Callable[[soak.Ring], None], str]] = [
    (lambda ring: ring._check(GOOD_HOP._replace(guest_rounds=0)), "the guest completed no round on node 0"),
    (lambda ring: ring._check(GOOD_HOP._replace(dirty_rounds=0)), "no round of pre-copy had dirty pages"),
    (lambda ring: ring._compare(CENSUS | {"descriptors": 13}), "had 12 descriptors and has 13: they leak"),
    (lambda ring: ring._compare(CENSUS | {"threads": 4}), "had 3 threads and has 4: they leak"),
    (lambda ring: ring._compare(CENSUS | {"memory": 39 << 20}), "of memory and has 39936: it leaks"),
]


@pytest.mark.parametrize(("look", "words"), BAD_ENDS, ids=[words for _, words in BAD_ENDS])
def test_what_a_hop_must_have_and_a_node_may_not(look: Callable[[soak.Ring], None], words: str) -> None:
    ring = soak.Ring.__new__(soak.Ring)
    ring._console, writer = os.pipe()
    ring._console_in = -1
    ring._children, ring._events, ring._census = [], {}, {}
    os.close(writer)
    with contextlib.closing(ring):
        ring._check(GOOD_HOP)
        ring._compare(CENSUS)
        ring._compare(CENSUS)
        with pytest.raises(soak.Failure, match=words):
            look(ring)


BAD_PLANS = [
    ({"nodes": 1}, "1 nodes: are no ring; take 2 to 64"), ({"nodes": 65}, "65 nodes: are no ring"),
    ({"hops": 0}, "0 hops: are none; take 1 to 1000000000000"), ({"pages": 0}, "0 pages: are none"),
    ({"hops": 10**20}, "100000000000000000000 hops: are too many"),
    ({"pages": 10**13}, "10000000000000 pages: are too m"),
]  # fmt: skip


@pytest.mark.parametrize(("plan", "words"), BAD_PLANS, ids=str)
def test_bad_plans(plan: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=words):
        soak.Ring(soak.Plan(**{"hops": 1, **plan}), str(tmp_path))


@NOT_IN_THE_LAB
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--count", "-1"), "--count -1: are no hops"),
        (("--pages", "999999999999"), "is too much; the most is 16T"),  # as node 0 finds
        (("--nodes", "1"), "1 nodes: are no ring"),
        (("--plant", "nothing"), "--plant"),
        (("--state", "/no/such/folder/s"), "/no/such/folder/s"),
    ],
    ids=str,
)
def test_bad_usage(words: tuple[str, ...], said: str) -> None:
    done = call("soak", "--count", "2", *SMALL, *words)
    assert (done.returncode, done.stdout) == (2, "") and said in done.stderr, done


NO_STATES = [
    "", "{", "[]", '{"hops": 1}', '{"hops": "x", "seconds": 1, "downtimes_us": []}', "\xff", "[" * 100000,
    '{"hops": 1e999, "seconds": 1, "downtimes_us": []}', '{"hops": -1, "seconds": 1, "downtimes_us": []}',
]  # fmt: skip


def test_a_node_keeps_no_list_of_its_hops(tmp_path: Path) -> None:
    """With a count for which nobody waits each node took all memory that there was, before its first hop."""
    listeners = [transport.Listener(transport.parse(f"unix:{tmp_path}/{index}")) for index in range(3)]
    try:
        nodes = [soak._Node(soak.Plan(10_000_000, 3, 1), index, listeners, -1, -1) for index in range(3)]
    finally:
        for listener in listeners:
            listener.forget()
    assert [list(node._hops[:3]) for node in nodes] == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    assert [len(node._hops) for node in nodes] == [3_333_334, 3_333_333, 3_333_333]
    assert all(sys.getsizeof(node._hops) < 1000 for node in nodes)


@pytest.mark.parametrize("text", NO_STATES, ids=range(len(NO_STATES)))
@NOT_IN_THE_LAB
def test_a_state_that_is_none(tmp_path: Path, text: str) -> None:
    state = tmp_path / "s"
    state.write_text(text, encoding="latin-1")
    done = call("soak", "--count", "2", "--state", str(state))
    assert done.returncode == 2 and "is no state of pyhv soak" in done.stderr, done


def test_a_guest_that_was_saved_in_the_middle_of_a_line() -> None:
    ring = soak.Ring.__new__(soak.Ring)
    for line, good in (("43", True), (" 43", True), ("ound 43", True), ("", True), ("ticker: page 0 holds 1", False)):
        ring._may_be_cut, ring._expected, ring.lines = True, None, 0
        if good:
            ring._take_line(line)
            ring._take_line("ticker: round 44")
            assert ring.lines == 1
        else:
            with pytest.raises(soak.Failure):
                ring._take_line(line)
        with pytest.raises(soak.Failure, match="the guest:"):
            ring._take_line("ound 45")  # only the first one


@NOT_IN_THE_LAB
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_leaves_nothing(number: int, sockets: Path) -> None:
    driver = subprocess.Popen(
        [*COMMAND, "soak", "--count", "100000", "--nodes", "2", *SMALL], stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(),
    )  # fmt: skip
    deadline = time.monotonic() + TIMEOUT
    while not any(sockets.glob("pyhv-soak-*/1")):
        assert time.monotonic() < deadline and driver.poll() is None
        time.sleep(0.01)
    driver.send_signal(number)
    assert driver.wait(TIMEOUT) == 128 + number
    assert processes_with(f"TMPDIR={sockets}") == []
