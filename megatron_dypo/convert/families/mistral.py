"""Mistral (7B from v0.2 on, Nemo, Small): Llama's table. v0.1 attends within a sliding window, which we do not."""

from megatron_dypo.convert.families import llama
from megatron_dypo.convert.families.family import Family

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    layer=llama.LAYER,
    only={"sliding_window": (None,)},
)
