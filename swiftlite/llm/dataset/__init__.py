"""Data sets: files of any chat format as standard rows, and rows as token ids."""

from swiftlite.llm.dataset.encoded import EncodedDataset
from swiftlite.llm.dataset.loader import load_dataset
from swiftlite.llm.dataset.preprocess import RowError, preprocess
from swiftlite.llm.dataset.report import DropReport

__all__ = ["DropReport", "EncodedDataset", "RowError", "load_dataset", "preprocess"]
