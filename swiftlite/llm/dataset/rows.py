"""From arguments to rows: what the flags of data name, found, registered, read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from swiftlite.arguments.base import BaseArguments
from swiftlite.llm.dataset.cache import FACTS_FILE, directory_of, labels_written
from swiftlite.llm.dataset.classes import Labels, problem_of
from swiftlite.llm.dataset.labels import labelled
from swiftlite.llm.dataset.loader import ReadOptions, RowStream, load_dataset
from swiftlite.llm.dataset.preprocess import Row
from swiftlite.llm.dataset.register import register_dataset_info
from swiftlite.llm.dataset.report import DropReport, RejectsFile
from swiftlite.llm.dataset.sources import open_spec, parse_spec
from swiftlite.utils.directories import REJECTS_FILE
from swiftlite.utils.errors import DatasetError, UsageError
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Json, Settings

T = TypeVar("T")
Make = Callable[[list[Row], RejectsFile | None, str], T]  # rows, where unused ones are written, what messages call them


def check_sources(args: BaseArguments) -> None:
    """Find the data without reading rows or asking a hub. Raises: UsageError, DatasetError for what is not there."""
    register_named(args)
    for text in (*args.dataset, *args.val_dataset):
        open_spec(parse_spec(text), use_hf=args.use_hf, hub_token=args.hub_token)
    for flag in ("cached_dataset", "cached_val_dataset"):
        for given in getattr(args, flag):
            if not (directory_of(given)[0] / FACTS_FILE).is_file():
                raise DatasetError(
                    f"--{flag} {given}: has no {FACTS_FILE}; write it with `swiftlite export --to_cached_dataset true`"
                )


def register_named(args: BaseArguments) -> None:
    """Register what --dataset_info names."""
    for file in args.dataset_info:
        register_dataset_info(file)


def settle_labels(args: BaseArguments) -> None:
    """Where rows have labels and nobody says of which kind, take that of the first row, or of tokenised data.

    Raises: UsageError for a model that neither --num_labels nor a head of its own gives classes.
    """
    if not args.reads_labels or args.problem_type is not None:
        return
    if args.num_labels is None:
        raise UsageError("--task_type seq_cls: give the number of classes with --num_labels")
    register_named(args)
    options = ReadOptions(args.columns, args.use_hf, True, 1, args.hub_token, answered=False)
    sources, tokenised = args.dataset or args.val_dataset, args.cached_dataset or args.cached_val_dataset
    rows = RowStream(sources, options) if sources else ()
    written = labels_written(tokenised[0]) if tokenised else None
    args.problem_type = written.problem_type if written else problem_of(args.num_labels, rows)
    get_logger().info("labels: %s (--problem_type)", args.problem_type)


def open_stream(args: BaseArguments, state: Json | None = None) -> RowStream:
    """The training rows one by one, from `state` on."""
    register_named(args)
    return RowStream(
        args.dataset,
        ReadOptions(
            args.columns,
            args.use_hf,
            True,
            1,
            args.hub_token,
            args.model_name,
            args.model_author,
            not args.pools,
            Labels.of(args),
        ),
        interleave_prob=args.interleave_prob or None,
        stopping_strategy=args.stopping_strategy,
        seed=str(args.data_seed),
        state=state,
    )


def read_rows(args: BaseArguments, rejects: RejectsFile | None = None) -> tuple[list[Row], list[Row]]:
    """(training rows, validation rows) in the standard form, see load_dataset. For KTO: see `labelled`."""
    register_named(args)
    train, val = load_dataset(
        args.dataset,
        val_datasets=args.val_dataset,
        split_dataset_ratio=args.split_dataset_ratio,
        num_proc=args.dataset_num_proc,
        interleave_prob=args.interleave_prob or None,
        stopping_strategy=args.stopping_strategy,
        **_reading(args, rejects),
    )
    if "kto" not in (getattr(args, "rlhf_type", None), getattr(args, "template_mode", None)):
        return train, val
    report = DropReport(rejects=rejects)
    parts = labelled(train, report), labelled(val, report)
    report.check(args.max_drop_ratio, "labels")
    return parts


def made_of_rows(args: BaseArguments, make: Make[T]) -> tuple[T, T | None]:
    """(what `make` makes of the training rows, of the validation rows or None). Raises: UsageError without data."""
    if not args.dataset:
        raise UsageError("give the training data with --dataset FILE")
    rejects = rejects_of(args)
    train, val = read_rows(args, rejects)
    return make(train, rejects, "training data"), make(val, rejects, "validation data") if val else None


def rejects_of(args: BaseArguments) -> RejectsFile | None:
    """Where a run writes the rows that it cannot use."""
    writes = args.output_dir and not getattr(args, "skip_train", False)
    return RejectsFile(f"{args.output_dir}/{REJECTS_FILE}") if writes else None


def read_validation_rows(args: BaseArguments, rejects: RejectsFile | None = None) -> list[Row]:
    """Those of --val_dataset alone, for a run whose training rows are streamed."""
    register_named(args)
    return load_dataset(args.val_dataset, **_reading(args, rejects))[0]


def _reading(args: BaseArguments, rejects: RejectsFile | None) -> Settings:
    names = ("columns", "max_drop_ratio", "model_name", "model_author", "use_hf", "hub_token")
    same = {name: getattr(args, name) for name in names}
    return {
        "seed": args.data_seed or 0, "rejects": rejects, "answered": not args.pools, "labels": Labels.of(args),
        "grouped": args.groups, **same,
    }  # fmt: skip
