"""Builds csrc/ into fastalign._C: stable-ABI C++, one wheel for Python >= 3.10, torch >= 2.10."""

from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

sources = sorted(str(path) for path in Path("csrc").glob("*.cpp"))

setup(
    ext_modules=[
        CppExtension(
            "fastalign._C",
            sources,
            depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
            py_limited_api=True,
            extra_compile_args=[
                "-O3",
                "-std=c++17",
                f"-ffile-prefix-map={Path.cwd()}/=",  # errors name csrc/FILE
                "-DPy_LIMITED_API=0x030A0000",
                "-DTORCH_TARGET_VERSION=0x020A000000000000",
            ],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
