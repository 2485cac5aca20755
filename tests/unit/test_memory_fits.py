"""A guest that the host's memory cannot hold is refused before any of it is mapped. The host is a small one that is
made up here: a check that fails must not take the machine of the tests down."""

from __future__ import annotations

from pathlib import Path

import pytest

import pyhv
from pyhv.errors import BadInput
from pyhv.vm import memory

GIB = 1 << 30


@pytest.fixture(autouse=True)
def small_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_available", lambda: GIB)
    monkeypatch.setattr(memory, "_found_limits", [])


def problem(size: int, overcommit: bool = False) -> str:
    with pytest.raises(BadInput) as error:
        memory.check_fits(size, "memory x", overcommit)
    return str(error.value)


def test_what_fits_is_free_memory_less_the_kernels_tables() -> None:
    most = GIB * 2048 // 2053  # 5 MiB for 2 GiB
    memory.check_fits(most, "memory x")
    assert problem(most + 4096) == (
        "memory x: needs 1022M for the guest and 3M for the kernel's tables of it, and this host has 1G of memory "
        "free; the most is 1021M, with overcommit=True 204G"
    )


def test_overcommit_allows_the_guests_part_and_never_the_kernels() -> None:
    memory.check_fits(200 * GIB, "memory x", overcommit=True)
    assert problem(8 << 40, overcommit=True).startswith("memory x: needs 8T for the guest and 21G for the kernel's")


def test_nothing_is_mapped_for_a_machine_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.GuestMemory, "__init__", lambda *_: pytest.fail("it was mapped"))
    with pytest.raises(BadInput, match="memory 2G: needs 2G for the guest"):
        pyhv.Machine("hello", memory="2G")
    with pytest.raises(BadInput, match="memory 300G: needs 300G for the guest"):
        pyhv.Machine("hello", memory="300G", overcommit=True)


@pytest.mark.parametrize(
    ("line", "base", "limit", "usage", "prefix"),
    [
        ("0::/a/b", "", "memory.max", "memory.current", ""),
        ("4:cpu,memory:/a/b", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ],
)
def test_the_limits_of_control_groups_count(
    line: str, base: str, limit: str, usage: str, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each level; what pages of files take in one is given back when it is asked for."""
    (tmp_path / "mine").write_text(f"7:pids:/a\n{line}\n")
    monkeypatch.setattr(memory, "_CGROUPS", str(tmp_path))
    monkeypatch.setattr(memory, "_MY_GROUPS", str(tmp_path / "mine"))
    inner = tmp_path / base / "a" / "b"
    inner.mkdir(parents=True)

    def group(path: Path, most: str, used: int, files: int) -> None:
        (path / limit).write_text(most + "\n")
        (path / usage).write_text(f"{used}\n")
        (path / "memory.stat").write_text(f"{prefix}active_file {files}\n{prefix}inactive_file {files}\nanon 7\n")

    def free() -> tuple[int, str]:
        monkeypatch.setattr(memory, "_found_limits", None)
        return memory.free_memory()

    group(inner, "max" if not base else str(0x7FFFFFFFFFFFF000), 5 << 20, 0)
    assert free() == (GIB, "this host")
    group(inner.parent, str(100 << 20), 50 << 20, 10 << 20)
    assert free() == (70 << 20, f"control group /{base}{'/' if base else ''}a")
    group(inner, str(64 << 20), 90 << 20, 0)
    assert free()[0] == 0
    (tmp_path / "mine").write_text(line.replace("/a/b", "/outside") + "\n")
    group(tmp_path / base, str(20 << 20), 0, 0)
    assert free()[0] == 20 << 20, "in a container, whose group is not where the path says"


def test_this_hosts_free_memory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    free, where = memory.free_memory()
    assert 4096 < free < 1 << 50 and where
