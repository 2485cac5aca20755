"""Names of running VMs: each is a socket NAME.sock in the user's runtime directory.

The directory is pyhv/ in XDG_RUNTIME_DIR; where that is unset, /tmp/pyhv-UID. It must belong to the user and be closed
to all others (0700), or whoever else can write there could put a socket of his own in the place of a VM's.

A name belongs to the process that listens on its socket. The kernel refuses connections to the socket of a process that
is gone, however it ended: that is how a stale one is known. Whoever makes or removes a socket holds a lock on the
directory (flock), so of two VMs that want one name at the same time one gets it, and nobody removes a socket that has
just been made.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import stat
import struct
import time
from collections.abc import Iterator
from typing import Any

from pyhv.control import ended
from pyhv.errors import BadInput, HostError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SUFFIX = ".sock"

# The socket of a VM that waits for a name which its predecessor still has: .PID-NAME.sock. No name begins with a dot.
_WAITING = re.compile(r"\.[0-9]+-.*\.sock", re.DOTALL)

# sockaddr_un has room for 108 bytes, of which one is a NUL (unix(7)).
_MAX_ADDRESS = 107

# Connections that wait until the VM's server accepts them.
_BACKLOG = 64

_ELSEWHERE = "set XDG_RUNTIME_DIR to a directory of your own"
_REMOVE = f"remove it, or {_ELSEWHERE}"

# The lock on the directory is held for a few system calls; in seconds.
_PATIENCE = 10.0

# So long a client waits for a place among the connections that wait; in seconds.
_BUSY = 2.0


class Ended(BadInput):
    """The VM has come to its end. record: what is kept of it (docs/control.md)."""

    def __init__(self, name: str, record: dict[str, Any]) -> None:
        message = record.get("message") or record.get("cause")
        super().__init__(name, f"has ended: {message}", f"pyhv status {name} and pyhv log {name} tell more")
        self.record = record


def check_name(name: str) -> None:
    """Raises BadInput for what can be no VM's name."""
    if not _NAME.fullmatch(name):
        raise BadInput(
            f"name {name}",
            "is not a name for a VM",
            "take up to 64 letters, digits, dots, underscores and hyphens, the first a letter or a digit",
        )


def directory_path() -> str:
    """Where the sockets are. Raises BadInput."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if not base:
        return f"/tmp/pyhv-{os.geteuid()}"
    if not os.path.isabs(base):
        raise BadInput(f"XDG_RUNTIME_DIR={base}", "is no absolute path", "correct or unset it")
    return os.path.join(base, "pyhv")


class Directory:
    """The runtime directory, open and checked. A context manager; close() closes it.

    create: make it where it is missing; otherwise it is then as good as empty.
    Raises BadInput for a directory that others could tamper with, or that cannot be made.
    """

    def __init__(self, create: bool = False) -> None:
        self.path = directory_path()
        self._fd = -1
        if create:
            try:
                os.mkdir(self.path, 0o700)
                os.chmod(self.path, 0o700)  # whatever the umask
            except FileExistsError:
                pass
            except OSError as error:
                raise BadInput(self.path, f"cannot be made: {error.strerror}", _ELSEWHERE) from None
        try:
            # Not through a symbolic link: in /tmp anybody can make one.
            self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise BadInput(self.path, "is not a directory", _REMOVE) from None
            raise BadInput(self.path, f"cannot be opened: {error.strerror}", _ELSEWHERE) from None
        status = os.fstat(self._fd)
        # A set-group-ID bit, which it gets from such a parent, lets nobody in.
        permissions = stat.S_IMODE(status.st_mode) & 0o777
        if status.st_uid != os.geteuid():
            self.close()
            raise BadInput(self.path, f"belongs to the user with the number {status.st_uid}", _ELSEWHERE)
        if permissions != 0o700:
            self.close()
            raise BadInput(self.path, f"has the mode {permissions:04o} instead of 0700", _REMOVE)

    def close(self) -> None:
        """Closes it; closing twice is allowed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Directory:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def names(self) -> list[str]:
        """All names that there is a socket for, sorted; some of them may be stale."""
        if self._fd < 0:
            return []
        found = [entry[: -len(_SUFFIX)] for entry in os.listdir(self._fd) if entry.endswith(_SUFFIX)]
        return sorted(name for name in found if _NAME.fullmatch(name))

    def ended(self, name: str) -> dict[str, Any] | None:
        """What is kept of a VM of that name which has ended, or None."""
        return None if self._fd < 0 else ended.read(self._fd, name)

    def ended_names(self) -> list[str]:
        """The names of the VMs that have ended and of which something is kept, the last one first."""
        return [] if self._fd < 0 else list(filter(_NAME.fullmatch, ended.names(self._fd)))

    def clear(self, name: str) -> bool:
        """Drops what is kept of a VM that has ended. Returns whether there was something."""
        return self._fd >= 0 and ended.clear(self._fd, name)

    def connect(self, name: str) -> socket.socket | None:
        """A connection to the VM of that name, or None where there is none; what a dead one left is removed. The
        socket does not block. Raises HostError where the VM does not accept connections."""
        if self._fd < 0:
            return None
        found = self._try(name)
        if found is not None:
            return found
        with self._locked():
            return self._connect_or_clean(name)

    def claim(self, name: str, predecessor: int = 0) -> Claim:
        """Makes the name this process's; with a predecessor, the process that has it now, as soon as Claim.take() is
        called. Raises BadInput where another VM has it, HostError."""
        self.clean()
        with self._locked():
            if self._may_have(name, 0):
                claim = self._listen(name, name + _SUFFIX)
                self.clear(name)
                return claim
            if predecessor and self._may_have(name, predecessor):
                return self._listen(name, f".{os.getpid()}-{name}{_SUFFIX}")
        raise BadInput(f"name {name}", "is that of a VM that runs", "choose another, or see pyhv ls")

    def clean(self) -> None:
        """Removes what VMs left that died while they waited for their names."""
        if self._fd < 0 or not any(map(_WAITING.fullmatch, os.listdir(self._fd))):
            return
        with self._locked():
            for entry in filter(_WAITING.fullmatch, os.listdir(self._fd)):
                with contextlib.suppress(BadInput, HostError):
                    connection = self._connect_or_clean(entry[: -len(_SUFFIX)])
                    if connection is not None:
                        connection.close()

    def take(self, name: str, entry: str, predecessor: int) -> None:
        """Puts the socket `entry` in the place of the predecessor's. Raises BadInput, HostError."""
        with self._locked():
            if not self._may_have(name, predecessor):
                raise BadInput(f"name {name}", "was taken by another VM meanwhile", "see pyhv ls")
            try:
                os.rename(entry, name + _SUFFIX, src_dir_fd=self._fd, dst_dir_fd=self._fd)
            except OSError as error:
                raise HostError(f"make {self.path}/{name}{_SUFFIX}", error.errno or 0) from None
            self.clear(name)

    def _may_have(self, name: str, predecessor: int) -> bool:
        """With the lock held: whether nobody has the name, or that process."""
        try:
            live = self._connect_or_clean(name)
        except HostError:  # it is there, and only too busy
            return False
        if live is None:
            return True
        with live:
            pid, _, _ = struct.unpack("3i", live.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return bool(pid == predecessor)

    def leave(self, name: str, made: os.stat_result, record: dict[str, Any]) -> None:
        """Keeps what is to be known of a VM that has ended, if the name's socket is still the one described by `made`.
        Raises OSError, HostError."""
        with self._locked():
            if os.path.samestat(os.stat(name + _SUFFIX, dir_fd=self._fd, follow_symlinks=False), made):
                ended.leave(self._fd, name, record)

    def remove(self, entry: str, made: os.stat_result) -> None:
        """Removes the socket `entry` if it is the one described by `made`. Raises OSError."""
        if os.path.samestat(os.stat(entry, dir_fd=self._fd, follow_symlinks=False), made):
            os.unlink(entry, dir_fd=self._fd)

    def _listen(self, name: str, entry: str) -> Claim:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            os.fchmod(listener.fileno(), 0o600)  # before bind: the file never has another mode
            listener.bind(self._address(entry))
            os.chmod(entry, 0o600, dir_fd=self._fd)  # which a umask may have made less
            listener.listen(_BACKLOG)
            made = os.stat(entry, dir_fd=self._fd, follow_symlinks=False)
        except OSError as error:
            listener.close()
            raise HostError(f"make {self.path}/{entry}", error.errno or 0) from None
        return Claim(self, name, listener, entry, made)

    def _address(self, entry: str) -> str:
        """The socket's path, so that others find it in /proc/net/unix under its name; through the directory's
        descriptor where that would be too long."""
        path = f"{self.path}/{entry}"
        return path if len(os.fsencode(path)) <= _MAX_ADDRESS else f"/proc/self/fd/{self._fd}/{entry}"

    def _try(self, name: str) -> socket.socket | None:
        """A connection, or None where nobody listens."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            connection.connect(self._address(name + _SUFFIX))
        except (ConnectionRefusedError, FileNotFoundError):
            connection.close()
            return None
        except OSError as error:  # EAGAIN: the backlog is full
            connection.close()
            raise HostError(f"connect to {name}", error.errno or 0, "its process is too busy or stopped") from None
        return connection

    def _connect_or_clean(self, name: str) -> socket.socket | None:
        """With the lock held: a connection, or None, and then no socket is left under the name."""
        found = self._try(name)
        if found is None:
            with contextlib.suppress(FileNotFoundError):
                entry = name + _SUFFIX
                if not stat.S_ISSOCK(os.stat(entry, dir_fd=self._fd, follow_symlinks=False).st_mode):
                    raise BadInput(f"{self.path}/{entry}", "is no socket", "remove it")
                os.unlink(entry, dir_fd=self._fd)
                if _NAME.fullmatch(name):
                    with contextlib.suppress(OSError):  # a full disk, say
                        ended.leave(self._fd, name, ended.killed(name))
        return found

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # An open file description of its own: flock does not keep two threads with one description apart.
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._fd)
        try:
            deadline = time.monotonic() + _PATIENCE
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise HostError(f"lock {self.path}", 0, "another process holds the lock") from None
                    time.sleep(0.002)
            yield
        finally:
            os.close(fd)


class Claim:
    """A name that is this process's: its listening socket (non-blocking). A context manager; release() gives it up."""

    def __init__(
        self, directory: Directory, name: str, listener: socket.socket, entry: str, made: os.stat_result
    ) -> None:
        self.name = name
        self.listener = listener
        self._directory = directory
        self._entry = entry  # in the directory: the name's, or one that waits for it
        self._made = made

    def take(self, predecessor: int) -> None:
        """Takes the name over from the process that has it, if that is still to be done. Raises BadInput where another
        VM has got it, HostError."""
        if self._entry != self.name + _SUFFIX:
            self._directory.take(self.name, self._entry, predecessor)
            self._entry = self.name + _SUFFIX

    def leave(self, record: dict[str, Any]) -> None:
        """Keeps what is to be known of the VM, which has ended, for when its name is released."""
        with contextlib.suppress(OSError, HostError):  # a full disk, say
            self._directory.leave(self.name, self._made, record)

    def release(self) -> None:
        """Removes the socket, so that the name is free; releasing twice is allowed."""
        if self.listener.fileno() < 0:
            return
        # As long as it listens nobody takes it for stale. But somebody may have removed it by hand, and another VM may
        # have its place.
        with contextlib.suppress(OSError):
            self._directory.remove(self._entry, self._made)
        self.listener.close()
        self._directory.close()

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def claim(name: str, predecessor: int = 0) -> Claim:
    """Makes the name this process's, until it is released. predecessor: a process that may have the name until
    Claim.take() is called. Raises BadInput for a name that is none or is taken, or a runtime directory that cannot be
    trusted; HostError."""
    check_name(name)
    directory = Directory(create=True)
    try:
        return directory.claim(name, predecessor)
    except BaseException:
        directory.close()
        raise


def connect(name: str) -> socket.socket:
    """A connection, which does not block, to the VM of that name. Raises BadInput, with the nearest name, where there
    is none, Ended where it has come to its end; HostError where it does not accept connections."""
    check_name(name)
    with Directory() as directory:
        found = _connect_patiently(directory, name)
        if found is not None:
            return found
        record = directory.ended(name)
        running = live_names(directory)
    if record is not None:
        raise Ended(name, record)
    import difflib

    near = difflib.get_close_matches(name, running, 1)
    advice = f"did you mean {near[0]}?" if near else "pyhv ls shows those that run" if running else "none runs at all"
    raise BadInput(name, "there is no running VM of this name", advice)


def _connect_patiently(directory: Directory, name: str) -> socket.socket | None:
    """As Directory.connect, where many connect at once."""
    deadline = time.monotonic() + _BUSY
    while True:
        try:
            return directory.connect(name)
        except HostError as error:
            if error.errnum != errno.EAGAIN or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def live_names(directory: Directory) -> list[str]:
    """The names of the VMs that run; what dead ones left is removed."""
    directory.clean()
    live = []
    for name in directory.names():
        try:
            connection = directory.connect(name)
        except HostError:
            live.append(name)
        except BadInput:
            pass
        else:
            if connection is not None:
                connection.close()
                live.append(name)
    return live
