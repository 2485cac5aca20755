"""Where the lab keeps what is costly to make, and the rule that nobody ever takes a half-made piece.

An artefact is a folder named after what it is and a hash of everything that went into it. It is made in a folder of
another name and renamed when it is whole, under a lock that only one maker holds; so an interrupted maker leaves only
what the next one deletes first. A folder under the final name is whole, and is never changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

MANIFEST = "manifest.json"
#: When an artefact is made, older ones of its name are deleted that nobody has used for so long (seconds): all beyond
#: the newest three after the first time, those too after the second.
KEEP_MANY, KEEP_ANY = 3600, 14 * 24 * 3600


def root() -> Path:
    """The cache folder: $PYHV_LAB_CACHE, else $XDG_CACHE_HOME/pyhv-lab, else ~/.cache/pyhv-lab."""
    if own := os.environ.get("PYHV_LAB_CACHE"):
        return Path(own).resolve()
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base).resolve() / "pyhv-lab"


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    about = path.stat()
    return _digest(path, about.st_ino, about.st_size, about.st_mtime_ns)


@functools.cache
def _digest(path: Path, inode: int, size: int, mtime: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tree_digest(path: Path) -> str:
    """SHA-256 over the names, modes, link targets and contents of all that is under a folder, in hex.

    Byte code (__pycache__) is left out."""
    total = hashlib.sha256()
    for item in sorted(path.rglob("*")):
        if "__pycache__" in item.parts:
            continue
        name = item.relative_to(path).as_posix()
        if item.is_symlink():
            total.update(f"link {name} {item.readlink()}\n".encode())
        elif item.is_file():
            total.update(f"file {name} {item.stat().st_mode & 0o111:o} {file_digest(item)}\n".encode())
    return total.hexdigest()


def key(inputs: Mapping[str, object]) -> str:
    """The hash that names an artefact: 16 hex digits over the inputs, whatever their order."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds an exclusive lock on a file; gives False, without `wait`, where somebody else holds it.

    The kernel drops the lock when its holder dies, so there are no stale locks. The file itself stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _whole(folder: Path) -> bool:
    """Whether a finished artefact is still as its maker left it, judged by the sizes of its files."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def artefact(
    name: str,
    inputs: Mapping[str, object],
    build: Callable[[Path], object],
    *,
    accept: Callable[[Path], bool] = lambda folder: True,
    base: Path | None = None,
) -> Path:
    """The folder of the artefact `name` made of `inputs`; made now by `build(folder)` if there is none yet.

    `inputs` are whatever JSON can hold and must name everything that the result depends on. `accept` may refuse a
    whole artefact for what no hash can say (a snapshot from a machine whose clock has another rate): it is made anew.
    What `build` raises is raised here; then nothing is left behind.
    """
    base = base or root()
    final = base / f"{name}-{key(inputs)}"

    def usable() -> bool:
        return _whole(final) and accept(final)

    if usable():
        os.utime(final)
        return final
    with locked(base / "locks" / final.name):
        if usable():  # somebody else made it while we waited
            return final
        temporary = base / "unfinished" / final.name
        for leftover in (temporary, final):
            if leftover.exists():
                shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
        try:
            build(temporary)
            files = {
                item.relative_to(temporary).as_posix(): item.stat().st_size
                for item in sorted(temporary.rglob("*"))
                if item.is_file() and not item.is_symlink()
            }
            manifest = {"inputs": dict(inputs), "files": files}
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
            temporary.rename(final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    _prune(base, name, final)
    return final


def _prune(base: Path, name: str, keep: Path) -> None:
    used: dict[Path, float] = {}
    for old in base.glob(f"{name}-{'[0-9a-f]' * 16}"):
        with contextlib.suppress(OSError):
            used[old] = old.stat().st_mtime
    for place, old in enumerate(sorted(used, key=lambda path: -used[path])):
        limit = KEEP_ANY if place < 3 else KEEP_MANY
        if old != keep and time.time() - used[old] > limit:
            with locked(base / "locks" / old.name, wait=False) as mine:
                if mine:
                    shutil.rmtree(old, ignore_errors=True)
