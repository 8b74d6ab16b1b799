"""What megatron-core runs on: the only file that reads versions, CUDA and Transformer Engine.

It owns the device, the collectives, the choice of layer spec and of kernels, and says which shims apply. Nothing happens
at import; `setup()` does everything, once per process.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swiftlite.megatron.cpu import core_modules
from swiftlite.megatron.shims import SHIMS
from swiftlite.utils.dist import get_local_rank
from swiftlite.utils.errors import SwiftliteError
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Settings

logger = get_logger()

TESTED_CORE = ((0, 16), (0, 20))  # first tested release, first untested one


@dataclass(frozen=True)
class Backend:
    """What was found on this machine. `spec` is 'te' or 'local', `collectives` 'nccl' or 'gloo'."""

    device: torch.device
    collectives: str
    spec: str
    core_version: str
    shims: tuple[str, ...]

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def attention(self) -> str:
        """The attention kernel that a forward pass runs, in words."""
        if self.spec == "te":
            return "Transformer Engine"
        return "torch SDPA (causal)"

    def describe(self) -> str:
        """One line for the start of a run."""
        return (
            f"device {self.device}, collectives {self.collectives}, megatron-core {self.core_version}, "
            f"{self.spec} spec, attention {self.attention}"
        )


def _has_transformer_engine() -> bool:
    """True if Transformer Engine can be imported; a broken installation is reported, not hidden."""
    if importlib.util.find_spec("transformer_engine") is None:
        return False
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError) as error:
        logger.warning("Transformer Engine is installed but cannot be imported (%s); using the local spec.", error)
        return False
    return True


@functools.cache
def setup() -> Backend:
    """Find the device, bridge what this megatron-core needs there, and say what was found. Runs once per process.

    Raises: SwiftliteError if megatron-core is missing.
    """
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        raise SwiftliteError("megatron-core is not installed; run: pip install 'swiftlite[megatron]'")
    with warnings.catch_warnings():
        # Apex and Transformer Engine are optional here; the start banner says what is used instead.
        warnings.simplefilter("ignore")
        core = importlib.import_module("megatron.core")
        core_modules()
    version = core.__version__
    release = tuple(int(part) for part in version.split(".")[:2])
    if not TESTED_CORE[0] <= release < TESTED_CORE[1]:
        logger.warning("megatron-core %s is outside the tested range 0.16 to 0.19", version)

    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(get_local_rank() % torch.cuda.device_count())
    use_te = on_cuda and _has_transformer_engine()
    situation = {"cpu": not on_cuda, "te": use_te, "no_te": not use_te, "always": True}
    applied = [shim for shim in SHIMS if situation[shim.needed]]
    for shim in applied:
        shim.apply()
    return Backend(
        device=torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu"),
        collectives="nccl" if on_cuda else "gloo",
        spec="te" if use_te else "local",
        core_version=version,
        shims=tuple(shim.name for shim in applied),
    )


# --------------------------------------------------------------------------------------------------------------------
# Config fields that depend on the machine


@dataclass(frozen=True)
class Adjustment:
    """`field` becomes `value` in a situation ('cpu', 'local', 'no_wgrad_kernel'), because of `reason`."""

    field: str
    value: object
    when: str
    reason: str


ADJUSTMENTS = (
    Adjustment("use_cpu_initialization", True, "cpu", "there is no other device"),
    Adjustment("moe_shared_expert_overlap", False, "cpu", "overlap needs CUDA streams"),
    Adjustment("deallocate_pipeline_outputs", False, "cpu", "gloo reads what is sent until it arrives"),
    Adjustment("tp_comm_overlap", False, "local", "needs Transformer Engine"),
    Adjustment("moe_grouped_gemm", False, "local", "grouped experts need Transformer Engine"),
    Adjustment("moe_permute_fusion", False, "local", "needs Transformer Engine kernels"),
    Adjustment("apply_rope_fusion", False, "local", "needs Transformer Engine kernels"),
    Adjustment("masked_softmax_fusion", False, "local", "SDPA computes the softmax"),
    Adjustment("persist_layer_norm", False, "local", "a kernel choice of Apex"),
    Adjustment("bias_activation_fusion", False, "cpu", "the fused form pays only when compiled"),
    Adjustment("bias_dropout_fusion", False, "cpu", "the fused form pays only when compiled"),
    Adjustment("cross_entropy_loss_fusion", False, "cpu", "the fused form pays only when compiled"),
    Adjustment("gradient_accumulation_fusion", False, "no_wgrad_kernel", "needs Apex's weight gradient kernel"),
)

# What a config holds with Transformer Engine where the arguments leave it open: the same numbers, sooner.
TE_DEFAULTS = {
    "moe_permute_fusion": True,
    "moe_router_fusion": True,
    "batch_p2p_sync": False,  # a way around a fault of old releases of torch
}


def adjust_config(fields: Settings) -> tuple[Settings, list[Adjustment]]:
    """Return `fields` as this machine can run them, and the adjustments that changed something."""
    backend = setup()
    situation = {
        "cpu": not backend.is_cuda,
        "local": backend.spec == "local",
        "no_wgrad_kernel": importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None,
    }
    adjusted = dict(fields)
    changes = []
    for adjustment in ADJUSTMENTS:
        if situation[adjustment.when] and adjusted.get(adjustment.field, adjustment.value) != adjustment.value:
            changes.append(adjustment)
        if situation[adjustment.when]:
            adjusted[adjustment.field] = adjustment.value
    if not situation["local"]:
        if "cross_entropy_loss_fusion" not in adjusted:
            adjusted |= {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "te"}
        for name, value in TE_DEFAULTS.items():
            adjusted.setdefault(name, value)
        if adjusted.get("moe_router_dtype") == "fp64":  # which the fused router does not know
            adjusted["moe_router_fusion"] = False
    keeps_scores = not situation["local"] and getattr(adjusted.get("attention_backend"), "name", "") == "unfused"
    if "core_attn" in (adjusted.get("recompute_modules") or ()) and not keeps_scores:
        # Recomputing SDPA or Transformer Engine's fused attention costs time and saves nothing.
        adjusted["recompute_modules"] = [m for m in adjusted["recompute_modules"] if m != "core_attn"]
        if not adjusted["recompute_modules"] and adjusted.get("recompute_granularity") == "selective":
            adjusted["recompute_granularity"] = None
    return adjusted, changes


# --------------------------------------------------------------------------------------------------------------------
# Attention kernels

_KERNEL_SWITCHES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
_switched: dict[str, str] = {}


@contextlib.contextmanager
def choosing_attention() -> Iterator[None]:
    """Build a model inside, so that its attention kernels are its own choice.

    A GPTModel writes the choice to the environment and refuses to build after a model of this process that chose
    otherwise. What such a model wrote is taken back first; what the user set stays and is checked.
    """
    for name, value in _switched.items():
        if os.environ.get(name) == value:
            del os.environ[name]
    _switched.clear()
    before = {name for name in _KERNEL_SWITCHES if name in os.environ}
    try:
        yield
    finally:
        for name in _KERNEL_SWITCHES:
            if name in os.environ and name not in before:
                if setup().spec == "te":
                    _switched[name] = os.environ[name]
                else:  # nobody reads it, and child processes would inherit it
                    del os.environ[name]


# --------------------------------------------------------------------------------------------------------------------
# Memory and seeds


def synchronize() -> None:
    """Wait for the device, so that a clock read afterwards is honest."""
    if setup().is_cuda:
        torch.cuda.synchronize()


def get_device_rng_state() -> Tensor | None:
    """State of the GPU's generator, None on a CPU (torch's own generator is the one in use there)."""
    return torch.cuda.get_rng_state() if setup().is_cuda else None


def set_device_rng_state(state: Tensor | None) -> None:
    if state is not None and setup().is_cuda:
        torch.cuda.set_rng_state(state)


# --------------------------------------------------------------------------------------------------------------------
# Asynchronous saving


class _ResultsFile:
    """A queue of one item that passes from a forked process to its parent, however large the item is."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def put(self, item: object) -> None:
        self._path.write_bytes(pickle.dumps(item))

    def get_nowait(self) -> object:
        item = pickle.loads(self._path.read_bytes())
        self._path.unlink()
        return item

    get = get_nowait


def async_save_options() -> Settings:
    """For dist_checkpointing.save: megatron-core's own requests; 0.19 asks for those of another package by default."""
    save = importlib.import_module("megatron.core.dist_checkpointing").save
    return {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(save).parameters else {}


@contextlib.contextmanager
def results_in_file(path: Path) -> Iterator[None]:
    """Saves that are planned inside tell their results through a file: another process writes them."""
    writer: Any = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    usual, writer._results_queue = writer._results_queue, _ResultsFile(path)
    try:
        yield
    finally:
        writer._results_queue = usual
