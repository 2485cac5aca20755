"""pyhv-lab: the lab's command."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from . import kinds, process
from .errors import LabError, Missing
from .host import Host
from .lab import Lab, prepare


def _say(text: str) -> None:
    print(f"pyhv-lab: {text}", file=sys.stderr, flush=True)


def _terminated(number: int, frame: FrameType | None) -> None:
    # First the hosts, or the exception would wait for threads that wait for them.
    process.end()
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="pyhv-lab", description="Hosts with the real kvm_amd and kvm_intel, of many generations, by emulation."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("kinds", help="list the kinds of hosts")
    setup = commands.add_parser("setup", help="get and build all that the hosts need")
    setup.add_argument("kinds", nargs="*", metavar="KIND", help="only what these kinds need (default: all)")
    run = commands.add_parser("run", help="run a command in hosts, side by side")
    run.add_argument("kinds", nargs="+", metavar="KIND")
    run.add_argument("--timeout", type=float, default=300, metavar="S", help="limit for the command (default: 300 s)")
    run.add_argument("--connected", action="store_true", help="with a network (AMD) or a serial cable (Intel)")
    run.add_argument("--put", action="append", default=[], metavar="FILE[:TARGET]", help="copy into each host first")
    shell = commands.add_parser("shell", help="a shell in a host, on this terminal")
    shell.add_argument("kind", metavar="KIND")
    test = commands.add_parser("test", help="run the lab's tests in hosts, and print a table of hosts by tests")
    test.add_argument("--kinds", default="quick", metavar="A,B,..",
                      help="kinds of hosts; or quick (the default), two of each vendor; or full")  # fmt: skip
    test.add_argument("-k", dest="expression", default="", metavar="EXPR", help="only tests that match, as for pytest")
    test.add_argument("--junit", metavar="FILE", help="write a JUnit file")
    test.add_argument("--json", metavar="FILE", help="write the outcomes as JSON")
    test.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N",
                      help="hosts at a time (default: as many as CPUs)")  # fmt: skip
    test.add_argument("-v", dest="verbose", action="store_true", help="say each test's outcome as it comes")
    test.add_argument("--inside", action="store_true", help="leave out the tests that need several hosts")
    test.add_argument("--optional", action="store_true",
                      help="where the lab cannot run for want of packages: exit status 0, said in capitals; "
                      "but not with CI=true")  # fmt: skip
    bench = commands.add_parser("bench", help="boot and live migration by pyhv and by QEMU, in the same hosts")
    bench.add_argument("rows", nargs="*", metavar="ROW",
                       help="boot-plain, boot-plain-4, boot, boot-4, boot-bzimage, boot-bzimage-4, idle, linux, "
                       "linux-writes (all)")  # fmt: skip
    bench.add_argument("--kinds", default="amd-opteron-g2,amd-epyc", metavar="A,B",
                       help="from A to B, AMD hosts both; boots are in B")  # fmt: skip
    bench.add_argument("--repeat", type=int, default=5, metavar="N", help="how often (default: 5)")
    given = list(sys.argv[1:] if arguments is None else arguments)
    # What follows "--" is the command for the hosts, not ours to read.
    command: list[str] = []
    if "--" in given:
        at = given.index("--")
        given, command = given[:at], given[at + 1 :]
    options = parser.parse_args(given)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminated)
    try:
        if options.command == "kinds":
            return _kinds()
        if options.command == "setup":
            return _setup(options.kinds or list(kinds.KINDS))
        if options.command == "run":
            if not command:
                parser.error("run: what to run comes after --")
            return _run(options, command)
        if options.command == "shell":
            return _shell(options.kind)
        if options.command == "test":
            return _test(options)
        if options.command == "bench":
            from . import bench as benchmark

            print(benchmark.run(options.kinds.split(","), options.rows, options.repeat, _say))
            return 0
    except Missing as error:
        print(f"pyhv-lab: {error}", file=sys.stderr)
        if options.command == "test" and options.optional and os.environ.get("CI") != "true":
            print("REAL KVM WAS NOT TESTED: THE LAB COULD NOT RUN HERE", flush=True)
            return 0
        return 1
    except LabError as error:
        print(f"pyhv-lab: {error}", file=sys.stderr)
        return 1
    raise AssertionError(options.command)


def _kinds() -> int:
    for kind in kinds.KINDS.values():
        print(f"{kind.name:18} {kind.year}  {kind.title}")
    return 0


def _setup(names: list[str]) -> int:
    begin = time.monotonic()
    prepare([kinds.find(name) for name in names], _say)
    _say(f"ready for {len(names)} kinds of hosts, in {time.monotonic() - begin:.1f} s")
    return 0


def _put(host: Host, texts: list[str]) -> None:
    for text in texts:
        source, _, target = text.partition(":")
        path = Path(source)
        if not path.exists():
            raise LabError(f"{source}: no such file or folder")
        host.put({path.name: path}, target or "/tmp")


def _run(options: argparse.Namespace, command: list[str]) -> int:
    with Lab(_say) as lab:
        hosts = lab.start(*options.kinds, connected=options.connected)
        for host in hosts:
            _put(host, options.put)
        running = [host.start(command) for host in hosts]
        worst = 0
        for host, one in zip(hosts, running, strict=True):
            try:
                result = one.wait(options.timeout)
            except OSError as error:
                raise LabError(f"{host.name}: {error}") from error
            if len(hosts) > 1:
                print(f"== {host.name}: exit status {result.status}", flush=True)
            sys.stdout.buffer.write(result.stdout)
            sys.stdout.buffer.flush()
            sys.stderr.buffer.write(result.stderr)
            sys.stderr.buffer.flush()
            worst = worst or (result.status if result.status >= 0 else 128 - result.status)
        return worst


def _test(options: argparse.Namespace) -> int:
    from . import testing

    if options.jobs < 1:
        raise LabError(f"--jobs {options.jobs}: at least one host at a time")
    sets = {"quick": testing.QUICK, "full": testing.FULL}
    names = sets.get(options.kinds) or tuple(name for name in options.kinds.split(",") if name)
    begin = time.monotonic()
    outcomes = testing.run(
        names, options.expression, outside=not options.inside, jobs=options.jobs, say=_say, verbose=options.verbose
    )
    if options.junit:
        Path(options.junit).write_bytes(testing.as_junit(outcomes))
    if options.json:
        Path(options.json).write_text(testing.as_json(outcomes) + "\n")
    if text := testing.failures(outcomes):
        print(text, end="\n\n")
    print(testing.table(outcomes))
    if text := testing.generations(outcomes):
        print(text)
    if text := testing.ring(outcomes):
        print(text)
    print(f"in {time.monotonic() - begin:.0f} s")
    print(testing.summary(outcomes), flush=True)
    ran = any(outcome.cases for outcome in outcomes)
    return 0 if ran and all(outcome.good for outcome in outcomes) else 1


def _shell(name: str) -> int:
    if not sys.stdin.isatty():
        raise LabError("shell: standard input is no terminal; use run")
    with Lab(_say) as lab:
        host = lab.start_one(name)
        command = host.start(["sh"], stdin=True, terminal=True, env={"TERM": os.environ.get("TERM", "vt100")})
        _say(f"{host.name}: {host.ready_text}; started in {host.start_seconds:.2f} s; leave with exit")
        before = termios.tcgetattr(0)
        shown = 0
        try:
            tty.setraw(0)
            while True:
                ended = command.ended
                if shown < len(command.stdout):
                    os.write(1, bytes(command.stdout[shown:]))
                    shown = len(command.stdout)
                if ended:
                    break
                if select.select([0], [], [], 0.02)[0] and (data := os.read(0, 1024)):
                    command.send(data)
        finally:
            termios.tcsetattr(0, termios.TCSADRAIN, before)
        return command.wait().status
