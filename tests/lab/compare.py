"""The guest that executes one small piece of code after the other and prints what each has done (guest/compare): the
same image boots by PVH under pyhv and under QEMU."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from . import cache
from .errors import LabError

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "guest" / "compare"
COMMON = HERE.parents[1] / "guest_images" / "common"
FLAGS = [
    "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{COMMON}", "-ffreestanding", "-nostdlib", "-static",
    "-fno-pic", "-no-pie", "-mgeneral-regs-only", "-mno-red-zone", "-fno-stack-protector", "-fcf-protection=none",
    "-fno-asynchronous-unwind-tables", "-fno-tree-loop-distribute-patterns", "-ffunction-sections",
    "-Wl,--gc-sections", "-Wl,--build-id=none", "-Wl,-z,noexecstack",
    "-Wl,-z,max-page-size=4096", f"-Wl,-T,{SOURCE / 'compare.ld'}",
]  # fmt: skip


def guest() -> Path:
    """The image. Raises LabError."""
    sources = [*sorted(SOURCE.iterdir()), COMMON / "console.c", COMMON / "cmdline.c"]

    def build(folder: Path) -> None:
        code = [str(source) for source in sources if source.suffix in (".c", ".S")]
        command = ["gcc", *FLAGS, "-o", str(folder / "compare.elf"), *code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode != 0:
            raise LabError(f"the comparing guest: {done.stderr.strip()}")

    inputs = {source.name: cache.file_digest(source) for source in [*sources, COMMON / "guest.h"]}
    inputs["recipe"] = cache.file_digest(Path(__file__))
    return cache.artefact("compare-guest", inputs, build) / "compare.elf"


def lines(console: str) -> dict[str, str]:
    """What it printed: a case's name -> what became of it. Raises AssertionError where it did not come to its end."""
    text = console.replace("\r", "").splitlines()
    assert text[-1:] == ["compare: end"], text[-3:]
    found = (re.fullmatch(r"(.*?): ((?:vector|at) .*)", line) for line in text)
    return {match[1]: match[2] for match in found if match}
