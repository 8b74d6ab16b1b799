"""What can be seen to be wrong before torch is imported: names, directories, data files, outputs, trackers, packages.

Reads no weights and asks no hub; what it lets through may still be wrong.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path

from swiftlite.arguments.parser import Arguments
from swiftlite.arguments.train import BITSANDBYTES
from swiftlite.utils.directories import expect
from swiftlite.utils.errors import SwiftliteError, UsageError

_DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")


def check_command(args: Arguments) -> None:
    """What a command line must say, and `preflight`. Raises: as preflight."""
    if hasattr(args, "template_backend") and not getattr(args, "to_hf", False) and not getattr(args, "to_mcore", False):
        if not (
            args.model or args.adapters or getattr(args, "mcore_model", None) or getattr(args, "mcore_adapter", None)
        ):
            raise UsageError("give the model with --model DIR_OR_ID")
        reads_none = any(getattr(args, name, False) for name in ("dry_run", "skip_train"))
        if args.trains and not (args.dataset or args.cached_dataset or reads_none):
            raise UsageError("give the training data with --dataset FILE")
    preflight(args)


def preflight(args: Arguments) -> None:
    """Raises: SwiftliteError (UsageError, CheckpointError) for the first thing that is wrong."""
    custom = getattr(args, "custom_register_path", None)
    custom_files(custom or ())
    if not custom:
        _check_names(args)
    _check_directories(args)
    if not custom and not getattr(args, "dataset_info", None):
        for flag in ("dataset", "val_dataset"):
            for text in getattr(args, flag, None) or ():
                _check_data(flag, text)
    for flag in ("output_dir", "result_path", "html", "output", "logging_dir", "save_config"):
        if getattr(args, flag, None):
            check_output(flag, getattr(args, flag), is_file=flag in ("result_path", "html", "output", "save_config"))
    for name in getattr(args, "report_to", None) or ():
        if name in ("wandb", "swanlab") and not _installed(name):
            raise UsageError(f"--report_to {name}: is not installed; pip install {name}, or leave it out")
    flash = getattr(args, "attention_backend", None) == "flash" and (args.trains or hasattr(args, "prompt"))
    if flash and not args.needs_megatron and not _installed("flash_attn") and not _installed("kernels"):
        raise UsageError(
            "--attention_backend flash: flash-attn is not installed; pip install flash-attn, or leave it out"
        )
    needed = (("use_liger_kernel", "liger-kernel"), ("optim", "bitsandbytes"), ("quant_bits", "bitsandbytes"))
    for flag, package in needed:
        value = getattr(args, flag, None)
        wanted = value in BITSANDBYTES if flag == "optim" else value
        if wanted and not args.needs_megatron and not _installed(package.replace("-", "_")):
            raise UsageError(f"--{flag} {str(value).lower()}: pip install {package}, or leave it out")
    if args.needs_megatron and not _installed("megatron.core"):
        raise SwiftliteError("megatron-core is not installed; run: pip install 'swiftlite[megatron]'")


def custom_files(paths: Iterable[str]) -> list[str]:
    """The files of `--custom_register_path`. Raises: UsageError naming one that is missing."""
    found = []
    for path in paths:
        full = os.path.abspath(os.path.expanduser(path))
        if not os.path.isfile(full) or not full.endswith(".py"):
            raise UsageError(f"--custom_register_path {path}: must be an existing .py file")
        found.append(full)
    return found


def check_output(flag: str, given: str, is_file: bool = False) -> None:
    """Raises: UsageError if nothing can be written there."""
    path = Path(given).expanduser().absolute()
    if path.exists() and path.is_dir() == is_file:
        kind = "is a directory; name a file" if is_file else "is a file; name a directory"
        raise UsageError(f"--{flag} {given}: {kind}")
    above = next(p for p in (path, *path.parents) if os.path.lexists(p))
    if above == path and is_file:
        above = path.parent
    if not above.is_dir():
        raise UsageError(f"--{flag} {given}: {above} is not a directory; name another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UsageError(f"--{flag} {given}: {above} cannot be written; name another place")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # the package above it is missing
        return False


def _check_names(args: Arguments) -> None:
    if not hasattr(args, "template_backend"):  # a command with names of its own
        return
    if args.model_type is not None:
        from swiftlite.checkpoint.registry import check_model_type

        check_model_type(args.model_type)
    if args.template is not None:
        from swiftlite.families.templates import get_template_meta

        get_template_meta(args.template)


def _check_directories(args: Arguments) -> None:
    adapters = [*getattr(args, "adapters", ()), *filter(None, [getattr(args, "mcore_adapter", None)])]
    if len(adapters) > 1 and not getattr(args, "serves", False):
        raise UsageError(
            f"--adapters {' '.join(adapters)}: one adapter at a time; merge the others into the model with "
            "`swiftlite export --merge_lora true`"
        )
    for flag, kinds in args.directory_kinds.items():
        value = getattr(args, flag)
        for given in value if isinstance(value, list) else [value] if value else []:
            if flag not in ("model", "ref_model", "teacher_model") or _is_local(given, flag):
                expect("" if flag == args.POSITIONAL else flag, given, *kinds)


def _is_local(given: str, flag: str) -> bool:
    from swiftlite.checkpoint.hub import local_directory  # not for commands without a model

    return local_directory(given, flag) is not None


def _check_data(flag: str, text: str) -> None:
    """A path that is not there; registered names and hub ids are left to the reader."""
    name = text.partition("#")[0].partition(":")[0]
    is_path = text.startswith(("/", "./", "../", "~")) or name.lower().endswith(_DATA_SUFFIXES)
    if is_path and not any(Path(p).expanduser().exists() for p in (text, text.partition("#")[0], name)):
        raise UsageError(f"--{flag} {text}: no such file or directory; check the path")
