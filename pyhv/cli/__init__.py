"""The command line: `pyhv COMMAND ...`.

Each command is a module of its own, imported when it is asked for and not before: start-up time is a feature. A
command's main(arguments) returns the exit status by the table in pyhv/outcome.py and raises what went wrong; here that
becomes one line on stderr.
"""

from __future__ import annotations

import gc
import io
import os
import sys

from pyhv.cli.say import complain, die_of_broken_pipe
from pyhv.errors import BadInput, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

# Name of the command, and of its module -> what it does.
COMMANDS = {
    "run": "boot a guest; its console is this terminal",
    "ls": "the VMs that run under a name, and those that have ended",
    "status": "what a running VM is and does, or how it ended",
    "log": "the last that a VM has printed",
    "wait": "wait until a VM has ended",
    "console": "attach this terminal to a running VM's console",
    "pause": "stop a running VM between two instructions",
    "resume": "let a paused VM run on",
    "save": "save a running VM to a file",
    "migrate": "move a running VM to another host while it runs",
    "receive": "wait for a VM that is migrated to here, and run it",
    "stop": "end a running VM",
    "clear": "drop what is kept of a VM that has ended",
    "soak": "migrate a guest round a ring of processes, and check every hop",
    "restore": "let a saved VM go on",
    "inspect": "what is inside a snapshot",
    "verify": "check every byte of a snapshot",
    "check": "could a saved VM go on on this host, or on another?",
    "trace": "boot a guest and show each CPUID that it executes",
    "host": "what this host is and can do, and whether features can be hidden on it",
    "profiles": "the processors that a guest can be shown",
    "features": "the processor features that pyhv knows",
    "diff": "compare two processors, profiles or hosts, feature by feature",
}

# What such a command is called elsewhere -> what it is called here.
_MEANT = {
    "attach": "console",
    "boot": "run",
    "continue": "resume",
    "delete": "clear",
    "destroy": "stop",
    "exec": "run",
    "info": "status",
    "kill": "stop",
    "list": "ls",
    "load": "restore",
    "logs": "log",
    "ps": "ls",
    "rm": "clear",
    "shutdown": "stop",
    "snapshot": "save",
    "start": "run",
    "suspend": "pause",
    "unpause": "resume",
}

_USAGE = "usage: pyhv COMMAND ...    (pyhv COMMAND --help says more; pyhv --version)"

_HELP = """
Runs small virtual machines on KVM, and shows them a processor that every host of its vendor has.

commands:
{commands}

example:
  pyhv run cpuid --compat    boot the bundled guest `cpuid` in compatibility mode: it prints what it sees

exit status: the guest's own where there is one, 2 for bad input or usage, 125 where pyhv or the host failed; the
whole table is in pyhv run --help.
"""


def program() -> NoReturn:
    """The program `pyhv`: runs the command in sys.argv and ends the process with its status.

    Python would take 7 ms to take itself apart, and might trip over a thread that is still waiting. There is nothing to
    wait for: main() has flushed what was printed, and the machine is closed.
    """
    # The garbage collector would look at the modules' innocent objects over and over while they are imported: 5 ms. No
    # command makes cycles as it goes on.
    gc.disable()
    _occupy_standard_descriptors()
    _prepare_stdout()
    os._exit(main())


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. arguments: without the program's name; sys.argv's by default. Returns the exit status, with
    everything flushed."""
    words = sys.argv[1:] if arguments is None else arguments
    return guard(lambda: _command(words), lambda: _asks_for_json(words))


def guard(work: Callable[[], int], asks_for_json: Callable[[], bool]) -> int:
    """Does the work, whose result is an exit status, and flushes what was printed. What it raises becomes a line on
    stderr and an exit status, and, if asks_for_json says so, a JSON object on stdout (docs/json.md)."""
    try:
        status = work()
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        return die_of_broken_pipe()
    except (KeyboardInterrupt, Exception) as error:
        try:
            from pyhv.cli import failure
        except OSError as worse:  # no descriptor is left to open a module with
            complain(f"{worse.strerror}, by a limit of this process (ulimit -n)")
            return 125
        return failure.report(error, asks_for_json())


def _command(arguments: list[str]) -> int:
    if not arguments:
        raise BadInput("command", "none was given", f"there are {', '.join(COMMANDS)}; see pyhv --help")
    name, rest = arguments[0], arguments[1:]
    if name in ("-h", "--help"):
        lines = "\n".join(f"  {command:<10} {what}" for command, what in COMMANDS.items())
        print(_USAGE, _HELP.format(commands=lines).strip("\n"), sep="\n\n")
        return 0
    if name == "--version":
        from pyhv.version import VERSION

        print("pyhv", VERSION)
        return 0
    if name == "help":
        if len(rest) > 1:
            raise BadInput(rest[1], "pyhv help takes one command and no more", f"see pyhv help {rest[0]}")
        return _command([*rest[:1], "--help"])
    if name not in COMMANDS:
        import difflib

        meant = _MEANT.get(name)
        near = [meant] if meant else difflib.get_close_matches(name, COMMANDS, 1)
        advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}; see pyhv --help"
        raise BadInput(name, "is no option of pyhv" if name.startswith("-") else "is no command", advice)
    try:
        status: int = _module(name).main(rest)
    except SystemExit:  # after --help
        status = 0
    return status


def _module(command: str) -> Any:
    # As importlib.import_module() does; importlib itself would have to be imported.
    return __import__(f"pyhv.cli.{command}", fromlist=["main"])


def _asks_for_json(words: list[str]) -> bool:
    """Whether what was typed asks for JSON, also where the rest of it is wrong."""
    if "--json" not in words:
        return False
    if words[0] not in COMMANDS:
        return True
    try:
        asked: bool = _module(words[0]).COMMAND.has_switch("--json", words[1:])
    except ImportError:  # which is what is being reported
        return True
    return asked


class _Stdout(io.FileIO):
    """Descriptor 1, whose errors say that they are its own."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            raise
        except OSError as error:
            raise HostError("stdout", error.errno or 0, "output is missing") from None


def _prepare_stdout() -> None:
    """Makes print() write anything in any locale, and its errors known."""
    encoding = "utf-8" if sys.stdout is None else sys.stdout.encoding
    buffer = io.BufferedWriter(_Stdout(1, "w", closefd=False))
    sys.stdout = io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=os.isatty(1))


def _occupy_standard_descriptors() -> None:
    """Opens /dev/null where descriptor 0, 1 or 2 is closed: else the next file to be opened, /dev/kvm say, would
    get the number, and the guest's console would be written there."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
