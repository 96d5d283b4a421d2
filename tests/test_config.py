"""Configuration: every error is one line that names file and key; --help and docs come from one source."""

from __future__ import annotations

import dataclasses
import re
from operator import attrgetter
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dypo.cli import main
from megatron_dypo.config import load_config, render
from megatron_dypo.config.load import dump, fingerprint
from megatron_dypo.config.reads import GROUPED
from megatron_dypo.config.renamed import RENAMED, rename
from megatron_dypo.config.schema import Config, walk
from megatron_dypo.config.synonyms import SYNONYMS
from megatron_dypo.config.tree import SHOWN
from megatron_dypo.errors import UserError
from megatron_dypo.models.limits import check_layout
from megatron_dypo.models.shape import PRESETS

REPOSITORY = Path(__file__).resolve().parents[1]
SMALLEST = {"model": {"preset": "tiny"}, "data": {"train": "rows.jsonl"}, "trainer": {"steps": 1, "run_dir": "runs/x"}}
KEYS = dict(walk())
SIX_HEADS = {"num_attention_heads": 6, "num_query_groups": 6, "ffn_hidden_size": 36}

# "layout, logging, paths, number of steps, rollout engine and micro-batch budget may change on resume" (the contract);
# an operational key (a deadline, how often to save) is none of model, objective, data, optimizer and seed either.
LAYOUT = {
    "parallel.tensor", "parallel.pipeline", "parallel.sequence_parallel",
    "parallel.virtual_pipeline",
        "parallel.context",
        "parallel.expert",
        "parallel.expert_tensor",
        "optimizer.distributed",
        "optimizer.overlap_grad_reduce",
}  # fmt: skip
LOGGING = {"logging.wandb", "logging.wandb_project", "logging.tensorboard", "logging.trace"}
PATHS = {"rollout.record", "rollout.replay", "trainer.run_dir"}
STEPS = {"trainer.steps"}
ENGINE = {
    "rollout.engine", "rollout.engine_memory", "rollout.servers", "rollout.server_timeout",
    "rollout.request_timeout", "rollout.sync_backend", "rollout.verify_sync", "rollout.verify_syncs",
    "rollout.max_staleness", "rollout.engine_eager", "rollout.head_dtype",
}  # fmt: skip
BUDGET = {"data.max_tokens_per_microbatch", "model.recompute", "model.attention_backend", "model.layer_spec"}
BUDGET |= {"model.reference_on"}
START = {"model.probe"}
LATER = {"stages"}  # a stage that has not begun; of the others the fingerprint has every key
OPERATION = {
    "data.accept_changed",
    "parallel.timeout", "parallel.heartbeat_timeout", "rollout.sync_timeout", "trainer.max_skipped_steps",
    "trainer.eval_every", "trainer.save_every", "trainer.save_blocking", "trainer.keep_checkpoints",
    "trainer.spike_factor",
    "trainer.max_grad_norm_to_apply",
    "trainer.deterministic", "trainer.offload", "reward.cpu_seconds", "reward.workers",
}  # fmt: skip
EVALUATION = {name for name in KEYS if name.startswith("evaluation.")}
MAY_CHANGE = EVALUATION | LAYOUT | LOGGING | PATHS | STEPS | ENGINE | BUDGET | START | LATER | OPERATION


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    """Return a file of the four required keys."""
    return write(tmp_path, yaml.safe_dump(SMALLEST))


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def complaint(path: Path, *overrides: str) -> str:
    """Return the line that refuses the configuration, without the file's name."""
    with pytest.raises(UserError) as caught:
        load_config(path, list(overrides))
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"{path}: ")
    return line.removeprefix(f"{path}: ")


def value(config: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        config = getattr(config, part)
    return config


# --- what loads


def test_four_keys_are_a_whole_configuration(smallest):
    config = load_config(smallest)
    given_values = {"model.preset": "tiny", "data.train": "rows.jsonl", "trainer.steps": 1, "trainer.run_dir": "runs/x"}
    for name, info in KEYS.items():
        if name in given_values:
            assert value(config, name) == given_values[name]
        else:
            assert not info.is_required()
            assert value(config, name) == info.default


def test_the_quickstart_configuration_loads():
    assert load_config(REPOSITORY / "examples/quickstart/config.yaml").trainer.run_dir == "runs/quickstart"


@pytest.mark.parametrize("text", [r"in \boxed{}.", r"as $\frac{a}{b}$", r"\times", r"\alpha", r"\epsilon"])
def test_a_backslash_that_double_quotes_swallow_is_refused_by_key(tmp_path, smallest, text):
    path = write(tmp_path, yaml.safe_dump(SMALLEST) + f'evaluation: {{instruction: "{text}"}}\n')
    with pytest.raises(UserError, match=r"evaluation\.instruction: holds a control character where .* single quotes"):
        load_config(path)
    path = write(tmp_path, yaml.safe_dump(SMALLEST) + f"evaluation: {{instruction: '{text}'}}\n")
    assert load_config(path).evaluation.instruction == text


@pytest.mark.parametrize(("text", "steps"), [("010", 10), ("08", 8), ("0100", 100), ("+012", 12), ("7", 7)])
def test_a_whole_number_with_zeros_before_it_is_decimal(tmp_path, smallest, text, steps):
    assert load_config(smallest, [f"trainer.steps={text}"]).trainer.steps == steps


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "1.0e-6", "0.000001", ".1e-5", "+1e-6"])
def test_every_spelling_of_a_small_number_is_a_float(tmp_path, smallest, text):
    assert load_config(smallest, [f"optimizer.lr={text}"]).optimizer.lr == 1e-6
    path = write(tmp_path, yaml.safe_dump(SMALLEST) + f"optimizer: {{lr: {text}}}\n")
    assert load_config(path).optimizer.lr == 1e-6


@settings(deadline=None)
@given(st.floats(min_value=1e-30, max_value=1e30))
def test_a_float_written_by_python_is_read_back(tmp_path_factory, number):
    path = write(tmp_path_factory.getbasetemp(), yaml.safe_dump(SMALLEST))
    assert load_config(path, [f"optimizer.lr={number!r}"]).optimizer.lr == number


@pytest.mark.parametrize("text, flag", [("true", True), ("false", False), ("True", True)])
def test_only_true_and_false_are_booleans(smallest, text, flag):
    assert load_config(smallest, [f"logging.tensorboard={text}"]).logging.tensorboard is flag
    for other in ("yes", "no", "on", "off", "1"):
        assert complaint(smallest, f"logging.tensorboard={other}").startswith("logging.tensorboard: ")


def test_off_is_the_logging_mode_and_not_false(tmp_path):
    assert load_config(write(tmp_path, yaml.safe_dump(SMALLEST) + "logging: {wandb: off}\n")).logging.wandb == "off"


def test_a_later_override_wins(smallest):
    config = load_config(smallest, ["trainer.steps=5", "data.seed=3", "trainer.steps=7", "rollout.record=a=b"])
    assert (config.trainer.steps, config.data.seed, config.rollout.record) == (7, 3, "a=b")


def test_an_override_can_unset_and_reach_a_nested_section(smallest):
    config = load_config(smallest, ["data.valid=held_out.jsonl", "data.valid=null", "model.shape.num_layers=4"])
    assert (config.data.valid, config.model.shape.num_layers) == (None, 4)


# --- what is refused


@pytest.mark.parametrize(
    "section, key, nearest",
    [
        ("trainr", None, "trainer"),
        ("data", "prompt_per_step", "data.prompts_per_step"),
        ("objective", "beta_gl", "objective.beta_gal"),
        ("optimizer", "lrr", "optimizer.lr"),
        ("rollout", "temprature", "rollout.temperature"),
        ("model", "shap", "model.shape"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(tmp_path, smallest, section, key, nearest):
    dotted = section if key is None else f"{section}.{key}"
    expected = f"{dotted}: unknown key; the nearest known key is {nearest}"
    assert complaint(smallest, f"{dotted}=1") == expected
    tree = SMALLEST | {section: 1 if key is None else SMALLEST.get(section, {}) | {key: 1}}
    assert complaint(write(tmp_path, yaml.safe_dump(tree))) == expected


@pytest.mark.parametrize("dotted", KEYS)
def test_every_key_misspelt_in_its_last_letter_is_named(smallest, dotted):
    assert complaint(smallest, f"{dotted}_=1") == f"{dotted}_: unknown key; the nearest known key is {dotted}"


@pytest.mark.parametrize(
    "text, line",
    [
        ("optimizer: {lr: 1.0, lr: 2.0}", 7),
        ("optimizer:\n  lr: 1.0\n  eps: 1.0\n  'lr': 2.0", 10),
        ("data: {}", 7),
    ],
)
def test_a_key_given_twice_is_named_with_its_line(tmp_path, text, line):
    given_keys = "model: {preset: tiny}\ndata:\n  train: rows.jsonl\ntrainer:\n  steps: 1\n  run_dir: x\n"
    told = complaint(write(tmp_path, given_keys + text))
    assert f"key '{'data' if 'data' in text else 'lr'}' occurs twice" in told
    assert f"line {line}," in told


@pytest.mark.parametrize("dotted", ["data.train", "trainer.steps", "trainer.run_dir"])
def test_a_missing_required_key_is_named(tmp_path, dotted):
    section, leaf = dotted.split(".")
    tree = SMALLEST | {section: {name: kept for name, kept in SMALLEST[section].items() if name != leaf}}
    assert complaint(write(tmp_path, yaml.safe_dump(tree))) == f"{dotted}: required key is missing"


@pytest.mark.parametrize(
    "override",
    [
        "trainer.steps=many", "trainer.steps=1.5", "trainer.steps=true", "trainer.steps=", "trainer.steps=[1]",
        "optimizer.lr=fast", "optimizer.lr=true", "optimizer.betas=0.9", "optimizer.betas=[0.9]", "data.train=3",
        "logging.wandb=maybe", "objective.method=trpo", "objective.reference=every:0", "data.skip_bad_rows=1",
        "trainer.steps=0", "trainer.steps=-1", "optimizer.lr=0", "optimizer.lr=.inf", "optimizer.lr=.nan",
        "objective.alpha=1.1", "objective.alpha=-0.1", "rollout.temperature=0", "rollout.top_p=1.01",
        "rollout.correction_cap=1", "objective.teachers_per_prompt=0", "trainer.keep_checkpoints=0", "model=tiny",
        "trainer.seed=-1", f"trainer.seed={2**63}", "data.seed=-1", f"data.seed={2**63}",
        "optimizer.lr=0x_",
            "trainer.seed=2020-13-45",
            "trainer.steps=0x10",
            "trainer.steps=1_0",
            "trainer.steps=1:30",
        "parallel.tensor=0", "data.max_tokens_per_microbatch=0", "optimizer.betas=[0.9, x]", "objective=null",
    ],
)  # fmt: skip
def test_a_wrong_type_or_value_is_refused_by_key_and_shows_what_was_given(smallest, override):
    dotted, _, text = override.partition("=")
    line = complaint(smallest, override)
    assert line.startswith(dotted)
    shown = {"": "None", "true": "True", "null": "None", ".inf": "inf", ".nan": "nan", "[0.9, x]": "x"}.get(text, text)
    assert shown in line


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 5000, '"\\Uffffffff"', "{a: 1, a: 2}"])
def test_what_yaml_cannot_read_is_refused_in_a_short_line(tmp_path, smallest, text):
    told = complaint(smallest, f"trainer.seed={text}")
    assert told.startswith("trainer.seed: ")
    assert len(told) < 200
    assert complaint(write(tmp_path, f"trainer: {{seed: {text}}}")).startswith("not valid YAML: ")


def test_seeds_reach_up_to_63_bits_and_a_date_is_a_name(smallest):
    config = load_config(smallest, [f"trainer.seed={2**63 - 1}", "data.seed=+7", "trainer.run_dir=2020-01-01"])
    assert (config.trainer.seed, config.data.seed, config.trainer.run_dir) == (2**63 - 1, 7, "2020-01-01")


RULES = [  # of checks.py: (overrides that break it, what the line starts with)
    (["model.hf=folder"], "model.hf, model.preset: "),
    (["model.preset=null"], "model.hf, model.preset: "),
    (["rollout.engine=replay"], "rollout.replay: "),
    (
        ["rollout.engine=replay", "rollout.replay=a", "rollout.async_rollout=1"],
        "rollout.async_rollout: 1 is not read with rollout.engine: replay",
    ),
    (
        ["rollout.engine=replay", "rollout.replay=a", "rollout.dynamic_sampling=true"],
        "rollout.dynamic_sampling: true is not read with rollout.engine: replay",
    ),
    (
        ["objective.method=sft", "rollout.async_rollout=1"],
        "rollout.async_rollout: 1 is not read with objective.method: sft",
    ),
    (
        ["objective.method=sft", "rollout.dynamic_sampling=true"],
        "rollout.dynamic_sampling: true is not read with objective.method: sft",
    ),
    (["rollout.async_rollout=1", "trainer.offload=true"], "rollout.async_rollout, trainer.offload: "),
    (["rollout.async_rollout=1", "trainer.deterministic=true"], "rollout.async_rollout, trainer.deterministic: "),
    (["rollout.async_rollout=1", "rollout.max_staleness=0"], "rollout.max_staleness: "),
    (["rollout.replay=folder"], "rollout.replay: "),
    (["rollout.engine=replay", "rollout.replay=a", "rollout.record=a"], "rollout.record, rollout.replay: "),
    (["objective.hard_max_solved=8"], "objective.hard_max_solved: "),
    (["objective.updates_per_rollout=65"], "objective.updates_per_rollout: "),
    *(
        (
            [f"objective.method={method}", "rollout.samples_per_prompt=1"],
            f"rollout.samples_per_prompt: objective.method: {method} compares",
        )
        for method in GROUPED
    ),
    (["optimizer.schedule=cosine"], "optimizer.schedule_steps: "),
    (
        ["optimizer.schedule=linear", "optimizer.schedule_steps=5", "optimizer.warmup_steps=5"],
        "optimizer.schedule_steps: ",
    ),
    (
        ["optimizer.min_lr=1", "optimizer.schedule=linear", "optimizer.schedule_steps=6"],
        "optimizer.min_lr: 1.0 exceeds",
    ),
    (["optimizer.betas=[0.9, 1.0]"], "optimizer.betas: "),
    (["optimizer.betas=[-0.1, 0.9]"], "optimizer.betas: "),
    (["trainer.eval_every=1"], "trainer.eval_every: needs data.valid or evaluation.suites"),
    (["parallel.sequence_parallel=true"], "parallel.sequence_parallel: "),
]


@pytest.mark.parametrize("overrides, start", RULES)
def test_keys_that_cannot_work_together_are_refused(smallest, overrides, start):
    assert complaint(smallest, *overrides).startswith(start)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.preset=null", "model.hf=folder"],
        ["rollout.engine=replay", "rollout.replay=a", "rollout.record=b"],
        ["objective.method=luffy", "rollout.samples_per_prompt=1"],
        ["objective.method=sft", "data.prompts_per_step=4"],
        [
            "rollout.engine=server",
            "rollout.servers=['http://127.0.0.1:8000']",
            "rollout.async_rollout=1",
            "trainer.deterministic=true",
        ],
        ["rollout.async_rollout=1", "rollout.max_staleness=2", "objective.updates_per_rollout=2"],
        ["objective.hard_max_solved=7"],
        ["objective.updates_per_rollout=64"],
        ["objective.method=grpo", "rollout.samples_per_prompt=2"],
        ["optimizer.schedule=linear", "optimizer.schedule_steps=6", "optimizer.warmup_steps=5"],
        ["optimizer.min_lr=1e-6", "optimizer.schedule=linear", "optimizer.schedule_steps=6"],
        ["optimizer.betas=[0, 0.999]"],
        ["trainer.eval_every=1", "data.valid=rows.jsonl"],
        ["parallel.sequence_parallel=true", "parallel.tensor=2"],
    ],
)
def test_at_the_edge_of_each_rule_a_configuration_loads(smallest, overrides):
    load_config(smallest, overrides)


@pytest.mark.parametrize(
    "overrides, world, model, start",
    [
        (["parallel.tensor=2"], 3, {}, "parallel.tensor x parallel.pipeline"),
        (["parallel.pipeline=2"], 1, {}, "parallel.tensor x parallel.pipeline"),
        (["parallel.tensor=2"], 2, {"num_attention_heads": 3}, "parallel.tensor"),
        (["parallel.tensor=4"], 4, {"num_query_groups": 2}, "parallel.tensor"),
        (["parallel.tensor=2"], 2, {"ffn_hidden_size": 33}, "parallel.tensor"),
        (["parallel.context=2"], 3, {}, "parallel.tensor x parallel.pipeline x parallel.context = 1 x 1 x 2 does not"),
        (["parallel.pipeline=2"], 2, {"num_layers": 3}, "parallel.pipeline"),
        (["parallel.pipeline=2", "parallel.virtual_pipeline=3"], 2, {}, "parallel.pipeline x parallel.virtual"),
        (
            ["parallel.tensor=3"],
            3,
            SIX_HEADS,
            "parallel.tensor",
        ),
    ],
)
def test_a_layout_that_divides_neither_ranks_nor_model_is_refused(smallest, overrides, world, model, start):
    sizes = {"num_attention_heads": 4, "num_query_groups": 4, "num_layers": 4, "ffn_hidden_size": 32} | model
    shape = dataclasses.replace(PRESETS["tiny"], **sizes)
    with pytest.raises(UserError, match=f"^file: {start}"):
        check_layout(load_config(smallest, overrides).parallel, shape, world, source="file")


@pytest.mark.parametrize("text, about", [("- 1", "mapping"), ("", "mapping"), ("a: [", "YAML"), ("\tb: 1", "YAML")])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text, about):
    assert about in complaint(write(tmp_path, text))


def test_an_unreadable_file_is_named(tmp_path):
    assert "cannot read" in complaint(tmp_path / "absent.yaml")
    assert "cannot read" in complaint(tmp_path)
    path = tmp_path / "latin.yaml"
    path.write_bytes("model: é".encode("latin-1"))
    assert "YAML" in complaint(path)


@pytest.mark.parametrize("override", ["trainer.steps", "=3", "steps 3"])
def test_an_override_without_key_and_equals_sign_is_refused(smallest, override):
    with pytest.raises(UserError, match=r"expected section\.key=value"):
        load_config(smallest, [override])


# --- fingerprint, dump, documentation


def test_the_fingerprint_leaves_out_exactly_what_may_change_on_resume(smallest):
    assert set(KEYS) >= MAY_CHANGE
    assert set(fingerprint(load_config(smallest))) == set(KEYS) - MAY_CHANGE


def test_whatever_is_in_the_fingerprint_changes_it(smallest):
    """One changed value per section: the fingerprints differ in that key alone."""
    ours = fingerprint(load_config(smallest))
    for override in (
        "model.shape.num_layers=3",
        "data.seed=1",
        "rollout.temperature=0.9",
        "objective.gamma=2",
        "trainer.seed=1",
    ):
        theirs = fingerprint(load_config(smallest, [override]))
        assert [name for name in ours if ours[name] != theirs[name]] == [override.partition("=")[0]]


@pytest.mark.parametrize(
    "overrides", [[], ["logging.wandb=off", "optimizer.lr=3e-7", "data.valid='é: x.jsonl'", "model.shape.head_dim=64"]]
)
def test_the_resolved_configuration_is_a_configuration_that_says_the_same(tmp_path, smallest, overrides):
    config = load_config(smallest, overrides)
    text = dump(config)
    assert load_config(write(tmp_path, text)) == config
    assert all(f"{name.rpartition('.')[2]}:" in text for name in KEYS)


def test_every_key_is_documented_in_a_sentence():
    for name, info in KEYS.items():
        assert info.description, name
        assert info.description[0].isupper() or info.description.startswith("vLLM"), name
        assert info.description.endswith((".", "never.")), name


@pytest.mark.parametrize("command", ["train", "serve", "show", "evaluate", "plan"])
def test_a_command_without_its_file_names_that_alone_and_shows_its_own_usage(command, capsys):
    required = ["--gpus", "2", "--gpu-memory", "80"] if command == "plan" else []
    for arguments, said in (
        (required, "the following arguments are required: CONFIG\n"),
        (["c.yaml", *required, "--wrong"], "unrecognized arguments: --wrong\n"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([command, *arguments])
        printed = capsys.readouterr().err
        assert ended.value.code == 2 and printed.endswith(said)
        assert printed.startswith(f"usage: megatron_dypo {command} ")


@pytest.mark.parametrize("way", ["import", "verify"])
def test_usage_of_a_way_to_convert_is_its_own(way, capsys):
    more = ["--out", "o"] if way == "import" else ["--checkpoint", "c"]
    with pytest.raises(SystemExit):
        main(["convert", way, "--hf", "x", *more, "--wrong"])
    printed = capsys.readouterr().err
    assert printed.startswith(f"usage: megatron_dypo convert {way} ") and "unrecognized arguments: --wrong" in printed
    for folder, said in (
        ("./x", "--hf: there is no folder ./x"),
        ("/no/where", "--hf: there is no folder /no/where"),
        ("a/b/c", "--hf: there is no folder a/b/c"),
    ):
        assert main(["convert", way, "--hf", folder, *more]) == 2
        assert capsys.readouterr().err == f"megatron_dypo: {said}\n"


def test_the_help_of_train_names_every_key_with_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for name in KEYS:
        assert f"  {name}  (" in shown


def test_the_reference_page_is_what_the_schema_renders():
    page = (REPOSITORY / "docs/configuration.md").read_text(encoding="utf-8")
    assert page == render.page(), "run: python -m megatron_dypo.config > docs/configuration.md"
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) == len([name for name in KEYS if "." in name]), "and one that holds whole sections"
    assert all(line.replace(r"\|", "").count("|") == 5 for line in rows)


def test_a_path_key_knows_the_home_folder_and_the_environment(tmp_path, smallest, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DATA", "/data")
    paths = [name for name, info in walk() if info.json_schema_extra["path"]]
    assert {"trainer.run_dir", "model.hf", "data.train", "data.valid", "evaluation.data"} <= set(paths)
    for name in paths:
        own = {"data.experts": ["objective.method=chord"], "rollout.replay": ["rollout.engine=replay"]}
        other = ({"model.hf": ["model.preset=null"]} | own).get(name, [])
        for text, expected in (("~/x y", f"{tmp_path}/home/x y"), ("$DATA/x", "/data/x"), ("${DATA}2", "/data2")):
            suffix = ".py:score" if name in ("reward.function", "objective.loss_function") else ""
            config = load_config(smallest, [f"{name}={text}{suffix}", *other])
            assert attrgetter(name)(config) == expected + suffix
    config = load_config(smallest, ["logging.wandb=offline", "logging.wandb_project=$DATA", "evaluation.system=~/x"])
    assert (config.logging.wandb_project, config.evaluation.system) == ("$DATA", "~/x"), "no paths"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "trainer.run_dir=$NOWHERE_SET/x",
            "trainer.run_dir: $NOWHERE_SET/x: the environment variable $NOWHERE_SET is not set",
        ),
        (
            "data.valid=a/${NOWHERE_SET}",
            "data.valid: a/${NOWHERE_SET}: the environment variable ${NOWHERE_SET} is not set",
        ),
        ("rollout.record=~nosuchuser/x", "rollout.record: ~nosuchuser/x: no home folder for ~nosuchuser"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused_by_key(smallest, override, said):
    with pytest.raises(UserError, match=re.escape(said) + "$"):
        load_config(smallest, [override])


# --- names of before


OLD = {  # an old configuration: (overrides, today's key, its value)
    "overlap": ("rollout.overlap", "true", "rollout.async_rollout", 1),
    "no overlap": ("rollout.overlap", "false", "rollout.async_rollout", 0),
    "refill": ("rollout.refill", "true", "rollout.dynamic_sampling", True),
    "verify": ("rollout.verify_sync", "true", "rollout.verify_sync", "sent"),
    "own": ("policy.routing", "own", "policy.routing_replay", "off"),
    "old": ("policy.routing", "replay_old", "policy.routing_replay", "old"),
    "rollout": ("policy.routing", "replay_rollout", "policy.routing_replay", "rollout"),
    "norm": ("model.shape.normalized_routing", "false", "model.shape.norm_topk_prob", False),
    "shared": ("model.shape.shared_ffn_hidden_size", "64", "model.shape.shared_expert_ffn_hidden_size", 64),
}


def old_file(folder: Path, dotted: str, text: str) -> Path:
    *sections, leaf = dotted.split(".")
    tree = yaml.safe_load(yaml.safe_dump(SMALLEST))
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
    node[leaf] = yaml.safe_load(text)
    return write(folder, yaml.safe_dump(tree))


@pytest.mark.parametrize(("dotted", "text", "name", "new"), OLD.values(), ids=OLD)
def test_an_old_key_is_answered_with_its_new_name_and_read_in_a_run_folder(tmp_path, smallest, dotted, text, name, new):
    assert RENAMED[dotted].name == name
    line = complaint(smallest, f"{dotted}={text}")
    assert line.startswith(f"{dotted} is now") and (dotted == name or name in line)
    assert not RENAMED[dotted].values or f"{new} (was {text})" in line
    path = old_file(tmp_path, dotted, text)
    assert complaint(path) == line
    assert value(load_config(path, recorded=True), name) == new
    assert rename({dotted: yaml.safe_load(text)}) == {name: new}


def test_all_old_keys_of_a_file_are_answered_at_once(tmp_path):
    path = write(tmp_path, yaml.safe_dump(SMALLEST | {"rollout": {"overlap": True, "refill": True}}))
    assert complaint(path) == (
        "rollout.overlap is now rollout.async_rollout: 0 (was false) or 1 (was true); "
        "rollout.refill is now rollout.dynamic_sampling"
    )


def test_every_renamed_key_is_a_key_of_today_and_no_old_name_is():
    assert {renamed.name for renamed in RENAMED.values()} <= KEYS.keys()
    assert KEYS.keys() & RENAMED.keys() == {name for name, renamed in RENAMED.items() if renamed.name == name}


@pytest.mark.parametrize("text", ["true", "2", "1.0", "on"])
def test_async_rollout_is_the_whole_number_0_or_1(smallest, text):
    assert complaint(smallest, f"rollout.async_rollout={text}").startswith("rollout.async_rollout: input should be")


def test_what_a_configuration_prints_is_what_it_reads(tmp_path, smallest):
    """The values include ``off``, which YAML 1.1 reads as false."""
    config = load_config(smallest, ["rollout.verify_sync=off", "policy.routing_replay=off"])
    assert load_config(write(tmp_path, dump(config))) == config


# --- the words of verl, TRL, Megatron-LM and vLLM

TYPED = {  # typed by users of those -> the key here
    "learning_rate": "optimizer.lr",
    "optimizer.learning_rate": "optimizer.lr",
    "trainer.learning_rate": "optimizer.lr",
    "actor_rollout_ref.actor.optim.lr": "optimizer.lr",
    "lr": "optimizer.lr",
    "num_generations": "rollout.samples_per_prompt",
    "actor_rollout_ref.rollout.n": "rollout.samples_per_prompt",
    "rollout.n": "rollout.samples_per_prompt",
    "kl_beta": "objective.kl_coef",
    "objective.beta": "objective.kl_coef",
    "actor_rollout_ref.actor.kl_loss_coef": "objective.kl_coef",
    "algorithm.kl_ctrl.kl_coef": "objective.kl_coef",
    "tensor_model_parallel_size": "parallel.tensor",
    "tensor-model-parallel-size": "parallel.tensor",
    "parallel.tensor_model_parallel_size": "parallel.tensor",
    "actor_rollout_ref.actor.megatron.tensor_model_parallel_size": "parallel.tensor",
    "actor_rollout_ref.rollout.tensor_model_parallel_size": "parallel.tensor is the trainer's",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "context_parallel_size": "parallel.context",
    "expert_model_parallel_size": "parallel.expert",
    "num_layers": "model.shape.num_layers",
    "model.num_layers": "model.shape.num_layers",
    "objective.clip_ratio": "objective.clip_low and objective.clip_high",
    "epsilon": "objective.clip_low and objective.clip_high",
    "optimizer.epsilon": "optimizer.eps",
    "cliprange": "objective.clip_low and objective.clip_high",
    "epsilon_high": "objective.clip_high",
    "clip_ratio_low": "objective.clip_low",
    "max_new_tokens": "rollout.max_response_tokens",
    "max_completion_length": "rollout.max_response_tokens",
    "data.max_response_length": "rollout.max_response_tokens",
    "data.max_prompt_length": "data.max_prompt_tokens",
    "per_device_train_batch_size": "data.prompts_per_step",
    "data.train_batch_size": "data.prompts_per_step",
    "global_batch_size": "data.prompts_per_step",
    "micro_batch_size": "data.max_tokens_per_microbatch",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": "data.max_tokens_per_microbatch",
    "gpu_memory_utilization": "rollout.engine_memory",
    "seq_length": "data.max_prompt_tokens and rollout.max_response_tokens",
    "trainer.total_epochs": "trainer.steps",
    "max_steps": "trainer.steps",
    "train_iters": "trainer.steps",
    "save_interval": "trainer.save_every",
    "trainer.save_freq": "trainer.save_every",
    "eval_interval": "trainer.eval_every",
    "trainer.test_freq": "trainer.eval_every",
    "trainer.logger": "logging.wandb and logging.tensorboard",
    "report_to": "logging.wandb and logging.tensorboard",
    "model_name_or_path": "model.hf",
    "actor_rollout_ref.model.path": "model.hf",
    "gradient_checkpointing": "model.recompute",
    "recompute_granularity": "model.recompute",
    "lr_decay_style": "optimizer.schedule",
    "lr_warmup_iters": "optimizer.warmup_steps",
    "weight_decay": "optimizer.weight_decay",
    "bf16": "model.dtype",
    "use_distributed_optimizer": "optimizer.distributed",
    "temperature": "rollout.temperature or evaluation.temperature",
    "objective.temperature": "rollout.temperature or evaluation.temperature",
    "custom_reward_function.path": "reward.function",
    "algorithm.gamma": "objective.gamma weighs SFT",
    "+trainer.val_before_train": "trainer.eval_every",
}


@pytest.mark.parametrize(("typed", "here"), TYPED.items())
def test_a_word_of_other_projects_is_answered_with_our_key_in_whatever_section(tmp_path, smallest, typed, here):
    line = complaint(smallest, f"{typed}=1")
    assert line.startswith(f"{typed}: unknown key; here it is {here}")
    tree = 1
    for part in reversed(typed.split(".")):
        tree = {part: tree}
    (section, content), = tree.items()  # fmt: skip
    of_file = SMALLEST | {section: SMALLEST.get(section, {}) | content if isinstance(content, dict) else content}
    assert complaint(write(tmp_path, yaml.safe_dump(of_file))) == line


def test_a_section_of_another_project_is_answered_key_by_key(tmp_path):
    verl = {"model": {"path": "m", "use_remove_padding": True}, "rollout": {"n": 8}, "actor": {"optim": {"lr": 1e-6}}}
    assert complaint(write(tmp_path, yaml.safe_dump(SMALLEST | {"actor_rollout_ref": verl}, sort_keys=False))) == (
        "actor_rollout_ref.model.path: unknown key; here it is model.hf; "
        "actor_rollout_ref.rollout.n: unknown key; here it is rollout.samples_per_prompt; "
        "actor_rollout_ref.actor.optim.lr: unknown key; here it is optimizer.lr"
    )
    many = {f"lr_warmup_steps{'_' * n}": {"lr_warmup_steps": n} for n in range(12)}
    line = complaint(write(tmp_path, yaml.safe_dump(SMALLEST | many)))
    assert line.count("optimizer.warmup_steps") == SHOWN and line.endswith("; and 4 more")


SECTIONS = "|".join(name for name in Config.model_fields)


@pytest.mark.parametrize("said", SYNONYMS)
def test_every_answer_names_keys_and_values_that_there_are(said):
    named = re.findall(rf"\b(?:{SECTIONS})\.[a-z_.]*[a-z_]", said)
    assert named and set(named) <= KEYS.keys(), named
    if choices := re.fullmatch(r"([a-z_.]+): ([a-z0-9, ]+ or [a-z0-9]+)", said):
        arms = re.split(", | or ", choices[2])
        assert set(arms) <= {str(arm).lower() for arm in literals(KEYS[choices[1]].annotation)}


def literals(annotation: Any) -> set:
    arms = {arm for each in get_args(annotation) for arm in literals(each)}
    return arms or ({True, False} if annotation is bool else {annotation})


def test_no_word_has_two_answers_and_none_hides_a_key():
    words = [word for each in SYNONYMS.values() for word in each.split()]
    assert sorted(words) == sorted(set(words))
    assert not set(words) & KEYS.keys()


# --- several files


def test_a_second_file_stands_for_overrides_of_its_keys_in_its_place(tmp_path):
    base = write(tmp_path, yaml.safe_dump(SMALLEST | {"objective": {"alpha": 0.25, "gamma": 0.5}}))
    over = tmp_path / "over.yaml"
    over.write_text(
        "objective: {method: grpo, entropy_coef: 1e-3}\ntrainer: {steps: 7}\noptimizer: {betas: [0.9, 0.99]}\n"
    )
    config = load_config(base, ["trainer.steps=5", str(over), "objective.clip_low=0.1"])
    assert (config.trainer.steps, config.objective.method, config.optimizer.betas) == (7, "grpo", [0.9, 0.99])
    assert (config.objective.entropy_coef, config.objective.clip_low) == (1e-3, 0.1)
    assert config.written == {"objective.alpha": 0.25, "objective.gamma": 0.5}  # idle by the second file, as by a word
    assert load_config(base, [str(over), "trainer.steps=5"]).trainer.steps == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "over.yaml: cannot read the configuration: No such file or directory"),
        ("objective: [", "over.yaml: not valid YAML: "),
        ("3", "over.yaml: the configuration must be a mapping of sections"),
        ("objective: {metod: grpo}", "over.yaml: objective.metod: unknown key; the nearest known"),
        ("objective: {method: grpo, alpha: 0.3}", "objective.alpha: 0.3 is not read with objective.method: grpo"),
    ],
)  # fmt: skip
def test_a_second_file_that_will_not_do_is_one_line(smallest, tmp_path, capsys, text, said):
    over = tmp_path / "over.yaml"
    if text is not None:
        over.write_text(text)
    assert main(["plan", str(smallest), "--gpus", "8", "--gpu-memory", "80", str(over)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
