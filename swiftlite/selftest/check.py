"""`swiftlite check`: shrinks a model to one of the same shape class, converts it both ways and compares logits.

For a user who meets a new checkpoint: seconds on a CPU, only config.json is read, every trait of the model is kept.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from swiftlite.arguments.export import CheckArguments
from swiftlite.checkpoint.bind import architecture_of
from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.checkpoint.resolve import as_arguments, register_custom
from swiftlite.convert.conversion import Options, convert
from swiftlite.convert.hf import HfTarget
from swiftlite.convert.mcore import McoreTarget
from swiftlite.selftest.shrink import configs_of, model_directory, text_alone, write_random_model
from swiftlite.utils.errors import VerifyError
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Config

if TYPE_CHECKING:
    from swiftlite.selftest.parity import ParityResult

GRADIENT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class CheckResult:
    """logits_error: largest difference of logits / max(1, largest logit), fp32. gradient_error: see there."""

    name: str
    architecture: str
    tensors: int
    logits_error: float
    gradient_error: float
    own_block: str | None
    seconds: float


def check_config(name: str, config: Config, code: Path | None = None) -> CheckResult:
    """Convert a random model of this config, or of its text part alone, there and back and compare logits.

    Args: code: directory whose Python files are the Hugging Face model, trusted; None: transformers or ours.
    Raises: VerifyError if a byte or a logit is off; ConfigError for what cannot be converted.
    """
    from swiftlite.selftest.gradients import gradient_error
    from swiftlite.selftest.precision import check_precision

    started, config = time.time(), text_alone(config)
    with tempfile.TemporaryDirectory() as folder:
        hf, mcore = Path(folder, "hf"), Path(folder, "mcore")
        back = Path(folder, "back")
        write_random_model(config, hf)
        for file in code.glob("*.py") if code else ():
            shutil.copy(file, hf)
        source = Checkpoint.open(hf)
        convert(source, McoreTarget(), mcore, Options(quiet=True))
        convert(Checkpoint.open(mcore), HfTarget(), back, Options(quiet=True))
        if (back / "model.safetensors").read_bytes() != (hf / "model.safetensors").read_bytes():
            raise VerifyError(f"{name}: the way back does not give the same bytes; please report this model type")

        options = SimpleNamespace(test_convert_dtype="float32", trust_remote_code=code is not None)
        report = check_precision(source, mcore, options)
        gradient = gradient_error(hf, code is not None)
        if gradient > GRADIENT_TOLERANCE:
            raise VerifyError(f"{name}: gradients are {gradient:.1e} off, allowed {GRADIENT_TOLERANCE:.0e}")
    return CheckResult(
        name, architecture_of(config), len(source.bound.by_hf), report.logits_max_diff / report.scale, gradient,
        ", ".join(source.family.blocks) or None, time.time() - started,
    )  # fmt: skip


def check_main(args: CheckArguments | Sequence[str]) -> list[CheckResult] | ParityResult:
    """`swiftlite check`. Raises: VerifyError naming the first model and place, or training step, that is off."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    args = as_arguments(CheckArguments, args)
    register_custom(args.custom_register_path)
    if args.parity:
        from swiftlite.selftest.parity import parity

        return parity(args)
    results = []
    directory = model_directory(args)
    code = directory if args.trust_remote_code else None
    for name, config in configs_of(args, directory).items():
        result = check_config(name, config, code)
        results.append(result)
        get_logger().info(
            "%s (%s): %d tensors back bit for bit, logits within %.1e and gradients within %.1e of Hugging Face, %.1f s",
            result.name, result.architecture, result.tensors, result.logits_error, result.gradient_error,
            result.seconds,
        )  # fmt: skip
    return results
