"""`python -m pyhv` is `pyhv`."""

from __future__ import annotations

import sys

from pyhv.cli import main

if __name__ == "__main__":
    sys.exit(main())
