"""What a HostError says of the limits of this process."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pyhv.cli import soak
from pyhv.errors import BadInput, HandoverUnknown, HostError, TimedOut


@contextmanager
def limited(number: int, most: int) -> Iterator[None]:
    old = resource.getrlimit(number)
    resource.setrlimit(number, (most, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(number, old)


@pytest.mark.parametrize(
    ("errnum", "number", "words"),
    [
        (errno.EFBIG, resource.RLIMIT_FSIZE, "this process may have 1048576 bytes in a file (ulimit -f)"),
        (errno.EMFILE, resource.RLIMIT_NOFILE, "this process may have 512 open files (ulimit -n)"),
    ],
)
def test_the_limit_behind_an_error_is_named(errnum: int, number: int, words: str) -> None:
    with limited(number, 512 if number == resource.RLIMIT_NOFILE else 1 << 20):
        error = HostError("write x", errnum, "pwrite", "try again")
    assert error.detail == f"pwrite, {words}" and str(error).endswith(f", pwrite, {words}; try again")
    # Whoever passes it on, from another process even, names that process's limit and no other.
    assert HostError("write x", errnum, error.detail).detail == error.detail


def test_no_limit_is_named_where_it_is_not_the_reason() -> None:
    with limited(resource.RLIMIT_FSIZE, 1 << 20):
        assert str(HostError("write x", errno.ENOSPC)) == "write x: No space left on device"
    assert str(HostError("write x", errno.EFBIG)) == "write x: File too large"


def test_the_soaks_state_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "state"
    state = soak._State(str(path))
    state.save()
    before = path.read_bytes()
    state.downtimes = [1.0] * 5000
    with (
        limited(resource.RLIMIT_FSIZE, 4096),
        pytest.raises(HostError, match=r"state: File too large, .* 4096 bytes in a file \(ulimit -f\)"),
    ):
        state.save()
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["state"]


def test_what_must_not_be_tried_again_is_no_error_of_the_host() -> None:
    """Whoever tries again after HostError would run a second copy; and nobody's coming is no bad input."""
    assert not issubclass(HandoverUnknown, HostError | BadInput)
    assert not issubclass(TimedOut, HostError | BadInput)
