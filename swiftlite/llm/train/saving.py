"""What a checkpoint of a run on transformers holds: weights in the model's dtype, fp32 ones, random generators."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from swiftlite.arguments.base import BaseArguments
from swiftlite.arguments.train import SftArguments
from swiftlite.checkpoint.chat import Beside as Beside
from swiftlite.checkpoint.files import CONFIG, copy_side_files
from swiftlite.checkpoint.new_tokens import copy_tokenizer, enter_tokens
from swiftlite.checkpoint.vocabulary import rows_of
from swiftlite.llm.model import tuner
from swiftlite.llm.model.heads import head_changes
from swiftlite.llm.model.loader import embedding_rows, id_of
from swiftlite.llm.model.names import Others, Stored, check_names, checkpoint_tensors, load_tensors, local_part
from swiftlite.utils.dist import all_gather, barrier, get_rank, get_world_size
from swiftlite.utils.io import read_json, replace_directory
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Json
from swiftlite.weights.safetensors import (
    SafetensorsSource,
    ShardPlan,
    create_shards,
    places_in,
    plan_shards,
    read_header,
    write_index,
)
from swiftlite.weights.storage import Files, TensorSpec, byte_view, check_overflow, overflows, read_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What a checkpoint is called, and its files besides the model's.
PREFIX = "checkpoint-"
SAVING = ".saving"  # holds a checkpoint that is being written
FP32_FILE = "fp32_parameters.safetensors"
OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"
SCALER, STATE = "scaler.pt", "trainer_state.json"
SHARDED_OPTIMIZER = "optimizer.safetensors"  # of a sharded model: tensor PARAMETER.KEY for each state
MAX_SHARD_BYTES = 5 * 10**9


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory that becomes `target` when the block has ended: a killed save leaves no checkpoint. Collective."""
    saving = target.parent / SAVING
    if get_rank() == 0:
        shutil.rmtree(saving, ignore_errors=True)
        (saving / target.name).mkdir(parents=True)
    barrier()
    yield saving / target.name
    barrier()
    if get_rank() == 0:
        replace_directory(saving / target.name, target)
        shutil.rmtree(saving)
    barrier()


def rng_file() -> str:
    """Of this rank."""
    return f"rng_state_{get_rank()}.pth" if get_world_size() > 1 else "rng_state.pth"


def save_model(
    model: PreTrainedModel, directory: Path, args: SftArguments, tokenizer: PreTrainedTokenizerBase, chat: Beside | None
) -> None:
    """Weights or adapters, next to the files of the model that they come from. Collective; rank 0 has `chat`."""
    base = Path(args.model_info.model_dir)
    new_tokens = {token: id_of(tokenizer, token) for token in args.new_special_tokens}
    if args.adapts:
        state = {n: whole(t) for n, t in model.state_dict(keep_vars=True).items() if t.requires_grad or not args.fsdp}
        if get_rank() == 0:
            # peft would write the whole embedding of a vocabulary that has grown.
            model.save_pretrained(directory, state_dict=state, save_embedding_layers=False)
    else:
        write_weights(model, directory, args)
        held = {name: p for name, p in model.named_parameters() if name in tuner.held_in_fp32(model)}
        if held and not args.save_weights_only:
            write_file(directory / FP32_FILE, held)
    if get_rank() == 0:
        if new_tokens and args.adapts:
            copy_tokenizer(base, directory, new_tokens)
        elif new_tokens:
            enter_tokens(directory, new_tokens)
        if chat is not None:
            chat.write(directory, base)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded. Collective where it is."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def write_weights(model: PreTrainedModel, directory: Path, args: BaseArguments) -> None:
    """In the model's dtype, under the names of its checkpoint, with that one's other files. Ranks with parts write these."""
    info, dtype = args.model_info, args.model_info.torch_dtype
    source, main = Path(info.model_dir), get_rank() == 0
    in_fp32 = {id(p) for name, p in model.named_parameters() if name in tuner.held_in_fp32(model)}
    first = {name for name, _ in model.named_parameters()}  # a tied weight is written once, as the embedding
    places: dict[tuple[int, int], tuple[str, Stored]] = {}
    for name, stored in sorted(checkpoint_tensors(model).items(), key=lambda i: (i[0] not in first, "lm_head" in i[0])):
        places.setdefault((id(stored.owner), stored.first), (name, stored))
    tensors = dict(places.values())
    head = head_changes(info.config)
    writes_text = not head and args.task_type != "embedding"
    carried = Others.of(info.config).carried(source, tensors) if writes_text else {}
    if carried:
        get_logger().info("%d tensors of MTP blocks, which transformers does not train, are carried over", len(carried))
    unchanged = SafetensorsSource(source) if any(of == name for name, of in carried.items()) else None
    specs, lost = dict[str, TensorSpec](), list[str]()
    for name, of in {**dict(zip(tensors, tensors, strict=True)), **carried}.items():
        if of in tensors:
            owner = tensors[of].owner
            specs[name] = TensorSpec(dtype if id(owner) in in_fp32 else owner.dtype, tuple(tensors[of].shape))
        elif unchanged is not None:
            specs[name] = unchanged.spec(of)

    def pieces() -> Iterator[Piece]:
        for name, spec in specs.items():
            of = carried.get(name, name)
            if of in tensors:
                if main or isinstance(tensors[of].owner, DTensor):
                    values, first = tensors[of].local()
                    cast = values.to(spec.dtype)
                    lost.extend([name] if overflows(values, cast) else [])
                    yield Piece(name, cast, first)
            elif main and unchanged is not None:
                with Files() as files:
                    yield Piece(name, read_tensor(unchanged, of, files).view(-1), 0)

    total = sum(spec.nbytes for spec in specs.values())
    shards = plan_shards(specs, MAX_SHARD_BYTES)
    write_pieces(directory, shards, pieces())
    check_overflow([name for part in all_gather(lost) for name in part], dtype, args.allow_overflow)
    if main:
        write_index(directory, shards, total)
        # transformers would write them anew in its own release's form, which other releases and tools may not read.
        rows = embedding_rows(model)
        grown = rows_of(read_json(source / CONFIG)) not in (None, rows)
        copy_side_files(source, directory, {**head, **({"vocab_size": rows} if grown else {})}, dtype)


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file of tensors, whole or sharded ones. Collective."""
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    mine = (n for n, tensor in tensors.items() if get_rank() == 0 or isinstance(tensor, DTensor))
    pieces = (Piece(name, *local_part(tensors[name])) for name in mine)
    write_pieces(path.parent, [replace(plan_shards(specs, 1 << 62)[0], file=path.name)], pieces)


class Piece(NamedTuple):
    """Elements of a tensor from number `first` on, flat."""

    name: str
    values: Tensor
    first: int


def write_pieces(directory: Path, shards: Sequence[ShardPlan], pieces: Iterable[Piece]) -> None:
    """Make safetensors files; each rank writes its pieces where they belong. Collective."""
    if get_rank() == 0:
        create_shards(directory, shards)
    barrier()
    places = places_in(directory, shards)
    with Files() as files:
        for name, values, first in pieces:
            file, offset = places[name]
            files.write(file, offset + first * values.element_size(), byte_view(values.cpu()))
        files.sync()


def load_model(model: PreTrainedModel, directory: Path, args: SftArguments) -> None:
    """What save_model wrote. Raises: CheckpointError if it does not fit."""
    if args.adapts:
        tuner.load_adapter(model, directory)
        return
    load_tensors(model, directory, Others.of(args.model_info.config))
    path, held = directory / FP32_FILE, tuner.held_in_fp32(model)
    if not path.is_file():
        return
    stored = read_header(path)
    check_names(held - set(stored), set(stored) - held, path)
    with safe_open(path, "pt") as file:
        for name, parameter in model.named_parameters():
            if name in stored:
                fill(parameter, file.get_tensor(name))


def fill(tensor: Tensor, values: Tensor) -> None:
    """Copy this rank's part of `values`, which are whole and may be on the disk still."""
    part, first = local_part(tensor)
    part.copy_(values.reshape(-1)[first : first + len(part)])


def save_rng_state(directory: Path) -> None:
    """This rank's random generators."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    torch.save(states, directory / rng_file())


def load_rng_state(directory: Path) -> None:
    """This rank's, or those of one that is gone: nothing. transformers' Trainer wrote all devices' states in a list."""
    path = directory / rng_file()
    if not path.is_file():
        return
    # What a state of numpy's generator is pickled as; releases of transformers have this list in different modules.
    numpy_state: list[Any] = [np.zeros(0).__reduce__()[0], np.ndarray, np.dtype, type(np.dtype(np.uint32))]
    with torch.serialization.safe_globals(numpy_state):
        states: Json = torch.load(path, weights_only=True)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        device, found = torch.cuda.current_device(), states["cuda"]
        if isinstance(found, torch.Tensor) or device < len(found):
            torch.cuda.set_rng_state(found if isinstance(found, torch.Tensor) else found[device])
