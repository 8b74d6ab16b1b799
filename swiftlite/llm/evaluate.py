"""One model's numbers: the loss by the engine that trains, and how near its answers are to the references."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from swiftlite.arguments.evaluate import EvalArguments
from swiftlite.arguments.infer import InferArguments
from swiftlite.arguments.parser import Arguments, from_dict, given_values, notes, specs
from swiftlite.arguments.preference import DpoArguments
from swiftlite.arguments.train import PtArguments, SftArguments
from swiftlite.llm.answers import answer_rows
from swiftlite.llm.dataset.loader import ReadOptions, read_questions
from swiftlite.llm.dataset.rows import read_validation_rows, register_named
from swiftlite.llm.generate import Generator
from swiftlite.llm.losses import ALL, losses
from swiftlite.llm.scores import scores
from swiftlite.utils.errors import UsageError
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Json

A = TypeVar("A", bound=Arguments)
Results = dict[str, dict[str, float]]  # dataset -> name -> value

_KINDS: dict[str, type[SftArguments]] = {"sft": SftArguments, "pt": PtArguments, "dpo": DpoArguments}
_OWN = ("model", "adapters", "val_dataset", "result_path", "loss_type", "beta", "ref_model", "infer_backend")


def arguments_of(cls: type[A], args: EvalArguments, **more: object) -> A:
    """The arguments of another command, with what was given to this one."""
    taken = {name for name in specs(cls) if name not in notes(cls) and name not in _OWN}
    return from_dict(cls, {**{n: v for n, v in given_values(args).items() if n in taken}, **more})


def evaluate(args: EvalArguments, model: str | None, adapter: Path | None) -> Results:
    """Values of each dataset; with several, `all` has those of all rows together."""
    source: Json = {"model": model, "adapters": [str(adapter)] if adapter else []}
    results: Results = {name: {} for name in (*args.val_dataset, ALL)}
    answered = [name for name in args.metrics if name != "loss"]
    for metric in answered:
        scores(metric, [("", "")])  # what is missing is told before anything is computed
    if "loss" in args.metrics:
        _add(results, trained_losses(args, source))
    if answered:
        _add(results, judged(args, source, answered))
    if len(args.val_dataset) == 1:
        del results[ALL]
    return results


def _add(results: Results, found: Mapping[str, Mapping[str, float]]) -> None:
    for name, values in found.items():
        results[name].update(values)


def trained_losses(args: EvalArguments, source: Json) -> Results:
    """Means as training's evaluation has them, and perplexity: exp(loss).

    Raises: UsageError for pairs without a reference to hold the model to.
    """
    kind = _KINDS[args.objective]
    more: Json = {**source, "micro_batch_size": args.max_batch_size, "global_batch_size": args.max_batch_size}
    if source["adapters"]:
        more["train_type"] = "lora"
    if kind is DpoArguments:
        more |= {"loss_type": args.loss_type, "beta": args.beta, "ref_model": args.ref_model}
    elif kind is PtArguments:
        more["packing"] = False
    asked = arguments_of(kind, args, **more)
    if isinstance(asked, DpoArguments) and asked.has_reference and not asked.adapters and not asked.ref_model:
        raise UsageError(
            f"{asked.model}: --objective dpo compares with a reference; give --ref_model, what it began with"
        )
    data = {}
    for name in args.val_dataset:
        asked.val_dataset = [name]
        data[name] = read_validation_rows(asked)
    found = losses(asked, data)
    if kind is not DpoArguments:
        for values in found.values():
            values["perplexity"] = math.exp(min(values["loss"], 700.0))
    return found


def judged(args: EvalArguments, source: Json, metrics: Sequence[str]) -> Results:
    """Scores of the model's answers to rows that have one themselves; `rows` says to how many."""
    asked = arguments_of(InferArguments, args, **source, temperature=args.temperature or 0.0)
    register_named(asked)
    generator, options = (
        Generator.from_arguments(asked),
        ReadOptions(args.columns, args.use_hf, hub_token=args.hub_token),
    )
    found: Results = {}
    together: list[tuple[str, str]] = []
    for name in args.val_dataset:
        answers = list(answer_rows(generator, read_questions([name], options, args.seed), args.max_batch_size))
        pairs = [(row["response"] or "", row["labels"]) for row in answers if row.get("labels") is not None]
        failed = sum(row["response"] is None for row in answers)
        if failed or len(pairs) < len(answers):
            get_logger().warning(
                "%s: %d of %d rows have no reference answer, %d could not be answered", name, len(answers) - len(pairs),
                len(answers), failed,
            )  # fmt: skip
        found[name] = _scored(metrics, pairs)
        together += pairs
    found[ALL] = _scored(metrics, together)
    return found


def _scored(metrics: Sequence[str], pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Without a score of which no row counts."""
    values: dict[str, float] = {"rows": len(pairs)}
    for metric in metrics:
        values |= {name: value for name, value in scores(metric, pairs).items() if not math.isnan(value)}
    return values
