"""The command line: `pyhv COMMAND ...`.

Each command is a module of its own, imported when it is asked for and not before: start-up time is a feature. A
command's main(arguments) returns the exit status by the table in pyhv/outcome.py and raises what went wrong; here that
becomes one line on stderr.
"""

from __future__ import annotations

import errno
import gc
import os
import sys

from pyhv.errors import BadInput, PyhvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

# Name of the command, and of its module -> what it does.
COMMANDS = {
    "run": "boot a guest; its console is this terminal",
    "ls": "the VMs that run under a name",
    "status": "what a running VM is and does",
    "console": "attach this terminal to a running VM's console",
    "pause": "stop a running VM between two instructions",
    "resume": "let a paused VM run on",
    "save": "save a running VM to a file",
    "migrate": "move a running VM to another host while it runs",
    "receive": "wait for a VM that is migrated to here, and run it",
    "stop": "end a running VM",
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

# As in pyhv/outcome.py, which this module does not import before it must.
_USAGE_ERROR, _INTERNAL_ERROR, _INTERRUPTED = 2, 125, 130


def program() -> NoReturn:
    """The program `pyhv`: runs the command in sys.argv and ends the process with its status.

    Python would take 7 ms to take itself apart, and might trip over a thread that is still waiting. There is nothing to
    wait for: main() has flushed what was printed, and the machine is closed.
    """
    # The garbage collector would look at the modules' innocent objects over and over while they are imported: 5 ms. No
    # command makes cycles as it goes on.
    gc.disable()
    os._exit(main())


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. arguments: without the program's name; sys.argv's by default. Returns the exit status, with
    everything flushed."""
    words = sys.argv[1:] if arguments is None else arguments
    _occupy_standard_descriptors()
    return guard(lambda: _command(words))


def guard(work: Callable[[], int]) -> int:
    """Does the work, whose result is an exit status. Makes a line on stderr and a status of what it raises, and flushes
    what was printed."""
    try:
        try:
            return work()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        return die_of_broken_pipe()
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BadInput as error:
        complain(str(error))
        return _USAGE_ERROR
    except PyhvError as error:
        complain(str(error))
        return _INTERNAL_ERROR
    except Exception as error:
        if os.environ.get("PYHV_DEBUG"):
            import traceback

            traceback.print_exc()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            complain(f"{os.strerror(error.errno)}, while writing")  # no fault of ours
        else:
            what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            complain(f"internal error: {what}; please report this, with what PYHV_DEBUG=1 in the environment adds")
        return _INTERNAL_ERROR


def _command(arguments: list[str]) -> int:
    if not arguments:
        raise BadInput("command", "none was given", f"there are {', '.join(COMMANDS)}; see pyhv --help")
    name, rest = arguments[0], arguments[1:]
    if name in ("-h", "--help"):
        lines = "\n".join(f"  {command:<10} {what}" for command, what in COMMANDS.items())
        print(_USAGE, _HELP.format(commands=lines).strip("\n"), sep="\n\n")
        return 0
    if name == "--version":
        import pyhv

        print("pyhv", pyhv.__version__)
        return 0
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, 1)
        advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}; see pyhv --help"
        raise BadInput(name, "is no option of pyhv" if name.startswith("-") else "is no command", advice)
    try:
        # As importlib.import_module() does; importlib itself would have to be imported.
        status: int = __import__(f"pyhv.cli.{name}", fromlist=["main"]).main(rest)
    except SystemExit:  # after --help
        status = 0
    return status


def complain(text: str) -> None:
    """Prints one line on stderr, whatever the text contains; quietly not, where stderr is closed."""
    try:
        os.write(2, f"pyhv: {one_line(text)}\n".encode())
    except OSError:
        pass


def one_line(text: str) -> str:
    """The text with what would break a line, or drive a terminal, made visible: file names may contain anything."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def die_of_broken_pipe() -> int:
    """Ends the process as SIGPIPE would have, had Python not turned it off: whoever was to read our output is gone.

    Returns a status only where the signal is blocked.
    """
    import signal

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGPIPE)
    return 128 + signal.SIGPIPE


def _occupy_standard_descriptors() -> None:
    """Opens /dev/null where descriptor 0, 1 or 2 is closed: else the next file to be opened, /dev/kvm say, would
    get the number, and the guest's console would be written there."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
