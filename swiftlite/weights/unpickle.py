"""The one door for pickles that come with a checkpoint: data comes in, code does not.

`.metadata` of torch_dist checkpoints is read here, against a list of (module, name) pairs. Everything else (common.pt, RNG
states inside .distcp files, optimizer, scheduler, training_args.bin, adapters and models as .bin) is a `torch.save` file,
which torch's own `weights_only` reader guards in the same way; `utils.io.only_data` turns it on for every library.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import types
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch.distributed.checkpoint import Metadata, filesystem

from swiftlite.utils.errors import CheckpointError, reason
from swiftlite.utils.io import only_data

_CHECKPOINT = "torch.distributed.checkpoint."
_STRATEGY = "megatron.core.dist_checkpointing.strategies.torch"
MAX_METADATA_BYTES = 4 << 30  # 130 bytes per chunk and about as much again per writer

ALLOWED = frozenset(
    {
        *((f"{_CHECKPOINT}metadata", name) for name in (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
        *((f"{_CHECKPOINT}planner", name) for name in (
            "SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")),
        (f"{_CHECKPOINT}filesystem", "_StorageInfo"), (f"{_CHECKPOINT}filesystem", "_StoragePrefix"),
        ("torch.serialization", "_get_layout"), ("torch", "Size"), ("torch", "device"),
        *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype | torch.layout)),
        ("collections", "OrderedDict"), ("builtins", "set"), ("pathlib", "PosixPath"), ("pathlib", "Path"),
    }
)  # fmt: skip
STAND_INS = {(_STRATEGY, "MCoreMetadata"), (_STRATEGY, "MCoreSavePlan")}  # of megatron-core 0.15, never looked into


class _StandIn:
    """For records whose class is nothing to us."""


class BoundedUnpickler(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """In Python, ten times slower than in C: what it takes in memory is bounded by the size of what it reads."""

    def load_bytearray8(self) -> None:
        raise pickle.UnpicklingError("a bytearray")  # made at the length that the file gives before it is read

    dispatch = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: load_bytearray8}  # type: ignore[attr-defined,dict-item]


class _Listed:
    """Finds the classes on the list only."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in STAND_INS:
            return _StandIn
        if (module, name) not in ALLOWED:
            raise CheckpointError(f"refers to {module}.{name}, which no Megatron checkpoint does; refusing to load it")
        return super().find_class(module, name)  # type: ignore[misc]


class _Fast(_Listed, pickle.Unpickler):
    """In C. A few bytes that number the memo themselves can make it ask for any amount of memory: see `_is_plain`."""


class _Careful(_Listed, BoundedUnpickler):
    """For all other pickles."""


# Opcodes of protocol 4 that read nothing, or a number: none of them numbers the memo, makes room for a length that the
# file gives, or calls for an object from outside. Those with a length of one byte: short text, short integer.
_PLAIN = re.compile(
    rb"(?s:[()0Nabestu}\]R\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x93\x94]|[Kh\x80].|M..|[Jj]....|[G\x95].{8})*+"
)
_SHORT = b"\x8c\x8a"


def _is_plain(data: bytes) -> bool:
    """Does a pickle consist of such opcodes only, from the first byte to the last?"""
    at = 0
    while True:
        match = _PLAIN.match(data, at)
        assert match is not None  # it may be empty
        at = match.end()
        if at + 1 >= len(data) or data[at] not in _SHORT:
            return data[at:] == pickle.STOP
        at += 2 + data[at + 1]


def read_metadata(file: BinaryIO, path: str | os.PathLike[str]) -> Metadata:
    """The object in an open `.metadata` file. Raises: CheckpointError naming `path` for whatever is wrong with it."""
    directory = Path(path).parent
    data = file.read(MAX_METADATA_BYTES + 1)
    if len(data) > MAX_METADATA_BYTES:
        raise CheckpointError(f"{path} is too large for what it should hold; copy the checkpoint again")
    try:
        metadata: Metadata = (_Fast if _is_plain(data) else _Careful)(io.BytesIO(data)).load()
        return metadata
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from None
    except Exception as error:  # a damaged pickle fails in any way there is
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read ({reason}); is {directory} a complete torch_dist checkpoint?"
        ) from None


# Arrays, in which numpy's random generator is saved.
_NUMPY = [np._core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]  # type: ignore[attr-defined]


def check_saved(file: BinaryIO | str | os.PathLike[str], path: object) -> None:
    """Build what a `torch.save` file holds, as data; numbers stay in the file where `file` is a path.

    Raises: CheckpointError naming `path` for one that asks for code, or is damaged.
    """
    mapped = isinstance(file, str | os.PathLike)
    try:
        with torch.serialization.safe_globals(_NUMPY):
            torch.load(file, map_location="cpu", weights_only=True, mmap=mapped or None)
    except Exception as error:  # a damaged file fails in any way there is
        raise CheckpointError(f"{path} {reason(error)}") from None


def guard_checkpoint_reader() -> None:
    """Let torch.distributed.checkpoint, and megatron-core through it, read `.metadata` and objects by this door."""
    door = types.SimpleNamespace(**vars(pickle))
    door.load = lambda file: read_metadata(file, getattr(file, "name", ".metadata"))
    filesystem.pickle = door  # type: ignore[assignment,attr-defined]
    only_data()
