"""`Checkpoint.open(DIR)`: a model in either format, as tensors under Hugging Face names.

Opening one reads headers only. What follows from config.json (family, shape, weight map) is worked out here and in
tensors.py, and nowhere else. Adapters: adapter.py. No megatron-core, no transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from swiftlite.checkpoint.adapter import Adapter
from swiftlite.checkpoint.bind import bind_source
from swiftlite.checkpoint.chat import copy_chat
from swiftlite.checkpoint.files import copy_side_files
from swiftlite.checkpoint.info import read_config
from swiftlite.checkpoint.new_tokens import enter_tokens
from swiftlite.checkpoint.side_files import MANIFEST
from swiftlite.checkpoint.tensors import ModelTensors, open_hf, open_mcore
from swiftlite.checkpoint.vocabulary import GrownSource, NewTokens, grown, rows_of
from swiftlite.utils.directories import CARRIED, TRACKER, Directory, find_iteration
from swiftlite.utils.errors import CheckpointError
from swiftlite.utils.io import format_bytes, write_json
from swiftlite.utils.text import some
from swiftlite.weights import stream
from swiftlite.weights.merged import Merged
from swiftlite.weights.storage import Files, WeightSource


@dataclass(frozen=True, kw_only=True)
class Checkpoint(ModelTensors):
    """A model on disk, with what was asked to be added to it.

    directory: of the weights, as given; root: where config and tokenizer lie. config: config.json with `changes`, the
    keys that differ from the file. The tensors: see ModelTensors.
    """

    directory: Path
    root: Path
    changes: Mapping[str, object] = field(default_factory=dict)
    new_tokens: NewTokens | None = None
    adapter: Adapter | None = None

    def __repr__(self) -> str:  # a notebook shows it: neither the whole config nor each tensor
        return f"<Checkpoint {self.directory}: {self.kind}, {', '.join(self.summary()[:1])}>"

    @classmethod
    def open(
        cls, directory: str | Path, *, root: Path | None = None, new_tokens: NewTokens | None = None, weights: bool = True
    ) -> Checkpoint:  # fmt: skip
        """Read what describes the tensors and hold it against config.json.

        Args: root: where config.json and tokenizer lie, if not with the weights. new_tokens: seen with the vocabulary
            rows that they need. weights: False for a plan: the files of weights need not be there.
        Raises: CheckpointError, ConfigError, MapError, ShapeError if files and config.json do not match.
        """
        directory = Path(directory)
        root = root or checkpoint_root(directory)
        config = read_config(root)
        mcore = is_megatron(directory)
        tensors = open_mcore(directory, root, config, weights) if mcore else open_hf(directory, config, weights)
        changes = {} if tensors.config == config else {"architectures": tensors.config["architectures"]}
        found = cls(**vars(tensors), directory=directory, root=root, changes=changes)
        return found if new_tokens is None else found._grown(new_tokens)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Of the values of one of `names`."""
        return self.source.spec(name).shape if name in self.carried else self.bound.shape(self.copies.get(name, name))

    @property
    def inputs(self) -> Sequence[Path]:
        """Files that decide what is read."""
        return [*self.source.files, self.root / "config.json", *(self.adapter.inputs if self.adapter else ())]

    @property
    def directories(self) -> Sequence[Path]:
        return [self.directory, self.root, *(self.adapter.directories if self.adapter else ())]

    def summary(self) -> list[str]:
        """Lines about what it holds."""
        lines = [f"{len(self.bound.by_hf)} tensors"]
        if self.carried:
            size = sum(self.source.spec(name).nbytes for name in self.carried)
            parts = sorted({name.removeprefix("model.").split(".")[0] for name in self.carried})
            lines.append(
                f"carried as they are: {len(self.carried)} tensors of other parts than the text model, "
                f"{format_bytes(size)} ({some(parts, 3)})"
            )
        if self.ignored:
            lines.append(f"ignored: {', '.join(self.ignored[:5])}{' ...' if len(self.ignored) > 5 else ''}")
        lines += [f"{name} is a copy of {of}: kept once on Megatron's side" for name, of in self.copies.items()]
        return lines + (self.adapter.summary() if self.adapter else [])

    def _grown(self, new_tokens: NewTokens) -> Checkpoint:
        """The same with rows for new tokens."""
        if new_tokens.rows <= rows_of(self.config):
            return replace(self, new_tokens=new_tokens)
        changes, config = {"vocab_size": new_tokens.rows}, grown(self.config, new_tokens)
        source = GrownSource(self.source, [n for n in self.names if n not in self.carried], new_tokens.rows)
        bound = bind_source(config, source, self.names).as_stored({n: self.shape_of(n) for n in self.bound.fused})
        return replace(self, config=config, bound=bound, source=source, changes=changes, new_tokens=new_tokens)

    def merged(self, adapter: Adapter) -> Checkpoint:
        """The same with an adapter added: what is read are the sums."""
        source = Merged(self.source, adapter.source, adapter.pairs, adapter.lora, adapter.extras)
        return replace(self, source=source, adapter=adapter)

    def check_whole(self) -> None:
        """Raises: CheckpointError for a Megatron checkpoint of the text part alone of a model that is more than that."""
        if self.bound.naming is not None and not self.whole:
            raise CheckpointError(
                f"{self.directory} holds the text part of {self.config['architectures'][0]} alone, and there is no "
                f"{CARRIED} beside it with the others; give the Hugging Face model that it comes from with --model"
            )

    def check_copies(self) -> None:
        """Raises: CheckpointError if a stored copy differs from its original; Megatron can hold only one of them."""
        if self.kind != "hf":
            return
        source = self.source.base if isinstance(self.source, Merged) else self.source
        with Files() as files:
            for name, of in self.copies.items():
                same = source.spec(name) == source.spec(of)
                for start in range(0, source.spec(of).nbytes if same else 0, stream.BLOCK_BYTES):
                    stop = min(start + stream.BLOCK_BYTES, source.spec(of).nbytes)
                    same = same and _read(source, name, start, stop, files) == _read(source, of, start, stop, files)
                if not same:
                    raise CheckpointError(
                        f"{name} is stored but differs from {of}, though config.json makes them one; "
                        "set tie_word_embeddings to false if the model has a head of its own"
                    )

    def write_side_files(self, target: Path, dtype: torch.dtype | None = None) -> None:
        """config.json, tokenizer and what else lies next to the weights, with new tokens and the chat of an adapter.

        Args: dtype: of the weights.
        """
        copy_side_files(self.root, target, self.changes, dtype)
        if self.new_tokens is not None:
            enter_tokens(target, self.new_tokens.ids)
        if self.adapter is not None:
            copy_chat(self.adapter.root, target)

    def write_manifest(self, directory: Path) -> None:
        """Record names, order, dtypes, shapes and files of the Hugging Face checkpoint, so that the way back has them."""
        if not self.files:
            return
        tensors = {}
        for name in self.names:
            dtype, shape = str(self.dtypes[name]).removeprefix("torch."), list(self.shape_of(name))
            tensors[name] = {"dtype": dtype, "shape": shape, "file": self.files[name]}
        quantised = {"quantization_config": self.scales.quantisation} if self.scales else {}
        write_json(directory / MANIFEST, {"ignored": list(self.ignored), **quantised, "tensors": tensors})


def _read(source: WeightSource, name: str, start: int, stop: int, files: Files) -> bytearray:
    data = bytearray(stop - start)
    files.read_into(memoryview(data), source.extents(name, start, stop))
    return data


def is_megatron(directory: Path) -> bool:
    """Whether the weights there are in Megatron's format."""
    found = Directory(directory)
    return not found.has("*.safetensors") and (found.has(TRACKER) or found.iteration is not None)


def checkpoint_root(directory: str | Path) -> Path:
    """Where config.json and the tokenizer of a checkpoint lie."""
    directory = Path(directory)
    return directory if (directory / "config.json").is_file() else find_iteration(directory).parent
