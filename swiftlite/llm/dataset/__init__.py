"""Datasets: rows of any chat format from files and hubs, and rows as token ids: encoded, packed, streamed, cached."""

from swiftlite.llm.dataset.encoded import EncodedDataset
from swiftlite.llm.dataset.loader import load_dataset
from swiftlite.llm.dataset.packing import PackedDataset
from swiftlite.llm.dataset.preprocess import RowError, preprocess
from swiftlite.llm.dataset.register import DATASET_MAPPING, register_dataset, register_dataset_info
from swiftlite.llm.dataset.report import DropReport
from swiftlite.llm.dataset.streaming import StreamedDataset

__all__ = [
    "DATASET_MAPPING",
    "DropReport",
    "EncodedDataset",
    "PackedDataset",
    "RowError",
    "StreamedDataset",
    "load_dataset",
    "preprocess",
    "register_dataset",
    "register_dataset_info",
]
