"""`swiftlite env`: what is installed, what a run on this machine uses and why, what is missing for which command."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata, util
from pathlib import Path

from swiftlite import __version__
from swiftlite.arguments.env import EnvArguments
from swiftlite.checkpoint.resolve import as_arguments
from swiftlite.utils.io import existing_parent, format_bytes, probe_disk
from swiftlite.utils.text import one_line
from swiftlite.utils.types import Json

_MEGATRON = ("megatron sft, pt, dpo; precision check", "pip install 'swiftlite[megatron]'")
_SERVER = ("deploy without vLLM or SGLang", "pip install 'swiftlite[serve]'")
# Distribution, module, what needs it, how it is installed.
PACKAGES = (
    ("torch", "torch", "everything", "pip install torch"),
    ("transformers", "transformers", "everything", "pip install transformers"),
    ("accelerate", "accelerate", "sft, pt, dpo", "pip install accelerate"),
    ("peft", "peft", "--train_type lora", "pip install peft"),
    ("datasets", "datasets", "--dataset of a hub", "pip install datasets"),
    ("modelscope", "modelscope", "models and data of ModelScope", "pip install modelscope"),
    ("safetensors", "safetensors", "everything", "pip install safetensors"),
    ("megatron-core", "megatron.core", *_MEGATRON),
    ("psutil", "psutil", *_MEGATRON),
    ("transformer-engine", "transformer_engine", "megatron at full speed, FP8, context parallelism on GPUs",
     "pip install --no-build-isolation 'swiftlite[te]'"),
    ("flash-attn", "flash_attn", "--attn_impl flash_attention_2", "pip install --no-build-isolation flash-attn"),
    ("flash-linear-attention", "fla", "Qwen3.5 and Qwen3-Next at full speed", "pip install flash-linear-attention"),
    ("liger-kernel", "liger_kernel", "--use_liger_kernel true", "pip install liger-kernel"),
    ("bitsandbytes", "bitsandbytes", "--quant_method bnb, 8-bit optimizers", "pip install 'swiftlite[qlora]'"),
    ("transformers", "transformers.cli.serving", *_SERVER),
    ("fastapi", "fastapi", *_SERVER),
    ("uvicorn", "uvicorn", *_SERVER),
    ("openai", "openai", *_SERVER),
    ("vllm", "vllm", "deploy and infer --infer_backend vllm", "pip install vllm"),
    ("sglang", "sglang", "deploy --infer_backend sglang", "pip install sglang"),
    ("rouge-score", "rouge_score", "eval --metrics rouge", "pip install 'swiftlite[eval]'"),
    ("lm-eval", "lm_eval", "eval --eval_backend lm_eval", "pip install 'lm-eval[hf]'"),
    ("plotly", "plotly", "plot --html", "pip install 'swiftlite[html]'"),
    ("mkdocs-material", "material", "make docs, in the source tree", "pip install -e '.[docs]'"),
    ("triton", "triton", "exchanges between two GPUs, gradients of experts", "pip install triton"),
    ("wandb", "wandb", "--report_to wandb", "pip install wandb"),
    ("swanlab", "swanlab", "--report_to swanlab", "pip install swanlab"),
)  # fmt: skip
VARIABLES = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE", "MODELSCOPE_CACHE", "CUDA_VISIBLE_DEVICES", "NPROC_PER_NODE",
             "CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_DEBUG", "NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN",
             "OMP_NUM_THREADS", "SWIFTLITE_CACHE", "SWIFTLITE_LOG_LEVEL")  # fmt: skip


def env_main(args: EnvArguments | Sequence[str]) -> Json:
    """Print the report. Returns: it, as objects of plain JSON."""
    args = as_arguments(EnvArguments, args)
    report: Json = {
        "versions": versions(), "machine": machine(), "GPUs": gpus(), "used": used(), "disks": disks(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "missing": {needs: how for _, module, needs, how in PACKAGES if not _is_there(module)},
    }  # fmt: skip
    if args.json:
        print(json.dumps(report, indent=2))
        return report
    for section, values in report.items():
        print(f"{section}")
        entries = values or {"none": ""}
        width = max(map(len, entries)) + 2
        for name, value in entries.items():
            print(f"  {name:<{width}}{value}")
    return report


def _is_there(module: str) -> bool:
    """Whether a module can be imported, without importing more than the package around it."""
    try:
        return util.find_spec(module) is not None
    except ImportError:  # the package around it
        return False


def versions() -> dict[str, str]:
    found = {"swiftlite": __version__, "python": platform.python_version()}
    for distribution, module, _, _ in PACKAGES:
        if _is_there(module):
            try:
                found[distribution] = metadata.version(distribution)
            except metadata.PackageNotFoundError:
                found[distribution] = "of unknown version"
    return found


def machine() -> dict[str, str]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "system": platform.platform(), "processors": str(os.cpu_count()), "memory": format_bytes(memory),
        "interpreter": sys.executable,
    }  # fmt: skip


def gpus() -> dict[str, str]:
    """Each GPU, the driver, CUDA and NCCL; why there are none."""
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        return {"none": f"torch is built for CUDA {built}, but sees no GPU" if built else "torch is built for CPUs"}
    found = {}
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        found[str(number)] = (
            f"{card.name}, {format_bytes(card.total_memory)}, compute capability {card.major}.{card.minor}"
        )
    driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {**found, "driver": driver.split("\n")[0], "CUDA": str(torch.version.cuda), "NCCL": nccl}


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({one_line(error)})"


def used() -> dict[str, str]:
    """Kernels and switches that a run here takes, and why not the faster ones."""
    import torch

    on_gpu = torch.cuda.is_available()
    found = {
        "transformers' attention": "flash_attention_2 where asked for, else sdpa" if _is_there("flash_attn") else "sdpa"
    }
    if not _is_there("megatron.core"):
        return {**found, "megatron": "no: megatron-core is not installed"}
    from swiftlite.megatron.backend import setup

    backend = setup()
    if backend.spec == "te":
        te = "yes"
    else:
        te = "no: not installed, or cannot be imported" if on_gpu else "no: needs a GPU"
    hopper = on_gpu and torch.cuda.get_device_capability() >= (9, 0)
    return {
        **found, "Megatron": backend.describe(), "Transformer Engine": te,
        "CUDA graphs": "yes" if on_gpu else "no: needs a GPU",
        "grouped products of experts": "torch's, in bf16" if hopper else "no: needs a GPU of compute capability 9.0",
        "megatron-core changed for this machine": ", ".join(backend.shims) or "nothing",
    }  # fmt: skip


def disks() -> dict[str, str]:
    """Free space and speed of the directories that runs write to."""
    home = Path.home() / ".cache"
    places = {
        "here": Path.cwd(), "Hugging Face cache": Path(os.environ.get("HF_HOME", home / "huggingface")),
        "ModelScope cache": Path(os.environ.get("MODELSCOPE_CACHE", home / "modelscope")),
    }  # fmt: skip
    found = {}
    for name, place in places.items():
        free, speed = shutil.disk_usage(existing_parent(place)).free, probe_disk(place, seconds=0.2)
        rate = f"writes {format_bytes(speed.write)}/s" if speed else "cannot be written to"
        found[name] = f"{place}: {format_bytes(free)} free, {rate}"
    return found
