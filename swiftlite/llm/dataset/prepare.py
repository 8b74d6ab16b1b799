"""From arguments to the datasets of a run; every trainer on either side starts here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from swiftlite.arguments.base import BaseArguments
from swiftlite.arguments.export import ExportArguments
from swiftlite.arguments.preference import DpoArguments
from swiftlite.llm.dataset.cache import (
    directory_of,
    encode_cached,
    load_cached_dataset,
    load_cached_store,
)
from swiftlite.llm.dataset.encoded import EncodedDataset
from swiftlite.llm.dataset.packing import PackedDataset
from swiftlite.llm.dataset.pairs import PairDataset
from swiftlite.llm.dataset.preprocess import Row
from swiftlite.llm.dataset.report import RejectsFile
from swiftlite.llm.dataset.rows import made_of_rows, open_stream, read_rows, read_validation_rows, rejects_of
from swiftlite.llm.dataset.store import facts_of_files
from swiftlite.llm.dataset.streaming import StreamedDataset
from swiftlite.train.order import Data, Samples
from swiftlite.utils.errors import DatasetError, UsageError
from swiftlite.utils.logger import get_logger

if TYPE_CHECKING:
    from swiftlite.llm.template.base import Template

T = TypeVar("T")
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

        def cached(paths: Sequence[str], parts: Sequence[str]) -> Samples | None:
            return load_cached_dataset(paths, template, capacity, parts, args)

        train, val = load_cached(args, cached)
        get_logger().info("%s: %d samples", " ".join(args.cached_dataset), len(train))
        return train, val
    if args.streaming:
        return _streamed(args, template, capacity)
    return made_of_rows(args, lambda rows, rejects, name: encode_and_pack(rows, args, template, rejects, name))


def load_cached(args: BaseArguments, load: Callable[[Sequence[str], Sequence[str]], T | None]) -> tuple[T, T | None]:
    """(training part, validation part or None) of --cached_dataset; a directory of --cached_val_dataset serves as a whole
    without `val`.

    Args: load: (directories, parts of them that serve) -> what is there. Raises: DatasetError without a training part.
    """
    train = load(args.cached_dataset, ("train",))
    if train is None:
        raise DatasetError(f"--cached_dataset {' '.join(args.cached_dataset)}: has no training part")
    if args.cached_val_dataset:
        return train, load(args.cached_val_dataset, ("val", "train"))
    return train, load([str(directory_of(path)[0]) for path in args.cached_dataset], ("val",))


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


def encode(
    rows: list[Row], args: BaseArguments, template: Template, rejects: RejectsFile | None, name: str
) -> EncodedDataset:
    make = encode_cached if args.load_from_cache_file else EncodedDataset
    return make(
        rows, template, max_drop_ratio=args.max_drop_ratio, name=name, num_proc=args.dataset_num_proc, rejects=rejects
    )


def encode_and_pack(
    rows: list[Row], args: BaseArguments, template: Template, rejects: RejectsFile | None, name: str
) -> EncodedDataset | PackedDataset:
    dataset = encode(rows, args, template, rejects, name)
    capacity = packing_capacity(args)
    if capacity is None:
        return dataset
    in_order = args.packing_strategy == "sequential"
    return PackedDataset(dataset, capacity, args.data_seed or 0, name=name, in_order=in_order)


def encode_parts(
    args: ExportArguments, template: Template, rejects: RejectsFile, make: Callable[..., T]
) -> dict[str, T]:
    """`train`, and `val` if there is validation data. make: one of encode, encode_and_pack, make_pairs, make_answers."""
    train_rows, val_rows = read_rows(args, rejects)
    parts = {"train": make(train_rows, args, template, rejects, "training data")}
    if val_rows:
        parts["val"] = make(val_rows, args, template, rejects, "validation data")
    return parts


def _streamed(args: BaseArguments, template: Template, capacity: int | None) -> Data:
    rejects = rejects_of(args)
    files = open_stream(args).files  # names that are wrong are told before the model is built
    val_set = None
    if args.val_dataset:
        val_rows = read_validation_rows(args, rejects)
        val_set = encode_and_pack(val_rows, args, template, rejects, "validation data")
    train_set = StreamedDataset(
        partial(open_stream, args),
        template,
        seed=args.data_seed or 0,
        shuffle=args.dataset_shuffle,
        window=args.shuffle_buffer_size,
        capacity=capacity,
        in_order=args.packing_strategy == "sequential",
        num_proc=args.dataset_num_proc,
        max_drop_ratio=args.max_drop_ratio,
        rejects=rejects,
        facts=facts_of_files(files) if files else None,
    )
    return train_set, val_set


def load_pairs(args: DpoArguments, template: Template) -> tuple[PairDataset, PairDataset | None]:
    """(training pairs, validation pairs or None). Raises: UsageError without data; DatasetError."""
    if not args.dataset and not args.cached_dataset:
        raise UsageError("give the training pairs with --dataset FILE")
    if args.packing:
        template.padding_free = True
    capacity, seed = packing_capacity(args), args.data_seed or 0
    if args.cached_dataset:
        train, val = load_cached(args, lambda paths, parts: load_cached_store(paths, template, "pairs", parts))
        train_set = PairDataset.of(train, capacity, seed, "training data")
        return train_set, PairDataset.of(val, capacity, seed, "validation data") if val else None
    return made_of_rows(args, lambda rows, rejects, name: make_pairs(rows, args, template, rejects, name, capacity))


def make_pairs(
    rows: list[Row],
    args: BaseArguments,
    template: Template,
    rejects: RejectsFile | None,
    name: str,
    capacity: int | None = None,
) -> PairDataset:
    return PairDataset(
        rows, template, capacity=capacity, seed=args.data_seed or 0, max_drop_ratio=args.max_drop_ratio, name=name,
        num_proc=args.dataset_num_proc, rejects=rejects,
    )  # fmt: skip
