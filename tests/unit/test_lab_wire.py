"""The frames between the lab and the agent: tests.lab.wire."""

from __future__ import annotations

import errno
import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.lab import wire

AGENT = Path(__file__).resolve().parents[1] / "lab" / "guest" / "agent.c"

frames = st.builds(
    wire.Frame, st.integers(0, 255), st.integers(0, 2**32 - 1), st.binary(max_size=300) | st.just(b"PyLb" * 20)
)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    at = sorted(place % (len(data) + 1) for place in places)
    return [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True)]


@given(st.lists(frames, max_size=8), st.lists(st.integers(0, 10_000), max_size=8))
def test_frames_survive_any_portions(sent: list[wire.Frame], places: list[int]) -> None:
    data = b"".join(wire.encode(*frame) for frame in sent)
    parser = wire.Parser()
    assert [frame for part in cut(data, places) for frame in parser.feed(part)] == sent
    assert parser.skipped == 0


@given(st.lists(st.tuples(st.binary(max_size=60), frames), max_size=6), st.lists(st.integers(0, 10_000), max_size=8))
def test_what_an_emulator_prints_between_frames_is_skipped(
    sent: list[tuple[bytes, wire.Frame]], places: list[int]
) -> None:
    # Without the magic's first byte noise cannot look like the beginning of a frame and swallow the next.
    noise = [text.replace(b"P", b"-") for text, _ in sent]
    data = b"".join(text + wire.encode(*frame) for text, (_, frame) in zip(noise, sent, strict=True))
    parser = wire.Parser()
    assert [frame for part in cut(data, places) for frame in parser.feed(part)] == [frame for _, frame in sent]
    assert parser.skipped == sum(map(len, noise))


@given(st.binary(max_size=2000))
def test_garbage_never_raises_and_never_stays(data: bytes) -> None:
    parser = wire.Parser()
    list(parser.feed(data))
    assert parser.skipped <= len(data)
    assert len(parser._buffer) <= max(len(data), 0)


@given(frames, st.integers(0, 10_000), st.integers(1, 255))
def test_a_changed_byte_is_noticed(frame: wire.Frame, place: int, change: int) -> None:
    data = bytearray(wire.encode(*frame))
    data[place % len(data)] ^= change
    following = wire.Frame(wire.Type.EXIT, 7, b"next")
    # Enough bytes after it that a length that grew is not merely waited for.
    got = list(wire.Parser().feed(bytes(data) + bytes(wire.MAX_PAYLOAD + 64) + wire.encode(*following)))
    assert frame not in got
    assert got[-1:] == [following]


def test_a_payload_that_is_too_long_is_refused() -> None:
    wire.encode(wire.Type.STDIN, 1, bytes(wire.MAX_PAYLOAD))
    with pytest.raises(ValueError, match="at most 65536"):
        wire.encode(wire.Type.STDIN, 1, bytes(wire.MAX_PAYLOAD + 1))
    huge = struct.pack("<4sB3xII", wire.MAGIC, 1, 1, wire.MAX_PAYLOAD + 1) + bytes(4)
    parser = wire.Parser()
    assert list(parser.feed(huge + wire.encode(2))) == [wire.Frame(2, 0, b"")]


def test_run_holds_everything_in_order() -> None:
    payload = wire.run(["a", "b c"], {"K": "v"}, "/dir", stdin=True)
    assert struct.unpack_from("<III", payload) == (1, 2, 1)
    assert payload[12:] == b"/dir\0a\0b c\0K=v\0"
    for bad in ([], ["a\0b"]):
        with pytest.raises(ValueError):
            wire.run(bad, {}, "/", stdin=False)


@pytest.mark.parametrize(("status", "meaning"), [(0, 0), (0x300, 3), (0xFF00, 255), (9, -9), (0x8B, -11)])
def test_exit_statuses(status: int, meaning: int) -> None:
    assert wire.exit_status(struct.pack("<i", status)) == meaning


def test_a_command_that_could_not_be_started() -> None:
    with pytest.raises(FileNotFoundError):
        wire.exit_status(struct.pack("<i", -errno.ENOENT))


def test_the_agent_knows_the_same_types() -> None:
    types = re.search(r"^enum \{\s+(HELLO.*?)\};", AGENT.read_text(), re.MULTILINE | re.DOTALL)
    assert types is not None
    found = dict(re.findall(r"([A-Z_]+) = (\d+)", types[1]))
    assert {name: int(number) for name, number in found.items()} == {kind.name: kind.value for kind in wire.Type}
    assert re.search(rf"#define MAX_PAYLOAD\s+{wire.MAX_PAYLOAD}\n", AGENT.read_text())
