"""`swiftlite export`: which checkpoint becomes what; the conversion itself is swiftlite.convert.conversion.

Neither megatron-core nor transformers is imported, unless the precision check, a tokenizer or a dataset is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from swiftlite.arguments.export import ExportArguments
from swiftlite.checkpoint.adapter import Adapter
from swiftlite.checkpoint.checkpoint import Checkpoint, checkpoint_root
from swiftlite.checkpoint.hub import check_hub_id, push
from swiftlite.checkpoint.resolve import as_arguments, resolve, the_adapter
from swiftlite.cli.export_checks import check_adapter, check_fp8, check_model
from swiftlite.cli.export_sources import adapter_alone, base_model, merge_other_kind
from swiftlite.convert.conversion import Options, Source, Target, convert
from swiftlite.convert.hf import HfTarget
from swiftlite.convert.mcore import McoreTarget
from swiftlite.convert.peft import PeftTarget
from swiftlite.plan.report import print_plan
from swiftlite.utils.dist import get_rank
from swiftlite.utils.errors import UsageError
from swiftlite.utils.logger import log_next


def convert_hf2mcore(args: ExportArguments | Sequence[str]) -> Path:
    """Convert the Hugging Face checkpoint `args.model`, with an adapter if one is to be merged, to a torch_dist checkpoint.

    args: ExportArguments, or words as typed. Returns: the output directory, which appears under its name only when
    everything, including the precision check if asked for, has succeeded.
    """
    args = _ready(args)
    source = base_model(args, the_adapter(args) if args.merge_lora else None)
    output_dir = Path(args.output_dir or default_output_dir(args.model or source.root, "mcore"))
    target = McoreTarget(args.written_dtype, args.thread_count, args.written_dtype or args.model_info.torch_dtype)
    _convert(args, source, target, output_dir, lambda written: check_model(args, written, source, written))
    words = ["--mcore_model", output_dir, "--dataset", "FILE", *args.loading_words(hub=False)]
    return _done(args, output_dir, "megatron", "sft", *words)


def convert_mcore2hf(args: ExportArguments | Sequence[str]) -> Path:
    """Convert the torch_dist checkpoint `args.mcore_model` to a Hugging Face directory. Returns: the output directory.

    With `args.fp8` also the Hugging Face checkpoint `args.model`. config.json, tokenizer and manifest come from the Megatron
    checkpoint's own directory, or from --model for one that Megatron-LM or another tool wrote.
    """
    args = _ready(args)
    if args.mcore_model:
        root, named = Path(args.model_info.model_dir) if args.model else None, checkpoint_root(args.mcore_model)
        source = Checkpoint.open(args.mcore_model, root=root, weights=not args.dry_run)
    else:
        source, named = base_model(args, None), Path(str(args.model))
    output_dir = Path(args.output_dir or default_output_dir(named, "fp8" if args.fp8 else "hf"))
    target = HfTarget(args.written_dtype, args.max_shard_bytes if "max_shard_size" in args.given else None, args.fp8)
    _convert(args, source, target, output_dir, lambda written: check_model(args, written, None, source.directory))
    return _done(args, output_dir, "infer", "--model", output_dir, *args.loading_words(hub=False))


def _export_adapter(args: ExportArguments) -> Path:
    """What `export` does with --adapters or --mcore_adapter: the other format, or merging into the base model."""
    path = the_adapter(args)
    suffix = "merged" if args.merge_lora else "mcore" if args.to_mcore else "hf"
    output_dir = Path(args.output_dir or default_output_dir(path, suffix))
    if args.merge_lora and merge_other_kind(args, path, output_dir):
        return _done(args, output_dir, "infer", "--model", output_dir, *args.loading_words(hub=False))
    if args.merge_lora and args.to_mcore:
        return convert_hf2mcore(args)
    if args.test_convert_precision and args.merge_lora:
        raise UsageError(
            "--test_convert_precision true: a merged Hugging Face directory has no other side to be compared with; add "
            "--to_mcore true"
        )
    if not args.merge_lora and args.to_mcore == args.to_hf:
        raise UsageError("an adapter: give --to_mcore true, --to_hf true, or --merge_lora true")
    if args.merge_lora:
        _convert(args, base_model(args, path), HfTarget(args.written_dtype, args.max_shard_bytes, args.fp8), output_dir)
        return _done(args, output_dir, "infer", "--model", output_dir, *args.loading_words(hub=False))
    target: Target[Adapter] = McoreTarget() if args.to_mcore else PeftTarget()
    _convert(args, adapter_alone(args, path), target, output_dir, lambda written: check_adapter(args, path, written))
    return output_dir


def _convert(
    args: ExportArguments, source: Source, target: Target[Source], output_dir: Path,
    check: Callable[[Path], object] = lambda _: None,
) -> None:  # fmt: skip
    def checked(written: Path) -> None:
        check_fp8(args, source.source, written)
        check(written)

    bitwise = args.verify == "bitwise"
    options = Options(args.exist_ok, args.allow_overflow, args.max_memory_bytes, bitwise, False, args.save, checked)
    convert(source, target, output_dir, options, partial(print_plan, args, output_dir) if args.dry_run else None)


def _done(args: ExportArguments, output_dir: Path, *next_words: object) -> Path:
    if not args.dry_run:
        log_next("swiftlite", *next_words)
    return output_dir


def default_output_dir(model: str | Path, suffix: str) -> str:
    """`<name>-mcore` or `<name>-hf` in the working directory."""
    name = str(model).rstrip("/").rsplit("/", 1)[-1]
    return f"{name if suffix == 'mcore' else name.removesuffix('-mcore')}-{suffix}"


def _ready(args: ExportArguments | Sequence[str]) -> ExportArguments:
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
    if args.to_cached_dataset or args.to_teacher_logits:
        from swiftlite.llm.dataset.export import export_data  # imports transformers' tokenizers

        return export_data(args)
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
    raise UsageError("nothing to do: give --to_mcore, --to_hf, --to_cached_dataset or --to_teacher_logits true")
