"""What the lab needs of the machine: emulators and small tools from Debian's packages, and a kernel that is never
installed, only unpacked under the cache."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from . import cache
from .errors import LabError, Missing

BOCHS_BIOS = Path("/usr/share/bochs/BIOS-bochs-latest")
BOCHS_VGA = Path("/usr/share/bochs/VGABIOS-lgpl-latest")
VGA_OTHER = Path("/usr/share/vgabios/vgabios.bin")
ISOLINUX = Path("/usr/lib/ISOLINUX/isolinux.bin")
LDLINUX = Path("/usr/lib/syslinux/modules/bios/ldlinux.c32")

#: The package whose dependency is the newest kernel of the kind that the lab boots: Debian's for clouds, small, with
#: virtio, PVH, both KVM modules and an LZ4-packed image.
KERNEL_META = "linux-image-cloud-amd64"


def _busybox_is_static() -> bool:
    path = shutil.which("busybox")
    return path is not None and not has_loader(Path(path).read_bytes())


def has_loader(elf: bytes) -> bool:
    """Whether an ELF64 executable is dynamic: one of its program headers is a PT_INTERP (type 3)."""
    start, size, count = int.from_bytes(elf[32:40], "little"), elf[54], elf[56]
    return any(elf[start + size * i : start + size * i + 4] == b"\3\0\0\0" for i in range(count))


class Need(NamedTuple):
    package: str
    present: Callable[[], bool]


def _command(name: str) -> Callable[[], bool]:
    return lambda: shutil.which(name) is not None


COMMON = (
    Need("gcc", _command("gcc")),
    Need("libc6-dev", lambda: any(Path("/usr/lib").glob("**/libc.a"))),
    Need("busybox-static", _busybox_is_static),
    Need("squashfs-tools", _command("mksquashfs")),
    Need("lz4", _command("lz4")),
    Need("util-linux", _command("setpriv")),
)
AMD = (Need("qemu-system-x86", _command("qemu-system-x86_64")),)
INTEL = (
    Need("bochs", _command("bochs-bin")),
    Need("bochsbios", BOCHS_BIOS.exists),
    Need("vgabios", lambda: BOCHS_VGA.exists() or VGA_OTHER.exists()),
    Need("isolinux", ISOLINUX.exists),
    Need("syslinux-common", LDLINUX.exists),
    Need("xorriso", _command("xorriso")),
)


def provide(vendors: set[str], say: Callable[[str], None] = lambda text: None) -> None:
    """Sees to it that the packages for hosts of these vendors ("amd", "intel") are there.

    Needs: nothing when they are; else root and apt's repositories. Raises Missing with the one command to run."""
    needs = COMMON + (AMD if "amd" in vendors else ()) + (INTEL if "intel" in vendors else ())
    wanted = [need.package for need in needs if not need.present()]
    if not wanted:
        return
    install = ["apt-get", "install", "-y", "--no-install-recommends", *wanted]
    if shutil.which("apt-get") is None:
        raise Missing("the lab needs " + ", ".join(wanted), "(on Debian or Ubuntu) " + " ".join(install))
    if os.geteuid() != 0:
        raise Missing("the lab needs " + ", ".join(wanted), "sudo " + " ".join(install))
    say("installing " + " ".join(wanted))
    with cache.locked(cache.root() / "locks" / "apt"):
        _apt(install)
    still = [need.package for need in needs if not need.present()]
    if still:
        raise LabError(f"{', '.join(still)}: installed, but what the lab wants of it is not there")


def _apt(command: list[str]) -> None:
    """Runs an apt-get command, once more after `apt-get update` if it fails: lists may be missing or old."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    for attempt in (command, ["apt-get", "update"], command):
        try:
            done = subprocess.run(
                attempt, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900
            )
        except subprocess.TimeoutExpired as slow:
            raise LabError(f"{' '.join(attempt)}: did not end within {slow.timeout:.0f} s") from slow
        if attempt is command and done.returncode == 0:
            return
    lines = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines()[-1:]
    raise LabError(f"{' '.join(command)}: " + " ".join(lines))


def kernel_package(*, refresh: bool = False, say: Callable[[str], None] = lambda text: None) -> Path:
    """The file of the kernel's package: $PYHV_LAB_KERNEL, else what the cache has, else downloaded by apt-get.

    With `refresh` the newest one that apt knows is looked for even if the cache has one."""
    if own := os.environ.get("PYHV_LAB_KERNEL"):
        path = Path(own)
        if not path.is_file():
            raise LabError(f"{own}: PYHV_LAB_KERNEL names no file; it should name a {KERNEL_META} .deb")
        return path
    folder = cache.root() / "downloads"
    have = sorted(folder.glob("linux-image-*.deb"), key=lambda path: path.stat().st_mtime)
    if have and not refresh:
        return have[-1]
    if shutil.which("apt-get") is None:
        raise Missing("the lab needs the package of Debian's cloud kernel", f"apt-get download {KERNEL_META}'s newest")
    with cache.locked(cache.root() / "locks" / "apt"):
        name = _kernel_name()
        temporary = cache.root() / "unfinished" / "kernel-package"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        say(f"downloading {name}")
        done = subprocess.run(
            ["apt-get", "download", name], cwd=temporary, capture_output=True, text=True, timeout=900,
            env={**os.environ, "LC_ALL": "C"}, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        got = list(temporary.glob("*.deb"))
        if done.returncode or len(got) != 1:
            error = " ".join(line for line in done.stderr.splitlines() if line.startswith("E:"))
            raise Missing(f"the kernel package {name} could not be downloaded ({error})", f"apt-get download {name}")
        folder.mkdir(parents=True, exist_ok=True)
        return got[0].rename(folder / got[0].name)


def _kernel_name() -> str:
    def ask() -> str | None:
        done = subprocess.run(["apt-cache", "depends", KERNEL_META], capture_output=True, text=True, timeout=120)
        found = re.search(r"Depends: (linux-image-\S+)", done.stdout)
        return found.group(1) if found else None

    name = ask()
    if name is None and os.geteuid() == 0:
        subprocess.run(["apt-get", "update"], capture_output=True, timeout=900, stdin=subprocess.DEVNULL)
        name = ask()
    if name is None:
        raise Missing(f"apt knows no package {KERNEL_META}", "sudo apt-get update")
    return name


# -------------------------------------------------------------------------------------------- the kernel --

_UNPACKERS = {
    b"\x02\x21\x4c\x18": ("lz4", "-dc"),
    b"\x28\xb5\x2f\xfd": ("zstd", "-dcq"),
    b"\xfd7zXZ\x00": ("xz", "-dc"),
    b"\x1f\x8b": ("gzip", "-dc"),
}


def elf_of_bzimage(image: bytes) -> bytes:
    """The ELF kernel inside a bzImage, found by its header (Linux Documentation/arch/x86/boot.rst: setup_sects at
    0x1f1, payload_offset at 0x248, payload_length at 0x24c; the payload's last 4 bytes are the unpacked size)."""
    if image[0x1FE:0x200] != b"\x55\xaa" or image[0x202:0x206] != b"HdrS":
        raise LabError("the kernel package's vmlinuz is no bzImage")
    protected = (image[0x1F1] + 1) * 512
    offset = int.from_bytes(image[0x248:0x24C], "little")
    length = int.from_bytes(image[0x24C:0x250], "little")
    payload = image[protected + offset : protected + offset + length]
    for magic, command in _UNPACKERS.items():
        if payload.startswith(magic):
            done = subprocess.run(command, input=payload[:-4], capture_output=True, timeout=300)
            if done.stdout[:4] == b"\x7fELF":
                return done.stdout
            raise LabError(f"the kernel could not be unpacked by {command[0]}: {done.stderr.decode().strip()}")
    raise LabError(f"the kernel is packed in a way the lab does not know (it begins with {payload[:4].hex()})")


def module_dependencies(module: bytes) -> list[str]:
    """The modules that a kernel module names in its .modinfo section ("depends=a,b")."""
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    return [name.decode() for name in found.group(1).split(b",") if name] if found else []


#: In the order of loading: those without which the root file system cannot be mounted, and the rest.
MODULES = {
    "amd": (("virtio_mmio", "virtio_blk", "squashfs"), ("virtio_net", "virtio_console", "kvm-amd")),
    "intel": (("ata_piix", "sd_mod", "squashfs"), ("kvm-intel",)),
}


def kernel(say: Callable[[str], None] = lambda text: None) -> Path:
    """The unpacked kernel: vmlinux (ELF, for PVH), vmlinuz, release, modules/*.ko, and for each vendor two lists of
    modules in the order of loading, amd.root, amd.rest, intel.root, intel.rest."""
    package = kernel_package(say=say)
    about = package.stat()  # hashing its content would cost more than all else that a start does
    inputs = {"package": [package.name, about.st_size, about.st_mtime_ns], "recipe": cache.file_digest(Path(__file__))}
    return cache.artefact("kernel", inputs, lambda folder: _unpack(package, folder, say))


def _unpack(package: Path, folder: Path, say: Callable[[str], None]) -> None:
    say(f"unpacking {package.name}")
    modules: dict[str, bytes] = {}
    builtin: set[str] = set()
    image = b""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as unpacker:
        assert unpacker.stdout is not None
        with tarfile.open(fileobj=unpacker.stdout, mode="r|") as archive:
            for member in archive:
                path = Path(member.name)
                stream = archive.extractfile(member) if member.isfile() else None
                if stream is None:
                    continue
                if path.suffix == ".ko":
                    modules[path.stem.replace("-", "_")] = stream.read()
                elif path.name.startswith("vmlinuz-"):
                    image = stream.read()
                    (folder / "release").write_text(path.name.removeprefix("vmlinuz-") + "\n")
                elif path.name == "modules.builtin":
                    builtin = {Path(line).stem.replace("-", "_") for line in stream.read().decode().split()}
    if not image or not modules:
        raise LabError(f"{package}: holds no kernel with modules")
    (folder / "vmlinuz").write_bytes(image)
    (folder / "vmlinux").write_bytes(elf_of_bzimage(image))
    (folder / "modules").mkdir()

    def closure(wanted: str, done: list[str]) -> None:
        wanted = wanted.replace("-", "_")
        if wanted in done or wanted in builtin:
            return
        if wanted not in modules:
            raise LabError(f"{package}: has no module {wanted}")
        for other in module_dependencies(modules[wanted]):
            closure(other, done)
        done.append(wanted)

    for vendor, (root, rest) in MODULES.items():
        order: list[str] = []
        for wanted in root:
            closure(wanted, order)
        first = len(order)
        for wanted in rest:
            closure(wanted, order)
        (folder / f"{vendor}.root").write_text("".join(f"{name}\n" for name in order[:first]))
        (folder / f"{vendor}.rest").write_text("".join(f"{name}\n" for name in order[first:]))
        for name in order:
            target = folder / "modules" / f"{name}.ko"
            target.write_bytes(modules[name])
            subprocess.run(["strip", "-g", str(target)], check=True, timeout=60)
