"""`python -m pyhv` is `pyhv`."""

from __future__ import annotations

from pyhv.cli import program

if __name__ == "__main__":
    program()
