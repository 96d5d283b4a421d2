"""Malformed configurations, data and models from a fuzzer: each ends in one clear line, or is usable.

Every hunt has a minimum number of malformed inputs; over this file they add up to more than 500.
"""

from __future__ import annotations

import datetime
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import strategies as st
from safetensors.torch import save

from megatron_dypo.config import load_config
from megatron_dypo.config.load import dump, fingerprint
from megatron_dypo.config.schema import walk
from megatron_dypo.config.stages import learning_rate
from megatron_dypo.convert.hf_weights import folder_weights
from megatron_dypo.data.dataset import batch_indices
from megatron_dypo.data.tokenizer import arithmetic_backend
from megatron_dypo.models.families import hf_shapes
from megatron_dypo.models.shape import ModelShape
from tests.faults.mutations import FILE_FAULTS, ODD_TEXT, odd_scalars, spoil_file, spoilt_bytes, spoilt_trees
from tests.faults.submit import Ready, Submit, hunt
from tests.launch import copy_task

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[2]
SHAPE = ModelShape("llama", 1, 32, 32, 2, 1, 16, 128, 256)
YAML = (
    b"!!python/object/apply:os.system ['true']", b"!!int ''", b"!!float x", b"!!bool x", b"!!timestamp x", b"!x y",
    b"&a [*a]", b"*a", b"<<: *a", b"? [1]: 2", b"%YAML 9.9\n---\n", b"\n---\n", b"@", b"`", b": ", b"- ", b"|", b">",
    b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(b"%c: &%c [%s]\n" % (c, c, b"*%c," % (c - 1) * 9) for c in b"bcdefghij"),
    b"a: &a {x: 1}\n" + b"".join(b"%c: &%c {<<: [%s]}\n" % (c, c, b"*%c," % (c - 1) * 9) for c in b"bcdefghij"),
    b"model: &a [x,x]\n",
)  # fmt: skip


def assert_usable(ready: Ready) -> None:
    """Check that what training computes from the inputs, before and apart from the model, succeeds."""
    config, inputs = ready.config, ready.inputs
    Path("resolved.yaml").write_text(dump(config))
    assert load_config("resolved.yaml") == config
    json.dumps(fingerprint(config), allow_nan=False)
    datetime.timedelta(seconds=config.parallel.timeout)
    int(config.rollout.engine_memory * 2**30)
    assert all(math.isfinite(learning_rate(step, config.optimizer)) for step in (1, 1000))
    assert inputs.shape.parameters > 0
    for prompt in inputs.train[0]:
        for teacher in prompt.teachers:
            assert len(inputs.tokenizer.encode_trace(teacher.trace)) > 0
    assert len(batch_indices(1, config.data.prompts_per_step, len(inputs.train[0]), config.data.seed)) > 0
    if config.model.hf:
        read = folder_weights(config.model.hf)
        assert all(tuple(read(name).shape) == size for name, size in hf_shapes(inputs.shape).items())


def refused(outcome: str | Ready, *names: str) -> bool:
    """Return whether an input was refused (with a line that holds one of ``names``); otherwise it must be usable."""
    if isinstance(outcome, Ready):
        assert_usable(outcome)
        return False
    assert any(name in outcome for name in names), outcome
    return True


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return copy_task(tmp_path / "task", rollout__engine="transformers")


def quickstart(tmp_path: Path) -> dict:
    """Return the quickstart's configuration, with fewer problems."""
    text = (REPOSITORY / "examples/quickstart/config.yaml").read_text()
    tree = yaml.safe_load(text.replace("size=8000", "size=40").replace("size=256", "size=4"))
    tree["trainer"]["run_dir"] = str(tmp_path / "run")
    return tree


KEYS = [name for name, _ in walk()]
SECTIONS = sorted({name.partition(".")[0] for name in KEYS})


# --- configurations


@pytest.mark.parametrize("base", ["task", "quickstart"])
def test_configurations_with_spoilt_keys_and_values(submit: Submit, task, tmp_path, fault_record, base):
    tree = yaml.safe_load(task.read_text()) if base == "task" else quickstart(tmp_path)

    def refuses(tree: object) -> bool:
        task.write_text(yaml.safe_dump(tree))
        return refused(submit("train", str(task)), str(task), *SECTIONS)

    assert not refuses(tree)
    fault_record(f"{hunt(spoilt_trees(tree), refuses, 60, 40)} malformed configurations (keys and values)")


def test_configurations_with_spoilt_text(submit: Submit, task, fault_record):
    def refuses(content: bytes) -> bool:
        task.write_bytes(content)
        return refused(submit("train", str(task)), str(task), *SECTIONS)

    assert not refuses(task.read_bytes())
    strategy = spoilt_bytes(task.read_bytes(), inserted=YAML)
    fault_record(f"{hunt(strategy, refuses, 100, 60)} malformed configurations (text)")


@pytest.mark.parametrize("snippet", YAML)
def test_what_yaml_allows_and_a_configuration_does_not(submit: Submit, task, snippet):
    task.write_bytes(snippet + b"\n" + task.read_bytes())
    refused(submit("train", str(task)), str(task))
    for key in ("model", "trainer", "data"):
        task.write_bytes(b"%s: %s\n" % (key.encode(), snippet))
        assert refused(submit("train", str(task)), str(task))


def test_malformed_overrides(submit: Submit, task, fault_record):
    names = st.one_of(st.sampled_from(KEYS), st.sampled_from([*SECTIONS, *ODD_TEXT, "a.b.c", "model..preset", "."]))
    values = st.one_of(odd_scalars.map(str), st.sampled_from([text.decode() for text in YAML]), st.text(max_size=8))
    override = st.builds(
        lambda name, equals, value: name + equals + value, names, st.sampled_from(["=", "=", ""]), values
    )

    def refuses(overrides: list[str]) -> bool:
        # the command line's parser reads a leading dash as an option, with a message of its own
        overrides = [text for text in overrides if not text.startswith("-")]
        return refused(submit("train", str(task), *overrides), str(task), "override", *SECTIONS)

    assert not refuses(["trainer.steps=3"])
    fault_record(f"{hunt(st.lists(override, min_size=1, max_size=3), refuses, 80, 60)} malformed overrides")


@pytest.mark.parametrize("how", FILE_FAULTS)
def test_a_configuration_that_cannot_be_read(submit: Submit, task, how):
    spoil_file(task, how)
    assert refused(submit("train", str(task)), str(task)) or how == "forbidden"


# --- data


def luffy(rows: list[dict]) -> list[dict]:
    """Convert our rows to the layout of LUFFY and verl."""
    return [
        {
            "data_source": "copy",
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "reward_model": {"ground_truth": row["ground_truth"], "style": "rule"},
            "target_lst": [[{"role": "assistant", "content": teacher["trace"]}] for teacher in row["teachers"]],
            "extra_info": {"index": i},
        }
        for i, row in enumerate(rows)
    ]


@pytest.fixture
def rows(task: Path) -> list[dict]:
    return [json.loads(line) for line in (task.parent / "train.jsonl").read_text().splitlines()[:12]]


def judge_data(submit: Submit, task: Path, path: Path) -> Callable[..., bool]:
    """Return a check whether training refuses the data file (or other content), with and without skipping bad rows."""

    def judge(content: bytes | None = None) -> bool:
        if content is not None:
            path.write_bytes(content)
        overrides = f"data.train={path}", "data.prompts_per_step=8"
        refused(submit("train", str(task), *overrides, "data.skip_bad_rows=true"), str(path), "data")
        return refused(submit("train", str(task), *overrides), str(path), "data")

    return judge


@pytest.mark.parametrize("layout", ["ours", "luffy"])
def test_malformed_json_lines(submit: Submit, task, tmp_path, rows, fault_record, layout):
    rows = rows if layout == "ours" else luffy(rows)
    path = tmp_path / "rows.jsonl"
    judge = judge_data(submit, task, path)

    def refuses_rows(rows: object) -> bool:
        path.write_text("\n".join(map(json.dumps, rows if isinstance(rows, list) else [rows])))
        return judge()

    assert not refuses_rows(rows)
    malformed = hunt(spoilt_trees(rows), refuses_rows, 50, 20)
    malformed += hunt(spoilt_bytes("\n".join(map(json.dumps, rows)).encode()), judge, 50, 30)
    fault_record(f"{malformed} malformed JSON Lines files")


@pytest.mark.parametrize("layout", ["ours", "luffy"])
def test_malformed_parquet(submit: Submit, task, tmp_path, rows, fault_record, layout):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    rows = rows if layout == "ours" else luffy(rows)
    path = tmp_path / "rows.parquet"
    judge = judge_data(submit, task, path)

    def refuses_columns(rows: object) -> bool:
        try:
            parquet.write_table(pa.Table.from_pylist(rows), path)
        except (pa.ArrowException, AttributeError, LookupError, OverflowError, TypeError, ValueError):
            return False  # no table can hold that
        return judge()

    assert not refuses_columns(rows)
    malformed = hunt(spoilt_trees(rows), refuses_columns, 40, 0)
    parquet.write_table(pa.Table.from_pylist(rows), path)
    malformed += hunt(spoilt_bytes(path.read_bytes()), judge, 50, 30)
    fault_record(f"{malformed} malformed Parquet files")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize("how", FILE_FAULTS)
def test_a_data_file_that_cannot_be_read(submit: Submit, task, tmp_path, name, how):
    path = tmp_path / name
    path.touch()
    spoil_file(path, how)
    assert judge_data(submit, task, path)()


def test_malformed_tasks(submit: Submit, task, fault_record):
    options = st.sampled_from(["size", "seed", "min_terms", "max_terms", "min_digits", "sise", "", "size=3&size"])
    values = st.one_of(st.sampled_from([*ODD_TEXT[:-8], "[", "{", "!!int ''", "&a [*a]", "-5", "0", "1.5"]), st.text())
    sources = st.builds(
        lambda name, option, value: f"reasoning_gym:{name}?{option}={value}",
        st.sampled_from(["chain_sum"] * 8 + ["", "nothing", "chain_sum?"]),
        options,
        values,
    )

    def refuses(source: str) -> bool:
        tree = yaml.safe_load(task.read_text())
        tree["data"] |= {"train": source, "max_prompt_tokens": 200}
        path = task.with_name("gym.yaml")
        path.write_text(yaml.safe_dump(tree))
        return refused(submit("train", str(path)), "reasoning_gym:", "data")

    assert not refuses("reasoning_gym:chain_sum?size=9")
    fault_record(f"{hunt(sources, refuses, 40, 30)} malformed task names")


# --- models


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """Return a small Hugging Face folder in two shards, for the cases to corrupt."""
    import torch

    folder = tmp_path / "hf"
    folder.mkdir()
    arithmetic_backend().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(SHAPE.to_hf_config()))
    shards: tuple[dict, dict] = {}, {}
    for i, (name, size) in enumerate(hf_shapes(SHAPE).items()):
        shards[i % 2][name] = torch.zeros(size)
    for i, shard in enumerate(shards):
        (folder / f"model-{i}.safetensors").write_bytes(save(shard))
    where = {name: f"model-{i}.safetensors" for i, shard in enumerate(shards) for name in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def judge_model(submit: Submit, task: Path, hf: Path) -> bool:
    overrides = f"model={{hf: {hf}}}", "data.max_prompt_tokens=16"
    return refused(submit("train", str(task), *overrides), str(hf), str(task), "data: prompt ")


TREES = ["config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors.index.json"]


@pytest.mark.parametrize("name", [*TREES, "model-1.safetensors"])
def test_malformed_hugging_face_folders(submit: Submit, task, hf, fault_record, name):
    path = hf / name
    intact = path.read_bytes()

    def refuses(content: bytes) -> bool:
        path.write_bytes(content)
        return judge_model(submit, task, hf)

    assert not refuses(intact)
    malformed = hunt(spoilt_bytes(intact), refuses, 30, 15)
    if name in TREES:
        texts = spoilt_trees(json.loads(intact)).map(lambda tree: json.dumps(tree).encode())
        malformed += hunt(texts, refuses, 50, 15)
    fault_record(f"{malformed} malformed {name}")


@pytest.mark.parametrize("name", [*TREES, "model-1.safetensors"])
@pytest.mark.parametrize("how", FILE_FAULTS)
def test_a_model_file_that_cannot_be_read(submit: Submit, task, hf, name, how):
    spoil_file(hf / name, how)
    assert judge_model(submit, task, hf) or name.startswith("tokenizer")


def test_a_folder_that_is_none(submit: Submit, task, hf):
    shutil.rmtree(hf)
    assert judge_model(submit, task, hf)
    hf.write_text("a file")
    assert judge_model(submit, task, hf)
