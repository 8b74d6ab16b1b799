"""The samples of a training run, from its arguments."""

from swiftlite.llm.dataset.prepare import load_data

__all__ = ["load_data"]
