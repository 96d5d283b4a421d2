"""Run one head, or the float64 reference, on request: one process of benchmarks/linear_logprob.py.

python -m benchmarks.worker HEAD|float64 cpu|cuda THREADS

A request is a line of JSON: {"setting": {...}, "repeats": int, "reference": folder, if to be compared}; the answer is
{"rounds": [{...}, ...], "errors": {...}} or {"failed": "why"}. The reference writes what others compare with into the
folder. An untimed step comes first if the shape is new; on CUDA always, because memory is freed after every request.

On the CPU a step's time is wall time and the process's CPU time, over all threads, and its peak is resident memory
(VmHWM) over what the inputs took, with what our head keeps from step to step; on CUDA time is by events and the peak is
allocated memory. Both peaks include the gradients that the step leaves.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.heads import HEADS, Batch, Head, Setting, naive_logp
from megatron_dypo.kernels import workspace

CHUNK = 128  # tokens that the reference takes at a time
ROWS = 4096  # of a gradient, read at a time: the file never takes part in the resident memory
MIB = 2**20


def status_mib(field: str) -> float:
    """Return a field of /proc/self/status, which is in KiB there, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


def timed_cpu(head: Head, batch: Batch) -> tuple[dict[str, float], Tensor | None]:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that is free but resident would hide as much of the step's
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is resident now
    base = status_mib("VmRSS") - workspace.held() / MIB
    wall, cpu = time.perf_counter(), time.process_time()
    logp = head.step(batch)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"cpu_seconds": cpu, "wall_seconds": wall, "peak_mib": status_mib("VmHWM") - base}, logp


def timed_cuda(head: Head, batch: Batch) -> tuple[dict[str, float], Tensor | None]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    logp = head.step(batch)
    end.record()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - base
    return {"cuda_seconds": start.elapsed_time(end) / 1000, "peak_mib": peak / MIB}, logp


def clear_gradients(batch: Batch) -> None:
    batch.hidden_TH.grad = batch.weight_VH.grad = None
    if hasattr(batch.weight_VH, "main_grad"):
        batch.weight_VH.main_grad.zero_()


def difference(got: Tensor, file: Path) -> float:
    """Return ||got - reference|| / ||reference||."""
    squared_difference = squared = 0.0
    with file.open("rb") as stored:
        for rows in got.split(ROWS):
            stored_rows = torch.from_numpy(np.fromfile(stored, dtype=np.float32, count=rows.numel()))
            expected = stored_rows.view(rows.shape).to(rows.device, torch.float64)
            squared_difference += float((rows.double() - expected).square().sum())
            squared += float(expected.square().sum())
    return (squared_difference / squared) ** 0.5


def errors(batch: Batch, logp: Tensor | None, folder: Path) -> dict[str, float]:
    """Return the largest error of an active token's log-prob, and errors of the gradients relative to their norms."""
    weight_grad = getattr(batch.weight_VH, "main_grad", batch.weight_VH.grad)
    if weight_grad is None:
        return {}
    found = {
        "dhidden": difference(batch.hidden_TH.grad, folder / "dhidden"),
        "dweight": difference(weight_grad[: batch.vocab], folder / "dweight"),
    }
    if logp is not None:
        logp_A = logp[batch.active_A] if len(logp) == len(batch.active_T) else logp
        found["logp"] = float(np.abs(logp_A.double().cpu().numpy() - np.fromfile(folder / "logp")).max())
    return found


def write_reference(batch: Batch, folder: Path) -> None:
    """Write log-probs of the active tokens and the gradients, by autograd in float64, as float64 and float32."""
    weight_VH = batch.weight_VH.detach().double().requires_grad_()
    dhidden_TH = torch.zeros_like(batch.hidden_TH, dtype=torch.float64)
    logp = []
    for a in batch.active_A.split(CHUNK):
        hidden_aH = batch.hidden_TH.detach()[a].double().requires_grad_()
        logp_a = naive_logp(hidden_aH, weight_VH, batch.targets_T[a])
        (batch.slopes_T[a] * logp_a).sum().backward()
        dhidden_TH[a] = hidden_aH.grad
        logp.append(logp_a.detach())
    torch.cat(logp).cpu().numpy().tofile(folder / "logp")
    for name, gradient in (("dhidden", dhidden_TH), ("dweight", weight_VH.grad)):
        gradient.float().cpu().numpy().tofile(folder / name)


def answers(name: str, device: str) -> Iterator[dict[str, Any]]:
    """Yield an answer for every request."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    timed = timed_cpu if device == "cpu" else timed_cuda
    made = batch = warm = None
    for line in sys.stdin:
        request = json.loads(line)
        setting = Setting(**request["setting"])
        folder = Path(request["reference"]) if "reference" in request else None
        try:
            if made != setting:
                batch = None
                made, batch = setting, Batch.of(setting, device, dtype)
            shape = (setting.tokens, setting.hidden, setting.vocab)
            if name == "float64":
                write_reference(batch, folder)
                answer = {}
            else:
                answer = run(HEADS[name], batch, timed, shape == warm, request["repeats"], folder)
                warm = shape
        # A peer may fail in any way, and the others go on.
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        if device == "cuda":
            made = batch = warm = None
            gc.collect()
            torch.cuda.empty_cache()
        yield answer


def run(head: Head, batch: Batch, timed, warm: bool, repeats: int, folder: Path | None) -> dict[str, Any]:
    if head.main_grad and batch.weight_VH.is_cuda:
        batch = batch.as_in_megatron()
    answer = {"rounds": []}
    untimed = 0 if warm else 1
    for number in range(untimed + repeats):
        clear_gradients(batch)
        figures, logp = timed(head, batch)
        if number >= untimed:
            answer["rounds"].append(figures)
    if folder is not None and head.comparable:
        answer["errors"] = errors(batch, logp, folder)
    clear_gradients(batch)
    return answer


def main() -> None:
    name, device, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a package prints
    for answer in answers(name, device):
        print(json.dumps(answer), file=channel, flush=True)


if __name__ == "__main__":
    main()
