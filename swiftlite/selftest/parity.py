"""`swiftlite check --parity true`: a model trained some steps with transformers and with Megatron, compared step by step.

Both trainers run as they are, one after the other in this process, from the same weights on the same batches.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from swiftlite.arguments.export import CheckArguments
from swiftlite.checkpoint.files import copy_side_files
from swiftlite.checkpoint.info import read_config
from swiftlite.selftest.shrink import model_directory, shrink_config, write_random_model
from swiftlite.utils.errors import VerifyError
from swiftlite.utils.logger import get_logger

logger = get_logger()

TOLERANCE = 1e-5  # relative, fp32
COMPARED = ("loss", "grad_norm", "logps/chosen", "logps/rejected")  # the latter in preference training
SIDES = ("transformers", "megatron")
# What both runs share. With Adam's usual epsilon, gradients that are rounding noise around zero would make whole steps.
SETTINGS = {
    "torch_dtype": "float32", "micro_batch_size": 2, "global_batch_size": 4, "adam_eps": 1e-5, "lora_dropout": 0,
    "truncation_strategy": "left", "logging_steps": 1, "save_strategy": "no", "save_weights_only": "true",
    "report_to": "none",
}  # fmt: skip
LEARNED = 0.25  # share of the first loss that should be gone at the end, so that all steps say something

Line = Mapping[str, float]


@dataclass(frozen=True)
class ParityResult:
    """largest: the largest relative difference of each compared value. fall: of the loss, as a share of the first."""

    steps: int
    largest: Mapping[str, float]
    fall: float


def compare(transformers: Sequence[Line], megatron: Sequence[Line]) -> tuple[str, ParityResult, str | None]:
    """Both sides' log lines, one for each step.

    Returns: a table, what it says, and the first value beyond TOLERANCE in words, None if there is none.
    Raises: VerifyError if the sides did not do the same steps.
    """
    steps = [int(line["step"]) for line in transformers]
    if not steps or steps != [int(line["step"]) for line in megatron]:
        raise VerifyError(f"{len(transformers)} steps with transformers and {len(megatron)} on Megatron; please report")
    names = [name for name in COMPARED if name in transformers[0]]
    largest, first = dict.fromkeys(names, 0.0), None
    heads = [f"{name} {side}" for name in names for side in (*SIDES, "off")]
    rows = [["step", *heads]]
    for step, one, two in zip(steps, transformers, megatron, strict=True):
        rows.append([str(step)])
        for name in names:
            off = abs(two[name] - one[name]) / max(abs(one[name]), 1e-30)
            largest[name] = max(largest[name], off)
            rows[-1] += [f"{one[name]:.8g}", f"{two[name]:.8g}", f"{off:.1e}{' !' if off > TOLERANCE else ''}"]
            if off > TOLERANCE and first is None:
                first = (
                    f"step {step}: {name} {one[name]:.8g} with transformers, {two[name]:.8g} on Megatron, {off:.1e} off"
                )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n" for row in rows
    )
    fall = 1 - transformers[-1]["loss"] / transformers[0]["loss"]
    return table, ParityResult(len(steps), largest, fall), first


@contextmanager
def _quiet() -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def write_shrunken(source: Path, target: Path) -> None:
    """A small random model of the source's shape class with its tokenizer, and so with its whole vocabulary."""
    config = read_config(source)
    kept = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    small = {**shrink_config(config), **{name: config[name] for name in kept if name in config}}
    write_random_model(small, target)
    copy_side_files(source, target, {})
    (target / "config.json").write_text(json.dumps(small, indent=2), encoding="utf-8")


def parity(args: CheckArguments) -> ParityResult:
    """Train on both sides, show the table. Raises: VerifyError naming the first step and value that is off."""
    from swiftlite.llm.train.rlhf import rlhf_main
    from swiftlite.llm.train.sft import sft_main
    from swiftlite.megatron.trainers.rlhf import megatron_rlhf_main
    from swiftlite.megatron.trainers.sft import megatron_sft_main
    from swiftlite.train.plot import read_run

    trainers = (rlhf_main, megatron_rlhf_main) if args.rlhf_type else (sft_main, megatron_sft_main)
    with tempfile.TemporaryDirectory() as folder:
        model = str(args.model)
        if args.shrink:
            source = model_directory(args)
            assert source is not None
            write_shrunken(source, Path(folder) / source.name)
            model = str(Path(folder) / source.name)
        given = {"model_type": args.model_type, "template": args.template, "rlhf_type": args.rlhf_type}
        settings = {
            **SETTINGS, "model": model, "train_type": args.train_type, "train_iters": args.train_iters, "lr": args.lr,
            "max_length": args.max_length, "use_hf": args.use_hf, "trust_remote_code": args.trust_remote_code,
            **{name: value for name, value in given.items() if value is not None},
        }  # fmt: skip
        words = ["--dataset", *args.dataset]
        words += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        curves = []
        for side, main in zip(SIDES, trainers, strict=True):
            logger.info("%d steps on %s", args.train_iters, side)
            output = Path(folder) / side
            with _quiet():
                main([*words, "--output_dir", str(output)])
            curves.append([line for line in read_run(output) if "loss" in line])
    table, result, wrong = compare(*curves)
    sys.stdout.write(table)
    if wrong is not None:
        raise VerifyError(f"{args.model}: {wrong}, allowed {TOLERANCE:.0e}")
    logger.info(
        "%s: %d steps, %s; the loss fell by %.0f %%", args.model, result.steps,
        ", ".join(f"{name} within {off:.1e}" for name, off in result.largest.items()), 100 * result.fall,
    )  # fmt: skip
    if result.fall < LEARNED:
        logger.warning(
            "the loss hardly fell, so a wrong step would show little: raise --lr, or name fewer rows (FILE#8)"
        )
    return result
