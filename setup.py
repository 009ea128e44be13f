"""The one thing that setup.cfg cannot say: an optional C library, left out where no compiler is."""

import sys
from glob import glob
from hashlib import sha256
from pathlib import Path

from setuptools import Extension, setup

# Rounding is part of the result: nothing may be contracted or reordered. OpenMP's symbols are not linked, so
# that they are found in the runtime that torch has loaded: a second one would fight it for the processors.
GCC = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-fopenmp"]

SOURCES = sorted(glob("eagerq/native/*.c"))
HEADERS = sorted(glob("eagerq/native/*.h"))
# so that a library left from an earlier build is not mistaken for this one (see eagerq/native/library.py)
STAMP = sha256(b"".join(Path(name).read_bytes() for name in sorted(SOURCES + HEADERS))).hexdigest()[:16]

setup(
    ext_modules=[
        Extension(
            "eagerq.native._kernels",
            SOURCES,
            depends=HEADERS,
            define_macros=[("EAGERQ_STAMP", f'"{STAMP}"')],
            extra_compile_args=GCC if sys.platform == "linux" else [],
            optional=True,
            py_limited_api=True,  # it holds nothing of Python's, so one build serves every version
        )
    ]
)
