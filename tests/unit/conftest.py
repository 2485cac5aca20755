"""How hypothesis looks for examples: in CI the same ones each time, elsewhere others, whose seed a failure tells."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("pyhv-ci", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("pyhv", deadline=None, print_blob=True)
settings.load_profile("pyhv-ci" if os.environ.get("CI") == "true" else "pyhv")
