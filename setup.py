"""Packaging of lclm: two import packages and one optional native library.

`lclm` lives in `lclm/`. The kernels live in `kernels/` and install as `lclm_kernels`, because a
top-level package importable as `kernels` is already published by somebody else and looked for by
`transformers`.

`kernels/native/*.cpp` becomes one shared library, built by CMake when CMake and a C++ compiler are
on PATH. A build that cannot run or fails prints one warning and the install goes on: the same
functions exist in NumPy (`lclm_kernels.native`), only slower.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent

# What preprocessing is faster with, or reads more kinds of file with; never needed to train.
DATA_REQUIREMENTS = ["gigatoken", "orjson", "zstandard", "pyarrow", "jinja2"]

# What reads s3://, gs://, hf:// and https:// where a path may stand.
REMOTE_REQUIREMENTS = ["fsspec", "s3fs", "gcsfs", "huggingface_hub", "aiohttp"]

TEST_REQUIREMENTS = [
    *DATA_REQUIREMENTS,
    "ray",
    "aiohttp",  # of REMOTE_REQUIREMENTS: tests read from an HTTP server of their own
    "pytest>=8",
    "pytest-timeout",
    "hypothesis",
    "ruff==0.17.6",
    "mypy>=1.15",
    "matplotlib",
    "transformers>=4.46",
    "llama-models",  # Llama 3's tokenizer file and the code that reads it
    "mistral-common",  # SentencePiece models
    "trl",  # chat templates of released models; not imported
]


def find_kernel_packages() -> list[str]:
    """The folders of `kernels/` under their installed name `lclm_kernels`."""
    return ["lclm_kernels"] + [f"lclm_kernels.{name}" for name in find_packages("kernels")]


def build_native(destination: Path) -> str:
    """Build the native library into `destination`; return why it was not built, "" on success."""
    if not sorted(ROOT.glob("kernels/native/*.cpp")):
        return "there are no C++ sources in kernels/native"
    cmake = shutil.which("cmake")
    if cmake is None:
        return "cmake is not on PATH"
    with tempfile.TemporaryDirectory(prefix="lclm-native-") as build_dir:
        configure = [cmake, "-S", str(ROOT), "-B", build_dir, "-DCMAKE_BUILD_TYPE=Release"]
        build = [cmake, "--build", build_dir, "--config", "Release"]
        install = [cmake, "--install", build_dir, "--config", "Release", "--prefix"]
        for command in (configure, build, [*install, str(destination)]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                output = (done.stderr.strip() or done.stdout.strip()).splitlines()
                return f"`{' '.join(command[:2])} ...` failed: {' | '.join(output[-4:])}"
    return ""


class BuildPyAndNative(build_py):
    """Copies the Python files, then puts the native library beside `lclm_kernels/native`."""

    def run(self) -> None:
        super().run()
        base = ROOT / "kernels" if self.editable_mode else Path(self.build_lib) / "lclm_kernels"
        reason = build_native(base / "native")
        if reason:
            print(
                f"warning: lclm: the native library was not built ({reason}); "
                "NumPy versions of the same functions are used",
                file=sys.stderr,
            )


class NativeDistribution(Distribution):
    """Says that the wheel depends on the platform, without an extension module of setuptools."""

    def has_ext_modules(self) -> bool:
        return True


class PlatformWheel(bdist_wheel):
    """One wheel for every Python of a platform: the library has a C ABI and is opened by ctypes."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    name="lclm",
    version="0.1.0",
    description="Long-context language model training on Megatron-core",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["lclm", "lclm.*"]) + find_kernel_packages(),
    package_dir={"lclm_kernels": "kernels"},
    package_data={"lclm_kernels.native": ["*.cpp", "*.h"]},
    # No Triton here: a CUDA build of torch brings the one version it was made for.
    install_requires=[
        "torch>=2.8",  # a matrix product of bf16 that adds to fp32
        "megatron-core>=0.16.1,<0.20",
        "psutil",  # used by megatron-core when it saves, not declared by it
        "numpy",
        "pydantic>=2",
        "safetensors",
        "tokenizers",
        "tiktoken",
        "sentencepiece>=0.2.3",  # offset_mapping
        "tensorboard",
        "tqdm",
    ],
    extras_require={
        # what the quickstart's report and its check of the exported model need
        "report": ["matplotlib", "transformers>=4.46"],
        "data": DATA_REQUIREMENTS,
        "remote": REMOTE_REQUIREMENTS,
        "ray": ["ray"],
        # what tests/run.sh needs beside a CUDA build of torch
        "test": TEST_REQUIREMENTS,
        # the same on a CPU build of torch, which brings no Triton: 3.6.0 is the newest whose
        # interpreter runs our kernels, and that interpreter fails on numpy >= 2.4
        "dev": [*TEST_REQUIREMENTS, "triton==3.6.0; sys_platform == 'linux'", "numpy<2.4"],
    },
    distclass=NativeDistribution,
    cmdclass={"build_py": BuildPyAndNative, "bdist_wheel": PlatformWheel},
    zip_safe=False,
)
