"""A user's own loss (``objective.loss_function``): gradients, inputs, and errors.

Gradients equal the fused kernel's if it is the same loss, at any layout; each error is one line. The losses are the
example's, which docs/add-an-algorithm.md lists. Legend: N tokens, S responses.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dypo.config.load import load_keys
from megatron_dypo.config.schema import Objective
from megatron_dypo.errors import TrainingError, UserError
from megatron_dypo.objectives.correction import Correction
from megatron_dypo.objectives.own_loss import load_own_loss, try_out
from megatron_dypo.objectives.recipes import RECIPES
from tests import test_objectives as ours
from tests.ranks import run_ranks
from tests.test_layouts import CP2, PP2, SP, train_steps

ROOT = Path(__file__).resolve().parents[1]
LOSSES = ROOT / "examples" / "own_loss" / "losses.py"
SAME = {  # the example's losses, and the settings under which the fused kernel's is equal
    "clipped": {},
    "gspo": {"ratio_level": "sequence"},
    "cispo": {"surrogate": "cispo"},
}


def named(loss: str) -> dict[str, Any]:
    return {"loss_function": f"{LOSSES}:{loss}"}


@pytest.mark.parametrize("loss", SAME)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "grpo", "kl_coef": 0.2, "aggregation": "token_mean", "mask_truncated": True},
        {"method": "luffy", "entropy_coef": 0.1, "aggregation": "constant", "alpha": 0.5},
    ],
    ids=lambda settings: settings.get("method", "dypo"),
)
def test_value_and_gradient_are_the_fused_kernel_s_where_the_loss_is_the_same(settings, loss):
    """Compare with all other terms, normalisers, shares and the correction, over any division into micro-batches."""
    settings = {"clip_low": 0.15, "clip_high": 0.28, **settings}
    for correction in (Correction("none"), Correction("icepop", 1.4, 0.5)):
        if loss == "gspo" and correction.kind != "none":
            continue  # the fused one weights a response by one ratio, a user's loss weights each token
        fused, own = (
            ours.ours(ours.make_batch(ours.MIXED, objective, seed=5), objective, correction, seed=3)
            for objective in (Objective(**settings, **SAME[loss]), Objective(**settings, **named(loss)))
        )
        assert own.gradient.keys() >= fused.gradient.keys()
        gap = ours.flat(own.gradient, own.gradient) - ours.flat(fused.gradient, own.gradient)
        assert gap.abs().max() < 1e-13
        if loss != "cispo":  # the kernel reports another value with the same slope
            assert own.loss == pytest.approx(fused.loss, rel=1e-12)
        assert own.totals["loss/kl"] == pytest.approx(fused.totals["loss/kl"], rel=1e-12)


def gradients(parallel: dict, objective: dict, budget: int = 150) -> dict[str, Any]:
    """Return the gradients of the last of three updates on one rollout, and the metrics."""
    sections = {"objective": {"updates_per_rollout": 3} | objective, "parallel": parallel}
    result = train_steps("deep", budget, 1, sections)
    return {"gradients": result["gradients"], "metrics": result["history"][0]}


@functools.cache
def fused(loss: str) -> dict[str, Any]:
    """Run on one rank with the kernel."""
    return run_ranks(1, gradients, {}, SAME[loss], 100_000)[0]


LAYOUTS = [(2, SP), (2, PP2), (2, CP2), (2, {})]


@pytest.mark.parametrize(
    ("loss", "world", "parallel"),
    [
        *(("clipped", *layout) for layout in LAYOUTS),
        ("gspo", 2, CP2),
        ("cispo", 2, SP),
        *(pytest.param("gspo", *layout, marks=pytest.mark.faults) for layout in LAYOUTS if layout[1] != CP2),
        *(pytest.param("cispo", *layout, marks=pytest.mark.faults) for layout in LAYOUTS if layout[1] != SP),
        pytest.param("gspo", 4, SP | CP2, marks=pytest.mark.faults),
        pytest.param("gspo", 4, {"context": 4}, marks=pytest.mark.faults),
    ],
    ids=str,
)
def test_at_every_layout_the_gradient_is_the_fused_kernel_s_on_one_rank(loss, world, parallel):
    """Compare with dypo's other terms and clipped tokens; at CP 2 both ranks hold tokens of a response."""
    expected = fused(loss)
    assert min(expected["metrics"][name] for name in ("policy/clip_frac", "loss/kl", "loss/sft", "loss/gal")) > 1e-3
    for result in run_ranks(world, gradients, parallel, named(loss)):
        for name, theirs in expected["gradients"].items():
            gap = np.linalg.norm(result["gradients"][name].astype(np.float64) - theirs)
            assert gap <= 1e-5 * np.linalg.norm(theirs.astype(np.float64)) + 1e-9, name
        metrics = result["metrics"]
        assert metrics["loss/kl"] == pytest.approx(expected["metrics"]["loss/kl"], rel=1e-4)
        assert metrics["train/grad_norm"] == pytest.approx(expected["metrics"]["train/grad_norm"], rel=1e-5)
        if loss == "clipped":
            for name in ("loss/total", "loss/grpo"):
                assert metrics[name] == pytest.approx(expected["metrics"][name], rel=1e-5, abs=1e-8)
            clipped = expected["metrics"]["policy/clip_frac"]
            assert metrics["loss_function/clip_frac"] == pytest.approx(clipped, rel=1e-6)
        assert "policy/clip_frac" not in metrics, "the recipe's surrogate is not there"


def test_groups_of_equal_rewards_are_packed_for_a_loss_that_may_train_them():
    batch = ours.make_batch([[1, 1], [0, 0], [1, 0]], Objective(method="grpo"))
    assert {g for g, _, _ in ours.ours(batch, Objective(method="grpo")).gradient} == {2}
    assert {g for g, _, _ in ours.ours(batch, Objective(method="grpo", **named("clipped"))).gradient} == {0, 1, 2}


# --- what may be wrong with it

BAD = {
    "def f(batch): return batch.log_prob.sum()": r"returned a tensor \[\] of torch.float32 on cpu; expected a tensor",
    "def f(batch): return batch.log_prob.double()": r"returned a tensor \[13\] of torch.float64 on cpu; expected",
    "def f(batch): return None": "returned a NoneType; expected a tensor",
    "def f(batch): return -batch.advantages": "returned a loss that depends on neither log_prob nor entropy",
    "def f(batch): return (batch.log_prob - batch.log_prob).sqrt()": "a loss or slope is NaN or infinite",
    "def f(batch): return batch.log_prob / (batch.advantages * 0)": "a loss or slope is NaN or infinite",
    "def f(batch): return batch.log_prob, {'x': 1.0}": "metric 'x': a float; expected a tensor",
    "def f(batch): return batch.log_prob, [1]": "returned metrics as a list; expected a dict",
    "def f(batch): return batch.no_such": "raised AttributeError: 'PolicyLossBatch' object has no attribute 'no_such'",
    "def f(): return 1": "raised TypeError: f",
    "def f(batch): return batch.log_prob - batch.ref_log_prob": "raised TypeError: unsupported operand",
    "import no_such_module": "ModuleNotFoundError: No module named 'no_such_module'",
    "def g(batch): return 1": "AttributeError: .*own.py has no f",
    "def f(batch:": "SyntaxError: ",
}


@pytest.mark.parametrize(("text", "line"), BAD.items(), ids=list(BAD))
def test_a_function_that_cannot_be_trained_with_is_refused_in_one_line_that_names_its_file(tmp_path, text, line):
    path = tmp_path / "own.py"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"^objective.loss_function: {re.escape(str(path))}:f: {line}") as caught:
        try_out(load_own_loss(f"{path}:f"), Objective(method="grpo"), has_reference=False)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named_and_another_form_refused_with_the_configuration(tmp_path):
    with pytest.raises(UserError, match=r"^objective.loss_function: .*/no.py:f: FileNotFoundError: no such file$"):
        load_own_loss(f"{tmp_path}/no.py:f")
    with pytest.raises(UserError, match=r"x: objective.loss_function: 'losses.py' is neither package.module:function"):
        load_keys(["objective.loss_function=losses.py"], "x")
    for key in ("objective.ratio_level=sequence", "objective.surrogate=cispo"):
        with pytest.raises(UserError, match=r"objective\..* is not read with objective.loss_function: a.py:f, only"):
            load_keys(["objective.loss_function=a.py:f", key], "x")
    assert load_keys(["objective.loss_function=a.py:f", "objective.clip_low=0.1"], "x").objective.clip_low == 0.1


def test_a_run_is_refused_before_anything_is_built(tmp_path, monkeypatch):
    from megatron_dypo import preflight

    path = tmp_path / "own.py"
    path.write_text("def f(batch): return batch.log_prob.mean()")
    short = ["data.max_prompt_tokens=8", "rollout.max_response_tokens=8", "rollout.engine=transformers"]
    config = load_keys([f"objective.loss_function={path}:f", "model.preset=tiny", *short], "x")
    monkeypatch.setattr(preflight, "load_data", lambda *_: pytest.fail("the data is read after the loss"))
    with pytest.raises(UserError, match=r"objective.loss_function: .*own.py:f: returned a tensor \[\]"):
        preflight.check_inputs(config, "x")


def spoilt_step(path: str) -> str | None:
    """Return why an update with this loss is skipped."""
    from megatron_dypo.training.minibatch import build_minibatches
    from megatron_dypo.training.passes import logprob_passes
    from megatron_dypo.training.step import StepContext, run_updates
    from tests.batches import make_groups, trace_ids
    from tests.test_training import build

    config, policy = build({}, objective={"loss_function": path})
    minibatches = build_minibatches(policy.layout, make_groups(), config, trace_ids)
    logprob_passes(policy, minibatches, config)
    return run_updates(policy, minibatches, config, StepContext(1, 1e-3)).skipped


def test_a_loss_that_becomes_nan_skips_the_step_and_names_file_and_response(tmp_path):
    """The NaN is in responses of more than 30 tokens, which the trial before the run does not have."""
    path = tmp_path / "own.py"
    path.write_text(
        "def f(batch):\n"
        "    bad_N = batch.per_token(batch.lengths) > 30\n"
        "    return -batch.advantages * batch.log_prob.masked_fill(bad_N, float('nan'))\n"
    )
    try_out(load_own_loss(f"{path}:f"), Objective(), has_reference=True)
    results = run_ranks(2, spoilt_step, f"{path}:f")
    assert results[0] == results[1]
    assert re.search(r"prompt p\d+, response \d: non-finite loss \(objective.loss_function: .*own.py:f\)", results[0])


def test_an_error_in_the_middle_of_a_run_names_the_function(tmp_path):
    path = tmp_path / "own.py"
    path.write_text("def f(batch): return batch.log_prob[1:]")
    own, objective = load_own_loss(f"{path}:f"), Objective(method="grpo", loss_function=f"{path}:f")
    assert str(own) == f"objective.loss_function: {path}:f"
    with pytest.raises(TrainingError, match=r"own.py:f: returned a tensor"):
        ours.ours(ours.make_batch([[1, 0]], objective), objective)


# --- what the page says


def test_the_page_s_listing_is_the_example_s_file():
    page = (ROOT / "docs" / "add-an-algorithm.md").read_text()
    section = page.partition("## A loss of your own, without Triton")[2]
    (listing,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert listing == LOSSES.read_text()
    assert all(f"`{loss}`" in section or f"def {loss}(" in listing for loss in SAME)


@pytest.mark.parametrize(
    "method", [name for name, recipe in RECIPES.items() if recipe.has("surrogate") and not recipe.side]
)
@pytest.mark.parametrize("loss", SAME)
def test_the_example_s_losses_are_accepted_for_every_recipe_with_a_surrogate(method, loss):
    config = load_keys([f"objective.method={method}", f"objective.loss_function={LOSSES}:{loss}"], "x")
    try_out(load_own_loss(config.objective.loss_function), config.objective, has_reference=False)
    assert torch.is_grad_enabled()
