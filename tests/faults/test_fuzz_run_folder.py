"""Malformed run folders, checkpoints, recorded rollouts and reports from a fuzzer: one clear line each, no code run."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_dypo.checkpoint.catalog import complete_steps, find_fault, step_folder
from megatron_dypo.checkpoint.io import read_index
from megatron_dypo.config import load_config
from megatron_dypo.config.load import fingerprint
from megatron_dypo.errors import UserError
from megatron_dypo.monitor.metrics_file import MetricsFile
from megatron_dypo.records import Group, Prompt, Response, Teacher
from megatron_dypo.rollout import recording
from tests.faults.mutations import FILE_FAULTS, flipped_bytes, spoil_file, spoilt_bytes, spoilt_trees
from tests.faults.submit import Ready, Submit, bounded, hunt
from tests.launch import copy_task

pytestmark = pytest.mark.slow
STEP = 2


def make_checkpoint(run_dir: Path) -> Path:
    """Write a complete checkpoint of made-up files with a real index."""
    folder = step_folder(run_dir, STEP)
    folder.mkdir(parents=True)
    size = torch.Size([4, 2])
    entry = TensorStorageMetadata(
        TensorProperties(dtype=torch.bfloat16), size, [ChunkStorageMetadata(torch.Size([0, 0]), size)]
    )
    storage = {MetadataIndex("weight", torch.Size([0, 0])): _StorageInfo("__0_0.distcp", 0, 300)}
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({"weight": entry}, storage_data=storage)))
    (folder / "__0_0.distcp").write_bytes(bytes(range(256)) * 2)
    torch.save({"iteration": STEP}, folder / "common.pt")
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (folder / "state.json").write_text('{"step": 2}')
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in folder.iterdir()
    }
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    return folder


def metric_lines() -> list[dict]:
    return [
        {"step": step, "loss/total": 0.5 / (step + 1), "reward/mean": step / 8, "loss/kl": None, "time/step": 0.1}
        for step in range(5)
    ]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """Return a task whose run folder has everything that a resume needs."""
    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_query_groups": 2}
    path = copy_task(tmp_path / "task", rollout__engine="transformers", model__dtype="fp32", model__shape=shape)
    run_dir = path.parent / "run"
    make_checkpoint(run_dir)
    (run_dir / "fingerprint.json").write_text(json.dumps(fingerprint(load_config(path))))
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metric_lines()))
    (run_dir / "config.yaml").write_text(path.read_text())
    (run_dir / "environment.json").write_text('{"python": "3.11"}')
    return path


def as_json(tree: object) -> bytes:
    return json.dumps(tree).encode()


def spoilt(intact: bytes) -> st.SearchStrategy[bytes]:
    """Corrupt a JSON file's content as bytes or as a tree."""
    return st.one_of(spoilt_bytes(intact), spoilt_trees(json.loads(intact)).map(as_json))


def spoilt_lines(lines: list[dict]) -> st.SearchStrategy[bytes]:
    """Corrupt a JSON Lines file's content in the same way."""
    trees = spoilt_trees(lines).map(lambda rows: b"".join(as_json(row) + b"\n" for row in listed(rows)))
    return st.one_of(spoilt_bytes(b"".join(as_json(line) + b"\n" for line in lines)), trees)


def listed(value: object) -> list:
    return value if isinstance(value, list) else [value]


# --- a run folder, as a resume finds it


def resume(submit: Submit, task: Path, name: str) -> bool:
    """Return whether the folder is refused by name; otherwise the run can resume from its checkpoint and metrics."""
    run_dir = task.parent / "run"
    outcome = submit("train", str(task))
    if isinstance(outcome, str):
        assert str(run_dir) in outcome
        return True
    steps = outcome.inputs.checkpoints
    if name != "manifest.json":
        assert steps == [STEP]
    written = run_dir / "metrics.jsonl"
    kept = written.read_bytes() if written.exists() else None
    MetricsFile(written, max(steps, default=0)).close()
    if kept is not None:
        written.write_bytes(kept)
    return False


# The files that a resume reads, and the harmless changes to each: as if it had never existed.
RUN_FILES = {
    "fingerprint.json": ("absent", "dangling"),
    "metrics.jsonl": ("absent", "dangling", "loop", "empty", "forbidden"),
    "checkpoints/step_2/manifest.json": (),
}


@pytest.mark.parametrize("name", RUN_FILES)
def test_malformed_run_folders(submit: Submit, task, fault_record, name):
    path = task.parent / "run" / name
    strategy = spoilt_lines(metric_lines()) if name == "metrics.jsonl" else spoilt(path.read_bytes())

    def refuses(content: bytes) -> bool:
        path.write_bytes(content)
        return resume(submit, task, path.name)

    assert not resume(submit, task, path.name)
    fault_record(f"{hunt(strategy, refuses, 50, 15)} malformed {path.name}")


@pytest.mark.parametrize("name", RUN_FILES)
@pytest.mark.parametrize("how", FILE_FAULTS)
def test_a_file_of_a_run_folder_that_cannot_be_read(submit: Submit, task, name, how):
    spoil_file(task.parent / "run" / name, how)
    assert resume(submit, task, Path(name).name) or how in RUN_FILES[name]


@pytest.mark.parametrize("how", ["folder", "loop", "dangling", "empty"])
@pytest.mark.parametrize("name", [".", "checkpoints", "checkpoints/step_2", ".lock"])
def test_something_else_where_a_folder_belongs(submit: Submit, task, name, how):
    path = task.parent / "run" / name
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(exist_ok=True)
    path.touch()
    spoil_file(path, how)
    outcome = submit("train", str(task))
    assert isinstance(outcome, Ready) or str(task.parent / "run") in outcome


# --- a checkpoint


def fault_of(folder: Path) -> str | None:
    with bounded():
        fault = find_fault(folder)
    assert fault is None or (fault.isprintable() and fault.startswith(f"{folder}/")), fault
    return fault


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "common.pt", "metadata.json", "state.json"])
def test_every_change_of_a_checkpoint_is_found_and_named(tmp_path, fault_record, name):
    path = make_checkpoint(tmp_path) / name
    intact = path.read_bytes()

    def refuses(content: bytes) -> bool:
        path.write_bytes(content)
        fault = fault_of(path.parent)
        assert (fault is None) == (content == intact)
        assert fault is None or str(path) in fault
        assert complete_steps(tmp_path) == ([STEP] if len(content) == len(intact) else [])
        return fault is not None

    assert not refuses(intact)
    damaged = hunt(flipped_bytes(intact), refuses, 10, 10) + hunt(spoilt_bytes(intact), refuses, 25, 18)
    fault_record(f"{damaged} damaged {name}")
    for how in FILE_FAULTS:
        path.unlink(missing_ok=True)
        path.touch()
        spoil_file(path, how)
        assert str(path) in fault_of(path.parent)
        path.rmdir() if path.is_dir() else None


def test_a_malformed_manifest_is_named_and_never_followed_out_of_its_folder(tmp_path, fault_record):
    folder = make_checkpoint(tmp_path)
    path = folder / "manifest.json"
    intact = path.read_bytes()
    secret = tmp_path / "secret"
    secret.write_text("x")
    digest = hashlib.sha256(b"x").hexdigest()

    def refuses(content: bytes) -> bool:
        path.write_bytes(content)
        return fault_of(folder) is not None and isinstance(complete_steps(tmp_path), list)

    fault_record(f"{hunt(spoilt(intact), refuses, 80, 50)} malformed manifests")
    for name in (str(secret), "../../../secret", "..", ".", "", "a/b", "a\0b", "\ud800"):
        tree = json.loads(intact)
        tree["files"][name] = {"bytes": 1, "sha256": digest}
        assert refuses(as_json(tree)) and complete_steps(tmp_path) == []
    tree = json.loads(intact)
    del tree["files"]["state.json"]
    assert refuses(as_json(tree))


def test_files_are_checked_by_name(tmp_path):
    folder = make_checkpoint(tmp_path)
    (folder / "state.json").write_text('{"step": 3}')
    assert find_fault(folder, [".metadata", "common.pt"]) is None
    assert find_fault(folder, []) is None
    assert "checksum" in find_fault(folder, ["common.pt", "state.json"])
    assert "does not list" in find_fault(folder, ["other"])


def test_a_damaged_index_is_refused_or_still_an_index(tmp_path, fault_record):
    path = make_checkpoint(tmp_path) / ".metadata"

    def refuses(content: bytes) -> bool:
        path.write_bytes(content)
        try:
            with bounded():
                read_index(path)
        except UserError as error:
            assert str(error).startswith(f"{path}: ")
            return True
        return False

    assert not refuses(path.read_bytes())
    fault_record(f"{hunt(spoilt_bytes(path.read_bytes()), refuses, 100, 70)} malformed indices")


# --- recorded rollouts


def test_malformed_recorded_rollouts(tmp_path, fault_record):
    prompts = {f"p{i}": Prompt(f"p{i}", "1", (Teacher("a", "x"), Teacher("b", "y")), text="q") for i in range(3)}
    groups = [
        Group(
            prompt,
            prompt_ids=torch.tensor([5, 6], dtype=torch.int32).numpy(),
            responses=[
                Response(torch.tensor([7, 8]).numpy(), torch.tensor([-0.5, -1.0]).numpy(), "stop", float(i), 3)
                for i in range(2)
            ],
            teacher_indices=(0,),
        )
        for prompt in prompts.values()
    ]
    recording.record(tmp_path, 1, groups)
    path = recording.step_file(tmp_path, 1)
    lines = [json.loads(line) for line in path.read_text().splitlines()]

    def refuses(content: bytes) -> bool:
        path.write_bytes(content)
        try:
            with bounded():
                replayed = recording.replay(tmp_path, 1, prompts, 2, vocab_size=100, longest=16)
        except UserError as error:
            assert str(path) in str(error)
            return True
        recording.record(tmp_path / "again", 1, replayed)
        for group in replayed:
            assert group.teacher_indices is None or all(type(i) is int for i in group.teacher_indices)
            assert type(group.weight_version) is int
            for response in group.responses:
                assert response.ids.shape == response.logprobs.shape == (len(response.ids),)
                assert isinstance(response.finish_reason, str)
        return False

    assert not refuses(path.read_bytes())
    fault_record(f"{hunt(spoilt_lines(lines), refuses, 100, 60)} malformed recorded rollouts")


@pytest.mark.parametrize("how", FILE_FAULTS)
def test_recorded_rollouts_that_cannot_be_read(tmp_path, how):
    path = recording.step_file(tmp_path, 1)
    path.touch()
    spoil_file(path, how)
    with pytest.raises(UserError, match=str(path)):
        recording.replay(tmp_path, 1, {}, 2, vocab_size=100, longest=16)


# --- the report


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "environment.json"])
def test_malformed_reports(submit: Submit, task, fault_record, capfd, name):
    run_dir = task.parent / "run"
    path = run_dir / name
    intact = path.read_bytes()
    strategy = spoilt_lines(metric_lines()) if name == "metrics.jsonl" else spoilt_bytes(intact)

    def refuses(content: bytes) -> bool:
        path.write_bytes(content)
        return refused_report(submit, run_dir)

    assert not refuses(intact)
    fault_record(f"{hunt(strategy, refuses, 40, 0)} malformed {name} in a report")


def refused_report(submit: Submit, run_dir: Path) -> bool:
    """Return whether ``report`` is refused with the folder's name; otherwise the page exists."""
    (run_dir / "report.html").unlink(missing_ok=True)
    outcome = submit("report", str(run_dir))
    assert (run_dir / "report.html").is_file() if outcome is None else str(run_dir) in outcome
    return outcome is not None
