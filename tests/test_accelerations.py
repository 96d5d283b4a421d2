"""Installed accelerations are used where they help; impossible ones are refused, or skipped with a reason."""

from __future__ import annotations

import functools
import sys

import pytest
import torch
from torch import nn

from megatron_dypo.config.schema import Model
from megatron_dypo.policy import attention
from megatron_dypo.policy.accelerations import Found, choose, explained, flash_kernels, on_this_machine, refusal
from megatron_dypo.policy.flash_kernels import activate

ENGINE = frozenset({"transformer_engine", "transformer_engine_torch"})
HOPPER, BLACKWELL, AMPERE, CONSUMER = (9, 0), (10, 0), (8, 0), (12, 0)


def machine(*modules: str, cuda: bool = True, release: tuple[int, int] = (2, 13)) -> Found:
    return Found(cuda, release, frozenset(modules))


def model(**keys) -> Model:
    return Model(preset="tiny", **({"dtype": "bf16"} | keys))


@pytest.mark.parametrize(
    ("found", "keys", "width", "engine", "attention"),
    [
        (machine(cuda=False), {"dtype": "fp32"}, 128, False, "sdpa"),
        (machine(*ENGINE, cuda=False), {}, 128, False, "sdpa"),
        (machine(), {}, 128, False, "flash"),
        (machine(), {"dtype": "fp32"}, 128, False, "sdpa"),
        (machine(), {}, 20, False, "sdpa"),
        (machine(), {}, 512, False, "sdpa"),
        (machine(*ENGINE), {}, 128, True, "te"),
        (machine(*ENGINE), {"dtype": "fp32"}, 128, False, "sdpa"),  # it would write the scores to memory
        (machine(*ENGINE), {"layer_spec": "local"}, 128, False, "flash"),
        (machine(*ENGINE), {"attention_backend": "sdpa"}, 128, False, "sdpa"),
        (machine("transformer_engine"), {}, 128, False, "flash"),  # half of it is installed
        (machine(), {"attention_backend": "sdpa"}, 128, False, "sdpa"),
    ],
)
def test_layers_and_attention_are_the_best_that_is_here_and_serves(found, keys, width, engine, attention):
    chosen = choose(model(**keys), width, found)
    assert (chosen.transformer_engine, chosen.attention) == (engine, attention)
    assert chosen.compiled == found.cuda
    assert refusal(model(**keys), width, found) is None


@pytest.mark.parametrize(
    ("keys", "width", "found", "says"),
    [
        ({"layer_spec": "te"}, 64, machine(cuda=False), ["model.layer_spec: te", "no device", "not installed"]),
        ({"attention_backend": "te"}, 64, machine(), ["model.attention_backend: te", "not installed", "pip install"]),
        ({"layer_spec": "te"}, 64, machine("transformer_engine"), ["te needs", "PyTorch extension", "without it"]),
        ({"attention_backend": "flash"}, 64, machine(cuda=False), ["flash needs CUDA", "sdpa"]),
        ({"attention_backend": "flash", "dtype": "fp32"}, 64, machine(), ["takes bf16", "fp32", "model.dtype: bf16"]),
        ({"attention_backend": "flash"}, 20, machine(), ["up to 256 in steps of 8", "20", "sdpa"]),
        ({"attention_backend": "flash"}, 264, machine(), ["up to 256 in steps of 8", "264", "sdpa"]),
    ],
)
def test_what_is_asked_for_by_name_and_cannot_be_is_one_line(keys, width, found, says):
    line = refusal(model(**keys), width, found)
    assert all(part in line for part in says), line
    assert "\n" not in line


@pytest.mark.parametrize("keys", [{"layer_spec": "te"}, {"attention_backend": "te"}, {"attention_backend": "flash"}])
def test_what_is_asked_for_and_can_be_is_not_refused(keys):
    assert refusal(model(**keys), 128, machine(*ENGINE)) is None


FA3, FA4 = "flash_attn_interface", "flash_attn.cute"


@pytest.mark.parametrize(
    ("found", "capability", "width", "usable"),
    [
        (machine(), HOPPER, 128, []),
        (machine(FA3), HOPPER, 128, ["FA3"]),
        (machine(FA3), HOPPER, 256, ["FA3"]),
        (machine(FA3), HOPPER, 100, []),
        (machine(FA3), AMPERE, 128, []),
        (machine(FA3), BLACKWELL, 128, []),
        (machine(FA4), BLACKWELL, 128, ["FA4"]),
        (machine(FA4), CONSUMER, 128, []),
        (machine(FA4), BLACKWELL, 192, []),
        (machine(FA3, FA4), HOPPER, 128, ["FA3", "FA4"]),
        (machine(FA3, FA4), HOPPER, 256, ["FA3"]),
        (machine(FA3, FA4, release=(2, 11)), HOPPER, 128, ["FA3"]),
        (machine(FA3, FA4, release=(2, 10)), HOPPER, 128, []),
    ],
)
def test_flash_attention_3_and_4_are_used_where_device_torch_and_heads_fit(found, capability, width, usable):
    reasons = flash_kernels(found, capability, width)
    assert [name for name, why in reasons.items() if not why] == usable
    assert all(reasons[name] for name in {"FA3", "FA4"} - set(usable)), "and a reason for the others"


class Registry:
    """torch's registry of flash attentions, with kernels that behave as a test specifies."""

    def __init__(self, kernels: dict):
        self.kernels, self.active = kernels, None

    def activate_flash_attention_impl(self, name: str) -> None:
        if isinstance(self.kernels[name], ImportError):
            raise self.kernels[name]
        self.active = name

    def current_flash_attention_impl(self) -> str | None:
        return self.active

    def restore_flash_attention_impl(self) -> None:
        assert self.active is not None, "torch warns where nothing is active"
        self.active = None

    def trial(self) -> list[torch.Tensor]:
        result = self.kernels.get(self.active, 1.0)
        if isinstance(result, Exception):
            raise result
        return [torch.full((4,), result)]


@pytest.mark.parametrize(
    ("kernels", "used", "failed"),
    [
        ({}, "FA2", {}),
        ({"FA4": 1.001, "FA3": 1.0}, "FA4", {}),
        ({"FA4": ValueError("too many values to unpack"), "FA3": 1.001}, "FA3", {"FA4": "too many values"}),
        ({"FA4": ImportError("no cutlass"), "FA3": 1.0}, "FA3", {"FA4": "no cutlass"}),
        ({"FA4": 1.5, "FA3": float("nan")}, "FA2", {"FA4": "0.5 of the norm", "FA3": "nan of the norm"}),
        ({"FA3": RuntimeError("no kernel image")}, "FA2", {"FA3": "no kernel image"}),
    ],
)
def test_a_flash_attention_that_fails_or_differs_is_put_away_again(kernels, used, failed):
    registry = Registry(kernels)
    name, reasons = activate(kernels, registry.trial, registry)
    assert name == used and registry.active == (None if used == "FA2" else used)
    assert reasons.keys() == failed.keys() and all(failed[name] in reasons[name] for name in failed)


def test_torch_has_the_registry_that_is_used():
    for name in ("activate", "restore", "current"):
        assert callable(getattr(nn.attention, f"{name}_flash_attention_impl"))
    assert {"FA3", "FA4"} <= set(nn.attention.list_flash_attention_impls())


def test_what_is_installed_is_found_without_importing_it(tmp_path, monkeypatch):
    """The package's files raise on import."""
    for path in ("transformer_engine/__init__.py", "flash_attn/__init__.py", "flash_attn/cute/interface.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("raise RuntimeError('imported')")
    (tmp_path / "fused_weight_gradient_mlp_cuda.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = on_this_machine()
    expected = {"transformer_engine", "flash_attn.cute", "fused_weight_gradient_mlp_cuda"}
    assert found.modules >= expected and not found.transformer_engine, "its extension is missing"
    for place in (
        "transformer_engine_torch.cpython-312.so",
        "transformer_engine/wheel_lib/transformer_engine_torch.so",
    ):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).touch()
        assert on_this_machine().transformer_engine, place
        (tmp_path / place).unlink()
    assert "transformer_engine" not in sys.modules and "flash_attn" not in sys.modules


def test_doctor_hears_of_each_acceleration_and_why():
    assert [line.in_use for line in explained(machine(*ENGINE, cuda=False))] == [False]
    local = {line.name: line for line in explained(machine(FA3, FA4), HOPPER)}
    assert local["FA3"].in_use and not local["FA4"].in_use and not local["FA2"].in_use
    assert not local["TE layers"].in_use and "not installed" in local["TE layers"].why
    plain = {line.name: line for line in explained(machine(), AMPERE)}
    assert plain["FA2"].in_use and "not installed" in plain["FA3"].why
    engine = {line.name: line for line in explained(machine(*ENGINE), HOPPER)}
    assert engine["TE layers"].in_use and "FA2" not in engine
    half = {line.name: line for line in explained(machine("transformer_engine"), HOPPER)}
    assert "without its PyTorch extension" in half["TE layers"].why
    apex = {line.name: line for line in explained(machine("fused_weight_gradient_mlp_cuda"), HOPPER)}
    assert "Apex" in apex["fused weight gradients"].why


def test_transformer_engines_experts_get_our_router_in_both_forms_of_megatron_core():
    """Up to 0.17 mcore returns a specification, from 0.18 on a partial function."""
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    from megatron_dypo.policy.layers import routed
    from megatron_dypo.policy.moe import MixtureOfExperts, TopKRouter

    for mlp in (
        ModuleSpec(MoELayer, submodules=MoESubmodules(experts="theirs", shared_experts="shared")),
        functools.partial(MoELayer, submodules=MoESubmodules(experts="theirs", shared_experts="shared")),
    ):
        ours = routed(mlp, MixtureOfExperts)
        assert ours.module is MixtureOfExperts
        parts = ours.submodules
        assert (parts.experts, parts.shared_experts, parts.router) == ("theirs", "shared", TopKRouter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 300])
def test_a_weights_gradient_is_added_in_fp32(dtype, tokens):
    from megatron_dypo.policy.weight_gradients import wgrad_gemm_accum_fp32

    draw = torch.Generator().manual_seed(0)
    given, slope = (torch.randn(tokens, width, generator=draw).to(dtype) for width in (24, 16))
    before = torch.randn(16, 24, generator=draw)
    after = before.clone()
    wgrad_gemm_accum_fp32(given, slope, after)
    expected = before.double() + slope.double().T @ given.double()
    torch.testing.assert_close(after.double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.slow
def test_rope_stays_compiled_for_several_models_in_both_passes(monkeypatch):
    """Past torch's limit of compilations one of the passes would run uncompiled, and round differently."""
    ran, build = [], torch.compile
    counting = lambda graph, _: lambda *inputs: (ran.append(1), graph.forward(*inputs))[1]  # noqa: E731
    monkeypatch.setattr(torch, "compile", lambda function: build(function, backend=counting))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    rotate, calls = attention.rotation.__wrapped__(True), 0
    for heads, groups, width in ((4, 2, 32), (12, 2, 128), (32, 8, 64)):
        for tokens in (96, 160, 96, 1000):
            for with_gradient in (False, True):
                table = torch.randn(2, tokens, 1, width)
                both = torch.randn(tokens, groups, (heads // groups + 2) * width, requires_grad=with_gradient)
                query, key, _ = both.split([heads // groups * width, width, width], dim=2)
                with torch.set_grad_enabled(with_gradient):
                    for x in (query.reshape(tokens, heads, width), key):  # as mcore splits them
                        rotate(x, *table)
                        calls += 1
    assert len(ran) == calls
