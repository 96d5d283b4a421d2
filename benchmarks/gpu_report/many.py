"""Measure two GPUs: layouts over NCCL against one GPU, and a server on the second, whose weights arrive by NCCL (all,
or those that changed) or by CUDA IPC.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from benchmarks.gpu_report.engine import QUICKSTART
from benchmarks.gpu_report.results import Record
from benchmarks.gpu_report.runs import metrics_of
from benchmarks.machine import ROOT
from benchmarks.servers import free_ports, running

LIMITS = {"fp32": 1e-4, "bf16": 2e-2}  # relative, of a loss; sums are taken in another order
SERVER_STEPS = 3
SPARSE = ("optimizer.lr=1e-6", "optimizer.min_lr=0")  # with the quickstart's rate nearly every value changes


@dataclass(frozen=True)
class Layout:
    """A layout to compare with ``preset``'s on one GPU: the configuration's sections ``parallel`` and ``optimizer``."""

    name: str
    preset: str
    parallel: dict
    optimizer: dict

    @property
    def alone(self) -> Layout:
        return Layout("one GPU", self.preset, {}, {})


LAYOUTS = (
    Layout("TP 2, sequence parallel", "tiny", {"tensor": 2, "sequence_parallel": True}, {}),
    Layout("PP 2", "tiny", {"pipeline": 2}, {}),
    Layout("CP 2", "tiny", {"context": 2}, {}),
    Layout("DP 2, distributed optimizer", "tiny", {}, {"distributed": True}),
    Layout("EP 2", "tiny-moe", {"expert": 2}, {}),
)


def losses(layout: Layout, dtype: str, ranks: int) -> list[dict[str, float]]:
    """Return the losses of each step, trained in separate processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "losses.json"
        job = [layout.preset, dtype, json.dumps(layout.parallel), json.dumps(layout.optimizer), str(out)]
        subprocess.run([*_launcher(ranks), "-m", "benchmarks.gpu_report.layout_rank", *job], cwd=ROOT, check=True)
        return json.loads(out.read_text())


def layouts(record: Record) -> None:
    """Compare the layouts; on a CPU only in fp32, over gloo."""
    alone: dict[tuple[str, str], list[dict[str, float]]] = {}
    for dtype in ("fp32", "bf16") if torch.cuda.is_available() else ("fp32",):
        rows = []
        for layout in LAYOUTS[3:] if record.tiny else LAYOUTS:
            place = (layout.preset, dtype)
            if place not in alone:
                alone[place] = losses(layout.alone, dtype, ranks=1)
            found = losses(layout, dtype, ranks=2)
            away = max(
                abs(ours[name] - theirs[name]) / abs(theirs[name])
                for ours, theirs in zip(found, alone[place], strict=True)
                for name in theirs
            )
            record.figure(
                f"{layout.name}/{dtype}", away, "", f"{layout.name}, {dtype}: loss or norm away from one GPU's"
            )
            shown = [f"{each['loss/total']:.6g}" for each in found]
            rows.append([layout.name, ", ".join(shown), ", ".join(f"{x['loss/total']:.6g}" for x in alone[place])])
            if not away <= LIMITS[dtype]:
                record.fail(f"{layout.name}, {dtype}: {away:.2g} away from one GPU's, {LIMITS[dtype]:g} at most")
        record.table(f"Losses of three steps, {dtype}", ["layout", "two GPUs", "one GPU"], rows)


def server(record: Record) -> None:
    """Run the quickstart's first steps, the trainer on the first GPU and its server on the second.

    CUDA IPC shares memory of the server's own GPU, so both GPUs then have a trainer rank.
    """
    way, ranks = record.options["way"], record.options["ranks"]
    with tempfile.TemporaryDirectory(prefix="gpu_report_run_") as name:
        folder, port = Path(name), free_ports(1)
        config, run_dir = folder / "config.yaml", folder / "run"
        config.write_text(QUICKSTART.read_text())
        overrides = [f"trainer.steps={SERVER_STEPS}", f"trainer.run_dir={run_dir}", "trainer.eval_every=0"]
        overrides += ["trainer.save_every=0", "rollout.engine=server", f"rollout.sync_backend={way}"]
        overrides += [f"rollout.servers=[http://127.0.0.1:{port}]"]
        sparse = way == "sparse_nccl"  # there a tensor that is compared is sent whole
        overrides += ["rollout.verify_sync=stored", f"rollout.verify_syncs={SERVER_STEPS + 1 if sparse else 1}"]
        overrides += SPARSE if sparse else ()
        first, second = _devices()
        began = time.time()
        os.environ |= {"CUDA_VISIBLE_DEVICES": second}  # what launch/servers.sh reads
        with running(config, port, 1, *overrides):
            record.figure("start", time.time() - began, "s", "the server's start")
            command = ["-m", "megatron_dypo", "train", str(config), *overrides]
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join([first, second][:ranks])}
            subprocess.run([*_launcher(ranks), *command], cwd=ROOT, env=environment, check=True)
        lines = [line for line in metrics_of(run_dir) if line["step"] > 0]
    record.figure("sync", median(line["time/sync"] for line in lines), "s", f"weight sync by {way}")
    how = "once in these syncs" if sparse else "at each sync"
    record.note(
        f"Every tensor that the server has stored was compared {how} with what was sent (`rollout.verify_sync`)."
    )
    gaps = [line["rollout/mismatch_mean"] for line in lines if line.get("rollout/mismatch_mean") is not None]
    if gaps:  # a policy that starts from noise may have trained on teachers alone
        record.figure("mismatch", max(gaps), "nats", "log-probs of server and policy, mean of the worst step")


def _launcher(ranks: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]


def _devices() -> list[str]:
    """Return the first two GPUs that this process may see."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or "0,1"
    return seen.split(",")[:2]
