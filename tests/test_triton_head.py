"""The Triton kernels of the head without a GPU: interpreted for their results, compiled for what they would use.

Results are tested by `triton_interpreted.py`, in a process of its own; on a CUDA device by `test_gpu.py`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_dypo.kernels import linear_logprob, linear_loss

REGISTERS, SHARED = 64 << 10, 227 << 10  # 32-bit registers and bytes of a multiprocessor of an H100
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
def test_results_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(Path(__file__).with_name("triton_interpreted.py"))],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-8000:]


def compile_for_h100(kernel, types: dict[str, str], constants: dict, options: dict, tmp_path: Path) -> dict:
    """{ptx, registers of a thread, shared bytes of a program}; fails if ptxas does, or spills more than an address.

    ``types`` has a type for each argument that is no constant; one ending in ``%`` is divisible by 16, as are pointers.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name].rstrip("%") for name in names}
    divisible = [name for name in names if name not in constants and (types[name][0] == "*" or types[name][-1] == "%")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes), target=GPUTarget("cuda", 90, 32), options=options
    )
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [tool, "--dump-resource-usage", tmp_path / "kernel.cubin"]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf" {name}:(\d+) ", usage).group(1)) for name in ("REG", "STACK", "LOCAL"))
    # What ptxas spills is on the stack. Triton 3.9's leaves one address there, before the loops; 3.6's leaves nothing.
    assert stack <= 8 and local == 0, usage
    print(f"{kernel.__name__} {constants}: {registers} registers, {compiled.metadata.shared} bytes of shared memory")
    return {"ptx": compiled.asm["ptx"], "registers": registers, "shared": compiled.metadata.shared}


@needs_triton
@pytest.mark.parametrize("keep", [False, True])
def test_the_fused_product_leaves_room_for_a_second_program(keep, tmp_path):
    """bf16 on tensor cores, fed by the copy engine; two programs a multiprocessor."""
    from megatron_dypo.kernels import triton_fused as fused

    types = {"hidden_desc": f"tensordesc<bf16[{fused.BLOCK_T}, {fused.BLOCK_H}]>"}
    types |= {"weight_desc": f"tensordesc<bf16[{fused.BLOCK_V}, {fused.BLOCK_H}]>"}
    types |= {
        "target_ptr": "*i64",
        "scale_ptr": "*fp32",
        "partial_ptr": "*fp32",
        "exp_ptr": "*bf16",
        "top_ptr": "*fp32",
    }
    types |= dict.fromkeys(("tokens", "parts", "width", "real", "start"), "i32")
    types |= dict.fromkeys(("H", "exp_tile", "exp_pitch", "top_pitch"), "i32%")
    constants = {name: getattr(fused, name) for name in ("GROUP", "PART", "BLOCK_T", "BLOCK_V", "BLOCK_H")}
    used = compile_for_h100(fused.fused_statistics_kernel, types, constants | {"KEEP": keep}, fused.OPTIONS, tmp_path)
    assert "wgmma.mma_async" in used["ptx"] and "cp.async.bulk.tensor" in used["ptx"]
    assert 2 * used["registers"] * 32 * fused.OPTIONS["num_warps"] <= REGISTERS
    assert 2 * used["shared"] <= SHARED


@needs_triton
@pytest.mark.parametrize("name", ["join", "kept", "statistics", "gradient", "gradient_with_entropy"])
def test_the_other_kernels_compile_without_spills(name, tmp_path):
    from megatron_dypo.kernels import triton_fused as fused
    from megatron_dypo.kernels import triton_rows as rows

    numbers = dict.fromkeys(("tokens", "parts", "active", "width", "start"), "i32")
    numbers |= dict.fromkeys(("pitch", "top_pitch"), "i32%")
    fp32 = ("partial", "stats", "top", "logp", "lse", "slope", "z", "scale", "pull", "entropy", "dentropy")
    types = numbers | {f"{pointer}_ptr": "*fp32" for pointer in fp32}
    types |= {"exp_ptr": "*bf16", "rows_ptr": "*i64", "target_ptr": "*i64"}
    gradient = {"BLOCK": rows.GRADIENT_BLOCK}
    kernel, constants, options = {
        "join": (fused.join_kernel, {"GROUP": fused.GROUP, "BLOCK_T": fused.BLOCK_T}, {}),
        "kept": (fused.kept_gradient_kernel, {"BLOCK_A": fused.GRADIENT_ROWS, "BLOCK_V": fused.BLOCK_V}, {}),
        "statistics": (rows.row_statistics_kernel, {"BLOCK": rows.STATISTICS_BLOCK}, rows.STATISTICS_OPTIONS),
        "gradient": (rows.row_gradient_kernel, gradient | {"ENTROPY": False}, {}),
        "gradient_with_entropy": (rows.row_gradient_kernel, gradient | {"ENTROPY": True}, {}),
    }[name]
    for dtype in ("*bf16",) if name == "kept" else ("*bf16", "*fp32") if "gradient" in name else ("*fp32",):
        used = compile_for_h100(kernel, types | {"dz_ptr": dtype}, constants, options, tmp_path)
        assert name == "join" or re.search(r"ld\.global[.\w]*\.v4", used["ptx"])  # 16 bytes at a time


def test_triton_is_refused_by_name_where_it_cannot_run(monkeypatch):
    arguments = torch.zeros(2, 4), torch.zeros(8, 4), torch.zeros(2).long()
    with pytest.raises(ValueError, match="backend: 'triton' is "):  # "for CUDA", or "not installed"
        linear_logprob(*arguments, backend="triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match="backend: 'triton' is not installed"):
        linear_loss(*arguments, lambda logp, entropy, t: (logp, logp), backend="triton")


def test_the_kernels_do_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None; import torch; from megatron_dypo.kernels import linear_logprob; "
        "print(linear_logprob(torch.zeros(2, 4), torch.zeros(8, 4), torch.zeros(2).long()).logp.exp().tolist())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[0.125, 0.125]"
