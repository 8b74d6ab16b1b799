"""What a checkpoint of a run on transformers holds: weights in the model's dtype, fp32 ones, random generators."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from swiftlite.arguments.train import SftArguments
from swiftlite.checkpoint.files import CONFIG, copy_side_files
from swiftlite.checkpoint.new_tokens import copy_tokenizer, enter_tokens
from swiftlite.checkpoint.vocabulary import rows_of
from swiftlite.llm.model import tuner
from swiftlite.llm.model.loader import embedding_rows, id_of
from swiftlite.llm.model.names import Others, check_names, load_tensors
from swiftlite.llm.template.trained import Chat
from swiftlite.utils.dist import get_rank, get_world_size
from swiftlite.utils.io import read_json
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Json
from swiftlite.weights.storage import check_overflow, overflows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What a checkpoint is called, and its files besides the model's.
PREFIX = "checkpoint-"
FP32_FILE = "fp32_parameters.safetensors"
OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"
SCALER, STATE = "scaler.pt", "trainer_state.json"


def rng_file() -> str:
    """Of this rank."""
    return f"rng_state_{get_rank()}.pth" if get_world_size() > 1 else "rng_state.pth"


def save_model(
    model: PreTrainedModel, directory: Path, args: SftArguments, tokenizer: PreTrainedTokenizerBase, chat: Chat | None
) -> None:
    """Weights or adapters, next to the files of the model that they come from. Rank 0 only."""
    base = Path(args.model_info.model_dir)
    new_tokens = {token: id_of(tokenizer, token) for token in args.new_special_tokens}
    if args.adapts:
        # peft would write the whole embedding of a vocabulary that has grown.
        model.save_pretrained(directory, save_embedding_layers=False)
        if new_tokens:
            copy_tokenizer(base, directory, new_tokens)
    else:
        _save_weights(model, directory, args)
        if new_tokens:
            enter_tokens(directory, new_tokens)
    if chat is not None:
        chat.write(directory, base)


def _save_weights(model: PreTrainedModel, directory: Path, args: SftArguments) -> None:
    info, dtype = args.model_info, args.model_info.torch_dtype
    source = Path(info.model_dir)
    held = {n: p.detach() for n, p in model.named_parameters() if n in tuner.held_in_fp32(model)}
    cast = {value.data_ptr(): value.to(dtype) for value in held.values()}
    lost = (name for name, value in held.items() if overflows(value, cast[value.data_ptr()]))
    check_overflow(lost, dtype, args.allow_overflow)
    state = {name: cast.get(value.data_ptr(), value) for name, value in model.state_dict().items()}
    carried = Others.of(info.config).carried(source, state)
    if carried:
        get_logger().info("%d tensors of MTP blocks, which transformers does not train, are carried over", len(carried))
    model.save_pretrained(directory, state_dict={**state, **carried})
    # transformers would write them anew in its own release's form, which other releases and tools may not read.
    rows = embedding_rows(model)
    grown = rows_of(read_json(source / CONFIG)) not in (None, rows)
    copy_side_files(source, directory, {"vocab_size": rows} if grown else {}, dtype)
    if held and not args.save_weights_only:
        save_file({name: value.contiguous() for name, value in held.items()}, directory / FP32_FILE)


def load_model(model: PreTrainedModel, directory: Path, args: SftArguments) -> None:
    """What save_model wrote. Raises: CheckpointError if it does not fit."""
    if args.adapts:
        tuner.load_adapter(model, directory)
        return
    load_tensors(model, directory, Others.of(args.model_info.config))
    if not (directory / FP32_FILE).is_file():
        return
    stored, held = load_file(directory / FP32_FILE), tuner.held_in_fp32(model)
    check_names(held - set(stored), set(stored) - held, directory / FP32_FILE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in stored:
                parameter.copy_(stored[name])


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
