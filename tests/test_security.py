"""Outside input is never executed, and secrets never leak."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_dypo.checkpoint.catalog import find_fault
from megatron_dypo.checkpoint.io import TensorPiece, WrittenFile, read_index, write_index, write_pieces
from megatron_dypo.config import load_config
from megatron_dypo.config.schema import walk
from megatron_dypo.data.tokenizer import arithmetic_backend, load_tokenizer
from megatron_dypo.errors import UserError
from megatron_dypo.models.shape import PRESETS
from tests.launch import copy_task
from tests.ranks import run_ranks

REPOSITORY = Path(__file__).resolve().parents[1]
CANARY = "canary0123456789abcdef"


class Evil:
    """Creates a file when unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def trap(tmp_path: Path):
    """Return a path at which Evil creates a folder; none may be there in the end."""
    path = tmp_path / "trap"
    pickle.dumps(Evil(path))
    yield path
    assert not path.exists(), "something from outside was run"


# --- checkpoints

PLACE = TensorPiece("weight", (4, 2), (0, 0), (4, 2), torch.float32)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Return a checkpoint of one tensor, as a run writes it."""
    folder = tmp_path / "step_1"
    folder.mkdir()
    part = write_pieces(folder / "__0_0.distcp", [(PLACE, torch.arange(8.0).reshape(4, 2))])
    write_index(folder, [part], {"step": 1})
    return folder


def read(folder: Path) -> torch.Tensor:
    """Return the tensor, as torch reads it."""
    import torch.distributed.checkpoint as dcp

    state = {"weight": torch.zeros(4, 2)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return state["weight"]


def test_what_a_run_writes_is_let_through(checkpoint):
    assert find_fault(checkpoint) is None
    read_index(checkpoint / ".metadata")
    assert (read(checkpoint) == torch.arange(8.0).reshape(4, 2)).all()


def test_an_index_that_would_run_something_is_refused_and_named(checkpoint, trap):
    path = checkpoint / ".metadata"
    path.write_bytes(pickle.dumps(Evil(trap)))
    with pytest.raises(UserError, match=rf"^{path}: refused: it asks for posix\.mkdir"):
        read_index(path)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_bomb_inside_a_real_index_is_found(checkpoint, trap, protocol):
    path = checkpoint / ".metadata"
    metadata = Metadata({}, planner_data={"key": Evil(trap)}, storage_data={})
    path.write_bytes(pickle.dumps(metadata, protocol=protocol))
    with pytest.raises(UserError, match=r"refused: it asks for (posix\.mkdir|copy_reg\._reconstructor)"):
        read_index(path)


@pytest.mark.parametrize(
    "module, name",
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("os", "system"),
        ("torch", "load"),
        ("torch", "serialization.os.system"),
        ("torch.serialization", "load"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ],
)
def test_a_name_that_is_not_an_indexs_is_refused(checkpoint, module, name):
    path = checkpoint / ".metadata"
    text = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name))
    path.write_bytes(b"\x80\x04" + text + b"\x93.")  # STACK_GLOBAL, which allows dots in the name
    with pytest.raises(UserError, match=f"refused: it asks for {re.escape(f'{module}.{name}')}"):
        read_index(path)


@pytest.mark.parametrize("place", ["/etc/passwd", "../step_2/__0_0.distcp", "..", ""])
def test_an_index_does_not_lead_out_of_its_folder(checkpoint, place):
    path = checkpoint / ".metadata"
    content = path.read_bytes()
    old, new = b"__0_0.distcp", place.encode()
    assert content.count(b"\x8c" + bytes([len(old)]) + old) == 1
    # Without the frame's length, which the change would make wrong.
    framed = content.replace(b"\x8c" + bytes([len(old)]) + old, b"\x8c" + bytes([len(new)]) + new)
    path.write_bytes(framed[:2] + framed[11:])
    with pytest.raises(UserError, match="is not an index of a checkpoint's tensors"):
        read_index(path)


def test_objects_beside_the_tensors_would_be_run_by_torch_and_are_refused(checkpoint, trap, tmp_path):
    """The reason why BytesStorageMetadata is not allowed: torch unpickles such an entry without restriction."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import MetadataIndex

    elsewhere = tmp_path / "shown"
    payload = io.BytesIO()
    torch.save(Evil(elsewhere), payload)
    (checkpoint / "__0_0.distcp").write_bytes(payload.getvalue())
    storage = {MetadataIndex("weight"): _StorageInfo("__0_0.distcp", 0, len(payload.getvalue()))}
    metadata = Metadata({"weight": BytesStorageMetadata()}, storage_data=storage)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="BytesStorageMetadata"):
        read_index(checkpoint / ".metadata")
    dcp.load({"weight": None}, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
    assert elsewhere.exists(), "torch has become safe here: the rule can go"


def test_tensors_are_read_without_running_anything(checkpoint, trap):
    """The index is intact, but in place of the tensor the data file has a pickle that creates a folder."""
    payload = io.BytesIO()
    torch.save({"weight": Evil(trap)}, payload)
    content = payload.getvalue()
    (checkpoint / "__0_0.distcp").write_bytes(content)
    part = WrittenFile("__0_0.distcp", len(content), hashlib.sha256(content).hexdigest(), [(PLACE, 0, len(content))])
    write_index(checkpoint, [part], {"step": 1})
    assert find_fault(checkpoint) is None
    read_index(checkpoint / ".metadata")
    with pytest.raises(BaseException, match="Weights only load failed"):
        read(checkpoint)  # torch's CheckpointException is not an Exception


def load_common(folder: str) -> str:
    """Return how mcore's reading of ``common.pt`` ends."""
    from megatron.core import dist_checkpointing

    try:
        dist_checkpointing.load_common_state_dict(folder)
    except pickle.UnpicklingError as error:
        return str(error)
    return "loaded"


def test_what_is_common_to_all_ranks_is_read_without_running_anything(checkpoint, trap):
    assert run_ranks(1, load_common, str(checkpoint)) == ["loaded"]
    torch.save({"iteration": Evil(trap)}, checkpoint / "common.pt")
    (said,) = run_ranks(1, load_common, str(checkpoint))
    assert "Weights only load failed" in said


# --- Hugging Face folders


@pytest.mark.parametrize("answer", ["y\n", ""])
def test_a_folders_own_code_is_not_run_nor_asked_about(tmp_path, trap, monkeypatch, answer):
    folder = tmp_path / "hf"
    arithmetic_backend().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(PRESETS["tiny"].to_hf_config()))
    tree = json.loads((folder / "tokenizer_config.json").read_text())
    tree |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tree))
    (folder / "mine.py").write_text(f"import os\nos.mkdir({str(trap)!r})\nclass Mine: pass\n")
    config = load_config(copy_task(tmp_path / "task"), [f"model.tokenizer={folder}"])
    asked = io.StringIO(answer)
    monkeypatch.setattr(sys, "stdin", asked)
    with pytest.raises(UserError, match=rf"^model\.tokenizer: {folder}: cannot be loaded: "):
        load_tokenizer(config, PRESETS["tiny"])
    assert asked.tell() == 0


# --- secrets


def complaint(tmp_path: Path, *overrides: str, text: str = "") -> str:
    path = copy_task(tmp_path / "task")
    path.write_text(path.read_text() + text)
    with pytest.raises(UserError) as caught:
        load_config(path, list(overrides))
    assert CANARY not in str(caught.value)
    return str(caught.value)


def test_no_key_holds_a_secret():
    assert not [name for name, _ in walk() if re.search("token$|password|secret|credential|api_?key", name, re.I)]


@pytest.mark.parametrize("name", ["rollout.server_token", "logging.wandb_api_key", "HF_TOKEN", "data.password"])
def test_a_secret_in_the_configuration_is_refused_without_repeating_it(tmp_path, name):
    assert f"{name}: no key holds a secret; it comes from the environment" in complaint(tmp_path, f"{name}={CANARY}")


@pytest.mark.parametrize("name", ["data.train", "model.hf", "rollout.record", "trainer.steps", "nothing.known"])
def test_credentials_in_an_address_are_refused_without_repeating_them(tmp_path, name):
    line = complaint(tmp_path, f"{name}=https://user:{CANARY}@host/file.jsonl")
    assert f"{name}: holds credentials" in line


@pytest.mark.parametrize(
    "override",
    [
        f"logging.wandb={CANARY}",
        f"trainer.steps={CANARY}",
        f"logging={CANARY}",
        f"trainer.seed={{password: {CANARY}}}",
        f"optimizer.betas=[{CANARY}, 1]",
    ],
)
def test_a_value_that_may_be_a_key_to_something_is_not_repeated(tmp_path, override):
    assert override.partition("=")[0] in complaint(tmp_path, override)


@pytest.mark.parametrize("text", [f'api_key: "{CANARY}', f"api_key: {CANARY}: x", f"model: {CANARY}\n"])
def test_text_that_is_not_yaml_is_not_repeated(tmp_path, text):
    assert "not valid YAML: line " in complaint(tmp_path, text=text)


SECRETS = ["WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY"]
SECRETS += ["MEGATRON_DYPO_SERVER_TOKEN", "HTTPS_PROXY"]


def train_among_secrets(config: str, log: str) -> int:
    """Run ``train`` with secrets in the environment; return the exit code. All output goes to ``log``."""
    for name in SECRETS:
        os.environ[name] = f"https://user:{CANARY}@host" if name == "HTTPS_PROXY" else CANARY
    printed = os.open(log, os.O_WRONLY | os.O_CREAT)
    for standard in (1, 2):
        os.dup2(printed, standard)
    from megatron_dypo.cli import main

    return main(["train", config])


@pytest.mark.parametrize("fails", [False, True], ids=["done", "failed"])
def test_secrets_of_the_environment_stay_there(tmp_path, fails):
    """Neither the run folder nor the output repeats them, whether the run succeeds or ends with a traceback."""
    taken = tmp_path / "taken"
    taken.touch()
    options = {"rollout__record": str(taken / "rollouts")} if fails else {"logging__wandb": "offline"}
    steps = {"trainer__steps": 2, "trainer__save_every": 2, "trainer__eval_every": 0}
    config = copy_task(tmp_path / "task", rollout__engine="transformers", logging__tensorboard=True, **options)
    tree = yaml.safe_load(config.read_text())
    tree["trainer"] |= {name.removeprefix("trainer__"): value for name, value in steps.items()}
    config.write_text(yaml.safe_dump(tree))
    log = tmp_path / "log"
    (code,) = run_ranks(1, train_among_secrets, str(config), str(log))
    assert code == (1 if fails else 0), log.read_text()
    files = [path for path in (tmp_path / "task").rglob("*") if path.is_file()]
    if not fails:
        names = {path.name for path in files}
        assert {"config.yaml", "environment.json", "metrics.jsonl", "report.html", "manifest.json"} <= names
        assert any(name.endswith(".wandb") for name in names) and any("tfevents" in name for name in names)
    assert log.stat().st_size > 0
    leaks = [path for path in [*files, log] if CANARY.encode() in path.read_bytes()]
    assert leaks == []


# --- lint keeps it so


UNSAFE = """\
import os
import pickle
import socket
import subprocess

import torch
import yaml

pickle.load(stream)
pickle.loads(content)
pickle.Unpickler(stream).load()
torch.load(path)
yaml.load(text, yaml.Loader)
yaml.unsafe_load(text)
eval(text)
exec(text)
os.system(text)
os.popen(text)
subprocess.run(text, shell=True)
socket.bind(("0.0.0.0", 80))
"""


def test_ruff_refuses_what_would_run_or_expose_something():
    command = [sys.executable, "-m", "ruff", "check", "--output-format", "concise"]
    name = ["--stdin-filename", "megatron_dypo/probe.py", "-"]
    found = subprocess.run([*command, *name], input=UNSAFE, capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    refused = {int(line) for line in re.findall(r"probe\.py:(\d+):\d+: (?:S|TID)\d", found.stdout)}
    assert refused == set(range(9, 21)), found.stdout + found.stderr


def test_nothing_in_the_package_is_exempt():
    sources = [
        *REPOSITORY.glob("megatron_dypo/**/*.py"),
        *REPOSITORY.glob("benchmarks/**/*.py"),
        REPOSITORY / "setup.py",
    ]
    assert len(sources) > 60
    exempt = [path for path in sources if re.search(r"noqa(?!:)|noqa:.*\b(S\d|TID)", path.read_text())]
    assert exempt == []
