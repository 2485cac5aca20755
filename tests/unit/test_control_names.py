"""Names of VMs: who has one, what a dead VM leaves, and directories that cannot be trusted."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyhv.control import names
from pyhv.errors import BadInput

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def leave_stale(base: Path, name: str) -> None:
    """What a VM leaves that was killed."""
    (base / "pyhv").mkdir(mode=0o700, exist_ok=True)
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(base / "pyhv" / f"{name}.sock"))
    dead.listen()
    dead.close()


@pytest.mark.parametrize("name", ["a", "7", "web-1.test_A", "a" * 64])
def test_good_names(name: str) -> None:
    names.check_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "-a", "_a", "a/b", "a b", "a" * 65, "\u00e4", "a\n", "a\0"])
def test_bad_names(name: str) -> None:
    with pytest.raises(BadInput, match="is not a name for a VM"):
        names.check_name(name)


@given(st.text(max_size=70))
def test_a_good_name_is_a_file_name_of_its_own(name: str) -> None:
    with contextlib.suppress(BadInput):
        names.check_name(name)
        assert os.path.basename(f"/x/{name}.sock") == f"{name}.sock"
        assert name.isascii() and name.isprintable() and not name.startswith((".", "-"))


# ---------------------------------------------------------------------------------------------- the directory


def test_the_directory_is_made_for_the_user_alone(base: Path) -> None:
    old = os.umask(0)
    try:
        claim = names.claim("a")
    finally:
        os.umask(old)
    with claim:
        assert stat.S_IMODE(os.stat(base / "pyhv").st_mode) == 0o700
        found = os.stat(base / "pyhv" / "a.sock")
        assert stat.S_ISSOCK(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o600
    assert os.listdir(base / "pyhv") == []


def test_without_xdg_runtime_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    assert names.directory_path() == f"/tmp/pyhv-{os.geteuid()}"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "")
    assert names.directory_path() == f"/tmp/pyhv-{os.geteuid()}"


def test_who_only_looks_makes_no_directory(base: Path) -> None:
    with names.Directory() as directory:
        assert directory.names() == []
        assert directory.connect("a") is None
    assert os.listdir(base) == []


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701, 0o1755, 0o500])
@pytest.mark.parametrize("create", [False, True])
def test_a_directory_that_is_open_to_others(base: Path, mode: int, create: bool) -> None:
    (base / "pyhv").mkdir()
    (base / "pyhv").chmod(mode)
    said = f"has the mode {mode & 0o777:04o} instead of 0700; remove it, or set XDG_RUNTIME_DIR"
    with pytest.raises(BadInput, match=said):
        names.Directory(create)


@ROOT_ONLY
def test_a_directory_of_another_user(base: Path) -> None:
    (base / "pyhv").mkdir(mode=0o700)
    os.chown(base / "pyhv", 4711, -1)
    with pytest.raises(BadInput, match="belongs to the user with the number 4711; set XDG_RUNTIME_DIR"):
        names.claim("a")


def test_a_directory_that_may_not_be_looked_into(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as root's: whoever may not open it cannot remove it either."""

    def refuse(*words: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(names.os, "open", refuse)
    with pytest.raises(BadInput, match="pyhv: cannot be opened: Permission denied; set XDG_RUNTIME_DIR"):
        names.Directory()


def test_a_symbolic_link_is_no_directory(base: Path) -> None:
    (base / "elsewhere").mkdir(mode=0o700)
    (base / "pyhv").symlink_to(base / "elsewhere")
    with pytest.raises(BadInput, match="pyhv: is not a directory"):
        names.claim("a")
    assert os.listdir(base / "elsewhere") == []


def test_a_file_is_no_directory(base: Path) -> None:
    (base / "pyhv").write_text("")
    with pytest.raises(BadInput, match="pyhv: is not a directory"):
        names.claim("a")


@pytest.mark.parametrize(
    ("value", "problem"), [("run/user", "is no absolute path"), ("/nonexistent/x", "cannot be made")]
)
def test_a_bad_xdg_runtime_dir(monkeypatch: pytest.MonkeyPatch, value: str, problem: str) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", value)
    with pytest.raises(BadInput, match=problem):
        names.claim("a")


def test_a_path_that_is_too_long_for_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    with names.claim("a" * 64):
        names.connect("a" * 64).close()


# --------------------------------------------------------------------------------------------------- claiming


def test_a_name_is_one_vms(base: Path) -> None:
    with names.claim("a"):
        with pytest.raises(BadInput, match="name a: is that of a VM that runs; choose another, or see pyhv ls"):
            names.claim("a")
        with names.claim("b"):
            pass
        names.connect("a").close()
    with names.claim("a"):  # free again
        pass


def test_a_busy_vm_keeps_its_name(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its backlog is full: nobody can connect, and yet it lives."""
    waiting = []
    monkeypatch.setattr(names, "_BUSY", 0.01)
    with names.claim("a") as claim, names.Directory() as directory:
        claim.listener.listen(0)
        with pytest.raises(names.HostError, match="too busy or stopped"):
            while True:
                waiting.append(directory.connect("a"))
        with pytest.raises(names.HostError, match="too busy or stopped"):
            names.connect("a")
        with pytest.raises(BadInput, match="is that of a VM that runs"):
            names.claim("a")
        assert names.live_names(directory) == ["a"]
    for connection in waiting:
        assert connection is not None
        connection.close()


def test_what_a_dead_vm_left_is_removed(base: Path) -> None:
    for name in ("a", "b", "c"):
        leave_stale(base, name)
    with names.claim("a"), names.Directory() as directory:
        assert directory.names() == ["a", "b", "c"]
        with pytest.raises(BadInput, match="b: has ended: its process was killed or has crashed; pyhv status b"):
            names.connect("b")
        assert names.live_names(directory) == ["a"]
        assert sorted(os.listdir(base / "pyhv")) == ["a.sock", "b.ended", "c.ended"]


def test_the_nearest_name(base: Path) -> None:
    said = r"tickre: there is no running VM of this name; did you mean ticker\?"
    with names.claim("ticker"), pytest.raises(BadInput, match=said):
        names.connect("tickre")
    with pytest.raises(BadInput, match="none runs at all"):
        names.connect("ticker")


def test_what_is_no_socket_is_left_alone(base: Path) -> None:
    (base / "pyhv").mkdir(mode=0o700)
    (base / "pyhv" / "a.sock").write_text("precious")
    with pytest.raises(BadInput, match=r"a\.sock: is no socket; remove it"):
        names.claim("a")
    with names.Directory() as directory:
        assert names.live_names(directory) == []
    assert (base / "pyhv" / "a.sock").read_text() == "precious"


def test_a_name_that_somebody_else_has_in_the_meantime_is_not_removed(base: Path) -> None:
    with names.claim("a") as first:
        os.unlink(base / "pyhv" / "a.sock")  # by hand
        with names.claim("a"):
            first.release()
            names.connect("a").close()


def test_other_files_are_no_names(base: Path) -> None:
    (base / "pyhv").mkdir(mode=0o700)
    for name in (".sock", ".a.sock", "a.sock.old", "b", "-x.sock"):
        (base / "pyhv" / name).write_text("")
    with names.Directory() as directory:
        assert directory.names() == []


@contextlib.contextmanager
def starters(count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that claim the name a, all at once when they are told, and keep it until their stdin ends."""
    code = (
        "import sys\nfrom pyhv.control import names\nfrom pyhv.errors import BadInput\nprint('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "try:\n    with names.claim('a'):\n        print('mine', flush=True)\n        sys.stdin.read()\n"
        "except BadInput as error:\n    print(error, flush=True)\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_of_many_starters_one_gets_the_name(base: Path) -> None:
    leave_stale(base, "a")  # which all of them want to remove
    with starters(6) as processes:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        said = [process.stdout.readline() for process in processes if process.stdout is not None]
        assert sorted("mine" in line for line in said) == [False] * 5 + [True], said
        names.connect("a").close()
        winner = processes[[("mine" in line) for line in said].index(True)]
        winner.kill()
        winner.wait()
        with names.claim("a"):  # stale at once
            pass


def test_threads_that_race_for_a_name(base: Path) -> None:
    for _ in range(20):
        leave_stale(base, "a")
        claims: list[names.Claim] = []
        refused: list[BadInput] = []
        barrier = threading.Barrier(4)

        def start(
            barrier: threading.Barrier = barrier, claims: list[names.Claim] = claims, refused: list[BadInput] = refused
        ) -> None:
            barrier.wait()
            try:
                claims.append(names.claim("a"))
            except BadInput as error:
                refused.append(error)

        threads = [threading.Thread(target=start) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(claims), len(refused)) == (1, 3)
        claims[0].release()
        assert os.listdir(base / "pyhv") == []


# ------------------------------------------------------------------------------------------ a name that is handed over


@contextlib.contextmanager
def holder(name: str = "a") -> Iterator[subprocess.Popen[str]]:
    """Another process that has the name."""
    with starters(1) as (process,):
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "mine\n"
        yield process


def owner(name: str) -> int:
    with names.connect(name) as connection:
        return struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]


def test_a_name_is_taken_over(base: Path) -> None:
    with holder() as process:
        with names.claim("a", predecessor=process.pid) as claim:
            assert owner("a") == process.pid
            with names.Directory() as directory:
                assert names.live_names(directory) == ["a"]  # and not the one that waits
            claim.take(process.pid)
            assert owner("a") == os.getpid()
            claim.take(process.pid)  # no effect
            process.communicate("")  # it releases what is not its any more
            assert owner("a") == os.getpid()
        assert os.listdir(base / "pyhv") == []


def test_a_predecessor_that_died(base: Path) -> None:
    with holder() as process, names.claim("a", predecessor=process.pid) as claim:
        process.kill()
        process.wait()
        claim.take(process.pid)
        assert owner("a") == os.getpid()
    assert os.listdir(base / "pyhv") == []


def test_without_a_predecessor_the_name_is_had_at_once(base: Path) -> None:
    with names.claim("a", predecessor=1) as claim:
        assert owner("a") == os.getpid()
        claim.take(1)
        assert owner("a") == os.getpid()
    assert os.listdir(base / "pyhv") == []


def test_a_name_of_another_than_the_predecessor(base: Path) -> None:
    with holder() as process, pytest.raises(BadInput, match="name a: is that of a VM that runs"):
        names.claim("a", predecessor=process.pid + 1)
    assert os.listdir(base / "pyhv") in ([], ["a.sock"])  # the holder was killed


def test_a_name_that_another_vm_took_meanwhile(base: Path) -> None:
    with holder() as process, names.claim("a", predecessor=process.pid) as claim:
        process.kill()
        process.wait()
        with names.claim("a"):
            with pytest.raises(BadInput, match="name a: was taken by another VM meanwhile"):
                claim.take(process.pid + 1)
            claim.release()
            assert owner("a") == os.getpid()
    assert os.listdir(base / "pyhv") == []


def test_what_a_vm_left_that_died_while_it_waited_is_removed(base: Path) -> None:
    with holder() as process, names.claim("a", predecessor=process.pid):
        leave_stale(base, ".123-a")
        waiting = {".123-a.sock", f".{os.getpid()}-a.sock", "a.sock"}
        assert set(os.listdir(base / "pyhv")) == waiting
        with names.Directory() as directory:
            assert names.live_names(directory) == ["a"]
        assert set(os.listdir(base / "pyhv")) == waiting - {".123-a.sock"}
        leave_stale(base, ".123-a")
        names.claim("b").release()
        assert set(os.listdir(base / "pyhv")) == waiting - {".123-a.sock"}


def test_a_directory_with_a_set_group_id_bit(base: Path) -> None:
    """As one gets from a parent that has it."""
    os.chmod(base, 0o2700)
    with names.claim("a"):
        assert (base / "pyhv").stat().st_mode & 0o777 == 0o700
    (base / "pyhv").chmod(0o2700)
    with names.claim("a"), names.Directory() as directory:
        assert directory.names() == ["a"]


@pytest.mark.parametrize("mask", [0o777, 0o277])
def test_any_umask_will_do(base: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with names.claim("a"):
            assert (base / "pyhv").stat().st_mode & 0o777 == 0o700
            assert (base / "pyhv" / "a.sock").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)


def test_somebody_elses_directory_is_not_to_be_removed(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base / "pyhv").mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(BadInput) as refused:
        names.Directory()
    assert refused.value.advice == "set XDG_RUNTIME_DIR to a directory of your own"
