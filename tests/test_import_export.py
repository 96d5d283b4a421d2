"""``convert import``, ``export``, ``verify`` as users run them: exact both ways, proved, and clear about bad input."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_dypo.checkpoint.io import read_index
from megatron_dypo.config.schema import Model, Shape
from megatron_dypo.convert.import_export import _write_metadata, stored_shape
from megatron_dypo.convert.megatron_folder import MegatronFolder
from megatron_dypo.models.families import FAMILIES, hf_shapes
from megatron_dypo.models.hf_config import write_config
from megatron_dypo.models.rules import WeightRule
from megatron_dypo.models.shape import PRESETS, RopeScaling, model_shape
from tests.batches import make_config
from tests.full_disk import small_disk
from tests.launch import copy_task, train_here
from tests.ranks import run_ranks
from tests.test_convert import FAMILY_SHAPES, SHAPE, hf_model
from tests.test_ids import ID, folder_of

ROPE = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)  # an original length other than mcore's default 8192
SHAPES = {
    f"{family}{'-tied' if tied else ''}": dataclasses.replace(
        FAMILY_SHAPES[family],
        tied_embeddings=tied,
        num_layers=4,
        rope_scaling=ROPE if family == "llama" else None,
    )
    for family in FAMILIES
    for tied in ((family == "mixtral",) if FAMILIES[family].has_experts else (False, True))
}
EXTENDED = {"max_position": 1024, "rope_base": 2000.0}  # a run may give its model more positions
TP2 = ["parallel.tensor=2", "parallel.sequence_parallel=true"]
VPP = ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]
EP2 = ["parallel.expert=2"]
LAYOUTS = {  # (converting ranks, verifying layout) by shape
    "llama": (1, []),
    "llama-tied": (2, VPP),
    "mistral": (2, TP2),
    "mistral-tied": (1, []),
    "qwen2": (4, [*TP2, "parallel.context=2"]),
    "qwen2-tied": (2, ["parallel.pipeline=2"]),
    "qwen3": (8, [*TP2, *VPP]),
    "qwen3-tied": (2, TP2),
    "qwen3_moe": (4, [*TP2, *EP2, "parallel.expert_tensor=2"]),
    "mixtral-tied": (2, EP2),
    "qwen2_moe": (2, VPP),
}


def convert(*arguments: str) -> tuple[int, str]:
    """Return (exit code, output) of ``convert``; for a forked rank."""
    from megatron_dypo.cli import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = main(["convert", *map(str, arguments)])
    return code, printed.getvalue()


def run(ranks: int, *arguments: object) -> tuple[int, str]:
    """Return rank 0's result, and the exit code of all."""
    results = run_ranks(ranks, convert, *map(str, arguments))
    assert len({code for code, _ in results}) == 1, results
    return results[0]


def done(ranks: int, *arguments: object) -> str:
    code, printed = run(ranks, *arguments)
    assert code == 0, printed
    return printed


def refusal(*arguments: object) -> str:
    """Return the line that refuses; nothing is left of the output folder."""
    code, printed = run(1, *arguments)
    line = printed.removeprefix("megatron_dypo: ").removesuffix("\n")
    assert code == 2 and "\n" not in line, printed
    return line


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Return random Hugging Face models in several shards."""
    made = {}
    for name, shape in SHAPES.items():
        made[name] = tmp_path_factory.mktemp("hf") / name
        hf_model(shape).save_pretrained(made[name], max_shard_size="60KB")
    return made


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - no mapping
                assert name not in found, name
                found[name] = shard.get_tensor(name)
    return found


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    found, wanted = tensors(ours), tensors(theirs)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


# --- exact, both ways


@pytest.mark.parametrize("name", SHAPES)
def test_import_verify_export_is_exact(folders, name, tmp_path):
    from transformers import AutoModelForCausalLM

    hf, (ranks, layout) = folders[name], LAYOUTS[name]
    shards = min(ranks, 4)
    done(shards, "import", "--hf", hf, "--out", tmp_path / "checkpoint", *layout)
    told = done(ranks, "verify", "--hf", hf, "--checkpoint", tmp_path / "checkpoint", *layout)
    assert "are equal, bit for bit" in told and "255 tokens of text, at most" in told and "verified" in told
    done(shards, "export", "--checkpoint", tmp_path / "checkpoint", "--out", tmp_path / "back", "--shard-size", "1e-4")
    assert_same_tensors(tmp_path / "back", hf)
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (hf / file).read_bytes()
    ids = torch.arange(40)[None] % SHAPE.vocab_size
    with torch.no_grad():
        ours, theirs = (AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (tmp_path / "back", hf))
    assert torch.equal(ours, theirs)


def test_what_is_written_does_not_depend_on_the_number_of_ranks(folders, tmp_path):
    exports = []
    for ranks in (1, 3):
        checkpoint, out = tmp_path / f"checkpoint_{ranks}", tmp_path / f"out_{ranks}"
        done(ranks, "import", "--hf", folders["qwen2"], "--out", checkpoint)
        done(4 - ranks, "export", "--checkpoint", checkpoint, "--out", out, "--shard-size", "1e-4")
        exports.append({file.name: file.read_bytes() for file in out.iterdir()})
    assert exports[0] == exports[1] and len(exports[0]) > 4


@pytest.mark.parametrize(
    ("stored", "asked"), [(torch.bfloat16, None), (torch.float32, "bf16"), (torch.bfloat16, "fp32")]
)
def test_the_dtype_is_kept_unless_another_is_asked_for(tmp_path, stored, asked):
    hf_model(SHAPE).to(stored).save_pretrained(tmp_path / "hf")
    told = ["--dtype", asked] if asked else []
    done(1, "import", "--hf", tmp_path / "hf", "--out", tmp_path / "checkpoint", *told)
    done(1, "export", "--checkpoint", tmp_path / "checkpoint", "--out", tmp_path / "back")
    wanted = {"bf16": torch.bfloat16, "fp32": torch.float32, None: stored}[asked]
    theirs = tensors(tmp_path / "hf")
    for name, tensor in tensors(tmp_path / "back").items():
        assert tensor.dtype == wanted and torch.equal(tensor, theirs[name].to(wanted))
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == str(wanted).removeprefix("torch.")


def trained(folder: str, hf: str, parallel: dict) -> dict:
    """Train from the folder for a step and save; return the policy's full weights."""
    from megatron_dypo.checkpoint.manager import Counters, Saver
    from megatron_dypo.config.load import dump
    from megatron_dypo.convert.hf_weights import folder_weights
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.runtime import distributed
    from megatron_dypo.training.minibatch import build_minibatches
    from megatron_dypo.training.passes import logprob_passes
    from megatron_dypo.training.step import StepContext, run_updates
    from tests.batches import make_config, make_groups, trace_ids

    config = make_config(parallel=parallel, optimizer={"distributed": True})
    config.model = Model(hf=hf, shape=Shape(**EXTENDED))
    config.trainer.run_dir, config.trainer.save_every = folder, 1
    layout, shape = distributed.init(config.parallel), model_shape(config.model)
    policy = Policy(config, shape, layout, folder_weights(hf))
    minibatches = build_minibatches(layout, make_groups(), config, trace_ids)
    logprob_passes(policy, minibatches, config)
    run_updates(policy, minibatches, config, StepContext(1, 1e-2))
    if layout.is_main:
        (Path(folder) / "config.yaml").write_text(dump(config))
    saver, counters = Saver(config, policy), Counters(step=1, weight_version=policy.version)
    saver.after_step(counters, None, lambda: make_groups(2))  # a prefetched batch, irrelevant to a conversion
    saver.finish(counters)
    return {name: tensor.numpy().copy() for name, tensor in policy.named_tensors()}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("qwen3", {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2}),
        ("qwen3_moe", {"tensor": 2, "sequence_parallel": True, "expert": 2, "expert_tensor": 2}),
    ],
    ids=["qwen3", "qwen3_moe"],
)
def test_a_trained_checkpoint_of_any_layout_is_exported_as_it_was_trained(folders, name, layout, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    weights = run_ranks(4, trained, str(run_dir), str(folders[name]), layout)[0]
    done(1, "export", "--checkpoint", run_dir, "--out", tmp_path / "out")
    written, origin = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", folders[name]))
    assert written["max_position_embeddings"] == EXTENDED["max_position"] != origin["max_position_embeddings"]
    assert model_shape(Model(hf=str(tmp_path / "out"))).rope_base == EXTENDED["rope_base"] != SHAPE.rope_base
    found, before = tensors(tmp_path / "out"), tensors(folders[name])
    assert found.keys() == weights.keys() == before.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, torch.from_numpy(weights[name])), name
        assert not torch.equal(tensor, before[name]), "trained"
    (run_dir / "config.yaml").unlink()  # without it the shape comes from the checkpoint
    told = done(1, "export", "--checkpoint", run_dir / "checkpoints/step_1", "--out", tmp_path / "again")
    assert_same_tensors(tmp_path / "again", tmp_path / "out")
    assert f"{tmp_path / 'again'}: " in told


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_read_where_asked_for_and_nothing_in_it_is_run(tmp_path):
    model = hf_model(SHAPE)
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf/model.safetensors").rename(tmp_path / "plain.safetensors")
    pickled = tmp_path / "hf/pytorch_model.bin"
    torch.save({name: tensor.clone() for name, tensor in model.state_dict().items()}, pickled)
    done(1, "import", "--hf", tmp_path / "hf", "--out", tmp_path / "checkpoint", "--bin")
    done(1, "export", "--checkpoint", tmp_path / "checkpoint", "--out", tmp_path / "back")
    (tmp_path / "there").mkdir()
    (tmp_path / "plain.safetensors").rename(tmp_path / "there/model.safetensors")
    assert_same_tensors(tmp_path / "back", tmp_path / "there")
    for content in ({"model.norm.weight": Bomb(tmp_path / "ran")}, {"model.norm.weight": "text"}):
        torch.save(content, pickled)
        line = refusal("import", "--hf", tmp_path / "hf", "--out", tmp_path / "other", "--bin")
        assert line.startswith(f"{pickled}: cannot be read: ")
    assert not (tmp_path / "ran").exists()


def test_a_run_from_a_preset_is_exported_with_its_own_tokenizer(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = copy_task(tmp_path, rollout__engine="transformers", trainer__steps=1, trainer__save_every=1)
    run_ranks(1, train_here, str(config), ["trainer.eval_every=0"])
    assert "WARNING" not in done(1, "export", "--checkpoint", tmp_path / "run", "--out", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("first 1 + 2 = \\boxed{", return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.eos_token_id == tokenizer.eos_token_id == 1
    assert tokenizer.decode(ids[0]) == "first 1 + 2 = \\boxed{" and model(ids).logits.isfinite().all()


def test_an_export_ends_where_the_run_s_responses_ended(tmp_path):
    """The run had its own tokenizer folder, whose template ends a turn with a token other than the base model's."""
    source, tokenizer, target = tmp_path / "base", tmp_path / "chat", tmp_path / "out"
    folder_of(source, "<|endoftext|>", None, {"eos_token_id": ID["<|endoftext|>"], "top_k": 20})
    shape = dataclasses.replace(PRESETS["tiny"], vocab_size=320)
    write_config(shape, tmp_path, None)
    shutil.copy(tmp_path / "config.json", source)
    folder_of(tokenizer, "<|im_end|>")
    step = tmp_path / "run/checkpoints/step_1"
    step.mkdir(parents=True)
    target.mkdir()
    (tmp_path / "run/config.yaml").write_text(
        f"model: {{hf: {source}, tokenizer: {tokenizer}}}\ndata: {{train: none}}\n"
        f"trainer: {{steps: 1, run_dir: {tmp_path / 'run'}}}\n"
    )
    _write_metadata(step, source, shape, target, set(), asked=False)
    settings = json.loads((target / "generation_config.json").read_text())
    assert settings == {"eos_token_id": [ID["<|im_end|>"], ID["<|endoftext|>"]], "top_k": 20}


# --- what verify finds


@pytest.mark.parametrize(
    ("model", "first", "second", "layout"),
    [
        ("llama", "mlp.gate_proj", "mlp.up_proj", "parallel.tensor=2"),
        ("llama", "self_attn.k_proj", "self_attn.v_proj", "parallel.tensor=2"),
        ("qwen2_moe", "mlp.experts.1", "mlp.experts.2", "parallel.expert=2"),
    ],
)
def test_a_transposition_is_found_and_the_tensors_named(folders, tmp_path, model, first, second, layout):
    """In the checkpoint two tensors of a layer, or two experts, are swapped."""
    hf, swapped = folders[model], tmp_path / "swapped"
    shutil.copytree(hf, swapped)
    one, two = (f"model.layers.2.{name}." for name in (first, second))
    all_tensors, exchanged = tensors(hf), {}
    for name in all_tensors:
        if name.startswith(one):
            other = name.replace(one, two)
            exchanged |= {name: other, other: name}
    for file in swapped.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            names = list(shard.keys())
        save_file({name: all_tensors[exchanged.get(name, name)] for name in names}, file, {"format": "pt"})
    done(1, "import", "--hf", swapped, "--out", tmp_path / "checkpoint")
    code, told = run(2, "verify", "--hf", hf, "--checkpoint", tmp_path / "checkpoint", layout)
    assert code == 1 and told.endswith("NOT the same model\n")
    named = [line.split(":")[1].strip() for line in told.splitlines() if line.startswith("differs")]
    assert named == sorted(exchanged) and len(named) == (6 if "expert" in first else 2)
    assert "log-probs: 255 tokens of text, more than 0.0001 nats from transformers'" in told


def gate_for_up() -> None:
    from megatron_dypo.models import families

    at = next(i for i, rule in enumerate(families.LAYER) if "gate" in rule.names[0])
    rule = families.LAYER[at]
    table = (*families.LAYER[:at], dataclasses.replace(rule, hf=rule.hf[::-1]), *families.LAYER[at + 1 :])
    object.__setattr__(families.LLAMA, "layer", table)


def each_expert_for_the_next() -> None:
    of_expert, count = WeightRule.of_expert, FAMILY_SHAPES["qwen2_moe"].num_experts
    WeightRule.of_expert = lambda self, e: dataclasses.replace(
        of_expert(self, e), hf=of_expert(self, (e + 1) % count).hf
    )


def verify_with_a_table_wrong_both_ways(change: Callable[[], None], hf: str, checkpoint: str) -> tuple[int, str]:
    """The error is in both directions: all tensors come back as they were."""
    change()
    assert convert("import", "--hf", hf, "--out", checkpoint)[0] == 0
    return convert("verify", "--hf", hf, "--checkpoint", checkpoint)


@pytest.mark.parametrize(("model", "change"), [("llama", gate_for_up), ("qwen2_moe", each_expert_for_the_next)])
def test_a_table_that_is_wrong_both_ways_is_found_by_the_log_probs(folders, tmp_path, model, change):
    arguments = (change, str(folders[model]), str(tmp_path / "out"))
    ((code, told),) = run_ranks(1, verify_with_a_table_wrong_both_ways, *arguments)
    assert code == 1 and "are equal, bit for bit" in told and "NOT the same model" in told


# --- bad input


@pytest.fixture(scope="module")
def checkpoint(folders, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "checkpoint"
    done(1, "import", "--hf", folders["llama"], "--out", out)
    return out


def test_a_checkpoint_that_names_its_shape_as_before_is_read(tmp_path):
    shape = dataclasses.replace(FAMILY_SHAPES["qwen2_moe"], norm_topk_prob=False, shared_expert_ffn_hidden_size=56)
    fields = dataclasses.asdict(shape)
    fields["normalized_routing"] = fields.pop("norm_topk_prob")
    fields["shared_ffn_hidden_size"] = fields.pop("shared_expert_ffn_hidden_size")
    (tmp_path / "state.json").write_text(json.dumps({"step": 1, "model": fields}))
    assert stored_shape(tmp_path) == shape


def damaged(checkpoint: Path, folder: Path, name: str, change) -> Path:
    copy = folder / "checkpoint"
    shutil.copytree(checkpoint, copy)
    (copy / name).write_bytes(change((copy / name).read_bytes()))
    return copy


def test_damaged_checkpoints_are_refused_by_file(checkpoint, tmp_path):
    data = damaged(checkpoint, tmp_path / "a", "__0_0.distcp", lambda content: content[:-9])
    export = ("export", "--out", tmp_path / "out", "--checkpoint")
    assert refusal(*export, data).startswith(f"{data}/__0_0.distcp: has ")
    flipped = damaged(checkpoint, tmp_path / "b", "__0_0.distcp", lambda content: content[:999] + b"?" + content[1000:])
    assert refusal(*export, flipped).startswith(f"{flipped}/__0_0.distcp: is damaged")
    index = damaged(checkpoint, tmp_path / "c", ".metadata", lambda content: content[:50])
    (index / "manifest.json").unlink()  # Megatron-LM's own checkpoints have none
    assert refusal(*export, index).startswith(f"{index}/.metadata: cannot be read")
    data = damaged(checkpoint, tmp_path / "d", "__0_0.distcp", lambda content: bytes(len(content)))
    (data / "manifest.json").unlink()
    assert refusal(*export, data).startswith(f"{data}/__0_0.distcp: tensor embedding.word_embeddings.weight cannot be ")
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_a_checkpoint_of_another_shape_is_refused_by_tensor(checkpoint, folders, tmp_path):
    line = refusal("export", "--checkpoint", checkpoint, "--out", tmp_path / "out", "--hf", folders["qwen3"])
    assert line.startswith(
        f"{checkpoint}/.metadata: tensor decoder.layers.self_attention.q_layernorm.weight is missing"
    )
    assert "output_layer.weight has no place" in refusal(
        "verify", "--checkpoint", checkpoint, "--hf", folders["llama-tied"], "--tensors-only"
    )


def test_a_dropped_expert_is_named_on_either_side(folders, tmp_path):
    hf, checkpoint = tmp_path / "hf", tmp_path / "checkpoint"
    done(1, "import", "--hf", folders["qwen3_moe"], "--out", checkpoint)
    index = read_index(checkpoint / ".metadata")
    name = "decoder.layers.mlp.experts.experts.linear_fc2.weight"
    chunks = index.state_dict_metadata[name].chunks
    chunks[:] = [chunk for chunk in chunks if tuple(chunk.offsets[:2]) != (1, 2)]
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))
    (checkpoint / "manifest.json").unlink()
    line = refusal("verify", "--hf", folders["qwen3_moe"], "--checkpoint", checkpoint)
    assert line == f"{checkpoint}/.metadata: tensor {name} of layer 1, expert 2 has 0 of {48 * 80} elements"

    shutil.copytree(folders["qwen3_moe"], hf)
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    file = hf / json.loads((hf / "model.safetensors.index.json").read_text())["weight_map"][name]
    with safe_open(file, framework="pt") as shard:
        rest = {other: shard.get_tensor(other) for other in shard.keys() if other != name}  # noqa: SIM118 - no mapping
    save_file(rest, file, {"format": "pt"})
    line = refusal("import", "--hf", hf, "--out", tmp_path / "out")
    assert line == f"{file}: tensor {name} is missing"


def test_what_is_no_checkpoint_is_named(folders, tmp_path):
    (tmp_path / "old/iter_0000010/mp_rank_00_000").mkdir(parents=True)
    export = ("export", "--out", tmp_path / "out", "--checkpoint")
    legacy = refusal(*export, tmp_path / "old")
    assert legacy.startswith(f"{tmp_path}/old/iter_0000010/mp_rank_00_000: a legacy checkpoint of Megatron-LM; ")
    assert "tools/checkpoint/convert.py" in legacy
    assert refusal(*export, tmp_path / "none").startswith(f"{tmp_path}/none: holds no checkpoint: ")
    taken = refusal("import", "--hf", folders["llama"], "--out", folders["qwen2"])
    assert taken == f"{folders['qwen2']}: exists already and is not empty"


@pytest.mark.parametrize(
    ("override", "about"),
    [
        ("parallel.tensor=3", "convert import: parallel.tensor: 3 does not divide the model's 4 attention heads"),
        ("parallel.pipeline=3", "convert import: parallel.pipeline: 3 does not divide the model's 4 layers"),
        ("parallel.tensr=2", "convert import: parallel.tensr: unknown key; the nearest known key is parallel.tensor"),
        ("trainer.steps=2", "convert import: override 'trainer.steps=2': expected parallel.key=value"),
    ],
)
def test_a_layout_that_does_not_fit_the_model_is_refused(folders, tmp_path, override, about):
    assert refusal("import", "--hf", folders["llama"], "--out", tmp_path / "out", override) == about
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", ["import", "export"])
def test_a_full_disk_leaves_nothing_and_is_one_line(folders, checkpoint, tmp_path, way):
    source = ["--hf", folders["llama"]] if way == "import" else ["--checkpoint", checkpoint]
    try:
        with small_disk(tmp_path / "disk", kib=128) as disk:
            line = refusal(way, *source, "--out", disk / "out")
            assert "No space left on device" in line and str(disk) in line
            assert list(disk.iterdir()) == []
    except OSError as error:
        pytest.skip(f"no file system can be mounted here: {error}")


def killed_export(checkpoint: str, out: str) -> None:
    """Send SIGKILL when all but the index is written."""
    import os
    import signal

    from megatron_dypo.convert import hf_weights

    hf_weights.write_index = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
    convert("export", "--checkpoint", checkpoint, "--out", out, "--shard-size", "1e-4")


def test_a_killed_export_leaves_no_folder_of_that_name(checkpoint, tmp_path):
    from tests.ranks import Launch

    launch = Launch(1, killed_export, str(checkpoint), str(tmp_path / "out"))
    launch.ranks[0].join(120)
    assert launch.ranks[0].exitcode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.partial-") and not list(left.glob("*index*"))
    done(1, "export", "--checkpoint", checkpoint, "--out", tmp_path / "out", "--shard-size", "1e-4")


# --- vLLM


def vllm_logprobs(folders: list[str]) -> list[list[float]]:
    """Return log-probs of 40 ids by vLLM, loading each folder itself."""
    from megatron_dypo.rollout.vllm_args import set_environment
    from megatron_dypo.rollout.vllm_engine import IN_PROCESS

    set_environment("cpu", **IN_PROCESS)
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory

    found = []
    for folder in folders:
        llm = vllm.LLM(
            folder,
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=128,
            max_num_batched_tokens=128,
            kv_cache_memory_bytes=2**26,
            enforce_eager=True,
            enable_chunked_prefill=False,
            disable_log_stats=True,
        )
        ids = list(range(2, 42))
        sampling = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        (output,) = llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
        steps = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
        found.append([logprobs[token].logprob for token, logprobs in steps])
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()  # before the next engine, or it takes that one's groups away
    return found


def test_vllm_loads_what_is_exported(tmp_path):
    """Compare vLLM's reading of config.json and weights, RoPE scaling too, with transformers' of the original."""
    from transformers import AutoModelForCausalLM

    expected = []
    for family, tied in (("llama", False), ("mistral", True), ("qwen2", False), ("qwen3", True)):
        shape = dataclasses.replace(SHAPES["llama"] if family == "llama" else SHAPE, family=family)
        shape = dataclasses.replace(shape, tied_embeddings=tied, hidden_size=128, head_dim=32)
        hf_model(shape).save_pretrained(tmp_path / family)
        done(1, "import", "--hf", tmp_path / family, "--out", tmp_path / f"{family}_checkpoint")
        done(1, "export", "--checkpoint", tmp_path / f"{family}_checkpoint", "--out", tmp_path / f"{family}_out")
        ids = torch.arange(2, 42)[None]
        with torch.no_grad():
            logp = AutoModelForCausalLM.from_pretrained(tmp_path / family)(ids).logits[0, :-1].log_softmax(-1)
        expected.append(logp.gather(1, ids[0, 1:, None]).squeeze(1))
    folders = [str(tmp_path / f"{family}_out") for family in ("llama", "mistral", "qwen2", "qwen3")]
    (found,) = run_ranks(1, vllm_logprobs, folders, seconds=240)
    for ours, theirs in zip(found, expected, strict=True):
        assert (torch.tensor(ours) - theirs).abs().max() < 1e-4


def written_by_megatron_core(folder: str) -> dict[str, bool]:
    """Write a GPT of mcore's layer spec in mcore's own pieces; return whether each tensor reads back bit for bit.

    Our writer writes them: mcore's takes 20 s to start its helpers, and changes no name.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    from megatron_dypo.checkpoint.io import write_index, write_pieces
    from megatron_dypo.checkpoint.state import _cut
    from megatron_dypo.models.sharding import load_weights, random_weights
    from megatron_dypo.policy.model import transformer_config, whole_model_names
    from megatron_dypo.runtime import distributed

    config, shape = make_config("llama"), model_shape(make_config("llama").model)
    layout, settings = distributed.init(), transformer_config(config, shape)
    settings.gradient_accumulation_fusion = False  # ours (policy/weight_gradients.py)
    gpt = GPTModel(
        config=settings,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=shape.padded_vocab,
        max_sequence_length=shape.max_position,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )
    read = random_weights(shape, seed=3)
    load_weights(whole_model_names(gpt, dict(gpt.named_parameters())), shape, layout, read)
    weights = [entry for entry in gpt.sharded_state_dict().values() if not isinstance(entry, ShardedObject)]
    part = write_pieces(
        Path(folder) / "__0_0.distcp", [piece for each in weights for piece in _cut(each, "", each.data)]
    )
    write_index(Path(folder), [part], {"step": 0})
    stored = MegatronFolder(Path(folder), shape)
    return {name: bool((stored.read(name) == read(name)).all()) for name in hf_shapes(shape)}


def test_a_checkpoint_that_megatron_core_wrote_by_itself_is_read(tmp_path):
    """Its norms have Transformer Engine's names, whatever layers it was written with."""
    (found,) = run_ranks(1, written_by_megatron_core, str(tmp_path))
    assert all(found.values()), found


@pytest.mark.parametrize(
    ("tensors_only", "cuda", "backend"), [(True, True, "gloo"), (False, True, "nccl"), (False, False, "gloo")]
)
def test_verify_joins_with_the_backend_that_the_model_is_to_speak(monkeypatch, tensors_only, cuda, backend):
    """Megatron-Core's groups use the first group's backend; comparing tensors needs no GPU."""
    from megatron_dypo.config.schema import Parallel
    from megatron_dypo.convert import verify

    class Joined(Exception):
        pass

    def join(timeout, backend):
        raise Joined(backend)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(verify, "source_folder", lambda hf, critics: (None, None))
    monkeypatch.setattr(verify, "check_layout", lambda *arguments: None)
    monkeypatch.setattr(verify, "join", join)
    with pytest.raises(Joined, match=backend):
        verify.verify("hf", Path("checkpoint"), Parallel(), tensors_only)
