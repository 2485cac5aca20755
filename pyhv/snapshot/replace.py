"""A file that takes another's place all at once, or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time

from pyhv.errors import BadInput, HostError

# File systems that cannot make a file without a name say so in one of these ways (open(2), O_TMPFILE).
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)
# For so long two writers of one file may be at the same few instructions; in seconds.
_PATIENCE = 5.0


class Replacement:
    """A new file that commit() puts at `path`; until then whatever is there stays as it is.

    Needs: a directory that may be written to. path: a symbolic link is followed; what is there must be a regular file.
    Does: keeps the new file without a name (O_TMPFILE), so that nothing is left of it when this process is killed.
    commit() syncs it, gives it a name beside the old file, renames that over the old one, and syncs the directory. The
    mode is the old file's; 0600 where there was none, for a guest's memory holds secrets. Where the file system has no
    files without names, it has the name beside the old file from the beginning; a writer that is killed leaves it
    there, and the next one for the same path removes it.
    On failure, and without commit(): the old file is untouched, and nothing is left of the new one.

    Raises BadInput for a path that cannot be used; commit() raises HostError.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = self._directory = -1
        directory, self._name = os.path.split(os.path.realpath(path))
        # Hidden, and always the same: what killed writers leave of it is one file at most.
        self._new_name = f".{self._name}.pyhv-new"
        try:
            self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._old_mode()
            self._open()
        except OSError as error:
            self.close()
            raise BadInput(path, f"cannot be written: {error.strerror}", "choose another place") from None
        except BaseException:
            self.close()
            raise

    @property
    def fd(self) -> int:
        """The new file, for reading and writing."""
        return self._fd

    def _old_mode(self) -> int | None:
        """Permission bits of the file that is there; None where there is none."""
        if not self._name or os.path.isdir(self.path):
            raise BadInput(self.path, "is a directory", "name a file")
        try:
            status = os.stat(self._name, dir_fd=self._directory, follow_symlinks=False)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(status.st_mode):
            raise BadInput(self.path, "is there, and no regular file", "name another file")
        return stat.S_IMODE(status.st_mode) & 0o777

    def _open(self) -> None:
        try:
            self._fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self._directory)
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
            self._open_named()
        else:
            # Held as long as the file is open: who finds it under its new name knows by it that its writer lives.
            fcntl.flock(self._fd, fcntl.LOCK_EX)

    def _open_named(self) -> None:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                self._fd = os.open(
                    self._new_name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=self._directory
                )
            except FileExistsError:
                self._remove_leftover(deadline)
                continue
            # Before the lock was there, another writer may have taken the file for a leftover.
            if _lock(self._fd) and self._has_new_name(self._fd):
                return
            os.close(self._fd)
            self._fd = -1

    def _has_new_name(self, fd: int) -> bool:
        try:
            found = os.stat(self._new_name, dir_fd=self._directory, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(fd))

    def _remove_leftover(self, deadline: float) -> None:
        """Removes what a killed writer left under the new name. Where its writer lives: waits a little; when the
        deadline has passed, raises BadInput."""
        try:
            fd = os.open(self._new_name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
        except FileNotFoundError:
            return
        try:
            if not _lock(fd):
                if time.monotonic() > deadline:
                    raise BadInput(self.path, "is being written by another process", "wait until it is done")
                time.sleep(0.001)
            elif self._has_new_name(fd):  # nobody but who holds the lock removes or renames it
                os.unlink(self._new_name, dir_fd=self._directory)
        finally:
            os.close(fd)

    def commit(self) -> None:
        """Puts the new file in place. Raises HostError; then the old file is untouched, unless the error says that
        only the sync of the directory failed."""
        done = False
        try:
            mode = self._old_mode()
            os.fchmod(self._fd, 0o600 if mode is None else mode)
            os.fsync(self._fd)
            if not os.fstat(self._fd).st_nlink:
                self._link()
            os.rename(self._new_name, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            done = True
            os.fsync(self._directory)
        except OSError as error:
            detail = "the new file is in place, but a power failure could undo that" if done else "nothing was changed"
            raise HostError(f"write {self.path}", error.errno or 0, detail) from None
        finally:
            self.close()

    def _link(self) -> None:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                # With a directory descriptor Python calls linkat(AT_SYMLINK_FOLLOW), which this way of naming needs.
                os.link(f"/proc/self/fd/{self._fd}", self._new_name, dst_dir_fd=self._directory, follow_symlinks=True)
                return
            except FileExistsError:
                self._remove_leftover(deadline)

    def close(self) -> None:
        """Drops the new file, unless it was put in place; closing twice is allowed."""
        if self._fd >= 0:
            if self._has_new_name(self._fd):
                os.unlink(self._new_name, dir_fd=self._directory)
            os.close(self._fd)
        if self._directory >= 0:
            os.close(self._directory)
        self._fd = self._directory = -1


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
