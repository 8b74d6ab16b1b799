"""Command lines of engines that serve a model: pure functions from arguments to words. No engine is imported.

Flags as of vLLM 0.33 (`vllm serve --help=all`), SGLang 0.5.23 (`sglang serve --help`), transformers 5.24.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from swiftlite.arguments.deploy import DeployArguments
from swiftlite.utils.errors import UsageError

# What vLLM accepts as --max-lora-rank.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

ENGINES = ("vllm", "sglang", "transformers")


@dataclass(frozen=True)
class Served:
    """directory: a Hugging Face model with the chat template that was trained. adapters: name -> PEFT directory, of ranks up
    to max_rank."""

    directory: Path
    name: str
    adapters: Mapping[str, Path] = field(default_factory=dict)
    max_rank: int = 0


def command(engine: str, args: DeployArguments, served: Served) -> list[str]:
    """The words that start a server, without the key of its API."""
    write = {"vllm": vllm_words, "sglang": sglang_words, "transformers": transformers_words}[engine]
    return [*write(args, served), *args.engine_args]


def vllm_words(args: DeployArguments, served: Served) -> list[str]:
    """`vllm serve`; the key comes by VLLM_API_KEY. Raises: UsageError for adapters of a rank that it refuses."""
    words = ["vllm", "serve", str(served.directory), "--served-model-name", served.name, *_address(args)]
    words += _given({"--dtype": _dtype(args), "--max-model-len": args.max_model_len,
                     "--gpu-memory-utilization": args.gpu_memory_utilization})  # fmt: skip
    if args.tensor_parallel_size > 1:
        words += ["--tensor-parallel-size", str(args.tensor_parallel_size)]
    if served.adapters:
        rank = next((rank for rank in _VLLM_RANKS if rank >= served.max_rank), None)
        if rank is None:
            raise UsageError(
                f"--adapters: vllm loads LoRA of ranks up to {_VLLM_RANKS[-1]}; merge it: --merge_lora true"
            )
        words += ["--enable-lora", "--max-lora-rank", str(rank)]
        if len(served.adapters) > 1:
            words += ["--max-loras", str(len(served.adapters))]
        words += ["--lora-modules", *_named(served)]
    words += ["--enforce-eager"] * args.vllm_enforce_eager
    return words + (["--trust-remote-code"] if args.trust_remote_code else [])


def sglang_words(args: DeployArguments, served: Served) -> list[str]:
    """`sglang serve`; the key comes by a file, see key_file."""
    words = [
        "sglang",
        "serve",
        "--model-path",
        str(served.directory),
        "--served-model-name",
        served.name,
        *_address(args),
    ]
    words += _given({"--dtype": _dtype(args), "--context-length": args.max_model_len,
                     "--mem-fraction-static": args.gpu_memory_utilization})  # fmt: skip
    if args.tensor_parallel_size > 1:
        words += ["--tp-size", str(args.tensor_parallel_size)]
    if served.adapters:
        words += ["--enable-lora", "--lora-paths", *_named(served)]
    return words + (["--trust-remote-code"] if args.trust_remote_code else [])


def transformers_words(args: DeployArguments, served: Served) -> list[str]:
    """`transformers serve`, in the directory that holds `served.directory`: clients call the model by its path.

    Raises: UsageError for what its server cannot do.
    """
    if served.adapters:
        raise UsageError(
            f"--adapters {' '.join(served.adapters)}: transformers serves one model; merge one adapter with --merge_lora "
            "true, or use --infer_backend vllm"
        )
    if args.tensor_parallel_size > 1:
        raise UsageError(f"--tensor_parallel_size {args.tensor_parallel_size}: needs --infer_backend vllm or sglang")
    words = ["transformers", "serve", served.name, *_address(args)]
    words += _given({"--dtype": _dtype(args), "--attn-implementation": args.hf_attn_implementation,
                     "--device": args.device_map if isinstance(args.device_map, str) else None})  # fmt: skip
    return words + (["--trust-remote-code"] if args.trust_remote_code else [])


def _address(args: DeployArguments) -> list[str]:
    return ["--host", args.host, "--port", str(args.port)]


def _given(values: Mapping[str, object]) -> list[str]:
    return [word for flag, value in values.items() if value is not None for word in (flag, str(value))]


def _dtype(args: DeployArguments) -> str | None:
    return args.torch_dtype if "torch_dtype" in args.given else None


def _named(served: Served) -> list[str]:
    return [f"{name}={path}" for name, path in served.adapters.items()]


def found(engine: str, path: str | None = None) -> str | None:
    """The engine's program, beside this Python or on the PATH. Several environments may share one machine."""
    beside = shutil.which(engine, path=str(Path(sys.executable).parent))
    return beside or shutil.which(engine, path=path)


def chosen(asked: str | None) -> str:
    """The engine that serves: what was asked for, else the first that is here.

    Raises: UsageError if it is not here, with what to do.
    """
    if asked in (None, "transformers"):
        return next((engine for engine in ENGINES[:2] if asked is None and found(engine)), "transformers")
    if found(str(asked)) is None:
        raise UsageError(
            f"--infer_backend {asked}: is not installed here; pip install {asked}, or add --dry_run true and give the "
            "command that it prints to a machine or container that has it"
        )
    return str(asked)


def key_variables(engine: str, key: str | None) -> dict[str, str]:
    """Environment by which an engine is given the key of its API."""
    return {"VLLM_API_KEY": key} if key and engine == "vllm" else {}


def key_file(directory: Path, key: str) -> Sequence[str]:
    """Words for SGLang, which takes a key from its command line or its config file alone: the file is for its owner only."""
    path = directory / "api_key.yaml"
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(f"api-key: '{key.replace(chr(39), 2 * chr(39))}'\n", encoding="utf-8")
    return "--config", str(path)
