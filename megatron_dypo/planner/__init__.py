"""Estimate what a run needs before it is submitted: memory and time of every layout.

    shape, GPUs --search--> candidates --memory--> what fits --steptime--> seconds of a step --> table, best first

All of it is arithmetic; nothing here imports torch's distributed parts, Megatron-Core or vLLM.
"""
