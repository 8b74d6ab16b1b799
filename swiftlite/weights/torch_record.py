"""One record of a torch_dist file: what `torch.save` writes of one tensor, a zip archive whose data part is plain bytes.

Where the data of a record lies, and the bytes around it; tensors themselves are moved in stream.py.
"""

from __future__ import annotations

import io
import math
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch

from swiftlite.utils.errors import CheckpointError
from swiftlite.weights.storage import TensorSpec
from swiftlite.weights.unpickle import BoundedUnpickler

if TYPE_CHECKING:
    from typing_extensions import Buffer


def data_offset(file: Path, offset: int, length: int, nbytes: int) -> int:
    """Absolute position of a record's tensor data. Raises: CheckpointError if the record is not one plain tensor."""
    try:
        with file.open("rb") as raw, zipfile.ZipFile(_Window(raw, offset, length)) as archive:
            names = {name.partition("/")[2]: name for name in archive.namelist()}
            if nbytes == 0:
                return offset
            (info,) = (archive.getinfo(name) for part, name in names.items() if re.fullmatch(r"data/\d+", part))
            with archive.open(names["data.pkl"]) as described:
                start = _start_bytes(described.read(_MAX_DESCRIPTION), nbytes)
            if not 0 <= start <= info.file_size - nbytes or info.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(
                    f"{file}: record at {offset} holds {info.file_size} bytes where the metadata says {start + nbytes}"
                )
            raw.seek(offset + info.header_offset)
            header = raw.read(30)
            return (
                offset + info.header_offset + 30 + start
                + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            )  # fmt: skip
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive or pickle fails in any way there is
        raise CheckpointError(f"{file}: the record at byte {offset} is damaged or truncated ({error})") from None


_MAX_DESCRIPTION = 1 << 16  # of one plain tensor; torch.save writes some hundred bytes


class _TensorPickle(BoundedUnpickler):
    """Reads where in its storage a saved tensor starts, from the pickle of a `torch.save` record; runs none of it."""

    def find_class(self, module: str, name: str) -> Callable[..., tuple[object, ...]]:
        return lambda *args: args

    def persistent_load(self, pid: object) -> object:
        return pid


@lru_cache(maxsize=1024)  # by content: the experts of a model all have the same
def _start_bytes(description: bytes, nbytes: int) -> int:
    """Raises: ValueError if `description` is not that of a contiguous tensor of `nbytes` bytes."""
    _, first, size, stride, *_ = _TensorPickle(io.BytesIO(description)).load()
    numel = math.prod(size)
    expected = [math.prod(size[d + 1 :]) for d in range(len(size))]
    if any(s != e and n > 1 for s, e, n in zip(stride, expected, size, strict=True)) or nbytes % max(numel, 1):
        raise ValueError("not a contiguous tensor of the expected size")
    return int(first) * (nbytes // max(int(numel), 1))


class _Window(io.RawIOBase):
    """A part of a file, as a file of its own."""

    def __init__(self, raw: BinaryIO, start: int, length: int) -> None:
        self._raw, self._start = raw, start
        self._length, self._at = length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(self._length - self._at, 0)
        self._raw.seek(self._start + self._at)
        data = self._raw.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data


@dataclass(frozen=True)
class Record:
    """What `torch.save` writes of a tensor, without its data: bytes by position, where the data belongs, the length."""

    written: tuple[tuple[int, bytes], ...]
    data_offset: int
    length: int


class _Sparse(io.RawIOBase):
    """Collects what torch.save writes, leaving out what it seeks over."""

    def __init__(self) -> None:
        self.written: list[tuple[int, bytes]] = []
        self._at = self.end = 0

    def write(self, data: Buffer) -> int:
        data = bytes(data)
        self.written.append((self._at, data))
        self._at += len(data)
        self.end = max(self.end, self._at)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self.end)[whence]
        return self._at

    def tell(self) -> int:
        return self._at


@lru_cache(maxsize=4096)
def record_of(spec: TensorSpec) -> Record:
    """What `torch.save` writes around a tensor of this type and shape."""
    sparse = _Sparse()
    with torch.serialization.skip_data():
        torch.save(torch.empty(spec.shape, dtype=spec.dtype), sparse)  # type: ignore[arg-type]
    merged: list[tuple[int, bytes]] = []
    for position, data in sorted(sparse.written):
        if merged and merged[-1][0] + len(merged[-1][1]) == position:
            merged[-1] = (merged[-1][0], merged[-1][1] + data)
        else:
            merged.append((position, data))
    gap = merged[0][0] + len(merged[0][1]) if spec.nbytes else 0
    assert not spec.nbytes or (len(merged) == 2 and merged[1][0] - gap == spec.nbytes), "unexpected torch.save layout"
    return Record(tuple(merged), gap, sparse.end)
