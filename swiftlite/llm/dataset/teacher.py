"""What a teacher thinks of the answers of a dataset, on disk: written sample by sample, found again by the tokens.

A directory has TEACHER_FILE (what the numbers are), `index.bin` (int64 [samples, 2]: key, end of its positions) and, of all
positions end to end, `ids.bin` (int32 [N, K]), `log_probs.bin` (float16 or float32 [N, K]), `rest.bin` (float32 [N]).
N: positions with a label, K: tokens that are kept of each.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from swiftlite.llm.dataset.cache import hash_of
from swiftlite.llm.dataset.store import facts_of_files
from swiftlite.llm.template.collate import IGNORE_INDEX, join_rows, sample_lengths
from swiftlite.train.distill_loss import Top
from swiftlite.train.questions import question_bytes
from swiftlite.utils.directories import TEACHER_FILE
from swiftlite.utils.errors import DatasetError
from swiftlite.utils.io import read_json, write_json
from swiftlite.utils.types import Json

_INDEX = "index.bin"
_SECONDS = 30  # between two times that everything is forced to the disk


def vocabulary_hash(vocabulary: Mapping[str, int]) -> str:
    """Of a tokenizer's tokens and their ids."""
    return hash_of([json.dumps(dict(vocabulary), sort_keys=True)])


def answered(sample: Json) -> list[int]:
    """Places of a sample's tokens that have a label; nothing predicts the first one."""
    return [t for t, label in enumerate(sample["labels"]) if t and label != IGNORE_INDEX]


def key_of(sample: Json) -> int:
    """An int64 that tokens and labels decide."""
    import xxhash

    same = {"input_ids": sample["input_ids"], "labels": [IGNORE_INDEX, *sample["labels"][1:]]}
    return int(xxhash.xxh3_64_intdigest(question_bytes(same))) - 2**63


def samples_of_row(row: Json) -> Iterator[Json]:
    """The samples of a row, which may be a packed sequence; not those that nothing is asked about."""
    begin = 0
    for length in sample_lengths(row):
        sample = {name: row[name][begin : begin + length] for name in ("input_ids", "labels")}
        begin += length
        if answered(sample):
            yield sample


def weights_of_labels(row: Json) -> list[float]:
    """Loss weights of a row's labels, in the order that TeacherLogits.of has them in."""
    labels, weights = join_rows([row])["labels"], row.get("loss_scale")
    return [1.0 if weights is None else weights[t] for t, label in enumerate(labels) if label != IGNORE_INDEX]


class TeacherWriter:
    """Appends to a directory, or goes on in one that was begun with the same facts.

    facts: what decides the numbers; `topk` and `dtype` are read here.
    """

    def __init__(self, directory: Path, facts: Json) -> None:
        self.directory, self.facts = directory, facts
        self.k = int(facts["topk"])
        self.dtype: torch.dtype = getattr(torch, facts["dtype"])
        self.widths = _widths(facts)
        self.keys: set[int] = set()
        self.end = 0
        self._index: list[int] = []  # that the files do not have yet
        if (directory / _INDEX).is_file() and read_json(directory / TEACHER_FILE, optional=True) == facts:
            self._go_on()
        else:
            directory.mkdir(parents=True, exist_ok=True)
            for path in _files(directory):
                path.unlink(missing_ok=True)
            write_json(directory / TEACHER_FILE, facts)
        self._files = {name: (directory / name).open("ab") for name in (*self.widths, _INDEX)}
        self._synced = time.monotonic()

    def _go_on(self) -> None:
        """Cut off what a process that was killed had not written whole."""
        path = self.directory / _INDEX
        whole = path.stat().st_size // 16
        index = torch.frombuffer(bytearray(path.read_bytes()[: whole * 16]), dtype=torch.int64).view(-1, 2).tolist()
        sizes = {name: (self.directory / name).stat().st_size for name in self.widths}
        index = [e for e in index if all(e[1] * width <= sizes[name] for name, width in self.widths.items())]
        self.keys, self.end = {key for key, _ in index}, index[-1][1] if index else 0
        for name, width in {**self.widths, _INDEX: 0}.items():
            os.truncate(self.directory / name, width * self.end if width else 16 * len(index))

    def add(self, sample: Json, top: Top) -> None:
        """The teacher's answer to a sample: of its positions with a label, in their order."""
        values = (top.ids.int(), top.log_probs.to(self.dtype), top.rest.float())
        for name, tensor in zip(self.widths, values, strict=True):
            self._files[name].write(tensor.cpu().numpy().tobytes())
        key = key_of(sample)
        self.keys.add(key)
        self.end += len(top.rest)
        self._index += [key, self.end]
        if time.monotonic() - self._synced > _SECONDS:
            self.sync()

    def sync(self) -> None:
        """Force it to the disk; the index names nothing that is not there."""
        for name in self.widths:
            self._files[name].flush()
            os.fsync(self._files[name].fileno())
        self._files[_INDEX].write(torch.tensor(self._index, dtype=torch.int64).numpy().tobytes())
        self._files[_INDEX].flush()
        self._index = []
        self._synced = time.monotonic()

    def close(self) -> None:
        """Keep what is there, so that the next one goes on."""
        self.sync()
        for file in self._files.values():
            file.close()

    def finish(self) -> None:
        """All samples are there, and it is closed."""
        whole = {"samples": len(self.keys), "positions": self.end, "content": facts_of_files(_files(self.directory))}
        write_json(self.directory / TEACHER_FILE, {**self.facts, **whole})


def _widths(facts: Json) -> dict[str, int]:
    """Bytes that a position has in each file."""
    k = int(facts["topk"])
    return {"ids.bin": 4 * k, "log_probs.bin": k * getattr(torch, facts["dtype"]).itemsize, "rest.bin": 4}


def _files(directory: Path) -> list[Path]:
    return [directory / name for name in (_INDEX, "ids.bin", "log_probs.bin", "rest.bin")]


class TeacherLogits:
    """What TeacherWriter wrote, mapped into memory. rows: of the teacher's vocabulary.

    Raises: DatasetError for a directory that is not as it was written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            self.facts = read_json(directory / TEACHER_FILE)
            self.rows = int(self.facts["rows"])
            k, count, samples = (int(self.facts[name]) for name in ("topk", "positions", "samples"))
            if facts_of_files(_files(directory)) != self.facts["content"]:
                raise ValueError("its files have changed")
            load = partial(_mapped, directory)
            index = load(_INDEX, torch.int64, samples, 2)
            self.ids = load("ids.bin", torch.int32, count, k)
            self.log_probs = load("log_probs.bin", getattr(torch, self.facts["dtype"]), count, k)
            self.rest = load("rest.bin", torch.float32, count)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise DatasetError(
                f"--teacher_logits {directory}: is not whole ({error}); write it again with `swiftlite export "
                "--to_teacher_logits true`"
            ) from None
        self._keys, order = index[:, 0].sort()
        self._ends = index[:, 1][order]
        self._starts = torch.cat([index.new_zeros(1), index[:-1, 1]])[order]

    def of(self, rows: Sequence[Json]) -> Top:
        """Of all positions with a label, row by row, sample by sample. Raises: DatasetError for a sample without."""
        places = []
        for row in rows:
            for sample in samples_of_row(row):
                found = self.find(sample)
                if found is None:
                    raise DatasetError(
                        f"--teacher_logits {self.directory}: has no answer to a sample of {len(sample['input_ids'])} "
                        "tokens; write it with the --dataset, model and template of this run"
                    )
                places.append(found)
        values = (self.ids, self.log_probs, self.rest)
        return Top(*(torch.cat([v[place] for place in places] or [v[:0]]) for v in values))

    def find(self, sample: Json) -> slice | None:
        """Its positions, None where the teacher was not asked about it."""
        key = key_of(sample)
        at = int(torch.searchsorted(self._keys, key))
        if at == len(self._keys) or int(self._keys[at]) != key:
            return None
        found = slice(int(self._starts[at]), int(self._ends[at]))
        return found if found.stop - found.start == len(answered(sample)) else None


def _mapped(directory: Path, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
    size = torch.Size(shape).numel()
    path = directory / name
    if path.stat().st_size != size * dtype.itemsize:
        raise ValueError(f"{name} is cut off")
    return torch.from_file(str(path), shared=False, size=size, dtype=dtype).view(shape)
