"""A Linux guest for the hosts: the lab's kernel as bzImage and as ELF, and an initramfs whose first process tells what
it finds (guest/linux.c)."""

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


def guest(say: image.Say = image.say_nothing) -> Path:
    """The folder with `vmlinuz`, `vmlinux` and `initrd`."""
    kernel, source = packages.kernel(say), HERE / "guest" / "linux.c"

    def build(folder: Path) -> None:
        say("building the Linux guest")
        init = folder / "init"
        compile_init(source, init)
        entries = [("dev", stat.S_IFDIR | 0o755, b""), ("modules", stat.S_IFDIR | 0o755, b"")]
        entries += [(f"modules/{name}.ko", stat.S_IFREG | 0o644, data) for name, data in _modules().items()]
        entries.append(("init", stat.S_IFREG | 0o755, init.read_bytes()))
        (folder / "initrd").write_bytes(image.cpio(entries))
        for name in ("vmlinuz", "vmlinux"):
            (folder / name).hardlink_to(kernel / name)

    inputs = {"kernel": kernel.name, "source": cache.file_digest(source), "recipe": cache.file_digest(Path(__file__))}
    return cache.artefact("linux-guest", inputs, build)


def compile_init(source: Path, target: Path) -> None:
    """A guest's first process. Raises LabError."""
    command = ["gcc", "-static", "-O2", "-march=x86-64", "-Wall", "-s", "-o", str(target), str(source)]
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
