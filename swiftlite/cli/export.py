"""Offline conversion both ways: read headers, check, plan, stream, verify, rename into place.

No model or GPU is involved, and neither megatron-core nor transformers is imported (unless the precision check is asked
for). Several processes share the work by output file; they exchange barriers and hashes, never tensor data.
"""

from __future__ import annotations

import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from swiftlite.arguments.export import ExportArguments
from swiftlite.arguments.megatron_export import conversion_arguments
from swiftlite.checkpoint.bind import bind_map, convert_hf_config
from swiftlite.checkpoint.files import copy_side_files, main_dtype
from swiftlite.checkpoint.hub import check_hub_id, push
from swiftlite.checkpoint.new_tokens import enter_tokens
from swiftlite.checkpoint.resolve import as_arguments, resolve
from swiftlite.checkpoint.side_files import (
    MEGATRON_LM_ARGS,
    read_config,
    read_manifest,
    write_hashes,
    write_manifest,
)
from swiftlite.convert.adapters import convert_adapter, merge_to_hf, open_adapter, the_adapter
from swiftlite.convert.execute import run_jobs, verify_bitwise
from swiftlite.convert.origin import Origin, origin_root
from swiftlite.convert.plan import (
    ConfigSource,
    check_duplicates,
    has_weights,
    plan_to_hf,
    plan_to_mcore,
    print_coverage,
)
from swiftlite.convert.vocabulary import GrownSource, grown
from swiftlite.llm.pipeline import plan_tokens
from swiftlite.plan.memory import TrainingModel
from swiftlite.plan.report import num_processes, print_conversion, print_layouts
from swiftlite.utils.dist import barrier, get_rank, host_group
from swiftlite.utils.errors import UncheckedError, UsageError, VerifyError
from swiftlite.utils.io import format_bytes, peak_memory_bytes, write_text_atomic
from swiftlite.utils.logger import get_logger, log_next
from swiftlite.utils.output import check_output
from swiftlite.weights import dcp_file, stream, torch_dist
from swiftlite.weights.dcp_file import TorchDistSource
from swiftlite.weights.fp8 import open_source
from swiftlite.weights.journal import fingerprint, workspace
from swiftlite.weights.merged import Merged
from swiftlite.weights.rule import BoundMap, Coverage
from swiftlite.weights.safetensors import SafetensorsSource, create_shards, plan_shards, write_index
from swiftlite.weights.torch_dist import HfNames, McoreView, find_iteration


def convert_hf2mcore(args: Any) -> Path:
    """Convert the Hugging Face checkpoint `args.model` to a torch_dist checkpoint. Returns: the output directory.

    args: ExportArguments, or words as typed. The output appears under its name only when everything, including
    the precision check if asked for, has succeeded.
    """
    args = _ready(args)
    with tempfile.TemporaryDirectory() as scratch:
        return _hf2mcore(args, Path(scratch))


def _hf2mcore(args: Any, scratch: Path) -> Path:
    started = time.time()
    model_dir = Path(args.model_info.model_dir)
    config = read_config(model_dir)
    dtype = args.dtype if "torch_dtype" in args.given else None
    new = plan_tokens(args, config)
    changes: dict[str, Any] = {}
    source: Any = None
    if new is not None and new.rows != config["vocab_size"]:
        source = open_source(model_dir, config)
        source = GrownSource(source, source.tensors, new.rows, scratch)
        changes = {"vocab_size": new.rows}
        config = {**config, **changes}
    adapter = None
    if args.merge_lora and (args.adapters or args.mcore_adapter):
        source = source or open_source(model_dir, config)
        adapter = open_adapter(the_adapter(args), bind_map(config, ["mtp."]), scratch, plain=False)
        source = Merged(source, adapter.source, adapter.names, adapter.config, adapter.extras)
    if args.dry_run and source is None and not has_weights(model_dir):
        source = ConfigSource(model_dir, config)
    plan = plan_to_mcore(model_dir, config, dtype, args.thread_count, num_processes(), source)
    total, num_files = plan.dist.total_bytes, len(plan.dist.sizes)
    output_dir = Path(args.output_dir or default_output_dir(args.model, "mcore"))
    _report_plan("to_mcore", model_dir, output_dir, plan.bound, plan.coverage, total, num_files, args)
    main_dtype = dtype or args.model_info.torch_dtype
    megatron = conversion_arguments(convert_hf_config(config), str(output_dir), main_dtype, args)
    if args.dry_run:
        print_coverage(plan.bound, plan.coverage, plan.dtypes)
        print_conversion(args, output_dir, plan.source, total, list(plan.dist.sizes.values()))
        print_layouts(args, TrainingModel(plan.bound, megatron, main_dtype), ["--mcore_model", str(output_dir)])
        return output_dir
    check = _output_check(args, output_dir, "Megatron checkpoint", total)
    check()

    def prepare(directory: Path) -> None:
        check_duplicates(getattr(plan.source, "base", plan.source), plan.coverage.duplicates)
        (directory / "iter_0000001").mkdir()
        dcp_file.create_files(directory / "iter_0000001", plan.dist)

    def identity() -> str:
        return fingerprint(
            [*plan.source.files, model_dir / "config.json", *(adapter.files if adapter else ())],
            ["to_mcore", str(dtype), num_files, changes, adapter is not None],
        )

    with host_group(), workspace(output_dir, check, "Megatron checkpoint", identity, prepare) as space:
        iteration = space.directory / "iter_0000001"
        jobs = plan.jobs(iteration)
        hashes = run_jobs("to_mcore", jobs, args.max_memory_bytes, space, args.allow_overflow)
        if get_rank() == 0:
            copy_side_files(model_dir, space.directory, changes, plan.main_dtype)
            if new is not None:
                enter_tokens(space.directory, new.ids)
            write_manifest(space.directory, plan.source, plan.coverage)
            write_hashes(space.directory, hashes)
            lm_args = megatron.megatron_lm_args()
            text = lm_args if isinstance(lm_args, str) else shlex.join(lm_args) + "\n"
            write_text_atomic(space.directory / MEGATRON_LM_ARGS, text)
            dcp_file.write_metadata(iteration, plan.dist, megatron.checkpoint_args(), iteration=1)
            args.save(space.directory)
            write_text_atomic(space.directory / torch_dist.TRACKER, "1")
        barrier()
        if args.verify == "bitwise":
            written = HfNames(McoreView.open(TorchDistSource(iteration), plan.bound))
            verify_bitwise(written, hashes, jobs, args.max_memory_bytes)
        _check_precision(args, space.directory, model_dir, space.directory, plan.source, config["vocab_size"], dtype)
    _summary(
        output_dir,
        total,
        started,
        ["megatron", "sft", "--mcore_model", output_dir, "--dataset", "FILE", *args.loading_words(hub=False)],
    )
    return output_dir


def convert_mcore2hf(args: Any) -> Path:
    """Convert the torch_dist checkpoint `args.mcore_model` to a Hugging Face directory. Returns: the output directory.

    config.json, tokenizer and manifest come from the checkpoint's own directory, or from --model for checkpoints that
    Megatron-LM or another tool wrote.
    """
    started = time.time()
    args = _ready(args)
    iteration = find_iteration(Path(args.mcore_model))
    root = iteration.parent
    model_dir = Path(args.model_info.model_dir) if args.model else root
    config = read_config(model_dir)
    dtype = args.dtype if "torch_dtype" in args.given else None
    manifest = read_manifest(root)
    plan = plan_to_hf(iteration, config, dtype, manifest, data=not args.dry_run)
    layout = None if "max_shard_size" in args.given else plan.layout
    shards = plan_shards(plan.specs, args.max_shard_bytes, layout)
    output_dir = Path(args.output_dir or default_output_dir(root, "hf"))
    _report_plan("to_hf", iteration, output_dir, plan.view.bound, None, plan.total_bytes, len(shards), args)
    if args.dry_run:
        print_conversion(args, output_dir, plan.view.source, plan.total_bytes, [shard.size for shard in shards])
        return output_dir
    check = _output_check(args, output_dir, "Hugging Face model", plan.total_bytes)
    check()

    def identity() -> str:
        files = [iteration / ".metadata", *iteration.glob("*.distcp"), model_dir / "config.json"]
        return fingerprint(files, ["to_hf", str(dtype), [[s.file, s.size] for s in shards]])

    def prepare(directory: Path) -> None:
        create_shards(directory, shards)

    with host_group(), workspace(output_dir, check, "Hugging Face model", identity, prepare) as space:
        places = {n: (space.directory / s.file, offset) for s in shards for n, offset in s.offsets.items()}
        jobs = plan.jobs(places)
        hashes = run_jobs("to_hf", jobs, args.max_memory_bytes, space, args.allow_overflow)
        if get_rank() == 0:
            copy_side_files(model_dir, space.directory, {}, main_dtype((s.dtype, s.numel) for s in plan.specs.values()))
            args.save(space.directory)
            write_index(space.directory, shards, plan.total_bytes)
        barrier()
        if args.verify == "bitwise":
            verify_bitwise(SafetensorsSource(space.directory), hashes, jobs, args.max_memory_bytes)
        _check_precision(args, space.directory, space.directory, iteration, cast=dtype)
    _summary(output_dir, plan.total_bytes, started, ["infer", "--model", output_dir, *args.loading_words(hub=False)])
    return output_dir


def _output_check(args: Any, output_dir: Path, kind: str, needed: int) -> Callable[..., None]:
    inputs = [args.model_info.model_dir, args.mcore_model, args.mcore_adapter, *args.adapters]
    return partial(check_output, output_dir, kind, args.exist_ok, [i for i in inputs if i], needed=needed)


def default_output_dir(model: str | Path, suffix: str) -> str:
    """`<name>-mcore` or `<name>-hf` in the working directory."""
    name = str(model).rstrip("/").rsplit("/", 1)[-1]
    return f"{name.removesuffix('-mcore') if suffix == 'hf' else name}-{suffix}"


def _report_plan(
    what: str, source: Path, target: Path, bound: BoundMap, coverage: Coverage | None, total: int, files: int, args: Any
) -> None:
    log = get_logger()
    log.info("%s: %s -> %s", what, source, target)
    log.info(
        "%d tensors, %s in %d files; planned peak memory %s", len(bound.by_hf), format_bytes(total), files,
        format_bytes(peak_memory_bytes() + stream.planned_bytes(args.max_memory_bytes)),
    )  # fmt: skip
    if coverage and coverage.ignored:
        log.info("ignored: %s", ", ".join(coverage.ignored[:5]) + (" ..." if len(coverage.ignored) > 5 else ""))
    for duplicate in coverage.duplicates if coverage else ():
        log.info("%s is a copy of %s: checked, kept once, written again on the way back", duplicate.name, duplicate.of)


def _check_precision(
    args: Any,
    written: Path,
    hf_dir: Path,
    mcore_dir: Path,
    source: SafetensorsSource | None = None,
    vocab_size: int | None = None,
    cast: torch.dtype | None = None,
) -> None:
    if not args.test_convert_precision:
        return
    try:
        from swiftlite.selftest.precision import check_precision, groups_of_check

        with groups_of_check(hf_dir):
            if get_rank() == 0:
                check_precision(hf_dir, mcore_dir, args, source, vocab_size, cast)
            barrier()
    except VerifyError:
        raise
    except Exception as error:  # transformers and remote code fail in any way there is
        raise UncheckedError(
            f"converted, but the precision check could not run: {' '.join(str(error).split())}. The result is kept in "
            f"{written}: the same command checks it again, without --test_convert_precision it becomes the output"
        ) from error


def _summary(output_dir: Path, total: int, started: float, next_words: Sequence[Any]) -> None:
    seconds = time.time() - started
    get_logger().info(
        "wrote %s (%s) in %.1f s, %s/s, measured peak memory %s", output_dir, format_bytes(total), seconds,
        format_bytes(total / max(seconds, 1e-9)), format_bytes(peak_memory_bytes()),
    )  # fmt: skip
    log_next("swiftlite", *next_words)


def _ready(args: Any) -> Any:
    """ExportArguments with the model's facts, from such an object or from words as typed."""
    args = as_arguments(ExportArguments, args)
    if not hasattr(args, "model_info"):
        resolve(args, need_template=args.test_convert_precision)
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


def _export_adapter(args: Any) -> Path:
    """What `export` does with --adapters or --mcore_adapter: the other format, or merging into the base model."""
    path = the_adapter(args)
    if args.merge_lora and args.to_mcore:
        return convert_hf2mcore(args)
    if args.test_convert_precision:
        raise UsageError(
            "--test_convert_precision true: compares two whole models; with an adapter give it together with "
            "--to_mcore true --merge_lora true"
        )
    if not args.merge_lora and args.to_mcore == args.to_hf:
        raise UsageError("an adapter: give --to_mcore true, --to_hf true, or --merge_lora true")
    suffix = "merged" if args.merge_lora else "mcore" if args.to_mcore else "hf"
    output_dir = Path(args.output_dir or default_output_dir(path, suffix))
    with tempfile.TemporaryDirectory() as scratch:
        if args.merge_lora:
            base = Path(args.mcore_model) if args.mcore_model else Path(args.model_info.model_dir)
            dtype = args.dtype if "torch_dtype" in args.given else None
            new_tokens = plan_tokens(args, read_config(origin_root(base)))
            adapter = open_adapter(path, Origin(base, new_tokens).bound, Path(scratch), plain=False)
            return merge_to_hf(
                base, adapter, output_dir, dtype, new_tokens, record=args.save, next_words=args.loading_words(hub=False),
                max_shard_bytes=args.max_shard_bytes, exist_ok=args.exist_ok,
                max_memory=args.max_memory_bytes, verify=args.verify == "bitwise", dry_run=args.dry_run,
                allow_overflow=args.allow_overflow,
            )  # fmt: skip
        return convert_adapter(args, open_adapter(path, _base_map(args), Path(scratch)), output_dir)


def _base_map(args: Any) -> BoundMap:
    """The weight map of the adapter's base model, from --model or --mcore_model, with the adapter's new tokens."""
    config = read_config(Path(args.model_info.model_dir))
    return bind_map(grown(config, plan_tokens(args, config)), ["mtp."])
