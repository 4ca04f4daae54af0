"""Builds the Cython modules; everything else stands in pyproject.toml."""

from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

NATIVE = Path("src/portway/_native")

setup(
    ext_modules=cythonize(
        [
            Extension(f"portway._native.{path.stem}", [str(path)], extra_compile_args=["-O2"])
            for path in sorted(NATIVE.glob("*.pyx"))
        ],
        compiler_directives={"language_level": "3", "embedsignature": True},
    )
)
