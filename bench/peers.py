"""The peers: C programs compiled as the engine is, and any program that answers requests for samples."""

from __future__ import annotations

import os
import re
import select
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.measure import Skip

HERE = Path(__file__).parent
ROOT = HERE.parent
BUILD = HERE / "build"

# As pyhv/_native/build.py has them.
CFLAGS = ("-std=c11", "-D_GNU_SOURCE", "-O2", "-g", "-Wall", "-Wextra", "-fvisibility=hidden")

_TIMEOUT = 60.0  # seconds; no sample takes more than a few


def need_kvm() -> None:
    """Raises Skip where /dev/kvm cannot be used."""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise Skip(f"/dev/kvm: {error.strerror}") from None


def build(name: str, *engine: str) -> Path:
    """The program made of bench/NAME.c and the engine's files (paths under csrc), compiled if it is out of date.

    The compiler and its flags are those of the extension: Python's own, then the engine's. Raises Skip.
    """
    program = BUILD / name
    sources = [HERE / f"{name}.c", *(ROOT / "csrc" / path for path in engine)]
    headers = [*HERE.glob("*.h"), *(ROOT / "csrc").glob("**/*.h")]
    if program.exists() and program.stat().st_mtime > max(path.stat().st_mtime for path in [*sources, *headers]):
        return program
    BUILD.mkdir(exist_ok=True)
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    flags = shlex.split(sysconfig.get_config_var("CFLAGS") or "")
    command = [*compiler, *flags, *CFLAGS, f"-I{ROOT / 'csrc'}", "-o", str(program), *map(str, sources), "-lpthread"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except OSError as error:
        raise Skip(f"{compiler[0]}: {error.strerror}") from None
    if done.returncode:
        raise Skip(f"{name}.c does not compile: {done.stderr.strip().splitlines()[0]}")
    return program


class Peer:
    """A running program that answers each line on its standard input with a line that holds one number.

    Raises Skip when it ends or says nothing for a minute. Needs close(), or use as a context manager.
    """

    def __init__(self, command: Sequence[str | Path], env: dict[str, str] | None = None) -> None:
        self._name = Path(command[0]).name
        self._process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
        )

    def sample(self, request: str = "") -> float:
        """One sample, in the program's own unit: nanoseconds."""
        process = self._process
        assert process.stdin and process.stdout
        try:
            process.stdin.write(f"{request}\n".encode())
            process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        if not select.select([process.stdout], [], [], _TIMEOUT)[0]:
            raise Skip(f"the peer {self._name} does not answer")
        line = process.stdout.readline()
        if not line:
            raise self._failure()
        return float(line)

    def _failure(self) -> Skip:
        assert self._process.stderr
        said = self._process.stderr.read().decode(errors="replace").strip().splitlines()
        return Skip(f"the peer {self._name} ended" + (f": {said[-1]}" if said else ""))

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def compare_ioctls(script: str, peer: list[str | Path]) -> str:
    """Whether the peer makes the ioctls that pyhv makes for the last VM of a Python script, as far as that can be seen
    here (by strace)."""
    try:
        ours = _ioctls([sys.executable, "-c", script], "")
        theirs = _ioctls(peer, "\n\n")
    except OSError:
        return "strace, which would compare the two's ioctls, is not installed"
    if not ours or not theirs:
        return "strace, which would compare the two's ioctls, does not work here"
    if ours == theirs:
        return f"strace sees the same {len(ours)} ioctls in both"
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    a, b = ([*calls, "nothing"][at : at + 1] for calls in (ours, theirs))
    return f"THE PEER IS OUT OF DATE: pyhv makes {len(ours)} ioctls, it {len(theirs)}; call {at + 1}: {a[0]}, {b[0]}"


def _ioctls(command: list[str | Path], requests: str) -> list[str]:
    """The names of the KVM ioctls that the program's last VM gets, in order."""
    BUILD.mkdir(exist_ok=True)
    log = BUILD / "strace.log"
    log.unlink(missing_ok=True)
    strace = ["strace", "-f", "-e", "trace=ioctl", "-o", str(log)]
    subprocess.run([*strace, *map(str, command)], input=requests.encode(), capture_output=True, timeout=60)
    names = re.findall(r"ioctl\(\d+, (?:[^,]* or )?(KVM_\w+)", log.read_text()) if log.exists() else []
    last = max((i for i, name in enumerate(names) if name == "KVM_CREATE_VM"), default=len(names))
    return names[last:]


@contextmanager
def cpuid_file(table: Any) -> Iterator[Path]:
    """The table as the C peer reads it: seven numbers a line."""
    with tempfile.NamedTemporaryFile("w", suffix=".cpuid") as file:
        file.write("".join(" ".join(f"{n:x}" for n in entry) + "\n" for entry in table.as_entries()))
        file.flush()
        yield Path(file.name)
