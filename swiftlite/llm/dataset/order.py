"""Data order, under its public name; see swiftlite.train.order."""

from swiftlite.train.order import SampleOrder, StreamOrder, order_of, read_data_state, steps_of, write_data_state

__all__ = ["SampleOrder", "StreamOrder", "order_of", "read_data_state", "steps_of", "write_data_state"]
