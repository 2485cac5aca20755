"""The guest that executes one small piece of code after the other and prints what each has done (guest/compare): the
same image boots by PVH under pyhv and under QEMU."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from guest_images import build

from . import cache
from .errors import LabError

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "guest" / "compare"
#: Beside the guest's own: the console, the command line, and the note that says where PVH enters.
SHARED = tuple(build.HERE / name for name in ("common/console.c", "common/cmdline.c", "pvh/note.S"))


def guest() -> Path:
    """The image. Raises LabError."""
    sources = [*sorted(SOURCE.iterdir()), *SHARED]

    def compile_it(folder: Path) -> None:
        code = [str(source) for source in sources if source.suffix in (".c", ".S")]
        command = ["gcc", *build.FLAGS, "-m64", f"-Wl,-T,{SOURCE / 'compare.ld'}", "-o", str(folder / "compare.elf")]
        done = subprocess.run([*command, *code], capture_output=True, text=True, timeout=120)
        if done.returncode != 0:
            raise LabError(f"the comparing guest: {done.stderr.strip()}")

    files = [*sources, build.COMMON / "guest.h", build.HERE / "build.py"]
    inputs = {file.name: cache.file_digest(file) for file in files}
    inputs["recipe"] = cache.file_digest(Path(__file__))
    return cache.artefact("compare-guest", inputs, compile_it) / "compare.elf"


def lines(console: str) -> dict[str, str]:
    """What it printed: a case's name -> what became of it. Raises AssertionError where it did not come to its end."""
    text = console.replace("\r", "").splitlines()
    assert text[-1:] == ["compare: end"], text[-3:]
    found = (re.fullmatch(r"(.*?): ((?:vector|at) .*)", line) for line in text)
    return {match[1]: match[2] for match in found if match}
