#!/usr/bin/env python3
"""Builds the guest images: pyhv/guests/NAME.elf of every guest in this folder that is out of date.

A guest is a file NAME.c or NAME.S, or a folder NAME with such files; common/ is linked into all of them, into the
32-bit ones common32/ and the little of common/ that is fit for both. Needs gcc (or what $CC names) and binutils, and
nothing of Python beyond the standard library: setup.py runs it before pyhv exists.

usage: build.py [--force] [--output FOLDER]
"""

import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMMON, COMMON32 = HERE / "common", HERE / "common32"
OUTPUT = HERE.parent / "pyhv" / "guests"

FLAGS = [
    "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{COMMON}",
    # There is no operating system below a guest, and no C library.
    "-ffreestanding", "-nostdlib", "-static", "-fno-pic", "-no-pie",
    # Nothing but integer registers: an interpreting KVM knows no SSE and no x87, and no guest turns them on.
    "-mgeneral-regs-only",
    # Exceptions push onto the stack that the code uses.
    "-mno-red-zone",
    # Nobody provides what these would call or need.
    "-fno-stack-protector", "-fcf-protection=none", "-fno-asynchronous-unwind-tables",
    # A loop that the source shows stays a loop: there is no memset() to call.
    "-fno-tree-loop-distribute-patterns",
    # Code for CPL 3 sees its own pages only, so the compiler may not put tables of its own elsewhere.
    "-fno-jump-tables", "-fno-tree-switch-conversion",
    # Of common/ an image keeps what it uses.
    "-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections",
    "-Wl,--build-id=none", "-Wl,-z,noexecstack", "-Wl,-z,max-page-size=4096",
]  # fmt: skip
FLAGS64 = [*FLAGS, "-m64", f"-Wl,-T,{COMMON / 'guest.ld'}"]
FLAGS32 = [*FLAGS, "-m32", "-march=i686", f"-I{COMMON32}", f"-Wl,-T,{COMMON32 / 'guest32.ld'}"]

# Kernels of boot protocols that begin in 32-bit mode.
GUESTS32 = ("multiboot", "pvh")


class Failed(Exception):
    """What to print, in one line where this script knows the cause."""


def sources_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".c", ".S"))


def guests() -> dict[str, list[Path]]:
    """Name -> its own source files."""
    found = {path.stem: [path] for path in sources_in(HERE)}
    for folder in sorted(path for path in HERE.iterdir() if path.is_dir() and path not in (COMMON, COMMON32)):
        if sources := sources_in(folder):
            found[folder.name] = sources
    return found


def find_compiler() -> list[str]:
    """The compiler's command, after making sure that it and the linker it will call are there."""
    command = shlex.split(os.environ.get("CC", "")) or ["gcc"]
    if shutil.which(command[0]) is None:
        raise Failed(f"{command[0]}: not found; install a compiler (Debian, Ubuntu: apt-get install gcc) or set CC")
    for tool in ("as", "ld"):
        query = subprocess.run([*command, f"-print-prog-name={tool}"], capture_output=True, text=True, check=False)
        if shutil.which(query.stdout.strip() or tool) is None:
            raise Failed(f"{tool}: not found by {command[0]}; install it (Debian, Ubuntu: apt-get install binutils)")
    return command


def out_of_date(image: Path, inputs: list[Path]) -> bool:
    try:
        built = image.stat().st_mtime_ns
    except FileNotFoundError:
        return True
    return any(path.stat().st_mtime_ns >= built for path in inputs)


def common_to(name: str) -> list[Path]:
    """What is linked into the guest of this name beside its own files."""
    if name in GUESTS32:
        return [*sources_in(COMMON32), COMMON / "console.c", COMMON / "cmdline.c"]
    return sources_in(COMMON)


def build(compiler: list[str], image: Path, sources: list[Path]) -> None:
    """Compiles and links one image; it appears whole or not at all, whoever else builds it at the same time."""
    temporary = image.with_name(f".{os.getpid()}.{image.name}")
    try:
        flags = FLAGS32 if image.stem in GUESTS32 else FLAGS64
        command = [*compiler, *flags, "-o", str(temporary), *map(str, sources)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode != 0:
            raise Failed(f"{image.name}: {shlex.join(command)} failed:\n{done.stdout.rstrip()}")
        temporary.chmod(0o644)  # the linker makes a program; a host must not run it
        temporary.replace(image)
    finally:
        temporary.unlink(missing_ok=True)


def main(arguments: list[str]) -> int:
    force = "--force" in arguments
    output = Path(arguments[arguments.index("--output") + 1]) if "--output" in arguments else OUTPUT
    output.mkdir(parents=True, exist_ok=True)
    always = [path for folder in (COMMON, COMMON32) for path in folder.iterdir()] + [Path(__file__).resolve()]
    wanted = {
        name: sources
        for name, sources in guests().items()
        if force or out_of_date(output / f"{name}.elf", [*always, *sources, *HERE.glob(f"{name}/*.h")])
    }
    if not wanted:
        return 0
    try:
        compiler = find_compiler()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [
                pool.submit(build, compiler, output / f"{name}.elf", [*common_to(name), *sources])
                for name, sources in wanted.items()
            ]
            for job in jobs:
                job.result()
    except Failed as failure:
        print(f"guest_images/build.py: {failure}", file=sys.stderr)
        return 1
    print(f"guest images: {', '.join(sorted(wanted))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
