"""Safetensors checkpoints: headers and byte ranges in, header-first files out.

Format: 8 bytes little-endian header length, JSON header, data. Only headers are parsed here; tensors move in stream.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from swiftlite.utils.errors import CheckpointError
from swiftlite.utils.io import blame, is_inside, plain_name, read_json, write_text_atomic
from swiftlite.utils.logger import warn_once
from swiftlite.utils.types import Json
from swiftlite.weights.ops import Shape
from swiftlite.weights.storage import Extent, TensorSpec, WeightSource

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's spec and the place of its bytes."""

    spec: TensorSpec
    file: Path
    offset: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Parse and check one file's header; tensors in the order of their data.

    Raises: CheckpointError if the header is malformed, ranges overlap or leave gaps, or the file has the wrong size.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{path} is not a safetensors file, or is truncated: header length {length}, file size {size}; "
                "download or copy it again"
            )
        text = file.read(length)
    try:
        items = [_parse(name, item) for name, item in json.loads(text).items() if name != "__metadata__"]
    except KeyError as error:
        raise CheckpointError(f"{path}: dtype or field {error} in the header is not supported") from None
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{path}: the header is not valid ({error}); download or copy the file again") from None
    found, position = {}, 0
    for name, dtype, shape, start, stop in sorted(items, key=lambda item: (item[3], item[4])):
        spec = TensorSpec(dtype, shape)
        if start != position or stop - start != spec.nbytes:
            raise CheckpointError(
                f"{path}: bytes {start} to {stop} of {name} overlap, leave a gap or do not fit its shape"
            )
        found[name] = StoredTensor(spec, path, 8 + length + start)
        position = stop
    if 8 + length + position != size:
        raise CheckpointError(
            f"{path} has {size} bytes, its header says {8 + length + position}; it is truncated or damaged, "
            "download or copy it again"
        )
    return found


def _parse(name: str, item: Json) -> tuple[str, torch.dtype, Shape, int, int]:
    """(name, dtype, shape, start, stop) of a header's entry."""
    start, stop = item["data_offsets"]
    numbers = (*item["shape"], start, stop)
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 62 for n in numbers):
        raise ValueError(f"shape {item['shape']}, offsets {item['data_offsets']} of {name}")
    return name, DTYPES[item["dtype"]], tuple(item["shape"]), start, stop


class SafetensorsSource(WeightSource):
    """All tensors of a Hugging Face model directory. Opening it reads the index and the headers, no weights.

    left_out: names in the files that are neither weights nor needed to read them.
    """

    left_out: tuple[str, ...] = ()

    def __init__(self, directory: Path) -> None:
        """Raises: CheckpointError if there is no safetensors file, or a file or name that the index lists is absent."""
        self.directory = directory
        self.tensors: dict[str, StoredTensor] = {}
        for file in self.files:
            if not file.is_file():
                raise CheckpointError(
                    f"{directory / INDEX} lists {file.name}, which is not there; download the missing file"
                )
            if not is_inside(file, directory):
                raise CheckpointError(
                    f"{file} is a link out of its directory, to {os.path.realpath(file)}; give the directory that "
                    "holds the weights, or put the file itself there"
                )
            for name, stored in read_header(file).items():
                if name in self.tensors:
                    raise CheckpointError(f"{name} is stored twice: in {self.tensors[name].file.name} and {file.name}")
                self.tensors[name] = stored
        absent = [name for name, file in self._index.items() if self.tensors.get(name, _NOWHERE).file.name != file]
        if absent:
            raise CheckpointError(
                f"{directory / INDEX} says {absent[0]} is in {self._index[absent[0]]}, but it is not "
                f"({len(absent)} such names); the index and the files do not belong together"
            )

    @cached_property
    def _index(self) -> Mapping[str, str]:
        path, single = self.directory / INDEX, self.directory / SINGLE
        if not path.is_file():
            return {}
        with blame(path):  # damaged is damaged, also where it is not followed
            weight_map: dict[str, str] = read_json(path)["weight_map"]
            if single.is_file():  # which is what transformers reads
                warn_once(f"{single} is read, as transformers does; {path.name} next to it is not")
                return {}
            for file in set(weight_map.values()):
                plain_name(file, path, ".safetensors")
        return weight_map

    @cached_property
    def files(self) -> Sequence[Path]:
        """The shard files, in index order."""
        if self._index:
            return [self.directory / name for name in sorted(set(self._index.values()))]
        single = self.directory / SINGLE
        if single.is_file():
            return [single]
        found = sorted(self.directory.glob("*.safetensors"))
        other = [
            name for name in ("pytorch_model.bin", "pytorch_model.bin.index.json") if (self.directory / name).is_file()
        ]
        if found and other:
            raise CheckpointError(
                f"{self.directory} holds {other[0]}, which transformers reads, and {found[0].name}, which it does not: "
                f"delete one of them, or name the weights {SINGLE}"
            )
        if not found:
            if (self.directory / "latest_checkpointed_iteration.txt").is_file():
                raise CheckpointError(f"{self.directory} is a Megatron checkpoint; give it with --mcore_model")
            other = sorted(p.name for p in self.directory.glob("*.bin"))
            hint = f" (it holds {other[0]}: convert it to safetensors first)" if other else ""
            raise CheckpointError(f"{self.directory} holds no *.safetensors files{hint}; is it a Hugging Face model?")
        return found

    @property
    def names(self) -> Collection[str]:
        return self.tensors

    def spec(self, name: str) -> TensorSpec:
        return self.tensors[name].spec

    def extents(self, name: str, start: int, stop: int) -> Iterator[Extent]:
        stored = self.tensors[name]
        yield Extent(stored.file, stored.offset + start, stop - start)


class PlainTensors(SafetensorsSource):
    """Stored tensors as they are, whatever a source makes of them."""

    def __init__(self, tensors: dict[str, StoredTensor]) -> None:
        self.tensors = tensors


_NOWHERE = StoredTensor(TensorSpec(torch.uint8, ()), Path(), 0)


@dataclass(frozen=True)
class ShardPlan:
    """One output file: its name, header bytes and the absolute offset of each tensor."""

    file: str
    header: bytes
    offsets: Mapping[str, int]
    size: int


def plan_shards(
    specs: Mapping[str, TensorSpec], max_shard_bytes: int, layout: Mapping[str, str] | None = None
) -> list[ShardPlan]:
    """Divide tensors over files, in the given order.

    layout: name -> file of the checkpoint that the tensors came from; kept where it names every tensor.
    """
    groups: list[list[str]] = [[]]
    if layout and set(layout) == set(specs):
        by_name: dict[str, list[str]] = {}
        for name in specs:
            by_name.setdefault(layout[name], []).append(name)
        return [_plan_shard(file, names, specs) for file, names in sorted(by_name.items())]
    used = 0
    for name, spec in specs.items():
        if groups[-1] and used + spec.nbytes > max_shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += spec.nbytes
    if len(groups) == 1:
        return [_plan_shard(SINGLE, groups[0], specs)]
    return [
        _plan_shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", names, specs)
        for i, names in enumerate(groups, start=1)
    ]


def _plan_shard(file: str, names: Iterable[str], specs: Mapping[str, TensorSpec]) -> ShardPlan:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, position = {}, 0
    for name in names:
        spec = specs[name]
        header[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        offsets[name] = position
        position += spec.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return ShardPlan(
        file, len(text).to_bytes(8, "little") + text, {n: start + o for n, o in offsets.items()}, start + position
    )


def places_in(directory: Path, shards: Iterable[ShardPlan]) -> dict[str, tuple[Path, int]]:
    """tensor -> (file, offset of its data)."""
    return {name: (directory / shard.file, offset) for shard in shards for name, offset in shard.offsets.items()}


def create_shards(directory: Path, shards: Iterable[ShardPlan]) -> None:
    """Make the files at their final size with their headers; tensors are then written in place, in any order."""
    for shard in shards:
        with (directory / shard.file).open("wb") as file:
            file.write(shard.header)
            os.truncate(file.fileno(), shard.size)


def write_index(directory: Path, shards: Sequence[ShardPlan], total_bytes: int) -> None:
    """Write the index that names each tensor's file; a single file needs none."""
    if len(shards) == 1 and shards[0].file == SINGLE:
        return
    weight_map = {name: shard.file for shard in shards for name in shard.offsets}
    text = json.dumps(
        {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}, indent=2
    )
    write_text_atomic(directory / INDEX, text + "\n")
