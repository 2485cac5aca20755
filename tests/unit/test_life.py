"""docs/life.md shows the table that pyhv.vm.life decides by."""

from __future__ import annotations

from pathlib import Path

from pyhv.vm import life

DOC = (Path(__file__).parents[2] / "docs" / "life.md").read_text(encoding="utf-8")


def test_the_table_is_in_the_docs() -> None:
    lines = ["| | " + " | ".join(life.STATES) + " |"]
    lines += [f"| {asked} | " + " | ".join(cells.values()) + " |" for asked, cells in life.TABLE.items()]
    for line in lines:
        assert line in DOC
    for state in life.STATES:
        assert f"| `{state}` | " in DOC


def test_every_state_has_words() -> None:
    machine = life.Life()
    for state in life.STATES:
        machine.at = state
        for asked in life.TABLE:
            refusal = machine.refusal(asked)
            assert refusal.state == state and refusal.asked == asked and ": it cannot be " in str(refusal)
