"""Whatever breaks a migration at whichever message: at most one copy runs, and both sides say what they know.

The points are taken from the protocol's own table, so that a new message cannot be forgotten: it has no recipe here,
never comes, and its tests fail.
"""

from __future__ import annotations

import signal

import pytest

from pyhv.migration import protocol
from pyhv.migration.protocol import Type

from .cli import IN_THE_LAB, LAB_REASON
from .migration import FAULTS, LIMITS, SILENCE, Fault, Hold, Migration, Wishes, check_console, occurrences

if IN_THE_LAB:
    pytest.skip(LAB_REASON, allow_module_level=True)

# What must be done so that a message comes at all.
WISHES = {
    ("source", Type.PAGES_ZSTD): Wishes(LIMITS._replace(compress=True)),
    ("source", Type.CANCEL): Wishes(source_gives_up=True),
    ("destination", Type.CANCEL): Wishes(destination_gives_up=True),
}
HOLDS = {
    ("source", Type.HEARTBEAT): Hold("destination", Type.READY, until=Type.HEARTBEAT),
    ("destination", Type.HEARTBEAT): Hold("source", Type.END, until=Type.HEARTBEAT),
}

POINTS = [
    (sender, kind.number, number)
    for kind in protocol.KINDS
    for sender in ("source", "destination")
    if kind.sender in (sender, "both")
    for number in occurrences(kind)
]

tried: set[tuple[str, Type, int, str]] = set()


def title(value: object) -> str:
    return value.name.lower() if isinstance(value, Type) else str(value).replace(" ", "-")


@pytest.mark.parametrize("what", FAULTS, ids=title)
@pytest.mark.parametrize(("sender", "kind", "number"), POINTS, ids=title)
def test_a_fault(sender: str, kind: Type, number: int, what: str) -> None:
    wishes = WISHES.get((sender, kind), Wishes())
    with Migration(wishes, Fault(sender, kind, what, number), HOLDS.get((sender, kind))) as migration:
        migration.run()
        proxy = migration.proxy
        assert proxy.fired, f"no message {kind.name} came from the {sender}: {proxy.seen}"
        tried.add((sender, kind, number, what))
        check(migration)


def check(migration: Migration) -> None:
    """Who runs the guest is what the protocol says about the messages that arrived, and both sides say it."""
    proxy = migration.proxy
    # What a side said before it was killed was true, and tells nothing of what is.
    source, destination = (
        None if proxy.killed == name else migration.outcome[name] for name in ("source", "destination")
    )
    ready, commit, running, cancelled = (
        ("destination", Type.READY) in proxy.delivered,
        ("source", Type.COMMIT) in proxy.delivered,
        ("destination", Type.RUNNING) in proxy.delivered,
        ("destination", Type.CANCEL) in proxy.delivered,
    )
    if proxy.killed == "source":
        assert source is None
    elif running:
        assert source is not None and (source["what"], source["runs"]) == ("migrated", False)
    elif ready and not cancelled:
        assert source is not None and (source["what"], source["runs"]) == ("HandoverUnknown", False)
        assert "was handed over and may run there, but no answer came (" in source["text"]
    else:
        assert source is not None and source["what"] in ("HostError", "BadInput", "GaveUp") and source["runs"]
    if proxy.killed == "destination":
        assert destination is None
    elif commit:
        assert destination is not None and destination["what"] == "arrived" and destination["runs"]
    else:
        assert destination is not None and destination["what"] in ("HostError", "BadInput", "GaveUp")
    for outcome in (source, destination):
        if outcome is not None:
            assert outcome["leaked"] == 0, outcome
            if outcome["what"] not in ("migrated", "arrived"):
                assert any(word in outcome["text"] for word in WORDS), outcome["text"]

    # The guest goes on where it runs; where it runs nowhere though its source lives, it does when it is told to.
    if destination is not None and destination["runs"]:
        migration.destination.tell("count")
    elif source is not None and not commit:
        migration.source.tell("count" if source["runs"] else "force")
    check_console(migration.console())


# What people are told: one of these says it.
WORDS = (
    "the other side has closed the link",
    "nothing came from the other side for",
    "was changed on the way",
    "gives up here",
    "gives up there",
    "no message",
    "too long",
    "did not come",
    "no further progress",
    "no synced within",
    "no answer within",
    "no ready within",
    "no running within",
)


def test_every_message_of_the_table_was_tried(request: pytest.FixtureRequest) -> None:
    names = {item.originalname for item in request.session.items if isinstance(item, pytest.Function)}
    selected = sum(item.name.startswith("test_a_fault[") for item in request.session.items)
    assert "test_a_fault" in names or selected == 0
    if selected < len(POINTS) * len(FAULTS):
        pytest.skip("only some of the faults were selected")
    assert {(sender, kind, number) for sender, kind, number, _ in tried} == set(POINTS)
    assert {kind for _, kind, _, _ in tried} == set(Type)


def test_without_a_fault_every_message_arrives() -> None:
    with Migration() as migration:
        migration.run()
        check(migration)
        assert migration.outcome["destination"] is not None and migration.outcome["destination"]["runs"]


def test_a_second_copy_would_be_seen() -> None:
    """The checker above: a source that lets its guest run on after it was handed over."""
    with Migration(Wishes(second_copy=True)) as migration:
        migration.run()
        assert migration.source.tell("nothing")
        with pytest.raises(AssertionError, match="more than one copy"):
            check(migration)


@pytest.mark.parametrize("kind", [Type.VCPU, Type.END], ids=title)
def test_a_destination_that_hangs_while_the_guest_stands(kind: Type) -> None:
    """The source resumes within its silence and 100 ms; the other side, when it is there again, forgets the guest."""
    delays = []
    for _ in range(5):  # other processes may have taken the processors away
        with Migration(Wishes(), Fault("source", kind, "stop destination")) as migration:
            migration.run(("source",))
            source = migration.outcome["source"]
            assert source is not None and (source["what"], source["runs"]) == ("HostError", True)
            assert "nothing came from the other side for" in source["text"]
            migration.source.tell("count")
            migration.destination.kill(signal.SIGCONT)
            migration.run()
            check(migration)
            delays.append(source["at"] - migration.proxy.stopped_at)
            if delays[-1] < SILENCE + 0.1:
                return
    raise AssertionError(f"the source resumed after {delays} seconds")
