"""What pyproject.toml cannot say: the C engine, and the files that the build makes from one source of truth."""

import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent


class BuildPy(build_py):
    """Makes the feature table's modules and the guest images before the package's files are collected."""

    def run(self) -> None:
        for script in ("pyhv/cpu/generate.py", "guest_images/build.py"):
            subprocess.run([sys.executable, str(HERE / script)], check=True)
        super().run()


setup(
    cffi_modules=["pyhv/_native/build.py:ffibuilder"],
    cmdclass={"build_py": BuildPy},
    # cffi builds the engine for Python's stable ABI: one wheel serves every Python from this one on.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
