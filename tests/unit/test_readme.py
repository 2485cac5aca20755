"""The README is always true: its tables are those of the code."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import pyhv
from pyhv import guests
from pyhv.cli import COMMANDS
from pyhv.outcome import CAUSES

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_exit_statuses_is_the_codes() -> None:
    rows = [line.split("|")[1:4] for line in README.splitlines() if line.startswith("|") and line.count("`") == 2]
    shown = {cause.strip(" `"): (status.strip(), meaning.strip()) for status, cause, meaning in rows}
    for cause, (status, meaning) in CAUSES.items():
        assert shown[cause] == ("the byte" if cause == "guest-exit" else str(status), meaning)


def test_every_bundled_guest_is_named() -> None:
    for name in guests.names():
        assert f"`{name}`" in README


def test_the_tour_shows_every_command_and_no_other() -> None:
    shown = set(re.findall(r"pyhv ([a-z]+)\b", " ".join(re.findall(r"^\$ .*$|`[^`\n]+`", README, re.MULTILINE))))
    assert shown == set(COMMANDS)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists()


def test_every_make_target_in_the_table_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in README.splitlines():
        if line.startswith("| `make "):
            assert f"\n{line.split('`')[1].removeprefix('make ')}:" in makefile


def test_the_map_names_what_is_there() -> None:
    """Each file and folder that docs/architecture.md names, by its path or by its name."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    places = [ROOT, ROOT / "pyhv", ROOT / "csrc", ROOT / "docs"]
    named = set(re.findall(r"[\w./-]+\.(?:py|c|h|toml|md)\b", text)) | set(re.findall(r"`([\w/]+/)`", text))
    assert len(named) > 50
    for name in sorted(name for name in named if "NAME" not in name):
        assert any((place / name).exists() for place in places) or list(ROOT.glob(f"[cdgpt]*/**/{name}")), name


def test_what_the_package_names_can_be_imported() -> None:
    """Those that are looked up when they are first used are where they are said to be."""
    for name in pyhv.__all__:
        assert getattr(pyhv, name) is not None
    with pytest.raises(AttributeError):
        pyhv.Nothing  # noqa: B018
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)
    assert "version" not in project["project"]  # there is one version number
    assert metadata.version("pyhv") == pyhv.__version__
