"""DYPO (Dynamic Policy Optimization) post-training on Megatron-Core and vLLM.

The package reads in the order the data flows: ``data`` -> ``rollout`` -> ``reward`` -> ``objectives``
-> ``batching`` -> ``policy`` -> ``kernels`` -> ``sync`` -> ``checkpoint``; ``train.py`` is the loop that joins them,
``records.py`` the record that travels. Importing this package imports none of torch, megatron or vllm.
"""

__version__ = "0.1.0"
