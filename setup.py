"""Build of the Cython modules; everything else about the package is in pyproject.toml.

The flags are the same on every machine: no -march=native (each instruction set is compiled from micro_body.h and chosen at
import), no -ffast-math and no contraction (every fused operation is written as one), or the bits would depend on the build.
"""

from Cython.Build import cythonize
from setuptools import Extension, setup

FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=off"]
MICROKERNELS = [f"pygpt/csrc/micro_{isa}.c" for isa in ("baseline", "avx2", "avx512", "neon")]
MICROKERNELS += [
    f"pygpt/csrc/quantised_{isa}.c" for isa in ("baseline", "avx2", "avxvnni", "avx512vnni", "neon", "neondot")
]
HEADERS = [
    f"pygpt/csrc/{name}.h"
    for name in ("micro", "micro_body", "micro_training", "quantised_body", "quantise", "blocks", "sync", "trace", "sampler")
]

setup(
    ext_modules=cythonize(
        [
            Extension(
                "pygpt._kernels",
                ["pygpt/_kernels.pyx", *MICROKERNELS],
                depends=[*HEADERS, "pygpt/_kernels.pxd"],
                include_dirs=["pygpt/csrc"],
                extra_compile_args=FLAGS,
            ),
            Extension(
                "pygpt._backward",
                ["pygpt/_backward.pyx"],
                depends=[*HEADERS, "pygpt/_kernels.pxd"],
                include_dirs=["pygpt/csrc"],
                extra_compile_args=FLAGS,
            ),
            Extension("pygpt._signals", ["pygpt/_signals.pyx"], extra_compile_args=FLAGS),
            Extension("pygpt._reference", ["pygpt/_reference.pyx"], extra_compile_args=FLAGS),
        ],
    ),
)
