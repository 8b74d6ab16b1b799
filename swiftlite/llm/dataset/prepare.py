"""From arguments to the datasets of a run; every trainer on either side starts here."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from swiftlite.arguments.base import BaseArguments
from swiftlite.llm.dataset.cache import FACTS_FILE, encode_cached, load_cached_dataset
from swiftlite.llm.dataset.encoded import EncodedDataset
from swiftlite.llm.dataset.loader import ReadOptions, RowStream, load_dataset
from swiftlite.llm.dataset.packing import PackedDataset
from swiftlite.llm.dataset.preprocess import Row
from swiftlite.llm.dataset.register import register_dataset_info
from swiftlite.llm.dataset.report import RejectsFile
from swiftlite.llm.dataset.sources import open_spec, parse_spec
from swiftlite.llm.dataset.store import facts_of_files
from swiftlite.llm.dataset.streaming import StreamedDataset
from swiftlite.train.order import Data
from swiftlite.utils.directories import REJECTS_FILE
from swiftlite.utils.errors import DatasetError, UsageError
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    from swiftlite.llm.template.base import Template

Dataset = EncodedDataset | PackedDataset | StreamedDataset


def load_data(args: BaseArguments, template: Template) -> Data:
    """(training set, validation set or None): map-style, packed, from a tokenised directory, or streamed.

    A packed set's items are whole sequences; the template then joins rows instead of padding them. Rows that cannot be
    used are written to OUTPUT_DIR/rejects.jsonl.
    Raises: UsageError without data; DatasetError for data that cannot be used.
    """
    if not args.dataset and not args.cached_dataset:
        raise UsageError("give the training data with --dataset FILE")
    if args.packing:
        template.padding_free = True
    capacity = packing_capacity(args)
    if args.cached_dataset:
        directory, _ = _part(args.cached_dataset)
        parts = load_cached_dataset(directory, template, capacity)
        get_logger().info("%s: %d samples", args.cached_dataset, len(parts["train"]))
        if args.cached_val_dataset is None:
            return parts["train"], parts.get("val")
        directory, part = _part(args.cached_val_dataset)
        others = load_cached_dataset(directory, template, capacity)
        return parts["train"], others.get(part or "val", others["train"])
    rejects = RejectsFile(Path(args.output_dir) / REJECTS_FILE) if args.output_dir else None
    if args.streaming:
        return _streamed(args, template, capacity, rejects)
    train_rows, val_rows = read_rows(args, rejects)
    return (
        encode_and_pack(train_rows, args, template, rejects, "training data"),
        encode_and_pack(val_rows, args, template, rejects, "validation data") if val_rows else None,
    )


def check_sources(args: BaseArguments) -> None:
    """Find the data without reading rows or asking a hub. Raises: UsageError, DatasetError for what is not there."""
    register_named(args)
    for text in (*args.dataset, *args.val_dataset):
        open_spec(parse_spec(text), use_hf=args.use_hf, hub_token=args.hub_token)
    for flag in ("cached_dataset", "cached_val_dataset"):
        given = getattr(args, flag)
        if given and not (Path(_part(given)[0]) / FACTS_FILE).is_file():
            raise DatasetError(
                f"--{flag} {given}: has no {FACTS_FILE}; write it with `swiftlite export --to_cached_dataset true`"
            )


def _part(path: str) -> tuple[str, str | None]:
    """(directory of tokenised data, None), or (directory, part) of DIR/train and DIR/val."""
    given = Path(path).expanduser()
    inside = given.name in ("train", "val") and not (given / FACTS_FILE).is_file()
    return (str(given.parent), given.name) if inside else (str(given), None)


def packing_capacity(args: BaseArguments) -> int | None:
    """Tokens of a packed sequence, None without packing.

    Raises: UsageError where samples may be longer than the sequences.
    """
    if not args.packing:
        return None
    capacity = args.packing_length or args.max_length
    if capacity is None or (args.max_length is not None and args.max_length > capacity):
        raise UsageError(
            f"--packing true: sequences of {capacity} tokens must hold samples of --max_length {args.max_length}; give "
            "--packing_length N, at least --max_length"
        )
    return int(capacity)


def register_named(args: BaseArguments) -> None:
    """Register what --dataset_info names."""
    for file in args.dataset_info:
        register_dataset_info(file)


def open_stream(args: BaseArguments, state: Json | None = None) -> RowStream:
    """The training rows one by one, from `state` on."""
    register_named(args)
    return RowStream(
        args.dataset,
        ReadOptions(args.columns, args.use_hf, True, 1, args.hub_token, args.model_name, args.model_author),
        interleave_prob=args.interleave_prob or None,
        stopping_strategy=args.stopping_strategy,
        seed=str(args.data_seed),
        state=state,
    )


def read_rows(args: BaseArguments, rejects: RejectsFile | None = None) -> tuple[list[Row], list[Row]]:
    """(training rows, validation rows) in the standard form, see load_dataset."""
    register_named(args)
    return load_dataset(
        args.dataset,
        val_datasets=args.val_dataset,
        split_dataset_ratio=args.split_dataset_ratio,
        seed=args.data_seed or 0,
        columns=args.columns,
        num_proc=args.dataset_num_proc,
        max_drop_ratio=args.max_drop_ratio,
        model_name=args.model_name,
        model_author=args.model_author,
        use_hf=args.use_hf,
        hub_token=args.hub_token,
        interleave_prob=args.interleave_prob or None,
        stopping_strategy=args.stopping_strategy,
        rejects=rejects,
    )


def encode_and_pack(
    rows: list[Row], args: BaseArguments, template: Template, rejects: RejectsFile | None, name: str
) -> EncodedDataset | PackedDataset:
    make = encode_cached if args.load_from_cache_file else EncodedDataset
    dataset = make(
        rows, template, max_drop_ratio=args.max_drop_ratio, name=name, num_proc=args.dataset_num_proc, rejects=rejects
    )
    capacity = packing_capacity(args)
    return dataset if capacity is None else PackedDataset(dataset, capacity, args.data_seed or 0, name=name)


def _streamed(args: BaseArguments, template: Template, capacity: int | None, rejects: RejectsFile | None) -> Data:
    files = open_stream(args).files  # names that are wrong are told before the model is built
    val_set = None
    if args.val_dataset:
        val_rows, _ = load_dataset(
            args.val_dataset, seed=args.data_seed or 0, columns=args.columns, max_drop_ratio=args.max_drop_ratio,
            model_name=args.model_name, model_author=args.model_author, use_hf=args.use_hf, hub_token=args.hub_token,
            rejects=rejects,
        )  # fmt: skip
        val_set = encode_and_pack(val_rows, args, template, rejects, "validation data")
    train_set = StreamedDataset(
        partial(open_stream, args),
        template,
        seed=args.data_seed or 0,
        shuffle=args.dataset_shuffle,
        window=args.shuffle_buffer_size,
        capacity=capacity,
        num_proc=args.dataset_num_proc,
        max_drop_ratio=args.max_drop_ratio,
        rejects=rejects,
        facts=facts_of_files(files) if files else None,
    )
    return train_set, val_set
