"""The Triton kernels of the head without a GPU: interpreted for results, compiled for resource use.

Results are tested by `triton_interpreted.py`, in a separate process; on a CUDA device by `test_gpu.py`.
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

from megatron_dypo.kernels import linear_logprob, linear_loss, workspace

REGISTERS, SHARED = 64 << 10, 227 << 10  # 32-bit registers and bytes of an H100's multiprocessor
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
    """Return {ptx, sass, registers per thread, shared bytes per program, stack bytes per thread}; fail if ptxas does.

    ``types`` has a type for each argument that is not a constant; one ending in ``%`` is divisible by 16, as are
    pointers.
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

    def dump(option: str) -> str:
        command = [tool, option, tmp_path / "kernel.cubin"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = dump("--dump-resource-usage")
    registers, stack, local = (int(re.search(rf" {name}:(\d+) ", usage).group(1)) for name in ("REG", "STACK", "LOCAL"))
    assert local == 0, usage
    used = {"registers": registers, "shared": compiled.metadata.shared, "stack": stack}
    print(f"{kernel.__name__} {constants}: {used}")
    return used | {"ptx": compiled.asm["ptx"], "sass": dump("-sass")}


@needs_triton
@pytest.mark.parametrize(
    ("online", "keep", "exp_tile"),
    [(False, False, "i32%"), (False, True, "i32%"), (False, True, "i64%"), (True, False, "i32%")],
    ids=["old_pass", "training_pass", "training_pass_i64", "far_rows"],
)
def test_the_fused_product_leaves_room_for_a_second_program(online, keep, exp_tile, tmp_path):
    """bf16 on tensor cores, fed by the copy engine; two programs per multiprocessor, and no spills in the loop.

    ptxas spills to the stack: with Triton 3.6 nothing, with 3.9 two loop invariants of the pass that keeps
    exponentials, read once in 128 columns (and one address, before the loops, in all).
    """
    from megatron_dypo.kernels import triton_fused as fused

    types = {"hidden_desc": f"tensordesc<bf16[{workspace.BLOCK_T}, {fused.BLOCK_H}]>"}
    types |= {"weight_desc": f"tensordesc<bf16[{workspace.BLOCK_V}, {fused.BLOCK_H}]>"}
    types |= {"target_ptr": "*i64", "scale_ptr": "*fp32", "partial_ptr": "*fp32", "exp_ptr": "*bf16", "far_ptr": "*i32"}
    types |= dict.fromkeys(("tokens", "parts", "group", "width", "real", "start"), "i32")
    types |= {"H": "i32%", "exp_pitch": "i32%", "exp_tile": exp_tile}
    constants = {name: getattr(workspace, name) for name in ("PART", "BLOCK_T", "BLOCK_V")}
    constants |= {"BLOCK_H": fused.BLOCK_H, "ONLINE": online, "KEEP": keep}
    used = compile_for_h100(fused.fused_statistics_kernel, types, constants, fused.OPTIONS, tmp_path)
    assert "wgmma.mma_async" in used["ptx"] and "cp.async.bulk.tensor" in used["ptx"]
    assert 2 * used["registers"] * 32 * fused.OPTIONS["num_warps"] <= REGISTERS
    assert 2 * (used["shared"] + 1024) <= SHARED  # including the system's share of each
    assert used["stack"] <= (16 if keep else 8)
    loop = used["sass"][used["sass"].index("HGMMA") : used["sass"].rindex("HGMMA")]
    assert not re.search(r"\b(LDL|STL)\b", loop)
    assert not keep or re.search(r"st\.global[.\w]*\.v4", used["ptx"])


def other_kernels() -> dict[str, tuple]:
    """Return name -> (kernel, constants, options, types of dz, whether it reads 16 bytes at a time)."""
    from megatron_dypo.kernels import triton_fused as fused
    from megatron_dypo.kernels import triton_rows as rows

    join = {"FAR": fused.FAR, "BLOCK_T": workspace.BLOCK_T}
    gradient = {"BLOCK": rows.GRADIENT_BLOCK}
    statistics = (
        rows.row_statistics_kernel,
        {"BLOCK": rows.STATISTICS_BLOCK},
        rows.STATISTICS_OPTIONS,
        ["*fp32"],
        True,
    )
    return {
        "join": (fused.join_kernel, join | {"ONLINE": False}, {}, ["*fp32"], False),
        "join_far": (fused.join_kernel, join | {"ONLINE": True}, {}, ["*fp32"], False),
        "statistics": statistics,
        "gradient": (rows.row_gradient_kernel, gradient | {"ENTROPY": False}, {}, HALVES, True),
        "gradient_with_entropy": (rows.row_gradient_kernel, gradient | {"ENTROPY": True}, {}, HALVES, True),
        "log_factor": (fused.log_factor_kernel, {"BLOCK": fused.GRADIENT_BLOCK}, {}, HALVES, True),
    }


HALVES = ["*bf16", "*fp16", "*fp32"]
OTHERS = ["join", "join_far", "statistics", "gradient", "gradient_with_entropy", "log_factor"]


@needs_triton
@pytest.mark.parametrize("name", OTHERS)
def test_the_other_kernels_compile_without_spills(name, tmp_path):
    kernel, constants, options, outputs, wide = other_kernels()[name]
    numbers = ("tokens", "parts", "group", "width", "real", "start")
    types = dict.fromkeys(numbers, "i32") | {"pitch": "i32%"}
    fp32 = ("partial", "stats", "logp", "miss", "lse", "dlogp", "z", "scale", "lift", "entropy", "dentropy", "slope")
    types |= {f"{pointer}_ptr": "*fp32" for pointer in fp32}
    types |= {"rows_ptr": "*i64", "target_ptr": "*i64", "far_ptr": "*i32"}
    for dtype in outputs:
        used = compile_for_h100(kernel, types | {"dz_ptr": dtype, "exp_ptr": dtype}, constants, options, tmp_path)
        assert used["stack"] == 0 and used["registers"] <= 128 and used["shared"] <= 4096
        assert not wide or re.search(r"ld\.global[.\w]*\.v4", used["ptx"])  # 16 bytes at a time


def test_every_triton_kernel_is_compiled_here():
    """Find the package's kernels by decorator, except for the grouped loss, which `test_grouped_loss.py` compiles."""
    folder = Path(workspace.__file__).parents[1]
    found = {
        name
        for path in folder.rglob("*.py")
        if path.name != "triton_grouped_loss.py"
        for name in re.findall(r"^@triton\.jit.*\ndef (\w+)", path.read_text(), re.MULTILINE)
    }
    called = {"_halves", "_absorb"}  # by the others
    compiled = {
        "fused_statistics_kernel",
        "join_kernel",
        "row_statistics_kernel",
        "row_gradient_kernel",
        "log_factor_kernel",
    }
    assert found == called | compiled


SIZES = {  # tokens of a micro-batch, hidden size, padded vocabulary, tensor-parallel ranks
    "qwen2.5-1.5b": (16384, 1536, 152576, 1),
    "qwen2.5-7b": (32768, 3584, 152576, 1),
    "llama-3-70b": (131072, 8192, 129024, 8),
    "large": (262144, 8192, 262144, 1),
}


@pytest.mark.parametrize("name", SIZES)
def test_numbers_that_kernels_hold_in_32_bits_stay_below_2_to_the_31(name):
    """Rows times pitch, and tiles of exponentials, are computed in 64 bits; these are not."""
    tokens, hidden, vocab, ranks = SIZES[name]
    width, tiles = vocab // 8, 8 // ranks
    kept = workspace.kept_chunk(tokens, width, tiles, 2)
    pitch = workspace.pitch(width)
    blocks = -(-max(kept, workspace.FUSED_CHUNK) // workspace.BLOCK_T)
    parts = -(-width // workspace.PART)
    bounds = {
        "a block's place in exp": workspace.BLOCK_T * tiles * pitch + pitch,
        "programs": blocks * tiles * parts,
        "statistics": 3 * workspace.FUSED_CHUNK,
        "far": tiles * max(kept, workspace.FUSED_CHUNK),
        "a weight's row": (vocab // ranks) + workspace.BLOCK_V,
        "columns of a row": workspace.CHUNK_ELEMENTS // workspace.CHUNK + pitch,
        "hidden": hidden,
    }
    assert {what: size for what, size in bounds.items() if size >= 2**31} == {}
    assert kept % workspace.BLOCK_T == 0 and kept * tiles * pitch * 2 <= max(
        workspace.KEPT_BYTES, workspace.BLOCK_T * tiles * pitch * 2
    )


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
