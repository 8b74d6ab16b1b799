"""What other libraries say that no user of swiftlite can act on: one table, by text and with the reason.

Anything that is not in the table is shown, and with --debug true everything is.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from typing import NamedTuple


class Remark(NamedTuple):
    """A warning's text (a regular expression for its beginning), why it says nothing, the logger where it is a log line."""

    text: str
    reason: str
    logger: str | None = None


_NO_KERNELS = "optional kernels; the banner of a run says what is used instead"
_INSIDE = "a call inside that library, which only its authors can change"
REMARKS = (
    Remark(r"Apex is not installed", _NO_KERNELS),
    Remark(r"Transformer Engine and Apex are not installed", _NO_KERNELS),
    Remark(r"full scope is deprecated. Use empty cuda_graph_scope", "a default of megatron-core's own config"),
    Remark(r"The \.grad attribute of a Tensor that is not a leaf Tensor", "megatron-core's optimizer asks all tensors"),
    Remark(r"`torch\.distributed\.\w+` is deprecated", _INSIDE),
    Remark(r"torch\.distributed\.\w+ is deprecated", _INSIDE),
    Remark(r"TypedStorage is deprecated", _INSIDE),
    Remark(r"`is_gradient_checkpointing` is deprecated", _INSIDE),
    Remark(r"`torch\.jit\.\w+` is (deprecated|not supported)", _INSIDE),
    Remark(r"Grad strides do not match bucket view strides", "speed of DDP's buckets, decided by the model's own layout"),
    Remark(r"grad and param do not obey the gradient layout contract", "the same, in older releases of torch"),
    Remark(r".*[Gg]uessing device ID based on global rank", "ranks and devices are numbered alike here"),
    Remark(r"barrier\(\): using the device under current context", "each process sets its device first"),
    Remark(r"No device id is provided via", "each process sets its device first"),
    Remark(r"Could not find a config file in .* - will assume that the vocabulary", "peft looks for a base's copy on a hub"),
    Remark(r"Unable to fetch remote file due to", "peft looks for a base's copy on a hub"),
    Remark(r"The PEFT config's `base_model_name_or_path` was renamed", "a base may be given by another path or id"),
    Remark(r"WARNING: there is no optimizer on RANK", "nothing there is trained; a run's first lines tell how much is"),
    Remark(r"Overwriting old incomplete / corrupted checkpoint", "files of a save that has begun in a directory of its own",
           "megatron.core.dist_checkpointing.serialization"),
    Remark(r"GPTModel IS DEPRECATED", "the model class that is used here on purpose", "megatron.core.models.gpt.gpt_model"),
)  # fmt: skip


def quiet() -> None:
    """Leave out what REMARKS names; where nobody watches a terminal, let every tqdm bar speak once a minute.

    Call it before tqdm is imported: it reads its defaults from the environment then.
    """
    without_remarks()
    if not sys.stderr.isatty():
        for name in ("TQDM_MININTERVAL", "TQDM_MAXINTERVAL", "TQDM_DELAY"):
            os.environ.setdefault(name, str(BAR_SECONDS))


def without_remarks() -> None:
    """Leave out what REMARKS names."""
    for remark in REMARKS:
        if remark.logger is None:
            warnings.filterwarnings("ignore", message=remark.text)
        else:
            pattern = re.compile(remark.text)
            logging.getLogger(remark.logger).addFilter(lambda record, p=pattern: p.match(record.getMessage()) is None)  # type: ignore[misc]


BAR_SECONDS = 60
