"""The system inside a host: an initramfs with the agent and the kernel's modules, and a root file system.

The root holds busybox, the Python that runs the lab (so that whatever was compiled for the one runs in the other), with
the shared libraries it needs, pytest, and the C half of cffi. Every file keeps the path it has on this machine: an
interpreter's idea of where its library is holds true without patching. The code under test is not part of it: it is
copied into a running host, so that the snapshot of a booted host stays good while the code changes.
"""

from __future__ import annotations

import compileall
import importlib.metadata
import importlib.util
import os
import py_compile
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path

from . import cache, packages
from .errors import LabError

HERE = Path(__file__).resolve().parent
#: Where the Python packages of the image are, inside.
SITE = "/usr/lib/pyhv-lab"
#: Distributions that go into the image with all that they require (pure Python), and single extension modules.
DISTRIBUTIONS = ("pytest",)
EXTENSIONS = ("_cffi_backend",)

#: Bytes in a cylinder of 16 heads and 63 sectors.
CYLINDER = 16 * 63 * 512

#: Parts of the standard library that no test in a host needs; they are four fifths of its size.
_LEAVE_OUT = {
    "__pycache__", "test", "tests", "idlelib", "tkinter", "turtledemo", "turtle.py", "ensurepip", "lib2to3",
    "pydoc_data", "site-packages", "dist-packages", "distutils", "venv", "msilib", "wsgiref", "dbm", "curses",
    "xmlrpc", "sqlite3",
}  # fmt: skip
_LEAVE_OUT_MODULES = re.compile(r"(_test|_ctypes_test|xx|_tkinter|_dbm|_gdbm|_sqlite3|_curses|readline|nis|_codecs_)")


Say = Callable[[str], None]


def say_nothing(text: str) -> None:
    pass


# ------------------------------------------------------------------------------------------------- agent --


def agent(say: Say = say_nothing) -> Path:
    """The folder with the compiled agent, `init`."""
    source = HERE / "guest" / "agent.c"

    def build(folder: Path) -> None:
        say("compiling the agent")
        command = ["gcc", "-static", "-O2", "-march=x86-64", "-Wall", "-o", str(folder / "init"), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise LabError(f"{' '.join(command)}: {done.stderr.strip()}")
        subprocess.run(["strip", str(folder / "init")], check=True, timeout=60)

    return cache.artefact("agent", {"source": cache.file_digest(source), "recipe": _recipe()}, build)


def _recipe() -> str:
    return cache.file_digest(Path(__file__))


# -------------------------------------------------------------------------------------------- initramfs --


def cpio(entries: Iterable[tuple[str, int, bytes]]) -> bytes:
    """A cpio archive in the "newc" format (Linux Documentation/driver-api/early-userspace/buffer-format.rst) of
    (path, mode, content), owned by root, with no times in it: equal entries give equal bytes."""
    out = bytearray()
    for number, (path, mode, content) in enumerate([*entries, ("TRAILER!!!", 0, b"")], start=1):
        name = path.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name), 0)
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        out += bytes(-len(out) % 4) + content
        out += bytes(-len(out) % 4)
    return bytes(out)


def initramfs(vendor: str, say: Say = say_nothing) -> Path:
    """The folder with `initramfs.cpio` for hosts of a vendor, `amd` or `intel`: the agent and its modules."""
    kernel, init = packages.kernel(say), agent(say)

    def build(folder: Path) -> None:
        root, rest = ((kernel / f"{vendor}.{part}").read_text().split() for part in ("root", "rest"))
        entries = [("dev", stat.S_IFDIR | 0o755, b""), ("root", stat.S_IFDIR | 0o755, b"")]
        entries.append(("modules", stat.S_IFDIR | 0o755, b""))
        for name in (*root, *rest):
            module = (kernel / "modules" / f"{name}.ko").read_bytes()
            entries.append((f"modules/{name}.ko", stat.S_IFREG | 0o644, module))
        entries.append(("modules/order", stat.S_IFREG | 0o644, "".join(f"{name}\n" for name in root).encode()))
        entries.append(("init", stat.S_IFREG | 0o755, (init / "init").read_bytes()))
        (folder / "initramfs.cpio").write_bytes(cpio(entries))

    inputs = {"kernel": kernel.name, "agent": init.name, "vendor": vendor, "recipe": _recipe()}
    return cache.artefact(f"initramfs-{vendor}", inputs, build)


def boot_disc(command_line: str, say: Say = say_nothing) -> Path:
    """The folder with `boot.iso`, from which a Bochs host starts: isolinux, the kernel and the initramfs."""
    kernel, archive = packages.kernel(say), initramfs("intel", say)

    def build(folder: Path) -> None:
        say("building the boot disc of the Intel hosts")
        tree = folder / "tree"
        tree.mkdir()
        shutil.copyfile(packages.ISOLINUX, tree / "isolinux.bin")
        shutil.copyfile(packages.LDLINUX, tree / "ldlinux.c32")
        shutil.copyfile(kernel / "vmlinuz", tree / "vmlinuz")
        shutil.copyfile(archive / "initramfs.cpio", tree / "initrd")
        (tree / "isolinux.cfg").write_text(
            f"default lab\nprompt 0\ntimeout 0\nlabel lab\n kernel vmlinuz\n initrd initrd\n append {command_line}\n"
        )
        command = [
            "xorriso", "-as", "mkisofs", "-quiet", "-o", str(folder / "boot.iso"), "-b", "isolinux.bin",
            "-c", "boot.cat", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table", str(tree),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise LabError(f"xorriso: {done.stderr.strip()}")
        shutil.rmtree(tree)

    inputs = {
        "kernel": kernel.name, "initramfs": archive.name, "command line": command_line, "recipe": _recipe(),
        "loader": [cache.file_digest(path) for path in (packages.ISOLINUX, packages.LDLINUX)],
    }  # fmt: skip
    return cache.artefact("boot-intel", inputs, build)


# ------------------------------------------------------------------------------------- root file system --


def _libraries(binary: Path) -> set[Path]:
    """The shared libraries and the loader that a binary needs, by ldd's word, under the names it found them by."""
    done = subprocess.run(["ldd", str(binary)], capture_output=True, text=True, timeout=60)
    if "not found" in done.stdout:
        raise LabError(f"{binary}: a shared library is missing: {done.stdout.strip()}")
    return {Path(path) for path in re.findall(r"(?:=> |^\s+)(/\S+) \(0x", done.stdout, re.MULTILINE)}


def _require(names: Iterable[str]) -> list[importlib.metadata.Distribution]:
    """These distributions and what they require, on this Python and platform."""
    done: dict[str, importlib.metadata.Distribution] = {}
    todo = list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in done:
            continue
        try:
            done[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise LabError(
                f"the Python that runs the lab, {sys.executable}, has no {name}; run the lab with the project's "
                "virtual environment"
            ) from None
        for text in done[name].requires or ():
            # A requirement with a marker is for other Pythons and platforms, or an extra.
            if ";" not in text and (match := re.match(r"[A-Za-z0-9._-]+", text)):
                todo.append(match.group())
    return list(done.values())


def _digest_of_python() -> dict[str, object]:
    """What the image's Python part depends on."""
    executable = Path(sys.executable).resolve()
    extensions = {}
    for name in EXTENSIONS:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise LabError(f"the Python that runs the lab, {sys.executable}, has no {name}; run the lab with the "
                           "project's virtual environment")  # fmt: skip
        extensions[name] = cache.file_digest(Path(spec.origin))
    return {
        "version": sys.version,
        "executable": str(executable),
        "digest": cache.file_digest(executable),
        "distributions": sorted(f"{item.name} {item.version}" for item in _require(DISTRIBUTIONS)),
        "extensions": extensions,
    }


def root(say: Say = say_nothing) -> Path:
    """The folder with `root.squashfs`, the same for every host."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise LabError("busybox is missing")
    inputs = {"python": _digest_of_python(), "busybox": cache.file_digest(Path(busybox)), "recipe": _recipe()}

    def build(folder: Path) -> None:
        say("building the root file system of the hosts")
        tree = folder / "tree"
        _lay_out(tree, Path(busybox))
        _add_python(tree)
        command = ["mksquashfs", str(tree), str(folder / "root.squashfs"), "-noappend", "-all-root", "-no-progress",
                   "-noI", "-noD", "-noF", "-noX", "-mkfs-time", "0", "-all-time", "0"]  # fmt: skip
        # mksquashfs takes the time options alone; the environment's idea of it makes it stop.
        environment = {key: value for key, value in os.environ.items() if key != "SOURCE_DATE_EPOCH"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        if done.returncode:
            raise LabError(f"mksquashfs: {done.stderr.strip()}")
        shutil.rmtree(tree)
        # Bochs counts a disk in cylinders of 16 heads and 63 sectors, and shows no part of one.
        size = (folder / "root.squashfs").stat().st_size
        os.truncate(folder / "root.squashfs", -(-size // CYLINDER) * CYLINDER)

    return cache.artefact("root", inputs, build)


def _lay_out(tree: Path, busybox: Path) -> None:
    folders = ["usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "dev", "proc", "sys", "tmp", "run", "etc", "root", "var"]
    for name in folders:
        (tree / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (tree / name).symlink_to(f"usr/{name}")
    shutil.copy2(busybox, tree / "usr/bin/busybox")
    names = subprocess.run([str(busybox), "--list"], capture_output=True, text=True, check=True, timeout=30).stdout
    for name in names.split():
        if name != "busybox":
            (tree / "usr/bin" / name).symlink_to("busybox")
    (tree / "etc/passwd").write_text("root:x:0:0:root:/tmp:/bin/sh\n")
    (tree / "etc/group").write_text("root:x:0:\n")
    hosts = "".join(f"10.77.0.{number} host{number}\n" for number in range(1, 17))
    (tree / "etc/hosts").write_text("127.0.0.1 localhost\n" + hosts)


def _place(tree: Path, path: Path) -> Path:
    """The place in the image of a file of this machine: the same path, its folder's links followed (/lib is one)."""
    parent = path.parent.resolve()
    inside = tree / parent.relative_to("/")
    if not inside.exists():
        inside.mkdir(parents=True)
    return inside / path.name


def _add_python(tree: Path) -> None:
    executable = Path(sys.executable).resolve()
    standard = Path(sysconfig.get_path("stdlib", vars={"base": sys.base_prefix, "installed_base": sys.base_prefix}))
    binaries = [executable]
    shutil.copy2(executable, _place(tree, executable))

    def ignore(folder: str, names: list[str]) -> list[str]:
        if Path(folder).name == "lib-dynload":
            return [name for name in names if _LEAVE_OUT_MODULES.match(name)]
        top = Path(folder) == standard
        return [
            name
            for name in names
            if name == "__pycache__" or (top and (name in _LEAVE_OUT or name.startswith("config-")))
        ]

    library = _place(tree, standard)
    shutil.copytree(standard, library, ignore=ignore, symlinks=False, ignore_dangling_symlinks=True)
    binaries += (library / "lib-dynload").glob("*.so")
    compile_all(library, str(standard))

    site = tree / SITE.lstrip("/")
    site.mkdir(parents=True)
    for distribution in _require(DISTRIBUTIONS):
        for item in distribution.files or ():
            if item.suffix in (".py", ".typed") and ".." not in item.parts:
                target = site / item
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(distribution.locate_file(item), target)  # type: ignore[arg-type]
            elif item.parts[0].endswith(".dist-info") and item.name in ("METADATA", "entry_points.txt"):
                (site / item).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(distribution.locate_file(item), site / item)  # type: ignore[arg-type]
    for name in EXTENSIONS:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        binaries.append(Path(shutil.copy2(spec.origin, site)))
    compile_all(site, SITE)

    libraries = set().union(*(_libraries(binary) for binary in binaries))
    # pthread_exit() opens this one by its name, where a program ends with threads that still run.
    libraries |= {path.with_name("libgcc_s.so.1") for path in libraries if path.name == "libc.so.6"}
    for path in libraries:
        place = _place(tree, path)
        if not place.exists():
            shutil.copyfile(path, place)
            place.chmod(0o755)
    link = tree / "usr/bin/python3"
    if not link.exists():
        link.symlink_to(executable)


def compile_all(folder: Path, inside: str) -> None:
    """Byte code for all modules under a folder that will be `inside` in the host, never checked against the sources'
    times: compiling is slow under emulation, and nothing changes there."""
    compileall.compile_dir(
        folder, quiet=2, stripdir=str(folder), prependdir=inside,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )  # fmt: skip
