"""pyhv-lab test: the tests of inside/ in every host wanted, those of outside/ here, one table of it all."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from . import code, image, kinds
from .errors import CommandTimeout, HostFailed, LabError
from .host import Host, patience
from .lab import Lab, prepare
from .process import Process

HERE = Path(__file__).resolve().parent

#: Two generations of each vendor for every change, and at least four for the whole; the AMD ones among them one whose
#: TSC has another rate.
QUICK = ("intel-penryn", "intel-haswell", "amd-opteron-g2", "amd-epyc")
FULL = (
    "intel-penryn", "intel-lynnfield", "intel-sandybridge", "intel-haswell",
    "amd-opteron-g2", "amd-phenom", "amd-opteron-g5", "amd-epyc", "amd-epyc-milan", "amd-epyc-tsc",
)  # fmt: skip
#: The column of the tests that need more than one host, or the lab itself.
OUTSIDE = "lab"

#: How long (seconds) all the tests of one host may take, times patience().
LIMITS = {"amd": 1200.0, "intel": 1200.0}
OUTSIDE_LIMIT = 1800.0

#: What of the tests is run in a host. Those for any machine's KVM (tests/host) start programs and wait by the clock,
#: which on Bochs takes minutes and means nothing.
SUITES = {"amd": ("inside", "host"), "intel": ("inside",)}

#: Of these, what cannot hold there: under QEMU a hardware breakpoint never stops a nested guest, so trap always steps.
DESELECTED = ("tests/host/test_compat.py::test_stepping_gives_the_same_output_as_breakpoints",)

#: Plugins of pytest that cost time under emulation and do nothing here.
_PYTEST = ("-p", "no:cacheprovider", "-p", "no:doctest", "-p", "no:unittest", "-p", "no:pastebin", "--color=no", "-ra",
           "-o", "junit_family=xunit1")  # which has record_property


class Case(NamedTuple):
    """One test, once: what pytest's JUnit file says of it."""

    module: str
    name: str  # with its parameters
    outcome: str  # "passed", "failed", "skipped"
    seconds: float
    message: str
    properties: tuple[tuple[str, str], ...] = ()  # what it recorded by pytest's record_property

    @property
    def function(self) -> str:
        """Module and name without parameters: a row of the table."""
        return f"{self.module}::{self.name.partition('[')[0]}"


class Outcome(NamedTuple):
    """What one host's tests came to. `error`: why they did not run to the end, or empty."""

    host: str
    cases: tuple[Case, ...]
    error: str
    start_seconds: float
    seconds: float

    def count(self, outcome: str) -> int:
        return sum(case.outcome == outcome for case in self.cases)

    @property
    def good(self) -> bool:
        return not self.error and not self.count("failed")


def read_junit(text: bytes) -> tuple[Case, ...]:
    """The cases in a JUnit file as pytest writes it. Raises LabError on anything else."""
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise LabError(f"the JUnit file is broken: {error}") from error
    cases = []
    for item in root.iter("testcase"):
        outcome, message = "passed", ""
        for kind, meaning in (("skipped", "skipped"), ("failure", "failed"), ("error", "failed")):
            if (element := item.find(kind)) is not None:
                outcome = meaning
                message = element.text or element.get("message") or ""
        # Without a class it is a whole module, skipped or not importable.
        whole = item.get("classname") or item.get("name") or ""
        name = item.get("name", "") if item.get("classname") else "(all)"
        recorded = tuple((p.get("name", ""), p.get("value", "")) for p in item.iterfind("properties/property"))
        cases.append(Case(whole.rpartition(".")[2], name, outcome, float(item.get("time", 0)), message, recorded))
    return tuple(cases)


def run_inside(
    host: Host, expression: str, files: Mapping[str, Path | bytes], say: image.Say = image.say_nothing
) -> tuple[Case, ...]:
    """Brings pyhv (`files`, of code.files()) and the tests into a host and runs them; `say` is told each test's
    outcome as it comes. Raises LabError."""
    host.put(files, code.INSIDE)
    command = ["python3", "-m", "pytest", *_PYTEST, "-v", "--junitxml", f"{code.INSIDE}/junit.xml", "-c", "/dev/null",
               "--rootdir", code.INSIDE]  # fmt: skip
    command += [f"{code.INSIDE}/tests/{name}" for name in SUITES[host.kind.vendor]]
    command += [f"--deselect={name}" for name in DESELECTED]
    if expression:
        command += ["-k", expression]
    environment = {**code.ENVIRONMENT, "PYHV_LAB_KIND": host.kind.name,"PYHV_LAB_VENDOR": host.kind.vendor}
    running = host.start(command, env=environment, cwd=code.INSIDE)
    result = running.wait(LIMITS[host.kind.vendor], lambda line: say(f"{host.name}: {line}"))
    if result.status == 5:
        return ()  # none selected
    if result.status not in (0, 1):
        output = (result.stdout + result.stderr).decode(errors="replace").splitlines()[-30:]
        raise LabError(f"{host.name}: pytest exited with status {result.status}:\n" + "\n".join(output))
    with tempfile.TemporaryDirectory() as folder:
        host.get(f"{code.INSIDE}/junit.xml", Path(folder) / "junit.xml")
        return read_junit((Path(folder) / "junit.xml").read_bytes())


def _one_host(
    name: str, expression: str, files: Mapping[str, Path | bytes], say: image.Say, verbose: bool
) -> Outcome:
    begin = time.monotonic()
    cases: tuple[Case, ...] = ()
    error, started = "", 0.0
    with Lab(say) as lab:
        try:
            host = lab.start_one(name)
            started = host.start_seconds
            cases = run_inside(host, expression, files, say if verbose else image.say_nothing)
        except (HostFailed, CommandTimeout, LabError, OSError) as caught:
            error = str(caught)
    return Outcome(name, cases, error, started, time.monotonic() - begin)


def _outside(expression: str, names: Sequence[str]) -> Outcome:
    """The tests that use the lab from without, by a pytest of its own here."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", *_PYTEST, "-q", "-c", "/dev/null", "--rootdir", str(code.PROJECT),
                   "--junitxml", str(junit), str(HERE / "outside")]  # fmt: skip
        if expression:
            command += ["-k", expression]
        command = ["env", f"PYTHONPATH={code.PROJECT}", f"PYHV_LAB_KINDS={','.join(names)}", *command]
        log = Path(folder) / "output"
        error = ""
        cases: tuple[Case, ...] = ()
        running = Process(command, log)
        try:
            status = running.wait(OUTSIDE_LIMIT * patience())
        finally:
            running.stop()  # and with it, by the kernel's hand, the hosts that it started
        if status is None:
            error = f"did not end within {OUTSIDE_LIMIT * patience():.0f} s"
        elif status not in (0, 1, 5):
            error = f"pytest exited with status {status}"
        if error:
            error += ":\n" + "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        with contextlib.suppress(FileNotFoundError):
            cases = read_junit(junit.read_bytes())
    return Outcome(OUTSIDE, cases, error, 0.0, time.monotonic() - begin)


def run(
    names: Sequence[str], expression: str, *, outside: bool, jobs: int, say: image.Say, verbose: bool = False
) -> list[Outcome]:
    """Runs it all, `jobs` hosts at a time, the slow ones first; outcomes in the order of `names`."""
    wanted = [kinds.find(name) for name in names]
    prepare(wanted, say)
    # Once for all: every host gets the same, even while somebody edits the sources.
    files = code.files(say)
    lock = threading.Lock()
    done: dict[str, Outcome] = {}

    def inside(name: str) -> Outcome:
        return _one_host(name, expression, files, say, verbose)

    def job(name: str) -> None:
        outcome = _outside(expression, names) if name == OUTSIDE else inside(name)
        with lock:
            done[name] = outcome
            state = "ok" if outcome.good else "FAILED"
            times = f"started in {outcome.start_seconds:.1f} s, all in {outcome.seconds:.1f} s"
            say(f"{name}: {state}, {_counts([outcome])}; {times}")

    order = [kind.name for kind in sorted(wanted, key=lambda kind: kind.vendor != "intel")]
    if outside:
        order.append(OUTSIDE)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(job, dict.fromkeys(order)))
    return [done[name] for name in (*names, OUTSIDE) if name in done]


# ------------------------------------------------------------------------------------------------ reports --


def _counts(outcomes: Sequence[Outcome]) -> str:
    passed, failed, skipped = (sum(o.count(what) for o in outcomes) for what in ("passed", "failed", "skipped"))
    failed += sum(bool(outcome.error) for outcome in outcomes)
    return f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else "")


def summary(outcomes: Sequence[Outcome]) -> str:
    """The closing line: how many tests passed, failed and were skipped; a host that did not run counts as a failure."""
    return _counts(outcomes)


def table(outcomes: Sequence[Outcome]) -> str:
    """Hosts by tests: a row for every test function, a column for every host."""
    rows: dict[str, dict[str, list[Case]]] = {}
    for outcome in outcomes:
        for case in outcome.cases:
            rows.setdefault(case.function, {}).setdefault(outcome.host, []).append(case)
    split = [outcome.host.partition("-") for outcome in outcomes]

    def cell(cases: list[Case] | None) -> str:
        if not cases:
            return "-"
        failed = sum(case.outcome == "failed" for case in cases)
        passed = sum(case.outcome == "passed" for case in cases)
        if failed:
            return f"FAIL {failed}/{len(cases)}" if len(cases) > 1 else "FAIL"
        if not passed:
            return "skip"
        return "ok" if len(cases) == 1 else f"{passed} ok"

    lines = [["", *(vendor for vendor, _, _ in split)], ["", *(model for _, _, model in split)]]
    lines += [[name, *(cell(found.get(outcome.host)) for outcome in outcomes)] for name, found in sorted(rows.items())]
    lines.append(["(the host)", *("ok" if not outcome.error else "FAILED" for outcome in outcomes)])
    lines.append(["(seconds)", *(f"{outcome.seconds:.0f}" for outcome in outcomes)])
    return _aligned(lines)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def generations(outcomes: Sequence[Outcome]) -> str:
    """What moves where: a row for every host that saved guests, a column for every host that was to restore them; ""
    where no test tried. outside/test_generations.py records it as `moved`: source, target, profile, and ok or no."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for outcome in outcomes:
        for case in outcome.cases:
            for name, value in case.properties:
                if name == "moved":
                    source, target, profile, became = value.split(" ")
                    cells.setdefault((source, target), {})[profile] = "FAIL" if case.outcome == "failed" else became
    if not cells:
        return ""
    names = [name for name in kinds.KINDS if any(name in pair for pair in cells)]

    def cell(source: str, target: str) -> str:
        found = cells.get((source, target))
        return "." if found is None else "/".join(found.get(profile, "-") for profile in ("hyperv-r2", "host"))

    split = [name.partition("-") for name in names]
    lines = [["", *(f"to {vendor}" for vendor, _, _ in split)], ["from", *(model for _, _, model in split)]]
    lines += [[source, *(cell(source, target) for target in names)] for source in names]
    title = "Saved on one host, restored on another: with --compat/without it (no: refused, as it must be)"
    return f"{title}\n{_aligned(lines)}"


def ring(outcomes: Sequence[Outcome]) -> str:
    """Every live migration from host to host; "" where no test tried. outside/test_ring.py records it as `hop`: source,
    target, transport, seconds in all and of downtime, rounds, bytes, and seconds by which the guest's clock went wrong,
    "-" where that cannot be told."""
    lines = [["from", "to", "over", "seconds", "downtime", "rounds", "sent", "clock"]]
    for outcome in outcomes:
        for case in outcome.cases:
            for name, value in case.properties:
                if name == "hop":
                    source, target, over, total, downtime, rounds, sent, clock = value.split(" ")
                    lines.append([
                        source, target, over, f"{float(total):.2f}", f"{float(downtime) * 1e3:.0f} ms", rounds,
                        f"{int(sent) / 1e3:.0f} kB", clock if clock == "-" else f"{float(clock) * 1e3:+.1f} ms",
                    ])  # fmt: skip
    return "" if len(lines) == 1 else f"One guest, handed on live from host to host\n{_aligned(lines)}"


def failures(outcomes: Sequence[Outcome]) -> str:
    """What went wrong, at length."""
    parts = []
    for outcome in outcomes:
        if outcome.error:
            parts.append(f"{outcome.host}: {outcome.error}")
        for case in outcome.cases:
            if case.outcome == "failed":
                parts.append(f"{outcome.host}: {case.module}::{case.name}\n{case.message}")
    return "\n\n".join(parts)


def as_json(outcomes: Sequence[Outcome]) -> str:
    """Everything, for machines."""
    return json.dumps(
        {
            outcome.host: {
                "error": outcome.error,
                "start_seconds": round(outcome.start_seconds, 3),
                "seconds": round(outcome.seconds, 3),
                "tests": [case._asdict() for case in outcome.cases],
            }
            for outcome in outcomes
        },
        indent=1,
    )


def as_junit(outcomes: Sequence[Outcome]) -> bytes:
    """One JUnit file, a test suite for every host."""
    root = ElementTree.Element("testsuites")
    for outcome in outcomes:
        cases = list(outcome.cases)
        if outcome.error:
            cases.append(Case("host", "runs to the end", "failed", outcome.seconds, outcome.error))
        suite = ElementTree.SubElement(
            root, "testsuite", name=outcome.host, tests=str(len(cases)), errors="0",
            failures=str(sum(case.outcome == "failed" for case in cases)),
            skipped=str(outcome.count("skipped")), time=f"{outcome.seconds:.3f}",
        )  # fmt: skip
        for case in cases:
            item = ElementTree.SubElement(
                suite, "testcase", classname=f"{outcome.host}.{case.module}", name=case.name, time=f"{case.seconds:.3f}"
            )
            if case.outcome != "passed":
                ElementTree.SubElement(item, "failure" if case.outcome == "failed" else "skipped").text = case.message
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))
