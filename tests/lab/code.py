"""The code under test: pyhv's wheel as a user would get it, unpacked, with byte code."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from . import cache, image
from .errors import LabError

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
#: What the wheel is made of. Nothing that a build leaves in these folders is taken.
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "csrc", "pyhv", "guest_images")
_BUILT = shutil.ignore_patterns("__pycache__", "*.so", "*.o", "*.elf", "_features.py", "_pyhv.c", "gen", "build")

#: Where it is inside a host, and what a command needs to find it.
INSIDE = "/tmp/lab"
ENVIRONMENT = {"PATH": f"{INSIDE}/bin:/usr/local/bin:/usr/bin:/bin", "PYTHONPATH": f"{INSIDE}/site:{image.SITE}"}


def _copy(target: Path) -> None:
    for name in SOURCES:
        source = PROJECT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=_BUILT)
        elif source.exists():
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)


def _digest() -> str:
    """Over the sources, as _copy() takes them."""
    total = hashlib.sha256()

    def add(path: Path) -> None:
        if path.is_dir():
            names = {item.name for item in path.iterdir()}
            for name in sorted(names - _BUILT(str(path), names)):  # type: ignore[arg-type]
                add(path / name)
        elif path.exists():
            total.update(f"{path.relative_to(PROJECT)} {cache.file_digest(path)}\n".encode())

    for name in SOURCES:
        add(PROJECT / name)
    return total.hexdigest()


def pyhv(say: image.Say = image.say_nothing) -> Path:
    """The folder with `site`, what pyhv's wheel holds, made in a clean copy of the sources for any x86-64 processor.

    A file that the build forgets to pack is missing there, as it would be for a user. Raises LabError."""

    def build(folder: Path) -> None:
        say("building pyhv's wheel")
        source = folder / "source"
        _copy(source)
        # The project's virtual environment has what the build needs; nothing is downloaded.
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index",
                   "--disable-pip-version-check", "-w", str(folder), str(source)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)
        wheels = list(folder.glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            lines = (done.stdout + done.stderr).strip().splitlines()[-30:]
            raise LabError("pyhv's wheel cannot be built:\n" + "\n".join(f"    {line}" for line in lines))
        with zipfile.ZipFile(wheels[0]) as archive:
            archive.extractall(folder / "site")
        image.compile_all(folder / "site", f"{INSIDE}/site")
        shutil.rmtree(source)

    inputs = {"sources": _digest(), "python": sys.version, "recipe": cache.file_digest(Path(__file__))}
    return cache.artefact("pyhv", inputs, build)


def engine_tests(say: image.Say = image.say_nothing) -> Path:
    """The folder with the C engine's own test of KVM (tests/c), built with AddressSanitizer and
    UndefinedBehaviorSanitizer, the run-time libraries of both linked in. The other tests there need no KVM."""
    own = PROJECT / "tests" / "c"
    sources = sorted([*own.glob("*.[ch]"), own / "Makefile"])
    programs = ["test_kvm"]

    def build(folder: Path) -> None:
        say("building the engine's tests with sanitizers")
        source = folder / "source"
        _copy(source)
        (source / "tests" / "c").mkdir(parents=True)
        for path in sources:
            shutil.copy2(path, source / "tests" / "c")
        command = ["make", "-s", "-C", str(source / "tests" / "c"), f"PYTHON={sys.executable}",
                   "CFLAGS=-O1 -g -march=x86-64 -static-libasan -static-libubsan -static-libgcc",
                   *(f"build/sanitize/{name}" for name in programs)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)
        if done.returncode:
            lines = (done.stdout + done.stderr).strip().splitlines()[-30:]
            raise LabError("the engine's tests cannot be built:\n" + "\n".join(f"    {line}" for line in lines))
        for name in programs:
            shutil.copy2(source / "tests" / "c" / "build" / "sanitize" / name, folder)
        shutil.rmtree(source)

    inputs = {"sources": _digest(), "tests": [cache.file_digest(path) for path in sources],
              "recipe": cache.file_digest(Path(__file__))}  # fmt: skip
    return cache.artefact("engine-tests", inputs, build)


def files(say: image.Say = image.say_nothing) -> dict[str, Path | bytes]:
    """What Host.put() takes to bring pyhv and the tests for it into a host, under INSIDE."""
    start = b"#!/usr/bin/python3\nfrom pyhv.cli import program\nprogram()\n"  # what pyproject.toml names
    return {
        "site": pyhv(say) / "site",
        "bin/pyhv": start,
        "engine": engine_tests(say),
        "tests/__init__.py": b"",
        "tests/inside": HERE / "inside",
        # pyhv's tests for this machine's KVM; many are skipped where that does not honour its CPUID table.
        "tests/host": PROJECT / "tests" / "host",
    }
