"""The samples of a training run, from its arguments."""

from __future__ import annotations

from typing import Any

from swiftlite.llm.dataset import EncodedDataset, load_dataset
from swiftlite.utils.errors import UsageError


def load_data(args: Any, template: Any) -> tuple[EncodedDataset, EncodedDataset | None]:
    """(training set, validation set or None). Raises: UsageError without --dataset; DatasetError for unusable data."""
    if not args.dataset:
        raise UsageError("give the training data with --dataset FILE")
    train_rows, val_rows = load_dataset(
        args.dataset,
        val_datasets=args.val_dataset,
        split_dataset_ratio=args.split_dataset_ratio,
        seed=args.data_seed,
        columns=args.columns,
        num_proc=args.dataset_num_proc,
        max_drop_ratio=args.max_drop_ratio,
        model_name=args.model_name,
        model_author=args.model_author,
    )
    train_set = EncodedDataset(train_rows, template, max_drop_ratio=args.max_drop_ratio, name="training data")
    if not val_rows:
        return train_set, None
    return train_set, EncodedDataset(val_rows, template, max_drop_ratio=args.max_drop_ratio, name="validation data")
