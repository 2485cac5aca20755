"""Artefacts of the lab are whole or not there: tests.lab.cache."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.lab import cache

PROJECT = Path(__file__).resolve().parents[2]
json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5)


def fill(text: str = "content"):
    def build(folder: Path) -> None:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text(text)

    return build


@given(st.dictionaries(st.text(), json_values))
def test_a_key_does_not_depend_on_order(inputs: dict[str, object]) -> None:
    assert cache.key(inputs) == cache.key(dict(reversed(inputs.items())))


@given(st.dictionaries(st.text(), json_values, min_size=1), st.data())
def test_a_key_depends_on_every_input(inputs: dict[str, object], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(inputs)))
    assert cache.key(inputs) != cache.key({key: value for key, value in inputs.items() if key != name})
    assert cache.key(inputs) != cache.key({**inputs, name: [inputs[name], "changed"]})


def test_it_is_made_once(tmp_path: Path) -> None:
    made = []

    def build(folder: Path) -> None:
        made.append(folder)
        fill()(folder)

    one = cache.artefact("thing", {"a": 1}, build, base=tmp_path)
    assert cache.artefact("thing", {"a": 1}, build, base=tmp_path) == one
    assert (one / "deep" / "file").read_text() == "content"
    assert len(made) == 1 and made[0] != one
    assert cache.artefact("thing", {"a": 2}, build, base=tmp_path) != one


def test_a_maker_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        cache.artefact("thing", {}, build, base=tmp_path)
    assert not list(tmp_path.glob("thing-*")) and not list((tmp_path / "unfinished").iterdir())
    assert (cache.artefact("thing", {}, fill(), base=tmp_path) / "deep" / "file").exists()


def test_a_maker_that_is_killed_leaves_nothing_that_is_taken(tmp_path: Path) -> None:
    program = f"""
import os, pathlib, signal, sys
sys.path.insert(0, {str(PROJECT)!r})
from tests.lab import cache
def build(folder):
    (folder / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
cache.artefact("thing", {{}}, build, base=pathlib.Path({str(tmp_path)!r}))
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == -9
    assert list((tmp_path / "unfinished").glob("thing-*/half"))
    folder = cache.artefact("thing", {}, fill(), base=tmp_path)
    assert sorted(item.name for item in folder.iterdir()) == ["deep", cache.MANIFEST]


@pytest.mark.parametrize("damage", ["shorter", "gone", "no manifest", "bad manifest"])
def test_a_damaged_one_is_made_again(tmp_path: Path, damage: str) -> None:
    folder = cache.artefact("thing", {}, fill(), base=tmp_path)
    file, manifest = folder / "deep" / "file", folder / cache.MANIFEST
    if damage == "shorter":
        file.write_text("con")
    elif damage == "gone":
        file.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text("[")
    again = cache.artefact("thing", {}, fill(), base=tmp_path)
    assert again == folder and file.read_text() == "content" and manifest.exists()


def test_one_that_is_refused_is_made_again(tmp_path: Path) -> None:
    folder = cache.artefact("thing", {}, fill("old"), base=tmp_path)
    cache.artefact("thing", {}, fill("new"), base=tmp_path, accept=lambda found: False)
    assert (folder / "deep" / "file").read_text() == "new"


def test_two_makers_at_once_make_one(tmp_path: Path) -> None:
    made: list[int] = []

    def build(folder: Path) -> None:
        made.append(1)
        time.sleep(0.1)
        fill()(folder)

    threads = [
        threading.Thread(target=cache.artefact, args=("thing", {}, build), kwargs={"base": tmp_path}) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_old_ones_go(tmp_path: Path) -> None:
    old = [cache.artefact("thing", {"n": n}, fill(), base=tmp_path) for n in range(5)]
    other = cache.artefact("thing-other", {}, fill(), base=tmp_path)
    for age, folder in enumerate([*old, other]):
        past = time.time() - cache.KEEP_MANY - 100 + age
        os.utime(folder, (past, past))
    cache.artefact("thing", {"n": 5}, fill(), base=tmp_path)
    # The newest three stay however old; another name that begins alike is not touched.
    assert [folder.exists() for folder in old] == [False, False, False, True, True]
    assert other.exists()


def test_the_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYHV_LAB_CACHE", str(tmp_path / "own"))
    assert cache.root() == tmp_path / "own"
    monkeypatch.delenv("PYHV_LAB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.root() == tmp_path / "xdg" / "pyhv-lab"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.root() == tmp_path / ".cache" / "pyhv-lab"


def test_digests_of_trees(tmp_path: Path) -> None:
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "file").write_text("one")
    first = cache.tree_digest(tmp_path)
    (tmp_path / "__pycache__" / "x.pyc").write_text("whatever")
    assert cache.tree_digest(tmp_path) == first
    (tmp_path / "file").chmod(0o755)
    second = cache.tree_digest(tmp_path)
    (tmp_path / "file").write_text("two")
    (tmp_path / "file").chmod(0o644)
    assert len({first, second, cache.tree_digest(tmp_path)}) == 3
