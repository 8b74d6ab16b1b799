"""The precision check: does a converted checkpoint compute what the Hugging Face model computes?

Both models run layer by layer, so memory holds one layer of each. Besides the free run, each Megatron part is also fed
Hugging Face's own input of that part, so that a fault shows in the part that has it and not in all that follow.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from swiftlite.arguments.megatron_export import conversion_arguments
from swiftlite.checkpoint.bind import convert_hf_config
from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.checkpoint.info import read_config
from swiftlite.selftest.precision_hf import Rounding, build_hf, run_hf
from swiftlite.selftest.precision_input import token_ids
from swiftlite.selftest.precision_mcore import Part, relative_error, run_mcore
from swiftlite.utils.directories import find_iteration
from swiftlite.utils.errors import VerifyError
from swiftlite.utils.logger import get_logger
from swiftlite.weights.dcp_file import TorchDistSource
from swiftlite.weights.storage import WeightSource
from swiftlite.weights.torch_dist import slot_of


@dataclass(frozen=True)
class Tolerance:
    """part: relative error (L2) of one part fed the same input. logits: error of the free run, in fp32 the largest
    difference / scale; in lower precision, where one token whose experts tip over moves its logits, the L2 error."""

    part: float
    logits: float


# Chosen from the dtype's rounding: 2^-24, 2^-11, 2^-8 per operation, times the few hundred roundings of a layer.
TOLERANCES = {
    torch.float32: Tolerance(2e-5, 1e-4),
    torch.float16: Tolerance(3e-2, 1e-1),
    torch.bfloat16: Tolerance(1e-1, 3e-1),
}


@dataclass
class PrecisionReport:
    """What the check measured. Differences of logits are absolute; scale is max(1, max |HF logits|)."""

    dtype: torch.dtype
    num_tokens: int
    hf_tensors: int
    hf_parameters: int
    mcore_tensors: int
    mcore_parameters: int
    parts: list[Part] = field(default_factory=list)
    logits_max_diff: float = math.inf
    logits_mean_diff: float = math.inf
    logits_rel_error: float = math.inf
    scale: float = 1.0
    argmax_agreement: float = 0.0

    def compare(self, logits: Tensor, reference: Tensor) -> None:
        """Measure logits [1, S, V] against Hugging Face's."""
        reference = reference.to(logits.device)
        difference = (logits.float() - reference.float()).abs()
        self.scale = max(1.0, float(reference.float().abs().max()))
        self.logits_max_diff = float(difference.max())
        self.logits_mean_diff = float(difference.mean())
        self.logits_rel_error = relative_error(logits, reference)
        self.argmax_agreement = float((logits.argmax(-1) == reference.argmax(-1)).float().mean())

    def fault(self) -> str | None:
        """What is beyond tolerance, the first part first; None if nothing is."""
        tolerance = TOLERANCES[self.dtype]
        for part in self.parts:
            if not part.forced <= tolerance.part:
                return (
                    f"{part.name} is off: relative error {part.forced:.2e} on the same input, allowed "
                    f"{tolerance.part:.0e}"
                )
        if self.dtype != torch.float32:
            if not self.logits_rel_error <= tolerance.logits:
                return f"the logits are off: relative error {self.logits_rel_error:.2e}, allowed {tolerance.logits:.0e}"
        elif not self.logits_max_diff <= tolerance.logits * self.scale:
            return (
                f"the logits are off: largest difference {self.logits_max_diff:.2e}, allowed "
                f"{tolerance.logits:.0e} x scale {self.scale:.1f}"
            )
        return None


@contextmanager
def groups_of_check(hf_dir: Path) -> Iterator[None]:
    """megatron-core's groups for a check that one of several processes makes: all must make them. Collective."""
    from swiftlite.megatron.distributed import parallel_groups

    with parallel_groups(conversion_arguments(convert_hf_config(read_config(hf_dir)), "", torch.float32)):
        yield


def check_precision(
    hf: Checkpoint | Path, mcore_dir: Path, args: object = None, cast_to: torch.dtype | None = None
) -> PrecisionReport:
    """Run both models on one conversation and compare every part and the logits.

    Args: hf: the Hugging Face side, or its directory. mcore_dir: torch_dist checkpoint (root or iteration) whose
        config.json, if it has one, describes it. args: ExportArguments (test_convert_dtype, template,
        trust_remote_code), all optional.
        cast_to: dtype that the conversion wrote; both sides' weights are rounded to it, so that only mistakes differ.
    Raises: VerifyError naming the first part that is off.
    """
    from swiftlite.megatron import backend

    log = get_logger()
    dtype = getattr(torch, getattr(args, "test_convert_dtype", None) or "float32")
    if dtype == torch.float32:  # before CUDA starts: Transformer Engine multiplies fp32 in TF32 otherwise
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    iteration = find_iteration(Path(mcore_dir))
    hf = hf if isinstance(hf, Checkpoint) else Checkpoint.open(hf)
    ids = token_ids(hf.root, args)
    stored = TorchDistSource(iteration)
    sizes = *_size(hf.source, set(hf.source.names) - set(hf.carried)), *_size(stored, stored.names)
    report = PrecisionReport(dtype, ids.shape[1], *sizes)
    log.info(
        "precision check: %d tokens in %s, one layer of each model at a time%s", report.num_tokens, dtype,
        "; Hugging Face's side has the same weights dequantised or merged" if hf.source.decodes else "",
    )  # fmt: skip
    model = build_hf(hf, dtype, getattr(args, "trust_remote_code", False))
    rounding = Rounding(cast_to, {n for e in hf.bound.entries if e.rule.keep_dtype for n in (*e.hf, slot_of(e).key)})
    run = run_hf(model, hf, ids, dtype, backend.setup().device, rounding)
    config_dir = iteration.parent if (iteration.parent / "config.json").is_file() else hf.root
    report.parts, logits = run_mcore(iteration, read_config(config_dir), ids, dtype, run, rounding)
    report.compare(logits, run.logits)
    _log(report)
    fault = report.fault()
    if fault:
        raise VerifyError(
            f"the converted model does not compute what the Hugging Face model computes: {fault}. "
            "The checkpoint is not usable; please report the model type and this line"
        )
    return report


def _size(source: WeightSource, names: Collection[str]) -> tuple[int, int]:
    """Tensors, and numbers in them."""
    return len(names), sum(source.spec(name).numel for name in names)


def _log(report: PrecisionReport) -> None:
    log = get_logger()
    log.info(
        "parameters: Hugging Face %d in %d tensors, Megatron %d in %d", report.hf_parameters, report.hf_tensors,
        report.mcore_parameters, report.mcore_tensors,
    )  # fmt: skip
    for part in report.parts:
        log.info("%-16s relative error %.2e on the same input, %.2e in the free run", part.name, part.forced, part.free)
    log.info(
        "logits: max diff %.2e, mean diff %.2e, relative error %.2e, scale %.1f, argmax agreement %.2f %%",
        report.logits_max_diff, report.logits_mean_diff, report.logits_rel_error, report.scale,
        100 * report.argmax_agreement,
    )  # fmt: skip
