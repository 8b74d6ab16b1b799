"""Where the bytes of tensors lie: specs, extents in files, and the protocol that checkpoints of either format serve.

A tensor is a row-major run of bytes; a source says in which files and at which offsets any part of that run lies.
"""

from __future__ import annotations

import math
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from swiftlite.utils.errors import CheckpointError
from swiftlite.utils.logger import get_logger
from swiftlite.utils.text import some
from swiftlite.weights.ops import Shape


@dataclass(frozen=True)
class TensorSpec:
    """Type and shape of a stored tensor."""

    dtype: torch.dtype
    shape: Shape

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Extent:
    """`size` bytes at `offset` of `file`."""

    file: Path
    offset: int
    size: int


class WeightSource(Protocol):
    """Tensors that can be located byte by byte.

    decodes: values are not what is stored (FP8 weights, an adapter added): `decode` makes them of it.
    """

    decodes: bool = False

    @property
    def names(self) -> Collection[str]:
        """Of all tensors."""

    @property
    def files(self) -> Sequence[Path]:
        """What is read."""

    def spec(self, name: str) -> TensorSpec:
        """Type and shape of `name` as it is stored."""

    def value_dtype(self, name: str) -> torch.dtype:
        """dtype of its values."""
        return self.spec(name).dtype

    def extents(self, name: str, start: int, stop: int) -> Iterator[Extent]:
        """Where bytes [start, stop) of the row-major tensor `name` lie, in order."""

    def read(self, name: str, first: int, out: torch.Tensor, files: Files) -> None:
        """Fill `out`, contiguous and of the stored dtype, with stored elements from element `first` on.

        out: a run [N] that is whole rows or lies within one, or a rectangle [R, C] of the rows. A row is the last
            dimension.
        """
        shape, width = self.spec(name).shape, out.element_size()
        last = (shape[-1] if shape else 1) * width
        start, view = first * width, byte_view(out)
        count, size = (out.shape[0], out.shape[1] * width) if out.dim() == 2 else (1, len(view))
        if count * size == 0:
            return
        extents = list(self.extents(name, start, start + (count - 1) * last + size))
        if len(extents) == 1:
            files.read_lines(extents[0], last, size, view)
            return
        for number in range(count):
            line = start + number * last
            files.read_into(view[number * size : (number + 1) * size], self.extents(name, line, line + size))

    def scattered(self, name: str) -> bool:
        """Whether neighbours in the tensor `name` lie apart in the files, so that reading goes faster in large blocks."""
        return False

    def decode(self, name: str, row: int, column: int, raw: torch.Tensor) -> torch.Tensor:
        """Values of raw [R, C], which are the stored rows from `row` and columns from `column`.

        Rows are runs of the last dimension: those of a tensor [E, A, B] are numbered through.
        """
        return raw


class Wrapped(WeightSource):
    """Another source as it is; what differs is overridden: both `extents` and `read`."""

    def __init__(self, base: WeightSource) -> None:
        self.base = base
        self.decodes = base.decodes

    @property
    def names(self) -> Collection[str]:
        return self.base.names

    @property
    def files(self) -> Sequence[Path]:
        return self.base.files

    def spec(self, name: str) -> TensorSpec:
        return self.base.spec(name)

    def value_dtype(self, name: str) -> torch.dtype:
        return self.base.value_dtype(name)

    def extents(self, name: str, start: int, stop: int) -> Iterator[Extent]:
        return self.base.extents(name, start, stop)

    def read(self, name: str, first: int, out: torch.Tensor, files: Files) -> None:
        self.base.read(name, first, out, files)

    def scattered(self, name: str) -> bool:
        return self.base.scattered(name)

    def decode(self, name: str, row: int, column: int, raw: torch.Tensor) -> torch.Tensor:
        return self.base.decode(name, row, column, raw)


class Renamed(Wrapped):
    """A plain source under other names. stored: name here -> name there."""

    def __init__(self, base: WeightSource, stored: Mapping[str, str]) -> None:
        super().__init__(base)
        self.stored = stored

    @property
    def names(self) -> Collection[str]:
        return self.stored

    def spec(self, name: str) -> TensorSpec:
        return self.base.spec(self.stored[name])

    def value_dtype(self, name: str) -> torch.dtype:
        return self.base.value_dtype(self.stored[name])

    def extents(self, name: str, start: int, stop: int) -> Iterator[Extent]:
        return self.base.extents(self.stored[name], start, stop)

    def read(self, name: str, first: int, out: torch.Tensor, files: Files) -> None:
        self.base.read(self.stored[name], first, out, files)

    def scattered(self, name: str) -> bool:
        return self.base.scattered(self.stored[name])


class Beside(Wrapped):
    """A source, and beside it the tensors of a plain one."""

    def __init__(self, base: WeightSource, other: WeightSource) -> None:
        super().__init__(base)
        self.other = other

    def _of(self, name: str) -> WeightSource:
        return self.other if name in self.other.names else self.base

    @property
    def names(self) -> Collection[str]:
        return {*self.base.names, *self.other.names}

    @property
    def files(self) -> Sequence[Path]:
        return [*self.base.files, *self.other.files]

    def spec(self, name: str) -> TensorSpec:
        return self._of(name).spec(name)

    def value_dtype(self, name: str) -> torch.dtype:
        return self._of(name).value_dtype(name)

    def extents(self, name: str, start: int, stop: int) -> Iterator[Extent]:
        return self._of(name).extents(name, start, stop)

    def read(self, name: str, first: int, out: torch.Tensor, files: Files) -> None:
        self._of(name).read(name, first, out, files)

    def scattered(self, name: str) -> bool:
        return self._of(name).scattered(name)

    def decode(self, name: str, row: int, column: int, raw: torch.Tensor) -> torch.Tensor:
        return self._of(name).decode(name, row, column, raw)


Decode = Callable[[str, int, torch.Tensor], torch.Tensor]


def decoder(source: WeightSource) -> Decode | None:
    """(name, first element, stored elements) -> their values, flat; None where values are what is stored.

    The elements are as `WeightSource.read` gives them.
    """
    if not source.decodes:
        return None
    decode = source.decode

    def values(name: str, first: int, raw: torch.Tensor) -> torch.Tensor:
        shape = source.spec(name).shape
        if len(shape) == 1:
            return decode(name, 0, first, raw.reshape(1, -1)).reshape(-1)
        if not shape:
            return raw
        row, column = divmod(first, shape[-1])
        if raw.dim() == 1:
            raw = raw.view(-1, min(shape[-1], len(raw)))
        assert column + raw.shape[1] <= shape[-1], f"{name}: elements from {first} on are not a rectangle"
        return decode(name, row, column, raw).reshape(-1)

    return values


def overflows(values: torch.Tensor, cast: torch.Tensor) -> bool:
    """Whether finite `values` have become infinite in `cast`, which is them in another dtype."""
    if not cast.is_floating_point() or torch.finfo(cast.dtype).max >= torch.finfo(values.dtype).max:
        return False
    return bool(cast.isinf().any()) and bool((cast.isinf() & values.isfinite()).any())


def check_overflow(names: Iterable[str], dtype: torch.dtype, allow: bool) -> None:
    """Raises: CheckpointError naming the tensors of which finite values became infinite; a warning where `allow`."""
    found = sorted(set(names))
    if not found:
        return
    name = str(dtype).removeprefix("torch.")
    message = f"{some(found, 5)}: finite values are infinite in {name}, which ends at {torch.finfo(dtype).max:.5g}"
    if not allow:
        raise CheckpointError(f"{message}; use --torch_dtype bfloat16 or float32, or --allow_overflow true")
    get_logger().warning("%s", message)


@dataclass(slots=True)
class _Open:
    """A descriptor, and how many threads are using it now: `with` it they do. System errors name the path."""

    fd: int
    path: Path
    writable: bool
    lock: threading.Lock
    users: int = 0
    replaced: bool = False  # by a writable one

    def __enter__(self) -> int:
        return self.fd

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with self.lock:
            self.users -= 1
            if self.replaced and self.users == 0:
                os.close(self.fd)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(self.path)) from error


class Files:
    """Files by path, read and written by position from any thread. A context manager.

    At most MAX_OPEN are open at a time (a quarter of what the process may open): the one unused for longest goes first.
    """

    MAX_OPEN = 256

    def __init__(self) -> None:
        self._open: OrderedDict[Path, _Open] = OrderedDict()
        self._written: set[Path] = set()
        self._lock = threading.Lock()
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._limit = self.MAX_OPEN if soft == resource.RLIM_INFINITY else max(min(self.MAX_OPEN, soft // 4), 8)

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for entry in self._open.values():
            os.close(entry.fd)
        self._open.clear()
        self._written.clear()

    def _using(self, path: Path, writable: bool = False) -> _Open:
        """An open file, for a `with`: the descriptor stays open inside."""
        with self._lock:
            entry = self._open.get(path)
            if entry is not None and (entry.writable or not writable):
                self._open.move_to_end(path)
            else:
                entry = self._open_anew(path, writable, entry)
            entry.users += 1
        return entry

    def _open_anew(self, path: Path, writable: bool, old: _Open | None) -> _Open:
        if old is not None:
            del self._open[path]
            old.replaced = True
            if old.users == 0:
                os.close(old.fd)
        if len(self._open) >= self._limit:
            oldest = next((p for p, e in self._open.items() if e.users == 0), None)
            if oldest is not None:
                os.close(self._open.pop(oldest).fd)
        fd = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        entry = self._open[path] = _Open(fd, path, writable, self._lock)
        if writable:
            self._written.add(path)
        return entry

    def read_into(self, buffer: memoryview, extents: Iterable[Extent]) -> None:
        """Fill `buffer` with the bytes of the extents. Raises: CheckpointError if a file ends too early."""
        for extent in extents:
            done = 0
            with self._using(extent.file) as fd:
                while done < extent.size:
                    count = os.preadv(fd, [buffer[done : extent.size]], extent.offset + done)
                    if count == 0:
                        raise CheckpointError(
                            f"{extent.file} ends at byte {extent.offset + done}, {extent.size - done} bytes too early; "
                            "the file is truncated, download or copy it again"
                        )
                    done += count
            buffer = buffer[extent.size :]

    def read_lines(self, extent: Extent, stride: int, size: int, buffer: memoryview) -> None:
        """Fill `buffer` with runs of `size` bytes, the first at the extent's offset, each `stride` after the last."""
        if stride == size:
            self.read_into(buffer, [extent])
            return
        with self._using(extent.file) as fd:
            for number, done in enumerate(range(0, len(buffer), size)):
                offset = extent.offset + number * stride
                if os.preadv(fd, [buffer[done : done + size]], offset) < size:  # rarely: interrupted, or the end
                    self.read_into(buffer[done : done + size], [Extent(extent.file, offset, size)])

    def write(self, path: Path, offset: int, buffer: memoryview) -> None:
        done = 0
        with self._using(path, writable=True) as fd:
            while done < len(buffer):
                done += os.pwrite(fd, buffer[done:], offset + done)

    def sync(self) -> None:
        """Force everything written to the disk."""
        with self._lock:
            written = sorted(self._written)
        for path in written:
            with self._using(path) as fd:
                os.fsync(fd)

    def forget(self, path: Path) -> None:
        """Drop a file's clean pages from the cache, so that reading it again reads the disk."""
        if hasattr(os, "posix_fadvise"):
            with self._using(path) as fd:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def place_of(source: WeightSource, name: str) -> tuple[str, int]:
    """(file name, offset) of a tensor's first byte, to read many in the order of the files."""
    first = next(source.extents(name, 0, min(source.spec(name).nbytes, 1)), None)
    return (first.file.name, first.offset) if first else ("", 0)


def files_of(source: WeightSource, name: str) -> set[Path]:
    """The file in which a tensor's first byte lies, if it has any."""
    return {extent.file for extent in source.extents(name, 0, 1)} if source.spec(name).numel else set()


def read_tensor(source: WeightSource, name: str, files: Files, rows: tuple[int, int] | None = None) -> torch.Tensor:
    """Read a tensor, or rows [start, stop) of its first dimension."""
    spec = source.spec(name)
    shape = spec.shape
    first = 0
    if rows is not None:
        first = rows[0] * (spec.numel // max(shape[0], 1))
        shape = (rows[1] - rows[0], *shape[1:])
    tensor = torch.empty(shape, dtype=spec.dtype)
    if tensor.numel():
        source.read(name, first, tensor.view(-1), files)
    return tensor


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as bytes, without a copy."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
