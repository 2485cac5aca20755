"""Files out of Debian's packages, of any architecture that apt knows: nothing is installed, and the machine's own apt
is left as it is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

from . import cache
from .errors import Missing
from .image import Say, say_nothing

#: Packages that only depend on the newest of others, and how these are called.
_STANDS_FOR = {"linux-image-686": "linux-image-", "xen-system-amd64": "xen-hypervisor-"}


def files(package: str, pattern: str, architecture: str = "amd64", say: Say = say_nothing) -> dict[str, bytes]:
    """The regular files in a package whose whole names match `pattern`, by their last name.

    Needs apt-get and its repositories. Raises Missing."""
    with tarfile.open(_package(package, architecture, say)) as archive:
        found = [member for member in archive if member.isfile() and re.fullmatch(pattern, member.name)]
        return {Path(member.name).name: archive.extractfile(member).read() for member in found}  # type: ignore[union-attr]


def _package(package: str, architecture: str, say: Say) -> Path:
    """The content of a package, an archive that is downloaded once."""
    folder = cache.root() / "downloads" / architecture
    kept = folder / f"{package}.tar"
    if kept.exists():
        return kept
    if shutil.which("apt-get") is None:
        raise Missing(f"the test needs Debian's package {package}", f"apt-get download {package}")
    with cache.locked(cache.root() / "locks" / "apt"):
        say(f"downloading {package} for {architecture}")
        options = _options(folder, architecture)
        place = folder / "unfinished"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        name = _real_name(package, options)
        for attempt in (["download", name], ["update"], ["download", name]):
            done = _apt(["apt-get", *options, *attempt], place)
            if got := list(place.glob("*.deb")):
                break
        else:
            error = " ".join(line for line in done.stderr.splitlines() if line.startswith("E:"))
            raise Missing(f"the package {name} could not be downloaded ({error})", f"apt-get download {name}")
        archive = place / "content"
        with archive.open("wb") as file:
            subprocess.run(["dpkg-deb", "--fsys-tarfile", str(got[0])], stdout=file, check=True, timeout=300)
        return archive.rename(kept)


def _options(folder: Path, architecture: str) -> list[str]:
    """Those of an apt with lists of its own for packages of another architecture; of this machine's: none."""
    if architecture == "amd64":
        return []
    for name in ("state/lists/partial", "cache/archives/partial"):
        (folder / "apt" / name).mkdir(parents=True, exist_ok=True)
    (folder / "apt" / "status").touch()
    own = {
        "Dir::State": folder / "apt" / "state",
        "Dir::State::status": folder / "apt" / "status",
        "Dir::Cache": folder / "apt" / "cache",
        "APT::Architecture": architecture,
        "APT::Architectures::": architecture,
    }
    return [word for option, value in own.items() for word in ("-o", f"{option}={value}")]


def _real_name(package: str, options: list[str]) -> str:
    """What the package stands for, or its own name."""
    prefix = _STANDS_FOR.get(package)
    if prefix is None:
        return package
    for update in (True, False):
        done = _apt(["apt-cache", *options, "depends", package], Path("/"))
        if done.returncode == 0 and done.stdout:
            break
        if update:
            _apt(["apt-get", *options, "update"], Path("/"))
    found = re.search(rf"Depends: ({prefix}\S+)", done.stdout)
    return found.group(1) if found else package


def _apt(command: list[str], place: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(
        command, cwd=place, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900
    )
