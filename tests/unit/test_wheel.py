"""One wheel serves Python 3.11 and all later ones: it is tagged so, and runs there."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from pyhv._native import _pyhv

ROOT = Path(__file__).resolve().parents[2]

TAG = """
from distutils.core import run_setup
import setuptools
command = run_setup("setup.py", ["-q"], stop_after="init").get_command_obj("bdist_wheel")
command.ensure_finalized()
print(*command.get_tag())
"""


def test_the_tag_says_so() -> None:
    done = subprocess.run([sys.executable, "-c", TAG], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    python, abi, platform = done.stdout.splitlines()[-1].split()
    assert (python, abi) == ("cp311", "abi3") and platform.startswith("linux_")


def test_the_engine_uses_the_stable_abi() -> None:
    assert ".abi3.so" in EXTENSION_SUFFIXES and _pyhv.__file__.endswith(".abi3.so")


def works(python: str) -> bool:
    try:
        return subprocess.run([python, "-c", ""], capture_output=True, timeout=60).returncode == 0
    except OSError:
        return False


def said(*words: object) -> str:
    command = list(map(str, words))
    return subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.skipif(os.environ.get("CI") != "true", reason="builds the engine again, fetches cffi: make wheel runs it")
def test_it_runs_on_later_pythons(tmp_path: Path) -> None:
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    source.mkdir()
    subprocess.run(f"git archive HEAD | tar -x -C {source}", shell=True, cwd=ROOT, check=True, timeout=60)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(wheels), "."]
    subprocess.run(pip, cwd=source, check=True, timeout=600)
    (wheel,) = wheels.iterdir()
    later = [f"python3.{minor}" for minor in range(sys.version_info.minor + 1, 20)]
    found = [python for python in later if works(python)]
    if not found:
        pytest.skip("no later Python is installed here")
    for python in found:
        venv = tmp_path / python
        subprocess.run([python, "-m", "venv", str(venv)], check=True, timeout=120)
        subprocess.run([venv / "bin/pip", "install", "-q", str(wheel)], check=True, timeout=300)
        assert "hyperv-r2" in said(venv / "bin/pyhv", "profiles")
        code = "from pyhv._native import cpuid; print(cpuid(0, 0)[0] > 0)"
        assert said(venv / "bin/python", "-c", code) == "True\n"
