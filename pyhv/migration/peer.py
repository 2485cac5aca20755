"""Who is at the other end of a connection, as far as this host's kernel tells.

Of a UNIX socket it tells the process (SO_PEERCRED, unix(7)). Of a TCP connection within this host it tells whose the
other end is: /proc/net/tcp has a line for each end, with the user and the number of the socket (proc(5)), and
/proc/PID/fd has that number in the process that holds it.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Iterator
from typing import NamedTuple

from pyhv.errors import BadInput

_LISTENS = 0x0A  # TCP_LISTEN (include/net/tcp_states.h)


class _Socket(NamedTuple):
    """A line of /proc/net/tcp."""

    local: str
    remote: str
    state: int
    uid: int
    inode: int


def check_user(sock: socket.socket, called: bool) -> None:
    """Whether the other end of a UNIX or local TCP connection is this user's or root's. called: this side was called;
    else it has called. Raises BadInput where it is not, or where nobody can tell."""
    if sock.family == socket.AF_UNIX:
        users = {_credentials(sock)[1]}
    elif called:
        # An end that nobody holds any more is shown as root's, whosever it was.
        users = {end.uid for end in _other_ends(sock) if end.inode}
    else:  # whom the connection is for before he has taken it is not told: who listens there is
        users = {end.uid for end in _listeners(sock)}
    if not users:
        raise BadInput("the other side", "is nobody's that /proc/net/tcp tells of", "use unix:, tls:// or ssh://")
    for user in users - {0, os.geteuid()}:
        raise BadInput("the other side", f"belongs to the user with the number {user}", "use tls:// for other users")


def is_of(sock: socket.socket, pid: int) -> bool:
    """Whether that process holds the other end: of a UNIX socket, whether it has connected it."""
    if sock.family == socket.AF_UNIX:
        return _credentials(sock)[0] == pid
    names = {f"socket:[{end.inode}]" for end in _other_ends(sock) if end.inode}
    try:
        with os.scandir(f"/proc/{pid}/fd") as entries:
            return any(_target(entry.path) in names for entry in entries)
    except OSError:  # it has ended, or is another user's
        return False


def check_folder(uri: str, path: str) -> None:
    """Raises BadInput where everybody may put another socket into the place of the one at `path`."""
    folder = os.path.dirname(os.path.realpath(path))
    while True:
        try:
            mode = os.stat(folder).st_mode
        except OSError:  # it is told of when the socket is used
            return
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            problem = f"everybody may replace what is in {folder} (mode {stat.S_IMODE(mode):04o})"
            raise BadInput(uri, problem, "take a path in a folder of your own")
        if folder == "/":
            return
        folder = os.path.dirname(folder)


def _credentials(sock: socket.socket) -> tuple[int, int]:
    """Process and user of who has connected, or listens."""
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def _other_ends(sock: socket.socket) -> list[_Socket]:
    ours, theirs = _forms(sock.getsockname()), _forms(sock.getpeername())
    return [end for end in _table() if end.local in theirs and end.remote in ours]


def _listeners(sock: socket.socket) -> list[_Socket]:
    host, port = sock.getpeername()[:2]
    places = {form for name in (host, "0.0.0.0", "::") for form in _forms((name, port))}
    return [end for end in _table() if end.state == _LISTENS and end.local in places]


def _forms(address: tuple[str, int]) -> set[str]:
    """An address as /proc/net/tcp and tcp6 write it: words of 32 bits as the processor reads them, and the port. One of
    IPv4 may be that of an IPv6 socket too (::ffff:a.b.c.d)."""
    host, port = address[0].partition("%")[0], address[1]
    host = host.removeprefix("::ffff:") if "." in host else host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    packed = socket.inet_pton(family, host)
    both = [packed] if family == socket.AF_INET6 else [packed, bytes(10) + b"\xff\xff" + packed]
    return {"".join(f"{word:08X}" for word in struct.unpack(f"={len(b) // 4}I", b)) + f":{port:04X}" for b in both}


def _table() -> Iterator[_Socket]:
    for name in ("tcp", "tcp6"):
        try:
            with open(f"/proc/self/net/{name}", encoding="ascii") as file:
                lines = file.readlines()[1:]
        except OSError:
            continue
        for line in lines:
            words = line.split()
            yield _Socket(words[1], words[2], int(words[3], 16), int(words[7]), int(words[9]))


def _target(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
