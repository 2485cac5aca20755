"""How two processes reach each other: every URI, every error, and TLS between those who trust each other and others."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyhv.errors import BadInput, HostError, PyhvError
from pyhv.migration import transport
from pyhv.migration.transport import Address, Channel, Listener, Tls

TIMEOUT = 20.0


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    yield
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (before, threads)


# -------------------------------------------------------------------------------------------------------------- URIs


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("unix:/tmp/m", Address("unix", "unix:/tmp/m", path="/tmp/m")),
        ("unix:m", Address("unix", "unix:m", path="m")),
        ("tty:/dev/ttyS1", Address("tty", "tty:/dev/ttyS1", path="/dev/ttyS1")),
        ("tcp://localhost:7", Address("tcp", "tcp://localhost:7", "localhost", 7)),
        ("tcp://127.9.9.9:0", Address("tcp", "tcp://127.9.9.9:0", "127.9.9.9", 0)),
        ("tcp://[::1]:65535", Address("tcp", "tcp://[::1]:65535", "::1", 65535)),
        ("tls://example.org:1", Address("tls", "tls://example.org:1", "example.org", 1)),
        ("tcp://localhost", Address("tcp", "tcp://localhost", "localhost", 7948)),
        ("tcp://[::1]", Address("tcp", "tcp://[::1]", "::1", 7948)),
        ("tls://example.org", Address("tls", "tls://example.org", "example.org", 7948)),
        ("ssh://me@there:2222", Address("ssh", "ssh://me@there:2222", "me@there", 2222)),
        ("ssh://me@[::1]:22", Address("ssh", "ssh://me@[::1]:22", "me@[::1]", 22)),
        ("ssh://me@[fe80::1%eth0]", Address("ssh", "ssh://me@[fe80::1%eth0]", "me@[fe80::1%eth0]")),
        ("-", Address("fd", "-", fds=(0, 1))),
    ],
)
def test_good_uris(uri: str, address: Address) -> None:
    assert transport.parse(uri) == address


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("", "is no URI; name unix:PATH"),
        ("x", "is no URI"),
        ("unix:", "has no path"),
        ("unix:" + "x" * 108, "is too long: a socket's path has at most 107 bytes; take a shorter path"),
        ("http://x:1", "is of no kind that pyhv knows"),
        ("tcp:localhost:1", "is of no kind that pyhv knows"),
        ("TCP://localhost:1", "is of no kind that pyhv knows"),
        ("tcp://:1", "has no host and port"),
        ("tcp://localhost:65536", "has no host and port"),
        ("tcp://localhost:99999999999999999999", "has no host and port"),
        ("tcp://localhost:٣", "has no host and port"),
        ("tcp://localhost:-1", "has no host and port"),
        (f"tcp://{'a' * 64}:1", "has no host and port"),
        ("tls://a..b:1", "has no host and port"),
        ("tcp://\ud800:1", "is no URI"),
        ("unix:\ud800", "is no URI"),
        ("unix:\0m", "is no URI"),
        ("tcp://example.org:1", "would send a VM's memory unprotected, and take anybody's; use tls:// or ssh://"),
        ("tcp://0.0.0.0:1", "would send a VM's memory unprotected"),
        ("tcp://[::]:1", "would send a VM's memory unprotected"),
        ("tcp://localhost.example.org:1", "would send a VM's memory unprotected"),
        ("ssh://", "has no host and port that ssh could take; write ssh://[USER@]HOST[:PORT]"),
        ("ssh://-oProxyCommand=id", "has no host and port that ssh could take"),
        ("ssh://a b", "has no host and port that ssh could take"),
        ("ssh://a;id", "has no host and port that ssh could take"),
        ("ssh://a:x", "has no host and port that ssh could take"),
        ("ssh://a:70000", "has no host and port that ssh could take"),
        ("ssh://a:0", "has no host and port that ssh could take"),
        ("ssh://a/b", "has no host and port that ssh could take"),
        ("fd:", "names no descriptors"),
        ("fd:1,2,3", "names no descriptors"),
        ("fd:-1", "names no descriptors"),
        ("fd:٣", "names no descriptors"),
        ("fd:12345678", "names no descriptors"),
        ("fd:987654", "descriptor 987654 is not open; give one that this process has"),
    ],
)
def test_bad_uris(uri: str, words: str) -> None:
    with pytest.raises(BadInput) as caught:
        transport.parse(uri)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_descriptors_that_are_open() -> None:
    reader, writer = os.pipe()
    try:
        assert transport.parse(f"fd:{reader},{writer}").fds == (reader, writer)
    finally:
        os.close(reader)
        os.close(writer)


def test_descriptors_are_open_the_way_they_are_used() -> None:
    """Both sides of a migration send and receive."""
    reader, writer = os.pipe()
    path = os.open("/dev/null", os.O_PATH)
    try:
        for uri, problem in (
            (f"fd:{writer}", f"descriptor {writer} is not open for reading"),
            (f"fd:{reader}", f"descriptor {reader} is not open for writing"),
            (f"fd:{writer},{reader}", f"descriptor {writer} is not open for reading"),
            (f"fd:{reader},{path}", f"descriptor {path} is not open for writing"),
        ):
            with pytest.raises(BadInput, match=f"{uri}: {problem}; name one that is open both ways"):
                transport.parse(uri)
    finally:
        for fd in (reader, writer, path):
            os.close(fd)


@pytest.mark.parametrize(("which", "way"), [(0, "reading"), (1, "writing")])
def test_stdin_and_stdout_are_open_the_way_they_are_used(which: int, way: str) -> None:
    ends = os.pipe()
    before = os.dup(which)
    os.dup2(ends[1 - which], which)
    try:
        with pytest.raises(BadInput, match=f"-: descriptor {which} is not open for {way}"):
            transport.parse("-")
    finally:
        os.dup2(before, which)
        for fd in (*ends, before):
            os.close(fd)


def test_insecure_is_for_whoever_says_so() -> None:
    assert transport.parse("tcp://example.org:1", insecure=True).host == "example.org"


def test_a_file_is_no_connection(tmp_path: Path) -> None:
    with open(tmp_path / "f", "w") as file, pytest.raises(BadInput, match="is a file; name a socket, pipe or tty"):
        transport.parse(f"fd:{file.fileno()}")


@given(st.text(max_size=60))
def test_any_text_is_an_address_or_bad_input(text: str) -> None:
    for uri in (text, f"tcp://{text}", f"ssh://{text}", f"tls://{text}", f"fd:{text}"):
        with contextlib.suppress(BadInput):
            address = transport.parse(uri)
            assert address.text == uri and 0 <= address.port <= 65535
            if address.scheme == "ssh":
                assert not address.host.startswith("-") and not set(address.host) & set(" ;|&$`'\"\\/")


# ------------------------------------------------------------------------------------------------- there and back


def read(channel: Channel, size: int) -> bytes:
    data = b""
    os.set_blocking(channel.in_fd, True)
    while len(data) < size:
        piece = os.read(channel.in_fd, size - len(data))
        if not piece:
            break
        data += piece
    return data


def write(channel: Channel, data: bytes) -> None:
    os.set_blocking(channel.out_fd, True)
    while data:
        data = data[os.write(channel.out_fd, data) :]


@contextlib.contextmanager
def connected(uri: str, tls: tuple[Tls | None, Tls | None] = (None, None)) -> Iterator[tuple[Channel, Channel]]:
    """Both ends: who receives, who connects."""
    with Listener(transport.parse(uri), tls[0]) as listener:
        found: list[Channel | PyhvError | None] = []

        def take() -> None:
            try:
                found.append(listener.accept(TIMEOUT))
            except PyhvError as error:
                found.append(error)

        thread = threading.Thread(target=take)
        thread.start()
        try:
            near = transport.connect(transport.parse(listener.where), tls[1], timeout=5.0)
        except PyhvError:
            thread.join(TIMEOUT)
            if isinstance(found[0], Channel):
                found[0].close()
            raise
        thread.join(TIMEOUT)
        far = found[0]
        if isinstance(far, PyhvError):
            near.close()
            raise far
        assert far is not None
        with near, far:
            yield far, near


def check_both_ways(one: Channel, other: Channel) -> None:
    for here, there in ((one, other), (other, one)):
        write(here, b"hello")
        assert read(there, 5) == b"hello"
    here.close()
    assert read(there, 1) == b""


@pytest.mark.parametrize("uri", ["unix:{}/m", "tcp://127.0.0.1:0", "tcp://localhost:0"])
def test_sockets(tmp_path: Path, uri: str) -> None:
    with connected(uri.format(tmp_path)) as (far, near):
        check_both_ways(far, near)
        assert near.peer and far.peer
    assert os.listdir(tmp_path) == []


def test_tcp_sizes_its_buffers_by_itself() -> None:
    """Whoever sets their size keeps the kernel from it (tcp(7)), which cost a third of the rate in the lab."""
    so_buf_lock = 72  # asm-generic/socket.h: which of them somebody has set
    with connected("tcp://127.0.0.1:0") as ends:
        for end in ends:
            with socket.socket(fileno=os.dup(end.in_fd)) as sock:
                try:
                    locked = sock.getsockopt(socket.SOL_SOCKET, so_buf_lock)
                except OSError as error:
                    pytest.skip(f"this kernel does not tell: SO_BUF_LOCK: {error.strerror}")
                assert locked == 0


def test_a_unix_socket_is_its_users_alone(tmp_path: Path) -> None:
    with Listener(transport.parse(f"unix:{tmp_path}/m")):
        assert stat.S_IMODE(os.stat(tmp_path / "m").st_mode) == 0o600


def test_a_stale_unix_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(f"{tmp_path}/m")
    stale.close()
    with Listener(transport.parse(f"unix:{tmp_path}/m")) as listener:
        with pytest.raises(BadInput, match="cannot be listened at: Address already in use; choose another address"):
            Listener(transport.parse(f"unix:{tmp_path}/m"))
        assert os.path.exists(tmp_path / "m") and listener.accept(0.01) is None  # who looked has not come to it
    (tmp_path / "f").write_text("precious")
    with pytest.raises(BadInput, match="Address already in use"):
        Listener(transport.parse(f"unix:{tmp_path}/f"))
    assert (tmp_path / "f").read_text() == "precious"


def test_a_socket_that_somebody_else_made_meanwhile_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with Listener(transport.parse(f"unix:{path}")):
        os.unlink(path)
        path.write_text("another's")
    assert path.read_text() == "another's"


def test_nobody_is_there(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    for path, words in (("nobody", "No such file"), ("f", "Connection refused")):
        with pytest.raises(BadInput, match=rf"cannot be reached: {words}.*; is pyhv receive running there\?"):
            transport.connect(transport.parse(f"unix:{tmp_path}/{path}"))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(BadInput, match="cannot be reached: Connection refused"):
        transport.connect(transport.parse(f"tcp://127.0.0.1:{port}"))
    with pytest.raises(BadInput, match="cannot be reached"):
        transport.connect(transport.parse("tcp://no.such.host.invalid:1", insecure=True))


def test_nobody_comes(tmp_path: Path) -> None:
    with Listener(transport.parse(f"unix:{tmp_path}/m")) as listener:
        assert listener.accept(0.01) is None


def test_a_tty() -> None:
    master, slave = os.openpty()
    try:
        name = os.ttyname(slave)
        with transport.connect(transport.parse(f"tty:{name}")) as channel:
            os.write(master, b"\x03\r\n\x11\xff")  # nothing of it means anything
            assert read(channel, 5) == b"\x03\r\n\x11\xff"
            assert termios.tcgetattr(slave)[2] & termios.CLOCAL  # no carrier is waited for
            write(channel, b"\r\n")
            assert os.read(master, 10) == b"\r\n"
        with Listener(transport.parse(f"tty:{name}")) as listener:
            assert listener.accept(0.01) is None
            os.write(master, b"x")  # somebody has come
            far = listener.accept(10)
            assert far is not None and read(far, 1) == b"x"
            far.close()
    finally:
        os.close(master)
        os.close(slave)


NO_TTYS = [("/dev/null", "is no serial line"), ("/no/such", "cannot be opened"), ("", "cannot be opened")]


@pytest.mark.parametrize(("path", "words"), NO_TTYS)
def test_no_tty(path: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        transport.connect(transport.parse(f"tty:{path}"))


def test_descriptors_stay_the_callers() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with transport.connect(transport.parse(f"fd:{ours.fileno()}")) as channel:
            write(channel, b"x")
        with Listener(transport.parse(f"fd:{theirs.fileno()},{theirs.fileno()}")) as listener:
            far = listener.accept()
            assert far is not None and read(far, 1) == b"x"
        ours.send(b"y")


def test_ssh_cannot_be_listened_at() -> None:
    with pytest.raises(BadInput, match="cannot be listened at; the source runs pyhv receive - here by itself"):
        Listener(transport.parse("ssh://x"))


# ------------------------------------------------------------------------------------------------------------- ssh


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Channel]:
    """What `ssh://me@there` leads to, where ssh is this shell script."""

    def make(script: str) -> Channel:
        path = tmp_path / "ssh"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o700)
        monkeypatch.setenv("PYHV_SSH", f"{path} -x")
        monkeypatch.setenv("PYHV_REMOTE", "/opt/pyhv")
        return transport.connect(transport.parse("ssh://me@there"))

    return make


BEGINS = "echo pyhv-receive-begins; "


def test_ssh_runs_receive_there(ssh: Callable[[str], Channel]) -> None:
    with ssh('shift 2; eval "${@#exec}" | head -1; echo "$@"; exec cat') as channel:
        expected = b"echo pyhv-receive-begins; exec /opt/pyhv receive -\n"
        assert read(channel, len(expected)) == expected
        write(channel, b"back")
        assert read(channel, 4) == b"back"


@pytest.mark.parametrize("greeting", ["", "echo hello", "printf 'Last login: Mon\\r\\n$ '", "printf 'no newline'"])
def test_what_a_login_shell_prints_is_skipped(ssh: Callable[[str], Channel], greeting: str) -> None:
    with ssh(f"{greeting or ':'}; {BEGINS} exec cat") as channel:
        write(channel, b"back")
        assert read(channel, 4) == b"back"


def test_a_login_shell_that_prints_and_runs_nothing(ssh: Callable[[str], Channel]) -> None:
    with pytest.raises(HostError) as caught:
        ssh("echo 'This account is\x1b[1m not available.'; exit 1")
    said = "it ended before pyhv was begun there; before that the shell there printed: This account is [1m not avail"
    assert said in str(caught.value) and str(caught.value).endswith("; the VM runs on here")
    with pytest.raises(HostError, match="the shell there printed too much on stdout; keep it quiet for commands"):
        ssh("yes | head -c 70000; exec sleep 60")


def test_ssh_has_the_environment_and_the_port_that_it_is_given(
    ssh: Callable[[str], Channel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ssh(f"{BEGINS} exec cat").close()
    other = tmp_path / "bin"
    other.mkdir()
    (other / "mine").write_text(f'#!/bin/sh\n{BEGINS} echo "$SSH_AUTH_SOCK $PYHV_REMOTE $OWN $*"; exec cat\n')
    (other / "mine").chmod(0o700)
    monkeypatch.setenv("SSH_AUTH_SOCK", "the VM's")
    monkeypatch.setenv("OWN", "kept")
    given = {"PYHV_SSH": "mine -v", "SSH_AUTH_SOCK": "/mine", "PATH": f"{other}:/usr/bin:/bin"}
    with transport.connect(transport.parse("ssh://there:22"), environment=given) as channel:
        expected = b"/mine  kept -v -p 22 there echo pyhv-receive-begins; exec pyhv receive -\n"
        assert read(channel, len(expected)) == expected


def test_what_ssh_says_when_it_fails(ssh: Callable[[str], Channel]) -> None:
    with pytest.raises(HostError, match=r"Permission denied \[2J \(publickey\)\."):
        ssh("echo 'Permission denied\x1b[2J (publickey).' >&2; exit 255")
    with pytest.raises(HostError, match="it ended before pyhv was begun there"):
        ssh("exit 255")
    with ssh(f"{BEGINS} echo 'pyhv: not found' >&2; exit 127") as channel:
        assert read(channel, 1) == b""
        assert channel.complaint() == "pyhv: not found"


def test_an_ssh_that_does_not_end_is_ended(ssh: Callable[[str], Channel], monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    wait = subprocess.Popen.wait

    def impatient(self: Any, timeout: float | None = None) -> int:
        waited.append(timeout or 0)
        return wait(self, timeout and 0.05)

    monkeypatch.setattr(subprocess.Popen, "wait", impatient)
    begin = time.monotonic()
    ssh(f"trap '' HUP TERM; {BEGINS} while :; do sleep 1; done").close()
    assert waited == [5.0, 0] and time.monotonic() - begin < 5


def test_no_ssh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYHV_SSH", "/no/such/ssh")
    with pytest.raises(BadInput, match="/no/such/ssh: cannot be run: No such file or directory; install an ssh client"):
        transport.connect(transport.parse("ssh://x"))


# ------------------------------------------------------------------------------------------------------------- TLS


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tls]:
    """ "good": two sides of one authority; "stranger": of another one; "nameless": for another host."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl command to make certificates with")
    base = tmp_path_factory.mktemp("tls")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True, cwd=base, timeout=60)

    def authority(name: str) -> None:
        openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj",
                f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem", "-addext",
                "basicConstraints=critical,CA:TRUE")  # fmt: skip

    def leaf(name: str, by: str, names: str) -> None:
        openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}",
                "-keyout", f"{name}.key", "-out", f"{name}.csr")  # fmt: skip
        (base / f"{name}.ext").write_text(f"subjectAltName={names}\n")
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", f"{by}.pem", "-CAkey", f"{by}.key", "-CAcreateserial",
                "-days", "2", "-out", f"{name}.pem", "-extfile", f"{name}.ext")  # fmt: skip

    authority("ca")
    authority("other")
    leaf("good", "ca", "DNS:localhost,IP:127.0.0.1")
    leaf("stranger", "other", "DNS:localhost,IP:127.0.0.1")
    leaf("nameless", "ca", "DNS:elsewhere.example")
    made = {name: Tls(f"{base}/{name}.pem", f"{base}/{name}.key", f"{base}/ca.pem") for name in ("good", "nameless")}
    made["stranger"] = Tls(f"{base}/stranger.pem", f"{base}/stranger.key", f"{base}/ca.pem")
    made["trusts others"] = Tls(f"{base}/good.pem", f"{base}/good.key", f"{base}/other.pem")
    return made


URI = "tls://localhost:0"


def test_tls(certificates: dict[str, Tls]) -> None:
    with connected(URI, (certificates["good"], certificates["good"])) as (far, near):
        check_both_ways(far, near)


def test_tls_carries_much_both_ways_at_once(certificates: dict[str, Tls]) -> None:
    data = {"far": os.urandom(6 << 20), "near": os.urandom(6 << 20)}
    with connected(URI, (certificates["good"], certificates["good"])) as (far, near):
        came: dict[str, bytes] = {}
        threads = [
            threading.Thread(target=write, args=(far, data["far"])),
            threading.Thread(target=write, args=(near, data["near"])),
            threading.Thread(target=lambda: came.update(near=read(near, 6 << 20))),
            threading.Thread(target=lambda: came.update(far=read(far, 6 << 20))),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT)
        assert came == {"near": data["far"], "far": data["near"]}


@pytest.mark.parametrize("who", ["far", "near"])
def test_what_was_written_before_the_end_arrives(certificates: dict[str, Tls], who: str) -> None:
    data = os.urandom(100_000)
    with connected(URI, (certificates["good"], certificates["good"])) as (far, near):
        writer, reader = (far, near) if who == "far" else (near, far)
        write(writer, data)
        writer.close()
        assert read(reader, len(data) + 1) == data


def test_a_side_that_takes_nothing_is_left(certificates: dict[str, Tls]) -> None:
    """close() does not wait for somebody who does not read."""
    with connected(URI, (certificates["good"], certificates["good"])) as (_far, near):
        os.set_blocking(near.out_fd, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(near.out_fd, bytes(1 << 16))
        begin = time.monotonic()
        near.close()
        assert time.monotonic() - begin < 10


DISTRUST = [
    ("good", "stranger"), ("stranger", "good"), ("nameless", "good"),
    ("good", "trusts others"), ("trusts others", "good"),
]  # fmt: skip


@pytest.mark.parametrize(("server", "client"), DISTRUST)
def test_who_is_not_trusted_is_refused(certificates: dict[str, Tls], server: str, client: str) -> None:
    """By the one who does not trust, with a word; the other one then finds the connection closed."""
    with (
        pytest.raises(PyhvError, match=r"do not trust each other: .*; check the certificates|TLS with"),
        connected(URI, (certificates[server], certificates[client])) as (far, near),
    ):
        write(near, b"x")
        assert read(far, 1) == b""


def test_who_shows_no_certificate_is_refused(certificates: dict[str, Tls]) -> None:
    import ssl

    with Listener(transport.parse(URI), certificates["good"]) as listener:
        port = int(listener.where.rpartition(":")[2])

        def come() -> None:
            context = ssl.create_default_context(cafile=certificates["good"].authority)
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("localhost", port)) as sock,
                context.wrap_socket(sock, server_hostname="localhost") as wrapped,
            ):
                wrapped.recv(1)

        thread = threading.Thread(target=come)
        thread.start()
        with pytest.raises(BadInput, match=r"the two sides do not trust each other: .*CERTIFICATE"):
            listener.accept(TIMEOUT)
        thread.join(TIMEOUT)


def test_who_speaks_no_tls_is_refused(certificates: dict[str, Tls]) -> None:
    with (
        Listener(transport.parse(URI), certificates["good"]) as listener,
        socket.create_connection(("localhost", int(listener.where.rpartition(":")[2]))) as sock,
    ):
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        with pytest.raises(BadInput, match="the two sides do not trust each other"):
            listener.accept(TIMEOUT)


def test_a_stranger_does_not_keep_the_right_one_out(certificates: dict[str, Tls]) -> None:
    away: list[PyhvError] = []
    with Listener(transport.parse(URI), certificates["good"]) as listener:
        found: list[Channel | None] = []
        thread = threading.Thread(target=lambda: found.append(listener.accept(TIMEOUT, away.append)))
        thread.start()
        where = transport.parse(listener.where)
        with socket.create_connection(("localhost", where.port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                stranger.recv(100)
            with transport.connect(where, certificates["good"], timeout=5.0) as near:
                thread.join(TIMEOUT)
                assert found[0] is not None
                with found[0] as far:
                    write(near, b"here")
                    assert read(far, 4) == b"here"
    assert len(away) == 1 and re.match(r"127\.0\.0\.1:\d+: the two sides do not trust each other", str(away[0]))


def test_certificates_that_are_none(certificates: dict[str, Tls], tmp_path: Path) -> None:
    good = certificates["good"]
    for tls in (None, good._replace(key="")):
        with pytest.raises(BadInput, match=r"needs certificates; give tls=Tls\(certificate, key, authority\)"):
            Listener(transport.parse(URI), tls)
    (tmp_path / "junk").write_text("junk")
    sealed = ["openssl", "pkey", "-in", good.key, "-out", f"{tmp_path}/sealed", "-aes128", "-passout", "pass:secret"]
    subprocess.run(sealed, check=True, capture_output=True)
    for bad in (
        good._replace(certificate="/no/such"),
        good._replace(key=certificates["stranger"].key),
        good._replace(authority=f"{tmp_path}/junk"),
        good._replace(key=f"{tmp_path}/sealed"),  # OpenSSL would ask at the terminal
    ):
        with pytest.raises(BadInput, match=r"cannot be used: .*; give PEM files that belong together"):
            Listener(transport.parse(URI), bad)


def test_a_side_without_good_certificates_does_not_connect(certificates: dict[str, Tls]) -> None:
    """The other side takes one VM, and would have had its one visitor."""
    with Listener(transport.parse(URI), certificates["good"]) as listener:
        with pytest.raises(BadInput, match="needs certificates"):
            transport.connect(transport.parse(listener.where))
        assert listener.accept(0.01) is None


# ------------------------------------------------------------------------------------------- who is at the other end


STRANGER = 54321


def as_a_stranger(work: Callable[[], None]) -> int:
    """Does it in a process of another user's; the process, which then waits to be ended."""
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setuid(STRANGER)
            work()
            time.sleep(60)
        finally:
            os._exit(1)
    return child


def end(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")


@needs_root
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_tcp_turns_other_users_away(host: str) -> None:
    turned: list[PyhvError] = []
    held: list[object] = []
    with Listener(transport.parse(f"tcp://{host}:0")) as listener:
        address = transport.parse(listener.where)
        child = as_a_stranger(lambda: held.append(vars(transport)["_connect"](address, 5.0)))
        try:
            assert listener.accept(2, turned.append) is None
        finally:
            end(child)
        assert f"belongs to the user with the number {STRANGER}" in str(turned[0])
        # One who has gone again, having said all that he wanted to say, is nobody.
        gone = as_a_stranger(lambda: os._exit(vars(transport)["_connect"](address, 5.0).close() or 0))
        assert os.waitpid(gone, 0)[1] == 0
        assert listener.accept(2, turned.append) is None and len(turned) == 2
        with transport.connect(address) as near, listener.accept(5, turned.append) as far:  # type: ignore[union-attr]
            write(near, b"x")
            assert read(far, 1) == b"x"
            assert far.is_of(os.getpid()) and not far.is_of(os.getppid()) and not far.is_of(1)


@needs_root
def test_tcp_does_not_send_to_other_users() -> None:
    ready, tell = os.pipe()

    def listen() -> None:
        sock = socket.create_server(("127.0.0.1", 0))
        os.write(tell, b"%d" % sock.getsockname()[1])
        time.sleep(60)

    child = as_a_stranger(listen)
    try:
        address = transport.parse(f"tcp://127.0.0.1:{os.read(ready, 10).decode()}")
        with pytest.raises(BadInput, match=f"belongs to the user with the number {STRANGER}; use tls://"):
            transport.connect(address)
    finally:
        end(child)
        os.close(ready)
        os.close(tell)


@needs_root
def test_unix_looks_who_listens_and_who_connects() -> None:
    with tempfile.TemporaryDirectory() as base:  # in a folder that others may reach
        os.chmod(base, 0o1777)
        path = f"{base}/m"
        address = transport.parse(f"unix:{path}")

        def listen() -> None:
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(path)
            sock.listen(1)
            time.sleep(60)

        child = as_a_stranger(listen)
        try:
            said, deadline = "cannot be reached", time.monotonic() + 10
            while "cannot be reached" in said and time.monotonic() < deadline:
                with pytest.raises(BadInput) as caught:
                    transport.connect(address)
                said = str(caught.value)
            assert f"belongs to the user with the number {STRANGER}" in said
        finally:
            end(child)
        turned: list[PyhvError] = []
        held: list[object] = []
        with Listener(address) as listener:
            os.chmod(path, 0o666)  # as nothing of pyhv's does
            child = as_a_stranger(lambda: held.append(vars(transport)["_connect"](address, 5.0)))
            try:
                assert listener.accept(2, turned.append) is None
            finally:
                end(child)
            assert f"belongs to the user with the number {STRANGER}" in str(turned[0])


def test_a_unix_socket_is_not_put_where_everybody_may_replace_it(tmp_path: Path) -> None:
    inner = tmp_path / "open" / "mine"
    inner.mkdir(parents=True)
    inner.parent.chmod(0o777)
    address = transport.parse(f"unix:{inner}/m")
    words = f"everybody may replace what is in {inner.parent} .mode 0777.; take a path in a folder of your own"
    with pytest.raises(BadInput, match=words):
        Listener(address)
    with pytest.raises(BadInput, match=words):
        transport.connect(address)
    inner.parent.chmod(0o1777)
    with Listener(address) as listener, transport.connect(address), listener.accept(5) as far:  # type: ignore[union-attr]
        assert far.is_of(os.getpid()) and not far.is_of(1)
    assert os.listdir(inner) == []
