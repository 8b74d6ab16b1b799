"""What `swiftlite export` reads: a model with all that is to become part of it, or an adapter."""

from __future__ import annotations

from pathlib import Path

from swiftlite.arguments.export import ExportArguments
from swiftlite.checkpoint.adapter import Adapter, is_other_kind
from swiftlite.checkpoint.bind import architecture_of, bind_map
from swiftlite.checkpoint.checkpoint import Checkpoint, checkpoint_root
from swiftlite.checkpoint.head import head_of_adapter, headed, rows_of_head, with_head
from swiftlite.checkpoint.info import read_config
from swiftlite.checkpoint.vocabulary import grown
from swiftlite.families import has_family
from swiftlite.llm.pipeline import plan_tokens
from swiftlite.utils.errors import UsageError


def base_model(args: ExportArguments, adapter: Path | None) -> Checkpoint:
    """The model of --mcore_model or --model, with new tokens and the adapter that is to be merged."""
    base = Path(args.mcore_model or args.model_info.model_dir)
    new_tokens = plan_tokens(args, read_config(checkpoint_root(base)))
    planned = args.dry_run and new_tokens is None and adapter is None and not any(base.glob("*.safetensors"))
    source = Checkpoint.open(base, new_tokens=new_tokens, weights=not planned)
    if adapter is None:
        return source
    source = with_head(source, head_of_adapter(adapter, source.config, source.root))
    return source.merged(Adapter.open(adapter, source.bound, plain=False))


def adapter_alone(args: ExportArguments, path: Path) -> Adapter:
    """An adapter held against its base model, of which only config.json is needed."""
    config = read_config(Path(args.model_info.model_dir))
    head = head_of_adapter(path, config, Path(args.model_info.model_dir))
    config = headed(grown(config, plan_tokens(args, config)), head)
    return Adapter.open(path, bind_map(config, with_mtp=True))


def merge_other_kind(args: ExportArguments, adapter: Path, output_dir: Path) -> bool:
    """Merge an adapter that is no plain LoRA, or has a head for a model without family, into its base model by peft.

    Returns: whether it is such a one.
    """
    without_family = not has_family(architecture_of(args.model_info.config))
    if not is_other_kind(adapter) and not (without_family and rows_of_head(adapter)):
        return False
    if args.fp8:
        raise UsageError(
            f"--fp8 {args.fp8}: merge an adapter of this kind without it, then export the merged model with it"
        )
    from swiftlite.llm.merging import merge_in_memory  # imports transformers

    merge_in_memory(args, adapter, output_dir)
    return True
