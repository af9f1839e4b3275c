"""The CPU kernels, as an optional extension: without a C compiler, PyTorch computes the same bytes."""

from __future__ import annotations

import sys

from setuptools import Extension, setup

# Neither flag lets a number change: -fno-trapping-math only says that nobody reads the floating-point exception flags.
# -g0 and -s keep the build machine's paths out of the wheel.
COMPILE = ["-O3", "-g0", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]

setup(
    ext_modules=[
        Extension(
            "nvquant.format._native",
            sources=["quantize/format/native.c"],
            define_macros=[("Py_LIMITED_API", "0x030A0000")],
            extra_compile_args=COMPILE,
            extra_link_args=["-s"] if sys.platform.startswith("linux") else [],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
