"""Save on one generation, restore on another: what moves, what is refused, and why.

Every host saves a ticker (guest_images/ticker.c) in compatibility mode and one without it, and tries to restore those
of all other hosts (../inside/generations.py). `played` does it all once; each test looks at one pair of hosts, and the
table of generations at the end of the lab's report is made of what they record.
"""

from __future__ import annotations

import copy
import json
import re
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pyhv.cpu import compare, policy, profiles
from pyhv.cpu.features import BY_NAME
from pyhv.cpu.host import HostDescription
from pyhv.snapshot import file
from tests.lab import code, kinds
from tests.lab.host import Command, Host
from tests.lab.lab import Lab

from .conftest import of_vendor

#: What tells the generations apart: literals, not pyhv's words, as KVM_GET_SUPPORTED_CPUID was read in these hosts.
_K10 = {"sse4a", "popcnt", "abm", "rdtscp"}
_BULLDOZER = _K10 | {"ssse3", "sse4_1", "sse4_2", "aes", "pclmulqdq", "xsave", "xsaveopt", "avx", "pdpe1gb"}
_ZEN = _BULLDOZER | {"f16c", "fma", "avx2", "movbe", "bmi1", "bmi2", "smep", "smap", "rdrand"}
_NEHALEM = {"ssse3", "sse4_1", "sse4_2", "popcnt", "rdtscp"}
_SANDY_BRIDGE = _NEHALEM | {"aes", "pclmulqdq", "xsave", "xsaveopt", "avx"}
SHOWN = {
    "amd-opteron-g2": set(),
    "amd-opteron-g3": _K10,
    "amd-phenom": _K10 | {"3dnow", "3dnowext", "pdpe1gb"},
    "amd-opteron-g4": _BULLDOZER,
    "amd-opteron-g5": _BULLDOZER | {"f16c", "fma"},
    "amd-epyc": _ZEN,
    "amd-epyc-rome": _ZEN | {"clwb"},
    "amd-epyc-milan": _ZEN | {"clwb", "erms", "pku"},
    "amd-epyc-tsc": _ZEN,
    # It has no EPT: KVM walks the guest's page tables itself, and gives 1 GiB pages that the processor has not.
    "intel-penryn": {"ssse3", "sse4_1", "xsave", "pdpe1gb"},
    "intel-lynnfield": _NEHALEM,
    "intel-sandybridge": _SANDY_BRIDGE,
    "intel-haswell": _SANDY_BRIDGE
    | {"f16c", "fma", "avx2", "movbe", "bmi1", "bmi2", "smep", "rdrand", "abm", "pdpe1gb"},
}  # fmt: skip
_NAMED_HERE = set().union(*SHOWN.values())

#: By how much the clock of a guest may seem to go back and not be wrong: its page is made anew now and then, and what
#: it says of the moment before that is an extrapolation. In nanoseconds.
CLOCK_TOLERANCE = 1_000_000
#: By how much it may have gone on before the guest does: a busy machine's delay. A clock that was not restored is off
#: by an hour (generations.py); that it stands still while the guest is a file is for tests/host to measure.
RESUME_LIMIT = 20_000_000_000

FOLDER = "/tmp/generations"


def hosts() -> list[str]:
    """The kinds that take part, the oldest of each vendor first. Not Opteron_G1, which no real processor is like; and
    wherever there are AMD hosts, one whose TSC runs at another rate: it costs little."""
    amd = [name for name in of_vendor("amd") if name in SHOWN]
    if amd and "amd-epyc-tsc" not in amd:
        amd.append("amd-epyc-tsc")
    return [kind.name for kind in kinds.KINDS.values() if kind.name in (*amd, *of_vendor("intel"))]


def vendor(name: str) -> str:
    return kinds.find(name).vendor


def oldest() -> dict[str, str]:
    """By vendor."""
    return {vendor(name): name for name in reversed(hosts())}


def newest() -> dict[str, str]:
    """By vendor; not the one of the other TSC rate."""
    return {vendor(name): name for name in hosts() if not name.endswith("-tsc")}


def planted_at(target: str) -> str:
    """The snapshot with which this host plants faults: the oldest of each vendor does, with one of the newest."""
    one = vendor(target)
    return f"{newest()[one]}.hyperv-r2" if one in TWO_OF_A_VENDOR and target == oldest()[one] else ""


def typed_at(target: str) -> list[str]:
    """The snapshots that are restored by the command too: on the oldest of each vendor, from the newest."""
    one = vendor(target)
    if one not in TWO_OF_A_VENDOR or target != oldest()[one]:
        return []
    foreign = [name for other, name in newest().items() if other != one]
    return [f"{newest()[one]}.typed", f"{newest()[one]}.host", *(f"{name}.hyperv-r2" for name in foreign)]


ALL = [(source, target) for source in hosts() for target in hosts() if source != target]
SAME = [pair for pair in ALL if vendor(pair[0]) == vendor(pair[1])]
OTHER = [pair for pair in ALL if vendor(pair[0]) != vendor(pair[1])]
TWO_OF_A_VENDOR = [one for one, name in newest().items() if name != oldest()[one]]


def named(pairs: list[tuple[str, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("source, target", pairs, ids=[f"{source}>{target}" for source, target in pairs])


# -- playing it all ----------------------------------------------------------------------------------------------


class Played(NamedTuple):
    """What came of it all."""

    saved: dict[str, Any]
    """Host -> its description and what it saved, as generations.py printed it."""
    restored: dict[str, Any]
    """Host -> what became of every snapshot there."""
    snapshots: Path
    """The folder with HOST.PROFILE.pyhv."""

    def description(self, host: str) -> HostDescription:
        return HostDescription.from_json(self.saved[host]["host"], host)

    def save(self, host: str, profile: str) -> dict[str, Any]:
        return dict(self.saved[host]["saved"][profile])

    def restore(self, source: str, target: str, profile: str) -> dict[str, Any]:
        return dict(self.restored[target]["restored"][f"{source}.{profile}"])

    def expected(self, source: str, target: str, profile: str) -> list[compare.Reason]:
        """Every reason against the move that pyhv finds from the two descriptions alone."""
        guest = policy.guest_table(self.description(source), profiles.load(profile), policy.Topology(1))
        with file.open_snapshot(str(self.snapshots / f"{source}.{profile}.pyhv")) as snapshot:
            assert snapshot.tables == (guest.table_for(0),), "saved with another table"
            state = snapshot.state
            msrs = {number for vcpu in state.vcpus for number in vcpu.msrs}
            return compare.problems(guest.table, self.description(target), msrs, state.platform.tsc_khz)


class _Player:
    """Plays on all hosts at once."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self._lab = lab
        self._folder = folder
        self._files = {name: path for name, path in code.files().items() if name in ("site", "bin/pyhv")}
        self._files["generations.py"] = code.HERE / "inside" / "generations.py"
        self._running: dict[str, tuple[Host, Command]] = {}

    def save(self, name: str) -> dict[str, Any]:
        """Starts a host, lets it save its tickers and takes them out of it."""
        host = self._lab.start_one(name)
        host.put(self._files, code.INSIDE)
        argv = ["python3", f"{code.INSIDE}/generations.py", FOLDER]
        command = host.start(argv, stdin=True, env=code.ENVIRONMENT, cwd=code.INSIDE)
        self._running[name] = host, command
        # On Bochs Python takes 8 s to be there: only AMD hosts start it for each command.
        wanted = {"run": name in newest().values(), "exec": vendor(name) == "amd"}
        command.send(json.dumps(wanted).encode() + b"\n")
        command.wait_for(b"\n", timeout=300)
        host.get(f"{FOLDER}/out", self._folder / name)
        for path in (self._folder / name).iterdir():
            path.rename(self._folder / f"{name}.{path.name}")
        answer: dict[str, Any] = json.loads(command.stdout)
        return answer

    def restore(self, name: str) -> dict[str, Any]:
        """Brings the snapshots of the other hosts in and lets the host try them."""
        host, command = self._running[name]
        wanted = {"plant": planted_at(name), "type": typed_at(name)}
        others = {path.name: path for path in self._folder.glob("*.z") if path.name.partition(".")[0] != name}
        host.put({n: p for n, p in others.items() if ".typed." not in n or n[:-7] in wanted["type"]}, f"{FOLDER}/in")
        command.send(json.dumps(wanted).encode() + b"\n")
        result = command.wait(timeout=500)
        assert result.status == 0, f"{name}: {result.stderr.decode(errors='replace')}"
        return dict(json.loads(result.text.splitlines()[1]))


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Played:
    """What came of it all; the hosts are gone by then."""
    names = hosts()
    if len(names) < 2:
        pytest.skip("needs two kinds of hosts (--kinds)")
    folder = tmp_path_factory.mktemp("snapshots")
    with Lab() as lab, ThreadPoolExecutor(len(names)) as pool:
        player = _Player(lab, folder)
        saved = dict(zip(names, pool.map(player.save, names), strict=True))
        restored = dict(zip(names, pool.map(player.restore, names), strict=True))
    for path in folder.glob("*.z"):
        path.with_suffix("").write_bytes(zlib.decompress(path.read_bytes()))
    return Played(saved, restored, folder)


# -- judging it --------------------------------------------------------------------------------------------------


def rounds(console: str) -> list[int]:
    """The numbers that ticker printed in complete lines."""
    return [int(number) for number in re.findall(r"^ticker: round (\d+)\n", console, re.MULTILINE)]


def gaps(before: str, after: str) -> list[str]:
    """What is wrong with what a ticker printed before it was saved and after it was restored."""
    counted, later = rounds(before + after), rounds(after)
    wrong = []
    if counted != list(range(1, len(counted) + 1)) or len(later) < 2:
        wrong.append(f"it counted {counted[:3]} ... {counted[-len(later) - 3:]}, the last {len(later)} of it restored")
    lines = (before + after).split("\n")[:-1]
    wrong += [line for line in lines if not re.fullmatch(r"ticker: (round \d+|\d+ pages from 0x[0-9a-f]+)", line)]
    return wrong


def faults(saved: dict[str, Any], restored: dict[str, Any]) -> list[str]:
    """What a guest lost on its way, as far as it or anybody else noticed."""
    wrong = []
    if restored["refused"]:
        return [f"it was refused: {restored['message']}"]
    if restored["cause"] != "timeout":
        wrong.append(f"it ended: {restored['cause']}")
    wrong += gaps(saved["console"], restored["console"])
    if restored["start"]["crc"] != saved["crc"]:
        wrong.append("its memory is not what it was")
    if restored["intercept"] != "kernel":
        wrong.append(f"its CPUID is answered by {restored['intercept']}")
    start, middle, end = (restored[when] for when in ("start", "middle", "end"))
    if start["tsc"] < saved["tsc"]:
        wrong.append(f"its TSC went back by {saved['tsc'] - start['tsc']}")
    if restored["cause"] != "timeout":
        return wrong
    if not -CLOCK_TOLERANCE <= start["time"] - saved["time"] <= RESUME_LIMIT:
        wrong.append(f"its clock went from {saved['time']} to {start['time']} ns")
    # Both moments lie between two readings of the host's clock: so nothing depends on how busy the machine is.
    least, most = end["looked"][0] - middle["looked"][1], end["looked"][1] - middle["looked"][0]
    passed = end["time"] - middle["time"]
    if not least * 0.99 - CLOCK_TOLERANCE <= passed <= most * 1.01 + CLOCK_TOLERANCE:
        wrong.append(f"its clock counted {passed} ns in the {least} to {most} ns that passed")
    return wrong


def wrong_reasons(source: str, target: str, restored: dict[str, Any], expected: list[compare.Reason]) -> list[str]:
    """What is wrong with the reasons that a host gave against a guest without compatibility mode; both hosts are of
    one vendor."""
    wrong = []
    if restored["refused"] != [str(reason) for reason in expected]:
        wrong.append(f"the reasons were {restored['refused']}, expected {[str(reason) for reason in expected]}")
    names = set(restored.get("named", ()))
    if lacking := (SHOWN[source] - SHOWN[target]) - names:
        wrong.append(f"not named: {', '.join(sorted(lacking))}")
    if false := (names & _NAMED_HERE) - (SHOWN[source] - SHOWN[target]):
        wrong.append(f"named, and not lacking: {', '.join(sorted(false))}")
    return wrong


def untrue(played: Played, source: str, target: str, names: list[str]) -> list[str]:
    """Those of the features named that the source does not offer, or the target does."""
    tables = [played.description(host).table for host in (source, target)]
    return [name for name in names if [table.has(BY_NAME[name]) for table in tables] != [True, False]]


# -- the tests ---------------------------------------------------------------------------------------------------

Record = Callable[[str, object], None]


def record(record_property: Record, source: str, target: str, profile: str, restored: dict[str, Any]) -> None:
    """A field of the report's table of generations (../testing.py)."""
    record_property("moved", f"{source} {target} {profile} {'no' if restored['refused'] else 'ok'}")


@named(SAME)
def test_in_compatibility_mode_a_guest_moves(
    played: Played, source: str, target: str, record_property: Record
) -> None:
    restored = played.restore(source, target, "hyperv-r2")
    record(record_property, source, target, "hyperv-r2", restored)
    assert played.expected(source, target, "hyperv-r2") == []
    assert faults(played.save(source, "hyperv-r2"), restored) == []
    assert restored["profile"] == "hyperv-r2"
    rates = [played.description(host).tsc_khz for host in (source, target)]
    assert bool(restored["notes"]) == (abs(rates[1] / rates[0] - 1) > 250e-6), restored["notes"]


@named(SAME)
def test_without_it_a_guest_moves_or_is_refused_for_good_reasons(
    played: Played, source: str, target: str, record_property: Record
) -> None:
    restored, expected = played.restore(source, target, "host"), played.expected(source, target, "host")
    record(record_property, source, target, "host", restored)
    assert wrong_reasons(source, target, restored, expected) == []
    assert untrue(played, source, target, restored.get("named", [])) == []
    if not expected:
        assert faults(played.save(source, "host"), restored) == []


@pytest.mark.parametrize("profile", ["hyperv-r2", "host"])
@named(OTHER)
def test_between_vendors_never(
    played: Played, source: str, target: str, profile: str, record_property: Record
) -> None:
    restored = played.restore(source, target, profile)
    record(record_property, source, target, profile, restored)
    vendors = f"the guest's processor is of vendor {vendor(source)}, the host's of vendor {vendor(target)}"
    assert restored["refused"] == [str(reason) for reason in played.expected(source, target, profile)]
    assert vendors in restored["refused"]
    assert "\n" not in restored["message"] and f"cannot run on this host: {vendors}" in restored["message"]


@pytest.mark.parametrize("one", TWO_OF_A_VENDOR)
def test_by_command(played: Played, one: str) -> None:
    """pyhv run, save and restore, as a user would, from the newest generation to the oldest."""
    source, target = newest()[one], oldest()[one]
    run, save, console = played.saved[source]["typed"]
    assert [run["status"], save["status"], console["status"]] == [0, 0, 0], (run, save, console)
    assert "t has ended: stopped" in console["stderr"]
    restored, newer, *foreign = (played.restored[target]["typed"][name] for name in typed_at(target))
    assert restored["status"] == 124, restored
    assert gaps(console["stdout"], restored["stdout"]) == []

    lacking = SHOWN[source] - SHOWN[target]
    assert (newer["status"], newer["stdout"]) == (2, ""), newer
    assert lacking and all(f"does not offer {name} (" in newer["stderr"] for name in lacking), newer
    for refused in foreign:
        assert (refused["status"], refused["stdout"]) == (2, ""), refused
        assert f"is of vendor {'intel' if one == 'amd' else 'amd'}, the host's of vendor {one}" in refused["stderr"]


@pytest.mark.parametrize("one", TWO_OF_A_VENDOR)
def test_faults_are_noticed(played: Played, one: str) -> None:
    """What a restore could do wrong, done on purpose, is found by the guest and by faults()."""
    source, target = newest()[one], oldest()[one]
    saved, planted = played.save(source, "hyperv-r2"), played.restored[target]["planted"]
    assert faults(saved, played.restore(source, target, "hyperv-r2")) == []
    for name, signs in {
        "stale_page": ("ticker: page 0x0000000000205000 holds", "memory is not what it was"),
        "without_cx16": ("ticker: CPUID leaf 0x00000001 subleaf 0x00 ECX was",),
        "earlier_tsc": ("ticker: the TSC went back", "its TSC went back"),
        "earlier_clock": ("its clock went from",),
    }.items():
        found = faults(saved, planted[name])
        assert all(any(sign in line for line in found) for sign in signs), (name, found)


def test_a_gap_and_a_reason_kept_quiet_are_noticed(played: Played) -> None:
    source, target = next((pair for pair in reversed(SAME) if SHOWN[pair[0]] - SHOWN[pair[1]]), ("", ""))
    if not source:
        pytest.skip("needs two generations of a vendor (--kinds)")
    saved, restored = played.save(source, "hyperv-r2"), played.restore(source, target, "hyperv-r2")
    first = rounds(restored["console"])[0]
    planted = copy.deepcopy(restored)
    planted["console"] = restored["console"].replace(f"ticker: round {first}\n", "", 1)
    assert faults(saved, planted) != []

    refused, expected = played.restore(source, target, "host"), played.expected(source, target, "host")
    name = min(SHOWN[source] - SHOWN[target])
    planted = copy.deepcopy(refused)
    at = next(i for i, text in enumerate(planted["refused"]) if f"does not offer {name} (" in text)
    del planted["refused"][at]
    planted["named"].remove(name)
    # The comparison itself forgets it, and so both sides: the literals remain.
    forgotten = [reason for reason in expected if str(reason) != refused["refused"][at]]
    assert wrong_reasons(source, target, planted, expected) != []
    assert wrong_reasons(source, target, planted, forgotten) == [f"not named: {name}"]
    assert untrue(played, target, source, [name]) == [name]
