"""A Linux guest in compatibility mode, at work on all its vCPUs, moved up and down the generations: AMD's live and by
snapshots, with four vCPUs; Intel's by snapshots, with one. It must notice nothing but, after a snapshot, that the time
of day has gone on.

What the guest does and notices is in ../guest/ride.c, what a host does for it in ../inside/linux_ride.py. `played` does
it all once; each test looks at a part of it. The live hops are in the table at the end of the lab's report.

Not among the hosts is the one whose TSC has another rate: its seconds are longer, so no clock that came from elsewhere
can be right there. test_ring.py has a guest that can tell what it should be.
"""

from __future__ import annotations

import copy
import itertools
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pyhv.cpu import profiles
from pyhv.cpu.features import BY_NAME
from tests.lab import linux
from tests.lab.bochs import BochsHost
from tests.lab.lab import Lab
from tests.lab.node import Node, files

from .conftest import of_vendor
from .test_generations import SHOWN, hosts
from .test_ring import AHEAD

#: By vendor. Four on Bochs would hang the host: it is deaf while a vCPU spins with interrupts off (../README.md).
CPUS = {"amd": 4, "intel": 1}
MEMORY = "128M"
APPEND = "console=ttyS0 quiet panic=-1 do=ride"
FOLDER = "/tmp/linux"
PORT = 7300
#: Booting takes minutes on an Intel host, and everything when the machine is busy; times patience().
LIMIT = 600.0

#: By how much (seconds) the time of day may be off, and what counts time. The RTC has whole seconds.
WALL_TOLERANCE, PASSED_TOLERANCE, RTC_TOLERANCE = 1.0, 0.5, 1.5
#: By how much a timer may fire too late. Four vCPUs share one processor, and that with the rest of the machine.
LATE = 10.0

#: Linux' words for what a guest in compatibility mode must not see: the published list, and what came with it or later.
HIDDEN = set(
    "ssse3 sse4_1 sse4_2 sse4a popcnt abm misalignsse xop fma4 f16c 3dnow 3dnowext avx xsave aes pclmulqdq movbe "
    "rdrand fma avx2 bmi1 bmi2 erms smep smap fsgsbase rdtscp pdpe1gb pcid xsaveopt clwb pku umip "
    "nonstop_tsc tsc_deadline_timer ibpb ibrs stibp ssbd".split()
).union(*SHOWN.values())
#: Of pyhv's table, what a topology of several processors brings, and what Linux makes of the long mode.
OWN = {"ht", "cmp_legacy", "3dnowprefetch"}
#: What Linux makes of an Intel processor's model besides (the invariant TSC's own word there is nonstop_tsc).
OWN_INTEL = OWN | {"constant_tsc"}
#: In the names of variants that the C library has for processors beyond the baseline.
BEYOND = re.compile("avx|evex|ssse3|sse3|sse4|fma|erms|movbe|popcnt|bmi|lzcnt")
#: In what a kernel says that has lost its clock or a processor.
WORDS = re.compile("clocksource|soft lockup|stall|oops|bug:|warning|hung|tsc|time jumped|nmi|lost", re.IGNORECASE)

#: What it says where its processors wait for one another's: four of them share one, and that with the rest.
SLOW = "hrtimer: interrupt took"


class Stay(NamedTuple):
    """The guest on one host: what it said, and when."""

    host: str
    answers: list[dict[str, Any]]
    """In order, as linux_ride.py gave them. The first one upon arrival."""
    end: dict[str, Any]


class Ride(NamedTuple):
    stays: list[Stay]
    moves: list[dict[str, Any]]
    """moves[i] led to stays[i + 1]: of a live migration "summary"; of a snapshot "stood", clocks when it was taken."""
    off: dict[str, Any]
    planted: Stay | None = None
    """A last stay to which the guest was migrated with a clock that was set back."""


def way(vendor: str) -> list[str]:
    """The hosts that the guest comes to. AMD: up and down. Intel, where a host takes minutes: from the newest to the
    oldest and back, and only where the full set is wanted."""
    names = [name for name in hosts() if name in of_vendor(vendor) and not name.endswith("-tsc")]
    if vendor == "amd":
        return names + names[-2::-1] if len(names) > 1 else []
    return [names[-1], names[0], names[-1]] if len(names) > 2 else []


#: By vendor and how the guest goes.
RIDES = [one for one in ("amd-live", "amd-saved", "intel-saved") if way(one.partition("-")[0])]
rides = pytest.mark.parametrize("one", RIDES)


# -- playing it all ----------------------------------------------------------------------------------------------


def guest_files(image: str) -> dict[str, Path | bytes]:
    return {name: linux.guest() / name for name in (image, "initrd")}


def boot(node: Node, image: str, word: str) -> dict[str, Any]:
    node.host.put(guest_files(image), FOLDER)
    words = {"profile": "hyperv-r2", "memory": MEMORY, "cpus": CPUS[node.vendor], "append": APPEND}
    return node.ask("start", word=word, image=f"{FOLDER}/{image}", **words)


def ride_live(names: list[str]) -> Ride:
    words = (f"w{number}" for number in itertools.count())
    with Lab() as lab:
        kinds = list(dict.fromkeys(names))
        needed = files()
        nodes = {}
        for number, host in enumerate(lab.start(*kinds, connected=True)):
            nodes[host.kind.name] = Node(host, number, needed, "linux_ride.py", LIMIT)
        stays, moves = [], []
        here = nodes[names[0]]
        answers = [boot(here, "vmlinux", next(words))]

        def move(target: Node, plant: bool) -> tuple[dict[str, Any], dict[str, Any]]:
            for node, ahead in ((here, 0.0), (target, AHEAD)):
                node.ask("set_clock", clock=time.time_ns() + int(ahead * 1e9))
            answers.append(here.ask("stay", word=next(words)))
            target.ask("listen", uri=f"tcp://0.0.0.0:{PORT}")
            target.order("receive", word=next(words), plant=plant)
            limits = {"downtime": 2.0, "silence": 20.0, "heartbeat": 1.0}
            sent = here.ask("migrate", uri=f"tcp://{target.host.address}:{PORT}", limits=limits)
            return sent, target.answer()

        for name in names[1:]:
            sent, came = move(nodes[name], False)
            stays.append(Stay(here.host.kind.name, answers, here.ask("end")))
            moves.append(sent)
            here, answers = nodes[name], [came]
        planted_at = nodes[names[1]]
        _, came = move(planted_at, True)
        stays.append(Stay(here.host.kind.name, answers, here.ask("end")))
        wrong = [came, planted_at.ask("stay", word=next(words))]
        off = planted_at.ask("off")
        return Ride(stays, moves, off, Stay(names[1], wrong, planted_at.ask("end")))


def ride_saved(names: list[str], folder: Path) -> Ride:
    words = (f"w{number}" for number in itertools.count())
    needed, packed = files(), folder / "packed"
    stays: list[Stay] = []
    moves: list[dict[str, Any]] = []
    for number, name in enumerate(names):
        # One host at a time: each uses a processor all the time.
        with Lab() as lab:
            host = lab.start_one(name)
            node = Node(host, 0, needed, "linux_ride.py", LIMIT)
            if number == 0:
                answers = [boot(node, "vmlinux" if host.kind.vendor == "amd" else "vmlinuz", next(words))]
            else:
                host.put({"packed": packed}, "/tmp")
                answers = [node.ask("restore", word=next(words), path="/tmp/packed")]
            answers.append(node.ask("stay", word=next(words)))
            answers.append(node.ask("set", word=next(words)))
            if number + 1 < len(names):
                moves.append(node.ask("save", path="/tmp/packed"))
                (host.take if isinstance(host, BochsHost) else host.get)("/tmp/packed", packed)
            else:
                off = node.ask("off")
            stays.append(Stay(name, answers, node.ask("end")))
    return Ride(stays, moves, off)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Ride]:
    """What came of it all; the hosts are gone by then."""
    if not RIDES:
        pytest.skip("needs two kinds of AMD hosts, or three of Intel's (--kinds)")
    folder = tmp_path_factory.mktemp("linux")
    # One after the other: the guests work, and would take the processors from one another.
    return {
        one: ride_live(way("amd")) if one == "amd-live" else ride_saved(way(one.partition("-")[0]), folder)
        for one in RIDES
    }


# -- judging it --------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """Seconds, and the name of a clock source."""

    monotonic: float
    realtime: float
    rtc: int
    source: str
    cpuinfo: str
    rounds: list[int]
    faults: list[int]
    latest: list[float]
    before: tuple[float, float]
    """The host's clocks, real and monotonic, before it was asked."""
    after: tuple[float, float]


def parsed(answer: dict[str, Any]) -> Answer:
    monotonic, realtime, rtc, source, cpuinfo, *lists = answer["line"].split()[4:]
    rounds, wrong, latest = ([int(number) for number in text.split(",")] for text in lists)
    before, after = (tuple(ns / 1e9 for ns in answer[when]) for when in ("before", "after"))
    return Answer(
        int(monotonic) / 1e9, int(realtime) / 1e9, int(rtc), source, cpuinfo, rounds, wrong,
        [ns / 1e9 for ns in latest], before, after,
    )  # fmt: skip


def said(stays: list[Stay]) -> Iterator[list[str]]:
    """The words of each line of a guest, without its number."""
    for line in "".join(stay.end["console"] for stay in stays).split("\n")[:-1]:
        if found := re.fullmatch(r"ride: \d+ (.*?)\r?", line):
            yield found[1].split(" ")


def console_faults(stays: list[Stay]) -> list[str]:
    """What of a guest's lines was lost, doubled or damaged on their way, and what they complain of."""
    wrong = []
    console = "".join(stay.end["console"] for stay in stays).replace("\r", "")
    *lines, rest = console[max(console.find("ride: 1 "), 0) :].split("\n")
    if lines[-2:] and lines[-2].endswith(" off"):
        lines.pop()  # the kernel's farewell
    elif rest and not rest.startswith("ride: "[: len(rest)]):
        wrong.append(f"its last words were {rest!r}")
    for number, line in enumerate(lines, 1):
        if not line.startswith(f"ride: {number} "):
            wrong.append(f"line {number} is {line!r}, after {lines[max(number - 2, 0)]!r}")
            break
    for words in said(stays):
        text = " ".join(words)
        if words[0] in ("fault", "order"):
            wrong.append(text)
        if words[0] == "kernel" and (int(words[1]) <= 4 or WORDS.search(text)) and SLOW not in text:
            wrong.append(text)
        if words[0] == "timer":
            late = (int(words[3]) - int(words[2])) / 1e9
            if not 0 <= late <= LATE:
                wrong.append(f"{text}: {late:+.3f} s too late")
    for stay in stays:
        fired = {words[1] for words in said([stay]) if words[0] == "timer" and len(words) == 4}
        if fired != {"monotonic", "realtime"}:
            wrong.append(f"on {stay.host}, of its timers only these have fired: {sorted(fired)}")
    return wrong


def answer_faults(where: str, now: Answer, then: Answer | None, first: Answer) -> list[str]:
    """What is wrong with an answer by itself, and after the last one, `then`."""
    wrong = []
    if now.source != "kvm-clock":
        wrong.append(f"its clock source is {now.source}")
    if now.cpuinfo != first.cpuinfo:
        wrong.append("/proc/cpuinfo has changed")
    if any(now.faults):
        wrong.append(f"its workers noticed {now.faults} faults")
    if max(now.latest) > LATE:
        wrong.append(f"its workers overslept by up to {max(now.latest):.3f} s")
    if not now.before[0] - RTC_TOLERANCE <= now.rtc <= now.after[0] + RTC_TOLERANCE:
        wrong.append(f"its RTC shows {now.rtc}, the host's clock {now.before[0]:.3f} to {now.after[0]:.3f}")
    if then is not None:
        if any(a < b for a, b in zip(now.rounds, then.rounds, strict=True)):
            wrong.append(f"its workers went from round {then.rounds} to {now.rounds}")
        if now.monotonic < then.monotonic:
            wrong.append(f"CLOCK_MONOTONIC went from {then.monotonic} to {now.monotonic}")
    return [f"{where}: {text}" for text in wrong]


def passed_faults(what: str, passed: float, least: float, most: float) -> list[str]:
    if least - PASSED_TOLERANCE <= passed <= most + PASSED_TOLERANCE:
        return []
    return [f"{what} went on by {passed:.3f} s in {least:.3f} to {most:.3f} s"]


def wall_faults(where: str, answer: Answer) -> list[str]:
    if answer.before[0] - WALL_TOLERANCE <= answer.realtime <= answer.after[0] + WALL_TOLERANCE:
        return []
    real = f"{answer.before[0]:.3f} to {answer.after[0]:.3f}"
    return [f"{where}: its time of day is {answer.realtime:.3f}, the host's {real}"]


def faults(ride: Ride) -> list[str]:
    """What a guest lost on its way, as far as it or anybody else noticed."""
    stays = ride.stays
    wrong = console_faults(stays)
    answers = [[parsed(answer) for answer in stay.answers] for stay in stays]
    first = answers[0][0]
    then: Answer | None = None
    for stay, some in zip(stays, answers, strict=True):
        where = f"on {stay.host}"
        for number, now in enumerate(some):
            wrong += answer_faults(f"{where}, answer {number + 1}", now, then, first)
            then = now
        if any(a <= b for a, b in zip(some[-1].rounds, some[0].rounds, strict=True)):
            wrong.append(f"{where}: a worker stands: {some[0].rounds}, {some[-1].rounds}")
        a, b = some[0], some[1]
        wrong += [
            f"{where}: {text}"
            for text in passed_faults(
                "CLOCK_MONOTONIC", b.monotonic - a.monotonic, b.before[1] - a.after[1], b.after[1] - a.before[1]
            )
        ]
        if stay.end["tables"] != stays[0].end["tables"]:
            wrong.append(f"{where}: its CPUID table is another one")
        if (stay.end["profile"], stay.end["intercept"]) != ("hyperv-r2", "kernel"):
            wrong.append(f"{where}: its profile is {stay.end['profile']}, answered by {stay.end['intercept']}")
    for move, came, old, new in zip(ride.moves, stays[1:], answers, answers[1:], strict=False):
        wrong += move_faults(f"to {came.host}", move, old, new, came.answers[0])
    if (ride.off["cause"], ride.off["status"]) != ("power-off", 0):
        wrong.append(f"it did not switch itself off: {ride.off}")
    return wrong


def move_faults(
    where: str, move: dict[str, Any], old: list[Answer], new: list[Answer], came: dict[str, Any]
) -> list[str]:
    """What is wrong with the guest's clocks after a move. old, new: its answers on both sides."""
    left, arrived = old[-1], new[0]
    monotonic = arrived.monotonic - left.monotonic
    realtime = arrived.realtime - left.realtime
    if "summary" in move:
        # Time went on.
        span = arrived.before[0] - left.after[0], arrived.after[0] - left.before[0]
        wrong = passed_faults("CLOCK_MONOTONIC", monotonic, *span)
        return [f"{where}: {text}" for text in wrong] + wall_faults(where, arrived) + wall_faults(where, new[-1])
    # Time stood while the guest was a file, and both clocks with it; then it set its time of day.
    stood, began = move["stood"][1] / 1e9, came["began"][1] / 1e9
    span = stood - left.after[1] + arrived.before[1] - began, stood - left.before[1] + arrived.after[1] - began
    wrong = passed_faults("CLOCK_MONOTONIC", monotonic, *span)
    wrong += passed_faults("CLOCK_REALTIME", realtime, *span)
    return [f"{where}: {text}" for text in wrong] + wall_faults(where, new[-1])


def shown_faults(stays: list[Stay]) -> list[str]:
    """What of the hidden a guest's kernel has found."""
    flags = [set(words[1:]) for words in said(stays) if words[0] == "flags"]
    vendor = "amd" if stays[0].host.startswith("amd") else "intel"
    wrong = [] if len(flags) == CPUS[vendor] else [f"it has {len(flags)} processors"]
    wrong += [f"it lacks {name}" for name in ("fpu", "sse2", "cx16") if any(name not in one for one in flags)]
    own = OWN_INTEL if vendor == "intel" else OWN
    hidden = HIDDEN | (BY_NAME.keys() - profiles.load("hyperv-r2").allowed(vendor) - own)
    return wrong + [f"its /proc/cpuinfo shows {name}" for name in sorted(set().union(*flags) & hidden)]


def chosen(stays: list[Stay], symbols: str) -> dict[str, str]:
    """The variant that the C library has chosen for each of its functions; symbols: what nm says of the program."""
    names: dict[int, list[str]] = {}
    for address, _, name in (line.split() for line in symbols.splitlines() if len(line.split()) == 3):
        names.setdefault(int(address, 16), []).append(name)
    (words,) = (words for words in said(stays) if words[0] == "ifunc")
    pairs = [[int(number, 16) for number in word.split("=")] for word in words[1:]]
    return {min(names[resolver], key=len): max(names.get(target, ["?"]), key=len) for resolver, target in pairs}


# -- the tests ---------------------------------------------------------------------------------------------------


@rides
def test_linux_goes_round(played: Mapping[str, Ride], one: str, record_property: Callable[[str, object], None]) -> None:
    ride = played[one]
    for stay, came, move in zip(ride.stays, ride.stays[1:], ride.moves, strict=False):
        if facts := move.get("summary"):
            figures = [facts[name] for name in ("total_time", "downtime", "rounds", "bytes")]
            record_property("hop", " ".join(map(str, [stay.host, came.host, "tcp", *figures, "-"])))
    assert faults(ride) == []
    assert [stay.host for stay in ride.stays] == way(one.partition("-")[0])


@rides
def test_linux_sees_nothing_that_is_hidden(played: Mapping[str, Ride], one: str) -> None:
    assert shown_faults(played[one].stays) == []


@rides
def test_the_c_library_chooses_the_baseline(played: Mapping[str, Ride], one: str) -> None:
    found = chosen(played[one].stays, (linux.guest() / "symbols").read_text())
    assert found["memcpy"] in ("__memmove_sse2_unaligned", "__memcpy_sse2_unaligned"), found
    assert {name: variant for name, variant in found.items() if variant == "?" or BEYOND.search(variant)} == {}


@rides
def test_its_programs_find_the_baseline(played: Mapping[str, Ride], one: str) -> None:
    assert [words for words in said(played[one].stays) if words[0] == "uses"] == [
        ["uses", str(number), "sse2"] for number in range(CPUS[one.partition("-")[0]])
    ]


@pytest.mark.skipif("amd-live" not in RIDES, reason="needs two kinds of AMD hosts (--kinds)")
def test_a_clock_that_was_set_back_is_noticed(played: Mapping[str, Ride]) -> None:
    """What a target might do wrong, done on purpose at the end of the live ride. (Its workers, and those who look at
    CLOCK_MONOTONIC, do not always notice: Linux lets a clock stand rather than go back.)"""
    ride = played["amd-live"]
    assert ride.planted is not None
    wrong = faults(ride._replace(stays=[*ride.stays, ride.planted], moves=[*ride.moves, {"summary": {}}]))
    assert any(text.startswith(f"to {ride.planted.host}: its time of day is") for text in wrong), wrong


@rides
def test_faults_are_noticed(played: Mapping[str, Ride], one: str) -> None:
    """What a move could do wrong is found by faults()."""
    assert faults(played[one]) == []
    for name, (change, sign) in (CHANGES | ({} if one == "amd-live" else SAVED)).items():
        ride = copy.deepcopy(played[one])
        change(ride)
        found = faults(ride)
        assert any(sign in text for text in found), (name, found)


Change = Callable[[Ride], None]


def _edit(pattern: str, by: str, count: int = 1) -> Change:
    """Another text in what the second stay printed. count: 0 for everywhere."""

    def change(ride: Ride) -> None:
        end = ride.stays[1].end
        end["console"], changed = re.subn(pattern, by, end["console"], count=count)
        assert changed, pattern

    return change


def _word(field: int, change_word: Callable[[str], str], at: int = -1) -> Change:
    """Another word in an answer of the last stay: after "ride: N answer WORD"."""

    def change(ride: Ride) -> None:
        answer = ride.stays[-1].answers[at]
        words = answer["line"].split()
        words[4 + field] = change_word(words[4 + field])
        answer["line"] = " ".join(words)

    return change


def _later(seconds: float) -> Callable[[str], str]:
    return lambda word: str(int(word) + int(seconds * 1e9))


def _end(key: str, value: Any) -> Change:
    return lambda ride: ride.stays[1].end.update({key: value})


def _standing_worker(ride: Ride) -> None:
    rounds = ride.stays[-1].answers[0]["line"].split()[4 + 5].split(",")
    _word(5, lambda word: ",".join([*word.split(",")[:-1], rounds[-1]]))(ride)


_TIMER, _LINE = r"timer monotonic (\d+) \d+", r"(ride: \d+ )timer.*"

#: What a move could do wrong, and what faults() says of it then.
CHANGES: dict[str, tuple[Change, str]] = {
    "a lost line": (_edit(_LINE + r"\n", ""), "line "),
    "a doubled line": (_edit(f"({_LINE}\n)", r"\1\1"), "line "),
    "a damaged line": (_edit(r"\nride: ", r"\nrid: "), "line "),
    "a late timer": (_edit(_TIMER, r"timer monotonic \1 \g<1>0"), "too late"),
    "an early timer": (_edit(_TIMER, r"timer monotonic \1 1"), "too late"),
    "no timer": (_edit("timer realtime", "timer monotonic", 0), "only these have fired"),
    "a stalled kernel": (_edit(_LINE, r"\1kernel 6 rcu: INFO: rcu_preempt detected stalls on CPUs"), "detected stalls"),
    "a kernel's warning": (_edit(_LINE, r"\1kernel 4 something"), "kernel 4 something"),
    "a wrong stamp": (_edit(_LINE, r"\1fault 2 page 3 word 3 holds 7 in round 9"), "fault 2 page 3"),
    "faults counted": (_word(6, lambda word: word[:-1] + "1"), "its workers noticed"),
    "a standing worker": (_standing_worker, "a worker stands"),
    "a sleep too long": (_word(7, lambda word: word + "0" * 10), "overslept"),
    "another cpuinfo": (_word(4, lambda word: "0"), "/proc/cpuinfo has changed"),
    "another clock source": (_word(3, lambda word: "tsc"), "its clock source is tsc"),
    "a wrong RTC": (_word(2, lambda word: str(int(word) - 3600)), "its RTC shows"),
    "a wrong time of day": (_word(1, _later(3600)), "its time of day is"),
    "a clock that goes back": (_word(0, _later(-3600), 0), "CLOCK_MONOTONIC went from"),
    "a clock that jumps": (_word(0, _later(3600), 0), "CLOCK_MONOTONIC went on by"),
    "a fast clock": (_word(0, _later(3600), 1), "CLOCK_MONOTONIC went on by"),
    "another table": (_end("tables", 0), "its CPUID table"),
    "another profile": (_end("profile", "host"), "its profile is host"),
    "no power-off": (lambda ride: ride.off.update(cause="timeout"), "did not switch itself off"),
}
#: Of a guest that went as a file.
SAVED: dict[str, tuple[Change, str]] = {
    "a time of day that went on": (_word(1, _later(3600), 0), "CLOCK_REALTIME went on by"),
}
