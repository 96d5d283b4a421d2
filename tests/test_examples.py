"""The examples' configurations are valid, and their models allow the layouts that they name."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from megatron_dypo.config import load_config
from megatron_dypo.config.checks import warnings
from megatron_dypo.evaluate.suites import named_suites
from megatron_dypo.models.limits import check_layout
from megatron_dypo.planner.cluster import planned_shape

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*/config.yaml"))
SCRIPTS = [path.with_name("run.sh") for path in EXAMPLES]
RANKS = {
    "qwen2.5_math_7b_dypo": 16,
    "qwen3_4b_base_dypo": 16,
    "qwen3_32b_dypo": 24,
    "llama3.1_70b_dypo": 32,
}
RANKS |= {"smollm2_gsm8k": 2, "quickstart": 2, "qwen3_30b_a3b_dypo": 8, "qwen3_235b_a22b_dypo": 64}
NODES = {"qwen3_30b_a3b_dypo": 1, "qwen3_235b_a22b_dypo": 8}  # training nodes, if not 2
SMOLLM2 = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "head_dim": 64} | {
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    "max_position_embeddings": 8192, "rope_theta": 100000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.parent.name for path in EXAMPLES])
def test_an_example_s_configuration_fits_its_model_and_its_ranks(path, tmp_path):
    config = load_config(path)
    if config.model.hf == "models/smollm2":
        (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
        config.model.hf = str(tmp_path)
    shape = planned_shape(config.model)
    check_layout(config.parallel, shape, RANKS[path.parent.name], str(path))
    assert config.window <= shape.max_position
    named_suites(config.evaluation.suites, str(path))
    assert warnings(config) == []


@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.exists()], ids=lambda path: path.parent.name)
def test_an_example_s_script_starts_its_own_configuration(script, tmp_path):
    """Uses a ``torchrun`` that prints its arguments."""
    torchrun = tmp_path / "torchrun"
    torchrun.write_text('#!/bin/sh\necho "$@"\n')
    torchrun.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HEAD": "node0:29500"}
    ran = subprocess.run([script, "trainer.steps=3"], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert f"train examples/{script.parent.name}/config.yaml trainer.steps=3" in ran.stdout
    assert f"--nnodes {NODES.get(script.parent.name, 2)} " in ran.stdout and "--rdzv-endpoint node0:29500" in ran.stdout
