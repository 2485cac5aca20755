"""A Linux guest for the hosts: the lab's kernel as bzImage and as ELF, and an initramfs whose first process tells what
it finds (guest/linux.c) and can be moved while it works (guest/ride.c)."""

from __future__ import annotations

import stat
import subprocess
import tarfile
from pathlib import Path

from . import cache, image, packages
from .errors import LabError

HERE = Path(__file__).resolve().parent
#: Modules in the initramfs, in the order of loading: what tells the host of a panic.
MODULES = ("pvpanic", "pvpanic-mmio")
SOURCES = tuple(HERE / "guest" / name for name in ("linux.c", "ride.c", "ride.h"))


def guest(say: image.Say = image.say_nothing) -> Path:
    """The folder with `vmlinuz`, `vmlinux`, `initrd`, and `symbols`: what `nm` says of the initrd's program."""
    kernel = packages.kernel(say)

    def build(folder: Path) -> None:
        say("building the Linux guest")
        init = folder / "init"
        compile_init(SOURCES[0], init, SOURCES[1], strip=False)
        with (folder / "symbols").open("wb") as symbols:
            subprocess.run(["nm", str(init)], check=True, timeout=60, stdout=symbols)
        subprocess.run(["strip", str(init)], check=True, timeout=60)
        entries = [("dev", stat.S_IFDIR | 0o755, b""), ("modules", stat.S_IFDIR | 0o755, b"")]
        entries += [(f"modules/{name}.ko", stat.S_IFREG | 0o644, data) for name, data in _modules().items()]
        entries.append(("init", stat.S_IFREG | 0o755, init.read_bytes()))
        (folder / "initrd").write_bytes(image.cpio(entries))
        for name in ("vmlinuz", "vmlinux"):
            (folder / name).hardlink_to(kernel / name)

    inputs = {source.name: cache.file_digest(source) for source in SOURCES}
    inputs |= {"kernel": kernel.name, "recipe": cache.file_digest(Path(__file__))}
    return cache.artefact("linux-guest", inputs, build)


def worker(say: image.Say = image.say_nothing) -> Path:
    """The folder with `vmlinux` and an `initrd` whose first process checks its own work (guest/work.c)."""
    kernel, source = packages.kernel(say), HERE / "guest" / "work.c"

    def build(folder: Path) -> None:
        init = folder / "init"
        compile_init(source, init)
        entries = [("dev", stat.S_IFDIR | 0o755, b""), ("init", stat.S_IFREG | 0o755, init.read_bytes())]
        (folder / "initrd").write_bytes(image.cpio(entries))
        (folder / "vmlinux").hardlink_to(kernel / "vmlinux")

    inputs = {"source": cache.file_digest(source), "kernel": kernel.name}
    inputs["recipe"] = cache.file_digest(Path(__file__))
    return cache.artefact("linux-worker", inputs, build)


def compile_init(source: Path, target: Path, *more: Path, strip: bool = True) -> None:
    """A guest's first process. Not PIE: the addresses that it prints are those of its symbols. Raises LabError."""
    command = ["gcc", "-static", "-no-pie", "-O2", "-march=x86-64", "-Wall", "-Wextra", *(["-s"] if strip else [])]
    command += ["-o", str(target), str(source), *map(str, more)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise LabError(f"{' '.join(command)}: {done.stderr.strip()}")


def _modules() -> dict[str, bytes]:
    package = packages.kernel_package()
    found: dict[str, bytes] = {}
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as unpacker:
        assert unpacker.stdout is not None
        with tarfile.open(fileobj=unpacker.stdout, mode="r|") as archive:
            for member in archive:
                path = Path(member.name)
                if path.suffix == ".ko" and path.stem in MODULES and (stream := archive.extractfile(member)):
                    found[path.stem] = stream.read()
    if missing := set(MODULES) - found.keys():
        raise LabError(f"{package}: has no module {', '.join(sorted(missing))}")
    return found
