"""Every keyword given to Megatron-Core and torch's attention exists in every supported version."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_dypo.models.shape import PRESETS
from megatron_dypo.policy.attention import Segments, flash, sdpa
from tests.batches import make_config
from tests.signatures import calls, recorded

VERSIONS = {
    "torch": {"2.10.0", "2.11.0", "2.12.0", "2.13.0", "2.14.0"},
    "megatron": {"0.16.0", "0.16.1", "0.17.0", "0.17.1", "0.18.0", "0.19.0"},
}
VARLEN = recorded()["torch.nn.attention.varlen.varlen_attn"]


@pytest.mark.parametrize(
    ("where", "dotted", "keywords"), calls(), ids=lambda value: value if type(value) is str else ""
)
def test_every_version_knows_the_keywords_of_a_call(where, dotted, keywords):
    """Record a new call, or a new version, with ``python -m tests.signatures WHEEL...``."""
    versions = recorded().get(dotted, {})
    assert set(versions) == VERSIONS[dotted.partition(".")[0]], f"{where}: {dotted} is not recorded for all versions"
    for version, known in versions.items():
        assert known is None or keywords <= set(known), f"{where}: {dotted} of {version}"


def test_every_version_knows_the_settings_that_are_given_as_a_dictionary():
    from megatron_dypo.policy.model import _RECOMPUTE, _mixture

    config = make_config("mixtral", model={"recompute": "selective"})
    settings = set().union(_mixture(config, PRESETS["tiny-moe"]), *_RECOMPUTE.values())
    for version, known in recorded()["megatron.core.transformer.transformer_config.TransformerConfig"].items():
        assert settings <= set(known), version


@pytest.mark.parametrize("version", VARLEN)
def test_flash_attention_is_the_same_whatever_the_version_of_torch(version, monkeypatch):
    """Uses an imitation with the version's signature that does what its documentation says."""

    def attend(query, key, value, query_offsets, key_offsets, most_queries, most_keys, **given):
        assert set(given) <= set(VARLEN[version]), "an unexpected keyword argument"
        assert given.get("is_causal") or given["window_size"] == (-1, 0), "each token would see its future"
        if "enable_gqa" in VARLEN[version]:
            assert given["enable_gqa"] == (query.shape[1] != key.shape[1]), "refused"
        outputs = []
        for start, end in itertools.pairwise(query_offsets.tolist()):
            q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
            options = {"is_causal": True, "scale": given.get("scale"), "enable_gqa": True}
            outputs.append(scaled_dot_product_attention(q, k, v, **options).transpose(0, 1))
        return torch.cat(outputs)

    by_name = inspect.Parameter.POSITIONAL_OR_KEYWORD
    attend.__signature__ = inspect.Signature([inspect.Parameter(name, by_name) for name in VARLEN[version]])
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", attend)
    segments, draw = Segments([0, 5, 17], torch.device("cpu")), torch.Generator().manual_seed(0)
    for groups, scale in ((4, 8**-0.5), (2, 8**-0.5), (2, 0.3)):
        packed = [torch.randn(17, heads, 8, generator=draw) for heads in (4, groups, groups)]
        torch.testing.assert_close(flash(*packed, segments, scale), sdpa(*packed, segments, scale))


def test_the_installed_version_is_as_recorded():
    from torch.nn.attention.varlen import varlen_attn

    version = torch.__version__.partition("+")[0]
    if version in VARLEN:
        assert list(inspect.signature(varlen_attn).parameters) == VARLEN[version]
