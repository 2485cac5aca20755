"""How two processes that migrate a VM reach each other. Each way ends in a Channel: two descriptors.

unix:PATH               a socket in the file system; both sides are the same user's, or root's
tcp://HOST[:PORT]       to loopback likewise; unprotected to other addresses, and only with `insecure`
tls://HOST[:PORT]       both sides show a certificate; a thread moves the bytes between TLS and a socketpair
ssh://[USER@]HOST[:PORT] runs `pyhv receive -` on the other side: who may log in there may migrate to there
tty:PATH                a serial line, which is set to raw mode
fd:IN,OUT               descriptors that this process has
-                       its stdin and stdout (to receive)
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import stat
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from pyhv import arguments
from pyhv.errors import BadInput, HostError, PyhvError
from pyhv.migration import peer, waits

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl
    import subprocess

SCHEMES = "unix:PATH, tcp://HOST:PORT, tls://HOST:PORT, ssh://[USER@]HOST, tty:PATH or fd:IN,OUT"

# Where none is given: of tcp:// and tls://. "pyhv" on a telephone's keys; nobody has it at IANA.
PORT = 7948

# ssh's user and host, and nothing that could be taken for an option.
_SSH_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_@:[]%")


class Address(NamedTuple):
    """Where the other side is."""

    scheme: str
    """ "unix", "tcp", "tls", "ssh", "tty", "fd"."""
    text: str
    """As the user wrote it."""
    host: str = ""
    port: int = 0
    path: str = ""
    fds: tuple[int, int] = (-1, -1)


class Tls(NamedTuple):
    """The files that prove who one is, all in PEM: one's certificate, its key, and the authority that the other side's
    certificate must come from."""

    certificate: str
    key: str
    authority: str


class Channel:
    """A connection: in_fd and out_fd may be the same. A context manager; close() closes it. direct: the descriptors
    lead to the other side itself, and to no program in between."""

    def __init__(
        self,
        in_fd: int,
        out_fd: int,
        name: str,
        on_close: Callable[[], None] = lambda: None,
        complaint: Callable[[], str] = lambda: "",
        sock: socket.socket | None = None,
        direct: bool = False,
    ) -> None:
        self.in_fd = in_fd
        self.out_fd = out_fd
        self.peer = name
        """What people call the other side."""
        self.complaint = complaint
        """Once it is broken: what the program that made it said of that, in one line, or ""."""
        self._on_close: Callable[[], None] | None = on_close
        self._sock = sock  # that leads to the other side, and is open as long as this
        self._direct = direct

    def is_of(self, pid: int) -> bool:
        """Whether it is certain that this process, of this host, is the other side."""
        try:
            return self._sock is not None and peer.is_of(self._sock, pid)
        except OSError:  # it is closed
            return False

    def on_the_way(self) -> int:
        """How many of the bytes that were sent the other side may not have yet, at most."""
        if not self._direct:
            return waits.ON_THE_WAY
        import fcntl
        import termios

        try:
            return int.from_bytes(fcntl.ioctl(self.out_fd, termios.TIOCOUTQ, bytes(4)), "little")
        except OSError:
            return waits.ON_THE_WAY

    def close(self) -> None:
        """Closing twice is allowed."""
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close()

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def parse(uri: str, insecure: bool = False) -> Address:
    """What a URI names. Raises BadInput."""
    advice = f"name {SCHEMES}"
    arguments.text("uri", uri)
    arguments.flag("insecure", insecure)
    scheme, colon, rest = uri.partition(":")
    if uri == "-":
        _check_ways(uri, 0, 1)
        return Address("fd", uri, fds=(0, 1))
    try:
        size = len(os.fsencode(rest))
    except UnicodeEncodeError:  # half of a surrogate pair
        size = -1
    if not colon or size < 0 or "\0" in uri:
        raise BadInput(uri, "is no URI", advice)
    if scheme == "unix":
        if not rest:
            raise BadInput(uri, "has no path", advice)
        if size > 107:  # sockaddr_un (unix(7))
            raise BadInput(uri, "is too long: a socket's path has at most 107 bytes", "take a shorter path")
        return Address("unix", uri, path=rest)
    if scheme == "tty":
        return Address("tty", uri, path=rest)
    if scheme == "fd":
        return Address("fd", uri, fds=_parse_fds(uri, rest, advice))
    if scheme not in ("tcp", "tls", "ssh") or not rest.startswith("//"):
        raise BadInput(uri, "is of no kind that pyhv knows", advice)
    rest = rest[2:]
    host, number = _split_port(rest)
    if scheme == "ssh":
        known = host and not host.startswith("-") and _SSH_NAME.issuperset(host) and number != 0
        if not known or host.endswith("@") or not -1 <= number <= 65535:
            raise BadInput(uri, "has no host and port that ssh could take", "write ssh://[USER@]HOST[:PORT]")
        return Address("ssh", uri, host=host, port=max(number, 0))
    number = PORT if number < 0 else number
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not _may_be_host(host) or number > 65535:
        raise BadInput(uri, "has no host and port", f"write {scheme}://HOST:PORT; without one it is {PORT}")
    if scheme == "tcp" and not insecure and not _is_loopback(host):
        problem = "would send a VM's memory unprotected, and take anybody's"
        raise BadInput(uri, problem, "use tls:// or ssh://, or allow it as insecure")
    return Address(scheme, uri, host, number)


def _split_port(text: str) -> tuple[str, int]:
    """Host and port; -1 without one. An IPv6 address has colons of its own, and stands in brackets before a port."""
    host, colon, port = text.rpartition(":")
    if not colon or port.endswith("]") or (":" in host and not host.endswith("]")):
        return text, -1
    return host, int(port) if port.isascii() and port.isdigit() and len(port) < 7 else 1 << 16


def _parse_fds(uri: str, text: str, advice: str) -> tuple[int, int]:
    numbers = text.split(",")
    if len(numbers) == 1:
        numbers *= 2
    if len(numbers) != 2 or not all(n.isascii() and n.isdigit() and len(n) < 8 for n in numbers):
        raise BadInput(uri, "names no descriptors", advice)
    fds = int(numbers[0]), int(numbers[1])
    for fd in fds:
        try:
            mode = os.fstat(fd).st_mode
        except OSError:
            raise BadInput(uri, f"descriptor {fd} is not open", "give one that this process has") from None
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
            raise BadInput(uri, f"descriptor {fd} is a file", "name a socket, pipe or tty; to a file goes pyhv save")
    return _check_ways(uri, *fds)


def _check_ways(uri: str, in_fd: int, out_fd: int) -> tuple[int, int]:
    """Raises BadInput unless the one can be read and the other written: both sides send."""
    import fcntl

    for fd, wrong, way in ((in_fd, os.O_WRONLY, "reading"), (out_fd, os.O_RDONLY, "writing")):
        try:
            mode = fcntl.fcntl(fd, fcntl.F_GETFL)
        except OSError:
            raise BadInput(uri, f"descriptor {fd} is not open", "give one that this process has") from None
        if mode & os.O_PATH or mode & os.O_ACCMODE == wrong:
            advice = "name one that is open both ways, a socket or tty, or two as fd:IN,OUT"
            raise BadInput(uri, f"descriptor {fd} is not open for {way}", advice)
    return in_fd, out_fd


def _may_be_host(host: str) -> bool:
    """Whether the resolver can be asked for it: labels of 1 to 63 characters."""
    try:
        return bool(host.encode("idna"))
    except UnicodeError:
        return False


def _is_loopback(host: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def connect(
    address: Address,
    tls: Tls | None = None,
    timeout: float = waits.CONNECT.seconds(),
    environment: Mapping[str, str] | None = None,
) -> Channel:
    """Reaches the side that receives, within `timeout` seconds. environment: for ssh, in which these variables are
    instead of this process's (SSH_VARIABLES). Raises BadInput where it cannot be there, HostError."""
    match address.scheme:
        case "fd":
            return Channel(*address.fds, address.text)
        case "ssh":
            return _run_ssh(address, environment)
        case "tty":
            return _open_tty(address)
        case "tls":
            context = _context(address, tls, server=False)  # before the other side, who takes one VM, is bothered
            return _wrap_tls(_connect(address, timeout), context, address.text, address.host)
        case _:
            sock = _connect(address, timeout)
            try:
                _check_user(address, sock, called=False)
            except BaseException:
                sock.close()
                raise
            return _of_socket(sock, address.text)


def _check_user(address: Address, sock: socket.socket, called: bool) -> None:
    """Raises BadInput where the other side is on this host and somebody else's, who could read the VM's memory, or send
    one of his own."""
    if address.scheme == "unix" or (address.scheme == "tcp" and _is_loopback(sock.getpeername()[0])):
        try:
            peer.check_user(sock, called)
        except BadInput as error:
            raise BadInput(address.text, f"{error.subject} {error.problem}", error.advice) from None
        except OSError as error:  # it has gone again
            raise HostError(f"connection with {address.text}", error.errno or errno.EPIPE) from None


def _connect(address: Address, timeout: float) -> socket.socket:
    advice = "is pyhv receive running there?"
    try:
        if address.scheme == "unix":
            peer.check_folder(address.text, address.path)
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.settimeout(timeout)
                sock.connect(address.path)
            except BaseException:
                sock.close()
                raise
        else:
            sock = socket.create_connection((address.host, address.port), timeout)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        nobody = (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTSOCK)
        missing = error.errno in nobody or isinstance(error, socket.gaierror)
        reason = error.strerror or "it did not answer"
        if missing:
            raise BadInput(address.text, f"cannot be reached: {reason}", advice) from None
        raise HostError(f"connect to {address.text}", error.errno or errno.ETIMEDOUT, "", advice) from None
    return sock


class Listener:
    """Waits for the one side that sends. A context manager; close() closes it, and removes the socket that it made.

    Raises BadInput for an address that cannot be listened at.
    """

    def __init__(self, address: Address, tls: Tls | None = None) -> None:
        self.address = address
        self._socket: socket.socket | None = None
        self._line: Channel | None = None
        self._made: os.stat_result | None = None
        self._context = _context(address, tls, server=True) if address.scheme == "tls" else None
        if address.scheme == "ssh":
            raise BadInput(address.text, "cannot be listened at", "the source runs pyhv receive - here by itself")
        if address.scheme == "tty":
            self._line = _open_tty(address)
        if address.scheme in ("fd", "tty"):
            return
        try:
            self._listen()
        except OSError as error:
            self.close()
            reason = error.strerror or str(error)
            raise BadInput(address.text, f"cannot be listened at: {reason}", "choose another address") from None

    def _listen(self) -> None:
        if self.address.scheme == "unix":
            peer.check_folder(self.address.text, self.address.path)
            self._socket = socket.socket(socket.AF_UNIX)
            _remove_stale(self.address.path)
            os.fchmod(self._socket.fileno(), 0o600)  # before bind: the file never has another mode
            self._socket.bind(self.address.path)
            self._made = os.stat(self.address.path)
            self._socket.listen(1)
        else:
            found = socket.getaddrinfo(self.address.host, self.address.port, type=socket.SOCK_STREAM)[0]
            self._socket = socket.socket(found[0])
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(found[4])
            self._socket.listen(1)

    @property
    def where(self) -> str:
        """The URI to migrate to: with the port that was chosen where it was 0, or that is the default."""
        if self._socket is None or self.address.scheme == "unix":
            return self.address.text
        host = f"[{self.address.host}]" if ":" in self.address.host else self.address.host
        return f"{self.address.scheme}://{host}:{self._socket.getsockname()[1]}"

    def accept(
        self, timeout: float | None = None, turned_away: Callable[[PyhvError], None] | None = None
    ) -> Channel | None:
        """The connection; None when nobody has come within `timeout` seconds. turned_away: is told why somebody was
        who came to tls:// without the right certificate; then it waits on. Raises HostError, and without turned_away
        BadInput for such a one. So it is with who comes from this host and is somebody else."""
        if self.address.scheme == "tty":
            return self._wait_for_line(timeout)
        if self._socket is None:
            return Channel(*self.address.fds, self.address.text)
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            taken = self.take(None if deadline is None else max(deadline - time.monotonic(), 0))
            if taken is None:
                return None
            try:
                return self.admit(*taken)
            except PyhvError as error:
                if turned_away is None:
                    raise
                turned_away(error)

    def take(self, timeout: float | None = None) -> tuple[socket.socket, str] | None:
        """As accept(), for schemes that connect: a socket and what to call who is there, who has shown nothing yet."""
        assert self._socket is not None
        deadline = None if timeout is None else time.monotonic() + timeout
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        while True:
            left = None if deadline is None else max(deadline - time.monotonic(), 0) * 1000
            if not poll.poll(left):
                return None
            try:
                sock, place = self._socket.accept()
            except (BlockingIOError, ConnectionError):
                continue  # it has left already
            return sock, f"{place[0]}:{place[1]}" if place else self.address.text

    def admit(self, sock: socket.socket, name: str) -> Channel:
        """The connection with who came, if he is who he must be. Closes it and raises BadInput if not, HostError."""
        try:
            if self.address.scheme != "unix":
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._context is not None:
                return _wrap_tls(sock, self._context, name)
            _check_user(self.address, sock, called=True)
            return _of_socket(sock, name)
        except OSError as error:
            sock.close()
            raise HostError(f"connection from {name}", error.errno or errno.EPIPE) from None
        except BaseException:
            sock.close()
            raise

    def _wait_for_line(self, timeout: float | None) -> Channel | None:
        """A serial line connects nobody: somebody is there when a first byte comes."""
        line, self._line = self._line or _open_tty(self.address), None
        poll = select.poll()
        poll.register(line.in_fd, select.POLLIN)
        if poll.poll(None if timeout is None else timeout * 1000):
            return line
        self._line = line  # to open it anew would throw away what comes until then
        return None

    def forget(self) -> None:
        """After a fork: leaves it to the other process."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._made = None

    def close(self) -> None:
        """Closing twice is allowed."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._line is not None:
            self._line.close()
            self._line = None
        if self._made is not None:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(self.address.path), self._made):
                    os.unlink(self.address.path)
            self._made = None

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _remove_stale(path: str) -> None:
    """Removes a socket that nobody listens at any more."""
    # Of another type than those that listen: one that does is not reached (EPROTOTYPE), for it takes one connection.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            if stat.S_ISSOCK(os.lstat(path).st_mode):
                os.unlink(path)
        except OSError:
            pass


def _of_socket(sock: socket.socket, name: str) -> Channel:
    return Channel(sock.fileno(), sock.fileno(), name, sock.close, sock=sock, direct=True)


def _open_tty(address: Address) -> Channel:
    import termios
    import tty

    # A line with modem control may have no carrier, as a null modem of three wires has none: neither open() nor what is
    # done with the line afterwards is to wait for one (termios(3), CLOCAL).
    try:
        fd = os.open(address.path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise BadInput(address.text, f"cannot be opened: {reason}", "name a serial line") from None
    try:
        tty.setraw(fd)
        mode = termios.tcgetattr(fd)
        mode[2] |= termios.CLOCAL  # c_cflag
        termios.tcsetattr(fd, termios.TCSANOW, mode)
    except Exception as error:  # termios.error
        os.close(fd)
        raise BadInput(address.text, f"is no serial line: {error}", "name one, such as tty:/dev/ttyS1") from None
    return Channel(fd, fd, address.text, lambda: os.close(fd), direct=True)


# --------------------------------------------------------------------------------------------------------- ssh


# What of a user's environment ssh, and what PYHV_SSH names, need to do there what they do in a shell.
SSH_VARIABLES = (
    "PYHV_SSH", "PYHV_REMOTE", "SSH_AUTH_SOCK", "SSH_ASKPASS", "SSH_ASKPASS_REQUIRE", "KRB5CCNAME", "DISPLAY", "HOME",
    "PATH",
)  # fmt: skip

# The line by which the other end says that its shell is through with what it says of itself, and pyhv begins; and how
# much it may have said before, in bytes.
_SSH_BEGINS = "pyhv-receive-begins"
_SSH_GREETING = 64 << 10


def _run_ssh(address: Address, environment: Mapping[str, str] | None) -> Channel:
    """ssh, with `pyhv receive -` at its other end. What either says on stderr is for the error, if there is one: the
    VM's process may have no stderr, or a console there."""
    import subprocess

    own = {name: value for name, value in os.environ.items() if environment is None or name not in SSH_VARIABLES}
    setting = own | dict(environment or {})
    # A socketpair, not pipes: it holds more than 64 KiB on the way.
    ours, theirs = socket.socketpair()
    said = os.memfd_create("pyhv-ssh", os.MFD_CLOEXEC)
    command = (setting.get("PYHV_SSH") or "ssh").split()
    if address.port:
        command += ["-p", str(address.port)]
    try:
        with theirs:
            remote = f"echo {_SSH_BEGINS}; exec " + (setting.get("PYHV_REMOTE") or "pyhv") + " receive -"
            # Of a program without a slash the path in the environment that it gets decides.
            process = subprocess.Popen(
                [*command, address.host, remote],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=said,
                env=setting,
            )
    except OSError as error:
        ours.close()
        os.close(said)
        raise BadInput(command[0], f"cannot be run: {error.strerror}", "install an ssh client") from None
    fd = ours.fileno()
    channel = Channel(
        fd, fd, address.text, lambda: _end_ssh(ours, process, said), lambda: _ssh_complaint(process, said)
    )
    try:
        _pass_greeting(address, ours, channel)
    except BaseException:
        channel.close()
        raise
    return channel


def _pass_greeting(address: Address, ours: socket.socket, channel: Channel) -> None:
    """Skips what a login shell prints before pyhv begins (a file such as .bashrc that echoes). Raises HostError."""
    came, deadline = bytearray(), time.monotonic() + waits.ANSWER.seconds()
    begins = _SSH_BEGINS.encode()
    while not came.endswith((begins + b"\n", begins + b"\r\n")):
        problem = ""
        try:
            ours.settimeout(max(deadline - time.monotonic(), 0.001))
            piece = ours.recv(1)  # what comes after the line is for the link
            problem = "" if piece else channel.complaint() or "it ended before pyhv was begun there"
            came += piece
        except TimeoutError:
            problem = f"pyhv was not begun there within {waits.ANSWER.seconds():g} seconds"
        except OSError as error:
            problem = error.strerror or str(error)
        if not problem and len(came) > _SSH_GREETING:
            problem = "the shell there printed too much on stdout; keep it quiet for commands (.bashrc, .profile)"
        if problem:
            text = "".join(c if c.isprintable() else " " for c in came[-200:].decode("utf-8", "replace")).strip()
            shown = f"; before that the shell there printed: {text}" if text else ""
            raise HostError(f"migration to {address.text}", errno.EPIPE, problem + shown, "the VM runs on here")


def _ssh_complaint(process: subprocess.Popen[bytes], said: int) -> str:
    import subprocess

    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(waits.SSH_REASON.seconds())  # it is about to end, and may not have said it yet
    lines = os.pread(said, 4096, max(os.fstat(said).st_size - 4096, 0)).decode("utf-8", "replace").splitlines()
    text = "; ".join(line.strip() for line in lines[-3:] if line.strip())
    return "".join(c if c.isprintable() else " " for c in text[-500:])


def _end_ssh(ours: socket.socket, process: subprocess.Popen[bytes], said: int) -> None:
    import subprocess

    ours.close()
    os.close(said)
    try:
        process.wait(waits.SSH_END.seconds())
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# --------------------------------------------------------------------------------------------------------- TLS


def _context(address: Address, tls: Tls | None, server: bool) -> ssl.SSLContext:
    import ssl

    if tls is None or not all(tls):
        raise BadInput(address.text, "needs certificates", "give tls=Tls(certificate, key, authority)")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(tls.authority)
        # Without a password OpenSSL would ask for one, at a terminal where a guest's console may be.
        context.load_cert_chain(tls.certificate, tls.key, password="")
    except OSError as error:  # SSLError is one
        files, problem = f"{tls.certificate}, {tls.key}, {tls.authority}", f"cannot be used: {error.strerror or error}"
        raise BadInput(files, problem, "give PEM files that belong together, the key without a passphrase") from None
    return context


def _wrap_tls(
    sock: socket.socket, context: ssl.SSLContext, name: str, host: str | None = None
) -> Channel:
    """host: the other side's, whom its certificate must be for; None at the side that was called."""
    import ssl

    sock.settimeout(waits.TLS.seconds())
    try:
        wrapped = context.wrap_socket(sock, server_side=host is None, server_hostname=host)
    except ssl.SSLError as error:
        sock.close()
        reason = getattr(error, "verify_message", "") or error.reason or str(error)
        problem = f"the two sides do not trust each other: {reason}"
        raise BadInput(name, problem, "check the certificates") from None
    except OSError as error:
        sock.close()
        raise HostError(f"TLS with {name}", error.errno or errno.ETIMEDOUT) from None
    from pyhv.migration.tls import Pump

    pump = Pump(wrapped)
    return Channel(pump.fd, pump.fd, name, pump.close, sock=wrapped)
