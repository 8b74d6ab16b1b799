"""From parsed arguments to what a command works with: the model's facts, and what args.json next to them records.

Everything that reads files or asks a hub for the arguments' sake is here, not in the dataclasses. No tokenizer is
loaded: see swiftlite.llm.pipeline for that.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from swiftlite.arguments.base import BaseArguments
from swiftlite.arguments.parser import Arguments, notes, parse, specs
from swiftlite.arguments.task import JUDGING_WORDS
from swiftlite.checkpoint.files import check_side_files
from swiftlite.checkpoint.info import ARGS_FILE, load_args
from swiftlite.checkpoint.new_tokens import read_special_tokens
from swiftlite.checkpoint.preflight import custom_files, preflight
from swiftlite.checkpoint.registry import get_model_info_meta
from swiftlite.families import MODEL_MAPPING
from swiftlite.families.hf_config import classes_of
from swiftlite.utils.directories import Directory, expect
from swiftlite.utils.errors import CheckpointError, UsageError
from swiftlite.utils.io import only_data, read_json
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Json

A = TypeVar("A", bound=Arguments)
B = TypeVar("B", bound=BaseArguments)

# What args.json next to weights or adapters tells later commands, where the user says nothing.
RECORDED = ("model_type", "template", "template_backend", "task_type", "num_labels", "problem_type", *JUDGING_WORDS,
            "agent_template", "response_prefix", "system", "enable_thinking", "add_non_thinking_prefix")  # fmt: skip
# What it tells only those that ask the model or pass it on: after `pt`, plain text; a further `sft` is a conversation's.
RECORDED_TO_ASK = ("use_chat_template",)


def as_arguments(cls: type[A], args: A | Sequence[str]) -> A:
    """Commands may be called with an arguments object or with words as typed (`["--model", "DIR"]`)."""
    only_data()
    return args if isinstance(args, Arguments) else parse(cls, args)


def mcore_root(path: str) -> Path:
    """Where config.json, tokenizer and args.json of `--mcore_model` lie: an `iter_*` directory's are next to it.

    Raises: UsageError if there is no such directory; CheckpointError saying what it is instead of a Megatron checkpoint.
    """
    directory = expect("mcore_model", path, "is_megatron")
    return directory.parent if Directory(directory).iteration == directory else directory


def take_recorded(args: BaseArguments, directory: str | os.PathLike[str]) -> Json:
    """Settings of the template from args.json of a checkpoint or adapter, where the user or another one says nothing.

    Returns: all of that file, {} where there is none. Raises: CheckpointError for values of a wrong kind.
    """
    root = Path(directory).expanduser()
    if root.name.startswith(("iter_", "checkpoint-")) and not (root / ARGS_FILE).is_file():
        root = root.parent
    recorded = load_args(root)
    known, settled = specs(type(args)), args.__dict__.setdefault("_recorded", set())
    given = args.given | settled | ({"template_backend"} if "template" in args.given else set())
    taken = []
    for name in (*RECORDED, *(() if args.trains else RECORDED_TO_ASK)):
        value = recorded.get(name)
        if value is None or name in given or name not in known:
            continue
        if isinstance(value, list | dict):
            raise CheckpointError(f"{root / ARGS_FILE}: {name} is {value!r}; fix or remove the file")
        if name == "model_type" and value not in MODEL_MAPPING:
            continue
        try:
            setattr(args, name, known[name].convert(value))
        except UsageError as error:
            raise CheckpointError(f"{root / ARGS_FILE}: {error}; fix or remove the file") from None
        settled.add(name)
        if value not in (known[name].default, "causal_lm") and name != "model_type":
            taken.append(f"{name} {value if len(str(value)) <= 60 else f'{str(value)[:60]}...'!r}")
    if taken:
        get_logger().info("%s says: %s", root / ARGS_FILE, ", ".join(taken))
    if recorded.get("custom_register_path") and not args.custom_register_path:
        get_logger().info("%s was trained with --custom_register_path; if a name is unknown here, give it again", root)
    return recorded


_registered: set[str] = set()


def register_custom(paths: Sequence[str]) -> None:
    """Run each Python file of `--custom_register_path` once. Raises: UsageError naming a file that is missing."""
    for full in custom_files(paths):
        if full in _registered:
            continue
        spec = importlib.util.spec_from_file_location(f"swiftlite_custom_{len(_registered)}", full)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        _registered.add(full)
        get_logger().info("registered %s", full)


def base_of_adapter(directory: Path) -> str:
    """The directory of the model that an adapter belongs to.

    The run's args.json says it, else adapter_config.json. A hub id in them is not fetched unasked.
    Raises: UsageError if no directory is named that is there.
    """
    if not directory.is_dir():
        raise UsageError(f"--adapters {directory}: no such directory")
    recorded = load_args(directory) or load_args(directory.parent)
    named = [recorded.get("model_dir"), recorded.get("model")]
    for folder in (directory, directory.parent):
        path = folder / "adapter_config.json"
        if path.is_file():
            named.append(read_json(path).get("base_model_name_or_path"))
    bases = [os.path.expanduser(name) for name in named if isinstance(name, str) and name]
    found = next((base for base in bases if os.path.isfile(os.path.join(base, "config.json"))), None)
    if found is None:
        there = f"names {ascii(bases[0])}, which is not a model directory here" if bases else "names no model"
        raise UsageError(f"--adapters {directory}: {there}; give its base model with --model DIR_OR_ID")
    get_logger().info("--model is taken from %s: %s", directory, found)
    return found


def read_system(args: BaseArguments) -> None:
    """`--system FILE.txt`: the file's text is the system message. A text of several words may end in .txt too.

    Raises: UsageError if there is no such file, or it is not UTF-8.
    """
    text = args.system
    if text is None or not text.strip().endswith(".txt") or "\n" in text.strip():
        return
    path = Path(text.strip()).expanduser()
    if not path.is_file() and len(text.split()) > 1:
        return
    try:
        args.system = path.read_text(encoding="utf-8-sig").rstrip("\r\n")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(
            f"--system {text}: cannot be read ({reason}); give a text, or a .txt file that holds it"
        ) from None


def _source(args: BaseArguments, mcore_model: str | None, adapters: Sequence[str]) -> str:
    """What is given with --model, or follows from the other directories. Raises: UsageError where nothing does."""
    if mcore_model:
        root = mcore_root(mcore_model)
        recorded = take_recorded(args, root)
        if args.model is None and not (root / "config.json").is_file():
            # What args.json names is another's word: a hub, any directory.
            named = recorded.get("model_dir") or recorded.get("model")
            if named:
                raise UsageError(
                    f"--mcore_model {mcore_model}: it holds no config.json; {ARGS_FILE} in it says that it comes from "
                    f"{named}: give that with --model if you trust it"
                )
            raise UsageError(
                f"--mcore_model {mcore_model}: it holds neither {ARGS_FILE} nor config.json; give the Hugging "
                "Face model that it comes from with --model"
            )
        return str(args.model or root)
    if args.model is None and adapters:
        return base_of_adapter(Path(adapters[0]).expanduser())
    if args.model is None:
        raise UsageError("give a model with --model DIR_OR_ID")
    return str(args.model)


def resolve(args: B, *, download_model: bool | None = None, need_template: bool = True) -> B:
    """Find out what the model is and fill in what follows from it; `args` is changed and returned.

    Adds `args.model_info` and `args.model_meta`; sets model_type, template, torch_dtype and max_length where the user
    did not. With `--mcore_model DIR` alone, DIR's args.json, config.json and tokenizer are the model's; with adapters
    alone, the model that they were trained on.

    Args:
        download_model: fetch a hub id's weights too; default: unless they come from --mcore_model or it is a dry run.
        need_template: False where no conversation is encoded; then types that differ only in it need not be told apart.
    Raises: UsageError, CheckpointError, ConfigError: one line each.
    """
    preflight(args)
    register_custom(args.custom_register_path)
    mcore_model = getattr(args, "mcore_model", None)
    adapters = [*args.adapters, *filter(None, [getattr(args, "mcore_adapter", None)])]
    read_system(args)
    for adapter in adapters:
        check_side_files(Path(adapter).expanduser())
        recorded = take_recorded(args, adapter)
        # Its rows of a vocabulary that has grown need the same rows under it.
        args.new_special_tokens = args.new_special_tokens or recorded.get("new_special_tokens") or []
    args.new_special_tokens = read_special_tokens(args.new_special_tokens)
    source = _source(args, mcore_model, adapters)
    take_recorded(args, source)
    if download_model is None:
        download_model = not mcore_model and not getattr(args, "dry_run", False)
    args.model_info, args.model_meta = get_model_info_meta(  # type: ignore[attr-defined]
        source,
        torch_dtype=args.torch_dtype,
        use_hf=args.use_hf,
        model_type=args.model_type,
        revision=args.model_revision,
        download_model=download_model,
        need_template=need_template and args.template is None and args.template_backend != "jinja",
        ignore_requirements=args.ignore_requirements,
        task_type=args.task_type,
        num_labels=args.num_labels,
        hub_token=args.hub_token,
    )
    check_side_files(Path(args.model_info.model_dir))
    args.model_type = args.model_info.model_type
    args.task_type = args.model_info.task_type
    if args.has_head:
        there, args.num_labels = classes_of(args.model_info.config), args.model_info.num_labels
        if there not in (None, args.num_labels):
            raise UsageError(
                f"--num_labels {args.num_labels}: the head in {args.model_info.model_dir} has {there}; begin with the model "
                "that it was trained from"
            )
        args.problem_type = args.problem_type or args.model_info.config.get("problem_type")
    _check_task(args)
    if args.template_backend == "auto" and "template" in args.given:
        args.template_backend = "swift"
    args.template = args.template or args.model_meta.template
    if args.max_length is None:
        args.max_length = args.model_info.max_model_len
    args.set_dtype(str(args.model_info.torch_dtype).removeprefix("torch."))
    return args


def _check_task(args: BaseArguments) -> None:
    """Raises: UsageError for a model of a task that this command is not for, where its directory says the task; for one that
    is trained otherwise than conversations are."""
    if args.trains and args.groups and "task_type" not in args.given:
        raise UsageError(f"{args.model_info.model_dir} is a model of --task_type {args.task_type}; add that")
    note = notes(type(args)).get("task_type")
    known = (None, "causal_lm", *((note.allowed or ()) if note is not None else ()))
    if note is not None and args.task_type not in known and not getattr(args, "trains_reward_model", False):
        raise UsageError(f"{args.model_info.model_dir} is a model of --task_type {args.task_type}: {note.reason}")


def the_adapter(args: BaseArguments) -> Path:
    """The one adapter that the arguments name. Raises: UsageError if there are several."""
    given = [*args.adapters, *([args.mcore_adapter] if args.mcore_adapter else [])]
    if len(given) > 1:
        raise UsageError(f"{' '.join(given)}: one adapter at a time")
    return Path(given[0])
