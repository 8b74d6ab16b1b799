"""TokenStore: encoded samples in flat arrays: 4 bytes a number in memory, or a directory that is mapped, not read.

Layout of a directory: `store.json` (number of samples, columns), per column `NAME.bin` (numbers end to end) and
`NAME.offsets.bin` (int64, where each sample begins; one more than samples), `extras.jsonl` for
anything else: [sample, {name: value}].
"""

from __future__ import annotations

import json
import mmap
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from swiftlite.utils.errors import DatasetError
from swiftlite.utils.types import Json

STORE_FILE = "store.json"
DESIRABLE = "desirable"  # name under which samples have the label of KTO
_HASHED_BYTES, _BLOCK_BYTES = 256 << 20, 1 << 20
# Columns that are as long as the tokens, by the end of their name: array type code.
_TYPES = {"input_ids": "i", "labels": "i", "loss_scale": "f"}


@cache
def type_of(name: str) -> str | None:
    """Array type code of a column of numbers, None for other values."""
    return next((code for end, code in _TYPES.items() if name.endswith(end)), None)


class TokenStore:
    """Samples as `Template.encode` makes them; `store[i]` gives an equal one back (weights in single precision)."""

    def __init__(self) -> None:
        self._values: Json = {}  # name -> flat array or mapped memory
        self._offsets: Json = {}
        self._extras: dict[int, Json] = {}  # of the samples that have any
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, sample: Json) -> None:
        extras = {}
        for name, value in sample.items():
            code = type_of(name)
            if code is None or not isinstance(value, list | array):
                if name != "length" or value != len(sample.get("input_ids", ())):
                    extras[name] = value
                continue
            if name not in self._values:  # absent so far: samples without the column are empty in it
                self._values[name], self._offsets[name] = array(code), array("q", [0] * (self._count + 1))
            values = self._values[name]
            (values.fromlist if isinstance(value, list) else values.extend)(value)
        for name, offsets in self._offsets.items():
            offsets.append(len(self._values[name]))
        if extras:
            self._extras[self._count] = extras
        self._count += 1

    def __getitem__(self, index: int) -> Json:
        if index < 0:
            index += self._count
        if not 0 <= index < self._count:
            raise IndexError(f"sample {index} of {self._count}")
        sample: Json = {}
        for name, offsets in self._offsets.items():
            start, end = offsets[index], offsets[index + 1]
            if end > start:
                sample[name] = self._values[name][start:end].tolist()
        if "input_ids" in sample:
            sample["length"] = len(sample["input_ids"])
        return {**sample, **self._extras.get(index, {})}

    def __iter__(self) -> Iterator[Json]:
        return (self[i] for i in range(self._count))

    def content_hash(self, order: Sequence[Sequence[int]] = ()) -> str:
        """xxh3_128 of the samples, and of the `order` that they are packed in. Of a column above 256 MB, of parts of it."""
        import xxhash

        digest = xxhash.xxh3_128(json.dumps([self._count, list(order)]).encode())
        # A channel changes no number that is trained.
        kept = ((i, {n: v for n, v in extras.items() if n != "channel"}) for i, extras in self._extras.items())
        digest.update(json.dumps([entry for entry in kept if entry[1]], default=str).encode())
        for name in sorted(self._values):
            digest.update(name.encode())
            for numbers in (self._offsets[name], self._values[name]):
                data = memoryview(numbers).cast("B") if len(numbers) else memoryview(b"")
                step = max(1, -(-len(data) // _HASHED_BYTES)) * _BLOCK_BYTES
                for start in range(0, len(data), step):
                    digest.update(data[start : start + _BLOCK_BYTES])
        return digest.hexdigest()

    def lengths(self, name: str = "input_ids") -> list[int]:
        offsets = self._offsets.get(name)
        if offsets is None:
            return [0] * self._count
        return [offsets[i + 1] - offsets[i] for i in range(self._count)]

    def extras(self, name: str) -> list[object]:
        """What each sample has under a name that is no column of numbers, None without."""
        return [self._extras.get(i, {}).get(name) for i in range(self._count)]

    def extra_values(self, name: str) -> set[object]:
        """What the samples have under a name that is no column of numbers; None of those that have nothing."""
        found = {extras.get(name) for extras in self._extras.values()}
        return found if len(self._extras) == self._count else {*found, None}

    def save(self, directory: Path) -> None:
        """Write the directory; `store.json` comes last."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, values in self._values.items():
            (directory / f"{name}.bin").write_bytes(memoryview(values).cast("B") if len(values) else b"")
            (directory / f"{name}.offsets.bin").write_bytes(memoryview(self._offsets[name]).cast("B"))
        with (directory / "extras.jsonl").open("w", encoding="utf-8") as file:
            for index, extras in self._extras.items():
                file.write(json.dumps([index, extras], ensure_ascii=False, default=str) + "\n")
        columns = {name: type_of(name) for name in self._values}
        hashes = {
            file.name: hash_of_file(file) for file in sorted(directory.iterdir()) if file.suffix in (".bin", ".jsonl")
        }
        facts = {"samples": self._count, "columns": columns, "extras": len(self._extras), "hashes": hashes}
        (directory / STORE_FILE).write_text(json.dumps(facts) + "\n")

    @classmethod
    def load(cls, directory: Path) -> TokenStore:
        """Map a saved store. Raises: DatasetError if a file is missing or is not as it was written."""
        store = cls()
        try:
            facts = json.loads((directory / STORE_FILE).read_text())
            store._count = facts["samples"]
            for name, code in facts["columns"].items():
                store._values[name] = _mapped(directory / f"{name}.bin", code)
                store._offsets[name] = _mapped(directory / f"{name}.offsets.bin", "q")
                if len(store._offsets[name]) != store._count + 1 or store._offsets[name][-1] != len(
                    store._values[name]
                ):
                    raise ValueError(f"{name}.bin is cut off")
            lines = (directory / "extras.jsonl").read_text(encoding="utf-8").splitlines()
            store._extras = dict(json.loads(line) for line in lines)
            if len(store._extras) != facts["extras"]:
                raise ValueError("extras.jsonl is cut off")
            for name, value in facts["hashes"].items():
                if hash_of_file(directory / Path(name).name) != value:
                    raise ValueError(f"the content of {name} has changed")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise DatasetError(f"{directory}: is not a whole tokenised dataset ({error}); write it again") from None
        return store


class JoinedStore(TokenStore):
    """Stores end to end, to be read."""

    def __init__(self, stores: Sequence[TokenStore]) -> None:
        super().__init__()
        self.stores = list(stores)
        self.ends = list(accumulate(map(len, stores)))
        self._count = self.ends[-1]

    def __getitem__(self, index: int) -> Json:
        which = bisect_right(self.ends, index)
        if not 0 <= index < self._count:
            raise IndexError(f"sample {index} of {self._count}")
        return self.stores[which][index - self.ends[which] + len(self.stores[which])]

    def content_hash(self, order: Sequence[Sequence[int]] = ()) -> str:
        import xxhash

        whole = [*(store.content_hash() for store in self.stores), list(order)]
        return xxhash.xxh3_128(json.dumps(whole).encode()).hexdigest()

    def lengths(self, name: str = "input_ids") -> list[int]:
        return [length for store in self.stores for length in store.lengths(name)]

    def extras(self, name: str) -> list[object]:
        return [value for store in self.stores for value in store.extras(name)]

    def extra_values(self, name: str) -> set[object]:
        return set().union(*(store.extra_values(name) for store in self.stores))


def hash_of_file(path: Path) -> str:
    """xxh3 of a file's bytes: gigabytes a second, and it finds every damage, if not every intent."""
    import xxhash

    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def facts_of_files(files: Sequence[Path]) -> Json:
    """What tells the content of files, for data that nobody reads as a whole: their bytes together and an xxh3_128.

    Above 256 MB it is of blocks at even distances and of each file's end: another size, and nearly every edit, is seen.
    """
    import xxhash

    sizes = [file.stat().st_size for file in files]
    step = max(1, -(-sum(sizes) // _HASHED_BYTES)) * _BLOCK_BYTES
    digest = xxhash.xxh3_128(json.dumps(sizes).encode())
    for path, size in zip(files, sizes, strict=True):
        with path.open("rb") as file:
            for start in {*range(0, size, step), max(0, size - _BLOCK_BYTES)}:
                file.seek(start)
                digest.update(file.read(_BLOCK_BYTES))
    return {"bytes": sum(sizes), "content": digest.hexdigest()}


def _mapped(path: Path, code: Any) -> memoryview[float]:
    if not path.stat().st_size:
        return memoryview(array(code))
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)).cast(code)
