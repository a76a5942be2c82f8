"""Build the Cython modules. Everything else about the package is in pyproject.toml.

The flags are the same on every machine. They leave out -march=native, because each instruction set is compiled from
micro_body.h and chosen at import. They leave out -ffast-math and contraction, because the bits would then depend on the build.
The source writes out every fused operation. -fno-wrapv undoes a flag of Python's own build that slows the loops by up to 3%.
-g0 compiles a quarter faster to the same code, and keeps symbols for profilers."""

import os
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from itertools import chain

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FLAGS = ["-O3", "-g0", "-std=gnu11", "-ffp-contract=off", "-fno-wrapv"]
MICROKERNELS, HEADERS = sorted(glob("pygpt/csrc/*.c")), sorted(glob("pygpt/csrc/*.h"))
CORES = os.cpu_count() or 1


class BuildSideBySide(build_ext):
    """Compile one source file per core at a time, across all modules; link a module once its files are done."""

    def build_extensions(self):
        """Build all modules."""
        compile_one_by_one = self.compiler.compile

        def compile_side_by_side(sources, **options):
            return [*chain.from_iterable(jobs.map(lambda source: compile_one_by_one([source], **options), sources))]

        self.compiler.compile = compile_side_by_side
        self.parallel = len(self.extensions)  # threads that only wait for compile jobs, and link
        with ThreadPoolExecutor(CORES) as jobs:
            super().build_extensions()


def extension(name, *sources, kernels=False):
    """Return one module of the package. kernels: whether it includes the headers of the kernels."""
    own = {"depends": [*HEADERS, "pygpt/_kernels.pxd"], "include_dirs": ["pygpt/csrc"]} if kernels else {}
    return Extension(f"pygpt.{name}", [f"pygpt/{name}.pyx", *sources], extra_compile_args=FLAGS, **own)


if __name__ == "__main__":  # the processes that cythonize() starts import this file, too
    modules = [extension("_kernels", *MICROKERNELS, kernels=True), extension("_backward", kernels=True)]
    modules += [extension("_reference"), extension("_signals")]
    setup(ext_modules=cythonize(modules, nthreads=CORES), cmdclass={"build_ext": BuildSideBySide})
