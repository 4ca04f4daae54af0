"""Builds the Cython modules; everything else stands in pyproject.toml.

PORTWAY_CRASH_POINTS=1 also builds `sync_crash`, the synchronisation objects with crash points, for their tests.
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

NATIVE = Path("src/portway/_native")
CRASH = NATIVE / "sync_crash.pyx"
HEADERS = [str(path) for ending in ("h", "pxd", "pxi") for path in sorted(NATIVE.glob(f"*.{ending}"))]

setup(
    ext_modules=cythonize(
        [
            Extension(
                f"portway._native.{path.stem}",
                [str(path)],
                depends=HEADERS,
                define_macros=[("PORTWAY_CRASH_POINTS", "1")] if path == CRASH else [],
                extra_compile_args=["-O2"],
            )
            for path in sorted(NATIVE.glob("*.pyx"))
            if path != CRASH or os.environ.get("PORTWAY_CRASH_POINTS")
        ],
        compiler_directives={"language_level": "3", "embedsignature": True},
    )
)
