"""`swiftlite export`: which checkpoint becomes what; the conversion itself is swiftlite.convert.conversion.

Neither megatron-core nor transformers is imported, unless the precision check, a tokenizer or a dataset is asked for.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from swiftlite.arguments.export import ExportArguments
from swiftlite.checkpoint.adapter import Adapter
from swiftlite.checkpoint.bind import bind_map
from swiftlite.checkpoint.checkpoint import Checkpoint, checkpoint_root
from swiftlite.checkpoint.hub import check_hub_id, push
from swiftlite.checkpoint.info import read_config
from swiftlite.checkpoint.resolve import as_arguments, resolve, the_adapter
from swiftlite.checkpoint.vocabulary import grown
from swiftlite.convert.conversion import Options, convert
from swiftlite.convert.targets import HfTarget, McorePlan, McoreTarget, PeftTarget, Plan, Source, Target
from swiftlite.llm.pipeline import plan_tokens
from swiftlite.plan.layouts import print_layouts
from swiftlite.plan.memory import TrainingModel
from swiftlite.plan.report import print_conversion, print_coverage
from swiftlite.utils.dist import barrier, get_rank
from swiftlite.utils.errors import UncheckedError, UsageError, VerifyError
from swiftlite.utils.logger import log_next


def convert_hf2mcore(args: Any) -> Path:
    """Convert the Hugging Face checkpoint `args.model`, with an adapter if one is to be merged, to a torch_dist checkpoint.

    args: ExportArguments, or words as typed. Returns: the output directory, which appears under its name only when
    everything, including the precision check if asked for, has succeeded.
    """
    args = _ready(args)
    source = _base(args, the_adapter(args) if args.merge_lora else None)
    output_dir = Path(args.output_dir or default_output_dir(args.model or source.root, "mcore"))
    target = McoreTarget(_dtype(args), args.thread_count, _dtype(args) or args.model_info.torch_dtype)
    _convert(args, source, target, output_dir, lambda written: _check_precision(args, written, source, written))
    words = ["--mcore_model", output_dir, "--dataset", "FILE", *args.loading_words(hub=False)]
    return _done(args, output_dir, "megatron", "sft", *words)


def convert_mcore2hf(args: Any) -> Path:
    """Convert the torch_dist checkpoint `args.mcore_model` to a Hugging Face directory. Returns: the output directory.

    config.json, tokenizer and manifest come from the checkpoint's own directory, or from --model for checkpoints that
    Megatron-LM or another tool wrote.
    """
    args = _ready(args)
    root = Path(args.model_info.model_dir) if args.model else None
    source = Checkpoint.open(args.mcore_model, root=root, weights=not args.dry_run)
    output_dir = Path(args.output_dir or default_output_dir(checkpoint_root(args.mcore_model), "hf"))
    target = HfTarget(_dtype(args), args.max_shard_bytes if "max_shard_size" in args.given else None)

    def check(written: Path) -> None:
        _check_precision(args, written, None, source.directory)

    _convert(args, source, target, output_dir, check)
    return _done(args, output_dir, "infer", "--model", output_dir, *args.loading_words(hub=False))


def _export_adapter(args: Any) -> Path:
    """What `export` does with --adapters or --mcore_adapter: the other format, or merging into the base model."""
    path = the_adapter(args)
    if args.merge_lora and args.to_mcore:
        return convert_hf2mcore(args)
    if args.test_convert_precision and args.merge_lora:
        raise UsageError(
            "--test_convert_precision true: a merged Hugging Face directory has no other side to be compared with; add "
            "--to_mcore true"
        )
    if not args.merge_lora and args.to_mcore == args.to_hf:
        raise UsageError("an adapter: give --to_mcore true, --to_hf true, or --merge_lora true")
    suffix = "merged" if args.merge_lora else "mcore" if args.to_mcore else "hf"
    output_dir = Path(args.output_dir or default_output_dir(path, suffix))
    if args.merge_lora:
        _convert(args, _base(args, path), HfTarget(_dtype(args), args.max_shard_bytes), output_dir)
        return _done(args, output_dir, "infer", "--model", output_dir, *args.loading_words(hub=False))
    config = read_config(Path(args.model_info.model_dir))  # of its base model: the weights are not needed
    adapter = Adapter.open(path, bind_map(grown(config, plan_tokens(args, config)), with_mtp=True))
    target: Target[Adapter] = McoreTarget() if args.to_mcore else PeftTarget()
    _convert(args, adapter, target, output_dir, lambda written: _check_adapter(args, path, written))
    return output_dir


def _check_adapter(args: Any, given: Path, written: Path) -> None:
    """The model with the adapter that was given, by transformers, and with the one that was written, by megatron-core."""
    if not args.test_convert_precision:
        return
    scratch = written.with_name(f"{written.name}.check")
    try:
        convert(_base(args, written), McoreTarget(), scratch, Options(exist_ok=True, quiet=True))
        _check_precision(args, written, _base(args, given), scratch)
    finally:
        barrier()
        if get_rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)


def _base(args: Any, adapter: Path | None) -> Checkpoint:
    """The model of --mcore_model or --model, with new tokens and the adapter that is to be merged."""
    base = Path(args.mcore_model or args.model_info.model_dir)
    new_tokens = plan_tokens(args, read_config(checkpoint_root(base)))
    planned = args.dry_run and new_tokens is None and adapter is None and not any(base.glob("*.safetensors"))
    source = Checkpoint.open(base, new_tokens=new_tokens, weights=not planned)
    return source if adapter is None else source.merged(Adapter.open(adapter, source.bound, plain=False))


def _convert(
    args: Any, source: Source, target: Target[Source], output_dir: Path,
    check: Callable[[Path], object] = lambda _: None,
) -> None:  # fmt: skip
    options = Options(
        args.exist_ok,
        args.allow_overflow,
        args.max_memory_bytes,
        args.verify == "bitwise",
        record=args.save,
        check=check,
    )

    def show(plan: Plan) -> None:
        if isinstance(plan, McorePlan):
            print_coverage(plan)
        print_conversion(args, output_dir, plan)
        if isinstance(plan, McorePlan):
            model = TrainingModel(plan.source.bound, plan.arguments, plan.trained_in or plan.main_dtype)
            print_layouts(args, model, ["--mcore_model", str(output_dir)])

    convert(source, target, output_dir, options, show if args.dry_run else None)


def _dtype(args: Any) -> Any:
    return args.dtype if "torch_dtype" in args.given else None


def _done(args: Any, output_dir: Path, *next_words: object) -> Path:
    if not args.dry_run:
        log_next("swiftlite", *next_words)
    return output_dir


def default_output_dir(model: str | Path, suffix: str) -> str:
    """`<name>-mcore` or `<name>-hf` in the working directory."""
    name = str(model).rstrip("/").rsplit("/", 1)[-1]
    return f"{name.removesuffix('-mcore') if suffix == 'hf' else name}-{suffix}"


def _check_precision(args: Any, written: Path, hf: Checkpoint | None, mcore_dir: Path) -> None:
    """hf: the Hugging Face side; None: what was written."""
    if not args.test_convert_precision:
        return
    try:
        from swiftlite.selftest.precision import check_precision, groups_of_check

        hf = hf or Checkpoint.open(written)
        with groups_of_check(hf.root):
            if get_rank() == 0:
                check_precision(hf, mcore_dir, args, _dtype(args))
            barrier()
    except VerifyError:
        raise
    except Exception as error:  # transformers and remote code fail in any way there is
        raise UncheckedError(
            f"converted, but the precision check could not run: {' '.join(str(error).split())}. The result is kept in "
            f"{written}: the same command checks it again, without --test_convert_precision it becomes the output"
        ) from error


def _ready(args: Any) -> Any:
    """ExportArguments with the model's facts, from such an object or from words as typed."""
    args = as_arguments(ExportArguments, args)
    if not hasattr(args, "model_info"):
        resolve(args, need_template=False)
    return args


def export_main(args: ExportArguments | Sequence[str]) -> Path:
    """`swiftlite export`; `args`: ExportArguments, or words as typed. Raises: UsageError if no direction is given."""
    args = as_arguments(ExportArguments, args)
    if args.push_to_hub:
        check_hub_id(args.hub_model_id)
    output_dir = _export(args)
    if args.push_to_hub and not args.dry_run and get_rank() == 0:
        push(output_dir, args.hub_model_id, use_hf=args.use_hf, token=args.hub_token, private=args.hub_private_repo)
    return output_dir


def _export(args: ExportArguments) -> Path:
    if args.to_cached_dataset:
        from swiftlite.llm.dataset.export import export_cached_dataset  # imports transformers' tokenizers

        return export_cached_dataset(args)
    if args.adapters or args.mcore_adapter:
        return _export_adapter(_ready(args))
    if args.merge_lora:
        raise UsageError("--merge_lora true: give the adapter with --adapters DIR or --mcore_adapter DIR")
    if args.to_mcore:
        return convert_hf2mcore(args)
    if args.to_hf:
        return convert_mcore2hf(args)
    if args.push_to_hub and args.model and (Path(args.model) / "config.json").is_file():
        return Path(args.model)
    raise UsageError("nothing to do: give --to_mcore true or --to_hf true, or --to_cached_dataset true")
