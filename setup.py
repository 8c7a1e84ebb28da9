"""Builds the native kernel bodies where there is a C++ compiler; everything else is declared in pyproject.toml.

The bodies are compiled when the package is installed, not when they are first used: no compiler then belongs to a
running program, and what an install says stays true. All that they need beside the compiler are the headers that jaxlib
ships, which is why it is a build requirement (the same versions as are installed anyway).
"""

import importlib.util
import os
import runpy

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

sources = runpy.run_path(os.path.join("pallas_kernels", "cpu", "sources.py"))


class BuildNative(build_ext):
    """Compiles the bodies, or says in one line what goes without them."""

    def build_extension(self, ext):
        try:
            jaxlib = importlib.util.find_spec("jaxlib")
            if jaxlib is None:
                raise FileNotFoundError("jaxlib, whose headers it needs, is not installed")
            ext.extra_compile_args += ["-isystem", os.path.join(jaxlib.submodule_search_locations[0], "include")]
            super().build_extension(ext)
        except Exception as error:
            raise CompileError(f"{error}; bfloat16 decoding on this CPU will take about twice as long") from error


native = Extension(
    "pallas_kernels.cpu._native",
    [os.path.relpath(file) for file in sources["compiled"]()],
    include_dirs=[os.path.join("pallas_kernels", "cpu")],
    # No contraction: whether a sum is fused would else be the compiler's choice, and differ between block sizes.
    extra_compile_args=["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-pthread"],
    extra_link_args=["-pthread"],
    depends=[os.path.relpath(file) for file in sources["read"]()],
    define_macros=[("SPECFORMER_SOURCES", f'"{sources["fingerprint"]()}"')],
    language="c++",
    optional=True,
)

setup(ext_modules=[native], cmdclass={"build_ext": BuildNative})
