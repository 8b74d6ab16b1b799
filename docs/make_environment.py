"""Writes docs/environment.md: `python docs/make_environment.py`. A test holds it against the code."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docs/environment.md"

GROUPS = {
    "Processes": {
        "NPROC_PER_NODE": "processes to start on this machine, one for each GPU (default 1)",
        "NNODES": "machines (default 1)",
        "NODE_RANK": "number of this machine, from 0",
        "MASTER_ADDR": "address of the first machine; needed with several",
        "MASTER_PORT": "port there (default 29500 with several machines, else a free one)",
        "OMP_NUM_THREADS": "threads of each process on the CPU (default: the cores, divided)",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "seconds that processes have to save after a signal (default 1800)",
    },
    "swiftlite": {
        "SWIFTLITE_API_KEY": "key that clients of `swiftlite deploy` must give",
        "SWIFTLITE_CACHE": "where tokenised data and models for serving are kept (default ~/.cache/swiftlite)",
        "SWIFTLITE_LOG_LEVEL": "DEBUG, INFO (default), WARNING or ERROR",
    },
    "Read by libraries, shown by `swiftlite env`": {
        "CUDA_VISIBLE_DEVICES": "GPUs that are used",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1 orders communication before computation on GPUs older than Blackwell",
        "HF_ENDPOINT": "address of a mirror of the Hugging Face hub",
        "HF_HOME": "cache of the Hugging Face hub",
        "HF_HUB_OFFLINE": "1: never ask the Hugging Face hub",
        "MODELSCOPE_CACHE": "cache of ModelScope",
        "NCCL_DEBUG": "INFO: which interfaces and algorithms NCCL takes",
        "NVTE_FLASH_ATTN": "1 or 0: Transformer Engine may, or may not, use flash attention; --attention_backend sets it",
        "NVTE_FUSED_ATTN": "the same for cuDNN's attention",
        "NVTE_UNFUSED_ATTN": "the same for attention in plain products",
    },
    "Set by the launcher for each process; a leftover of a cluster's job is an error": {
        "RANK": "number of the process",
        "LOCAL_RANK": "number on its machine",
        "WORLD_SIZE": "processes in all",
        "LOCAL_WORLD_SIZE": "processes on the machine",
        "TORCHELASTIC_RUN_ID": "set by torchrun: this is a worker",
        "SWIFTLITE_PARENT": "the process whose end ends this one",
    },
    "Set by swiftlite, unless you set them": {
        "VLLM_API_KEY": "what `swiftlite deploy` tells vLLM of the key",
        "NVIDIA_TF32_OVERRIDE": "0 during the precision check: products in full fp32",
        "TOKENIZERS_PARALLELISM": "false where several processes tokenise",
        "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1: pickles load data only, never code",
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "taken away for the same reason",
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1: two GPUs exchange without NVLink's multicast",
        "TQDM_DELAY": "libraries' progress bars speak once a minute where nobody watches a terminal",
        "TQDM_MININTERVAL": "the same",
        "TQDM_MAXINTERVAL": "the same",
    },
}
# Names in capitals that the code quotes and that are no variables.
NO_VARIABLES = re.compile(
    r"BLOCK_\w|CAUSAL_LM|F8_\w+|IGNORE_INDEX|SC_\w+|\w+_MAPPING(_NAMES)?|TEMPLATE_CLASSES|SEQ_CLS|FEATURE_EXTRACTION"
)
_QUOTED = re.compile(r"""["'](RANK|NNODES|[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+)["']""")


def names_in_code() -> set[str]:
    """Everything quoted that looks like a variable of the environment."""
    texts = (path.read_text(encoding="utf-8") for path in (ROOT / "swiftlite").rglob("*.py"))
    return {name for text in texts for name in _QUOTED.findall(text) if not NO_VARIABLES.fullmatch(name)}


def page() -> str:
    lines = [
        "# Environment variables",
        "",
        "Written by `python docs/make_environment.py`; a test holds it against the code.",
    ]
    for title, variables in GROUPS.items():
        lines += ["", f"## {title}", "", "| variable | |", "|---|---|"]
        lines += [f"| `{name}` | {text} |" for name, text in variables.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
